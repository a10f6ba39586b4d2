"""Numbers and structures of Hyper-V that a guest and its VMM meet on a KVM host: MSRs, hypercalls, messages.

Sources: Hyper-V Top Level Functional Specification (TLFS), chapters Feature and Interface Discovery, Hypercall
Interface, Virtual Interrupts, Inter-Partition Communication and Timers; KVM API document for struct
kvm_hyperv_eventfd.
"""

from __future__ import annotations

from typing import Annotated, Final

from fabric.uapi.codec import Array, CStruct, cstruct, s32, s64, u8, u16, u32, u64

# CPUID
HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS: Final = 0x4000_0000
HYPERV_CPUID_INTERFACE: Final = 0x4000_0001
HYPERV_CPUID_VERSION: Final = 0x4000_0002
HYPERV_CPUID_FEATURES: Final = 0x4000_0003
HYPERV_CPUID_ENLIGHTENMENT_INFO: Final = 0x4000_0004
HYPERV_CPUID_IMPLEMENT_LIMITS: Final = 0x4000_0005
HYPERV_CPUID_NESTED_FEATURES: Final = 0x4000_000A
HYPERV_CPUID_SYNDBG_VENDOR_AND_MAX_FUNCTIONS: Final = 0x4000_0080
HYPERV_CPUID_SYNDBG_INTERFACE: Final = 0x4000_0081
HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES: Final = 0x4000_0082
HYPERV_CPUID_SIGNATURE_EAX: Final = int.from_bytes(b"Hv#1", "little")

# MSRs of the partition, which all its virtual processors share
HV_X64_MSR_GUEST_OS_ID: Final = 0x4000_0000
HV_X64_MSR_HYPERCALL: Final = 0x4000_0001
HV_X64_MSR_RESET: Final = 0x4000_0003
HV_X64_MSR_TIME_REF_COUNT: Final = 0x4000_0020
HV_X64_MSR_REFERENCE_TSC: Final = 0x4000_0021
HV_X64_MSR_SYNDBG_CONTROL: Final = 0x4000_00F1
HV_X64_MSR_SYNDBG_STATUS: Final = 0x4000_00F2
HV_X64_MSR_SYNDBG_SEND_BUFFER: Final = 0x4000_00F3
HV_X64_MSR_SYNDBG_RECV_BUFFER: Final = 0x4000_00F4
HV_X64_MSR_SYNDBG_PENDING_BUFFER: Final = 0x4000_00F5
HV_X64_MSR_SYNDBG_OPTIONS: Final = 0x4000_00FF
HV_X64_MSR_CRASH_P0: Final = 0x4000_0100
HV_X64_MSR_CRASH_CTL: Final = 0x4000_0105
HV_X64_MSR_REENLIGHTENMENT_CONTROL: Final = 0x4000_0106
HV_X64_MSR_TSC_EMULATION_CONTROL: Final = 0x4000_0107
HV_X64_MSR_TSC_EMULATION_STATUS: Final = 0x4000_0108
HV_X64_MSR_TSC_INVARIANT_CONTROL: Final = 0x4000_0118

# MSRs of a virtual processor
HV_X64_MSR_VP_INDEX: Final = 0x4000_0002
HV_X64_MSR_VP_RUNTIME: Final = 0x4000_0010
HV_X64_MSR_TSC_FREQUENCY: Final = 0x4000_0022
HV_X64_MSR_APIC_FREQUENCY: Final = 0x4000_0023
HV_X64_MSR_EOI: Final = 0x4000_0070
HV_X64_MSR_ICR: Final = 0x4000_0071
HV_X64_MSR_TPR: Final = 0x4000_0072
HV_X64_MSR_VP_ASSIST_PAGE: Final = 0x4000_0073
HV_X64_MSR_SCONTROL: Final = 0x4000_0080
HV_X64_MSR_SVERSION: Final = 0x4000_0081
HV_X64_MSR_SIEFP: Final = 0x4000_0082
HV_X64_MSR_SIMP: Final = 0x4000_0083
HV_X64_MSR_EOM: Final = 0x4000_0084
HV_X64_MSR_SINT0: Final = 0x4000_0090
HV_X64_MSR_STIMER0_CONFIG: Final = 0x4000_00B0
HV_X64_MSR_STIMER0_COUNT: Final = 0x4000_00B1

# Bits in them
HV_ENABLE: Final = 1
"""Bit 0 of HYPERCALL, REFERENCE_TSC, VP_ASSIST_PAGE, SCONTROL, SIEFP, SIMP and STIMERn_CONFIG."""
HV_SYNIC_SINT_VECTOR: Final = 0xFF
HV_SYNIC_SINT_MASKED: Final = 1 << 16
HV_SYNIC_SINT_AUTO_EOI: Final = 1 << 17
HV_SYNIC_SINT_POLLING: Final = 1 << 18
HV_STIMER_PERIODIC: Final = 1 << 1
HV_STIMER_LAZY: Final = 1 << 2
HV_STIMER_AUTO_ENABLE: Final = 1 << 3
HV_STIMER_VECTOR_SHIFT: Final = 4
HV_STIMER_DIRECT: Final = 1 << 12
HV_STIMER_SINT_SHIFT: Final = 16
HV_CRASH_CTL_CRASH_NOTIFY: Final = 1 << 63
HV_EXPOSE_INVARIANT_TSC: Final = 1

