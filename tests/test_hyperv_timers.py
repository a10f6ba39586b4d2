"""Synthetic timers and reference time. Rules: TLFS, Timers; what is KVM's own by its behaviour."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hyperv_machine import (
    MESSAGES,
    NOWHERE,
    TSC_PAGE,
    X2APIC_EOI,
    HypervVm,
    done,
    sint_msr,
    timer_msrs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fabric
from fabric.kvm.x86_hyperv import supported_cpuid
from fabric.uapi import hyperv as hv
from fabric.uapi import ioctl
from fabric.uapi import kvm as uapi
from fabric.uapi.hyperv import (
    HV_ENABLE,
    HV_STIMER_AUTO_ENABLE,
    HV_STIMER_DIRECT,
    HV_STIMER_LAZY,
    HV_STIMER_PERIODIC,
    HV_X64_MSR_EOM,
    HV_X64_MSR_REFERENCE_TSC,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_TIME_REF_COUNT,
    HvMessage,
    HvReferenceTscPage,
    HvTimerMessagePayload,
)
from fabric.uapi.x86 import KvmClockData
from fabric.vcpu.x86_cpu import GeneralProtection

VECTOR = 0x50
SINT = 2
TO_SINT = SINT << hv.HV_STIMER_SINT_SHIFT
UNIT = 100
"""ns of a unit of reference time."""
CONFIG, COUNT = timer_msrs(0)
SLOT = MESSAGES + SINT * hv.HV_MESSAGE_SIZE


class Guest:
    """A guest that takes timer messages: when, and what they say. Its program may do more."""

    def __init__(self, *, frees: bool = True, ends: bool = True, **options: Any) -> None:
        self.machine = HypervVm(**options)
        self.frees, self.ends = frees, ends
        self.taken: list[tuple[int, int]] = []
        """Time in ns, and which timer (-1: the slot is empty)."""
        self.messages: list[HvTimerMessagePayload] = []

    async def receive(self, cpu: Any) -> None:
        """The handler of the vector."""
        message = self.machine.message(SINT)
        payload = HvTimerMessagePayload.unpack(message.payload)
        self.taken.append((fabric.now(), payload.timer_index if message.message_type else -1))
        self.messages.append(payload)
        if self.frees:
            await self.free(cpu)
        if self.ends:
            await cpu.wrmsr(X2APIC_EOI, 0)

    async def free(self, cpu: Any) -> None:
        """Empty the slot, and say so if something waits for it (TLFS, HV_MESSAGE)."""
        await cpu.store(SLOT, 4, hv.HVMSG_NONE)
        if await cpu.load(SLOT + HvMessage.OFFSETS["flags"], 1) & hv.HV_MESSAGE_PENDING:
            await cpu.wrmsr(HV_X64_MSR_EOM, 0)

    async def prepare(self, cpu: Any) -> None:
        """The page and the source."""
        cpu.set_gate(VECTOR, self.receive)
        await cpu.wrmsr(HV_X64_MSR_SIMP, MESSAGES | 1)
        await cpu.wrmsr(sint_msr(SINT), VECTOR)
        cpu.sti()

    async def run(self, program: Callable[[Any], Awaitable[object]]) -> None:
        """Prepare, run, end."""

        async def whole(cpu: Any) -> None:
            await self.prepare(cpu)
            await program(cpu)
            await done(cpu)

        await self.machine.run(whole)
        self.machine.inside.ledger.check()


def simulate(test: Callable[[], Awaitable[Any]]) -> Any:
    """Run a test in a simulation, in which no time passes but what its guest uses."""
    return fabric.run(test)


# -- one timer


def test_a_one_shot_timer_expires_when_reference_time_is_its_count() -> None:
    """To the ns; the message says which timer, when it expired and when the message was delivered; it is disabled."""

    async def main() -> None:
        guest = Guest()

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(COUNT, 70)
            await cpu.wrmsr(CONFIG, HV_ENABLE | TO_SINT)
            await cpu.compute(20_000)
            assert TO_SINT == await cpu.rdmsr(CONFIG)

        await guest.run(program)
        assert [(70 * UNIT, 0)] == guest.taken
        assert [HvTimerMessagePayload(0, 0, 70, 70)] == guest.messages

    simulate(main)


def test_the_message_has_a_header() -> None:
    """HvMessageTypeTimerExpired, the size of its payload, no flags and no sender."""

    async def main() -> None:
        guest = Guest(frees=False)

        async def program(cpu: Any) -> None:
            await cpu.store(SLOT + 200, 4, 0x1234)
            await cpu.wrmsr(COUNT, 1)
            await cpu.wrmsr(CONFIG, HV_ENABLE | TO_SINT)
            await cpu.compute(1_000)

        await guest.run(program)
        message = guest.machine.message(SINT)
        assert (hv.HVMSG_TIMER_EXPIRED, 24, 0, 0) == (
            message.message_type,
            message.payload_size,
            message.flags,
            message.sender,
        )
        assert 0x1234 == int.from_bytes(guest.machine.read(SLOT + 200, 4), "little"), "only the payload is copied"

    simulate(main)


def test_a_count_that_has_passed_expires_at_once() -> None:
    """TLFS: if a one-shot timer is enabled and the count is in the past, it expires immediately."""

    async def main() -> None:
        guest = Guest()

        async def program(cpu: Any) -> None:
            await cpu.compute(5_000)
            await cpu.wrmsr(COUNT, 20)
            await cpu.wrmsr(CONFIG, HV_ENABLE | TO_SINT)
            await cpu.compute(1_000)

        await guest.run(program)
        assert [(5_000, 0)] == guest.taken
        assert [HvTimerMessagePayload(0, 0, 20, 50)] == guest.messages

    simulate(main)


def test_a_periodic_timer_goes_on() -> None:
    """Every count units from when it was enabled, until it is disabled."""

    async def main() -> None:
        guest = Guest()

        async def program(cpu: Any) -> None:
            await cpu.compute(1_050)
            await cpu.wrmsr(COUNT, 30)
            await cpu.wrmsr(CONFIG, HV_ENABLE | HV_STIMER_PERIODIC | TO_SINT)
            await cpu.compute(10_000)
            assert HV_ENABLE | HV_STIMER_PERIODIC | TO_SINT == await cpu.rdmsr(CONFIG)
            await cpu.wrmsr(CONFIG, HV_STIMER_PERIODIC | TO_SINT)
            await cpu.compute(10_000)

        await guest.run(program)
        assert [(4_000, 0), (7_000, 0), (10_000, 0)] == guest.taken

    simulate(main)


@pytest.mark.parametrize(
    ("first", "then", "by_guest", "config"),
    [
        pytest.param(HV_STIMER_AUTO_ENABLE, 50, True, HV_STIMER_AUTO_ENABLE | HV_ENABLE, id="auto"),
        pytest.param(HV_STIMER_AUTO_ENABLE, 50, False, HV_STIMER_AUTO_ENABLE, id="auto-by-vmm"),
        pytest.param(0, 50, True, 0, id="not-auto"),
        pytest.param(HV_ENABLE, 0, True, 0, id="zero"),
        pytest.param(HV_ENABLE, 0, False, HV_ENABLE, id="zero-by-vmm"),
        pytest.param(HV_ENABLE | HV_STIMER_AUTO_ENABLE, 0, True, HV_STIMER_AUTO_ENABLE, id="zero-auto"),
    ],
)
def test_what_a_count_does_to_enable(first: int, then: int, by_guest: bool, config: int) -> None:
    """TLFS, Synthetic Timer Count Register: AutoEnable enables, 0 disables. A VMM restores what it has saved."""

    async def main() -> int | None:
        guest = Guest()

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(CONFIG, first | TO_SINT)
            if by_guest:
                await cpu.wrmsr(COUNT, then)

        await guest.run(program)
        if not by_guest:
            guest.machine.set_msr(COUNT, then)
        return guest.machine.msr(CONFIG)

    assert config | TO_SINT == simulate(main)


@pytest.mark.parametrize(
    ("before", "written", "read"),
    [
        pytest.param(HV_ENABLE | TO_SINT, HV_ENABLE, 0, id="enabled"),
        pytest.param(HV_ENABLE | TO_SINT, HV_ENABLE | HV_STIMER_DIRECT, HV_ENABLE | HV_STIMER_DIRECT, id="direct"),
        pytest.param(0, HV_ENABLE, HV_ENABLE, id="disabled"),
    ],
)
def test_source_0_is_not_for_timers(before: int, written: int, read: int) -> None:
    """TLFS: SINTx cannot be 0 for an enabled timer, which is then disabled; KVM asks whether it was enabled before."""
    machine = HypervVm()
    machine.set_msr(CONFIG, before)
    machine.set_msr(CONFIG, written)

    assert read == machine.msr(CONFIG)


# -- a slot that is taken


@pytest.mark.parametrize("how", ["eom", "eoi"])
def test_a_message_waits_for_its_slot(how: str) -> None:
    """The guest is asked to say when it is free (MessagePending); at EOM, or at the EOI of the source's vector, it is
    posted. Until then the timer stays enabled."""

    async def main() -> None:
        guest = Guest(frees=False, ends=False)

        async def program(cpu: Any) -> None:
            for n in (0, 1):
                config, count = timer_msrs(n)
                await cpu.wrmsr(count, 10 + 10 * n)
                await cpu.wrmsr(config, HV_ENABLE | TO_SINT)
            await cpu.compute(3_000)
            assert 1 == len(guest.taken)
            assert hv.HV_MESSAGE_PENDING == guest.machine.message(SINT).flags
            assert HV_ENABLE | TO_SINT == await cpu.rdmsr(timer_msrs(1)[0])
            await cpu.store(SLOT, 4, hv.HVMSG_NONE)
            if how == "eom":
                await cpu.wrmsr(HV_X64_MSR_EOM, 0)
            await cpu.wrmsr(X2APIC_EOI, 0)
            await cpu.compute(1_000)
            assert TO_SINT == await cpu.rdmsr(timer_msrs(1)[0])

        await guest.run(program)
        assert [(1_000, 0), (3_000, 1)] == guest.taken
        assert HvTimerMessagePayload(1, 0, 20, 30) == guest.messages[1]
        assert 0 == guest.machine.message(SINT).flags

    simulate(main)


def test_the_slot_may_still_be_taken_at_the_end() -> None:
    """Then it is tried again at the next end."""

    async def main() -> None:
        guest = Guest(frees=False)

        async def program(cpu: Any) -> None:
            await cpu.store(SLOT, 4, 1)
            await cpu.wrmsr(COUNT, 10)
            await cpu.wrmsr(CONFIG, HV_ENABLE | TO_SINT)
            await cpu.compute(2_000)
            await cpu.wrmsr(HV_X64_MSR_EOM, 0)
            await cpu.compute(1_000)
            await cpu.store(SLOT, 4, hv.HVMSG_NONE)
            await cpu.wrmsr(HV_X64_MSR_EOM, 0)
            await cpu.compute(1_000)

        await guest.run(program)
        assert [(3_000, 0)] == guest.taken

    simulate(main)


@pytest.mark.parametrize("lazy", [0, HV_STIMER_LAZY])
def test_a_periodic_message_that_finds_no_room_is_lost(lazy: int) -> None:
    """Without a sign; the next comes at its time. KVM's periodic timers are all lazy (TLFS, Timer Lateness)."""

    async def main() -> None:
        guest = Guest(frees=False)

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(COUNT, 10)
            await cpu.wrmsr(CONFIG, HV_ENABLE | HV_STIMER_PERIODIC | TO_SINT | lazy)
            await cpu.compute(3_500)
            assert 0 == guest.machine.message(SINT).flags
            await guest.free(cpu)
            await cpu.compute(1_000)

        await guest.run(program)
        assert [(1_000, 0), (4_000, 0)] == guest.taken

    simulate(main)


