"""x86 vCPU fds: MSRs, CPUID, events, MP state."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from fabric.errors import KvmError
from fabric.kvm.dispatch import POINTER, Ioctl, Pointer
from fabric.uapi import ioctl as requests
from fabric.uapi.kvm import KvmEnableCap
from fabric.uapi.x86 import KvmCpuid2, KvmCpuidEntry2, KvmMsrEntry, KvmMsrs
from fabric.vcpu.x86_msrs import BadMsr, read_msr, write_msr

if TYPE_CHECKING:
    from fabric.kvm.vm import VcpuFile, VmFile

MAX_CPUID_ENTRIES = 256
MAX_IO_MSRS = 256


def set_cpuid2(file: VcpuFile, ptr: Pointer) -> None:
    """KVM_SET_CPUID2."""
    head = KvmCpuid2.unpack(ptr.read(KvmCpuid2.SIZE))
    if head.nent > MAX_CPUID_ENTRIES:
        raise KvmError(errno.E2BIG, f"at most {MAX_CPUID_ENTRIES} entries, not {head.nent}")
    size = KvmCpuidEntry2.SIZE
    data = ptr.read(head.nent * size, KvmCpuid2.SIZE) if head.nent else b""
    file.vcpu.set_cpuid([KvmCpuidEntry2.unpack(data[n * size : (n + 1) * size]) for n in range(head.nent)])


def _entries(ptr: Pointer) -> list[KvmMsrEntry]:
    head = KvmMsrs.unpack(ptr.read(KvmMsrs.SIZE))
    if head.nmsrs >= MAX_IO_MSRS:
        raise KvmError(errno.E2BIG, f"at most {MAX_IO_MSRS - 1} MSRs at a time, not {head.nmsrs}")
    size = KvmMsrEntry.SIZE
    data = ptr.read(head.nmsrs * size, KvmMsrs.SIZE) if head.nmsrs else b""
    return [KvmMsrEntry.unpack(data[n * size : (n + 1) * size]) for n in range(head.nmsrs)]


def get_msrs(file: VcpuFile, ptr: Pointer) -> int:
    """KVM_GET_MSRS: how many were read, up to the first that cannot be."""
    entries = _entries(ptr)
    done = 0
    for done, entry in enumerate(entries):
        try:
            value = read_msr(file.vcpu, entry.index, host=True)
        except BadMsr:
            return done
        at = KvmMsrs.SIZE + done * KvmMsrEntry.SIZE
        ptr.write(KvmMsrEntry(entry.index, entry.reserved, value).pack(), at)
    return len(entries)


def set_msrs(file: VcpuFile, ptr: Pointer) -> int:
    """KVM_SET_MSRS: how many were written, up to the first that cannot be."""
    entries = _entries(ptr)
    for done, entry in enumerate(entries):
        try:
            write_msr(file.vcpu, entry.index, entry.data, host=True)
        except BadMsr:
            return done
    return len(entries)


VM_TABLE: tuple[Ioctl, ...] = ()
VCPU_TABLE: tuple[Ioctl, ...] = (
    Ioctl(requests.KVM_SET_CPUID2, POINTER, set_cpuid2),
    Ioctl(requests.KVM_GET_MSRS, POINTER, get_msrs),
    Ioctl(requests.KVM_SET_MSRS, POINTER, set_msrs),
)
ENABLE_CAP: dict[int, Callable[[VmFile, KvmEnableCap], None]] = {}
"""Capabilities of the VM fd that KVM_ENABLE_CAP turns on, and what does it."""
