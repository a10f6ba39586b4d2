"""Allocations that fail: the ioctl is ENOMEM, nothing of it has happened, and the next try goes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kvm_machine import Arm, outcome

from fabric.kvm.typed import pin_route
from fabric.uapi import kvm as uapi


def new_vm(machine: Arm) -> Any:
    return machine.host.create_vm()


def new_vcpu(machine: Arm) -> Any:
    return machine.vm.create_vcpu(1)


def new_slot(machine: Arm) -> Any:
    return machine.vm.set_memory(1, 0, 4096, machine.user.map(4096))


def new_log(machine: Arm) -> Any:
    return machine.vm.set_memory(1, 0, 4096, machine.user.map(4096), uapi.KVM_MEM_LOG_DIRTY_PAGES)


def new_table(machine: Arm) -> Any:
    return machine.vm.set_routes([pin_route(3, 5)])


def new_irqfd(machine: Arm) -> Any:
    return machine.vm.irqfd(machine.kvm.eventfd(), 3)


def new_ioeventfd(machine: Arm) -> Any:
    return machine.vm.ioeventfd(machine.kvm.eventfd(), 0x1000, 4)


def new_device(machine: Arm) -> Any:
    return machine.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V3)


def new_vfio(machine: Arm) -> Any:
    return machine.vm.create_device(uapi.KVM_DEV_TYPE_VFIO)


def state(machine: Arm) -> Any:
    """All that the calls above could have changed."""
    vm = machine.inside
    return (
        len(machine.kvm.vms),
        [vcpu.vcpu_id for vcpu in vm.vcpus],
        len(vm.part.vcpus),
        [(slot.slot, slot.base) for slot in vm.memory],
        len(vm.routing),
        len(vm.irqfds),
        len(vm.doorbells),
        list(vm.devices),
        vm.irqchip,
    )


@pytest.mark.parametrize(
    ("call", "allocated"),
    [
        pytest.param(new_vm, "fabric.kvm.system.Vm", marks=pytest.mark.spec("api.create-vm.ENOMEM.alloc")),
        pytest.param(new_vcpu, "fabric.kvm.arm64.Arm64Vcpu", marks=pytest.mark.spec("api.create-vcpu.ENOMEM.alloc")),
        pytest.param(new_vcpu, "fabric.kvm.arm64.ArmVcpuPart", marks=pytest.mark.spec("api.create-vcpu.ENOMEM.alloc")),
        pytest.param(new_vcpu, "fabric.kvm.vm_fd.VcpuFile", marks=pytest.mark.spec("api.create-vcpu.ENOMEM.alloc")),
        pytest.param(
            new_slot, "fabric.memory.MemSlot", marks=pytest.mark.spec("api.set-user-memory-region.ENOMEM.alloc")
        ),
        pytest.param(
            new_log, "fabric.memory.DirtyLog", marks=pytest.mark.spec("api.set-user-memory-region.ENOMEM.alloc")
        ),
        pytest.param(
            new_table, "fabric.kvm.vm_fd.RoutingTable.build", marks=pytest.mark.spec("api.set-gsi-routing.ENOMEM.alloc")
        ),
        pytest.param(new_irqfd, "fabric.kvm.irqfd.Irqfd", marks=pytest.mark.spec("api.irqfd.ENOMEM.alloc")),
        pytest.param(
            new_ioeventfd, "fabric.kvm.ioeventfd.Ioeventfd", marks=pytest.mark.spec("api.ioeventfd.ENOMEM.alloc")
        ),
        pytest.param(
            new_device,
            "fabric.devices.arm.vgic_v3.VgicV3.__init__",
            marks=pytest.mark.spec("api.create-device.ENOMEM.alloc"),
        ),
        pytest.param(new_vfio, "fabric.devices.vfio.Vfio.__init__", marks=pytest.mark.spec("vfio.create.ENOMEM.alloc")),
    ],
)
def test_an_allocation_that_fails(call: Callable[[Arm], Any], allocated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM and the state before; with memory the same call succeeds."""
    machine = Arm(gic=call not in (new_device, new_vcpu))
    before = state(machine)
    with monkeypatch.context() as patch:
        patch.setattr(allocated, fail)
        assert "ENOMEM" == outcome(call, machine)
    assert before == state(machine)

    call(machine)
    assert before != state(machine)


def fail(*_: Any, **__: Any) -> Any:
    raise MemoryError
