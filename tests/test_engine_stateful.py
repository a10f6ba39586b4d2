"""Random programs against a reference model of the order: a sorted list, and no coroutines.

A program is a script for each task. The model says when each wait of each task ends and how, in order.
"""

from __future__ import annotations

from bisect import insort
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import fabric
from fabric.clock import Engine, Priority, WaitQueue, engine
from fabric.errors import Deadlock

Op = tuple[Any, ...]
Script = list[Op]
Line = tuple[int, int, int, object]
"""Time, task, position in its script, and how the wait there ended."""

QUEUES = EVENTS = TIMERS = 2
TASKS = 5
SECONDS = 1e-9

places = st.integers(0, 1)
durations = st.integers(0, 4)
ops = st.one_of(
    st.tuples(st.just("sleep"), durations),
    st.tuples(st.just("sleep"), durations),
    st.tuples(st.just("wait"), places),
    st.tuples(st.just("event"), places),
    st.just(("checkpoint",)),
    st.tuples(st.sampled_from(["wake one", "wake all", "set", "unarm"]), places),
    st.tuples(st.just("arm"), places, durations),
    st.tuples(st.just("arm periodic"), places, st.integers(1, 3)),
    st.tuples(st.just("cancel"), st.integers(0, TASKS - 1)),
    st.tuples(st.just("priority"), st.sampled_from([Priority.DEVICE, Priority.TASK])),
)
programs = st.lists(st.lists(ops, max_size=8), min_size=1, max_size=TASKS)

CANCELLED = "cancelled"
HORIZON = 40
"""When every program is cut off: periodic timers and deadlocks end then."""


def simulate(program: list[Script], seed: int = 0) -> list[Line]:
    """Run the scripts as tasks of a real simulation."""
    log: list[Line] = []

    async def main() -> None:
        here = engine.current_engine()
        assert here is not None
        queues = [WaitQueue(here, "a wake") for _ in range(QUEUES)]
        events = [trio.Event() for _ in range(EVENTS)]
        timers = [here.timer(lambda queue=queue: queue.wake_one("timer")) for queue in queues]
        scopes = [trio.CancelScope() for _ in range(TASKS)]

        async def wait(op: Op) -> object:
            if op[0] == "sleep":
                return await here.sleep(op[1])
            if op[0] == "wait":
                return await queues[op[1]].wait()
            if op[0] == "event":
                return await events[op[1]].wait()
            return await trio.lowlevel.checkpoint()

        def act(op: Op) -> None:
            match op:
                case "wake one", place:
                    queues[place].wake_one("one")
                case "wake all", place:
                    queues[place].wake_all("all")
                case "set", place:
                    events[place].set()
                case "arm", place, ns:
                    timers[place].arm(here.now + ns)
                case "arm periodic", place, ns:
                    timers[place].arm_periodic(here.now, ns)
                case "unarm", place:
                    timers[place].cancel()
                case "cancel", task:
                    scopes[task].cancel()
                case "priority", priority:
                    here.set_priority(priority)

        async def run(task: int, script: Script) -> None:
            for position, op in enumerate(script):
                if op[0] not in WAITS:
                    act(op)
                    continue
                with scopes[task] as scope:
                    result = await wait(op)
                log.append((here.now, task, position, CANCELLED if scope.cancelled_caught else result))
                scopes[task] = trio.CancelScope()

        with trio.move_on_at(HORIZON * SECONDS):
            async with trio.open_nursery() as nursery:
                for task, script in enumerate(program):
                    nursery.start_soon(run, task, script)
                nursery.start_soon(fabric.sleep, HORIZON * 2)

    Engine(seed).run(main, ())
    return log


WAITS = ("sleep", "wait", "event", "checkpoint")


