"""GICD and GICC of a GICv2: what the guest reads and writes, and what userspace sees of the same registers."""

from __future__ import annotations

import errno

import pytest
from gic_machine import DIST_REGS, refusal
from gicv2_machine import (
    ABPR,
    AEOIR,
    AHPPIR,
    AIAR,
    APR,
    BPR,
    CPENDSGIR,
    CPU_REGS,
    CTLR,
    DIR,
    EOIR,
    HPPIR,
    IAR,
    ICACTIVER,
    ICENABLER,
    ICFGR,
    ICPENDR,
    IGROUPR,
    IIDR,
    IPRIORITYR,
    ISACTIVER,
    ISENABLER,
    ISPENDR,
    ITARGETSR,
    NSAPR,
    PMR,
    RPR,
    SGIR,
    SPENDSGIR,
    Gicv2Machine,
)

from fabric.devices.arm.vgic_v2_regs import GICC, GICD
from fabric.devices.registers import Access, IrqArray, RegisterBlock

ALL = 0xFFFF_FFFF
GICD_IIDR, TYPER = 8, 4
REV2, REV3 = 0x4B00_243B, 0x4B00_343B


# -- identification and control


@pytest.mark.spec("vgic-v2.reg.ctlr")
def test_gicd_ctlr_keeps_one_enable() -> None:
    """For guest and userspace; out of reset nothing is forwarded."""
    machine = Gicv2Machine(ready=False)
    assert 0 == machine.user(DIST_REGS, 0)

    machine.user(DIST_REGS, 0, ALL)
    assert 1 == machine.user(DIST_REGS, 0)
    machine.place()
    machine.run()
    assert 1 == machine.gicd(0)
    machine.gicd(0, 0xFFFF_FFFE)
    assert 0 == machine.gicd(0)


@pytest.mark.spec("vgic-v2.reg.typer")
@pytest.mark.parametrize(("vcpus", "nr_irqs", "value"), [(1, 64, 0x01), (3, 96, 0x42), (8, 992, 0xFE)])
def test_gicd_typer_counts_interrupts_and_cpus(vcpus: int, nr_irqs: int, value: int) -> None:
    """ITLinesNumber in 4:0, CPUNumber in 7:5; it cannot be written."""
    machine = Gicv2Machine(vcpus, nr_irqs=nr_irqs)
    machine.gicd(TYPER, 0)
    machine.user(DIST_REGS, TYPER, 0)

    assert value == machine.gicd(TYPER) == machine.user(DIST_REGS, TYPER)


@pytest.mark.spec("vgic-v2.reg.iidr", "vgic-v2.dist-regs.rule.iidr-accepts", "vgic-v2.dist-regs.EINVAL.iidr")
@pytest.mark.parametrize(
    ("value", "code"),
    [
        pytest.param(REV3, 0, id="revision-3"),
        pytest.param(REV2, 0, id="revision-2"),
        pytest.param(0x4B00_143B, errno.EINVAL, id="revision-1"),
        pytest.param(0x4B00_443B, errno.EINVAL, id="revision-4"),
        pytest.param(0x4B00_343C, errno.EINVAL, id="implementer"),
        pytest.param(0x4A00_343B, errno.EINVAL, id="product"),
        pytest.param(0x4B01_343B, errno.EINVAL, id="variant"),
        pytest.param(0, errno.EINVAL, id="zero"),
    ],
)
def test_userspace_chooses_the_revision_by_gicd_iidr(value: int, code: int) -> None:
    """The guest cannot. What is refused changes nothing."""
    machine = Gicv2Machine()
    machine.gicd(GICD_IIDR, REV2)
    assert REV3 == machine.gicd(GICD_IIDR)

    assert code == refusal(machine.user, DIST_REGS, GICD_IIDR, value)
    assert (REV3 if code else value) == machine.user(DIST_REGS, GICD_IIDR) == machine.gicd(GICD_IIDR)


