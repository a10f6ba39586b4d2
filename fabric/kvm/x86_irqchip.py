"""The in-kernel irqchip of x86 VMs: creation, state of PIC and IOAPIC, interrupt lines and routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fabric.kvm.dispatch import Ioctl
from fabric.uapi.kvm import KvmEnableCap

if TYPE_CHECKING:
    from fabric.channel import LineLevel
    from fabric.kvm.routing import Route
    from fabric.kvm.vm import Vm, VmFile

VM_TABLE: tuple[Ioctl, ...] = ()
VCPU_TABLE: tuple[Ioctl, ...] = ()
ENABLE_CAP: dict[int, Callable[[VmFile, KvmEnableCap], None]] = {}
"""Capabilities of the VM fd that KVM_ENABLE_CAP turns on, and what does it."""


def ready(vm: Vm) -> bool:
    """Whether the VM has an in-kernel irqchip, whole or split."""
    return vm.irqchip is not None


def check_route(route: Route) -> None:
    """KvmError(EINVAL) for a route that x86 does not have."""
    raise NotImplementedError


def set_irq(vm: Vm, route: Route, level: bool) -> int:
    """Drive the far end of a route; negative: ignored, 0: merged, above: vCPUs reached."""
    raise NotImplementedError


def injector(vm: Vm, routes: tuple[Route, ...]) -> Callable[[], object]:
    """A function for what a signal of an irqfd with these routes does."""
    raise NotImplementedError


def deliver_line(vm: Vm, event: LineLevel) -> None:
    """The end of the VM's line channel."""
    raise NotImplementedError
