"""Clocks of x86 VMs: KVM_GET/SET_CLOCK, TSC frequencies and offsets, and what guests are told in their memory."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from x86_guests import RAM, X86Vm, apic_on, one_run, simulate
from x86_machine import outcome

import fabric
from fabric.kvm import Kvm
from fabric.kvm.typed import Host as KvmHost
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi import x86
from fabric.uapi.x86 import KvmClockData, KvmMsrEntry, KvmMsrs, PvclockVcpuTimeInfo, PvclockWallClock
from fabric.vcpu.host import Host

SECOND = 1_000_000_000
KHZ = 2_600_000
TSC_START = 1_000_000_000
REAL_START = 1_700_000_000 * SECOND
STABLE, REALTIME, HOST_TSC = x86.KVM_CLOCK_TSC_STABLE, x86.KVM_CLOCK_REALTIME, x86.KVM_CLOCK_HOST_TSC
PAGE, WALL, STEAL = RAM + 0x100, RAM + 0x200, RAM + 0x240
STOPPED = 2
"""PVCLOCK_GUEST_STOPPED."""


def get_clock(vm: X86Vm) -> KvmClockData:
    data = bytearray(KvmClockData.SIZE)
    vm.vm.ioctl(requests.KVM_GET_CLOCK, data)
    return KvmClockData.unpack(data)


def set_clock(vm: X86Vm, clock: int, flags: int = 0, realtime: int = 0, host_tsc: int = 0) -> int:
    return vm.vm.ioctl(requests.KVM_SET_CLOCK, KvmClockData(clock, flags, 0, realtime, host_tsc))


def set_msr(vm: X86Vm, index: int, value: int, number: int = 0) -> int:
    entry = KvmMsrs(1).pack() + KvmMsrEntry(index, 0, value).pack()
    return vm.vcpus[number].ioctl(requests.KVM_SET_MSRS, bytearray(entry))


def get_msr(vm: X86Vm, index: int, number: int = 0) -> int:
    buffer = bytearray(KvmMsrs(1).pack() + KvmMsrEntry(index).pack())
    assert 1 == vm.vcpus[number].ioctl(requests.KVM_GET_MSRS, buffer)
    return KvmMsrEntry.unpack(buffer[KvmMsrs.SIZE :]).data


def page(vm: X86Vm, at: int = PAGE) -> PvclockVcpuTimeInfo:
    return PvclockVcpuTimeInfo.unpack(vm.inside.memory.read(at, PvclockVcpuTimeInfo.SIZE))


def offset(vm: X86Vm, number: int = 0) -> int:
    return vm.vcpus[number].get_attr(x86.KVM_VCPU_TSC_CTRL, x86.KVM_VCPU_TSC_OFFSET)


def set_offset(vm: X86Vm, value: int, number: int = 0) -> int:
    return vm.vcpus[number].set_attr(x86.KVM_VCPU_TSC_CTRL, x86.KVM_VCPU_TSC_OFFSET, value)


def in_time(body: Callable[[], Awaitable[object]]) -> None:
    """Run a coroutine in which time can pass."""
    fabric.run(body)


async def enter(vm: X86Vm, number: int = 0) -> None:
    """KVM_RUN that ends at once, of a vCPU without a program."""
    vm.vcpus[number].run_area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 0
    if not vm.vcpu(number).has_guest:

        async def program(cpu: Any) -> None:
            while True:
                await cpu.outp(0xC000, 1, 0)

        vm.vcpus[number].load(program)
    assert uapi.KVM_EXIT_IO == await vm.run(number)


# KVM_GET_CLOCK and KVM_SET_CLOCK


@pytest.mark.spec("api.get-clock", "api.cap.adjust-clock")
def test_the_clock_begins_with_the_vm() -> None:
    """In ns; which flags it may have is what the capability says."""

    async def body() -> None:
        await fabric.sleep(5 * SECOND)
        vm = X86Vm()
        await fabric.sleep(123)
        assert KvmClockData(123) == get_clock(vm)
        assert STABLE | REALTIME | HOST_TSC == 14 == vm.host.check_extension(uapi.KVM_CAP_ADJUST_CLOCK)

    in_time(body)


@pytest.mark.spec(
    "api.get-clock.rule.master",
    "api.get-clock.rule.realtime",
    "api.get-clock.rule.host-tsc",
    "vcpu.seq.tsc-migration.note.flags",
)
def test_a_stable_clock_comes_with_the_hosts_clocks() -> None:
    """From the first KVM_RUN on: real time and TSC of the same moment. Before, the members are zero."""

    async def body() -> None:
        vm = X86Vm()
        await fabric.sleep(1000)
        before = get_clock(vm)
        await enter(vm)
        assert KvmClockData(1000) == before
        expected = KvmClockData(1000, STABLE | REALTIME | HOST_TSC, 0, REAL_START + 1000, TSC_START + 2600)
        assert expected == get_clock(vm)

    in_time(body)


@pytest.mark.spec("api.get-clock.rule.stable", "vcpu.tsc.offset.rule.matching")
@pytest.mark.parametrize("how", ["msr", "offset"])
def test_vcpus_whose_tscs_differ_have_no_stable_clock(how: str) -> None:
    """It is not what every vCPU sees, and comes without flags; with the same for all it does again."""

    async def body() -> None:
        vm = X86Vm(2)
        await enter(vm)
        flags = [get_clock(vm).flags]
        for number in (1, 0):
            if how == "msr":
                set_msr(vm, x86.MSR_IA32_TSC, 1 << 40, number)
            else:
                set_offset(vm, 5, number)
            await enter(vm)
            flags.append(get_clock(vm).flags)
        assert [14, 0, 14] == flags

    in_time(body)


@pytest.mark.spec("api.set-clock", "api.get-clock.rule.stable")
def test_the_clock_shows_what_it_is_set_to() -> None:
    """And goes on from there; it is stable from then on."""

    async def body() -> None:
        vm = X86Vm()
        assert 0 == set_clock(vm, 77 * SECOND)
        await fabric.sleep(9)
        data = get_clock(vm)
        assert (77 * SECOND + 9, 14) == (data.clock, data.flags)

    in_time(body)


@pytest.mark.spec("api.set-clock.rule.realtime", "api.set-clock.rule.never-back")
@pytest.mark.parametrize(("ago", "added"), [(3 * SECOND, 3 * SECOND), (0, 0), (-1, 0), (-SECOND, 0)])
def test_the_real_time_that_passed_is_added(ago: int, added: int) -> None:
    """With KVM_CLOCK_REALTIME; a real time in the future adds nothing."""

    async def body() -> None:
        vm = X86Vm()
        await fabric.sleep(10 * SECOND)
        set_clock(vm, 500, REALTIME, REAL_START + 10 * SECOND - ago)
        assert 500 + added == get_clock(vm).clock
        set_clock(vm, 500, 0, REAL_START)
        assert 500 == get_clock(vm).clock

    in_time(body)


@pytest.mark.spec("api.set-clock.rule.others")
@pytest.mark.parametrize("flags", [STABLE, HOST_TSC, STABLE | HOST_TSC])
def test_the_other_flags_are_taken_without_effect(flags: int) -> None:
    """What KVM_GET_CLOCK gave may go back as it is."""
    vm = X86Vm()
    set_clock(vm, 500, flags, 1, 2)

    assert KvmClockData(500, 14, 0, REAL_START, TSC_START) == get_clock(vm)


@pytest.mark.spec("api.set-clock.EINVAL.flags")
@pytest.mark.parametrize("flags", [1, 16, 14 | 1 << 31])
def test_flags_that_are_none(flags: int) -> None:
    """EINVAL, and the clock is as it was."""
    vm = X86Vm()

    assert "EINVAL" == outcome(set_clock, vm, 500, flags)
    assert 0 == get_clock(vm).clock


@pytest.mark.spec("api.get-clock.EFAULT.user-ptr", "api.set-clock.EFAULT.user-ptr")
@pytest.mark.parametrize("request_", [requests.KVM_GET_CLOCK, requests.KVM_SET_CLOCK])
def test_a_clock_at_a_wild_address(request_: int) -> None:
    """EFAULT."""
    assert "EFAULT" == outcome(X86Vm().vm.ioctl, request_, 8)


# Frequencies


def set_khz(vm: X86Vm, khz: int, number: int = 0) -> int:
    return vm.vcpus[number].ioctl(requests.KVM_SET_TSC_KHZ, khz)


def khz(vm: X86Vm, number: int = 0) -> int:
    return vm.vcpus[number].ioctl(requests.KVM_GET_TSC_KHZ)


@pytest.mark.spec("api.get-tsc-khz", "api.cap.get-tsc-khz", "api.get-tsc-khz.EIO.unstable")
def test_a_vcpu_has_the_hosts_frequency() -> None:
    """Unless told otherwise. The host's TSC is never unstable."""
    vm = X86Vm(tsc_khz=3_000_000)

    assert (3_000_000, 3_000_000) == (khz(vm), vm.vm.ioctl(requests.KVM_GET_TSC_KHZ))
    assert 1 == vm.host.check_extension(uapi.KVM_CAP_GET_TSC_KHZ)


