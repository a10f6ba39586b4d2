"""Random lives of interrupts on a GICv3, through what guests, devices and the VMM can do, against a plain model.

The model (``gic_model.py``) works everything out anew each time; the GIC's heaps, cached thresholds and ``line`` must
come to the same. Its invariants hold, the ledger balances, and a copy made from its state is the same, at every step.
"""

from __future__ import annotations

import errno
from typing import Any

from gic_machine import (
    CPU_SYSREGS,
    CTRL,
    DIST_REGS,
    GICD_BASE,
    GICR_BASE,
    GICR_SIZE,
    LEVEL_INFO,
    REDIST_REGS,
    SAVE_PENDING_TABLES,
    SGI_BASE,
    GicMachine,
    refusal,
)
from gic_model import IDLE, NOTHING, Irq, Lists
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fabric.devices.arm.vgic_lpi import PENDBASER_PTZ

CPUS = 2
SPIS = (32, 33, 34, 35, 36, 37)
LPIS = (8192, 8193)
PRIVATE = (0, 1, 16)
IGROUPR, ISENABLER, ICENABLER, ISPENDR, ICPENDR, ISACTIVER, ICACTIVER = range(0x80, 0x400, 0x80)
IPRIORITYR, ICFGR, IROUTER = 0x400, 0xC00, 0x6000
PRIORITIES = st.sampled_from([0x20, 0x80, 0x88, 0xA0])
CPU = st.integers(0, CPUS - 1)
ANY = st.integers(0, 99)
BITS = st.one_of(st.just(0x3F), st.integers(0, 0x3F))
INTERFACE = ["PMR", "IGRPEN0", "IGRPEN1", "BPR0", "BPR1", "CTLR"]
PMR = 0xC230


def chosen(bits: int, irqs: list[Irq]) -> list[Irq]:
    """Those of ``irqs`` whose bit is set."""
    return [irq for n, irq in enumerate(irqs) if bits >> n & 1]


class SomeIts:
    """An ITS there is, so that there are LPIs."""

    def invalidate_cache(self) -> None:
        pass


