"""GICv3 rules one by one: registers that do nothing or are not there, revisions, where text and kernel differ."""

from __future__ import annotations

import errno
import itertools

import pytest
from gic_machine import (
    ADDR,
    CPU_SYSREGS,
    CTRL,
    DIST_REGS,
    GICD_BASE,
    GICR_BASE,
    INIT,
    LEVEL_INFO,
    NR_IRQS,
    REDIST,
    REDIST_REGION,
    REDIST_REGS,
    SGI_BASE,
    GicMachine,
    refusal,
)
from hypothesis import given
from hypothesis import strategies as st

from fabric.devices.arm.vgic_v3 import VgicV3
from fabric.uapi import arm64 as uapi

ALL = 0xFFFF_FFFF


@pytest.mark.spec("vgic-v3.addr.redist-region.EINVAL.align", "vgic-v3.addr.redist-region.note.since")
@given(low=st.integers(0, 0xFFFF))
def test_a_region_cannot_be_misaligned(low: int) -> None:
    """The lower 16 bits of the value are flags and index, so no value names a base that is not 64 KiB aligned."""
    machine = GicMachine(ready=False)
    code = refusal(machine.set, ADDR, REDIST_REGION, 1 << 52 | 0x10_0000 | low)
    assert (errno.EINVAL if low & 0xF0FF else 0) == code
    if not code:
        assert 0x10_0000 == machine.get(ADDR, REDIST)
        assert 1 << 52 | 0x10_0000 == machine.get(ADDR, REDIST_REGION)
    else:
        assert errno.ENOENT == refusal(machine.get, ADDR, REDIST_REGION)


# -- registers that are known and do nothing, and others that are alike for all interrupts


@pytest.mark.spec(
    "vgic-v3.reg.gicd.itargetsr",
    "vgic-v3.reg.gicd.igrpmodr",
    "vgic-v3.reg.gicr.waker",
    "vgic-v3.reg.gicr.syncr",
    "vgic-v3.reg.gicr.igrpmodr0",
    "vgic-v3.reg.gicr.nsacr",
)
@pytest.mark.parametrize(
    ("group", "base", "offset"),
    [
        (DIST_REGS, GICD_BASE, 0x820),
        (DIST_REGS, GICD_BASE, 0xD04),
        (REDIST_REGS, GICR_BASE, 0x14),
        (REDIST_REGS, GICR_BASE, 0xC0),
        (REDIST_REGS, GICR_BASE, SGI_BASE + 0xD00),
        (REDIST_REGS, GICR_BASE, SGI_BASE + 0xE00),
    ],
)
def test_registers_that_read_zero_and_ignore_writes(group: int, base: int, offset: int) -> None:
    """They exist, for guest and userspace, and hold nothing: GICR_SYNCR is never busy, GICR_WAKER never asleep."""
    machine = GicMachine()
    before = machine.vgic.state()
    machine.write(offset, ALL, base=base)
    machine.set(group, offset, ALL)

    assert 0 == machine.has(group, offset)
    assert 0 == machine.read(offset, base=base) == machine.get(group, offset)
    assert before == machine.vgic.state()


@pytest.mark.parametrize(
    ("group", "offset"),
    [
        pytest.param(DIST_REGS, 0x40, id="GICD_SETSPI_NSR"),
        pytest.param(DIST_REGS, 0x48, id="GICD_CLRSPI_NSR"),
        pytest.param(DIST_REGS, 0x50, id="GICD_SETSPI_SR"),
        pytest.param(DIST_REGS, 0x58, id="GICD_CLRSPI_SR"),
        pytest.param(DIST_REGS, 0x1000, id="GICD_IGROUPRnE"),
        pytest.param(DIST_REGS, 0x8000, id="GICD_IROUTERnE"),
        pytest.param(DIST_REGS, 0xE00, id="GICD_NSACR"),
        pytest.param(DIST_REGS, 0xF00, id="GICD_SGIR"),
        pytest.param(REDIST_REGS, 0x40, id="GICR_SETLPIR"),
        pytest.param(REDIST_REGS, 0x48, id="GICR_CLRLPIR"),
        pytest.param(REDIST_REGS, SGI_BASE + 0x84, id="GICR_IGROUPR1E"),
        pytest.param(REDIST_REGS, 0x2_0070, id="GICR_VPROPBASER"),
    ],
)
def test_registers_that_kvm_does_not_have(group: int, offset: int) -> None:
    """Message-based SPIs, extended ranges, direct LPIs, virtual LPIs: read as zero, cannot be named, do nothing."""
    machine = GicMachine()
    machine.lpi(8192)
    before = machine.vgic.state()
    if offset < 0x2_0000:
        for value in (40, 8192, ALL):
            machine.write(offset, value, base=GICD_BASE if group == DIST_REGS else GICR_BASE)
    machine.set(group, offset, 40)

    assert errno.ENXIO == machine.has(group, offset)
    assert 0 == machine.get(group, offset)
    assert before == machine.vgic.state()


