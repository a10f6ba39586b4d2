"""What arm64 adds to the KVM interface: VGIC attributes, vCPU features and attributes, register ids.

Sources: the KVM API and the arm-vgic, arm-vgic-v3, arm-vgic-its and vcpu device documents of Linux 6.1.
Affinities travel in three forms, which the helpers at the end convert: as MPIDR_EL1 (Aff3 in 39:32,
Aff2..0 in 23:0), as attribute number (Aff3..0 in 63:32), and as the 32-bit Aff3.Aff2.Aff1.Aff0 of GICR_TYPER.
"""

from __future__ import annotations

from typing import Annotated, Final

from fabric.uapi.codec import Array, Bits, CStruct, Word, cstruct, u8, u16, u32, u64, word
from fabric.uapi.kvm import (
    KVM_REG_ARM64,
    KVM_REG_SIZE_U64,
    KVM_REG_SIZE_U256,
    KVM_REG_SIZE_U512,
    KVM_REG_SIZE_U2048,
)

# KVM_CREATE_VM
KVM_VM_TYPE_ARM_IPA_SIZE_MASK: Final = 0xFF
"""Bits of the machine type that hold the guest address width; 0 stands for 40."""

# VGIC devices: groups, and the attributes of each
KVM_DEV_ARM_VGIC_GRP_ADDR: Final = 0
KVM_DEV_ARM_VGIC_GRP_DIST_REGS: Final = 1
KVM_DEV_ARM_VGIC_GRP_CPU_REGS: Final = 2
KVM_DEV_ARM_VGIC_GRP_NR_IRQS: Final = 3
KVM_DEV_ARM_VGIC_GRP_CTRL: Final = 4
KVM_DEV_ARM_VGIC_GRP_REDIST_REGS: Final = 5
KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS: Final = 6
KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO: Final = 7
KVM_DEV_ARM_VGIC_GRP_ITS_REGS: Final = 8

KVM_VGIC_V2_ADDR_TYPE_DIST: Final = 0
KVM_VGIC_V2_ADDR_TYPE_CPU: Final = 1
KVM_VGIC_V3_ADDR_TYPE_DIST: Final = 2
KVM_VGIC_V3_ADDR_TYPE_REDIST: Final = 3
KVM_VGIC_ITS_ADDR_TYPE: Final = 4
KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION: Final = 5
KVM_VGIC_V2_DIST_SIZE: Final = 0x1000
KVM_VGIC_V2_CPU_SIZE: Final = 0x2000
KVM_VGIC_V3_DIST_SIZE: Final = 0x10000
KVM_VGIC_V3_REDIST_SIZE: Final = 0x20000
KVM_VGIC_V3_ITS_SIZE: Final = 0x20000

KVM_DEV_ARM_VGIC_CTRL_INIT: Final = 0
KVM_DEV_ARM_ITS_SAVE_TABLES: Final = 1
KVM_DEV_ARM_ITS_RESTORE_TABLES: Final = 2
KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES: Final = 3
KVM_DEV_ARM_ITS_CTRL_RESET: Final = 4

KVM_DEV_ARM_VGIC_CPUID_SHIFT: Final = 32
KVM_DEV_ARM_VGIC_CPUID_MASK: Final = 0xFF << 32
KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT: Final = 32
KVM_DEV_ARM_VGIC_V3_MPIDR_MASK: Final = 0xFFFF_FFFF << 32
KVM_DEV_ARM_VGIC_OFFSET_SHIFT: Final = 0
KVM_DEV_ARM_VGIC_OFFSET_MASK: Final = 0xFFFF_FFFF
KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK: Final = 0xFFFF
KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT: Final = 10
KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_MASK: Final = 0x3F_FFFF << 10
KVM_DEV_ARM_VGIC_LINE_LEVEL_INTID_MASK: Final = 0x3FF
VGIC_LEVEL_INFO_LINE_LEVEL: Final = 0

