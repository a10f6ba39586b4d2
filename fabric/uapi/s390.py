"""What s390 adds to the KVM interface: FLIC and VM attributes, interrupt types, and their structs.

Structs are in the byte order of the machine fabric runs on, as everything userspace hands over; only what lies
in guest memory is big-endian. Sources: the KVM API document, the s390_flic device document and the vm document
of Linux 6.1.
"""

from __future__ import annotations

from typing import Annotated, Final

from fabric.uapi.codec import Array, Bits, CStruct, Word, cstruct, u8, u16, u32, u64, word

# FLIC
KVM_DEV_FLIC_GET_ALL_IRQS: Final = 1
KVM_DEV_FLIC_ENQUEUE: Final = 2
KVM_DEV_FLIC_CLEAR_IRQS: Final = 3
KVM_DEV_FLIC_APF_ENABLE: Final = 4
KVM_DEV_FLIC_APF_DISABLE_WAIT: Final = 5
KVM_DEV_FLIC_ADAPTER_REGISTER: Final = 6
KVM_DEV_FLIC_ADAPTER_MODIFY: Final = 7
KVM_DEV_FLIC_CLEAR_IO_IRQ: Final = 8
KVM_DEV_FLIC_AISM: Final = 9
KVM_DEV_FLIC_AIRQ_INJECT: Final = 10
KVM_DEV_FLIC_AISM_ALL: Final = 11
KVM_S390_FLIC_MAX_BUFFER: Final = 0x2000000
KVM_S390_MAX_FLOAT_IRQS: Final = 0x4100A
MAX_S390_IO_ADAPTERS: Final = 64
MAX_ISC: Final = 7
KVM_S390_ADAPTER_SUPPRESSIBLE: Final = 1
KVM_S390_IO_ADAPTER_MASK: Final = 1
KVM_S390_IO_ADAPTER_MAP: Final = 2
KVM_S390_IO_ADAPTER_UNMAP: Final = 3
KVM_S390_AIS_MODE_ALL: Final = 0
KVM_S390_AIS_MODE_SINGLE: Final = 1
KVM_S390_IRQ_SIZE: Final = 72

# VM attributes
KVM_S390_VM_MEM_CTRL: Final = 0
KVM_S390_VM_TOD: Final = 1
KVM_S390_VM_CRYPTO: Final = 2
KVM_S390_VM_CPU_MODEL: Final = 3
KVM_S390_VM_MIGRATION: Final = 4
KVM_S390_VM_CPU_TOPOLOGY: Final = 5
KVM_S390_VM_MEM_ENABLE_CMMA: Final = 0
KVM_S390_VM_MEM_CLR_CMMA: Final = 1
KVM_S390_VM_MEM_LIMIT_SIZE: Final = 2
KVM_S390_NO_MEM_LIMIT: Final = 0xFFFFFFFFFFFFFFFF
KVM_S390_VM_TOD_LOW: Final = 0
KVM_S390_VM_TOD_HIGH: Final = 1
KVM_S390_VM_TOD_EXT: Final = 2
KVM_S390_VM_CPU_PROCESSOR: Final = 0
KVM_S390_VM_CPU_MACHINE: Final = 1
KVM_S390_VM_CPU_PROCESSOR_FEAT: Final = 2
KVM_S390_VM_CPU_MACHINE_FEAT: Final = 3
KVM_S390_VM_CPU_PROCESSOR_SUBFUNC: Final = 4
KVM_S390_VM_CPU_MACHINE_SUBFUNC: Final = 5
KVM_S390_VM_CPU_FEAT_NR_BITS: Final = 1024
KVM_S390_VM_CPU_FEAT_ESOP: Final = 0
KVM_S390_VM_CPU_FEAT_SIEF2: Final = 1
KVM_S390_VM_CPU_FEAT_64BSCAO: Final = 2
KVM_S390_VM_CPU_FEAT_SIIF: Final = 3
KVM_S390_VM_CPU_FEAT_GPERE: Final = 4
KVM_S390_VM_CPU_FEAT_GSLS: Final = 5
KVM_S390_VM_CPU_FEAT_IB: Final = 6
KVM_S390_VM_CPU_FEAT_CEI: Final = 7
KVM_S390_VM_CPU_FEAT_IBS: Final = 8
KVM_S390_VM_CPU_FEAT_SKEY: Final = 9
KVM_S390_VM_CPU_FEAT_CMMA: Final = 10
KVM_S390_VM_CPU_FEAT_PFMFI: Final = 11
KVM_S390_VM_CPU_FEAT_SIGPIF: Final = 12
KVM_S390_VM_CPU_FEAT_KSS: Final = 13
KVM_S390_VM_CRYPTO_ENABLE_AES_KW: Final = 0
KVM_S390_VM_CRYPTO_ENABLE_DEA_KW: Final = 1
KVM_S390_VM_CRYPTO_DISABLE_AES_KW: Final = 2
KVM_S390_VM_CRYPTO_DISABLE_DEA_KW: Final = 3
KVM_S390_VM_CRYPTO_ENABLE_APIE: Final = 4
KVM_S390_VM_CRYPTO_DISABLE_APIE: Final = 5
KVM_S390_VM_MIGRATION_STOP: Final = 0
KVM_S390_VM_MIGRATION_START: Final = 1
KVM_S390_VM_MIGRATION_STATUS: Final = 2

