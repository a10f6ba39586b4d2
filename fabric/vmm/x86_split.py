"""The board ``x86-split``: local APICs in the kernel, the IOAPIC in the VMM (KVM_CAP_SPLIT_IRQCHIP), no PIC and no PIT.

Messages of devices go by irqfds to the local APICs, as on ``x86-apic``. A wire goes to the VMM's IOAPIC
(:mod:`fabric.vmm.ioapic`), whose registers are MMIO exits, and which learns of ends by KVM_EXIT_IOAPIC_EOI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric.guest.apic import PIN_LEVEL
from fabric.uapi.kvm import KVM_CAP_SPLIT_IRQCHIP, KVM_EXIT_IOAPIC_EOI, KVM_MAX_IRQ_ROUTES, KVM_RUN_EXIT
from fabric.uapi.x86 import KVM_IOAPIC_NUM_PINS
from fabric.vmm.ioapic import SIZE, UserIoapic
from fabric.vmm.x86 import IOAPIC_BASE, X86Machine

if TYPE_CHECKING:
    from fabric.vmm.machine import Registers


class X86Split(X86Machine):
    """Local APICs in the kernel and an IOAPIC in the VMM, x2APIC, TSC deadline timers; MSIs name CPU and vector."""

    name = "x86-split"
    max_vectors = KVM_MAX_IRQ_ROUTES - KVM_IOAPIC_NUM_PINS

    def __init__(self, vcpus: int, memory_bytes: int = 1 << 30, **options: Any) -> None:
        super().__init__(vcpus, memory_bytes, **options)
        self.ioapic = UserIoapic(self)

    def prepare(self) -> None:
        """The local APICs, with as many GSIs as the IOAPIC has inputs for its messages."""
        self.enable_cap(KVM_CAP_SPLIT_IRQCHIP, KVM_IOAPIC_NUM_PINS)
        self.use_long_ids()

    def own_routes(self) -> bytes:
        """The messages of the IOAPIC's level-triggered inputs, whose ends it wants to know, masked or not."""
        levels = [pin for pin, entry in enumerate(self.ioapic.table) if entry & PIN_LEVEL]
        return b"".join(self.msi_route(pin, self.ioapic.message(pin)).pack() for pin in levels)

    def registers(self, address: int) -> tuple[Registers | None, int]:
        """The IOAPIC, or a device's."""
        offset = address - IOAPIC_BASE
        return (self.ioapic, offset) if 0 <= offset < SIZE else super().registers(address)

    def set_line(self, gsi: int, level: bool) -> None:
        """Drive a wire."""
        self.ioapic.set_line(gsi, level)

    def exited(self, number: int, reason: int, area: memoryview) -> bool:
        """The ends of the IOAPIC's interrupts, besides what every PC has."""
        if reason == KVM_EXIT_IOAPIC_EOI:
            self.ioapic.ended(area[KVM_RUN_EXIT])
            return True
        return super().exited(number, reason, area)
