"""The 8254: counters through their ports, ticks of channel 0 and their reinjection, and its calls."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from x86_guests import X86Vm, simulate
from x86_machine import Apics, Pc, outcome

from fabric.devices.x86.irqchip import SOURCE_PIT
from fabric.devices.x86.lapic import LVT0
from fabric.devices.x86.pit import FLAG_HPET_LEGACY, FREQUENCY, Pit, to_ns
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.x86 import KvmPitConfig, KvmPitState, KvmPitState2, KvmReinjectControl

CONTROL, SPEAKER = 0x43, 0x61
LATCHED, LOW, HIGH, BOTH = 0x00, 0x10, 0x20, 0x30
SECOND = 1_000_000_000
COUNT = 11_932
"""About 10 ms."""


class Board:
    """A PIT on the first inputs of PIC and IOAPIC, and a CPU that takes what comes."""

    def __init__(self, *, speaker: bool = True) -> None:
        self.machine = Apics([0], whole=True)
        self.vm = self.machine.vm
        self.irqchip: Any = self.vm.irqchip
        self.driven: list[bool] = []
        self.pit = Pit(self.vm, self._drive, speaker=speaker)  # type: ignore[arg-type]
        self.irqchip.pit = self.pit
        self.irqchip.gsi_ended[0] = [self.pit.ended]
        self.irqchip.gsi_unmasked[0] = [self.pit.reset_reinjection]
        for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0)):
            self.outb(port, value)

    def _drive(self, level: bool) -> None:
        self.driven.append(level)
        self.irqchip.pic.set_irq(0, level, SOURCE_PIT)

    def outb(self, port: int, value: int) -> None:
        handler, offset = self.vm.pio.find(port, 1)
        handler.mmio_write(offset, 1, value, None)

    def inb(self, port: int) -> int:
        handler, offset = self.vm.pio.find(port, 1)
        value: int = handler.mmio_read(offset, 1, None)
        return value

    def program(self, channel: int, mode: int, count: int) -> None:
        """Control word, low byte, high byte."""
        self.outb(CONTROL, channel << 6 | BOTH | mode << 1)
        self.outb(0x40 + channel, count & 0xFF)
        self.outb(0x40 + channel, count >> 8)

    def count(self, channel: int) -> int:
        """Latch and read."""
        self.outb(CONTROL, channel << 6 | LATCHED)
        low = self.inb(0x40 + channel)
        return self.inb(0x40 + channel) << 8 | low

    def ticks(self, n: int) -> None:
        """Let ``n`` ticks of the 8254 pass, and a moment."""
        self.vm.clock.advance(-(-n * SECOND // FREQUENCY) + 1)

    @property
    def raised(self) -> int:
        """Ticks that the line saw."""
        return sum(self.driven)

    def serve(self) -> None:
        """Take the interrupt and end it."""
        assert 0x20 == self.irqchip.pic.acknowledge()
        self.outb(0x20, 0x20)


@pytest.fixture
def board() -> Board:
    return Board()


# -- counters


@pytest.mark.parametrize("mode", [0, 1, 4, 5])
def test_a_counter_counts_down(board: Board, mode: int) -> None:
    """Every tick takes one away; past 0 it goes on from the top (8254, Mode Definitions)."""
    board.program(2, mode, 1000)
    board.ticks(100)
    assert 900 == board.count(2)
    board.ticks(1000)

    assert 0x10000 - 100 <= board.count(2) + 1 <= 0x10000 - 98


def test_mode_2_reloads(board: Board) -> None:
    """Rate generator: from 1 the counter goes back to N."""
    board.program(2, 2, 1000)
    board.ticks(2300)

    assert 700 == board.count(2)


def test_mode_3_counts_by_two(board: Board) -> None:
    """Square wave: the counter is decremented by two, twice a period."""
    board.program(2, 3, 1000)
    board.ticks(100)
    assert 800 == board.count(2)
    board.ticks(450)

    assert 900 == board.count(2)


@pytest.mark.parametrize(
    ("mode", "after", "levels"),
    [
        (0, (0, 999, 1001), (0, 0, 1)),
        (1, (0, 999, 1001), (1, 1, 0)),
        (3, (0, 400, 600, 1100), (1, 1, 0, 1)),
    ],
)
def test_output(board: Board, mode: int, after: tuple[int, ...], levels: tuple[int, ...]) -> None:
    """OUT of modes 0 (high at the end), 1 (low until the end, inverted by KVM: high), 3 (half and half)."""
    board.program(2, mode, 1000)
    found = []
    passed = 0
    for moment in after:
        board.ticks(moment - passed)
        passed = moment
        found.append(board.inb(SPEAKER) >> 5 & 1)

    assert list(levels) == found


def test_count_0_is_65536(board: Board) -> None:
    """The largest count is 0 (8254, Counter Programming)."""
    board.program(2, 2, 0)

    assert 0x10000 == board.pit.channels[2].count


@pytest.mark.parametrize(("access", "written", "count"), [(LOW, 0x34, 0x34), (HIGH, 0x12, 0x1200)])
def test_single_bytes(board: Board, access: int, written: int, count: int) -> None:
    """RW = 1: the low byte only, RW = 2: the high byte only."""
    board.outb(CONTROL, 2 << 6 | access | 2 << 1)
    board.outb(0x42, written)

    assert count == board.pit.channels[2].count
    assert written == board.inb(0x42)


def test_two_bytes_low_first(board: Board) -> None:
    """RW = 3: low byte first, for writing and for reading; nothing is loaded before the second."""
    board.outb(CONTROL, 2 << 6 | BOTH | 2 << 1)
    board.outb(0x42, 0x34)
    assert 0x10000 == board.pit.channels[2].count
    board.outb(0x42, 0x12)

    assert [0x34, 0x12, 0x34] == [board.inb(0x42) for _ in range(3)]


def test_a_latched_count_stays(board: Board) -> None:
    """It is held until it is read; latching again before that does nothing (Counter Latch Command)."""
    board.program(2, 2, 1000)
    board.ticks(100)
    board.outb(CONTROL, 2 << 6)
    board.ticks(100)
    board.outb(CONTROL, 2 << 6)

    assert 900 == board.inb(0x42) | board.inb(0x42) << 8
    assert 800 == board.count(2)


def test_half_of_a_latched_count_is_saved(board: Board) -> None:
    """After the low byte the state says that the high one is next, as for RW = 2."""
    board.program(2, 2, 0x1234)
    board.outb(CONTROL, 2 << 6)
    board.inb(0x42)

    assert 2 == board.pit.state()["channels"][2]["count_latched"]


def test_read_back(board: Board) -> None:
    """Counts and status of several counters are latched at once; the status is read first (Read-Back Command)."""
    board.program(1, 2, 1000)
    board.program(2, 3, 2000)
    board.outb(CONTROL, 0xC0 | 0x0C)
    board.ticks(100)

    status = [board.inb(0x40 + n) for n in (1, 2)]
    assert [2 << 1 | BOTH, 0x80 | 3 << 1 | BOTH] == status
    assert 1000 == board.inb(0x41) | board.inb(0x41) << 8
    assert 2000 == board.inb(0x42) | board.inb(0x42) << 8


def test_modes_6_and_7_are_2_and_3(board: Board) -> None:
    """M2 is not looked at in modes 2 and 3 (Control Word Format)."""
    board.outb(CONTROL, 2 << 6 | BOTH | 6 << 1)
    assert 2 == board.pit.channels[2].mode
    board.outb(CONTROL, 2 << 6 | BOTH | 7 << 1)

    assert 3 == board.pit.channels[2].mode


def test_the_control_port_reads_0(board: Board) -> None:
    """There is no reading of the control word register."""
    assert 0 == board.inb(CONTROL)


def test_gate_2_starts_anew(board: Board) -> None:
    """A rising edge at the gate reloads modes 1, 2, 3 and 5; port 0x61 bit 0 is the gate of channel 2."""
    board.outb(SPEAKER, 0)
    board.program(2, 3, 1000)
    board.ticks(100)
    board.outb(SPEAKER, 1)

    assert 1000 == board.count(2)
    board.ticks(100)
    board.outb(SPEAKER, 1)
    assert 800 == board.count(2)


def test_speaker_port(board: Board) -> None:
    """Bits 0 and 1 read back; bit 4 toggles; the speaker's data is in the flags of the state."""
    board.outb(SPEAKER, 3)
    board.vm.clock.advance(1 << 14)

    assert 0x13 == board.inb(SPEAKER) & 0x1F
    assert 2 == board.pit.state()["flags"]
    board.outb(SPEAKER, 0)
    assert 0 == board.pit.state()["flags"]


