"""The local APIC of a vCPU, in xAPIC and x2APIC mode.

IRR, ISR and TMR are ints of 256 bits: the highest vector is ``bit_length() - 1``. All other registers are words of the
1024-byte page that KVM_GET_LAPIC shows; what a guest may do with each is in :data:`REGISTERS`.

A message that sets a bit of IRR is an interrupt raised, one that finds it set is merged; it is delivered when the CPU
takes it.

Sources: Intel SDM vol. 3, chapter 11 (APIC): 11.4 (registers), 11.5.1 (LVT), 11.6 (IPIs), 11.8 (priorities, EOI), 11.12
(x2APIC). The version is that of the recorded host: 0x14 with six LVT entries.
"""

from __future__ import annotations

import errno
from struct import pack_into, unpack_from
from typing import TYPE_CHECKING, Any

import attrs

from fabric.devices.x86.apic_bus import (
    MODE_EXTINT,
    MODE_INIT,
    MODE_LOWEST,
    MODE_NMI,
    MODE_REMOTE_READ,
    MODE_SIPI,
    MODE_SMI,
    SELF,
)
from fabric.devices.x86.lapic_timer import LapicTimer
from fabric.errors import KvmError
from fabric.memory import MmioHandler

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric.devices.base import IrqEvents
    from fabric.devices.x86.apic_bus import ApicBus

PAGE_SIZE = 1024
DEFAULT_BASE = 0xFEE0_0000
MMIO_SIZE = 0x1000
BASE_BSP, BASE_X2APIC, BASE_ENABLE = 1 << 8, 1 << 10, 1 << 11
"""Bits of MSR_IA32_APICBASE."""

ID, LVR, TPR, APR, PPR, EOI, RRD, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xC0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR = 0x100, 0x180, 0x200
ESR, LVTCMCI, ICR, ICR2 = 0x280, 0x2F0, 0x300, 0x310
LVTT, LVTTHMR, LVTPC, LVT0, LVT1, LVTERR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
TMICT, TMCCT, TDCR, SELF_IPI = 0x380, 0x390, 0x3E0, 0x3F0

VERSION = 0x14
LVR_DIRECTED_EOI = 1 << 24
SVR_ENABLE, SVR_FOCUS, SVR_DIRECTED_EOI = 1 << 8, 1 << 9, 1 << 12
LVT_MASKED = 1 << 16
MODE_SHIFT = 8
MODE_MASK = 7 << MODE_SHIFT
ICR_LOGICAL, ICR_BUSY, ICR_LEVEL, ICR_TRIGGER = 1 << 11, 1 << 12, 1 << 14, 1 << 15
ICR_SHORTHAND_SHIFT = 18
ICR_X2APIC_RESERVED = 0xFFF0_0000 | 3 << 16 | 1 << 13
DFR_FLAT = 0xFFFF_FFFF
MSR_BASE = 0x800

_LVT = LVT_MASKED | 1 << 12 | 0xFF
_LINT = _LVT | MODE_MASK | 1 << 13 | 1 << 14 | 1 << 15
LVT_WRITABLE = {
    LVTT: _LVT,  # and the timer modes that the CPU has
    LVTTHMR: _LVT | MODE_MASK,
    LVTPC: _LVT | MODE_MASK,
    LVT0: _LINT,
    LVT1: _LINT,
    LVTERR: _LVT,
}
"""The LVT entries and their writable bits."""
_WORDS = range(0, 0x80, 0x10)


class NotWritable(Exception):
    """A register that does not take that value, or no value: #GP in x2APIC mode, ignored in xAPIC mode."""


_BIT = tuple(1 << vector for vector in range(256))


class _HotFields:
    """What every interrupt reads and writes of a local APIC. Slots of a base class lie first and together: with
    hundreds of vCPUs none of them is in the processor's cache when its turn comes."""

    __slots__ = (
        "_events", "asks_extint", "auto_eoi", "bus", "hw_enabled", "index", "irr", "isr", "kick", "ledger", "line",
        "ppr", "shown_ppr", "synic_ends", "take_extint", "tmr", "tpr",
    )  # fmt: skip


