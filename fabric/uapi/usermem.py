"""User memory: what the pointers in ioctl structs point into.

The kernel reads and writes its caller's memory and answers EFAULT where there is none. Here that memory is an
object with two methods (:class:`UserMemory`), of which there are two:

* :class:`ProcessMemory`, this process, for a VMM that registers its own mappings. A bad pointer must give
  EFAULT, never a crash, so the kernel does the access (``process_vm_readv(2)`` on the own pid).
* :class:`SparseMemory`, a simulated address space of 4 KiB pages that exist once they are written to.

Handlers get their argument as :class:`UserPointer` or :class:`BufferPointer` and read it through the same
methods, at the moment the kernel would.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from bisect import bisect_right
from sys import byteorder
from typing import TYPE_CHECKING, Any, Final, Protocol

from fabric.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PAGE_MASK: Final = PAGE_SIZE - 1
TOP: Final = 1 << 64

Bytes = bytes | bytearray | memoryview


class UserMemory(Protocol):
    """Memory by 64-bit address."""

    def read(self, addr: int, n: int) -> bytes:
        """``n`` bytes at ``addr``. KvmError(EFAULT) when any of them is not there."""
        ...

    def write(self, addr: int, data: Bytes) -> None:
        """Store ``data`` at ``addr``. KvmError(EFAULT) when a byte cannot be; those before it may be."""
        ...


def _fault(addr: int, n: int) -> KvmError:
    return KvmError(errno.EFAULT, f"user memory {addr:#x} to {addr + n:#x} is not accessible")


class SparseMemory:
    """A simulated user address space that costs what is written to it.

    :meth:`map` hands out ranges as mmap does, rounded up to pages and separated by an unmapped guard page;
    pages read as zero until written. Addresses depend on the order of the calls only.
    """

    __slots__ = ("_ends", "_next", "_pages", "_starts")

    def __init__(self, base: int = 0x7F00_0000_0000) -> None:
        self._next = base
        self._starts: list[int] = []  # of the mapped ranges, ascending
        self._ends: list[int] = []
        self._pages: dict[int, bytearray] = {}  # page number to the page, written ones only

    def map(self, length: int) -> int:
        """Map ``length`` bytes of zeros and return their address, a multiple of the page size."""
        if length <= 0:
            raise ValueError(f"length must be positive, not {length}")
        addr = self._next
        end = addr + (length + PAGE_MASK & ~PAGE_MASK)
        self._starts.append(addr)
        self._ends.append(end)
        self._next = end + PAGE_SIZE
        return addr

    def unmap(self, addr: int) -> None:
        """Undo the :meth:`map` that returned ``addr``; its contents are gone."""
        index = bisect_right(self._starts, addr) - 1
        if index < 0 or self._starts[index] != addr:
            raise ValueError(f"addr must be what map() returned, not {addr:#x}")
        first, last = addr >> PAGE_SHIFT, self._ends[index] >> PAGE_SHIFT
        if last - first < len(self._pages):
            for page in range(first, last):
                self._pages.pop(page, None)
        else:
            for page in [p for p in self._pages if first <= p < last]:
                del self._pages[page]
        del self._starts[index], self._ends[index]

    def written(self, addr: int, length: int) -> list[int]:
        """Addresses of the pages in a range that were written to, ascending; all others read as zero."""
        first, last = addr >> PAGE_SHIFT, addr + length + PAGE_MASK >> PAGE_SHIFT
        if last - first < len(self._pages):
            return [page << PAGE_SHIFT for page in range(first, last) if page in self._pages]
        return [page << PAGE_SHIFT for page in sorted(self._pages) if first <= page < last]

    @property
    def resident(self) -> int:
        """Bytes held for pages that were written to."""
        return len(self._pages) << PAGE_SHIFT

    def read(self, addr: int, n: int) -> bytes:
        """See :class:`UserMemory`."""
        offset = addr & PAGE_MASK
        if offset + n <= PAGE_SIZE:
            page = self._pages.get(addr >> PAGE_SHIFT)
            if page is not None:
                return bytes(page[offset : offset + n])
        self._check(addr, n)
        found = bytearray(n)
        done = 0
        while done < n:
            offset = addr + done & PAGE_MASK
            step = min(PAGE_SIZE - offset, n - done)
            page = self._pages.get(addr + done >> PAGE_SHIFT)
            if page is not None:
                found[done : done + step] = page[offset : offset + step]
            done += step
        return bytes(found)

    def write(self, addr: int, data: Bytes) -> None:
        """See :class:`UserMemory`; here nothing is stored when part of the range is not mapped."""
        offset = addr & PAGE_MASK
        n = len(data)
        if offset + n <= PAGE_SIZE:
            page = self._pages.get(addr >> PAGE_SHIFT)
            if page is not None:
                page[offset : offset + n] = data
                return
        self._check(addr, n)
        done = 0
        while done < n:
            offset = addr + done & PAGE_MASK
            step = min(PAGE_SIZE - offset, n - done)
            number = addr + done >> PAGE_SHIFT
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = bytearray(PAGE_SIZE)
            page[offset : offset + step] = data[done : done + step]
            done += step

    def _check(self, addr: int, n: int) -> None:
        index = bisect_right(self._starts, addr) - 1
        if n and (index < 0 or addr + n > self._ends[index]):
            raise _fault(addr, n)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("len", ctypes.c_size_t))


class _Scratch(threading.local):
    """A thread's own bounce buffer and I/O vectors, so that a small transfer allocates nothing."""

    SIZE = 4096

    def __init__(self) -> None:
        self.buffer = bytearray(self.SIZE)
        self.view = memoryview(self.buffer)
        self.address = _address(self.buffer)
        self.ours, self.theirs = _IoVec(), _IoVec()
        self.ours_address, self.theirs_address = ctypes.addressof(self.ours), ctypes.addressof(self.theirs)


