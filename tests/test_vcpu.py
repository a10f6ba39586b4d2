"""vCPUs: computing and halting, interrupts, exits, and KVM_RUN being left and entered again."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import pytest
import trio
from engine_programs import here
from kvm_machine import Arm

import fabric
from fabric.clock.engine import current_engine
from fabric.errors import Deadlock, KvmError
from fabric.uapi import kvm as uapi
from fabric.uapi.arm64 import KVM_ARM_VCPU_PSCI_0_2
from fabric.uapi.kvm import KvmRunMmio, KvmRunSystemEvent
from fabric.vcpu import Costs

DEVICE = 0x0900_0000
"""Guest physical address that nobody but the VMM claims."""
SPI = 32
PSCI_CPU_ON, PSCI_CPU_OFF, PSCI_AFFINITY_INFO, PSCI_SYSTEM_RESET = 0xC400_0003, 0x8400_0002, 0xC400_0004, 0x8400_0009

color: ContextVar[str] = ContextVar("color", default="none")


class Machine(Arm):
    """A VM whose SPIs go to vCPU 0, with what tests do to it."""

    features = (KVM_ARM_VCPU_PSCI_0_2,)

    def __init__(self, vcpus: int = 1, **options: Any) -> None:
        super().__init__(vcpus, **options)
        self.log: list[tuple[int, object]] = []
        if self.gic_made:
            self.set_gicd(0xC08, 0xAAAA_AAAA)  # SPIs 32 to 47 are edge-triggered
            self.forward()

    @property
    def gic_made(self) -> bool:
        """Whether there is a GIC."""
        return hasattr(self, "gic")

    def note(self, what: object) -> None:
        """Log ``what`` with the time."""
        self.log.append((fabric.now(), what))

    def raise_spi(self, spi: int = SPI) -> None:
        """An edge."""
        self.vm.irq_line(1 << 24 | spi, 1)
        self.vm.irq_line(1 << 24 | spi, 0)

    def at(self, ns: int, action: Callable[..., object], *args: object) -> None:
        """Do something later."""
        here().timer(lambda: action(*args)).arm(ns)

    def vcpu(self, number: int = 0) -> Any:
        """The vCPU behind the fd."""
        return self.kvm.vcpu(self.vcpus[number].fd)

    async def run(self, number: int = 0) -> object:
        """KVM_RUN: 0 or the name of the errno."""
        try:
            return await self.vcpus[number].run()
        except KvmError as error:
            return errno.errorcode[error.errno or 0]

    async def handler(self, cpu: Any) -> None:
        """Acknowledge, work for 10 ns, end."""
        intid = await cpu.mrs("ICC_IAR1_EL1")
        self.note(("taken", intid))
        await cpu.compute(10)
        await cpu.msr("ICC_EOIR1_EL1", intid)

    def mmio(self, number: int = 0) -> KvmRunMmio:
        """What the last exit left in the run area."""
        return KvmRunMmio.unpack(bytes(self.vcpus[number].run_area[uapi.KVM_RUN_EXIT :][: KvmRunMmio.SIZE]))

    def exit_reason(self, number: int = 0) -> int:
        """Why KVM_RUN returned."""
        return int.from_bytes(self.vcpus[number].run_area[uapi.KVM_RUN_EXIT_REASON :][:4], "little")


Program = Callable[[Any], Awaitable[object]]


def simulate(
    main: Callable[[Machine], Awaitable[object]], *programs: Callable[[Machine], Program], **options: Any
) -> list[tuple[int, object]]:
    """Run ``main`` with a machine whose vCPUs have ``programs``; returns the machine's log."""
    machines = []

    async def start() -> None:
        machine = Machine(len(programs), **options)
        machines.append(machine)
        for vcpu, program in zip(machine.vcpus, programs, strict=True):
            vcpu.load(program(machine))
        await main(machine)

    fabric.run(start)
    return machines[0].log


async def one_run(machine: Machine) -> None:
    """KVM_RUN of vCPU 0 until its first exit."""
    assert 0 == await machine.run()


