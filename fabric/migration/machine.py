"""The reference VMM's machines: what a save and a restore have to know of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fabric.kvm.typed import Device, Host, VcpuFd, VmFd
from fabric.migration.arm64_vm import ArmVm
from fabric.vmm.arm64 import Arm64Machine


@contextmanager
def handles(machine: Arm64Machine) -> Iterator[ArmVm]:
    """The machine's fds, and what it told KVM.

    The routes and irqfds of its devices are not in it: a device makes those anew when it goes on in another machine.
    """
    if not isinstance(machine, Arm64Machine):
        raise TypeError(f"an arm64 machine can be saved and restored, not {machine!r}")
    with Host(machine.kvm) as host:
        yield ArmVm(
            host,
            VmFd(host, machine.vm_fd),
            [VcpuFd(host, fd) for fd in machine.vcpu_fds],
            Device(host, machine.gic_fd),
            [Device(host, fd) for fd in machine.its_fds],
            machine.gic_version,
            machine.machine_type(),
            list(range(len(machine.vcpu_fds))),
            [machine.vcpu_init(number) for number in range(len(machine.vcpu_fds))],
            list(machine.slots),
        )
