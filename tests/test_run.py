"""Running scenarios: loads, costs, physical CPUs, faults, replays; the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from boards import WIRES, every_board
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.errors import ConfigError, LedgerError
from fabric.guest.workload import Load
from fabric.scenario.ftrace import parse_trace
from fabric.scenario.load import make_scenario
from fabric.scenario.model import Scenario
from fabric.scenario.result import RunResult
from fabric.scenario.run import Run, execute
from fabric.scenario.setup import set_up
from fabric.vmm import BOARDS

MS = 1_000_000
FREE = dict.fromkeys(
    ("exit_ns", "userspace_exit_ns", "injection_ns", "eoi_ns", "wakeup_ns", "context_switch_ns", "wire_ns"), 0
)
"""A host that costs nothing."""

BLOCK = {"name": "disk", "queues": 2, "iops": 20_000}


def scenario(**document: Any) -> Scenario:
    return make_scenario({"vcpus": 2, "duration_ns": 10 * MS, **document})


def run(**document: Any) -> RunResult:
    return execute(scenario(**document))


def problems(**document: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        run(**document)
    return caught.value.problems


# Loads


@every_board
def test_a_block_device_interrupts_for_every_request(board: str) -> None:
    """Requests go out by doorbell, completions come back as interrupts."""
    result = run(board=board, block=[{**BLOCK, "arrivals": "constant", "service_ns": 1000}])

    counted = result.workload["block"]["disk"]
    assert 180 <= counted["requests"] <= 200  # a queue's interval begins when it has submitted
    assert counted["requests"] - 2 <= counted["completions"] <= counted["requests"]
    assert counted["completions"] == sum(result.statistics.sources[f"disk.{queue}"].pended for queue in range(2))


@every_board
def test_a_network_device_gathers_packets(board: str) -> None:
    """With coalesce_packets = 4 there is an interrupt for every fourth packet."""
    network = {"queues": 1, "rx_per_s": 100_000, "arrivals": "constant", "coalesce_packets": 4, "coalesce_ns": MS}

    result = run(board=board, network=[network])

    packets = result.workload["network"]["net"]["packets"]
    assert 999 <= packets <= 1001  # they began to come before the guest was up
    assert packets // 4 == result.statistics.sources["net.0"].pended


@every_board
def test_ticks_come_on_every_vcpu(board: str) -> None:
    """1000 Hz on 2 vCPUs; a tick comes with the first step of the counter after its time."""
    result = run(board=board, tick={"hz": 1000}, costs=FREE, duration_ns=10 * MS + 16)

    assert {"ticks": 20} == result.workload["tick"]


@every_board
def test_vcpus_interrupt_each_other(board: str) -> None:
    """IPIs go to another vCPU, and each is accounted for."""
    result = run(board=board, ipi={"per_s": 10_000}, vcpus=4)

    sent = result.workload["ipi"]["sent"]
    assert 300 <= sent <= 500
    passage = result.statistics.sources["IPI"]
    assert sent + 3 == passage.pended + passage.coalesced  # and three of the boot


def test_an_idle_machine_has_no_workload_counters() -> None:
    """A statistic that was never touched is absent, not 0."""
    assert {} == run().workload


@every_board
def test_a_busy_guest_is_interrupted_without_being_woken(board: str) -> None:
    """An interrupt costs a computing vCPU the injection only, a halted one the wakeup as well."""
    load: dict[str, Any] = {"block": [{**BLOCK, "queues": 1}], "vcpus": 1}

    busy = run(board=board, **load, guest={"busy_percent": 100})
    idle = run(board=board, **load)

    assert 1059 == busy.statistics.total.stages["pending_acknowledged"].min
    assert 3000 + 1059 == idle.statistics.total.stages["pending_acknowledged"].percentile(50)


# Host


@every_board
def test_without_costs_an_idle_vcpu_takes_interrupts_at_once(board: str) -> None:
    """The traffic alone: what remains is the time in handlers."""
    stages = run(board=board, tick={"hz": 1000, "handler_ns": 700}, costs=FREE).statistics.sources["timer"].stages

    assert 0 == stages["pending_acknowledged"].max
    assert 700 == stages["acknowledged_eoi"].min == stages["acknowledged_eoi"].max


@every_board
def test_the_wire_delays_messages(board: str) -> None:
    """costs.wire_ns is the time from a device's raise to the interrupt being pending."""
    stages = run(board=board, block=[BLOCK], costs={**FREE, "wire_ns": 333}).statistics.sources["disk.0"].stages

    assert 333 == stages["raised_pending"].min == stages["raised_pending"].max


