"""Programs that lean on every order an engine has to fix, for tests that compare their event logs.

``log_of(name, seed)`` runs one of ``PROGRAMS`` and returns its log; as a script this module prints the logs of
all of them, for tests that compare fresh processes.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import trio

import fabric
from fabric.channel import Channel, Msi
from fabric.clock import Engine, Priority, WaitQueue, current_engine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Log = Callable[[object], None]


def here() -> Engine:
    """The running engine."""
    engine = current_engine()
    assert engine is not None
    return engine


async def ties(log: Log) -> None:
    """Many tasks at the same instants, at three priorities."""

    async def tick(number: int) -> None:
        here().set_priority((Priority.DEVICE, Priority.VCPU, Priority.TASK)[number % 3])
        for _ in range(4):
            await fabric.sleep(10)
            log(("tick", number))

    async with trio.open_nursery() as nursery:
        for number in range(9):
            nursery.start_soon(tick, number)


async def cancellations(log: Log) -> None:
    """Equal deadlines, deadlines equal to wake-ups, a scope that holds many tasks, shields, nested scopes."""
    queue = WaitQueue(here(), "nothing")
    event = trio.Event()

    waits = (queue.wait, event.wait, lambda: fabric.sleep(1_000_000), lambda: fabric.sleep(1000))

    async def patient(number: int) -> None:
        with trio.move_on_after(1e-6 * (1 + number % 2)):
            try:
                await waits[number % 4]()
                log(("slept", number))
            finally:
                with trio.CancelScope(shield=True):
                    await fabric.sleep(5)
                log(("cleaned up", number))
                await trio.lowlevel.checkpoint()
        log(("left", number))

    async with trio.open_nursery() as nursery:
        for number in range(12):
            nursery.start_soon(patient, number)
        await fabric.sleep(1500)
        nursery.start_soon(patient, 12)
        nursery.start_soon(patient, 15)
        await fabric.sleep(100)
        nursery.cancel_scope.cancel()
        log("cancelled")
    log("done")


async def primitives(log: Log) -> None:
    """Trio's own ways to wait, with many waiters each."""
    event, lock, limiter = trio.Event(), trio.Lock(), trio.CapacityLimiter(2)
    semaphore, condition = trio.Semaphore(1), trio.Condition()
    send, receive = trio.open_memory_channel[int](2)

    async def worker(number: int) -> None:
        await event.wait()
        log(("woken", number))
        async with lock:
            log(("locked", number))
            await fabric.sleep(3)
        async with semaphore, limiter:
            await trio.sleep(1e-9)
            log(("limited", number))
        async with condition:
            await condition.wait()
            log(("notified", number))
        await send.send(number)

    async def drain() -> None:
        async for number in receive:
            log(("received", number))
            await fabric.sleep(1)
            if number == 99:
                return

    async with trio.open_nursery() as nursery:
        for number in range(7):
            nursery.start_soon(worker, number)
        nursery.start_soon(drain)
        await fabric.sleep(10)
        event.set()
        await trio.sleep(1e-6)
        async with condition:
            condition.notify_all()
        await fabric.sleep(100)
        await send.send(99)


async def spawning(log: Log) -> None:
    """Tasks that start tasks, through ``start`` as well, and nurseries that end with errors."""

    async def child(number: int, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        await fabric.sleep(number % 3)
        task_status.started(number)
        log(("started", number))
        await trio.lowlevel.checkpoint()
        if number == 5:
            raise ValueError(number)
        await fabric.sleep(20)
        log(("ended", number))

    try:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(child, number)
                nursery.start_soon(nursery.start, child, number + 10)
            log(("start returned", await nursery.start(child, 6)))
            await nursery.start(child, 5)
            await trio.sleep_forever()
    except* ValueError as group:
        log(("failed with", len(group.exceptions)))


async def timers(log: Log) -> None:
    """Timers of equal times among each other and with sleeping tasks, periodic and re-armed."""
    engine = here()
    queue = WaitQueue(engine, "a timer")

    def again() -> None:
        log("one-shot")
        if engine.now < 40:
            one_shot.arm(engine.now + 10)

    one_shot = engine.timer(again, name="one-shot")
    periodic = engine.timer(lambda: (log("periodic"), queue.wake_all(engine.now)), name="periodic")
    early = engine.timer(lambda: log("early"), name="early", priority=Priority.CHANNEL)
    one_shot.arm(10)
    periodic.arm_periodic(10, 5)
    early.arm_periodic(20, 10)

    async def waiter(number: int) -> None:
        for _ in range(5):
            log((number, await queue.wait()))
            await fabric.sleep(5)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(waiter, number)
    periodic.cancel()
    early.cancel()


async def channels(log: Log) -> None:
    """Channels with latency and seeded faults, with sinks and with receiving tasks that are cancelled."""
    engine = here()
    to_sink = Channel("sink", Msi, engine=engine, latency_ns=7)
    to_tasks = Channel("tasks", Msi, engine=engine)
    to_sink.connect(lambda event: (log(("arrived", event.data)), to_tasks.send_nowait(event)))
    to_sink.drop(probability=0.2)
    to_sink.delay(3, probability=0.3)
    to_tasks.duplicate(probability=0.2)

    async def receiver(number: int) -> None:
        with trio.move_on_after(1e-7):
            async for event in to_tasks:
                log((number, event.data))
                await fabric.sleep(4)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(receiver, number)
        for data in range(40):
            to_sink.send_nowait(Msi(0, data, 0))
            await fabric.sleep(data % 4)
    log(to_tasks.statistics())


PROGRAMS: dict[str, Callable[[Log], Awaitable[None]]] = {
    program.__name__: program for program in (ties, cancellations, primitives, spawning, timers, channels)
}


def log_of(name: str, seed: int = 0) -> list[tuple[int, object]]:
    """Run a program: what it logged, with the time."""
    lines: list[tuple[int, object]] = []

    async def main() -> None:
        await PROGRAMS[name](lambda what: lines.append((fabric.now(), what)))
        lines.append((fabric.now(), "end"))

    fabric.run(main, seed=seed)
    return lines


if __name__ == "__main__":
    for name in PROGRAMS:
        for line in log_of(name, seed=int(sys.argv[1])):
            print(name, *line)
