"""Where the frames of a GICv3 lie: the distributor, and the regions that redistributors are placed in.

Specification: arm-vgic-v3, group KVM_DEV_ARM_VGIC_GRP_ADDR.

What Linux 6.1 does beyond the text, and is kept: an overlap of the distributor with a redistributor region is found
when a redistributor is about to be placed, or else by the first KVM_RUN; a legacy region grows with the vCPUs,
and is measured by those there are at the moment of a check; a region with index 1 after a legacy one is accepted;
a region that is refused because of the vCPUs that were to be placed in it takes the frames of the vCPUs before them
off the bus; KVM_CREATE_VCPU with an id that is in use finds out too late, and the place taken for it stays taken.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import attrs

from fabric.devices.arm.vgic_frames import TOP, UNDEFINED, check_range, overlap
from fabric.devices.arm.vgic_v3_regs import GICD, GICD_SIZE, GICR, GICR_SIZE
from fabric.errors import KvmError
from fabric.memory import MmioHandler

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_cpuif import VgicV3Cpu
    from fabric.devices.arm.vgic_v3 import VgicV3
    from fabric.devices.base import VcpuServices

ALIGNMENT = 0x1_0000
REGION_COUNT_SHIFT = 52
REGION_BASE_MASK = 0x000F_FFFF_FFFF_0000
REGION_FLAGS_MASK = 0xF000
REGION_INDEX_MASK = 0xFF
"""The field is 12 bits wide; the kernel keeps the lower eight."""


class DistributorFrame(MmioHandler):
    """The distributor on the VM's MMIO space."""

    def __init__(self, vgic: VgicV3) -> None:
        self.vgic = vgic

    def mmio_read(self, offset: int, size: int, _vcpu: VcpuServices) -> int:
        return GICD.read(self.vgic, offset, size)

    def mmio_write(self, offset: int, size: int, value: int, _vcpu: VcpuServices) -> None:
        GICD.write(self.vgic, offset, size, value)


class RedistributorFrame(MmioHandler):
    """A vCPU's redistributor on the VM's MMIO space; any vCPU may access it."""

    def __init__(self, cpu: VgicV3Cpu) -> None:
        self.cpu = cpu

    def mmio_read(self, offset: int, size: int, _vcpu: VcpuServices) -> int:
        return GICR.read(self.cpu, offset, size)

    def mmio_write(self, offset: int, size: int, value: int, _vcpu: VcpuServices) -> None:
        GICR.write(self.cpu, offset, size, value)


@attrs.define(eq=False)
class Region:
    """Redistributors back to back from ``base``; ``count`` of them, 0 being as many as there are vCPUs."""

    index: int
    base: int
    count: int
    used: int = 0

    @property
    def full(self) -> bool:
        """No place is left."""
        return 0 < self.count <= self.used

    @property
    def value(self) -> int:
        """As KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION reports it."""
        return self.count << REGION_COUNT_SHIFT | self.base | self.index


