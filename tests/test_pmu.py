"""The PMU of an arm64 vCPU: what its counters count, when they overflow, who learns of it."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import trio
from engine_programs import here
from kvm_machine import outcome
from pmu_machine import CYCLE, IRQ, PPI, PmuMachine, counters, simulate, start

import fabric
from fabric.uapi import arm64 as arm
from fabric.uapi import kvm as uapi
from fabric.vcpu import Costs, Host
from fabric.vcpu.pmu import (
    CHAIN,
    CPU_CYCLES,
    EXC_RETURN,
    EXC_TAKEN,
    INST_RETIRED,
    LD_RETIRED,
    MEM_ACCESS,
    ST_RETIRED,
    SW_INCR,
)

PMU = arm.KVM_ARM_VCPU_PMU_V3_CTRL
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
