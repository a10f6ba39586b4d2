"""Paravirtual clocks and notes in guest memory: kvmclock, wall clock, steal time, EOI, asynchronous page faults.

A guest names a place in its memory by an MSR; the host keeps it up to date. The clock's page is written when the vCPU
enters the guest and what is there holds no longer: so what a VMM does to a stopped VM shows when that VM runs, and not
before. A place where there is no memory is no error: the note is lost.

Sources: KVM's documents on MSRs and on timekeeping; struct pvclock_vcpu_time_info, struct kvm_steal_time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric.clock.tsc import SECOND, time_scale
from fabric.errors import KvmError
from fabric.uapi.kvm import PAGE_SIZE
from fabric.uapi.x86 import PvclockVcpuTimeInfo, PvclockWallClock

if TYPE_CHECKING:
    from fabric.clock.tsc import VmClock
    from fabric.memory import GuestMemory
    from fabric.vcpu.x86 import X86Vcpu

ENABLED = 1
PVCLOCK_TSC_STABLE, PVCLOCK_GUEST_STOPPED = 1, 2
PVCLOCK_FLAGS = 29
"""Offset in struct pvclock_vcpu_time_info."""
STEAL_RESERVED = 0x3E
STEAL_VERSION, STEAL_PREEMPTED, STEAL_SIZE = 8, 16, 64
"""Offsets in struct kvm_steal_time, whose first member is the stolen time in ns."""
ASYNC_PF_RESERVED = 0x30
ASYNC_PF_ON = 1 | 8
"""Enabled, and told of by an interrupt: nothing else is."""
VCPU_PREEMPTED = 1
PV_EOI_ALIGN = 4


def next_version(version: int) -> int:
    """The version of a note that was written again: even, as odd says that it is being written.

    An odd one, which nobody has written, is rounded up first. Nobody can read in between here.
    """
    return (version + 1 | 1) + 1 & 0xFFFF_FFFF


class Paravirt:
    """What a vCPU's guest asked its host to note."""

    __slots__ = (
        "async_pf",
        "async_pf_vector",
        "clock",
        "clock_page",
        "clock_stale",
        "enforced",
        "guest_stopped",
        "poll_control",
        "pv_eoi",
        "steal",
        "steal_seen",
        "system_time",
        "vcpu",
    )

    def __init__(self, vcpu: X86Vcpu, clock: VmClock) -> None:
        self.vcpu = vcpu
        self.clock = clock
        self.system_time = self.steal = self.pv_eoi = self.async_pf = self.async_pf_vector = 0
        """The MSRs, as written."""
        self.poll_control = 1
        self.enforced = False
        """KVM_CAP_ENFORCE_PV_FEATURE_CPUID: only what CPUID offers can be used."""
        self.guest_stopped = False
        """KVM_KVMCLOCK_CTRL: the next note says that the guest was stopped."""
        self.steal_seen = 0
        self.clock_page: int | None = None
        """Where the clock is noted."""
        self.clock_stale = True
        """The clock's page is to be written when the vCPU enters the guest."""
        clock.listeners.append(self.clock_changed)

    @property
    def wall_clock(self) -> int:
        """MSR_KVM_WALL_CLOCK."""
        return self.clock.wall_clock

    @property
    def memory(self) -> GuestMemory:
        """The VM's memory."""
        return self.vcpu.vm.memory

    def reset(self) -> None:
        """The vCPU got an INIT: its guest has asked for nothing any more."""
        self.system_time = self.steal = self.pv_eoi = self.async_pf = self.async_pf_vector = 0
        self.clock_page = None

    def clock_changed(self) -> None:
        """The clock's page holds no longer. A vCPU that is in the guest has to leave it, and is there again at once."""
        self.clock_stale = True
        if self.vcpu.running:
            self.note_clock()

    def set_system_time(self, value: int, host: bool, *, old_msr: bool) -> None:
        """MSR_KVM_SYSTEM_TIME and its successor: where the clock is noted."""
        self.system_time = value
        at = value & ~ENABLED
        if not value & ENABLED:
            self.clock_page = None
        elif at % PAGE_SIZE <= PAGE_SIZE - PvclockVcpuTimeInfo.SIZE:  # else it stays where it was, if it was
            self.clock_page = at
        if not self.vcpu.vcpu_id and not host and self.clock.old_msr != old_msr:
            self.clock.old_msr = old_msr
            self.clock.update()
        self.clock_changed()

    def set_wall_clock(self, value: int, _host: bool) -> None:
        """MSR_KVM_WALL_CLOCK: the real time at which the VM's clock was 0, written at once."""
        self.clock.wall_clock = value
        if not value:
            return
        boot = self.clock.host.realtime - self.clock.now
        try:
            version = next_version(self.memory.read_u32(value))
            seconds, ns = divmod(boot, SECOND)
            self.memory.write(value, PvclockWallClock(version, seconds & 0xFFFF_FFFF, ns).pack())
        except KvmError:
            return

    def entering(self) -> None:
        """The vCPU enters the guest: what changed is noted."""
        clock = self.clock
        if clock.sync.changed:
            clock.update()
        if self.vcpu.tsc.catch_up() or self.clock_stale or not clock.stable:
            self.note_clock()
        self.note_steal()

    def leaving(self) -> None:
        """The vCPU is back with its VMM: to the guest's other vCPUs it is not running."""
        if self.steal & ENABLED:
            try:
                self.memory.write_u8((self.steal & ~(STEAL_SIZE - 1)) + STEAL_PREEMPTED, VCPU_PREEMPTED)
            except KvmError:
                return

    def note_clock(self) -> None:
        """Write the clock's page: TSC and clock of this moment, and how to go on from there."""
        self.clock_stale = False
        at = self.clock_page
        if at is None:
            return
        tsc = self.vcpu.tsc
        shift, multiplier = time_scale(tsc.rate)
        flags = PVCLOCK_TSC_STABLE if self.clock.stable else 0
        if self.guest_stopped:
            flags |= PVCLOCK_GUEST_STOPPED
            self.guest_stopped = False
        try:
            version = next_version(self.memory.read_u32(at))
            flags |= self.memory.read_u8(at + PVCLOCK_FLAGS) & PVCLOCK_GUEST_STOPPED  # which the guest clears
            page = PvclockVcpuTimeInfo(version, 0, tsc.value, self.clock.now, multiplier, shift, flags)
            self.memory.write(at, page.pack())
        except KvmError:
            return

    def note_steal(self) -> None:
        """Add the time that the vCPU has waited for a physical CPU since the last note, or since it was made."""
        if not self.steal & ENABLED:
            return
        at = self.steal & ~(STEAL_SIZE - 1)
        try:
            stolen = self.memory.read_u64(at) + self.vcpu.stolen_ns - self.steal_seen
            self.memory.write_u64(at, stolen & (1 << 64) - 1)
            self.memory.write_u32(at + STEAL_VERSION, next_version(self.memory.read_u32(at + STEAL_VERSION)))
            self.memory.write_u8(at + STEAL_PREEMPTED, 0)
        except KvmError:
            return
        self.steal_seen = self.vcpu.stolen_ns