class Frames:
    """The frames of one GICv3."""

    def __init__(self, vgic: VgicV3) -> None:
        self.vgic = vgic
        self.distributor = UNDEFINED
        self.regions: list[Region] = []
        self.mapped = False
        """The distributor answers, since the first KVM_RUN."""

    # -- attributes ------------------------------------------------------------------------------------------

    def place_distributor(self, base: int) -> None:
        """KVM_VGIC_V3_ADDR_TYPE_DIST."""
        if self.distributor != UNDEFINED:
            raise KvmError(errno.EEXIST, f"the distributor is at {self.distributor:#x} already")
        check_range(self.vgic.vm, "distributor", base, GICD_SIZE, ALIGNMENT)
        self.distributor = base

    def add_legacy_region(self, base: int) -> None:
        """KVM_VGIC_V3_ADDR_TYPE_REDIST: one run of redistributors for all vCPUs."""
        size = len(self.vgic.cpus) * GICR_SIZE
        if base + size >= TOP:
            raise KvmError(errno.EINVAL, f"redistributors from {base:#x} wrap around the end of memory")
        if self.regions:
            if self.regions[-1].count:
                raise KvmError(errno.EINVAL, "REDIST cannot be combined with REDIST_REGION, which was set before")
            raise KvmError(errno.EEXIST, f"the redistributors are at {self.regions[-1].base:#x} already")
        if self.distributor != UNDEFINED and overlap(base, size, self.distributor, GICD_SIZE):
            raise KvmError(errno.EINVAL, f"redistributors from {base:#x} overlap the distributor")
        self._add(Region(0, base, 0), size)

    def add_region(self, value: int) -> None:
        """KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION: the next region, of a fixed size."""
        count = value >> REGION_COUNT_SHIFT
        base = value & REGION_BASE_MASK
        index = value & REGION_INDEX_MASK
        size = count * GICR_SIZE
        if not count:
            raise KvmError(errno.EINVAL, "a redistributor region has at least one redistributor, not 0")
        if value & REGION_FLAGS_MASK:
            raise KvmError(errno.EINVAL, f"the flags of a redistributor region must be 0, in {value:#x}")
        if base + size >= TOP:
            raise KvmError(errno.EINVAL, f"redistributors from {base:#x} wrap around the end of memory")
        expected = self.regions[-1].index + 1 if self.regions else 0
        if index != expected:
            raise KvmError(errno.EINVAL, f"the next redistributor region has index {expected}, not {index}")
        for region in self.regions:
            if overlap(base, size, region.base, self._size(region)):
                raise KvmError(errno.EINVAL, f"region {index} at {base:#x} overlaps region {region.index}")
        self._add(Region(index, base, count), size)

    def region(self, index: int) -> Region:
        """The region with that index. KvmError(ENOENT)."""
        for region in self.regions:
            if region.index == index & REGION_INDEX_MASK:
                return region
        raise KvmError(errno.ENOENT, f"there is no redistributor region {index & REGION_INDEX_MASK}")

    def _add(self, region: Region, size: int) -> None:
        check_range(self.vgic.vm, "redistributor region", region.base, size, ALIGNMENT)
        self.regions.append(region)
        for cpu in self.vgic.cpus:
            if cpu.region is not None:
                continue
            try:
                self.check_placement()
                self.place(cpu)
            except (KvmError, MemoryError):
                for before in self.vgic.cpus[: cpu.index + 1]:
                    self._unmap_redistributor(before)
                    if before.region is region:
                        before.region = None
                self.regions.remove(region)
                raise

    # -- placing ---------------------------------------------------------------------------------------------

    def _free_region(self) -> Region | None:
        """The region with the next free place."""
        return next((region for region in self.regions if not region.full), None)

    def check_placement(self) -> None:
        """Whether another redistributor may be placed, if there is a place for one.

        Raises:
            KvmError: EINVAL when the frames overlap or leave the address space, ENOSPC when the bus is full.
        """
        if self._free_region() is not None:
            self._check_layout()
            self.vgic.vm.mmio.check_room()

    def place(self, cpu: VgicV3Cpu) -> None:
        """Give ``cpu`` the next free place, if there is one."""
        region = self._free_region()
        if region is not None:
            cpu.region = region
            cpu.slot = region.used
            region.used += 1
            self.map_redistributor(cpu)

    def use_up_place(self) -> None:
        """A vCPU that is not created after all has taken the next free place, if there is one."""
        region = self._free_region()
        if region is not None:
            region.used += 1

    def is_last(self, cpu: VgicV3Cpu) -> bool:
        """GICR_TYPER.Last: nothing follows ``cpu`` in its run of redistributors."""
        region = cpu.region
        if region is None or cpu.slot < region.used - 1:
            return False
        if region.count and cpu.slot == region.count - 1:
            end = region.base + region.count * GICR_SIZE
            return not any(other.base == end and other.used for other in self.regions)
        return True

    def first_run(self) -> None:
        """What the first KVM_RUN checks of the frames; then the distributor answers.

        Raises:
            KvmError: ENXIO when a frame has no place, EINVAL when they overlap or leave the address space.
        """
        for cpu in self.vgic.cpus:
            if cpu.region is None:
                raise KvmError(errno.ENXIO, f"vCPU {cpu.index} has no redistributor")
        if self.distributor == UNDEFINED:
            raise KvmError(errno.ENXIO, "the distributor has no address")
        self._check_layout()

    def map_distributor(self) -> None:
        """Have the distributor answer."""
        self.mapped = True
        self._map(self.distributor, GICD_SIZE, DistributorFrame(self.vgic))

    def map_redistributor(self, cpu: VgicV3Cpu) -> None:
        """Have the redistributor of ``cpu`` answer in its place."""
        assert cpu.region is not None
        frame = RedistributorFrame(cpu)
        self._map(cpu.region.base + cpu.slot * GICR_SIZE, GICR_SIZE, frame)
        cpu.frame = frame

    def _unmap_redistributor(self, cpu: VgicV3Cpu) -> None:
        if cpu.frame is not None:
            assert cpu.region is not None
            self.vgic.vm.mmio.remove(cpu.region.base + cpu.slot * GICR_SIZE, cpu.frame)
            cpu.frame = None

    def _map(self, base: int, size: int, frame: DistributorFrame | RedistributorFrame) -> None:
        # KVM's bus takes overlapping frames; the one registered first answers.
        self.vgic.vm.mmio.add(base, size, frame, shadow=True)

    # -- checks ----------------------------------------------------------------------------------------------

    def _size(self, region: Region) -> int:
        return (region.count or len(self.vgic.cpus)) * GICR_SIZE

    def _check_layout(self) -> None:
        """The frames lie apart and within the address space. KvmError(EINVAL)."""
        limit = 1 << self.vgic.vm.ipa_bits
        for region in self.regions:
            size = self._size(region)
            if region.base + size > limit:
                raise KvmError(errno.EINVAL, f"region {region.index} ends beyond {limit:#x}")
            if self.distributor != UNDEFINED and overlap(region.base, size, self.distributor, GICD_SIZE):
                raise KvmError(errno.EINVAL, f"region {region.index} overlaps the distributor")
