"""The interrupts of an arm64 vCPU's timers (KVM_ARM_VCPU_TIMER_CTRL), and what the first KVM_RUN asks of them."""

from __future__ import annotations

from typing import Any

import pytest
from kvm_machine import Arm, outcome

from fabric.kvm.typed import VcpuFd
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

TIMER, VTIMER, PTIMER = (
    arm.KVM_ARM_VCPU_TIMER_CTRL,
    arm.KVM_ARM_VCPU_TIMER_IRQ_VTIMER,
    arm.KVM_ARM_VCPU_TIMER_IRQ_PTIMER,
)
DEFAULTS = {VTIMER: 27, PTIMER: 30}


def run(vcpu: VcpuFd) -> Any:
    """KVM_RUN with immediate_exit: EINTR when the first-run checks pass."""
    vcpu.run_area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1
    return outcome(vcpu.ioctl, requests.KVM_RUN)


@pytest.mark.parametrize(
    "timer",
    [
        pytest.param(VTIMER, marks=pytest.mark.spec("vcpu.timer.vtimer"), id="virtual"),
        pytest.param(PTIMER, marks=pytest.mark.spec("vcpu.timer.ptimer"), id="physical"),
    ],
)
def test_an_interrupt_can_be_chosen_among_the_ppis(timer: int) -> None:
    """It starts as 27 or 30, and is 16 to 31; what was set last counts."""
    vcpu = Arm().vcpus[0]

    assert (True, DEFAULTS[timer]) == (vcpu.has_attr(TIMER, timer), vcpu.get_attr(TIMER, timer, 4))
    for intid in range(16, 32):
        vcpu.set_attr(TIMER, timer, intid)
        assert intid == vcpu.get_attr(TIMER, timer, 4)
    for intid in (15, 32, 0, 1 << 31, 0xFFFF_FFFF):
        assert "EINVAL" == outcome(vcpu.set_attr, TIMER, timer, intid)


@pytest.mark.parametrize(
    "timer",
    [
        pytest.param(
            VTIMER,
            marks=pytest.mark.spec("vcpu.timer.vtimer.rule.all-vcpus", "vcpu.timer.vtimer.rule.later-vcpus"),
            id="virtual",
        ),
        pytest.param(
            PTIMER,
            marks=pytest.mark.spec("vcpu.timer.ptimer.rule.all-vcpus", "vcpu.timer.ptimer.rule.later-vcpus"),
            id="physical",
        ),
    ],
)
@pytest.mark.spec("vcpu.first-run.EINVAL.timer-mismatch")
def test_a_set_counts_for_the_vcpus_there_are(timer: int) -> None:
    """It overwrites what they had. A later vCPU has the default; then nobody runs until all agree."""
    machine = Arm(2, init=False)
    machine.vcpus[0].set_attr(TIMER, timer, 21)
    machine.vcpus[1].set_attr(TIMER, timer, 20)
    later = machine.vm.create_vcpu(2)
    later.init()
    machine.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CTRL, arm.KVM_DEV_ARM_VGIC_CTRL_INIT)
    vcpus = [*machine.vcpus, later]

    assert [20, 20, DEFAULTS[timer]] == [vcpu.get_attr(TIMER, timer, 4) for vcpu in vcpus]
    assert ["EINVAL"] * 3 == [run(vcpu) for vcpu in vcpus]
    later.set_attr(TIMER, timer, 22)
    assert ["EINTR"] * 3 == [run(vcpu) for vcpu in vcpus]


@pytest.mark.parametrize(
    ("timer", "other"),
    [
        pytest.param(VTIMER, PTIMER, marks=pytest.mark.spec("vcpu.timer.vtimer.rule.same-ppi"), id="virtual"),
        pytest.param(PTIMER, VTIMER, marks=pytest.mark.spec("vcpu.timer.ptimer.rule.same-ppi"), id="physical"),
    ],
)
@pytest.mark.spec("vcpu.first-run", "vcpu.first-run.EINVAL.timer-same")
def test_one_interrupt_for_both_timers(timer: int, other: int) -> None:
    """It is taken, and keeps the vCPU from running."""
    vcpu = Arm().vcpus[0]

    assert 0 == outcome(vcpu.set_attr, TIMER, timer, DEFAULTS[other])
    assert "EINVAL" == run(vcpu)


@pytest.mark.parametrize(
    "timer",
    [
        pytest.param(
            VTIMER,
            marks=pytest.mark.spec("vcpu.timer.vtimer.EBUSY.has-run", "vcpu.timer.vtimer.note.ebusy-scope"),
            id="virtual",
        ),
        pytest.param(
            PTIMER,
            marks=pytest.mark.spec("vcpu.timer.ptimer.EBUSY.has-run", "vcpu.timer.ptimer.note.ebusy-scope"),
            id="physical",
        ),
    ],
)
def test_the_interrupt_of_a_vcpu_that_has_run(timer: int) -> None:
    """EBUSY, also for an attribute that there is not; not so on a vCPU that has not run, where the text has EBUSY."""
    machine = Arm(2)
    ran, fresh = machine.vcpus
    run(ran)

    assert ["EBUSY", "EBUSY"] == [outcome(ran.set_attr, TIMER, attr, 20) for attr in (timer, 2)]
    assert 0 == outcome(fresh.set_attr, TIMER, timer, 20)
    assert [20, 20] == [vcpu.get_attr(TIMER, timer, 4) for vcpu in machine.vcpus]


@pytest.mark.spec("vcpu.timer.vtimer.ENXIO.unknown", "vcpu.timer.ptimer.ENXIO.unknown", "vcpu.any")
def test_the_group_has_two_attributes() -> None:
    """Any other is ENXIO, a set when the number is a PPI; so are groups that there are not."""
    vcpu = Arm().vcpus[0]

    for attr in (2, 3, 1 << 63):
        assert ["ENXIO", "ENXIO", False] == [
            outcome(vcpu.set_attr, TIMER, attr, 20),
            outcome(vcpu.get_attr, TIMER, attr, 4),
            vcpu.has_attr(TIMER, attr),
        ]
    assert "EINVAL" == outcome(vcpu.set_attr, TIMER, 2, 5)
    for group in (3, 1 << 31):
        assert ["ENXIO", "ENXIO", False] == [
            outcome(vcpu.set_attr, group, 0, 20),
            outcome(vcpu.get_attr, group, 0, 4),
            vcpu.has_attr(group, 0),
        ]


@pytest.mark.spec("vcpu.timer.vtimer.EINVAL.no-irqchip", "vcpu.timer.ptimer.EINVAL.no-irqchip")
@pytest.mark.parametrize("timer", [VTIMER, PTIMER])
def test_without_a_gic_in_the_kernel(timer: int) -> None:
    """Setting is EINVAL, even of a value that cannot be read; the default can be got."""
    vcpu = Arm(gic=False).vcpus[0]

    assert "EINVAL" == outcome(vcpu.set_attr, TIMER, timer, 20)
    assert "EINVAL" == outcome(vcpu.ioctl, requests.KVM_SET_DEVICE_ATTR, uapi.KvmDeviceAttr(0, TIMER, timer, 8))
    assert DEFAULTS[timer] == vcpu.get_attr(TIMER, timer, 4)
