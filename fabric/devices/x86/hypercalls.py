"""The hypercalls of a Hyper-V guest: what KVM answers by itself, and what it leaves to the VMM.

The input value says which call it is, whether its parameters are in the registers (*fast*) or in guest memory, and for
calls that repeat an operation how often. KVM answers those that concern vCPUs: IPIs to sets of virtual processors, TLB
flushes (of which nothing is seen here), and the signalling of events of connections that KVM_HYPERV_EVENTFD has tied to
an eventfd. Messages, the other events and the extended calls are the VMM's; it is asked with KVM_EXIT_HYPERV.

Sources: TLFS, Hypercall Interface; HvCallSendSyntheticClusterIpi(Ex), HvCallFlushVirtualAddressSpace(Ex) and -List(Ex),
HvCallNotifyLongSpinWait, HvCallPostMessage, HvCallSignalEvent; Sparse Virtual Processor Sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import attrs

from fabric.devices.x86.apic_bus import MODE_FIXED, SELF
from fabric.errors import KvmError
from fabric.uapi import hyperv as hv
from fabric.uapi.x86 import HypervHcall

if TYPE_CHECKING:
    from fabric.devices.x86.hyperv import VirtualProcessor

POST_MESSAGES, SIGNAL_EVENTS, DEBUGGING, EXTENDED_CALLS = 32 + 4, 32 + 5, 32 + 11, 32 + 20
"""Privileges: bits of CPUID leaf 0x40000003, from 32 on of EBX."""
TLB_FLUSH_ADVISED, IPIS_ADVISED, MASKS_ADVISED = 2, 10, 11
"""Recommendations: bits of CPUID leaf 0x40000004 EAX."""
IPI_VECTORS: Final = range(0x10, 0x100)
MAX_FLUSHES: Final = 16
BANKS_IN_USE: Final = 16
"""Those that can hold an index of a virtual processor (1024 of them)."""
XMM_HALVES: Final = 12
"""64-bit halves of XMM0 to XMM5, in which a fast call may have more parameters."""


@attrs.frozen
class Hypercall:
    """One call as a guest makes it. ``xmm`` are the halves of the XMM registers, the low one first."""

    value: int
    input: int
    output: int
    xmm: Sequence[int] = ()

    @property
    def code(self) -> int:
        """Which call."""
        return self.value & 0xFFFF

    @property
    def fast(self) -> bool:
        """Its parameters are in registers."""
        return bool(self.value & hv.HV_HYPERCALL_FAST)

    @property
    def variable(self) -> int:
        """How many 64-bit words the header has besides what is fixed."""
        return (self.value & hv.HV_HYPERCALL_VARHEAD) >> hv.HV_HYPERCALL_VARHEAD_SHIFT

    @property
    def repeats(self) -> int:
        """Of how many operations it is a list."""
        return self.value >> hv.HV_HYPERCALL_REP_COUNT_SHIFT & 0xFFF

    @property
    def first(self) -> int:
        """With which of them to go on."""
        return self.value >> hv.HV_HYPERCALL_REP_START_SHIFT & 0xFFF


class Status(Exception):
    """The call fails with a status code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"hypercall status {code}")
        self.code = code


INVALID_INPUT = hv.HV_STATUS_INVALID_HYPERCALL_INPUT

Answer = int | HypervHcall
"""The result value of the call, or what the VMM is asked for it."""


def call(vp: VirtualProcessor, one: Hypercall) -> Answer:
    """Answer a hypercall of ``vp``."""
    row = _CALLS.get(one.code)
    if row is None:
        row = _EXTENDED if one.code in _EXTENDED_CODES else _UNKNOWN
    try:
        if not row.allowed(vp):
            raise Status(hv.HV_STATUS_ACCESS_DENIED)
        wrong = one.value & hv.HV_HYPERCALL_RESERVED
        wrong |= bool(one.repeats or one.first) and not row.repeats
        wrong |= one.variable and not row.variable
        if wrong:
            raise Status(INVALID_INPUT)
        return row.answer(vp, one)
    except Status as status:
        return status.code


# -- parameters


def _read(vp: VirtualProcessor, gpa: int, words: int) -> list[int]:
    """So many 64-bit words of guest memory."""
    try:
        data = vp.vcpu.vm.memory.read(gpa, 8 * words) if words else b""
    except KvmError:
        raise Status(INVALID_INPUT) from None
    return [int.from_bytes(data[8 * n : 8 * n + 8], "little") for n in range(words)]


