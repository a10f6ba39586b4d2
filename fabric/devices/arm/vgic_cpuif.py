"""The GICv3 CPU interface of a vCPU: the ICC_* system registers.

Two tables say what each register does for the guest (:data:`ICC_READ`, :data:`ICC_WRITE`, by the name the
architecture gives it), a third what userspace reads and writes through device attributes (:data:`USER_SYSREGS`,
by encoding). The two views differ: userspace sees what is stored, the guest what the hardware makes of it.

Specification: GICv3 architecture (IHI 0069), section 12.2; arm-vgic-v3, group KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import attrs

from fabric.devices.arm.vgic_irq import INTID_MASK, PRIORITY_BITS, PRIORITY_MASK, VgicCpu
from fabric.errors import KvmError

if TYPE_CHECKING:
    from fabric.devices.arm.vgic import Vgic
    from fabric.devices.arm.vgic_v3_frames import RedistributorFrame, Region
    from fabric.devices.base import VcpuServices

MIN_BPR0 = 7 - PRIORITY_BITS
MIN_BPR1 = MIN_BPR0 + 1
SRE_VALUE = 7
"""ICC_SRE_EL1: system registers only, no bypass."""
ID_BITS_24 = 1
"""ICC_CTLR_EL1.IDbits for 24-bit INTIDs."""
CTLR_CBPR = 1 << 0
CTLR_EOIMODE = 1 << 1
CTLR_SEIS = 1 << 14
CTLR_A3V = 1 << 15
PENDBASER_RESET = 0x580
"""GICR_PENDBASER out of reset: inner shareable, read- and write-allocate."""


class VgicV3Cpu(VgicCpu):
    """CPU interface and redistributor of one vCPU."""

    __slots__ = ("frame", "id_bits", "lpis_enabled", "pendbaser", "priority_bits", "region", "slot")

    def __init__(self, vgic: Vgic, vcpu: VcpuServices) -> None:
        self.lpis_enabled = False
        """GICR_CTLR.EnableLPIs."""
        self.pendbaser = PENDBASER_RESET
        """GICR_PENDBASER, including PTZ, which reads as zero."""
        self.priority_bits = PRIORITY_BITS
        """Priority bits that userspace sees in ICC_CTLR_EL1; writing it can only lower them."""
        self.id_bits = ID_BITS_24
        self.region: Region | None = None
        """The redistributor region this vCPU's frame lies in, and its place there."""
        self.slot = 0
        self.frame: RedistributorFrame | None = None
        """The frame, while it answers."""
        super().__init__(vgic, vcpu)

    def read_sysreg(self, name: str) -> int:
        """What ``mrs`` of an ICC register gives. KeyError for a name that is not readable."""
        return ICC_READ[name](self)

    def write_sysreg(self, name: str, value: int) -> None:
        """What ``msr`` of an ICC register does. KeyError for a name that is not writable."""
        ICC_WRITE[name](self, value)

    def load(self) -> None:
        """KVM_RUN puts the interface on the hardware (:meth:`touch_hardware`) and runs the guest."""
        super().load()
        self.touch_hardware()

    def touch_hardware(self) -> None:
        """The registers go through the hardware, which raises the binary points to what it can do."""
        self.bpr0 = max(self.bpr0, MIN_BPR0)
        self.bpr1 = max(self.bpr1, MIN_BPR1)

    def effective_bpr0(self) -> int:
        """ICC_BPR0_EL1 as the hardware has it: not below what the priority bits allow."""
        return max(self.bpr0, MIN_BPR0)

    def effective_bpr1(self) -> int:
        """ICC_BPR1_EL1 as the hardware has it."""
        return min(self.effective_bpr0() + 1, 7) if self.cbpr else max(self.bpr1, MIN_BPR1)


def _control(cpu: VgicV3Cpu, priority_bits: int, id_bits: int) -> int:
    value = CTLR_A3V | (priority_bits - 1) << 8 | id_bits << 11
    if cpu.cbpr:
        value |= CTLR_CBPR
    if cpu.eoi_split:
        value |= CTLR_EOIMODE
    return value


def _interrupt_status(cpu: VgicV3Cpu) -> int:
    """ISR_EL1: bit 7 an IRQ (group 1), bit 6 an FIQ (group 0)."""
    group = cpu.pending_group
    return 0 if group is None else 1 << 6 + group


ICC_READ: dict[str, Callable[[VgicV3Cpu], int]] = {
    "ICC_PMR_EL1": lambda cpu: cpu.pmr,
    "ICC_IAR0_EL1": lambda cpu: cpu.acknowledge(0),
    "ICC_HPPIR0_EL1": lambda cpu: cpu.highest_pending(0),
    "ICC_BPR0_EL1": lambda cpu: cpu.effective_bpr0(),
    "ICC_AP0R0_EL1": lambda cpu: cpu.apr0,
    "ICC_AP1R0_EL1": lambda cpu: cpu.apr1,
    "ICC_RPR_EL1": lambda cpu: cpu.running_priority,
    "ICC_IAR1_EL1": VgicV3Cpu.iar1,
    "ICC_HPPIR1_EL1": lambda cpu: cpu.highest_pending(1),
    "ICC_BPR1_EL1": lambda cpu: cpu.effective_bpr1(),
    "ICC_CTLR_EL1": lambda cpu: _control(cpu, PRIORITY_BITS, ID_BITS_24),
    "ICC_SRE_EL1": lambda _cpu: SRE_VALUE,
    "ICC_IGRPEN0_EL1": lambda cpu: int(cpu.igrpen0),
    "ICC_IGRPEN1_EL1": lambda cpu: int(cpu.igrpen1),
    "ISR_EL1": _interrupt_status,
}