def test_fewer_physical_cpus_steal_time() -> None:
    """Two computing vCPUs on one physical CPU get half of it each."""
    result = run(pcpus=1, slice_ns=MS, guest={"busy_percent": 100}, costs=FREE)

    stolen = [vcpu.stolen_ns for vcpu in result.vcpus]
    assert 10 * MS == pytest.approx(sum(stolen), rel=0.01)
    assert 0.4 < stolen[0] / sum(stolen) < 0.6


def test_enough_physical_cpus_steal_nothing() -> None:
    """More physical CPUs than vCPUs are as good as one for each."""
    result = run(pcpus=8, guest={"busy_percent": 100})

    assert [0, 0] == [vcpu.stolen_ns for vcpu in result.vcpus]


# The same every time


MIXED: dict[str, Any] = {
    "block": [BLOCK],
    "network": [{"queues": 2}],
    "tick": {"hz": 1000},
    "ipi": {"per_s": 5000},
    "costs": FREE,
}


@every_board
def test_a_run_is_a_function_of_scenario_and_seed(board: str) -> None:
    """Run twice, it gives the same in every detail; another seed gives something else."""
    first, second, other = (
        json.dumps(execute(scenario(board=board, **MIXED), seed).to_dict(buckets=True)) for seed in (3, 3, 4)
    )

    assert first == second
    assert first != other


def test_the_seed_of_the_call_wins() -> None:
    """The result says which seed it was."""
    assert 7 == execute(scenario(seed=3), 7).scenario.seed


def test_explored_ties_are_another_order_with_the_same_numbers() -> None:
    """explore_ties says whether the seed decides the order within an instant; absent, any seed but 0 does."""
    events = {
        explore: _events(scenario(**MIXED, seed=5, **({} if explore is None else {"explore_ties": explore})))
        for explore in (None, True, False)
    }

    assert events[None] == events[True]
    assert events[True] != events[False]


def _events(of: Scenario) -> list[str]:
    run = Run(attrs.evolve(of, trace=attrs.evolve(of.trace, last=100_000)))
    run.execute()
    return run.last_events()


# Faults


def faulty(board: str = "arm64-gicv3", **fault: Any) -> RunResult:
    block = {**BLOCK, "queues": 1, "service_ns": 1000}
    return run(board=board, block=[block], fault=[{"channel": WIRES[board], **fault}], costs=FREE, vcpus=1)


@every_board
def test_dropped_messages_are_in_the_ledger(board: str) -> None:
    """Every second message is lost, and said to be."""
    result = faulty(board=board, kind="drop", probability=0.5)

    assert 60 < result.ledger.dropped["injected fault"] < 140
    faults = {channel.name: channel.faults for channel in result.channels}
    assert result.ledger.dropped["injected fault"] == faults[WIRES[board]]["drop"]


def test_a_fault_hits_so_often_and_no_more() -> None:
    """count bounds it."""
    assert {"injected fault": 3} == faulty(kind="drop", count=3).ledger.dropped


def test_a_fault_lasts_from_and_until() -> None:
    """Times count from when the guest is up."""
    whole, half = faulty(kind="drop"), faulty(kind="drop", from_ns=2 * MS, until_ns=7 * MS)

    assert 0.5 == pytest.approx(half.ledger.dropped["injected fault"] / whole.ledger.raised, abs=0.1)


@every_board
def test_duplicated_messages_merge_or_come_twice(board: str) -> None:
    """Each message counts twice."""
    result = faulty(board=board, kind="duplicate")

    assert 2 * result.workload["block"]["disk"]["completions"] <= result.ledger.raised + 2
    assert result.ledger.coalesced > 0


