"""Migration: machines that are saved through their KVM interface and go on in another VM."""

from __future__ import annotations

from fabric.migration.arm64_state import ArmState
from fabric.migration.arm64_vm import ArmVm, Irqfd
from fabric.migration.saved import Saved, restore, save
from fabric.migration.steps import MigrationError, Step, play

__all__ = ["ArmState", "ArmVm", "Irqfd", "MigrationError", "Saved", "Step", "play", "restore", "save"]
