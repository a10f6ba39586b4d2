"""The performance monitors of an arm64 vCPU (PMUv3): counters, overflows, their interrupt.

What counts is the guest's own time. While the guest computes, cycles pass at the host's ``cpu_hz`` and retire
``instructions_per_cycle`` instructions each; halted, preempted, or while the host works for it, nothing does. Loads,
stores and exceptions are those of the guest program. All other events of the architecture are not implemented: their
counters stand still.

Counters of passing time are brought up to date when somebody looks. What nobody looks at is the moment at which one of
them overflows and interrupts; so for that there is a timer, which is armed while the guest computes::

                  E          N        counter n counts: E and bit n of PMCNTENSET, its event is implemented and
    PMCR_EL0 |LP|LC|..|D|C|P|E|       passes the filter, and EL1 is not excluded
    line = E and (PMOVSSET & PMINTENSET) != 0

Sources: Arm Architecture Reference Manual, "The Performance Monitors Extension"; Linux 6.1 for what registers hold
(recorded) and for the event filter. Differences: KVM 6.1 counts with the host's counters, and so ignores the divider
PMCR_EL0.D, which is implemented here. As with KVM, whether a counter is enabled does not matter to the line.

Contents: :class:`PmuHost`, :class:`EventFilter`, :class:`Pmu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from fabric.clock.arch_timer import TimerClock

NS: Final = 1_000_000_000

# PMCR_EL0
PMCR_E: Final = 1 << 0
PMCR_P: Final = 1 << 1
PMCR_C: Final = 1 << 2
PMCR_D: Final = 1 << 3
PMCR_LC: Final = 1 << 6
PMCR_LP: Final = 1 << 7
PMCR_WRITABLE: Final = 0xFF
PMCR_N_SHIFT: Final = 11
PMCR_N_MASK: Final = 0x1F
PMCR_IDENTITY: Final = 0x4101_0000
"""IMP and IDCODE: Arm, Cortex-A57, as on the host of the recordings."""

CYCLE: Final = 31
"""The number of the cycle counter; event counters are 0 to N - 1."""
EVTYPE_WRITABLE: Final = 0xC800_FFFF
EVTYPE_P: Final = 1 << 31
"""PMEVTYPER<n>_EL0: do not count at EL1, where guest programs are."""

SW_INCR: Final = 0x00
LD_RETIRED: Final = 0x06
ST_RETIRED: Final = 0x07
INST_RETIRED: Final = 0x08
EXC_TAKEN: Final = 0x09
EXC_RETURN: Final = 0x0A
CPU_CYCLES: Final = 0x11
MEM_ACCESS: Final = 0x13
CHAIN: Final = 0x1E
EXC_IRQ: Final = 0x86
CNT_CYCLES: Final = 0x4004

EVENTS: Final = (
    SW_INCR,
    LD_RETIRED,
    ST_RETIRED,
    INST_RETIRED,
    EXC_TAKEN,
    EXC_RETURN,
    CPU_CYCLES,
    MEM_ACCESS,
    CHAIN,
    EXC_IRQ,
    CNT_CYCLES,
)
"""The events that are implemented."""

_POISON = 0x1DE7_EC7E_DBAD_C0DE
_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1


@attrs.frozen
class PmuHost:
    """What the PMU of a host is like.

    Attributes:
        cpu_hz: cycles per second of a computing guest.
        instructions_per_cycle: how many of them retire.
        counter_hz: rate of the system counter, for event CNT_CYCLES.
        counters: how many event counters there are, 0 to 30.
        event_bits: width of event numbers, 10 or 16.
        long_counters: event counters have 64 bits (PMUv3p5). KVM 6.1 offers nothing beyond PMUv3 of Armv8.4.
        poison: registers whose reset value is UNKNOWN start with the pattern that KVM 6.1 gives them, overflow flags
            and interrupt enables included; without it they start with 0.
    """

    cpu_hz: int = NS
    instructions_per_cycle: Fraction = Fraction(1)
    counter_hz: int = 62_500_000
    counters: int = 6
    event_bits: int = 16
    long_counters: bool = False
    poison: bool = False

    def __attrs_post_init__(self) -> None:
        if self.cpu_hz <= 0:
            raise ValueError(f"the CPU's frequency must be above 0 Hz, not {self.cpu_hz!r}")
        if self.instructions_per_cycle < 0:
            raise ValueError(f"instructions per cycle must not be negative, not {self.instructions_per_cycle!r}")
        if not 0 <= self.counters < CYCLE:
            raise ValueError(f"a PMU has 0 to 30 event counters, not {self.counters!r}")
        if self.event_bits not in (10, 16):
            raise ValueError(f"event numbers have 10 or 16 bits, not {self.event_bits!r}")

    def rate(self, event: int) -> Fraction | None:
        """How many of an event there are in a ns of the guest's time; None for one that is no matter of time."""
        if event == CPU_CYCLES:
            return Fraction(self.cpu_hz, NS)
        if event == INST_RETIRED:
            return Fraction(self.cpu_hz, NS) * self.instructions_per_cycle
        if event == CNT_CYCLES:
            return Fraction(self.counter_hz, NS)
        return None


