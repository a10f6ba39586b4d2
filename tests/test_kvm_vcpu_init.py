"""KVM_ARM_VCPU_INIT and KVM_GET/SET_ONE_REG of arm64 vCPUs, by the rows of the interface inventory."""

from __future__ import annotations

from typing import Any

import pytest
from kvm_machine import GICD, GICR, Arm, outcome

from fabric.kvm.typed import VcpuFd
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

PMU, SVE = arm.KVM_ARM_VCPU_PMU_V3, arm.KVM_ARM_VCPU_SVE
SCTLR_LIKE = arm.arm64_sys_reg(3, 7, 15, 15, 7)
"""A system register that nobody has."""


def run(vcpu: VcpuFd) -> Any:
    """KVM_RUN with immediate_exit: EINTR when the first-run checks pass."""
    vcpu.run_area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1
    return outcome(vcpu.ioctl, requests.KVM_RUN)


@pytest.mark.spec("api.arm-vcpu-init", "api.arm-vcpu-init.rule.needed", "api.arm-vcpu-init.EFAULT.struct")
def test_a_vcpu_is_initialised_before_it_runs() -> None:
    """KVM_RUN is ENOEXEC until then; a struct that cannot be read changes nothing; it resets the vCPU."""
    vcpu = Arm(0, gic=False).vm.create_vcpu(0)
    init = bytearray(arm.KvmVcpuInit(arm.KVM_ARM_TARGET_GENERIC_V8).pack())

    assert ["EFAULT", "EFAULT"] == [outcome(vcpu.ioctl, requests.KVM_ARM_VCPU_INIT, arg) for arg in (init[:-1], 8)]
    assert "ENOEXEC" == run(vcpu)
    vcpu.ioctl(requests.KVM_ARM_VCPU_INIT, init)
    assert "EINTR" == run(vcpu)

    x0 = arm.arm64_core_reg(0)
    vcpu.set_reg(x0, 5)
    vcpu.ioctl(requests.KVM_ARM_VCPU_INIT, init)
    assert 0 == vcpu.get_reg(x0)


@pytest.mark.spec("api.arm-vcpu-init.rule.pmu")
@pytest.mark.parametrize(("pmu_ids", "answer"), [((8,), None), ((), "EINVAL")])
def test_the_pmu_feature_needs_a_pmu(pmu_ids: tuple[int, ...], answer: str | None) -> None:
    """Where KVM_CAP_ARM_PMU_V3 is 0 the feature is EINVAL."""
    machine = Arm(0, gic=False, pmu_ids=pmu_ids)
    vcpu = machine.vm.create_vcpu(0)

    assert int(answer is None) == machine.host.check_extension(uapi.KVM_CAP_ARM_PMU_V3)
    assert answer == outcome(vcpu.init, [PMU])


@pytest.mark.spec("api.arm-vcpu-init.rule.all-vcpus-first")
def test_vcpus_should_all_be_there_first() -> None:
    """Nothing enforces it. But what an initialised vCPU was told does not count for one that comes later."""
    machine = Arm(1, init=False)
    machine.vcpus[0].set_attr(arm.KVM_ARM_VCPU_TIMER_CTRL, arm.KVM_ARM_VCPU_TIMER_IRQ_VTIMER, 20)
    later = machine.vm.create_vcpu(1)
    later.init()

    assert [20, 27] == [vcpu.get_attr(1, 0, 4) for vcpu in (machine.vcpus[0], later)]


@pytest.mark.spec("api.run.rule.hooks")
def test_the_first_run_asks_gic_timers_and_pmu() -> None:
    """Each on its own keeps a vCPU from running: a GIC without addresses, timers on one PPI, a PMU not initialised."""
    unplaced = Arm(1, gic=False)
    unplaced.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V3).set_attr(4, 0)
    timers = Arm()
    timers.vcpus[0].set_attr(arm.KVM_ARM_VCPU_TIMER_CTRL, arm.KVM_ARM_VCPU_TIMER_IRQ_PTIMER, 27)
    pmu = Arm(0, gic=False).vm.create_vcpu(0)
    pmu.init([PMU])

    assert ["ENXIO", "EINVAL", "EINVAL"] == [run(vcpu) for vcpu in (unplaced.vcpus[0], timers.vcpus[0], pmu)]


# -- registers


@pytest.mark.spec("api.set-one-reg", "api.get-one-reg")
def test_a_register_is_read_as_written() -> None:
    """By its id, through the address in the struct."""
    machine = Arm(gic=False)
    place = machine.user.map(4096)
    machine.user.write(place, (0x1234).to_bytes(8, "little"))
    reg = uapi.KvmOneReg(arm.arm64_core_reg(256), place)

    assert 0 == machine.vcpus[0].ioctl(requests.KVM_SET_ONE_REG, reg)
    machine.user.write(place, bytes(8))
    assert 0 == machine.vcpus[0].ioctl(requests.KVM_GET_ONE_REG, reg)
    assert 0x1234 == int.from_bytes(machine.user.read(place, 8), "little")


