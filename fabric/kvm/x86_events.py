"""What an x86 vCPU is about to take: events, NMI, SMI, KVM_INTERRUPT, MP state, and its registers.

Rules: api.get-vcpu-events and so on of the interface inventory.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import attrs

from fabric.errors import KvmError
from fabric.kvm.dispatch import POINTER, VALUE, Ioctl, Members, Pointer
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi import x86
from fabric.uapi.x86 import KvmInterrupt, KvmRegs, KvmSregs, KvmVcpuEvents
from fabric.vcpu.x86 import MAX_CR8, ExceptionState

if TYPE_CHECKING:
    from fabric.kvm.vm import VcpuFile, VmFile

NMI_VECTOR = 2
MAX_EXCEPTION = 31
SOFT = (3, 4)
"""#BP and #OF, which instructions are made for."""
_ALWAYS = x86.KVM_VCPUEVENT_VALID_NMI_PENDING | x86.KVM_VCPUEVENT_VALID_SHADOW | x86.KVM_VCPUEVENT_VALID_SMM
_PAYLOAD, _TRIPLE = x86.KVM_VCPUEVENT_VALID_PAYLOAD, x86.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
_ALL = _ALWAYS | x86.KVM_VCPUEVENT_VALID_SIPI_VECTOR | _PAYLOAD | _TRIPLE

_SETTABLE = {
    uapi.KVM_MP_STATE_RUNNABLE,
    uapi.KVM_MP_STATE_UNINITIALIZED,
    uapi.KVM_MP_STATE_INIT_RECEIVED,
    uapi.KVM_MP_STATE_HALTED,
    uapi.KVM_MP_STATE_SIPI_RECEIVED,
    uapi.KVM_MP_STATE_AP_RESET_HOLD,
}


def get_vcpu_events(file: VcpuFile, ptr: Pointer) -> None:
    """KVM_GET_VCPU_EVENTS."""
    vcpu, part = file.part.vcpu, file.vm.part
    vcpu.collect_nmis()
    exception: ExceptionState = vcpu.exception
    flags = _ALWAYS
    if part.exception_payload:
        flags |= _PAYLOAD
    if part.triple_fault_event:
        flags |= _TRIPLE
    told = exception.nr not in SOFT  # of which the length of the instruction would have to be known
    events = KvmVcpuEvents(
        # Who does not know pending exceptions sees them as injected.
        exception_injected=told and (exception.injected or (exception.pending and not part.exception_payload)),
        exception_nr=exception.nr,
        exception_has_error_code=exception.has_error_code,
        exception_error_code=exception.error_code,
        exception_pending=told and exception.pending and part.exception_payload,
        exception_has_payload=exception.has_payload,
        exception_payload=exception.payload,
        interrupt_injected=vcpu.interrupt_injected and not vcpu.interrupt_soft,
        interrupt_nr=vcpu.interrupt_nr,
        interrupt_shadow=vcpu.interrupt_shadow,
        nmi_injected=vcpu.nmi_injected,
        nmi_pending=vcpu.nmi_pending,
        nmi_masked=vcpu.nmi_masked,
        flags=flags,
        smi_smm=vcpu.smm,
        smi_pending=vcpu.smi_pending,
        smi_smm_inside_nmi=vcpu.smm_inside_nmi,
        smi_latched_init=vcpu.init_pending,
        triple_fault_pending=vcpu.triple_fault and part.triple_fault_event,
    )
    ptr.write(events.pack())