@pytest.mark.spec("vgic-v2.reg.igroupr", "vgic-v2.dist-regs.rule.igroupr-gated", "vgic-v2.dist-regs.rule.iidr-first")
def test_userspace_sets_groups_once_it_has_written_gicd_iidr() -> None:
    """Before, its writes are dropped; a refused GICD_IIDR does not count. The guest may always; reset is group 0."""
    machine = Gicv2Machine(2)
    machine.user(DIST_REGS, IGROUPR, ALL)
    assert errno.EINVAL == refusal(machine.user, DIST_REGS, GICD_IIDR, 0)
    machine.user(DIST_REGS, IGROUPR + 4, ALL)
    assert (0, 0) == (machine.gicd(IGROUPR), machine.gicd(IGROUPR + 4))
    machine.gicd(IGROUPR, 0b1001)
    assert (0b1001, 0) == (machine.user(DIST_REGS, IGROUPR), machine.user(DIST_REGS, IGROUPR, cpu=1))

    machine.user(DIST_REGS, GICD_IIDR, REV2)
    machine.user(DIST_REGS, IGROUPR, 0b0110)
    machine.user(DIST_REGS, IGROUPR + 4, ALL)

    assert (0b0110, ALL) == (machine.gicd(IGROUPR), machine.gicd(IGROUPR + 4))


# -- a bit for each interrupt


@pytest.mark.spec("vgic-v2.reg.isenabler", "vgic-v2.reg.icenabler", "vgic-v2.dist-regs.rule.set-clear-pairs")
def test_enables() -> None:
    """Ones set and clear; both registers read what is enabled. SGIs are out of reset."""
    machine = Gicv2Machine()
    assert (0xFFFF, 0) == (machine.gicd(ISENABLER), machine.gicd(ISENABLER + 4))
    machine.gicd(ISENABLER + 4, 0b1110)
    machine.gicd(ICENABLER + 4, 0b0100)
    machine.user(DIST_REGS, ISENABLER + 4, 1 << 31)
    machine.user(DIST_REGS, ICENABLER + 4, 0b0010)
    machine.gicd(ICENABLER, 1)

    expected = 1 << 31 | 0b1000
    assert expected == machine.gicd(ISENABLER + 4) == machine.user(DIST_REGS, ICENABLER + 4)
    assert 0xFFFE == machine.gicd(ICENABLER)
    assert [irq.enabled for irq in machine.vgic.spis[:4]] == [False, False, False, True]


@pytest.mark.spec("vgic-v2.reg.ispendr", "vgic-v2.reg.icpendr", "vgic-v2.dist-regs.rule.pending-user")
@pytest.mark.parametrize("who", ["guest", "user"])
def test_pending_bits(who: str) -> None:
    """Both registers read latch or line; ones written to them set and clear the latch, never the line."""
    machine = Gicv2Machine()

    def access(offset: int, value: int | None = None) -> int:
        return machine.gicd(offset, value) if who == "guest" else machine.user(DIST_REGS, offset, value)

    machine.user(DIST_REGS, ICFGR + 8, 0xAAAA_AAA8)
    machine.raise_spi(32)
    access(ISPENDR + 4, 0b11)
    assert 0b11 == access(ISPENDR + 4) == access(ICPENDR + 4)
    assert machine.vgic.spis[0].pending
    access(ICPENDR + 4, 0b11)

    assert 0b01 == access(ISPENDR + 4)
    assert not machine.vgic.spis[0].pending
    machine.vgic.line_level(machine.vgic.spis[0], False)
    assert 0 == access(ICPENDR + 4)
    machine.check()


