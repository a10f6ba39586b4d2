"""Physical CPUs: more vCPUs than there are wait for one another, and the wait is stolen time; costs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from engine_programs import here
from hypothesis import given
from hypothesis import strategies as st
from test_vcpu import DEVICE, SPI, Machine

import fabric
from fabric.errors import KvmError
from fabric.memory import MmioHandler
from fabric.vcpu import Costs, Host

Body = Callable[[Any], Awaitable[object]]


def shared(pcpus: int, *bodies: Body, slice_ns: int = 1000, switch_ns: int = 0) -> Machine:
    """Run each of ``bodies`` to its end on a vCPU of a host with so many physical CPUs; notes when that was."""
    machines = []

    async def main() -> None:
        machine = Machine(len(bodies))
        machines.append(machine)
        host = Host(here(), pcpus, slice_ns=slice_ns, switch_ns=switch_ns)

        async def run(number: int, body: Body) -> None:
            async def program(cpu: Any) -> None:
                cpu.set_vector(machine.handler)
                await body(cpu)
                machine.note(number)
                await cpu.system_off()

            machine.vcpu(number).share(host)
            machine.vcpus[number].load(program)
            await machine.run(number)

        async with trio.open_nursery() as nursery:
            for number, body in enumerate(bodies):
                nursery.start_soon(run, number, body)

    fabric.run(main)
    return machines[0]


def compute(ns: int) -> Body:
    """A guest that computes for so long."""
    return lambda cpu: cpu.compute(ns)


def stolen(machine: Machine) -> list[int]:
    """Stolen time by vCPU."""
    return [machine.vcpu(number).stolen_ns for number in range(len(machine.vcpus))]


def test_enough_physical_cpus_steal_nothing() -> None:
    """With one for each, vCPUs compute at the same time."""
    machine = shared(3, *[compute(5000)] * 3)

    assert [(5000, 0), (5000, 1), (5000, 2)] == machine.log
    assert [0, 0, 0] == stolen(machine)


def test_one_physical_cpu_is_shared_in_slices() -> None:
    """Round robin: each computes for a slice, then waits for its turn; the waiting adds up to its stolen time."""
    machine = shared(1, *[compute(2500)] * 2)

    assert [(4500, 0), (5000, 1)] == machine.log
    assert [2000, 2500] == stolen(machine)


@pytest.mark.parametrize(("vcpus", "pcpus"), [(3, 1), (5, 2), (8, 3)])
def test_time_adds_up(vcpus: int, pcpus: int) -> None:
    """Every vCPU's end is what it computed plus what was stolen from it; no physical CPU idles while one waits."""
    machine = shared(pcpus, *[compute(10_000)] * vcpus)
    ends = {number: at for at, number in machine.log}

    assert [ends[number] for number in range(vcpus)] == [10_000 + ns for ns in stolen(machine)]
    assert vcpus * 10_000 / pcpus <= max(ends.values()) < vcpus * 10_000 / pcpus + 10_000
    assert max(ends.values()) - min(ends.values()) <= 10_000  # nobody is starved


def test_a_slice_goes_on_while_nobody_waits() -> None:
    """A vCPU alone computes without a break, and is preempted once its slice is over and another has come."""

    async def late(cpu: Any) -> None:
        await cpu.wait_for_interrupt(1500)
        await cpu.compute(100)

    machine = shared(1, compute(5000), late)

    assert [(2100, 1), (5100, 0)] == machine.log  # slices from 0, renewed at 1000, over at 2000
    assert [100, 500] == stolen(machine)


def test_a_halt_gives_the_physical_cpu_away() -> None:
    """A vCPU that halts holds none, and waits for one when it is woken."""

    async def halts(cpu: Any) -> None:
        await cpu.compute(100)
        await cpu.wait_for_interrupt(300)
        await cpu.compute(100)

    machine = shared(1, halts, compute(600))

    assert [(700, 1), (800, 0)] == machine.log
    assert [400, 100] == stolen(machine)