def test_without_a_message_page_a_timer_waits() -> None:
    """It has expired, and is tried when something of its source ends; here: once there is a page."""

    async def main() -> None:
        guest = Guest()

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(HV_X64_MSR_SIMP, 0)
            await cpu.wrmsr(COUNT, 10)
            await cpu.wrmsr(CONFIG, HV_ENABLE | TO_SINT)
            await cpu.compute(2_000)
            await cpu.wrmsr(HV_X64_MSR_SIMP, MESSAGES | 1)
            await cpu.wrmsr(HV_X64_MSR_EOM, 0)
            await cpu.compute(1_000)

        await guest.run(program)
        assert [(2_000, 0)] == guest.taken

    simulate(main)


def test_a_masked_source_gets_the_message_without_an_interrupt() -> None:
    """The interrupt is lost (TLFS, SynIC Messages), and for KVM the timer has not been served."""

    async def main() -> None:
        guest = Guest()

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(sint_msr(SINT), VECTOR | hv.HV_SYNIC_SINT_MASKED)
            await cpu.wrmsr(COUNT, 10)
            await cpu.wrmsr(CONFIG, HV_ENABLE | TO_SINT)
            await cpu.compute(2_000)

        await guest.run(program)
        assert [] == guest.taken
        assert hv.HVMSG_TIMER_EXPIRED == guest.machine.message(SINT).message_type
        assert HV_ENABLE | TO_SINT == guest.machine.msr(CONFIG)
        assert {"SINT masked": 1} == guest.machine.inside.ledger.statement().dropped

    simulate(main)


