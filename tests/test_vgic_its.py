"""The ITS device: creation, attributes, registers, MSIs and the translation cache."""

from __future__ import annotations

import errno
import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from its_machine import (
    BASER0,
    BASER1,
    CBASER,
    COLLECTION_TABLE,
    CREADR,
    CTLR,
    CWRITER,
    DEVICE_TABLE,
    DOORBELL,
    GRP_ADDR,
    GRP_CTRL,
    GRP_ITS_REGS,
    HOLE,
    IIDR,
    INIT,
    ITS_BASE,
    LPI,
    QUEUE,
    RESET,
    RESTORE_TABLES,
    SAVE_TABLES,
    TYPER,
    VALID,
    FakeVm,
    ItsMachine,
    event_command,
    mapc,
    mapd,
    mapti,
)

from fabric.devices.arm.vgic import INITIAL_PROPBASER
from fabric.devices.arm.vgic_its import Its, MsiSender, signal_msi
from fabric.devices.arm.vgic_its_regs import GITS
from fabric.devices.arm.vgic_v3 import VgicV3
from fabric.devices.registers import Access
from fabric.errors import KvmError
from fabric.uapi.kvm import KvmMsi

ITS_ADDRESS = 4


def errno_of(call: Any, *args: Any, **kwargs: Any) -> int | None:
    """The errno of a call that fails."""
    with pytest.raises(KvmError) as failure:
        call(*args, **kwargs)
    return failure.value.errno


class Unreachable:
    """A pointer to nothing."""

    addr = 0

    def read(self, n: int, offset: int = 0) -> bytes:
        raise KvmError(errno.EFAULT, "nothing there")

    def u64(self, offset: int = 0) -> int:
        raise KvmError(errno.EFAULT, "nothing there")

    def put_u64(self, value: int, offset: int = 0) -> None:
        raise KvmError(errno.EFAULT, "nothing there")


@pytest.fixture
def machine() -> ItsMachine:
    """Two vCPUs and an ITS that is set up and enabled."""
    return ItsMachine()


class TestCreation:
    @pytest.mark.spec("its.create.ENODEV.host-cannot")
    def test_needs_a_gicv3_host(self) -> None:
        """A host with a GICv2 has no ITS to offer."""
        assert (True, False) == (Its.supported({"host_gic": 3}), Its.supported({"host_gic": 2}))

    @pytest.mark.spec("its.create.rule.several", "its.create.rule.propbaser-reset", "its.create.rule.lpis-on")
    def test_each_new_its_resets_propbaser(self, machine: ItsMachine) -> None:
        """A further ITS may be created at any time, and GICR_PROPBASER starts over."""
        second = Its.create(machine.vm)

        assert [machine.its, second] == machine.vm.its_list
        assert INITIAL_PROPBASER == machine.vgic.propbaser
        assert machine.vgic.has_its

    @pytest.mark.spec("its.create.rule.gic-not-checked")
    def test_may_come_before_the_gic(self) -> None:
        """The GIC finds the ITS that is there already."""
        vm = FakeVm()
        its = Its.create(vm)
        vgic = VgicV3.create(vm)

        assert [its] == vgic.its_list
        assert INITIAL_PROPBASER == vgic.propbaser

    def test_commands_without_a_gic_do_no_harm(self) -> None:
        """Without a GIC there are no LPIs: MAPTI is refused, the rest works."""
        vm = FakeVm()
        machine = ItsMachine.__new__(ItsMachine)
        machine.vm, machine.its, machine.memory = vm, Its.create(vm), vm.memory
        vm.memory.add_ram(QUEUE, 0x100_0000)
        machine.its.place(ITS_BASE)
        for offset, value in (
            (CBASER, QUEUE | VALID),
            (BASER0, DEVICE_TABLE | VALID),
            (BASER1, COLLECTION_TABLE | VALID),
        ):
            machine.set_reg(offset, value)
        machine.set_reg(CTLR, 1)
        for command in (
            mapc(0, 0),
            mapd(1),
            mapti(1, 0, LPI, 0),
            event_command("INT", 1, 0),
            mapc(0, 1),
            mapc(0, 1, 0),
        ):
            vm.memory.write(QUEUE + machine.its.cwriter, command)
            machine.set_reg(CWRITER, machine.its.cwriter + 32)

        assert {"unmapped event": 1} == vm.ledger.check().dropped
        assert 1 == machine.its.refused["pINTID must be an LPI within GICR_PROPBASER.IDbits"]


