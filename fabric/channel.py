"""Typed channels: everything that carries an interrupt from one component to another passes through one.

A :class:`Channel` has a name, an event type, an optional latency, taps and faults. At its far end is either a
synchronous *sink* (a device model) or tasks that receive. With a sink, no latency, no tap and no fault,
``channel.send_nowait`` *is* the sink: a send is one function call. Whatever is added puts the long way in place,
and taking it away restores the short one.

Faults are words a reader knows: ``hold``/``release``, ``drop``, ``duplicate``, ``delay``, ``fail``. What a channel
that carries interrupts drops, holds or has under way is accounted for in the ledger by the channel itself; an
event that arrives is accounted for where it arrives.
"""

from __future__ import annotations

import errno as errnos
from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Generic, TypeVar

import attrs
import trio

from fabric.clock import Engine, Priority, WaitQueue
from fabric.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from fabric.trace.ledger import Ledger


@attrs.frozen
class LineLevel:
    """An interrupt line changed: ``line`` as its receiver numbers it, ``level`` asserted or not."""

    line: int
    level: bool


@attrs.frozen
class Msi:
    """A message-signalled interrupt: a write of ``data`` to ``address`` by the device ``devid``."""

    address: int
    data: int
    devid: int


@attrs.frozen
class AdapterIrq:
    """An s390 adapter interrupt: ``adapter`` id and the summary and queue indicator bits to set."""

    adapter: int
    indicator: int


@attrs.frozen
class Ipi:
    """An interrupt from vCPU ``sender`` to vCPU ``target`` with number ``vector``."""

    sender: int
    target: int
    vector: int


@attrs.frozen
class Kick:
    """An interrupt controller has something for vCPU ``vcpu``."""

    vcpu: int


@attrs.frozen
class Doorbell:
    """A guest rang queue ``queue`` with ``value``."""

    queue: int
    value: int


Event = TypeVar("Event")


@attrs.define(eq=False)
class Fault(Generic[Event]):
    """A fault in force on a channel; ``lift()`` ends it early."""

    channel: Channel[Event]
    kind: str
    left: int | None
    """How many more events it hits; None: all."""
    probability: float
    argument: int
    hits: int = 0

    def lift(self) -> None:
        """The channel works normally again, as far as this fault goes. Lifting twice is fine."""
        if self in self.channel._faults:
            self.channel._faults.remove(self)
            self.channel._choose_path()


@attrs.frozen
class ChannelStatistics:
    """What a channel has and has done, as ``trio`` channels report it."""

    name: str
    in_flight: int
    """Under way: waiting out the latency or a delay."""
    held: int
    """Stopped by ``hold``."""
    queued: int
    """Arrived, and not yet received by a task."""
    receivers_waiting: int
    faults: dict[str, int]
    """Fault kind -> events it hit so far."""


