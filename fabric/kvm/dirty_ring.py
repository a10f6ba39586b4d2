"""Dirty rings: instead of a bitmap for each slot, each vCPU has a ring of the pages that it was the first to write.

The ring is shared with userspace, behind a vCPU's fd at page 64. KVM writes entries with the flag DIRTY; userspace
collects them and sets RESET; KVM_RESET_DIRTY_RINGS takes those back and watches their pages anew. A vCPU whose ring is
nearly full does not enter the guest: KVM_EXIT_DIRTY_RING_FULL.

What is written while no vCPU runs has no ring to go to, and is lost, as in the kernel.

Source: KVM API document, 8.29 (KVM_CAP_DIRTY_LOG_RING). A VM with rings has no bitmaps (api.get-dirty-log.ENXIO.ring).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fabric.errors import KvmError
from fabric.uapi.kvm import KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET, PAGE_SIZE, KvmDirtyGfn

if TYPE_CHECKING:
    from fabric.kvm.vm import Vm
    from fabric.vcpu import Vcpu

MAX_ENTRIES = 65536
MAX_SIZE = MAX_ENTRIES * KvmDirtyGfn.SIZE
"""What KVM_CHECK_EXTENSION says where there are rings: the largest, in bytes."""
RESERVED_ENTRIES = 64
"""So many are left when a ring counts as full, for what the vCPU still writes until it has left the guest."""
_ENTRY = KvmDirtyGfn.STRUCT


class DirtyRing:
    """The ring of one vCPU."""

    __slots__ = ("_collected", "_written", "area", "entries")

    def __init__(self, size: int) -> None:
        self.area = memoryview(bytearray(size))
        """What userspace maps."""
        self.entries = size // KvmDirtyGfn.SIZE
        self._written = 0
        self._collected = 0

    @property
    def full(self) -> bool:
        """Too full to run the guest."""
        return self._written - self._collected >= self.entries - RESERVED_ENTRIES

    def push(self, slot: int, page: int) -> None:
        """``page`` of ``slot`` was written."""
        at = self._written % self.entries * KvmDirtyGfn.SIZE
        _ENTRY.pack_into(self.area, at, KVM_DIRTY_GFN_F_DIRTY, slot, page)
        self._written += 1

    def pop(self) -> tuple[int, int] | None:
        """The oldest entry, slot and page, if userspace has collected it; its flags are cleared."""
        at = self._collected % self.entries * KvmDirtyGfn.SIZE
        flags, slot, page = _ENTRY.unpack_from(self.area, at)
        if not flags & KVM_DIRTY_GFN_F_RESET:
            return None
        _ENTRY.pack_into(self.area, at, 0, slot, page)
        self._collected += 1
        return slot, page


class DirtyRings:
    """The rings of a VM.

    Args:
        vm: which has no vCPU yet.
        size: of each ring in bytes.

    Raises:
        KvmError: EINVAL for a size that is no power of two or below a page, or with vCPUs; E2BIG.
    """

    __slots__ = ("_rings", "_vm", "size")

    def __init__(self, vm: Vm, size: int) -> None:
        if size & (size - 1) or size < max(PAGE_SIZE, RESERVED_ENTRIES * KvmDirtyGfn.SIZE):
            raise KvmError(errno.EINVAL, f"a dirty ring has a power of two of at least {PAGE_SIZE} bytes, not {size}")
        if size > MAX_SIZE:
            raise KvmError(errno.E2BIG, f"a dirty ring has at most {MAX_SIZE} bytes, not {size}")
        if vm.vcpus:
            raise KvmError(errno.EINVAL, "dirty rings come before the first vCPU")
        self.size = size
        self._vm = vm
        self._rings: dict[Vcpu, DirtyRing] = {}
        vm.memory.on_dirty = self._dirty

    def of(self, vcpu: Vcpu) -> DirtyRing:
        """The ring of a vCPU."""
        ring = self._rings.get(vcpu)
        if ring is None:
            ring = self._rings[vcpu] = DirtyRing(self.size)
        return ring

    def reset(self) -> int:
        """KVM_RESET_DIRTY_RINGS: take back what was collected; returns how many entries."""
        count = 0
        for ring in self._rings.values():
            while (entry := ring.pop()) is not None:
                self._vm.memory.watch(*entry)
                count += 1
        return count

    def _dirty(self, slot: int, page: int) -> None:
        for vcpu in self._vm.vcpus:
            if vcpu.on_cpu:
                ring = self.of(vcpu)
                ring.push(slot, page)
                if ring.full:
                    vcpu.interrupt()
                return
