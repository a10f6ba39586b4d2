"""Any trio code runs in a simulation: it lives in virtual time and takes its turn in the one order."""

from __future__ import annotations

import contextvars
import gc
import inspect
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from engine_programs import here

import fabric
from fabric.clock import Timer, WaitQueue, current_engine
from fabric.clock.engine import Engine

color: contextvars.ContextVar[str] = contextvars.ContextVar("color", default="none")


def test_trio_sleeps_in_virtual_time() -> None:
    """``trio.sleep`` takes no wall time, and is exact where a float is."""

    async def main() -> tuple[float, int]:
        await trio.sleep(3600)
        await trio.sleep_until(4000.5)
        return trio.current_time(), fabric.now()

    began = time.monotonic()

    assert (4000.5, 4_000_500_000_000) == fabric.run(main)
    assert time.monotonic() - began < 5


def test_both_sleeps_share_one_order() -> None:
    """Tasks that sleep with trio and tasks that sleep with fabric are ordered by time alone."""
    log: list[int] = []

    async def ours(ns: int) -> None:
        await fabric.sleep(ns)
        log.append(ns)

    async def theirs(ns: int) -> None:
        await trio.sleep(ns / 1e9)
        log.append(ns)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for ns in random.Random(1).sample(range(100), 40):
                nursery.start_soon(ours if ns % 2 else theirs, ns)

    fabric.run(main)

    assert 40 == len(log)
    assert sorted(log) == log


def test_deadlines_can_be_read() -> None:
    """``current_effective_deadline`` is in virtual seconds."""

    async def main() -> list[float]:
        await fabric.sleep(10**9)
        with trio.move_on_after(5), trio.move_on_at(3.5):
            return [trio.current_effective_deadline()]

    assert [3.5] == fabric.run(main)


def test_fail_after_raises_too_slow() -> None:
    """``trio.fail_after`` measures virtual time."""

    async def main() -> None:
        with trio.fail_after(1):
            await fabric.sleep(999_999_999)
        with trio.fail_after(1):
            await fabric.sleep(10**9 + 1)

    with pytest.raises(trio.TooSlowError):
        fabric.run(main)


def test_locks_are_handed_on_in_the_order_of_their_waiters() -> None:
    """Trio's locks are fair, and stay so."""
    log: list[int] = []

    async def main() -> None:
        lock = trio.StrictFIFOLock()

        async def worker(number: int) -> None:
            await fabric.sleep(10 - number)
            async with lock:
                await fabric.sleep(20)
                log.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(worker, number)

    fabric.run(main)

    assert [4, 3, 2, 1, 0] == log


def test_the_owner_of_a_lock_may_vanish() -> None:
    """A lock whose owner exited is broken for its waiters, as in trio."""

    async def main() -> None:
        lock = trio.Lock()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lock.acquire)
            await fabric.sleep(1)
            with pytest.raises(trio.BrokenResourceError):
                await lock.acquire()

    fabric.run(main)


def test_an_event_wakes_its_waiters_in_spawn_order() -> None:
    """Trio wakes the waiters of an event in set order; a simulation in the order they were spawned."""
    log: list[int] = []

    async def main() -> None:
        event = trio.Event()

        async def waiter(number: int) -> None:
            await fabric.sleep(100 - number)
            await event.wait()
            log.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(waiter, number)
            await fabric.sleep(200)
            event.set()

    fabric.run(main)

    assert list(range(60)) == log


