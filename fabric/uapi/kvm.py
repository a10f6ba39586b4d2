"""What the KVM interface of every architecture shares: constants, structs, and the shape of struct kvm_run.

Numbers are those of ``linux/kvm.h`` as of Linux 6.1, structs are named as in C, in CamelCase. Members default
to zero, as in a C initializer, so that ``KvmMsi(address_lo=base, data=5)`` says all there is to say.
"""

from __future__ import annotations

from typing import Annotated, Final

from fabric.uapi.codec import Array, CStruct, cstruct, s32, u8, u16, u32, u64

KVM_API_VERSION: Final = 12

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
"""Memory slots, dirty logs and kvm_run count in these, on every architecture fabric knows."""

# Capabilities: KVM_CHECK_EXTENSION, KVM_ENABLE_CAP
KVM_CAP_IRQCHIP: Final = 0
KVM_CAP_HLT: Final = 1
KVM_CAP_USER_MEMORY: Final = 3
KVM_CAP_VAPIC: Final = 6
KVM_CAP_CLOCKSOURCE: Final = 8
KVM_CAP_NR_VCPUS: Final = 9
KVM_CAP_NR_MEMSLOTS: Final = 10
KVM_CAP_PIT: Final = 11
KVM_CAP_PV_MMU: Final = 13
KVM_CAP_MP_STATE: Final = 14
KVM_CAP_COALESCED_MMIO: Final = 15
KVM_CAP_SYNC_MMU: Final = 16
KVM_CAP_DESTROY_MEMORY_REGION_WORKS: Final = 21
KVM_CAP_USER_NMI: Final = 22
KVM_CAP_SET_GUEST_DEBUG: Final = 23
KVM_CAP_REINJECT_CONTROL: Final = 24
KVM_CAP_IRQ_ROUTING: Final = 25
KVM_CAP_IRQ_INJECT_STATUS: Final = 26
KVM_CAP_ASSIGN_DEV_IRQ: Final = 29
KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: Final = 30
KVM_CAP_IRQFD: Final = 32
KVM_CAP_PIT2: Final = 33
KVM_CAP_SET_BOOT_CPU_ID: Final = 34
KVM_CAP_PIT_STATE2: Final = 35
KVM_CAP_IOEVENTFD: Final = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR: Final = 37
KVM_CAP_MCE: Final = 31
KVM_CAP_XEN_HVM: Final = 38
KVM_CAP_ADJUST_CLOCK: Final = 39
KVM_CAP_INTERNAL_ERROR_DATA: Final = 40
KVM_CAP_VCPU_EVENTS: Final = 41
KVM_CAP_HYPERV: Final = 44
KVM_CAP_HYPERV_VAPIC: Final = 45
KVM_CAP_HYPERV_SPIN: Final = 46
KVM_CAP_PCI_SEGMENT: Final = 47
KVM_CAP_INTR_SHADOW: Final = 49
KVM_CAP_ENABLE_CAP: Final = 54
KVM_CAP_PPC_IRQ_LEVEL: Final = 58
KVM_CAP_TSC_CONTROL: Final = 60
KVM_CAP_GET_TSC_KHZ: Final = 61
KVM_CAP_SPAPR_TCE: Final = 63
KVM_CAP_PPC_SMT: Final = 64
KVM_CAP_PPC_RMA: Final = 65
KVM_CAP_MAX_VCPUS: Final = 66
KVM_CAP_ONE_REG: Final = 70
KVM_CAP_TSC_DEADLINE_TIMER: Final = 72
KVM_CAP_S390_UCONTROL: Final = 73
KVM_CAP_SYNC_REGS: Final = 74
KVM_CAP_KVMCLOCK_CTRL: Final = 76
KVM_CAP_SIGNAL_MSI: Final = 77
KVM_CAP_READONLY_MEM: Final = 81
KVM_CAP_IRQFD_RESAMPLE: Final = 82
KVM_CAP_PPC_EPR: Final = 86
KVM_CAP_ARM_PSCI: Final = 87
KVM_CAP_ARM_SET_DEVICE_ADDR: Final = 88
KVM_CAP_DEVICE_CTRL: Final = 89
KVM_CAP_IRQ_MPIC: Final = 90
KVM_CAP_PPC_RTAS: Final = 91
KVM_CAP_IRQ_XICS: Final = 92
KVM_CAP_ARM_EL1_32BIT: Final = 93
KVM_CAP_SPAPR_MULTITCE: Final = 94
KVM_CAP_HYPERV_TIME: Final = 96
KVM_CAP_IOAPIC_POLARITY_IGNORED: Final = 97
KVM_CAP_ENABLE_CAP_VM: Final = 98
KVM_CAP_S390_IRQCHIP: Final = 99
KVM_CAP_IOEVENTFD_NO_LENGTH: Final = 100
KVM_CAP_VM_ATTRIBUTES: Final = 101
KVM_CAP_ARM_PSCI_0_2: Final = 102
KVM_CAP_PPC_ENABLE_HCALL: Final = 104
KVM_CAP_CHECK_EXTENSION_VM: Final = 105
KVM_CAP_S390_USER_SIGP: Final = 106
KVM_CAP_S390_MEM_OP: Final = 108
KVM_CAP_S390_INJECT_IRQ: Final = 113
KVM_CAP_S390_IRQ_STATE: Final = 114
KVM_CAP_DISABLE_QUIRKS: Final = 116
KVM_CAP_X86_SMM: Final = 117
KVM_CAP_MULTI_ADDRESS_SPACE: Final = 118
KVM_CAP_GUEST_DEBUG_HW_BPS: Final = 119
KVM_CAP_GUEST_DEBUG_HW_WPS: Final = 120
KVM_CAP_SPLIT_IRQCHIP: Final = 121
KVM_CAP_IOEVENTFD_ANY_LENGTH: Final = 122
KVM_CAP_HYPERV_SYNIC: Final = 123
KVM_CAP_S390_RI: Final = 124
KVM_CAP_SPAPR_TCE_64: Final = 125
KVM_CAP_ARM_PMU_V3: Final = 126
KVM_CAP_VCPU_ATTRIBUTES: Final = 127
KVM_CAP_MAX_VCPU_ID: Final = 128
KVM_CAP_X2APIC_API: Final = 129
KVM_CAP_S390_USER_INSTR0: Final = 130
KVM_CAP_MSI_DEVID: Final = 131
KVM_CAP_IMMEDIATE_EXIT: Final = 136
KVM_CAP_S390_AIS: Final = 141
KVM_CAP_SPAPR_TCE_VFIO: Final = 142
KVM_CAP_X86_DISABLE_EXITS: Final = 143
KVM_CAP_ARM_USER_IRQ: Final = 144
KVM_CAP_S390_CMMA_MIGRATION: Final = 145
KVM_CAP_HYPERV_SYNIC2: Final = 148
KVM_CAP_HYPERV_VP_INDEX: Final = 149
KVM_CAP_S390_AIS_MIGRATION: Final = 150
KVM_CAP_GET_MSR_FEATURES: Final = 153
KVM_CAP_HYPERV_EVENTFD: Final = 154
KVM_CAP_HYPERV_TLBFLUSH: Final = 155
KVM_CAP_NESTED_STATE: Final = 157
KVM_CAP_ARM_INJECT_SERROR_ESR: Final = 158
KVM_CAP_MSR_PLATFORM_INFO: Final = 159
KVM_CAP_HYPERV_SEND_IPI: Final = 161
KVM_CAP_COALESCED_PIO: Final = 162
KVM_CAP_EXCEPTION_PAYLOAD: Final = 164
KVM_CAP_ARM_VM_IPA_SIZE: Final = 165
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT: Final = 166
KVM_CAP_HYPERV_CPUID: Final = 167
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: Final = 168
KVM_CAP_PPC_IRQ_XIVE: Final = 169
KVM_CAP_ARM_SVE: Final = 170
KVM_CAP_ARM_PTRAUTH_ADDRESS: Final = 171
KVM_CAP_ARM_PTRAUTH_GENERIC: Final = 172
KVM_CAP_PMU_EVENT_FILTER: Final = 173
KVM_CAP_ARM_IRQ_LINE_LAYOUT_2: Final = 174
KVM_CAP_ARM_NISV_TO_USER: Final = 177
KVM_CAP_ARM_INJECT_EXT_DABT: Final = 178
KVM_CAP_S390_VCPU_RESETS: Final = 179
KVM_CAP_HALT_POLL: Final = 182
KVM_CAP_ASYNC_PF_INT: Final = 183
KVM_CAP_LAST_CPU: Final = 184
KVM_CAP_STEAL_TIME: Final = 187
KVM_CAP_ENFORCE_PV_FEATURE_CPUID: Final = 190
KVM_CAP_X86_USER_SPACE_MSR: Final = 188
KVM_CAP_X86_MSR_FILTER: Final = 189
KVM_CAP_SYS_HYPERV_CPUID: Final = 191
KVM_CAP_DIRTY_LOG_RING: Final = 192
KVM_CAP_SET_GUEST_DEBUG2: Final = 195
KVM_CAP_PTP_KVM: Final = 198
KVM_CAP_HYPERV_ENFORCE_CPUID: Final = 199
KVM_CAP_EXIT_HYPERCALL: Final = 201
KVM_CAP_BINARY_STATS_FD: Final = 203
KVM_CAP_SYS_ATTRIBUTES: Final = 209
KVM_CAP_PMU_CAPABILITY: Final = 212
KVM_CAP_DISABLE_QUIRKS2: Final = 213
KVM_CAP_VM_TSC_CONTROL: Final = 214
KVM_CAP_SYSTEM_EVENT_DATA: Final = 215
KVM_CAP_ARM_SYSTEM_SUSPEND: Final = 216
KVM_CAP_X86_TRIPLE_FAULT_EVENT: Final = 218
KVM_CAP_X86_NOTIFY_VMEXIT: Final = 219
KVM_CAP_S390_CPU_TOPOLOGY: Final = 222
KVM_CAP_DIRTY_LOG_RING_ACQ_REL: Final = 223
KVM_CAP_X86_APIC_BUS_CYCLES_NS: Final = 237

