"""The board ``arm64-gicv3``: GICv3 with one ITS, virtual timers, PSCI.

Memory map (guest physical)::

    0x0800_0000   GICD      64 KiB
    0x0808_0000   GITS      128 KiB
    0x1000_0000   GICR      128 KiB a vCPU, up to 512
    0x2000_0000   devices   64 KiB each
    0x4000_0000   RAM       the guest's tables and rings are at its end
"""

from __future__ import annotations

from typing import Any

from fabric.guest.driver import Pages
from fabric.guest.gicv3 import Gicv3Driver, Gicv3Layout
from fabric.uapi import ioctl
from fabric.uapi.arm64 import (
    KVM_ARM_VCPU_POWER_OFF,
    KVM_ARM_VCPU_PSCI_0_2,
    KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_VGIC_ITS_ADDR_TYPE,
    KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
    KvmVcpuInit,
)
from fabric.uapi.kvm import KVM_DEV_TYPE_ARM_VGIC_ITS, KVM_DEV_TYPE_ARM_VGIC_V3, KVM_MP_STATE_RUNNABLE, KvmMpState
from fabric.vmm.machine import Machine

GICD_BASE = 0x0800_0000
GITS_BASE = 0x0808_0000
GICR_BASE = 0x1000_0000
BAR_BASE = 0x2000_0000
RAM_BASE = 0x4000_0000
RINGS_SIZE = 1 << 20

PSCI_CPU_ON = 0xC400_0003
PSCI_SUCCESS = 0


class Arm64Gicv3(Machine):
    """GICv3 with one ITS, generic timers, PSCI; MSIs are LPIs."""

    name = "arm64-gicv3"
    arch = "aarch64"
    ram_base = RAM_BASE
    bar_base = BAR_BASE
    first_msi_gsi = 0
    max_vcpus = 512

    @classmethod
    def least_memory(cls, vcpus: int) -> int:
        """Tables and rings."""
        return _tables_size(vcpus) + RINGS_SIZE

    def machine_type(self) -> int:
        """The width of the guest physical address space that the RAM needs; 0 means 40 bits."""
        bits = (RAM_BASE + self.memory_bytes - 1).bit_length()
        return 0 if bits <= 40 else bits

    def create_vcpu(self, fd: int, number: int) -> None:
        """All vCPUs but the first start powered off: the guest turns them on (PSCI)."""
        init = bytearray(KvmVcpuInit.SIZE)
        self.kvm.ioctl(self.vm_fd, ioctl.KVM_ARM_PREFERRED_TARGET, init)
        target = KvmVcpuInit.unpack(init).target
        features = 1 << KVM_ARM_VCPU_PSCI_0_2 | (1 << KVM_ARM_VCPU_POWER_OFF if number else 0)
        request = KvmVcpuInit(target=target, features=(features, *[0] * 6))
        self.kvm.ioctl(fd, ioctl.KVM_ARM_VCPU_INIT, bytearray(request.pack()))

    def create_irqchip(self) -> None:
        """The GICv3 with its frames, and one ITS."""
        count = len(self.vcpu_fds)
        self.gic_fd = self.create_device(KVM_DEV_TYPE_ARM_VGIC_V3)
        self.its_fd = self.create_device(KVM_DEV_TYPE_ARM_VGIC_ITS)
        address = KVM_DEV_ARM_VGIC_GRP_ADDR
        self.set_attr(self.gic_fd, address, KVM_VGIC_V3_ADDR_TYPE_DIST, GICD_BASE)
        self.set_attr(self.gic_fd, address, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, count << 52 | GICR_BASE)
        self.set_attr(self.its_fd, address, KVM_VGIC_ITS_ADDR_TYPE, GITS_BASE)
        self.set_attr(self.gic_fd, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT)
        self.set_attr(self.its_fd, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT)

    def power_on(self) -> None:
        """Let all vCPUs run at once (KVM_SET_MP_STATE), for programs that do not boot one another."""
        for fd in self.vcpu_fds:
            self.kvm.ioctl(fd, ioctl.KVM_SET_MP_STATE, bytearray(KvmMpState(mp_state=KVM_MP_STATE_RUNNABLE).pack()))

    def device_fds(self) -> list[int]:
        """GIC and ITS."""
        return [self.its_fd, self.gic_fd]

    def driver(self) -> Gicv3Driver:
        """A GICv3 driver with its tables at the end of RAM."""
        size = _tables_size(len(self.vcpu_fds))
        layout = Gicv3Layout(GICD_BASE, GICR_BASE, GITS_BASE, RAM_BASE + self.memory_bytes - size, size)
        return Gicv3Driver(layout, len(self.vcpu_fds))

    def guest_pages(self) -> Pages:
        """The megabyte before the tables."""
        return Pages(RAM_BASE + self.memory_bytes - _tables_size(len(self.vcpu_fds)) - RINGS_SIZE, RINGS_SIZE)

    async def start_secondary(self, cpu: Any, number: int) -> None:
        """PSCI CPU_ON, with the affinity KVM gives a vCPU of that id."""
        mpidr = number & 0xF | (number >> 4 & 0xFF) << 8 | (number >> 12 & 0xFF) << 16
        result = await cpu.hvc(PSCI_CPU_ON, mpidr, RAM_BASE, 0)
        if result != PSCI_SUCCESS:
            raise RuntimeError(f"PSCI CPU_ON of CPU {number} failed: {result}")


def _tables_size(vcpus: int) -> int:
    # A pending table a CPU and the shared tables, in 64 KiB pages; ITTs and slack in the rest.
    return (vcpus + 64) << 16
