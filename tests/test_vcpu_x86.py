"""x86 vCPUs: interrupts through gates, NMI, SMI, INIT and SIPI, HLT, registers, and what all that costs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from x86_guests import (
    APIC_PAGE,
    BASE,
    ENABLE,
    EOI,
    ICR,
    MSI,
    RAM,
    SVR,
    TPR,
    X2APIC,
    X86Vm,
    apic_on,
    done,
    one_run,
    simulate,
)

import fabric
from fabric.errors import KvmError
from fabric.kvm.typed import msi_route
from fabric.trace.ledger import LedgerStatement
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi import x86
from fabric.vcpu import Costs
from fabric.vcpu.host import Host
from fabric.vcpu.x86_cpu import GeneralProtection

Handler = Callable[[Any], Awaitable[None]]
LOW, HIGH = 0x31, 0x81
"""Two vectors; HIGH is of a higher class."""
NMI = 2


def taking(vm: X86Vm, ns: int = 10) -> Handler:
    """A handler that notes its vector, works and ends the interrupt."""

    async def handler(cpu: Any) -> None:
        vm.note(cpu.vector)
        await cpu.compute(ns)
        cpu.eoi()

    return handler


async def ready(vm: X86Vm, cpu: Any, ns: int = 10) -> None:
    """Local APIC on, a handler for all vectors, IF set."""
    await apic_on(cpu)
    cpu.set_vector(taking(vm, ns))
    cpu.sti()


async def compute_100(vm: X86Vm, cpu: Any) -> None:
    await ready(vm, cpu)
    await cpu.compute(100)


def nmi(vm: X86Vm, number: int = 0) -> None:
    """An NMI from a device."""
    vm.vm.signal_msi(MSI | number << 12, 4 << 8)


# Interrupts


def test_an_interrupt_is_taken_at_its_time() -> None:
    """Inside a computation, which takes its whole time besides."""

    async def main(vm: X86Vm) -> None:
        vm.at(30, vm.msi, LOW)
        await one_run(vm)

    assert [(30, LOW), (110, "end")] == simulate(main, compute_100)


def test_a_gate_goes_before_the_handler_of_all() -> None:
    """set_gate names the handler of one vector, and takes it away again."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await ready(vm, cpu)

        async def special(cpu: Any) -> None:
            vm.note("special")
            cpu.eoi()

        cpu.set_gate(LOW, special)
        await cpu.compute(50)
        cpu.set_gate(LOW, None)
        await cpu.compute(50)

    async def main(vm: X86Vm) -> None:
        for ns, vector in ((10, LOW), (20, HIGH), (80, LOW)):
            vm.at(ns, vm.msi, vector)
        await one_run(vm)

    assert [(10, "special"), (20, HIGH), (80, LOW), (120, "end")] == simulate(main, body)


def test_a_handler_runs_with_interrupts_off() -> None:
    """What comes meanwhile is taken after it, the highest vector first; the vector is gone when it is over."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await compute_100(vm, cpu)
        assert -1 == cpu.vector

    async def main(vm: X86Vm) -> None:
        for ns, vector in ((30, LOW), (33, LOW + 1), (36, HIGH)):
            vm.at(ns, vm.msi, vector)
        await one_run(vm)

    assert [(30, LOW), (40, HIGH), (50, LOW + 1), (130, "end")] == simulate(main, body)


def test_a_higher_class_preempts_a_handler_that_sets_if() -> None:
    """One of the same class does not, before the EOI."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await ready(vm, cpu)

        async def preemptible(cpu: Any) -> None:
            vm.note("begins")
            cpu.sti()
            await cpu.compute(50)
            assert LOW == cpu.vector
            vm.note("ends")
            cpu.eoi()

        cpu.set_gate(LOW, preemptible)
        await cpu.compute(10)

    async def main(vm: X86Vm) -> None:
        for ns, vector in ((5, LOW), (15, HIGH), (20, LOW + 1)):
            vm.at(ns, vm.msi, vector)
        await one_run(vm)

    expected = [(5, "begins"), (15, HIGH), (65, "ends"), (65, LOW + 1), (80, "end")]
    assert expected == simulate(main, body)


