"""The synthetic interrupt controller of a virtual processor (Hyper-V): an extension of its local APIC.

It has 16 synthetic interrupt sources (SINTs). Each is a vector of the local APIC, and has a slot for a message in the
message page and 2048 flags in the event page; both pages are guest memory that the guest names. KVM posts messages of
synthetic timers, and raises SINTs for routes of type KVM_IRQ_ROUTING_HV_SINT; all else (the messages and event flags of
other partitions) the VMM writes into the pages before it raises the SINT. Guest writes that move the pages or turn the
controller on or off therefore exit to the VMM.

A guest is done with a message when it ends the SINT's interrupt (EOI of the local APIC) or writes EOM. Then timers
whose messages found the slot taken try again, and whoever listens to the GSI that is routed to the SINT is told:
that is how a VMM's resample irqfd learns that it can post its next message. With AutoEOI there is no EOI, and only EOM
counts.

A source in polling mode (bit 18) interrupts all the same, as in KVM, which does not offer that mode in CPUID.

Sources: TLFS, Virtual Interrupts: SynIC MSRs, SINTx Registers; Inter-Partition Communication: SynIC Messages;
KVM_CAP_HYPERV_SYNIC of the KVM API document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from fabric.devices.x86.apic_bus import MODE_FIXED, SELF
from fabric.devices.x86.synic_timer import SyntheticTimer
from fabric.errors import KvmError
from fabric.uapi.hyperv import (
    HV_ENABLE,
    HV_MESSAGE_PENDING,
    HV_MESSAGE_SIZE,
    HV_SYNIC_FIRST_VALID_VECTOR,
    HV_SYNIC_SINT_AUTO_EOI,
    HV_SYNIC_SINT_COUNT,
    HV_SYNIC_SINT_MASKED,
    HV_SYNIC_SINT_VECTOR,
    HV_SYNIC_STIMER_COUNT,
    HV_SYNIC_VERSION_1,
    HVMSG_NONE,
    HvMessage,
)
from fabric.uapi.kvm import PAGE_SIZE

if TYPE_CHECKING:
    from fabric.devices.x86.hyperv import VirtualProcessor

_PAGE = PAGE_SIZE - 1
_HEADER_SIZE = HvMessage.OFFSETS["payload"]
_FLAGS_OFFSET = HvMessage.OFFSETS["flags"]
ALL_SINTS = range(HV_SYNIC_SINT_COUNT)


class Refused(Exception):
    """An MSR that a guest may not access so, or that does not take that value: #GP."""


