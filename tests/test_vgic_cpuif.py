"""The GICv3 CPU interface: acknowledge, priorities, preemption, end, SGIs, and the registers as userspace sees them."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from gic_machine import CPU_SYSREGS, GicMachine, refusal

from fabric.devices.arm.vgic_cpuif import ICC_READ, ICC_WRITE, USER_SYSREGS

SPURIOUS = 1023
CBPR, EOIMODE = 1, 2
PMR, BPR0, AP0R0, AP0R1, AP1R0, BPR1, CTLR, SRE, IGRPEN0, IGRPEN1 = (
    0xC230, 0xC643, 0xC644, 0xC645, 0xC648, 0xC663, 0xC664, 0xC665, 0xC666, 0xC667,
)  # fmt: skip


def mrs(machine: GicMachine, name: str, cpu: int = 0) -> int:
    """The guest reads an ICC register."""
    value = machine.vgic.cpus[cpu].read_sysreg(f"ICC_{name}_EL1")
    assert isinstance(value, int)
    return value


def msr(machine: GicMachine, name: str, value: int, cpu: int = 0) -> None:
    """The guest writes an ICC register."""
    machine.vgic.cpus[cpu].write_sysreg(f"ICC_{name}_EL1", value)


def raise_all(machine: GicMachine, *priorities: int) -> list[Any]:
    """Edge-triggered SPIs from 32 on with these priorities, all pending."""
    irqs = [machine.spi(32 + n, priority=priority) for n, priority in enumerate(priorities)]
    for irq in irqs:
        machine.vgic.pend_edge(irq)
    return irqs


# -- acknowledge and end


def test_nothing_pending_is_spurious() -> None:
    """1023, and nothing is active afterwards."""
    machine = GicMachine()

    assert [SPURIOUS] * 4 == [mrs(machine, name) for name in ("IAR0", "IAR1", "HPPIR0", "HPPIR1")]
    assert 0xFF == mrs(machine, "RPR")


def test_the_highest_priority_goes_first_and_equals_in_order() -> None:
    """Numerically lowest first; among equals the one raised first."""
    machine = GicMachine()
    raise_all(machine, 0xA0, 0x40, 0xA0, 0x80, 0x40)
    taken = []
    for _ in range(5):
        taken.append(mrs(machine, "IAR1"))
        msr(machine, "EOIR1", taken[-1])

    assert [33, 36, 35, 32, 34] == taken
    assert 5 == machine.check().delivered


def test_an_equal_or_lower_priority_waits_for_the_end() -> None:
    """A higher one preempts; ends unwind the running priority."""
    machine = GicMachine()
    raise_all(machine, 0x80)
    assert 32 == mrs(machine, "IAR1")
    machine.vgic.pend_edge(machine.spi(40, priority=0x80))
    machine.vgic.pend_edge(machine.spi(41, priority=0xA0))
    assert SPURIOUS == mrs(machine, "IAR1")
    assert 40 == mrs(machine, "HPPIR1")
    machine.vgic.pend_edge(machine.spi(42, priority=0x40))

    assert machine.cpu.line
    assert 42 == mrs(machine, "IAR1")
    assert 0x40 == mrs(machine, "RPR")
    assert 1 << (0x40 >> 3) | 1 << (0x80 >> 3) == mrs(machine, "AP1R0")
    msr(machine, "EOIR1", 42)
    assert 0x80 == mrs(machine, "RPR")
    msr(machine, "EOIR1", 32)
    assert 0xFF == mrs(machine, "RPR")
    assert 40 == mrs(machine, "IAR1")
    machine.check()


@pytest.mark.parametrize(("pmr", "taken"), [(0xF0, 32), (0xA8, 32), (0xA0, SPURIOUS), (0x00, SPURIOUS)])
def test_the_priority_mask_lets_higher_ones_pass(pmr: int, taken: int) -> None:
    """Strictly higher; what is masked stays pending and shows in HPPIR."""
    machine = GicMachine()
    msr(machine, "PMR", pmr)
    raise_all(machine, 0xA0)

    assert 32 == mrs(machine, "HPPIR1")
    assert (taken != SPURIOUS) == machine.cpu.line
    assert taken == mrs(machine, "IAR1")
    machine.check()


def test_the_guest_has_five_bits_of_priority_mask() -> None:
    """The lower three read zero."""
    machine = GicMachine()
    msr(machine, "PMR", 0xFF)

    assert 0xF8 == mrs(machine, "PMR")


@pytest.mark.parametrize(
    ("bpr1", "preempts"),
    [pytest.param(3, True, id="all-bits"), pytest.param(6, True, id="0x40s"), pytest.param(7, False, id="0x80s")],
)
def test_the_binary_point_decides_what_preempts(bpr1: int, preempts: bool) -> None:
    """Only the group priority, the bits above it, is compared with what runs."""
    machine = GicMachine()
    msr(machine, "BPR1", bpr1)
    raise_all(machine, 0x70)
    mrs(machine, "IAR1")
    machine.vgic.pend_edge(machine.spi(40, priority=0x38))

    assert preempts == machine.cpu.line
    assert (40 if preempts else SPURIOUS) == mrs(machine, "IAR1")
    assert (0x38 if preempts else 0x70) & -1 << bpr1 == mrs(machine, "RPR")
    machine.check()


def test_binary_points_have_a_least_value() -> None:
    """2 for group 0 and 3 for group 1 with five priority bits; with CBPR group 1 reads group 0's plus one."""
    machine = GicMachine()
    msr(machine, "BPR0", 0)
    msr(machine, "BPR1", 0)
    assert (2, 3) == (mrs(machine, "BPR0"), mrs(machine, "BPR1"))
    msr(machine, "BPR0", 5)
    msr(machine, "CTLR", CBPR)
    msr(machine, "BPR1", 4)
    assert 6 == mrs(machine, "BPR1")
    msr(machine, "BPR0", 7)
    assert 7 == mrs(machine, "BPR1")
    msr(machine, "CTLR", 0)
    assert 3 == mrs(machine, "BPR1")


