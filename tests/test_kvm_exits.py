"""Why KVM_RUN of an arm64 vCPU returns, what the run area says then, and a GIC in the VMM."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from kvm_machine import GICD, RAM, Arm, outcome

import fabric
from fabric.errors import KvmError
from fabric.kvm.typed import VcpuFd
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.codec import CStruct
from fabric.vcpu.arm64 import DataAbort
from fabric.vcpu.exits import HostExit

NOWHERE = 0x0900_0000
"""An address that nobody claims."""
PSCI_SYSTEM_SUSPEND = 0xC400_000E
CPU, PPI = arm.KVM_ARM_IRQ_TYPE_CPU, arm.KVM_ARM_IRQ_TYPE_PPI
VTIMER, PTIMER = arm.KVM_ARM_DEV_EL1_VTIMER, arm.KVM_ARM_DEV_EL1_PTIMER

Program = Callable[[Any], Awaitable[object]]


class Runner(Arm):
    """A VM with a vCPU, and what its runs end with."""

    features = (arm.KVM_ARM_VCPU_PSCI_0_2,)

    def __init__(self, program: Program, *, gic: bool = False, **options: Any) -> None:
        super().__init__(1, gic=gic, **options)
        self.vcpus[0].load(program)

    async def run(self) -> Any:
        """KVM_RUN: 0, or the name of the errno."""
        try:
            return await self.vcpus[0].run()
        except KvmError as error:
            return outcome(_raise, error)

    @property
    def reason(self) -> int:
        """kvm_run.exit_reason."""
        return reason(self.vcpus[0])

    def exit(self, struct: type[CStruct]) -> Any:
        """The exit's part of kvm_run."""
        return struct.unpack(self.vcpus[0].run_area, uapi.KVM_RUN_EXIT)

    @property
    def lines(self) -> int:
        """kvm_run.s.regs.device_irq_level."""
        return int.from_bytes(self.vcpus[0].run_area[uapi.KVM_RUN_SYNC_REGS :][:8], "little")

    def inject_abort(self) -> None:
        """KVM_SET_VCPU_EVENTS with an external abort."""
        self.vcpus[0].ioctl(requests.KVM_SET_VCPU_EVENTS, arm.KvmVcpuEvents(ext_dabt_pending=1))

    def enable(self, cap: int) -> None:
        """KVM_ENABLE_CAP."""
        self.vm.ioctl(requests.KVM_ENABLE_CAP, uapi.KvmEnableCap(cap))


def _raise(error: KvmError) -> None:
    raise error


def reason(vcpu: VcpuFd) -> int:
    return int.from_bytes(vcpu.run_area[uapi.KVM_RUN_EXIT_REASON :][:4], "little")


async def forever(cpu: Any) -> None:
    while True:
        await cpu.compute(1000)


async def off(cpu: Any) -> None:
    await cpu.system_off()


# -- exits


@pytest.mark.spec("api.run", "api.exit.mmio")
def test_an_access_that_nobody_claims() -> None:
    """KVM_EXIT_MMIO with address, width and direction; KVM_RUN returns 0."""

    async def program(cpu: Any) -> None:
        await cpu.store(NOWHERE, 2, 0x1234)

    async def main() -> Any:
        machine = Runner(program)
        return await machine.run(), machine.reason, machine.exit(uapi.KvmRunMmio)

    mmio = uapi.KvmRunMmio(NOWHERE, b"\x34\x12" + bytes(6), 2, 1)
    assert (0, uapi.KVM_EXIT_MMIO, mmio) == fabric.run(main)


@pytest.mark.spec("api.exit.system-event")
def test_the_guest_asks_for_its_end() -> None:
    """KVM_EXIT_SYSTEM_EVENT: shutdown."""

    async def main() -> Any:
        machine = Runner(off)
        await machine.run()
        return machine.reason, machine.exit(uapi.KvmRunSystemEvent).type

    assert (uapi.KVM_EXIT_SYSTEM_EVENT, uapi.KVM_SYSTEM_EVENT_SHUTDOWN) == fabric.run(main)


@pytest.mark.spec("api.exit.intr")
def test_a_signal() -> None:
    """EINTR, and the run area says KVM_EXIT_INTR; immediate_exit is EINTR and leaves the run area alone."""

    async def main() -> Any:
        machine = Runner(forever)
        area = machine.vcpus[0].run_area
        area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1
        area[uapi.KVM_RUN_EXIT_REASON] = 99
        at_once = await machine.run(), machine.reason
        area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 0
        machine.kvm.engine.timer(machine.kvm.vcpu(machine.vcpus[0].fd).interrupt, name="signal").arm(1500)
        return at_once, (await machine.run(), machine.reason, fabric.now())

    assert (("EINTR", 99), ("EINTR", uapi.KVM_EXIT_INTR, 1500)) == fabric.run(main)


