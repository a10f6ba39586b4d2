"""System and VM fds of an arm64 host: capabilities, types, vCPUs, memory, devices, interrupt lines."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import pytest
from kvm_machine import DOORBELL, Arm, outcome

from fabric.kvm import Kvm
from fabric.kvm.typed import Host
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

SPI, PPI, CPU = arm.KVM_ARM_IRQ_TYPE_SPI, arm.KVM_ARM_IRQ_TYPE_PPI, arm.KVM_ARM_IRQ_TYPE_CPU


@pytest.mark.spec("api.get-api-version", "api.get-vcpu-mmap-size")
def test_the_first_calls_of_every_vmm() -> None:
    """API version 12, and a run area of struct kvm_run and the coalesced MMIO ring."""
    host = Host(Kvm("aarch64"))

    assert (12, 8192) == (host.api_version(), host.mmap_size)


@pytest.mark.spec("api.check-extension.EINVAL.msi-devid-system", "api.check-extension.rule.msi-devid")
def test_msi_devid_is_a_capability_of_vms_with_an_its() -> None:
    """EINVAL on the system fd, then 0, then 1."""
    machine = Arm(memory=True)

    assert "EINVAL" == outcome(machine.host.check_extension, uapi.KVM_CAP_MSI_DEVID)
    assert 0 == machine.vm.check_extension(uapi.KVM_CAP_MSI_DEVID)
    machine.add_its()
    assert 1 == machine.vm.check_extension(uapi.KVM_CAP_MSI_DEVID)


@pytest.mark.spec("api.check-extension.rule.unknown-0")
@pytest.mark.parametrize("cap", [1, 12345, (1 << 64) - 1])
def test_unknown_capabilities_are_not_there(cap: int) -> None:
    """Any other number reads 0."""
    machine = Arm(gic=False)

    assert (0, 0) == (machine.host.check_extension(cap), machine.vm.check_extension(cap))


def test_capabilities_follow_the_host() -> None:
    """Options show in what KVM_CHECK_EXTENSION answers."""
    host = Host(
        Kvm("aarch64", host_gic=2, ipa_bits=40, host_cpus=64, sve=False, ptrauth=False, pmu_ids=(), steal_time=False)
    )
    caps = {
        uapi.KVM_CAP_MAX_VCPUS: 8,
        uapi.KVM_CAP_NR_VCPUS: 8,
        uapi.KVM_CAP_ARM_VM_IPA_SIZE: 40,
        uapi.KVM_CAP_ARM_SVE: 0,
        uapi.KVM_CAP_ARM_PTRAUTH_ADDRESS: 0,
        uapi.KVM_CAP_ARM_PMU_V3: 0,
        uapi.KVM_CAP_STEAL_TIME: 0,
    }

    assert caps == {cap: host.check_extension(cap) for cap in caps}


@pytest.mark.spec("api.create-vm.rule.arm-ipa", "api.create-vm.EINVAL.type", "layout.arm-vm-type")
def test_machine_types_are_address_widths() -> None:
    """32 up to the host's limit, and 0 for 40 bits, which the host must have."""
    host = Host(Kvm("aarch64", ipa_bits=44))
    widths = {bits: outcome(host.create_vm, bits) for bits in (0, 31, 32, 44, 45, 256, 296)}

    assert {31, 45, 256, 296} == {bits for bits, answer in widths.items() if answer == "EINVAL"}
    assert [40, 32, 44] == [host.kvm.vm(widths[bits].fd).ipa_bits for bits in (0, 32, 44)]
    assert "EINVAL" == outcome(Host(Kvm("aarch64", ipa_bits=36)).create_vm, 0)


