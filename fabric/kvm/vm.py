"""A VM: what its fds share, and the ioctls of the VM fd that every architecture has.

A :class:`Vm` is what devices see of their machine (:class:`~fabric.devices.base.VmServices`). It lives as long as
one of its fds is open: VM, vCPU or device. A VM that failed in a way the kernel does not recover from is *dead*:
every later call on any of its fds is EIO.

Rules: api.* of the interface inventory, by the name of the call.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from fabric.channel import Channel, Doorbell, LineLevel, Msi
from fabric.errors import KvmError
from fabric.kvm.dirty_ring import DirtyRing, DirtyRings
from fabric.kvm.dispatch import Handlers
from fabric.kvm.fds import VmPart
from fabric.kvm.ioeventfd import Doorbells
from fabric.kvm.irqfd import Irqfds
from fabric.kvm.routing import RoutingTable
from fabric.memory import AddressSpace, GuestMemory
from fabric.trace.ledger import Ledger
from fabric.uapi.kvm import KVM_DIRTY_LOG_PAGE_OFFSET, KVM_EXIT_DIRTY_RING_FULL, KVM_RUN_IMMEDIATE_EXIT, PAGE_SIZE
from fabric.vcpu.exits import set_exit_reason

if TYPE_CHECKING:
    from fabric.clock import Engine
    from fabric.devices.base import Clock, IrqEvents
    from fabric.kvm.system import Kvm
    from fabric.vcpu import Vcpu

MMIO_BUS, PIO_BUS, CCW_BUS = "mmio", "pio", "ccw"


class Vm:
    """One virtual machine.

    Attributes besides those of :class:`~fabric.devices.base.VmServices`:

    - ``arch`` and ``part``: the architecture, and what it keeps for this VM;
    - ``routing``, ``irqfds``, ``doorbells``: GSI routes, irqfds and (MMIO) ioeventfds;
    - ``msis``, ``lines``: channels from devices, irqfds and ioctls to the interrupt controller. A fault put on
      one of them hits what passes from then on;
    - ``devices``: in creation order.
    """

    __slots__ = (
        "_callbacks",
        "_files",
        "_vcpus",
        "arch",
        "buses",
        "clock",
        "dead",
        "devices",
        "doorbells",
        "enabled",
        "engine",
        "events",
        "ipa_bits",
        "irqchip",
        "irqfds",
        "its_list",
        "kvm",
        "ledger",
        "lines",
        "memory",
        "mmio",
        "msis",
        "name",
        "options",
        "part",
        "pio",
        "rings",
        "routing",
    )

    def __init__(self, kvm: Kvm, machine_type: int, name: str) -> None:
        arch = kvm.arch
        self.kvm = kvm
        self.arch = arch
        self.name = name
        self.engine: Engine | None = kvm.engine
        self.clock: Clock = kvm.clock
        self.options = arch.options
        self.ipa_bits = arch.address_bits(machine_type)
        self.memory = GuestMemory(
            kvm.user_memory, gpa_bits=self.ipa_bits, gpa_errno=arch.gpa_errno, address_spaces=arch.address_spaces
        )
        room = arch.options["io_bus_devices"]
        self.mmio = AddressSpace(f"{name}.mmio", room)
        self.pio = AddressSpace(f"{name}.pio", room)
        self.ledger = Ledger()
        self.events: IrqEvents | None = None
        self.irqchip: Any = None
        self.its_list: list[Any] = []
        self.devices: list[Any] = []
        self.enabled: set[int] = set()
        self.rings: DirtyRings | None = None
        """In the place of dirty bitmaps, once KVM_CAP_DIRTY_LOG_RING is enabled."""
        self.dead = False
        self._vcpus: list[Vcpu] = []
        self._files: list[VmPart] = []
        self._callbacks: list[Callable[[], None]] = []
        self.msis = Channel(f"{name}.msi", Msi, engine=self.engine, ledger=self.ledger)
        self.msis.connect(partial(arch.deliver_msi, self))
        self.lines = Channel(f"{name}.line", LineLevel, engine=self.engine, ledger=self.ledger)
        self.lines.connect(partial(arch.deliver_line, self))
        self.routing = RoutingTable()
        self.irqfds = Irqfds(self)
        self.msis.watchers.append(self.irqfds.rebind)
        self.lines.watchers.append(self.irqfds.rebind)
        self.buses: dict[str, Doorbells] = {}
        self.doorbells = self.bus(MMIO_BUS)
        self.part = arch.new_part(self)

    def __repr__(self) -> str:
        return f"<Vm {self.name}>"

    # -- VmServices

    @property
    def vcpus(self) -> list[Vcpu]:
        """The vCPUs in creation order."""
        return self._vcpus

    @contextmanager
    def lock_vcpus(self) -> Iterator[None]:
        """Hold all vCPUs still. KvmError(EBUSY) when one is inside KVM_RUN."""
        for vcpu in self._vcpus:
            if vcpu.running:
                raise KvmError(errno.EBUSY, f"vCPU {vcpu.vcpu_id} is inside KVM_RUN")
        yield

    def set_default_routing(self, nr_pins: int) -> None:
        """Install the flat GSI table: GSI n to irqchip 0 pin n."""
        self.set_routing(RoutingTable.flat(nr_pins))

    def gsi_of_pin(self, irqchip: int, pin: int) -> int | None:
        """The GSI that is routed to an input; where several are, the last."""
        return self.routing.gsi_of_pin(irqchip, pin)

    def is_open(self, fd: int) -> bool:
        """Whether a number names an open file: a kvm fd, an eventfd, or one of the process."""
        return self.kvm.is_open(fd)

    def on_destroy(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called when the VM goes away."""
        self._callbacks.append(callback)

    # -- interrupts

    def listen(self, events: IrqEvents | None) -> None:
        """Have ``events`` told of each interrupt's life; one with an ``origin_ns`` also when it was sent."""
        self.events = events
        if self.irqchip is not None:
            self.irqchip.events = events
        on_origin = partial(setattr, events, "origin_ns") if hasattr(events, "origin_ns") else None
        for channel in (self.msis, self.lines):
            channel.on_origin = on_origin

    def set_routing(self, table: RoutingTable) -> None:
        """Replace the GSI table; irqfds follow at once."""
        self.routing = table
        self.arch.rerouted(self)
        self.irqfds.reroute()

    def set_irq(self, gsi: int, level: bool, resample: bool = False) -> int:
        """Drive everything ``gsi`` is routed to; what cannot be reached is lost without a sign.

        Returns the sum of the outcomes that are not negative, -1 when there is none (api.irq-line-status.rule.sum).
        """
        total = -1
        for route in self.routing.routes(gsi):
            try:
                outcome = self.arch.set_irq(self, route, level, resample)
            except KvmError:
                continue
            if outcome >= 0:
                total = max(total, 0) + outcome
        return total

    def lost(self, reason: str) -> None:
        """Account for an interrupt that reached no controller."""
        self.ledger.raised += 1
        self.ledger.drop(reason)

    def bus(self, name: str) -> Doorbells:
        """The ioeventfds of an address space."""
        bus = self.buses.get(name)
        if bus is None:
            channel = Channel(f"{self.name}.{name}-doorbell", Doorbell, engine=self.engine)
            space = {MMIO_BUS: self.mmio, PIO_BUS: self.pio}.get(name)
            bus = self.buses[name] = Doorbells(channel, space)
        return bus

    # -- life

    def attach(self, file: VmPart) -> None:
        """One more fd keeps the VM alive."""
        self._files.append(file)

    def detach(self, file: VmPart) -> None:
        """An fd was closed; with the last the VM goes away."""
        self._files.remove(file)
        if not self._files:
            self._destroy()

    def kill(self) -> None:
        """From now on every call on an fd of this VM is EIO."""
        self.dead = True
        for file in self._files:
            file.handlers = DEAD

    def add_vcpu(self, vcpu: Vcpu) -> None:
        """A vCPU was created."""
        self._vcpus.append(vcpu)

    def _destroy(self) -> None:
        # Irqfds first: what their ends lower belongs to the account of a living VM.
        self.irqfds.close()
        for bus in self.buses.values():
            bus.close()
        for callback in reversed(self._callbacks):
            callback()
        try:
            # While the devices still know what they hold.
            self.ledger.close("vm closed")
        finally:
            for device in reversed(self.devices):
                device.destroy()
            self.kvm.vm_closed(self)


