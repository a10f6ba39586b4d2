"""Timers: synchronous callbacks on the timeline.

A timer's callback runs as a step of the engine's timer service task, at priority ``TIMER`` unless told
otherwise. It may do anything synchronous: raise interrupts, wake tasks, arm timers. An exception in it ends the
run. For a task that waits for a time there is ``sleep``; for one that ticks, ``Timer.arm_periodic``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import trio

    from fabric.clock.engine import Engine


class Timer:
    """A one-shot or periodic timer; re-armable, cancellable.

    It has the shape of a task on the timeline (``wake``, ``context``, ``resume``, ``leave_fast_path``), so that the
    engine's loop need not tell the two apart.
    """

    __slots__ = (
        "callback",
        "context",
        "deadline",
        "engine",
        "name",
        "period",
        "priority",
        "resume",
        "task",
        "wake",
    )

    recheck = False

    def __init__(self, engine: Engine, callback: Callable[[], object], name: str, priority: int) -> None:
        self.engine = engine
        self.callback = callback
        self.name = name
        self.priority = priority
        self.deadline: int | None = None
        """When it fires next, in ns; None while it is not armed."""
        self.period = 0
        self.wake = 0
        self.task: trio.lowlevel.Task | None = None
        self.context = engine.context
        self.resume = self._fire

    def __repr__(self) -> str:
        return f"<Timer {self.name!r} at {self.deadline}>"

    def arm(self, at_ns: int) -> None:
        """Fire once at ``at_ns``; a time that has passed means now. An earlier arming is forgotten."""
        self._schedule(at_ns, 0)

    def arm_periodic(self, first_ns: int, period_ns: int) -> None:
        """Fire at ``first_ns`` and every ``period_ns`` (> 0) after it, without drift, until cancelled."""
        if not isinstance(period_ns, int):
            raise TypeError(f"a period must be int nanoseconds, not {period_ns!r}")
        if period_ns <= 0:
            raise ValueError(f"a period must be > 0 ns, not {period_ns}")
        self._schedule(first_ns, period_ns)

    def cancel(self) -> None:
        """Do not fire. Cancelling a timer that is not armed is fine."""
        self.wake = 0
        self.period = 0
        self.deadline = None

    def _schedule(self, at_ns: int, period_ns: int) -> None:
        if not isinstance(at_ns, int):
            raise TypeError(f"a time must be int nanoseconds, not {at_ns!r}")
        self.period = period_ns
        self.deadline = at_ns
        self.engine.schedule_timer(self, at_ns)

    def _fire(self, _value: None) -> None:
        if self.period:
            self._schedule(self.deadline + self.period, self.period)  # type: ignore[operator]  # armed, so not None
        else:
            self.deadline = None
        self.callback()

    def leave_fast_path(self, error: BaseException) -> None:
        """The callback raised: the run fails."""
        self.engine.fail(error)
