"""The IOAPIC: registers, edges and levels, ends of interrupts; random lives against a model of dicts and lists."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from x86_machine import Apics

from fabric.devices.x86.ioapic import LEVEL, MASKED, REMOTE_IRR, Ioapic
from fabric.devices.x86.irqchip import SOURCE_USERSPACE
from fabric.devices.x86.lapic import EOI
from fabric.trace.ledger import Ledger

LOGICAL, ACTIVE_LOW, DELIVERY_STATUS = 1 << 11, 1 << 13, 1 << 12
SELECT, WINDOW = 0x00, 0x10
ID, VERSION, ARBITRATION, TABLE = 0, 1, 2, 0x10


class FakeBus:
    """Takes messages down, and answers ``answer``; each that is taken is accounted for as delivered."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.answer = 1
        self.sent: list[tuple[Any, ...]] = []
        self.apics: list[Any] = []
        self.watched = 0

    def deliver(
        self, dest: int, logical: bool, mode: int, vector: int, level: bool, trigger: int, *, takers: Any
    ) -> int:
        assert level
        self.sent.append((dest, logical, mode, vector, trigger))
        taken = max(self.answer, 0)
        self.ledger.raised += taken
        self.ledger.delivered += taken
        if takers is not None:
            takers.extend(("apic", n) for n in range(taken))
        return self.answer


