"""Interrupts of a GIC and the queue of them at each vCPU.

:class:`VgicIrq` is one interrupt, :class:`WiredIrq` one with an input line (SGI, PPI, SPI), :class:`VgicCpu`
the part of the GIC that belongs to one vCPU: its private interrupts, the interrupts queued for it, and the
rules of acknowledge, priority drop and deactivation that the CPU interfaces of GICv2 and GICv3 share.

How a pending interrupt is found
--------------------------------
A vCPU has one heap per group of entries ``(priority, seq, irq, cpu)``; ``seq`` makes equal priorities first
in, first out. Removing from the middle of a heap is lazy: ``irq.entry`` then names another entry or none,
and the stale one is dropped when it reaches the top. The top of a heap is never stale, so "is something
deliverable?" is one comparison, ``queue[0][0] < threshold``, and everything else is O(log n) in the interrupts
queued at this one vCPU.

Which interrupts are at a vCPU
------------------------------
KVM keeps a list of interrupts for each vCPU. One gets onto the list of its target at an event (raised, enabled,
made active, ...), and off a list only when that vCPU leaves the guest and finds that there is nothing to do: it is
neither active nor pending, disabled, not forwarded, or another's by now, whose list it then joins. So

* ``irq.entry`` is its place on the list: while it is queued, active (so one raised again while active goes
  before what was queued meanwhile), or *parked*: nothing to do, but the vCPU stands still and cannot see it;
* a vCPU that runs leaves the guest all the time, so nothing is parked there;
* an interrupt on one vCPU's list is not queued at another, whatever happens to it.

With more on a list than there are list registers, entering the guest puts the list in order for good: the active
ones, the pending ones by priority, the rest.

Accounting
----------
An interrupt is open in the ledger while it is pending and not yet taken: an edge-triggered one while its latch
``pending`` is set; a level-triggered one while its latch is set or its line high, and it is not active. A line
still high at its end opens a new one.

Specification: GICv3 architecture (IHI 0069), chapters 4 (handling, prioritisation) and 12 (system registers).
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric.devices.arm.vgic import Vgic
    from fabric.devices.base import IrqEvents, VcpuServices
    from fabric.trace.ledger import Ledger

NR_SGIS = 16
NR_PRIVATE_IRQS = 32
MIN_LPI = 8192
SPURIOUS = 1023
"""INTID read when there is nothing to acknowledge."""
FIRST_SPECIAL = 1020
LAST_SPECIAL = 1023
INTID_MASK = 0xFF_FFFF
"""The INTID in a register that holds one."""
IDLE_PRIORITY = 0xFF
"""Running priority of a vCPU with no active interrupt."""
PRIORITY_BITS = 5
"""Implemented priority bits: the upper five of eight."""
PRIORITY_SHIFT = 8 - PRIORITY_BITS
_APR_BIT = tuple(1 << (priority >> PRIORITY_SHIFT) for priority in range(256))
"""Priority to its bit in the active priorities register."""
PRIORITY_MASK = 0xFF & -(1 << PRIORITY_SHIFT)
NR_LIST_REGISTERS = 4
"""What a vCPU can hold of active and pending interrupts at a time; active ones come first."""

Entry: TypeAlias = "tuple[int, int, VgicIrq, VgicCpu]"


class VgicIrq:
    """One interrupt; of this class itself only LPIs, of which there may be millions."""

    __slots__ = ("active", "enabled", "entry", "group", "intid", "pending", "priority", "target")

    intid: int
    priority: int
    """0 (highest) to 0xf8."""
    group: int
    """0 or 1."""
    enabled: bool
    pending: bool
    """The pending latch: set by an edge or a write to ISPENDR, never by the level of a line."""
    active: bool
    target: VgicCpu | None
    """Where it goes to when it is raised next."""
    entry: Entry | None
    """Its place on a vCPU's list; None or ADRIFT when it is on none."""

    def __init__(self, intid: int, target: VgicCpu | None, group: int = 1) -> None:
        self.intid = intid
        self.priority = 0
        self.group = group
        self.enabled = False
        self.pending = False
        self.active = False
        self.target = target
        self.entry = None

    @property
    def asserted(self) -> bool:
        """Pending as the guest sees it: the latch, or the line of a level-triggered interrupt."""
        return self.pending

    @property
    def open(self) -> int:
        """Raised and not yet taken: counted as pending by the ledger. More than 1 only where senders are told apart."""
        return self.pending

    def __repr__(self) -> str:
        flags = "".join(
            letter if on else "-" for letter, on in (("P", self.asserted), ("A", self.active), ("E", self.enabled))
        )
        where = "-" if self.target is None else self.target.index
        return f"<{type(self).__name__} {self.intid} {flags} priority {self.priority:#04x} -> {where}>"