@given(st.integers(1, 0xFFFF), st.integers(0, 10 * SECOND))
@settings(deadline=None)
def test_the_counter_is_that_of_its_time(count: int, ns: int) -> None:
    """Mode 2: N less the ticks since the load, modulo N."""
    board = Board()
    board.program(2, 2, count)
    board.vm.clock.advance(ns)

    assert count - ns * 1_193_182 // SECOND % count == board.count(2)


# -- ticks


def test_channel_0_ticks(board: Board) -> None:
    """In mode 2 every N ticks of the clock are one interrupt."""
    board.program(0, 2, COUNT)
    for n in range(3):
        board.vm.clock.advance(to_ns(COUNT))
        assert n + 1 == board.raised
        board.serve()

    assert [True, False] * 3 == board.driven
    board.machine.check()


@pytest.mark.parametrize("mode", [0, 1, 4])
def test_modes_that_tick_once(board: Board, mode: int) -> None:
    """Modes 0, 1 and 4 end with one interrupt."""
    board.program(0, mode, COUNT)
    board.vm.clock.advance(SECOND)

    assert 1 == board.raised


def test_channel_0_shows_what_its_timer_has_left(board: Board) -> None:
    """Its counter follows the timer, also when the state was restored with an old load time."""
    board.program(0, 2, COUNT)
    board.vm.clock.advance(SECOND)
    state = board.pit.state()
    board.pit.set_state(state["channels"], state["flags"])
    board.ticks(100)

    assert COUNT - 100 == board.count(0)


