"""The board ``arm64-gicv3``: GICv3 with one ITS, virtual timers, PSCI.

Memory map (guest physical)::

    0x0800_0000   GICD      64 KiB
    0x0808_0000   GITS      128 KiB
    0x1000_0000   GICR      128 KiB a vCPU, up to 512
    0x2000_0000   devices   64 KiB each
    0x4000_0000   RAM       the guest's tables and rings are at its end
"""

from __future__ import annotations

from fabric.guest.gicv3 import Gicv3Driver, Gicv3Layout
from fabric.uapi.arm64 import (
    KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_VGIC_ITS_ADDR_TYPE,
    KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
)
from fabric.uapi.kvm import KVM_DEV_TYPE_ARM_VGIC_ITS, KVM_DEV_TYPE_ARM_VGIC_V3
from fabric.vmm.arm64 import Arm64Machine

GICD_BASE = 0x0800_0000
GITS_BASE = 0x0808_0000
GICR_BASE = 0x1000_0000


class Arm64Gicv3(Arm64Machine):
    """GICv3 with one ITS, generic timers, PSCI; MSIs are LPIs."""

    name = "arm64-gicv3"
    first_msi_gsi = 0
    max_vcpus = 512

    @classmethod
    def tables_size(cls, vcpus: int) -> int:
        """A pending table a CPU and the shared tables, in 64 KiB pages; ITTs and slack in the rest."""
        return (vcpus + 64) << 16

    def create_irqchip(self) -> None:
        """The GICv3 with its frames, and one ITS."""
        count = len(self.vcpu_fds)
        self.gic_fd = self.create_device(KVM_DEV_TYPE_ARM_VGIC_V3)
        self.its_fd = self.create_device(KVM_DEV_TYPE_ARM_VGIC_ITS)
        self.its_fds = [self.its_fd]
        address = KVM_DEV_ARM_VGIC_GRP_ADDR
        self.set_attr(self.gic_fd, address, KVM_VGIC_V3_ADDR_TYPE_DIST, GICD_BASE)
        self.set_attr(self.gic_fd, address, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, count << 52 | GICR_BASE)
        self.set_attr(self.its_fd, address, KVM_VGIC_ITS_ADDR_TYPE, GITS_BASE)
        self.set_attr(self.gic_fd, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT)
        self.set_attr(self.its_fd, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT)

    def device_fds(self) -> list[int]:
        """GIC and ITS."""
        return [self.its_fd, self.gic_fd]

    def driver(self) -> Gicv3Driver:
        """A GICv3 driver with its tables at the end of RAM."""
        count = len(self.vcpu_fds)
        layout = Gicv3Layout(GICD_BASE, GICR_BASE, GITS_BASE, self.tables, self.tables_size(count))
        return Gicv3Driver(layout, count)
