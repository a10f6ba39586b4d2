"""ITS tables in guest memory: layout, saving, restoring, and what is refused."""

from __future__ import annotations

import errno

import attrs
import pytest
from its_machine import (
    BASER0,
    BASER1,
    COLLECTION_TABLE,
    CTLR,
    DEVICE_TABLE,
    GRP_CTRL,
    HOLE,
    ITS_BASE,
    LEVEL2,
    LPI,
    RAM,
    RAM_SIZE,
    RESET,
    VALID,
    FakeVm,
    ItsMachine,
    event_command,
    itt,
    mapc,
    mapd,
    mapti,
)

from fabric.devices.arm.vgic_its import Its
from fabric.devices.arm.vgic_its_state import ItsState
from fabric.errors import KvmError
from fabric.uapi.arm64 import ItsCte, ItsDte, ItsIte
from fabric.uapi.kvm import KvmUserspaceMemoryRegion

NO_VCPU = 0xFFFF_FFFF


@pytest.fixture
def machine() -> ItsMachine:
    """Two vCPUs and an ITS that is set up and enabled."""
    return ItsMachine()


def words(machine: ItsMachine, address: int, count: int) -> list[int]:
    """64-bit words of guest memory."""
    return [machine.memory.read_u64(address + 8 * n) for n in range(count)]


def dte(device: int, bits: int = 5, step: int = 0) -> int:
    return VALID | step << 49 | itt(device) >> 8 << 5 | (bits - 1)


def ite(lpi: int, icid: int, step: int = 0) -> int:
    return step << 48 | lpi << 16 | icid


def cte(icid: int, rdbase: int) -> int:
    return VALID | rdbase << 16 | icid


def errno_of_restore(machine: ItsMachine) -> int | None:
    with pytest.raises(KvmError) as failure:
        machine.restore()
    machine.check()
    return failure.value.errno


@pytest.mark.spec(
    "layout.its-dte.rule.shift",
    "layout.its-dte.rule.flat",
    "its.ctrl.save-tables.rule.layout",
    "its.ctrl.save-tables.rule.next-field",
    "its.ctrl.save-tables.rule.cte-terminator",
)
def test_saved_entries(machine: ItsMachine) -> None:
    """Devices by id, events by id, each with the distance to the next; collections in the order they came."""
    machine.map_all(2, devid=4)
    machine.run(mapd(1), mapc(9, 1), mapti(4, 17, LPI + 17, 9))
    machine.memory.write_u64(COLLECTION_TABLE + 24, 0xDEAD)
    machine.save()

    assert [0, dte(1, step=3), 0, 0, dte(4)] == words(machine, DEVICE_TABLE, 5)
    assert [ite(LPI, 0, 1), ite(LPI + 1, 1, 16)] == words(machine, itt(4), 2)
    assert [ite(LPI + 17, 9)] == words(machine, itt(4) + 17 * 8, 1)
    assert [cte(0, 0), cte(1, 1), cte(9, 1), 0] == words(machine, COLLECTION_TABLE, 4)


def test_the_layouts_of_the_abi(machine: ItsMachine) -> None:
    """The entries decode by the layouts that the KVM interface documents."""
    machine.map_all(2, devid=4)
    machine.save()

    assert ItsDte(valid=1, itt_addr=itt(4) >> 8, size=4) == ItsDte.unpack(words(machine, DEVICE_TABLE, 5)[4])
    assert ItsIte(next=1, pintid=LPI, icid=0) == ItsIte.unpack(words(machine, itt(4), 1)[0])
    assert ItsCte(valid=1, rdbase=1, icid=1) == ItsCte.unpack(words(machine, COLLECTION_TABLE, 2)[1])


@pytest.mark.spec("its.ctrl.save-tables.rule.next-field")
def test_distances_saturate() -> None:
    """A device more than 16383 ids away is announced as 16383 away."""
    machine = ItsMachine()
    machine.set_reg(CTLR, 0)
    machine.set_reg(BASER0, VALID | DEVICE_TABLE | 3)
    machine.set_reg(CTLR, 1)
    machine.run(mapc(0, 0), mapd(0), mapd(20000), mapti(20000, 0, LPI, 0))
    machine.save()
    assert dte(0, step=16383) == words(machine, DEVICE_TABLE, 1)[0]
    machine.attr("set", GRP_CTRL, RESET)
    machine.set_reg(BASER0, VALID | DEVICE_TABLE | 3)
    machine.set_reg(BASER1, VALID | COLLECTION_TABLE)
    machine.restore()
    assert [0, 20000] == list(machine.its.devices)


