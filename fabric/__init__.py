"""fabric simulates a whole guest's interrupt traffic and the KVM interface a VMM drives it through."""

from __future__ import annotations

from fabric.clock import advance, now, run, sleep
from fabric.errors import (
    ConfigError,
    Deadlock,
    FabricError,
    KvmError,
    LedgerError,
    SimulationError,
)

__all__ = [
    "ConfigError",
    "Deadlock",
    "FabricError",
    "KvmError",
    "LedgerError",
    "SimulationError",
    "advance",
    "now",
    "run",
    "sleep",
]

__version__ = "0.1.0"
