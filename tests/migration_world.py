"""A machine and its surroundings that may be saved and restored at any moment of their run.

``run(plan, cuts)`` runs guests on several vCPUs under all kinds of interrupts up to the plan's end, cut at the given
times: there the vCPUs are stopped, the machine is saved, and goes on in a fresh VM. What comes back says all that
happened, with times.

The guests keep off what a real kernel does not bring across: no two interrupts of a vCPU have the same priority, at
most three are active at once, the timer is the virtual one. ``docs/migration.md`` has the list.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio
from engine_programs import here
from migration_guests import (
    DEVICE,
    FIRST_LPI,
    GICC,
    GICD,
    GICR,
    GITS,
    LEVELS,
    PPI_PMU,
    PPI_VTIMER,
    Gicv2Guest,
    Guest,
)

import fabric
from fabric.clock import Priority
from fabric.devices.arm.vgic_its_commands import encode
from fabric.errors import KvmError
from fabric.kvm import Kvm
from fabric.kvm.typed import Host, msi_route, pin_route
from fabric.migration import ArmVm, Irqfd, Saved, restore, save
from fabric.trace.ledger import LedgerStatement
from fabric.uapi import arm64 as arm
from fabric.uapi import kvm as uapi
from fabric.uapi.kvm import KvmRunMmio
from fabric.uapi.usermem import SparseMemory

RAM, RAM_SIZE = 0x4000_0000, 1 << 20
QUEUE, DEVICE_TABLE, COLLECTION_TABLE, ITT = RAM, RAM + 0x1_0000, RAM + 0x2_0000, RAM + 0x3_0000
CONFIG, PENDING = RAM + 0x4_0000, RAM + 0x6_0000
VALID = 1 << 63
EDGES, RESAMPLED = range(32, 36), range(48, 50)
LPIS = 6
DEVID = 8

Record = tuple[int, str, int, object]
"""Time, what, vCPU, and INTID or value."""


@attrs.frozen
class Plan:
    """What is run. All times in it come from the seed, as hundreds to ten thousands of ns."""

    seed: int
    gic: int = 3
    vcpus: int = 2
    split: tuple[bool, ...] = (False, True, False, True)
    """EOImode of each vCPU."""
    end_ns: int = 150_000
    interrupts: int = 60
    """How many the devices raise."""
    pmu: bool = False
    """vCPUs have a PMU, and guests count cycles up to an overflow."""
    exit_ns: int = 0
    wakeup_ns: int = 0
    injection_ns: int = 0
    eoi_ns: int = 0


@attrs.define
class Outcome:
    """What happened."""

    log: list[Record]
    statement: LedgerStatement
    acts: dict[int, set[int]]
    """Times at which vCPUs went on by themselves."""

    def ties(self) -> bool:
        """Whether two vCPUs went on within one nanosecond: then nothing says who came first."""
        return any(len(cpus) > 1 for cpus in self.acts.values())

    def of(self, cpu: int) -> list[Record]:
        """What concerns one vCPU, in order."""
        return [record for record in self.log if record[2] == cpu]


class Log:
    """Listens to the interrupt controller."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def note(self, what: str, cpu: int, value: object) -> None:
        """One record."""
        self.records.append((fabric.now(), what, cpu, value))

    def pending(self, cpu: int, intid: int) -> None:
        """See IrqEvents."""
        self.note("pending", cpu, intid)

    def coalesced(self, cpu: int, intid: int) -> None:
        """See IrqEvents."""
        self.note("coalesced", cpu, intid)

    def acknowledged(self, cpu: int, intid: int) -> None:
        """See IrqEvents."""
        self.note("acknowledged", cpu, intid)

    def completed(self, cpu: int, intid: int) -> None:
        """See IrqEvents."""
        self.note("completed", cpu, intid)

    def dropped(self, cpu: int, intid: int, reason: str) -> None:
        """See IrqEvents."""
        self.note(f"dropped: {reason}", cpu, intid)


def private_priorities(first: int) -> int:
    """GICD_IPRIORITYR or GICR_IPRIORITYR of four SGIs or PPIs: SGIs 0 to 7, the timer and the PMU have one each."""
    ranks = {**{sgi: sgi for sgi in range(8)}, PPI_VTIMER: 8, PPI_PMU: 9}
    return sum((0x98 + 8 * ranks.get(first + n, 10)) << 8 * n for n in range(4))


