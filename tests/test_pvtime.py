"""Stolen time in guest memory, and the other answers to hypercalls that depend on the run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from engine_programs import here
from hypothesis import given
from hypothesis import strategies as st
from kvm_machine import RAM, RAM_SIZE
from test_vcpu import DEVICE, Machine

import fabric
from fabric.uapi import arm64 as arm
from fabric.uapi import kvm as uapi
from fabric.vcpu import Host

PV_TIME_FEATURES, PV_TIME_ST = arm.ARM_SMCCC_HV_PV_TIME_FEATURES, arm.ARM_SMCCC_HV_PV_TIME_ST
TRNG_RND64, VENDOR_PTP, CPU_SUSPEND, SYSTEM_RESET2 = 0xC400_0053, 0x8600_0001, 0xC400_0001, 0xC400_0012
PAGE = RAM + 0x1000
EXTRA = 0x9000_0000
"""A slot that comes and goes."""

Body = Callable[["StealMachine", Any], Awaitable[object]]


class StealMachine(Machine):
    """vCPUs with a stolen-time structure each, 64 bytes apart in ``page``."""

    def __init__(self, vcpus: int = 1, page: int = PAGE, **options: Any) -> None:
        super().__init__(vcpus, memory=True, **options)
        self.extra = self.user.map(0x1000)
        self.vm.set_memory(1, EXTRA, 0x1000, self.extra)
        self.page = page
        for number, vcpu in enumerate(self.vcpus):
            vcpu.set_attr(arm.KVM_ARM_VCPU_PVTIME_CTRL, arm.KVM_ARM_VCPU_PVTIME_IPA, page + 64 * number)

    def structure(self, number: int = 0) -> arm.PvtimeStolenTime:
        """What the guest sees."""
        base = self.ram + self.page - RAM if self.page < EXTRA else self.extra + self.page - EXTRA
        return arm.PvtimeStolenTime.unpack(self.user.read(base + 64 * number, 16))


def shared(bodies: list[Body], *, pcpus: int = 1, slice_ns: int = 1000, page: int = PAGE) -> StealMachine:
    """Run each of ``bodies`` on a vCPU of a host with so many physical CPUs; exits go on at once."""
    machines = []

    async def main() -> None:
        machine = StealMachine(len(bodies), page)
        machines.append(machine)
        host = Host(here(), pcpus, slice_ns=slice_ns)

        async def run(number: int, body: Body) -> None:
            async def program(cpu: Any) -> None:
                await body(machine, cpu)
                await cpu.system_off()

            machine.vcpu(number).share(host)
            machine.vcpus[number].load(program)
            while True:
                await machine.run(number)
                if machine.exit_reason(number) == uapi.KVM_EXIT_SYSTEM_EVENT:
                    return

        async with trio.open_nursery() as nursery:
            for number, body in enumerate(bodies):
                nursery.start_soon(run, number, body)

    fabric.run(main)
    return machines[0]


async def enable(cpu: Any) -> int:
    """The guest asks where its structure is."""
    base: int = await cpu.hvc(PV_TIME_ST)
    return base


async def stolen_time(cpu: Any, base: int) -> int:
    """What it reads there."""
    value: int = await cpu.load(base + 8, 8)
    return value


@pytest.mark.spec(
    "vcpu.pv-time-hvc.rule.update",
    "vcpu.pvtime.ipa.rule.layout",
    "vcpu.pvtime.ipa",
    "layout.pvtime-stolen-time.rule.writer",
    "layout.pvtime-stolen-time.rule.increase",
)
def test_waiting_for_a_physical_cpu_shows_in_guest_memory() -> None:
    """Whenever the vCPU gets one, the field has advanced by the ns that it waited; revision and attributes are 0."""
    seen: list[tuple[int, int, int]] = []

    async def body(machine: StealMachine, cpu: Any) -> None:
        base = await enable(cpu)
        assert PAGE + 64 * cpu.number == base
        for _ in range(3):
            await cpu.compute(1000)
            await cpu.compute(1)
            seen.append((cpu.number, cpu.now, await stolen_time(cpu, base)))

    machine = shared([body, body])

    for number in range(2):
        own = [(now, stolen) for who, now, stolen in seen if who == number]
        assert [now - done for (now, _), done in zip(own, [1001, 2002, 3003], strict=True)] == [ns for _, ns in own]
        assert 0 < own[0][1] <= own[1][1] <= own[2][1]
    assert arm.PvtimeStolenTime(0, 0, machine.vcpu(0).stolen_ns) == machine.structure(0)


@given(
    work=st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=5), min_size=2, max_size=5),
    pcpus=st.integers(1, 3),
    slice_ns=st.integers(50, 300),
)
def test_stolen_time_is_what_is_missing(work: list[list[int]], pcpus: int, slice_ns: int) -> None:
    """At any time: the clock is what the vCPU computed plus what the guest reads as stolen."""

    def guest(parts: list[int]) -> Body:
        async def body(_machine: StealMachine, cpu: Any) -> None:
            base = await enable(cpu)
            done = 0
            for ns in parts:
                await cpu.compute(ns)
                done += ns
                assert cpu.now == done + await stolen_time(cpu, base)

        return body

    machine = shared([guest(parts) for parts in work], pcpus=pcpus, slice_ns=slice_ns)

    assert [vcpu.stolen_ns for vcpu in machine.inside.vcpus] == [
        machine.structure(number).stolen_time for number in range(len(work))
    ]


@pytest.mark.spec("vcpu.pvtime.ipa.rule.zeroed")
def test_the_guest_starts_to_count() -> None:
    """Stolen time from before it asked is not in the structure, which is cleared; asking again clears it again."""
    seen: list[int] = []

    async def body(machine: StealMachine, cpu: Any) -> None:
        await cpu.compute(2000)
        machine.user.write(machine.ram + 0x1000 + 64 * cpu.number, b"\xff" * 8)
        base = await enable(cpu)
        seen.append(await cpu.load(base, 8))
        seen.append(await stolen_time(cpu, base))
        await cpu.compute(2000)
        if cpu.number == 0:
            assert await stolen_time(cpu, base) == machine.vcpu(0).stolen_ns - machine.vcpu(0).stolen.told_ns + 2000
        await enable(cpu)
        seen.append(await stolen_time(cpu, base))

    machine = shared([body, body])
    assert [0] * 6 == seen
    assert machine.vcpu(0).stolen_ns > 0


@pytest.mark.parametrize("how", ["removed", "read-only", "unmapped"])
def test_a_structure_that_cannot_be_written(how: str) -> None:
    """A slot that was removed, is read-only now, or has nothing behind it: the run goes on, and nothing is lost."""
    seen: list[int] = []

    def take(machine: StealMachine) -> None:
        if how == "unmapped":
            machine.user.unmap(machine.extra)
            return
        machine.vm.set_memory(1, EXTRA, 0)
        if how == "read-only":
            machine.vm.set_memory(1, EXTRA, 0x1000, machine.extra, uapi.KVM_MEM_READONLY)

    def give(machine: StealMachine) -> None:
        if how == "unmapped":
            return
        if how == "read-only":
            machine.vm.set_memory(1, EXTRA, 0)
        machine.vm.set_memory(1, EXTRA, 0x1000, machine.extra)

    async def first(machine: StealMachine, cpu: Any) -> None:
        base = await enable(cpu)
        machine.at(1500, take, machine)
        machine.at(3500, give, machine)
        await cpu.compute(3000)
        if how != "unmapped":
            seen.append(cpu.now - 3000 - await stolen_time(cpu, base))
        await enable(cpu)

    async def second(_machine: StealMachine, cpu: Any) -> None:
        await cpu.compute(5000)

    machine = shared([first, second], page=EXTRA)
    assert machine.vcpu(0).stolen_ns >= 2000
    assert seen == ([] if how == "unmapped" else [0])


def test_each_entry_brings_it_up_to_date() -> None:
    """Also one after an exit: what the VMM wrote over the field is added to, not replaced, as in KVM."""
    seen: list[int] = []

    async def body(machine: StealMachine, cpu: Any) -> None:
        base = await enable(cpu)
        machine.user.write(machine.ram + 0x1008, (1 << 40).to_bytes(8, "little"))
        await cpu.store(DEVICE, 4, 0)
        seen.append(await stolen_time(cpu, base))

    shared([body])
    assert [1 << 40] == seen


def test_a_host_with_enough_cpus_steals_nothing() -> None:
    """The structure is there and stays 0."""

    async def main() -> arm.PvtimeStolenTime:
        machine = StealMachine()

        async def program(cpu: Any) -> None:
            await enable(cpu)
            await cpu.compute(10_000)
            await cpu.system_off()

        machine.vcpus[0].load(program)
        await machine.run()
        return machine.structure()

    assert arm.PvtimeStolenTime(0, 0, 0) == fabric.run(main)


def test_its_writes_are_in_the_dirty_log() -> None:
    """The host's writes to guest memory are seen by a migration."""

    async def main() -> tuple[bool, bool]:
        machine = StealMachine()
        machine.vm.set_memory(0, RAM, RAM_SIZE, machine.ram, uapi.KVM_MEM_LOG_DIRTY_PAGES)

        async def program(cpu: Any) -> None:
            await cpu.store(DEVICE, 4, 0)
            await cpu.system_off()

        machine.vcpus[0].load(program)
        before = machine.vm.dirty_log(0, RAM_SIZE >> 12)
        await machine.run()
        after = machine.vm.dirty_log(0, RAM_SIZE >> 12)
        return bool(before[0] & 2), bool(after[0] & 2)

    assert (False, True) == fabric.run(main)