def guest(body: Callable[[Machine, Any], Awaitable[object]], *, unmasked: bool = False) -> Callable[[Machine], Program]:
    """A program: ``body(machine, cpu)``, then SYSTEM_OFF."""

    def bind(machine: Machine) -> Program:
        async def program(cpu: Any) -> None:
            cpu.set_vector(machine.handler)
            if unmasked:
                cpu.unmask()
            await body(machine, cpu)
            machine.note("end")
            await cpu.system_off()

        return program

    return bind


async def compute_100(machine: Machine, cpu: Any) -> None:
    await cpu.compute(100)


async def halt(machine: Machine, cpu: Any) -> None:
    await cpu.wait_for_interrupt()


async def access(machine: Machine, cpu: Any) -> None:
    machine.note(await cpu.load(DEVICE, 4))
    await cpu.store(DEVICE + 8, 2, 0x12345)


# Computing and interrupts.


def test_compute_takes_its_time() -> None:
    """``compute(ns)`` is ns of virtual time; 0 is none."""

    async def body(machine: Machine, cpu: Any) -> None:
        await cpu.compute(0)
        machine.note("zero")
        await cpu.compute(100)

    assert [(0, "zero"), (100, "end")] == simulate(one_run, guest(body))


def test_compute_is_preempted_by_an_interrupt() -> None:
    """An interrupt is taken at its nanosecond, and the computation takes its whole time besides."""

    async def main(machine: Machine) -> None:
        machine.at(30, machine.raise_spi)
        machine.at(60, machine.raise_spi, SPI + 1)
        await machine.run()

    log = simulate(main, guest(compute_100, unmasked=True))

    assert [(30, ("taken", SPI)), (60, ("taken", SPI + 1)), (120, "end")] == log


def test_an_interrupt_in_a_handler_waits_for_its_end() -> None:
    """Handlers run with interrupts masked; what came meanwhile follows at once."""

    async def main(machine: Machine) -> None:
        machine.at(30, machine.raise_spi)
        machine.at(35, machine.raise_spi, SPI + 1)
        await machine.run()

    log = simulate(main, guest(compute_100, unmasked=True))

    assert [(30, ("taken", SPI)), (40, ("taken", SPI + 1)), (120, "end")] == log


def test_masked_compute_is_not_preempted() -> None:
    """A program begins with interrupts masked: they stay pending until it unmasks and computes or waits."""

    async def body(machine: Machine, cpu: Any) -> None:
        await cpu.compute(100)
        machine.note("unmasks")
        cpu.unmask()
        machine.note("not taken here")
        await cpu.compute(0)

    async def main(machine: Machine) -> None:
        machine.at(30, machine.raise_spi)
        await machine.run()

    log = simulate(main, guest(body))

    assert [(100, "unmasks"), (100, "not taken here"), (100, ("taken", SPI)), (110, "end")] == log


def test_interrupts_are_taken_only_in_compute_and_waits() -> None:
    """Not in register accesses, loads and stores, also when those take time."""

    async def body(machine: Machine, cpu: Any) -> None:
        machine.raise_spi()
        await cpu.mrs("MPIDR_EL1")
        await cpu.load(0x0800_0000, 4)
        machine.note("accessed")
        await cpu.compute(1)

    async def main(machine: Machine) -> None:
        machine.vcpu().costs = Costs(exit_ns=50)
        await machine.run()

    log = simulate(main, guest(body, unmasked=True))

    assert [(50, "accessed"), (50, ("taken", SPI)), (61, "end")] == log


def test_an_interrupt_at_the_end_of_a_computation() -> None:
    """One that comes at its last nanosecond is still taken inside."""

    async def main(machine: Machine) -> None:
        machine.at(100, machine.raise_spi)
        await machine.run()

    assert [(100, ("taken", SPI)), (110, "end")] == simulate(main, guest(compute_100, unmasked=True))


