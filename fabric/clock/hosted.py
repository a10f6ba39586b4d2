"""A trio task whose coroutine the engine may step itself.

Every task of a simulation is an ordinary trio task in an ordinary nursery. When it is spawned, the engine puts
a :class:`Hosted` in the place of its coroutine. From then on trio steps the ``Hosted``, and the ``Hosted``
decides who steps the real coroutine:

* While the coroutine waits for something of the engine (a sleep, a channel, an interrupt) the trio task is
  *parked*: blocked in what trio takes for a ``wait_task_rescheduled``. The engine resumes the coroutine directly
  and, if it waits for the engine again, the trio task simply stays parked. That is the fast path.
* When the coroutine waits for a trio primitive, the task stays parked as well: the primitive reschedules it like
  any other, and a cancellation is passed on to the primitive's own abort function.
* Any other trap of trio, and the end of the task, is handed to trio through the parked task.
* When trio resumes the task, the outcome does not go to the coroutine at once but into the engine's queue, so
  that the engine's order and not trio's decides when the coroutine goes on.

Cancellation: trio calls :meth:`Hosted._abort` for a parked task. A coroutine that is blocked in the engine is
taken out of its queue and gets ``Cancelled`` thrown; one that is running or about to run is not touched, and is
offered to trio again (``recheck``) as soon as it blocks.

All code of the simulation runs as such steps, one at a time, while trio has nothing scheduled. So no task that is
on its way through trio can be rescheduled by another, which trio does not allow.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, Protocol

import outcome
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fabric.clock.engine import Engine


class Waitable(Protocol):
    """What a task can wait for: it can be left when the task is cancelled, and it has a name for reports."""

    def forget(self, task: Hosted) -> None:
        """``task`` waits no longer."""
        ...

    def describe(self) -> str:
        """What is waited for, as a noun phrase."""
        ...


class Nested:
    """A coroutine that runs in the place of the one that yielded this trap, until it ends or leaves.

    ``send`` resumes it and ``throw`` raises in it. ``on_abort`` is called when the task is cancelled while the
    nested coroutine is blocked in the engine: the coroutine keeps its place, and ``Cancelled`` is raised in the
    outer one instead.
    """

    __slots__ = ("coro", "on_abort", "value")

    def __init__(self, coro: Coroutine[Any, Any, Any], value: object, on_abort: Callable[[], None]) -> None:
        self.coro = coro
        self.value = value
        self.on_abort = on_abort


class Leave:
    """Trap of a nested coroutine: stay suspended here and hand ``value`` to the outer one."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


_NOTHING: outcome.Outcome[Any] = outcome.Value(None)
_STEP = object()
"""In the place of a trap: trio is to step the coroutine, because the engine cannot."""


class _HotFields:
    """What every step reads and writes of a task. Slots of a base class come first: with hundreds of tasks, none of
    which is in the processor's cache when its turn comes, it matters that they lie together."""

    __slots__ = ("context", "engine", "priority", "recheck", "resume", "task", "waits", "wake")


