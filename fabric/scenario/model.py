"""A scenario: everything that, with a seed, determines a run.

The classes here are the schema of a scenario file: a class is a table, an attribute a key, ``[[block]]``,
``[[network]]`` and ``[[fault]]`` are arrays of tables. Each attribute carries the rule its value must obey:
construction checks one after the other, :mod:`fabric.scenario.load` checks a file as a whole. Units are in the
key: ``_ns``, ``_bytes``, ``hz``, ``_per_s``.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from fractions import Fraction
from typing import Any

import attrs

from fabric.vcpu.host import Costs

Rule = Callable[[Any], Any]
"""Turns the value in a file into the value of the attribute; ValueError says what it must be."""

ARRIVALS = ("exponential", "constant")
FAULTS = ("hold", "drop", "duplicate", "delay", "fail")
SPREADS = ("turn", "source")

_NUMBER = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?(e[-+]?[0-9]{1,2})?|[0-9]{1,18}/[0-9]{1,18}")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about a word nobody knows: the nearest known one, or nothing."""
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _key(default: Any, rule: Rule) -> Any:
    """An attribute with a rule; ``None`` as default stands for a key that may be absent."""

    def check(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is not None or default is not None:
            try:
                rule(value)
            except ValueError as error:
                raise ValueError(f"{attribute.name} {error}") from None

    return attrs.field(default=default, validator=check, metadata={"rule": rule})


def _integer(default: int | None, least: int = 0, most: int | None = None) -> Any:
    def rule(value: Any) -> int:
        wanted = f"an integer from {least} to {most}" if most is not None else f"an integer >= {least}"
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"must be {wanted}, not {value!r}")
        if value < least or (most is not None and value > most):
            raise ValueError(f"must be {wanted}, not {value}")
        return value

    return _key(default, rule)


def _choice(default: str, names: tuple[str, ...]) -> Any:
    def rule(value: Any) -> str:
        if value in names:
            return str(value)
        hint = did_you_mean(value, names) if isinstance(value, str) else ""
        raise ValueError(f"must be one of {', '.join(names)}, not {value!r}{hint}")

    return _key(default, rule)


def _name(default: str) -> Any:
    def rule(value: Any) -> str:
        if isinstance(value, str) and _NAME.fullmatch(value):
            return value
        raise ValueError(f"must be a name of letters, digits, '.', '_' and '-', not {value!r}")

    return _key(default, rule)


def _text(value: Any) -> str:
    if isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value):
        return value
    raise ValueError(f"must be a string, not {value!r}")  # nor what stands for bytes that are no text


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"must be true or false, not {value!r}")


def _probability(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise ValueError(f"must be a number > 0 and <= 1, not {value!r}")


def _errno(value: Any) -> str:
    names = sorted(errno.errorcode.values())
    if isinstance(value, str) and value in names:
        return value
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    raise ValueError(f"must be the name of an errno such as EAGAIN, not {value!r}{hint}")


def _factor(value: Any) -> str:
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool) and _NUMBER.fullmatch(str(value)):
            factor = Fraction(str(value))  # 0.1 is the decimal that was written
            if factor > 0:
                return str(factor)
    except ZeroDivisionError:
        pass
    raise ValueError(f"must be a positive number or a fraction such as '1/2', not {value!r}")


@attrs.frozen
class CostTable:
    """``[costs]``: what the host's part of virtualization takes.

    Defaults, unless said otherwise, are those of one arm64 server (Kunpeng 920, KVM with a GICv3) as measured by
    ``micro-bench`` of kvm-unit-tests and published on the kvm mailing list on 1 November 2023: hvc 408 ns,
    mmio_read_user 2306 ns, mmio_read_vgic 638 ns, eoi 16 ns, ipi 1697 ns. On the other machine of that message
    (Phytium S2500) all but the eoi cost three times as much: costs belong to a host, so set them for yours.
    """

    exit_ns: int = _integer(638)
    """An exit that the kernel handles, and the entry after it: mmio_read_vgic."""
    userspace_exit_ns: int = _integer(1668)
    """What an exit to the VMM takes on top: mmio_read_user less mmio_read_vgic."""
    injection_ns: int = _integer(1059)
    """From a deliverable interrupt to the handler on a running vCPU: ipi less the sender's exit."""
    eoi_ns: int = _integer(16)
    """Ending an interrupt: eoi (list registers, no exit)."""
    wakeup_ns: int = _integer(3000)
    """Waking a halted vCPU: "a few micro-seconds" for a trip through the scheduler (kernel document
    virt/kvm/halt-polling.rst); the order of magnitude only."""
    context_switch_ns: int = _integer(3000)
    """Changing the vCPU of a physical CPU: one such trip."""
    wire_ns: int = _integer(0)
    """From a device's raise to the interrupt controller. 0: an eventfd signals in the writer's context."""

    def for_vcpus(self) -> Costs:
        """The part that vCPUs spend."""
        return Costs(**{field.name: getattr(self, field.name) for field in attrs.fields(Costs)})


