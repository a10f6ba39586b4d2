"""Why KVM_RUN of an x86 vCPU returns, and what the run area says then; PICs and IOAPICs of the VMM's."""

from __future__ import annotations

from typing import Any

import pytest
from x86_guests import EOI, MSI, NOWHERE, PORT, RAM, X86Vm, apic_on, done, one_run, simulate

import fabric
from fabric.errors import KvmError
from fabric.kvm.typed import msi_route
from fabric.trace.ledger import LedgerStatement
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi import x86
from fabric.vcpu import Costs

VECTOR = 0x51
LEVEL = 1 << 15
LVT0 = 0x835
LVT_EXTINT = 7 << 8


def interrupt(vm: X86Vm, vector: int) -> None:
    """KVM_INTERRUPT."""
    vm.vcpus[0].ioctl(requests.KVM_INTERRUPT, x86.KvmInterrupt(vector))


def want_window(vm: X86Vm, wanted: bool = True) -> None:
    """kvm_run.request_interrupt_window."""
    vm.vcpus[0].run_area[uapi.KVM_RUN_REQUEST_INTERRUPT_WINDOW] = wanted


def told(vm: X86Vm) -> tuple[int, int, int, int]:
    """ready_for_interrupt_injection, if_flag, cr8 and apic_base."""
    return (
        vm.field(uapi.KVM_RUN_READY_FOR_INTERRUPT_INJECTION, 1),
        vm.field(uapi.KVM_RUN_IF_FLAG, 1),
        vm.field(uapi.KVM_RUN_CR8, 8),
        vm.field(uapi.KVM_RUN_APIC_BASE, 8),
    )


def noting(vm: X86Vm) -> Any:
    """A handler that ends nothing."""

    async def handler(cpu: Any) -> None:
        vm.note(cpu.vector)
        await cpu.compute(10)

    return handler


# Ports and memory


@pytest.mark.spec("api.exit.io")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_port_that_nobody_claims(size: int) -> None:
    """KVM_EXIT_IO: one access, its data in the page behind struct kvm_run; an IN gets what the VMM leaves there."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await cpu.outp(PORT, size, 0x1_1234_5678)
        vm.note(await cpu.inp(PORT + 1, size))

    async def main(vm: X86Vm) -> None:
        area = vm.vcpus[0].run_area
        data = slice(uapi.PAGE_SIZE, uapi.PAGE_SIZE + 4)
        assert uapi.KVM_EXIT_IO == await vm.run()
        assert uapi.KvmRunIo(uapi.KVM_EXIT_IO_OUT, size, PORT, 1, uapi.PAGE_SIZE) == vm.exit(uapi.KvmRunIo)
        assert (0x1234_5678).to_bytes(4, "little")[:size] == area[data][:size]
        assert uapi.KVM_EXIT_IO == await vm.run()
        assert uapi.KvmRunIo(uapi.KVM_EXIT_IO_IN, size, PORT + 1, 1, uapi.PAGE_SIZE) == vm.exit(uapi.KvmRunIo)
        area[data] = b"\x11\x22\x33\x44"
        await one_run(vm)

    value = int.from_bytes(b"\x11\x22\x33\x44"[:size], "little")
    assert [(0, value), (0, "end")] == simulate(main, body)


def test_ports_of_in_kernel_devices() -> None:
    """The mask of the 8259 pair: no exit to the VMM, which is nobody there without the pair."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await cpu.outp(0x21, 1, 0x55)
        vm.note(await cpu.inp(0x21, 1))

    async def main(vm: X86Vm) -> None:
        while vm.exit(uapi.KvmRunIo).port != PORT:
            await vm.run()
            vm.note(vm.exit(uapi.KvmRunIo).port)

    assert [(0, 0x55), (0, "end"), (0, PORT)] == simulate(main, body)
    assert [(0, 0x21), (0, 0x21), (0, 0x55), (0, "end"), (0, PORT)] == simulate(main, body, irqchip="none")


