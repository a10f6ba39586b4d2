"""msi-storm in bare SimPy and as a hand-written event loop: what fabric is measured beside.

Neither knows anything of a GIC: a dict takes (device, event) to (vCPU, LPI, priority), a set says what is pending,
a heap per vCPU orders it. They are written as their users would write them for speed, and do the same work as
fabric's run: the same arrivals, the same handler time, the same coalescing.
"""

from __future__ import annotations

import random
from heapq import heappop, heappush

import attrs
import simpy

HANDLER_NS = 2_000
EVENTS_PER_DEVICE = 4
FIRST_LPI = 8192


@attrs.frozen
class Storm:
    """The work of one run: for each device its arrivals, for each event its LPI."""

    devices: int
    vcpus: int
    arrivals: list[list[tuple[int, int]]]
    """For each device: (gap in ns since its last MSI, event id)."""
    routes: dict[tuple[int, int], tuple[int, int, int]]
    """(device id, event id) -> (vCPU, LPI, priority)."""

    @classmethod
    def make(cls, devices: int, vcpus: int, interrupts: int, seed: int = 1) -> Storm:
        """``interrupts`` MSIs in all, exponential in time, at 50 % load of each vCPU."""
        routes = {}
        lpi = FIRST_LPI
        for device in range(devices):
            for event in range(EVENTS_PER_DEVICE):
                routes[device, event] = (lpi % vcpus, lpi, 0xA0 + (lpi * 7 % 4) * 8)
                lpi += 1
        mean = 2 * HANDLER_NS * devices / vcpus
        arrivals = []
        for device in range(devices):
            source = random.Random(f"{seed}/{device}")
            count = interrupts // devices
            arrivals.append(
                [(1 + int(source.expovariate(1 / mean)), source.randrange(EVENTS_PER_DEVICE)) for _ in range(count)]
            )
        return cls(devices, vcpus, arrivals, routes)


def run_simpy(storm: Storm) -> tuple[int, int]:
    """Delivered and coalesced interrupts of ``storm`` in SimPy: an Event per idle vCPU."""
    env = simpy.Environment()
    routes = storm.routes
    pending: set[int] = set()
    queues: list[list[tuple[int, int, int]]] = [[] for _ in range(storm.vcpus)]
    idle: list[simpy.Event | None] = [None] * storm.vcpus
    delivered = coalesced = sequence = 0

    def device(number, arrivals):
        nonlocal coalesced, sequence
        timeout = env.timeout
        for gap, event in arrivals:
            yield timeout(gap)
            vcpu, lpi, priority = routes[number, event]
            if lpi in pending:
                coalesced += 1
                continue
            pending.add(lpi)
            sequence += 1
            heappush(queues[vcpu], (priority, sequence, lpi))
            waiter = idle[vcpu]
            if waiter is not None:
                idle[vcpu] = None
                waiter.succeed()

    def vcpu_loop(number):
        nonlocal delivered
        queue = queues[number]
        timeout = env.timeout
        while True:
            if not queue:
                waiter = idle[number] = env.event()
                yield waiter
            lpi = heappop(queue)[2]
            pending.discard(lpi)
            delivered += 1
            yield timeout(HANDLER_NS)

    for number in range(storm.vcpus):
        env.process(vcpu_loop(number))
    for number, arrivals in enumerate(storm.arrivals):
        env.process(device(number, arrivals))
    env.run()
    return delivered, coalesced


def run_heapq(storm: Storm) -> tuple[int, int]:
    """The same with no engine: one heap of events and a loop, everything inlined."""
    routes = storm.routes
    pending: set[int] = set()
    queues: list[list[tuple[int, int, int]]] = [[] for _ in range(storm.vcpus)]
    busy = [False] * storm.vcpus
    sources = [iter(arrivals) for arrivals in storm.arrivals]
    delivered = coalesced = sequence = 0
    # (time, sequence, device or -1 - vcpu, event)
    events: list[tuple[int, int, int, int]] = []
    for number, source in enumerate(sources):
        first = next(source, None)
        if first is not None:
            sequence += 1
            heappush(events, (first[0], sequence, number, first[1]))
    while events:
        now, _, who, event = heappop(events)
        if who >= 0:
            vcpu, lpi, priority = routes[who, event]
            if lpi in pending:
                coalesced += 1
            else:
                pending.add(lpi)
                sequence += 1
                heappush(queues[vcpu], (priority, sequence, lpi))
            following = next(sources[who], None)
            if following is not None:
                sequence += 1
                heappush(events, (now + following[0], sequence, who, following[1]))
            if busy[vcpu]:
                continue
        else:
            vcpu = -1 - who
            busy[vcpu] = False
        queue = queues[vcpu]
        if queue:
            lpi = heappop(queue)[2]
            pending.discard(lpi)
            delivered += 1
            busy[vcpu] = True
            sequence += 1
            heappush(events, (now + HANDLER_NS, sequence, -1 - vcpu, 0))
    return delivered, coalesced
