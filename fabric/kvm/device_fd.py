"""Device fds: attributes. vCPU fds use the same three handlers where the architecture has vCPU attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric.errors import KvmError
from fabric.kvm.dispatch import POINTER, Ioctl, Members, Pointer
from fabric.uapi import ioctl as requests
from fabric.uapi.kvm import KvmDeviceAttr
from fabric.uapi.usermem import UserPointer

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric.devices.attributes import Op
    from fabric.kvm.fds import File
    from fabric.kvm.vm import DeviceFile


def attribute_table(owner: Callable[[Any], Any]) -> tuple[Ioctl, ...]:
    """KVM_SET/GET/HAS_DEVICE_ATTR on the files for which ``owner(file)`` has the attributes."""

    def access(op: Op) -> Callable[..., int]:
        def handler(file: File, _flags: int, group: int, attr: int, addr: int) -> int:
            # No flags are defined, and no kernel looks at the field.
            target = owner(file)
            result: int = target.attributes.dispatch(target, op, group, attr, UserPointer(file.kvm.user_memory, addr))
            return result

        return handler

    return (
        Ioctl(requests.KVM_SET_DEVICE_ATTR, Members(KvmDeviceAttr), access("set"), "api.set-device-attr"),
        Ioctl(requests.KVM_GET_DEVICE_ATTR, Members(KvmDeviceAttr), access("get"), "api.get-device-attr"),
        Ioctl(requests.KVM_HAS_DEVICE_ATTR, Members(KvmDeviceAttr), access("has"), "api.has-device-attr"),
    )


def get_device_attr(file: DeviceFile, ptr: Pointer) -> int:
    """KVM_GET_DEVICE_ATTR of a device. One that has nothing to get is EPERM before the argument is looked at."""
    table = file.device.attributes
    if not any(row.get for _, row in table.rows()):
        raise KvmError(table.unknown["get"], "the device has no attribute that can be read")
    attr = KvmDeviceAttr.unpack(ptr.read(KvmDeviceAttr.SIZE))
    target = UserPointer(file.kvm.user_memory, attr.addr)
    return int(table.dispatch(file.device, "get", attr.group, attr.attr, target))


def _device_table() -> tuple[Ioctl, ...]:
    return tuple(
        Ioctl(row.request, POINTER, get_device_attr, row.id) if row.request == requests.KVM_GET_DEVICE_ATTR else row
        for row in attribute_table(lambda file: file.device)
    )


TABLE = _device_table()