# Interrupt types of KvmS390Irq
KVM_S390_SIGP_STOP: Final = 0xFFFE0000
KVM_S390_PROGRAM_INT: Final = 0xFFFE0001
KVM_S390_SIGP_SET_PREFIX: Final = 0xFFFE0002
KVM_S390_RESTART: Final = 0xFFFE0003
KVM_S390_INT_PFAULT_INIT: Final = 0xFFFE0004
KVM_S390_INT_PFAULT_DONE: Final = 0xFFFE0005
KVM_S390_MCHK: Final = 0xFFFE1000
KVM_S390_INT_CLOCK_COMP: Final = 0xFFFF1004
KVM_S390_INT_CPU_TIMER: Final = 0xFFFF1005
KVM_S390_INT_VIRTIO: Final = 0xFFFF2603
KVM_S390_INT_SERVICE: Final = 0xFFFF2401
KVM_S390_INT_EMERGENCY: Final = 0xFFFF1201
KVM_S390_INT_EXTERNAL_CALL: Final = 0xFFFF1202
KVM_S390_INT_IO_MIN: Final = 0
KVM_S390_INT_IO_MAX: Final = 0xFFFDFFFF


@cstruct
class KvmS390Irq(CStruct):
    """One interrupt: KVM_DEV_FLIC_ENQUEUE, GET_ALL_IRQS, KVM_S390_IRQ; ``u`` by ``type``."""

    type: u64 = 0
    u: Annotated[bytes, "64s"] = bytes(64)


@cstruct
class KvmS390IoInfo(CStruct):
    """I/O interrupt; ``io_int_word`` is an S390IoIntWord."""

    subchannel_id: u16 = 0
    subchannel_nr: u16 = 0
    io_int_parm: u32 = 0
    io_int_word: u32 = 0


@cstruct
class KvmS390ExtInfo(CStruct):
    """Service signal, virtio, pfault."""

    ext_params: u32 = 0
    pad: u32 = 0
    ext_params2: u64 = 0


@cstruct
class KvmS390MchkInfo(CStruct):
    """Machine check."""

    cr14: u64 = 0
    mcic: u64 = 0
    failing_storage_address: u64 = 0
    ext_damage_code: u32 = 0
    pad: u32 = 0
    fixed_logout: Annotated[bytes, "16s"] = bytes(16)


@cstruct
class KvmS390PgmInfo(CStruct):
    """Program interrupt."""

    trans_exc_code: u64 = 0
    mon_code: u64 = 0
    per_address: u64 = 0
    data_exc_code: u32 = 0
    code: u16 = 0
    mon_class_nr: u16 = 0
    per_code: u8 = 0
    per_atmid: u8 = 0
    exc_access_id: u8 = 0
    per_access_id: u8 = 0
    op_access_id: u8 = 0
    flags: u8 = 0
    pad: Annotated[bytes, "2s"] = bytes(2)


@cstruct
class KvmS390PrefixInfo(CStruct):
    """SIGP set prefix."""

    address: u32 = 0


@cstruct
class KvmS390ExtcallInfo(CStruct):
    """External call."""

    code: u16 = 0


@cstruct
class KvmS390EmergInfo(CStruct):
    """Emergency signal."""

    code: u16 = 0


@cstruct
class KvmS390StopInfo(CStruct):
    """SIGP stop; flag 1 is store status."""

    flags: u32 = 0


@word(64)
class S390IrqIoType(Word):
    """``type`` of an I/O interrupt, 0 to 0xfffdffff."""

    ai: Annotated[int, Bits(26, 26)] = 0
    cssid: Annotated[int, Bits(25, 18)] = 0
    ssid: Annotated[int, Bits(17, 16)] = 0
    schid: Annotated[int, Bits(15, 0)] = 0