def set_vcpu_events(file: VcpuFile, events: KvmVcpuEvents) -> None:
    """KVM_SET_VCPU_EVENTS: what the flags do not mark as valid stays, but for exception, interrupt and NMI state."""
    vcpu, part = file.part.vcpu, file.vm.part
    flags = events.flags
    if flags & ~_ALL:
        raise KvmError(errno.EINVAL, f"flags must be in {_ALL:#x}, not {flags:#x}")
    injected, pending = bool(events.exception_injected), bool(events.exception_pending)
    has_payload = bool(events.exception_has_payload)
    if flags & _PAYLOAD:
        if not part.exception_payload:
            raise KvmError(errno.EINVAL, "payloads of exceptions need KVM_CAP_EXCEPTION_PAYLOAD")
        if pending:
            injected = False
        else:
            has_payload = False
    else:
        pending = has_payload = False
    if (injected or pending) and (events.exception_nr > MAX_EXCEPTION or events.exception_nr == NMI_VECTOR):
        raise KvmError(errno.EINVAL, f"there is no exception {events.exception_nr}")
    smm = flags & x86.KVM_VCPUEVENT_VALID_SMM
    in_smm = smm and (events.smi_smm or events.smi_pending)
    if in_smm and file.vm.options["smm"] and vcpu.mp_state == uapi.KVM_MP_STATE_INIT_RECEIVED:
        raise KvmError(errno.EINVAL, "a vCPU that waits for a SIPI is not in system management mode")

    vcpu.exception = ExceptionState(
        events.exception_nr,
        injected,
        pending,
        bool(events.exception_has_error_code),
        events.exception_error_code,
        has_payload,
        events.exception_payload,
    )
    vcpu.interrupt_injected = bool(events.interrupt_injected)
    vcpu.interrupt_nr = events.interrupt_nr
    vcpu.interrupt_soft = bool(events.interrupt_soft)
    if flags & x86.KVM_VCPUEVENT_VALID_SHADOW:
        vcpu.interrupt_shadow = events.interrupt_shadow
    vcpu.nmi_injected = bool(events.nmi_injected)
    vcpu.nmi_masked = bool(events.nmi_masked)
    if flags & x86.KVM_VCPUEVENT_VALID_NMI_PENDING:
        vcpu.set_nmis(events.nmi_pending)
    if flags & x86.KVM_VCPUEVENT_VALID_SIPI_VECTOR and vcpu.cpu_interface is not None:
        vcpu.sipi_vector = events.sipi_vector
    if smm:
        if not file.vm.options["smm"] and (events.smi_smm or events.smi_pending or events.smi_smm_inside_nmi):
            raise KvmError(errno.EINVAL, "this host has no system management mode")  # what came before is set
        vcpu.smm = bool(events.smi_smm)
        vcpu.smi_pending = bool(events.smi_pending)
        vcpu.smm_inside_nmi = bool(events.smi_smm and events.smi_smm_inside_nmi)
        if vcpu.cpu_interface is not None:
            vcpu.init_pending = bool(events.smi_latched_init)
    if flags & _TRIPLE:
        if not part.triple_fault_event:
            raise KvmError(errno.EINVAL, "triple faults need KVM_CAP_X86_TRIPLE_FAULT_EVENT")  # all else is set
        vcpu.triple_fault = bool(events.triple_fault_pending)


def nmi(file: VcpuFile, _arg: int) -> None:
    """KVM_NMI: the argument is not looked at."""
    file.part.vcpu.receive_nmi()


def smi(file: VcpuFile, _arg: int) -> None:
    """KVM_SMI. ENOTTY on a host without system management mode."""
    if not file.vm.options["smm"]:
        raise KvmError(errno.ENOTTY, "this host has no system management mode")
    file.part.vcpu.receive_smi()


def interrupt(file: VcpuFile, irq: int) -> None:
    """KVM_INTERRUPT: inject a vector; with a split irqchip it is what the VMM's PIC answers."""
    if irq >= 256:
        raise KvmError(errno.EINVAL, f"a vector is below 256, not {irq}")
    vcpu, irqchip = file.part.vcpu, file.vm.irqchip
    if irqchip is None:
        vcpu.interrupt_injected, vcpu.interrupt_nr, vcpu.interrupt_soft = True, irq, False
        return
    if irqchip.pic is not None:
        raise KvmError(errno.ENXIO, "the VM's PIC is in the kernel")
    if vcpu.external_vector is not None:
        raise KvmError(errno.EEXIST, f"vector {vcpu.external_vector} still waits")
    vcpu.receive_external(irq)


def get_mp_state(file: VcpuFile, ptr: Pointer) -> None:
    """KVM_GET_MP_STATE, which carries out an INIT and a SIPI that wait."""
    vcpu = file.part.vcpu
    if file.vm.irqchip is not None:
        vcpu.accept_events()
    halted = vcpu.mp_state in (uapi.KVM_MP_STATE_HALTED, uapi.KVM_MP_STATE_AP_RESET_HOLD)
    state = uapi.KVM_MP_STATE_RUNNABLE if halted and vcpu.unhalted else vcpu.mp_state
    ptr.write(uapi.KvmMpState(state).pack())