# Interrupt numbers and limits of the VGIC
VGIC_NR_SGIS: Final = 16
VGIC_NR_PPIS: Final = 16
VGIC_NR_PRIVATE_IRQS: Final = 32
VGIC_DEFAULT_NR_IRQS: Final = 256
VGIC_MAX_SPI: Final = 1019
VGIC_MAX_RESERVED: Final = 1023
VGIC_MIN_LPI: Final = 8192
VGIC_V2_MAX_CPUS: Final = 8
VGIC_V3_MAX_CPUS: Final = 512
VGIC_PRI_BITS: Final = 5
GICD_IIDR_IMPLEMENTER_ARM: Final = 0x43B
GICD_IIDR_PRODUCT_ID_KVM: Final = 0x4B
KVM_VGIC_IMP_REV_2: Final = 2
KVM_VGIC_IMP_REV_3: Final = 3
KVM_VGIC_IMP_REV_LATEST: Final = 3

# KVM_ARM_SET_DEVICE_ADDR
KVM_ARM_DEVICE_VGIC_V2: Final = 0
KVM_ARM_DEVICE_TYPE_SHIFT: Final = 0
KVM_ARM_DEVICE_TYPE_MASK: Final = 0xFFFF
KVM_ARM_DEVICE_ID_SHIFT: Final = 16
KVM_ARM_DEVICE_ID_MASK: Final = 0xFFFF << 16

# KVM_IRQ_LINE
KVM_ARM_IRQ_TYPE_CPU: Final = 0
KVM_ARM_IRQ_TYPE_SPI: Final = 1
KVM_ARM_IRQ_TYPE_PPI: Final = 2
KVM_ARM_IRQ_CPU_IRQ: Final = 0
KVM_ARM_IRQ_CPU_FIQ: Final = 1
KVM_ARM_IRQ_NUM_SHIFT: Final = 0
KVM_ARM_IRQ_NUM_MASK: Final = 0xFFFF
KVM_ARM_IRQ_VCPU_SHIFT: Final = 16
KVM_ARM_IRQ_VCPU_MASK: Final = 0xFF
KVM_ARM_IRQ_TYPE_SHIFT: Final = 24
KVM_ARM_IRQ_TYPE_MASK: Final = 0xF
KVM_ARM_IRQ_VCPU2_SHIFT: Final = 28
KVM_ARM_IRQ_VCPU2_MASK: Final = 0xF
KVM_NR_IRQCHIPS_ARM: Final = 1

# KVM_ARM_VCPU_INIT: targets, and feature bits of features[0]
KVM_ARM_TARGET_AEM_V8: Final = 0
KVM_ARM_TARGET_FOUNDATION_V8: Final = 1
KVM_ARM_TARGET_CORTEX_A57: Final = 2
KVM_ARM_TARGET_XGENE_POTENZA: Final = 3
KVM_ARM_TARGET_CORTEX_A53: Final = 4
KVM_ARM_TARGET_GENERIC_V8: Final = 5
KVM_ARM_NUM_TARGETS: Final = 6
KVM_ARM_VCPU_POWER_OFF: Final = 0
KVM_ARM_VCPU_EL1_32BIT: Final = 1
KVM_ARM_VCPU_PSCI_0_2: Final = 2
KVM_ARM_VCPU_PMU_V3: Final = 3
KVM_ARM_VCPU_SVE: Final = 4
KVM_ARM_VCPU_PTRAUTH_ADDRESS: Final = 5
KVM_ARM_VCPU_PTRAUTH_GENERIC: Final = 6
KVM_VCPU_MAX_FEATURES: Final = 7