def test_memory_channels_keep_their_order() -> None:
    """What goes through a memory channel comes out in order, at the instant it was sent."""

    async def main() -> list[tuple[int, int]]:
        send, receive = trio.open_memory_channel[int](3)
        got = []

        async def producer() -> None:
            async with send:
                for number in range(20):
                    await send.send(number)
                    await fabric.sleep(number % 2)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(producer)
            async for number in receive:
                got.append((fabric.now(), number))
        return got

    assert [(number // 2, number) for number in range(20)] == fabric.run(main)


def test_start_returns_when_the_child_has_started() -> None:
    """``nursery.start`` waits for ``started`` in virtual time, and the child goes on in its new nursery."""

    async def child(task_status: trio.TaskStatus[str]) -> None:
        await fabric.sleep(30)
        task_status.started("ready")
        await fabric.sleep(12)

    async def main() -> tuple[str, int, int]:
        async with trio.open_nursery() as nursery:
            value = await nursery.start(child)
            started = fabric.now()
        return value, started, fabric.now()

    assert ("ready", 30, 42) == fabric.run(main)


def test_start_may_be_a_task_of_its_own() -> None:
    """Children started by several ``nursery.start`` tasks come in the order of those tasks."""
    log: list[int] = []

    async def child(number: int, task_status: trio.TaskStatus[None]) -> None:
        log.append(number)
        task_status.started()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(nursery.start, child, number)

    fabric.run(main)

    assert list(range(30)) == log


def test_work_in_threads_comes_back() -> None:
    """A task may wait for a thread; the run does not take that for a deadlock."""

    async def main() -> int:
        return await trio.to_thread.run_sync(lambda: time.sleep(0.02) or threading.get_ident())

    assert threading.get_ident() != fabric.run(main)


def test_threads_can_call_into_the_simulation() -> None:
    """``from_thread`` runs async functions in virtual time and plain ones in the simulation's thread."""

    async def nap() -> int:
        await fabric.sleep(50)
        return fabric.now()

    def work() -> tuple[int, int]:
        return trio.from_thread.run(nap), trio.from_thread.run_sync(fabric.now)

    async def main() -> tuple[int, int]:
        await fabric.sleep(7)
        return await trio.to_thread.run_sync(work)

    assert (57, 57) == fabric.run(main)


def test_a_thread_may_signal_a_busy_simulation() -> None:
    """Events set from a thread at any moment reach tasks that come and go through trio primitives meanwhile."""

    async def main() -> int:
        token = trio.lowlevel.current_trio_token()
        rounds = 300
        events = [trio.Event() for _ in range(rounds)]
        done = False

        def signals() -> None:
            for event in events:
                trio.from_thread.run_sync(event.set, trio_token=token)

        async def busy() -> None:
            lock = trio.Lock()
            while not done:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await fabric.sleep(0)
                async with lock:
                    await trio.sleep(1e-9)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(busy)
            nursery.start_soon(trio.to_thread.run_sync, signals)
            for event in events:
                await event.wait()
            done = True
        return rounds

    assert 300 == fabric.run(main)


def test_abandoned_threads_do_not_hold_the_run() -> None:
    """A wait for a thread may time out in virtual time."""
    release = threading.Event()

    async def main() -> tuple[bool, int]:
        with trio.move_on_after(1e-6) as scope:
            await trio.to_thread.run_sync(release.wait, abandon_on_cancel=True)
        return scope.cancelled_caught, fabric.now()

    try:
        assert (True, 1000) == fabric.run(main)
    finally:
        release.set()


def test_wait_all_tasks_blocked_comes_before_time_moves() -> None:
    """It returns when nobody can run at this instant, in the same instant."""
    log: list[object] = []

    async def chain() -> None:
        for number in range(3):
            await trio.lowlevel.checkpoint()
            await fabric.sleep(0)
            log.append(number)
        await fabric.sleep(5)
        log.append("later")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(chain)
            await trio.testing.wait_all_tasks_blocked()
            log.append(fabric.now())

    fabric.run(main)

    assert [0, 1, 2, 0, "later"] == log


def test_wait_all_tasks_blocked_may_have_a_cushion() -> None:
    """A cushion is wall time, in which nothing may happen outside; virtual time stands."""

    async def main() -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fabric.sleep, 5)
            await trio.testing.wait_all_tasks_blocked(0.01)
            return fabric.now()

    began = time.monotonic()

    assert 0 == fabric.run(main)
    assert time.monotonic() - began >= 0.01


def test_wait_all_tasks_blocked_works_on_a_stuck_run() -> None:
    """With nothing scheduled at all it returns: that is no deadlock."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    fabric.run(main)


def test_sequencers_order_tasks() -> None:
    """``trio.testing.Sequencer`` works."""
    log: list[int] = []

    async def main() -> None:
        sequencer = trio.testing.Sequencer()

        async def step(number: int) -> None:
            async with sequencer(number):
                log.append(number)

        async with trio.open_nursery() as nursery:
            for number in (2, 0, 1):
                nursery.start_soon(step, number)

    fabric.run(main)

    assert [0, 1, 2] == log


def test_sockets_work() -> None:
    """Real I/O is served while the simulation has nothing else to do, and while it has."""

    async def main() -> bytes:
        left, right = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
        got = bytearray()

        async def ticker() -> None:
            while True:
                await fabric.sleep(10)

        async def writer() -> None:
            async with left:
                for _ in range(5):
                    await left.send_all(b"x" * 100_000)
                    await fabric.sleep(10)

        async with right, trio.open_nursery() as nursery:
            nursery.start_soon(ticker)
            nursery.start_soon(writer)
            async for chunk in right:
                got += chunk
            nursery.cancel_scope.cancel()
        return bytes(got)

    assert b"x" * 500_000 == fabric.run(main)


def test_processes_work() -> None:
    """A child process can be run and waited for."""

    async def main() -> bytes:
        process = await trio.run_process([sys.executable, "-S", "-c", "print('hello')"], capture_stdout=True)
        assert isinstance(process.stdout, bytes)
        return process.stdout

    assert b"hello\n" == fabric.run(main)


def test_async_generators_work() -> None:
    """They may wait, be closed half-way, and clean up in virtual time."""
    log: list[object] = []

    async def numbers() -> AsyncGenerator[int, None]:
        try:
            for number in range(10):
                await fabric.sleep(10)
                yield number
        finally:
            await fabric.sleep(1)
            log.append(fabric.now())

    @asynccontextmanager
    async def context() -> AsyncIterator[None]:
        await fabric.sleep(5)
        yield
        await trio.sleep(5e-9)
        log.append("left")

    async def main() -> None:
        async with context():
            generator = numbers()
            async for number in generator:
                log.append(number)
                if number == 2:
                    break
            await generator.aclose()

    fabric.run(main)

    assert [0, 1, 2, 36, "left"] == log


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")
@pytest.mark.parametrize("collected", [True, False], ids=["collected", "at-the-end"])
def test_abandoned_async_generators_are_cancelled(collected: bool) -> None:
    """As in trio: an abandoned generator's clean-up runs in a cancelled scope."""
    log: list[str] = []

    async def numbers() -> AsyncGenerator[int, None]:
        try:
            while True:
                yield 1
        finally:
            try:
                await fabric.sleep(1)
            except trio.Cancelled:
                log.append("cancelled")
                raise

    async def main() -> None:
        generator = numbers()
        await anext(generator)
        if collected:
            del generator
            gc.collect()
            await fabric.sleep(1)
        else:
            keep.append(generator)

    keep: list[object] = []
    fabric.run(main)

    assert ["cancelled"] == log


def test_context_variables_belong_to_a_task() -> None:
    """A child inherits its parent's, and what a task sets is seen by no other, on either way of waiting."""
    log: list[tuple[str, str]] = []

    async def child(name: str) -> None:
        log.append((name, color.get()))
        color.set(name)
        for _ in range(3):
            await fabric.sleep(10)
            await trio.sleep(1e-9)
            log.append((name, color.get()))

    async def main() -> None:
        color.set("main")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child, "a")
            nursery.start_soon(child, "b")
        log.append(("main", color.get()))

    fabric.run(main)

    assert {("a", "main"), ("b", "main"), ("a", "a"), ("b", "b"), ("main", "main")} == set(log)
    assert "none" == color.get()


