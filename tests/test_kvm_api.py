"""The interface as a whole: its numbers, how calls answer, and the capabilities of an arm64 host."""

from __future__ import annotations

import errno
import importlib
import tomllib
from importlib.resources import files
from typing import Any

import pytest
from kvm_machine import Arm, outcome

from fabric.kvm import Kvm
from fabric.kvm.typed import Host
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

INVENTORY: dict[str, Any] = {
    file.name: tomllib.loads(file.read_text(encoding="utf-8"))
    for file in files("fabric.conformance").joinpath("inventory").iterdir()
    if file.name.endswith(".toml")
}
NUMBERS = {"ioctl": "request", "capability": "number", "exit_reason": "value", "reg": "reg_id"}
HEADERS: dict[str, Any] = {}
for _module in ("ioctl", "kvm", "arm64", "x86", "ppc", "s390", "mips"):
    HEADERS |= vars(importlib.import_module(f"fabric.uapi.{_module}"))


@pytest.mark.spec("api")
@pytest.mark.parametrize("table", NUMBERS)
def test_numbers_are_those_of_the_inventory(table: str) -> None:
    """Requests, capabilities, exits and register ids, each under its C name."""
    rows = {row["name"]: row[NUMBERS[table]] for row in INVENTORY["api.toml"][table]}

    assert rows == {name: HEADERS.get(name) for name in rows}


@pytest.mark.parametrize("file", ["api.toml", "vcpu.toml", "vfio.toml", "arm-vgic-v2.toml", "layouts.toml"])
def test_constants_are_those_of_the_inventory(file: str) -> None:
    """As in the headers, which have all of these."""
    rows = {row["name"]: row["value"] for row in INVENTORY[file]["constant"]}
    values = {name: int(value, 0) if isinstance(value, str) else value for name, value in rows.items()}

    assert values == {name: HEADERS.get(name) for name in values}


@pytest.mark.spec("api.all.return-style")
def test_an_error_is_an_exception_with_the_errno() -> None:
    """Where C sees -1 and errno, Python sees an OSError whose errno is positive; all else is a result from 0 up."""
    machine = Arm(gic=False)

    with pytest.raises(OSError, match="vCPU id") as refused:
        machine.vm.create_vcpu(512)
    assert errno.EINVAL == refused.value.errno
    assert 0 == machine.vm.ioctl(requests.KVM_SET_GSI_ROUTING, bytearray(8))
    assert 12 == machine.host.api_version()


@pytest.mark.spec(
    "api.enable-cap.note.same-number", "api.get-one-reg.note.same-number", "api.get-device-attr.note.direction"
)
def test_requests_that_share_a_number() -> None:
    """Direction and size tell KVM_ENABLE_CAP from KVM_GET_TSC_KHZ; KVM_GET_ONE_REG from KVM_ARM_SET_DEVICE_ADDR
    nothing but the fd. KVM_GET_DEVICE_ATTR is "the caller writes": the struct, which points to the value."""
    number, direction = 0xFF, 30
    assert requests.KVM_ENABLE_CAP & number == requests.KVM_GET_TSC_KHZ & number
    assert requests.KVM_ENABLE_CAP != requests.KVM_GET_TSC_KHZ
    assert requests.IOC_WRITE == requests.KVM_GET_DEVICE_ATTR >> direction
    assert requests.KVM_GET_ONE_REG == requests.KVM_ARM_SET_DEVICE_ADDR

    machine = Arm(gic=False)
    register = uapi.KvmOneReg(arm.KVM_REG_ARM_MPIDR_EL1, machine.host.values.addr)
    assert 0 == outcome(machine.vcpus[0].ioctl, requests.KVM_GET_ONE_REG, register)
    assert "ENODEV" == outcome(machine.vm.ioctl, requests.KVM_GET_ONE_REG, register)
    assert "EINVAL" == outcome(machine.vm.ioctl, requests.KVM_GET_TSC_KHZ)


# -- capabilities


def cap(mark: pytest.MarkDecorator, number: int, value: int) -> Any:
    return pytest.param(number, value, id=mark.args[0], marks=mark)