@pytest.mark.spec("its.ctrl.save-tables.rule.unmapped-collection", "layout.its-cte.note.rdbase-width")
def test_events_without_a_collection(machine: ItsMachine) -> None:
    """An event that lost its collection is saved as zero, one whose collection has no vCPU yet as it is."""
    machine.map_all(2)
    machine.run(mapti(1, 2, LPI + 2, 7), mapc(0, 0, 0))
    machine.save()

    assert [0, ite(LPI + 1, 1, 1), ite(LPI + 2, 7)] == words(machine, itt(1), 3)
    assert [cte(1, 1), cte(7, NO_VCPU), 0] == words(machine, COLLECTION_TABLE, 3)


@pytest.mark.spec("its.ctrl.save-tables.rule.untouched-entries")
def test_other_entries_are_left_alone(machine: ItsMachine) -> None:
    """Saving writes the entries of what is mapped, and no others."""
    machine.memory.write_u64(DEVICE_TABLE, 0xDEAD)
    machine.memory.write_u64(itt(1) + 80, 0xBEEF)
    machine.map_all(2)
    machine.save()

    assert 0xDEAD == machine.memory.read_u64(DEVICE_TABLE)
    assert 0xBEEF == machine.memory.read_u64(itt(1) + 80)


def test_a_full_collection_table_has_no_end_mark() -> None:
    """The all-zero entry follows the last one unless the table is full."""
    machine = ItsMachine()
    machine.run(*(mapc(icid, icid % 2) for icid in range(8192)))
    machine.memory.write_u64(COLLECTION_TABLE + 0x10000, 0xDEAD)
    machine.save()

    assert [cte(8191, 1), 0xDEAD] == words(machine, COLLECTION_TABLE + 8191 * 8, 2)


@pytest.mark.spec("its.ctrl.save-tables.rule.skip-invalid-baser", "its.ctrl.restore-tables.rule.baser-invalid")
def test_invalid_tables_are_skipped() -> None:
    """Without valid BASERs saving and restoring succeed and do nothing."""
    machine = ItsMachine(set_up=False)
    machine.its.place(ITS_BASE)
    machine.memory.write(DEVICE_TABLE, b"\xff" * 64)
    machine.save()
    machine.restore()

    assert ({}, {}) == (machine.its.devices, machine.its.collections)


@pytest.mark.spec("layout.its-l1-entry.note.architecture", "its.ctrl.restore-tables.rule.indirect")
def test_indirect_device_table() -> None:
    """A level-1 entry points to a page of 8192 DTEs; an id whose entry is not valid cannot be mapped."""
    machine = ItsMachine(indirect=True)
    machine.memory.write_u64(DEVICE_TABLE, VALID | LEVEL2 | 0xFFF)
    machine.memory.write_u64(DEVICE_TABLE + 2 * 8, VALID | LEVEL2 + 0x10000)
    machine.run(mapc(0, 0), mapd(3), mapd(8192), mapd(16385), mapti(16385, 0, LPI, 0))
    assert [3, 16385] == list(machine.its.devices)
    machine.save()
    assert dte(3, step=16382) == machine.memory.read_u64(LEVEL2 + 3 * 8)
    assert dte(16385) == machine.memory.read_u64(LEVEL2 + 0x10008)
    machine.attr("set", GRP_CTRL, RESET)
    machine.set_reg(BASER0, VALID | 1 << 62 | DEVICE_TABLE)
    machine.set_reg(BASER1, VALID | COLLECTION_TABLE)
    machine.restore()
    assert [3], "a distance beyond the page ends the walk of that page"
    assert [3, 16385] == list(machine.its.devices)


@pytest.mark.spec("its.ctrl.save-tables.EINVAL.dev-table")
def test_save_without_room_for_a_device() -> None:
    """A device whose level-1 entry has become invalid cannot be saved."""
    machine = ItsMachine(indirect=True)
    machine.memory.write_u64(DEVICE_TABLE, VALID | LEVEL2)
    machine.run(mapd(3))
    machine.memory.write_u64(DEVICE_TABLE, 0)
    with pytest.raises(KvmError) as failure:
        machine.save()

    assert errno.EINVAL == failure.value.errno