@pytest.mark.parametrize("how", ["cr8", "msr"])
def test_the_task_priority_holds_interrupts_back(how: str) -> None:
    """Those of its class and below, until it is lowered; CR8 is its upper half."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        async def set_priority(priority: int) -> None:
            await (cpu.write_cr8(priority) if how == "cr8" else cpu.wrmsr(TPR, priority << 4))

        await ready(vm, cpu)
        await set_priority(LOW >> 4)
        assert (LOW >> 4, LOW & 0xF0) == (cpu.read_cr8(), await cpu.rdmsr(TPR))
        await cpu.compute(100)
        await set_priority((LOW >> 4) - 1)
        await cpu.compute(100)

    async def main(vm: X86Vm) -> None:
        vm.at(30, vm.msi, LOW)
        vm.at(60, vm.msi, HIGH)
        await one_run(vm)

    assert [(60, HIGH), (110, LOW), (220, "end")] == simulate(main, body)


def test_masked_interrupts_wait() -> None:
    """They merge by vector, and are taken where the program computes or halts after STI."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await ready(vm, cpu)
        cpu.cli()
        await cpu.compute(100)
        cpu.sti()
        vm.note("not here")
        await cpu.hlt()

    async def main(vm: X86Vm) -> None:
        for ns in (10, 20):
            vm.at(ns, vm.msi, LOW)
        await one_run(vm)
        assert LedgerStatement(raised=2, delivered=1, coalesced=1) == vm.ledger

    assert [(100, "not here"), (100, LOW), (110, "end")] == simulate(main, body)


def test_sti_needs_a_handler() -> None:
    """Of some vector at least."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        with pytest.raises(RuntimeError, match="unmasks interrupts without a handler"):
            cpu.sti()
        with pytest.raises(ValueError, match="a vector is 0 to 255, not 256"):
            cpu.set_gate(256, taking(vm))
        cpu.set_gate(0x20, taking(vm))
        cpu.sti()

    simulate(one_run, body)


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        pytest.param((13, 8), [(10, 13), (100, "end")], id="#GP"),
        pytest.param((8,), [(10, 8), (100, "end")], id="#DF"),
        pytest.param((NMI,), [(10, "shutdown"), (10, "shutdown")], id="triple-fault"),
    ],
)
def test_a_vector_without_a_handler_is_a_fault(gates: tuple[int, ...], expected: list[Any]) -> None:
    """#GP, then #DF, then KVM_EXIT_SHUTDOWN, out of which there is no way but a reset."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await apic_on(cpu)

        async def fault(cpu: Any) -> None:
            vm.note(cpu.vector)

        for gate in gates:
            cpu.set_gate(gate, fault)
        cpu.sti()
        await cpu.compute(100)

    async def main(vm: X86Vm) -> None:
        vm.at(10, vm.msi, LOW)
        for _ in range(2):
            if await vm.run() == uapi.KVM_EXIT_IO:
                break
            assert uapi.KVM_EXIT_SHUTDOWN == vm.reason()
            vm.note("shutdown")

    assert expected == simulate(main, body)


def test_an_interrupt_that_is_gone_is_not_taken() -> None:
    """A line of the 8259 pair that is lowered before the CPU asks: it goes on where it was."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        for port, value in ((0x20, 0x19), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0), (0x4D0, 8)):
            await cpu.outp(port, 1, value)
        cpu.set_vector(taking(vm))
        cpu.sti()
        await cpu.compute(100)

    async def main(vm: X86Vm) -> None:
        vm.at(30, vm.vm.irq_line, 3, 1)
        vm.at(30, vm.vm.irq_line, 3, 0)
        await one_run(vm)
        assert 1 == vm.ledger.dropped["line lowered"]

    assert [(100, "end")] == simulate(main, body)


def test_the_8259_pair_goes_first() -> None:
    """Before the local APIC; its interrupts are ended at the pair. LINT0 of the boot CPU lets it through."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await apic_on(cpu)
        for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0)):
            await cpu.outp(port, 1, value)

        async def pic(cpu: Any) -> None:
            vm.note(cpu.vector)
            await cpu.outp(0x20, 1, 0x20)

        cpu.set_gate(0x21, pic)
        cpu.set_gate(HIGH, taking(vm))
        cpu.sti()
        await cpu.hlt()

    async def main(vm: X86Vm) -> None:
        def both() -> None:
            vm.vm.irq_line(1, 1)
            vm.msi(HIGH)

        vm.vm.ioctl(requests.KVM_SET_GSI_ROUTING, bytearray(uapi.KvmIrqRouting(1).pack() + _pic_route(1)))
        vm.at(30, both)
        await one_run(vm)
        assert LedgerStatement(raised=2, delivered=2) == vm.ledger

    assert [(30, 0x21), (30, HIGH), (40, "end")] == simulate(main, body)


def _pic_route(pin: int) -> bytes:
    to = uapi.KvmIrqRoutingIrqchip(x86.KVM_IRQCHIP_PIC_MASTER, pin)
    return uapi.KvmIrqRoutingEntry(pin, uapi.KVM_IRQ_ROUTING_IRQCHIP, u=to.pack().ljust(32, b"\0")).pack()


