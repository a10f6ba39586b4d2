"""What an x86 guest program sees of its CPU.

::

    async def disk(cpu):
        await cpu.compute(500)
        cpu.eoi()

    async def program(cpu):
        cpu.set_gate(0x31, disk)
        await cpu.wrmsr(0x80F, 0x1FF)       # SVR: the local APIC is on
        cpu.sti()
        await cpu.hlt()

**Interrupts** come through gates, as through an IDT: :meth:`X86Cpu.set_gate` gives a vector its handler, and
:meth:`~fabric.vcpu.cpu.Cpu.set_vector` all vectors that have none of their own. ``await handler(cpu)`` runs with IF
clear and with the vector in ``cpu.vector``; what it returns from is an interrupt gate, so that IF is as before. A
maskable interrupt is taken by asking for its vector (INTA): of the 8259 pair where that has one for this CPU, else of
the local APIC, whose interrupt is in service from then on until :meth:`X86Cpu.eoi`. A vector without a handler is a
fault: #GP, without a handler #DF, and without that a triple fault, which is KVM_EXIT_SHUTDOWN.

An NMI goes through gate 2 whatever IF is, and others wait until that handler has returned. An SMI takes the time of an
exit, and nothing of it is seen. An INIT ends the program; it begins anew at the SIPI that follows, on the boot
processor at once. All of them are noticed where interrupts are: in ``compute`` and in ``hlt``.

Left out: the instruction after STI or MOV SS, in which no interrupt is taken; exceptions of the guest's own making.

Sources: Intel SDM vol. 3, 6 (interrupts), 9.4 (MP initialisation), 11 (local APIC); SDM vol. 2, HLT.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, Final, NoReturn

from fabric.clock.hosted import Leave
from fabric.devices.x86.lapic import EOI, MSR_BASE, SELF_IPI, TMCCT, TPR
from fabric.uapi.kvm import KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE
from fabric.uapi.x86 import MSR_IA32_TSC
from fabric.vcpu import x86_hyperv
from fabric.vcpu.cpu import Cpu
from fabric.vcpu.x86_exits import HLT, IRQ_WINDOW_OPEN, SET_TPR, SHUTDOWN, IoapicEoiExit, IoExit
from fabric.vcpu.x86_msrs import X2APIC_MSRS, BadMsr, read_msr, write_msr

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence

    from fabric.vcpu.vcpu import Vcpu
    from fabric.vcpu.x86 import X86Vcpu

    Handler = Callable[[Any], Awaitable[object]]

DOUBLE_FAULT, GENERAL_PROTECTION = 8, 13
NMI_VECTOR = 2
MSR_EOI: Final = MSR_BASE + (EOI >> 4)
PORTS = 1 << 16
PORTS_BUS = "pio"

_READ_WITHOUT_EXIT = frozenset(X2APIC_MSRS) - {MSR_BASE + (TMCCT >> 4)} | {MSR_IA32_TSC}
_WRITTEN_WITHOUT_EXIT = frozenset(MSR_BASE + (offset >> 4) for offset in (TPR, EOI, SELF_IPI))
_OFFSETS_WITHOUT_EXIT = frozenset((TPR, EOI))
"""What the hardware answers in KVM's place: virtual APIC page, virtual interrupt delivery (Intel SDM vol. 3, 30)."""


class GeneralProtection(Exception):
    """#GP: raised in a guest program by an access that its CPU refuses."""


