"""The command line: results, exit status, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fabric import __version__
from fabric.cli import main
from fabric.errors import SimulationError
from fabric.scenario.run import Run

TRACE = str(Path(__file__).parent.parent / "examples" / "virtio-blk-2cpu-short.txt.gz")


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text('name = "small"\nvcpus = 2\nduration_ns = 1000000\ntick.hz = 10000\n[[block]]\niops = 50000\n')
    return str(path)


Captured = pytest.CaptureFixture[str]


def ledgers(document: Any) -> list[Any]:
    """Every ledger anywhere in a document."""
    if isinstance(document, dict):
        here = [document["ledger"]] if "ledger" in document else []
        return here + [found for value in document.values() for found in ledgers(value)]
    return [found for value in document for found in ledgers(value)] if isinstance(document, list) else []


# Results


def test_run_prints_tables(scenario: str, capsys: Captured) -> None:
    """Sources, vCPUs and the ledger on standard output; the wall time on standard error."""
    assert 0 == main(["run", scenario])

    out, err = capsys.readouterr()
    assert out.startswith("small: board arm64-gicv3, 2 vCPUs, seed 0, 1.000 ms of guest time\n")
    assert "disk.0" in out
    assert "pending -> acknowledged" in out
    assert "\nledger: raised " in out
    assert "simulated in" in err


def test_json_is_one_document_and_nothing_else(scenario: str, capsys: Captured) -> None:
    """And in it a ledger is a table of ints, and of reasons with ints."""
    assert 0 == main(["run", scenario, "--format", "json"])

    document = json.loads(capsys.readouterr().out)
    (ledger,) = ledgers(document)
    assert ["raised", "delivered", "coalesced", "pending", "dropped"] == list(ledger)
    assert all(isinstance(ledger[key], int) for key in ("raised", "delivered", "coalesced", "pending"))
    assert isinstance(ledger["dropped"], dict)


def test_replay_needs_nothing_but_the_trace(capsys: Captured) -> None:
    """As many vCPUs as the trace has CPUs, on the first board."""
    assert 0 == main(["replay", TRACE])

    out, _ = capsys.readouterr()
    assert out.startswith("virtio-blk-2cpu-short: board arm64-gicv3, 2 vCPUs, seed 0, ")
    assert "\ntrace virtio-blk-2cpu-short.txt.gz: 5957 lines, 5945 events understood, 3852 interrupts of 8 " in out


def test_replay_options_set_keys_of_the_scenario(capsys: Captured) -> None:
    """Each is a short way of a key; --set reaches all the others."""
    options = "--board arm64-gicv3 --vcpus 3 --pcpus 2 --scale 1/4 --spread source --seed 9 --set costs.exit_ns=0"

    assert 0 == main(["replay", TRACE, "--format", "json", *options.split()])

    result = json.loads(capsys.readouterr().out)
    assert (3, 2, 9) == (result["vcpus"], result["pcpus"], result["seed"])
    assert 1_496_022_000 // 4 == result["replay"]["last_ns"]
    assert all(len(device["vcpus"]) == 1 for device in result["replay"]["devices"].values())


def test_a_trace_is_replayed_on_another_board(capsys: Captured) -> None:
    """All of it arrives there as well."""
    assert 0 == main(["replay", TRACE, "--board", "arm64-gicv2", "--vcpus", "8"])

    out, _ = capsys.readouterr()
    assert out.startswith("virtio-blk-2cpu-short: board arm64-gicv2, 8 vCPUs, seed 0, ")
    assert "\nledger: raised 3859 = delivered 3859 + coalesced 0 + pending 0 + dropped 0\n" in out


def test_lines_that_were_not_understood_are_told(tmp_path: Path, capsys: Captured) -> None:
    """With their number and the first of them."""
    path = tmp_path / "trace.txt"
    line = " task-1 [000] d.h.. 1.000001: "
    path.write_text(f"{line}irq_handler_entry: irq=3 name=x\n{line}sched_switch: prev\n{line}sched_switch: next\n")

    assert 0 == main(["replay", str(path)])

    out, _ = capsys.readouterr()
    assert "not understood: 2 lines" in out
    assert "2 sched_switch (first in line 2: task-1" in out


def test_boards_lists_the_boards(capsys: Captured) -> None:
    """As a table, or as JSON."""
    assert 0 == main(["boards"])
    out, _ = capsys.readouterr()
    assert "arm64-gicv3" in out
    assert "arm64-gicv2" in out

    assert 0 == main(["boards", "--format", "json"])
    listed = json.loads(capsys.readouterr().out)["boards"]
    assert ["arm64-gicv3", "arm64-gicv2", "x86-apic", "x86-split"] == [board["name"] for board in listed]


def test_boards_takes_the_options_of_every_command(tmp_path: Path, capsys: Captured) -> None:
    """A seed changes nothing; -o leaves the list in a file; a place that cannot be written is told."""
    assert 0 == main(["boards", "--seed", "3", "-o", str(tmp_path / "out"), "--format", "json"])
    assert capsys.readouterr().out == (tmp_path / "out" / "boards.json").read_text()

    (tmp_path / "file").write_text("")
    assert 2 == main(["boards", "-o", str(tmp_path / "file")])
    assert "cannot be written" in capsys.readouterr().err


def test_the_seed_on_the_command_line_wins(scenario: str, capsys: Captured) -> None:
    """Over the file and over --set."""
    assert 0 == main(["run", scenario, "--set", "seed=3", "--seed", "5", "--format", "json"])

    assert 5 == json.loads(capsys.readouterr().out)["seed"]


def test_a_run_directory_is_written(scenario: str, tmp_path: Path, capsys: Captured) -> None:
    """And its scenario gives the same results again."""
    out = tmp_path / "out"
    assert 0 == main(["run", scenario, "-o", str(out), "--seed", "4"])
    first = capsys.readouterr().out

    assert 0 == main(["run", str(out / "scenario.toml")])

    assert first == capsys.readouterr().out


def test_the_version(capsys: Captured) -> None:
    """--version prints it."""
    assert 0 == main(["--version"])
    assert f"fabric {__version__}\n" == capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "replay", "boards", "conformance"])
def test_every_command_has_help(command: str, capsys: Captured) -> None:
    """And fabric without arguments shows what there is."""
    assert 0 == main([command, "--help"])
    assert command in capsys.readouterr().out

    main([])
    assert command in "".join(capsys.readouterr())


def test_module_and_command_are_the_same(scenario: str, capsys: Captured) -> None:
    """``python -m fabric``; its results are the same bytes in another process."""
    done = subprocess.run([sys.executable, "-m", "fabric", "run", scenario], capture_output=True, text=True)

    assert 0 == main(["run", scenario])
    assert (0, capsys.readouterr().out) == (done.returncode, done.stdout)


def test_a_closed_pipe_is_no_error(scenario: str) -> None:
    """``fabric run ... | head -1``: whoever read it has seen enough."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fabric", "run", scenario, "--format", "json"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)

    assert (0, "") == (done.returncode, done.stderr)