@pytest.mark.parametrize(
    ("number", "value"),
    [
        cap(pytest.mark.spec("api.cap.irqchip"), uapi.KVM_CAP_IRQCHIP, 1),
        cap(pytest.mark.spec("api.cap.user-memory"), uapi.KVM_CAP_USER_MEMORY, 1),
        cap(pytest.mark.spec("api.cap.nr-vcpus"), uapi.KVM_CAP_NR_VCPUS, 2),
        cap(pytest.mark.spec("api.cap.nr-memslots"), uapi.KVM_CAP_NR_MEMSLOTS, 32767),
        cap(pytest.mark.spec("api.cap.irq-routing"), uapi.KVM_CAP_IRQ_ROUTING, 4096),
        cap(pytest.mark.spec("api.cap.irqfd"), uapi.KVM_CAP_IRQFD, 1),
        cap(pytest.mark.spec("api.cap.ioeventfd"), uapi.KVM_CAP_IOEVENTFD, 1),
        cap(pytest.mark.spec("api.cap.max-vcpus"), uapi.KVM_CAP_MAX_VCPUS, 512),
        cap(pytest.mark.spec("api.cap.one-reg"), uapi.KVM_CAP_ONE_REG, 1),
        cap(pytest.mark.spec("api.cap.signal-msi"), uapi.KVM_CAP_SIGNAL_MSI, 1),
        cap(pytest.mark.spec("api.cap.readonly-mem"), uapi.KVM_CAP_READONLY_MEM, 1),
        cap(pytest.mark.spec("api.cap.irqfd-resample"), uapi.KVM_CAP_IRQFD_RESAMPLE, 1),
        cap(pytest.mark.spec("api.cap.arm-set-device-addr"), uapi.KVM_CAP_ARM_SET_DEVICE_ADDR, 1),
        cap(pytest.mark.spec("api.cap.device-ctrl"), uapi.KVM_CAP_DEVICE_CTRL, 1),
        cap(pytest.mark.spec("api.cap.enable-cap-vm"), uapi.KVM_CAP_ENABLE_CAP_VM, 1),
        cap(pytest.mark.spec("api.cap.check-extension-vm"), uapi.KVM_CAP_CHECK_EXTENSION_VM, 1),
        cap(pytest.mark.spec("api.cap.ioeventfd-any-length"), uapi.KVM_CAP_IOEVENTFD_ANY_LENGTH, 1),
        cap(pytest.mark.spec("api.cap.arm-pmu-v3"), uapi.KVM_CAP_ARM_PMU_V3, 1),
        cap(pytest.mark.spec("api.cap.vcpu-attributes"), uapi.KVM_CAP_VCPU_ATTRIBUTES, 1),
        cap(pytest.mark.spec("api.cap.max-vcpu-id"), uapi.KVM_CAP_MAX_VCPU_ID, 512),
        cap(pytest.mark.spec("api.cap.immediate-exit"), uapi.KVM_CAP_IMMEDIATE_EXIT, 1),
        cap(pytest.mark.spec("api.cap.arm-user-irq"), uapi.KVM_CAP_ARM_USER_IRQ, 1),
        cap(pytest.mark.spec("api.cap.arm-vm-ipa-size"), uapi.KVM_CAP_ARM_VM_IPA_SIZE, 48),
        cap(pytest.mark.spec("api.cap.manual-dirty-log"), uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3),
        cap(pytest.mark.spec("api.cap.arm-irq-line-layout-2"), uapi.KVM_CAP_ARM_IRQ_LINE_LAYOUT_2, 1),
        cap(pytest.mark.spec("api.cap.steal-time"), uapi.KVM_CAP_STEAL_TIME, 1),
    ],
)
def test_a_capability_of_arm64(number: int, value: int) -> None:
    """What KVM_CHECK_EXTENSION says on the system fd, and on a VM fd before anything was created."""
    machine = Arm(0, gic=False)

    assert (value, value) == (machine.host.check_extension(number), machine.vm.check_extension(number))


@pytest.mark.parametrize(
    ("number", "value"),
    [
        cap(pytest.mark.spec("api.cap.irq-inject-status"), uapi.KVM_CAP_IRQ_INJECT_STATUS, 0),
        cap(pytest.mark.spec("api.cap.enable-cap"), uapi.KVM_CAP_ENABLE_CAP, 0),
        cap(pytest.mark.spec("api.cap.ioeventfd-no-length"), uapi.KVM_CAP_IOEVENTFD_NO_LENGTH, 0),
    ],
)
def test_a_capability_that_is_zero_on_arm64(number: int, value: int) -> None:
    """Other architectures say 1. KVM_IRQ_LINE_STATUS and ioeventfds of any length are there all the same; no
    capability of a vCPU can be enabled."""
    machine = Arm()

    assert (value, value) == (machine.host.check_extension(number), machine.vm.check_extension(number))
    status = uapi.KvmIrqLevel(arm.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI, 40), 1)
    assert 0 == outcome(machine.vm.ioctl, requests.KVM_IRQ_LINE_STATUS, status)
    assert None is outcome(machine.vm.ioeventfd, machine.kvm.eventfd(), 0x1000, 0)
    enable = uapi.KvmEnableCap(uapi.KVM_CAP_HALT_POLL)
    assert "EINVAL" == outcome(machine.vcpus[0].ioctl, requests.KVM_ENABLE_CAP, enable)