# SynIC
HV_SYNIC_SINT_COUNT: Final = 16
HV_SYNIC_STIMER_COUNT: Final = 4
HV_SYNIC_FIRST_VALID_VECTOR: Final = 16
HV_SYNIC_VERSION_1: Final = 1
HV_MESSAGE_SIZE: Final = 256
HV_EVENT_FLAGS_COUNT: Final = 2048
"""Flags of each SINT in the event page."""
HVMSG_NONE: Final = 0
HVMSG_TIMER_EXPIRED: Final = 0x8000_0010
HV_MESSAGE_PENDING: Final = 1
"""Bit of HvMessage.flags: another message waits for the slot."""

# Hypercalls: codes, the other fields of the input value, status codes
HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE: Final = 0x02
HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST: Final = 0x03
HVCALL_NOTIFY_LONG_SPIN_WAIT: Final = 0x08
HVCALL_SEND_IPI: Final = 0x0B
HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX: Final = 0x13
HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX: Final = 0x14
HVCALL_SEND_IPI_EX: Final = 0x15
HVCALL_POST_MESSAGE: Final = 0x5C
HVCALL_SIGNAL_EVENT: Final = 0x5D
HVCALL_POST_DEBUG_DATA: Final = 0x69
HVCALL_RETRIEVE_DEBUG_DATA: Final = 0x6A
HVCALL_RESET_DEBUG_SESSION: Final = 0x6B
HV_EXT_CALL_QUERY_CAPABILITIES: Final = 0x8001
HV_EXT_CALL_MAX: Final = HV_EXT_CALL_QUERY_CAPABILITIES + 64
HV_HYPERCALL_FAST: Final = 1 << 16
HV_HYPERCALL_VARHEAD_SHIFT: Final = 17
HV_HYPERCALL_VARHEAD: Final = 0x3FF << HV_HYPERCALL_VARHEAD_SHIFT
HV_HYPERCALL_REP_COUNT_SHIFT: Final = 32
HV_HYPERCALL_REP_START_SHIFT: Final = 48
HV_HYPERCALL_RESERVED: Final = 0xF << 27 | 0xF << 44 | 0xF << 60
HV_STATUS_SUCCESS: Final = 0
HV_STATUS_INVALID_HYPERCALL_CODE: Final = 2
HV_STATUS_INVALID_HYPERCALL_INPUT: Final = 3
HV_STATUS_INVALID_ALIGNMENT: Final = 4
HV_STATUS_INVALID_PARAMETER: Final = 5
HV_STATUS_ACCESS_DENIED: Final = 6
HV_STATUS_OPERATION_DENIED: Final = 8
HV_STATUS_INSUFFICIENT_MEMORY: Final = 11
HV_STATUS_INVALID_PORT_ID: Final = 17
HV_STATUS_INVALID_CONNECTION_ID: Final = 18
HV_STATUS_INSUFFICIENT_BUFFERS: Final = 19
HV_GENERIC_SET_SPARSE_4K, HV_GENERIC_SET_ALL = 0, 1
HV_SYNDBG_OPTION_USE_HCALLS: Final = 1 << 2
HV_SYNDBG_CAP_ALLOW_KERNEL_DEBUGGING: Final = 1 << 1

# KVM_HYPERV_EVENTFD
KVM_HYPERV_CONN_ID_MASK: Final = 0x00FF_FFFF
KVM_HYPERV_EVENTFD_DEASSIGN: Final = 1


@cstruct
class KvmHypervEventfd(CStruct):
    """KVM_HYPERV_EVENTFD: what HvCallSignalEvent of a connection signals."""

    conn_id: u32 = 0
    fd: s32 = 0
    flags: u32 = 0
    padding: Annotated[tuple[int, ...], Array("I", 3)] = (0,) * 3


@cstruct(byteorder="<")
class HvMessage(CStruct):
    """A slot of the message page (HV_MESSAGE); ``sender`` is a port or partition."""

    message_type: u32 = 0
    payload_size: u8 = 0
    flags: u8 = 0
    reserved: u16 = 0
    sender: u64 = 0
    payload: Annotated[bytes, "240s"] = b""


@cstruct(byteorder="<")
class HvTimerMessagePayload(CStruct):
    """The payload of HVMSG_TIMER_EXPIRED; times in units of 100 ns."""

    timer_index: u32 = 0
    reserved: u32 = 0
    expiration_time: u64 = 0
    delivery_time: u64 = 0


@cstruct(byteorder="<")
class HvReferenceTscPage(CStruct):
    """The head of the reference TSC page: ``time = (tsc * scale >> 64) + offset``, unless ``sequence`` is 0."""

    sequence: u32 = 0
    reserved: u32 = 0
    scale: u64 = 0
    offset: s64 = 0


@cstruct(byteorder="<")
class HvPostMessageInput(CStruct):
    """The input of HvCallPostMessage."""

    connection_id: u32 = 0
    reserved: u32 = 0
    message_type: u32 = 0
    payload_size: u32 = 0
    payload: Annotated[bytes, "240s"] = b""
