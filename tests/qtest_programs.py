"""Random programs of :mod:`qtest_steps` made from seeds: registers of the GICs. The ITS is in :mod:`qtest_its`.

They keep to what the architecture defines. Where it leaves an effect open (UNPREDICTABLE, UNKNOWN), or where KVM or the
emulator is known to differ from it in a way that would make all that follows differ, a program does first what the
architecture asks of software, or leaves that step out; each such case has an example in :mod:`qtest_deviations`.
"""

from __future__ import annotations

from random import Random

from qtest_steps import CPUS, GICC, GICD, GITS, NR_IRQS, Program, frame

BITMAPS = {"IGROUPR": 0x080, "ISENABLER": 0x100, "ICENABLER": 0x180, "ISPENDR": 0x200, "ICPENDR": 0x280,
           "ISACTIVER": 0x300, "ICACTIVER": 0x380}  # fmt: skip
IPRIORITYR, ICFGR, IROUTER, SGI_BASE = 0x400, 0xC00, 0x6000, 0x1_0000
ICENABLER, ICPENDR = BITMAPS["ICENABLER"], BITMAPS["ICPENDR"]
GICD_IDENTITY = (0x0, 0x4, 0x8, 0xC, 0x10, *range(0xFFD0, 0x10000, 4))
GICR_IDENTITY = (0x0, 0x4, 0x10, 0x14, *range(0xFFD0, 0x10000, 4), SGI_BASE + 0xC00, SGI_BASE + 0xC04)
GICR_PROPBASER, GICR_PENDBASER = 0x70, 0x78
GITS_CTLR, GITS_CBASER, GITS_CWRITER, GITS_CREADR = 0x0, 0x80, 0x88, 0x90
GITS_TABLES = (0x100, 0x108, 0x110, 0x138)
KVM_TIMERS = (27, 30)
"""PPIs whose lines KVM's timers drive."""
PPIS = tuple(n for n in range(16, 32) if n not in KVM_TIMERS)


FRAMES = ((GICD, 32, NR_IRQS), *((frame(cpu) + SGI_BASE, 0, 32) for cpu in range(CPUS)))
"""Registers of interrupts: base, and the INTIDs from first to last."""


