"""Register frames of GICv2: the distributor (GICD) and the CPU interface (GICC).

One row a register, in offset order; guest MMIO, the DIST_REGS and CPU_REGS attributes and their has-tests read these
rows. Where userspace sees something else than the guest, the row's ``user`` says what. The owner of both frames is the
:class:`VgicV2Cpu` that accesses them, as GICD has registers that every vCPU sees its own copy of.

Modelled: one security state, as the host's hardware has it for guests. Known and not modelled: the active priorities of
group 1 alone (GICC_NSAPR).

Specification: GICv2 architecture (IHI 0048), sections 4.3 (GICD) and 4.4 (GICC); arm-vgic, register groups.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fabric.devices.arm import vgic_fields as fields
from fabric.devices.arm.vgic_irq import NR_PRIVATE_IRQS, NR_SGIS, PRIORITY_MASK, PRIORITY_SHIFT
from fabric.devices.arm.vgic_v2_cpu import MIN_BPR, Sgi
from fabric.devices.registers import Access, IrqArray, Register, RegisterBlock, View
from fabric.errors import KvmError

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_irq import WiredIrq
    from fabric.devices.arm.vgic_v2 import VgicV2
    from fabric.devices.arm.vgic_v2_cpu import VgicV2Cpu

RW, RO, WO, W1S, W1C = Access.RW, Access.RO, Access.WO, Access.W1S, Access.W1C
RAZ_WI = Access.RAZ_WI

CTLR_ENABLE = 1 << 0
IIDR_FIXED = 0x4B00_043B
"""Product, variant and implementer; the revision goes to bits 15:12."""
IIDR_REVISION = 0xF << 12
SGIR_LIST, SGIR_OTHERS, SGIR_SELF = 0, 1, 2
"""GICD_SGIR.TargetListFilter; 3 is reserved."""
GICC_IIDR_KVM = 0x04B2_043B
GICC_IIDR_HARDWARE = 0x0002_043B
"""What the guest reads is the interface of the host's hardware."""


def _vgic(cpu: VgicV2Cpu) -> VgicV2:
    return cpu.vgic  # type: ignore[return-value]


# -- distributor --------------------------------------------------------------------------------------------


def _ctlr(cpu: VgicV2Cpu) -> int:
    return CTLR_ENABLE if cpu.vgic.forwarding else 0


def _set_ctlr(cpu: VgicV2Cpu, value: int) -> None:
    cpu.vgic.set_forwarding(bool(value & CTLR_ENABLE))


def _typer(cpu: VgicV2Cpu) -> int:
    return cpu.vgic.nr_irqs // 32 - 1 | len(cpu.vgic.cpus) - 1 << 5


def _iidr(cpu: VgicV2Cpu) -> int:
    return IIDR_FIXED | _vgic(cpu).revision << 12


def _set_iidr(cpu: VgicV2Cpu, value: int) -> None:
    revision = (value & IIDR_REVISION) >> 12
    if (value ^ IIDR_FIXED) & ~IIDR_REVISION:
        raise KvmError(errno.EINVAL, f"GICD_IIDR must be {IIDR_FIXED:#x} but for the revision, not {value:#x}")
    if revision not in (2, 3):
        raise KvmError(errno.EINVAL, f"GICD_IIDR: revision must be 2 or 3, not {revision}")
    _vgic(cpu).revision = revision
    _vgic(cpu).groups_writable = True


def _user_set_group(cpu: VgicV2Cpu, irq: WiredIrq, value: int) -> None:
    # Userspace that knows nothing of GICD_IIDR was told wrong groups by older kernels, and must not restore them.
    if _vgic(cpu).groups_writable:
        cpu.vgic.set_group(irq, value)


def _pend(cpu: VgicV2Cpu, irq: WiredIrq, _value: int) -> None:
    if not isinstance(irq, Sgi):
        cpu.vgic.set_pending(irq)


def _user_pend(cpu: VgicV2Cpu, irq: WiredIrq, _value: int) -> None:
    if isinstance(irq, Sgi):
        _vgic(cpu).raise_sgi(irq, 1 << cpu.vcpu.vcpu_id)
    else:
        cpu.vgic.set_pending(irq)


def _unpend(cpu: VgicV2Cpu, irq: WiredIrq, _value: int) -> None:
    if not isinstance(irq, Sgi):
        cpu.vgic.clear_pending(irq, "cleared by the guest")


def _user_unpend(cpu: VgicV2Cpu, irq: WiredIrq, _value: int) -> None:
    if isinstance(irq, Sgi):
        _vgic(cpu).clear_sgi(irq, irq.senders)
    else:
        cpu.vgic.clear_pending(irq, "cleared by userspace")


def _targets(cpu: VgicV2Cpu, irq: WiredIrq) -> int:
    return 1 << cpu.index if irq.intid < NR_PRIVATE_IRQS else irq.route


