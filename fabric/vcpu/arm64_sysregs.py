"""The system registers of an arm64 vCPU: a table, and what a vCPU keeps of them.

Guest programs have no instructions that would use most of them. They are kept all the same: a VMM saves and restores
them, KVM_ARM_VCPU_INIT resets them, and ``cpu.mrs`` and ``cpu.msr`` reach those that EL1 has. What has an effect is
elsewhere: the PMU in :mod:`fabric.vcpu.pmu`, the timers in :mod:`fabric.clock.arch_timer`, the GIC's in the device.

=========  ==========================================================================================
``STATE``  the vCPU's own; userspace and guest read and write what they like
``ID``     what the CPU can do: read-only to the guest, and userspace may only write what it reads
``HOST``   as ``ID``; KVM hands out the host's value, and lists these registers first
``PMU``    there with feature KVM_ARM_VCPU_PMU_V3; the PMU answers
=========  ==========================================================================================

Names, encodings and reset values: Arm Architecture Reference Manual, and Linux 6.1 (KVM_GET_REG_LIST and the values
after KVM_ARM_VCPU_INIT, as recorded). A register whose reset value the architecture leaves open has :data:`UNKNOWN`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, Final

import attrs

from fabric.uapi.arm64 import (
    KVM_ARM_VCPU_PMU_V3,
    KVM_ARM_VCPU_PTRAUTH_ADDRESS,
    KVM_ARM_VCPU_PTRAUTH_GENERIC,
    KVM_ARM_VCPU_SVE,
    MPIDR_RES1,
)

UNKNOWN: Final = 0x1DE7_EC7E_DBAD_C0DE
"""What 6.1 fills in where a guest must not rely on a value, so that one that does is found out."""
_MASK64: Final = (1 << 64) - 1


class Kind(Enum):
    """Whose register it is."""

    STATE = "state"
    ID = "id"
    HOST = "host"
    PMU = "pmu"


@attrs.frozen
class SysReg:
    """One register.

    Attributes:
        name: as the architecture has it.
        encoding: op0, op1, CRn, CRm and op2, as in the low 16 bits of a register id.
        kind: whose it is.
        reset: what KVM_ARM_VCPU_INIT sets a STATE register to.
        feature: the KVM_ARM_VCPU_* without which it is not there.
    """

    name: str
    encoding: int
    kind: Kind = Kind.STATE
    reset: int = 0
    feature: int | None = None


def encoding(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """A register's encoding as a number."""
    return op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


def _state(name: str, *code: int, reset: int = 0, feature: int | None = None) -> SysReg:
    return SysReg(name, encoding(*code), Kind.STATE, reset, feature)


def _pmu(name: str, *code: int) -> SysReg:
    return SysReg(name, encoding(*code), Kind.PMU, feature=KVM_ARM_VCPU_PMU_V3)


def _debug() -> Iterator[SysReg]:
    for n in range(16):
        for op2, letters in enumerate(("BV", "BC", "WV", "WC"), 4):
            yield _state(f"DBG{letters}R{n}_EL1", 2, 0, 0, n, op2)


def _keys() -> Iterator[SysReg]:
    for n, key in enumerate(("IA", "IB", "DA", "DB", "GA")):
        feature = KVM_ARM_VCPU_PTRAUTH_GENERIC if key == "GA" else KVM_ARM_VCPU_PTRAUTH_ADDRESS
        for half, part in enumerate(("LO", "HI")):
            place = 2 * n + half
            yield _state(
                f"AP{key}Key{part.title()}_EL1", 3, 0, 2, 1 + place // 4, place % 4, reset=UNKNOWN, feature=feature
            )