class Channel(Generic[Event]):
    """A way for events of one type from senders to one far end.

    Args:
      name: unique in its run, such as ``"vm0.msi"``; faults in a scenario name it.
      event_type: the class of its events.
      engine: the simulation's engine; needed for latency, delays and receiving tasks.
      latency_ns: from send to arrival (>= 0).
      ledger: given for a channel that carries interrupts towards their controller.
    """

    __slots__ = (
        "_arrived",
        "_draw",
        "_faults",
        "_flight_timer",
        "_flights",
        "_held",
        "_hits",
        "_holding",
        "_latency_ns",
        "_seq",
        "_sink",
        "_taps",
        "_waiting",
        "engine",
        "event_type",
        "ledger",
        "name",
        "on_origin",
        "plain",
        "send_nowait",
        "watchers",
    )

    send_nowait: Callable[[Event], object]
    """Send without waiting. KvmError when a ``fail`` fault is in force; what a plain sink returns is returned."""

    def __init__(
        self,
        name: str,
        event_type: type[Event],
        *,
        engine: Engine | None = None,
        latency_ns: int = 0,
        ledger: Ledger | None = None,
    ) -> None:
        self.name = name
        self.event_type = event_type
        self.engine = engine
        self.ledger = ledger
        self.on_origin: Callable[[int | None], object] | None = None
        """Told the time an event was sent just before a late event arrives, and None after it."""
        self.watchers: list[Callable[[], object]] = []
        """Called whenever ``plain`` may have changed: for senders that keep an even shorter way."""
        self._sink: Callable[[Event], object] | None = None
        self._arrived: deque[Event] = deque()
        self._waiting = WaitQueue(engine, f"an event on channel {name}") if engine is not None else None
        self._taps: list[Callable[[Event], object]] = []
        self._faults: list[Fault[Event]] = []
        self._hits: dict[str, int] = {}
        self._holding = 0
        self._held: deque[tuple[Event, int, int]] = deque()
        """Events held, how much longer than the latency they take after that, and when they were sent."""
        self._flights: list[tuple[int, int, Event, int]] = []
        self._flight_timer = engine.timer(self._land, name=name, priority=Priority.CHANNEL) if engine else None
        self._seq = 0
        self._draw: Random | None = None
        if ledger is not None:
            ledger.add_in_flight_probe(self._under_way)
        self._latency_ns = 0
        self.latency_ns = latency_ns

    def __repr__(self) -> str:
        return f"<Channel {self.name!r} of {self.event_type.__name__}>"

    # The far end.

    def connect(self, sink: Callable[[Event], object]) -> None:
        """Have ``sink(event)`` called for every event, those that came before included. A channel has one far end."""
        if self._sink is not None:
            raise ValueError(f"channel {self.name} has a sink already")
        if self._waiting:
            raise ValueError(f"channel {self.name} has tasks that receive from it")
        self._sink = sink
        while self._arrived:
            sink(self._arrived.popleft())
        self._choose_path()

    def receive_nowait(self) -> Event:
        """The next event, or ``trio.WouldBlock``."""
        if not self._arrived:
            raise trio.WouldBlock
        return self._arrived.popleft()

    async def receive(self) -> Event:
        """Wait for the next event; events go to receivers in the order they began to wait."""
        if self._arrived:
            return self._arrived.popleft()
        if self._sink is not None:
            raise RuntimeError(f"channel {self.name} has a sink: nothing is left to receive")
        if self._waiting is None:
            raise RuntimeError(f"channel {self.name} has no engine: nobody can wait on it")
        event: Event = await self._waiting.wait()
        return event

    def __aiter__(self) -> Channel[Event]:
        return self

    async def __anext__(self) -> Event:
        return await self.receive()

    # The near end.

    async def send(self, event: Event) -> None:
        """Send ``event`` and wait for the channel's latency. A held or delayed event is not waited for longer."""
        if self.engine is None:
            raise RuntimeError(f"channel {self.name} has no engine: nobody can wait on it")
        self.send_nowait(event)
        await self.engine.sleep(self._latency_ns)

    @property
    def latency_ns(self) -> int:
        """From send to arrival; may be changed at any time, for events sent from then on."""
        return self._latency_ns

    @latency_ns.setter
    def latency_ns(self, value: int) -> None:
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"the latency of channel {self.name} must be an int >= 0 ns, not {value!r}")
        if value and self.engine is None:
            raise ValueError(f"channel {self.name} has no engine, so it cannot have a latency")
        self._latency_ns = value
        self._choose_path()

    # Taps and faults.

    def tap(self, listener: Callable[[Event], object]) -> Callable[[], None]:
        """Have ``listener(event)`` called for every event sent, before any fault; returns what removes it."""
        self._taps.append(listener)
        self._choose_path()

        def remove() -> None:
            self._taps.remove(listener)
            self._choose_path()

        return remove

    def hold(self) -> None:
        """Keep events back until :meth:`release`. Holds nest."""
        self._holding += 1
        self._choose_path()

    def release(self) -> int:
        """Undo one ``hold``; with the last, let everything held go, in order. Returns how many events went.

        What is sent meanwhile goes last. When the far end raises, the channel stays held with what is left.
        """
        if not self._holding:
            raise ValueError(f"channel {self.name} is not held")
        released = 0
        while self._held and self._holding == 1:
            event, extra_ns, sent_at = self._held.popleft()
            self._depart(event, self._latency_ns + extra_ns, sent_at)
            released += 1
        self._holding = max(0, self._holding - 1)  # 0 when the far end has released it meanwhile
        self._choose_path()
        return released

    def drop(self, count: int | None = None, *, probability: float = 1.0) -> Fault[Event]:
        """Lose the next ``count`` events (None: all), each with ``probability``."""
        return self._fault("drop", count, probability, 0)

    def duplicate(self, count: int | None = None, *, probability: float = 1.0) -> Fault[Event]:
        """Deliver the next ``count`` events twice."""
        return self._fault("duplicate", count, probability, 0)

    def delay(self, ns: int, count: int | None = None, *, probability: float = 1.0) -> Fault[Event]:
        """Deliver the next ``count`` events ``ns`` later than the latency says; they may be overtaken."""
        if self.engine is None:
            raise ValueError(f"channel {self.name} has no engine, so it cannot delay")
        if not isinstance(ns, int) or ns < 0:
            raise ValueError(f"a delay must be an int >= 0 ns, not {ns!r}")
        return self._fault("delay", count, probability, ns)

    def fail(self, errno: int, count: int | None = None, *, probability: float = 1.0) -> Fault[Event]:
        """Refuse the next ``count`` events: sending raises ``KvmError(errno)``."""
        if errno not in errnos.errorcode:
            raise ValueError(f"must be an errno, not {errno!r}")
        return self._fault("fail", count, probability, errno)

    def clear_faults(self) -> None:
        """Lift every fault and release what is held."""
        self._faults.clear()
        while self._holding:
            self.release()
        self._choose_path()

    def statistics(self) -> ChannelStatistics:
        """How many events are where, and what faults have hit."""
        return ChannelStatistics(
            name=self.name,
            in_flight=len(self._flights),
            held=len(self._held),
            queued=len(self._arrived),
            receivers_waiting=len(self._waiting) if self._waiting is not None else 0,
            faults=dict(self._hits),
        )

    # Inside.

    def _fault(self, kind: str, count: int | None, probability: float, argument: int) -> Fault[Event]:
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"the number of events a fault hits must be an int >= 1 or None, not {count!r}")
        if not 0 < probability <= 1:
            raise ValueError(f"a probability must be in (0, 1], not {probability!r}")
        if probability < 1 and self._draw is None:
            if self.engine is None:
                raise ValueError(f"channel {self.name} has no engine, so no seed to draw from")
            self._draw = self.engine.rng(f"faults of {self.name}")
        fault = Fault(self, kind, count, probability, argument)
        self._faults.append(fault)
        self._choose_path()
        return fault

    def _choose_path(self) -> None:
        self.plain = not (self._latency_ns or self._taps or self._faults or self._holding) and self._sink is not None
        self.send_nowait = self._sink if self.plain and self._sink is not None else self._send
        for watcher in self.watchers:
            watcher()

    def _send(self, event: Event) -> None:
        if not isinstance(event, self.event_type):
            raise TypeError(f"channel {self.name} carries {self.event_type.__name__}, not {event!r}")
        for listener in tuple(self._taps):
            listener(event)
        copies, extra_ns = 1, 0
        for fault in tuple(self._faults):
            if not self._hit(fault):
                continue
            if fault.kind == "fail":
                self._lost("injected failure")
                text = f"channel {self.name}: injected {errnos.errorcode[fault.argument]}"
                raise KvmError(fault.argument, text)
            if fault.kind == "drop":
                self._lost("injected fault")
                return
            if fault.kind == "duplicate":
                copies += 1
            else:
                extra_ns += fault.argument
        now = self.engine.now if self.engine is not None else 0
        for _ in range(copies):
            if self._holding:
                self._held.append((event, extra_ns, now))
            else:
                self._depart(event, self._latency_ns + extra_ns, now)

    def _hit(self, fault: Fault[Event]) -> bool:
        if fault.probability < 1 and self._draw is not None and self._draw.random() >= fault.probability:
            return False
        fault.hits += 1
        self._hits[fault.kind] = self._hits.get(fault.kind, 0) + 1
        if fault.left is not None:
            fault.left -= 1
            if not fault.left:
                fault.lift()
        return True

    def _lost(self, reason: str) -> None:
        if self.ledger is not None:
            self.ledger.raised += 1
            self.ledger.drop(reason)

    def _depart(self, event: Event, under_way_ns: int, sent_at: int) -> None:
        if not under_way_ns or self.engine is None or self._flight_timer is None:
            self._arrive(event, sent_at)
            return
        self._seq += 1
        heappush(self._flights, (self.engine.now + under_way_ns, self._seq, event, sent_at))
        self._flight_timer.arm(self._flights[0][0])

    def _land(self) -> None:
        assert self.engine is not None
        assert self._flight_timer is not None
        flights = self._flights
        try:
            while flights and flights[0][0] <= self.engine.now:
                _, _, event, sent_at = heappop(flights)
                self._arrive(event, sent_at)
        finally:
            if flights:
                self._flight_timer.arm(flights[0][0])

    def _arrive(self, event: Event, sent_at: int) -> None:
        if self._sink is None:
            if self._waiting is None or not self._waiting.wake_one(event):
                self._arrived.append(event)
            return
        if self.on_origin is None:
            self._sink(event)
            return
        self.on_origin(sent_at)
        try:
            self._sink(event)
        finally:
            self.on_origin(None)

    def _under_way(self) -> int:
        return len(self._flights) + len(self._held) + (len(self._arrived) if self._sink is None else 0)
