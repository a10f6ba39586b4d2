"""The VM fd: the ioctls that all architectures have.

Rules and errnos: api.* of the interface inventory, by the name of the call; the checks stand in its order.
"""

from __future__ import annotations

import errno

from fabric.errors import KvmError
from fabric.kvm.dirty_ring import DirtyRings
from fabric.kvm.dispatch import POINTER, VALUE, Ioctl, Members, Pointer
from fabric.kvm.routing import RoutingTable
from fabric.kvm.vm import CCW_BUS, MMIO_BUS, PIO_BUS, DeviceFile, VcpuFile, Vm, VmFile
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

_IRQFD_FLAGS = uapi.KVM_IRQFD_FLAG_DEASSIGN | uapi.KVM_IRQFD_FLAG_RESAMPLE
_IOEVENTFD_FLAGS = (
    uapi.KVM_IOEVENTFD_FLAG_DATAMATCH
    | uapi.KVM_IOEVENTFD_FLAG_PIO
    | uapi.KVM_IOEVENTFD_FLAG_DEASSIGN
    | uapi.KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY
)
_DIRTY_RINGS = (uapi.KVM_CAP_DIRTY_LOG_RING, uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL)


def check_extension(file: VmFile, cap: int) -> int:
    """KVM_CHECK_EXTENSION of a VM."""
    return file.kvm.arch.capability(cap, file.vm)


def create_vcpu(file: VmFile, vcpu_id: int) -> int:
    """KVM_CREATE_VCPU."""
    vm, arch = file.vm, file.vm.arch
    vcpu_id &= 0xFFFF_FFFF
    if vcpu_id >= arch.max_vcpu_ids:
        raise KvmError(errno.EINVAL, f"a vCPU id must be below {arch.max_vcpu_ids}, not {vcpu_id}")
    if len(vm.vcpus) >= arch.max_vcpus:
        raise KvmError(errno.EINVAL, f"a VM has at most {arch.max_vcpus} vCPUs")
    arch.check_new_vcpu(vm, vcpu_id)
    if any(vcpu.vcpu_id == vcpu_id for vcpu in vm.vcpus):
        raise KvmError(errno.EEXIST, f"there is a vCPU with id {vcpu_id}")
    vcpu, part = arch.new_vcpu(vm, vcpu_id, len(vm.vcpus))
    created = VcpuFile(file.kvm, file.kvm.tables["vcpu"], vm, vcpu, part)
    vm.add_vcpu(vcpu)
    arch.vcpu_created(created)
    return file.kvm.install(created)


def set_user_memory_region(file: VmFile, region: uapi.KvmUserspaceMemoryRegion) -> None:
    """KVM_SET_USER_MEMORY_REGION."""
    file.vm.memory.set_region(region)


def _check_bitmaps(vm: Vm) -> None:
    """ENXIO when the VM has dirty rings."""
    if vm.rings is not None:
        raise KvmError(errno.ENXIO, "the VM has dirty rings and no dirty bitmaps")


def get_dirty_log(file: VmFile, slot: int, _pad: int, address: int) -> None:
    """KVM_GET_DIRTY_LOG."""
    _check_bitmaps(file.vm)
    bitmap = file.vm.memory.dirty_log(slot)
    file.kvm.user_memory.write(address, bitmap)


def clear_dirty_log(file: VmFile, slot: int, num_pages: int, first_page: int, address: int) -> None:
    """KVM_CLEAR_DIRTY_LOG."""
    _check_bitmaps(file.vm)
    read = file.kvm.user_memory.read
    file.vm.memory.clear_dirty_log(slot, first_page, num_pages, lambda size: read(address, size))


def reset_dirty_rings(file: VmFile, _arg: int) -> int:
    """KVM_RESET_DIRTY_RINGS: the number of entries taken back."""
    if file.vm.rings is None:
        raise KvmError(errno.EINVAL, "the VM has no dirty rings")
    return file.vm.rings.reset()


def enable_cap(file: VmFile, cap: uapi.KvmEnableCap) -> None:
    """KVM_ENABLE_CAP of capabilities that all architectures have."""
    if cap.flags:
        raise KvmError(errno.EINVAL, f"flags must be 0, not {cap.flags:#x}")
    if cap.cap == uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
        options = cap.args[0]
        manual = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
        # A log that starts all set makes sense with manual protection only.
        allowed = manual | (uapi.KVM_DIRTY_LOG_INITIALLY_SET if options & manual else 0)
        if options & ~allowed:
            raise KvmError(errno.EINVAL, f"options of the dirty log must be in {allowed:#x}, not {options:#x}")
        file.vm.memory.log_options = options
        return
    if cap.cap in _DIRTY_RINGS and file.vm.arch.capability(cap.cap, file.vm):
        if file.vm.rings is not None:
            raise KvmError(errno.EINVAL, "the VM has dirty rings already")
        file.vm.rings = DirtyRings(file.vm, cap.args[0])
        return
    if cap.cap == uapi.KVM_CAP_HALT_POLL and not cap.args[0] >> 32:
        return  # how long the host polls is not modelled
    raise KvmError(errno.EINVAL, f"capability {cap.cap} cannot be enabled on a VM")