@pytest.mark.spec("api.cap.tsc-control", "api.cap.vm-tsc-control")
@pytest.mark.parametrize("scaling", [False, True])
def test_capabilities_of_a_host_that_scales(scaling: bool) -> None:
    """They are there with TSC scaling only."""
    host = KvmHost(Kvm("x86_64", tsc_scaling=scaling))
    caps = uapi.KVM_CAP_TSC_CONTROL, uapi.KVM_CAP_VM_TSC_CONTROL

    assert [int(scaling)] * 2 == [host.check_extension(cap) for cap in caps]


@pytest.mark.spec("api.set-tsc-khz", "api.set-tsc-khz.rule.zero")
def test_a_vcpu_of_another_frequency() -> None:
    """Its TSC counts at it; 0 is the host's again."""

    async def body() -> None:
        vm = X86Vm(tsc_scaling=True)
        assert 0 == set_khz(vm, 1_000_000)
        before = get_msr(vm, x86.MSR_IA32_TSC)
        await fabric.sleep(1000)
        assert (1_000_000, 1000) == (khz(vm), get_msr(vm, x86.MSR_IA32_TSC) - before)
        assert (0, KHZ) == (set_khz(vm, 0), khz(vm))

    in_time(body)


@pytest.mark.spec("api.set-tsc-khz.rule.vm")
def test_the_frequency_of_vcpus_to_come() -> None:
    """On the VM fd; vCPUs that are there keep theirs, and then it is too late (EINVAL)."""
    host = KvmHost(Kvm("x86_64", tsc_scaling=True))
    vm = host.create_vm()
    assert 0 == vm.ioctl(requests.KVM_SET_TSC_KHZ, 1_000_000)
    vcpu = vm.create_vcpu(0)

    assert [1_000_000] * 2 == [fd.ioctl(requests.KVM_GET_TSC_KHZ) for fd in (vm, vcpu)]
    assert "EINVAL" == outcome(vm.ioctl, requests.KVM_SET_TSC_KHZ, 2_000_000)
    assert [1_000_000] * 2 == [fd.ioctl(requests.KVM_GET_TSC_KHZ) for fd in (vm, vcpu)]


