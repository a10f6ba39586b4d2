"""Timers: synchronous callbacks on the timeline."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from engine_programs import here

import fabric
from fabric.clock import Priority


def test_a_timer_fires_once() -> None:
    """At its time, and then it is no longer armed."""
    log: list[tuple[int, int | None]] = []

    async def main() -> None:
        timer = here().timer(lambda: log.append((fabric.now(), timer.deadline)))
        timer.arm(30)
        assert 30 == timer.deadline
        await fabric.sleep(100)
        assert timer.deadline is None

    fabric.run(main)

    assert [(30, None)] == log


def test_a_periodic_timer_does_not_drift() -> None:
    """It fires at first, first + period, ..., and its deadline is the next time."""
    log: list[tuple[int, int | None]] = []

    async def main() -> None:
        timer = here().timer(lambda: log.append((fabric.now(), timer.deadline)))
        timer.arm_periodic(5, 7)
        await fabric.sleep(30)
        timer.cancel()
        await fabric.sleep(30)

    fabric.run(main)

    assert [(5, 12), (12, 19), (19, 26), (26, 33)] == log


def test_a_cancelled_timer_does_not_fire() -> None:
    """Not even when it is due at this instant; cancelling again is fine."""

    async def main() -> None:
        timer = here().timer(lambda: pytest.fail("fired"))
        timer.cancel()
        timer.arm(10)
        other = here().timer(timer.cancel)
        other.arm(9)
        await fabric.sleep(20)
        timer.arm(fabric.now())
        timer.cancel()
        timer.cancel()
        assert timer.deadline is None
        await fabric.sleep(20)

    fabric.run(main)


def test_arming_again_replaces() -> None:
    """Only the last arming counts: later, earlier, one-shot for periodic and back."""
    log: list[int] = []

    async def main() -> None:
        timer = here().timer(lambda: log.append(fabric.now()))
        timer.arm(10)
        timer.arm(20)
        timer.arm(15)
        await fabric.sleep(40)
        timer.arm_periodic(50, 5)
        timer.arm(60)
        await fabric.sleep(40)
        timer.arm(90)
        timer.arm_periodic(85, 10)
        await fabric.sleep(20)
        timer.cancel()

    fabric.run(main)

    assert [15, 60, 85, 95] == log


def test_a_callback_may_arm_its_own_timer() -> None:
    """Also for the same instant, and it may turn a periodic timer into a one-shot or stop it."""
    log: list[int] = []

    async def main() -> None:
        def callback() -> None:
            log.append(fabric.now())
            if len(log) == 1:
                timer.arm(fabric.now())
            elif len(log) == 2:
                timer.arm_periodic(20, 3)
            elif len(log) == 4:
                timer.arm(50)
            elif len(log) == 5:
                timer.arm_periodic(60, 1)
                timer.cancel()

        timer = here().timer(callback)
        timer.arm(10)
        await fabric.sleep(100)

    fabric.run(main)

    assert [10, 10, 20, 23, 50] == log


@pytest.mark.parametrize("at", [-5, 0, 99, 100])
def test_a_time_that_has_passed_means_now(at: int) -> None:
    """The callback is not called from ``arm`` itself, but at this instant, before any task goes on."""
    log: list[object] = []

    async def main() -> None:
        await fabric.sleep(100)
        here().timer(lambda: log.append(fabric.now())).arm(at)
        log.append("armed")
        await fabric.sleep(0)
        log.append("slept")

    fabric.run(main)

    assert ["armed", 100, "slept"] == log


def test_a_periodic_timer_catches_up() -> None:
    """Periods that have passed are fired at once, one call each, and the grid is kept."""
    log: list[int] = []

    async def main() -> None:
        await fabric.sleep(25)
        timer = here().timer(lambda: log.append(fabric.now()))
        timer.arm_periodic(0, 10)
        await fabric.sleep(15)
        timer.cancel()

    fabric.run(main)

    assert [25, 25, 25, 30, 40] == log


def test_a_timer_fires_before_tasks_of_its_instant() -> None:
    """Expiry is a fact of time: whoever reads the timer at that instant finds it expired."""
    log: list[str] = []

    async def main() -> None:
        engine = here()
        engine.set_priority(Priority.VCPU)

        async def sleeper() -> None:
            await fabric.sleep(10)
            log.append("task")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            await fabric.sleep(1)
            engine.timer(lambda: log.append("timer")).arm(10)
            engine.timer(lambda: log.append("device"), priority=Priority.DEVICE).arm(10)
            engine.timer(lambda: log.append("channel"), priority=Priority.CHANNEL).arm(10)

    fabric.run(main)

    assert ["channel", "timer", "device", "task"] == log


def test_equal_timers_fire_in_the_order_they_were_armed() -> None:
    """First come, first served."""
    log: list[int] = []

    async def main() -> None:
        timers = [here().timer(lambda number=number: log.append(number)) for number in range(10)]
        for timer in reversed(timers):
            timer.arm(10)
        await fabric.sleep(20)

    fabric.run(main)

    assert list(range(9, -1, -1)) == log


def test_a_callback_may_do_anything_synchronous() -> None:
    """Set trio events, send to memory channels, cancel scopes, start tasks."""
    log: list[object] = []

    async def main() -> None:
        event, scope = trio.Event(), trio.CancelScope()
        send, receive = trio.open_memory_channel[str](0)

        async def child() -> None:
            log.append(await receive.receive())

        def callback() -> None:
            event.set()
            nursery.start_soon(child)
            scope.cancel()
            again.arm(20)

        again = here().timer(lambda: send.send_nowait("sent"))
        async with trio.open_nursery() as nursery:
            here().timer(callback).arm(10)
            with scope:
                await trio.sleep_forever()
            log.append(fabric.now())
            await event.wait()

    fabric.run(main)

    assert [10, "sent"] == log


def test_an_exception_in_a_callback_ends_the_run() -> None:
    """With that very exception, once every task was cancelled."""
    error = KeyError("callback")
    log: list[int] = []

    def callback() -> None:
        raise error

    async def child() -> None:
        try:
            await fabric.sleep(1000)
        finally:
            log.append(fabric.now())

    async def main() -> None:
        here().timer(callback, name="bad").arm(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
            await trio.sleep_forever()

    with pytest.raises(KeyError) as caught:
        fabric.run(main)

    assert error is caught.value
    assert [10] == log


def test_the_first_of_two_failures_counts() -> None:
    """A callback that fails while the run is wound up changes nothing."""

    async def main() -> None:
        here().timer(lambda: {}["first"]).arm(10)
        here().timer(lambda: {}["second"]).arm(10)
        await trio.sleep_forever()

    with pytest.raises(KeyError, match="first"):
        fabric.run(main)


def test_a_failed_callback_counts_even_if_main_goes_on() -> None:
    """A main task that shields itself and returns does not hide it."""

    async def main() -> str:
        here().timer(lambda: {}["callback"]).arm(10)
        with trio.CancelScope(shield=True):
            await fabric.sleep(20)
        return "fine"

    with pytest.raises(KeyError, match="callback"):
        fabric.run(main)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((1.5,), TypeError), (("5",), TypeError), ((5, 0), ValueError), ((5, -1), ValueError), ((5, 1.5), TypeError)],
)
def test_a_timer_refuses_what_is_no_time(arguments: Any, error: type[Exception]) -> None:
    """Times and periods are int nanoseconds, periods above 0; a refused call leaves the timer as it was."""
    log: list[int] = []

    async def main() -> None:
        timer = here().timer(lambda: log.append(fabric.now()))
        timer.arm_periodic(10, 10)
        with pytest.raises(error):
            (timer.arm if len(arguments) == 1 else timer.arm_periodic)(*arguments)
        await fabric.sleep(25)
        timer.cancel()

    fabric.run(main)

    assert [10, 20] == log


def test_a_timer_has_a_name() -> None:
    """For debugging: name and deadline."""

    async def main() -> str:
        timer = here().timer(lambda: None, name="tick")
        timer.arm(5)
        return repr(timer)

    assert "<Timer 'tick' at 5>" == fabric.run(main)
