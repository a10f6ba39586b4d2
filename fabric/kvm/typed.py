"""Objects instead of fds and packed structs, for Python users.

    host = Host(Kvm("aarch64"))
    vm = host.create_vm()
    vcpu = vm.create_vcpu(0)
    vcpu.init()
    gic = vm.create_device(KVM_DEV_TYPE_ARM_VGIC_V3)
    gic.set_attr(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT)

Every method is one ioctl on the same handlers, with the same errnos; ``fd`` of each object is there for calls that
have no method. A :class:`~fabric.kvm.real.RealKvm` may stand in for the simulated one, except for its guests.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Awaitable, Callable, Iterable, Sequence
from sys import byteorder
from typing import Any, Self

from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.codec import CStruct
from fabric.uapi.usermem import SparseMemory
from fabric.vcpu import Guest

Value = int | bytes | CStruct
"""What an attribute or a register takes: an int of up to 64 bits, a struct, or the bytes of one."""


class _Values:
    """A place in user memory for the values that structs point to."""

    SIZE = 1 << 16

    def __init__(self, kvm: Any) -> None:
        self._sparse: SparseMemory | None = None
        memory = getattr(kvm, "user_memory", None)
        if isinstance(memory, SparseMemory):
            self._sparse = memory
            self.addr = memory.map(self.SIZE)
        else:
            self._buffer = ctypes.create_string_buffer(self.SIZE)
            self.addr = ctypes.addressof(self._buffer)

    def put(self, value: Value) -> None:
        """Store a value; an int as 8 bytes."""
        if isinstance(value, int):
            data = (value & (1 << 64) - 1).to_bytes(8, byteorder)
        else:
            data = value.pack() if isinstance(value, CStruct) else value
        if len(data) > self.SIZE:
            raise ValueError(f"a value has at most {self.SIZE} bytes, not {len(data)}")
        if self._sparse is not None:
            self._sparse.write(self.addr, data)
        else:
            ctypes.memmove(self.addr, data, len(data))

    def get(self, size: int) -> bytes:
        """The first ``size`` bytes."""
        return self._sparse.read(self.addr, size) if self._sparse is not None else self._buffer.raw[:size]


class FdObject:
    """Something with an fd; ``close()`` or a ``with`` block closes it."""

    __slots__ = ("fd", "host")

    def __init__(self, host: Host, fd: int) -> None:
        self.host = host
        self.fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the fd."""
        self.host.kvm.close(self.fd)

    def ioctl(self, request: int, arg: Any = 0) -> int:
        """Any ioctl on the fd; a struct goes in as a buffer of its own."""
        if isinstance(arg, CStruct):
            arg = bytearray(arg.pack())
        result: int = self.host.kvm.ioctl(self.fd, request, arg)
        return result


