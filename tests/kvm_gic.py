"""A VMM for tests of the GICv3 through ioctls: set up as far as asked for, saved, restored step by step.

``save`` and ``restore`` do what the documents ask of a VMM that moves a guest, in named steps that can be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs
from kvm_machine import outcome

from fabric.devices.arm.vgic_its_commands import encode
from fabric.kvm import Kvm
from fabric.kvm.typed import Device, Host, VcpuFd, VmFd
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.usermem import SparseMemory

V3, ITS = uapi.KVM_DEV_TYPE_ARM_VGIC_V3, uapi.KVM_DEV_TYPE_ARM_VGIC_ITS
ADDR, DIST_REGS, NR_IRQS, CTRL, REDIST_REGS, CPU_SYSREGS, LEVEL_INFO, ITS_REGS = 0, 1, 3, 4, 5, 6, 7, 8
DIST, REDIST, ITS_ADDRESS, REGION = 2, 3, 4, 5
INIT, SAVE_TABLES, RESTORE_TABLES, SAVE_PENDING_TABLES = 0, 1, 2, 3
GICD, GICR, GITS = 0x0800_0000, 0x080A_0000, 0x0808_0000
RAM, RAM_SIZE = 0x8000_0000, 0x0020_0000
QUEUE, DEVICES, COLLECTIONS, ITT, CONFIG, PENDING = (RAM + 0x1_0000 * n for n in range(6))
VALID = 1 << 63
LPI = 8192
NOTHING = 1023
"""What a guest acknowledges when there is nothing."""
LINES = 96
"""Interrupts of the VM, SGIs and PPIs included."""

ICC = {"PMR": 0xC230, "BPR0": 0xC643, "AP0R0": 0xC644, "AP1R0": 0xC648, "BPR1": 0xC663, "CTLR": 0xC664, "SRE": 0xC665,
       "IGRPEN0": 0xC666, "IGRPEN1": 0xC667}  # fmt: skip
SYSREGS = ("SRE", "CTLR", "PMR", "BPR0", "BPR1", "AP0R0", "AP1R0", "IGRPEN0", "IGRPEN1")
"""In the order in which they are restored."""
BITS = {"IGROUPR": 0x80, "ISENABLER": 0x100, "ISPENDR": 0x200, "ISACTIVER": 0x300}
CLEARING = {0x100: 0x180, 0x300: 0x380}
"""Registers that only set, and those that clear the same."""
ITS_REGISTERS = (0x80, 0x88, 0x90, 0x100, 0x108)


def dist_words() -> list[int]:
    """Offsets of the words of SPIs, in the order in which they are restored."""
    words = [offset + 4 * n for n in range(1, LINES // 32) for offset in BITS.values()]
    words += range(0x400 + 32, 0x400 + LINES, 4)
    words += range(0xC00 + 8, 0xC00 + LINES // 4, 4)
    return words + [0x6000 + 8 * intid for intid in range(32, LINES)]


def redist_words() -> list[int]:
    """Offsets of the words of SGIs and PPIs."""
    return [0x1_0000 + offset for offset in (*BITS.values(), *range(0x400, 0x420, 4), 0xC04)]


@attrs.frozen
class Saved:
    """What a VMM has of a guest's GIC. ``redist`` and ``sysregs`` are by affinity, ``redist`` by offset."""

    ids: tuple[int, ...]
    iidr: int
    dist: dict[int, int]
    redist: dict[int, dict[int, int]]
    baser: dict[int, dict[int, int]]
    sysregs: dict[int, dict[str, int]]
    levels: dict[tuple[int, int], int]
    its: dict[int, int]
    ram: bytes


def affinity(vcpu_id: int) -> int:
    """Aff3.Aff2.Aff1.Aff0 of a vCPU, as an attribute number has it in its upper half."""
    return (vcpu_id & 0xF | (vcpu_id >> 4) << 8) << 32


