"""The 8259A pair through its ports, one rule of the data sheet a test, and random lives against a model of lists."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fabric.devices.x86.pic import Pic
from fabric.trace.ledger import Ledger

MASTER, SLAVE, ELCR = 0x20, 0xA0, 0x4D0
EOI, ROTATE_EOI, SPECIFIC_EOI, ROTATE_SPECIFIC_EOI, SET_PRIORITY = 0x20, 0xA0, 0x60, 0xE0, 0xC0
ROTATE_AUTO, NO_ROTATE_AUTO = 0x80, 0x00
READ_IRR, READ_ISR, POLL = 0x0A, 0x0B, 0x0C
AUTO_EOI, FULLY_NESTED = 0x02, 0x10


class Pair:
    """The pair, initialised as PC firmware does: vectors from 0x20 and 0x28, nothing masked."""

    def __init__(self, *, master4: int = 1, slave4: int = 1, initialised: bool = True) -> None:
        self.ledger = Ledger()
        self.output = False
        self.ended: list[tuple[int, int]] = []
        self.masks: list[tuple[int, int, bool]] = []
        self.pic = Pic(
            self.ledger,
            lambda level: setattr(self, "output", level),
            lambda chip, pin: self.ended.append((chip, pin)),
            lambda chip, pin, masked: self.masks.append((chip, pin, masked)),
        )
        if initialised:
            self.initialise(MASTER, 0x20, 1 << 2, master4)
            self.initialise(SLAVE, 0x28, 2, slave4)

    def initialise(self, port: int, base: int, icw3: int, icw4: int = 1) -> None:
        """ICW1 (cascade, ICW4 follows) to ICW4."""
        self.pic.write_port(port, 0x11)
        for value in (base, icw3, icw4):
            self.pic.write_port(port + 1, value)

    def line(self, pin: int, level: int = 1, source: int = 0) -> int:
        return self.pic.set_irq(pin, bool(level), source)

    def pulse(self, pin: int) -> None:
        self.line(pin, 1)
        self.line(pin, 0)

    def command(self, value: int, port: int = MASTER) -> None:
        self.pic.write_port(port, value)

    def mask(self, value: int, port: int = MASTER) -> None:
        self.pic.write_port(port + 1, value)

    def register(self, which: int, port: int = MASTER) -> int:
        """IRR or ISR, by OCW3."""
        self.pic.write_port(port, which)
        return self.pic.read_port(port)

    def inta(self) -> int:
        return self.pic.acknowledge()

    def check(self) -> None:
        self.pic._check()
        assert self.ledger.statement().balanced


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_icw2_is_the_vector_base(pair: Pair) -> None:
    """ICW2 sets T7 to T3; the input is in the low three bits (8259A, Initialization Command Words)."""
    pair.initialise(MASTER, 0x57, 4)
    pair.pulse(3)

    assert 0x53 == pair.inta()


def test_icw1_without_icw4_clears_its_functions() -> None:
    """IC4 = 0 sets all functions of ICW4 to zero, and the sequence ends with ICW3 (ICW1, item f)."""
    pair = Pair(master4=1 | AUTO_EOI | FULLY_NESTED)
    pair.pic.write_port(MASTER, 0x10)
    pair.pic.write_port(MASTER + 1, 0x20)
    pair.pic.write_port(MASTER + 1, 4)
    pair.mask(0xF0)

    assert 0xF0 == pair.pic.read_port(MASTER + 1)
    assert 0 == pair.pic.chips[0].auto_eoi == pair.pic.chips[0].special_fully_nested_mode


def test_icw1_clears_mask_priorities_and_edges(pair: Pair) -> None:
    """ICW1: the edge sense circuit is reset, IMR cleared, IR7 is the lowest priority, status read is IRR."""
    pair.command(SET_PRIORITY | 2)
    pair.mask(0xFF)
    pair.line(5)
    pair.command(READ_ISR)
    pair.initialise(MASTER, 0x20, 4)

    assert 0 == pair.pic.read_port(MASTER)
    assert 0 == pair.pic.read_port(MASTER + 1)
    pair.line(5)  # it is high still, and the memory of that is gone
    pair.pulse(1)
    assert 0x21 == pair.inta()
    pair.command(EOI)
    assert 0x25 == pair.inta()
    pair.check()


def test_icw1_keeps_what_is_in_service(pair: Pair) -> None:
    """The list of what ICW1 resets does not have the ISR."""
    pair.pulse(4)
    pair.inta()
    pair.initialise(MASTER, 0x20, 4)

    assert 1 << 4 == pair.register(READ_ISR)


def test_icw1_keeps_levels(pair: Pair) -> None:
    """A level-triggered input is its line; there is no edge to forget."""
    pair.pic.write_port(ELCR, 1 << 5)
    pair.line(5)
    pair.initialise(MASTER, 0x20, 4)

    assert 1 << 5 == pair.register(READ_IRR)


def test_an_edge_is_latched_once(pair: Pair) -> None:
    """Edge triggered mode: an input must go low before it can ask again (Edge and Level Triggered Modes)."""
    assert 1 == pair.line(3)
    assert 0x23 == pair.inta()
    pair.command(EOI)
    assert 1 == pair.line(3)

    assert not pair.output
    pair.line(3, 0)
    pair.line(3)
    assert pair.output
    pair.check()


def test_a_second_edge_merges(pair: Pair) -> None:
    """An edge that finds its bit of IRR set adds nothing."""
    pair.pulse(3)

    assert 0 == pair.line(3)
    assert 1 == pair.ledger.coalesced
    assert 0x23 == pair.inta()
    assert not pair.output
    pair.check()


def test_a_level_asks_again_after_its_end(pair: Pair) -> None:
    """Level triggered mode: a request that stays high after EOI is another one."""
    pair.pic.write_port(ELCR, 1 << 5)
    pair.line(5)
    assert 0x25 == pair.inta()
    assert not pair.output
    pair.command(EOI)

    assert pair.output
    assert 0x25 == pair.inta()
    pair.line(5, 0)
    pair.command(EOI)
    assert not pair.output
    assert 2 == pair.ledger.delivered
    pair.check()


def test_a_level_that_goes_is_dropped(pair: Pair) -> None:
    """A level that is lowered before it is acknowledged asks for nothing any more."""
    pair.pic.write_port(ELCR + 1, 1 << 1)
    pair.line(9)
    pair.line(9, 0)

    assert {"line lowered": 1} == pair.ledger.statement().dropped
    pair.check()


def test_some_inputs_are_edges_always(pair: Pair) -> None:
    """The ELCR has no bits for the timer, the keyboard, the cascade, the clock (8) and the coprocessor (13)."""
    pair.pic.write_port(ELCR, 0xFF)
    pair.pic.write_port(ELCR + 1, 0xFF)

    assert (0xF8, 0xDE) == (pair.pic.read_port(ELCR), pair.pic.read_port(ELCR + 1))


def test_a_line_of_two_sources_is_an_or(pair: Pair) -> None:
    """An input is high while any of its sources holds it so."""
    pair.pic.write_port(ELCR, 1 << 5)
    pair.line(5, 1, source=0)
    pair.line(5, 1, source=1)
    pair.line(5, 0, source=0)
    assert pair.output
    pair.line(5, 0, source=1)

    assert not pair.output


def test_fully_nested_mode(pair: Pair) -> None:
    """IR0 is the highest; while one is in service those of the same or lower priority wait (Fully Nested Mode)."""
    pair.pulse(4)
    pair.pulse(6)
    assert 0x24 == pair.inta()
    pair.pulse(5)
    assert not pair.output
    pair.pulse(1)
    assert 0x21 == pair.inta()
    pair.command(EOI)
    assert not pair.output
    pair.command(EOI)

    assert [0x25] == [pair.inta()]
    assert [(0, 1), (0, 4)] == pair.ended


def test_a_mask_keeps_the_request(pair: Pair) -> None:
    """IMR acts on the output of IRR: a masked input is latched and asks when unmasked (Interrupt Mask Register)."""
    pair.mask(1 << 3)
    assert -1 == pair.line(3)
    assert not pair.output
    assert 1 << 3 == pair.register(READ_IRR)
    pair.mask(0)

    assert pair.output
    assert [(0, 3, True), (0, 3, False)] == pair.masks
    pair.check()


def test_specific_eoi_ends_the_named_one(pair: Pair) -> None:
    """SEOI resets the bit of ISR that L2 to L0 name, not the highest (End of Interrupt)."""
    pair.pulse(4)
    pair.inta()
    pair.pulse(1)
    pair.inta()
    pair.command(SPECIFIC_EOI | 4)

    assert 1 << 1 == pair.register(READ_ISR)


def test_automatic_rotation(pair: Pair) -> None:
    """Rotate on non-specific EOI: who was served becomes the lowest (Automatic Rotation)."""
    pair.pulse(1)
    pair.inta()
    pair.command(ROTATE_EOI)
    pair.pulse(1)
    pair.pulse(5)

    assert 0x25 == pair.inta()


def test_specific_rotation(pair: Pair) -> None:
    """Set priority: the named input is the lowest, the next one the highest (Specific Rotation)."""
    pair.command(SET_PRIORITY | 5)
    pair.pulse(5)
    pair.pulse(0)
    pair.pulse(6)

    assert [0x26, 0x20, 0x25] == [(pair.inta(), pair.command(EOI))[0] for _ in range(3)]


def test_rotate_on_specific_eoi(pair: Pair) -> None:
    """It ends the named input and makes it the lowest."""
    pair.pulse(2 + 1)
    pair.inta()
    pair.command(ROTATE_SPECIFIC_EOI | 3)

    assert 0 == pair.register(READ_ISR)
    pair.pulse(3)
    pair.pulse(7)
    assert 0x27 == pair.inta()


def test_automatic_eoi() -> None:
    """AEOI: the service ends with the acknowledgement, and nothing holds others back (Automatic End of Interrupt)."""
    pair = Pair(master4=1 | AUTO_EOI)
    pair.pulse(1)
    pair.pulse(3)

    assert [0x21, 0x23] == [pair.inta(), pair.inta()]
    assert 0 == pair.register(READ_ISR)
    assert [(0, 1), (0, 3)] == pair.ended


def test_rotation_in_automatic_eoi_mode() -> None:
    """With rotate-in-AEOI set each one served becomes the lowest; clear ends that."""
    pair = Pair(master4=1 | AUTO_EOI)
    pair.command(ROTATE_AUTO)
    pair.pulse(1)
    pair.inta()
    pair.pulse(0)
    pair.pulse(2 + 1)
    assert 0x23 == pair.inta()
    pair.command(NO_ROTATE_AUTO)
    pair.inta()
    pair.pulse(0)
    pair.pulse(5)

    assert 0x25 == pair.inta()  # priorities stay as they were: 3 is the lowest


def test_the_slave_comes_through_input_2(pair: Pair) -> None:
    """The master releases the slave's vector; both need an EOI (The Cascade Mode)."""
    pair.pulse(8 + 4)

    assert pair.output
    assert 0x2C == pair.inta()
    assert 1 << 2 == pair.register(READ_ISR)
    assert 1 << 4 == pair.register(READ_ISR, SLAVE)
    pair.command(EOI, SLAVE)
    pair.command(EOI)
    assert 0 == pair.register(READ_ISR)
    pair.check()


