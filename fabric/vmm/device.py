"""Device backends: tasks of the VMM that serve doorbells and raise interrupts.

Each is the far side of :mod:`fabric.guest.pci`: the guest's driver programs MSI-X entries and rings by MMIO exits,
rings doorbells through ioeventfds, and is interrupted through irqfds.

A device may be stopped, by cancelling its tasks, and started again: it goes on with what it had under way. So what a
task knows and nobody else it keeps in the device when it ends.
"""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

import trio

from fabric.clock import Priority, WaitQueue, current_engine
from fabric.guest.driver import MsiMessage
from fabric.guest.pci import (
    DOORBELLS,
    MSIX_CONTROL,
    MSIX_DATA,
    MSIX_ENTRY,
    MSIX_TABLE,
    RING_COMPLETED,
    RING_SUBMITTED,
    RINGS,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fabric.guest.workload import Interval
    from fabric.kvm import EventFd
    from fabric.vmm.machine import Machine


class Device:
    """A device with ``vectors`` MSI-X vectors and ``queues`` rings with doorbells."""

    def __init__(self, name: str, *, vectors: int, queues: int = 0) -> None:
        engine = current_engine()
        if engine is None:
            raise RuntimeError("a device runs inside a simulation only")
        self.engine = engine
        self.name = name
        self.devid = 0
        self.bar = 0
        self.machine: Machine | None = None
        self.interrupts: list[EventFd | None] = [None] * vectors
        """For each vector what raises it, once the guest has programmed and unmasked it."""
        self.rings = [0] * queues
        self.doorbells: list[EventFd] = []
        self.spurned = 0
        """Interrupts the device had no vector for: the guest had not programmed it."""
        self._table: list[list[int]] = [[0, 0, 1] for _ in range(vectors)]

    def plug(self, machine: Machine, devid: int, bar: int) -> None:
        """The machine gives it its place."""
        self.machine = machine
        self.devid = devid
        self.bar = bar
        self.doorbells = [machine.doorbell(bar + DOORBELLS + 4 * queue) for queue in range(len(self.rings))]

    def replug(self, machine: Machine) -> None:
        """Go on in another machine, in the place it has, while its tasks stand still: its eventfds are made anew."""
        rung = [doorbell.event.count for doorbell in self.doorbells]
        self.plug(machine, self.devid, self.bar)
        for doorbell, count in zip(self.doorbells, rung, strict=True):
            if count:
                doorbell.signal(count)
        for vector, (address, data, _) in enumerate(self._table):
            if self.interrupts[vector] is not None:
                self.interrupts[vector] = machine.interrupt(MsiMessage(address, data, self.devid))

    def start(self, nursery: trio.Nursery) -> None:
        """Start its tasks."""

    def raise_vector(self, vector: int) -> None:
        """Raise MSI-X vector ``vector``."""
        event = self.interrupts[vector]
        if event is None:
            self.spurned += 1
        else:
            event.signal()

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes a register. What is no register takes writes without effect."""
        vector, field = divmod(offset - MSIX_TABLE, MSIX_ENTRY)
        if 0 <= vector < len(self.interrupts):
            self._table[vector][{0: 0, MSIX_DATA: 1, MSIX_CONTROL: 2}.get(field, 0)] = value
            if field == MSIX_CONTROL:
                self._program(vector)
            return
        queue, rest = divmod(offset - RINGS, 8)
        if not rest and 0 <= queue < len(self.rings):
            self.rings[queue] = value

    def read(self, offset: int, size: int) -> int:
        """The guest reads a register; there are none to read."""
        return 0

    def _program(self, vector: int) -> None:
        assert self.machine is not None
        address, data, masked = self._table[vector]
        if masked & 1:
            self.interrupts[vector] = None
        elif self.interrupts[vector] is None:
            self.interrupts[vector] = self.machine.interrupt(MsiMessage(address, data, self.devid))

    def _counter(self, ring: int) -> int:
        assert self.machine is not None
        return int.from_bytes(self.machine.read_memory(ring + RING_SUBMITTED, 4), "little")

    def _complete(self, queue: int, completed: int) -> None:
        assert self.machine is not None
        self.machine.write_memory(self.rings[queue] + RING_COMPLETED, (completed & 0xFFFF_FFFF).to_bytes(4, "little"))


class BlockDevice(Device):
    """Takes requests by doorbell; each is done ``service_ns`` later, and every completion is an interrupt.

    A queue works on all its requests at once, and completes them in order, as all take the same time.
    """

    def __init__(self, name: str, queues: int, service_ns: int) -> None:
        super().__init__(name, vectors=queues, queues=queues)
        self.service_ns = service_ns
        self.requests = 0
        self._seen = [0] * queues
        """Of each queue: requests that were taken, as its ring counts them."""
        self._completed = [0] * queues
        self._accepted: list[deque[int]] = [deque() for _ in range(queues)]
        """When each of the requests under way will be done."""

    def start(self, nursery: trio.Nursery) -> None:
        """For each queue a task that takes requests and one that completes them."""
        for queue in range(len(self.rings)):
            accepted = self._accepted[queue]
            work = WaitQueue(self.engine, f"requests to {self.name} queue {queue}")
            nursery.start_soon(self._accept, queue, accepted, work, name=f"{self.name}.{queue} submissions")
            nursery.start_soon(self._serve, queue, accepted, work, name=f"{self.name}.{queue} completions")

    async def _accept(self, queue: int, accepted: deque[int], work: WaitQueue) -> None:
        self.engine.set_priority(Priority.DEVICE)
        seen = self._seen[queue]
        try:
            while True:
                await self.doorbells[queue].wait()
                submitted = self._counter(self.rings[queue])
                count = submitted - seen & 0xFFFF_FFFF
                seen = submitted
                self.requests += count
                accepted.extend([self.engine.now + self.service_ns] * count)
                if accepted:
                    work.wake_one()
        finally:
            self._seen[queue] = seen

    async def _serve(self, queue: int, accepted: deque[int], work: WaitQueue) -> None:
        engine = self.engine
        engine.set_priority(Priority.DEVICE)
        completed = self._completed[queue]
        try:
            while True:
                if not accepted:
                    await work.wait()
                    continue
                due = accepted[0]
                if due > engine.now:
                    await engine.sleep(due - engine.now)
                accepted.popleft()
                completed += 1
                self._complete(queue, completed)
                self.raise_vector(queue)
        finally:
            self._completed[queue] = completed


class NetworkDevice(Device):
    """Receives packets at intervals of its own; announces them at once, or gathered as ethtool's coalescing does."""

    def __init__(
        self, name: str, intervals: Sequence[Interval], *, coalesce_packets: int = 1, coalesce_ns: int = 0
    ) -> None:
        super().__init__(name, vectors=len(intervals), queues=len(intervals))
        self.intervals = intervals
        self.coalesce_packets = coalesce_packets
        self.coalesce_ns = coalesce_ns
        self.packets = 0
        self._traffic = [(0, 0, 0, 0)] * len(intervals)
        """Of each queue: packets received and gathered; when the next comes, and when those gathered are announced."""

    def start(self, nursery: trio.Nursery) -> None:
        """A task for each queue that receives."""
        for queue, interval in enumerate(self.intervals):
            nursery.start_soon(self._receive, queue, interval, name=f"{self.name}.{queue} receive")

    async def _receive(self, queue: int, interval: Interval) -> None:
        engine = self.engine
        engine.set_priority(Priority.DEVICE)
        received, gathered, due, announce_at = self._traffic[queue]

        def announce() -> None:
            nonlocal gathered, announce_at
            gathered = announce_at = 0
            timer.cancel()
            self._complete(queue, received)
            self.raise_vector(queue)

        timer = engine.timer(announce, name=f"{self.name}.{queue} coalescing")
        if announce_at:
            timer.arm(max(announce_at, engine.now))
        try:
            while True:
                due = due or engine.now + interval.draw()
                if due > engine.now:
                    await engine.sleep(due - engine.now)
                due = 0
                if not self.rings[queue]:
                    continue  # the link is not up before the driver is
                received += 1
                gathered += 1
                self.packets += 1
                if gathered >= self.coalesce_packets:
                    announce()
                elif gathered == 1 and self.coalesce_ns:
                    announce_at = engine.now + self.coalesce_ns
                    timer.arm(announce_at)
        finally:
            timer.cancel()
            self._traffic[queue] = received, gathered, due, announce_at


class RecordedSource(Device):
    """Raises its vectors at recorded times, and says how long the handler is to work for each.

    ``arrivals`` are ``(at_ns, vector, handler_ns)`` in time order, times from :meth:`go`.
    """

    def __init__(self, name: str, vectors: int, arrivals: Iterable[tuple[int, int, int]]) -> None:
        super().__init__(name, vectors=vectors)
        self.arrivals = iter(arrivals)
        """Those to come."""
        self.work: Sequence[deque[int]] = [deque() for _ in range(vectors)]
        """For each vector, ``handler_ns`` of what was raised; the guest's handler takes it from there."""
        self.played = 0
        """How many of the arrivals have been raised."""
        self._start_ns: int | None = None
        self._go = WaitQueue(self.engine, f"the start of {name}")

    def go(self, start_ns: int) -> None:
        """The recording begins at ``start_ns``."""
        self._start_ns = start_ns
        self._go.wake_all()

    def start(self, nursery: trio.Nursery) -> None:
        """One task plays the recording."""
        nursery.start_soon(self._play, name=f"{self.name} recording")

    async def _play(self) -> None:
        engine = self.engine
        engine.set_priority(Priority.DEVICE)
        if self._start_ns is None:
            await self._go.wait()
        assert self._start_ns is not None
        start_ns = self._start_ns
        work = self.work
        for at_ns, vector, handler_ns in self.arrivals:
            due = start_ns + at_ns
            if due > engine.now:
                try:
                    await engine.sleep(due - engine.now)
                except trio.Cancelled:
                    self.arrivals = chain([(at_ns, vector, handler_ns)], self.arrivals)
                    raise
            work[vector].append(handler_ns)
            self.raise_vector(vector)
            self.played += 1