@word(32)
class S390IoIntWord(Word):
    """I/O interruption word; ``ai`` marks an adapter interrupt."""

    ai: Annotated[int, Bits(31, 31)] = 0
    isc: Annotated[int, Bits(29, 27)] = 0


@cstruct
class KvmS390IoAdapter(CStruct):
    """KVM_DEV_FLIC_ADAPTER_REGISTER."""

    id: u32 = 0
    isc: u8 = 0
    maskable: u8 = 0
    swap: u8 = 0
    flags: u8 = 0


@cstruct
class KvmS390IoAdapterReq(CStruct):
    """KVM_DEV_FLIC_ADAPTER_MODIFY."""

    id: u32 = 0
    type: u8 = 0
    mask: u8 = 0
    pad0: u16 = 0
    addr: u64 = 0


@cstruct
class KvmS390AisReq(CStruct):
    """KVM_DEV_FLIC_AISM."""

    isc: u8 = 0
    mode: u16 = 0


@cstruct
class KvmS390AisAll(CStruct):
    """KVM_DEV_FLIC_AISM_ALL; bit 7 of each mask is ISC 0."""

    simm: u8 = 0
    nimm: u8 = 0


@word(32)
class S390ClearIoWord(Word):
    """Value of KVM_DEV_FLIC_CLEAR_IO_IRQ."""

    subchannel_id: Annotated[int, Bits(31, 16)] = 0
    subchannel_nr: Annotated[int, Bits(15, 0)] = 0


@word(64)
class S390AdapterIndicators(Word):
    """Indicator and summary bits in guest memory: big-endian 64-bit words."""

    word: Annotated[int, Bits(63, 0)] = 0


@cstruct
class KvmS390VmCpuProcessor(CStruct):
    """KVM_S390_VM_CPU_PROCESSOR."""

    cpuid: u64 = 0
    ibc: u16 = 0
    pad: Annotated[bytes, "6s"] = bytes(6)
    fac_list: Annotated[tuple[int, ...], Array("Q", 256)] = (0,) * 256


@cstruct
class KvmS390VmCpuMachine(CStruct):
    """KVM_S390_VM_CPU_MACHINE; ``ibc`` has the lowest level in 27:16, the highest in 11:0."""

    cpuid: u64 = 0
    ibc: u32 = 0
    pad: Annotated[bytes, "4s"] = bytes(4)
    fac_mask: Annotated[tuple[int, ...], Array("Q", 256)] = (0,) * 256
    fac_list: Annotated[tuple[int, ...], Array("Q", 256)] = (0,) * 256


@cstruct
class KvmS390VmCpuFeat(CStruct):
    """KVM_S390_VM_CPU_*_FEAT; feature n is bit 63 - n % 64 of word n // 64."""

    feat: Annotated[tuple[int, ...], Array("Q", 16)] = (0,) * 16


@cstruct
class KvmS390VmCpuSubfunc(CStruct):
    """KVM_S390_VM_CPU_*_SUBFUNC."""

    plo: Annotated[bytes, "32s"] = bytes(32)
    ptff: Annotated[bytes, "16s"] = bytes(16)
    kmac: Annotated[bytes, "16s"] = bytes(16)
    kmc: Annotated[bytes, "16s"] = bytes(16)
    km: Annotated[bytes, "16s"] = bytes(16)
    kimd: Annotated[bytes, "16s"] = bytes(16)
    klmd: Annotated[bytes, "16s"] = bytes(16)
    pckmo: Annotated[bytes, "16s"] = bytes(16)
    kmctr: Annotated[bytes, "16s"] = bytes(16)
    kmf: Annotated[bytes, "16s"] = bytes(16)
    kmo: Annotated[bytes, "16s"] = bytes(16)
    pcc: Annotated[bytes, "16s"] = bytes(16)
    ppno: Annotated[bytes, "16s"] = bytes(16)
    kma: Annotated[bytes, "16s"] = bytes(16)
    kdsa: Annotated[bytes, "16s"] = bytes(16)
    sortl: Annotated[bytes, "32s"] = bytes(32)
    dfltcc: Annotated[bytes, "32s"] = bytes(32)
    reserved: Annotated[bytes, "1728s"] = bytes(1728)


@cstruct
class KvmS390VmTodClock(CStruct):
    """KVM_S390_VM_TOD_EXT."""

    epoch_idx: u8 = 0
    tod: u64 = 0
