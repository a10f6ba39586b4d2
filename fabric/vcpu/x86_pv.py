"""Paravirtual clocks and notes in guest memory: kvmclock, wall clock, steal time, EOI, asynchronous page faults.

A guest names a place in its memory by an MSR; the host keeps it up to date whenever the vCPU enters the guest. A place
where there is no memory is no error: the note is lost.

Sources: KVM's documents on MSRs and on timekeeping; struct pvclock_vcpu_time_info, struct kvm_steal_time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric.clock.tsc import time_scale
from fabric.errors import KvmError
from fabric.uapi.x86 import PvclockVcpuTimeInfo, PvclockWallClock

if TYPE_CHECKING:
    from fabric.clock.tsc import VmClock
    from fabric.memory import GuestMemory
    from fabric.vcpu.x86 import X86Vcpu

ENABLED = 1
PVCLOCK_TSC_STABLE, PVCLOCK_GUEST_STOPPED = 1, 2
STEAL_RESERVED = 0x3E
STEAL_VERSION, STEAL_PREEMPTED, STEAL_SIZE = 8, 16, 64
"""Offsets in struct kvm_steal_time, whose first member is the stolen time in ns."""
ASYNC_PF_RESERVED = 0x30
PV_EOI_ALIGN = 4


class Paravirt:
    """What a vCPU's guest asked its host to note."""

    __slots__ = (
        "async_pf",
        "async_pf_vector",
        "clock",
        "enforced",
        "guest_stopped",
        "poll_control",
        "pv_eoi",
        "steal",
        "steal_seen",
        "system_time",
        "vcpu",
        "wall_clock",
    )

    def __init__(self, vcpu: X86Vcpu, clock: VmClock) -> None:
        self.vcpu = vcpu
        self.clock = clock
        self.system_time = self.wall_clock = self.steal = self.pv_eoi = self.async_pf = self.async_pf_vector = 0
        """The MSRs, as written."""
        self.poll_control = 1
        self.enforced = False
        """KVM_CAP_ENFORCE_PV_FEATURE_CPUID: only what CPUID offers can be used."""
        self.guest_stopped = False
        """KVM_KVMCLOCK_CTRL: the next note says that the guest was stopped."""
        self.steal_seen = 0

    @property
    def memory(self) -> GuestMemory:
        """The VM's memory."""
        return self.vcpu.vm.memory

    def set_system_time(self, value: int) -> None:
        """MSR_KVM_SYSTEM_TIME: where the clock is noted."""
        self.system_time = value
        self.guest_stopped = False
        self.note_clock()

    def set_wall_clock(self, value: int) -> None:
        """MSR_KVM_WALL_CLOCK: the real time at which the VM's clock was 0, written at once."""
        self.wall_clock = value
        if not value:
            return
        boot = self.clock.host.realtime - self.clock.now
        try:
            version = (self.memory.read_u32(value) + 1 | 1) & 0xFFFF_FFFF
            seconds, ns = divmod(boot, 1_000_000_000)
            self.memory.write(value, PvclockWallClock(version + 1 & 0xFFFF_FFFF, seconds & 0xFFFF_FFFF, ns).pack())
        except KvmError:
            return

    def set_steal(self, value: int) -> None:
        """MSR_KVM_STEAL_TIME."""
        self.steal = value
        self.steal_seen = self.vcpu.stolen_ns

    def entering(self) -> None:
        """The vCPU enters the guest: what changed is noted."""
        self.clock.stable = True
        self.note_clock()
        self._note_steal()

    def note_clock(self) -> None:
        """Write the clock's page: TSC and clock of this moment, and how to go on from there."""
        if not self.system_time & ENABLED:
            return
        at = self.system_time & ~ENABLED
        tsc = self.vcpu.tsc
        shift, multiplier = time_scale(tsc.rate)
        flags = PVCLOCK_TSC_STABLE if self.clock.stable else 0
        if self.guest_stopped:
            flags |= PVCLOCK_GUEST_STOPPED
        try:
            # Odd while it is written, and even again: nobody can read in between here.
            version = self.memory.read_u32(at) + 2 & ~1 & 0xFFFF_FFFF
            page = PvclockVcpuTimeInfo(version, 0, tsc.value, self.clock.now, multiplier, shift, flags)
            self.memory.write(at, page.pack())
        except KvmError:
            return
        self.guest_stopped = False

    def _note_steal(self) -> None:
        if not self.steal & ENABLED:
            return
        at = self.steal & ~(STEAL_SIZE - 1)
        try:
            stolen = self.memory.read_u64(at) + self.vcpu.stolen_ns - self.steal_seen
            self.memory.write_u64(at, stolen & (1 << 64) - 1)
            self.memory.write_u32(at + STEAL_VERSION, self.memory.read_u32(at + STEAL_VERSION) + 2 & ~1)
            self.memory.write_u8(at + STEAL_PREEMPTED, 0)
        except KvmError:
            return
        self.steal_seen = self.vcpu.stolen_ns