@pytest.mark.spec("its.ctrl.save-tables.EFAULT.guest-ram", "its.ctrl.restore-tables.EFAULT.guest-ram")
def test_tables_outside_guest_memory(machine: ItsMachine) -> None:
    """A collection table or ITT that is not in a memory slot is EFAULT, both ways."""
    machine.map_all()
    machine.memory.set_region(KvmUserspaceMemoryRegion(0, 0, RAM, 0, 0))
    machine.memory.add_ram(RAM, 0x20_0000)
    machine.memory.add_ram(RAM + 0x80_0000, RAM_SIZE - 0x80_0000)
    with pytest.raises(KvmError) as failure:
        machine.save()

    assert errno.EFAULT == failure.value.errno
    assert errno.EFAULT == errno_of_restore(machine)


def fresh_tables(machine: ItsMachine) -> None:
    """One device with two events in two collections, written by hand."""
    machine.memory.write_u64(DEVICE_TABLE, 0)
    machine.memory.write_u64(DEVICE_TABLE + 8, dte(1))
    machine.memory.write_u64(itt(1), ite(LPI, 0, 1))
    machine.memory.write_u64(itt(1) + 8, ite(LPI + 1, 1))
    machine.memory.write_u64(COLLECTION_TABLE, cte(0, 0))
    machine.memory.write_u64(COLLECTION_TABLE + 8, cte(1, 1))


@pytest.mark.spec("its.ctrl.restore-tables.rule.order", "its.ctrl.restore-tables.rule.lpi-config")
def test_restored_maps_work(machine: ItsMachine) -> None:
    """Events come back with their LPIs' configuration, and take their pending bits from memory."""
    fresh_tables(machine)
    byte = machine.pending_table(1) + (LPI + 1) // 8
    machine.memory.write_u8(byte, 0x06)
    machine.restore()
    machine.check()

    assert {LPI + 1: 1} == machine.pending()
    assert 0x04 == machine.memory.read_u8(byte)
    assert 1 == machine.msi(1, 0)


CORRUPT = [
    pytest.param(COLLECTION_TABLE, cte(0, 2), errno.EINVAL, id="cte-target"),
    pytest.param(COLLECTION_TABLE, cte(8192, 0), errno.EINVAL, id="cte-icid"),
    pytest.param(COLLECTION_TABLE, cte(1, 0), errno.EEXIST, id="cte-twice"),
    pytest.param(DEVICE_TABLE + 8, dte(1, bits=17), errno.EINVAL, id="dte-size"),
    pytest.param(DEVICE_TABLE + 8, VALID | HOLE >> 8 << 5 | 4, errno.EFAULT, id="dte-itt"),
    pytest.param(itt(1), ite(8191, 0), errno.EINVAL, id="ite-no-lpi"),
    pytest.param(itt(1), ite(LPI, 2), errno.EINVAL, id="ite-collection"),
    pytest.param(itt(1), ite(LPI, 0, 32), errno.EINVAL, id="ite-next"),
]


@pytest.mark.spec(
    "its.ctrl.restore-tables.EINVAL.cte-icid",
    "its.ctrl.restore-tables.EINVAL.cte-target",
    "its.ctrl.restore-tables.EEXIST.cte-duplicate",
    "its.ctrl.restore-tables.EINVAL.dte-size",
    "its.ctrl.restore-tables.EINVAL.ite-intid",
    "its.ctrl.restore-tables.EINVAL.ite-next",
    "its.ctrl.restore-tables.EINVAL.ite-collection",
    "its.ctrl.restore-tables.rule.failure-cleans",
)
@pytest.mark.parametrize(("address", "entry", "code"), CORRUPT)
def test_corrupt_tables_are_refused(machine: ItsMachine, address: int, entry: int, code: int) -> None:
    """An entry that makes no sense fails the restore, and nothing of it stays."""
    fresh_tables(machine)
    machine.memory.write_u64(address, entry)

    assert code == errno_of_restore(machine)
    assert ({}, {}, {}) == (machine.its.devices, machine.its.collections, machine.vgic.lpis)


@pytest.mark.spec("its.ctrl.restore-tables.EINVAL.dte-id")
@pytest.mark.parametrize("indirect", [0, 1 << 62], ids=["flat", "indirect"])
def test_device_ids_have_16_bits(machine: ItsMachine, indirect: int) -> None:
    """A table may be larger than there are device ids; a valid entry beyond them is refused."""
    machine.set_reg(CTLR, 0)
    machine.set_reg(BASER0, VALID | indirect | DEVICE_TABLE | 8)
    if indirect:
        machine.memory.write_u64(DEVICE_TABLE + 8 * 8, VALID | LEVEL2)
    machine.memory.write_u64(LEVEL2 if indirect else DEVICE_TABLE + 8 * 65536, dte(1))

    assert errno.EINVAL == errno_of_restore(machine)


