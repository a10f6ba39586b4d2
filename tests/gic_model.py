"""A second, plain description of a GICv3 guest's interrupts: lists, list registers, and the rules of the interface.

Nothing here is remembered that can be worked out, and nothing is shared with the models under test. It says what a
vCPU reads from ICC_IAR, ICC_HPPIR, ICC_RPR and ISR_EL1, and which interrupts are pending and active.

What it follows: GICv3 architecture (IHI 0069), sections 4.8 (prioritisation) and 12.2 (system registers), for what
is in list registers; and for what gets there, that KVM keeps a list of interrupts for each vCPU (see ``Lists``).
"""

from __future__ import annotations

import attrs

NOTHING = 1023
LIST_REGISTERS = 4
IDLE = 0xFF
FIRST_LPI = 8192


@attrs.define(eq=False)
class Irq:
    """An interrupt. ``home`` is the vCPU it goes to, ``on`` the one on whose list it is."""

    intid: int
    home: int | None
    enabled: bool = True
    priority: int = 0xA0
    group: int = 1
    edge: bool = True
    line: bool = False
    latch: bool = False
    active: bool = False
    on: int | None = None

    @property
    def pending(self) -> bool:
        """As a guest reads it from ISPENDR."""
        return self.latch or (self.line and not self.edge)


@attrs.define
class Interface:
    """The CPU interface of a vCPU; lists are by group."""

    running: bool = False
    pmr: int = 0xF0
    enabled: list[bool] = attrs.field(factory=lambda: [False, True])
    binary_point: list[int] = attrs.field(factory=lambda: [2, 3])
    common: bool = False
    split: bool = False
    active: list[int] = attrs.field(factory=lambda: [0, 0])
    """Active priorities, bit n for priority 8n."""

    def group_bits(self, group: int) -> int:
        """The bits of a priority that decide preemption."""
        return -1 << (self.binary_point[0] + 1 if group == 0 or self.common else self.binary_point[1])

    @property
    def running_priority(self) -> int:
        """Of the innermost active interrupt, in 8s; None in hardware terms is IDLE."""
        bits = self.active[0] | self.active[1]
        return IDLE if not bits else 8 * ((bits & -bits).bit_length() - 1)


