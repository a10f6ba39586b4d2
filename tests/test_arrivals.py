"""Arrivals: the interrupts of a trace, who they are for, and how they are spread over a guest."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.scenario.arrivals import Arrival, arrivals, scale, sources, spread
from fabric.scenario.ftrace import parse_trace, read_trace

EXAMPLES = Path(__file__).parent.parent / "examples"


def of(*lines: str) -> list[Arrival]:
    """Arrivals of lines written ``CPU MICROSECONDS EVENT``, by task 7; ``COMM-PID~`` in front names another."""
    text = []
    for line in lines:
        task, _, rest = line.rpartition("~")
        cpu, at, event = rest.split(" ", 2)
        text.append(f"{task or 'task-7'} [{int(cpu):03}] d.h.. 5.{int(at):06}: {event}")
    return arrivals(parse_trace("\n".join(text)))


def brief(found: list[Arrival]) -> list[tuple[int, int, str, str]]:
    return [(arrival.at_ns, arrival.cpu, arrival.kind, arrival.source) for arrival in found]


# Of the traced kernel


def test_devices_timers_and_ipis() -> None:
    """Each interrupt has a class, a source and a time relative to the first."""
    found = of(
        "1 10 irq_handler_entry: irq=36 name=virtio1-req.0",
        "0 12 local_timer_entry: vector=236",
        "0 15 reschedule_entry: vector=253",
        "1 17 error_apic_entry: vector=254",
    )

    assert [
        (0, 1, "device", "virtio1-req.0"),
        (2000, 0, "timer", "local_timer"),
        (5000, 0, "ipi", "reschedule"),
        (7000, 1, "device", "error_apic"),
    ] == brief(found)
    assert [36, 236, 253, 254] == [arrival.vector for arrival in found]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("arch_timer", "timer"), ("timer", "timer"), ("hpet1", "timer"), ("IPI", "ipi"), ("timerfd-dev", "device")],
)
def test_irqs_are_classified_by_name(name: str, kind: str) -> None:
    """Where timers and IPIs are ordinary irqs, their names say so."""
    assert [kind] == [arrival.kind for arrival in of(f"0 0 irq_handler_entry: irq=11 name={name}")]


def test_the_end_of_a_handler_gives_its_duration() -> None:
    """Entry and exit are paired by CPU and irq; without an exit the duration is unknown."""
    found = of(
        "0 0 irq_handler_entry: irq=36 name=a",
        "1 1 irq_handler_entry: irq=36 name=a",
        "0 4 irq_handler_exit: irq=36 ret=handled",
        "1 9 irq_handler_exit: irq=36 ret=handled",
        "1 10 local_timer_entry: vector=236",
        "1 13 local_timer_exit: vector=236",
        "1 20 irq_handler_entry: irq=36 name=a",
        "1 21 irq_handler_exit: irq=40 ret=handled",
    )

    assert [4000, 8000, 3000, None] == [arrival.duration_ns for arrival in found]


def test_handlers_of_a_shared_irq_are_one_interrupt() -> None:
    """All handlers of a shared irq are called; the one that handled it is the source."""
    found = of(
        "0 0 irq_handler_entry: irq=16 name=usb",
        "0 1 irq_handler_exit: irq=16 ret=unhandled",
        "0 1 irq_handler_entry: irq=16 name=sound",
        "0 5 irq_handler_exit: irq=16 ret=handled",
    )

    assert [Arrival(0, 0, "device", "sound", 16, -1, 5000)] == found


def test_the_other_cpu_sent_the_ipi() -> None:
    """Nothing says who sent it: it is the other CPU that took an interrupt last."""
    found = of(
        "0 0 reschedule_entry: vector=253",
        "2 1 local_timer_entry: vector=236",
        "1 2 local_timer_entry: vector=236",
        "1 3 reschedule_entry: vector=253",
        "2 4 reschedule_entry: vector=253",
    )

    assert [0, -1, -1, 2, 1] == [arrival.sender for arrival in found]


def test_a_recorded_sender_is_believed() -> None:
    """ipi_raise and ipi_send_cpu say who sent the next IPI of their target."""
    found = of(
        "3 0 ipi_send_cpu: cpu=1 callsite=x callback=0",
        "0 1 local_timer_entry: vector=236",
        "1 2 reschedule_entry: vector=253",
    )

    assert [-1, 3] == [arrival.sender for arrival in found]


def test_an_ipi_seen_twice_is_one_arrival() -> None:
    """arm64 shows the irq named IPI and then its purpose, which is the better name."""
    found = of(
        "0 0 irq_handler_entry: irq=1 name=IPI",
        "0 1 ipi_entry: (Rescheduling interrupts)",
        "0 3 ipi_exit: (Rescheduling interrupts)",
        "0 4 irq_handler_exit: irq=1 ret=handled",
    )

    assert [Arrival(0, 0, "ipi", "Rescheduling interrupts", -1, 0, 2000)] == found


# Of guests


def test_one_injection_is_one_arrival() -> None:
    """GSI, message and accepting APIC are one interrupt: named after the first, aimed at the last."""
    found = of(
        "5 0 kvm_set_irq: gsi 24 level 1 source 0",
        "5 1 kvm_msi_set_irq: dst 2 vec 35 (Fixed|physical|edge)",
        "5 2 kvm_apic_accept_irq: apicid 2 vec 35 (Fixed|edge)",
        "6 3 kvm_inj_virq: IRQ 0x23",
        "6 8 kvm_eoi: apicid 2 vector 35",
        "5 9 kvm_set_irq: gsi 24 level 0 source 0",
        "5 10 kvm_set_irq: gsi 24 level 1 source 0",
        "5 11 kvm_msi_set_irq: dst 2 vec 35 (Fixed|physical|edge)",
        "5 12 kvm_apic_accept_irq: apicid 2 vec 35 (Fixed|edge)",
    )

    assert [(0, 2, "device", "gsi 24"), (10_000, 2, "device", "gsi 24")] == brief(found)
    assert [35, 35] == [arrival.vector for arrival in found]


def test_a_broadcast_arrives_at_each_vcpu() -> None:
    """One IPI command, several accepting APICs; the sender is the vCPU whose thread issued it."""
    found = of(
        "CPU 1/KVM-71~5 0 kvm_apic_ipi: dst ff vec 252 (Fixed|physical|assert|edge|all-but-self)",
        "CPU 1/KVM-71~5 1 kvm_apic_accept_irq: apicid 0 vec 252 (Fixed|edge)",
        "CPU 1/KVM-71~5 1 kvm_apic_accept_irq: apicid 2 vec 252 (Fixed|edge)",
    )

    assert [(0, 0, "ipi", "call_function"), (1000, 2, "ipi", "call_function")] == brief(found)
    assert [1, 1] == [arrival.sender for arrival in found]


def test_an_accepted_vector_alone_is_classified_by_number() -> None:
    """Without what came before, Linux' own system vectors tell timers and IPIs from devices."""
    found = of(
        "0 0 kvm_apic_accept_irq: apicid 0 vec 236 (Fixed|edge)",
        "1 1 kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)",
        "2 2 kvm_apic_accept_irq: apicid 1 vec 35 (Fixed|edge)",
    )

    assert [
        (0, 0, "timer", "local_timer"),
        (1000, 1, "ipi", "reschedule"),
        (2000, 1, "device", "vec 35"),
    ] == brief(found)


