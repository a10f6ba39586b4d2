"""A scenario made real: the machine, its devices and the guest's loads, inside a simulation."""

from __future__ import annotations

import errno
from typing import Any

import attrs

from fabric.channel import Channel
from fabric.clock import Engine, Priority
from fabric.errors import ConfigError
from fabric.guest.workload import (
    BlockDriver,
    Busy,
    DeviceDriver,
    Guest,
    Interval,
    Ipis,
    Load,
    RecordedDevice,
    Ticks,
)
from fabric.scenario.model import Block, Fault, Network, Scenario, did_you_mean
from fabric.scenario.replay import ReplayPlan
from fabric.vcpu.host import Host
from fabric.vmm import BOARDS, BlockDevice, Device, Machine, NetworkDevice, RecordedSource

_SECOND = 1_000_000_000


@attrs.define(eq=False)
class Setup:
    """What a scenario consists of while it runs."""

    engine: Engine
    machine: Machine
    guest: Guest
    blocks: list[tuple[BlockDevice, BlockDriver]] = attrs.field(factory=list)
    networks: list[tuple[NetworkDevice, DeviceDriver]] = attrs.field(factory=list)
    ticks: Ticks | None = None
    ipis: Ipis | None = None
    recorded_sources: list[RecordedSource] = attrs.field(factory=list)
    recorded_ipis: list[Ipis] = attrs.field(factory=list)
    recorded_ticks: Ticks | None = None

    def played(self) -> int:
        """How many interrupts of a recording have been raised."""
        count = sum(source.played for source in self.recorded_sources) + sum(one.sent for one in self.recorded_ipis)
        return count + (self.recorded_ticks.ticks if self.recorded_ticks is not None else 0)

    def counters(self) -> dict[str, Any]:
        """What guest and devices counted, by load; a load that the scenario has not is absent."""
        result: dict[str, Any] = {}
        if self.blocks:
            result["block"] = {
                device.name: {"requests": device.requests, "completions": sum(driver.completed), **_spurned(device)}
                for device, driver in self.blocks
            }
        if self.networks:
            result["network"] = {
                device.name: {"packets": device.packets, "received": sum(driver.completed), **_spurned(device)}
                for device, driver in self.networks
            }
        if self.ticks is not None:
            result["tick"] = {"ticks": self.ticks.ticks}
        if self.ipis is not None:
            result["ipi"] = {"sent": self.ipis.sent}
        if self.recorded_sources or self.recorded_ipis or self.recorded_ticks is not None:
            result["replay"] = {
                "device_interrupts": sum(source.played for source in self.recorded_sources),
                "ipis": sum(one.sent for one in self.recorded_ipis),
                "ticks": self.recorded_ticks.ticks if self.recorded_ticks is not None else 0,
            }
        return result

    def channels(self) -> dict[str, Channel[Any]]:
        """The channels of the machine, by name."""
        vm = self.machine.vm
        every = [vm.msis, vm.lines, *(bus.channel for bus in vm.buses.values())]
        return {channel.name: channel for channel in every}


