"""vCPU fds of an arm64 host: KVM_ARM_VCPU_INIT, registers, attributes, and KVM_RUN."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from kvm_machine import Arm, outcome

import fabric
from fabric.kvm.typed import VcpuFd
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

POWER_OFF, PMU, SVE = arm.KVM_ARM_VCPU_POWER_OFF, arm.KVM_ARM_VCPU_PMU_V3, arm.KVM_ARM_VCPU_SVE
PTRAUTH = [arm.KVM_ARM_VCPU_PTRAUTH_ADDRESS, arm.KVM_ARM_VCPU_PTRAUTH_GENERIC]
NARROW = arm.KVM_ARM_VCPU_EL1_32BIT
GRP_PMU, GRP_TIMER, GRP_PVTIME = 0, 1, 2
VTIMER, PTIMER = 0, 1
PMU_IRQ, PMU_INIT, PMU_FILTER, SET_PMU = 0, 1, 2, 3


def fresh(**options: Any) -> tuple[Arm, VcpuFd]:
    """A VM with one vCPU that is not initialised."""
    machine = Arm(0, gic=False, **options)
    return machine, machine.vm.create_vcpu(0)


def run(vcpu: VcpuFd) -> Any:
    """KVM_RUN with immediate_exit: EINTR when the first-run checks pass."""
    vcpu.run_area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1
    return outcome(vcpu.ioctl, requests.KVM_RUN)


# -- KVM_ARM_VCPU_INIT


@pytest.mark.spec("api.arm-vcpu-init.EINVAL.target", "api.arm-vcpu-init.ENOENT.feature")
def test_targets_and_features() -> None:
    """One target; features that do not exist are ENOENT, and both kinds of pointer authentication go together."""
    _, vcpu = fresh()

    assert "EINVAL" == outcome(vcpu.init, target=arm.KVM_ARM_TARGET_CORTEX_A53)
    assert "ENOENT" == outcome(vcpu.init, [7])
    assert "ENOENT" == outcome(vcpu.ioctl, requests.KVM_ARM_VCPU_INIT, arm.KvmVcpuInit(5, (0, 0, 0, 0, 0, 0, 1 << 31)))
    assert "EINVAL" == outcome(vcpu.init, PTRAUTH[:1])
    assert None is outcome(vcpu.init, PTRAUTH)


@pytest.mark.spec("api.arm-vcpu-init.rule.repeat")
def test_later_calls_must_agree_with_the_first() -> None:
    """Other features are EINVAL, the same reset the vCPU; an unknown one is still ENOENT."""
    _, vcpu = fresh()
    vcpu.init([POWER_OFF])

    assert ["EINVAL", "EINVAL", "ENOENT", None] == [
        outcome(vcpu.init, features) for features in ([], [POWER_OFF, PMU], [POWER_OFF, 9], [POWER_OFF])
    ]


def test_features_of_a_call_that_fails_on_an_unknown_one_stay() -> None:
    """The next call has them, asked for or not: seen in Linux 6.1, which sets bits as it checks them."""
    machine, vcpu = fresh()

    assert "ENOENT" == outcome(vcpu.init, [PMU, 7])
    vcpu.init()
    assert {PMU} == machine.kvm.vcpu(vcpu.fd).features


def test_features_that_the_host_lacks() -> None:
    """EINVAL, and the vCPU is not initialised."""
    machine, vcpu = fresh(sve=False, ptrauth=False, el1_32bit=False, pmu_ids=())

    for features in ([SVE], PTRAUTH, [NARROW], [PMU]):
        assert "EINVAL" == outcome(vcpu.init, features)
    assert not machine.kvm.vcpu(vcpu.fd).initialized
    assert None is outcome(vcpu.init)


def test_all_vcpus_have_one_register_width() -> None:
    """The first to be initialised decides."""
    machine, vcpu = fresh()
    other = machine.vm.create_vcpu(1)
    vcpu.init([NARROW])

    assert ["EINVAL", None] == [outcome(other.init), outcome(other.init, [NARROW])]


@pytest.mark.spec("api.run.EPERM.not-finalised")
def test_sve_is_finalised_before_running() -> None:
    """Until then KVM_RUN is EPERM; finalising twice is EPERM too, what need not be is EINVAL."""
    machine, vcpu = fresh()

    def finalize(feature: int = SVE) -> Any:
        return outcome(vcpu.ioctl, requests.KVM_ARM_VCPU_FINALIZE, bytearray(feature.to_bytes(4, "little")))

    assert "ENOEXEC" == finalize()
    vcpu.init([SVE])
    assert "EPERM" == run(vcpu)
    assert ["EINVAL", 0, "EPERM"] == [finalize(PMU), finalize(), finalize()]
    assert "EINTR" == run(vcpu)
    other = machine.vm.create_vcpu(1)
    other.init()
    assert "EINVAL" == outcome(other.ioctl, requests.KVM_ARM_VCPU_FINALIZE, bytearray([SVE, 0, 0, 0]))


# -- registers


@pytest.mark.spec("api.set-one-reg.ENOEXEC.arm-init", "api.get-one-reg.ENOEXEC.arm-init")
def test_registers_are_there_after_init() -> None:
    """ENOEXEC before."""
    _, vcpu = fresh()

    assert ["ENOEXEC", "ENOEXEC"] == [
        outcome(vcpu.get_reg, arm.KVM_REG_ARM_MPIDR_EL1),
        outcome(vcpu.set_reg, arm.KVM_REG_ARM_MPIDR_EL1, 5),
    ]


@pytest.mark.parametrize(("vcpu_id", "mpidr"), [(0, 0x8000_0000), (17, 0x8000_0101), (511, 0x8000_1F0F)])
def test_affinity_comes_from_the_id(vcpu_id: int, mpidr: int) -> None:
    """16 vCPUs an Aff0 group; KVM_ARM_VCPU_INIT sets it anew."""
    machine = Arm(0, gic=False)
    vcpu = machine.vm.create_vcpu(vcpu_id)
    vcpu.init()

    assert mpidr == vcpu.get_reg(arm.KVM_REG_ARM_MPIDR_EL1)

    vcpu.set_reg(arm.KVM_REG_ARM_MPIDR_EL1, 0xFF_C000_0203)
    assert 0xFF_C000_0203 == vcpu.get_reg(arm.KVM_REG_ARM_MPIDR_EL1)
    assert 0xFF_0000_0203 == machine.kvm.vcpu(vcpu.fd).mpidr
    vcpu.init()
    assert mpidr == vcpu.get_reg(arm.KVM_REG_ARM_MPIDR_EL1)


@pytest.mark.spec("api.reg.timer-ctl", "api.reg.timer-cval", "api.reg.timer-cnt", "api.reg.ptimer-ctl")
def test_timer_registers() -> None:
    """The virtual timer's three; those of the physical timer are ENOENT."""
    machine = Arm(gic=False)
    vcpu = machine.vcpus[0]
    vcpu.set_reg(arm.KVM_REG_ARM_TIMER_CVAL, 1 << 40)
    vcpu.set_reg(arm.KVM_REG_ARM_TIMER_CTL, 1)
    vcpu.set_reg(arm.KVM_REG_ARM_TIMER_CNT, 5000)

    assert [1 << 40, 1, 5000] == [
        vcpu.get_reg(reg) for reg in (arm.KVM_REG_ARM_TIMER_CVAL, arm.KVM_REG_ARM_TIMER_CTL, arm.KVM_REG_ARM_TIMER_CNT)
    ]
    for reg in (arm.KVM_REG_ARM_PTIMER_CTL, arm.KVM_REG_ARM_PTIMER_CVAL, arm.KVM_REG_ARM_PTIMER_CNT):
        assert ["ENOENT", "ENOENT"] == [outcome(vcpu.get_reg, reg), outcome(vcpu.set_reg, reg, 0)]


