"""The board ``arm64-gicv2``: GICv2 with a GICv2m frame, virtual timers, PSCI; the host has a GICv2, too.

Memory map (guest physical)::

    0x0800_0000   GICD      4 KiB
    0x0801_0000   GICC      8 KiB
    0x0802_0000   GICv2m    4 KiB
    0x2000_0000   devices   64 KiB each
    0x4000_0000   RAM       the guest's rings are at its end

KVM knows no GICv2m frame: it is the VMM's, as in QEMU. What a device writes to it never leaves the VMM: its vector
becomes an irqfd on the input of the SPI that the message names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric.guest.gicv2 import MSI_SETSPI_NS, MSI_TYPER, Gicv2Driver, Gicv2Layout
from fabric.uapi import ioctl
from fabric.uapi.arm64 import (
    KVM_ARM_IRQ_TYPE_SHIFT,
    KVM_ARM_IRQ_TYPE_SPI,
    KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    KVM_VGIC_V2_ADDR_TYPE_CPU,
    KVM_VGIC_V2_ADDR_TYPE_DIST,
    VGIC_NR_PRIVATE_IRQS,
    VGIC_V2_MAX_CPUS,
)
from fabric.uapi.kvm import KVM_DEV_TYPE_ARM_VGIC_V2, KvmIrqLevel
from fabric.vmm.arm64 import Arm64Machine

if TYPE_CHECKING:
    from fabric.guest.driver import MsiMessage
    from fabric.vmm.machine import Registers

GICD_BASE = 0x0800_0000
GICC_BASE = 0x0801_0000
MSI_FRAME_BASE = 0x0802_0000
MSI_FRAME_SIZE = 0x1000

NR_IRQS = 992
"""As many as KVM gives a GICv2."""
FIRST_MSI_SPI = 64
"""The SPIs below are for wires."""


class Arm64Gicv2(Arm64Machine):
    """GICv2 with a GICv2m frame, generic timers, PSCI; MSIs are SPIs."""

    name = "arm64-gicv2"
    gic_version = 2
    max_vcpus = VGIC_V2_MAX_CPUS
    max_vectors = NR_IRQS - FIRST_MSI_SPI

    def __init__(self, vcpus: int, memory_bytes: int = 1 << 30, **options: Any) -> None:
        super().__init__(vcpus, memory_bytes, **{"host_gic": 2, **options})
        self.msi_frame = MsiFrame(self)

    def create_irqchip(self) -> None:
        """The GICv2 with its frames. It installs the routes, too: GSI n is the input of SPI n + 32."""
        self.gic_fd = self.create_device(KVM_DEV_TYPE_ARM_VGIC_V2)
        self.set_attr(self.gic_fd, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, NR_IRQS, 4)
        self.set_attr(self.gic_fd, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V2_ADDR_TYPE_DIST, GICD_BASE)
        self.set_attr(self.gic_fd, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V2_ADDR_TYPE_CPU, GICC_BASE)
        self.set_attr(self.gic_fd, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT)

    def device_fds(self) -> list[int]:
        """The GIC."""
        return [self.gic_fd]

    def driver(self) -> Gicv2Driver:
        """A GICv2 driver."""
        return Gicv2Driver(Gicv2Layout(GICD_BASE, GICC_BASE, MSI_FRAME_BASE), len(self.vcpu_fds))

    def registers(self, address: int) -> tuple[Registers | None, int]:
        """The GICv2m frame, or a device's."""
        offset = address - MSI_FRAME_BASE
        return (self.msi_frame, offset) if 0 <= offset < MSI_FRAME_SIZE else super().registers(address)

    def gsi_of(self, message: MsiMessage) -> int | None:
        """The input of the SPI that a message to the GICv2m frame names; None for any other message."""
        spi = self.msi_frame.spi(message.address - MSI_FRAME_BASE, message.data)
        return None if spi is None else spi - VGIC_NR_PRIVATE_IRQS

    @property
    def wire(self) -> Any:
        """Messages become lines before they come to KVM."""
        return self.vm.lines


class MsiFrame:
    """The GICv2m frame as the guest's CPUs see it: they read which SPIs are its, and may raise one, too."""

    def __init__(self, machine: Arm64Gicv2) -> None:
        self.machine = machine

    def spi(self, offset: int, value: int) -> int | None:
        """The SPI that a write raises, from a CPU or a device; None for a write without effect."""
        spi = value & 0x3FF
        return spi if offset == MSI_SETSPI_NS and FIRST_MSI_SPI <= spi < NR_IRQS else None

    def read(self, offset: int, size: int) -> int:
        """MSI_TYPER; all else reads as zero."""
        return FIRST_MSI_SPI << 16 | NR_IRQS - FIRST_MSI_SPI if offset == MSI_TYPER else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A pulse on the input of the SPI that is raised."""
        spi = self.spi(offset, value)
        if spi is None:
            return
        for level in (1, 0):
            request = KvmIrqLevel(irq=KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | spi, level=level)
            self.machine.kvm.ioctl(self.machine.vm_fd, ioctl.KVM_IRQ_LINE, bytearray(request.pack()))
