"""arm64 in the KVM layer: capabilities, address widths, interrupt lines, routes, and the first KVM_RUN.

The host is described by options. Their defaults are the host of the golden recordings: Linux 6.1 in VHE mode, all
CPU features, a GICv3.

Rules: api.* and vcpu.first-run of the interface inventory; capability values as recorded.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

from fabric.channel import LineLevel, Msi
from fabric.clock.arch_timer import DEFAULT_FREQUENCY, ArchCounter
from fabric.devices.arm.vgic_its import MsiSender, signal_message
from fabric.devices.registry import DEVICE_TYPES
from fabric.errors import KvmError
from fabric.kvm import vm_fd
from fabric.kvm.arch import GENERIC_CAPABILITIES, Architecture
from fabric.kvm.arm64_vcpu import VCPU_TABLE, ArmVcpuPart
from fabric.kvm.dirty_ring import MAX_SIZE
from fabric.kvm.dispatch import POINTER, VALUE, Ioctl, Members, Pointer
from fabric.kvm.routing import MsiRoute, PinRoute, Route
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.vcpu import Arm64Vcpu
from fabric.vcpu.arm64_sysregs import CSV_FIELDS, PFR0, host_registers
from fabric.vcpu.pmu import EventFilter, PmuHost
from fabric.vcpu.smccc import Firmware

if TYPE_CHECKING:
    from fabric.kvm.vm import VcpuFile, Vm, VmFile

MIN_IPA_BITS = 32
DEFAULT_IPA_BITS = 40
IRQCHIP_PINS = arm.VGIC_MAX_SPI + 1 - arm.VGIC_NR_PRIVATE_IRQS
"""Inputs that a route may name, whatever the GIC has."""

CAPABILITIES: dict[int, int] = {
    **GENERIC_CAPABILITIES,
    uapi.KVM_CAP_MP_STATE: 1,
    uapi.KVM_CAP_SYNC_MMU: 1,
    uapi.KVM_CAP_SET_GUEST_DEBUG: 1,
    uapi.KVM_CAP_IOEVENTFD: 1,
    uapi.KVM_CAP_VCPU_EVENTS: 1,
    uapi.KVM_CAP_ONE_REG: 1,
    uapi.KVM_CAP_READONLY_MEM: 1,
    uapi.KVM_CAP_ARM_PSCI: 1,
    uapi.KVM_CAP_ARM_SET_DEVICE_ADDR: 1,
    uapi.KVM_CAP_DEVICE_CTRL: 1,
    uapi.KVM_CAP_ARM_PSCI_0_2: 1,
    uapi.KVM_CAP_GUEST_DEBUG_HW_BPS: 6,
    uapi.KVM_CAP_GUEST_DEBUG_HW_WPS: 4,
    uapi.KVM_CAP_VCPU_ATTRIBUTES: 1,
    uapi.KVM_CAP_IMMEDIATE_EXIT: 1,
    uapi.KVM_CAP_ARM_USER_IRQ: 1,
    uapi.KVM_CAP_ARM_IRQ_LINE_LAYOUT_2: 1,
    uapi.KVM_CAP_ARM_NISV_TO_USER: 1,
    uapi.KVM_CAP_ARM_INJECT_EXT_DABT: 1,
    uapi.KVM_CAP_SET_GUEST_DEBUG2: 0x3_0003,
    uapi.KVM_CAP_PTP_KVM: 1,
    uapi.KVM_CAP_ARM_SYSTEM_SUSPEND: 1,
    uapi.KVM_CAP_IRQ_INJECT_STATUS: 0,  # KVM_IRQ_LINE_STATUS is there, and has nothing to report
    uapi.KVM_CAP_ENABLE_CAP: 0,  # a vCPU has nothing to enable
    uapi.KVM_CAP_IOEVENTFD_NO_LENGTH: 0,  # by this name of KVM_CAP_IOEVENTFD_ANY_LENGTH only x86 and s390 have it
}
"""What does not depend on the host or the VM."""


class ArmVmPart:
    """What the KVM layer keeps for an arm64 VM."""

    __slots__ = (
        "counter",
        "csv",
        "el1_32bit",
        "firmware",
        "has_run",
        "host",
        "pmu_cpus",
        "pmu_filter",
        "pmu_host",
        "pmu_id",
        "vcpus",
    )

    def __init__(self, vm: Vm) -> None:
        options = vm.options
        self.counter = ArchCounter(
            vm.clock,  # type: ignore[arg-type]  # an Engine or a StoppedClock, both have timers
            frequency=options["counter_hz"],
            start=options["counter_start"],
        )
        self.has_run = False
        """Some vCPU got past its first-run checks."""
        self.el1_32bit: bool | None = None
        """Register width of the VM's vCPUs, once one of them was initialised."""
        self.host = host_registers(options)
        """The ID registers of the host by encoding, as the VM sees them."""
        self.csv = self.host[PFR0] & CSV_FIELDS
        """What the host promises about speculation, which userspace may lessen."""
        self.firmware = Firmware()
        self.pmu_host: PmuHost = vm.arch.pmu  # type: ignore[attr-defined]
        self.pmu_id: int | None = None
        """The host PMU in use."""
        self.pmu_cpus: frozenset[int] | None = None
        """The physical CPUs of a PMU that was chosen; None for all."""
        self.pmu_filter = EventFilter(options["pmu_event_bits"])
        self.vcpus: list[ArmVcpuPart] = []
        """In creation order."""


