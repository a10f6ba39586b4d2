"""What the guest does: drivers of block and network devices, ticks, IPIs, and a replayed recording.

A :class:`Guest` is one guest operating system: it boots, gives its devices their vectors, and then every CPU
runs an agenda of timed actions (submit a request, send an IPI, compute) and otherwise waits for interrupts. It
is written against :class:`fabric.guest.driver.InterruptDriver` and runs on every board unchanged.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any

import attrs

from fabric.clock import WaitQueue, current_engine
from fabric.guest.driver import Pages, Vector
from fabric.guest.pci import DOORBELLS, RING_COMPLETED, RING_SIZE, RING_SUBMITTED, RINGS, write_msix

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from fabric.guest.driver import InterruptDriver

    Action = Callable[[Any], Awaitable[int | None]]
    """Something to do at a time: ``await action(cpu)``; returns when to do it again, or None."""


class Agenda:
    """What one CPU has to do, and when: a heap of actions, first come first served within an instant."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Action]] = []
        self._seq = 0

    def add(self, at_ns: int, action: Action) -> None:
        """Do ``action`` at ``at_ns``."""
        self._seq += 1
        heappush(self._heap, (at_ns, self._seq, action))

    async def follow(self, cpu: Any) -> None:
        """Do it all, in order, waiting for interrupts in between; for ever."""
        heap = self._heap
        while True:
            if not heap:
                await cpu.wait_for_interrupt()
            elif heap[0][0] > cpu.now:
                await cpu.wait_for_interrupt(heap[0][0])
            else:
                _, _, action = heappop(heap)
                again = await action(cpu)
                if again is not None:
                    self.add(again, action)


@attrs.define(eq=False)
class Interval:
    """Times of a stream of events: constant, or exponential around a mean, drawn from a source of its own."""

    mean_ns: float
    exponential: bool
    source: Any

    def draw(self) -> int:
        """Nanoseconds to the next event, at least 1."""
        return max(1, round(self.source.expovariate(1 / self.mean_ns) if self.exponential else self.mean_ns))


class Load:
    """A part of a guest's work. ``set_up`` runs on the boot CPU, ``begin`` fills the agendas when all is up."""

    async def set_up(self, guest: Guest, cpu: Any) -> None:
        """Allocate rings and vectors, program the device."""

    def begin(self, guest: Guest, start_ns: int) -> None:
        """Put the first actions on the agendas."""


class DeviceDriver(Load):
    """The guest's driver of one device with queues; a vector a queue, queue q on CPU ``q % cpus``."""

    def __init__(self, name: str, devid: int, bar: int, queues: int, handler_ns: int) -> None:
        self.name = name
        self.devid = devid
        self.bar = bar
        self.queues = queues
        self.handler_ns = handler_ns
        self.rings: list[int] = []
        self.completed = [0] * queues
        """How many completions the driver has seen, by queue."""

    async def set_up(self, guest: Guest, cpu: Any) -> None:
        """Vectors, then rings: a queue that has a ring is in use."""
        vectors = [
            Vector(queue % guest.cpus, self._handler(queue), f"{self.name}.{queue}") for queue in range(self.queues)
        ]
        await write_msix(cpu, self.bar, await guest.driver.allocate_msi(cpu, self.devid, vectors))
        self.rings = [guest.pages.take(RING_SIZE, RING_SIZE) for _ in range(self.queues)]
        for queue, ring in enumerate(self.rings):
            await cpu.store(self.bar + RINGS + 8 * queue, 8, ring)

    def _handler(self, queue: int) -> Callable[[Any], Awaitable[None]]:
        async def handler(cpu: Any) -> None:
            self.completed[queue] = await cpu.load(self.rings[queue] + RING_COMPLETED, 4)
            await cpu.compute(self.handler_ns)

        return handler


