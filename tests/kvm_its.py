"""A VMM for tests with ITSs: VMs of one host, their ITSs driven by commands, saved and restored, all through ioctls.

The VMs of a host have the same RAM. ITS n has its queue and tables at ``n * NEXT`` bytes from those of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs

from fabric.devices.arm.vgic_its_commands import encode
from fabric.kvm import Kvm
from fabric.kvm.typed import Device, Host
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.usermem import SparseMemory

RAM, RAM_SIZE = 0x8000_0000, 0x0100_0000
QUEUE, DEVICE_TABLE, COLLECTION_TABLE = RAM, RAM + 0x10_0000, RAM + 0x20_0000
LEVEL2, ITTS, CONFIG, PENDING = RAM + 0x30_0000, RAM + 0x40_0000, RAM + 0x80_0000, RAM + 0x90_0000
NEXT = 0x4_0000
GICD, GICR = 0x0800_0000, 0x080A_0000
ITS_BASES = (0x0808_0000, 0x0900_0000, 0x0902_0000)
VALID, INDIRECT, LPI = 1 << 63, 1 << 62, 8192

CTLR, IIDR, TYPER, CBASER, CWRITER, CREADR, BASER = 0x0, 0x4, 0x8, 0x80, 0x88, 0x90, 0x100
SAVED_REGISTERS = (CTLR, IIDR, CBASER, CWRITER, CREADR, *range(BASER, BASER + 64, 8))
ADDR, CTRL, ITS_REGS = (
    arm.KVM_DEV_ARM_VGIC_GRP_ADDR,
    arm.KVM_DEV_ARM_VGIC_GRP_CTRL,
    arm.KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
)
INIT, SAVE_TABLES, RESTORE_TABLES, RESET = (
    arm.KVM_DEV_ARM_VGIC_CTRL_INIT,
    arm.KVM_DEV_ARM_ITS_SAVE_TABLES,
    arm.KVM_DEV_ARM_ITS_RESTORE_TABLES,
    arm.KVM_DEV_ARM_ITS_CTRL_RESET,
)
GICR_CTLR, GICR_PROPBASER, GICR_PENDBASER = 0x0, 0x70, 0x78


def mapc(icid: int, rdbase: int, valid: int = 1) -> bytes:
    return encode("MAPC", ICID=icid, RDbase=rdbase, V=valid)


def mapd(devid: int, bits: int = 5, valid: int = 1, *, at: int | None = None) -> bytes:
    return encode("MAPD", DeviceID=devid, Size=bits - 1, ITT_addr=(itt(devid) if at is None else at) >> 8, V=valid)


def mapti(devid: int, eventid: int, lpi: int, icid: int) -> bytes:
    return encode("MAPTI", DeviceID=devid, EventID=eventid, pINTID=lpi, ICID=icid)


def itt(devid: int) -> int:
    """Where a device's ITT is: 16 KiB each."""
    return ITTS + devid % 256 * 0x4000


@attrs.frozen
class Saved:
    """What a VMM has of a machine's LPIs and ITSs after saving it."""

    redistributors: list[tuple[int, int, int]]
    """GICR_PROPBASER, GICR_PENDBASER and GICR_CTLR of each vCPU."""
    its: list[dict[int, int]]
    """The registers of each ITS."""
    ram: bytes


class ItsHost:
    """A host with RAM for guests."""

    def __init__(self, **options: Any) -> None:
        self.user = SparseMemory()
        self.kvm = Kvm("aarch64", user_memory=self.user, **options)
        self.host = Host(self.kvm)
        self.ram = self.user.map(RAM_SIZE)

    def read(self, gpa: int, size: int) -> bytes:
        return self.user.read(self.ram + gpa - RAM, size)

    def read_u64(self, gpa: int) -> int:
        return int.from_bytes(self.read(gpa, 8), "little")

    def write(self, gpa: int, data: bytes) -> None:
        self.user.write(self.ram + gpa - RAM, data)

    def write_u64(self, gpa: int, value: int) -> None:
        self.write(gpa, value.to_bytes(8, "little"))