# Wrong requests: status 2


def refused(arguments: list[str], capsys: Captured) -> str:
    assert 2 == main(arguments)
    out, err = capsys.readouterr()
    assert "" == out
    assert "Traceback" not in err
    return err


def test_all_mistakes_are_told_at_once(scenario: str, tmp_path: Path, capsys: Captured) -> None:
    """Of the options, the file, the trace and the directory."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    arguments = ["replay", "no-trace", "--board", "arm", "--vcpus", "x", "--pcpus", "0", "--scale", "-1"]

    err = refused([*arguments, "--set", "nonsense", "--set", "vcpu=3", "-o", str(tmp_path / "full")], capsys)

    for sentence in (
        "no-trace: the trace cannot be read: no such file or directory",
        "board: must be one of arm64-gicv2, arm64-gicv3, x86-apic, x86-split, not 'arm'",
        "vcpus: must be an integer from 1 to 1024, not 'x'",
        "pcpus: must be an integer from 1 to 4096, not 0",
        "replay.scale: must be a positive number or a fraction such as '1/2', not -1",
        "nonsense: a setting must be KEY=VALUE",
        "vcpu: unknown key; did you mean vcpus?",
        "the run directory cannot be written: it is not empty",
    ):
        assert sentence in err


def test_a_board_with_too_few_vcpus(capsys: Captured) -> None:
    """What the board takes is told."""
    err = refused(["replay", TRACE, "--board", "arm64-gicv2", "--vcpus", "16"], capsys)

    assert "fabric: scenario: vcpus: must be <= 8 on the board arm64-gicv2, not 16\n" == err


def test_a_missing_scenario(capsys: Captured) -> None:
    """One problem is one line."""
    err = refused(["run", "nowhere.toml"], capsys)

    assert "fabric: nowhere.toml: the scenario cannot be read: no such file or directory\n" == err


def test_a_scenario_with_a_missing_trace(tmp_path: Path, capsys: Captured) -> None:
    """The trace is named as it was looked for."""
    path = tmp_path / "s.toml"
    path.write_text('duration_ns = 0\n[replay]\ntrace = "gone.txt"\n')

    assert f"{tmp_path}/gone.txt: the trace cannot be read" in refused(["run", str(path)], capsys)


def test_what_only_the_machine_knows_is_wrong_as_well(scenario: str, capsys: Captured) -> None:
    """A fault on a channel that is not there is status 2 too."""
    path = Path(scenario)
    path.write_text(path.read_text() + '[[fault]]\nchannel = "vm0.msy"\n')

    assert "did you mean vm0.msi?" in refused(["run", scenario], capsys)


def test_refusals_are_json_too(capsys: Captured) -> None:
    """With --format json standard output is one document whatever happens."""
    assert 2 == main(["run", "nowhere.toml", "--format", "json"])

    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert "request" == error["kind"]
    assert [f"fabric: {problem}" for problem in error["problems"]] == err.splitlines()


@pytest.mark.parametrize("arguments", [["fly"], ["run"], ["replay", "x", "--bogus"], ["boards", "--format", "xml"]])
def test_usage_errors_are_status_2(arguments: list[str], capsys: Captured) -> None:
    """Commands and options that are not there."""
    assert 2 == main(arguments)
    assert "" == capsys.readouterr().out


@pytest.mark.parametrize("command", ["compare", "migrate"])
def test_what_is_not_built_is_no_command(command: str, capsys: Captured) -> None:
    """No stubs."""
    assert 2 == main([command])


# Failed simulations: status 1


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulations that end badly after they went well."""
    execute = Run.execute

    def fail(self: Run, log: Any = None) -> Any:
        execute(self, log)
        raise SimulationError("it broke")

    monkeypatch.setattr(Run, "execute", fail)


