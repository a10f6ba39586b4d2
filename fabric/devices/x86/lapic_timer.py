"""The timer of a local APIC: one-shot, periodic, and TSC-deadline.

It counts bus cycles, of 1 ns unless KVM_CAP_X86_APIC_BUS_CYCLES_NS says otherwise, divided by 1 to 128. In TSC-deadline
mode it fires when the guest's TSC reaches MSR_IA32_TSC_DEADLINE.

Sources: Intel SDM vol. 3, 11.5.4 (APIC timer).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric.devices.x86.lapic import Lapic

TMICT, TDCR, LVTT = 0x380, 0x3E0, 0x320
PERIODIC, TSC_DEADLINE = 1 << 17, 2 << 17
MODES = 3 << 17
MIN_PERIOD_NS = 200_000
"""A periodic timer of KVM's is not faster (module parameter min_timer_period_us)."""


class LapicTimer:
    """The timer; ``apic.vcpu`` tells the guest's TSC."""

    __slots__ = ("_timer", "apic", "divider", "expires", "mode", "mode_mask", "pending", "period", "tsc_deadline")

    def __init__(self, apic: Lapic) -> None:
        self.apic = apic
        self.mode = 0
        self.mode_mask = PERIODIC
        """Modes that the guest's CPUID offers."""
        self.divider = 1
        self.period = 0
        """ns; 0 while it is not set."""
        self.expires = 0
        self.pending = 0
        """Expirations that wait for the vCPU to run (on a host with ``timer_on_entry``)."""
        self.tsc_deadline = 0
        clock: Any = apic.bus.vm.clock
        self._timer = clock.timer(self._fire, name=f"local APIC timer of vCPU {apic.vcpu.vcpu_id}")

    @property
    def now(self) -> int:
        """Virtual time in ns."""
        return self.apic.bus.vm.clock.now

    @property
    def cycle_ns(self) -> int:
        """ns a bus cycle."""
        cycle: int = self.apic.bus.cycle_ns
        return cycle

    def offer_tsc_deadline(self, offered: bool) -> None:
        """Whether the guest's CPUID has TSC-deadline mode."""
        self.mode_mask = MODES if offered else PERIODIC

    def cancel(self) -> None:
        """Do not fire."""
        self._timer.cancel()
        self.pending = 0

    def configure(self) -> None:
        """LVTT or the divider register changed: a change of mode stops the timer."""
        mode = self.apic.word(LVTT) & self.mode_mask & MODES
        if mode != self.mode:
            if (mode == TSC_DEADLINE) != (self.mode == TSC_DEADLINE):
                self._timer.cancel()
                self.apic._store(TMICT, 0)
                self.period = 0
                self.tsc_deadline = 0
            self.mode = mode
        self._set_divider()

    def _set_divider(self) -> None:
        code = self.apic.word(TDCR)
        self.divider = 1 << ((code & 3 | code >> 1 & 4) + 1 & 7)

    def set_divider(self, value: int) -> None:
        """TDCR: what is left to count goes on at the new rate."""
        before = self.divider
        self.apic._store(TDCR, value & 0xB)
        self._set_divider()
        if before == self.divider or not self.period:
            return
        left = max(0, self.expires - self.now)
        self.period = self._length(self.apic.word(TMICT))
        if self._timer.deadline is not None:
            self._arm(left * self.divider // before)

    def _length(self, count: int) -> int:
        return count * self.cycle_ns * self.divider

    def start(self, count: int) -> None:
        """TMICT: count down from ``count``; 0 stops. Ignored in TSC-deadline mode."""
        if self.mode == TSC_DEADLINE:
            return
        self.cancel()
        self.apic._store(TMICT, count)
        self._begin(self._length(count))

    def _begin(self, left: int) -> None:
        self.period = self._length(self.apic.word(TMICT))
        if not self.period:
            return
        if self.mode == PERIODIC and self.period < MIN_PERIOD_NS:
            self.period = left = MIN_PERIOD_NS
        self._arm(left)

    def _arm(self, left: int) -> None:
        self.expires = self.now + left
        self._timer.arm(self.expires)

    @property
    def count(self) -> int:
        """TMCCT: what is left to count."""
        if not self.period or self.mode == TSC_DEADLINE:
            return 0
        left = max(0, self.expires - self.now) % self.period if self.expires - self.now != self.period else self.period
        return min(left // (self.cycle_ns * self.divider), 0xFFFF_FFFF)

    def restore(self, count: int) -> None:
        """The registers were set: go on from ``count``."""
        self.cancel()
        self.tsc_deadline = 0
        self.mode = self.apic.word(LVTT) & self.mode_mask & MODES
        self._set_divider()
        if self.mode == TSC_DEADLINE or not self.apic.word(TMICT):
            self.period = 0
            return
        whole = self._length(self.apic.word(TMICT))
        left = self._length(count)
        if not left and self.mode == PERIODIC:
            left = whole
        self._begin(min(left, whole))

    def set_tsc_deadline(self, value: int) -> None:
        """MSR_IA32_TSC_DEADLINE: fire when the guest's TSC gets there; 0 stops. Ignored in the other modes."""
        if self.mode != TSC_DEADLINE:
            return
        self.cancel()
        self.tsc_deadline = value
        if value:
            self._timer.arm(self.now + self.apic.vcpu.tsc.time_until(value))

    def _fire(self) -> None:
        if self.mode == PERIODIC:
            self._arm(self.period)
        self.tsc_deadline = 0
        if self.apic.bus.lazy_timer and not self.apic.vcpu.running:
            self.pending = 1
        else:
            self.apic.deliver_local(LVTT)

    def entering(self) -> None:
        """The vCPU enters the guest: an expiration that waited for that is delivered."""
        if self.pending:
            self.pending = 0
            self.apic.deliver_local(LVTT)
