"""The PMU of an arm64 vCPU: what its counters count, when they overflow, who learns of it."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import trio
from engine_programs import here
from hypothesis import given
from hypothesis import strategies as st
from kvm_machine import Arm, outcome
from pmu_machine import CYCLE, FEATURES, INIT, IRQ, PPI, SET_PMU, PmuMachine, counters, simulate, start
from test_arch_timer import HandClock

import fabric
from fabric.kvm.typed import VcpuFd
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.vcpu import Costs, Host
from fabric.vcpu.pmu import (
    CHAIN,
    CPU_CYCLES,
    EVENTS,
    EXC_RETURN,
    EXC_TAKEN,
    INST_RETIRED,
    LD_RETIRED,
    MEM_ACCESS,
    ST_RETIRED,
    SW_INCR,
    EventFilter,
    Pmu,
    PmuHost,
)

PMU = arm.KVM_ARM_VCPU_PMU_V3_CTRL
ALLOW, DENY = arm.KVM_PMU_EVENT_ALLOW, arm.KVM_PMU_EVENT_DENY
UNKNOWN_EVENT = 0x17  # L2D_CACHE_REFILL: there is no cache
ALL32 = (1 << 32) - 1


def on(**options: Any) -> Callable[[], PmuMachine]:
    """A machine on a host with these options."""
    return lambda: PmuMachine(**options)


# -- what counts


def test_cycles_and_instructions_are_those_of_computing() -> None:
    """At the host's frequency, with its instructions per cycle; what is not implemented stands still."""

    async def body(_machine: PmuMachine, cpu: Any) -> list[int]:
        await start(cpu, CPU_CYCLES, INST_RETIRED, UNKNOWN_EVENT, 0x4004)
        await cpu.compute(1000)
        await cpu.wait_for_interrupt(cpu.now + 5000)
        await cpu.compute(1)
        return [*await counters(cpu, 4), await cpu.mrs("PMCCNTR_EL0")]

    made = on(cpu_hz=2_500_000_000, instructions_per_cycle=Fraction(3, 2))
    assert [2502, 3753, 0, 62, 2502] == simulate(body, make=made)[0]


def test_the_host_s_time_is_not_the_guest_s() -> None:
    """Exits, injection and waking cost time, and count nothing."""

    def make() -> PmuMachine:
        machine = PmuMachine()
        machine.vcpu().costs = Costs(exit_ns=100, injection_ns=70, eoi_ns=30, wakeup_ns=200)
        return machine

    async def body(machine: PmuMachine, cpu: Any) -> list[int]:
        await start(cpu, CPU_CYCLES)
        machine.at(1000, machine.raise_spi)
        await cpu.hvc(0x8400_0000)
        await cpu.compute(10)
        await cpu.wait_for_interrupt()
        await cpu.compute(5)
        return [cpu.now, *await counters(cpu, 1)]

    # Until 1000 it halts; waking, injection and the owed end of the interrupt follow.
    assert [1000 + 200 + 70 + 30 + 5, 15] == simulate(body, unmasked=True, make=make)[0]


def test_events_of_the_guest_program() -> None:
    """Loads, stores, interrupts taken and returned from, software increments."""

    async def body(machine: PmuMachine, cpu: Any) -> list[int]:
        await start(cpu, LD_RETIRED, ST_RETIRED, MEM_ACCESS, EXC_TAKEN, EXC_RETURN, SW_INCR)
        await cpu.load(0x0800_0000, 4)
        await cpu.load(0x0800_0004, 4)
        await cpu.store(0x0800_0004, 4, 0)
        machine.raise_spi()
        await cpu.compute(10)
        await cpu.msr("PMSWINC_EL0", 1 << 5 | 1)
        return await counters(cpu, 6)

    assert [2, 1, 3, 1, 1, 1] == simulate(body, unmasked=True)[0]