# HLT


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        pytest.param(None, [(30, LOW), (40, "end")], id="interrupt"),
        pytest.param(20, [(20, "end")], id="time-first"),
        pytest.param(0, [(0, "end")], id="past"),
    ],
)
def test_a_halt_ends_with_an_interrupt(until: int | None, expected: list[Any]) -> None:
    """Which is taken inside it; or at a time."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await ready(vm, cpu)
        await cpu.wait_for_interrupt(until)

    async def main(vm: X86Vm) -> None:
        vm.at(30, vm.msi, LOW)
        await one_run(vm)

    assert expected == simulate(main, body)


def test_with_if_clear_only_an_nmi_ends_a_halt() -> None:
    """An interrupt does not, whether it came before or meanwhile."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await ready(vm, cpu)
        cpu.cli()
        await cpu.hlt()
        vm.note("goes on")

    async def main(vm: X86Vm) -> None:
        vm.msi(HIGH)
        vm.at(10, vm.msi, LOW)
        vm.at(50, nmi, vm)
        await one_run(vm)

    assert [(50, NMI), (60, "goes on"), (60, "end")] == simulate(main, body)


def test_the_mp_state_of_a_halted_vcpu() -> None:
    """HALTED; set to RUNNABLE it goes on behind the HLT; one that computes can be halted, until an interrupt comes."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await ready(vm, cpu)
        await cpu.hlt()
        vm.note("goes on")
        await cpu.compute(100)

    async def main(vm: X86Vm) -> None:
        vm.at(10, vm.vcpu().interrupt)
        assert "EINTR" == await vm.run()
        assert uapi.KVM_MP_STATE_HALTED == vm.vcpus[0].mp_state
        vm.vcpus[0].mp_state = uapi.KVM_MP_STATE_RUNNABLE
        vm.at(30, vm.vcpu().interrupt)
        assert "EINTR" == await vm.run()
        assert uapi.KVM_MP_STATE_RUNNABLE == vm.vcpus[0].mp_state
        vm.vcpus[0].mp_state = uapi.KVM_MP_STATE_HALTED
        vm.at(70, vm.msi, LOW)
        await one_run(vm)

    assert [(10, "goes on"), (70, LOW), (160, "end")] == simulate(main, body)


@pytest.mark.parametrize(
    ("wake", "at"),
    [
        pytest.param(lambda vm: vm.msi(LOW), 10, id="interrupt"),
        pytest.param(nmi, 10, id="nmi"),
        pytest.param(lambda vm: vm.vm.signal_msi(MSI, 2 << 8), 10, id="smi"),
        pytest.param(lambda vm: vm.vm.signal_msi(MSI, 3 << 8), 10, id="wakeup"),
        pytest.param(lambda vm: vm.vcpu().interrupt(), None, id="signal"),
    ],
)
def test_a_vcpu_that_the_vmm_has_halted(wake: Any, at: int | None) -> None:
    """It does nothing, not even what needs no time, until something comes that would end a HLT; a signal does not."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        vm.note("begins")

    async def main(vm: X86Vm) -> None:
        vm.vcpu().cpu_interface.write(0xF0, 0x1FF)
        vm.vcpus[0].ioctl(requests.KVM_SET_REGS, x86.KvmRegs(rflags=0x202))
        vm.vcpus[0].mp_state = uapi.KVM_MP_STATE_HALTED
        vm.at(10, wake, vm)
        if at is None:
            assert "EINTR" == await vm.run()
            assert uapi.KVM_MP_STATE_HALTED == vm.vcpus[0].mp_state
        else:
            await one_run(vm)

    assert ([] if at is None else [(at, "begins"), (at, "end")]) == simulate(main, body)


def test_a_paravirtual_wakeup_ends_a_halt() -> None:
    """A message of the remote-read mode, as KVM uses it, with IF clear as well."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await cpu.hlt()

    async def main(vm: X86Vm) -> None:
        vm.at(30, vm.vm.signal_msi, MSI, 3 << 8)
        await one_run(vm)

    assert [(30, "end")] == simulate(main, body)


# NMI and SMI


def test_an_nmi_is_taken_whatever_if_is() -> None:
    """Through gate 2; while its handler runs others wait, and of three that come then one is kept."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        cpu.set_gate(NMI, no_eoi)
        await cpu.compute(100)

    async def no_eoi(cpu: Any) -> None:
        log.append((fabric.now(), cpu.vector))
        await cpu.compute(20)

    async def main(vm: X86Vm) -> None:
        vm.at(30, nmi, vm)
        for ns in (35, 40, 45):
            vm.at(ns, nmi, vm)
        await one_run(vm)
        assert LedgerStatement(raised=4, delivered=2, coalesced=2) == vm.ledger

    log: list[tuple[int, int]] = []
    assert [(140, "end")] == simulate(main, body)
    assert [(30, NMI), (50, NMI)] == log