@attrs.frozen
class Block:
    """``[[block]]``: a block device. The guest submits requests by doorbell; each completion is an MSI."""

    name: str = _name("disk")
    """In reports; queue q is NAME.q there."""
    queues: int = _integer(1, 1, 2048)
    """Queue q completes to vCPU ``q % vcpus``."""
    iops: int = _integer(10_000, 1, 100_000_000)
    """Requests a second, of all queues together."""
    arrivals: str = _choice("exponential", ARRIVALS)
    """The interval between two requests of a queue."""
    service_ns: int = _integer(80_000)
    """Time the device takes for a request; a queue works on all its requests at once. Assumed: NVMe flash."""
    handler_ns: int = _integer(1300)
    """Time in the interrupt handler: the mean of virtio-blk in examples/virtio-blk-2cpu.txt.gz."""


@attrs.frozen
class Network:
    """``[[network]]``: a network device; packets received are announced by MSI, possibly several at once."""

    name: str = _name("net")
    """In reports; queue q is NAME.q there."""
    queues: int = _integer(1, 1, 2048)
    """Queue q interrupts vCPU ``q % vcpus``."""
    rx_per_s: int = _integer(50_000, 1, 100_000_000)
    """Packets received a second, by all queues together."""
    arrivals: str = _choice("exponential", ARRIVALS)
    """The interval between two packets of a queue."""
    coalesce_packets: int = _integer(1, 1, 65_536)
    """Packets an interrupt waits for, as in ``ethtool -C rx-frames``; 1: none."""
    coalesce_ns: int = _integer(0)
    """How long it waits at most, as in ``rx-usecs``; 0: until the packets are there."""
    handler_ns: int = _integer(6900)
    """Time in the interrupt handler: the mean of virtio-net receive in examples/virtio-blk-2cpu.txt.gz."""

    def __attrs_post_init__(self) -> None:
        if self.coalesce_packets > 1 and not self.coalesce_ns:
            raise ValueError("coalesce_ns must be > 0 when coalesce_packets > 1, or the last packets stay unannounced")


@attrs.frozen
class Tick:
    """``[tick]``: the guest's periodic timer interrupt on every vCPU, by the architecture's timer."""

    hz: int = _integer(0, 0, 1_000_000)
    """Ticks a second; 0: none. Linux has 100, 250 or 1000."""
    handler_ns: int = _integer(2000)
    """Time in the interrupt handler. Assumed."""


@attrs.frozen
class IpiLoad:
    """``[ipi]``: interrupts the vCPUs send each other, to another one drawn at random."""

    per_s: int = _integer(0, 0, 10_000_000)
    """Sent by each vCPU a second, at exponential intervals; 0: none."""
    handler_ns: int = _integer(1000)
    """Time in the interrupt handler. Assumed."""


@attrs.frozen
class Replay:
    """``[replay]``: the interrupts of a recorded trace, at their own times."""

    trace: str = _key("", _text)
    """The file, relative to the scenario; empty: none."""
    scale: str = _key("1", _factor)
    """All times are multiplied by this; "1/2" is twice as fast."""
    spread: str = _choice("turn", SPREADS)
    """The interrupts of a source take turns on the vCPUs of their CPU, or each source keeps to one vCPU."""
    handler_ns: int = _integer(1300)
    """Time in the handler where the trace does not tell."""


@attrs.frozen
class Guest:
    """``[guest]``: what the vCPUs do when no interrupt is to be handled."""

    busy_percent: int = _integer(0, 0, 100)
    """Share of its time a vCPU computes; 0: it waits for interrupts."""
    period_ns: int = _integer(1_000_000, 1000)
    """It computes ``busy_percent`` of each period and waits for the rest."""


