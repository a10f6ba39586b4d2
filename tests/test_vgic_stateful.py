"""Random lives of interrupts on a GIC, against a model that looks at everything each time.

The model keeps a flat list of interrupts and finds the highest-priority one by sorting; the GIC's queues, cached
thresholds and ``line`` must come to the same, its invariants hold, and the ledger balances after every step.
"""

from __future__ import annotations

from typing import Any

import attrs
from gic_machine import GicMachine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

CPUS = 3
SPIS = (32, 33, 34, 35)
LPIS = (8192, 8193, 8200)
PRIVATE = (0, 1, 16, 17)
LIST_REGISTERS = 4
PRIORITIES = st.sampled_from([0x00, 0x20, 0x28, 0x80, 0xA0, 0xF8])


@attrs.define(eq=False)
class ModelIrq:
    """An interrupt of the model; ``place`` is (vCPU, order) while it is queued or active."""

    intid: int
    real: Any
    target: int
    enabled: bool = True
    priority: int = 0xA0
    group: int = 1
    edge: bool = True
    line: bool = False
    latch: bool = False
    active: bool = False
    place: tuple[int, int] | None = None

    @property
    def asserted(self) -> bool:
        return self.latch or (self.line and not self.edge)


@attrs.define
class ModelCpu:
    """A CPU interface of the model."""

    pmr: int = 0xF0
    enabled: list[bool] = attrs.field(factory=lambda: [False, True])
    bpr: list[int] = attrs.field(factory=lambda: [2, 3])
    cbpr: bool = False
    split: bool = False
    active: list[tuple[int, int]] = attrs.field(factory=list)
    """Active priorities as (priority, group)."""

    def mask(self, group: int) -> int:
        shift = self.bpr[0] + 1 if group == 0 or self.cbpr else self.bpr[1]
        return -1 << shift

    @property
    def running(self) -> int:
        return min((priority for priority, _ in self.active), default=0x100)