class Lists:
    """Which interrupts are on which vCPU's list, and what that comes to.

    An event puts an interrupt that is active, or pending and enabled and forwarded, onto the list of its home, unless
    it is on one. Being off the list again takes the vCPU: when it stops for a moment it lets go of what is neither
    active nor waiting for it, and what waits for another vCPU goes to the end of that one's list.
    """

    def __init__(self, vcpus: int) -> None:
        self.lists: list[list[Irq]] = [[] for _ in range(vcpus)]
        self.cpus = [Interface() for _ in range(vcpus)]
        self.forwarding = True

    def wanted_at(self, irq: Irq) -> int | None:
        """The vCPU that has something to do for ``irq``."""
        if irq.active:
            return irq.home if irq.on is None else irq.on
        return irq.home if irq.enabled and irq.pending and self.forwarding else None

    def event(self, irq: Irq) -> None:
        """Something happened to ``irq`` that has it looked at."""
        where = self.wanted_at(irq)
        if irq.on is None and where is not None:
            irq.on = where
            self.lists[where].append(irq)
        self.breathe()

    def breathe(self) -> None:
        """The vCPUs that run stop for a moment."""
        for cpu, interface in enumerate(self.cpus):
            if interface.running:
                self.let_go(cpu)

    def let_go(self, cpu: int) -> None:
        """``cpu`` lets go of what has nothing to do with it."""
        for irq in list(self.lists[cpu]):
            where = self.wanted_at(irq)
            if where != cpu:
                self.lists[cpu].remove(irq)
                irq.on = where
                if where is not None:
                    self.lists[where].append(irq)

    def in_order(self, cpu: int) -> list[Irq]:
        """The list as list registers are filled from it: sorted when it is longer than they are many."""
        listed = self.lists[cpu]
        return sorted(listed, key=_need) if len(listed) > LIST_REGISTERS else list(listed)

    def start(self, cpu: int) -> None:
        """``cpu`` begins to run."""
        self.lists[cpu] = self.in_order(cpu)
        self.cpus[cpu].running = True
        self.let_go(cpu)
        self.breathe()

    def stop(self, cpu: int) -> None:
        self.cpus[cpu].running = False

    def flush(self, cpu: int) -> None:
        """LPIs are disabled at ``cpu``."""
        for irq in [irq for irq in self.lists[cpu] if irq.intid >= FIRST_LPI]:
            self.lists[cpu].remove(irq)
            irq.on = None
            irq.latch = False

    # -- what the hardware makes of it -----------------------------------------------------------------------

    def held(self, cpu: int) -> list[Irq]:
        """What is in list registers, in their order."""
        return [irq for irq in self.in_order(cpu) if self.wanted_at(irq) == cpu][:LIST_REGISTERS]

    def highest(self, cpu: int) -> Irq | None:
        """The highest-priority pending interrupt of an enabled group; of equals the one in the first register."""
        waiting = [irq for irq in self.held(cpu) if not irq.active and self.cpus[cpu].enabled[irq.group]]
        return min(waiting, key=lambda irq: irq.priority, default=None)

    def highest_pending(self, cpu: int, group: int) -> int:
        """ICC_HPPIR."""
        irq = self.highest(cpu)
        return irq.intid if irq is not None and irq.group == group else NOTHING

    def signalled(self, cpu: int) -> Irq | None:
        """What the vCPU is interrupted by."""
        irq, interface = self.highest(cpu), self.cpus[cpu]
        if irq is None or irq.priority >= interface.pmr:
            return None
        bits, running = interface.group_bits(irq.group), interface.running_priority
        return irq if running == IDLE or irq.priority & bits < running & bits else None

    def acknowledge(self, cpu: int, group: int) -> int:
        """ICC_IAR."""
        irq, interface = self.signalled(cpu), self.cpus[cpu]
        if irq is None or irq.group != group:
            return NOTHING
        irq.active = True
        if irq.edge:
            irq.latch = False
        interface.active[group] |= 1 << ((irq.priority & interface.group_bits(group)) >> 3)
        self.breathe()
        return irq.intid

    def end(self, cpu: int, group: int, intid: int) -> Irq | None:
        """ICC_EOIR; the interrupt that it ended."""
        interface = self.cpus[cpu]
        dropped = interface.running_priority
        if 1020 <= intid <= 1023 or dropped == IDLE:
            return None
        bit = 1 << (dropped >> 3)
        interface.active[0 if interface.active[0] & bit else 1] ^= bit
        irq = self.active_at(cpu, intid)
        if irq is None or irq.group != group or irq.priority & interface.group_bits(group) != dropped:
            return None
        if interface.split and intid < FIRST_LPI:
            return None
        return self.finish(irq)

    def deactivate(self, cpu: int, intid: int) -> Irq | None:
        """ICC_DIR; the interrupt that it ended."""
        irq = self.active_at(cpu, intid)
        if irq is None or not self.cpus[cpu].split or intid >= FIRST_LPI:
            return None
        return self.finish(irq)

    def active_at(self, cpu: int, intid: int) -> Irq | None:
        """The interrupt if it is active in a list register."""
        return next((irq for irq in self.held(cpu) if irq.active and irq.intid == intid), None)

    def finish(self, irq: Irq) -> Irq:
        """Its active state ends, and with it the latch of a level-triggered one."""
        irq.active = False
        if not irq.edge:
            irq.latch = False
        self.breathe()
        return irq


def _need(irq: Irq) -> int:
    """The key by which a list is sorted: active ones, then by priority, last what does not wait."""
    if irq.active:
        return -1
    return irq.priority if irq.enabled and irq.pending else 0x100