HOST: Final = (
    SysReg("MIDR_EL1", encoding(3, 0, 0, 0, 0), Kind.HOST),
    SysReg("REVIDR_EL1", encoding(3, 0, 0, 0, 6), Kind.HOST),
    SysReg("CLIDR_EL1", encoding(3, 1, 0, 0, 1), Kind.HOST),
    SysReg("AIDR_EL1", encoding(3, 1, 0, 0, 7), Kind.HOST),
    SysReg("CTR_EL0", encoding(3, 3, 0, 0, 1), Kind.HOST),
)
"""Registers of kind HOST, in the order of KVM_GET_REG_LIST."""

_ID_NAMES: Final[tuple[tuple[str | int, ...], ...]] = (
    # Op0 3, op1 0, CRn 0 from CRm 1 on, eight to a CRm; a number stands for an encoding that has no register yet.
    ("ID_PFR0", "ID_PFR1", "ID_DFR0", "ID_AFR0", "ID_MMFR0", "ID_MMFR1", "ID_MMFR2", "ID_MMFR3"),
    ("ID_ISAR0", "ID_ISAR1", "ID_ISAR2", "ID_ISAR3", "ID_ISAR4", "ID_ISAR5", "ID_MMFR4", "ID_ISAR6"),
    ("MVFR0", "MVFR1", "MVFR2", 3, "ID_PFR2", "ID_DFR1", "ID_MMFR5", 7),
    ("ID_AA64PFR0", "ID_AA64PFR1", 2, 3, "ID_AA64ZFR0", "ID_AA64SMFR0", 6, 7),
    ("ID_AA64DFR0", "ID_AA64DFR1", 2, 3, "ID_AA64AFR0", "ID_AA64AFR1", 6, 7),
    ("ID_AA64ISAR0", "ID_AA64ISAR1", "ID_AA64ISAR2", 3, 4, 5, 6, 7),
    ("ID_AA64MMFR0", "ID_AA64MMFR1", "ID_AA64MMFR2", 3, 4, 5, 6, 7),
)


def _id_name(crm: int, name: str | int) -> str:
    return f"{name}_EL1" if isinstance(name, str) else f"S3_0_C0_C{crm}_{name}"


