"""A guest counts the ticks of its PIT to know the time, and shares a CPU: what comes while it waits is to be kept."""

import trio

import fabric
from fabric.kvm import Kvm
from fabric.kvm.typed import Host, pin_route
from fabric.uapi import ioctl, x86
from fabric.vcpu.host import Host as Cpus

PIC_SETUP = (0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE)
COUNT = 1193  # 1 kHz


async def timekeeper(cpu):
    ticks = 0

    async def tick(cpu):
        nonlocal ticks
        ticks += 1
        await cpu.outp(0x20, 1, 0x20)  # EOI

    cpu.set_gate(0x20, tick)
    for port, value in (*PIC_SETUP, (0x43, 0x34), (0x40, COUNT & 0xFF), (0x40, COUNT >> 8)):
        await cpu.outp(port, 1, value)
    cpu.sti()
    while fabric.now() < 1_000_000_000:
        await cpu.compute(100_000)
    print(f"  after {fabric.now() / 1e6:.0f} ms it has counted {ticks}")
    await cpu.outp(0x80, 1, 0)


async def neighbour(cpu):
    while True:
        await cpu.compute(1_000_000)


async def share(reinject):
    kvm = Kvm("x86_64")
    cpus = Cpus(kvm.engine, 1, slice_ns=4_000_000)
    vcpus = []
    for program in (timekeeper, neighbour):
        vm = Host(kvm).create_vm()
        vm.ioctl(ioctl.KVM_CREATE_IRQCHIP)
        vm.set_routes([pin_route(0, 0)])  # to the 8259 only, as this guest leaves the IOAPIC alone
        vm.ioctl(ioctl.KVM_CREATE_PIT2, x86.KvmPitConfig())
        vm.ioctl(ioctl.KVM_REINJECT_CONTROL, x86.KvmReinjectControl(reinject))
        vcpu = vm.create_vcpu(0)
        kvm.vcpu(vcpu.fd).share(cpus)
        vcpu.load(program)
        vcpus.append(vcpu)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vcpus[1].run)
        await vcpus[0].run()
        nursery.cancel_scope.cancel()
    return kvm.statement()


print("ticks merge (pit_reinject 0)")
wrong = fabric.run(share, 0)
print("ticks are kept (pit_reinject 1)")
print(wrong + fabric.run(share, 1))
