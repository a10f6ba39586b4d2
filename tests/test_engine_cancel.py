"""Cancellation: whatever a simulated task waits for, it leaves it as trio's rules say, and nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import pytest
import trio
from engine_programs import here

import fabric
from fabric.channel import Channel, Kick
from fabric.clock import WaitQueue

Wait = Callable[[], Awaitable[object]]


def waits() -> dict[str, Wait]:
    """A long wait of every kind, by name."""
    engine = here()
    return {
        "fabric.sleep": lambda: fabric.sleep(10**9),
        "engine.sleep": lambda: engine.sleep(10**9),
        "queue": WaitQueue(engine, "nothing").wait,
        "channel": Channel("c", Kick, engine=engine).receive,
        "trio.sleep": lambda: trio.sleep(1),
        "event": trio.Event().wait,
        "memory channel": trio.open_memory_channel[int](0)[1].receive,
        "semaphore": trio.Semaphore(0).acquire,
        "nursery": _patient_nursery,
    }


async def _patient_nursery() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fabric.sleep, 10**9)
        nursery.start_soon(trio.sleep_forever)


KINDS = [
    "fabric.sleep",
    "engine.sleep",
    "queue",
    "channel",
    "trio.sleep",
    "event",
    "memory channel",
    "semaphore",
    "nursery",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_timeout_ends_any_wait(kind: str) -> None:
    """``move_on_after`` cancels what is inside exactly at its deadline."""

    async def main() -> tuple[bool, int]:
        with trio.move_on_after(1e-6) as scope:
            await waits()[kind]()
        return scope.cancelled_caught, fabric.now()

    assert (True, 1000) == fabric.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wait_in_a_cancelled_scope_does_not_begin(kind: str) -> None:
    """A scope cancelled before the wait takes no time, and what was not waited for is not left behind."""

    async def main() -> tuple[bool, int]:
        wait = waits()[kind]
        with trio.CancelScope() as scope:
            scope.cancel()
            await wait()
        return scope.cancelled_caught, fabric.now()

    assert (True, 0) == fabric.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_another_task_can_cancel_any_wait(kind: str) -> None:
    """A scope cancelled by another task is left at that instant, and again when the task waits once more."""

    async def main() -> list[int]:
        left: list[int] = []
        scopes = [trio.CancelScope(), trio.CancelScope()]

        async def victim() -> None:
            wait = waits()[kind]
            for scope in scopes:
                with scope:
                    await wait()
                left.append(fabric.now())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(victim)
            for scope in scopes:
                await fabric.sleep(10)
                scope.cancel()
        return left

    assert [10, 20] == fabric.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shield_holds(kind: str) -> None:
    """A shielded wait goes on, and its task is cancelled at the next wait after it."""
    log: list[object] = []

    async def main() -> None:
        wait = waits()[kind]
        with trio.CancelScope() as outer:
            outer.cancel()
            with trio.CancelScope(shield=True), trio.move_on_after(1e-6):
                await wait()
            log.append(fabric.now())
            await wait()
            log.append("not reached")
        log.append(fabric.now())

    fabric.run(main)

    assert [1000, 1000] == log


def test_a_shield_can_be_taken_away() -> None:
    """A pending cancellation is delivered to a blocked task when its shield goes."""

    async def main() -> int:
        with trio.CancelScope() as outer, trio.CancelScope(shield=True) as inner:
            outer.cancel()

            def lower() -> None:
                inner.shield = False

            here().timer(lower).arm(30)
            await fabric.sleep(100)
        return fabric.now()

    assert 30 == fabric.run(main)


def test_the_outermost_cancelled_scope_catches() -> None:
    """Of nested scopes that are cancelled at once, the outer one ends it."""

    async def main() -> tuple[bool, bool]:
        with trio.move_on_after(1e-6) as outer:
            with trio.move_on_after(1e-6) as inner:
                await fabric.sleep(5000)
            pytest.fail("went on between the scopes")
        return outer.cancelled_caught, inner.cancelled_caught

    assert (True, False) == fabric.run(main)


def test_a_deadline_comes_before_what_happens_at_its_instant() -> None:
    """A wait that would end exactly at the deadline is cancelled: the deadline is there first."""

    async def main() -> list[bool]:
        caught = []
        for ns in (999, 1000, 1001):
            with trio.move_on_at((fabric.now() + 1000) / 1e9) as scope:
                await fabric.sleep(ns)
            caught.append(scope.cancelled_caught)
        return caught

    assert [False, True, True] == fabric.run(main)


@pytest.mark.parametrize("deadline", [-math.inf, -1.0, 0.0, 1e-9])
def test_a_deadline_may_be_moved_into_the_past(deadline: float) -> None:
    """Then it has passed: the scope is cancelled, and time stays where it is."""

    async def main() -> int:
        await fabric.sleep(1000)
        with trio.CancelScope() as scope:
            here().timer(lambda: setattr(scope, "deadline", deadline)).arm(1500)
            await fabric.sleep(10_000)
        return fabric.now()

    assert 1500 == fabric.run(main)


def test_a_deadline_may_be_moved_away() -> None:
    """A deadline that was put off does not cancel, and one that was brought forward does so in time."""

    async def main() -> list[int]:
        times = []
        with trio.move_on_after(1e-6) as scope:
            scope.deadline += 1e-6
            await fabric.sleep(1500)
            times.append(fabric.now())
            scope.deadline = 1.7e-6
            await fabric.sleep(1500)
        times.append(fabric.now())
        return times

    assert [1500, 1700] == fabric.run(main)


@pytest.mark.parametrize("seconds", [1e6, 1e12, 1e18, 1e300])
def test_a_deadline_may_be_far_away(seconds: float) -> None:
    """A timeout of aeons costs nothing, and it can be lived through."""

    async def main() -> None:
        with trio.move_on_after(seconds):
            for _ in range(1000):
                await fabric.sleep(1)
        with trio.move_on_after(min(seconds, 1e12)) as scope:
            await trio.sleep_forever()
        assert scope.cancelled_caught

    fabric.run(main)


def test_tasks_cancelled_at_once_go_in_spawn_order() -> None:
    """Trio keeps them in a set; here the order is that in which they were spawned, whatever they wait for."""
    log = []

    async def victim(number: int, wait: Wait) -> None:
        try:
            await fabric.sleep(100 - number)
            await wait()
        finally:
            log.append(number)

    async def main() -> None:
        kinds = waits()
        kinds.pop("nursery")  # its children go first
        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(victim, number, kinds[KINDS[number % len(kinds)]])
            await fabric.sleep(1000)
            nursery.cancel_scope.cancel()

    fabric.run(main)

    assert list(range(40)) == log


def test_a_value_on_its_way_is_not_lost() -> None:
    """A waiter that was handed a value before it was cancelled gets the value, then the cancellation."""
    log: list[object] = []

    async def main() -> None:
        queue = WaitQueue(here(), "a value")

        async def waiter() -> None:
            with trio.CancelScope() as scope:
                scopes.append(scope)
                log.append(await queue.wait())
                await fabric.sleep(10)
                log.append("not reached")
            log.append(fabric.now())

        scopes: list[trio.CancelScope] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter)
            await fabric.sleep(5)
            queue.wake_one("value")
            scopes[0].cancel()

    fabric.run(main)

    assert ["value", 5] == log


def test_a_wake_after_a_cancellation_goes_to_the_next() -> None:
    """A waiter that was cancelled is out of the queue at once: a wake at the same instant reaches another."""
    log: list[object] = []

    async def main() -> None:
        queue = WaitQueue(here(), "a value")
        scope = trio.CancelScope()

        async def first() -> None:
            with scope:
                await queue.wait()
            log.append("cancelled")

        async def second() -> None:
            log.append(await queue.wait())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            nursery.start_soon(second)
            await fabric.sleep(5)
            scope.cancel()
            assert queue.wake_one("value")

    fabric.run(main)

    assert ["value", "cancelled"] == log


def test_a_cancelled_task_can_wait_again() -> None:
    """Having caught its cancellation a task lives on, in the engine and in trio, and can be cancelled again."""

    async def main() -> int:
        for round_ in range(5):
            with trio.move_on_after(1e-6):
                await (fabric.sleep(10**6) if round_ % 2 else trio.sleep(1))
            await fabric.sleep(10)
            await trio.sleep(1e-8)
            await trio.lowlevel.checkpoint()
        return fabric.now()

    assert 5100 == fabric.run(main)


def test_a_cancellation_that_is_over_harms_nobody() -> None:
    """A scope that was cancelled and left without a wait in it has no effect on the waits after it."""

    async def main() -> int:
        with trio.CancelScope() as scope:
            scope.cancel()
        await fabric.sleep(10)
        with trio.CancelScope() as scope:
            scope.cancel()
        await trio.sleep(1e-8)
        with trio.move_on_at(5e-8):
            await trio.Event().wait()
        return fabric.now()

    assert 50 == fabric.run(main)


def test_a_cancelled_nursery_waits_for_shielded_clean_up() -> None:
    """Clean-up that takes virtual time behind a shield is done before the nursery ends."""
    log = []

    async def victim() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await fabric.sleep(70)
                log.append(fabric.now())

    async def main() -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(victim)
            await fabric.sleep(5)
            nursery.cancel_scope.cancel()
        return fabric.now()

    assert 75 == fabric.run(main)
    assert [75] == log


def test_cancelled_trio_primitives_keep_their_state() -> None:
    """A waiter that leaves a semaphore, a channel or a condition leaves it usable for the others."""

    async def main() -> None:
        semaphore, condition = trio.Semaphore(0), trio.Condition()
        send, receive = trio.open_memory_channel[str](0)
        for wait in (semaphore.acquire, receive.receive, lambda: send.send("nobody")):
            with trio.move_on_after(1e-6) as scope:
                await wait()
            assert scope.cancelled_caught
        async with condition:
            with trio.move_on_after(1e-6) as scope:
                await condition.wait()
            assert scope.cancelled_caught
            condition.notify_all()
        semaphore.release()
        await semaphore.acquire()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send.send, "somebody")
            assert "somebody" == await receive.receive()
        assert (0, 0) == (semaphore.statistics().tasks_waiting, condition.statistics().tasks_waiting)

    fabric.run(main)
