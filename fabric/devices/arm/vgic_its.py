"""The interrupt translation service (ITS): MSI writes become LPIs.

A device raises an MSI by writing an event id to the doorbell GITS_TRANSLATER, tagged with its device id. The ITS
maps (device, event) to an LPI and, through a collection, to a vCPU. The guest fills these maps through a command
queue (:mod:`~fabric.devices.arm.vgic_its_commands`); save and restore go through tables in guest memory
(:mod:`~fabric.devices.arm.vgic_its_tables`).

What was translated lately is remembered (:mod:`~fabric.devices.arm.vgic_its_cache`), which shows.

Specification: arm-vgic-its (device attributes, table format); GICv3 architecture (IHI 0069), chapter 5 and
section 12.18 (GITS registers).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar

from fabric.devices.arm.vgic import INITIAL_PROPBASER
from fabric.devices.arm.vgic_cpuif import VgicV3Cpu
from fabric.devices.arm.vgic_its_attrs import ITS_ATTRIBUTES
from fabric.devices.arm.vgic_its_cache import Shortcut, TranslationCache
from fabric.devices.arm.vgic_its_commands import run_queue
from fabric.devices.arm.vgic_its_maps import Collection, ItsDevice
from fabric.devices.arm.vgic_its_pages import Pages
from fabric.devices.arm.vgic_its_regs import (
    BASER_RESET,
    GITS,
    GITS_FRAME_SIZE,
    GITS_TRANSLATER,
    ITS_SIZE,
)
from fabric.devices.arm.vgic_its_state import ItsState
from fabric.devices.arm.vgic_its_tables import VALID
from fabric.devices.arm.vgic_lpi import load_config, pending_bit
from fabric.errors import KvmError
from fabric.memory import MmioHandler
from fabric.uapi.kvm import KVM_MSI_VALID_DEVID

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fabric.devices.arm.vgic import Vgic
    from fabric.devices.arm.vgic_irq import VgicIrq
    from fabric.devices.attributes import AttrTable
    from fabric.devices.base import VmServices
    from fabric.uapi.kvm import KvmMsi

CBASER_ADDRESS = 0x000F_FFFF_FFFF_F000

ITS_DISABLED = "ITS disabled"
LPIS_DISABLED = "LPIs disabled"


class ItsGroup:
    """What the ITSs of one VM have in common."""

    __slots__ = ("cache", "shares")

    def __init__(self, vm: VmServices) -> None:
        self.cache = TranslationCache(vm)
        self.shares: dict[int, int] = {}
        """LPI to how many events map it besides the first; most LPIs have one event and are not in here."""


class Its(MmioHandler):
    """One ITS. Several may be in a VM, each at its own address, sharing the LPIs.

    Attributes that others read: ``enabled``; ``base``, the guest address or None; ``cbaser``, ``creadr``,
    ``cwriter``, ``baser`` (BASER0 and BASER1), as the registers have them; ``devices`` and ``collections``, the
    maps; ``refused``, how many commands had no effect, by the rule they broke.
    """

    attributes: ClassVar[AttrTable] = ITS_ATTRIBUTES

    __slots__ = (
        "_vgic",
        "abi",
        "base",
        "baser",
        "cbaser",
        "collections",
        "creadr",
        "cwriter",
        "devices",
        "enabled",
        "event_id_bits",
        "group",
        "pages",
        "refused",
        "vm",
    )

    def __init__(self, vm: VmServices) -> None:
        self.vm = vm
        self.pages = Pages(vm.memory)
        self.event_id_bits: int = vm.options.get("lpi_id_bits", 16)
        self.base: int | None = None
        self.abi = 0
        """Revision of the table format."""
        self.enabled = False
        self.cbaser = self.creadr = self.cwriter = 0
        self.baser = list(BASER_RESET)
        self.devices: dict[int, ItsDevice] = {}
        self.collections: dict[int, Collection] = {}
        self.refused: dict[str, int] = {}
        self._vgic: Vgic | None = None
        self.group: ItsGroup = vm.its_list[0].group if vm.its_list else ItsGroup(vm)
        vm.its_list.append(self)
        if vm.irqchip is not None:
            vm.irqchip.propbaser = INITIAL_PROPBASER

    @classmethod
    def supported(cls, options: dict[str, Any]) -> bool:
        """Whether the host can have this device: it takes a GICv3."""
        return bool(options.get("host_gic", 3) == 3)

    @classmethod
    def create(cls, vm: VmServices) -> Its:
        """KVM_CREATE_DEVICE. The GIC may come before or after; GICR_PROPBASER of the VM is reset."""
        return cls(vm)

    def destroy(self) -> None:
        """The VM goes away."""
        self.invalidate_cache()

    @property
    def vgic(self) -> Vgic:
        """The GIC that has the LPIs. KvmError(EINVAL) while there is none, or one without LPIs."""
        if self._vgic is None:
            vgic = self.vm.irqchip
            if vgic is None or not issubclass(vgic.cpu_class, VgicV3Cpu):
                raise KvmError(errno.EINVAL, "LPIs need a GICv3, and the VM has none")
            self._vgic = vgic
        return self._vgic

    # -- MSIs -----------------------------------------------------------------------------------------------

    def signal(self, devid: int, eventid: int) -> int:
        """An MSI that is not remembered: 1 when it was made pending, 0 when nothing maps it.

        Raises:
            KvmError: EBUSY while the ITS is disabled, or LPIs are at the target.
        """
        lost = self.raise_event(devid, eventid)
        if lost is None:
            return 1
        if lost in (ITS_DISABLED, LPIS_DISABLED):
            raise KvmError(errno.EBUSY, f"{lost}: event {eventid} of device {devid:#x} is lost")
        return 0

    def raise_event(self, devid: int, eventid: int) -> str | None:
        """Translate an event, remember that, and make its LPI pending; or say why it is lost."""
        lost: str
        device = self.devices.get(devid)
        if not self.enabled:
            lost = ITS_DISABLED
        elif device is None:
            lost = "unmapped device"
        elif (irq := device.event(eventid)) is None:
            lost = "unmapped event"
        elif (collection := device.collections[eventid]) is None or collection.rdbase is None:
            lost = "unmapped collection"
        elif not self.vgic.cpus[collection.rdbase].lpis_enabled:
            lost = LPIS_DISABLED
        else:
            self.group.cache.add(((self.base or 0) + GITS_TRANSLATER, devid, eventid), irq)
            self.vgic.pend_edge(irq)
            return None
        # The guest sees no interrupt, so this is told to the ledger only.
        ledger = self.vm.ledger
        ledger.raised += 1
        ledger.drop(lost)
        return lost

    # -- the maps -------------------------------------------------------------------------------------------

    @property
    def lpi_limit(self) -> int:
        """The first INTID beyond the LPIs that GICR_PROPBASER provides for."""
        vgic = self.vm.irqchip
        bits = (vgic.propbaser & 0x1F) + 1 if vgic is not None else 0
        return 1 << min(bits, self.event_id_bits)

    def target(self, collection: Collection) -> VgicV3Cpu | None:
        """Where the events of a collection go to."""
        if collection.rdbase is None:
            return None
        cpu: VgicV3Cpu = self.vgic.cpus[collection.rdbase]
        return cpu

    def map_event(self, device: ItsDevice, eventid: int, lpi: int, collection: Collection) -> None:
        """Map an event that is not mapped.

        A new LPI takes its configuration from guest memory, and its pending bit too, which is cleared there.
        One that another event maps already keeps its state, its target included.

        Raises:
            KvmError: EFAULT when one of the LPI tables is not in RAM; nothing is mapped then.
        """
        vgic = self.vgic
        known = vgic.lpis.get(lpi)
        if known is not None and vgic.lpi(lpi) is known:
            irq = known
            shares = self.group.shares
            shares[lpi] = shares.get(lpi, 0) + 1
        else:
            # One that was unmapped while queued at a vCPU, and still is, comes back as it was.
            irq = vgic.add_lpi(lpi, self.target(collection))
            if irq is not known:
                try:
                    self._load(vgic, irq)
                except KvmError:
                    vgic.remove_lpi(irq)
                    raise
        device.map(eventid, irq, collection)

    def _load(self, vgic: Vgic, irq: VgicIrq) -> None:
        pages = self.pages
        load_config(vgic, irq, pages.read_u8)
        cpu = irq.target
        if cpu is not None:
            address, bit = pending_bit(irq, cpu)  # type: ignore[arg-type]
            stored = pages.read_u8(address)
            if stored & bit:
                vgic.pend_edge(irq)
                pages.write_u8(address, stored & ~bit)

    def release(self, irq: VgicIrq) -> None:
        """An event no longer maps ``irq``; with the last one the LPI is gone."""
        shares = self.group.shares
        others = shares.pop(irq.intid, 0)
        if not others:
            self.vgic.remove_lpi(irq)
        elif others > 1:
            shares[irq.intid] = others - 1

    def records(self) -> Iterator[ItsDevice]:
        """Every device, those hidden behind another of their id included."""
        for first in self.devices.values():
            device: ItsDevice | None = first
            while device is not None:
                yield device
                device = device.behind

    def add_device(self, device: ItsDevice) -> None:
        """Add a device. One whose id is taken is hidden: it has its events, and is not found by its id."""
        other = self.devices.setdefault(device.devid, device)
        if other is not device:
            while other.behind is not None:
                other = other.behind
            other.behind = device

    def drop_device(self, devid: int) -> None:
        """Unmap the device that is found by its id, if there is one; the next of that id comes to light."""
        device = self.devices.pop(devid, None)
        if device is None:
            return
        if device.behind is not None:
            self.devices[devid] = device.behind
        self.release_device(device)

    def release_device(self, device: ItsDevice) -> None:
        """The device is gone from the maps: so are its events."""
        for _, irq, _ in device.events():
            self.release(irq)
        self.invalidate_cache()

    def forget_devices(self) -> None:
        """Unmap all devices with their events."""
        devices = list(self.records())
        self.devices = {}
        for device in devices:
            self.release_device(device)

    def forget_collections(self) -> None:
        """Unmap all collections; events stay mapped and go nowhere. Cached translations stay as well."""
        collections, self.collections = self.collections, {}
        for collection in collections.values():
            self.detach(collection)

    def detach(self, collection: Collection) -> None:
        """Events of a collection that is gone lose it for good."""
        for device in self.records():
            device.detach(collection)

    def retarget(self, collection: Collection) -> None:
        """The collection goes to another vCPU: so do the LPIs of its events."""
        if not self.devices or self.vm.irqchip is None:
            return
        target, vgic = self.target(collection), self.vgic
        for device in self.records():
            for _, irq, where in device.events():
                if where is collection:
                    vgic.retarget(irq, target)

    def invalidate_cache(self) -> None:
        """Forget the cached translations, those of every ITS of the VM."""
        self.group.cache.forget()

    # -- commands and registers -----------------------------------------------------------------------------

    @property
    def queue_address(self) -> int:
        """Guest address of the command queue."""
        return self.cbaser & CBASER_ADDRESS

    @property
    def queue_size(self) -> int:
        """Length of the command queue in bytes."""
        return ((self.cbaser & 0xFF) + 1) << 12

    def refuse(self, rule: str) -> None:
        """A command had no effect because of ``rule``."""
        self.refused[rule] = self.refused.get(rule, 0) + 1

    def process(self) -> None:
        """Run the commands that are there, if the ITS is enabled."""
        if self.enabled:
            run_queue(self)

    def enable(self, on: bool) -> None:
        """GITS_CTLR.Enabled. Enabling runs the command queue, and takes both tables and the queue to be valid."""
        if on and not self.enabled and not (self.baser[0] & self.baser[1] & self.cbaser & VALID):
            return
        self.enabled = on
        if on:
            self.process()
        else:
            self.invalidate_cache()

    def reset(self) -> None:
        """KVM_DEV_ARM_ITS_CTRL_RESET: address, table format and all of BASER but Valid are kept."""
        self.baser = [value & ~VALID for value in self.baser]
        self.cbaser = self.creadr = self.cwriter = 0
        self.enabled = False
        self.forget_devices()
        self.forget_collections()

    def place(self, base: int) -> None:
        """Give the ITS its address, which is there for the guest from now on.

        KVM looks for overlap with nothing; where frames overlap, the first one placed answers.
        """
        self.base = base
        self.vm.mmio.add(base, ITS_SIZE, self, shadow=True)

    def mmio_read(self, offset: int, size: int, vcpu: Any) -> int:
        """A guest's read from the frame."""
        return GITS.read(self, offset, size) if offset < GITS_FRAME_SIZE else 0

    def mmio_write(self, offset: int, size: int, value: int, vcpu: Any) -> None:
        """A guest's write to the frame. A vCPU has no device id, so what it writes to the doorbell is lost."""
        if offset < GITS_FRAME_SIZE:
            GITS.write(self, offset, size, value)

    # -- state ----------------------------------------------------------------------------------------------

    def state(self) -> ItsState:
        """Everything the ITS knows; the LPIs themselves are the GIC's."""
        return ItsState.of(self)

    @classmethod
    def from_state(cls, vm: VmServices, state: ItsState) -> Its:
        """An ITS that goes on where ``state`` was taken, in a VM whose GIC has been restored before."""
        propbaser = vm.irqchip.propbaser if vm.irqchip is not None else 0
        its = cls.create(vm)
        if vm.irqchip is not None:
            vm.irqchip.propbaser = propbaser
        state.apply(its)
        return its

    def _check(self) -> None:
        """Assert the invariants of the maps, the cache and the queue."""
        assert not (self.creadr | self.cwriter) & 0x1F
        assert max(self.creadr, self.cwriter) < self.queue_size
        seen: dict[int, int] = {}
        for its in self.vm.its_list:
            assert all(devid == device.devid for devid, device in its.devices.items())
            for device in its.records():
                device._check()
                assert device.behind is None or device.behind.devid == device.devid
                for _, irq, collection in device.events():
                    assert its.vgic.lpi(irq.intid) is irq
                    assert collection is None or its.collections[collection.icid] is collection
                    seen[irq.intid] = seen.get(irq.intid, 0) + 1
        assert self.group.shares == {lpi: count - 1 for lpi, count in seen.items() if count > 1}
        for icid, collection in self.collections.items():
            assert icid == collection.icid
            assert collection.rdbase is None or collection.rdbase < len(self.vm.vcpus)
        self.group.cache._check()