# -- direct mode


def test_direct_mode_raises_a_vector() -> None:
    """TLFS, Synthetic Timer Configuration Register: no message, no source."""

    async def main() -> None:
        guest = Guest()

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(COUNT, 10)
            await cpu.wrmsr(CONFIG, HV_ENABLE | HV_STIMER_DIRECT | VECTOR << hv.HV_STIMER_VECTOR_SHIFT)
            await cpu.compute(2_000)

        await guest.run(program)
        assert [(1_000, -1)] == guest.taken
        assert 0 == (guest.machine.msr(CONFIG) or 0) & HV_ENABLE

    simulate(main)


@pytest.mark.parametrize(("enforced", "offered", "fails"), [(1, False, True), (1, True, False), (0, False, False)])
def test_direct_mode_must_be_offered(enforced: int, offered: bool, fails: bool) -> None:
    """CPUID leaf 0x40000003 EDX bit 19, where the VMM has CPUID enforced."""

    async def main() -> bool:
        guest = Guest()
        leaves = [
            leaf if offered or leaf.function != hv.HYPERV_CPUID_FEATURES else leaf.with_(edx=leaf.edx & ~(1 << 19))
            for leaf in supported_cpuid(True)
        ]
        guest.machine.set_cpuid(0, *leaves)
        guest.machine.enable(0, uapi.KVM_CAP_HYPERV_ENFORCE_CPUID, enforced)
        failed = []

        async def program(cpu: Any) -> None:
            try:
                await cpu.wrmsr(CONFIG, HV_STIMER_DIRECT)
            except GeneralProtection:
                failed.append(True)

        await guest.run(program)
        return bool(failed)

    assert fails == simulate(main)


