"""``save`` and ``restore``: a whole machine through its KVM interface, in the documented order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from fabric.errors import ConfigError
from fabric.migration import arm64
from fabric.migration.arm64_state import VERSION, ArmState
from fabric.migration.arm64_vm import ArmVm
from fabric.migration.machine import handles
from fabric.migration.steps import play

if TYPE_CHECKING:
    from fabric.trace.ledger import Ledger
    from fabric.vcpu import Guest
    from fabric.vmm.arm64 import Arm64Machine

NOT_KEPT = "not kept by save and restore"
"""Why an interrupt is dropped that was pending when a machine was saved and is not where it was restored."""


@attrs.frozen(eq=False)
class Saved:
    """A saved machine."""

    state: ArmState
    """What the KVM interface gave, to be pickled or written as JSON."""
    guests: tuple[Guest | None, ...] = ()
    """What ran on the vCPUs: suspended programs, which exist once. Empty for a state that was read from a file."""
    devices: tuple[Any, ...] = ()
    """Device backends of a :class:`~fabric.vmm.Machine`, which go along as they are."""
    pending: int | None = None
    """How many interrupts left the first VM's ledger with the guests."""


def save(source: ArmVm | Arm64Machine) -> Saved:
    """Save a machine whose vCPUs and devices stand still, and take its guests out.

    A :class:`~fabric.vmm.Machine` stands still when its ``run`` was cancelled. Its devices go along.

    Raises:
        MigrationError: a step failed: a vCPU is inside KVM_RUN, the VM is dead, a table is not in memory, ...
        RuntimeError: a guest has failed.
    """
    if isinstance(source, ArmVm):
        return _save(source)
    with handles(source) as vm:
        return attrs.evolve(_save(vm), devices=tuple(source.devices))


def _save(source: ArmVm) -> Saved:
    found: dict[str, Any] = {}
    for _ in play(arm64.SEQUENCES[source.version][0], source, found):
        pass
    guests = tuple(source.guests)
    ledger = _ledger(source)
    pending = ledger.handed_over if ledger is not None and any(guests) else None
    return Saved(ArmState(VERSION, **found), guests, pending=pending)


def restore(saved: Saved, target: ArmVm | Arm64Machine) -> None:
    """Bring a saved machine back, in a VM that is made on the way or, when ``target`` has one, in that.

    The target is new: nothing has run on it, and its memory is all zeros. When this fails it is of no use any more,
    and the guests are still in ``saved``.

    Raises:
        ConfigError: the VM that is there is not set up as the saved one was; every difference is named.
        MigrationError: a step failed.
        ValueError: a machine that has devices of its own.
    """
    if isinstance(target, ArmVm):
        _restore(saved, target)
        return
    if target.devices:
        raise ValueError("a machine that is restored into has no devices of its own: those of the saved one come along")
    with handles(target) as vm:
        _restore(saved, vm)
    target.adopt(saved.devices)


def _restore(saved: Saved, target: ArmVm) -> None:
    state = saved.state
    if state.version != VERSION:
        raise ConfigError("restore", [f"the state has version {state.version}, and this is version {VERSION}"])
    exists = target.vm is not None
    if exists and (problems := arm64.differences(target, state)):
        raise ConfigError("restore", problems)
    target.guests = list(saved.guests)
    steps = arm64.SEQUENCES[arm64.gic_version(state)][1]
    try:
        for _ in play([step for step in steps if not (exists and step.creates)], target, state):
            pass
    except BaseException:
        # What was made pending here so far still is the first machine's.
        if (ledger := _ledger(target)) is not None:
            ledger.hand_over()
        raise
    if (ledger := _ledger(target)) is not None:
        pending = ledger.statement().pending if saved.pending is None else saved.pending
        ledger.take_over(pending, NOT_KEPT)


def _ledger(vm: ArmVm) -> Ledger | None:
    """The ledger of a simulated VM."""
    look_inside = getattr(vm.host.kvm, "vm", None)
    if look_inside is None or vm.vm is None:
        return None
    ledger: Ledger = look_inside(vm.vm.fd).ledger
    return ledger