def test_the_counter_runs_with_virtual_time() -> None:
    """It starts at 0 with the youngest vCPU, at 62.5 MHz unless the host says otherwise."""

    async def main() -> tuple[int, int]:
        machine = Arm(gic=False)
        fast = Arm(gic=False, counter_hz=1_000_000_000)
        await fabric.sleep(1600)
        reg = arm.KVM_REG_ARM_TIMER_CNT
        return machine.vcpus[0].get_reg(reg), fast.vcpus[0].get_reg(reg)

    assert (100, 1600) == fabric.run(main)


@pytest.mark.spec("api.get-one-reg.EINVAL.invalid", "api.get-one-reg.ENOENT.unknown")
def test_register_ids() -> None:
    """Another architecture's are EINVAL, system registers that there are not and odd sizes ENOENT."""
    vcpu = Arm(gic=False).vcpus[0]
    nothing = arm.arm64_sys_reg(3, 0, 1, 0, 5)

    assert "EINVAL" == outcome(vcpu.get_reg, uapi.KVM_REG_X86 | uapi.KVM_REG_SIZE_U64)
    assert "EINVAL" == outcome(vcpu.get_reg, arm.KVM_REG_ARM_MPIDR_EL1 | 1 << 40)
    assert ["ENOENT", "ENOENT"] == [outcome(vcpu.get_reg, nothing), outcome(vcpu.set_reg, nothing, 1)]
    narrow = arm.KVM_REG_ARM_MPIDR_EL1 & ~uapi.KVM_REG_SIZE_MASK | uapi.KVM_REG_SIZE_U32
    assert "ENOENT" == outcome(vcpu.get_reg, narrow)


