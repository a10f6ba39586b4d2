"""Random command queues, MSIs and table walks: never an error that is no KVM error, never a lost interrupt."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from its_machine import (
    BASER0,
    BASER1,
    CBASER,
    COLLECTION_TABLE,
    CREADR,
    CTLR,
    CWRITER,
    DEVICE_TABLE,
    GRP_CTRL,
    HOLE,
    ITTS,
    LEVEL2,
    LPI,
    PENDING,
    QUEUE,
    RESET,
    RESTORE_TABLES,
    SAVE_TABLES,
    VALID,
    ItsMachine,
    event_command,
    itt,
    mapc,
    mapd,
    mapti,
)

from fabric.devices.arm.vgic_its_commands import COMMANDS, Command, Field, encode
from fabric.errors import KvmError

LIKELY: dict[str, st.SearchStrategy[int]] = {
    "DeviceID": st.one_of(st.integers(0, 3), st.sampled_from([8192, 65535, 1 << 31])),
    "EventID": st.one_of(st.integers(0, 8), st.sampled_from([31, 32, LPI, LPI + 1, 0xFFFF_FFFF])),
    "pINTID": st.one_of(st.integers(LPI, LPI + 8), st.sampled_from([0, 8191, 65535, 65536])),
    "Size": st.sampled_from([0, 2, 4, 4, 13, 15, 16, 31]),
    "ITT_addr": st.sampled_from([itt(n) >> 8 for n in range(4)] + [HOLE >> 8, QUEUE >> 8]),
    "ICID": st.one_of(st.integers(0, 3), st.sampled_from([8191, 8192, 65535])),
    "RDbase": st.one_of(st.integers(0, 2), st.just(0xFFFF_FFFF)),
    "RDbase2": st.integers(0, 3),
    "V": st.sampled_from([0, 1, 1, 1]),
}


def field_values(fields: tuple[Field, ...]) -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries({field.name: LIKELY[field.name] for field in fields})


def structured(command: Command) -> st.SearchStrategy[bytes]:
    return field_values(command.fields).map(lambda fields: encode(command.name, **fields))


def on_an_event(*names: str) -> st.SearchStrategy[bytes]:
    """Commands on an event that may well be mapped."""
    return st.builds(event_command, st.sampled_from(names), st.integers(0, 1), st.integers(0, 5))


# Most of what random fields give is refused, and MAPD drops all events of a device, so that what keeps a machine
# going comes more often.
commands = st.one_of(
    st.builds(mapti, st.integers(0, 1), st.integers(0, 8), st.integers(LPI, LPI + 8), st.integers(0, 3)),
    st.builds(mapti, st.integers(0, 1), st.integers(0, 8), st.integers(LPI, LPI + 8), st.integers(0, 3)),
    st.builds(mapc, st.integers(0, 2), st.integers(0, 2)),
    on_an_event("INT", "INV"),
    on_an_event("DISCARD", "CLEAR"),
    st.one_of(*(structured(command) for command in COMMANDS)),
    st.one_of(
        st.binary(min_size=32, max_size=32),
        st.builds(lambda code, rest: bytes([code]) + rest, st.integers(1, 15), st.binary(min_size=31, max_size=31)),
    ),
)

msis = st.one_of(
    st.tuples(st.integers(0, 1), st.integers(0, 5), st.sampled_from([0, 1, 1, 1]), st.just(0)),
    st.tuples(
        LIKELY["DeviceID"], LIKELY["EventID"], st.sampled_from([0, 1, 1, 1, 2]), st.sampled_from([0, 0, 2, 1 << 20])
    ),
)

table_words = st.one_of(
    st.just(0),
    st.integers(0, (1 << 64) - 1),
    st.builds(
        lambda step, at, size: VALID | step << 49 | at >> 8 << 5 | size,
        st.integers(0, 3),
        st.sampled_from([itt(0), itt(1), HOLE]),
        st.sampled_from([0, 2, 4, 15, 16]),
    ),
    st.builds(
        lambda step, lpi, icid: step << 48 | lpi << 16 | icid,
        st.integers(0, 3),
        st.integers(LPI - 1, LPI + 8),
        st.integers(0, 3),
    ),
    st.builds(lambda rdbase, icid: VALID | rdbase << 16 | icid, st.integers(0, 3), st.integers(0, 4)),
)

table_places = st.builds(
    lambda base, n: base + 8 * n,
    st.sampled_from([DEVICE_TABLE, COLLECTION_TABLE, itt(0), itt(1), LEVEL2, QUEUE, PENDING + LPI // 8]),
    st.integers(0, 5),
)

registers = st.one_of(
    st.tuples(st.just(CTLR), st.integers(0, 1)),
    st.tuples(st.just(CWRITER), st.one_of(st.integers(0, 40).map(lambda n: 32 * n), st.integers(0, 1 << 64))),
    st.tuples(st.just(CREADR), st.integers(0, 1 << 13)),
    st.tuples(st.just(CBASER), st.sampled_from([0, VALID | QUEUE, VALID | QUEUE | 1, VALID | HOLE, (1 << 64) - 1])),
    st.tuples(
        st.just(BASER0),
        st.sampled_from([0, VALID | DEVICE_TABLE, VALID | 1 << 62 | DEVICE_TABLE, VALID | HOLE, VALID | QUEUE]),
    ),
    st.tuples(st.just(BASER1), st.sampled_from([0, VALID | COLLECTION_TABLE, VALID | HOLE])),
)

steps = st.one_of(
    st.tuples(st.just("command"), commands),
    st.tuples(st.just("command"), commands),
    st.tuples(st.just("command"), commands),
    st.tuples(st.just("msi"), msis),
    st.tuples(st.just("msi"), msis),
    st.tuples(st.just("register"), registers),
    st.tuples(st.just("control"), st.sampled_from([SAVE_TABLES, SAVE_TABLES, RESTORE_TABLES, RESET])),
    st.tuples(st.just("poke"), st.tuples(table_places, table_words)),
    st.tuples(st.just("lpis"), st.tuples(st.integers(0, 1), st.booleans())),
    st.tuples(st.just("forward"), st.booleans()),
    st.tuples(st.just("take"), st.integers(0, 1)),
)

START = (
    mapc(0, 0),
    mapc(1, 1),
    mapd(0),
    mapd(1),
    *(mapti(0, event, LPI + event, event % 2) for event in range(4)),
)


class Walker:
    """A machine and what a step does to it."""

    def __init__(self) -> None:
        self.machine = ItsMachine()
        self.machine.forward()
        self.machine.run(*START)

    def command(self, command: bytes) -> None:
        its = self.machine.its
        self.machine.memory.write(QUEUE + its.cwriter, command)
        self.machine.set_reg(CWRITER, (its.cwriter + 32) % its.queue_size)

    def msi(self, msi: tuple[int, int, int, int]) -> int:
        devid, eventid, flags, distance = msi
        return self.machine.msi(devid, eventid, flags, 0x0809_0040 + distance)

    def register(self, write: tuple[int, int]) -> None:
        self.machine.set_reg(write[0], write[1] & (1 << 64) - 1)

    def control(self, number: int) -> None:
        self.machine.attr("set", GRP_CTRL, number)

    def poke(self, store: tuple[int, int]) -> None:
        self.machine.memory.write_u64(*store)

    def lpis(self, which: tuple[int, bool]) -> None:
        from fabric.devices.arm.vgic_v3_regs import GICR

        GICR.user_write(self.machine.vgic.cpus[which[0]], 0, int(which[1]))

    def forward(self, on: bool) -> None:
        self.machine.vgic.set_forwarding(on)

    def take(self, index: int) -> int:
        cpu = self.machine.vgic.cpus[index]
        intid = int(cpu.acknowledge(1))
        cpu.end_of_interrupt(1, intid)
        return intid

    def step(self, kind: str, argument: Any) -> tuple[str, Any]:
        """Do one step; what it answered, an errno included."""
        try:
            return ("done", getattr(self, kind)(argument))
        except KvmError as error:
            return ("errno", error.errno)
        finally:
            self.machine.check()


def walk(sequence: list[tuple[str, Any]]) -> Walker:
    walker = Walker()
    for kind, argument in sequence:
        walker.step(kind, argument)
    return walker


@given(st.lists(steps, max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_sequence(sequence: list[tuple[str, Any]]) -> None:
    """Whatever the guest and userspace do, the ledger balances and the invariants hold after every step."""
    walk(sequence)


@pytest.mark.soak
@given(st.lists(steps, max_size=150))
@settings(max_examples=4000, deadline=None)
def test_any_long_sequence(sequence: list[tuple[str, Any]]) -> None:
    """The same, at length."""
    walk(sequence)


@given(st.binary(max_size=4096), st.integers(0, 1 << 20), st.lists(msis, max_size=10))
@settings(max_examples=60, deadline=None)
def test_any_bytes_in_the_queue(queue: bytes, cwriter: int, senders: list[tuple[int, int, int, int]]) -> None:
    """A queue of noise, with CWRITER anywhere, changes the maps at most."""
    walker = Walker()
    machine = walker.machine
    machine.set_reg(CTLR, 0)
    machine.set_reg(CBASER, VALID | QUEUE | 0xFF)
    machine.memory.write(QUEUE, queue)
    machine.set_reg(CTLR, 1)
    machine.set_reg(CWRITER, cwriter % 8192)
    machine.check()
    for msi in senders:
        walker.step("msi", msi)


@given(st.lists(st.tuples(st.just("command"), commands), max_size=30), st.lists(msis, max_size=10))
@settings(max_examples=60, deadline=None)
def test_saved_and_restored_does_the_same(
    sequence: list[tuple[str, Any]], senders: list[tuple[int, int, int, int]]
) -> None:
    """What SAVE_TABLES writes, RESTORE_TABLES makes into an ITS that answers MSIs alike.

    Two things are not in the tables, and are left out: where MOVALL sent an LPI, and an event without collection,
    which counts as unmapped either way.
    """
    walker = walk([step for step in sequence if step[1][0] not in (0x0E, 0x08)])
    machine = walker.machine
    machine.save()
    other = Walker()
    other.machine = ItsMachine(set_up=False)
    other.machine.forward()
    for base in (DEVICE_TABLE, COLLECTION_TABLE, *(ITTS + 0x10000 * n for n in range(4))):
        other.machine.memory.write(base, machine.memory.read(base, 0x10000))
    other.machine.its.place(0x0808_0000)
    for offset in (CBASER, BASER0, BASER1):
        other.machine.set_reg(offset, machine.reg(offset))
    other.machine.restore()
    other.machine.set_reg(CTLR, 1)
    machine.its.invalidate_cache()
    for msi in senders:
        assert walker.step("msi", msi) == other.step("msi", msi)


@given(st.lists(steps, max_size=30), st.lists(steps, max_size=20))
@settings(max_examples=60, deadline=None)
def test_a_copy_goes_on_as_the_original(before: list[tuple[str, Any]], after: list[tuple[str, Any]]) -> None:
    """A machine restored from states answers every further step as the one that was never interrupted."""
    walker = walk(before)
    copy = Walker.__new__(Walker)
    copy.machine = walker.machine.copy()
    copy.machine.check()
    for kind, argument in after:
        assert walker.step(kind, argument) == copy.step(kind, argument)

    assert walker.machine.its.state() == copy.machine.its.state()
    assert walker.machine.pending() == copy.machine.pending()