@every_board
def test_delayed_messages_arrive_late(board: str) -> None:
    """The latency from raise to pending is the delay."""
    stages = faulty(board=board, kind="delay", delay_ns=444).statistics.total.stages

    assert 444 == stages["raised_pending"].max


@every_board
def test_a_failing_channel_loses_messages_without_a_word_to_the_device(board: str) -> None:
    """An irqfd has nobody to report to: the device goes on."""
    result = faulty(board=board, kind="fail", errno="EAGAIN", count=5)

    assert {"injected failure": 5} == result.ledger.dropped


@every_board
def test_held_messages_come_when_released(board: str) -> None:
    """They merge, and none is lost."""
    result = faulty(board=board, kind="hold", from_ns=MS, until_ns=9 * MS)

    assert result.ledger.coalesced > 100
    assert 8 * MS > result.statistics.total.stages["raised_pending"].max > 7 * MS  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["hold", "drop", "duplicate", "delay", "fail"])
def test_doorbells_can_be_disturbed(kind: str) -> None:
    """A lost doorbell delays requests, and breaks nothing."""
    extra = {"delay_ns": 10} if kind == "delay" else {}
    fault = {"channel": "vm0.mmio-doorbell", "kind": kind, "from_ns": MS, **extra}

    result = run(block=[BLOCK], fault=[fault])

    assert result.ledger.balanced


def test_an_unknown_channel_is_refused_with_the_nearest_name() -> None:
    """All of them at once."""
    faults = [{"channel": "vm0.msis"}, {"channel": "vm0.lines"}]

    found = problems(fault=faults)

    assert (
        "fault[0].channel: must be one of vm0.line, vm0.mmio-doorbell, vm0.msi, not 'vm0.msis'; did you mean vm0.msi?"
        == (found[0])
    )
    assert found[1].endswith("did you mean vm0.line?")


def test_the_result_names_the_channels() -> None:
    """So that one knows what a fault can be put on."""
    assert ["vm0.line", "vm0.mmio-doorbell", "vm0.msi"] == sorted(run().to_dict()["channels"])


_LOADS = st.fixed_dictionaries(
    {
        "board": st.sampled_from(list(BOARDS)),
        "vcpus": st.integers(2, 5),
        "pcpus": st.integers(1, 5),
        "seed": st.integers(0, 3),
        "duration_ns": st.integers(1, 300_000),
        "slice_ns": st.sampled_from([1000, 50_000]),
        "costs": st.sampled_from([{}, FREE, {"wire_ns": 700, "exit_ns": 5000}]),
        "block": st.lists(
            st.fixed_dictionaries({"queues": st.integers(1, 5), "service_ns": st.sampled_from([0, 1, 80_000])}),
            max_size=1,
        ),
        "network": st.lists(
            st.fixed_dictionaries({"queues": st.integers(1, 5), "rx_per_s": st.sampled_from([1000, 3_000_000])}),
            max_size=1,
        ),
        "tick": st.fixed_dictionaries({"hz": st.sampled_from([0, 1000, 1_000_000])}),
        "ipi": st.fixed_dictionaries({"per_s": st.sampled_from([0, 1_000_000])}),
        "guest": st.fixed_dictionaries({"busy_percent": st.sampled_from([0, 30, 100])}),
        "fault": st.lists(
            st.one_of(
                st.fixed_dictionaries({"kind": st.just("hold"), "until_ns": st.integers(60_000, 400_000)}),
                st.fixed_dictionaries(
                    {
                        "kind": st.sampled_from(["drop", "duplicate", "delay", "fail"]),
                        "delay_ns": st.sampled_from([1, 90_000]),
                        "probability": st.sampled_from([0.3, 1.0]),
                    }
                ),
            ).flatmap(
                lambda fault: st.fixed_dictionaries(
                    {
                        **{key: st.just(value) for key, value in fault.items()},
                        "channel": st.sampled_from(["vm0.msi", "vm0.line", "vm0.mmio-doorbell"]),
                        "from_ns": st.integers(0, 50_000),
                    }
                )
            ),
            max_size=3,
        ),
    }
)