class WithAttributes(FdObject):
    """Something with attributes: a device or a vCPU."""

    __slots__ = ()

    def set_attr(self, group: int, attr: int, value: Value = 0) -> int:
        """KVM_SET_DEVICE_ATTR."""
        self.host.values.put(value)
        return self._attr(requests.KVM_SET_DEVICE_ATTR, group, attr)

    def get_attr(self, group: int, attr: int, size: int = 8, value: Value = 0) -> int:
        """KVM_GET_DEVICE_ATTR of a number of ``size`` bytes; ``value`` is what is there before."""
        return int.from_bytes(self.read_attr(group, attr, size, value), byteorder)

    def read_attr(self, group: int, attr: int, size: int, value: Value = 0) -> bytes:
        """KVM_GET_DEVICE_ATTR of ``size`` bytes."""
        self.host.values.put(bytes(size))
        self.host.values.put(value)
        self._attr(requests.KVM_GET_DEVICE_ATTR, group, attr)
        return self.host.values.get(size)

    def has_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR: whether it succeeds."""
        try:
            self._attr(requests.KVM_HAS_DEVICE_ATTR, group, attr)
        except OSError:
            return False
        return True

    def _attr(self, request: int, group: int, attr: int) -> int:
        return self.ioctl(request, uapi.KvmDeviceAttr(0, group, attr, self.host.values.addr))


class Device(WithAttributes):
    """A KVM device."""

    __slots__ = ()


class VcpuFd(WithAttributes):
    """A vCPU."""

    __slots__ = ()

    def init(self, features: Iterable[int] = (), target: int = arm.KVM_ARM_TARGET_GENERIC_V8) -> None:
        """KVM_ARM_VCPU_INIT with features by number."""
        self.ioctl(requests.KVM_ARM_VCPU_INIT, arm.KvmVcpuInit(target, (sum(1 << n for n in features), *[0] * 6)))

    def get_reg(self, reg: int) -> int:
        """KVM_GET_ONE_REG."""
        self.ioctl(requests.KVM_GET_ONE_REG, uapi.KvmOneReg(reg, self.host.values.addr))
        return int.from_bytes(self.host.values.get(uapi.reg_size(reg)), byteorder)

    def set_reg(self, reg: int, value: int) -> None:
        """KVM_SET_ONE_REG."""
        self.host.values.put(value.to_bytes(uapi.reg_size(reg), byteorder))
        self.ioctl(requests.KVM_SET_ONE_REG, uapi.KvmOneReg(reg, self.host.values.addr))

    def reg_list(self) -> list[int]:
        """KVM_GET_REG_LIST: the ids of all registers."""
        head = uapi.KvmRegList(0)
        try:
            self.ioctl(requests.KVM_GET_REG_LIST, buffer := bytearray(head.pack()))
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
        count = uapi.KvmRegList.unpack(buffer).n
        buffer = bytearray(buffer + bytes(8 * count))
        self.ioctl(requests.KVM_GET_REG_LIST, buffer)
        return list(struct.unpack(f"={count}Q", buffer[8:]))

    @property
    def mp_state(self) -> int:
        """KVM_GET_MP_STATE and KVM_SET_MP_STATE."""
        state = bytearray(uapi.KvmMpState.SIZE)
        self.ioctl(requests.KVM_GET_MP_STATE, state)
        return uapi.KvmMpState.unpack(state).mp_state

    @mp_state.setter
    def mp_state(self, state: int) -> None:
        self.ioctl(requests.KVM_SET_MP_STATE, uapi.KvmMpState(state))

    @property
    def run_area(self) -> memoryview:
        """struct kvm_run."""
        view: memoryview = self.host.kvm.mmap(self.fd, self.host.mmap_size)
        return view

    def load(self, program: Callable[[Any], Awaitable[object]] | Guest) -> None:
        """Give it its guest."""
        self.host.kvm.load(self.fd, program)

    def unload(self) -> Guest | None:
        """Take its guest out."""
        guest: Guest | None = self.host.kvm.unload(self.fd)
        return guest

    async def run(self) -> int:
        """KVM_RUN."""
        result: int = await self.host.kvm.run(self.fd)
        return result


class VmFd(FdObject):
    """A VM."""

    __slots__ = ()

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION of the VM."""
        return self.ioctl(requests.KVM_CHECK_EXTENSION, cap)

    def create_vcpu(self, vcpu_id: int) -> VcpuFd:
        """KVM_CREATE_VCPU."""
        return VcpuFd(self.host, self.ioctl(requests.KVM_CREATE_VCPU, vcpu_id))

    def create_device(self, device_type: int, flags: int = 0) -> Device:
        """KVM_CREATE_DEVICE."""
        device = bytearray(uapi.KvmCreateDevice(device_type, 0, flags).pack())
        self.ioctl(requests.KVM_CREATE_DEVICE, device)
        return Device(self.host, uapi.KvmCreateDevice.unpack(device).fd)

    def set_memory(self, slot: int, gpa: int, size: int, userspace_addr: int = 0, flags: int = 0) -> None:
        """KVM_SET_USER_MEMORY_REGION; size 0 deletes the slot."""
        region = uapi.KvmUserspaceMemoryRegion(slot, flags, gpa, size, userspace_addr)
        self.ioctl(requests.KVM_SET_USER_MEMORY_REGION, region)

    def dirty_log(self, slot: int, pages: int) -> bytes:
        """KVM_GET_DIRTY_LOG of a slot of so many pages: the bitmap."""
        self.ioctl(requests.KVM_GET_DIRTY_LOG, uapi.KvmDirtyLog(slot, 0, self.host.values.addr))
        return self.host.values.get((pages + 63) // 64 * 8)

    def irq_line(self, irq: int, level: int) -> None:
        """KVM_IRQ_LINE."""
        self.ioctl(requests.KVM_IRQ_LINE, uapi.KvmIrqLevel(irq, level))

    def signal_msi(self, address: int, data: int, devid: int | None = None) -> int:
        """KVM_SIGNAL_MSI: above 0 delivered, 0 blocked by the guest."""
        flags = 0 if devid is None else uapi.KVM_MSI_VALID_DEVID
        msi = uapi.KvmMsi(address & 0xFFFF_FFFF, address >> 32, data, flags, devid or 0)
        return self.ioctl(requests.KVM_SIGNAL_MSI, msi)

    def set_routes(self, routes: Sequence[uapi.KvmIrqRoutingEntry]) -> None:
        """KVM_SET_GSI_ROUTING: the whole table."""
        table = uapi.KvmIrqRouting(len(routes)).pack() + b"".join(route.pack() for route in routes)
        self.ioctl(requests.KVM_SET_GSI_ROUTING, bytearray(table))

    def irqfd(self, fd: int, gsi: int, *, resamplefd: int | None = None, deassign: bool = False) -> None:
        """KVM_IRQFD."""
        flags = uapi.KVM_IRQFD_FLAG_DEASSIGN if deassign else 0
        if resamplefd is not None:
            flags |= uapi.KVM_IRQFD_FLAG_RESAMPLE
        self.ioctl(requests.KVM_IRQFD, uapi.KvmIrqfd(int(fd), gsi, flags, int(resamplefd or 0)))

    def ioeventfd(self, fd: int, addr: int, length: int, *, datamatch: int | None = None, flags: int = 0) -> None:
        """KVM_IOEVENTFD; ``flags`` besides DATAMATCH."""
        if datamatch is not None:
            flags |= uapi.KVM_IOEVENTFD_FLAG_DATAMATCH
        self.ioctl(requests.KVM_IOEVENTFD, uapi.KvmIoeventfd(datamatch or 0, addr, length, int(fd), flags))


def pin_route(gsi: int, pin: int, irqchip: int = 0) -> uapi.KvmIrqRoutingEntry:
    """A route to an input of an interrupt controller."""
    to = uapi.KvmIrqRoutingIrqchip(irqchip, pin)
    return uapi.KvmIrqRoutingEntry(gsi, uapi.KVM_IRQ_ROUTING_IRQCHIP, u=to.pack().ljust(32, b"\0"))


def msi_route(gsi: int, address: int, data: int, devid: int | None = None) -> uapi.KvmIrqRoutingEntry:
    """A route to a message."""
    flags = 0 if devid is None else uapi.KVM_MSI_VALID_DEVID
    to = uapi.KvmIrqRoutingMsi(address & 0xFFFF_FFFF, address >> 32, data, devid or 0)
    return uapi.KvmIrqRoutingEntry(gsi, uapi.KVM_IRQ_ROUTING_MSI, flags, u=to.pack().ljust(32, b"\0"))


def sint_route(gsi: int, vcpu: int, sint: int) -> uapi.KvmIrqRoutingEntry:
    """A route to a synthetic interrupt (Hyper-V) of the virtual processor with that index."""
    to = uapi.KvmIrqRoutingHvSint(vcpu, sint)
    return uapi.KvmIrqRoutingEntry(gsi, uapi.KVM_IRQ_ROUTING_HV_SINT, u=to.pack().ljust(32, b"\0"))


class Host(FdObject):
    """/dev/kvm of a Kvm, simulated or real."""

    __slots__ = ("kvm", "mmap_size", "values")

    def __init__(self, kvm: Any) -> None:
        self.kvm = kvm
        self.values = _Values(kvm)
        super().__init__(self, kvm.open())
        self.mmap_size = self.ioctl(requests.KVM_GET_VCPU_MMAP_SIZE)

    def api_version(self) -> int:
        """KVM_GET_API_VERSION."""
        return self.ioctl(requests.KVM_GET_API_VERSION)

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION of the host."""
        return self.ioctl(requests.KVM_CHECK_EXTENSION, cap)

    def create_vm(self, machine_type: int = 0) -> VmFd:
        """KVM_CREATE_VM."""
        return VmFd(self, self.ioctl(requests.KVM_CREATE_VM, machine_type))