# vCPU attribute groups
KVM_ARM_VCPU_PMU_V3_CTRL: Final = 0
KVM_ARM_VCPU_PMU_V3_IRQ: Final = 0
KVM_ARM_VCPU_PMU_V3_INIT: Final = 1
KVM_ARM_VCPU_PMU_V3_FILTER: Final = 2
KVM_ARM_VCPU_PMU_V3_SET_PMU: Final = 3
KVM_PMU_EVENT_ALLOW: Final = 0
KVM_PMU_EVENT_DENY: Final = 1
ARMV8_PMU_EVENT_SW_INCR: Final = 0
ARMV8_PMU_EVENT_CPU_CYCLES: Final = 0x11
ARMV8_PMU_EVENT_CHAIN: Final = 0x1E
KVM_ARM_VCPU_TIMER_CTRL: Final = 1
KVM_ARM_VCPU_TIMER_IRQ_VTIMER: Final = 0
KVM_ARM_VCPU_TIMER_IRQ_PTIMER: Final = 1
DEFAULT_VTIMER_IRQ: Final = 27
DEFAULT_PTIMER_IRQ: Final = 30
KVM_ARM_VCPU_PVTIME_CTRL: Final = 2
KVM_ARM_VCPU_PVTIME_IPA: Final = 0
ARM_SMCCC_HV_PV_TIME_FEATURES: Final = 0xC500_0020
ARM_SMCCC_HV_PV_TIME_ST: Final = 0xC500_0021
KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED: Final = 1
"""Why KVM_EXIT_FAIL_ENTRY: the vCPU's PMU is not one of the physical CPU that it came to."""

# Device interrupt lines in kvm_run (a GIC in userspace)
KVM_ARM_DEV_EL1_VTIMER: Final = 1
KVM_ARM_DEV_EL1_PTIMER: Final = 2
KVM_ARM_DEV_PMU: Final = 4

# Register ids
KVM_REG_ARM_COPROC_MASK: Final = 0x0FFF_0000
KVM_REG_ARM_CORE: Final = 0x0010_0000
KVM_REG_ARM_DEMUX: Final = 0x0011_0000
KVM_REG_ARM64_SYSREG: Final = 0x0013_0000
KVM_REG_ARM_FW: Final = 0x0014_0000
KVM_REG_ARM64_SVE: Final = 0x0015_0000
KVM_REG_ARM_FW_FEAT_BMAP: Final = 0x0016_0000