@pytest.mark.spec("api.get-one-reg.EFAULT.user-ptr", "api.set-one-reg.EFAULT.user-ptr")
def test_register_values_that_cannot_be_accessed() -> None:
    """EFAULT, after the id has been looked up; but in a set of a system register before."""
    vcpu = Arm(gic=False).vcpus[0]
    requests_ = (requests.KVM_GET_ONE_REG, requests.KVM_SET_ONE_REG)

    for request in requests_:
        for reg in (arm.KVM_REG_ARM_MPIDR_EL1, arm.KVM_REG_ARM_TIMER_CVAL, arm.arm64_core_reg(0)):
            assert "EFAULT" == outcome(vcpu.ioctl, request, uapi.KvmOneReg(reg, 8))
        unknown = outcome(vcpu.ioctl, request, uapi.KvmOneReg(arm.KVM_REG_ARM_PTIMER_CNT, 8))
        assert unknown == ("EFAULT" if request == requests.KVM_SET_ONE_REG else "ENOENT")


def test_core_registers() -> None:
    """x0 to x30, sp, pc, pstate and the rest of struct kvm_regs, by offset and with the member's size."""
    vcpu = Arm(gic=False).vcpus[0]
    x0, pc, pstate = (arm.arm64_core_reg(offset) for offset in (0, 256, 264))
    vcpu.set_reg(x0, 0x1234)
    vcpu.set_reg(pc, 1 << 63)

    assert [0x1234, 1 << 63, 0x3C5] == [vcpu.get_reg(reg) for reg in (x0, pc, pstate)]
    assert None is outcome(vcpu.set_reg, arm.arm64_core_reg(336, 16), 1 << 127)
    assert "EINVAL" == outcome(vcpu.get_reg, arm.arm64_core_reg(0, 4))
    assert "EINVAL" == outcome(vcpu.get_reg, arm.arm64_core_reg(4))
    assert "ENOENT" == outcome(vcpu.get_reg, arm.arm64_core_reg(864))
    assert "EINVAL" == outcome(vcpu.set_reg, pstate, 0x3C9)  # EL2
    vcpu.init()
    assert 0 == vcpu.get_reg(x0)


# -- power


def test_mp_state() -> None:
    """Runnable, stopped (by feature or by call) and suspended; the states of other architectures are EINVAL."""
    machine, vcpu = fresh()
    states = []
    for features in ([], [POWER_OFF]):
        one = machine.vm.create_vcpu(len(features) + 1)
        one.init(features)
        states.append(one.mp_state)

    assert [uapi.KVM_MP_STATE_RUNNABLE, uapi.KVM_MP_STATE_STOPPED] == states
    for state in range(12):
        wanted = None if state in (0, 5, 10) else "EINVAL"
        assert wanted == outcome(setattr, vcpu, "mp_state", state)
        if wanted is None:
            assert state == vcpu.mp_state


