"""GICD and GICR: what the guest reads and writes, and what userspace sees of the same registers."""

from __future__ import annotations

import errno

import pytest
from gic_machine import (
    DIST_REGS,
    GICR_BASE,
    GICR_SIZE,
    LEVEL_INFO,
    REDIST_REGS,
    SGI_BASE,
    GicMachine,
    refusal,
)

from fabric.devices.arm.vgic_v3_regs import GICD, GICR
from fabric.devices.registers import Access, IrqArray, RegisterBlock

ICPENDR, ISPENDR, ISENABLER, ICFGR, IPRIORITYR, IROUTER = 0x280, 0x200, 0x100, 0xC00, 0x400, 0x6000
ALL = 0xFFFF_FFFF
LPIS_ON = 1


# -- identification and control


@pytest.mark.spec("vgic-v3.reg.gicd.ctlr", "vgic-v3.dist-regs.rule.ctlr")
def test_gicd_ctlr_keeps_group_1_enable() -> None:
    """ARE and DS read as one, everything else as zero."""
    machine = GicMachine()

    machine.set(DIST_REGS, 0, 0)
    assert 0x50 == machine.get(DIST_REGS, 0)
    machine.set(DIST_REGS, 0, ALL)
    assert 0x52 == machine.get(DIST_REGS, 0)
    machine.write(0, 0)
    assert 0x50 == machine.read(0)


@pytest.mark.spec("vgic-v3.reg.gicd.typer")
def test_gicd_typer_counts_interrupts_in_32s() -> None:
    """IDbits is 9 without an ITS; with one LPIS is set and IDbits says how many LPIs there can be."""
    machine = GicMachine(nr_irqs=96)
    assert 0x48_0002 == machine.read(4)

    machine.vm.its_list.append(None)
    assert 0x7A_0002 == machine.read(4)


@pytest.mark.spec(
    "vgic-v3.reg.gicd.iidr",
    "vgic-v3.dist-regs.rule.iidr",
    "vgic-v3.dist-regs.rule.iidr-accepts",
    "vgic-v3.dist-regs.EINVAL.iidr",
    "vgic-v3.redist-regs.note.ctlr-rev",
)
@pytest.mark.parametrize(
    ("value", "code"),
    [
        pytest.param(0x4B00_343B, 0, id="revision-3"),
        pytest.param(0x4B00_243B, 0, id="revision-2"),
        pytest.param(0x4B00_143B, errno.EINVAL, id="revision-1"),
        pytest.param(0x4B00_443B, errno.EINVAL, id="revision-4"),
        pytest.param(0x4B00_343C, errno.EINVAL, id="implementer"),
        pytest.param(0x4A00_343B, errno.EINVAL, id="product"),
        pytest.param(0x4B01_343B, errno.EINVAL, id="variant"),
    ],
)
def test_userspace_chooses_the_revision_by_gicd_iidr(value: int, code: int) -> None:
    """The guest cannot. At revision 2 GICR_CTLR lacks IR and CES."""
    machine = GicMachine()
    machine.write(8, 0x4B00_243B)
    assert 0x4B00_343B == machine.read(8)

    assert code == refusal(machine.set, DIST_REGS, 8, value)
    assert (0x4B00_343B if code else value) == machine.get(DIST_REGS, 8)
    assert (0 if value == 0x4B00_243B else 6) == machine.get(REDIST_REGS, 0)


@pytest.mark.spec("vgic-v3.reg.gicd.typer2", "vgic-v3.dist-regs.EINVAL.typer2")
def test_gicd_typer2_is_written_as_it_reads() -> None:
    """Zero, and anything else is refused."""
    machine = GicMachine()

    assert 0 == refusal(machine.set, DIST_REGS, 0xC, 0)
    assert errno.EINVAL == refusal(machine.set, DIST_REGS, 0xC, 1)


@pytest.mark.spec("vgic-v3.reg.gicd.statusr", "vgic-v3.dist-regs.note.statusr", "vgic-v3.reg.gicr.statusr")
def test_statusr_is_not_modelled() -> None:
    """As in the kernel: GICD_STATUSR reads all ones, GICR_STATUSR is no register."""
    machine = GicMachine()
    machine.set(DIST_REGS, 0x10, 0)

    assert ALL == machine.get(DIST_REGS, 0x10)
    assert 0 == machine.get(REDIST_REGS, 0x10)
    assert errno.ENXIO == machine.has(REDIST_REGS, 0x10)