_OTHERS: Final = (
    _state("MDCCINT_EL1", 2, 0, 0, 2, 0),
    _state("MDSCR_EL1", 2, 0, 0, 2, 2),
    _state("OSLSR_EL1", 2, 0, 1, 1, 4, reset=0x8),
    _state("DBGVCR32_EL2", 2, 4, 0, 7, 0),
    _state("MPIDR_EL1", 3, 0, 0, 0, 5, reset=MPIDR_RES1),
    _state("SCTLR_EL1", 3, 0, 1, 0, 0, reset=0x00C5_0078),
    _state("ACTLR_EL1", 3, 0, 1, 0, 1),
    _state("CPACR_EL1", 3, 0, 1, 0, 2),
    _state("ZCR_EL1", 3, 0, 1, 2, 0, feature=KVM_ARM_VCPU_SVE),
    _state("TTBR0_EL1", 3, 0, 2, 0, 0, reset=UNKNOWN),
    _state("TTBR1_EL1", 3, 0, 2, 0, 1, reset=UNKNOWN),
    _state("TCR_EL1", 3, 0, 2, 0, 2),
    _state("AFSR0_EL1", 3, 0, 5, 1, 0, reset=UNKNOWN),
    _state("AFSR1_EL1", 3, 0, 5, 1, 1, reset=UNKNOWN),
    _state("ESR_EL1", 3, 0, 5, 2, 0, reset=UNKNOWN),
    _state("FAR_EL1", 3, 0, 6, 0, 0, reset=UNKNOWN),
    _state("PAR_EL1", 3, 0, 7, 4, 0, reset=UNKNOWN),
    _state("MAIR_EL1", 3, 0, 10, 2, 0, reset=UNKNOWN),
    _state("AMAIR_EL1", 3, 0, 10, 3, 0),
    _state("VBAR_EL1", 3, 0, 12, 0, 0),
    _state("DISR_EL1", 3, 0, 12, 1, 1),
    _state("CONTEXTIDR_EL1", 3, 0, 13, 0, 1),
    _state("TPIDR_EL1", 3, 0, 13, 0, 4, reset=UNKNOWN),
    _state("CNTKCTL_EL1", 3, 0, 14, 1, 0),
    _state("CSSELR_EL1", 3, 2, 0, 0, 0, reset=UNKNOWN),
    _state("TPIDR_EL0", 3, 3, 13, 0, 2, reset=UNKNOWN),
    _state("TPIDRRO_EL0", 3, 3, 13, 0, 3, reset=UNKNOWN),
    _state("DACR32_EL2", 3, 4, 3, 0, 0, reset=UNKNOWN),
    _state("IFSR32_EL2", 3, 4, 5, 0, 1, reset=UNKNOWN),
    _state("FPEXC32_EL2", 3, 4, 5, 3, 0, reset=0x700),
    _pmu("PMINTENSET_EL1", 3, 0, 9, 14, 1),
    _pmu("PMINTENCLR_EL1", 3, 0, 9, 14, 2),
    _pmu("PMCR_EL0", 3, 3, 9, 12, 0),
    _pmu("PMCNTENSET_EL0", 3, 3, 9, 12, 1),
    _pmu("PMCNTENCLR_EL0", 3, 3, 9, 12, 2),
    _pmu("PMOVSCLR_EL0", 3, 3, 9, 12, 3),
    _pmu("PMSWINC_EL0", 3, 3, 9, 12, 4),
    _pmu("PMSELR_EL0", 3, 3, 9, 12, 5),
    _pmu("PMCCNTR_EL0", 3, 3, 9, 13, 0),
    _pmu("PMUSERENR_EL0", 3, 3, 9, 14, 0),
    _pmu("PMOVSSET_EL0", 3, 3, 9, 14, 3),
    *(_pmu(f"PMEVCNTR{n}_EL0", 3, 3, 14, 8 | n >> 3, n & 7) for n in range(31)),
    *(_pmu(f"PMEVTYPER{n}_EL0", 3, 3, 14, 12 | n >> 3, n & 7) for n in range(31)),
    _pmu("PMCCFILTR_EL0", 3, 3, 14, 15, 7),
)

REGISTERS: Final = tuple(
    sorted(
        (
            *_debug(),
            *_keys(),
            *(
                SysReg(_id_name(crm, name), encoding(3, 0, 0, crm, op2), Kind.ID)
                for crm, names in enumerate(_ID_NAMES, 1)
                for op2, name in enumerate(names)
            ),
            *_OTHERS,
        ),
        key=lambda row: row.encoding,
    )
)
"""Every other register that userspace sees, in the order of KVM_GET_REG_LIST: by encoding."""

BY_ENCODING: Final = {row.encoding: row for row in (*HOST, *REGISTERS)}
BY_NAME: Final = {row.name: row for row in (*HOST, *REGISTERS)}

PFR0: Final = BY_NAME["ID_AA64PFR0_EL1"].encoding
OSLSR: Final = BY_NAME["OSLSR_EL1"].encoding
MPIDR: Final = BY_NAME["MPIDR_EL1"].encoding
CSSELR: Final = BY_NAME["CSSELR_EL1"].encoding
OSLK: Final = 1 << 1
"""OSLSR_EL1: the OS lock is locked."""

CSV_FIELDS: Final = 0xFF << 56
"""ID_AA64PFR0_EL1.CSV2 and CSV3, by which userspace may promise less than the host does about speculation."""

_FEATURE_FIELDS: Final = {
    # What of the host's registers a vCPU sees only with a feature.
    KVM_ARM_VCPU_SVE: {"ID_AA64PFR0_EL1": 0xF << 32, "ID_AA64ZFR0_EL1": _MASK64},
    KVM_ARM_VCPU_PMU_V3: {"ID_AA64DFR0_EL1": 0xF << 8, "ID_DFR0_EL1": 0xF << 24},
    KVM_ARM_VCPU_PTRAUTH_ADDRESS: {"ID_AA64ISAR1_EL1": 0xFF << 4},
    KVM_ARM_VCPU_PTRAUTH_GENERIC: {"ID_AA64ISAR1_EL1": 0xFF << 24},
}

