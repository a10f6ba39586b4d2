"""Who plays programs of :mod:`qtest_steps`: fabric, as a guest of a VM, and an emulator under qtest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvm_machine import Arm, outcome
from qtest_client import QTest
from qtest_steps import (
    CPUS,
    DOORBELL,
    FIRST_LPI,
    GICC,
    GICC_IAR,
    GICD,
    GITS,
    LPIS_END,
    NR_IRQS,
    PENDING,
    PENDING_SIZE,
    RAM,
    RAM_SIZE,
    Answer,
    Step,
    Taken,
    pending_lpis,
)

import fabric
from fabric.uapi import arm64 as arm
from fabric.uapi import kvm as uapi

LPI_BYTES = FIRST_LPI // 8, LPIS_END // 8
"""The part of a pending table that has LPIs."""
TO_VMM = 0x0A00_0000
"""An address without anything: a store there leaves the guest."""


# -- fabric --------------------------------------------------------------------------------------------------------


class Model:
    """A VM with memory and a GIC; vCPU 0 plays the program as its guest, the VMM what comes from outside."""

    def __init__(self, kind: str) -> None:
        v3 = kind == "gicv3"
        self.machine = machine = Arm(CPUS, gic=v3, init=False, host_gic=3 if v3 else 2)
        self.ram = machine.user.map(RAM_SIZE)
        machine.vm.set_memory(0, RAM, RAM_SIZE, self.ram)
        if not v3:
            machine.gic = machine.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V2)
            machine.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_V2_ADDR_TYPE_DIST, GICD)
            machine.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_V2_ADDR_TYPE_CPU, GICC)
        machine.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, NR_IRQS.to_bytes(4, "little"))
        machine.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CTRL, arm.KVM_DEV_ARM_VGIC_CTRL_INIT)
        if v3:
            machine.its = machine.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_ITS)
            machine.its.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_ITS_ADDR_TYPE, GITS)

    async def play(self, steps: Sequence[Step]) -> list[Answer]:
        """The answers of the steps that have one."""
        answers: list[Answer] = []
        taken = Taken()

        async def guest(cpu: Any) -> None:
            for planned in steps:
                step = taken.access(planned.op) or planned
                match step.op:
                    case "r":
                        answers.append(await cpu.load(step.address, step.size))
                    case "w":
                        await cpu.store(step.address, step.size, step.value)
                    case "ack":
                        value = await cpu.load(GICC + GICC_IAR, 4)
                        taken.add(value)
                        answers.append(value)
                    case "lpis":
                        await cpu.store(TO_VMM, 4, 0)
                    case _:
                        self._from_outside(step)

            await cpu.system_off()

        vcpu = self.machine.vcpus[0]
        vcpu.load(guest)
        while True:
            await vcpu.run()
            reason = int.from_bytes(vcpu.run_area[uapi.KVM_RUN_EXIT_REASON :][:4], "little")
            if reason != uapi.KVM_EXIT_MMIO:
                return answers
            left = uapi.KvmRunMmio.unpack(vcpu.run_area[uapi.KVM_RUN_EXIT :])
            if left.phys_addr != TO_VMM:
                raise RuntimeError(f"the guest left at {left.phys_addr:#x}")
            answers.append(self._pending())

    def _from_outside(self, step: Step) -> None:
        match step.op:
            case "m":
                self.machine.user.write(self.ram + step.address - RAM, step.data)
            case "z":
                self.machine.user.write(self.ram + step.address - RAM, bytes(step.value))
            case "line":
                kind = arm.KVM_ARM_IRQ_TYPE_PPI if step.address < 32 else arm.KVM_ARM_IRQ_TYPE_SPI
                irq = kind << arm.KVM_ARM_IRQ_TYPE_SHIFT | step.size << arm.KVM_ARM_IRQ_VCPU_SHIFT | step.address
                self.machine.vm.irq_line(irq, step.value)
            case "msi":
                outcome(self.machine.vm.signal_msi, DOORBELL, step.address, 0)

    def _pending(self) -> list[list[int]]:
        """What KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES writes into empty tables; the guest's are put back afterwards."""
        user, first = self.machine.user, self.ram + PENDING - RAM
        before = user.read(first, CPUS * PENDING_SIZE)
        user.write(first, bytes(CPUS * PENDING_SIZE))
        self.machine.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CTRL, arm.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)
        tables = user.read(first, CPUS * PENDING_SIZE)
        user.write(first, before)
        return [pending_lpis(tables[PENDING_SIZE * cpu :][slice(*LPI_BYTES)]) for cpu in range(CPUS)]