@pytest.mark.parametrize(
    ("details", "number"),
    [
        pytest.param(
            uapi.KvmRunUnknown(0x77), uapi.KVM_EXIT_UNKNOWN, marks=pytest.mark.spec("api.exit.unknown"), id="unknown"
        ),
        pytest.param(
            uapi.KvmRunFailEntry(uapi.KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED, 3),
            uapi.KVM_EXIT_FAIL_ENTRY,
            marks=pytest.mark.spec("api.exit.fail-entry"),
            id="fail-entry",
        ),
        pytest.param(
            uapi.KvmRunInternalError(4, 2, (1, 2) + (0,) * 14),
            uapi.KVM_EXIT_INTERNAL_ERROR,
            marks=pytest.mark.spec("api.exit.internal-error"),
            id="internal-error",
        ),
    ],
)
def test_a_host_that_fails_the_vcpu(details: Any, number: int) -> None:
    """Injected: KVM_RUN returns 0 with that exit, and the guest has not run; the next KVM_RUN runs it."""

    async def main() -> Any:
        machine = Runner(off)
        machine.kvm.vcpu(machine.vcpus[0].fd).exit_next(HostExit(details))
        failed = await machine.run(), machine.reason, machine.exit(type(details))
        await machine.run()
        return failed, machine.reason

    assert ((0, number, details), uapi.KVM_EXIT_SYSTEM_EVENT) == fabric.run(main)


# -- accesses without syndrome


async def pair(cpu: Any) -> None:
    await cpu.store_pair(NOWHERE, 1, 2)


@pytest.mark.spec("api.run.ENOSYS.nisv")
def test_an_access_that_cannot_be_emulated() -> None:
    """ENOSYS each time, as the guest stays where it is; there is no exit, which is KVM_EXIT_UNKNOWN."""

    async def main() -> Any:
        machine = Runner(pair)
        return [(await machine.run(), machine.reason) for _ in range(2)]

    assert [("ENOSYS", uapi.KVM_EXIT_UNKNOWN)] * 2 == fabric.run(main)


@pytest.mark.spec("api.exit.arm-nisv")
def test_an_access_that_userspace_wants_to_know_of() -> None:
    """With KVM_CAP_ARM_NISV_TO_USER it is KVM_EXIT_ARM_NISV, with address and direction. A slot that is there at the
    next KVM_RUN takes the access."""

    async def program(cpu: Any) -> None:
        await pair(cpu)
        await cpu.load_pair(GICD)

    async def main() -> Any:
        machine = Runner(program, gic=True)
        machine.enable(uapi.KVM_CAP_ARM_NISV_TO_USER)
        store = await machine.run(), machine.reason, machine.exit(arm.KvmRunArmNisv)
        memory = machine.user.map(4096)
        machine.vm.set_memory(0, NOWHERE, 4096, memory)
        load = await machine.run(), machine.reason, machine.exit(arm.KvmRunArmNisv)
        return store, machine.user.read(memory, 16), load

    write, translation_fault = 1 << 6, 0x05
    store, data, load = fabric.run(main)
    assert (0, uapi.KVM_EXIT_ARM_NISV, arm.KvmRunArmNisv(write | translation_fault, NOWHERE)) == store
    assert bytes([1, *[0] * 7, 2, *[0] * 7]) == data
    assert (0, uapi.KVM_EXIT_ARM_NISV, arm.KvmRunArmNisv(translation_fault, GICD)) == load


@pytest.mark.parametrize("access", ["load", "load_pair"])
def test_an_external_abort_answers_an_access(access: str) -> None:
    """After KVM_EXIT_MMIO and KVM_EXIT_ARM_NISV the VMM may inject one: it is raised where the guest stands."""

    async def program(cpu: Any) -> None:
        with pytest.raises(DataAbort, match="0x9000000") as abort:
            await (cpu.load(NOWHERE, 4) if access == "load" else cpu.load_pair(NOWHERE))
        assert NOWHERE == abort.value.gpa
        await cpu.system_off()

    async def main() -> Any:
        machine = Runner(program)
        machine.enable(uapi.KVM_CAP_ARM_NISV_TO_USER)
        await machine.run()
        machine.inject_abort()
        await machine.run()
        return machine.reason

    assert uapi.KVM_EXIT_SYSTEM_EVENT == fabric.run(main)


