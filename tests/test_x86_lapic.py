"""The local APIC: priorities, registers, modes, timer; random lives against a model of sets and loops.

Sections are those of the Intel SDM vol. 3, chapter 11 (APIC).
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from x86_machine import SVR_ON, Apics

from fabric.devices.x86.apic_bus import MODE_EXTINT, MODE_FIXED, MODE_NMI, MODE_SMI
from fabric.devices.x86.lapic import (
    APR,
    BASE_ENABLE,
    DFR,
    EOI,
    ESR,
    ICR,
    ICR2,
    ID,
    IRR,
    ISR,
    LDR,
    LVR,
    LVT0,
    LVT1,
    LVTERR,
    LVTPC,
    LVTT,
    LVTTHMR,
    MSR_BASE,
    PPR,
    SELF_IPI,
    SVR,
    SVR_DIRECTED_EOI,
    TDCR,
    TMCCT,
    TMICT,
    TMR,
    TPR,
    NotWritable,
)
from fabric.devices.x86.lapic_timer import MIN_PERIOD_NS, PERIODIC, TSC_DEADLINE

MASKED = 1 << 16
LVTS = (LVTT, LVTTHMR, LVTPC, LVT0, LVT1, LVTERR)


def one(**options: Any) -> Any:
    """A local APIC that is on."""
    return Apics([0], **options).apics[0]


def raise_(apic: Any, *vectors: int, trigger: int = 0) -> None:
    for vector in vectors:
        apic.accept(MODE_FIXED, vector, True, trigger)


# -- reset and modes


def test_registers_after_power_up() -> None:
    """11.4.7.1: LVTs masked, TPR 0, DFR all ones, SVR 0xff, LDR 0; version 0x14 with six LVT entries.

    LINT0 of the boot processor is an ExtINT, as KVM has it for firmware that does not set it up.
    """
    bsp, ap = Apics([0, 1], enabled=False).apics

    assert dict.fromkeys(LVTS, MASKED) == {entry: ap.read(entry) for entry in LVTS}
    assert (0, 0xFFFF_FFFF, 0xFF, 0, 0, 0) == tuple(ap.read(r) for r in (TPR, DFR, SVR, LDR, ICR, TMICT))
    assert 0x0005_0014 == ap.read(LVR)
    assert (0, 1 << 24) == (bsp.read(ID), ap.read(ID))
    assert 7 << 8 == bsp.read(LVT0)


def test_init_keeps_id_and_base() -> None:
    """11.4.7.3: after INIT all is as after power-up but the id and the APIC base."""
    apic = Apics([0, 1], x2apic=True).apics[1]
    raise_(apic, 0x41)
    apic.reset(init=True)

    assert apic.x2apic
    assert (1, 1 << 1, 0xFF, 0) == tuple(apic.read(r) for r in (ID, LDR, SVR, IRR + 0x20))
    assert {"local APIC reset": 1} == apic.ledger.statement().dropped


def test_ldr_follows_from_the_id_in_x2apic_mode() -> None:
    """11.12.10.2: cluster (id bits 19:4) in bits 31:16, 1 << id bits 3:0 below."""
    apics = Apics([0, 0x1F, 0x123], x2apic=True).apics

    assert [0x1, 0x1_8000, 0x12_0008] == [apic.read(LDR) for apic in apics]
    assert [0, 0x1F, 0x123] == [apic.read(ID) for apic in apics]


def test_an_apic_that_is_off_takes_nothing() -> None:
    """11.4.3: with bit 11 of the APIC base clear it is as if there was none."""
    apic = one()
    apic.set_base(apic.base & ~BASE_ENABLE)

    assert 0 == apic.accept(MODE_FIXED, 0x41, True, 0)
    assert not apic.line


def test_software_disabled() -> None:
    """11.4.7.2: takes no fixed interrupts, but NMI, SMI, INIT; masks all LVTs; what waits stays in IRR."""
    apic = one()
    apic.write(LVT1, 0x41)
    raise_(apic, 0x51)
    apic.write(SVR, 0xFF)

    assert 0 == apic.accept(MODE_FIXED, 0x61, True, 0)
    assert 1 == apic.accept(MODE_NMI, 0, True, 0)
    assert 1 == apic.accept(MODE_SMI, 0, True, 0)
    assert MASKED | 0x41 == apic.read(LVT1)
    assert 1 << 0x51 == apic.irr
    apic.write(LVT1, 0x41)
    assert MASKED | 0x41 == apic.read(LVT1)


# -- priorities


@pytest.mark.parametrize(("tpr", "taken"), [(0x00, True), (0x30, True), (0x3F, True), (0x40, False), (0xFF, False)])
def test_tpr(tpr: int, taken: bool) -> None:
    """11.8.3.1: an interrupt is taken when its class (bits 7:4) is above that of the processor priority."""
    apic = one()
    apic.write(TPR, tpr)
    raise_(apic, 0x41)

    assert taken == apic.line
    assert (0x41 if taken else None) == apic.take()


def test_the_highest_vector_first() -> None:
    """11.8.3: the vector is the priority; in service it holds back its own class and below."""
    apic = one()
    raise_(apic, 0x41, 0x62, 0x61)

    assert 0x62 == apic.take()
    assert apic.take() is None
    raise_(apic, 0x71)
    assert 0x71 == apic.take()
    apic.write(EOI, 0)
    assert not apic.line
    apic.write(EOI, 0)
    assert 0x61 == apic.take()
    apic.write(EOI, 0)
    assert 0x41 == apic.take()


@given(st.integers(0, 255), st.sets(st.integers(16, 255), max_size=3))
@settings(deadline=None, max_examples=60)
def test_ppr(tpr: int, vectors: set[int]) -> None:
    """11.8.3.1: PPR is TPR if its class is that of the highest in service or above, else that class and 0."""
    apic = one()
    for vector in sorted(vectors):
        raise_(apic, vector)
        apic.take()
    apic.write(TPR, tpr)
    served = max((v for v in range(256) if apic.isr >> v & 1), default=0)

    assert (tpr if tpr >> 4 >= served >> 4 else served & 0xF0) == apic.read(PPR)


def test_an_interrupt_in_service_can_wait_again() -> None:
    """11.8.4: two of a vector, one in IRR and one in ISR; a third merges."""
    apic = one()
    raise_(apic, 0x41)
    apic.take()
    raise_(apic, 0x41, 0x41)
    apic.write(EOI, 0)

    assert 0x41 == apic.take()
    assert (3, 2, 1) == (apic.ledger.raised, apic.ledger.delivered, apic.ledger.coalesced)


def test_after_the_last_eoi_tpr_counts() -> None:
    """11.8.3.1: with nothing in service the processor priority is the task priority."""
    apic = one()
    apic.write(TPR, 0x30)
    raise_(apic, 0x41)
    apic.take()
    raise_(apic, 0x21)
    apic.write(EOI, 0)

    assert 0x30 == apic.read(PPR)
    assert not apic.line


def test_eoi_without_an_interrupt() -> None:
    """Nothing is in service: nothing happens."""
    apic = one()
    apic.write(EOI, 0)

    assert 0 == apic.isr


def test_tmr_says_what_is_broadcast() -> None:
    """11.8.4 and 11.8.5: set by a level, clear by an edge; the end of a level is told to IOAPICs."""
    apic = one()
    told: list[Any] = []
    apic.bus.eoi_listeners.append(lambda vector, who, level: told.append((vector, level)))
    raise_(apic, 0x41, trigger=1)
    assert 1 << 1 == apic.read(TMR + 0x20)
    apic.take()
    apic.write(EOI, 0)
    raise_(apic, 0x41)
    apic.take()
    apic.write(EOI, 0)

    assert [(0x41, True), (0x41, False)] == told


def test_directed_eoi() -> None:
    """11.8.5: with SVR bit 12 the end of a level is not broadcast; the bit is there when the version says so."""
    machine = Apics([0], enabled=False)
    apic = machine.apics[0]
    apic.write(SVR, SVR_ON | SVR_DIRECTED_EOI)
    assert SVR_ON == apic.read(SVR)
    machine.bus.directed_eoi = True
    apic.version_changed()
    apic.write(SVR, SVR_ON | SVR_DIRECTED_EOI)
    told: list[Any] = []
    machine.bus.eoi_listeners.append(lambda vector, who, level: told.append((vector, level)))
    raise_(apic, 0x41, trigger=1)
    apic.take()
    apic.write(EOI, 0)

    assert SVR_ON | SVR_DIRECTED_EOI == apic.read(SVR)
    assert 1 << 24 | 0x0005_0014 == apic.read(LVR)
    assert [(0x41, False)] == told


def test_extint_comes_first() -> None:
    """The 8259 pair is read through LINT0 in ExtINT mode, and not when that is masked or something else."""
    machine = Apics([0])
    apic = machine.apics[0]
    apic.take_extint = lambda: 0x20
    apic.write(LVT0, MODE_EXTINT << 8)
    raise_(apic, 0xF1)
    machine.bus.set_extint(True)

    assert 0x20 == apic.take()
    apic.write(LVT0, MODE_EXTINT << 8 | MASKED)
    assert 0xF1 == apic.take()


# -- registers


WRITABLE = {
    ID: 0xFF00_0000,
    TPR: 0xFF,
    LDR: 0xFF00_0000,
    SVR: 0x3FF,
    LVTTHMR: 0x0001_17FF,
    LVTPC: 0x0001_17FF,
    LVT0: 0x0001_F7FF,
    LVT1: 0x0001_F7FF,
    LVTERR: 0x0001_10FF,
    LVTT: 0x0003_10FF,
    ICR2: 0xFF00_0000,
    TDCR: 0xB,
    TMICT: 0xFFFF_FFFF,
}
"""The bits that a guest can write in xAPIC mode, with the timer's periodic mode."""