def _parameters(vp: VirtualProcessor, one: Hypercall, fixed: int, more: int) -> list[int]:
    """The first ``fixed`` words of the input and ``more`` that follow: from memory, or for a fast call registers."""
    if not one.fast:
        return _read(vp, one.input, fixed + more)
    words = [one.input, one.output, *one.xmm]
    if fixed + more > 2 + XMM_HALVES:
        raise Status(INVALID_INPUT)
    return (words + [0] * XMM_HALVES)[: fixed + more]


def _processors(vp: VirtualProcessor, one: Hypercall, valid: int, at: int) -> Callable[[int], bool]:
    """Whether an index is in the sparse set whose banks are the words from ``at`` on, a bank a bit of ``valid``."""
    count = one.variable
    words = _parameters(vp, one, at, count if one.fast else min(count, BANKS_IN_USE))[at:]
    banks = [bank for bank in range(64) if valid >> bank & 1]
    members = dict(zip(banks, words, strict=False))
    return lambda index: bool(members.get(index >> 6, 0) >> (index & 63) & 1)


# -- IPIs


def _send_ipi(vp: VirtualProcessor, one: Hypercall) -> int:
    vector, mask = _parameters(vp, one, 2, 0)
    if one.fast and vector >> 32:
        raise Status(INVALID_INPUT)
    return _interrupt(vp, vector & 0xFFFF_FFFF, lambda index: index < 64 and bool(mask >> index & 1))


def _send_ipi_ex(vp: VirtualProcessor, one: Hypercall) -> int:
    if vp.vcpu.cpu_interface is None:
        raise Status(INVALID_INPUT)
    vector, form, valid = _parameters(vp, one, 3, 0)
    vector &= 0xFFFF_FFFF
    if one.variable != valid.bit_count():
        raise Status(INVALID_INPUT)
    if form == hv.HV_GENERIC_SET_ALL:
        return _interrupt(vp, vector, lambda index: True)
    if not one.variable:
        return hv.HV_STATUS_SUCCESS
    return _interrupt(vp, vector, _processors(vp, one, valid, 3))


def _interrupt(vp: VirtualProcessor, vector: int, named: Callable[[int], bool]) -> int:
    if vp.vcpu.cpu_interface is None or vector not in IPI_VECTORS:
        raise Status(INVALID_INPUT)
    for other in vp.partition.vps:
        if named(other.index):
            apic = other.vcpu.cpu_interface
            apic.bus.deliver(0, False, MODE_FIXED, vector, True, 0, shorthand=SELF, source=apic)
    return hv.HV_STATUS_SUCCESS


# -- TLB flushes


def _flush(vp: VirtualProcessor, one: Hypercall) -> int:
    """There is no TLB: only what is wrong with the call can be seen."""
    lists = one.code in (hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX)
    if lists and (not one.repeats or one.first):
        raise Status(INVALID_INPUT)
    header = 3
    if one.code in (hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX):
        valid = _parameters(vp, one, 4, 0)[3]
        if one.variable != valid.bit_count():
            raise Status(INVALID_INPUT)
        header = 4 + one.variable
    # Longer lists flush everything, unread.
    _parameters(vp, one, header, one.repeats if one.repeats < MAX_FLUSHES else 0)
    return hv.HV_STATUS_SUCCESS | one.repeats << hv.HV_HYPERCALL_REP_COUNT_SHIFT


def _spin(_vp: VirtualProcessor, _one: Hypercall) -> int:
    """The guest spins for long: a host may let another vCPU run."""
    return hv.HV_STATUS_SUCCESS


# -- messages and events


def _post_message(vp: VirtualProcessor, one: Hypercall) -> Answer:
    return _ask(vp, one, one.input)


def _signal_event(vp: VirtualProcessor, one: Hypercall) -> Answer:
    """By an eventfd, or else by the VMM.

    The parameter that the VMM is then given is the connection, also when the guest passed its address (KVM has read it
    by then).
    """
    connection = one.input
    if not one.fast:
        if one.input & 7:
            raise Status(hv.HV_STATUS_INVALID_ALIGNMENT)
        try:
            connection = vp.vcpu.vm.memory.read_u64(one.input)
        except KvmError:
            raise Status(hv.HV_STATUS_INVALID_ALIGNMENT) from None
    if not connection >> 32 & 0xFFFF:  # a flag number is for the VMM to understand
        if connection & ~hv.KVM_HYPERV_CONN_ID_MASK:
            raise Status(INVALID_INPUT)
        signal = vp.partition.connections.get(connection)
        if signal is not None:
            signal()
            return hv.HV_STATUS_SUCCESS
    return _ask(vp, one, connection)


