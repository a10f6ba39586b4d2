"""The reference VMM: machines, their devices, and guests on them."""

from __future__ import annotations

from typing import Any

import pytest
from boards import every_board

import fabric
from fabric.clock import current_engine
from fabric.guest.driver import Vector
from fabric.guest.pci import MSIX_CONTROL, MSIX_TABLE, RINGS, write_msix
from fabric.trace.ledger import LedgerStatement
from fabric.vmm import BOARDS, Arm64Gicv2, Arm64Gicv3, Device, RecordedSource, run_guest
from fabric.vmm.machine import SLOT_SIZE


def ledger_of(guest: Any, vcpus: int = 1, board: str = "arm64-gicv3") -> LedgerStatement:
    result: LedgerStatement = fabric.run(run_guest, board, guest, vcpus)
    return result


# Guests


@every_board
def test_a_guest_takes_the_interrupts_of_its_timer(board: str) -> None:
    """Each at the time it was set to, once."""
    seen: list[int] = []

    async def tick(cpu: Any) -> None:
        seen.append(fabric.now())

    async def guest(cpu: Any, driver: Any) -> None:
        for us in (1, 5, 16):
            await driver.set_timer(cpu, us * 16_000, tick)
            await cpu.wait_for_interrupt()

    assert LedgerStatement(raised=3, delivered=3) == ledger_of(guest, board=board)
    assert [16_000, 80_000, 256_000] == seen


@every_board
def test_a_guest_interrupts_its_other_cpus(board: str) -> None:
    """IPIs of two kinds do not merge."""
    seen: list[tuple[int, str]] = []

    async def guest(cpu: Any, driver: Any) -> None:
        async def first(cpu: Any) -> None:
            seen.append((cpu.number, "first"))

        async def second(cpu: Any) -> None:
            seen.append((cpu.number, "second"))

        driver.on_ipi(first, 1, "first")
        driver.on_ipi(second, 2, "second")
        for kind in (1, 2, 1):
            await driver.send_ipi(cpu, 1, kind)
        await cpu.compute(1000)

    assert LedgerStatement(raised=3, delivered=2, coalesced=1) == ledger_of(guest, 2, board=board)
    assert [(1, "first"), (1, "second")] == seen


@every_board
def test_a_guest_begins_when_all_its_cpus_are_up(board: str) -> None:
    """What it does first may concern any of them."""
    seen: list[int] = []

    async def guest(cpu: Any, driver: Any) -> None:
        async def taken(cpu: Any) -> None:
            seen.append(cpu.number)

        driver.on_ipi(taken)
        for number in range(1, 4):
            await driver.send_ipi(cpu, number)
        await cpu.compute(1000)

    assert LedgerStatement(raised=3, delivered=3) == ledger_of(guest, 4, board)
    assert [1, 2, 3] == seen


@every_board
def test_an_ipi_kind_that_there_is_not(board: str) -> None:
    """Eight kinds work on every board."""

    async def guest(cpu: Any, driver: Any) -> None:
        with pytest.raises(ValueError, match="must be 0 to 7, not 8"):
            driver.on_ipi(guest, 8)

    ledger_of(guest, board=board)


def test_a_board_that_there_is_not() -> None:
    """The known ones are listed."""

    async def guest(cpu: Any, driver: Any) -> None:
        pass

    with pytest.raises(ValueError, match="must be one of arm64-gicv3, arm64-gicv2, x86-apic, x86-split, not 'pdp11'"):
        fabric.run(run_guest, "pdp11", guest)


def test_every_board_describes_itself() -> None:
    """In the words of its class."""
    for name, board in BOARDS.items():
        about = board.describe()
        assert name == about["name"]
        assert about["about"]


@every_board
def test_a_guest_can_shut_its_machine_down(board: str) -> None:
    """The machine's run ends, and says why."""

    async def main() -> str | None:
        machine = BOARDS[board](2)

        async def program(cpu: Any) -> None:
            await cpu.compute(500)
            await machine.shut_down(cpu)

        machine.load(program)
        await machine.run()
        return machine.stopped

    assert "shutdown" == fabric.run(main)