def test_an_abort_after_another_exit_is_nobodys() -> None:
    """Nothing is aborted later."""

    async def program(cpu: Any) -> None:
        await cpu.system_off()
        assert 0 == await cpu.load(NOWHERE, 4)
        await cpu.system_off()

    async def main() -> Any:
        machine = Runner(program)
        await machine.run()
        machine.inject_abort()
        return [(await machine.run(), machine.reason) for _ in range(2)]

    assert [(0, uapi.KVM_EXIT_MMIO), (0, uapi.KVM_EXIT_SYSTEM_EVENT)] == fabric.run(main)


def test_pairs_in_memory() -> None:
    """Two 64-bit words, without an exit; a read-only slot is read and not written."""

    async def program(cpu: Any) -> None:
        await cpu.store_pair(RAM, 5, 1 << 63)
        assert (5, 1 << 63) == await cpu.load_pair(RAM)
        assert (0, 0) == await cpu.load_pair(0)
        await cpu.store_pair(0, 1, 1)

    async def main() -> Any:
        machine = Runner(program, memory=True)
        machine.vm.set_memory(1, 0, 4096, machine.user.map(4096), uapi.KVM_MEM_READONLY)
        return await machine.run()

    assert "ENOSYS" == fabric.run(main)


# -- KVM_SET_VCPU_EVENTS


def test_events_that_are_refused() -> None:
    """Reserved fields are 0, a syndrome has 25 bits, and a host without RAS takes none."""
    vcpu, old = Arm(gic=False).vcpus[0], Arm(gic=False, ras=False).vcpus[0]

    def answer(fd: VcpuFd, **events: Any) -> Any:
        return outcome(fd.ioctl, requests.KVM_SET_VCPU_EVENTS, arm.KvmVcpuEvents(**events))

    assert ["EINVAL", "EINVAL", "EINVAL", 0] == [
        answer(vcpu, reserved=(0,) * 11 + (1,)),
        answer(vcpu, pad=b"\0\0\0\0\1"),
        answer(vcpu, serror_pending=1, serror_has_esr=1, serror_esr=1 << 25),
        answer(vcpu, serror_esr=1 << 25),
    ]
    assert ["EINVAL", 0] == [answer(old, serror_pending=1, serror_has_esr=1), answer(old, serror_pending=1)]


def test_an_error_without_a_syndrome() -> None:
    """It gets the one that says "implementation defined", which a host without RAS does not report."""

    def injected(machine: Arm) -> arm.KvmVcpuEvents:
        vcpu = machine.vcpus[0]
        vcpu.ioctl(requests.KVM_SET_VCPU_EVENTS, arm.KvmVcpuEvents(serror_pending=1))
        buffer = bytearray(arm.KvmVcpuEvents.SIZE)
        vcpu.ioctl(requests.KVM_GET_VCPU_EVENTS, buffer)
        return arm.KvmVcpuEvents.unpack(buffer)

    assert arm.KvmVcpuEvents(1, 1, serror_esr=1 << 24) == injected(Arm(gic=False))
    assert arm.KvmVcpuEvents(1, 0) == injected(Arm(gic=False, ras=False))


# -- suspended


def test_a_suspended_vcpu_waits_for_an_interrupt() -> None:
    """KVM_RUN does not enter the guest but exits with WAKEUP when there is one, and again until it is made runnable."""

    async def main() -> Any:
        machine = Runner(off, gic=True)
        machine.forward()
        vcpu = machine.vcpus[0]
        vcpu.mp_state = uapi.KVM_MP_STATE_SUSPENDED
        spi = arm.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI, 40)
        machine.kvm.engine.timer(lambda: machine.vm.irq_line(spi, 1), name="spi").arm(700)
        events = []
        for _ in range(2):
            assert 0 == await machine.run()
            events.append((fabric.now(), machine.exit(uapi.KvmRunSystemEvent).type, vcpu.mp_state))
        vcpu.mp_state = uapi.KVM_MP_STATE_RUNNABLE
        await machine.run()
        return events, machine.exit(uapi.KvmRunSystemEvent).type

    woken = (700, uapi.KVM_SYSTEM_EVENT_WAKEUP, uapi.KVM_MP_STATE_SUSPENDED)
    assert ([woken, woken], uapi.KVM_SYSTEM_EVENT_SHUTDOWN) == fabric.run(main)


def test_a_suspended_vcpu_can_be_interrupted() -> None:
    """EINTR; without a GIC nothing else ends it."""

    async def main() -> Any:
        machine = Runner(off)
        machine.vcpus[0].mp_state = uapi.KVM_MP_STATE_SUSPENDED
        machine.kvm.engine.timer(machine.kvm.vcpu(machine.vcpus[0].fd).interrupt, name="signal").arm(30)
        return await machine.run(), machine.reason, fabric.now()

    assert ("EINTR", uapi.KVM_EXIT_INTR, 30) == fabric.run(main)


