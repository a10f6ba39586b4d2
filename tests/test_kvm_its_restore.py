"""Saving a VM's ITSs and restoring them in another: the documented order, any maps, any damage to the tables."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvm_its import (
    BASER,
    CBASER,
    COLLECTION_TABLE,
    CONFIG,
    CREADR,
    CTLR,
    CWRITER,
    DEVICE_TABLE,
    IIDR,
    LEVEL2,
    LPI,
    NEXT,
    PENDING,
    QUEUE,
    RAM,
    RAM_SIZE,
    RESTORE_TABLES,
    SAVE_TABLES,
    VALID,
    ItsHost,
    ItsVm,
    Saved,
    itt,
    mapc,
    mapd,
    mapti,
    pending_table,
)
from kvm_machine import outcome

import fabric
from fabric.devices.arm.vgic_its_commands import encode
from fabric.memory import GuestMemory


def working(vcpus: int = 2) -> ItsVm:
    """A VM with two devices, LPI 8193 pending at vCPU 1, and two commands in the queue that have not been run."""
    vm = ItsVm(ItsHost(), vcpus)
    vm.boot()
    vm.run(mapd(1), mapd(7), *(mapti(1, event, LPI + event, event % vcpus) for event in range(3)))
    vm.run(mapti(7, 4, LPI + 9, 0))
    vm.msi(1, 1)
    vm.host.write(QUEUE + vm.reg(CWRITER), mapti(7, 5, LPI + 10, 0) + mapti(7, 6, LPI + 11, 0))
    return vm


def queue_two_more(saved: Saved) -> Saved:
    """As if the guest had announced the two commands while the ITS was off."""
    saved.its[0][CWRITER] += 64
    return saved


class TestOrder:
    """A restore in the documented order, with a step left out or in the wrong place."""

    @pytest.mark.spec("its.seq.restore.8-run", "its.seq.restore.7-ctlr", "its.its-regs.rule.ctlr-last")
    def test_all_of_it(self) -> None:
        """The guest goes on: the pending LPI is taken, the commands that were queued are run, MSIs arrive."""

        async def main() -> list[int]:
            first = working()
            second = ItsVm(ItsHost())
            second.restore(queue_two_more(first.save()))
            assert first.maps()[1] == second.maps()[1]
            assert [1, 1] == [second.msi(7, 5), second.msi(7, 6)]
            second.gic.set_attr(1, 0, 2)  # GICD_CTLR
            seen: list[int] = []

            async def guest(cpu: Any) -> None:
                await cpu.msr("ICC_PMR_EL1", 0xF0)
                await cpu.msr("ICC_IGRPEN1_EL1", 1)
                seen.append(await cpu.mrs("ICC_IAR1_EL1"))
                await cpu.store(0x1000, 4, 0)

            second.run(encode("INVALL", ICID=1))
            second.vcpus[1].load(guest)
            await second.vcpus[1].run()
            second.host.kvm.check()
            return seen

        assert [LPI + 1] == fabric.run(main)

    @pytest.mark.spec("its.seq.restore.1-ram-and-vcpus")
    def test_ram_and_vcpus_come_first(self) -> None:
        """Without RAM there are no tables to read, and a collection that goes to a vCPU that is missing is refused."""
        saved = working().save()
        memoryless, small = ItsVm(ItsHost(), memory=False), ItsVm(ItsHost(), 1)

        assert "EFAULT" == outcome(memoryless.restore, saved, leave_out=["ram"])
        saved.redistributors.pop()
        assert "EINVAL" == outcome(small.restore, saved)

    @pytest.mark.spec("its.seq.restore.2-redistributors")
    def test_redistributors_come_before_the_tables(self) -> None:
        """They say where LPI configuration and pending bits are, which restoring the tables reads."""
        saved = working().save()
        vm = ItsVm(ItsHost())

        assert "EFAULT" == outcome(vm.restore, saved, leave_out=["redistributors"])
        vm.restore_redistributors(saved)
        vm.control(RESTORE_TABLES)
        assert (1, True, True) == vm.lpis()[LPI + 1]

    @pytest.mark.spec("its.seq.restore.3-address")
    def test_the_address_comes_before_registers(self) -> None:
        """An ITS without address has no registers."""
        assert "ENXIO" == outcome(ItsVm(ItsHost()).restore, working().save(), leave_out=["address"])

    @pytest.mark.spec("its.seq.restore.4-cbaser", "its.seq.restore.note.creadr-after-cbaser")
    def test_cbaser_comes_before_creadr(self) -> None:
        """Writing GITS_CBASER zeroes GITS_CREADR; after GITS_CTLR it is too late for either."""
        saved = working().save()
        vm = ItsVm(ItsHost())
        vm.restore(saved, leave_out=["cbaser", "tables", "ctlr"])
        assert saved.its[0][CREADR] == vm.reg(CREADR)
        vm.set_reg(CBASER, saved.its[0][CBASER])
        assert 0 == vm.reg(CREADR)
        vm.set_reg(CTLR, 1)
        assert "EBUSY" == outcome(vm.set_reg, CREADR, saved.its[0][CREADR])
        vm.set_reg(CBASER, 0)
        assert saved.its[0][CBASER] == vm.reg(CBASER)

    @pytest.mark.spec("its.seq.restore.5-other-regs")
    def test_the_tables_are_found_by_registers(self) -> None:
        """Before GITS_BASER is written restoring the tables restores nothing, and GITS_CTLR cannot enable the ITS."""
        saved = working().save()
        vm = ItsVm(ItsHost())
        vm.restore(saved, leave_out=["registers"])

        assert (([], []), 1 << 31) == (vm.maps(), vm.reg(CTLR))

    @pytest.mark.spec("its.seq.restore.note.iidr-before-tables")
    def test_iidr_picks_the_format_of_the_tables(self) -> None:
        """GITS_IIDR is among the registers before the tables: a format that is not known is refused before them."""
        saved = working().save()
        saved.its[0][IIDR] |= 1 << 12
        vm = ItsVm(ItsHost())

        assert "EINVAL" == outcome(vm.restore, saved)
        assert ([], []) == vm.maps()
        assert 0x4B00_043B == vm.reg(IIDR)

    @pytest.mark.spec("its.seq.restore.6-tables")
    def test_without_tables_nothing_is_mapped(self) -> None:
        """The maps are not in registers: an ITS that is enabled without them has none."""
        vm = ItsVm(ItsHost())
        vm.restore(working().save(), leave_out=["tables"])

        assert (0, {}) == (vm.msi(1, 1), vm.lpis())

    @pytest.mark.spec("its.seq.restore.7-ctlr")
    def test_ctlr_comes_last(self) -> None:
        """Enabling runs what is queued: before the tables, commands meet a device that is not there."""
        saved = queue_two_more(working().save())
        early, late = ItsVm(ItsHost()), ItsVm(ItsHost())
        early.restore(saved, leave_out=["tables"])
        early.control(RESTORE_TABLES)
        late.restore(saved)

        assert [(0, 0), (1, 1)] == [(vm.msi(7, 5), vm.msi(7, 6)) for vm in (early, late)]
        assert early.reg(CREADR) == early.reg(CWRITER) == late.reg(CREADR)

    @pytest.mark.spec("its.seq.restore.note.pending-bits")
    def test_restoring_uses_pending_bits_up(self) -> None:
        """The bit of a pending LPI is cleared in RAM; a restore that fails after it has lost it for the next."""
        saved = working().save()
        bit = pending_table(1) + (LPI + 1) // 8
        vm = ItsVm(ItsHost())
        vm.restore(saved, leave_out=["tables", "ctlr"])
        entry = vm.host.read_u64(itt(7) + 32)
        vm.host.write_u64(itt(7) + 32, LPI - 1 << 16)
        assert 2 == vm.host.read(bit, 1)[0]
        assert "EINVAL" == outcome(vm.control, RESTORE_TABLES)
        assert 0 == vm.host.read(bit, 1)[0]
        vm.host.write_u64(itt(7) + 32, entry)
        vm.control(RESTORE_TABLES)
        assert (1, True, False) == vm.lpis()[LPI + 1]


class TestSaving:
    @pytest.mark.spec("its.seq.save.1-stop", "its.ctrl.save-tables.EBUSY.vcpu-running")
    def test_vcpus_stand_still(self) -> None:
        """While a vCPU is inside KVM_RUN tables and registers are EBUSY; an MSI that comes later is not in them."""

        async def main() -> list[Any]:
            vm = working()
            answers: list[Any] = []

            async def guest(cpu: Any) -> None:
                answers.append(outcome(vm.control, SAVE_TABLES))
                answers.append(outcome(vm.reg, CTLR))
                await cpu.store(0x1000, 4, 0)

            vm.vcpus[0].load(guest)
            await vm.vcpus[0].run()
            saved = vm.save()
            vm.msi(1, 0)
            other = ItsVm(ItsHost())
            other.restore(saved)
            return [*answers, other.lpis()[LPI][2]]

        assert ["EBUSY", "EBUSY", False] == fabric.run(main)

    @pytest.mark.spec("its.seq.save.2-pending")
    def test_pending_bits_are_flushed(self) -> None:
        """Without SAVE_PENDING_TABLES what was pending is not in RAM, and lost."""
        pending = []
        for leave_out in ((), ("pending",)):
            vm = ItsVm(ItsHost())
            vm.restore(working().save(leave_out=leave_out))
            pending.append(vm.lpis()[LPI + 1][2])

        assert [True, False] == pending

    @pytest.mark.spec("its.seq.save.3-tables", "its.ctrl.save-tables", "its.ctrl.restore-tables")
    def test_tables_are_flushed(self) -> None:
        """The tables in RAM hold what SAVE_TABLES put there: all devices, events and collections, or nothing."""
        first = working()
        empty = ItsVm(ItsHost())
        empty.restore(first.save(leave_out=["tables"]))
        whole = ItsVm(ItsHost())
        whole.restore(first.save())

        assert ([], []) == empty.maps()
        assert first.maps() == whole.maps()
        assert 1 == whole.msi(7, 4)

    @pytest.mark.spec("its.seq.save.4-regs")
    def test_registers_are_read(self) -> None:
        """They come back as they were read, the constant ones included."""
        first = working()
        saved = first.save()
        second = ItsVm(ItsHost())
        second.restore(saved)

        assert saved.its == second.save().its
        assert saved.its[0][CREADR] == saved.its[0][CWRITER] == 32 * 8
        assert [True, True, False] == [bool(saved.its[0][BASER + 8 * n] & VALID) for n in range(3)]

    @pytest.mark.spec("its.seq.save.5-ram")
    def test_ram_is_copied_last(self) -> None:
        """Tables and pending bits travel in RAM: with a copy from before the flush there is nothing to restore."""
        first = working()
        before = first.host.read(RAM, RAM_SIZE)
        saved = first.save()
        second = ItsVm(ItsHost())
        second.restore(Saved(saved.redistributors, saved.its, before))

        assert ([], []) == second.maps()

    @pytest.mark.spec("its.ctrl.save-tables.rule.order")
    def test_what_is_written_when(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Devices by ascending id, each with its events by ascending id and then its DTE; collections at the end."""
        vm = ItsVm(ItsHost())
        vm.boot()
        vm.run(mapd(9), mapd(2), mapti(9, 1, LPI, 0), mapti(2, 5, LPI + 1, 1), mapti(2, 3, LPI + 2, 0))
        written: list[int] = []
        monkeypatch.setattr(GuestMemory, "write_u64", lambda _memory, gpa, _value: written.append(gpa))
        vm.control(SAVE_TABLES)

        expected = [itt(2) + 24, itt(2) + 40, DEVICE_TABLE + 16, itt(9) + 8, DEVICE_TABLE + 72]
        assert [*expected, *(COLLECTION_TABLE + 8 * n for n in range(3))] == written

    def test_what_comes_before_a_failure_is_written(self) -> None:
        """A device whose ITT is not in RAM ends it: EFAULT, with the devices before it saved and no collection."""
        vm = ItsVm(ItsHost())
        vm.boot()
        # MAPTI looks whether the page of the ITE is in RAM; a slot that goes later is not noticed.
        ram = vm.host.user.map(0x1000)
        vm.vm.set_memory(1, 0x7000_0000, 0x1000, ram)
        vm.run(mapd(1), mapd(2, at=0x7000_0000), mapd(3))
        vm.run(*(mapti(devid, 0, LPI + devid, 0) for devid in (1, 2, 3)))
        vm.vm.set_memory(1, 0x7000_0000, 0)

        assert "EFAULT" == outcome(vm.control, SAVE_TABLES)
        entries = [vm.host.read_u64(DEVICE_TABLE + 8 * devid) for devid in (1, 2, 3)]
        assert [True, False, False] == [bool(entry) for entry in entries]
        assert 0 == vm.host.read_u64(COLLECTION_TABLE)


