"""The ARM generic timer: a VM's counter and each vCPU's virtual and physical EL1 timers.

A system counter runs at a fixed frequency on every CPU. The guest reads it as physical counter, CNTPCT_EL0, or
less an offset as virtual counter, CNTVCT_EL0 = CNTPCT_EL0 - CNTVOFF. A timer compares one of the two with its
CVAL and raises a level-sensitive private interrupt (PPI) while the comparison holds::

    CNTV_CTL_EL0     2         1        0          line = ENABLE and not IMASK and ISTATUS
                 +---------+-------+--------+      ISTATUS = counter >= CVAL, unsigned, 64 bits
                 | ISTATUS | IMASK | ENABLE |
                 +---------+-------+--------+

Time is in integer nanoseconds, the counter in integer ticks: a time has the ticks completed by then (rounded
down), a tick the first nanosecond that has it (rounded up), so that a timer never fires before its time.

Sources: Arm Architecture Reference Manual, "The Generic Timer in AArch64 state"; for what userspace sees, the KVM
API document and Linux 6.1. Modelled: EL1 timers, CNTVOFF. Not modelled: EL2 timers, the event stream (CNTKCTL).

Contents: :class:`ArchCounter`, :class:`ArchTimer`, :class:`ArchTimers` and their state records.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

import attrs

from fabric.errors import KvmError
from fabric.uapi.arm64 import (
    DEFAULT_PTIMER_IRQ,
    DEFAULT_VTIMER_IRQ,
    KVM_REG_ARM_TIMER_CNT,
    KVM_REG_ARM_TIMER_CTL,
    KVM_REG_ARM_TIMER_CVAL,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

ENABLE: Final = 1 << 0
IMASK: Final = 1 << 1
ISTATUS: Final = 1 << 2

DEFAULT_FREQUENCY: Final = 62_500_000
"""CNTFRQ_EL0 in Hz. What QEMU 7.2 gives a guest, and so the host of the recorded arm64 answers had it; one tick
is exactly 16 ns, which keeps runs easy to read. Server parts have 1 GHz (Armv8.6) or 25 to 100 MHz."""

NS: Final = 1_000_000_000
NEVER_NS: Final = (1 << 63) - 1
"""A deadline beyond this (292 years; KTIME_MAX to a Linux host) is never armed: "all ones" means no timeout."""

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1


class ArmableTimer(Protocol):
    """A one-shot timer of the engine."""

    def arm(self, at_ns: int) -> None:
        """Fire once at that time; an earlier arming is forgotten."""

    def cancel(self) -> None:
        """Do not fire."""


class TimerClock(Protocol):
    """Virtual time, and timers on it."""

    @property
    def now(self) -> int:
        """Nanoseconds since the run began."""
        ...

    def timer(self, callback: Callable[[], object], *, name: str) -> ArmableTimer:
        """A timer that calls ``callback`` when it fires."""
        ...


@attrs.frozen
class ArchCounterState:
    """What of an :class:`ArchCounter` belongs to the VM; the rest is the host's."""

    cntvoff: int
    version: int = 1


