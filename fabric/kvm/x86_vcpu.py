"""x86 vCPU fds: MSRs, CPUID, events, MP state."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fabric.devices.attributes import Attr, AttrTable, Group
from fabric.devices.attributes import Pointer as SystemPointer
from fabric.devices.x86.hyperv_msrs import HYPERV_MSRS
from fabric.errors import KvmError
from fabric.kvm import x86_clock, x86_hyperv
from fabric.kvm.device_fd import attribute_table
from fabric.kvm.dispatch import POINTER, VALUE, Ioctl, Pointer
from fabric.uapi import ioctl as requests
from fabric.uapi.kvm import KVM_CAP_MAX_VCPU_ID, KvmEnableCap
from fabric.uapi.x86 import KvmCpuid2, KvmCpuidEntry2, KvmMsrEntry, KvmMsrs
from fabric.vcpu.x86_msrs import MSRS, BadMsr, read_msr, write_msr

if TYPE_CHECKING:
    from fabric.kvm.vm import VcpuFile, VmFile

MAX_CPUID_ENTRIES = 256
KVM_X86_GRP_SYSTEM = KVM_X86_XCOMP_GUEST_SUPP = 0
XCOMP_GUEST_SUPP = 0xE7
"""Extended states of the recorded host: x87, SSE, AVX, AVX-512, PKRU."""
CPUID_FEATURES_ECX = 1 << 21 | 1 << 24 | 1 << 31
"""x2APIC, TSC-deadline timer, hypervisor."""
CPUID_FEATURES_EDX = 1 << 4 | 1 << 5 | 1 << 9
"""TSC, MSRs, local APIC."""
SUPPORTED_CPUID = (
    KvmCpuidEntry2(0, eax=0x10, ebx=0x6874_7541, ecx=0x444D_4163, edx=0x6974_6E65),
    KvmCpuidEntry2(1, ecx=CPUID_FEATURES_ECX, edx=CPUID_FEATURES_EDX),
    KvmCpuidEntry2(0x4000_0000, eax=0x4000_0001, ebx=0x4B4D_564B, ecx=0x564B_4D56, edx=0x4D),
    KvmCpuidEntry2(0x4000_0001, eax=1 << 0 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 12 | 1 << 14 | 1 << 24),
)
"""What a guest can be given. The vendor is that of the recorded host."""
MAX_IO_MSRS = 256
MAX_BOOT_CPU_ID = 4096
"""As large as no vCPU's id can be, and taken all the same."""


def set_cpuid2(file: VcpuFile, ptr: Pointer) -> None:
    """KVM_SET_CPUID2."""
    head = KvmCpuid2.unpack(ptr.read(KvmCpuid2.SIZE))
    if head.nent > MAX_CPUID_ENTRIES:
        raise KvmError(errno.E2BIG, f"at most {MAX_CPUID_ENTRIES} entries, not {head.nent}")
    size = KvmCpuidEntry2.SIZE
    data = ptr.read(head.nent * size, KvmCpuid2.SIZE) if head.nent else b""
    file.part.vcpu.set_cpuid([KvmCpuidEntry2.unpack(data[n * size : (n + 1) * size]) for n in range(head.nent)])


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
            value = read_msr(file.part.vcpu, entry.index, host=True)
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
            write_msr(file.part.vcpu, entry.index, entry.data, host=True)
        except BadMsr:
            return done
    return len(entries)


def get_cpuid2(file: VcpuFile, ptr: Pointer) -> None:
    """KVM_GET_CPUID2: E2BIG, with the number there are, for an array that is too short."""
    head = KvmCpuid2.unpack(ptr.read(KvmCpuid2.SIZE))
    entries = file.part.vcpu.cpuid
    if head.nent < len(entries):
        ptr.write(KvmCpuid2(len(entries), head.padding).pack())
        raise KvmError(errno.E2BIG, f"there are {len(entries)} entries, and room for {head.nent}")
    ptr.write(KvmCpuid2(len(entries), head.padding).pack() + b"".join(entry.pack() for entry in entries))


_VCPU_ENABLE_CAP = {**x86_clock.VCPU_ENABLE_CAP, **x86_hyperv.VCPU_ENABLE_CAP}


def enable_cap(_file: VcpuFile, cap: KvmEnableCap) -> None:
    """KVM_ENABLE_CAP of a vCPU."""
    handler = None if cap.flags else _VCPU_ENABLE_CAP.get(cap.cap)
    if handler is None:
        raise KvmError(errno.EINVAL, f"capability {cap.cap} cannot be enabled on a vCPU")
    handler(_file, cap)


