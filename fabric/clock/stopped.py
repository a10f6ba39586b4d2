"""The clock of a Kvm that was made outside a simulation: time stands still, and timers only remember."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric.clock.priority import Priority

if TYPE_CHECKING:
    from collections.abc import Callable


class StoppedClock:
    """Time outside a simulation: it stands still at 0, and timers keep their deadline but never fire."""

    now = 0

    def timer(
        self, callback: Callable[[], object], *, name: str = "timer", priority: int = Priority.TIMER
    ) -> StoppedTimer:
        """A timer that can be armed and read but does not fire."""
        return StoppedTimer()


class StoppedTimer:
    """A timer of a clock that stands still."""

    __slots__ = ("deadline",)

    def __init__(self) -> None:
        self.deadline: int | None = None

    def arm(self, at_ns: int) -> None:
        """Remember ``at_ns``."""
        self.deadline = at_ns

    def arm_periodic(self, first_ns: int, period_ns: int) -> None:
        """Remember ``first_ns``."""
        self.deadline = first_ns

    def cancel(self) -> None:
        """Forget the deadline."""
        self.deadline = None