_NOTHING_TAKEN = VgicIrq(-1, None)
ADRIFT: Entry = (0, 0, _NOTHING_TAKEN, None)  # type: ignore[assignment]
"""``entry`` of an interrupt that is active and on no vCPU's list: the next event puts it onto its target's."""


class WiredIrq(VgicIrq):
    """An SGI, PPI or SPI: configurable trigger and, except for SGIs, an input line."""

    __slots__ = ("edge", "line", "owner", "route")

    edge: bool
    line: bool
    """Level of the input line; of a level-triggered interrupt, or as userspace stored it."""
    owner: object | None
    """The in-kernel device wired to the line (arch timer, PMU): KVM_IRQ_LINE is then ignored."""
    route: int
    """SPI: the affinity in GICD_IROUTER, as written."""

    def __init__(self, intid: int, target: VgicCpu | None, group: int = 1, *, edge: bool = True) -> None:
        super().__init__(intid, target, group)
        self.edge = edge
        self.line = False
        self.owner = None
        self.route = 0

    @property
    def asserted(self) -> bool:
        return self.pending or (self.line and not self.edge)

    @property
    def open(self) -> int:
        return self.pending if self.edge else (self.pending or self.line) and not self.active


class _HotFields:
    """What every interrupt reads and writes of a vCPU. Slots of a base class lie first and together: with hundreds of
    vCPUs, which are all out of the processor's cache, that is two lines of it an interrupt rather than five."""

    __slots__ = (
        "apr0", "apr1", "events", "forwarding", "igrpen1", "kick", "ledger", "line", "mask1", "mixed", "nr_active",
        "pmr", "queue", "queue0", "seq", "taken", "threshold",
    )  # fmt: skip


