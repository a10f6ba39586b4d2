"""Machines of the reference VMM: stopped, run again, saved and restored with their devices."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from engine_programs import here

import fabric
from fabric.errors import ConfigError
from fabric.guest.workload import BlockDriver, DeviceDriver, Guest, Interval, Ipis, RecordedDevice, Ticks
from fabric.migration import MigrationError, restore, save
from fabric.trace.ledger import LedgerStatement
from fabric.vmm import BOARDS, Arm64Gicv2, Arm64Gicv3, BlockDevice, Machine, NetworkDevice, RecordedSource

MEMORY = 64 << 20
END_NS = 1_500_000
CPUS = 3
Record = tuple[object, ...]


class Log:
    """Listens to interrupt controllers: what, when, to whom."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def pending(self, cpu: int, intid: int) -> None:
        """See IrqEvents."""
        self.records.append((fabric.now(), "pending", cpu, intid))

    def coalesced(self, cpu: int, intid: int) -> None:
        """See IrqEvents."""
        self.records.append((fabric.now(), "coalesced", cpu, intid))

    def acknowledged(self, cpu: int, intid: int) -> None:
        """See IrqEvents."""
        self.records.append((fabric.now(), "acknowledged", cpu, intid))

    def completed(self, cpu: int, intid: int) -> None:
        """See IrqEvents."""
        self.records.append((fabric.now(), "completed", cpu, intid))

    def dropped(self, cpu: int, intid: int, reason: str) -> None:
        """See IrqEvents."""
        self.records.append((fabric.now(), f"dropped: {reason}", cpu, intid))


