"""A guest that takes three timer interrupts; what became of them is printed at the end."""

import fabric
from fabric.vmm import run_guest


async def tick(cpu):
    print(f"CPU {cpu.number} was interrupted at {fabric.now()} ns")


async def guest(cpu, gic):
    for ms in (1, 2, 3):
        await gic.set_timer(cpu, ms * 1_000_000, tick)
        await cpu.wait_for_interrupt()


print(fabric.run(run_guest, "arm64-gicv3", guest))