def test_nmis_that_wait_are_in_the_ledger() -> None:
    """KVM_NMI and what KVM_SET_VCPU_EVENTS says; a reset drops them."""
    vm = X86Vm()
    for _ in range(3):
        vm.vcpus[0].ioctl(requests.KVM_NMI)
    events = bytearray(x86.KvmVcpuEvents.SIZE)
    vm.vcpus[0].ioctl(requests.KVM_GET_VCPU_EVENTS, events)
    assert LedgerStatement(raised=3, coalesced=1, pending=2) == vm.ledger
    told = x86.KvmVcpuEvents(nmi_pending=1, flags=x86.KVM_VCPUEVENT_VALID_NMI_PENDING)
    vm.vcpus[0].ioctl(requests.KVM_SET_VCPU_EVENTS, told)
    assert LedgerStatement(raised=4, coalesced=1, pending=1, dropped={"vCPU events replaced": 2}) == vm.ledger
    vm.vm.signal_msi(MSI, 5 << 8)
    assert uapi.KVM_MP_STATE_RUNNABLE == vm.vcpus[0].mp_state
    assert {"vCPU events replaced": 2, "vCPU reset": 1} == vm.ledger.dropped


def test_an_injected_nmi_is_taken_once() -> None:
    """One that KVM_SET_VCPU_EVENTS puts on its way; it is no other's."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        cpu.set_vector(taking(vm))
        await cpu.compute(10)

    async def main(vm: X86Vm) -> None:
        vm.vcpus[0].ioctl(requests.KVM_SET_VCPU_EVENTS, x86.KvmVcpuEvents(nmi_injected=1))
        await one_run(vm)
        assert LedgerStatement() == vm.ledger

    assert [(0, NMI), (20, "end")] == simulate(main, body)


@pytest.mark.spec("api.smi")
def test_an_smi_takes_time() -> None:
    """That of an exit; the guest sees nothing of it, and a halt is over after it."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await cpu.compute(100)
        vm.note("halts")
        await cpu.hlt()

    async def main(vm: X86Vm) -> None:
        vm.vcpu().costs = Costs(exit_ns=500)
        vm.vcpus[0].ioctl(requests.KVM_SMI)
        vm.at(1000, vm.vm.signal_msi, MSI, 2 << 8)
        await one_run(vm)

    assert [(600, "halts"), (1500, "end")] == simulate(main, body)


def test_a_host_without_smm_takes_no_smi() -> None:
    """The message reaches nobody."""
    vm = X86Vm(smm=False)
    assert 0 == vm.vm.signal_msi(MSI, 2 << 8)
    assert 1 == X86Vm().vm.signal_msi(MSI, 2 << 8)


# INIT and SIPI


def start(cpu: Any, number: int, page: int = 8) -> Any:
    """INIT and SIPI by the boot CPU, in x2APIC mode."""

    async def send() -> None:
        await cpu.wrmsr(ICR, number << 32 | 5 << 8 | 1 << 14)
        await cpu.wrmsr(ICR, number << 32 | 6 << 8 | page)

    return send()


async def boot_other(vm: X86Vm, cpu: Any) -> None:
    await apic_on(cpu)
    await cpu.compute(50)
    await start(cpu, 1)
    await cpu.compute(50)


async def idle(vm: X86Vm, cpu: Any) -> None:
    vm.note(f"CPU {cpu.number} begins")
    await cpu.compute(10)


def test_an_application_processor_begins_at_its_sipi() -> None:
    """KVM_RUN waits for it; code segment and instruction pointer are those of the vector."""

    async def main(vm: X86Vm) -> None:
        assert uapi.KVM_MP_STATE_UNINITIALIZED == vm.vcpus[1].mp_state
        await vm.run_all(until_ns=1000)
        sregs = bytearray(x86.KvmSregs.SIZE)
        vm.vcpus[1].ioctl(requests.KVM_GET_SREGS, sregs)
        code = x86.KvmSregs.unpack(sregs).segments[0]
        assert (0x8000, 0x800) == (code.base, code.selector)
        assert uapi.KVM_MP_STATE_RUNNABLE == vm.vcpus[1].mp_state

    assert [(50, "CPU 1 begins"), (60, "end"), (100, "end")] == [
        entry for entry in simulate(main, boot_other, idle) if isinstance(entry[1], str)
    ]