def test_the_slave_has_the_priority_of_input_2(pair: Pair) -> None:
    """IR1 is above all of the slave, IR3 below."""
    for pin in (3, 8, 1):
        pair.pulse(pin)

    assert 0x21 == pair.inta()
    pair.command(EOI)
    assert 0x28 == pair.inta()


def test_the_slave_cannot_interrupt_itself(pair: Pair) -> None:
    """In the normal nested mode a slave is masked out while a request of its is in service in the master."""
    pair.pulse(8 + 4)
    pair.inta()
    pair.pulse(8 + 1)

    assert not pair.output


def test_special_fully_nested_mode() -> None:
    """SFNM in the master: a higher request of the slave in service is recognized (The Special Fully Nested Mode)."""
    pair = Pair(master4=1 | FULLY_NESTED)
    pair.pulse(8 + 4)
    pair.inta()
    pair.pulse(8 + 1)

    assert pair.output
    assert 0x29 == pair.inta()
    pair.pulse(8 + 6)
    assert not pair.output


def test_a_request_that_is_gone_is_input_7(pair: Pair) -> None:
    """If the request is not there at INTA the master issues IR7, with no bit of ISR (Interrupt Sequence)."""
    assert 0x27 == pair.inta()
    assert 0 == pair.register(READ_ISR)
    assert 0 == pair.ledger.delivered


