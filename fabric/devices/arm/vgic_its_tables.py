"""ITS tables in guest memory, ABI revision 0: where an entry lies, saving and restoring.

The guest provides a device table (GITS_BASER0, flat or with one level of indirection) and a collection table
(GITS_BASER1); each MAPD names an interrupt translation table (ITT) for the device's events. The ITS works from
its own maps and touches these tables for saving and restoring only, except that what is unmapped is cleared in
them at once. Entries are 8 bytes, little-endian:

====  =======================================================================================================
DTE   Valid 63, Next 62:49 (distance to the next device id, 0: the last), ITT address 48:5 (in 256 bytes),
      Size 4:0 (event id bits - 1); indexed by device id
ITE   Next 63:48 (distance to the next event id, 0: the last), pINTID 47:16 (0: invalid), ICID 15:0; indexed
      by event id
CTE   Valid 63, RDbase 51:16, ICID 15:0; in any order, up to the first that is not valid
L1    Valid 63, address 51:16 of a 64 KiB page of DTEs
====  =======================================================================================================

Specification: arm-vgic-its, "ITS Table ABI REV0"; GICv3 architecture (IHI 0069), GITS_BASER<n>.
"""

from __future__ import annotations

import errno
from itertools import zip_longest
from typing import TYPE_CHECKING

from fabric.devices.arm.vgic_irq import MIN_LPI
from fabric.devices.arm.vgic_its_maps import Collection, ItsDevice
from fabric.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric.devices.arm.vgic_its import Its
    from fabric.devices.arm.vgic_its_pages import Pages
    from fabric.memory import GuestMemory

ENTRY_SIZE = 8
PAGE_SIZE = 1 << 16
"""Of the tables: GITS_BASER.Page_Size is fixed at 64 KiB."""
ENTRIES_PER_PAGE = PAGE_SIZE // ENTRY_SIZE
VALID = 1 << 63
BASER_INDIRECT = 1 << 62
DEVICE_ID_BITS = 16
"""KVM's GITS_TYPER.Devbits."""
DTE_MAX_NEXT = (1 << 14) - 1
ITE_MAX_NEXT = (1 << 16) - 1
ITT_ADDRESS = 0x000F_FFFF_FFFF_FF00
L1_ADDRESS = 0x000F_FFFF_FFFF_0000
NO_RDBASE = 0xFFFF_FFFF
"""RDbase of a collection that an event was mapped to, and that MAPC has not mapped yet."""


def table_address(baser: int) -> int:
    """Guest address of a table: bits 47:16, and 51:48 from 15:12 as with all 64 KiB pages."""
    return (baser & 0x0000_FFFF_FFFF_0000) | (baser & 0xF000) << 36


def table_size(baser: int) -> int:
    """Length of a table (of the first level, if there are two) in bytes."""
    return ((baser & 0xFF) + 1) * PAGE_SIZE


def entry_address(memory: GuestMemory, baser: int, index: int) -> int | None:
    """Guest address of entry ``index`` of a table, or None where the guest provides no memory for it.

    Whether the table is valid does not matter here: an id may be too large even for one that is not.
    """
    base, size = table_address(baser), table_size(baser)
    if baser & BASER_INDIRECT:
        page, index = divmod(index, ENTRIES_PER_PAGE)
        if page >= size // ENTRY_SIZE:
            return None
        try:
            level1 = memory.read_u64(base + page * ENTRY_SIZE)
        except KvmError:
            return None
        if not level1 & VALID:
            return None
        base = level1 & L1_ADDRESS
    elif index >= size // ENTRY_SIZE:
        return None
    address = base + index * ENTRY_SIZE
    return address if memory.is_backed(address) else None


def device_entry(its: Its, devid: int) -> int | None:
    """Guest address of a device's DTE, or None when the device id is too large or has no memory."""
    if devid >= 1 << DEVICE_ID_BITS:
        return None
    return entry_address(its.vm.memory, its.baser[0], devid)


# -- saving ---------------------------------------------------------------------------------------------------


def save(its: Its) -> None:
    """Write all maps into the guest's tables: each device's events and its DTE, then the collections.

    A table that is not valid is skipped. Entries of ids that are not mapped keep what they hold.

    Raises:
        KvmError: EINVAL when the device table has no room for a device, EFAULT when a table is not in RAM.
            What was written before stays.
    """
    if its.baser[0] & VALID:
        _save_devices(its)
    if its.baser[1] & VALID:
        _save_collections(its)


def _save_devices(its: Its) -> None:
    write_u64 = its.vm.memory.write_u64
    # KVM sorts its list by id, with a comparison that turns devices of one id around: the last becomes the one that
    # is found. All of them are written to the one entry, so the one that was found before is what stays there.
    for devid, device in its.devices.items():
        if device.behind is not None:
            its.devices[devid] = device.reversed()
    devices = sorted(its.records(), key=lambda device: device.devid)
    for device, following in zip_longest(devices, devices[1:]):
        devid = device.devid
        address = device_entry(its, devid)
        if address is None:
            raise KvmError(errno.EINVAL, f"the device table has no entry for device {devid:#x}")
        _save_events(its, device)
        distance = 0 if following is None else following.devid - devid
        write_u64(
            address,
            VALID | min(distance, DTE_MAX_NEXT) << 49 | (device.itt & ITT_ADDRESS) >> 8 << 5 | (device.bits - 1),
        )


