"""Results as text, and the progress bar."""

from __future__ import annotations

import threading

import attrs
import pytest

from fabric.report import progress
from fabric.report.text import duration, render, table
from fabric.scenario.load import make_scenario
from fabric.scenario.result import RunResult
from fabric.scenario.run import execute
from fabric.trace import Statistics


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (None, "-"),
        (0, "0 ns"),
        (999, "999 ns"),
        (1000, "1.000 us"),
        (1_234_567, "1.235 ms"),
        (61_000_000_000, "61.000 s"),
    ],
)
def test_durations_are_in_the_unit_that_suits_them(ns: int | None, text: str) -> None:
    """Four digits at least, and no sample is a dash."""
    assert text == duration(ns)


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    """The first one flush left, numbers flush right, no blanks at the end of a line."""
    assert "name   n\ndisk  10\nx      5" == table(["name", "n"], [["disk", "10"], ["x", "5"]])
    assert "a  b\nc" == table(["a", "b"], [["c", ""]])


@pytest.fixture(scope="module")
def result() -> RunResult:
    document = {"vcpus": 4, "duration_ns": 1_000_000, "block": [{"queues": 4, "iops": 100_000}], "tick": {"hz": 5000}}
    return execute(make_scenario(document))


def test_every_source_has_its_stages(result: RunResult) -> None:
    """Without latency on the wire the stage before pending is left out."""
    text = render(result)

    assert all(name in text for name in ("disk.0", "disk.3", "timer", "\nall "))
    assert "pending -> acknowledged" in text
    assert "raised -> pending" not in text


def test_the_wire_is_shown_where_it_takes_time() -> None:
    """With costs.wire_ns there is one stage more."""
    document = {"duration_ns": 1_000_000, "block": [{"iops": 100_000}], "costs": {"wire_ns": 50}}

    (line,) = [line for line in render(execute(make_scenario(document))).splitlines() if "raised -> pending" in line]

    assert line.startswith("disk.0")
    assert line.endswith(" 50 ns")


def test_queues_are_told_together_where_they_are_many() -> None:
    """16 queues would be 48 lines; the sum of their counts stays."""
    document = {
        "vcpus": 4,
        "duration_ns": 1_000_000,
        "block": [{"queues": 16, "iops": 1_000_000}],
        "tick": {"hz": 5000},
    }
    many = execute(make_scenario(document))
    queues = [passage for name, passage in many.statistics.sources.items() if name.startswith("disk.")]

    (line,) = [line for line in render(many).splitlines() if line.startswith("disk (16 queues)")]

    assert str(sum(passage.pended for passage in queues)) == line.split()[3]


def test_the_busiest_of_many_vcpus_are_shown(result: RunResult) -> None:
    """At most 32 rows, in order, and how many there are besides."""
    vcpus = tuple(attrs.evolve(result.vcpus[0], index=index) for index in range(100))
    passage = result.statistics.total
    busy = {index: attrs.evolve(passage, pended=1000 + index) for index in range(100)}
    statistics = Statistics(passage, result.statistics.sources, busy)

    lines = render(attrs.evolve(result, vcpus=vcpus, statistics=statistics)).splitlines()

    head = next(number for number, line in enumerate(lines) if line.startswith("vCPU"))
    assert list(range(68, 100)) == [int(line.split()[0]) for line in lines[head + 1 : head + 33]]
    assert "(68 less busy ones not shown)" == lines[head + 33]


def test_the_ledger_is_a_line(result: RunResult) -> None:
    """With all its counts."""
    assert f"ledger: {result.ledger}" == render(result).splitlines()[-1]


# Progress


def test_progress_is_drawn_while_the_block_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a thread that is gone afterwards."""
    monkeypatch.setattr(progress, "_FIRST_S", 0)
    monkeypatch.setattr(progress, "_EVERY_S", 0.001)
    asked = threading.Event()

    def fraction() -> float:
        asked.set()
        return 0.5

    with progress.shown(fraction, "my run"):
        assert asked.wait(10)

    assert "fabric progress" not in [thread.name for thread in threading.enumerate()]
    assert "" == capsys.readouterr().out


def test_a_short_run_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """It would flicker."""
    with progress.shown(lambda: 0.5, "my run"):
        pass

    assert ("", "") == tuple(capsys.readouterr())
