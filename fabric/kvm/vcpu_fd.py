"""The vCPU fd: the ioctls that all architectures have.

vCPU ioctls of one vCPU exclude each other. In the kernel a second caller sleeps until the first is through, and
may be interrupted by a signal; here ioctls do not sleep, so that a call during KVM_RUN is EINTR at once.
"""

from __future__ import annotations

import errno

from fabric.errors import KvmError
from fabric.kvm.dispatch import VALUE, Ioctl
from fabric.kvm.system_fd import no_argument
from fabric.kvm.vm import VcpuFile
from fabric.uapi import ioctl as requests


def idle(file: VcpuFile) -> None:
    """What each call on a vCPU fd asks for first: that no KVM_RUN is under way (api.all.vcpu-busy)."""
    if file.vcpu.running:
        raise KvmError(errno.EINTR, f"vCPU {file.vcpu.vcpu_id} is inside KVM_RUN, and this call does not wait")


def run(file: VcpuFile, arg: int) -> int:
    """KVM_RUN as far as it takes no time: the first-run checks, and immediate_exit.

    A guest takes virtual time to run: that is ``await kvm.run(fd)``.
    """
    no_argument(arg)
    vcpu = file.vcpu
    if not vcpu.has_run:
        file.kvm.arch.first_run(file)
    if not file.immediate_exit:
        raise KvmError(
            errno.ENOSYS,
            "KVM_RUN takes time, which a plain call cannot: inside a simulation use `await kvm.run(fd)`",
        )
    if vcpu.engine is not None:
        vcpu.run().send(None)  # completes an exit as well; it raises before it first waits
    vcpu.leave_at_once()


TABLE = (Ioctl(requests.KVM_RUN, VALUE, run, "api.run"),)