class TestAddress:
    @pytest.mark.spec("its.addr.its.rule.unset-read")
    def test_unset_reads_all_ones(self) -> None:
        """Before it is set the address reads as all ones."""
        assert (1 << 64) - 1 == ItsMachine(set_up=False).attr("get", GRP_ADDR, ITS_ADDRESS)

    @pytest.mark.spec("its.addr.its.rule.maps-now", "its.addr.its.rule.doorbell")
    def test_the_frame_answers_at_once(self) -> None:
        """Setting the address puts the frame on the bus, not the first KVM_RUN."""
        machine = ItsMachine(set_up=False)
        machine.attr("set", GRP_ADDR, ITS_ADDRESS, ITS_BASE)

        assert 0x4B00043B == machine.guest_read(IIDR, 4)
        assert ITS_BASE == machine.attr("get", GRP_ADDR, ITS_ADDRESS)
        assert (machine.its, 0x10040) == machine.vm.mmio.find(DOORBELL)
        assert machine.vm.mmio.find(ITS_BASE + 0x20000) is None

    @pytest.mark.spec("its.addr.its.EINVAL.align", "its.addr.its.EINVAL.wrap", "its.addr.its.E2BIG.ipa-range")
    @pytest.mark.parametrize(
        ("base", "code"),
        [
            pytest.param(0x0808_1000, errno.EINVAL, id="misaligned"),
            pytest.param((1 << 64) - 0x20000, errno.EINVAL, id="wraps"),
            pytest.param(1 << 40, errno.E2BIG, id="beyond-ipa"),
            pytest.param((1 << 40) - 0x10000, errno.E2BIG, id="ends-beyond-ipa"),
        ],
    )
    def test_is_checked(self, base: int, code: int) -> None:
        """The base must be 64 KiB aligned and the frame inside the guest's IPA space."""
        machine = ItsMachine(set_up=False)

        assert code == errno_of(machine.attr, "set", GRP_ADDR, ITS_ADDRESS, base)
        assert machine.its.base is None

    @pytest.mark.spec("its.addr.its.EEXIST.already-set")
    def test_is_set_once(self, machine: ItsMachine) -> None:
        """A second address is refused, before it is looked at."""
        assert errno.EEXIST == errno_of(machine.attr, "set", GRP_ADDR, ITS_ADDRESS, 1)

    @pytest.mark.spec("its.addr.its.ENODEV.wrong-type", "its.addr.its.ENXIO.has")
    def test_other_types_are_not_there(self, machine: ItsMachine) -> None:
        """Another address type is ENODEV to set and get, ENXIO to ask for."""
        codes = [errno_of(machine.attr, op, GRP_ADDR, 3) for op in ("set", "get", "has")]

        assert [errno.ENODEV, errno.ENODEV, errno.ENXIO] == codes
        assert 0 == machine.attr("has", GRP_ADDR, ITS_ADDRESS)

    @pytest.mark.spec("its.addr.its.EFAULT.user-ptr", "its.its-regs.EFAULT.user-ptr")
    @pytest.mark.parametrize("op", ["set", "get"])
    @pytest.mark.parametrize(("group", "attr"), [(GRP_ADDR, ITS_ADDRESS), (GRP_ITS_REGS, CTLR)])
    def test_bad_pointers_fault(self, machine: ItsMachine, op: Any, group: int, attr: int) -> None:
        """A pointer to nothing is EFAULT, before anything else is checked on set."""
        pointer: Any = Unreachable()

        assert errno.EFAULT == errno_of(Its.attributes.dispatch, machine.its, op, group, attr, pointer)

    @pytest.mark.spec("its.addr.its.note.overlap")
    def test_two_at_one_address(self, machine: ItsMachine) -> None:
        """KVM lets two ITSs overlap; the first one placed gets the accesses and the MSIs."""
        machine.map_all()
        second = Its.create(machine.vm)
        machine.vgic.propbaser = 0
        second.place(ITS_BASE)

        assert machine.its is machine.vm.mmio.find(ITS_BASE)[0]  # type: ignore[index]
        assert 1 == machine.msi(1, 0)


