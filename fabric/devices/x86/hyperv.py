"""What an x86 VM has of Hyper-V besides interrupts: a *partition* for the VM, a *virtual processor* for each vCPU.

The reference time counts units of 100 ns from when the VM was created: it is the VM's clock (KVM_SET_CLOCK sets it).
A guest may compute it from its TSC with the scale and offset of the reference TSC page; from when that page is written,
the partition computes it in the same way, so that the two never differ. The page is written when a vCPU enters the
guest, and again when TSC or clock were set; without a stable clock its sequence stays 0, which sends the guest to
HV_X64_MSR_TIME_REF_COUNT.

Sources: TLFS, Feature and Interface Discovery; Timers: Reference Counter, Partition Reference Time Enlightenment;
Virtual Processors: VP Index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from fabric.clock.tsc import MASK64, time_of, time_scale
from fabric.devices.x86.synic import Refused, Synic
from fabric.errors import KvmError
from fabric.uapi.hyperv import (
    HV_ENABLE,
    HYPERV_CPUID_ENLIGHTENMENT_INFO,
    HYPERV_CPUID_FEATURES,
    HYPERV_CPUID_INTERFACE,
    HYPERV_CPUID_SIGNATURE_EAX,
    HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES,
    HvReferenceTscPage,
)
from fabric.uapi.kvm import KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, PAGE_SIZE, KvmRunSystemEvent
from fabric.uapi.x86 import HypervHcall, HypervSyndbg, HypervSynic

if TYPE_CHECKING:
    from fabric.clock.tsc import VmClock
    from fabric.devices.base import VmServices
    from fabric.uapi.x86 import KvmCpuidEntry2

    Request: TypeAlias = HypervSynic | HypervHcall | HypervSyndbg | KvmRunSystemEvent

UNIT_NS = 100
"""Of the reference time."""
_PAGE = PAGE_SIZE - 1
VMCALL_PAGE = bytes.fromhex("0f01d9c3")
"""What the hypercall page begins with: VMMCALL (the vendor of the CPUs is AMD), RET."""

# The reference TSC page.
UNSET, CHANGED_BY_GUEST, CHANGED, SET, BROKEN = "unset", "changed by guest", "changed", "set", "broken"


class ReferenceTsc:
    """The reference TSC page of a partition: the MSR, and the numbers in the page."""

    __slots__ = ("_basis", "emulation", "msr", "offset", "partition", "scale", "status")

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.msr = 0
        self.status = UNSET
        """Whether the page has the numbers, is to be written, or cannot be."""
        self.scale = self.offset = 0
        """``time = (tsc * scale >> 64) + offset``."""
        self.emulation = 0
        """HV_X64_MSR_TSC_EMULATION_CONTROL: while it is set, the guest counts on a page that stays as it is."""
        self._basis: tuple[int, int, int] | None = None

    def write(self, value: int, host: bool) -> None:
        """HV_X64_MSR_REFERENCE_TSC. A guest enters again when it has written it."""
        self.msr = value
        self.status = UNSET if not value & HV_ENABLE else CHANGED if host else CHANGED_BY_GUEST
        if not host:
            self.update()

    def in_force(self) -> bool:
        """Whether the reference time is what the page says. It is not any more when TSC or clock were set."""
        if self.status == SET and not self.emulation and self._basis != self._now():
            self.status = CHANGED
        return self.status == SET

    def _now(self) -> tuple[int, int, int]:
        """What the numbers follow from: how the clock and the TSC of the first vCPU relate to the host's."""
        clock, tsc = self.partition.clock, self.partition.tsc
        return clock.now - clock.host.clock.now, tsc.offset, tsc.rate

    def update(self) -> None:
        """A vCPU enters the guest: write the page if it is due."""
        if not self.in_force() and self.status in (CHANGED, CHANGED_BY_GUEST):
            try:
                done = self._write_page()
            except KvmError:
                done = False
            self.status = SET if done else BROKEN  # until the guest names another page

    def _write_page(self) -> bool:
        """Whether the clock follows from the TSC. KvmError where there is no memory."""
        memory, clock, tsc = self.partition.vm.memory, self.partition.clock, self.partition.tsc
        at = self.msr & ~_PAGE
        sequence = memory.read_u32(at)
        if sequence and self.emulation and self.status != CHANGED_BY_GUEST:
            page = HvReferenceTscPage.unpack(memory.read(at, HvReferenceTscPage.SIZE))
            self.scale, self.offset = page.scale, page.offset
            self._basis = self._now()
            return True
        memory.write_u32(at, 0)
        shift, multiplier = time_scale(tsc.rate)
        scale = (multiplier << 32 + shift) // UNIT_NS
        if not clock.stable or scale > MASK64:
            return False
        self.scale = scale
        self.offset = _signed(clock.now // UNIT_NS - (tsc.value * scale >> 64))
        self._basis = self._now()
        sequence = (sequence + 1) & 0xFFFF_FFFF
        if sequence in (0, 0xFFFF_FFFF):
            sequence = 1  # both mean that the page is not to be used
        memory.write(at, HvReferenceTscPage(sequence, 0, self.scale, self.offset).pack())
        return True


class Partition:
    """What the virtual processors of a VM share.

    Args:
        vm: its VM.
        clock: the VM's clock.
    """

    __slots__ = (
        "clock",
        "connections",
        "crash",
        "crash_control",
        "guest_os_id",
        "hypercall",
        "invariant_tsc",
        "reenlightenment",
        "reference_tsc",
        "syndbg",
        "syndbg_options",
        "tsc_emulation_status",
        "vm",
        "vps",
    )

    def __init__(self, vm: VmServices, clock: VmClock) -> None:
        self.vm = vm
        self.clock = clock
        self.vps: list[VirtualProcessor] = []
        """In vCPU order."""
        self.connections: dict[int, Any] = {}
        """By connection id: what is called to signal its event without leaving the kernel (KVM_HYPERV_EVENTFD)."""
        self.reference_tsc = ReferenceTsc(self)
        self.guest_os_id = self.hypercall = 0
        self.crash = [0] * 5
        self.crash_control = 0
        self.reenlightenment = self.tsc_emulation_status = self.invariant_tsc = 0
        self.syndbg = HypervSyndbg()
        self.syndbg_options = 0

    def find(self, vp_index: int) -> VirtualProcessor | None:
        """The virtual processor with that index."""
        vps = self.vps
        if vp_index < len(vps) and vps[vp_index].index == vp_index:
            return vps[vp_index]
        return next((vp for vp in vps if vp.index == vp_index), None)

    # -- time

    @property
    def tsc(self) -> Any:
        """The TSC that reference time is computed from: the first vCPU's."""
        return self.vps[0].vcpu.tsc

    @property
    def reference_time(self) -> int:
        """HV_X64_MSR_TIME_REF_COUNT."""
        page = self.reference_tsc
        if page.in_force():
            tsc: int = self.tsc.value
            return (tsc * page.scale >> 64) + page.offset & MASK64
        return self.clock.now // UNIT_NS

    def ns_until(self, time: int) -> int:
        """ns until the reference time is ``time`` (or nearly so: who waits looks again)."""
        page = self.reference_tsc
        if page.in_force():
            tsc = self.tsc
            left = -(-((time - page.offset) << 64) // page.scale) - tsc.value
            return max(1, time_of(left, tsc.rate))
        return max(1, time * UNIT_NS - self.clock.now)

    # -- hypercalls

    def write_guest_os_id(self, value: int) -> None:
        """HV_X64_MSR_GUEST_OS_ID: 0 takes the hypercall page away."""
        self.guest_os_id = value
        if not value:
            self.hypercall &= ~HV_ENABLE

    def write_hypercall(self, value: int) -> None:
        """HV_X64_MSR_HYPERCALL, which a guest without an id cannot set. Refused for a page where there is no memory."""
        if not self.guest_os_id:
            return
        if value & HV_ENABLE:
            try:
                self.vm.memory.write(value & ~_PAGE, VMCALL_PAGE)
            except KvmError as error:
                raise Refused(f"there is no memory for a hypercall page at {value & ~_PAGE:#x}") from error
        self.hypercall = value


class VirtualProcessor:
    """A vCPU as Hyper-V has it; ``vcpu.hyperv``."""

    __slots__ = (
        "_cpuid",
        "_offered",
        "assist_page",
        "enforced",
        "index",
        "partition",
        "request",
        "runtime",
        "synic",
        "vcpu",
    )

    def __init__(self, partition: Partition, vcpu: Any) -> None:
        self.partition = partition
        self.vcpu = vcpu
        self.index: int = vcpu.index
        """HV_X64_MSR_VP_INDEX."""
        self.assist_page = 0
        self.runtime = 0
        """HV_X64_MSR_VP_RUNTIME: what the VMM said, as the time that a vCPU runs is not measured."""
        self.enforced = False
        """KVM_CAP_HYPERV_ENFORCE_CPUID: the guest can use only what its CPUID offers."""
        self.request: Request | None = None
        """What the guest is to leave KVM_RUN with: set by what it did last."""
        self.synic = Synic(self)
        self._cpuid: list[KvmCpuidEntry2] | None = None
        self._offered: dict[int, KvmCpuidEntry2] = {}
        partition.vps.append(self)

    def entering(self) -> None:
        """The vCPU enters the guest."""
        self.partition.reference_tsc.update()
        self.synic.run_due()

    def leave(self, request: Request) -> None:
        """Have the guest leave KVM_RUN when it has done what it is doing."""
        self.request = request

    def leave_for_event(self, event: int) -> None:
        """Have it leave with KVM_EXIT_SYSTEM_EVENT."""
        self.leave(KvmRunSystemEvent(event))

    def reset_partition(self) -> None:
        """HV_X64_MSR_RESET."""
        self.leave_for_event(KVM_SYSTEM_EVENT_RESET)

    def report_crash(self) -> None:
        """HV_X64_MSR_CRASH_CTL: the guest crashed, and has said how in the other crash MSRs."""
        self.leave_for_event(KVM_SYSTEM_EVENT_CRASH)

    # -- CPUID

    def leaf(self, function: int) -> KvmCpuidEntry2 | None:
        """A leaf of the guest's CPUID, if that is Hyper-V's."""
        if self._cpuid is not self.vcpu.cpuid:
            self._cpuid = self.vcpu.cpuid
            given = {entry.function: entry for entry in reversed(self.vcpu.cpuid)}
            interface = given.get(HYPERV_CPUID_INTERFACE)
            hyperv = interface is not None and interface.eax == HYPERV_CPUID_SIGNATURE_EAX
            self._offered = given if hyperv else {}
        return self._offered.get(function)

    @property
    def offered(self) -> bool:
        """The guest sees Hyper-V in its CPUID; otherwise all of this is hidden from it."""
        return self.leaf(HYPERV_CPUID_INTERFACE) is not None

    def has(self, feature: int) -> bool:
        """Whether the guest may use a feature: a bit of EAX (0 to 31), EBX (32 up) or EDX (64 up) of its leaf."""
        if not self.enforced:
            return True
        leaf = self.leaf(HYPERV_CPUID_FEATURES)
        return leaf is not None and bool((leaf.eax | leaf.ebx << 32 | leaf.edx << 64) >> feature & 1)

    def is_advised(self, hint: int) -> bool:
        """Whether CPUID recommends something to the guest, which then may use it."""
        if not self.enforced:
            return True
        leaf = self.leaf(HYPERV_CPUID_ENLIGHTENMENT_INFO)
        return leaf is not None and bool(leaf.eax >> hint & 1)

    @property
    def may_yield(self) -> bool:
        """Whether it may say that it spins: CPUID has after how many retries it should."""
        if not self.enforced:
            return True
        leaf = self.leaf(HYPERV_CPUID_ENLIGHTENMENT_INFO)
        return leaf is not None and leaf.ebx not in (0, 0xFFFF_FFFF)

    @property
    def can_debug(self) -> bool:
        """Whether the guest's CPUID has the synthetic debugger, which is there only then."""
        leaf = self.leaf(HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES)
        return leaf is not None and bool(leaf.eax >> 1 & 1)


def _signed(value: int) -> int:
    value &= MASK64
    return value - (value >> 63 << 64)