def test_split_end() -> None:
    """With EOImode the end drops the priority, and DIR deactivates; in between it is not taken again."""
    machine = GicMachine()
    msr(machine, "CTLR", EOIMODE)
    (irq,) = raise_all(machine, 0xA0)
    mrs(machine, "IAR1")
    msr(machine, "EOIR1", 32)
    assert (0xFF, True) == (mrs(machine, "RPR"), irq.active)
    machine.vgic.pend_edge(irq)
    assert SPURIOUS == mrs(machine, "IAR1")

    msr(machine, "DIR", 32)

    assert not irq.active
    assert 32 == mrs(machine, "IAR1")
    machine.check()


def test_dir_does_nothing_without_split_end() -> None:
    """The end deactivates by itself."""
    machine = GicMachine()
    (irq,) = raise_all(machine, 0xA0)
    mrs(machine, "IAR1")

    msr(machine, "DIR", 32)

    assert irq.active


def test_dir_is_not_for_lpis() -> None:
    """One that its end did not match stays active, and DIR leaves it so."""
    machine = GicMachine()
    msr(machine, "CTLR", EOIMODE)
    irq = machine.lpi(8192)
    machine.vgic.pend_edge(irq)
    mrs(machine, "IAR1")
    machine.vgic.set_lpi_config(irq, True, 0x20)
    msr(machine, "EOIR1", 8192)
    assert irq.active

    msr(machine, "DIR", 8192)

    assert irq.active
    machine.check()


def test_an_lpi_needs_no_deactivation() -> None:
    """Its end is all, also with EOImode."""
    machine = GicMachine()
    msr(machine, "CTLR", EOIMODE)
    irq = machine.lpi(8192)
    machine.vgic.pend_edge(irq)
    assert 8192 == mrs(machine, "IAR1")
    machine.vgic.pend_edge(irq)
    assert SPURIOUS == mrs(machine, "IAR1")

    msr(machine, "EOIR1", 8192)

    assert 8192 == mrs(machine, "IAR1")
    machine.check()


@pytest.mark.parametrize("intid", [33, 500, 1020, 1023, 8192, 0xFF_FFFF])
def test_ending_what_is_not_active_only_drops_the_priority(intid: int) -> None:
    """Special INTIDs do not even that."""
    machine = GicMachine()
    (irq,) = raise_all(machine, 0xA0)
    mrs(machine, "IAR1")

    msr(machine, "EOIR1", intid)

    assert (0xA0 if 1020 <= intid <= 1023 else 0xFF) == mrs(machine, "RPR")
    assert irq.active
    machine.check()


def test_ending_out_of_order_leaves_the_interrupt_active() -> None:
    """The priority that drops is the running one, and it is not that interrupt's."""
    machine = GicMachine()
    (outer,) = raise_all(machine, 0x80)
    mrs(machine, "IAR1")
    inner = machine.spi(40, priority=0x40)
    machine.vgic.pend_edge(inner)
    mrs(machine, "IAR1")

    msr(machine, "EOIR1", 32)

    assert outer.active
    assert 0x80 == mrs(machine, "RPR")
    machine.check()


