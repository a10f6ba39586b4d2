"""The engine: one total order of everything that happens, and the trio clock that drives it.

How a run goes
--------------
``VirtualClock`` is the run's ``trio.abc.Clock``. Trio asks it how long to sleep exactly when no trio task is
runnable, and that question is where the engine works: it pops the first entry of the timeline, sets the time,
and steps the task of that entry, again and again, until some task needs trio itself. Then it answers "do not
sleep", trio serves that task, comes to rest and asks again. There is no driver task, and a step that stays
within the engine never passes trio's run loop: this is what makes real trio tasks as cheap as generators.

The order
---------
An entry is ``(at_ns, priority, turn, task, value)``. ``at_ns`` is integer virtual time; ``priority`` a
:class:`~fabric.clock.priority.Priority`; ``turn`` is one int of two parts: a counter, so that no two entries are equal
and nothing after it is ever compared, and above it the *tie*, which is 0, or drawn from the run's seed when
interleavings are explored. What is
runnable now and what is due later are kept in two heaps (the first is nearly always tiny) and are merged by
that order. An entry whose ``turn`` is not its task's ``wake`` is stale and skipped: that is how cancelling and
re-arming cost nothing.

What trio wakes
---------------
A task that waits for a trio primitive comes back through trio, in whatever order trio's batch has: trio shuffles
batches, wakes the waiters of an ``Event`` in set order and expires equal deadlines by ``id()``. The engine puts
the tasks that one step woke in the order they were spawned, so that none of this shows.

Rejected: a driver task that wakes others one at a time (two passes of trio's loop a step, 8 µs against 0.4);
sub-classing trio's runner (private, and other libraries' tasks would not take part); plain coroutines outside
trio (no cancel scopes, no nurseries, no third-party trio code).
"""

from __future__ import annotations

import random
import threading
import time
import types
from contextvars import Context, copy_context
from heapq import heappop, heappush, heapreplace
from itertools import count
from math import ceil, inf
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from fabric.clock._trio import RunContext, run_context
from fabric.clock.hosted import Hosted
from fabric.clock.priority import Priority
from fabric.clock.timer import Timer
from fabric.clock.waiting import ADVANCE, SLEEP
from fabric.errors import Deadlock, SimulationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator

_COUNTER_BITS = 48
"""Of a turn; the tie is above them."""
_STEPS_PER_PASS = 20_000
"""After so many steps trio gets a turn, to look for signals and I/O (some 10 ms of wall time)."""

_ENTRY_QUEUE = str(Path(trio.__file__).parent / "_core" / "_entry_queue.py")
"""Where the code of trio's task for calls from other threads is."""

_local = threading.local()

Pacing = str | tuple[str, float]


def current_engine() -> Engine | None:
    """The engine of the simulation that runs in this thread, or None outside of one."""
    return getattr(_local, "engine", None)


