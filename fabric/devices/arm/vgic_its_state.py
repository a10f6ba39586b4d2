"""The state of an ITS as a versioned record, apart from the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from fabric.devices.arm.vgic_its_maps import Collection, ItsDevice

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_its import Its

EventState = tuple[int, int, "int | None"]
"""``(event id, LPI, collection id)``; the collection is None when the event lost it."""
DeviceState = tuple[int, int, int, tuple[EventState, ...], tuple[int, ...]]
"""``(device id, event id bits, ITT address, events, ids of the events whose translation is cached)``."""


@attrs.frozen
class ItsState:
    """What :meth:`Its.state` returns; the LPIs themselves are in the state of the GIC.

    ``shares`` counts, for the whole VM, the events of an LPI besides the first; every ITS of a VM carries it.
    The translation cache is part of it, as it decides what an MSI without a device id does.
    """

    version: int = 1
    base: int | None = None
    abi: int = 0
    enabled: bool = False
    cbaser: int = 0
    creadr: int = 0
    cwriter: int = 0
    baser: tuple[int, int] = (0, 0)
    collections: tuple[tuple[int, int | None], ...] = ()
    """``(collection id, vCPU index)`` in the order they were made, in which they are saved."""
    devices: tuple[DeviceState, ...] = ()
    shares: tuple[tuple[int, int], ...] = ()
    refused: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, its: Its) -> ItsState:
        """The state of ``its``."""
        return cls(
            base=its.base,
            abi=its.abi,
            enabled=its.enabled,
            cbaser=its.cbaser,
            creadr=its.creadr,
            cwriter=its.cwriter,
            baser=(its.baser[0], its.baser[1]),
            collections=tuple((icid, collection.rdbase) for icid, collection in its.collections.items()),
            devices=tuple(
                (
                    device.devid,
                    device.bits,
                    device.itt,
                    tuple(
                        (eventid, irq.intid, None if collection is None else collection.icid)
                        for eventid, irq, collection in device.events()
                    ),
                    tuple(device.cached_events(its.group.epoch)),
                )
                for device in its.devices.values()
            ),
            shares=tuple(its.group.shares.items()),
            refused=tuple(its.refused.items()),
        )

    def apply(self, its: Its) -> None:
        """Bring a new ITS into this state."""
        if self.version != 1:
            raise ValueError(f"version must be 1, not {self.version}")
        if self.base is not None:
            its.place(self.base)
        its.abi, its.enabled = self.abi, self.enabled
        its.cbaser, its.creadr, its.cwriter = self.cbaser, self.creadr, self.cwriter
        its.baser = list(self.baser)
        its.collections = {icid: Collection(icid, rdbase) for icid, rdbase in self.collections}
        for devid, bits, itt, events, cached in self.devices:
            device = its.devices[devid] = ItsDevice(devid, bits, itt)
            for eventid, lpi, icid in events:
                collection = None if icid is None else its.collections[icid]
                target = None if collection is None else its.target(collection)
                device.map(eventid, its.vgic.add_lpi(lpi, target), collection)
            for eventid in cached:
                device.cache(eventid, its.group.epoch)
        its.group.shares.update(self.shares)
        its.refused = dict(self.refused)
