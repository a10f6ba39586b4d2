"""The sequences of a migration: every documented step, in its place, with the ioctls it names, and for a reason."""

from __future__ import annotations

import ctypes
import errno
import mmap
import pickle
import tomllib
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any

import attrs
import pytest
from migration_machines import MACHINES, gicv2, gicv3, host_of

from fabric.kvm import Kvm
from fabric.kvm.typed import Host
from fabric.migration import ArmState, ArmVm, MigrationError, Step, play, restore, save
from fabric.migration.arm64 import RESTORE_GICV2, RESTORE_GICV3, SAVE_GICV3, SEQUENCES
from fabric.migration.arm64_state import VERSION
from fabric.uapi import ioctl as requests


@pytest.mark.parametrize("version", [0, 2, 3])
def test_what_is_restored_is_what_was_saved(version: int) -> None:
    """Saved again, the second machine gives the same state: registers, tables in memory, lines, attributes, routes."""
    first, second = MACHINES[version](), host_of(version)
    saved = save(first)
    restore(saved, second)

    assert saved.state == save(second).state
    assert [(irqfd.gsi, irqfd.resample is not None) for irqfd in first.irqfds] == [
        (irqfd.gsi, irqfd.resample is not None) for irqfd in second.irqfds
    ]


@pytest.mark.parametrize("version", [0, 2, 3])
def test_a_state_is_plain_data(version: int) -> None:
    """It can be pickled, compared, hashed, and written as JSON and read again."""
    state = save(MACHINES[version]()).state

    assert state == pickle.loads(pickle.dumps(state)) == ArmState.from_json(state.to_json())
    assert hash(state) == hash(pickle.loads(pickle.dumps(state)))


def test_it_works_on_the_memory_of_the_process() -> None:
    """With a VMM that maps guest memory itself; the target says where its memory is."""
    saved = save(gicv3())
    areas: list[mmap.mmap] = []

    def place(_vm: ArmVm, size: int) -> int:
        areas.append(mmap.mmap(-1, size))
        return ctypes.addressof(ctypes.c_char.from_buffer(areas[-1]))

    with pytest.raises(TypeError, match="give `place`"):
        restore(saved, ArmVm(Host(Kvm("aarch64"))))
    target = ArmVm(Host(Kvm("aarch64")), place=place)
    restore(saved, target)

    assert b"guest data" == areas[0][0xE0_0000 : 0xE0_0000 + 10]
    assert saved.state == save(target).state


# The tables of steps.


def inventory(name: str) -> dict[str, list[str]]:
    """The sequences of an interface, and the ids of their steps."""
    text = resources.files("fabric.conformance").joinpath("inventory", f"{name}.toml").read_text(encoding="utf-8")
    found = tomllib.loads(text)["sequence"]
    return {sequence["id"]: [step["id"] for step in sequence["steps"]] for sequence in found}


@pytest.mark.parametrize(
    ("interface", "sequence", "steps"),
    [
        ("arm-vgic-v3", "vgic-v3.seq.save", SAVE_GICV3),
        ("arm-vgic-its", "its.seq.save", SAVE_GICV3),
        ("arm-vgic-v3", "vgic-v3.seq.restore", RESTORE_GICV3),
        ("arm-vgic-its", "its.seq.restore", RESTORE_GICV3),
        ("arm-vgic-v2", "vgic-v2.seq.restore", RESTORE_GICV2),
    ],
)
def test_the_steps_are_the_documented_ones_in_their_order(
    interface: str, sequence: str, steps: tuple[Step, ...]
) -> None:
    """Every step of the inventory's sequence, once each, in its order. (RAM comes in two places, vCPUs follow it.)"""
    wanted = inventory(interface)[sequence]
    ours = [one for step in steps for one in step.ids if one.startswith(f"{sequence}.")]

    assert wanted == list(dict.fromkeys(ours))


