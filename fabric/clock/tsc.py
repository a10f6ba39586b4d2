"""The time stamp counter of an x86 host and of its guests, and the VM's clock (kvmclock).

Everything is integer arithmetic on virtual nanoseconds. A guest's TSC is the host's, scaled where the host can do that,
plus an offset: ``guest_tsc = scale(host_tsc) + offset`` modulo 2**64.

Sources: KVM's documents on timekeeping and on vCPU attributes (KVM_VCPU_TSC_OFFSET); Intel SDM vol. 3, 18.17.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

MASK64 = (1 << 64) - 1
SECOND = 1_000_000_000
TOLERANCE_PPM = 250
"""How far from the host's the frequency of a guest's TSC may be without being scaled."""


class Clock(Protocol):
    """Virtual time."""

    @property
    def now(self) -> int:
        """ns."""
        ...


def cycles(ns: int, khz: int) -> int:
    """TSC cycles in ``ns``."""
    return ns * khz // 1_000_000


def time_of(tsc_cycles: int, khz: int) -> int:
    """ns until so many cycles have passed, rounded up."""
    return -(-tsc_cycles * 1_000_000 // khz)


def tolerated(khz: int) -> range:
    """The frequencies that a host of ``khz`` has without scaling."""
    lowest, highest = (khz * (1_000_000 + ppm) // 1_000_000 for ppm in (-TOLERANCE_PPM, TOLERANCE_PPM))
    return range(lowest, highest + 1)


def time_scale(khz: int) -> tuple[int, int]:
    """``(shift, multiplier)`` by which a pvclock reader turns cycles into ns.

    ``ns = (cycles << shift) * multiplier >> 32`` (a negative shift is to the right); the multiplier has 32 bits.
    """
    shift, rate = 0, khz * 1000
    while rate > 2 * SECOND:
        rate >>= 1
        shift -= 1
    while rate <= SECOND:
        rate <<= 1
        shift += 1
    return shift, (SECOND << 32) // rate


@attrs.define(slots=True)
class HostTime:
    """What an x86 host's clocks show at virtual time 0: its TSC, and the real time in ns since 1970."""

    clock: Clock
    khz: int
    tsc_start: int = 0
    realtime_start: int = 0

    @property
    def tsc(self) -> int:
        """The host's TSC."""
        return self.tsc_start + cycles(self.clock.now, self.khz) & MASK64

    @property
    def realtime(self) -> int:
        """The host's real time."""
        return self.realtime_start + self.clock.now


class TscSync:
    """What the vCPUs of a VM share: the last write of a TSC, which decides whether the next one joins it.

    A write joins the last one's offset when it is what that TSC would be now, within a second; so do a vCPU's creation
    and a zero. That is how a VMM that restores vCPUs one after the other gets the same offset for all of them. A write
    that does not join begins a new generation, and the vCPUs count as synchronised when all belong to the last one.
    """

    __slots__ = (
        "began_at",
        "began_with",
        "changed",
        "generation",
        "host",
        "khz",
        "offset",
        "set_by_user",
        "tscs",
        "value",
        "written_at",
    )

    def __init__(self, host: HostTime) -> None:
        self.host = host
        self.khz = 0
        """Frequency of the vCPU of the last write; 0 before the first."""
        self.offset = 0
        self.value = 0
        self.written_at = 0
        self.set_by_user = False
        self.generation = 0
        self.began_at = self.began_with = 0
        """When the generation began, and what was written then."""
        self.tscs: list[GuestTsc] = []
        self.changed = False
        """Something was written since the VM's clock looked (:meth:`VmClock.update`)."""

    def joins(self, value: int, khz: int) -> bool:
        """Whether a write of ``value`` now takes the offset of the last one."""
        if khz != self.khz:
            return False
        if not value:
            return True
        second = khz * 1000
        expected = self.value + cycles(self.host.clock.now - self.written_at, khz) & MASK64
        return self.set_by_user and value < expected + second & MASK64 and value + second & MASK64 > expected

    def note(self, offset: int, value: int, khz: int, *, joins: bool) -> None:
        """A TSC was written."""
        self.offset, self.value, self.khz = offset, value, khz
        self.written_at = self.host.clock.now
        self.changed = True
        if not joins:
            self.generation += 1
            self.began_at, self.began_with = self.written_at, value

    @property
    def synchronised(self) -> bool:
        """All vCPUs, and there are some, have the TSC of the same generation."""
        return bool(self.tscs) and all(tsc.generation == self.generation for tsc in self.tscs)


