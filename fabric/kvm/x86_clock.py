"""Clocks of x86 VMs and vCPUs: KVM_GET/SET_CLOCK, the TSC, kvmclock.

Rules: api.get-clock, api.set-clock, api.set-tsc-khz, api.get-tsc-khz and vcpu.tsc.offset of the interface inventory.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from fabric.clock.tsc import MASK64, tolerated
from fabric.devices.attributes import Attr, AttrTable, Group, Pointer
from fabric.errors import KvmError
from fabric.kvm.device_fd import attribute_table
from fabric.kvm.dispatch import POINTER, VALUE, Ioctl
from fabric.uapi import ioctl as requests
from fabric.uapi.kvm import KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KvmEnableCap
from fabric.uapi.x86 import (
    KVM_CLOCK_HOST_TSC,
    KVM_CLOCK_REALTIME,
    KVM_CLOCK_TSC_STABLE,
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
    KvmClockData,
)

if TYPE_CHECKING:
    from fabric.kvm.vm import VcpuFile, VmFile
    from fabric.vcpu.x86 import X86Vcpu

_CLOCK_FLAGS = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC
MAX_SCALED_KHZ = (1 << 31) - 2


def get_clock(file: VmFile, ptr: Pointer) -> None:
    """KVM_GET_CLOCK: the VM's clock; once it is stable also the real time and the host's TSC of the same moment."""
    clock = file.vm.part.clock
    if not clock.stable:
        ptr.write(KvmClockData(clock.now).pack())
        return
    ptr.write(KvmClockData(clock.now, _CLOCK_FLAGS, 0, clock.host.realtime & MASK64, clock.host.tsc).pack())


def set_clock(file: VmFile, data: KvmClockData) -> None:
    """KVM_SET_CLOCK: with KVM_CLOCK_REALTIME plus the real time that has passed since, never less."""
    if data.flags & ~_CLOCK_FLAGS:
        raise KvmError(errno.EINVAL, f"flags must be in {_CLOCK_FLAGS:#x}, not {data.flags:#x}")
    clock = file.vm.part.clock
    passed = max(0, clock.host.realtime - data.realtime) if data.flags & KVM_CLOCK_REALTIME else 0
    clock.set(data.clock + passed & MASK64)


def vm_set_tsc_khz(file: VmFile, khz: int) -> None:
    """KVM_SET_TSC_KHZ of a VM: what vCPUs made from now on have. 0 is the host's."""
    khz &= 0xFFFF_FFFF
    options = file.vm.options
    if file.vm.vcpus or (options["tsc_scaling"] and khz > MAX_SCALED_KHZ):
        raise KvmError(errno.EINVAL, f"the frequency {khz} kHz is set before the vCPUs, and can be at most scaled to")
    file.vm.part.tsc_khz = khz or options["tsc_khz"]


def vm_get_tsc_khz(file: VmFile, _arg: int) -> int:
    """KVM_GET_TSC_KHZ of a VM."""
    khz: int = file.vm.part.tsc_khz
    return khz


def set_tsc_khz(file: VcpuFile, khz: int) -> None:
    """KVM_SET_TSC_KHZ of a vCPU; 0 is the host's. What a host without scaling refuses is read back all the same."""
    khz &= 0xFFFF_FFFF
    host = file.vm.options["tsc_khz"]
    tsc = file.part.vcpu.tsc
    if tsc.scaling and khz > MAX_SCALED_KHZ:
        raise KvmError(errno.EINVAL, f"a TSC is scaled to at most {MAX_SCALED_KHZ} kHz, not {khz}")
    tsc.khz = khz = khz or host
    # Faster than the host it is caught up, again and again; slower it cannot be.
    if not tsc.scaling and khz < tolerated(host)[0]:
        raise KvmError(errno.EINVAL, f"without scaling the TSC of {host} kHz cannot count at {khz} kHz")


def get_tsc_khz(file: VcpuFile, _arg: int) -> int:
    """KVM_GET_TSC_KHZ of a vCPU."""
    khz: int = file.part.vcpu.tsc.khz
    return khz


def kvmclock_ctrl(file: VcpuFile, _arg: int) -> None:
    """KVM_KVMCLOCK_CTRL: tell the guest that it was stopped. EINVAL unless it has a clock page."""
    pv = file.part.vcpu.pv
    if pv.clock_page is None:
        raise KvmError(errno.EINVAL, "the guest has no clock page")
    pv.guest_stopped = True
    pv.clock_changed()


# -- attributes of a vCPU


def _get_offset(part: X86VcpuPart, _attr: int, ptr: Pointer) -> None:
    ptr.put_u64(part.vcpu.tsc.offset)


def _set_offset(part: X86VcpuPart, _attr: int, ptr: Pointer) -> None:
    part.vcpu.tsc.set_offset(ptr.u64())


class X86VcpuPart:
    """What the KVM layer keeps for an x86 vCPU: its attributes."""

    __slots__ = ("vcpu",)

    def __init__(self, vcpu: X86Vcpu) -> None:
        self.vcpu = vcpu

    attributes: ClassVar[AttrTable] = AttrTable(
        (
            Group(
                KVM_VCPU_TSC_CTRL,
                "KVM_VCPU_TSC_CTRL",
                (
                    Attr(
                        "vcpu.tsc.offset",
                        "KVM_VCPU_TSC_OFFSET",
                        number=KVM_VCPU_TSC_OFFSET,
                        type="u64",
                        set=_set_offset,
                        get=_get_offset,
                        errors=(errno.EFAULT, errno.ENXIO),
                    ),
                ),
            ),
        )
    )


def enforce_pv(file: VcpuFile, cap: KvmEnableCap) -> None:
    """KVM_CAP_ENFORCE_PV_FEATURE_CPUID."""
    file.part.vcpu.pv.enforced = bool(cap.args[0])


VM_TABLE: tuple[Ioctl, ...] = (
    Ioctl(requests.KVM_GET_CLOCK, POINTER, get_clock, "api.get-clock"),
    Ioctl(requests.KVM_SET_CLOCK, KvmClockData, set_clock, "api.set-clock"),
    Ioctl(requests.KVM_SET_TSC_KHZ, VALUE, vm_set_tsc_khz, "api.set-tsc-khz"),
    Ioctl(requests.KVM_GET_TSC_KHZ, VALUE, vm_get_tsc_khz, "api.get-tsc-khz"),
)
VCPU_TABLE: tuple[Ioctl, ...] = (
    Ioctl(requests.KVM_SET_TSC_KHZ, VALUE, set_tsc_khz, "api.set-tsc-khz"),
    Ioctl(requests.KVM_GET_TSC_KHZ, VALUE, get_tsc_khz, "api.get-tsc-khz"),
    Ioctl(requests.KVM_KVMCLOCK_CTRL, VALUE, kvmclock_ctrl),
    *attribute_table(lambda file: file.part),
)
ENABLE_CAP: dict[int, Callable[[VmFile, KvmEnableCap], None]] = {}
VCPU_ENABLE_CAP: dict[int, Callable[[Any, KvmEnableCap], None]] = {KVM_CAP_ENFORCE_PV_FEATURE_CPUID: enforce_pv}
"""Capabilities of the VM fd and of the vCPU fd that KVM_ENABLE_CAP turns on, and what does it."""