@pytest.mark.spec("vgic-v2.reg.ispendr", "vgic-v2.reg.icpendr", "vgic-v2.dist-regs.rule.sgi-pend-user")
def test_only_userspace_makes_sgis_pending_by_ispendr() -> None:
    """The sender is then the vCPU itself, by id; clearing drops all senders. The guest's writes do nothing."""
    machine = Gicv2Machine(1, ready=False)
    machine.add_vcpu(5)
    machine.place()
    machine.run()
    machine.gicd(ISPENDR, 0b11, cpu=1)
    assert 0 == machine.gicd(ISPENDR, cpu=1)

    machine.user(DIST_REGS, ISPENDR, 0b10, cpu=5)
    assert 1 << 5 << 8 == machine.gicd(SPENDSGIR, cpu=1)
    assert (0b10, 0) == (machine.gicd(ISPENDR, cpu=1), machine.gicd(ISPENDR))
    machine.gicd(ICPENDR, ALL, cpu=1)
    assert 0b10 == machine.user(DIST_REGS, ICPENDR, cpu=5)
    machine.gicd(SPENDSGIR, 0x0300, cpu=1)
    machine.user(DIST_REGS, ICPENDR, 0b10, cpu=5)

    assert 0 == machine.gicd(SPENDSGIR, cpu=1) == machine.user(DIST_REGS, ISPENDR, cpu=5)
    assert {"SGI cleared": 3} == machine.check().dropped


@pytest.mark.spec("vgic-v2.reg.isactiver", "vgic-v2.reg.icactiver", "vgic-v2.dist-regs.rule.set-clear-pairs")
@pytest.mark.parametrize("who", ["guest", "user"])
def test_active_bits(who: str) -> None:
    """Ones set and clear; both registers read what is active."""
    machine = Gicv2Machine(2)

    def access(offset: int, value: int | None = None, *, cpu: int = 0) -> int:
        group = machine.gicd(offset, value, cpu=cpu) if who == "guest" else 0
        return group if who == "guest" else machine.user(DIST_REGS, offset, value, cpu=cpu)

    access(ISACTIVER, 0x1_0001, cpu=1)
    access(ISACTIVER + 4, 0b111)
    access(ICACTIVER + 4, 0b010)

    assert (0, 0x1_0001) == (access(ISACTIVER), access(ICACTIVER, cpu=1))
    assert 0b101 == access(ISACTIVER + 4) == access(ICACTIVER + 4, cpu=1)
    machine.check()


# -- a byte for each interrupt, and two bits


@pytest.mark.spec("vgic-v2.reg.ipriorityr")
def test_priorities_have_five_bits() -> None:
    """Words and bytes; a halfword is no access."""
    machine = Gicv2Machine()
    machine.gicd(IPRIORITYR + 32, 0xFF81_A0C7)
    machine.gicd(IPRIORITYR + 33, 0x47, size=1)
    machine.gicd(IPRIORITYR + 34, 0x1234, size=2)

    assert 0xF880_40C0 == machine.gicd(IPRIORITYR + 32) == machine.user(DIST_REGS, IPRIORITYR + 32)
    assert (0x40, 0) == (machine.gicd(IPRIORITYR + 33, size=1), machine.gicd(IPRIORITYR + 32, size=2))


@pytest.mark.spec("vgic-v2.reg.itargetsr")
def test_targets_of_spis() -> None:
    """Those there are of the vCPUs; the lowest of them gets the interrupt, and with none vCPU 0."""
    machine = Gicv2Machine(3)
    assert 0 == machine.gicd(ITARGETSR + 32)
    machine.gicd(ITARGETSR + 32, 0xFF_F8_06_04)
    machine.gicd(ITARGETSR + 36, 0x82, size=1)

    assert 0x07_00_06_04 == machine.gicd(ITARGETSR + 32) == machine.user(DIST_REGS, ITARGETSR + 32, cpu=2)
    assert [2, 1, 0, 0, 1] == [irq.target.index for irq in machine.vgic.spis[:5]]


@pytest.mark.spec("vgic-v2.reg.itargetsr", "vgic-v2.dist-regs.rule.banked")
def test_targets_of_sgis_and_ppis_are_the_reader_itself() -> None:
    """By place, not by id, and they cannot be written."""
    machine = Gicv2Machine(1, ready=False)
    machine.add_vcpu(5)
    machine.place()
    machine.run()
    machine.gicd(ITARGETSR, 0, cpu=1)
    machine.user(DIST_REGS, ITARGETSR + 28, ALL, cpu=5)

    assert 0x0101_0101 == machine.gicd(ITARGETSR)
    assert 0x0202_0202 == machine.gicd(ITARGETSR + 28, cpu=1) == machine.user(DIST_REGS, ITARGETSR, cpu=5)


