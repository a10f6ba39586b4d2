"""The x86 vCPU: what a guest program sees of it, and the state that a VMM reads and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from fabric.devices.x86.lapic import BASE_BSP, BASE_ENABLE, BASE_X2APIC, DEFAULT_BASE
from fabric.uapi.kvm import KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED
from fabric.uapi.x86 import KvmDtable, KvmRegs, KvmSegment, KvmSregs
from fabric.vcpu.cpu import Cpu
from fabric.vcpu.vcpu import Vcpu

if TYPE_CHECKING:
    from fabric.clock.engine import Engine
    from fabric.clock.tsc import GuestTsc
    from fabric.devices.base import VmServices
    from fabric.uapi.x86 import KvmCpuidEntry2
    from fabric.vcpu.x86_pv import Paravirt

CPUID_7_EBX_TSC_ADJUST = 1 << 1
CPUID_KVM_FEATURES = 0x4000_0001
CPUID_1_ECX_X2APIC = 1 << 21
_BASE_RESERVED = 0xFF | 1 << 9 | 0xFFF << 52
CPUID_1_ECX_TSC_DEADLINE = 1 << 24


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


class X86Cpu(Cpu):
    """What an x86 guest program runs on."""

    __slots__ = ()


class X86Vcpu(Vcpu):
    """An x86 vCPU.

    Its local APIC, if the VM has an irqchip in the kernel, is ``cpu_interface``; it calls the ``receive_*`` methods for
    what is not a maskable interrupt.
    """

    __slots__ = (
        "_apic_base",
        "cpuid",
        "exception",
        "external_vector",
        "init_pending",
        "interrupt_injected",
        "interrupt_nr",
        "interrupt_shadow",
        "interrupt_soft",
        "is_bsp",
        "mp_state",
        "nmi_injected",
        "nmi_masked",
        "nmi_pending",
        "nmi_queued",
        "pv",
        "regs",
        "sipi_pending",
        "sipi_vector",
        "smi_pending",
        "smm",
        "smm_inside_nmi",
        "sregs",
        "triple_fault",
        "tsc",
        "unhalted",
    )

    cpu_class = X86Cpu

    def __init__(self, vm: VmServices, vcpu_id: int, index: int, engine: Engine | None, *, is_bsp: bool) -> None:
        super().__init__(vm, vcpu_id, index, engine)
        self.tsc: GuestTsc
        self.pv: Paravirt
        """Given by whoever makes it, as the VM's vCPUs share what they are made of."""
        self.is_bsp = is_bsp
        """It is the boot processor."""
        self._apic_base = DEFAULT_BASE | BASE_ENABLE | (BASE_BSP if is_bsp else 0)
        """MSR_IA32_APICBASE where the VMM has the local APIC."""
        self.cpuid: list[KvmCpuidEntry2] = []
        self.mp_state = KVM_MP_STATE_RUNNABLE if is_bsp else KVM_MP_STATE_UNINITIALIZED
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
        self.clear_events()
        self.reset_registers()

    def cpuid_leaf(self, function: int) -> KvmCpuidEntry2 | None:
        """The CPUID leaf that the VMM gave, or None."""
        return next((entry for entry in self.cpuid if entry.function == function), None)

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
        self.exception = ExceptionState()
        self.interrupt_injected = self.interrupt_soft = False
        self.interrupt_nr = 0
        self.interrupt_shadow = 0
        self.nmi_injected = self.nmi_masked = False
        self.nmi_pending = self.nmi_queued = 0
        self.smi_pending = False
        self.triple_fault = False

    def reset_registers(self) -> None:
        """As after a reset: the first instruction is at 0xfffffff0 (Intel SDM vol. 3, 10.1.1)."""
        data = KvmSegment(limit=0xFFFF, type=3, present=1, s=1)
        code = attrs.evolve(data, base=0xFFFF_0000, selector=0xF000, type=0xB)
        table = KvmSegment(limit=0xFFFF, present=1)
        segments = (code, *(data,) * 5, attrs.evolve(table, type=0xB), attrs.evolve(table, type=2))
        tables = (KvmDtable(limit=0xFFFF),) * 2
        self.sregs = KvmSregs(segments=segments, tables=tables, cr0=0x6000_0010)
        self.regs = KvmRegs(rip=0xFFF0, rflags=2)

    def collect_nmis(self) -> None:
        """Keep as many of the NMIs that came as can be: two, or one while one is injected or they are masked."""
        limit = 1 if self.nmi_masked or self.nmi_injected else 2
        self.nmi_pending = min(self.nmi_pending + self.nmi_queued, limit)
        self.nmi_queued = 0

    def accept_events(self) -> None:
        """Carry out an INIT and a SIPI that wait, in this order. A SIPI counts only after an INIT."""
        if self.init_pending:
            self.init_pending = False
            self.clear_events()
            self.reset_registers()
            if self.cpu_interface is not None:
                self.cpu_interface.reset(init=True)
            self.mp_state = KVM_MP_STATE_RUNNABLE if self.is_bsp else KVM_MP_STATE_INIT_RECEIVED
        if self.sipi_pending:
            self.sipi_pending = False
            if self.mp_state == KVM_MP_STATE_INIT_RECEIVED:
                code = attrs.evolve(
                    self.sregs.segments[0], selector=self.sipi_vector << 8, base=self.sipi_vector << 12, limit=0xFFFF
                )
                self.sregs = attrs.evolve(self.sregs, segments=(code, *self.sregs.segments[1:]))
                self.regs = attrs.evolve(self.regs, rip=0)
                self.mp_state = KVM_MP_STATE_RUNNABLE

    # What the local APIC calls.

    def receive_nmi(self) -> None:
        """An NMI."""
        self.nmi_queued += 1
        self.kick()

    def receive_smi(self) -> bool:
        """An SMI; whether the CPU has system management mode."""
        self.smi_pending = True
        self.kick()
        return True

    def receive_init(self) -> None:
        """An INIT, which cancels a SIPI that waits."""
        self.init_pending = True
        self.sipi_pending = False
        self.kick()

    def receive_sipi(self, vector: int) -> None:
        """A startup IPI."""
        self.sipi_vector = vector
        self.sipi_pending = True
        self.kick()

    def unhalt(self) -> None:
        """A paravirtual wake-up (the remote-read delivery mode)."""
        self.unhalted = True
        self.kick()