# -- KVM_RUN, saving and restoring


def test_what_is_due_waits_for_the_vcpu_to_run() -> None:
    """A VMM may restore the MSRs in any order: a timer whose count has passed posts its message when the vCPU runs."""

    async def main() -> None:
        guest = Guest()
        machine = guest.machine
        machine.set_msr(COUNT, 1)
        machine.set_msr(CONFIG, HV_ENABLE | TO_SINT)
        await fabric.sleep(1_000)
        assert HV_ENABLE | TO_SINT == machine.msr(CONFIG)
        machine.set_msr(HV_X64_MSR_SIMP, MESSAGES | 1)
        machine.set_msr(sint_msr(SINT), VECTOR)

        async def program(cpu: Any) -> None:
            cpu.set_gate(VECTOR, guest.receive)
            cpu.sti()
            await cpu.compute(100)
            await done(cpu)

        await machine.run(program)
        assert [(1_000, 0)] == guest.taken

    simulate(main)


def test_periods_outside_of_kvm_run_are_one() -> None:
    """While the VMM has the vCPU its periodic timer adds nothing up, and keeps its phase."""

    async def main() -> None:
        guest = Guest()
        machine = guest.machine

        async def program(cpu: Any) -> None:
            await guest.prepare(cpu)
            await cpu.wrmsr(COUNT, 10)
            await cpu.wrmsr(CONFIG, HV_ENABLE | HV_STIMER_PERIODIC | TO_SINT)
            await cpu.compute(1_500)
            await cpu.wrmsr(hv.HV_X64_MSR_SCONTROL, 1)  # exits
            await cpu.compute(1_000)
            await done(cpu)

        machine.vcpus[0].load(program)
        assert await machine.step()
        assert await machine.step()
        await fabric.sleep(4_000)
        assert None is await machine.step()
        assert [(1_000, 0), (5_500, 0), (6_000, 0)] == guest.taken

    simulate(main)


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 12_000), counts=st.lists(st.integers(1, 100), min_size=1, max_size=4))
def test_a_restored_machine_goes_on(cut: int, counts: list[int]) -> None:
    """MSRs and message page, read at any time and put into another VM, and every one-shot timer expires once."""
    saved_msrs = [
        *(sint_msr(n) for n in range(16)),
        HV_X64_MSR_SIMP,
        *(number for n in range(4) for number in timer_msrs(n)),
        hv.HV_X64_MSR_SCONTROL,
    ]

    async def main() -> list[int]:
        first = Guest()

        async def start(cpu: Any) -> None:
            for n, count in enumerate(counts):
                config, counter = timer_msrs(n)
                await cpu.wrmsr(counter, count)
                await cpu.wrmsr(config, HV_ENABLE | TO_SINT)
            await cpu.compute(cut)

        await first.run(start)
        second = Guest()
        source, target = first.machine, second.machine
        clock = bytearray(KvmClockData.SIZE)
        source.vm.ioctl(ioctl.KVM_GET_CLOCK, clock)
        target.vm.ioctl(ioctl.KVM_SET_CLOCK, KvmClockData(KvmClockData.unpack(clock).clock))
        for number in saved_msrs:
            assert target.set_msr(number, source.msr(number) or 0)
        target.write(MESSAGES, source.read(MESSAGES, 0x1000))

        async def go_on(cpu: Any) -> None:
            cpu.set_gate(VECTOR, second.receive)
            cpu.sti()
            await cpu.compute(12_000)
            await done(cpu)

        await target.run(go_on)
        return [payload.expiration_time for payload in (*first.messages, *second.messages)]

    assert sorted(counts) == sorted(simulate(main))