class EventFilter:
    """Which events a VM may count (KVM_ARM_VCPU_PMU_V3_FILTER): a bitmap of all event numbers."""

    __slots__ = ("bits", "events")

    def __init__(self, event_bits: int) -> None:
        self.events = 1 << event_bits
        self.bits: int | None = None
        """None while no filter was given."""

    def apply(self, base: int, count: int, allow: bool) -> None:
        """Allow or deny ``count`` events from ``base`` on. The first filter denies what it does not allow, or
        allows what it does not deny; later ones change that for their range."""
        if self.bits is None:
            self.bits = 0 if allow else (1 << self.events) - 1
        span = (1 << count) - 1 << base
        self.bits = self.bits | span if allow else self.bits & ~span

    def allows(self, event: int) -> bool:
        """Whether the event may be counted."""
        return self.bits is None or bool(self.bits >> event & 1)


class _Counter:
    """An event counter or the cycle counter."""

    __slots__ = ("mark", "number", "rate", "type", "value")

    def __init__(self, number: int) -> None:
        self.number = number
        self.value = 0
        self.type = 0
        """PMEVTYPER<n>_EL0 or PMCCFILTR_EL0."""
        self.rate: Fraction | None = None
        """Events in a ns, while it counts something that time brings."""
        self.mark = 0
        """How many such events there had been when ``value`` was brought up to date."""


