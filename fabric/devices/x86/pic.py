"""The 8259A pair: two interrupt controllers of eight inputs, the second cascaded into input 2 of the first.

Ports: 0x20 and 0x21 (master), 0xa0 and 0xa1 (slave), and the edge/level control registers 0x4d0 and 0x4d1. The output
of the master is the ExtINT input of the local APICs; the CPU that takes it reads a vector (:meth:`Pic.acknowledge`).

Accounting: an input counts as raised when it waits unmasked for the CPU; it is delivered when the CPU acknowledges it,
and a level that is still high when its service ends counts as another one. An input that goes low before is dropped.

Sources: Intel 8259A data sheet; the PIIX's ELCR; struct kvm_pic_state of the KVM API document.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric.devices.base import IrqEvents
    from fabric.trace.ledger import Ledger

CASCADE = 2
"""The input of the master that the slave drives."""
SPURIOUS = 7
PORT_MASTER, PORT_SLAVE, PORT_ELCR = 0x20, 0xA0, 0x4D0
ELCR_MASTER, ELCR_SLAVE = 0xF8, 0xDE
"""Inputs that may be level-triggered: not the timer, the keyboard, the cascade, the clock and the coprocessor."""

ICW1_INIT = 1 << 4
ICW1_ICW4 = 1 << 0
ICW1_SINGLE = 1 << 1
ICW1_LEVEL = 1 << 3
ICW4_AUTO_EOI = 1 << 1
ICW4_SPECIAL_FULLY_NESTED = 1 << 4
OCW3 = 1 << 3
OCW3_READ_ISR = 3
OCW3_READ_IRR = 2
OCW3_POLL = 1 << 2
OCW3_SET_SPECIAL_MASK = 1 << 6
OCW3_SPECIAL_MASK = 1 << 5

STATE = (
    "last_irr",
    "irr",
    "imr",
    "isr",
    "priority_add",
    "irq_base",
    "read_reg_select",
    "poll",
    "special_mask",
    "init_state",
    "auto_eoi",
    "rotate_on_auto_eoi",
    "special_fully_nested_mode",
    "init4",
    "elcr",
    "elcr_mask",
)
"""The members of struct kvm_pic_state, a byte each."""


class PicChip:
    """One 8259A; its registers have the names of struct kvm_pic_state."""

    __slots__ = (*STATE, "first_pin", "open", "pic")

    last_irr: int
    irr: int
    imr: int
    isr: int
    priority_add: int
    irq_base: int
    read_reg_select: int
    poll: int
    special_mask: int
    init_state: int
    auto_eoi: int
    rotate_on_auto_eoi: int
    special_fully_nested_mode: int
    init4: int
    elcr: int
    elcr_mask: int

    def __init__(self, pic: Pic, first_pin: int, elcr_mask: int) -> None:
        self.pic = pic
        self.first_pin = first_pin
        """0 or 8: its inputs among the 16 of the pair."""
        for name in STATE:
            setattr(self, name, 0)
        self.elcr_mask = elcr_mask
        self.open = 0
        """Inputs that are in the account: raised and not finished."""

    def set_input(self, pin: int, level: bool) -> int:
        """Drive input ``pin`` (0 to 7): -1 masked, 0 nothing new, 1 latched or lowered."""
        bit = 1 << pin
        status = 1
        if self.elcr & bit:
            if level:
                status = 0 if self.irr & bit else 1
                self.irr |= bit
                self.last_irr |= bit
            else:
                self.irr &= ~bit
                self.last_irr &= ~bit
        elif level:
            if not self.last_irr & bit:
                status = 0 if self.irr & bit else 1
                self.irr |= bit
            self.last_irr |= bit
        else:
            self.last_irr &= ~bit
        return -1 if self.imr & bit else status

    def _first(self, mask: int) -> int:
        """Rank (0 the highest) of the first input in ``mask``, 8 when it is empty."""
        turned = (mask << 8 | mask) >> self.priority_add & 0xFF
        return (turned & -turned).bit_length() - 1 if turned else 8

    def pending(self) -> int:
        """The input to be served next, or -1: it must have priority over what is in service."""
        rank = self._first(self.irr & ~self.imr)
        if rank == 8:
            return -1
        # KVM keeps special mask mode, but masked inputs in service hold back others all the same.
        in_service = self.isr
        if self.special_fully_nested_mode and not self.first_pin:
            # The slave may interrupt its own service routine.
            in_service &= ~(1 << CASCADE)
        return rank + self.priority_add & 7 if rank < self._first(in_service) else -1

    def acknowledge(self, pin: int) -> None:
        """The CPU takes input ``pin``."""
        bit = 1 << pin
        self.isr |= bit
        if not self.elcr & bit:
            self.irr &= ~bit
        if self.auto_eoi:
            if self.rotate_on_auto_eoi:
                self.priority_add = pin + 1 & 7
            self.end(pin)

    def end(self, pin: int) -> None:
        """The service of ``pin`` ends."""
        self.isr &= ~(1 << pin)
        self.pic.ended(self.first_pin + pin)

    def reset(self) -> None:
        """ICW1: an edge must come anew to be seen, the mask is open, the lowest priority is that of input 7.

        What is in service stays so, as do rotation and a poll command: the data sheet's list for ICW1 has none of it.
        """
        edges = self.irr & ~self.elcr
        self.last_irr = 0
        self.irr &= self.elcr
        self.imr = self.priority_add = 0
        self.special_mask = self.read_reg_select = 0
        if not self.init4:
            self.special_fully_nested_mode = self.auto_eoi = 0
        self.init_state = 1
        for pin in range(8):
            if edges >> pin & 1:
                self.end(pin)

    # -- ports

    def write_command(self, value: int) -> None:
        """The even port: ICW1, OCW2 or OCW3."""
        if value & ICW1_INIT:
            self.init4 = value & ICW1_ICW4
            self.reset()
        elif value & OCW3:
            if value & OCW3_POLL:
                self.poll = 1
            if value & 2:
                self.read_reg_select = value & 1
            if value & OCW3_SET_SPECIAL_MASK:
                self.special_mask = value >> 5 & 1
        else:
            self._end_command(value >> 5, value & 7)

    def _end_command(self, command: int, pin: int) -> None:
        """OCW2: rotation (bit 2), a named input (bit 1), end of interrupt (bit 0)."""
        if command in (0, 4):
            self.rotate_on_auto_eoi = command >> 2
        elif command in (1, 5):
            rank = self._first(self.isr)
            if rank < 8:
                served = rank + self.priority_add & 7
                if command == 5:
                    self.priority_add = served + 1 & 7
                self.end(served)
        elif command == 3:
            self.end(pin)
        elif command == 6:
            self.priority_add = pin + 1 & 7
        elif command == 7:
            self.priority_add = pin + 1 & 7
            self.end(pin)

    def write_data(self, value: int) -> None:
        """The odd port: ICW2 to ICW4 while being initialised, otherwise the mask."""
        if self.init_state == 0:
            changed = self.imr ^ value
            self.imr = value
            self.pic.masked(self.first_pin, changed, value)
        elif self.init_state == 1:
            self.irq_base = value & 0xF8
            self.init_state = 2
        elif self.init_state == 2:
            self.init_state = 3 if self.init4 else 0
        else:
            self.special_fully_nested_mode = value >> 4 & 1
            self.auto_eoi = value >> 1 & 1
            self.init_state = 0

    def read(self, odd: int) -> int:
        """A port: the mask, or IRR or ISR as OCW3 chose; after a poll command the input that asks, now taken."""
        if self.poll:
            self.poll = 0
            return self._poll()
        if odd:
            return int(self.imr)
        return int(self.isr if self.read_reg_select else self.irr)

    def _poll(self) -> int:
        pin = self.pending()
        if pin < 0:
            # What asked is gone.
            return SPURIOUS
        if self.first_pin or pin != CASCADE:
            self.pic.taken(self, pin)
        self.irr &= ~(1 << pin)
        self.end(pin)
        return 0x80 | pin


class Pic:
    """The pair.

    Args:
        ledger: the account.
        output: called with the level of the pair's output (the ExtINT line) whenever it may have changed.
        on_end: called with (chip, input) when the service of an input ends.
        on_mask: called with (chip, input, whether it is masked now) when that changes.
    """

    __slots__ = ("_on_end", "_on_mask", "_output", "chips", "events", "ledger", "level", "sources")

    def __init__(
        self,
        ledger: Ledger,
        output: Callable[[bool], None],
        on_end: Callable[[int, int], None],
        on_mask: Callable[[int, int, bool], None],
    ) -> None:
        self._on_end = on_end
        self._on_mask = on_mask
        self.ledger = ledger
        self.events: IrqEvents | None = None
        self._output = output
        self.level = False
        self.chips = (PicChip(self, 0, ELCR_MASTER), PicChip(self, 8, ELCR_SLAVE))
        self.sources = [0] * 16
        """Who holds each input high: a bit a source."""
        ledger.add_pending_probe(self.count_open)

    # -- lines

    def set_irq(self, pin: int, level: bool, source: int) -> int:
        """Source ``source`` drives input ``pin`` (0 to 15), which is high while any source holds it so."""
        bit = 1 << source
        self.sources[pin] = self.sources[pin] | bit if level else self.sources[pin] & ~bit
        chip = self.chips[pin >> 3]
        before = chip.irr
        high = bool(self.sources[pin])
        status = chip.set_input(pin & 7, high)
        if high and status == 0 and chip.open >> (pin & 7) & before >> (pin & 7) & 1:
            self.ledger.raised += 1
            self.ledger.coalesced += 1
        self.update()
        return status

    def clear_source(self, source: int) -> None:
        """``source`` is gone and holds nothing high any more; the inputs notice at their next change."""
        for pin in range(16):
            self.sources[pin] &= ~(1 << source)

    def update(self, *, cascade: bool = True) -> None:
        """Something changed: drive the cascade and the output, and keep the account."""
        master, slave = self.chips
        if cascade and slave.pending() >= 0:
            # The cascade is an edge: it must be seen anew each time.
            master.set_input(CASCADE, True)
            master.set_input(CASCADE, False)
        self._account(master, ~(1 << CASCADE))
        self._account(slave, 0xFF)
        self.level = master.pending() >= 0
        self._output(self.level)

    def acknowledge(self) -> int:
        """INTA: the vector of the input with the highest priority, which is in service now; of input 7 if none is."""
        master, slave = self.chips
        pin = master.pending()
        if pin < 0:
            vector = master.irq_base + SPURIOUS
        elif pin == CASCADE:
            master.acknowledge(pin)
            slave_pin = slave.pending()
            if slave_pin >= 0:
                self.taken(slave, slave_pin)
                slave.acknowledge(slave_pin)
            else:
                slave_pin = SPURIOUS
            vector = slave.irq_base + slave_pin
        else:
            self.taken(master, pin)
            master.acknowledge(pin)
            vector = master.irq_base + pin
        self.update()
        return int(vector)

    # -- ports

    def read_port(self, port: int) -> int:
        """A byte from 0x20, 0x21, 0xa0, 0xa1, 0x4d0 or 0x4d1."""
        if port >= PORT_ELCR:
            return int(self.chips[port - PORT_ELCR].elcr)
        chip = self.chips[port >> 7]
        polled = chip.poll
        value = chip.read(port & 1)
        if polled:
            if chip.first_pin and value & 0x80:
                # Polling the slave takes its request to the master as well.
                master = self.chips[0]
                master.isr &= ~(1 << CASCADE)
                master.irr &= ~(1 << CASCADE)
            # The guest that was told of the slave polls that one next.
            self.update(cascade=bool(chip.first_pin) or value != 0x80 | CASCADE)
        return value

    def write_port(self, port: int, value: int) -> None:
        """A byte to one of these ports."""
        value &= 0xFF
        if port >= PORT_ELCR:
            chip = self.chips[port - PORT_ELCR]
            chip.elcr = value & chip.elcr_mask
        elif port & 1:
            self.chips[port >> 7].write_data(value)
        else:
            self.chips[port >> 7].write_command(value)
            if value & (ICW1_INIT | OCW3) == OCW3:
                return  # which changes only what is read
        self.update()

    # -- state

    def state(self, chip: int) -> dict[str, int]:
        """The members of struct kvm_pic_state of chip 0 or 1."""
        return {name: getattr(self.chips[chip], name) for name in STATE}

    def set_state(self, chip: int, state: dict[str, int]) -> None:
        """As read by :meth:`state`, any values."""
        target = self.chips[chip]
        for name in STATE:
            setattr(target, name, state[name])
        self.update()

    # -- what the chips tell

    def taken(self, chip: PicChip, pin: int) -> None:
        """The CPU took an input."""
        bit = 1 << pin
        if not chip.open & bit:
            self.ledger.raised += 1
        chip.open &= ~bit
        self.ledger.delivered += 1
        if self.events is not None:
            self.events.acknowledged(0, chip.irq_base + pin)

    def ended(self, pin: int) -> None:
        """The service of an input ended."""
        chip = self.chips[pin >> 3]
        if self.events is not None:
            self.events.completed(0, chip.irq_base + (pin & 7))
        self._on_end(pin >> 3, pin & 7)

    def masked(self, first_pin: int, changed: int, imr: int) -> None:
        """The mask of a chip changed."""
        for pin in range(8):
            if changed >> pin & 1:
                self._on_mask(first_pin >> 3, pin, bool(imr >> pin & 1))

    def count_open(self) -> int:
        """Inputs that wait."""
        return sum(chip.open.bit_count() for chip in self.chips)

    def _account(self, chip: PicChip, pins: int) -> None:
        gone = chip.open & ~chip.irr
        if gone:
            chip.open &= ~gone
            self.ledger.drop("line lowered", gone.bit_count())
        waiting = chip.irr & ~chip.imr & ~chip.isr & pins & 0xFF & ~chip.open
        if waiting:
            chip.open |= waiting
            self.ledger.raised += waiting.bit_count()
            if self.events is not None:
                for pin in range(8):
                    if waiting >> pin & 1:
                        self.events.pending(0, chip.irq_base + pin)

    def _check(self) -> None:
        """Assert the invariants."""
        master: Any = self.chips[0]
        assert self.level == (master.pending() >= 0)
        for chip in self.chips:
            assert not chip.open & ~chip.irr
            assert all(0 <= getattr(chip, name) <= 0xFF for name in STATE)
