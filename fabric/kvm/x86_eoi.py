"""The ends of interrupts that a VMM's own IOAPIC sent, with a split irqchip: KVM_EXIT_IOAPIC_EOI.

The VMM routes the GSIs of its IOAPIC, those below the number it has reserved, to the messages that its redirection
entries make. The end of a level-triggered one is told to it, on the vCPU that ended it, so that it clears remote IRR.
Where the message goes is asked when the routes are set; a vCPU that has the vector then tells of its end all the same.

Rules: api.cap.split-irqchip and api.exit.ioapic-eoi of the interface inventory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric.devices.x86.apic_bus import msi_destination
from fabric.devices.x86.lapic import SVR, SVR_DIRECTED_EOI
from fabric.kvm.routing import MsiRoute

if TYPE_CHECKING:
    from fabric.devices.x86.lapic import Lapic
    from fabric.kvm.vm import Vm

_LEVEL = 1 << 15
_LOGICAL = 1 << 2


class IoapicEnds:
    """Which vectors of which vCPUs are the VMM's IOAPIC's, by the routing table there is."""

    __slots__ = ("_destinations", "_open", "vm")

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._destinations: dict[int, list[tuple[int, bool]]] = {}
        """By vector: ``(destination, whether it is logical)`` of each message."""
        self._open: set[tuple[int, int]] = set()
        """``(vCPU, vector)`` of what waited or was in service when the routes were set."""
        self.rescan()
        vm.irqchip.apics.eoi_listeners.append(self.ended)

    def rescan(self) -> None:
        """The routing table was replaced."""
        vm = self.vm
        bus = vm.irqchip.apics
        self._destinations = {}
        self._open = set()
        watched = 0
        for gsi in range(vm.irqchip.reserved_pins):
            for route in vm.routing.routes(gsi):
                if isinstance(route, MsiRoute) and route.data & _LEVEL:
                    vector = route.data & 0xFF
                    watched |= 1 << vector
                    to = msi_destination(route.address, bus.x2apic_format), bool(route.address & _LOGICAL)
                    self._destinations.setdefault(vector, []).append(to)
                    self._open.update((apic.index, vector) for apic in bus.apics if apic.holds(vector))
        bus.watched = watched

    def ended(self, vector: int, apic: Lapic, _level: bool) -> None:
        """A local APIC ended ``vector``: if it is one of these, its vCPU exits."""
        vm = self.vm
        if vm.part.directed_eoi and apic.word(SVR) & SVR_DIRECTED_EOI:
            return  # the guest tells the IOAPIC itself
        destinations = self._destinations.get(vector, ())
        matches = vm.irqchip.apics.matches
        if (apic.index, vector) in self._open or any(matches(apic, dest, logical) for dest, logical in destinations):
            apic.vcpu.ended.append(vector)
            apic.vcpu.note_event()