class ProcessMemory:
    """The memory of this very process, accessed by the kernel on our behalf.

    ``process_vm_readv(2)`` and ``process_vm_writev(2)`` stop at the first page that is not there, and respect
    page protections. Where they are forbidden (a seccomp policy: EPERM or ENOSYS) ``/proc/self/mem`` serves
    instead, which also writes to read-only mappings. Safe to use from several threads.
    """

    __slots__ = ("_readv", "_scratch", "_usable", "_writev")

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for function in (libc.process_vm_readv, libc.process_vm_writev):
            function.restype = ctypes.c_ssize_t
            # pid, local vectors and their count, remote vectors and their count, flags
            function.argtypes = (
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_ulong,
                ctypes.c_void_p,
                ctypes.c_ulong,
                ctypes.c_ulong,
            )
        self._readv: Callable[..., int] = libc.process_vm_readv
        self._writev: Callable[..., int] = libc.process_vm_writev
        self._scratch = _Scratch()
        self._usable = True

    def read(self, addr: int, n: int) -> bytes:
        """See :class:`UserMemory`."""
        scratch = self._scratch
        if n <= _Scratch.SIZE:
            self._transfer(scratch, scratch.address, addr, n, write=False)
            return bytes(scratch.view[:n])
        buffer = bytearray(n)
        self._transfer(scratch, _address(buffer), addr, n, write=False)
        return bytes(buffer)

    def write(self, addr: int, data: Bytes) -> None:
        """See :class:`UserMemory`."""
        n = len(data)
        scratch = self._scratch
        if n <= _Scratch.SIZE:
            scratch.view[:n] = data
            self._transfer(scratch, scratch.address, addr, n, write=True)
        else:
            self._transfer(scratch, _address(copy := bytearray(data)), addr, n, write=True)
            del copy  # it had to live until here

    def _transfer(self, scratch: _Scratch, local: int, addr: int, n: int, *, write: bool) -> None:
        """Move ``n`` bytes between ``local``, which is certainly ours, and ``addr``, which may be nothing."""
        if addr < 0 or addr + n > TOP:
            raise _fault(addr, n)
        if not n:
            return
        if self._usable:
            ours, theirs = scratch.ours, scratch.theirs
            ours.base, ours.len = local, n
            theirs.base, theirs.len = addr, n
            call = self._writev if write else self._readv
            # The pid is asked for each time, as the process may have forked.
            moved = call(os.getpid(), scratch.ours_address, 1, scratch.theirs_address, 1, 0)
            if moved == n:
                return
            if moved >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
                raise _fault(addr, n)
            self._usable = False
        _transfer_by_file(local, addr, n, write=write)


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _transfer_by_file(local: int, addr: int, n: int, *, write: bool) -> None:
    view = memoryview((ctypes.c_char * n).from_address(local))
    try:
        fd = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            moved = os.pwritev(fd, [view], addr) if write else os.preadv(fd, [view], addr)
        finally:
            os.close(fd)
    except (OSError, OverflowError):  # EIO where nothing is mapped; offsets end at 2**63
        moved = -1
    if moved != n:
        raise _fault(addr, n)