class X86Cpu(Cpu):
    """What an x86 guest program runs on.

    ``eoi()`` ends the interrupt in service as a write to the EOI register does, which the hardware answers without
    leaving the guest; what it costs passes with the next thing that takes time. RuntimeError without a local APIC in
    the kernel.
    """

    __slots__ = ("_apic", "_gates", "eoi", "vector")

    _vcpu: X86Vcpu

    def __init__(self, vcpu: Vcpu) -> None:
        super().__init__(vcpu)
        self._gates: dict[int, Handler] = {}
        self.vector = -1
        """Which interrupt the handler that runs was called for; -1 outside of handlers."""
        self.masked = not self._vcpu.interrupt_flag

    def bind(self, vcpu: Vcpu) -> None:
        """As the base class; the local APIC is that of ``vcpu`` as well."""
        super().bind(vcpu)
        self._apic: Any = vcpu.cpu_interface
        self.eoi: Callable[[], None]
        if self._apic is None:
            self.eoi = self._no_apic
        else:
            self.eoi = self._priced_eoi if vcpu.costs.eoi_ns else self._apic.eoi

    # Interrupts.

    def set_gate(self, vector: int, handler: Handler | None) -> None:
        """Have interrupts of ``vector`` (0 to 255) taken by ``await handler(cpu)``; None: as those without a gate."""
        if not 0 <= vector <= 255:
            raise ValueError(f"a vector is 0 to 255, not {vector!r}")
        if handler is None:
            self._gates.pop(vector, None)
        else:
            self._gates[vector] = handler

    def unmask(self) -> None:
        """STI: an interrupt that is pending is taken at the next ``compute`` or ``hlt``."""
        if self._vector is None and not self._gates:
            raise RuntimeError("the program unmasks interrupts without a handler: call cpu.set_gate first")
        self.masked = False
        if self._vcpu.awaits_if:
            self._vcpu.note_event()

    sti = unmask
    cli = Cpu.mask

    @types.coroutine
    def wait_for_interrupt(self, until_ns: int | None = None) -> Generator[Any, Any, None]:
        """HLT: wait for an interrupt that can be taken, and take it. With IF clear only an NMI or an INIT ends it.

        With ``until_ns`` it ends at that time at the latest (as TPAUSE). Where the VMM has the local APICs it is
        KVM_EXIT_HLT.
        """
        vcpu = self._vcpu
        interface = self._controller
        if vcpu.disturbed:
            yield from self._attend()
            vcpu, interface = self._vcpu, self._controller
        if self.masked or not interface.line:
            if self._apic is None:
                yield from self._leave(HLT)
                if self._vcpu.disturbed:
                    yield from self._attend()
                vcpu, interface = self._vcpu, self._controller
            else:
                if vcpu.host is not None:
                    vcpu.host.release(vcpu)
                vcpu.activity = KVM_MP_STATE_HALTED
                while self.masked or not interface.line:
                    if vcpu.disturbed:
                        yield from self._attend()
                        vcpu, interface = self._vcpu, self._controller
                        if vcpu.activity != KVM_MP_STATE_HALTED:
                            break  # by what is no interrupt, or the VMM says so
                        continue
                    task = self._engine.current
                    if until_ns is not None:
                        if self._engine.now >= until_ns:
                            break
                        self._engine.wake_at(task, until_ns)
                    task.waits = vcpu
                    if not self.masked:
                        vcpu.wakeable = task
                    yield
                    vcpu.wakeable = None
                vcpu.activity = KVM_MP_STATE_RUNNABLE
                if vcpu.wakeup_ns:
                    yield from self._spend(vcpu.wakeup_ns)
                    vcpu, interface = self._vcpu, self._controller
                elif vcpu.host is not None:
                    yield from self._schedule_in()
                    vcpu, interface = self._vcpu, self._controller
        if self.masked:
            return
        while interface.line:
            if vcpu.disturbed or (vcpu.host is not None and vcpu.pcpu is None):
                yield from self._schedule_in()
                vcpu, interface = self._vcpu, self._controller
                continue
            self.masked = True
            if self._injection_ns:
                yield from self._spend(self._injection_ns)
                interface = self._controller
            vector = interface.take()
            if vector is not None:  # it may be gone by now
                handler: Any = self._gates.get(vector, self._vector)
                if handler is None:
                    yield from self._enter_gate(vector)
                else:
                    outer, self.vector = self.vector, vector
                    yield from handler(self)
                    self.vector = outer
            self.masked = False
            vcpu, interface = self._vcpu, self._controller
            if vcpu.awaits_if:
                vcpu.note_event()

    hlt = wait_for_interrupt
    _take_interrupts = wait_for_interrupt  # for one that is there it does not wait

    # Registers.

    async def rdmsr(self, index: int) -> int:
        """Read an MSR. GeneralProtection for one that is not there, or not to be read."""
        if index not in _READ_WITHOUT_EXIT:
            await self._exit()
        try:
            return read_msr(self._vcpu, index, host=False)
        except BadMsr:
            raise GeneralProtection(f"rdmsr of {index:#x}") from None

    async def wrmsr(self, index: int, value: int) -> None:
        """Write an MSR. GeneralProtection for one that is not there, or does not take that value."""
        if index == MSR_EOI and not value >> 32 and self._apic is not None and self._apic.x2apic:
            self.eoi()
            await self._tell_ends()
            return
        if index not in _WRITTEN_WITHOUT_EXIT:
            await self._exit()
        try:
            write_msr(self._vcpu, index, value & (1 << 64) - 1, host=False)
        except BadMsr:
            raise GeneralProtection(f"wrmsr of {value:#x} to {index:#x}") from None
        hyperv = self._vcpu.hyperv
        if hyperv is not None and hyperv.request is not None:
            await self._leave(x86_hyperv.take_exit(hyperv))

    async def hypercall(self, value: int, input: int = 0, output: int = 0, xmm: Sequence[int] = ()) -> int:
        """Hyper-V's hypercall with ``value`` in RCX and its parameters in RDX and R8 (``xmm``: and in the 64-bit halves
        of XMM0 to XMM5); returns RAX. What KVM does not answer by itself is KVM_EXIT_HYPERV.

        Raises:
            InvalidOpcode: #UD, before the guest has set up the hypercall page.
        """
        return await x86_hyperv.hypercall(self, value, input, output, xmm)

    def rdtsc(self) -> int:
        """The time stamp counter, which no host has to be asked for."""
        return self._vcpu.tsc.value

    async def cpuid(self, function: int, index: int = 0) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX of a leaf as the VMM gave it; zeros for one that it did not give."""
        await self._exit()
        leaf = self._vcpu.cpuid_leaf(function, index)
        return (0, 0, 0, 0) if leaf is None else (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx)

    def read_cr8(self) -> int:
        """The task priority: interrupts of vectors below ``(cr8 + 1) * 16`` wait."""
        return self._vcpu.cr8

    async def write_cr8(self, value: int) -> None:
        """Set the task priority, 0 to 15. Where the VMM has the local APICs it is told when it is lowered."""
        if not 0 <= value <= 15:
            raise GeneralProtection(f"CR8 is 0 to 15, not {value}")
        before, self._vcpu.cr8 = self._vcpu.cr8, value
        if self._apic is None and value < before:
            await self._exit()
            await self._leave(SET_TPR)

    # Ports and memory.

    async def inp(self, port: int, size: int) -> int:
        """IN: read ``size`` (1, 2, 4) bytes of a port: an in-kernel device's, or the VMM's (KVM_EXIT_IO)."""
        _check_port(port, size)
        await self._exit()
        found = self._vcpu.vm.pio.find(port, size)
        if found is not None:
            handler, offset = found
            return handler.mmio_read(offset, size, self._vcpu)
        return int(await self._leave(IoExit(port, size, None)))

    async def outp(self, port: int, size: int, value: int) -> None:
        """OUT: write the low ``size`` (1, 2, 4) bytes of ``value`` to a port."""
        _check_port(port, size)
        value &= (1 << 8 * size) - 1
        await self._exit()
        vm = self._vcpu.vm
        doorbells = vm.buses.get(PORTS_BUS)
        if doorbells is not None and doorbells.write(port, size, value):
            return
        found = vm.pio.find(port, size)
        if found is not None:
            handler, offset = found
            handler.mmio_write(offset, size, value, self._vcpu)
            return
        await self._leave(IoExit(port, size, value))

    def load(self, gpa: int, size: int) -> Coroutine[Any, Any, int]:
        """As the base class; the page of this CPU's local APIC is its own."""
        return self._load_apic(gpa, size) if self._in_apic_page(gpa) else super().load(gpa, size)

    def store(self, gpa: int, size: int, value: int) -> Coroutine[Any, Any, None]:
        """As the base class; the page of this CPU's local APIC is its own."""
        return self._store_apic(gpa, size, value) if self._in_apic_page(gpa) else super().store(gpa, size, value)

    # Inside.

    def _in_apic_page(self, gpa: int) -> bool:
        apic = self._apic
        return apic is not None and gpa >> 12 == apic.base >> 12 and not self._vcpu.vm.memory.is_backed(gpa, 1)

    async def _load_apic(self, gpa: int, size: int) -> int:
        if gpa & 0xFFF not in _OFFSETS_WITHOUT_EXIT:
            await self._exit()
        apic = self._apic
        if not apic.hw_enabled or apic.x2apic:
            return (1 << 8 * size) - 1  # a hole, which KVM leaves there for old VMMs (KVM_X86_QUIRK_LAPIC_MMIO_HOLE)
        value: int = apic.mmio_read(gpa & 0xFFF, size, self._vcpu)
        return value

    async def _store_apic(self, gpa: int, size: int, value: int) -> None:
        offset = gpa & 0xFFF
        if offset not in _OFFSETS_WITHOUT_EXIT:
            await self._exit()
        apic = self._apic
        if not apic.hw_enabled or apic.x2apic:
            return
        if offset == EOI and size == 4:
            self.eoi()
            await self._tell_ends()
        else:
            apic.mmio_write(offset, size, value & (1 << 8 * size) - 1, self._vcpu)

    async def _exit(self) -> None:
        """Leave the guest and enter it again."""
        if self._vcpu.costs.exit_ns:
            await self._spend(self._vcpu.costs.exit_ns)

    def _priced_eoi(self) -> None:
        self._apic.eoi()
        self._vcpu.owe(self._vcpu.costs.eoi_ns)

    def _no_apic(self) -> NoReturn:
        raise RuntimeError("the VMM has this CPU's local APIC: its EOI register is in memory")

    @types.coroutine
    def _enter_gate(self, vector: int) -> Generator[Any, Any, None]:
        """Call the handler of a vector with IF clear; of #GP or #DF if it has none."""
        gates: Any = self._gates
        handler = gates.get(vector, self._vector)
        if handler is None:
            vector = GENERAL_PROTECTION if GENERAL_PROTECTION in gates else DOUBLE_FAULT
            handler = gates.get(vector)
        while handler is None:
            yield from self._leave(SHUTDOWN)
        self._vcpu.activity = KVM_MP_STATE_RUNNABLE
        masked, outer = self.masked, self.vector
        self.masked, self.vector = True, vector
        yield from handler(self)
        self.masked, self.vector = masked, outer

    @types.coroutine
    def _leave(self, exit_: Any) -> Generator[Any, Any, Any]:
        if self._vcpu.ended:
            yield from self._leave_for_ends()
        return (yield from super()._leave(exit_))

    @types.coroutine
    def _leave_for_ends(self) -> Generator[Any, Any, None]:
        """KVM_EXIT_IOAPIC_EOI for each interrupt of the VMM's IOAPIC that has ended."""
        while self._vcpu.ended:
            yield from super()._leave(IoapicEoiExit(self._vcpu.ended.popleft()))

    async def _tell_ends(self) -> None:
        if self._vcpu.ended:
            await self._leave_for_ends()

    @types.coroutine
    def _attend(self) -> Generator[Any, Any, None]:
        yield from super()._attend()
        if self._vcpu.events:
            yield from self._take_events()

    @types.coroutine
    def _take_events(self) -> Generator[Any, Any, None]:
        """See to all that came and is not an interrupt of the local APIC, in the order of the CPU's priorities."""
        while True:
            vcpu = self._vcpu
            vcpu.events = False
            vcpu.collect_nmis()
            exception = vcpu.exception
            if vcpu.ended:
                yield from self._leave_for_ends()
            elif vcpu.init_pending and not vcpu.smm:
                yield Leave(None)  # and never comes back
            elif vcpu.triple_fault:
                vcpu.triple_fault = False
                yield from self._leave(SHUTDOWN)
            elif exception.injected or exception.pending:
                vcpu.forget_exception()
                yield from self._enter_gate(exception.nr)
            elif vcpu.interrupt_injected and (vcpu.interrupt_soft or not self.masked):
                vcpu.interrupt_injected = False
                yield from self._enter_gate(vcpu.interrupt_nr)
            elif vcpu.smi_pending and not vcpu.smm:
                vcpu.smi_pending = False
                vcpu.activity = KVM_MP_STATE_RUNNABLE
                yield from self._exit()
            elif vcpu.take_nmi():
                yield from self._enter_gate(NMI_VECTOR)
                self._vcpu.end_nmi()
            elif vcpu.window and vcpu.ready_for_injection:
                vcpu.window = False
                yield from self._leave(IRQ_WINDOW_OPEN)
            else:
                break
        vcpu.sipi_pending = False  # nobody waits for it
        if vcpu.unhalted:
            vcpu.unhalted = False
            vcpu.activity = KVM_MP_STATE_RUNNABLE
        vcpu.awaits_if = vcpu.window or vcpu.interrupt_injected


def _check_port(port: int, size: int) -> None:
    if size not in (1, 2, 4) or not 0 <= port < PORTS:
        raise ValueError(f"a port access has 1, 2 or 4 bytes at 0 to 0xffff, not {size} at {port:#x}")
