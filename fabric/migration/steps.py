"""Sequences of a migration: tables of steps, done one by one.

The KVM documents say in which order the state of a machine has to be read and written. Such an order is a tuple of
:class:`Step`; :func:`play` does them one at a time and comes back after each, so that whoever plays decides what time a
step takes, whether to go on, and (with another tuple) in which order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from fabric.errors import FabricError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


@attrs.frozen
class Step:
    """One step of a documented sequence."""

    ids: tuple[str, ...]
    """Its rows in the interface inventory; a step may be one of two sequences at once."""
    what: str
    """What is done, as an imperative clause."""
    ioctls: tuple[str, ...]
    """The ioctls it makes, by name; guest memory is read and written without any."""
    do: Callable[[Any, Any], None]
    """Does it: ``do(vm, state)`` with the machine and its saved state (a dict while that is being saved)."""
    creates: bool = False
    """It makes part of a machine; on one that was made by other means it is left out."""


class MigrationError(FabricError):
    """A step failed: ``step`` says which, ``errno`` what the kernel answered."""

    def __init__(self, step: Step, cause: Exception) -> None:
        self.step = step
        self.errno = getattr(cause, "errno", None)
        super().__init__(f"{step.what} ({', '.join(step.ids) or 'no inventory row'}): {cause}")


def play(steps: Iterable[Step], vm: Any, state: Any) -> Iterator[Step]:
    """Do each step and hand it back when it is done. MigrationError when the kernel refuses a part of it."""
    for step in steps:
        try:
            step.do(vm, state)
        except OSError as error:
            raise MigrationError(step, error) from error
        yield step
