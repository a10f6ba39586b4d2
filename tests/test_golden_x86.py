"""What a real x86 kernel answered, call by call, is what ``Kvm.ioctl`` answers."""

from __future__ import annotations

import golden_x86
import pytest


@pytest.mark.parametrize("path", golden_x86.golden_files(), ids=lambda path: path.name.removesuffix(".json.gz"))
def test_answers_are_those_of_the_kernel(path) -> None:
    """Every call of every case answers what the kernel did, and the ledger adds up after it."""
    tally = golden_x86.replay_file(path)

    assert [] == tally.unbalanced
    assert [] == [str(difference) for difference in tally.differences[:20]]
    assert tally.cases


@pytest.mark.parametrize("name", ["20-irqfd", "22-irqfd-walk"])
def test_simulated_eventfds_are_as_good_as_real_ones(name: str) -> None:
    """An eventfd of the Kvm does what one of the operating system does."""
    tally = golden_x86.replay_file(golden_x86.GOLDEN / f"{name}.json.gz", simulated_eventfds=True)

    assert [] == [str(difference) for difference in tally.differences[:20]]


def test_the_harness_notices_a_wrong_answer() -> None:
    """A case whose expectation was changed in one place fails."""
    case = {
        "id": "made/up",
        "setup": [],
        "ops": [
            {"on": "sys", "ioctl": "KVM_CREATE_VM", "nr": 0xAE01, "in": {"int": 0}, "ret": {"fd": "vm"}},
            {"on": "vm", "ioctl": "KVM_CREATE_IRQCHIP", "nr": 0xAE60, "in": {"int": 0}, "ret": {"errno": "EEXIST"}},
        ],
    }
    tally = golden_x86.Tally("made")
    golden_x86.replay_case(case, tally, False, {})

    assert ["made/up"] == tally.failed
    assert 1 == len(tally.differences)
