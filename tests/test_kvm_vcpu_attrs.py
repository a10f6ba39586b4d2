"""Errors of the arm64 vCPU attributes, one row of the interface inventory a case."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from kvm_machine import RAM, RAM_SIZE, Arm, outcome

from fabric.kvm.arm64_attrs import VCPU_ATTRIBUTES
from fabric.kvm.typed import VcpuFd
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

PMU, TIMER, PVTIME = arm.KVM_ARM_VCPU_PMU_V3_CTRL, arm.KVM_ARM_VCPU_TIMER_CTRL, arm.KVM_ARM_VCPU_PVTIME_CTRL
IRQ, INIT, FILTER, SET_PMU = 0, 1, 2, 3
FEATURE = [arm.KVM_ARM_VCPU_PMU_V3]


class PmuMachine(Arm):
    """Two vCPUs with the PMU feature."""

    def __init__(self, *, gic: bool = True, init: bool = True) -> None:
        super().__init__(0, gic=gic, init=False, memory=True)
        self.vcpus = [self.vm.create_vcpu(n) for n in range(2)]
        for vcpu in self.vcpus:
            vcpu.init(FEATURE)
        if gic and init:
            self.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CTRL, arm.KVM_DEV_ARM_VGIC_CTRL_INIT)


def fault(vcpu: VcpuFd, group: int, attr: int, request: int = requests.KVM_SET_DEVICE_ATTR) -> Any:
    """An attribute call whose value is nowhere."""
    return vcpu.ioctl(request, uapi.KvmDeviceAttr(0, group, attr, 8))


def case(mark: pytest.MarkDecorator, make: Callable[[], Arm], *calls: Callable[[Arm, VcpuFd, VcpuFd], Any]) -> Any:
    """The last call gives the errno that the row's id names; those before it succeed."""
    row = mark.args[0]
    return pytest.param(make, calls, row.split(".")[-2], id=row, marks=mark)


def set_(group: int, attr: int, value: Any = 0, other: bool = False) -> Callable[[Arm, VcpuFd, VcpuFd], Any]:
    return lambda machine, one, two: (two if other else one).set_attr(group, attr, value)


def get(group: int, attr: int) -> Callable[[Arm, VcpuFd, VcpuFd], Any]:
    return lambda machine, one, two: one.get_attr(group, attr, 4)


def bad(group: int, attr: int, request: int = requests.KVM_SET_DEVICE_ATTR) -> Callable[[Arm, VcpuFd, VcpuFd], Any]:
    return lambda machine, one, two: fault(one, group, attr, request)


def no_pmu() -> Arm:
    return Arm(2)


def no_gic() -> Arm:
    return PmuMachine(gic=False)


def uninitialised() -> Arm:
    return PmuMachine(init=False)


def pmu() -> Arm:
    return PmuMachine()


def memory() -> Arm:
    return Arm(2, memory=True)


ALLOW = arm.KvmPmuEventFilter(0x11, 1, arm.KVM_PMU_EVENT_ALLOW)
READ = requests.KVM_GET_DEVICE_ATTR

