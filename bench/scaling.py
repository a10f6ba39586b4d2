"""Scaling: what an interrupt costs from 8 to 512 vCPUs and from 1,000 to 1,000,000 mapped LPIs, and bytes an LPI.

Rounds alternate between the sizes, and each row has its ratio to the smallest size. Run through the whole path of
msi-storm; for the LPIs a VMM sets up an ITS by attributes and its command queue, with 1,024 events a device, and
devices raise events all over the range.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import struct
import sys
import time
import tracemalloc
from statistics import median
from typing import Any

import trio
from msi_storm import run_fabric
from storm_peers import GRID_NS, HANDLER_NS, Storm

import fabric
from fabric.clock import Priority, current_engine
from fabric.guest.driver import MsiMessage
from fabric.uapi.arm64 import (
    KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
    KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
    KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
    KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
)
from fabric.vmm import Arm64Gicv3
from fabric.vmm.arm64 import RAM_BASE
from fabric.vmm.arm64_gicv3 import GITS_BASE

VCPUS = (8, 64, 512)
STORM_DEVICES = 64
LPIS = (1_000, 10_000, 100_000, 1_000_000)
LPI_ID_BITS = 20
"""Enough INTIDs for a million LPIs, less those below 8192."""
FIRST_LPI = 8192
EVENTS_PER_DEVICE = 1024
LPI_VCPUS = 8

# Where the tables are, from the start of RAM.
QUEUE, DEVICES, COLLECTIONS, CONFIGURATION, PENDING, ITTS = (
    RAM_BASE + offset for offset in (0, 1 << 20, 2 << 20, 16 << 20, 32 << 20, 64 << 20)
)
QUEUE_SIZE = 1 << 20
ITT_SIZE = EVENTS_PER_DEVICE * 8
VALID = 1 << 63
COMMAND = struct.Struct("<4Q")
GITS_CTLR, GITS_CBASER, GITS_CWRITER, GITS_BASER0, GITS_BASER1 = 0x0, 0x80, 0x88, 0x100, 0x108
ICC_PMR_EL1, ICC_IGRPEN1_EL1 = 0xC230, 0xC667


class ItsByAttributes:
    """A machine whose GIC and ITS the VMM brings up, so that guests of any size need no boot."""

    def __init__(self) -> None:
        self.machine = Arm64Gicv3(LPI_VCPUS, 1 << 30, lpi_id_bits=LPI_ID_BITS)
        machine = self.machine
        self.gic, self.its = machine.gic_fd, machine.its_fd
        self.writer = 0
        machine.set_attr(self.gic, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0, 1 << 1, 4)
        machine.write_memory(CONFIGURATION, bytes([0xA0 | 1]) * ((1 << LPI_ID_BITS) - FIRST_LPI))
        for number in range(LPI_VCPUS):
            redistributor = number << 32
            propbaser = CONFIGURATION | LPI_ID_BITS - 1
            pendbaser = PENDING + (number << 18)
            for offset, value in (
                (0x70, propbaser & 0xFFFF_FFFF),
                (0x74, propbaser >> 32),
                (0x78, pendbaser & 0xFFFF_FFFF),
                (0x7C, pendbaser >> 32),
                (0x00, 1),
            ):
                machine.set_attr(self.gic, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, redistributor | offset, value, 4)
            machine.set_attr(self.gic, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, redistributor | ICC_PMR_EL1, 0xF0)
            machine.set_attr(self.gic, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, redistributor | ICC_IGRPEN1_EL1, 1)
        self._register(GITS_BASER0, VALID | DEVICES | 2 << 8 | 7)
        self._register(GITS_BASER1, VALID | COLLECTIONS | 2 << 8)
        self._register(GITS_CBASER, VALID | QUEUE | QUEUE_SIZE // 4096 - 1)
        self._register(GITS_CTLR, 1)
        self.commands([(0x9, 0, VALID | number << 16 | number, 0) for number in range(LPI_VCPUS)])

    def _register(self, offset: int, value: int) -> None:
        self.machine.set_attr(self.its, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, value)

    def commands(self, commands: list[tuple[int, int, int, int]]) -> None:
        """Run ITS commands, fewer than the queue holds."""
        for words in commands:
            self.machine.write_memory(QUEUE + self.writer, COMMAND.pack(*words))
            self.writer = (self.writer + COMMAND.size) % QUEUE_SIZE
        self._register(GITS_CWRITER, self.writer)

    def map_lpis(self, count: int) -> None:
        """``count`` events in all, each with an LPI of its own; vCPUs in turn."""
        for device in range(-(-count // EVENTS_PER_DEVICE)):
            first = device * EVENTS_PER_DEVICE
            commands = [(0x8 | device << 32, EVENTS_PER_DEVICE.bit_length() - 2, VALID | ITTS + device * ITT_SIZE, 0)]
            for event in range(min(EVENTS_PER_DEVICE, count - first)):
                lpi = FIRST_LPI + first + event
                commands.append((0xA | device << 32, event | lpi << 32, lpi % LPI_VCPUS, 0))
            self.commands(commands)


def by_vcpus(interrupts: int, rounds: int) -> list[dict[str, float]]:
    """µs an interrupt of msi-storm: 64 devices that load every vCPU to 50 %."""
    took: dict[int, list[float]] = {vcpus: [] for vcpus in VCPUS}
    for _ in range(rounds):
        for vcpus in VCPUS:
            gc.collect()
            took[vcpus].append(run_fabric(Storm(STORM_DEVICES, vcpus, interrupts, events=32))[1] / interrupts * 1e6)
    return _rows("vcpus", took)


def by_lpis(interrupts: int, rounds: int) -> list[dict[str, float]]:
    """µs an interrupt with that many LPIs mapped, and bytes a mapped LPI."""
    took: dict[int, list[float]] = {lpis: [] for lpis in LPIS}
    for _ in range(rounds):
        for lpis in LPIS:
            gc.collect()
            took[lpis].append(fabric.run(_storm_over, lpis, interrupts) / interrupts * 1e6)
    rows = _rows("lpis", took)
    for row in rows:
        row["bytes_per_lpi"] = round(fabric.run(_bytes_per_lpi, int(row["lpis"])), 1)
    return rows


async def _bytes_per_lpi(lpis: int) -> float:
    its = ItsByAttributes()
    gc.collect()
    tracemalloc.start()
    resident = its.machine.user.resident
    its.map_lpis(lpis)
    gc.collect()
    traced = tracemalloc.get_traced_memory()[0] - (its.machine.user.resident - resident)
    tracemalloc.stop()
    return traced / lpis


async def _storm_over(lpis: int, interrupts: int) -> float:
    """Wall seconds of ``interrupts`` MSIs from 8 devices' tasks to events drawn from all that are mapped."""
    engine: Any = current_engine()
    its = ItsByAttributes()
    machine = its.machine
    its.map_lpis(lpis)
    source = random.Random(1)
    chosen = source.sample(range(lpis), min(lpis, 4000))
    signals = [
        machine.interrupt(
            MsiMessage(GITS_BASE + 0x10040, number % EVENTS_PER_DEVICE, number // EVENTS_PER_DEVICE)
        ).signal
        for number in chosen
    ]

    async def guest(cpu: Any) -> None:
        while True:
            await cpu.wait_for_interrupt()
            while (lpi := cpu.iar1()) != 1023:
                await cpu.compute(HANDLER_NS)
                cpu.eoir1(lpi)

    async def device(number: int) -> None:
        engine.set_priority(Priority.DEVICE)
        source = random.Random(number)
        rate = GRID_NS / (2 * HANDLER_NS)
        for _ in range(interrupts // LPI_VCPUS):
            await engine.sleep(GRID_NS * (1 + int(source.expovariate(rate))))
            source.choice(signals)()

    machine.load(guest)
    machine.power_on()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.run)
        await fabric.sleep(1_000_000)
        began = time.perf_counter()
        async with trio.open_nursery() as devices:
            for number in range(LPI_VCPUS):
                devices.start_soon(device, number)
        await fabric.sleep(1_000_000)
        seconds = time.perf_counter() - began
        nursery.cancel_scope.cancel()
    statement = machine.kvm.statement()
    assert statement.balanced, str(statement)
    assert statement.delivered > 0.9 * interrupts, str(statement)
    return seconds


def _rows(name: str, took: dict[int, list[float]]) -> list[dict[str, float]]:
    smallest = took[min(took)]
    return [
        {
            name: size,
            "us_per_interrupt": round(min(times), 3),
            "ratio": round(median(mine / least for mine, least in zip(times, smallest, strict=True)), 3),
        }
        for size, times in took.items()
    ]


def main() -> None:
    """Run both series and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--interrupts", type=int, default=50_000, help="MSIs in a run (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each size (default %(default)s)")
    arguments = parser.parse_args()
    result = {
        "vcpus": by_vcpus(arguments.interrupts, arguments.rounds),
        "lpis": by_lpis(arguments.interrupts, arguments.rounds),
    }
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for rows in result.values():
        print("  ".join(f"{key:>16}" for key in rows[0]))
        for row in rows:
            print("  ".join(f"{value:16,}" for value in row.values()))


if __name__ == "__main__":
    main()
