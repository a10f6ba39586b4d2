"""A client of QEMU's qtest protocol: the guest's accesses to devices and memory, made from outside, no CPU running.

qtest is an accelerator of QEMU that executes nothing; commands come as lines of text, and each is answered by one:
``readl 0x8000000`` by ``OK 0x50``. Distributions may leave it out (Debian packages the rest of QEMU without it).
Here the commands of a batch are sent before their answers are read, which makes an access cost microseconds.

Documentation: "QTest Device Emulation Testing Framework" in QEMU's developer manual; QMP for what qtest has no word
for.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from typing import Any, Self

VARIABLE = "FABRIC_QEMU_AARCH64"
"""Environment variable with the emulator to use instead of the one in PATH."""
CHUNK = 500
"""Commands sent before answers are read; neither direction may fill its pipe."""
START_SECONDS = 30


class NoEmulator(Exception):
    """There is none that can be used; the text says why."""


def find_emulator() -> str:
    """The path of a qemu-system-aarch64 that has the accelerator qtest.

    Raises:
        NoEmulator: there is none.
    """
    name = os.environ.get(VARIABLE, "qemu-system-aarch64")
    path = shutil.which(name)
    if path is None:
        raise NoEmulator(f"no {name} (set {VARIABLE} to name another)")
    with QTest(path, "-machine", "none"):
        return path


class QTest:
    """An emulated machine.

    Args:
        emulator: what to start.
        *arguments: the machine, in words of QEMU's command line.
    """

    def __init__(self, emulator: str, *arguments: str) -> None:
        ours, theirs = socket.socketpair()
        number = str(theirs.fileno())
        with theirs:
            self._process = subprocess.Popen(
                [
                    emulator, *arguments, "-accel", "qtest", "-display", "none", "-nodefaults", "-qtest", "stdio",
                    "-qtest-log", "none", "-chardev", f"socket,id=monitor,fd={number}",
                    "-mon", "chardev=monitor,mode=control",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._commands, self._answers = self._process.stdin, self._process.stdout
        ours.settimeout(START_SECONDS)
        self._monitor = ours.makefile("rwb")
        ours.close()
        greeting = self._monitor.readline()
        if not greeting:
            said = self.close()
            raise NoEmulator(f"{emulator} with qtest does not start: {said}")
        version = json.loads(greeting)["QMP"]["version"]
        self.version = ".".join(str(version["qemu"][part]) for part in ("major", "minor", "micro"))
        self.qmp("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> str:
        """End the emulator; what it wrote to standard error."""
        self._process.terminate()
        self._monitor.close()
        _, said = self._process.communicate(timeout=START_SECONDS)
        return said.decode().strip()

    def run(self, commands: Sequence[str]) -> list[int]:
        """What each command answers: the value that a read gives, 0 for the others.

        Raises:
            RuntimeError: a command failed, or the emulator ended.
        """
        answers: list[int] = []
        for first in range(0, len(commands), CHUNK):
            chunk = commands[first : first + CHUNK]
            self._commands.write("".join(f"{command}\n" for command in chunk).encode())
            self._commands.flush()
            answers += [self._answer(command) for command in chunk]
        return answers

    def _answer(self, command: str) -> int:
        while True:
            words = self._answers.readline().split()
            if not words:
                raise RuntimeError(f"the emulator ended at {command!r}")
            if words[0] == b"OK":
                return int(words[1], 0) if len(words) > 1 else 0
            if words[0] != b"IRQ":  # what was asked to be intercepted comes in between
                raise RuntimeError(f"{command!r} is answered with {b' '.join(words).decode()!r}")

    def qmp(self, command: str, **arguments: Any) -> Any:
        """What the monitor answers. RuntimeError when it refuses."""
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._monitor.flush()
        while True:
            answer = json.loads(self._monitor.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def find_device(self, kind: str) -> str:
        """The path of the device of a QOM type, such as ``arm-gicv3``. LookupError when the board has none."""
        for entry in self.qmp("qom-list", path="/machine/unattached"):
            if entry["type"] == f"child<{kind}>":
                return f"/machine/unattached/{entry['name']}"
        raise LookupError(f"the machine has no {kind}")