CASES = [
    case(pytest.mark.spec("vcpu.pmu.irq.ENODEV.no-feature"), no_pmu, set_(PMU, IRQ, 23)),
    case(pytest.mark.spec("vcpu.pmu.irq.EINVAL.no-irqchip"), no_gic, set_(PMU, IRQ, 23)),
    case(pytest.mark.spec("vcpu.pmu.irq.EFAULT.user-ptr"), pmu, bad(PMU, IRQ)),
    case(pytest.mark.spec("vcpu.pmu.irq.EINVAL.number"), pmu, set_(PMU, IRQ, 15)),
    case(pytest.mark.spec("vcpu.pmu.irq.EINVAL.conflict"), pmu, set_(PMU, IRQ, 23), set_(PMU, IRQ, 24, other=True)),
    case(pytest.mark.spec("vcpu.pmu.irq.EBUSY.already-set"), pmu, set_(PMU, IRQ, 23), set_(PMU, IRQ, 23)),
    case(
        pytest.mark.spec("vcpu.pmu.irq.EBUSY.initialised"), pmu, set_(PMU, IRQ, 23), set_(PMU, INIT), set_(PMU, IRQ, 15)
    ),
    case(pytest.mark.spec("vcpu.pmu.irq.ENXIO.not-set"), pmu, get(PMU, IRQ)),
    case(pytest.mark.spec("vcpu.pmu.init.ENODEV.unsupported"), no_pmu, set_(PMU, INIT)),
    case(pytest.mark.spec("vcpu.pmu.init.EBUSY.initialised"), no_gic, set_(PMU, INIT), set_(PMU, INIT)),
    case(
        pytest.mark.spec("vcpu.pmu.init.ENODEV.gic-not-initialised"), uninitialised, set_(PMU, IRQ, 23), set_(PMU, INIT)
    ),
    case(pytest.mark.spec("vcpu.pmu.init.ENXIO.irq-not-set"), pmu, set_(PMU, INIT)),
    case(pytest.mark.spec("vcpu.pmu.init.EINVAL.irq-range"), pmu, set_(PMU, IRQ, 900), set_(PMU, INIT)),
    case(pytest.mark.spec("vcpu.pmu.init.ENXIO.read"), pmu, get(PMU, INIT)),
    case(pytest.mark.spec("vcpu.pmu.filter.ENODEV.no-feature"), no_pmu, set_(PMU, FILTER, ALLOW)),
    case(pytest.mark.spec("vcpu.pmu.filter.EBUSY.initialised"), no_gic, set_(PMU, INIT), set_(PMU, FILTER, ALLOW)),
    case(pytest.mark.spec("vcpu.pmu.filter.EFAULT.user-ptr"), pmu, bad(PMU, FILTER)),
    case(pytest.mark.spec("vcpu.pmu.filter.EINVAL.range"), pmu, set_(PMU, FILTER, arm.KvmPmuEventFilter(0xFFFF, 2))),
    case(pytest.mark.spec("vcpu.pmu.filter.EINVAL.action"), pmu, set_(PMU, FILTER, arm.KvmPmuEventFilter(0x11, 1, 2))),
    case(pytest.mark.spec("vcpu.pmu.filter.ENXIO.read"), pmu, get(PMU, FILTER)),
    case(pytest.mark.spec("vcpu.pmu.set-pmu.ENODEV.no-feature"), no_pmu, set_(PMU, SET_PMU, 8)),
    case(pytest.mark.spec("vcpu.pmu.set-pmu.EBUSY.initialised"), no_gic, set_(PMU, INIT), set_(PMU, SET_PMU, 8)),
    case(pytest.mark.spec("vcpu.pmu.set-pmu.EFAULT.user-ptr"), pmu, bad(PMU, SET_PMU)),
    case(pytest.mark.spec("vcpu.pmu.set-pmu.ENXIO.unknown"), pmu, set_(PMU, SET_PMU, 7)),
    case(pytest.mark.spec("vcpu.pmu.set-pmu.ENXIO.read"), pmu, get(PMU, SET_PMU)),
    case(pytest.mark.spec("vcpu.timer.vtimer.EINVAL.no-irqchip"), no_gic, bad(TIMER, 0)),
    case(pytest.mark.spec("vcpu.timer.vtimer.EFAULT.user-ptr"), pmu, bad(TIMER, 0, READ)),
    case(pytest.mark.spec("vcpu.timer.vtimer.EINVAL.not-ppi"), pmu, set_(TIMER, 0, 32)),
    case(pytest.mark.spec("vcpu.timer.ptimer.EINVAL.no-irqchip"), no_gic, set_(TIMER, 1, 20)),
    case(pytest.mark.spec("vcpu.timer.ptimer.EFAULT.user-ptr"), pmu, bad(TIMER, 1)),
    case(pytest.mark.spec("vcpu.timer.ptimer.EINVAL.not-ppi"), pmu, set_(TIMER, 1, 15)),
    case(pytest.mark.spec("vcpu.pvtime.ipa.EFAULT.user-ptr"), memory, bad(PVTIME, 0)),
    case(pytest.mark.spec("vcpu.pvtime.ipa.EINVAL.align"), memory, set_(PVTIME, 0, RAM + 32)),
    case(
        pytest.mark.spec("vcpu.pvtime.ipa.EEXIST.already-set"), memory, set_(PVTIME, 0, RAM), set_(PVTIME, 0, RAM + 64)
    ),
    case(pytest.mark.spec("vcpu.pvtime.ipa.EINVAL.no-slot"), memory, set_(PVTIME, 0, RAM + RAM_SIZE)),
]


@pytest.mark.parametrize(("make", "calls", "name"), CASES)
def test_an_error_of_an_attribute(
    make: Callable[[], Arm], calls: tuple[Callable[[Arm, VcpuFd, VcpuFd], Any], ...], name: str
) -> None:
    """The row's errno, in the state that it names."""
    machine = make()
    *before, last = calls

    assert [0] * len(before) == [outcome(call, machine, *machine.vcpus[:2]) for call in before]
    assert name == outcome(last, machine, *machine.vcpus[:2])


@pytest.mark.spec(
    "api.set-device-attr.EFAULT.struct", "api.get-device-attr.EFAULT.struct", "api.has-device-attr.EFAULT.struct"
)
@pytest.mark.parametrize("request_", [requests.KVM_SET_DEVICE_ATTR, READ, requests.KVM_HAS_DEVICE_ATTR])
def test_an_attribute_struct_that_cannot_be_read(request_: int) -> None:
    """EFAULT on vCPU and device fds."""
    machine = Arm()

    for fd in (machine.vcpus[0], machine.gic):
        assert ["EFAULT", "EFAULT"] == [outcome(fd.ioctl, request_, arg) for arg in (bytearray(23), 8)]


