"""Saving and restoring a GICv2: which registers, in which order, and why.

A GICv2 does not tell the levels of its lines: what ISPENDR reads has them in it, and becomes the latch of a restored
machine. So the VMM has to drive its lines again (:attr:`~fabric.migration.arm64_vm.ArmVm.lines`); the timers do it by
themselves.

Specification: arm-vgic, sequence ``vgic-v2.seq.restore`` of the interface inventory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fabric.migration.arm64_gicv3 import (
    ADDR,
    ALL,
    CTRL,
    DIST,
    GICD_CTLR,
    GICD_IIDR,
    ISACTIVER,
    ISENABLER,
    ISPENDR,
    interrupt_registers,
)
from fabric.migration.arm64_state import ArmState, Gicv2State
from fabric.uapi import arm64 as arm
from fabric.uapi import kvm as uapi

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fabric.migration.arm64_state import Registers
    from fabric.migration.arm64_vm import ArmVm

CPU = arm.KVM_DEV_ARM_VGIC_GRP_CPU_REGS
GICD_ITARGETSR, GICD_CPENDSGIR, GICD_SPENDSGIR = 0x800, 0xF10, 0xF20
SPIS: Final = arm.VGIC_NR_PRIVATE_IRQS
CLEAR: Final = 0x80
"""From a register that sets bits to the one that clears them."""
BANKED: Final = (
    *interrupt_registers(0, SPIS, configurable=False),
    *range(GICD_SPENDSGIR, GICD_SPENDSGIR + arm.VGIC_NR_SGIS, 4),
)
"""What every vCPU has of its own, as it is restored. SGIs by sender come last: GICD_ISPENDR takes each for the vCPU's
own, and is corrected."""
INTERFACE: Final = (0x00, 0x04, 0x08, 0x1C, 0xD0, 0xD4, 0xD8, 0xDC)
"""GICC_CTLR, _PMR, _BPR, _ABPR, _APR0 to _APR3."""


def shared_registers(nr_irqs: int) -> list[int]:
    """Offsets of the registers that all vCPUs share, as they are restored: see those of a GICv3."""
    return [GICD_CTLR, *range(GICD_ITARGETSR + SPIS, GICD_ITARGETSR + nr_irqs, 4), *interrupt_registers(SPIS, nr_irqs)]


def save_gic(vm: ArmVm, found: dict[str, Any]) -> None:
    """Addresses and registers."""
    gic = vm.controller
    nr_irqs = gic.get_attr(arm.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, 4)

    def read(group: int, vcpu_id: int, offsets: Iterable[int]) -> Registers:
        return tuple((offset, gic.get_attr(group, vcpu_id << 32 | offset, 4)) for offset in offsets)

    first = vm.vcpu_ids[0]
    found["gic"] = Gicv2State(
        nr_irqs,
        gic.get_attr(ADDR, arm.KVM_VGIC_V2_ADDR_TYPE_DIST),
        gic.get_attr(ADDR, arm.KVM_VGIC_V2_ADDR_TYPE_CPU),
        gic.get_attr(DIST, first << 32 | GICD_IIDR, 4),
        read(DIST, first, shared_registers(nr_irqs)),
        tuple(read(DIST, vcpu_id, BANKED) for vcpu_id in vm.vcpu_ids),
        tuple(read(CPU, vcpu_id, INTERFACE) for vcpu_id in vm.vcpu_ids),
    )


def _gic(state: ArmState) -> Gicv2State:
    assert isinstance(state.gic, Gicv2State)
    return state.gic


def create_gic(vm: ArmVm, _state: ArmState) -> None:
    """The GICv2."""
    vm.gic = vm.fd.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V2)
    vm.gic_version = 2


def place_frames(vm: ArmVm, state: ArmState) -> None:
    """Distributor and CPU interface."""
    vm.controller.set_attr(ADDR, arm.KVM_VGIC_V2_ADDR_TYPE_DIST, _gic(state).distributor)
    vm.controller.set_attr(ADDR, arm.KVM_VGIC_V2_ADDR_TYPE_CPU, _gic(state).cpu_interface)


def set_nr_irqs(vm: ArmVm, state: ArmState) -> None:
    """How many interrupts."""
    vm.controller.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, _gic(state).nr_irqs)


def initialize(vm: ArmVm, _state: ArmState) -> None:
    """Initialise."""
    vm.controller.set_attr(CTRL, arm.KVM_DEV_ARM_VGIC_CTRL_INIT)


def restore_iidr(vm: ArmVm, state: ArmState) -> None:
    """GICD_IIDR: before it is written, the groups of interrupts cannot be."""
    vm.controller.set_attr(DIST, state.vcpus[0].vcpu_id << 32 | GICD_IIDR, _gic(state).iidr)


def restore_distributor(vm: ArmVm, state: ArmState) -> None:
    """The distributor, what is banked on behalf of each vCPU."""
    saved = _gic(state)
    _write(vm, state.vcpus[0].vcpu_id, saved.registers)
    for vcpu, registers in zip(state.vcpus, saved.banked, strict=True):
        _write(vm, vcpu.vcpu_id, registers)


def _write(vm: ArmVm, vcpu_id: int, registers: Registers) -> None:
    for offset, value in registers:
        clear = None
        if offset & ~0x7F in (ISENABLER, ISPENDR, ISACTIVER):
            clear = offset + CLEAR
        elif offset >= GICD_SPENDSGIR:
            clear = offset - GICD_SPENDSGIR + GICD_CPENDSGIR
        if clear is not None:
            vm.controller.set_attr(DIST, vcpu_id << 32 | clear, ALL)
        vm.controller.set_attr(DIST, vcpu_id << 32 | offset, value)


def restore_interfaces(vm: ArmVm, state: ArmState) -> None:
    """The CPU interfaces."""
    for vcpu, registers in zip(state.vcpus, _gic(state).interfaces, strict=True):
        for offset, value in registers:
            vm.controller.set_attr(CPU, vcpu.vcpu_id << 32 | offset, value)


def drive_lines(vm: ArmVm, state: ArmState) -> None:
    """The lines that the VMM holds up."""
    for intid in state.lines:
        vm.fd.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI << arm.KVM_ARM_IRQ_TYPE_SHIFT | intid, 1)
    vm.lines = list(state.lines)
