"""x86 in the KVM layer: what the host offers, and how a VM and its vCPUs are put together.

The host is described by options. Their defaults are the host of the golden recordings, Linux 6.18, with what that host
lacked: SMM, Hyper-V, Xen, and a TSC that can be offset.

Rules: api.* of the interface inventory; capability values as recorded.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fabric.clock.tsc import GuestTsc, HostTime, TscSync, VmClock
from fabric.devices.registry import DEVICE_TYPES
from fabric.devices.x86.hyperv import VirtualProcessor
from fabric.devices.x86.irqchip import SOURCE_RESAMPLE, SOURCE_USERSPACE
from fabric.devices.x86.lapic import Lapic
from fabric.errors import KvmError
from fabric.kvm import vm_fd, x86_clock, x86_events, x86_hyperv, x86_irqchip, x86_lapic, x86_pit, x86_vcpu
from fabric.kvm.arch import GENERIC_CAPABILITIES, Architecture
from fabric.kvm.dispatch import Ioctl
from fabric.kvm.routing import PinRoute
from fabric.kvm.x86_clock import X86VcpuPart
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.x86 import KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE
from fabric.vcpu.x86 import X86Vcpu
from fabric.vcpu.x86_pv import Paravirt

if TYPE_CHECKING:
    from fabric.channel import LineLevel, Msi
    from fabric.kvm.routing import Route
    from fabric.kvm.vm import VcpuFile, Vm, VmFile
    from fabric.kvm.x86_eoi import IoapicEnds

CAPABILITIES: dict[int, int] = {
    **GENERIC_CAPABILITIES,
    **dict.fromkeys(
        (
            uapi.KVM_CAP_IRQCHIP,
            uapi.KVM_CAP_HLT,
            uapi.KVM_CAP_VAPIC,
            uapi.KVM_CAP_CLOCKSOURCE,
            uapi.KVM_CAP_PIT,
            uapi.KVM_CAP_MP_STATE,
            uapi.KVM_CAP_USER_NMI,
            uapi.KVM_CAP_REINJECT_CONTROL,
            uapi.KVM_CAP_IRQ_INJECT_STATUS,
            uapi.KVM_CAP_PIT2,
            uapi.KVM_CAP_SET_BOOT_CPU_ID,
            uapi.KVM_CAP_PIT_STATE2,
            uapi.KVM_CAP_IOEVENTFD,
            uapi.KVM_CAP_VCPU_EVENTS,
            uapi.KVM_CAP_PCI_SEGMENT,
            uapi.KVM_CAP_ENABLE_CAP,
            uapi.KVM_CAP_GET_TSC_KHZ,
            uapi.KVM_CAP_ONE_REG,
            uapi.KVM_CAP_TSC_DEADLINE_TIMER,
            uapi.KVM_CAP_KVMCLOCK_CTRL,
            uapi.KVM_CAP_DEVICE_CTRL,
            uapi.KVM_CAP_IOAPIC_POLARITY_IGNORED,
            uapi.KVM_CAP_IOEVENTFD_NO_LENGTH,
            uapi.KVM_CAP_DISABLE_QUIRKS,
            uapi.KVM_CAP_SPLIT_IRQCHIP,
            uapi.KVM_CAP_VCPU_ATTRIBUTES,
            uapi.KVM_CAP_IMMEDIATE_EXIT,
            uapi.KVM_CAP_EXCEPTION_PAYLOAD,
            uapi.KVM_CAP_STEAL_TIME,
            uapi.KVM_CAP_SYS_ATTRIBUTES,
            uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT,
            uapi.KVM_CAP_X86_APIC_BUS_CYCLES_NS,
        ),
        1,
    ),
    uapi.KVM_CAP_ADJUST_CLOCK: KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC,
    uapi.KVM_CAP_COALESCED_MMIO: 2,  # the page of the run area where the ring is
    uapi.KVM_CAP_READONLY_MEM: 1,
    uapi.KVM_CAP_MCE: 32,
    uapi.KVM_CAP_X86_DISABLE_EXITS: 14,
    uapi.KVM_CAP_DISABLE_QUIRKS2: 0x5FF,
}
"""What does not depend on the host's options or the VM."""
X2APIC_API_FLAGS = 0xF
DIRECTED_EOI_ON = 4
MAX_VCPU_IDS = 4096
MAX_VCPUS = 1024
ADDRESS_BITS = 52