def test_handlers_may_be_preempted_by_handlers() -> None:
    """A handler that unmasks is preempted by an interrupt of higher priority, and its time goes on afterwards."""

    async def body(machine: Machine, cpu: Any) -> None:
        async def handler(cpu: Any) -> None:
            intid = await cpu.mrs("ICC_IAR1_EL1")
            machine.note(("taken", intid))
            if intid == SPI:
                cpu.unmask()
                await cpu.compute(50)
                cpu.mask()
            machine.note(("ended", intid))
            await cpu.msr("ICC_EOIR1_EL1", intid)

        cpu.set_vector(handler)
        await cpu.compute(100)

    async def main(machine: Machine) -> None:
        machine.set_gicd(0x400 + SPI, 0x00_00_40_80)  # GICD_IPRIORITYR: 0x80, then 0x40
        machine.at(30, machine.raise_spi)
        machine.at(40, machine.raise_spi, SPI + 1)
        await machine.run()

    expected = [
        (30, ("taken", SPI)),
        (40, ("taken", SPI + 1)),
        (40, ("ended", SPI + 1)),
        (80, ("ended", SPI)),
        (150, "end"),
    ]

    assert expected == simulate(main, guest(body, unmasked=True))


def test_wfi_takes_the_interrupt_that_wakes_it() -> None:
    """Unmasked, the handler has run when the wait returns."""

    async def main(machine: Machine) -> None:
        machine.at(30, machine.raise_spi)
        await machine.run()

    assert [(30, ("taken", SPI)), (40, "end")] == simulate(main, guest(halt, unmasked=True))


def test_masked_wfi_wakes_and_takes_nothing() -> None:
    """A masked wait ends when an interrupt is pending; the program may acknowledge it itself."""

    async def body(machine: Machine, cpu: Any) -> None:
        await cpu.wait_for_interrupt()
        machine.note(await cpu.mrs("ICC_IAR1_EL1"))

    async def main(machine: Machine) -> None:
        machine.at(30, machine.raise_spi)
        await machine.run()

    assert [(30, SPI), (30, "end")] == simulate(main, guest(body))


@pytest.mark.parametrize("unmasked", [True, False])
def test_wfi_does_not_wait_for_what_is_there(unmasked: bool) -> None:
    """With an interrupt pending already it returns at once."""

    async def main(machine: Machine) -> None:
        machine.raise_spi()
        await machine.run()

    expected: list[tuple[int, object]] = [(0, ("taken", SPI)), (10, "end")] if unmasked else [(0, "end")]

    assert expected == simulate(main, guest(halt, unmasked=unmasked))


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        pytest.param(50, [(30, ("taken", SPI)), (40, "end")], id="interrupt-first"),
        pytest.param(20, [(20, "end")], id="time-first"),
        pytest.param(0, [(0, "end")], id="past"),
    ],
)
def test_wfit_ends_at_its_time(until: int, expected: list[tuple[int, object]]) -> None:
    """A wait with a time ends with the first interrupt or at that time."""

    async def body(machine: Machine, cpu: Any) -> None:
        await cpu.wait_for_interrupt(until)

    async def main(machine: Machine) -> None:
        machine.at(30, machine.raise_spi)
        await machine.run()

    assert expected == simulate(main, guest(body, unmasked=True))


def test_an_interrupt_taken_back_does_not_end_a_wait() -> None:
    """A line that is lowered before the vCPU runs leaves it halted."""

    async def main(machine: Machine) -> None:
        machine.level_triggered()

        def pulse() -> None:
            machine.vm.irq_line(1 << 24 | SPI, 1)
            machine.vm.irq_line(1 << 24 | SPI, 0)

        machine.at(30, pulse)
        machine.at(50, machine.vm.irq_line, 1 << 24 | SPI, 1)
        await machine.run()

    async def body(machine: Machine, cpu: Any) -> None:
        await cpu.wait_for_interrupt()

    assert [(50, "end")] == simulate(main, guest(body))


