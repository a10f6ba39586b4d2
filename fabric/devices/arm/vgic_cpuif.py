"""The GICv3 CPU interface of a vCPU: the ICC_* system registers.

Specification: GICv3 architecture (IHI 0069), section 12.2 (AArch64 system registers).
"""

from __future__ import annotations

from fabric.devices.arm.vgic_irq import VgicCpu


class VgicV3Cpu(VgicCpu):
    """CPU interface and redistributor state of one vCPU."""

    __slots__ = ("lpis_enabled", "pendbaser")

    lpis_enabled: bool
    """GICR_CTLR.EnableLPIs."""
    pendbaser: int
    """GICR_PENDBASER."""
