"""KVM_SET, GET and HAS_DEVICE_ATTR as calls, whatever the attribute: sizes, flags, and what is not there."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from kvm_machine import GICD, Arm, outcome

from fabric.devices.attributes import Attr, AttrTable, Group
from fabric.devices.registry import DEVICE_TYPES
from fabric.kvm.arm64_vcpu import ArmVcpuPart
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

SET, GET, HAS = requests.KVM_SET_DEVICE_ATTR, requests.KVM_GET_DEVICE_ATTR, requests.KVM_HAS_DEVICE_ATTR
ADDR, DIST_REGS, NR_IRQS, CTRL = 0, 1, 3, 4
TIMER, VTIMER = arm.KVM_ARM_VCPU_TIMER_CTRL, arm.KVM_ARM_VCPU_TIMER_IRQ_VTIMER


def call(fd: Any, request: int, group: int, attr: int, addr: int = 0, flags: int = 0) -> Any:
    """One of the three ioctls: its result, or the name of its errno."""
    return outcome(fd.ioctl, request, uapi.KvmDeviceAttr(flags, group, attr, addr))


@pytest.mark.spec("api.set-device-attr", "api.get-device-attr", "api.has-device-attr", "api.set-device-attr.note.vcpu")
def test_attributes_of_devices_and_vcpus() -> None:
    """Set, got and asked for through the address in the struct; the question does not look at the address."""
    machine = Arm(init=False)
    place = machine.user.map(4096)
    for fd, group, attr, value in ((machine.vcpus[0], TIMER, VTIMER, 20), (machine.gic, NR_IRQS, 0, 64)):
        machine.user.write(place, value.to_bytes(4, "little"))
        assert 0 == call(fd, SET, group, attr, place)
        machine.user.write(place, bytes(4))
        assert 0 == call(fd, GET, group, attr, place)
        assert value == int.from_bytes(machine.user.read(place, 4), "little")
        assert 0 == call(fd, HAS, group, attr, 8)


@pytest.mark.spec("api.set-device-attr.rule.size")
def test_an_attribute_has_a_size() -> None:
    """At the end of a page a 32-bit one is written and read where a 64-bit one is EFAULT."""
    machine = Arm()
    end = machine.user.map(4096) + 4096

    assert [0, 0] == [call(machine.gic, request, DIST_REGS, 0x104, end - 4) for request in (SET, GET)]
    assert ["EFAULT", "EFAULT"] == [call(machine.gic, request, ADDR, 2, end - 4) for request in (SET, GET)]
    assert 0 == call(machine.gic, GET, ADDR, 2, end - 8)
    assert GICD == int.from_bytes(machine.user.read(end - 8, 8), "little")


@pytest.mark.spec("api.set-device-attr.rule.flags")
@pytest.mark.parametrize("request_", [SET, GET, HAS])
def test_flags_are_not_looked_at(request_: int) -> None:
    """None are defined, and no device of arm64 checks the field."""
    machine = Arm()
    place = machine.user.map(4096)
    machine.user.write(place, (20).to_bytes(4, "little"))

    assert 0 == call(machine.vcpus[0], request_, TIMER, VTIMER, place, flags=0xFFFF_FFFF)
    assert 0 == call(machine.gic, request_, DIST_REGS, 0x104, place, flags=1)


@pytest.mark.spec(
    "api.set-device-attr.ENXIO.unknown", "api.get-device-attr.ENXIO.unknown", "api.has-device-attr.ENXIO.unknown"
)
@pytest.mark.parametrize("request_", [SET, GET, HAS])
def test_what_is_not_there(request_: int) -> None:
    """ENXIO: groups and attributes nobody has, and one whose support the host lacks."""
    machine = Arm(steal_time=False)
    place = machine.user.map(4096)
    machine.user.write(place, (20).to_bytes(8, "little"))

    for fd, group, attr in (
        (machine.gic, 99, 0),
        (machine.gic, ADDR, 99),
        (machine.gic, CTRL, 99),
        (machine.vcpus[0], 99, 0),
        (machine.vcpus[0], TIMER, 99),
        (machine.vcpus[0], arm.KVM_ARM_VCPU_PVTIME_CTRL, arm.KVM_ARM_VCPU_PVTIME_IPA),
    ):
        assert "ENXIO" == call(fd, request_, group, attr, place), (group, attr)


@pytest.mark.spec(
    "api.set-device-attr.EPERM.not-now", "api.get-device-attr.EPERM.not-now", "api.has-device-attr.rule.not-now"
)
def test_what_cannot_be_accessed_now() -> None:
    """Where the text has EPERM, devices say ENXIO for what can never be accessed so, and EBUSY for the wrong state;
    that an attribute is there says nothing about it."""
    machine = Arm(init=False)
    place = machine.user.map(4096)

    assert [0, "ENXIO"] == [call(machine.gic, request, CTRL, 0, place) for request in (HAS, GET)]
    assert [0, "EBUSY", "EBUSY"] == [call(machine.gic, request, DIST_REGS, 0, place) for request in (HAS, GET, SET)]

    machine.gic.set_attr(CTRL, 0)
    machine.user.write(place, (64).to_bytes(4, "little"))
    assert [0, "EBUSY"] == [call(machine.gic, request, NR_IRQS, 0, place) for request in (HAS, SET)]


@pytest.mark.spec("api.set-device-attr.EPERM.no-accessor", "api.has-device-attr.EPERM.no-accessor")
def test_no_device_is_without_a_way_to_write_or_to_ask() -> None:
    """EPERM is for a device that cannot be accessed in that direction at all. VFIO cannot be read; nothing lacks the
    other two."""
    tables = [cls.attributes for types in DEVICE_TYPES.values() for cls in types.values()] + [ArmVcpuPart.attributes]

    assert [errno.ENXIO] * 2 * len(tables) == [table.unknown[op] for table in tables for op in ("set", "has")]
    mute = AttrTable((), unknown_set=errno.EPERM, unknown_has=errno.EPERM)
    for op in ("set", "has"):
        assert "EPERM" == outcome(mute.dispatch, None, op, 0, 0, None)
    writable = AttrTable((Group(0, "G", (Attr("x", "X", number=0, set=lambda *_: 7),)),))
    assert 7 == writable.dispatch(None, "set", 0, 0, None)


@pytest.mark.spec(
    "api.set-device-attr.EINVAL.arm-vm", "api.get-device-attr.EINVAL.arm-vm", "api.has-device-attr.EINVAL.arm-vm"
)
@pytest.mark.parametrize("request_", [SET, GET, HAS])
def test_an_arm64_vm_has_no_attributes(request_: int) -> None:
    """Linux 6.1 does not know the calls on its VM fd, which is EINVAL there."""
    machine = Arm()

    assert "EINVAL" == call(machine.vm, request_, 0, 0, machine.host.values.addr)
    assert 0 == machine.host.check_extension(uapi.KVM_CAP_VM_ATTRIBUTES)


@pytest.mark.spec("vfio.any", "vfio.any.ENXIO.unknown", "vfio.any.EPERM.get", "vfio.create")
def test_the_device_that_cannot_be_read() -> None:
    """VFIO: EPERM for whatever is to be read, known or not; ENXIO for what it does not know otherwise."""
    machine = Arm(gic=False)
    vfio = machine.vm.create_device(uapi.KVM_DEV_TYPE_VFIO)

    for group, attr in ((1, 0), (1, 99), (0, 1), (99, 1)):
        assert ["ENXIO", "EPERM", "ENXIO"] == [call(vfio, request, group, attr) for request in (SET, GET, HAS)]
    assert ["EPERM", 0] == [call(vfio, request, 1, 1) for request in (GET, HAS)]