@pytest.mark.spec("api.run.EAGAIN.wait-sipi")
def test_kvm_run_of_a_fresh_processor_is_eagain_at_its_init() -> None:
    """The next one waits for the SIPI; a SIPI without an INIT starts nothing."""

    async def main(vm: X86Vm) -> None:
        for ns, data in ((10, 6 << 8 | 1), (20, 5 << 8), (30, 6 << 8 | 1)):
            vm.at(ns, vm.vm.signal_msi, MSI, data)
        for _ in range(3):
            vm.note(await vm.run(0))
            vm.note(vm.vcpus[0].mp_state)

    async def boot_is_another() -> list[tuple[int, object]]:
        vm = X86Vm(0)
        vm.vm.ioctl(requests.KVM_SET_BOOT_CPU_ID, 7)
        vm.vcpus = [vm.vm.create_vcpu(0)]

        async def program(cpu: Any) -> None:
            vm.note("begins")
            await done(cpu)

        vm.vcpus[0].load(program)
        await main(vm)
        return vm.log

    uninitialized, waiting, runnable = (
        uapi.KVM_MP_STATE_UNINITIALIZED,
        uapi.KVM_MP_STATE_INIT_RECEIVED,
        uapi.KVM_MP_STATE_RUNNABLE,
    )
    assert [
        (10, "EAGAIN"),
        (10, uninitialized),
        (20, "EAGAIN"),
        (20, waiting),
        (30, "begins"),
        (30, uapi.KVM_EXIT_IO),
        (30, runnable),
    ] == fabric.run(boot_is_another)


def test_a_signal_leaves_a_wait_for_the_sipi() -> None:
    """KVM_RUN is EINTR."""

    async def main(vm: X86Vm) -> None:
        vm.at(40, vm.vcpu(1).interrupt)
        vm.note(await vm.run(1))

    assert [(40, "EINTR")] == simulate(main, idle, idle)


def test_an_init_ends_the_program() -> None:
    """Of an application processor until a SIPI; of the boot processor it begins anew. The local APIC is reset."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        vm.note(f"CPU {cpu.number} begins")
        await apic_on(cpu)
        if not cpu.number:
            await start(cpu, 1)
        await cpu.compute(100)

    async def main(vm: X86Vm) -> None:
        for ns, number in ((30, 1), (50, 0)):
            vm.at(ns, vm.vm.signal_msi, MSI | number << 12, 5 << 8)
        vm.at(40, vm.msi, LOW, 1)  # off again: it takes no interrupt
        await vm.run_all(until_ns=1000)
        assert {"no local APIC took it": 1} == vm.ledger.dropped

    assert [
        (0, "CPU 0 begins"),
        (0, "CPU 1 begins"),
        (50, "CPU 0 begins"),
        (50, "CPU 1 begins"),
        (150, "end"),
        (150, "end"),
    ] == [entry for entry in simulate(main, body, body) if isinstance(entry[1], str)]


def test_an_init_between_two_runs() -> None:
    """The guest is not entered where it was: the access that exited is forgotten."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        vm.note("begins")
        await cpu.inp(0xC000, 1)
        vm.note("not reached")

    async def main(vm: X86Vm) -> None:
        assert uapi.KVM_EXIT_IO == await vm.run()
        vm.vm.signal_msi(MSI, 5 << 8)
        assert uapi.KVM_EXIT_IO == await vm.run()

    assert [(0, "begins")] * 2 == simulate(main, body)


def test_a_program_that_returns_halts_with_if_clear() -> None:
    """Nothing but an INIT gets it out of that, a fresh start if it is the boot processor."""

    async def main(vm: X86Vm) -> None:
        async def program(cpu: Any) -> None:
            vm.note("begins")
            await ready(vm, cpu)

        vm.vcpus[0].load(program)
        vm.at(10, vm.msi, LOW)
        vm.at(20, nmi, vm)
        vm.at(30, vm.vcpu().interrupt)
        assert "EINTR" == await vm.run()
        assert uapi.KVM_MP_STATE_HALTED == vm.vcpus[0].mp_state
        vm.vcpus[0].mp_state = uapi.KVM_MP_STATE_HALTED  # as it is restored
        vm.at(40, vm.vm.signal_msi, MSI, 5 << 8)
        with trio.move_on_at(100e-9):
            await vm.run()

    assert [(0, "begins"), (40, "begins")] == simulate(main, idle)


def test_the_vmm_may_start_a_processor() -> None:
    """KVM_SET_MP_STATE to RUNNABLE, as when it restores one."""

    async def main(vm: X86Vm) -> None:
        vm.vcpus[1].mp_state = uapi.KVM_MP_STATE_RUNNABLE
        await vm.run(1)

    assert [(0, "CPU 1 begins"), (10, "end")] == simulate(main, idle, idle)


# Registers