class Arm64(Architecture):
    """KVM of an arm64 host."""

    name = "aarch64"
    defaults = {  # noqa: RUF012  # declared ClassVar in the base
        "host_gic": 3,
        "gicv2_compat": False,
        "ipa_bits": 48,
        "host_cpus": 2,
        "lpi_id_bits": 16,
        "counter_hz": DEFAULT_FREQUENCY,
        "counter_start": 0,
        "pmu_ids": (8,),
        "pmu_cpus": {},
        "pmu_event_bits": 16,
        "pmu_counters": 6,
        "pmu_long_counters": False,
        "pmu_poison": False,
        "cpu_hz": 1_000_000_000,
        "instructions_per_cycle": 1,
        "el1_32bit": True,
        "sve": True,
        "sve_max_vq": 16,
        "ptrauth": True,
        "ras": True,
        "steal_time": True,
        "dirty_ring": False,  # Linux has it on arm64 since 6.2
    }
    vcpu_table = VCPU_TABLE
    unknown_request = errno.EINVAL
    mmap_size = 2 * uapi.PAGE_SIZE  # struct kvm_run, and the ring of coalesced MMIO
    gpa_errno = errno.EFAULT
    max_vcpu_ids = arm.VGIC_V3_MAX_CPUS
    max_vcpus = arm.VGIC_V3_MAX_CPUS

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        if options["host_gic"] not in (0, 2, 3):
            raise ValueError(f"host_gic must be 0 (none for guests), 2 or 3, not {options['host_gic']!r}")
        if not MIN_IPA_BITS <= options["ipa_bits"] <= 52:
            raise ValueError(f"ipa_bits must be 32 to 52, not {options['ipa_bits']!r}")
        if not 16 <= options["lpi_id_bits"] <= 24:
            raise ValueError(f"lpi_id_bits must be 16 to 24, not {options['lpi_id_bits']!r}")
        if not 1 <= options["sve_max_vq"] <= 16:
            raise ValueError(f"sve_max_vq must be 1 to 16 quadwords, not {options['sve_max_vq']!r}")
        self.pmu = PmuHost(
            cpu_hz=options["cpu_hz"],
            instructions_per_cycle=Fraction(options["instructions_per_cycle"]),
            counter_hz=options["counter_hz"],
            counters=options["pmu_counters"],
            event_bits=options["pmu_event_bits"],
            long_counters=options["pmu_long_counters"],
            poison=options["pmu_poison"],
        )
        self.host_max_vcpus = arm.VGIC_V2_MAX_CPUS if options["host_gic"] == 2 else arm.VGIC_V3_MAX_CPUS
        self._capabilities: dict[int, int] = {
            **CAPABILITIES,
            uapi.KVM_CAP_IRQCHIP: int(bool(options["host_gic"])),
            uapi.KVM_CAP_NR_MEMSLOTS: 32767,
            uapi.KVM_CAP_NR_VCPUS: min(options["host_cpus"], self.host_max_vcpus),
            uapi.KVM_CAP_MAX_VCPUS: self.host_max_vcpus,
            uapi.KVM_CAP_MAX_VCPU_ID: self.host_max_vcpus,
            uapi.KVM_CAP_ARM_VM_IPA_SIZE: options["ipa_bits"],
            uapi.KVM_CAP_ARM_PMU_V3: int(bool(options["pmu_ids"])),
            uapi.KVM_CAP_ARM_EL1_32BIT: int(options["el1_32bit"]),
            uapi.KVM_CAP_ARM_SVE: int(options["sve"]),
            uapi.KVM_CAP_ARM_PTRAUTH_ADDRESS: int(options["ptrauth"]),
            uapi.KVM_CAP_ARM_PTRAUTH_GENERIC: int(options["ptrauth"]),
            uapi.KVM_CAP_ARM_INJECT_SERROR_ESR: int(options["ras"]),
            uapi.KVM_CAP_STEAL_TIME: int(options["steal_time"]),
            uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: MAX_SIZE if options["dirty_ring"] else 0,
        }

    # -- machines

    def capability(self, cap: int, vm: Vm | None) -> int:
        if cap in (uapi.KVM_CAP_MAX_VCPUS, uapi.KVM_CAP_MAX_VCPU_ID) and vm is not None:
            return self.vm_max_vcpus(vm)
        if cap == uapi.KVM_CAP_MSI_DEVID:
            if vm is None:
                raise KvmError(errno.EINVAL, "KVM_CAP_MSI_DEVID is a capability of VMs")
            return int(bool(vm.its_list))
        return self._capabilities.get(cap, 0)

    def vm_max_vcpus(self, vm: Vm) -> int:
        """Most vCPUs of a VM; fewer once it has a GICv2."""
        return self.host_max_vcpus if vm.irqchip is None else int(vm.irqchip.max_vcpus)

    def address_bits(self, machine_type: int) -> int:
        limit: int = self.options["ipa_bits"]
        if machine_type & ~arm.KVM_VM_TYPE_ARM_IPA_SIZE_MASK:
            raise KvmError(errno.EINVAL, f"a machine type is an address width, not {machine_type:#x}")
        bits: int = machine_type or DEFAULT_IPA_BITS
        if not MIN_IPA_BITS <= bits <= limit:
            raise KvmError(errno.EINVAL, f"the address width must be {MIN_IPA_BITS} to {limit}, not {bits}")
        return bits

    def new_part(self, vm: Vm) -> ArmVmPart:
        return ArmVmPart(vm)

    def device_class(self, device_type: int) -> Any:
        cls = DEVICE_TYPES[self.name].get(device_type)
        if cls is None or not cls.supported(self.options):
            raise KvmError(errno.ENODEV, f"this host has no device of type {device_type}")
        return cls

    # -- vCPUs

    def check_new_vcpu(self, vm: Vm, vcpu_id: int) -> None:
        if vm.irqchip is not None:
            vm.irqchip.check_create_vcpu(vcpu_id)
        elif vcpu_id >= self.host_max_vcpus:
            raise KvmError(errno.EINVAL, f"a vCPU id must be below {self.host_max_vcpus}, not {vcpu_id}")

    def new_vcpu(self, vm: Vm, vcpu_id: int, index: int) -> tuple[Arm64Vcpu, ArmVcpuPart]:
        vcpu = Arm64Vcpu(vm, vcpu_id, index, vm.engine, vm.part.counter, vm.part.host, vm.part.firmware)
        return vcpu, ArmVcpuPart(vm, vcpu)

    def vcpu_created(self, file: VcpuFile) -> None:
        file.vm.part.vcpus.append(file.part)
        if file.vm.irqchip is not None:
            file.vm.irqchip.vcpu_created(file.vcpu)

    def first_run(self, file: VcpuFile) -> None:
        part: ArmVcpuPart = file.part
        vm, vcpu = file.vm, file.vcpu
        if not vcpu.initialized:
            raise KvmError(errno.ENOEXEC, f"vCPU {vcpu.vcpu_id} was not given KVM_ARM_VCPU_INIT")
        part.check_finalized()
        if vm.irqchip is not None:
            try:
                vm.irqchip.first_run()
            except (KvmError, MemoryError):
                # A GIC that cannot be mapped is beyond repair: everything on this VM is EIO from here on.
                vm.kill()
                raise
        part.enable_timers()
        part.enable_pmu()
        vcpu.has_run = vm.part.has_run = True

    # -- interrupts

    def irqfd_ready(self, vm: Vm) -> bool:
        return vm.irqchip is not None and bool(vm.irqchip.initialized)

    def check_route(self, vm: Vm, route: Route) -> None:
        if isinstance(route, MsiRoute):
            return
        if not isinstance(route, PinRoute):
            raise KvmError(errno.EINVAL, f"arm64 has no routes of type {route.type}")
        if route.irqchip or route.pin >= IRQCHIP_PINS:
            raise KvmError(
                errno.EINVAL,
                f"a pin must be below {IRQCHIP_PINS} of irqchip 0, not {route.pin} of {route.irqchip}",
            )

    def set_irq(self, vm: Vm, route: Route, level: bool, resample: bool = False) -> int:
        if isinstance(route, PinRoute):
            vm.lines.send_nowait(LineLevel(route.pin + arm.VGIC_NR_PRIVATE_IRQS, level))
            return 0
        assert isinstance(route, MsiRoute)
        return send_msi(vm, route.address, route.data, route.flags, route.devid) if level else -1

    def injector(self, vm: Vm, routes: tuple[Route, ...], resample: bool) -> Callable[[], object]:
        if not routes:
            return partial(vm.lost, "no route")
        (route,) = routes  # with one irqchip a GSI has one route
        if isinstance(route, PinRoute):
            # The line is raised and stays up: only a resampler lowers it.
            intid = route.pin + arm.VGIC_NR_PRIVATE_IRQS
            if vm.irqchip is None or intid >= vm.irqchip.nr_irqs:
                return partial(vm.lost, "no such input")
            if vm.lines.plain:
                return partial(vm.irqchip.inject_spi, intid, True)
            return partial(self.set_irq, vm, route, True)
        assert isinstance(route, MsiRoute)
        if vm.msis.plain or not route.flags:
            address = route.address
            return MsiSender(
                vm, uapi.KvmMsi(address & 0xFFFF_FFFF, address >> 32, route.data, route.flags, route.devid)
            )
        return partial(vm.msis.send_nowait, Msi(route.address, route.data, route.devid))

    def gsi_told(self, vm: Vm, route: Route) -> int | None:
        return vm.routing.gsi_of_pin(route.irqchip, route.pin) if isinstance(route, PinRoute) else None

    def on_end(self, vm: Vm, route: Route, ended: Callable[[], None]) -> Callable[[], None]:
        assert isinstance(route, PinRoute)
        told = vm.irqchip.eoi_notifiers.setdefault(route.pin + arm.VGIC_NR_PRIVATE_IRQS, [])
        told.append(ended)
        return partial(told.remove, ended)

    def deliver_msi(self, vm: Vm, msi: Msi) -> int:
        try:
            return signal_message(vm, msi.address, msi.data, uapi.KVM_MSI_VALID_DEVID, msi.devid)
        except KvmError as error:
            return -(error.errno or errno.EINVAL)  # its sender may be long gone

    def deliver_line(self, vm: Vm, event: LineLevel) -> None:
        vm.irqchip.inject_spi(event.line, event.level)