@pytest.mark.spec(
    "api.set-one-reg.ENOENT.unknown",
    "api.set-one-reg.EINVAL.invalid",
    "api.get-one-reg.ENOENT.unknown",
    "api.get-one-reg.EINVAL.invalid",
    "api.set-one-reg.note.order",
)
@pytest.mark.parametrize("request_", [requests.KVM_SET_ONE_REG, requests.KVM_GET_ONE_REG])
def test_ids_that_name_no_register(request_: int) -> None:
    """ENOENT for one of the right form, EINVAL for another architecture's and for a core register of the wrong size;
    before EFAULT of the value, but that a system register's value is read before its id is looked up; and after
    ENOEXEC of a vCPU that is not initialised."""
    machine = Arm(gic=False)
    fresh = machine.vm.create_vcpu(1)

    def answer(vcpu: VcpuFd, reg: int) -> Any:
        return outcome(vcpu.ioctl, request_, uapi.KvmOneReg(reg, 8))

    cases = {
        SCTLR_LIKE: "EFAULT" if request_ == requests.KVM_SET_ONE_REG else "ENOENT",
        uapi.KVM_REG_X86 | uapi.KVM_REG_SIZE_U64: "EINVAL",
        arm.arm64_core_reg(0, 4): "EINVAL",
        arm.arm64_core_reg(0): "EFAULT",
    }
    assert cases == {reg: answer(machine.vcpus[0], reg) for reg in cases}
    assert {"ENOEXEC"} == {answer(fresh, reg) for reg in cases}


@pytest.mark.spec("api.reg.ptimer-ctl", "api.reg.ptimer-cval", "api.reg.ptimer-cnt", "api.reg.ptimer-ctl.note.enoent")
@pytest.mark.parametrize("reg", [arm.KVM_REG_ARM_PTIMER_CTL, arm.KVM_REG_ARM_PTIMER_CVAL, arm.KVM_REG_ARM_PTIMER_CNT])
def test_the_physical_timer_has_ids_and_no_registers(reg: int) -> None:
    """The header has the three ids; Linux 6.1 answers ENOENT to them."""
    vcpu = Arm(gic=False).vcpus[0]

    assert ["ENOENT", "ENOENT"] == [outcome(vcpu.get_reg, reg), outcome(vcpu.set_reg, reg, 1)]


@pytest.mark.spec("vcpu.first-run.EINVAL.pmu-irq")
def test_a_pmu_without_an_interrupt_for_the_gic() -> None:
    """One that was initialised before there was a GIC has none, and then the first run is EINVAL; without a GIC not."""
    machine = Arm(0, gic=False)
    vcpu = machine.vm.create_vcpu(0)
    vcpu.init([PMU])
    vcpu.set_attr(arm.KVM_ARM_VCPU_PMU_V3_CTRL, arm.KVM_ARM_VCPU_PMU_V3_INIT)
    other = Arm(0, gic=False).vm.create_vcpu(0)
    other.init([PMU])
    other.set_attr(arm.KVM_ARM_VCPU_PMU_V3_CTRL, arm.KVM_ARM_VCPU_PMU_V3_INIT)

    gic = machine.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V3)
    gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_DIST, GICD)
    gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_REDIST, GICR)
    gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CTRL, arm.KVM_DEV_ARM_VGIC_CTRL_INIT)
    assert ["EINVAL", "EINTR"] == [run(vcpu), run(other)]


@pytest.mark.spec("api.set-one-reg.EPERM.not-finalised", "api.get-one-reg.EPERM.not-finalised")
def test_sve_registers_are_there_when_the_vcpu_is_finalised() -> None:
    """EPERM before; the vector lengths the other way round, as they are chosen before."""
    vcpu = Arm(0, gic=False).vm.create_vcpu(0)
    vcpu.init([SVE])
    z0, lengths = arm.KVM_REG_ARM64_SVE_ZREG_BASE, arm.KVM_REG_ARM64_SVE_VLS

    assert ["EPERM", "EPERM"] == [outcome(vcpu.get_reg, z0), outcome(vcpu.set_reg, z0, 1)]
    assert [0b11, None] == [outcome(vcpu.set_reg, lengths, 0b11) or vcpu.get_reg(lengths), outcome(finalize, vcpu)]
    assert [0, None, 1] == [vcpu.get_reg(z0), outcome(vcpu.set_reg, z0, 1), vcpu.get_reg(z0)]
    assert "EPERM" == outcome(vcpu.set_reg, lengths, 0b1)


def finalize(vcpu: VcpuFd) -> None:
    """KVM_ARM_VCPU_FINALIZE of SVE."""
    vcpu.ioctl(requests.KVM_ARM_VCPU_FINALIZE, bytearray(SVE.to_bytes(4, "little")))
