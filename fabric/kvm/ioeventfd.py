"""ioeventfds: guest writes that signal an eventfd instead of leaving the guest (doorbells).

Each counts for one address exactly, in memory or port space, and for one width or (length 0) all of them, and
with DATAMATCH for one value. A write that none matches goes on to whoever else answers the address.

A doorbell is a message to a device, so it goes through the VM's channel of :class:`~fabric.channel.Doorbell`
events; while nothing is done to that channel, it is a call of the eventfd.

Rules: api.ioeventfd of the interface inventory.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING

import attrs

from fabric.channel import Doorbell
from fabric.errors import KvmError

if TYPE_CHECKING:
    from fabric.channel import Channel
    from fabric.kvm.eventfd import Event
    from fabric.memory import AddressSpace


@attrs.define(eq=False)
class Ioeventfd:
    """One registration."""

    event: Event
    addr: int
    length: int
    """1, 2, 4 or 8; 0 for any."""
    datamatch: int | None
    """The value to match; None for any."""
    number: int
    """In the order of registration; the queue in Doorbell events."""
    closed: bool = False

    def overlaps(self, other: Ioeventfd) -> bool:
        """Whether some write would match both."""
        if self.addr != other.addr:
            return False
        if not (self.length and other.length):
            return True
        return self.length == other.length and (
            self.datamatch is None or other.datamatch is None or self.datamatch == other.datamatch
        )

    def matches(self, size: int, value: int) -> bool:
        """Whether a write to its address counts."""
        return (not self.length or self.length == size) and (self.datamatch is None or self.datamatch == value)

    def gone(self) -> None:
        """The eventfd was closed: writes are swallowed as before, and signal nobody."""
        self.closed = True


class Doorbells:
    """The ioeventfds of one address space of a VM.

    Args:
        channel: what a write goes through.
        space: where the in-kernel devices of the address space are. Doorbells take no room on it, but when those
            have filled it nothing can be added any more.
    """

    __slots__ = ("_by_addr", "_by_number", "_next", "_space", "channel")

    def __init__(self, channel: Channel[Doorbell], space: AddressSpace | None = None) -> None:
        self._space = space
        self._by_addr: dict[int, list[Ioeventfd]] = {}
        self._by_number: dict[int, Ioeventfd] = {}
        self._next = 0
        self.channel = channel
        channel.connect(self._ring)

    def __len__(self) -> int:
        return len(self._by_number)

    def assign(self, event: Event, addr: int, length: int, datamatch: int | None) -> None:
        """Register.

        Raises:
            KvmError: EEXIST when a write could match this one and another, ENOSPC when the bus is full.
        """
        here = self._by_addr.get(addr, [])
        new = Ioeventfd(event, addr, length, datamatch, self._next)
        if any(new.overlaps(other) for other in here):
            raise KvmError(errno.EEXIST, f"an ioeventfd at {addr:#x} matches the same writes")
        if self._space is not None:
            self._space.check_room()
        event.watch(new.gone)
        self._by_addr.setdefault(addr, here).append(new)
        self._by_number[new.number] = new
        self._next += 1

    def deassign(self, event: Event, addr: int, length: int, datamatch: int | None) -> None:
        """Undo the :meth:`assign` of the same arguments. KvmError(ENOENT) when there was none."""
        for one in self._by_addr.get(addr, ()):
            if one.event is event and one.length == length and one.datamatch == datamatch:
                self._remove(one)
                return
        raise KvmError(errno.ENOENT, f"there is no such ioeventfd at {addr:#x}")

    def write(self, addr: int, size: int, value: int) -> bool:
        """A guest's write: True when an ioeventfd took it."""
        here = self._by_addr.get(addr)
        if here is None:
            return False
        for one in here:
            if one.matches(size, value):
                if self.channel.plain:
                    if not one.closed:
                        one.event.signal()
                else:
                    # A guest's write cannot fail: what the channel refuses is lost.
                    with suppress(KvmError):
                        self.channel.send_nowait(Doorbell(one.number, value))
                return True
        return False

    def _ring(self, doorbell: Doorbell) -> None:
        one = self._by_number.get(doorbell.queue)
        if one is not None and not one.closed:
            one.event.signal()

    def _remove(self, one: Ioeventfd) -> None:
        here = self._by_addr[one.addr]
        here.remove(one)
        if not here:
            del self._by_addr[one.addr]
        del self._by_number[one.number]
        one.event.unwatch(one.gone)

    def close(self) -> None:
        """The VM goes away."""
        for one in tuple(self._by_number.values()):
            self._remove(one)
