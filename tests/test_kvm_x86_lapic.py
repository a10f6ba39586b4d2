"""KVM_GET_LAPIC, KVM_SET_LAPIC and the id's two formats."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from x86_machine import Pc, outcome

from fabric.devices.x86.lapic import (
    DFR,
    ESR,
    ICR,
    ICR2,
    ID,
    IRR,
    ISR,
    LDR,
    LVR,
    LVT0,
    LVTT,
    PPR,
    SVR,
    TMCCT,
    TMICT,
    TMR,
    TPR,
)
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

WIDE_IDS = 1
OFF, XAPIC, X2APIC = 0xFEE0_0000, 0xFEE0_0800, 0xFEE0_0C00


@pytest.mark.spec("api.get-lapic", "api.set-lapic")
def test_state_goes_round() -> None:
    """What was written is read: registers, IRR, ISR, TMR."""
    pc = Pc(2)
    words = {
        LDR: 1 << 24,
        DFR: 0xFFFF_FFFF,
        TPR: 0x20,
        LVT0: 0x1_0041,
        ICR2: 1 << 24,
        IRR + 0x20: 2,
        ISR + 0x30: 4,
        TMR + 0x30: 4,
    }
    pc.set_lapic(words, 1)

    assert words == {offset: pc.word(offset, 1) for offset in words}
    pc.check()


@pytest.mark.spec("api.set-lapic")
def test_what_is_restored_is_taken() -> None:
    """Vectors in IRR wait; the priority follows from TPR and ISR."""
    pc = Pc()
    pc.set_lapic({IRR + 0x20: 2 | 1 << 31, ISR + 0x20: 1 << 30})

    assert not pc.apic().line
    pc.set_lapic({ISR + 0x20: 0})
    assert [0x5F, None] == [pc.apic().take(), pc.apic().take()]
    pc.check()


def test_the_version_is_the_hosts() -> None:
    """KVM_SET_LAPIC does not change it."""
    pc = Pc()
    pc.set_lapic({LVR: 0xFFFF_FFFF})

    assert 0x0005_0014 == pc.word(LVR)


@given(st.binary(min_size=1024, max_size=1024))
@settings(deadline=None, max_examples=40)
def test_any_state_is_taken(page: bytes) -> None:
    """A VMM's buffer may hold anything: it is taken, comes back where it is stored, and the account balances."""
    pc = Pc(2)
    pc.vcpus[1].ioctl(requests.KVM_SET_LAPIC, bytearray(page))
    found = pc.lapic(1)
    stored = (ID, LDR, ICR, ICR2, *range(ISR, ESR, 0x10), ESR, TMICT)

    assert [page[at : at + 4] for at in stored] == [bytes(found[at : at + 4]) for at in stored]
    pc.inside.ledger.check()
    again = pc.lapic(1)
    pc.vcpus[1].ioctl(requests.KVM_SET_LAPIC, bytearray(again))
    ours = [at for at in range(0, 1024, 4) if at not in (PPR, TMCCT, LVTT)]
    assert [again[at : at + 4] for at in ours] == [pc.lapic(1)[at : at + 4] for at in ours]


@pytest.mark.spec("api.get-lapic.rule.format-32", "api.set-lapic.rule.format", "api.cap.x2apic-api.rule.affects")
def test_ids_of_32_bits() -> None:
    """With KVM_X2APIC_API_USE_32BIT_IDS the id is in full in x2APIC mode, and in bits 31:24 in xAPIC mode."""
    pc = Pc([0, 5, 0x105], x2apic_api=WIDE_IDS)
    pc.to_x2apic(1)
    pc.to_x2apic(2)

    assert [0, 5, 0x105] == [pc.word(ID, n) for n in range(3)]
    for n in range(3):
        pc.set_lapic({SVR: 0x1FF}, n)
    assert [0, 5, 0x105] == [pc.word(ID, n) for n in range(3)]
    pc.set_msr(0x1B, OFF, 1)
    pc.set_msr(0x1B, XAPIC, 1)
    assert 5 << 24 == pc.word(ID, 1)


@pytest.mark.spec("api.get-lapic.rule.format-old")
def test_ids_of_8_bits() -> None:
    """Without the feature the id is in bits 31:24 in either mode."""
    pc = Pc([0, 5])
    assert 5 << 24 == pc.word(ID, 1)
    pc.to_x2apic(1)

    assert 5 << 24 == pc.word(ID, 1)


@pytest.mark.spec("api.set-lapic.rule.old-format-x2apic")
@pytest.mark.parametrize("given_id", [5 << 24, 7 << 24, 5, 0xFFFF_FFFF])
def test_the_old_format_is_not_checked(given_id: int) -> None:
    """In x2APIC mode any id is taken; the vCPU keeps its own (Linux 6.18), and the LDR follows from that."""
    pc = Pc([0, 5])
    pc.to_x2apic(1)
    pc.set_lapic({ID: given_id, LDR: 0xAAAA}, 1)

    assert (5 << 24, 1 << 5) == (pc.word(ID, 1), pc.word(LDR, 1))


