"""The arithmetic of time stamp counters and of the VM's clock, without a VM."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from x86_machine import ManualClock

from fabric.clock.tsc import (
    MASK64,
    SECOND,
    GuestTsc,
    HostTime,
    TscSync,
    VmClock,
    cycles,
    time_of,
    time_scale,
    tolerated,
)

KHZ = 2_600_000
frequencies = st.integers(1_000, 10_000_000)
times = st.integers(0, 10**18)
words = st.integers(0, MASK64)


def host(khz: int = KHZ, tsc_start: int = 0) -> HostTime:
    return HostTime(ManualClock(), khz, tsc_start)  # type: ignore[arg-type]


def pass_(host: HostTime, ns: int) -> None:
    host.clock.advance(ns)  # type: ignore[attr-defined]


# Cycles and ns


@given(times, frequencies)
def test_the_time_of_cycles_is_when_they_have_passed(ns: int, khz: int) -> None:
    """time_of is the first ns at which so many cycles have passed; up to it there were fewer."""
    count = cycles(ns, khz)
    at = time_of(count, khz)

    assert at <= ns
    assert count <= cycles(at, khz)
    assert not at or cycles(at - 1, khz) < count


@given(times, times, frequencies)
def test_time_goes_on_in_parts_as_at_once(first: int, second: int, khz: int) -> None:
    """A TSC read at two times has not lost a cycle in between."""
    assert cycles(first + second, khz) - cycles(first, khz) - cycles(second, khz) in (0, 1)


def naive_reader(delta: int, shift: int, multiplier: int) -> int:
    """What a guest does with a pvclock page: shift, multiply in 96 bits, keep the upper 64."""
    delta = delta << shift if shift >= 0 else delta >> -shift
    return delta * multiplier >> 32


@given(st.integers(0, 1 << 40), frequencies)
def test_a_pvclock_reader_gets_ns(delta: int, khz: int) -> None:
    """Within a few parts in 10**9, and what the shift cuts off; never ahead of the true time."""
    shift, multiplier = time_scale(khz)
    exact = delta * 1_000_000 // khz
    read = naive_reader(delta, shift, multiplier)

    assert exact - exact // 500_000_000 - 3 <= read <= exact + exact // 500_000_000


@given(frequencies)
def test_the_multiplier_is_a_fraction_of_32_bits(khz: int) -> None:
    """At least a half, so that no precision is given away; the shift fits a signed byte."""
    shift, multiplier = time_scale(khz)

    assert 1 << 31 <= multiplier < 1 << 32
    assert -128 <= shift <= 127


@pytest.mark.parametrize(("khz", "shift"), [(1_000_000, 1), (1_000_001, 0), (2_000_000, 0), (2_000_001, -1), (500, 11)])
def test_shifts(khz: int, shift: int) -> None:
    """Frequencies are brought into more than 1 and at most 2 GHz."""
    assert shift == time_scale(khz)[0]


@given(st.integers(1, 0x7FFF_FFFE))
def test_what_is_tolerated(khz: int) -> None:
    """250 parts in a million to either side, each rounded down."""
    allowed = tolerated(khz)

    assert (khz * 999_750 // 1_000_000, khz * 1_000_250 // 1_000_000) == (allowed[0], allowed[-1])
    assert khz in allowed


# A vCPU's TSC


@pytest.mark.spec("vcpu.tsc.offset.rule.equation")
@given(words, words, times)
def test_a_guests_tsc_is_the_hosts_plus_an_offset(start: int, offset: int, ns: int) -> None:
    """Modulo 2**64, at any time."""
    machine = host(tsc_start=start)
    tsc = GuestTsc(machine, TscSync(machine), KHZ, scaling=False)
    tsc.set_offset(offset)
    pass_(machine, ns)

    assert (machine.tsc + offset) % 2**64 == tsc.value


@pytest.mark.spec("vcpu.tsc.offset.rule.scaled")
@given(st.integers(0, 1 << 50), words, st.integers(1, 10**15))
def test_the_hosts_tsc_is_scaled_before_the_offset_is_added(start: int, offset: int, ns: int) -> None:
    """And the guest's counts at its own rate."""
    machine = host(tsc_start=start)
    tsc = GuestTsc(machine, TscSync(machine), 1_300_000, scaling=True)
    tsc.set_offset(offset)
    assert (start // 2 + offset) % 2**64 == tsc.value
    before = tsc.value
    pass_(machine, ns)

    assert (tsc.value - before) % 2**64 - cycles(ns, 1_300_000) in (-1, 0, 1)


@pytest.mark.parametrize(("khz", "rate"), [(KHZ + 650, KHZ), (KHZ + 651, KHZ + 651), (KHZ - 650, KHZ), (1, 1)])
def test_a_tsc_that_is_nearly_the_hosts_is_not_scaled(khz: int, rate: int) -> None:
    """Within 250 parts in a million; also where the host could."""
    machine = host()

    assert rate == GuestTsc(machine, TscSync(machine), khz, scaling=True).rate


@given(words, words, words)
def test_a_guest_moves_tsc_and_adjust_together(first: int, second: int, adjust: int) -> None:
    """TSC minus TSC_ADJUST is what it would be if the guest had written neither."""
    machine = host(tsc_start=12345)
    tsc = GuestTsc(machine, TscSync(machine), KHZ, scaling=False)
    untouched = tsc.value
    tsc.write_by_guest(first)
    assert (first, (tsc.value - tsc.adjust) % 2**64) == (tsc.value, untouched)
    tsc.adjust_by_guest(adjust)
    assert (adjust, (tsc.value - tsc.adjust) % 2**64) == (tsc.adjust, untouched)
    tsc.write_by_guest(second)

    assert (second, (tsc.value - tsc.adjust) % 2**64) == (tsc.value, untouched)


@given(st.integers(0, 10**12), frequencies, st.integers(0, 1 << 40))
def test_the_time_until_a_value_is_when_it_shows(start: int, khz: int, ahead: int) -> None:
    """Not a ns earlier; and 0 for one that has passed."""
    machine = host(khz, start)
    tsc = GuestTsc(machine, TscSync(machine), khz, scaling=False)
    target = tsc.value + ahead
    left = tsc.time_until(target)
    if left:
        pass_(machine, left - 1)
        assert tsc.value < target
        pass_(machine, 1)

    assert tsc.value >= target
    assert 0 == tsc.time_until(target)


@given(frequencies, st.integers(0, 1 << 40), times)
def test_a_scaled_tsc_shows_a_value_at_its_time(khz: int, ahead: int, ns: int) -> None:
    """Within what passes in a ns, and a cycle of the guest's TSC and of the host's: all of them are whole numbers."""
    machine = host()
    tsc = GuestTsc(machine, TscSync(machine), khz, scaling=True)
    pass_(machine, ns)
    target = tsc.value + ahead
    pass_(machine, tsc.time_until(target))

    assert tsc.value - target in range(-2, 4 + khz // KHZ + khz // 1_000_000)


# What vCPUs share


def two(khz: int = KHZ) -> tuple[HostTime, TscSync, GuestTsc, GuestTsc]:
    machine = host(tsc_start=10**9)
    sync = TscSync(machine)
    return machine, sync, *(GuestTsc(machine, sync, khz, scaling=True) for _ in range(2))  # type: ignore[return-value]


def test_a_vcpu_made_later_joins() -> None:
    """It begins with the TSC that the others have by then, not with 0."""
    machine, sync, first, _ = two()
    pass_(machine, 10**12)
    late = GuestTsc(machine, sync, KHZ, scaling=False)

    assert (first.value, cycles(10**12, KHZ)) == (late.value, late.value)
    assert sync.synchronised


@pytest.mark.parametrize(
    ("late_by", "joins"), [(-SECOND + 1, True), (SECOND - 1, True), (SECOND, False), (-SECOND, False)]
)
def test_a_write_within_a_second_joins(late_by: int, joins: bool) -> None:
    """What the VMM writes to the second vCPU is taken for the TSC of the first if it is nearly that."""
    machine, sync, first, second = two(1_000_000)
    first.write(10**15)
    pass_(machine, 5 * SECOND)
    second.write(10**15 + 5 * SECOND + late_by)

    assert joins is (second.offset == first.offset)
    assert joins is sync.synchronised


def test_the_first_write_of_the_vmm_does_not_join_the_creation() -> None:
    """A restored TSC that happens to be below a second is not taken for that of a new vCPU."""
    _machine, _sync, first, second = two()
    first.write(1000)
    second.write(2000)

    assert (1000, 1000) == (first.value, second.value)


def test_a_zero_always_joins() -> None:
    """As at a vCPU's creation."""
    machine, _sync, first, second = two()
    first.write(10**15)
    pass_(machine, 100 * SECOND)
    second.write(0)

    assert first.value == second.value


def test_another_frequency_does_not_join() -> None:
    """The TSCs would not stay together."""
    _machine, sync, first, second = two()
    first.write(10**15)
    second.khz = KHZ // 2
    second.write(10**15)

    assert first.offset != second.offset
    assert not sync.synchronised


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["write", "offset"]), st.integers(0, 3 * SECOND)), max_size=12
    )
)
def test_synchronised_vcpus_have_one_offset(steps: list[tuple[int, str, int]]) -> None:
    """Whatever is written in whatever order: that all are of one generation means that all read the same."""
    machine = host(1_000_000, tsc_start=10**12)
    sync = TscSync(machine)
    tscs = [GuestTsc(machine, sync, 1_000_000, scaling=False) for _ in range(3)]
    for which, how, value in steps:
        pass_(machine, 1000)
        if how == "write":
            tscs[which].write(value)
        else:
            tscs[which].set_offset(value)
        if sync.synchronised:
            assert 1 == len({tsc.value for tsc in tscs})