class VmFile(VmPart):
    """A VM fd."""

    __slots__ = ()

    kind = "VM"

    @property
    def unknown_request(self) -> int:  # type: ignore[override]
        """ENOTTY, and on arm64 EINVAL (api.all.unknown-vm)."""
        return self.kvm.arch.unknown_request


class VcpuFile(VmPart):
    """A vCPU fd. ``part`` is what the architecture keeps for the vCPU."""

    __slots__ = ("closing", "part", "vcpu")

    kind = "vCPU"

    def __init__(self, kvm: Kvm, handlers: Handlers, vm: Vm, vcpu: Vcpu, part: Any) -> None:
        super().__init__(kvm, handlers, vm)
        self.vcpu = vcpu
        self.part = part
        self.closing = False
        """Closed while KVM_RUN is under way, which keeps the file to its end."""

    def close(self) -> None:
        """The number is gone; the rest goes when no KVM_RUN is under way any more."""
        self.closing = self.vcpu.running
        if not self.closing:
            super().close()

    async def run(self) -> int:
        """KVM_RUN after its first-run checks."""
        rings = self.vm.rings
        try:
            if rings is None:
                return await self.vcpu.run()
            return await self._run_with(rings.of(self.vcpu))
        finally:
            if self.closing:
                self.close()

    async def _run_with(self, ring: DirtyRing) -> int:
        """Leave, or do not enter, the guest when the dirty ring is full."""
        if not ring.full or self.immediate_exit:
            try:
                return await self.vcpu.run()
            except KvmError as error:
                if error.errno != errno.EINTR or not ring.full or self.immediate_exit:
                    raise
        set_exit_reason(self.vcpu.run_view, KVM_EXIT_DIRTY_RING_FULL)
        return 0

    @property
    def unknown_request(self) -> int:  # type: ignore[override]
        """As the architecture has it."""
        return self.kvm.arch.vcpu_unknown_request

    @property
    def immediate_exit(self) -> bool:
        """kvm_run.immediate_exit."""
        return bool(self.vcpu.run_area[KVM_RUN_IMMEDIATE_EXIT])

    def mmap(self, length: int, offset: int) -> memoryview:
        """The run area from ``offset``, a whole page, for ``length`` bytes of it; further on the dirty ring."""
        view = self.vcpu.run_view
        ring_at = KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
        if self.vm.rings is not None and offset >= ring_at:
            view, offset = self.vm.rings.of(self.vcpu).area, offset - ring_at
        if offset & 0xFFF or not 0 < length <= len(view) - offset:
            raise KvmError(
                errno.EINVAL,
                f"a vCPU maps whole pages within {len(view)} bytes, not {length} from {offset}",
            )
        return view[offset : offset + length]


class DeviceFile(VmPart):
    """A device fd. What it does not know is ENOTTY, and to map it ENODEV (api.all.unknown-device)."""

    __slots__ = ("device",)

    kind = "device"

    def __init__(self, kvm: Kvm, handlers: Handlers, vm: Vm, device: Any) -> None:
        super().__init__(kvm, handlers, vm)
        self.device = device

    def close(self) -> None:
        """Most devices live on with the VM; some are taken apart here."""
        if getattr(self.device, "released_on_close", False):
            self.vm.devices.remove(self.device)
            self.device.destroy()
        super().close()


def _dead(file: VmPart, _arg: Any) -> int:
    """EIO, whatever is asked (api.all.eio). A caller in another process, which gets it too, does not exist here."""
    raise KvmError(errno.EIO, f"{file.vm.name} is dead: it failed before and cannot be used any more")


class _Dead(Handlers):
    """Answers every request."""

    def get(self, request: int, default: Any = None) -> Any:
        return _dead


DEAD = _Dead()