def test_doorbells_in_the_port_space() -> None:
    """An ioeventfd takes the write of its width; another one goes on to the VMM."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await cpu.outp(PORT + 8, 2, 1)
        await cpu.outp(PORT + 8, 4, 1)

    async def main(vm: X86Vm) -> None:
        event = vm.kvm.eventfd()
        vm.vm.ioeventfd(event, PORT + 8, 2, flags=uapi.KVM_IOEVENTFD_FLAG_PIO)
        assert uapi.KVM_EXIT_IO == await vm.run()
        assert (4, 1) == (vm.exit(uapi.KvmRunIo).size, event.read())
        await one_run(vm)

    simulate(main, body)


def test_memory_that_nobody_claims() -> None:
    """KVM_EXIT_MMIO, as everywhere; RAM is no exit."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await cpu.store(RAM, 4, 7)
        await cpu.store(NOWHERE, 4, await cpu.load(RAM, 4))

    async def main(vm: X86Vm) -> None:
        assert uapi.KVM_EXIT_MMIO == await vm.run()
        assert (NOWHERE, 1) == (vm.exit(uapi.KvmRunMmio).phys_addr, vm.exit(uapi.KvmRunMmio).is_write)
        await one_run(vm)

    simulate(main, body)


# A VMM with interrupt controllers of its own


async def halt(vm: X86Vm, cpu: Any) -> None:
    cpu.set_vector(noting(vm))
    cpu.sti()
    await cpu.hlt()


def test_without_local_apics_in_the_kernel_a_halt_is_an_exit() -> None:
    """KVM_EXIT_HLT; the guest goes on behind it, with the interrupt that was injected meanwhile, or without one."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await halt(vm, cpu)
        await cpu.hlt()

    async def main(vm: X86Vm) -> None:
        assert uapi.KVM_EXIT_HLT == await vm.run()
        assert (1, 1, 0, 0xFEE0_0900) == told(vm)
        interrupt(vm, VECTOR)
        assert uapi.KVM_EXIT_HLT == await vm.run()
        await one_run(vm)
        assert LedgerStatement() == vm.ledger  # its interrupt controller is not ours

    assert [(0, VECTOR), (10, "end")] == simulate(main, body, irqchip="none")


def test_a_program_that_returned_halts_for_ever() -> None:
    """Each KVM_RUN is KVM_EXIT_HLT, with IF clear."""

    async def main(vm: X86Vm) -> None:
        async def program(cpu: Any) -> None:
            vm.note("begins")

        vm.vcpus[0].load(program)
        for _ in range(3):
            assert uapi.KVM_EXIT_HLT == await vm.run()
            assert (0, 0) == told(vm)[:2]

    assert [(0, "begins")] == simulate(main, halt, irqchip="none")


def test_all_vcpus_run_without_local_apics_in_the_kernel() -> None:
    """The VMM keeps those back that are not to."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        vm.note(cpu.number)

    async def main(vm: X86Vm) -> None:
        assert uapi.KVM_EXIT_IO == await vm.run(1)

    assert [(0, 1), (0, "end")] == simulate(main, body, body, irqchip="none")


def test_an_interrupt_window() -> None:
    """Asked for, KVM_RUN ends as soon as a vector can be injected: when IF is set, and when a handler has returned."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        cpu.set_vector(noting(vm))
        await cpu.compute(30)
        cpu.sti()
        vm.note("sti")
        await cpu.compute(30)

    async def main(vm: X86Vm) -> None:
        want_window(vm)
        for vector in (VECTOR, VECTOR + 1):
            assert uapi.KVM_EXIT_IRQ_WINDOW_OPEN == await vm.run()
            assert (1, 1) == told(vm)[:2]
            vm.note("window")
            interrupt(vm, vector)
        want_window(vm, False)
        await one_run(vm)

    assert [
        (30, "sti"),
        (30, "window"),
        (30, VECTOR),
        (40, "window"),
        (40, VECTOR + 1),
        (80, "end"),
    ] == simulate(main, body, irqchip="none")


def test_an_interrupt_that_is_injected_with_if_clear_waits() -> None:
    """Until it is set; so long the VMM is told that it cannot inject another."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        cpu.set_vector(noting(vm))
        await done(cpu)
        cpu.sti()
        await cpu.compute(30)

    async def main(vm: X86Vm) -> None:
        interrupt(vm, VECTOR)
        assert uapi.KVM_EXIT_IO == await vm.run()
        assert (0, 0) == told(vm)[:2]
        await one_run(vm)
        assert (1, 1) == told(vm)[:2]

    assert [(0, VECTOR), (40, "end")] == simulate(main, body, irqchip="none")