class TestControl:
    @pytest.mark.spec("its.ctrl.init.note.noop")
    def test_init_does_nothing(self) -> None:
        """CTRL_INIT succeeds at any time, any number of times."""
        machine = ItsMachine(set_up=False)

        assert [0, 0] == [machine.attr("set", GRP_CTRL, INIT) for _ in range(2)]

    @pytest.mark.spec("its.any.note.ctrl-silent", "its.any.ENXIO.unknown")
    def test_unknown_numbers_succeed_silently(self, machine: ItsMachine) -> None:
        """KVM 6.1 accepts any number in SET; only HAS knows better."""
        assert 0 == machine.attr("set", GRP_CTRL, 3)
        assert errno.ENXIO == errno_of(machine.attr, "has", GRP_CTRL, 3)
        assert errno.ENXIO == errno_of(machine.attr, "set", 7, 0)

    @pytest.mark.spec(
        "its.ctrl.init.ENXIO.read",
        "its.ctrl.reset.ENXIO.read",
        "its.ctrl.save-tables.ENXIO.read",
        "its.ctrl.restore-tables.ENXIO.read",
    )
    @pytest.mark.parametrize("number", [INIT, SAVE_TABLES, RESTORE_TABLES, RESET])
    def test_nothing_can_be_read(self, machine: ItsMachine, number: int) -> None:
        """Control attributes can be asked for and set, not read."""
        assert 0 == machine.attr("has", GRP_CTRL, number)
        assert errno.ENXIO == errno_of(machine.attr, "get", GRP_CTRL, number)

    @pytest.mark.spec(
        "its.ctrl.reset.EBUSY.vcpu-running",
        "its.ctrl.save-tables.EBUSY.vcpu-running",
        "its.ctrl.restore-tables.EBUSY.vcpu-running",
        "its.its-regs.EBUSY.vcpu-running",
    )
    @pytest.mark.parametrize(
        ("op", "group", "attr"),
        [
            ("set", GRP_CTRL, RESET),
            ("set", GRP_CTRL, SAVE_TABLES),
            ("set", GRP_CTRL, RESTORE_TABLES),
            ("set", GRP_CTRL, 9),
            ("set", GRP_ITS_REGS, CTLR),
            ("get", GRP_ITS_REGS, CTLR),
        ],
    )
    def test_vcpus_must_stand_still(self, machine: ItsMachine, op: Any, group: int, attr: int) -> None:
        """What touches the state is EBUSY while a vCPU runs."""
        machine.vm.vcpus[1].running = True

        assert errno.EBUSY == errno_of(machine.attr, op, group, attr)

    @pytest.mark.spec(
        "its.ctrl.reset.rule.keeps",
        "its.ctrl.reset.rule.clears",
        "its.ctrl.reset.rule.frees",
        "its.ctrl.reset.rule.guest-ram",
    )
    def test_reset(self, machine: ItsMachine) -> None:
        """RESET forgets the maps, the queue and the Valid bits; address and guest memory stay."""
        machine.map_all()
        machine.msi(1, 0)
        machine.save()
        baser = machine.reg(BASER0)
        before = machine.memory.read(DEVICE_TABLE, 64)
        machine.attr("set", GRP_CTRL, RESET)

        assert (0, 0, 0) == (machine.reg(CBASER), machine.reg(CREADR), machine.reg(CWRITER))
        assert 0x8000_0000 == machine.reg(CTLR)
        assert baser & ~VALID == machine.reg(BASER0)
        assert ITS_BASE == machine.its.base
        assert before == machine.memory.read(DEVICE_TABLE, 64)
        assert {} == machine.vgic.lpis
        assert {"unmapped": 1} == machine.dropped()
        assert errno.EBUSY == errno_of(machine.msi, 1, 0)


