"""The GSI routing table of a VM: which interrupt controller input or message each GSI stands for.

KVM_SET_GSI_ROUTING replaces the whole table, or on an error leaves it as it was. What the entries mean is the
architecture's: it says which types it knows and which pins exist. On arm64 the table counts for irqfds only.

Rules: api.set-gsi-routing of the interface inventory.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, TypeAlias

import attrs

from fabric.errors import KvmError
from fabric.uapi.kvm import (
    KVM_IRQ_ROUTING_MSI,
    KVM_MAX_IRQ_ROUTES,
    KVM_MSI_VALID_DEVID,
    ROUTE_CLASSES,
    KvmIrqRoutingEntry,
    KvmIrqRoutingIrqchip,
    KvmIrqRoutingMsi,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fabric.kvm.vm import Vm
    from fabric.uapi.codec import CStruct


@attrs.frozen
class PinRoute:
    """To an input of an in-kernel interrupt controller."""

    irqchip: int
    pin: int


@attrs.frozen
class MsiRoute:
    """To a message."""

    address: int
    data: int
    flags: int
    devid: int


@attrs.frozen
class OtherRoute:
    """To what only one architecture has: ``to`` is the struct of its type."""

    type: int
    to: CStruct


Route: TypeAlias = PinRoute | MsiRoute | OtherRoute


def read_route(entry: KvmIrqRoutingEntry) -> Route:
    """Decode one entry. KvmError(EINVAL) for flags that its type does not have, or a type nobody has."""
    allowed = KVM_MSI_VALID_DEVID if entry.type == KVM_IRQ_ROUTING_MSI else 0
    if entry.flags & ~allowed:
        raise KvmError(
            errno.EINVAL, f"flags of a route of type {entry.type} must be in {allowed:#x}, not {entry.flags:#x}"
        )
    layout = ROUTE_CLASSES.get(entry.type)
    if layout is None:
        raise KvmError(errno.EINVAL, f"there is no route type {entry.type}")
    to = layout.unpack(entry.u)
    if isinstance(to, KvmIrqRoutingIrqchip):
        return PinRoute(to.irqchip, to.pin)
    if isinstance(to, KvmIrqRoutingMsi):
        return MsiRoute(to.address_hi << 32 | to.address_lo, to.data, entry.flags, to.devid)
    return OtherRoute(entry.type, to)


class RoutingTable:
    """GSI to routes. Only PinRoutes to different irqchips may share a GSI."""

    __slots__ = ("_decoded", "_gsi_of_pin", "_routes")

    def __init__(self) -> None:
        self._routes: dict[int, tuple[Route, ...]] = {}
        self._gsi_of_pin: dict[tuple[int, int], int] = {}
        self._decoded: dict[bytes, tuple[int, Route]] = {}  # what was given to GSI and route

    @classmethod
    def build(cls, vm: Vm, entries: bytes, old: RoutingTable) -> RoutingTable:
        """The table of KVM_SET_GSI_ROUTING: ``entries`` is an array of struct kvm_irq_routing_entry.

        An entry that ``old`` has as well becomes the same Route object: a VMM that adds one route hands over all
        the others again.

        Raises:
            KvmError: EINVAL for an entry that breaks a rule.
        """
        table = cls()
        for at in range(0, len(entries), KvmIrqRoutingEntry.SIZE):
            raw = entries[at : at + KvmIrqRoutingEntry.SIZE]
            known = old._decoded.get(raw)
            if known is None:
                entry = KvmIrqRoutingEntry.unpack(raw)
                if entry.gsi >= KVM_MAX_IRQ_ROUTES:
                    raise KvmError(errno.EINVAL, f"a GSI must be below {KVM_MAX_IRQ_ROUTES}, not {entry.gsi}")
                known = entry.gsi, read_route(entry)
            vm.arch.check_route(vm, known[1])
            table._decoded[raw] = known
            table.add(*known)
        return table

    @classmethod
    def flat(cls, pins: int, irqchip: int = 0) -> RoutingTable:
        """GSI n to pin n of one irqchip."""
        table = cls()
        for pin in range(pins):
            table.add(pin, PinRoute(irqchip, pin))
        return table

    def add(self, gsi: int, route: Route) -> None:
        """One more route of ``gsi``. KvmError(EINVAL) when it cannot share the GSI with those there are."""
        others = self._routes.get(gsi, ())
        for other in others:
            if not (isinstance(other, PinRoute) and isinstance(route, PinRoute) and other.irqchip != route.irqchip):
                raise KvmError(
                    errno.EINVAL,
                    f"GSI {gsi} has a route already; only inputs of different irqchips may share a GSI",
                )
        self._routes[gsi] = (*others, route)
        if isinstance(route, PinRoute):
            # Where several GSIs name one pin the last one counts, as in the kernel's reverse map.
            self._gsi_of_pin[route.irqchip, route.pin] = gsi

    def routes(self, gsi: int) -> tuple[Route, ...]:
        """The routes of ``gsi``; none for one that is not in the table, whatever its number."""
        return self._routes.get(gsi, ())

    def items(self) -> Iterator[tuple[int, Route]]:
        """Every route with its GSI, by ascending GSI."""
        for gsi, routes in sorted(self._routes.items()):
            for route in routes:
                yield gsi, route

    def gsi_of_pin(self, irqchip: int, pin: int) -> int | None:
        """The GSI that learns when the interrupt at this input ends."""
        return self._gsi_of_pin.get((irqchip, pin))

    def __len__(self) -> int:
        return sum(map(len, self._routes.values()))