class GicVm:
    """A VM. ``ids`` of its vCPUs; ``ready`` makes GIC and ITS and sets both up."""

    def __init__(self, ids: Iterable[int] = (0, 1), *, ready: bool = True, **options: Any) -> None:
        self.user = SparseMemory()
        self.kvm = Kvm("aarch64", user_memory=self.user, **options)
        self.host = Host(self.kvm)
        self.vm: VmFd = self.host.create_vm()
        self.ram = self.user.map(RAM_SIZE)
        self.vm.set_memory(0, RAM, RAM_SIZE, self.ram)
        self.vcpus: list[VcpuFd] = []
        self.ids: tuple[int, ...] = ()
        self.gic: Device
        self.its: Device
        if ready:
            self.add_vcpus(ids)
            self.gic = self.vm.create_device(V3)
            self.add_its()
            self.gic.set_attr(NR_IRQS, 0, LINES)
            self.place()
            self.gic.set_attr(CTRL, INIT)

    @property
    def inside(self) -> Any:
        """The Vm behind the fds."""
        return self.kvm.vm(self.vm.fd)

    def add_vcpus(self, ids: Iterable[int]) -> None:
        self.ids += tuple(ids)
        for vcpu_id in self.ids[len(self.vcpus) :]:
            self.vcpus.append(self.vm.create_vcpu(vcpu_id))
            self.vcpus[-1].init()

    def place(self) -> None:
        """Addresses of distributor and redistributors."""
        self.gic.set_attr(ADDR, DIST, GICD)
        self.gic.set_attr(ADDR, REDIST, GICR)

    def add_its(self) -> None:
        """The ITS, with its address."""
        self.its = self.vm.create_device(ITS)
        self.its.set_attr(ADDR, ITS_ADDRESS, GITS)

    # -- registers

    def dist(self, offset: int) -> int:
        return self.gic.get_attr(DIST_REGS, offset, 4)

    def set_dist(self, offset: int, value: int) -> None:
        self.gic.set_attr(DIST_REGS, offset, value)

    def redist(self, vcpu_id: int, offset: int) -> int:
        return self.gic.get_attr(REDIST_REGS, affinity(vcpu_id) | offset, 4)

    def set_redist(self, vcpu_id: int, offset: int, value: int) -> None:
        self.gic.set_attr(REDIST_REGS, affinity(vcpu_id) | offset, value)

    def sysreg(self, vcpu_id: int, name: str) -> int:
        return self.gic.get_attr(CPU_SYSREGS, affinity(vcpu_id) | ICC[name])

    def set_sysreg(self, vcpu_id: int, name: str, value: int) -> None:
        self.gic.set_attr(CPU_SYSREGS, affinity(vcpu_id) | ICC[name], value)

    def line(self, intid: int, level: int) -> None:
        """KVM_IRQ_LINE of an SPI."""
        self.vm.irq_line(arm.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI, intid), level)

    def write(self, gpa: int, data: bytes) -> None:
        self.user.write(self.ram + gpa - RAM, data)

    def msi(self, event: int) -> int:
        """A message of device 1."""
        return self.vm.signal_msi(GITS + 0x1_0040, event, 1)

    # -- what a guest sets up

    def boot(self) -> None:
        """All enabled and forwarded; SPI n has priority n, event n of device 1 is LPI 8192 + n, the vCPUs in turn."""
        for offset in range(0, LINES, 4):
            self.set_dist(0x400 + offset, int.from_bytes(bytes(range(offset, offset + 4)), "little"))
        for n in range(1, LINES // 32):
            self.set_dist(0x100 + 4 * n, 0xFFFF_FFFF)
        self.set_dist(0, 2)
        self.write(CONFIG, bytes(0xA1 + 8 * n for n in range(8)))
        for n, vcpu_id in enumerate(self.ids):
            self.set_redist(vcpu_id, 0x70, CONFIG | 15)
            self.set_redist(vcpu_id, 0x78, PENDING + 0x1_0000 * n)
            self.set_redist(vcpu_id, 0, 1)
            self.set_redist(vcpu_id, 0x1_0100, 0xFFFF_FFFF)
            self.set_sysreg(vcpu_id, "PMR", 0xF8)
            self.set_sysreg(vcpu_id, "IGRPEN1", 1)
        for offset, value in ((0x80, QUEUE), (0x100, DEVICES), (0x108, COLLECTIONS)):
            self.its.set_attr(ITS_REGS, offset, VALID | value)
        self.its.set_attr(ITS_REGS, 0, 1)
        count = len(self.ids)
        commands = [encode("MAPC", ICID=n, RDbase=n, V=1) for n in range(count)]
        commands.append(encode("MAPD", DeviceID=1, Size=4, ITT_addr=ITT >> 8, V=1))
        commands += [encode("MAPTI", DeviceID=1, EventID=n, pINTID=LPI + n, ICID=n % count) for n in range(4)]
        self.write(QUEUE, b"".join(commands))
        self.its.set_attr(ITS_REGS, 0x88, 32 * len(commands))

    # -- saving and restoring

    def save(self, *, leave_out: str = "") -> Saved:
        """Save, once no vCPU runs. ``pending`` or ``tables`` may be left out, ``ram`` be read too early."""
        early = self.user.read(self.ram, RAM_SIZE)
        if leave_out != "pending":
            self.gic.set_attr(CTRL, SAVE_PENDING_TABLES)
        if leave_out != "tables":
            self.its.set_attr(CTRL, SAVE_TABLES)
        return Saved(ram=early if leave_out == "ram" else self.user.read(self.ram, RAM_SIZE), **self.registers())

    def registers(self) -> dict[str, Any]:
        """All registers, as the fields of Saved."""
        return {
            "ids": self.ids,
            "iidr": self.dist(8),
            "dist": {offset: self.dist(offset) for offset in (0, 4, *dist_words())},
            "redist": {n: {offset: self.redist(n, offset) for offset in (0, *redist_words())} for n in self.ids},
            "baser": {n: {at: self.redist(n, at) for at in (0x70, 0x74, 0x78, 0x7C)} for n in self.ids},
            "sysregs": {n: {name: self.sysreg(n, name) for name in SYSREGS} for n in self.ids},
            "levels": {
                (n, first): self.gic.get_attr(LEVEL_INFO, affinity(n) | first, 4)
                for n, first in [*((n, 0) for n in self.ids), *((self.ids[0], first) for first in range(32, LINES, 32))]
            },
            "its": {offset: self.its.get_attr(ITS_REGS, offset) for offset in (0, *ITS_REGISTERS)},
        }

    def restore(self, saved: Saved, steps: Iterable[str]) -> None:
        """Make of an empty VM the one that was saved, in these steps."""
        self.user.write(self.ram, saved.ram)
        for step in steps:
            getattr(self, "restore_" + step.replace("-", "_"))(saved)

    def restore_vcpus(self, saved: Saved) -> None:
        self.add_vcpus(saved.ids)

    def restore_gic(self, _saved: Saved) -> None:
        self.gic = self.vm.create_device(V3)

    def restore_its(self, _saved: Saved) -> None:
        self.add_its()

    def restore_nr_irqs(self, _saved: Saved) -> None:
        self.gic.set_attr(NR_IRQS, 0, LINES)

    def restore_addresses(self, _saved: Saved) -> None:
        self.place()

    def restore_init(self, _saved: Saved) -> None:
        self.gic.set_attr(CTRL, INIT)

    def restore_iidr(self, saved: Saved) -> None:
        self.set_dist(8, saved.iidr)

    def restore_dist(self, saved: Saved) -> None:
        for offset, value in saved.dist.items():
            clearing = CLEARING.get(offset & ~0x7F)
            if clearing is not None:
                self.set_dist(clearing + (offset & 0x7F), ~value)
            self.set_dist(offset, value)

    def restore_baser(self, saved: Saved) -> None:
        for vcpu_id, words in saved.baser.items():
            for offset, value in words.items():
                self.set_redist(vcpu_id, offset, value)

    def restore_redist(self, saved: Saved) -> None:
        for vcpu_id, words in saved.redist.items():
            for offset, value in words.items():
                clearing = CLEARING.get(offset & 0xFFF)
                if offset >> 16 and clearing is not None:
                    self.set_redist(vcpu_id, 0x1_0000 + clearing, ~value)
                self.set_redist(vcpu_id, offset, value)

    def restore_sysregs(self, saved: Saved) -> None:
        for vcpu_id, values in saved.sysregs.items():
            for name, value in values.items():
                self.set_sysreg(vcpu_id, name, value)

    def restore_levels(self, saved: Saved) -> None:
        for (vcpu_id, first), value in saved.levels.items():
            self.gic.set_attr(LEVEL_INFO, affinity(vcpu_id) | first, value)

    def restore_its_state(self, saved: Saved) -> None:
        for offset in ITS_REGISTERS:
            self.its.set_attr(ITS_REGS, offset, saved.its[offset])
        self.its.set_attr(CTRL, RESTORE_TABLES)
        self.its.set_attr(ITS_REGS, 0, saved.its[0])


RESTORE = (
    "vcpus", "gic", "its", "nr-irqs", "addresses", "init", "iidr", "dist", "baser", "redist", "sysregs", "levels",
    "its-state",
)  # fmt: skip
"""The steps of a restore, in the order the documents and the kernel's checks ask for."""


async def run_guests(vm: GicVm, guest: Callable[[Any], Any]) -> list[Any]:
    """Run the same guest on each vCPU in turn until it is done, and give what it returned."""
    answers: list[Any] = []

    async def program(cpu: Any) -> None:
        answers.append(await guest(cpu))
        await cpu.store(0x1000, 4, 0)  # leaves KVM_RUN

    for vcpu in vm.vcpus:
        vcpu.load(program)
        await vcpu.run()
    return answers


def first_run(vm: GicVm, cpu: int = 0) -> Any:
    """KVM_RUN with immediate_exit: EINTR when the checks of a first run pass."""
    vm.vcpus[cpu].run_area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1
    return outcome(vm.vcpus[cpu].ioctl, requests.KVM_RUN)