@pytest.mark.spec("vgic-v3.reg.gicd.idregs", "vgic-v3.reg.gicr.idregs")
def test_pidr2_says_gicv3() -> None:
    """The other identification registers read zero."""
    machine = GicMachine()

    for base in (0x0800_0000, GICR_BASE):
        assert 0x3B == machine.read(0xFFE8, base=base)
        assert 0 == machine.read(0xFFD0, base=base) == machine.read(0xFFFC, base=base)


@pytest.mark.spec(
    "vgic-v3.dist-regs.ENXIO.has-align",
    "vgic-v3.dist-regs.ENXIO.no-register",
    "vgic-v3.dist-regs.note.enxio-only-has",
    "vgic-v3.redist-regs.ENXIO.has-align",
    "vgic-v3.redist-regs.ENXIO.no-register",
)
@pytest.mark.parametrize("group", [DIST_REGS, REDIST_REGS])
@pytest.mark.parametrize("offset", [0x20, 0x5, 0x2_0000, 0xFFFF_FFFC])
def test_a_register_that_is_not_there_reads_zero(group: int, offset: int) -> None:
    """Only the has-test says ENXIO."""
    machine = GicMachine()
    machine.set(group, offset, ALL)

    assert 0 == machine.get(group, offset)
    assert errno.ENXIO == machine.has(group, offset)


def test_arrays_end_with_the_interrupts() -> None:
    """96 interrupts: the fourth word of the bit arrays is not there."""
    machine = GicMachine(nr_irqs=96)

    assert 0 == machine.has(DIST_REGS, ISENABLER + 8)
    assert errno.ENXIO == machine.has(DIST_REGS, ISENABLER + 12)
    assert 0 == machine.has(DIST_REGS, IROUTER + 95 * 8)
    assert errno.ENXIO == machine.has(DIST_REGS, IROUTER + 96 * 8)


@pytest.mark.spec("vgic-v3.dist-regs.rule.ro-writes-ignored", "vgic-v3.redist-regs.rule.ro-writes-ignored")
@pytest.mark.parametrize("block", [GICD, GICR], ids=lambda block: block.name)
def test_read_only_registers_ignore_writes_of_userspace(block: RegisterBlock) -> None:
    """They succeed, and nothing changes."""
    machine = GicMachine()
    group = DIST_REGS if block is GICD else REDIST_REGS
    before = machine.vgic.state()
    rows = [row for row in block.rows if (row.user or row).access is Access.RO]
    for row in rows:
        value = machine.get(group, row.offset)
        machine.set(group, row.offset, ~value & ALL)
        assert value == machine.get(group, row.offset)

    assert len(rows) >= 2
    assert before == machine.vgic.state()


# -- arrays of interrupts


@pytest.mark.spec("vgic-v3.dist-regs.rule.private-wi")
@pytest.mark.parametrize("row", [row for row in GICD.rows if isinstance(row, IrqArray)], ids=lambda row: row.name)
def test_sgis_and_ppis_are_not_in_the_distributor(row: IrqArray) -> None:
    """Their words read zero and ignore writes."""
    machine = GicMachine()
    before = machine.vgic.state()
    machine.set(DIST_REGS, row.offset, ALL)
    machine.write(row.offset, ALL)

    assert 0 == machine.get(DIST_REGS, row.offset)
    assert before == machine.vgic.state()


@pytest.mark.spec(
    "vgic-v3.ctrl.init.rule.group1",
    "vgic-v3.reg.gicd.icfgr",
    "vgic-v3.reg.gicd.igroupr",
    "vgic-v3.reg.gicr.isenabler0",
    "vgic-v3.reg.gicr.icfgr0",
    "vgic-v3.reg.gicr.igroupr0",
)
def test_reset_values() -> None:
    """All in group 1; SPIs and SGIs edge-triggered, PPIs level-triggered; only SGIs enabled."""
    machine = GicMachine()

    assert 0xAAAA_AAAA == machine.get(DIST_REGS, ICFGR + 8)
    assert ALL == machine.get(DIST_REGS, 0x84)
    assert 0 == machine.get(DIST_REGS, ISENABLER + 4)
    assert 0xFFFF == machine.get(REDIST_REGS, SGI_BASE + ISENABLER)
    assert [0xAAAA_AAAA, 0] == [machine.get(REDIST_REGS, SGI_BASE + ICFGR + n) for n in (0, 4)]
    assert ALL == machine.get(REDIST_REGS, SGI_BASE + 0x80)