class BlockDriver(DeviceDriver):
    """Submits requests at given intervals; each completion is an interrupt."""

    def __init__(self, name: str, devid: int, bar: int, handler_ns: int, intervals: Sequence[Interval]) -> None:
        super().__init__(name, devid, bar, len(intervals), handler_ns)
        self.intervals = intervals
        self.submitted = [0] * self.queues

    def begin(self, guest: Guest, start_ns: int) -> None:
        """Every queue submits from its CPU."""
        for queue, interval in enumerate(self.intervals):
            guest.agendas[queue % guest.cpus].add(start_ns + interval.draw(), self._submit(queue, interval))

    def _submit(self, queue: int, interval: Interval) -> Action:
        async def submit(cpu: Any) -> int:
            self.submitted[queue] += 1
            await cpu.store(self.rings[queue] + RING_SUBMITTED, 4, self.submitted[queue])
            await cpu.store(self.bar + DOORBELLS + 4 * queue, 4, queue)
            return int(cpu.now) + interval.draw()

        return submit


class Ticks(Load):
    """A timer interrupt on every CPU: periodic, or at the recorded ``(at_ns, handler_ns)`` of each CPU."""

    def __init__(
        self, handler_ns: int = 0, *, period_ns: int = 0, times: Sequence[Sequence[tuple[int, int]]] = ()
    ) -> None:
        self.handler_ns = handler_ns
        self.period_ns = period_ns
        self.times = times
        self.ticks = 0

    def begin(self, guest: Guest, start_ns: int) -> None:
        """Arm each CPU's timer for its first tick."""
        for number, agenda in enumerate(guest.agendas):
            times = iter(self.times[number]) if self.times else self._periodic()
            agenda.add(start_ns, self._start(guest.driver, times, start_ns))

    def _periodic(self) -> Iterator[tuple[int, int]]:
        return ((at_ns, self.handler_ns) for at_ns in count(self.period_ns, self.period_ns))

    def _start(self, driver: InterruptDriver, times: Iterator[tuple[int, int]], start_ns: int) -> Action:
        work_ns = 0

        async def handler(cpu: Any) -> None:
            self.ticks += 1
            await cpu.compute(work_ns)
            await arm(cpu)

        async def arm(cpu: Any) -> None:
            nonlocal work_ns
            following = next(times, None)
            if following is not None:
                work_ns = following[1]
                await driver.set_timer(cpu, start_ns + following[0], handler)

        return arm


class Ipis(Load):
    """IPIs of one kind from each CPU: at random intervals to a random other one, or as recorded.

    The handler of a recorded IPI works as long as the recording says, of any other ``handler_ns``.
    """

    def __init__(self, handler_ns: int, *, kind: int = 0, label: str = "IPI") -> None:
        self.handler_ns = handler_ns
        self.kind = kind
        self.label = label
        self.sent = 0
        self._plans: list[tuple[int, Callable[[int], Iterator[tuple[int, int, int]]]]] = []
        self._work: dict[int, deque[int]] = {}

    def at_random(self, sender: int, cpus: int, interval: Interval) -> None:
        """``sender`` interrupts a random other CPU at each interval."""

        def plan(start_ns: int) -> Iterator[tuple[int, int, int]]:
            at = start_ns
            while True:
                at += interval.draw()
                yield at, (sender + interval.source.randrange(1, cpus)) % cpus, self.handler_ns

        self._plans.append((sender, plan))

    def recorded(self, sender: int, sends: Sequence[tuple[int, int, int]]) -> None:
        """``sender`` interrupts CPU ``target`` at each ``(at_ns, target, handler_ns)``, times from the start."""
        self._plans.append((sender, lambda start_ns: ((start_ns + at, to, work_ns) for at, to, work_ns in sends)))

    async def set_up(self, guest: Guest, cpu: Any) -> None:
        """Say what an IPI does."""
        self._work = {number: deque() for number in range(guest.cpus)}

        async def handler(cpu: Any) -> None:
            await cpu.compute(_take_all(self._work[cpu.number]))

        guest.driver.on_ipi(handler, self.kind, self.label)

    def begin(self, guest: Guest, start_ns: int) -> None:
        """The first IPI of every sender."""
        for sender, plan in self._plans:
            sends = plan(start_ns)
            first = next(sends, None)
            if first is not None:
                guest.agendas[sender].add(first[0], self._send(guest.driver, sends, first))

    def _send(
        self, driver: InterruptDriver, sends: Iterator[tuple[int, int, int]], upcoming: tuple[int, int, int]
    ) -> Action:
        async def send(cpu: Any) -> int | None:
            nonlocal upcoming
            _, target, work_ns = upcoming
            self._work[target].append(work_ns)
            self.sent += 1
            await driver.send_ipi(cpu, target, self.kind)
            following = next(sends, None)
            if following is None:
                return None
            upcoming = following
            return max(following[0], int(cpu.now))

        return send


