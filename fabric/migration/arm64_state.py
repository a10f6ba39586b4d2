"""A saved arm64 machine: plain numbers and bytes, frozen, that can be pickled or written as JSON.

Everything in it was read through the KVM interface or is what the VMM had told KVM. Where pairs of a register's number
and its value stand in a tuple, they stand in the order in which they have to be written.
"""

from __future__ import annotations

from typing import Self

import attrs
from cattrs.preconf.json import make_converter

VERSION = 1

Registers = tuple[tuple[int, int], ...]
"""Number (an offset, an encoding, a one-reg id) and value of each register."""


@attrs.frozen
class SlotState:
    """A memory slot and what is in it: offset and bytes of each page that is not all zeros."""

    slot: int
    flags: int
    gpa: int
    size: int
    pages: tuple[tuple[int, bytes], ...] = ()


@attrs.frozen
class VcpuState:
    """One vCPU."""

    vcpu_id: int
    target: int
    features: tuple[int, ...]
    """Of KVM_ARM_VCPU_INIT."""
    registers: Registers
    """All of KVM_GET_REG_LIST, the virtual timer's among them."""
    mp_state: int
    serror: tuple[int, int, int]
    """struct kvm_vcpu_events: pending, has a syndrome, the syndrome."""
    timer_irqs: tuple[int, int] | None = None
    """PPIs of the virtual and the physical timer; None without an in-kernel GIC."""
    pmu_irq: int | None = None
    pvtime: int | None = None
    """Where the stolen-time structure is."""


@attrs.frozen
class Gicv3CpuState:
    """Redistributor and CPU interface of one vCPU."""

    affinity: int
    """Aff3.Aff2.Aff1.Aff0, a byte each, as attribute numbers have it."""
    bases: Registers
    """GICR_PROPBASER and GICR_PENDBASER, in halves."""
    registers: Registers
    sysregs: Registers
    lines: int
    """Levels of the PPIs."""


@attrs.frozen
class Gicv3State:
    """A GICv3."""

    nr_irqs: int
    distributor: int
    redistributors: tuple[int, ...]
    """The regions, as KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION has them; a count of 0 is the one of the older attribute."""
    iidr: int
    registers: Registers
    lines: tuple[int, ...]
    """Levels of the SPIs, 32 a word."""
    cpus: tuple[Gicv3CpuState, ...]


@attrs.frozen
class Gicv2State:
    """A GICv2: what all vCPUs share, and for each the banked registers and its CPU interface."""

    nr_irqs: int
    distributor: int
    cpu_interface: int
    iidr: int
    registers: Registers
    banked: tuple[Registers, ...]
    interfaces: tuple[Registers, ...]


@attrs.frozen
class ItsState:
    """One ITS. Its maps are in guest memory."""

    base: int
    registers: Registers


@attrs.frozen
class ArmState:
    """The whole machine."""

    version: int
    machine_type: int
    slots: tuple[SlotState, ...]
    vcpus: tuple[VcpuState, ...]
    gic: Gicv3State | Gicv2State | None = None
    its: tuple[ItsState, ...] = ()
    routes: tuple[bytes, ...] = ()
    """Entries of the GSI table, struct kvm_irq_routing_entry each."""
    irqfds: tuple[tuple[int, bool], ...] = ()
    """The GSI of each irqfd, and whether it has a resample eventfd."""
    lines: tuple[int, ...] = ()
    """SPIs whose lines the VMM holds up."""

    def to_json(self) -> str:
        """As JSON text; memory in base 85."""
        return _converter.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Undo :meth:`to_json`."""
        return _converter.loads(text, cls)


_converter = make_converter()