def test_a_vcpu_cannot_end_what_another_has_active() -> None:
    """An SPI taken by vCPU 0 stays active whatever vCPU 1 writes."""
    machine = GicMachine(2)
    (irq,) = raise_all(machine, 0xA0)
    mrs(machine, "IAR1")
    machine.vgic.pend_edge(machine.spi(40, cpu=1))
    mrs(machine, "IAR1", cpu=1)

    msr(machine, "EOIR1", 32, cpu=1)

    assert irq.active
    machine.check()


def test_four_active_interrupts_fill_the_list_registers() -> None:
    """As on the recorded host: nothing more is signalled until one has ended."""
    machine = GicMachine()
    msr(machine, "CTLR", EOIMODE)
    for intid in range(32, 36):
        machine.vgic.pend_edge(machine.spi(intid))
        assert intid == mrs(machine, "IAR1")
        msr(machine, "EOIR1", intid)
    machine.vgic.pend_edge(machine.spi(40, priority=0))
    assert not machine.cpu.line
    assert SPURIOUS == mrs(machine, "HPPIR1") == mrs(machine, "IAR1")

    msr(machine, "DIR", 33)

    assert machine.cpu.line
    assert 40 == mrs(machine, "IAR1")
    machine.check()


def test_of_more_active_interrupts_than_list_registers_the_first_can_end() -> None:
    """Made active by ISACTIVER; the fifth gets its list register when another is free."""
    machine = GicMachine()
    msr(machine, "CTLR", EOIMODE)
    irqs = [machine.spi(intid) for intid in range(32, 37)]
    for irq in irqs:
        machine.vgic.activate(irq)
    msr(machine, "DIR", 36)
    assert irqs[4].active
    msr(machine, "DIR", 33)
    assert not irqs[1].active
    machine.check()

    msr(machine, "DIR", 36)

    assert not irqs[4].active
    machine.check()


# -- groups


def test_groups_have_their_own_registers() -> None:
    """The acknowledge register of the other group reads spurious; group 0 is signalled as FIQ."""
    machine = GicMachine()
    msr(machine, "IGRPEN0", 1)
    first, second = raise_all(machine, 0x40, 0x80)
    machine.vgic.set_group(first, 0)

    assert 0 == machine.cpu.pending_group
    assert 1 << 6 == machine.cpu.read_sysreg("ISR_EL1")
    assert SPURIOUS == mrs(machine, "IAR1") == mrs(machine, "HPPIR1")
    assert 32 == mrs(machine, "HPPIR0") == mrs(machine, "IAR0")
    assert (1 << 8, 0) == (mrs(machine, "AP0R0"), mrs(machine, "AP1R0"))
    msr(machine, "EOIR0", 32)
    assert 1 == machine.cpu.pending_group
    assert 1 << 7 == machine.cpu.read_sysreg("ISR_EL1")
    assert 33 == mrs(machine, "IAR1")
    assert not first.active
    assert second.active
    machine.check()


def test_a_disabled_group_is_left_out() -> None:
    """Its interrupts wait, and the other group's are taken."""
    machine = GicMachine()
    first, _ = raise_all(machine, 0x40, 0x80)
    machine.vgic.set_group(first, 0)
    assert 33 == mrs(machine, "IAR1")
    msr(machine, "EOIR1", 33)
    msr(machine, "IGRPEN1", 0)
    msr(machine, "IGRPEN0", 1)

    assert 32 == mrs(machine, "IAR0")
    assert 1 == mrs(machine, "IGRPEN0")
    assert 0 == mrs(machine, "IGRPEN1")
    machine.check()


def test_ending_by_the_wrong_group_drops_the_priority_only() -> None:
    """Seen on the recorded host: the interrupt stays active for good."""
    machine = GicMachine()
    msr(machine, "IGRPEN0", 1)
    (irq,) = raise_all(machine, 0xA0)
    mrs(machine, "IAR1")

    msr(machine, "EOIR0", 32)

    assert 0xFF == mrs(machine, "RPR")
    assert irq.active
    machine.check()


def test_the_interface_reads_what_was_written() -> None:
    """And what cannot be written reads as it is."""
    machine = GicMachine()
    assert 0x8C00 == mrs(machine, "CTLR")
    msr(machine, "CTLR", 0xFFFF)
    assert 0x8C03 == mrs(machine, "CTLR")
    msr(machine, "SRE", 0)
    assert 7 == mrs(machine, "SRE")
    msr(machine, "AP0R0", 0x1_0000_0010)
    assert 0x10 == mrs(machine, "AP0R0")
    msr(machine, "AP1R0", 0x20)
    assert 0x20 == mrs(machine, "RPR") == mrs(machine, "AP1R0")
    with pytest.raises(KeyError):
        mrs(machine, "EOIR1")


