"""Guest memory and address spaces.

* :class:`GuestMemory` is what KVM_SET_USER_MEMORY_REGION builds: slots of guest physical addresses, each
  backed by a range of a user memory. Every access goes straight to the user memory, nothing is cached, so
  what the VMM writes there is seen at once. A slot costs the same whatever its size, and with a
  :class:`~fabric.uapi.usermem.SparseMemory` behind it a guest costs the 4 KiB pages it has written to.
* :class:`AddressSpace` is a bus: MMIO or port ranges and who answers them.

Rules and errnos: KVM API document of Linux 6.1, KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG,
KVM_CLEAR_DIRTY_LOG and KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fabric.errors import KvmError
from fabric.uapi.kvm import (
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_MAX_NR_PAGES,
    KVM_MEM_READONLY,
    PAGE_SHIFT,
    PAGE_SIZE,
    KvmUserspaceMemoryRegion,
)
from fabric.uapi.usermem import SparseMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fabric.uapi.usermem import Bytes, UserMemory

_MASK64 = (1 << 64) - 1
_PAGE_MASK = PAGE_SIZE - 1


class DirtyLog:
    """Which pages of a slot were written, at the cost of those that are in the minority from the start."""

    __slots__ = ("_all", "_pages", "count")

    def __init__(self, count: int, *, all_dirty: bool = False) -> None:
        self.count = count
        """Pages of the slot."""
        self._all = all_dirty
        self._pages: set[int] = set()  # the dirty ones; with _all the clean ones

    def __contains__(self, page: int) -> bool:
        return (page in self._pages) != self._all

    def mark(self, first: int, last: int) -> None:
        """Pages ``first`` to ``last`` were written."""
        if self._all:
            self._pages.difference_update(range(first, last + 1))
        else:
            self._pages.update(range(first, last + 1))

    def clear(self, pages: Iterable[int] | None = None) -> None:
        """Forget these pages, or all."""
        if pages is None:
            self._all = False
            self._pages.clear()
        elif self._all:
            self._pages.update(pages)
        else:
            self._pages.difference_update(pages)

    def pages(self) -> list[int]:
        """Dirty page numbers, ascending."""
        if self._all:
            return [page for page in range(self.count) if page not in self._pages]
        return sorted(self._pages)

    def bitmap(self) -> bytes:
        """Bit n is page n, rounded up to 64 bits."""
        size = (self.count + 63) // 64 * 8
        bits = bytearray(((1 << self.count) - 1).to_bytes(size, "little") if self._all else size)
        for page in self._pages:
            bits[page >> 3] ^= 1 << (page & 7)
        return bytes(bits)


class MemSlot:
    """A range of guest memory. Addresses and sizes are multiples of 4 KiB."""

    __slots__ = ("base", "delta", "dirty", "end", "flags", "slot", "user_addr")

    def __init__(self, region: KvmUserspaceMemoryRegion, dirty: DirtyLog | None) -> None:
        self.slot = region.slot
        """Slot number in bits 15:0, address space in 31:16."""
        self.base = region.guest_phys_addr
        self.end = region.guest_phys_addr + region.memory_size
        self.user_addr = region.userspace_addr
        self.delta = region.userspace_addr - region.guest_phys_addr
        """What turns a guest physical address into a user address."""
        self.flags = region.flags
        self.dirty = dirty
        """The pages written since they were last cleared; ``None`` without a log."""

    @property
    def pages(self) -> int:
        """Size in pages."""
        return (self.end - self.base) >> PAGE_SHIFT


_NO_SLOT = MemSlot(KvmUserspaceMemoryRegion(), None)
_NO_SLOT.end = -1  # contains nothing, not even the empty range at 0


class GuestMemory:
    """Guest physical memory by slots.

    Reads and writes take any address and length, across pages and slots; where any byte is not backed they
    raise KvmError(EFAULT) and nothing has been written. Values are little-endian.

    Args:
        user: where userspace addresses point; by default a simulated user memory of its own.
        slots: how many slots an address space has (KVM_CAP_NR_MEMSLOTS).
        address_spaces: how many there are (KVM_CAP_MULTI_ADDRESS_SPACE). Accesses go to the first.
        readonly: whether KVM_MEM_READONLY is known (KVM_CAP_READONLY_MEM).
        gpa_bits: width of guest physical addresses.
        gpa_errno: the errno of a slot beyond that width: EFAULT on arm64, EINVAL on x86.
        user_bits: width of the addresses of a user process.
    """

    __slots__ = (
        "_last",
        "_slots",
        "_spaces",
        "_starts",
        "address_spaces",
        "gpa_bits",
        "gpa_errno",
        "log_options",
        "on_dirty",
        "readonly",
        "slots",
        "user",
        "user_bits",
    )

    def __init__(
        self,
        user: UserMemory | None = None,
        *,
        slots: int = 32767,
        address_spaces: int = 1,
        readonly: bool = True,
        gpa_bits: int = 52,
        gpa_errno: int = errno.EINVAL,
        user_bits: int = 48,
    ) -> None:
        self.user: UserMemory = SparseMemory() if user is None else user
        self.slots = slots
        self.address_spaces = address_spaces
        self.readonly = readonly
        self.gpa_bits = gpa_bits
        self.gpa_errno = gpa_errno
        self.user_bits = user_bits
        self.log_options = 0
        """KVM_DIRTY_LOG_* bits, as KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 was enabled with."""
        self.on_dirty: Callable[[int, int], None] | None = None
        """Told of slot and page when a clean page of a slot with a log is written."""
        self._slots: dict[int, MemSlot] = {}  # KVM's 32-bit slot value to the slot
        self._spaces: list[list[MemSlot]] = [[] for _ in range(address_spaces)]  # each sorted by base
        self._starts: list[int] = []  # the bases of address space 0
        self._last = _NO_SLOT  # the slot of the last access: most guests have one that matters

    # -- KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG

    def set_region(self, region: KvmUserspaceMemoryRegion) -> None:
        """Create, move, reflag or (size 0) delete a slot, as KVM_SET_USER_MEMORY_REGION does.

        Raises:
            KvmError: EINVAL, EEXIST, and ``gpa_errno``; nothing has changed then.
        """
        self._check_region(region)
        old = self._slots.get(region.slot)
        if not region.memory_size:
            if old is None:
                raise KvmError(errno.EINVAL, f"slot {region.slot:#x} does not exist, so it cannot be deleted")
            self._replace(old, None)
            return
        if old is not None:
            self._check_change(old, region)
        if old is None or old.base != region.guest_phys_addr:
            self._check_place(old, region)
        dirty = None
        if region.flags & KVM_MEM_LOG_DIRTY_PAGES:
            dirty = old.dirty if old is not None else None  # a log that is on stays as it is when the slot moves
            if dirty is None:
                initially_set = bool(self.log_options & KVM_DIRTY_LOG_INITIALLY_SET)
                dirty = DirtyLog(region.memory_size >> PAGE_SHIFT, all_dirty=initially_set)
        self._replace(old, MemSlot(region, dirty))

    def add_ram(self, gpa: int, size: int, *, flags: int = 0) -> int:
        """Back ``size`` bytes at ``gpa`` with zeros of the own simulated user memory; returns the slot."""
        if not isinstance(self.user, SparseMemory):
            raise TypeError("add_ram() must have a SparseMemory to take the pages from")
        number = next(n for n in range(self.slots) if n not in self._slots)
        self.set_region(KvmUserspaceMemoryRegion(number, flags, gpa, size, self.user.map(size)))
        return number

    def dirty_log(self, slot: int) -> bytes:
        """The dirty bitmap of a slot: bit n is page n, rounded up to 64 bits.

        Fetching clears the log unless KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE is among the options.

        Raises:
            KvmError: EINVAL for a slot number out of range, ENOENT without such a slot or without a log.
        """
        log = self._log(slot)
        bitmap = log.bitmap()
        if not self.log_options & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE:
            log.clear()
        return bitmap

    def dirty_pages(self, slot: int) -> list[int]:
        """As :meth:`dirty_log`, but the numbers of the dirty pages in ascending order."""
        log = self._log(slot)
        pages = log.pages()
        if not self.log_options & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE:
            log.clear()
        return pages

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, fetch: Callable[[int], bytes]) -> None:
        """Clear the pages whose bits are set in a bitmap that starts at ``first_page``: KVM_CLEAR_DIRTY_LOG.

        Args:
            fetch: gives that many bytes of the caller's bitmap; called when all else has been checked.

        Raises:
            KvmError: as :meth:`dirty_log`; EINVAL for pages the slot does not have, or when ``first_page`` or,
                short of the slot's end, ``num_pages`` is not a multiple of 64.
        """
        self._check_slot(slot)
        if first_page & 63:
            raise KvmError(errno.EINVAL, f"first_page {first_page} is not a multiple of 64")
        log = self._log(slot)
        left = log.count - first_page
        if left < 0 or num_pages > left or (num_pages < left and num_pages & 63):
            raise KvmError(
                errno.EINVAL, f"{num_pages} pages from {first_page} are not groups of 64 of the slot's {log.count}"
            )
        bitmap = fetch((num_pages + 63) // 64 * 8)
        log.clear(
            first_page + 8 * at + bit
            for at, byte in enumerate(bitmap)
            if byte
            for bit in range(8)
            # The last group may have bits beyond the pages asked for; they stand for nothing.
            if byte >> bit & 1 and 8 * at + bit < num_pages
        )

    def watch(self, slot: int, page: int) -> None:
        """A page counts as clean again; one that is not there, or not logged, is no matter."""
        found = self._slots.get(slot)
        if found is not None and found.dirty is not None:
            found.dirty.clear([page])

    # -- accesses by the guest and by devices

    def read(self, gpa: int, n: int) -> bytes:
        """``n`` bytes at ``gpa``. KvmError(EFAULT) where nothing backs them."""
        slot = self._last
        if slot.base <= gpa and gpa + n <= slot.end:
            return self.user.read(gpa + slot.delta, n)
        parts = [self.user.read(at + slot.delta, size) for slot, at, size in self._segments(gpa, n)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, gpa: int, data: Bytes) -> None:
        """Store ``data`` at ``gpa`` and log its pages. KvmError(EFAULT) where not backed, or read-only."""
        slot = self._last
        if not slot.flags and slot.base <= gpa and gpa + len(data) <= slot.end:
            self.user.write(gpa + slot.delta, data)
            return
        segments = self._segments(gpa, len(data))
        for slot, at, _ in segments:
            if slot.flags & KVM_MEM_READONLY:
                raise KvmError(errno.EFAULT, f"guest memory at {at:#x} is in a read-only slot")
        for slot, at, size in segments:
            self.user.write(at + slot.delta, data[at - gpa : at - gpa + size])
            if slot.dirty is not None:
                first = (at - slot.base) >> PAGE_SHIFT
                last = (at + size - 1 - slot.base) >> PAGE_SHIFT
                if self.on_dirty is not None:
                    for page in range(first, last + 1):
                        if page not in slot.dirty:
                            self.on_dirty(slot.slot, page)
                slot.dirty.mark(first, last)

    def read_u8(self, gpa: int) -> int:
        """The byte at ``gpa``."""
        return self.read(gpa, 1)[0]

    def read_u16(self, gpa: int) -> int:
        """The 16-bit value at ``gpa``."""
        return int.from_bytes(self.read(gpa, 2), "little")

    def read_u32(self, gpa: int) -> int:
        """The 32-bit value at ``gpa``."""
        return int.from_bytes(self.read(gpa, 4), "little")

    def read_u64(self, gpa: int) -> int:
        """The 64-bit value at ``gpa``."""
        return int.from_bytes(self.read(gpa, 8), "little")

    def write_u8(self, gpa: int, value: int) -> None:
        """Store a byte."""
        self.write(gpa, value.to_bytes(1, "little"))

    def write_u16(self, gpa: int, value: int) -> None:
        """Store a 16-bit value."""
        self.write(gpa, value.to_bytes(2, "little"))

    def write_u32(self, gpa: int, value: int) -> None:
        """Store a 32-bit value."""
        self.write(gpa, value.to_bytes(4, "little"))

    def write_u64(self, gpa: int, value: int) -> None:
        """Store a 64-bit value."""
        self.write(gpa, value.to_bytes(8, "little"))

    def is_backed(self, gpa: int, size: int = 1) -> bool:
        """Whether slots cover the whole range. The user memory behind it may still be missing."""
        slot = self._last
        return (slot.base <= gpa and gpa + size <= slot.end) or self._covered(gpa, size) is not None

    def is_writable(self, gpa: int, size: int = 1) -> bool:
        """Whether slots cover the range and none is read-only; a guest's write elsewhere exits as MMIO."""
        slot = self._last
        if not slot.flags & KVM_MEM_READONLY and slot.base <= gpa and gpa + size <= slot.end:
            return True
        segments = self._covered(gpa, size)
        return segments is not None and not any(slot.flags & KVM_MEM_READONLY for slot, _, _ in segments)

    def __iter__(self) -> Iterator[MemSlot]:
        """The slots of the first address space by ascending address."""
        return iter(self._spaces[0])

    # -- inside

    def _check_region(self, region: KvmUserspaceMemoryRegion) -> None:
        """What the struct says by itself, in the kernel's order of checking."""
        known = KVM_MEM_LOG_DIRTY_PAGES | (KVM_MEM_READONLY if self.readonly else 0)
        size, gpa, user = region.memory_size, region.guest_phys_addr, region.userspace_addr
        if region.flags & ~known:
            raise KvmError(errno.EINVAL, f"flags {region.flags:#x} has bits other than {known:#x}")
        if (size | gpa) & _PAGE_MASK:
            raise KvmError(errno.EINVAL, f"size {size:#x} or guest address {gpa:#x} is not page aligned")
        if user & _PAGE_MASK or user + size > 1 << self.user_bits:
            raise KvmError(
                errno.EINVAL,
                f"userspace address {user:#x} is not page aligned or not {size:#x} bytes of user space",
            )
        self._check_slot(region.slot)
        if gpa + size > _MASK64:
            raise KvmError(errno.EINVAL, f"guest address {gpa:#x} plus size {size:#x} wraps")
        if size >> PAGE_SHIFT > KVM_MEM_MAX_NR_PAGES:
            raise KvmError(errno.EINVAL, f"size {size:#x} is more than {KVM_MEM_MAX_NR_PAGES} pages")

    def _check_slot(self, slot: int) -> None:
        if slot & 0xFFFF >= self.slots or slot >> 16 >= self.address_spaces:
            raise KvmError(
                errno.EINVAL,
                f"slot {slot:#x} is not one of {self.slots} slots in {self.address_spaces} address spaces",
            )

    def _check_change(self, old: MemSlot, region: KvmUserspaceMemoryRegion) -> None:
        if old.end - old.base != region.memory_size:
            raise KvmError(errno.EINVAL, f"slot {old.slot:#x} cannot be resized to {region.memory_size:#x}")
        if old.user_addr != region.userspace_addr:
            raise KvmError(errno.EINVAL, f"slot {old.slot:#x} cannot change its userspace address")
        if (old.flags ^ region.flags) & KVM_MEM_READONLY:
            raise KvmError(errno.EINVAL, f"slot {old.slot:#x} cannot change KVM_MEM_READONLY")

    def _check_place(self, old: MemSlot | None, region: KvmUserspaceMemoryRegion) -> None:
        start, end = region.guest_phys_addr, region.guest_phys_addr + region.memory_size
        for other in self._spaces[region.slot >> 16]:
            if other is not old and start < other.end and other.base < end:
                raise KvmError(errno.EEXIST, f"{start:#x} to {end:#x} overlaps slot {other.slot:#x} at {other.base:#x}")
        if end > 1 << self.gpa_bits:
            raise KvmError(self.gpa_errno, f"guest address {end:#x} is beyond {self.gpa_bits} bits")

    def _replace(self, old: MemSlot | None, new: MemSlot | None) -> None:
        number = new.slot if new is not None else old.slot if old is not None else 0
        space = self._spaces[number >> 16]
        if old is not None:
            space.remove(old)
            del self._slots[number]
        if new is not None:
            space.insert(bisect_left([slot.base for slot in space], new.base), new)
            self._slots[number] = new
        self._starts = [slot.base for slot in self._spaces[0]]
        self._last = _NO_SLOT

    def _log(self, slot: int) -> DirtyLog:
        self._check_slot(slot)
        found = self._slots.get(slot)
        if found is None or found.dirty is None:
            raise KvmError(errno.ENOENT, f"slot {slot:#x} does not exist or has no dirty log")
        return found.dirty

    def _covered(self, gpa: int, n: int) -> list[tuple[MemSlot, int, int]] | None:
        """Split a range into (slot, address, length); ``None`` when a byte of it is in no slot."""
        segments: list[tuple[MemSlot, int, int]] = []
        space, end = self._spaces[0], gpa + n
        index = bisect_right(self._starts, gpa) - 1
        while gpa < end:
            if not 0 <= index < len(space) or not space[index].base <= gpa < space[index].end:
                return None
            slot = space[index]
            step = min(slot.end, end) - gpa
            segments.append((slot, gpa, step))
            gpa += step
            index += 1
        if segments:
            self._last = segments[0][0]
        return segments

    def _segments(self, gpa: int, n: int) -> list[tuple[MemSlot, int, int]]:
        segments = self._covered(gpa, n)
        if segments is None:
            raise KvmError(errno.EFAULT, f"guest memory {gpa:#x} to {gpa + n:#x} is not in memory slots")
        return segments

    def _check(self) -> None:
        """Assert the invariants; for tests."""
        for number, space in enumerate(self._spaces):
            for slot, following in pairwise(space):
                assert slot.end <= following.base, "slots are sorted and do not overlap"
            for slot in space:
                assert slot.slot >> 16 == number
                assert self._slots[slot.slot] is slot
                assert (slot.dirty is not None) == bool(slot.flags & KVM_MEM_LOG_DIRTY_PAGES)
                if slot.dirty is not None:
                    assert slot.dirty.count == slot.pages
                    assert all(0 <= page < slot.pages for page in slot.dirty._pages)
        assert sum(map(len, self._spaces)) == len(self._slots)
        assert [slot.base for slot in self._spaces[0]] == self._starts