class GicMachineTest(RuleBasedStateMachine):
    """Rules are what devices, guests and userspace do."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = GicMachine(CPUS, nr_irqs=64)
        self.vgic = self.machine.vgic
        self.machine.vm.its_list.append(SomeIts())
        self.model = Lists(CPUS)
        self.shared = {intid: Irq(intid, 0) for intid in (*SPIS, *LPIS)}
        self.private = [{intid: Irq(intid, cpu, edge=intid < 16) for intid in PRIVATE} for cpu in range(CPUS)]
        self.lpis_enabled = [True] * CPUS
        self.machine.write(ISENABLER + 4, 0x3F)
        for base, first in ((GICD_BASE, 32), *((self.redistributor(cpu), 0) for cpu in range(CPUS))):
            for offset in range(first, first + 20, 4):
                self.machine.write(IPRIORITYR + offset, 0xA0A0_A0A0, base=base)
            if not first:
                self.machine.write(ISENABLER, 0x3_0000, base=base)
        for cpu in self.vgic.cpus:
            cpu.pendbaser |= PENDBASER_PTZ  # nothing is read when LPIs are enabled again
            cpu.lpis_enabled = True
        for intid in LPIS:
            self.machine.lpi(intid)

    @initialize(edges=BITS, split=BITS, group0=BITS)
    def configure(self, edges: int, split: int, group0: int) -> None:
        self.write_triggers(edges)
        for cpu in range(CPUS):
            self.write_interface(cpu, "CTLR", 2 * (split >> cpu & 1))
            self.write_interface(cpu, "IGRPEN0", 7 * (group0 >> cpu & 1))

    def redistributor(self, cpu: int) -> int:
        return GICR_BASE + cpu * GICR_SIZE + SGI_BASE

    @property
    def still(self) -> bool:
        """No vCPU runs."""
        return not any(cpu.running for cpu in self.model.cpus)

    def seen(self, cpu: int) -> dict[int, Irq]:
        """The interrupts by INTID as ``cpu`` means it."""
        return {**self.private[cpu], **self.shared}

    @property
    def shared_wired(self) -> list[Irq]:
        return [self.shared[intid] for intid in SPIS]

    def bank(self, cpu: int, private: bool) -> tuple[int, int, dict[int, Irq]]:
        """Base address, first INTID and interrupts of one of the frames' arrays."""
        if private:
            return self.redistributor(cpu), 0, self.private[cpu]
        return GICD_BASE + 4, 32, {intid: self.shared[intid] for intid in SPIS}

    def attr(self, cpu: int, private: bool, offset: int, shift: int = 0) -> tuple[int, int]:
        """Group and number of the attribute for that array."""
        if private:
            return REDIST_REGS, cpu << 32 | SGI_BASE + offset
        return DIST_REGS, offset + (4 << shift)

    # -- what devices do

    @rule(spis=BITS, ppis=BITS, level=st.booleans())
    def drive_lines(self, spis: int, ppis: int, level: bool) -> None:
        lines = [irq for cpu in range(CPUS) for irq in self.private[cpu].values() if irq.intid >= 16]
        for irq in [*chosen(spis, self.shared_wired), *chosen(ppis, lines)]:
            if irq.intid < 32:
                self.vgic.inject_ppi(irq.home, irq.intid, level)
            else:
                self.vgic.inject_spi(irq.intid, level)
            if irq.edge and level:
                irq.latch = True
                self.model.event(irq)
            elif not irq.edge and irq.line != level:
                irq.line = level
                self.model.event(irq)

    @rule(lpis=BITS)
    def messages(self, lpis: int) -> None:
        for irq in chosen(lpis, [self.shared[intid] for intid in LPIS]):
            assert irq.home is not None
            if self.lpis_enabled[irq.home]:
                self.vgic.pend_edge(self.vgic.lpis[irq.intid])
                irq.latch = True
                self.model.event(irq)

    # -- vCPUs run, or stand still

    @rule(cpu=CPU)
    def run(self, cpu: int) -> None:
        if not self.model.cpus[cpu].running:
            self.machine.vm.vcpus[cpu].running = True
            self.vgic.cpus[cpu].load()
            self.model.start(cpu)

    @rule(cpu=CPU)
    def leave(self, cpu: int) -> None:
        self.machine.vm.vcpus[cpu].running = False
        self.model.stop(cpu)

    # -- what a guest does: its CPU interface

    @rule(cpu=CPU, group=st.sampled_from([1, 1, 1, 0]))
    def acknowledge(self, cpu: int, group: int) -> None:
        self.run(cpu)
        expected = self.model.acknowledge(cpu, group)
        assert expected == self.vgic.cpus[cpu].read_sysreg(f"ICC_IAR{group}_EL1")

    @rule(cpu=CPU, n=ANY, group=st.sampled_from([1, 1, 1, 0]))
    def end_of_interrupt(self, cpu: int, n: int, group: int) -> None:
        self.run(cpu)
        active = [irq for irq in self.model.held(cpu) if irq.active]
        if active and n < 80:
            intid, group = active[n % len(active)].intid, active[n % len(active)].group
        else:
            intid = (0, 17, 33, 8192, 1023, 700, 9999)[n % 7]
        self.vgic.cpus[cpu].write_sysreg(f"ICC_EOIR{group}_EL1", intid)
        self.model.end(cpu, group, intid)

    @rule(cpu=CPU, n=ANY)
    def deactivate(self, cpu: int, n: int) -> None:
        self.run(cpu)
        active = [irq.intid for irq in self.seen(cpu).values() if irq.active]
        intid = active[n % len(active)] if active and n < 80 else list(self.seen(cpu))[n % len(self.seen(cpu))]
        self.vgic.cpus[cpu].write_sysreg("ICC_DIR_EL1", intid)
        self.model.deactivate(cpu, intid)

    @rule(
        cpu=CPU,
        register=st.sampled_from(["PMR", "IGRPEN0", "IGRPEN1", "BPR0", "BPR1", "CTLR"]),
        value=st.integers(0, 7),
    )
    def write_interface(self, cpu: int, register: str, value: int) -> None:
        interface = self.model.cpus[cpu]
        match register:
            case "PMR":
                value = interface.pmr = (0xF8, 0xF0, 0xF8, 0xF0, 0xA0, 0x80, 0x20, 0)[value]
            case "IGRPEN0" | "IGRPEN1":
                value = interface.enabled[register == "IGRPEN1"] = value > 2
            case "CTLR":
                interface.common, interface.split = bool(value & 1), bool(value & 6)
                value = interface.common | interface.split << 1
            case "BPR0":
                interface.binary_point[0] = max(value, 2)
            case "BPR1" if not interface.common:
                interface.binary_point[1] = max(value, 3)
        self.vgic.cpus[cpu].write_sysreg(f"ICC_{register}_EL1", value)

    @rule(
        cpu=CPU,
        register=st.sampled_from(["SGI1R", "SGI1R", "ASGI1R", "SGI0R"]),
        intid=st.integers(0, 1),
        listed=st.integers(0, 3),
        others=st.booleans(),
    )
    def send_sgi(self, cpu: int, register: str, intid: int, listed: int, others: bool) -> None:
        self.run(cpu)
        self.vgic.cpus[cpu].write_sysreg(f"ICC_{register}_EL1", others << 40 | intid << 24 | listed)
        for target in range(CPUS):
            irq = self.private[target][intid]
            reached = target != cpu if others else listed >> target & 1
            if reached and (register == "SGI1R" or irq.group == 0):
                irq.latch = True
                self.model.event(irq)

    # -- what guests and userspace do to the frames

    @rule(
        cpu=CPU,
        private=st.booleans(),
        register=st.sampled_from([ISENABLER, ICENABLER, ISPENDR, ICPENDR, ISACTIVER, ICACTIVER]),
        bits=BITS,
        user=st.booleans(),
    )
    def write_bits(self, cpu: int, private: bool, register: int, bits: int, user: bool) -> None:
        base, first, irqs = self.bank(cpu, private)
        value = sum(1 << intid - first for n, intid in enumerate(irqs) if bits >> n & 1)
        if user:
            code = refusal(self.machine.set, *self.attr(cpu, private, register), value)
            assert (0 if self.still else errno.EBUSY) == code
            if code:
                return
        else:
            self.machine.write(register, value, base=base)
        for intid, irq in irqs.items():
            if user and register == ISPENDR and not value >> intid - first & 1:
                irq.latch = False
            if value >> intid - first & 1:
                self.set_bit(irq, register, user)
        self.model.breathe()

    def set_bit(self, irq: Irq, register: int, user: bool) -> None:
        match register:
            case 0x100 | 0x200 | 0x300:
                irq.enabled |= register == ISENABLER
                irq.latch |= register == ISPENDR
                irq.active |= register == ISACTIVER
                self.model.event(irq)
            case 0x180:
                irq.enabled = False
            case 0x280:
                irq.latch &= user
            case 0x380:
                irq.active = False

    @rule(cpu=CPU, private=st.booleans(), bits=BITS, user=st.booleans())
    def write_groups(self, cpu: int, private: bool, bits: int, user: bool) -> None:
        base, first, irqs = self.bank(cpu, private)
        value = sum(1 << intid - first for n, intid in enumerate(irqs) if bits >> n & 1)
        if not user:
            self.machine.write(IGROUPR, value, base=base)
        elif refusal(self.machine.set, *self.attr(cpu, private, IGROUPR), value):
            return
        for intid, irq in irqs.items():
            irq.group = value >> intid - first & 1
            self.model.event(irq)

    @rule(cpu=CPU, n=ANY, priorities=st.one_of(PRIORITIES.map(lambda one: (one,) * 4), st.tuples(*[PRIORITIES] * 4)))
    def write_priorities(self, cpu: int, n: int, priorities: tuple[int, ...]) -> None:
        _, first, irqs = self.bank(cpu, n % 4 == 0)
        base = GICD_BASE if first else self.redistributor(cpu)
        start = first + n % 2 * 4
        self.machine.write(IPRIORITYR + start, int.from_bytes(bytes(priorities), "little"), base=base)
        for intid, priority in enumerate(priorities, start):
            if intid in irqs:
                irqs[intid].priority = priority
        self.model.breathe()

    @rule(edges=BITS)
    def write_triggers(self, edges: int) -> None:
        self.machine.write(ICFGR + 8, sum(2 << 2 * n for n in range(6) if edges >> n & 1))
        for n, intid in enumerate(SPIS):
            self.shared[intid].edge = bool(edges >> n & 1)
        self.model.breathe()

    @rule(n=ANY, to=st.integers(0, CPUS))
    def write_route(self, n: int, to: int) -> None:
        irq = self.shared[SPIS[n % len(SPIS)]]
        self.machine.write(IROUTER + 8 * irq.intid, to, 8)
        irq.home = to if to < CPUS else None
        self.model.breathe()

    @rule(on=st.sampled_from([True, True, False]), user=st.booleans())
    def switch_distributor(self, on: bool, user: bool) -> None:
        if not user:
            self.machine.write(0, on << 1)
        elif refusal(self.machine.set, DIST_REGS, 0, on << 1):
            return
        self.model.forwarding = on
        self.model.breathe()

    @rule(bits=BITS, level=st.booleans(), run=st.booleans())
    def raise_unforwarded(self, bits: int, level: bool, run: bool) -> None:
        """While the distributor is off, which puts nothing onto a list."""
        self.switch_distributor(False, False)
        if run:
            self.run(0)
        self.drive_lines(bits, 0, level)
        self.write_bits(0, False, ISPENDR, bits, False)
        self.switch_distributor(True, False)

    # -- what userspace does

    @precondition(lambda self: self.still)
    @rule(cpu=CPU, private=st.booleans(), bits=BITS)
    def write_levels(self, cpu: int, private: bool, bits: int) -> None:
        _, first, irqs = self.bank(cpu, private)
        value = sum(1 << intid - first for n, intid in enumerate(irqs) if bits >> n & 1)
        self.machine.set(LEVEL_INFO, cpu << 32 | first, value)
        for intid, irq in irqs.items():
            if intid >= 16:
                irq.line = bool(value >> intid - first & 1)
                if irq.line:
                    self.model.event(irq)

    @precondition(lambda self: self.still)
    @rule(cpu=CPU, pmr=st.sampled_from([0xF0, 0xFF, 0x84]))
    def write_priority_mask(self, cpu: int, pmr: int) -> None:
        self.machine.set(CPU_SYSREGS, cpu << 32 | PMR, pmr)
        self.model.cpus[cpu].pmr = pmr

    # -- LPIs

    @rule(n=ANY, what=st.sampled_from(["enable", "disable", "move", "move", "clear"]), to=CPU, priority=PRIORITIES)
    def change_lpi(self, n: int, what: str, to: int, priority: int) -> None:
        irq = self.shared[LPIS[n % len(LPIS)]]
        real = self.vgic.lpis[irq.intid]
        match what:
            case "move":
                irq.home = to
                self.vgic.retarget(real, self.vgic.cpus[to])
                self.model.breathe()
            case "clear":
                irq.latch = False
                self.vgic.clear_pending(real, "cleared")
                self.model.breathe()
            case _:
                irq.enabled, irq.priority = what == "enable", priority
                self.vgic.set_lpi_config(real, irq.enabled, priority)
                self.model.event(irq)

    @rule(cpu=CPU, on=st.sampled_from([True, True, False]))
    def switch_lpis(self, cpu: int, on: bool) -> None:
        self.machine.write(0, int(on), base=self.redistributor(cpu) - SGI_BASE)
        if self.lpis_enabled[cpu] and not on:
            self.model.flush(cpu)
        self.lpis_enabled[cpu] = on

    # -- what must hold

    def teardown(self) -> None:
        self.views_agree()
        self.a_copy_is_the_same()

    @invariant()
    def comes_to_the_same(self) -> None:
        self.machine.check()
        for index, cpu in enumerate(self.vgic.cpus):
            signalled = self.model.signalled(index)
            assert (signalled is not None) == cpu.line
            assert (0 if signalled is None else 1 << 6 + signalled.group) == cpu.read_sysreg("ISR_EL1")
            for group in (0, 1):
                assert self.model.highest_pending(index, group) == cpu.read_sysreg(f"ICC_HPPIR{group}_EL1")
                assert self.model.cpus[index].active[group] == cpu.read_sysreg(f"ICC_AP{group}R0_EL1")
            assert self.model.cpus[index].running_priority == cpu.read_sysreg("ICC_RPR_EL1")
        for intid in LPIS:
            irq, real = self.shared[intid], self.vgic.lpis[intid]
            assert (irq.latch, irq.active) == (real.pending, real.active)

    @rule()
    def views_agree(self) -> None:
        """Guest MMIO and, where all stand still, attributes."""
        for cpu in range(CPUS):
            for private in (True, False)[: 1 if cpu else 2]:
                base, first, irqs = self.bank(cpu, private)
                for offset, of in ((ISENABLER, "enabled"), (ISPENDR, "pending"), (ISACTIVER, "active")):
                    value = self.machine.read(offset, base=base)
                    assert {intid: getattr(irq, of) for intid, irq in irqs.items()} == {
                        intid: bool(value >> intid - first & 1) for intid in irqs
                    }
                    assert value == self.machine.read(offset + 0x80, base=base)
                if self.still:
                    latches = self.machine.get(*self.attr(cpu, private, ISPENDR))
                    levels = self.machine.get(LEVEL_INFO, cpu << 32 | first)
                    for intid, irq in irqs.items():
                        assert irq.latch == latches >> intid - first & 1
                        assert (irq.line and not irq.edge) == levels >> intid - first & 1

    @rule()
    def a_copy_is_the_same(self) -> None:
        """A GIC made from the state of this one has that state."""
        copy = type(self.vgic).from_state(self.twin(), self.vgic.state())
        copy._check()
        assert self.vgic.state() == copy.state()
        assert [cpu.line for cpu in self.vgic.cpus] == [cpu.line for cpu in copy.cpus]

    def twin(self) -> Any:
        """An empty VM with the same vCPUs."""
        twin = type(self.machine.vm)(CPUS)
        for vcpu, original in zip(twin.vcpus, self.machine.vm.vcpus, strict=True):
            vcpu.running = original.running
        return twin

    @precondition(lambda self: not self.still)
    @rule()
    def save_needs_them_still(self) -> None:
        assert errno.EBUSY == refusal(self.machine.set, CTRL, SAVE_PENDING_TABLES)


TestGic = GicMachineTest.TestCase
TestGic.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


def test_constants_are_those_of_the_architecture() -> None:
    """What the model answers when there is nothing."""
    machine = GicMachine()

    assert NOTHING == machine.cpu.read_sysreg("ICC_IAR1_EL1")
    assert IDLE == machine.cpu.read_sysreg("ICC_RPR_EL1")