def test_vcpu_events() -> None:
    """A pending SError comes back with its syndrome; one that is no syndrome is EINVAL."""
    vcpu = Arm(gic=False).vcpus[0]

    def events() -> arm.KvmVcpuEvents:
        buffer = bytearray(arm.KvmVcpuEvents.SIZE)
        vcpu.ioctl(requests.KVM_GET_VCPU_EVENTS, buffer)
        return arm.KvmVcpuEvents.unpack(buffer)

    assert arm.KvmVcpuEvents(serror_has_esr=1) == events()
    bad = arm.KvmVcpuEvents(serror_pending=1, serror_has_esr=1, serror_esr=1 << 25)
    assert "EINVAL" == outcome(vcpu.ioctl, requests.KVM_SET_VCPU_EVENTS, bad)
    vcpu.ioctl(requests.KVM_SET_VCPU_EVENTS, arm.KvmVcpuEvents(1, 1, serror_esr=5))
    assert arm.KvmVcpuEvents(1, 1, serror_esr=5) == events()


# -- attributes: what the golden cases do not have


@pytest.mark.spec("vcpu.any.ENXIO.unknown", "vcpu.timer.vtimer.ENXIO.unknown")
def test_unknown_attributes() -> None:
    """ENXIO for groups and attributes that are not there."""
    vcpu = Arm().vcpus[0]

    for group, attr in ((3, 0), (GRP_TIMER, 2), (GRP_PVTIME, 1), (1 << 31, 0)):
        assert ["ENXIO", False] == [outcome(vcpu.get_attr, group, attr), vcpu.has_attr(group, attr)]
    assert "ENXIO" == outcome(vcpu.set_attr, GRP_TIMER, 2, 20)
    assert "EINVAL" == outcome(vcpu.set_attr, GRP_TIMER, 2, 5)


@pytest.mark.spec("vcpu.timer.vtimer.rule.all-vcpus", "vcpu.timer.vtimer.rule.later-vcpus")
def test_timer_interrupts_are_common() -> None:
    """A set counts for the vCPUs there are; later ones have the default, and then nobody runs."""
    machine = Arm(2, init=False)
    machine.vcpus[1].set_attr(GRP_TIMER, VTIMER, 20)
    later = machine.vm.create_vcpu(2)
    later.init()
    machine.gic.set_attr(4, 0)
    vcpus = [*machine.vcpus, later]

    assert [20, 20, 27] == [vcpu.get_attr(GRP_TIMER, VTIMER, 4) for vcpu in vcpus]
    assert ["EINVAL"] * 3 == [run(vcpu) for vcpu in vcpus]
    later.set_attr(GRP_TIMER, VTIMER, 27)
    assert ["EINTR"] * 3 == [run(vcpu) for vcpu in vcpus]


@pytest.mark.spec("vcpu.first-run.EINVAL.timer-same", "vcpu.timer.vtimer.rule.same-ppi")
def test_both_timers_on_one_interrupt() -> None:
    """It can be set, and keeps the vCPU from running; that can be repaired."""
    machine = Arm()
    vcpu = machine.vcpus[0]
    vcpu.set_attr(GRP_TIMER, PTIMER, 27)

    assert "EINVAL" == run(vcpu)


@pytest.mark.spec("vcpu.timer.vtimer.EBUSY.has-run", "vcpu.timer.vtimer.note.ebusy-scope")
def test_timer_interrupts_of_a_vcpu_that_has_run() -> None:
    """They are fixed; through a vCPU that has not run they can still be set, for all."""
    machine = Arm(2)
    one, other = machine.vcpus
    run(one)

    assert "EBUSY" == outcome(one.set_attr, GRP_TIMER, VTIMER, 20)
    assert 0 == outcome(other.set_attr, GRP_TIMER, VTIMER, 20)


