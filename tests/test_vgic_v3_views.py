"""The same GICv3 seen from several sides: guest accesses of every size, attributes, the saved state, other orders.

What must agree is stated as properties over all offsets, sizes, values and orders.
"""

from __future__ import annotations

import errno
from typing import Any

import pytest
from gic_machine import (
    ADDR,
    CPU_SYSREGS,
    CTRL,
    DIST,
    DIST_REGS,
    GICD_BASE,
    GICR_BASE,
    GICR_SIZE,
    INIT,
    LEVEL_INFO,
    NR_IRQS,
    REDIST,
    REDIST_REGION,
    REDIST_REGS,
    SGI_BASE,
    GicMachine,
    refusal,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.devices.arm.vgic_v3_regs import GICD, GICR
from fabric.devices.registers import RegisterBlock

ALL = 0xFFFF_FFFF
NR = 64
"""Interrupts of the machines here."""

# What there is, by the architecture's register maps less what KVM leaves out: (first, last offset, access sizes).
DISTRIBUTOR = (
    (0x0000, 0x0013, (4,)),
    (0x0080, 0x03FF, (4,)),
    (0x0400, 0x0BFF, (1, 4)),
    (0x0C00, 0x0D7F, (4,)),
    (0x6000, 0x7FFF, (4, 8)),
    (0xFFD0, 0xFFFF, (4,)),
)
BITS = {0x0080: 1, 0x0400: 8, 0x0C00: 2, 0x0D00: 1, 0x6000: 64}
"""Bits per interrupt of the arrays that begin there."""
REDISTRIBUTOR = (
    (0x0000, 0x0007, (4,)),
    (0x0008, 0x000F, (4, 8)),
    (0x0014, 0x0017, (4,)),
    (0x0070, 0x007F, (4, 8)),
    (0x00A0, 0x00A7, (4, 8)),
    (0x00B0, 0x00B7, (4, 8)),
    (0x00C0, 0x00C3, (4,)),
    (0xFFD0, 0xFFFF, (4,)),
    *((SGI_BASE + offset, SGI_BASE + offset + 3, (4,)) for offset in range(0x80, 0x400, 0x80)),
    (SGI_BASE + 0x400, SGI_BASE + 0x41F, (1, 4)),
    (SGI_BASE + 0xC00, SGI_BASE + 0xC07, (4,)),
    (SGI_BASE + 0xD00, SGI_BASE + 0xD03, (4,)),
    (SGI_BASE + 0xE00, SGI_BASE + 0xE03, (4,)),
)
FRAMES = [
    pytest.param(DIST_REGS, GICD, DISTRIBUTOR, GICD_BASE, id="GICD"),
    pytest.param(REDIST_REGS, GICR, REDISTRIBUTOR, GICR_BASE, id="GICR"),
]
USER_ONLY = {0x200: "the latch", 0x280: "nothing"}
"""Arrays of which userspace has something else than the guest: ISPENDR and ICPENDR."""


def sizes(frame: Any, offset: int) -> tuple[int, ...]:
    """With which sizes a guest may access an offset."""
    for first, last, widths in frame:
        if first <= offset <= last:
            if frame is DISTRIBUTOR and 0x80 <= offset < 0x8000:
                start = max(start for start in BITS if start <= offset)
                row = 0x80 if BITS[start] == 1 else 0x400 if BITS[start] == 8 else 0x2000
                if (offset - start) % row * 8 // BITS[start] >= NR:
                    return ()
            return tuple(width for width in widths if offset % width == 0)
    return ()


def offsets(frame: Any) -> st.SearchStrategy[int]:
    """Offsets that are of interest: in a row, at its edges, anywhere."""
    end = 0x1_FFFF if frame is REDISTRIBUTOR else 0xFFFF
    rows = st.sampled_from(frame).flatmap(lambda row: st.integers(row[0], min(row[1] + 8, row[0] + 0x50, end)))
    return st.one_of(rows, st.integers(0, end))


def busy_machine() -> GicMachine:
    """A machine with something in every register."""
    machine = GicMachine(2, nr_irqs=NR)
    machine.set(DIST_REGS, 0xC08, 0x1234_5678)
    machine.set(DIST_REGS, 0x84, 0xF0F0_F00F)
    machine.set(DIST_REGS, 0x104, 0x00FF_FF00)
    machine.set(DIST_REGS, 0x204, 0x1100_0011)
    machine.set(DIST_REGS, 0x304, 0x0101_0101)
    for offset in range(0, 32, 4):
        machine.set(DIST_REGS, 0x420 + offset, 0x1020_3040 + offset * 0x0808_0808 & ALL)
        machine.set(REDIST_REGS, SGI_BASE + 0x400 + offset, 0xF8E8_D8C8)
    for intid in range(32, NR):
        machine.set(DIST_REGS, 0x6000 + 8 * intid, intid & 1)
    machine.set(LEVEL_INFO, 32, 0x00F0_0F00)
    machine.set(LEVEL_INFO, 0, 0x0050_0000)
    machine.set(REDIST_REGS, SGI_BASE + 0x200, 0x8000_0001)
    machine.set(REDIST_REGS, SGI_BASE + 0x180, 0x0000_00F0)
    machine.set(REDIST_REGS, SGI_BASE + 0x300, 0x0001_0002)
    machine.write(0x70, 0x0100_0080_1234_5F9F, 8, base=GICR_BASE)
    machine.write(0x78, 0x0200_0080_1234_5F80, 8, base=GICR_BASE)
    return machine


BUSY = busy_machine()
"""To be read only."""


# -- one register from several sides


@pytest.mark.parametrize(("group", "block", "frame", "base"), FRAMES)
@given(data=st.data())
def test_what_exists(group: int, block: RegisterBlock, frame: Any, base: int, data: st.DataObject) -> None:
    """KVM_HAS_DEVICE_ATTR has what a guest can access with 4 bytes, for every offset and no further."""
    offset = data.draw(offsets(frame))

    assert (0 if 4 in sizes(frame, offset) else errno.ENXIO) == BUSY.has(group, offset)
    assert errno.ENXIO == BUSY.has(group, offset + block.size)


@pytest.mark.parametrize(("group", "block", "frame", "base"), FRAMES)
@given(data=st.data(), size=st.sampled_from([1, 2, 4, 8]))
def test_a_guest_reads_parts_of_words(
    group: int, block: RegisterBlock, frame: Any, base: int, data: st.DataObject, size: int
) -> None:
    """What an access of 1 or 8 bytes reads is cut out of, or put together from, words; other accesses read 0."""
    offset = data.draw(offsets(frame)) % (block.size - 7)
    words = [BUSY.read((offset & ~3) + at, base=base) for at in (0, 4) if (offset & ~3) + at < block.size] + [0]
    whole = (words[0] | words[1] << 32) >> 8 * (offset & 3) & (1 << 8 * size) - 1

    assert (whole if size in sizes(frame, offset) else 0) == BUSY.read(offset, size, base=base)


@pytest.mark.parametrize(("group", "block", "frame", "base"), FRAMES)
@given(data=st.data())
def test_attributes_read_what_the_guest_reads(
    group: int, block: RegisterBlock, frame: Any, base: int, data: st.DataObject
) -> None:
    """Except ISPENDR, of which userspace has the latch, and ICPENDR, of which it has nothing."""
    offset = data.draw(offsets(frame)) & ~3
    special = USER_ONLY.get(offset & ~0x7F if frame is DISTRIBUTOR else offset - SGI_BASE)
    guest, user = BUSY.read(offset, base=base), BUSY.get(group, offset)
    if special is None:
        assert guest == user
    elif special == "nothing":
        assert 0 == user
    else:
        first = (offset & 0x7F) * 8
        irqs = [BUSY.vgic.register_irq(first + n) if frame is DISTRIBUTOR else BUSY.cpu.private[n] for n in range(32)]
        assert user == sum(irq.pending << n for n, irq in enumerate(irqs) if irq is not None)
        assert guest == sum(irq.asserted << n for n, irq in enumerate(irqs) if irq is not None)


@pytest.mark.parametrize(("group", "block", "frame", "base"), FRAMES)
@settings(max_examples=60)
@given(data=st.data(), value=st.integers(0, ALL))
def test_setting_what_was_read_changes_nothing(
    group: int, block: RegisterBlock, frame: Any, base: int, data: st.DataObject, value: int
) -> None:
    """GET then SET of any offset leaves the state as it is; SET twice is SET once. (ICENABLER and ICACTIVER clear.)"""
    machine = busy_machine()
    offset = data.draw(offsets(frame)) & ~3
    clears = offset & 0x380 in (0x180, 0x380) and offset & 0xFC00 == 0
    refused = [8, 0xC] if frame is DISTRIBUTOR else []
    before = machine.vgic.state()
    if not clears:
        machine.set(group, offset, machine.get(group, offset))
        assert before == machine.vgic.state()

    code = refusal(machine.set, group, offset, value)
    assert not code or (code == errno.EINVAL and offset in refused)
    once = machine.vgic.state()
    refusal(machine.set, group, offset, value)
    assert once == machine.vgic.state()
    machine.check()


WORDS = [
    # group, offset of the words, how many, what they keep of a value, and whether a value is added to what is there
    pytest.param(DIST_REGS, 0x84, 1, ALL, False, id="GICD_IGROUPR"),
    pytest.param(DIST_REGS, 0x104, 1, ALL, True, id="GICD_ISENABLER"),
    pytest.param(DIST_REGS, 0x204, 1, ALL, False, id="GICD_ISPENDR"),
    pytest.param(DIST_REGS, 0x304, 1, ALL, True, id="GICD_ISACTIVER"),
    pytest.param(DIST_REGS, 0x420, 8, 0xF8F8_F8F8, False, id="GICD_IPRIORITYR"),
    pytest.param(DIST_REGS, 0xC08, 2, 0xAAAA_AAAA, False, id="GICD_ICFGR"),
    pytest.param(REDIST_REGS, SGI_BASE + 0x80, 1, ALL, False, id="GICR_IGROUPR0"),
    pytest.param(REDIST_REGS, SGI_BASE + 0x100, 1, ALL, True, id="GICR_ISENABLER0"),
    pytest.param(REDIST_REGS, SGI_BASE + 0x200, 1, ALL, False, id="GICR_ISPENDR0"),
    pytest.param(REDIST_REGS, SGI_BASE + 0x300, 1, ALL, True, id="GICR_ISACTIVER0"),
    pytest.param(REDIST_REGS, SGI_BASE + 0x400, 8, 0xF8F8_F8F8, False, id="GICR_IPRIORITYR0"),
]


@pytest.mark.parametrize(("group", "first", "count", "kept", "adds"), WORDS)
@settings(max_examples=30)
@given(values=st.lists(st.tuples(st.integers(0, 7), st.integers(0, ALL)), min_size=1, max_size=4))
def test_what_is_set_is_read(
    group: int, first: int, count: int, kept: int, adds: bool, values: list[tuple[int, int]]
) -> None:
    """In the bits there are; the registers that set bits add to them. Every vCPU has words of its own."""
    machine = busy_machine()
    cpu = 1 << 32 if group == REDIST_REGS else 0
    other = machine.vgic.state().cpus[0]
    for n, value in values:
        attr = cpu | first + n % count * 4
        expected = (machine.get(group, attr) if adds else 0) | value & kept
        machine.set(group, attr, value)
        assert expected == machine.get(group, attr)
    if cpu:
        assert other == machine.vgic.state().cpus[0]
    machine.check()


@settings(max_examples=30)
@given(intid=st.integers(32, NR - 1), low=st.integers(0, ALL), high=st.integers(0, ALL), user=st.booleans())
def test_a_route_keeps_three_levels(intid: int, low: int, high: int, user: bool) -> None:
    """In the low word; whoever writes it, in words or at once, and the target follows."""
    machine = GicMachine(2, nr_irqs=NR)
    offset = 0x6000 + 8 * intid
    if user:
        machine.set(DIST_REGS, offset, low)
        machine.set(DIST_REGS, offset + 4, high)
    else:
        machine.write(offset, high << 32 | low, 8)
    kept = low & 0xFF_FFFF

    assert [kept, 0] == [machine.get(DIST_REGS, offset + at) for at in (0, 4)]
    assert kept == machine.read(offset, 8)
    assert (kept if kept < 2 else None) == getattr(machine.vgic.spis[intid - 32].target, "index", None)


@pytest.mark.parametrize(("group", "block", "frame", "base"), FRAMES)
@settings(max_examples=60)
@given(data=st.data(), size=st.sampled_from([1, 2, 4, 8]), value=st.integers(0, (1 << 64) - 1))
def test_a_write_reaches_its_own_words_only(
    group: int, block: RegisterBlock, frame: Any, base: int, data: st.DataObject, size: int, value: int
) -> None:
    """A guest's write changes no word outside of it but the other views of the same bits; a size that is not
    accepted changes nothing."""
    machine = busy_machine()
    offset = data.draw(offsets(frame)) % (block.size - 7)
    before = machine.vgic.state()
    around = range(max(offset - 0x20 & ~3, 0), min(offset + 0x20, block.size), 4)
    seen = {word: machine.read(word, base=base) for word in around}
    machine.write(offset, value, size, base=base)
    if size not in sizes(frame, offset):
        assert before == machine.vgic.state()
        return
    for word, was in seen.items():
        if not offset - 4 < word < offset + size:
            assert was == machine.read(word, base=base), hex(word)
    machine.check()


@given(
    words=st.lists(st.tuples(st.sampled_from([0, 4]), st.integers(0, ALL)), min_size=1, max_size=4),
    register=st.sampled_from([0x70, 0x78]),
    guest=st.booleans(),
)
def test_a_table_register_written_in_halves(words: list[tuple[int, int]], register: int, guest: bool) -> None:
    """Each half keeps the other, PTZ included although it reads as zero: as if written at once in the end."""
    halves, whole = GicMachine(), GicMachine()
    value = halves.cpu.vgic.propbaser if register == 0x70 else halves.cpu.pendbaser
    for at, word in words:
        value = value & ~(ALL << 8 * at) | word << 8 * at
        whole.write(register, value, 8, base=GICR_BASE)
        value = whole.vgic.propbaser if register == 0x70 else whole.cpu.pendbaser
        if guest:
            halves.write(register + at, word, base=GICR_BASE)
        else:
            halves.set(REDIST_REGS, register + at, word)

    assert whole.vgic.state() == halves.vgic.state()


# -- orders


STEPS = ("vcpu", "vcpu", "nr", "dist", "redist")


@given(order=st.permutations(STEPS))
def test_the_order_of_setting_up_does_not_matter(order: list[str]) -> None:
    """vCPUs, number of interrupts and addresses in any order before initialisation come to the same GIC."""
    machine = GicMachine(0, ready=False)
    for step in order:
        match step:
            case "vcpu":
                machine.add_vcpu()
            case "nr":
                machine.set(NR_IRQS, 0, NR)
            case "dist":
                machine.set(ADDR, DIST, GICD_BASE)
            case "redist":
                machine.set(ADDR, REDIST, GICR_BASE)
    machine.set(CTRL, INIT)
    machine.vgic.first_run()

    assert SET_UP.vgic.state() == machine.vgic.state()
    for cpu in (0, 1):
        base = GICR_BASE + cpu * GICR_SIZE
        assert cpu << 8 | 0x10 * cpu == machine.read(8, base=base) == machine.get(REDIST_REGS, cpu << 32 | 8)


def set_up() -> GicMachine:
    machine = GicMachine(2, ready=False)
    machine.set(NR_IRQS, 0, NR)
    machine.set(ADDR, DIST, GICD_BASE)
    machine.set(ADDR, REDIST, GICR_BASE)
    machine.set(CTRL, INIT)
    machine.vgic.first_run()
    return machine


SET_UP = set_up()


@pytest.mark.parametrize("group", [DIST_REGS, REDIST_REGS, CPU_SYSREGS, LEVEL_INFO])
@pytest.mark.parametrize("attr", [0, 0x104, SGI_BASE + 0x200, 0xC230, 32])
def test_before_initialisation_registers_are_busy_whatever_they_are(group: int, attr: int) -> None:
    """Known or not, EBUSY; has-tests answer, and arrays have the private interrupts only."""
    machine = GicMachine(ready=False)

    assert errno.EBUSY == refusal(machine.get, group, attr)
    assert errno.EBUSY == refusal(machine.set, group, attr)
    assert [0, errno.ENXIO] == [machine.has(DIST_REGS, 0x100), machine.has(DIST_REGS, 0x104)]


REGISTERED = st.lists(
    st.tuples(
        st.sampled_from([0x10_0000, 0x14_0000, 0x18_0000, 0x20_0000, 0x21_0000]), st.integers(0, 3), st.integers(0, 3)
    ),
    max_size=6,
)


@given(regions=REGISTERED, vcpus=st.integers(0, 5), late=st.integers(0, 3))
def test_redistributors_fill_regions_in_order(regions: list[tuple[int, int, int]], vcpus: int, late: int) -> None:
    """Whatever is registered when: slots follow each other in the order of regions and vCPUs, Last ends each run."""
    machine = GicMachine(vcpus, ready=False)
    accepted: list[tuple[int, int]] = []
    for base, count, index in regions:
        free = all(base + count * GICR_SIZE <= at or base >= at + n * GICR_SIZE for at, n in accepted)
        wanted = count > 0 and index == len(accepted) and free
        code = refusal(machine.set, ADDR, REDIST_REGION, count << 52 | base | index)
        assert (0 if wanted else errno.EINVAL) == code
        if wanted:
            accepted.append((base, count))
    for _ in range(late):
        machine.add_vcpu()
    places = [base + n * GICR_SIZE for base, count in accepted for n in range(count)]
    total = vcpus + late
    machine.set(CTRL, INIT)

    found = [at for at in sorted(places) if machine.vm.mmio.find(at) is not None]
    assert sorted(places[:total]) == found
    for cpu, at in enumerate(places[:total]):
        region = next((base, count) for base, count in accepted if base <= at < base + count * GICR_SIZE)
        full = at + GICR_SIZE == region[0] + region[1] * GICR_SIZE
        follows = any(base == at + GICR_SIZE and base in places[:total] for base, _ in accepted)
        last = cpu + 1 == total or full
        assert (last and not (full and follows)) == bool(machine.read(8, base=at) & 0x10)
        assert cpu == machine.read(8, base=at) >> 8 & 0xFFFF
