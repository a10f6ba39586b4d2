"""What may differ between fabric and an emulator, why, and the comparison that allows nothing else.

fabric has the interrupt controllers of KVM, the emulator has its own: where the architecture leaves a choice, they may
choose differently. :data:`FIELDS` says for fields of registers which choice that is; only these bits are left out of
the comparison. What would lead the two apart for good is not done by random programs and is listed, with the sequence
that shows it, in :mod:`qtest_deviations`.

IHI 0069 is the architecture of GICv3 and GICv4, IHI 0048 that of GICv2; each register has a section of its name there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import attrs
from qtest_steps import CPUS, GICC, GICC_IAR, GICD, GITS, Answer, Program, Step, frame

from fabric.devices.arm import vgic_its_regs, vgic_v2_regs, vgic_v3_regs
from fabric.devices.arm.vgic_its_commands import BY_OPCODE, COMMAND_SIZE
from fabric.devices.registers import RegisterBlock

ALL = (1 << 64) - 1
EVERY_BYTE = 0x0101_0101_0101_0101


@attrs.frozen
class Field:
    """Bits of a register that may differ.

    Attributes:
        register: its name as a pattern.
        mask: the bits, of 64; of a register for each interrupt, those of one repeated.
        why: whose choice it is and what the two chose.
        source: the document that leaves the choice, or has KVM's.
        machine: where.
    """

    register: str
    mask: int
    why: str
    source: str
    machine: str = "gicv?"


IDENTITY = "who made it, and its revision, are IMPLEMENTATION DEFINED"
CACHES = "which cacheability and shareability can be programmed is IMPLEMENTATION DEFINED; KVM takes what it can do"
RESERVED = "RES0; the emulator keeps what is written"

FIELDS = (
    # GICv2
    Field("GICD_CTLR", 1 << 1, "EnableGrp1: KVM enables both groups with one bit", "IHI 0048, GICD_CTLR", "gicv2"),
    Field("GICD_ITARGETSR", 0xFC * EVERY_BYTE, "bits of CPUs there are not; the emulator keeps them",
          "IHI 0048, GICD_ITARGETSRn", "gicv2"),
    Field("GICD+0xf[def]*", ALL, "identification registers: IMPLEMENTATION DEFINED, KVM has none",
          "IHI 0048, Identification registers", "gicv2"),
    # GICv3
    Field("GICD_CTLR", 1 << 0, "EnableGrp0: KVM forwards group 1 only", "arm-vgic-v3; IHI 0069, GICD_CTLR", "gicv3"),
    Field("GICD_TYPER", 0x1F, "ITLinesNumber: the emulator has 32 interrupts more than it says",
          "IHI 0069, GICD_TYPER"),
    Field("GICD_TYPER", 3 << 24, "A3V and No1N: KVM has neither affinity level 3 nor says it lacks 1 of N",
          "IHI 0069, GICD_TYPER"),
    Field("GICD_IIDR", ALL, IDENTITY, "IHI 0069, GICD_IIDR"),
    Field("GICD_STATUSR", ALL, "an optional register that neither has: KVM reads ones", "IHI 0069, GICD_STATUSR"),
    Field("GICD_IROUTER", 0xFF_0000_0000, "Aff3, which GICD_TYPER.A3V says that KVM does not have",
          "IHI 0069, GICD_IROUTER"),
    Field("GICD_IROUTER", 1 << 31, "Interrupt_Routing_Mode: 1 of N, which neither has", "IHI 0069, GICD_IROUTER"),
    Field("GICD_IROUTER", 0xFFFF_FF00_7F00_0000, RESERVED, "IHI 0069, GICD_IROUTER"),
    Field("GIC?_IPRIORITYR*", 0x07 * EVERY_BYTE, "priority bits: KVM has five, the emulator keeps eight",
          "IHI 0048, 3.3; IHI 0069, 4.8 Interrupt prioritization"),
    Field("GI??_PIDR[!2]*", ALL, IDENTITY, "IHI 0069, Identification registers"),
    Field("GICR_CTLR", 1 << 2, "IR: whether GICR_INVLPIR and GICR_INVALLR work beside an ITS", "IHI 0069, GICR_CTLR"),
    Field("GICR_IIDR", ALL, IDENTITY, "IHI 0069, GICR_IIDR"),
    Field("GICR_TYPER", 3 << 24, "CommonLPIAff: which redistributors share GICR_PROPBASER", "IHI 0069, GICR_TYPER"),
    Field("GICR_WAKER", 3 << 1, "KVM's redistributors are always awake", "arm-vgic-v3; IHI 0069, GICR_WAKER"),
    Field("GICR_PROPBASER", 0x0700_0000_0000_0F80, CACHES, "IHI 0069, GICR_PROPBASER"),
    Field("GICR_PROPBASER", 0xF8F0_0000_0000_0060, RESERVED, "IHI 0069, GICR_PROPBASER"),
    Field("GICR_PENDBASER", 0x0700_0000_0000_0F80, CACHES, "IHI 0069, GICR_PENDBASER"),
    Field("GICR_PENDBASER", 1 << 62, "PTZ reads as zero; the emulator keeps it", "IHI 0069, GICR_PENDBASER"),
    Field("GICR_PENDBASER", 0xB8F0_0000_0000_F07F, RESERVED, "IHI 0069, GICR_PENDBASER"),
    Field("GITS_CTLR", 1 << 31, "Quiescent, UNKNOWN while enabled; of a disabled one KVM says whether commands wait",
          "IHI 0069, GITS_CTLR"),
    Field("GITS_IIDR", ALL, IDENTITY, "IHI 0069, GITS_IIDR"),
    Field("GITS_TYPER", 0xF0, "ITT_entry_size", "IHI 0069, GITS_TYPER"),
    Field("GITS_TYPER", 0x1F_0000_0000, "CIDbits and CIL: the emulator spells out the 16 bits that KVM has by default",
          "IHI 0069, GITS_TYPER"),
    Field("GITS_CBASER", 0x38E0_0000_0000_0C00, CACHES, "IHI 0069, GITS_CBASER"),
    Field("GITS_CBASER", 0xF000, "address bits 15:12, which an implementation may take for zero",
          "IHI 0069, GITS_CBASER"),
    Field("GITS_BASER?", 0x38E0_0000_0000_0C00, CACHES, "IHI 0069, GITS_BASER<n>"),
    Field("GITS_BASER?", 3 << 8, "Page_Size: KVM has 64 KiB only", "IHI 0069, GITS_BASER<n>"),
    Field("GITS_BASER1", 1 << 62, "Indirect: KVM has no collection table of two levels", "IHI 0069, GITS_BASER<n>"),
)  # fmt: skip

_FRAMES: dict[str, tuple[tuple[int, RegisterBlock], ...]] = {
    "gicv3": (
        (GICD, vgic_v3_regs.GICD),
        (GITS, vgic_its_regs.GITS),
        *((frame(cpu), vgic_v3_regs.GICR) for cpu in range(CPUS)),
    ),
    "gicv2": ((GICD, vgic_v2_regs.GICD), (GICC, vgic_v2_regs.GICC)),
}


def register_at(machine: str, address: int) -> tuple[str, int]:
    """Name of the register at an address, or the frame and offset where there is none; and the byte in the register."""
    for base, block in _FRAMES[machine]:
        offset = address - base
        if 0 <= offset < block.size:
            row = block.find(offset)
            return (f"{block.name}+{offset:#x}", 0) if row is None else (row.name, offset - row.offset)
    raise LookupError(f"no register of a {machine} is at {address:#x}")


@attrs.define
class Comparison:
    """What came out of programs: how many answers were compared and how, and the differences nothing explains."""

    programs: int = 0
    answers: int = 0
    allowed: Counter[Field] = attrs.Factory(Counter)
    """Answers that differ in a field, by the field."""
    unexplained: list[str] = attrs.Factory(list)

    def add(self, program: Program, theirs: Sequence[Answer], ours: Sequence[Answer]) -> None:
        """Compare the answers to a program, the emulator's and fabric's."""
        self.programs += 1
        explained = True
        for number, step, expected, actual in answered(program, theirs, ours):
            self.answers += 1
            used, rest = explain(program.machine, step, expected, actual)
            self.allowed.update(used)
            if rest and explained:
                explained = False  # what comes after it most often comes from it
                self.unexplained.append(_report(program, number, expected, actual))

    def __str__(self) -> str:
        differ = sum(self.allowed.values())
        lines = [f"{self.programs} programs, {self.answers} answers compared, {differ} allowed differences:"]
        lines += [
            f"{count:6}  {field.register} {field.mask:#x}: {field.why} ({field.source})"
            for field, count in self.allowed.most_common()
        ]
        return "\n".join(lines + self.unexplained)


def answered(
    program: Program, theirs: Sequence[Answer], ours: Sequence[Answer]
) -> Iterator[tuple[int, Step, Answer, Answer]]:
    """The steps that have an answer, with their number and both answers."""
    steps = [(number, step) for number, step in enumerate(program.steps) if step.answers]
    for (number, step), expected, actual in zip(steps, theirs, ours, strict=True):
        yield number, step, expected, actual


def explain(machine: str, step: Step, expected: Answer, actual: Answer) -> tuple[list[Field], bool]:
    """Which fields account for a difference, and whether any of it is left."""
    if expected == actual:
        return [], False
    if not isinstance(expected, int) or not isinstance(actual, int):
        return [], True
    name, byte = register_at(machine, GICC + GICC_IAR if step.op == "ack" else step.address)
    differs = expected ^ actual
    used = []
    for field in FIELDS:
        mask = field.mask >> 8 * (byte % 8)
        if differs & mask and fnmatchcase(name, field.register) and fnmatchcase(machine, field.machine):
            used.append(field)
    for field in used:
        differs &= ~(field.mask >> 8 * (byte % 8))
    return used, bool(differs)


def _report(program: Program, number: int, expected: Answer, actual: Answer) -> str:
    """A difference, and the steps up to it."""
    shown = [hex(answer) if isinstance(answer, int) else answer for answer in (expected, actual)]
    before = [f"    {describe(program.machine, step)}" for step in program.steps[max(0, number - 12) : number + 1]]
    return "\n".join([f"{program.name}, step {number}: {shown[0]} expected, got {shown[1]}", *before])


def describe(machine: str, step: Step) -> str:
    """A step with the name of its register or command."""
    if step.op in ("r", "w"):
        return f"{step}  # {register_at(machine, step.address)[0]}"
    if step.op == "m" and len(step.data) == COMMAND_SIZE and step.data[0] in BY_OPCODE:
        command = BY_OPCODE[step.data[0]]
        words = [int.from_bytes(step.data[at : at + 8], "little") for at in range(0, COMMAND_SIZE, 8)]
        values = ((f.name, words[f.word] >> f.lo & f.mask) for f in command.fields)
        return f"{step}  # {command.name} " + ", ".join(f"{name}={value:#x}" for name, value in values)
    return str(step)