class Lapic(_HotFields, MmioHandler):
    """One local APIC; ``vcpu.cpu_interface``. Who makes it adds it to the bus, when nothing can go wrong any more.

    Attributes that others read: ``line`` (the CPU has something to take), ``irr``, ``isr``, ``tmr``, and what the
    :class:`~fabric.devices.x86.apic_bus.ApicBus` matches destinations with.
    """

    __slots__ = (
        "arbitrations",
        "base",
        "clustered",
        "external",
        "flat",
        "icr",
        "ldr",
        "page",
        "sw_enabled",
        "tell_synic",
        "timer",
        "vcpu",
        "x2apic",
        "x2apic_id",
        "xapic_id",
    )

    def __init__(self, bus: ApicBus, vcpu: Any, take_extint: Callable[[], int] | None = None) -> None:
        self.bus = bus
        self.vcpu = vcpu
        self.index = vcpu.index
        self.kick: Callable[[], None] = vcpu.kick
        self.ledger = bus.vm.ledger
        self._events: IrqEvents | None = bus.events
        self.take_extint = take_extint
        """Reads the vector of the 8259 pair, or of the VMM's."""
        self.asks_extint = self.external = False
        """There is one for this CPU to take, and: the VMM has given one (KVM_INTERRUPT with a split irqchip)."""
        self.x2apic_id: int = vcpu.vcpu_id
        self.arbitrations = 0
        """How often it was chosen for a message of lowest priority."""
        self.auto_eoi = 0
        """Vectors that end when they are taken (Hyper-V)."""
        self.synic_ends = 0
        """Vectors whose ends the SynIC wants to know."""
        self.tell_synic: Callable[[int], None] | None = None
        self.timer = LapicTimer(self)
        self.page = bytearray(PAGE_SIZE)
        self.irr = self.isr = self.tmr = self.icr = self.tpr = self.ppr = self.shown_ppr = 0
        self.line = False
        self.base = 0
        self.hw_enabled = self.sw_enabled = self.x2apic = self.flat = self.clustered = False
        self.ldr = self.xapic_id = 0
        vcpu.cpu_interface = self
        self.reset(init=False)

    @property
    def events(self) -> IrqEvents | None:
        """Who is told about each interrupt."""
        return self._events

    @events.setter
    def events(self, events: IrqEvents | None) -> None:
        self._events = events

    # -- words of the page

    def word(self, offset: int) -> int:
        """A register as it is stored."""
        value: int = unpack_from("<I", self.page, offset)[0]
        return value

    def _store(self, offset: int, value: int) -> None:
        pack_into("<I", self.page, offset, value & 0xFFFF_FFFF)

    # -- messages

    def accept(self, mode: int, vector: int, level: bool, trigger: int) -> int:
        """Take a message: 1, or 0 for one that this local APIC does not take."""
        if mode <= MODE_LOWEST:
            if mode:
                self.arbitrations += 1
            if (trigger and not level) or not self.sw_enabled or not self.hw_enabled:
                return 0
            bit = 1 << vector
            if trigger:
                self.tmr |= bit
            else:
                self.tmr &= ~bit
            self.pend(vector)
            return 1
        if mode == MODE_EXTINT:
            return 0
        if mode == MODE_INIT:
            if trigger and not level:
                return 0
            self.vcpu.receive_init()
        elif mode == MODE_SIPI:
            self.vcpu.receive_sipi(vector)
        elif mode == MODE_NMI:
            self.vcpu.receive_nmi()
        elif mode == MODE_SMI:
            return int(self.vcpu.receive_smi())
        else:
            assert mode == MODE_REMOTE_READ
            self.vcpu.unhalt()
        return 1

    def accept_edge(self, vector: int) -> None:
        """:meth:`accept` of a fixed, edge-triggered message by a local APIC that is on, for senders who know that."""
        bit = _BIT[vector]
        irr = self.irr
        if self.tmr:
            self.tmr &= ~bit
        if irr & bit:
            self.pend(vector)
            return
        self.ledger.raised += 1
        self.irr = irr | bit
        if self._events is not None:
            self._events.pending(self.index, vector)
        if not self.line and vector >> 4 > self.ppr >> 4:
            self.line = True
            self.kick()

    def pend(self, vector: int) -> None:
        """Set a bit of IRR: an interrupt is raised, or merged into one that waits."""
        bit = _BIT[vector]
        self.ledger.raised += 1
        if self.irr & bit:
            self.ledger.coalesced += 1
            if self._events is not None:
                self._events.coalesced(self.index, vector)
            return
        self.irr |= bit
        if self._events is not None:
            self._events.pending(self.index, vector)
        if not self.line and vector >> 4 > self.ppr >> 4 and self.hw_enabled:
            self.line = True
            self.kick()

    def holds(self, vector: int) -> bool:
        """Whether an interrupt of that vector waits or is in service."""
        return bool((self.irr | self.isr) >> vector & 1)

    # -- the CPU's side

    def update(self) -> None:
        """Recompute PPR and ``line``, and tell the CPU when there is something to take."""
        in_service = self.isr.bit_length() - 1 if self.isr else 0
        tpr = self.tpr & 0xFF
        self.ppr = self.shown_ppr = tpr if tpr & 0xF0 >= in_service & 0xF0 else in_service & 0xF0
        was = self.line
        self.asks_extint = (self.bus.extint or self.external) and self.takes_extint
        self.line = self.waits or self.asks_extint
        if self.line and not was:
            self.kick()

    @property
    def waits(self) -> bool:
        """An interrupt in IRR has priority over what the CPU does."""
        return self.hw_enabled and bool(self.irr) and (self.irr.bit_length() - 1) >> 4 > self.ppr >> 4

    @property
    def takes_extint(self) -> bool:
        """LINT0 is an ExtINT (or the local APIC is off)."""
        return not self.hw_enabled or self.word(LVT0) & (LVT_MASKED | MODE_MASK) == MODE_EXTINT << MODE_SHIFT

    def set_external(self, waits: bool) -> None:
        """The VMM's PIC has, or has not any more, an ExtINT for this CPU (KVM_INTERRUPT with a split irqchip)."""
        self.external = waits
        self.update()

    def take(self) -> int | None:
        """The CPU takes an interrupt: its vector, or None when there is none any more."""
        if self.asks_extint and self.take_extint is not None:
            return self.take_extint()
        if not self.line:
            return None
        irr = self.irr
        vector = irr.bit_length() - 1
        bit = _BIT[vector]
        self.irr = irr ^ bit
        self.ledger.delivered += 1
        if self._events is not None:
            self._events.acknowledged(self.index, vector)
        if self.auto_eoi & bit:
            self.update()
            if self._events is not None:
                self._events.completed(self.index, vector)
            return vector  # nobody else is told: the guest writes EOM for that
        self.isr |= bit
        # It was above PPR, hence above TPR; and of those that wait the highest, so that none preempts it.
        self.ppr = self.shown_ppr = vector & 0xF0
        self.line = False
        return vector

    def eoi(self) -> None:
        """End the interrupt in service with the highest vector; nothing without one."""
        isr = self.isr
        if not isr:
            return
        vector = isr.bit_length() - 1
        bit = _BIT[vector]
        self.isr = isr = isr ^ bit
        if isr:
            self.update()
        else:
            self.ppr = self.shown_ppr = self.tpr
            self.line = self.waits or self.asks_extint if self.irr else self.asks_extint
        if self._events is not None:
            self._events.completed(self.index, vector)
        if self.bus.watched & bit or self.synic_ends & bit:
            self._ended(vector)

    def connect_synic(self, ends: int, auto_eoi: int, told: Callable[[int], None]) -> None:
        """The vectors of the SynIC that is an extension of this: which it wants to know the end of, which have none."""
        self.synic_ends, self.auto_eoi, self.tell_synic = ends, auto_eoi, told

    def _ended(self, vector: int) -> None:
        if self.synic_ends >> vector & 1 and self.tell_synic is not None:
            self.tell_synic(vector)
            if not self.bus.watched >> vector & 1:
                return
        if self.bus.lazy_scan and not self.vcpu.has_run:
            return  # which ends the IOAPIC wants to know is found out at the first entry
        level = bool(self.tmr >> vector & 1)
        self.bus.ended(vector, self, level and not self.word(SVR) & SVR_DIRECTED_EOI)

    # -- registers

    def read(self, offset: int) -> int:
        """A 32-bit register as the guest reads it; KeyError for one that there is not."""
        register = REGISTERS[offset]
        if register.read is None:
            raise KeyError(offset)
        return register.read(self)

    def write(self, offset: int, value: int) -> None:
        """A guest's write of 32 bits. NotWritable for a register or a value that is not."""
        register = REGISTERS.get(offset)
        if register is None or register.write is None:
            raise NotWritable
        register.write(self, value)

    def mmio_read(self, offset: int, size: int, vcpu: Any) -> int:
        """The page: 32-bit registers at multiples of 16; an access must lie within one."""
        inner = offset & 0xF
        if inner + size > 4:
            return 0
        try:
            value = self.read(offset & ~0xF)
        except KeyError:
            return 0
        return value >> 8 * inner & (1 << 8 * size) - 1

    def mmio_write(self, offset: int, size: int, value: int, vcpu: Any) -> None:
        """Only whole registers are written."""
        if size != 4 or offset & 0xF:
            return
        try:
            self.write(offset, value)
        except NotWritable:
            return

    def msr_read(self, index: int) -> int:
        """An x2APIC MSR (0x800 and up). KeyError: #GP."""
        if not self.x2apic:
            raise KeyError(index)
        offset = index - MSR_BASE << 4
        if offset == ICR:
            return self.icr
        register = REGISTERS[offset]
        if register.read is None or not register.msr:
            raise KeyError(index)
        return register.read(self)

    def msr_write(self, index: int, value: int) -> None:
        """Write an x2APIC MSR. NotWritable: #GP."""
        if not self.x2apic:
            raise NotWritable
        offset = index - MSR_BASE << 4
        if offset == ICR:
            if value & ICR_X2APIC_RESERVED:
                raise NotWritable
            value &= ~ICR_BUSY
            self._send(value & 0xFFFF_FFFF, value >> 32)
            self.icr = value
            return
        if value >> 32:
            raise NotWritable
        self.write(offset, value)

    def _send(self, low: int, dest: int) -> None:
        """An IPI as ICR describes it."""
        self.bus.deliver(
            dest,
            bool(low & ICR_LOGICAL),
            low >> MODE_SHIFT & 7,
            low & 0xFF,
            bool(low & ICR_LEVEL),
            1 if low & ICR_TRIGGER else 0,
            shorthand=low >> ICR_SHORTHAND_SHIFT & 3,
            source=self,
        )

    @property
    def nmi_on_lint0(self) -> bool:
        """LINT0 is unmasked, and an NMI."""
        return self.word(LVT0) & (MODE_MASK | LVT_MASKED) == MODE_NMI << MODE_SHIFT

    def deliver_local(self, entry: int) -> bool:
        """An interrupt of the local vector table; whether it was taken."""
        lvt = self.word(entry)
        if not self.hw_enabled or lvt & LVT_MASKED:
            return False
        return bool(self.accept(lvt >> MODE_SHIFT & 7, lvt & 0xFF, True, lvt >> 15 & 1))

    # -- modes and reset

    def set_base(self, value: int) -> None:
        """MSR_IA32_APICBASE, whose checks are the caller's."""
        before, self.base = self.base, value
        enable, x2apic = bool(value & BASE_ENABLE), bool(value & BASE_X2APIC)
        if (before ^ value) & BASE_ENABLE:
            self.hw_enabled = enable
            if enable:
                self._store(ID, self.x2apic_id << 24)
        if (before ^ value) & BASE_X2APIC or (x2apic and not before & BASE_ENABLE):
            self.x2apic = x2apic and enable
            if self.x2apic:
                self._store(ID, self.x2apic_id)
                self._store(LDR, self.x2apic_ldr)
        self.x2apic = x2apic and enable
        if (before ^ value) & (BASE_ENABLE | BASE_X2APIC):
            self.ids_changed()
        self.update()

    @property
    def x2apic_ldr(self) -> int:
        """The logical destination in x2APIC mode: cluster in the upper half, a bit for the member."""
        return self.x2apic_id >> 4 << 16 | 1 << (self.x2apic_id & 0xF)

    def reset(self, *, init: bool) -> None:
        """As at power-on, or with ``init`` by an INIT, which leaves ID and APIC base alone."""
        self.timer.cancel()
        bsp = self.vcpu.is_bsp
        if not init:
            self.base = DEFAULT_BASE | BASE_ENABLE | (BASE_BSP if bsp else 0)
            self.hw_enabled = True
            self.x2apic = False
            self._store(ID, self.x2apic_id << 24)
        self._store(LVR, self.version)
        for entry in LVT_WRITABLE:
            self._store(entry, LVT_MASKED)
        if bsp:
            # LINT0 lets the 8259 pair through, for firmware that does not set it up.
            self._store(LVT0, MODE_EXTINT << MODE_SHIFT)
        self._store(DFR, DFR_FLAT)
        self._store(SVR, 0xFF)
        for offset in (TPR, LDR, ESR, ICR, ICR2, TDCR, TMICT):
            self._store(offset, 0)
        if self.x2apic:
            self._store(LDR, self.x2apic_ldr)
        self.icr = 0
        self._drop_waiting("local APIC reset")
        self.isr = self.tmr = 0
        self.tpr = 0
        self.timer.configure()
        self.ids_changed()
        self.update()

    def _drop_waiting(self, reason: str) -> None:
        if self.irr:
            self.ledger.drop(reason, self.irr.bit_count())
        self.irr = 0

    @property
    def version(self) -> int:
        """LVR: version and the number of LVT entries; directed EOI where the VMM has the IOAPIC."""
        return (
            VERSION
            | len(LVT_WRITABLE) - 1 << 16
            | (LVR_DIRECTED_EOI if self.bus.directed_eoi and self.vcpu.has_x2apic else 0)
        )

    def version_changed(self) -> None:
        """What the version tells of may have changed."""
        self._store(LVR, self.version)

    def ids_changed(self) -> None:
        """What destinations are matched with may have changed."""
        self.xapic_id = self.word(ID) >> 24
        self.ldr = self.word(LDR)
        dfr = self.word(DFR)
        self.flat = dfr == DFR_FLAT
        self.clustered = dfr == DFR_FLAT & 0x0FFF_FFFF
        self.sw_enabled = bool(self.word(SVR) & SVR_ENABLE)
        self.bus.changed()

    # -- state

    def state(self) -> bytes:
        """The page of KVM_GET_LAPIC."""
        page = bytearray(self.page)
        for base, bits in ((ISR, self.isr), (TMR, self.tmr), (IRR, self.irr)):
            for n, offset in enumerate(_WORDS):
                pack_into("<I", page, base + offset, bits >> 32 * n & 0xFFFF_FFFF)
        pack_into("<I", page, TPR, self.tpr)
        pack_into("<I", page, PPR, self.shown_ppr)
        pack_into("<I", page, TMCCT, self.timer.count)
        if self.x2apic:
            number = self.x2apic_id if self.bus.x2apic_format else self.x2apic_id << 24 & 0xFFFF_FFFF
            pack_into("<I", page, ID, number)
            pack_into("<Q", page, ICR, self.icr)
            pack_into("<I", page, ICR2, self.icr >> 32)
        return bytes(page)

    def set_state(self, page: bytes) -> None:
        """KVM_SET_LAPIC: everything but the version; in x2APIC mode the id and what follows from it stay.

        Raises:
            KvmError: EINVAL for another id, where ids are written in full.
        """
        number = unpack_from("<I", page, ID)[0]
        if self.x2apic and self.bus.x2apic_format and number != self.x2apic_id:
            raise KvmError(errno.EINVAL, f"in x2APIC mode the id is {self.x2apic_id:#x}, not {number:#x}")
        self.page[:] = page
        self._store(LVR, self.version)
        if self.x2apic:
            self._store(ID, self.x2apic_id)
            self._store(LDR, self.x2apic_ldr)
            self.icr = self.word(ICR2) << 32 | self.word(ICR)
        bits = [
            sum(unpack_from("<I", page, base + offset)[0] << 32 * n for n, offset in enumerate(_WORDS))
            for base in (ISR, TMR, IRR)
        ]
        gone, new = self.irr & ~bits[2], bits[2] & ~self.irr
        if gone:
            self.ledger.drop("local APIC state replaced", gone.bit_count())
        self.ledger.raised += new.bit_count()
        was_in_service = self.isr
        self.isr, self.tmr, self.irr = bits
        self.tpr = self.word(TPR)
        self.arbitrations = 0
        self.ids_changed()
        self.update()
        if not was_in_service:
            # KVM counts what is in service after it has computed the PPR; until something has it computed again,
            # KVM_GET_LAPIC shows one that misses the new interrupts in service.
            self.shown_ppr = self.tpr & 0xFF
        self.timer.restore(self.word(TMCCT))
        self._store(TMCCT, 0)

    def count_open(self) -> int:
        """Interrupts that wait."""
        return self.irr.bit_count()

    def _check(self) -> None:
        """Assert the invariants."""
        ppr, line = self.ppr, self.line
        self.update()
        assert (ppr, line) == (self.ppr, self.line)
        assert self.sw_enabled == bool(self.word(SVR) & SVR_ENABLE)