class Busy(Load):
    """Computation between interrupts: ``busy_ns`` of every ``period_ns`` on each CPU, one CPU after the other."""

    def __init__(self, busy_ns: int, period_ns: int) -> None:
        self.busy_ns = busy_ns
        self.period_ns = period_ns

    def begin(self, guest: Guest, start_ns: int) -> None:
        """The CPUs' periods begin evenly spread, or all would want a physical CPU at the same moments."""

        async def period(cpu: Any) -> int:
            began = int(cpu.now)
            await cpu.compute(self.busy_ns)
            return max(began + self.period_ns, int(cpu.now) + 1)

        for number, agenda in enumerate(guest.agendas):
            agenda.add(start_ns + self.period_ns * number // guest.cpus, period)


class RecordedDevice(Load):
    """The guest's side of a source of a recording: a vector for each CPU the source interrupts."""

    def __init__(self, name: str, devid: int, bar: int, targets: Sequence[int]) -> None:
        self.name = name
        self.devid = devid
        self.bar = bar
        self.targets = targets
        self.work: list[deque[int]] = [deque() for _ in targets]
        """For each vector, how long the handler has to work for each interrupt raised since it last ran."""

    async def set_up(self, guest: Guest, cpu: Any) -> None:
        """A vector for each target."""
        vectors = [Vector(target, self._handler(place), self.name) for place, target in enumerate(self.targets)]
        await write_msix(cpu, self.bar, await guest.driver.allocate_msi(cpu, self.devid, vectors))

    def _handler(self, place: int) -> Callable[[Any], Awaitable[None]]:
        work = self.work[place]

        async def handler(cpu: Any) -> None:
            await cpu.compute(_take_all(work))

        return handler


def _take_all(work: deque[int]) -> int:
    """Interrupts that were merged into one leave the work of all of them."""
    if len(work) == 1:
        return work.popleft()
    ns = sum(work)
    work.clear()
    return ns


class Guest:
    """One guest operating system on ``cpus`` CPUs.

    Args:
      driver: of the board's interrupt controller.
      cpus: how many CPUs; CPU 0 boots and starts the others.
      pages: memory for rings.
      loads: its work.
      start_secondary: ``await start_secondary(cpu, number)`` on CPU 0 starts CPU ``number``.
    """

    def __init__(
        self,
        driver: InterruptDriver,
        cpus: int,
        pages: Pages,
        loads: Sequence[Load],
        start_secondary: Callable[[Any, int], Awaitable[object]],
    ) -> None:
        engine = current_engine()
        if engine is None:
            raise RuntimeError("a guest runs inside a simulation only")
        self.driver = driver
        self.cpus = cpus
        self.pages = pages
        self.loads = loads
        self.agendas = [Agenda() for _ in range(cpus)]
        self.start_ns: int | None = None
        """When all CPUs were up and the loads began."""
        self._start_secondary = start_secondary
        self._up = 0
        self._ready = WaitQueue(engine, "the guest to be up")

    async def program(self, cpu: Any) -> None:
        """What each of its CPUs runs."""
        if cpu.number == 0:
            await self.driver.start(cpu)
        await self.driver.start_cpu(cpu)
        self._up += 1
        if cpu.number == 0:
            for number in range(1, self.cpus):
                await self._start_secondary(cpu, number)
            while self._up < self.cpus:
                await cpu.compute(1_000)
            for load in self.loads:
                await load.set_up(self, cpu)
            self.start_ns = cpu.now
            for load in self.loads:
                load.begin(self, cpu.now)
            self._ready.wake_all()
            for number in range(1, self.cpus):
                await self.driver.send_ipi(cpu, number)
        cpu.unmask()
        await self.agendas[cpu.number].follow(cpu)

    async def ready(self) -> int:
        """Wait until the guest is up; the time its loads began."""
        if self.start_ns is None:
            await self._ready.wait()
        assert self.start_ns is not None
        return self.start_ns
