"""The device a guest driver talks to: one page of registers, rings in memory, MSI-X.

A deliberately plain stand-in for a PCI function with virtio-like queues, the same on every board. Register
block of a device, at its BAR (all little-endian)::

    0x0000 + 16 v   MSI-X table entry of vector v: address (u64), data (u32), control (u32, bit 0: masked)
    0x8000 +  8 q   guest physical address of the ring of queue q (u64)
    0xc000 +  4 q   doorbell of queue q (u32): any value written says "look at the ring"

A ring is two free-running 32-bit counters: ``submitted`` at +0, written by the driver, and ``completed`` at +64,
written by the device. MSI-X and ring registers trap to the VMM; the doorbell is an ioeventfd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric.guest.driver import MsiMessage

BAR_SIZE = 0x1_0000
MSIX_TABLE = 0x0000
MSIX_ENTRY = 16
MSIX_DATA = 8
MSIX_CONTROL = 12
RINGS = 0x8000
DOORBELLS = 0xC000
MAX_QUEUES = 2048

RING_SUBMITTED = 0
RING_COMPLETED = 64
RING_SIZE = 128


async def write_msix(cpu: Any, bar: int, messages: list[MsiMessage]) -> None:
    """Program and unmask the vectors of the device at ``bar``, as a PCI layer does."""
    for vector, message in enumerate(messages):
        entry = bar + MSIX_TABLE + MSIX_ENTRY * vector
        await cpu.store(entry, 8, message.address)
        await cpu.store(entry + MSIX_DATA, 4, message.data)
        await cpu.store(entry + MSIX_CONTROL, 4, 0)