# -- the registers as a guest sees them -------------------------------------------------------------------------


@attrs.frozen
class Register:
    """What a guest may do with a register; ``msr``: it can be read as an x2APIC MSR."""

    name: str
    read: Callable[[Lapic], int] | None
    write: Callable[[Lapic, int], None] | None = None
    msr: bool = True


def _stored(offset: int) -> Callable[[Lapic], int]:
    return lambda apic: apic.word(offset)


def _bits(name: str, n: int) -> Callable[[Lapic], int]:
    return lambda apic: getattr(apic, name) >> 32 * n & 0xFFFF_FFFF


def _read_ppr(apic: Lapic) -> int:
    apic.shown_ppr = apic.ppr
    return apic.ppr


def _not_in_x2apic(apic: Lapic) -> None:
    if apic.x2apic:
        raise NotWritable


def _write_id(apic: Lapic, value: int) -> None:
    _not_in_x2apic(apic)
    apic._store(ID, value & 0xFF00_0000)
    apic.ids_changed()


def _write_tpr(apic: Lapic, value: int) -> None:
    apic.tpr = value & 0xFF
    apic.update()


def _write_eoi(apic: Lapic, _value: int) -> None:
    apic.eoi()


def _write_ldr(apic: Lapic, value: int) -> None:
    _not_in_x2apic(apic)
    apic._store(LDR, value & 0xFF00_0000)
    apic.ids_changed()


