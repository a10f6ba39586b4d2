"""msi-storm: interrupts per second through the whole of fabric, beside SimPy and a hand-written loop.

D devices raise MSIs at exponential intervals. In fabric each is a trio task that signals an irqfd. On the board
``arm64-gicv3`` the MSI goes (device id, event id) through the ITS to an LPI, is pended by priority, wakes one of V
vCPUs, whose guest driver acknowledges it (ICC_IAR1_EL1), handles it for 2 µs and ends it (ICC_EOIR1_EL1); on
``x86-apic`` it goes to a vector of a local APIC, whose vCPU takes it through a gate. The peers (``storm_peers.py``) do
the same with a dict and a heap. Rounds alternate between the engines, and every run must have the same outcome.

``python bench/msi_storm.py`` prints a table with ratios; ``--json`` one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from statistics import median
from typing import Any

import trio
from storm_peers import GRID_NS, HANDLER_NS, Outcome, Storm, run_heapq, run_simpy

import fabric
from fabric.clock import Priority, WaitQueue, current_engine
from fabric.guest.driver import Vector
from fabric.vmm import BOARDS

SIZES = ((1, 1), (8, 8), (64, 64), (256, 256))
SETTLE_NS = 1_000_000


async def poll_gicv3(cpu: Any) -> None:
    """A guest with a GICv3: interrupts stay masked."""
    while True:
        await cpu.wait_for_interrupt()
        lpi = cpu.iar1()
        await cpu.compute(HANDLER_NS)
        cpu.eoir1(lpi)


async def take_vectors(cpu: Any) -> None:
    """A guest with a local APIC: interrupts come through a gate."""

    async def handler(cpu: Any) -> None:
        await cpu.compute(HANDLER_NS)
        cpu.eoi()

    cpu.set_vector(handler)
    cpu.unmask()
    while True:
        await cpu.wait_for_interrupt()


GUESTS: dict[str, Callable[[Any], Awaitable[None]]] = {
    "arm64-gicv3": poll_gicv3,
    "x86-apic": take_vectors,
    "x86-split": take_vectors,
}
"""By board: how its guest takes interrupts."""


def run_fabric(storm: Storm, board: str = "arm64-gicv3") -> tuple[Outcome, float]:
    """``storm`` in fabric: what it did, and the wall seconds it took once the guest was up."""
    return fabric.run(_storm, storm, board)


async def _storm(storm: Storm, board: str) -> tuple[Outcome, float]:
    engine = current_engine()
    machine = BOARDS[board](storm.vcpus)
    driver = machine.driver()
    up = trio.Event()
    events: list[list[Callable[[], object]]] = []

    async def unused(cpu) -> None:
        raise AssertionError("the guest takes them itself")

    async def boot(cpu) -> None:
        await driver.start(cpu)
        await driver.start_cpu(cpu)
        for number in range(1, storm.vcpus):
            await machine.start_secondary(cpu, number)
        for device in range(storm.devices):
            routes = [storm.route(device, event) for event in range(storm.events)]
            vectors = [Vector(vcpu, unused, "", priority) for vcpu, _, priority in routes]
            messages = await driver.allocate_msi(cpu, device, vectors)
            events.append([machine.interrupt(message).signal for message in messages])
        up.set()

    async def guest(cpu) -> None:
        await (boot(cpu) if cpu.number == 0 else driver.start_cpu(cpu))
        await GUESTS[board](cpu)

    start = WaitQueue(engine, "the start of the storm")
    end = WaitQueue(engine, "the end of the storm")
    storming = storm.devices

    async def device(number: int) -> None:
        nonlocal storming
        engine.set_priority(Priority.DEVICE)
        source = storm.source(number)
        signals = events[number]
        await start.wait()
        for _ in range(storm.per_device):
            await engine.sleep(GRID_NS * (1 + int(source.expovariate(storm.rate))))
            signals[source.randrange(storm.events)]()
        storming -= 1
        if not storming:
            end.wake_all()

    machine.load(guest)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.run)
        await up.wait()
        for number in range(storm.devices):
            nursery.start_soon(device, number)
        await fabric.sleep(SETTLE_NS)
        began = time.perf_counter()
        start.wake_all()
        await end.wait()
        await fabric.sleep(SETTLE_NS)
        seconds = time.perf_counter() - began
        nursery.cancel_scope.cancel()
    statement = machine.kvm.statement()
    assert statement.balanced, str(statement)
    assert not statement.pending, str(statement)
    assert not statement.dropped, str(statement)
    return Outcome(statement.delivered, statement.coalesced), seconds


def timed(run: Callable[[Storm], Outcome]) -> Callable[[Storm], tuple[Outcome, float]]:
    """``run`` with its wall seconds."""

    def timing(storm: Storm) -> tuple[Outcome, float]:
        began = time.perf_counter()
        outcome = run(storm)
        return outcome, time.perf_counter() - began

    return timing


def measure(devices: int, vcpus: int, interrupts: int, rounds: int, board: str) -> dict[str, float]:
    """One row: interrupts a second of each engine (best round) and the median ratio of the rounds."""
    storm = Storm(devices, vcpus, interrupts)
    engines = {"fabric": partial(run_fabric, board=board), "simpy": timed(run_simpy), "heapq": timed(run_heapq)}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        outcomes = {}
        for name, run in engines.items():
            gc.collect()
            outcomes[name], took = run(storm)
            seconds[name].append(took)
        if len(set(outcomes.values())) != 1:
            raise SystemExit(f"the engines did not do the same work: {outcomes}")
    raised = storm.per_device * storm.devices
    row: dict[str, float] = {"devices": devices, "vcpus": vcpus}
    for name, times in seconds.items():
        row[f"{name}_per_s"] = round(raised / min(times))
    for peer in ("simpy", "heapq"):
        ratios = [theirs / ours for theirs, ours in zip(seconds[peer], seconds["fabric"], strict=True)]
        row[f"over_{peer}"] = round(median(ratios), 3)
    outcome = outcomes["fabric"]
    row |= {"delivered": outcome.delivered, "coalesced": outcome.coalesced}
    return row


def main() -> None:
    """Run all sizes, each in a process of its own, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--interrupts", type=int, default=200_000, help="MSIs in a run (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each size (default %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("D", "V"), help="this size only, in this process")
    parser.add_argument("--board", choices=GUESTS, default="arm64-gicv3", help="the machine (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.size:
        row = measure(*arguments.size, arguments.interrupts, arguments.rounds, arguments.board)
        _print([row], arguments.json)
        return
    rows = []
    for devices, vcpus in SIZES:
        # A fresh process: what an earlier size left of the heap would slow down the engine with more objects.
        options = ["--size", str(devices), str(vcpus), "--interrupts", str(arguments.interrupts)]
        options += ["--board", arguments.board]
        command = [sys.executable, __file__, "--json", "--rounds", str(arguments.rounds), *options]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows += json.loads(output)["sizes"]
        if not arguments.json:
            _print(rows[-1:], json_wanted=False, header=len(rows) == 1)
    if arguments.json:
        _print(rows, json_wanted=True)


def _print(rows: list[dict[str, float]], json_wanted: bool, header: bool = True) -> None:
    if json_wanted:
        json.dump({"sizes": rows}, sys.stdout, indent=2)
        print()
        return
    if header:
        print("devices  vcpus   fabric/s    simpy/s    heapq/s   fabric:simpy  fabric:heapq")
    for row in rows:
        print(
            f"{row['devices']:7} {row['vcpus']:6} {row['fabric_per_s']:10,} {row['simpy_per_s']:10,}"
            f" {row['heapq_per_s']:10,} {row['over_simpy']:13.2f}x {row['over_heapq']:12.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