def set_up(scenario: Scenario, plan: ReplayPlan | None, engine: Engine) -> Setup:
    """Build what ``scenario`` describes, ready to run."""
    machine = BOARDS[scenario.board](scenario.vcpus, scenario.memory_bytes)
    _price(scenario, machine, engine)
    loads: list[Load] = []
    guest = Guest(machine.driver(), scenario.vcpus, machine.guest_pages(), loads, machine.start_secondary)
    setup = Setup(engine, machine, guest)
    for block in scenario.block:
        loads.append(_add_block(setup, block))
    for network in scenario.network:
        loads.append(_add_network(setup, network))
    if scenario.tick.hz:
        setup.ticks = Ticks(scenario.tick.handler_ns, period_ns=max(1, _SECOND // scenario.tick.hz))
        loads.append(setup.ticks)
    if scenario.ipi.per_s:
        setup.ipis = Ipis(scenario.ipi.handler_ns)
        for sender in range(scenario.vcpus):
            interval = Interval(_SECOND / scenario.ipi.per_s, True, engine.rng(f"ipi.{sender}"))
            setup.ipis.at_random(sender, scenario.vcpus, interval)
        loads.append(setup.ipis)
    if scenario.guest.busy_percent:
        period_ns = scenario.guest.period_ns
        loads.append(Busy(period_ns * scenario.guest.busy_percent // 100, period_ns))
    if plan is not None:
        loads += _add_recording(setup, plan)
    machine.load(guest.program)
    return setup


def arm_faults(faults: tuple[Fault, ...], setup: Setup, start_ns: int) -> None:
    """Put every fault's beginning and end on the timeline, counted from ``start_ns``."""
    channels = setup.channels()
    for fault in faults:
        _arm(fault, channels[fault.channel], setup.engine, start_ns)


def check_faults(faults: tuple[Fault, ...], setup: Setup) -> None:
    """ConfigError when a fault names a channel that is not there."""
    names = sorted(setup.channels())
    problems = [
        f"fault[{number}].channel: must be one of {', '.join(names)}, not {fault.channel!r}"
        + did_you_mean(fault.channel, names)
        for number, fault in enumerate(faults)
        if fault.channel not in names
    ]
    if problems:
        raise ConfigError("scenario", problems)


def _spurned(device: Device) -> dict[str, int]:
    """Interrupts that the device could not raise at all: no controller ever saw them."""
    return {"without_vector": device.spurned} if device.spurned else {}


def _price(scenario: Scenario, machine: Machine, engine: Engine) -> None:
    """What the host costs, and how many vCPUs it runs at once."""
    costs = scenario.costs.for_vcpus()
    host = None
    if scenario.pcpus is not None and scenario.pcpus < scenario.vcpus:
        host = Host(engine, scenario.pcpus, slice_ns=scenario.slice_ns, switch_ns=costs.context_switch_ns)
    for vcpu in machine.vcpus:
        vcpu.costs = costs
        vcpu.share(host)
    machine.wire.latency_ns = scenario.costs.wire_ns


def _intervals(name: str, per_s: int, queues: int, arrivals: str, engine: Engine) -> list[Interval]:
    """The queues share the rate; each draws from a source of its own."""
    mean_ns = queues * _SECOND / per_s
    return [Interval(mean_ns, arrivals == "exponential", engine.rng(f"{name}.{queue}")) for queue in range(queues)]


def _add_block(setup: Setup, block: Block) -> Load:
    device = setup.machine.add_device(BlockDevice(block.name, block.queues, block.service_ns))
    intervals = _intervals(block.name, block.iops, block.queues, block.arrivals, setup.engine)
    driver = BlockDriver(block.name, device.devid, device.bar, block.handler_ns, intervals)
    setup.blocks.append((device, driver))
    return driver


def _add_network(setup: Setup, network: Network) -> Load:
    intervals = _intervals(network.name, network.rx_per_s, network.queues, network.arrivals, setup.engine)
    device = setup.machine.add_device(
        NetworkDevice(
            network.name, intervals, coalesce_packets=network.coalesce_packets, coalesce_ns=network.coalesce_ns
        )
    )
    driver = DeviceDriver(network.name, device.devid, device.bar, network.queues, network.handler_ns)
    setup.networks.append((device, driver))
    return driver


def _add_recording(setup: Setup, plan: ReplayPlan) -> list[Load]:
    loads: list[Load] = []
    for planned in plan.devices:
        source = RecordedSource(planned.name, len(planned.vcpus), planned.arrivals)
        setup.machine.add_device(source)
        driver = RecordedDevice(planned.name, source.devid, source.bar, planned.vcpus)
        source.work = driver.work
        setup.recorded_sources.append(source)
        loads.append(driver)
    for kind in plan.ipis:
        ipis = Ipis(0, kind=kind.kind, label=kind.label)
        for sender, sends in kind.sends.items():
            ipis.recorded(sender, sends)
        setup.recorded_ipis.append(ipis)
        loads.append(ipis)
    if plan.ticks:
        setup.recorded_ticks = Ticks(times=plan.ticks)
        loads.append(setup.recorded_ticks)
    return loads


def _arm(fault: Fault, channel: Channel[Any], engine: Engine, start_ns: int) -> None:
    def begin() -> None:
        how_often: Any = {"probability": fault.probability}
        match fault.kind:
            case "hold":
                channel.hold()
                ends.append(channel.release)
            case "drop":
                ends.append(channel.drop(fault.count, **how_often).lift)
            case "duplicate":
                ends.append(channel.duplicate(fault.count, **how_often).lift)
            case "delay":
                ends.append(channel.delay(fault.delay_ns, fault.count, **how_often).lift)
            case "fail":
                ends.append(channel.fail(getattr(errno, fault.errno), fault.count, **how_often).lift)

    def end() -> None:
        for undo in ends:
            undo()

    ends: list[Any] = []
    engine.timer(begin, name=f"fault on {fault.channel}", priority=Priority.CHANNEL).arm(start_ns + fault.from_ns)
    if fault.until_ns is not None:
        timer = engine.timer(end, name=f"end of fault on {fault.channel}", priority=Priority.CHANNEL)
        timer.arm(start_ns + fault.until_ns)