def test_msrs_that_are_refused() -> None:
    """#GP in the guest: none there, not readable, or no such value."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        with pytest.raises(GeneralProtection, match="rdmsr of 0x80f"):
            await cpu.rdmsr(SVR)  # not in x2APIC mode
        await apic_on(cpu)
        with pytest.raises(GeneralProtection, match="rdmsr of 0x12345"):
            await cpu.rdmsr(0x12345)
        with pytest.raises(GeneralProtection, match="rdmsr of 0x80b"):
            await cpu.rdmsr(EOI)
        with pytest.raises(GeneralProtection, match="wrmsr of 0x100000000 to 0x80b"):
            await cpu.wrmsr(EOI, 1 << 32)
        with pytest.raises(GeneralProtection, match="CR8 is 0 to 15, not 16"):
            await cpu.write_cr8(16)
        assert 0x1FF == await cpu.rdmsr(SVR)

    simulate(one_run, body)


def test_cpuid_is_what_the_vmm_gave() -> None:
    """By leaf, and by subleaf where the leaf has those; zeros for one that it did not give."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        assert (1, 2, 3, 4) == await cpu.cpuid(5, 1)
        assert (9, 0, 0, 0) == await cpu.cpuid(6, 77)
        assert (0, 0, 0, 0) == await cpu.cpuid(5)

    async def main(vm: X86Vm) -> None:
        leaves = (x86.KvmCpuidEntry2(5, 1, 1, 1, 2, 3, 4), x86.KvmCpuidEntry2(6, eax=9))
        data = x86.KvmCpuid2(2).pack() + b"".join(leaf.pack() for leaf in leaves)
        vm.vcpus[0].ioctl(requests.KVM_SET_CPUID2, bytearray(data))
        await one_run(vm)

    simulate(main, body)


def test_the_interrupt_flag_in_rflags() -> None:
    """KVM_GET_REGS has it as the program has it, KVM_SET_REGS sets it, before the program begins as well."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        vm.note(cpu.masked)
        cpu.set_vector(taking(vm))
        cpu.cli()
        await done(cpu)
        vm.note(cpu.masked)

    async def main(vm: X86Vm) -> None:
        regs = bytearray(x86.KvmRegs.SIZE)

        def flag() -> bool:
            vm.vcpus[0].ioctl(requests.KVM_GET_REGS, regs)
            return bool(x86.KvmRegs.unpack(regs).rflags >> 9 & 1)

        assert not flag()
        vm.vcpus[0].ioctl(requests.KVM_SET_REGS, x86.KvmRegs(rflags=0x202))
        assert flag()
        await vm.run()
        assert not flag()
        vm.vcpus[0].ioctl(requests.KVM_SET_REGS, x86.KvmRegs(rflags=0x202))
        assert flag()
        await vm.run()

    assert [(0, False), (0, False), (0, "end")] == simulate(main, body)


def test_each_cpu_has_its_own_page_of_the_local_apic() -> None:
    """Registers by MMIO: its id, its EOI. In x2APIC mode and when it is off there is a hole."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        assert cpu.number << 24 == await cpu.load(APIC_PAGE + 0x20, 4)
        await cpu.store(APIC_PAGE + 0xF0, 4, 0x1FF)

        async def handler(cpu: Any) -> None:
            vm.note((cpu.number, cpu.vector))
            await cpu.store(APIC_PAGE + 0xB0, 4, 0)

        cpu.set_vector(handler)
        cpu.sti()
        if not cpu.number:
            vm.vcpus[1].mp_state = uapi.KVM_MP_STATE_RUNNABLE
            await cpu.compute(10)
            await cpu.store(APIC_PAGE + 0x310, 4, 1 << 24)
            await cpu.store(APIC_PAGE + 0x300, 4, LOW)
            await cpu.wrmsr(BASE, APIC_PAGE | ENABLE | X2APIC)
            await cpu.store(APIC_PAGE + 0x80, 4, 0xF0)
            assert (0xFFFF, 0) == (await cpu.load(APIC_PAGE + 0x20, 2), cpu.read_cr8())
        else:
            await cpu.hlt()
            assert 0 == await cpu.load(APIC_PAGE + 0x110, 4)  # ISR: it has ended

    async def main(vm: X86Vm) -> None:
        await vm.run_all(until_ns=1000)

    assert (10, (1, LOW)) in simulate(main, body, body)


def test_memory_goes_before_the_page() -> None:
    """A slot there hides it, as it hides everything."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await cpu.store(APIC_PAGE + 0x20, 4, 5)
        assert 5 == await cpu.load(APIC_PAGE + 0x20, 4)
        await cpu.store(RAM, 8, 6)
        assert 6 == await cpu.load(RAM, 8)

    async def main(vm: X86Vm) -> None:
        vm.vm.set_memory(1, APIC_PAGE, 0x1000, vm.user.map(0x1000))
        await one_run(vm)

    simulate(main, body)


# What it costs


def test_what_the_hardware_answers_costs_no_exit() -> None:
    """EOI, TPR, self-IPI and reads of the local APIC. The end of an interrupt has a price of its own."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await ready(vm, cpu)
        free: list[Awaitable[object]] = [cpu.rdmsr(0x802), cpu.wrmsr(TPR, 0), cpu.wrmsr(0x83F, LOW), cpu.rdmsr(0x10)]
        paid: list[Awaitable[object]] = [cpu.wrmsr(SVR, 0x1FF), cpu.rdmsr(0x839), cpu.rdmsr(BASE), cpu.cpuid(1)]
        began = cpu.now
        for access in free:
            await access
        cpu.eoi()
        assert began == cpu.now
        await cpu.compute(0)
        assert (began + 16 + 10 + 16, LOW) == (cpu.now, vm.log[-1][1])
        for access in (*paid, cpu.inp(0x20, 1), cpu.outp(0x80, 1, 0)):
            began = cpu.now
            await access
            assert began + 700 == cpu.now

    async def main(vm: X86Vm) -> None:
        vm.vcpu().costs = Costs(exit_ns=700, eoi_ns=16)
        while await vm.run() == uapi.KVM_EXIT_IO and vm.exit(uapi.KvmRunIo).port == 0x80:
            pass

    simulate(main, body)


