"""Model specific registers: a row each, for KVM_GET/SET_MSRS and for the guest's rdmsr and wrmsr.

Sources: Intel SDM vol. 4; the KVM documents on MSRs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import attrs

from fabric.devices.x86 import hyperv_msrs
from fabric.devices.x86.hyperv_msrs import HYPERV_MSRS
from fabric.devices.x86.lapic import MSR_BASE, NotWritable
from fabric.devices.x86.synic import Refused
from fabric.uapi.x86 import (
    MSR_IA32_APICBASE,
    MSR_IA32_TSC,
    MSR_IA32_TSC_ADJUST,
    MSR_IA32_TSC_DEADLINE,
    MSR_KVM_ASYNC_PF_ACK,
    MSR_KVM_ASYNC_PF_EN,
    MSR_KVM_ASYNC_PF_INT,
    MSR_KVM_POLL_CONTROL,
    MSR_KVM_PV_EOI_EN,
    MSR_KVM_STEAL_TIME,
    MSR_KVM_SYSTEM_TIME,
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_WALL_CLOCK,
    MSR_KVM_WALL_CLOCK_NEW,
)
from fabric.vcpu.x86_pv import ASYNC_PF_ON, ASYNC_PF_RESERVED, ENABLED, PV_EOI_ALIGN, STEAL_RESERVED, Paravirt

if TYPE_CHECKING:
    from fabric.vcpu.x86 import X86Vcpu

X2APIC_MSRS = range(MSR_BASE, MSR_BASE + 0x100)


class BadMsr(Exception):
    """An MSR that is not there, or does not take that value: #GP for a guest."""


@attrs.frozen
class Msr:
    """One MSR: ``read(vcpu, host)``, and ``write(vcpu, value, host)``, which raise BadMsr for what it does not take."""

    name: str
    read: Callable[[X86Vcpu, bool], int]
    write: Callable[[X86Vcpu, int, bool], None] | None = None
    listed: bool = True
    """KVM_GET_MSR_INDEX_LIST has it."""


def _read_apic_base(vcpu: X86Vcpu, host: bool) -> int:
    return vcpu.apic_base


def _write_apic_base(vcpu: X86Vcpu, value: int, host: bool) -> None:
    try:
        vcpu.write_apic_base(value, host=host)
    except ValueError as error:
        raise BadMsr from error


def _write_tsc(vcpu: X86Vcpu, value: int, host: bool) -> None:
    if host:
        vcpu.tsc.write(value)
    else:
        vcpu.tsc.write_by_guest(value)  # of which the clock's page is not told, other than of TSC_ADJUST


def _write_tsc_adjust(vcpu: X86Vcpu, value: int, host: bool) -> None:
    if not vcpu.has_tsc_adjust:
        return  # taken, and without effect
    if host:
        vcpu.tsc.adjust = value  # the VMM restores the TSC itself
    else:
        vcpu.tsc.adjust_by_guest(value)
        vcpu.pv.clock_changed()


def _read_tsc_deadline(vcpu: X86Vcpu, host: bool) -> int:
    apic = vcpu.cpu_interface
    return 0 if apic is None else int(apic.timer.tsc_deadline)


def _write_tsc_deadline(vcpu: X86Vcpu, value: int, host: bool) -> None:
    if vcpu.cpu_interface is not None:
        vcpu.cpu_interface.timer.set_tsc_deadline(value)


def _paravirtual(
    name: str,
    feature: int,
    attribute: str,
    set_: Callable[[Paravirt, int, bool], None] | None = None,
    *,
    allowed: int = -1,
) -> Msr:
    """An MSR of KVM's own: which bits it takes, and what a write does besides being stored."""

    def write(vcpu: X86Vcpu, value: int, host: bool) -> None:
        if vcpu.pv.enforced and not vcpu.has_pv_feature(feature):
            raise BadMsr
        if value & ~allowed & (1 << 64) - 1:
            raise BadMsr
        if set_ is None:
            setattr(vcpu.pv, attribute, value)
        else:
            set_(vcpu.pv, value, host)

    def read(vcpu: X86Vcpu, host: bool) -> int:
        hidden = vcpu.pv.enforced and not vcpu.has_pv_feature(feature)
        return 0 if hidden else int(getattr(vcpu.pv, attribute))

    return Msr(name, read, write)


def _set_pv_eoi(pv: Paravirt, value: int, _host: bool) -> None:
    at = value & ~ENABLED
    if at % PV_EOI_ALIGN:
        raise BadMsr
    if value & ENABLED and not pv.memory.is_writable(at):
        raise BadMsr
    pv.pv_eoi = value


def _set_async_pf_vector(pv: Paravirt, value: int, _host: bool) -> None:
    if pv.vcpu.cpu_interface is None:
        raise BadMsr
    pv.async_pf_vector = value


def _set_steal(pv: Paravirt, value: int, host: bool) -> None:
    pv.steal = value
    if not host:
        pv.note_steal()


def _set_async_pf(pv: Paravirt, value: int, _host: bool) -> None:
    if value & ASYNC_PF_RESERVED or (pv.vcpu.cpu_interface is None and value):
        raise BadMsr
    pv.async_pf = value
    if value & ASYNC_PF_ON == ASYNC_PF_ON and not pv.memory.is_writable(value & ~0x3F, 8):
        raise BadMsr  # and is read back all the same


