"""The KVM-VFIO device: tells KVM which VFIO groups a VM uses.

One per VM, gone when its fd is closed. A simulated host has no VFIO groups, so that no file is ever one: the
device can be created, and answers as a host's does to files that are no groups.

Specification: KVM VFIO device document of Linux 6.1, which lists no errors; they are the kernel's.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar, Self

from fabric.devices.attributes import Attr, AttrTable, Group, Pointer
from fabric.errors import KvmError

if TYPE_CHECKING:
    from fabric.devices.base import VmServices

KVM_DEV_VFIO_GROUP = 1
KVM_DEV_VFIO_GROUP_ADD = 1
KVM_DEV_VFIO_GROUP_DEL = 2


class Vfio:
    """The link between a VM and its VFIO groups. It has two attributes, which are written; any other is ENXIO, and
    there is no way to read (vfio.any)."""

    attributes: ClassVar[AttrTable]
    released_on_close: ClassVar[bool] = True
    """The device goes with its fd, not with the VM."""

    def __init__(self, vm: VmServices) -> None:
        self.vm = vm

    @classmethod
    def supported(cls, options: dict[str, Any]) -> bool:
        """Every host has it."""
        return True

    @classmethod
    def create(cls, vm: VmServices) -> Self:
        """KVM_CREATE_DEVICE. KvmError(EBUSY) when the VM has one, where the generic document says EEXIST."""
        if any(isinstance(device, cls) for device in vm.devices):
            raise KvmError(errno.EBUSY, "the VM has a VFIO device already")
        return cls(vm)

    def destroy(self) -> None:
        """Its fd was closed."""


def _open_file(vfio: Vfio, ptr: Pointer) -> int:
    """The fd that a value names. KvmError(EFAULT, EBADF)."""
    fd = ptr.u32()
    if not vfio.vm.is_open(fd):
        raise KvmError(errno.EBADF, f"{fd} is not an open file")
    return fd


def _add(vfio: Vfio, _attr: int, ptr: Pointer) -> None:
    raise KvmError(errno.EINVAL, f"{_open_file(vfio, ptr)} is not a VFIO group")


def _remove(vfio: Vfio, _attr: int, ptr: Pointer) -> None:
    raise KvmError(errno.ENOENT, f"{_open_file(vfio, ptr)} is not a group of this VM")


Vfio.attributes = AttrTable(
    (
        Group(
            KVM_DEV_VFIO_GROUP,
            "KVM_DEV_VFIO_GROUP",
            (
                Attr(
                    "vfio.group.add",
                    "KVM_DEV_VFIO_GROUP_ADD",
                    number=KVM_DEV_VFIO_GROUP_ADD,
                    type="s32",
                    set=_add,
                    errors=(errno.EFAULT, errno.EBADF, errno.EINVAL),
                ),
                Attr(
                    "vfio.group.del",
                    "KVM_DEV_VFIO_GROUP_DEL",
                    number=KVM_DEV_VFIO_GROUP_DEL,
                    type="s32",
                    set=_remove,
                    errors=(errno.EFAULT, errno.EBADF, errno.ENOENT),
                ),
            ),
        ),
    ),
    # Of any attribute, known or not.
    unknown_get=errno.EPERM,
)