def test_unmasking_needs_a_handler() -> None:
    """A program that unmasks without a vector is wrong, and hears so."""

    def bind(machine: Machine) -> Program:
        async def program(cpu: Any) -> None:
            with pytest.raises(RuntimeError, match="set_vector"):
                cpu.unmask()
            with pytest.raises(ValueError, match="cannot compute"):
                await cpu.compute(-1)
            await cpu.system_off()

        return program

    simulate(one_run, bind)


def test_a_vm_without_interrupt_controller() -> None:
    """Its vCPUs compute unmasked and halt; nothing but time wakes them."""

    async def body(machine: Machine, cpu: Any) -> None:
        await cpu.compute(10)
        await cpu.wait_for_interrupt(50)

    assert [(50, "end")] == simulate(one_run, guest(body, unmasked=True), gic=False)


# Exits.


def test_an_access_that_nobody_claims_exits() -> None:
    """KVM_EXIT_MMIO suspends the program inside its access; the next KVM_RUN completes it."""

    async def main(machine: Machine) -> None:
        assert 0 == await machine.run()
        assert uapi.KVM_EXIT_MMIO == machine.exit_reason()
        mmio = machine.mmio()
        assert (DEVICE, 4, 0) == (mmio.phys_addr, mmio.len, mmio.is_write)
        area = machine.vcpus[0].run_area
        area[uapi.KVM_RUN_EXIT + 8 : uapi.KVM_RUN_EXIT + 16] = bytes.fromhex("7856341299999999")
        await fabric.sleep(25)
        assert 0 == await machine.run()
        mmio = machine.mmio()
        assert (DEVICE + 8, 2, 1) == (mmio.phys_addr, mmio.len, mmio.is_write)
        assert bytes.fromhex("4523") == mmio.data[:2]
        assert 0 == await machine.run()
        assert uapi.KVM_EXIT_SYSTEM_EVENT == machine.exit_reason()

    assert [(25, 0x12345678), (25, "end")] == simulate(main, guest(access))


def test_system_off_and_reset_exit() -> None:
    """KVM_EXIT_SYSTEM_EVENT says which."""

    def bind(machine: Machine) -> Program:
        async def program(cpu: Any) -> None:
            await cpu.hvc(PSCI_SYSTEM_RESET)
            await cpu.system_off()

        return program

    async def main(machine: Machine) -> None:
        for event in (uapi.KVM_SYSTEM_EVENT_RESET, uapi.KVM_SYSTEM_EVENT_SHUTDOWN):
            await machine.run()
            assert uapi.KVM_EXIT_SYSTEM_EVENT == machine.exit_reason()
            area = machine.vcpus[0].run_area[uapi.KVM_RUN_EXIT :][: KvmRunSystemEvent.SIZE]
            assert event == KvmRunSystemEvent.unpack(bytes(area)).type

    simulate(main, bind)


@pytest.mark.spec("api.run.rule.immediate", "api.run.EINTR.signal")
def test_immediate_exit_completes_what_is_pending() -> None:
    """EINTR, but the data of the exit before is taken: so a VMM brings a vCPU to rest before it saves it."""

    async def main(machine: Machine) -> None:
        area = machine.vcpus[0].run_area
        await machine.run()
        area[uapi.KVM_RUN_EXIT + 8] = 0x55
        area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1
        assert "EINTR" == await machine.run()
        area[uapi.KVM_RUN_EXIT + 8] = 0x66
        area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 0
        await machine.run()
        assert DEVICE + 8 == machine.mmio().phys_addr

    assert [(0, 0x55)] == simulate(main, guest(access))


def test_an_exception_of_a_program_comes_out_of_run() -> None:
    """As it is; the vCPU may be run again and begins its program anew."""
    error = LookupError("guest bug")

    def bind(machine: Machine) -> Program:
        async def program(cpu: Any) -> None:
            machine.note("begins")
            await cpu.compute(10)
            raise error

        return program

    async def main(machine: Machine) -> None:
        for _ in range(2):
            with pytest.raises(LookupError) as caught:
                await machine.vcpus[0].run()
            assert error is caught.value
            assert not machine.vcpu().running

    assert [(0, "begins"), (10, "begins")] == simulate(main, bind)


