"""A guest is saved and goes on an hour later. KVM_KVMCLOCK_CTRL is in no saved state: it is for the new vCPU."""

import fabric
from fabric.kvm import Kvm
from fabric.kvm.typed import Host
from fabric.uapi import ioctl, x86
from fabric.uapi.usermem import SparseMemory

PAGE, FLAGS, STOPPED = 0x1000, 29, 2


async def watchdog(cpu):
    """What a guest does that finds a long time to have passed."""
    flags = await cpu.load(PAGE + FLAGS, 1)
    print("  the host had stopped us" if flags & STOPPED else "  soft lockup: CPU 0 stuck for 3600 s")
    await cpu.outp(0x80, 1, 0)


def machine():
    user = SparseMemory()
    kvm = Kvm("x86_64", user_memory=user)
    vm = Host(kvm).create_vm()
    vm.ioctl(ioctl.KVM_CREATE_IRQCHIP)
    address = user.map(0x2000)
    vm.set_memory(0, 0, 0x2000, address)
    vcpu = vm.create_vcpu(0)
    msr = x86.KvmMsrs(1).pack() + x86.KvmMsrEntry(x86.MSR_KVM_SYSTEM_TIME_NEW, 0, PAGE | 1).pack()
    vcpu.ioctl(ioctl.KVM_SET_MSRS, bytearray(msr))
    return kvm, vcpu, user, address


async def move(told_on_source):
    source, vcpu, memory, address = machine()
    if told_on_source:
        vcpu.ioctl(ioctl.KVM_KVMCLOCK_CTRL)
    saved = memory.read(address, 0x2000)  # KVM writes the note when the vCPU runs, and it does not run here again
    await fabric.sleep(3600 * 10**9)

    destination, other, memory, address = machine()
    memory.write(address, saved)
    if not told_on_source:
        other.ioctl(ioctl.KVM_KVMCLOCK_CTRL)
    other.load(watchdog)
    await other.run()
    return source.statement() + destination.statement()


print("KVM_KVMCLOCK_CTRL before the snapshot")
wrong = fabric.run(move, True)
print("KVM_KVMCLOCK_CTRL after it was restored")
print(wrong + fabric.run(move, False))