@pytest.mark.spec("api.set-tsc-khz.rule.zero")
def test_zero_is_the_hosts_for_vcpus_to_come() -> None:
    """As on the vCPU fd."""
    vm = KvmHost(Kvm("x86_64", tsc_scaling=True)).create_vm()
    vm.ioctl(requests.KVM_SET_TSC_KHZ, 1_000_000)

    assert (0, KHZ) == (vm.ioctl(requests.KVM_SET_TSC_KHZ, 0), vm.ioctl(requests.KVM_GET_TSC_KHZ))


@pytest.mark.spec("api.set-tsc-khz.EINVAL.range")
def test_a_frequency_that_cannot_be_scaled_to() -> None:
    """The maximum itself is out; on the VM fd and on the vCPU's, where it is not kept."""
    maximum = 0x7FFF_FFFF
    vm = KvmHost(Kvm("x86_64", tsc_scaling=True)).create_vm()
    answers = [outcome(vm.ioctl, requests.KVM_SET_TSC_KHZ, value) for value in (maximum, maximum - 1, 1 << 32 | 5)]
    assert ["EINVAL", 0, 0] == answers
    assert 5 == vm.ioctl(requests.KVM_GET_TSC_KHZ)

    machine = X86Vm(tsc_scaling=True)
    assert ["EINVAL", 0, "EINVAL"] == [outcome(set_khz, machine, value) for value in (maximum, maximum - 1, maximum)]
    assert maximum - 1 == khz(machine)


