"""Eventfds: simulated ones, and those of the operating system.

An irqfd consumes an eventfd's counts and injects for them; an ioeventfd and the end of a level interrupt signal
one. All three see an *event*, an object with the methods of :class:`Event`, of which there are two:

* :class:`SimulatedEvent`, made by ``kvm.eventfd()``. A signal is a method call that ends in the interrupt
  controller; nothing is polled and no system call made. Its user holds an :class:`EventFd`, an int.
* :class:`RealEvent`, an ``os.eventfd`` by its number. Nobody tells the fabric when such a number is signalled or
  closed, so :class:`RealEvents` looks at fixed points: before each ioctl, and around each sleep of a simulation.

How a number is known to be the same eventfd still
---------------------------------------------------
The fabric keeps no duplicate of a caller's fd, so the number may be closed and come back as another eventfd, with
the same inode (all eventfds share one) and even the same ``eventfd-id`` in fdinfo. An epoll set tells them apart:
its entries belong to the open file and vanish with it. Registering a number anew fails with EEXIST if, and only
if, it still is the file that was registered.

Counts are read when epoll, edge-triggered, reports a signal that came since the last look. That is the kernel's
rule as well: a count that was there before the irqfd was assigned stays until the next signal.
"""

from __future__ import annotations

import errno
import os
import re
import select
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias
from weakref import WeakValueDictionary

from fabric.clock import WaitQueue
from fabric.errors import KvmError
from fabric.kvm.fds import next_number

if TYPE_CHECKING:
    from fabric.clock import Engine

Callback: TypeAlias = "Callable[[], object]"

MAX_COUNT: Final = (1 << 64) - 2


class Event(Protocol):
    """An eventfd as irqfds and ioeventfds see it. Two irqfds of one eventfd get the same object."""

    @property
    def readable(self) -> bool:
        """The count is not 0."""
        ...

    def signal(self) -> None:
        """Add 1 to the count, as the kernel does; a full counter stays full."""
        ...

    def bind(self, inject: Callback) -> None:
        """From now on each signal consumes the count and calls ``inject``; the latest binding counts."""
        ...

    def unbind(self, inject: Callback) -> None:
        """Undo :meth:`bind`."""
        ...

    def shorten(self, inject: Callback, direct: Callable[[Any], object] | None, argument: Any) -> None:
        """While ``inject`` is bound, ``direct(argument)`` does the same and faster; None: not any more."""
        ...

    def watch(self, gone: Callback) -> None:
        """Have ``gone`` called when the eventfd is closed; to be called before the other uses."""
        ...

    def unwatch(self, gone: Callback) -> None:
        """Undo :meth:`watch`."""
        ...