def test_an_exception_of_a_handler_comes_out_of_run() -> None:
    """From inside ``compute`` as well."""

    def bind(machine: Machine) -> Program:
        async def handler(cpu: Any) -> None:
            raise LookupError("in the handler")

        async def program(cpu: Any) -> None:
            cpu.set_vector(handler)
            cpu.unmask()
            await cpu.compute(100)

        return program

    async def main(machine: Machine) -> None:
        machine.at(30, machine.raise_spi)
        with pytest.raises(LookupError, match="in the handler"):
            await machine.vcpus[0].run()
        assert 30 == fabric.now()

    simulate(main, bind)


def test_a_program_must_be_a_coroutine_function() -> None:
    """What is not callable is refused by load, what gives no coroutine by KVM_RUN, none at all by KVM_RUN."""

    async def main(machine: Machine) -> None:
        with pytest.raises(RuntimeError, match="has no program"):
            await machine.vcpus[0].run()
        with pytest.raises(TypeError, match="async function"):
            machine.vcpus[0].load(3)  # type: ignore[arg-type]
        machine.vcpus[0].load(lambda cpu: None)  # type: ignore[arg-type, return-value]
        for _ in range(2):
            with pytest.raises(TypeError, match="must be an async function"):
                await machine.vcpus[0].run()

    async def start() -> None:
        await main(Machine())

    fabric.run(start)


def test_a_program_is_loaded_before_it_runs() -> None:
    """EBUSY in the middle of one."""

    async def main(machine: Machine) -> None:
        await machine.run()
        with pytest.raises(KvmError) as caught:
            machine.vcpus[0].load(halt)  # type: ignore[arg-type]
        assert errno.EBUSY == caught.value.errno

    simulate(main, guest(access))


def test_a_guest_shares_the_context_of_its_vmm() -> None:
    """Before, between and after exits, VMM and guest run in the context variables of the VMM's task."""
    seen: list[str] = []

    def bind(machine: Machine) -> Program:
        async def program(cpu: Any) -> None:
            seen.append(color.get())
            await cpu.load(DEVICE, 4)
            seen.append(color.get())
            color.set("guest's")
            await cpu.compute(5)
            await cpu.system_off()

        return program

    async def main(machine: Machine) -> None:
        async def vmm() -> None:
            color.set("vmm's")
            await machine.run()
            seen.append(color.get())
            await machine.run()
            seen.append(color.get())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(vmm)
        assert "none" == color.get()

    simulate(main, bind)

    assert ["vmm's", "vmm's", "vmm's", "guest's"] == seen


def test_a_guest_may_wait_for_trio() -> None:
    """A program is part of its VMM's task: it may await trio's primitives, also while it is interrupted."""

    def bind(machine: Machine) -> Program:
        async def program(cpu: Any) -> None:
            await cpu.compute(10)
            await trio.sleep(1e-7)
            machine.note("slept")
            await fabric.sleep(10)
            await cpu.compute(10)
            machine.note("not reached")

        return program

    async def main(machine: Machine) -> None:
        machine.at(50, machine.vcpu().interrupt)
        assert "EINTR" == await machine.run()
        machine.note("interrupted")

    assert [(110, "slept"), (120, "interrupted")] == simulate(main, bind)


# KVM_RUN is interrupted.


async def _masked(machine: Machine, cpu: Any) -> None:
    await cpu.compute(100)


async def _unmasked(machine: Machine, cpu: Any) -> None:
    cpu.unmask()
    await cpu.compute(100)


async def _halted(machine: Machine, cpu: Any) -> None:
    await cpu.wait_for_interrupt(100)


async def _in_handler(machine: Machine, cpu: Any) -> None:
    async def handler(cpu: Any) -> None:
        intid = await cpu.mrs("ICC_IAR1_EL1")
        await cpu.compute(60)
        await cpu.msr("ICC_EOIR1_EL1", intid)

    cpu.set_vector(handler)
    cpu.unmask()
    machine.raise_spi()
    await cpu.compute(40)