class TestRegisters:
    @pytest.mark.spec(
        "its.reg.ctlr",
        "its.reg.iidr",
        "its.reg.typer",
        "its.reg.cbaser",
        "its.reg.cwriter",
        "its.reg.creadr",
        "its.reg.baser0",
        "its.reg.baser1",
        "its.its-regs.rule.32-bit-upper",
    )
    def test_reset_values(self) -> None:
        """What a new ITS reads."""
        machine = ItsMachine(set_up=False)
        machine.its.place(ITS_BASE)
        expected = {
            CTLR: 0x8000_0000,
            IIDR: 0x4B00_043B,
            TYPER: 0x1EF71,
            CBASER: 0,
            CWRITER: 0,
            CREADR: 0,
            BASER0: 0x1907_0000_0000_0600,
            BASER1: 0x1C07_0000_0000_0600,
        }

        assert expected == {offset: machine.reg(offset) for offset in expected}

    @pytest.mark.spec(
        "its.reg.idregs",
        "its.reg.baser2",
        "its.reg.baser3",
        "its.reg.baser4",
        "its.reg.baser5",
        "its.reg.baser6",
        "its.reg.baser7",
    )
    def test_constant_registers(self, machine: ItsMachine) -> None:
        """Unused BASERs are RAZ/WI, the identification registers constants."""
        ids = {0xFFD0: 0x40, 0xFFE0: 0x92, 0xFFE4: 0xB4, 0xFFE8: 0x3B, 0xFFEC: 0, 0xFFF4: 0xF0, 0xFFFC: 0xB1}
        for offset in (*ids, *range(0x110, 0x140, 8)):
            machine.set_reg(offset, (1 << 64) - 1)

        assert ids == {offset: machine.reg(offset) for offset in ids}
        assert [0] * 6 == [machine.reg(offset) for offset in range(0x110, 0x140, 8)]

    @pytest.mark.spec("its.its-regs.EINVAL.align", "its.its-regs.ENXIO.no-register", "its.its-regs.note.align")
    @pytest.mark.parametrize(
        ("offset", "code"),
        [
            pytest.param(0x3, errno.EINVAL, id="byte"),
            pytest.param(0xC, errno.EINVAL, id="half-of-typer"),
            pytest.param(0x84, errno.EINVAL, id="half-of-cbaser"),
            pytest.param(0xFFD1, errno.EINVAL, id="id-byte"),
            pytest.param(0x40, errno.ENXIO, id="hole"),
            pytest.param(0x10040, errno.ENXIO, id="translater"),
            pytest.param(0x10044, errno.ENXIO, id="behind-translater"),
            pytest.param((1 << 64) - 8, errno.ENXIO, id="far-out"),
        ],
    )
    def test_offsets_are_checked(self, machine: ItsMachine, offset: int, code: int) -> None:
        """64-bit alignment, except where the 32-bit registers are; and there must be a register."""
        assert [code] * 3 == [errno_of(machine.attr, op, GRP_ITS_REGS, offset) for op in ("set", "get", "has")]

    def test_attribute_numbers_are_cut_to_32_bits(self, machine: ItsMachine) -> None:
        """The kernel keeps the offset in 32 bits."""
        assert machine.reg(TYPER) == machine.reg(1 << 32 | TYPER)

    @pytest.mark.spec("its.its-regs.ENXIO.no-address")
    def test_needs_an_address(self) -> None:
        """Registers can be asked for, not accessed, before the ITS has an address; alignment comes first."""
        machine = ItsMachine(set_up=False)

        assert 0 == machine.attr("has", GRP_ITS_REGS, CTLR)
        assert errno.ENXIO == errno_of(machine.reg, CTLR)
        assert errno.EINVAL == errno_of(machine.reg, 0x84)

    @pytest.mark.parametrize(
        ("offset", "written", "stored"),
        [
            pytest.param(CBASER, (1 << 64) - 1, 0xFF1F_FFFF_FFFF_0FFF, id="cbaser"),
            pytest.param(BASER0, (1 << 64) - 1, 0xF907_FFFF_FFFF_FEFF, id="baser0"),
            pytest.param(BASER1, (1 << 64) - 1, 0xBC07_FFFF_FFFF_FEFF, id="baser1-never-indirect"),
            pytest.param(CBASER, VALID | HOLE, 0x9800_0000_7000_0000, id="cbaser-uncached"),
            pytest.param(BASER0, VALID | HOLE | 0x800, 0x9907_0000_7000_0600, id="outer-shareable"),
        ],
    )
    def test_values_are_sanitised(self, offset: int, written: int, stored: int) -> None:
        """Type, entry and page size are fixed, and memory attributes become those that KVM has."""
        machine = ItsMachine(set_up=False)
        machine.its.place(ITS_BASE)
        machine.set_reg(offset, written)

        assert stored == machine.reg(offset)

    @pytest.mark.spec("its.its-regs.rule.iidr", "its.its-regs.rule.iidr-reads", "its.its-regs.EINVAL.iidr-revision")
    def test_iidr_picks_the_table_format(self, machine: ItsMachine) -> None:
        """Only the revision of a written IIDR counts, and only revision 0 exists; the guest cannot write it."""
        machine.set_reg(IIDR, 0xFFFF_0FFF)

        assert 0x4B00_043B == machine.reg(IIDR)
        assert errno.EINVAL == errno_of(machine.set_reg, IIDR, 0x1000)
        machine.guest_write(IIDR, 0x1000, 4)
        assert 0x4B00_043B == machine.guest_read(IIDR, 4)

    @pytest.mark.spec("its.its-regs.rule.locked-while-enabled")
    def test_tables_are_locked_while_enabled(self, machine: ItsMachine) -> None:
        """Writes to CBASER and BASER are dropped while the ITS is enabled."""
        before = [machine.reg(offset) for offset in (CBASER, BASER0, BASER1)]
        for offset in (CBASER, BASER0, BASER1):
            machine.set_reg(offset, 0)

        assert before == [machine.reg(offset) for offset in (CBASER, BASER0, BASER1)]

    @pytest.mark.spec("its.its-regs.rule.enable-needs-tables")
    @pytest.mark.parametrize("missing", [CBASER, BASER0, BASER1])
    def test_enabling_takes_valid_tables(self, machine: ItsMachine, missing: int) -> None:
        """Enabled is not set while one of the three tables is not valid."""
        machine.set_reg(CTLR, 0)
        machine.set_reg(missing, machine.reg(missing) & ~VALID)
        machine.set_reg(CTLR, 1)

        assert 0 == machine.reg(CTLR) & 1

    @pytest.mark.spec("its.its-regs.rule.creadr")
    def test_cbaser_zeroes_the_queue(self, machine: ItsMachine) -> None:
        """A CBASER write puts CREADR and CWRITER to 0."""
        machine.run(mapc(0, 0))
        machine.set_reg(CTLR, 0)
        machine.set_reg(CBASER, VALID | QUEUE)

        assert (0, 0) == (machine.reg(CREADR), machine.reg(CWRITER))

    @pytest.mark.spec("its.its-regs.EBUSY.creadr-enabled", "its.its-regs.EINVAL.creadr-range")
    def test_creadr_is_for_restoring(self, machine: ItsMachine) -> None:
        """Userspace writes CREADR while the ITS is disabled, within the queue; the guest never."""
        assert errno.EBUSY == errno_of(machine.set_reg, CREADR, 0)
        machine.set_reg(CTLR, 0)
        assert errno.EINVAL == errno_of(machine.set_reg, CREADR, 0x1000)
        machine.set_reg(CREADR, 0x47)
        machine.guest_write(CREADR, 0x80)
        assert 0x40 == machine.reg(CREADR)
        assert 0 == machine.reg(CTLR), "not quiescent while CREADR and CWRITER differ"

    @pytest.mark.spec("its.commands.rule.out-of-range")
    def test_cwriter_beyond_the_queue_is_ignored(self, machine: ItsMachine) -> None:
        """A CWRITER outside the queue changes nothing; bits outside 19:5 are not looked at."""
        machine.run(mapc(0, 0))
        machine.set_reg(CWRITER, 0x1000)
        assert 0x20 == machine.reg(CWRITER)
        machine.set_reg(CWRITER, 1 << 20 | 0x35)
        assert 0x20 == machine.reg(CWRITER)

    def test_32_bit_halves_for_the_guest(self, machine: ItsMachine) -> None:
        """The guest may use both halves of a 64-bit register; other widths read 0 and write nothing."""
        assert 0xEF71 == machine.guest_read(TYPER, 4) & 0xFFFF
        assert machine.reg(BASER0) >> 32 == machine.guest_read(BASER0 + 4, 4)
        assert 0 == machine.guest_read(TYPER, 2)
        machine.set_reg(CTLR, 0)
        machine.guest_write(BASER1 + 4, 0x8000_0000, 4)
        assert COLLECTION_TABLE == machine.reg(BASER1) & 0xFFFF_0000
        assert machine.reg(BASER1) & VALID

    @pytest.mark.spec("its.reg.translater")
    def test_a_vcpu_cannot_ring_the_doorbell(self, machine: ItsMachine) -> None:
        """A CPU write to GITS_TRANSLATER has no device id, so it is dropped; it reads 0."""
        machine.map_all()
        machine.guest_write(0x10040, 0, 4)

        assert 0 == machine.guest_read(0x10040, 4)
        assert {} == machine.pending()

    @pytest.mark.spec("its.its-regs.rule.ro-ignored", "its.its-regs.rule.other-as-guest")
    def test_read_only_rows_ignore_writes(self, machine: ItsMachine) -> None:
        """No row that is read-only to both sides changes, whatever is written."""
        rows = [row for row in GITS.rows if row.access is Access.RO and row.user is None]
        before = [machine.reg(row.offset) for row in rows]
        for row in rows:
            machine.set_reg(row.offset, (1 << 64) - 1)

        assert before == [machine.reg(row.offset) for row in rows]
        assert len(rows) == 13

    def test_disabling_the_device_table_forgets_devices(self, machine: ItsMachine) -> None:
        """Clearing Valid of BASER0 drops the devices, of BASER1 the collections."""
        machine.map_all()
        machine.set_reg(CTLR, 0)
        machine.set_reg(BASER1, machine.reg(BASER1) & ~VALID)
        assert ({}, 1) == (machine.its.collections, len(machine.its.devices))
        machine.set_reg(BASER0, machine.reg(BASER0) & ~VALID)
        assert ({}, {}) == (machine.its.devices, machine.vgic.lpis)
        machine.check()