# -- other hypercalls


def call(*calls: tuple[int, ...], seed: int = 0) -> list[tuple[int, int, int, int]]:
    """What a guest gets for these hypercalls."""
    answers = []

    async def main() -> None:
        machine = Machine()

        async def program(cpu: Any) -> None:
            await cpu.compute(1600)
            answers.extend([await cpu.smccc(*one) for one in calls])
            await cpu.system_off()

        machine.vcpus[0].load(program)
        await machine.run()

    fabric.run(main, seed=seed)
    return answers


def test_entropy_comes_from_the_seed() -> None:
    """As many bits as asked for, the same in the same run and others with another seed."""
    one, again, other = (call((TRNG_RND64, 100), (TRNG_RND64, 192), seed=seed) for seed in (1, 1, 2))

    assert one == again
    assert one != other
    (status, x1, x2, x3), more = one
    assert (0, 0, True) == (status, x1, x2 < 1 << 36)
    assert x3 != more[3]


def test_the_clock_pair() -> None:
    """Time of day and a counter, taken at one instant, in halves: the virtual counter (0) or the physical (1)."""
    assert [(0, 1600, 0, 100), (0, 1600, 0, 100), (-1, 0, 0, 0)] == call(
        (VENDOR_PTP, 0), (VENDOR_PTP, 1), (VENDOR_PTP, 2)
    )


