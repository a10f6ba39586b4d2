"""msi-storm in bare SimPy and as a hand-written event loop: what fabric is measured beside.

Neither knows anything of a GIC: a dict takes (device, event) to (vCPU, LPI, priority), a set says what is pending, a
heap per vCPU orders it. The SimPy model is written as its users would, with a function for each thing that happens;
the loop for speed, with everything inlined. Both do the same work as fabric's run: the same arrivals drawn from the
same sources as they go, the same handler time, the same coalescing.
"""

from __future__ import annotations

import random
from heapq import heappop, heappush

import attrs
import simpy

HANDLER_NS = 2_000
GRID_NS = 101
"""Arrivals are multiples of this. It is coprime to the handler time, so that no arrival falls on the end of a
handler: the order of the two is a choice of the model, and would make the engines' outcomes differ."""
FIRST_LPI = 8192


@attrs.frozen
class Outcome:
    """What a run did; equal for every engine."""

    delivered: int
    coalesced: int


@attrs.frozen
class Storm:
    """The work of one run: devices with some events each, exponential intervals, 50 % load of each vCPU."""

    devices: int
    vcpus: int
    interrupts: int
    events: int = 4
    """Events of a device, each with an LPI of its own."""
    seed: int = 1

    @property
    def per_device(self) -> int:
        """MSIs of one device."""
        return self.interrupts // self.devices

    @property
    def rate(self) -> float:
        """MSIs of one device in ``GRID_NS``."""
        return GRID_NS * self.vcpus / (2 * HANDLER_NS * self.devices)

    def source(self, device: int) -> random.Random:
        """Where ``device`` draws its gaps (``GRID_NS * (1 + int(expovariate(rate)))``) and events (``randrange``)."""
        return random.Random(f"{self.seed}/{device}")

    def route(self, device: int, event: int) -> tuple[int, int, int]:
        """(vCPU, LPI, priority) of an event.

        The LPIs of a vCPU differ in priority: the order of equal ones is a matter of the controller (a GIC as KVM
        has it keeps the place of an LPI that is raised again while it is handled).
        """
        number = device * self.events + event
        return number % self.vcpus, FIRST_LPI + number, 0x80 + number // self.vcpus % 8 * 8


def run_simpy(storm: Storm) -> Outcome:
    """``storm`` in SimPy: a process a device and a vCPU, an Event per idle vCPU."""
    env = simpy.Environment()
    routes = {
        (device, event): storm.route(device, event) for device in range(storm.devices) for event in range(storm.events)
    }
    pending: set[int] = set()
    queues: list[list[tuple[int, int, int]]] = [[] for _ in range(storm.vcpus)]
    idle: list[simpy.Event | None] = [None] * storm.vcpus
    active: list[int | None] = [None] * storm.vcpus
    delivered = coalesced = sequence = 0

    def raise_msi(device, event):
        nonlocal coalesced, sequence
        vcpu, lpi, priority = routes[device, event]
        if lpi in pending:
            coalesced += 1
            return
        pending.add(lpi)
        sequence += 1
        heappush(queues[vcpu], (priority, sequence, lpi))
        waiter = idle[vcpu]
        if waiter is not None:
            idle[vcpu] = None
            waiter.succeed()

    def acknowledge(vcpu):
        nonlocal delivered
        lpi = heappop(queues[vcpu])[2]
        pending.remove(lpi)
        delivered += 1
        active[vcpu] = lpi

    def end_of_interrupt(vcpu):
        active[vcpu] = None

    def device(number):
        source = storm.source(number)
        for _ in range(storm.per_device):
            yield env.timeout(GRID_NS * (1 + int(source.expovariate(storm.rate))))
            raise_msi(number, source.randrange(storm.events))

    def vcpu_loop(number):
        queue = queues[number]
        while True:
            if not queue:
                waiter = idle[number] = env.event()
                yield waiter
            acknowledge(number)
            yield env.timeout(HANDLER_NS)
            end_of_interrupt(number)

    for number in range(storm.vcpus):
        env.process(vcpu_loop(number))
    for number in range(storm.devices):
        env.process(device(number))
    env.run()
    return Outcome(delivered, coalesced)


def run_heapq(storm: Storm) -> Outcome:
    """The same with no engine: one heap of events and a loop, everything inlined."""
    routes = {
        (device, event): storm.route(device, event) for device in range(storm.devices) for event in range(storm.events)
    }
    pending: set[int] = set()
    queues: list[list[tuple[int, int, int]]] = [[] for _ in range(storm.vcpus)]
    busy = [False] * storm.vcpus
    rate = storm.rate
    sources = [storm.source(device) for device in range(storm.devices)]
    draws = [source.expovariate for source in sources]
    choose = [source.randrange for source in sources]
    left = [storm.per_device] * storm.devices
    delivered = coalesced = sequence = 0
    # (time, sequence, device or -1 - vCPU)
    events: list[tuple[int, int, int]] = []
    for number in range(storm.devices):
        sequence += 1
        heappush(events, (GRID_NS * (1 + int(draws[number](rate))), sequence, number))
    while events:
        now, _, who = heappop(events)
        if who >= 0:
            vcpu, lpi, priority = routes[who, choose[who](storm.events)]
            if lpi in pending:
                coalesced += 1
            else:
                pending.add(lpi)
                sequence += 1
                heappush(queues[vcpu], (priority, sequence, lpi))
            left[who] -= 1
            if left[who]:
                sequence += 1
                heappush(events, (now + GRID_NS * (1 + int(draws[who](rate))), sequence, who))
            if not busy[vcpu]:
                # Devices that raise at this instant come first, as in the other engines.
                busy[vcpu] = True
                sequence += 1
                heappush(events, (now, sequence, -1 - vcpu))
            continue
        vcpu = -1 - who
        busy[vcpu] = False
        queue = queues[vcpu]
        if queue:
            lpi = heappop(queue)[2]
            pending.remove(lpi)
            delivered += 1
            busy[vcpu] = True
            sequence += 1
            heappush(events, (now + HANDLER_NS, sequence, -1 - vcpu))
    return Outcome(delivered, coalesced)
