"""Driver for GICv2 with a GICv2m frame, as an operating system would write it.

A GICv2 has one distributor, whose registers for INTIDs 0 to 31 each CPU sees its own copy of, and a CPU interface
in memory: an interrupt is acknowledged by reading GICC_IAR and ended by writing what was read to GICC_EOIR, for an
SGI with the number of its sender. There is one security state, so all interrupts are in group 0 and signalled as IRQ.

A GICv2 has no ITS. Boards that take message-signalled interrupts have a GICv2m frame beside it: a write of an SPI's
number to MSI_SETSPI_NS raises that SPI, and MSI_TYPER says which SPIs are the frame's. A device's vector is such
an SPI, edge-triggered and aimed at one CPU.

Sources: GICv2 architecture (IHI 0048), chapters 3 (SGIs) and 4 (registers); Server Base System Architecture
(DEN 0029), appendix "GICv2m architecture".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from fabric.guest.driver import MsiMessage
from fabric.guest.gic import ALL_SGIS, DEFAULT_PRIORITY, PMR_ALL, SPURIOUS_FIRST, SPURIOUS_LAST, GicDriver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fabric.guest.driver import Vector

GICD_CTLR = 0x000
GICD_CTLR_ENABLE = 1 << 0
GICD_ISENABLER = 0x100
GICD_ICENABLER = 0x180
GICD_IPRIORITYR = 0x400
GICD_ITARGETSR = 0x800
GICD_ICFGR = 0xC00
GICD_ICFGR_EDGE = 0b10
GICD_SGIR = 0xF00

GICC_CTLR = 0x00
GICC_CTLR_ENABLE = 1 << 0
GICC_PMR = 0x04
GICC_BPR = 0x08
GICC_IAR = 0x0C
GICC_EOIR = 0x10
IAR_INTID = 0x3FF

MSI_TYPER = 0x008
MSI_SETSPI_NS = 0x040


@attrs.frozen
class Gicv2Layout:
    """Where firmware says the interrupt controller is."""

    distributor: int
    cpu_interface: int
    msi_frame: int | None
    """The GICv2m frame, or None where there is none."""


class Gicv2Driver(GicDriver):
    """The GICv2 and GICv2m driver of one guest; see :class:`fabric.guest.driver.InterruptDriver`."""

    def __init__(self, layout: Gicv2Layout, cpus: int) -> None:
        super().__init__(cpus)
        self.layout = layout
        self._iar = layout.cpu_interface + GICC_IAR
        self._eoir = layout.cpu_interface + GICC_EOIR
        self._masks = [0] * cpus
        """For each CPU its bit in GICD_ITARGETSR and GICD_SGIR."""
        self._next_spi = 0
        self._last_spi = -1

    # Bringing it up.

    async def start(self, cpu: Any) -> None:
        """The distributor, and the SPIs of the GICv2m frame, which are edges."""
        base = self.layout.distributor
        await cpu.store(base + GICD_CTLR, 4, 0)
        if self.layout.msi_frame is not None:
            typer = await cpu.load(self.layout.msi_frame + MSI_TYPER, 4)
            self._next_spi = typer >> 16 & 0x3FF
            self._last_spi = self._next_spi + (typer & 0x3FF) - 1
            await self._make_edges(cpu, self._next_spi, self._last_spi)
        await cpu.store(base + GICD_CTLR, 4, GICD_CTLR_ENABLE)

    async def _make_edges(self, cpu: Any, first: int, last: int) -> None:
        for word in range(first // 16, last // 16 + 1):
            register = self.layout.distributor + GICD_ICFGR + 4 * word
            value = await cpu.load(register, 4)
            for intid in range(max(first, 16 * word), min(last, 16 * word + 15) + 1):
                value |= GICD_ICFGR_EDGE << 2 * (intid % 16)
            await cpu.store(register, 4, value)

    async def start_cpu(self, cpu: Any) -> None:
        """This CPU's copy of the distributor's first registers, and its CPU interface."""
        distributor, interface = self.layout.distributor, self.layout.cpu_interface
        # Each byte of the first eight registers reads as the bit of the CPU that reads it.
        self._masks[cpu.number] = await cpu.load(distributor + GICD_ITARGETSR, 1)
        await cpu.store(distributor + GICD_ICENABLER, 4, 0xFFFF_FFFF ^ ALL_SGIS)
        for intid in range(0, 32, 4):
            await cpu.store(distributor + GICD_IPRIORITYR + intid, 4, DEFAULT_PRIORITY * 0x0101_0101)
        await self.enable_private(cpu, ALL_SGIS)
        await cpu.store(interface + GICC_PMR, 4, PMR_ALL)
        await cpu.store(interface + GICC_BPR, 4, 0)
        await cpu.store(interface + GICC_CTLR, 4, GICC_CTLR_ENABLE)
        cpu.set_vector(self.handle)

    async def enable_private(self, cpu: Any, intids: int) -> None:
        """GICD_ISENABLER0, of which each CPU has its own."""
        await cpu.store(self.layout.distributor + GICD_ISENABLER, 4, intids)

    # What workloads use.

    async def allocate_msi(self, cpu: Any, devid: int, vectors: Sequence[Vector]) -> list[MsiMessage]:
        """Give each vector an SPI of the GICv2m frame, aimed at its CPU. RuntimeError when there are none left."""
        frame = self.layout.msi_frame
        if frame is None:
            raise RuntimeError("this machine has no GICv2m frame, so no MSIs")
        first = self._next_spi
        if first + len(vectors) - 1 > self._last_spi:
            raise RuntimeError(
                f"device {devid:#x} needs {len(vectors)} SPIs of the GICv2m frame, and {self._last_spi + 1 - first} are"
                " left"
            )
        self._next_spi += len(vectors)
        distributor = self.layout.distributor
        for spi, vector in enumerate(vectors, first):
            self._actions[vector.cpu][spi] = vector.handler
            self._labels[spi] = vector.label
            # These two can be accessed by the byte, and writing a 1 enables: CPUs need no lock among them.
            await cpu.store(distributor + GICD_IPRIORITYR + spi, 1, vector.priority)
            await cpu.store(distributor + GICD_ITARGETSR + spi, 1, self._masks[vector.cpu])
            await cpu.store(distributor + GICD_ISENABLER + spi // 32 * 4, 4, 1 << spi % 32)
        return [MsiMessage(frame + MSI_SETSPI_NS, first + number, devid) for number in range(len(vectors))]

    async def send_ipi(self, cpu: Any, target: int, kind: int = 0) -> None:
        """SGI number ``kind`` to one CPU, through GICD_SGIR."""
        await cpu.store(self.layout.distributor + GICD_SGIR, 4, self._masks[target] << 16 | kind)

    async def handle(self, cpu: Any) -> None:
        """Acknowledge, run the handler, end."""
        taken = await cpu.load(self._iar, 4)
        intid = taken & IAR_INTID
        handler = self._actions[cpu.number].get(intid)
        if handler is not None:
            await handler(cpu)
        elif SPURIOUS_FIRST <= intid <= SPURIOUS_LAST:
            return
        await cpu.store(self._eoir, 4, taken)