def test_a_preempted_vcpu_counts_nothing() -> None:
    """With two vCPUs on a physical CPU each counts its own half; an overflow comes when it has executed so long."""
    ends: list[tuple[int, int, int]] = []

    async def main() -> PmuMachine:
        machine = PmuMachine(2)
        host = Host(here(), 1, slice_ns=1000)

        async def program(cpu: Any) -> None:
            cpu.set_vector(machine.handler)
            cpu.unmask()
            await start(cpu, CPU_CYCLES, values=(ALL32 - 2499,), interrupts=1)
            await cpu.compute(4000)
            ends.append((cpu.number, cpu.now, await cpu.mrs("PMCCNTR_EL0")))
            await cpu.system_off()

        async with trio.open_nursery() as nursery:
            for number in range(2):
                machine.vcpu(number).share(host)
                machine.vcpus[number].load(program)
                nursery.start_soon(machine.run, number)
        return machine

    log = fabric.run(main).log
    # Slices alternate from 0 on: 2500 ns of the first are over at 4500, of the second at 5500.
    assert [(4500, (PPI, 1)), (5500, (PPI, 1))] == log
    assert [(0, 7000, 4000), (1, 8000, 4000)] == ends


def test_events_are_counted_at_el1() -> None:
    """A counter that excludes EL1, or is not enabled, or in a PMU that is off, stands still."""

    async def body(_machine: PmuMachine, cpu: Any) -> list[list[int]]:
        await start(cpu, CPU_CYCLES | 1 << 31, CPU_CYCLES | 1 << 30, CPU_CYCLES)
        await cpu.msr("PMCNTENCLR_EL0", 1 << 2)
        await cpu.compute(100)
        first = await counters(cpu, 3)
        await cpu.msr("PMCR_EL0", 0)
        await cpu.compute(100)
        return [first, await counters(cpu, 3)]

    assert [[0, 100, 0], [0, 100, 0]] == simulate(body)[0]


def test_a_counter_started_by_a_handler_counts_the_rest_of_a_computation() -> None:
    """What is computed before, in and after the handler is told apart."""

    async def body(machine: PmuMachine, cpu: Any) -> list[int]:
        async def handler(cpu: Any) -> None:
            intid = cpu.iar1()
            await start(cpu, CPU_CYCLES)
            await cpu.compute(7)
            cpu.eoir1(intid)

        cpu.set_vector(handler)
        cpu.unmask()
        machine.at(300, machine.raise_spi)
        await cpu.compute(1000)
        return [cpu.now, *await counters(cpu, 1)]

    assert [1007, 707] == simulate(body)[0]


# -- PMCR_EL0


@pytest.mark.parametrize(
    ("pmcr", "cycles", "overflows"),
    [
        pytest.param(1, 6400, CYCLE, id="32 bits"),
        pytest.param(1 | 1 << 6, 6400, 0, id="LC: 64 bits"),
        pytest.param(1 | 1 << 3, 100, CYCLE, id="D: one in 64"),
        pytest.param(1 | 1 << 3 | 1 << 6, 6400, 0, id="LC: no divider"),
    ],
)
def test_the_cycle_counter(pmcr: int, cycles: int, overflows: int) -> None:
    """It has 64 bits always and overflows after 32 or, with LC, 64 of them; D divides by 64 unless LC is set."""

    async def body(_machine: PmuMachine, cpu: Any) -> list[int]:
        await cpu.msr("PMCCNTR_EL0", ALL32)
        await start(cpu, pmcr=pmcr)
        await cpu.compute(6400)
        return [await cpu.mrs("PMCCNTR_EL0") - ALL32, await cpu.mrs("PMOVSSET_EL0")]

    assert [cycles, overflows] == simulate(body)[0]


@pytest.mark.parametrize(
    ("options", "pmcr", "value", "flags"),
    [
        pytest.param({}, 1 | 1 << 7, 99, 1, id="LP without long counters"),
        pytest.param({"pmu_long_counters": True}, 1, (1 << 32) + 99, 1, id="long counters without LP"),
        pytest.param({"pmu_long_counters": True}, 1 | 1 << 7, (1 << 32) + 99, 0, id="long counters with LP"),
    ],
)
def test_long_event_counters(options: dict[str, Any], pmcr: int, value: int, flags: int) -> None:
    """64-bit counters overflow after 32 bits unless LP says otherwise; KVM 6.1 offers none."""

    async def body(_machine: PmuMachine, cpu: Any) -> list[int]:
        await start(cpu, CPU_CYCLES, values=(ALL32,), pmcr=pmcr)
        await cpu.compute(100)
        return [*await counters(cpu, 1), await cpu.mrs("PMOVSSET_EL0")]

    assert [value, flags] == simulate(body, make=on(**options))[0]