@pytest.mark.spec("its.ctrl.restore-tables.EINVAL.ite-addr")
def test_an_itt_outside_ram() -> None:
    """The documents say EINVAL; Linux 6.1 reads the first entry before it checks anything, which is EFAULT."""
    vm = ItsVm(ItsHost())
    vm.restore(working().save(), leave_out=["tables", "ctlr"])
    vm.host.write_u64(DEVICE_TABLE + 8, VALID | 0x7000_0000 >> 8 << 5 | 4)

    assert "EFAULT" == outcome(vm.control, RESTORE_TABLES)
    assert (([], []), {}) == (vm.maps(), vm.lpis())


@pytest.mark.spec("its", "its.create.rule.several")
def test_two_itss_are_saved_and_restored_apart() -> None:
    """Each has tables of its own; an LPI that both map is one LPI again, whichever is restored first."""
    first = ItsVm(ItsHost(), 2, 2)
    first.boot()
    first.run(mapd(1), mapti(1, 0, LPI, 0), mapti(1, 1, LPI + 1, 1))
    first.run(mapd(1, at=itt(40)), mapti(1, 0, LPI + 1, 0), mapti(1, 2, LPI + 2, 0), its=1)
    first.msi(1, 2, its=1)
    saved = first.save()
    second = ItsVm(ItsHost(), 2, 2)
    second.restore(saved)

    assert [first.maps(n) for n in range(2)] == [second.maps(n) for n in range(2)]
    assert first.lpis() == second.lpis()
    second.run(mapd(1, valid=0))
    assert {LPI + 1, LPI + 2} == second.lpis().keys()
    assert [0, 1] == [second.msi(1, 1), second.msi(1, 0, its=1)]