@pytest.mark.spec("vcpu.pmu.irq.note.has")
def test_whether_an_attribute_is_there() -> None:
    """The PMU's with its feature only; the value's address is not looked at."""
    without, with_ = no_pmu().vcpus[0], pmu().vcpus[0]

    assert [False] * 5 == [without.has_attr(PMU, attr) for attr in range(5)]
    assert [True] * 4 + [False] == [with_.has_attr(PMU, attr) for attr in range(5)]
    assert [True, True, False] == [without.has_attr(TIMER, attr) for attr in range(3)]
    assert 0 == fault(with_, PMU, IRQ, requests.KVM_HAS_DEVICE_ATTR)


@pytest.mark.spec("vcpu.pvtime.ipa.rule.unset-read")
def test_stolen_time_reads_all_ones_before_it_is_set() -> None:
    """Then the address."""
    vcpu = memory().vcpus[0]
    before = vcpu.get_attr(PVTIME, 0)
    vcpu.set_attr(PVTIME, 0, RAM + 64)

    assert ((1 << 64) - 1, RAM + 64) == (before, vcpu.get_attr(PVTIME, 0))


# -- what the text says otherwise than the kernel does


@pytest.mark.spec("vcpu.pmu.irq.ENXIO.unsupported", "vcpu.pmu.init.ENXIO.no-feature")
@pytest.mark.parametrize("options", [{"pmu_ids": ()}, {}], ids=["a host without PMU", "a vCPU without the feature"])
def test_where_there_is_no_pmu(options: dict[str, Any]) -> None:
    """The text has ENXIO; it is ENODEV for set and get, and ENXIO only for has. A get looks for a GIC first."""
    vcpu = Arm(2, **options).vcpus[0]

    for attr in (IRQ, INIT, FILTER, SET_PMU):
        assert "ENODEV" == outcome(vcpu.set_attr, PMU, attr, 23)
        assert "ENXIO" == outcome(vcpu.ioctl, requests.KVM_HAS_DEVICE_ATTR, uapi.KvmDeviceAttr(0, PMU, attr, 0))
    assert "ENODEV" == outcome(vcpu.get_attr, PMU, IRQ, 4)
    assert "EINVAL" == outcome(Arm(gic=False, **options).vcpus[0].get_attr, PMU, IRQ, 4)


@pytest.mark.spec("vcpu.pmu.irq.note.ebusy-einval", "vcpu.pmu.irq.EINVAL.conflict", "vcpu.pmu.irq.EBUSY.already-set")
@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        pytest.param(23, 23, "EBUSY", id="the same PPI"),
        pytest.param(23, 24, "EINVAL", id="another PPI"),
        pytest.param(23, 40, "EBUSY", id="an SPI after a PPI"),
        pytest.param(40, 40, "EINVAL", id="the same SPI"),
        pytest.param(40, 41, "EBUSY", id="another SPI"),
        pytest.param(40, 23, "EINVAL", id="a PPI after an SPI"),
    ],
)
def test_a_second_interrupt(first: int, second: int, name: str) -> None:
    """Whether the number goes with those that vCPUs have is asked first, this vCPU's own among them."""
    vcpu = pmu().vcpus[0]
    vcpu.set_attr(PMU, IRQ, first)

    assert name == outcome(vcpu.set_attr, PMU, IRQ, second)
    assert first == vcpu.get_attr(PMU, IRQ, 4)


@pytest.mark.spec(
    "vcpu.pmu.filter.ENODEV.gic-not-initialised",
    "vcpu.pmu.filter.ENXIO.not-configured",
    "vcpu.pmu.set-pmu.ENODEV.gic-not-initialised",
)
@pytest.mark.parametrize("make", [no_gic, uninitialised, pmu])
@pytest.mark.parametrize("irq", [False, True], ids=["without an interrupt", "with an interrupt"])
def test_filter_and_choice_need_no_gic(make: Callable[[], Arm], irq: bool) -> None:
    """Neither looks at the GIC or at the interrupt: errors that the text has for those cannot be had."""
    vcpu = make().vcpus[0]
    if irq and make is not no_gic:
        vcpu.set_attr(PMU, IRQ, 23)

    assert [0, 0] == [outcome(vcpu.set_attr, PMU, SET_PMU, 8), outcome(vcpu.set_attr, PMU, FILTER, ALLOW)]


@pytest.mark.spec("vcpu.pmu.set-pmu.ENOMEM.alloc")
def test_choosing_a_pmu_needs_no_memory() -> None:
    """It is a number that is kept: its row lists no ENOMEM, as that of a filter does."""
    row = VCPU_ATTRIBUTES.find(PMU, SET_PMU)

    assert row is not None
    assert errno.ENOMEM not in row.errors
    assert errno.ENOMEM in getattr(VCPU_ATTRIBUTES.find(PMU, FILTER), "errors", ())
    assert 0 == outcome(pmu().vcpus[0].set_attr, PMU, SET_PMU, 8)
