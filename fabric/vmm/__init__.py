"""A reference VMM: boards, written against :mod:`fabric.kvm` only, as a stranger's VMM would be."""

from __future__ import annotations

from fabric.vmm.arm64_gicv3 import Arm64Gicv3
from fabric.vmm.device import BlockDevice, Device, NetworkDevice, RecordedSource
from fabric.vmm.machine import Machine

BOARDS: dict[str, type[Machine]] = {board.name: board for board in (Arm64Gicv3,)}
"""The boards by name."""

__all__ = ["BOARDS", "Arm64Gicv3", "BlockDevice", "Device", "Machine", "NetworkDevice", "RecordedSource"]
