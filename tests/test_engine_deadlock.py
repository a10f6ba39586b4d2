"""Deadlocks: a run in which nothing can happen any more ends, and says who waits for what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from engine_programs import here

import fabric
from fabric.channel import Channel, Kick
from fabric.clock import WaitQueue
from fabric.errors import Deadlock, SimulationError


def _queue() -> Awaitable[object]:
    return WaitQueue(here(), "a value in the mailbox").wait()


def _channel() -> Awaitable[object]:
    return Channel("vm0.kick", Kick, engine=here()).receive()


def _memory_channel() -> Awaitable[object]:
    return trio.open_memory_channel[int](0)[1].receive()


async def _lock() -> None:
    async with trio.Semaphore(0):
        pass


@pytest.mark.parametrize(
    ("wait", "what"),
    [
        (_queue, "a value in the mailbox"),
        (_channel, "an event on channel vm0.kick"),
        (_memory_channel, "trio's MemoryReceiveChannel.receive, called in test_a_deadlock"),
        (lambda: trio.Event().wait(), "trio's Event.wait, called in test_a_deadlock"),
        (lambda: trio.sleep_forever(), "trio's sleep_forever, called in test_a_deadlock"),
        (_lock, "trio's Semaphore.acquire, called in _lock line"),
    ],
)
def test_a_deadlock_names_who_waits_for_what(wait: Callable[[], Awaitable[object]], what: str) -> None:
    """Nothing runnable, nothing scheduled: the error lists each task and its wait, in task order."""

    async def waiter() -> None:
        await fabric.sleep(5)
        await wait()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter, name="reader")
            nursery.start_soon(fabric.sleep, 7, name="sleeper")

    with pytest.raises(Deadlock, match="nothing is runnable and nothing is scheduled at 7 ns: ") as caught:
        fabric.run(main)

    (main_name, main_waits), (name, waits) = caught.value.waiting

    assert "test_a_deadlock_names_who_waits_for_what.<locals>.main" == main_name
    assert "the tasks of its nursery" == main_waits
    assert "reader" == name
    assert waits.startswith(what)
    assert f"reader waits for {waits}" in str(caught.value)


def test_a_deadlock_is_no_group() -> None:
    """It comes out of the run as it is, after every task was cancelled and cleaned up."""
    log = []

    async def waiter(number: int) -> None:
        try:
            await trio.sleep_forever()
        finally:
            log.append(number)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(waiter, number)

    with pytest.raises(Deadlock) as caught:
        fabric.run(main)

    assert isinstance(caught.value, SimulationError)
    assert [0, 1, 2] == log


def test_a_deadlock_counts_even_if_clean_up_fails() -> None:
    """What else goes wrong while the run is wound up is the cause's context, not the result."""

    async def main() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("clean-up")

    with pytest.raises(Deadlock) as caught:
        fabric.run(main)

    assert isinstance(caught.value.__cause__, KeyError)


def test_clean_up_of_a_deadlock_may_take_time() -> None:
    """Behind a shield a task may still sleep and wait with a timeout, in manual time as well."""
    log = []

    async def main() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await fabric.sleep(10)
                await trio.sleep(1e-6)
            log.append(fabric.now())

    for pacing in ("fast", "manual"):
        with pytest.raises(Deadlock):
            fabric.run(main, pacing=pacing)

    assert [1010, 1010] == log


async def _nursery() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)


@pytest.mark.parametrize("wait", [_queue, trio.sleep_forever, _nursery, _lock])
def test_a_shielded_deadlock_does_not_hang(wait: Callable[[], Awaitable[object]]) -> None:
    """What no cancellation reaches is raised out of its wait by an error, and cleans up."""
    log = []

    async def main() -> None:
        try:
            with trio.CancelScope(shield=True):
                await wait()
        finally:
            log.append("cleaned up")

    with pytest.raises(Deadlock, match="main waits for"):
        fabric.run(main)

    assert ["cleaned up"] == log


def test_a_deadlock_may_be_provoked_late() -> None:
    """Time that passed and tasks that ended do not hide it."""

    async def main() -> None:
        event = trio.Event()
        for _ in range(100):
            await fabric.sleep(10)
            await trio.sleep(1e-8)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fabric.sleep, 10)
        await event.wait()

    with pytest.raises(Deadlock, match=r"at 20\d\d ns"):
        fabric.run(main)


def test_a_cancelled_timer_does_not_keep_a_run_alive() -> None:
    """What is no longer going to happen is no reason to wait."""

    async def main() -> None:
        timer = here().timer(lambda: None)
        timer.arm(10**15)
        timer.cancel()
        with trio.move_on_after(1e-6):
            await fabric.sleep(10**15)
        await trio.sleep_forever()

    with pytest.raises(Deadlock, match="at 1000 ns"):
        fabric.run(main)


def test_waiting_for_oneself_is_found() -> None:
    """A main task alone, waiting for its own channel."""

    async def main() -> None:
        async for _ in Channel("self", Kick, engine=here()):
            pass

    with pytest.raises(Deadlock, match=r"main waits for an event on channel self$"):
        fabric.run(main)