def _write_dfr(apic: Lapic, value: int) -> None:
    _not_in_x2apic(apic)
    apic._store(DFR, value | 0x0FFF_FFFF)
    apic.ids_changed()


def _write_svr(apic: Lapic, value: int) -> None:
    writable = SVR_ENABLE | SVR_FOCUS | 0xFF
    if apic.word(LVR) & LVR_DIRECTED_EOI:
        writable |= SVR_DIRECTED_EOI
    apic._store(SVR, value & writable)
    if not value & SVR_ENABLE:
        for entry in LVT_WRITABLE:
            apic._store(entry, apic.word(entry) | LVT_MASKED)
        apic.timer.configure()
        apic.timer.pending = 0
    apic.ids_changed()
    apic.update()


def _write_esr(apic: Lapic, value: int) -> None:
    if apic.x2apic and value:
        raise NotWritable


def _write_icr(apic: Lapic, value: int) -> None:
    value &= ~ICR_BUSY
    apic._send(value, apic.word(ICR2) >> 24)
    apic._store(ICR, value)


def _write_icr2(apic: Lapic, value: int) -> None:
    _not_in_x2apic(apic)
    apic._store(ICR2, value & 0xFF00_0000)


def _write_lvt(entry: int) -> Callable[[Lapic, int], None]:
    def write(apic: Lapic, value: int) -> None:
        if not apic.sw_enabled:
            value |= LVT_MASKED
        writable = LVT_WRITABLE[entry]
        if entry == LVTT:
            writable |= apic.timer.mode_mask
        apic._store(entry, value & writable)
        if entry == LVTT:
            apic.timer.configure()
        apic.update()

    return write