def test_too_short_a_period_is_stretched(board: Board) -> None:
    """A periodic timer of KVM's comes every 200 us at most; the first tick when it is due."""
    board.pit.reinject = False
    board.program(0, 2, 12)
    board.vm.clock.advance(1_000_000)

    assert 5 == board.raised


def test_the_counter_of_a_stretched_period(board: Board) -> None:
    """It shows what is left until the next tick: as if the period of 200 us had begun before the load."""
    board.program(0, 2, 100)
    left = to_ns(100)
    passed = (200_000 - left) * FREQUENCY // SECOND

    assert 100 - passed % 100 == board.count(0)


def test_a_new_mode_without_a_count_goes_on(board: Board) -> None:
    """The control word alone does not stop the timer."""
    board.program(0, 2, COUNT)
    board.outb(CONTROL, BOTH | 0 << 1)
    board.vm.clock.advance(to_ns(COUNT))

    assert 1 == board.raised


def test_hpet_legacy_stops_channel_0(board: Board) -> None:
    """With the flag the HPET has taken the PIT's place: channel 0 does not tick."""
    board.program(0, 2, COUNT)
    state = board.pit.state()
    board.pit.set_state(state["channels"], FLAG_HPET_LEGACY)
    board.vm.clock.advance(SECOND)

    assert 0 == board.raised


def test_nmi_watchdog(board: Board) -> None:
    """Virtual wire: each tick is also an NMI where LINT0 is one."""
    apic = board.machine.apics[0]
    apic.write(LVT0, 4 << 8)
    board.program(0, 0, COUNT)
    board.vm.clock.advance(SECOND)

    assert ["NMI"] == board.vm.vcpus[0].received


@pytest.mark.spec("api.reinject-control.rule.reinject", "api.create-pit2.rule.reinject-default")
def test_reinjection_keeps_ticks(board: Board) -> None:
    """Ticks that come before the last one was ended are owed, and raised one at each end."""
    board.program(0, 2, COUNT)
    board.vm.clock.advance(4 * to_ns(COUNT))
    assert 1 == board.raised
    board.program(0, 0, 0xFFFF)  # would forget them
    board.program(0, 2, COUNT)
    board.serve()
    board.vm.clock.advance(4 * to_ns(COUNT))
    counts = []
    for _ in range(4):
        counts.append(board.raised)
        board.serve()

    assert [2, 3, 4, 5] == counts
    assert 5 == board.raised
    board.machine.check()


@pytest.mark.spec("api.reinject-control.rule.no-reinject")
def test_without_reinjection_ticks_merge(board: Board) -> None:
    """Each tick is raised as it comes, and merges with one that waits."""
    board.pit.reinject = False
    board.program(0, 2, COUNT)
    board.vm.clock.advance(4 * to_ns(COUNT))
    assert 4 == board.raised
    board.serve()

    assert 4 == board.raised
    assert (4, 1, 3) == (board.vm.ledger.raised, board.vm.ledger.delivered, board.vm.ledger.coalesced)
    board.machine.check()