class GicMachineTest(RuleBasedStateMachine):
    """Rules are what devices, guests and configuration do."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = GicMachine(CPUS, nr_irqs=64)
        self.vgic = self.machine.vgic
        for vcpu in self.machine.vm.vcpus:
            vcpu.running = True  # or places would be kept until it runs
        self.cpus = [ModelCpu() for _ in range(CPUS)]
        self.forwarding = True
        self.order = 0
        self.irqs: list[ModelIrq] = []
        for intid in SPIS:
            self.irqs.append(ModelIrq(intid, self.machine.spi(intid), 0))
        for intid in LPIS:
            self.irqs.append(ModelIrq(intid, self.machine.lpi(intid), 0))
        for cpu in range(CPUS):
            for intid in PRIVATE:
                real = self.vgic.cpus[cpu].private[intid]
                self.vgic.set_priority(real, 0xA0)
                self.vgic.set_enabled(real, True)
                self.irqs.append(ModelIrq(intid, real, cpu, edge=intid < 16))

    # -- the model

    def changed(self, irq: ModelIrq, *, event: bool = True) -> None:
        """Something happened to ``irq``: it takes (only at an ``event``, or by moving) or gives up its place."""
        wanted = irq.active or (irq.enabled and irq.asserted and self.forwarding)
        if irq.place is not None and (not wanted or (not irq.active and irq.place[0] != irq.target)):
            irq.place = None
            event = True
        if irq.place is None and wanted and event:
            self.order += 1
            irq.place = (irq.target, self.order)

    def at(self, cpu: int) -> list[ModelIrq]:
        return [irq for irq in self.irqs if irq.place is not None and irq.place[0] == cpu]

    def held(self, cpu: int) -> list[ModelIrq]:
        """Active interrupts in list registers."""
        active = sorted((irq for irq in self.at(cpu) if irq.active), key=_order)
        return active[:LIST_REGISTERS]

    def top(self, cpu: int) -> ModelIrq | None:
        """The highest-priority pending interrupt that is in a list register and of an enabled group."""
        if not self.forwarding:
            return None
        waiting = sorted((irq for irq in self.at(cpu) if not irq.active), key=lambda i: (i.priority, _order(i)))
        for irq in waiting[: LIST_REGISTERS - len(self.held(cpu))]:
            if self.cpus[cpu].enabled[irq.group]:
                return irq
        return None

    def deliverable(self, cpu: int) -> ModelIrq | None:
        irq, interface = self.top(cpu), self.cpus[cpu]
        if irq is None or irq.priority >= interface.pmr:
            return None
        mask = interface.mask(irq.group)
        return irq if irq.priority & mask < interface.running & mask else None

    def end(self, irq: ModelIrq) -> None:
        irq.active = False
        if not irq.edge:
            irq.latch = False
        self.changed(irq)

    def find(self, cpu: int, intid: int) -> ModelIrq | None:
        for irq in self.irqs:
            if irq.intid == intid and (intid >= 32 or irq.target == cpu):
                return irq
        return None

    # -- what devices do

    @rule(n=st.integers(0, 99), level=st.booleans())
    def drive_line(self, n: int, level: bool) -> None:
        irq = self.irqs[n % len(self.irqs)]
        if 16 <= irq.intid < 8192:
            self.vgic.line_level(irq.real, level)
            if irq.edge:
                if level:
                    irq.latch = True
                    self.changed(irq)
            elif irq.line != level:
                irq.line = level
                self.changed(irq, event=level)

    @rule(n=st.integers(0, 99))
    def pend(self, n: int) -> None:
        irq = self.irqs[n % len(self.irqs)]
        if irq.edge:
            self.vgic.pend_edge(irq.real)
        else:
            self.vgic.set_pending(irq.real)
        irq.latch = True
        self.changed(irq)

    @rule(n=st.integers(0, 99))
    def clear(self, n: int) -> None:
        irq = self.irqs[n % len(self.irqs)]
        self.vgic.clear_pending(irq.real, "cleared")
        irq.latch = False
        self.changed(irq, event=False)

    # -- what a guest does

    @rule(cpu=st.integers(0, CPUS - 1), group=st.sampled_from([1, 1, 1, 0]))
    def acknowledge(self, cpu: int, group: int) -> None:
        irq = self.deliverable(cpu)
        if irq is not None and irq.group != group:
            irq = None
        assert (1023 if irq is None else irq.intid) == self.vgic.cpus[cpu].read_sysreg(f"ICC_IAR{group}_EL1")
        if irq is not None:
            if irq.edge:
                irq.latch = False
            irq.active = True
            self.cpus[cpu].active.append((irq.priority & self.cpus[cpu].mask(group), group))

    @rule(cpu=st.integers(0, CPUS - 1), n=st.integers(0, 99), group=st.sampled_from([1, 1, 1, 0]))
    def end_of_interrupt(self, cpu: int, n: int, group: int) -> None:
        active = self.held(cpu)
        if active and n < 80:
            intid, group = active[n % len(active)].intid, active[n % len(active)].group
        else:
            intid = (0, 17, 33, 8192, 1023, 700, 9999)[n % 7]
        self.vgic.cpus[cpu].write_sysreg(f"ICC_EOIR{group}_EL1", intid)
        interface = self.cpus[cpu]
        if intid == 1023 or not interface.active:
            return
        dropped = min(interface.active)
        interface.active.remove(dropped)
        irq = self.find(cpu, intid)
        if irq is None or irq not in self.held(cpu) or irq.group != group:
            return
        if irq.priority & interface.mask(group) == dropped[0] and (intid >= 8192 or not interface.split):
            self.end(irq)

    @rule(cpu=st.integers(0, CPUS - 1), n=st.integers(0, 99))
    def deactivate(self, cpu: int, n: int) -> None:
        irq = self.irqs[n % len(self.irqs)]
        self.vgic.cpus[cpu].deactivate(irq.intid)
        found = self.find(cpu, irq.intid)
        if self.cpus[cpu].split and found is not None and found in self.held(cpu):
            self.end(found)

    @rule(cpu=st.integers(0, CPUS - 1), pmr=st.sampled_from([0, 0x20, 0x80, 0xF0, 0xF8]))
    def set_priority_mask(self, cpu: int, pmr: int) -> None:
        self.vgic.cpus[cpu].write_sysreg("ICC_PMR_EL1", pmr)
        self.cpus[cpu].pmr = pmr

    @rule(cpu=st.integers(0, CPUS - 1), group=st.integers(0, 1), on=st.booleans())
    def enable_group(self, cpu: int, group: int, on: bool) -> None:
        self.vgic.cpus[cpu].write_sysreg(f"ICC_IGRPEN{group}_EL1", int(on))
        self.cpus[cpu].enabled[group] = on

    @rule(cpu=st.integers(0, CPUS - 1), group=st.integers(0, 1), value=st.integers(0, 7))
    def set_binary_point(self, cpu: int, group: int, value: int) -> None:
        self.vgic.cpus[cpu].write_sysreg(f"ICC_BPR{group}_EL1", value)
        if not (group and self.cpus[cpu].cbpr):
            self.cpus[cpu].bpr[group] = max(value, 2 + group)

    @rule(cpu=st.integers(0, CPUS - 1), cbpr=st.booleans(), split=st.booleans())
    def set_control(self, cpu: int, cbpr: bool, split: bool) -> None:
        self.vgic.cpus[cpu].write_sysreg("ICC_CTLR_EL1", cbpr | split << 1)
        self.cpus[cpu].cbpr, self.cpus[cpu].split = cbpr, split

    @rule(cpu=st.integers(0, CPUS - 1), intid=st.integers(0, 1), mask=st.integers(0, 7), others=st.booleans())
    def send_sgi(self, cpu: int, intid: int, mask: int, others: bool) -> None:
        self.vgic.cpus[cpu].write_sysreg("ICC_SGI1R_EL1", others << 40 | intid << 24 | mask)
        for irq in self.irqs:
            if irq.intid == intid and (irq.target != cpu if others else mask >> irq.target & 1):
                irq.latch = True
                self.changed(irq)

    # -- configuration

    @rule(n=st.integers(0, 99), on=st.booleans())
    def enable(self, n: int, on: bool) -> None:
        irq = self.irqs[n % len(self.irqs)]
        self.vgic.set_enabled(irq.real, on)
        irq.enabled = on
        self.changed(irq)

    @rule(n=st.integers(0, 99), priority=PRIORITIES)
    def set_priority(self, n: int, priority: int) -> None:
        irq = self.irqs[n % len(self.irqs)]
        self.vgic.set_priority(irq.real, priority)
        irq.priority = priority
        self.changed(irq, event=False)

    @rule(n=st.integers(0, 99), group=st.integers(0, 1))
    def set_group(self, n: int, group: int) -> None:
        irq = self.irqs[n % len(self.irqs)]
        if irq.intid < 8192:
            self.vgic.set_group(irq.real, group)
            irq.group = group
            self.changed(irq)

    @rule(n=st.integers(0, 99), edge=st.booleans())
    def set_trigger(self, n: int, edge: bool) -> None:
        irq = self.irqs[n % len(self.irqs)]
        if 32 <= irq.intid < 8192:
            self.vgic.set_edge(irq.real, edge)
            irq.edge = edge
            self.changed(irq, event=False)

    @rule(n=st.integers(0, 99), to=st.integers(0, CPUS - 1))
    def retarget(self, n: int, to: int) -> None:
        irq = self.irqs[n % len(self.irqs)]
        if irq.intid >= 32:
            self.vgic.retarget(irq.real, self.vgic.cpus[to])
            irq.target = to
            self.changed(irq, event=False)

    @rule(n=st.integers(0, 99), on=st.booleans())
    def set_active(self, n: int, on: bool) -> None:
        irq = self.irqs[n % len(self.irqs)]
        if irq.intid >= 8192:
            return
        if on:
            self.vgic.activate(irq.real)
            irq.active = True
            self.changed(irq)
        else:
            self.vgic.deactivate(irq.real, ended=False)
            if irq.active:
                irq.active = False
                self.changed(irq)

    @rule(on=st.sampled_from([True, True, False]))
    def set_forwarding(self, on: bool) -> None:
        self.vgic.set_forwarding(on)
        self.forwarding = on
        for irq in self.irqs:
            if not on and not irq.active:
                irq.place = None

    @initialize()
    def start(self) -> None:
        self.machine.check()

    # -- what must hold

    @invariant()
    def comes_to_the_same(self) -> None:
        self.machine.check()
        for index, (cpu, model) in enumerate(zip(self.vgic.cpus, self.cpus, strict=True)):
            deliverable, top = self.deliverable(index), self.top(index)
            assert (deliverable is not None) == cpu.line
            assert (None if deliverable is None else deliverable.group) == cpu.pending_group
            for group in (0, 1):
                shown = top.intid if top is not None and top.group == group else 1023
                assert shown == cpu.highest_pending(group)
            assert (model.running if model.active else 0xFF) == cpu.running_priority
        for irq in self.irqs:
            assert (irq.asserted, irq.active) == (irq.real.asserted, irq.real.active)

    @invariant()
    def a_copy_is_the_same(self) -> None:
        """A GIC made from the state of this one has that state."""
        copy = type(self.vgic).from_state(self.twin(), self.vgic.state())
        copy._check()
        assert self.vgic.state() == copy.state()
        assert [cpu.line for cpu in self.vgic.cpus] == [cpu.line for cpu in copy.cpus]

    def twin(self) -> Any:
        """An empty VM with the same vCPUs."""
        twin = type(self.machine.vm)(CPUS)
        for vcpu in twin.vcpus:
            vcpu.running = True
        return twin


def _order(irq: ModelIrq) -> int:
    assert irq.place is not None
    return irq.place[1]


TestGic = GicMachineTest.TestCase
TestGic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