# Machine types of KVM_CREATE_VM (arm64: the address width, see uapi.arm64)
KVM_VM_S390_UCONTROL: Final = 1
KVM_VM_PPC_HV: Final = 1
KVM_VM_PPC_PR: Final = 2

# KVM_CREATE_DEVICE
KVM_CREATE_DEVICE_TEST: Final = 1
KVM_DEV_TYPE_FSL_MPIC_20: Final = 1
KVM_DEV_TYPE_FSL_MPIC_42: Final = 2
KVM_DEV_TYPE_XICS: Final = 3
KVM_DEV_TYPE_VFIO: Final = 4
KVM_DEV_TYPE_ARM_VGIC_V2: Final = 5
KVM_DEV_TYPE_FLIC: Final = 6
KVM_DEV_TYPE_ARM_VGIC_V3: Final = 7
KVM_DEV_TYPE_ARM_VGIC_ITS: Final = 8
KVM_DEV_TYPE_XIVE: Final = 9
KVM_DEV_TYPE_ARM_PV_TIME: Final = 10
KVM_DEV_TYPE_MAX: Final = 11

# Attributes of KVM_DEV_TYPE_VFIO
KVM_DEV_VFIO_GROUP: Final = 1
KVM_DEV_VFIO_GROUP_ADD: Final = 1
KVM_DEV_VFIO_GROUP_DEL: Final = 2
KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE: Final = 3

