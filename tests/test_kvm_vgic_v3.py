"""The GICv3 through ``Kvm.ioctl``: creation with vCPUs, the first run, full buses, failing allocations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kvm_gic import (
    ADDR,
    CPU_SYSREGS,
    CTRL,
    DIST,
    GICD,
    GICR,
    GITS,
    ICC,
    INIT,
    ITS,
    ITS_ADDRESS,
    LEVEL_INFO,
    LPI,
    NOTHING,
    NR_IRQS,
    RAM,
    REDIST,
    REGION,
    SAVE_PENDING_TABLES,
    V3,
    GicVm,
    first_run,
    run_guests,
)
from kvm_machine import outcome

import fabric
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

V2 = uapi.KVM_DEV_TYPE_ARM_VGIC_V2
UNSET = 0xFFFF_FFFF_FFFF_FFFF
LAST = 1 << 4


def fail(*_args: Any, **_kwargs: Any) -> Any:
    """An allocation on a host without memory."""
    raise MemoryError


def bare(ids: tuple[int, ...] = (0,), **options: Any) -> GicVm:
    """A VM with vCPUs and a GICv3 as created."""
    vm = GicVm(ready=False, **options)
    vm.add_vcpus(ids)
    vm.gic = vm.vm.create_device(V3)
    return vm


def region(index: int, base: int, count: int) -> int:
    return count << 52 | base | index


# -- creation


@pytest.mark.spec("vgic-v3.create", "vgic-v3.create.rule.one-per-vm")
def test_creation() -> None:
    """The VM takes up to 512 vCPUs from then on, no address is set, and no GIC of either model can be added."""
    vm = bare()

    assert 512 == vm.vm.check_extension(uapi.KVM_CAP_MAX_VCPUS)
    assert [UNSET, UNSET] == [vm.gic.get_attr(ADDR, kind) for kind in (DIST, REDIST)]
    assert "EEXIST" == outcome(vm.vm.create_device, V3)
    assert None is outcome(vm.gic.close)
    assert "EEXIST" == outcome(vm.vm.create_device, V3), "the GIC lives as long as its VM"


@pytest.mark.spec("vgic-v3.create.rule.its-separate")
@pytest.mark.parametrize("before", [0, 1, 2])
def test_itss_are_devices_of_their_own(before: int) -> None:
    """There may be several, made before the GIC or after it, and each has its own address."""
    vm = GicVm(ready=False)
    vm.add_vcpus((0,))
    itss = [vm.vm.create_device(ITS) for _ in range(before)]
    vm.gic = vm.vm.create_device(V3)
    itss += [vm.vm.create_device(ITS) for _ in range(3 - before)]
    for n, its in enumerate(itss):
        its.set_attr(ADDR, ITS_ADDRESS, GITS + 0x2_0000 * n)

    assert [GITS, GITS + 0x2_0000, GITS + 0x4_0000] == [its.get_attr(ADDR, ITS_ADDRESS) for its in itss]
    assert 3 == len({its.fd for its in itss})


@pytest.mark.spec("vgic-v3.create.ENOMEM.alloc")
def test_no_memory_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM, and the VM has no GIC; the next try goes through."""
    vm = GicVm(ready=False)
    with monkeypatch.context() as patch:
        patch.setattr("fabric.devices.arm.vgic_v3.Frames", fail)
        assert "ENOMEM" == outcome(vm.vm.create_device, V3)
    assert vm.inside.irqchip is None
    vm.vm.create_device(V3)


@pytest.mark.spec("vgic-v3.create-vcpu", "vgic-v3.addr.redist.rule.fills-in-vcpu-order")
def test_a_new_vcpu_gets_the_next_redistributor() -> None:
    """In the order of creation, whatever the ids."""
    vm = bare(())
    vm.gic.set_attr(ADDR, REDIST, GICR)
    vm.add_vcpus((3, 0, 17))
    vm.gic.set_attr(CTRL, INIT)
    places = {vcpu.cpu_interface.slot: vcpu.vcpu_id for vcpu in vm.inside.vcpus}

    assert {0: 3, 1: 0, 2: 17} == places
    assert [0, 0, LAST] == [vm.redist(n, 8) & LAST for n in (3, 0, 17)]