def _set_targets(cpu: VgicV2Cpu, irq: WiredIrq, value: int) -> None:
    vgic = cpu.vgic
    if irq.intid >= NR_PRIVATE_IRQS:
        irq.route = value & (1 << len(vgic.cpus)) - 1
        # One vCPU gets it; with no target at all it is still vCPU 0.
        lowest = irq.route & -irq.route
        vgic.retarget(irq, vgic.cpus[max(lowest.bit_length() - 1, 0)])


def _set_config(cpu: VgicV2Cpu, irq: WiredIrq, value: int) -> None:
    if irq.intid >= NR_PRIVATE_IRQS:
        fields.set_config(cpu, irq, value)


def _send_sgi(cpu: VgicV2Cpu, value: int) -> None:
    how = value >> 24 & 3
    listed = value >> 16 & 0xFF
    for target in cpu.vgic.cpus:
        if (
            (how == SGIR_LIST and listed >> target.index & 1)
            or (how == SGIR_OTHERS and target is not cpu)
            or (how == SGIR_SELF and target is cpu)
        ):
            _vgic(cpu).raise_sgi(target.sgis[value & 0xF], 1 << cpu.vcpu.vcpu_id)


def _senders(_cpu: VgicV2Cpu, sgi: Sgi) -> int:
    return sgi.senders


def _add_senders(cpu: VgicV2Cpu, sgi: Sgi, value: int) -> None:
    _vgic(cpu).raise_sgi(sgi, value)


def _remove_senders(cpu: VgicV2Cpu, sgi: Sgi, value: int) -> None:
    _vgic(cpu).clear_sgi(sgi, value)


def _d(name: str) -> str:
    return f"vgic-v2.reg.{name}"


GICD = RegisterBlock(
    "GICD",
    0x1000,
    (
        Register(
            0x000, "GICD_CTLR", RW, read=_ctlr, write=_set_ctlr, id=_d("ctlr"),
        ),
        Register(0x004, "GICD_TYPER", RO, read=_typer, id=_d("typer")),
        Register(0x008, "GICD_IIDR", RO, read=_iidr, user=View(access=RW, write=_set_iidr), id=_d("iidr")),
        IrqArray(
            0x080, "GICD_IGROUPR", RW, 1, read=fields.group, write=fields.set_group, id=_d("igroupr"),
            user=View(access=RW, write=_user_set_group),
        ),
        IrqArray(0x100, "GICD_ISENABLER", W1S, 1, read=fields.enabled, write=fields.enable, id=_d("isenabler")),
        IrqArray(0x180, "GICD_ICENABLER", W1C, 1, read=fields.enabled, write=fields.disable, id=_d("icenabler")),
        IrqArray(
            0x200, "GICD_ISPENDR", W1S, 1, read=fields.asserted, write=_pend, id=_d("ispendr"),
            user=View(access=W1S, write=_user_pend),
        ),
        IrqArray(
            0x280, "GICD_ICPENDR", W1C, 1, read=fields.asserted, write=_unpend, id=_d("icpendr"),
            user=View(access=W1C, write=_user_unpend),
        ),
        IrqArray(0x300, "GICD_ISACTIVER", W1S, 1, read=fields.active, write=fields.activate, id=_d("isactiver")),
        IrqArray(0x380, "GICD_ICACTIVER", W1C, 1, read=fields.active, write=fields.deactivate, id=_d("icactiver")),
        IrqArray(
            0x400, "GICD_IPRIORITYR", RW, 8, read=fields.priority, write=fields.set_priority, widths=(1, 4),
            id=_d("ipriorityr"),
        ),
        IrqArray(0x800, "GICD_ITARGETSR", RW, 8, read=_targets, write=_set_targets, widths=(1, 4), id=_d("itargetsr")),
        IrqArray(0xC00, "GICD_ICFGR", RW, 2, read=fields.config, write=_set_config, id=_d("icfgr")),
        Register(0xF00, "GICD_SGIR", WO, write=_send_sgi, id=_d("sgir")),
        IrqArray(
            0xF10, "GICD_CPENDSGIR", W1C, 8, read=_senders, write=_remove_senders, count=NR_SGIS, widths=(1, 4),
            id=_d("cpendsgir"),
        ),
        # Ones set, zeros do nothing, and yet RW: a write of zero is an event for an SGI that is pending already.
        IrqArray(
            0xF20, "GICD_SPENDSGIR", RW, 8, read=_senders, write=_add_senders, count=NR_SGIS, widths=(1, 4),
            id=_d("spendsgir"),
        ),
    ),
    irq_limit=lambda cpu: cpu.vgic.nr_irqs,
)  # fmt: skip


# -- CPU interface ------------------------------------------------------------------------------------------

CTLR_FLAGS = {
    "igrpen0": 1 << 0,
    "igrpen1": 1 << 1,
    "ack_group1": 1 << 2,
    "fiq_group0": 1 << 3,
    "cbpr": 1 << 4,
    "eoi_split": 1 << 9,
}
"""Bits of GICC_CTLR, by the attribute of the CPU interface that holds them."""


