"""x86 vCPU fds: registers, MSRs, CPUID, events, MP state."""

from __future__ import annotations

from collections.abc import Callable

from fabric.kvm.dispatch import Ioctl
from fabric.kvm.vm import VmFile
from fabric.uapi.kvm import KvmEnableCap

VM_TABLE: tuple[Ioctl, ...] = ()
VCPU_TABLE: tuple[Ioctl, ...] = ()
ENABLE_CAP: dict[int, Callable[[VmFile, KvmEnableCap], None]] = {}
"""Capabilities of the VM fd that KVM_ENABLE_CAP turns on, and what does it."""