# KVM_SET_USER_MEMORY_REGION
KVM_MEM_LOG_DIRTY_PAGES: Final = 1
KVM_MEM_READONLY: Final = 2
KVM_MEM_MAX_NR_PAGES: Final = (1 << 31) - 1
"""Most pages of one slot (kernel-internal, but it decides an errno)."""
KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE: Final = 1
KVM_DIRTY_LOG_INITIALLY_SET: Final = 2
KVM_DIRTY_LOG_PAGE_OFFSET: Final = 64
"""The page of a vCPU's fd where its dirty ring begins."""
KVM_DIRTY_GFN_F_DIRTY: Final = 1
KVM_DIRTY_GFN_F_RESET: Final = 2

# Interrupt routing
KVM_IRQ_ROUTING_IRQCHIP: Final = 1
KVM_IRQ_ROUTING_MSI: Final = 2
KVM_IRQ_ROUTING_S390_ADAPTER: Final = 3
KVM_IRQ_ROUTING_HV_SINT: Final = 4
KVM_IRQ_ROUTING_XEN_EVTCHN: Final = 5
KVM_MAX_IRQ_ROUTES: Final = 4096
KVM_MSI_VALID_DEVID: Final = 1
KVM_IRQFD_FLAG_DEASSIGN: Final = 1
KVM_IRQFD_FLAG_RESAMPLE: Final = 2
KVM_IOEVENTFD_FLAG_DATAMATCH: Final = 1
KVM_IOEVENTFD_FLAG_PIO: Final = 2
KVM_IOEVENTFD_FLAG_DEASSIGN: Final = 4
KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY: Final = 8

