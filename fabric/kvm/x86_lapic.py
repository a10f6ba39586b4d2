"""Local APICs of x86 VMs: their state, KVM_SIGNAL_MSI, KVM_CAP_X2APIC_API.

Rules: api.get-lapic, api.set-lapic, api.signal-msi and api.cap.x2apic-api of the interface inventory.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fabric.channel import Msi
from fabric.devices.x86 import apic_bus
from fabric.errors import KvmError
from fabric.kvm.dispatch import POINTER, Ioctl, Members, Pointer
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.x86 import KVM_APIC_REG_SIZE, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS

if TYPE_CHECKING:
    from fabric.devices.x86.lapic import Lapic
    from fabric.kvm.vm import VcpuFile, Vm, VmFile

_X2APIC_API_FLAGS = 0xF
_MAX_BUS_CYCLE = ((1 << 64) - 1) // ((1 << 32) - 1) // 128
_DIRECTED_EOI_ON, _DIRECTED_EOI_OFF = 4, 8
"""Flags of Linux 6.18: local APICs can, or cannot, keep an end of interrupt from the VMM's IOAPIC."""


def lapic_of(file: VcpuFile) -> Lapic:
    """The local APIC of a vCPU. KvmError(EINVAL) without one in the kernel."""
    apic: Lapic | None = file.part.vcpu.cpu_interface
    if apic is None:
        raise KvmError(errno.EINVAL, "the VM has no local APICs in the kernel")
    return apic


def get_lapic(file: VcpuFile, ptr: Pointer) -> None:
    """KVM_GET_LAPIC."""
    ptr.write(lapic_of(file).state())


def set_lapic(file: VcpuFile, ptr: Pointer) -> None:
    """KVM_SET_LAPIC."""
    apic = lapic_of(file)
    apic.set_state(ptr.read(KVM_APIC_REG_SIZE))
    ioapic = file.vm.irqchip.ioapic
    if ioapic is not None:
        ioapic.restore_rtc(apic)


# -- messages


def check_msi_address(vm: Vm, address: int) -> None:
    """KvmError(EINVAL) for an address that cannot be: with 32-bit ids bits 39:32 are reserved."""
    if vm.irqchip.apics.x2apic_format and address >> 32 & 0xFF:
        raise KvmError(errno.EINVAL, f"with 32-bit ids bits 7:0 of address_hi must be 0, in {address >> 32:#x}")


def send_msi(vm: Vm, address: int, data: int) -> int:
    """A message of the VMM's or of a route: -1 nobody there, 0 nobody took it, n local APICs took it."""
    if vm.msis.plain:
        return apic_bus.deliver_msi(vm.irqchip.apics, address, data)
    # What becomes of it is not known: somebody does something to the message.
    vm.msis.send_nowait(Msi(address, data, 0))
    return 1


def signal_msi(file: VmFile, address_lo: int, address_hi: int, data: int, flags: int, devid: int, _pad: bytes) -> int:
    """KVM_SIGNAL_MSI. Nobody there is -1 of the kernel's, which is EPERM."""
    vm = file.vm
    if vm.irqchip is None or flags & ~uapi.KVM_MSI_VALID_DEVID:
        raise KvmError(errno.EINVAL, "a message needs local APICs in the kernel, and no flags but VALID_DEVID")
    address = address_hi << 32 | address_lo
    check_msi_address(vm, address)
    taken = send_msi(vm, address, data)
    if taken < 0:
        raise KvmError(errno.EPERM, f"no local APIC has the destination of address {address:#x}")
    return taken


def msi_injector(vm: Vm, address: int, data: int) -> Callable[[], object]:
    """What a signal of an irqfd with this message does."""
    if vm.msis.plain:
        return apic_bus.MsiSender(vm.irqchip.apics, address, data)
    return partial(vm.msis.send_nowait, Msi(address, data, 0))


def deliver_msi(vm: Vm, msi: Msi) -> int:
    """The end of the VM's message channel."""
    return apic_bus.deliver_msi(vm.irqchip.apics, msi.address, msi.data)


# -- KVM_CAP_X2APIC_API


def enable_x2apic_api(file: VmFile, cap: uapi.KvmEnableCap) -> None:
    """KVM_CAP_X2APIC_API: flags that are on stay on."""
    flags = cap.args[0]
    if flags & ~_X2APIC_API_FLAGS:
        raise KvmError(errno.EINVAL, f"flags must be in {_X2APIC_API_FLAGS:#x}, not {flags:#x}")
    both = flags & _DIRECTED_EOI_ON and flags & _DIRECTED_EOI_OFF
    if both or (flags & _DIRECTED_EOI_ON and (file.vm.irqchip is None or not file.vm.irqchip.split)):
        raise KvmError(errno.EINVAL, f"directed EOI is on or off, and on with a split irqchip only; not {flags:#x}")
    part = file.vm.part
    part.x2apic_format |= bool(flags & KVM_X2APIC_API_USE_32BIT_IDS)
    part.broadcast_quirk_disabled |= bool(flags & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)
    if flags & (_DIRECTED_EOI_ON | _DIRECTED_EOI_OFF):
        part.directed_eoi = bool(flags & _DIRECTED_EOI_ON)
    if file.vm.irqchip is not None:
        apply_x2apic_api(file.vm)


def apply_x2apic_api(vm: Vm) -> None:
    """Tell the local APICs what was turned on, before or after they were made."""
    bus = vm.irqchip.apics
    bus.x2apic_format = vm.part.x2apic_format
    bus.broadcast_quirk_disabled = vm.part.broadcast_quirk_disabled
    if vm.part.directed_eoi is not None:
        bus.directed_eoi = vm.part.directed_eoi
    bus.changed()


def set_bus_cycle(file: VmFile, cap: uapi.KvmEnableCap) -> None:
    """KVM_CAP_X86_APIC_BUS_CYCLES_NS: before any vCPU; a count of 32 bits times the divider must fit 64 bits of ns."""
    cycle = cap.args[0]
    if not 0 < cycle <= _MAX_BUS_CYCLE:
        raise KvmError(errno.EINVAL, f"a bus cycle takes 1 to {_MAX_BUS_CYCLE} ns, not {cycle}")
    vm = file.vm
    if vm.irqchip is None:
        raise KvmError(errno.ENXIO, "the VM has no local APICs in the kernel")
    if vm.vcpus:
        raise KvmError(errno.EINVAL, "the bus cycle is set before the vCPUs")
    vm.irqchip.apics.cycle_ns = cycle


VM_TABLE = (Ioctl(requests.KVM_SIGNAL_MSI, Members(uapi.KvmMsi), signal_msi, "api.signal-msi"),)
VCPU_TABLE = (
    Ioctl(requests.KVM_GET_LAPIC, POINTER, get_lapic, "api.get-lapic"),
    Ioctl(requests.KVM_SET_LAPIC, POINTER, set_lapic, "api.set-lapic"),
)
ENABLE_CAP: dict[int, Callable[[VmFile, uapi.KvmEnableCap], None]] = {
    uapi.KVM_CAP_X2APIC_API: enable_x2apic_api,
    uapi.KVM_CAP_X86_APIC_BUS_CYCLES_NS: set_bus_cycle,
}
"""Capabilities of the VM fd that KVM_ENABLE_CAP turns on, and what does it."""
