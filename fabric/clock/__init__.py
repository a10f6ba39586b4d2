"""Virtual time: the engine, its order, and what tasks of a simulation await.

``run`` starts a simulation; inside it ``now``, ``sleep`` and ``advance`` are all that most programs need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from fabric.clock.engine import (
    Engine,
    Pacing,
    VirtualClock,
    _check_duration,
    current_engine,
)
from fabric.clock.priority import Priority
from fabric.clock.stopped import StoppedClock
from fabric.clock.timer import Timer
from fabric.clock.waiting import WaitQueue

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = [
    "Engine",
    "Pacing",
    "Priority",
    "StoppedClock",
    "Timer",
    "VirtualClock",
    "WaitQueue",
    "advance",
    "current_engine",
    "now",
    "run",
    "sleep",
]


def run(async_main: Callable[..., Awaitable[Any]], *args: Any, seed: int = 0, pacing: Pacing = "fast") -> Any:
    """Run a simulation from synchronous code and return what ``async_main(*args)`` returns.

    Args:
      async_main: an async function; it and every task it starts in a trio nursery live in virtual time.
      seed: of everything random in the run. 0 keeps simultaneous events in first-come order; any other seed
        also draws the order of simultaneous events of one priority from it.
      pacing: ``"fast"``, ``("paced", ratio)`` with ``ratio`` virtual seconds per wall second, or ``"manual"``.

    Raises:
      Deadlock: nothing is runnable and nothing scheduled (or, with manual pacing, time may not move) while
        somebody waits; the message names who waits for what.
      LedgerError: the main task returned, but interrupts were lost or invented.
      RuntimeError: called from inside a simulation or another trio run.
    """
    return Engine(seed, pacing).run(async_main, args)


def _here() -> Engine:
    engine = current_engine()
    if engine is None:
        raise RuntimeError("not inside a simulation: start one with fabric.run(async_main)")
    return engine


def now() -> int:
    """Virtual time in nanoseconds since the run began."""
    return _here().now


async def sleep(ns: int) -> None:
    """Let ``ns`` (int, >= 0) nanoseconds of virtual time pass. A checkpoint, like ``trio.sleep``."""
    engine = _here()
    _check_duration(ns)
    for poll in engine.pollers:
        poll()
    if engine.current is None:
        # The main task is done, and trio closes an abandoned async generator, in a scope that is cancelled.
        await trio.lowlevel.checkpoint()
    await engine.sleep(ns)
    for poll in engine.pollers:
        poll()


async def advance(ns: int) -> None:
    """With manual pacing: run all that falls due in the next ``ns``, return with time exactly there."""
    await _here().advance(ns)