def test_a_soft_interrupt_goes_through_whatever_if_is() -> None:
    """KVM_SET_VCPU_EVENTS of one that was on its way, and so does an exception."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        cpu.set_vector(noting(vm))
        await cpu.compute(30)
        await done(cpu)
        await cpu.compute(30)

    async def main(vm: X86Vm) -> None:
        soft = x86.KvmVcpuEvents(interrupt_injected=1, interrupt_nr=0x80, interrupt_soft=1)
        vm.vcpus[0].ioctl(requests.KVM_SET_VCPU_EVENTS, soft)
        assert uapi.KVM_EXIT_IO == await vm.run()
        vm.vcpus[0].ioctl(requests.KVM_SET_VCPU_EVENTS, x86.KvmVcpuEvents(exception_injected=1, exception_nr=6))
        await one_run(vm)

    assert [(0, 0x80), (40, 6), (80, "end")] == simulate(main, body)


def test_cr8_of_a_local_apic_in_the_vmm() -> None:
    """It is in the run area, both ways; lowering it is KVM_EXIT_SET_TPR, and 16 is EINVAL."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        vm.note(cpu.read_cr8())
        await cpu.write_cr8(9)
        vm.note("raised")
        await cpu.write_cr8(7)

    async def main(vm: X86Vm) -> None:
        area = vm.vcpus[0].run_area
        area[uapi.KVM_RUN_CR8] = 3
        assert uapi.KVM_EXIT_SET_TPR == await vm.run()
        assert 7 == told(vm)[2]
        area[uapi.KVM_RUN_CR8] = 16
        assert "EINVAL" == await vm.run()
        area[uapi.KVM_RUN_CR8] = 7
        await one_run(vm)

    assert [(0, 3), (0, "raised"), (0, "end")] == simulate(main, body, irqchip="none")


def test_what_kvm_run_tells_without_running() -> None:
    """With immediate_exit, too: EINTR, and the fields are those of now. A PIC in the kernel is always ready."""

    async def main(vm: X86Vm) -> None:
        vm.vcpu().cpu_interface.write(0x80, 0x40)
        vm.vcpus[0].run_area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1
        assert "EINTR" == await vm.run()
        assert (1, 0, 4, 0xFEE0_0900) == told(vm)

    simulate(main, halt)


def test_cr8_in_the_special_registers() -> None:
    """KVM_GET/SET_SREGS: the upper half of the local APIC's task priority."""
    vm = X86Vm()
    vm.vcpu().cpu_interface.write(0x80, 0x45)
    sregs = bytearray(x86.KvmSregs.SIZE)
    vm.vcpus[0].ioctl(requests.KVM_GET_SREGS, sregs)
    state = x86.KvmSregs.unpack(sregs)
    assert 4 == state.cr8
    for cr8, priority in ((9, 0x90), (16, 0x90)):
        vm.vcpus[0].ioctl(requests.KVM_SET_SREGS, state.with_(cr8=cr8))
        assert priority == vm.vcpu().cpu_interface.tpr


def test_a_triple_fault_that_the_vmm_sets() -> None:
    """KVM_SET_VCPU_EVENTS: the next KVM_RUN is KVM_EXIT_SHUTDOWN, once."""

    async def main(vm: X86Vm) -> None:
        vm.vm.ioctl(requests.KVM_ENABLE_CAP, uapi.KvmEnableCap(uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 0, (1, 0, 0, 0)))
        fault = x86.KvmVcpuEvents(flags=x86.KVM_VCPUEVENT_VALID_TRIPLE_FAULT, triple_fault_pending=1)
        vm.vcpus[0].ioctl(requests.KVM_SET_VCPU_EVENTS, fault)
        assert uapi.KVM_EXIT_SHUTDOWN == await vm.run()
        await one_run(vm)

    async def body(vm: X86Vm, cpu: Any) -> None:
        await cpu.compute(10)

    assert [(10, "end")] == simulate(main, body)


