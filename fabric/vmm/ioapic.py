"""An IOAPIC of the VMM's own: inputs, registers, and messages to the local APICs in the kernel.

KVM has to know which vectors are level-triggered ones of this IOAPIC, to exit at their ends: each redirection entry is
the route of a GSI. Messages go by KVM_SIGNAL_MSI.

Sources: Intel 82093AA data sheet; KVM_CAP_SPLIT_IRQCHIP of the KVM API document.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fabric.errors import KvmError
from fabric.guest.apic import APIC_BASE, IOAPIC_TABLE, IOAPIC_VERSION, IOREGSEL, IOWIN, PIN_LEVEL, PIN_MASKED
from fabric.guest.driver import MsiMessage
from fabric.uapi import ioctl
from fabric.uapi.kvm import KvmMsi
from fabric.uapi.x86 import KVM_IOAPIC_NUM_PINS

if TYPE_CHECKING:
    from fabric.vmm.x86 import X86Machine

SIZE = 0x1000
VERSION = 0x11
DELIVERY_STATUS, REMOTE_IRR = 1 << 12, 1 << 14
READ_ONLY = DELIVERY_STATUS | REMOTE_IRR
DEST_LOGICAL = 1 << 11


class UserIoapic:
    """The IOAPIC of a machine with a split irqchip."""

    def __init__(self, machine: X86Machine) -> None:
        self.machine = machine
        self.selected = 0
        self.table = [PIN_MASKED] * KVM_IOAPIC_NUM_PINS
        """The redirection entries."""
        self.high = [False] * KVM_IOAPIC_NUM_PINS
        """The levels of the inputs."""

    # Registers.

    def read(self, offset: int, size: int) -> int:
        """IOREGSEL, or the register that it selects."""
        if offset == IOREGSEL:
            return self.selected
        if offset != IOWIN:
            return 0
        if self.selected == IOAPIC_VERSION:
            return KVM_IOAPIC_NUM_PINS - 1 << 16 | VERSION
        pin, upper = divmod(self.selected - IOAPIC_TABLE, 2)
        return self.table[pin] >> 32 * upper & 0xFFFF_FFFF if 0 <= pin < KVM_IOAPIC_NUM_PINS else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a register, or write the one selected."""
        if offset == IOREGSEL:
            self.selected = value & 0xFF
        pin, upper = divmod(self.selected - IOAPIC_TABLE, 2)
        if offset != IOWIN or not 0 <= pin < KVM_IOAPIC_NUM_PINS:
            return
        entry = self.table[pin]
        if upper:
            self.table[pin] = entry & 0xFFFF_FFFF | value << 32
        else:
            self.table[pin] = entry & ~0xFFFF_FFFF | value & ~READ_ONLY | entry & REMOTE_IRR
            if not value & PIN_LEVEL:
                self.table[pin] &= ~REMOTE_IRR
        self.machine.set_routes()
        if self.table[pin] & PIN_LEVEL:
            self._send_level(pin)

    # Inputs and ends.

    def set_line(self, pin: int, level: bool) -> None:
        """Drive an input."""
        rises = level and not self.high[pin]
        self.high[pin] = level
        if self.table[pin] & PIN_LEVEL:
            self._send_level(pin)
        elif rises and not self.table[pin] & PIN_MASKED:
            self._send(pin)

    def ended(self, vector: int) -> None:
        """KVM_EXIT_IOAPIC_EOI."""
        for pin, entry in enumerate(self.table):
            if entry & PIN_LEVEL and entry & 0xFF == vector:
                self.table[pin] &= ~REMOTE_IRR
                self._send_level(pin)

    def message(self, pin: int) -> MsiMessage:
        """What a redirection entry sends: mode, trigger and vector are as in a message."""
        entry = self.table[pin]
        address = APIC_BASE | (entry >> 56) << 12 | (1 << 2 if entry & DEST_LOGICAL else 0)
        return MsiMessage(address, entry & (PIN_LEVEL | 0x7FF), 0)

    def _send_level(self, pin: int) -> None:
        if self.high[pin] and not self.table[pin] & (PIN_MASKED | REMOTE_IRR):
            self.table[pin] |= REMOTE_IRR
            self._send(pin)

    def _send(self, pin: int) -> None:
        message = self.message(pin)
        request = KvmMsi(address_lo=message.address, data=message.data)
        try:
            self.machine.kvm.ioctl(self.machine.vm_fd, ioctl.KVM_SIGNAL_MSI, bytearray(request.pack()))
        except KvmError as error:
            if error.errno != errno.EPERM:  # nobody has that id
                raise
