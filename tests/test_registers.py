"""The register engine: blocks as tables with a guest's and a userspace view."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.devices.registers import Access, IrqArray, Register, RegisterBlock, View


class Chip:
    """What the registers below belong to."""

    def __init__(self, irqs: int = 40) -> None:
        self.wide = 0x1122_3344_5566_7788
        self.commands: list[int] = []
        self.fields = [0] * irqs

    def register_irq(self, n: int) -> int | None:
        return n if 8 <= n < len(self.fields) else None


def _wide(chip: Chip) -> int:
    return chip.wide


def _set_wide(chip: Chip, value: int) -> None:
    chip.wide = value


def _field(chip: Chip, n: int) -> int:
    return chip.fields[n]


def _set_field(chip: Chip, n: int, value: int) -> None:
    chip.fields[n] = value


def _set_one(chip: Chip, n: int, value: int) -> None:
    assert value == 1
    chip.fields[n] = 1


def _command(chip: Chip, value: int) -> None:
    chip.commands.append(value)


FIELDS: Any = {"read": _field, "write": _set_field}
BLOCK = RegisterBlock(
    "CHIP",
    0x1000,
    (
        Register(0x00, "WIDE", Access.RW, read=_wide, write=_set_wide, length=8, widths=(4, 8)),
        Register(0x08, "ID", Access.RO, value=0xABCD),
        Register(0x0C, "ONES", Access.RAO_WI),
        Register(0x10, "GO", Access.WO, write=_command, length=8, widths=(4, 8)),
        Register(0x18, "HIDDEN", Access.RO, value=1, user=View(access=Access.RW, write=_command)),
        IrqArray(0x100, "ENABLE", Access.W1S, 1, read=_field, write=_set_one, user=View(access=Access.RAZ_WI)),
        IrqArray(0x400, "PRIORITY", Access.RW, 8, widths=(1, 4), **FIELDS),
        IrqArray(0x800, "ROUTE", Access.RW, 64, widths=(4, 8), count=64, **FIELDS),
    ),
    irq_limit=lambda chip: len(chip.fields),
)


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        pytest.param(0, 8, 0x1122_3344_5566_7788, id="whole"),
        pytest.param(0, 4, 0x5566_7788, id="low-half"),
        pytest.param(4, 4, 0x1122_3344, id="high-half"),
        pytest.param(0, 2, 0, id="width-not-allowed"),
        pytest.param(2, 4, 0, id="misaligned"),
        pytest.param(8, 4, 0xABCD, id="constant"),
        pytest.param(8, 8, 0, id="wider-than-allowed"),
        pytest.param(0xC, 4, 0xFFFF_FFFF, id="all-ones"),
        pytest.param(0x10, 4, 0, id="write-only"),
        pytest.param(0x20, 4, 0, id="nothing-there"),
    ],
)
def test_guest_reads(offset: int, size: int, value: int) -> None:
    """A narrow read is cut out; what is not there, or not so wide, reads zero."""
    assert value == BLOCK.read(Chip(), offset, size)


def test_a_narrow_write_is_merged() -> None:
    """The other half of the register stays."""
    chip = Chip()

    BLOCK.write(chip, 4, 4, 0xDEAD_BEEF)

    assert 0xDEAD_BEEF_5566_7788 == chip.wide


def test_a_read_only_register_ignores_writes() -> None:
    """And stays what it is."""
    chip = Chip()

    BLOCK.write(chip, 8, 4, 0)

    assert 0xABCD == BLOCK.read(chip, 8, 4)


def test_a_command_is_given_by_its_lowest_byte() -> None:
    """A write to the upper half alone is none."""
    chip = Chip()

    BLOCK.write(chip, 0x14, 4, 9)
    BLOCK.write(chip, 0x10, 4, 5)
    BLOCK.write(chip, 0x10, 8, 0x7_0000_0006)

    assert [5, 0x7_0000_0006] == chip.commands


def test_userspace_has_its_own_view() -> None:
    """The row's ``user`` replaces the guest's access, and its functions where given."""
    chip = Chip()
    chip.fields[9] = 1

    BLOCK.write(chip, 0x18, 4, 3)
    BLOCK.user_write(chip, 0x18, 4)
    BLOCK.user_write(chip, 0x100, 0xFF00)

    assert [4] == chip.commands
    assert 1 == BLOCK.user_read(chip, 0x18)
    assert 1 << 9 == BLOCK.read(chip, 0x100, 4)
    assert 0 == BLOCK.user_read(chip, 0x100)


def test_one_bit_per_interrupt_sets_where_ones_are() -> None:
    """Zeros do nothing, and interrupts that are not the owner's are left out."""
    chip = Chip()

    BLOCK.write(chip, 0x100, 4, 0x0001_0301)
    BLOCK.write(chip, 0x100, 4, 0x0002_0000)

    assert 0x0003_0300 == BLOCK.read(chip, 0x100, 4)