# -- any maps, any damage


VCPUS = 3
devices = st.dictionaries(
    st.one_of(st.integers(0, 12), st.integers(0, 0x3FFF)),
    st.tuples(
        st.integers(4, 9),
        st.dictionaries(
            st.one_of(st.integers(0, 15), st.integers(0, 511)),
            st.tuples(st.integers(LPI, LPI + 0x1FFF), st.integers(0, 4)),
            max_size=12,
        ),
    ),
    max_size=8,
)
"""Device id to size and events; event id to LPI and collection, of which those from VCPUS on are not mapped."""


def mapped(devices: dict[int, tuple[int, dict[int, tuple[int, int]]]], *, indirect: bool, its: int) -> ItsVm:
    vm = ItsVm(ItsHost(), VCPUS, its)
    if indirect:
        for n in range(its):
            for page in range(2):
                vm.host.write_u64(DEVICE_TABLE + n * NEXT + 8 * page, VALID | LEVEL2 + (2 * n + page) * 0x1_0000)
    vm.boot(indirect=indirect)
    for number, (devid, (bits, events)) in enumerate(devices.items()):
        n = number % its
        vm.run(mapd(devid, bits, at=itt(number)), its=n)
        commands = [mapti(devid, event, lpi, icid) for event, (lpi, icid) in events.items()]
        for at in range(0, len(commands), 100):
            vm.run(*commands[at : at + 100], its=n)
    return vm


