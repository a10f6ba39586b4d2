"""fabric's GICs beside those of an emulator: the same accesses, the same answers, or a document that explains why not.

The emulator's answers are recorded in tests/golden/qtest; where there is a qemu-system-aarch64 with the accelerator
qtest (in PATH, or named by FABRIC_QEMU_AARCH64), other programs are played on it as well. ``tools/record_qtest.py``
records anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pytest
from qtest_client import VARIABLE, NoEmulator, find_emulator
from qtest_deviations import GICV3, Deviation
from qtest_deviations_v2 import GICV2
from qtest_differences import FIELDS, Comparison, answered, describe, explain, register_at
from qtest_players import emulate, simulate
from qtest_recording import KINDS, RECORDED, Recorded, load
from qtest_steps import GICD, Program, Step, shrink

DEVIATIONS = [*GICV3, *GICV2]


@pytest.fixture(scope="module")
def recorded() -> list[Recorded]:
    """The recorded programs."""
    return load()


@pytest.fixture(scope="module")
def comparisons(recorded: list[Recorded]) -> dict[str, Comparison]:
    """They are played on fabric and compared, by kind."""
    by_kind = {kind: Comparison() for kind in KINDS}
    for each in recorded:
        program = each.program
        by_kind[each.kind].add(program, each.answers, simulate(program.machine, program.steps))
    for comparison in by_kind.values():
        print(comparison)
    return by_kind


@pytest.fixture(scope="module")
def emulator() -> str:
    """An emulator."""
    try:
        return find_emulator()
    except NoEmulator as reason:
        pytest.skip(str(reason))


# -- recorded -------------------------------------------------------------------------------------------------------


def test_registers_of_gicv3_as_recorded(comparisons: dict[str, Comparison]) -> None:
    """GICD and GICR of two CPUs, with lines of SPIs and PPIs: state, priorities, triggers, routes, tables."""
    assert [] == comparisons["gicv3"].unexplained


@pytest.mark.spec(
    "its.cmd.movi", "its.cmd.int", "its.cmd.clear", "its.cmd.mapd", "its.cmd.mapc", "its.cmd.mapti", "its.cmd.mapi",
    "its.cmd.movall", "its.cmd.discard",
)  # fmt: skip
def test_its_commands_as_recorded(comparisons: dict[str, Comparison]) -> None:
    """Commands that mean something and commands that do not, MSIs, and which LPIs are pending on which CPU then."""
    assert [] == comparisons["its"].unexplained


def test_gicv2_as_recorded(comparisons: dict[str, Comparison]) -> None:
    """GICD and GICC as CPU 0: interrupts become pending, are taken, nest, and end."""
    assert [] == comparisons["gicv2"].unexplained


def test_every_allowance_is_needed(comparisons: dict[str, Comparison]) -> None:
    """Each field that may differ does: what no longer does is to be struck off the list."""
    used = {field for comparison in comparisons.values() for field in comparison.allowed}

    assert [] == [field for field in FIELDS if field not in used]
    assert sum(comparison.answers for comparison in comparisons.values()) > 20_000


def test_programs_go_deep(recorded: list[Recorded]) -> None:
    """They have pending LPIs, and interrupts that are taken: an empty machine would agree with anything."""
    lpis = taken = 0
    for each in recorded:
        steps = [step for step in each.program.steps if step.answers]
        for step, answer in zip(steps, each.answers, strict=True):
            if isinstance(answer, list):
                lpis += sum(len(pending) for pending in answer)
            elif step.op == "ack" and answer is not None:
                taken += answer & 0x3FF < 1020

    assert lpis > 500
    assert taken > 400


def test_recorded_steps_can_be_read(recorded: list[Recorded]) -> None:
    """Steps are their text, and have a description with the register's or command's name."""
    for each in recorded[::5]:
        for step in each.program.steps:
            assert step == Step.parse(str(step))
            assert describe(each.program.machine, step).startswith(str(step))


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda deviation: deviation.name)
def test_what_programs_keep_away_from(deviation: Deviation) -> None:
    """What KVM does where the architecture leaves it open, or KVM departs from it."""
    assert deviation.ours == simulate(deviation.machine, deviation.program.steps)[-1]


# -- beside an emulator ---------------------------------------------------------------------------------------------


def beside(emulator: str, kind: str, seeds: Iterable[int]) -> None:
    """Play programs on both. A program that differs is made as short as it goes first."""
    comparison = Comparison()
    for seed in seeds:
        program = KINDS[kind](seed)
        theirs = emulate(emulator, program.machine, program.steps)
        ours = simulate(program.machine, program.steps)
        comparison.add(program, theirs, ours)
        if comparison.unexplained:
            pytest.fail("\n".join([str(comparison), "shortened:", *shorten(emulator, program)]))
    print(comparison)


def shorten(emulator: str, program: Program) -> list[str]:
    """The fewest steps that still lead to the first difference of a program, with the answers to the last of them."""

    def first_difference(steps: list[Step]) -> int | None:
        theirs = emulate(emulator, program.machine, steps)
        ours = simulate(program.machine, steps)
        for number, step, expected, actual in answered(Program("", "", steps), theirs, ours):
            if explain(program.machine, step, expected, actual)[1]:
                return number
        return None

    number = first_difference(program.steps)
    assert number is not None
    begin, last = program.steps[: program.essential], program.steps[number]

    def fails(steps: list[Step]) -> bool:
        steps = [*begin, *steps, last]
        return first_difference(steps) == len(steps) - 1

    kept = shrink(program.steps[program.essential : number], fails)
    text = [describe(program.machine, step) for step in [*begin, *kept, last]]
    text.insert(len(begin), "-- so far what every such program begins with")
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_beside_an_emulator(emulator: str, kind: str) -> None:
    """Programs that are not recorded."""
    beside(emulator, kind, range(RECORDED.stop, RECORDED.stop + 8))


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_beside_an_emulator_for_long(emulator: str, kind: str) -> None:
    """Many more."""
    beside(emulator, kind, range(10_000, 10_400))


def test_what_the_emulator_does_where_programs_keep_away(emulator: str) -> None:
    """The emulator's side of the list is true as well."""
    answers = {d.name: emulate(emulator, d.machine, d.program.steps)[-1] for d in DEVIATIONS}

    assert {d.name: d.theirs for d in DEVIATIONS} == answers


