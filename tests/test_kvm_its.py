"""The ITS through ``Kvm.ioctl``: creation, address, control attributes, several ITSs, MSIs."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from kvm_its import (
    ADDR,
    BASER,
    CBASER,
    COLLECTION_TABLE,
    CREADR,
    CTLR,
    CTRL,
    CWRITER,
    DEVICE_TABLE,
    IIDR,
    INIT,
    ITS_BASES,
    ITS_REGS,
    LPI,
    NEXT,
    QUEUE,
    RESET,
    RESTORE_TABLES,
    SAVE_TABLES,
    VALID,
    ItsHost,
    ItsVm,
    itt,
    mapc,
    mapd,
    mapti,
)
from kvm_machine import Arm, outcome

from fabric.devices.arm import vgic_its, vgic_its_commands, vgic_its_tables
from fabric.devices.arm.vgic_its import Its
from fabric.devices.arm.vgic_its_commands import encode
from fabric.uapi import arm64 as arm
from fabric.uapi import kvm as uapi

ITS = uapi.KVM_DEV_TYPE_ARM_VGIC_ITS
ADDRESS = arm.KVM_VGIC_ITS_ADDR_TYPE


@pytest.fixture
def vm() -> ItsVm:
    """A VM whose guest has set its ITS up."""
    vm = ItsVm(ItsHost())
    vm.boot()
    return vm


def fail(*_args: Any, **_kwargs: Any) -> Any:
    """An allocation on a host without memory."""
    raise MemoryError


class TestCreation:
    @pytest.mark.spec("its.create")
    def test_a_new_its_has_nothing(self) -> None:
        """KVM_CREATE_DEVICE adds an ITS without address, disabled, with no tables and no translations."""
        vm = ItsVm(ItsHost())

        assert (1 << 64) - 1 == vm.its[0].get_attr(ADDR, ADDRESS)
        assert ([], []) == vm.maps()
        assert {} == vm.lpis()
        vm.place()
        assert 1 << 31 == vm.reg(CTLR)
        assert [0, 0] == [vm.reg(BASER + 8 * n) >> 63 for n in range(2)]

    @pytest.mark.spec("its.create.rule.optional")
    def test_a_gic_without_its(self) -> None:
        """A GICv3 needs no ITS: it is initialised, takes interrupts, and has no LPIs to enable."""
        machine = Arm()
        event = machine.kvm.eventfd()
        machine.vm.irqfd(event, 3)
        event.signal()
        redist = arm.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS
        machine.gic.set_attr(redist, 0, 1)

        assert 1 << 3 == machine.pending()
        assert 0 == machine.gic.get_attr(redist, 0, 4) & 1
        assert 0 == machine.gicd(4) >> 17 & 1, "GICD_TYPER.LPIS"

    @pytest.mark.spec(
        "its.create.rule.msi-devid-cap", "api.signal-msi.rule.devid", "api.set-gsi-routing.rule.devid-cap"
    )
    def test_the_capability_follows_the_first_its(self) -> None:
        """KVM_CAP_MSI_DEVID says that device ids are needed: 0, and 1 from the first ITS on; and they are."""
        machine = Arm()
        assert 0 == machine.vm.check_extension(uapi.KVM_CAP_MSI_DEVID)
        machine.vm.create_device(ITS)
        assert 1 == machine.vm.check_extension(uapi.KVM_CAP_MSI_DEVID)

        vm = ItsVm(ItsHost())
        vm.boot()
        vm.run(mapd(1), mapti(1, 0, LPI, 0))
        assert ["EINVAL", 1] == [outcome(vm.msi, 1, 0, flags=0), vm.msi(1, 0)]

    @pytest.mark.spec("its.create.note.no-eexist", "its.create.rule.several")
    def test_there_may_be_many(self) -> None:
        """However many there are, another one is no EEXIST; each has an address of its own."""
        vm = ItsVm(ItsHost(), its=3)
        for n in range(3):
            vm.place(n)

        assert list(ITS_BASES) == [its.get_attr(ADDR, ADDRESS) for its in vm.its]
        assert len({its.fd for its in vm.its}) == 3

    @pytest.mark.spec("its.create.rule.gic-not-checked")
    def test_before_and_after_the_gic(self) -> None:
        """An ITS may come before the GIC, between its creation and its initialisation, and after; all work alike."""
        host = ItsHost()
        vm = ItsVm.__new__(ItsVm)
        vm.host, vm.vm = host, host.host.create_vm()
        vm.vcpus = [vm.vm.create_vcpu(0)]
        vm.vcpus[0].init()
        vm.add_memory()
        first = vm.vm.create_device(ITS)
        vm.add_gic(lambda: [first, vm.vm.create_device(ITS)])
        vm.its.append(vm.vm.create_device(ITS))
        vm.boot()
        for n in range(3):
            vm.run(mapd(1), mapti(1, 0, LPI + n, 0), its=n)

        assert [1, 1, 1] == [vm.msi(1, 0, its=n) for n in range(3)]
        assert {LPI + n: (0, True, True) for n in range(3)} == vm.lpis()

    @pytest.mark.spec("its.create.ENOMEM.alloc")
    def test_no_memory_for_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An allocation that fails is ENOMEM, and leaves the VM without the ITS."""
        machine = Arm()
        with monkeypatch.context() as patch:
            patch.setattr(vgic_its, "Pages", fail)
            assert "ENOMEM" == outcome(machine.vm.create_device, ITS)
        assert 0 == machine.vm.check_extension(uapi.KVM_CAP_MSI_DEVID)
        assert "ENODEV" == outcome(machine.vm.signal_msi, ITS_BASES[0], 0, 1)
        machine.vm.create_device(ITS)

    @pytest.mark.spec("its.create.ENODEV.host-cannot")
    @pytest.mark.parametrize("flags", [0, uapi.KVM_CREATE_DEVICE_TEST])
    def test_a_host_without_gicv3(self, flags: int) -> None:
        """There the type is not registered, not even to be asked for."""
        host = ItsHost(host_gic=2)

        assert "ENODEV" == outcome(host.host.create_vm().create_device, ITS, flags)
        ItsHost(host_gic=3).host.create_vm().create_device(ITS, flags)

    @pytest.mark.spec("its.msi.ENODEV.no-its", "api.signal-msi.ENODEV.arm-no-its")
    def test_an_its_beside_a_gicv2(self) -> None:
        """It can be made on a host that has both, and is none for messages: LPIs are a GICv3's."""
        host = ItsHost(gicv2_compat=True)
        vm = host.host.create_vm()
        vm.create_vcpu(0).init()
        vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V2)
        vm.create_device(ITS).set_attr(ADDR, ADDRESS, ITS_BASES[0])

        assert 1 == vm.check_extension(uapi.KVM_CAP_MSI_DEVID)
        assert ["ENODEV", "ENODEV"] == [
            outcome(vm.signal_msi, ITS_BASES[0] + 0x1_0040, 0, 1),
            outcome(vm.signal_msi, ITS_BASES[0] + 0x1_0040, 0),
        ]


