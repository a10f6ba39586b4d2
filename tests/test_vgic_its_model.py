"""The ITS against a second, plain description of the rules (``its_model.py``), over arbitrary sequences."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from its_machine import (
    BASER0,
    BASER1,
    CBASER,
    COLLECTION_TABLE,
    CONFIG,
    CREADR,
    CTLR,
    CWRITER,
    DEVICE_TABLE,
    GRP_CTRL,
    INDIRECT,
    ITS_BASE,
    LEVEL2,
    LPI,
    PENDING,
    PENDING_SIZE,
    QUEUE,
    RAM,
    RAM_SIZE,
    RESET,
    RESTORE_TABLES,
    SAVE_TABLES,
    VALID,
    FakeVm,
    ItsMachine,
    itt,
    mapc,
    mapd,
    mapti,
)
from its_model import ItsModel, Refused, VmModel
from its_strategies import commands, msis, registers, table_places, table_words

from fabric.devices.arm.vgic_its import Its, signal_msi
from fabric.devices.arm.vgic_v3 import VgicV3
from fabric.devices.arm.vgic_v3_regs import GICR
from fabric.errors import KvmError
from fabric.memory import GuestMemory
from fabric.uapi.kvm import KvmMsi
from fabric.uapi.usermem import BufferPointer

VCPUS = 3
AREAS = (
    (DEVICE_TABLE, 0x2_0000),
    (COLLECTION_TABLE, 0x2_0000),
    (LEVEL2, 0x2_0000),
    *((itt(n), 0x1000) for n in range(4)),
    *((PENDING + n * PENDING_SIZE, 0x3000) for n in range(VCPUS)),
)
"""What an ITS writes to."""


class Both:
    """A machine and the model, with two ITSs, at ``gap`` bytes from one another; every step is done to both."""

    def __init__(self, gap: int = 0x2_0000, *, indirect: bool = False) -> None:
        self.machine = ItsMachine(VCPUS, set_up=False)
        memory = GuestMemory()
        memory.add_ram(RAM, RAM_SIZE)
        memory.write(CONFIG, self.machine.memory.read(CONFIG, 0xE000))
        self.model = VmModel(memory, VCPUS, self.machine.vgic.propbaser)
        for redistributor, cpu in zip(self.model.redistributors, self.machine.vgic.cpus, strict=True):
            redistributor.pendbaser = cpu.pendbaser
        propbaser = self.machine.vgic.propbaser
        self.its = [self.machine.its, Its.create(self.machine.vm)]
        self.machine.vgic.propbaser = propbaser
        self.models = [ItsModel(self.model, ITS_BASE + n * gap) for n in range(2)]
        for n in range(2):
            self.its[n].place(ITS_BASE + n * gap)
        for n in range(2):
            self.register(n, CBASER, VALID | QUEUE + n * 0x4_0000)
            self.register(n, BASER0, VALID | DEVICE_TABLE + n * 0x1_0000 | (INDIRECT if indirect else 0))
            self.register(n, BASER1, VALID | COLLECTION_TABLE + n * 0x1_0000)
            self.register(n, CTLR, 1)
        if indirect:
            for n in range(2):
                self.poke((DEVICE_TABLE + n * 0x1_0000, VALID | LEVEL2 + n * 0x1_0000))

    def move(self) -> None:
        """Put another machine in the place of this one, made from the states of its devices."""
        old, new = self.machine, ItsMachine.__new__(ItsMachine)
        new.vm, new.memory = FakeVm(VCPUS), old.memory
        new.vm.memory = old.memory
        new.vgic = VgicV3.from_state(new.vm, old.vgic.state())
        states = [its.state() for its in self.its]
        self.its = [Its.from_state(new.vm, state) for state in states]
        new.its = self.its[0]
        self.machine = new
        assert states == [its.state() for its in self.its]
        self.compare()

    # -- steps: what the machine and the model answer

    def step(self, kind: str, n: int, argument: Any) -> None:
        """Do one step to both, and see that they agree in the answer and in all that can be seen."""
        theirs = self.answer(Refused, self.of_model, kind, n, argument)
        ours = self.answer(KvmError, self.of_machine, kind, n, argument)
        assert theirs == ours, (kind, n, argument)
        self.compare()

    @staticmethod
    def answer(failure: Any, call: Any, *args: Any) -> Any:
        try:
            return call(*args)
        except failure as error:
            return errno.errorcode[error.code if isinstance(error, Refused) else error.errno]

    def of_machine(self, kind: str, n: int, argument: Any) -> Any:
        machine, its = self.machine, self.its[n]
        if kind == "command":
            if machine.memory.is_backed(its.queue_address):
                machine.memory.write(its.queue_address + its.cwriter, argument)
            self.set(n, 8, CWRITER, (its.cwriter + 32) % its.queue_size)
        elif kind == "msi":
            devid, eventid, flags, distance = argument
            address = (its.base or 0) + 0x1_0040 + distance
            return signal_msi(machine.vm, KvmMsi(address & 0xFFFF_FFFF, address >> 32, eventid, flags, devid))
        elif kind == "register":
            self.set(n, 8, argument[0], argument[1] & (1 << 64) - 1)
        elif kind == "control":
            self.set(n, GRP_CTRL, argument, 0)
        elif kind == "poke":
            machine.memory.write_u64(*argument)
        elif kind == "lpis":
            GICR.user_write(machine.vgic.cpus[argument[0]], 0, int(argument[1]))
        return None

    def of_model(self, kind: str, n: int, argument: Any) -> Any:
        model, its = self.model, self.models[n]
        if kind == "command":
            queue, size = its.cbaser & 0xF_FFFF_FFFF_F000, ((its.cbaser & 0xFF) + 1) << 12
            if model.memory.is_backed(queue):
                model.memory.write(queue + its.cwriter, argument)
            its.write(CWRITER, (its.cwriter + 32) % size)
        elif kind == "msi":
            devid, eventid, flags, distance = argument
            return model.msi(its.base + 0x1_0040 + distance, devid, eventid, flags)
        elif kind == "register":
            its.write(argument[0], argument[1] & (1 << 64) - 1)
        elif kind == "control":
            {SAVE_TABLES: its.save, RESTORE_TABLES: its.restore, RESET: its.reset}[argument]()
        elif kind == "poke":
            model.memory.write_u64(*argument)
        elif kind == "lpis":
            model.enable_lpis(*argument)
        return None

    def set(self, n: int, group: int, attr: int, value: int) -> None:
        Its.attributes.dispatch(self.its[n], "set", group, attr, BufferPointer(bytearray(value.to_bytes(8, "little"))))

    def register(self, n: int, offset: int, value: int) -> None:
        self.step("register", n, (offset, value))

    def poke(self, store: tuple[int, int]) -> None:
        self.step("poke", 0, store)

    # -- what can be seen

    def compare(self) -> None:
        """Registers, maps, LPIs and the cache are the same."""
        machine, model = self.machine, self.model
        for n, its in enumerate(self.its):
            for offset in (CTLR, CBASER, CWRITER, CREADR, BASER0, BASER1):
                assert self.models[n].read(offset) == machine_register(its, offset)
            assert self.models[n].maps() == maps(its)
        assert [(lpi.intid, lpi.target, lpi.pending, lpi.enabled, lpi.priority & 0xF8) for lpi in model.lpis] == [
            (irq.intid, irq.target and irq.target.index, irq.pending, irq.enabled, irq.priority)
            for irq in machine.vgic.lpis.values()
        ]
        assert [(*entry[:3], entry[3].intid) for entry in reversed(model.cache)] == list(
            machine.its.group.cache.state()
        )

    def compare_memory(self) -> None:
        """What is in guest memory is the same."""
        for base, size in AREAS:
            assert self.model.memory.read(base, size) == self.machine.memory.read(base, size)
        self.machine.check()


def machine_register(its: Its, offset: int) -> int:
    buffer = bytearray(8)
    Its.attributes.dispatch(its, "get", 8, offset, BufferPointer(buffer))
    return int.from_bytes(buffer, "little")


def maps(its: Its) -> tuple[Any, ...]:
    """As :meth:`ItsModel.maps`."""
    devices, ranks = [], dict.fromkeys(its.devices, -1)
    for device in its.records():
        ranks[device.devid] += 1
        events = [
            (eventid, irq.intid, -1 if collection is None else collection.icid)
            for eventid, irq, collection in device.events()
        ]
        devices.append((device.devid, ranks[device.devid], device.bits, device.itt, events))
    return [(icid, collection.rdbase) for icid, collection in its.collections.items()], sorted(devices)


which = st.integers(0, 1)
sides = st.sampled_from([0, 0, 0, 1])
steps = st.one_of(
    *[st.tuples(st.just("command"), sides, commands)] * 4,
    *[st.tuples(st.just("msi"), sides, msis)] * 2,
    st.tuples(st.just("register"), sides, registers),
    st.tuples(
        st.just("control"), sides, st.sampled_from([SAVE_TABLES, SAVE_TABLES, RESTORE_TABLES, RESTORE_TABLES, RESET])
    ),
    st.tuples(st.just("poke"), st.just(0), st.tuples(table_places, table_words)),
    st.tuples(st.just("lpis"), st.just(0), st.tuples(st.integers(0, VCPUS - 1), st.booleans())),
)

START = (
    mapc(0, 0),
    mapc(1, 1),
    mapd(0),
    mapd(1),
    *(mapti(0, event, LPI + event, event % 2) for event in range(4)),
)


def walk(sequence: list[tuple[str, int, Any]], gap: int, indirect: bool) -> None:
    both = Both(gap, indirect=indirect)
    for command in START:
        both.step("command", 0, command)
    for step in sequence:
        both.step(*step)
        if step[0] == "control":
            both.compare_memory()
            both.move()
    both.compare_memory()


@given(st.lists(steps, max_size=40), st.sampled_from([0, 0x2_0000]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_sequence(sequence: list[tuple[str, int, Any]], gap: int, indirect: bool) -> None:
    """Answers, registers, maps, LPIs, the translation cache and memory are those of the plain description.

    Also when the machine is exchanged, now and then, for one made from its state.
    """
    walk(sequence, gap, indirect)


entries = st.one_of(
    table_words,
    st.sampled_from([0, VALID, (1 << 64) - 1]),
    st.integers(0, 63).map(lambda bit: 1 << bit),
)
"""What an entry is damaged with, by exclusive or."""
places = st.builds(
    lambda base, n: base + 8 * n,
    st.sampled_from([DEVICE_TABLE, COLLECTION_TABLE, itt(0), itt(1), itt(2), LEVEL2]),
    st.integers(0, 5),
)


@given(
    st.lists(st.tuples(st.just("command"), st.just(0), commands), max_size=15),
    st.lists(st.tuples(places, entries), min_size=1, max_size=5),
    st.lists(st.tuples(st.just("msi"), st.just(0), msis), max_size=6),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_damaged_tables(
    sequence: list[tuple[str, int, Any]],
    damage: list[tuple[int, int]],
    senders: list[tuple[str, int, Any]],
    indirect: bool,
) -> None:
    """Whatever is done to saved tables, what restoring them answers and leaves is what the description says."""
    both = Both(indirect=indirect)
    for command in START:
        both.step("command", 0, command)
    for step in sequence:
        both.step(*step)
    both.step("control", 0, SAVE_TABLES)
    baser = [both.models[0].baser[n] for n in range(2)]
    both.step("control", 0, RESET)
    for address, bits in damage:
        both.poke((address, int.from_bytes(both.machine.memory.read(address, 8), "little") ^ bits))
    both.register(0, CBASER, VALID | QUEUE)
    for n in range(2):
        both.register(0, BASER0 + 8 * n, baser[n])
    both.step("control", 0, RESTORE_TABLES)
    both.compare_memory()
    both.register(0, CTLR, 1)
    for step in senders:
        both.step(*step)
    both.step("control", 0, SAVE_TABLES)
    both.compare_memory()


@pytest.mark.soak
@given(st.lists(steps, max_size=150), st.sampled_from([0, 0x2_0000]), st.booleans())
@settings(max_examples=3000, deadline=None)
def test_any_long_sequence(sequence: list[tuple[str, int, Any]], gap: int, indirect: bool) -> None:
    """The same, at length."""
    walk(sequence, gap, indirect)
