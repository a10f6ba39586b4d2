"""Where KVM and an emulator part for good: GICv3 and ITS. Those of GICv2 are in :mod:`qtest_deviations_v2`.

Each is a short program and what either answers to its last step; its docstring says why that is no bug of the model.
Random programs keep away from these, as all that came after would differ. These are played all the same, so that the
list stays true of both sides.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
from qtest_its import (
    CBASER,
    CREADR,
    CWRITER,
    GICR_CTLR,
    GICR_PENDBASER,
    GICR_PROPBASER,
    PTZ,
    VALID,
    ItsQueue,
)
from qtest_programs import BITMAPS, ICFGR, ICPENDR, SGI_BASE
from qtest_steps import (
    CONFIG,
    DOORBELL,
    FIRST_LPI,
    GICD,
    GITS,
    ITTS,
    PENDING,
    PENDING_SIZE,
    QUEUE,
    Answer,
    Program,
    frame,
)

LPI = FIRST_LPI
MOVED = "IHI 0069, 5.3, MAPC: unpredictable with events of a mapped collection unless MOVALL follows"
TABLES_OWNED = "arm-vgic-v3, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES; IHI 0069, GICR_CTLR.EnableLPIs"

Build = Callable[[Program], None]


@attrs.frozen
class Deviation:
    """A program whose last answer differs.

    Attributes:
        machine: what it is for.
        theirs, ours: the last answer of emulator and KVM.
        source: the document that leaves it open, or says what KVM does.
        build: makes the steps; its docstring says what the rule is and who keeps to it.
    """

    machine: str
    theirs: Answer
    ours: Answer
    source: str
    build: Build

    @property
    def name(self) -> str:
        """What the program does."""
        return f"{self.machine}: {self.build.__name__.replace('_', ' ')}"

    @property
    def program(self) -> Program:
        """The steps."""
        program = Program(self.name, self.machine)
        self.build(program)
        return program


class Deviations(list[Deviation]):
    """Those of one machine."""

    def __init__(self, machine: str) -> None:
        super().__init__()
        self.machine = machine

    def add(self, theirs: Answer, ours: Answer, source: str) -> Callable[[Build], Build]:
        """Decorates the function that makes the steps."""

        def added(build: Build) -> Build:
            self.append(Deviation(self.machine, theirs, ours, source, build))
            return build

        return added


GICV3 = Deviations("gicv3")


def _its(program: Program) -> ItsQueue:
    """An ITS with collections 0 and 1 of the CPUs, and event 0 of device 0, LPI 8192 in collection 0, which is pending.

    The distributor forwards and the LPIs are enabled.
    """
    its = ItsQueue(program)
    program.write(GICD, 2)
    program.store(CONFIG, b"\xa1" * 8)
    its.enable()
    for number in (0, 1):
        its.command("MAPC", ICID=number, RDbase=number, V=1)
    its.command("MAPD", DeviceID=0, Size=3, ITT_addr=ITTS >> 8, V=1)
    its.command("MAPTI", DeviceID=0, EventID=0, pINTID=LPI, ICID=0)
    its.command("INT", DeviceID=0, EventID=0)
    its.ring()
    return its


@GICV3.add([[], []], [[LPI], []], "IHI 0069, 5.3, DISCARD; Linux 6.1")
def discard_pending(program: Program) -> None:
    """DISCARD ends the pending state; KVM keeps an LPI while a vCPU has it queued, and MAPTI finds it again."""
    its = _its(program)
    its.command("DISCARD", DeviceID=0, EventID=0)
    its.command("MAPTI", DeviceID=0, EventID=0, pINTID=LPI, ICID=0)
    its.ring()
    program.lpis()


@GICV3.add([[LPI], []], [[], []], "IHI 0069, 5.3, MAPD")
def unmap_device_pending(program: Program) -> None:
    """MAPD with V=0 and an event pending: KVM drops an LPI that nothing maps, the emulator leaves the table alone."""
    its = _its(program)
    program.write(GICD, 0)
    its.command("CLEAR", DeviceID=0, EventID=0)
    its.command("INT", DeviceID=0, EventID=0)
    its.command("MAPD", DeviceID=0, V=0)
    its.ring()
    program.lpis()


@GICV3.add([[LPI, LPI + 1], []], [[LPI], []], "IHI 0069, 5.3, MAPTI")
def map_again(program: Program) -> None:
    """MAPTI of a mapped event is UNPREDICTABLE: KVM keeps the first mapping, the emulator takes the second."""
    its = _its(program)
    its.command("MAPTI", DeviceID=0, EventID=0, pINTID=LPI + 1, ICID=0)
    its.command("INT", DeviceID=0, EventID=0)
    its.ring()
    program.lpis()


@GICV3.add([[LPI], []], [[], []], "IHI 0069, 5.3, MAPD; arm-vgic-its, recorded answers")
def map_device_again(program: Program) -> None:
    """MAPD of a mapped device: KVM begins with no event, the emulator finds those of before in the ITT, where software
    has to clear them.
    """
    its = _its(program)
    its.command("CLEAR", DeviceID=0, EventID=0)
    its.command("MAPD", DeviceID=0, Size=3, ITT_addr=ITTS >> 8, V=1)
    its.command("INT", DeviceID=0, EventID=0)
    its.ring()
    program.lpis()


@GICV3.add([[LPI], []], [[], []], "arm-vgic-its, recorded answers")
def unmap_device_size(program: Program) -> None:
    """MAPD with V=0 and a Size out of range: KVM does not look at Size, the emulator ignores the command."""
    its = _its(program)
    its.command("CLEAR", DeviceID=0, EventID=0)
    its.command("MAPD", DeviceID=0, Size=31, V=0)
    its.command("INT", DeviceID=0, EventID=0)
    its.ring()
    program.lpis()


@GICV3.add([[LPI], []], [[], [LPI]], MOVED)
def retarget_collection(program: Program) -> None:
    """MAPC to another CPU, without MOVALL: KVM takes along what is pending."""
    its = _its(program)
    its.command("MAPC", ICID=0, RDbase=1, V=1)
    its.ring()
    program.lpis()


@GICV3.add([[LPI], []], [[], []], "IHI 0069, 5.3, MAPC")
def unmap_collection(program: Program) -> None:
    """MAPC with V=0 of a collection with events is unpredictable: KVM detaches them for good, the emulator until the
    collection is mapped again.
    """
    its = _its(program)
    its.command("CLEAR", DeviceID=0, EventID=0)
    its.command("MAPC", ICID=0, V=0)
    its.command("MAPC", ICID=0, RDbase=0, V=1)
    its.command("INT", DeviceID=0, EventID=0)
    its.ring()
    program.lpis()


@GICV3.add([[LPI], [LPI]], [[], [LPI]], "IHI 0069, 5.3, MOVALL; arm-vgic-its, recorded answers")
def move_all(program: Program) -> None:
    """MOVALL without MAPC: KVM moves the LPIs whatever their collection says, the emulator what is pending."""
    its = _its(program)
    its.command("MOVALL", RDbase=0, RDbase2=1)
    its.command("CLEAR", DeviceID=0, EventID=0)
    its.command("INT", DeviceID=0, EventID=0)
    its.ring()
    program.lpis()


@GICV3.add([[LPI], []], [[], []], TABLES_OWNED)
def disable_lpis(program: Program) -> None:
    """EnableLPIs cleared: what is pending belongs in the table; KVM 6.1 drops what a vCPU has queued."""
    _its(program)
    program.write(frame(0) + GICR_CTLR, 0)
    program.lpis()


@GICV3.add([[LPI, LPI + 1], []], [[LPI], []], TABLES_OWNED)
def moved_and_disabled(program: Program) -> None:
    """So it is with an LPI that has been moved away since: a vCPU that has not run still has it queued."""
    its = _its(program)
    its.command("MAPTI", DeviceID=0, EventID=1, pINTID=LPI + 1, ICID=1)
    its.command("INT", DeviceID=0, EventID=1)
    its.command("MOVI", DeviceID=0, EventID=1, ICID=0)
    its.ring()
    program.write(frame(1) + GICR_CTLR, 0)
    program.lpis()


@GICV3.add([[], []], [[LPI], []], TABLES_OWNED)
def pending_table_zero(program: Program) -> None:
    """GICR_PENDBASER.PTZ: KVM does not read the table then, and keeps what was pending and not queued."""
    its = _its(program)
    program.write(GICD, 0)
    its.command("CLEAR", DeviceID=0, EventID=0)
    its.command("INT", DeviceID=0, EventID=0)
    its.ring()
    program.write(frame(0) + GICR_CTLR, 0)
    program.zero(PENDING, PENDING_SIZE)
    program.write(frame(0) + GICR_PENDBASER, PENDING | PTZ, 8)
    program.write(frame(0) + GICR_CTLR, 1)
    program.lpis()


@GICV3.add([[], []], [[LPI], []], TABLES_OWNED)
def stale_bit(program: Program) -> None:
    """While LPIs are enabled the table is the GIC's: KVM leaves a bit it has read there, and MAPTI finds it again."""
    its = _its(program)
    program.write(frame(0) + GICR_CTLR, 0)
    program.zero(PENDING, PENDING_SIZE)
    program.store(PENDING + LPI // 8, b"\x01")
    program.write(frame(0) + GICR_CTLR, 1)
    its.command("CLEAR", DeviceID=0, EventID=0)
    its.command("DISCARD", DeviceID=0, EventID=0)
    its.command("MAPTI", DeviceID=0, EventID=0, pINTID=LPI, ICID=0)
    its.ring()
    program.lpis()


@GICV3.add(CONFIG, CONFIG + 0x1_0180, "IHI 0069, GICR_TYPER.CommonLPIAff")
def propbaser_of_each(program: Program) -> None:
    """GICR_PROPBASER has to be the same for all; KVM has one."""
    program.write(frame(0) + GICR_PROPBASER, CONFIG, 8)
    program.write(frame(1) + GICR_PROPBASER, CONFIG + 0x1_0000, 8)
    program.read(frame(0) + GICR_PROPBASER + 4)
    program.read(frame(0) + GICR_PROPBASER, 8)


@GICV3.add([[LPI], []], [[], []], "arm-vgic-its")
def doorbell_of_a_cpu(program: Program) -> None:
    """GITS_TRANSLATER: KVM takes MSIs from devices only; to the emulator any write of qtest is device 0's."""
    its = _its(program)
    its.command("CLEAR", DeviceID=0, EventID=0)
    its.ring()
    program.write(DOORBELL, 0)
    program.lpis()


@GICV3.add(0x20, 0, "IHI 0069, GITS_CREADR")
def write_creadr(program: Program) -> None:
    """GITS_CREADR is read-only; the emulator takes a write."""
    program.write(GITS + CREADR, 0x20, 8)
    program.read(GITS + CREADR, 8)


@GICV3.add(0x60, 0, "IHI 0069, GITS_CBASER")
def new_queue(program: Program) -> None:
    """GITS_CBASER written: GITS_CREADR is cleared, and in KVM GITS_CWRITER as well."""
    program.write(GITS + CBASER, VALID | QUEUE, 8)
    program.write(GITS + CWRITER, 0x60, 8)
    program.write(GITS + CBASER, VALID | QUEUE, 8)
    program.read(GITS + CWRITER, 8)


@GICV3.add(0x2000, 0, "IHI 0069, GITS_CWRITER")
def writer_beyond_queue(program: Program) -> None:
    """GITS_CWRITER beyond the queue is CONSTRAINED UNPREDICTABLE: KVM ignores the write."""
    program.write(GITS + CBASER, VALID | QUEUE, 8)
    program.write(GITS + CWRITER, 0x2000, 8)
    program.read(GITS + CWRITER, 8)


@GICV3.add(0xAAAA_AAAA, 0, "IHI 0069, GICR_ICFGR1")
def configure_ppi(program: Program) -> None:
    """Whether software can program PPIs is IMPLEMENTATION DEFINED: not in KVM."""
    program.write(frame(0) + SGI_BASE + ICFGR + 4, 0xAAAA_AAAA)
    program.read(frame(0) + SGI_BASE + ICFGR + 4)


@GICV3.add(1 << 8, 0, "IHI 0069, GICD_ICFGR<n>")
def edge_while_high(program: Program) -> None:
    """Made level-triggered with its line high, the pending state is UNKNOWN: KVM does not know the line of an
    edge-triggered interrupt.
    """
    program.write(GICD + ICFGR + 8, 0xAAAA_AAAA)
    program.line(40, 1)
    program.write(GICD + ICPENDR + 4, 1 << 8)
    program.write(GICD + ICFGR + 8, 0)
    program.read(GICD + BITMAPS["ISPENDR"] + 4)


@GICV3.add(0, 0xFFFF_FFFF, "IHI 0069, GICD_IGROUPR<n>")
def reset_group(program: Program) -> None:
    """The reset value is UNKNOWN."""
    program.read(GICD + BITMAPS["IGROUPR"] + 4)


@GICV3.add(0, 0xFFFF, "IHI 0069, GICR_ISENABLER0")
def reset_sgis(program: Program) -> None:
    """The reset value is UNKNOWN."""
    program.read(frame(0) + SGI_BASE + BITMAPS["ISENABLER"])


@GICV3.add(0, 0xAAAA_AAAA, "IHI 0069, GICD_ICFGR<n>")
def reset_trigger(program: Program) -> None:
    """The reset value is UNKNOWN."""
    program.read(GICD + ICFGR + 8)