class Chip:
    """An IOAPIC on a fake bus."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.bus = FakeBus(self.ledger)
        self.ended: list[tuple[int, int]] = []
        self.masks: list[tuple[int, int, bool]] = []
        self.ioapic = Ioapic(
            self.bus,  # type: ignore[arg-type]
            self.ledger,
            lambda chip, pin: self.ended.append((chip, pin)),
            lambda chip, pin, masked: self.masks.append((chip, pin, masked)),
        )

    def read(self, register: int) -> int:
        self.ioapic.mmio_write(SELECT, 4, register, None)
        return self.ioapic.mmio_read(WINDOW, 4, None)

    def write(self, register: int, value: int) -> None:
        self.ioapic.mmio_write(SELECT, 4, register, None)
        self.ioapic.mmio_write(WINDOW, 4, value, None)

    def set_entry(self, pin: int, entry: int) -> None:
        """As drivers do: masked, then the destination, then the rest."""
        self.write(TABLE + 2 * pin, MASKED)
        self.write(TABLE + 2 * pin + 1, entry >> 32)
        self.write(TABLE + 2 * pin, entry & 0xFFFF_FFFF)

    def entry(self, pin: int) -> int:
        return self.read(TABLE + 2 * pin + 1) << 32 | self.read(TABLE + 2 * pin)

    def line(self, pin: int, level: int = 1, source: int = 0, *, reported: bool = True) -> int:
        return self.ioapic.set_irq(pin, bool(level), source, reported=reported)

    def end(self, vector: int, level: bool = True, apic: Any = ("apic", 0)) -> None:
        self.ioapic.eoi(vector, apic, level)

    @property
    def vectors(self) -> list[int]:
        return [message[3] for message in self.bus.sent]


@pytest.fixture
def chip() -> Chip:
    return Chip()


def test_registers_after_reset(chip: Chip) -> None:
    """24 entries, version 0x11, id 0, all entries masked (82093AA, 3.2)."""
    assert 0x0017_0011 == chip.read(VERSION)
    assert 0 == chip.read(ID) == chip.read(ARBITRATION)
    assert [MASKED] * 24 == [chip.entry(pin) for pin in range(24)]


def test_the_id_has_four_bits(chip: Chip) -> None:
    """IOAPICID is bits 27:24, IOAPICARB is loaded with it (82093AA, 3.2.1 and 3.2.3)."""
    chip.write(ID, 0xFFFF_FFFF)

    assert 0x0F00_0000 == chip.read(ID) == chip.read(ARBITRATION)


def test_ioregsel_is_a_byte(chip: Chip) -> None:
    """IOREGSEL holds the index of the register behind IOWIN (82093AA, 3.1.1)."""
    chip.ioapic.mmio_write(SELECT, 4, 0xFFFF_FF01, None)

    assert 1 == chip.ioapic.mmio_read(SELECT, 4, None)
    assert 0x0017_0011 == chip.ioapic.mmio_read(WINDOW, 4, None)


def test_delivery_status_and_remote_irr_are_read_only(chip: Chip) -> None:
    """Bits 12 and 14 of an entry are read only (82093AA, 3.2.4)."""
    chip.set_entry(3, MASKED | LEVEL | DELIVERY_STATUS | REMOTE_IRR | 0x33)

    assert MASKED | LEVEL | 0x33 == chip.entry(3)


def test_an_entry_is_a_message(chip: Chip) -> None:
    """Destination, mode, delivery mode, trigger mode and vector go out as they are (82093AA, 3.2.4)."""
    chip.set_entry(5, 0xA5 << 56 | LEVEL | LOGICAL | 1 << 8 | 0x51)
    chip.line(5)

    assert [(0xA5, True, 1, 0x51, 1)] == chip.bus.sent


def test_polarity_is_not_looked_at(chip: Chip) -> None:
    """KVM_CAP_IOAPIC_POLARITY_IGNORED: 1 is asserted, whatever bit 13 says."""
    chip.set_entry(5, ACTIVE_LOW | 0x51)
    assert 1 == chip.line(5, 0)
    assert [] == chip.vectors
    chip.line(5, 1)

    assert [0x51] == chip.vectors


def test_an_edge_is_sent_once(chip: Chip) -> None:
    """An edge-sensitive input sends at the change to high only."""
    chip.set_entry(5, 0x51)
    assert 1 == chip.line(5)
    assert 0 == chip.line(5)
    chip.line(5, 0)
    chip.line(5)

    assert [0x51, 0x51] == chip.vectors
    assert 1 == chip.ledger.coalesced


def test_a_masked_edge_is_lost(chip: Chip) -> None:
    """Edges that meet a masked entry are ignored, also when it is unmasked later (82093AA, 3.2.4, bit 16)."""
    assert -1 == chip.line(5)
    chip.set_entry(5, 0x51)

    assert [] == chip.vectors
    assert {"IOAPIC entry masked": 1} == chip.ledger.statement().dropped


def test_a_masked_level_waits(chip: Chip) -> None:
    """A level that is high when the entry is unmasked is sent (82093AA, 3.2.4, bit 16)."""
    assert -1 == chip.line(5)
    chip.set_entry(5, LEVEL | 0x51)

    assert [0x51] == chip.vectors


def test_a_level_sets_remote_irr(chip: Chip) -> None:
    """Remote IRR is set when local APICs accept the level, and nothing is sent before it is clear (bit 14)."""
    chip.set_entry(5, LEVEL | 0x51)
    assert 1 == chip.line(5)
    assert chip.entry(5) & REMOTE_IRR
    chip.line(5, 0)

    assert -1 == chip.line(5)
    assert [0x51] == chip.vectors


def test_an_edge_has_no_remote_irr(chip: Chip) -> None:
    """Its meaning is undefined for edges; it stays clear."""
    chip.set_entry(5, 0x51)
    chip.line(5)

    assert not chip.entry(5) & REMOTE_IRR


def test_remote_irr_also_when_nobody_was_there(chip: Chip) -> None:
    """KVM sets it unless the message merged into one that waits."""
    chip.set_entry(5, LEVEL | 0x51)
    chip.bus.answer = -1
    chip.line(5)
    chip.set_entry(6, LEVEL | 0x61)
    chip.bus.answer = 0
    chip.line(6)

    assert chip.entry(5) & REMOTE_IRR
    assert not chip.entry(6) & REMOTE_IRR


def test_the_end_clears_remote_irr(chip: Chip) -> None:
    """An EOI of its vector clears it; the line is low by then."""
    chip.set_entry(5, LEVEL | 0x51)
    chip.line(5)
    chip.line(5, 0)
    chip.end(0x51)

    assert not chip.entry(5) & REMOTE_IRR
    assert [0x51] == chip.vectors
    assert [(2, 5)] == chip.ended


def test_a_line_that_is_still_high_sends_again(chip: Chip) -> None:
    """At the end of a level that is high the message goes out once more."""
    chip.set_entry(5, LEVEL | 0x51)
    chip.line(5)
    chip.end(0x51)

    assert [0x51, 0x51] == chip.vectors
    assert chip.entry(5) & REMOTE_IRR


def test_an_end_is_of_all_entries_with_its_vector(chip: Chip) -> None:
    """Inputs that share a vector end together, others do not."""
    for pin, vector in ((4, 0x51), (5, 0x51), (6, 0x61)):
        chip.set_entry(pin, LEVEL | vector)
        chip.line(pin)
        chip.line(pin, 0)
    chip.end(0x51)

    assert [0, 0, REMOTE_IRR] == [chip.entry(pin) & REMOTE_IRR for pin in (4, 5, 6)]


def test_the_end_of_an_edge_leaves_remote_irr(chip: Chip) -> None:
    """Only a local APIC in whose TMR the vector is a level broadcasts the end to IOAPICs (SDM vol. 3, 11.8.5)."""
    chip.set_entry(5, LEVEL | 0x51)
    chip.line(5)
    chip.end(0x51, level=False)

    assert chip.entry(5) & REMOTE_IRR
    assert [(2, 5)] == chip.ended


def test_to_edge_and_back_clears_remote_irr(chip: Chip) -> None:
    """How a guest without an EOI register ends a level of the IOAPIC's."""
    chip.set_entry(5, LEVEL | 0x51)
    chip.line(5)
    chip.line(5, 0)
    chip.write(TABLE + 10, MASKED | 0x51)
    chip.write(TABLE + 10, LEVEL | 0x51)

    assert not chip.entry(5) & REMOTE_IRR