@pytest.mark.parametrize("register", list(WRITABLE), ids=hex)
@given(value=st.integers(0, 0xFFFF_FFFF))
@settings(deadline=None, max_examples=20)
def test_writable_bits(register: int, value: int) -> None:
    """Table 11-1 and the figures of each register: reserved and read-only bits are 0."""
    apic = one()
    apic.write(register, value)
    masked = MASKED if register in LVTS and not apic.sw_enabled else 0

    assert value & WRITABLE[register] | masked == apic.read(register)


@given(value=st.integers(0, 0xFFFF_FFFF))
@settings(deadline=None, max_examples=20)
def test_dfr(value: int) -> None:
    """11.6.2.2: only the model in bits 31:28 can be written, the rest are ones."""
    apic = one()
    apic.write(DFR, value)

    assert value | 0x0FFF_FFFF == apic.read(DFR)


@pytest.mark.parametrize("register", [LVR, PPR, APR, TMCCT, *range(ISR, ESR, 0x10)], ids=hex)
def test_read_only(register: int) -> None:
    """A write is ignored through the page."""
    apic = one()
    before = apic.read(register)
    apic.mmio_write(register, 4, 0xFFFF_FFFF, None)

    assert before == apic.read(register)
    with pytest.raises(NotWritable):
        apic.write(register, 1)