def _write_self_ipi(apic: Lapic, value: int) -> None:
    if not apic.x2apic or value & ~0xFF:
        raise NotWritable
    apic._send(SELF << ICR_SHORTHAND_SHIFT | value, 0)


REGISTERS: dict[int, Register] = {
    ID: Register("ID", _stored(ID), _write_id),
    LVR: Register("LVR", _stored(LVR)),
    TPR: Register("TPR", lambda apic: apic.tpr, _write_tpr),
    APR: Register("APR", _stored(APR), msr=False),
    PPR: Register("PPR", _read_ppr),
    EOI: Register("EOI", None, _write_eoi),
    LDR: Register("LDR", _stored(LDR), _write_ldr),
    DFR: Register("DFR", _stored(DFR), _write_dfr, msr=False),
    SVR: Register("SVR", _stored(SVR), _write_svr),
    **{ISR + 16 * n: Register(f"ISR{n}", _bits("isr", n)) for n in range(8)},
    **{TMR + 16 * n: Register(f"TMR{n}", _bits("tmr", n)) for n in range(8)},
    **{IRR + 16 * n: Register(f"IRR{n}", _bits("irr", n)) for n in range(8)},
    ESR: Register("ESR", _stored(ESR), _write_esr),
    ICR: Register("ICR", _stored(ICR), _write_icr),
    ICR2: Register("ICR2", _stored(ICR2), _write_icr2, msr=False),
    LVTT: Register("LVTT", _stored(LVTT), _write_lvt(LVTT)),
    LVTTHMR: Register("LVTTHMR", _stored(LVTTHMR), _write_lvt(LVTTHMR)),
    LVTPC: Register("LVTPC", _stored(LVTPC), _write_lvt(LVTPC)),
    LVT0: Register("LVT0", _stored(LVT0), _write_lvt(LVT0)),
    LVT1: Register("LVT1", _stored(LVT1), _write_lvt(LVT1)),
    LVTERR: Register("LVTERR", _stored(LVTERR), _write_lvt(LVTERR)),
    TMICT: Register("TMICT", _stored(TMICT), lambda apic, value: apic.timer.start(value)),
    TMCCT: Register("TMCCT", lambda apic: apic.timer.count),
    TDCR: Register("TDCR", _stored(TDCR), lambda apic, value: apic.timer.set_divider(value)),
    SELF_IPI: Register("SELF_IPI", None, _write_self_ipi),
}
"""By offset in the page; the MSR is 0x800 plus a sixteenth of it."""
