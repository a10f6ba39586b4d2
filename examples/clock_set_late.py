"""A guest goes on in another machine. If it runs before KVM_SET_CLOCK, its clock goes back to 0 and jumps later."""

import trio

import fabric
from fabric.kvm import Kvm
from fabric.kvm.typed import Host
from fabric.uapi import ioctl, x86
from fabric.uapi.usermem import SparseMemory

PAGE = 0x1000


async def clock(cpu):
    """ns, as a guest reads them off its kvmclock page."""
    then, ns = await cpu.load(PAGE + 8, 8), await cpu.load(PAGE + 16, 8)
    multiplier, shift = await cpu.load(PAGE + 24, 4), await cpu.load(PAGE + 28, 1)
    delta = cpu.rdtsc() - then
    delta = delta << shift if shift < 128 else delta >> 256 - shift
    return ns + (delta * multiplier >> 32)


async def guest(cpu):
    await cpu.wrmsr(x86.MSR_KVM_SYSTEM_TIME_NEW, PAGE | 1)
    before = 0
    for _ in range(5):
        await cpu.compute(1_000_000_000)
        now = await clock(cpu)
        print(f"  {now / 1e9:6.3f} s on the guest's clock, {(now - before) / 1e9:+.3f} s")
        before = now


def machine():
    user = SparseMemory()
    kvm = Kvm("x86_64", user_memory=user)
    vm = Host(kvm).create_vm()
    vm.ioctl(ioctl.KVM_CREATE_IRQCHIP)
    vm.set_memory(0, 0, 0x2000, user.map(0x2000))
    return kvm, vm, vm.create_vcpu(0)


async def run(vcpu, seconds):
    with trio.move_on_after(seconds):
        await vcpu.run()


async def move(clock_first):
    source, vm, vcpu = machine()
    vcpu.load(guest)
    await run(vcpu, 2.5)
    saved = bytearray(x86.KvmClockData.SIZE)
    vm.ioctl(ioctl.KVM_GET_CLOCK, saved)

    destination, vm, other = machine()
    other.load(vcpu.unload())
    msr = x86.KvmMsrs(1).pack() + x86.KvmMsrEntry(x86.MSR_KVM_SYSTEM_TIME_NEW, 0, PAGE | 1).pack()
    other.ioctl(ioctl.KVM_SET_MSRS, bytearray(msr))
    if not clock_first:
        await run(other, 1)
    data = x86.KvmClockData.unpack(saved)
    vm.ioctl(ioctl.KVM_SET_CLOCK, x86.KvmClockData(data.clock, x86.KVM_CLOCK_REALTIME, 0, data.realtime))
    await run(other, 10)
    return source.statement() + destination.statement()


print("KVM_RUN, then KVM_SET_CLOCK: time goes back")
wrong = fabric.run(move, False)
print("KVM_SET_CLOCK, then KVM_RUN")
print(wrong + fabric.run(move, True))
