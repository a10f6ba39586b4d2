"""The engine: one total order of what happens, three pacings, and how a run ends."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from engine_programs import here, log_of

import fabric
from fabric.clock import Engine, Priority, StoppedClock, WaitQueue, current_engine
from fabric.clock.engine import _to_ns
from fabric.errors import Deadlock


async def start(*programs: Callable[[], Awaitable[object]]) -> None:
    """Run ``programs`` as tasks spawned in this order."""
    async with trio.open_nursery() as nursery:
        for program in programs:
            nursery.start_soon(program)


# Order.


def test_events_happen_in_order_of_time() -> None:
    """What is due earlier happens earlier, whoever asked first."""
    log = []

    async def sleeper(ns: int) -> None:
        await fabric.sleep(ns)
        log.append((fabric.now(), ns))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for ns in (30, 10, 20, 10**18, 0):
                nursery.start_soon(sleeper, ns)

    fabric.run(main)

    assert [(0, 0), (10, 10), (20, 20), (30, 30), (10**18, 10**18)] == log


def test_priority_orders_an_instant() -> None:
    """At one instant: channels, timers, devices, vCPUs, other tasks."""
    log = []

    async def at(priority: Priority) -> None:
        here().set_priority(priority)
        await fabric.sleep(10)
        log.append(priority.name)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for priority in reversed(Priority):
                nursery.start_soon(at, priority)

    fabric.run(main)

    assert ["CHANNEL", "TIMER", "DEVICE", "VCPU", "TASK", "LAST"] == log


def test_a_ready_task_yields_to_a_higher_priority_at_its_instant() -> None:
    """What became runnable at an instant and what was scheduled for it are one queue, by priority."""
    log = []

    async def device() -> None:
        here().set_priority(Priority.DEVICE)
        await fabric.sleep(10)
        await fabric.sleep(0)
        log.append("device")

    async def task() -> None:
        await fabric.sleep(10)
        log.append("task")

    fabric.run(start, task, device)

    assert ["device", "task"] == log


def test_equal_events_run_first_come_first_served() -> None:
    """With seed 0, simultaneous events of one priority keep the order in which they were asked for."""
    log = []

    async def sleeper(number: int, first: int) -> None:
        await fabric.sleep(first)
        await fabric.sleep(100 - first)
        log.append(number)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number, first in enumerate((30, 10, 20)):
                nursery.start_soon(sleeper, number, first)

    fabric.run(main)

    assert [1, 2, 0] == log


def test_sleep_0_lets_the_others_of_the_instant_run() -> None:
    """Zero nanoseconds is the end of the queue of this instant, not nothing."""
    log = []

    async def chatty(name: str) -> None:
        for count in range(2):
            log.append((name, count))
            await fabric.sleep(0)

    fabric.run(start, lambda: chatty("a"), lambda: chatty("b"))

    assert [("a", 0), ("b", 0), ("a", 1), ("b", 1)] == log


def test_tasks_start_in_the_order_they_were_spawned() -> None:
    """Trio starts a nursery's tasks in any order; a simulation does not."""
    log: list[int] = []

    async def note(number: int) -> None:
        log.append(number)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(note, number)

    fabric.run(main)

    assert list(range(50)) == log


def test_a_seed_repeats_its_order() -> None:
    """The same seed is the same order of simultaneous events."""
    assert log_of("ties", seed=42) == log_of("ties", seed=42)


def test_seeds_explore_orders() -> None:
    """Different seeds order simultaneous events differently, and every order keeps time and priority."""
    logs = [log_of("ties", seed) for seed in range(8)]

    assert 8 == len({repr(log) for log in logs})
    for log in logs:
        assert log == sorted(log, key=lambda line: (line[0], 3 if line[1] == "end" else line[1][1] % 3))


def test_exploring_can_be_had_apart_from_the_seed() -> None:
    """``explore`` overrules what the seed says about the order of simultaneous events."""

    def order(seed: int, explore: bool) -> list[int]:
        log: list[int] = []

        async def note(number: int) -> None:
            await fabric.sleep(1)
            log.append(number)

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(note, number)

        Engine(seed, explore=explore).run(main, ())
        return log

    assert list(range(20)) == order(5, explore=False)
    assert list(range(20)) != order(0, explore=True)


def test_random_sources_do_not_disturb_each_other() -> None:
    """A named source depends on the run's seed and its name alone."""
    one, other = Engine(3), Engine(3)
    one.rng("disk").random()

    assert other.rng("net").random() == one.rng("net").random()
    assert Engine(4).rng("net").random() != other.rng("net").random()


