"""Stolen time of an arm64 vCPU (Arm DEN 0057), kept in guest memory.

Userspace says where (KVM_ARM_VCPU_PVTIME_IPA), the guest asks for it by hypercall (ARM_SMCCC_HV_PV_TIME_ST), which
clears the structure, and from then on its field tells for how many ns the vCPU was ready to run and had no physical
CPU::

    +0 revision (0)   +4 attributes (0)   +8 stolen_time, ns   +16 to +63 reserved

The host brings it up to date whenever it puts the vCPU on a physical CPU: at each KVM_RUN, and after each wait for one.
Where memory is missing, read-only or unreadable it writes nothing, and what was stolen meanwhile is added later.

Rules: vcpu.pvtime.ipa and vcpu.pv-time-hvc of the interface inventory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fabric.errors import KvmError

if TYPE_CHECKING:
    from fabric.memory import GuestMemory

INVALID_IPA: Final = (1 << 64) - 1
"""KVM_ARM_VCPU_PVTIME_IPA before it is set."""
STOLEN_TIME_ALIGN: Final = 64
STRUCTURE_SIZE: Final = 64
STOLEN_TIME_OFFSET: Final = 8

_MASK64 = (1 << 64) - 1


class StolenTime:
    """The structure of one vCPU."""

    __slots__ = ("base", "told_ns")

    def __init__(self) -> None:
        self.base = INVALID_IPA
        """Its guest physical address."""
        self.told_ns = 0
        """How much of the stolen time is in it, or was before the guest asked for it."""

    def start(self, memory: GuestMemory, stolen_ns: int) -> None:
        """The guest asks for it: count from now on. ``stolen_ns`` is what was stolen from the vCPU so far."""
        self.told_ns = stolen_ns
        if memory.is_writable(self.base, STRUCTURE_SIZE):
            try:
                memory.write(self.base, bytes(STRUCTURE_SIZE))
            except KvmError:
                return

    def update(self, memory: GuestMemory, stolen_ns: int) -> None:
        """Add what was stolen since the last update."""
        field = self.base + STOLEN_TIME_OFFSET
        if not memory.is_writable(field, 8):
            return
        try:
            memory.write_u64(field, memory.read_u64(field) + stolen_ns - self.told_ns & _MASK64)
        except KvmError:
            return
        self.told_ns = stolen_ns
