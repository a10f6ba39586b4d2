"""A guest of two CPUs is saved in the middle of its work and goes on in another machine, and does not notice."""

import trio

import fabric
from fabric.migration import restore, save
from fabric.vmm import Arm64Gicv3


def guest(machine):
    """CPU 0 sets its timer and interrupts CPU 1, which works on each interrupt for a while."""
    gic = machine.driver()
    served = []

    async def tick(cpu):
        await gic.send_ipi(cpu, 1)

    async def serve(cpu):
        await cpu.compute(700_000)
        served.append(f"{fabric.now()} ns")

    async def program(cpu):
        if cpu.number == 0:
            await gic.start(cpu)
            gic.on_ipi(serve)
        await gic.start_cpu(cpu)
        cpu.unmask()
        while cpu.number:
            await cpu.wait_for_interrupt()
        await machine.start_secondary(cpu, 1)
        for ms in (1, 2, 3):
            await gic.set_timer(cpu, ms * 1_000_000, tick)
            await cpu.wait_for_interrupt()
        await cpu.compute(1_000_000)
        print("served at", ", ".join(served))
        await cpu.system_off()

    return program


async def main():
    first, second = Arm64Gicv3(2), Arm64Gicv3(2)
    first.load(guest(first))

    with trio.move_on_after(0.0022):  # 2.2 ms of virtual time, that is until CPU 1 is in its second interrupt
        await first.run()
    saved = save(first)
    first.close()
    gic = saved.state.gic
    print(f"saved at {fabric.now()} ns: {len(saved.state.vcpus)} vCPUs, {len(gic.registers)} distributor registers,")
    print(f"{sum(len(slot.pages) for slot in saved.state.slots)} pages of guest memory")

    restore(saved, second)
    await second.run()
    print(first.kvm.statement() + second.kvm.statement())


fabric.run(main)