def test_idle_tasks_of_two_cpus_do_not_mix() -> None:
    """Pid 0 runs on every idle CPU: a chain belongs to a task on a CPU."""
    found = of(
        "<idle>-0~0 0 kvm_set_irq: gsi 24 level 1 source 0",
        "<idle>-0~1 1 kvm_set_irq: gsi 25 level 1 source 0",
        "<idle>-0~0 2 kvm_msi_set_irq: dst 2 vec 35 (Fixed|physical|edge)",
        "<idle>-0~1 3 kvm_msi_set_irq: dst 3 vec 36 (Fixed|physical|edge)",
    )

    assert [(0, 2, "device", "gsi 24"), (1000, 3, "device", "gsi 25")] == brief(found)


def test_interrupts_of_an_arm_guest() -> None:
    """INTIDs tell SGIs, timer PPIs and SPIs apart; lowered lines are no arrivals."""
    found = of(
        "0 0 kvm_timer_update_irq: VCPU: 3, IRQ 27, level 1",
        "0 1 vgic_update_irq_pending: VCPU: 3, IRQ 27, level: 1",
        "0 2 kvm_timer_update_irq: VCPU: 3, IRQ 27, level 0",
        "0 3 vgic_update_irq_pending: VCPU: 3, IRQ 27, level: 0",
        "1 4 kvm_irq_line: Inject VGIC SPI interrupt (1), vcpu->idx: 0, num: 78, level: 1",
        "1 5 vgic_update_irq_pending: VCPU: 1, IRQ 78, level: 1",
    )

    assert [(0, 3, "timer", "intid 27"), (4000, 1, "device", "intid 78")] == brief(found)