@pytest.mark.parametrize("enabled", [True, False])
def test_system_suspend(enabled: bool) -> None:
    """With KVM_CAP_ARM_SYSTEM_SUSPEND it is an exit, and 0 when the VMM goes on; else PSCI does not have it."""
    answers = []

    async def program(cpu: Any) -> None:
        answers.append(await cpu.hvc(PSCI_SYSTEM_SUSPEND, 0x8000_0000, 0))
        await cpu.system_off()

    async def main() -> Any:
        machine = Runner(program)
        if enabled:
            machine.enable(uapi.KVM_CAP_ARM_SYSTEM_SUSPEND)
            await machine.run()
            assert uapi.KVM_SYSTEM_EVENT_SUSPEND == machine.exit(uapi.KvmRunSystemEvent).type
        await machine.run()
        assert uapi.KVM_SYSTEM_EVENT_SHUTDOWN == machine.exit(uapi.KvmRunSystemEvent).type

    fabric.run(main)
    assert [0 if enabled else -1] == answers


# -- a GIC in the VMM


@pytest.mark.spec("api.irq-line.rule.arm-userspace")
def test_the_vmm_drives_the_inputs_of_a_cpu() -> None:
    """Id 0 is IRQ and is taken as long as it is up; id 1 is FIQ. The guest acknowledges at the VMM's controller."""
    log = []

    async def handler(cpu: Any) -> None:
        log.append((fabric.now(), await cpu.mrs("ISR_EL1")))
        await cpu.load(NOWHERE, 4)

    async def program(cpu: Any) -> None:
        cpu.set_vector(handler)
        cpu.unmask()
        await cpu.wait_for_interrupt()
        log.append((fabric.now(), await cpu.mrs("ISR_EL1")))
        await cpu.system_off()

    async def main() -> None:
        machine = Runner(program)
        machine.vm.irq_line(arm.irq_line(CPU, arm.KVM_ARM_IRQ_CPU_FIQ), 1)
        machine.kvm.engine.timer(lambda: machine.vm.irq_line(arm.irq_line(CPU, 0), 1), name="irq").arm(50)
        assert (0, uapi.KVM_EXIT_MMIO) == (await machine.run(), machine.reason)
        assert (0, uapi.KVM_EXIT_MMIO) == (await machine.run(), machine.reason)  # still up
        machine.vm.irq_line(arm.irq_line(CPU, 0), 0)
        assert (0, uapi.KVM_EXIT_SYSTEM_EVENT) == (await machine.run(), machine.reason)

    fabric.run(main)
    irq, fiq = 1 << 7, 1 << 6
    assert [(50, irq | fiq), (50, irq | fiq), (50, fiq)] == log


@pytest.mark.spec("api.cap.arm-user-irq")
def test_the_vmm_learns_of_timer_lines() -> None:
    """When one moves, KVM_RUN ends with EINTR and the run area has the levels; until the VMM has seen them it does
    not enter the guest."""

    async def program(cpu: Any) -> None:
        await cpu.msr("CNTV_CVAL_EL0", 100)
        await cpu.msr("CNTV_CTL_EL0", 1)
        await cpu.compute(2000)
        await cpu.msr("CNTV_CTL_EL0", 0)
        await cpu.msr("CNTP_CTL_EL0", 1)  # its compare value is 0: expired
        await cpu.compute(10)
        await cpu.system_off()

    async def main() -> Any:
        machine = Runner(program)
        seen = []
        for _ in range(3):
            seen.append((await machine.run(), machine.reason, machine.lines, fabric.now()))
        return seen

    intr = uapi.KVM_EXIT_INTR
    assert [
        ("EINTR", intr, VTIMER, 1600),
        ("EINTR", intr, PTIMER, 2000),
        (0, uapi.KVM_EXIT_SYSTEM_EVENT, PTIMER, 2010),
    ] == fabric.run(main)


def test_a_line_that_moved_outside_is_told_before_the_guest_runs() -> None:
    """A timer that expired between two runs ends the second at once."""

    async def program(cpu: Any) -> None:
        await cpu.msr("CNTV_CVAL_EL0", 100)
        await cpu.msr("CNTV_CTL_EL0", 1)
        await cpu.load(NOWHERE, 4)
        await cpu.system_off()

    async def main() -> Any:
        machine = Runner(program)
        first = await machine.run(), machine.lines
        await fabric.sleep(5000)
        second = await machine.run(), machine.reason, machine.lines
        return first, second, (await machine.run(), machine.reason)

    first, second, third = fabric.run(main)
    assert ((0, 0), ("EINTR", uapi.KVM_EXIT_INTR, VTIMER)) == (first, second)
    assert (0, uapi.KVM_EXIT_SYSTEM_EVENT) == third