def loaded(board: str) -> Machine:
    """A machine whose guest has a disk, a network that gathers packets, a recording, ticks and IPIs to serve."""
    machine = BOARDS[board](CPUS, MEMORY)

    def interval(name: str, mean_ns: int) -> Interval:
        return Interval(mean_ns, True, here().rng(name))

    disk = machine.add_device(BlockDevice("disk", CPUS, 20_000))
    network = machine.add_device(
        NetworkDevice(
            "net", [interval(f"net {n}", 25_000) for n in range(CPUS)], coalesce_packets=3, coalesce_ns=40_000
        )
    )
    played = RecordedDevice("recording", 0, 0, list(range(CPUS)))
    arrivals = [(at, at // 7_000 % CPUS, 500) for at in range(0, END_NS, 7_000)]
    recording = machine.add_device(RecordedSource("recording", CPUS, arrivals))
    played.devid, played.bar, played.work = recording.devid, recording.bar, list(recording.work)
    ipis = Ipis(900)
    ipis.at_random(0, CPUS, interval("ipis", 50_000))
    loads = [
        BlockDriver("disk", disk.devid, disk.bar, 3_000, [interval(f"disk {n}", 30_000) for n in range(CPUS)]),
        DeviceDriver("net", network.devid, network.bar, CPUS, 1_500),
        played,
        Ticks(700, period_ns=100_000),
        ipis,
    ]
    guest = Guest(machine.driver(), CPUS, machine.guest_pages(), loads, machine.start_secondary)
    machine.load(guest.program)
    recording.go(300_000)
    return machine


def run(board: str, *cuts: int, restored: bool = True) -> tuple[list[list[Record]], LedgerStatement]:
    """Run to the end, stopped at those times: what each vCPU saw, and the account."""

    async def main() -> LedgerStatement:
        machine = loaded(board)
        machine.vm.listen(log)
        total = LedgerStatement()
        for at in cuts:
            with trio.move_on_at(at / 1e9):
                await machine.run()
            if restored:
                first, machine = machine, BOARDS[board](CPUS, MEMORY)
                restore(save(first), machine)
                first.vm.listen(None)
                machine.vm.listen(log)
                first.close()
                total += first.kvm.statement()
        with trio.move_on_at(END_NS / 1e9):
            await machine.run()
        return total + machine.kvm.statement()

    log = Log()
    total = fabric.run(main)
    return [[record for record in log.records if record[2] == cpu] for cpu in range(-1, CPUS)], total


every_arm64_board = pytest.mark.parametrize("board", [name for name in BOARDS if name.startswith("arm64-")])
CUTS = [
    pytest.param((30_000,), id="boot"),
    pytest.param((700_001,), id="once"),
    pytest.param((300_000, 500_000, 511_111, 1_000_000), id="often"),
]


@every_arm64_board
@pytest.mark.parametrize("cuts", CUTS)
def test_a_machine_goes_on_in_another_one(board: str, cuts: tuple[int, ...]) -> None:
    """With its disk's requests, the packets that its network gathered, its recording: as if nothing had been."""
    assert run(board) == run(board, *cuts)


@every_arm64_board
@pytest.mark.parametrize("cuts", CUTS[1:])
def test_a_machine_that_was_stopped_can_be_run_again(board: str, cuts: tuple[int, ...]) -> None:
    """Devices keep what they have under way while their tasks are cancelled."""
    assert run(board) == run(board, *cuts, restored=False)


@every_arm64_board
def test_what_a_device_had_under_way_waits(board: str) -> None:
    """Requests that were due, and packets to be announced, while the machine stood still: both come at once after."""

    async def main() -> None:
        machine = loaded(board)
        with trio.move_on_at(700_000 / 1e9):
            await machine.run()
        saved = save(machine)
        requests = saved.devices[0].requests
        await fabric.sleep(1_000_000)
        assert requests == saved.devices[0].requests
        second = BOARDS[board](CPUS, MEMORY)
        restore(saved, second)
        machine.close()
        log = Log()
        second.vm.listen(log)
        with trio.move_on_at(1_700_001 / 1e9):
            await second.run()
        assert {1_700_000} <= {record[0] for record in log.records if record[1] == "pending"}
        assert (second.kvm.statement() + machine.kvm.statement()).balanced

    fabric.run(main)


def test_a_machine_that_runs_cannot_be_saved() -> None:
    """Its run has to be cancelled first."""

    async def main() -> None:
        machine = loaded("arm64-gicv3")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.run)
            await fabric.sleep(1_000)
            with pytest.raises(MigrationError, match=r"stop all vCPUs .* is inside KVM_RUN"):
                save(machine)
            nursery.cancel_scope.cancel()

    fabric.run(main)


def test_machines_that_do_not_fit() -> None:
    """Another number of vCPUs, other memory, another board; and one with devices of its own."""

    async def main() -> None:
        machine = loaded("arm64-gicv3")
        saved = save(machine)
        with pytest.raises(ConfigError, match=r"slot 0, size: .* 0x4000000, here 0x8000000; .* 3 vCPUs, this one 2"):
            restore(saved, Arm64Gicv3(2, 2 * MEMORY))
        with pytest.raises(ConfigError, match="the saved machine has a GICv3, this one a GICv2"):
            restore(saved, Arm64Gicv2(CPUS, MEMORY))
        other = Arm64Gicv3(CPUS, MEMORY)
        other.add_device(BlockDevice("disk", 1, 1))
        with pytest.raises(ValueError, match="has no devices of its own"):
            restore(saved, other)
        with pytest.raises(ValueError, match="takes over devices only"):
            other.adopt(saved.devices)
        with pytest.raises(TypeError, match="an arm64 machine can be saved"):
            save(object())  # type: ignore[arg-type]
        restore(saved, Arm64Gicv3(CPUS, MEMORY))

    fabric.run(main)


def test_a_doorbell_that_nobody_heard_is_rung_again() -> None:
    """A device that was stopped before it looked finds its doorbell rung in the other machine, too."""

    async def main() -> Any:
        first, second = Arm64Gicv3(1, MEMORY), Arm64Gicv3(1, MEMORY)
        disk = first.add_device(BlockDevice("disk", 2, 1))
        disk.doorbells[1].signal(3)
        second.adopt([disk])
        with pytest.raises(BlockingIOError):
            disk.doorbells[0].read()
        return disk.machine is second, disk.doorbells[1].read()

    assert (True, 3) == fabric.run(main)
