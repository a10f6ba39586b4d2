"""Random register traffic of several vCPUs on a GICv2, against a model that looks at everything each time.

The model keeps for each vCPU KVM's list of interrupts, sorts it whenever there is a crowd and picks what is in list
registers anew for every question. The GIC must come to the same, its invariants hold, and the ledger balances after
every step. Everything goes in by registers: the guest's while the vCPUs run, userspace's while they stand still.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from gic_machine import DIST_REGS
from gicv2_machine import (
    ABPR,
    AEOIR,
    AHPPIR,
    AIAR,
    BPR,
    CPENDSGIR,
    CPU_REGS,
    CTLR,
    DIR,
    EOIR,
    HPPIR,
    IAR,
    ICACTIVER,
    ICENABLER,
    ICFGR,
    ICPENDR,
    IGROUPR,
    IPRIORITYR,
    ISACTIVER,
    ISENABLER,
    ISPENDR,
    ITARGETSR,
    OTHER_GROUP,
    PMR,
    RPR,
    SGIR,
    SPENDSGIR,
    SPURIOUS,
    Gicv2Machine,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

CPUS = 2
FIRST_SPI, SPIS = 32, 5
SGIS, PPIS = (0, 1, 2), (16, 17)
LIST_REGISTERS = 4
PRIORITIES = (0x00, 0x20, 0x28, 0x80, 0xA0)
cpus = st.integers(0, CPUS - 1)
mostly = st.sampled_from([True, True, True, True, False])
seldom = st.sampled_from([False, False, False, False, True])
bits = st.integers(0, 0x3_0007)


@attrs.define(eq=False)
class ModelIrq:
    """An interrupt of the model; of an SGI or PPI the one of vCPU ``target``."""

    intid: int
    target: int
    real: Any
    edge: bool = True
    enabled: bool = False
    priority: int = 0
    group: int = 0
    line: bool = False
    latch: bool = False
    senders: set[int] = attrs.field(factory=set)
    active: bool = False

    @property
    def asserted(self) -> bool:
        return self.latch or bool(self.senders) or (self.line and not self.edge)

    @property
    def weight(self) -> int:
        return len(self.senders) + self.active if self.intid < 16 else int(self.active or self.asserted)


@attrs.define
class ModelCpu:
    """A CPU interface of the model, and KVM's list for the vCPU."""

    pmr: int = 0
    group_enabled: list[bool] = attrs.field(factory=lambda: [False, False])
    ackctl: bool = False
    cbpr: bool = False
    split: bool = False
    bpr: list[int] = attrs.field(factory=lambda: [2, 3])
    levels: set[int] = attrs.field(factory=set)
    """Active priorities."""
    list: list[ModelIrq] = attrs.field(factory=list)

    def mask(self, group: int) -> int:
        return -1 << (self.bpr[0] + 1 if group == 0 or self.cbpr else self.bpr[1])

    @property
    def running(self) -> int:
        return min(self.levels, default=0x100)