@pytest.mark.spec("api.create-vm", "api.create-vm.rule.empty")
def test_a_new_vm_is_empty() -> None:
    """No vCPU, no memory, no device; its fd answers."""
    kvm = Kvm("aarch64")
    vm = Host(kvm).create_vm()
    inside = kvm.vm(vm.fd)

    assert ([], [], [], None) == (inside.vcpus, list(inside.memory), inside.devices, inside.irqchip)
    assert "EFAULT" == outcome(inside.memory.read, 0x8000_0000, 1)
    assert 1 == vm.check_extension(uapi.KVM_CAP_USER_MEMORY)


@pytest.mark.spec(
    "api.create-vcpu.EINVAL.id",
    "api.create-vcpu.EINVAL.arm-id",
    "api.create-vcpu.EEXIST.duplicate",
    "api.create-vcpu.EBUSY.gic-initialised",
    "api.create-vcpu.rule.id-sparse",
)
def test_vcpu_ids() -> None:
    """Below 512, each once, in any order; none after the GIC was initialised. The id is 32 bits of the argument."""
    machine = Arm(0, init=False)

    assert "EINVAL" == outcome(machine.vm.create_vcpu, 512)
    for vcpu_id in (511, 3, 1 << 32):
        machine.vm.create_vcpu(vcpu_id)
    assert "EEXIST" == outcome(machine.vm.create_vcpu, 3)
    assert [511, 3, 0] == [vcpu.vcpu_id for vcpu in machine.inside.vcpus]

    machine.gic.set_attr(4, 0)
    assert "EBUSY" == outcome(machine.vm.create_vcpu, 5)


@pytest.mark.spec(
    "api.create-vcpu", "api.create-vcpu.rule.id-range", "api.create-vcpu.note.range", "api.cap.max-vcpu-id"
)
def test_the_range_of_ids_is_that_of_the_capability() -> None:
    """From 0 to KVM_CAP_MAX_VCPU_ID - 1, however many vCPUs there are; the fd is a vCPU's."""
    machine = Arm(0, gic=False)
    limit = machine.vm.check_extension(uapi.KVM_CAP_MAX_VCPU_ID)

    assert "EINVAL" == outcome(machine.vm.create_vcpu, limit)
    last = machine.vm.create_vcpu(limit - 1)
    assert limit - 1 == machine.kvm.vcpu(last.fd).vcpu_id


@pytest.mark.spec("api.create-vcpu.EINVAL.arm-id")
def test_a_host_with_gicv2_has_eight_vcpus() -> None:
    """Ids from 8 on are EINVAL."""
    vm = Host(Kvm("aarch64", host_gic=2)).create_vm()

    assert ["EINVAL", False] == [outcome(vm.create_vcpu, 8), outcome(vm.create_vcpu, 7) == "EINVAL"]


@pytest.mark.spec("api.create-vcpu.EINVAL.count", "api.create-vcpu.rule.count")
def test_a_vm_has_512_vcpus() -> None:
    """One more is EINVAL whatever its id."""
    machine = Arm(0, gic=False)
    for vcpu_id in range(512):
        machine.vm.create_vcpu(vcpu_id)

    assert "EINVAL" == outcome(machine.vm.create_vcpu, 0)


@pytest.mark.spec(
    "api.create-device.ENODEV.type",
    "api.create-device.rule.test",
    "api.create-device.rule.unknown-flags",
    "api.create-device.note.pv-time-type",
)
def test_device_types() -> None:
    """Types the host lacks are ENODEV, and so is PV_TIME (10), which has nothing but a number; a test creates
    nothing, other flags are ignored."""
    machine = Arm(gic=False)
    create = machine.vm.create_device
    types = {n: outcome(create, n, uapi.KVM_CREATE_DEVICE_TEST) for n in (0, 4, 5, 7, 8, 10, 11, 0xFFFF_FFFF)}

    assert {0, 5, 10, 11, 0xFFFF_FFFF} == {n for n, answer in types.items() if answer == "ENODEV"}
    assert [] == machine.inside.devices
    assert "EEXIST" == [outcome(create, uapi.KVM_DEV_TYPE_ARM_VGIC_V3, 2) for _ in range(2)][1]


