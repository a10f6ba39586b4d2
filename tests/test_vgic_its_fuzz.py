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
    CTLR,
    CWRITER,
    DEVICE_TABLE,
    GRP_CTRL,
    ITTS,
    QUEUE,
    VALID,
    ItsMachine,
)
from its_strategies import START, commands, msis, steps

from fabric.errors import KvmError


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
