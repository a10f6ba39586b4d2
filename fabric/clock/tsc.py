"""The time stamp counter of an x86 host and of its guests, and the VM's clock (kvmclock).

Everything is integer arithmetic on virtual nanoseconds. A guest's TSC is the host's, scaled where the host can do that,
plus an offset: ``guest_tsc = scale(host_tsc) + offset`` modulo 2**64.

Sources: KVM's documents on timekeeping and on vCPU attributes (KVM_VCPU_TSC_OFFSET); Intel SDM vol. 3, 18.17.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from fabric.devices.base import Clock

MASK64 = (1 << 64) - 1
SECOND = 1_000_000_000


def cycles(ns: int, khz: int) -> int:
    """TSC cycles in ``ns``."""
    return ns * khz // 1_000_000


def time_of(tsc_cycles: int, khz: int) -> int:
    """ns until so many cycles have passed, rounded up."""
    return -(-tsc_cycles * 1_000_000 // khz)


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
    and a zero. That is how a VMM that restores vCPUs one after the other gets the same offset for all of them.
    """

    __slots__ = ("host", "khz", "offset", "set_by_user", "value", "written_at")

    def __init__(self, host: HostTime) -> None:
        self.host = host
        self.khz = 0
        """Frequency of the vCPU of the last write; 0 before the first."""
        self.offset = 0
        self.value = 0
        self.written_at = 0
        self.set_by_user = False

    def joins(self, value: int, khz: int) -> bool:
        """Whether a write of ``value`` now takes the offset of the last one."""
        if khz != self.khz:
            return False
        if not value:
            return True
        expected = self.value + cycles(self.host.clock.now - self.written_at, khz)
        return self.set_by_user and abs(value - expected) < khz * 1000

    def note(self, offset: int, value: int, khz: int) -> None:
        """A TSC was written."""
        self.offset, self.value, self.khz = offset, value, khz
        self.written_at = self.host.clock.now


class GuestTsc:
    """The TSC of a vCPU.

    Args:
        host: the host's clocks.
        sync: shared by the vCPUs of the VM.
        khz: its frequency; scaled when it is not the host's and the host can do that.
        scaling: the host can scale.
    """

    __slots__ = ("adjust", "host", "khz", "offset", "scaling", "sync")

    def __init__(self, host: HostTime, sync: TscSync, khz: int, *, scaling: bool) -> None:
        self.host = host
        self.sync = sync
        self.khz = khz
        self.scaling = scaling
        self.offset = 0
        self.adjust = 0
        """MSR_IA32_TSC_ADJUST."""
        self.write(0, by_user=False)

    @property
    def scaled(self) -> int:
        """The host's TSC at the guest's rate."""
        tsc = self.host.tsc
        return tsc * self.khz // self.host.khz if self.scaling and self.khz != self.host.khz else tsc

    @property
    def value(self) -> int:
        """What the guest reads."""
        return self.scaled + self.offset & MASK64

    @property
    def rate(self) -> int:
        """kHz at which it counts."""
        return self.khz if self.scaling else self.host.khz

    def write(self, value: int, *, by_user: bool = True) -> None:
        """The VMM writes MSR_IA32_TSC (or creates the vCPU, with 0): joined to the VM's other vCPUs, or anew."""
        joins = self.sync.joins(value, self.khz)
        if by_user:
            self.sync.set_by_user = True
        self.offset = self.sync.offset if joins else value - self.scaled & MASK64
        self.sync.note(self.offset, value, self.khz)

    def set_offset(self, offset: int) -> None:
        """KVM_VCPU_TSC_OFFSET."""
        self.sync.set_by_user = True
        self.offset = offset & MASK64
        self.sync.note(self.offset, self.value, self.khz)

    def write_by_guest(self, value: int) -> None:
        """The guest writes MSR_IA32_TSC: TSC_ADJUST moves along."""
        moved = value - self.value
        self.offset = self.offset + moved & MASK64
        self.adjust = self.adjust + moved & MASK64

    def adjust_by_guest(self, adjust: int) -> None:
        """The guest writes MSR_IA32_TSC_ADJUST: the TSC moves along."""
        self.offset = self.offset + adjust - self.adjust & MASK64
        self.adjust = adjust & MASK64

    def time_until(self, value: int) -> int:
        """ns until it shows ``value``; 0 when it has passed."""
        left = value - self.value
        return time_of(left, self.rate) if left > 0 else 0


class VmClock:
    """The clock of a VM: ns since it was created, unless set."""

    __slots__ = ("_offset", "host", "stable")

    def __init__(self, host: HostTime) -> None:
        self.host = host
        self._offset = -host.clock.now
        self.stable = False
        """All vCPUs' TSCs can be turned into it in the same way (KVM's master clock); from the first run or set on."""

    @property
    def now(self) -> int:
        """ns."""
        return self.host.clock.now + self._offset & MASK64

    def set(self, value: int) -> None:
        """From now on it shows ``value`` and what passes."""
        self._offset = value - self.host.clock.now
        self.stable = True