@pytest.mark.spec("api.create-device", "api.create-device.rule.fd", "api.create-device.EFAULT.struct")
def test_the_fd_of_a_device_is_in_the_struct() -> None:
    """The other fields stay; a struct that is too short is EFAULT."""
    machine = Arm(gic=False)
    request = bytearray(uapi.KvmCreateDevice(uapi.KVM_DEV_TYPE_ARM_VGIC_V3, 0x1234, 2).pack())

    assert "EFAULT" == outcome(machine.vm.ioctl, requests.KVM_CREATE_DEVICE, request[:-1])
    assert [] == machine.inside.devices
    assert 0 == machine.vm.ioctl(requests.KVM_CREATE_DEVICE, request)
    answer = uapi.KvmCreateDevice.unpack(request)
    assert (uapi.KVM_DEV_TYPE_ARM_VGIC_V3, 2) == (answer.type, answer.flags)
    assert machine.inside.irqchip is machine.kvm.device(answer.fd)


@pytest.mark.spec("api.create-device.EEXIST.already", "api.create-device.note.device-errors", "vfio.create.note.eexist")
def test_a_second_device_of_a_type() -> None:
    """EEXIST for a GIC, while VFIO has an errno of its own, EBUSY; several ITSs are fine."""
    machine = Arm()
    create = machine.vm.create_device
    created = create(uapi.KVM_DEV_TYPE_VFIO)

    assert ["EEXIST", "EBUSY"] == [outcome(create, n) for n in (uapi.KVM_DEV_TYPE_ARM_VGIC_V3, uapi.KVM_DEV_TYPE_VFIO)]
    assert 2 == len({create(uapi.KVM_DEV_TYPE_ARM_VGIC_ITS).fd for _ in range(2)})
    created.close()
    create(uapi.KVM_DEV_TYPE_VFIO)


@pytest.mark.spec("api.create-irqchip.ENODEV.arm-no-v2")
def test_create_irqchip_needs_a_host_with_gicv2() -> None:
    """The old call makes a GICv2."""
    machine = Arm(gic=False)

    assert "ENODEV" == outcome(machine.vm.ioctl, requests.KVM_CREATE_IRQCHIP)


@pytest.mark.spec("api.arm-set-device-addr.ENODEV.device", "api.arm-set-device-addr.ENODEV.type")
def test_the_old_way_to_place_frames_is_for_a_gicv2() -> None:
    """Without one, or for another device, it is ENODEV."""
    machine = Arm()

    for device_id in (0, 1, 1 << 16, 1 << 32):
        address = arm.KvmArmDeviceAddr(device_id, 0x0800_0000)
        assert "ENODEV" == outcome(machine.vm.ioctl, requests.KVM_ARM_SET_DEVICE_ADDR, address)


def test_preferred_target() -> None:
    """One target for every host, no features; what was in the struct is overwritten."""
    machine = Arm(gic=False)
    init = bytearray(b"\xff" * arm.KvmVcpuInit.SIZE)
    machine.vm.ioctl(requests.KVM_ARM_PREFERRED_TARGET, init)

    assert arm.KvmVcpuInit(arm.KVM_ARM_TARGET_GENERIC_V8) == arm.KvmVcpuInit.unpack(init)


@pytest.mark.spec("api.enable-cap.EINVAL.flags", "api.enable-cap.EINVAL.unknown")
def test_capabilities_that_can_be_enabled() -> None:
    """A few on the VM fd, none with flags, none on vCPU fds."""
    machine = Arm(gic=False)

    def enable(cap: int, flags: int = 0) -> Any:
        return outcome(machine.vm.ioctl, requests.KVM_ENABLE_CAP, uapi.KvmEnableCap(cap, flags))

    assert [0, 0, 0] == [
        enable(cap) for cap in (uapi.KVM_CAP_ARM_NISV_TO_USER, uapi.KVM_CAP_ARM_SYSTEM_SUSPEND, uapi.KVM_CAP_HALT_POLL)
    ]
    assert ["EINVAL", "EINVAL"] == [enable(uapi.KVM_CAP_ARM_NISV_TO_USER, 1), enable(uapi.KVM_CAP_IRQFD)]
    assert "EINVAL" == outcome(
        machine.vcpus[0].ioctl, requests.KVM_ENABLE_CAP, uapi.KvmEnableCap(uapi.KVM_CAP_HALT_POLL)
    )