def test_injection_and_wakeup_take_time() -> None:
    """A halted vCPU is woken first; the vector is decided when the handler begins, so that a higher one goes first."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await ready(vm, cpu)
        await cpu.hlt()

    async def main(vm: X86Vm) -> None:
        vm.vcpu().costs = Costs(injection_ns=50, wakeup_ns=100)
        vm.at(10, vm.msi, LOW)
        vm.at(150, vm.msi, HIGH)
        await one_run(vm)

    assert [(160, HIGH), (220, LOW), (230, "end")] == simulate(main, body)


def test_halted_vcpus_leave_their_physical_cpu() -> None:
    """Two on one: while one waits for interrupts, the other computes at full speed."""

    async def main(vm: X86Vm) -> None:
        host = Host(vm.kvm.engine, 1, slice_ns=1000)  # type: ignore[arg-type]
        for number in range(2):
            vm.vcpu(number).share(host)
            vm.vcpus[number].mp_state = uapi.KVM_MP_STATE_RUNNABLE
        vm.at(50, vm.msi, LOW)
        await vm.run_all(until_ns=10_000)
        assert 50 == vm.vcpu(0).stolen_ns

    async def halts(vm: X86Vm, cpu: Any) -> None:
        await ready(vm, cpu)
        await cpu.hlt()

    async def computes(vm: X86Vm, cpu: Any) -> None:
        await cpu.compute(100)

    assert [(100, "end"), (100, LOW), (110, "end")] == [
        entry for entry in simulate(main, halts, computes) if not isinstance(entry[1], tuple)
    ]


# The short way of messages


def irqfd(vm: X86Vm, vector: int, to: int = 0) -> Any:
    """An irqfd with a message's route."""
    event = vm.kvm.eventfd()
    vm.vm.set_routes([msi_route(5, MSI | to << 12, vector)])
    vm.vm.irqfd(event, 5)
    return event


def test_messages_take_the_short_way_while_the_map_stays() -> None:
    """From the second on; a local APIC that changes its id or is turned off gets no more of them."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await cpu.store(APIC_PAGE + 0xF0, 4, 0x1FF)
        event = irqfd(vm, LOW)

        def count() -> tuple[int, int]:
            event.signal()
            return vm.ledger.raised, sum(vm.ledger.dropped.values())

        assert [(1, 0), (2, 0), (3, 0)] == [count() for _ in range(3)]
        assert 1 == len(vm.inside.irqchip.apics.lent)
        await cpu.store(APIC_PAGE + 0x20, 4, 9 << 24)
        assert [(4, 1), (5, 2)] == [count(), count()]
        await cpu.store(APIC_PAGE + 0x20, 4, 0)
        assert [(6, 2), (7, 2)] == [count(), count()]
        await cpu.store(APIC_PAGE + 0xF0, 4, 0xFF)
        assert [(8, 3), (9, 4)] == [count(), count()]
        await cpu.store(APIC_PAGE + 0xF0, 4, 0x1FF)
        assert (10, 4) == count()
        vm.vm.irqfd(event, 5, deassign=True)
        assert (10, 4) == count()

    async def main(vm: X86Vm) -> None:
        await one_run(vm)
        assert (1, 5) == (vm.ledger.pending, vm.ledger.coalesced)

    simulate(main, body)


def test_a_message_by_the_short_way_is_an_edge() -> None:
    """The trigger mode of its vector becomes edge, as it does on the long way."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await apic_on(cpu)
        event = irqfd(vm, LOW)
        event.signal()
        vm.vm.signal_msi(MSI, LOW | 1 << 15 | 1 << 14)
        assert 1 << LOW % 32 == await cpu.rdmsr(0x819)
        event.signal()
        assert 0 == await cpu.rdmsr(0x819)

    simulate(one_run, body)


