"""Driver for the local APICs and the IOAPIC of a PC, as an operating system would write it.

Every CPU has its own table of vectors, and a device's message names CPU and vector: that is all there is to set up
for it. Which vector an interrupt gets decides its priority, as the highest is taken first: the driver gives an
interrupt the vector that its priority asks for, or the nearest free one below, or above.

Vectors::

    0x20 - 0x2f   of the 8259 pair, masked and not used
    0x30 - 0xeb   devices
    0xec          the CPU's timer
    0xf6 - 0xfd   IPIs; kind 0 is the highest
    0xfe, 0xff    errors of the local APIC, spurious interrupts

Local APICs are used in x2APIC mode where CPUID has it, through MSRs, otherwise through their page. The timer is the
TSC deadline, or counts down where CPUID does not have that.

Sources: Intel SDM vol. 3, 9.4 (MP initialisation), 11 (APIC), 11.11 (MSI); 82093AA and 8259A data sheets; KVM's
documents on CPUID (KVM_FEATURE_MSI_EXT_DEST_ID); Intel "MultiProcessor Specification", B.4 (INIT, STARTUP).
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import attrs

from fabric.guest.driver import IPI_KINDS, MsiMessage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fabric.guest.driver import Handler, Vector

FIRST_PIC_VECTOR = 0x20
FIRST_VECTOR, LAST_VECTOR = 0x30, 0xEB
TIMER_VECTOR = 0xEC
IPI_VECTOR = 0xFD
ERROR_VECTOR, SPURIOUS_VECTOR = 0xFE, 0xFF
LEAST_PRIORITY = 0xF0

APIC_BASE = 0xFEE0_0000
MSR_APIC_BASE, MSR_X2APIC, MSR_TSC_DEADLINE = 0x1B, 0x800, 0x6E0
BASE_X2APIC, BASE_ENABLE = 1 << 10, 1 << 11
TPR, SVR, ICR, ICR_HIGH = 0x080, 0x0F0, 0x300, 0x310
LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x320, 0x350, 0x360, 0x370
TIMER_INITIAL, TIMER_DIVIDER = 0x380, 0x3E0
SVR_ENABLE = 1 << 8
LVT_MASKED = 1 << 16
LVT_TSC_DEADLINE = 2 << 17
ICR_INIT, ICR_STARTUP, ICR_ASSERT = 5 << 8, 6 << 8, 1 << 14
DIVIDER_CODES = (0b1011, 0b0000, 0b0001, 0b0010, 0b0011, 0b1000, 0b1001, 0b1010)
"""TIMER_DIVIDER for a division by 1, 2, 4, ... 128."""
MAX_COUNT = (1 << 32) - 1

IOREGSEL, IOWIN = 0x00, 0x10
IOAPIC_VERSION, IOAPIC_TABLE = 0x01, 0x10
PIN_LEVEL, PIN_MASKED = 1 << 15, 1 << 16

PIC_MASTER, PIC_SLAVE = 0x20, 0xA0

CPUID_FEATURES, CPUID_KVM_FEATURES, CPUID_FREQUENCIES = 1, 0x4000_0001, 0x4000_0010
ECX_X2APIC, ECX_TSC_DEADLINE = 1 << 21, 1 << 24
EAX_MSI_EXT_DEST_ID = 1 << 15

MAX_MSI_ID, MAX_MSI_EXT_ID = 0xFE, 0x7FFF
"""The greatest ids of local APICs that fit into a message, and into one with seven more bits."""
TRAMPOLINE = 0x8
"""Page of the first code of a started CPU: the vector of its STARTUP IPI."""


@attrs.frozen
class ApicLayout:
    """What firmware says of the interrupt controllers (ACPI's MADT)."""

    ids: Sequence[int]
    """For each CPU the id of its local APIC."""
    ioapic: int | None
    """The page of the IOAPIC, or None where there is none."""
    pic: bool
    """There is an 8259 pair."""


async def start_processor(cpu: Any, apic_id: int) -> None:
    """Start the CPU whose local APIC has that id: INIT, then STARTUP. Processors of today need no pause between."""
    x2apic = bool(await cpu.rdmsr(MSR_APIC_BASE) & BASE_X2APIC)
    await _send(cpu, x2apic, apic_id, ICR_INIT | ICR_ASSERT)
    await _send(cpu, x2apic, apic_id, ICR_STARTUP | ICR_ASSERT | TRAMPOLINE)


async def _send(cpu: Any, x2apic: bool, apic_id: int, command: int) -> None:
    """An IPI through ICR, which is one register in x2APIC mode and two otherwise."""
    if x2apic:
        await cpu.wrmsr(MSR_X2APIC + (ICR >> 4), apic_id << 32 | command)
    else:
        await cpu.store(APIC_BASE + ICR_HIGH, 4, apic_id << 24)
        await cpu.store(APIC_BASE + ICR, 4, command)


async def _write_ioapic(cpu: Any, base: int, register: int, value: int) -> None:
    await cpu.store(base + IOREGSEL, 4, register)
    await cpu.store(base + IOWIN, 4, value)


class ApicDriver:
    """The APIC driver of one guest; see :class:`fabric.guest.driver.InterruptDriver`."""

    def __init__(self, layout: ApicLayout) -> None:
        self.layout = layout
        self._ids = layout.ids
        cpus = len(layout.ids)
        self._actions: list[dict[int, Handler]] = [{} for _ in range(cpus)]
        """For each CPU: vector to handler."""
        self._labels: dict[tuple[int, int], str] = {}
        """By CPU and vector."""
        self._ipi_labels = {IPI_VECTOR: "IPI"}
        self._x2apic = self._tsc_deadline = self._long_ids = False
        self._tsc_khz = self._bus_khz = 0
        self._timers: list[tuple[int, Handler] | None] = [None] * cpus

    # Bringing it up.

    async def start(self, cpu: Any) -> None:
        """What CPUID offers; the 8259 pair and the inputs of the IOAPIC are masked."""
        _, _, ecx, _ = await cpu.cpuid(CPUID_FEATURES)
        self._x2apic = bool(ecx & ECX_X2APIC)
        self._tsc_deadline = bool(ecx & ECX_TSC_DEADLINE)
        features, *_ = await cpu.cpuid(CPUID_KVM_FEATURES)
        self._long_ids = bool(features & EAX_MSI_EXT_DEST_ID)
        self._tsc_khz, self._bus_khz, _, _ = await cpu.cpuid(CPUID_FREQUENCIES)
        if self.layout.pic:
            await self._start_pic(cpu)
        ioapic = self.layout.ioapic
        if ioapic is not None:
            await cpu.store(ioapic + IOREGSEL, 4, IOAPIC_VERSION)
            pins = (await cpu.load(ioapic + IOWIN, 4) >> 16 & 0xFF) + 1
            for pin in range(pins):
                await _write_ioapic(cpu, ioapic, IOAPIC_TABLE + 2 * pin, PIN_MASKED)

    async def _start_pic(self, cpu: Any) -> None:
        """ICW1 to ICW4, then mask all: what it still raises has vectors that are no exceptions."""
        for port, vector, wiring in ((PIC_MASTER, FIRST_PIC_VECTOR, 1 << 2), (PIC_SLAVE, FIRST_PIC_VECTOR + 8, 2)):
            await cpu.outp(port, 1, 0x11)
            for value in (vector, wiring, 0x01, 0xFF):
                await cpu.outp(port + 1, 1, value)

    async def start_cpu(self, cpu: Any) -> None:
        """This CPU's local APIC: on, its inputs masked, all priorities open."""
        if self._x2apic:
            base = await cpu.rdmsr(MSR_APIC_BASE)
            await cpu.wrmsr(MSR_APIC_BASE, base | BASE_ENABLE)
            await cpu.wrmsr(MSR_APIC_BASE, base | BASE_ENABLE | BASE_X2APIC)
        await self._write(cpu, SVR, SVR_ENABLE | SPURIOUS_VECTOR)
        await self._write(cpu, TPR, 0)
        for entry in (LVT_LINT0, LVT_LINT1):
            await self._write(cpu, entry, LVT_MASKED)
        await self._write(cpu, LVT_ERROR, ERROR_VECTOR)
        cpu.set_vector(self.handle)

    # Registers.

    async def _write(self, cpu: Any, offset: int, value: int) -> None:
        if self._x2apic:
            await cpu.wrmsr(MSR_X2APIC + (offset >> 4), value)
        else:
            await cpu.store(APIC_BASE + offset, 4, value)

    # What workloads use.

    def _give_vector(self, vector: Vector, what: str) -> int:
        """A vector of the CPU that ``vector`` is for, near the one that its priority asks for."""
        actions = self._actions[vector.cpu]
        wanted = LAST_VECTOR - vector.priority * (LAST_VECTOR - FIRST_VECTOR) // LEAST_PRIORITY
        for number in chain(range(wanted, FIRST_VECTOR - 1, -1), range(wanted + 1, LAST_VECTOR + 1)):
            if number not in actions:
                actions[number] = vector.handler
                self._labels[vector.cpu, number] = vector.label
                return number
        raise RuntimeError(f"CPU {vector.cpu} has no vector left for {what}")

    async def allocate_msi(self, cpu: Any, devid: int, vectors: Sequence[Vector]) -> list[MsiMessage]:
        """A vector of its CPU for each. RuntimeError when a CPU has none left, or an id that fits no message."""
        messages = []
        for vector in vectors:
            identity = self._ids[vector.cpu]
            limit = MAX_MSI_EXT_ID if self._long_ids else MAX_MSI_ID
            if identity > limit:
                raise RuntimeError(
                    f"no message reaches CPU {vector.cpu}, as its local APIC has the id {identity} on a machine where"
                    f" ids go up to {limit}"
                )
            address = APIC_BASE | (identity & 0xFF) << 12 | identity >> 8 << 5
            messages.append(MsiMessage(address, self._give_vector(vector, f"device {devid:#x}"), devid))
        return messages

    async def connect_pin(self, cpu: Any, pin: int, vector: Vector, *, level: bool = False) -> None:
        """Have input ``pin`` of the IOAPIC interrupt, as an edge or by its level."""
        ioapic = self.layout.ioapic
        if ioapic is None:
            raise RuntimeError("this machine has no IOAPIC")
        if self._ids[vector.cpu] > MAX_MSI_ID:
            raise RuntimeError(f"no redirection entry reaches CPU {vector.cpu}: its destinations have 8 bits")
        number = self._give_vector(vector, f"input {pin} of the IOAPIC")
        await _write_ioapic(cpu, ioapic, IOAPIC_TABLE + 2 * pin + 1, self._ids[vector.cpu] << 24)
        await _write_ioapic(cpu, ioapic, IOAPIC_TABLE + 2 * pin, number | (PIN_LEVEL if level else 0))

    def on_ipi(self, handler: Handler, kind: int = 0, label: str = "IPI") -> None:
        """Vector ``IPI_VECTOR - kind`` runs ``handler``."""
        if not 0 <= kind < IPI_KINDS:
            raise ValueError(f"the kind of an IPI must be 0 to {IPI_KINDS - 1}, not {kind!r}")
        for actions in self._actions:
            actions[IPI_VECTOR - kind] = handler
        self._ipi_labels[IPI_VECTOR - kind] = label

    async def send_ipi(self, cpu: Any, target: int, kind: int = 0) -> None:
        """A fixed interrupt to one CPU."""
        await _send(cpu, self._x2apic, self._ids[target], ICR_ASSERT | IPI_VECTOR - kind)

    async def set_timer(self, cpu: Any, at_ns: int, handler: Handler) -> None:
        """The TSC deadline at the first count at or after ``at_ns``; otherwise the timer counts down to it."""
        number = cpu.number
        actions = self._actions[number]
        if TIMER_VECTOR not in actions:
            actions[TIMER_VECTOR] = self._timer_fired
            self._labels[number, TIMER_VECTOR] = "timer"
            await self._write(cpu, LVT_TIMER, TIMER_VECTOR | (LVT_TSC_DEADLINE if self._tsc_deadline else 0))
        self._timers[number] = at_ns, handler
        await self._arm(cpu, max(0, at_ns - cpu.now))

    async def _arm(self, cpu: Any, ahead_ns: int) -> None:
        if self._tsc_deadline:
            # 0 would turn it off.
            await cpu.wrmsr(MSR_TSC_DEADLINE, cpu.rdtsc() + max(1, -(-ahead_ns * self._tsc_khz // 1_000_000)))
            return
        cycles = max(1, -(-ahead_ns * self._bus_khz // 1_000_000))
        shift = min(max(0, cycles.bit_length() - MAX_COUNT.bit_length()), len(DIVIDER_CODES) - 1)
        await self._write(cpu, TIMER_DIVIDER, DIVIDER_CODES[shift])
        await self._write(cpu, TIMER_INITIAL, min(-(-cycles >> shift), MAX_COUNT))

    async def _timer_fired(self, cpu: Any) -> None:
        set_to = self._timers[cpu.number]
        if set_to is None:
            return
        at_ns, handler = set_to
        if cpu.now < at_ns:
            await self._arm(cpu, at_ns - cpu.now)  # further than it counts
        else:
            await handler(cpu)

    async def handle(self, cpu: Any) -> None:
        """Run the handler, end."""
        vector = cpu.vector
        handler = self._actions[cpu.number].get(vector)
        if handler is not None:
            await handler(cpu)
        elif vector == SPURIOUS_VECTOR:
            return
        cpu.eoi()

    def label(self, number: int, cpu: int = 0) -> str:
        """What vector ``number`` of a CPU is."""
        return self._labels.get((cpu, number)) or self._ipi_labels.get(number) or f"vector {number:#x}"
