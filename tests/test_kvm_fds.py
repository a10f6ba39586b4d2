"""Fds of the simulated kernel: numbers, unknown requests, arguments, and how long things live."""

from __future__ import annotations

import array
import ctypes
import errno
import os
import struct

import pytest
from kvm_machine import GICD, Arm, outcome

import fabric
from fabric.errors import KvmError
from fabric.kvm import Kvm
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.usermem import SparseMemory


def test_numbers_are_beyond_those_of_the_operating_system() -> None:
    """No kvm fd and no simulated eventfd has the number of an open file, or of each other."""
    numbers = []
    for _ in range(3):
        machine = Arm()
        numbers += [machine.host.fd, machine.vm.fd, machine.vcpus[0].fd, machine.gic.fd]
        numbers += [int(machine.kvm.eventfd()), os.eventfd(0)]
    for fd in numbers:
        if fd < 1 << 30:
            os.close(fd)

    assert len(numbers) == len(set(numbers))
    assert all(fd < 1 << 20 or 1 << 30 <= fd < 1 << 31 for fd in numbers)


@pytest.mark.parametrize("fd", [-1, 0, 5, 1 << 40])
def test_a_number_that_is_no_kvm_fd_is_ebadf(fd: int) -> None:
    """Every call on it is refused, also for numbers that the operating system has open."""
    kvm = Kvm("aarch64")

    assert "EBADF" == outcome(kvm.ioctl, fd, requests.KVM_GET_API_VERSION)
    assert "EBADF" == outcome(kvm.mmap, fd, 4096)
    assert "EBADF" == outcome(kvm.close, fd)
    assert "EBADF" == outcome(kvm.load, fd, lambda cpu: None)


def test_closed_is_closed() -> None:
    """After close the number is EBADF, and is not given out again."""
    kvm = Kvm("aarch64")
    fd = kvm.open()
    kvm.close(fd)

    assert "EBADF" == outcome(kvm.ioctl, fd, requests.KVM_GET_API_VERSION)
    assert "EBADF" == outcome(kvm.close, fd)
    assert fd != kvm.open()


def test_fds_belong_to_one_host() -> None:
    """The fd of one Kvm is not open in another."""
    one, other = Kvm("aarch64"), Kvm("aarch64")

    assert "EBADF" == outcome(other.ioctl, one.open(), requests.KVM_GET_API_VERSION)


@pytest.mark.spec("api.all.unknown-vm", "api.all.unknown-device", "api.set-device-attr.EINVAL.arm-vm")
def test_unknown_requests() -> None:
    """A request that an fd does not know is EINVAL on arm64 system, VM and vCPU fds, ENOTTY on devices."""
    machine = Arm()
    fds = [machine.host.fd, machine.vm.fd, machine.vcpus[0].fd, machine.gic.fd]

    answers = [outcome(machine.kvm.ioctl, fd, requests.KVM_GET_PIT2, bytearray(112)) for fd in fds]

    assert ["EINVAL", "EINVAL", "EINVAL", "ENOTTY"] == answers
    attr = bytearray(uapi.KvmDeviceAttr().pack())
    assert "EINVAL" == outcome(machine.kvm.ioctl, machine.vm.fd, requests.KVM_SET_DEVICE_ATTR, attr)


def test_a_negative_request_is_the_same_32_bits() -> None:
    """Python code that packs requests as signed ints works, as with fcntl."""
    machine = Arm()
    request = requests.KVM_IRQ_LINE_STATUS - (1 << 32)
    line = bytearray(uapi.KvmIrqLevel(arm.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI, 40), 1).pack())

    assert 0 == machine.kvm.ioctl(machine.vm.fd, request, line)


# -- arguments


@pytest.mark.parametrize(
    "make",
    [
        bytearray,
        lambda data: memoryview(bytearray(data)),
        lambda data: array.array("I", data),
        lambda data: (ctypes.c_uint32 * 2).from_buffer_copy(data),
    ],
    ids=["bytearray", "memoryview", "array", "ctypes"],
)
def test_any_writable_buffer_is_an_argument(make: object) -> None:
    """Whatever has a writable buffer stands for user memory."""
    machine = Arm()
    line = make(uapi.KvmIrqLevel(arm.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI, 40), 1).pack())  # type: ignore[operator]

    assert 0 == machine.kvm.ioctl(machine.vm.fd, requests.KVM_IRQ_LINE, line)
    assert 1 << 8 == machine.pending()