def _save_events(its: Its, device: ItsDevice) -> None:
    write_u64 = its.vm.memory.write_u64
    events = device.events()
    current = next(events, None)
    while current is not None:
        following = next(events, None)
        eventid, irq, collection = current
        if collection is None:
            # An event whose collection MAPC took away is saved as if it were none.
            entry = 0
        else:
            distance = 0 if following is None else following[0] - eventid
            entry = min(distance, ITE_MAX_NEXT) << 48 | irq.intid << 16 | collection.icid
        write_u64(device.itt + eventid * ENTRY_SIZE, entry)
        current = following


def _save_collections(its: Its) -> None:
    memory = its.vm.memory
    address = table_address(its.baser[1])
    full = address + table_size(its.baser[1])
    for collection in its.collections.values():
        rdbase = NO_RDBASE if collection.rdbase is None else collection.rdbase
        memory.write_u64(address, VALID | rdbase << 16 | collection.icid)
        address += ENTRY_SIZE
    # More than fit (the guest has shrunk the table since) are written all the same, end mark included.
    if address != full:
        memory.write_u64(address, 0)


# -- restoring ------------------------------------------------------------------------------------------------


def restore(its: Its) -> None:
    """Build the maps from the guest's tables: collections first, then devices with their events.

    A table that is not valid is skipped. When the collection table cannot be restored, for want of host memory
    even, all collections are forgotten, those that were there before included; when the device table cannot, all
    devices are as well. A device whose id is taken is added behind the one that has it.

    Raises:
        KvmError: EFAULT for a table that is not in RAM, EINVAL for an entry that makes no sense, EEXIST for a
            collection that is there already.
    """
    its.pages.forget()
    try:
        if its.baser[1] & VALID:
            _restore_collections(its)
        if its.baser[0] & VALID:
            _restore_devices(its)
    finally:
        its.pages.forget()


def _restore_collections(its: Its) -> None:
    try:
        _read_collections(its)
    except (KvmError, MemoryError):
        its.forget_collections()
        raise


def _read_collections(its: Its) -> None:
    baser = its.baser[1]
    first, size = table_address(baser), table_size(baser)
    for address in range(first, first + size, ENTRY_SIZE):
        entry = its.pages.read_u64(address)
        if not entry & VALID:
            return
        icid = entry & 0xFFFF
        rdbase = entry >> 16 & 0xFFFF_FFFF
        if rdbase != NO_RDBASE and rdbase >= len(its.vm.vcpus):
            raise KvmError(errno.EINVAL, f"collection {icid} goes to vCPU {rdbase}, which does not exist")
        if icid in its.collections:
            raise KvmError(errno.EEXIST, f"collection {icid} is mapped already")
        if entry_address(its.vm.memory, baser, icid) is None:
            raise KvmError(errno.EINVAL, f"the collection table has no entry for collection {icid}")
        its.collections[icid] = Collection(icid, None if rdbase == NO_RDBASE else rdbase)


def _restore_devices(its: Its) -> None:
    pages, baser = its.pages, its.baser[0]
    base, size = table_address(baser), table_size(baser)

    def device(devid: int, entry: int) -> int:
        if not entry & VALID:
            return 1
        _restore_device(its, devid, entry)
        return entry >> 49 & DTE_MAX_NEXT

    def page(number: int, entry: int) -> int:
        if not entry & VALID:
            return 1
        first = number * ENTRIES_PER_PAGE
        return 0 if _walk(pages, entry & L1_ADDRESS, ENTRIES_PER_PAGE, device, first) else 1

    try:
        _walk(pages, base, size // ENTRY_SIZE, page if baser & BASER_INDIRECT else device)
    except (KvmError, MemoryError):
        its.forget_devices()
        its.forget_collections()
        raise


def _restore_device(its: Its, devid: int, entry: int) -> None:
    bits = (entry & 0x1F) + 1
    if device_entry(its, devid) is None:
        raise KvmError(errno.EINVAL, f"the device table has no entry for device {devid:#x}")
    if bits > its.event_id_bits:
        raise KvmError(errno.EINVAL, f"device {devid:#x} has {bits} event id bits, more than {its.event_id_bits}")
    device = ItsDevice(devid, bits, (entry >> 5 << 8) & ITT_ADDRESS)

    def event(eventid: int, entry: int) -> int:
        lpi = entry >> 16 & 0xFFFF_FFFF
        if not lpi:
            return 1
        if lpi < MIN_LPI:
            raise KvmError(errno.EINVAL, f"event {eventid} of device {devid:#x} has INTID {lpi}, no LPI")
        distance = entry >> 48
        if eventid + distance >= 1 << bits:
            raise KvmError(errno.EINVAL, f"event {eventid} of device {devid:#x} is followed by none")
        collection = its.collections.get(entry & 0xFFFF)
        if collection is None:
            raise KvmError(errno.EINVAL, f"event {eventid} of device {devid:#x} has no collection")
        its.map_event(device, eventid, lpi, collection)
        return distance

    try:
        _walk(its.pages, device.itt, 1 << bits, event)
    except (KvmError, MemoryError):
        its.release_device(device)
        raise
    its.add_device(device)


def _walk(pages: Pages, base: int, count: int, visit: Callable[[int, int], int], first: int = 0) -> bool:
    """Follow the chain of entries through a table.

    Args:
        base, count: where the table is and how many entries it has.
        visit: ``(id, entry)`` to the distance of the next entry to look at, 0 to end.
        first: the id of entry 0.

    Returns:
        Whether ``visit`` ended it, as opposed to the end of the table.
    """
    index = 0
    while index < count:
        step = visit(first + index, pages.read_u64(base + index * ENTRY_SIZE))
        if not step:
            return True
        index += step
    return False