def test_a_reset_takes_what_waited() -> None:
    """Interrupts in IRR are dropped by an INIT, with the reason."""
    vm = X86Vm(x2apic=False)
    apic = vm.vcpu().cpu_interface
    apic.write(0xF0, 0x1FF)
    vm.msi(LOW)
    assert 1 == vm.ledger.pending
    vm.vm.signal_msi(MSI, 5 << 8)
    assert uapi.KVM_MP_STATE_RUNNABLE == vm.vcpus[0].mp_state
    assert LedgerStatement(raised=1, dropped={"local APIC reset": 1}) == vm.ledger
    apic._check()


# Whatever comes

_EVENTS = st.lists(
    st.tuples(
        st.integers(0, 2_000),
        st.sampled_from([0, 0, 0, 2, 3, 4, 5, 6]),  # delivery mode
        st.integers(0, 2),  # destination
        st.sampled_from([LOW, LOW + 1, HIGH, 8]),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(_EVENTS, st.sampled_from(["kernel", "split"]), st.booleans())
def test_whatever_comes_the_ledger_balances(events: list[tuple[int, int, int, int]], irqchip: str, costs: bool) -> None:
    """Interrupts, NMIs, SMIs, INITs and SIPIs to two vCPUs at any time: each interrupt is accounted for once."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await apic_on(cpu)

        async def handler(cpu: Any) -> None:
            await cpu.compute(30)
            if cpu.vector != NMI:
                cpu.eoi()

        cpu.set_vector(handler)
        for _ in range(20):
            cpu.sti()
            await cpu.hlt(cpu.now + 70)
            await cpu.compute(20)
            cpu.cli()
            await cpu.compute(10)

    async def main(vm: X86Vm) -> None:
        for number in range(2):
            vm.vcpu(number).costs = Costs(exit_ns=7, injection_ns=3, eoi_ns=2, wakeup_ns=5) if costs else Costs()
        vm.vcpus[1].mp_state = uapi.KVM_MP_STATE_RUNNABLE
        for ns, mode, to, vector in events:
            vm.at(ns, vm.vm.signal_msi, MSI | to << 12, mode << 8 | vector)
        await vm.run_all(until_ns=10_000)
        vm.inside.irqchip._check()
        assert vm.ledger.balanced
        fixed = sum(mode == 0 for _, mode, _, _ in events)
        nmis = sum(mode == 4 and to < 2 for _, mode, to, _ in events)
        assert fixed + nmis <= vm.ledger.raised

    simulate(main, body, body, irqchip=irqchip)


# A guest on its way to another vCPU


@pytest.mark.parametrize(
    ("halts", "masked"), [pytest.param(True, False, id="hlt"), (True, True), pytest.param(False, False, id="compute")]
)
def test_a_guest_goes_on_in_another_vcpu(halts: bool, masked: bool) -> None:
    """Where it was: in a halt, with the MP state as the VMM restores it, or in a computation."""

    async def main() -> list[tuple[int, object]]:
        first, second = X86Vm(), X86Vm()

        async def program(cpu: Any) -> None:
            await apic_on(cpu)
            cpu.set_vector(handler)
            if not masked:
                cpu.sti()
            await (cpu.hlt() if halts else cpu.compute(100))
            first.note("end")
            await done(cpu)

        async def handler(cpu: Any) -> None:
            first.note(cpu.vector)
            cpu.eoi()

        first.vcpus[0].load(program)
        with trio.move_on_at(30e-9):
            await first.run()
        second.vcpu().cpu_interface.set_base(APIC_PAGE | ENABLE | X2APIC)
        second.vcpu().cpu_interface.write(0xF0, 0x1FF)
        guest = first.vcpus[0].unload()
        assert guest is not None
        second.vcpus[0].load(guest)
        second.vcpus[0].mp_state = first.vcpus[0].mp_state
        second.at(50, nmi if masked else second.msi, second if masked else LOW)
        assert uapi.KVM_EXIT_IO == await second.run()
        return first.log

    vector = NMI if masked else LOW
    assert [(50, vector), (50 if halts else 100, "end")] == fabric.run(main)


def test_a_cpu_without_a_local_apic_has_no_eoi() -> None:
    """The VMM has it: its registers are exits."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        with pytest.raises(RuntimeError, match="the VMM has this CPU's local APIC"):
            cpu.eoi()
        with pytest.raises(GeneralProtection):
            await cpu.wrmsr(EOI, 0)
        with pytest.raises(ValueError, match="1, 2 or 4 bytes at 0 to 0xffff, not 8"):
            await cpu.inp(0x20, 8)

    simulate(one_run, body, irqchip="none")


def test_kvm_errors_name_the_vcpu() -> None:
    """EAGAIN of a processor that waits for its SIPI says so."""

    async def main(vm: X86Vm) -> None:
        vm.vm.signal_msi(MSI | 1 << 12, 5 << 8)
        with pytest.raises(KvmError, match="vCPU 1 has got an INIT and waits for its SIPI"):
            await vm.vcpus[1].run()

    simulate(main, idle, idle)
