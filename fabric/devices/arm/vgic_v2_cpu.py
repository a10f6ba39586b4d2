"""What a GICv2 has for each vCPU: SGIs that know their senders, list registers, acknowledge and end.

The hardware's CPU interface shows a vCPU the interrupts that KVM has put into list registers, of which there are four.
While more wait, or an SGI waits from several senders, KVM sorts what is queued: active ones first, then by priority.
It sorts the queue itself, so that equals stay in the order of the last sort. An SGI is in one list register whatever
the number of its senders, one sender at a time and not while it is active; until it has been taken from all of them,
nothing of lower priority is put into a list register, or it would overtake.

Specification: GICv2 architecture (IHI 0048), sections 3.2 to 3.4 and 4.4, chapter 5 (list registers). What sorting and
senders do to the list registers is Linux 6.1; so is that an end or deactivation looks at the INTID alone, not at the
sender in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric.devices.arm.vgic_irq import (
    ADRIFT,
    FIRST_SPECIAL,
    NR_LIST_REGISTERS,
    NR_SGIS,
    PRIORITY_SHIFT,
    SPURIOUS,
    Entry,
    VgicCpu,
    VgicIrq,
    WiredIrq,
)

if TYPE_CHECKING:
    from fabric.devices.arm.vgic import Vgic
    from fabric.devices.base import VcpuServices

INTID_MASK = 0x3FF
SENDER_SHIFT = 10
"""Where GICC_IAR has the CPU that sent an SGI."""
OTHER_GROUP = 1022
"""INTID read when the interrupt to take is in group 1 and this register is not the one for it."""
MIN_BPR = 7 - 5
"""Least binary point with five priority bits; of the aliased one, for group 1, one more."""


class Sgi(WiredIrq):
    """An SGI at one vCPU: pending once from each vCPU that sent it. ``senders`` has a bit for the id of each."""

    __slots__ = ("senders",)

    def __init__(self, intid: int, target: VgicCpu, group: int) -> None:
        super().__init__(intid, target, group)
        self.senders = 0

    @property
    def open(self) -> int:
        return self.senders.bit_count()


class VgicV2Cpu(VgicCpu):
    """CPU interface of one vCPU, and what is queued for it. Active priorities of both groups are in ``apr0``."""

    __slots__ = ("ack_group1", "fiq_group0", "list_registers", "order", "sgis")

    def __init__(self, vgic: Vgic, vcpu: VcpuServices) -> None:
        self.ack_group1 = False
        """GICC_CTLR.AckCtl: GICC_IAR takes interrupts of group 1, too."""
        self.fiq_group0 = False
        """GICC_CTLR.FIQEn: group 0 is signalled as FIQ."""
        self.order: list[VgicIrq] = []
        """What is queued or active here, in KVM's order, which is that of the ``seq`` in their entries."""
        self.list_registers: list[VgicIrq] = []
        super().__init__(vgic, vcpu)
        self.sgis = [Sgi(intid, self, 0) for intid in range(NR_SGIS)]
        for sgi in self.sgis:
            sgi.enabled = True
        self.private[:NR_SGIS] = self.sgis

    def register_irq(self, intid: int) -> WiredIrq | None:
        """The interrupt in the distributor's arrays as this vCPU sees them."""
        return self.wired(intid)

    # -- what the guest does ---------------------------------------------------------------------------------

    def take(self, *, aliased: bool = False) -> int:
        """GICC_IAR, or GICC_AIAR for ``aliased``: INTID and sender of what is active from now on, or 1022 or 1023."""
        top = self._top() if self.line else None
        if top is None:
            return SPURIOUS
        irq = top[2]
        if hidden := self._hidden(irq, aliased):
            return hidden
        value = irq.intid
        if isinstance(irq, Sgi):
            sender = irq.senders & -irq.senders
            irq.senders ^= sender
            irq.pending = bool(irq.senders)
            value |= sender.bit_length() - 1 << SENDER_SHIFT
        elif isinstance(irq, WiredIrq) and irq.edge:
            irq.pending = False  # of a level-triggered one the latch lasts as long as the interrupt
        irq.active = True
        self.nr_active += 1
        self.apr0 |= 1 << ((irq.priority & (self.mask1 if irq.group else self.mask0)) >> PRIORITY_SHIFT)
        self.refresh()
        self.ledger.delivered += 1
        if self.events is not None:
            self.events.acknowledged(self.index, irq.intid)
            if isinstance(irq, Sgi) and irq.senders:
                self.events.pending(self.index, irq.intid)
        return value

    def end(self, value: int, *, aliased: bool = False) -> None:
        """GICC_EOIR, or GICC_AEOIR for ``aliased``: drop the priority and, unless EOImode splits that, deactivate.

        Whatever is active with the highest priority, it is the INTID written that is deactivated.
        """
        intid = value & INTID_MASK
        irq = self.wired(intid)
        if intid >= FIRST_SPECIAL or (aliased and (irq is None or not irq.group)):
            return
        self.apr0 &= self.apr0 - 1
        if irq is not None and irq.active and irq in self.list_registers and not self.eoi_split:
            self.vgic.deactivate(irq)
        else:
            self.refresh()

    def highest(self, *, aliased: bool = False) -> int:
        """GICC_HPPIR, or GICC_AHPPIR for ``aliased``: the INTID first in line, whatever runs and whatever PMR says.

        The architecture also has the sender of an SGI in it, and the recorded host does not.
        """
        top = self._top()
        if top is None or not (self.igrpen1 if top[2].group else self.igrpen0):
            return SPURIOUS
        return self._hidden(top[2], aliased) or top[2].intid

    def _hidden(self, irq: VgicIrq, aliased: bool) -> int:
        """What a register reads in place of an interrupt of the group that is not its own; 0: it may be read."""
        if not irq.group:
            return SPURIOUS if aliased else 0
        return 0 if aliased or self.ack_group1 else OTHER_GROUP

    @property
    def pending_group(self) -> int | None:
        """How the interrupt that can be taken now is signalled (0: FIQ, 1: IRQ), or None."""
        group = super().pending_group
        return 1 if group == 0 and not self.fiq_group0 else group

    # -- KVM_RUN ---------------------------------------------------------------------------------------------

    def load(self) -> None:
        """KVM_RUN puts the interface on the hardware and fills the list registers."""
        self._sort()
        super().load()
        self.touch_hardware()
        self.refresh()

    def touch_hardware(self) -> None:
        """The registers go through the hardware, which raises the binary points to what it can do."""
        self.bpr0 = max(self.bpr0, MIN_BPR)
        self.bpr1 = max(self.bpr1, MIN_BPR + 1)

    # -- the list --------------------------------------------------------------------------------------------

    def push(self, irq: VgicIrq, seq: int | None = None) -> None:
        self._place(irq, seq)
        self.update()

    def hold(self, irq: VgicIrq, seq: int | None = None) -> None:
        self._place(irq, seq)
        self.nr_active += 1
        self.update()

    def leave(self, entry: Entry) -> None:
        self.order.remove(entry[2])
        super().leave(entry)

    def purge(self) -> None:
        left = [irq for irq in self.order if irq.active or _seq(irq) in self.parked]
        for irq in self.order:
            if irq not in left:
                irq.entry = None
        self.order = left

    def _place(self, irq: VgicIrq, seq: int | None) -> None:
        """Give ``irq`` the place ``seq`` on the list, or the last one."""
        if seq is None:
            self.seq = seq = self.seq + 1
        elif self.parked:
            self.parked.pop(seq, None)
        new = irq.entry is None or irq.entry is ADRIFT
        irq.entry = (irq.priority, seq, irq, self)
        if new:
            self.order.append(irq)
            if len(self.order) > 1 and _seq(self.order[-2]) > seq:
                self.order.sort(key=_seq)

    def adopt(self, irq: VgicIrq, seq: int) -> None:
        irq.entry = (irq.priority, seq, irq, self)
        self.order.append(irq)
        if irq.active:
            self.nr_active += 1
        elif irq.target is not self or not (irq.enabled and irq.asserted):
            self.parked[seq] = irq

    def arrange(self) -> None:
        self.order.sort(key=_seq)
        self.update()

    def is_queued(self, entry: Entry) -> bool:
        irq = entry[2]
        return irq in self.order and not irq.active and entry[1] not in self.parked

    def _active(self) -> list[VgicIrq]:
        return [irq for irq in self.order if irq.active]

    def refresh(self) -> None:
        """Fill the list registers, and recompute thresholds and ``line``.

        What preempts is what has a higher priority than the running one, which the binary point of its group cut
        when it was taken. (GICv3 cuts both to the binary point of the pending one.)
        """
        if self._long():
            self._fill()
        else:
            self.list_registers = self.order
        self.mask0 = -1 << max(self.bpr0 + 1, PRIORITY_SHIFT)
        self.mask1 = self.mask0 if self.cbpr else -1 << max(self.bpr1, PRIORITY_SHIFT)
        active = self.apr0
        running = (active & -active).bit_length() - 1 << PRIORITY_SHIFT if active else 0x100
        ceiling = min(self.pmr, running)
        self.threshold0 = ceiling if self.igrpen0 else 0
        self.threshold = ceiling if self.igrpen1 else 0
        self.line = self._deliverable() is not None

    def _long(self) -> bool:
        """Whether KVM sorts the list, and chooses from it: because of its length, or of an SGI with several senders."""
        order = self.order
        if len(order) - len(self.parked) > NR_LIST_REGISTERS:
            return True
        for irq in order:
            if irq.intid < NR_SGIS and irq.open + irq.active > 1:
                return True
        return bool(self.parked) and sum(_weight(irq) for irq in order) > NR_LIST_REGISTERS

    def _sorted(self) -> list[VgicIrq]:
        return sorted(self.order, key=_rank if self.parked else _need)

    def _sort(self) -> None:
        """Put the list in order for good, if KVM does."""
        if not self._long():
            return
        ordered = self._sorted()
        if ordered != self.order:
            places = [_seq(irq) for irq in self.order]
            parked = list(self.parked.values())
            for irq, seq in zip(ordered, places, strict=True):
                irq.entry = (irq.priority, seq, irq, self)
            self.parked = {_seq(irq): irq for irq in parked}
            self.order = ordered

    def _fill(self) -> None:
        """Choose what is in the list registers, with more to choose from than there are."""
        if self.vcpu.running and not self.parked:  # with parked ones it is in load(), which has sorted it
            self._sort()
            order = self.order
        else:
            order = self._sorted()
        chosen: list[VgicIrq] = []
        lowest = 0xFF
        for irq in order:
            if irq.priority > lowest or len(chosen) == NR_LIST_REGISTERS:
                break
            if not irq.active and _seq(irq) in self.parked:
                continue
            chosen.append(irq)
            if irq.intid < NR_SGIS and irq.open + irq.active > 1:
                lowest = irq.priority
        self.list_registers = chosen

    def _top(self) -> Entry | None:
        """The highest-priority pending interrupt in a list register, the first of equals."""
        if not self.forwarding:
            return None
        best = None
        for irq in self.list_registers:
            if not irq.active and (best is None or irq.priority < best.priority):
                if self.parked and _seq(irq) in self.parked:
                    continue
                best = irq
        return None if best is None else best.entry

    def _holds(self, entry: Entry) -> bool:
        return entry[2] in self.list_registers

    def _check(self) -> None:
        before = list(self.list_registers)
        super()._check()
        assert before == self.list_registers
        places = [_seq(irq) for irq in self.order]
        assert places == sorted(places)
        assert len(places) == len(set(places))
        assert not self.apr1
        assert not self.queue
        assert not self.queue0
        for irq in self.order:
            assert irq.entry is not None
            assert irq.entry[3] is self
        for sgi in self.sgis:
            assert sgi.pending == bool(sgi.senders)


def _seq(irq: VgicIrq) -> int:
    assert irq.entry is not None
    return irq.entry[1]


def _weight(irq: VgicIrq) -> int:
    """How many interrupts KVM takes ``irq`` for: an SGI is one from each sender, and one more while it is active."""
    return irq.open + irq.active if irq.intid < NR_SGIS else irq.active or irq.asserted


def _need(irq: VgicIrq) -> int:
    """By what KVM sorts, while everything on the list is active or waits to be taken."""
    return -1 if irq.active else irq.priority


def _rank(irq: VgicIrq) -> int:
    """By what KVM sorts."""
    return _need(irq) if irq.active or (irq.enabled and irq.asserted) else 0x100