@pytest.mark.spec(
    "api.cap.nr-vcpus", "api.cap.arm-pmu-v3", "api.cap.steal-time", "api.cap.arm-vm-ipa-size", "api.cap.max-vcpus"
)
def test_capabilities_that_follow_the_host() -> None:
    """The recommended number of vCPUs is the host's CPUs, up to the hard limit, which is that of its GIC."""
    host = Host(Kvm("aarch64", host_gic=2, host_cpus=64, ipa_bits=40, pmu_ids=(), steal_time=False))
    expected = {
        uapi.KVM_CAP_NR_VCPUS: 8,
        uapi.KVM_CAP_MAX_VCPUS: 8,
        uapi.KVM_CAP_MAX_VCPU_ID: 8,
        uapi.KVM_CAP_ARM_VM_IPA_SIZE: 40,
        uapi.KVM_CAP_ARM_PMU_V3: 0,
        uapi.KVM_CAP_STEAL_TIME: 0,
    }

    assert expected == {number: host.check_extension(number) for number in expected}


@pytest.mark.spec("api.cap.msi-devid", "api.check-extension.rule.per-vm", "api.check-extension")
def test_a_capability_may_differ_between_vms() -> None:
    """Device ids are required in the VM that has an ITS, and not in its neighbour."""
    machine = Arm(memory=True)
    machine.add_its()
    other = machine.host.create_vm()

    assert (1, 0) == tuple(vm.check_extension(uapi.KVM_CAP_MSI_DEVID) for vm in (machine.vm, other))


@pytest.mark.spec("api.irq-line.note.polarity")
def test_polarity_is_no_matter_of_arm64() -> None:
    """KVM_CAP_X86_IOAPIC_POLARITY_IGNORED is of x86; on arm64 level 1 asserts, and no trigger type turns it round."""
    machine = Arm()
    machine.level_triggered()
    machine.vm.irq_line(arm.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI, 40), 1)

    assert 0 == machine.host.check_extension(uapi.KVM_CAP_IOAPIC_POLARITY_IGNORED)
    assert 1 << 8 == machine.lines()


# -- KVM_ENABLE_CAP


@pytest.mark.spec(
    "api.enable-cap", "api.enable-cap.rule.flags", "api.enable-cap.rule.level", "api.enable-cap.EFAULT.struct"
)
def test_enabling_a_capability() -> None:
    """On the VM fd, as all that arm64 has are of VMs; without flags; the struct has 104 bytes."""
    machine = Arm(gic=False)

    def enable(fd: Any, flags: int = 0) -> Any:
        return outcome(fd.ioctl, requests.KVM_ENABLE_CAP, uapi.KvmEnableCap(uapi.KVM_CAP_ARM_NISV_TO_USER, flags))

    assert ["EINVAL", "EINVAL"] == [enable(machine.vm, 1), enable(machine.vcpus[0])]
    assert set() == machine.inside.enabled
    assert 0 == enable(machine.vm)
    assert {uapi.KVM_CAP_ARM_NISV_TO_USER} == machine.inside.enabled
    for argument in (bytearray(103), 8):
        assert "EFAULT" == outcome(machine.vm.ioctl, requests.KVM_ENABLE_CAP, argument)


def test_what_else_is_checked_of_a_capability() -> None:
    """A polling time has 32 bits; capabilities of the dirty ring are not there to be enabled."""
    machine = Arm(gic=False)

    def enable(number: int, value: int) -> Any:
        return outcome(machine.vm.ioctl, requests.KVM_ENABLE_CAP, uapi.KvmEnableCap(number, 0, (value, 0, 0, 0)))

    assert [0, "EINVAL"] == [enable(uapi.KVM_CAP_HALT_POLL, value) for value in (0xFFFF_FFFF, 1 << 32)]
    for ring in (uapi.KVM_CAP_DIRTY_LOG_RING, uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL):
        assert (0, "EINVAL") == (machine.vm.check_extension(ring), enable(ring, 65536))