@pytest.mark.spec("api.set-lapic.EINVAL.id", "api.get-lapic.EINVAL.id")
@pytest.mark.parametrize("given_id", [0x104, 5 << 24, 0, 0x105 << 24 & 0xFFFF_FFFF])
def test_another_id_is_refused(given_id: int) -> None:
    """x2APIC mode with 32-bit ids: EINVAL, nothing is changed; so that KVM_GET_LAPIC never finds another one."""
    pc = Pc([0, 0x105], x2apic_api=WIDE_IDS)
    pc.to_x2apic(1)

    assert "EINVAL" == outcome(pc.set_lapic, {ID: given_id, TPR: 0x50}, 1)
    assert (0x105, 0) == (pc.word(ID, 1), pc.word(TPR, 1))


def test_an_xapic_id_can_be_any() -> None:
    """In xAPIC mode it is a register as any other, and what destinations are compared with."""
    pc = Pc(2)
    pc.set_lapic({ID: 9 << 24}, 1)

    assert 9 << 24 == pc.word(ID, 1)
    assert 1 == pc.vm.signal_msi(0xFEE0_9000, 0x41)


@pytest.mark.spec(
    "api.get-lapic.rule.after-apicbase",
    "api.seq.lapic-restore",
    "api.seq.lapic-restore.1-apicbase",
    "api.seq.lapic-restore.2-lapic",
)
def test_restoring_a_local_apic() -> None:
    """MSR_IA32_APICBASE first: it fixes the format of the id. The other way round the id is that of another mode."""
    source = Pc([0, 0x105], x2apic_api=WIDE_IDS)
    source.to_x2apic(1)
    source.set_lapic({SVR: 0x1FF, IRR + 0x20: 2}, 1)
    page = source.lapic(1)

    target = Pc([0, 0x105], x2apic_api=WIDE_IDS, enabled=False)
    target.to_x2apic(1)
    target.vcpus[1].ioctl(requests.KVM_SET_LAPIC, bytearray(page))
    assert page == target.lapic(1)
    assert [0x41] == target.pending(1)

    wrong = Pc([0, 0x105], x2apic_api=WIDE_IDS, enabled=False)
    wrong.vcpus[1].ioctl(requests.KVM_SET_LAPIC, bytearray(page))
    assert 0x105 == wrong.word(ID, 1)  # which is xAPIC id 0
    assert 0 == wrong.apic(1).xapic_id


@pytest.mark.spec(
    "api.get-lapic.EINVAL.no-lapic",
    "api.set-lapic.EINVAL.no-lapic",
    "api.get-lapic.EFAULT.user-ptr",
    "api.set-lapic.EFAULT.user-ptr",
)
def test_errors() -> None:
    """EINVAL without local APICs in the kernel, whatever the pointer; EFAULT for a bad one, or a short buffer."""
    pc, none = Pc(), Pc(irqchip="")

    for request in (requests.KVM_GET_LAPIC, requests.KVM_SET_LAPIC):
        assert "EINVAL" == outcome(none.vcpus[0].ioctl, request, 0x10)
        assert "EFAULT" == outcome(pc.vcpus[0].ioctl, request, 0x10)
        assert "EFAULT" == outcome(pc.vcpus[0].ioctl, request, bytearray(1023))


def test_replaced_interrupts_are_accounted_for() -> None:
    """What waited and is not in the new state is dropped, what is new was raised."""
    pc = Pc()
    pc.vm.signal_msi(0xFEE0_0000, 0x41)
    pc.set_lapic({IRR + 0x20: 4})

    statement = pc.inside.ledger.statement()
    assert (2, 1, {"local APIC state replaced": 1}) == (statement.raised, statement.pending, statement.dropped)
    pc.check()


@pytest.mark.parametrize(
    ("base", "taken"),
    [(XAPIC, True), (X2APIC, True), (OFF, True), (0xFEE0_0400, False), (XAPIC | 2, False), (1 << 60, False)],
)
def test_apic_base(base: int, taken: bool) -> None:
    """x2APIC without enable and reserved bits are refused (SDM vol. 3, 11.12.5)."""
    pc = Pc(2)

    assert taken == pc.set_msr(0x1B, base, 1)


@pytest.mark.parametrize(("cycle", "expected"), [(0, "EINVAL"), (1, 0), (25, 0), (1 << 40, "EINVAL")])
def test_bus_cycles(cycle: int, expected: int | str) -> None:
    """KVM_CAP_X86_APIC_BUS_CYCLES_NS: before vCPUs, with local APICs, and such that no period overflows."""
    pc, late, none = Pc(0), Pc(1), Pc(0, irqchip="")

    assert expected == outcome(pc.enable, uapi.KVM_CAP_X86_APIC_BUS_CYCLES_NS, cycle)
    if not expected:
        assert "EINVAL" == outcome(late.enable, uapi.KVM_CAP_X86_APIC_BUS_CYCLES_NS, cycle)
        assert "ENXIO" == outcome(none.enable, uapi.KVM_CAP_X86_APIC_BUS_CYCLES_NS, cycle)