def test_page_accesses() -> None:
    """11.4.1: registers are 32 bits at multiples of 16; parts are read, only whole ones are written."""
    apic = one()
    apic.mmio_write(LVT1, 4, 0xF7AB, None)
    apic.mmio_write(LVT1, 2, 0, None)
    apic.mmio_write(LVT1 + 4, 4, 0, None)

    assert (0xF7AB, 0xAB, 0xF7) == tuple(
        apic.mmio_read(at, size, None) for at, size in ((LVT1, 4), (LVT1, 1), (LVT1 + 1, 1))
    )
    assert (0, 0) == (apic.mmio_read(LVT1 + 2, 4, None), apic.mmio_read(EOI, 4, None))


def test_x2apic_msrs_need_the_mode() -> None:
    """11.12.1.2: RDMSR and WRMSR of 0x800 to 0x8ff in xAPIC mode are #GP."""
    apic = one()

    with pytest.raises(KeyError):
        apic.msr_read(MSR_BASE + (TPR >> 4))
    with pytest.raises(NotWritable):
        apic.msr_write(MSR_BASE + (TPR >> 4), 0)


@pytest.mark.parametrize("register", [ID, LDR, LVR, PPR, TMCCT, DFR, ICR2, ISR], ids=hex)
def test_x2apic_writes_that_fault(register: int) -> None:
    """Table 11-6: read-only registers, and those that are not there in x2APIC mode, are #GP."""
    apic = one(x2apic=True)

    with pytest.raises(NotWritable):
        apic.msr_write(MSR_BASE + (register >> 4), 0)