@pytest.mark.parametrize("masked", [True, False])
def test_a_woken_vcpu_needs_a_physical_cpu_to_go_on(masked: bool) -> None:
    """Waking is not running: what it does after a halt waits for the physical CPU, interrupts as well."""
    seen: list[int] = []

    async def halts(cpu: Any) -> None:
        if not masked:
            cpu.unmask()
        here().timer(lambda: machine_of(cpu).raise_spi()).arm(50)
        await cpu.wait_for_interrupt()
        seen.append(cpu.now)

    def machine_of(cpu: Any) -> Any:
        class Lines:
            @staticmethod
            def raise_spi() -> None:
                gic = cpu._vcpu.vm.irqchip
                gic.inject_spi(SPI, True)
                gic.inject_spi(SPI, False)

        return Lines

    machine = shared(1, halts, compute(700))

    assert [700 if masked else 710] == seen
    assert masked or (700, ("taken", SPI)) in machine.log
    assert 650 == stolen(machine)[0]


def test_a_stopped_vcpu_gives_the_physical_cpu_away() -> None:
    """Also when its program just returned."""

    async def main() -> list[tuple[int, object]]:
        machine = Machine(2)
        host = Host(here(), 1)

        async def returns(cpu: Any) -> None:
            await cpu.compute(100)

        async def other(cpu: Any) -> None:
            await cpu.compute(100)
            machine.note("other")
            await cpu.system_off()

        for number, program in enumerate((returns, other)):
            machine.vcpu(number).share(host)
            machine.vcpus[number].load(program)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.run, 0)
            await fabric.sleep(1)
            await machine.run(1)
            nursery.cancel_scope.cancel()
        return machine.log

    assert [(200, "other")] == fabric.run(main)


def test_an_exit_gives_the_physical_cpu_away() -> None:
    """Outside KVM_RUN a vCPU holds none."""

    async def exits(cpu: Any) -> None:
        await cpu.compute(100)
        await cpu.store(DEVICE, 4, 1)

    machine = shared(1, exits, compute(100))

    assert [(200, 1)] == machine.log
    assert [0, 100] == stolen(machine)


def test_a_preferred_physical_cpu() -> None:
    """A vCPU goes back to where it ran last if that is free, and pays for a switch only otherwise."""

    async def in_parts(cpu: Any) -> None:
        for _ in range(3):
            await cpu.compute(100)
            await cpu.wait_for_interrupt(cpu.now + 50)

    machine = shared(2, in_parts, in_parts, switch_ns=7)

    assert [(457, 0), (457, 1)] == machine.log


def test_switching_takes_time() -> None:
    """Each change of the vCPU of a physical CPU costs, and is no stolen time of the one that comes."""
    machine = shared(1, compute(1500), compute(500), switch_ns=10)

    # 0: switch, 1000; 1: switch, 500; 0: switch, 500.
    assert [(1520, 1), (2030, 0)] == machine.log
    assert [510, 1010] == stolen(machine)


@pytest.mark.parametrize("at", [5, 50, 105, 300], ids=["switching", "computing", "waiting for its slice", "waiting"])
@pytest.mark.parametrize("how", ["interrupt", "cancel"])
def test_a_run_can_be_left_wherever_it_is(at: int, how: str) -> None:
    """Switching, computing, waiting for a physical CPU: KVM_RUN is left at once and the guest goes on later."""

    async def main() -> list[tuple[int, object]]:
        machine = Machine(2)
        host = Host(here(), 1, slice_ns=100, switch_ns=10)

        async def program(cpu: Any) -> None:
            await cpu.compute(1000)
            machine.note(cpu.number)
            await cpu.system_off()

        async def left() -> None:
            if how == "interrupt":
                machine.at(at, machine.vcpu(0).interrupt)
                assert "EINTR" == await machine.run(0)
            else:
                with trio.move_on_at(at / 1e9):
                    await machine.run(0)
            # A switch is not interrupted in the middle.
            assert fabric.now() == (10 if (at, how) == (5, "interrupt") else at)
            assert machine.vcpu(0).pcpu is None
            stolen_before = machine.vcpu(0).stolen_ns
            await fabric.sleep(5000)
            assert machine.vcpu(0).stolen_ns == stolen_before
            await machine.run(0)

        for number in range(2):
            machine.vcpu(number).share(host)
            machine.vcpus[number].load(program)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left)
            nursery.start_soon(machine.run, 1)
        assert [0] == host._free
        return machine.log

    first, second = fabric.run(main)

    assert 1 == first[1]
    assert 0 == second[1]
    assert 5000 + at < second[0] <= 6030 + at


