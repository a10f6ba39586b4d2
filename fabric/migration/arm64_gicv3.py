"""Saving and restoring a GICv3 and its ITSs: which registers, in which order, and why.

Specification: arm-vgic-v3 and arm-vgic-its, sequences ``vgic-v3.seq.*`` and ``its.seq.*`` of the interface inventory.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from fabric.kvm.typed import Device
from fabric.migration.arm64_state import ArmState, Gicv3CpuState, Gicv3State, ItsState
from fabric.uapi import arm64 as arm
from fabric.uapi import kvm as uapi

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fabric.migration.arm64_state import Registers
    from fabric.migration.arm64_vm import ArmVm

ADDR, CTRL = arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_DEV_ARM_VGIC_GRP_CTRL
DIST, REDIST, SYSREGS, LINES, ITS_REGS = (
    arm.KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
    arm.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
    arm.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
    arm.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
    arm.KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
)
ALL: Final = 0xFFFF_FFFF

GICD_CTLR, GICD_IIDR, GICD_IROUTER = 0x0, 0x8, 0x6000
GICR_CTLR, GICR_PROPBASER, GICR_PENDBASER, GICR_SGI_BASE = 0x0, 0x70, 0x78, 0x1_0000
IGROUPR, ISENABLER, ICENABLER, ISPENDR, ISACTIVER, ICACTIVER, IPRIORITYR, ICFGR = (
    0x080,
    0x100,
    0x180,
    0x200,
    0x300,
    0x380,
    0x400,
    0xC00,
)
CLEARS: Final = {ISENABLER: ICENABLER, ISACTIVER: ICACTIVER}
"""Registers that only set bits, and those that clear them. (ISPENDR does both for userspace.)"""
GITS_CTLR, GITS_IIDR, GITS_CBASER, GITS_CWRITER, GITS_CREADR, GITS_BASER = 0x0, 0x4, 0x80, 0x88, 0x90, 0x100


def interrupt_registers(first: int, end: int, *, configurable: bool = True) -> list[int]:
    """Offsets of the registers of interrupts ``first`` to ``end`` that are in both frames, as they are restored.

    What an interrupt is (group, trigger, priority) comes before its state, as when a guest sets it up.
    """
    bits = {
        IGROUPR: 1,
        **({ICFGR: 2} if configurable else {}),
        IPRIORITYR: 8,
        ISENABLER: 1,
        ISACTIVER: 1,
        ISPENDR: 1,
    }
    return [at + word for at, n in bits.items() for word in range(first * n // 8, end * n // 8, 4)]


def distributor_registers(nr_irqs: int) -> list[int]:
    """Offsets in the distributor, as they are restored: forwarding first, or what is pending would not be queued."""
    spis = arm.VGIC_NR_PRIVATE_IRQS
    routes = range(GICD_IROUTER + 8 * spis, GICD_IROUTER + 8 * nr_irqs, 4)
    return [GICD_CTLR, *routes, *interrupt_registers(spis, nr_irqs)]


REDISTRIBUTOR_BASES: Final = (GICR_PROPBASER, GICR_PROPBASER + 4, GICR_PENDBASER, GICR_PENDBASER + 4)
REDISTRIBUTOR_REGISTERS: Final = (
    GICR_CTLR,
    *(GICR_SGI_BASE + at for at in interrupt_registers(0, arm.VGIC_NR_PRIVATE_IRQS, configurable=False)),
)
"""The trigger of SGIs and PPIs is fixed."""


def _icc(crn: int, crm: int, op2: int) -> int:
    return arm.VgicV3SysregAttr(op0=3, op1=0, crn=crn, crm=crm, op2=op2).pack()


ICC_CTLR: Final = _icc(12, 12, 4)
CPU_INTERFACE: Final = (
    _icc(12, 12, 5),  # ICC_SRE_EL1
    ICC_CTLR,
    _icc(4, 6, 0),  # ICC_PMR_EL1
    _icc(12, 8, 3),  # ICC_BPR0_EL1
    _icc(12, 12, 3),  # ICC_BPR1_EL1
    _icc(12, 12, 6),  # ICC_IGRPEN0_EL1
    _icc(12, 12, 7),  # ICC_IGRPEN1_EL1
)


def active_priorities(icc_ctlr: int) -> list[int]:
    """ICC_AP0R<n>_EL1 and ICC_AP1R<n>_EL1: as many as there are priorities for, by ICC_CTLR_EL1.PRIbits."""
    count = max(1, 1 << (icc_ctlr >> 8 & 7) + 1 - 5)
    return [_icc(12, 8, 4 + n) for n in range(count)] + [_icc(12, 9, n) for n in range(count)]


ITS_REGISTERS: Final = (GITS_CBASER, *(GITS_BASER + 8 * n for n in range(8)), GITS_CREADR, GITS_CWRITER, GITS_IIDR)
"""All but GITS_CTLR, as they are restored: writing GITS_CBASER zeroes the two indices."""


def affinity(vm: ArmVm, index: int) -> int:
    """Aff3.Aff2.Aff1.Aff0 of a vCPU, a byte each, as in attribute numbers."""
    mpidr = vm.vcpus[index].get_reg(arm.KVM_REG_ARM_MPIDR_EL1)
    return (mpidr >> 32 & 0xFF) << 24 | mpidr & 0xFF_FFFF


# -- saving ---------------------------------------------------------------------------------------------------


def save_pending_tables(vm: ArmVm, _found: dict[str, Any]) -> None:
    """Pending bits of LPIs go to guest memory."""
    vm.controller.set_attr(CTRL, arm.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)


def save_its_tables(vm: ArmVm, _found: dict[str, Any]) -> None:
    """The maps of every ITS go to guest memory."""
    for its in vm.its:
        its.set_attr(CTRL, arm.KVM_DEV_ARM_ITS_SAVE_TABLES)


def save_gic(vm: ArmVm, found: dict[str, Any]) -> None:
    """Addresses, registers and line levels: ISPENDR has the latch, LEVEL_INFO the lines, together the full state."""
    gic = vm.controller
    nr_irqs = gic.get_attr(arm.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, 4)
    where = [affinity(vm, index) for index in range(len(vm.vcpus))]
    found["gic"] = Gicv3State(
        nr_irqs,
        gic.get_attr(ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_DIST),
        tuple(_regions(gic)),
        gic.get_attr(DIST, GICD_IIDR, 4),
        _read(gic, DIST, 0, distributor_registers(nr_irqs)),
        tuple(gic.get_attr(LINES, where[0] << 32 | first, 4) for first in range(32, nr_irqs, 32)),
        tuple(_save_cpu(gic, aff) for aff in where),
    )


def _regions(gic: Device) -> Iterable[int]:
    index = 0
    while True:
        try:
            yield gic.get_attr(ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, value=index)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return
        index += 1


def _save_cpu(gic: Device, aff: int) -> Gicv3CpuState:
    interface = _read(gic, SYSREGS, aff, CPU_INTERFACE, 8)
    return Gicv3CpuState(
        aff,
        _read(gic, REDIST, aff, REDISTRIBUTOR_BASES),
        _read(gic, REDIST, aff, REDISTRIBUTOR_REGISTERS),
        interface + _read(gic, SYSREGS, aff, active_priorities(dict(interface)[ICC_CTLR]), 8),
        gic.get_attr(LINES, aff << 32, 4),
    )


def save_its(vm: ArmVm, found: dict[str, Any]) -> None:
    """Address and registers of every ITS."""
    found["its"] = tuple(
        ItsState(
            its.get_attr(ADDR, arm.KVM_VGIC_ITS_ADDR_TYPE), _read(its, ITS_REGS, 0, (*ITS_REGISTERS, GITS_CTLR), 8)
        )
        for its in vm.its
    )


def _read(device: Device, group: int, aff: int, registers: Iterable[int], size: int = 4) -> Registers:
    return tuple((number, device.get_attr(group, aff << 32 | number, size)) for number in registers)


# -- restoring ------------------------------------------------------------------------------------------------


def _gic(state: ArmState) -> Gicv3State:
    assert isinstance(state.gic, Gicv3State)
    return state.gic


def create_gic(vm: ArmVm, _state: ArmState) -> None:
    """The GICv3."""
    vm.gic = vm.fd.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V3)


def create_its(vm: ArmVm, state: ArmState) -> None:
    """The ITSs: without one, GICR_CTLR.EnableLPIs cannot be set."""
    vm.its = [vm.fd.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_ITS) for _ in state.its]


def set_nr_irqs(vm: ArmVm, state: ArmState) -> None:
    """How many interrupts."""
    vm.controller.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, _gic(state).nr_irqs)


def place_frames(vm: ArmVm, state: ArmState) -> None:
    """Distributor, and redistributors by the attribute that had placed them."""
    saved = _gic(state)
    vm.controller.set_attr(ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_DIST, saved.distributor)
    for region in saved.redistributors:
        if arm.VgicV3RedistRegion.unpack(region).count:
            vm.controller.set_attr(ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, region)
        else:
            vm.controller.set_attr(ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_REDIST, region)


def initialize(vm: ArmVm, _state: ArmState) -> None:
    """Initialise, now that all vCPUs exist."""
    vm.controller.set_attr(CTRL, arm.KVM_DEV_ARM_VGIC_CTRL_INIT)


def restore_iidr(vm: ArmVm, state: ArmState) -> None:
    """GICD_IIDR, which says how the other registers are to be taken."""
    vm.controller.set_attr(DIST, GICD_IIDR, _gic(state).iidr)


def restore_distributor(vm: ArmVm, state: ArmState) -> None:
    """The distributor."""
    _write(vm.controller, DIST, 0, _gic(state).registers)


def restore_bases(vm: ArmVm, state: ArmState) -> None:
    """Where the LPI tables are, which cannot be written any more when LPIs are enabled."""
    for cpu in _gic(state).cpus:
        _write(vm.controller, REDIST, cpu.affinity, cpu.bases)


def restore_redistributors(vm: ArmVm, state: ArmState) -> None:
    """The rest of every redistributor."""
    for cpu in _gic(state).cpus:
        _write(vm.controller, REDIST, cpu.affinity, cpu.registers, GICR_SGI_BASE)


def restore_interfaces(vm: ArmVm, state: ArmState) -> None:
    """The CPU interfaces, active priorities last."""
    for cpu in _gic(state).cpus:
        _write(vm.controller, SYSREGS, cpu.affinity, cpu.sysregs)


def restore_lines(vm: ArmVm, state: ArmState) -> None:
    """The levels of all lines."""
    saved = _gic(state)
    for cpu in saved.cpus:
        vm.controller.set_attr(LINES, cpu.affinity << 32, cpu.lines)
    for word, levels in enumerate(saved.lines, start=1):
        vm.controller.set_attr(LINES, saved.cpus[0].affinity << 32 | 32 * word, levels)


def place_its(vm: ArmVm, state: ArmState) -> None:
    """Where the ITSs are."""
    for its, saved in zip(vm.its, state.its, strict=True):
        its.set_attr(ADDR, arm.KVM_VGIC_ITS_ADDR_TYPE, saved.base)


def restore_its_queue(vm: ArmVm, state: ArmState) -> None:
    """GITS_CBASER."""
    for its, saved in zip(vm.its, state.its, strict=True):
        _write(its, ITS_REGS, 0, [row for row in saved.registers if row[0] == GITS_CBASER])


def restore_its_registers(vm: ArmVm, state: ArmState) -> None:
    """All other registers of the ITSs, but GITS_CTLR."""
    for its, saved in zip(vm.its, state.its, strict=True):
        _write(its, ITS_REGS, 0, [row for row in saved.registers if row[0] not in (GITS_CBASER, GITS_CTLR)])


def restore_its_tables(vm: ArmVm, _state: ArmState) -> None:
    """The maps, and with each LPI its pending bit, which is cleared in guest memory."""
    for its in vm.its:
        its.set_attr(CTRL, arm.KVM_DEV_ARM_ITS_RESTORE_TABLES)


def enable_its(vm: ArmVm, state: ArmState) -> None:
    """GITS_CTLR, when all it works from is there."""
    for its, saved in zip(vm.its, state.its, strict=True):
        _write(its, ITS_REGS, 0, [row for row in saved.registers if row[0] == GITS_CTLR])


def _write(device: Device, group: int, aff: int, registers: Iterable[tuple[int, int]], frame: int = 0) -> None:
    """Write registers in their order; before one that only sets bits the one that clears them (those of ``frame``)."""
    for number, value in registers:
        if group in (DIST, REDIST) and (clear := CLEARS.get((number - frame) & ~0x7F)):
            device.set_attr(group, aff << 32 | frame + clear + (number & 0x7F), ALL)
        device.set_attr(group, aff << 32 | number, value)