def test_masking_is_told(chip: Chip) -> None:
    """Who counts on the guest's acknowledgements is told when an input is unmasked."""
    chip.set_entry(5, 0x51)
    chip.write(TABLE + 10, MASKED | 0x51)

    assert [(2, 5, False), (2, 5, True)] == chip.masks


def test_watched_vectors_are_those_of_the_table(chip: Chip) -> None:
    """Ends of other vectors need not be told."""
    chip.set_entry(5, 0x51)

    assert 1 << 0x51 | 1 == chip.bus.watched


def test_the_clock_waits_for_everyone(chip: Chip) -> None:
    """Input 8, reported: merged while one that took the last one has not ended it."""
    chip.set_entry(8, 0x81)
    chip.bus.answer = 2
    assert 2 == chip.line(8)
    chip.line(8, 0)
    assert 0 == chip.line(8)
    chip.end(0x81, False, ("apic", 1))
    assert 0 == chip.line(8)
    chip.end(0x81, False, ("apic", 0))

    assert 2 == chip.line(8)
    assert [0x81, 0x81] == chip.vectors


def test_the_clock_unreported_does_not_wait(chip: Chip) -> None:
    """Who does not ask what became of it loses nothing."""
    chip.set_entry(8, 0x81)
    chip.line(8)
    chip.line(8, 0)

    assert 1 == chip.line(8, reported=False)


def test_a_line_of_two_sources_is_an_or(chip: Chip) -> None:
    """An input is high while any of its sources holds it so."""
    chip.set_entry(5, LEVEL | 0x51)
    chip.line(5, 1, 0)
    chip.line(5, 1, 1)
    chip.line(5, 0, 0)
    chip.end(0x51)
    assert [0x51, 0x51] == chip.vectors
    chip.line(5, 0, 1)
    chip.end(0x51)

    assert [0x51, 0x51] == chip.vectors


def test_state_goes_round(chip: Chip) -> None:
    """A restored level that waits is sent; an edge whose message went out is not in the state."""
    chip.set_entry(5, LEVEL | 0x51)
    chip.set_entry(6, 0x61)
    chip.bus.answer = 0
    chip.line(5)
    chip.line(6)
    state = chip.ioapic.state()
    other = Chip()
    other.ioapic.set_state(state)

    assert 1 << 5 == state["irr"]
    assert [0x51] == other.vectors
    assert state["redirtbl"][6] == other.entry(6)


def test_an_edge_that_was_not_sent_is_in_the_state(chip: Chip) -> None:
    """One that met a masked entry, also after another one of that input went out."""
    chip.set_entry(6, 0x61)
    chip.line(6)
    assert 0 == chip.ioapic.state()["irr"]
    chip.line(6, 0)
    chip.write(TABLE + 12, MASKED | 0x61)
    chip.line(6)

    assert 1 << 6 == chip.ioapic.state()["irr"]


def test_with_local_apics(chip: Chip) -> None:
    """Line, message, IRR, ISR, EOI at the local APIC, and the next one: the whole way of a level."""
    machine = Apics([0, 1], whole=True)
    ioapic: Any = machine.vm.irqchip.ioapic
    ioapic.mmio_write(SELECT, 4, TABLE + 11, None)
    ioapic.mmio_write(WINDOW, 4, 1 << 24, None)
    ioapic.mmio_write(SELECT, 4, TABLE + 10, None)
    ioapic.mmio_write(WINDOW, 4, LEVEL | 0x51, None)
    target = machine.apics[1]
    ioapic.set_irq(5, True, SOURCE_USERSPACE)

    assert target.line
    assert 0x51 == target.take()
    assert not target.line
    target.write(EOI, 0)
    assert 0x51 == target.take()
    ioapic.set_irq(5, False, SOURCE_USERSPACE)
    target.write(EOI, 0)
    assert not target.line
    assert 2 == machine.vm.ledger.delivered
    machine.check()


# -- against a model ----------------------------------------------------------------------------------------

PINS = (0, 5, 8, 9)
VECTORS = (0x31, 0x41)


