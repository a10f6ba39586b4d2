"""The boards x86-apic and x86-split: memory map, wires, ports, and their guests' driver in all its modes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import fabric
from fabric.guest.apic import (
    CPUID_FEATURES,
    CPUID_KVM_FEATURES,
    ECX_TSC_DEADLINE,
    ECX_X2APIC,
    FIRST_VECTOR,
    IOAPIC_TABLE,
    IOAPIC_VERSION,
    IOREGSEL,
    IOWIN,
    IPI_VECTOR,
    LAST_VECTOR,
    PIN_LEVEL,
    PIN_MASKED,
    ApicDriver,
    ApicLayout,
)
from fabric.guest.driver import Vector
from fabric.guest.pci import write_msix
from fabric.trace import Recorder
from fabric.trace.ledger import LedgerStatement
from fabric.uapi import ioctl
from fabric.uapi.kvm import KVM_IRQFD_FLAG_RESAMPLE, KvmIrqfd
from fabric.uapi.x86 import KvmCpuidEntry2
from fabric.vmm import BOARDS, Device
from fabric.vmm.ioapic import REMOTE_IRR
from fabric.vmm.x86 import HIGH_RAM, HOLE, IOAPIC_BASE, PORT_RESET, X86Machine

Body = Callable[[Any, Any, Any], Awaitable[object]]

each_board = pytest.mark.parametrize("board", ["x86-apic", "x86-split"])
WIRE = 11


def ledger_of(body: Body, board: str = "x86-apic", vcpus: int = 1, *, without: int = 0, **options: Any) -> Any:
    """Run ``body(machine, cpu, driver)`` as a guest; ``without``: features that its CPUID has not."""
    cls: Any = BOARDS[board]

    class Limited(cls):  # type: ignore[misc]
        """As the board, on lesser processors."""

        def cpuid(self, fd: int, number: int) -> list[KvmCpuidEntry2]:
            leaves = super().cpuid(fd, number)
            return [leaf.with_(ecx=leaf.ecx & ~without) if leaf.function == 1 else leaf for leaf in leaves]

    async def main() -> LedgerStatement:
        machine: X86Machine = Limited(vcpus, **options)
        await machine.run_guest(lambda cpu, driver: body(machine, cpu, driver))
        statement: LedgerStatement = machine.kvm.statement()
        return statement

    return fabric.run(main)


async def nothing(cpu: Any) -> None:
    """A handler."""


# The driver

modes = pytest.mark.parametrize(
    "without",
    [
        pytest.param(0, id="x2apic"),
        pytest.param(ECX_X2APIC, id="xapic"),
        pytest.param(ECX_TSC_DEADLINE, id="one-shot"),
    ],
)


@each_board
@modes
def test_messages_ipis_and_timers(board: str, without: int) -> None:
    """In x2APIC mode and without, with TSC deadlines and without: all are taken on their CPU, at their time."""
    seen: list[tuple[int, int, str]] = []

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        def noting(what: str) -> Any:
            async def handler(cpu: Any) -> None:
                seen.append((cpu.now - began, cpu.number, what))

            return handler

        device = machine.add_device(Device("d", vectors=2))
        vectors = [Vector(1, noting("a"), "d.a"), Vector(0, noting("b"), "d.b")]
        await write_msix(cpu, device.bar, await driver.allocate_msi(cpu, device.devid, vectors))
        driver.on_ipi(noting("ipi"), 3, "call")
        began = cpu.now
        await driver.set_timer(cpu, began + 1_000, noting("timer"))
        for vector in (0, 1):
            device.raise_vector(vector)
        await driver.send_ipi(cpu, 1, 3)
        await cpu.compute(2_000)

    assert LedgerStatement(raised=4, delivered=4) == ledger_of(body, board, 2, without=without)
    assert [(0, 0, "b"), (0, 1, "a"), (0, 1, "ipi"), (1_000, 0, "timer")] == sorted(seen)


@pytest.mark.parametrize("without", [0, ECX_TSC_DEADLINE])
@pytest.mark.parametrize("ns", [0, 1, 4_294_967_295, 4_294_967_296, 549_755_813_760, 1_000_000_000_000])
def test_a_timer_at_any_time(ns: int, without: int) -> None:
    """Also one in the past, and one that is further than 32 bits of the bus's cycles, even divided by 128."""
    seen: list[int] = []

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        async def tick(cpu: Any) -> None:
            seen.append(cpu.now)

        began = cpu.now
        await driver.set_timer(cpu, began + ns, tick)
        await driver.set_timer(cpu, began + ns, tick)  # replaces it
        while not seen:
            await cpu.wait_for_interrupt()
        assert 0 <= seen[0] - began - ns <= 127
        await driver.set_timer(cpu, 0, tick)
        await cpu.wait_for_interrupt()

    ledger_of(body, without=without)
    assert 2 == len(seen)


