"""The x86 vCPU: what a guest program sees of it, and the state that a VMM reads and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric.devices.x86.lapic import BASE_BSP, BASE_ENABLE, DEFAULT_BASE
from fabric.uapi.kvm import KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED
from fabric.vcpu.cpu import Cpu
from fabric.vcpu.vcpu import Vcpu

if TYPE_CHECKING:
    from fabric.clock.engine import Engine
    from fabric.devices.base import VmServices
    from fabric.uapi.x86 import KvmCpuidEntry2

CPUID_1_ECX_X2APIC = 1 << 21
CPUID_1_ECX_TSC_DEADLINE = 1 << 24


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
        "directed_eoi",
        "init_pending",
        "is_bsp",
        "mp_state",
        "nmi_pending",
        "sipi_vector",
        "smi_pending",
    )

    cpu_class = X86Cpu

    def __init__(self, vm: VmServices, vcpu_id: int, index: int, engine: Engine | None, *, is_bsp: bool) -> None:
        super().__init__(vm, vcpu_id, index, engine)
        self.is_bsp = is_bsp
        """It is the boot processor."""
        self.directed_eoi = False
        """Its local APIC can leave the broadcast of an end of interrupt to the guest."""
        self._apic_base = DEFAULT_BASE | BASE_ENABLE | (BASE_BSP if is_bsp else 0)
        """MSR_IA32_APICBASE where the VMM has the local APIC."""
        self.cpuid: list[KvmCpuidEntry2] = []
        self.mp_state = KVM_MP_STATE_RUNNABLE if is_bsp else KVM_MP_STATE_UNINITIALIZED
        self.nmi_pending = 0
        self.smi_pending = False
        self.init_pending = False
        self.sipi_vector: int | None = None
        """Of a SIPI that waits for the vCPU to look."""

    def cpuid_leaf(self, function: int) -> KvmCpuidEntry2 | None:
        """The CPUID leaf that the VMM gave, or None."""
        return next((entry for entry in self.cpuid if entry.function == function), None)

    def set_cpuid(self, entries: list[KvmCpuidEntry2]) -> None:
        """KVM_SET_CPUID2."""
        self.cpuid = entries
        if self.cpu_interface is not None:
            self.cpu_interface.timer.offer_tsc_deadline(self.has_feature(CPUID_1_ECX_TSC_DEADLINE))

    @property
    def apic_base(self) -> int:
        """MSR_IA32_APICBASE."""
        base: int = self._apic_base if self.cpu_interface is None else self.cpu_interface.base
        return base

    def set_apic_base(self, value: int) -> None:
        """Write MSR_IA32_APICBASE, which the caller has checked."""
        if self.cpu_interface is None:
            self._apic_base = value
        else:
            self.cpu_interface.set_base(value)

    def has_feature(self, ecx_bit: int) -> bool:
        """Whether leaf 1 has that bit in ECX."""
        leaf = self.cpuid_leaf(1)
        return leaf is not None and bool(leaf.ecx & ecx_bit)

    # What the local APIC calls.

    def receive_nmi(self) -> None:
        """An NMI: two are kept at most."""
        self.nmi_pending = min(self.nmi_pending + 1, 2)
        self.kick()

    def receive_smi(self) -> bool:
        """An SMI; whether the CPU has system management mode."""
        self.smi_pending = True
        self.kick()
        return True

    def receive_init(self) -> None:
        """An INIT, which cancels a SIPI that waits."""
        self.init_pending = True
        self.sipi_vector = None
        self.kick()

    def receive_sipi(self, vector: int) -> None:
        """A startup IPI."""
        self.sipi_vector = vector
        self.kick()

    def unhalt(self) -> None:
        """A paravirtual wake-up (the remote-read delivery mode)."""
        self.kick()