# -- all of them, against a second model


@settings(max_examples=40, deadline=None)
@given(timers=st.lists(st.tuples(st.integers(1, 60), st.booleans(), st.integers(0, 30)), min_size=1, max_size=4))
def test_timers_expire_when_they_should(timers: list[tuple[int, bool, int]]) -> None:
    """Four timers at once, each in direct mode with a vector of its own: what is taken, and when, is what arithmetic
    says."""
    end = 300

    def expected() -> list[tuple[int, int]]:
        moments = []
        now = 0
        for n, (count, periodic, wait) in enumerate(timers):
            now += wait
            if periodic:
                moments += [(at * UNIT, n) for at in range(now + count, end, count)]
            else:
                moments.append((max(now, count) * UNIT, n))
        return sorted(moments)

    async def main() -> list[tuple[int, int]]:
        guest = Guest()
        taken: list[tuple[int, int]] = []

        async def program(cpu: Any) -> None:
            async def handler(cpu: Any) -> None:
                taken.append((fabric.now(), cpu.vector >> 4 & 3))
                await cpu.wrmsr(X2APIC_EOI, 0)

            for n, (count, periodic, wait) in enumerate(timers):
                config, counter = timer_msrs(n)
                cpu.set_gate(0x40 | n << 4, handler)
                await cpu.compute(wait * UNIT)
                await cpu.wrmsr(counter, count)
                mode = HV_ENABLE | HV_STIMER_DIRECT | (HV_STIMER_PERIODIC if periodic else 0)
                await cpu.wrmsr(config, mode | (0x40 | n << 4) << hv.HV_STIMER_VECTOR_SHIFT)
            await cpu.compute(end * UNIT - fabric.now() - 1)
            await done(cpu)

        await guest.machine.run(program_with_interrupts(program))
        return sorted(taken)

    assert expected() == simulate(main)