def _set_pmr(cpu: VgicV3Cpu, value: int) -> None:
    cpu.pmr = value & PRIORITY_MASK
    cpu.refresh()


def _set_bpr0(cpu: VgicV3Cpu, value: int) -> None:
    cpu.bpr0 = max(value & 7, MIN_BPR0)
    cpu.refresh()


def _set_bpr1(cpu: VgicV3Cpu, value: int) -> None:
    if not cpu.cbpr:
        cpu.bpr1 = max(value & 7, MIN_BPR1)
        cpu.refresh()


def _set_apr0(cpu: VgicV3Cpu, value: int) -> None:
    cpu.apr0 = value & 0xFFFF_FFFF
    cpu.refresh()


def _set_apr1(cpu: VgicV3Cpu, value: int) -> None:
    cpu.apr1 = value & 0xFFFF_FFFF
    cpu.refresh()


def _set_ctlr(cpu: VgicV3Cpu, value: int) -> None:
    cpu.cbpr = bool(value & CTLR_CBPR)
    cpu.eoi_split = bool(value & CTLR_EOIMODE)
    cpu.refresh()


def _set_igrpen0(cpu: VgicV3Cpu, value: int) -> None:
    cpu.igrpen0 = bool(value & 1)
    cpu.refresh()


def _set_igrpen1(cpu: VgicV3Cpu, value: int) -> None:
    cpu.igrpen1 = bool(value & 1)
    cpu.refresh()


def _ignore(_cpu: VgicV3Cpu, _value: int) -> None:
    """A write without effect."""


ICC_WRITE: dict[str, Callable[[VgicV3Cpu, int], None]] = {
    "ICC_PMR_EL1": _set_pmr,
    "ICC_EOIR0_EL1": lambda cpu, value: cpu.end_of_interrupt(0, value & INTID_MASK),
    "ICC_BPR0_EL1": _set_bpr0,
    "ICC_AP0R0_EL1": _set_apr0,
    "ICC_AP1R0_EL1": _set_apr1,
    "ICC_DIR_EL1": lambda cpu, value: cpu.deactivate(value & INTID_MASK),
    "ICC_SGI1R_EL1": lambda cpu, value: send_sgi(cpu, value, any_group=True),
    # With one security state these two reach group 0 only.
    "ICC_ASGI1R_EL1": lambda cpu, value: send_sgi(cpu, value, any_group=False),
    "ICC_SGI0R_EL1": lambda cpu, value: send_sgi(cpu, value, any_group=False),
    "ICC_EOIR1_EL1": VgicV3Cpu.eoir1,
    "ICC_BPR1_EL1": _set_bpr1,
    "ICC_CTLR_EL1": _set_ctlr,
    "ICC_SRE_EL1": _ignore,
    "ICC_IGRPEN0_EL1": _set_igrpen0,
    "ICC_IGRPEN1_EL1": _set_igrpen1,
}


def send_sgi(cpu: VgicV3Cpu, value: int, *, any_group: bool) -> None:
    """Raise an SGI at the vCPUs that ``value`` names, laid out as ICC_SGI1R_EL1.

    Bits 15:0 list Aff0 values of the cluster Aff3.Aff2.Aff1 (55:48, 39:32, 23:16), bit 40 (IRM) means all but the
    sender, bits 27:24 are the INTID. Without ``any_group`` an SGI configured as group 1 is not raised.

    KVM takes the *id* of the sender for its index: with sparse ids IRM leaves another vCPU out, or none.
    """
    vgic = cpu.vgic
    intid = value >> 24 & 0xF
    if value >> 40 & 1:
        targets = [other for other in vgic.cpus if other.index != cpu.vcpu.vcpu_id]
    else:
        cluster = (value >> 48 & 0xFF) << 32 | (value >> 32 & 0xFF) << 16 | (value >> 16 & 0xFF) << 8
        found = (vgic.cpu_by_mpidr(cluster | aff0) for aff0 in range(16) if value >> aff0 & 1)
        targets = sorted((other for other in found if other is not None), key=lambda other: other.index)
    for target in targets:
        irq = target.private[intid]
        if irq.group and not any_group:
            vgic.ledger.raised += 1
            vgic.drop(irq, "SGI of another group")
        else:
            vgic.pend_edge(irq)


# -- as userspace sees them ---------------------------------------------------------------------------------


@attrs.frozen
class UserSysreg:
    """A register in the CPU_SYSREGS group: its name, and what get and set do."""

    name: str
    id: str
    read: UserRead
    write: UserWrite