def test_vectors_follow_priorities() -> None:
    """The more urgent one the higher; equal ones in their order, downwards; each CPU has a table of its own."""

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        priorities = (0x00, 0xA0, 0xA0, 0xF0, 0xF0, 0x00)
        vectors = [Vector(0, nothing, f"v{n}", priority) for n, priority in enumerate(priorities)]
        messages = await driver.allocate_msi(cpu, 8, [*vectors, Vector(1, nothing, "other", 0)])
        default = LAST_VECTOR - 0xA0 * (LAST_VECTOR - FIRST_VECTOR) // 0xF0
        expected = [LAST_VECTOR, default, default - 1, FIRST_VECTOR, FIRST_VECTOR + 1, LAST_VECTOR - 1]
        assert [*expected, LAST_VECTOR] == [message.data for message in messages]
        assert [0xFEE0_0000, 0xFEE0_1000] == [message.address for message in messages[-2:]]
        assert ("v0", "other") == (driver.label(LAST_VECTOR, 0), driver.label(LAST_VECTOR, 1))
        assert ("IPI", "vector 0x20") == (driver.label(IPI_VECTOR, 0), driver.label(0x20, 0))

    ledger_of(body, vcpus=2)


def test_the_vectors_of_a_cpu_come_to_an_end() -> None:
    """What is left of the table after exceptions, the PIC, timer and IPIs can be given out."""

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        room = LAST_VECTOR - FIRST_VECTOR + 1
        messages = await driver.allocate_msi(cpu, 8, [Vector(0, nothing, "a")] * room)
        assert list(range(FIRST_VECTOR, LAST_VECTOR + 1)) == sorted(message.data for message in messages)
        with pytest.raises(RuntimeError, match="CPU 0 has no vector left for device 0x10"):
            await driver.allocate_msi(cpu, 16, [Vector(0, nothing, "a")])

    ledger_of(body)


def test_an_interrupt_that_nobody_asked_for() -> None:
    """It is ended, and the next one comes."""

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        for _ in range(2):
            await driver.send_ipi(cpu, 0, 5)
            await cpu.compute(1)
        with pytest.raises(ValueError, match="must be 0 to 7, not -1"):
            driver.on_ipi(nothing, -1)

    assert LedgerStatement(raised=2, delivered=2) == ledger_of(body)


@each_board
def test_more_cpus_than_eight_bits_name(board: str) -> None:
    """Ids of 32 bits: messages have seven bits more where KVM says so, IPIs go by x2APIC."""
    seen: list[int] = []
    vcpus = 300

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        async def taken(cpu: Any) -> None:
            seen.append(cpu.number)

        device = machine.add_device(Device("d", vectors=4))
        vectors = [Vector(number, taken, "d") for number in (254, 255, 256, 299)]
        messages = await driver.allocate_msi(cpu, device.devid, vectors)
        assert 0xFEE0_0000 | 299 % 256 << 12 | 1 << 5 == messages[-1].address
        await write_msix(cpu, device.bar, messages)
        for vector in range(4):
            device.raise_vector(vector)
        await cpu.compute(1)
        driver.on_ipi(taken)
        await driver.send_ipi(cpu, 298)
        await cpu.compute(1)

    assert LedgerStatement(raised=5, delivered=5) == ledger_of(body, board, vcpus)
    assert [254, 255, 256, 299, 298] == seen


def test_a_cpu_that_no_message_reaches() -> None:
    """Ids beyond what fits are refused in words; for an input of the IOAPIC, which has eight bits always, as well."""

    class Processor:
        """Answers as far as the driver asks."""

        number, now = 0, 0

        def __init__(self, features: int) -> None:
            self.features = features

        async def cpuid(self, function: int) -> tuple[int, int, int, int]:
            if function == CPUID_FEATURES:
                return 0, 0, ECX_X2APIC, 0
            return (self.features if function == CPUID_KVM_FEATURES else 0), 0, 0, 0

        async def load(self, gpa: int, size: int) -> int:
            return 0

        async def store(self, gpa: int, size: int, value: int) -> None:
            pass

    async def main(features: int, ioapic: int | None) -> None:
        driver = ApicDriver(ApicLayout((254, 255, 1 << 15), ioapic, pic=False))
        cpu = Processor(features)
        await driver.start(cpu)
        wanted = [Vector(number, nothing, "a") for number in range(3)]
        await driver.allocate_msi(cpu, 8, wanted[: 2 if features else 1])
        with pytest.raises(RuntimeError, match=f"where ids go up to {0x7FFF if features else 254}"):
            await driver.allocate_msi(cpu, 8, wanted[2 if features else 1 :])
        reason = "no IOAPIC" if ioapic is None else "no redirection entry reaches CPU 1"
        with pytest.raises(RuntimeError, match=reason):
            await driver.connect_pin(cpu, 1, wanted[1])

    fabric.run(main, 1 << 15, IOAPIC_BASE)
    fabric.run(main, 0, None)


