"""Machines to be saved, and hosts to restore them on: with something in every register, or with guests that run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from kvm_machine import DOORBELL, GITS_CWRITER, PENDING, RAM, RAM_SIZE, Arm

import fabric
from fabric.devices.arm.vgic_its_commands import encode
from fabric.kvm import Kvm
from fabric.kvm.typed import Host, msi_route, pin_route
from fabric.migration import ArmVm, Irqfd
from fabric.trace.ledger import LedgerStatement
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.usermem import SparseMemory

Program = Callable[[Any], Awaitable[object]]
X0, TPIDR = arm.arm64_core_reg(0), arm.arm64_sys_reg(3, 3, 13, 0, 2)
DIST, CPU_REGS, REDIST, SYSREGS, LINES = 1, 2, 5, 6, 7
FRAME = 0x1_0000
AFFINITY = (0, 0x105)
"""Of the vCPUs of the GICv3."""


def blank(**options: Any) -> ArmVm:
    """A host, and no VM yet."""
    return ArmVm(Host(Kvm("aarch64", user_memory=SparseMemory(), **options)))


def gicv3() -> ArmVm:
    """Two vCPUs, GICv3 and ITS, with something in every register that can have something."""
    machine = Arm(2, memory=True, init=False)
    machine.vcpus[1].set_reg(arm.KVM_REG_ARM_MPIDR_EL1, 1 << 31 | AFFINITY[1])
    machine.gic.set_attr(3, 0, 96)
    machine.gic.set_attr(4, 0)
    machine.gic.set_attr(DIST, 0x8, 0x4B00_243B)  # GICD_IIDR, revision 2
    machine.add_its()
    commands = (
        encode("MAPC", ICID=3, RDbase=1, V=1),
        encode("MAPTI", DeviceID=8, EventID=5, pINTID=8200, ICID=3),
    )
    queue = machine.its.get_attr(arm.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, GITS_CWRITER)
    machine.user.write(machine.ram + queue, b"".join(commands))  # the queue is at the beginning of RAM
    machine.its.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, GITS_CWRITER, queue + 64)
    gic = machine.gic
    machine.forward()
    for number, cpu in enumerate(AFFINITY):
        for offset, value in ((0x180, 1 << 5), (0x100, 1 << 27), (0x80, 0xFFFF_0F0F), (0x408, 0x6050_4030)):
            gic.set_attr(REDIST, cpu << 32 | FRAME + offset, value)
        for offset, value in ((0x300, 1 << 3), (0x200, 1 << 2 | 1 << 20)):
            gic.set_attr(REDIST, cpu << 32 | FRAME + offset, value)
        for encoding, value in ((0xC230, 0xA0 + 8 * number), (0xC643, 3), (0xC663, 4), (0xC664, 0x8402), (0xC667, 1)):
            gic.set_attr(SYSREGS, cpu << 32 | encoding, value)
        gic.set_attr(SYSREGS, cpu << 32 | 0xC648, 1 << 6 | number)
    gic.set_attr(REDIST, AFFINITY[1] << 32 | 0x78, PENDING + 0x1_0000)
    gic.set_attr(REDIST, AFFINITY[1] << 32, 1)
    for offset, value in (
        (0x84, 0xFFFF_FF0F),  # GICD_IGROUPR1
        (0xC08, 0xAAAA_0000),
        (0x424, 0x5040_3020),
        (0x6000 + 8 * 40, AFFINITY[1]),
        (0x304, 1 << 9),
        (0x204, 1 << 10),
    ):
        gic.set_attr(DIST, offset, value)
    machine.vm.irq_line(1 << 24 | 36, 1)
    machine.vm.irq_line(2 << 24 | 1 << 16 | 22, 1)  # PPI 22 of vCPU 1
    machine.vm.signal_msi(DOORBELL, 0, 8)
    machine.vm.signal_msi(DOORBELL, 5, 8)
    return adorned(machine)


def gicv2() -> ArmVm:
    """The same with a GICv2."""
    machine = Arm(2, gic=False, memory=True, host_gic=2)
    gic = machine.gic = machine.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V2)
    gic.set_attr(3, 0, 96)
    gic.set_attr(0, arm.KVM_VGIC_V2_ADDR_TYPE_DIST, 0x0800_0000)
    gic.set_attr(0, arm.KVM_VGIC_V2_ADDR_TYPE_CPU, 0x0801_0000)
    gic.set_attr(4, 0)
    gic.set_attr(DIST, 0x8, 0x4B00_243B)
    for cpu in range(2):
        for offset, value in (
            (0x0, 1),
            (0x80, 0xF0F0_0F0F),
            (0x408, 0x6050_4030),
            (0x100, 1 << 27),
            (0x300, 1 << 20 | 1 << 3),
            (0x200, 1 << 21),
            (0xF20, 0x0102 << 8 * cpu),  # SGIs from both vCPUs
            (0x84, 0xFFFF_FF0F),
            (0xC08, 0xAAAA_0000),
            (0x424, 0x5040_3020),
            (0x828, 0x0201_0201),
            (0x104, 0xF0),
            (0x304, 1 << 9),
            (0x204, 1 << 10),
        ):
            gic.set_attr(DIST, cpu << 32 | offset, value)
        for offset, value in ((0x0, 0x201), (0x4, 0x14 + cpu), (0x8, 3), (0x1C, 5), (0xD0, 1 << 6 | cpu)):
            gic.set_attr(CPU_REGS, cpu << 32 | offset, value)
    machine.vm.irq_line(1 << 24 | 36, 1)
    vm = adorned(machine)
    vm.gic_version = 2
    vm.lines = [36]
    return vm


def adorned(machine: Arm) -> ArmVm:
    """What the VMM of that machine knows, once vCPUs have state, and there are routes and irqfds."""
    for number, vcpu in enumerate(machine.vcpus):
        vcpu.set_reg(X0, 0x1234 + number)
        vcpu.set_reg(TPIDR, 0x99)
        vcpu.set_reg(arm.KVM_REG_ARM_TIMER_CVAL, 5_000)
        vcpu.set_reg(arm.KVM_REG_ARM_TIMER_CTL, 1)
        vcpu.set_attr(arm.KVM_ARM_VCPU_PVTIME_CTRL, arm.KVM_ARM_VCPU_PVTIME_IPA, RAM + 0xF0_0000 + 64 * number)
    machine.vcpus[0].set_attr(arm.KVM_ARM_VCPU_TIMER_CTRL, arm.KVM_ARM_VCPU_TIMER_IRQ_VTIMER, 25)
    machine.vcpus[0].set_reg(arm.KVM_REG_ARM_TIMER_CNT, 1_000_000)
    machine.vcpus[1].mp_state = uapi.KVM_MP_STATE_STOPPED
    machine.vcpus[1].ioctl(requests.KVM_SET_VCPU_EVENTS, arm.KvmVcpuEvents(serror_pending=1))
    machine.user.write(machine.ram + 0xE0_0000, b"guest data")
    vm = known(machine)
    vm.routes = [pin_route(7, 9), msi_route(8, DOORBELL, 0, 8)]
    machine.vm.set_routes(vm.routes)
    for gsi, resampled in ((7, True), (8, False)):
        event = machine.kvm.eventfd()
        resample = machine.kvm.eventfd() if resampled else None
        machine.vm.irqfd(event, gsi, resamplefd=resample)
        vm.irqfds.append(Irqfd(gsi, event, resample))
    return vm


def known(machine: Arm) -> ArmVm:
    """What the VMM of that machine knows."""
    return ArmVm(
        machine.host,
        machine.vm,
        list(machine.vcpus),
        getattr(machine, "gic", None),
        [machine.its] if hasattr(machine, "its") else [],
        vcpu_ids=list(range(len(machine.vcpus))),
        inits=[arm.KvmVcpuInit(arm.KVM_ARM_TARGET_GENERIC_V8, (0,) * 7)] * len(machine.vcpus),
        slots=[uapi.KvmUserspaceMemoryRegion(0, 0, RAM, RAM_SIZE, machine.ram)],
    )


def no_gic() -> ArmVm:
    """A GIC in the VMM."""
    machine = Arm(2, gic=False, memory=True)
    machine.vcpus[1].mp_state = uapi.KVM_MP_STATE_STOPPED
    machine.vcpus[0].set_reg(X0, 7)
    return known(machine)


MACHINES = {3: gicv3, 2: gicv2, 0: no_gic}


def host_of(version: int) -> ArmVm:
    """Where a machine with that GIC can be restored."""
    return blank(host_gic=2) if version == 2 else blank()


# With guests.


def machine(*programs: Program, its: bool = False) -> ArmVm:
    """A machine with a GICv3 and a vCPU for each program; SPIs 32 to 47 are edges and reach vCPU 0."""
    made = Arm(len(programs), memory=True)
    made.set_gicd(0xC08, 0xAAAA_AAAA)
    made.set_gicd(0xC0C, 0)
    made.forward()
    if its:
        made.add_its()
    for vcpu, program in zip(made.vcpus, programs, strict=True):
        vcpu.load(program)
    return known(made)


def statement(vm: ArmVm) -> LedgerStatement:
    """The ledger of a VM."""
    found: LedgerStatement = vm.host.kvm.vm(vm.fd.fd).ledger.statement()
    return found


def drive(vm: ArmVm, spi: int, *levels: int) -> None:
    """KVM_IRQ_LINE; an edge by default."""
    for level in levels or (1, 0):
        vm.fd.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI << arm.KVM_ARM_IRQ_TYPE_SHIFT | spi, level)


async def stop_at(at_ns: int, *vcpus: Any) -> None:
    """Run vCPUs until then."""
    with trio.move_on_at(at_ns / 1e9):
        async with trio.open_nursery() as nursery:
            for vcpu in vcpus:
                nursery.start_soon(vcpu.run)


async def idle(cpu: Any) -> None:
    """Nothing, for long."""
    await cpu.compute(1_000_000)


def taker(log: list[object], ns: int = 10) -> Program:
    """A guest that takes what comes, and notes it."""

    async def handler(cpu: Any) -> None:
        intid = cpu.iar1()
        log.append((fabric.now(), intid))
        await cpu.compute(ns)
        cpu.eoir1(intid)

    async def program(cpu: Any) -> None:
        cpu.set_vector(handler)
        cpu.unmask()
        await cpu.compute(1_000)
        await cpu.system_off()

    return program