TABLES = (
    (DEVICE_TABLE, 2 * NEXT),
    (COLLECTION_TABLE, 2 * NEXT),
    (LEVEL2, 4 * 0x1_0000),
    (itt(0), 8 * 0x4000),
    (CONFIG, 0x2000),
    (PENDING, VCPUS * 0x1_0000),
)


def tables(vm: ItsVm) -> list[bytes]:
    return [vm.host.read(base, size) for base, size in TABLES]


@given(
    devices, st.booleans(), st.integers(1, 2), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 15)), max_size=9)
)
@settings(max_examples=60, deadline=None)
def test_a_fresh_vm_has_the_same_maps(devices: Any, indirect: bool, its: int, raised: list[tuple[int, int]]) -> None:
    """Restored over the same RAM: the same maps and LPIs, what was pending too; saved again, the same bytes."""
    first = mapped(devices, indirect=indirect, its=its)
    ids = list(devices)
    for number, event in raised:
        if number < len(ids):
            first.msi(ids[number], event, number % its)
    saved = first.save()
    before = tables(first)
    second = ItsVm(first.host, VCPUS, its)
    second.restore(saved, leave_out=["ram"])

    assert [first.maps(n) for n in range(its)] == [second.maps(n) for n in range(its)]
    # An LPI of several events goes where the one that is mapped first says, and that is another one now.
    several = [lpi for _, events in devices.values() for lpi, _ in events.values()]
    once = {lpi for lpi in several if several.count(lpi) == 1}
    assert {lpi: first.lpis()[lpi] for lpi in once & first.lpis().keys()} == {
        lpi: second.lpis()[lpi] for lpi in once & second.lpis().keys()
    }
    assert first.lpis().keys() == second.lpis().keys()
    if once == set(several):
        second.save()
        assert before == tables(second)
    else:
        for n in range(its):
            second.control(SAVE_TABLES, n)
        assert before[:4] == tables(second)[:4]
    second.host.kvm.check()


