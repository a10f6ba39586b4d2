"""What powerpc adds to the KVM interface: MPIC, XICS and XIVE attributes, register ids, and their structs.

Sources: the KVM API document and the mpic, xics and xive device documents of Linux 6.1.
"""

from __future__ import annotations

from typing import Annotated, Final

from fabric.uapi.codec import Bits, CStruct, Word, cstruct, u32, u64, word
from fabric.uapi.kvm import KVM_REG_PPC, KVM_REG_SIZE_U64, KVM_REG_SIZE_U128

# MPIC
KVM_DEV_MPIC_GRP_MISC: Final = 1
KVM_DEV_MPIC_BASE_ADDR: Final = 0
KVM_DEV_MPIC_GRP_REGISTER: Final = 2
KVM_DEV_MPIC_GRP_IRQ_ACTIVE: Final = 3
MPIC_REG_SIZE: Final = 0x40000

# XICS
KVM_DEV_XICS_GRP_SOURCES: Final = 1
KVM_DEV_XICS_GRP_CTRL: Final = 2
KVM_DEV_XICS_NR_SERVERS: Final = 1
KVM_XICS_DESTINATION_SHIFT: Final = 0
KVM_XICS_DESTINATION_MASK: Final = 0xFFFFFFFF
KVM_XICS_PRIORITY_SHIFT: Final = 32
KVM_XICS_PRIORITY_MASK: Final = 255
KVM_XICS_LEVEL_SENSITIVE: Final = 0x10000000000
KVM_XICS_MASKED: Final = 0x20000000000
KVM_XICS_PENDING: Final = 0x40000000000
KVM_XICS_PRESENTED: Final = 0x80000000000
KVM_XICS_QUEUED: Final = 0x100000000000

# XIVE
KVM_DEV_XIVE_GRP_CTRL: Final = 1
KVM_DEV_XIVE_RESET: Final = 1
KVM_DEV_XIVE_EQ_SYNC: Final = 2
KVM_DEV_XIVE_NR_SERVERS: Final = 3
KVM_DEV_XIVE_GRP_SOURCE: Final = 2
KVM_DEV_XIVE_GRP_SOURCE_CONFIG: Final = 3
KVM_DEV_XIVE_GRP_EQ_CONFIG: Final = 4
KVM_DEV_XIVE_GRP_SOURCE_SYNC: Final = 5
KVM_XIVE_LEVEL_SENSITIVE: Final = 1
KVM_XIVE_LEVEL_ASSERTED: Final = 2
KVM_XIVE_SOURCE_PRIORITY_SHIFT: Final = 0
KVM_XIVE_SOURCE_PRIORITY_MASK: Final = 7
KVM_XIVE_SOURCE_SERVER_SHIFT: Final = 3
KVM_XIVE_SOURCE_SERVER_MASK: Final = 0xFFFFFFF8
KVM_XIVE_SOURCE_MASKED_SHIFT: Final = 32
KVM_XIVE_SOURCE_MASKED_MASK: Final = 0x100000000
KVM_XIVE_SOURCE_EISN_SHIFT: Final = 33
KVM_XIVE_SOURCE_EISN_MASK: Final = 0xFFFFFFFE00000000
KVM_XIVE_EQ_PRIORITY_SHIFT: Final = 0
KVM_XIVE_EQ_PRIORITY_MASK: Final = 7
KVM_XIVE_EQ_SERVER_SHIFT: Final = 3
KVM_XIVE_EQ_SERVER_MASK: Final = 0xFFFFFFF8
KVM_XIVE_EQ_ALWAYS_NOTIFY: Final = 1
KVM_XIVE_TIMA_PAGE_OFFSET: Final = 0
KVM_XIVE_ESB_PAGE_OFFSET: Final = 4
# Register ids
KVM_REG_PPC_ICP_STATE: Final = KVM_REG_PPC | KVM_REG_SIZE_U64 | 0x8C
KVM_REG_PPC_VP_STATE: Final = KVM_REG_PPC | KVM_REG_SIZE_U128 | 0x8D


@word(64)
class XicsSource(Word):
    """Value of KVM_DEV_XICS_GRP_SOURCES; ``queued`` and ``presented`` are the kernel's own."""

    queued: Annotated[int, Bits(44, 44)] = 0
    presented: Annotated[int, Bits(43, 43)] = 0
    pending: Annotated[int, Bits(42, 42)] = 0
    masked: Annotated[int, Bits(41, 41)] = 0
    level_sensitive: Annotated[int, Bits(40, 40)] = 0
    priority: Annotated[int, Bits(39, 32)] = 0
    destination: Annotated[int, Bits(31, 0)] = 0