def test_unmasking_forgets_ticks(board: Board) -> None:
    """What came while the guest had the input masked is not owed."""
    board.program(0, 2, COUNT)
    board.vm.clock.advance(to_ns(COUNT))
    board.outb(0x21, 1)
    board.vm.clock.advance(5 * to_ns(COUNT))
    board.outb(0x21, 0)
    board.serve()

    assert 0 == board.pit.owed
    assert 1 == board.raised


@given(st.lists(st.one_of(st.integers(0, 3), st.just("serve")), max_size=30), st.booleans())
@settings(deadline=None)
def test_ticks_are_served_in_full_or_merged(events: list[Any], reinject: bool) -> None:
    """With reinjection a guest that serves all it is given has as many interrupts as there were ticks."""
    board = Board()
    board.pit.reinject = reinject
    board.program(0, 2, COUNT)
    due = served = 0
    for event in events:
        if event == "serve":
            if board.irqchip.pic.level:
                board.serve()
                served += 1
        else:
            board.vm.clock.advance(event * to_ns(COUNT))
            due += event
        board.machine.check()
    while board.irqchip.pic.level:
        board.serve()
        served += 1

    assert due == (served if reinject else served + board.vm.ledger.coalesced)


# -- calls


@pytest.fixture
def pc() -> Pc:
    return Pc(0)


def create(pc: Pc, flags: int = 0) -> Any:
    return outcome(pc.vm.ioctl, requests.KVM_CREATE_PIT2, KvmPitConfig(flags))


def get(pc: Pc) -> Any:
    buffer = bytearray(KvmPitState2.SIZE)
    pc.vm.ioctl(requests.KVM_GET_PIT2, buffer)
    return KvmPitState2.unpack(buffer)


@pytest.mark.spec("api.create-pit2", "api.cap.pit2", "api.create-pit2.EEXIST.already")
def test_one_pit(pc: Pc) -> None:
    """KVM_CREATE_PIT2 makes one; another one is EEXIST, by either call."""
    assert 0 == create(pc)

    assert "EEXIST" == create(pc)
    assert "EEXIST" == outcome(pc.vm.ioctl, requests.KVM_CREATE_PIT)
    assert 1 == pc.vm.check_extension(uapi.KVM_CAP_PIT2)


@pytest.mark.spec("api.create-pit2.note.irqchip")
@pytest.mark.parametrize("irqchip", ["", "split"])
def test_a_pit_needs_a_pic(irqchip: str) -> None:
    """ENOENT without a PIC in the kernel (Linux 6.18)."""
    assert "ENOENT" == create(Pc(0, irqchip=irqchip))


@pytest.mark.spec("api.create-pit2.EFAULT.struct")
def test_create_reads_its_struct(pc: Pc) -> None:
    """EFAULT for a bad pointer, before anything else."""
    assert "EFAULT" == outcome(pc.vm.ioctl, requests.KVM_CREATE_PIT2, 0x10)


@pytest.mark.spec("api.create-pit2.rule.speaker")
def test_the_speaker_is_an_option(pc: Pc) -> None:
    """Flag 1 puts port 0x61 into the kernel, other flags are not looked at; KVM_CREATE_PIT has it always."""
    create(pc, 1)
    plain, old = Pc(0), Pc(0)
    create(plain, 0xFE)
    old.vm.ioctl(requests.KVM_CREATE_PIT)

    assert [True, False, True] == [vm.inside.pio.find(SPEAKER, 1) is not None for vm in (pc, plain, old)]


@pytest.mark.spec("api.get-pit2", "api.set-pit2", "api.cap.pit-state2")
def test_state_goes_round(pc: Pc) -> None:
    """All channels and flags; a count of 0 becomes 65536."""
    create(pc)
    state = get(pc)
    channels = tuple(
        channel.with_(count=n * 100, mode=2, rw_mode=3, gate=1, latched_count=7)
        for n, channel in enumerate(state.channels)
    )
    pc.vm.ioctl(requests.KVM_SET_PIT2, state.with_(channels=channels, flags=FLAG_HPET_LEGACY))
    found = get(pc)

    assert [0x10000, 100, 200] == [channel.count for channel in found.channels]
    assert [(2, 3, 1, 7)] * 3 == [(c.mode, c.rw_mode, c.gate, c.latched_count) for c in found.channels]
    assert FLAG_HPET_LEGACY == found.flags