def test_an_id_in_use_takes_a_place_all_the_same() -> None:
    """KVM finds out too late: the place is lost, in a region of its own size as in a legacy one."""
    vm = bare(())
    vm.gic.set_attr(ADDR, DIST, GICD)
    vm.gic.set_attr(ADDR, REGION, region(0, GICR, 3))
    vm.add_vcpus((0,))
    assert "EEXIST" == outcome(vm.vm.create_vcpu, 0)
    vm.add_vcpus((1, 2))
    vm.gic.set_attr(CTRL, INIT)
    assert [0, 1, None] == [vcpu.cpu_interface.region and vcpu.cpu_interface.slot // 2 for vcpu in vm.inside.vcpus]
    assert [0, LAST, 0] == [vm.redist(n, 8) & LAST for n in range(3)]
    assert "ENXIO" == first_run(vm)

    legacy = bare(())
    legacy.gic.set_attr(ADDR, REDIST, GICR)
    legacy.add_vcpus((0,))
    assert "EEXIST" == outcome(legacy.vm.create_vcpu, 0)
    legacy.gic.set_attr(CTRL, INIT)
    assert 0 == legacy.redist(0, 8) & LAST, "another one seems to follow"


def test_a_region_that_is_refused_takes_frames_off_the_bus() -> None:
    """Those of the vCPUs before the one that could not be placed; the region can be registered elsewhere."""
    vm = bare((0, 1))
    vm.gic.set_attr(ADDR, DIST, GICD)
    vm.gic.set_attr(ADDR, REGION, region(0, GICR, 1))
    assert vm.inside.mmio.find(GICR) is not None
    assert "EINVAL" == outcome(vm.gic.set_attr, ADDR, REGION, region(1, GICD, 1))

    assert vm.inside.mmio.find(GICR) is None
    vm.gic.set_attr(ADDR, REGION, region(1, GICR + 0x2_0000, 1))
    assert vm.inside.mmio.find(GICR) is None
    assert vm.inside.mmio.find(GICR + 0x2_0000) is not None
    assert region(0, GICR, 1) == vm.gic.get_attr(ADDR, REGION)


# -- the bus and memory have an end


@pytest.mark.parametrize(
    "place",
    [
        pytest.param((REDIST, GICR), marks=pytest.mark.spec("vgic-v3.addr.redist.ENOSPC.io-bus-full")),
        pytest.param(
            (REGION, region(0, GICR, 2)), marks=pytest.mark.spec("vgic-v3.addr.redist-region.ENOSPC.io-bus-full")
        ),
    ],
)
@pytest.mark.parametrize("room", [0, 1])
def test_the_bus_is_full(place: tuple[int, int], room: int) -> None:
    """ENOSPC, and no region is registered; with room it is. A vCPU that would need a place is refused as well."""
    vm = bare((0, 1))
    vm.inside.mmio.limit = room
    assert "ENOSPC" == outcome(vm.gic.set_attr, ADDR, *place)
    assert UNSET == vm.gic.get_attr(ADDR, REDIST)
    assert vm.inside.mmio.find(GICR) is None

    vm.inside.mmio.limit = 2
    vm.gic.set_attr(ADDR, *place)
    vm.inside.mmio.limit = None if place[0] == REGION else 2
    assert (None if place[0] == REGION else "ENOSPC") == outcome(vm.add_vcpus, (2,))


@pytest.mark.parametrize(
    "place",
    [
        pytest.param((REDIST, GICR), marks=pytest.mark.spec("vgic-v3.addr.redist.ENOMEM.alloc")),
        pytest.param((REGION, region(0, GICR, 2)), marks=pytest.mark.spec("vgic-v3.addr.redist-region.ENOMEM.alloc")),
    ],
)
@pytest.mark.parametrize("record", ["Region", "RedistributorFrame"])
def test_no_memory_for_a_region(place: tuple[int, int], record: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM, and no region is registered; with memory it is."""
    vm = bare((0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(f"fabric.devices.arm.vgic_v3_frames.{record}", fail)
        assert "ENOMEM" == outcome(vm.gic.set_attr, ADDR, *place)
    assert UNSET == vm.gic.get_attr(ADDR, REDIST)

    vm.gic.set_attr(ADDR, *place)
    assert [0, 1] == [vcpu.cpu_interface.slot for vcpu in vm.inside.vcpus]


@pytest.mark.spec("vgic-v3.ctrl.init.ENOMEM.alloc")
@pytest.mark.parametrize("what", ["vgic.WiredIrq", "vgic.Vgic.wired"])
def test_no_memory_to_initialise(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM while the interrupts are made or the routing table; the next try goes through."""
    vm = bare()
    target = "fabric.devices.arm.vgic.WiredIrq" if what == "vgic.WiredIrq" else "fabric.kvm.vm.RoutingTable.flat"
    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        assert "ENOMEM" == outcome(vm.gic.set_attr, CTRL, INIT)
        assert "EBUSY" == outcome(vm.dist, 0)
    vm.gic.set_attr(CTRL, INIT)
    assert 0x50 == vm.dist(0)


@pytest.mark.spec("vgic-v3.ctrl.save-pending-tables.ENOMEM.alloc")
def test_saving_pending_tables_needs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes no records, so on a host without memory it works all the same."""
    vm = GicVm()
    vm.boot()
    vm.msi(0)
    for record in ("vgic.WiredIrq", "vgic.VgicIrq", "vgic_v3_frames.Region", "vgic_v3.Frames"):
        monkeypatch.setattr(f"fabric.devices.arm.{record}", fail)

    assert outcome(vm.gic.set_attr, CTRL, SAVE_PENDING_TABLES) == 0


# -- the first run


@pytest.mark.spec("vgic-v3.first-run", "vgic-v3.first-run.rule.vm-dead")
@pytest.mark.parametrize(
    ("missing", "code"), [("redist", "ENXIO"), ("dist", "ENXIO"), ("apart", "EINVAL"), ("init", "EBUSY")]
)
def test_a_first_run_that_fails_is_the_end_of_the_vm(missing: str, code: str) -> None:
    """After its errno everything on the VM, its vCPUs and its devices is EIO."""
    vm = bare((0, 1))
    vm.its = vm.vm.create_device(ITS)
    vm.gic.set_attr(NR_IRQS, 0, 64)
    if missing != "redist":
        vm.gic.set_attr(ADDR, REDIST, GICR)
    if missing != "dist":
        vm.gic.set_attr(ADDR, DIST, GICR if missing == "apart" else GICD)
    if missing != "init":
        vm.gic.set_attr(CTRL, INIT)
    assert code == first_run(vm, 1)

    calls: list[Callable[[], Any]] = [
        lambda: first_run(vm),
        lambda: outcome(vm.vcpus[0].init),
        lambda: outcome(vm.vcpus[0].get_reg, arm.KVM_REG_ARM_MPIDR_EL1),
        lambda: outcome(vm.vm.create_vcpu, 2),
        lambda: outcome(vm.vm.create_device, ITS),
        lambda: outcome(vm.line, 40, 1),
        lambda: outcome(vm.vm.check_extension, uapi.KVM_CAP_IRQCHIP),
        lambda: outcome(vm.gic.get_attr, NR_IRQS, 0, 4),
        lambda: outcome(vm.gic.set_attr, ADDR, DIST, GICD),
        lambda: outcome(vm.its.get_attr, ADDR, ITS_ADDRESS),
        lambda: outcome(vm.gic.ioctl, requests.KVM_HAS_DEVICE_ATTR, uapi.KvmDeviceAttr(0, CTRL, INIT)),
        lambda: outcome(vm.set_dist, 0, 2),
    ]
    assert ["EIO"] * len(calls) == [call() for call in calls]
    assert 0 != vm.host.create_vm().fd, "the host goes on"


def test_a_second_vcpu_finds_everything_checked() -> None:
    """Only the first run of the VM looks; and then the GIC cannot be created any more where there is none."""
    vm = GicVm()
    assert ["EINTR", "EINTR"] == [first_run(vm, 1), first_run(vm, 0)]

    without = GicVm(ready=False)
    without.add_vcpus((0,))
    assert "EINTR" == first_run(without)
    assert "EBUSY" == outcome(without.vm.create_device, V3)


# -- initialisation


@pytest.mark.spec("vgic-v3.ctrl.init", "vgic-v3.ctrl.init.rule.mandatory", "vgic-v3.irq-line")
def test_initialising_brings_the_gic_to_life() -> None:
    """Registers and injection are busy before and work after; the number of interrupts is fixed."""
    vm = bare()
    assert ["EBUSY"] * 3 == [
        outcome(vm.dist, 4),
        outcome(vm.line, 40, 1),
        outcome(vm.vm.irq_line, arm.irq_line(arm.KVM_ARM_IRQ_TYPE_PPI, 20), 1),
    ]
    vm.gic.set_attr(CTRL, INIT)

    assert 256 // 32 - 1 == vm.dist(4) & 0x1F
    vm.line(40, 1)
    assert 1 << 8 == vm.dist(0x204)
    vm.vm.irq_line(arm.irq_line(arm.KVM_ARM_IRQ_TYPE_PPI, 20), 1)
    assert 1 << 20 == vm.gic.get_attr(LEVEL_INFO, 0, 4)
    assert "EBUSY" == outcome(vm.gic.set_attr, NR_IRQS, 0, 64)


@pytest.mark.spec(
    "vgic-v3.ctrl.init.ENXIO.not-configured", "vgic-v3.ctrl.init.ENODEV.no-vcpu", "vgic-v3.ctrl.init.EFAULT.guest-ram"
)
@pytest.mark.parametrize("vcpus", [(), (0,), (0, 1)])
@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("memory", [False, True])
def test_initialising_asks_for_nothing(vcpus: tuple[int, ...], configured: bool, memory: bool) -> None:
    """No vCPU, no address, no count and no guest memory: Linux gives none of the errors the text has for that."""
    vm = bare(vcpus)
    if not memory:
        vm.vm.set_memory(0, RAM, 0)
    if configured:
        vm.gic.set_attr(NR_IRQS, 0, 64)
        vm.gic.set_attr(ADDR, DIST, GICD)
        vm.gic.set_attr(ADDR, REDIST, GICR)

    assert 0 == vm.gic.set_attr(CTRL, INIT)
    assert "EBUSY" == outcome(vm.vm.create_vcpu, 5)


@pytest.mark.spec("vgic-v3.ctrl.save-pending-tables.ENODEV.no-vcpu", "vgic-v3.ctrl.save-pending-tables")
def test_saving_pending_tables_without_a_vcpu() -> None:
    """There is nothing to save then, and no error; with vCPUs the bits are where their PENDBASER says."""
    vm = bare(())
    vm.gic.set_attr(CTRL, INIT)
    assert 0 == vm.gic.set_attr(CTRL, SAVE_PENDING_TABLES)

    vm = GicVm()
    vm.boot()
    for event in (0, 1, 2):
        vm.msi(event)
    vm.gic.set_attr(CTRL, SAVE_PENDING_TABLES)
    saved = [vm.user.read(vm.ram + 0x5_0000 + 0x1_0000 * n + LPI // 8, 2) for n in (0, 1)]
    assert [b"\x05\0", b"\x02\0"] == saved


@pytest.mark.spec("vgic-v3.ctrl.save-pending-tables.ENXIO.wrong-model")
def test_a_gicv2_has_no_pending_tables() -> None:
    """The attribute is the GICv3's."""
    vm = GicVm(ready=False, host_gic=2)
    vm.add_vcpus((0,))
    gic = vm.vm.create_device(V2)

    assert "ENXIO" == outcome(gic.set_attr, CTRL, SAVE_PENDING_TABLES)


@pytest.mark.spec("vgic-v3.cpu-sysregs.ENXIO.aarch32")
def test_the_registers_of_an_aarch32_guest_are_the_same() -> None:
    """The text has ENXIO for it, from a host that is no more: with 32-bit vCPUs no encoding answers so."""
    vm = GicVm(ready=False)
    vm.vcpus.append(vm.vm.create_vcpu(0))
    vm.vcpus[0].init([arm.KVM_ARM_VCPU_EL1_32BIT])
    vm.gic = vm.vm.create_device(V3)
    vm.gic.set_attr(CTRL, INIT)
    answers = [outcome(vm.gic.get_attr, CPU_SYSREGS, encoding) for encoding in range(0xC000, 0x1_0000)]

    assert {"ENOENT", "EINVAL"} == {answer for answer in answers if isinstance(answer, str)}
    assert 9 == sum(isinstance(answer, int) for answer in answers)
    assert 0 == vm.gic.set_attr(CPU_SYSREGS, ICC["PMR"], 0xF0)


# -- a guest


@pytest.mark.spec("vgic-v3")
def test_what_a_guest_has_of_it() -> None:
    """One distributor for all, a redistributor each, a CPU interface in system registers."""

    async def guest(cpu: Any) -> tuple[int, ...]:
        typer = await cpu.load(GICR + 0x2_0000 * cpu.number + 8, 8)
        number = await cpu.load(GICD + 4, 4)
        return number & 0x1F, typer >> 32, await cpu.mrs("ICC_IAR1_EL1"), await cpu.mrs("ICC_RPR_EL1")

    async def main() -> list[Any]:
        vm = GicVm((0, 1))
        vm.boot()
        vm.line(40, 1)
        return await run_guests(vm, guest)

    assert [(2, 0, 40, 0x28), (2, 1, NOTHING, 0xFF)] == fabric.run(main)


@pytest.mark.parametrize("ids", [(0, 1, 2), (0, 2, 1), (5, 0, 2)])
def test_broadcast_sgis_leave_out_the_index_that_is_the_senders_id(ids: tuple[int, ...]) -> None:
    """KVM compares the index of each vCPU with the id of the sender."""

    async def send(cpu: Any) -> None:
        await cpu.msr("ICC_SGI1R_EL1", 1 << 40 | 3 << 24)
        await cpu.store(0x1000, 4, 0)

    async def main() -> list[int]:
        vm = GicVm(ids)
        vm.boot()
        vm.vcpus[0].load(send)
        await vm.vcpus[0].run()
        return [vm.redist(n, 0x1_0200) for n in ids]

    assert [8 * (index != ids[0]) for index in range(3)] == fabric.run(main)