@word(64)
class XicsIcpState(Word):
    """KVM_REG_PPC_ICP_STATE: what the presentation controller of a vCPU holds."""

    cppr: Annotated[int, Bits(63, 56)] = 0
    xisr: Annotated[int, Bits(55, 32)] = 0
    mfrr: Annotated[int, Bits(31, 24)] = 0
    ppri: Annotated[int, Bits(23, 16)] = 0


@word(32)
class MpicIvpr(Word):
    """IVPR of MPIC sources, IPIs and timers; ``sense`` 1 is level, ``mode`` is never stored."""

    mask: Annotated[int, Bits(31, 31)] = 0
    activity: Annotated[int, Bits(30, 30)] = 0
    mode: Annotated[int, Bits(29, 29)] = 0
    polarity: Annotated[int, Bits(23, 23)] = 0
    sense: Annotated[int, Bits(22, 22)] = 0
    priority: Annotated[int, Bits(19, 16)] = 0
    vector: Annotated[int, Bits(15, 0)] = 0


@word(32)
class MpicMsiir(Word):
    """MSIIR of the MPIC, and the data word of MSI routes."""

    srs: Annotated[int, Bits(31, 29)] = 0
    ibs: Annotated[int, Bits(28, 24)] = 0


@word(64)
class XiveSource(Word):
    """Value of KVM_DEV_XIVE_GRP_SOURCE; ``type`` 0 is MSI, 1 LSI."""

    level: Annotated[int, Bits(1, 1)] = 0
    type: Annotated[int, Bits(0, 0)] = 0


@word(64)
class XiveSourceConfig(Word):
    """Value of KVM_DEV_XIVE_GRP_SOURCE_CONFIG."""

    eisn: Annotated[int, Bits(63, 33)] = 0
    mask: Annotated[int, Bits(32, 32)] = 0
    server: Annotated[int, Bits(31, 3)] = 0
    priority: Annotated[int, Bits(2, 0)] = 0


@word(64)
class XiveEqId(Word):
    """Attribute number of KVM_DEV_XIVE_GRP_EQ_CONFIG."""

    server: Annotated[int, Bits(31, 3)] = 0
    priority: Annotated[int, Bits(2, 0)] = 0


@cstruct
class KvmPpcXiveEq(CStruct):
    """Value of KVM_DEV_XIVE_GRP_EQ_CONFIG; ``qshift`` is log2 of the bytes, 0 disables."""

    flags: u32 = 0
    qshift: u32 = 0
    qaddr: u64 = 0
    qtoggle: u32 = 0
    qindex: u32 = 0
    pad: Annotated[bytes, "40s"] = bytes(40)


@word(32)
class XiveEqEntry(Word):
    """Event queue entry in guest memory, a big-endian 32-bit word."""

    generation: Annotated[int, Bits(31, 31)] = 0
    eisn: Annotated[int, Bits(30, 0)] = 0


@word(128)
class XiveVpState(Word):
    """KVM_REG_PPC_VP_STATE, a 128-bit register of which the first eight bytes are used."""

    nsr: Annotated[int, Bits(63, 56)] = 0
    cppr: Annotated[int, Bits(55, 48)] = 0
    ipb: Annotated[int, Bits(47, 40)] = 0
    lsmfb: Annotated[int, Bits(39, 32)] = 0
    ack: Annotated[int, Bits(31, 24)] = 0
    inc: Annotated[int, Bits(23, 16)] = 0
    age: Annotated[int, Bits(15, 8)] = 0
    pipr: Annotated[int, Bits(7, 0)] = 0


@cstruct
class KvmCreateSpaprTce(CStruct):
    """KVM_CREATE_SPAPR_TCE; ``window_size`` in bytes."""

    liobn: u64 = 0
    window_size: u32 = 0


@cstruct
class KvmCreateSpaprTce64(CStruct):
    """KVM_CREATE_SPAPR_TCE_64; ``offset`` and ``size`` in pages."""

    liobn: u64 = 0
    page_shift: u32 = 0
    flags: u32 = 0
    offset: u64 = 0
    size: u64 = 0
