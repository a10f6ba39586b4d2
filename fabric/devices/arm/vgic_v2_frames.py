"""The frames of a GICv2 in the guest's address space: the distributor, and the CPU interface.

KVM emulates the distributor. The CPU interface is the hardware's, mapped into the guest: one address for all vCPUs,
each of which meets its own there, and no exit.

Specification: arm-vgic, group KVM_DEV_ARM_VGIC_GRP_ADDR. An overlap is found by the first KVM_RUN (Linux 6.1).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from fabric.devices.arm.vgic_frames import UNDEFINED, check_range, overlap
from fabric.devices.arm.vgic_v2_regs import GICC, GICD
from fabric.errors import KvmError
from fabric.memory import MmioHandler
from fabric.uapi.arm64 import (
    KVM_VGIC_V2_ADDR_TYPE_CPU,
    KVM_VGIC_V2_ADDR_TYPE_DIST,
    KVM_VGIC_V2_CPU_SIZE,
    KVM_VGIC_V2_DIST_SIZE,
)

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_v2 import VgicV2
    from fabric.devices.base import VcpuServices

ALIGNMENT = 0x1000
DIST, CPU = KVM_VGIC_V2_ADDR_TYPE_DIST, KVM_VGIC_V2_ADDR_TYPE_CPU
# The document has 4 KiB for the CPU interface, which ends before GICC_DIR.
FRAMES = {DIST: ("distributor", KVM_VGIC_V2_DIST_SIZE), CPU: ("CPU interface", KVM_VGIC_V2_CPU_SIZE)}
GICC_EOIR = 0x10


class DistributorFrame(MmioHandler):
    """The distributor on the VM's MMIO space."""

    def mmio_read(self, offset: int, size: int, vcpu: VcpuServices) -> int:
        return GICD.read(vcpu.cpu_interface, offset, size)

    def mmio_write(self, offset: int, size: int, value: int, vcpu: VcpuServices) -> None:
        GICD.write(vcpu.cpu_interface, offset, size, value)


class CpuInterfaceFrame(MmioHandler):
    """The CPU interface of whichever vCPU accesses it."""

    exits: ClassVar[bool] = False
    eoi_offset: ClassVar[int] = GICC_EOIR

    def mmio_read(self, offset: int, size: int, vcpu: VcpuServices) -> int:
        return GICC.read(vcpu.cpu_interface, offset, size)

    def mmio_write(self, offset: int, size: int, value: int, vcpu: VcpuServices) -> None:
        GICC.write(vcpu.cpu_interface, offset, size, value)


class Frames:
    """Where the frames of one GICv2 are; ``bases`` by KVM_VGIC_V2_ADDR_TYPE."""

    def __init__(self, vgic: VgicV2) -> None:
        self.vgic = vgic
        self.bases = dict.fromkeys(FRAMES, UNDEFINED)
        self.mapped = False
        """The frames answer, since the first KVM_RUN."""

    def place(self, kind: int, base: int) -> None:
        """Give a frame its address.

        Raises:
            KvmError: EEXIST when it has one, EINVAL when it is not aligned or wraps around, E2BIG when it leaves the
                guest's address space.
        """
        what, size = FRAMES[kind]
        if self.bases[kind] != UNDEFINED:
            raise KvmError(errno.EEXIST, f"the {what} is at {self.bases[kind]:#x} already")
        check_range(self.vgic.vm, what, base, size, ALIGNMENT)
        self.bases[kind] = base

    def check(self) -> None:
        """What the first KVM_RUN asks. KvmError: ENXIO when a frame has no address, EINVAL when they overlap."""
        for kind, (what, _) in FRAMES.items():
            if self.bases[kind] == UNDEFINED:
                raise KvmError(errno.ENXIO, f"the {what} has no address")
        if overlap(self.bases[DIST], KVM_VGIC_V2_DIST_SIZE, self.bases[CPU], KVM_VGIC_V2_CPU_SIZE):
            raise KvmError(
                errno.EINVAL, f"distributor at {self.bases[DIST]:#x} and CPU interface at {self.bases[CPU]:#x} overlap"
            )

    def map(self) -> None:
        """Have the frames answer."""
        mmio = self.vgic.vm.mmio
        mmio.add(self.bases[CPU], KVM_VGIC_V2_CPU_SIZE, CpuInterfaceFrame(), shadow=True)
        mmio.add(self.bases[DIST], KVM_VGIC_V2_DIST_SIZE, DistributorFrame(), shadow=True)
        self.mapped = True