def create_device(file: VmFile, ptr: Pointer) -> None:
    """KVM_CREATE_DEVICE."""
    wanted = uapi.KvmCreateDevice.unpack(ptr.read(uapi.KvmCreateDevice.SIZE))
    cls = file.vm.arch.device_class(wanted.type)
    if wanted.flags & uapi.KVM_CREATE_DEVICE_TEST:
        return
    device = cls.create(file.vm)
    file.vm.devices.append(device)
    number = file.kvm.install(DeviceFile(file.kvm, file.kvm.tables["device"], file.vm, device))
    ptr.write(uapi.KvmCreateDevice(wanted.type, number, wanted.flags).pack())


def set_gsi_routing(file: VmFile, ptr: Pointer) -> None:
    """KVM_SET_GSI_ROUTING."""
    head = uapi.KvmIrqRouting.unpack(ptr.read(uapi.KvmIrqRouting.SIZE))
    vm = file.vm
    if not vm.arch.routing_allowed(vm):
        raise KvmError(errno.EINVAL, "the VM has no in-kernel irqchip to route to")
    if head.nr > uapi.KVM_MAX_IRQ_ROUTES:
        raise KvmError(errno.EINVAL, f"a table has at most {uapi.KVM_MAX_IRQ_ROUTES} routes, not {head.nr}")
    if head.flags:
        raise KvmError(errno.EINVAL, f"flags must be 0, not {head.flags:#x}")
    size = head.nr * uapi.KvmIrqRoutingEntry.SIZE
    entries = ptr.read(size, uapi.KvmIrqRouting.SIZE) if size else b""
    vm.set_routing(RoutingTable.build(vm, entries, vm.routing))


def irqfd(file: VmFile, fd: int, gsi: int, flags: int, resamplefd: int, _pad: bytes) -> None:
    """KVM_IRQFD."""
    vm, kvm = file.vm, file.kvm
    if flags & ~_IRQFD_FLAGS:
        raise KvmError(errno.EINVAL, f"flags must be in {_IRQFD_FLAGS:#x}, not {flags:#x}")
    if flags & uapi.KVM_IRQFD_FLAG_DEASSIGN:
        vm.irqfds.deassign(kvm.event(fd), gsi)
        return
    if not vm.arch.irqfd_ready(vm):
        raise KvmError(errno.EAGAIN, "the interrupt controller is not initialised")
    if flags & uapi.KVM_IRQFD_FLAG_RESAMPLE:
        vm.arch.check_resampler(vm)
    event = kvm.event(fd)
    resample = kvm.event(resamplefd) if flags & uapi.KVM_IRQFD_FLAG_RESAMPLE else None
    vm.irqfds.assign(event, gsi, resample)


def ioeventfd(file: VmFile, datamatch: int, addr: int, length: int, fd: int, flags: int, _pad: bytes) -> None:
    """KVM_IOEVENTFD."""
    if flags & uapi.KVM_IOEVENTFD_FLAG_PIO:
        bus = file.vm.bus(PIO_BUS)
    elif flags & uapi.KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY:
        bus = file.vm.bus(CCW_BUS)
    else:
        bus = file.vm.bus(MMIO_BUS)
    match = datamatch if flags & uapi.KVM_IOEVENTFD_FLAG_DATAMATCH else None
    if flags & uapi.KVM_IOEVENTFD_FLAG_DEASSIGN:
        bus.deassign(file.kvm.event(fd), addr, length, match)
        return
    if length not in (0, 1, 2, 4, 8):
        raise KvmError(errno.EINVAL, f"the length must be 0, 1, 2, 4 or 8, not {length}")
    if addr + length >> 64:
        raise KvmError(errno.EINVAL, f"{addr:#x} plus {length} wraps")
    if flags & ~_IOEVENTFD_FLAGS:
        raise KvmError(errno.EINVAL, f"flags must be in {_IOEVENTFD_FLAGS:#x}, not {flags:#x}")
    if not length and match is not None:
        raise KvmError(errno.EINVAL, "a write of any length cannot be matched by value")
    bus.assign(file.kvm.event(fd), addr, length, match)


TABLE = (
    Ioctl(requests.KVM_CHECK_EXTENSION, VALUE, check_extension, "api.check-extension"),
    Ioctl(requests.KVM_CREATE_VCPU, VALUE, create_vcpu, "api.create-vcpu"),
    Ioctl(
        requests.KVM_SET_USER_MEMORY_REGION,
        uapi.KvmUserspaceMemoryRegion,
        set_user_memory_region,
        "api.set-user-memory-region",
    ),
    Ioctl(requests.KVM_GET_DIRTY_LOG, Members(uapi.KvmDirtyLog), get_dirty_log, "api.get-dirty-log"),
    Ioctl(requests.KVM_CLEAR_DIRTY_LOG, Members(uapi.KvmClearDirtyLog), clear_dirty_log),
    Ioctl(requests.KVM_RESET_DIRTY_RINGS, VALUE, reset_dirty_rings),
    Ioctl(requests.KVM_ENABLE_CAP, uapi.KvmEnableCap, enable_cap, "api.enable-cap"),
    Ioctl(requests.KVM_CREATE_DEVICE, POINTER, create_device, "api.create-device"),
    Ioctl(requests.KVM_SET_GSI_ROUTING, POINTER, set_gsi_routing, "api.set-gsi-routing"),
    Ioctl(requests.KVM_IRQFD, Members(uapi.KvmIrqfd), irqfd, "api.irqfd"),
    Ioctl(requests.KVM_IOEVENTFD, Members(uapi.KvmIoeventfd), ioeventfd, "api.ioeventfd"),
)