@attrs.frozen
class Fault:
    """``[[fault]]``: something that goes wrong on a channel for a while."""

    channel: str = _key("", _text)
    """The channel's name, as the run directory lists them."""
    kind: str = _choice("drop", FAULTS)
    """What becomes of an event: kept back until the fault ends, lost, delivered twice, delivered later, refused."""
    from_ns: int = _integer(0)
    """When it begins."""
    until_ns: int | None = _integer(None, 1)
    """When it ends (what ``hold`` kept is released then); absent: with the run."""
    count: int | None = _integer(None, 1)
    """How many events it hits at most; absent: all. Not for ``hold``."""
    probability: float = _key(1.0, _probability)
    """With which each event is hit, drawn from the seed. Not for ``hold``."""
    delay_ns: int = _integer(0)
    """For ``delay``: how much later events arrive."""
    errno: str = _key("EAGAIN", _errno)
    """For ``fail``: what sending answers."""

    def __attrs_post_init__(self) -> None:
        if not self.channel:
            raise ValueError("channel must name the channel that fails")
        if self.until_ns is not None and self.until_ns <= self.from_ns:
            raise ValueError(f"until_ns must be > from_ns ({self.from_ns}), not {self.until_ns}")
        if self.kind == "delay" and not self.delay_ns:
            raise ValueError("delay_ns must be > 0 for a fault of kind delay")
        if self.kind == "hold" and (self.count is not None or self.probability != 1):
            raise ValueError("a hold stops every event: count and probability are not for it")


@attrs.frozen
class Tracing:
    """``[trace]``: what a run records besides its statistics."""

    events: bool = _key(True, _flag)
    """Write an event record for each step of each interrupt into the run directory."""
    last: int = _integer(200, 1, 1_000_000)
    """Events kept for the report of a failed run."""


@attrs.frozen
class Scenario:
    """The whole of it. ``Scenario()`` is a machine with one idle vCPU."""

    name: str = _name("scenario")
    """In reports and traces."""
    board: str = _key("arm64-gicv3", _text)
    """The machine; ``fabric boards`` lists them."""
    vcpus: int = _integer(1, 1, 1024)
    """CPUs of the guest; most boards take fewer than 1024."""
    pcpus: int | None = _integer(None, 1, 4096)
    """Physical CPUs the vCPUs share; absent: one for each."""
    slice_ns: int = _integer(4_000_000, 1000)
    """How long a vCPU computes before another that waits for its physical CPU gets it. Assumed, as the
    host's scheduler decides it by load: a few milliseconds on Linux."""
    seed: int = _integer(0, 0, 2**64 - 1)
    """Of everything random in the run."""
    explore_ties: bool | None = _key(None, _flag)
    """Draw the order of simultaneous events from the seed instead of first come, first served; absent: with
    every seed but 0."""
    duration_ns: int = _integer(1_000_000_000)
    """Virtual time of the run; 0, with a replay only: until the trace has been played."""
    memory_bytes: int = _integer(1 << 30, 1 << 24, 1 << 46)
    """Guest memory; only what is touched costs anything."""
    costs: CostTable = attrs.field(factory=CostTable, metadata={"table": CostTable})
    block: tuple[Block, ...] = attrs.field(default=(), metadata={"tables": Block})
    network: tuple[Network, ...] = attrs.field(default=(), metadata={"tables": Network})
    tick: Tick = attrs.field(factory=Tick, metadata={"table": Tick})
    ipi: IpiLoad = attrs.field(factory=IpiLoad, metadata={"table": IpiLoad})
    replay: Replay = attrs.field(factory=Replay, metadata={"table": Replay})
    guest: Guest = attrs.field(factory=Guest, metadata={"table": Guest})
    trace: Tracing = attrs.field(factory=Tracing, metadata={"table": Tracing})
    fault: tuple[Fault, ...] = attrs.field(default=(), metadata={"tables": Fault})

    def __attrs_post_init__(self) -> None:
        if self.memory_bytes % 4096:
            raise ValueError(f"memory_bytes must be a multiple of 4096, not {self.memory_bytes}")
        if not self.duration_ns and not self.replay.trace:
            raise ValueError("duration_ns must be > 0 unless a trace is replayed")
        names = [device.name for device in self.block] + [device.name for device in self.network]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"every device needs a name of its own, but there are two of {', '.join(twice)}")
        if self.ipi.per_s and self.vcpus == 1:
            raise ValueError("ipi.per_s must be 0 with one vCPU, which has nobody to interrupt")