async def _exiting(machine: Machine, cpu: Any) -> None:
    await cpu.load(0x0800_0000, 4)


PLACES = [
    pytest.param(_masked, 100 + 50, id="masked-compute"),
    pytest.param(_unmasked, 100 + 50, id="compute"),
    pytest.param(_in_handler, 100 + 50, id="handler"),
    pytest.param(_exiting, 100 + 50, id="kernel-exit"),
    pytest.param(_halted, 100, id="wfi"),
]
"""What the guest is in, and when it is through if it was out of KVM_RUN for 50 ns: a halt ends at its time."""


@pytest.mark.parametrize(("body", "end"), PLACES)
def test_interrupt_is_eintr_from_wherever_it_blocks(body: Callable[..., Awaitable[object]], end: int) -> None:
    """KVM_RUN fails at once; run again, the guest goes on where it was, for the time that was left."""

    async def main(machine: Machine) -> None:
        machine.vcpu().costs = Costs(exit_ns=100)
        machine.at(30, machine.vcpu().interrupt)
        assert "EINTR" == await machine.run()
        assert 30 == fabric.now()
        await fabric.sleep(50)
        assert 0 == await machine.run()

    assert [(end, "end")] == [line for line in simulate(main, guest(body)) if line[1] == "end"]


@pytest.mark.parametrize(("body", "end"), PLACES)
def test_a_cancelled_run_goes_on(body: Callable[..., Awaitable[object]], end: int) -> None:
    """A KVM_RUN whose task is cancelled leaves the guest where it is; any task may run it again."""

    async def main(machine: Machine) -> None:
        machine.vcpu().costs = Costs(exit_ns=100)
        with trio.move_on_after(30e-9):
            await machine.run()
        assert 30 == fabric.now()
        assert not machine.vcpu().running
        await fabric.sleep(50)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.run)

    assert [(end, "end")] == [line for line in simulate(main, guest(body)) if line[1] == "end"]


def test_a_run_can_be_cancelled_again_and_again() -> None:
    """Time inside KVM_RUN adds up to what the guest computes, however often it was left."""

    async def main(machine: Machine) -> None:
        inside = 0
        while True:
            began = fabric.now()
            with trio.move_on_after(7e-9) as scope:
                await machine.run()
            inside += fabric.now() - began
            if not scope.cancelled_caught:
                break
            await fabric.sleep(5)
        machine.note(inside)

    assert [100] == [what for _, what in simulate(main, guest(compute_100)) if what != "end"]


@pytest.mark.parametrize("how", ["interrupt", "cancel"])
def test_an_interrupt_that_comes_outside_is_taken_inside(how: str) -> None:
    """What becomes pending while the vCPU is out of KVM_RUN is taken when it is back."""

    async def main(machine: Machine) -> None:
        if how == "interrupt":
            machine.at(30, machine.vcpu().interrupt)
            await machine.run()
        else:
            with trio.move_on_after(30e-9):
                await machine.run()
        await fabric.sleep(10)
        machine.raise_spi()
        await fabric.sleep(10)
        await machine.run()

    log = simulate(main, guest(compute_100, unmasked=True))

    assert [(50, ("taken", SPI)), (130, "end")] == log


def test_interrupt_is_for_a_run_that_is_under_way() -> None:
    """Before and after KVM_RUN it does nothing, and one is one EINTR."""

    async def main(machine: Machine) -> None:
        vcpu = machine.vcpu()
        vcpu.interrupt()
        machine.at(30, vcpu.interrupt)
        machine.at(30, vcpu.interrupt)
        assert "EINTR" == await machine.run()
        vcpu.interrupt()
        assert 0 == await machine.run()

    assert [(100, "end")] == simulate(main, guest(compute_100))


