"""Model specific registers: a row each, for KVM_GET/SET_MSRS and for the guest's rdmsr and wrmsr.

Sources: Intel SDM vol. 4; the KVM documents on MSRs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from fabric.devices.x86.lapic import MSR_BASE, NotWritable
from fabric.uapi.x86 import MSR_IA32_APICBASE

if TYPE_CHECKING:
    from fabric.vcpu.x86 import X86Vcpu

X2APIC_MSRS = range(MSR_BASE, MSR_BASE + 0x100)


class BadMsr(Exception):
    """An MSR that is not there, or does not take that value: #GP for a guest."""


@attrs.frozen
class Msr:
    """One MSR: ``read(vcpu)``, and ``write(vcpu, value, host)``, which raises BadMsr for a value that it does not take."""

    name: str
    read: Callable[[X86Vcpu], int]
    write: Callable[[X86Vcpu, int, bool], None] | None = None


def _read_apic_base(vcpu: X86Vcpu) -> int:
    return vcpu.apic_base


def _write_apic_base(vcpu: X86Vcpu, value: int, host: bool) -> None:
    try:
        vcpu.write_apic_base(value, host=host)
    except ValueError as error:
        raise BadMsr from error


MSRS: dict[int, Msr] = {
    MSR_IA32_APICBASE: Msr("MSR_IA32_APICBASE", _read_apic_base, _write_apic_base),
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
    return msr.read(vcpu)


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