# Wires


@each_board
@pytest.mark.parametrize("level", [False, True])
def test_a_wire_interrupts(board: str, level: bool) -> None:
    """An edge once each time it rises; a level again after its end, as long as it is up."""
    seen: list[int] = []

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        async def taken(cpu: Any) -> None:
            seen.append(cpu.now - began)
            await cpu.compute(100)
            if len(seen) == 2:
                machine.set_line(WIRE, False)

        await driver.connect_pin(cpu, WIRE, Vector(1, taken, "serial"), level=level)
        began = cpu.now
        machine.set_line(WIRE, True)
        machine.set_line(WIRE, True)
        await cpu.compute(1_000)
        machine.set_line(WIRE, False)
        machine.set_line(WIRE, True)
        await cpu.compute(1_000)
        machine.set_line(WIRE, False)

    statement = ledger_of(body, board, 2)
    assert 0 == statement.pending
    assert ([0, 100] if level else [0, 1_000]) == seen[:2]
    if not level:
        assert 2 == len(seen) == statement.delivered


@each_board
def test_a_masked_wire_is_silent(board: str) -> None:
    """The driver masks all inputs when it starts; a level that is up interrupts when its input is unmasked."""
    seen: list[str] = []

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        async def taken(cpu: Any) -> None:
            seen.append("taken")
            machine.set_line(WIRE, False)

        machine.set_line(WIRE, True)
        await cpu.compute(10)
        seen.append("unmasks")
        await driver.connect_pin(cpu, WIRE, Vector(0, taken, "serial"), level=True)
        await cpu.compute(10)

    assert 1 == ledger_of(body, board).delivered
    assert ["unmasks", "taken"] == seen


async def read_ioapic(cpu: Any, register: int) -> int:
    await cpu.store(IOAPIC_BASE + IOREGSEL, 4, register)
    return int(await cpu.load(IOAPIC_BASE + IOWIN, 4))


async def write_ioapic(cpu: Any, register: int, value: int) -> None:
    await cpu.store(IOAPIC_BASE + IOREGSEL, 4, register)
    await cpu.store(IOAPIC_BASE + IOWIN, 4, value)


@each_board
def test_the_registers_of_the_ioapic(board: str) -> None:
    """The same in the kernel and in the VMM: 24 inputs, entries of two words, remote IRR to be read only."""

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        low = IOAPIC_TABLE + 2 * WIRE
        assert 23 << 16 | 0x11 == await read_ioapic(cpu, IOAPIC_VERSION)
        assert [PIN_MASKED] * 24 == [await read_ioapic(cpu, IOAPIC_TABLE + 2 * pin) for pin in range(24)]
        assert IOAPIC_TABLE + 46 == await cpu.load(IOAPIC_BASE + IOREGSEL, 4)
        await write_ioapic(cpu, low + 1, 5 << 24)
        await write_ioapic(cpu, low, PIN_MASKED | PIN_LEVEL | REMOTE_IRR | 0x44)
        assert PIN_MASKED | PIN_LEVEL | 0x44 == await read_ioapic(cpu, low)
        assert 5 << 24 == await read_ioapic(cpu, low + 1)
        await write_ioapic(cpu, IOAPIC_VERSION, 7)
        await cpu.store(IOAPIC_BASE + 0x20, 4, 7)
        assert 0 == await cpu.load(IOAPIC_BASE + 0x20, 4)

    ledger_of(body, board)


@each_board
def test_remote_irr_is_set_while_a_level_is_in_service(board: str) -> None:
    """Its end clears it, and so does a change to edge, by which guests without ends did it."""

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        low = IOAPIC_TABLE + 2 * WIRE

        async def taken(cpu: Any) -> None:
            entry = await read_ioapic(cpu, low)
            assert REMOTE_IRR == entry & REMOTE_IRR
            machine.set_line(WIRE, False)
            await write_ioapic(cpu, low, entry & ~PIN_LEVEL)
            assert 0 == await read_ioapic(cpu, low) & REMOTE_IRR
            await write_ioapic(cpu, low, entry)

        await driver.connect_pin(cpu, WIRE, Vector(0, taken, "serial"), level=True)
        machine.set_line(WIRE, True)
        await cpu.compute(10)
        assert 0 == await read_ioapic(cpu, low) & REMOTE_IRR

    assert LedgerStatement(raised=1, delivered=1) == ledger_of(body, board)