@pytest.mark.parametrize("what", ["compute", "wait", "trio"])
def test_a_guest_may_interrupt_itself(what: str) -> None:
    """An interrupt from the vCPU's own step, say from a doorbell it rings, is seen where it next waits."""

    async def body(machine: Machine, cpu: Any) -> None:
        await cpu.compute(10)
        machine.vcpu().interrupt()
        if what == "trio":
            await trio.sleep(1e-8)
        if what == "wait":
            await cpu.wait_for_interrupt(30)
        else:
            await cpu.compute(20)

    async def main(machine: Machine) -> None:
        assert "EINTR" == await machine.run()
        machine.note("interrupted")
        assert 0 == await machine.run()

    inside = 20 if what == "trio" else 10
    end = 30 if what == "wait" else inside + 20

    assert [(inside, "interrupted"), (end, "end")] == simulate(main, guest(body))


def test_an_interrupt_beats_a_wake_up_of_its_instant() -> None:
    """A halted vCPU that is kicked and interrupted at once leaves KVM_RUN, and takes the interrupt later."""

    async def main(machine: Machine) -> None:
        machine.at(30, machine.raise_spi)
        machine.at(30, machine.vcpu().interrupt)
        assert "EINTR" == await machine.run()
        assert 30 == fabric.now()
        assert [] == machine.log
        assert 0 == await machine.run()

    assert [(30, ("taken", SPI)), (40, "end")] == simulate(main, guest(halt, unmasked=True))


def test_one_run_at_a_time() -> None:
    """A second KVM_RUN of the same vCPU waits for the first to end, as the vCPU's mutex has it."""

    async def main(machine: Machine) -> None:
        async def run(name: str) -> None:
            machine.note((name, await machine.run(), machine.mmio().phys_addr))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, "a")
            nursery.start_soon(run, "b")
            nursery.start_soon(run, "c")
            await trio.testing.wait_all_tasks_blocked()

    async def body(machine: Machine, cpu: Any) -> None:
        for number in range(3):
            await cpu.compute(10)
            await cpu.store(DEVICE + number, 1, 0)

    expected = [(10, ("a", 0, DEVICE)), (20, ("b", 0, DEVICE + 1)), (30, ("c", 0, DEVICE + 2))]

    assert expected == simulate(main, guest(body))


@pytest.mark.parametrize(("how", "second"), [("immediate_exit", "EINTR"), ("cancelled", 0)])
def test_a_waiting_run_passes_its_turn_on(how: str, second: object) -> None:
    """Of three, the second finds immediate_exit set, or is cancelled as its turn comes: the third has its turn."""

    async def main(machine: Machine) -> None:
        area = machine.vcpus[0].run_area
        scope = trio.CancelScope()

        async def run(name: str) -> None:
            with scope if name == "b" else trio.CancelScope():
                machine.note((name, await machine.run()))
                if name == "a":
                    area[uapi.KVM_RUN_IMMEDIATE_EXIT] = how == "immediate_exit"
                    if how == "cancelled":
                        scope.cancel()

        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(run, name)
                await fabric.sleep(1)

    log = simulate(main, guest(access))

    assert [("a", 0), ("b", second), ("c", second)] == [what for _, what in log if isinstance(what, tuple)]


# Power.


def test_a_program_that_returns_stops_its_vcpu() -> None:
    """KVM_RUN then blocks, and the run is a deadlock that says for what."""

    def bind(machine: Machine) -> Program:
        async def program(cpu: Any) -> None:
            await cpu.compute(10)

        return program

    with pytest.raises(Deadlock, match="waits for vCPU 0 to be powered on"):
        simulate(one_run, bind)