class SimulatedEvent:
    """The eventfd behind an :class:`EventFd`."""

    __slots__ = ("__weakref__", "_argument", "_direct", "_inject", "_injects", "_queue", "_watchers", "count", "number")

    def __init__(self, engine: Engine | None, initval: int) -> None:
        self.number = next_number()
        self.count = initval
        self._inject: Callback | None = None
        self._direct: Callable[[Any], object] | None = None
        self._argument: Any = None
        self._injects: list[Callback] = []
        self._watchers: list[Callback] = []
        self._queue = WaitQueue(engine, f"eventfd {self.number}") if engine is not None else None
        _simulated[self.number] = self

    @property
    def readable(self) -> bool:
        return self.count > 0

    def signal(self, n: int = 1) -> None:
        """Add ``n`` to the count. Bound to an irqfd, it injects and the count is 0 again."""
        direct = self._direct
        if direct is not None:
            direct(self._argument)
            return
        inject = self._inject
        if inject is not None:
            self.count = 0
            try:
                inject()
            except KvmError:
                return  # the interrupt is lost without any sign to the signaller
            return
        self.count = min(self.count + n, MAX_COUNT)
        queue = self._queue
        if queue is not None and queue.waiters:
            queue.wake_one()

    def read(self) -> int:
        """The count, which becomes 0; BlockingIOError (EAGAIN) when it is 0."""
        if self.number not in _simulated:
            raise _closed(self.number)
        count = self.count
        if not count:
            raise BlockingIOError(errno.EAGAIN, f"eventfd {self.number} was not signalled")
        self.count = 0
        return count

    def write(self, n: int = 1) -> None:
        """As :meth:`signal`, with the checks of write(2): OSError with EINVAL, or EAGAIN for a full counter."""
        if not 0 <= n <= MAX_COUNT:
            raise OSError(errno.EINVAL, f"an eventfd takes 0 to 2**64 - 2, not {n}")
        if self._inject is None and self.count + n > MAX_COUNT:
            raise BlockingIOError(errno.EAGAIN, f"eventfd {self.number} counts to 2**64 - 2")
        self.signal(n)

    async def wait(self) -> int:
        """Wait until the count is not 0, then consume and return it."""
        queue = self._queue
        if queue is None:
            raise RuntimeError("eventfd.wait() needs a Kvm that was made inside a simulation")
        while not self.count:
            await queue.wait()
        count = self.count
        self.count = 0
        return count

    def close(self) -> None:
        """End it, and with it the irqfds on it. Closing twice is EBADF."""
        if _simulated.pop(self.number, None) is None:
            raise _closed(self.number)
        for gone in tuple(self._watchers):
            gone()

        def refuse() -> None:
            raise OSError(errno.EBADF, f"eventfd {self.number} is closed")

        self._inject = refuse
        self._direct = None

    def bind(self, inject: Callback) -> None:
        self._injects.append(inject)
        self._inject = inject
        self._direct = None

    def unbind(self, inject: Callback) -> None:
        self._injects.remove(inject)
        self._inject = self._injects[-1] if self._injects else None
        self._direct = None

    def shorten(self, inject: Callback, direct: Callable[[Any], object] | None, argument: Any) -> None:
        if self._injects and self._injects[-1] is inject:
            self._direct = direct
            self._argument = argument

    def watch(self, gone: Callback) -> None:
        self._watchers.append(gone)

    def unwatch(self, gone: Callback) -> None:
        self._watchers.remove(gone)


_simulated: WeakValueDictionary[int, SimulatedEvent] = WeakValueDictionary()
"""The open simulated eventfds of the process: any Kvm takes any of them, as any process file is any KVM's."""


class EventFd(int):
    """A simulated eventfd: its number, to be packed into structs, and its methods.

    ``signal(n=1)`` and ``write(n=1)`` add to the count, ``read()`` consumes it or raises BlockingIOError,
    ``await wait()`` waits for it, ``close()`` ends it. ``signal`` is a plain attribute: code that signals often
    may keep it.
    """

    event: SimulatedEvent
    signal: Callable[..., None]

    def __new__(cls, event: SimulatedEvent) -> EventFd:
        fd = super().__new__(cls, event.number)
        fd.event = event
        fd.signal = event.signal
        return fd

    def __repr__(self) -> str:
        return f"<EventFd {int(self)}>"

    def write(self, n: int = 1) -> None:
        """Add ``n`` to the count, as write(2)."""
        self.event.write(n)

    def read(self) -> int:
        """Consume the count; BlockingIOError when it is 0."""
        return self.event.read()

    async def wait(self) -> int:
        """Wait for the count to be not 0, and consume it."""
        return await self.event.wait()

    def close(self) -> None:
        """End the eventfd."""
        self.event.close()


class RealEvent:
    """An eventfd of the operating system that this Kvm uses."""

    __slots__ = ("_events", "_injects", "_watchers", "eventfd_id", "number")

    def __init__(self, events: RealEvents, number: int, eventfd_id: str) -> None:
        self._events = events
        self.number = number
        self.eventfd_id = eventfd_id
        self._injects: list[Callback] = []
        self._watchers: list[Callback] = []

    @property
    def readable(self) -> bool:
        return _ready(self.number, select.POLLIN)

    def signal(self) -> None:
        if self._events.is_open(self) and _ready(self.number, select.POLLOUT):
            os.eventfd_write(self.number, 1)

    def consume(self) -> None:
        """It was signalled: consume the count and inject."""
        if self._injects and self.readable:
            os.eventfd_read(self.number)
            try:
                self._injects[-1]()
            except KvmError:
                return  # lost without any sign

    def bind(self, inject: Callback) -> None:
        self._injects.append(inject)
        if len(self._injects) == 1:
            self._events.listen(self, select.EPOLLIN | select.EPOLLET)

    def unbind(self, inject: Callback) -> None:
        self._injects.remove(inject)
        if not self._injects:
            self._events.listen(self, 0)

    def shorten(self, inject: Callback, direct: Callable[[Any], object] | None, argument: Any) -> None:
        """A system call is on the way in any case."""

    def watch(self, gone: Callback) -> None:
        if not self._watchers:
            self._events.adopt(self)
        self._watchers.append(gone)

    def unwatch(self, gone: Callback) -> None:
        self._watchers.remove(gone)
        if not self._watchers:
            self._events.forget(self)

    def gone(self) -> None:
        """The caller closed it."""
        for gone in tuple(self._watchers):
            gone()