@pytest.mark.spec("api.set-tsc-khz.EINVAL.range")
@pytest.mark.parametrize(("wanted", "answer"), [(2_599_350, 0), (2_599_349, "EINVAL"), (2_600_650, 0), (9_000_000, 0)])
def test_a_host_without_scaling_cannot_be_slowed_down(wanted: int, answer: object) -> None:
    """By more than 250 parts in a million. What was refused is read back all the same."""
    vm = X86Vm()

    assert answer == outcome(set_khz, vm, wanted)
    assert wanted == khz(vm)


def test_a_faster_tsc_than_the_hosts_is_caught_up_at_each_entry() -> None:
    """Without scaling; the guest sees it jump."""

    async def body() -> None:
        vm = X86Vm()
        set_khz(vm, 2 * KHZ)
        await fabric.sleep(SECOND)
        before = get_msr(vm, x86.MSR_IA32_TSC)
        await enter(vm)
        assert (KHZ * 1000, 2 * KHZ * 1000) == (before, get_msr(vm, x86.MSR_IA32_TSC))

    in_time(body)


# Offsets and the TSC's MSRs


@pytest.mark.spec("vcpu.tsc.offset", "vcpu.tsc.offset.rule.equation", "api.cap.vcpu-attributes")
def test_the_offset_of_a_vcpu() -> None:
    """It is there; host TSC plus offset is what the guest reads."""
    vm = X86Vm()
    assert vm.vcpus[0].has_attr(x86.KVM_VCPU_TSC_CTRL, x86.KVM_VCPU_TSC_OFFSET)
    assert 1 == vm.host.check_extension(uapi.KVM_CAP_VCPU_ATTRIBUTES)
    assert (-TSC_START) % 2**64 == offset(vm)
    set_offset(vm, 2**64 - TSC_START + 5)

    assert (2**64 - TSC_START + 5, 5) == (offset(vm), get_msr(vm, x86.MSR_IA32_TSC))


@pytest.mark.spec("vcpu.tsc.offset.rule.any-time")
def test_the_offset_changes_after_the_first_run() -> None:
    """As before it."""

    async def body() -> None:
        vm = X86Vm()
        await enter(vm)
        set_offset(vm, 10)
        assert (10, TSC_START + 10) == (offset(vm), get_msr(vm, x86.MSR_IA32_TSC))

    in_time(body)


@pytest.mark.spec("vcpu.tsc.offset.ENXIO.unsupported", "vcpu.tsc.offset.EFAULT.user-ptr")
@pytest.mark.parametrize(
    "request_", [requests.KVM_SET_DEVICE_ATTR, requests.KVM_GET_DEVICE_ATTR, requests.KVM_HAS_DEVICE_ATTR]
)
def test_attributes_that_a_vcpu_has_not(request_: int) -> None:
    """ENXIO for another group or number; EFAULT for a value at a wild address, which KVM_HAS does not look at."""
    vcpu = X86Vm().vcpus[0]
    answers = [
        outcome(vcpu.ioctl, request_, uapi.KvmDeviceAttr(0, group, attr, 8)) for group, attr in ((0, 1), (1, 0), (0, 0))
    ]

    assert ["ENXIO", "ENXIO", 0 if request_ == requests.KVM_HAS_DEVICE_ATTR else "EFAULT"] == answers


