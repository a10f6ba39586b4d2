"""The KVM layer: the kernel's side of /dev/kvm, simulated.

``Kvm("aarch64")`` is a host; its ``open``, ``ioctl``, ``mmap`` and ``close`` are the system calls, ``await run`` is
KVM_RUN.
"""

from __future__ import annotations

from fabric.kvm.eventfd import EventFd
from fabric.kvm.system import Kvm

__all__ = ["EventFd", "Kvm"]