@pytest.mark.spec("vgic-v2.reg.icfgr")
def test_triggers() -> None:
    """SPIs are edge-triggered out of reset and may change; SGIs are edges, PPIs levels, for good."""
    machine = Gicv2Machine()
    assert 0xAAAA_AAAA == machine.gicd(ICFGR + 8)
    for offset in range(ICFGR, ICFGR + 12, 4):
        machine.gicd(offset, 0x5555_5557)

    assert (0xAAAA_AAAA, 0, 2) == tuple(machine.gicd(ICFGR + n) for n in (0, 4, 8))
    assert [True, False] == [irq.edge for irq in machine.vgic.spis[:2]]


@pytest.mark.spec("vgic-v2.dist-regs.rule.banked")
def test_registers_of_sgis_and_ppis_are_banked() -> None:
    """Each vCPU has its own for INTIDs 0 to 31; all others are the same whoever asks."""
    machine = Gicv2Machine(2)
    machine.gicd(ISENABLER, 1 << 20, cpu=1)
    machine.gicd(IPRIORITYR + 20, 0x80, size=1, cpu=1)
    machine.gicd(ISENABLER + 4, 1, cpu=1)

    assert (0xFFFF, 1 << 20 | 0xFFFF) == (machine.gicd(ISENABLER), machine.user(DIST_REGS, ISENABLER, cpu=1))
    assert (0, 0x80) == tuple(machine.gicd(IPRIORITYR + 20, cpu=n) for n in (0, 1))
    assert 1 == machine.gicd(ISENABLER + 4) == machine.user(DIST_REGS, ISENABLER + 4)


def test_there_are_no_registers_beyond_the_last_interrupt() -> None:
    """They read zero and ignore writes."""
    machine = Gicv2Machine(nr_irqs=64)
    machine.gicd(IPRIORITYR + 64, ALL)
    machine.user(DIST_REGS, ISENABLER + 8, ALL)

    assert 0 == machine.gicd(IPRIORITYR + 64) == machine.user(DIST_REGS, ISENABLER + 8)
    assert (0, errno.ENXIO) == (machine.has(DIST_REGS, ISENABLER + 4), machine.has(DIST_REGS, ISENABLER + 8))


# -- SGIs


@pytest.mark.spec("vgic-v2.reg.sgir")
@pytest.mark.parametrize(
    ("filtered", "targets"),
    [
        pytest.param(0, [False, True, True], id="listed"),
        pytest.param(1, [True, False, True], id="all-others"),
        pytest.param(2, [False, True, False], id="self"),
        pytest.param(3, [False, False, False], id="reserved"),
    ],
)
def test_gicd_sgir_sends_to_whom_the_filter_says(filtered: int, targets: list[bool]) -> None:
    """The list counts for filter 0 only, and vCPUs that are not there are passed over. It reads as zero."""
    machine = Gicv2Machine(3)
    machine.gicd(SGIR, filtered << 24 | 0b1110 << 16 | 0x8005, cpu=1)

    assert targets == [machine.gicd(ISPENDR, cpu=n) == 1 << 5 for n in range(3)]
    assert [0b10 if hit else 0 for hit in targets] == [machine.gicd(SPENDSGIR + 5, size=1, cpu=n) for n in range(3)]
    assert 0 == machine.gicd(SGIR)
    assert sum(targets) == machine.check().pending


@pytest.mark.spec("vgic-v2.reg.sgir")
def test_userspace_can_send_an_sgi() -> None:
    """As the vCPU in the attribute."""
    machine = Gicv2Machine(2)
    machine.user(DIST_REGS, SGIR, 1 << 16 | 3, cpu=1)

    assert 0b10 << 24 == machine.user(DIST_REGS, SPENDSGIR)
    assert 0 == machine.user(DIST_REGS, SGIR)