class Gicv2Test(RuleBasedStateMachine):
    """Rules are what devices, guests and userspace do."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Gicv2Machine(CPUS, nr_irqs=64)
        self.vgic = self.machine.vgic
        self.cpus = [ModelCpu(pmr=0xF0, group_enabled=[True, False]) for _ in range(CPUS)]
        self.running = [True] * CPUS
        self.forwarding = True
        self.groups_writable = False
        self.spis = [ModelIrq(FIRST_SPI + n, 0, self.vgic.spis[n]) for n in range(SPIS)]
        self.private = [
            [
                ModelIrq(n, cpu, self.vgic.cpus[cpu].private[n], edge=n < 16, enabled=n < 16)
                for n in (*range(16), *range(16, 32))
            ]
            for cpu in range(CPUS)
        ]

    # -- the model

    @property
    def irqs(self) -> list[ModelIrq]:
        return [*(irq for own in self.private for irq in own), *self.spis]

    def seen_by(self, cpu: int, intid: int) -> ModelIrq | None:
        if intid < FIRST_SPI:
            return self.private[cpu][intid]
        return self.spis[intid - FIRST_SPI] if intid < FIRST_SPI + SPIS else None

    def home(self, irq: ModelIrq) -> int | None:
        """Whose list ``irq`` is on."""
        return next((n for n, cpu in enumerate(self.cpus) if irq in cpu.list), None)

    def wanted(self, irq: ModelIrq, cpu: int) -> bool:
        """There is something to do for it on that vCPU."""
        return irq.active or (irq.target == cpu and irq.enabled and irq.asserted and self.forwarding)

    def queue(self, irq: ModelIrq) -> None:
        """An event: it gets onto its target's list unless it is on one."""
        if self.home(irq) is None and self.wanted(irq, irq.target):
            self.cpus[irq.target].list.append(irq)

    def prune(self, cpu: int) -> None:
        """A vCPU that runs leaves the guest: what is not wanted there goes to its target, or off."""
        for irq in list(self.cpus[cpu].list):
            if not self.wanted(irq, cpu):
                self.cpus[cpu].list.remove(irq)
                if self.forwarding:
                    self.queue(irq)

    def settle(self) -> None:
        """After a step: running vCPUs have left the guest and entered it again."""
        for cpu in range(CPUS):
            if self.running[cpu]:
                self.prune(cpu)
        for cpu in range(CPUS):
            if self.running[cpu]:
                self.cpus[cpu].list = self.ordered(cpu)

    def ordered(self, cpu: int) -> list[ModelIrq]:
        waiting = self.cpus[cpu].list
        weights = [irq.weight for irq in waiting]
        if sum(weights) <= LIST_REGISTERS and max(weights, default=0) <= 1:
            return list(waiting)
        ranks = {
            id(irq): -1 if irq.active else irq.priority if irq.enabled and irq.asserted else 0x100 for irq in waiting
        }
        return sorted(waiting, key=lambda irq: ranks[id(irq)])

    def list_registers(self, cpu: int) -> list[ModelIrq]:
        chosen: list[ModelIrq] = []
        lowest = 0x100
        for irq in self.ordered(cpu):
            if irq.priority > lowest or len(chosen) == LIST_REGISTERS:
                break
            if self.wanted(irq, cpu):
                chosen.append(irq)
                if irq.weight > 1:
                    lowest = irq.priority
        return chosen

    def top(self, cpu: int) -> ModelIrq | None:
        return min((irq for irq in self.list_registers(cpu) if not irq.active), key=lambda i: i.priority, default=None)

    def deliverable(self, cpu: int) -> ModelIrq | None:
        irq, interface = self.top(cpu), self.cpus[cpu]
        if irq is None or irq.priority >= interface.pmr or not interface.group_enabled[irq.group]:
            return None
        return irq if irq.priority < interface.running else None

    def shown(self, cpu: int, irq: ModelIrq | None, aliased: bool) -> int | None:
        """What is read in the place of ``irq``; None: itself."""
        if irq is None or not self.cpus[cpu].group_enabled[irq.group] or (aliased and not irq.group):
            return SPURIOUS
        return OTHER_GROUP if irq.group and not aliased and not self.cpus[cpu].ackctl else None

    def finish(self, irq: ModelIrq) -> None:
        irq.active = False
        if not irq.edge:
            irq.latch = False

    # -- access

    def gicd(self, offset: int, value: int, cpu: int, size: int = 4) -> None:
        """By the guest if it runs, else by userspace, which has words only."""
        if self.running[0]:
            self.machine.gicd(offset, value, size=size, cpu=cpu)
        else:
            if size == 1:
                shift = offset % 4 * 8
                word = self.machine.get(DIST_REGS, cpu << 32 | offset & ~3)
                value, offset = word & ~(0xFF << shift) | value << shift, offset & ~3
            self.machine.set(DIST_REGS, cpu << 32 | offset, value)

    def gicc(self, offset: int, value: int, cpu: int) -> None:
        if self.running[0]:
            self.machine.gicc(offset, value, cpu=cpu)
        else:
            self.machine.set(CPU_REGS, cpu << 32 | offset, value >> 3 if offset == PMR else value)

    def bank(self, cpu: int, shared: bool, bits: int) -> tuple[int, list[ModelIrq], int]:
        """Offset of a word with a bit for each interrupt, those that have one, and what to write to it."""
        return (4, self.spis, bits & (1 << SPIS) - 1) if shared else (0, self.private[cpu], bits)

    # -- devices

    @rule(ones=st.integers(1, (1 << SPIS) - 1), level=st.sampled_from([True, True, False]))
    def drive_spis(self, ones: int, level: bool) -> None:
        for n, irq in enumerate(self.spis):
            if ones >> n & 1:
                self.vgic.inject_spi(irq.intid, level)
                self.driven(irq, level)

    @rule(cpu=cpus, intid=st.sampled_from(PPIS), level=st.booleans())
    def drive_ppi(self, cpu: int, intid: int, level: bool) -> None:
        self.vgic.inject_ppi(cpu, intid, level)
        self.driven(self.private[cpu][intid], level)

    def driven(self, irq: ModelIrq, level: bool) -> None:
        if irq.edge:
            irq.latch |= level
            if level:
                self.queue(irq)
        elif irq.line != level:
            irq.line = level
            self.queue(irq)
        self.settle()

    # -- the distributor

    @rule(cpu=cpus, shared=st.booleans(), ones=bits, on=mostly)
    def enable(self, cpu: int, shared: bool, ones: int, on: bool) -> None:
        word, irqs, ones = self.bank(cpu, shared, ones)
        self.gicd((ISENABLER if on else ICENABLER) + word, ones, cpu)
        for irq in irqs:
            if ones >> irq.intid % 32 & 1:
                irq.enabled = on
                if on:
                    self.queue(irq)
        self.settle()

    @rule(cpu=cpus, shared=st.booleans(), ones=bits, on=st.booleans())
    def set_pending(self, cpu: int, shared: bool, ones: int, on: bool) -> None:
        word, irqs, ones = self.bank(cpu, shared, ones)
        self.gicd((ISPENDR if on else ICPENDR) + word, ones, cpu)
        for irq in irqs:
            if not ones >> irq.intid % 32 & 1:
                continue
            if irq.intid < 16:
                if self.running[0]:
                    continue  # not by the guest
                irq.senders = irq.senders | {cpu} if on else set()
            else:
                irq.latch = on
            if on:
                self.queue(irq)
        self.settle()

    @rule(cpu=cpus, shared=st.booleans(), ones=st.sampled_from([1, 2, 4, 0x1_0000, 0x3_0007]), on=st.booleans())
    def set_active(self, cpu: int, shared: bool, ones: int, on: bool) -> None:
        word, irqs, ones = self.bank(cpu, shared, ones)
        self.gicd((ISACTIVER if on else ICACTIVER) + word, ones, cpu)
        for irq in irqs:
            if ones >> irq.intid % 32 & 1:
                irq.active = on
                if on:
                    self.queue(irq)
                self.settle()

    @rule(cpu=cpus, shared=st.booleans(), ones=bits, use=seldom)
    def set_groups(self, cpu: int, shared: bool, ones: int, use: bool) -> None:
        word, irqs, ones = self.bank(cpu, shared, ones * use)
        self.gicd(IGROUPR + word, ones, cpu)
        if self.running[0] or self.groups_writable:
            for irq in irqs:
                irq.group = ones >> irq.intid % 32 & 1
                self.queue(irq)
        self.settle()

    @rule(cpu=cpus, intid=st.sampled_from([*SGIS, *PPIS, *range(32, 32 + SPIS)]), priority=st.sampled_from(PRIORITIES))
    def set_priority(self, cpu: int, intid: int, priority: int) -> None:
        self.gicd(IPRIORITYR + intid, priority, cpu, size=1)
        irq = self.seen_by(cpu, intid)
        assert irq is not None
        irq.priority = priority
        self.settle()

    @rule(cpu=cpus, n=st.integers(0, SPIS - 1), mask=st.integers(0, 7))
    def set_targets(self, cpu: int, n: int, mask: int) -> None:
        self.gicd(ITARGETSR + FIRST_SPI + n, mask, cpu, size=1)
        self.spis[n].target = next((cpu for cpu in range(CPUS) if mask >> cpu & 1), 0)
        self.settle()

    @rule(cpu=cpus, pairs=st.integers(0, 0x3FF))
    def set_triggers(self, cpu: int, pairs: int) -> None:
        self.gicd(ICFGR + 8, pairs, cpu)
        for n, irq in enumerate(self.spis):
            irq.edge = bool(pairs >> 2 * n & 2)
        self.settle()

    @rule(cpu=cpus, on=mostly)
    def set_forwarding(self, cpu: int, on: bool) -> None:
        self.gicd(0, int(on), cpu)
        self.forwarding = on
        self.settle()

    @rule(cpu=cpus, intid=st.sampled_from(SGIS), how=st.integers(0, 3), listed=st.integers(0, 0xF))
    def send_sgi(self, cpu: int, intid: int, how: int, listed: int) -> None:
        self.gicd(SGIR, how << 24 | listed << 16 | intid, cpu)
        for target in range(CPUS):
            if (listed >> target & 1, target != cpu, target == cpu, False)[how]:
                irq = self.private[target][intid]
                irq.senders.add(cpu)
                self.queue(irq)
        self.settle()

    @rule(cpu=cpus, word=st.integers(0, 0x0009_0F07), on=st.booleans())
    def set_senders(self, cpu: int, word: int, on: bool) -> None:
        self.gicd(SPENDSGIR if on else CPENDSGIR, word, cpu)
        for intid in range(4):
            irq = self.private[cpu][intid]
            named = {n for n in range(8) if word >> 8 * intid + n & 1}
            irq.senders = irq.senders | named if on else irq.senders - named
            if on:
                self.queue(irq)
        self.settle()

    # -- the CPU interface

    @rule(
        cpu=cpus,
        ones=st.integers(0, (1 << SPIS) - 1),
        steps=st.lists(st.sampled_from(["raise", "take", "take", "end", "deactivate"]), min_size=1, max_size=12),
        aliased=seldom,
        n=st.integers(0, 99),
    )
    def serve(self, cpu: int, ones: int, steps: list[str], aliased: bool, n: int) -> None:
        """Interrupts arrive, and a guest that runs deals with them, well or badly."""
        self.drive_spis(ones, True)
        if not self.running[0]:
            self.go()
        for at, step in enumerate(steps):
            if step == "raise":
                self.drive_spis(1 << (n + at) % SPIS, True)
            elif step == "take":
                self.acknowledge(cpu, aliased)
            elif step == "end":
                self.end(cpu, n + at, aliased)
            else:
                self.deactivate(cpu, n + at)
            self.machine.check()

    def acknowledge(self, cpu: int, aliased: bool) -> None:
        irq = self.deliverable(cpu)
        value = self.shown(cpu, irq, aliased)
        if value is None and irq is not None:
            interface = self.cpus[cpu]
            value = irq.intid
            if irq.senders:
                sender = min(irq.senders)
                irq.senders.remove(sender)
                value |= sender << 10
            if irq.edge:
                irq.latch = False
            irq.active = True
            interface.levels.add(irq.priority & interface.mask(irq.group))
        assert value == self.machine.gicc(AIAR if aliased else IAR, cpu=cpu)
        self.settle()

    def end(self, cpu: int, n: int, aliased: bool) -> None:
        held = [irq for irq in self.list_registers(cpu) if irq.active]
        intid = held[n % len(held)].intid if held and n < 85 else (0, 17, 33, 700, 1020, 1023)[n % 6]
        self.machine.gicc(AEOIR if aliased else EOIR, n << 10 & 0x1C00 | intid, cpu=cpu)
        irq, interface = self.seen_by(cpu, intid), self.cpus[cpu]
        if intid >= 1020 or (aliased and (irq is None or not irq.group)):
            return
        interface.levels.discard(min(interface.levels, default=-1))
        if irq is not None and irq in held and not interface.split:
            self.finish(irq)
        self.settle()

    def deactivate(self, cpu: int, n: int) -> None:
        held = [irq for irq in self.list_registers(cpu) if irq.active]
        intid = held[n % len(held)].intid if held and n < 85 else (0, 17, 33, 700, 1023)[n % 5]
        self.machine.gicc(DIR, intid, cpu=cpu)
        irq = self.seen_by(cpu, intid)
        if self.cpus[cpu].split and irq is not None and irq in held:
            self.finish(irq)
        self.settle()

    @rule(cpu=cpus, value=st.sampled_from([0b001, 0b001, 0x201, 0x201, 0b011, 0b111, 0b1011, 0b010, 0, 0x211, 0x217]))
    def set_control(self, cpu: int, value: int) -> None:
        self.gicc(CTLR, value, cpu)
        interface = self.cpus[cpu]
        interface.group_enabled = [bool(value & 1), bool(value & 2)]
        interface.ackctl, interface.cbpr = bool(value & 4), bool(value & 0x10)
        interface.split = bool(value & 0x200)

    @rule(cpu=cpus, pmr=st.sampled_from([0xF0, 0xF8, 0xF8, 0xA8, 0x80, 0x20, 0]))
    def set_priority_mask(self, cpu: int, pmr: int) -> None:
        self.gicc(PMR, pmr, cpu)
        self.cpus[cpu].pmr = pmr

    @rule(cpu=cpus, group=st.integers(0, 1), value=st.integers(0, 7))
    def set_binary_point(self, cpu: int, group: int, value: int) -> None:
        self.gicc(ABPR if group else BPR, value, cpu)
        self.cpus[cpu].bpr[group] = max(value, 2 + group)

    # -- KVM_RUN

    @precondition(lambda self: self.running[0])
    @rule()
    def stop(self) -> None:
        self.machine.stop()
        self.running = [False] * CPUS

    @precondition(lambda self: not self.running[0])
    @rule()
    def go(self) -> None:
        self.machine.run()
        for cpu in range(CPUS):
            self.running[cpu] = True
            self.cpus[cpu].list = self.ordered(cpu)
            self.prune(cpu)
        self.settle()

    @precondition(lambda self: not self.running[0])
    @rule()
    def write_iidr(self) -> None:
        self.machine.set(DIST_REGS, 8, 0x4B00_343B)
        self.groups_writable = True

    @initialize(
        priorities=st.lists(st.sampled_from(PRIORITIES), min_size=8, max_size=8),
        triggers=st.integers(0, 0x3FF),
        aims=st.lists(st.integers(1, 3), min_size=SPIS, max_size=SPIS),
        control=st.sampled_from([0b001, 0b001, 0x201, 0x201, 0b111, 0x207]),
        groups=st.sampled_from([0, 0, 0b10101, 0b11111]),
    )
    def start(self, priorities: list[int], triggers: int, aims: list[int], control: int, groups: int) -> None:
        """A guest that has set up everything, so that the first steps are not lost."""
        self.set_triggers(0, triggers)
        self.enable(0, True, 0x1F, True)
        self.set_groups(0, True, groups, True)
        for n, target in enumerate(aims):
            self.set_targets(0, n, target)
            self.set_priority(0, FIRST_SPI + n, priorities[n])
        for cpu in range(CPUS):
            self.enable(cpu, False, 0x3_0000, True)
            self.set_control(cpu, control)
            for intid, priority in zip(SGIS, priorities[SPIS:], strict=True):
                self.set_priority(cpu, intid, priority)

    # -- what must hold

    @invariant()
    def comes_to_the_same(self) -> None:
        self.machine.check()
        for index, interface in enumerate(self.cpus):
            deliverable, top = self.deliverable(index), self.top(index)
            real = self.vgic.cpus[index]
            assert (deliverable is not None) == real.line
            assert (interface.running if interface.levels else 0xFF) == self.machine.gicc(RPR, cpu=index)
            for aliased, register in ((False, HPPIR), (True, AHPPIR)):
                value = self.shown(index, top, aliased)
                assert (top.intid if value is None and top else value) == self.machine.gicc(register, cpu=index)
        for irq in self.irqs:
            assert (irq.asserted, irq.active) == (irq.real.asserted, irq.real.active)
            assert irq.intid >= 16 or sum(1 << n for n in irq.senders) == irq.real.senders

    @invariant()
    def a_copy_is_the_same(self) -> None:
        """A GIC made from the state of this one has that state."""
        twin = type(self.machine.vm)(CPUS, host_gic=2)
        for vcpu in twin.vcpus:
            vcpu.running = self.running[0]
        copy = type(self.vgic).from_state(twin, self.vgic.state())  # type: ignore[arg-type]
        copy._check()
        assert self.vgic.state() == copy.state()
        assert [cpu.line for cpu in self.vgic.cpus] == [cpu.line for cpu in copy.cpus]