def names_of(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> set[frozenset[str]]:
    """The names of the ioctls that are made from now on; two kinds of fd may have a number for different ones."""
    made: set[frozenset[str]] = set()
    call = kvm.ioctl

    def ioctl(fd: int, request: int, arg: Any = 0) -> int:
        made.add(frozenset(name for name, value in vars(requests).items() if name[:4] == "KVM_" and value == request))
        return call(fd, request, arg)

    monkeypatch.setattr(kvm, "ioctl", ioctl)
    return made


@pytest.mark.parametrize("version", [0, 2, 3])
def test_each_step_makes_the_ioctls_it_names(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No others, and not none; so that a model of a migration knows what a step costs."""
    first, second = MACHINES[version](), host_of(version)
    saved, found = save(first), {}
    saving, restoring = SEQUENCES[version]
    for steps, vm, state in ((saving, first, found), (restoring, second, saved.state)):
        made = names_of(vm.host.kvm, monkeypatch)
        for step in play(steps, vm, state):
            assert all(names & {*step.ioctls} for names in made), step.what
            if version and "KVM_RUN" not in step.ioctls:  # no vCPU is in an exit
                assert bool(made) == bool(step.ioctls), step.what
            made.clear()


def restored_with(state: ArmState, steps: Iterable[Step], version: int = 3) -> ArmState | str:
    """What is saved of a machine that was restored so, or the errno it fails with."""
    target = host_of(version)
    try:
        for _ in play(steps, target, state):
            pass
        return save(target).state
    except MigrationError as error:
        return errno.errorcode[error.errno]
    except ValueError:
        return "nothing to restore into"


def moved(steps: tuple[Step, ...], what: str, after: str) -> list[Step]:
    """The steps with the one ``what`` (an id) after another, and with the vCPUs what needs them."""
    late = [step for step in steps if what in step.ids and step.ioctls]
    if "create-vcpus" in what:
        late += [step for step in steps if step.what == "give the vCPUs their affinity"]
    rest = [one for one in steps if one not in late]
    (place,) = [n for n, one in enumerate(rest) if after in one.ids]
    return [*rest[: place + 1], *late, *rest[place + 1 :]]


def without(steps: tuple[Step, ...], what: str) -> list[Step]:
    """The steps without those of an id, or with that description."""
    rest = [step for step in steps if what not in step.ids and what != step.what]
    assert len(rest) < len(steps)
    return rest


UNSEEN = ("initialise the GIC", "load the guests: the vCPUs may run")
"""What a state does not show."""


@pytest.mark.spec(
    "vgic-v3.seq.restore.1-create-vcpus",
    "vgic-v3.seq.restore.2-create-gic",
    "vgic-v3.seq.restore.3-create-its",
    "vgic-v3.seq.restore.4-nr-irqs",
    "vgic-v3.seq.restore.7-iidr",
    "vgic-v3.seq.restore.8-dist",
    "vgic-v3.seq.restore.9-redist-baser",
    "vgic-v3.seq.restore.10-redist",
    "vgic-v3.seq.restore.11-sysregs",
    "vgic-v3.seq.restore.12-levels",
    "vgic-v3.seq.restore.13-its",
    "its.seq.restore.1-ram-and-vcpus",
    "its.seq.restore.3-address",
    "its.seq.restore.4-cbaser",
    "its.seq.restore.5-other-regs",
    "its.seq.restore.6-tables",
    "its.seq.restore.7-ctlr",
)
@pytest.mark.parametrize("what", [step.what for step in RESTORE_GICV3 if step.what not in UNSEEN[1:]])
def test_no_step_of_a_gicv3_can_be_left_out(what: str) -> None:
    """Without it the machine is another one, or cannot be made."""
    state = save(gicv3()).state

    assert state != restored_with(state, without(RESTORE_GICV3, what))


@pytest.mark.spec(
    "vgic-v2.seq.restore.1-create-vcpus",
    "vgic-v2.seq.restore.2-create-device",
    "vgic-v2.seq.restore.3-nr-irqs",
    "vgic-v2.seq.restore.4-addresses",
    "vgic-v2.seq.restore.6-iidr",
    "vgic-v2.seq.restore.7-dist",
    "vgic-v2.seq.restore.8-cpu",
)
@pytest.mark.parametrize("what", [step.what for step in RESTORE_GICV2 if step.what not in UNSEEN])
def test_no_step_of_a_gicv2_can_be_left_out(what: str) -> None:
    """Without it the machine is another one, or cannot be made."""
    state = save(gicv2()).state

    assert state != restored_with(state, without(RESTORE_GICV2, what), 2)


@pytest.mark.spec("vgic-v2.seq.restore.5-init")
def test_a_gicv2_is_initialised_by_the_first_access_to_a_register() -> None:
    """If not before; that leaves nothing of the restore out."""
    state = save(gicv2()).state

    assert state == restored_with(state, without(RESTORE_GICV2, "initialise the GIC"), 2)


def is_(code: str) -> Callable[[ArmState | str, ArmState], bool]:
    """The restore fails with an errno."""
    return lambda result, _state: result == code


def lost(part: Callable[[Any], Any]) -> Callable[[ArmState | str, ArmState], bool]:
    """The restore succeeds, and a part of the state is not what was saved."""
    return lambda result, state: isinstance(result, ArmState) and part(result) != part(state)


V3, ITS, V2 = "vgic-v3.seq.restore.", "its.seq.restore.", "vgic-v2.seq.restore."


@pytest.mark.spec(
    "vgic-v3.seq.restore.1-create-vcpus",
    "vgic-v3.seq.restore.3-create-its",
    "vgic-v3.seq.restore.4-nr-irqs",
    "vgic-v3.seq.restore.6-init",
    "vgic-v3.seq.restore.9-redist-baser",
    "its.seq.restore.2-redistributors",
    "its.seq.restore.3-address",
    "its.seq.restore.4-cbaser",
    "its.seq.restore.5-other-regs",
    "its.seq.restore.7-ctlr",
    "its.seq.restore.note.creadr-after-cbaser",
    "vgic-v2.seq.restore.6-iidr",
)
@pytest.mark.parametrize(
    ("version", "what", "after", "then"),
    [
        pytest.param(3, f"{V3}1-create-vcpus", f"{V3}6-init", is_("EBUSY"), id="vcpus-before-init"),
        pytest.param(3, f"{V3}3-create-its", f"{V3}10-redist", is_("EFAULT"), id="its-before-redistributors"),
        pytest.param(3, f"{V3}4-nr-irqs", f"{V3}6-init", is_("EBUSY"), id="nr-irqs-before-init"),
        pytest.param(3, f"{V3}6-init", f"{V3}7-iidr", is_("EBUSY"), id="init-before-registers"),
        pytest.param(3, f"{V3}9-redist-baser", f"{V3}10-redist", is_("EFAULT"), id="bases-before-enable"),
        pytest.param(3, f"{V3}10-redist", f"{ITS}6-tables", lost(lambda s: s.slots), id="redistributors-before-tables"),
        pytest.param(3, f"{ITS}3-address", f"{ITS}4-cbaser", is_("ENXIO"), id="address-before-registers"),
        pytest.param(3, f"{ITS}4-cbaser", f"{ITS}5-other-regs", lost(lambda s: s.its), id="cbaser-before-creadr"),
        pytest.param(3, f"{ITS}5-other-regs", f"{ITS}6-tables", lost(lambda s: s.slots), id="baser-before-tables"),
        pytest.param(3, f"{ITS}5-other-regs", f"{ITS}7-ctlr", lost(lambda s: s.its), id="registers-before-ctlr"),
        pytest.param(2, f"{V2}6-iidr", f"{V2}7-dist", lost(lambda s: s.gic), id="gicv2-iidr-before-groups"),
        pytest.param(2, f"{V2}3-nr-irqs", f"{V2}5-init", is_("EBUSY"), id="gicv2-nr-irqs-before-init"),
        pytest.param(2, f"{V2}1-create-vcpus", f"{V2}5-init", is_("EBUSY"), id="gicv2-vcpus-before-init"),
    ],
)
def test_the_order_has_reasons(
    version: int, what: str, after: str, then: Callable[[ArmState | str, ArmState], bool]
) -> None:
    """A step that comes too late is refused by the kernel, or has no effect, or spoils another."""
    state = save(MACHINES[version]()).state
    result = restored_with(state, moved(SEQUENCES[version][1], what, after), version)

    assert then(result, state), result if isinstance(result, str) else attrs.asdict(result)


def saved_with(steps: Iterable[Step]) -> ArmState | None:
    """What a save with these steps gives, restored and saved again; None when something is missing."""
    found: dict[str, Any] = {}
    for _ in play(steps, gicv3(), found):
        pass
    if not {"slots", "vcpus", "gic", "its"} <= found.keys():
        return None
    result = restored_with(ArmState(VERSION, **found), RESTORE_GICV3)
    return result if isinstance(result, ArmState) else None


@pytest.mark.spec(
    "vgic-v3.seq.save.2-pending",
    "vgic-v3.seq.save.3-its",
    "vgic-v3.seq.save.4-regs",
    "vgic-v3.seq.save.5-ram",
    "its.seq.save.2-pending",
    "its.seq.save.3-tables",
    "its.seq.save.4-regs",
    "its.seq.save.5-ram",
)
@pytest.mark.parametrize("what", [step.ids[0] for step in SAVE_GICV3 if ".seq.save." in "".join(step.ids)][1:])
def test_no_step_of_a_save_can_be_left_out(what: str) -> None:
    """Pending LPIs, maps, registers, memory: each is in one of them only."""
    assert save(gicv3()).state != saved_with(without(SAVE_GICV3, what))


@pytest.mark.spec("vgic-v3.seq.save.5-ram", "its.seq.save.5-ram")
@pytest.mark.parametrize("early", ["vgic-v3.seq.save.2-pending", "vgic-v3.seq.save.3-its"])
def test_memory_is_copied_last(early: str) -> None:
    """What KVM writes there at the end has to be in the copy."""
    steps = moved(SAVE_GICV3, early, "vgic-v3.seq.save.5-ram")

    assert save(gicv3()).state == saved_with(SAVE_GICV3)
    assert save(gicv3()).state != saved_with(steps)