@pytest.mark.spec("vgic-v3.reg.gicd.irouter")
def test_one_of_n_routing_is_not_there() -> None:
    """GICD_IROUTER.IRM reads as zero, and the affinity beside it counts; GICD_TYPER says nothing of it."""
    machine = GicMachine(2)
    machine.write(0x6000 + 8 * 40, 1 << 31 | 1, 8)

    assert 1 == machine.read(0x6000 + 8 * 40, 8) == machine.get(DIST_REGS, 0x6000 + 8 * 40)
    assert machine.vgic.cpus[1] is machine.vgic.spis[8].target
    machine.write(0x6000 + 8 * 40, 1 << 31, 8)
    assert machine.vgic.cpus[0] is machine.vgic.spis[8].target


@pytest.mark.spec("vgic-v3.reg.gicr.iidr")
@pytest.mark.parametrize("revision", [2, 3])
def test_gicr_iidr_has_no_revision(revision: int) -> None:
    """Whatever GICD_IIDR says; writes are ignored."""
    machine = GicMachine()
    machine.set(DIST_REGS, 8, 0x4B00_043B | revision << 12)
    machine.set(REDIST_REGS, 4, 0)
    machine.write(4, 0, base=GICR_BASE)

    assert 0x4B00_043B == machine.get(REDIST_REGS, 4) == machine.read(4, base=GICR_BASE)


@pytest.mark.spec("vgic-v3.redist-regs.note.ctlr-rev", "vgic-v3.reg.gicr.ctlr")
@pytest.mark.parametrize(("revision", "shown"), [(2, 0), (3, 6)])
def test_what_the_revision_changes(revision: int, shown: int) -> None:
    """GICR_CTLR shows IR and CES or not; INVLPIR, INVALLR and clearing EnableLPIs work all the same, and groups are
    writable."""
    machine = GicMachine()
    machine.vm.its_list.append(type("SomeIts", (), {"invalidate_cache": lambda self: None})())
    machine.vm.memory.add_ram(0x8000_0000, 0x2_0000)
    machine.vm.memory.write(0x8000_0000, b"\xa1\x41")
    machine.set(DIST_REGS, 8, 0x4B00_043B | revision << 12)
    machine.write(0x70, 0x8000_000F, 8, base=GICR_BASE)
    machine.write(0x78, 0x8001_0000, 8, base=GICR_BASE)
    machine.write(0, 1, base=GICR_BASE)
    assert 1 | shown == machine.read(0, base=GICR_BASE)
    irqs = [machine.vgic.add_lpi(8192 + n, machine.cpu) for n in (0, 1)]

    machine.write(0xA0, 8192, 8, base=GICR_BASE)
    assert [0xA0, 0] == [irq.priority for irq in irqs]
    machine.write(0xB0, 0, 8, base=GICR_BASE)
    assert [0xA0, 0x40] == [irq.priority for irq in irqs]
    machine.write(0, 0, base=GICR_BASE)
    assert shown == machine.read(0, base=GICR_BASE)
    machine.write(0x84, 0)
    assert 0 == machine.read(0x84)