def test_manual_time_and_a_cancelled_wait_do_not_lose_a_physical_cpu() -> None:
    """One given to a vCPU whose KVM_RUN is cancelled at that instant goes on to the next."""

    async def main() -> None:
        machine = Machine(3)
        host = Host(here(), 1, slice_ns=100)

        async def program(cpu: Any) -> None:
            await cpu.compute(150)
            machine.note(cpu.number)
            await cpu.system_off()

        for number in range(3):
            machine.vcpu(number).share(host)
            machine.vcpus[number].load(program)
        scope = trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                await machine.run(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.run, 0)
            nursery.start_soon(cancelled)
            nursery.start_soon(machine.run, 2)
            machine.at(100, scope.cancel)
        assert [0, 2] == [number for _, number in machine.log]
        assert [0] == host._free
        assert not host.waiting

    fabric.run(main)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"pcpus": 0}, "at least one physical CPU"), ({"pcpus": 1, "slice_ns": 0}, "at least 1 ns")],
)
def test_a_host_that_cannot_be_is_refused(arguments: dict[str, int], words: str) -> None:
    """At least one physical CPU, and slices that end."""
    with pytest.raises(ValueError, match=words):
        Host(None, **arguments)  # type: ignore[arg-type]


# Costs.


class Frame(MmioHandler):
    """A register that the kernel emulates."""

    def mmio_read(self, offset: int, size: int, vcpu: Any) -> int:
        return 7

    def mmio_write(self, offset: int, size: int, value: int, vcpu: Any) -> None:
        pass


class MappedFrame(Frame):
    """One that the hardware answers; a write to 0x10 ends an interrupt."""

    exits = False
    eoi_offset = 0x10


@pytest.mark.parametrize(("frame", "ends"), [(Frame(), (11, 22, 33)), (MappedFrame(), (0, 0, 5))])
def test_frames_that_hardware_answers_cost_no_exit(frame: Frame, ends: tuple[int, ...]) -> None:
    """Neither loads nor stores; the write that ends an interrupt costs what an end costs, with what comes next."""
    seen = []

    async def program(cpu: Any) -> None:
        assert 7 == await cpu.load(DEVICE, 4)
        seen.append(fabric.now())
        await cpu.store(DEVICE, 4, 0)
        seen.append(fabric.now())
        await cpu.store(DEVICE + 0x10, 4, 0)
        await cpu.compute(0)
        seen.append(fabric.now())
        await cpu.system_off()

    async def main() -> None:
        machine = Machine()
        machine.kvm.vm(machine.vm.fd).mmio.add(DEVICE, 0x20, frame)
        machine.vcpu().costs = Costs(exit_ns=11, eoi_ns=5)
        machine.vcpus[0].load(program)
        await machine.run()

    fabric.run(main)
    assert ends == tuple(seen)


@pytest.mark.parametrize(
    ("costs", "end"),
    [
        pytest.param(Costs(), 120, id="none"),
        pytest.param(Costs(injection_ns=3), 123, id="injection"),
        pytest.param(Costs(eoi_ns=5), 125, id="eoi"),
        pytest.param(Costs(wakeup_ns=7), 127, id="wake-up"),
        pytest.param(Costs(exit_ns=11), 131, id="exit"),
        pytest.param(Costs(userspace_exit_ns=13), 133, id="userspace exit"),
    ],
)
def test_each_cost_is_paid_where_it_arises(costs: Costs, end: int) -> None:
    """A guest that is woken at 100 ns, handles its interrupt for 10, computes for 10 and is off."""

    async def main() -> int:
        machine = Machine()
        machine.vcpu().costs = costs

        async def program(cpu: Any) -> None:
            cpu.set_vector(machine.handler)
            cpu.unmask()
            await cpu.wait_for_interrupt()
            cpu.mask()
            await cpu.compute(10)
            await cpu.system_off()

        machine.vcpus[0].load(program)
        machine.at(100, machine.raise_spi)
        await machine.run()
        return fabric.now()

    assert end == fabric.run(main)


