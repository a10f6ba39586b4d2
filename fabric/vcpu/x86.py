"""The x86 vCPU: the state that a VMM reads and writes, and what KVM_RUN does with it.

What its guest sees is in :mod:`fabric.vcpu.x86_cpu`. What comes for a vCPU and is no interrupt of its local APIC (NMI,
SMI, INIT, SIPI, what the VMM injects) waits here; the guest is told by :meth:`X86Vcpu.note_event` and sees to it where
it computes or halts.

**MP states.** An application processor begins UNINITIALIZED. KVM_RUN then waits for an INIT and returns EAGAIN, so
that the VMM may do something about it (api.run.EAGAIN.wait-sipi); the next one waits for the SIPI (INIT_RECEIVED), at
which the program begins. A program that returns is as one that halts with IF clear. HALTED is the state of one that
halts; a VMM may set it, and the vCPU then does nothing until something comes that would end a HLT. Without local APICs
in the kernel all vCPUs run, and the VMM keeps those back that are not to.

**NMIs** are in the ledger: raised when one comes, merged when more wait than can be kept, delivered when the guest
takes one. Vectors that the VMM injects come from an interrupt controller of its own, and are not.
"""

from __future__ import annotations

import errno
import types
from collections import deque
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

import attrs

from fabric.devices.x86.lapic import BASE_BSP, BASE_ENABLE, BASE_X2APIC, DEFAULT_BASE, TPR
from fabric.errors import KvmError
from fabric.uapi.kvm import (
    KVM_MP_STATE_AP_RESET_HOLD,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
    KVM_RUN_CR8,
    KVM_RUN_READY_FOR_INTERRUPT_INJECTION,
    KVM_RUN_REQUEST_INTERRUPT_WINDOW,
    PAGE_SIZE,
)
from fabric.uapi.x86 import KvmDtable, KvmRegs, KvmSegment, KvmSregs
from fabric.vcpu.vcpu import Vcpu
from fabric.vcpu.x86_cpu import NMI_VECTOR, X86Cpu
from fabric.vcpu.x86_exits import HLT

if TYPE_CHECKING:
    from collections.abc import Generator

    from fabric.clock.engine import Engine
    from fabric.clock.tsc import GuestTsc
    from fabric.devices.base import VmServices
    from fabric.devices.x86.hyperv import VirtualProcessor
    from fabric.uapi.x86 import KvmCpuidEntry2
    from fabric.vcpu.exits import Exit
    from fabric.vcpu.x86_pv import Paravirt