@pytest.mark.spec("vgic-v3.reg.gicr.invlpir", "vgic-v3.reg.gicr.invallr")
@pytest.mark.parametrize(
    ("offset", "value", "size", "reloads"),
    [
        pytest.param(0xA0, 8192, 4, True, id="low-word"),
        pytest.param(0xA4, 8192, 4, False, id="high-word"),
        pytest.param(0xA0, 8193, 8, False, id="another"),
        pytest.param(0xA0, 9000, 8, False, id="no-such-lpi"),
        pytest.param(0xB0, 0, 4, True, id="all-low-word"),
        pytest.param(0xB4, 0, 4, False, id="all-high-word"),
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_invalidating_by_register(offset: int, value: int, size: int, reloads: bool, enabled: bool) -> None:
    """A write with the low word reloads the configuration, while LPIs are enabled there; both registers read zero."""
    machine = GicMachine()
    machine.vm.memory.add_ram(0x8000_0000, 0x1000)
    machine.vm.memory.write(0x8000_0000, b"\xa1")
    machine.vgic.propbaser = 0x8000_000F
    machine.cpu.lpis_enabled = enabled
    irq = machine.vgic.add_lpi(8192, machine.cpu)
    machine.write(offset, value, size, base=GICR_BASE)

    assert (reloads and enabled) == irq.enabled
    assert 0 == machine.read(offset, 4, base=GICR_BASE)


@pytest.mark.spec("vgic-v3.reg.gicr.icenabler0", "vgic-v3.reg.gicr.icactiver0")
@given(bits=st.integers(0, ALL), cleared=st.integers(0, ALL), user=st.booleans(), which=st.sampled_from([0x100, 0x300]))
def test_private_interrupts_are_set_and_cleared_where_ones_are(bits: int, cleared: int, user: bool, which: int) -> None:
    """ISENABLER0 with ICENABLER0, ISACTIVER0 with ICACTIVER0; both of a pair read the same."""
    machine = GicMachine()

    def write(offset: int, value: int) -> None:
        if user:
            machine.set(REDIST_REGS, SGI_BASE + offset, value)
        else:
            machine.write(SGI_BASE + offset, value, base=GICR_BASE)

    write(which + 0x80, ALL)
    write(which, bits)
    write(which + 0x80, cleared)
    for offset in (which, which + 0x80):
        assert bits & ~cleared == machine.read(SGI_BASE + offset, base=GICR_BASE)
        assert bits & ~cleared == machine.get(REDIST_REGS, SGI_BASE + offset)
    machine.check()


# -- where the text and the kernel differ


@pytest.mark.spec(
    "vgic-v3.dist-regs.rule.statusr-doc",
    "vgic-v3.redist-regs.rule.statusr-doc",
    "vgic-v3.redist-regs.note.statusr",
    "vgic-v3.redist-regs.note.enxio-only-has",
)
@pytest.mark.parametrize(("group", "base", "value"), [(DIST_REGS, GICD_BASE, ALL), (REDIST_REGS, GICR_BASE, 0)])
@pytest.mark.parametrize("written", [0, 0xF, ALL])
def test_statusr_is_not_what_the_text_says(group: int, base: int, value: int, written: int) -> None:
    """Settable by the text; the kernel, which is followed, takes the write and drops it. A redistributor has none, and
    only the has-test says so."""
    machine = GicMachine()
    machine.set(group, 0x10, written)
    machine.write(0x10, written, base=base)

    assert value == machine.get(group, 0x10) == machine.read(0x10, base=base)
    assert (0 if group == DIST_REGS else errno.ENXIO) == machine.has(group, 0x10)


@pytest.mark.spec("vgic-v3.dist-regs.note.ebusy-uninit")
def test_registers_before_initialisation() -> None:
    """EBUSY, which the text does not list: reading, writing, and writing what would be refused."""
    machine = GicMachine(ready=False)

    assert errno.EBUSY == refusal(machine.get, DIST_REGS, 8)
    assert errno.EBUSY == refusal(machine.set, DIST_REGS, 8, 0)
    machine.set(CTRL, INIT)
    assert errno.EINVAL == refusal(machine.set, DIST_REGS, 8, 0)


@pytest.mark.spec("vgic-v3.ctrl.init.EBUSY.creating-vcpu")
@pytest.mark.parametrize("initialised", [False, True])
def test_initialising_does_not_ask_who_runs(initialised: bool) -> None:
    """The text says EBUSY with running vCPUs. Linux says it only in the middle of KVM_CREATE_VCPU, where no other call
    is ever made here."""
    machine = GicMachine(2, ready=initialised)
    machine.vm.vcpus[1].running = True

    assert 0 == refusal(machine.set, CTRL, INIT)
    assert errno.EBUSY == refusal(machine.add_vcpu)


@pytest.mark.spec("vgic-v3.any")
def test_groups_that_are_not_of_this_device() -> None:
    """ENXIO for each way in, before and after initialisation."""
    known = {ADDR, DIST_REGS, NR_IRQS, CTRL, REDIST_REGS, CPU_SYSREGS, LEVEL_INFO}
    for ready, group, attr in itertools.product((False, True), set(range(12)) - known | {ALL}, (0, 1, 8, 1 << 40)):
        machine = GicMachine(ready=ready)
        answers = [refusal(machine.get, group, attr), refusal(machine.set, group, attr), machine.has(group, attr)]
        assert [errno.ENXIO] * 3 == answers


# -- system registers and line levels


@pytest.mark.spec(
    "vgic-v3.reg.icc.ap0r0",
    "vgic-v3.reg.icc.ap1r0",
    "vgic-v3.reg.icc.igrpen0",
    "vgic-v3.reg.icc.igrpen1",
)
@given(
    register=st.sampled_from(
        [("AP0R0", 0xC644, ALL), ("AP1R0", 0xC648, ALL), ("IGRPEN0", 0xC666, 1), ("IGRPEN1", 0xC667, 1)]
    ),
    value=st.integers(0, (1 << 64) - 1),
)
def test_what_userspace_stores_the_guest_reads(register: tuple[str, int, int], value: int) -> None:
    """And the other way round; other registers stay as they are, and so do other vCPUs."""
    machine = GicMachine(2)
    name, encoding, kept = register
    other = machine.vgic.state().cpus[1]
    machine.set(CPU_SYSREGS, encoding, value)
    assert value & kept == machine.get(CPU_SYSREGS, encoding) == machine.cpu.read_sysreg(f"ICC_{name}_EL1")
    machine.cpu.write_sysreg(f"ICC_{name}_EL1", ~value & ALL)
    assert ~value & kept == machine.get(CPU_SYSREGS, encoding)
    assert other == machine.vgic.state().cpus[1]
    machine.check()


@pytest.mark.spec(
    "vgic-v3.reg.icc.ap0r1",
    "vgic-v3.reg.icc.ap0r2",
    "vgic-v3.reg.icc.ap0r3",
    "vgic-v3.reg.icc.ap1r1",
    "vgic-v3.reg.icc.ap1r2",
    "vgic-v3.reg.icc.ap1r3",
)
@pytest.mark.parametrize("encoding", [0xC645, 0xC646, 0xC647, 0xC649, 0xC64A, 0xC64B])
@pytest.mark.parametrize("bits", [5, 4, 1])
def test_active_priorities_beyond_five_bits(encoding: int, bits: int) -> None:
    """They can be named, and neither read nor written, also when userspace has lowered the number of bits."""
    machine = GicMachine()
    machine.set(CPU_SYSREGS, 0xC664, 0x8800 | bits - 1 << 8)

    assert 0 == machine.has(CPU_SYSREGS, encoding)
    assert errno.EINVAL == refusal(machine.get, CPU_SYSREGS, encoding)
    assert errno.EINVAL == refusal(machine.set, CPU_SYSREGS, encoding, 0)


@pytest.mark.spec("vgic-v3.cpu-sysregs.note.einval-scope")
def test_einval_for_affinity_and_for_value() -> None:
    """The older text has the first only."""
    machine = GicMachine()

    assert errno.EINVAL == refusal(machine.set, CPU_SYSREGS, 1 << 32 | 0xC230, 0xF0)
    assert errno.EINVAL == refusal(machine.set, CPU_SYSREGS, 0xC665, 0)


@pytest.mark.spec("vgic-v3.cpu-sysregs.note.group-name")
def test_the_group_has_the_name_of_the_header() -> None:
    """Number 6, and GRP in the name."""
    assert 6 == uapi.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS
    assert not hasattr(uapi, "KVM_DEV_ARM_VGIC_CPU_SYSREGS")
    names = {group.number: group.name for group in VgicV3.attributes.groups}
    assert "KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS" == names[6]


@pytest.mark.spec("vgic-v3.level-info.rule.no-lpi", "vgic-v3.level-info.note.errors-missing")
@pytest.mark.parametrize("intid", [992, 1024, 4096, 8192, 8224, 1 << 20])
def test_no_lpi_has_a_line(intid: int) -> None:
    """The field has ten bits: the number of an LPI reaches into ``info``, which is refused. Beyond SPIs is nothing."""
    machine = GicMachine()
    machine.vgic.pend_edge(machine.lpi(8192))
    code = errno.EINVAL if intid >= 1024 else 0

    assert code == refusal(machine.set, LEVEL_INFO, intid, ALL)
    assert code == refusal(machine.get, LEVEL_INFO, intid)
    assert 1 == machine.check().raised