@pytest.mark.spec(
    "api.set-device-attr.ENOTTY.x86-ppc-vm",
    "api.get-device-attr.ENOTTY.x86-ppc-vm",
    "api.has-device-attr.ENOTTY.x86-ppc-vm",
)
@pytest.mark.parametrize(
    "request_", [requests.KVM_SET_DEVICE_ATTR, requests.KVM_GET_DEVICE_ATTR, requests.KVM_HAS_DEVICE_ATTR]
)
def test_an_x86_vm_has_no_attributes(request_: int) -> None:
    """ENOTTY, and the capability is not there; wherever the struct is."""
    vm = X86Vm()

    assert ["ENOTTY"] * 2 == [outcome(vm.vm.ioctl, request_, arg) for arg in (uapi.KvmDeviceAttr(), 8)]
    assert 0 == vm.vm.check_extension(uapi.KVM_CAP_VM_ATTRIBUTES)


@pytest.mark.spec("api.cap.sys-attributes")
def test_attributes_of_the_system_fd() -> None:
    """To be read, and asked for; not to be written: it knows no such request, which is EINVAL there."""
    host = X86Vm().host
    attr = uapi.KvmDeviceAttr(0, 0, 0, host.values.addr)
    calls = requests.KVM_GET_DEVICE_ATTR, requests.KVM_HAS_DEVICE_ATTR, requests.KVM_SET_DEVICE_ATTR

    assert 1 == host.check_extension(uapi.KVM_CAP_SYS_ATTRIBUTES)
    assert [0, 0, "EINVAL"] == [outcome(host.ioctl, request, attr) for request in calls]


def test_a_restored_tsc_joins_that_of_the_vcpu_before() -> None:
    """The VMM writes them one after the other, and time passes in between."""

    async def body() -> None:
        vm = X86Vm(2)
        set_msr(vm, x86.MSR_IA32_TSC, 1 << 40)
        await fabric.sleep(3_000_000)
        set_msr(vm, x86.MSR_IA32_TSC, 1 << 40, 1)
        assert offset(vm) == offset(vm, 1)
        await fabric.sleep(2 * SECOND)
        set_msr(vm, x86.MSR_IA32_TSC, 1 << 40, 1)
        assert offset(vm) != offset(vm, 1)

    in_time(body)


def give_tsc_adjust(vm: X86Vm) -> None:
    leaves = x86.KvmCpuidEntry2(1, ecx=1 << 21 | 1 << 24), x86.KvmCpuidEntry2(7, ebx=2)
    cpuid = x86.KvmCpuid2(2).pack() + b"".join(leaf.pack() for leaf in leaves)
    vm.vcpus[0].ioctl(requests.KVM_SET_CPUID2, bytearray(cpuid))


def test_tsc_adjust_of_a_vmm_moves_nothing() -> None:
    """It restores the TSC by itself."""
    vm = X86Vm()
    give_tsc_adjust(vm)
    before = offset(vm)
    set_msr(vm, x86.MSR_IA32_TSC_ADJUST, 1000)

    assert (before, 1000) == (offset(vm), get_msr(vm, x86.MSR_IA32_TSC_ADJUST))


def test_tsc_adjust_of_a_cpu_without_it() -> None:
    """A write is taken, and is without effect."""
    vm = X86Vm()

    assert (1, 0) == (set_msr(vm, x86.MSR_IA32_TSC_ADJUST, 1000), get_msr(vm, x86.MSR_IA32_TSC_ADJUST))