def _ask(vp: VirtualProcessor, one: Hypercall, parameter: int) -> HypervHcall:
    """The VMM of a vCPU without a SynIC has nothing to answer with."""
    if not vp.synic.active:
        raise Status(INVALID_INPUT)
    return HypervHcall(one.value, 0, (parameter, one.output))


def _extended(_vp: VirtualProcessor, one: Hypercall) -> HypervHcall:
    if one.fast:
        raise Status(hv.HV_STATUS_INVALID_PARAMETER)
    return HypervHcall(one.value, 0, (one.input, one.output))


def _debug(vp: VirtualProcessor, one: Hypercall) -> HypervHcall:
    if one.fast and one.code != hv.HVCALL_RESET_DEBUG_SESSION:
        raise Status(hv.HV_STATUS_INVALID_PARAMETER)
    if not vp.can_debug:
        raise Status(hv.HV_STATUS_INVALID_HYPERCALL_CODE)
    if not vp.partition.syndbg_options & hv.HV_SYNDBG_OPTION_USE_HCALLS:
        raise Status(hv.HV_STATUS_OPERATION_DENIED)
    return HypervHcall(one.value, 0, (one.input, one.output))


def _unknown(_vp: VirtualProcessor, _one: Hypercall) -> int:
    raise Status(hv.HV_STATUS_INVALID_HYPERCALL_CODE)


# -- the table


@attrs.frozen
class _Call:
    """Who may make the call, whether it may have repeats and a variable header, and its answer."""

    answer: Callable[[VirtualProcessor, Hypercall], Answer]
    allowed: Callable[[VirtualProcessor], bool] = lambda vp: True
    repeats: bool = False
    variable: bool = False


def _may_flush(vp: VirtualProcessor) -> bool:
    return vp.is_advised(TLB_FLUSH_ADVISED)


def _may_interrupt(vp: VirtualProcessor) -> bool:
    return vp.is_advised(IPIS_ADVISED)


_CALLS: dict[int, _Call] = {
    hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE: _Call(_flush, _may_flush),
    hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST: _Call(_flush, _may_flush, repeats=True),
    hv.HVCALL_NOTIFY_LONG_SPIN_WAIT: _Call(_spin, lambda vp: vp.may_yield),
    hv.HVCALL_SEND_IPI: _Call(_send_ipi, _may_interrupt),
    hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX: _Call(
        _flush, lambda vp: vp.is_advised(MASKS_ADVISED) and _may_flush(vp), variable=True
    ),
    hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX: _Call(
        _flush, lambda vp: vp.is_advised(MASKS_ADVISED) and _may_flush(vp), repeats=True, variable=True
    ),
    hv.HVCALL_SEND_IPI_EX: _Call(
        _send_ipi_ex, lambda vp: vp.is_advised(MASKS_ADVISED) and _may_interrupt(vp), variable=True
    ),
    hv.HVCALL_POST_MESSAGE: _Call(_post_message, lambda vp: vp.has(POST_MESSAGES)),
    hv.HVCALL_SIGNAL_EVENT: _Call(_signal_event, lambda vp: vp.has(SIGNAL_EVENTS)),
    **dict.fromkeys(
        (hv.HVCALL_POST_DEBUG_DATA, hv.HVCALL_RETRIEVE_DEBUG_DATA, hv.HVCALL_RESET_DEBUG_SESSION),
        _Call(_debug, lambda vp: not vp.can_debug or vp.has(DEBUGGING), repeats=True, variable=True),
    ),
}
_EXTENDED_CODES = range(hv.HV_EXT_CALL_QUERY_CAPABILITIES, hv.HV_EXT_CALL_MAX + 1)
_EXTENDED = _Call(_extended, lambda vp: vp.has(EXTENDED_CALLS), repeats=True, variable=True)
_UNKNOWN = _Call(_unknown, repeats=True, variable=True)