def simulate(kind: str, steps: Sequence[Step]) -> list[Answer]:
    """What fabric answers."""

    async def main() -> list[Answer]:
        return await Model(kind).play(steps)

    answers: list[Answer] = fabric.run(main)
    return answers


# -- the emulator --------------------------------------------------------------------------------------------------

_LETTER = {1: "b", 2: "w", 4: "l", 8: "q"}
MACHINES = {
    "gicv3": ("-machine", "virt,gic-version=3,its=on", "-cpu", "max", "-smp", str(CPUS), "-m", "64"),
    "gicv2": ("-machine", "virt,gic-version=2", "-cpu", "max", "-smp", str(CPUS), "-m", "64"),
}
_GIC = {"gicv3": "arm-gicv3", "gicv2": "arm_gic"}


def emulate(emulator: str, kind: str, steps: Sequence[Step]) -> list[Answer]:
    """What an emulator answers, started for this."""
    with QTest(emulator, *MACHINES[kind]) as qtest:
        return _Player(qtest, qtest.find_device(_GIC[kind])).play(steps)


class _Player:
    """Sends as many steps as it can before it looks at answers."""

    def __init__(self, qtest: QTest, gic: str) -> None:
        self.qtest = qtest
        self.gic = gic
        self.sent: list[Step] = []
        self.taken = Taken()
        self.answers: list[Answer] = []

    def play(self, steps: Sequence[Step]) -> list[Answer]:
        for step in steps:
            if step.op in ("end", "done"):
                self.flush()
                write = self.taken.access(step.op)
                if write is not None:
                    self.sent.append(write)
            else:
                self.sent.append(step)
        self.flush()
        return self.answers

    def flush(self) -> None:
        """Have everything done that is to be done, and take in the answers."""
        commands = [_commands(step, self.gic) for step in self.sent]
        results = iter(self.qtest.run([command for group in commands for command in group]))
        for step, group in zip(self.sent, commands, strict=True):
            values = [next(results) for _ in group]
            if step.op == "lpis":
                length = LPI_BYTES[1] - LPI_BYTES[0]
                self.answers.append([pending_lpis(value.to_bytes(length, "big")) for value in values])
            elif step.answers:
                self.answers.append(values[0])
            if step.op == "ack":
                self.taken.add(values[0])
        self.sent.clear()


def _commands(step: Step, gic: str) -> list[str]:
    match step.op:
        case "r":
            return [f"read{_LETTER[step.size]} {step.address:#x}"]
        case "w":
            return [f"write{_LETTER[step.size]} {step.address:#x} {step.value:#x}"]
        case "m":
            return [f"write {step.address:#x} {len(step.data):#x} 0x{step.data.hex()}"]
        case "z":
            return [f"memset {step.address:#x} {step.value:#x} 0"]
        case "line":
            number = step.address - 32 if step.address >= 32 else NR_IRQS - 32 + 32 * step.size + step.address
            return [f"set_irq_in {gic} unnamed-gpio-in {number} {step.value}"]
        case "ack":
            return [f"readl {GICC + GICC_IAR:#x}"]
        case "msi":
            return [f"writel {DOORBELL:#x} {step.address:#x}"]
    tables = (PENDING + PENDING_SIZE * cpu + LPI_BYTES[0] for cpu in range(CPUS))
    return [f"read {table:#x} {LPI_BYTES[1] - LPI_BYTES[0]:#x}" for table in tables]