# A host that cannot scale


def test_a_faster_tsc_is_caught_up() -> None:
    """It counts as the host's until the guest is entered, and jumps then to what it should be."""
    machine = host()
    tsc = GuestTsc(machine, TscSync(machine), 2 * KHZ, scaling=False)
    pass_(machine, SECOND)
    assert KHZ * 1000 == tsc.value

    assert tsc.catch_up()
    assert 2 * KHZ * 1000 == tsc.value
    assert not tsc.catch_up()


def test_a_tsc_of_the_hosts_frequency_is_never_behind() -> None:
    """Neither is one within the tolerance, nor one that is scaled."""
    machine = host()
    sync = TscSync(machine)
    tscs = [GuestTsc(machine, sync, khz, scaling=s) for khz, s in ((KHZ, False), (KHZ + 650, False), (2 * KHZ, True))]
    pass_(machine, SECOND)

    assert not any(tsc.catch_up() for tsc in tscs)


# The VM's clock


@pytest.mark.spec("vcpu.tsc.offset.rule.matching")
def test_the_clock_is_stable_while_the_offsets_agree() -> None:
    """One that differs ends it, and the same for all brings it back."""
    machine, sync, first, second = two()
    clock = VmClock(machine, sync)
    stable = []
    for tsc, offset in ((first, 5), (second, 5), (second, 6), (first, 6)):
        tsc.set_offset(offset)
        clock.update()
        stable.append(clock.stable)

    assert [False, True, False, True] == stable


def test_a_clock_without_vcpus_is_not_stable() -> None:
    """Nobody is there to agree."""
    machine = host()
    clock = VmClock(machine, TscSync(machine))
    clock.set(5)

    assert (5, False) == (clock.now, clock.stable)


@given(words, times)
def test_the_clock_shows_what_it_was_set_to_and_what_passes(value: int, ns: int) -> None:
    """Modulo 2**64."""
    machine = host()
    clock = VmClock(machine, TscSync(machine))
    pass_(machine, 77)
    clock.set(value)
    pass_(machine, ns)

    assert (value + ns) % 2**64 == clock.now