class _Pointer:
    """What a handler gets as its argument; subclasses say where it points."""

    __slots__ = ("addr",)

    def __init__(self, addr: int) -> None:
        self.addr = addr
        """The address, 0 for a buffer, which has none."""

    def read(self, n: int, offset: int = 0) -> bytes:
        """``n`` bytes at ``offset``. KvmError(EFAULT)."""
        raise NotImplementedError

    def write(self, data: Bytes, offset: int = 0) -> None:
        """Store ``data`` at ``offset``. KvmError(EFAULT)."""
        raise NotImplementedError

    def u32(self, offset: int = 0) -> int:
        """The unsigned 32-bit value there, in the host's byte order."""
        return int.from_bytes(self.read(4, offset), byteorder)

    def u64(self, offset: int = 0) -> int:
        """The unsigned 64-bit value there, in the host's byte order."""
        return int.from_bytes(self.read(8, offset), byteorder)

    def put_u32(self, value: int, offset: int = 0) -> None:
        """Store a 32-bit value; the upper bits of a longer or negative one are cut off."""
        self.write((value & 0xFFFF_FFFF).to_bytes(4, byteorder), offset)

    def put_u64(self, value: int, offset: int = 0) -> None:
        """Store a 64-bit value; the upper bits of a longer or negative one are cut off."""
        self.write((value & TOP - 1).to_bytes(8, byteorder), offset)


class UserPointer(_Pointer):
    """An address in a user memory."""

    __slots__ = ("mem",)

    def __init__(self, mem: UserMemory, addr: int) -> None:
        super().__init__(addr)
        self.mem = mem

    def read(self, n: int, offset: int = 0) -> bytes:
        return self.mem.read(self.addr + offset, n)

    def write(self, data: Bytes, offset: int = 0) -> None:
        self.mem.write(self.addr + offset, data)


class BufferPointer(_Pointer):
    """A caller's writable buffer as user memory of exactly its length."""

    __slots__ = ("view",)

    def __init__(self, buffer: Any) -> None:
        super().__init__(0)
        view = memoryview(buffer)
        if view.readonly:
            raise TypeError("buffer must be writable")
        self.view = view.cast("B")

    def read(self, n: int, offset: int = 0) -> bytes:
        if offset + n > len(self.view):
            raise self._fault(offset, n)
        return bytes(self.view[offset : offset + n])

    def write(self, data: Bytes, offset: int = 0) -> None:
        n = len(data)
        if offset + n > len(self.view):
            raise self._fault(offset, n)
        self.view[offset : offset + n] = data

    def _fault(self, offset: int, n: int) -> KvmError:
        return KvmError(
            errno.EFAULT, f"the call touches bytes {offset} to {offset + n} of a buffer of {len(self.view)}"
        )