@pytest.mark.spec("vcpu.first-run.EINVAL.timer-owned", "vcpu.pmu.init.EEXIST.irq-owned")
def test_timers_and_pmu_do_not_share_an_interrupt() -> None:
    """Who comes second is refused: the timers at the first run, the PMU at its initialisation."""
    machine = Arm(0, init=False)
    one, other = (machine.vm.create_vcpu(n) for n in range(2))
    for vcpu in (one, other):
        vcpu.init([PMU])
    machine.gic.set_attr(4, 0)
    for vcpu in (one, other):
        vcpu.set_attr(GRP_PMU, PMU_IRQ, 27)

    one.set_attr(GRP_PMU, PMU_INIT)
    assert "EINVAL" == run(one)


@pytest.mark.spec("vcpu.first-run.EINVAL.pmu-not-initialised", "vcpu.pmu.init.rule.userspace-irqchip")
def test_the_pmu_at_the_first_run() -> None:
    """The feature without PMU_V3_INIT is refused; without a GIC the PMU needs no interrupt."""
    _, vcpu = fresh()
    vcpu.init([PMU])

    assert "EINVAL" == run(vcpu)
    vcpu.set_attr(GRP_PMU, PMU_INIT)
    assert "EINTR" == run(vcpu)


@pytest.mark.spec("vcpu.pmu.filter.EBUSY.has-run", "vcpu.pmu.set-pmu.EBUSY.has-run", "vcpu.pmu.set-pmu.EBUSY.filter")
def test_pmu_choices_are_made_before_anybody_runs() -> None:
    """A filter, and the choice of a PMU; with a filter only the PMU in use may be chosen."""
    machine = Arm(1, gic=False, pmu_ids=(8, 9))
    other = machine.vm.create_vcpu(1)
    other.init([PMU])
    allow = arm.KvmPmuEventFilter(0x11, 1)
    other.set_attr(GRP_PMU, PMU_FILTER, allow)

    assert ["EBUSY", 0] == [outcome(other.set_attr, GRP_PMU, SET_PMU, n) for n in (9, 8)]
    run(machine.vcpus[0])
    assert ["EBUSY", "EBUSY"] == [
        outcome(other.set_attr, GRP_PMU, PMU_FILTER, allow),
        outcome(other.set_attr, GRP_PMU, SET_PMU, 8),
    ]


@pytest.mark.spec("vcpu.pvtime.ipa.ENXIO.unsupported")
def test_a_host_without_stolen_time() -> None:
    """The attribute is not there at all."""
    vcpu = Arm(steal_time=False).vcpus[0]

    assert ["ENXIO", "ENXIO", False] == [
        outcome(vcpu.set_attr, GRP_PVTIME, 0, 64),
        outcome(vcpu.get_attr, GRP_PVTIME, 0),
        vcpu.has_attr(GRP_PVTIME, 0),
    ]


# -- KVM_RUN


@pytest.mark.spec("api.run.ENOEXEC.not-initialised", "vcpu.first-run.ENOEXEC.not-initialised")
def test_running_needs_vcpu_init() -> None:
    """ENOEXEC, by ioctl and by run."""
    machine, vcpu = fresh()

    async def main() -> Any:
        try:
            return await machine.kvm.run(vcpu.fd)
        except OSError as error:
            return error.strerror

    assert "ENOEXEC" == run(vcpu)
    assert "KVM_ARM_VCPU_INIT" in fabric.run(main)


@pytest.mark.spec("api.run.EINTR.signal", "api.run.rule.immediate")
def test_immediate_exit() -> None:
    """EINTR once the first-run checks have passed, which counts as having run."""
    machine = Arm()

    assert "EINTR" == run(machine.vcpus[0])
    assert machine.kvm.vcpu(machine.vcpus[0].fd).has_run


def test_immediate_exit_goes_through_the_hardware() -> None:
    """As in the kernel, which loads the vCPU before it looks at immediate_exit.

    The binary points are raised to what the hardware has, and a timer that is due raises its line.
    """
    machine = Arm()
    vcpu = machine.vcpus[0]
    vcpu.set_reg(arm.KVM_REG_ARM_TIMER_CTL, 0xFF01)

    def look() -> list[int]:
        sysregs = [machine.gic.get_attr(arm.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, n) for n in (0xC643, 0xC663)]
        levels = machine.gic.get_attr(arm.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, 0, 4)
        return [*sysregs, levels, vcpu.get_reg(arm.KVM_REG_ARM_TIMER_CTL)]

    assert [0, 0, 0, 0xFF05] == look()
    run(vcpu)
    assert [2, 3, 1 << 27, 5] == look()


