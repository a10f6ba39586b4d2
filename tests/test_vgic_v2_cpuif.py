"""What a guest does at a GICv2 CPU interface: acknowledge, preempt, end, groups, SGIs and their senders."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from gic_machine import DIST_REGS
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
    ICPENDR,
    IPRIORITYR,
    ISACTIVER,
    ISENABLER,
    ISPENDR,
    ITARGETSR,
    OTHER_GROUP,
    PMR,
    RPR,
    SPENDSGIR,
    SPURIOUS,
    Gicv2Machine,
)

GRP0, GRP1, ACKCTL, FIQEN, CBPR, EOIMODE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 9


def pend(machine: Gicv2Machine, *priorities: int, first: int = 32) -> list[Any]:
    """Edge-triggered SPIs with these priorities, all pending."""
    irqs = [machine.spi(first + n, priority=priority) for n, priority in enumerate(priorities)]
    machine.raise_spi(*(irq.intid for irq in irqs))
    return irqs


# -- acknowledge and end


def test_nothing_pending_is_spurious() -> None:
    """1023 from every register that reads an INTID, and nothing is active afterwards."""
    machine = Gicv2Machine()

    assert [SPURIOUS] * 4 == [machine.gicc(register) for register in (IAR, HPPIR, AIAR, AHPPIR)]
    assert (0xFF, 0) == (machine.gicc(RPR), machine.gicc(APR))


def test_the_highest_priority_goes_first_and_equals_in_order() -> None:
    """Numerically lowest first; among equals the one raised first."""
    machine = Gicv2Machine()
    pend(machine, 0xA0, 0x40, 0xA0, 0x80, 0x40)
    taken = []
    for _ in range(5):
        taken.append(machine.gicc(IAR))
        machine.gicc(EOIR, taken[-1])

    assert [33, 36, 35, 32, 34] == taken
    assert 5 == machine.check().delivered


def test_an_equal_or_lower_priority_waits_for_the_end() -> None:
    """A higher one preempts; ends unwind the running priority. GICC_HPPIR does not care what runs."""
    machine = Gicv2Machine()
    pend(machine, 0x80)
    assert 32 == machine.gicc(IAR)
    pend(machine, 0x80, 0xA0, first=40)
    assert not machine.cpu.line
    assert (SPURIOUS, 40) == (machine.gicc(IAR), machine.gicc(HPPIR))
    pend(machine, 0x40, first=42)

    assert machine.cpu.line
    assert 42 == machine.gicc(IAR)
    assert 0x40 == machine.gicc(RPR)
    machine.gicc(EOIR, 42)
    assert 0x80 == machine.gicc(RPR)
    machine.gicc(EOIR, 32)
    assert 0xFF == machine.gicc(RPR)
    assert 40 == machine.gicc(IAR)
    machine.check()


@pytest.mark.parametrize(("pmr", "taken"), [(0xF0, 32), (0xA8, 32), (0xA0, SPURIOUS), (0x00, SPURIOUS)])
def test_the_priority_mask_lets_higher_ones_pass(pmr: int, taken: int) -> None:
    """Strictly higher; what is masked stays pending and shows in GICC_HPPIR."""
    machine = Gicv2Machine()
    machine.gicc(PMR, pmr)
    pend(machine, 0xA0)

    assert 32 == machine.gicc(HPPIR)
    assert (taken != SPURIOUS) == machine.cpu.line
    assert taken == machine.gicc(IAR)


@pytest.mark.parametrize(
    ("bpr", "preempts"),
    [pytest.param(2, True, id="all-bits"), pytest.param(5, True, id="0x40s"), pytest.param(6, False, id="0x80s")],
)
def test_the_binary_point_decides_what_preempts(bpr: int, preempts: bool) -> None:
    """Only the group priority, the bits above it, is compared with what runs."""
    machine = Gicv2Machine()
    machine.gicc(BPR, bpr)
    pend(machine, 0x70)
    machine.gicc(IAR)
    pend(machine, 0x38, first=40)

    assert preempts == machine.cpu.line
    assert (40 if preempts else SPURIOUS) == machine.gicc(IAR)
    assert (0x38 if preempts else 0x70) & -2 << bpr == machine.gicc(RPR)


def test_group_1_has_its_own_binary_point_unless_common() -> None:
    """GICC_ABPR, where one more means the same; with CBPR GICC_BPR counts for both."""
    for ctlr, abpr, running in ((0, 7, 0x00), (0, 5, 0x60), (CBPR, 7, 0x78)):
        machine = Gicv2Machine()
        machine.gicc(CTLR, GRP0 | GRP1 | ACKCTL | ctlr)
        machine.gicc(ABPR, abpr)
        machine.vgic.set_group(machine.spi(32, priority=0x78), 1)
        machine.raise_spi(32)
        machine.gicc(IAR)
        assert running == machine.gicc(RPR)


@pytest.mark.parametrize(("priority", "preempts"), [(0x28, True), (0x30, False), (0x38, False)])
def test_what_preempts_has_a_higher_priority_than_the_running_one(priority: int, preempts: bool) -> None:
    """Whatever the binary point of its own group: the one of what runs has cut the running priority."""
    machine = Gicv2Machine()
    machine.gicc(CTLR, GRP0 | GRP1 | ACKCTL)
    machine.gicc(ABPR, 5)
    pend(machine, 0x30)
    machine.gicc(IAR)
    machine.vgic.set_group(machine.spi(40, priority=priority), 1)
    machine.raise_spi(40)

    assert preempts == machine.cpu.line
    assert (40 if preempts else SPURIOUS) == machine.gicc(IAR)


def test_a_level_is_pending_again_after_its_end_if_the_line_is_high() -> None:
    """A latch set by ISPENDR lasts until the end, and no longer."""
    machine = Gicv2Machine()
    irq = machine.spi(40, edge=False)
    machine.vgic.line_level(irq, True)
    machine.gicd(ISPENDR + 4, 1 << 8)
    assert 40 == machine.gicc(IAR)
    assert irq.pending
    assert SPURIOUS == machine.gicc(IAR) == machine.gicc(HPPIR)
    machine.gicc(EOIR, 40)
    assert not irq.pending
    assert 40 == machine.gicc(IAR)
    machine.vgic.line_level(irq, False)
    machine.gicc(EOIR, 40)

    assert SPURIOUS == machine.gicc(IAR)
    assert (2, 1) == ((statement := machine.check()).delivered, statement.coalesced)


def test_the_end_of_a_level_tells_who_waits_for_it() -> None:
    """That is how irqfds with a resampler lower and raise the line again."""
    machine = Gicv2Machine()
    irq = machine.spi(40, edge=False)
    machine.vgic.eoi_notifiers[40] = [lambda: machine.vgic.line_level(irq, False)]
    machine.vgic.line_level(irq, True)
    machine.gicc(EOIR, machine.gicc(IAR))

    assert SPURIOUS == machine.gicc(IAR)
    assert not irq.line


def test_split_end() -> None:
    """With EOImode the end drops the priority, and GICC_DIR deactivates; in between it is not taken again."""
    machine = Gicv2Machine()
    machine.gicc(CTLR, GRP0 | EOIMODE)
    (irq,) = pend(machine, 0xA0)
    machine.gicc(EOIR, machine.gicc(IAR))
    assert (0xFF, True) == (machine.gicc(RPR), irq.active)
    machine.raise_spi(32)
    assert SPURIOUS == machine.gicc(IAR) == machine.gicc(HPPIR)
    machine.gicc(DIR, SPURIOUS)
    machine.gicc(DIR, 33)

    machine.gicc(DIR, 32)

    assert not irq.active
    assert 32 == machine.gicc(IAR)
    machine.check()


def test_dir_does_nothing_without_split_end() -> None:
    """The end deactivates by itself."""
    machine = Gicv2Machine()
    (irq,) = pend(machine, 0xA0)
    machine.gicc(IAR)
    machine.gicc(DIR, 32)

    assert irq.active


@pytest.mark.parametrize("intid", [33, 95, 500, 1019])
def test_ending_what_is_not_active_drops_the_priority(intid: int) -> None:
    """Whether there is such an interrupt or not."""
    machine = Gicv2Machine()
    (irq,) = pend(machine, 0xA0)
    machine.gicc(IAR)
    machine.gicc(EOIR, intid)

    assert (0xFF, True) == (machine.gicc(RPR), irq.active)


@pytest.mark.parametrize("intid", [1020, 1022, 1023])
def test_ending_a_special_number_does_nothing(intid: int) -> None:
    """Also not with other bits in the register."""
    machine = Gicv2Machine()
    pend(machine, 0xA0)
    machine.gicc(IAR)
    machine.gicc(EOIR, intid | 0xFFFF_FC00)

    assert 0xA0 == machine.gicc(RPR)


def test_ending_out_of_order_deactivates_what_was_named() -> None:
    """The priority that drops is the running one all the same; a GICv3 would leave the interrupt active."""
    machine = Gicv2Machine()
    (outer,) = pend(machine, 0x80)
    machine.gicc(IAR)
    (inner,) = pend(machine, 0x40, first=40)
    machine.gicc(IAR)
    machine.gicc(EOIR, 32)

    assert (False, True) == (outer.active, inner.active)
    assert 0x80 == machine.gicc(RPR)
    machine.check()


def test_a_vcpu_cannot_end_what_another_has_active() -> None:
    """An SPI taken by vCPU 0 stays active whatever vCPU 1 writes."""
    machine = Gicv2Machine(2)
    (irq,) = pend(machine, 0xA0)
    machine.gicc(IAR)
    machine.gicc(EOIR, 32, cpu=1)
    machine.gicc(CTLR, GRP0 | EOIMODE, cpu=1)
    machine.gicc(DIR, 32, cpu=1)

    assert irq.active


# -- groups


def test_an_interrupt_of_a_disabled_group_blocks_the_others() -> None:
    """It is the highest pending one, and reads as none."""
    machine = Gicv2Machine()
    first, _ = pend(machine, 0x40, 0x80)
    machine.vgic.set_group(first, 1)
    assert not machine.cpu.line
    assert [SPURIOUS] * 4 == [machine.gicc(register) for register in (IAR, HPPIR, AIAR, AHPPIR)]
    machine.gicc(CTLR, 0)
    assert SPURIOUS == machine.gicc(HPPIR)

    machine.gicc(CTLR, GRP1)
    assert 32 == machine.gicc(AIAR)
    machine.check()


def test_group_1_is_for_the_aliased_registers() -> None:
    """GICC_IAR and GICC_HPPIR read 1022 in its place; the aliased ones read 1023 in the place of group 0."""
    machine = Gicv2Machine()
    machine.gicc(CTLR, GRP0 | GRP1)
    first, second = pend(machine, 0x40, 0x80)
    machine.vgic.set_group(first, 1)
    assert [OTHER_GROUP, OTHER_GROUP, 32] == [machine.gicc(register) for register in (IAR, HPPIR, AHPPIR)]
    assert 32 == machine.gicc(AIAR)
    machine.gicc(AEOIR, 33)
    assert 0x40 == machine.gicc(RPR)
    machine.gicc(AEOIR, 32)
    assert not first.active
    assert [SPURIOUS, SPURIOUS, 33] == [machine.gicc(register) for register in (AIAR, AHPPIR, HPPIR)]

    assert 33 == machine.gicc(IAR)
    machine.gicc(AEOIR, 33)
    assert second.active
    machine.gicc(EOIR, 33)
    assert not second.active
    machine.check()


def test_ackctl_lets_gicc_iar_take_group_1() -> None:
    """And GICC_HPPIR read it."""
    machine = Gicv2Machine()
    machine.gicc(CTLR, GRP0 | GRP1 | ACKCTL)
    (irq,) = pend(machine, 0x40)
    machine.vgic.set_group(irq, 1)

    assert 32 == machine.gicc(HPPIR) == machine.gicc(IAR)
    machine.gicc(EOIR, 32)
    assert not irq.active


def test_what_cannot_be_taken_is_spurious_before_its_group_is_asked() -> None:
    """1022 only for an interrupt that would be taken by the other register."""
    machine = Gicv2Machine()
    machine.gicc(CTLR, GRP0 | GRP1)
    machine.gicc(PMR, 0x40)
    (irq,) = pend(machine, 0x40)
    machine.vgic.set_group(irq, 1)

    assert SPURIOUS == machine.gicc(IAR)
    machine.gicc(PMR, 0x48)
    assert OTHER_GROUP == machine.gicc(IAR)


def test_group_0_is_an_fiq_if_fiqen_says_so() -> None:
    """Else both are IRQs."""
    machine = Gicv2Machine()
    (irq,) = pend(machine, 0x40)
    seen = []
    for group in (0, 1):
        machine.vgic.set_group(irq, group)
        for ctlr in (GRP0 | GRP1, GRP0 | GRP1 | FIQEN, 0):
            machine.gicc(CTLR, ctlr)
            seen.append(machine.cpu.pending_group)

    assert [1, 0, None, 1, 1, None] == seen


# -- SGIs


def test_an_sgi_comes_with_its_sender() -> None:
    """In bits 12:10, by id; the end may name it or not."""
    machine = Gicv2Machine(3)
    machine.send(5, 0b001, cpu=2)
    machine.send(6, 0b001, cpu=1)

    assert 2 << 10 | 5 == machine.gicc(IAR)
    machine.gicc(EOIR, 2 << 10 | 5)
    assert 1 << 10 | 6 == machine.gicc(IAR)
    machine.gicc(EOIR, 6)
    assert (0xFF, SPURIOUS) == (machine.gicc(RPR), machine.gicc(IAR))
    assert 2 == machine.check().delivered


def test_an_sgi_is_taken_once_from_each_sender() -> None:
    """Lowest first, one after the other; only the same sender again is coalesced."""
    machine = Gicv2Machine(3)
    for sender in (2, 1, 0, 1):
        machine.send(5, 0b001, cpu=sender)
    assert 3 == machine.check().pending
    taken = []
    while (value := machine.gicc(IAR)) != SPURIOUS:
        taken.append(value >> 10)
        assert SPURIOUS == machine.gicc(IAR)
        machine.gicc(EOIR, value)

    assert [0, 1, 2] == taken
    assert (4, 3, 1) == ((statement := machine.check()).raised, statement.delivered, statement.coalesced)


def test_who_listens_is_told_of_one_sender_at_a_time() -> None:
    """So that each that is taken has a time from when it was the next."""
    told: list[tuple[str, ...]] = []

    class Listener:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: told.append((name, *args))

    machine = Gicv2Machine(3)
    machine.vgic.events = Listener()  # type: ignore[assignment]
    machine.gicd(SPENDSGIR + 5, 0b111, size=1)
    machine.gicd(CPENDSGIR + 5, 0b100, size=1)
    for _ in range(2):
        machine.gicc(EOIR, machine.gicc(IAR))
    machine.gicd(SPENDSGIR + 5, 0b11, size=1)
    machine.gicd(CPENDSGIR + 5, 0b11, size=1)

    lives = [("pending", 0, 5), ("acknowledged", 0, 5)]
    assert [
        *lives, ("pending", 0, 5), ("completed", 0, 5), ("acknowledged", 0, 5), ("completed", 0, 5),
        ("pending", 0, 5), ("dropped", 0, 5, "SGI cleared"),
    ] == told  # fmt: skip
    assert (5, 2, {"SGI cleared": 3}) == (
        (statement := machine.check()).raised, statement.delivered, statement.dropped
    )  # fmt: skip


def test_gicc_hppir_leaves_out_the_sender() -> None:
    """So the recorded host does."""
    machine = Gicv2Machine(3)
    machine.send(5, 0b001, cpu=2)

    assert 5 == machine.gicc(HPPIR)


def test_an_sgi_that_is_sent_again_while_active_comes_again() -> None:
    """Also from the same sender."""
    machine = Gicv2Machine(2)
    machine.send(5, 0b01, cpu=1)
    machine.gicc(IAR)
    machine.send(5, 0b01, cpu=1)
    assert SPURIOUS == machine.gicc(IAR) == machine.gicc(HPPIR)
    machine.gicc(EOIR, 5)

    assert 1 << 10 | 5 == machine.gicc(IAR)
    machine.check()


def test_a_lower_priority_cannot_overtake_an_sgi_that_has_more_senders() -> None:
    """While it is active, the priority dropped already, nothing of lower priority is let in; an equal one is.

    Active ones were sorted to the front, so once it is no longer active its turn is before the equal one.
    """
    machine = Gicv2Machine(2)
    machine.gicc(CTLR, GRP0 | EOIMODE)
    machine.gicd(IPRIORITYR, 0x40, size=1)
    machine.send(0, 0b01, cpu=0)
    machine.send(0, 0b01, cpu=1)
    pend(machine, 0x80)
    machine.gicc(EOIR, machine.gicc(IAR))
    assert SPURIOUS == machine.gicc(HPPIR) == machine.gicc(IAR)

    pend(machine, 0x40, first=40)
    assert 40 == machine.gicc(HPPIR)
    machine.gicc(DIR, 0)
    assert 1 << 10 == machine.gicc(IAR)
    machine.check()


def test_clearing_the_other_senders_lets_the_rest_in() -> None:
    """At once: an SGI that is active and nothing more holds up nobody."""
    machine = Gicv2Machine(2)
    machine.gicc(CTLR, GRP0 | EOIMODE)
    machine.gicd(IPRIORITYR, 0x40, size=1)
    machine.gicd(SPENDSGIR, 0b11)
    pend(machine, 0x80)
    machine.gicc(EOIR, machine.gicc(IAR))
    assert SPURIOUS == machine.gicc(HPPIR)
    machine.gicd(CPENDSGIR, 0b10)

    assert 32 == machine.gicc(HPPIR)
    machine.check()


def test_lowering_an_active_sgi_lets_more_in() -> None:
    """What its priority keeps out follows it."""
    machine = Gicv2Machine(2)
    machine.gicc(CTLR, GRP0 | EOIMODE)
    machine.gicd(SPENDSGIR, 0b11)
    pend(machine, 0x80)
    machine.gicc(EOIR, machine.gicc(IAR))
    assert SPURIOUS == machine.gicc(HPPIR)
    machine.gicd(IPRIORITYR, 0x80, size=1)

    assert 32 == machine.gicc(HPPIR)
    machine.check()


# -- list registers, and KVM's order


def test_four_active_interrupts_fill_the_list_registers() -> None:
    """As on the recorded host: nothing more is signalled until one has ended."""
    machine = Gicv2Machine()
    machine.gicc(CTLR, GRP0 | EOIMODE)
    for intid in range(32, 36):
        pend(machine, 0xA0, first=intid)
        assert intid == machine.gicc(IAR)
        machine.gicc(EOIR, intid)
    pend(machine, 0, first=40)
    assert not machine.cpu.line
    assert SPURIOUS == machine.gicc(HPPIR) == machine.gicc(IAR)
    machine.gicc(DIR, 33)

    assert machine.cpu.line
    assert 40 == machine.gicc(IAR)
    machine.check()


def test_an_active_interrupt_without_a_list_register_cannot_be_ended() -> None:
    """The first four have one; ending the fifth drops a priority and leaves it active."""
    machine = Gicv2Machine()
    machine.gicd(ISACTIVER + 4, 0b11111)
    irqs = machine.vgic.spis[:5]
    machine.gicc(EOIR, 36)
    assert irqs[4].active
    machine.gicc(EOIR, 33)
    machine.gicc(EOIR, 36)

    assert [True, False, True, True, False] == [irq.active for irq in irqs]
    machine.check()


def test_sorting_puts_active_interrupts_first_for_good() -> None:
    """So one raised again while active goes before equals that were raised earlier, if there was a crowd."""
    machine = Gicv2Machine()
    pend(machine, 0xA0, first=50)
    machine.gicc(IAR)
    machine.gicc(EOIR, 50)
    pend(machine, 0xA0, 0xA0, 0xA0, 0xA0, 0xA0)  # 32 to 36
    machine.gicd(ISACTIVER + 4, 1 << 4)  # 36
    machine.raise_spi(36)
    machine.gicd(ICACTIVER + 4, 1 << 4)
    taken = []
    for _ in range(5):
        taken.append(machine.gicc(IAR))
        machine.gicc(EOIR, taken[-1])

    assert [36, 32, 33, 34, 35] == taken
    machine.check()


def test_without_a_crowd_the_order_stays() -> None:
    """Nothing is sorted while the list registers suffice."""
    machine = Gicv2Machine()
    pend(machine, 0xA0, 0xA0, 0xA0)
    machine.gicd(ISACTIVER + 4, 1 << 2)
    machine.raise_spi(34)
    machine.gicd(ICACTIVER + 4, 1 << 2)
    taken = []
    for _ in range(3):
        taken.append(machine.gicc(IAR))
        machine.gicc(EOIR, taken[-1])

    assert [32, 33, 34] == taken


def test_a_vcpu_that_stands_still_keeps_the_places_on_its_list() -> None:
    """What was cleared and raised again meanwhile is where it was; once it has run, at the end."""
    machine = Gicv2Machine()
    pend(machine, 0xA0, 0xA0)
    machine.user(DIST_REGS, ICPENDR + 4, 0b01)  # and the vCPU runs
    machine.raise_spi(32)
    assert 33 == machine.gicc(HPPIR)

    machine.stop()
    machine.set(DIST_REGS, ICPENDR + 4, 0b10)
    machine.raise_spi(33)
    machine.run()
    assert 33 == machine.gicc(HPPIR)
    machine.check()


@pytest.mark.parametrize(
    ("register", "order"),
    [pytest.param(ICPENDR, [32, 33, 34, 35], id="cleared"), pytest.param(ICENABLER, [35, 32, 33, 34], id="disabled")],
)
def test_what_makes_a_crowd_when_a_vcpu_runs(register: int, order: list[int]) -> None:
    """An interrupt that is still on the list counts if it is pending, though it is not enabled any more."""
    machine = Gicv2Machine()
    pend(machine, 0xA0, 0xA0, 0xA0, 0xA0, 0xA0)
    machine.stop()
    machine.set(DIST_REGS, ISACTIVER + 4, 1 << 3)
    machine.set(DIST_REGS, register + 4, 1 << 4)
    machine.run()
    machine.gicd(ICACTIVER + 4, 1 << 3)
    taken = []
    for _ in range(4):
        taken.append(machine.gicc(IAR))
        machine.gicc(EOIR, taken[-1])

    assert order == taken
    machine.check()


def test_what_waits_on_a_list_in_vain_goes_when_the_vcpu_runs() -> None:
    """Also while the distributor does not forward."""
    machine = Gicv2Machine()
    pend(machine, 0xA0, 0xA0)
    machine.stop()
    machine.set(DIST_REGS, ICPENDR + 4, 1)
    machine.set(DIST_REGS, 0, 0)
    machine.run()
    assert [] == machine.cpu.order
    machine.gicd(0, 1)

    assert SPURIOUS == machine.gicc(HPPIR)
    assert 1 == machine.check().pending


# -- what the distributor lets through


def test_nothing_is_taken_while_the_distributor_does_not_forward() -> None:
    """And what was raised meanwhile, or waited then, needs another event afterwards; what is active stays."""
    machine = Gicv2Machine()
    pend(machine, 0x80, 0xA0)
    assert 32 == machine.gicc(IAR)
    machine.gicd(0, 0)
    pend(machine, 0x40, first=40)
    assert SPURIOUS == machine.gicc(IAR) == machine.gicc(HPPIR)
    machine.gicc(EOIR, 32)
    machine.gicd(0, 1)
    assert SPURIOUS == machine.gicc(IAR)

    machine.gicd(ISENABLER + 4, 1 << 8 | 1 << 1)
    assert [40, 33] == [machine.gicc(HPPIR), (machine.gicc(EOIR, machine.gicc(IAR)), machine.gicc(IAR))[1]]
    machine.check()


def test_a_write_of_zero_to_spendsgir_is_an_event() -> None:
    """For the SGIs that are pending already."""
    machine = Gicv2Machine()
    machine.gicd(0, 0)
    machine.send(3, 1)
    machine.gicd(0, 1)
    assert SPURIOUS == machine.gicc(IAR)
    machine.gicd(SPENDSGIR, 0)

    assert 3 == machine.gicc(IAR)
    assert 1 == machine.check().raised


def test_a_disabled_interrupt_waits() -> None:
    """Pending state is kept."""
    machine = Gicv2Machine()
    (irq,) = pend(machine, 0xA0)
    machine.gicd(ICENABLER + 4, 1)
    assert (SPURIOUS, True) == (machine.gicc(IAR), irq.pending)
    machine.gicd(ISENABLER + 4, 1)

    assert 32 == machine.gicc(IAR)


def test_changing_the_target_takes_what_waits_along() -> None:
    """What is active ends where it was taken."""
    machine = Gicv2Machine(2)
    pend(machine, 0x80, 0xA0)
    assert 32 == machine.gicc(IAR)
    machine.gicd(ITARGETSR + 32, 0x0202)

    assert (SPURIOUS, 33) == (machine.gicc(HPPIR), machine.gicc(HPPIR, cpu=1))
    machine.raise_spi(32)
    machine.gicc(EOIR, 32)
    assert 32 == machine.gicc(HPPIR, cpu=1)
    machine.check()


def test_ppis_belong_to_their_vcpu() -> None:
    """The same INTID at another vCPU is another interrupt."""
    machine = Gicv2Machine(2)
    machine.gicd(ISENABLER, 1 << 27, cpu=1)
    machine.vgic.inject_ppi(1, 27, True)

    assert (SPURIOUS, 27) == (machine.gicc(IAR), machine.gicc(IAR, cpu=1))


# -- state


def test_a_copy_goes_on_where_the_original_stood() -> None:
    """From state(): the same order, the same senders, the same running priority."""
    machine = Gicv2Machine(2)
    machine.gicc(CTLR, GRP0 | GRP1 | ACKCTL | FIQEN | CBPR | EOIMODE)
    for sender in (0, 1):
        machine.send(5, 0b01, cpu=sender)
    machine.gicd(IPRIORITYR + 4, 0xA0A0_A0A0)
    pend(machine, 0x80, 0xA0, 0xC0, 0xC0, 0xC0)
    machine.gicc(IAR)
    machine.stop()
    copy = Gicv2Machine(2, ready=False)
    copy.vgic = type(machine.vgic).from_state(type(machine.vm)(2, host_gic=2), machine.vgic.state())  # type: ignore[arg-type]
    copy.vm = copy.vgic.vm  # type: ignore[assignment]
    copy.ledger = copy.vm.ledger

    assert machine.vgic.state() == copy.vgic.state()
    assert 6 == copy.check().pending
    for one in (machine, copy):
        one.run()
        seen = []
        one.gicc(EOIR, 32)
        while (value := one.gicc(IAR)) != SPURIOUS:
            seen.append(value)
            one.gicc(EOIR, value)
            one.gicc(DIR, value & 0x3FF)
        assert [5, 1 << 10 | 5, 33, 34, 35, 36] == seen
    assert machine.user(CPU_REGS, APR) == copy.user(CPU_REGS, APR) == 0


@pytest.mark.parametrize(("field", "value"), [("version", 99), ("cpus", ())])
def test_a_state_of_another_kind_is_refused(field: str, value: Any) -> None:
    """Of another version, or for another number of vCPUs."""
    machine = Gicv2Machine()
    state = attrs.evolve(machine.vgic.state(), **{field: value})
    with pytest.raises(ValueError, match="GICv2 state" if field == "version" else "vCPUs"):
        type(machine.vgic).from_state(type(machine.vm)(1, host_gic=2), state)  # type: ignore[arg-type]
