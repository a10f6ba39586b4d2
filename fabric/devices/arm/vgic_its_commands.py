"""The ITS command queue: which commands there are, their fields, and what each does.

A command is 32 bytes, four little-endian words, with the opcode in bits 7:0 of the first. Commands run one
after the other while the ITS is enabled and CREADR differs from CWRITER, before the register write that started
them returns. KVM reports no command errors and never stalls: a command that breaks a rule, or that lies where
there is no memory, has no effect and the next one is read. Here the reason is counted in ``Its.refused``.

Specification: GICv3 architecture (IHI 0069), section 5.3 (ITS commands); the ``command`` rows of arm-vgic-its.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Any

import attrs

from fabric.devices.arm.vgic_irq import MIN_LPI
from fabric.devices.arm.vgic_its_maps import Collection, ItsDevice
from fabric.devices.arm.vgic_its_pages import PAGE_MASK, PAGE_SHIFT
from fabric.devices.arm.vgic_its_tables import ENTRY_SIZE, device_entry, entry_address
from fabric.devices.arm.vgic_lpi import load_config, reload_all
from fabric.errors import KvmError

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_irq import VgicIrq
    from fabric.devices.arm.vgic_its import Its

COMMAND_SIZE = 32
_WORDS = Struct("<4Q")


class CommandError(Exception):
    """A command broke a rule; the text is the rule, without values, so that it can be counted."""


@attrs.frozen
class Field:
    """Bits ``hi`` to ``lo`` of word ``word``."""

    name: str
    word: int
    hi: int
    lo: int

    @property
    def mask(self) -> int:
        """The width as a mask of the shifted value."""
        return (1 << self.hi - self.lo + 1) - 1


DEVICE_ID = Field("DeviceID", 0, 63, 32)
EVENT_ID = Field("EventID", 1, 31, 0)
PINTID = Field("pINTID", 1, 63, 32)
SIZE = Field("Size", 1, 4, 0)
ITT_ADDR = Field("ITT_addr", 2, 51, 8)
ICID = Field("ICID", 2, 15, 0)
RDBASE = Field("RDbase", 2, 47, 16)
VALID = Field("V", 2, 63, 63)
RDBASE2 = Field("RDbase2", 3, 47, 16)


@attrs.frozen
class Command:
    """One command: its name, opcode and fields; ``run`` takes the ITS and the fields in that order."""

    name: str
    opcode: int
    fields: tuple[Field, ...]
    run: Callable[..., None]
    id: str
    decode: tuple[tuple[int, int, int], ...] = attrs.field(init=False)
    """``(word, shift, mask)`` of each field."""

    @decode.default
    def _decode(self) -> tuple[tuple[int, int, int], ...]:
        return tuple((field.word, field.lo, field.mask) for field in self.fields)


# -- what several commands need -------------------------------------------------------------------------------


def _event(its: Its, devid: int, eventid: int) -> tuple[ItsDevice, VgicIrq]:
    device = its.devices.get(devid)
    irq = None if device is None else device.event(eventid)
    if device is None or irq is None:
        raise CommandError("the event must be mapped")
    return device, irq


def _mapped(collection: Collection | None) -> Collection:
    if collection is None or collection.rdbase is None:
        raise CommandError("the collection must be mapped")
    return collection


def _check_rdbase(its: Its, rdbase: int) -> None:
    if rdbase >= len(its.vm.vcpus):
        raise CommandError("RDbase must be the number of a vCPU")


def _new_collection(its: Its, icid: int) -> Collection:
    if entry_address(its.vm.memory, its.baser[1], icid) is None:
        raise CommandError("the collection table must have an entry for the collection")
    return Collection(icid)


# -- the commands ---------------------------------------------------------------------------------------------


def mapd(its: Its, devid: int, size: int, itt: int, valid: int) -> None:
    """Create or drop a device. One that exists is dropped in any case, with its events.

    With V=0 the DTE is cleared at once and Size is not looked at.
    """
    address = device_entry(its, devid)
    if address is None:
        raise CommandError("the device table must have an entry for the device")
    bits = size + 1
    if valid and bits > its.event_id_bits:
        raise CommandError("Size must be within GITS_TYPER.ID_bits")
    its.drop_device(devid)
    if valid:
        its.add_device(ItsDevice(devid, bits, itt << 8))
    else:
        its.pages.write_u64(address, 0)


def mapc(its: Its, icid: int, rdbase: int, valid: int) -> None:
    """Map a collection to a vCPU, or unmap it; RDbase must make sense even then.

    Events of an unmapped collection lose it for good: they do not come back when it is mapped again.
    """
    _check_rdbase(its, rdbase)
    collection = its.collections.get(icid)
    if not valid:
        if collection is not None:
            del its.collections[icid]
            its.detach(collection)
        its.invalidate_cache()
    elif collection is None:
        collection = _new_collection(its, icid)
        collection.rdbase = rdbase
        its.collections[icid] = collection
    else:
        # Cached translations stay: they name the LPI, and only its target changes.
        collection.rdbase = rdbase
        its.retarget(collection)


def mapti(its: Its, devid: int, eventid: int, lpi: int, icid: int) -> None:
    """Map an event to an LPI; an event that is mapped stays as it is.

    A collection that does not exist is created, without a vCPU to go to.
    """
    device = its.devices.get(devid)
    if device is None:
        raise CommandError("the device must be mapped")
    if eventid >> device.bits:
        raise CommandError("EventID must be within the device's size")
    if not its.vm.memory.is_backed(device.itt + eventid * ENTRY_SIZE):
        raise CommandError("the ITT must be in guest memory")
    if not MIN_LPI <= lpi < its.lpi_limit:
        raise CommandError("pINTID must be an LPI within GICR_PROPBASER.IDbits")
    if device.event(eventid) is not None:
        return
    collection = its.collections.get(icid)
    if collection is not None:
        its.map_event(device, eventid, lpi, collection)
    else:
        collection = _new_collection(its, icid)
        its.map_event(device, eventid, lpi, collection)
        its.collections[icid] = collection


def mapi(its: Its, devid: int, eventid: int, icid: int) -> None:
    """Map an event to the LPI of the same number."""
    mapti(its, devid, eventid, eventid, icid)


def movi(its: Its, devid: int, eventid: int, icid: int) -> None:
    """Move an event to another collection, pending state included. Both must be mapped."""
    device, irq = _event(its, devid, eventid)
    _mapped(device.collections[eventid])
    collection = _mapped(its.collections.get(icid))
    device.collections[eventid] = collection
    its.invalidate_cache()
    its.vgic.retarget(irq, its.target(collection))


def movall(its: Its, rdbase: int, rdbase2: int) -> None:
    """Move the LPIs that go to one vCPU to another one; what the collections say stays as it is."""
    _check_rdbase(its, rdbase)
    _check_rdbase(its, rdbase2)
    vgic = its.vm.irqchip
    if rdbase == rdbase2 or vgic is None:
        return
    source, destination = vgic.cpus[rdbase], vgic.cpus[rdbase2]
    for irq in list(vgic.mapped_lpis()):
        if irq.target is source:
            vgic.retarget(irq, destination)
    its.invalidate_cache()


def discard(its: Its, devid: int, eventid: int) -> None:
    """Unmap an event whose collection is mapped, and clear its ITE at once."""
    device, _ = _event(its, devid, eventid)
    _mapped(device.collections[eventid])
    its.invalidate_cache()
    its.release(device.unmap(eventid))
    its.pages.write_u64(device.itt + eventid * ENTRY_SIZE, 0)


def inv(its: Its, devid: int, eventid: int) -> None:
    """Reload the configuration of one LPI."""
    _, irq = _event(its, devid, eventid)
    load_config(its.vgic, irq)


def invall(its: Its, icid: int) -> None:
    """Reload the configuration of all LPIs that go to the collection's vCPU, whatever collection they are in."""
    collection = _mapped(its.collections.get(icid))
    target = its.target(collection)
    if target is not None:
        reload_all(its.vgic, target)