class ArchCounter:
    """The system counter as one VM sees it. Its virtual offset is common to all vCPUs.

    Args:
        clock: virtual time.
        frequency: CNTFRQ_EL0, Hz.
        start: ticks of the physical counter at time 0, for hosts that booted at different times.
    """

    __slots__ = ("clock", "cntvoff", "frequency", "start", "vcpus")

    def __init__(self, clock: TimerClock, *, frequency: int = DEFAULT_FREQUENCY, start: int = 0) -> None:
        if frequency <= 0:
            raise ValueError(f"frequency must be positive, not {frequency} Hz")
        self.clock = clock
        self.frequency = frequency
        self.start = start
        self.cntvoff = 0
        self.vcpus: list[ArchTimers] = []
        """The timers of the VM's vCPUs, in creation order."""

    def physical(self) -> int:
        """CNTPCT_EL0 now."""
        return self.start + self.clock.now * self.frequency // NS & _MASK64

    def virtual(self) -> int:
        """CNTVCT_EL0 now."""
        return self.physical() - self.cntvoff & _MASK64

    def set_virtual(self, value: int) -> None:
        """Make the virtual counter read ``value`` now, on all vCPUs."""
        self.cntvoff = self.physical() - value & _MASK64
        for timers in self.vcpus:
            timers.virtual.changed()

    def time_in(self, ticks: int) -> int:
        """The first nanosecond at which the counter is ``ticks`` further than now."""
        reached = self.clock.now * self.frequency // NS + ticks
        return -(-reached * NS // self.frequency)

    def state(self) -> ArchCounterState:
        """What migrates."""
        return ArchCounterState(self.cntvoff)

    @classmethod
    def from_state(
        cls, state: ArchCounterState, clock: TimerClock, *, frequency: int = DEFAULT_FREQUENCY, start: int = 0
    ) -> Self:
        """The counter of a restored VM, on a host described by the other arguments."""
        counter = cls(clock, frequency=frequency, start=start)
        counter.cntvoff = state.cntvoff
        return counter


@attrs.frozen
class ArchTimerState:
    """The registers of one timer, its PPI, and whether its line is up."""

    ctl: int
    cval: int
    intid: int
    level: bool


class ArchTimer:
    """One timer of one vCPU.

    The line moves only while the vCPU is loaded (inside KVM_RUN): what userspace writes, and what time does, to
    the timer of a vCPU that is not, shows when it is loaded next.
    """

    __slots__ = ("_stale", "_timer", "counter", "ctl", "cval", "intid", "level", "loaded", "offset", "sink", "status")

    def __init__(
        self,
        counter: ArchCounter,
        name: str,
        intid: int,
        offset: Callable[[], int],
        sink: Callable[[bool], object] | None,
    ) -> None:
        self.counter = counter
        self.intid = intid
        """The PPI, 16 to 31; KVM_ARM_VCPU_TIMER_CTRL sets it."""
        self.offset = offset
        """What the timer's own counter lags behind the physical one by."""
        self.sink = sink
        """Called with the new level whenever the line moves."""
        self.ctl = 0
        """CNTx_CTL_EL0 without ISTATUS."""
        self.status = False
        """ISTATUS as the register had it when the vCPU left KVM_RUN, for userspace."""
        self.cval = 0
        """CNTx_CVAL_EL0."""
        self.level = False
        """The output line."""
        self.loaded = False
        self._stale = True
        self._timer = counter.clock.timer(self.changed, name=name)

    def count(self) -> int:
        """The counter this timer compares with."""
        return self.counter.physical() - self.offset() & _MASK64

    def expired(self) -> bool:
        """The timer condition, whether the timer is enabled or not."""
        return self.count() >= self.cval

    @property
    def asserted(self) -> bool:
        """Where the line belongs now."""
        return self.ctl & (ENABLE | IMASK) == ENABLE and self.expired()

    def changed(self) -> None:
        """Registers, offset or time moved: bring the line and the deadline up to date, or remember to."""
        if self.loaded:
            self._update()
        else:
            self._stale = True

    def load(self) -> None:
        """The vCPU enters KVM_RUN."""
        self.loaded = True
        if self._stale:
            self.ctl &= ENABLE | IMASK  # the register has no more bits than these; KVM's copy of it does
            self._update()

    def put(self) -> None:
        """The vCPU leaves KVM_RUN."""
        # The deadline stays armed: programs leave and enter far more often than timers fire.
        if self.loaded:
            self.loaded = False
            self.status = self.level or (self.ctl == ENABLE | IMASK and self.expired())

    def reset(self) -> None:
        """KVM_ARM_VCPU_INIT: disabled, line down. The compare value stays."""
        self.ctl = 0
        self.status = False
        self._update()

    def _update(self) -> None:
        self._stale = False
        level, at_ns = False, NEVER_NS + 1
        if self.ctl & (ENABLE | IMASK) == ENABLE:
            ahead = self.cval - self.count()
            level = ahead <= 0
            # When expired, the line next moves when the counter wraps; commonly that is beyond NEVER_NS.
            at_ns = self.counter.time_in(ahead if ahead > 0 else (1 << 64) - self.cval + ahead)
        if at_ns <= NEVER_NS:
            self._timer.arm(at_ns)
        else:
            self._timer.cancel()
        if level != self.level:
            self.level = level
            if self.sink is not None:
                self.sink(level)

    # -- the guest's registers

    def read_ctl(self) -> int:
        """CNTx_CTL_EL0. ISTATUS is unknown while the timer is disabled; it reads 0 here."""
        return self.ctl | (ISTATUS if self.ctl & ENABLE and self.expired() else 0)

    def write_ctl(self, value: int) -> None:
        """CNTx_CTL_EL0; ISTATUS is read-only."""
        self.ctl = value & (ENABLE | IMASK)
        self.changed()

    def write_cval(self, value: int) -> None:
        """CNTx_CVAL_EL0."""
        self.cval = value & _MASK64
        self.changed()

    def read_tval(self) -> int:
        """CNTx_TVAL_EL0: ticks left, the low 32 bits; negative once expired."""
        return self.cval - self.count() & _MASK32

    def write_tval(self, value: int) -> None:
        """CNTx_TVAL_EL0: expire so many ticks from now, a signed 32-bit number."""
        signed = (value & _MASK32 ^ 1 << 31) - (1 << 31)
        self.write_cval(self.count() + signed)

    def state(self) -> ArchTimerState:
        """What migrates."""
        return ArchTimerState(self.ctl, self.cval, self.intid, self.level)

    def restore(self, state: ArchTimerState) -> None:
        """Take over registers and line; the sink is not called, as its end is restored too."""
        self.ctl, self.cval, self.intid, self.level = state.ctl, state.cval, state.intid, state.level
        self._stale = True

    def _check(self) -> None:
        """Assert the invariants; for tests."""
        if self.loaded and not self._stale:
            assert self.level == self.asserted


@attrs.frozen
class ArchTimersState:
    """The timers of one vCPU."""

    virtual: ArchTimerState
    physical: ArchTimerState
    version: int = 1


class ArchTimers:
    """The virtual and the physical EL1 timer of a vCPU.

    Args:
        counter: the VM's counter.
        name: for timers in messages and traces.
        virtual_sink: called with the level of the virtual timer's line, PPI 27 unless set otherwise.
        physical_sink: the same for the physical timer, PPI 30.
        restart: start the virtual counter of the whole VM again at 0. KVM_CREATE_VCPU does, so that it reads the
            same on all vCPUs whenever they were created.
    """

    __slots__ = ("counter", "physical", "virtual")

    def __init__(
        self,
        counter: ArchCounter,
        *,
        name: str = "vcpu",
        virtual_sink: Callable[[bool], object] | None = None,
        physical_sink: Callable[[bool], object] | None = None,
        restart: bool = True,
    ) -> None:
        self.counter = counter
        self.virtual = ArchTimer(counter, f"{name} vtimer", DEFAULT_VTIMER_IRQ, lambda: counter.cntvoff, virtual_sink)
        self.physical = ArchTimer(counter, f"{name} ptimer", DEFAULT_PTIMER_IRQ, lambda: 0, physical_sink)
        counter.vcpus.append(self)
        if restart:
            counter.set_virtual(0)

    def load(self) -> None:
        """The vCPU enters KVM_RUN, past its first-run checks: lines follow the timers until :meth:`put`."""
        self.virtual.load()
        self.physical.load()

    def put(self) -> None:
        """The vCPU leaves KVM_RUN."""
        self.virtual.put()
        self.physical.put()

    def reset(self) -> None:
        """KVM_ARM_VCPU_INIT."""
        self.virtual.reset()
        self.physical.reset()

    def destroy(self) -> None:
        """The vCPU goes away: no more callbacks."""
        self.counter.vcpus.remove(self)
        for timer in (self.virtual, self.physical):
            timer.sink = None
            timer.put()
            timer._timer.cancel()

    # -- KVM_GET_ONE_REG and KVM_SET_ONE_REG

    ONE_REG_IDS: ClassVar[tuple[int, ...]] = (
        KVM_REG_ARM_TIMER_CTL,
        KVM_REG_ARM_TIMER_CNT,
        KVM_REG_ARM_TIMER_CVAL,
    )
    """The ids served, in the order of KVM_GET_REG_LIST. 6.1 has none for the physical timer: the three
    KVM_REG_ARM_PTIMER_* ids of its header lead to ENOENT."""

    def get_one_reg(self, reg_id: int) -> int:
        """The value of a timer register.

        Raises:
            KvmError: ENOENT for an id that is none, the physical timer's included (api.reg.ptimer-ctl,
                api.reg.ptimer-cval, api.reg.ptimer-cnt).
        """
        timer = self.virtual
        if reg_id == KVM_REG_ARM_TIMER_CTL:
            # Unlike the guest, userspace sees ISTATUS of a disabled timer as well, and of one that had expired when
            # the vCPU was last on a CPU, whatever the compare value and the counter are now.
            return timer.ctl | (ISTATUS if timer.status or timer.expired() else 0)
        if reg_id == KVM_REG_ARM_TIMER_CNT:
            return timer.count()
        if reg_id == KVM_REG_ARM_TIMER_CVAL:
            return timer.cval
        raise KvmError(errno.ENOENT, f"register {reg_id:#x} is not a timer register of userspace")

    def set_one_reg(self, reg_id: int, value: int) -> None:
        """Set a timer register. KvmError(ENOENT) for an id that is none; no value is refused.

        TIMER_CNT sets the virtual counter of every vCPU of the VM.
        """
        timer = self.virtual
        if reg_id == KVM_REG_ARM_TIMER_CTL:
            timer.ctl = value & _MASK32 & ~ISTATUS
            timer.status = False
            timer.changed()
        elif reg_id == KVM_REG_ARM_TIMER_CNT:
            self.counter.set_virtual(value)
        elif reg_id == KVM_REG_ARM_TIMER_CVAL:
            timer.write_cval(value)
        else:
            raise KvmError(errno.ENOENT, f"register {reg_id:#x} is not a timer register of userspace")

    # -- the guest's system registers, by their Arm names

    READ: ClassVar[dict[str, Callable[[ArchTimers], int]]] = {
        "CNTFRQ_EL0": lambda self: self.counter.frequency,
        "CNTPCT_EL0": lambda self: self.counter.physical(),
        "CNTVCT_EL0": lambda self: self.counter.virtual(),
        "CNTP_CTL_EL0": lambda self: self.physical.read_ctl(),
        "CNTP_CVAL_EL0": lambda self: self.physical.cval,
        "CNTP_TVAL_EL0": lambda self: self.physical.read_tval(),
        "CNTV_CTL_EL0": lambda self: self.virtual.read_ctl(),
        "CNTV_CVAL_EL0": lambda self: self.virtual.cval,
        "CNTV_TVAL_EL0": lambda self: self.virtual.read_tval(),
    }
    WRITE: ClassVar[dict[str, Callable[[ArchTimers, int], None]]] = {
        "CNTP_CTL_EL0": lambda self, value: self.physical.write_ctl(value),
        "CNTP_CVAL_EL0": lambda self, value: self.physical.write_cval(value),
        "CNTP_TVAL_EL0": lambda self, value: self.physical.write_tval(value),
        "CNTV_CTL_EL0": lambda self, value: self.virtual.write_ctl(value),
        "CNTV_CVAL_EL0": lambda self, value: self.virtual.write_cval(value),
        "CNTV_TVAL_EL0": lambda self, value: self.virtual.write_tval(value),
    }

    def read_sysreg(self, name: str) -> int:
        """MRS; ``KeyError`` for a name not in :attr:`READ`."""
        return self.READ[name](self)

    def write_sysreg(self, name: str, value: int) -> None:
        """MSR; ``KeyError`` for a name not in :attr:`WRITE`."""
        self.WRITE[name](self, value)

    def state(self) -> ArchTimersState:
        """What migrates with the vCPU; the offset goes with the :class:`ArchCounter`."""
        return ArchTimersState(self.virtual.state(), self.physical.state())

    @classmethod
    def from_state(
        cls,
        state: ArchTimersState,
        counter: ArchCounter,
        *,
        name: str = "vcpu",
        virtual_sink: Callable[[bool], object] | None = None,
        physical_sink: Callable[[bool], object] | None = None,
    ) -> Self:
        """The timers of a restored vCPU; the counter, restored before, keeps its offset."""
        timers = cls(counter, name=name, virtual_sink=virtual_sink, physical_sink=physical_sink, restart=False)
        timers.virtual.restore(state.virtual)
        timers.physical.restore(state.physical)
        return timers

    def _check(self) -> None:
        """Assert the invariants; for tests."""
        self.virtual._check()
        self.physical._check()