def test_injections_stand_in_when_nothing_else_was_traced() -> None:
    """kvm_inj_virq names the vCPU by its thread: by name, or by order of appearance."""
    found = of(
        "CPU 2/KVM-70~0 0 kvm_inj_virq: irq 236",
        "qemu-71~1 1 kvm_inj_virq: irq 52",
        "qemu-72~0 2 kvm_inj_virq: irq 52",
        "qemu-71~0 3 kvm_inj_virq: irq 52",
    )

    assert [2, 0, 1, 0] == [arrival.cpu for arrival in found]


def test_the_layer_may_be_chosen() -> None:
    """A host's own interrupts are no load of its guests unless asked for."""
    trace = parse_trace(
        "a-1 [000] 1.000001: irq_handler_entry: irq=36 name=nvme0q1\n"
        "a-1 [000] 1.000002: kvm_apic_accept_irq: apicid 4 vec 35 (Fixed|edge)\n"
    )

    assert ["vec 35"] == [arrival.source for arrival in arrivals(trace)]
    assert ["nvme0q1"] == [arrival.source for arrival in arrivals(trace, "irq")]


EVENTS = [
    "irq_handler_entry: irq=16 name=usb",
    "irq_handler_entry: irq=16 name=sound",
    "irq_handler_exit: irq=16 ret=unhandled",
    "irq_handler_exit: irq=16 ret=handled",
    "irq_handler_entry: irq=1 name=IPI",
    "reschedule_entry: vector=253",
    "reschedule_exit: vector=253",
    "ipi_raise: target_mask=00000003 (x)",
    "ipi_entry: (x)",
    "kvm_set_irq: gsi 24 level 1 source 0",
    "kvm_msi_set_irq: dst 2 vec 35 (Fixed|physical|edge)",
    "kvm_apic_accept_irq: apicid 2 vec 35 (Fixed|edge)",
    "kvm_apic_ipi: dst 3 vec 253 (Fixed|physical|assert|edge|dst)",
    "kvm_inj_virq: IRQ 0x23",
]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50), st.sampled_from(EVENTS)), min_size=1))
def test_any_order_of_events_makes_sense(events: list[tuple[int, int, str]]) -> None:
    """Exits without entries, chains cut short: arrivals are in order, from 0, and no handler ends early."""
    trace = parse_trace("\n".join(f"t-{cpu} [{cpu:03}] 5.{at:06}: {event}" for cpu, at, event in events))

    for layer in ("irq", "kvm"):
        found = arrivals(trace, layer)
        times = [arrival.at_ns for arrival in found]
        assert sorted(times) == times
        assert all(at == 0 for at in times[:1])
        assert all(arrival.duration_ns is None or arrival.duration_ns >= 0 for arrival in found)
        assert all((arrival.sender >= 0) == (arrival.kind == "ipi") for arrival in found)


def test_events_without_arrivals() -> None:
    """A trace of softirqs is understood and holds no interrupt."""
    assert [] == of("0 0 softirq_entry: vec=3 [action=NET_RX]")


# Spreading and scaling