# A split irqchip


def test_a_vector_of_the_vmms_pic() -> None:
    """KVM_INTERRUPT with a split irqchip: it goes before the local APIC's, without EOI; LINT0 has to take ExtINTs."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await apic_on(cpu)
        await cpu.wrmsr(LVT0, 1 << 16)
        cpu.set_vector(noting(vm))
        cpu.sti()
        await done(cpu)
        await cpu.compute(30)
        await cpu.wrmsr(LVT0, LVT_EXTINT)
        await cpu.hlt()
        assert 0 == await cpu.rdmsr(0x812)  # ISR
        await done(cpu)
        await cpu.hlt()

    async def main(vm: X86Vm) -> None:
        assert uapi.KVM_EXIT_IO == await vm.run()
        assert (0, 1) == told(vm)[:2]
        interrupt(vm, VECTOR)
        with pytest.raises(KvmError, match="vector 81 still waits"):
            interrupt(vm, VECTOR)
        assert uapi.KVM_EXIT_IO == await vm.run()
        assert (1, 1) == told(vm)[:2]
        vm.msi(0xF1)
        interrupt(vm, VECTOR + 1)
        await one_run(vm)

    assert [(30, VECTOR), (40, VECTOR + 1), (50, 0xF1), (60, "end")] == simulate(main, body, irqchip="split")


def test_a_window_for_the_vmms_pic() -> None:
    """With a split irqchip it opens when IF is set and LINT0 takes ExtINTs; a PIC in the kernel needs none."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        cpu.set_vector(noting(vm))
        cpu.sti()
        await cpu.compute(30)

    async def main(vm: X86Vm) -> None:
        want_window(vm)
        if vm.inside.irqchip.split:
            assert uapi.KVM_EXIT_IRQ_WINDOW_OPEN == await vm.run()
            want_window(vm, False)
        await one_run(vm)

    for irqchip in ("split", "kernel"):
        assert [(30, "end")] == simulate(main, body, irqchip=irqchip)


async def ending(vm: X86Vm, cpu: Any) -> None:
    """A guest that takes one interrupt, and ends it three times over."""
    await apic_on(cpu)

    async def handler(cpu: Any) -> None:
        vm.note(cpu.vector)
        await (cpu.wrmsr(EOI, 0) if vm.log[0][1] == "msr" else nothing(cpu.eoi()))

    cpu.set_vector(handler)
    cpu.sti()
    await cpu.hlt()
    await cpu.compute(10)


async def nothing(_: None) -> None:
    """For an expression that is no coroutine."""


@pytest.mark.spec("api.cap.split-irqchip", "api.exit.ioapic-eoi")
@pytest.mark.parametrize("how", ["msr", "call"])
def test_the_end_of_an_interrupt_of_the_vmms_ioapic(how: str) -> None:
    """KVM_EXIT_IOAPIC_EOI with its vector: of level-triggered messages that reserved GSIs are routed to, no others."""

    async def main(vm: X86Vm) -> None:
        vm.note(how)
        vm.vm.set_routes(
            [
                msi_route(3, MSI, VECTOR | LEVEL),
                msi_route(4, MSI, VECTOR + 1),  # an edge
                msi_route(5, MSI | 7 << 12, VECTOR + 2 | LEVEL),  # of another local APIC
                msi_route(24, MSI, VECTOR + 3 | LEVEL),  # not reserved
            ]
        )
        vm.at(10, vm.msi, VECTOR + 3)
        vm.at(10, vm.msi, VECTOR + 2)
        vm.at(10, vm.msi, VECTOR + 1)
        vm.at(10, vm.msi, VECTOR)
        assert uapi.KVM_EXIT_IOAPIC_EOI == await vm.run()
        assert VECTOR == vm.field(uapi.KVM_RUN_EXIT, 1)
        await one_run(vm)

    taken = [(10, VECTOR + n) for n in (3, 2, 1, 0)]
    assert [(0, how), *taken, (20, "end")] == simulate(main, ending, irqchip="split")


