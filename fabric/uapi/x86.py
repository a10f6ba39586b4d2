"""What x86 adds to the KVM interface: PIC, IOAPIC, local APIC, PIT, clocks, MSRs, and their structs.

Sources: the KVM API document and ``asm/kvm.h`` of Linux 6.1.
"""

from __future__ import annotations

from typing import Annotated, Final

from fabric.uapi.codec import Array, Bits, CStruct, Word, cstruct, s8, s64, u8, u16, u32, u64, word

# Interrupt controllers
KVM_IRQCHIP_PIC_MASTER: Final = 0
KVM_IRQCHIP_PIC_SLAVE: Final = 1
KVM_IRQCHIP_IOAPIC: Final = 2
KVM_NR_IRQCHIPS_X86: Final = 3
KVM_IOAPIC_NUM_PINS: Final = 24
KVM_X2APIC_API_USE_32BIT_IDS: Final = 1
KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK: Final = 2
KVM_APIC_REG_SIZE: Final = 1024

# Clocks and timers
KVM_CLOCK_TSC_STABLE: Final = 2
KVM_CLOCK_REALTIME: Final = 4
KVM_CLOCK_HOST_TSC: Final = 8
KVM_PIT_SPEAKER_DUMMY: Final = 1
KVM_PIT_FLAGS_HPET_LEGACY: Final = 1
KVM_PIT_FLAGS_SPEAKER_DATA_ON: Final = 2

# vCPU attributes
KVM_VCPU_TSC_CTRL: Final = 0
KVM_VCPU_TSC_OFFSET: Final = 0
# KVM_GET/SET_VCPU_EVENTS: which members of the struct are valid
KVM_VCPUEVENT_VALID_NMI_PENDING: Final = 0x01
KVM_VCPUEVENT_VALID_SIPI_VECTOR: Final = 0x02
KVM_VCPUEVENT_VALID_SHADOW: Final = 0x04
KVM_VCPUEVENT_VALID_SMM: Final = 0x08
KVM_VCPUEVENT_VALID_PAYLOAD: Final = 0x10
KVM_VCPUEVENT_VALID_TRIPLE_FAULT: Final = 0x20

# KVM_EXIT_HYPERV
KVM_EXIT_HYPERV_SYNIC: Final = 1
KVM_EXIT_HYPERV_HCALL: Final = 2
KVM_EXIT_HYPERV_SYNDBG: Final = 3

# Model specific registers of clocks and interrupts
MSR_IA32_TSC: Final = 0x10
MSR_KVM_WALL_CLOCK: Final = 0x11
MSR_KVM_SYSTEM_TIME: Final = 0x12
MSR_IA32_APICBASE: Final = 0x1B
MSR_IA32_TSC_ADJUST: Final = 0x3B
MSR_IA32_TSC_DEADLINE: Final = 0x6E0
MSR_X2APIC: Final = 0x800
MSR_KVM_WALL_CLOCK_NEW: Final = 0x4B56_4D00
MSR_KVM_SYSTEM_TIME_NEW: Final = 0x4B56_4D01
MSR_KVM_ASYNC_PF_EN: Final = 0x4B56_4D02
MSR_KVM_STEAL_TIME: Final = 0x4B56_4D03
MSR_KVM_PV_EOI_EN: Final = 0x4B56_4D04
MSR_KVM_POLL_CONTROL: Final = 0x4B56_4D05
MSR_KVM_ASYNC_PF_INT: Final = 0x4B56_4D06
MSR_KVM_ASYNC_PF_ACK: Final = 0x4B56_4D07


@cstruct
class KvmLapicState(CStruct):
    """KVM_GET/SET_LAPIC: each register at its MMIO offset."""

    regs: Annotated[bytes, "1024s"] = bytes(1024)


@cstruct
class KvmIrqchip(CStruct):
    """KVM_GET/SET_IRQCHIP; ``chip`` is KvmPicState or KvmIoapicState."""

    chip_id: u32 = 0
    pad: u32 = 0
    chip: Annotated[bytes, "512s"] = bytes(512)


@cstruct
class KvmPicState(CStruct):
    """Chips 0 and 1 of KvmIrqchip."""

    last_irr: u8 = 0
    irr: u8 = 0
    imr: u8 = 0
    isr: u8 = 0
    priority_add: u8 = 0
    irq_base: u8 = 0
    read_reg_select: u8 = 0
    poll: u8 = 0
    special_mask: u8 = 0
    init_state: u8 = 0
    auto_eoi: u8 = 0
    rotate_on_auto_eoi: u8 = 0
    special_fully_nested_mode: u8 = 0
    init4: u8 = 0
    elcr: u8 = 0
    elcr_mask: u8 = 0


@cstruct
class KvmIoapicState(CStruct):
    """Chip 2 of KvmIrqchip; ``redirtbl`` has an IoapicRedirect a pin."""

    base_address: u64 = 0
    ioregsel: u32 = 0
    id: u32 = 0
    irr: u32 = 0
    pad: u32 = 0
    redirtbl: Annotated[tuple[int, ...], Array("Q", 24)] = (0,) * 24