class Hosted(_HotFields):
    """Stands in for a trio task's coroutine; also the engine's record of the task."""

    __slots__ = (
        "_abort_primitive",
        "_park",
        "_trap",
        "coro",
        "done",
        "in_trio",
        "name",
        "nested",
        "number",
    )

    def __init__(self, engine: Engine, task: trio.lowlevel.Task, number: int, priority: int) -> None:
        self.engine = engine
        self.task = task
        self.number = number
        """Spawn order: the order among tasks that trio wakes at once, for example by one cancellation."""
        self.name = task.name
        self.priority = priority
        self.coro: Any = task.coro
        self.resume: Callable[[Any], Any] = self.coro.send
        """Resumes the innermost coroutine with a value."""
        self.context = task.context
        self.wake = 0
        """Sequence number of the timeline entry that may resume the task; any other entry is stale."""
        self.waits: Waitable | None = None
        """What the coroutine is blocked on in the engine; None while it runs or is about to."""
        self.nested: list[tuple[Any, Nested]] = []
        self.in_trio = False
        """It waits for a trio primitive."""
        self.recheck = False
        """A cancellation was requested when it could not be delivered."""
        self.done = False
        self._trap: Any = None
        """What trio gets when it steps the task next."""
        self._abort_primitive: Any = None
        wait = trio.lowlevel.wait_task_rescheduled(self._abort)
        self._park = wait.send(None)
        wait.close()

    # What trio calls.

    def send(self, value: Any) -> Any:
        """Trio resumes the task: hand it a trap, end it, or note an outcome for the coroutine."""
        trap = self._trap
        if trap is not None:
            self._trap = None
            if trap is _STEP:
                trap = self._step(value.value)
            if isinstance(trap, BaseException):
                self.done = True
                self._rechecked()
                raise trap
            self._rechecked()
            if trap is not self._park:
                self.in_trio = True
                self.waits = None
                self._abort_primitive = getattr(trap, "abort_func", None)
            return trap
        if self.in_trio or value is None:
            self.in_trio = False
            self.waits = None
            self.engine.arrived(self, value)
        else:
            # _abort succeeded: the coroutine is blocked in the engine and has to raise.
            self.resume = self._throw
            self.engine.arrived(self, value.error)
        return self._park

    def throw(self, error: BaseException) -> Any:
        """Trio did not understand a trap, and raises that in the coroutine: when its turn comes."""
        self.in_trio = False
        self.resume = self._throw_inside
        self.engine.arrived(self, error)
        return self._park

    def close(self) -> None:
        """Close the coroutine."""
        self.coro.close()

    @property
    def cr_frame(self) -> types.FrameType | None:
        """The frame of the coroutine, for trio's task tree and its Ctrl-C handling."""
        return self.coro.cr_frame  # type: ignore[no-any-return]

    @property
    def cr_await(self) -> Any:
        """What the coroutine awaits, for ``Task.iter_await_frames``."""
        return self.coro.cr_await

    @property
    def cr_running(self) -> bool:
        """Whether the coroutine is being stepped (``inspect.getcoroutinestate``, which ``trio.Lock`` asks)."""
        return self.coro.cr_running  # type: ignore[no-any-return]

    @property
    def cr_suspended(self) -> bool:
        """Whether the coroutine waits."""
        return self.coro.cr_suspended  # type: ignore[no-any-return]

    @property
    def cr_code(self) -> types.CodeType:
        """The code of the coroutine."""
        return self.coro.cr_code  # type: ignore[no-any-return]

    def _abort(self, raise_cancel: Callable[[], Any]) -> trio.lowlevel.Abort:
        if self.in_trio:
            result: trio.lowlevel.Abort = self._abort_primitive(raise_cancel)
            return result
        if self.waits is None or self.engine.current is self:
            if not self.recheck:
                self.recheck = True
                self.engine.rechecks += 1
                self.engine.attention = True
            return trio.lowlevel.Abort.FAILED
        self.waits.forget(self)
        self.waits = None
        self.wake = 0
        return trio.lowlevel.Abort.SUCCEEDED

    def _rechecked(self) -> None:
        if self.recheck:
            self.recheck = False
            self.engine.rechecks -= 1

    def _step(self, value: Any) -> Any:
        engine = self.engine
        engine.current = self
        trap = self._settle(self._attempt(self.resume, value))
        engine.current = None
        return self._park if trap is None else trap

    # What the engine calls.

    def expel(self, error: BaseException) -> bool:
        """Raise ``error`` in the task, which is blocked where no cancellation reaches it; whether that worked."""
        failed = outcome.Error(error)
        if self._abort(failed.unwrap) is not trio.lowlevel.Abort.SUCCEEDED:
            return False
        trio.lowlevel.reschedule(self.task, failed)
        return True

    def step_in_trio(self, value: Any) -> None:
        """Have trio step the coroutine with ``value``, for want of the fast path."""
        self._hand_over(_STEP, outcome.Value(value))

    def leave_fast_path(self, trap: Any) -> None:
        """After a step: the coroutine did more than wait in the engine, or a cancellation is due.

        ``trap`` is what it yielded, or the exception it ended with (``StopIteration`` when it returned).
        """
        if self.nested or type(trap) is Nested:
            trap = self.context.run(self._settle, trap)
        if trap is None:
            self._hand_over(self._park)
        elif type(trap) is type(self._park) and not self.recheck:
            self.in_trio = True
            self.waits = None
            self._abort_primitive = trap.abort_func
        else:
            self._hand_over(trap)

    def _throw(self, error: BaseException) -> Any:
        """Stands in for ``resume`` once: raise ``error`` in the outermost coroutine."""
        while self.nested:
            self.coro, nested = self.nested.pop()
            nested.on_abort()
        return self._throw_inside(error)

    def _throw_inside(self, error: BaseException) -> Any:
        """Stands in for ``resume`` once: raise ``error`` in the innermost coroutine."""
        self.resume = self.coro.send
        return self.coro.throw(error)

    def _attempt(self, step: Callable[[Any], Any], value: Any) -> Any:
        try:
            return step(value)
        except BaseException as error:
            return error

    def _settle(self, trap: Any) -> Any:
        """Enter and leave nested coroutines until there is a wait in the engine or something for trio."""
        while True:
            step = None
            if type(trap) is Nested:
                self.nested.append((self.coro, trap))
                self.coro, value = trap.coro, trap.value
            elif type(trap) is Leave:
                self.coro, _ = self.nested.pop()
                value = trap.value
            elif self.nested and isinstance(trap, BaseException):
                self.coro, _ = self.nested.pop()
                if isinstance(trap, StopIteration):
                    value = trap.value
                else:
                    step, value = self.coro.throw, trap
            else:
                return trap
            self.resume = self.coro.send
            trap = self._attempt(step or self.resume, value)

    def _hand_over(self, trap: Any, value: outcome.Outcome[Any] = _NOTHING) -> None:
        """Let trio see ``trap``: one of its own, the park, the end of the task, or a request to step."""
        self._trap = trap
        data = self.task.custom_sleep_data  # a primitive may have left it for whoever wakes the task
        trio.lowlevel.reschedule(self.task, value)
        self.task.custom_sleep_data = data
