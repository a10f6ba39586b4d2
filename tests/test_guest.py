"""Parts of the guest: agendas, intervals, memory for tables."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fabric
from fabric.guest.driver import Pages
from fabric.guest.workload import Agenda, Guest, Interval
from fabric.vmm import Arm64Gicv3


def test_an_agenda_is_followed_in_order_of_time() -> None:
    """First come, first served within an instant; an action says when it is to be done again."""
    done: list[tuple[str, int]] = []

    async def main() -> None:
        machine = Arm64Gicv3(1)

        def action(name: str, *again: int) -> Any:
            following = iter(again)

            async def act(cpu: Any) -> int | None:
                done.append((name, fabric.now()))
                await cpu.compute(10)
                return next(following, None)

            return act

        async def guest(cpu: Any, driver: Any) -> None:
            agenda = Agenda()
            agenda.add(200, action("late"))
            agenda.add(100, action("a", 150, 155))
            agenda.add(100, action("b"))
            agenda.add(300, lambda cpu: cpu.system_off())
            await agenda.follow(cpu)

        await machine.run_guest(guest)

    fabric.run(main)
    assert [("a", 100), ("b", 110), ("a", 150), ("a", 160), ("late", 200)] == done


@given(st.floats(0.1, 1e9), st.booleans(), st.integers(0, 100))
def test_intervals_are_never_shorter_than_a_nanosecond(mean: float, exponential: bool, seed: int) -> None:
    """Or a stream of events could stop time."""
    assert Interval(mean, exponential, random.Random(seed)).draw() >= 1


def test_intervals_have_their_mean() -> None:
    """Constant ones exactly, exponential ones over many."""
    drawn = Interval(1000.0, True, random.Random(1))

    assert 1000 == Interval(1000.0, False, None).draw()
    assert 1000 == pytest.approx(sum(drawn.draw() for _ in range(10_000)) / 10_000, rel=0.05)


def test_pages_are_aligned_and_come_to_an_end() -> None:
    """The guest's allocator hands out what it was given, once."""
    pages = Pages(0x1001, 0x3000)

    assert 0x2000 == pages.take(0x10)
    assert 0x2010 == pages.take(0x10, 16)
    with pytest.raises(MemoryError, match="no 8192 bytes left below 0x4001"):
        pages.take(0x2000)


def test_a_guest_outside_of_a_simulation() -> None:
    """Has nobody to wait for."""
    with pytest.raises(RuntimeError, match="inside a simulation only"):
        Guest(None, 1, Pages(0, 0), [], lambda cpu, number: None)  # type: ignore[arg-type, return-value]
