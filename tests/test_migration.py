"""A machine that is saved and restored goes on as one that never was: the same events at the same times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from migration_guests import PPI_VTIMER
from migration_world import CONFIG, PENDING, RAM, Outcome, Plan, run

from fabric.clock import Priority
from fabric.migration import Saved
from fabric.migration.arm64_state import Gicv2State, Gicv3State
from fabric.uapi import kvm as uapi

PRIORITIES = list(Priority)
costs = st.sampled_from((0, 0, 250))

plans = st.builds(
    Plan,
    seed=st.integers(0, 1 << 32),
    gic=st.sampled_from((3, 3, 2)),
    vcpus=st.integers(1, 4),
    split=st.tuples(*[st.booleans()] * 4),
    interrupts=st.integers(0, 120),
    pmu=st.booleans(),
    exit_ns=costs,
    wakeup_ns=costs,
    injection_ns=costs,
    eoi_ns=costs,
)
moments = st.tuples(
    st.booleans(),
    st.integers(0, 149_000),
    st.sampled_from((-1, 0, 1)),
    st.sampled_from(PRIORITIES),
    st.sampled_from(("EINTR", "cancel")),
)
"""Anywhere, or within a nanosecond of something that happens; when within the nanosecond; how the vCPUs are stopped."""


def cut(reference: Outcome, drawn: list[tuple[bool, int, int, Priority, str]]) -> list[tuple[int, Priority, str]]:
    """The moments of a run at which it is cut."""
    times = [at for at, *_ in reference.log] or [0]
    return sorted(
        (max(1, times[number % len(times)] + offset) if near else number + 1, priority, how)
        for near, number, offset, priority, how in drawn
    )


def assert_same(reference: Outcome, outcome: Outcome) -> None:
    """For each vCPU the same records in the same order, and one account."""
    for cpu in range(-1, 4):
        assert reference.of(cpu) == outcome.of(cpu)
    assert reference.statement == outcome.statement
    assert outcome.statement.balanced


@pytest.mark.spec("vgic-v3.seq.restore", "vgic-v3.seq.save", "its.seq.restore", "its.seq.save", "vgic-v2.seq.restore")
@settings(deadline=None, max_examples=60)
@given(plan=plans, drawn=st.lists(moments, min_size=1, max_size=3))
def test_a_restored_machine_goes_on_as_one_never_interrupted(
    plan: Plan, drawn: list[tuple[bool, int, int, Priority, str]]
) -> None:
    """Whatever its guests are in, whatever is pending and active, however often and however it is cut."""
    reference = run(plan)
    assume(not reference.ties())

    assert_same(reference, run(plan, cut(reference, drawn)))


@pytest.mark.soak
@settings(deadline=None, max_examples=3_000)
@given(plan=plans, drawn=st.lists(moments, min_size=1, max_size=3))
def test_a_restored_machine_goes_on_for_long(plan: Plan, drawn: list[tuple[bool, int, int, Priority, str]]) -> None:
    """The same, more often."""
    reference = run(plan)
    assume(not reference.ties())

    assert_same(reference, run(plan, cut(reference, drawn)))


@pytest.mark.parametrize("gic", [2, 3])
def test_a_machine_may_be_cut_everywhere(gic: int) -> None:
    """At every event of a run, just before it and just after, at all priorities in turn: dozens of VMs."""
    plan = Plan(7, gic=gic, vcpus=2, end_ns=20_000, interrupts=12)
    reference = run(plan)
    times = sorted({at for at, *_ in reference.log if at})
    cuts = [
        (at + offset, PRIORITIES[number % len(PRIORITIES)], ("EINTR", "cancel")[number % 2])
        for number, at in enumerate(times)
        for offset in (-1, 0)
    ]

    assert not reference.ties()
    assert len(cuts) > 60
    assert_same(reference, run(plan, cuts))


# What there is at the cuts: the tests above would show nothing if all were quiet then.


def bits(registers: tuple[tuple[int, int], ...], offset: int, first: int = 0) -> Iterator[int]:
    """INTIDs whose bit is set in the registers of an array."""
    for number, value in registers:
        if offset <= number < offset + 0x80:
            yield from (first + (number - offset) * 8 + n for n in range(32) if value >> n & 1)


def kind(intid: int) -> str:
    """What an INTID is."""
    return "SGI" if intid < 16 else "timer" if intid == PPI_VTIMER else "SPI" if intid >= 32 else "PPI"


def found_in(saved: Saved) -> set[str]:
    """What a saved machine is in the middle of."""
    state = saved.state
    found = {f"{kind(intid)} line" for intid in state.lines}
    gic = state.gic
    if isinstance(gic, Gicv3State):
        banks = [cpu.registers for cpu in gic.cpus]
        base = 0x1_0000
        lines = [*gic.lines, *(cpu.lines >> PPI_VTIMER & 1 for cpu in gic.cpus)]
        found |= {"SPI line"} if any(gic.lines) else set()
        found |= {"timer line"} if any(lines[len(gic.lines) :]) else set()
        found |= {"active priority"} if any(dict(cpu.sysregs)[0xC648] for cpu in gic.cpus) else set()
        pages = dict(state.slots[0].pages)
        for cpu in range(len(state.vcpus)):
            page = pages.get(PENDING + 0x1_0000 * cpu - RAM, bytes(4096))
            found |= {"LPI pending"} if any(page[8192 // 8 :]) else set()
        assert CONFIG - RAM in pages
    else:
        assert isinstance(gic, Gicv2State)
        banks, base = list(gic.banked), 0
        found |= {"active priority"} if any(dict(one)[0xD0] for one in gic.interfaces) else set()
        found |= {"SGI pending"} if any(value for bank in banks for at, value in bank if at >= 0xF20) else set()
    for registers in (gic.registers, *banks):
        at = 0 if registers is gic.registers else base
        found |= {f"{kind(intid)} pending" for intid in bits(registers, at + 0x200)}
        found |= {f"{kind(intid)} active" for intid in bits(registers, at + 0x300)}
    for vcpu, guest in zip(state.vcpus, saved.guests, strict=True):
        assert guest is not None
        if vcpu.mp_state == uapi.KVM_MP_STATE_STOPPED:
            found.add("powered off")
        if guest.begun:
            names = frames(guest.coroutine)
            found |= {name for name in ("compute", "wait_for_interrupt", "_leave", "handle") if name in names}
            found |= {"completed"} if guest.result is not None else set()
    return found


def frames(coroutine: object) -> list[str]:
    """Names of the functions that a suspended program is in."""
    names = []
    while coroutine is not None:
        code = getattr(coroutine, "cr_code", None) or getattr(coroutine, "gi_code", None)
        names.append("" if code is None else code.co_name)
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    return names


IN_EVERY = {
    "SPI pending", "SPI active", "SPI line", "SGI pending", "SGI active", "timer pending", "timer active",
    "active priority", "powered off", "compute", "wait_for_interrupt", "handle", "_leave", "completed",
}  # fmt: skip
EXPECTED = {
    3: IN_EVERY - {"timer pending"} | {"LPI pending", "timer line"},  # the timer of a GICv3 is a line, not a latch
    2: IN_EVERY,
}


@pytest.mark.parametrize("gic", [2, 3])
def test_everything_is_under_way_at_some_cut(gic: int) -> None:
    """LPIs, SPIs, SGIs and timers pending and active, lines up, vCPUs off, halted, computing, handling, in exits."""
    found: set[str] = set()
    for seed in range(2):
        plan = Plan(seed, gic=gic, vcpus=4, interrupts=100, exit_ns=100)
        cuts = [(at, Priority.TASK, "cancel") for at in range(5_000, 150_000, 3_500)]
        run(plan, cuts, lambda saved: found.update(found_in(saved)))

    assert EXPECTED[gic] <= found