class TestAddress:
    @pytest.mark.spec("its.addr.its", "its.addr.its.note.name")
    def test_round_trip(self) -> None:
        """Attribute 4 of group 0, under its new name as under the old: set, read, asked for, and there for guests."""
        vm = ItsVm(ItsHost())
        vm.its[0].set_attr(0, 4, 0x0900_0000)

        assert 4 == ADDRESS
        assert 0x0900_0000 == vm.its[0].get_attr(0, 4)
        assert vm.its[0].has_attr(0, 4)
        handler, offset = vm.inside.mmio.find(0x0901_FFFF)
        assert (vm.inside.its_list[0], 0x1_FFFF) == (handler, offset)

    @pytest.mark.spec("its.addr.its.EBUSY.race")
    def test_nobody_gets_between_check_and_registration(self) -> None:
        """An ioctl is one step here, so a second caller always finds the address set: EEXIST, and EBUSY never."""
        vm = ItsVm(ItsHost())
        row = Its.attributes.find(ADDR, ADDRESS)
        answers = [outcome(vm.its[0].set_attr, ADDR, ADDRESS, base) for base in (ITS_BASES[0], ITS_BASES[0], 0, 1)]

        assert [0, "EEXIST", "EEXIST", "EEXIST"] == answers
        assert row is not None
        assert errno.EBUSY not in row.errors

    @pytest.mark.spec("its.addr.its.ENOSPC.io-bus-full")
    def test_the_bus_is_full(self) -> None:
        """A host whose bus has no slot left says ENOSPC, although the address counts as set then."""
        vm = ItsVm(ItsHost(io_bus_devices=4), vcpus=2, its=3)  # each redistributor is a device on the bus
        vm.place(0)
        vm.place(1)

        assert "ENOSPC" == outcome(vm.its[2].set_attr, ADDR, ADDRESS, 0x0A00_0000)
        assert vm.inside.mmio.find(0x0A00_0000) is None
        assert 0x0A00_0000 == vm.its[2].get_attr(ADDR, ADDRESS)
        assert "EEXIST" == outcome(vm.its[2].set_attr, ADDR, ADDRESS, 0x0A00_0000)