def set_mp_state(file: VcpuFile, state: int) -> None:
    """KVM_SET_MP_STATE. Without local APICs in the kernel a vCPU is always runnable."""
    vcpu = file.part.vcpu
    if state not in _SETTABLE or (file.vm.irqchip is None and state != uapi.KVM_MP_STATE_RUNNABLE):
        raise KvmError(errno.EINVAL, f"MP state {state} cannot be set on this vCPU")
    waits = (uapi.KVM_MP_STATE_INIT_RECEIVED, uapi.KVM_MP_STATE_SIPI_RECEIVED)
    if (vcpu.smm or vcpu.smi_pending) and state in waits:
        raise KvmError(errno.EINVAL, "a vCPU in system management mode does not wait for a SIPI")
    if state == uapi.KVM_MP_STATE_SIPI_RECEIVED:
        vcpu.mp_state = uapi.KVM_MP_STATE_INIT_RECEIVED
        vcpu.sipi_pending = True
    else:
        vcpu.mp_state = state


def get_regs(file: VcpuFile, ptr: Pointer) -> None:
    """KVM_GET_REGS."""
    ptr.write(file.part.vcpu.regs.pack())


def set_regs(file: VcpuFile, regs: KvmRegs) -> None:
    """KVM_SET_REGS; an exception that is pending, and not injected, is so no longer."""
    file.part.vcpu.regs = regs.with_(rflags=regs.rflags | 2)
    file.part.vcpu.exception = attrs.evolve(file.part.vcpu.exception, pending=False)


def get_sregs(file: VcpuFile, ptr: Pointer) -> None:
    """KVM_GET_SREGS: with the vector that is being injected."""
    vcpu = file.part.vcpu
    bitmap = 0
    if vcpu.interrupt_injected and not vcpu.interrupt_soft:
        bitmap = 1 << vcpu.interrupt_nr
    words = tuple(bitmap >> 64 * n & (1 << 64) - 1 for n in range(4))
    ptr.write(vcpu.sregs.with_(cr8=vcpu.cr8, apic_base=vcpu.apic_base, interrupt_bitmap=words).pack())


def set_sregs(file: VcpuFile, sregs: KvmSregs) -> None:
    """KVM_SET_SREGS: registers, APIC base, and a vector to inject."""
    vcpu = file.part.vcpu
    try:
        vcpu.write_apic_base(sregs.apic_base, host=True)
    except ValueError as error:
        raise KvmError(errno.EINVAL, str(error)) from None
    vcpu.sregs = sregs
    if sregs.cr8 <= MAX_CR8:
        vcpu.cr8 = sregs.cr8
    bitmap = sum(word << 64 * n for n, word in enumerate(sregs.interrupt_bitmap))
    if bitmap:
        vcpu.interrupt_injected, vcpu.interrupt_soft = True, False
        vcpu.interrupt_nr = (bitmap & -bitmap).bit_length() - 1


def enable_exception_payload(file: VmFile, cap: uapi.KvmEnableCap) -> None:
    """KVM_CAP_EXCEPTION_PAYLOAD."""
    file.vm.part.exception_payload = bool(cap.args[0])


def enable_triple_fault_event(file: VmFile, cap: uapi.KvmEnableCap) -> None:
    """KVM_CAP_X86_TRIPLE_FAULT_EVENT."""
    file.vm.part.triple_fault_event = bool(cap.args[0])


VCPU_TABLE = (
    Ioctl(requests.KVM_GET_VCPU_EVENTS, POINTER, get_vcpu_events),
    Ioctl(requests.KVM_SET_VCPU_EVENTS, KvmVcpuEvents, set_vcpu_events),
    Ioctl(requests.KVM_NMI, VALUE, nmi),
    Ioctl(requests.KVM_SMI, VALUE, smi, "api.smi"),
    Ioctl(requests.KVM_INTERRUPT, Members(KvmInterrupt), interrupt),
    Ioctl(requests.KVM_GET_MP_STATE, POINTER, get_mp_state),
    Ioctl(requests.KVM_SET_MP_STATE, Members(uapi.KvmMpState), set_mp_state),
    Ioctl(requests.KVM_GET_REGS, POINTER, get_regs),
    Ioctl(requests.KVM_SET_REGS, KvmRegs, set_regs),
    Ioctl(requests.KVM_GET_SREGS, POINTER, get_sregs),
    Ioctl(requests.KVM_SET_SREGS, KvmSregs, set_sregs),
)
ENABLE_CAP = {
    uapi.KVM_CAP_EXCEPTION_PAYLOAD: enable_exception_payload,
    uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT: enable_triple_fault_event,
}
