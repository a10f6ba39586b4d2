"""Register frames of GICv3: the distributor (GICD) and a redistributor (GICR).

One row a register, in offset order; guest MMIO, the DIST_REGS and REDIST_REGS attributes and their has-tests read
these rows. Where userspace sees something else than the guest, the row's ``user`` says what.

One security state, affinity routing always on. What the architecture has and KVM has not, and so is not here:
1-of-N SPIs (GICD_IROUTER.IRM reads as zero), message-based SPIs (GICD_SETSPI_NSR), extended SPI ranges, direct
injection of LPIs (GICR_SETLPIR), virtual LPIs.

Specification: GICv3 architecture (IHI 0069), sections 12.9 (GICD) and 12.11 (GICR); arm-vgic-v3, register groups.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fabric.devices.arm import vgic_fields as fields
from fabric.devices.arm import vgic_lpi
from fabric.devices.arm.vgic_irq import NR_PRIVATE_IRQS
from fabric.devices.registers import Access, IrqArray, Register, RegisterBlock, View
from fabric.errors import KvmError

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_cpuif import VgicV3Cpu
    from fabric.devices.arm.vgic_irq import WiredIrq
    from fabric.devices.arm.vgic_v3 import VgicV3

RW, RO, WO, W1S, W1C = Access.RW, Access.RO, Access.WO, Access.W1S, Access.W1C
RAZ_WI, RAO_WI = Access.RAZ_WI, Access.RAO_WI

GICD_SIZE = 0x1_0000
GICR_SIZE = 0x2_0000
SGI_BASE = 0x1_0000
"""Offset of the second page of a redistributor, with the registers of SGIs and PPIs."""

CTLR_ENABLE_GRP1 = 1 << 1
CTLR_ARE = 1 << 4
CTLR_DS = 1 << 6
TYPER_LPIS = 1 << 17
IIDR_FIXED = 0x4B00_043B
"""Product, variant and implementer; the revision goes to bits 15:12."""
IIDR_REVISION = 0xF << 12
PIDR2_GICV3 = 0x3B
GICR_CTLR_ENABLE_LPIS = 1 << 0
GICR_CTLR_CES = 1 << 1
GICR_CTLR_IR = 1 << 2
GICR_TYPER_PLPIS = 1 << 0
GICR_TYPER_LAST = 1 << 4
AFFINITY_MASK = 0xFF_FFFF


# Save and restore need the latch itself, in both directions; ICPENDR has nothing to add to that.
LATCH = View(access=RW, read=fields.latch, write=fields.set_latch)
NOTHING = View(access=RAZ_WI)


# -- distributor --------------------------------------------------------------------------------------------


def _ctlr(vgic: VgicV3) -> int:
    return CTLR_DS | CTLR_ARE | (CTLR_ENABLE_GRP1 if vgic.forwarding else 0)


def _set_ctlr(vgic: VgicV3, value: int) -> None:
    vgic.set_forwarding(bool(value & CTLR_ENABLE_GRP1))


def _typer(vgic: VgicV3) -> int:
    value = vgic.nr_irqs // 32 - 1
    if vgic.has_its:
        return value | TYPER_LPIS | (vgic.lpi_id_bits - 1) << 19
    return value | 9 << 19


def _iidr(vgic: VgicV3) -> int:
    return IIDR_FIXED | vgic.revision << 12


def _set_iidr(vgic: VgicV3, value: int) -> None:
    revision = (value & IIDR_REVISION) >> 12
    if (value ^ IIDR_FIXED) & ~IIDR_REVISION:
        raise KvmError(errno.EINVAL, f"GICD_IIDR must be {IIDR_FIXED:#x} but for the revision, not {value:#x}")
    if revision not in (2, 3):
        raise KvmError(errno.EINVAL, f"GICD_IIDR: revision must be 2 or 3, not {revision}")
    vgic.revision = revision


def _set_typer2(_vgic: VgicV3, value: int) -> None:
    if value:
        raise KvmError(errno.EINVAL, f"GICD_TYPER2 must be written as it reads, 0, not {value:#x}")


def _route(_vgic: VgicV3, irq: WiredIrq) -> int:
    return irq.route


def _set_route(vgic: VgicV3, irq: WiredIrq, value: int) -> None:
    irq.route = value & AFFINITY_MASK
    vgic.retarget(irq, vgic.cpu_by_mpidr(irq.route))


def _d(name: str) -> str:
    return f"vgic-v3.reg.gicd.{name}"


GICD = RegisterBlock(
    "GICD",
    GICD_SIZE,
    (
        Register(0x0000, "GICD_CTLR", RW, read=_ctlr, write=_set_ctlr, id=_d("ctlr")),
        Register(0x0004, "GICD_TYPER", RO, read=_typer, id=_d("typer")),
        Register(0x0008, "GICD_IIDR", RO, read=_iidr, user=View(access=RW, write=_set_iidr), id=_d("iidr")),
        Register(0x000C, "GICD_TYPER2", RO, user=View(access=RW, write=_set_typer2), id=_d("typer2")),
        Register(0x0010, "GICD_STATUSR", RAO_WI, id=_d("statusr"), modelled=False),
        IrqArray(0x0080, "GICD_IGROUPR", RW, 1, read=fields.group, write=fields.set_group, id=_d("igroupr")),
        IrqArray(0x0100, "GICD_ISENABLER", W1S, 1, read=fields.enabled, write=fields.enable, id=_d("isenabler")),
        IrqArray(0x0180, "GICD_ICENABLER", W1C, 1, read=fields.enabled, write=fields.disable, id=_d("icenabler")),
        IrqArray(0x0200, "GICD_ISPENDR", W1S, 1, read=fields.asserted, write=fields.pend, user=LATCH, id=_d("ispendr")),
        IrqArray(
            0x0280, "GICD_ICPENDR", W1C, 1, read=fields.asserted, write=fields.unpend, user=NOTHING, id=_d("icpendr")
        ),
        IrqArray(0x0300, "GICD_ISACTIVER", W1S, 1, read=fields.active, write=fields.activate, id=_d("isactiver")),
        IrqArray(0x0380, "GICD_ICACTIVER", W1C, 1, read=fields.active, write=fields.deactivate, id=_d("icactiver")),
        IrqArray(
            0x0400, "GICD_IPRIORITYR", RW, 8, read=fields.priority, write=fields.set_priority, widths=(1, 4),
            id=_d("ipriorityr"),
        ),
        IrqArray(0x0800, "GICD_ITARGETSR", RAZ_WI, 8, widths=(1, 4), id=_d("itargetsr"), modelled=False),
        IrqArray(0x0C00, "GICD_ICFGR", RW, 2, read=fields.config, write=fields.set_config, id=_d("icfgr")),
        IrqArray(0x0D00, "GICD_IGRPMODR", RAZ_WI, 1, id=_d("igrpmodr"), modelled=False),
        IrqArray(
            0x6000, "GICD_IROUTER", RW, 64, read=_route, write=_set_route, widths=(4, 8), id=_d("irouter")
        ),
        Register(0xFFD0, "GICD_PIDR4", RAZ_WI, length=0x18, id=_d("idregs"), modelled=False),
        Register(0xFFE8, "GICD_PIDR2", RO, value=PIDR2_GICV3, id=_d("idregs")),
        Register(0xFFEC, "GICD_PIDR3", RAZ_WI, length=0x14, id=_d("idregs"), modelled=False),
    ),
    irq_limit=lambda vgic: vgic.nr_irqs,
)  # fmt: skip


# -- redistributor ------------------------------------------------------------------------------------------


def _rd_ctlr(cpu: VgicV3Cpu) -> int:
    value = GICR_CTLR_ENABLE_LPIS if cpu.lpis_enabled else 0
    if cpu.vgic.revision >= 3:  # type: ignore[attr-defined]
        value |= GICR_CTLR_IR | GICR_CTLR_CES
    return value


def _set_rd_ctlr(cpu: VgicV3Cpu, value: int) -> None:
    vgic = cpu.vgic
    on = bool(value & GICR_CTLR_ENABLE_LPIS)
    if not vgic.has_its or on == cpu.lpis_enabled:
        return
    cpu.lpis_enabled = on
    if on:
        vgic_lpi.load_pending(vgic, cpu)
    else:
        vgic.flush_lpis(cpu)
        vgic.invalidate_translations()


def _rd_iidr(_cpu: VgicV3Cpu) -> int:
    return IIDR_FIXED


def _rd_typer(cpu: VgicV3Cpu) -> int:
    value = (cpu.vcpu.mpidr & AFFINITY_MASK) << 32 | (cpu.vcpu.vcpu_id & 0xFFFF) << 8
    if cpu.vgic.has_its:
        value |= GICR_TYPER_PLPIS
    if cpu.vgic.is_last(cpu):  # type: ignore[attr-defined]
        value |= GICR_TYPER_LAST
    return value


def _propbaser(cpu: VgicV3Cpu) -> int:
    return cpu.vgic.propbaser


def _set_propbaser(cpu: VgicV3Cpu, value: int) -> None:
    if not cpu.lpis_enabled:
        cpu.vgic.propbaser = vgic_lpi.sanitise_baser(value & vgic_lpi.PROPBASER_FIELDS)


def _pendbaser(cpu: VgicV3Cpu) -> int:
    return cpu.pendbaser & ~vgic_lpi.PENDBASER_PTZ


def _set_pendbaser(cpu: VgicV3Cpu, value: int) -> None:
    if not cpu.lpis_enabled:
        cpu.pendbaser = vgic_lpi.sanitise_baser(value & vgic_lpi.PENDBASER_FIELDS)


def _invlpi(cpu: VgicV3Cpu, value: int) -> None:
    irq = cpu.vgic.known_lpi(value & 0xFFFF_FFFF)
    if irq is not None and cpu.lpis_enabled:
        vgic_lpi.reload_config(cpu.vgic, irq)


def _invall(cpu: VgicV3Cpu, _value: int) -> None:
    if cpu.lpis_enabled:
        vgic_lpi.reload_all(cpu.vgic, cpu)


def _r(name: str) -> str:
    return f"vgic-v3.reg.gicr.{name}"


_N = NR_PRIVATE_IRQS

GICR = RegisterBlock(
    "GICR",
    GICR_SIZE,
    (
        Register(0x0000, "GICR_CTLR", RW, read=_rd_ctlr, write=_set_rd_ctlr, id=_r("ctlr")),
        Register(0x0004, "GICR_IIDR", RO, read=_rd_iidr, id=_r("iidr")),
        Register(0x0008, "GICR_TYPER", RO, read=_rd_typer, length=8, widths=(4, 8), id=_r("typer")),
        # GICR_STATUSR at 0x10 reads zero and ignores writes like any offset without a register.
        Register(0x0014, "GICR_WAKER", RAZ_WI, id=_r("waker"), modelled=False),
        Register(
            0x0070, "GICR_PROPBASER", RW, read=_propbaser, write=_set_propbaser, length=8, widths=(4, 8),
            id=_r("propbaser"),
        ),
        Register(
            0x0078, "GICR_PENDBASER", RW, read=_pendbaser, write=_set_pendbaser, length=8, widths=(4, 8),
            stored=lambda cpu: cpu.pendbaser,
            id=_r("pendbaser"),
        ),
        Register(0x00A0, "GICR_INVLPIR", WO, write=_invlpi, length=8, widths=(4, 8), id=_r("invlpir")),
        Register(0x00B0, "GICR_INVALLR", WO, write=_invall, length=8, widths=(4, 8), id=_r("invallr")),
        Register(0x00C0, "GICR_SYNCR", RO, id=_r("syncr")),
        Register(0xFFD0, "GICR_PIDR4", RAZ_WI, length=0x18, id=_r("idregs"), modelled=False),
        Register(0xFFE8, "GICR_PIDR2", RO, value=PIDR2_GICV3, id=_r("idregs")),
        Register(0xFFEC, "GICR_PIDR3", RAZ_WI, length=0x14, id=_r("idregs"), modelled=False),
        IrqArray(
            SGI_BASE + 0x080, "GICR_IGROUPR0", RW, 1, read=fields.group, write=fields.set_group, count=_N,
            id=_r("igroupr0"),
        ),
        IrqArray(
            SGI_BASE + 0x100, "GICR_ISENABLER0", W1S, 1, read=fields.enabled, write=fields.enable, count=_N,
            id=_r("isenabler0"),
        ),
        IrqArray(
            SGI_BASE + 0x180, "GICR_ICENABLER0", W1C, 1, read=fields.enabled, write=fields.disable, count=_N,
            id=_r("icenabler0"),
        ),
        IrqArray(
            SGI_BASE + 0x200, "GICR_ISPENDR0", W1S, 1, read=fields.asserted, write=fields.pend, count=_N, user=LATCH,
            id=_r("ispendr0"),
        ),
        IrqArray(
            SGI_BASE + 0x280, "GICR_ICPENDR0", W1C, 1, read=fields.asserted, write=fields.unpend, count=_N,
            user=NOTHING, id=_r("icpendr0"),
        ),
        IrqArray(
            SGI_BASE + 0x300, "GICR_ISACTIVER0", W1S, 1, read=fields.active, write=fields.activate, count=_N,
            id=_r("isactiver0"),
        ),
        IrqArray(
            SGI_BASE + 0x380, "GICR_ICACTIVER0", W1C, 1, read=fields.active, write=fields.deactivate, count=_N,
            id=_r("icactiver0"),
        ),
        IrqArray(
            SGI_BASE + 0x400, "GICR_IPRIORITYR0", RW, 8, read=fields.priority, write=fields.set_priority, count=_N,
            widths=(1, 4), id=_r("ipriorityr0"),
        ),
        IrqArray(SGI_BASE + 0xC00, "GICR_ICFGR0", RO, 2, read=fields.config, count=_N, id=_r("icfgr0")),
        IrqArray(SGI_BASE + 0xD00, "GICR_IGRPMODR0", RAZ_WI, 1, count=_N, id=_r("igrpmodr0"), modelled=False),
        Register(SGI_BASE + 0xE00, "GICR_NSACR", RAZ_WI, id=_r("nsacr"), modelled=False),
    ),
    irq_limit=lambda _cpu: _N,
)  # fmt: skip