@pytest.mark.parametrize(
    ("address", "entry", "devices", "events"),
    [
        pytest.param(DEVICE_TABLE + 8, 0, [], 0, id="no-device"),
        pytest.param(DEVICE_TABLE, dte(0), [0], 0, id="chain-ends-early"),
        pytest.param(DEVICE_TABLE + 8, dte(1, step=9000), [1], 2, id="dte-next-beyond-the-table"),
        pytest.param(itt(1), ite(LPI, 0), [1], 1, id="event-chain-ends-early"),
        pytest.param(itt(1), ite(0, 0, 5), [1], 1, id="invalid-ite-is-passed-over"),
        pytest.param(COLLECTION_TABLE + 16, cte(5, NO_VCPU), [1], 2, id="collection-without-vcpu"),
    ],
)
def test_odd_tables_are_taken(machine: ItsMachine, address: int, entry: int, devices: list[int], events: int) -> None:
    """Entries that are merely not valid end or skip a chain."""
    fresh_tables(machine)
    machine.memory.write_u64(address, entry)
    machine.restore()
    machine.check()

    assert devices == list(machine.its.devices)
    assert events == sum(device.count for device in machine.its.devices.values())


def test_restoring_over_mapped_collections(machine: ItsMachine) -> None:
    """A collection that is mapped already is EEXIST and costs all of them; devices stay, their events detached."""
    machine.map_all()
    machine.save()

    assert errno.EEXIST == errno_of_restore(machine)
    assert ({}, [1]) == (machine.its.collections, list(machine.its.devices))
    assert 0 == machine.msi(1, 0)


def test_restoring_over_a_mapped_device(machine: ItsMachine) -> None:
    """A device that is there already stays what it is."""
    machine.map_all()
    machine.save()
    machine.memory.write_u64(COLLECTION_TABLE, 0)
    machine.memory.write_u64(DEVICE_TABLE + 8, dte(1, bits=3))
    before = machine.its.devices[1]
    machine.restore()
    machine.check()

    assert before is machine.its.devices[1]


@pytest.mark.spec("its.seq.restore", "its.seq.save")
def test_a_saved_its_comes_back(machine: ItsMachine) -> None:
    """Saving, copying memory and registers, and restoring gives an ITS that does the same."""
    machine.map_all()
    machine.run(mapd(7, 16), mapti(7, 4000, LPI + 40, 1), mapc(9, 0))
    machine.save()
    other = ItsMachine(set_up=False)
    other.memory.write(RAM, machine.memory.read(RAM, RAM_SIZE))
    other.its.place(ITS_BASE)
    for offset in (0x80, 0x4, BASER0, BASER1, 0x90, 0x88):
        other.set_reg(offset, machine.reg(offset))
    other.restore()
    other.set_reg(CTLR, 1)

    assert machine.its.state() == other.its.state()
    assert 1 == other.msi(7, 4000)


class TestState:
    def test_goes_on_as_before(self, machine: ItsMachine) -> None:
        """A copy answers the same MSIs and commands, the translation cache included."""
        machine.map_all()
        machine.run(mapti(1, 9, LPI, 1), mapti(1, 10, LPI + 10, 7))
        machine.msi(1, 0)
        other = machine.copy()
        other.check()

        assert machine.its.state() == other.its.state()
        assert machine.vgic.propbaser == other.vgic.propbaser
        for one in (machine, other):
            assert 1 == one.msi(1, 0, flags=0)
            one.run(event_command("DISCARD", 1, 0))
            assert 0 == one.msi(1, 0)
            one.run(event_command("DISCARD", 1, 9))
        assert machine.its.state() == other.its.state()
        assert list(machine.vgic.lpis) == list(other.vgic.lpis)

    def test_default_state_is_a_new_its(self) -> None:
        """A new ITS is one restored from its own initial state."""
        new = Its.create(FakeVm())

        assert new.state() == Its.from_state(FakeVm(), new.state()).state()
        assert 1 == attrs.asdict(ItsState())["version"]

    def test_unknown_versions_are_refused(self) -> None:
        """A record of another version is a ValueError."""
        with pytest.raises(ValueError, match="version must be 1, not 2"):
            Its.from_state(FakeVm(), ItsState(version=2))