# -- the comparison itself -------------------------------------------------------------------------------------------


def test_one_wrong_bit_is_found(recorded: list[Recorded]) -> None:
    """A difference in a bit that no field allows is reported, with the register's name and the steps before."""
    program = next(each.program for each in recorded if each.kind == "gicv3")
    ours = simulate(program.machine, program.steps)
    wrong = list(ours)
    last = max(number for number, answer in enumerate(wrong) if isinstance(answer, int))
    wrong[last] = int(str(wrong[last])) ^ 2
    comparison = Comparison()
    comparison.add(program, ours, wrong)

    assert 1 == len(comparison.unexplained)
    assert "# GICR_ICFGR0" in comparison.unexplained[0]


def test_fields_are_found_in_parts_of_a_register() -> None:
    """A byte of GICD_IPRIORITYR may differ in its low bits, and the upper half of GICD_IROUTER in Aff3."""
    byte = Step("r", GICD + 0x42B, 1)
    upper = Step("r", GICD + 0x6104, 4)

    assert (1, False) == _explained(byte, 0xA7, 0xA0)
    assert (1, True) == _explained(byte, 0xA7, 0xB0)
    assert (1, False) == _explained(upper, 0x12, 0)
    assert ("GICD_IROUTER", 0x104) == register_at("gicv3", upper.address)


def _explained(step: Step, theirs: int, ours: int) -> tuple[int, bool]:
    fields, rest = explain("gicv3", step, theirs, ours)
    return len(fields), rest


def test_shrink_keeps_what_is_needed() -> None:
    """Of twenty steps the two that matter are left, in their order."""
    steps = [Step("r", number, 4) for number in range(20)]

    assert [steps[3], steps[17]] == shrink(steps, lambda kept: steps[3] in kept and steps[17] in kept)


def test_a_line_that_is_no_step() -> None:
    """It is refused."""
    with pytest.raises(ValueError, match="not a step: 'w4 8000000'"):
        Step.parse("w4 8000000")


def test_without_an_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason says what is missing: the program, or in it the accelerator."""
    monkeypatch.setenv(VARIABLE, "no-such-emulator")
    with pytest.raises(NoEmulator, match=f"no no-such-emulator .set {VARIABLE}"):
        find_emulator()
    monkeypatch.setenv(VARIABLE, sys.executable)
    with pytest.raises(NoEmulator, match="with qtest does not start"):
        find_emulator()