# KVM_GET/SET_MP_STATE
KVM_MP_STATE_RUNNABLE: Final = 0
KVM_MP_STATE_UNINITIALIZED: Final = 1
KVM_MP_STATE_INIT_RECEIVED: Final = 2
KVM_MP_STATE_HALTED: Final = 3
KVM_MP_STATE_SIPI_RECEIVED: Final = 4
KVM_MP_STATE_STOPPED: Final = 5
KVM_MP_STATE_CHECK_STOP: Final = 6
KVM_MP_STATE_OPERATING: Final = 7
KVM_MP_STATE_LOAD: Final = 8
KVM_MP_STATE_AP_RESET_HOLD: Final = 9
KVM_MP_STATE_SUSPENDED: Final = 10

# Register ids of KVM_GET/SET_ONE_REG: architecture, size, register
KVM_REG_ARCH_MASK: Final = 0xFF00_0000_0000_0000
KVM_REG_X86: Final = 0x2000_0000_0000_0000
KVM_REG_PPC: Final = 0x1000_0000_0000_0000
KVM_REG_S390: Final = 0x5000_0000_0000_0000
KVM_REG_ARM64: Final = 0x6000_0000_0000_0000
KVM_REG_MIPS: Final = 0x7000_0000_0000_0000
KVM_REG_SIZE_SHIFT: Final = 52
KVM_REG_SIZE_MASK: Final = 0x00F0_0000_0000_0000
KVM_REG_SIZE_U8: Final = 0x0000_0000_0000_0000
KVM_REG_SIZE_U16: Final = 0x0010_0000_0000_0000
KVM_REG_SIZE_U32: Final = 0x0020_0000_0000_0000
KVM_REG_SIZE_U64: Final = 0x0030_0000_0000_0000
KVM_REG_SIZE_U128: Final = 0x0040_0000_0000_0000
KVM_REG_SIZE_U256: Final = 0x0050_0000_0000_0000
KVM_REG_SIZE_U512: Final = 0x0060_0000_0000_0000
KVM_REG_SIZE_U2048: Final = 0x0080_0000_0000_0000


