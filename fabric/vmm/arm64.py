"""What the arm64 boards share: where RAM and devices lie, how a vCPU is made, and how the guest starts it (PSCI)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric.guest.driver import Pages
from fabric.uapi import ioctl
from fabric.uapi.arm64 import KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KvmVcpuInit
from fabric.uapi.kvm import KVM_MP_STATE_RUNNABLE, KvmMpState
from fabric.vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Sequence

BAR_BASE = 0x2000_0000
RAM_BASE = 0x4000_0000
RINGS_SIZE = 1 << 20

PSCI_CPU_ON = 0xC400_0003
PSCI_SUCCESS = 0


class Arm64Machine(Machine):
    """An arm64 board: at the end of RAM are the tables of its interrupt controller, before them the guest's rings."""

    arch = "aarch64"
    gic_version = 3
    gic_fd = -1
    its_fds: Sequence[int] = ()
    ram_base = RAM_BASE
    bar_base = BAR_BASE

    @classmethod
    def tables_size(cls, vcpus: int) -> int:
        """Bytes of RAM that the interrupt controller needs for ``vcpus`` vCPUs."""
        return 0

    @classmethod
    def least_memory(cls, vcpus: int) -> int:
        """Tables and rings."""
        return cls.tables_size(vcpus) + RINGS_SIZE

    @property
    def tables(self) -> int:
        """Guest physical address of the interrupt controller's tables."""
        return RAM_BASE + self.memory_bytes - self.tables_size(len(self.vcpu_fds))

    def guest_pages(self) -> Pages:
        """The megabyte before the tables."""
        return Pages(self.tables - RINGS_SIZE, RINGS_SIZE)

    def machine_type(self) -> int:
        """The width of the guest physical address space that the RAM needs; 0 means 40 bits."""
        bits = (RAM_BASE + self.memory_bytes - 1).bit_length()
        return 0 if bits <= 40 else bits

    def create_vcpu(self, fd: int, number: int) -> None:
        """All vCPUs but the first start powered off: the guest turns them on (PSCI)."""
        self.kvm.ioctl(fd, ioctl.KVM_ARM_VCPU_INIT, bytearray(self.vcpu_init(number).pack()))

    def vcpu_init(self, number: int) -> KvmVcpuInit:
        """Target and features of a vCPU."""
        init = bytearray(KvmVcpuInit.SIZE)
        self.kvm.ioctl(self.vm_fd, ioctl.KVM_ARM_PREFERRED_TARGET, init)
        target = KvmVcpuInit.unpack(init).target
        features = 1 << KVM_ARM_VCPU_PSCI_0_2 | (1 << KVM_ARM_VCPU_POWER_OFF if number else 0)
        return KvmVcpuInit(target=target, features=(features, *[0] * 6))

    def power_on(self) -> None:
        """Let all vCPUs run at once (KVM_SET_MP_STATE), for programs that do not boot one another."""
        for fd in self.vcpu_fds:
            self.kvm.ioctl(fd, ioctl.KVM_SET_MP_STATE, bytearray(KvmMpState(mp_state=KVM_MP_STATE_RUNNABLE).pack()))

    async def start_secondary(self, cpu: Any, number: int) -> None:
        """PSCI CPU_ON, with the affinity KVM gives a vCPU of that id."""
        mpidr = number & 0xF | (number >> 4 & 0xFF) << 8 | (number >> 12 & 0xFF) << 16
        result = await cpu.hvc(PSCI_CPU_ON, mpidr, RAM_BASE, 0)
        if result != PSCI_SUCCESS:
            raise RuntimeError(f"PSCI CPU_ON of CPU {number} failed: {result}")
