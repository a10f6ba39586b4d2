"""The recorded programs: what an emulator answered, so that the comparison needs none."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
from qtest_client import QTest
from qtest_its import ItsCommands
from qtest_players import MACHINES, emulate
from qtest_programs import Gicv2Registers, Gicv3Registers
from qtest_steps import Answer, Program

PATH = Path(__file__).parent / "golden" / "qtest" / "arm.json.gz"
KINDS: dict[str, Callable[[int], Program]] = {
    "gicv3": lambda seed: Gicv3Registers(seed).program,
    "its": lambda seed: ItsCommands(seed).program,
    "gicv2": lambda seed: Gicv2Registers(seed).program,
}
"""What makes the programs of each kind from a seed."""
RECORDED = range(24)
"""The seeds of the recorded programs of each kind."""


@attrs.frozen
class Recorded:
    """A program with the emulator's answers."""

    kind: str
    program: Program
    answers: list[Answer]


def record(emulator: str) -> Iterator[Recorded]:
    """Have an emulator play the programs."""
    for kind, make in KINDS.items():
        for seed in RECORDED:
            program = make(seed)
            yield Recorded(kind, program, emulate(emulator, program.machine, program.steps))


def save(emulator: str, recorded: list[Recorded]) -> None:
    """Write the file, the same bytes for the same content."""
    with QTest(emulator, "-machine", "none") as qtest:
        version = qtest.version
    content = {
        "emulator": f"QEMU {version}",
        "machines": {name: " ".join(arguments) for name, arguments in MACHINES.items()},
        "programs": [{"kind": r.kind, **r.program.to_json(), "answers": r.answers} for r in recorded],
    }
    PATH.parent.mkdir(parents=True, exist_ok=True)
    with PATH.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
        file.write(json.dumps(content, separators=(",", ":")).encode())


def load() -> list[Recorded]:
    """Read the file."""
    with gzip.open(PATH) as file:
        content = json.load(file)
    return [Recorded(raw["kind"], Program.from_json(raw), raw["answers"]) for raw in content["programs"]]
