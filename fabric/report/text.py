"""The result of a run as text: latencies by source, a line a vCPU, the ledger, and how a trace was read.

Plain ASCII of a width that depends on nothing but the result, so that it can be compared, mailed and grepped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from fabric.scenario.result import RunResult
from fabric.trace import PERCENTILES, STAGES, Histogram, Passage

_STAGE_NAMES = {
    "raised_pending": "raised -> pending",
    "pending_acknowledged": "pending -> acknowledged",
    "acknowledged_eoi": "acknowledged -> EOI",
    "raised_eoi": "raised -> EOI",
}
_MOST_SOURCES = 12
"""Of more than these the queues of a device are told together."""
_MOST_VCPUS = 32
"""Rows of the table of vCPUs; of more the busiest are shown."""
_MOST_REASONS = 12


def duration(ns: int | None) -> str:
    """A time in the unit that suits it, ``-`` for none."""
    if ns is None:
        return "-"
    for unit, size in (("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1000)):
        if ns >= size:
            return f"{ns / size:.3f} {unit}"
    return f"{ns} ns"


def render(result: RunResult) -> str:
    """The whole report, with a newline at its end."""
    blocks = [_headline(result), _sources(result), _vcpus(result), *_workload(result), f"ledger: {result.ledger}"]
    if result.replay is not None:
        blocks.append("\n".join(_trace(result)))
    return "\n\n".join(blocks) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their widest cell; the first ``left`` flush left, the others flush right."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _headline(result: RunResult) -> str:
    scenario = result.scenario
    vcpus = f"{scenario.vcpus} vCPU" + ("s" if scenario.vcpus > 1 else "")
    if scenario.pcpus is not None and scenario.pcpus < scenario.vcpus:
        vcpus += f" on {scenario.pcpus} physical"
    time = duration(result.end_ns - result.start_ns)
    return f"{scenario.name}: board {scenario.board}, {vcpus}, seed {scenario.seed}, {time} of guest time"


def _percentiles(histogram: Histogram) -> list[str]:
    summary = histogram.summary()
    return [duration(summary[key]) for key in (*(f"p{percent}" for percent in PERCENTILES), "max")]


def _sources(result: RunResult) -> str:
    statistics = result.statistics
    # Without latency on the wire the first stage is 0 for everything, and no news.
    stages = STAGES if statistics.total.stages[STAGES[0]].max else STAGES[1:]

    def rows(name: str, passage: Passage) -> Iterable[list[str]]:
        for place, stage in enumerate(stages):
            histogram = passage.stages[stage]
            head = [name, str(passage.pended)] if not place else ["", ""]
            yield [*head, _STAGE_NAMES[stage], *_percentiles(histogram)]

    head = ["source", "count", "stage", *(f"p{percent}" for percent in PERCENTILES), "max"]
    body = [row for name, passage in _gathered(statistics.sources).items() for row in rows(name, passage)]
    if len(statistics.sources) != 1:
        body += rows("all", statistics.total)
    return _aligned(head, body)


def _gathered(sources: dict[str, Passage]) -> dict[str, Passage]:
    """The sources; where they are many, the queues of a device (``disk.0``, ``disk.1``, ...) as one."""
    if len(sources) <= _MOST_SOURCES:
        return sources
    devices: dict[str, list[str]] = {}
    for name in sources:
        stem, _, queue = name.rpartition(".")
        devices.setdefault(stem if stem and queue.isdecimal() else name, []).append(name)
    gathered = {}
    for device, names in devices.items():
        name = names[0] if len(names) == 1 else f"{device} ({len(names)} queues)"
        passage = gathered[name] = Passage()
        for one in names:
            passage.merge(sources[one])
    return gathered


def _aligned(head: list[str], body: list[list[str]]) -> str:
    # The stage is text between two numbers: padded here, it stays flush left in a right-aligned column.
    width = max(len(row[2]) for row in [head, *body])
    return table([*head[:2], head[2].ljust(width), *head[3:]], ([*r[:2], r[2].ljust(width), *r[3:]] for r in body))


def _vcpus(result: RunResult) -> str:
    passages = result.statistics.vcpus
    shown = [vcpu for vcpu in result.vcpus if vcpu.index in passages or len(result.vcpus) <= _MOST_VCPUS]
    omitted = len(result.vcpus) - min(len(shown), _MOST_VCPUS)
    if len(shown) > _MOST_VCPUS:
        shown = sorted(shown, key=lambda vcpu: -passages[vcpu.index].pended)[:_MOST_VCPUS]
        shown.sort(key=lambda vcpu: vcpu.index)
    rows = []
    for vcpu in shown:
        passage = passages.get(vcpu.index, Passage())
        to_ack = passage.stages["pending_acknowledged"].summary()
        whole = passage.stages["raised_eoi"].summary()
        rows.append(
            [
                str(vcpu.index),
                str(passage.pended),
                str(passage.coalesced),
                str(passage.dropped),
                duration(vcpu.stolen_ns),
                *(duration(to_ack[key]) for key in ("p50", "p99", "max")),
                *(duration(whole[key]) for key in ("p50", "p99", "max")),
            ]
        )
    head = ["vCPU", "interrupts", "coalesced", "dropped", "stolen", "to ack p50", "p99", "max", "to EOI p50", "p99"]
    text = table([*head, "max"], rows)
    if omitted:
        text += f"\n({omitted} less busy ones not shown)"
    return text


def _workload(result: RunResult) -> Iterable[str]:
    lines = []
    for load, counts in result.workload.items():
        if any(isinstance(value, dict) for value in counts.values()):
            lines += [f"{load} {name}: {_counts(values)}" for name, values in counts.items()]
        else:
            lines.append(f"{load}: {_counts(counts)}")
    if lines:
        yield "\n".join(lines)


def _counts(values: dict[str, Any]) -> str:
    return ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in values.items())


def _trace(result: RunResult) -> Iterable[str]:
    assert result.replay is not None
    report = result.replay.report
    sources = len(result.replay.devices) + len(result.replay.ipis) + bool(result.replay.ticks)
    yield (
        f"trace {PurePath(report.where).name}: {report.lines} lines, {report.events} events understood,"
        f" {result.replay.count} interrupts of {sources} sources in {duration(result.replay.last_ns)}"
    )
    if report.lost_events:
        yield f"  the traced kernel lost {report.lost_events} events"
    if report.out_of_order:
        yield f"  {report.out_of_order} events were out of order and have been sorted"
    if not report.ignored:
        yield "  every event was understood"
        return
    yield f"  not understood: {sum(ignored.count for ignored in report.ignored.values())} lines"
    common = sorted(report.ignored.items(), key=lambda item: (-item[1].count, item[1].line))
    for reason, ignored in common[:_MOST_REASONS]:
        yield f"  {ignored.count:>9} {reason} (first in line {ignored.line}: {ignored.example[:60]})"
    if len(common) > _MOST_REASONS:
        yield f"  {'':>9} and {len(common) - _MOST_REASONS} more reasons, see --format json"