CPUID_1_ECX_X2APIC = 1 << 21
CPUID_1_ECX_TSC_DEADLINE = 1 << 24
CPUID_7_EBX_TSC_ADJUST = 1 << 1
CPUID_KVM_FEATURES = 0x4000_0001
CPUID_FLAG_INDEXED = 1
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX: a leaf with subleaves."""
RFLAGS_IF = 1 << 9
RFLAGS_ALWAYS = 1 << 1
RUN_FLAG_SMM = 1 << 0
MAX_CR8 = 15
RUN_AREA_PAGES = 3
"""struct kvm_run, the data of port accesses, the ring of coalesced MMIO."""

_BASE_RESERVED = 0xFF | 1 << 9 | 0xFFF << 52
_HALTED: Final = {KVM_MP_STATE_HALTED, KVM_MP_STATE_AP_RESET_HOLD}
"""MP states that an interrupt ends."""
_TOLD: Final = Struct("<BBHQQ")
"""What KVM_RUN leaves from ready_for_interrupt_injection on: that, if_flag, flags, cr8, apic_base."""


@attrs.frozen
class ExceptionState:
    """An exception on its way into the guest."""

    nr: int = 0
    injected: bool = False
    pending: bool = False
    has_error_code: bool = False
    error_code: int = 0
    has_payload: bool = False
    payload: int = 0


class X86Vcpu(Vcpu):
    """An x86 vCPU.

    Its local APIC, if the VM has an irqchip in the kernel, is ``cpu_interface``; it calls the ``receive_*`` methods for
    what is not a maskable interrupt.
    """

    __slots__ = (
        "_apic_base",
        "_cr8",
        "_regs",
        "activity",
        "awaits_if",
        "cpuid",
        "ended",
        "events",
        "exception",
        "external_vector",
        "has_returned",
        "hyperv",
        "init_pending",
        "interrupt_injected",
        "interrupt_nr",
        "interrupt_shadow",
        "interrupt_soft",
        "is_bsp",
        "nmi_injected",
        "nmi_masked",
        "nmi_pending",
        "nmi_queued",
        "pv",
        "sipi_pending",
        "sipi_vector",
        "smi_pending",
        "smm",
        "smm_inside_nmi",
        "sregs",
        "triple_fault",
        "tsc",
        "unhalted",
        "window",
    )

    cpu_class = X86Cpu

    def __init__(self, vm: VmServices, vcpu_id: int, index: int, engine: Engine | None, *, is_bsp: bool) -> None:
        super().__init__(vm, vcpu_id, index, engine)
        self.run_area = bytearray(RUN_AREA_PAGES * PAGE_SIZE)
        self.run_view = memoryview(self.run_area)
        self.tsc: GuestTsc
        self.pv: Paravirt
        """Given by whoever makes it, as the VM's vCPUs share what they are made of."""
        self.hyperv: VirtualProcessor | None = None
        """Likewise; None on a host without Hyper-V."""
        self.is_bsp = is_bsp
        """It is the boot processor."""
        self._apic_base = DEFAULT_BASE | BASE_ENABLE | (BASE_BSP if is_bsp else 0)
        """MSR_IA32_APICBASE where the VMM has the local APIC."""
        self._cr8 = 0
        """The task priority where the VMM has the local APIC."""
        self.cpuid: list[KvmCpuidEntry2] = []
        self.activity = KVM_MP_STATE_RUNNABLE
        """Its MP state."""
        self.has_returned = False
        """Its program has, so that there is nothing to go on with."""
        self.mp_state = KVM_MP_STATE_RUNNABLE if is_bsp else KVM_MP_STATE_UNINITIALIZED
        self.events = False
        """There is something for the guest to see to."""
        self.awaits_if = False
        """There is, when it sets IF."""
        self.window = False
        """The VMM wants an exit when it can inject an interrupt (kvm_run.request_interrupt_window)."""
        self.ended: deque[int] = deque()
        """Vectors that the VMM's IOAPIC has to be told the end of (split irqchip)."""
        self.nmi_pending = 0
        """NMIs that wait, of those that came in :attr:`nmi_queued` as many as can be kept."""
        self.nmi_queued = 0
        self.smm = self.smm_inside_nmi = False
        self.init_pending = self.sipi_pending = False
        """What came for the vCPU to do when it looks next."""
        self.sipi_vector = 0
        self.external_vector: int | None = None
        """KVM_INTERRUPT with a split irqchip: the vector that the VMM's PIC gave."""
        self.unhalted = False
        self.exception = ExceptionState()
        self.interrupt_nr = 0
        self.triple_fault = False
        self.clear_events()
        self.reset_registers()
        vm.ledger.add_pending_probe(self._count_nmis)

    # -- KVM_RUN

    def entering(self) -> None:
        """KVM_RUN begins: what was changed from outside is something to see to.

        Raises:
            KvmError: EINVAL for a CR8 that cannot be, where it is the VMM's.
        """
        apic = self.cpu_interface
        if apic is None:
            cr8 = int.from_bytes(self.run_area[KVM_RUN_CR8 : KVM_RUN_CR8 + 8], "little")
            if cr8 > MAX_CR8:
                raise KvmError(errno.EINVAL, f"CR8 is 0 to 15, not {cr8}")
            self._cr8 = cr8
        elif apic.timer.pending:
            apic.timer.entering()
        self.pv.entering()
        if self.hyperv is not None:
            self.hyperv.entering()
        if self.init_pending and not self.smm and self.activity != KVM_MP_STATE_UNINITIALIZED:
            self.accept_events()
        self.interrupt_shadow = 0
        self.window = bool(self.run_area[KVM_RUN_REQUEST_INTERRUPT_WINDOW]) and not self._pic_in_kernel
        exception = self.exception
        if (
            self.window
            or self.interrupt_injected
            or self.nmi_queued
            or self.nmi_pending
            or self.nmi_injected
            or self.smi_pending
            or self.ended
            or self.triple_fault
            or exception.injected
            or exception.pending
        ):
            self.note_event()

    def leaving(self) -> None:
        """KVM_RUN ends: what a VMM with a PIC of its own wants to know."""
        ready = self._pic_in_kernel or self.ready_for_injection
        flags = RUN_FLAG_SMM if self.smm else 0
        at = KVM_RUN_READY_FOR_INTERRUPT_INJECTION
        self.pv.leaving()
        _TOLD.pack_into(self.run_area, at, ready, self.interrupt_flag, flags, self.cr8, self.apic_base)

    def stole(self, ns: int) -> None:
        """As the base class; its guest is told."""
        super().stole(ns)
        if self.pv.steal:
            self.pv.note_steal()

    def touch_hardware(self) -> None:
        """Also when no guest has run."""
        self.leaving()

    async def _stay_off(self) -> Exit | None:
        if self.cpu_interface is None:
            return HLT  # the program has returned
        if self.activity == KVM_MP_STATE_RUNNABLE:
            self.activity = KVM_MP_STATE_HALTED  # likewise
            self.has_returned = True
        while self.powered_off:
            if self.interrupted:
                self._eintr()
            if self.init_pending or self.sipi_pending:
                fresh = self.activity == KVM_MP_STATE_UNINITIALIZED
                self.accept_events()
                if fresh:
                    raise KvmError(errno.EAGAIN, f"vCPU {self.vcpu_id} has got an INIT and waits for its SIPI")
            elif self._wakes:
                self.mp_state = KVM_MP_STATE_RUNNABLE
            else:
                await self._any_event()
        return None

    @types.coroutine
    def _any_event(self) -> Generator[Any, Any, None]:
        """Wait for an interrupt, or for something else that comes."""
        assert self.engine is not None
        task: Any = self.engine.current
        task.waits = self
        self.wakeable = task
        yield
        self.wakeable = None

    @property
    def _wakes(self) -> bool:
        """There is something that ends the halt in which the VMM has put it."""
        if self.activity not in _HALTED or self.has_returned:
            return False
        nmi = self.nmi_injected or (self._count_nmis() > 0 and not self.nmi_masked)
        smi = self.smi_pending and not self.smm
        exception = self.exception.injected or self.exception.pending
        return nmi or smi or exception or self.unhalted or (self.cpu_interface.line and self.interrupt_flag)

    def note_event(self) -> None:
        """There is something for the guest to see to before it goes on."""
        self.events = True
        self.disturb()

    @property
    def _pic_in_kernel(self) -> bool:
        irqchip = self.vm.irqchip
        return irqchip is not None and irqchip.pic is not None

    @property
    def ready_for_injection(self) -> bool:
        """The VMM may inject a vector (KVM_INTERRUPT) that is taken at once."""
        if not self.interrupt_flag or self.interrupt_injected or self.exception.injected or self.exception.pending:
            return False
        return self.cpu_interface is None or bool(self.cpu_interface.takes_extint)

    @property
    def mp_state(self) -> int:
        """KVM_MP_STATE_*."""
        return self.activity

    @mp_state.setter
    def mp_state(self, state: int) -> None:
        before, self.activity = self.activity, state
        if state in _HALTED and before in _HALTED:
            return  # by a HLT of its own, or by the end of its program
        self.has_returned = False
        if state == KVM_MP_STATE_RUNNABLE:
            self.power_on()
        else:
            self.powered_off = True

    # -- registers

    @property
    def interrupt_flag(self) -> bool:
        """IF."""
        cpu = self._guest_cpu
        return bool(self._regs.rflags & RFLAGS_IF) if cpu is None else not cpu.masked

    @property
    def _guest_cpu(self) -> X86Cpu | None:
        """What the guest knows it as, if it has begun, here or elsewhere."""
        cpu: X86Cpu | None = self._cpu if self._arrived is None else self._arrived.cpu
        return cpu

    @property
    def regs(self) -> KvmRegs:
        """KVM_GET/SET_REGS. Of a guest that runs only IF is real."""
        flag = RFLAGS_IF if self.interrupt_flag else 0
        return self._regs.with_(rflags=self._regs.rflags & ~RFLAGS_IF | flag)

    @regs.setter
    def regs(self, regs: KvmRegs) -> None:
        self._regs = regs
        cpu = self._guest_cpu
        if cpu is not None:
            cpu.masked = not regs.rflags & RFLAGS_IF

    @property
    def cr8(self) -> int:
        """The task priority, 0 to 15."""
        return self._cr8 if self.cpu_interface is None else int(self.cpu_interface.tpr >> 4)

    @cr8.setter
    def cr8(self, value: int) -> None:
        if self.cpu_interface is None:
            self._cr8 = value
        else:
            self.cpu_interface.write(TPR, value << 4)

    def cpuid_leaf(self, function: int, index: int = 0) -> KvmCpuidEntry2 | None:
        """The CPUID leaf that the VMM gave, or None."""
        for entry in self.cpuid:
            if entry.function == function and (entry.index == index or not entry.flags & CPUID_FLAG_INDEXED):
                return entry
        return None

    def set_cpuid(self, entries: list[KvmCpuidEntry2]) -> None:
        """KVM_SET_CPUID2."""
        self.cpuid = entries
        if self.cpu_interface is not None:
            self.cpu_interface.timer.offer_tsc_deadline(self.has_feature(CPUID_1_ECX_TSC_DEADLINE))
            self.cpu_interface.version_changed()

    @property
    def has_tsc_adjust(self) -> bool:
        """Whether its CPUID has MSR_IA32_TSC_ADJUST."""
        leaf = self.cpuid_leaf(7)
        return leaf is not None and bool(leaf.ebx & CPUID_7_EBX_TSC_ADJUST)

    @property
    def has_x2apic(self) -> bool:
        """Whether its CPUID has x2APIC."""
        return self.has_feature(CPUID_1_ECX_X2APIC)

    @property
    def apic_base(self) -> int:
        """MSR_IA32_APICBASE."""
        base: int = self._apic_base if self.cpu_interface is None else self.cpu_interface.base
        return base

    def write_apic_base(self, value: int, *, host: bool) -> None:
        """Write MSR_IA32_APICBASE. ValueError for reserved bits, and a change of mode that there is not."""
        modes = BASE_ENABLE | BASE_X2APIC
        before, after = self.apic_base & modes, value & modes
        reserved = _BASE_RESERVED
        if not self.has_x2apic:
            reserved |= BASE_X2APIC
        if value & reserved:
            raise ValueError(f"bits {reserved:#x} of the APIC base are reserved, in {value:#x}")
        # A guest goes to x2APIC mode from xAPIC mode only, and leaves it by turning the local APIC off.
        forbidden = not host and ((before == modes and after == BASE_ENABLE) or (not before and after == modes))
        if after == BASE_X2APIC or forbidden:
            raise ValueError(f"the APIC base cannot change from {self.apic_base:#x} to {value:#x}")
        if self.cpu_interface is None:
            self._apic_base = value
        else:
            self.cpu_interface.set_base(value)

    def has_pv_feature(self, bit: int) -> bool:
        """Whether KVM's own CPUID leaf offers a paravirtual feature."""
        leaf = self.cpuid_leaf(CPUID_KVM_FEATURES)
        return leaf is not None and bool(leaf.eax >> bit & 1)

    def has_feature(self, ecx_bit: int) -> bool:
        """Whether leaf 1 has that bit in ECX."""
        leaf = self.cpuid_leaf(1)
        return leaf is not None and bool(leaf.ecx & ecx_bit)

    def clear_events(self) -> None:
        """Nothing is being injected, and nothing waits."""
        self.exception = attrs.evolve(self.exception, injected=False, pending=False)  # the rest can still be read
        self.interrupt_injected = self.interrupt_soft = False
        self.interrupt_shadow = 0
        self.nmi_injected = self.nmi_masked = False
        self.vm.ledger.drop("vCPU reset", self._count_nmis())
        self.nmi_pending = self.nmi_queued = 0
        self.smi_pending = False

    def forget_exception(self) -> None:
        """No exception is on its way."""
        self.exception = ExceptionState()

    def reset_registers(self) -> None:
        """As after a reset: the first instruction is at 0xfffffff0 (Intel SDM vol. 3, 10.1.1)."""
        data = KvmSegment(limit=0xFFFF, type=3, present=1, s=1)
        code = data.with_(base=0xFFFF_0000, selector=0xF000, type=0xB)
        table = KvmSegment(limit=0xFFFF, present=1)
        segments = (code, *(data,) * 5, table.with_(type=0xB), table.with_(type=2))
        tables = (KvmDtable(limit=0xFFFF),) * 2
        self.sregs = KvmSregs(segments=segments, tables=tables, cr0=0x6000_0010)
        self.regs = KvmRegs(rip=0xFFF0, rflags=RFLAGS_ALWAYS)

    # -- NMIs

    def collect_nmis(self) -> None:
        """Keep as many of the NMIs that came as can be: two, or one while one is injected or they are masked."""
        waiting = self._count_nmis()
        self.nmi_pending = min(waiting, self._nmi_limit)
        self.nmi_queued = 0
        self.vm.ledger.coalesced += waiting - self.nmi_pending

    @property
    def _nmi_limit(self) -> int:
        return 1 if self.nmi_masked or self.nmi_injected else 2

    def set_nmis(self, count: int) -> None:
        """KVM_SET_VCPU_EVENTS: so many wait."""
        ledger = self.vm.ledger
        ledger.drop("vCPU events replaced", self._count_nmis())
        ledger.raised += count
        self.nmi_pending, self.nmi_queued = 0, count

    def take_nmi(self) -> bool:
        """The guest takes an NMI, if there is one for it; no other until :meth:`end_nmi`."""
        if self.nmi_injected:
            self.nmi_injected = False
        elif self.nmi_pending and not self.nmi_masked:
            self.nmi_pending -= 1
            self.vm.ledger.delivered += 1
            if self.vm.events is not None:
                self.vm.events.acknowledged(self.index, NMI_VECTOR)
        else:
            return False
        self.nmi_masked = True
        return True

    def end_nmi(self) -> None:
        """Its handler has returned (IRET)."""
        self.nmi_masked = False
        if self.vm.events is not None:
            self.vm.events.completed(self.index, NMI_VECTOR)

    def _count_nmis(self) -> int:
        return self.nmi_pending + self.nmi_queued

    # -- INIT and SIPI

    def accept_events(self) -> None:
        """Carry out an INIT and a SIPI that wait, in this order. A SIPI counts only after an INIT."""
        if self.init_pending:
            self.init_pending = False
            self.restart()
            self.clear_events()
            self.reset_registers()
            if self.cpu_interface is not None:
                self.cpu_interface.reset(init=True)
            self.pv.reset()
            boots = self.apic_base & BASE_BSP  # which a VMM may have written
            self.mp_state = KVM_MP_STATE_RUNNABLE if boots else KVM_MP_STATE_INIT_RECEIVED
        if self.sipi_pending:
            self.sipi_pending = False
            if self.mp_state == KVM_MP_STATE_INIT_RECEIVED:
                vector = self.sipi_vector
                code = self.sregs.segments[0].with_(selector=vector << 8, base=vector << 12, limit=0xFFFF)
                self.sregs = self.sregs.with_(segments=(code, *self.sregs.segments[1:]))
                self.regs = self.regs.with_(rip=0)
                self.mp_state = KVM_MP_STATE_RUNNABLE

    # What the local APIC calls.

    def receive_nmi(self) -> None:
        """An NMI."""
        self.nmi_queued += 1
        self.vm.ledger.raised += 1
        events = self.vm.events
        if events is not None:
            tell = events.pending if self._count_nmis() <= self._nmi_limit else events.coalesced
            tell(self.index, NMI_VECTOR)
        self.note_event()

    def receive_smi(self) -> bool:
        """An SMI; whether the CPU has system management mode."""
        if not self.vm.options["smm"]:
            return False
        self.smi_pending = True
        self.note_event()
        return True

    def receive_init(self) -> None:
        """An INIT, which cancels a SIPI that waits."""
        self.init_pending = True
        self.sipi_pending = False
        self.note_event()

    def receive_sipi(self, vector: int) -> None:
        """A startup IPI."""
        self.sipi_vector = vector
        self.sipi_pending = True
        self.note_event()

    def unhalt(self) -> None:
        """A paravirtual wake-up (the remote-read delivery mode)."""
        self.unhalted = True
        self.note_event()

    def receive_external(self, vector: int) -> None:
        """KVM_INTERRUPT with a split irqchip: the vector that the VMM's PIC gives when this CPU takes an ExtINT."""
        self.external_vector = vector
        self.cpu_interface.set_external(True)

    def take_external(self) -> int:
        """The CPU takes it."""
        vector, self.external_vector = self.external_vector, None
        assert vector is not None
        self.cpu_interface.set_external(False)
        return vector
