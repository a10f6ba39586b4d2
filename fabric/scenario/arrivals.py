"""The interrupts of a trace as a load: who interrupts which CPU, when, and how long the handler ran.

A trace shows interrupts on one of two layers. ``irq:``, ``irq_vectors:`` and ``ipi:`` events are those the traced
kernel took itself. ``kvm:`` events are those its guests got; one interrupt passes several of them in one call
chain (a line moves, becomes a message, is accepted by a vCPU), which makes it one arrival here, named after the
first and aimed at the vCPU of the last.

Then :func:`spread` maps the CPUs of the trace onto those of a guest, and :func:`scale` stretches the time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from itertools import count
from typing import Literal

import attrs

from fabric.scenario.ftrace import (
    IPI_ENTRY,
    IPI_EXIT,
    IPI_SEND,
    IRQ_ENTRY,
    IRQ_EXIT,
    KVM_ACCEPTED,
    KVM_INJECTED,
    KVM_IPI,
    KVM_LINE,
    KVM_ROUTED,
    VECTOR_ENTRY,
    VECTOR_EXIT,
    Trace,
    TraceEvent,
)
from fabric.trace.histogram import Histogram

DEVICE, TIMER, IPI = "device", "timer", "ipi"
Layer = Literal["irq", "kvm"]

# Names request_irq() is given for clock event devices and, where IPIs are ordinary interrupts, for those.
_TIMER_NAME = re.compile(r"(?:arch_(?:mem_|sys_)?|kvm guest .?|riscv-)?timer|hpet\d*", re.IGNORECASE)
_IPI_NAME = re.compile(r"\bIPI\b")

# The events of irq_vectors: by the stem of their name; the others (error_apic, thermal_apic, ...) are devices.
_VECTOR_KINDS = {
    "local_timer": TIMER,
    "reschedule": IPI,
    "call_function": IPI,
    "call_function_single": IPI,
    "x86_platform_ipi": IPI,
    "irq_work": IPI,
    "reboot": IPI,
}

# The same interrupts by vector, for a Linux guest seen from its host (arch/x86/include/asm/irq_vectors.h; the
# timer was 0xef until 4.14).
_LINUX_VECTORS = {
    0xEC: (TIMER, "local_timer"),
    0xEF: (TIMER, "local_timer"),
    0xF6: (IPI, "irq_work"),
    0xF7: (IPI, "x86_platform_ipi"),
    0xF8: (IPI, "reboot"),
    0xFB: (IPI, "call_function_single"),
    0xFC: (IPI, "call_function"),
    0xFD: (IPI, "reschedule"),
}

# PPIs of the arm timers as the server base system architecture assigns them.
_ARM_TIMER_PPIS = {26, 27, 28, 30}

# The events of one injection follow each other at once, in one task.
_CHAIN_NS = 1_000_000
_STAGE = {KVM_LINE: 0, KVM_IPI: 0, KVM_ROUTED: 1, KVM_ACCEPTED: 2}
_VCPU_THREAD = re.compile(r"CPU (\d+)/KVM")


@attrs.define(slots=True)
class Arrival:
    """One interrupt reaching one CPU."""

    at_ns: int
    """Nanoseconds since the first arrival."""
    cpu: int
    """The CPU of the trace (for ``kvm:`` events the guest's); after :func:`spread` the vCPU."""
    kind: str
    """``device``, ``timer`` or ``ipi``."""
    source: str
    """``virtio1-req.0``, ``local_timer``, ``reschedule``, ``gsi 24``, ..."""
    vector: int
    """The irq, vector or INTID in the trace; -1 without one."""
    sender: int = -1
    """The CPU an IPI came from; -1 for the others."""
    duration_ns: int | None = None
    """How long the handler ran, where the trace has its end."""


@attrs.define(slots=True)
class Source:
    """All arrivals of one source."""

    name: str
    kind: str
    vector: int
    arrivals: int = 0
    cpus: dict[int, int] = attrs.field(factory=dict)
    """Arrivals by CPU."""
    durations: Histogram = attrs.field(factory=Histogram)
    """Handler run times, of the arrivals that have one."""


def arrivals(trace: Trace, layer: Layer | None = None) -> list[Arrival]:
    """The interrupts of a trace in time order, the first at 0.

    ``layer`` chooses which events count; by default ``kvm`` if that gives any arrival, else ``irq``. The list is
    empty if the trace has events but no interrupt of the layer.
    """
    found = _of_guest(trace.events) if layer != "irq" else []
    if not found and layer != "kvm":
        found = _of_kernel(trace.events)
    if found:
        start = found[0].at_ns
        for arrival in found:
            arrival.at_ns -= start
    return found


def sources(of: Iterable[Arrival]) -> list[Source]:
    """The arrivals by source, in order of first appearance."""
    found: dict[str, Source] = {}
    durations: dict[str, list[int]] = {}
    for arrival in of:
        source = found.get(arrival.source)
        if source is None:
            source = found[arrival.source] = Source(arrival.source, arrival.kind, arrival.vector)
            durations[arrival.source] = []
        source.arrivals += 1
        source.cpus[arrival.cpu] = source.cpus.get(arrival.cpu, 0) + 1
        if arrival.duration_ns is not None:
            durations[arrival.source].append(arrival.duration_ns)
    for source in found.values():
        source.cpus = dict(sorted(source.cpus.items()))
        source.durations.record_many(durations[source.name])
    return list(found.values())


def scale(of: Iterable[Arrival], factor: Fraction | int) -> list[Arrival]:
    """The arrivals with all times multiplied by ``factor`` (1/2: twice as fast); handler run times stay."""
    exact = Fraction(factor)
    if exact <= 0:
        raise ValueError(f"the factor must be > 0, not {factor}")
    numerator, denominator = exact.as_integer_ratio()
    return [_moved(one, one.at_ns * numerator // denominator, one.cpu, one.sender) for one in of]


def spread(of: Iterable[Arrival], vcpus: int, by: Literal["turn", "source"] = "turn") -> list[Arrival]:
    """The arrivals on the ``vcpus`` vCPUs of a guest instead of the M CPUs of the trace.

    CPU number c of those that occur (in order, from 0) stands for the vCPUs v with ``v % M == c``; with fewer
    vCPUs than CPUs it is vCPU ``c % vcpus``. Among its vCPUs the interrupts of each source take turns, as if it
    were a device with a queue for each; with ``by="source"`` every source keeps to one vCPU. An IPI keeps
    coming from a vCPU of the CPU that sent it.
    """
    if vcpus < 1:
        raise ValueError(f"vcpus must be >= 1, not {vcpus!r}")
    given = list(of)
    occurring = sorted({arrival.cpu for arrival in given} | {arrival.sender for arrival in given} - {-1})
    number = {cpu: c for c, cpu in enumerate(occurring)}
    stride = len(occurring)
    share = [range(c, vcpus, stride) or range(c % vcpus, c % vcpus + 1) for c in range(stride)]

    # Each source on a CPU starts at another vCPU, so that rare ones do not all meet on the first.
    first = [count() for _ in range(stride)]
    turns: dict[tuple[int, str], count[int]] = {}
    fixed: dict[tuple[int, str], int] = {}
    result = []
    for arrival in given:
        c = number[arrival.cpu]
        key = (c, arrival.source)
        if key not in turns:
            fixed[key] = next(first[c])
            turns[key] = count(fixed[key])
        turn = next(turns[key]) if by == "turn" else fixed[key]
        to = share[c]
        sender = -1
        if arrival.sender >= 0:
            from_ = share[number[arrival.sender]]
            sender = from_[turn % len(from_)]
        result.append(_moved(arrival, arrival.at_ns, to[turn % len(to)], sender))
    return result


def _moved(arrival: Arrival, at_ns: int, cpu: int, sender: int) -> Arrival:
    return Arrival(at_ns, cpu, arrival.kind, arrival.source, arrival.vector, sender, arrival.duration_ns)


class _LastSeen:
    """The two CPUs that were interrupted last: one of them is the likely sender of an IPI to the other.

    Most traces do not say who sent an IPI. Of two CPUs it can only be the other one; of more, the other one that
    was last busy handling interrupts is a guess that at least keeps traffic among the busy.
    """

    __slots__ = ("before", "latest")

    def __init__(self) -> None:
        self.latest = self.before = -1

    def saw(self, cpu: int) -> None:
        if cpu != self.latest:
            self.before, self.latest = self.latest, cpu

    def other_than(self, cpu: int) -> int:
        other = self.before if cpu == self.latest else self.latest
        return cpu if other < 0 else other


def _of_kernel(events: list[TraceEvent]) -> list[Arrival]:
    """What the traced kernel took itself."""
    # arm64 kernels show an IPI as an irq named IPI and, if the ipi: events were on, once more by its purpose.
    named_ipis = any(event.kind == IPI_ENTRY for event in events)
    found: list[Arrival] = []
    running: dict[tuple[int, str], Arrival] = {}
    shared: dict[int, Arrival] = {}
    sent: dict[int, int] = {}
    seen = _LastSeen()
    for event in events:
        cpu = max(event.cpu, 0)
        kind = event.kind
        if kind == IRQ_ENTRY:
            key = (cpu, f"irq {event.vector}")
            kind = _kind_of_irq(event.source)
            if kind == IPI and named_ipis:
                continue
            # Of handlers that share an irq all are called: the one after an "unhandled" is the same interrupt.
            arrival = shared.pop(cpu, None)
            if arrival is not None and arrival.vector == event.vector and arrival.source != event.source:
                arrival.source = event.source
                arrival.kind = kind
                running[key] = arrival
                continue
        elif kind == VECTOR_ENTRY:
            key = (cpu, event.source)
            kind = _VECTOR_KINDS.get(event.source, DEVICE)
        elif kind == IPI_ENTRY:
            key = (cpu, event.source)
            kind = IPI
        elif kind in (IRQ_EXIT, VECTOR_EXIT, IPI_EXIT):
            ended = running.pop((cpu, event.source), None)
            if ended is not None:
                ended.duration_ns = event.at_ns - ended.at_ns
                if not event.value:
                    shared[cpu] = ended
            continue
        elif kind == IPI_SEND:
            sent[event.target] = cpu
            continue
        else:
            continue
        sender = -1
        if kind == IPI:
            sender = sent.pop(cpu, -1)
            if sender < 0:
                sender = seen.other_than(cpu)
        arrival = Arrival(event.at_ns, cpu, kind, event.source, event.vector, sender)
        running[key] = arrival
        seen.saw(cpu)
        found.append(arrival)
    return found


@lru_cache(maxsize=4096)
def _kind_of_irq(name: str) -> str:
    if _TIMER_NAME.fullmatch(name):
        return TIMER
    return IPI if _IPI_NAME.search(name) else DEVICE


@attrs.define(slots=True)
class _Chain:
    """The injection under way in one task."""

    stage: int
    arrival: Arrival
    at_ns: int


def _of_guest(events: list[TraceEvent]) -> list[Arrival]:
    """What the traced host's guests got."""
    found: list[Arrival] = []
    chains: dict[tuple[int, int], _Chain] = {}
    seen = _LastSeen()
    for event in events:
        stage = _STAGE.get(event.kind)
        if stage is None or not event.value:
            continue
        task = (event.cpu, event.pid)  # the idle tasks of all CPUs have pid 0
        chain = chains.get(task)
        if chain is not None and event.at_ns - chain.at_ns > _CHAIN_NS:
            chain = None
        if chain is not None and stage and (stage > chain.stage or stage == chain.stage == 1):
            chain.stage = stage
            chain.arrival.cpu = event.target if event.target >= 0 else chain.arrival.cpu
            if stage == 2:
                chain.arrival.vector = event.vector
                seen.saw(chain.arrival.cpu)
            continue
        cpu = event.target if event.target >= 0 else max(event.cpu, 0)
        if chain is not None and stage == chain.stage == 2 and chain.arrival.vector == event.vector:
            # One message to several vCPUs: each accepts it.
            found.append(attrs.evolve(chain.arrival, at_ns=event.at_ns, cpu=cpu))
            continue
        kind, source = _kind_in_guest(event)
        arrival = Arrival(event.at_ns, cpu, kind, source, event.vector)
        if kind == IPI:
            thread = _VCPU_THREAD.match(event.comm)
            arrival.sender = int(thread[1]) if thread else seen.other_than(cpu)
        chains[task] = _Chain(stage, arrival, event.at_ns)
        found.append(arrival)
    return found or _injected(events)


def _injected(events: list[TraceEvent]) -> list[Arrival]:
    """The interrupts that vCPUs saw on entry, for a host that traced nothing earlier."""
    threads: dict[int, int] = {}
    found = []
    for event in events:
        if event.kind == KVM_INJECTED:
            thread = _VCPU_THREAD.match(event.comm)
            cpu = int(thread[1]) if thread else threads.setdefault(event.pid, len(threads))
            kind, source = _kind_in_guest(event)
            found.append(Arrival(event.at_ns, cpu, kind, source, event.vector, cpu if kind == IPI else -1))
    return found


def _kind_in_guest(event: TraceEvent) -> tuple[str, str]:
    """Class and name of an interrupt of a guest, by its number where nothing else says it."""
    if event.kind == KVM_IPI:
        return IPI, _LINUX_VECTORS.get(event.vector, (IPI, event.source))[1]
    if event.source.startswith("intid "):
        if event.vector < 16:
            return IPI, event.source
        return TIMER if event.vector in _ARM_TIMER_PPIS else DEVICE, event.source
    if event.kind in (KVM_ACCEPTED, KVM_INJECTED):
        return _LINUX_VECTORS.get(event.vector, (DEVICE, event.source))
    return DEVICE, event.source