def test_cpu_on_starts_a_stopped_vcpu_afresh() -> None:
    """PSCI: CPU_ON of a vCPU that is off begins its program anew; ALREADY_ON, INVALID_PARAMETERS otherwise."""

    def boss(machine: Machine) -> Program:
        async def program(cpu: Any) -> None:
            machine.note(("already on", await cpu.hvc(PSCI_CPU_ON, 0)))
            machine.note(("nobody", await cpu.hvc(PSCI_CPU_ON, 77)))
            machine.note(("info", await cpu.hvc(PSCI_AFFINITY_INFO, 1)))
            for _ in range(2):
                machine.note(("on", await cpu.hvc(PSCI_CPU_ON, 1)))
                await cpu.compute(50)
            machine.note(("info", await cpu.hvc(PSCI_AFFINITY_INFO, 1)))
            machine.note(("unknown", await cpu.hvc(0x8400_00FF)))
            await cpu.system_off()

        return program

    def worker(machine: Machine) -> Program:
        async def program(cpu: Any) -> None:
            machine.note(("worker", cpu.number, cpu.masked))
            cpu.set_vector(machine.handler)
            cpu.unmask()
            await cpu.compute(10)

        return program

    async def main(machine: Machine) -> None:
        machine.vcpus[1].mp_state = uapi.KVM_MP_STATE_STOPPED
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.run, 1)
            await machine.run()
            nursery.cancel_scope.cancel()

    log = simulate(main, boss, worker)

    expected = [
        (0, ("already on", -4)),
        (0, ("nobody", -2)),
        (0, ("info", 1)),
        (0, ("on", 0)),
        (0, ("worker", 1, True)),
        (50, ("on", 0)),
        (50, ("worker", 1, True)),
        (100, ("info", 1)),
        (100, ("unknown", -1)),
    ]

    assert expected == log


def test_interrupt_reaches_a_stopped_vcpu() -> None:
    """EINTR while KVM_RUN waits for the vCPU to be powered on, which it then can be."""

    def bind(machine: Machine) -> Program:
        async def program(cpu: Any) -> None:
            machine.note("begins")
            await cpu.compute(10)

        return program

    async def main(machine: Machine) -> None:
        machine.at(30, machine.vcpu().interrupt)
        assert "EINTR" == await machine.run()
        assert 30 == fabric.now()
        assert machine.vcpu().powered_off
        machine.at(40, machine.vcpu().power_on)
        machine.at(60, machine.vcpu().interrupt)
        assert "EINTR" == await machine.run()

    assert [(0, "begins"), (40, "begins")] == simulate(main, bind)


def test_a_cancelled_wait_for_power_can_be_taken_up() -> None:
    """As any KVM_RUN."""

    def bind(machine: Machine) -> Program:
        async def program(cpu: Any) -> None:
            machine.note("begins")

        return program

    async def main(machine: Machine) -> None:
        for ns in (10, 20, 30):
            with trio.move_on_at(ns / 1e9):
                await machine.run()
        machine.vcpu().power_on()
        with trio.move_on_at(40e-9):
            await machine.run()

    assert [(0, "begins"), (30, "begins")] == simulate(main, bind)


def test_vcpu_init_begins_the_program_anew() -> None:
    """A VMM that resets the machine runs the guest from its start, not from where it asked for the reset."""

    def bind(machine: Machine) -> Program:
        async def program(cpu: Any) -> None:
            machine.note("begins")
            await cpu.hvc(PSCI_SYSTEM_RESET)
            machine.note("goes on")

        return program

    async def main(machine: Machine) -> None:
        for _ in range(2):
            await machine.run()
            machine.vcpus[0].init(machine.features)

    assert [(0, "begins"), (0, "begins")] == simulate(main, bind)


# Deadlocks and manual time.


def test_a_halt_that_nothing_ends_is_a_deadlock() -> None:
    """The report names the vCPU."""
    with pytest.raises(Deadlock, match="waits for an interrupt to vCPU 0"):
        simulate(one_run, guest(halt))


def test_guests_run_in_manual_time() -> None:
    """A guest advances as far as its time allows."""

    async def main() -> list[tuple[int, object]]:
        machine = Machine()
        machine.vcpus[0].load(guest(compute_100)(machine))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.run)
            await fabric.advance(99)
            assert [] == machine.log
            await fabric.advance(1)
        return machine.log

    assert [(100, "end")] == fabric.run(main, pacing="manual")


def test_running_needs_a_simulation() -> None:
    """A vCPU made outside cannot run."""
    assert current_engine() is None
    machine = Machine()
    machine.vcpus[0].load(halt)  # type: ignore[arg-type]

    with pytest.raises(RuntimeError, match="needs a simulation"):
        machine.vcpus[0].run().send(None)