class X86VmPart:
    """What the KVM layer keeps for an x86 VM."""

    __slots__ = (
        "boot_cpu_id",
        "broadcast_quirk_disabled",
        "clock",
        "directed_eoi",
        "exception_payload",
        "host_time",
        "hyperv",
        "ioapic_ends",
        "max_vcpu_id",
        "triple_fault_event",
        "tsc_khz",
        "tsc_sync",
        "x2apic_format",
    )

    def __init__(self, vm: Vm) -> None:
        options = vm.options
        self.boot_cpu_id = 0
        self.host_time = HostTime(vm.clock, options["tsc_khz"], options["tsc_start"], options["realtime_start"])
        self.tsc_sync = TscSync(self.host_time)
        self.clock = VmClock(self.host_time, self.tsc_sync)
        self.hyperv = x86_hyperv.new_partition(vm, self.clock)
        self.tsc_khz: int = options["tsc_khz"]
        """Frequency of the TSC of vCPUs to be made."""
        self.max_vcpu_id = 0
        """KVM_CAP_MAX_VCPU_ID; 0 until it is set."""
        self.x2apic_format = False
        self.directed_eoi: bool | None = None
        """What KVM_CAP_X2APIC_API said of directed EOI; None: as with a split irqchip."""
        self.exception_payload = self.triple_fault_event = False
        self.ioapic_ends: IoapicEnds | None = None
        """With a split irqchip."""
        self.broadcast_quirk_disabled = False


