"""The guests of a :mod:`migration_world`: at random, but by the plan's seed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import fabric

if TYPE_CHECKING:
    from migration_world import World

GICD, GICC, GICR, GITS = 0x0800_0000, 0x0804_0000, 0x080A_0000, 0x0900_0000
DEVICE = 0x0A00_0000
"""Registers of the VMM's devices: reads give a number, a write to ``4 * n`` lowers the line of level SPI n."""
FIRST_LPI, PPI_VTIMER, PPI_PMU = 8192, 27, 23
LEVELS = range(40, 44)
PSCI_CPU_ON = 0xC400_0003


class Guest:
    """One guest program: it computes, halts, sends IPIs, sets its timer, accesses devices, and handles interrupts."""

    def __init__(self, world: World, number: int, draw: random.Random) -> None:
        self.world = world
        self.number = number
        self.draw = draw
        self.active = 0
        """Interrupts that were taken and are not through."""
        self.split = world.plan.split[number]
        self.deferred: list[int] = []
        """Ended, and to be deactivated."""

    async def compute(self, cpu: Any, ns: int) -> None:
        """Compute, and note that what comes next comes at a time of the guest's own."""
        await cpu.compute(ns)
        self.world.acts[fabric.now()].add(self.number)

    async def wait(self, cpu: Any) -> None:
        """Halt, for some time at the most."""
        until = fabric.now() + self.some()
        await cpu.wait_for_interrupt(until)
        if fabric.now() >= until:
            self.world.acts[fabric.now()].add(self.number)

    def some(self, least: int = 100, most: int = 4_000) -> int:
        """A stretch of time."""
        return self.draw.randrange(least, most)

    async def run(self, cpu: Any) -> None:
        """For a while, or for ever."""
        vcpus = self.world.plan.vcpus
        await self.compute(cpu, self.some() + 7 * self.number)
        cpu.set_vector(self.handle)
        cpu.unmask()
        while True:
            kind = self.draw.randrange(13)
            if kind < 3:
                await self.compute(cpu, self.some())
            elif kind < 5:
                await self.wait(cpu)
            elif kind == 5:
                cpu.mask()
                await self.compute(cpu, self.some())
                cpu.unmask()
            elif kind == 6:
                await self.poll(cpu)
            elif kind == 7:
                target = self.draw.randrange(vcpus)
                await self.send(cpu, self.draw.randrange(8), target)
            elif kind == 8:
                self.world.log.note("read", self.number, await cpu.load(DEVICE + 0x100, 4))
            elif kind == 9 and not self.number % 2:
                await self.set_timer(cpu)
            elif kind == 10:
                result = await cpu.hvc(PSCI_CPU_ON, self.draw.randrange(vcpus), 0, 0)
                self.world.log.note("CPU_ON", self.number, result)
            elif kind == 11 and self.number and self.draw.random() < 0.3:
                await self.deactivate(cpu)
                self.world.log.note("off", self.number, 0)
                return
            elif kind == 12 and self.world.plan.pmu:
                await self.count(cpu)
                self.world.log.note("cycles", self.number, await cpu.mrs("PMCCNTR_EL0"))
            await self.deactivate(cpu)

    def may_arm(self, intid: int) -> bool:
        """Whether to set a device that raises a PPI. That lowers its line, where a GICv2 may have latched it."""
        mine = (self.number, intid)
        if mine in self.world.armed and self.world.plan.gic == 2:
            return False
        self.world.armed.add(mine)
        return True

    async def count(self, cpu: Any) -> None:
        """Have the cycle counter overflow."""
        if self.may_arm(PPI_PMU):
            await self.enable(cpu, PPI_PMU)
            await cpu.msr("PMCR_EL0", 1 << 6 | 1)
            await cpu.msr("PMOVSCLR_EL0", 1 << 31)
            await cpu.msr("PMCCNTR_EL0", (1 << 64) - self.draw.randrange(1, 6_000))
            await cpu.msr("PMINTENSET_EL1", 1 << 31)
            await cpu.msr("PMCNTENSET_EL0", 1 << 31)

    async def set_timer(self, cpu: Any) -> None:
        """Have the virtual timer fire."""
        if self.may_arm(PPI_VTIMER):
            await self.enable(cpu, PPI_VTIMER)
            await cpu.msr("CNTV_CVAL_EL0", await cpu.mrs("CNTVCT_EL0") + self.draw.randrange(400))
            await cpu.msr("CNTV_CTL_EL0", 1)

    async def poll(self, cpu: Any) -> None:
        """Take an interrupt without its vector."""
        cpu.mask()
        await self.wait(cpu)
        await self.handle(cpu)
        cpu.unmask()

    async def handle(self, cpu: Any) -> None:
        """Acknowledge, work, end; now and then let another interrupt in."""
        value = await self.acknowledge(cpu)
        intid = value if value >= FIRST_LPI else value & 0x3FF
        if 1020 <= intid < 1024:
            return
        if intid == PPI_VTIMER:
            self.world.armed.discard((self.number, intid))
            await cpu.msr("CNTV_CTL_EL0", self.draw.choice((0, 3)))
        if intid == PPI_PMU:
            self.world.armed.discard((self.number, intid))
            await cpu.msr("PMOVSCLR_EL0", 1 << 31)
        self.active += 1
        if self.active == 1 and self.draw.random() < 0.5:
            cpu.unmask()
        await self.compute(cpu, self.some(50, 2_000))
        cpu.mask()
        if intid in LEVELS:
            await cpu.store(DEVICE + 4 * (intid - LEVELS[0]), 4, 0)
            await self.compute(cpu, self.some(10, 100))
        await self.end(cpu, value)
        if self.split and intid < FIRST_LPI:
            self.deferred.append(value)
            if self.active > 1 or self.draw.random() < 0.5:
                await self.deactivate(cpu)
        else:
            self.active -= 1

    async def deactivate(self, cpu: Any) -> None:
        """The second half of a split end."""
        while self.deferred:
            value = self.deferred.pop(0)
            await self.compute(cpu, self.some(10, 200))
            await self.finish(cpu, value)
            self.active -= 1

    # The CPU interface, and what else the two GICs have different.

    async def enable(self, cpu: Any, intid: int) -> None:
        """Enable a PPI."""
        await cpu.store(GICR + 0x2_0000 * self.number + 0x1_0100, 4, 1 << intid)

    async def send(self, cpu: Any, intid: int, target: int) -> None:
        """An SGI."""
        await cpu.msr("ICC_SGI1R_EL1", intid << 24 | 1 << target)

    async def acknowledge(self, cpu: Any) -> int:
        """In one of the two ways there are."""
        value: int = cpu.iar1() if self.draw.random() < 0.5 else await cpu.mrs("ICC_IAR1_EL1")
        return value

    async def end(self, cpu: Any, value: int) -> None:
        """As well."""
        if self.draw.random() < 0.5:
            cpu.eoir1(value)
        else:
            await cpu.msr("ICC_EOIR1_EL1", value)

    async def finish(self, cpu: Any, value: int) -> None:
        """Deactivate."""
        await cpu.msr("ICC_DIR_EL1", value)


class Gicv2Guest(Guest):
    """A guest of a GICv2. Values of GICC_IAR have the sender of an SGI in them."""

    async def enable(self, cpu: Any, intid: int) -> None:
        """Enable a PPI."""
        await cpu.store(GICD + 0x100, 4, 1 << intid)

    async def send(self, cpu: Any, intid: int, target: int) -> None:
        """An SGI."""
        await cpu.store(GICD + 0xF00, 4, 1 << 16 + target | intid)

    async def acknowledge(self, cpu: Any) -> int:
        """GICC_IAR."""
        value: int = await cpu.load(GICC + 0xC, 4)
        return value

    async def end(self, cpu: Any, value: int) -> None:
        """GICC_EOIR."""
        await cpu.store(GICC + 0x10, 4, value)

    async def finish(self, cpu: Any, value: int) -> None:
        """GICC_DIR."""
        await cpu.store(GICC + 0x1000, 4, value)