class TestMsi:
    @pytest.mark.spec("its.msi.rule.return")
    def test_one_when_made_pending(self, machine: ItsMachine) -> None:
        """An MSI becomes the LPI of its event at the collection's vCPU."""
        machine.map_all()

        assert 1 == machine.msi(1, 1)
        assert {LPI + 1: 1} == machine.pending()
        machine.check()

    @pytest.mark.spec("its.msi.note.unmapped", "its.msi.rule.return")
    @pytest.mark.parametrize(
        ("devid", "eventid", "reason"),
        [
            pytest.param(2, 0, "unmapped device", id="device"),
            pytest.param(1 << 16, 0, "unmapped device", id="device-beyond"),
            pytest.param(1, 9, "unmapped event", id="event"),
            pytest.param(1, 0xFFFF_FFFF, "unmapped event", id="event-beyond"),
            pytest.param(1, 3, "unmapped collection", id="collection"),
        ],
    )
    def test_zero_when_nothing_maps_it(self, machine: ItsMachine, devid: int, eventid: int, reason: str) -> None:
        """An MSI that no event takes returns 0 and ends in the ledger by its reason."""
        machine.map_all(3)
        machine.run(mapti(1, 3, LPI + 3, 7))

        assert 0 == machine.msi(devid, eventid)
        assert {reason: 1} == machine.dropped()

    @pytest.mark.spec("its.msi.EBUSY.its-disabled")
    def test_busy_while_disabled(self, machine: ItsMachine) -> None:
        """A disabled ITS takes no MSI, not even one it had cached."""
        machine.map_all()
        machine.msi(1, 0)
        machine.set_reg(CTLR, 0)

        assert errno.EBUSY == errno_of(machine.msi, 1, 0)
        assert {"ITS disabled": 1} == machine.dropped()

    @pytest.mark.spec("its.msi.EBUSY.lpis-disabled")
    def test_busy_without_lpis_at_the_target(self, machine: ItsMachine) -> None:
        """A vCPU whose EnableLPIs is clear takes no LPI."""
        machine.map_all()
        machine.vgic.cpus[1].lpis_enabled = False

        assert errno.EBUSY == errno_of(machine.msi, 1, 1)
        assert {"LPIs disabled": 1} == machine.dropped()

    @pytest.mark.spec("its.msi.rule.disabled-lpi", "its.cmd.inv")
    def test_a_disabled_lpi_becomes_pending(self, machine: ItsMachine) -> None:
        """The configuration decides delivery, not pending; INV reloads it."""
        machine.forward()
        machine.memory.write_u8(0x8080_0000, 0xA0)
        machine.map_all()
        cpu = machine.vgic.cpus[0]

        assert 1 == machine.msi(1, 0)
        assert ({LPI: 0}, False) == (machine.pending(), cpu.line)
        machine.memory.write_u8(0x8080_0000, 0xA1)
        assert not cpu.line
        machine.run(event_command("INV", 1, 0))
        assert cpu.line

    @pytest.mark.spec("its.msi.rule.edge")
    def test_msis_merge(self, machine: ItsMachine) -> None:
        """An MSI for an LPI that is pending is merged into it."""
        machine.map_all()

        assert [1, 1] == [machine.msi(1, 0) for _ in range(2)]
        assert 1 == machine.vm.ledger.check().coalesced

    @pytest.mark.spec("its.msi.ENODEV.no-its", "api.signal-msi.ENODEV.arm-no-its")
    def test_no_its(self) -> None:
        """Without an ITS there is nothing to signal."""
        vm = FakeVm()
        VgicV3.create(vm)

        assert errno.ENODEV == errno_of(signal_msi, vm, KvmMsi(devid=1, flags=1))
        assert {"no ITS": 1} == vm.ledger.check().dropped

    @pytest.mark.spec("api.signal-msi.EINVAL.no-irqchip", "api.signal-msi.EINVAL.flags")
    def test_refused_calls_raise_nothing(self, machine: ItsMachine) -> None:
        """Without an in-kernel GIC, or with unknown flags, there was no MSI at all."""
        assert errno.EINVAL == errno_of(signal_msi, FakeVm(), KvmMsi(flags=1))
        assert errno.EINVAL == errno_of(machine.msi, 1, 0, flags=2)
        assert 0 == machine.vm.ledger.raised

    @pytest.mark.spec(
        "its.msi.EINVAL.no-devid",
        "its.msi.EINVAL.no-frame",
        "api.signal-msi.EINVAL.arm-no-devid",
        "its.msi.rule.devid-flag",
        "its.msi.rule.address",
    )
    def test_device_id_and_address_are_needed(self, machine: ItsMachine) -> None:
        """The device id must be said to be valid, and the address be in an ITS."""
        machine.map_all()

        assert errno.EINVAL == errno_of(machine.msi, 1, 0, flags=0)
        assert errno.EINVAL == errno_of(machine.msi, 1, 0, address=ITS_BASE - 1)
        assert errno.EINVAL == errno_of(machine.msi, 1, 0, address=1 << 32 | DOORBELL)
        assert {"MSI without a device id": 1, "no ITS at the MSI address": 2} == machine.dropped()

    @pytest.mark.spec("its.msi.rule.any-frame-address")
    @pytest.mark.parametrize("address", [ITS_BASE, DOORBELL + 2, ITS_BASE + 0x1FFFF])
    def test_any_address_of_the_frame_rings(self, machine: ItsMachine, address: int) -> None:
        """KVM looks for the frame, not for the doorbell."""
        machine.map_all()

        assert 1 == machine.msi(1, 0, address=address)

    def test_each_its_has_its_own_devices(self, machine: ItsMachine) -> None:
        """The address of the MSI picks the ITS."""
        machine.map_all()
        other = ITS_BASE + 0x20000
        Its.create(machine.vm).place(other)

        assert errno.EBUSY == errno_of(machine.msi, 1, 0, address=other + 0x10040)
        assert 1 == machine.msi(1, 0)