def test_a_wire_to_nobody() -> None:
    """An entry that names a local APIC there is not: the message is lost, and the guest goes on."""

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        await write_ioapic(cpu, IOAPIC_TABLE + 2 * WIRE + 1, 77 << 24)
        await write_ioapic(cpu, IOAPIC_TABLE + 2 * WIRE, 0x44)
        machine.set_line(WIRE, True)

    assert {"no local APIC took it": 1} == ledger_of(body, "x86-split").dropped


def test_the_end_of_a_level_signals_its_resample_eventfd() -> None:
    """An irqfd with a resampler on an input of the in-kernel IOAPIC: the line is down until it is signalled again."""
    seen: list[int] = []

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        async def taken(cpu: Any) -> None:
            seen.append(resample.event.count)

        event, resample = machine.kvm.eventfd(), machine.kvm.eventfd()
        request = KvmIrqfd(int(event), WIRE, KVM_IRQFD_FLAG_RESAMPLE, int(resample))
        machine.kvm.ioctl(machine.vm_fd, ioctl.KVM_IRQFD, bytearray(request.pack()))
        await driver.connect_pin(cpu, WIRE, Vector(0, taken, "serial"), level=True)
        for count in (1, 2):
            event.signal()
            await cpu.compute(10)
            assert count == resample.event.count

    assert LedgerStatement(raised=2, delivered=2) == ledger_of(body)
    assert [0, 1] == seen


# Memory, ports, ends


@each_board
def test_memory_has_a_hole(board: str) -> None:
    """What does not fit below 3 GiB is above 4 GiB; devices reach both parts, and rings are in the lower."""
    size = HOLE + (1 << 30)

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        assert [(0, HOLE), (HIGH_RAM, 1 << 30)] == machine.ram_regions()
        for gpa in (0x1000, HOLE - 8, HIGH_RAM, HIGH_RAM + (1 << 30) - 8):
            machine.write_memory(gpa, gpa.to_bytes(8, "little"))
            assert gpa == await cpu.load(gpa, 8)
        assert 0xFFFF == await cpu.load(HIGH_RAM + (1 << 30), 2)
        assert HOLE - (1 << 20) == machine.guest_pages().take(8)

    ledger_of(body, board, memory_bytes=size)


@each_board
def test_a_guest_resets_its_machine(board: str) -> None:
    """By the port for that; other ports take writes and read all ones."""

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        await cpu.outp(0x80, 1, 0x42)
        await cpu.outp(PORT_RESET, 1, 0x02)
        assert 0xFFFF == await cpu.inp(0x80, 2)
        assert machine.stopped is None
        machines.append(machine)
        await cpu.outp(PORT_RESET, 1, 0x06)

    machines: list[X86Machine] = []
    ledger_of(body, board)
    assert "reset" == machines[0].stopped


def test_a_triple_fault_resets_the_machine() -> None:
    """As on a PC."""

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        machines.append(machine)
        cpu.set_vector(None)
        await driver.send_ipi(cpu, 0)
        await cpu.compute(1)

    machines: list[X86Machine] = []
    ledger_of(body)
    assert "reset" == machines[0].stopped


def test_the_vmm_may_start_all_cpus() -> None:
    """Programs that do not boot one another."""

    async def main() -> list[int]:
        machine = BOARDS["x86-apic"](3)
        seen: list[int] = []

        async def program(cpu: Any) -> None:
            seen.append(cpu.number)
            await cpu.compute(10)
            await machine.shut_down(cpu)

        machine.power_on()  # type: ignore[attr-defined]
        machine.load(program)
        await machine.run()
        return seen

    assert [0, 1, 2] == fabric.run(main)


def test_reports_tell_the_vectors_of_cpus_apart() -> None:
    """One number is another interrupt on another CPU."""

    async def body(machine: Any, cpu: Any, driver: Any) -> None:
        recorder = Recorder(machine.kvm.engine, banked=machine.banked, name=driver.label)
        machine.vm.listen(recorder)
        device = machine.add_device(Device("d", vectors=2))
        messages = await driver.allocate_msi(cpu, device.devid, [Vector(0, nothing, "zero"), Vector(1, nothing, "one")])
        assert messages[0].data == messages[1].data
        await write_msix(cpu, device.bar, messages)
        for vector in (0, 1, 1):
            device.raise_vector(vector)
            await cpu.compute(10)
        counts.update({name: one.pended for name, one in recorder.statistics().sources.items()})

    counts: dict[str, int] = {}
    ledger_of(body, vcpus=2)
    assert {"zero": 1, "one": 2} == counts