def test_a_guest_moves_its_tsc() -> None:
    """By TSC_ADJUST or by a write, which moves TSC_ADJUST; rdtsc shows it."""

    async def program(vm: X86Vm, cpu: Any) -> None:
        before = cpu.rdtsc()
        await cpu.wrmsr(x86.MSR_IA32_TSC_ADJUST, 500)
        vm.note(cpu.rdtsc() - before)
        await cpu.wrmsr(x86.MSR_IA32_TSC, before + 2000)
        vm.note((cpu.rdtsc() - before, await cpu.rdmsr(x86.MSR_IA32_TSC_ADJUST)))

    async def main(vm: X86Vm) -> None:
        give_tsc_adjust(vm)
        await one_run(vm)

    assert [500, (2000, 2000), "end"] == [what for _, what in simulate(main, program)]


LVT_TIMER = 0x832


def test_a_tsc_deadline_fires_when_the_tsc_gets_there() -> None:
    """2600 cycles at 2.6 GHz are 1 µs; the MSR is 0 after that."""

    async def program(vm: X86Vm, cpu: Any) -> None:
        async def tick(cpu: Any) -> None:
            vm.note((cpu.vector, await cpu.rdmsr(x86.MSR_IA32_TSC_DEADLINE)))
            cpu.eoi()

        await apic_on(cpu)
        cpu.set_vector(tick)
        cpu.sti()
        await cpu.wrmsr(LVT_TIMER, 2 << 17 | 0x40)
        await cpu.wrmsr(x86.MSR_IA32_TSC_DEADLINE, cpu.rdtsc() + 2600)
        await cpu.hlt()
        await cpu.wrmsr(x86.MSR_IA32_TSC_DEADLINE, cpu.rdtsc() - 1)
        await cpu.hlt()

    assert [(1000, (0x40, 0)), (1000, (0x40, 0)), (1000, "end")] == simulate(one_run, program)


# What the guest is told


@pytest.mark.spec("api.get-clock.rule.stable", "layout.pvclock-vcpu-time-info.rule.formula")
def test_the_page_says_what_the_clock_says() -> None:
    """A reader of the page gets, from any later TSC, the clock that KVM_GET_CLOCK has."""

    async def body() -> None:
        vm = X86Vm(2)
        for number in range(2):
            set_msr(vm, x86.MSR_KVM_SYSTEM_TIME_NEW, PAGE + 32 * number | 1, number)
        set_clock(vm, 5 * SECOND)
        vm.vcpus[1].mp_state = uapi.KVM_MP_STATE_RUNNABLE
        for number in range(2):
            await fabric.sleep(1_000_003)
            await enter(vm, number)
        for ns in (0, 1, 10**6, 10**9, 10**11):
            await fabric.sleep(ns)
            expected = get_clock(vm).clock
            for number in range(2):
                info = page(vm, PAGE + 32 * number)
                delta = get_msr(vm, x86.MSR_IA32_TSC, number) - info.tsc_timestamp
                shifted = delta << info.tsc_shift if info.tsc_shift >= 0 else delta >> -info.tsc_shift
                read = info.system_time + (shifted * info.tsc_to_system_mul >> 32)
                assert abs(read - expected) <= 3 + 2 * ns // 10**9
                assert (0, 1) == (info.version & 1, info.flags)

    in_time(body)


def test_a_page_is_written_when_the_vcpu_enters_the_guest() -> None:
    """Not when the VMM sets the MSR, whose memory may not have been restored yet."""

    async def body() -> None:
        vm = X86Vm()
        set_msr(vm, x86.MSR_KVM_SYSTEM_TIME_NEW, PAGE | 1)
        set_clock(vm, 5)
        assert PvclockVcpuTimeInfo() == page(vm)
        await enter(vm)
        assert 5 == page(vm).system_time

    in_time(body)