def test_a_failed_run_says_how_to_repeat_it(failing: None, scenario: str, tmp_path: Path, capsys: Captured) -> None:
    """The command with the seed, and what happened last; no run directory is left."""
    assert 1 == main(["run", scenario, "--set", "seed=8", "-o", str(tmp_path / "out")])

    out, err = capsys.readouterr()
    assert "" == out
    assert "fabric: the simulation failed: SimulationError: it broke" in err
    again = err.partition("to repeat it: ")[2].splitlines()[0]
    assert ["fabric", "run", scenario, "--set", "seed=8", "-o", str(tmp_path / "out"), "--seed", "8"] == shlex.split(
        again
    )
    assert '"event":"completed"' in err
    assert ["small.toml"] == os.listdir(tmp_path)


def test_a_failed_run_is_json_too(failing: None, scenario: str, capsys: Captured) -> None:
    """One document, with the command that repeats it and the last events."""
    assert 1 == main(["run", scenario, "--format", "json", "--seed=6"])

    error = json.loads(capsys.readouterr().out)["error"]
    assert ("simulation", ["SimulationError: it broke"]) == (error["kind"], error["problems"])
    assert f"fabric run {scenario} --format json --seed=6" == error["repeat"]
    assert 20 == len(error["events"])


def test_a_bug_shows_its_traceback(scenario: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """An exception that is none of ours is somebody's bug, and where it is helps to find it."""

    def bug(self: Run, log: Any = None) -> Any:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Run, "execute", bug)

    assert 1 == main(["run", scenario])
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "to repeat it: " in err


def test_an_interrupt_ends_it_quietly(scenario: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """Status 130, as the shell has it."""

    def interrupt(self: Run, log: Any = None) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "execute", interrupt)

    assert 130 == main(["run", scenario])
    assert "fabric: interrupted\n" == capsys.readouterr().err