class Model:
    """What the scripts do, by the rules of the order alone."""

    def __init__(self, program: list[Script]) -> None:
        self.program = program
        self.now = 0
        self.log: list[Line] = []
        self.seq = 0
        self.timeline: list[tuple[int, int, int, Any, object]] = []
        """Time, priority, counter, who (a task or a ("timer", place)), value."""
        self.valid: dict[Any, int] = {}
        """Who -> counter of the entry that counts."""
        self.position = [0] * len(program)
        """How much of its script a task has done, the wait it is in included."""
        self.priority = [Priority.TASK] * len(program)
        self.waits: list[Op | None] = [None] * len(program)
        """What a task is blocked on; None while it runs or is about to."""
        self.scope_cancelled = [False] * TASKS
        self.queues: list[list[int]] = [[] for _ in range(QUEUES)]
        self.events = [False] * EVENTS
        self.period = [0] * TIMERS
        self.arrivals: list[tuple[int, object]] = []
        """Tasks that trio wakes after this step; they go in spawn order."""

    def schedule(self, at: int, priority: int, who: Any, value: object = None) -> None:
        self.seq += 1
        self.valid[who] = self.seq
        insort(self.timeline, (at, priority, self.seq, who, value), key=lambda entry: entry[:3])

    def wake(self, task: int, value: object) -> None:
        self.waits[task] = None
        self.schedule(self.now, self.priority[task], task, value)

    def arrive(self, task: int, value: object) -> None:
        self.waits[task] = None
        self.valid[task] = 0
        self.arrivals.append((task, value))

    def run(self) -> list[Line]:
        for task in range(len(self.program)):
            self.schedule(0, Priority.TASK, task)
        while self.timeline:
            at, _, seq, who, value = self.timeline.pop(0)
            if self.valid[who] != seq:
                continue
            if at >= HORIZON:
                break
            self.now = at
            if isinstance(who, int):
                self.step(who, value)
            else:
                place = who[1]
                if self.period[place]:
                    self.schedule(at + self.period[place], Priority.TIMER, who)
                self.wake_queue(place, "timer", 1)
            for task, result in sorted(self.arrivals, key=lambda arrival: arrival[0]):
                self.wake(task, result)
            self.arrivals.clear()
        return self.log

    def step(self, task: int, value: object) -> None:
        script = self.program[task]
        self.waits[task] = None
        if value == "checkpoint" and self.scope_cancelled[task]:
            self.arrive(task, CANCELLED)  # a checkpoint looks for a cancellation after it has let others run
            return
        position = self.position[task]
        if position:
            self.log.append((self.now, task, position - 1, None if value == "checkpoint" else value))
            self.scope_cancelled[task] = False
        while position < len(script) and script[position][0] not in WAITS:
            self.act(task, script[position])
            position += 1
        self.position[task] = position + 1
        if position < len(script):
            self.block(task, script[position])

    def block(self, task: int, op: Op) -> None:
        if op[0] == "checkpoint" or (op[0] == "event" and self.events[op[1]]):
            self.arrive(task, "checkpoint")
        elif self.scope_cancelled[task]:
            self.arrive(task, CANCELLED)
        else:
            self.waits[task] = op
            if op[0] == "sleep":
                self.schedule(self.now + op[1], self.priority[task], task)
            elif op[0] == "wait":
                self.queues[op[1]].append(task)

    def wake_queue(self, place: int, value: object, count: int) -> None:
        woken, self.queues[place] = self.queues[place][:count], self.queues[place][count:]
        for task in woken:
            self.wake(task, value)

    def act(self, task: int, op: Op) -> None:
        match op:
            case "wake one", place:
                self.wake_queue(place, "one", 1)
            case "wake all", place:
                self.wake_queue(place, "all", TASKS)
            case "set", place:
                self.events[place] = True
                for waiter, wait in enumerate(self.waits):
                    if wait == ("event", place):
                        self.arrive(waiter, None)
            case "arm", place, ns:
                self.period[place] = 0
                self.schedule(self.now + ns, Priority.TIMER, ("timer", place))
            case "arm periodic", place, ns:
                self.period[place] = ns
                self.schedule(self.now, Priority.TIMER, ("timer", place))
            case "unarm", place:
                self.valid["timer", place] = 0
            case "cancel", victim:
                self.scope_cancelled[victim] = True
                if victim < len(self.program) and self.waits[victim] is not None:
                    for queue in self.queues:
                        if victim in queue:
                            queue.remove(victim)
                    self.arrive(victim, CANCELLED)
            case "priority", priority:
                self.priority[task] = priority


@given(programs)
def test_the_order_is_that_of_the_model(program: list[Script]) -> None:
    """Every wait ends when, how and in the order that the rules of the timeline say."""
    assert Model(program).run() == simulate(program)


@given(programs, st.integers(0, 3))
def test_both_ways_agree(program: list[Script], seed: int) -> None:
    """Whether the engine steps the tasks or has trio do it changes nothing, whatever the seed."""
    fast = simulate(program, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "run_context", lambda: None)
        slow = simulate(program, seed)

    assert fast == slow


@given(programs, st.integers(1, 100))
def test_a_seed_changes_only_the_order_of_an_instant(program: list[Script], seed: int) -> None:
    """A seed repeats itself, and without interaction between tasks every wait ends at the same time as ever."""
    assert simulate(program, seed) == simulate(program, seed)
    alone = [[op for op in script if op[0] in ("sleep", "checkpoint", "priority")] for script in program]

    assert sorted(simulate(alone)) == sorted(simulate(alone, seed))


@given(st.lists(st.tuples(st.integers(0, 2**70), st.integers(0, 7)), max_size=30))
def test_any_int_is_a_time(sleeps: list[tuple[int, int]]) -> None:
    """Times beyond 64 bits and beyond the precision of a float are exact."""
    log: list[int] = []

    async def main() -> None:
        async def sleeper(first: int, then: int) -> None:
            await fabric.sleep(first)
            await fabric.sleep(then)
            log.append(fabric.now())

        async with trio.open_nursery() as nursery:
            for first, then in sleeps:
                nursery.start_soon(sleeper, first, then)

    fabric.run(main)

    assert sorted(first + then for first, then in sleeps) == log


def test_a_program_that_only_waits_deadlocks() -> None:
    """The scripts' engine is the ordinary one: without a horizon, waiting for nobody is a deadlock."""
    with pytest.raises(Deadlock):
        fabric.run(trio.sleep_forever)
