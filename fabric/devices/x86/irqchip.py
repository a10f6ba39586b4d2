"""The in-kernel irqchip of an x86 VM: what KVM_CREATE_IRQCHIP makes, whole or split.

Whole, it is the 8259 pair, the IOAPIC and the local APICs; split (KVM_CAP_SPLIT_IRQCHIP) the local APICs alone, while
the VMM has PIC, PIT and IOAPIC and sends their messages itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric.devices.x86 import ioapic as ioapic_module
from fabric.devices.x86.apic_bus import ApicBus
from fabric.devices.x86.ioapic import Ioapic
from fabric.devices.x86.pic import PORT_ELCR, PORT_MASTER, PORT_SLAVE, Pic
from fabric.memory import MmioHandler

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric.devices.base import IrqEvents, VmServices

CHIP_MASTER, CHIP_SLAVE, CHIP_IOAPIC = 0, 1, 2
"""Numbers of the chips in routes and in KVM_GET_IRQCHIP."""
SOURCE_USERSPACE, SOURCE_RESAMPLE, SOURCE_PIT = 0, 1, 2
"""Who drives a line; it is high while one of them holds it high."""

_PORTS = ((PORT_MASTER, 2), (PORT_SLAVE, 2), (PORT_ELCR, 2))


class X86Irqchip:
    """``vm.irqchip`` of an x86 VM.

    Args:
        vm: its VM.
        split: only the local APICs.
        reserved_pins: with ``split``, GSIs below it belong to the VMM's IOAPIC: the end of their interrupts exits.
    """

    __slots__ = (
        "_ended",
        "_events",
        "apics",
        "gsi_ended",
        "gsi_unmasked",
        "ioapic",
        "pic",
        "pit",
        "reserved_pins",
        "split",
        "vm",
    )

    def __init__(self, vm: VmServices, *, split: bool = False, reserved_pins: int = 0) -> None:
        self.vm = vm
        self.split = split
        self.reserved_pins = reserved_pins
        self._events: IrqEvents | None = None
        self._ended: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self.gsi_ended: dict[int, list[Callable[[], None]]] = {}
        """By GSI: called at the end of an interrupt of an input that it is routed to."""
        self.gsi_unmasked: dict[int, list[Callable[[], None]]] = {}
        """By GSI: called when such an input is unmasked."""
        self.apics = ApicBus(vm)
        self.apics.directed_eoi = split
        self.pic: Pic | None = None
        self.ioapic: Ioapic | None = None
        self.pit: Any = None
        """The 8254, once it was created."""
        if not split:
            self.pic = Pic(vm.ledger, self.apics.set_extint, self.pin_ended, self.pin_masked)
            self.ioapic = Ioapic(self.apics, vm.ledger, self.pin_ended, self.pin_masked, resample=self.resample)
            self.apics.eoi_listeners.append(self.ioapic.eoi)
            vm.mmio.add(ioapic_module.BASE, ioapic_module.SIZE, self.ioapic)
            for port, size in _PORTS:
                vm.pio.add(port, size, PicPorts(self.pic, port))
        self.events = vm.events
        vm.irqchip = self

    @property
    def events(self) -> IrqEvents | None:
        """Who is told about each interrupt; may be set at any time."""
        return self._events

    @events.setter
    def events(self, events: IrqEvents | None) -> None:
        self._events = events
        self.apics.events = events
        if self.pic is not None:
            self.pic.events = events

    def set_pin(self, chip: int, pin: int, level: bool, source: int, *, reported: bool = False) -> int:
        """Drive an input as a route names it; the status as KVM_IRQ_LINE_STATUS reports it."""
        if chip == CHIP_IOAPIC:
            return -1 if self.ioapic is None else self.ioapic.set_irq(pin, level, source, reported=reported)
        return -1 if self.pic is None else self.pic.set_irq(8 * chip + pin, level, source)

    def notifiers(self, chip: int, pin: int) -> list[Callable[[], None]]:
        """The functions called at the end of an interrupt of that input."""
        return self._ended.setdefault((chip, pin), [])

    def pin_ended(self, chip: int, pin: int) -> None:
        """An interrupt of an input ended."""
        for notify in tuple(self._ended.get((chip, pin), ())):
            notify()
        if self.gsi_ended:
            for notify in self.gsi_ended.get(self._gsi(chip, pin), ()):
                notify()

    def resample(self, chip: int, pin: int) -> bool:
        """Have an input's level said anew by those that wait for the end of its interrupts; whether there are any."""
        told = tuple(self._ended.get((chip, pin), ()))
        for notify in told:
            notify()
        return bool(told)

    def pin_masked(self, chip: int, pin: int, masked: bool) -> None:
        """The mask of an input changed."""
        if not masked and self.gsi_unmasked:
            for notify in self.gsi_unmasked.get(self._gsi(chip, pin), ()):
                notify()

    def _gsi(self, chip: int, pin: int) -> int:
        gsi = self.vm.gsi_of_pin(chip, pin)
        return -1 if gsi is None else gsi

    def clear_source(self, source: int) -> None:
        """``source`` is gone."""
        if self.ioapic is not None:
            self.ioapic.clear_source(source)
        if self.pic is not None:
            self.pic.clear_source(source)

    def _check(self) -> None:
        """Assert the invariants."""
        if self.pic is not None:
            self.pic._check()
        self.apics._check()


class PicPorts(MmioHandler):
    """A range of ports of the 8259 pair. Only bytes: wider accesses read as 0 and write nothing."""

    __slots__ = ("base", "pic")

    def __init__(self, pic: Pic, base: int) -> None:
        self.pic = pic
        self.base = base

    def mmio_read(self, offset: int, size: int, vcpu: Any) -> int:
        """``in`` of a byte."""
        return self.pic.read_port(self.base + offset) if size == 1 else 0

    def mmio_write(self, offset: int, size: int, value: int, vcpu: Any) -> None:
        """``out`` of a byte."""
        if size == 1:
            self.pic.write_port(self.base + offset, value)
