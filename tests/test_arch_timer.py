"""The ARM generic timer: counters, compare values, lines, and what userspace sees of them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fabric
from fabric.clock import current_engine
from fabric.clock.arch_timer import (
    DEFAULT_FREQUENCY,
    ENABLE,
    IMASK,
    ISTATUS,
    NEVER_NS,
    NS,
    ArchCounter,
    ArchTimers,
)
from fabric.errors import KvmError
from fabric.uapi.arm64 import (
    KVM_REG_ARM_PTIMER_CNT,
    KVM_REG_ARM_PTIMER_CTL,
    KVM_REG_ARM_PTIMER_CVAL,
    KVM_REG_ARM_TIMER_CNT,
    KVM_REG_ARM_TIMER_CTL,
    KVM_REG_ARM_TIMER_CVAL,
)

TICK = NS // DEFAULT_FREQUENCY  # 16 ns
ALL_ONES = (1 << 64) - 1


class HandTimer:
    """A timer of a :class:`HandClock`."""

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback = callback
        self.deadline: int | None = None

    def arm(self, at_ns: int) -> None:
        self.deadline = at_ns

    def cancel(self) -> None:
        self.deadline = None


class HandClock:
    """Virtual time that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0
        self.timers: list[HandTimer] = []

    def timer(self, callback: Callable[[], object], *, name: str) -> HandTimer:
        timer = HandTimer(callback)
        self.timers.append(timer)
        return timer

    def advance_to(self, at_ns: int) -> None:
        """Fire what falls due, in order, and end at that time."""
        while due := [t for t in self.timers if t.deadline is not None and t.deadline <= at_ns]:
            timer = min(due, key=lambda t: t.deadline or 0)
            self.now = max(self.now, timer.deadline or 0)
            timer.deadline = None
            timer.callback()
        self.now = at_ns


class Machine:
    """One vCPU whose virtual timer's line movements are noted as (time, level)."""

    def __init__(self, frequency: int = DEFAULT_FREQUENCY, start: int = 0) -> None:
        self.clock = HandClock()
        self.counter = ArchCounter(self.clock, frequency=frequency, start=start)
        self.line: list[tuple[int, bool]] = []
        self.timers = ArchTimers(self.counter, virtual_sink=lambda level: self.line.append((self.clock.now, level)))
        self.timers.load()
        self.read = self.timers.read_sysreg
        self.write = self.timers.write_sysreg


@pytest.fixture
def machine() -> Machine:
    return Machine()


class TestCounter:
    def test_counts_at_its_frequency(self, machine: Machine) -> None:
        """62.5 MHz: a tick is complete every 16 ns."""
        machine.clock.now = 31

        assert (62_500_000, 1) == (machine.read("CNTFRQ_EL0"), machine.read("CNTPCT_EL0"))
        machine.clock.now = 10 * NS
        assert 625_000_000 == machine.read("CNTPCT_EL0")

    def test_the_virtual_counter_starts_when_the_last_vcpu_is_created(self) -> None:
        """Creating a vCPU starts the virtual counter again, for all of them; the physical one goes on."""
        machine = Machine(start=1000)
        machine.clock.now = 100 * TICK
        second = ArchTimers(machine.counter)
        machine.clock.now = 103 * TICK

        assert (3, 3) == (machine.read("CNTVCT_EL0"), second.read_sysreg("CNTVCT_EL0"))
        assert 1103 == machine.read("CNTPCT_EL0")

    def test_a_bad_frequency_is_refused(self) -> None:
        """Counters run forward."""
        with pytest.raises(ValueError, match="frequency must be positive, not 0 Hz"):
            ArchCounter(HandClock(), frequency=0)

    @given(
        frequency=st.integers(1, 10 * NS),
        now=st.integers(0, 1 << 62),
        ticks=st.integers(1, 1 << 40),
        start=st.integers(0, ALL_ONES),
    )
    def test_time_of_a_tick(self, frequency: int, now: int, ticks: int, start: int) -> None:
        """A tick is reached at the first nanosecond that has it: not one before, whatever the frequency."""
        clock = HandClock()
        counter = ArchCounter(clock, frequency=frequency, start=start)
        clock.now = now
        target = counter.physical() + ticks
        reached = counter.time_in(ticks)

        completed = Fraction(now * frequency, NS).__floor__() + ticks
        assert Fraction(completed * NS, frequency).__ceil__() == reached
        clock.now = reached
        assert (counter.physical() - target) & ALL_ONES < 1 << 63
        clock.now = reached - 1
        assert (counter.physical() - target) & ALL_ONES >= 1 << 63