RECORDED_HOST: Final[Mapping[str, int]] = {
    "MIDR_EL1": 0x000F_0510,
    "CLIDR_EL1": 0x0200_0023,
    "CTR_EL0": 0x9444_C004,
    "ID_PFR0_EL1": 0x0102_0131,
    "ID_PFR1_EL1": 0x1001_1001,
    "ID_DFR0_EL1": 0x0501_0009,
    "ID_MMFR0_EL1": 0x1010_1105,
    "ID_MMFR1_EL1": 0x4000_0000,
    "ID_MMFR2_EL1": 0x0126_0000,
    "ID_MMFR3_EL1": 0x0212_2211,
    "ID_ISAR0_EL1": 0x0210_1110,
    "ID_ISAR1_EL1": 0x1311_2111,
    "ID_ISAR2_EL1": 0x2123_2042,
    "ID_ISAR3_EL1": 0x0111_2131,
    "ID_ISAR4_EL1": 0x0001_1142,
    "ID_ISAR5_EL1": 0x0101_1121,
    "ID_MMFR4_EL1": 0x0001_1110,
    "ID_ISAR6_EL1": 0x0111_1111,
    "MVFR0_EL1": 0x1011_0222,
    "MVFR1_EL1": 0x1321_1111,
    "MVFR2_EL1": 0x0000_0043,
    "ID_PFR2_EL1": 0x0000_0011,
    "ID_MMFR5_EL1": 0x0000_0001,
    "ID_AA64PFR0_EL1": 0x1101_0011_2111_0222,
    "ID_AA64PFR1_EL1": 0x0000_0021,
    "ID_AA64ZFR0_EL1": 0x0110_1101_0011_0021,
    "ID_AA64DFR0_EL1": 0x1030_5506,
    "ID_AA64ISAR0_EL1": 0x1221_1111_1021_2120,
    "ID_AA64ISAR1_EL1": 0x0011_1111_0121_1012,
    "ID_AA64MMFR0_EL1": 0x0000_0323_1020_1126,
    "ID_AA64MMFR1_EL1": 0x0000_0010_1021_1122,
    "ID_AA64MMFR2_EL1": 0x1021_0110_1001_1011,
}
"""What KVM offers a vCPU with all features on the host of the recordings, an emulated CPU with all that there is."""

_HARDWARE: Final = {
    BY_NAME[name].encoding: bits
    for name, bits in (
        ("SCTLR_EL1", ~(0xFE0 << 32)),
        ("AFSR0_EL1", 0),
        ("AFSR1_EL1", 0),
        ("AMAIR_EL1", 0),
        ("VBAR_EL1", ~0x1F),
        ("CSSELR_EL1", 0xF),
    )
}
"""Registers of which that host's CPU has not all bits: when a vCPU comes onto the CPU, the others are lost."""

CACHES: Final[Mapping[int, int]] = {0: 0x701F_E00A, 1: 0x201F_E012, 2: 0x70FF_E07A}
"""CCSIDR_EL1 of that host by CSSELR_EL1: level 1 data and instructions, level 2."""


