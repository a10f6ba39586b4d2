"""Local APICs of x86 VMs: their state, KVM_SIGNAL_MSI, KVM_CAP_X2APIC_API."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fabric.kvm.dispatch import Ioctl
from fabric.uapi.kvm import KvmEnableCap

if TYPE_CHECKING:
    from fabric.channel import Msi
    from fabric.kvm.vm import Vm, VmFile

VM_TABLE: tuple[Ioctl, ...] = ()
VCPU_TABLE: tuple[Ioctl, ...] = ()
ENABLE_CAP: dict[int, Callable[[VmFile, KvmEnableCap], None]] = {}
"""Capabilities of the VM fd that KVM_ENABLE_CAP turns on, and what does it."""


def deliver_msi(vm: Vm, msi: Msi) -> int:
    """The end of the VM's message channel."""
    raise NotImplementedError
