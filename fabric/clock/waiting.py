"""What simulated tasks wait on: queues of waiters, and time."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator

    from fabric.clock.engine import Engine
    from fabric.clock.hosted import Hosted


class Sleep:
    """What a sleeping task waits for. Leaving needs nothing: its timeline entry has become stale."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def forget(self, task: Hosted) -> None:
        """Nothing is kept of the task."""

    def describe(self) -> str:
        """What is waited for."""
        return self.text


SLEEP = Sleep("time to pass")
ADVANCE = Sleep("the end of an advance")


class WaitQueue:
    """First in, first out: tasks wait, others wake them and hand them a value.

    ``name`` says in a deadlock report what is waited for.
    """

    __slots__ = ("engine", "name", "waiters")

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.waiters: dict[Hosted, None] = {}

    def __len__(self) -> int:
        return len(self.waiters)

    @types.coroutine
    def wait(self) -> Generator[None, Any, Any]:
        """Block until woken; returns the value of the wake. Cancelled waiters lose nothing but their place."""
        task = self.engine.blocking_task()
        task.waits = self
        self.waiters[task] = None
        return (yield)

    def wake_one(self, value: Any = None) -> bool:
        """Wake the task that waits longest with ``value``; False when nobody waits."""
        for task in self.waiters:
            del self.waiters[task]
            self.engine.wake(task, value)
            return True
        return False

    def wake_all(self, value: Any = None) -> int:
        """Wake everybody who waits now, in the order they came; returns how many that were."""
        woken = list(self.waiters)
        self.waiters.clear()
        for task in woken:
            self.engine.wake(task, value)
        return len(woken)

    def forget(self, task: Hosted) -> None:
        """``task`` was cancelled."""
        del self.waiters[task]

    def describe(self) -> str:
        """What is waited for."""
        return self.name
