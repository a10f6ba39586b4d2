"""Programs for a differential test of interrupt controllers: what is done to a machine, step by step.

A step is something a guest or its devices can do; a program is a list of them, made before any answer is
known, so that it can be played on a model and on an emulator and the answers compared. As text a step is one short line
(numbers in hex, INTIDs in decimal), so that recorded programs can be read and a difference can be tried by hand:

==================  =========================================================================================
``r4 8000104``      read four bytes at that address; the answer is the value
``w4 8000104 ff``   write four bytes
``m 41000000 ff``   store bytes in guest memory
``z 41000000 40``   store so many zeros
``line 40 1``       drive the input of SPI 40 high; ``line 1:20 0``, that of PPI 20 of CPU 1 low
``msi 3``           device 0 raises its event 3
``lpis``            which LPIs are pending: the answer is, for each CPU, a list of INTIDs
``ack``             GICv2: read GICC_IAR; the answer is the value
``end``             write to GICC_EOIR what was acknowledged last and is not ended yet, if there is something
``done``            write to GICC_DIR what was ended last and is not done yet, if there is something
==================  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import attrs

GICD, GICR, GITS, GICC = 0x0800_0000, 0x080A_0000, 0x0808_0000, 0x0801_0000
GICR_FRAME = 0x2_0000
DOORBELL = GITS + 0x1_0040
GICC_IAR, GICC_EOIR, GICC_DIR = 0xC, 0x10, 0x1000
FIRST_SPECIAL = 1020
"""INTIDs from here on are no interrupts."""
CPUS = 2
NR_IRQS = 288
"""Of both machines, SGIs and PPIs included."""

RAM = 0x4100_0000
"""Guest memory that the programs use; the emulator's board keeps its device tree in what lies below."""
RAM_SIZE = 0x0100_0000
QUEUE = RAM
DEVICE_TABLE = RAM + 0x10_0000
COLLECTION_TABLE = RAM + 0x20_0000
LEVEL2 = RAM + 0x30_0000
ITTS = RAM + 0x40_0000
ITT_SIZE = 0x4_0000
CONFIG = RAM + 0x80_0000
PENDING = RAM + 0x90_0000
PENDING_SIZE = 0x1_0000
FIRST_LPI, LPIS_END = 8192, 0x1_0040
"""The LPIs that are looked at: all there are, and where some more would be."""


def frame(cpu: int) -> int:
    """Address of a redistributor."""
    return GICR + GICR_FRAME * cpu


Answer = int | list[list[int]] | None


@attrs.frozen
class Step:
    """One step.

    Attributes:
        op: the first word, without the size.
        address: of the access; the INTID of a line; the event of an MSI.
        size: of the access in bytes; the CPU of a PPI's line.
        value: what is written; how many zeros; the level of a line.
        data: what ``m`` stores.
    """

    op: str
    address: int = 0
    size: int = 0
    value: int = 0
    data: bytes = b""

    def __str__(self) -> str:
        match self.op:
            case "r":
                return f"r{self.size} {self.address:x}"
            case "w":
                return f"w{self.size} {self.address:x} {self.value:x}"
            case "m":
                return f"m {self.address:x} {self.data.hex()}"
            case "z":
                return f"z {self.address:x} {self.value:x}"
            case "line":
                where = f"{self.size}:{self.address}" if self.address < 32 else f"{self.address}"
                return f"line {where} {self.value}"
            case "msi":
                return f"msi {self.address}"
            case _:
                return self.op

    @classmethod
    def parse(cls, text: str) -> Self:
        """The step that a line says. ValueError for a line that says none."""
        op, *words = text.split()
        match op[0], words:
            case "r", [address]:
                return cls("r", int(address, 16), int(op[1:]))
            case "w", [address, value]:
                return cls("w", int(address, 16), int(op[1:]), int(value, 16))
            case "m", [address, data] if op == "m":
                return cls("m", int(address, 16), data=bytes.fromhex(data))
            case "z", [address, length]:
                return cls("z", int(address, 16), value=int(length, 16))
            case "l", [where, level] if op == "line":
                cpu, _, intid = where.rpartition(":")
                return cls("line", int(intid), int(cpu or 0), int(level))
            case "m", [event]:
                return cls("msi", int(event))
            case _, [] if op in ("lpis", "ack", "end", "done"):
                return cls(op)
        raise ValueError(f"not a step: {text!r}")

    @property
    def answers(self) -> bool:
        """Whether it has an answer."""
        return self.op in ("r", "lpis", "ack")


@attrs.define
class Program:
    """Steps for a machine, ``gicv3`` or ``gicv2``; methods add one each."""

    name: str
    machine: str
    steps: list[Step] = attrs.Factory(list)
    essential: int = 0
    """How many steps at the beginning are needed for the others to mean what they should."""

    def read(self, address: int, size: int = 4) -> None:
        self.steps.append(Step("r", address, size))

    def write(self, address: int, value: int, size: int = 4) -> None:
        self.steps.append(Step("w", address, size, value & (1 << 8 * size) - 1))

    def store(self, address: int, data: bytes) -> None:
        self.steps.append(Step("m", address, data=data))

    def zero(self, address: int, length: int) -> None:
        self.steps.append(Step("z", address, value=length))

    def line(self, intid: int, level: int, cpu: int = 0) -> None:
        self.steps.append(Step("line", intid, cpu, level))

    def msi(self, event: int) -> None:
        self.steps.append(Step("msi", event))

    def lpis(self) -> None:
        self.steps.append(Step("lpis"))

    def acknowledge(self) -> None:
        self.steps.append(Step("ack"))

    def end(self) -> None:
        self.steps.append(Step("end"))

    def deactivate(self) -> None:
        self.steps.append(Step("done"))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "machine": self.machine, "steps": [str(step) for step in self.steps]}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        return cls(raw["name"], raw["machine"], [Step.parse(text) for text in raw["steps"]])


class Taken:
    """The interrupts that a program has acknowledged and not ended, and those it has ended and not deactivated."""

    def __init__(self) -> None:
        self._running: list[int] = []
        self._ended: list[int] = []

    def add(self, value: int) -> None:
        """GICC_IAR has given ``value``."""
        if value & 0x3FF < FIRST_SPECIAL:
            self._running.append(value)

    def access(self, op: str) -> Step | None:
        """The write that ``end`` or ``done`` is, if it is any."""
        if op == "end" and self._running:
            self._ended.append(self._running.pop())
            return Step("w", GICC + GICC_EOIR, 4, self._ended[-1])
        if op == "done" and self._ended:
            return Step("w", GICC + GICC_DIR, 4, self._ended.pop())
        return None


def pending_lpis(table: bytes) -> list[int]:
    """The LPIs whose bits are set in an LPI pending table, given from the byte of the first LPI on."""
    return [FIRST_LPI + 8 * at + bit for at, byte in enumerate(table) if byte for bit in range(8) if byte >> bit & 1]


def shrink(steps: Sequence[Step], fails: Any) -> list[Step]:
    """A shorter list of steps for which ``fails(steps)`` is still true, by leaving out as much as can be."""
    kept = list(steps)
    length = len(kept) // 2
    while length:
        at = 0
        while at < len(kept):
            shorter = kept[:at] + kept[at + length :]
            if fails(shorter):
                kept = shorter
            else:
                at += length
        length //= 2
    return kept