@pytest.mark.spec("vgic-v3.reg.gicd.ipriorityr", "vgic-v3.reg.gicr.ipriorityr0")
def test_five_priority_bits_are_kept() -> None:
    """The lower three read zero; a byte of the word can be written alone."""
    machine = GicMachine()

    machine.write(IPRIORITYR + 32, 0xFF07_A9F8)
    machine.write(IPRIORITYR + 33, 0x17, 1)

    assert 0xF800_10F8 == machine.read(IPRIORITYR + 32)
    assert 0x10 == machine.read(IPRIORITYR + 33, 1)
    assert 0 == machine.read(IPRIORITYR + 32, 2)
    machine.set(REDIST_REGS, SGI_BASE + IPRIORITYR + 4, ALL)
    assert 0xF8F8_F8F8 == machine.get(REDIST_REGS, SGI_BASE + IPRIORITYR + 4)


@pytest.mark.spec("vgic-v3.reg.gicd.isenabler", "vgic-v3.reg.gicd.icenabler")
def test_enable_and_disable_where_ones_are() -> None:
    """Both registers read the state."""
    machine = GicMachine()

    machine.write(ISENABLER + 4, 0x0F0)
    machine.write(ISENABLER + 4, 0xF00)
    machine.write(0x180 + 4, 0x110)

    assert 0xEE0 == machine.read(ISENABLER + 4) == machine.read(0x180 + 4)


@pytest.mark.spec("vgic-v3.reg.gicd.irouter", "vgic-v3.dist-regs.rule.irouter")
def test_irouter_keeps_three_affinity_levels() -> None:
    """In the low word; the high word reads zero. An affinity of no vCPU leaves the SPI without a target."""
    machine = GicMachine(2)

    machine.write(IROUTER + 8 * 40, 0x1_0000_0001, 8)
    assert 1 == machine.read(IROUTER + 8 * 40, 8)
    assert machine.vgic.cpus[1] is machine.vgic.spis[8].target

    machine.set(DIST_REGS, IROUTER + 8 * 40, 0xFF12_3456)
    machine.set(DIST_REGS, IROUTER + 8 * 40 + 4, ALL)
    assert 0x12_3456 == machine.get(DIST_REGS, IROUTER + 8 * 40)
    assert 0 == machine.get(DIST_REGS, IROUTER + 8 * 40 + 4)
    assert machine.vgic.spis[8].target is None


@pytest.mark.spec(
    "vgic-v3.reg.gicd.ispendr",
    "vgic-v3.reg.gicd.icpendr",
    "vgic-v3.dist-regs.rule.ispendr-latch",
    "vgic-v3.dist-regs.rule.icpendr-razwi",
    "vgic-v3.redist-regs.rule.ispendr-latch",
    "vgic-v3.redist-regs.rule.icpendr-razwi",
    "vgic-v3.reg.gicr.ispendr0",
    "vgic-v3.reg.gicr.icpendr0",
)
def test_the_guest_sees_latch_or_line_and_userspace_the_latch() -> None:
    """Userspace writes the latch both ways through ISPENDR, and has no ICPENDR."""
    machine = GicMachine()
    machine.spi(40, edge=False)
    machine.vgic.inject_spi(40, True)

    assert 0x100 == machine.read(ISPENDR + 4) == machine.read(ICPENDR + 4)
    assert 0 == machine.get(DIST_REGS, ISPENDR + 4)

    machine.set(DIST_REGS, ISPENDR + 4, 0x300)
    machine.set(DIST_REGS, ICPENDR + 4, 0x100)
    assert 0x300 == machine.get(DIST_REGS, ISPENDR + 4)
    machine.set(DIST_REGS, ISPENDR + 4, 0x200)
    assert 0x200 == machine.get(DIST_REGS, ISPENDR + 4)
    assert 0 == machine.get(DIST_REGS, ICPENDR + 4)
    machine.set(REDIST_REGS, SGI_BASE + ISPENDR, 0x1_0001)
    assert 0x1_0001 == machine.get(REDIST_REGS, SGI_BASE + ISPENDR)
    machine.check()


