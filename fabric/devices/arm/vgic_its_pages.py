"""Guest memory by the page, for one call into the ITS.

A command queue that maps a million events reads a command, a configuration byte and a pending byte for each.
Where guest memory is another mapping of this process, each small read is a system call; so pages are read whole
and kept while the call lasts. Nothing but the call itself writes meanwhile, and what it writes goes through
here. A page is the unit in which memory is there or not, so a failure is the same one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fabric.memory import GuestMemory

PAGE_SHIFT = 12
PAGE_MASK = (1 << PAGE_SHIFT) - 1
KEPT = 1024
"""Pages kept at a time: enough for the pending tables of 512 vCPUs."""


class Pages:
    """Reads of ``memory`` that remember pages until :meth:`forget`; every value must lie within a page."""

    __slots__ = ("_pages", "memory")

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self._pages: dict[int, bytes] = {}

    def page(self, number: int) -> bytes:
        """The page at ``number << 12``. KvmError(EFAULT) where nothing backs it."""
        page = self._pages.get(number)
        if page is None:
            page = self.memory.read(number << PAGE_SHIFT, 1 << PAGE_SHIFT)
            if len(self._pages) >= KEPT:
                self._pages.clear()
            self._pages[number] = page
        return page

    def read_u8(self, gpa: int) -> int:
        """The byte at ``gpa``."""
        page = self._pages.get(gpa >> PAGE_SHIFT) or self.page(gpa >> PAGE_SHIFT)
        return page[gpa & PAGE_MASK]

    def read_u64(self, gpa: int) -> int:
        """The 64-bit value at ``gpa``, which is a multiple of 8."""
        page = self._pages.get(gpa >> PAGE_SHIFT) or self.page(gpa >> PAGE_SHIFT)
        offset = gpa & PAGE_MASK
        return int.from_bytes(page[offset : offset + 8], "little")

    def write_u8(self, gpa: int, value: int) -> None:
        """Store a byte."""
        self._pages.pop(gpa >> PAGE_SHIFT, None)
        self.memory.write_u8(gpa, value)

    def write_u64(self, gpa: int, value: int) -> None:
        """Store a 64-bit value at a multiple of 8."""
        self._pages.pop(gpa >> PAGE_SHIFT, None)
        self.memory.write_u64(gpa, value)

    def forget(self) -> None:
        """A call begins or ends: what was read may change from now on."""
        self._pages.clear()