class VgicCpu(_HotFields):
    """The GIC's part for one vCPU: private interrupts, the queues, and the state of the CPU interface.

    What the vCPU itself does (acknowledge, end, write a CPU interface register) changes ``line`` only; what
    others do to it also calls ``kick`` when ``line`` becomes true.
    """

    __slots__ = (
        "bpr0", "bpr1", "cbpr", "eoi_split", "igrpen0", "index", "lpis", "mask0", "parked", "private", "threshold0",
        "vcpu", "vgic",
    )  # fmt: skip

    def __init__(self, vgic: Vgic, vcpu: VcpuServices) -> None:
        self.vgic = vgic
        self.vcpu = vcpu
        self.index: int = vcpu.index
        self.kick: Callable[[], None] = vcpu.kick
        self.ledger: Ledger = vgic.ledger
        self.events: IrqEvents | None = vgic.events
        self.lpis: dict[int, VgicIrq] = vgic.lpis
        self.private = [WiredIrq(intid, self, edge=intid < NR_SGIS) for intid in range(NR_PRIVATE_IRQS)]
        for sgi in self.private[:NR_SGIS]:
            sgi.enabled = True
        self.queue: list[Entry] = []
        """Group 1 interrupts that are pending and enabled, a heap."""
        self.queue0: list[Entry] = []
        """The same for group 0."""
        self.seq = 0
        self.parked: dict[int, VgicIrq] = {}
        """Interrupts with nothing to do here that keep their place until the vCPU runs, by ``seq``."""
        self.taken = _NOTHING_TAKEN
        """The LPI taken last: most often the one that ends next."""
        self.nr_active = 0
        """Interrupts active at this vCPU."""
        self.line = False
        """An interrupt can be taken now."""
        self.forwarding = False
        """The distributor forwards interrupts (GICD_CTLR)."""
        self.pmr = 0
        self.bpr0 = 0
        self.bpr1 = 0
        """Binary points as stored; the hardware raises them to what the priority bits allow."""
        self.cbpr = False
        self.eoi_split = False
        """EOImode: ending an interrupt drops the priority, and DIR deactivates it."""
        self.igrpen0 = False
        self.igrpen1 = False
        self.apr0 = 0
        self.apr1 = 0
        """Active priorities of group 1: bit n stands for priority ``n << PRIORITY_SHIFT``."""
        self.mixed = False
        """Group 0 has to be looked at as well: it is enabled, or has interrupts queued."""
        self.mask0 = self.mask1 = 0
        self.threshold0 = self.threshold = 0
        """Priorities below this can be delivered, for group 0 and 1; 0: none."""
        self.refresh()

    # -- the hot path: acknowledge and end ------------------------------------------------------------------

    def acknowledge(self, group: int = 1) -> int:
        """Take the highest-priority interrupt of ``group``; the INTID, or 1023 when there is none to take."""
        if self.mixed or not group:
            if self._deliverable() != group:
                return SPURIOUS
            queue = self.queue if group else self.queue0
        else:
            if not self.line:
                return SPURIOUS
            queue = self.queue
        irq = heappop(queue)[2]
        intid = irq.intid
        if intid >= MIN_LPI or (isinstance(irq, WiredIrq) and irq.edge):
            irq.pending = False  # of a level-triggered one the latch lasts as long as the interrupt
        irq.active = True
        self.taken = irq if intid >= MIN_LPI else _NOTHING_TAKEN
        self.nr_active = nr_active = self.nr_active + 1
        if queue:
            top = queue[0]
            while top[2].entry is not top:
                heappop(queue)
                if not queue:
                    break
                top = queue[0]
        if group:
            priority = irq.priority & self.mask1
            self.apr1 |= 1 << (priority >> PRIORITY_SHIFT)
        else:
            priority = irq.priority & self.mask0
            self.apr0 |= 1 << (priority >> PRIORITY_SHIFT)
        if self.mixed or nr_active >= NR_LIST_REGISTERS:
            self.refresh()
        else:
            # It was the highest of all, so nothing left can preempt it.
            self.threshold = priority
            self.line = False
        self.ledger.delivered += 1
        if self.events is not None:
            self.events.acknowledged(self.index, intid)
        return intid

    def end_of_interrupt(self, group: int, intid: int) -> None:
        """Drop the priority, and deactivate unless EOImode splits that; an INTID not active only drops."""
        active1 = self.apr1
        if self.apr0 or not group:
            if FIRST_SPECIAL <= intid <= LAST_SPECIAL or not self.apr0 | active1:
                return
            dropped = self._drop_priority()
            mask = self.mask1 if group else self.mask0
        else:
            if not active1 or FIRST_SPECIAL <= intid <= LAST_SPECIAL:
                return
            lowest = active1 & -active1
            dropped = (lowest.bit_length() - 1) << PRIORITY_SHIFT
            mask = self.mask1
            self.apr1 = active1 = active1 ^ lowest
            if active1 or self.mixed or self.nr_active >= NR_LIST_REGISTERS:
                self.refresh()
            else:
                self.threshold = self.pmr if self.igrpen1 and self.forwarding else 0
                queue = self.queue
                self.line = bool(queue) and queue[0][0] < self.threshold
        irq = self.taken if self.taken.intid == intid else self.irq(intid)
        if irq is None:
            return
        if self.eoi_split and intid < MIN_LPI:
            return
        # An end that does not match what is running (another group or priority) drops the priority and leaves
        # the interrupt active.
        if irq.active and irq.group == group and irq.priority & mask == dropped:
            entry = irq.entry
            if entry is not None and entry[3] is self:
                if intid >= MIN_LPI and not irq.pending and self.nr_active < NR_LIST_REGISTERS:
                    irq.active = False
                    irq.entry = None
                    self.nr_active -= 1
                    if self.events is not None:
                        self.events.completed(self.index, intid)
                elif self._holds(entry):
                    self.vgic.deactivate(irq)
        elif intid >= MIN_LPI and not irq.active and irq.priority & mask == dropped and self.events is not None:
            # Taken before the VM was saved: an LPI has no active state, so only its priority was restored.
            self.events.completed(self.index, intid)

    def iar1(self) -> int:
        """ICC_IAR1_EL1: ``acknowledge(1)``, with the common case spelled out: an LPI, and nothing active."""
        if not self.line or self.nr_active or self.mixed:
            return self.acknowledge(1)
        queue = self.queue
        irq = queue[0][2]
        if irq.__class__ is not VgicIrq:
            return self.acknowledge(1)
        heappop(queue)
        irq.pending = False
        irq.active = True
        self.taken = irq
        self.nr_active = 1
        while queue and queue[0][2].entry is not queue[0]:
            heappop(queue)
        self.threshold = priority = irq.priority & self.mask1
        self.apr1 |= _APR_BIT[priority]
        self.line = False
        self.ledger.delivered += 1
        if self.events is not None:
            self.events.acknowledged(self.index, irq.intid)
        return irq.intid

    def eoir1(self, value: int) -> None:
        """ICC_EOIR1_EL1: ``end_of_interrupt(1, ...)``, with the end of the LPI that alone is active spelled out."""
        irq = self.taken
        if (
            irq.intid != value
            or self.nr_active != 1
            or not irq.active
            or self.apr1 != _APR_BIT[irq.priority & self.mask1]
            or self.mixed
            or (entry := irq.entry) is None
            or entry[3] is not self
        ):
            self.end_of_interrupt(1, value & INTID_MASK)
            return
        queue = self.queue
        if irq.pending:
            # Raised again meanwhile: queued in the place it had.
            if irq.target is not self or not irq.enabled or entry[0] != irq.priority or not self.forwarding:
                self.end_of_interrupt(1, value)
                return
            heappush(queue, entry)
        else:
            irq.entry = None
        irq.active = False
        self.nr_active = self.apr1 = 0
        self.threshold = threshold = self.pmr if self.igrpen1 and self.forwarding else 0
        self.line = bool(queue) and queue[0][0] < threshold
        if self.events is not None:
            self.events.completed(self.index, value)

    # -- the rest of the CPU interface ----------------------------------------------------------------------

    def deactivate(self, intid: int) -> None:
        """ICC_DIR: deactivate an SGI, PPI or SPI that is active at this vCPU; ignored unless EOImode splits."""
        if not self.eoi_split:
            return
        irq = self.wired(intid)
        if irq is not None and irq.active:
            entry = irq.entry
            if entry is not None and entry[3] is self and self._holds(entry):
                self.vgic.deactivate(irq)

    def irq(self, intid: int) -> VgicIrq | None:
        """The interrupt that this vCPU means by ``intid``, or None."""
        return self.lpis.get(intid) if intid >= MIN_LPI else self.wired(intid)

    def wired(self, intid: int) -> WiredIrq | None:
        """The SGI, PPI or SPI that this vCPU means by ``intid``, or None."""
        if intid < NR_PRIVATE_IRQS:
            return self.private[intid]
        spis = self.vgic.spis
        index = intid - NR_PRIVATE_IRQS
        return spis[index] if index < len(spis) else None

    def register_irq(self, intid: int) -> WiredIrq | None:
        """The interrupt in the arrays of this vCPU's own registers."""
        return self.private[intid] if intid < NR_PRIVATE_IRQS else None

    def highest_pending(self, group: int) -> int:
        """ICC_HPPIR: the highest-priority pending interrupt if of ``group``, whatever PMR says; or 1023."""
        top = self._top()
        return top[2].intid if top is not None and top[2].group == group else SPURIOUS

    @property
    def running_priority(self) -> int:
        """ICC_RPR: priority of the innermost active interrupt, 0xff when there is none."""
        active = self.apr0 | self.apr1
        return ((active & -active).bit_length() - 1) << PRIORITY_SHIFT & 0xFF if active else IDLE_PRIORITY

    @property
    def pending_group(self) -> int | None:
        """Group of the interrupt that can be taken now (0: FIQ, 1: IRQ), or None."""
        return self._deliverable() if self.line else None

    def refresh(self) -> None:
        """Recompute thresholds and ``line``: PMR, enables, binary points or active priorities changed."""
        # The group priority: bits above the binary point, and never more than are implemented.
        self.mask0 = -1 << max(self.bpr0 + 1, PRIORITY_SHIFT)
        self.mask1 = self.mask0 if self.cbpr else -1 << max(self.bpr1, PRIORITY_SHIFT)
        active = self.apr0 | self.apr1
        running = (active & -active).bit_length() - 1 << PRIORITY_SHIFT if active else 0x100
        pmr = self.pmr if self.forwarding and self.nr_active < NR_LIST_REGISTERS else 0
        self.threshold0 = min(pmr, running & self.mask0) if self.igrpen0 else 0
        self.threshold = min(pmr, running & self.mask1) if self.igrpen1 else 0
        self.mixed = self.igrpen0 or bool(self.queue0) or bool(self.apr0)
        self.line = self._deliverable() is not None

    def _top(self) -> Entry | None:
        """The highest-priority interrupt of the enabled groups among those in list registers."""
        free = NR_LIST_REGISTERS - self.nr_active
        if free <= 0 or not self.forwarding:
            return None
        first = self.queue[0] if self.queue and self.igrpen1 else None
        other = self.queue0[0] if self.queue0 and self.igrpen0 else None
        if first is None:
            first, hiding = other, self.queue
        elif other is not None:
            return min(first, other)
        else:
            hiding = self.queue0
        # Interrupts of the disabled group take list registers all the same.
        if first is not None and hiding and self._ahead(hiding, first) >= free:
            return None
        return first

    @staticmethod
    def _ahead(queue: list[Entry], entry: Entry) -> int:
        """How many interrupts in ``queue`` go before ``entry``."""
        return sum(other < entry and other[2].entry is other for other in queue)

    def _holds(self, entry: Entry) -> bool:
        """Whether an active interrupt is in a list register; with more than there are, the earliest are."""
        if self.nr_active <= NR_LIST_REGISTERS:
            return True
        return sum(_place(irq) < entry[1] for irq in self._active()) < NR_LIST_REGISTERS

    def _deliverable(self) -> int | None:
        """Group of the interrupt that an acknowledge would take, or None."""
        top = self._top()
        if top is None:
            return None
        group = top[2].group
        return group if top[0] < (self.threshold if group else self.threshold0) else None

    def _drop_priority(self) -> int:
        """Clear the highest active priority of both groups and return it."""
        lowest0 = self.apr0 & -self.apr0
        lowest1 = self.apr1 & -self.apr1
        if lowest0 and (not lowest1 or lowest0 <= lowest1):
            self.apr0 ^= lowest0
            lowest = lowest0
        else:
            self.apr1 ^= lowest1
            lowest = lowest1
        self.refresh()
        return lowest.bit_length() - 1 << PRIORITY_SHIFT

    # -- the list -------------------------------------------------------------------------------------------

    def load(self) -> None:
        """KVM_RUN runs the guest: the list is put in order, and what has nothing to do here is off it."""
        if self.nr_active + len(self.queue) + len(self.queue0) + len(self.parked) > NR_LIST_REGISTERS:
            self._sort()
        if not self.forwarding:
            self.purge()
            self.refresh()
        if self.parked:
            parked = sorted(self.parked.items())
            for seq, irq in parked:
                self.leave((irq.priority, seq, irq, self))
                self.vgic.settle(irq)

    def push(self, irq: VgicIrq, seq: int | None = None) -> None:
        """Queue ``irq`` here, at the end of its priority or in the place ``seq`` it has."""
        seq = self._take_place(seq)
        entry = irq.entry = (irq.priority, seq, irq, self)
        heappush(self.queue if irq.group else self.queue0, entry)
        self.update()

    def hold(self, irq: VgicIrq, seq: int | None = None) -> None:
        """Give an active interrupt its place here, off the queues."""
        irq.entry = (irq.priority, self._take_place(seq), irq, self)
        self.nr_active += 1
        self.tidy()

    def _take_place(self, seq: int | None) -> int:
        """The place ``seq``, which may be that of one parked, or (None) the last one."""
        if seq is None:
            self.seq = seq = self.seq + 1
        elif self.parked:
            self.parked.pop(seq, None)
        return seq

    def park(self, entry: Entry) -> None:
        """Take an interrupt off the queues and keep its place; the vCPU stands still."""
        irq = entry[2]
        irq.entry = (entry[0], entry[1], irq, self)
        self.parked[entry[1]] = irq
        self.tidy()

    def leave(self, entry: Entry) -> None:
        """Take an interrupt off the list."""
        irq = entry[2]
        irq.entry = None
        if irq.active:
            self.nr_active -= 1
        elif self.parked:
            self.parked.pop(entry[1], None)
        self.tidy()

    def tidy(self) -> None:
        """Drop stale entries from the tops of the queues."""
        for queue in (self.queue, self.queue0):
            while queue and queue[0][2].entry is not queue[0]:
                heappop(queue)
        self.update()

    def _sort(self) -> None:
        """Put the list in order, if it is longer than there are list registers."""
        queued = [entry[2] for queue in (self.queue, self.queue0) for entry in queue if entry[2].entry is entry]
        listed = [*queued, *self.parked.values(), *self._active()]
        if len(listed) <= NR_LIST_REGISTERS:
            return
        places = sorted(_place(irq) for irq in listed)
        ordered = sorted(listed, key=lambda irq: (*_rank(irq), _place(irq)))
        parked = set(self.parked.values())
        self.queue.clear()
        self.queue0.clear()
        self.parked.clear()
        for seq, irq in zip(places, ordered, strict=True):
            entry = irq.entry = (irq.priority, seq, irq, self)
            if irq in parked:
                self.parked[seq] = irq
            elif not irq.active:
                heappush(self.queue if irq.group else self.queue0, entry)

    def _active(self) -> list[VgicIrq]:
        """The interrupts active here."""
        found: list[VgicIrq] = []
        if not self.nr_active:
            return found
        if self.taken.active and self.taken.entry is not None and self.taken.entry[3] is self:
            found.append(self.taken)
        for irq in self.vgic.interrupts():
            if len(found) == self.nr_active:
                break
            if irq.active and irq.entry is not None and irq.entry[3] is self and irq is not self.taken:
                found.append(irq)
        return found

    def update(self) -> None:
        """As :meth:`refresh`; kick the vCPU when ``line`` becomes true."""
        was = self.line
        self.refresh()
        if self.line and not was:
            self.kick()

    def purge(self) -> None:
        """Take everything off the queues; it stays pending, and is queued by the next event on it."""
        for queue in (self.queue, self.queue0):
            for entry in queue:
                if entry[2].entry is entry:
                    entry[2].entry = None
            queue.clear()

    def adopt(self, irq: VgicIrq, seq: int) -> None:
        """Give an interrupt of a restored state the place it had; :meth:`arrange` when all have theirs."""
        irq.entry = entry = (irq.priority, seq, irq, self)
        if irq.active:
            self.nr_active += 1
        elif irq.target is self and irq.enabled and irq.asserted:
            (self.queue if irq.group else self.queue0).append(entry)
        else:
            self.parked[seq] = irq

    def arrange(self) -> None:
        """Order what was adopted."""
        heapify(self.queue)
        heapify(self.queue0)
        self.update()

    def is_queued(self, entry: Entry) -> bool:
        """Whether that very entry is in a queue, for checks."""
        return any(other is entry for other in (*self.queue, *self.queue0))

    def _derived(self) -> tuple[int, ...]:
        return (self.mask0, self.mask1, self.threshold0, self.threshold, self.mixed, self.line)

    def _check(self) -> None:
        """Assert the invariants of the queues and thresholds."""
        before: Any = self._derived()
        self.refresh()
        assert before == self._derived()
        for group, queue in enumerate((self.queue0, self.queue)):
            assert not queue or queue[0][2].entry is queue[0]
            for child in range(1, len(queue)):
                assert queue[(child - 1) // 2][:2] <= queue[child][:2]
            for entry in queue:
                irq = entry[2]
                if irq.entry is entry:
                    assert irq.group == group
                    assert irq.priority == entry[0]
                    assert entry[3] is self
                    assert irq.target is self
                    assert irq.enabled
                    assert irq.asserted
                    assert not irq.active
        assert len(self._active()) == self.nr_active
        assert not (self.parked and self.vcpu.running)
        for seq, irq in self.parked.items():
            assert irq.entry is not None
            assert irq.entry[1] == seq
            assert irq.entry[3] is self
            assert not irq.active


def _place(irq: VgicIrq) -> int:
    assert irq.entry is not None
    return irq.entry[1]


def _rank(irq: VgicIrq) -> tuple[int, int]:
    """Where an interrupt stands in a list that is in order."""
    if irq.active:
        return 0, 0
    return (1, irq.priority) if irq.enabled and irq.asserted else (2, 0)