@pytest.mark.parametrize("register", [EOI, SELF_IPI, DFR, ICR2, APR, 0xC0, 0x3F0], ids=hex)
def test_x2apic_reads_that_fault(register: int) -> None:
    """Table 11-6: write-only registers, and those that are not there, are #GP."""
    apic = one(x2apic=True)

    with pytest.raises(KeyError):
        apic.msr_read(MSR_BASE + (register >> 4))


@pytest.mark.parametrize(
    ("register", "value"),
    [(TPR, 1 << 32), (ESR, 1), (ICR, 1 << 13), (ICR, 3 << 16), (ICR, 1 << 20), (SELF_IPI, 0x100)],
)
def test_x2apic_reserved_bits_fault(register: int, value: int) -> None:
    """11.12.1.3: WRMSR with a reserved bit is #GP; ESR takes 0 only."""
    apic = one(x2apic=True)

    with pytest.raises(NotWritable):
        apic.msr_write(MSR_BASE + (register >> 4), value)


def test_x2apic_icr_is_64_bits() -> None:
    """11.12.9: one MSR, with the destination in bits 63:32; delivery status is not there."""
    machine = Apics([0, 1], x2apic=True)
    first, second = machine.apics
    first.msr_write(0x830, 1 << 32 | 1 << 12 | 0x41)

    assert 1 << 32 | 0x41 == first.msr_read(0x830)
    assert 1 << 0x41 == second.irr


def test_icr_of_xapic_mode() -> None:
    """11.6.1: writing the low half sends, to the destination in bits 31:24 of the high one."""
    machine = Apics([0, 1])
    first, second = machine.apics
    first.write(ICR2, 1 << 24)
    assert 0 == second.irr
    first.write(ICR, 1 << 12 | 0x41)

    assert 1 << 0x41 == second.irr
    assert 0x41 == first.read(ICR)


def test_self_ipi() -> None:
    """11.12.11: x2APIC mode only; an edge to itself."""
    apic = one(x2apic=True)
    apic.msr_write(MSR_BASE + (SELF_IPI >> 4), 0x41)

    assert 1 << 0x41 == apic.irr
    xapic = one()
    xapic.mmio_write(SELF_IPI, 4, 0x41, None)
    assert 0 == xapic.irr


@pytest.mark.parametrize(
    ("mode", "got"), [(2, ["SMI"]), (4, ["NMI"]), (5, ["INIT"]), (6, [("SIPI", 0x41)]), (3, ["unhalt"])]
)
def test_other_delivery_modes(mode: int, got: list[Any]) -> None:
    """11.6.1: SMI, NMI, INIT and start-up go to the CPU, not to IRR."""
    machine = Apics([0, 1])
    machine.apics[0].write(ICR2, 1 << 24)
    machine.apics[0].write(ICR, mode << 8 | 1 << 14 | 0x41)

    assert got == machine.vm.vcpus[1].received
    assert 0 == machine.apics[1].irr


def test_init_level_deassert() -> None:
    """11.6.1: INIT with level 0 and trigger mode level does nothing (it is for old processors)."""
    machine = Apics([0, 1])
    machine.apics[0].write(ICR2, 1 << 24)
    machine.apics[0].write(ICR, 5 << 8 | 1 << 15)

    assert [] == machine.vm.vcpus[1].received


# -- the timer


@pytest.mark.parametrize(("code", "divider"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)])
def test_divider(code: int, divider: int) -> None:
    """11.5.4, figure 11-10."""
    machine = Apics([0])
    apic = machine.apics[0]
    apic.write(LVTT, 0x41)
    apic.write(TDCR, code)
    apic.write(TMICT, 1000)
    machine.clock.advance(100 * divider)
    assert 900 == apic.read(TMCCT)
    machine.clock.advance(900 * divider - 1)
    assert 0 == apic.irr
    machine.clock.advance(1)

    assert 1 << 0x41 == apic.irr
    assert 0 == apic.read(TMCCT)