def send_msi(vm: Vm, address: int, data: int, flags: int, devid: int) -> int:
    """An MSI from the VMM. Through a channel that does something to it, what becomes of it is not known: 1."""
    if vm.msis.plain or flags != uapi.KVM_MSI_VALID_DEVID or not vm.its_list:
        return signal_message(vm, address, data, flags, devid)
    vm.msis.send_nowait(Msi(address, data, devid))
    return 1


# -- VM ioctls ------------------------------------------------------------------------------------------------


def preferred_target(_file: VmFile, ptr: Pointer) -> None:
    """KVM_ARM_PREFERRED_TARGET: one target fits every host, and no feature is on by default."""
    ptr.write(arm.KvmVcpuInit(arm.KVM_ARM_TARGET_GENERIC_V8).pack())


def irq_line(file: VmFile, irq: int, level: int) -> None:
    """KVM_IRQ_LINE, and KVM_IRQ_LINE_STATUS, which reports nothing on arm64: the routing table does not apply."""
    vm = file.vm
    kind = irq >> arm.KVM_ARM_IRQ_TYPE_SHIFT & arm.KVM_ARM_IRQ_TYPE_MASK
    number = irq & arm.KVM_ARM_IRQ_NUM_MASK
    vgic = vm.irqchip
    if kind == arm.KVM_ARM_IRQ_TYPE_SPI:
        if vgic is None:
            raise KvmError(errno.ENXIO, "an SPI needs an in-kernel GIC")
        if vm.lines.plain or not vgic.initialized or not arm.VGIC_NR_PRIVATE_IRQS <= number < vgic.nr_irqs:
            vgic.inject_spi(number, bool(level))
        else:
            vm.lines.send_nowait(LineLevel(number, bool(level)))
        return
    vcpu = (irq >> 28) << 8 | irq >> arm.KVM_ARM_IRQ_VCPU_SHIFT & arm.KVM_ARM_IRQ_VCPU_MASK
    if kind == arm.KVM_ARM_IRQ_TYPE_PPI:
        if vgic is None:
            raise KvmError(errno.ENXIO, "a PPI needs an in-kernel GIC")
        vgic.inject_ppi(vcpu, number, bool(level))
        return
    if kind != arm.KVM_ARM_IRQ_TYPE_CPU:
        raise KvmError(errno.EINVAL, f"an interrupt type must be 0 (CPU), 1 (SPI) or 2 (PPI), not {kind}")
    if vgic is not None:
        raise KvmError(errno.ENXIO, "the CPU's own inputs belong to the in-kernel GIC")
    if vcpu >= len(vm.vcpus):
        raise KvmError(errno.EINVAL, f"there is no vCPU {vcpu}")
    if number > arm.KVM_ARM_IRQ_CPU_FIQ:
        raise KvmError(errno.EINVAL, f"a CPU has inputs 0 (IRQ) and 1 (FIQ), not {number}")
    lines = vm.vcpus[vcpu].lines  # type: ignore[attr-defined]
    if number == arm.KVM_ARM_IRQ_CPU_IRQ:
        lines.drive_irq(bool(level))
    else:
        lines.fiq = bool(level)


