"""The state of a GICv3 as a record apart from the device: ``VgicV3.state()`` and ``VgicV3.from_state()``.

Everything that decides what a guest sees is in it, places in the queues included, so that a restored machine
goes on as one that was never interrupted. What belongs to others is not: the wires into the GIC (owners of PPIs,
resample irqfds), the ITSs, guest memory. Restore those, and the vCPUs with their ids and affinities, first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from fabric.devices.arm.vgic_frames import UNDEFINED
from fabric.devices.arm.vgic_irq import NR_PRIVATE_IRQS, VgicIrq
from fabric.devices.arm.vgic_state import IrqState, restore_irqs, save_irq
from fabric.devices.arm.vgic_v3_frames import Region

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_cpuif import VgicV3Cpu
    from fabric.devices.arm.vgic_v3 import VgicV3

VERSION = 2


@attrs.frozen
class CpuState:
    """CPU interface and redistributor of one vCPU."""

    private: tuple[IrqState, ...]
    pmr: int
    bpr0: int
    bpr1: int
    cbpr: bool
    eoi_split: bool
    igrpen0: bool
    igrpen1: bool
    apr0: int
    apr1: int
    priority_bits: int
    id_bits: int
    lpis_enabled: bool
    pendbaser: int
    seq: int
    region: int
    """Which of the redistributor regions it has its place in, in order of registration; -1 for none."""
    slot: int
    answers: bool
    """Its redistributor frame is on the bus."""


@attrs.frozen
class VgicV3State:
    """A whole GICv3. ``regions`` are (index, base, count, places used) of the redistributor regions."""

    version: int = VERSION
    nr_irqs: int = NR_PRIVATE_IRQS
    initialized: bool = False
    mapped: bool = False
    forwarding: bool = False
    revision: int = 3
    propbaser: int = 0
    distributor: int = UNDEFINED
    regions: tuple[tuple[int, int, int, int], ...] = ()
    cpus: tuple[CpuState, ...] = ()
    spis: tuple[IrqState, ...] = ()
    lpis: tuple[IrqState, ...] = ()
    unmapped: tuple[int, ...] = ()
    """LPIs that no ITS maps any more and that are still at a vCPU."""


_CPU_FIELDS = tuple(f.name for f in attrs.fields(CpuState) if f.name not in ("private", "region", "answers"))


def save(vgic: VgicV3) -> VgicV3State:
    """See :meth:`VgicV3.state`."""
    return VgicV3State(
        nr_irqs=vgic.nr_irqs,
        initialized=vgic.initialized,
        mapped=vgic.frames.mapped,
        forwarding=vgic.forwarding,
        revision=vgic.revision,
        propbaser=vgic.propbaser,
        distributor=vgic.frames.distributor,
        regions=tuple(attrs.astuple(region) for region in vgic.frames.regions),
        cpus=tuple(_save_cpu(cpu, vgic.frames.regions) for cpu in vgic.cpus),
        spis=tuple(save_irq(irq) for irq in vgic.spis),
        lpis=tuple(save_irq(irq) for irq in vgic.lpis.values()),
        unmapped=tuple(vgic.unmapped),
    )


def _save_cpu(cpu: VgicV3Cpu, regions: list[Region]) -> CpuState:
    return CpuState(
        private=tuple(save_irq(irq) for irq in cpu.private),
        region=regions.index(cpu.region) if cpu.region in regions else -1,
        answers=cpu.frame is not None,
        **{name: getattr(cpu, name) for name in _CPU_FIELDS},
    )


def restore(vgic: VgicV3, state: VgicV3State) -> None:
    """Put ``state`` into a GIC that was just made; see :meth:`VgicV3.from_state`."""
    if state.version != VERSION:
        raise ValueError(f"version of the GICv3 state must be {VERSION}, not {state.version}")
    if len(state.cpus) != len(vgic.cpus):
        raise ValueError(f"the state is of {len(state.cpus)} vCPUs, and the VM has {len(vgic.cpus)}")
    frames = vgic.frames
    frames.distributor = state.distributor
    frames.regions = [Region(*region) for region in state.regions]
    vgic.nr_irqs = state.nr_irqs
    if state.initialized:
        vgic.initialize()
    vgic.revision = state.revision
    vgic.propbaser = state.propbaser
    vgic.forwarding = state.forwarding
    for cpu, saved in zip(vgic.cpus, state.cpus, strict=True):
        for name in _CPU_FIELDS:
            setattr(cpu, name, getattr(saved, name))
        cpu.forwarding = state.forwarding
        cpu.region = frames.regions[saved.region] if saved.region >= 0 else None
        if saved.answers:
            frames.map_redistributor(cpu)
        restore_irqs(vgic.cpus, cpu.private, saved.private)
    restore_irqs(vgic.cpus, vgic.spis, state.spis)
    for lpi in state.lpis:
        vgic.lpis[lpi.intid] = VgicIrq(lpi.intid, None)
    restore_irqs(vgic.cpus, vgic.lpis.values(), state.lpis)
    vgic.unmapped.update((intid, vgic.lpis[intid]) for intid in state.unmapped)
    for cpu in vgic.cpus:
        cpu.arrange()
    vgic.ledger.raised += vgic.count_open()
    if state.mapped:
        frames.map_distributor()
