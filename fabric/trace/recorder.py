"""What happened to interrupts, and how long each stage took.

An interrupt is *raised* by its source, *pending* once the controller has it, *acknowledged* when the vCPU
takes it, and ends with its *EOI*. A :class:`Recorder` listens to a controller (it is an ``IrqEvents``) and
keeps the time of each stage for every interrupt and vCPU; views by source and by vCPU are merged from these
when asked for. So one interrupt costs a dict lookup a stage and appends to short lists, which are folded into
histograms now and then.

Raised and pending differ when a channel has latency: it says through :meth:`Recorder.set_origin` when the event
was sent that it delivers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import attrs

from fabric.trace.events import EventLog, event_format, quoted
from fabric.trace.histogram import Histogram

STAGES = ("raised_pending", "pending_acknowledged", "acknowledged_eoi", "raised_eoi")
"""The three stages of an interrupt's life and the whole of it, as named in stats.json."""

_RAISED = event_format("raised", source=str)
_PENDING = event_format("pending", cpu=int, intid=int, raised=int)
_COALESCED = event_format("coalesced", cpu=int, intid=int)
_ACKNOWLEDGED = event_format("acknowledged", cpu=int, intid=int)
_COMPLETED = event_format("completed", cpu=int, intid=int)
_DROPPED = event_format("dropped", cpu=int, intid=int, reason=str)

# Samples a lane holds before they are folded into its histograms.
_FOLD_AT = 256


class _Clock(Protocol):
    @property
    def now(self) -> int: ...


@attrs.define(slots=True)
class Passage:
    """What passed for one source, for one vCPU, or for all: counts, and a histogram a stage."""

    pended: int = 0
    """Interrupts that became pending."""
    coalesced: int = 0
    """Interrupts merged into one already pending."""
    dropped: int = 0
    """Interrupts thrown away."""
    stages: dict[str, Histogram] = attrs.field(factory=lambda: {stage: Histogram() for stage in STAGES})
    """Nanoseconds by stage. The first two count acknowledged interrupts, the last two ended ones."""

    def merge(self, other: Passage) -> None:
        """Add what passed elsewhere."""
        self.pended += other.pended
        self.coalesced += other.coalesced
        self.dropped += other.dropped
        for stage, histogram in other.stages.items():
            self.stages[stage].merge(histogram)

    def to_dict(self, *, buckets: bool = False) -> dict[str, Any]:
        """For stats.json: counts and a summary a stage, with ``buckets`` whole histograms."""
        stages = {name: h.to_dict() if buckets else h.summary() for name, h in self.stages.items()}
        return {"pended": self.pended, "coalesced": self.coalesced, "dropped": self.dropped, "stages": stages}


@attrs.frozen(slots=True)
class Statistics:
    """The results of a :class:`Recorder`."""

    total: Passage
    sources: dict[str, Passage]
    """By label, in alphabetical order."""
    vcpus: dict[int, Passage]
    """By vCPU index, in order; -1 stands for interrupts without a target."""

    def to_dict(self, *, buckets: bool = False) -> dict[str, Any]:
        """For stats.json; vCPU indices become strings, as JSON wants it."""
        return {
            "total": self.total.to_dict(buckets=buckets),
            "sources": {name: passage.to_dict(buckets=buckets) for name, passage in self.sources.items()},
            "vcpus": {str(cpu): passage.to_dict(buckets=buckets) for cpu, passage in self.vcpus.items()},
        }


class _Lane:
    """One interrupt on one vCPU: its counts and the samples not yet folded, a list a stage."""

    __slots__ = (
        "coalesced",
        "dropped",
        "pended",
        "samples",
        "stages",
        "to_ack",
        "to_eoi",
        "to_pending",
        "whole",
    )

    def __init__(self) -> None:
        self.pended = self.coalesced = self.dropped = 0
        self.to_pending: list[int] = []
        self.to_ack: list[int] = []
        self.to_eoi: list[int] = []
        self.whole: list[int] = []
        self.samples = (self.to_pending, self.to_ack, self.to_eoi, self.whole)
        self.stages = {stage: Histogram() for stage in STAGES}

    def fold(self) -> None:
        for samples, histogram in zip(self.samples, self.stages.values(), strict=True):
            histogram.record_many(samples)
            samples.clear()

    def passage(self) -> Passage:
        self.fold()
        return Passage(self.pended, self.coalesced, self.dropped, self.stages)


