"""A reference VMM: what every board shares.

Written as a stranger's VMM would be, against the KVM interface and nothing behind it: fds, ioctls, eventfds,
struct kvm_run. A board (:mod:`fabric.vmm.arm64_gicv3`) adds its interrupt controller and memory map.

The machine has RAM, devices with a register block each (:mod:`fabric.guest.pci`), and a task a
vCPU that sits in KVM_RUN and serves its exits. Programming an MSI-X entry makes a GSI route and an irqfd; a
queue's doorbell is an ioeventfd.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import trio

from fabric.errors import KvmError
from fabric.guest.pci import BAR_SIZE
from fabric.kvm import Kvm
from fabric.uapi import ioctl
from fabric.uapi.kvm import (
    KVM_EXIT_MMIO,
    KVM_EXIT_SYSTEM_EVENT,
    KVM_IRQ_ROUTING_MSI,
    KVM_MSI_VALID_DEVID,
    KVM_RUN_EXIT,
    KVM_RUN_EXIT_REASON,
    KVM_SYSTEM_EVENT_RESET,
    KvmCreateDevice,
    KvmDeviceAttr,
    KvmEnableCap,
    KvmIoeventfd,
    KvmIrqfd,
    KvmIrqRouting,
    KvmIrqRoutingEntry,
    KvmIrqRoutingMsi,
    KvmRunMmio,
    KvmRunSystemEvent,
    KvmUserspaceMemoryRegion,
)
from fabric.uapi.usermem import SparseMemory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fabric.guest.driver import InterruptDriver, MsiMessage, Pages
    from fabric.kvm import EventFd
    from fabric.vmm.device import Device

SLOT_SIZE = 1 << 42
"""RAM of one memory slot at most: KVM takes 2**31 - 1 pages."""

AnyDevice = TypeVar("AnyDevice", bound="Device")


class Registers(Protocol):
    """Who answers MMIO exits in a range of addresses."""

    def read(self, offset: int, size: int) -> int:
        """The value of a read."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """A write."""
        ...


class Machine:
    """One VM with its memory, vCPUs and devices.

    Args:
      vcpus: how many (>= 1).
      memory_bytes: guest RAM, a multiple of 4096; costs only what is touched.
      name: of its Kvm, for channels and traces when several machines share a simulation.
      options: host options for :class:`fabric.kvm.Kvm`.

    A machine that is not needed any more is given back with :meth:`close`. One whose :meth:`run` was cancelled stands
    still: it may be run again, or saved and restored into another machine of its board (``fabric.migration``).
    """

    name = ""
    """The board, as ``--board`` names it."""
    arch = ""
    ram_base = 0
    bar_base = 0
    """Where the register blocks of devices begin."""
    first_msi_gsi = 0
    """GSIs below it are the board's own."""
    msi_flags = KVM_MSI_VALID_DEVID
    """Flags of a message's route."""
    banked = 32
    """Numbers of interrupts below it are each vCPU's own."""
    max_vcpus = 1
    max_vectors = 4096
    """MSI-X vectors of all devices together: each takes a GSI route (KVM_CAP_IRQ_ROUTING)."""

    def __init__(self, vcpus: int, memory_bytes: int = 1 << 30, *, name: str = "", **options: Any) -> None:
        if vcpus < 1:
            raise ValueError(f"a machine has at least one vCPU, not {vcpus!r}")
        if vcpus > self.max_vcpus:
            raise ValueError(f"the board {self.name} has at most {self.max_vcpus} vCPUs, not {vcpus!r}")
        self.user = SparseMemory()
        self.kvm = Kvm(self.arch, user_memory=self.user, name=name, **options)
        self.memory_bytes = memory_bytes
        self.devices: list[Device] = []
        self.stopped: str | None = None
        """Why the guest ended: ``"shutdown"``, ``"reset"``, or None while it runs."""
        self._scratch = self.user.map(4096)
        self._messages = 0
        self._route_entries = bytearray()
        self.system_fd = self.kvm.open()
        self.vm_fd = self.kvm.ioctl(self.system_fd, ioctl.KVM_CREATE_VM, self.machine_type())
        self.slots: list[KvmUserspaceMemoryRegion] = []
        """The memory slots."""
        self._map_ram()
        self.prepare()
        self.vcpu_fds = [self._create_vcpu(number) for number in range(vcpus)]
        self._run_size = self.kvm.ioctl(self.system_fd, ioctl.KVM_GET_VCPU_MMAP_SIZE)
        self._run_areas = [self.kvm.mmap(fd, self._run_size) for fd in self.vcpu_fds]
        self.create_irqchip()

    # What a board adds.

    @classmethod
    def describe(cls) -> dict[str, str | int]:
        """The board in a few words, for lists."""
        about = (cls.__doc__ or "").partition("\n")[0]
        return {"name": cls.name, "arch": cls.arch, "max_vcpus": cls.max_vcpus, "about": about}

    @classmethod
    def least_memory(cls, vcpus: int) -> int:
        """Bytes of RAM that ``vcpus`` vCPUs need at least, for the tables and rings of their guest."""
        return 0

    def machine_type(self) -> int:
        """The argument of KVM_CREATE_VM."""
        return 0

    def ram_regions(self) -> list[tuple[int, int]]:
        """Where the RAM is: guest physical address and size of each part, from ``ram_base`` up."""
        return [(self.ram_base, self.memory_bytes)]

    def prepare(self) -> None:
        """What a VM needs before it has vCPUs."""

    def create_vcpu(self, fd: int, number: int) -> None:
        """Initialise a new vCPU."""

    def create_irqchip(self) -> None:
        """Create the interrupt controller, when all vCPUs exist."""

    def driver(self) -> InterruptDriver:
        """A guest driver for this board's interrupt controller."""
        raise NotImplementedError

    def guest_pages(self) -> Pages:
        """Memory that the guest may use for rings."""
        raise NotImplementedError

    async def start_secondary(self, cpu: Any, number: int) -> None:
        """What CPU 0 of the guest does to start CPU ``number``."""
        raise NotImplementedError

    async def shut_down(self, cpu: Any) -> None:
        """What the guest does to turn the machine off."""
        await cpu.system_off()

    def exited(self, number: int, reason: int, area: memoryview) -> bool:
        """vCPU ``number`` left KVM_RUN for a reason that only this board has; False for one that nobody knows."""
        return False

    # ioctls in one line each.

    def create_device(self, kind: int) -> int:
        """KVM_CREATE_DEVICE; its fd."""
        argument = bytearray(KvmCreateDevice(type=kind).pack())
        self.kvm.ioctl(self.vm_fd, ioctl.KVM_CREATE_DEVICE, argument)
        return KvmCreateDevice.unpack(argument).fd

    def set_attr(self, fd: int, group: int, attr: int, value: int = 0, size: int = 8) -> None:
        """KVM_SET_DEVICE_ATTR with ``value`` in user memory."""
        self.user.write(self._scratch, value.to_bytes(size, "little"))
        request = KvmDeviceAttr(group=group, attr=attr, addr=self._scratch)
        self.kvm.ioctl(fd, ioctl.KVM_SET_DEVICE_ATTR, bytearray(request.pack()))

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP of the VM."""
        request = KvmEnableCap(cap=cap, args=(*args, *[0] * (4 - len(args))))
        self.kvm.ioctl(self.vm_fd, ioctl.KVM_ENABLE_CAP, bytearray(request.pack()))

    def _map_ram(self) -> None:
        regions = self.ram_regions()
        last, size = regions[-1]
        # One stretch of user memory, in which the gaps stay untouched.
        self._ram = self.user.map(last + size - self.ram_base)
        parts = [(at, start + size) for start, size in regions for at in range(start, start + size, SLOT_SIZE)]
        for slot, (start, end) in enumerate(parts):
            region = KvmUserspaceMemoryRegion(
                slot=slot,
                guest_phys_addr=start,
                memory_size=min(SLOT_SIZE, end - start),
                userspace_addr=self._ram + start - self.ram_base,
            )
            self.kvm.ioctl(self.vm_fd, ioctl.KVM_SET_USER_MEMORY_REGION, bytearray(region.pack()))
            self.slots.append(region)

    def _create_vcpu(self, number: int) -> int:
        fd = self.kvm.ioctl(self.vm_fd, ioctl.KVM_CREATE_VCPU, number)
        self.create_vcpu(fd, number)
        return fd

    # Guest memory, as the VMM maps it.

    def read_memory(self, gpa: int, n: int) -> bytes:
        """``n`` bytes of guest RAM."""
        return self.user.read(self._ram + gpa - self.ram_base, n)

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Write guest RAM, as a device's DMA does."""
        self.user.write(self._ram + gpa - self.ram_base, data)

    # Devices.

    def add_device(self, device: AnyDevice) -> AnyDevice:
        """Plug ``device`` in: it gets its device id and its register block."""
        number = len(self.devices)
        self.devices.append(device)
        device.plug(self, devid=(number + 1) << 3, bar=self.bar_base + number * BAR_SIZE)
        return device

    def adopt(self, devices: Sequence[Device]) -> None:
        """Take over the devices of another machine that stands still. ValueError for a machine that has some."""
        if self.devices:
            raise ValueError("a machine takes over devices only when it has none of its own")
        self.devices.extend(devices)
        for device in devices:
            device.replug(self)

    def registers(self, address: int) -> tuple[Registers | None, int]:
        """Whose registers are at guest physical ``address``, and at which offset of theirs that is."""
        number, offset = divmod(address - self.bar_base, BAR_SIZE)
        return self.devices[number] if 0 <= number < len(self.devices) else None, offset

    def doorbell(self, address: int) -> EventFd:
        """An eventfd signalled by 4-byte writes to guest physical ``address`` (KVM_IOEVENTFD)."""
        event = self.kvm.eventfd()
        request = KvmIoeventfd(addr=address, len=4, fd=int(event))
        self.kvm.ioctl(self.vm_fd, ioctl.KVM_IOEVENTFD, bytearray(request.pack()))
        return event

    def interrupt(self, message: MsiMessage) -> EventFd | None:
        """An eventfd that raises ``message`` (KVM_IRQFD); None for a message that would reach nobody."""
        gsi = self.gsi_of(message)
        if gsi is None:
            return None
        event = self.kvm.eventfd()
        self.kvm.ioctl(self.vm_fd, ioctl.KVM_IRQFD, bytearray(KvmIrqfd(fd=int(event), gsi=gsi).pack()))
        return event

    def gsi_of(self, message: MsiMessage) -> int | None:
        """The GSI that stands for ``message``: by default a route of its own (KVM_SET_GSI_ROUTING)."""
        gsi = self.first_msi_gsi + self._messages
        self._messages += 1
        self._route_entries += self.msi_route(gsi, message).pack()
        self.set_routes()
        return gsi

    def msi_route(self, gsi: int, message: MsiMessage) -> KvmIrqRoutingEntry:
        """The route of ``gsi`` to ``message``."""
        msi = KvmIrqRoutingMsi(
            address_lo=message.address & 0xFFFF_FFFF,
            address_hi=message.address >> 32,
            data=message.data,
            devid=message.devid,
        )
        return KvmIrqRoutingEntry(
            gsi=gsi, type=KVM_IRQ_ROUTING_MSI, flags=self.msi_flags, u=msi.pack().ljust(32, b"\0")
        )

    def own_routes(self) -> bytes:
        """Routes of the board's own, beside those of messages: an array of KvmIrqRoutingEntry."""
        return b""

    def set_routes(self) -> None:
        """KVM_SET_GSI_ROUTING with all routes there are."""
        entries = self.own_routes() + self._route_entries
        count = len(entries) // KvmIrqRoutingEntry.SIZE
        table = bytearray(KvmIrqRouting(nr=count).pack()) + entries
        self.kvm.ioctl(self.vm_fd, ioctl.KVM_SET_GSI_ROUTING, table)

    # Looking inside, as no real VMM could.

    @property
    def vm(self) -> Any:
        """The VM behind its fd: ledger, channels, listeners."""
        return self.kvm.vm(self.vm_fd)

    @property
    def wire(self) -> Any:
        """The channel that the interrupts of devices take to the interrupt controller."""
        return self.vm.msis

    @property
    def vcpus(self) -> list[Any]:
        """The vCPUs behind their fds: what their host costs them, and how long it kept them waiting."""
        return [self.kvm.vcpu(fd) for fd in self.vcpu_fds]

    # Running.

    def load(self, program: Callable[[Any], Awaitable[object]]) -> None:
        """Give every vCPU its guest program."""
        for fd in self.vcpu_fds:
            self.kvm.load(fd, program)

    async def run(self) -> None:
        """Run vCPUs and devices until the guest shuts down; cancel it to stop the machine earlier."""
        async with trio.open_nursery() as nursery:
            for device in self.devices:
                device.start(nursery)
            for number in range(len(self.vcpu_fds)):
                nursery.start_soon(self._run_vcpu, number, nursery.cancel_scope, name=f"vcpu{number}")

    async def run_guest(self, guest: Callable[[Any, InterruptDriver], Awaitable[object]]) -> None:
        """Boot a small guest and run ``await guest(cpu, driver)`` on its CPU 0 until that returns.

        ``driver`` is the board's interrupt driver, brought up on every CPU; interrupts are unmasked. The other CPUs
        wait for interrupts.
        """
        driver = self.driver()
        up = 0

        async def program(cpu: Any) -> None:
            nonlocal up
            if cpu.number == 0:
                await driver.start(cpu)
            await driver.start_cpu(cpu)
            cpu.unmask()
            up += 1
            while cpu.number:
                await cpu.wait_for_interrupt()
            for number in range(1, len(self.vcpu_fds)):
                await self.start_secondary(cpu, number)
            while up < len(self.vcpu_fds):
                await cpu.compute(1_000)
            await guest(cpu, driver)
            nursery.cancel_scope.cancel()

        self.load(program)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.run, name=self.name)

    async def _run_vcpu(self, number: int, machine: trio.CancelScope) -> None:
        run = self.kvm.run
        fd = self.vcpu_fds[number]
        area = self._run_areas[number]
        while True:
            try:
                await run(fd)
            except KvmError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN):
                    continue
                raise
            reason = int.from_bytes(area[KVM_RUN_EXIT_REASON : KVM_RUN_EXIT_REASON + 4], "little")
            if reason == KVM_EXIT_MMIO:
                self._mmio(area)
            elif reason == KVM_EXIT_SYSTEM_EVENT:
                event = KvmRunSystemEvent.unpack(area[KVM_RUN_EXIT:])
                self.stopped = "reset" if event.type == KVM_SYSTEM_EVENT_RESET else "shutdown"
            elif not self.exited(number, reason, area):
                raise RuntimeError(
                    f"vCPU {number} left KVM_RUN with exit reason {reason}, which this VMM does not know"
                )
            if self.stopped is not None:
                machine.cancel()
                return

    def _mmio(self, area: memoryview) -> None:
        mmio = KvmRunMmio.unpack(area[KVM_RUN_EXIT:])
        registers, offset = self.registers(mmio.phys_addr)
        if mmio.is_write:
            if registers is not None:
                registers.write(offset, mmio.len, int.from_bytes(mmio.data[: mmio.len], "little"))
            return
        # A read that nobody answers gives all ones, as on a bus.
        value = registers.read(offset, mmio.len) if registers is not None else (1 << 8 * mmio.len) - 1
        data = value.to_bytes(mmio.len, "little").ljust(8, b"\0")
        area[KVM_RUN_EXIT + 8 : KVM_RUN_EXIT + 16] = data

    def close(self) -> None:
        """Close every fd; what is pending then is dropped as ``vm closed``."""
        for fd in [*self.vcpu_fds, *self.device_fds(), self.vm_fd, self.system_fd]:
            self.kvm.close(fd)

    def device_fds(self) -> list[int]:
        """The fds of the board's KVM devices."""
        return []