def test_a_plain_call_cannot_run_a_guest() -> None:
    """It takes time: the error says what to use instead."""
    machine = Arm()

    with pytest.raises(OSError, match=r"await kvm\.run"):
        machine.vcpus[0].ioctl(requests.KVM_RUN)


async def one_load(cpu: Any) -> None:
    """A guest that reads a device register and writes twice its value to another."""
    await cpu.store(0x2000, 4, 2 * await cpu.load(0x1000, 4))


def test_mmio_exits() -> None:
    """An access that nobody claims leaves KVM_RUN; the next run completes it with what is in the run area."""

    async def main() -> list[Any]:
        machine = Arm()
        vcpu = machine.vcpus[0]
        vcpu.load(one_load)
        area = vcpu.run_area
        mmio = uapi.KVM_RUN_EXIT
        answers: list[Any] = [await vcpu.run(), uapi.KvmRunMmio.unpack(area[mmio:])]
        area[mmio + 8 : mmio + 12] = (21).to_bytes(4, "little")
        return [*answers, await vcpu.run(), uapi.KvmRunMmio.unpack(area[mmio:])]

    read, write = uapi.KvmRunMmio(0x1000, len=4), uapi.KvmRunMmio(0x2000, b"\x2a" + bytes(7), 4, 1)
    assert [0, read, 0, write] == fabric.run(main)


def test_immediate_exit_completes_the_access() -> None:
    """So a VMM that wants to save the vCPU has nothing left hanging; by ioctl as by run."""

    async def main(by_ioctl: bool) -> Any:
        machine = Arm()
        vcpu = machine.vcpus[0]
        vcpu.load(one_load)
        area = vcpu.run_area
        await vcpu.run()
        area[uapi.KVM_RUN_EXIT + 8] = 4
        area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1
        if by_ioctl:
            answer = outcome(vcpu.ioctl, requests.KVM_RUN)
        else:
            with pytest.raises(OSError, match="immediate_exit"):
                await vcpu.run()
            answer = "EINTR"
        area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 0
        area[uapi.KVM_RUN_EXIT + 8] = 99
        await vcpu.run()
        return answer, uapi.KvmRunMmio.unpack(area[uapi.KVM_RUN_EXIT :]).data[0]

    assert ("EINTR", 8) == fabric.run(main, True)
    assert ("EINTR", 8) == fabric.run(main, False)


@pytest.mark.spec("api.all.vcpu-busy")
def test_calls_on_a_vcpu_that_runs() -> None:
    """They do not wait for KVM_RUN: EINTR; attributes that need all vCPUs stopped are EBUSY."""

    async def main() -> list[Any]:
        machine = Arm()
        vcpu = machine.vcpus[0]

        async def guest(cpu: Any) -> None:
            await cpu.compute(1000)
            await cpu.store(0x1000, 4, 0)

        vcpu.load(guest)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await fabric.sleep(500)
            answers = [
                outcome(vcpu.get_reg, arm.KVM_REG_ARM_MPIDR_EL1),
                outcome(machine.gicd, 4),
                outcome(machine.vm.irq_line, arm.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI, 40), 1),
            ]
        return [*answers, vcpu.get_reg(arm.KVM_REG_ARM_MPIDR_EL1)]

    assert ["EINTR", "EBUSY", None, 0x8000_0000] == fabric.run(main)


def test_closing_a_vcpu_that_runs() -> None:
    """Its number is gone at once, and the VM lives until KVM_RUN returns."""

    async def main() -> list[Any]:
        machine = Arm()
        vcpu = machine.vcpus[0]
        vm = machine.inside
        log: list[Any] = []
        vm.on_destroy(lambda: log.append(fabric.now()))

        async def guest(cpu: Any) -> None:
            await cpu.compute(1000)
            await cpu.store(0x1000, 4, 0)

        vcpu.load(guest)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await fabric.sleep(500)
            for one in (machine.vm, machine.gic, vcpu):
                one.close()
            log.append(outcome(machine.kvm.mmap, vcpu.fd, 4096))
        return [*log, machine.kvm.vms]

    assert ["EBADF", 1000, []] == fabric.run(main)