def test_a_read_only_buffer_is_a_mistake() -> None:
    """Results could not be stored in it."""
    machine = Arm()

    with pytest.raises(TypeError, match="writable"):
        machine.kvm.ioctl(machine.vm.fd, requests.KVM_CREATE_DEVICE, bytes(12))


@pytest.mark.spec("api.irq-line.EFAULT.struct", "api.signal-msi.EFAULT.struct", "api.irqfd.EFAULT.struct")
@pytest.mark.parametrize(
    ("request_", "struct_"),
    [
        (requests.KVM_IRQ_LINE, uapi.KvmIrqLevel),
        (requests.KVM_SIGNAL_MSI, uapi.KvmMsi),
        (requests.KVM_IRQFD, uapi.KvmIrqfd),
        (requests.KVM_IOEVENTFD, uapi.KvmIoeventfd),
        (requests.KVM_SET_USER_MEMORY_REGION, uapi.KvmUserspaceMemoryRegion),
        (requests.KVM_CREATE_DEVICE, uapi.KvmCreateDevice),
        (requests.KVM_SET_GSI_ROUTING, uapi.KvmIrqRouting),
        (requests.KVM_GET_DIRTY_LOG, uapi.KvmDirtyLog),
        (requests.KVM_ENABLE_CAP, uapi.KvmEnableCap),
        (requests.KVM_ARM_SET_DEVICE_ADDR, arm.KvmArmDeviceAddr),
        (requests.KVM_ARM_PREFERRED_TARGET, arm.KvmVcpuInit),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_struct_that_cannot_be_accessed_is_efault(request_: int, struct_: type) -> None:
    """A buffer one byte short, a null pointer and a wild one fault; nothing has happened."""
    machine = Arm()
    size = struct_.SIZE  # type: ignore[attr-defined]
    for arg in (bytearray(size - 1), memoryview(bytearray(size - 1)), 0, 1 << 63):
        assert "EFAULT" == outcome(machine.kvm.ioctl, machine.vm.fd, request_, arg)


@pytest.mark.spec("api.set-gsi-routing.EFAULT.entries", "api.set-gsi-routing.rule.atomic")
def test_a_fault_in_the_middle_changes_nothing() -> None:
    """A routing table cut short is refused as a whole."""
    machine = Arm()
    table = bytearray(uapi.KvmIrqRouting(2).pack() + uapi.KvmIrqRoutingEntry(0, 1).pack())

    assert "EFAULT" == outcome(machine.kvm.ioctl, machine.vm.fd, requests.KVM_SET_GSI_ROUTING, table)
    assert 224 == len(machine.inside.routing)


def test_a_longer_buffer_is_fine() -> None:
    """What lies behind the struct is not touched."""
    machine = Arm()
    device = bytearray(struct.pack("III", uapi.KVM_DEV_TYPE_ARM_VGIC_ITS, 0, 0) + b"\xaa" * 8)
    machine.kvm.ioctl(machine.vm.fd, requests.KVM_CREATE_DEVICE, device)

    assert b"\xaa" * 8 == device[12:]


def test_an_address_in_user_memory_is_an_argument() -> None:
    """An int where a pointer is wanted is an address."""
    user = SparseMemory()
    kvm = Kvm("aarch64", user_memory=user)
    vm = kvm.ioctl(kvm.open(), requests.KVM_CREATE_VM)
    addr = user.map(4096)
    user.write(addr, struct.pack("III", uapi.KVM_DEV_TYPE_ARM_VGIC_V3, 0, 0))
    kvm.ioctl(vm, requests.KVM_CREATE_DEVICE, addr)
    fd = struct.unpack("III", user.read(addr, 12))[1]

    assert "VgicV3" == type(kvm.device(fd)).__name__


def test_user_memory_is_this_process_by_default() -> None:
    """Pointers in structs are addresses of this process; a bad one is EFAULT, not a crash."""
    kvm = Kvm("aarch64")
    vm = kvm.ioctl(kvm.open(), requests.KVM_CREATE_VM)
    device = bytearray(uapi.KvmCreateDevice(uapi.KVM_DEV_TYPE_ARM_VGIC_V3).pack())
    kvm.ioctl(vm, requests.KVM_CREATE_DEVICE, device)
    fd = uapi.KvmCreateDevice.unpack(device).fd
    value = ctypes.c_uint64(GICD)

    def place(addr: int) -> object:
        attr = uapi.KvmDeviceAttr(0, arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_DIST, addr).pack()
        return outcome(kvm.ioctl, fd, requests.KVM_SET_DEVICE_ATTR, bytearray(attr))

    assert "EFAULT" == place(16)
    assert "EFAULT" == place((1 << 64) - 4)
    assert 0 == place(ctypes.addressof(value))


@pytest.mark.spec("api.get-api-version.EINVAL.arg", "api.get-vcpu-mmap-size.EINVAL.arg", "api.run.EINVAL.arg")
def test_calls_without_argument_take_none() -> None:
    """Anything but 0 is EINVAL; a buffer is an address, hence not 0."""
    machine = Arm()

    for arg in (1, 1 << 63, bytearray(8)):
        assert "EINVAL" == outcome(machine.host.ioctl, requests.KVM_GET_API_VERSION, arg)
        assert "EINVAL" == outcome(machine.host.ioctl, requests.KVM_GET_VCPU_MMAP_SIZE, arg)
        assert "EINVAL" == outcome(machine.vcpus[0].ioctl, requests.KVM_RUN, arg)


# -- life


def test_a_vm_lives_until_its_last_fd_is_closed() -> None:
    """VM, vCPU and device fds keep it; the last one to go ends it."""
    machine = Arm()
    kvm = machine.kvm
    gone: list[int] = []
    machine.inside.on_destroy(lambda: gone.append(1))
    kvm.close(machine.vm.fd)
    kvm.close(machine.gic.fd)

    assert [] == gone
    assert 27 == machine.vcpus[0].get_attr(arm.KVM_ARM_VCPU_TIMER_CTRL, 0, 4)

    machine.vcpus[0].close()
    assert [1] == gone
    assert [] == kvm.vms


def test_pending_interrupts_of_a_closed_vm_are_dropped() -> None:
    """They end in the ledger as dropped, with reason "vm closed"."""
    machine = Arm()
    machine.vm.irq_line(arm.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI, 40), 1)

    assert 1 == machine.kvm.statement().pending

    ledger = machine.inside.ledger
    for fd in (machine.vm, machine.vcpus[0], machine.gic):
        fd.close()
    statement = machine.kvm.statement()
    assert (1, 0, {"vm closed": 1}) == (statement.raised, statement.pending, statement.dropped)
    assert statement == ledger.check()


def test_closing_a_device_fd_leaves_the_device() -> None:
    """A GIC stays with its VM, and there cannot be a second one."""
    machine = Arm()
    machine.gic.close()

    assert "EEXIST" == outcome(machine.vm.create_device, uapi.KVM_DEV_TYPE_ARM_VGIC_V3)


@pytest.mark.spec(
    "vfio.create.rule.one-per-vm",
    "vfio.create.EBUSY.already",
    "vfio.create.rule.release",
    "api.create-device.rule.lifetime",
)
def test_a_vfio_device_goes_with_its_fd() -> None:
    """A second one is EBUSY while the first is open."""
    machine = Arm(gic=False)
    vfio = machine.vm.create_device(uapi.KVM_DEV_TYPE_VFIO)

    assert "EBUSY" == outcome(machine.vm.create_device, uapi.KVM_DEV_TYPE_VFIO)

    vfio.close()
    assert "EBUSY" != outcome(machine.vm.create_device, uapi.KVM_DEV_TYPE_VFIO)


@pytest.mark.spec(
    "vfio.group.add.EBADF.fd",
    "vfio.group.add.EINVAL.not-vfio",
    "vfio.group.add.EFAULT.user-ptr",
    "vfio.group.add.EPERM.get",
    "vfio.group.del.EBADF.fd",
    "vfio.group.del.ENOENT.unknown",
    "vfio.group.del.EFAULT.user-ptr",
    "vfio.group.del.EPERM.get",
    "api.get-device-attr.EPERM.no-accessor",
)
def test_no_file_is_a_vfio_group() -> None:
    """Files that are open are no groups, others are EBADF; nothing can be read."""
    machine = Arm(gic=False)
    vfio = machine.vm.create_device(uapi.KVM_DEV_TYPE_VFIO)
    add, remove = 1, 2

    for fd in (0, machine.vm.fd, int(machine.kvm.eventfd())):
        assert ["EINVAL", "ENOENT"] == [outcome(vfio.set_attr, 1, attr, fd) for attr in (add, remove)]
    assert ["EBADF", "EBADF"] == [outcome(vfio.set_attr, 1, attr, 0xFFFF_FFFF) for attr in (add, remove)]
    assert ["EPERM", "EPERM"] == [outcome(vfio.get_attr, 1, attr) for attr in (add, remove)]
    assert [True, True, False] == [vfio.has_attr(1, attr) for attr in (add, remove, 3)]
    for attr in (add, remove):
        struct_ = uapi.KvmDeviceAttr(0, 1, attr, 8)
        assert "EFAULT" == outcome(vfio.ioctl, requests.KVM_SET_DEVICE_ATTR, struct_)


@pytest.mark.spec("api.all.eio")
def test_a_dead_vm_answers_eio() -> None:
    """A first KVM_RUN with a GIC that cannot be mapped kills the VM, for all its fds."""
    machine = Arm(2, init=False)
    one, other = machine.vcpus

    assert "EBUSY" == outcome(one.ioctl, requests.KVM_RUN)
    answers = [
        outcome(one.ioctl, requests.KVM_RUN),
        outcome(other.get_attr, arm.KVM_ARM_VCPU_TIMER_CTRL, 0, 4),
        outcome(machine.vm.create_vcpu, 5),
        outcome(machine.vm.ioctl, 12345),
        outcome(machine.gic.get_attr, 0, 0),
    ]
    assert ["EIO"] * 5 == answers
    assert 12 == machine.host.api_version()


# -- the host


def test_options_describe_the_host() -> None:
    """Known options are taken, unknown ones and values out of range refused, with the choice there is."""
    assert "Kvm('aarch64', host_gic=2)" == repr(Kvm("aarch64", host_gic=2))
    with pytest.raises(TypeError, match=r"host_cpus, host_gic, .*, not .hostgic."):
        Kvm("aarch64", hostgic=2)
    with pytest.raises(ValueError, match="2 or 3, not 4"):
        Kvm("aarch64", host_gic=4)


@pytest.mark.parametrize("arch", ["ppc64", "ppce500", "s390x", "mips64"])
def test_architectures_to_come_are_known(arch: str) -> None:
    """Their names are accepted as names, and refused as not built."""
    with pytest.raises(ValueError, match="not built yet"):
        Kvm(arch)
    with pytest.raises(ValueError, match="must be one of aarch64"):
        Kvm("sparc")


def test_a_kvm_belongs_to_the_simulation_it_was_made_in() -> None:
    """Inside one its clock is that of the run; outside it stands still."""

    async def main() -> tuple[int, int]:
        kvm = Kvm("aarch64")
        before = kvm.clock.now
        await fabric.sleep(1000)
        return before, kvm.clock.now

    assert (0, 1000) == fabric.run(main)
    assert 0 == Kvm("aarch64").clock.now


def test_the_ledger_is_checked_when_a_simulation_ends() -> None:
    """An interrupt that was lost makes the run fail."""

    async def main() -> None:
        machine = Arm()
        machine.inside.ledger.raised += 1

    with pytest.raises(fabric.errors.LedgerError, match="1 lost"):
        fabric.run(main)


def test_errors_say_which_rule_was_broken() -> None:
    """The message has the rule and the value."""
    machine = Arm()

    with pytest.raises(KvmError, match="below 512, not 512") as caught:
        machine.vm.create_vcpu(512)
    assert errno.EINVAL == caught.value.errno