class X86(Architecture):
    """KVM of an x86 host."""

    name = "x86_64"
    defaults = {  # noqa: RUF012  # declared ClassVar in the base
        "host_cpus": 2,
        "vector_hashing": True,
        "smm": True,
        "hyperv": True,
        "xen": False,
        "tsc_khz": 2_600_000,
        "tsc_start": 1_000_000_000,
        "realtime_start": 1_700_000_000_000_000_000,
        "tsc_scaling": False,
        "apic_map_lag": False,
        "scan_on_entry": False,
        "timer_on_entry": False,
    }
    system_table = (*x86_vcpu.SYSTEM_TABLE, *x86_hyperv.SYSTEM_TABLE)
    vm_table = (
        *x86_irqchip.VM_TABLE,
        *x86_pit.VM_TABLE,
        *x86_lapic.VM_TABLE,
        *x86_clock.VM_TABLE,
        *x86_vcpu.VM_TABLE,
        *x86_hyperv.VM_TABLE,
    )
    vcpu_table = (
        *x86_lapic.VCPU_TABLE,
        *x86_clock.VCPU_TABLE,
        *x86_vcpu.VCPU_TABLE,
        *x86_events.VCPU_TABLE,
        *x86_hyperv.VCPU_TABLE,
    )
    mmap_size = 3 * uapi.PAGE_SIZE  # struct kvm_run, port I/O data, the ring of coalesced MMIO
    max_vcpu_ids = MAX_VCPU_IDS
    max_vcpus = MAX_VCPUS

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        smm, hyperv, xen = (int(options[name]) for name in ("smm", "hyperv", "xen"))
        self.address_spaces = 1 + smm
        self._capabilities = {
            **CAPABILITIES,
            uapi.KVM_CAP_NR_VCPUS: options["host_cpus"],
            uapi.KVM_CAP_NR_MEMSLOTS: 32764,
            uapi.KVM_CAP_MAX_VCPUS: MAX_VCPUS,
            uapi.KVM_CAP_MAX_VCPU_ID: MAX_VCPU_IDS,
            uapi.KVM_CAP_X86_SMM: smm,
            uapi.KVM_CAP_MULTI_ADDRESS_SPACE: 2 * smm,
            uapi.KVM_CAP_INTR_SHADOW: 1,
            **dict.fromkeys(x86_hyperv.CAPABILITIES, hyperv),
            uapi.KVM_CAP_XEN_HVM: xen,
            uapi.KVM_CAP_TSC_CONTROL: int(options["tsc_scaling"]),
            uapi.KVM_CAP_VM_TSC_CONTROL: int(options["tsc_scaling"]),
        }

    def capability(self, cap: int, vm: Vm | None) -> int:
        if cap == uapi.KVM_CAP_X2APIC_API:
            # Directed EOI can be turned on with a split irqchip only.
            able = vm is None or (vm.irqchip is not None and vm.irqchip.split)
            return X2APIC_API_FLAGS if able else X2APIC_API_FLAGS & ~DIRECTED_EOI_ON
        found: int = self._capabilities.get(cap, 0)
        return found

    def address_bits(self, machine_type: int) -> int:
        if machine_type:
            raise KvmError(errno.EINVAL, f"the machine type must be 0, not {machine_type:#x}")
        return ADDRESS_BITS

    def new_part(self, vm: Vm) -> X86VmPart:
        return X86VmPart(vm)

    def device_class(self, device_type: int) -> Any:
        cls = DEVICE_TYPES[self.name].get(device_type)
        if cls is None:
            raise KvmError(errno.ENODEV, f"this host has no device of type {device_type}")
        return cls

    def check_new_vcpu(self, vm: Vm, vcpu_id: int) -> None:
        limit = vm.part.max_vcpu_id
        if limit and vcpu_id >= limit:
            raise KvmError(errno.EINVAL, f"KVM_CAP_MAX_VCPU_ID allows ids below {limit}, not {vcpu_id}")

    def new_vcpu(self, vm: Vm, vcpu_id: int, index: int) -> tuple[X86Vcpu, Any]:
        vcpu = X86Vcpu(vm, vcpu_id, index, vm.engine, is_bsp=vcpu_id == vm.part.boot_cpu_id)
        part: X86VmPart = vm.part
        vcpu.tsc = GuestTsc(part.host_time, part.tsc_sync, part.tsc_khz, scaling=vm.options["tsc_scaling"])
        vcpu.pv = Paravirt(vcpu, part.clock)
        if part.hyperv is not None:
            vcpu.hyperv = VirtualProcessor(part.hyperv, vcpu)
        irqchip = vm.irqchip
        if irqchip is None:
            vcpu.mp_state = uapi.KVM_MP_STATE_RUNNABLE
        else:
            Lapic(irqchip.apics, vcpu, vcpu.take_external if irqchip.pic is None else irqchip.pic.acknowledge)
        return vcpu, X86VcpuPart(vcpu)

    def vcpu_created(self, file: VcpuFile) -> None:
        if file.vm.irqchip is not None:
            file.vm.irqchip.apics.add(file.part.vcpu.cpu_interface)

    def first_run(self, file: VcpuFile) -> None:
        file.vcpu.has_run = True

    def irqfd_ready(self, vm: Vm) -> bool:
        if vm.irqchip is None:
            raise KvmError(errno.EINVAL, "an irqfd needs an in-kernel irqchip")
        return True

    def check_resampler(self, vm: Vm) -> None:
        if vm.irqchip.split:
            raise KvmError(errno.EINVAL, "with a split irqchip the kernel has no lines to resample")

    def routing_allowed(self, vm: Vm) -> bool:
        return x86_irqchip.ready(vm)

    def rerouted(self, vm: Vm) -> None:
        if vm.part.ioapic_ends is not None:
            vm.part.ioapic_ends.rescan()
        x86_hyperv.routing_changed(vm)

    def check_route(self, vm: Vm, route: Route) -> None:
        x86_irqchip.check_route(vm, route)

    def set_irq(self, vm: Vm, route: Route, level: bool, resample: bool = False) -> int:
        return x86_irqchip.drive(vm, route, level, SOURCE_RESAMPLE if resample else SOURCE_USERSPACE)

    def injector(self, vm: Vm, routes: tuple[Route, ...], resample: bool) -> Callable[[], object]:
        return x86_irqchip.injector(vm, routes, resample)

    def gsi_told(self, vm: Vm, route: Route) -> int | None:
        if isinstance(route, PinRoute):
            return vm.routing.gsi_of_pin(route.irqchip, route.pin)
        return x86_hyperv.gsi_told(vm, route)

    def on_end(self, vm: Vm, route: Route, ended: Callable[[], None]) -> Callable[[], None]:
        return x86_irqchip.on_end(vm, route, ended)

    def deliver_msi(self, vm: Vm, msi: Msi) -> int:
        return x86_lapic.deliver_msi(vm, msi)

    def deliver_line(self, vm: Vm, event: LineLevel) -> None:
        x86_irqchip.deliver_line(vm, event)


_ENABLE_CAP = {
    **x86_irqchip.ENABLE_CAP,
    **x86_lapic.ENABLE_CAP,
    **x86_clock.ENABLE_CAP,
    **x86_vcpu.ENABLE_CAP,
    **x86_events.ENABLE_CAP,
}


def enable_cap(file: VmFile, cap: uapi.KvmEnableCap) -> None:
    """KVM_ENABLE_CAP of a VM."""
    handler = _ENABLE_CAP.get(cap.cap)
    if handler is None or cap.flags:
        vm_fd.enable_cap(file, cap)
    else:
        handler(file, cap)


X86.vm_table = (*X86.vm_table, Ioctl(requests.KVM_ENABLE_CAP, uapi.KvmEnableCap, enable_cap, "api.enable-cap"))