def arm64_sys_reg(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """The KVM_GET/SET_ONE_REG id of a 64-bit system register."""
    encoding = op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
    return KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG | encoding


def arm64_core_reg(offset: int, size: int = 8) -> int:
    """The id of a core register at a byte offset of struct kvm_regs (x0 at 0, sp at 248, pc at 256)."""
    return KVM_REG_ARM64 | (size.bit_length() - 1) << 52 | KVM_REG_ARM_CORE | offset // 4


KVM_REG_ARM_MPIDR_EL1: Final = arm64_sys_reg(3, 0, 0, 0, 5)
KVM_REG_ARM_TIMER_CTL: Final = arm64_sys_reg(3, 3, 14, 3, 1)
# The ids of compare value and counter are exchanged against the encodings of the registers they stand for
# (CNTV_CVAL_EL0 is 3,3,14,3,2). That was a slip, and it is ABI since.
KVM_REG_ARM_TIMER_CNT: Final = arm64_sys_reg(3, 3, 14, 3, 2)
KVM_REG_ARM_TIMER_CVAL: Final = arm64_sys_reg(3, 3, 14, 0, 2)
KVM_REG_ARM_PTIMER_CTL: Final = arm64_sys_reg(3, 3, 14, 2, 1)
KVM_REG_ARM_PTIMER_CVAL: Final = arm64_sys_reg(3, 3, 14, 2, 2)
KVM_REG_ARM_PTIMER_CNT: Final = arm64_sys_reg(3, 3, 14, 0, 1)


# Firmware registers: the PSCI version, what is told of CPU bugs, and bitmaps of the services of hypercalls
KVM_REG_ARM_PSCI_VERSION: Final = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW | 0
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1: Final = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW | 1
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2: Final = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW | 2
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_3: Final = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW | 3
KVM_REG_ARM_STD_BMAP: Final = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW_FEAT_BMAP | 0
KVM_REG_ARM_STD_HYP_BMAP: Final = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW_FEAT_BMAP | 1
KVM_REG_ARM_VENDOR_HYP_BMAP: Final = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW_FEAT_BMAP | 2
KVM_REG_ARM_STD_BIT_TRNG_V1_0: Final = 1 << 0
KVM_REG_ARM_STD_HYP_BIT_PV_TIME: Final = 1 << 0
KVM_REG_ARM_VENDOR_HYP_BIT_FUNC_FEAT: Final = 1 << 0
KVM_REG_ARM_VENDOR_HYP_BIT_PTP: Final = 1 << 1

# SVE registers, in slices of which there is one each: Z0-Z31, P0-P15, FFR; and the vector lengths as a bitmap
KVM_REG_ARM64_SVE_ZREG_BASE: Final = KVM_REG_ARM64 | KVM_REG_SIZE_U2048 | KVM_REG_ARM64_SVE
KVM_REG_ARM64_SVE_PREG_BASE: Final = KVM_REG_ARM64 | KVM_REG_SIZE_U256 | KVM_REG_ARM64_SVE | 0x400
KVM_REG_ARM64_SVE_FFR_BASE: Final = KVM_REG_ARM64 | KVM_REG_SIZE_U256 | KVM_REG_ARM64_SVE | 0x600
KVM_REG_ARM64_SVE_VLS: Final = KVM_REG_ARM64 | KVM_REG_SIZE_U512 | KVM_REG_ARM64_SVE | 0xFFFF


@cstruct
class KvmArmDeviceAddr(CStruct):
    """KVM_ARM_SET_DEVICE_ADDR."""

    id: u64 = 0
    addr: u64 = 0


@cstruct
class KvmVcpuInit(CStruct):
    """KVM_ARM_VCPU_INIT, KVM_ARM_PREFERRED_TARGET."""

    target: u32 = 0
    features: Annotated[tuple[int, ...], Array("I", 7)] = (0,) * 7


@cstruct
class KvmVcpuEvents(CStruct):
    """KVM_GET/SET_VCPU_EVENTS of arm64."""

    serror_pending: u8 = 0
    serror_has_esr: u8 = 0
    ext_dabt_pending: u8 = 0
    pad: Annotated[bytes, "5s"] = bytes(5)
    serror_esr: u64 = 0
    reserved: Annotated[tuple[int, ...], Array("I", 12)] = (0,) * 12


@cstruct
class KvmPmuEventFilter(CStruct):
    """KVM_ARM_VCPU_PMU_V3_FILTER."""

    base_event: u16 = 0
    nevents: u16 = 0
    action: u8 = 0
    pad: Annotated[bytes, "3s"] = bytes(3)


@cstruct
class KvmRunArmNisv(CStruct):
    """KVM_EXIT_ARM_NISV: a data abort without syndrome."""

    esr_iss: u64 = 0
    fault_ipa: u64 = 0


@cstruct(byteorder="<")
class PvtimeStolenTime(CStruct):
    """The stolen-time structure in guest memory; ``stolen_time`` in ns never goes back."""

    revision: u32 = 0
    attributes: u32 = 0
    stolen_time: u64 = 0


@cstruct(byteorder="<")
class ItsCommand(CStruct):
    """One entry of the ITS command queue in guest memory."""

    w0: u64 = 0
    w1: u64 = 0
    w2: u64 = 0
    w3: u64 = 0


@word(64)
class VgicV2RegAttr(Word):
    """Attribute number of the GICv2 register groups; ``vcpu_index`` is compared with the vCPU id."""

    vcpu_index: Annotated[int, Bits(39, 32)] = 0
    offset: Annotated[int, Bits(31, 0)] = 0


@word(64)
class VgicV3RegAttr(Word):
    """Attribute number of DIST_REGS (which ignores the affinity) and REDIST_REGS."""

    aff3: Annotated[int, Bits(63, 56)] = 0
    aff2: Annotated[int, Bits(55, 48)] = 0
    aff1: Annotated[int, Bits(47, 40)] = 0
    aff0: Annotated[int, Bits(39, 32)] = 0
    offset: Annotated[int, Bits(31, 0)] = 0


@word(64)
class VgicV3SysregAttr(Word):
    """Attribute number of CPU_SYSREGS."""

    aff3: Annotated[int, Bits(63, 56)] = 0
    aff2: Annotated[int, Bits(55, 48)] = 0
    aff1: Annotated[int, Bits(47, 40)] = 0
    aff0: Annotated[int, Bits(39, 32)] = 0
    op0: Annotated[int, Bits(15, 14)] = 0
    op1: Annotated[int, Bits(13, 11)] = 0
    crn: Annotated[int, Bits(10, 7)] = 0
    crm: Annotated[int, Bits(6, 3)] = 0
    op2: Annotated[int, Bits(2, 0)] = 0


@word(64)
class VgicV3LevelInfoAttr(Word):
    """Attribute number of LEVEL_INFO."""

    aff3: Annotated[int, Bits(63, 56)] = 0
    aff2: Annotated[int, Bits(55, 48)] = 0
    aff1: Annotated[int, Bits(47, 40)] = 0
    aff0: Annotated[int, Bits(39, 32)] = 0
    info: Annotated[int, Bits(31, 10)] = 0
    vintid: Annotated[int, Bits(9, 0)] = 0


@word(64)
class VgicV3RedistRegion(Word):
    """Value of KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION; ``base`` counts 64 KiB."""

    count: Annotated[int, Bits(63, 52)] = 0
    base: Annotated[int, Bits(51, 16)] = 0
    flags: Annotated[int, Bits(15, 12)] = 0
    index: Annotated[int, Bits(11, 0)] = 0


@word(32)
class Gicv2Pmr(Word):
    """GICC_PMR as the CPU register group has it: the mask shifted right by 3."""

    pmr: Annotated[int, Bits(4, 0)] = 0


@word(32)
class Gicv2Apr(Word):
    """GICC_APR0..3: bit n of word i stands for preemption level 32 * i + n."""

    active: Annotated[int, Bits(31, 0)] = 0


@word(32)
class GicdIidr(Word):
    """GICD_IIDR of both GIC models, and GITS_IIDR."""

    product: Annotated[int, Bits(31, 24)] = 0
    variant: Annotated[int, Bits(19, 16)] = 0
    revision: Annotated[int, Bits(15, 12)] = 0
    implementer: Annotated[int, Bits(11, 0)] = 0


@word(64)
class GitsBaser(Word):
    """GITS_BASER0 (devices) and GITS_BASER1 (collections)."""

    valid: Annotated[int, Bits(63, 63)] = 0
    indirect: Annotated[int, Bits(62, 62)] = 0
    inner_cache: Annotated[int, Bits(61, 59)] = 0
    type: Annotated[int, Bits(58, 56)] = 0
    outer_cache: Annotated[int, Bits(55, 53)] = 0
    entry_size: Annotated[int, Bits(52, 48)] = 0
    address_47_16: Annotated[int, Bits(47, 16)] = 0
    address_51_48: Annotated[int, Bits(15, 12)] = 0
    shareability: Annotated[int, Bits(11, 10)] = 0
    page_size: Annotated[int, Bits(9, 8)] = 0
    size: Annotated[int, Bits(7, 0)] = 0


@word(64)
class GitsCbaser(Word):
    """GITS_CBASER; ``address`` counts 4 KiB, ``size`` is 4 KiB pages minus one."""

    valid: Annotated[int, Bits(63, 63)] = 0
    inner_cache: Annotated[int, Bits(61, 59)] = 0
    outer_cache: Annotated[int, Bits(55, 53)] = 0
    address: Annotated[int, Bits(51, 12)] = 0
    shareability: Annotated[int, Bits(11, 10)] = 0
    size: Annotated[int, Bits(7, 0)] = 0


@word(64)
class ItsDte(Word):
    """Device table entry of ITS ABI revision 0; ``itt_addr`` counts 256 bytes, ``size`` is bits minus one."""

    valid: Annotated[int, Bits(63, 63)] = 0
    next: Annotated[int, Bits(62, 49)] = 0
    itt_addr: Annotated[int, Bits(48, 5)] = 0
    size: Annotated[int, Bits(4, 0)] = 0


@word(64)
class ItsCte(Word):
    """Collection table entry of ITS ABI revision 0."""

    valid: Annotated[int, Bits(63, 63)] = 0
    rdbase: Annotated[int, Bits(51, 16)] = 0
    icid: Annotated[int, Bits(15, 0)] = 0


@word(64)
class ItsIte(Word):
    """Interrupt translation entry of ITS ABI revision 0; ``pintid`` 0 means invalid."""

    next: Annotated[int, Bits(63, 48)] = 0
    pintid: Annotated[int, Bits(47, 16)] = 0
    icid: Annotated[int, Bits(15, 0)] = 0


@word(64)
class ItsL1Entry(Word):
    """Level-1 entry of an indirect device table; ``address`` counts 64 KiB."""

    valid: Annotated[int, Bits(63, 63)] = 0
    address: Annotated[int, Bits(51, 16)] = 0


@word(8)
class LpiConfig(Word):
    """A byte of the LPI configuration table; ``priority`` is the upper six bits of the priority."""

    priority: Annotated[int, Bits(7, 2)] = 0
    enable: Annotated[int, Bits(0, 0)] = 0


@word(8)
class LpiPending(Word):
    """A byte of an LPI pending table; bit n mod 8 of byte n div 8 stands for LPI n."""

    pending: Annotated[int, Bits(7, 0)] = 0


@word(64)
class ArmVmType(Word):
    """The machine type of KVM_CREATE_VM; 0 stands for 40 address bits."""

    ipa_bits: Annotated[int, Bits(7, 0)] = 0


@word(32)
class ArmIrqLine(Word):
    """The irq field of KVM_IRQ_LINE; the vCPU is number 256 * vcpu2_index + vcpu_index."""

    vcpu2_index: Annotated[int, Bits(31, 28)] = 0
    irq_type: Annotated[int, Bits(27, 24)] = 0
    vcpu_index: Annotated[int, Bits(23, 16)] = 0
    irq_id: Annotated[int, Bits(15, 0)] = 0


@word(64)
class ArmDeviceAddrId(Word):
    """The id field of KVM_ARM_SET_DEVICE_ADDR."""

    device: Annotated[int, Bits(31, 16)] = 0
    type: Annotated[int, Bits(15, 0)] = 0


def irq_line(irq_type: int, irq_id: int, vcpu: int = 0) -> int:
    """The irq field of KVM_IRQ_LINE for a vCPU number up to 4095 (KVM_CAP_ARM_IRQ_LINE_LAYOUT_2)."""
    return ArmIrqLine(vcpu >> 8, irq_type, vcpu & 0xFF, irq_id).pack()


MPIDR_RES1: Final = 1 << 31
"""Bit 31 of MPIDR_EL1 reads as one."""


def mpidr_for_vcpu_id(vcpu_id: int) -> int:
    """The MPIDR_EL1 that KVM_ARM_VCPU_INIT gives a vCPU: 16 to an Aff0 group, so that SGIs reach them all."""
    return MPIDR_RES1 | (vcpu_id & 0xF) | (vcpu_id >> 4 & 0xFF) << 8 | (vcpu_id >> 12 & 0xFF) << 16


def mpidr_to_affinity(mpidr: int) -> int:
    """MPIDR_EL1 to the 32-bit number Aff3.Aff2.Aff1.Aff0."""
    return (mpidr >> 32 & 0xFF) << 24 | mpidr & 0xFF_FFFF


def affinity_to_mpidr(affinity: int) -> int:
    """The 32-bit number Aff3.Aff2.Aff1.Aff0 to MPIDR_EL1, without its other bits."""
    return (affinity >> 24) << 32 | affinity & 0xFF_FFFF


def vgic_reg_attr(mpidr: int, offset: int) -> int:
    """The attribute number of a GICv3 register or system register of the vCPU with that MPIDR_EL1."""
    return mpidr_to_affinity(mpidr) << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT | offset