def _acknowledge_async_pf(_pv: Paravirt, _value: int, _host: bool) -> None:
    """Nothing is waiting: the host's memory is always there."""


def _hyperv(index: int) -> Msr:
    """An MSR of Hyper-V, on a host that has it."""

    def read(vcpu: X86Vcpu, host: bool) -> int:
        if vcpu.hyperv is None:
            raise BadMsr
        try:
            return hyperv_msrs.read(vcpu.hyperv, index, host)
        except Refused as error:
            raise BadMsr from error

    def write(vcpu: X86Vcpu, value: int, host: bool) -> None:
        if vcpu.hyperv is None:
            raise BadMsr
        try:
            hyperv_msrs.write(vcpu.hyperv, index, value, host)
        except Refused as error:
            raise BadMsr from error

    return Msr(HYPERV_MSRS[index].name, read, write, HYPERV_MSRS[index].listed)


_CLOCKSOURCE, _CLOCKSOURCE2, _ASYNC_PF, _STEAL_TIME, _PV_EOI, _POLL_CONTROL, _ASYNC_PF_INT = 0, 3, 4, 5, 6, 12, 14
"""Bits of CPUID leaf 0x40000001 EAX."""

MSRS: dict[int, Msr] = {
    MSR_IA32_TSC: Msr("MSR_IA32_TSC", lambda vcpu, host: vcpu.tsc.value, _write_tsc),
    MSR_IA32_APICBASE: Msr("MSR_IA32_APICBASE", _read_apic_base, _write_apic_base),
    MSR_IA32_TSC_ADJUST: Msr("MSR_IA32_TSC_ADJUST", lambda vcpu, host: vcpu.tsc.adjust, _write_tsc_adjust),
    MSR_IA32_TSC_DEADLINE: Msr("MSR_IA32_TSC_DEADLINE", _read_tsc_deadline, _write_tsc_deadline),
    MSR_KVM_WALL_CLOCK: _paravirtual("MSR_KVM_WALL_CLOCK", _CLOCKSOURCE, "wall_clock", Paravirt.set_wall_clock),
    MSR_KVM_SYSTEM_TIME: _paravirtual(
        "MSR_KVM_SYSTEM_TIME", _CLOCKSOURCE, "system_time", partial(Paravirt.set_system_time, old_msr=True)
    ),
    MSR_KVM_WALL_CLOCK_NEW: _paravirtual(
        "MSR_KVM_WALL_CLOCK_NEW", _CLOCKSOURCE2, "wall_clock", Paravirt.set_wall_clock
    ),
    MSR_KVM_SYSTEM_TIME_NEW: _paravirtual(
        "MSR_KVM_SYSTEM_TIME_NEW", _CLOCKSOURCE2, "system_time", partial(Paravirt.set_system_time, old_msr=False)
    ),
    MSR_KVM_ASYNC_PF_EN: _paravirtual("MSR_KVM_ASYNC_PF_EN", _ASYNC_PF, "async_pf", _set_async_pf),
    MSR_KVM_STEAL_TIME: _paravirtual("MSR_KVM_STEAL_TIME", _STEAL_TIME, "steal", _set_steal, allowed=~STEAL_RESERVED),
    MSR_KVM_PV_EOI_EN: _paravirtual("MSR_KVM_PV_EOI_EN", _PV_EOI, "pv_eoi", _set_pv_eoi),
    MSR_KVM_POLL_CONTROL: _paravirtual("MSR_KVM_POLL_CONTROL", _POLL_CONTROL, "poll_control", allowed=1),
    MSR_KVM_ASYNC_PF_INT: _paravirtual(
        "MSR_KVM_ASYNC_PF_INT", _ASYNC_PF_INT, "async_pf_vector", _set_async_pf_vector, allowed=0xFF
    ),
    MSR_KVM_ASYNC_PF_ACK: Msr(
        "MSR_KVM_ASYNC_PF_ACK",
        lambda vcpu, host: 0,
        _paravirtual("", _ASYNC_PF_INT, "async_pf", _acknowledge_async_pf).write,
    ),
    **{index: _hyperv(index) for index in HYPERV_MSRS},
}
"""By number."""


def read_msr(vcpu: X86Vcpu, index: int, *, host: bool) -> int:
    """The value of an MSR. BadMsr when it cannot be read."""
    if index in X2APIC_MSRS:
        try:
            return int(vcpu.cpu_interface.msr_read(index))
        except (KeyError, AttributeError):
            raise BadMsr from None
    msr = MSRS.get(index)
    if msr is None:
        raise BadMsr
    return msr.read(vcpu, host)


def write_msr(vcpu: X86Vcpu, index: int, value: int, *, host: bool) -> None:
    """Write an MSR. BadMsr when it does not take the value."""
    if index in X2APIC_MSRS:
        try:
            vcpu.cpu_interface.msr_write(index, value)
        except (NotWritable, AttributeError):
            raise BadMsr from None
        return
    msr = MSRS.get(index)
    if msr is None or msr.write is None:
        raise BadMsr
    msr.write(vcpu, value, host)