def test_the_current_task_is_the_one_that_runs() -> None:
    """``current_task`` is right in every step, and a timer's callback is in a task as well."""
    seen: list[str] = []

    async def note() -> None:
        for wait in (lambda: fabric.sleep(1), lambda: trio.sleep(1e-9), lambda: fabric.sleep(0)):
            seen.append(trio.lowlevel.current_task().name)
            await wait()

    async def main() -> None:
        here().timer(lambda: seen.append(trio.lowlevel.current_task().name)).arm(100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(note, name="a")
            nursery.start_soon(note, name="b")
        await fabric.sleep(200)

    fabric.run(main)

    assert ["a", "b"] * 3 + ["fabric timer service"] == seen


def test_the_task_tree_can_be_walked() -> None:
    """From the root task one finds every task and, with ``iter_await_frames``, the line where it waits."""

    async def inner(queue: WaitQueue) -> None:
        await queue.wait()

    async def outer(queue: WaitQueue) -> None:
        await inner(queue)

    async def main() -> dict[str, list[str]]:
        queue = WaitQueue(here(), "nothing")
        found: dict[str, list[str]] = {}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outer, queue, name="parked")
            nursery.start_soon(trio.sleep_forever, name="in trio")
            await fabric.sleep(1)

            def walk(task: trio.lowlevel.Task) -> None:
                assert inspect.getcoroutinestate(task.coro) in (inspect.CORO_SUSPENDED, inspect.CORO_RUNNING)
                found[task.name] = [frame.f_code.co_name for frame, _ in task.iter_await_frames()]
                for nursery in task.child_nurseries:
                    for child in nursery.child_tasks:
                        walk(child)

            root = trio.lowlevel.current_root_task()
            assert root is not None
            walk(root)
            nursery.cancel_scope.cancel()
        return found

    found = fabric.run(main)

    assert ["outer", "inner", "wait"] == found["parked"]
    assert "sleep_forever" == found["in trio"][0]
    assert "_main" in [frames[0] for frames in found.values() if frames]