def test_a_request_of_the_slave_that_is_gone_is_its_input_7(pair: Pair) -> None:
    """The master takes input 2, which needs an EOI; the slave issues its IR7."""
    pair.pic.write_port(ELCR + 1, 1 << 2)
    pair.line(10)
    pair.line(10, 0)

    assert 0x2F == pair.inta()
    assert (1 << 2, 0) == (pair.register(READ_ISR), pair.register(READ_ISR, SLAVE))
    pair.check()


def test_poll(pair: Pair) -> None:
    """After a poll command the next read acknowledges: bit 7 and the input, bit 7 clear without one (Poll Command)."""
    pair.command(POLL)
    assert 0 == pair.pic.read_port(MASTER) & 0x80
    pair.pulse(6)
    pair.pulse(3)
    pair.command(POLL)

    assert 0x83 == pair.pic.read_port(MASTER)
    assert 1 << 6 == pair.register(READ_IRR)
    assert 1 == pair.ledger.delivered
    pair.check()


def test_polling_the_slave_takes_it_from_the_master(pair: Pair) -> None:
    """The master's request for the slave goes with it."""
    pair.pulse(8 + 3)
    pair.command(POLL, SLAVE)

    assert 0x83 == pair.pic.read_port(SLAVE)
    assert 0 == pair.register(READ_IRR)
    assert not pair.output
    pair.check()


