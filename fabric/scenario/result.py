"""What a run leaves behind, as one frozen record."""

from __future__ import annotations

from typing import Any

import attrs

from fabric.channel import ChannelStatistics
from fabric.scenario.model import Scenario
from fabric.scenario.replay import ReplayPlan
from fabric.trace import LedgerStatement, Statistics

SCHEMA = "fabric-stats/1"


@attrs.frozen
class VcpuResult:
    """What became of one vCPU besides its interrupts."""

    index: int
    stolen_ns: int
    """Time it was ready to run while others had the physical CPUs."""


@attrs.frozen
class RunResult:
    """The results of one run. Times are virtual nanoseconds since the machine was switched on."""

    scenario: Scenario
    """As it was run, seed included."""
    start_ns: int
    """When the guest was up and its loads began."""
    end_ns: int
    ledger: LedgerStatement
    """What became of every interrupt; it balances, or there would be no result."""
    statistics: Statistics
    """Latencies: in all, by source, by vCPU."""
    vcpus: tuple[VcpuResult, ...]
    workload: dict[str, Any]
    """What guest and devices counted: requests, completions, packets, ticks, IPIs."""
    channels: tuple[ChannelStatistics, ...]
    """Where faults can be put, and what faults did there."""
    replay: ReplayPlan | None
    """What was replayed, and how its trace was read; None without one."""

    def to_dict(self, *, buckets: bool = False) -> dict[str, Any]:
        """The result as JSON has it; ``buckets`` adds the histograms themselves, to be merged with others."""
        scenario = self.scenario
        return {
            "schema": SCHEMA,
            "scenario": scenario.name,
            "board": scenario.board,
            "vcpus": scenario.vcpus,
            "pcpus": min(scenario.pcpus or scenario.vcpus, scenario.vcpus),
            "seed": scenario.seed,
            "start_ns": self.start_ns,
            "end_ns": self.end_ns,
            "ledger": self.ledger.to_dict(),
            "latency_ns": self.statistics.to_dict(buckets=buckets),
            "stolen_ns": {str(vcpu.index): vcpu.stolen_ns for vcpu in self.vcpus},
            "workload": self.workload,
            "channels": {
                channel.name: attrs.asdict(channel, filter=lambda field, _: field.name != "name")
                for channel in self.channels
            },
            "replay": None if self.replay is None else self.replay.to_dict(),
        }
