"""The state of a GICv2 as a record apart from the device: ``VgicV2.state()`` and ``VgicV2.from_state()``.

Everything that decides what a guest sees is in it, places in the queues included, so that a restored machine goes on as
one that was never interrupted. What belongs to others is not: the wires into the GIC (owners of PPIs, resample irqfds).
Restore those, and the vCPUs with their ids, first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from fabric.devices.arm.vgic_frames import UNDEFINED
from fabric.devices.arm.vgic_irq import NR_PRIVATE_IRQS
from fabric.devices.arm.vgic_state import IrqState, restore_irqs, save_irq

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_v2 import VgicV2
    from fabric.devices.arm.vgic_v2_cpu import VgicV2Cpu

VERSION = 1


@attrs.frozen
class CpuState:
    """CPU interface of one vCPU. ``senders`` are of its SGIs, a bit for each vCPU id."""

    private: tuple[IrqState, ...]
    senders: tuple[int, ...]
    pmr: int
    bpr0: int
    bpr1: int
    cbpr: bool
    eoi_split: bool
    igrpen0: bool
    igrpen1: bool
    ack_group1: bool
    fiq_group0: bool
    apr0: int
    seq: int


@attrs.frozen
class VgicV2State:
    """A whole GICv2. ``bases`` are of distributor and CPU interface."""

    version: int = VERSION
    nr_irqs: int = NR_PRIVATE_IRQS
    initialized: bool = False
    mapped: bool = False
    forwarding: bool = False
    revision: int = 3
    groups_writable: bool = False
    bases: tuple[int, int] = (UNDEFINED, UNDEFINED)
    cpus: tuple[CpuState, ...] = ()
    spis: tuple[IrqState, ...] = ()


_CPU_FIELDS = tuple(f.name for f in attrs.fields(CpuState) if f.name not in ("private", "senders"))


def save(vgic: VgicV2) -> VgicV2State:
    """See :meth:`VgicV2.state`."""
    distributor, cpu_interface = vgic.frames.bases.values()
    return VgicV2State(
        nr_irqs=vgic.nr_irqs,
        initialized=vgic.initialized,
        mapped=vgic.frames.mapped,
        forwarding=vgic.forwarding,
        revision=vgic.revision,
        groups_writable=vgic.groups_writable,
        bases=(distributor, cpu_interface),
        cpus=tuple(_save_cpu(cpu) for cpu in vgic.cpus),
        spis=tuple(save_irq(irq) for irq in vgic.spis),
    )


def _save_cpu(cpu: VgicV2Cpu) -> CpuState:
    return CpuState(
        private=tuple(save_irq(irq) for irq in cpu.private),
        senders=tuple(sgi.senders for sgi in cpu.sgis),
        **{name: getattr(cpu, name) for name in _CPU_FIELDS},
    )


def restore(vgic: VgicV2, state: VgicV2State) -> None:
    """Put ``state`` into a GIC that was just made; see :meth:`VgicV2.from_state`."""
    if state.version != VERSION:
        raise ValueError(f"version of the GICv2 state must be {VERSION}, not {state.version}")
    if len(state.cpus) != len(vgic.cpus):
        raise ValueError(f"the state is of {len(state.cpus)} vCPUs, and the VM has {len(vgic.cpus)}")
    vgic.frames.bases = dict(zip(vgic.frames.bases, state.bases, strict=True))
    vgic.nr_irqs = state.nr_irqs
    if state.initialized:
        vgic.initialize()
    vgic.revision = state.revision
    vgic.groups_writable = state.groups_writable
    vgic.forwarding = state.forwarding
    for cpu, saved in zip(vgic.cpus, state.cpus, strict=True):
        for name in _CPU_FIELDS:
            setattr(cpu, name, getattr(saved, name))
        cpu.forwarding = state.forwarding
        restore_irqs(vgic.cpus, cpu.private, saved.private)
        for sgi, senders in zip(cpu.sgis, saved.senders, strict=True):
            sgi.senders = senders
    restore_irqs(vgic.cpus, vgic.spis, state.spis)
    for cpu in vgic.cpus:
        cpu.arrange()
    vgic.ledger.raised += vgic.count_open()
    if state.mapped:
        vgic.frames.map()