def test_one_shot() -> None:
    """It counts down once; a write of the initial count starts anew, 0 stops."""
    machine = Apics([0])
    apic = machine.apics[0]
    apic.write(TDCR, 11)
    apic.write(LVTT, 0x41)
    apic.write(TMICT, 1000)
    machine.clock.advance(999)
    apic.write(TMICT, 1000)
    machine.clock.advance(999)
    apic.write(TMICT, 0)
    machine.clock.advance(10_000)
    assert 0 == apic.irr
    apic.write(TMICT, 1000)
    machine.clock.advance(10_000)

    assert (1, 0) == (apic.ledger.raised, apic.ledger.coalesced)


def test_periodic() -> None:
    """It reloads itself."""
    machine = Apics([0])
    apic = machine.apics[0]
    apic.write(TDCR, 11)
    apic.write(LVTT, 0x41 | PERIODIC)
    apic.write(TMICT, 1_000_000)
    machine.clock.advance(3_500_000)

    assert 3 == apic.ledger.raised
    assert 500_000 == apic.read(TMCCT)


def test_too_short_a_period_is_stretched() -> None:
    """KVM's periodic timers have at least 200 us."""
    machine = Apics([0])
    apic = machine.apics[0]
    apic.write(TDCR, 11)
    apic.write(LVTT, 0x41 | PERIODIC)
    apic.write(TMICT, 10)
    machine.clock.advance(10 * MIN_PERIOD_NS)

    assert 10 == apic.ledger.raised


def test_a_masked_timer_counts_on() -> None:
    """11.5.1: mask bit 16 inhibits the interrupt, not the count."""
    machine = Apics([0])
    apic = machine.apics[0]
    apic.write(TDCR, 11)
    apic.write(LVTT, 0x41 | MASKED)
    apic.write(TMICT, 1000)
    machine.clock.advance(400)
    assert 600 == apic.read(TMCCT)
    machine.clock.advance(1000)

    assert 0 == apic.irr


def test_a_new_divider_changes_what_is_left() -> None:
    """What is left to count goes on at the new rate."""
    machine = Apics([0])
    apic = machine.apics[0]
    apic.write(TDCR, 11)
    apic.write(LVTT, 0x41)
    apic.write(TMICT, 1000)
    machine.clock.advance(500)
    apic.write(TDCR, 0)
    assert 500 == apic.read(TMCCT)
    machine.clock.advance(999)
    assert 0 == apic.irr
    machine.clock.advance(1)

    assert 1 << 0x41 == apic.irr


def test_bus_cycle() -> None:
    """KVM_CAP_X86_APIC_BUS_CYCLES_NS: how long a bus cycle is."""
    machine = Apics([0])
    machine.bus.cycle_ns = 40
    apic = machine.apics[0]
    apic.write(TDCR, 11)
    apic.write(LVTT, 0x41)
    apic.write(TMICT, 1000)
    machine.clock.advance(4000)

    assert 900 == apic.read(TMCCT)


def test_tsc_deadline() -> None:
    """11.5.4.1: fires when the TSC gets there and disarms; initial count is ignored, current count 0."""
    machine = Apics([0])
    apic = machine.apics[0]
    apic.timer.offer_tsc_deadline(True)
    apic.write(LVTT, 0x41 | TSC_DEADLINE)
    apic.write(TMICT, 10)
    machine.clock.advance(100)
    apic.timer.set_tsc_deadline(1000)
    assert (0, 0) == (apic.read(TMCCT), apic.read(TMICT))
    machine.clock.advance(899)
    assert (0, 1000) == (apic.irr, apic.timer.tsc_deadline)
    machine.clock.advance(1)

    assert (1 << 0x41, 0) == (apic.irr, apic.timer.tsc_deadline)