class Synic:
    """The controller of one virtual processor."""

    __slots__ = (
        "active",
        "control",
        "due",
        "event_page",
        "gsis",
        "keeps_pages",
        "listeners",
        "message_page",
        "sints",
        "timers",
        "version",
        "vp",
    )

    def __init__(self, vp: VirtualProcessor) -> None:
        self.vp = vp
        self.active = False
        """KVM_CAP_HYPERV_SYNIC(2) was enabled for the vCPU."""
        self.keeps_pages = False
        """KVM_CAP_HYPERV_SYNIC2: the pages are not cleared when the guest names them."""
        self.control = self.event_page = self.message_page = 0
        """SCONTROL, SIEFP, SIMP."""
        self.version = HV_SYNIC_VERSION_1
        self.sints = [HV_SYNIC_SINT_MASKED] * HV_SYNIC_SINT_COUNT
        self.gsis: dict[int, int] = {}
        """By SINT: the GSI that is routed to it."""
        self.listeners: dict[int, list[Callable[[], None]]] = {}
        """By SINT: called when the guest is done with what it signalled."""
        self.timers: tuple[SyntheticTimer, ...] = ()
        """There once it is active."""
        self.due = 0
        """Timers to see to, a bit each."""

    def activate(self, *, keeps_pages: bool) -> None:
        """KVM_CAP_HYPERV_SYNIC, or with ``keeps_pages`` KVM_CAP_HYPERV_SYNIC2."""
        self.active = True
        self.keeps_pages = keeps_pages
        self.control = HV_ENABLE
        if not self.timers:
            self.timers = tuple(SyntheticTimer(self, index) for index in range(HV_SYNIC_STIMER_COUNT))

    # -- registers

    def check_access(self, value: int, host: bool) -> None:
        """Refused for a write while it is not active, but of a 0 by the VMM."""
        if not self.active and (value or not host):
            raise Refused("the vCPU has no SynIC: KVM_CAP_HYPERV_SYNIC was not enabled")

    def clear_page(self, value: int, host: bool) -> None:
        """A guest names one of the pages: it is cleared. Refused where there is no memory."""
        if value & HV_ENABLE and not host and not self.keeps_pages:
            try:
                self.vp.vcpu.vm.memory.write(value & ~_PAGE, bytes(PAGE_SIZE))
            except KvmError as error:
                raise Refused(f"there is no memory for a SynIC page at {value & ~_PAGE:#x}") from error

    def write_sint(self, sint: int, value: int, host: bool) -> None:
        """SINTx: vectors below 16 are refused, except for a masked source (guests write the reset value back)."""
        vector = value & HV_SYNIC_SINT_VECTOR
        if vector < HV_SYNIC_FIRST_VALID_VECTOR and not host and not value & HV_SYNIC_SINT_MASKED:
            raise Refused(f"the vector of an unmasked SINT is at least {HV_SYNIC_FIRST_VALID_VECTOR}, not {vector}")
        self.sints[sint] = value
        ends = auto_eoi = 0
        for one in self.sints:
            vector = one & HV_SYNIC_SINT_VECTOR
            if not one & HV_SYNIC_SINT_MASKED and vector >= HV_SYNIC_FIRST_VALID_VECTOR:
                ends |= 1 << vector
                if one & HV_SYNIC_SINT_AUTO_EOI:
                    auto_eoi |= 1 << vector
        self.vp.vcpu.cpu_interface.connect_synic(ends, auto_eoi, self.vector_ended)

    # -- interrupts

    def raise_sint(self, sint: int) -> int:
        """Raise a source: 1, 0 if the local APIC is off, -1 for one that is masked or is not there."""
        value = self.sints[sint] if sint < HV_SYNIC_SINT_COUNT else HV_SYNIC_SINT_MASKED
        if value & HV_SYNIC_SINT_MASKED:
            ledger = self.vp.vcpu.vm.ledger
            ledger.raised += 1
            ledger.drop("SINT masked")
            return -1
        return int(self.raise_vector(value & HV_SYNIC_SINT_VECTOR))

    def raise_vector(self, vector: int) -> bool:
        """An edge of the vCPU's own local APIC; whether that took it."""
        apic: Any = self.vp.vcpu.cpu_interface
        return bool(apic.bus.deliver(0, False, MODE_FIXED, vector, True, 0, shorthand=SELF, source=apic))

    def vector_ended(self, vector: int) -> None:
        """The guest ended an interrupt of the local APIC."""
        self.acknowledge(
            sint
            for sint, value in enumerate(self.sints)
            if value & (HV_SYNIC_SINT_MASKED | HV_SYNIC_SINT_VECTOR) == vector
        )

    def acknowledge(self, sints: Iterable[int] = ALL_SINTS) -> None:
        """The guest is done with what these sources signalled: EOI of the local APIC, or EOM for all of them."""
        for sint in sints:
            for timer in self.timers:
                if timer.waits_for_slot and timer.sint == sint:
                    self.due |= 1 << timer.index
            for told in tuple(self.listeners.get(sint, ())):
                told()
        self.run_due()

    # -- messages and timers

    def post(self, sint: int, message: HvMessage, *, queued: bool) -> bool:
        """Put a message into the slot of a source and raise it; whether that succeeded.

        While the slot holds another one, the guest is asked to say when it is free (MessagePending), unless the message
        is not ``queued``: then it is as good as delivered, and lost.
        """
        if not self.message_page & HV_ENABLE:
            return False
        memory = self.vp.vcpu.vm.memory
        slot = (self.message_page & ~_PAGE) + sint * HV_MESSAGE_SIZE
        try:
            if memory.read_u32(slot) != HVMSG_NONE:
                if queued:
                    memory.write_u8(slot + _FLAGS_OFFSET, HV_MESSAGE_PENDING)
                return not queued
            memory.write(slot, message.pack()[: _HEADER_SIZE + message.payload_size])
        except KvmError:
            return False
        return self.raise_sint(sint) > 0

    def run_due(self) -> None:
        """See to the timers that are due, if the vCPU is in KVM_RUN."""
        if not self.vp.vcpu.running:
            return
        while self.due:
            index = (self.due & -self.due).bit_length() - 1
            self.due &= self.due - 1
            self.timers[index].run()

    def _check(self) -> None:
        """Assert the invariants."""
        assert not self.due or not self.vp.vcpu.running
        assert self.active or (not self.timers and not self.control)
        for timer in self.timers:
            assert not timer.pending or timer.expires