@settings(max_examples=60, deadline=None)
@given(counts=st.permutations(range(1, 40)).map(lambda counts: counts[:4]), frees=st.sets(st.integers(1, 45)))
def test_messages_queue_for_their_slot(counts: list[int], frees: set[int]) -> None:
    """Four timers with one source, and a guest that polls: the slot has one message at a time, in the order of expiry
    while it is free, and of the timers when several wait; MessagePending says that there are."""
    moments = sorted([(count * UNIT, n) for n, count in enumerate(counts)] + [(at * UNIT + 50, -1) for at in frees])

    def expected() -> list[tuple[int, int, int]]:
        slot: int | None = None
        waiting: set[int] = set()
        flag, seen = 0, []
        for at, n in moments:
            if n >= 0 and slot is None:
                slot, flag = n, 0
            elif n >= 0:
                waiting.add(n)
                flag = 1
            elif slot is not None:
                seen.append((at, slot, flag))
                slot, flag = (min(waiting) if waiting else None), int(len(waiting) > 1)
                waiting.discard(-1 if slot is None else slot)
        return seen

    async def main() -> list[tuple[int, int, int]]:
        guest = Guest()
        seen = []

        async def program(cpu: Any) -> None:
            cpu.cli()
            for n, count in enumerate(counts):
                config, counter = timer_msrs(n)
                await cpu.wrmsr(counter, count)
                await cpu.wrmsr(config, HV_ENABLE | TO_SINT)
            for at in sorted(frees):
                await cpu.compute(at * UNIT + 50 - fabric.now())
                message = guest.machine.message(SINT)
                if message.message_type:
                    index = HvTimerMessagePayload.unpack(message.payload).timer_index
                    seen.append((fabric.now(), index, message.flags))
                    await guest.free(cpu)

        await guest.run(program)
        guest.machine.inside.vcpus[0].hyperv.synic._check()
        return seen

    assert expected() == simulate(main)