def test_polling_the_master_leaves_the_slave_to_be_polled(pair: Pair) -> None:
    """Input 2 says which to poll next; it is no interrupt by itself."""
    pair.pulse(8 + 3)
    pair.command(POLL)
    assert 0x82 == pair.pic.read_port(MASTER)
    assert 0 == pair.register(READ_IRR)
    pair.command(POLL, SLAVE)

    assert 0x83 == pair.pic.read_port(SLAVE)
    assert (1, 1) == (pair.ledger.raised, pair.ledger.delivered)
    pair.check()


def test_special_mask_mode_is_kept_only(pair: Pair) -> None:
    """KVM keeps the bit (OCW3), but masked inputs in service hold back lower ones all the same."""
    pair.pulse(3)
    pair.inta()
    pair.command(0x68)
    pair.mask(1 << 3)
    pair.pulse(5)

    assert 1 == pair.pic.chips[0].special_mask
    assert not pair.output


def test_state_is_what_was_set(pair: Pair) -> None:
    """All members of struct kvm_pic_state come back; the output follows them."""
    pair.pulse(3)
    state, slave = pair.pic.state(0), pair.pic.state(1)
    other = Pair(initialised=False)
    other.pic.set_state(1, slave)
    other.pic.set_state(0, state)

    assert state == other.pic.state(0)
    assert other.output
    assert 0x23 == other.inta()
    other.check()


# -- against a model ----------------------------------------------------------------------------------------