loads = st.lists(
    st.builds(
        Arrival,
        st.integers(0, 10**9),
        st.sampled_from([0, 1, 5, 40]),
        st.just("ipi"),
        st.sampled_from("abc"),
        st.just(1),
        st.sampled_from([-1, 0, 1, 5, 40]),
    ),
    max_size=60,
)


@given(loads, st.integers(1, 20))
def test_a_cpu_stands_for_its_share_of_the_vcpus(load: list[Arrival], vcpus: int) -> None:
    """CPU number c goes to vCPUs v with v % M == c, or to c % N when there are fewer vCPUs; so do senders."""
    occurring = sorted({arrival.cpu for arrival in load} | {arrival.sender for arrival in load} - {-1})
    number = {cpu: c for c, cpu in enumerate(occurring)}

    for given_, spread_ in zip(load, spread(load, vcpus), strict=True):
        for before, after in ((given_.cpu, spread_.cpu), (given_.sender, spread_.sender)):
            if before == -1:
                assert after == -1
            elif number[before] < vcpus:
                assert number[before] == after % len(occurring)
                assert after < vcpus
            else:
                assert number[before] % vcpus == after
        assert (given_.at_ns, given_.source) == (spread_.at_ns, spread_.source)


@given(loads, st.integers(1, 20))
def test_sources_take_turns(load: list[Arrival], vcpus: int) -> None:
    """The interrupts of one source on one CPU differ by one at most between the CPU's vCPUs."""
    spread_ = spread(load, vcpus)
    reached: dict[tuple[int, str], dict[int, int]] = {}
    for before, after in zip(load, spread_, strict=True):
        row = reached.setdefault((before.cpu, before.source), {})
        row[after.cpu] = row.get(after.cpu, 0) + 1

    for row in reached.values():
        assert max(row.values()) - min(row.values()) <= 1


def test_a_source_may_keep_to_one_vcpu() -> None:
    """As an interrupt whose affinity is never changed; different sources still go to different vCPUs."""
    load = [Arrival(at, 0, "device", source, 1) for at, source in enumerate("abab")]

    assert [0, 1, 0, 1] == [arrival.cpu for arrival in spread(load, 4, by="source")]


def test_spreading_needs_a_vcpu() -> None:
    """No vCPU is a mistake of the caller."""
    with pytest.raises(ValueError, match="vcpus must be >= 1, not 0"):
        spread([], 0)


def test_times_are_scaled_by_a_rational() -> None:
    """1/3 is exact, rounded down to whole nanoseconds; the handlers stay as fast as they were."""
    load = [Arrival(at, 0, "device", "a", 1, -1, 500) for at in (0, 10, 3_000_000_001)]

    scaled = scale(load, Fraction(1, 3))

    assert [0, 3, 1_000_000_000] == [arrival.at_ns for arrival in scaled]
    assert {500} == {arrival.duration_ns for arrival in scaled}


@pytest.mark.parametrize("factor", [0, Fraction(-1, 2)])
def test_time_does_not_stand_still(factor: Fraction | int) -> None:
    """A factor of 0 or less would put the interrupts in another order."""
    with pytest.raises(ValueError, match="must be > 0"):
        scale([], factor)


# The recorded trace


def test_the_sources_of_the_recorded_trace() -> None:
    """One block device makes most of the load of the trimmed example; handlers ran a microsecond or two."""
    found = sources(arrivals(read_trace(EXAMPLES / "virtio-blk-2cpu-short.txt.gz")))

    assert {
        "call_function_single": ("ipi", 31),
        "local_timer": ("timer", 800),
        "reschedule": ("ipi", 928),
        "virtio1-req.0": ("device", 1688),
        "virtio2-input.0": ("device", 215),
        "virtio2-output.0": ("device", 166),
        "virtio3-rx": ("device", 7),
        "virtio3-tx": ("device", 17),
    } == {source.name: (source.kind, source.arrivals) for source in sorted(found, key=lambda s: s.name)}
    block = next(source for source in found if source.name == "virtio1-req.0")
    assert {1: 1688} == block.cpus
    assert 1688 == block.durations.count
    assert 1000 == block.durations.percentile(50)