class TestSeveral:
    def test_an_lpi_mapped_by_two_of_them(self, machine: ItsMachine) -> None:
        """LPIs are the VM's: one that two ITSs map lives until both have let go of it."""
        machine.map_all()
        propbaser = machine.vgic.propbaser
        second = ItsMachine.__new__(ItsMachine)
        second.vm, second.vgic, second.memory = machine.vm, machine.vgic, machine.memory
        second.its = Its.create(machine.vm)
        machine.vgic.propbaser = propbaser
        second.its.place(ITS_BASE + 0x20000)
        for offset in (CBASER, BASER0, BASER1):
            second.set_reg(offset, machine.reg(offset) + (0x8_0000 if offset == CBASER else 0))
        second.set_reg(CTLR, 1)
        second.run(mapc(0, 1), mapd(5), mapti(5, 7, LPI, 0))
        assert 1 == second.msi(5, 7, address=DOORBELL + 0x20000)
        assert {LPI: 0} == machine.pending(), "its first event decides where it goes"
        machine.run(event_command("DISCARD", 1, 0))
        assert {LPI: 0} == machine.pending()
        second.run(mapd(5, valid=0))
        assert ({}, {"unmapped": 1}) == (machine.pending(), machine.dropped())


class TestSize:
    def test_memory_per_mapped_lpi(self) -> None:
        """A mapped LPI costs at most 250 bytes in all: the interrupt, its event, and the tables they are in."""
        machine = ItsMachine()
        machine.run(mapc(0, 0), mapd(1, 14))
        commands = [mapti(1, event, LPI + event, 0) for event in range(12_000)]
        machine.set_reg(CTLR, 0)
        machine.set_reg(CBASER, VALID | QUEUE | 0x7F)
        machine.memory.write(QUEUE, b"".join(commands))
        machine.set_reg(CTLR, 1)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            machine.set_reg(CWRITER, 32 * len(commands))
            used = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()

        assert len(commands) == len(machine.vgic.lpis)
        assert used / len(commands) <= 250


