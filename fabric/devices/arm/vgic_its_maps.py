"""What an ITS maps: devices, their events, and the collections that say which vCPU an event goes to.

An event is no object of its own. A device keeps its events in two columns, the LPI and the collection, because
there may be millions: sixteen bytes an event where an object would take seventy. The columns are sequences by event
id as long as at least about a quarter of the ids up to the highest are in use, and dicts for a guest that scatters
its ids; lookup is the same subscript either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fabric.devices.arm.vgic_irq import VgicIrq

SPARSE = 4
"""Event ids up to the highest, per event in use, from which on lists would waste more than dicts."""
SMALL = 64
"""Event ids for which a list is never too wasteful."""


class Collection:
    """A name for the vCPU that events go to. ``rdbase`` is its index; None until MAPC says it."""

    __slots__ = ("icid", "rdbase")

    def __init__(self, icid: int, rdbase: int | None = None) -> None:
        self.icid = icid
        self.rdbase = rdbase

    def __repr__(self) -> str:
        return f"<Collection {self.icid} -> {'-' if self.rdbase is None else self.rdbase}>"


Event: TypeAlias = "tuple[int, VgicIrq, Collection | None]"
"""``(event id, LPI, collection)``; the collection is None once MAPC with V=0 took it away."""


class ItsDevice:
    """A device as MAPD made it, with its events.

    Attributes:
        devid: the device id that MSIs carry.
        bits: event ids have so many bits.
        itt: guest address of the interrupt translation table, used by saving and restoring only.
        count: how many events are mapped.
        irqs: event id to LPI; subscripting an id that is not there gives None or raises LookupError.
        collections: event id to collection.
        behind: another device of the same id. RESTORE_TABLES does not look whether an id is taken; the later one is
            hidden until the earlier one goes.
    """

    __slots__ = ("behind", "bits", "collections", "count", "devid", "irqs", "itt")

    irqs: list[VgicIrq | None] | dict[int, VgicIrq | None]
    collections: list[Collection | None] | dict[int, Collection | None]

    def __init__(self, devid: int, bits: int, itt: int) -> None:
        self.devid = devid
        self.bits = bits
        self.itt = itt
        self.count = 0
        self.irqs = []
        self.collections = []
        self.behind: ItsDevice | None = None

    def event(self, eventid: int) -> VgicIrq | None:
        """The LPI of an event, or None."""
        try:
            return self.irqs[eventid]
        except LookupError:
            return None

    def map(self, eventid: int, irq: VgicIrq, collection: Collection | None) -> None:
        """Add an event, which must not be mapped."""
        irqs, collections = self.irqs, self.collections
        self.count = count = self.count + 1
        if not isinstance(irqs, dict) and not isinstance(collections, dict):
            if eventid == len(irqs):
                irqs.append(irq)
                collections.append(collection)
                return
            if eventid > len(irqs):
                if eventid >= SPARSE * count + SMALL:
                    self._scatter()
                    self.irqs[eventid] = irq
                    self.collections[eventid] = collection
                    return
                gap = [None] * (eventid + 1 - len(irqs))
                irqs += gap
                collections += gap
            irqs[eventid] = irq
            collections[eventid] = collection
            return
        irqs[eventid] = irq
        collections[eventid] = collection
        if isinstance(irqs, dict) and not count & (count - 1):
            self._gather(max(irqs) + 1)

    def unmap(self, eventid: int) -> VgicIrq:
        """Remove an event, which must be mapped, and return its LPI."""
        irq = self.irqs[eventid]
        assert irq is not None
        self.count -= 1
        if isinstance(self.irqs, dict):
            del self.irqs[eventid], self.collections[eventid]
        else:
            self.irqs[eventid] = self.collections[eventid] = None
        return irq

    def events(self) -> Iterator[Event]:
        """Every event by ascending id."""
        irqs, collections = self.irqs, self.collections
        for eventid in range(len(irqs)) if isinstance(irqs, list) else sorted(irqs):
            irq = irqs[eventid]
            if irq is not None:
                yield eventid, irq, collections[eventid]

    def reversed(self) -> ItsDevice:
        """Turn the order of this device and those behind it around; the one that is first now."""
        first: ItsDevice | None = None
        device: ItsDevice | None = self
        while device is not None:
            device.behind, first, device = first, device, device.behind
        assert first is not None
        return first

    def detach(self, collection: Collection) -> None:
        """The collection is gone: its events stay mapped and go nowhere."""
        columns = self.collections
        for eventid in range(len(columns)) if isinstance(columns, list) else columns:
            if columns[eventid] is collection:
                columns[eventid] = None

    def _scatter(self) -> None:
        """From lists to dicts."""
        events = list(self.events())
        self.irqs = {eventid: irq for eventid, irq, _ in events}
        self.collections = {eventid: collection for eventid, _, collection in events}

    def _gather(self, size: int) -> None:
        """From dicts to lists, if the ids below ``size`` have become dense."""
        if size > SPARSE * self.count + SMALL:
            return
        events = list(self.events())
        self.irqs = [None] * size
        self.collections = [None] * size
        for eventid, irq, collection in events:
            self.irqs[eventid] = irq
            self.collections[eventid] = collection

    def _check(self) -> None:
        """Assert the invariants."""
        assert type(self.irqs) is type(self.collections)
        assert len(self.irqs) == len(self.collections)
        assert self.count == sum(1 for _ in self.events())
        assert all(eventid < 1 << self.bits for eventid, _, _ in self.events())
        if isinstance(self.irqs, list):
            for irq, collection in zip(self.irqs, self.collections, strict=True):
                assert irq is not None or collection is None

    def __repr__(self) -> str:
        return f"<ItsDevice {self.devid:#x}, {self.bits} bits, {self.count} events>"