@pytest.mark.parametrize("pcpus", [None, 1])
def test_an_end_of_interrupt_that_is_a_plain_call_is_paid_for_next(pcpus: int | None) -> None:
    """``eoir1`` ends the interrupt at once; its cost passes with the next wait or computation, before that begins."""

    async def main() -> list[int]:
        machine = Machine()
        vcpu = machine.vcpu()
        vcpu.costs = Costs(eoi_ns=5)
        if pcpus is not None:
            vcpu.share(Host(here(), pcpus))
        times = []

        async def program(cpu: Any) -> None:
            for _ in range(2):
                await cpu.wait_for_interrupt()
                times.append(cpu.now)
                cpu.eoir1(cpu.iar1())
                times.append(cpu.now)
            await cpu.compute(10)
            times.append(cpu.now)
            await cpu.system_off()

        machine.vcpus[0].load(program)
        machine.at(100, machine.raise_spi)
        machine.at(102, machine.raise_spi)
        await machine.run()
        return times

    assert [100, 100, 105, 105, 120] == fabric.run(main)


def test_costs_are_ints() -> None:
    """Nanoseconds, 0 or more."""
    for value in (-1, 1.5):
        with pytest.raises(ValueError, match="cost eoi_ns must be an int >= 0 ns"):
            Costs(eoi_ns=value)  # type: ignore[arg-type]


bodies = st.lists(
    st.lists(st.tuples(st.sampled_from(["compute", "halt", "store"]), st.integers(0, 50)), max_size=5),
    min_size=1,
    max_size=5,
)
disturbances = st.lists(
    st.tuples(st.sampled_from(["spi", "interrupt", "cancel"]), st.integers(0, 4), st.integers(0, 300)), max_size=8
)


@given(bodies, disturbances, st.integers(1, 3), st.sampled_from([0, 5]), st.booleans())
def test_computing_takes_exactly_its_time(
    scripts: list[list[tuple[str, int]]],
    disturb: list[tuple[str, int, int]],
    pcpus: int,
    switch_ns: int,
    scarce: bool,
) -> None:
    """Whatever disturbs them: guests end, physical CPUs come back, and time on them is what guests computed."""

    async def main() -> None:
        machine = Machine(len(scripts))
        host = Host(here(), pcpus, slice_ns=20, switch_ns=switch_ns)
        scopes = [trio.CancelScope() for _ in scripts]
        over = [False] * len(scripts)

        async def program(cpu: Any) -> None:
            await cpu.msr("ICC_PMR_EL1", 0xF0)
            await cpu.msr("ICC_IGRPEN1_EL1", 1)
            cpu.set_vector(machine.handler)
            cpu.unmask()
            for action, ns in scripts[cpu.number]:
                began, stolen_before = cpu.now, cpu._vcpu.stolen_ns
                if action == "compute":
                    await cpu.compute(ns)
                    assert cpu.now - began >= ns + cpu._vcpu.stolen_ns - stolen_before
                elif action == "halt":
                    await cpu.wait_for_interrupt(began + ns)
                else:
                    await cpu.store(DEVICE, 1, ns)
            over[cpu.number] = True
            await cpu.system_off()

        async def vmm(number: int) -> None:
            while not over[number]:
                with scopes[number]:
                    try:
                        await machine.vcpus[number].run()
                    except KvmError:
                        await fabric.sleep(3)
                scopes[number] = trio.CancelScope()

        def act(what: str, number: int) -> None:
            if what == "spi":
                machine.raise_spi()
            elif what == "interrupt":
                machine.vcpu(number).interrupt()
            else:
                scopes[number].cancel()

        for number in range(len(scripts)):
            if scarce:
                machine.vcpu(number).share(host)
            machine.vcpus[number].load(program)
        for what, number, ns in disturb:
            machine.at(ns, act, what, number % len(scripts))
        async with trio.open_nursery() as nursery:
            for number in range(len(scripts)):
                nursery.start_soon(vmm, number)
        assert list(range(pcpus)) == sorted(host._free)
        assert not host.waiting
        for number in range(len(scripts)):
            assert (False, None) == (machine.vcpu(number).running, machine.vcpu(number).pcpu)

    fabric.run(main)