def test_resetting_counters() -> None:
    """P clears the event counters, C the cycle counter; they go on from 0."""

    async def body(_machine: PmuMachine, cpu: Any) -> list[int]:
        await start(cpu, CPU_CYCLES)
        await cpu.compute(10)
        await cpu.msr("PMCR_EL0", 1 | 1 << 1)
        await cpu.compute(5)
        first = [*await counters(cpu, 1), await cpu.mrs("PMCCNTR_EL0")]
        await cpu.msr("PMCR_EL0", 1 | 1 << 2)
        await cpu.compute(1)
        return [*first, *await counters(cpu, 1), await cpu.mrs("PMCCNTR_EL0")]

    assert [5, 15, 6, 1] == simulate(body)[0]


# -- overflow


@pytest.mark.parametrize("hz", [1_000_000_000, 333_333_333, 3_700_000_000])
def test_an_overflow_interrupts_a_computation(hz: int) -> None:
    """At the first ns at which the counter has overflowed, in the middle of it; clearing it lowers the line."""

    async def body(machine: PmuMachine, cpu: Any) -> list[Any]:
        await start(cpu, CPU_CYCLES, values=(ALL32 - 999,), interrupts=1)
        await cpu.compute(10_000)
        return [machine.line(), cpu.now]

    (line, end), log = simulate(body, unmasked=True, make=on(cpu_hz=hz))
    at = -(-1000 * 1_000_000_000 // hz)
    assert [(at, (PPI, 1))] == log
    assert (False, 10_000) == (line, end)


def test_an_overflow_waits_while_interrupts_are_masked() -> None:
    """The line is up from then on, and the interrupt is taken when it can be."""

    async def body(machine: PmuMachine, cpu: Any) -> bool:
        await start(cpu, CPU_CYCLES, values=(ALL32,), interrupts=1)
        await cpu.compute(100)
        line = machine.line()
        cpu.unmask()
        await cpu.compute(50)
        return line

    assert (True, [(100, (PPI, 1))]) == simulate(body)


def test_an_uncleared_overflow_interrupts_again() -> None:
    """The interrupt is a level: what the handler does not clear comes back at once."""
    taken: list[int] = []

    async def body(_machine: PmuMachine, cpu: Any) -> None:
        async def handler(cpu: Any) -> None:
            intid = cpu.iar1()
            taken.append(cpu.now)
            await cpu.compute(10)
            if len(taken) == 3:
                await cpu.msr("PMOVSCLR_EL0", 1)
            cpu.eoir1(intid)

        cpu.set_vector(handler)
        cpu.unmask()
        await start(cpu, CPU_CYCLES, values=(ALL32 - 99,), interrupts=1)
        await cpu.compute(1000)

    simulate(body)
    assert [100, 110, 120] == taken


def test_a_chain_of_counters_overflows_as_one() -> None:
    """A counter of event CHAIN counts the overflows of the one before it; only the pair's overflow interrupts here."""

    async def body(_machine: PmuMachine, cpu: Any) -> list[int]:
        await start(cpu, CPU_CYCLES, CHAIN, values=(ALL32 - 499, ALL32), interrupts=2)
        await cpu.compute(2000)
        return await counters(cpu, 2)

    values, log = simulate(body, unmasked=True)
    assert [(500, (PPI, 0b11))] == log
    assert [1500, 0] == values


def test_a_chain_may_be_years_long() -> None:
    """Two chained counters have 64 bits: nothing is scheduled beyond the computation, and nothing is lost."""

    async def body(_machine: PmuMachine, cpu: Any) -> list[int]:
        await start(cpu, CPU_CYCLES, CHAIN, interrupts=2)
        await cpu.compute(3 * (1 << 32) + 5)
        return await counters(cpu, 2)

    assert [5, 3] == simulate(body)[0]


@pytest.mark.spec("vcpu.pmu.irq.rule.kind")
def test_an_spi_for_each_vcpu() -> None:
    """The interrupt may be an SPI, another on each vCPU; a PPI has one number on all."""

    def make() -> PmuMachine:
        machine = PmuMachine(2, spi=40)
        machine.level_triggered()
        return machine

    async def body(machine: PmuMachine, cpu: Any) -> int:
        await start(cpu, CPU_CYCLES, values=(ALL32 - 9,), interrupts=1)
        await cpu.compute(50)
        return int(machine.vcpus[1].get_attr(PMU, IRQ, 4))

    assert (41, [(10, (40, 1))]) == simulate(body, unmasked=True, make=make)
    machine = PmuMachine(3, setup=False)
    one, two, three = (vcpu.set_attr for vcpu in machine.vcpus)
    assert [0, "EINVAL", 0, "EINVAL"] == [
        outcome(call, PMU, IRQ, intid) for call, intid in ((one, PPI), (two, PPI - 1), (two, PPI), (three, PPI + 1))
    ]


@pytest.mark.spec("vcpu.pmu.init.rule.userspace-irqchip")
def test_without_a_gic_the_vmm_learns_of_overflows() -> None:
    """KVM_RUN ends with EINTR whenever the line moves, and kvm_run says where it is."""

    async def main() -> list[Any]:
        machine = PmuMachine(gic=False)

        async def program(cpu: Any) -> None:
            await start(cpu, CPU_CYCLES, values=(ALL32 - 99,), interrupts=1)
            await cpu.compute(1000)
            await cpu.msr("PMOVSCLR_EL0", 1)
            await cpu.compute(1000)
            await cpu.system_off()

        machine.vcpus[0].load(program)
        seen = []
        for _ in range(3):
            result = await machine.run()
            levels = int.from_bytes(machine.vcpus[0].run_area[uapi.KVM_RUN_SYNC_REGS :][:8], "little")
            seen.append((fabric.now(), result, machine.exit_reason(), levels))
        return seen

    intr, event = uapi.KVM_EXIT_INTR, uapi.KVM_EXIT_SYSTEM_EVENT
    assert [
        (100, "EINTR", intr, arm.KVM_ARM_DEV_PMU),
        (1000, "EINTR", intr, 0),
        (2000, 0, event, 0),
    ] == fabric.run(main)


# -- filters


@pytest.mark.spec("vcpu.pmu.filter.rule.first-policy")
@pytest.mark.parametrize(
    ("action", "allowed"),
    [
        pytest.param(ALLOW, {CPU_CYCLES, INST_RETIRED}, id="allow"),
        pytest.param(DENY, set(EVENTS) - {CPU_CYCLES, INST_RETIRED}, id="deny"),
    ],
)
def test_the_first_filter_decides_about_the_rest(action: int, allowed: set[int]) -> None:
    """ALLOW first: all else is denied; DENY first: all else is allowed. PMCEID_EL0 follows, and so does counting."""

    def make() -> PmuMachine:
        machine = PmuMachine(setup=False)
        machine.filter(CPU_CYCLES, 1, action)
        machine.filter(INST_RETIRED, 1, action)
        machine.set_up()
        return machine

    async def body(_machine: PmuMachine, cpu: Any) -> list[Any]:
        await start(cpu, CPU_CYCLES, INST_RETIRED, LD_RETIRED, 0x4004)
        await cpu.load(0x0800_0000, 4)
        await cpu.compute(160)
        return [await cpu.mrs("PMCEID0_EL0"), *await counters(cpu, 4)]

    common, *counted = simulate(body, make=make)[0]
    counts = {CPU_CYCLES: 160, INST_RETIRED: 160, LD_RETIRED: 1, 0x4004: 10}
    assert [n if event in allowed else 0 for event, n in counts.items()] == counted
    assert sum(1 << (e & 0x1F) + (32 if e & 0x4000 else 0) for e in allowed if e & ~0x4000 < 32) == common


@pytest.mark.spec("vcpu.pmu.filter.rule.cancel", "vcpu.pmu.filter.rule.empty", "vcpu.pmu.filter.rule.vm-wide")
def test_later_filters() -> None:
    """They override for their range and leave the default; an empty one is a policy; any vCPU sets all vCPUs'."""

    def allowed(*filters: tuple[int, int, int]) -> list[bool]:
        machine = PmuMachine(2, setup=False)
        for n, (base, count, action) in enumerate(filters):
            machine.filter(base, count, action, n % 2)
        events = machine.vcpu(0).pmu.filter
        assert events is machine.vcpu(1).pmu.filter
        return [events.allows(event) for event in (0x10, CPU_CYCLES, 0x12, 0xFFFF)]

    assert [True] * 4 == allowed()
    assert [False] * 4 == allowed((CPU_CYCLES, 1, ALLOW), (CPU_CYCLES, 1, DENY))
    assert [True] * 4 == allowed((CPU_CYCLES, 1, DENY), (CPU_CYCLES, 1, ALLOW))
    assert [True, False, True, True] == allowed((0x10, 3, DENY), (0x10, 1, ALLOW), (0x12, 1, ALLOW))
    assert [False] * 4 == allowed((CPU_CYCLES, 0, ALLOW))
    assert [True] * 4 == allowed((0, 0, DENY))
    assert [False, False, False, True] == allowed((0xFFFF, 1, ALLOW))


@given(
    filters=st.lists(st.tuples(st.integers(0, 1023), st.integers(0, 1024), st.booleans()), max_size=6),
    event=st.integers(0, 1023),
)
def test_a_filter_is_the_last_word_on_its_range(filters: list[tuple[int, int, bool]], event: int) -> None:
    """The last filter with the event in its range counts, else the opposite of the first one's action."""
    events = EventFilter(10)
    expected = not filters[0][2] if filters else True
    for base, count, allow in filters:
        events.apply(base, min(count, 1024 - base), allow)
        if base <= event < base + count:
            expected = allow

    assert expected == events.allows(event)


@pytest.mark.spec("vcpu.pmu.filter.rule.cycles")
def test_the_cycle_counter_is_filtered_by_its_event() -> None:
    """By CPU_CYCLES, 0x11."""

    def make() -> PmuMachine:
        machine = PmuMachine(setup=False)
        machine.filter(CPU_CYCLES, 1, DENY)
        machine.set_up()
        return machine

    async def body(_machine: PmuMachine, cpu: Any) -> list[int]:
        await start(cpu, INST_RETIRED)
        await cpu.compute(10)
        return [*await counters(cpu, 1), await cpu.mrs("PMCCNTR_EL0")]

    assert [10, 0] == simulate(body, make=make)[0]


def test_narrow_event_numbers() -> None:
    """PMUv3 of Armv8.0 has 10 bits of them: the upper ones are not looked at, and the extended events are not there."""

    async def body(_machine: PmuMachine, cpu: Any) -> list[int]:
        await start(cpu, 0x4000 | CPU_CYCLES, 0x4004)
        await cpu.compute(100)
        return [
            *await counters(cpu, 2),
            await cpu.mrs("PMCEID0_EL0") >> 32,
            await cpu.mrs("ID_AA64DFR0_EL1") >> 8 & 0xF,
        ]

    assert [100, 0, 0, 1] == simulate(body, make=on(pmu_event_bits=10))[0]


@pytest.mark.spec("vcpu.pmu.filter.ENOMEM.alloc")
def test_a_filter_needs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM without memory for the bitmap; no filter is set then."""

    def no_memory(*_: object) -> None:
        raise MemoryError

    machine = PmuMachine(setup=False)
    monkeypatch.setattr(EventFilter, "apply", no_memory)

    assert "ENOMEM" == outcome(machine.filter, CPU_CYCLES, 1, DENY)
    assert machine.vcpu().pmu.filter.bits is None


# -- which PMU


@pytest.mark.spec("vcpu.pmu.set-pmu.rule.vm-wide", "vcpu.pmu.set-pmu.rule.placement")
def test_a_chosen_pmu_binds_the_vm_to_its_cpus() -> None:
    """On a physical CPU without it KVM_RUN ends with KVM_EXIT_FAIL_ENTRY, the reason and the CPU; elsewhere it runs."""

    async def main() -> list[Any]:
        machine = PmuMachine(3, setup=False, pmu_ids=(8, 9), pmu_cpus={8: (0, 1), 9: (2,)})
        machine.vcpus[0].set_attr(PMU, SET_PMU, 9)
        seen = []
        for number in (0, 2):
            machine.set_up(number)

            async def program(cpu: Any) -> None:
                await cpu.compute(10)
                await cpu.system_off()

            machine.vcpus[number].load(program)
            for _ in range(2 - number // 2):
                await machine.run(number)
                details = bytes(machine.vcpus[number].run_area[uapi.KVM_RUN_EXIT :][:16])
                seen.append((machine.exit_reason(number), details if number == 0 else None))
        return seen

    fail = uapi.KvmRunFailEntry(arm.KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED, 0).pack().ljust(16, b"\0")
    assert [
        (uapi.KVM_EXIT_FAIL_ENTRY, fail),
        (uapi.KVM_EXIT_FAIL_ENTRY, fail),
        (uapi.KVM_EXIT_SYSTEM_EVENT, None),
    ] == fabric.run(main)


def test_a_vcpu_moves_on_to_a_cpu_with_its_pmu() -> None:
    """With a scheduler an entry fails, before anything leaves the guest, until the vCPU comes to another CPU."""

    async def main() -> list[Any]:
        machine = PmuMachine(setup=False, pmu_ids=(8, 9), pmu_cpus={9: (1,)})
        machine.vcpus[0].set_attr(PMU, SET_PMU, 9)
        machine.set_up()
        host = Host(here(), 2)
        machine.vcpu().share(host)

        async def program(cpu: Any) -> None:
            await cpu.store(0x0900_0000, 4, 1)
            await cpu.compute(100)
            await cpu.system_off()

        machine.vcpus[0].load(program)
        seen = []
        for number in range(3):
            if number == 1:
                host._free.remove(0)  # another VM has it from now on
            await machine.run()
            seen.append((machine.exit_reason(), fabric.now()))
        return seen

    assert [
        (uapi.KVM_EXIT_FAIL_ENTRY, 0),
        (uapi.KVM_EXIT_MMIO, 0),
        (uapi.KVM_EXIT_SYSTEM_EVENT, 100),
    ] == fabric.run(main)


@pytest.mark.spec(
    "vcpu.pmu.irq.ENODEV.no-host-pmu",
    "vcpu.pmu.init.ENODEV.no-host-pmu",
    "vcpu.pmu.filter.ENODEV.no-host-pmu",
    "vcpu.pmu.set-pmu.ENODEV.no-host-pmu",
)
@pytest.mark.parametrize("attr", range(4))
def test_no_pmu_where_the_vmm_runs(attr: int) -> None:
    """The first PMU call looks for the PMU of the physical CPU that it is made on; a host may have others only."""
    machine = PmuMachine(setup=False, pmu_ids=(8,), pmu_cpus={8: (1,)})

    assert "ENODEV" == outcome(machine.vcpus[0].set_attr, PMU, attr, 8)


# -- leaving and going on


@pytest.mark.parametrize("how", ["interrupt", "cancel"])
def test_kvm_run_may_be_left_in_a_computation(how: str) -> None:
    """What is not executed is not counted, and the overflow comes so much later."""

    async def main() -> list[Any]:
        machine = PmuMachine()

        async def program(cpu: Any) -> None:
            cpu.set_vector(machine.handler)
            cpu.unmask()
            await start(cpu, CPU_CYCLES, values=(ALL32 - 499,), interrupts=1)
            await cpu.compute(1000)
            machine.note(await cpu.mrs("PMCCNTR_EL0"))
            await cpu.system_off()

        machine.vcpus[0].load(program)
        if how == "interrupt":
            machine.at(200, machine.vcpu().interrupt)
            assert "EINTR" == await machine.run()
        else:
            with trio.move_on_at(200e-9):
                await machine.run()
        await fabric.sleep(5000)
        await machine.run()
        return machine.log

    assert [(5500, (PPI, 1)), (6000, 1000)] == fabric.run(main)


@pytest.mark.spec("api.get-one-reg", "api.set-one-reg")
def test_a_pmu_goes_on_in_another_machine() -> None:
    """Its registers, written into another VM's vCPU, count on and overflow as they would have."""

    async def main() -> list[Any]:
        one, two = PmuMachine(), PmuMachine()

        async def program(cpu: Any) -> None:
            cpu.set_vector(two.handler)
            await start(cpu, CPU_CYCLES, INST_RETIRED, values=(ALL32 - 499, 7), interrupts=1)
            await cpu.compute(200)
            await cpu.store(0x0900_0000, 4, 0)
            cpu.unmask()
            await cpu.compute(1000)
            two.note(await counters(cpu, 2))
            await cpu.system_off()

        one.vcpus[0].load(program)
        await one.run()
        one.vcpus[0].run_area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1
        await one.run()
        for reg in one.vcpus[0].reg_list():
            if reg != arm.KVM_REG_ARM_TIMER_CNT:
                two.vcpus[0].set_reg(reg, one.vcpus[0].get_reg(reg))
        two.kvm.load(two.vcpus[0].fd, one.kvm.unload(one.vcpus[0].fd))
        await two.run()
        return two.log

    assert [(500, (PPI, 1)), (1200, [700, 1207])] == fabric.run(main)


@pytest.mark.spec("vcpu.pmu.init.rule.needed")
def test_a_pmu_that_is_not_initialised_keeps_a_vcpu_from_running() -> None:
    """EINVAL until KVM_ARM_VCPU_PMU_V3_INIT."""
    machine = PmuMachine(setup=False)
    vcpu = machine.vcpus[0]
    vcpu.run_area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1

    assert "EINVAL" == outcome(vcpu.ioctl, requests.KVM_RUN)
    machine.set_up()
    assert "EINTR" == outcome(vcpu.ioctl, requests.KVM_RUN)


@pytest.mark.spec(
    "vcpu.seq.pmu-setup",
    "vcpu.seq.pmu-setup.1-features",
    "vcpu.seq.pmu-setup.2-gic",
    "vcpu.seq.pmu-setup.3-set-pmu",
    "vcpu.seq.pmu-setup.4-filter",
    "vcpu.seq.pmu-setup.5-irq",
    "vcpu.seq.pmu-setup.6-init",
    "vcpu.seq.pmu-setup.7-run",
)
@pytest.mark.parametrize(
    "skipped", [None, "features", "gic", "irq", "init"], ids=lambda step: f"without {step}" if step else "all steps"
)
def test_setting_up_a_pmu(skipped: str | None) -> None:
    """In this order it succeeds and the vCPU counts; without a step that is not optional it ends in an error."""

    def steps() -> VcpuFd:
        machine = Arm(0, init=False, pmu_ids=(8, 9))
        vcpu = machine.vm.create_vcpu(0)
        vcpu.init(FEATURES if skipped != "features" else FEATURES[:1])
        if skipped != "gic":
            machine.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CTRL, arm.KVM_DEV_ARM_VGIC_CTRL_INIT)
        vcpu.set_attr(PMU, SET_PMU, 9)
        vcpu.set_attr(PMU, 2, arm.KvmPmuEventFilter(INST_RETIRED, 1, DENY))
        if skipped != "irq":
            vcpu.set_attr(PMU, IRQ, PPI)
        if skipped != "init":
            vcpu.set_attr(PMU, INIT)
        return vcpu

    async def main() -> list[int]:
        vcpu = steps()
        seen: list[int] = []

        async def program(cpu: Any) -> None:
            await start(cpu, CPU_CYCLES, INST_RETIRED)
            await cpu.compute(10)
            seen.extend(await counters(cpu, 2))
            await cpu.system_off()

        vcpu.load(program)
        await vcpu.run()
        return seen

    expected = {None: [10, 0], "features": "ENODEV", "gic": "ENODEV", "irq": "ENXIO", "init": "EINVAL"}
    assert expected[skipped] == outcome(fabric.run, main)