def test_the_tables_cover_the_registers_there_are() -> None:
    """Every one is readable or writable, and none is empty."""
    assert {"ICC_IAR1_EL1", "ICC_RPR_EL1", "ICC_HPPIR0_EL1", "ISR_EL1"} <= set(ICC_READ) - set(ICC_WRITE)
    assert {"ICC_EOIR0_EL1", "ICC_DIR_EL1", "ICC_SGI1R_EL1"} <= set(ICC_WRITE) - set(ICC_READ)


# -- SGIs


def sgi(intid: int, targets: int, *, aff1: int = 0, aff2: int = 0, aff3: int = 0, irm: int = 0) -> int:
    """A value of ICC_SGI1R_EL1."""
    return aff3 << 48 | irm << 40 | aff2 << 32 | intid << 24 | aff1 << 16 | targets


def sgi_machine() -> GicMachine:
    """Four vCPUs: three in cluster 0.0.0, one at 0.0.1.0."""
    machine = GicMachine(4)
    machine.vm.vcpus[3].mpidr = 0x100
    return machine


@pytest.mark.parametrize(
    ("value", "hit"),
    [
        pytest.param(sgi(5, 0b1), [0], id="itself"),
        pytest.param(sgi(5, 0b1110), [1, 2], id="a-list"),
        pytest.param(sgi(5, 0b1, aff1=1), [3], id="another-cluster"),
        pytest.param(sgi(5, 0b1, aff2=1), [], id="no-such-aff2"),
        pytest.param(sgi(5, 0b1, aff3=1), [], id="no-such-aff3"),
        pytest.param(sgi(5, 0, irm=1), [1, 2, 3], id="all-but-itself"),
    ],
)
def test_an_sgi_goes_where_the_affinities_say(value: int, hit: list[int]) -> None:
    """Targets are a bit list of Aff0 in one cluster, or all others."""
    machine = sgi_machine()

    msr(machine, "SGI1R", value)

    assert hit == [cpu.index for cpu in machine.vgic.cpus if cpu.line]
    assert [5] * len(hit) == [cpu.acknowledge(1) for cpu in machine.vgic.cpus if cpu.line]
    assert len(hit) == machine.check().raised


@pytest.mark.parametrize(("name", "group1"), [("SGI1R", True), ("ASGI1R", False), ("SGI0R", False)])
def test_only_sgi1r_reaches_group_1(name: str, group1: bool) -> None:
    """The others raise an SGI that its target has in group 0."""
    machine = GicMachine(2)
    machine.vgic.set_group(machine.vgic.cpus[1].private[6], 0)

    msr(machine, name, sgi(5, 0b10))
    msr(machine, name, sgi(6, 0b10))

    assert group1 == machine.vgic.cpus[1].private[5].pending
    assert machine.vgic.cpus[1].private[6].pending
    machine.check()


# -- as userspace sees them


@pytest.mark.spec("vgic-v3.cpu-sysregs.rule.wide", "vgic-v3.reg.icc.pmr", "vgic-v3.reg.icc.bpr0")
@pytest.mark.parametrize(
    ("register", "kept"),
    [(PMR, 0xFF), (BPR0, 7), (BPR1, 7), (IGRPEN0, 1), (IGRPEN1, 1), (AP0R0, 0xFFFF_FFFF), (AP1R0, 0xFFFF_FFFF)],
)
def test_userspace_stores_all_bits_of_a_register(register: int, kept: int) -> None:
    """More than the guest could have written; the bits above are dropped."""
    machine = GicMachine()

    for value in (0, 0xFFFF_FFFF_FFFF_FFFF, 0x5555_5555_5555_5555, 0x1_0000_0000):
        machine.set(CPU_SYSREGS, register, value)
        assert value & kept == machine.get(CPU_SYSREGS, register)
    machine.check()


def test_the_hardware_raises_binary_points_when_the_vcpu_runs() -> None:
    """Then userspace sees them too."""
    machine = GicMachine()
    machine.set(CPU_SYSREGS, BPR0, 0)
    machine.set(CPU_SYSREGS, BPR1, 1)
    assert (0, 1) == (machine.get(CPU_SYSREGS, BPR0), machine.get(CPU_SYSREGS, BPR1))

    machine.cpu.load()

    assert (2, 3) == (machine.get(CPU_SYSREGS, BPR0), machine.get(CPU_SYSREGS, BPR1))