TestGicv2 = Gicv2Test.TestCase
TestGicv2.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("seed", range(6))
def test_long_traffic(seed: int) -> None:
    """The same steps, weighted as a busy machine has them: interrupts that nest, crowds, and few reconfigurations."""
    rng = random.Random(seed)
    test = Gicv2Test()
    test.start([rng.choice(PRIORITIES) for _ in range(8)], rng.getrandbits(10), [1, 2, 1, 1, 1], 1, 0)
    actions = ["raise", "take", "take", "take", "end", "end", "deactivate"]

    def cpu() -> int:
        return rng.choice((0, 0, 0, 1))

    def often() -> bool:
        return rng.random() < 0.8

    steps: list[tuple[int, Callable[[], None]]] = [
        (
            30,
            lambda: test.serve(
                cpu(), rng.getrandbits(SPIS), rng.choices(actions, k=6), not often(), rng.randrange(100)
            ),
        ),
        (10, lambda: test.drive_spis(rng.getrandbits(SPIS), rng.random() < 0.6)),
        (3, lambda: test.drive_ppi(cpu(), rng.choice(PPIS), often())),
        (10, lambda: test.send_sgi(cpu(), rng.choice(SGIS), rng.randrange(3), rng.getrandbits(3))),
        (2, lambda: test.set_senders(cpu(), rng.getrandbits(20) & 0x0003_0303, often())),
        (3, lambda: test.enable(cpu(), often(), rng.getrandbits(5), often())),
        (3, lambda: test.set_pending(cpu(), often(), rng.getrandbits(5), often())),
        (3, lambda: test.set_active(cpu(), often(), 1 << rng.randrange(5), not often())),
        (2, lambda: test.set_priority(cpu(), rng.choice((*SGIS, 32, 33, 34)), rng.choice(PRIORITIES))),
        (1, lambda: test.set_targets(cpu(), rng.randrange(SPIS), rng.randrange(4))),
        (1, lambda: test.set_groups(cpu(), True, rng.getrandbits(5), not often())),
        (1, lambda: test.set_triggers(cpu(), rng.getrandbits(10))),
        (1, lambda: test.set_control(cpu(), rng.choice((1, 1, 0x201, 0b111, 0x217)))),
        (1, lambda: test.set_priority_mask(cpu(), rng.choice((0xF8, 0xF8, 0xF8, 0x80)))),
        (1, lambda: test.set_binary_point(cpu(), rng.randrange(2), rng.choice((2, 3, 4, 6)))),
        (1, lambda: test.set_forwarding(cpu(), True)),
        (1, lambda: test.set_forwarding(cpu(), often())),
        (2, lambda: test.stop() if test.running[0] else test.go()),
    ]
    for _ in range(400):
        (step,) = rng.choices([step for _, step in steps], [weight for weight, _ in steps])
        step()
        test.comes_to_the_same()
    test.a_copy_is_the_same()
    statement = test.machine.check()
    assert 50 < statement.delivered
    assert 0 < statement.coalesced