class _Line:
    """One interrupt: where it stands now (times, -1: not so), and its lane on each vCPU it went to.

    ``later``: when it became pending once more before it was taken, and when that was raised; oldest first. Only an
    SGI of a GICv2 does, which is pending for each of its senders.
    """

    __slots__ = ("cpu", "intid", "lane", "lanes", "later", "pending", "raised", "taken", "taken_raised")

    def __init__(self, intid: int, cpu: int) -> None:
        self.intid = intid
        self.raised = self.pending = -1
        self.taken = self.taken_raised = -1
        self.later: deque[tuple[int, int]] | None = None
        self.cpu = cpu
        self.lane = _Lane()
        self.lanes = {cpu: self.lane}

    def turn_to(self, cpu: int) -> _Lane:
        """The lane on another vCPU than last time."""
        lane = self.lanes.get(cpu)
        if lane is None:
            lane = self.lanes[cpu] = _Lane()
        self.cpu = cpu
        self.lane = lane
        return lane


class Recorder:
    """Listens to an interrupt controller: keeps latencies, hands event records to ``log`` if there is one.

    ``banked`` is the number of interrupts that every vCPU has for itself (SGIs and PPIs: 32; x86 vectors:
    256): intids below it are told apart by vCPU, those above are one interrupt whichever vCPU takes it.
    ``name(intid, cpu)`` says what an interrupt without a label is.
    """

    __slots__ = ("_add", "_banked", "_clock", "_labels", "_lines", "_name", "origin_ns")

    def __init__(
        self,
        clock: _Clock,
        *,
        banked: int = 32,
        log: EventLog | None = None,
        name: Callable[[int, int], str] = "interrupt {}".format,
    ) -> None:
        self._clock = clock
        self._banked = banked
        self._add = None if log is None else log.add
        self._lines: dict[int, _Line] = {}
        self._labels: dict[tuple[int, int | None], str] = {}
        self._name = name
        self.origin_ns: int | None = None
        """When the interrupt being delivered was sent; ``None``: just now."""

    def label(self, intid: int, source: str, cpu: int | None = None) -> None:
        """Name the source behind ``intid``, on every vCPU or on one. Sources of the same name are one row."""
        self._labels[intid, cpu] = source

    def set_origin(self, at_ns: int | None) -> None:
        """When the interrupts that arrive from now on were sent; ``None``: just as they arrive.

        A channel with latency calls this around each delivery: ``channel.on_origin = recorder.set_origin``.
        """
        self.origin_ns = at_ns

    # What controllers and channels call. The four calls of an undisturbed interrupt are the hot path.

    def raised(self, source: str) -> None:
        """A source raised an interrupt: for the event log, the latencies start at ``origin_ns``."""
        if self._add is not None:
            self._add(_RAISED, (self._clock.now, quoted(source)))

    def pending(self, cpu: int, intid: int) -> None:
        """The interrupt became pending towards ``cpu`` (-1: no target yet)."""
        line = self._lines.get(intid if intid >= self._banked else ~(cpu * self._banked + intid))
        if line is None:
            line = self._new_line(cpu, intid)
        now = self._clock.now
        raised = now if self.origin_ns is None else self.origin_ns
        if line.pending < 0:
            line.pending = now
            line.raised = raised
        else:
            if line.later is None:
                line.later = deque()
            line.later.append((now, raised))
        lane = line.lane if line.cpu == cpu else line.turn_to(cpu)
        lane.pended += 1
        if self._add is not None:
            self._add(_PENDING, (now, cpu, intid, raised))

    def coalesced(self, cpu: int, intid: int) -> None:
        """The interrupt was raised while pending."""
        self._lane(cpu, intid).coalesced += 1
        if self._add is not None:
            self._add(_COALESCED, (self._clock.now, cpu, intid))

    def acknowledged(self, cpu: int, intid: int) -> None:
        """``cpu`` took the interrupt."""
        line = self._lines.get(intid if intid >= self._banked else ~(cpu * self._banked + intid))
        if line is None:
            line = self._new_line(cpu, intid)
        line.taken = now = self._clock.now
        line.taken_raised = line.raised
        if line.pending >= 0:
            lane = line.lane if line.cpu == cpu else line.turn_to(cpu)
            lane.to_pending.append(line.pending - line.raised)
            lane.to_ack.append(now - line.pending)
            line.pending, line.raised = line.later.popleft() if line.later else (-1, -1)
            if len(lane.to_ack) >= _FOLD_AT:
                lane.fold()
        if self._add is not None:
            self._add(_ACKNOWLEDGED, (now, cpu, intid))

    def completed(self, cpu: int, intid: int) -> None:
        """``cpu`` ended the interrupt."""
        line = self._lines.get(intid if intid >= self._banked else ~(cpu * self._banked + intid))
        now = self._clock.now
        # An interrupt that was pending or active before anybody listened (restored state) has no times to
        # measure from: it is recorded as an event, but is no sample.
        if line is not None and line.taken >= 0:
            lane = line.lane if line.cpu == cpu else line.turn_to(cpu)
            if line.taken_raised >= 0:
                lane.to_eoi.append(now - line.taken)
                lane.whole.append(now - line.taken_raised)
            line.taken = line.taken_raised = -1
        if self._add is not None:
            self._add(_COMPLETED, (now, cpu, intid))

    def dropped(self, cpu: int, intid: int, reason: str) -> None:
        """The interrupt was thrown away, pending or before it ever was."""
        self._lane(cpu, intid).dropped += 1
        line = self._lines[intid if intid >= self._banked else ~(cpu * self._banked + intid)]
        if line.later:
            line.later.pop()
        else:
            line.pending = line.raised = -1
        if self._add is not None:
            self._add(_DROPPED, (self._clock.now, cpu, intid, quoted(reason)))

    # Results

    def statistics(self) -> Statistics:
        """Everything so far, merged by source and by vCPU."""
        total = Passage()
        sources: dict[str, Passage] = {}
        vcpus: dict[int, Passage] = {}
        for source, cpu, passage in self._passages():
            total.merge(passage)
            sources.setdefault(source, Passage()).merge(passage)
            vcpus.setdefault(cpu, Passage()).merge(passage)
        return Statistics(total, dict(sorted(sources.items())), dict(sorted(vcpus.items())))

    def source_of(self, cpu: int, intid: int) -> str:
        """The label of an interrupt; without one what ``name(intid, cpu)`` says."""
        return self._labels.get((intid, cpu)) or self._labels.get((intid, None)) or self._name(intid, cpu)

    def active(self) -> int:
        """How many interrupts are acknowledged and not ended now."""
        return sum(line.taken >= 0 for line in self._lines.values())

    def _passages(self) -> Iterable[tuple[str, int, Passage]]:
        for line in self._lines.values():
            for cpu, lane in line.lanes.items():
                passage = lane.passage()
                if passage.pended or passage.coalesced or passage.dropped or passage.stages[STAGES[1]].count:
                    yield self.source_of(cpu, line.intid), cpu, passage

    def _new_line(self, cpu: int, intid: int) -> _Line:
        line = _Line(intid, cpu)
        self._lines[intid if intid >= self._banked else ~(cpu * self._banked + intid)] = line
        return line

    def _lane(self, cpu: int, intid: int) -> _Lane:
        line = self._lines.get(intid if intid >= self._banked else ~(cpu * self._banked + intid))
        if line is None:
            line = self._new_line(cpu, intid)
        return line.lane if line.cpu == cpu else line.turn_to(cpu)
