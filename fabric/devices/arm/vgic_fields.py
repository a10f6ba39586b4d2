"""Fields of one interrupt, as the registers of GICv2 and GICv3 frames read and write them.

Functions for the rows of a register block (:mod:`fabric.devices.registers`): the owner is whatever the frame belongs to
and has the interrupt controller as ``owner.vgic``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_irq import VgicIrq, WiredIrq


def group(_owner: Any, irq: VgicIrq) -> int:
    return irq.group


def set_group(owner: Any, irq: VgicIrq, value: int) -> None:
    owner.vgic.set_group(irq, value)


def enabled(_owner: Any, irq: VgicIrq) -> int:
    return irq.enabled


def enable(owner: Any, irq: VgicIrq, _value: int) -> None:
    owner.vgic.set_enabled(irq, True)


def disable(owner: Any, irq: VgicIrq, _value: int) -> None:
    owner.vgic.set_enabled(irq, False)


def asserted(_owner: Any, irq: VgicIrq) -> int:
    return irq.asserted


def pend(owner: Any, irq: VgicIrq, _value: int) -> None:
    owner.vgic.set_pending(irq)


def unpend(owner: Any, irq: VgicIrq, _value: int) -> None:
    owner.vgic.clear_pending(irq, "cleared by the guest")


def latch(_owner: Any, irq: VgicIrq) -> int:
    return irq.pending


def set_latch(owner: Any, irq: VgicIrq, value: int) -> None:
    owner.vgic.set_latch(irq, bool(value), "cleared by userspace")


def active(_owner: Any, irq: VgicIrq) -> int:
    return irq.active


def activate(owner: Any, irq: VgicIrq, _value: int) -> None:
    owner.vgic.activate(irq)


def deactivate(owner: Any, irq: VgicIrq, _value: int) -> None:
    owner.vgic.deactivate(irq, ended=False)


def priority(_owner: Any, irq: VgicIrq) -> int:
    return irq.priority


def set_priority(owner: Any, irq: VgicIrq, value: int) -> None:
    owner.vgic.set_priority(irq, value)


def config(_owner: Any, irq: WiredIrq) -> int:
    return irq.edge << 1


def set_config(owner: Any, irq: WiredIrq, value: int) -> None:
    owner.vgic.set_edge(irq, bool(value & 2))