# -- memory


@pytest.mark.spec("api.get-dirty-log.rule.bits", "api.get-dirty-log.rule.clears")
def test_the_dirty_log_is_fetched_and_cleared() -> None:
    """Bit n is page n; a second fetch has nothing."""
    machine = Arm(gic=False)
    machine.vm.set_memory(1, 0x1_0000, 0x1_0000, machine.user.map(0x1_0000), uapi.KVM_MEM_LOG_DIRTY_PAGES)
    machine.inside.memory.write(0x1_2FFE, b"abcd")

    assert (0b1100).to_bytes(8, "little") == machine.vm.dirty_log(1, 16)
    assert bytes(8) == machine.vm.dirty_log(1, 16)


@pytest.mark.spec("api.get-dirty-log", "api.get-dirty-log.EFAULT.struct")
def test_a_dirty_log_that_cannot_be_stored() -> None:
    """EFAULT for a struct that is too short, and for a bitmap that is nowhere."""
    machine = Arm(gic=False)
    machine.vm.set_memory(1, 0x1_0000, 0x1_0000, machine.user.map(0x1_0000), uapi.KVM_MEM_LOG_DIRTY_PAGES)
    call = machine.vm.ioctl

    assert "EFAULT" == outcome(call, requests.KVM_GET_DIRTY_LOG, bytearray(15))
    assert "EFAULT" == outcome(call, requests.KVM_GET_DIRTY_LOG, uapi.KvmDirtyLog(1, 0, 8))
    assert 0 == call(requests.KVM_GET_DIRTY_LOG, uapi.KvmDirtyLog(1, 0, machine.host.values.addr))


@pytest.mark.spec("api.get-dirty-log.ENOENT.no-log", "api.get-dirty-log.EINVAL.slot")
def test_slots_without_a_dirty_log() -> None:
    """ENOENT where there is no slot or no log, EINVAL for a number that no slot can have."""
    machine = Arm(gic=False, memory=True)

    assert ["ENOENT", "ENOENT", "EINVAL"] == [outcome(machine.vm.dirty_log, n, 1) for n in (0, 1, 0xFFFF)]


@pytest.mark.spec("api.cap.manual-dirty-log")
def test_a_dirty_log_may_be_cleared_apart() -> None:
    """With manual protection a fetch leaves the bits, and KVM_CLEAR_DIRTY_LOG takes those it names."""
    machine = Arm(gic=False)

    def enable(options: int) -> Any:
        cap = uapi.KvmEnableCap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (options, 0, 0, 0))
        return outcome(machine.vm.ioctl, requests.KVM_ENABLE_CAP, cap)

    assert ["EINVAL", "EINVAL", 0] == [enable(options) for options in (2, 4, 3)]
    machine.vm.set_memory(1, 0x1_0000, 0x1_0000, machine.user.map(0x1_0000), uapi.KVM_MEM_LOG_DIRTY_PAGES)
    assert (0xFFFF).to_bytes(8, "little") == machine.vm.dirty_log(1, 16)
    machine.host.values.put(0xFF)
    machine.vm.ioctl(requests.KVM_CLEAR_DIRTY_LOG, uapi.KvmClearDirtyLog(1, 16, 0, machine.host.values.addr))
    assert (0xFF00).to_bytes(8, "little") == machine.vm.dirty_log(1, 16)
    assert "EFAULT" == outcome(machine.vm.ioctl, requests.KVM_CLEAR_DIRTY_LOG, uapi.KvmClearDirtyLog(1, 16, 0, 8))