class ItsVm:
    """A VM: vCPUs, RAM, an initialised GICv3, and ITSs without addresses."""

    def __init__(self, host: ItsHost, vcpus: int = 2, its: int = 1, *, memory: bool = True) -> None:
        self.host = host
        self.vm = host.host.create_vm()
        self.vcpus = [self.vm.create_vcpu(n) for n in range(vcpus)]
        for vcpu in self.vcpus:
            vcpu.init()
        if memory:
            self.add_memory()
        self.add_gic(lambda: [self.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_ITS) for _ in range(its)])

    @property
    def inside(self) -> Any:
        """The Vm behind the fds."""
        return self.host.kvm.vm(self.vm.fd)

    def add_gic(self, its: Callable[[], list[Device]]) -> None:
        """The GICv3, with what gives the ITSs just before it is initialised."""
        self.gic: Device = self.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V3)
        self.gic.set_attr(ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_DIST, GICD)
        self.gic.set_attr(ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_REDIST, GICR)
        self.its = its()
        self.gic.set_attr(CTRL, INIT)

    def add_memory(self) -> None:
        self.vm.set_memory(0, RAM, RAM_SIZE, self.host.ram)

    # -- what a guest does first

    def boot(self, *, indirect: bool = False) -> None:
        """Tables for LPIs and ITSs, all enabled; collection n of each ITS goes to vCPU n."""
        self.enable_lpis()
        for n in range(len(self.its)):
            self.place(n)
            self.set_reg(CBASER, VALID | QUEUE + n * NEXT, n)
            self.set_reg(BASER, VALID | DEVICE_TABLE + n * NEXT | (INDIRECT if indirect else 0), n)
            self.set_reg(BASER + 8, VALID | COLLECTION_TABLE + n * NEXT, n)
            self.set_reg(CTLR, 1, n)
            self.run(*(mapc(cpu, cpu) for cpu in range(len(self.vcpus))), its=n)

    def enable_lpis(self) -> None:
        """LPIs that are all enabled, at priority 0xa0."""
        self.host.write(CONFIG, b"\xa1" * 0x2000)
        for cpu in range(len(self.vcpus)):
            self.set_redist(cpu, GICR_PROPBASER, CONFIG | 15, 8)
            self.set_redist(cpu, GICR_PENDBASER, pending_table(cpu), 8)
            self.set_redist(cpu, GICR_CTLR, 1)

    def place(self, its: int = 0, base: int | None = None) -> None:
        """Give an ITS its address."""
        self.its[its].set_attr(ADDR, arm.KVM_VGIC_ITS_ADDR_TYPE, ITS_BASES[its] if base is None else base)

    def run(self, *commands: bytes, its: int = 0) -> None:
        """Queue commands and have them run."""
        base, at = self.reg(CBASER, its) & 0xF_FFFF_FFFF_F000, self.reg(CWRITER, its)
        for command in commands:
            self.host.write(base + at, command)
            at = (at + 32) % 4096
        self.set_reg(CWRITER, at, its)

    def msi(self, devid: int, eventid: int, its: int = 0, *, flags: int = uapi.KVM_MSI_VALID_DEVID) -> int:
        """KVM_SIGNAL_MSI to the doorbell of an ITS."""
        return self.vm.ioctl(requests.KVM_SIGNAL_MSI, uapi.KvmMsi(ITS_BASES[its] + 0x1_0040, 0, eventid, flags, devid))

    # -- registers and attributes

    def reg(self, offset: int, its: int = 0) -> int:
        return self.its[its].get_attr(ITS_REGS, offset)

    def set_reg(self, offset: int, value: int, its: int = 0) -> None:
        self.its[its].set_attr(ITS_REGS, offset, value)

    def redist(self, cpu: int, offset: int, size: int = 4) -> int:
        group = arm.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS
        words = [self.gic.get_attr(group, cpu << 32 | at, 4) for at in range(offset, offset + size, 4)]
        return sum(word << 32 * n for n, word in enumerate(words))

    def set_redist(self, cpu: int, offset: int, value: int, size: int = 4) -> None:
        for at in range(0, size, 4):
            word = value >> 8 * at & 0xFFFF_FFFF
            self.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, cpu << 32 | offset + at, word)

    def control(self, number: int, its: int = 0) -> None:
        """Set an attribute of the group CTRL."""
        self.its[its].set_attr(CTRL, number)

    # -- saving and restoring, in the documented order

    def save(self, *, leave_out: Iterable[str] = ()) -> Saved:
        """Save, once no vCPU runs: pending tables, ITS tables, registers, RAM. Steps may be left out by name."""
        if "pending" not in leave_out:
            self.gic.set_attr(CTRL, arm.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)
        if "tables" not in leave_out:
            for n in range(len(self.its)):
                self.control(SAVE_TABLES, n)
        return Saved(
            [
                (self.redist(cpu, GICR_PROPBASER, 8), self.redist(cpu, GICR_PENDBASER, 8), self.redist(cpu, GICR_CTLR))
                for cpu in range(len(self.vcpus))
            ],
            [{offset: self.reg(offset, n) for offset in SAVED_REGISTERS} for n in range(len(self.its))],
            self.host.read(RAM, RAM_SIZE) if "ram" not in leave_out else bytes(RAM_SIZE),
        )

    def restore(self, saved: Saved, *, leave_out: Iterable[str] = ()) -> None:
        """Restore: RAM, redistributors, addresses, and for each ITS its registers, its tables and GITS_CTLR."""
        if "ram" not in leave_out:
            self.host.write(RAM, saved.ram)
        if "redistributors" not in leave_out:
            self.restore_redistributors(saved)
        for n, registers in enumerate(saved.its):
            if "address" not in leave_out:
                self.place(n)
            if "cbaser" not in leave_out:
                self.set_reg(CBASER, registers[CBASER], n)
            if "registers" not in leave_out:
                self.restore_registers(registers, n)
            if "tables" not in leave_out:
                self.control(RESTORE_TABLES, n)
            if "ctlr" not in leave_out:
                self.set_reg(CTLR, registers[CTLR], n)

    def restore_redistributors(self, saved: Saved) -> None:
        for cpu, (propbaser, pendbaser, ctlr) in enumerate(saved.redistributors):
            self.set_redist(cpu, GICR_PROPBASER, propbaser, 8)
            self.set_redist(cpu, GICR_PENDBASER, pendbaser, 8)
            self.set_redist(cpu, GICR_CTLR, ctlr)

    def restore_registers(self, registers: dict[int, int], its: int = 0) -> None:
        """All but GITS_CBASER and GITS_CTLR."""
        for offset, value in registers.items():
            if offset not in (CBASER, CTLR):
                self.set_reg(offset, value, its)

    # -- looking

    def lpis(self) -> dict[int, tuple[int | None, bool, bool]]:
        """LPI to (vCPU, enabled, pending)."""
        return {
            irq.intid: (None if irq.target is None else irq.target.index, irq.enabled, irq.pending)
            for irq in self.inside.irqchip.lpis.values()
        }

    def maps(self, its: int = 0) -> tuple[Any, ...]:
        """Devices with their events, and collections, of an ITS."""
        inside = self.inside.its_list[its]
        return (
            sorted(
                (
                    device.devid,
                    device.bits,
                    device.itt,
                    tuple((event, irq.intid, where and where.icid) for event, irq, where in device.events()),
                )
                for device in inside.records()
            ),
            [(icid, collection.rdbase) for icid, collection in inside.collections.items()],
        )


def pending_table(cpu: int) -> int:
    return PENDING + cpu * 0x1_0000