class TestTimer:
    def test_fires_when_the_compare_value_is_reached(self, machine: Machine) -> None:
        """The line goes up at the nanosecond the counter reaches CVAL, and stays up."""
        machine.write("CNTV_CVAL_EL0", 100)
        machine.write("CNTV_CTL_EL0", ENABLE)
        machine.clock.advance_to(100 * TICK - 1)

        assert [] == machine.line
        machine.clock.advance_to(200 * TICK)
        assert [(100 * TICK, True)] == machine.line
        assert ENABLE | ISTATUS == machine.read("CNTV_CTL_EL0")

    def test_the_line_follows_the_registers(self, machine: Machine) -> None:
        """A later CVAL, the mask and the enable bit each lower the line; taking them back raises it again."""
        machine.write("CNTV_CTL_EL0", ENABLE)
        for name, away, back in (
            ("CNTV_CVAL_EL0", 50, 0),
            ("CNTV_CTL_EL0", ENABLE | IMASK, ENABLE),
            ("CNTV_CTL_EL0", 0, ENABLE),
        ):
            machine.write(name, away)
            machine.write(name, back)

        assert [(0, True), *[(0, False), (0, True)] * 3] == machine.line

    def test_a_masked_timer_shows_its_status(self, machine: Machine) -> None:
        """IMASK keeps the line down, ISTATUS tells nevertheless."""
        machine.write("CNTV_CVAL_EL0", 10)
        machine.write("CNTV_CTL_EL0", ENABLE | IMASK)
        machine.clock.advance_to(20 * TICK)

        assert [] == machine.line
        assert ENABLE | IMASK | ISTATUS == machine.read("CNTV_CTL_EL0")

    @pytest.mark.parametrize(
        ("tval", "cval"), [(5, 105), (0, 100), (0xFFFF_FFFF, 99), (0x8000_0000, 100 - (1 << 31) & ALL_ONES)]
    )
    def test_tval_is_relative_and_signed(self, machine: Machine, tval: int, cval: int) -> None:
        """A write of TVAL sets CVAL to so many ticks from now; a read gives what is left, in 32 bits."""
        machine.clock.now = 100 * TICK
        machine.write("CNTV_TVAL_EL0", tval)

        assert cval == machine.read("CNTV_CVAL_EL0")
        assert tval == machine.read("CNTV_TVAL_EL0")
        machine.clock.now += 3 * TICK
        assert tval - 3 & 0xFFFF_FFFF == machine.read("CNTV_TVAL_EL0")

    def test_status_is_read_only(self, machine: Machine) -> None:
        """A write of CTL keeps ENABLE and IMASK only."""
        machine.write("CNTV_CVAL_EL0", 10)
        machine.write("CNTV_CTL_EL0", ALL_ONES)

        assert ENABLE | IMASK == machine.read("CNTV_CTL_EL0")

    def test_the_physical_timer_has_its_own_counter_and_line(self) -> None:
        """It compares with the physical counter, whatever the virtual offset."""
        clock = HandClock()
        lines: list[object] = []
        clock.now = 1000 * TICK
        counter = ArchCounter(clock)
        timers = ArchTimers(counter, virtual_sink=lines.append, physical_sink=lambda level: lines.append("p"))
        timers.load()
        timers.write_sysreg("CNTP_CVAL_EL0", 1500)
        timers.write_sysreg("CNTP_CTL_EL0", ENABLE)
        clock.advance_to(1499 * TICK)

        assert [] == lines
        clock.advance_to(1500 * TICK)
        assert ["p"] == lines
        assert (1500, 0) == (timers.read_sysreg("CNTP_CVAL_EL0"), timers.read_sysreg("CNTP_TVAL_EL0"))
        timers.write_sysreg("CNTP_TVAL_EL0", 10)
        assert ENABLE == timers.read_sysreg("CNTP_CTL_EL0")

    def test_never_is_not_armed(self, machine: Machine) -> None:
        """An all-ones compare value schedules nothing, so that an idle machine is seen to be idle."""
        machine.write("CNTV_CVAL_EL0", ALL_ONES)
        machine.write("CNTV_CTL_EL0", ENABLE)

        assert [None, None] == [timer.deadline for timer in machine.clock.timers]

    def test_an_expired_timer_is_not_armed(self, machine: Machine) -> None:
        """Once the line is up only registers bring it down within a lifetime."""
        machine.write("CNTV_CVAL_EL0", 5)
        machine.write("CNTV_CTL_EL0", ENABLE)
        machine.clock.advance_to(5 * TICK)

        assert [None, None] == [timer.deadline for timer in machine.clock.timers]

    def test_the_counter_wraps(self, machine: Machine) -> None:
        """Comparison is unsigned: when a counter set near its end starts over, the condition ends too."""
        machine.timers.set_one_reg(KVM_REG_ARM_TIMER_CNT, ALL_ONES - 9)
        machine.write("CNTV_CVAL_EL0", ALL_ONES - 4)
        machine.write("CNTV_CTL_EL0", ENABLE)
        machine.clock.advance_to(20 * TICK)

        assert [(5 * TICK, True), (10 * TICK, False)] == machine.line
        assert 10 == machine.read("CNTVCT_EL0")

    @given(
        frequency=st.integers(1_000_000, 2 * NS),
        steps=st.lists(
            st.tuples(
                st.sampled_from(["ctl", "cval", "tval", "cnt", "load", "put", "wait"]),
                st.integers(0, 2000),
            ),
            max_size=30,
        ),
    )
    def test_the_line_is_never_wrong(self, frequency: int, steps: list[tuple[str, int]]) -> None:
        """While the vCPU is loaded the line is what the registers and the counter say, at every step."""
        machine = Machine(frequency)
        timers = machine.timers
        for what, value in steps:
            if what == "ctl":
                machine.write("CNTV_CTL_EL0", value)
            elif what == "cval":
                machine.write("CNTV_CVAL_EL0", value)
            elif what == "tval":
                machine.write("CNTV_TVAL_EL0", value - 1000)
            elif what == "cnt":
                timers.set_one_reg(KVM_REG_ARM_TIMER_CNT, value)
            elif what == "load":
                timers.load()
            elif what == "put":
                timers.put()
            else:
                machine.clock.advance_to(machine.clock.now + value)
            timers._check()
            level = machine.read("CNTV_CTL_EL0") & 7 == ENABLE | ISTATUS
            if timers.virtual.loaded:
                assert level == timers.virtual.level
        levels = [level for _, level in machine.line]
        assert [number % 2 == 0 for number in range(len(levels))] == levels


