"""The interrupt lines of an arm64 vCPU whose interrupt controller is in the VMM.

Without an in-kernel GIC the VMM drives the CPU's IRQ and FIQ inputs with KVM_IRQ_LINE, and learns from
``kvm_run.s.regs.device_irq_level`` where the lines of the in-kernel timers and the PMU are: when one of them moves,
KVM_RUN ends with EINTR and KVM_EXIT_INTR.

Rules: api.irq-line.rule.arm-userspace and api.cap.arm-user-irq of the interface inventory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric.uapi.kvm import KVM_RUN_SYNC_REGS

if TYPE_CHECKING:
    from fabric.vcpu.vcpu import Vcpu

ISR_F = 1 << 6
ISR_I = 1 << 7


class CpuLines:
    """What goes into a CPU, in the place of the CPU interface of a GIC, and what comes out of it."""

    __slots__ = ("devices", "fiq", "line", "vcpu")

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.line = False
        """The IRQ input. FIQs are seen in ISR_EL1 only: programs take IRQs."""
        self.fiq = False
        self.devices = 0
        """The lines that are up, KVM_ARM_DEV_*."""

    def drive_irq(self, level: bool) -> None:
        """Move the IRQ input; a vCPU that waits for it wakes."""
        self.line = level
        if level:
            self.vcpu.kick()

    def isr(self) -> int:
        """ISR_EL1."""
        return self.line * ISR_I | self.fiq * ISR_F

    def device(self, which: int, level: bool) -> None:
        """A timer or the PMU moves its line, one of KVM_ARM_DEV_*."""
        self.devices = self.devices | which if level else self.devices & ~which
        self.check()

    def check(self) -> None:
        """Have KVM_RUN left when the VMM knows another state of the lines."""
        if self.devices != int.from_bytes(self._told(), "little"):
            self.vcpu.interrupt()

    def tell(self) -> None:
        """KVM_RUN ends: the VMM learns of the lines."""
        self._told()[:] = self.devices.to_bytes(8, "little")

    def _told(self) -> memoryview:
        return self.vcpu.run_view[KVM_RUN_SYNC_REGS : KVM_RUN_SYNC_REGS + 8]