def _control(cpu: VgicV2Cpu) -> int:
    return sum(bit for name, bit in CTLR_FLAGS.items() if getattr(cpu, name))


def _set_control(cpu: VgicV2Cpu, value: int) -> None:
    for name, bit in CTLR_FLAGS.items():
        setattr(cpu, name, bool(value & bit))
    cpu.refresh()


def _pmr(cpu: VgicV2Cpu) -> int:
    return cpu.pmr


def _set_pmr(cpu: VgicV2Cpu, value: int) -> None:
    cpu.pmr = value & PRIORITY_MASK
    cpu.refresh()


def _user_pmr(cpu: VgicV2Cpu) -> int:
    return cpu.pmr >> PRIORITY_SHIFT


def _user_set_pmr(cpu: VgicV2Cpu, value: int) -> None:
    _set_pmr(cpu, value << PRIORITY_SHIFT)


def _bpr(cpu: VgicV2Cpu) -> int:
    return max(cpu.bpr0, MIN_BPR)


def _set_bpr(cpu: VgicV2Cpu, value: int) -> None:
    _user_set_bpr(cpu, max(value & 7, MIN_BPR))


def _user_bpr(cpu: VgicV2Cpu) -> int:
    return cpu.bpr0


def _user_set_bpr(cpu: VgicV2Cpu, value: int) -> None:
    cpu.bpr0 = value & 7
    cpu.refresh()


def _abpr(cpu: VgicV2Cpu) -> int:
    return max(cpu.bpr1, MIN_BPR + 1)


def _set_abpr(cpu: VgicV2Cpu, value: int) -> None:
    _user_set_abpr(cpu, max(value & 7, MIN_BPR + 1))


def _user_abpr(cpu: VgicV2Cpu) -> int:
    return cpu.bpr1


def _user_set_abpr(cpu: VgicV2Cpu, value: int) -> None:
    cpu.bpr1 = value & 7
    cpu.refresh()


def _apr(cpu: VgicV2Cpu) -> int:
    return cpu.apr0


def _set_apr(cpu: VgicV2Cpu, value: int) -> None:
    cpu.apr0 = value
    cpu.refresh()


def _kvm_iidr(_cpu: VgicV2Cpu) -> int:
    return GICC_IIDR_KVM


GUEST_ONLY = View(access=Access.ABSENT)


def _c(name: str) -> str:
    return f"vgic-v2.reg.cpu.{name}"


GICC = RegisterBlock(
    "GICC",
    0x2000,
    (
        Register(0x0000, "GICC_CTLR", RW, read=_control, write=_set_control, id=_c("ctlr")),
        Register(
            0x0004, "GICC_PMR", RW, read=_pmr, write=_set_pmr, id=_c("pmr"),
            user=View(access=RW, read=_user_pmr, write=_user_set_pmr),
        ),
        Register(
            0x0008, "GICC_BPR", RW, read=_bpr, write=_set_bpr, id=_c("bpr"),
            user=View(access=RW, read=_user_bpr, write=_user_set_bpr),
        ),
        Register(0x000C, "GICC_IAR", RO, read=lambda cpu: cpu.take(), user=GUEST_ONLY),
        Register(0x0010, "GICC_EOIR", WO, write=lambda cpu, value: cpu.end(value), user=GUEST_ONLY),
        Register(0x0014, "GICC_RPR", RO, read=lambda cpu: cpu.running_priority, user=GUEST_ONLY),
        Register(0x0018, "GICC_HPPIR", RO, read=lambda cpu: cpu.highest(), user=GUEST_ONLY),
        Register(
            0x001C, "GICC_ABPR", RW, read=_abpr, write=_set_abpr, id=_c("abpr"),
            user=View(access=RW, read=_user_abpr, write=_user_set_abpr),
        ),
        Register(0x0020, "GICC_AIAR", RO, read=lambda cpu: cpu.take(aliased=True), user=GUEST_ONLY),
        Register(0x0024, "GICC_AEOIR", WO, write=lambda cpu, value: cpu.end(value, aliased=True), user=GUEST_ONLY),
        Register(0x0028, "GICC_AHPPIR", RO, read=lambda cpu: cpu.highest(aliased=True), user=GUEST_ONLY),
        Register(0x00D0, "GICC_APR0", RW, read=_apr, write=_set_apr, id=_c("apr")),
        # Thirty-two levels of preemption are all that five bits of priority give.
        Register(0x00D4, "GICC_APR1", RAZ_WI, length=12, id=_c("apr")),
        Register(0x00E0, "GICC_NSAPR0", RAZ_WI, length=16, user=GUEST_ONLY, modelled=False),
        Register(
            0x00FC, "GICC_IIDR", RO, value=GICC_IIDR_HARDWARE, id=_c("iidr"),
            user=View(access=RO, read=_kvm_iidr),
        ),
        Register(
            0x1000, "GICC_DIR", WO, write=lambda cpu, value: cpu.deactivate(value & 0x3FF), user=GUEST_ONLY
        ),
    ),
)  # fmt: skip
