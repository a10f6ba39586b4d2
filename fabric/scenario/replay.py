"""A recorded trace as what a guest and its devices will do: who raises what, on which vCPU, when.

Each device source becomes a device with one MSI vector for every vCPU that it interrupts after
:func:`~fabric.scenario.arrivals.spread`; timer interrupts become timer ticks of the vCPU's own timer; IPIs are sent
by their sender. Times begin with the first interrupt of the trace.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import attrs

from fabric.errors import ConfigError
from fabric.guest.driver import IPI_KINDS
from fabric.scenario.arrivals import DEVICE, TIMER, Arrival, arrivals, scale, spread
from fabric.scenario.ftrace import ImportReport, Trace
from fabric.scenario.model import Replay

Planned = tuple[int, int, int]
"""When (ns from the start), where to (a vector's or vCPU's number), and for how long the handler works (ns)."""

OTHER_IPIS = "other IPIs"
_OWN_KINDS = IPI_KINDS - 2
"""IPI sources with a kind of their own: kind 0 is the guest's own, the last is for the rest."""


@attrs.define(slots=True)
class PlannedDevice:
    """One source of device interrupts."""

    name: str
    vcpus: list[int]
    """The vCPU of each vector."""
    arrivals: list[Planned]
    """With the number of the vector."""


@attrs.define(slots=True)
class PlannedIpis:
    """The IPIs of one kind."""

    kind: int
    label: str
    sends: dict[int, list[Planned]]
    """For each sending vCPU, its sends with the receiving vCPU."""

    @property
    def count(self) -> int:
        """How many IPIs."""
        return sum(map(len, self.sends.values()))


@attrs.define(slots=True)
class ReplayPlan:
    """All that a trace makes happen on the vCPUs of a guest."""

    vcpus: int
    report: ImportReport
    devices: list[PlannedDevice] = attrs.field(factory=list)
    """In order of first appearance."""
    ticks: list[list[tuple[int, int]]] = attrs.field(factory=list)
    """For each vCPU ``(at_ns, handler_ns)``; empty without timer interrupts."""
    ipis: list[PlannedIpis] = attrs.field(factory=list)
    count: int = 0
    """Interrupts in all."""
    last_ns: int = 0
    """When the last one comes."""

    @property
    def tick_count(self) -> int:
        """Timer ticks in all."""
        return sum(map(len, self.ticks))

    def to_dict(self) -> dict[str, Any]:
        """How the sources of the trace became sources of the run, for stats.json."""
        return {
            "interrupts": self.count,
            "last_ns": self.last_ns,
            "devices": {one.name: {"interrupts": len(one.arrivals), "vcpus": one.vcpus} for one in self.devices},
            "ticks": self.tick_count,
            "ipis": {one.label: {"interrupts": one.count, "kind": one.kind} for one in self.ipis},
            "import": self.report.to_dict(),
        }


def plan_replay(trace: Trace, how: Replay, vcpus: int) -> ReplayPlan:
    """What ``trace`` makes happen on ``vcpus`` vCPUs. ConfigError when it holds no interrupt."""
    found = arrivals(trace)
    if not found:
        raise ConfigError(trace.report.where, ["the trace has events, but none of them is the arrival of an interrupt"])
    factor = Fraction(how.scale)
    if factor != 1:
        found = scale(found, factor)
    found = spread(found, vcpus, "source" if how.spread == "source" else "turn")

    plan = ReplayPlan(vcpus, trace.report, count=len(found), last_ns=found[-1].at_ns)
    devices: dict[str, PlannedDevice] = {}
    places: dict[tuple[str, int], int] = {}
    ticks: list[list[tuple[int, int]]] = [[] for _ in range(vcpus)]
    ipis: dict[str, list[Arrival]] = {}
    for arrival in found:
        if arrival.duration_ns is None:
            arrival.duration_ns = how.handler_ns
        work_ns = arrival.duration_ns
        if arrival.kind == DEVICE:
            source = arrival.source
            device = devices.get(source)
            if device is None:
                device = devices[source] = PlannedDevice(source, [], [])
            place = places.get((source, arrival.cpu))
            if place is None:
                place = places[source, arrival.cpu] = len(device.vcpus)
                device.vcpus.append(arrival.cpu)
            device.arrivals.append((arrival.at_ns, place, work_ns))
        elif arrival.kind == TIMER:
            ticks[arrival.cpu].append((arrival.at_ns, work_ns))
        else:
            ipis.setdefault(arrival.source, []).append(arrival)
    plan.devices = list(devices.values())
    plan.ticks = ticks if any(ticks) else []
    plan.ipis = _by_kind(ipis)
    return plan


def _by_kind(ipis: dict[str, list[Arrival]]) -> list[PlannedIpis]:
    """The most frequent sources get a kind each, the others share the last one."""
    ranked = sorted(ipis.items(), key=lambda item: -len(item[1]))  # stable: first come, first served
    own, others = ranked[:_OWN_KINDS], ranked[_OWN_KINDS:]
    if len(others) == 1:
        own, others = ranked, []
    planned = [_sends(kind, label, found) for kind, (label, found) in enumerate(own, 1)]
    if others:
        together = sorted((one for _, found in others for one in found), key=lambda one: one.at_ns)
        planned.append(_sends(IPI_KINDS - 1, OTHER_IPIS, together))
    return planned


def _sends(kind: int, label: str, found: list[Arrival]) -> PlannedIpis:
    sends: dict[int, list[Planned]] = {}
    for one in found:
        sender = one.sender if one.sender >= 0 else one.cpu
        sends.setdefault(sender, []).append((one.at_ns, one.cpu, one.duration_ns or 0))
    return PlannedIpis(kind, label, dict(sorted(sends.items())))
