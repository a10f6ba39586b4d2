"""One test against both: the true /dev/kvm, where there is one, and a simulated host. No guest code is run."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import pytest
from kvm_machine import outcome

from fabric.kvm import Kvm
from fabric.kvm.real import RealKvm
from fabric.kvm.typed import Host
from fabric.uapi import kvm as uapi


@pytest.fixture(params=["simulated", "real"])
def host(request: pytest.FixtureRequest) -> Any:
    if request.param == "simulated":
        return Host(Kvm("aarch64"))
    try:
        return Host(Kvm.real())
    except OSError as error:
        pytest.skip(f"no usable /dev/kvm: {error}")


def test_the_first_calls(host: Host) -> None:
    """API version, a run area of at least a page, and an unknown capability."""
    assert (12, 0) == (host.api_version(), host.check_extension(0xFFFF))
    assert host.mmap_size >= 4096
    host.close()


def test_calls_that_take_no_argument(host: Host) -> None:
    """They refuse one."""
    assert "EINVAL" == outcome(host.ioctl, 0xAE00, 1)
    host.close()


def test_a_vm_and_its_memory(host: Host) -> None:
    """Slots that overlap are EEXIST, what is not aligned EINVAL, a dirty log that is not kept ENOENT."""
    mapping = mmap.mmap(-1, 0x2000)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    with host.create_vm() as vm:
        vm.set_memory(0, 0x10_0000, 0x2000, address)
        answers = [
            outcome(vm.set_memory, 1, 0x10_1000, 0x1000, address),
            outcome(vm.set_memory, 1, 0x20_0000, 0x1800, address),
            outcome(vm.dirty_log, 0, 2),
            outcome(vm.set_memory, 0, 0x10_0000, 0),
        ]

    assert ["EEXIST", "EINVAL", "ENOENT", None] == answers
    host.close()


def test_vcpus_and_their_run_areas(host: Host) -> None:
    """An id is used once; the run area is writable and outlives its fd."""
    vm = host.create_vm()
    vcpu = vm.create_vcpu(0)
    area = vcpu.run_area
    answer = outcome(vm.create_vcpu, 0)
    vcpu.close()
    area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1

    assert ("EEXIST", host.mmap_size) == (answer, len(area))
    assert 1 == area[uapi.KVM_RUN_IMMEDIATE_EXIT]
    vm.close()
    host.close()


def test_eventfds_in_structs(host: Host) -> None:
    """ioeventfds: a width that is none, a file that is no eventfd, one that is, the same again, and its end."""
    event = host.kvm.eventfd()
    deassign = uapi.KVM_IOEVENTFD_FLAG_DEASSIGN
    with host.create_vm() as vm:
        answers = [
            outcome(vm.ioeventfd, event, 0x1000, 3),
            outcome(vm.ioeventfd, vm.fd, 0x1000, 4),
            outcome(vm.ioeventfd, event, 0x1000, 4),
            outcome(vm.ioeventfd, event, 0x1000, 4),
            outcome(vm.ioeventfd, event, 0x1000, 4, flags=deassign),
            outcome(vm.ioeventfd, event, 0x1000, 4, flags=deassign),
            outcome(vm.irqfd, event, 3, deassign=True),
        ]

    assert ["EINVAL", "EINVAL", None, "EEXIST", None, "ENOENT", None] == answers
    host.kvm.close(event)
    host.close()


def test_pointers_of_64_bits(host: Host) -> None:
    """An int argument is an address where the call wants a pointer: a wild one is EFAULT."""
    with host.create_vm() as vm:
        answers = [outcome(vm.ioctl, 0x4020_AE46, address) for address in (8, 1 << 46, (1 << 64) - 8)]

    assert ["EFAULT"] * 3 == answers
    host.close()


def test_no_guest_runs_on_the_true_kvm(tmp_path: Any) -> None:
    """load and run say so; the other methods are system calls on a path."""
    path = tmp_path / "kvm"
    path.touch()
    kvm = RealKvm(str(path))

    with pytest.raises(NotImplementedError, match="simulated"):
        kvm.load(3, None)
    with pytest.raises(NotImplementedError, match="without guests"):
        kvm.run(3).send(None)
    fd = kvm.open()
    assert "ENOTTY" == outcome(kvm.ioctl, fd, 0xAE00)
    kvm.close(fd)
    assert "EBADF" == outcome(os.fstat, fd)