@pytest.mark.spec("vgic-v3.cpu-sysregs.rule.bpr1-cbpr", "vgic-v3.reg.icc.bpr1")
def test_bpr1_with_cbpr() -> None:
    """Reads BPR0 plus one, at most 7, and ignores writes."""
    machine = GicMachine()
    machine.set(CPU_SYSREGS, CTLR, 0x8C01)
    machine.set(CPU_SYSREGS, BPR0, 4)
    machine.set(CPU_SYSREGS, BPR1, 7)
    assert 5 == machine.get(CPU_SYSREGS, BPR1)
    machine.set(CPU_SYSREGS, BPR0, 7)
    assert 7 == machine.get(CPU_SYSREGS, BPR1)


@pytest.mark.spec("vgic-v3.cpu-sysregs.rule.ctlr-caps", "vgic-v3.cpu-sysregs.EINVAL.value", "vgic-v3.reg.icc.ctlr")
@pytest.mark.parametrize(
    ("value", "code", "after"),
    [
        pytest.param(0x8C03, 0, 0x8C03, id="as-the-host"),
        pytest.param(0x8B00, 0, 0x8B00, id="fewer-priority-bits"),
        pytest.param(0x8400, 0, 0x8400, id="fewer-id-bits"),
        pytest.param(0x8D00, errno.EINVAL, 0x8C00, id="more-priority-bits"),
        pytest.param(0x9400, errno.EINVAL, 0x8C00, id="more-id-bits"),
        pytest.param(0xCC00, errno.EINVAL, 0x8C00, id="seis"),
        pytest.param(0x0C00, errno.EINVAL, 0x8C00, id="no-a3v"),
        pytest.param(0x0300, errno.EINVAL, 0x8300, id="lowered-although-refused"),
    ],
)
def test_icc_ctlr_takes_what_the_host_can_do(value: int, code: int, after: int) -> None:
    """Bits may be lowered, and are even when a later check refuses the value."""
    machine = GicMachine()

    assert code == refusal(machine.set, CPU_SYSREGS, CTLR, value)
    assert after == machine.get(CPU_SYSREGS, CTLR)
    assert 0x8C00 == mrs(machine, "CTLR") & ~3


@pytest.mark.spec("vgic-v3.cpu-sysregs.rule.sre", "vgic-v3.reg.icc.sre")
def test_icc_sre_is_fixed() -> None:
    """Reads 7; a write must have SRE set and changes nothing."""
    machine = GicMachine()

    assert 0 == refusal(machine.set, CPU_SYSREGS, SRE, 1)
    assert errno.EINVAL == refusal(machine.set, CPU_SYSREGS, SRE, 6)
    assert 7 == machine.get(CPU_SYSREGS, SRE)


@pytest.mark.spec("vgic-v3.cpu-sysregs.rule.apr-range", "vgic-v3.reg.icc.ap0r1")
def test_active_priority_registers_end_with_the_priority_bits() -> None:
    """With five bits there is one of each group; the others exist and cannot be accessed."""
    machine = GicMachine()
    for register in (AP0R1, AP0R1 + 1, AP0R1 + 2, AP1R0 + 1, AP1R0 + 2, AP1R0 + 3):
        assert 0 == machine.has(CPU_SYSREGS, register)
        assert errno.EINVAL == refusal(machine.get, CPU_SYSREGS, register)
        assert errno.EINVAL == refusal(machine.set, CPU_SYSREGS, register, 0)


@pytest.mark.spec(
    "vgic-v3.cpu-sysregs.ENOENT.unknown-reg",
    "vgic-v3.cpu-sysregs.ENXIO.unknown-reg",
    "vgic-v3.cpu-sysregs.note.enoent",
    "vgic-v3.cpu-sysregs.rule.a64-encoding",
)
def test_an_encoding_of_no_register() -> None:
    """ENOENT to get and set, ENXIO to has; bits 31:16 do not matter."""
    machine = GicMachine()

    assert errno.ENOENT == refusal(machine.get, CPU_SYSREGS, 0xC660)
    assert errno.ENOENT == refusal(machine.set, CPU_SYSREGS, 0xC660)
    assert errno.ENXIO == machine.has(CPU_SYSREGS, 0xC660)
    assert 0 == machine.has(CPU_SYSREGS, 0x1234_0000 | PMR)
    assert 15 == len(USER_SYSREGS)
