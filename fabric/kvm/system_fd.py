"""The system fd, /dev/kvm: API version, capabilities, and KVM_CREATE_VM."""

from __future__ import annotations

import errno

from fabric.errors import KvmError
from fabric.kvm.dispatch import VALUE, Ioctl
from fabric.kvm.fds import File
from fabric.kvm.vm import VmFile
from fabric.uapi import ioctl as requests
from fabric.uapi.kvm import KVM_API_VERSION


class SystemFile(File):
    """A system fd."""

    __slots__ = ()

    kind = "system"
    unknown_request = errno.EINVAL


def get_api_version(_file: SystemFile, arg: int) -> int:
    """KVM_GET_API_VERSION."""
    no_argument(arg)
    return KVM_API_VERSION


def get_vcpu_mmap_size(file: SystemFile, arg: int) -> int:
    """KVM_GET_VCPU_MMAP_SIZE."""
    no_argument(arg)
    return file.kvm.arch.mmap_size


def check_extension(file: SystemFile, cap: int) -> int:
    """KVM_CHECK_EXTENSION of the host."""
    return file.kvm.arch.capability(cap, None)


def create_vm(file: SystemFile, machine_type: int) -> int:
    """KVM_CREATE_VM."""
    kvm = file.kvm
    return kvm.install(VmFile(kvm, kvm.tables["vm"], kvm.new_vm(machine_type)))


def no_argument(arg: int) -> None:
    """EINVAL for a call that takes no argument and got one."""
    if arg:
        raise KvmError(errno.EINVAL, f"the argument must be 0, not {arg:#x}")


TABLE = (
    Ioctl(requests.KVM_GET_API_VERSION, VALUE, get_api_version, "api.get-api-version"),
    Ioctl(requests.KVM_GET_VCPU_MMAP_SIZE, VALUE, get_vcpu_mmap_size, "api.get-vcpu-mmap-size"),
    Ioctl(requests.KVM_CHECK_EXTENSION, VALUE, check_extension, "api.check-extension"),
    Ioctl(requests.KVM_CREATE_VM, VALUE, create_vm, "api.create-vm"),
)