class World:
    """The machine, its devices, its guests, and the VMM's threads."""

    def __init__(self, plan: Plan, look: Callable[[Saved], object]) -> None:
        self.plan = plan
        self.look = look
        self.log = Log()
        self.acts: dict[int, set[int]] = defaultdict(set)
        self.statements: list[LedgerStatement] = []
        self.generation = Counter[int]()
        """How often each vCPU was powered on: the guest's memory of it."""
        self.reads = Counter[int]()
        self.service_until = [0] * plan.vcpus
        """When the VMM has served the exit of each vCPU."""
        self.stopping = False
        self.wires: dict[int, Any] = {}
        """GSI to irqfd."""
        self.armed: set[tuple[int, int]] = set()
        """vCPUs and their PPIs whose device is set to raise them: the guest's memory of it."""
        self.up: set[int] = set()
        """The level-triggered SPIs whose lines are up."""
        self.vm = self.build()
        self.settle()
        for number, vcpu in enumerate(self.vm.vcpus):
            vcpu.load(self.program(number))

    # -- the machine

    def host(self) -> Host:
        """A host of its own for every VM."""
        return Host(Kvm("aarch64", user_memory=SparseMemory(), host_gic=self.plan.gic))

    def build(self) -> ArmVm:
        """Create and configure it, as firmware and drivers would."""
        plan = self.plan
        host = self.host()
        vm = host.create_vm()
        addr = host.kvm.user_memory.map(RAM_SIZE)
        vm.set_memory(0, RAM, RAM_SIZE, addr)
        vcpus = [vm.create_vcpu(number) for number in range(plan.vcpus)]
        features = (arm.KVM_ARM_VCPU_PSCI_0_2, *([arm.KVM_ARM_VCPU_PMU_V3] if plan.pmu else []))
        init = arm.KvmVcpuInit(arm.KVM_ARM_TARGET_GENERIC_V8, (sum(1 << n for n in features), *[0] * 6))
        for vcpu in vcpus:
            vcpu.init(features)
        made = ArmVm(
            host,
            vm,
            vcpus,
            gic_version=plan.gic,
            vcpu_ids=list(range(plan.vcpus)),
            inits=[init] * plan.vcpus,
            slots=[uapi.KvmUserspaceMemoryRegion(0, 0, RAM, RAM_SIZE, addr)],
        )
        self.make_gic(made)
        for vcpu in vcpus if plan.pmu else ():
            vcpu.set_attr(arm.KVM_ARM_VCPU_PMU_V3_CTRL, arm.KVM_ARM_VCPU_PMU_V3_IRQ, PPI_PMU)
            vcpu.set_attr(arm.KVM_ARM_VCPU_PMU_V3_CTRL, arm.KVM_ARM_VCPU_PMU_V3_INIT)
        made.routes = [pin_route(intid - 32, intid - 32) for intid in (*EDGES, *RESAMPLED)]
        made.routes += [msi_route(100 + event, GITS + 0x1_0040, event, DEVID) for event in range(LPIS)]
        vm.set_routes(made.routes)
        for route in made.routes:
            event = host.kvm.eventfd()
            resample = host.kvm.eventfd() if route.gsi + 32 in RESAMPLED else None
            vm.irqfd(event, route.gsi, resamplefd=resample)
            made.irqfds.append(Irqfd(route.gsi, event, resample))
        self.configure(made)
        return made

    def make_gic(self, vm: ArmVm) -> None:
        """Create and initialise it."""
        vm.gic = vm.fd.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V3)
        vm.its = [vm.fd.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_ITS)]
        region = self.plan.vcpus << 52 | GICR
        vm.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, 64)
        vm.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_DIST, GICD)
        vm.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, region)
        vm.its[0].set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_ITS_ADDR_TYPE, GITS)
        vm.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CTRL, arm.KVM_DEV_ARM_VGIC_CTRL_INIT)

    def configure(self, vm: ArmVm) -> None:
        """Triggers, priorities, targets, enables; the CPU interfaces; the ITS and its maps."""
        plan, gic, its = self.plan, vm.controller, vm.its[0]
        memory = vm.memory
        base = vm.slots[0].userspace_addr - RAM

        def dist(offset: int, value: int) -> None:
            gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, offset, value)

        def redist(cpu: int, offset: int, value: int) -> None:
            gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, cpu << 32 | offset, value)

        dist(0x0, 2)
        self.configure_spis(dist)
        for intid in (*EDGES, *LEVELS, *RESAMPLED):
            dist(0x6000 + 8 * intid, intid % plan.vcpus)
        memory.write(base + CONFIG, bytes((0x08 * (1 + n)) | 1 for n in range(LPIS)))
        for cpu in range(plan.vcpus):
            for half, word in enumerate((CONFIG | 15 | 0x780, 0, PENDING + 0x1_0000 * cpu | 0x780, 0)):
                redist(cpu, 0x70 + 4 * half, word)
            redist(cpu, 0, 1)
            redist(cpu, 0x1_0100, 0xFFFF)
            for first in range(0, 32, 4):
                redist(cpu, 0x1_0400 + first, private_priorities(first))
            for encoding, value in ((0xC230, 0xF8), (0xC667, 1), (0xC664, 0x8400 | plan.split[cpu] << 1)):
                gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, cpu << 32 | encoding, value)
        for offset, value in ((0x80, QUEUE), (0x100, DEVICE_TABLE), (0x108, COLLECTION_TABLE)):
            its.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, VALID | value)
        its.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, 0, 1)
        commands = [encode("MAPC", ICID=cpu, RDbase=cpu, V=1) for cpu in range(plan.vcpus)]
        commands.append(encode("MAPD", DeviceID=DEVID, Size=3, ITT_addr=ITT >> 8, V=1))
        commands += [
            encode("MAPTI", DeviceID=DEVID, EventID=event, pINTID=FIRST_LPI + event, ICID=event % plan.vcpus)
            for event in range(LPIS)
        ]
        memory.write(base + QUEUE, b"".join(commands))
        its.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, 0x88, 32 * len(commands))

    @staticmethod
    def configure_spis(dist: Callable[[int, int], None]) -> None:
        """What both GICs have alike."""
        dist(0xC08, sum(2 << 2 * (intid - 32) for intid in EDGES))
        dist(0xC0C, 0)
        ranks = {intid: n for n, intid in enumerate((*LEVELS, *RESAMPLED, *EDGES))}
        for first in range(32, 64, 4):
            dist(0x400 + first, sum((ranks.get(first + n, 0) * 8 + 0x40) << 8 * n for n in range(4)))
        dist(0x104, sum(1 << intid - 32 for intid in ranks))

    def settle(self) -> None:
        """Be the world of the VM there is now: listen to it, find its wires, know what its host costs."""
        vm, plan = self.vm, self.plan
        vm.host.kvm.vm(vm.fd.fd).listen(self.log)
        self.wires = {irqfd.gsi: irqfd for irqfd in vm.irqfds}
        for vcpu in vm.vcpus:
            vm.host.kvm.vcpu(vcpu.fd).costs = fabric.vcpu.Costs(
                exit_ns=plan.exit_ns, wakeup_ns=plan.wakeup_ns, injection_ns=plan.injection_ns, eoi_ns=plan.eoi_ns
            )

    # -- the devices

    async def devices(self) -> None:
        """Raise interrupts at the plan's times."""
        here().set_priority(Priority.DEVICE)
        draw = random.Random(f"{self.plan.seed}/devices")
        times = sorted(draw.randrange(1_000, self.plan.end_ns) for _ in range(self.plan.interrupts))
        for at in times:
            await fabric.sleep(at - fabric.now())
            kind = draw.randrange(5)
            if kind == 0:
                self.wires[draw.choice(EDGES) - 32].event.signal()
            elif kind == 1:
                intid = draw.choice(RESAMPLED)
                self.up.add(intid)
                self.wires[intid - 32].event.signal()
            elif kind < 4:
                self.message(draw.randrange(LPIS), by_irqfd=kind == 2)
            else:
                self.drive(draw.choice(LEVELS), True)

    def message(self, event: int, *, by_irqfd: bool) -> None:
        """An MSI."""
        if by_irqfd:
            self.wires[100 + event].event.signal()
        else:
            self.vm.fd.signal_msi(GITS + 0x1_0040, event, DEVID)

    def drive(self, intid: int, level: bool) -> None:
        """KVM_IRQ_LINE."""
        self.up = self.up | {intid} if level else self.up - {intid}
        self.vm.fd.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI << arm.KVM_ARM_IRQ_TYPE_SHIFT | intid, int(level))

    # -- the guests

    def program(self, number: int) -> Callable[[Any], Awaitable[object]]:
        """The guest of a vCPU."""

        async def program(cpu: Any) -> None:
            self.generation[number] += 1
            draw = random.Random(f"{self.plan.seed}/{number}/{self.generation[number]}")
            guest = self.guest_class(self, number, draw)
            await guest.run(cpu)

        return program

    guest_class = Guest

    # -- the VMM

    async def thread(self, number: int) -> None:
        """The thread of a vCPU: KVM_RUN and its exits."""
        while not self.stopping:
            if self.service_until[number] > fabric.now():
                await fabric.sleep(self.service_until[number] - fabric.now())
            try:
                await self.vm.vcpus[number].run()
            except KvmError:
                continue  # EINTR
            area = self.vm.vcpus[number].run_area
            mmio = KvmRunMmio.unpack(bytes(area[uapi.KVM_RUN_EXIT : uapi.KVM_RUN_EXIT + KvmRunMmio.SIZE]))
            if mmio.is_write:
                self.drive(LEVELS[0] + (mmio.phys_addr - DEVICE) // 4 % len(LEVELS), False)
            else:
                self.reads[number] += 1
                at = uapi.KVM_RUN_EXIT + 8
                area[at : at + 8] = (self.plan.seed * 1_000 + self.reads[number]).to_bytes(8, "little")
            if number % 2:  # those without a timer, whose line a vCPU in the VMM would see late
                self.service_until[number] = fabric.now() + 700 + 13 * number

    async def resampler(self, gsi: int) -> None:
        """A device that learns when its interrupt has ended."""
        here().set_priority(Priority.DEVICE)
        while True:
            await self.wires[gsi].resample.wait()
            self.up.discard(gsi + 32)
            self.log.note("resampled", -1, gsi)

    async def threads(self) -> None:
        """All that is stopped for a save."""
        async with trio.open_nursery() as nursery:
            for number in range(self.plan.vcpus):
                nursery.start_soon(self.thread, number)
            for intid in RESAMPLED:
                nursery.start_soon(self.resampler, intid - 32)

    async def run_until(self, at_ns: int, priority: Priority, how: str) -> None:
        """Run the threads up to that moment, and stop them."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.threads)
            here().set_priority(priority)
            await fabric.sleep(at_ns - fabric.now())
            if how == "EINTR":
                self.stopping = True
                for vcpu in self.vm.vcpus:
                    self.vm.host.kvm.vcpu(vcpu.fd).interrupt()
                here().set_priority(Priority.LAST)
                await fabric.sleep(0)
            nursery.cancel_scope.cancel()
        self.stopping = False

    def move(self) -> None:
        """Save the machine, restore it into a fresh VM, and go on in that."""
        first = self.vm
        counts = {irqfd.gsi: irqfd.resample.event.count for irqfd in first.irqfds if irqfd.resample}
        first.lines = sorted(intid for intid in self.up if not counts.get(intid - 32))
        saved = save(first)
        self.look(saved)
        first.host.kvm.vm(first.fd.fd).listen(None)
        self.vm = ArmVm(self.host())
        restore(saved, self.vm)
        self.settle()
        for gsi, count in counts.items():
            if count:
                self.wires[gsi].resample.signal(count)
        first.close()
        self.statements.append(first.host.kvm.statement())


class Gicv2World(World):
    """The same with a GICv2, which has no LPIs: messages are edges."""

    guest_class = Gicv2Guest

    def make_gic(self, vm: ArmVm) -> None:
        """Create and initialise it."""
        vm.gic = vm.fd.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V2)
        vm.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, 64)
        vm.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_V2_ADDR_TYPE_DIST, GICD)
        vm.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_V2_ADDR_TYPE_CPU, GICC)
        vm.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CTRL, arm.KVM_DEV_ARM_VGIC_CTRL_INIT)

    def configure(self, vm: ArmVm) -> None:
        """Triggers, priorities, targets, enables; the CPU interfaces."""
        gic = vm.controller

        def dist(offset: int, value: int, cpu: int = 0) -> None:
            gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, cpu << 32 | offset, value)

        dist(0x0, 1)
        self.configure_spis(dist)
        for first in range(32, 64, 4):
            dist(0x800 + first, sum(1 << (first + n) % self.plan.vcpus << 8 * n for n in range(4)))
        for cpu in range(self.plan.vcpus):
            for first in range(0, 32, 4):
                dist(0x400 + first, private_priorities(first), cpu)
            for offset, value in ((0x4, 0xF8 >> 3), (0x8, 2), (0x0, 1 | self.plan.split[cpu] << 9)):
                gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CPU_REGS, cpu << 32 | offset, value)

    def message(self, event: int, *, by_irqfd: bool) -> None:
        """An edge instead."""
        self.wires[EDGES[event % len(EDGES)] - 32].event.signal()


def run(
    plan: Plan,
    cuts: list[tuple[int, Priority, str]] | None = None,
    look: Callable[[Saved], object] = lambda saved: None,
) -> Outcome:
    """Run a plan to its end, cut at those times, at that priority within the nanosecond, in one way or the other.

    ``look`` sees each saved machine before it goes on.
    """
    worlds: list[World] = []

    async def main() -> None:
        world = World(plan, look) if plan.gic == 3 else Gicv2World(plan, look)
        worlds.append(world)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.devices)
            for at, priority, how in sorted(cuts or []):
                await world.run_until(at, priority, how)
                world.move()
            await world.run_until(plan.end_ns, Priority.LAST, "cancel")
            nursery.cancel_scope.cancel()
        world.statements.append(world.vm.host.kvm.statement())

    fabric.run(main)
    (world,) = worlds
    total = sum(world.statements, LedgerStatement())
    return Outcome(world.log.records, total, dict(world.acts))
