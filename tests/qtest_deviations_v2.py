"""Where KVM and an emulator part for good: GICv2, as CPU 0 sees it. See :mod:`qtest_deviations`.

What a guest of KVM sees of the CPU interface is the hardware's virtual one, with four list registers.
"""

from __future__ import annotations

from qtest_deviations import Deviations
from qtest_programs import (
    ACK_CTL,
    BITMAPS,
    ENABLE,
    EOI_MODE,
    GICC_ABPR,
    GICC_BPR,
    GICC_CTLR,
    GICC_HPPIR,
    GICC_PMR,
    ICENABLER,
    ICFGR,
    IPRIORITYR,
    ITARGETSR,
    LOWEST,
    SGIR,
)
from qtest_steps import GICC, GICC_EOIR, GICD, Program

GICV2 = Deviations("gicv2")
GICC_AIAR, GICC_APR0 = 0x20, 0xD0


def _spis(program: Program, *spis: tuple[int, int], control: int = 0, group: int = 0) -> None:
    """Enable edge-triggered SPIs, given with their priorities, for CPU 0, and everything that forwards them."""
    write = program.write
    write(GICD, ENABLE)
    write(GICD + ICFGR + 8, 0xAAAA_AAAA)
    for spi, priority in spis:
        write(GICD + IPRIORITYR + spi, priority, 1)
        write(GICD + ITARGETSR + spi, 1, 1)
    write(GICD + BITMAPS["IGROUPR"] + 4, 0xFFFF_FFFF * group)
    write(GICD + BITMAPS["ISENABLER"] + 4, sum(1 << spi - 32 for spi, _ in spis))
    write(GICC + GICC_PMR, LOWEST)
    write(GICC + GICC_BPR, 2)
    write(GICC + GICC_ABPR, 3)
    write(GICC + GICC_CTLR, ENABLE | control)


def _pend(program: Program, *spis: int) -> None:
    program.write(GICD + BITMAPS["ISPENDR"] + 4, sum(1 << spi - 32 for spi in spis))


@GICV2.add(0, 40, "IHI 0048, GICC_AIAR")
def aliased_acknowledge(program: Program) -> None:
    """The emulator has none of the aliased registers for group 1."""
    _spis(program, (40, 0x80), group=1)
    _pend(program, 40)
    program.read(GICC + GICC_AIAR)


@GICV2.add(1022, 1023, "IHI 0048, 3.2.5 Special interrupt numbers when a GIC supports interrupt grouping")
def other_group_of_low_priority(program: Program) -> None:
    """1022 says that an interrupt of the other group could be taken; the emulator does not ask whether it could."""
    _spis(program, (40, 0x20), (41, 0x80))
    program.write(GICD + BITMAPS["IGROUPR"] + 4, 1 << 9)
    _pend(program, 40, 41)
    program.acknowledge()
    program.acknowledge()


@GICV2.add(1023, 40, "IHI 0048, GICC_HPPIR")
def first_in_line_masked(program: Program) -> None:
    """GICC_HPPIR: the emulator hides what GICC_PMR masks."""
    _spis(program, (40, 0x80))
    program.write(GICC + GICC_PMR, 0x10)
    _pend(program, 40)
    program.read(GICC + GICC_HPPIR)


@GICV2.add(40, 1023, "IHI 0048, GICC_HPPIR")
def first_in_line_disabled(program: Program) -> None:
    """GICC_HPPIR: KVM hides a group that is disabled at the CPU interface."""
    _spis(program, (40, 0x80), control=ACK_CTL, group=1)
    _pend(program, 40)
    program.write(GICC + GICC_CTLR, 1 | ACK_CTL)
    program.read(GICC + GICC_HPPIR)


@GICV2.add(0, 1 << 8, "IHI 0048, GICD_ISPENDRn; Linux 6.1")
def level_latched(program: Program) -> None:
    """GICD_ISPENDR of a level-triggered interrupt: KVM sees that it was taken when it has ended."""
    _spis(program, (40, 0x80))
    program.write(GICD + ICFGR + 8, 0)
    _pend(program, 40)
    program.acknowledge()
    program.read(GICD + BITMAPS["ISPENDR"] + 4)


@GICV2.add(1 << 8, 0, "IHI 0048, GICC_EOIR")
def end_without_acknowledge(program: Program) -> None:
    """GICC_EOIR of an interrupt not acknowledged is UNPREDICTABLE: the hardware under KVM deactivates it."""
    _spis(program, (40, 0x80))
    program.write(GICD + BITMAPS["ISACTIVER"] + 4, 1 << 8)
    program.write(GICC + GICC_EOIR, 40)
    program.read(GICD + BITMAPS["ISACTIVER"] + 4)