class GuestTsc:
    """The TSC of a vCPU.

    Args:
        host: the host's clocks.
        sync: shared by the vCPUs of the VM.
        khz: its frequency. What is nearly the host's (:func:`tolerated`) is the host's; else it is scaled where the
            host can do that, and without that a faster one is caught up whenever the guest is entered.
        scaling: the host can scale.
    """

    __slots__ = ("_began_at", "_began_with", "adjust", "generation", "host", "khz", "offset", "scaling", "sync")

    def __init__(self, host: HostTime, sync: TscSync, khz: int, *, scaling: bool) -> None:
        self.host = host
        self.sync = sync
        self.khz = khz
        self.scaling = scaling
        self.offset = 0
        self.adjust = 0
        """MSR_IA32_TSC_ADJUST."""
        self.generation = 0
        sync.tscs.append(self)
        self.write(0, by_user=False)

    @property
    def scaled(self) -> int:
        """The host's TSC at the guest's rate."""
        return self.host.tsc * self.rate // self.host.khz

    @property
    def value(self) -> int:
        """What the guest reads."""
        return self.scaled + self.offset & MASK64

    @property
    def rate(self) -> int:
        """kHz at which it counts."""
        host = self.host.khz
        return self.khz if self.scaling and self.khz not in tolerated(host) else host

    def write(self, value: int, *, by_user: bool = True) -> None:
        """The VMM writes MSR_IA32_TSC (or creates the vCPU, with 0): joined to the VM's other vCPUs, or anew."""
        joins = self.sync.joins(value, self.khz)
        if by_user:
            self.sync.set_by_user = True
        self._write(self.sync.offset if joins else value - self.scaled & MASK64, value, joins)

    def set_offset(self, offset: int) -> None:
        """KVM_VCPU_TSC_OFFSET: joined to the last one that was written if it is the same."""
        sync = self.sync
        offset &= MASK64
        sync.set_by_user = True
        self._write(offset, self.scaled + offset & MASK64, self.khz == sync.khz and offset == sync.offset)

    def _write(self, offset: int, value: int, joins: bool) -> None:
        self.offset = offset
        self.sync.note(offset, value, self.khz, joins=joins)
        self.generation = self.sync.generation
        self._began_at, self._began_with = self.sync.began_at, self.sync.began_with

    def write_by_guest(self, value: int) -> None:
        """The guest writes MSR_IA32_TSC: TSC_ADJUST moves along."""
        moved = value - self.value
        self.offset = self.offset + moved & MASK64
        self.adjust = self.adjust + moved & MASK64

    def adjust_by_guest(self, adjust: int) -> None:
        """The guest writes MSR_IA32_TSC_ADJUST: the TSC moves along."""
        self.offset = self.offset + adjust - self.adjust & MASK64
        self.adjust = adjust & MASK64

    def catch_up(self) -> bool:
        """The guest is entered: a TSC faster than a host that cannot scale jumps to what it should be.

        Whether it has moved.
        """
        if self.scaling or self.khz <= tolerated(self.host.khz)[-1]:
            return False
        behind = self._began_with + cycles(self.host.clock.now - self._began_at, self.khz) - self.value
        if behind > 0:
            self.offset = self.offset + behind & MASK64
        return behind > 0

    def time_until(self, value: int) -> int:
        """ns until it shows ``value``; 0 when it has passed."""
        left = value - self.value
        return time_of(left, self.rate) if left > 0 else 0


class VmClock:
    """The clock of a VM: ns since it was created, unless set.

    It is stable (KVM's master clock) when all vCPUs' TSCs can be turned into it in the same way; that is looked at when
    a vCPU enters the guest or the clock is set, not when a TSC is written.
    """

    __slots__ = ("_offset", "host", "listeners", "old_msr", "stable", "sync", "wall_clock")

    def __init__(self, host: HostTime, sync: TscSync) -> None:
        self.host = host
        self.sync = sync
        self._offset = -host.clock.now
        self.stable = False
        self.old_msr = False
        """The boot processor's guest uses MSR_KVM_SYSTEM_TIME, not its successor, and is not told of stability."""
        self.wall_clock = 0
        """MSR_KVM_WALL_CLOCK, of which there is one for all vCPUs."""
        self.listeners: list[Callable[[], None]] = []
        """Called when what was noted of the clock holds no longer."""

    @property
    def now(self) -> int:
        """ns."""
        return self.host.clock.now + self._offset & MASK64

    def set(self, value: int) -> None:
        """From now on it shows ``value`` and what passes."""
        self._offset = value - self.host.clock.now
        self.update()

    def update(self) -> None:
        """Look whether it is stable."""
        self.sync.changed = False
        self.stable = self.sync.synchronised and not self.old_msr
        for listener in self.listeners:
            listener()
