"""A VM whose vCPUs have a PMU, set up as far as asked for, and what its guests do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from test_vcpu import Machine

import fabric
from fabric.uapi import arm64 as arm

PPI = 23
FEATURES = (arm.KVM_ARM_VCPU_PSCI_0_2, arm.KVM_ARM_VCPU_PMU_V3)
IRQ, INIT, FILTER, SET_PMU = range(4)
CYCLE = 1 << 31

Body = Callable[["PmuMachine", Any], Awaitable[object]]


class PmuMachine(Machine):
    """vCPUs with PMUs that interrupt with PPI 23, or with an SPI each from ``spi`` on."""

    features = FEATURES

    def __init__(self, vcpus: int = 1, *, spi: int | None = None, setup: bool = True, **options: Any) -> None:
        super().__init__(vcpus, **options)
        self.spi = spi
        if setup:
            for number in range(vcpus):
                self.set_up(number)

    def set_up(self, number: int = 0) -> None:
        """Interrupt and initialisation of the PMU of a vCPU, and let it through the GIC."""
        vcpu = self.vcpus[number]
        if self.gic_made:
            intid = PPI if self.spi is None else self.spi + number
            vcpu.set_attr(arm.KVM_ARM_VCPU_PMU_V3_CTRL, IRQ, intid)
            for attr in (0x1_0100, 0x1_0080):  # GICR_ISENABLER0, GICR_IGROUPR0
                self.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, number << 32 | attr, 0xFFFF_FFFF)
            for encoding, value in ((0xC230, 0xF0), (0xC667, 1)):  # ICC_PMR_EL1, ICC_IGRPEN1_EL1
                self.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, number << 32 | encoding, value)
        vcpu.set_attr(arm.KVM_ARM_VCPU_PMU_V3_CTRL, INIT)

    def filter(self, base: int, count: int, action: int, number: int = 0) -> None:
        """KVM_ARM_VCPU_PMU_V3_FILTER."""
        event_filter = arm.KvmPmuEventFilter(base, count, action)
        self.vcpus[number].set_attr(arm.KVM_ARM_VCPU_PMU_V3_CTRL, FILTER, event_filter)

    def line(self, number: int = 0) -> bool:
        """The level of the PMU's interrupt."""
        level: bool = self.vcpu(number).pmu.level
        return level

    async def handler(self, cpu: Any) -> None:
        """Note the interrupt and what overflowed, clear that, end it."""
        intid = cpu.iar1()
        overflowed = await cpu.mrs("PMOVSSET_EL0")
        self.note((intid, overflowed))
        await cpu.msr("PMOVSCLR_EL0", overflowed)
        cpu.eoir1(intid)


async def start(cpu: Any, *events: int, values: tuple[int, ...] = (), interrupts: int = 0, pmcr: int = 1) -> None:
    """Count ``events`` on counters 0 and up, from ``values`` on, and let ``interrupts`` (a mask) interrupt."""
    for n, event in enumerate(events):
        await cpu.msr(f"PMEVTYPER{n}_EL0", event)
    for n, value in enumerate(values):
        await cpu.msr(f"PMEVCNTR{n}_EL0", value)
    await cpu.msr("PMINTENSET_EL1", interrupts)
    await cpu.msr("PMCNTENSET_EL0", (1 << len(events)) - 1 | CYCLE)
    await cpu.msr("PMCR_EL0", pmcr)


async def counters(cpu: Any, count: int) -> list[int]:
    """The first event counters."""
    return [await cpu.mrs(f"PMEVCNTR{n}_EL0") for n in range(count)]


def simulate(body: Body, *, unmasked: bool = False, make: Callable[[], PmuMachine] = PmuMachine) -> Any:
    """Run ``body(machine, cpu)`` on vCPU 0 to its end; its result and the machine's log."""
    results = []

    async def main() -> None:
        machine = make()

        async def program(cpu: Any) -> None:
            cpu.set_vector(machine.handler)
            if unmasked:
                cpu.unmask()
            results.append((await body(machine, cpu), machine.log))
            await cpu.system_off()

        machine.vcpus[0].load(program)
        assert 0 == await machine.run()

    fabric.run(main)
    return results[0]