def test_a_suspended_cpu_waits_for_an_interrupt() -> None:
    """PSCI CPU_SUSPEND is a halt here, and succeeds."""

    async def main() -> list[Any]:
        machine = Machine()

        async def program(cpu: Any) -> None:
            machine.note(await cpu.hvc(CPU_SUSPEND, 0, 0, 0))
            await cpu.system_off()

        machine.vcpus[0].load(program)
        machine.at(500, machine.raise_spi)
        await machine.run()
        return machine.log

    assert [(500, 0)] == fabric.run(main)


def test_system_reset2() -> None:
    """The VMM learns that it was this kind of reset; a guest that is let go on is told of a failure."""

    async def main() -> Any:
        machine = Machine()
        answers = []

        async def program(cpu: Any) -> None:
            answers.append(await cpu.hvc(SYSTEM_RESET2, 1 << 31, 0))
            await cpu.system_off()

        machine.vcpus[0].load(program)
        await machine.run()
        event = uapi.KvmRunSystemEvent.unpack(bytes(machine.vcpus[0].run_area[uapi.KVM_RUN_EXIT :]))
        await machine.run()
        return event.type, event.ndata, event.data[0], answers

    assert (uapi.KVM_SYSTEM_EVENT_RESET, 1, 1, [-6]) == fabric.run(main)