@pytest.mark.spec(
    "vgic-v3.dist-regs.rule.latch-semantics-level",
    "vgic-v3.dist-regs.rule.latch-semantics-edge",
    "vgic-v3.redist-regs.rule.latch-semantics-level",
    "vgic-v3.redist-regs.rule.latch-semantics-edge",
)
def test_line_and_latch_of_a_level_interrupt_are_apart() -> None:
    """Lowering the line leaves the latch, clearing the latch leaves the line."""
    machine = GicMachine()
    machine.spi(40, edge=False)
    machine.vgic.inject_spi(40, True)
    machine.write(ISPENDR + 4, 0x100)
    machine.vgic.inject_spi(40, False)
    assert 0x100 == machine.read(ISPENDR + 4)
    machine.write(ICPENDR + 4, 0x100)
    assert 0 == machine.read(ISPENDR + 4)

    machine.vgic.inject_spi(40, True)
    machine.write(ICPENDR + 4, 0x100)
    assert 0x100 == machine.read(ISPENDR + 4)
    machine.check()


@pytest.mark.spec("vgic-v3.dist-regs.rule.restore-order-free", "vgic-v3.redist-regs.rule.restore-order-free")
def test_latch_and_line_are_stored_whatever_the_trigger() -> None:
    """So configuration may be restored before or after them."""
    machine = GicMachine()
    machine.spi(40, edge=True)
    machine.set(LEVEL_INFO, 32, 0x100)
    assert 0 == machine.get(LEVEL_INFO, 32)
    machine.set(DIST_REGS, ICFGR + 8, 0)

    assert 0x100 == machine.get(LEVEL_INFO, 32)
    assert 0x100 == machine.read(ISPENDR + 4)
    machine.set(DIST_REGS, ISENABLER + 4, 0x100)
    assert 40 == machine.cpu.acknowledge(1)
    machine.check()


@pytest.mark.spec(
    "vgic-v3.level-info.rule.bitmap",
    "vgic-v3.level-info.rule.sgi-razwi",
    "vgic-v3.level-info.rule.ppi-per-vcpu",
    "vgic-v3.level-info.rule.read-level-only",
    "vgic-v3.level-info.rule.write-makes-pending",
)
def test_line_levels() -> None:
    """PPIs of the vCPU named, SPIs for any; SGIs and what lies beyond the interrupts ignore writes."""
    machine = GicMachine(2, nr_irqs=64)
    machine.set(DIST_REGS, ICFGR + 8, 0)
    machine.set(LEVEL_INFO, 1 << 32, ALL)
    machine.set(LEVEL_INFO, 32, 0x5)
    machine.set(LEVEL_INFO, 64, ALL)

    assert 0xFFFF_0000 == machine.get(LEVEL_INFO, 1 << 32)
    assert 0 == machine.get(LEVEL_INFO, 0)
    assert 5 == machine.get(LEVEL_INFO, 1 << 32 | 32)
    assert 0 == machine.get(LEVEL_INFO, 64)
    assert 5 == machine.read(ISPENDR + 4)
    assert 16 + 2 == machine.check().pending


@pytest.mark.spec(
    "vgic-v3.level-info.EINVAL.info", "vgic-v3.level-info.EINVAL.vintid", "vgic-v3.level-info.ENXIO.has-info"
)
def test_line_levels_come_in_words_of_one_kind() -> None:
    """The first INTID is a multiple of 32, and info is 0; has looks at info only."""
    machine = GicMachine()

    assert errno.EINVAL == refusal(machine.get, LEVEL_INFO, 33)
    assert errno.EINVAL == refusal(machine.set, LEVEL_INFO, 1 << 10 | 32)
    assert 0 == machine.has(LEVEL_INFO, 7 << 32 | 33)
    assert errno.ENXIO == machine.has(LEVEL_INFO, 1 << 10)


@pytest.mark.spec("vgic-v3.reg.gicd.isactiver", "vgic-v3.reg.gicd.icactiver", "vgic-v3.reg.gicr.isactiver0")
def test_active_state_by_register() -> None:
    """Set and cleared where ones are; an active interrupt is not taken again."""
    machine = GicMachine()
    machine.spi(40)
    machine.write(0x300 + 4, 0x100)
    machine.vgic.inject_spi(40, True)
    assert 0x100 == machine.read(0x300 + 4) == machine.read(0x380 + 4)
    assert 1023 == machine.cpu.acknowledge(1)

    machine.write(0x380 + 4, 0x100)

    assert 0 == machine.read(0x300 + 4)
    assert 40 == machine.cpu.acknowledge(1)
    machine.check()


