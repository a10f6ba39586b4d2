"""The IOAPIC: 24 inputs, each with a redirection entry that says which message it sends to which local APICs.

An edge sends its message once. A level sends it and sets remote IRR; the end of that interrupt at a local APIC comes
back (:meth:`Ioapic.eoi`), clears remote IRR, and sends again while the line is high.

Status of an input, as KVM_IRQ_LINE_STATUS reports it: -1 nothing went out (masked, in service, or nobody there), 0
merged into one that waits already, n taken by n local APICs; 1 for a line that is lowered.

Accounting: the local APICs account for messages. Here an edge that is merged counts as raised and coalesced, one that
meets a masked entry as dropped.

Kept from KVM: the polarity of an entry is not looked at (KVM_CAP_IOAPIC_POLARITY_IGNORED); the input of the clock (8)
does not send again before every local APIC that took it has ended it.

Sources: Intel 82093AA data sheet; struct kvm_ioapic_state of the KVM API document.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric.memory import MmioHandler

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric.devices.x86.apic_bus import ApicBus
    from fabric.trace.ledger import Ledger

CHIP = 2
"""Its number among the chips of an irqchip."""
PINS = 24
BASE = 0xFEC0_0000
SIZE = 0x100
"""Of its memory window."""
IOREGSEL, IOWIN, IOEOI = 0x00, 0x10, 0x40
"""Offsets in the window; IOEOI exists from version 0x20 on."""
IOAPICID, IOAPICVER, IOAPICARB, IOREDTBL = 0x00, 0x01, 0x02, 0x10
"""Registers behind the window."""
VERSION = 0x11
RTC_PIN = 8

# Redirection entries.
VECTOR = 0xFF
DELIVERY_MODE_SHIFT = 8
DEST_LOGICAL = 1 << 11
DELIVERY_STATUS = 1 << 12
REMOTE_IRR = 1 << 14
LEVEL = 1 << 15
MASKED = 1 << 16
DEST_SHIFT = 56
LOW_WRITABLE = 0xFFFF_FFFF & ~(DELIVERY_STATUS | REMOTE_IRR)


class Ioapic(MmioHandler):
    """The IOAPIC of a VM.

    Args:
        bus: where its messages go.
        ledger: the account.
        on_end: called with (2, input) when an interrupt that an input sent ends.
        on_mask: called with (2, input, whether it is masked now) when that changes.
        resample: called with (2, input) when a level that waited is unmasked; whether somebody says anew what it is.
        rtc_coalescing: report the clock's interrupt as merged while an earlier one is in service.
    """

    __slots__ = (
        "_on_end",
        "_on_mask",
        "_resample",
        "base_address",
        "bus",
        "id",
        "ioregsel",
        "irr",
        "irr_delivered",
        "ledger",
        "pad",
        "redirtbl",
        "rtc_coalescing",
        "rtc_waiting",
        "sources",
    )

    def __init__(
        self,
        bus: ApicBus,
        ledger: Ledger,
        on_end: Callable[[int, int], None],
        on_mask: Callable[[int, int, bool], None],
        *,
        resample: Callable[[int, int], bool] | None = None,
        rtc_coalescing: bool = True,
    ) -> None:
        self._on_end = on_end
        self._on_mask = on_mask
        self._resample = resample
        self.bus = bus
        self.ledger = ledger
        self.rtc_coalescing = rtc_coalescing
        self.base_address = BASE
        self.ioregsel = 0
        self.pad = 0
        self.id = 0
        self.irr = 0
        """Inputs that are high or, edge-triggered and masked, were."""
        self.irr_delivered = 0
        """Edge-triggered inputs whose message went out; they stay in ``irr`` until lowered."""
        self.redirtbl = [MASKED] * PINS
        self.sources = [0] * PINS
        """Who holds each input high: a bit a source."""
        self.rtc_waiting: list[Any] = []
        """Local APICs that have not ended the clock's last interrupt."""
        self._watch()

    # -- lines

    def set_irq(self, pin: int, level: bool, source: int, *, reported: bool = False) -> int:
        """Source ``source`` drives input ``pin``, which is high while any source holds it so.

        ``reported`` says that the caller learns what became of it (KVM_IRQ_LINE_STATUS).
        """
        bit = 1 << source
        self.sources[pin] = self.sources[pin] | bit if level else self.sources[pin] & ~bit
        return self._drive(pin, bool(self.sources[pin]), reported)

    def clear_source(self, source: int) -> None:
        """``source`` is gone and holds nothing high any more; the inputs notice at their next change."""
        for pin in range(PINS):
            self.sources[pin] &= ~(1 << source)

    def _drive(self, pin: int, level: bool, reported: bool) -> int:
        bit = 1 << pin
        if not level:
            self.irr &= ~bit
            return 1
        edge = not self.redirtbl[pin] & LEVEL
        if pin == RTC_PIN and reported and self.rtc_coalescing and self.rtc_waiting:
            self._merged()
            return 0
        was_high = self.irr & bit
        self.irr |= bit
        if edge:
            self.irr_delivered &= ~bit
            if was_high:
                self._merged()
                return 0
        status = self._send(pin, reported)
        if status < 0 and edge and self.redirtbl[pin] & MASKED:
            self.ledger.raised += 1
            self.ledger.drop("IOAPIC entry masked")
        return status

    def _merged(self) -> None:
        self.ledger.raised += 1
        self.ledger.coalesced += 1

    def _send(self, pin: int, reported: bool = False) -> int:
        """Send the message of an input unless it is masked or a level in service."""
        entry = self.redirtbl[pin]
        if entry & MASKED or (entry & LEVEL and entry & REMOTE_IRR):
            return -1
        if not entry & LEVEL:
            self.irr_delivered |= 1 << pin
        takers: list[Any] | None = [] if pin == RTC_PIN and reported else None
        status = self.bus.deliver(
            entry >> DEST_SHIFT,
            bool(entry & DEST_LOGICAL),
            entry >> DELIVERY_MODE_SHIFT & 7,
            entry & VECTOR,
            True,
            1 if entry & LEVEL else 0,
            takers=takers,
        )
        if takers:
            self.rtc_waiting = takers
        if status and entry & LEVEL:
            # Also when nobody was there.
            self.redirtbl[pin] |= REMOTE_IRR
        return status

    def eoi(self, vector: int, apic: Any, level: bool) -> None:
        """A local APIC ended ``vector``; ``level`` is its trigger mode there."""
        if self.rtc_waiting and self.redirtbl[RTC_PIN] & VECTOR == vector and apic in self.rtc_waiting:
            self.rtc_waiting.remove(apic)
        for pin, entry in enumerate(self.redirtbl):
            if entry & VECTOR != vector:
                continue
            self._on_end(CHIP, pin)
            if not level or not entry & LEVEL:
                continue
            self.redirtbl[pin] &= ~REMOTE_IRR
            if not self.redirtbl[pin] & MASKED and self.irr >> pin & 1:
                self._send(pin)

    def restore_rtc(self, apic: Any) -> None:
        """The state of ``apic`` was set from outside: it has the clock's interrupt to end, or not any more."""
        entry = self.redirtbl[RTC_PIN]
        if not self.bus.matches(apic, entry >> DEST_SHIFT, bool(entry & DEST_LOGICAL)):
            return
        holds = apic.holds(entry & VECTOR)
        if holds and apic not in self.rtc_waiting:
            self.rtc_waiting.append(apic)
        elif not holds and apic in self.rtc_waiting:
            self.rtc_waiting.remove(apic)

    # -- registers

    def mmio_read(self, offset: int, size: int, vcpu: Any) -> int:
        """IOREGSEL at 0, IOWIN at 0x10; the rest reads as 0."""
        if offset & 0xF0 == IOREGSEL:
            return self.ioregsel
        if offset & 0xF0 == IOWIN:
            return self._read() & (1 << 8 * size) - 1
        return 0

    def mmio_write(self, offset: int, size: int, value: int, vcpu: Any) -> None:
        """IOREGSEL takes a byte, IOWIN 32 bits."""
        if offset & 0xF0 == IOREGSEL:
            self.ioregsel = value & 0xFF
        elif offset & 0xF0 == IOWIN:
            self._write(value & 0xFFFF_FFFF)

    def _read(self) -> int:
        if self.ioregsel == IOAPICVER:
            return PINS - 1 << 16 | VERSION
        if self.ioregsel in (IOAPICID, IOAPICARB):
            return (self.id & 0xF) << 24
        pin, high = divmod(self.ioregsel - IOREDTBL, 2)
        if not 0 <= pin < PINS:
            return 0xFFFF_FFFF if pin >= PINS else 0
        return self.redirtbl[pin] >> 32 if high else self.redirtbl[pin] & 0xFFFF_FFFF

    def _write(self, value: int) -> None:
        if self.ioregsel == IOAPICID:
            self.id = value >> 24 & 0xF
            return
        pin, high = divmod(self.ioregsel - IOREDTBL, 2)
        if not 0 <= pin < PINS:
            return
        before = self.redirtbl[pin]
        if high:
            self.redirtbl[pin] = before & 0xFFFF_FFFF | value << 32
        else:
            self.redirtbl[pin] = before & ~LOW_WRITABLE | value & LOW_WRITABLE
            if not value & LEVEL:
                # How a guest without directed EOI ends a level: to edge and back.
                self.redirtbl[pin] &= ~REMOTE_IRR
        self._watch()
        self._entry_changed(pin, before)

    def _watch(self) -> None:
        """Only the ends of the vectors in the table are of interest."""
        watched = 0
        for entry in self.redirtbl:
            watched |= 1 << (entry & VECTOR)
        self.bus.watched = watched

    def _entry_changed(self, pin: int, before: int) -> None:
        entry = self.redirtbl[pin]
        if (before ^ entry) & MASKED:
            self._on_mask(CHIP, pin, bool(entry & MASKED))
        if not entry & LEVEL or entry & (MASKED | REMOTE_IRR) or not self.irr >> pin & 1:
            return
        # The device may have been served while the entry was masked: with a resampler nothing is sent before it has
        # said so, lest a guest that serves first and unmasks then gets one interrupt too many.
        self.irr &= ~(1 << pin)
        if self._resample is None or not self._resample(CHIP, pin):
            self.irr |= 1 << pin
            self._send(pin)

    # -- state

    def state(self) -> dict[str, Any]:
        """The members of struct kvm_ioapic_state. An edge that went out is not in ``irr``."""
        return {
            "base_address": self.base_address,
            "ioregsel": self.ioregsel,
            "id": self.id,
            "irr": self.irr & ~self.irr_delivered,
            "pad": self.pad,
            "redirtbl": tuple(self.redirtbl),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """As read by :meth:`state`, any values. Inputs in ``irr`` are driven high, and send what they have to."""
        self.base_address = state["base_address"]
        self.ioregsel = state["ioregsel"]
        self.id = state["id"]
        self.pad = state["pad"]
        self.redirtbl = list(state["redirtbl"])
        self._watch()
        self.irr = self.irr_delivered = 0
        self.rtc_waiting = []
        for apic in self.bus.apics:
            self.restore_rtc(apic)
        waiting = state["irr"]
        for pin in range(PINS):
            if waiting >> pin & 1:
                self._drive(pin, True, False)