def test_a_dead_vm_cannot_run() -> None:
    """EIO from run as from ioctl."""

    async def main() -> list[str]:
        machine = Arm(2, init=False)
        errors = []
        for vcpu in machine.vcpus:
            try:
                await machine.kvm.run(vcpu.fd)
            except OSError as error:
                errors.append(str(error))
        return errors

    first, second = fabric.run(main)
    assert "was not initialised" in first
    assert "is dead" in second


def test_run_wants_a_vcpu_fd() -> None:
    """Other kvm fds do not know KVM_RUN, other numbers are EBADF."""
    machine = Arm()
    answers = []
    for fd in (machine.vm.fd, machine.gic.fd, 12345):
        try:
            machine.kvm.run(fd).send(None)
        except OSError as error:
            answers.append(error.errno)

    assert [22, 25, 9] == answers


# -- the run area


def test_the_run_area() -> None:
    """Writable, of the length asked for; every mapping is the same memory."""
    vcpu = Arm(gic=False).vcpus[0]
    view = vcpu.run_area
    view[100] = 7

    assert (8192, False, 7) == (len(view), view.readonly, vcpu.run_area[100])


def test_the_run_area_outlives_the_fd() -> None:
    """Closing the fd while a view lives is allowed."""
    machine = Arm(gic=False)
    view = machine.vcpus[0].run_area
    machine.vcpus[0].close()
    machine.vm.close()
    view[0] = 1

    assert 1 == view[0]


def test_what_cannot_be_mapped() -> None:
    """Other fds are ENODEV; offsets within a page, no length, and what is beyond the area EINVAL."""
    machine = Arm()
    mmap = machine.kvm.mmap

    assert ["ENODEV"] * 3 == [outcome(mmap, fd, 4096) for fd in (machine.host.fd, machine.vm.fd, machine.gic.fd)]
    fd = machine.vcpus[0].fd
    assert ["EINVAL"] * 4 == [outcome(mmap, fd, *arguments) for arguments in ((4096, 100), (0,), (8193,), (8192, 4096))]
    assert 4096 == len(mmap(fd, 4096, 4096))


def test_load_comes_before_the_first_run() -> None:
    """Afterwards it is EBUSY; and a program is a function."""

    async def main() -> Any:
        machine = Arm()
        vcpu = machine.vcpus[0]
        with pytest.raises(TypeError):
            vcpu.load(None)  # type: ignore[arg-type]
        vcpu.load(one_load)
        await vcpu.run()
        return outcome(vcpu.load, one_load)

    assert "EBUSY" == fabric.run(main)


# -- the timer's interrupt


def test_the_virtual_timer_reaches_the_guest() -> None:
    """Its PPI 27 becomes pending when the counter reaches the compare value, and userspace cannot drive it."""

    async def main() -> list[Any]:
        machine = Arm()
        machine.set_gicd(0, 2)
        machine.set_sysreg(0xC230, 0xF0)
        machine.set_sysreg(0xC667, 1)
        machine.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, 0x1_0100, 1 << 27)
        log: list[Any] = []

        async def guest(cpu: Any) -> None:
            await cpu.msr("CNTV_CVAL_EL0", await cpu.mrs("CNTVCT_EL0") + 100)
            await cpu.msr("CNTV_CTL_EL0", 1)
            await cpu.wait_for_interrupt()
            log.extend((fabric.now(), await cpu.mrs("ICC_IAR1_EL1")))
            await cpu.msr("CNTV_CTL_EL0", 0)
            await cpu.msr("ICC_EOIR1_EL1", 27)
            await cpu.store(0x1000, 4, 0)

        machine.vcpus[0].load(guest)
        await machine.vcpus[0].run()
        machine.vm.irq_line(arm.irq_line(arm.KVM_ARM_IRQ_TYPE_PPI, 27), 1)
        return [*log, machine.ledger.raised]

    assert [1600, 27, 1] == fabric.run(main)