def test_tsc_deadline_0_disarms() -> None:
    """Writing 0 disarms, a time that has passed fires at once."""
    machine = Apics([0])
    apic = machine.apics[0]
    apic.timer.offer_tsc_deadline(True)
    apic.write(LVTT, 0x41 | TSC_DEADLINE)
    apic.timer.set_tsc_deadline(1000)
    apic.timer.set_tsc_deadline(0)
    machine.clock.advance(5000)
    assert 0 == apic.irr
    apic.timer.set_tsc_deadline(1)
    machine.clock.advance(0)

    assert 1 << 0x41 == apic.irr


def test_deadline_mode_must_be_offered() -> None:
    """Without CPUID.01H:ECX[24] bit 18 of LVTT is reserved, and the MSR ignored."""
    machine = Apics([0])
    apic = machine.apics[0]
    apic.write(LVTT, 0x41 | TSC_DEADLINE)
    apic.timer.set_tsc_deadline(1)
    machine.clock.advance(10)

    assert 0x41 == apic.read(LVTT)
    assert 0 == apic.irr


@pytest.mark.parametrize("to_deadline", [True, False])
def test_a_change_to_or_from_deadline_mode_disarms(to_deadline: bool) -> None:
    """11.5.4.1: switching between TSC-deadline and the other modes disarms the timer."""
    machine = Apics([0])
    apic = machine.apics[0]
    apic.timer.offer_tsc_deadline(True)
    modes = [0, TSC_DEADLINE] if to_deadline else [TSC_DEADLINE, 0]
    apic.write(LVTT, 0x41 | modes[0])
    apic.write(TMICT, 1000)
    apic.timer.set_tsc_deadline(1000)
    apic.write(LVTT, 0x41 | modes[1])
    machine.clock.advance(10_000)

    assert 0 == apic.irr


@pytest.mark.parametrize("mode", [0, PERIODIC])
def test_a_restored_timer_goes_on(mode: int) -> None:
    """The current count of the page is what is left."""
    machine, other = Apics([0]), Apics([0])
    apic = machine.apics[0]
    apic.write(TDCR, 11)
    apic.write(LVTT, 0x41 | mode)
    apic.write(TMICT, 1_000_000)
    machine.clock.advance(400_000)
    other.apics[0].set_state(apic.state())
    other.clock.advance(599_999)
    assert 0 == other.apics[0].irr
    other.clock.advance(1)

    assert 1 << 0x41 == other.apics[0].irr


def test_a_restored_periodic_timer_without_a_count() -> None:
    """A current count of 0 is a whole period to go."""
    machine = Apics([0])
    apic = machine.apics[0]
    page = bytearray(apic.state())
    page[TDCR : TDCR + 4] = (11).to_bytes(4, "little")
    page[LVTT : LVTT + 4] = (0x41 | PERIODIC).to_bytes(4, "little")
    page[TMICT : TMICT + 4] = (1_000_000).to_bytes(4, "little")
    apic.set_state(bytes(page))
    machine.clock.advance(999_999)
    assert 0 == apic.irr
    machine.clock.advance(1)

    assert 1 << 0x41 == apic.irr


# -- against a model ----------------------------------------------------------------------------------------

SOME_VECTORS = st.sampled_from([0x10, 0x31, 0x32, 0x3F, 0x41, 0x80, 0xEF, 0xFE, 0xFF])