def program_with_interrupts(program: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """The program, with IF set."""

    async def whole(cpu: Any) -> None:
        cpu.set_vector(program)
        cpu.sti()
        await program(cpu)

    return whole


# -- reference time


def test_reference_time_counts_100_ns() -> None:
    """From when the partition was created; a guest cannot set it, what a VMM writes is dropped (TLFS, Reference
    Counter)."""

    async def main() -> None:
        await fabric.sleep(777)
        guest = Guest()

        async def program(cpu: Any) -> None:
            await cpu.compute(1_999)
            assert 19 == await cpu.rdmsr(HV_X64_MSR_TIME_REF_COUNT)
            with pytest.raises(GeneralProtection):
                await cpu.wrmsr(HV_X64_MSR_TIME_REF_COUNT, 0)
            await cpu.compute(1)
            assert 20 == await cpu.rdmsr(HV_X64_MSR_TIME_REF_COUNT)

        await guest.run(program)
        assert guest.machine.set_msr(HV_X64_MSR_TIME_REF_COUNT, 5)
        assert 20 == guest.machine.msr(HV_X64_MSR_TIME_REF_COUNT)

    simulate(main)


def set_clock(machine: HypervVm, ns: int) -> None:
    """KVM_SET_CLOCK."""
    machine.vm.ioctl(ioctl.KVM_SET_CLOCK, KvmClockData(ns))


def test_reference_time_is_the_clock_of_the_vm() -> None:
    """KVM_SET_CLOCK sets it."""
    machine = HypervVm()
    set_clock(machine, 123_456_789)

    assert 1_234_567 == machine.msr(HV_X64_MSR_TIME_REF_COUNT)


def page_of(machine: HypervVm) -> HvReferenceTscPage:
    """The reference TSC page."""
    return HvReferenceTscPage.unpack(machine.read(TSC_PAGE, HvReferenceTscPage.SIZE))


def time_by(page: HvReferenceTscPage, tsc: int) -> int:
    """TLFS, Partition Reference Time Enlightenment."""
    return (tsc * page.scale >> 64) + page.offset


@settings(max_examples=30, deadline=None)
@given(
    khz=st.integers(10_001, 10_000_000),
    start=st.integers(0, 1 << 50),
    clock=st.integers(0, 1 << 50),
    steps=st.lists(st.integers(0, 10**10), max_size=4),
)
def test_the_page_turns_tsc_into_reference_time(khz: int, start: int, clock: int, steps: list[int]) -> None:
    """Whatever TSC and clock: within a unit of the clock (and a part in 2**31), and the MSR says the same."""

    async def main() -> None:
        guest = Guest(tsc_khz=khz, tsc_start=start)
        set_clock(guest.machine, clock)

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(HV_X64_MSR_REFERENCE_TSC, TSC_PAGE | 1)
            began = fabric.now()
            for step in steps:
                await cpu.compute(step)
                page = page_of(guest.machine)
                assert 1 == page.sequence
                time = time_by(page, cpu.rdtsc())
                assert time == await cpu.rdmsr(HV_X64_MSR_TIME_REF_COUNT)
                exact = clock + fabric.now()
                assert abs(time - exact // UNIT) <= 2 + (fabric.now() - began) // UNIT // (1 << 30)

        await guest.run(program)

    simulate(main)


def with_page(prepare: Callable[[HypervVm], None], change: Callable[[HypervVm], None]) -> Any:
    """A guest names its page; then the VMM changes something, and the guest goes on: the page after both."""

    async def main() -> list[Any]:
        guest = Guest()
        machine = guest.machine
        prepare(machine)
        pages = []

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(HV_X64_MSR_REFERENCE_TSC, TSC_PAGE | 1)
            for _ in range(2):
                await cpu.wrmsr(hv.HV_X64_MSR_SCONTROL, 1)
                page = page_of(machine)
                pages.append((page, time_by(page, cpu.rdtsc()), await cpu.rdmsr(HV_X64_MSR_TIME_REF_COUNT)))
            await done(cpu)

        machine.vcpus[0].load(program)
        assert await machine.step()
        assert await machine.step()
        change(machine)
        assert None is await machine.step()
        return pages

    return simulate(main)


def test_the_page_follows_the_clock() -> None:
    """After KVM_SET_CLOCK it has another sequence and other numbers."""
    (before, _, _), (after, time, counted) = with_page(lambda _: None, lambda machine: set_clock(machine, 10**9))

    assert (1, 2) == (before.sequence, after.sequence)
    assert 10**7 == time == counted


def test_a_restored_page_is_written_at_the_next_entry() -> None:
    """A VMM that sets the MSR does not touch the page by that."""

    async def main() -> None:
        machine = HypervVm()
        assert machine.set_msr(HV_X64_MSR_REFERENCE_TSC, TSC_PAGE | 1)
        assert 0 == page_of(machine).sequence
        await machine.run(done)
        assert 1 == page_of(machine).sequence

    simulate(main)


@pytest.mark.parametrize(("there", "then"), [(0, 1), (7, 8), (0xFFFF_FFFD, 0xFFFF_FFFE), (0xFFFF_FFFE, 1)])
def test_sequences_that_mean_something_else_are_left_out(there: int, then: int) -> None:
    """0 says that the page is not to be used, and so does 0xffffffff for old guests."""
    (page, _, _), _ = with_page(lambda machine: machine.write(TSC_PAGE, there.to_bytes(4, "little")), lambda _: None)

    assert then == page.sequence


def test_while_the_guest_emulates_the_tsc_the_page_stays() -> None:
    """HV_X64_MSR_TSC_EMULATION_CONTROL: after a migration, until the guest says that it has followed."""

    def change(machine: HypervVm) -> None:
        assert machine.set_msr(hv.HV_X64_MSR_TSC_EMULATION_CONTROL, 1)
        set_clock(machine, 10**9)

    (before, _, _), (after, time, counted) = with_page(lambda _: None, change)

    assert before == after
    assert time == counted


@pytest.mark.parametrize(
    ("page", "khz"), [pytest.param(NOWHERE, 2_600_000, id="no-memory"), pytest.param(TSC_PAGE, 10_000, id="slow-tsc")]
)
def test_a_page_that_cannot_be_is_not_used(page: int, khz: int) -> None:
    """Without memory, or with a TSC whose scale does not fit 64 bits: the time is the clock's, as without a page."""

    async def main() -> None:
        guest = Guest(tsc_khz=khz)

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(HV_X64_MSR_REFERENCE_TSC, page | 1)
            await cpu.compute(2_000)
            assert page | 1 == await cpu.rdmsr(HV_X64_MSR_REFERENCE_TSC)
            assert 0 == page_of(guest.machine).sequence
            assert 20 == await cpu.rdmsr(HV_X64_MSR_TIME_REF_COUNT)

        await guest.run(program)

    simulate(main)


def test_timers_follow_the_page() -> None:
    """With a page in force, a timer expires when the time that the guest computes is its count."""

    async def main() -> None:
        guest = Guest(tsc_khz=2_599_993)
        seen = []

        async def program(cpu: Any) -> None:
            async def handler(cpu: Any) -> None:
                seen.append((time_by(page_of(guest.machine), cpu.rdtsc()), fabric.now()))
                await cpu.wrmsr(X2APIC_EOI, 0)

            cpu.set_gate(VECTOR, handler)
            await cpu.wrmsr(HV_X64_MSR_REFERENCE_TSC, TSC_PAGE | 1)
            for count in (1_000, 7_777, 1_000_003):
                await cpu.wrmsr(COUNT, count)
                await cpu.wrmsr(CONFIG, HV_ENABLE | HV_STIMER_DIRECT | VECTOR << hv.HV_STIMER_VECTOR_SHIFT)
                await cpu.hlt()

        await guest.run(program)
        assert [1_000, 7_777, 1_000_003] == [time for time, _ in seen]
        assert all(abs(at - time * UNIT) <= UNIT for time, at in seen)

    simulate(main)


@pytest.mark.parametrize(("khz", "cycle"), [(2_000_000, 1), (3_333_333, 4)])
def test_frequencies(khz: int, cycle: int) -> None:
    """HV_X64_MSR_TSC_FREQUENCY and _APIC_FREQUENCY, in Hz; the VMM's writes are dropped."""
    machine = HypervVm(tsc_khz=khz)
    machine.inside.irqchip.apics.cycle_ns = cycle

    assert khz * 1000 == machine.msr(hv.HV_X64_MSR_TSC_FREQUENCY)
    assert 10**9 // cycle == machine.msr(hv.HV_X64_MSR_APIC_FREQUENCY)
    assert machine.set_msr(hv.HV_X64_MSR_TSC_FREQUENCY, 1)
    assert khz * 1000 == machine.msr(hv.HV_X64_MSR_TSC_FREQUENCY)
