"""The state of an ITS as a versioned record, apart from the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from fabric.devices.arm.vgic_its_maps import Collection, ItsDevice

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_its import Its

EventState = tuple[int, int, "int | None"]
"""``(event id, LPI, collection id)``; the collection is None when the event lost it."""
DeviceState = tuple[int, int, int, tuple[EventState, ...]]
"""``(device id, event id bits, ITT address, events)``; of several with one id the first is found by it."""

VERSION = 1


@attrs.frozen
class ItsState:
    """What :meth:`Its.state` returns; the LPIs themselves are in the state of the GIC.

    ``shares`` counts, for the whole VM, the events of an LPI besides the first, and ``cache`` is the VM's translation
    cache, which decides what an MSI without a device id does; every ITS of a VM carries both.
    """

    version: int = VERSION
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
    cache: tuple[tuple[int, int, int, int], ...] = ()
    """``(doorbell address, device id, event id, LPI)``, the one used last at the end."""
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
                )
                for device in its.records()
            ),
            shares=tuple(its.group.shares.items()),
            cache=its.group.cache.state(),
            refused=tuple(its.refused.items()),
        )

    def apply(self, its: Its) -> None:
        """Bring a new ITS into this state."""
        if self.version != VERSION:
            raise ValueError(f"version must be {VERSION}, not {self.version}")
        if self.base is not None:
            its.place(self.base)
        its.abi, its.enabled = self.abi, self.enabled
        its.cbaser, its.creadr, its.cwriter = self.cbaser, self.creadr, self.cwriter
        its.baser = list(self.baser)
        its.collections = {icid: Collection(icid, rdbase) for icid, rdbase in self.collections}
        for devid, bits, itt, events in self.devices:
            device = ItsDevice(devid, bits, itt)
            its.add_device(device)
            for eventid, lpi, icid in events:
                collection = None if icid is None else its.collections[icid]
                target = None if collection is None else its.target(collection)
                device.map(eventid, its.vgic.add_lpi(lpi, target), collection)
        its.group.shares.update(self.shares)
        its.group.cache.apply(self.cache)
        its.refused = dict(self.refused)