@pytest.mark.spec("layout.pvclock-vcpu-time-info.rule.read")
def test_the_version_of_a_page() -> None:
    """It goes up by two with each change, from what is there; an odd one is rounded up. An entry alone is no change."""

    async def body() -> None:
        vm = X86Vm()
        set_msr(vm, x86.MSR_KVM_SYSTEM_TIME_NEW, PAGE | 1)
        versions = []
        for step in ("first", "entry", "set", "odd", "last"):
            if step != "entry":
                set_clock(vm, 5)
            if step == "odd":
                vm.inside.memory.write_u32(PAGE, 7)
            if step == "last":
                vm.inside.memory.write_u32(PAGE, 0xFFFF_FFFE)
            await enter(vm)
            versions.append(page(vm).version)
        assert [2, 2, 4, 10, 0] == versions

    in_time(body)


def test_a_clock_set_while_the_guest_runs_shows_at_once() -> None:
    """It leaves the guest for that."""

    async def program(vm: X86Vm, cpu: Any) -> None:
        await cpu.wrmsr(x86.MSR_KVM_SYSTEM_TIME_NEW, PAGE | 1)
        await cpu.compute(100)
        vm.note(page(vm).system_time)

    async def main(vm: X86Vm) -> None:
        vm.at(40, set_clock, vm, 7000)
        await one_run(vm)

    assert [(100, 7000), (100, "end")] == simulate(main, program)


def test_a_disabled_page_is_left_alone() -> None:
    """Without the enable bit nothing is written; nor where there is no memory, which is no error."""

    async def body() -> None:
        vm = X86Vm()
        for value in (PAGE, 0xD000_0001):
            assert 1 == set_msr(vm, x86.MSR_KVM_SYSTEM_TIME, value)
            await enter(vm)
            assert value == get_msr(vm, x86.MSR_KVM_SYSTEM_TIME_NEW)
        assert PvclockVcpuTimeInfo() == page(vm)

    in_time(body)


@pytest.mark.parametrize(("msr", "flags"), [(x86.MSR_KVM_SYSTEM_TIME, 0), (x86.MSR_KVM_SYSTEM_TIME_NEW, 1)])
def test_a_guest_with_the_old_msr_is_not_told_of_stability(msr: int, flags: int) -> None:
    """Where the boot processor's guest uses it, KVM_GET_CLOCK has no flags either. A VMM's write says nothing."""

    async def program(vm: X86Vm, cpu: Any) -> None:
        await cpu.wrmsr(msr, PAGE | 1)
        vm.note(page(vm).flags)
        set_clock(vm, 0)
        vm.note(get_clock(vm).flags)

    async def main(vm: X86Vm) -> None:
        set_msr(vm, x86.MSR_KVM_SYSTEM_TIME, PAGE | 1)
        await one_run(vm)

    assert [flags, 14 * flags, "end"] == [what for _, what in simulate(main, program)]


def kvmclock_ctrl(vm: X86Vm) -> int:
    return vm.vcpus[0].ioctl(requests.KVM_KVMCLOCK_CTRL)


def test_a_guest_is_told_once_that_it_was_stopped() -> None:
    """PVCLOCK_GUEST_STOPPED is set at the next entry, and is there until the guest clears it."""

    async def body() -> None:
        vm = X86Vm()
        assert "EINVAL" == outcome(kvmclock_ctrl, vm)
        set_msr(vm, x86.MSR_KVM_SYSTEM_TIME_NEW, PAGE | 1)
        await enter(vm)
        assert (0, 0) == (kvmclock_ctrl(vm), page(vm).flags & STOPPED)
        seen = []
        for step in ("told", "changed", "cleared"):
            if step == "cleared":
                vm.inside.memory.write_u8(PAGE + 29, 1)
            if step != "told":
                set_clock(vm, 5)
            await enter(vm)
            seen.append(page(vm).flags & STOPPED)
        assert [STOPPED, STOPPED, 0] == seen

    in_time(body)