class TestInASimulation:
    def test_fires_in_virtual_time(self) -> None:
        """On the engine's clock the line rises at the very nanosecond, while other tasks sleep."""
        line: list[tuple[int, bool]] = []

        async def main() -> None:
            engine = current_engine()
            assert engine is not None
            timers = ArchTimers(ArchCounter(engine), virtual_sink=lambda level: line.append((fabric.now(), level)))
            timers.load()
            await fabric.sleep(5)
            timers.write_sysreg("CNTV_TVAL_EL0", 10)
            timers.write_sysreg("CNTV_CTL_EL0", ENABLE)
            await fabric.sleep(1000)
            timers.destroy()

        fabric.run(main)

        assert [(10 * TICK, True)] == line


class TestRunning:
    def test_the_line_waits_for_the_vcpu(self, machine: Machine) -> None:
        """A timer that expires while its vCPU is outside KVM_RUN raises its line at the next entry."""
        machine.write("CNTV_CVAL_EL0", 10)
        machine.write("CNTV_CTL_EL0", ENABLE)
        machine.timers.put()
        machine.clock.advance_to(30 * TICK)

        assert [] == machine.line
        machine.timers.load()
        assert [(30 * TICK, True)] == machine.line

    def test_registers_set_by_userspace_show_at_the_next_entry(self, machine: Machine) -> None:
        """KVM_SET_ONE_REG changes no line by itself."""
        machine.timers.put()
        machine.timers.set_one_reg(KVM_REG_ARM_TIMER_CTL, ENABLE)

        assert [] == machine.line
        machine.timers.load()
        assert [(0, True)] == machine.line

    def test_a_new_count_reaches_vcpus_that_run(self, machine: Machine) -> None:
        """TIMER_CNT set on one vCPU moves the counter, and so the timers, of the others."""
        machine.write("CNTV_CVAL_EL0", 1000)
        machine.write("CNTV_CTL_EL0", ENABLE)
        other = ArchTimers(machine.counter)
        other.set_one_reg(KVM_REG_ARM_TIMER_CNT, 1000)

        assert [(0, True)] == machine.line

    def test_reset_disables(self, machine: Machine) -> None:
        """KVM_ARM_VCPU_INIT clears CTL and lowers the line; CVAL stays."""
        machine.write("CNTV_CVAL_EL0", 0)
        machine.write("CNTV_CTL_EL0", ENABLE)
        machine.timers.put()
        machine.write("CNTV_CVAL_EL0", 7)
        machine.timers.reset()

        assert [(0, True), (0, False)] == machine.line
        assert (0, 7) == (machine.read("CNTV_CTL_EL0"), machine.read("CNTV_CVAL_EL0"))

    def test_a_destroyed_vcpu_is_silent(self, machine: Machine) -> None:
        """No callback comes after the vCPU is gone."""
        machine.write("CNTV_CVAL_EL0", 10)
        machine.write("CNTV_CTL_EL0", ENABLE)
        machine.timers.destroy()
        machine.clock.advance_to(20 * TICK)

        assert [] == machine.line
        assert [] == machine.counter.vcpus