def test_ctrl_c_ends_a_busy_simulation() -> None:
    """KeyboardInterrupt comes out of a run that never rests, and every task is cleaned up."""
    cleaned: list[int] = []

    async def busy(number: int) -> None:
        try:
            while True:
                await fabric.sleep(1)
        finally:
            cleaned.append(number)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(busy, number)
            nursery.start_soon(trio.to_thread.run_sync, interrupt)

    def interrupt() -> None:
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(BaseExceptionGroup) as caught:
        fabric.run(main)

    assert caught.group_contains(KeyboardInterrupt)
    assert {0, 1, 2} == set(cleaned)


def test_ctrl_c_ends_a_simulation_of_timers() -> None:
    """Also when nothing but callbacks runs."""

    killer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))

    async def main() -> None:
        here().timer(lambda: None).arm_periodic(0, 1)
        killer.start()
        await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        fabric.run(main)
    killer.join()


def test_a_foreign_await_is_an_error_in_its_task() -> None:
    """What is no trio awaitable raises TypeError where it was awaited; the task may clean up in virtual time."""

    class Foreign:
        def __await__(self) -> AsyncIterator[str]:
            yield "asyncio"  # type: ignore[misc]

    async def main() -> tuple[str, int]:
        try:
            await Foreign()  # type: ignore[misc]
        except TypeError as error:
            message = str(error)
            await fabric.sleep(9)
        return message, fabric.now()

    message, now = fabric.run(main)

    assert "unrecognized yield message 'asyncio'" in message
    assert 9 == now


def test_system_tasks_run_in_order_too() -> None:
    """A system task is a task of the simulation."""
    log: list[int] = []

    async def system() -> None:
        await fabric.sleep(5)
        log.append(fabric.now())

    async def main() -> None:
        trio.lowlevel.spawn_system_task(system)
        await fabric.sleep(10)

    fabric.run(main)

    assert [5] == log


def test_two_threads_simulate_at_once() -> None:
    """Simulations in two threads do not see each other."""
    results: dict[int, list[int]] = {}
    barrier = threading.Barrier(2)

    def simulate(step: int) -> None:
        async def ticker(log: list[int]) -> None:
            event = trio.Event()
            here().timer(event.set).arm(step * 150)
            for _ in range(300):
                await fabric.sleep(step)
                await trio.lowlevel.checkpoint()
                log.append(fabric.now())
            await event.wait()

        async def main() -> list[int]:
            barrier.wait()
            log: list[int] = []
            await ticker(log)
            return log

        results[step] = fabric.run(main)

    threads = [threading.Thread(target=simulate, args=(step,)) for step in (3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {step: list(range(step, 301 * step, step)) for step in (3, 7)} == results
    assert current_engine() is None


def test_nothing_of_a_run_is_left() -> None:
    """After a run its engine, tasks and coroutines can be collected."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await fabric.sleep(10)
            nursery.cancel_scope.cancel()

    fabric.run(main)
    gc.collect()
    left = [item for item in gc.get_objects() if isinstance(item, Engine | Timer)]

    assert [] == [engine for engine in left if not isinstance(engine, Engine) or engine._tasks]


def test_runs_repeat_in_fresh_processes() -> None:
    """The same seed gives the same bytes whatever the hash seed is, whether or not Hypothesis shuffles trio."""
    program = "import sys, engine_programs as p; [print(n, *p.log_of(n, 5), sep='\\n') for n in p.PROGRAMS]"
    outputs = set()
    for number in range(20):
        code = f"import hypothesis; {program}" if number < 3 else program
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True)
        assert b"" == done.stderr
        outputs.add(done.stdout)

    assert 1 == len(outputs)
    assert outputs.pop().count(b"\n") > 200
