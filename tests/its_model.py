"""What an ITS is to do, written down as plainly as possible: lists that are searched, nothing kept twice.

A second description of the rules to compare the first with. One class has the whole VM: the LPIs, what is in the
vCPUs' redistributors of them, the translation cache, and any number of ITSs; nothing is ever forwarded to a vCPU.
Guest memory is that of the machine it is compared with, copied.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import attrs

from fabric.memory import GuestMemory

VALID = 1 << 63
NOT_MAPPED = 0xFFFF_FFFF
EVENT_BITS = 16
FIRST_LPI = 8192


class Refused(Exception):
    """The call answers this errno."""

    def __init__(self, code: int) -> None:
        super().__init__(errno.errorcode[code])
        self.code = code


class Skipped(Exception):
    """A command broke a rule and has no effect."""


@attrs.define(eq=False)
class Lpi:
    """An LPI that something refers to."""

    intid: int
    target: int | None
    references: int = 0
    pending: bool = False
    enabled: bool = False
    priority: int = 0


@attrs.define(eq=False)
class Event:
    """One ITE."""

    number: int
    lpi: Lpi
    collection: Collection | None


@attrs.define(eq=False)
class Collection:
    """One CTE."""

    number: int
    rdbase: int = NOT_MAPPED


@attrs.define(eq=False)
class Device:
    """One DTE."""

    number: int
    bits: int
    itt: int
    events: list[Event] = attrs.field(factory=list)


@attrs.define
class Redistributor:
    """What a vCPU has of LPIs."""

    lpis_enabled: bool = True
    pendbaser: int = 0


class VmModel:
    """The VM."""

    def __init__(self, memory: GuestMemory, vcpus: int, propbaser: int) -> None:
        self.memory = memory
        self.redistributors = [Redistributor() for _ in range(vcpus)]
        self.propbaser = propbaser
        self.lpis: list[Lpi] = []
        self.cache: list[tuple[int, int, int, Lpi]] = []
        """``(doorbell, device, event, LPI)``, the one used last first."""
        self.its: list[ItsModel] = []

    # -- memory; None where there is none

    def load(self, address: int, size: int) -> int | None:
        if not self.memory.is_backed(address, size):
            return None
        return int.from_bytes(self.memory.read(address, size), "little")

    def store(self, address: int, size: int, value: int) -> bool:
        if not self.memory.is_writable(address, size):
            return False
        self.memory.write(address, value.to_bytes(size, "little"))
        return True

    # -- LPIs

    def configure(self, lpi: Lpi) -> bool:
        """Read the configuration table."""
        byte = self.load((self.propbaser & 0xF_FFFF_FFFF_F000) + lpi.intid - FIRST_LPI, 1)
        if byte is None:
            return False
        lpi.enabled, lpi.priority = bool(byte & 1), byte & 0xFC
        return True

    def pending_byte(self, rdbase: int, intid: int) -> int:
        return (self.redistributors[rdbase].pendbaser & 0xF_FFFF_FFFF_0000) + intid // 8

    def refer(self, intid: int, target: int | None) -> Lpi | None:
        """One more reference to an LPI, which is made if it is not there. None when its tables are not in memory."""
        for lpi in self.lpis:
            if lpi.intid == intid:
                lpi.references += 1
                return lpi
        lpi = Lpi(intid, target, 1)
        if not self.configure(lpi):
            return None
        if target is not None:
            address = self.pending_byte(target, intid)
            byte = self.load(address, 1)
            if byte is None:
                return None
            if byte >> intid % 8 & 1:
                lpi.pending = True
                self.store(address, 1, byte & ~(1 << intid % 8))
        self.lpis.append(lpi)
        return lpi

    def let_go(self, lpi: Lpi) -> None:
        lpi.references -= 1
        if not lpi.references:
            self.lpis.remove(lpi)

    def enable_lpis(self, rdbase: int, on: bool) -> None:
        """A write to GICR_CTLR."""
        redistributor = self.redistributors[rdbase]
        was, redistributor.lpis_enabled = redistributor.lpis_enabled, on
        if was and not on:
            self.cache.clear()
        if on and not was and not redistributor.pendbaser >> 62 & 1:
            for lpi in self.lpis:
                if lpi.target == rdbase:
                    byte = self.load(self.pending_byte(rdbase, lpi.intid), 1)
                    if byte is None:
                        return
                    lpi.pending = bool(byte >> lpi.intid % 8 & 1)

    # -- MSIs

    def remembered(self, doorbell: int, device: int, event: int) -> Lpi | None:
        for entry in self.cache:
            if entry[:3] == (doorbell, device, event):
                self.cache.remove(entry)
                self.cache.insert(0, entry)
                return entry[3]
        return None

    def remember(self, doorbell: int, device: int, event: int, lpi: Lpi) -> None:
        if self.remembered(doorbell, device, event) is None:
            self.cache.insert(0, (doorbell, device, event, lpi))
            del self.cache[16 * len(self.redistributors) :]

    def msi(self, address: int, device: int, event: int, flags: int) -> int:
        """KVM_SIGNAL_MSI."""
        if flags & ~1:
            raise Refused(errno.EINVAL)
        lpi = self.remembered(address, device, event)
        if lpi is not None:
            lpi.pending = True
            return 1
        its = next((its for its in self.its if its.base <= address < its.base + 0x2_0000), None)
        if not flags or its is None:
            raise Refused(errno.EINVAL)
        try:
            its.trigger(device, event)
        except Skipped:
            return 0
        return 1


class ItsModel:
    """One ITS."""

    def __init__(self, vm: VmModel, base: int) -> None:
        self.vm = vm
        self.base = base
        self.enabled = False
        self.cbaser = self.creadr = self.cwriter = 0
        self.baser = [0x1907_0000_0000_0600, 0x1C07_0000_0000_0600]
        self.devices: list[Device] = []
        self.collections: list[Collection] = []
        vm.its.append(self)

    # -- looking things up

    def device(self, number: int) -> Device | None:
        return next((device for device in self.devices if device.number == number), None)

    def event(self, device: int, number: int) -> Event | None:
        found = self.device(device)
        return next((event for event in found.events if event.number == number), None) if found else None

    def collection(self, number: int) -> Collection | None:
        return next((collection for collection in self.collections if collection.number == number), None)

    def table(self, which: int) -> tuple[int, int]:
        """Address and size of a table, or of its first level."""
        baser = self.baser[which]
        return baser & 0xFFFF_FFFF_0000 | (baser >> 12 & 0xF) << 48, ((baser & 0xFF) + 1) * 0x1_0000

    def entry(self, which: int, number: int) -> int | None:
        """Address of an entry; None where it has none."""
        base, size = self.table(which)
        if number >= 0x1_0000:
            return None
        if self.baser[which] >> 62 & 1:
            first = None if number // 8192 * 8 >= size else self.vm.load(base + number // 8192 * 8, 8)
            if first is None or not first & VALID:
                return None
            address = (first & 0xF_FFFF_FFFF_0000) + number % 8192 * 8
        elif number * 8 >= size:
            return None
        else:
            address = base + number * 8
        return address if self.vm.memory.is_backed(address) else None

    # -- changing things

    def add_event(self, device: Device, number: int, intid: int, collection: Collection) -> bool:
        target = None if collection.rdbase == NOT_MAPPED else collection.rdbase
        lpi = self.vm.refer(intid, target)
        if lpi is None:
            return False
        device.events.append(Event(number, lpi, collection))
        return True

    def free_device(self, device: Device) -> None:
        for event in device.events:
            self.vm.let_go(event.lpi)
        if device in self.devices:
            self.devices.remove(device)
        self.vm.cache.clear()

    def free_collection(self, collection: Collection) -> None:
        for device in self.devices:
            for event in device.events:
                if event.collection is collection:
                    event.collection = None
        self.collections.remove(collection)

    def free_all(self, *, devices: bool = True, collections: bool = True) -> None:
        for device in self.devices[:] if devices else ():
            self.free_device(device)
        for collection in self.collections[:] if collections else ():
            self.free_collection(collection)

    def trigger(self, device: int, number: int) -> None:
        """An MSI by the maps; Skipped where it reaches nothing."""
        if not self.enabled:
            raise Refused(errno.EBUSY)
        event = self.event(device, number)
        if event is None or event.collection is None or event.collection.rdbase == NOT_MAPPED:
            raise Skipped
        if not self.vm.redistributors[event.collection.rdbase].lpis_enabled:
            raise Refused(errno.EBUSY)
        self.vm.remember(self.base + 0x1_0040, device, number, event.lpi)
        event.lpi.pending = True

    # -- registers

    def read(self, offset: int) -> int:
        return {
            0x00: self.enabled | (self.creadr == self.cwriter) << 31,
            0x80: self.cbaser,
            0x88: self.cwriter,
            0x90: self.creadr,
            0x100: self.baser[0],
            0x108: self.baser[1],
        }[offset]

    def write(self, offset: int, value: int) -> None:
        """A write of userspace."""
        queue = ((self.cbaser & 0xFF) + 1) * 4096
        if offset == 0x00:
            if value & 1 and not self.enabled and not (self.baser[0] & self.baser[1] & self.cbaser & VALID):
                return
            self.enabled = bool(value & 1)
            if not self.enabled:
                self.vm.cache.clear()
            self.process()
        elif offset == 0x88:
            if value & 0xF_FFE0 < queue:
                self.cwriter = value & 0xF_FFE0
                self.process()
        elif offset == 0x90:
            if self.enabled:
                raise Refused(errno.EBUSY)
            if value & 0xF_FFE0 >= queue:
                raise Refused(errno.EINVAL)
            self.creadr = value & 0xF_FFE0
        elif self.enabled:
            return
        elif offset == 0x80:
            self.cbaser = attributes(value) & ~0xF000
            self.creadr = self.cwriter = 0
        else:
            which = offset >> 3 & 1
            fixed = (0x0107, 0x0407)[which] << 48
            value = value & ~(0x071F << 48) | fixed
            if which:
                value &= ~(1 << 62)
            self.baser[which] = attributes(value) & ~0x300 | 0x200
            if not value & VALID:
                self.free_all(devices=not which, collections=bool(which))

    def reset(self) -> None:
        self.baser = [value & ~VALID for value in self.baser]
        self.cbaser = self.creadr = self.cwriter = 0
        self.enabled = False
        self.free_all()

    # -- commands

    def process(self) -> None:
        while self.enabled and self.creadr != self.cwriter:
            words = [self.vm.load((self.cbaser & 0xF_FFFF_FFFF_F000) + self.creadr + 8 * n, 8) for n in range(4)]
            if None not in words:
                with suppress(Skipped, Refused):
                    self.command(*words)  # type: ignore[arg-type]
            self.creadr = (self.creadr + 32) % (((self.cbaser & 0xFF) + 1) * 4096)

    def command(self, w0: int, w1: int, w2: int, w3: int) -> None:
        vm, vcpus = self.vm, len(self.vm.redistributors)
        number, device_id, event_id, icid = w0 & 0xFF, w0 >> 32, w1 & 0xFFFF_FFFF, w2 & 0xFFFF
        rdbase = w2 >> 16 & 0xFFFF_FFFF
        if number == 0x08:
            address, bits = self.entry(0, device_id), (w1 & 0x1F) + 1
            if address is None or (w2 & VALID and bits > EVENT_BITS):
                raise Skipped
            known = self.device(device_id)
            if known is not None:
                self.free_device(known)
            if w2 & VALID:
                self.devices.append(Device(device_id, bits, w2 & 0xF_FFFF_FFFF_FF00))
            else:
                vm.store(address, 8, 0)
        elif number == 0x09:
            if rdbase >= vcpus:
                raise Skipped
            collection = self.collection(icid)
            if not w2 & VALID:
                if collection is not None:
                    self.free_collection(collection)
                vm.cache.clear()
            elif collection is None:
                if self.entry(1, icid) is None:
                    raise Skipped
                self.collections.append(Collection(icid, rdbase))
            else:
                collection.rdbase = rdbase
                for device in self.devices:
                    for event in device.events:
                        if event.collection is collection:
                            event.lpi.target = rdbase
        elif number in (0x0A, 0x0B):
            self.map_event(device_id, event_id, w1 >> 32 if number == 0x0A else event_id, icid)
        elif number == 0x0E:
            other = w3 >> 16 & 0xFFFF_FFFF
            if rdbase >= vcpus or other >= vcpus:
                raise Skipped
            if rdbase != other:
                for lpi in vm.lpis:
                    if lpi.target == rdbase:
                        lpi.target = other
                vm.cache.clear()
        elif number == 0x0D:
            collection = self.collection(icid)
            if collection is None or collection.rdbase == NOT_MAPPED:
                raise Skipped
            for lpi in vm.lpis:
                if lpi.target == collection.rdbase:
                    vm.configure(lpi)
        elif number == 0x03:
            self.trigger(device_id, event_id)
        elif number in (0x01, 0x04, 0x0C, 0x0F):
            found = self.event(device_id, event_id)
            if found is None:
                raise Skipped
            self.of_an_event(number, device_id, found, icid)

    def map_event(self, device_id: int, event_id: int, intid: int, icid: int) -> None:
        device = self.device(device_id)
        if device is None or event_id >= 1 << device.bits:
            raise Skipped
        if not self.vm.memory.is_backed(device.itt + 8 * event_id):
            raise Skipped
        if not FIRST_LPI <= intid < 1 << min((self.vm.propbaser & 0x1F) + 1, 16):
            raise Skipped
        if self.event(device_id, event_id) is not None:
            return
        collection = self.collection(icid)
        if collection is None:
            if self.entry(1, icid) is None:
                raise Skipped
            collection = Collection(icid)
            if self.add_event(device, event_id, intid, collection):
                self.collections.append(collection)
        else:
            self.add_event(device, event_id, intid, collection)

    def of_an_event(self, number: int, device_id: int, event: Event, icid: int) -> None:
        """MOVI, CLEAR, INV and DISCARD."""
        vm = self.vm
        if number == 0x04:
            event.lpi.pending = False
            return
        if number == 0x0C:
            vm.configure(event.lpi)
            return
        if event.collection is None or event.collection.rdbase == NOT_MAPPED:
            raise Skipped
        if number == 0x0F:
            device = self.device(device_id)
            assert device is not None
            vm.cache.clear()
            device.events.remove(event)
            vm.let_go(event.lpi)
            vm.store(device.itt + 8 * event.number, 8, 0)
            return
        collection = self.collection(icid)
        if collection is None or collection.rdbase == NOT_MAPPED:
            raise Skipped
        event.collection = collection
        event.lpi.target = collection.rdbase
        vm.cache.clear()

    # -- tables

    def save(self) -> None:
        def put(address: int, value: int) -> None:
            if not self.vm.store(address, 8, value):
                raise Refused(errno.EFAULT)

        if self.baser[0] & VALID:
            # In 6.1 the sort turns devices of one id around.
            self.devices.reverse()
            self.devices.sort(key=lambda device: device.number)
            for n, device in enumerate(self.devices):
                address = self.entry(0, device.number)
                if address is None:
                    raise Refused(errno.EINVAL)
                device.events.sort(key=lambda event: event.number)
                for m, event in enumerate(device.events):
                    value = 0
                    if event.collection is not None:
                        after = device.events[m + 1].number if m + 1 < len(device.events) else event.number
                        value = min(after - event.number, 0xFFFF) << 48 | event.lpi.intid << 16
                        value |= event.collection.number
                    put(device.itt + 8 * event.number, value)
                after = self.devices[n + 1].number if n + 1 < len(self.devices) else device.number
                itt = device.itt >> 8
                put(address, VALID | min(after - device.number, 0x3FFF) << 49 | itt << 5 | device.bits - 1)
        if self.baser[1] & VALID:
            address, size = self.table(1)
            for collection in self.collections:
                put(address, VALID | collection.rdbase << 16 | collection.number)
                address += 8
            if len(self.collections) * 8 != size:
                put(address, 0)

    def restore(self) -> None:
        if self.baser[1] & VALID:
            try:
                self.restore_collections()
            except Refused:
                self.free_all(devices=False)
                raise
        if self.baser[0] & VALID:
            try:
                self.restore_devices()
            except Refused:
                self.free_all()
                raise

    def restore_collections(self) -> None:
        base, size = self.table(1)
        for address in range(base, base + size, 8):
            entry = self.vm.load(address, 8)
            if entry is None:
                raise Refused(errno.EFAULT)
            if not entry & VALID:
                return
            number, rdbase = entry & 0xFFFF, entry >> 16 & 0xFFFF_FFFF
            if rdbase != NOT_MAPPED and rdbase >= len(self.vm.redistributors):
                raise Refused(errno.EINVAL)
            if self.collection(number) is not None:
                raise Refused(errno.EEXIST)
            if self.entry(1, number) is None:
                raise Refused(errno.EINVAL)
            self.collections.append(Collection(number, rdbase))

    def restore_devices(self) -> None:
        base, size = self.table(0)
        if not self.baser[0] >> 62 & 1:
            self.walk(base, size // 8, 0, self.restore_device)
            return

        def second_level(number: int, entry: int) -> int:
            if not entry & VALID:
                return 1
            ended = self.walk(entry & 0xF_FFFF_FFFF_0000, 8192, number * 8192, self.restore_device)
            return 0 if ended else 1

        self.walk(base, size // 8, 0, second_level)

    def walk(self, base: int, count: int, first: int, visit: Callable[[int, int], int]) -> bool:
        """Entries of a table, each saying how far the next one is; whether one said that it is the last."""
        n = 0
        while n < count:
            entry = self.vm.load(base + 8 * n, 8)
            if entry is None:
                raise Refused(errno.EFAULT)
            step = visit(first + n, entry)
            if not step:
                return True
            n += step
        return False

    def restore_device(self, number: int, entry: int) -> int:
        if not entry & VALID:
            return 1
        bits = (entry & 0x1F) + 1
        if bits > EVENT_BITS or self.entry(0, number) is None:
            raise Refused(errno.EINVAL)
        device = Device(number, bits, (entry >> 5 << 8) & 0xF_FFFF_FFFF_FF00)
        self.devices.append(device)
        try:
            self.walk(device.itt, 1 << bits, 0, lambda event, value: self.restore_event(device, event, value))
        except Refused:
            self.free_device(device)
            raise
        return entry >> 49 & 0x3FFF

    def restore_event(self, device: Device, number: int, entry: int) -> int:
        intid, step = entry >> 16 & 0xFFFF_FFFF, entry >> 48
        if not intid:
            return 1
        collection = self.collection(entry & 0xFFFF)
        if intid < FIRST_LPI or number + step >= 1 << device.bits or collection is None:
            raise Refused(errno.EINVAL)
        if not self.add_event(device, number, intid, collection):
            raise Refused(errno.EFAULT)
        return step

    # -- for comparison

    def maps(self) -> tuple[Any, ...]:
        """Collections in order, and devices with events, in an order that does not depend on how they came."""
        return (
            [(c.number, None if c.rdbase == NOT_MAPPED else c.rdbase) for c in self.collections],
            sorted(self._devices()),
        )

    def _devices(self) -> Iterator[tuple[Any, ...]]:
        ranks: dict[int, int] = {}
        for device in self.devices:
            rank = ranks[device.number] = ranks.get(device.number, -1) + 1
            events = sorted(
                (event.number, event.lpi.intid, -1 if event.collection is None else event.collection.number)
                for event in device.events
            )
            yield device.number, rank, device.bits, device.itt, events


def attributes(value: int) -> int:
    """Cacheability and shareability as KVM keeps them in GITS_CBASER and GITS_BASER."""
    inner, outer, share = value >> 59 & 7, value >> 53 & 7, value >> 10 & 3
    inner = 3 if inner < 2 else inner
    outer = outer if outer < 2 else 0
    share = 1 if share == 2 else share
    return value & ~(7 << 59 | 7 << 53 | 3 << 10) | inner << 59 | outer << 53 | share << 10