def reg_size(reg_id: int) -> int:
    """Bytes of the register that a KVM_GET/SET_ONE_REG id names (bits 55:52 are the logarithm)."""
    return 1 << ((reg_id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT)


# struct kvm_run, the area shared with a vCPU: byte offsets of the head; the exit's own members follow at
# KVM_RUN_EXIT, as one of the KvmRun* structs below.
KVM_RUN_REQUEST_INTERRUPT_WINDOW: Final = 0  # u8
KVM_RUN_IMMEDIATE_EXIT: Final = 1  # u8
KVM_RUN_EXIT_REASON: Final = 8  # u32
KVM_RUN_READY_FOR_INTERRUPT_INJECTION: Final = 12  # u8
KVM_RUN_IF_FLAG: Final = 13  # u8
KVM_RUN_FLAGS: Final = 14  # u16
KVM_RUN_CR8: Final = 16  # u64
KVM_RUN_APIC_BASE: Final = 24  # u64
KVM_RUN_EXIT: Final = 32  # 256 bytes
KVM_RUN_VALID_REGS: Final = 288  # u64
KVM_RUN_DIRTY_REGS: Final = 296  # u64
KVM_RUN_SYNC_REGS: Final = 304  # 2048 bytes; arm64: device_irq_level, u64
KVM_RUN_SIZE: Final = 2352

KVM_EXIT_UNKNOWN: Final = 0
KVM_EXIT_EXCEPTION: Final = 1
KVM_EXIT_IO: Final = 2
KVM_EXIT_HYPERCALL: Final = 3
KVM_EXIT_DEBUG: Final = 4
KVM_EXIT_HLT: Final = 5
KVM_EXIT_MMIO: Final = 6
KVM_EXIT_IRQ_WINDOW_OPEN: Final = 7
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_FAIL_ENTRY: Final = 9
KVM_EXIT_INTR: Final = 10
KVM_EXIT_SET_TPR: Final = 11
KVM_EXIT_TPR_ACCESS: Final = 12
KVM_EXIT_S390_SIEIC: Final = 13
KVM_EXIT_S390_RESET: Final = 14
KVM_EXIT_NMI: Final = 16
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_EXIT_OSI: Final = 18
KVM_EXIT_PAPR_HCALL: Final = 19
KVM_EXIT_S390_UCONTROL: Final = 20
KVM_EXIT_WATCHDOG: Final = 21
KVM_EXIT_S390_TSCH: Final = 22
KVM_EXIT_EPR: Final = 23
KVM_EXIT_SYSTEM_EVENT: Final = 24
KVM_EXIT_S390_STSI: Final = 25
KVM_EXIT_IOAPIC_EOI: Final = 26
KVM_EXIT_HYPERV: Final = 27
KVM_EXIT_ARM_NISV: Final = 28
KVM_EXIT_X86_RDMSR: Final = 29
KVM_EXIT_X86_WRMSR: Final = 30
KVM_EXIT_DIRTY_RING_FULL: Final = 31
KVM_EXIT_AP_RESET_HOLD: Final = 32
KVM_EXIT_XEN: Final = 34
KVM_EXIT_NOTIFY: Final = 37

KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED: Final = 1
KVM_EXIT_IO_IN: Final = 0
KVM_EXIT_IO_OUT: Final = 1
KVM_SYSTEM_EVENT_SHUTDOWN: Final = 1
KVM_SYSTEM_EVENT_RESET: Final = 2
KVM_SYSTEM_EVENT_CRASH: Final = 3
KVM_SYSTEM_EVENT_WAKEUP: Final = 4
KVM_SYSTEM_EVENT_SUSPEND: Final = 5


@cstruct
class KvmRunUnknown(CStruct):
    """KVM_EXIT_UNKNOWN: what the hardware said."""

    hardware_exit_reason: u64 = 0


@cstruct
class KvmRunFailEntry(CStruct):
    """KVM_EXIT_FAIL_ENTRY: the vCPU could not be entered."""

    hardware_entry_failure_reason: u64 = 0
    cpu: u32 = 0


@cstruct
class KvmRunIo(CStruct):
    """KVM_EXIT_IO: ``count`` accesses of ``size`` bytes; their data is at ``data_offset`` of the area."""

    direction: u8 = 0
    size: u8 = 0
    port: u16 = 0
    count: u32 = 0
    data_offset: u64 = 0


@cstruct
class KvmRunMmio(CStruct):
    """KVM_EXIT_MMIO: one access; ``data`` is in the guest's byte order."""

    phys_addr: u64 = 0
    data: Annotated[bytes, "8s"] = bytes(8)
    len: u32 = 0
    is_write: u8 = 0


@cstruct
class KvmRunInternalError(CStruct):
    """KVM_EXIT_INTERNAL_ERROR: the kernel gave up."""

    suberror: u32 = 0
    ndata: u32 = 0
    data: Annotated[tuple[int, ...], Array("Q", 16)] = (0,) * 16


@cstruct
class KvmRunSystemEvent(CStruct):
    """KVM_EXIT_SYSTEM_EVENT: shutdown, reset and the like; ``data[0]`` is also called flags."""

    type: u32 = 0
    ndata: u32 = 0
    data: Annotated[tuple[int, ...], Array("Q", 16)] = (0,) * 16


@cstruct
class KvmUserspaceMemoryRegion(CStruct):
    """KVM_SET_USER_MEMORY_REGION. ``slot`` is the number in bits 15:0 and the address space in 31:16."""

    slot: u32 = 0
    flags: u32 = 0
    guest_phys_addr: u64 = 0
    memory_size: u64 = 0
    userspace_addr: u64 = 0


@cstruct
class KvmDirtyLog(CStruct):
    """KVM_GET_DIRTY_LOG; ``dirty_bitmap`` is a user address."""

    slot: u32 = 0
    padding1: u32 = 0
    dirty_bitmap: u64 = 0


@cstruct
class KvmDirtyGfn(CStruct):
    """An entry of a dirty ring; ``slot`` has the address space in its upper half, ``offset`` counts pages."""

    flags: u32 = 0
    slot: u32 = 0
    offset: u64 = 0


@cstruct
class KvmClearDirtyLog(CStruct):
    """KVM_CLEAR_DIRTY_LOG; ``dirty_bitmap`` is a user address."""

    slot: u32 = 0
    num_pages: u32 = 0
    first_page: u64 = 0
    dirty_bitmap: u64 = 0


@cstruct
class KvmCreateDevice(CStruct):
    """KVM_CREATE_DEVICE; ``fd`` is written by the kernel."""

    type: u32 = 0
    fd: u32 = 0
    flags: u32 = 0


@cstruct
class KvmDeviceAttr(CStruct):
    """KVM_SET/GET/HAS_DEVICE_ATTR; ``addr`` is the user address of the value."""

    flags: u32 = 0
    group: u32 = 0
    attr: u64 = 0
    addr: u64 = 0


@cstruct
class KvmEnableCap(CStruct):
    """KVM_ENABLE_CAP."""

    cap: u32 = 0
    flags: u32 = 0
    args: Annotated[tuple[int, ...], Array("Q", 4)] = (0,) * 4
    pad: Annotated[bytes, "64s"] = bytes(64)


@cstruct
class KvmOneReg(CStruct):
    """KVM_GET/SET_ONE_REG; ``addr`` is the user address of the value."""

    id: u64 = 0
    addr: u64 = 0


@cstruct
class KvmRegList(CStruct):
    """Head of KVM_GET_REG_LIST; ``n`` ids of 64 bits follow."""

    n: u64 = 0


@cstruct
class KvmMpState(CStruct):
    """KVM_GET/SET_MP_STATE."""

    mp_state: u32 = 0


@cstruct
class KvmIrqLevel(CStruct):
    """KVM_IRQ_LINE(_STATUS); the status (s32) comes back in the place of ``irq``."""

    irq: u32 = 0
    level: u32 = 0


@cstruct
class KvmIrqRouting(CStruct):
    """KVM_SET_GSI_ROUTING: the head, before ``nr`` entries."""

    nr: u32 = 0
    flags: u32 = 0


@cstruct
class KvmIrqRoutingEntry(CStruct):
    """One route; ``u`` is unpacked by the class for ``type``, from KvmIrqRoutingIrqchip on."""

    gsi: u32 = 0
    type: u32 = 0
    flags: u32 = 0
    pad: u32 = 0
    u: Annotated[bytes, "32s"] = bytes(32)


@cstruct
class KvmIrqRoutingIrqchip(CStruct):
    """Route type KVM_IRQ_ROUTING_IRQCHIP."""

    irqchip: u32 = 0
    pin: u32 = 0


@cstruct
class KvmIrqRoutingMsi(CStruct):
    """Route type KVM_IRQ_ROUTING_MSI; ``devid`` counts with KVM_MSI_VALID_DEVID in the entry's flags."""

    address_lo: u32 = 0
    address_hi: u32 = 0
    data: u32 = 0
    devid: u32 = 0


@cstruct
class KvmIrqRoutingS390Adapter(CStruct):
    """Route type KVM_IRQ_ROUTING_S390_ADAPTER; offsets count bits."""

    ind_addr: u64 = 0
    summary_addr: u64 = 0
    ind_offset: u64 = 0
    summary_offset: u32 = 0
    adapter_id: u32 = 0


@cstruct
class KvmIrqRoutingHvSint(CStruct):
    """Route type KVM_IRQ_ROUTING_HV_SINT."""

    vcpu: u32 = 0
    sint: u32 = 0


@cstruct
class KvmIrqRoutingXenEvtchn(CStruct):
    """Route type KVM_IRQ_ROUTING_XEN_EVTCHN, and KVM_XEN_HVM_EVTCHN_SEND."""

    port: u32 = 0
    vcpu: u32 = 0
    priority: u32 = 0


@cstruct
class KvmMsi(CStruct):
    """KVM_SIGNAL_MSI; ``devid`` counts with KVM_MSI_VALID_DEVID in flags."""

    address_lo: u32 = 0
    address_hi: u32 = 0
    data: u32 = 0
    flags: u32 = 0
    devid: u32 = 0
    pad: Annotated[bytes, "12s"] = bytes(12)


@cstruct
class KvmIrqfd(CStruct):
    """KVM_IRQFD."""

    fd: u32 = 0
    gsi: u32 = 0
    flags: u32 = 0
    resamplefd: u32 = 0
    pad: Annotated[bytes, "16s"] = bytes(16)


@cstruct
class KvmIoeventfd(CStruct):
    """KVM_IOEVENTFD."""

    datamatch: u64 = 0
    addr: u64 = 0
    len: u32 = 0
    fd: s32 = 0
    flags: u32 = 0
    pad: Annotated[bytes, "36s"] = bytes(36)


@cstruct
class KvmVfioSpaprTce(CStruct):
    """KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE."""

    groupfd: s32 = 0
    tablefd: s32 = 0


ROUTE_CLASSES: Final[dict[int, type[CStruct]]] = {
    KVM_IRQ_ROUTING_IRQCHIP: KvmIrqRoutingIrqchip,
    KVM_IRQ_ROUTING_MSI: KvmIrqRoutingMsi,
    KVM_IRQ_ROUTING_S390_ADAPTER: KvmIrqRoutingS390Adapter,
    KVM_IRQ_ROUTING_HV_SINT: KvmIrqRoutingHvSint,
    KVM_IRQ_ROUTING_XEN_EVTCHN: KvmIrqRoutingXenEvtchn,
}
"""Route type to the class of the entry's union."""