@settings(max_examples=30, deadline=None)
@given(_LOADS)
def test_whatever_happens_the_ledger_balances(document: dict[str, Any]) -> None:
    """Any loads under any faults: a result, in which every interrupt is accounted for."""
    result = execute(make_scenario(document))

    assert result.ledger.balanced
    passages = result.statistics.total
    assert result.ledger.delivered == passages.stages["pending_acknowledged"].count


# Replay


TRACE = Path(__file__).parent.parent / "examples" / "virtio-blk-2cpu-short.txt.gz"


def replayed(**document: Any) -> RunResult:
    return run(duration_ns=0, replay={"trace": str(TRACE)}, **document)


@every_board
def test_everything_recorded_is_raised_and_handled(board: str) -> None:
    """The ledger has the recording, and the IPI that started the second vCPU's loads; nothing is left."""
    result = replayed(board=board)

    assert result.replay is not None
    assert result.replay.count + 1 == result.ledger.raised
    assert 0 == result.ledger.pending
    assert {} == result.ledger.dropped
    assert result.ledger.delivered == result.statistics.total.stages["raised_eoi"].count


@every_board
def test_each_source_has_the_interrupts_it_had(board: str) -> None:
    """Merged ones included."""
    result = replayed(board=board, vcpus=4)

    assert result.replay is not None
    for device in result.replay.devices:
        passage = result.statistics.sources[device.name]
        assert len(device.arrivals) == passage.pended + passage.coalesced
    for ipis in result.replay.ipis:
        passage = result.statistics.sources[ipis.label]
        assert ipis.count == passage.pended + passage.coalesced


@every_board
def test_a_guest_that_cannot_keep_up_works_it_off(board: str) -> None:
    """A thousand times too fast for one vCPU: the run goes on until all is handled."""
    result = run(board=board, vcpus=1, duration_ns=0, replay={"trace": str(TRACE), "scale": "1/1000"})

    assert result.replay is not None
    assert result.end_ns - result.start_ns > 3 * result.replay.last_ns
    assert 0 == result.ledger.pending
    assert result.ledger.coalesced > 1000


@every_board
def test_a_replay_ends_although_a_fault_keeps_interrupts(board: str) -> None:
    """Held for good, they are pending at the end."""
    result = replayed(board=board, fault=[{"channel": WIRES[board], "kind": "hold"}])

    assert result.replay is not None
    assert sum(len(device.arrivals) for device in result.replay.devices) == result.ledger.pending


@every_board
def test_a_replay_waits_for_what_is_released_late(board: str) -> None:
    """A hold that ends after the recording is waited for."""
    result = replayed(board=board, fault=[{"channel": WIRES[board], "kind": "hold", "until_ns": 5_000 * MS}])

    assert 0 == result.ledger.pending
    assert result.end_ns > 5_000 * MS


def test_with_a_duration_the_replay_is_cut_off() -> None:
    """duration_ns counts if it is given."""
    result = run(duration_ns=100 * MS, replay={"trace": str(TRACE)})

    assert result.start_ns + 100 * MS == result.end_ns
    assert result.replay is not None
    assert result.ledger.raised < result.replay.count


def test_a_trace_runs_beside_other_loads() -> None:
    """Block requests while the trace is played."""
    result = replayed(block=[BLOCK], ipi={"per_s": 100})

    assert {"block", "ipi", "replay"} == set(result.workload)
    assert result.replay is not None
    assert result.replay.count == sum(result.workload["replay"].values())


def test_the_boards_deliver_the_same_work() -> None:
    """What a guest gets done does not depend on its interrupt controller."""
    load: dict[str, Any] = {
        "block": [{**BLOCK, "arrivals": "constant"}],
        "network": [{"queues": 4, "arrivals": "constant"}],
        "tick": {"hz": 1000},
        "vcpus": 4,
    }

    every = [run(board=board, **load).statistics.sources for board in BOARDS]
    handled = [{name: one.stages["raised_eoi"].count for name, one in sources.items()} for sources in every]

    assert {"disk.0", "disk.1", "net.0", "net.1", "net.2", "net.3", "timer", "IPI"} == set(handled[0])
    for others in handled[1:]:
        assert pytest.approx(handled[0], abs=1) == others  # packets come before the guest is up, and booting differs