# -- the ways in ------------------------------------------------------------------------------------------------


def signal_msi(vm: VmServices, msi: KvmMsi) -> int:
    """KVM_SIGNAL_MSI, and what an irqfd with an MSI route does.

    Returns:
        1 when the MSI was made pending, 0 when no event is mapped to it.

    Raises:
        KvmError: EINVAL for no in-kernel GIC, unknown flags, no device id, or an address in no ITS; ENODEV
            without an ITS; EBUSY while the ITS, or LPIs at the target, are disabled.
    """
    return signal_message(vm, msi.address_hi << 32 | msi.address_lo, msi.data, msi.flags, msi.devid)


def signal_message(vm: VmServices, address: int, data: int, flags: int, devid: int) -> int:
    """:func:`signal_msi` for those who have the message in parts."""
    if vm.irqchip is None:
        raise KvmError(errno.EINVAL, "the VM has no in-kernel interrupt controller")
    if flags & ~KVM_MSI_VALID_DEVID:
        raise KvmError(errno.EINVAL, f"flags must be 0 or {KVM_MSI_VALID_DEVID}, not {flags:#x}")
    its_list = vm.its_list
    if its_list and (irq := its_list[0].group.cache.find((address, devid, data))) is not None:
        vm.irqchip.pend_edge(irq)
        return 1
    if not its_list or not issubclass(vm.irqchip.cpu_class, VgicV3Cpu):
        raise _lost(vm, errno.ENODEV, "no ITS")
    if not flags & KVM_MSI_VALID_DEVID:
        raise _lost(vm, errno.EINVAL, "MSI without a device id")
    place = vm.mmio.find(address)
    if place is None or not isinstance(place[0], Its):
        raise _lost(vm, errno.EINVAL, "no ITS at the MSI address")
    return place[0].signal(devid, data)


def _lost(vm: VmServices, code: int, reason: str) -> KvmError:
    vm.ledger.raised += 1
    vm.ledger.drop(reason)
    return KvmError(code, reason)


class MsiSender:
    """``signal_msi(vm, msi)`` bound to its arguments, for a sender that raises the same MSI again and again.

    A call returns what the ioctl would: 1, 0, or a negative errno. Who calls it may set ``shortcut``, a function that
    is given a function and its argument which do the same with no look-up for as long as the translation is cached,
    and None twice when it is not any more.
    """

    __slots__ = ("_message", "_vm", "shortcut")

    def __init__(self, vm: VmServices, msi: KvmMsi) -> None:
        self._vm = vm
        self._message = (msi.address_hi << 32 | msi.address_lo, msi.data, msi.flags, msi.devid)
        self.shortcut: Shortcut | None = None

    def __call__(self) -> int:
        vm = self._vm
        try:
            result = signal_message(vm, *self._message)
        except KvmError as error:
            return -(error.errno or errno.EINVAL)
        if result and self.shortcut is not None:
            address, data, _, devid = self._message
            vm.its_list[0].group.cache.lend((address, devid, data), self.shortcut, vm.irqchip.pend)
        return result
