"""A trace as a plan: sources become devices, timers ticks, IPIs sends."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.errors import ConfigError
from fabric.guest.driver import IPI_KINDS
from fabric.scenario.ftrace import parse_trace
from fabric.scenario.model import Replay
from fabric.scenario.replay import OTHER_IPIS, ReplayPlan, plan_replay


def irq(at_us: int, cpu: int, name: str, took_us: int | None = None) -> str:
    """An interrupt of device ``name``, with its end if that is known."""
    number = 30 + len(name)
    text = f" task-1 [{cpu:03}] d.h.. 1.{at_us:06}: irq_handler_entry: irq={number} name={name}\n"
    if took_us is not None:
        text += f" task-1 [{cpu:03}] d.h.. 1.{at_us + took_us:06}: irq_handler_exit: irq={number} ret=handled\n"
    return text


def vector(at_us: int, cpu: int, name: str) -> str:
    return f" task-1 [{cpu:03}] d.h.. 1.{at_us:06}: {name}_entry: vector=236\n"


def plan(text: str, vcpus: int, **how: Any) -> ReplayPlan:
    return plan_replay(parse_trace(text), Replay(**how), vcpus)


def test_a_source_is_a_device_with_a_vector_for_each_vcpu_it_interrupts() -> None:
    """The interrupts of CPU 1 take turns on the vCPUs that stand for it."""
    text = irq(0, 0, "eth0", 5) + "".join(irq(10 * n, 1, "disk", 2) for n in range(1, 5))

    disk = plan(text, 4).devices[1]

    assert "disk" == disk.name
    assert [1, 3] == disk.vcpus
    assert [(10_000, 0, 2000), (20_000, 1, 2000), (30_000, 0, 2000), (40_000, 1, 2000)] == disk.arrivals


def test_timer_interrupts_are_ticks_of_the_vcpus() -> None:
    """Each vCPU has a list of its own, with times from the first interrupt of the trace."""
    text = vector(0, 0, "local_timer") + vector(4, 1, "local_timer") + vector(9, 0, "local_timer")

    made = plan(text, 2, handler_ns=7)

    assert [[(0, 7), (9000, 7)], [(4000, 7)]] == made.ticks
    assert 3 == made.tick_count
    assert [] == made.devices


def test_ipis_are_sent_by_another_vcpu() -> None:
    """Of two CPUs it was the other one that sent it."""
    text = vector(0, 1, "local_timer") + vector(5, 0, "reschedule")

    made = plan(text, 2, handler_ns=7)

    assert [(1, "reschedule", {1: [(5000, 0, 7)]})] == [(one.kind, one.label, one.sends) for one in made.ipis]


def test_the_handler_works_as_long_as_the_trace_says() -> None:
    """handler_ns is for interrupts whose end is not in the trace."""
    made = plan(irq(0, 0, "disk", 3) + irq(10, 0, "net"), 1, handler_ns=99)

    assert [[(0, 0, 3000)], [(10_000, 0, 99)]] == [device.arrivals for device in made.devices]


def test_scale_stretches_time_and_not_handlers() -> None:
    """A trace at twice the speed has the same work to do."""
    text = irq(0, 0, "disk", 3) + irq(10, 0, "disk", 3)

    assert [(0, 0, 3000), (5000, 0, 3000)] == plan(text, 1, scale="1/2").devices[0].arrivals


def test_ipi_sources_beyond_the_kinds_share_the_last_one() -> None:
    """The frequent ones can be told apart, the rare ones are told as others; none is lost."""
    names = [f"purpose {n}" for n in range(IPI_KINDS)]
    lines = []
    for n, name in enumerate(names):
        for again in range(IPI_KINDS - n):
            lines.append(f" task-1 [000] d.h.. 1.{n * 10 + again:06}: ipi_entry: ({name})\n")

    made = plan("".join(lines), 2)

    assert [*names[: IPI_KINDS - 2], OTHER_IPIS] == [one.label for one in made.ipis]
    assert list(range(1, IPI_KINDS)) == [one.kind for one in made.ipis]
    assert len(lines) == made.count == sum(one.count for one in made.ipis)


def test_seven_ipi_sources_all_have_their_kind() -> None:
    """One source needs no company to be told as others."""
    text = "".join(f" task-1 [000] d.h.. 1.{n:06}: ipi_entry: (purpose {n})\n" for n in range(IPI_KINDS - 1))

    assert OTHER_IPIS not in [one.label for one in plan(text, 1).ipis]


def test_a_trace_without_arrivals_is_refused() -> None:
    """Ends of interrupts alone are events, and no load."""
    with pytest.raises(ConfigError, match="none of them is the arrival of an interrupt"):
        plan(" task-1 [000] d.h.. 1.000001: irq_handler_exit: irq=3 ret=handled\n", 1)