def host_registers(options: Mapping[str, Any]) -> dict[int, int]:
    """The ID and HOST registers of a host, by encoding.

    ``options`` are those of a Kvm; one that is missing is as recorded. ``el1_32bit`` false is a CPU without AArch32.
    """
    values = dict.fromkeys((row.encoding for row in BY_ENCODING.values() if row.kind in (Kind.ID, Kind.HOST)), 0)
    values.update((BY_NAME[name].encoding, value) for name, value in RECORDED_HOST.items())

    def put(name: str, shift: int, field: int) -> None:
        at = BY_NAME[name].encoding
        values[at] = values[at] & ~(0xF << shift) | field << shift

    if options.get("host_gic", 3) != 3:
        put("ID_AA64PFR0_EL1", 24, 0)
    if not options.get("ras", True):
        put("ID_AA64PFR0_EL1", 28, 0)
    if not options.get("el1_32bit", True):
        put("ID_AA64PFR0_EL1", 4, 1)
        put("ID_AA64PFR0_EL1", 0, 1)
        for at in aarch32_registers():
            values[at] = 0
    if options.get("pmu_event_bits", 16) == 10:  # PMUv3 of Armv8.0
        put("ID_AA64DFR0_EL1", 8, 1)
        put("ID_DFR0_EL1", 24, 3)
    elif options.get("pmu_long_counters", False):  # of Armv8.5
        put("ID_AA64DFR0_EL1", 8, 6)
        put("ID_DFR0_EL1", 24, 6)
    return values


def aarch32_registers() -> range:
    """The encodings of the ID registers of AArch32, which are 0 on a CPU without it."""
    return range(encoding(3, 0, 0, 1, 0), encoding(3, 0, 0, 4, 0))


class SystemRegisters:
    """The system registers of one vCPU, but for those of the PMU.

    Args:
        host: the host's ID registers, which all vCPUs of a VM share.
    """

    __slots__ = ("_loaded", "features", "host", "state")

    def __init__(self, host: dict[int, int]) -> None:
        self.host = host
        self.features: frozenset[int]
        """KVM_ARM_VCPU_* that the vCPU has."""
        self.state: dict[int, int]
        """STATE registers by encoding."""
        self.reset(frozenset())

    def reset(self, features: frozenset[int]) -> None:
        """KVM_ARM_VCPU_INIT."""
        self.features = features
        self._loaded = False
        self.state = {row.encoding: row.reset for row in REGISTERS if row.kind is Kind.STATE}

    def visible(self, row: SysReg) -> bool:
        """Whether the vCPU has the register."""
        return row.feature is None or row.feature in self.features

    def get(self, row: SysReg) -> int:
        """The value of a register that is not the PMU's."""
        if row.kind is Kind.STATE:
            return self.state[row.encoding]
        value = self.host[row.encoding]
        for feature, fields in _FEATURE_FIELDS.items():
            if feature not in self.features:
                value &= ~fields.get(row.name, 0)
        return value

    def put(self, row: SysReg, value: int) -> None:
        """Set a STATE register."""
        self.state[row.encoding] = value
        self._loaded = False

    def load(self) -> None:
        """The vCPU comes onto a CPU, and the registers with it."""
        if not self._loaded:
            self._loaded = True
            for at, bits in _HARDWARE.items():
                self.state[at] &= bits

    # -- what the guest does

    def read(self, name: str) -> int:
        """MRS. KeyError for a register that EL1 does not have here."""
        if name == "CCSIDR_EL1":
            return CACHES.get(self.state[CSSELR] & 0xF, 0)
        return self.get(self._of_el1(name))

    def write(self, name: str, value: int) -> None:
        """MSR. KeyError for a register that EL1 cannot write."""
        if name == "OSLAR_EL1":
            self.state[OSLSR] = self.state[OSLSR] & ~OSLK | (value & 1) * OSLK
            return
        row = self._of_el1(name)
        if row.kind is not Kind.STATE or row.encoding in (MPIDR, OSLSR):
            raise KeyError(name)
        self.state[row.encoding] = value & _MASK64 & _HARDWARE.get(row.encoding, _MASK64)

    def _of_el1(self, name: str) -> SysReg:
        row = BY_NAME[name]
        if row.kind is Kind.PMU or not self.visible(row) or name.endswith("_EL2"):
            raise KeyError(name)
        return row
