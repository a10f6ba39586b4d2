"""The PMU of an arm64 vCPU against a plainer one, which counts event by event."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st
from test_arch_timer import HandClock

from fabric.vcpu.pmu import CHAIN, CPU_CYCLES, INST_RETIRED, SW_INCR, EventFilter, Pmu, PmuHost

ALL32 = (1 << 32) - 1


class NaivePmu:
    """Counters that are moved event by event, ns by ns."""

    def __init__(self, rates: list[Fraction | None], chained: list[bool]) -> None:
        self.rates = rates
        self.chained = chained
        self.values = [0] * len(rates)
        self.totals = [0] * len(rates)
        self.executed = 0
        self.enabled = self.inten = self.ovs = 0
        self.lines: list[tuple[int, bool]] = []
        self.level = False

    def tick(self, now: int) -> None:
        self.executed += 1
        for n, rate in enumerate(self.rates):
            if rate is None:
                continue
            total = int(self.executed * rate)
            for _ in range(total - self.totals[n]):
                if self.enabled >> n & 1:
                    self.count(n)
            self.totals[n] = total
        self.settle(now)

    def count(self, n: int) -> None:
        self.values[n] = self.values[n] + 1 & ALL32
        if not self.values[n]:
            self.ovs |= 1 << n
            if n % 2 == 0 and n + 1 < len(self.rates) and self.chained[n + 1] and self.enabled >> n + 1 & 1:
                self.count(n + 1)

    def settle(self, now: int) -> None:
        level = bool(self.ovs & self.inten)
        if level != self.level:
            self.level = level
            self.lines.append((now, level))


steps = st.one_of(
    st.tuples(st.just("run"), st.integers(1, 60)),
    st.tuples(st.just("idle"), st.integers(1, 20)),
    st.tuples(st.sampled_from(["enable", "disable", "inten", "intdis", "clear", "swinc"]), st.integers(0, 15)),
    st.tuples(st.integers(0, 3), st.integers(ALL32 - 40, ALL32 + 3)),
)


@given(
    types=st.lists(st.sampled_from([CPU_CYCLES, INST_RETIRED, SW_INCR, CHAIN]), min_size=4, max_size=4),
    hz=st.sampled_from([1_000_000_000, 300_000_000, 2_000_000_001]),
    ipc=st.sampled_from([Fraction(1), Fraction(1, 3), Fraction(5, 2)]),
    program=st.lists(steps, max_size=25),
)
def test_against_a_pmu_that_counts_every_event(
    types: list[int], hz: int, ipc: Fraction, program: list[tuple[str | int, int]]
) -> None:
    """Whatever is enabled, written and computed: same values, same flags, and the line moves at the same ns."""
    clock = HandClock()
    host = PmuHost(cpu_hz=hz, instructions_per_cycle=ipc, counters=4)
    pmu = Pmu(clock, host, EventFilter(16))
    chained = [event == CHAIN for event in types]
    naive = NaivePmu([host.rate(event) for event in types], chained)
    lines: list[tuple[int, bool]] = []
    pmu.sink = lambda level: lines.append((clock.now, level))
    pmu.load()
    for n, event in enumerate(types):
        pmu.write(f"PMEVTYPER{n}_EL0", event)
    pmu.write("PMCR_EL0", 1)
    for action, value in program:
        if action == "run":
            pmu.resume(value)
            start_ns = clock.now
            clock.advance_to(start_ns + value)
            pmu.pause()
            for now in range(start_ns + 1, start_ns + value + 1):
                naive.tick(now)
        elif action == "idle":
            clock.advance_to(clock.now + value)
        elif action == "swinc":
            pmu.write("PMSWINC_EL0", value)
            for n in range(4):
                if value & naive.enabled & 1 << n and types[n] == SW_INCR:
                    naive.count(n)
        elif isinstance(action, int):
            pmu.write(f"PMEVCNTR{action}_EL0", value)
            naive.values[action] = value & ALL32
        else:
            name, field, keep = {
                "enable": ("PMCNTENSET_EL0", "enabled", True),
                "disable": ("PMCNTENCLR_EL0", "enabled", False),
                "inten": ("PMINTENSET_EL1", "inten", True),
                "intdis": ("PMINTENCLR_EL1", "inten", False),
                "clear": ("PMOVSCLR_EL0", "ovs", False),
            }[action]
            pmu.write(name, value)
            old = getattr(naive, field)
            setattr(naive, field, old | value if keep else old & ~value)
        naive.settle(clock.now)
        pmu._check()

        assert naive.values == [pmu.read(f"PMEVCNTR{n}_EL0") for n in range(4)]
        assert naive.ovs == pmu.read("PMOVSSET_EL0")
        assert naive.lines == lines