def set_boot_cpu_id(file: VmFile, vcpu_id: int) -> None:
    """KVM_SET_BOOT_CPU_ID: before any vCPU; the id of the vCPU that starts."""
    if vcpu_id > MAX_BOOT_CPU_ID:
        raise KvmError(errno.EINVAL, f"a boot CPU id is at most {MAX_BOOT_CPU_ID}, not {vcpu_id}")
    if file.vm.vcpus:
        raise KvmError(errno.EBUSY, "the boot CPU is chosen before the vCPUs are created")
    file.vm.part.boot_cpu_id = vcpu_id


def set_max_vcpu_id(file: VmFile, cap: KvmEnableCap) -> None:
    """KVM_CAP_MAX_VCPU_ID: once (0 is as if it had not been set), before any vCPU."""
    part, limit = file.vm.part, cap.args[0]
    if limit > MAX_BOOT_CPU_ID:
        raise KvmError(errno.EINVAL, f"vCPU ids are below {MAX_BOOT_CPU_ID}, not {limit}")
    if part.max_vcpu_id == limit:
        return
    if file.vm.vcpus or part.max_vcpu_id:
        raise KvmError(errno.EINVAL, "the limit of vCPU ids is set once, before the vCPUs")
    part.max_vcpu_id = limit


def get_msr_index_list(file: Any, ptr: Pointer) -> None:
    """KVM_GET_MSR_INDEX_LIST: E2BIG, with the number there are, for an array that is too short."""
    given = int.from_bytes(ptr.read(4), "little")
    hyperv = file.kvm.arch.options["hyperv"]
    indices = sorted(index for index, msr in MSRS.items() if msr.listed and (hyperv or index not in HYPERV_MSRS))
    ptr.write(len(indices).to_bytes(4, "little"))
    if given < len(indices):
        raise KvmError(errno.E2BIG, f"there are {len(indices)} MSRs, and room for {given}")
    ptr.write(b"".join(index.to_bytes(4, "little") for index in indices), 4)


def get_supported_cpuid(_file: Any, ptr: Pointer) -> None:
    """KVM_GET_SUPPORTED_CPUID: the leaves that matter to interrupts and clocks."""
    head = KvmCpuid2.unpack(ptr.read(KvmCpuid2.SIZE))
    if head.nent < len(SUPPORTED_CPUID):
        raise KvmError(errno.E2BIG, f"there are {len(SUPPORTED_CPUID)} entries, and room for {head.nent}")
    if head.nent > MAX_CPUID_ENTRIES:
        head = head.with_(nent=MAX_CPUID_ENTRIES)
    entries = b"".join(entry.pack() for entry in SUPPORTED_CPUID)
    ptr.write(KvmCpuid2(len(SUPPORTED_CPUID), head.padding).pack() + entries)


def _get_xcomp(_file: Any, _attr: int, ptr: SystemPointer) -> None:
    ptr.put_u64(XCOMP_GUEST_SUPP)


SYSTEM_ATTRIBUTES = AttrTable(
    (
        Group(
            KVM_X86_GRP_SYSTEM,
            "KVM_X86_GRP_SYSTEM",
            (
                Attr(
                    "api.get-device-attr",
                    "KVM_X86_XCOMP_GUEST_SUPP",
                    number=KVM_X86_XCOMP_GUEST_SUPP,
                    type="u64",
                    get=_get_xcomp,
                    errors=(errno.EFAULT, errno.ENXIO),
                ),
            ),
        ),
    )
)
"""Attributes of the system fd, which only has some to read."""


class _System:
    """The system fd as an owner of attributes."""

    attributes = SYSTEM_ATTRIBUTES


_SYSTEM_ATTRIBUTE_IOCTLS = tuple(
    row for row in attribute_table(lambda _file: _System) if row.request != requests.KVM_SET_DEVICE_ATTR
)
SYSTEM_TABLE = (
    Ioctl(requests.KVM_GET_MSR_INDEX_LIST, POINTER, get_msr_index_list),
    Ioctl(requests.KVM_GET_SUPPORTED_CPUID, POINTER, get_supported_cpuid),
    *_SYSTEM_ATTRIBUTE_IOCTLS,
)
VM_TABLE: tuple[Ioctl, ...] = (Ioctl(requests.KVM_SET_BOOT_CPU_ID, VALUE, set_boot_cpu_id),)
VCPU_TABLE: tuple[Ioctl, ...] = (
    Ioctl(requests.KVM_SET_CPUID2, POINTER, set_cpuid2),
    Ioctl(requests.KVM_GET_CPUID2, POINTER, get_cpuid2),
    Ioctl(requests.KVM_ENABLE_CAP, KvmEnableCap, enable_cap, "api.enable-cap"),
    Ioctl(requests.KVM_GET_MSRS, POINTER, get_msrs),
    Ioctl(requests.KVM_SET_MSRS, POINTER, set_msrs),
)
ENABLE_CAP: dict[int, Callable[[VmFile, KvmEnableCap], None]] = {KVM_CAP_MAX_VCPU_ID: set_max_vcpu_id}
"""Capabilities of the VM fd that KVM_ENABLE_CAP turns on, and what does it."""
