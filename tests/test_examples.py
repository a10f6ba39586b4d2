"""Every example runs and prints what the file beside it says."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fabric.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


def outputs(kind: str) -> list[Path]:
    return sorted(EXAMPLES.glob(f"*.{kind}"))


def test_every_example_has_its_output_beside_it() -> None:
    """And no output is left of an example that is gone."""
    examples = {path.stem for path in [*outputs("py"), *outputs("toml")]}

    assert examples
    assert examples == {path.stem for path in outputs("out")}


@pytest.mark.parametrize("path", outputs("toml"), ids=lambda path: path.name)
def test_a_scenario_gives_its_tables(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To be renewed with ``fabric run NAME.toml > NAME.out`` when the model changes."""
    assert 0 == main(["run", str(path)])

    assert path.with_suffix(".out").read_text() == capsys.readouterr().out


@pytest.mark.parametrize("path", outputs("py"), ids=lambda path: path.name)
def test_a_program_prints_its_output(path: Path) -> None:
    """As ``python NAME.py > NAME.out``; nothing goes to standard error."""
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)

    assert (0, path.with_suffix(".out").read_text(), "") == (done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("path", outputs("out"), ids=lambda path: path.name)
def test_the_ledgers_balance_and_nothing_is_lost(path: Path) -> None:
    """raised = delivered + coalesced + pending + dropped, in every example."""
    (line,) = [line for line in path.read_text().splitlines() if "raised " in line and " = delivered" in line]
    counts = [int(word) for word in line.replace("ledger: ", "").split() if word.isdecimal()]

    assert counts[0] == sum(counts[1:])
    assert 0 == counts[4]


def test_a_replay_is_faster_than_the_host_was(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command takes less wall time than the 11 s that were recorded; about a tenth is usual."""
    began = time.monotonic()
    assert 0 == main(["replay", str(EXAMPLES / "virtio-blk-2cpu.txt.gz"), "--board", "arm64-gicv3", "--vcpus", "16"])

    assert "raised 47648 = delivered 47648 " in capsys.readouterr().out
    assert time.monotonic() - began < 11