def interrupt(its: Its, devid: int, eventid: int) -> None:
    """Make an event pending, as an MSI would."""
    lost = its.raise_event(devid, eventid)
    if lost is not None:
        raise CommandError(lost)


def clear(its: Its, devid: int, eventid: int) -> None:
    """Make an event not pending."""
    _, irq = _event(its, devid, eventid)
    its.vgic.clear_pending(irq, "cleared by the guest")


def sync(_its: Its, _rdbase: int) -> None:
    """Wait for the commands before it; they are done by then."""


COMMANDS = (
    Command("MOVI", 0x01, (DEVICE_ID, EVENT_ID, ICID), movi, "its.cmd.movi"),
    Command("INT", 0x03, (DEVICE_ID, EVENT_ID), interrupt, "its.cmd.int"),
    Command("CLEAR", 0x04, (DEVICE_ID, EVENT_ID), clear, "its.cmd.clear"),
    Command("SYNC", 0x05, (RDBASE,), sync, "its.cmd.sync"),
    Command("MAPD", 0x08, (DEVICE_ID, SIZE, ITT_ADDR, VALID), mapd, "its.cmd.mapd"),
    Command("MAPC", 0x09, (ICID, RDBASE, VALID), mapc, "its.cmd.mapc"),
    Command("MAPTI", 0x0A, (DEVICE_ID, EVENT_ID, PINTID, ICID), mapti, "its.cmd.mapti"),
    Command("MAPI", 0x0B, (DEVICE_ID, EVENT_ID, ICID), mapi, "its.cmd.mapi"),
    Command("INV", 0x0C, (DEVICE_ID, EVENT_ID), inv, "its.cmd.inv"),
    Command("INVALL", 0x0D, (ICID,), invall, "its.cmd.invall"),
    Command("MOVALL", 0x0E, (RDBASE, RDBASE2), movall, "its.cmd.movall"),
    Command("DISCARD", 0x0F, (DEVICE_ID, EVENT_ID), discard, "its.cmd.discard"),
)
"""Every command KVM knows, by opcode."""

