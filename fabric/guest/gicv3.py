"""Driver for GICv3 with ITS, as an operating system would write it.

It sets up the distributor, finds each CPU's redistributor by walking the frames, enables LPIs with tables in
memory of its own, and maps device events to LPIs through the ITS command queue. Interrupts are acknowledged at
ICC_IAR1_EL1 and ended at ICC_EOIR1_EL1 (EOImode 0), all in group 1.

Sources: GICv3 architecture (IHI 0069), sections 4 (initialisation), 5 (LPIs), 5.3 (ITS commands).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from fabric.guest.driver import MsiMessage, Pages
from fabric.guest.gic import ALL_SGIS, DEFAULT_PRIORITY, PMR_ALL, SPURIOUS_FIRST, SPURIOUS_LAST, GicDriver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fabric.guest.driver import Vector

GICD_CTLR = 0x0000
GICD_CTLR_ENABLE_GRP1 = 1 << 1
GICD_CTLR_ARE = 1 << 4

GICR_CTLR = 0x0000
GICR_CTLR_ENABLE_LPIS = 1 << 0
GICR_TYPER = 0x0008
GICR_TYPER_LAST = 1 << 4
GICR_WAKER = 0x0014
GICR_PROPBASER = 0x0070
GICR_PENDBASER = 0x0078
GICR_PENDBASER_PTZ = 1 << 62
GICR_SGI_BASE = 0x10000
GICR_IGROUPR0 = GICR_SGI_BASE + 0x0080
GICR_ISENABLER0 = GICR_SGI_BASE + 0x0100
GICR_IPRIORITYR = GICR_SGI_BASE + 0x0400
GICR_FRAME = 0x20000

GITS_CTLR = 0x0000
GITS_TYPER = 0x0008
GITS_CBASER = 0x0080
GITS_CWRITER = 0x0088
GITS_CREADR = 0x0090
GITS_BASER = 0x0100
GITS_TRANSLATER = 0x10040
GITS_VALID = 1 << 63
BASER_TYPE_DEVICES = 1
BASER_TYPE_COLLECTIONS = 4
PAGE_64K = 2 << 8
"""GITS_BASER.Page_Size: 64 KiB."""

CMD_MAPD, CMD_MAPC, CMD_MAPTI, CMD_INV, CMD_SYNC = 0x8, 0x9, 0xA, 0xC, 0x5
CMD_SIZE = 32

FIRST_LPI = 8192
LPI_ENABLE = 1 << 0
"""In the configuration byte of an LPI."""

RWAWB_INNER_SHAREABLE = 0x780
"""Cacheability and shareability of GICR_PROPBASER and GICR_PENDBASER: normal memory."""


@attrs.frozen
class Gicv3Layout:
    """Where firmware says the interrupt controller is, and what memory its tables may use."""

    distributor: int
    redistributors: int
    its: int | None
    tables: int
    """Guest physical address of memory for tables."""
    tables_size: int


class Gicv3Driver(GicDriver):
    """The GICv3 and ITS driver of one guest; see :class:`fabric.guest.driver.InterruptDriver`."""

    def __init__(self, layout: Gicv3Layout, cpus: int, *, lpis: int = 65536 - FIRST_LPI) -> None:
        super().__init__(cpus)
        self.layout = layout
        self.lpi_id_bits = max(14, (FIRST_LPI + lpis - 1).bit_length())
        self._pages = Pages(layout.tables, layout.tables_size)
        self._mpidr = [0] * cpus
        self._next_lpi = FIRST_LPI
        self._configuration = 0
        self._pending_table_size = (1 << self.lpi_id_bits) // 8
        self._commands = 0
        self._command_slots = 0
        self._writer = 0
        self._queue_locked = False
        self._frames: dict[int, int] = {}
        """Redistributor frames by affinity."""
        self._redistributor = [0] * cpus

    # Bringing it up.

    async def start(self, cpu: Any) -> None:
        """The distributor, the LPI configuration table and the ITS with its tables and command queue."""
        base = self.layout.distributor
        await cpu.store(base + GICD_CTLR, 4, GICD_CTLR_ARE | GICD_CTLR_ENABLE_GRP1)
        if self.layout.its is None:
            return
        # One byte an LPI, all disabled: memory is zero when we get it.
        self._configuration = self._pages.take(1 << self.lpi_id_bits, 1 << 16)
        await self._start_its(cpu, self.layout.its)

    async def _start_its(self, cpu: Any, its: int) -> None:
        typer = await cpu.load(its + GITS_TYPER, 8)
        self._itt_entry = (typer >> 4 & 0xF) + 1
        for number in range(8):
            register = its + GITS_BASER + 8 * number
            baser = await cpu.load(register, 8)
            kind = baser >> 56 & 7
            if kind not in (BASER_TYPE_DEVICES, BASER_TYPE_COLLECTIONS):
                continue
            entries = 1 << 16 if kind == BASER_TYPE_DEVICES else self.cpus
            size = entries * ((baser >> 48 & 0x1F) + 1)
            pages = -(-size // 0x10000)
            table = self._pages.take(pages * 0x10000, 0x10000)
            await cpu.store(register, 8, GITS_VALID | table | PAGE_64K | pages - 1)
        self._commands = self._pages.take(0x10000, 0x10000)
        self._command_slots = 0x10000 // CMD_SIZE
        await cpu.store(its + GITS_CBASER, 8, GITS_VALID | self._commands | 0x10000 // 4096 - 1)
        await cpu.store(its + GITS_CWRITER, 8, 0)
        await cpu.store(its + GITS_CTLR, 4, 1)

    async def start_cpu(self, cpu: Any) -> None:
        """This CPU's redistributor, its LPI tables, its collection and its CPU interface."""
        number = cpu.number
        mpidr = self._mpidr[number] = await cpu.mrs("MPIDR_EL1") & 0xFF_00FF_FFFF
        frame = self._redistributor[number] = await self._find_redistributor(cpu, mpidr)
        await cpu.store(frame + GICR_WAKER, 4, 0)
        await cpu.store(frame + GICR_IGROUPR0, 4, 0xFFFF_FFFF)
        for intid in range(0, 32, 4):
            await cpu.store(frame + GICR_IPRIORITYR + intid, 4, DEFAULT_PRIORITY * 0x0101_0101)
        await self.enable_private(cpu, ALL_SGIS)
        if self.layout.its is not None:
            await self._start_lpis(cpu, frame, self.layout.its)
        await cpu.msr("ICC_SRE_EL1", 7)
        await cpu.msr("ICC_PMR_EL1", PMR_ALL)
        await cpu.msr("ICC_BPR1_EL1", 0)
        await cpu.msr("ICC_IGRPEN1_EL1", 1)
        cpu.set_vector(self.handle)

    async def _find_redistributor(self, cpu: Any, mpidr: int) -> int:
        affinity = (mpidr >> 32 & 0xFF) << 24 | mpidr & 0xFF_FFFF
        if not self._frames:
            await self._walk_redistributors(cpu)
        frame = self._frames.get(affinity)
        if frame is None:
            raise RuntimeError(f"no redistributor has the affinity {affinity:#x} of CPU {cpu.number}")
        return frame

    async def _walk_redistributors(self, cpu: Any) -> None:
        frame = self.layout.redistributors
        while True:
            typer = await cpu.load(frame + GICR_TYPER, 8)
            self._frames[typer >> 32] = frame
            if typer & GICR_TYPER_LAST:
                return
            frame += GICR_FRAME

    async def _start_lpis(self, cpu: Any, frame: int, its: int) -> None:
        pending = self._pages.take(self._pending_table_size, 1 << 16)
        attributes = RWAWB_INNER_SHAREABLE
        await cpu.store(frame + GICR_PROPBASER, 8, self._configuration | attributes | self.lpi_id_bits - 1)
        await cpu.store(frame + GICR_PENDBASER, 8, GICR_PENDBASER_PTZ | pending | attributes)
        await cpu.store(frame + GICR_CTLR, 4, GICR_CTLR_ENABLE_LPIS)
        # GITS_TYPER.PTA is 0 in KVM: a collection is aimed at a processor number, from GICR_TYPER.
        processor = await cpu.load(frame + GICR_TYPER, 8) >> 8 & 0xFFFF
        number = cpu.number
        map_collection = (CMD_MAPC, 0, GITS_VALID | processor << 16 | number)
        await self._run_commands(cpu, its, [map_collection, (CMD_SYNC, 0, processor << 16)])

    # The ITS command queue.

    async def _run_commands(self, cpu: Any, its: int, commands: Sequence[tuple[int, ...]]) -> None:
        """Queue commands of up to four 64-bit words each and wait until the ITS has run them."""
        while self._queue_locked:  # the spinlock every such driver has
            await cpu.compute(100)
        self._queue_locked = True
        for words in commands:
            slot = self._commands + self._writer * CMD_SIZE
            for position in range(4):
                await cpu.store(slot + 8 * position, 8, words[position] if position < len(words) else 0)
            self._writer = (self._writer + 1) % self._command_slots
            if self._writer == 0:
                await self._ring(cpu, its)  # long before the queue can be full
        await self._ring(cpu, its)
        self._queue_locked = False

    async def _ring(self, cpu: Any, its: int) -> None:
        await cpu.store(its + GITS_CWRITER, 8, self._writer * CMD_SIZE)
        while await cpu.load(its + GITS_CREADR, 8) != self._writer * CMD_SIZE:
            await cpu.compute(1_000)

    # What workloads use.

    async def allocate_msi(self, cpu: Any, devid: int, vectors: Sequence[Vector]) -> list[MsiMessage]:
        """Map ``devid`` with an event for each vector, and each event to an LPI of its own aimed at its CPU."""
        its = self.layout.its
        if its is None:
            raise RuntimeError("this machine has no ITS, so no MSIs")
        bits = max(1, (len(vectors) - 1).bit_length())
        itt = self._pages.take(max(256, (1 << bits) * self._itt_entry), 256)
        commands: list[tuple[int, ...]] = [(CMD_MAPD | devid << 32, bits - 1, GITS_VALID | itt)]
        messages = []
        for event, vector in enumerate(vectors):
            lpi = self._next_lpi
            self._next_lpi += 1
            self._actions[vector.cpu][lpi] = vector.handler
            self._labels[lpi] = vector.label
            await cpu.store(self._configuration + lpi - FIRST_LPI, 1, vector.priority | LPI_ENABLE)
            commands.append((CMD_MAPTI | devid << 32, event | lpi << 32, vector.cpu))
            commands.append((CMD_INV | devid << 32, event))
            messages.append(MsiMessage(its + GITS_TRANSLATER, event, devid))
        await self._run_commands(cpu, its, commands)
        return messages

    async def send_ipi(self, cpu: Any, target: int, kind: int = 0) -> None:
        """SGI number ``kind`` to one CPU, through ICC_SGI1R_EL1."""
        mpidr = self._mpidr[target]
        aff3, aff2, aff1, aff0 = mpidr >> 32 & 0xFF, mpidr >> 16 & 0xFF, mpidr >> 8 & 0xFF, mpidr & 0xFF
        value = aff3 << 48 | kind << 24 | aff2 << 32 | aff1 << 16 | 1 << (aff0 & 0xF)
        await cpu.msr("ICC_SGI1R_EL1", value)

    async def enable_private(self, cpu: Any, intids: int) -> None:
        """GICR_ISENABLER0 of this CPU's redistributor."""
        await cpu.store(self._redistributor[cpu.number] + GICR_ISENABLER0, 4, intids)

    async def handle(self, cpu: Any) -> None:
        """Acknowledge, run the handler, end."""
        intid = cpu.iar1()
        handler = self._actions[cpu.number].get(intid)
        if handler is not None:
            await handler(cpu)
        elif SPURIOUS_FIRST <= intid <= SPURIOUS_LAST:
            return
        cpu.eoir1(intid)