# -- against a plainer PMU


class NaivePmu:
    """Counters that are moved event by event, ns by ns."""

    def __init__(self, rates: list[Fraction | None], chained: list[bool]) -> None:
        self.rates = rates
        self.chained = chained
        self.values = [0] * len(rates)
        self.totals = [0] * len(rates)
        self.executed = 0
        self.enabled = self.inten = self.ovs = 0
        self.lines: list[tuple[int, bool]] = []
        self.level = False

    def tick(self, now: int) -> None:
        self.executed += 1
        for n, rate in enumerate(self.rates):
            if rate is None:
                continue
            total = int(self.executed * rate)
            for _ in range(total - self.totals[n]):
                if self.enabled >> n & 1:
                    self.count(n)
            self.totals[n] = total
        self.settle(now)

    def count(self, n: int) -> None:
        self.values[n] = self.values[n] + 1 & ALL32
        if not self.values[n]:
            self.ovs |= 1 << n
            if n % 2 == 0 and n + 1 < len(self.rates) and self.chained[n + 1] and self.enabled >> n + 1 & 1:
                self.count(n + 1)

    def settle(self, now: int) -> None:
        level = bool(self.ovs & self.inten)
        if level != self.level:
            self.level = level
            self.lines.append((now, level))


steps = st.one_of(
    st.tuples(st.just("run"), st.integers(1, 60)),
    st.tuples(st.just("idle"), st.integers(1, 20)),
    st.tuples(st.sampled_from(["enable", "disable", "inten", "intdis", "clear", "swinc"]), st.integers(0, 15)),
    st.tuples(st.integers(0, 3), st.integers(ALL32 - 40, ALL32 + 3)),
)