class Words:
    """Random values as they matter to bitmaps: few bits, all bits, any."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    def word(self, bits: int = 32) -> int:
        rng = self.rng
        kind = rng.random()
        if kind < 0.5:
            return sum({1 << rng.randrange(bits) for _ in range(rng.randint(1, 4))})
        if kind < 0.8:
            return rng.getrandbits(bits)
        return (1 << bits) - 1 if kind < 0.9 else 0


# -- GICv3: distributor and redistributors -------------------------------------------------------------------------


class Gicv3Registers(Words):
    """Accesses to GICD and GICR of every CPU, and input lines."""

    def __init__(self, seed: int, length: int = 300) -> None:
        super().__init__(Random(f"gicv3 {seed}"))
        self.program = Program(f"gicv3 {seed}", "gicv3")
        self.high: set[tuple[int, int]] = set()
        """The lines that are high, as ``(intid, cpu)``."""
        self.set_up()
        self.program.essential = len(self.program.steps)
        actions = {
            self.bitmap: 50, self.priority: 12, self.line: 12, self.route: 6, self.configure: 4, self.control: 3,
            self.identity: 4, self.reserved: 3, self.table_register: 8,
        }  # fmt: skip
        for action in self.rng.choices(list(actions), list(actions.values()), k=length):
            action()
        self.dump()

    def set_up(self) -> None:
        """What software has to write because its reset value is UNKNOWN."""
        write = self.program.write
        for base, first, end in FRAMES:
            for word in range(first // 8, end // 8, 4):
                write(base + ICENABLER + word, 0xFFFF_FFFF)
                write(base + BITMAPS["IGROUPR"] + word, 0xFFFF_FFFF)
            for intid in range(first, end, 16):
                if intid >= 32:
                    write(base + ICFGR + intid // 4, 0)

    def where(self) -> tuple[int, int, int]:
        """Base of a frame with registers for interrupts, and the first and last INTID they are for."""
        if self.rng.random() < 0.6:
            return GICD, 32, NR_IRQS - 1
        return frame(self.rng.randrange(CPUS)) + SGI_BASE, 0, 31

    def intid(self, first: int, last: int) -> int:
        return self.rng.choice((self.rng.randint(first, last), self.rng.randint(first, min(last, first + 31)), last))

    def bitmap(self) -> None:
        base, first, last = self.where()
        name = self.rng.choice(list(BITMAPS))
        word = self.intid(first, last) // 32 * 4
        if self.rng.random() < 0.7:
            self.program.write(base + BITMAPS[name] + word, self.word())
        self.program.read(base + BITMAPS[self.rng.choice(list(BITMAPS)) if self.rng.random() < 0.5 else name] + word)

    def priority(self) -> None:
        base, first, last = self.where()
        intid = self.intid(first, last)
        size = self.rng.choice((1, 4))
        address = base + IPRIORITYR + intid // size * size
        if self.rng.random() < 0.7:
            self.program.write(address, self.rng.getrandbits(8 * size), size)
        size = self.rng.choice((1, 4))
        self.program.read(base + IPRIORITYR + intid // size * size, size)

    def line(self) -> None:
        """Toggle a line."""
        if self.high and self.rng.random() < 0.4:
            self.lower(self.rng.choice(sorted(self.high)))
            return
        spi = (self.rng.randint(32, 63 if self.rng.random() < 0.7 else NR_IRQS - 1), 0)
        line = self.rng.choice((spi, (self.rng.choice(PPIS), self.rng.randrange(CPUS))))
        if line in self.high:
            self.lower(line)
        else:
            self.high.add(line)
            self.program.line(line[0], 1, line[1])

    def lower(self, line: tuple[int, int]) -> None:
        self.high.remove(line)
        self.program.line(line[0], 0, line[1])

    def route(self) -> None:
        intid = self.intid(32, NR_IRQS - 1)
        size = self.rng.choice((4, 8))
        address = GICD + IROUTER + 8 * intid + (self.rng.choice((0, 4)) if size == 4 else 0)
        if self.rng.random() < 0.7:
            value = self.rng.choice((self.rng.randrange(CPUS), self.rng.getrandbits(8 * size)))
            self.program.write(address, value, size)
        self.program.read(address, size)

    def configure(self) -> None:
        """Change triggers of 16 SPIs, which must be neither enabled nor pending meanwhile."""
        first = self.rng.randint(2, 5 if self.rng.random() < 0.7 else NR_IRQS // 16 - 1) * 16
        for line in sorted(self.high):
            if first <= line[0] < first + 16:
                self.lower(line)
        ones = 0xFFFF << first % 32
        self.program.write(GICD + ICENABLER + first // 32 * 4, ones)
        self.program.write(GICD + ICPENDR + first // 32 * 4, ones)
        self.program.write(GICD + ICFGR + first // 4, self.word() if self.rng.random() < 0.7 else 0)
        self.program.read(GICD + ICFGR + first // 4)

    def control(self) -> None:
        self.program.write(GICD, self.rng.choice((0, 2, 2, 0x12, 0x52, self.word())))
        self.program.read(GICD)

    def identity(self) -> None:
        if self.rng.random() < 0.5:
            address = GICD + self.rng.choice(GICD_IDENTITY)
        else:
            address = frame(self.rng.randrange(CPUS)) + self.rng.choice(GICR_IDENTITY)
        self.program.read(address)
        if self.rng.random() < 0.3:
            triggers = frame(self.rng.randrange(CPUS)) + SGI_BASE + ICFGR
            self.program.write(triggers, self.rng.getrandbits(32))
            self.program.read(triggers)
        if self.rng.random() < 0.3:
            size = self.rng.choice((4, 8))
            self.program.read(frame(self.rng.randrange(CPUS)) + 8 + self.rng.choice((0, 8 - size)), size)

    def reserved(self) -> None:
        """Where there is no register."""
        redistributor = frame(self.rng.randrange(CPUS))
        at = self.rng.choice((
            GICD + self.rng.randrange(0x0020, 0x0040, 4), GICD + self.rng.randrange(0x0E00, 0x6000, 4),
            GICD + self.rng.randrange(0x8000, 0xFFD0, 4), redistributor + self.rng.randrange(0x200, 0xFFD0, 4),
            redistributor + SGI_BASE + self.rng.randrange(0x1000, 0xFFD0, 4),
        ))  # fmt: skip
        if self.rng.random() < 0.5:
            self.program.write(at, self.rng.getrandbits(32))
        self.program.read(at)

    def table_register(self) -> None:
        """Where tables are, and their attributes, while neither ITS nor LPIs are enabled."""
        cpu = self.rng.randrange(CPUS)
        offset = self.rng.choice((GITS_CBASER, GITS_CBASER, *GITS_TABLES))
        address = self.rng.choice((GITS + offset, frame(cpu) + GICR_PROPBASER, frame(cpu) + GICR_PENDBASER))
        size = self.rng.choice((4, 8))
        if self.rng.random() < 0.7:
            value, half = self.word(8 * size), self.rng.choice((0, 8 - size))
            # GICR_PROPBASER has to be the same for all CPUs.
            shared = [frame(cpu) + GICR_PROPBASER for cpu in range(CPUS)]
            for written in shared if address in shared else (address,):
                self.program.write(written + half, value, size)
            if address == GITS + GITS_CBASER:
                self.program.read(GITS + GITS_CREADR, 8)
                self.program.write(GITS + GITS_CWRITER, self.rng.randrange(0, 0x1000, 32), self.rng.choice((4, 8)))
        size = self.rng.choice((4, 8))
        self.program.read(address + self.rng.choice((0, 8 - size)), size)
        self.program.read(GITS + self.rng.choice((GITS_CTLR, GITS_CREADR, GITS_CWRITER)))

    def dump(self) -> None:
        """The whole state."""
        read = self.program.read
        read(GICD)
        for base, first, end in FRAMES:
            for name in ("IGROUPR", "ISENABLER", "ISPENDR", "ISACTIVER"):
                for word in range(first // 8, end // 8, 4):
                    read(base + BITMAPS[name] + word)
            for intid in range(first, min(end, first + 64), 4):
                read(base + IPRIORITYR + intid)
            for intid in range(first, end, 16):
                read(base + ICFGR + intid // 4)


# -- GICv2 ---------------------------------------------------------------------------------------------------------

ITARGETSR, SGIR, CPENDSGIR, SPENDSGIR = 0x800, 0xF00, 0xF10, 0xF20
GICC_CTLR, GICC_PMR, GICC_BPR, GICC_RPR, GICC_HPPIR, GICC_ABPR, GICC_IIDR = 0x00, 0x04, 0x08, 0x14, 0x18, 0x1C, 0xFC
ENABLE, ACK_CTL, CBPR, EOI_MODE = 3, 1 << 2, 1 << 4, 1 << 9
"""Of GICC_CTLR; ENABLE, both groups, of GICD_CTLR as well."""
GICD_V2_IDENTITY = (0x0, 0x4, 0x8, *range(0xFD0, 0x1000, 4))
LOWEST = 0xF8
"""The lowest priority there is; as a mask it lets all others through."""
DEPTH = 3
"""Interrupts that may be active at a time: one more would fill KVM's four list registers, and nothing else be taken."""


