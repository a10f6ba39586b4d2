"""Hyper-V as a guest program meets it: hypercalls, and the exits to the VMM that they and some MSRs end in.

Source: TLFS, Hypercall Interface; KVM_EXIT_HYPERV of the KVM API document.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from fabric.devices.x86 import hypercalls
from fabric.uapi.hyperv import HV_ENABLE, HV_X64_MSR_SYNDBG_CONTROL
from fabric.uapi.kvm import KVM_EXIT_HYPERV, KVM_RUN_EXIT, KvmRunSystemEvent
from fabric.uapi.x86 import (
    KVM_EXIT_HYPERV_HCALL,
    KVM_EXIT_HYPERV_SYNDBG,
    KVM_EXIT_HYPERV_SYNIC,
    HypervHcall,
    HypervSyndbg,
    HypervSynic,
    KvmHypervExit,
)
from fabric.vcpu.exits import SystemEventExit, set_exit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fabric.devices.x86.hyperv import VirtualProcessor
    from fabric.vcpu.exits import Exit, RunArea

_KINDS: Final = {
    HypervSynic: KVM_EXIT_HYPERV_SYNIC,
    HypervHcall: KVM_EXIT_HYPERV_HCALL,
    HypervSyndbg: KVM_EXIT_HYPERV_SYNDBG,
}
_UNION: Final = KVM_RUN_EXIT + KvmHypervExit.OFFSETS["u"]


class InvalidOpcode(Exception):
    """#UD: raised in a guest program by an instruction that its CPU does not have."""


@attrs.frozen
class HypervExit:
    """KVM_EXIT_HYPERV (api.exit.hyperv) with ``details`` of one of its types."""

    vp: VirtualProcessor
    details: HypervSynic | HypervHcall | HypervSyndbg

    def fill(self, run: RunArea) -> None:
        """Type and details."""
        size = KvmHypervExit.SIZE - KvmHypervExit.OFFSETS["u"]
        kind = _KINDS[type(self.details)]
        set_exit(run, KVM_EXIT_HYPERV, KvmHypervExit(kind, u=self.details.pack().ljust(size, b"\0")))

    def complete(self, run: RunArea) -> int:
        """A hypercall's result is what the VMM wrote, and so is the status of a command to the debugger."""
        details = type(self.details).unpack(run, _UNION)
        if isinstance(details, HypervHcall):
            return details.result
        if isinstance(details, HypervSyndbg) and details.msr == HV_X64_MSR_SYNDBG_CONTROL:
            partition = self.vp.partition
            partition.syndbg = partition.syndbg.with_(status=details.status)
        return 0


def take_exit(vp: VirtualProcessor) -> Exit:
    """The exit that the last write of an MSR asked for."""
    request, vp.request = vp.request, None
    assert request is not None
    if isinstance(request, KvmRunSystemEvent):
        return SystemEventExit(request.type)
    return HypervExit(vp, request)


async def hypercall(cpu: Any, value: int, input: int = 0, output: int = 0, xmm: Sequence[int] = ()) -> int:
    """Call the hypercall page: RCX, RDX and R8 (and the halves of XMM0 to XMM5); the result is RAX.

    InvalidOpcode unless the guest has set up the page (HV_X64_MSR_GUEST_OS_ID, HV_X64_MSR_HYPERCALL).
    """
    vp: VirtualProcessor | None = cpu._vcpu.hyperv
    if vp is None or not vp.offered or not vp.partition.hypercall & HV_ENABLE:
        raise InvalidOpcode("there is no hypercall page to call")
    await cpu._exit()
    vp = cpu._vcpu.hyperv
    assert vp is not None
    answer = hypercalls.call(vp, hypercalls.Hypercall(value, input, output, xmm))
    return int(await cpu._leave(HypervExit(vp, answer))) if isinstance(answer, HypervHcall) else answer
