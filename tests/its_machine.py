"""A VM with a GICv3 and an ITS for tests: no KVM layer, commands through the queue in guest memory.

The layout of guest memory is that of :class:`ItsMachine`'s constants; LPIs are enabled on every vCPU, every LPI is
configured enabled with priority 0xa0, and GICD forwards nothing until ``forward()``.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fabric.devices.arm.vgic_its import Its, signal_msi
from fabric.devices.arm.vgic_its_commands import COMMAND_SIZE, encode
from fabric.devices.arm.vgic_its_regs import GITS_TRANSLATER
from fabric.devices.arm.vgic_v3 import VgicV3
from fabric.errors import KvmError
from fabric.memory import AddressSpace, GuestMemory
from fabric.trace.ledger import Ledger
from fabric.uapi.kvm import KvmMsi
from fabric.uapi.usermem import BufferPointer

RAM = 0x8000_0000
RAM_SIZE = 0x0100_0000
QUEUE = RAM
DEVICE_TABLE = RAM + 0x10_0000
COLLECTION_TABLE = RAM + 0x20_0000
LEVEL2 = RAM + 0x30_0000
ITTS = RAM + 0x40_0000
CONFIG = RAM + 0x80_0000
PENDING = RAM + 0x90_0000
PENDING_SIZE = 0x1_0000
HOLE = 0x7000_0000
ITS_BASE = 0x0808_0000
DOORBELL = ITS_BASE + GITS_TRANSLATER
VALID = 1 << 63
INDIRECT = 1 << 62
LPI = 8192

CTLR, IIDR, TYPER, CBASER, CWRITER, CREADR, BASER0, BASER1 = 0x0, 0x4, 0x8, 0x80, 0x88, 0x90, 0x100, 0x108
GRP_ADDR, GRP_CTRL, GRP_ITS_REGS = 0, 4, 8
INIT, SAVE_TABLES, RESTORE_TABLES, RESET = 0, 1, 2, 4


class FakeVcpu:
    """A vCPU that only is there."""

    def __init__(self, index: int) -> None:
        self.index = self.vcpu_id = self.mpidr = index
        self.initialized = True
        self.has_run = self.running = False
        self.cpu_interface: Any = None

    def kick(self) -> None:
        pass


class FakeClock:
    """Time that stands still."""

    now = 0


class FakeVm:
    """What a device sees of its VM."""

    def __init__(self, vcpus: int = 2, ipa_bits: int = 40, **options: Any) -> None:
        self.clock = FakeClock()
        self.memory = GuestMemory()
        self.mmio = AddressSpace("mmio")
        self.ledger = Ledger()
        self.events = None
        self.ipa_bits = ipa_bits
        self.irqchip: Any = None
        self.its_list: list[Any] = []
        self.devices: list[Any] = []
        self.options: dict[str, Any] = {"host_gic": 3, **options}
        self.vcpus = [FakeVcpu(index) for index in range(vcpus)]

    @contextmanager
    def lock_vcpus(self) -> Iterator[None]:
        if any(vcpu.running for vcpu in self.vcpus):
            raise KvmError(errno.EBUSY, "a vCPU is running")
        yield

    def set_default_routing(self, nr_pins: int) -> None:
        pass

    def is_open(self, fd: int) -> bool:
        return False

    def on_destroy(self, callback: Any) -> None:
        pass


class ItsMachine:
    """The machine; ``set_up=False`` leaves the ITS as created, without address, tables and queue."""

    def __init__(self, vcpus: int = 2, *, set_up: bool = True, indirect: bool = False, **options: Any) -> None:
        self.vm = FakeVm(vcpus, **options)
        self.vgic: Any = VgicV3.create(self.vm)
        self.its = Its.create(self.vm)
        self.memory = self.vm.memory
        self.memory.add_ram(RAM, RAM_SIZE)
        self.vgic.initialize()
        self.memory.write(CONFIG, b"\xa1" * 0xE000)
        self.vgic.propbaser = CONFIG | 15
        for cpu in self.vgic.cpus:
            cpu.pendbaser = self.pending_table(cpu.index)
            cpu.lpis_enabled = True
        if set_up:
            self.its.place(ITS_BASE)
            self.set_reg(CBASER, VALID | QUEUE)
            self.set_reg(BASER0, VALID | DEVICE_TABLE | (INDIRECT if indirect else 0))
            self.set_reg(BASER1, VALID | COLLECTION_TABLE)
            self.set_reg(CTLR, 1)

    def copy(self) -> ItsMachine:
        """A second VM made from guest memory and the states of the first."""
        other = ItsMachine.__new__(ItsMachine)
        other.vm = FakeVm(len(self.vm.vcpus))
        other.memory = other.vm.memory
        other.memory.add_ram(RAM, RAM_SIZE)
        nothing = bytes(1 << 16)
        for at in range(RAM, RAM + RAM_SIZE, len(nothing)):
            block = self.memory.read(at, len(nothing))
            if block != nothing:
                other.memory.write(at, block)
        other.vgic = VgicV3.from_state(other.vm, self.vgic.state())
        other.its = Its.from_state(other.vm, self.its.state())
        return other

    def forward(self) -> None:
        """Let the distributor forward, and the vCPUs take, interrupts."""
        self.vgic.set_forwarding(True)
        for cpu in self.vgic.cpus:
            cpu.igrpen1 = True
            cpu.pmr = 0xF8
            cpu.refresh()

    @staticmethod
    def pending_table(cpu: int) -> int:
        return PENDING + cpu * PENDING_SIZE

    # -- attributes and registers

    def attr(self, op: Any, group: int, attr: int, value: int = 0) -> int:
        """One ioctl with a 64-bit value; what GET handed back."""
        buffer = bytearray(value.to_bytes(8, "little"))
        Its.attributes.dispatch(self.its, op, group, attr, BufferPointer(buffer))
        return int.from_bytes(buffer, "little")

    def set_reg(self, offset: int, value: int) -> None:
        self.attr("set", GRP_ITS_REGS, offset, value)

    def reg(self, offset: int) -> int:
        return self.attr("get", GRP_ITS_REGS, offset)

    def guest_write(self, offset: int, value: int, size: int = 8) -> None:
        found = self.vm.mmio.find(ITS_BASE + offset, size)
        assert found is not None
        found[0].mmio_write(found[1], size, value, None)

    def guest_read(self, offset: int, size: int = 8) -> int:
        found = self.vm.mmio.find(ITS_BASE + offset, size)
        assert found is not None
        return found[0].mmio_read(found[1], size, None)

    def save(self) -> None:
        self.attr("set", GRP_CTRL, SAVE_TABLES)

    def restore(self) -> None:
        self.attr("set", GRP_CTRL, RESTORE_TABLES)

    # -- commands and MSIs

    def run(self, *commands: bytes) -> None:
        """Queue the commands and have them run, ring-wise."""
        queue = self.its.queue_address
        for command in commands:
            self.memory.write(queue + self.its.cwriter, command)
            self.set_reg(CWRITER, (self.its.cwriter + COMMAND_SIZE) % self.its.queue_size)
        self.check()

    def map_all(self, events: int = 4, devid: int = 1, bits: int = 5) -> None:
        """MAPC 0 to vCPU 0 and 1 to vCPU 1, MAPD, and events 0.. of the device to LPIs 8192.. in turn."""
        self.run(
            mapc(0, 0),
            mapc(1, 1),
            mapd(devid, bits),
            *(mapti(devid, event, LPI + event, event % 2) for event in range(events)),
        )

    def msi(self, devid: int, eventid: int, flags: int = 1, address: int = DOORBELL) -> int:
        return signal_msi(self.vm, KvmMsi(address & 0xFFFF_FFFF, address >> 32, eventid, flags, devid))

    def pending(self) -> dict[int, int | None]:
        """Pending LPIs and the vCPU each goes to."""
        return {
            irq.intid: None if irq.target is None else irq.target.index
            for irq in self.vgic.lpis.values()
            if irq.pending
        }

    def dropped(self) -> dict[str, int]:
        return self.vm.ledger.check().dropped

    def check(self) -> None:
        """The ledger balances and the invariants hold."""
        self.vm.ledger.check()
        self.vgic._check()
        self.its._check()


def itt(devid: int) -> int:
    """Where the tests put a device's ITT: 64 KiB each."""
    return ITTS + (devid % 32) * 0x1_0000


def mapc(icid: int, rdbase: int, valid: int = 1) -> bytes:
    return encode("MAPC", ICID=icid, RDbase=rdbase, V=valid)


def mapd(devid: int, bits: int = 5, valid: int = 1, at: int | None = None) -> bytes:
    address = itt(devid) if at is None else at
    return encode("MAPD", DeviceID=devid, Size=bits - 1, ITT_addr=address >> 8, V=valid)


def mapti(devid: int, eventid: int, lpi: int, icid: int) -> bytes:
    return encode("MAPTI", DeviceID=devid, EventID=eventid, pINTID=lpi, ICID=icid)


def event_command(name: str, devid: int, eventid: int) -> bytes:
    """INT, CLEAR, DISCARD or INV."""
    return encode(name, DeviceID=devid, EventID=eventid)