class Gicv2Registers(Words):
    """Accesses to GICD and GICC as CPU 0 makes them, input lines, and interrupts that are taken and ended.

    Some interrupts are in play: enabled now and then, each with a priority of its own, as which of two equals comes
    first is the implementation's choice. The others never reach the CPU interface.
    """

    def __init__(self, seed: int, length: int = 300) -> None:
        super().__init__(Random(f"gicv2 {seed}"))
        rng = self.rng
        self.program = Program(f"gicv2 {seed}", "gicv2")
        self.high: set[int] = set()
        """SPIs and PPIs whose line is high."""
        self.split = rng.random() < 0.3
        """EOImode: ending and deactivating are two steps."""
        self.groups = rng.choice((0, 1, 2))
        """All in group 0, all in group 1, or in both; then GICC_IAR may be kept from taking those of group 1."""
        self.mask = LOWEST
        self.away: set[int] = set()
        """SPIs in play that go to CPU 1."""
        self.depth = 0
        """How many may be active at most."""
        self.sent: set[int] = set()
        """SGIs that may be pending or active."""
        self.several = False
        """An SGI was sent by two CPUs at once."""
        sgis, ppis = rng.sample(range(16), 4), rng.sample(PPIS, 3)
        self.spis = rng.sample(range(32, 96), 10)
        self.play = [*sgis, *ppis, *self.spis]
        self.levels = list(range(0, LOWEST, 8))
        rng.shuffle(self.levels)
        self.level = {intid: self.levels.pop() for intid in self.play}
        self.edge = {spi for spi in self.spis if rng.random() < 0.5}
        """SPIs in play that are edge-triggered."""
        self.set_up()
        self.program.essential = len(self.program.steps)
        actions = {
            self.pend: 25, self.unpend: 6, self.line: 25, self.sgi: 15, self.enable: 10, self.change_priority: 5,
            self.change_target: 5, self.take: 50, self.finish: 35, self.mask_priorities: 8, self.binary_point: 5,
            self.look: 25, self.control: 4, self.bystanders: 10, self.identity: 4, self.change_group: 4,
        }  # fmt: skip
        for action in rng.choices(list(actions), list(actions.values()), k=length):
            action()
        self.dump()

    def set_up(self) -> None:
        """What software has to write before it can use the GIC."""
        write, rng = self.program.write, self.rng
        write(GICD, ENABLE)
        write(GICD + ICENABLER, 0xFFFF_0000)
        for spi in range(32, NR_IRQS, 32):
            write(GICD + ICENABLER + spi // 8, 0xFFFF_FFFF)
        for word in range(0, NR_IRQS // 8, 4):
            write(GICD + BITMAPS["IGROUPR"] + word, (0, 0xFFFF_FFFF, rng.getrandbits(32))[self.groups])
        for spi in range(32, NR_IRQS, 4):
            write(GICD + ITARGETSR + spi, 0x0101_0101)
        for first in range(32, NR_IRQS, 16):
            write(
                GICD + ICFGR + first // 4, sum(2 << 2 * (spi - first) for spi in self.edge if first <= spi < first + 16)
            )
        for intid in self.play:
            write(GICD + IPRIORITYR + intid, self.level[intid], 1)
        write(GICC + GICC_PMR, LOWEST)
        write(GICC + GICC_BPR, 2)
        write(GICC + GICC_ABPR, 3)
        self.takes_both = self.groups == 1 or (self.groups == 2 and rng.random() < 0.7)
        self.flags = (ACK_CTL if self.takes_both else 0) | (EOI_MODE if self.split else 0) | rng.choice((0, CBPR))
        write(GICC + GICC_CTLR, ENABLE | self.flags)
        for intid in self.play:
            self.enable(intid)

    # Interrupts becoming pending, or not.

    def pend(self) -> None:
        """ISPENDR; of level-triggered interrupts it would last until they have ended in KVM."""
        spi = self.rng.choice(self.spis)
        if spi in self.edge:
            self.program.write(GICD + BITMAPS["ISPENDR"] + spi // 32 * 4, 1 << spi % 32)

    def unpend(self) -> None:
        word = self.rng.choice((0, 4, 8))
        self.program.write(GICD + ICPENDR + word, self.word())
        self.program.read(GICD + BITMAPS["ISPENDR"] + word)

    def line(self) -> None:
        intid = self.rng.choice([intid for intid in self.play if intid >= 16])
        level = intid not in self.high
        (self.high.add if level else self.high.discard)(intid)
        self.program.line(intid, int(level))

    def sgi(self) -> None:
        """Send one, once, unless it may be active: KVM would put nothing of lower priority in a list register."""
        sgi = self.rng.choice(self.play[:4])
        if sgi in self.sent:
            if self.depth:
                return
            self.program.write(GICD + CPENDSGIR + sgi, 0xFF, 1)
        self.sent.add(sgi)
        if self.rng.random() < 0.6:
            self.program.write(GICD + SGIR, self.rng.choice((2 << 24, 1 << 24, self.rng.randrange(4) << 16)) | sgi)
        else:
            senders = self.rng.choice((1, 2) if self.split else (1, 2, 3))
            self.several = self.several or senders == 3
            self.program.write(GICD + SPENDSGIR + sgi, senders, 1)
        self.program.read(GICD + self.rng.choice((SPENDSGIR, CPENDSGIR)) + sgi // 4 * 4)
        if self.rng.random() < 0.2:
            self.program.write(GICD + CPENDSGIR + sgi, self.rng.randrange(4), 1)

    # The CPU interface.

    def take(self) -> None:
        """Acknowledge; where that may give 1022, while nothing runs, as the emulator gives it too often."""
        if self.depth < (DEPTH if self.groups < 2 or self.takes_both else 1):
            self.depth += 1
            self.program.acknowledge()
            self.program.read(GICC + GICC_RPR)

    def finish(self) -> None:
        """End the interrupt that was taken last, if one was."""
        self.program.end()
        if self.split:
            self.program.read(GICC + GICC_RPR)
            for word in (0, 4, 8):
                self.program.read(GICD + BITMAPS["ISACTIVER"] + word)
            self.program.deactivate()
        self.depth = max(0, self.depth - 1)
        self.program.read(GICC + GICC_RPR)

    def mask_priorities(self) -> None:
        self.mask = LOWEST if self.mask != LOWEST else self.rng.randrange(0, 256, 8)
        self.program.write(GICC + GICC_PMR, self.mask)
        self.program.read(GICC + GICC_PMR)

    def binary_point(self) -> None:
        register, least = self.rng.choice(((GICC_BPR, 2), (GICC_ABPR, 3)))
        self.program.write(GICC + register, self.rng.randint(least, 7))
        self.program.read(GICC + register)

    def look(self) -> None:
        read = self.program.read
        if self.mask == LOWEST and not (self.several and self.depth):
            read(GICC + GICC_HPPIR)
        word = self.rng.choice((0, 4, 8))
        for name in self.rng.sample(("ISPENDR", "ISACTIVER", "ISENABLER", "ICPENDR", "ICACTIVER"), 2):
            read(GICD + BITMAPS[name] + word)
        read(GICC + self.rng.choice((GICC_CTLR, GICC_BPR, GICC_ABPR, GICC_PMR, GICC_RPR)))

    # Configuration.

    def enable(self, intid: int | None = None) -> None:
        """Enable or disable one. SGIs are always enabled in some implementations, so they are in all here."""
        if intid is None:
            intid = self.rng.choice(self.play)
        on = intid < 16 or self.rng.random() < 0.8
        self.program.write(GICD + (BITMAPS["ISENABLER"] if on else ICENABLER) + intid // 32 * 4, 1 << intid % 32)

    def change_priority(self) -> None:
        intid = self.rng.choice(self.play)
        if intid < 16 and self.several and self.depth:
            return  # of an active SGI with a second sender it would decide what KVM puts in list registers
        self.levels.insert(0, self.level[intid])
        self.level[intid] = self.levels.pop()
        self.program.write(GICD + IPRIORITYR + intid, self.level[intid], 1)
        self.program.read(GICD + IPRIORITYR + intid // 4 * 4)

    def change_target(self) -> None:
        """An SPI goes to CPU 1, for good: one that was queued for a vCPU that does not run KVM leaves there."""
        spi = self.rng.choice(self.spis)
        if self.rng.random() < 0.3 and not self.depth:
            self.away.add(spi)
        self.program.write(GICD + ITARGETSR + spi, 2 if spi in self.away else 1, 1)
        self.program.read(GICD + ITARGETSR + spi // 4 * 4)

    def change_group(self) -> None:
        if self.groups == 2 and not self.depth:
            word = self.rng.choice((0, 4, 8))
            self.program.write(GICD + BITMAPS["IGROUPR"] + word, self.rng.getrandbits(32))
            self.program.read(GICD + BITMAPS["IGROUPR"] + word)

    def control(self) -> None:
        """Stop and start forwarding, or the CPU interface."""
        if self.rng.random() < 0.5:
            self.program.write(GICC + GICC_CTLR, self.flags)
            self.look()
            self.program.acknowledge()
            self.program.write(GICC + GICC_CTLR, self.flags | ENABLE)
            return
        self.program.write(GICD, 0)
        self.look()
        self.program.acknowledge()
        self.program.write(GICD, ENABLE)
        # What became pending meanwhile KVM queues by the next event on it; this is one.
        for word in (0, 4, 8):
            self.program.write(
                GICD + BITMAPS["ISENABLER"] + word, sum(1 << n % 32 for n in self.play if n // 32 * 4 == word)
            )

    def bystanders(self) -> None:
        """Any access to SPIs that are not in play."""
        word = self.rng.randrange(96, NR_IRQS, 32) // 8
        name = self.rng.choice([name for name in BITMAPS if name != "ISENABLER"])
        value = 1 << self.rng.randrange(32) if name == "ISACTIVER" else self.word()
        if name != "ISACTIVER":
            self.program.write(GICD + BITMAPS[name] + word, value)
        self.program.read(GICD + BITMAPS[name] + word)
        intid = self.rng.randrange(96, NR_IRQS)
        base, size = self.rng.choice((IPRIORITYR, ITARGETSR)), self.rng.choice((1, 4))
        value = self.rng.getrandbits(32) | 0x0101_0101
        self.program.write(GICD + base + intid // size * size, value, size)
        self.program.read(GICD + base + intid // 4 * 4)

    def identity(self) -> None:
        self.program.read(GICD + self.rng.choice(GICD_V2_IDENTITY))
        self.program.read(GICC + GICC_IIDR)
        self.program.read(GICD + ITARGETSR + self.rng.randrange(0, 32, 4))
        # SGIs have no trigger to choose, and are made pending by registers of their own.
        offset, value = self.rng.choice(((ICFGR, self.rng.getrandbits(32)), (BITMAPS["ISPENDR"], self.word(16))))
        self.program.write(GICD + offset, value)
        self.program.read(GICD + offset)
        at = GICD + self.rng.choice((self.rng.randrange(0x20, 0x80, 4), self.rng.randrange(0xE00, 0xF00, 4)))
        self.program.write(at, self.rng.getrandbits(32))
        self.program.read(at)

    def dump(self) -> None:
        """The whole state."""
        read = self.program.read
        for name in ("IGROUPR", "ISENABLER", "ISPENDR", "ISACTIVER"):
            for word in range(0, NR_IRQS // 8, 4):
                read(GICD + BITMAPS[name] + word)
        for intid in range(0, NR_IRQS, 4):
            read(GICD + IPRIORITYR + intid)
            read(GICD + ITARGETSR + intid)
        for intid in range(0, NR_IRQS, 16):
            read(GICD + ICFGR + intid // 4)
        for sgi in range(0, 16, 4):
            read(GICD + SPENDSGIR + sgi)