class Model8259:
    """One 8259A as a list for each of its registers, and the order of priorities written out."""

    def __init__(self, first: int, level_able: list[int]) -> None:
        self.first = first
        self.level_able = level_able
        self.requests: list[int] = []
        self.service: list[int] = []
        self.masked: list[int] = []
        self.high: list[int] = []
        self.levels: list[int] = []
        self.order = list(range(8))
        self.base = 0
        self.auto_eoi = self.rotates = self.nested = self.shows_isr = self.polled = self.icw4 = False
        self.expects: list[str] = []
        self.ended: list[tuple[int, int]] = []

    def drive(self, pin: int, level: bool) -> int:
        new = level and (pin in self.levels or pin not in self.high)
        status = 0 if new and pin in self.requests else 1
        if new and pin not in self.requests:
            self.requests.append(pin)
        if not level and pin in self.levels and pin in self.requests:
            self.requests.remove(pin)
        if level and pin not in self.high:
            self.high.append(pin)
        if not level and pin in self.high:
            self.high.remove(pin)
        return -1 if pin in self.masked else status

    def wanted(self) -> int | None:
        for pin in self.order:
            if pin in self.service and not (pin == 2 and self.nested and not self.first):
                return None
            if pin in self.requests and pin not in self.masked:
                return pin
        return None

    def take(self, pin: int) -> None:
        if pin not in self.levels:
            self.requests.remove(pin)
        if pin not in self.service:
            self.service.append(pin)
        if self.auto_eoi:
            if self.rotates:
                self.lowest(pin)
            self.end(pin)

    def end(self, pin: int) -> None:
        if pin in self.service:
            self.service.remove(pin)
        self.ended.append((self.first // 8, pin))

    def lowest(self, pin: int) -> None:
        while self.order[-1] != pin:
            self.order.append(self.order.pop(0))

    def even(self, value: int) -> None:
        if value & 0x10:
            self.icw4 = bool(value & 1)
            self.expects = ["icw2", "icw3"] + (["icw4"] if self.icw4 else [])
            self.high, self.masked, self.order = [], [], list(range(8))
            self.shows_isr = False
            if not self.icw4:
                self.auto_eoi = self.nested = False
            for pin in [pin for pin in sorted(self.requests) if pin not in self.levels]:
                self.requests.remove(pin)
                self.end(pin)
        elif value & 8:
            self.polled = self.polled or bool(value & 4)
            if value & 2:
                self.shows_isr = bool(value & 1)
        else:
            pin = value & 7
            served = [p for p in self.order if p in self.service]
            match value >> 5:
                case 0:
                    self.rotates = False
                case 4:
                    self.rotates = True
                case 1 if served:
                    self.end(served[0])
                case 5 if served:
                    self.lowest(served[0])
                    self.end(served[0])
                case 3:
                    self.end(pin)
                case 6:
                    self.lowest(pin)
                case 7:
                    self.lowest(pin)
                    self.end(pin)

    def odd(self, value: int) -> None:
        step = self.expects.pop(0) if self.expects else "mask"
        if step == "mask":
            self.masked = [pin for pin in range(8) if value >> pin & 1]
        elif step == "icw2":
            self.base = value // 8 * 8
        elif step == "icw4":
            self.nested, self.auto_eoi = bool(value & 0x10), bool(value & 2)


def bits(pins: list[int]) -> int:
    return sum(1 << pin for pin in set(pins))


class PicMachine(RuleBasedStateMachine):
    """Lines, INTA, every byte to every port."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(initialised=False)
        self.master, self.slave = Model8259(0, [3, 4, 5, 6, 7]), Model8259(8, [1, 2, 3, 4, 6, 7])
        for port, model in ((MASTER, self.master), (SLAVE, self.slave)):
            for offset, value in ((0, 0x11), (1, 0x20 + (model.first)), (1, 4), (1, 1)):
                self._write(port + offset, value)

    def settle(self) -> None:
        if self.slave.wanted() is not None and 2 not in self.master.requests:
            self.master.requests.append(2)

    def _model(self, port: int) -> Model8259:
        return self.slave if port & 0x80 else self.master

    def _write(self, port: int, value: int) -> None:
        self.pair.pic.write_port(port, value)
        if port >= ELCR:
            model = self.slave if port & 1 else self.master
            model.levels = [pin for pin in model.level_able if value >> pin & 1]
        elif port & 1:
            self._model(port).odd(value)
        else:
            self._model(port).even(value)
        if port & 1 or port >= ELCR or value & 0x18 != 8:
            self.settle()

    @rule(pin=st.sampled_from([0, 1, 3, 5, 7, 8, 9, 10, 12, 15]), level=st.booleans())
    def line(self, pin: int, level: bool) -> None:
        status = self.pair.line(pin, level)

        assert (self.slave if pin > 7 else self.master).drive(pin & 7, level) == status
        self.settle()

    @rule()
    def inta(self) -> None:
        pin = self.master.wanted()
        if pin is None:
            vector = self.master.base + 7
        else:
            self.master.take(pin)
            vector = self.master.base + pin
            if pin == 2:
                inner = self.slave.wanted()
                vector = self.slave.base + (7 if inner is None else inner)
                if inner is not None:
                    self.slave.take(inner)
        self.settle()

        assert vector == self.pair.inta()

    @rule(port=st.sampled_from([MASTER, SLAVE, MASTER + 1, SLAVE + 1, ELCR, ELCR + 1]), value=st.integers(0, 255))
    def write(self, port: int, value: int) -> None:
        self._write(port, value)

    @rule(
        port=st.sampled_from([MASTER, SLAVE]),
        command=st.sampled_from([EOI, ROTATE_EOI, SPECIFIC_EOI, ROTATE_SPECIFIC_EOI, SET_PRIORITY, ROTATE_AUTO]),
        pin=st.integers(0, 7),
    )
    def ocw2(self, port: int, command: int, pin: int) -> None:
        self._write(port, command | pin)

    @rule(
        port=st.sampled_from([MASTER, SLAVE]),
        icw4=st.sampled_from([None, 0x01, 0x03, 0x11, 0x13]),
        mask=st.sampled_from([0, 0x20, 0x0A]),
    )
    def initialise(self, port: int, icw4: int | None, mask: int) -> None:
        words = [0x10 if icw4 is None else 0x11, 0x20 + (8 if port == SLAVE else 0), 4]
        for n, word in enumerate([*words, *([] if icw4 is None else [icw4]), mask]):
            self._write(port + (1 if n else 0), word)

    @rule(port=st.sampled_from([MASTER, SLAVE]), odd=st.integers(0, 1))
    def read(self, port: int, odd: int) -> None:
        model = self._model(port)
        if model.polled:
            model.polled = False
            pin = model.wanted()
            expected = 7 if pin is None else 0x80 | pin
            if pin is not None:
                if port == SLAVE:
                    for held in (self.master.service, self.master.requests):
                        if 2 in held:
                            held.remove(2)
                model.requests.remove(pin)
                model.end(pin)
            if port == SLAVE or pin != 2:
                self.settle()
        elif odd:
            expected = bits(model.masked)
        else:
            expected = bits(model.service if model.shows_isr else model.requests)

        assert expected == self.pair.pic.read_port(port | odd)

    @invariant()
    def same(self) -> None:
        for chip, model in enumerate((self.master, self.slave)):
            real: Any = self.pair.pic.chips[chip]
            assert (bits(model.requests), bits(model.service), bits(model.masked)) == (real.irr, real.isr, real.imr)
        assert (self.master.wanted() is not None) == self.pair.output
        both = self.master.ended + self.slave.ended
        assert sorted(both) == sorted(self.pair.ended)
        self.pair.check()


PicMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstModel = PicMachine.TestCase