class Engine:
    """One simulation: its time, its timeline, its tasks.

    Args:
      seed: of everything random in the run. With 0, simultaneous events of one priority run first come, first
        served; with any other seed their order is drawn from it, so that seeds explore interleavings.
      pacing: ``"fast"`` (time jumps to the next event), ``("paced", ratio)`` (``ratio`` virtual seconds a wall
        second) or ``"manual"`` (time moves only inside :meth:`advance`).
      explore: draw the order of simultaneous events; None: if ``seed`` is not 0.
    """

    __slots__ = (
        "__weakref__",
        "_advances",
        "_armed",
        "_arrivals",
        "_limit",
        "_private",
        "_rested",
        "_root",
        "_service",
        "_slept",
        "_spawned",
        "_tasks",
        "_trio_wants_a_turn",
        "_wall_start",
        "at_end",
        "attention",
        "context",
        "current",
        "failure",
        "hole",
        "later",
        "now",
        "pacing",
        "pollers",
        "ratio",
        "ready",
        "rechecks",
        "seed",
        "turns",
    )

    def __init__(self, seed: int = 0, pacing: Pacing = "fast", *, explore: bool | None = None) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"the seed must be an int, not {seed!r}")
        self.seed = seed
        self.ratio = _ratio(pacing)
        self.pacing = pacing if isinstance(pacing, str) else pacing[0]
        self.now = 0
        self.current: Hosted | None = None
        """The task whose step this is."""
        self.context = copy_context()
        """What timer callbacks run in: the context that the simulation was started from."""
        self.pollers: list[Callable[[], None]] = []
        """Called at the start and end of each ``sleep`` and ``advance``: sources outside the simulation."""
        self.at_end: list[Callable[[], None]] = []
        """Called when the main task returned: checks that raise when the run does not add up."""
        self.turns: Iterator[int] = self._drawn_turns() if (bool(seed) if explore is None else explore) else count(1)
        """The turns to come."""
        self.ready: list[Any] = []
        """What is runnable at this instant, a heap; pushed to by the engine and the vCPUs' hot path only."""
        self.later: list[Any] = []
        """The timeline beyond this instant, likewise."""
        self.hole = False
        """The first entry of ``later`` is the one whose step this is. It is taken off when the step is over, or, as
        nearly every step ends in a wait for a later time, replaced by the entry of that: half the work on the heap."""
        self._arrivals: list[tuple[int, Hosted, Any]] = []
        self._trio_wants_a_turn = False
        self.rechecks = 0
        """How many tasks were refused a cancellation that they have to be offered again."""
        self.attention = False
        """There may be more to do after a step than to take the next: trio has work, or a cancellation waits."""
        self._limit: float = 0 if self.pacing == "manual" else inf
        self._advances: list[int] = []
        self._wall_start = 0.0
        self._private: RunContext | None = None
        self._tasks: dict[trio.lowlevel.Task, Hosted] = {}
        self._spawned = 0
        self._armed = False
        self._rested = False
        self._slept = False
        self._service: trio.lowlevel.Task | None = None
        self._root: trio.CancelScope | None = None
        self.failure: BaseException | None = None

    def _drawn_turns(self) -> Iterator[int]:
        draw = self.rng("interleaving").getrandbits
        for number in count(1):
            yield draw(32) << _COUNTER_BITS | number

    def rng(self, name: str) -> random.Random:
        """A random source of its own for ``name``: drawing from one does not disturb another."""
        return random.Random(f"{self.seed}/{name}")

    # Blocking and waking. These are the hot path.

    def blocking_task(self) -> Hosted:
        """The running task, which is about to block."""
        task = self.current
        if task is None or isinstance(task, Timer):
            raise RuntimeError("only a task of this simulation can wait here (a timer callback cannot)")
        return task

    @types.coroutine
    def sleep(self, ns: int) -> Generator[None, None, None]:
        """Block the running task for ``ns`` (>= 0) of virtual time. The lean form of :func:`fabric.sleep`."""
        task: Any = self.current
        task.wake = turn = next(self.turns)
        task.waits = SLEEP
        if ns > 0:
            if self.hole:
                self.hole = False
                heapreplace(self.later, (self.now + ns, task.priority, turn, task, None))
            else:
                heappush(self.later, (self.now + ns, task.priority, turn, task, None))
        elif ns == 0:
            heappush(self.ready, (self.now, task.priority, turn, task, None))
        else:
            task.waits = None
            raise ValueError(f"cannot sleep for {ns} ns: time does not run backwards")
        yield

    def wake(self, task: Hosted, value: Any = None) -> None:
        """Let a blocked task run, still at this instant, with ``value`` as what its wait returns."""
        task.wake = turn = next(self.turns)
        task.waits = None
        heappush(self.ready, (self.now, task.priority, turn, task, value))

    def _push(self, entry: Any) -> None:
        if self.hole:
            self.hole = False
            heapreplace(self.later, entry)
        else:
            heappush(self.later, entry)

    def wake_at(self, task: Hosted, at_ns: int, value: Any = None) -> None:
        """Let a blocked task run at ``at_ns`` (>= now), unless it is woken or cancelled before."""
        task.wake = turn = next(self.turns)
        self._push((at_ns, task.priority, turn, task, value))

    def schedule_timer(self, timer: Timer, at_ns: int) -> None:
        """Put ``timer`` on the timeline (used by :class:`~fabric.clock.timer.Timer`)."""
        timer.wake = turn = next(self.turns)
        timer.task = self._service
        self._push((max(at_ns, self.now), timer.priority, turn, timer, None))

    def timer(self, callback: Callable[[], object], *, name: str = "timer", priority: int = Priority.TIMER) -> Timer:
        """A timer that calls ``callback()`` when it fires; not armed yet."""
        return Timer(self, callback, name, priority)

    def set_priority(self, priority: Priority) -> None:
        """From now on the running task acts at ``priority`` within an instant."""
        self.blocking_task().priority = priority

    async def advance(self, ns: int) -> None:
        """Run all that falls due within the next ``ns``, and return with time exactly there.

        Only with manual pacing. ``advance(0)`` runs all that is runnable now.
        """
        if self.pacing != "manual":
            raise RuntimeError(f"advance() needs pacing 'manual', this run has {self.pacing!r}: use sleep()")
        _check_duration(ns)
        for poll in self.pollers:
            poll()
        await self._until(self.now + ns)
        for poll in self.pollers:
            poll()
        await self._until(self.now)  # what the pollers brought is runnable now

    @types.coroutine
    def _until(self, at_ns: int) -> Generator[None, None, None]:
        task = self.blocking_task()
        self._advances.append(at_ns)
        self._limit = max(self._advances)
        task.wake = turn = next(self.turns)
        task.waits = ADVANCE
        self._push((at_ns, Priority.LAST, turn, task, None))
        try:
            yield
        finally:
            self._advances.remove(at_ns)
            self._limit = max(self._advances, default=self.now)

    # Running.

    def run(self, async_main: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
        """Run ``async_main(*args)`` as this simulation, in this thread, to its end."""
        if current_engine() is not None or trio.lowlevel.in_trio_run():
            raise RuntimeError("a simulation cannot be started from inside a simulation or another trio run")
        _local.engine = self
        try:
            return trio.run(
                self._main,
                async_main,
                args,
                clock=VirtualClock(self),
                instruments=[_Spawning(self)],
                strict_exception_groups=True,
            )
        finally:
            _local.engine = None

    async def _main(self, async_main: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
        self._tasks[trio.lowlevel.current_task()].name = getattr(async_main, "__qualname__", repr(async_main))
        try:
            with trio.CancelScope() as self._root:
                result = await async_main(*args)
                if self.failure is None:
                    for check in self.at_end:
                        check()
                    return result
        except BaseException as error:
            # What else went wrong while the run was being wound up is context, not the cause.
            if self.failure is None or error is self.failure:
                raise
            raise self.failure from error
        if self.failure is None:
            raise SimulationError("the main task was cancelled from outside")
        raise self.failure

    def fail(self, error: BaseException) -> None:
        """End the run: cancel every task, then raise ``error`` from :func:`fabric.run`. The first one counts."""
        if self.failure is None:
            self.failure = error
        if self._root is not None:
            self._root.cancel()
        self._trio_wants_a_turn = self.attention = True

    async def _serve_timers(self) -> None:
        """The task that timer callbacks run in: it exists so that they have a place in trio's task tree."""
        await trio.sleep_forever()

    # What trio tells: a task was spawned, scheduled, resumed.

    def spawned(self, task: trio.lowlevel.Task) -> None:
        """Take over ``task`` before its first step."""
        if not self._armed:
            if getattr(task.coro, "cr_code", None) is not Engine._main.__code__:
                return  # trio's own tasks
            self._armed = True
            self._private = run_context()
            self._wall_start = time.monotonic()
            self._service = trio.lowlevel.spawn_system_task(self._serve_timers, name="fabric timer service")
            del self._tasks[self._service]  # it never counts as waiting
        self._spawned += 1
        hosted = Hosted(self, task, self._spawned, Priority.TASK)
        if task.coro.cr_code.co_filename != _ENTRY_QUEUE:
            self._tasks[task] = hosted
        task.coro = hosted  # type: ignore[assignment]

    def scheduled(self, task: trio.lowlevel.Task) -> None:
        """Trio has a task runnable."""
        self._trio_wants_a_turn = self.attention = True

    def exited(self, task: trio.lowlevel.Task) -> None:
        """``task`` is gone."""
        self._tasks.pop(task, None)

    def arrived(self, hosted: Hosted, value: Any) -> None:
        """Trio resumed a task with ``value``: it runs when its turn comes."""
        self._arrivals.append((hosted.number, hosted, value))

    def _take_arrivals(self) -> None:
        arrivals = self._arrivals
        arrivals.sort(key=itemgetter(0))
        for _, hosted, value in arrivals:
            self.wake(hosted, value)
        arrivals.clear()

    def _catch_up(self, deadline_ns: float) -> None:
        """Something outside woke a task while trio slept: paced time is as late as the wall, before what is next."""
        if self.ratio:
            following = min(deadline_ns, self.later[0][0] if self.later else inf)
            at = min((time.monotonic() - self._wall_start) * self.ratio * 1e9, following - 1)
            self.now = max(self.now, int(at))

    def pump(self, deadline: float) -> float:
        """Run the timeline until trio has to act; returns how long trio may sleep, in wall seconds.

        ``deadline`` is the earliest deadline of a cancel scope, in virtual seconds, infinity for none.
        """
        if self._arrivals:
            if self._slept:
                self._catch_up(_to_ns(deadline))
            self._take_arrivals()
        self._slept = False
        if not self._armed:
            return inf
        self._trio_wants_a_turn = False
        self.attention = self.rechecks > 0
        private = self._private
        if private is None:
            return self._pump_through_trio(_to_ns(deadline))
        slots = private.slots
        run = Context.run
        deadlines = private.deadlines
        scopes = deadlines._heap
        ready = self.ready
        later = self.later
        now = self.now
        idle_waiters = private.idle_waiters
        fast = self.pacing == "fast"
        free = fast and not len(idle_waiters)  # to move time, up to the next deadline
        try:
            for _ in range(_STEPS_PER_PASS):
                # The first comparison is of ints, and settles it nearly always.
                if ready and not (later and later[0][0] <= now and later[0] < ready[0]):
                    _, _, turn, task, value = heappop(ready)
                    if task.wake != turn:
                        continue
                elif later:
                    at, _, turn, task, value = later[0]
                    if task.wake != turn:
                        heappop(later)
                        continue
                    if at > now:
                        if not free or (scopes and scopes[0][0] * 1e9 < at + 1):
                            pause = self._move_to(at, _to_ns(deadlines.next_deadline()))
                            if pause is not None:
                                return pause
                        self.now = now = at
                    self.hole = True
                else:
                    return self._idle(_to_ns(deadlines.next_deadline()))
                self.current = task
                slots["task"] = task.task
                try:
                    trap = run(task.context, task.resume, value)
                except BaseException as error:
                    trap = error
                if self.hole:
                    self.hole = False
                    heappop(later)
                if trap is not None or self.attention:
                    if trap is not None or task.recheck:
                        task.leave_fast_path(trap)
                        free = fast and not len(idle_waiters)
                    if self._trio_wants_a_turn:
                        return 0
            return 0
        finally:
            self.current = None
            slots.pop("task", None)

    def _pump_through_trio(self, deadline_ns: float) -> float:
        """The same order with trio stepping the tasks: one entry, then back to trio."""
        ready, later = self.ready, self.later
        while ready or later:
            entry = heappop(ready if not later or (ready and ready[0] < later[0]) else later)
            at, _, turn, task, value = entry
            if task.wake != turn:
                continue
            if at > self.now:
                heappush(later, entry)
                pause = self._move_to(at, deadline_ns)
                if pause is not None:
                    return pause
                heappop(later)
            self._rested = False
            if isinstance(task, Timer):
                self.current = task  # type: ignore[assignment]
                try:
                    task.resume(None)
                except BaseException as error:
                    task.leave_fast_path(error)
                self.current = None
            else:
                task.step_in_trio(value)
            return 0
        return self._idle(deadline_ns)

    def _move_to(self, at: float, deadline_ns: float) -> float | None:
        """Move time to ``at`` (> now), or to the deadline before it: None, or how long trio has to sleep first."""
        if deadline_ns <= self.now:
            return 0  # somebody set one that has passed
        if self._private is not None and len(self._private.idle_waiters):
            return inf  # for trio this is the moment when all tasks are blocked
        at = min(at, deadline_ns)
        if at > self._limit and self.failure is None:
            return self._stuck()
        if self.ratio:
            wait = self._wall_start + at / (self.ratio * 1e9) - time.monotonic()
            if wait > 0:
                self._slept = True
                return wait
        self.now = int(at)
        return 0 if at == deadline_ns else None  # trio expires its deadline first

    def _idle(self, deadline_ns: float) -> float:
        """Nothing is runnable and nothing is on the timeline."""
        if deadline_ns < inf:
            return self._move_to(deadline_ns, deadline_ns) or 0
        if self._private is not None and len(self._private.idle_waiters):
            return inf
        return self._stuck()

    def _stuck(self) -> float:
        """Time may not move. Somebody outside may still wake a task; if not, this is a deadlock."""
        if not self._tasks:
            return inf  # winding up: trio's own tasks are at work
        from trio.testing import active_thread_count  # not at the top: it takes pytest along where that is installed

        statistics = trio.lowlevel.current_statistics()
        io = statistics.io_statistics
        # One reader is trio's own, which waits for calls from other threads.
        waiting = getattr(io, "tasks_waiting_read", 1) + getattr(io, "tasks_waiting_write", 0)
        if waiting > 1 or active_thread_count() or statistics.run_sync_soon_queue_size:
            self._slept = True
            return inf
        if self._private is None and not self._rested:
            self._rested = True
            return 1e-9  # for tasks in wait_all_tasks_blocked, which cannot be seen
        self.current = None  # nobody runs: every task may be cancelled
        if self.failure is None:
            self.fail(self._deadlock())
            return 0
        # Winding up a run that failed, some tasks are shielded from their cancellation. Children go first.
        error = SimulationError("the run has failed: nothing will end what a shielded task waits for")
        return 0 if any(task.expel(error) for task in reversed(self._tasks.values())) else inf

    def _deadlock(self) -> Deadlock:
        waiting = [(task.name, _describe(task)) for task in self._tasks.values() if not task.done]
        who = "; ".join(f"{name} waits for {what}" for name, what in waiting)
        if self.pacing == "manual":
            rule = f"with manual pacing only advance() moves time, which stands at {self.now} ns"
        else:
            rule = f"nothing is runnable and nothing is scheduled at {self.now} ns"
        return Deadlock(f"{rule}: {who}", waiting)


class VirtualClock(trio.abc.Clock):
    """Virtual time for trio: ``trio.current_time()`` is the engine's time in seconds, from 0."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def start_clock(self) -> None:
        """Nothing to start: time is the engine's."""

    def current_time(self) -> float:
        """Virtual seconds."""
        return self.engine.now / 1e9

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Trio has nothing to run until ``deadline``: the engine's turn."""
        return self.engine.pump(deadline)


class _Spawning(trio.abc.Instrument):
    """Tells the engine of trio's tasks."""

    def __init__(self, engine: Engine) -> None:
        self.task_spawned = engine.spawned  # type: ignore[method-assign]
        self.task_scheduled = engine.scheduled  # type: ignore[method-assign]
        self.task_exited = engine.exited  # type: ignore[method-assign]


def _to_ns(seconds: float) -> float:
    """The first whole nanosecond that is not before ``seconds`` as trio compares it."""
    scaled = seconds * 1e9
    if scaled == inf:
        return inf
    if scaled <= 0:
        return 0
    at = ceil(scaled) - 1
    while at / 1e9 < seconds:
        at += 1 + (at >> 52)  # beyond 2**52 ns floats skip nanoseconds
    return at


def _describe(task: Hosted) -> str:
    if not task.in_trio and task.waits is not None:
        return task.waits.describe()
    children = [child.name for nursery in task.task.child_nurseries for child in nursery.child_tasks]
    if children:
        return "the tasks of its nursery"
    primitive, user = "", ""
    for frame, line in task.task.iter_await_frames():
        if not frame.f_globals.get("__name__", "").startswith("trio."):
            primitive, user = "", f", called in {frame.f_code.co_qualname} line {line}"
        elif not primitive and not frame.f_code.co_name.startswith("_"):
            primitive = f"'s {frame.f_code.co_qualname}"
    return f"trio{primitive}{user}"


def _check_duration(ns: int) -> None:
    if not isinstance(ns, int) or isinstance(ns, bool):
        raise TypeError(f"a duration must be int nanoseconds, not {ns!r}")
    if ns < 0:
        raise ValueError(f"a duration must be >= 0 ns, not {ns}")


def _ratio(pacing: Pacing) -> float:
    if pacing in ("fast", "manual"):
        return 0.0
    if isinstance(pacing, tuple) and len(pacing) == 2 and pacing[0] == "paced":
        ratio = pacing[1]
        if isinstance(ratio, int | float) and 0 < ratio < inf:
            return float(ratio)
        raise ValueError(f"the ratio of paced time must be a positive number, not {ratio!r}")
    raise ValueError(f"pacing must be 'fast', 'manual' or ('paced', ratio), not {pacing!r}")
