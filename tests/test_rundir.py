"""The run directory: what is in it, when it may be written, and that its bytes are the run's alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fabric.errors import ConfigError
from fabric.scenario.load import load_scenario, make_scenario
from fabric.scenario.model import Scenario
from fabric.scenario.run import execute
from fabric.scenario.rundir import FILES, RunDirectory
from fabric.trace import Histogram

SCENARIO = {
    "name": "mixed",
    "vcpus": 4,
    "seed": 11,
    "duration_ns": 3_000_000,
    "block": [{"queues": 4, "iops": 100_000}],
    "network": [{"queues": 4}],
    "tick": {"hz": 1000},
    "ipi": {"per_s": 5000},
}


def write(path: Path, scenario: Scenario, *, force: bool = False) -> None:
    with RunDirectory(path, force=force) as directory:
        directory.finish(execute(scenario, log=directory.events(scenario)))


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return make_scenario(SCENARIO)


@pytest.fixture(scope="module")
def written(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "out"
    write(path, scenario)
    return path


# What is in it


def test_it_has_scenario_versions_statistics_and_trace(written: Path) -> None:
    """Four files, and nothing left of the making."""
    assert sorted(FILES) == sorted(entry.name for entry in written.iterdir())
    assert [written] == list(written.parent.iterdir())


def test_the_scenario_repeats_the_run(written: Path, scenario: Scenario) -> None:
    """What was resolved reads back as what was run, seed included."""
    assert scenario == load_scenario(written / "scenario.toml")


def test_run_json_has_seed_and_versions(written: Path) -> None:
    """What else a repetition depends on."""
    about = json.loads((written / "run.json").read_text())

    assert ("mixed", 11) == (about["scenario"], about["seed"])
    assert {"fabric", "python", "trio", "attrs"} == set(about["versions"])


def test_the_statistics_have_histograms_that_merge(written: Path) -> None:
    """The ledger balances in the file as well."""
    stats = json.loads((written / "stats.json").read_text())

    ledger = stats["ledger"]
    assert ledger["raised"] == ledger["delivered"] + ledger["coalesced"] + ledger["pending"] + sum(
        ledger["dropped"].values()
    )
    merged = Histogram()
    for source in stats["latency_ns"]["sources"].values():
        merged.merge(Histogram.from_dict(source["stages"]["raised_eoi"]))
    assert Histogram.from_dict(stats["latency_ns"]["total"]["stages"]["raised_eoi"]) == merged


def test_the_trace_has_every_step_of_every_interrupt(written: Path) -> None:
    """A header, then a line an event, in time order."""
    header, *events = map(json.loads, (written / "trace.jsonl").read_text().splitlines())
    stats = json.loads((written / "stats.json").read_text())

    assert ("mixed", 11) == (header["scenario"], header["seed"])
    count = [event["event"] for event in events].count
    assert stats["ledger"]["delivered"] == count("acknowledged")
    assert stats["ledger"]["coalesced"] == count("coalesced")
    times = [event["at"] for event in events]
    assert sorted(times) == times


def test_the_trace_can_be_left_out(scenario: Scenario, tmp_path: Path) -> None:
    """trace.events = false."""
    write(tmp_path / "out", make_scenario(SCENARIO, {"trace.events": False}))

    assert "trace.jsonl" not in os.listdir(tmp_path / "out")


# Where it may be written


def test_an_empty_directory_is_fine(scenario: Scenario, tmp_path: Path) -> None:
    """As one that was made for the purpose."""
    write(tmp_path, scenario)

    assert sorted(FILES) == sorted(os.listdir(tmp_path))


def test_parents_are_made(scenario: Scenario, tmp_path: Path) -> None:
    """``-o runs/today/1`` needs no mkdir."""
    write(tmp_path / "a" / "b", scenario)

    assert sorted(FILES) == sorted(os.listdir(tmp_path / "a" / "b"))


def test_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    """All of it: no file of the earlier one stays."""
    write(tmp_path / "out", make_scenario({"duration_ns": 1000}))
    write(tmp_path / "out", make_scenario({"duration_ns": 2000, "trace": {"events": False}}))

    assert sorted({*FILES} - {"trace.jsonl"}) == sorted(os.listdir(tmp_path / "out"))
    assert 2000 == tomllib.loads((tmp_path / "out" / "scenario.toml").read_text())["duration_ns"]


def test_notes_beside_an_earlier_run_stay(tmp_path: Path) -> None:
    """Only files of ours are replaced."""
    write(tmp_path / "out", make_scenario({"duration_ns": 1000}))
    (tmp_path / "out" / "notes").write_text("mine")
    write(tmp_path / "out", make_scenario({"duration_ns": 2000}))

    assert "mine" == (tmp_path / "out" / "notes").read_text()
    assert 2000 == load_scenario(tmp_path / "out" / "scenario.toml").duration_ns


def test_a_directory_of_others_is_refused(tmp_path: Path) -> None:
    """Nothing in it changes; ``force`` writes there and leaves what is there."""
    (tmp_path / "thesis.tex").write_text("years")

    with pytest.raises(ConfigError, match="not of an earlier run; with --force"):
        RunDirectory(tmp_path)
    write(tmp_path, make_scenario({"duration_ns": 1000}), force=True)

    assert sorted([*FILES, "thesis.tex"]) == sorted(os.listdir(tmp_path))


def test_a_file_is_refused_even_with_force(tmp_path: Path) -> None:
    """A directory cannot be where a file is."""
    (tmp_path / "out").write_text("")

    with pytest.raises(ConfigError, match="a file has its name"):
        RunDirectory(tmp_path / "out", force=True)


def test_a_run_that_fails_leaves_nothing(scenario: Scenario, tmp_path: Path) -> None:
    """Nor does it touch what was there."""
    write(tmp_path / "out", make_scenario({"duration_ns": 1000}))
    before = (tmp_path / "out" / "stats.json").read_bytes()

    def fail() -> None:
        with RunDirectory(tmp_path / "out") as directory:
            directory.events(scenario)
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert ["out"] == os.listdir(tmp_path)
    assert before == (tmp_path / "out" / "stats.json").read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """As a mistake in the request."""
    tmp_path.chmod(0o500)

    with pytest.raises(ConfigError, match="permission denied"), RunDirectory(tmp_path / "out"):
        pass


# The same bytes


def _in_fresh_process(path: Path, scenario: Path, hash_seed: str) -> dict[str, bytes]:
    """The files of a run of its own process that must not depend on the process."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-m", "fabric", "run", str(scenario), "-o", str(path), "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    return {"stdout": done.stdout, **{name: (path / name).read_bytes() for name in ("stats.json", "trace.jsonl")}}


def _repeat(written: Path, tmp_path: Path, times: int) -> None:
    scenario = written / "scenario.toml"
    seeds = ["0", *(str(7 * n) for n in range(1, times - 1)), "random"]
    runs = [_in_fresh_process(tmp_path / str(n), scenario, seed) for n, seed in enumerate(seeds)]

    for run in runs:
        assert runs[0] == run
    assert (written / "trace.jsonl").read_bytes() == runs[0]["trace.jsonl"]


def test_same_scenario_and_seed_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    """In fresh processes, under any hash seed, in any directory."""
    _repeat(written, tmp_path, 3)


@pytest.mark.soak
def test_twenty_processes_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    """As the one above, more often."""
    _repeat(written, tmp_path, 20)


def test_files_named_trace_say_nothing_of_the_machine(written: Path) -> None:
    """No path, no process id, no wall time: nothing but virtual time."""
    text = (written / "trace.jsonl").read_text()

    assert "/" not in text.replace("fabric-events/1", "")
    assert str(os.getpid()) not in text.splitlines()[0]