def test_an_exit_that_the_vmm_does_not_know_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be lost otherwise."""

    async def main() -> None:
        machine = Arm64Gicv3(1)
        monkeypatch.setattr(machine.kvm, "run", strange)
        await machine._run_vcpu(0, None)  # type: ignore[arg-type]

    async def strange(fd: int) -> int:
        return 0

    with pytest.raises(RuntimeError, match="exit reason 0, which this VMM does not know"):
        fabric.run(main)


def test_a_machine_with_too_many_vcpus() -> None:
    """Says how many its board takes."""
    with pytest.raises(ValueError, match="the board arm64-gicv2 has at most 8 vCPUs, not 9"):
        Arm64Gicv2(9)


def test_a_machine_without_vcpus() -> None:
    """Is none."""
    with pytest.raises(ValueError, match="at least one vCPU, not 0"):
        Arm64Gicv3(0)


@every_board
def test_a_closed_machine_accounts_for_what_it_held(board: str) -> None:
    """Its interrupts are dropped with a reason."""

    async def guest(cpu: Any, driver: Any) -> None:
        cpu.mask()
        await driver.send_ipi(cpu, 0)

    async def main() -> tuple[LedgerStatement, LedgerStatement]:
        machine = BOARDS[board](1)
        await machine.run_guest(guest)
        before = machine.kvm.statement()
        machine.close()
        return before, machine.kvm.statement()

    before, after = fabric.run(main)
    assert LedgerStatement(raised=1, pending=1) == before
    assert LedgerStatement(raised=1, dropped={"vm closed": 1}) == after


def test_a_machine_with_more_memory_than_a_slot_takes() -> None:
    """64 TiB, of which a guest uses the ends."""

    async def main() -> LedgerStatement:
        machine = Arm64Gicv3(1, 1 << 46)

        async def guest(cpu: Any, driver: Any) -> None:
            await cpu.store(machine.ram_base + SLOT_SIZE - 4, 8, 0x1122_3344_5566_7788)
            assert 0x1122_3344 == await cpu.load(machine.ram_base + SLOT_SIZE, 4)

        await machine.run_guest(guest)
        return machine.kvm.statement()

    assert LedgerStatement() == fabric.run(main)


# Devices


@every_board
def test_memory_nobody_answers_reads_all_ones(board: str) -> None:
    """As on a bus; a write there has no effect."""

    async def guest(cpu: Any, driver: Any) -> None:
        nowhere = BOARDS[board].bar_base
        await cpu.store(nowhere, 4, 1)
        assert 0xFFFF_FFFF == await cpu.load(nowhere, 4)

    ledger_of(guest, board=board)


def test_registers_of_a_device_that_are_none() -> None:
    """They take writes and read zero."""

    async def main() -> list[int]:
        device = Arm64Gicv3(1).add_device(Device("d", vectors=1, queues=1))
        device.write(0xFFF0, 4, 5)
        device.write(RINGS + 4, 4, 5)
        device.write(MSIX_TABLE + 16, 8, 5)
        assert 0 == device.read(0, 4)
        return device.rings

    assert [0] == fabric.run(main)


def test_a_vector_the_guest_has_not_programmed_raises_nothing() -> None:
    """The device counts it: no controller will ever see it."""

    async def main() -> int:
        device = Arm64Gicv3(1).add_device(Device("d", vectors=1))
        device.raise_vector(0)
        device.write(MSIX_TABLE + MSIX_CONTROL, 4, 1)
        device.raise_vector(0)
        return device.spurned

    assert 2 == fabric.run(main)


@every_board
def test_a_recording_is_raised_at_its_times(board: str) -> None:
    """From when it is let go; what the handler has to do is there before it runs."""
    seen: list[tuple[int, int]] = []

    async def main() -> LedgerStatement:
        machine = BOARDS[board](1)
        source = machine.add_device(RecordedSource("r", 2, [(0, 0, 7), (100, 1, 8), (100, 0, 9)]))

        async def guest(cpu: Any, driver: Any) -> None:
            async def taken(cpu: Any) -> None:
                seen.append((fabric.now() - start, sum(work.popleft() for work in source.work if work)))

            vectors = [Vector(0, taken, "a"), Vector(0, taken, "b")]
            await write_msix(cpu, source.bar, await driver.allocate_msi(cpu, source.devid, vectors))
            await cpu.compute(1000)
            start = fabric.now()
            source.go(start)
            await cpu.compute(1000)

        await machine.run_guest(guest)
        assert 3 == source.played
        return machine.kvm.statement()

    assert LedgerStatement(raised=3, delivered=3) == fabric.run(main)
    assert [(0, 7), (100, 17), (100, 0)] == seen


def test_devices_and_guests_need_a_simulation() -> None:
    """They say so when they are made."""
    assert current_engine() is None

    with pytest.raises(RuntimeError, match="inside a simulation only"):
        Device("d", vectors=1)
