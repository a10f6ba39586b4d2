"""Hyper-V for x86 guests: what a VMM turns on and asks for, and routes to synthetic interrupts.

Rules: api.cap.hyperv, api.cap.hyperv-synic, api.exit.hyperv and api.set-gsi-routing.rule.types of the interface
inventory; KVM_CAP_HYPERV_SYNIC(2), KVM_HYPERV_EVENTFD and KVM_GET_SUPPORTED_HV_CPUID of the KVM API document. On a host
without Hyper-V (option ``hyperv``) the calls are unknown, and the capabilities 0.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fabric.devices.x86.hyperv import Partition
from fabric.errors import KvmError
from fabric.kvm.dispatch import POINTER, Ioctl, Members, Pointer
from fabric.kvm.routing import OtherRoute
from fabric.uapi import hyperv as hv
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.x86 import KvmCpuid2, KvmCpuidEntry2

if TYPE_CHECKING:
    from fabric.clock.tsc import VmClock
    from fabric.devices.x86.hyperv import VirtualProcessor
    from fabric.kvm.eventfd import Event
    from fabric.kvm.routing import Route
    from fabric.kvm.vm import VcpuFile, Vm

CAPABILITIES = (
    uapi.KVM_CAP_HYPERV,
    uapi.KVM_CAP_HYPERV_VAPIC,
    uapi.KVM_CAP_HYPERV_SPIN,
    uapi.KVM_CAP_HYPERV_TIME,
    uapi.KVM_CAP_HYPERV_SYNIC,
    uapi.KVM_CAP_HYPERV_SYNIC2,
    uapi.KVM_CAP_HYPERV_VP_INDEX,
    uapi.KVM_CAP_HYPERV_EVENTFD,
    uapi.KVM_CAP_HYPERV_TLBFLUSH,
    uapi.KVM_CAP_HYPERV_SEND_IPI,
    uapi.KVM_CAP_HYPERV_CPUID,
    uapi.KVM_CAP_SYS_HYPERV_CPUID,
    uapi.KVM_CAP_HYPERV_ENFORCE_CPUID,
)
"""All of them 1, or 0."""
FEATURES_EAX = sum(1 << n for n in (*range(8), 9, 11, 13, 15))
FEATURES_EBX = sum(1 << n for n in (4, 5, 11, 20))
FEATURES_EDX = sum(1 << n for n in (1, 4, 8, 10, 11, 14))
DIRECT_TIMERS = 1 << 19
ADVICE = sum(1 << n for n in (2, 3, 5, 9, 11))
IPIS_BY_HYPERCALL = 1 << 10
SPIN_RETRIES = 0xFFF
MAX_VPS, MAX_LPS = 1024, 64


def new_partition(vm: Vm, clock: VmClock) -> Partition | None:
    """Hyper-V for a new VM; None on a host without."""
    if not vm.options["hyperv"]:
        return None
    partition = Partition(vm, clock)
    vm.on_destroy(partial(_disconnect, partition))
    return partition


def _vp(file: VcpuFile) -> VirtualProcessor | None:
    found: VirtualProcessor | None = file.part.vcpu.hyperv
    return found


# -- capabilities of a vCPU


def enable_synic(file: VcpuFile, cap: uapi.KvmEnableCap) -> None:
    """KVM_CAP_HYPERV_SYNIC, or KVM_CAP_HYPERV_SYNIC2, which takes no argument and leaves the pages as they are."""
    vp = _vp(file)
    keeps_pages = cap.cap == uapi.KVM_CAP_HYPERV_SYNIC2
    if vp is None or file.part.vcpu.cpu_interface is None or (keeps_pages and cap.args[0]):
        raise KvmError(errno.EINVAL, "a SynIC needs Hyper-V and a local APIC in the kernel, and no arguments")
    vp.synic.activate(keeps_pages=keeps_pages)


def enforce_cpuid(file: VcpuFile, cap: uapi.KvmEnableCap) -> None:
    """KVM_CAP_HYPERV_ENFORCE_CPUID."""
    vp = _vp(file)
    if vp is None:
        raise KvmError(errno.EINVAL, "the host has no Hyper-V")
    vp.enforced = bool(cap.args[0])


# -- routes to SINTs


def send(vm: Vm, route: OtherRoute) -> int:
    """Raise the SINT of a route: 1, 0 if the local APIC is off, -1 without such a SINT, or one that is masked."""
    to = route.to
    assert isinstance(to, uapi.KvmIrqRoutingHvSint)
    vp = vm.part.hyperv.find(to.vcpu)
    if vp is None or not vp.synic.active:
        vm.lost("no SynIC")
        return -1
    return int(vp.synic.raise_sint(to.sint))


def _source(vm: Vm, route: Route) -> tuple[VirtualProcessor, int] | None:
    """The virtual processor with an active SynIC and the SINT of a route."""
    if not isinstance(route, OtherRoute) or not isinstance(route.to, uapi.KvmIrqRoutingHvSint):
        return None
    vp = vm.part.hyperv.find(route.to.vcpu)
    if vp is None or not vp.synic.active or route.to.sint >= hv.HV_SYNIC_SINT_COUNT:
        return None
    return vp, route.to.sint


def routing_changed(vm: Vm) -> None:
    """KVM_SET_GSI_ROUTING: remember which GSI each SINT has; those of SynICs that are enabled later have none.

    A VMM that wants to be told of the end of messages therefore enables the SynICs first.
    """
    if vm.part.hyperv is None:
        return
    for vp in vm.part.hyperv.vps:
        vp.synic.gsis.clear()
    for gsi, route in vm.routing.items():
        source = _source(vm, route)
        if source is not None:
            vp, sint = source
            vp.synic.gsis[sint] = gsi


def gsi_told(vm: Vm, route: Route) -> int | None:
    """The GSI whose resample irqfds are told when the guest is done with what the SINT of a route signalled."""
    source = _source(vm, route)
    return None if source is None else source[0].synic.gsis.get(source[1])


def on_end(vm: Vm, route: Route, ended: Callable[[], None]) -> Callable[[], None]:
    """Have ``ended`` called then; returns what undoes it."""
    source = _source(vm, route)
    assert source is not None
    vp, sint = source
    told = vp.synic.listeners.setdefault(sint, [])
    told.append(ended)
    return partial(told.remove, ended)


# -- KVM_HYPERV_EVENTFD


def hyperv_eventfd(file: Any, conn_id: int, fd: int, flags: int, *_padding: int) -> None:
    """KVM_HYPERV_EVENTFD: HvCallSignalEvent of a connection signals an eventfd, and does not exit."""
    vm: Vm = file.vm
    partition = vm.part.hyperv
    if partition is None:
        raise KvmError(vm.arch.unknown_request, "the host has no Hyper-V")
    if flags & ~hv.KVM_HYPERV_EVENTFD_DEASSIGN or conn_id & ~hv.KVM_HYPERV_CONN_ID_MASK:
        raise KvmError(
            errno.EINVAL, f"a connection id has 24 bits and the only flag is 1, not {conn_id:#x}, {flags:#x}"
        )
    connections: dict[int, Any] = partition.connections
    if flags:
        if conn_id not in connections:
            raise KvmError(errno.ENOENT, f"connection {conn_id:#x} has no eventfd")
        connections.pop(conn_id).close()
        return
    event = file.kvm.event(fd)
    if conn_id in connections:
        raise KvmError(errno.EEXIST, f"connection {conn_id:#x} has an eventfd")
    connections[conn_id] = _Connection(event)


class _Connection:
    """An eventfd that the guest signals."""

    __slots__ = ("closed", "event")

    def __init__(self, event: Event) -> None:
        self.event = event
        self.closed = False
        event.watch(self.gone)

    def __call__(self) -> None:
        if not self.closed:
            self.event.signal()

    def close(self) -> None:
        """The guest does not signal it any more."""
        self.event.unwatch(self.gone)

    def gone(self) -> None:
        """The eventfd was closed: what the guest signals reaches nobody."""
        self.closed = True


def _disconnect(partition: Partition) -> None:
    """The VM goes away."""
    for connection in partition.connections.values():
        connection.close()


# -- CPUID


def supported_cpuid(has_apic: bool) -> tuple[KvmCpuidEntry2, ...]:
    """What KVM can offer a guest; timers in direct mode and IPIs only with the local APIC in the kernel."""
    vendor = [int.from_bytes(b"Linux KVM Hv"[n : n + 4], "little") for n in (0, 4, 8)]
    return (
        KvmCpuidEntry2(
            hv.HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS,
            eax=hv.HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES,
            ebx=vendor[0],
            ecx=vendor[1],
            edx=vendor[2],
        ),
        KvmCpuidEntry2(hv.HYPERV_CPUID_INTERFACE, eax=hv.HYPERV_CPUID_SIGNATURE_EAX),
        KvmCpuidEntry2(hv.HYPERV_CPUID_VERSION, eax=0x3839, ebx=0xA0000),
        KvmCpuidEntry2(
            hv.HYPERV_CPUID_FEATURES,
            eax=FEATURES_EAX,
            ebx=FEATURES_EBX,
            edx=FEATURES_EDX | (DIRECT_TIMERS if has_apic else 0),
        ),
        KvmCpuidEntry2(
            hv.HYPERV_CPUID_ENLIGHTENMENT_INFO,
            eax=ADVICE | (IPIS_BY_HYPERCALL if has_apic else 0),
            ebx=SPIN_RETRIES,
        ),
        KvmCpuidEntry2(hv.HYPERV_CPUID_IMPLEMENT_LIMITS, eax=MAX_VPS, ebx=MAX_LPS),
        KvmCpuidEntry2(hv.HYPERV_CPUID_SYNDBG_VENDOR_AND_MAX_FUNCTIONS, ebx=vendor[0], ecx=vendor[1], edx=vendor[2]),
        KvmCpuidEntry2(hv.HYPERV_CPUID_SYNDBG_INTERFACE, eax=int.from_bytes(b"VS#1", "little")),
        KvmCpuidEntry2(hv.HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES, eax=hv.HV_SYNDBG_CAP_ALLOW_KERNEL_DEBUGGING),
        KvmCpuidEntry2(hv.HYPERV_CPUID_NESTED_FEATURES, eax=1 << 17 | 1 << 19, ebx=1),
    )


def get_supported_hv_cpuid(file: Any, ptr: Pointer) -> None:
    """KVM_GET_SUPPORTED_HV_CPUID, of the system and of a vCPU. Too short an array is E2BIG and stays as it is."""
    arch = file.kvm.arch
    part = getattr(file, "part", None)
    if not arch.options["hyperv"]:
        raise KvmError(arch.vcpu_unknown_request, "the host has no Hyper-V")
    head = KvmCpuid2.unpack(ptr.read(KvmCpuid2.SIZE))
    entries = supported_cpuid(part is None or part.vcpu.cpu_interface is not None)
    if head.nent < len(entries):
        raise KvmError(errno.E2BIG, f"there are {len(entries)} entries, and room for {head.nent}")
    ptr.write(KvmCpuid2(len(entries), head.padding).pack() + b"".join(entry.pack() for entry in entries))


SYSTEM_TABLE = (Ioctl(requests.KVM_GET_SUPPORTED_HV_CPUID, POINTER, get_supported_hv_cpuid),)
VM_TABLE = (Ioctl(requests.KVM_HYPERV_EVENTFD, Members(hv.KvmHypervEventfd), hyperv_eventfd),)
VCPU_TABLE = (Ioctl(requests.KVM_GET_SUPPORTED_HV_CPUID, POINTER, get_supported_hv_cpuid),)
VCPU_ENABLE_CAP: dict[int, Callable[[Any, uapi.KvmEnableCap], None]] = {
    uapi.KVM_CAP_HYPERV_SYNIC: enable_synic,
    uapi.KVM_CAP_HYPERV_SYNIC2: enable_synic,
    uapi.KVM_CAP_HYPERV_ENFORCE_CPUID: enforce_cpuid,
}
"""Capabilities of a vCPU fd that KVM_ENABLE_CAP turns on, and what does it."""
