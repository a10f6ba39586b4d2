"""What a real arm64 kernel answered about a vCPU's registers and hypercalls is what ``Kvm.ioctl`` and guests get."""

from __future__ import annotations

import copy

import golden_replay
import golden_vcpu
import pytest

FILES = {
    # file: sequences and operations, all of which agree.
    "10-registers": (7, 1981),
    "11-registers-set": (7, 5343),
    "12-register-ids": (12, 5997),
    "13-registers-fuzz": (60, 6755),
    "14-pmu": (12, 708),
    "15-pmu-fuzz": (40, 7065),
    "16-hypercalls": (11, 1261),
    "17-timers": (42, 6731),
}


@pytest.mark.spec(
    "api.get-one-reg",
    "api.set-one-reg",
    "api.get-one-reg.ENOENT.unknown",
    "api.set-one-reg.ENOENT.unknown",
    "api.get-one-reg.EINVAL.invalid",
    "api.set-one-reg.EINVAL.invalid",
    "api.get-one-reg.EPERM.not-finalised",
    "api.set-one-reg.EPERM.not-finalised",
    "api.get-one-reg.ENOEXEC.arm-init",
    "api.set-one-reg.ENOEXEC.arm-init",
    "api.get-one-reg.EFAULT.user-ptr",
    "api.set-one-reg.EFAULT.user-ptr",
    "api.set-one-reg.rule.size",
    "vcpu.pv-time-hvc",
    "vcpu.pv-time-hvc.rule.features",
    "vcpu.pv-time-hvc.rule.st",
    "vcpu.pvtime.ipa.rule.zeroed",
    "vcpu.pvtime.ipa.EINVAL.no-slot",
    "vcpu.pmu.filter.rule.sw-incr",
    "vcpu.pmu.filter.rule.chain",
    "api.reg.timer-ctl",
    "api.reg.timer-cval",
    "vcpu.timer.vtimer.note.ebusy-scope",
    "vcpu.timer.ptimer.note.ebusy-scope",
)
@pytest.mark.parametrize("name", sorted(FILES))
def test_answers_are_those_of_the_kernel(name: str) -> None:
    """Every call and every instruction."""
    tally = golden_vcpu.replay_file(golden_vcpu.GOLDEN / f"{name}.json.gz")

    assert [] == list(map(str, tally.differences[:20]))
    assert [] == tally.unbalanced
    assert FILES[name] == (tally.passed, tally.equal)


def test_every_file_is_replayed() -> None:
    """No recording is forgotten."""
    assert FILES.keys() == {path.name.removesuffix(".json.gz") for path in golden_vcpu.GOLDEN.glob("*.json.gz")}


@pytest.mark.parametrize("ioctl", ["KVM_GET_ONE_REG", "KVM_GET_REG_LIST", "guest"])
def test_the_harness_sees_a_wrong_answer(ioctl: str) -> None:
    """A recording with one answer changed no longer agrees."""
    name = "14-pmu" if ioctl == "guest" else "10-registers"
    content = golden_replay.load(golden_vcpu.GOLDEN / f"{name}.json.gz")
    sequence = copy.deepcopy(content["sequences"][0])
    op = [op for op in sequence["ops"] if op["ioctl"] == ioctl and op["ret"] == 0][-1]
    op["out"] = {"n": 1, "regs": []} if ioctl == "KVM_GET_REG_LIST" else 12345
    tally = golden_replay.Tally("changed")
    golden_replay.replay(sequence, tally, lambda: golden_vcpu.VcpuReplayer(content["options"]))

    assert (0, 1, 1) == (tally.passed, tally.sequences, len(tally.differences))
