"""The state of an interrupt as a record apart from the GIC: what the states of all models are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from fabric.devices.arm.vgic_irq import ADRIFT, VgicIrq, WiredIrq

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fabric.devices.arm.vgic_irq import VgicCpu


@attrs.frozen
class IrqState:
    """One interrupt. ``where`` and ``seq`` are its place on a vCPU's list, -1 when it is on none."""

    intid: int
    priority: int
    group: int
    enabled: bool
    pending: bool
    active: bool
    target: int
    """vCPU index, -1 for none."""
    where: int
    seq: int
    edge: bool = True
    line: bool = False
    route: int = 0


def save_irq(irq: VgicIrq) -> IrqState:
    """The record of ``irq``."""
    entry = irq.entry
    common = (
        irq.intid,
        irq.priority,
        irq.group,
        irq.enabled,
        irq.pending,
        irq.active,
        -1 if irq.target is None else irq.target.index,
        -1 if entry is None or entry is ADRIFT else entry[3].index,
        -1 if entry is None or entry is ADRIFT else entry[1],
    )
    return IrqState(*common, irq.edge, irq.line, irq.route) if isinstance(irq, WiredIrq) else IrqState(*common)


def restore_irqs(cpus: Sequence[VgicCpu], irqs: Iterable[VgicIrq], states: Iterable[IrqState]) -> None:
    """Put ``states`` into ``irqs``, one for one; then every vCPU has to :meth:`~VgicCpu.arrange` what it was given."""
    for irq, saved in zip(irqs, states, strict=True):
        irq.priority = saved.priority
        irq.group = saved.group
        irq.enabled = saved.enabled
        irq.pending = saved.pending
        irq.active = saved.active
        irq.target = None if saved.target < 0 else cpus[saved.target]
        if isinstance(irq, WiredIrq):
            irq.edge, irq.line, irq.route = saved.edge, saved.line, saved.route
        if saved.where >= 0:
            cpus[saved.where].adopt(irq, saved.seq)
        elif irq.active:
            irq.entry = ADRIFT