class RealEvents:
    """The eventfds of the operating system that one Kvm uses, and the look at them."""

    __slots__ = ("_epoll", "_events")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._events: dict[int, RealEvent] = {}

    def __bool__(self) -> bool:
        return bool(self._events)

    def find(self, fd: int) -> RealEvent:
        """The eventfd with number ``fd``.

        Raises:
            KvmError: EBADF when it is not open, EINVAL when it is no eventfd.
        """
        self.poll()
        eventfd_id = _eventfd_id(fd)
        for event in self._events.values():
            # The same eventfd under another number: its id cannot be another's while it is open.
            if event.number == fd or (event.eventfd_id == eventfd_id and eventfd_id):
                return event
        return RealEvent(self, fd, eventfd_id)

    def adopt(self, event: RealEvent) -> None:
        """The event has its first user: look at it from now on."""
        self._events[event.number] = event
        self._epoll.register(event.number, 0)

    def forget(self, event: RealEvent) -> None:
        """Nobody uses the event any more."""
        if self.is_open(event):
            self._epoll.unregister(event.number)
        if self._events.get(event.number) is event:
            del self._events[event.number]

    def listen(self, event: RealEvent, mask: int) -> None:
        """Report signals of ``event`` that come from now on, or with ``mask`` 0 none."""
        if self.is_open(event):
            self._epoll.modify(event.number, mask)
            # A count that is there already is reported once, and is not a signal.
            self.poll(but=event)

    def is_open(self, event: RealEvent) -> bool:
        """Whether the number still is that eventfd."""
        return self._events.get(event.number) is event and self._same(event.number)

    def poll(self, but: RealEvent | None = None) -> None:
        """Let go of what was closed, and consume what was signalled since the last call."""
        for event in tuple(self._events.values()):
            # One that goes may take others along: a resample eventfd that nobody else uses.
            if self._events.get(event.number) is event and not self._same(event.number):
                del self._events[event.number]
                event.gone()
        for number, _ in self._epoll.poll(0):
            # None: a duplicate of a closed number is still open somewhere.
            signalled = self._events.get(number)
            if signalled is not None and signalled is not but:
                signalled.consume()

    def _same(self, number: int) -> bool:
        try:
            self._epoll.register(number, 0)
        except FileExistsError:
            return True
        except OSError:
            return False  # closed, or a file that cannot be polled
        self._epoll.unregister(number)
        return False


def open_event(number: int) -> SimulatedEvent | None:
    """The open simulated eventfd with that number."""
    return _simulated.get(number)


def _eventfd_id(fd: int) -> str:
    """What tells an eventfd apart from all others that are open now; empty on kernels that do not say."""
    try:
        kind = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        raise KvmError(errno.EBADF, f"{fd} is not open") from None
    if kind != "anon_inode:[eventfd]":
        raise KvmError(errno.EINVAL, f"{fd} is {kind}, not an eventfd")
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        found = re.search(r"^eventfd-id:\s*(\d+)", lines.read(), re.MULTILINE)
    return found[1] if found else ""


def _ready(fd: int, mask: int) -> bool:
    poll = select.poll()
    poll.register(fd, mask)
    return any(found & mask for _, found in poll.poll(0))


def _closed(number: int) -> OSError:
    return OSError(errno.EBADF, f"eventfd {number} is closed")