# -- redistributor


@pytest.mark.spec("vgic-v3.reg.gicr.typer", "vgic-v3.redist-regs.rule.typer", "vgic-v3.redist-regs.rule.vcpu-affinity")
def test_gicr_typer() -> None:
    """Affinity in the upper word, vCPU id in 23:8, Last, and PLPIS with an ITS; writes are ignored."""
    machine = GicMachine(2)
    second = GICR_BASE + GICR_SIZE
    machine.set(REDIST_REGS, 1 << 32 | 8, 0)

    assert 0x1_0000_0110 == machine.read(8, 8, base=second)
    assert 1 == machine.get(REDIST_REGS, 1 << 32 | 0xC)
    machine.vm.its_list.append(None)
    assert 0x111 == machine.get(REDIST_REGS, 1 << 32 | 8)


@pytest.mark.spec("vgic-v3.redist-regs.rule.propbaser-shared", "vgic-v3.reg.gicr.propbaser")
@pytest.mark.parametrize(
    ("value", "kept"),
    [
        pytest.param(0, 0x180, id="non-cacheable-becomes-write-back"),
        pytest.param(0xFFFF_FFFF_FFFF_FFFF, 0x000F_FFFF_FFFF_FF9F, id="reserved-bits"),
        pytest.param(0x200, 0x200, id="inner-cacheability"),
        pytest.param(0x980, 0x580, id="outer-shareable-becomes-inner"),
        pytest.param(0x0100_0000_0000_0580, 0x0100_0000_0000_0580, id="outer-non-cacheable"),
        pytest.param(0x0500_0000_8003_0580, 0x8003_0580, id="outer-same-as-inner"),
    ],
)
def test_gicr_propbaser(value: int, kept: int) -> None:
    """One register for the VM, of which KVM keeps the attributes it can honour."""
    machine = GicMachine(2)

    machine.write(0x70, value, 8, base=GICR_BASE)

    assert kept == machine.read(0x70, 8, base=GICR_BASE + GICR_SIZE)


@pytest.mark.spec("vgic-v3.reg.gicr.pendbaser")
def test_gicr_pendbaser() -> None:
    """One a redistributor; PTZ is write-only."""
    machine = GicMachine(2)

    machine.write(0x78, 0xFFFF_FFFF_FFFF_FFFF, 8, base=GICR_BASE)

    assert 0x000F_FFFF_FFFF_0F80 == machine.read(0x78, 8, base=GICR_BASE)
    assert 0x580 == machine.read(0x78, 8, base=GICR_BASE + GICR_SIZE)


@pytest.mark.spec(
    "vgic-v3.redist-regs.rule.ctlr-needs-its",
    "vgic-v3.redist-regs.rule.baser-locked",
    "vgic-v3.reg.gicr.ctlr",
)
def test_lpis_are_enabled_with_an_its_only() -> None:
    """Until then GICR_CTLR ignores writes; once enabled the table registers do."""
    machine = GicMachine()
    machine.write(0, LPIS_ON, base=GICR_BASE)
    assert 6 == machine.read(0, base=GICR_BASE)

    class SomeIts:
        def invalidate_cache(self) -> None:
            pass

    machine.vm.its_list.append(SomeIts())
    machine.write(0x70, 0x8000_0180, 8, base=GICR_BASE)
    machine.write(0, LPIS_ON, base=GICR_BASE)
    machine.write(0x70, 0x9000_0180, 8, base=GICR_BASE)
    machine.write(0x78, 0x9000_0180, 8, base=GICR_BASE)

    assert 7 == machine.read(0, base=GICR_BASE)
    assert 0x8000_0180 == machine.read(0x70, 8, base=GICR_BASE)
    assert 0x580 == machine.read(0x78, 8, base=GICR_BASE)
    machine.write(0, 0, base=GICR_BASE)
    assert 6 == machine.read(0, base=GICR_BASE)


# -- the tables themselves


@pytest.mark.parametrize("block", [GICD, GICR], ids=lambda block: block.name)
def test_every_row_names_its_register_and_its_inventory_row(block: RegisterBlock) -> None:
    """The register page of the documents is made from them."""
    for row in block.rows:
        assert row.name.startswith(block.name + "_")
        assert row.id.startswith("vgic-v3.reg.")
