"""The boards, for tests of what holds on each of them."""

from __future__ import annotations

import pytest

from fabric.vmm import BOARDS

every_board = pytest.mark.parametrize("board", list(BOARDS))

WIRES = {
    "arm64-gicv3": "vm0.msi",
    "arm64-gicv2": "vm0.line",
    "x86-apic": "vm0.msi",
    "x86-split": "vm0.msi",
}
"""The channel that the interrupts of devices take."""