def test_a_byte_per_interrupt_by_byte_and_word() -> None:
    """Fields lie in interrupt order, the lowest in the lowest byte."""
    chip = Chip()

    BLOCK.write(chip, 0x400 + 8, 4, 0x4433_2211)
    BLOCK.write(chip, 0x400 + 10, 1, 0xAA)

    assert [0x11, 0x22, 0xAA, 0x44] == chip.fields[8:12]
    assert 0x44AA_2211 == BLOCK.read(chip, 0x408, 4)
    assert 0xAA == BLOCK.read(chip, 0x40A, 1)


def test_a_field_wider_than_the_access_is_halved() -> None:
    """64 bits per interrupt, read and written by words."""
    chip = Chip()

    BLOCK.write(chip, 0x800 + 8 * 9 + 4, 4, 0x1234)
    BLOCK.write(chip, 0x800 + 8 * 9, 4, 0x5678)

    assert 0x1234_0000_5678 == chip.fields[9]
    assert 0x1234 == BLOCK.read(chip, 0x800 + 8 * 9 + 4, 4)
    assert 0x1234_0000_5678 == BLOCK.read(chip, 0x800 + 8 * 9, 8)


@pytest.mark.parametrize(
    ("offset", "there"),
    [
        pytest.param(0x0, True, id="register"),
        pytest.param(0x4, True, id="upper-half"),
        pytest.param(0x2, False, id="misaligned"),
        pytest.param(0x1C, False, id="hole"),
        pytest.param(0x100, True, id="array"),
        pytest.param(0x104, True, id="interrupt-32-of-40"),
        pytest.param(0x108, False, id="beyond-the-interrupts"),
        pytest.param(0x1000, False, id="beyond-the-frame"),
    ],
)
def test_has(offset: int, there: bool) -> None:
    """A register exists where a row is, and arrays as far as there are interrupts."""
    assert there == BLOCK.has(Chip(), offset)


def test_rows_overlapping_or_out_of_order_are_a_mistake() -> None:
    """Found when the block is made, with the row named."""
    wide = Register(0x0, "WIDE", Access.RO, length=8)

    with pytest.raises(ValueError, match="NEXT must begin at 0x8 or later, not at 0x4"):
        RegisterBlock("BAD", 0x100, (wide, Register(0x4, "NEXT", Access.RO)))
    with pytest.raises(ValueError, match="rows must end by 0x4, not at 0x8"):
        RegisterBlock("BAD", 0x4, (wide,))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["read", "write", "user_read", "user_write", "has"]),
            st.integers(0, 0x1100),
            st.sampled_from([1, 2, 4, 8]),
            st.integers(0, (1 << 64) - 1),
        ),
        max_size=30,
    )
)
def test_no_access_fails(accesses: list[tuple[str, int, int, int]]) -> None:
    """Any offset, width and value: a read fits its width, and nothing raises."""
    chip = Chip()
    for kind, offset, size, value in accesses:
        if kind == "read":
            assert 0 <= BLOCK.read(chip, offset, size) < 1 << 8 * size
        elif kind == "write":
            BLOCK.write(chip, offset, size, value & (1 << 8 * size) - 1)
        elif kind == "user_read":
            assert 0 <= BLOCK.user_read(chip, offset) < 1 << 32
        elif kind == "user_write":
            BLOCK.user_write(chip, offset, value & 0xFFFF_FFFF)
        else:
            BLOCK.has(chip, offset)
