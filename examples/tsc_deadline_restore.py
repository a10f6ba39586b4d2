"""A guest waits for its TSC deadline and is moved. Restored before the TSC, the timer is set by the wrong counter."""

import trio

import fabric
from fabric.kvm import Kvm
from fabric.kvm.typed import Host
from fabric.uapi import ioctl, x86

APIC, SVR, LVT_TIMER = 0xFEE0_0000, 0xF0, 0x320
TSC, DEADLINE = x86.MSR_IA32_TSC, x86.MSR_IA32_TSC_DEADLINE


async def guest(cpu):
    async def tick(cpu):
        print(f"  the timer fired at {fabric.now() / 1e6:.3f} ms")
        cpu.eoi()

    cpu.set_vector(tick)
    cpu.sti()
    await cpu.store(APIC + SVR, 4, 0x1FF)
    await cpu.store(APIC + LVT_TIMER, 4, 2 << 17 | 0x40)  # TSC-deadline mode
    await cpu.wrmsr(DEADLINE, cpu.rdtsc() + 5 * 2_600_000)  # in 5 ms
    await cpu.hlt()
    await cpu.outp(0x80, 1, 0)


def machine():
    kvm = Kvm("x86_64", tsc_khz=2_600_000)
    vm = Host(kvm).create_vm()
    vm.ioctl(ioctl.KVM_CREATE_IRQCHIP)
    vcpu = vm.create_vcpu(0)
    cpuid = x86.KvmCpuid2(1).pack() + x86.KvmCpuidEntry2(1, ecx=1 << 24).pack()  # it has TSC deadlines
    vcpu.ioctl(ioctl.KVM_SET_CPUID2, bytearray(cpuid))
    return kvm, vcpu


def msr(vcpu, request, index, value=0):
    buffer = bytearray(x86.KvmMsrs(1).pack() + x86.KvmMsrEntry(index, 0, value).pack())
    vcpu.ioctl(request, buffer)
    return x86.KvmMsrEntry.unpack(buffer[x86.KvmMsrs.SIZE :]).data


async def move(order):
    source, vcpu = machine()
    msr(vcpu, ioctl.KVM_SET_MSRS, TSC, 1 << 40)
    vcpu.load(guest)
    with trio.move_on_after(0.002):  # stopped after 2 ms
        await vcpu.run()
    lapic = bytearray(x86.KvmLapicState.SIZE)
    vcpu.ioctl(ioctl.KVM_GET_LAPIC, lapic)
    saved = {index: msr(vcpu, ioctl.KVM_GET_MSRS, index) for index in (TSC, DEADLINE)}

    destination, other = machine()
    other.ioctl(ioctl.KVM_SET_LAPIC, lapic)  # the timer's mode: without it the deadline is not even taken
    for index in order:
        msr(other, ioctl.KVM_SET_MSRS, index, saved[index])
    other.load(vcpu.unload())
    other.mp_state = vcpu.mp_state  # halted
    with trio.move_on_after(60) as patience:
        await other.run()
    if patience.cancelled_caught:
        print("  a minute later the guest still waits")
    return source.statement() + destination.statement()


print("deadline, then TSC: the timer is set for a TSC of 0, and stays so")
wrong = fabric.run(move, (DEADLINE, TSC))
print("TSC, then deadline")
print(wrong + fabric.run(move, (TSC, DEADLINE)))