@given(
    types=st.lists(st.sampled_from([CPU_CYCLES, INST_RETIRED, SW_INCR, CHAIN]), min_size=4, max_size=4),
    hz=st.sampled_from([1_000_000_000, 300_000_000, 2_000_000_001]),
    ipc=st.sampled_from([Fraction(1), Fraction(1, 3), Fraction(5, 2)]),
    program=st.lists(steps, max_size=25),
)
def test_against_a_pmu_that_counts_every_event(
    types: list[int], hz: int, ipc: Fraction, program: list[tuple[str | int, int]]
) -> None:
    """Whatever is enabled, written and computed: same values, same flags, and the line moves at the same ns."""
    clock = HandClock()
    host = PmuHost(cpu_hz=hz, instructions_per_cycle=ipc, counters=4)
    pmu = Pmu(clock, host, EventFilter(16))
    chained = [event == CHAIN for event in types]
    naive = NaivePmu([host.rate(event) for event in types], chained)
    lines: list[tuple[int, bool]] = []
    pmu.sink = lambda level: lines.append((clock.now, level))
    pmu.load()
    for n, event in enumerate(types):
        pmu.write(f"PMEVTYPER{n}_EL0", event)
    pmu.write("PMCR_EL0", 1)
    for action, value in program:
        if action == "run":
            pmu.resume(value)
            start_ns = clock.now
            clock.advance_to(start_ns + value)
            pmu.pause()
            for now in range(start_ns + 1, start_ns + value + 1):
                naive.tick(now)
        elif action == "idle":
            clock.advance_to(clock.now + value)
        elif action == "swinc":
            pmu.write("PMSWINC_EL0", value)
            for n in range(4):
                if value & naive.enabled >> 0 & 1 << n and types[n] == SW_INCR:
                    naive.count(n)
        elif isinstance(action, int):
            pmu.write(f"PMEVCNTR{action}_EL0", value)
            naive.values[action] = value & ALL32
        else:
            name, field, keep = {
                "enable": ("PMCNTENSET_EL0", "enabled", True),
                "disable": ("PMCNTENCLR_EL0", "enabled", False),
                "inten": ("PMINTENSET_EL1", "inten", True),
                "intdis": ("PMINTENCLR_EL1", "inten", False),
                "clear": ("PMOVSCLR_EL0", "ovs", False),
            }[action]
            pmu.write(name, value)
            old = getattr(naive, field)
            setattr(naive, field, old | value if keep else old & ~value)
        naive.settle(clock.now)
        pmu._check()

        assert naive.values == [pmu.read(f"PMEVCNTR{n}_EL0") for n in range(4)]
        assert naive.ovs == pmu.read("PMOVSSET_EL0")
        assert naive.lines == lines
