"""A reference VMM: boards, written against :mod:`fabric.kvm` only, as a stranger's VMM would be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric.vmm.arm64_gicv2 import Arm64Gicv2
from fabric.vmm.arm64_gicv3 import Arm64Gicv3
from fabric.vmm.device import BlockDevice, Device, NetworkDevice, RecordedSource
from fabric.vmm.machine import Machine
from fabric.vmm.x86_apic import X86Apic
from fabric.vmm.x86_split import X86Split

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

BOARDS: dict[str, type[Machine]] = {board.name: board for board in (Arm64Gicv3, Arm64Gicv2, X86Apic, X86Split)}
"""The boards by name."""

__all__ = [
    "BOARDS",
    "Arm64Gicv2",
    "Arm64Gicv3",
    "BlockDevice",
    "Device",
    "Machine",
    "NetworkDevice",
    "RecordedSource",
    "X86Apic",
    "X86Split",
    "run_guest",
]


async def run_guest(board: str, guest: Callable[[Any, Any], Awaitable[object]], vcpus: int = 1) -> Any:
    """Run ``guest(cpu, driver)`` on a machine of its own; returns the ledger's statement at its end.

    For ``fabric.run``; see :meth:`Machine.run_guest`. ValueError for a board that is not there.
    """
    if board not in BOARDS:
        raise ValueError(f"the board must be one of {', '.join(BOARDS)}, not {board!r}")
    machine = BOARDS[board](vcpus)
    await machine.run_guest(guest)
    return machine.kvm.statement()