class LapicMachine(RuleBasedStateMachine):
    """The model: what waits and what is served are sorted lists, the priority is found by a loop."""

    @initialize(x2apic=st.booleans())
    def start(self, x2apic: bool) -> None:
        self.machine = Apics([0, 1], x2apic=x2apic)
        self.apic = self.machine.apics[1]
        self.x2apic = x2apic
        self.told: list[Any] = []
        self.machine.bus.eoi_listeners.append(lambda vector, who, level: self.told.append((vector, level)))
        self.waits: list[int] = []
        self.served: list[int] = []
        self.levels: list[int] = []
        self.tpr = 0
        self.on = True
        self.ends: list[Any] = []
        self.account = {"raised": 0, "delivered": 0, "coalesced": 0}
        self.lvts = {LVT1: (0, True), LVTERR: (0, True)}

    def accepts(self, vector: int, level: bool) -> bool:
        if not self.on:
            return False
        self.account["raised"] += 1
        if vector in self.levels:
            self.levels.remove(vector)
        if level:
            self.levels.append(vector)
        if vector in self.waits:
            self.account["coalesced"] += 1
        else:
            self.waits.append(vector)
        return True

    @property
    def priority(self) -> int:
        highest = 0
        for vector in self.served:
            highest = max(highest, vector)
        return self.tpr if self.tpr // 16 >= highest // 16 else highest // 16 * 16

    def next(self) -> int | None:
        for vector in sorted(self.waits, reverse=True):
            return vector if vector // 16 > self.priority // 16 else None
        return None

    @rule(vector=SOME_VECTORS, level=st.booleans())
    def message(self, vector: int, level: bool) -> None:
        assert int(self.accepts(vector, level)) == self.apic.accept(MODE_FIXED, vector, True, int(level))

    @rule(vector=SOME_VECTORS, shorthand=st.integers(0, 3), sender=st.integers(0, 1))
    def ipi(self, vector: int, shorthand: int, sender: int) -> None:
        """To id 1, to self, to all, to all others."""
        reached = {0: True, 1: sender == 1, 2: True, 3: sender == 0}[shorthand]
        other = {0: False, 1: sender == 0, 2: True, 3: sender == 1}[shorthand]
        if other:
            first = self.machine.apics[0]
            self.account["raised"] += 1
            self.account["coalesced"] += first.irr >> vector & 1
        if reached and not self.accepts(vector, False) and not other:
            self.account["raised"] += 1  # and lost
        source = self.machine.apics[sender]
        if self.x2apic:
            source.msr_write(0x830, 1 << 32 | shorthand << 18 | vector)
        else:
            source.write(ICR2, 1 << 24)
            source.write(ICR, shorthand << 18 | vector)

    @rule(entry=st.sampled_from([LVT1, LVTERR]), vector=SOME_VECTORS, masked=st.booleans())
    def set_lvt(self, entry: int, vector: int, masked: bool) -> None:
        self.lvts[entry] = vector, masked or not self.on
        self.apic.write(entry, vector | MASKED * masked)

    @rule(entry=st.sampled_from([LVT1, LVTERR]))
    def local(self, entry: int) -> None:
        vector, masked = self.lvts[entry]

        assert (not masked and self.accepts(vector, False)) == self.apic.deliver_local(entry)

    @rule()
    def take(self) -> None:
        vector = self.next()
        if vector is not None:
            self.waits.remove(vector)
            self.served.append(vector)
            self.account["delivered"] += 1

        assert vector == self.apic.take()

    @rule()
    def eoi(self) -> None:
        if self.served:
            vector = sorted(self.served)[-1]
            self.served.remove(vector)
            self.ends.append((vector, vector in self.levels))
        self.apic.write(EOI, 0)

    @rule(tpr=st.one_of(st.integers(0, 0x4F), st.integers(0, 0xFF)))
    def set_tpr(self, tpr: int) -> None:
        self.tpr = tpr
        self.apic.write(TPR, tpr)

    @rule(on=st.booleans())
    def switch(self, on: bool) -> None:
        self.on = on
        if not on:
            self.lvts = {entry: (vector, True) for entry, (vector, _) in self.lvts.items()}
        self.apic.write(SVR, 0xFF | on << 8)

    @rule()
    def migrate(self) -> None:
        self.apic.set_state(self.apic.state())

    @rule()
    def init(self) -> None:
        self.apic.reset(init=True)
        self.waits, self.served, self.levels, self.tpr, self.on = [], [], [], 0, False
        self.lvts = {LVT1: (0, True), LVTERR: (0, True)}

    @invariant()
    def same(self) -> None:
        apic = self.apic
        for bits, vectors in ((apic.irr, self.waits), (apic.isr, self.served), (apic.tmr, self.levels)):
            assert sorted(vectors) == [v for v in range(256) if bits >> v & 1]
        assert (self.next() is not None) == apic.line
        assert self.priority == apic.read(PPR)
        assert self.ends == self.told
        ledger = apic.ledger
        assert self.account == {name: getattr(ledger, name) for name in self.account}
        self.machine.check()


LapicMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstModel = LapicMachine.TestCase