BY_OPCODE = {command.opcode: command for command in COMMANDS}


def encode(name: str, **fields: int) -> bytes:
    """A command as the guest writes it, such as ``encode("MAPC", ICID=1, RDbase=0, V=1)``; fields left out are 0.

    Raises:
        ValueError: for a command or field that does not exist, or a value wider than its field.
    """
    for command in COMMANDS:
        if command.name == name:
            break
    else:
        raise ValueError(f"name must be one of {', '.join(c.name for c in COMMANDS)}, not {name!r}")
    words = [command.opcode, 0, 0, 0]
    known: dict[str, Any] = {field.name: field for field in command.fields}
    for key, value in fields.items():
        if key not in known:
            raise ValueError(f"a field of {name} must be one of {', '.join(known)}, not {key!r}")
        field = known[key]
        if value & ~field.mask:
            raise ValueError(f"{name}.{key} must fit {field.hi - field.lo + 1} bits, not {value:#x}")
        words[field.word] |= value << field.lo
    return _WORDS.pack(*words)


def run_queue(its: Its) -> None:
    """Run the commands from CREADR up to CWRITER."""
    pages = its.pages
    pages.forget()
    base, size = its.queue_address, its.queue_size
    commands, unpack = BY_OPCODE, _WORDS.unpack_from
    while its.creadr != its.cwriter:
        try:
            at = base + its.creadr
            words = unpack(pages.page(at >> PAGE_SHIFT), at & PAGE_MASK)
            command = commands.get(words[0] & 0xFF)
            if command is not None:
                command.run(its, *[words[word] >> shift & mask for word, shift, mask in command.decode])
            else:
                its.refuse("the opcode must be one that exists")
        except CommandError as error:
            its.refuse(str(error))
        except KvmError:
            its.refuse("guest memory must be there")
        except MemoryError:
            its.refuse("the host must have memory left")
        its.creadr += COMMAND_SIZE
        if its.creadr >= size:
            its.creadr = 0
    pages.forget()