damage = st.one_of(
    st.tuples(st.sampled_from(["flip"]), st.integers(0, 3), st.integers(0, 64), st.integers(0, 63)),
    st.tuples(st.sampled_from(["word"]), st.integers(0, 3), st.integers(0, 64), st.integers(0, (1 << 64) - 1)),
    st.tuples(st.sampled_from(["copy"]), st.integers(0, 3), st.integers(0, 64), st.integers(0, 64)),
)


@given(devices, st.booleans(), st.lists(damage, min_size=1, max_size=6))
@settings(max_examples=120, deadline=None)
def test_damaged_tables(devices: Any, indirect: bool, blows: list[tuple[str, int, int, int]]) -> None:
    """A restore answers 0 or an errno that the documents list, never half: a failed one leaves nothing mapped.

    What a successful one leaves can be saved and restored again.
    """
    first = mapped(devices, indirect=indirect, its=1)
    saved = first.save()
    for kind, area, index, value in blows:
        base = TABLES[area][0]
        # The entries that are there are hit more often than the zeros between them.
        used = [at for at in range(0, 0x8000, 8) if first.host.read_u64(base + at)]
        at = base + (used[index % len(used)] if used and index % 4 else 8 * index)
        if kind == "flip":
            first.host.write_u64(at, first.host.read_u64(at) ^ 1 << value)
        elif kind == "copy":
            first.host.write_u64(at, first.host.read_u64(base + 8 * value))
        else:
            first.host.write_u64(at, value)
    second = ItsVm(first.host, VCPUS)
    second.restore(saved, leave_out=["ram", "tables", "ctlr"])
    answer = outcome(second.control, RESTORE_TABLES)

    assert answer in (None, "EINVAL", "EFAULT", "EEXIST")
    second.inside.its_list[0]._check()
    if answer is not None:
        assert (([], []), {}) == (second.maps(), second.lpis())
        assert "EBUSY" == outcome(second.msi, 1, 0)
    else:
        second.set_reg(CTLR, 1)
        third = ItsVm(first.host, VCPUS)
        if outcome(second.control, SAVE_TABLES) is None:
            third.restore(saved, leave_out=["ram"])
            assert second.maps() == third.maps()
    second.host.kvm.check()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=12), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_collections_up_to_the_first_that_is_not_valid(mapped: list[tuple[int, int]], kept: int) -> None:
    """They are saved in the order they were mapped, and read up to an entry that is not valid."""
    vm = ItsVm(ItsHost(), VCPUS)
    vm.boot()
    vm.run(*(mapc(3 + icid, rdbase) for icid, rdbase in mapped))
    saved = vm.save()
    second = ItsVm(vm.host, VCPUS)
    vm.host.write_u64(COLLECTION_TABLE + 8 * kept, 0)
    second.restore(saved, leave_out=["ram"])

    assert vm.maps()[1][:kept] == second.maps()[1]