# What the schema cannot know


def test_boards_have_a_greatest_number_of_vcpus() -> None:
    """A GICv2 has eight CPU interfaces."""
    assert ["vcpus: must be <= 8 on the board arm64-gicv2, not 16"] == problems(board="arm64-gicv2", vcpus=16)


def test_ticks_of_trace_and_scenario_exclude_each_other() -> None:
    """A vCPU has one timer."""
    assert ["tick.hz: must be 0, as the trace brings the ticks of its timers, and a vCPU has one timer"] == problems(
        duration_ns=0, replay={"trace": str(TRACE)}, tick={"hz": 100}
    )


def test_tables_must_fit_into_memory() -> None:
    """A small guest cannot have many vCPUs."""
    (problem,) = problems(vcpus=512, memory_bytes=1 << 24)

    assert problem == "memory_bytes: must be >= 38797312 for 512 vCPUs, not 16777216"


def test_vectors_must_fit_into_the_route_table() -> None:
    """All mistakes at once, here this one and the memory."""
    found = problems(block=[{"queues": 2048}], network=[{"queues": 2049 - 1}, {"name": "b"}], memory_bytes=1 << 24)

    assert any("have 4097 vectors together, and a machine has 4096" in problem for problem in found)


def test_vectors_must_fit_into_the_spis_of_a_gicv2() -> None:
    """What its GICv2m frame has."""
    (found,) = problems(board="arm64-gicv2", block=[{"queues": 929}])

    assert "have 929 vectors together, and a machine has 928" in found


def test_the_board_must_exist() -> None:
    """With the nearest name."""
    known = "arm64-gicv2, arm64-gicv3, x86-apic, x86-split"
    found = problems(board="arm64-gicv4")

    assert [f"board: must be one of {known}, not 'arm64-gicv4'; did you mean arm64-gicv3?"] == found


def test_a_trace_that_was_read_already_is_not_read_again() -> None:
    """``trace=`` stands for the scenario's file."""
    trace = parse_trace(" task-1 [000] d.h.. 1.000001: irq_handler_entry: irq=3 name=x\n")

    result = execute(scenario(duration_ns=0, replay={"trace": "nowhere"}), trace=trace)

    assert 1 == result.statistics.sources["x"].pended


# Failure


class _Breaks(Load):
    """A load whose driver has a bug."""

    async def set_up(self, guest: Any, cpu: Any) -> None:
        raise ZeroDivisionError("the driver has a bug")


def test_the_exception_of_a_guest_comes_out_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No group around it, so that it can be caught by its name."""

    def broken(*arguments: Any) -> Any:
        setup = set_up(*arguments)
        setup.guest.loads.append(_Breaks())  # type: ignore[attr-defined]
        return setup

    monkeypatch.setattr("fabric.scenario.run.set_up", broken)

    with pytest.raises(ZeroDivisionError, match="the driver has a bug"):
        run()


def test_a_ledger_that_does_not_balance_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loudly, with what is missing; the last events tell what happened before."""

    def leaking(*arguments: Any) -> Any:
        setup = set_up(*arguments)
        setup.machine.vm.ledger.raised += 1
        return setup

    monkeypatch.setattr("fabric.scenario.run.set_up", leaking)
    failing = Run(scenario(tick={"hz": 1000}, trace={"last": 10}))

    with pytest.raises(LedgerError, match="1 lost"):
        failing.execute()
    assert 10 == len(failing.last_events())
    assert {"at", "event", "cpu", "intid"} <= json.loads(failing.last_events()[-1]).keys()


def test_progress_goes_from_nothing_to_all() -> None:
    """It is virtual time over the time that the run will take."""
    watched = Run(scenario())

    before = watched.progress
    watched.execute()

    assert (0.0, 1.0) == (before, watched.progress)
