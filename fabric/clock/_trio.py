"""The one place that touches a private name of trio.

The engine steps simulated tasks itself instead of passing each step through trio's run loop (3 to 10 µs a
pass). For ``trio.lowlevel.current_task()``, cancel scopes and nurseries to work inside such a step, trio has to
believe that the task is running, which it keeps in ``trio._core._run.GLOBAL_RUN_CONTEXT.task``, an attribute of
a ``threading.local``. That name is not public, and neither are the pending deadlines, the tasks that wait for all
others to block, and the field of a trap that holds its abort function. Everything else the engine does with trio
is public: a custom ``trio.abc.Clock``, an ``Instrument``, ``lowlevel.reschedule`` and ``wait_task_rescheduled``.

Where one of the names is missing :func:`run_context` returns None and the engine lets trio step the tasks, one at a
time, in the same order (tests/test_engine_fallback.py compares the two). Then timer callbacks belong to no task, and
``wait_all_tasks_blocked`` waits longer than it should: until time has nowhere to go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sized


class RunContext:
    """What the engine may see and change of trio's run in this thread."""

    __slots__ = ("deadlines", "idle_waiters", "slots")

    def __init__(self, slots: dict[str, Any], deadlines: Any, idle_waiters: Sized) -> None:
        self.slots = slots
        """The thread's run-context dictionary; key ``task`` is the running task, absent between tasks."""
        self.deadlines = deadlines
        """trio's deadlines; its ``_heap`` is empty when no cancel scope has one (the list is replaced at times)."""
        self.idle_waiters = idle_waiters
        """Tasks in ``trio.testing.wait_all_tasks_blocked``."""


def run_context() -> RunContext | None:
    """The private state of the trio run in this thread, or None when this trio keeps it elsewhere."""
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT
        from trio._core._traps import Abort, WaitTaskRescheduled

        slots = GLOBAL_RUN_CONTEXT.__dict__
        runner = slots["runner"]
        deadlines = runner.deadlines
        idle_waiters = runner.waiting_for_idle
        deadlines._heap, deadlines.next_deadline  # noqa: B018  # both are used
        WaitTaskRescheduled(lambda _: Abort.FAILED).abort_func  # noqa: B018
    except (ImportError, AttributeError, KeyError):
        return None
    return RunContext(slots, deadlines, idle_waiters)