@pytest.mark.spec("vgic-v2.reg.spendsgir", "vgic-v2.reg.cpendsgir")
def test_senders_can_be_set_and_cleared() -> None:
    """A byte for each SGI, a bit for each sender, also of vCPUs there are not; one sender left keeps it pending."""
    machine = Gicv2Machine(2)
    machine.gicd(SPENDSGIR, 0x80_00_05_01, cpu=1)
    machine.gicd(SPENDSGIR + 15, 0x02, size=1, cpu=1)
    assert 0x80_00_05_01 == machine.gicd(CPENDSGIR, cpu=1)
    assert 1 << 15 | 0b1011 == machine.gicd(ISPENDR, cpu=1)

    machine.gicd(CPENDSGIR, 0x00_00_04_01, cpu=1)
    machine.user(DIST_REGS, CPENDSGIR + 12, 0xFF << 24, cpu=1)

    assert 0x80_00_01_00 == machine.user(DIST_REGS, SPENDSGIR, cpu=1)
    assert 0b1010 == machine.gicd(ISPENDR, cpu=1)
    assert (5, 2, {"SGI cleared": 3}) == (
        (statement := machine.check()).raised, statement.pending, statement.dropped
    )  # fmt: skip


# -- the CPU interface as userspace sees it


@pytest.mark.spec("vgic-v2.reg.cpu.ctlr", "vgic-v2.cpu-regs.rule.ctlr-bits")
def test_gicc_ctlr_bits() -> None:
    """Enables of both groups, AckCtl, FIQEn, CBPR and EOImode, for guest and userspace."""
    machine = Gicv2Machine(2)
    machine.user(CPU_REGS, CTLR, ALL, cpu=1)
    assert (1, 0x21F, 0x21F) == (machine.gicc(CTLR), machine.gicc(CTLR, cpu=1), machine.user(CPU_REGS, CTLR, cpu=1))

    for bit in (0, 1, 2, 3, 4, 9):
        machine.gicc(CTLR, 1 << bit)
        assert 1 << bit == machine.user(CPU_REGS, CTLR)
    machine.gicc(CTLR, ~0x21F & ALL)
    assert 0 == machine.gicc(CTLR)


@pytest.mark.spec(
    "vgic-v2.reg.cpu.pmr",
    "vgic-v2.cpu-regs.rule.pmr-shifted",
    "vgic-v2.cpu-regs.rule.pmr-roundtrip",
    "layout.gicv2-pmr.rule.convert",
)
def test_gicc_pmr_is_shifted_for_userspace() -> None:
    """Five bits, in 4:0 for userspace and in 7:3 for the guest; the rest is dropped."""
    machine = Gicv2Machine(ready=False)
    assert 0 == machine.user(CPU_REGS, PMR)
    machine.place()
    machine.run()

    for value in (0, 1, 0x10, 0x1F, 0x20, 0xF0, 0x28FC_AB85):
        machine.user(CPU_REGS, PMR, value)
        assert (value & 0x1F, (value & 0x1F) << 3) == (machine.user(CPU_REGS, PMR), machine.gicc(PMR))
    machine.gicc(PMR, 0x1FF)
    assert (0xF8, 0x1F) == (machine.gicc(PMR), machine.user(CPU_REGS, PMR))


@pytest.mark.spec("vgic-v2.reg.cpu.bpr", "vgic-v2.reg.cpu.abpr")
def test_binary_points() -> None:
    """Three bits as userspace writes them; the hardware, so the guest and every run, raises them to 2 and 3."""
    machine = Gicv2Machine()
    machine.stop()
    for offset, least in ((BPR, 2), (ABPR, 3)):
        for value in range(16):
            machine.user(CPU_REGS, offset, value)
            assert value & 7 == machine.user(CPU_REGS, offset)
            assert max(value & 7, least) == machine.gicc(offset)
        machine.user(CPU_REGS, offset, 0)
    machine.cpu.touch_hardware()
    assert (2, 3) == (machine.user(CPU_REGS, BPR), machine.user(CPU_REGS, ABPR))
    machine.gicc(BPR, 1)
    machine.gicc(ABPR, 0xD)
    assert (2, 5) == (machine.user(CPU_REGS, BPR), machine.user(CPU_REGS, ABPR))