INVALIDATING = [
    pytest.param([event_command("DISCARD", 1, 3)], id="discard"),
    pytest.param([b"\x01" + mapti(1, 3, 0, 0)[1:]], id="movi"),
    pytest.param([mapd(2), mapd(2)], id="mapd-of-a-known-device"),
    pytest.param([mapc(5, 0, 0)], id="mapc-v0"),
]


class TestTranslationCache:
    def test_a_cached_msi_needs_no_device_id(self, machine: ItsMachine) -> None:
        """Once a translation was used, a missing KVM_MSI_VALID_DEVID is not noticed, at the very doorbell."""
        machine.map_all()
        machine.msi(1, 0)

        assert 1 == machine.msi(1, 0, flags=0)
        assert errno.EINVAL == errno_of(machine.msi, 1, 0, flags=0, address=DOORBELL + 1)
        assert errno.EINVAL == errno_of(machine.msi, 1, 1, flags=0)

    def test_int_caches_too(self, machine: ItsMachine) -> None:
        """The INT command uses a translation as an MSI does."""
        machine.map_all()
        machine.run(event_command("INT", 1, 0))

        assert 1 == machine.msi(1, 0, flags=0)

    def test_two_at_one_address_share_it(self, machine: ItsMachine) -> None:
        """The cache goes by the doorbell: what the hidden ITS cached is found there."""
        second = ItsMachine.__new__(ItsMachine)
        second.vm, second.vgic, second.memory = machine.vm, machine.vgic, machine.memory
        propbaser = machine.vgic.propbaser
        second.its = Its.create(machine.vm)
        machine.vgic.propbaser = propbaser
        second.its.place(ITS_BASE)
        for offset in (CBASER, BASER0, BASER1):
            second.set_reg(offset, machine.reg(offset) + (0x8_0000 if offset == CBASER else 0))
        second.set_reg(CTLR, 1)
        second.map_all(devid=9)
        assert 0 == machine.msi(9, 0)
        second.run(event_command("INT", 9, 0))
        assert 1 == machine.msi(9, 0)
        machine.check()

    @pytest.mark.parametrize("commands", INVALIDATING)
    def test_is_dropped_as_a_whole(self, machine: ItsMachine, commands: list[bytes]) -> None:
        """What unmaps or moves any event drops every cached translation of the VM."""
        machine.map_all()
        machine.msi(1, 0)
        machine.run(*commands)

        assert errno.EINVAL == errno_of(machine.msi, 1, 0, flags=0)

    def test_movall_drops_it(self, machine: ItsMachine) -> None:
        """MOVALL between two vCPUs drops the cache, to the same vCPU it does nothing."""
        machine.map_all()
        machine.msi(1, 0)
        machine.run(bytes([0x0E]) + bytes(31))
        assert 1 == machine.msi(1, 0, flags=0)
        machine.run(bytes([0x0E]) + bytes(25) + b"\x01" + bytes(5))
        assert errno.EINVAL == errno_of(machine.msi, 1, 0, flags=0)
        assert {LPI: 1} == machine.pending()

    def test_disabling_drops_it(self, machine: ItsMachine) -> None:
        """Disabling the ITS drops the cache, and enabling does not bring it back."""
        machine.map_all()
        machine.msi(1, 0)
        machine.set_reg(CTLR, 0)
        machine.set_reg(CTLR, 1)

        assert errno.EINVAL == errno_of(machine.msi, 1, 0, flags=0)

    @pytest.mark.parametrize(
        "command",
        [
            pytest.param(mapc(0, 1), id="mapc-retarget"),
            pytest.param(event_command("CLEAR", 1, 0), id="clear"),
            pytest.param(mapti(1, 0, LPI + 9, 1), id="mapti-again"),
            pytest.param(mapd(3), id="mapd-of-a-new-device"),
            pytest.param(mapc(0, 9, 0), id="mapc-refused"),
        ],
    )
    def test_survives_what_keeps_the_lpi(self, machine: ItsMachine, command: bytes) -> None:
        """The cache names the LPI, so what changes its target or state keeps it."""
        machine.map_all()
        machine.msi(1, 0)
        machine.run(command)

        assert 1 == machine.msi(1, 0, flags=0)

    def test_does_not_ask_for_lpis_enabled(self, machine: ItsMachine) -> None:
        """A cached MSI is pended although its collection went to a vCPU with LPIs disabled."""
        machine.map_all()
        machine.vgic.cpus[1].lpis_enabled = False
        machine.msi(1, 0)
        machine.run(mapc(0, 1))

        assert 1 == machine.msi(1, 0)
        assert errno.EBUSY == errno_of(machine.msi, 1, 2)