class IoapicMachine(RuleBasedStateMachine):
    """The model: an entry is a dict, lines are lists of who holds them, and what is to be sent is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.chip = Chip()
        self.entries = {
            pin: {"vector": 0, "level": False, "masked": True, "remote": False, "dest": 0} for pin in range(24)
        }
        self.holders: dict[int, list[int]] = {pin: [] for pin in range(24)}
        self.waiting: list[int] = []
        self.sent_edges: list[int] = []
        self.expected: list[tuple[Any, ...]] = []
        self.clock_waits: list[Any] = []

    def send(self, pin: int, reported: bool = False) -> int:
        entry = self.entries[pin]
        if entry["masked"] or (entry["level"] and entry["remote"]):
            return -1
        answer = self.chip.bus.answer
        self.expected.append((entry["dest"], False, 0, entry["vector"], int(entry["level"])))
        if entry["level"]:
            entry["remote"] = answer != 0
        elif pin not in self.sent_edges:
            self.sent_edges.append(pin)
        if pin == 8 and reported and answer > 0:
            self.clock_waits = [("apic", n) for n in range(answer)]
        return answer

    @rule(answer=st.sampled_from([-1, 0, 1, 2]))
    def others_answer(self, answer: int) -> None:
        self.chip.bus.answer = answer

    @rule(pin=st.sampled_from(PINS), level=st.booleans(), source=st.integers(0, 1), reported=st.booleans())
    def line(self, pin: int, level: bool, source: int, reported: bool) -> None:
        holders = self.holders[pin]
        if level and source not in holders:
            holders.append(source)
        if not level and source in holders:
            holders.remove(source)
        if not holders:
            if pin in self.waiting:
                self.waiting.remove(pin)
            status = 1
        elif pin == 8 and reported and self.clock_waits:
            status = 0
        else:
            was = pin in self.waiting
            if not was:
                self.waiting.append(pin)
            if not self.entries[pin]["level"] and pin in self.sent_edges:
                self.sent_edges.remove(pin)
            status = 0 if was and not self.entries[pin]["level"] else self.send(pin, reported)

        assert status == self.chip.line(pin, level, source, reported=reported)

    @rule(
        pin=st.sampled_from(PINS),
        vector=st.sampled_from(VECTORS),
        level=st.booleans(),
        masked=st.booleans(),
        noise=st.sampled_from([0, REMOTE_IRR | DELIVERY_STATUS | ACTIVE_LOW]),
    )
    def write_low(self, pin: int, vector: int, level: bool, masked: bool, noise: int) -> None:
        entry = self.entries[pin]
        entry.update(vector=vector, level=level, masked=masked, remote=entry["remote"] and level)
        if level and pin in self.waiting:
            self.send(pin)
        self.chip.write(TABLE + 2 * pin, vector | LEVEL * level | MASKED * masked | noise)

    @rule(pin=st.sampled_from(PINS), dest=st.sampled_from([0, 1, 0xFF]))
    def write_high(self, pin: int, dest: int) -> None:
        self.entries[pin]["dest"] = dest
        if self.entries[pin]["level"] and pin in self.waiting:
            self.send(pin)
        self.chip.write(TABLE + 2 * pin + 1, dest << 24)

    @rule(vector=st.sampled_from(VECTORS), level=st.booleans(), apic=st.integers(0, 1))
    def eoi(self, vector: int, level: bool, apic: int) -> None:
        who = ("apic", apic)
        if self.entries[8]["vector"] == vector and who in self.clock_waits:
            self.clock_waits.remove(who)
        for pin in range(24):
            entry = self.entries[pin]
            if entry["vector"] == vector and entry["level"] and level:
                entry["remote"] = False
                if pin in self.waiting:
                    self.send(pin)
        self.chip.end(vector, level, who)

    @rule()
    def state_shows_what_waits(self) -> None:
        state = self.chip.ioapic.state()
        assert [pin for pin in range(24) if state["irr"] >> pin & 1] == sorted(
            pin for pin in self.waiting if pin not in self.sent_edges
        )

    @invariant()
    def same(self) -> None:
        assert self.expected == self.chip.bus.sent
        for pin in PINS:
            entry = self.entries[pin]
            found = self.chip.entry(pin)
            assert entry["dest"] << 24 == found >> 32
            assert entry["vector"] == found & 0xFF
            assert (entry["level"], entry["masked"], entry["remote"]) == tuple(
                bool(found & bit) for bit in (LEVEL, MASKED, REMOTE_IRR)
            )
        assert self.chip.ledger.statement().balanced


IoapicMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestAgainstModel = IoapicMachine.TestCase