@pytest.mark.spec("layout.pvclock-wall-clock.rule.meaning")
@pytest.mark.parametrize(("before", "version"), [(0, 2), (1, 4), (6, 8), (0xFFFF_FFFE, 0)])
def test_the_wall_clock_is_when_the_clock_was_zero(before: int, version: int) -> None:
    """Written at once, with an even version that is not the one before."""

    async def body() -> None:
        vm = X86Vm()
        vm.inside.memory.write_u32(WALL, before)
        set_clock(vm, 3 * SECOND + 5)
        set_msr(vm, x86.MSR_KVM_WALL_CLOCK_NEW, WALL)
        wall = PvclockWallClock.unpack(vm.inside.memory.read(WALL, PvclockWallClock.SIZE))
        assert PvclockWallClock(version, 1_699_999_996, SECOND - 5) == wall
        assert WALL == get_msr(vm, x86.MSR_KVM_WALL_CLOCK)

    in_time(body)


@pytest.mark.spec("layout.pvclock-wall-clock.rule.once")
def test_the_wall_clock_is_written_once() -> None:
    """At the write of the MSR: it does not follow the clock that is set afterwards."""

    async def body() -> None:
        vm = X86Vm()
        set_msr(vm, x86.MSR_KVM_WALL_CLOCK_NEW, WALL)
        written = vm.inside.memory.read(WALL, PvclockWallClock.SIZE)
        set_clock(vm, 1000 * SECOND)
        assert written == vm.inside.memory.read(WALL, PvclockWallClock.SIZE)

    in_time(body)


def steal(vm: X86Vm) -> tuple[int, int, int]:
    """Stolen ns, version, preempted."""
    data = vm.inside.memory.read(STEAL, 17)
    ns, version, _flags, preempted = struct.unpack("<QIIB", data)
    return ns, version, preempted


@pytest.mark.spec("api.cap.steal-time")
def test_stolen_time_is_told() -> None:
    """Two vCPUs on one physical CPU: what one computes the other waits, also within one KVM_RUN."""

    async def main(vm: X86Vm) -> None:
        assert 1 == vm.host.check_extension(uapi.KVM_CAP_STEAL_TIME)
        set_msr(vm, x86.MSR_KVM_STEAL_TIME, STEAL | 1)
        host = Host(vm.kvm.engine, 1, slice_ns=1000)  # type: ignore[arg-type]
        for number in range(2):
            vm.vcpu(number).share(host)
            vm.vcpus[number].mp_state = uapi.KVM_MP_STATE_RUNNABLE
        with trio.move_on_at(1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.run, 0)
                nursery.start_soon(vm.run, 1)

    async def reads(vm: X86Vm, cpu: Any) -> None:
        await cpu.compute(3000)
        stolen, version, preempted = steal(vm)
        vm.note(("stolen", stolen == vm.vcpu(0).stolen_ns > 0, version & 1, preempted))

    async def computes(vm: X86Vm, cpu: Any) -> None:
        await cpu.compute(3000)

    assert ("stolen", True, 0, 0) in [what for _, what in simulate(main, reads, computes)]


def test_a_vcpu_that_is_with_its_vmm_counts_as_preempted() -> None:
    """So that the guest's other vCPUs do not wait for it; not while it is in the guest."""

    async def main(vm: X86Vm) -> None:
        set_msr(vm, x86.MSR_KVM_STEAL_TIME, STEAL | 1)
        vm.inside.memory.write_u32(STEAL + 8, 5)
        await one_run(vm)
        vm.note(steal(vm))

    async def program(vm: X86Vm, cpu: Any) -> None:
        vm.note(steal(vm))

    assert [(0, 8, 0), "end", (0, 8, 1)] == [what for _, what in simulate(main, program)]


@pytest.mark.parametrize("bit", range(1, 6))
def test_reserved_bits_of_the_steal_time_msr(bit: int) -> None:
    """Refused; the structure is aligned to 64 bytes."""
    assert 0 == set_msr(X86Vm(), x86.MSR_KVM_STEAL_TIME, STEAL | 1 | 1 << bit)
