"""The board ``x86-apic``: local APICs, IOAPIC, 8259 pair and 8254 in the kernel.

A wire is a GSI: GSI n is input n of the IOAPIC and, below 16, of the 8259 pair as well.
"""

from __future__ import annotations

from fabric.uapi import ioctl
from fabric.uapi.kvm import (
    KVM_IRQ_ROUTING_IRQCHIP,
    KvmIrqLevel,
    KvmIrqRoutingEntry,
    KvmIrqRoutingIrqchip,
)
from fabric.uapi.x86 import (
    KVM_IOAPIC_NUM_PINS,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KvmPitConfig,
)
from fabric.vmm.x86 import X86Machine


def _pin(gsi: int, irqchip: int, pin: int) -> bytes:
    route = KvmIrqRoutingIrqchip(irqchip=irqchip, pin=pin)
    return KvmIrqRoutingEntry(gsi=gsi, type=KVM_IRQ_ROUTING_IRQCHIP, u=route.pack().ljust(32, b"\0")).pack()


PIN_ROUTES = b"".join(
    [
        *(_pin(gsi, KVM_IRQCHIP_IOAPIC, gsi) for gsi in range(KVM_IOAPIC_NUM_PINS)),
        *(_pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi) for gsi in range(8)),
        *(_pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8) for gsi in range(8, 16)),
    ]
)
"""The routes that KVM_CREATE_IRQCHIP installs: a table of one's own has to have them, too."""


class X86Apic(X86Machine):
    """Local APICs, IOAPIC, PIC and PIT in the kernel, x2APIC, TSC deadline timers; MSIs name CPU and vector."""

    name = "x86-apic"
    has_pic = True

    def prepare(self) -> None:
        """The irqchip and the PIT: both come before the vCPUs."""
        self.kvm.ioctl(self.vm_fd, ioctl.KVM_CREATE_IRQCHIP)
        self.kvm.ioctl(self.vm_fd, ioctl.KVM_CREATE_PIT2, bytearray(KvmPitConfig().pack()))
        self.use_long_ids()

    def own_routes(self) -> bytes:
        """The inputs of IOAPIC and PIC."""
        return PIN_ROUTES

    def set_line(self, gsi: int, level: bool) -> None:
        """Drive a wire (KVM_IRQ_LINE)."""
        self.kvm.ioctl(self.vm_fd, ioctl.KVM_IRQ_LINE, bytearray(KvmIrqLevel(irq=gsi, level=int(level)).pack()))