def irq_line_status(file: VmFile, ptr: Pointer) -> None:
    """KVM_IRQ_LINE_STATUS."""
    status = uapi.KvmIrqLevel.unpack(ptr.read(uapi.KvmIrqLevel.SIZE))
    irq_line(file, status.irq, status.level)
    ptr.write(status.pack())


def signal_msi_call(
    file: VmFile, address_lo: int, address_hi: int, data: int, flags: int, devid: int, _pad: bytes
) -> int:
    """KVM_SIGNAL_MSI."""
    return send_msi(file.vm, address_hi << 32 | address_lo, data, flags, devid)


def _check_vgic(vm: Vm) -> None:
    if not vm.options["host_gic"]:
        raise KvmError(errno.ENXIO, "the host has no GIC that guests can use")


def create_irqchip(file: VmFile, _arg: int) -> None:
    """KVM_CREATE_IRQCHIP: a GICv2, where the host can do it."""
    vm = file.vm
    _check_vgic(vm)
    cls = vm.arch.device_class(uapi.KVM_DEV_TYPE_ARM_VGIC_V2)
    vm.devices.append(cls.create(vm))


def set_device_addr(file: VmFile, device_addr: arm.KvmArmDeviceAddr) -> None:
    """KVM_ARM_SET_DEVICE_ADDR: the old way to place the frames of a GICv2."""
    device = (device_addr.id & arm.KVM_ARM_DEVICE_ID_MASK) >> arm.KVM_ARM_DEVICE_ID_SHIFT
    if device != arm.KVM_ARM_DEVICE_VGIC_V2:
        raise KvmError(errno.ENODEV, f"there is no device {device}")
    _check_vgic(file.vm)
    place = getattr(file.vm.irqchip, "place_legacy", None)
    if place is None:
        raise KvmError(errno.ENODEV, "the VM has no GICv2")
    place(device_addr.id & arm.KVM_ARM_DEVICE_TYPE_MASK, device_addr.addr)


