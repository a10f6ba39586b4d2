"""What differs between the architectures of the KVM layer.

The generic modules know fds, memory slots, routes and eventfds; an :class:`Architecture` knows capabilities,
machine types, what a vCPU is, and how a route reaches the interrupt controllers.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fabric.errors import KvmError
from fabric.uapi import kvm as uapi

if TYPE_CHECKING:
    from fabric.channel import LineLevel, Msi
    from fabric.kvm.dispatch import Ioctl
    from fabric.kvm.routing import Route
    from fabric.kvm.system import Kvm
    from fabric.kvm.vm import VcpuFile, Vm

GENERIC_CAPABILITIES: dict[int, int] = {
    uapi.KVM_CAP_USER_MEMORY: 1,
    uapi.KVM_CAP_DESTROY_MEMORY_REGION_WORKS: 1,
    uapi.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: 1,
    uapi.KVM_CAP_COALESCED_MMIO: 1,
    uapi.KVM_CAP_COALESCED_PIO: 1,
    uapi.KVM_CAP_INTERNAL_ERROR_DATA: 1,
    uapi.KVM_CAP_IRQ_ROUTING: uapi.KVM_MAX_IRQ_ROUTES,
    uapi.KVM_CAP_IRQFD: 1,
    uapi.KVM_CAP_IRQFD_RESAMPLE: 1,
    uapi.KVM_CAP_SIGNAL_MSI: 1,
    uapi.KVM_CAP_IOEVENTFD_ANY_LENGTH: 1,
    uapi.KVM_CAP_ENABLE_CAP_VM: 1,
    uapi.KVM_CAP_CHECK_EXTENSION_VM: 1,
    uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: (
        uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | uapi.KVM_DIRTY_LOG_INITIALLY_SET
    ),
    uapi.KVM_CAP_HALT_POLL: 1,
    uapi.KVM_CAP_BINARY_STATS_FD: 1,
    uapi.KVM_CAP_SYSTEM_EVENT_DATA: 1,
}
"""Capabilities of every architecture with in-kernel irq routing and eventfds, and what they read as."""


class Architecture(ABC):
    """One architecture's KVM on one host. A Kvm makes its own from the host options."""

    name: ClassVar[str]
    defaults: ClassVar[dict[str, Any]]
    """Host options and what they are without being given."""
    system_table: ClassVar[Sequence[Ioctl]] = ()
    vm_table: ClassVar[Sequence[Ioctl]] = ()
    vcpu_table: ClassVar[Sequence[Ioctl]] = ()
    unknown_request: ClassVar[int] = errno.ENOTTY
    """The errno of a VM fd for a request that it does not know."""
    vcpu_unknown_request: ClassVar[int] = errno.EINVAL
    """The errno of a vCPU fd for a request that it does not know."""
    mmap_size: ClassVar[int]
    """KVM_GET_VCPU_MMAP_SIZE: struct kvm_run and what else is shared, in whole pages."""
    max_vcpu_ids: ClassVar[int]
    max_vcpus: ClassVar[int]
    gpa_errno: ClassVar[int] = errno.EINVAL
    """What a memory slot beyond the guest's addresses gets."""
    address_spaces: int = 1
    """Of memory slots (KVM_CAP_MULTI_ADDRESS_SPACE)."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    # -- machines

    @abstractmethod
    def capability(self, cap: int, vm: Vm | None) -> int:
        """KVM_CHECK_EXTENSION on the system fd (``vm`` None) or a VM fd; 0 for what is not there."""

    @abstractmethod
    def address_bits(self, machine_type: int) -> int:
        """Width of guest physical addresses of a machine type. KvmError(EINVAL) for a type there is not."""

    @abstractmethod
    def new_part(self, vm: Vm) -> Any:
        """What this architecture keeps for a VM, as ``vm.part``."""

    @abstractmethod
    def device_class(self, device_type: int) -> Any:
        """The class of a KVM_DEV_TYPE_*. KvmError(ENODEV) for a type that this host does not have."""

    # -- vCPUs

    @abstractmethod
    def check_new_vcpu(self, vm: Vm, vcpu_id: int) -> None:
        """Whether KVM_CREATE_VCPU may go ahead, besides the limits that all architectures have."""

    @abstractmethod
    def new_vcpu(self, vm: Vm, vcpu_id: int, index: int) -> tuple[Any, Any]:
        """A vCPU, and what this architecture keeps for it, as ``part`` of its file."""

    @abstractmethod
    def vcpu_created(self, file: VcpuFile) -> None:
        """The vCPU is in ``vm.vcpus`` now."""

    @abstractmethod
    def first_run(self, file: VcpuFile) -> None:
        """The checks of the first KVM_RUN of a vCPU; afterwards ``vcpu.has_run`` is true."""

    # -- interrupts

    @abstractmethod
    def irqfd_ready(self, vm: Vm) -> bool:
        """Whether KVM_IRQFD can assign: the interrupt controller is there and initialised."""

    def check_resampler(self, vm: Vm) -> None:  # noqa: B027  # where irqfds can be, they can have one, on most
        """KvmError(EINVAL) where irqfds cannot have resamplers."""

    def routing_allowed(self, vm: Vm) -> bool:
        """Whether KVM_SET_GSI_ROUTING may be called."""
        return True

    def rerouted(self, vm: Vm) -> None:  # noqa: B027  # nothing follows from it on most
        """The VM has another routing table."""

    @abstractmethod
    def check_route(self, vm: Vm, route: Route) -> None:
        """KvmError(EINVAL) for a route that this architecture, or the irqchip of this VM, does not have."""

    @abstractmethod
    def set_irq(self, vm: Vm, route: Route, level: bool, resample: bool = False) -> int:
        """Drive the far end of a route; negative: ignored, 0: merged, above: vCPUs reached. KvmError.

        The outcome is what KVM_IRQ_LINE_STATUS reports where it goes by routes (api.irq-line-status.rule.status).
        ``resample``: the line of the resample irqfds, which is another one where lines have several drivers.
        """

    @abstractmethod
    def injector(self, vm: Vm, routes: tuple[Route, ...], resample: bool) -> Callable[[], object]:
        """A function for what a signal of an irqfd with these routes does; it may raise KvmError.

        ``resample``: the irqfd has a resampler, so that the line stays up until the interrupt ends.
        """

    def gsi_told(self, vm: Vm, route: Route) -> int | None:
        """The GSI whose resample irqfds learn of the end of interrupts at the far end of ``route``."""
        return None

    def on_end(self, vm: Vm, route: Route, ended: Callable[[], None]) -> Callable[[], None]:
        """Have ``ended`` called when the guest ends an interrupt that came by ``route``; returns what undoes it."""
        raise KvmError(errno.EINVAL, f"{self.name} has no resampling")

    @abstractmethod
    def deliver_msi(self, vm: Vm, msi: Msi) -> int:
        """The end of the VM's message channel."""

    @abstractmethod
    def deliver_line(self, vm: Vm, event: LineLevel) -> None:
        """The end of the VM's line channel."""


GENERIC_OPTIONS: dict[str, Any] = {
    "io_bus_devices": 1000,
}
"""Options of every host: how many in-kernel devices fit on a VM's MMIO or port bus (Linux: NR_IOBUS_DEVS)."""


def fill_options(arch: type[Architecture], given: dict[str, Any]) -> dict[str, Any]:
    """The host options with defaults. TypeError for one that the architecture does not have."""
    defaults = {**GENERIC_OPTIONS, **arch.defaults}
    for name in given:
        if name not in defaults:
            known = ", ".join(sorted(defaults))
            raise TypeError(f"a host option of {arch.name} must be one of {known}, not {name!r}")
    return {**defaults, **given}


def describe(kvm: Kvm) -> str:
    """One line for messages: architecture and the options that are not defaults."""
    arch = kvm.arch
    defaults = {**GENERIC_OPTIONS, **arch.defaults}
    given = [f"{k}={v!r}" for k, v in arch.options.items() if v != defaults[k]]
    return ", ".join([repr(arch.name), *given])
