"""irqfds: eventfds whose signals become interrupts.

A signal raises the routes of a GSI. With a *resampler* the line stays up until the guest ends the interrupt;
then it is lowered and the resample eventfd is signalled, and whoever owns the device signals again if it still
wants service. All resample irqfds of a GSI share one line.

Signals are the hot path of a simulated device: an eventfd that is bound to an irqfd calls a function made for
its route, and nothing of this module is on the way. Routes, channels and controllers change rarely; then
:meth:`Irqfds.rebind` makes these functions anew.

Rules: api.irqfd of the interface inventory. An eventfd that was signalled before it was assigned fires once, as
a pulse, and keeps its count (seen on Linux 6.1).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fabric.errors import KvmError

if TYPE_CHECKING:
    from fabric.kvm.eventfd import Event
    from fabric.kvm.routing import Route
    from fabric.kvm.vm import Vm


class Irqfd:
    """One eventfd tied to one GSI."""

    __slots__ = ("bound", "event", "gsi", "irqfds", "resample", "resample_open", "routes")

    def __init__(self, irqfds: Irqfds, event: Event, gsi: int, resample: Event | None) -> None:
        self.irqfds = irqfds
        self.event = event
        self.gsi = gsi
        self.resample = resample
        """The eventfd to signal at the end of the interrupt; None for an edge."""
        self.resample_open = resample is not None
        self.bound: Callable[[], object] | None = None
        self.routes: tuple[Route, ...] = ()

    def bind(self) -> None:
        """Tie the eventfd to the routes that the GSI has now."""
        self.unbind()
        vm = self.irqfds.vm
        self.routes = vm.routing.routes(self.gsi)
        self.bound = inject = vm.arch.injector(vm, self.routes, self.resample is not None)
        self.event.bind(inject)
        if hasattr(inject, "shortcut"):
            inject.shortcut = partial(self.event.shorten, inject)

    def unbind(self) -> None:
        """The eventfd counts for itself again."""
        if self.bound is not None:
            self.event.unbind(self.bound)
            self.bound = None

    def gone(self) -> None:
        """The eventfd was closed."""
        self.irqfds.remove(self)

    def resample_gone(self) -> None:
        """The resample eventfd was closed: that ends nothing, its signals just reach nobody."""
        self.resample_open = False


class Resampler:
    """What the resample irqfds of one GSI share: the line, and the notice that its interrupt ended."""

    __slots__ = ("cancel", "gsi", "irqfds", "vm")

    def __init__(self, vm: Vm, gsi: int) -> None:
        self.vm = vm
        self.gsi = gsi
        self.irqfds: list[Irqfd] = []
        self.cancel: list[Callable[[], None]] = []
        """What undoes the notices asked for."""

    def listen(self) -> None:
        """Ask to be told of the end of the interrupts that the GSI is routed to now."""
        self.ignore()
        vm = self.vm
        for route in vm.routing.routes(self.gsi):
            if vm.arch.gsi_told(vm, route) == self.gsi:
                self.cancel.append(vm.arch.on_end(vm, route, self.ended))

    def ignore(self) -> None:
        """Undo :meth:`listen`."""
        for cancel in self.cancel:
            cancel()
        self.cancel.clear()

    def lower(self) -> None:
        """Lower the line."""
        self.vm.set_irq(self.gsi, False, resample=True)

    def ended(self) -> None:
        """The guest ended the interrupt."""
        self.lower()
        for irqfd in tuple(self.irqfds):
            if irqfd.resample is not None and irqfd.resample_open:
                irqfd.resample.signal()


class Irqfds:
    """The irqfds of a VM."""

    __slots__ = ("_irqfds", "_resamplers", "vm")

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._irqfds: list[Irqfd] = []
        self._resamplers: dict[int, Resampler] = {}

    def __len__(self) -> int:
        return len(self._irqfds)

    def assign(self, event: Event, gsi: int, resample: Event | None) -> None:
        """Tie ``event`` to ``gsi``. KvmError(EBUSY) when it is tied to one of this VM."""
        if any(irqfd.event is event for irqfd in self._irqfds):
            if resample is not None and gsi not in self._resamplers:
                # The kernel has set up a resampler by then, and takes it apart as any last one of its GSI.
                self.vm.set_irq(gsi, False)
            raise KvmError(errno.EBUSY, "the eventfd has an irqfd in this VM already")
        was_signalled = event.readable
        irqfd = Irqfd(self, event, gsi, resample)
        event.watch(irqfd.gone)
        if resample is not None:
            resample.watch(irqfd.resample_gone)
            resampler = self._resamplers.get(gsi)
            if resampler is None:
                resampler = self._resamplers[gsi] = Resampler(self.vm, gsi)
                resampler.listen()
            resampler.irqfds.append(irqfd)
        self._irqfds.append(irqfd)
        irqfd.bind()
        if was_signalled:
            self.vm.set_irq(gsi, True, resample is not None)
            if resample is None:
                self.vm.set_irq(gsi, False)

    def deassign(self, event: Event, gsi: int) -> None:
        """Untie ``event`` from ``gsi``; nothing happens when it is not tied to it."""
        for irqfd in tuple(self._irqfds):
            if irqfd.event is event and irqfd.gsi == gsi:
                self.remove(irqfd)

    def remove(self, irqfd: Irqfd) -> None:
        """End an irqfd. With the last resample irqfd of a GSI its line is lowered."""
        self._irqfds.remove(irqfd)
        irqfd.unbind()
        irqfd.event.unwatch(irqfd.gone)
        if irqfd.resample is not None:
            irqfd.resample.unwatch(irqfd.resample_gone)
            resampler = self._resamplers[irqfd.gsi]
            resampler.irqfds.remove(irqfd)
            if not resampler.irqfds:
                del self._resamplers[irqfd.gsi]
                resampler.ignore()
                resampler.lower()

    def rebind(self) -> None:
        """The way to the interrupt controllers changed."""
        for irqfd in self._irqfds:
            irqfd.bind()

    def reroute(self) -> None:
        """The routing table changed."""
        routing = self.vm.routing
        for irqfd in self._irqfds:
            if routing.routes(irqfd.gsi) != irqfd.routes:
                irqfd.bind()
        for resampler in self._resamplers.values():
            resampler.listen()

    def close(self) -> None:
        """The VM goes away."""
        for irqfd in tuple(self._irqfds):
            self.remove(irqfd)