# Waking.


def test_waiters_are_woken_in_the_order_they_came() -> None:
    """A wait queue is first in, first out, and hands over values."""
    log = []

    async def main() -> None:
        queue = WaitQueue(here(), "a value")

        async def waiter(number: int) -> None:
            await fabric.sleep(10 - number)
            log.append((number, await queue.wait()))

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(waiter, number)
            await fabric.sleep(20)
            assert queue.wake_one("first")
            assert 3 == queue.wake_all("rest")
            assert not queue.wake_one("nobody")
            assert 0 == len(queue)

    fabric.run(main)

    assert [(3, "first"), (2, "rest"), (1, "rest"), (0, "rest")] == log


def test_a_timer_callback_cannot_wait() -> None:
    """Only tasks wait: a callback that tries ends the run with an error that says so."""

    async def main() -> None:
        queue = WaitQueue(here(), "nothing")

        def callback() -> None:
            queue.wait().send(None)

        here().timer(callback).arm(5)
        await fabric.sleep(10)

    with pytest.raises(RuntimeError, match="only a task of this simulation can wait here"):
        fabric.run(main)


# Arguments.


@pytest.mark.parametrize("ns", [1.0, "1", None, True])
def test_durations_are_int_nanoseconds(ns: Any) -> None:
    """Floats and bools are refused: no rounding decides an order."""

    async def main() -> None:
        await fabric.sleep(ns)

    with pytest.raises(TypeError, match="must be int nanoseconds"):
        fabric.run(main)


def test_a_negative_sleep_is_refused() -> None:
    """Time does not run backwards, in either form of sleep, and the task lives on."""

    async def main() -> int:
        with pytest.raises(ValueError, match=">= 0 ns"):
            await fabric.sleep(-1)
        with pytest.raises(ValueError, match="backwards"):
            await here().sleep(-1)
        await fabric.sleep(3)
        return fabric.now()

    assert 3 == fabric.run(main)


@pytest.mark.parametrize(
    "pacing",
    ["slow", ("paced",), ("paced", 0), ("paced", -1.0), ("paced", math.inf), ("paced", "2"), ("fast", 1), None],
)
def test_a_pacing_that_is_none_is_refused(pacing: Any) -> None:
    """Pacing is "fast", "manual" or ("paced", ratio > 0)."""
    with pytest.raises(ValueError, match="paced"):
        fabric.run(trio.sleep, 0, pacing=pacing)


@pytest.mark.parametrize("seed", [1.5, "1", None, False])
def test_a_seed_is_an_int(seed: Any) -> None:
    """Any other seed is refused before the run begins."""
    with pytest.raises(TypeError, match="seed must be an int"):
        fabric.run(trio.sleep, 0, seed=seed)


def test_a_run_does_not_nest() -> None:
    """Neither in a simulation nor in another trio run."""

    async def main() -> None:
        fabric.run(trio.sleep, 0)

    for run in (fabric.run, trio.run):
        with pytest.raises(RuntimeError, match="cannot be started from inside"):
            run(main)


@pytest.mark.parametrize("call", [fabric.now, lambda: fabric.sleep(1).send(None), lambda: fabric.advance(1).send(None)])
def test_time_needs_a_simulation(call: Callable[[], object]) -> None:
    """Outside of a run there is no time to read or to let pass."""
    assert current_engine() is None
    with pytest.raises(RuntimeError, match="not inside a simulation"):
        call()


def test_a_stopped_clock_stands_still() -> None:
    """Outside a simulation timers keep their deadline and do not fire."""
    clock = StoppedClock()
    timer = clock.timer(lambda: pytest.fail("fired"))
    timer.arm(0)

    assert (0, 0) == (clock.now, timer.deadline)

    timer.arm_periodic(5, 5)

    assert 5 == timer.deadline

    timer.cancel()

    assert timer.deadline is None


# Paced and manual time.


def test_paced_time_follows_the_wall() -> None:
    """With ("paced", r), r virtual seconds take one of the wall's."""

    async def main() -> int:
        for _ in range(4):
            await fabric.sleep(50_000_000)
        return fabric.now()

    began = time.monotonic()

    assert 200_000_000 == fabric.run(main, pacing=("paced", 4))
    assert 0.05 <= time.monotonic() - began < 5


