"""The recorder: the latency of every stage, by source and by vCPU, and the event records."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.trace import STAGES, EventFile, EventRing, Histogram, Passage, Recorder


class HandClock:
    now = 0


def life(recorder: Recorder, clock: HandClock, cpu: int, intid: int, times: tuple[int, int, int, int]) -> None:
    """One interrupt, raised, pending, acknowledged and ended at the given times."""
    recorder.set_origin(times[0])
    clock.now = times[1]
    recorder.pending(cpu, intid)
    recorder.set_origin(None)
    clock.now = times[2]
    recorder.acknowledged(cpu, intid)
    clock.now = times[3]
    recorder.completed(cpu, intid)


def stage_maxima(passage: Passage) -> list[int | None]:
    return [passage.stages[stage].max for stage in STAGES]


def test_each_stage_is_measured() -> None:
    """raised -> pending -> acknowledged -> EOI, and the whole."""
    clock = HandClock()
    recorder = Recorder(clock)

    life(recorder, clock, 0, 8192, (100, 130, 200, 1200))

    assert [30, 70, 1000, 1100] == stage_maxima(recorder.statistics().total)


def test_without_an_origin_raised_is_pending() -> None:
    """A source with no latency in between raises at the moment the controller has the interrupt."""
    clock = HandClock()
    clock.now = 50
    recorder = Recorder(clock)
    recorder.pending(0, 40)
    recorder.acknowledged(0, 40)

    assert [0, 0, None, None] == stage_maxima(recorder.statistics().total)


def test_sources_and_vcpus_are_rows() -> None:
    """Interrupts are grouped by label and by the vCPU that took them, in a fixed order."""
    clock = HandClock()
    recorder = Recorder(clock)
    recorder.label(8193, "disk")
    recorder.label(8192, "net")
    recorder.label(27, "timer")
    life(recorder, clock, 1, 8192, (0, 0, 10, 20))
    life(recorder, clock, 0, 8193, (20, 20, 40, 50))
    life(recorder, clock, 0, 27, (50, 50, 51, 52))
    life(recorder, clock, 1, 27, (60, 60, 62, 63))
    life(recorder, clock, 0, 99, (70, 70, 73, 74))

    statistics = recorder.statistics()

    assert ["disk", "interrupt 99", "net", "timer"] == list(statistics.sources)
    assert [0, 1] == list(statistics.vcpus)
    assert 2 == statistics.sources["timer"].pended
    assert 20 == statistics.vcpus[0].stages["pending_acknowledged"].max
    assert 10 == statistics.vcpus[1].stages["pending_acknowledged"].max


def test_an_sgi_of_several_senders_is_pending_several_times() -> None:
    """On a GICv2: each is a sample, the first one taken the first one that was pending; the last one is dropped."""
    clock = HandClock()
    recorder = Recorder(clock)
    for clock.now in (10, 20, 30):
        recorder.pending(0, 1)
    recorder.dropped(0, 1, "cleared")
    for clock.now in (40, 60):
        recorder.acknowledged(0, 1)
        recorder.completed(0, 1)

    total = recorder.statistics().total

    assert (3, 1, 2) == (total.pended, total.dropped, total.stages["raised_eoi"].count)
    assert (30, 40) == (total.stages["raised_eoi"].min, total.stages["raised_eoi"].max)


def test_private_interrupts_are_told_apart_by_vcpu() -> None:
    """The timer of vCPU 0 and that of vCPU 1 are pending at the same time under one number."""
    clock = HandClock()
    recorder = Recorder(clock)
    recorder.pending(0, 27)
    clock.now = 5
    recorder.pending(1, 27)
    clock.now = 9
    recorder.acknowledged(1, 27)
    clock.now = 10
    recorder.acknowledged(0, 27)

    vcpus = recorder.statistics().vcpus

    assert {0: 10, 1: 4} == {cpu: vcpus[cpu].stages["pending_acknowledged"].max for cpu in vcpus}


def test_a_shared_interrupt_may_move_while_pending() -> None:
    """Pended towards vCPU 0, moved, taken by vCPU 1: the latency belongs to the vCPU that took it."""
    clock = HandClock()
    recorder = Recorder(clock)
    recorder.pending(0, 8192)
    clock.now = 7
    recorder.acknowledged(1, 8192)

    statistics = recorder.statistics()

    assert 1 == statistics.vcpus[0].pended
    assert 7 == statistics.vcpus[1].stages["pending_acknowledged"].max


def test_an_interrupt_may_be_pending_again_while_active() -> None:
    """The EOI ends the interrupt that was taken, not the one that arrived meanwhile."""
    clock = HandClock()
    recorder = Recorder(clock)
    recorder.pending(0, 40)
    recorder.acknowledged(0, 40)
    clock.now = 6
    recorder.pending(0, 40)
    clock.now = 10
    recorder.completed(0, 40)
    clock.now = 11
    recorder.acknowledged(0, 40)

    assert [0, 5, 10, 10] == stage_maxima(recorder.statistics().total)


def test_a_dropped_interrupt_leaves_no_sample() -> None:
    """What was thrown away is counted as such and ends no stage."""
    clock = HandClock()
    recorder = Recorder(clock)
    recorder.pending(0, 40)
    recorder.dropped(0, 40, "line lowered")
    clock.now = 10
    recorder.acknowledged(0, 40)

    total = recorder.statistics().total

    assert (1, 1) == (total.pended, total.dropped)
    assert [None, None, None, None] == stage_maxima(total)


def test_restored_interrupts_are_no_samples() -> None:
    """An interrupt that was pending or active before anybody listened has no times to measure from."""
    recorder = Recorder(HandClock())
    recorder.acknowledged(0, 40)
    recorder.completed(0, 40)
    recorder.completed(0, 41)

    assert {} == recorder.statistics().sources


def test_coalesced_interrupts_are_counted() -> None:
    """By source, whether or not the interrupt was seen before."""
    recorder = Recorder(HandClock())
    recorder.coalesced(0, 40)
    recorder.pending(0, 40)
    recorder.coalesced(0, 40)

    assert 2 == recorder.statistics().sources["interrupt 40"].coalesced


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([3, 27, 40, 8192]), st.integers(0, 10**6))))
def test_views_agree_with_the_total(interrupts: list[tuple[int, int, int]]) -> None:
    """Summed over the sources, or over the vCPUs, the histograms are the one of all interrupts."""
    clock = HandClock()
    recorder = Recorder(clock)
    waits = Histogram()
    for cpu, intid, wait in interrupts:
        now = clock.now
        life(recorder, clock, cpu, intid, (now, now, now + wait, now + wait))
        waits.record(wait)

    statistics = recorder.statistics()

    assert waits == statistics.total.stages["pending_acknowledged"]
    for view in (statistics.sources.values(), statistics.vcpus.values()):
        assert waits == sum((passage.stages["pending_acknowledged"] for passage in view), Histogram())


def test_many_samples_are_folded_without_loss() -> None:
    """The lists a lane keeps are short; nothing is lost when they are folded, nor by asking twice."""
    clock = HandClock()
    recorder = Recorder(clock)
    for at in range(0, 10_000, 10):
        life(recorder, clock, 0, 40, (at, at, at + 3, at + 5))

    assert 1000 == recorder.statistics().total.stages["raised_eoi"].count
    assert 1000 == recorder.statistics().total.stages["raised_eoi"].count


def test_statistics_as_json() -> None:
    """Counts and a summary a stage; what was never measured is null."""
    clock = HandClock()
    recorder = Recorder(clock)
    recorder.pending(2, 40)

    assert {
        "pended": 1,
        "coalesced": 0,
        "dropped": 0,
        "stages": dict.fromkeys(STAGES, Histogram().summary()),
    } == json.loads(json.dumps(recorder.statistics().to_dict()))["vcpus"]["2"]


def scripted(recorder: Recorder, clock: HandClock) -> None:
    clock.now = 5
    recorder.raised('the "disk"')
    life(recorder, clock, 1, 40, (5, 6, 7, 8))
    recorder.pending(0, 41)
    recorder.coalesced(0, 41)
    recorder.dropped(0, 41, "vm closed")


SCRIPT_LINES = [
    '{"at":5,"event":"raised","source":"the \\"disk\\""}',
    '{"at":6,"event":"pending","cpu":1,"intid":40,"raised":5}',
    '{"at":7,"event":"acknowledged","cpu":1,"intid":40}',
    '{"at":8,"event":"completed","cpu":1,"intid":40}',
    '{"at":8,"event":"pending","cpu":0,"intid":41,"raised":8}',
    '{"at":8,"event":"coalesced","cpu":0,"intid":41}',
    '{"at":8,"event":"dropped","cpu":0,"intid":41,"reason":"vm closed"}',
]


def test_the_event_file() -> None:
    """A header line and one JSON object an event, keys in a fixed order."""
    stream = io.StringIO()
    clock = HandClock()
    with EventFile(stream, scenario="s", seed=3, versions={"trio": "2", "fabric": "1"}) as log:
        scripted(Recorder(clock, log=log), clock)
        log.note(9, "exit", cpu=0, reason="mmio")

    assert [
        '{"schema":"fabric-events/1","scenario":"s","seed":3,"versions":{"fabric":"1","trio":"2"}}',
        *SCRIPT_LINES,
        '{"at":9,"event":"exit","cpu":0,"reason":"mmio"}',
    ] == stream.getvalue().splitlines()
    assert all(json.loads(line) for line in stream.getvalue().splitlines())


def test_the_event_file_is_written_as_the_run_goes() -> None:
    """A long run does not gather in memory."""
    stream = io.StringIO()
    log = EventFile(stream, scenario="s", seed=3, versions={})
    recorder = Recorder(HandClock(), log=log)
    for _ in range(2000):
        recorder.coalesced(0, 40)

    assert 1000 < stream.getvalue().count("\n") < 2001


def test_the_ring_keeps_the_last_events() -> None:
    """For the report of a failure: the last N, oldest first, as they would stand in the file."""
    ring = EventRing(limit=3)
    clock = HandClock()
    scripted(Recorder(clock, log=ring), clock)
    ring.note(9, "exit", cpu=0)

    assert [*SCRIPT_LINES[-2:], '{"at":9,"event":"exit","cpu":0}'] == ring.lines()
    assert len(SCRIPT_LINES) + 1 == ring.recorded


@pytest.mark.parametrize(
    ("error", "misuse"),
    [
        pytest.param(ValueError, lambda: EventRing(0), id="limit"),
        pytest.param(TypeError, lambda: EventRing().note(1, "x", load=0.5), id="float"),  # type: ignore[arg-type]
    ],
)
def test_misuse_of_a_log(error: type[Exception], misuse: Callable[[], object]) -> None:
    """Floats have no place in a record that must be the same bytes everywhere."""
    with pytest.raises(error, match="must be"):
        misuse()