def test_an_end_is_told_before_another_exit() -> None:
    """Also when the EOI was written without leaving the guest."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await apic_on(cpu)
        vm.msi(VECTOR)
        cpu.set_vector(nothing)
        cpu.sti()
        await cpu.hlt()
        cpu.eoi()
        await cpu.outp(PORT, 1, 1)

    async def main(vm: X86Vm) -> None:
        vm.vm.set_routes([msi_route(3, MSI, VECTOR | LEVEL)])
        assert uapi.KVM_EXIT_IOAPIC_EOI == await vm.run()
        assert uapi.KVM_EXIT_IO == await vm.run()
        await one_run(vm)

    simulate(main, body, irqchip="split")


def test_an_end_is_told_although_the_route_has_moved() -> None:
    """The vector was in service when the routes were set, so that its end is the IOAPIC's still; later ones are not."""
    moved = [msi_route(3, MSI | 9 << 12, VECTOR | LEVEL)]

    async def body(vm: X86Vm, cpu: Any) -> None:
        await apic_on(cpu)

        async def handler(cpu: Any) -> None:
            if vm.ledger.raised == 1:
                vm.vm.set_routes(moved)
            cpu.eoi()

        cpu.set_vector(handler)
        cpu.sti()
        vm.msi(VECTOR)
        await cpu.compute(1)
        vm.vm.set_routes(moved)
        vm.msi(VECTOR)
        await cpu.compute(1)

    async def main(vm: X86Vm) -> None:
        vm.vm.set_routes([msi_route(3, MSI, VECTOR | LEVEL)])
        assert uapi.KVM_EXIT_IOAPIC_EOI == await vm.run()
        await one_run(vm)
        assert 2 == vm.ledger.delivered

    simulate(main, body, irqchip="split")


@pytest.mark.parametrize(("flag", "exits"), [(4, False), (8, True), (0, True)])
def test_a_guest_may_keep_its_ends_to_itself(flag: int, exits: bool) -> None:
    """Directed EOI (SVR bit 12), where KVM_CAP_X2APIC_API has turned it on: the guest tells the IOAPIC by itself."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await apic_on(cpu)
        await cpu.wrmsr(0x80F, 0x11FF)
        vm.msi(VECTOR)
        cpu.set_vector(handler)
        cpu.sti()
        await cpu.hlt()
        await cpu.compute(1)

    async def handler(cpu: Any) -> None:
        cpu.eoi()

    async def main(vm: X86Vm) -> None:
        if flag:
            vm.vm.ioctl(requests.KVM_ENABLE_CAP, uapi.KvmEnableCap(uapi.KVM_CAP_X2APIC_API, 0, (flag, 0, 0, 0)))
        vm.vm.set_routes([msi_route(3, MSI, VECTOR | LEVEL)])
        if exits:
            assert uapi.KVM_EXIT_IOAPIC_EOI == await vm.run()
        await one_run(vm)

    simulate(main, body, irqchip="split")


def test_an_exit_to_the_vmm_takes_longer() -> None:
    """userspace_exit_ns more than one that the kernel handles."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        await cpu.inp(PORT, 1)
        vm.note("in")

    async def main(vm: X86Vm) -> None:
        vm.vcpu().costs = Costs(exit_ns=100, userspace_exit_ns=1000)
        await vm.run()
        await one_run(vm)

    assert (1100, "in") == simulate(main, body)[0]


def test_time_passes_in_no_exit() -> None:
    """Without costs an exit takes none: the guest goes on when the VMM lets it."""

    async def body(vm: X86Vm, cpu: Any) -> None:
        vm.note(await cpu.inp(PORT, 1))

    async def main(vm: X86Vm) -> None:
        await vm.run()
        await fabric.sleep(70)
        vm.vcpus[0].run_area[uapi.PAGE_SIZE] = 5
        await one_run(vm)

    assert [(70, 5), (70, "end")] == simulate(main, body)