class TestSender:
    def test_does_what_signal_msi_does(self, machine: ItsMachine) -> None:
        """A bound sender answers as the ioctl would, whatever happens between two calls."""
        send = MsiSender(machine.vm, KvmMsi(DOORBELL, 0, 0, 1, 1))
        assert 0 == send()
        machine.map_all()
        assert [1, 1] == [send(), send()]
        machine.run(mapc(0, 1))
        assert 1 == send()
        assert {LPI: 1} == machine.pending()
        machine.run(event_command("DISCARD", 1, 0))
        assert 0 == send()
        machine.run(mapti(1, 0, LPI + 20, 0))
        assert 1 == send()
        assert {LPI + 20: 1} == machine.pending()
        machine.set_reg(CTLR, 0)
        assert -errno.EBUSY == send()
        assert {"unmapped device": 1, "unmapped": 1, "unmapped event": 1, "ITS disabled": 1} == machine.dropped()

    def test_shortcut_lasts_as_long_as_the_cached_translation(self, machine: ItsMachine) -> None:
        """A caller is handed the direct way with the first MSI that is translated, and told when it ends."""
        ways: list[tuple[Callable[[Any], object] | None, Any]] = []
        send = MsiSender(machine.vm, KvmMsi(DOORBELL, 0, 0, 1, 1))
        send.shortcut = lambda *way: ways.append(way)
        assert 0 == send()
        assert [] == ways
        machine.map_all()
        send()
        ((direct, argument),) = ways
        assert direct is not None
        direct(argument)
        assert 1 == machine.vm.ledger.coalesced
        machine.run(event_command("DISCARD", 1, 0))
        assert [(direct, argument), (None, None)] == ways

    def test_may_be_made_before_the_its(self) -> None:
        """A route may name a doorbell that is not there yet."""
        vm = FakeVm()
        VgicV3.create(vm)
        send = MsiSender(vm, KvmMsi(DOORBELL, 0, 0, 1, 1))
        assert -errno.ENODEV == send()
        Its.create(vm).place(ITS_BASE)
        assert -errno.EBUSY == send()
        vm.ledger.check()

    def test_a_refused_route_stays_refused(self, machine: ItsMachine) -> None:
        """A route without a device id works only while the translation is cached by others."""
        machine.map_all()
        send = MsiSender(machine.vm, KvmMsi(DOORBELL, 0, 0, 0, 1))
        assert -errno.EINVAL == send()
        machine.msi(1, 0)
        assert [1, 1] == [send(), send()]
        machine.run(mapc(5, 0, 0))
        assert -errno.EINVAL == send()


class TestAttributeTable:
    def test_every_row_keeps_its_errnos(self) -> None:
        """No operation on any row answers an errno that the row does not list."""
        for (group, row), op in itertools.product(Its.attributes.rows(), ("set", "get", "has")):
            machine = ItsMachine()
            number = 5 if row.number is None else row.number
            allowed = {*row.errors, Its.attributes.unknown[op]}  # type: ignore[index]
            try:
                machine.attr(op, group.number, number, (1 << 64) - 1)
            except KvmError as error:
                assert error.errno in allowed, (row.name, op)  # noqa: PT017

    def test_rows_are_in_the_inventory(self) -> None:
        """Every row carries the id of its specification."""
        ids = {row.id for _, row in Its.attributes.rows()} | {row.id for row in GITS.rows}

        assert all(identity.startswith("its.") for identity in ids)
        assert {"its.addr.its", "its.ctrl.reset", "its.its-regs", "its.reg.ctlr", "its.reg.creadr"} <= ids