UserRead: TypeAlias = "Callable[[VgicV3Cpu], int]"
UserWrite: TypeAlias = "Callable[[VgicV3Cpu, int], None]"


def sysreg_encoding(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """The A64 encoding of a system register, as in the low half of the attribute number."""
    return op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


def _user_set_pmr(cpu: VgicV3Cpu, value: int) -> None:
    cpu.pmr = value & 0xFF
    cpu.refresh()


def _user_set_bpr0(cpu: VgicV3Cpu, value: int) -> None:
    cpu.bpr0 = value & 7
    cpu.refresh()


def _user_set_bpr1(cpu: VgicV3Cpu, value: int) -> None:
    if not cpu.cbpr:
        cpu.bpr1 = value & 7
        cpu.refresh()


def _user_set_ctlr(cpu: VgicV3Cpu, value: int) -> None:
    # Each check passed takes effect at once, also when a later one fails.
    priority_bits = (value >> 8 & 7) + 1
    if priority_bits > cpu.priority_bits:
        raise KvmError(errno.EINVAL, f"ICC_CTLR_EL1: at most {cpu.priority_bits} priority bits, not {priority_bits}")
    cpu.priority_bits = priority_bits
    id_bits = value >> 11 & 7
    if id_bits > cpu.id_bits:
        raise KvmError(errno.EINVAL, f"ICC_CTLR_EL1: IDbits is at most {cpu.id_bits}, not {id_bits}")
    cpu.id_bits = id_bits
    if value & CTLR_SEIS:
        raise KvmError(errno.EINVAL, f"ICC_CTLR_EL1: SEIS must be 0 as on the host, in {value:#x}")
    if not value & CTLR_A3V:
        raise KvmError(errno.EINVAL, f"ICC_CTLR_EL1: A3V must be 1 as on the host, in {value:#x}")
    _set_ctlr(cpu, value)


def _user_set_sre(_cpu: VgicV3Cpu, value: int) -> None:
    if not value & 1:
        raise KvmError(errno.EINVAL, f"ICC_SRE_EL1: SRE must be 1, in {value:#x}")


def _absent_apr(name: str) -> UserSysreg:
    """AP0R1 to AP0R3 and AP1R1 to AP1R3 exist only with more than five priority bits."""

    def read(_cpu: VgicV3Cpu) -> int:
        raise KvmError(errno.EINVAL, f"{name} does not exist with {PRIORITY_BITS} priority bits")

    def write(cpu: VgicV3Cpu, _value: int) -> None:
        read(cpu)

    return UserSysreg(name, _register_id(name), read, write)


def _register_id(name: str) -> str:
    return f"vgic-v3.reg.icc.{name.removeprefix('ICC_').removesuffix('_EL1').lower()}"


def _sysreg(name: str, read: UserRead, write: UserWrite) -> UserSysreg:
    return UserSysreg(name, _register_id(name), read, write)


USER_SYSREGS: dict[int, UserSysreg] = {
    sysreg_encoding(3, 0, 4, 6, 0): _sysreg("ICC_PMR_EL1", lambda cpu: cpu.pmr, _user_set_pmr),
    sysreg_encoding(3, 0, 12, 8, 3): _sysreg("ICC_BPR0_EL1", lambda cpu: cpu.bpr0, _user_set_bpr0),
    sysreg_encoding(3, 0, 12, 8, 4): _sysreg("ICC_AP0R0_EL1", lambda cpu: cpu.apr0, _set_apr0),
    **{sysreg_encoding(3, 0, 12, 8, 4 + n): _absent_apr(f"ICC_AP0R{n}_EL1") for n in (1, 2, 3)},
    sysreg_encoding(3, 0, 12, 9, 0): _sysreg("ICC_AP1R0_EL1", lambda cpu: cpu.apr1, _set_apr1),
    **{sysreg_encoding(3, 0, 12, 9, n): _absent_apr(f"ICC_AP1R{n}_EL1") for n in (1, 2, 3)},
    sysreg_encoding(3, 0, 12, 12, 3): _sysreg(
        "ICC_BPR1_EL1", lambda cpu: min(cpu.bpr0 + 1, 7) if cpu.cbpr else cpu.bpr1, _user_set_bpr1
    ),
    sysreg_encoding(3, 0, 12, 12, 4): _sysreg(
        "ICC_CTLR_EL1", lambda cpu: _control(cpu, cpu.priority_bits, cpu.id_bits), _user_set_ctlr
    ),
    sysreg_encoding(3, 0, 12, 12, 5): _sysreg("ICC_SRE_EL1", lambda _cpu: SRE_VALUE, _user_set_sre),
    sysreg_encoding(3, 0, 12, 12, 6): _sysreg("ICC_IGRPEN0_EL1", lambda cpu: int(cpu.igrpen0), _set_igrpen0),
    sysreg_encoding(3, 0, 12, 12, 7): _sysreg("ICC_IGRPEN1_EL1", lambda cpu: int(cpu.igrpen1), _set_igrpen1),
}