class Pmu:
    """The PMU of one vCPU.

    The line moves only while the vCPU is loaded (inside KVM_RUN): what userspace writes to one that is not shows when
    it is loaded next.

    Args:
        clock: virtual time.
        host: what the host's PMU is like.
        events: the VM's filter.
        name: for the timer.
    """

    __slots__ = (
        "_clock",
        "_discrete",
        "_due",
        "_executed",
        "_since",
        "_timed",
        "_timer",
        "counters",
        "cpus",
        "enabled",
        "filter",
        "host",
        "inten",
        "level",
        "loaded",
        "ovs",
        "pmcr",
        "selr",
        "sink",
        "userenr",
    )

    def __init__(self, clock: TimerClock, host: PmuHost, events: EventFilter, *, name: str = "vcpu") -> None:
        self.host = host
        self.filter = events
        self.cpus: frozenset[int] | None = None
        """The physical CPUs that have the PMU; None for all."""
        self.sink: Callable[[bool], object] | None = None
        """Called with the new level whenever the line moves."""
        self.level = False
        """The overflow interrupt's line."""
        self.loaded = False
        self.counters = [_Counter(n) for n in range(CYCLE + 1)]
        self._clock = clock
        self._timer = clock.timer(self._overflowing, name=f"{name} pmu")
        self._executed = 0
        """ns that the guest has computed, up to ``_since``."""
        self._since: int | None = None
        """Since when it computes."""
        self._timed: list[_Counter] = []
        """Counters of what time brings."""
        self._discrete: dict[int, list[_Counter]] = {}
        """Event to the counters of it, for events that happen one by one."""
        self._due: int | None = None
        """The guest's time at which a counter that interrupts overflows."""
        self.reset()

    def reset(self) -> None:
        """KVM_ARM_VCPU_INIT. The line is left as it is until the vCPU is loaded."""
        unknown = _POISON if self.host.poison else 0
        implemented = 1 << CYCLE | (1 << self.host.counters) - 1
        self.pmcr = PMCR_IDENTITY | self.host.counters << PMCR_N_SHIFT | (0xAC if self.host.poison else 0)
        self.enabled = self.inten = self.ovs = unknown & implemented
        """PMCNTENSET_EL0, PMINTENSET_EL1, PMOVSSET_EL0."""
        self.selr = unknown & 0x1F
        self.userenr = 0
        for counter in self.counters[:CYCLE]:
            counter.value, counter.type = unknown & _MASK32, unknown & EVTYPE_WRITABLE
        self.counters[CYCLE].value, self.counters[CYCLE].type = unknown, 0
        self._configure()

    # -- time

    def load(self) -> None:
        """The vCPU enters KVM_RUN."""
        self._synchronize()
        self.loaded = True
        self._configure()

    def put(self) -> None:
        """The vCPU leaves KVM_RUN, be it in the middle of a computation."""
        self.pause()
        self.loaded = False

    def resume(self, at_most: int) -> None:
        """The guest begins to compute, for ``at_most`` ns."""
        now = self._since = self._clock.now
        if self._due is not None and self._due - self._executed <= at_most:
            self._timer.arm(now + self._due - self._executed)

    def pause(self) -> None:
        """The guest does not compute any more."""
        if self._since is not None:
            self._executed += self._clock.now - self._since
            self._since = None
            self._timer.cancel()

    @property
    def asserted(self) -> bool:
        """Where the line belongs now."""
        return bool(self.pmcr & PMCR_E and self.ovs & self.inten)

    def executed(self) -> int:
        """For how many ns the guest has computed."""
        return self._executed if self._since is None else self._executed + self._clock.now - self._since

    def event(self, number: int) -> None:
        """One event happened."""
        counters = self._discrete.get(number)
        if counters is not None:
            self._synchronize()
            for counter in counters:
                self._advance(counter, 1)
            self._settle()

    def _overflowing(self) -> None:
        self._synchronize()
        self._settle()

    def _synchronize(self) -> None:
        """Bring the counters of passing time up to date."""
        executed = self.executed()
        for counter in self._timed:
            assert counter.rate is not None
            total = executed * counter.rate.numerator // counter.rate.denominator
            if total != counter.mark:
                self._advance(counter, total - counter.mark)
                counter.mark = total

    def _advance(self, counter: _Counter, events: int) -> None:
        number = counter.number
        bits = self._overflow_bits(number)
        overflows = (counter.value & (1 << bits) - 1) + events >> bits
        counter.value = counter.value + events & self._value_mask(number)
        if overflows:
            self.ovs |= 1 << number
            if bits == 32 and not number & 1 and self._chained(number + 1):
                self._advance(self.counters[number + 1], overflows)

    def _overflow_bits(self, number: int) -> int:
        if number == CYCLE:
            return 64 if self.pmcr & PMCR_LC else 32
        return 64 if self.host.long_counters and self.pmcr & PMCR_LP else 32

    def _value_mask(self, number: int) -> int:
        return _MASK64 if number == CYCLE or self.host.long_counters else _MASK32

    def _chained(self, number: int) -> bool:
        """Whether an odd counter counts the overflows of the one before. No filter applies to that."""
        return number < CYCLE and self._on(number) and self._event(number) == CHAIN

    def _settle(self) -> None:
        """After counters have moved: when is the next overflow, and where is the line?"""
        self._due = self._next_overflow()
        if self._since is not None:
            if self._due is None:
                self._timer.cancel()
            else:
                self._timer.arm(self._since + self._due - self._executed)
        level = self.asserted
        if self.loaded and level != self.level:
            self.level = level
            if self.sink is not None:
                self.sink(level)

    def _next_overflow(self) -> int | None:
        """The guest's time at which the next counter overflows that interrupts then; None if none does."""
        due: int | None = None
        for counter in self._timed:
            for events in self._interrupting(counter):
                rate = counter.rate
                assert rate is not None
                at = -(-(counter.mark + events) * rate.denominator // rate.numerator)
                due = at if due is None else min(due, at)
        return due

    def _interrupting(self, counter: _Counter) -> Iterator[int]:
        """After how many events a counter overflows and interrupts, itself or by the one chained to it."""
        number = counter.number
        bits = self._overflow_bits(number)
        left = (1 << bits) - (counter.value & (1 << bits) - 1)
        if self.inten & ~self.ovs & 1 << number:
            yield left
        if bits == 32 and not number & 1 and self.inten & ~self.ovs & 1 << number + 1 and self._chained(number + 1):
            yield left + (_MASK32 - (self.counters[number + 1].value & _MASK32) << 32)

    # -- configuration

    def _on(self, number: int) -> bool:
        """Whether a counter is there and enabled."""
        return bool(self.pmcr & PMCR_E and self.enabled & self._valid() & 1 << number)

    def _event(self, number: int) -> int:
        if number == CYCLE:
            return CPU_CYCLES
        return self.counters[number].type & (1 << self.host.event_bits) - 1

    def _valid(self) -> int:
        """The counters there are, as a mask."""
        return 1 << CYCLE | (1 << (self.pmcr >> PMCR_N_SHIFT & PMCR_N_MASK)) - 1

    def _configure(self) -> None:
        """Registers were written, after :meth:`_synchronize`: find out what counts, and settle."""
        executed = self.executed()
        self._timed = []
        self._discrete = {}
        for counter in self.counters:
            number = counter.number
            event = self._event(number)
            if not self._on(number) or event == CHAIN or not (event == SW_INCR or self.filter.allows(event)):
                continue
            rate = self.host.rate(event)
            # As KVM emulates them, software increments and chained counters know no exception level.
            if event != SW_INCR and counter.type & EVTYPE_P:
                continue
            if rate is None:
                self._discrete.setdefault(event, []).append(counter)
                continue
            if number == CYCLE and self.pmcr & PMCR_D and not self.pmcr & PMCR_LC:
                rate /= 64
            if rate:
                counter.rate = rate
                counter.mark = executed * rate.numerator // rate.denominator
                self._timed.append(counter)
        self._settle()

    # -- the registers as the guest sees them

    def read(self, name: str) -> int:
        """MRS. KeyError for a register or counter that there is not."""
        self._synchronize()
        if name in _INDEXED:
            kind, number = _INDEXED[name]
            return self._read_counter(kind, self._checked(number, name))
        if name in ("PMXEVCNTR_EL0", "PMXEVTYPER_EL0"):
            return self._read_counter(name[3:-4], self._checked(self.selr & 0x1F, name))
        return _READ[name](self)

    def write(self, name: str, value: int) -> None:
        """MSR. KeyError for a register or counter that there is not or that is read-only."""
        self._synchronize()
        if name in _INDEXED:
            kind, number = _INDEXED[name]
            self._write_counter(kind, self._checked(number, name), value)
        elif name in ("PMXEVCNTR_EL0", "PMXEVTYPER_EL0"):
            self._write_counter(name[3:-4], self._checked(self.selr & 0x1F, name), value)
        else:
            _WRITE[name](self, value & _MASK64)
        self._configure()

    def _checked(self, number: int, name: str) -> int:
        if not self._valid() >> number & 1:
            raise KeyError(name)
        return number

    def _read_counter(self, kind: str, number: int) -> int:
        counter = self.counters[number]
        return counter.type & EVTYPE_WRITABLE if kind == "EVTYPER" else counter.value & self._value_mask(number)

    def _write_counter(self, kind: str, number: int, value: int) -> None:
        counter = self.counters[number]
        if kind == "EVTYPER":
            counter.type = value & EVTYPE_WRITABLE
        else:
            counter.value = value & self._value_mask(number)

    def _write_pmcr(self, value: int) -> None:
        self.pmcr = self.pmcr & ~PMCR_WRITABLE | value & PMCR_WRITABLE & ~(PMCR_C | PMCR_P)
        if value & PMCR_C:
            self.counters[CYCLE].value = 0
        if value & PMCR_P:
            for counter in self.counters[:CYCLE]:
                if self._valid() >> counter.number & 1:
                    counter.value = 0

    def _increment(self, mask: int) -> None:
        for counter in self._discrete.get(SW_INCR, ()):
            if mask >> counter.number & 1:
                self._advance(counter, 1)

    def _common_events(self, first: int) -> int:
        """PMCEID0_EL0 (first 0) or PMCEID1_EL0 (first 32): what is implemented and not filtered out."""
        found = 0
        for event in EVENTS:
            base = event & 0x4000
            if first <= event - base < first + 32 and event < 1 << self.host.event_bits and self.filter.allows(event):
                found |= 1 << event - base - first + (32 if base else 0)
        return found

    # -- and as userspace does

    def get_user(self, name: str) -> int:
        """KVM_GET_ONE_REG."""
        self._synchronize()
        if name in _INDEXED:
            kind, number = _INDEXED[name]
            counter = self.counters[number]
            return counter.type if kind == "EVTYPER" else counter.value & self._value_mask(number)
        if name == "PMSWINC_EL0":
            return 0
        return int(getattr(self, _STORED[name]))

    def set_user(self, name: str, value: int) -> None:
        """KVM_SET_ONE_REG. Whatever the value is, it is kept; the set and clear registers are one."""
        self._synchronize()
        if name in _INDEXED:
            kind, number = _INDEXED[name]
            setattr(self.counters[number], "type" if kind == "EVTYPER" else "value", value)
        elif name != "PMSWINC_EL0":
            setattr(self, _STORED[name], value)
        self._configure()

    def _check(self) -> None:
        """Assert the invariants; for tests."""
        for counter in self._timed:
            assert counter.mark <= self.executed() * (counter.rate or 0)
        if self.loaded:
            assert self.level == bool(self.pmcr & PMCR_E and self.ovs & self.inten)
        assert self._since is None or self.loaded


_INDEXED: Final = {
    **{f"PMEVCNTR{n}_EL0": ("EVCNTR", n) for n in range(CYCLE)},
    **{f"PMEVTYPER{n}_EL0": ("EVTYPER", n) for n in range(CYCLE)},
    "PMCCNTR_EL0": ("EVCNTR", CYCLE),
    "PMCCFILTR_EL0": ("EVTYPER", CYCLE),
}

_STORED: Final = {
    "PMCR_EL0": "pmcr",
    "PMCNTENSET_EL0": "enabled",
    "PMCNTENCLR_EL0": "enabled",
    "PMINTENSET_EL1": "inten",
    "PMINTENCLR_EL1": "inten",
    "PMOVSSET_EL0": "ovs",
    "PMOVSCLR_EL0": "ovs",
    "PMSELR_EL0": "selr",
    "PMUSERENR_EL0": "userenr",
}
"""Where the value of a register is."""


def _set(field: str) -> Callable[[Pmu, int], None]:
    return lambda pmu, value: setattr(pmu, field, getattr(pmu, field) | value & pmu._valid())


def _clear(field: str) -> Callable[[Pmu, int], None]:
    return lambda pmu, value: setattr(pmu, field, getattr(pmu, field) & ~(value & pmu._valid()))


def _stored(field: str) -> Callable[[Pmu], int]:
    return lambda pmu: int(getattr(pmu, field))


_READ: Final[dict[str, Callable[[Pmu], int]]] = {
    "PMCR_EL0": lambda pmu: pmu.pmcr & ~(PMCR_C | PMCR_P),
    **{name: _stored(field) for name, field in _STORED.items() if field in ("enabled", "inten", "ovs")},
    "PMSELR_EL0": lambda pmu: pmu.selr & 0x1F,
    "PMUSERENR_EL0": lambda pmu: pmu.userenr & 0xF,
    "PMCEID0_EL0": lambda pmu: pmu._common_events(0),
    "PMCEID1_EL0": lambda pmu: pmu._common_events(32),
}

_WRITE: Final[dict[str, Callable[[Pmu, int], None]]] = {
    "PMCR_EL0": Pmu._write_pmcr,
    **{name: _set(field) for name, field in _STORED.items() if "SET_EL" in name},
    **{name: _clear(field) for name, field in _STORED.items() if "CLR_EL" in name},
    "PMSWINC_EL0": lambda pmu, value: pmu._increment(value & pmu._valid()),
    "PMSELR_EL0": lambda pmu, value: setattr(pmu, "selr", value),
    "PMUSERENR_EL0": lambda pmu, value: setattr(pmu, "userenr", value & 0xF),
}

GUEST_REGISTERS: Final = frozenset((*_INDEXED, *_READ, *_WRITE, "PMXEVCNTR_EL0", "PMXEVTYPER_EL0"))
"""What ``cpu.mrs`` and ``cpu.msr`` reach."""