@pytest.mark.spec(
    "vgic-v2.reg.cpu.apr",
    "vgic-v2.cpu-regs.rule.apr-format",
    "vgic-v2.cpu-regs.rule.apr-raz",
    "vgic-v2.cpu-regs.rule.apr-combined",
    "layout.gicv2-apr.rule.levels",
    "layout.gicv2-apr.rule.level-of-priority",
)
def test_active_priorities() -> None:
    """A bit for each of the 32 levels that five bits give, of both groups in APR0; APR1 to 3 stay zero."""
    machine = Gicv2Machine()
    assert [0] * 4 == [machine.has(CPU_REGS, APR + 4 * n) for n in range(4)]
    machine.gicc(CTLR, 0b111)
    for intid, priority in ((40, 0xA0), (41, 0x48), (42, 0x00)):
        irq = machine.spi(intid, priority=priority)
        machine.vgic.set_group(irq, intid == 41)
        machine.raise_spi(intid)
        machine.gicc(IAR)

    expected = 1 << (0xA0 >> 3) | 1 << (0x48 >> 3) | 1 << 0
    assert expected == machine.user(CPU_REGS, APR) == machine.gicc(APR)
    assert 0 == machine.gicc(RPR)
    for n in range(4):
        machine.user(CPU_REGS, APR + 4 * n, 0x8000_0010)
    assert [0x8000_0010, 0, 0, 0] == [machine.user(CPU_REGS, APR + 4 * n) for n in range(4)]
    assert 4 << 3 == machine.gicc(RPR)
    machine.gicc(APR, 1 << 31)
    assert (31 << 3, 1 << 31) == (machine.gicc(RPR), machine.user(CPU_REGS, APR))


@pytest.mark.spec("vgic-v2.reg.cpu.iidr", "vgic-v2.cpu-regs.rule.iidr-value")
def test_gicc_iidr() -> None:
    """Userspace reads KVM's; the guest reads that of the hardware, which is an Arm GICv2. It cannot be written."""
    machine = Gicv2Machine()
    machine.user(CPU_REGS, IIDR, 0)
    machine.gicc(IIDR, 0)

    assert (0x04B2_043B, 0x0002_043B) == (machine.user(CPU_REGS, IIDR), machine.gicc(IIDR))


@pytest.mark.spec("vgic-v2.cpu-regs.rule.unlisted-raz", "vgic-v2.cpu-regs.ENXIO.no-register")
def test_what_acknowledges_and_ends_is_not_for_userspace() -> None:
    """It reads zero without taking anything, ends nothing, and is not there to ask for."""
    machine = Gicv2Machine()
    machine.spi(40)
    machine.raise_spi(40)

    for offset in (IAR, EOIR, RPR, HPPIR, AIAR, AEOIR, AHPPIR, NSAPR, DIR):
        assert errno.ENXIO == machine.has(CPU_REGS, offset)
        assert 0 == machine.user(CPU_REGS, offset)
        machine.user(CPU_REGS, offset, 40)

    assert 40 == machine.gicc(IAR)
    machine.user(CPU_REGS, EOIR, 40)
    assert machine.vgic.spis[8].active


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_cpu_interface_takes_words_only(size: int) -> None:
    """Other accesses read zero and do nothing."""
    machine = Gicv2Machine()
    machine.spi(40)
    machine.raise_spi(40)
    machine.gicc(PMR, 0, size=size)

    assert 0 == machine.gicc(IAR, size=size) == machine.gicc(PMR, size=size)
    assert 40 == machine.gicc(IAR)


@pytest.mark.parametrize("block", [GICD, GICC], ids=lambda block: block.name)
def test_every_row_does_what_its_access_says(block: RegisterBlock) -> None:
    """For the guest: all ones written to what ignores writes changes nothing, and what reads zero reads zero."""
    machine = Gicv2Machine(2)
    frame = machine.gicd if block is GICD else machine.gicc
    before = machine.vgic.state()
    for row in block.rows:
        if row.access in (Access.RO, Access.RAZ_WI):
            for offset in range(row.offset, row.offset + row.length, 4):
                frame(offset, ALL)
                assert row.access is Access.RO or 0 == frame(offset)
        if isinstance(row, IrqArray):
            assert row.bits * row.count // 8 == row.length

    assert before == machine.vgic.state()