def test_paced_time_waits_for_trio_deadlines() -> None:
    """The deadline of a cancel scope is paced like any event."""
    began = time.monotonic()
    fabric.run(trio.sleep, 0.2, pacing=("paced", 4.0))

    assert 0.05 <= time.monotonic() - began < 5


def test_paced_time_passes_while_the_outside_is_waited_for() -> None:
    """What comes from outside a paced run happens at the time it is then, not at that of the last event."""

    async def main() -> tuple[int, int]:
        await trio.to_thread.run_sync(time.sleep, 0.05)
        came = fabric.now()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fabric.sleep, 10**9)
            await trio.to_thread.run_sync(time.sleep, 0.05)
            nursery.cancel_scope.cancel()
        return came, fabric.now()

    first, second = fabric.run(main, pacing=("paced", 1))

    assert 50_000_000 <= first < first + 50_000_000 <= second < 900_000_000


def test_advance_returns_exactly_there() -> None:
    """After ``advance(ns)`` time is ``ns`` later, whether or not anything was due."""

    async def main() -> list[int]:
        times = []
        for ns in (0, 7, 0, 10**12):
            await fabric.advance(ns)
            times.append(fabric.now())
        return times

    assert [0, 7, 7, 10**12 + 7] == fabric.run(main, pacing="manual")


def test_advance_runs_all_that_falls_due() -> None:
    """Everything up to and at the time advanced to has happened, and nothing after it."""
    log: list[int] = []

    async def ticker() -> None:
        while True:
            await fabric.sleep(10)
            log.append(fabric.now())

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ticker)
            await fabric.advance(30)
            assert [10, 20, 30] == log
            await fabric.advance(9)
            assert [10, 20, 30] == log
            await fabric.advance(1)
            assert [10, 20, 30, 40] == log
            nursery.cancel_scope.cancel()

    fabric.run(main, pacing="manual")


def test_advance_0_runs_what_is_runnable() -> None:
    """``advance(0)`` lets spawned and woken tasks run as far as they get without time."""
    log: list[str] = []

    async def child() -> None:
        for step in "abc":
            log.append(step)
            await fabric.sleep(0)
        await fabric.sleep(1)
        log.append("late")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
            assert [] == log
            await fabric.advance(0)
            assert ["a", "b", "c"] == log
            nursery.cancel_scope.cancel()

    fabric.run(main, pacing="manual")


def test_advance_runs_chains_of_trio_primitives() -> None:
    """What a due event sets off through trio primitives is due as well."""
    log: list[int] = []

    async def main() -> None:
        events = [trio.Event() for _ in range(5)]

        async def link(number: int) -> None:
            await events[number].wait()
            await trio.lowlevel.checkpoint()
            log.append(number)
            if number < 4:
                events[number + 1].set()

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(link, number)
            here().timer(events[0].set).arm(10)
            await fabric.advance(9)
            assert [] == log
            await fabric.advance(1)
            assert [0, 1, 2, 3, 4] == log

    fabric.run(main, pacing="manual")


def test_advance_reaches_trio_deadlines() -> None:
    """A cancel scope's deadline falls due like an event, also exactly at the end of an advance."""
    log: list[int] = []

    async def sleeper() -> None:
        await trio.sleep(1e-6)
        log.append(fabric.now())
        with trio.move_on_after(1e-6):
            await trio.sleep_forever()
        log.append(fabric.now())

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            await fabric.advance(999)
            assert [] == log
            await fabric.advance(1)
            assert [1000] == log
            await fabric.advance(1000)
            assert [1000, 2000] == log

    fabric.run(main, pacing="manual")


def test_advances_of_two_tasks_overlap() -> None:
    """Each returns at its own time; time moves as far as the longer one asks."""
    log: list[tuple[int, int]] = []

    async def advancer(ns: int) -> None:
        await fabric.advance(ns)
        log.append((ns, fabric.now()))

    fabric.run(start, lambda: advancer(20), lambda: advancer(10), lambda: advancer(20), pacing="manual")

    assert [(10, 10), (20, 20), (20, 20)] == log