@word(64)
class IoapicRedirect(Word):
    """IOAPIC redirection entry; ``trig_mode`` 1 is level."""

    dest_id: Annotated[int, Bits(63, 56)] = 0
    mask: Annotated[int, Bits(16, 16)] = 0
    trig_mode: Annotated[int, Bits(15, 15)] = 0
    remote_irr: Annotated[int, Bits(14, 14)] = 0
    polarity: Annotated[int, Bits(13, 13)] = 0
    delivery_status: Annotated[int, Bits(12, 12)] = 0
    dest_mode: Annotated[int, Bits(11, 11)] = 0
    delivery_mode: Annotated[int, Bits(10, 8)] = 0
    vector: Annotated[int, Bits(7, 0)] = 0


@word(32)
class X86MsiAddressLo(Word):
    """address_lo of an MSI; ``base`` is 0xfee, ``dest_mode`` 1 logical."""

    base: Annotated[int, Bits(31, 20)] = 0
    dest_id: Annotated[int, Bits(19, 12)] = 0
    ext_dest: Annotated[int, Bits(11, 5)] = 0
    redirection_hint: Annotated[int, Bits(3, 3)] = 0
    dest_mode: Annotated[int, Bits(2, 2)] = 0


@word(32)
class X86MsiAddressHi(Word):
    """address_hi of an MSI with KVM_X2APIC_API_USE_32BIT_IDS, otherwise ignored."""

    dest_id_31_8: Annotated[int, Bits(31, 8)] = 0


@cstruct
class KvmPitConfig(CStruct):
    """KVM_CREATE_PIT2."""

    flags: u32 = 0
    pad: Annotated[tuple[int, ...], Array("I", 15)] = (0,) * 15


@cstruct
class KvmPitChannelState(CStruct):
    """One channel; ``count`` may be 65536, ``count_load_time`` is host monotonic ns."""

    count: u32 = 0
    latched_count: u16 = 0
    count_latched: u8 = 0
    status_latched: u8 = 0
    status: u8 = 0
    read_state: u8 = 0
    write_state: u8 = 0
    write_latch: u8 = 0
    rw_mode: u8 = 0
    mode: u8 = 0
    bcd: u8 = 0
    gate: u8 = 0
    count_load_time: s64 = 0


@cstruct
class KvmPitState2(CStruct):
    """KVM_GET/SET_PIT2."""

    channels: Annotated[tuple[KvmPitChannelState, ...], Array(KvmPitChannelState, 3)] = (KvmPitChannelState(),) * 3
    flags: u32 = 0
    reserved: Annotated[tuple[int, ...], Array("I", 9)] = (0,) * 9


@cstruct
class KvmReinjectControl(CStruct):
    """KVM_REINJECT_CONTROL."""

    pit_reinject: u8 = 0
    reserved: Annotated[bytes, "31s"] = bytes(31)


@cstruct
class KvmClockData(CStruct):
    """KVM_GET/SET_CLOCK; ``clock`` and ``realtime`` in ns."""

    clock: u64 = 0
    flags: u32 = 0
    pad0: u32 = 0
    realtime: u64 = 0
    host_tsc: u64 = 0
    pad: Annotated[tuple[int, ...], Array("I", 4)] = (0,) * 4


@cstruct
class KvmHypervExit(CStruct):
    """KVM_EXIT_HYPERV; ``u`` by ``type``: 1 SYNIC, 2 HCALL, 3 SYNDBG."""

    type: u32 = 0
    pad1: u32 = 0
    u: Annotated[bytes, "48s"] = bytes(48)


@cstruct
class HypervSynic(CStruct):
    """KVM_EXIT_HYPERV_SYNIC."""

    msr: u32 = 0
    pad2: u32 = 0
    control: u64 = 0
    evt_page: u64 = 0
    msg_page: u64 = 0


@cstruct
class HypervHcall(CStruct):
    """KVM_EXIT_HYPERV_HCALL; ``result`` is written by userspace."""

    input: u64 = 0
    result: u64 = 0
    params: Annotated[tuple[int, ...], Array("Q", 2)] = (0,) * 2


@cstruct
class HypervSyndbg(CStruct):
    """KVM_EXIT_HYPERV_SYNDBG."""

    msr: u32 = 0
    pad2: u32 = 0
    control: u64 = 0
    status: u64 = 0
    send_page: u64 = 0
    recv_page: u64 = 0
    pending_page: u64 = 0


@cstruct(byteorder="<")
class PvclockWallClock(CStruct):
    """Wall clock at boot, in guest memory; ``version`` is odd while it is written."""

    version: u32 = 0
    sec: u32 = 0
    nsec: u32 = 0