@pytest.mark.spec("api.set-user-memory-region")
def test_a_slot_is_made_moved_reflagged_and_deleted() -> None:
    """By the same call; what it holds stays with the user's memory."""
    machine = Arm(gic=False)
    user = machine.user.map(8192)
    machine.user.write(user, b"here")
    memory = machine.inside.memory

    machine.vm.set_memory(3, 0x1_0000, 8192, user)
    assert b"here" == memory.read(0x1_0000, 4)
    machine.vm.set_memory(3, 0x4_0000, 8192, user)
    assert (False, b"here") == (memory.is_backed(0x1_0000), memory.read(0x4_0000, 4))
    machine.vm.set_memory(3, 0x4_0000, 8192, user, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    memory.write(0x4_1000, b"x")
    assert (2).to_bytes(8, "little") == machine.vm.dirty_log(3, 2)
    machine.vm.set_memory(3, 0, 0)
    assert [] == list(memory)


@pytest.mark.spec("api.set-user-memory-region.rule.slot", "api.set-user-memory-region.EFAULT.struct")
def test_a_slot_value_is_a_number_and_an_address_space() -> None:
    """Bits 15:0 and 31:16; arm64 has one space of as many slots as the capability says. A short struct is EFAULT."""
    machine = Arm(gic=False)
    user = machine.user.map(4096)
    last = machine.vm.check_extension(uapi.KVM_CAP_NR_MEMSLOTS) - 1

    assert [None, "EINVAL", "EINVAL"] == [
        outcome(machine.vm.set_memory, slot, 0, 4096, user) for slot in (last, last + 1, 1 << 16)
    ]
    region = bytearray(uapi.KvmUserspaceMemoryRegion(1, 0, 0x1_0000, 4096, user).pack())
    assert "EFAULT" == outcome(machine.vm.ioctl, requests.KVM_SET_USER_MEMORY_REGION, region[:-1])


@pytest.mark.spec("api.set-user-memory-region.EEXIST.overlap")
def test_memory_beyond_the_guests_addresses_is_efault() -> None:
    """arm64 answers EFAULT where others have EINVAL; an overlap is EEXIST."""
    machine = Arm(gic=False, memory=True)

    assert "EFAULT" == outcome(machine.vm.set_memory, 1, (1 << 40) - 4096, 8192, 4096)
    assert "EEXIST" == outcome(machine.vm.set_memory, 1, 0x8000_0000, 4096, 4096)


def test_guest_memory_is_that_of_this_process() -> None:
    """What the VMM maps is what the guest has, both ways, at once."""
    kvm = Kvm("aarch64")
    vm = Host(kvm).create_vm()
    mapping = mmap.mmap(-1, 8192)
    vm.set_memory(0, 0x8000_0000, 8192, ctypes.addressof(ctypes.c_char.from_buffer(mapping)))
    memory = kvm.vm(vm.fd).memory
    mapping[100:104] = b"host"
    memory.write(0x8000_0000 + 4094, b"guest")

    assert (b"host", b"guest") == (memory.read(0x8000_0000 + 100, 4), mapping[4094:4099])


def test_memory_that_was_unmapped_is_efault() -> None:
    """A slot whose user memory is gone answers EFAULT and does not crash."""
    machine = Arm(gic=False, memory=True)
    machine.user.unmap(machine.ram)

    assert "EFAULT" == outcome(machine.inside.memory.read, 0x8000_0000, 8)


# -- KVM_IRQ_LINE


@pytest.mark.spec("api.irq-line", "api.irq-line.rule.level")
def test_levels_and_edges() -> None:
    """1 asserts and 0 does not: a level-triggered interrupt follows, an edge-triggered one stays with its edge."""
    machine = Arm()
    level, edge = arm.irq_line(SPI, 40), arm.irq_line(SPI, 41)
    machine.set_gicd(0xC08, 0x0008_0000)  # SPI 41 by edges, the other by level
    for irq in (level, edge):
        machine.vm.irq_line(irq, 1)

    assert (1 << 8 | 1 << 9, 1 << 8) == (machine.pending() | machine.lines(), machine.lines() & 1 << 8)

    for irq in (level, edge):
        machine.vm.irq_line(irq, 0)
    assert (1 << 9, 0) == (machine.pending(), machine.lines() & 1 << 8)


@pytest.mark.spec("api.irq-line.rule.result-ignored")
def test_what_becomes_of_a_line_is_not_reported() -> None:
    """0 for one that was pending already, and for one that is disabled."""
    machine = Arm()

    assert [0, 0] == [
        machine.vm.ioctl(requests.KVM_IRQ_LINE, uapi.KvmIrqLevel(arm.irq_line(SPI, 40), 1)) for _ in range(2)
    ]
    assert (2, 1) == (machine.ledger.raised, machine.ledger.coalesced)


@pytest.mark.spec(
    "api.irq-line.EINVAL.arm-type",
    "api.irq-line.EINVAL.arm-id",
    "api.irq-line.EINVAL.arm-vcpu",
    "api.irq-line.rule.arm-layout-2",
)
def test_irq_line_with_a_gic() -> None:
    """SPIs of the GIC, PPIs 16 to 31 of vCPUs that are there; other types and numbers are EINVAL."""
    machine = Arm(2)
    line = machine.vm.irq_line

    assert [None, None] == [line(arm.irq_line(SPI, 255), 1), line(arm.irq_line(PPI, 16, 1), 1)]
    for irq in (
        arm.irq_line(SPI, 31),
        arm.irq_line(SPI, 256),
        arm.irq_line(PPI, 15),
        arm.irq_line(PPI, 32),
        arm.irq_line(PPI, 20, 2),
        arm.irq_line(PPI, 20, 256),
        arm.irq_line(3, 40),
        0xF << 24,
    ):
        assert "EINVAL" == outcome(line, irq, 1), hex(irq)


@pytest.mark.spec("api.irq-line.ENXIO.no-irqchip", "api.irq-line.rule.arm-userspace")
def test_irq_line_and_who_has_the_gic() -> None:
    """The CPU's own inputs belong to a userspace GIC, SPIs and PPIs to an in-kernel one: else ENXIO."""
    with_gic, without = Arm(), Arm(gic=False)

    assert "ENXIO" == outcome(with_gic.vm.irq_line, arm.irq_line(CPU, 0), 1)
    assert ["ENXIO", "ENXIO"] == [outcome(without.vm.irq_line, arm.irq_line(kind, 40), 1) for kind in (SPI, PPI)]
    assert [None, None, "EINVAL", "EINVAL"] == [
        outcome(without.vm.irq_line, irq, 1)
        for irq in (arm.irq_line(CPU, 0), arm.irq_line(CPU, 1), arm.irq_line(CPU, 2), arm.irq_line(CPU, 0, 1))
    ]


@pytest.mark.spec("api.irq-line.EBUSY.arm-v3-uninit")
def test_irq_line_before_init() -> None:
    """EBUSY, also when taps or faults are on the way."""
    machine = Arm(init=False)

    assert "EBUSY" == outcome(machine.vm.irq_line, arm.irq_line(SPI, 40), 1)
    machine.inside.lines.tap(lambda event: None)
    assert "EBUSY" == outcome(machine.vm.irq_line, arm.irq_line(SPI, 40), 1)


@pytest.mark.spec(
    "api.irq-line-status",
    "api.irq-line-status.rule.arm-no-route",
    "api.irq-line.rule.arm-no-route",
    "api.irq-line.note.routing-arm",
)
def test_irq_line_does_not_look_at_routes() -> None:
    """The number is the interrupt's own; the status variant reports nothing on arm64."""
    machine = Arm()
    machine.vm.set_routes([])
    status = bytearray(uapi.KvmIrqLevel(arm.irq_line(SPI, 40), 1).pack())
    machine.vm.ioctl(requests.KVM_IRQ_LINE_STATUS, status)

    assert 1 << 8 == machine.pending()
    assert arm.irq_line(SPI, 40) == uapi.KvmIrqLevel.unpack(status).irq


def test_any_level_but_zero_is_high() -> None:
    """As the kernel takes it."""
    machine = Arm()
    machine.level_triggered()
    machine.vm.irq_line(arm.irq_line(SPI, 40), 256)

    assert 1 << 8 == machine.lines()


@pytest.mark.spec(
    "api.irq-line-status.EFAULT.struct",
    "api.irq-line-status.EINVAL.arm-id",
    "api.irq-line-status.EINVAL.arm-type",
    "api.irq-line-status.EINVAL.arm-vcpu",
    "api.irq-line-status.ENXIO.no-irqchip",
    "api.irq-line-status.EBUSY.arm-v3-uninit",
)
def test_the_status_variant_has_the_same_errors() -> None:
    """One decoding for both calls."""

    def call(machine: Arm, irq: int) -> Any:
        return outcome(machine.vm.ioctl, requests.KVM_IRQ_LINE_STATUS, uapi.KvmIrqLevel(irq, 1))

    ready = Arm()
    numbers = [arm.irq_line(SPI, 31), arm.irq_line(3, 40), arm.irq_line(PPI, 20, 7)]
    assert ["EINVAL"] * 3 == [call(ready, irq) for irq in numbers]
    assert "EFAULT" == outcome(ready.vm.ioctl, requests.KVM_IRQ_LINE_STATUS, bytearray(7))
    assert "ENXIO" == call(Arm(gic=False), arm.irq_line(SPI, 40))
    assert "EBUSY" == call(Arm(init=False), arm.irq_line(SPI, 40))


# -- KVM_SIGNAL_MSI


@pytest.mark.spec(
    "api.signal-msi",
    "api.signal-msi.rule.arm",
    "api.signal-msi.rule.devid",
    "api.signal-msi.note.arch-list",
    "api.signal-msi.EBUSY.arm-disabled",
    "api.signal-msi.EINVAL.arm-no-devid",
)
def test_what_becomes_of_a_message() -> None:
    """1 delivered, 0 not mapped; EINVAL without the device id that an ITS needs, or outside the frame; EBUSY with the
    ITS disabled."""
    machine = Arm(memory=True)
    machine.add_its()
    signal = machine.vm.signal_msi
    answers = [
        outcome(signal, *message) for message in ((DOORBELL, 0), (0x5000, 0, 8), (DOORBELL, 0, 8), (DOORBELL, 9, 8))
    ]
    machine.its.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, 0, 0)

    assert ["EINVAL", "EINVAL", 1, 0] == answers
    assert 1 == machine.vm.check_extension(uapi.KVM_CAP_MSI_DEVID)
    assert machine.lpi_pending()
    assert "EBUSY" == outcome(signal, DOORBELL, 0, 8)
    machine.kvm.check()


@pytest.mark.spec("api.signal-msi.EINVAL.no-irqchip", "api.signal-msi.EINVAL.flags", "api.signal-msi.ENODEV.arm-no-its")
def test_messages_need_an_its() -> None:
    """EINVAL without a GIC or with unknown flags, ENODEV without an ITS."""
    assert "EINVAL" == outcome(Arm(gic=False).vm.signal_msi, 0x0809_0040, 0, 8)
    machine = Arm()
    assert "ENODEV" == outcome(machine.vm.signal_msi, 0x0809_0040, 0, 8)
    msi = uapi.KvmMsi(0x0809_0040, flags=2)
    assert "EINVAL" == outcome(machine.vm.ioctl, requests.KVM_SIGNAL_MSI, msi)