class MmioHandler(Protocol):
    """Who answers a range of an address space; inheriting gives the usual ``exits`` and ``eoi_offset``."""

    __slots__ = ()

    exits: ClassVar[bool] = True
    """An access leaves the guest. False where the host's hardware answers it in the kernel's place."""
    eoi_offset: ClassVar[int] = -1
    """Offset of the register whose write ends an interrupt without an exit; -1 where there is none."""

    def mmio_read(self, offset: int, size: int, vcpu: Any) -> int:
        """The value of a read of ``size`` bytes at ``offset`` from the range's base."""
        ...

    def mmio_write(self, offset: int, size: int, value: int, vcpu: Any) -> None:
        """A write of ``size`` bytes at ``offset`` from the range's base."""
        ...


class AddressSpace:
    """MMIO or port addresses and who answers them; lookup is O(log n).

    Ranges do not overlap unless asked to: KVM's in-kernel bus lets devices shadow one another. It keeps them sorted
    and takes the first that has the address: of two that overlap the one that begins lower, of two with the same
    base the shorter, and otherwise (a range within another, or equal ones) the one registered first. A range added
    with ``shadow=True`` answers what is left, and comes to light where others are removed.

    Args:
        name: for messages.
        limit: how many ranges it has room for; None for any number.
    """

    __slots__ = ("_pieces", "_regions", "_shadowed", "_starts", "limit", "name")

    def __init__(self, name: str, limit: int | None = None) -> None:
        self.name = name
        self.limit = limit
        self._regions: list[tuple[int, int, MmioHandler]] = []  # (base, end, handler), those that go first first
        # What each address resolves to: disjoint pieces (end, base of the region, handler) by start.
        self._starts: list[int] = []
        self._pieces: list[tuple[int, int, MmioHandler]] = []
        self._shadowed = False

    def add(self, base: int, size: int, handler: MmioHandler, *, shadow: bool = False) -> None:
        """Have ``handler`` answer ``size`` addresses from ``base``.

        Raises:
            ValueError: for a range that is empty or leaves 64 bits, or overlaps another without ``shadow``.
            KvmError: ENOSPC when there is no room for one more.
        """
        self.check_room()
        end = base + size
        if size <= 0 or base < 0 or end > 1 << 64:
            raise ValueError(f"a range of {self.name} must be within 64 bits, not {size:#x} from {base:#x}")
        taken = self._overlapping(base, end)
        if taken and not shadow:
            raise ValueError(
                f"a range of {self.name} must be free, not {base:#x} to {end:#x}, which overlaps the one at "
                f"{self._pieces[taken[0]][1]:#x}"
            )
        behind = (n for n, (start, stop, _) in enumerate(self._regions) if start >= base and stop > end)
        self._regions.insert(next(behind, len(self._regions)), (base, end, handler))
        if taken:
            self._shadowed = True
            self._resolve()
        else:
            self._fill(base, end, handler)

    def check_room(self) -> None:
        """KvmError(ENOSPC) when there is no room for one more range."""
        if self.limit is not None and len(self._regions) >= self.limit:
            raise KvmError(errno.ENOSPC, f"{self.name} has room for {self.limit} devices, and they are there")

    def remove(self, base: int, handler: MmioHandler) -> None:
        """Undo the first :meth:`add` of ``handler`` at ``base``. ``ValueError`` when there was none."""
        found = (i for i, (start, _, by) in enumerate(self._regions) if start == base and by is handler)
        index = next(found, None)
        if index is None:
            raise ValueError(f"{self.name} must have a range of {handler!r} at {base:#x} to remove it")
        del self._regions[index]
        if self._shadowed:
            self._resolve()
            self._shadowed = bool(self._regions)
        else:
            at = bisect_left(self._starts, base)
            del self._starts[at], self._pieces[at]

    def find(self, addr: int, size: int = 1) -> tuple[MmioHandler, int] | None:
        """Who answers an access, all ``size`` bytes of it, and at which offset; ``None`` if nobody does."""
        index = bisect_right(self._starts, addr) - 1
        if index >= 0:
            end, base, handler = self._pieces[index]
            if addr + size <= end:
                return handler, addr - base
        return None

    def _overlapping(self, base: int, end: int) -> range:
        """Indices of the pieces that share an address with the range."""
        first = bisect_right(self._starts, base)
        if first and self._pieces[first - 1][0] > base:
            first -= 1
        return range(first, bisect_left(self._starts, end))

    def _resolve(self) -> None:
        """Work out anew who answers where."""
        self._starts.clear()
        self._pieces.clear()
        for region in self._regions:
            self._fill(*region)

    def _fill(self, base: int, end: int, handler: MmioHandler) -> None:
        """Let a region answer where nobody does yet."""
        gaps, start = [], base
        for index in self._overlapping(base, end):
            gaps.append((start, self._starts[index]))
            start = self._pieces[index][0]
        gaps.append((start, end))
        for start, stop in gaps:
            if start < stop:
                at = bisect_left(self._starts, start)
                self._starts.insert(at, start)
                self._pieces.insert(at, (stop, base, handler))