def test_the_old_calls_have_no_flags(pc: Pc) -> None:
    """KVM_GET_PIT and KVM_SET_PIT are the channels alone; the flags stay."""
    create(pc)
    pc.vm.ioctl(requests.KVM_SET_PIT2, get(pc).with_(flags=FLAG_HPET_LEGACY))
    buffer = bytearray(KvmPitState.SIZE)
    pc.vm.ioctl(requests.KVM_GET_PIT, buffer)
    pc.vm.ioctl(requests.KVM_SET_PIT, buffer)

    assert get(pc).channels == KvmPitState.unpack(buffer).channels
    assert FLAG_HPET_LEGACY == get(pc).flags


@pytest.mark.spec("api.get-pit2.ENXIO.none", "api.set-pit2.ENXIO.none", "api.reinject-control.ENXIO.no-pit")
@pytest.mark.parametrize("irqchip", ["whole", "split", ""])
def test_without_a_pit(irqchip: str) -> None:
    """ENXIO."""
    pc = Pc(0, irqchip=irqchip)

    assert "ENXIO" == outcome(get, pc)
    assert "ENXIO" == outcome(pc.vm.ioctl, requests.KVM_SET_PIT2, KvmPitState2())
    assert "ENXIO" == outcome(pc.vm.ioctl, requests.KVM_REINJECT_CONTROL, KvmReinjectControl(0))


@pytest.mark.spec("api.get-pit2.EFAULT.user-ptr", "api.set-pit2.EFAULT.user-ptr", "api.reinject-control.EFAULT.struct")
def test_bad_pointers(pc: Pc) -> None:
    """EFAULT; of the calls that read, also without a PIT."""
    for request in (requests.KVM_SET_PIT2, requests.KVM_REINJECT_CONTROL):
        assert "EFAULT" == outcome(pc.vm.ioctl, request, 0x10)
    create(pc)

    assert "EFAULT" == outcome(pc.vm.ioctl, requests.KVM_GET_PIT2, 0x10)


@pytest.mark.spec("api.reinject-control", "api.cap.reinject-control", "api.reinject-control.note.request")
def test_reinjection_is_switched(pc: Pc) -> None:
    """pit_reinject 0 turns it off, anything else on; the request has neither size nor direction."""
    create(pc)
    pit = pc.inside.irqchip.pit
    assert pit.reinject
    pc.vm.ioctl(requests.KVM_REINJECT_CONTROL, KvmReinjectControl(0))
    assert not pit.reinject
    pc.vm.ioctl(requests.KVM_REINJECT_CONTROL, KvmReinjectControl(5))

    assert pit.reinject
    assert 0xAE71 == requests.KVM_REINJECT_CONTROL
    assert 1 == pc.vm.check_extension(uapi.KVM_CAP_REINJECT_CONTROL)


@pytest.mark.spec("api.reinject-control.rule.reinject", "api.create-pit2.rule.reinject-default")
def test_a_guest_gets_every_tick() -> None:
    """Through KVM_RUN: a guest that is late gets the ticks that it missed one after the other, by its EOIs."""

    async def main(vm: X86Vm) -> None:
        vm.vm.ioctl(requests.KVM_CREATE_PIT2, KvmPitConfig())
        await vm.run()
        assert vm.ledger.balanced

    async def guest(vm: X86Vm, cpu: Any) -> None:
        async def tick(inner: Any) -> None:
            vm.note("tick")
            await inner.outp(0x20, 1, 0x20)

        for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE)):
            await cpu.outp(port, 1, value)
        cpu.set_gate(0x20, tick)
        for port, value in ((CONTROL, BOTH | 2 << 1), (0x40, COUNT & 0xFF), (0x40, COUNT >> 8)):
            await cpu.outp(port, 1, value)
        await cpu.compute(3 * to_ns(COUNT) + 1000)
        cpu.sti()
        await cpu.compute(1000)
        await cpu.compute(to_ns(COUNT))

    log = simulate(main, guest)
    late = 3 * to_ns(COUNT) + 1000

    assert [late, late, late, 4 * to_ns(COUNT)] == [when for when, what in log if what == "tick"]