def enable_cap(file: VmFile, cap: uapi.KvmEnableCap) -> None:
    """KVM_ENABLE_CAP."""
    if cap.cap in (uapi.KVM_CAP_ARM_NISV_TO_USER, uapi.KVM_CAP_ARM_SYSTEM_SUSPEND) and not cap.flags:
        file.vm.enabled.add(cap.cap)
    else:
        vm_fd.enable_cap(file, cap)


Arm64.vm_table = (
    Ioctl(requests.KVM_ARM_PREFERRED_TARGET, POINTER, preferred_target),
    Ioctl(requests.KVM_IRQ_LINE, Members(uapi.KvmIrqLevel), irq_line, "api.irq-line"),
    Ioctl(requests.KVM_IRQ_LINE_STATUS, POINTER, irq_line_status, "api.irq-line-status"),
    Ioctl(requests.KVM_SIGNAL_MSI, Members(uapi.KvmMsi), signal_msi_call, "api.signal-msi"),
    Ioctl(requests.KVM_CREATE_IRQCHIP, VALUE, create_irqchip, "api.create-irqchip"),
    Ioctl(requests.KVM_ARM_SET_DEVICE_ADDR, arm.KvmArmDeviceAddr, set_device_addr, "api.arm-set-device-addr"),
    Ioctl(requests.KVM_ENABLE_CAP, uapi.KvmEnableCap, enable_cap, "api.enable-cap"),
)