@cstruct(byteorder="<")
class PvclockVcpuTimeInfo(CStruct):
    """kvmclock page of a vCPU; ``version`` is odd while it is written, ``system_time`` in ns."""

    version: u32 = 0
    pad0: u32 = 0
    tsc_timestamp: u64 = 0
    system_time: u64 = 0
    tsc_to_system_mul: u32 = 0
    tsc_shift: s8 = 0
    flags: u8 = 0
    pad: Annotated[bytes, "2s"] = bytes(2)


@cstruct
class KvmPitState(CStruct):
    """KVM_GET/SET_PIT."""

    channels: Annotated[tuple[KvmPitChannelState, ...], Array(KvmPitChannelState, 3)] = (KvmPitChannelState(),) * 3


@cstruct
class KvmInterrupt(CStruct):
    """KVM_INTERRUPT; ``irq`` is the vector."""

    irq: u32 = 0


@cstruct
class KvmMsrs(CStruct):
    """KVM_GET/SET_MSRS: the head, before ``nmsrs`` entries."""

    nmsrs: u32 = 0
    pad: u32 = 0


@cstruct
class KvmMsrEntry(CStruct):
    """One register of KVM_GET/SET_MSRS."""

    index: u32 = 0
    reserved: u32 = 0
    data: u64 = 0


@cstruct
class KvmCpuid2(CStruct):
    """KVM_GET/SET_CPUID2, KVM_GET_SUPPORTED_CPUID: the head, before ``nent`` entries."""

    nent: u32 = 0
    padding: u32 = 0


@cstruct
class KvmCpuidEntry2(CStruct):
    """One leaf of KVM_GET/SET_CPUID2."""

    function: u32 = 0
    index: u32 = 0
    flags: u32 = 0
    eax: u32 = 0
    ebx: u32 = 0
    ecx: u32 = 0
    edx: u32 = 0
    padding: Annotated[tuple[int, ...], Array("I", 3)] = (0,) * 3


@cstruct
class KvmVcpuEvents(CStruct):
    """KVM_GET/SET_VCPU_EVENTS of x86; members of inner structs carry their name in front."""

    exception_injected: u8 = 0
    exception_nr: u8 = 0
    exception_has_error_code: u8 = 0
    exception_pending: u8 = 0
    exception_error_code: u32 = 0
    interrupt_injected: u8 = 0
    interrupt_nr: u8 = 0
    interrupt_soft: u8 = 0
    interrupt_shadow: u8 = 0
    nmi_injected: u8 = 0
    nmi_pending: u8 = 0
    nmi_masked: u8 = 0
    nmi_pad: u8 = 0
    sipi_vector: u32 = 0
    flags: u32 = 0
    smi_smm: u8 = 0
    smi_pending: u8 = 0
    smi_smm_inside_nmi: u8 = 0
    smi_latched_init: u8 = 0
    triple_fault_pending: u8 = 0
    reserved: Annotated[bytes, "26s"] = bytes(26)
    exception_has_payload: u8 = 0
    exception_payload: u64 = 0


@cstruct
class KvmSegment(CStruct):
    """A segment register of KvmSregs."""

    base: u64 = 0
    limit: u32 = 0
    selector: u16 = 0
    type: u8 = 0
    present: u8 = 0
    dpl: u8 = 0
    db: u8 = 0
    s: u8 = 0
    l: u8 = 0  # noqa: E741
    g: u8 = 0
    avl: u8 = 0
    unusable: u8 = 0
    padding: u8 = 0


@cstruct
class KvmDtable(CStruct):
    """A descriptor table register of KvmSregs."""

    base: u64 = 0
    limit: u16 = 0
    padding: Annotated[tuple[int, ...], Array("H", 3)] = (0,) * 3


@cstruct
class KvmSregs(CStruct):
    """KVM_GET/SET_SREGS; segments are cs, ds, es, fs, gs, ss, tr, ldt, tables gdt, idt."""

    segments: Annotated[tuple[KvmSegment, ...], Array(KvmSegment, 8)] = (KvmSegment(),) * 8
    tables: Annotated[tuple[KvmDtable, ...], Array(KvmDtable, 2)] = (KvmDtable(),) * 2
    cr0: u64 = 0
    cr2: u64 = 0
    cr3: u64 = 0
    cr4: u64 = 0
    cr8: u64 = 0
    efer: u64 = 0
    apic_base: u64 = 0
    interrupt_bitmap: Annotated[tuple[int, ...], Array("Q", 4)] = (0,) * 4


@cstruct
class KvmRegs(CStruct):
    """KVM_GET/SET_REGS."""

    rax: u64 = 0
    rbx: u64 = 0
    rcx: u64 = 0
    rdx: u64 = 0
    rsi: u64 = 0
    rdi: u64 = 0
    rsp: u64 = 0
    rbp: u64 = 0
    r8: u64 = 0
    r9: u64 = 0
    r10: u64 = 0
    r11: u64 = 0
    r12: u64 = 0
    r13: u64 = 0
    r14: u64 = 0
    r15: u64 = 0
    rip: u64 = 0
    rflags: u64 = 0