class TestOneReg:
    @pytest.mark.spec("api.reg.timer-ctl", "api.reg.timer-cval", "api.reg.timer-cnt")
    def test_values(self, machine: Machine) -> None:
        """CTL, CVAL and CNT of the virtual timer are read and written whole."""
        machine.timers.set_one_reg(KVM_REG_ARM_TIMER_CVAL, ALL_ONES)
        machine.timers.set_one_reg(KVM_REG_ARM_TIMER_CTL, ENABLE | IMASK)
        machine.timers.set_one_reg(KVM_REG_ARM_TIMER_CNT, 1 << 40)
        machine.clock.now = 8 * TICK

        assert [ENABLE | IMASK, (1 << 40) + 8, ALL_ONES] == [
            machine.timers.get_one_reg(reg_id) for reg_id in machine.timers.ONE_REG_IDS
        ]

    def test_status_of_a_disabled_timer(self, machine: Machine) -> None:
        """Userspace sees ISTATUS of a timer that is off: a fresh vCPU has CVAL 0, so CTL reads 4."""
        assert ISTATUS == machine.timers.get_one_reg(KVM_REG_ARM_TIMER_CTL)
        assert 0 == machine.read("CNTV_CTL_EL0")

    def test_undefined_control_bits_last_until_the_vcpu_runs(self, machine: Machine) -> None:
        """KVM keeps 32 bits of CTL less ISTATUS; the register that is loaded from it has two."""
        machine.timers.put()
        machine.timers.set_one_reg(KVM_REG_ARM_TIMER_CVAL, ALL_ONES)
        machine.timers.set_one_reg(KVM_REG_ARM_TIMER_CTL, ALL_ONES)

        assert 0xFFFF_FFFB == machine.timers.get_one_reg(KVM_REG_ARM_TIMER_CTL)
        machine.timers.load()
        assert ENABLE | IMASK == machine.timers.get_one_reg(KVM_REG_ARM_TIMER_CTL)

    @pytest.mark.spec("api.reg.ptimer-ctl.note.enoent")
    @pytest.mark.parametrize("reg_id", [KVM_REG_ARM_PTIMER_CTL, KVM_REG_ARM_PTIMER_CVAL, KVM_REG_ARM_PTIMER_CNT, 0])
    def test_the_physical_timer_is_not_served(self, machine: Machine, reg_id: int) -> None:
        """6.1 has no register ids for the physical timer, though its header names them: ENOENT."""
        with pytest.raises(KvmError) as read:
            machine.timers.get_one_reg(reg_id)
        with pytest.raises(KvmError) as written:
            machine.timers.set_one_reg(reg_id, 0)

        assert (errno.ENOENT, errno.ENOENT) == (read.value.errno, written.value.errno)


class TestState:
    def test_a_restored_timer_goes_on(self) -> None:
        """Restored at the same time, a vCPU's timers fire when they would have, and the line is not raised twice."""
        machines = [Machine(), Machine()]
        for machine in machines:
            machine.clock.advance_to(50 * TICK)
            machine.write("CNTP_CTL_EL0", ENABLE)
            machine.write("CNTV_CVAL_EL0", 100)
            machine.write("CNTV_CTL_EL0", ENABLE)
            machine.timers.virtual.intid = 20
            machine.timers.put()
        straight, saved = machines
        clock, line = HandClock(), []
        clock.now = saved.clock.now
        counter = ArchCounter.from_state(saved.counter.state(), clock)
        restored = ArchTimers.from_state(
            saved.timers.state(),
            counter,
            virtual_sink=lambda level: line.append((clock.now, level)),
            physical_sink=lambda level: line.append((clock.now, level)),
        )
        straight.timers.load()
        restored.load()
        straight.clock.advance_to(200 * TICK)
        clock.advance_to(200 * TICK)

        assert [(100 * TICK, True)] == straight.line == line
        assert straight.timers.state() == restored.state()

    def test_never_is_beyond_a_lifetime(self) -> None:
        """NEVER_NS is what a Linux host has as its last instant, 292 years."""
        assert 292 == NEVER_NS // (NS * 3600 * 24 * 365)
