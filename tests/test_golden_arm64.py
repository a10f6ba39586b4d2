"""What a real arm64 kernel answered, call by call, is what ``Kvm.ioctl`` answers."""

from __future__ import annotations

import copy

import golden_replay
import pytest

FLOOR = {
    # file: sequences and operations that agree. Everything, or what agreed when it was looked at last.
    "01-v3-setup": (16, 7166),
    "01-v3-setup-fuzz": (105, 5394),
    "02-v3-irqline": (3, 5404),
    "02-v3-regs-fuzz": (32, 9932),
    "02-v3-regs-sweep": (6, 390993),
    "03-v3-sysregs": (30, 5859),
    "04-its-directed": (68, 5797),
    "04-its-fuzz-a": (32, 6083),
    "04-its-fuzz-b": (22, 4517),
    "04-its-regs": (3, 50382),
    "04-its-restore": (76, 6419),
    "05-irqfd-routing-msi": (3, 377),
    "06-v2-fixed": (10, 45445),
    "06-v2-fuzz": (32, 10792),
    "07-vcpu-attrs": (9, 1058),
    "07-vcpu-attrs-fuzz": (46, 3609),
    "08-guest-directed": (8, 1540),
    "08-guest-fuzz": (37, 11879),
    "09-v2-guest": (15, 2678),
}


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_answers_are_those_of_the_kernel(name: str) -> None:
    """As many calls as before answer what the kernel did, and the ledger adds up after every sequence."""
    tally = golden_replay.replay_file(golden_replay.GOLDEN / f"{name}.json.gz")

    assert [] == tally.unbalanced
    agreed = (tally.passed, tally.equal)
    assert agreed >= FLOOR[name], "\n".join(map(str, tally.differences[:20]))
    assert FLOOR[name] == agreed, f"better than before: raise the floor of {name} to {agreed}"


@pytest.mark.parametrize("name", ["05-irqfd-routing-msi", "04-its-directed"])
def test_simulated_eventfds_are_as_good_as_real_ones(name: str) -> None:
    """An eventfd of the Kvm does what one of the operating system does."""
    path = golden_replay.GOLDEN / f"{name}.json.gz"
    tally = golden_replay.replay_file(path, simulated_eventfds=True)

    assert [] == list(map(str, tally.differences))


def test_every_file_is_replayed() -> None:
    """No golden file is forgotten."""
    names = {path.name.removesuffix(".json.gz") for path in golden_replay.golden_files()}

    assert names == FLOOR.keys()


@pytest.mark.parametrize("change", ["ret", "out", "errno"])
def test_the_harness_sees_a_wrong_answer(change: str) -> None:
    """A recording with one answer changed no longer agrees."""
    content = golden_replay.load(golden_replay.GOLDEN / "05-irqfd-routing-msi.json.gz")
    sequence = copy.deepcopy(content["sequences"][1])
    kinds = {
        "ret": lambda op: op["ret"] == 0,
        "out": lambda op: op.get("out") == 0,
        "errno": lambda op: op["ret"] != 0,
    }
    op = next(op for op in sequence["ops"] if kinds[change](op) and "new" not in op)
    op.update({"ret": {"ret": 1}, "out": {"out": 5}, "errno": {"ret": {"errno": "EPERM"}}}[change])
    tally = golden_replay.Tally("changed")
    golden_replay.replay_sequence(sequence, tally, 3, False)

    assert (0, 1, 1) == (tally.passed, tally.sequences, len(tally.differences))
