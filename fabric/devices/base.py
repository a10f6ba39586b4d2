"""What a device model sees of the machine it is in.

Device models are synchronous Python: they know a clock to read, a memory, an MMIO space, a ledger and the
vCPUs of their VM through the protocols here, and nothing of trio, of file descriptors or of ioctls. The KVM
layer implements them; a test may implement them with a few lines.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fabric.memory import AddressSpace, GuestMemory
    from fabric.trace.ledger import Ledger


class Clock(Protocol):
    """Virtual time as a device reads it."""

    @property
    def now(self) -> int:
        """Nanoseconds since the run began; constant outside a simulation."""
        ...


class IrqEvents(Protocol):
    """What an interrupt controller tells about one interrupt's life. ``None`` stands for "nobody listens".

    ``cpu`` is the vCPU index, ``intid`` the number the guest sees. All times are read from the clock.
    """

    def pending(self, cpu: int, intid: int) -> None:
        """An interrupt became pending at the controller, towards vCPU ``cpu`` (-1: no target)."""

    def coalesced(self, cpu: int, intid: int) -> None:
        """An interrupt was raised that was pending already."""

    def acknowledged(self, cpu: int, intid: int) -> None:
        """The vCPU took the interrupt."""

    def completed(self, cpu: int, intid: int) -> None:
        """The vCPU ended the interrupt (EOI)."""

    def dropped(self, cpu: int, intid: int, reason: str) -> None:
        """A raised interrupt was thrown away for a named reason."""


class VcpuServices(Protocol):
    """A vCPU as a device model sees it."""

    index: int
    """Position in creation order."""
    vcpu_id: int
    """The id given to KVM_CREATE_VCPU."""
    mpidr: int
    """ARM affinity; 0 until KVM_ARM_VCPU_INIT."""
    initialized: bool
    """KVM_ARM_VCPU_INIT was done (always true on architectures without it)."""
    has_run: bool
    """KVM_RUN got past its first-run checks at least once."""
    running: bool
    """A KVM_RUN is under way."""
    cpu_interface: Any
    """The interrupt controller's per-vCPU part, set by the controller; ``None`` without one."""

    def kick(self) -> None:
        """An interrupt became deliverable: wake the vCPU, or make it look."""


class VmServices(Protocol):
    """A VM as a device model sees it."""

    clock: Clock
    memory: GuestMemory
    mmio: AddressSpace
    pio: AddressSpace
    ledger: Ledger
    doorbells: Any
    """The ioeventfds of the MMIO space: ``write(gpa, size, value)`` is true when one took a guest's write."""
    buses: dict[str, Any]
    """The ioeventfds of each address space that has had any, ``"pio"`` the port space, as ``doorbells``."""
    events: IrqEvents | None
    ipa_bits: int
    """Width of the guest physical address space (ARM)."""
    irqchip: Any
    """The in-kernel interrupt controller, or ``None``; set by the controller when it is created."""
    its_list: list[Any]
    """The ITS devices in creation order (ARM); each adds itself, and may come before the GIC does."""
    devices: list[Any]
    """The KVM devices in creation order."""
    enabled: set[int]
    """The capabilities that KVM_ENABLE_CAP has turned on."""
    options: dict[str, Any]
    """Host options of the Kvm (``host_gic``, ``lpi_id_bits``, ...), with defaults filled in."""

    @property
    def vcpus(self) -> Sequence[VcpuServices]:
        """The vCPUs in creation order."""
        ...

    def lock_vcpus(self) -> AbstractContextManager[None]:
        """Hold all vCPUs still; raises KvmError(EBUSY) when one is inside KVM_RUN."""
        ...

    def set_default_routing(self, nr_pins: int) -> None:
        """Install the flat GSI table: GSI n to irqchip 0 pin n."""
        ...

    def gsi_of_pin(self, irqchip: int, pin: int) -> int | None:
        """The GSI that is routed to an input of an in-kernel irqchip; where several are, the last."""
        ...

    def is_open(self, fd: int) -> bool:
        """Whether a number names an open file: a kvm fd, an eventfd, or one of the process."""
        ...

    def on_destroy(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called when the VM goes away."""
        ...