CONTROL_OPS = [
    pytest.param(INIT, id="init"),
    pytest.param(RESET, id="reset"),
    pytest.param(SAVE_TABLES, id="save"),
    pytest.param(RESTORE_TABLES, id="restore"),
]


def bare() -> ItsVm:
    """No address, no tables, no memory."""
    return ItsVm(ItsHost(), memory=False)


def without_gic() -> Any:
    """An ITS in a VM with neither GIC nor vCPU nor memory."""
    vm = ItsHost().host.create_vm()
    return type("Vm", (), {"its": [vm.create_device(ITS)], "control": lambda self, n: self.its[0].set_attr(CTRL, n)})()


class TestControl:
    @pytest.mark.spec(
        "its.ctrl.init.ENXIO.not-configured",
        "its.ctrl.reset.ENXIO.not-configured",
        "its.ctrl.save-tables.ENXIO.not-configured",
        "its.ctrl.restore-tables.ENXIO.not-configured",
    )
    @pytest.mark.parametrize("make", [bare, without_gic])
    @pytest.mark.parametrize("number", CONTROL_OPS)
    def test_nothing_has_to_be_configured(self, make: Callable[[], Any], number: int) -> None:
        """The documents' ENXIO never comes: without an address, tables, memory or a GIC all four just succeed."""
        assert make().control(number) in (0, None)

    @pytest.mark.spec("its.ctrl.init")
    def test_init_changes_nothing(self, vm: ItsVm) -> None:
        """CTRL_INIT of an ITS at work leaves registers and maps as they are."""
        vm.run(mapd(1), mapti(1, 0, LPI, 0))
        before = vm.maps(), [vm.reg(offset) for offset in (CTLR, CBASER, CWRITER, CREADR, BASER)]
        vm.control(INIT)

        assert before == (vm.maps(), [vm.reg(offset) for offset in (CTLR, CBASER, CWRITER, CREADR, BASER)])

    @pytest.mark.spec("its.ctrl.reset")
    def test_reset_is_a_new_start(self, vm: ItsVm) -> None:
        """RESET forgets devices, collections and translations; the guest can set the ITS up once more."""
        vm.run(mapd(1), mapti(1, 0, LPI, 0))
        vm.control(RESET)
        assert (([], []), {}, 1 << 31) == (vm.maps(), vm.lpis(), vm.reg(CTLR))

        for offset, value in ((CBASER, QUEUE), (BASER, DEVICE_TABLE), (BASER + 8, COLLECTION_TABLE)):
            vm.set_reg(offset, VALID | value)
        vm.set_reg(CTLR, 1)
        vm.run(mapc(0, 1), mapd(1), mapti(1, 0, LPI + 5, 0))
        assert (1, {LPI + 5: (1, True, True)}) == (vm.msi(1, 0), vm.lpis())

    def test_resetting_one_leaves_the_others(self) -> None:
        """Each ITS has its maps; an LPI that another one maps stays, and the cache goes with the devices."""
        vm = ItsVm(ItsHost(), its=2)
        vm.boot()
        for n in range(2):
            vm.run(mapd(1), mapti(1, 0, LPI, 0), its=n)
            assert 1 == vm.msi(1, 0, its=n)
        assert 1 == vm.msi(1, 0, its=1, flags=0)
        vm.control(RESET, 0)

        assert {LPI: (0, True, True)} == vm.lpis()
        assert ["EBUSY", "EINVAL", 1] == [
            outcome(vm.msi, 1, 0),
            outcome(vm.msi, 1, 0, its=1, flags=0),
            vm.msi(1, 0, its=1),
        ]

    @pytest.mark.spec("its.ctrl.init.ENOMEM.alloc", "its.ctrl.reset.ENOMEM.alloc", "its.ctrl.save-tables.ENOMEM.alloc")
    @pytest.mark.parametrize("number", CONTROL_OPS[:3])
    def test_these_need_no_memory(self, vm: ItsVm, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """INIT, RESET and SAVE_TABLES make no records, so on a host without memory they work all the same."""
        vm.run(mapd(1), mapti(1, 0, LPI, 0))
        for module in (vgic_its, vgic_its_commands, vgic_its_tables):
            for record in ("ItsDevice", "Collection"):
                monkeypatch.setattr(module, record, fail)

        assert outcome(vm.control, number) is None

    @pytest.mark.spec("its.ctrl.restore-tables.ENOMEM.alloc")
    @pytest.mark.parametrize("record", ["Collection", "ItsDevice"])
    def test_no_memory_for_a_restore(self, record: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """ENOMEM, and what was restored before is gone again; a later attempt works."""
        host = ItsHost()
        first = ItsVm(host)
        first.boot()
        first.run(mapd(1), mapti(1, 0, LPI, 0), mapd(2), mapti(2, 0, LPI + 1, 1))
        saved = first.save()
        vm = ItsVm(host)
        vm.restore(saved, leave_out=["tables", "ctlr"])
        made = getattr(vgic_its_tables, record)
        left = iter([made, fail])
        with monkeypatch.context() as patch:
            patch.setattr(vgic_its_tables, record, lambda *args: next(left)(*args))
            assert "ENOMEM" == outcome(vm.control, RESTORE_TABLES)
        assert (([], []), {}) == (vm.maps(), vm.lpis())

        vm.control(RESTORE_TABLES)
        assert first.maps() == vm.maps()

    def test_no_memory_for_a_command(self, vm: ItsVm, monkeypatch: pytest.MonkeyPatch) -> None:
        """A command for which there is none has no effect, as any other that fails."""
        monkeypatch.setattr(vgic_its_commands, "ItsDevice", fail)
        vm.run(mapd(1), mapc(5, 1))

        assert ([], [(0, 0), (1, 1), (5, 1)]) == vm.maps()
        assert 1 == vm.inside.its_list[0].refused["the host must have memory left"]

    @pytest.mark.spec("its.any")
    def test_other_groups_and_numbers(self, vm: ItsVm) -> None:
        """Groups of the GIC are none of the ITS; unknown numbers of CTRL are taken and do nothing."""
        before = vm.maps(), vm.reg(BASER)
        groups = (1, 2, 3, 5, 6, 7, 9, 0xFFFF_FFFF)

        assert {"ENXIO"} == {outcome(vm.its[0].set_attr, group, 0) for group in groups}
        assert {"ENXIO"} == {outcome(vm.its[0].get_attr, group, 0) for group in (*groups, CTRL)}
        assert not any(vm.its[0].has_attr(group, 0) for group in groups)
        assert [0, 0] == [vm.its[0].set_attr(CTRL, number) for number in (3, 1 << 40)]
        assert before == (vm.maps(), vm.reg(BASER))


class TestRegisters:
    @pytest.mark.spec("its.its-regs")
    def test_64_bits_for_each(self, vm: ItsVm) -> None:
        """Every register is a 64-bit value, also those of 32 bits, whose upper half is neither written nor read."""
        vm.set_reg(CTLR, 0xFFFF_FFFF_0000_0000)

        assert 1 << 31 == vm.reg(CTLR)
        assert 0x4B00_043B == vm.reg(IIDR)
        assert VALID | QUEUE == vm.reg(CBASER) & (VALID | 0xF_FFFF_FFFF_F000)
        assert vm.its[0].has_attr(ITS_REGS, CBASER)

    @pytest.mark.spec("its.its-regs.EINVAL.align")
    def test_numbers_beyond_32_bits(self, vm: ItsVm) -> None:
        """They are beyond all registers, so 4-byte alignment is enough; then the low 32 bits find the register."""
        beyond = 1 << 32

        assert vm.reg(CBASER) == vm.reg(beyond | CBASER)
        assert vm.reg(CBASER) >> 32 == vm.reg(beyond | CBASER + 4)
        assert vm.its[0].has_attr(ITS_REGS, beyond | CBASER + 4)
        assert ["EINVAL", "EINVAL"] == [outcome(vm.reg, offset) for offset in (CBASER + 4, beyond | CBASER + 2)]
        assert "ENXIO" == outcome(vm.reg, beyond | 0x10)
        vm.set_reg(CTLR, 0)
        vm.set_reg(beyond | BASER + 12, 1)
        assert vm.reg(BASER + 8) == vm.reg(BASER + 8) | 1 << 32


class TestMsis:
    @pytest.mark.spec("its.msi", "api.signal-msi", "api.signal-msi.rule.arm", "api.signal-msi.note.arch-list")
    def test_an_lpi_for_a_message(self, vm: ItsVm) -> None:
        """On arm64 an MSI is (device, event) for an ITS: above 0 delivered as the LPI it is mapped to, 0 not mapped."""
        vm.run(mapd(1), mapti(1, 3, LPI + 7, 1))

        assert [1, 0] == [vm.msi(1, 3), vm.msi(1, 4)]
        assert {LPI + 7: (1, True, True)} == vm.lpis()

    @pytest.mark.spec("its.commands")
    def test_the_queue_is_run_by_writing_cwriter(self, vm: ItsVm) -> None:
        """Commands take effect before the write of GITS_CWRITER returns, and CREADR has caught up."""
        vm.run(mapd(9), mapti(9, 1, LPI, 0))

        assert (vm.reg(CWRITER), {LPI: (0, True, False)}) == (vm.reg(CREADR), vm.lpis())

    @pytest.mark.spec("its.addr.its.note.overlap")
    @pytest.mark.parametrize(
        ("bases", "winner"),
        [
            pytest.param((0x0900_0000, 0x0900_0000), 0, id="same"),
            pytest.param((0x0900_0000, 0x0901_0000), 0, id="lower-first"),
            pytest.param((0x0901_0000, 0x0900_0000), 1, id="lower-second"),
        ],
    )
    def test_frames_that_overlap(self, bases: tuple[int, int], winner: int) -> None:
        """Nothing is refused; where two have an address the lower one has it, of two at one base the first."""
        vm = ItsVm(ItsHost(), its=2)
        for n, base in enumerate(bases):
            vm.place(n, base)
            for offset, value in ((CBASER, QUEUE), (BASER, DEVICE_TABLE), (BASER + 8, COLLECTION_TABLE)):
                vm.set_reg(offset, VALID | value + n * NEXT, n)
            vm.set_reg(CTLR, 1, n)
            vm.run(mapc(0, 0), mapd(1), its=n)
        vm.enable_lpis()
        for n in range(2):
            vm.run(mapti(1, 0, LPI + n, 0), its=n)

        assert 1 == vm.vm.signal_msi(max(bases) + 0x100, 0, 1)
        assert [LPI + winner] == [lpi for lpi, (_, _, pending) in vm.lpis().items() if pending]

    def test_one_lpi_of_two_itss(self) -> None:
        """Both raise it; it keeps the target and the state it had when the second maps it, and goes with the last."""
        vm = ItsVm(ItsHost(), its=2)
        vm.boot()
        vm.run(mapd(1), mapti(1, 0, LPI, 0))
        vm.msi(1, 0)
        vm.run(mapd(4), mapti(4, 9, LPI, 1), its=1)
        assert {LPI: (0, True, True)} == vm.lpis()

        vm.run(encode("MOVI", DeviceID=4, EventID=9, ICID=1), its=1)
        assert {LPI: (1, True, True)} == vm.lpis()
        vm.run(mapd(1, valid=0))
        assert (0, 1, {LPI: (1, True, True)}) == (vm.msi(1, 0), vm.msi(4, 9, its=1), vm.lpis())
        vm.run(encode("DISCARD", DeviceID=4, EventID=9), its=1)
        assert {} == vm.lpis()


class TestTranslationCache:
    """Linux 6.1 remembers 16 translations a vCPU; which ones shows in what a message without a device id does."""

    @staticmethod
    def make(vcpus: int, events: int) -> ItsVm:
        vm = ItsVm(ItsHost(), vcpus)
        vm.boot()
        vm.run(mapd(1, 8), *(mapti(1, event, LPI + event, event % vcpus) for event in range(events)))
        return vm

    @staticmethod
    def remembered(vm: ItsVm, events: int) -> list[int]:
        """The events that are; looking counts as use of those."""
        return [event for event in range(events) if outcome(vm.msi, 1, event, flags=0) == 1]

    @pytest.mark.parametrize("vcpus", [1, 2, 3])
    def test_it_has_room_for_16_of_each_vcpu(self, vcpus: int) -> None:
        """One more, and the one used longest ago is forgotten."""
        events = 16 * vcpus + 1
        vm = self.make(vcpus, events)
        for event in range(events - 1):
            vm.msi(1, event)
        assert list(range(events - 1)) == self.remembered(vm, events)
        vm.msi(1, events - 1)
        assert list(range(1, events)) == self.remembered(vm, events)

    def test_every_use_counts(self) -> None:
        """By ioctl with or without a device id, at another address of the frame, by INT, by irqfd: used is used."""
        vm = self.make(1, 24)
        for event in range(16):
            vm.msi(1, event)
        event = vm.host.kvm.eventfd()
        vm.vm.set_routes([route(3, 4)])
        vm.vm.irqfd(event, 3)
        vm.msi(1, 0)
        vm.msi(1, 1, flags=0)
        vm.vm.signal_msi(ITS_BASES[0], 2, 1)
        vm.run(encode("INT", DeviceID=1, EventID=3))
        event.signal()
        for other in range(16, 24):
            vm.msi(1, other)

        assert [0, 1, 2, 3, 4, *range(13, 24)] == self.remembered(vm, 24)

    def test_senders_do_not_keep_what_is_forgotten(self) -> None:
        """An irqfd whose translation had to give way asks the maps again: here, a vCPU that has LPIs disabled."""
        vm = ItsVm(ItsHost(), 2)
        vm.boot()
        vm.set_redist(1, 0, 0)
        vm.run(mapd(1, 8), *(mapti(1, event, LPI + event, 0) for event in range(33)))
        event = vm.host.kvm.eventfd()
        vm.vm.set_routes([route(3, 0)])
        vm.vm.irqfd(event, 3)
        event.signal()
        vm.run(mapc(0, 1), encode("CLEAR", DeviceID=1, EventID=0))
        event.signal()
        assert {LPI} == {lpi for lpi, (_, _, pending) in vm.lpis().items() if pending}
        vm.run(mapc(0, 0), *(encode("INT", DeviceID=1, EventID=other) for other in range(1, 33)), mapc(0, 1))
        vm.run(encode("CLEAR", DeviceID=1, EventID=0))
        event.signal()

        assert LPI not in {lpi for lpi, (_, _, pending) in vm.lpis().items() if pending}
        assert 1 == vm.inside.ledger.statement().dropped["LPIs disabled"]

    def test_outlives_a_restore(self, vm: ItsVm) -> None:
        """A second restore is refused and takes all collections away; what is remembered is delivered all the same."""
        vm.run(mapd(1), mapti(1, 0, LPI, 0), mapti(1, 1, LPI + 1, 0))
        vm.msi(1, 0)
        vm.control(SAVE_TABLES)
        assert "EEXIST" == outcome(vm.control, RESTORE_TABLES)

        assert [1, 0] == [vm.msi(1, 0), vm.msi(1, 1)]
        assert [] == vm.maps()[1]


class TestRestoringOverWhatIsThere:
    """RESTORE_TABLES does not clear the maps first."""

    def test_a_device_is_there_twice(self, vm: ItsVm) -> None:
        """The new record is hidden behind the old one, whose events lost their collections, until that is unmapped."""
        vm.run(mapd(1), mapti(1, 0, LPI, 0))
        vm.control(SAVE_TABLES)
        assert "EEXIST" == outcome(vm.control, RESTORE_TABLES)
        vm.control(RESTORE_TABLES)
        assert 0 == vm.msi(1, 0), "the old one is found"
        vm.run(mapd(1, valid=0))
        assert 1 == vm.msi(1, 0), "the new one has come to light"
        assert 0 == vm.host.read_u64(DEVICE_TABLE + 8)

    def test_saving_turns_them_around(self, vm: ItsVm) -> None:
        """SAVE_TABLES writes both into the same entries, last the one that was found, and the other is found then."""
        vm.run(mapd(1), mapti(1, 0, LPI, 0))
        vm.control(SAVE_TABLES)
        ite = vm.host.read_u64(itt(1))
        outcome(vm.control, RESTORE_TABLES)
        vm.control(RESTORE_TABLES)
        vm.control(SAVE_TABLES)
        assert 0 == vm.host.read_u64(itt(1)), "the old one, whose event goes nowhere"
        vm.control(SAVE_TABLES)
        assert (ite, 0) == (vm.host.read_u64(itt(1)), vm.msi(1, 0))
        vm.control(SAVE_TABLES)
        assert (0, 1) == (vm.host.read_u64(itt(1)), vm.msi(1, 0))


def route(gsi: int, eventid: int) -> uapi.KvmIrqRoutingEntry:
    """A GSI to an event of device 1."""
    to = uapi.KvmIrqRoutingMsi(ITS_BASES[0] + 0x1_0040, 0, eventid, 1)
    return uapi.KvmIrqRoutingEntry(
        gsi, uapi.KVM_IRQ_ROUTING_MSI, uapi.KVM_MSI_VALID_DEVID, u=to.pack().ljust(32, b"\0")
    )


@pytest.mark.spec("its.ctrl.save-tables.EACCES.hw-pending")
def test_no_lpi_is_the_hosts(vm: ItsVm) -> None:
    """EACCES is for LPIs backed by a physical interrupt (GICv4); no host has any, so saving never answers it.

    Every LPI comes from MAPTI, MAPI or a restored table, and is a record whose pending state is known.
    """
    vm.run(mapd(1), mapti(1, 0, LPI, 0), encode("MAPI", DeviceID=1, EventID=1, ICID=0))
    vm.msi(1, 0)
    row = Its.attributes.find(CTRL, SAVE_TABLES)

    assert outcome(vm.control, SAVE_TABLES) is None
    assert row is not None
    assert errno.EACCES not in row.errors
    assert not any("gicv4" in option for option in vm.inside.options)
