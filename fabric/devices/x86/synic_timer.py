"""The four synthetic timers of a virtual processor (Hyper-V): HV_X64_MSR_STIMERn_CONFIG and _COUNT.

They count the partition's reference time, in units of 100 ns. A one-shot timer expires when that reaches COUNT, at once
when it has; a periodic one every COUNT units from when it was started. An expiration posts a message to the SINT of the
timer or, in direct mode, raises an APIC vector. A message whose slot is taken is posted again when the guest has ended
that of the slot; a periodic timer skips it.

As in KVM, what is due is seen to when the vCPU is in KVM_RUN (:meth:`~fabric.devices.x86.synic.Synic.run_due`): so a
VMM may restore the MSRs of a vCPU in any order. Every periodic timer is lazy there, whatever its Lazy bit: periods that
passed meanwhile are skipped.

Source: TLFS, Timers: Synthetic Timers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric.uapi.hyperv import (
    HV_ENABLE,
    HV_STIMER_AUTO_ENABLE,
    HV_STIMER_DIRECT,
    HV_STIMER_PERIODIC,
    HV_STIMER_SINT_SHIFT,
    HV_STIMER_VECTOR_SHIFT,
    HVMSG_TIMER_EXPIRED,
    HvMessage,
    HvTimerMessagePayload,
)

if TYPE_CHECKING:
    from fabric.devices.x86.synic import Synic


class SyntheticTimer:
    """One timer. ``config`` and ``count`` are the MSRs."""

    __slots__ = ("_timer", "config", "count", "expires", "index", "pending", "synic")

    def __init__(self, synic: Synic, index: int) -> None:
        self.synic = synic
        self.index = index
        self.config = 0
        self.count = 0
        self.expires = 0
        """In reference time; 0 while it is not started."""
        self.pending = False
        """It has expired, and its message or interrupt could not be delivered."""
        clock: Any = synic.vp.vcpu.vm.clock
        name = f"synthetic timer {index} of vCPU {synic.vp.vcpu.vcpu_id}"
        self._timer = clock.timer(self.mark_due, name=name)

    @property
    def sint(self) -> int:
        """The SINT that its messages go to; of no meaning in direct mode."""
        return self.config >> HV_STIMER_SINT_SHIFT & 0xF

    @property
    def waits_for_slot(self) -> bool:
        """A message of its waits for the slot of its SINT."""
        return self.pending and self.config & (HV_ENABLE | HV_STIMER_DIRECT) == HV_ENABLE

    def write_config(self, config: int) -> None:
        """HV_X64_MSR_STIMERn_CONFIG. SINT 0 is not for timers: it disables one that is enabled (in KVM only such)."""
        self._stop()
        if self.config & HV_ENABLE and not config & (HV_STIMER_DIRECT | 0xF << HV_STIMER_SINT_SHIFT):
            config &= ~HV_ENABLE
        self.config = config
        if config & HV_ENABLE:
            self.mark_due()

    def write_count(self, count: int, host: bool) -> None:
        """HV_X64_MSR_STIMERn_COUNT: a guest that writes 0 disables it, and with AutoEnable another enables it."""
        self._stop()
        self.count = count
        if not host and not count:
            self.config &= ~HV_ENABLE
        elif not host and self.config & HV_STIMER_AUTO_ENABLE:
            self.config |= HV_ENABLE
        if self.config & HV_ENABLE:
            self.mark_due()

    def mark_due(self) -> None:
        """It has expired, or is to be started; at once, if the vCPU is in KVM_RUN."""
        self.synic.due |= 1 << self.index
        self.synic.run_due()

    def run(self) -> None:
        """See to it: deliver what has expired, and start it (again)."""
        if not self.config & HV_ENABLE:
            return
        now = self.synic.vp.partition.reference_time
        if self.expires and now >= self.expires:
            self._expire(now)
        if not self.config & HV_ENABLE or not self.count:
            self._stop()
        elif not self.pending:
            self._start(now)

    def _start(self, now: int) -> None:
        if not self.config & HV_STIMER_PERIODIC:
            self.expires = self.count
            if now >= self.count:
                self.synic.due |= 1 << self.index
                return
        elif not self.expires:
            self.expires = now + self.count
        elif now >= self.expires:
            self.expires += (now - self.expires) // self.count * self.count + self.count
        vm = self.synic.vp.vcpu.vm
        self._timer.arm(vm.clock.now + self.synic.vp.partition.ns_until(self.expires))

    def _stop(self) -> None:
        self._timer.cancel()
        self.synic.due &= ~(1 << self.index)
        self.pending = False
        self.expires = 0

    def _expire(self, now: int) -> None:
        periodic = bool(self.config & HV_STIMER_PERIODIC)
        if self.config & HV_STIMER_DIRECT:
            done = self.synic.raise_vector(self.config >> HV_STIMER_VECTOR_SHIFT & 0xFF)
        else:
            payload = HvTimerMessagePayload(self.index, 0, self.expires, now).pack()
            message = HvMessage(HVMSG_TIMER_EXPIRED, len(payload), payload=payload)
            done = self.synic.post(self.sint, message, queued=not periodic)
        self.pending = not done
        if done and not periodic:
            self.config &= ~HV_ENABLE