@GICV2.add(1023, 40, "arm-vgic, recorded answers")
def no_target(program: Program) -> None:
    """An SPI without a target KVM sends to vCPU 0."""
    _spis(program, (40, 0x80))
    program.write(GICD + ITARGETSR + 40, 0, 1)
    _pend(program, 40)
    program.acknowledge()


@GICV2.add(1 << 8, 0, "IHI 0048, 1.4.3 Models for handling interrupts")
def two_targets(program: Program) -> None:
    """The CPU that acknowledges an SPI takes it for all its targets; in the emulator it stays pending for the other."""
    _spis(program, (40, 0x80))
    program.write(GICD + ITARGETSR + 40, 3, 1)
    program.line(40, 1)
    program.acknowledge()
    program.read(GICD + BITMAPS["ISPENDR"] + 4)


@GICV2.add(40, 1023, "Linux 6.1")
def there_and_back(program: Program) -> None:
    """A pending SPI given another target stays, in KVM, queued for the first one until that runs."""
    _spis(program, (40, 0x80))
    program.write(GICD + ICFGR + 8, 0)
    program.write(GICD + ITARGETSR + 40, 2, 1)
    program.line(40, 1)
    program.write(GICD + ITARGETSR + 40, 1, 1)
    program.acknowledge()


@GICV2.add(0, 2, "IHI 0048, GICC_BPR")
def least_binary_point(program: Program) -> None:
    """The minimum is IMPLEMENTATION DEFINED, and 2 with five priority bits."""
    program.write(GICC + GICC_BPR, 0)
    program.read(GICC + GICC_BPR)


@GICV2.add(40, 1023, "Linux 6.1")
def sgi_again_while_active(program: Program) -> None:
    """KVM puts nothing of lower priority in a list register then."""
    _spis(program, (40, 0x80), control=EOI_MODE)
    program.write(GICD + SGIR, 2 << 24)
    program.acknowledge()
    program.write(GICD + SGIR, 2 << 24)
    program.end()
    _pend(program, 40)
    program.acknowledge()


@GICV2.add(44, 1023, "Linux 6.1")
def five_active(program: Program) -> None:
    """KVM has four list registers."""
    _spis(program, (40, 0x50), (41, 0x40), (42, 0x30), (43, 0x20), (44, 0x10))
    for spi in range(40, 45):
        _pend(program, spi)
        program.acknowledge()


@GICV2.add(0xFFFF, 0, "IHI 0048, GICD_ICENABLERn")
def disable_sgi(program: Program) -> None:
    """Whether SGIs can be disabled is IMPLEMENTATION DEFINED."""
    program.write(GICD + ICENABLER, 0xFFFF_FFFF)
    program.read(GICD + ICENABLER)


@GICV2.add(0xAAAA_AAAA, 0, "IHI 0048, GICD_ICFGRn")
def configure_ppi(program: Program) -> None:
    """Whether software can program PPIs is IMPLEMENTATION DEFINED: not in KVM."""
    program.write(GICD + ICFGR + 4, 0xAAAA_AAAA)
    program.read(GICD + ICFGR + 4)


@GICV2.add(40, 1023, "recorded answers of Linux 6.1")
def pended_while_disabled(program: Program) -> None:
    """KVM queues it by the next event on it only."""
    _spis(program, (40, 0x80))
    program.write(GICD, 0)
    _pend(program, 40)
    program.write(GICD, ENABLE)
    program.acknowledge()


@GICV2.add(40, 41, "IHI 0048, 3.3 Interrupt prioritization")
def equals(program: Program) -> None:
    """Which comes first is IMPLEMENTATION DEFINED: KVM goes by time."""
    _spis(program, (40, 0x80), (41, 0x80))
    _pend(program, 41)
    _pend(program, 40)
    program.acknowledge()


@GICV2.add(0, 1 << 16, "IHI 0048, GICC_APRn")
def active_priorities(program: Program) -> None:
    """Its format is IMPLEMENTATION DEFINED."""
    _spis(program, (40, 0x80))
    _pend(program, 40)
    program.acknowledge()
    program.read(GICC + GICC_APR0)


@GICV2.add(0, 0xAAAA_AAAA, "IHI 0048, GICD_ICFGRn")
def reset_trigger(program: Program) -> None:
    """The reset value is UNKNOWN."""
    program.read(GICD + ICFGR + 8)