def test_a_cancelled_advance_moves_time_no_further() -> None:
    """Time stands where it was when the advance was cancelled."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(1e-6):
                await fabric.advance(5000)
            assert 1000 == fabric.now()
            nursery.start_soon(fabric.sleep, 10)
            await trio.testing.wait_all_tasks_blocked()
            assert 1000 == fabric.now()
            await fabric.advance(10)

    fabric.run(main, pacing="manual")


def test_advance_needs_manual_pacing() -> None:
    """With any other pacing time moves by itself."""
    with pytest.raises(RuntimeError, match=r"advance\(\) needs pacing 'manual', this run has 'fast'"):
        fabric.run(fabric.advance, 1)


@pytest.mark.parametrize(
    ("wait", "words"),
    [
        pytest.param(lambda: fabric.sleep(5), "main waits for time to pass", id="sleep"),
        pytest.param(lambda: trio.sleep(5), r"main waits for trio's sleep, called in .*main line", id="trio.sleep"),
        pytest.param(lambda: trio.Event().wait(), "main waits for trio's Event.wait", id="event"),
    ],
)
def test_manual_time_does_not_pass_by_itself(wait: Callable[[], Awaitable[object]], words: str) -> None:
    """A main task that awaits what only time can complete makes the run raise, naming it."""

    async def main() -> None:
        await fabric.advance(3)
        await wait()

    with pytest.raises(Deadlock, match=rf"only advance\(\) moves time, which stands at 3 ns: .*{words}"):
        fabric.run(main, pacing="manual")


def test_pollers_are_asked_around_sleeps_and_advances() -> None:
    """Sources outside the simulation are looked at at the start and end of each sleep and advance."""
    polls: list[int] = []

    async def main() -> None:
        here().pollers.append(lambda: polls.append(fabric.now()))
        await fabric.sleep(0)
        await fabric.advance(10)

    fabric.run(main, pacing="manual")

    assert [0, 0, 0, 10] == polls


# How a run ends.


def test_run_returns_what_main_returns() -> None:
    """``fabric.run(f, *args)`` is ``await f(*args)`` in virtual time."""

    async def main(a: int, b: int) -> int:
        await fabric.sleep(a)
        return a * b

    assert 12 == fabric.run(main, 3, 4)


def test_an_exception_of_main_comes_out_as_it_is() -> None:
    """Neither wrapped nor in a group, with main's frame in its traceback."""
    error = KeyError("x")

    async def main() -> None:
        await fabric.sleep(1)
        raise error

    with pytest.raises(KeyError) as caught:
        fabric.run(main)

    assert error is caught.value
    assert "main" in [entry.name for entry in caught.traceback]


def test_exceptions_of_a_nursery_are_a_group() -> None:
    """As in trio: the others are cancelled, and what was raised comes out as one group, in order."""

    async def fail(ns: int, error: Exception) -> None:
        try:
            await fabric.sleep(ns)
        finally:
            raise error

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, 20, ValueError(2))
            nursery.start_soon(fail, 30, ValueError(3))
            nursery.start_soon(fail, 10, ValueError(1))

    with pytest.raises(ExceptionGroup) as caught:
        fabric.run(main)

    assert [1, 2, 3] == [error.args[0] for error in caught.value.exceptions]


def test_checks_at_the_end_fail_the_run() -> None:
    """What ``at_end`` raises comes out of the run, though main returned."""

    async def main() -> None:
        here().at_end.append(lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        fabric.run(main)


def test_checks_at_the_end_are_for_runs_that_end_well() -> None:
    """A run that failed is not checked: its account cannot add up."""

    async def main() -> None:
        here().at_end.append(lambda: pytest.fail("checked"))
        raise KeyError

    with pytest.raises(KeyError):
        fabric.run(main)


def test_simulations_follow_one_another() -> None:
    """A run leaves nothing behind, however it ended."""

    async def fails() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fabric.sleep, 10**9)
            await fabric.sleep(10)
            raise KeyError

    async def succeeds() -> int:
        await fabric.sleep(3)
        return fabric.now()

    for _ in range(3):
        with pytest.raises(ExceptionGroup):
            fabric.run(fails)
        assert current_engine() is None
        assert 3 == fabric.run(succeeds)


@pytest.mark.parametrize(
    ("seconds", "ns"),
    [
        (-math.inf, 0),
        (-1.0, 0),
        (0.0, 0),
        (1e-9, 1),
        (0.3, 300_000_000),
        (0.1 + 0.2, 300_000_001),  # a float more than 0.3
        (1.5e-9, 2),
        (1e18, 10**27),
        (1e300, math.inf),
        (math.inf, math.inf),
    ],
)
def test_a_deadline_is_the_first_nanosecond_not_before_it(seconds: float, ns: float) -> None:
    """Float seconds of trio become the first nanosecond that trio does not take for earlier."""
    assert ns == pytest.approx(_to_ns(seconds), rel=1e-15, abs=0)
    assert ns == math.inf or _to_ns(seconds) / 1e9 >= seconds
