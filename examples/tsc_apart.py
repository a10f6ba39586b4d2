"""Two vCPUs get their TSCs back. The value that was read, written 3 s apart, sets them apart; the offset does not."""

import fabric
from fabric.kvm import Kvm
from fabric.kvm.typed import Host
from fabric.uapi import ioctl, x86

TSC, OFFSET = x86.MSR_IA32_TSC, (x86.KVM_VCPU_TSC_CTRL, x86.KVM_VCPU_TSC_OFFSET)


async def guest(cpu):
    print(f"  CPU {cpu.number} reads {cpu.rdtsc() / 2.6e9:.3f} s")
    await cpu.outp(0x80, 1, 0)


async def restore(by_offset):
    kvm = Kvm("x86_64", tsc_khz=2_600_000, tsc_start=0)
    vm = Host(kvm).create_vm()
    vcpus = [vm.create_vcpu(number) for number in range(2)]
    for vcpu in vcpus:
        if by_offset:
            vcpu.set_attr(*OFFSET, 1000 * 2_600_000_000)
        else:
            msr = x86.KvmMsrs(1).pack() + x86.KvmMsrEntry(TSC, 0, 1000 * 2_600_000_000).pack()
            vcpu.ioctl(ioctl.KVM_SET_MSRS, bytearray(msr))
        await fabric.sleep(3 * 10**9)  # there is much else to be read from the network: within 1 s KVM sets it right
    for vcpu in vcpus:
        vcpu.load(guest)
        await vcpu.run()
    data = bytearray(x86.KvmClockData.SIZE)
    vm.ioctl(ioctl.KVM_GET_CLOCK, data)
    stable = x86.KvmClockData.unpack(data).flags & x86.KVM_CLOCK_TSC_STABLE
    print(f"  the clock is {'stable' if stable else 'not stable: the guest has to keep its CPUs in step by itself'}")
    return kvm.statement()


print("the same value written to both, 3 s apart")
wrong = fabric.run(restore, False)
print("the same offset set for both, 3 s apart")
print(wrong + fabric.run(restore, True))
