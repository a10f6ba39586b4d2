"""Whom a message reaches: physical and logical ids, models, broadcasts, shorthands, lowest priority, MSI decoding.

Sections are those of the Intel SDM vol. 3, chapter 11 (APIC).
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from x86_machine import Apics

from fabric.devices.x86 import apic_bus
from fabric.devices.x86.apic_bus import ALL, ALL_BUT_SELF, MODE_FIXED, MODE_INIT, MODE_LOWEST, NOBODY, SELF, deliver_msi
from fabric.devices.x86.lapic import BASE_X2APIC, DFR, ID, LDR, SVR

VECTOR = 0x41
CLUSTER = 0x0FFF_FFFF
ADDRESS = 0xFEE0_0000


def send(
    machine: Apics, dest: int, *, logical: bool = False, mode: int = MODE_FIXED, vector: int = VECTOR, **kw: Any
) -> Any:
    """The status and the indexes of those that have the vector now."""
    status = machine.bus.deliver(dest, logical, mode, vector, True, 0, **kw)
    machine.check()
    return status, machine.holders(vector)


# -- physical


@pytest.mark.parametrize("x2apic", [False, True])
def test_physical_ids(x2apic: bool) -> None:
    """11.6.2.1: the one whose id it is; 0 when there is none."""
    machine = Apics([0, 3, 7], x2apic=x2apic)

    assert (1, [1]) == send(machine, 3)
    assert (0, [1]) == send(machine, 4)


def test_an_xapic_id_that_the_guest_changed() -> None:
    """In xAPIC mode the id register is what destinations are compared with (11.4.6)."""
    machine = Apics([0, 1])
    machine.apics[1].write(ID, 9 << 24)

    assert (1, [1]) == send(machine, 9)
    assert (0, [1]) == send(machine, 1)


def test_two_with_one_id() -> None:
    """Both take it: all are asked."""
    machine = Apics([0, 1, 2])
    machine.apics[2].write(ID, 1 << 24)

    assert (2, [1, 2]) == send(machine, 1)
    assert (NOBODY, [1, 2]) == send(machine, 7)


def test_wide_ids() -> None:
    """11.12.9: 32 bits in x2APIC mode. An xAPIC id is the low byte of the vCPU's."""
    machine = Apics([0, 0x105, 0x1234], x2apic=True, wide=True, quirk=False)

    assert (1, [2]) == send(machine, 0x1234)
    assert (1, [1, 2]) == send(machine, 0x105)
    assert (0, [1, 2]) == send(machine, 5)


def test_wide_ids_in_xapic_mode() -> None:
    """With the 32-bit format a vCPU beyond 255 has its full id before it goes to x2APIC mode: to get its INIT."""
    machine = Apics([0, 0x105], wide=True)
    machine.bus.deliver(0x105, False, MODE_INIT, 0, True, 0)

    assert ["INIT"] == machine.vm.vcpus[1].received


def test_an_xapic_id_that_is_taken() -> None:
    """With the 32-bit format who has an id in full comes before one whose low byte it is."""
    machine = Apics([5, 0x105], x2apic=[True, False], wide=True)

    assert (1, [0]) == send(machine, 5)


@given(st.permutations([0, 1, 2]), st.lists(st.booleans(), min_size=3, max_size=3))
@settings(deadline=None, max_examples=30)
def test_mixed_modes_physical(ids: list[int], modes: list[bool]) -> None:
    """A physical destination reaches its one local APIC whatever mode each of them is in."""
    for index, number in enumerate(ids):
        assert (1, [index]) == send(Apics(ids, x2apic=modes), number)


# -- logical


def test_flat_model() -> None:
    """11.6.2.2: DFR all ones: each bit of the destination that is set in a LDR."""
    machine = Apics([0, 1, 2])
    machine.set_ldr(1, 2, 0x80)

    assert (2, [0, 2]) == send(machine, 0x81, logical=True)
    assert (0, [0, 2]) == send(machine, 0x40, logical=True)


def test_cluster_model() -> None:
    """11.6.2.2: DFR 0xfffffff: the cluster in bits 7:4 is compared, the members in bits 3:0 matched."""
    machine = Apics([0, 1, 2, 3])
    for apic in machine.apics:
        apic.write(DFR, CLUSTER)
    machine.set_ldr(0x11, 0x12, 0x21, 0x24)

    assert (2, [0, 1]) == send(machine, 0x13, logical=True)
    assert (1, [0, 1, 3]) == send(machine, 0x26, logical=True)


def test_x2apic_clusters() -> None:
    """11.12.10.1: cluster in bits 31:16, members in 15:0."""
    machine = Apics([0, 1, 0x10, 0x12], x2apic=True)

    assert (2, [0, 1]) == send(machine, 0x0000_0003, logical=True)
    assert (1, [0, 1, 3]) == send(machine, 0x0001_0004, logical=True)
    assert (0, [0, 1, 3]) == send(machine, 0x0002_0001, logical=True)


def test_an_apic_in_two_groups() -> None:
    """A LDR with several bits is a member of each; who is not found then is nobody."""
    machine = Apics([0, 1])
    machine.set_ldr(3, 4)

    assert (1, [0]) == send(machine, 2, logical=True)
    assert (2, [0, 1]) == send(machine, 5, logical=True)
    assert (NOBODY, [0, 1]) == send(machine, 0x40, logical=True)


def test_mixed_modes_logical() -> None:
    """Each compares in its own way: xAPIC with its LDR, x2APIC with the id's."""
    machine = Apics([0, 1], x2apic=[False, True])
    machine.apics[0].write(LDR, 4 << 24)

    assert (1, [1]) == send(machine, 2, logical=True)
    assert (1, [0, 1]) == send(machine, 4, logical=True)
    assert (NOBODY, [0, 1]) == send(machine, 8, logical=True)


def test_an_xapic_without_a_logical_id() -> None:
    """Where all that have a logical id are in x2APIC mode, KVM finds members by id, in whatever mode they are."""
    machine = Apics([0, 1], x2apic=[False, True])

    assert (1, [0]) == send(machine, 1, logical=True)


def test_a_disabled_apic_is_not_in_the_map() -> None:
    """A LDR counts when the local APIC is enabled by software."""
    machine = Apics([0, 1])
    machine.set_ldr(1, 2)
    machine.apics[1].write(SVR, 0xFF)

    assert (0, []) == send(machine, 2, logical=True)
    machine.apics[1].write(SVR, 0x1FF)
    assert (1, [1]) == send(machine, 2, logical=True)


def test_no_logical_ids() -> None:
    """Nobody has one: 0."""
    assert (0, []) == send(Apics([0, 1]), 1, logical=True)


# -- broadcasts and shorthands


@pytest.mark.parametrize("logical", [False, True])
def test_broadcast(logical: bool) -> None:
    """11.6.2.1: 0xff is all of them in xAPIC mode."""
    machine = Apics([0, 1, 2])
    machine.set_ldr(1, 2, 4)

    assert (3, [0, 1, 2]) == send(machine, 0xFF, logical=logical)


def test_x2apic_broadcast() -> None:
    """11.12.9: 0xffffffff is all of them in x2APIC mode."""
    machine = Apics([0, 1], x2apic=True, quirk=False)

    assert (2, [0, 1]) == send(machine, 0xFFFF_FFFF)


def test_the_quirk() -> None:
    """0xff of a device is a broadcast also in x2APIC mode, unless that is turned off; of an IPI it is not."""
    old, new, ipi = (Apics([0, 1], x2apic=True, quirk=quirk) for quirk in (True, False, True))

    assert (2, [0, 1]) == send(old, 0xFF)
    assert (0, []) == send(new, 0xFF)
    assert (0, []) == send(ipi, 0xFF, source=ipi.apics[0])


def test_an_id_of_255() -> None:
    """Without the quirk it is an id as any other."""
    machine = Apics([0, 255], x2apic=True, quirk=False, wide=True)

    assert (1, [1]) == send(machine, 0xFF)


@pytest.mark.parametrize(("shorthand", "reached"), [(SELF, [1]), (ALL, [0, 1, 2]), (ALL_BUT_SELF, [0, 2])])
def test_shorthands(shorthand: int, reached: list[int]) -> None:
    """11.6.1: self, all including self, all excluding self; the destination is not looked at."""
    machine = Apics([0, 1, 2])

    assert (len(reached), reached) == send(machine, 0, shorthand=shorthand, source=machine.apics[1])


def test_nobody_else() -> None:
    """All but self of the only one."""
    machine = Apics([0])

    assert NOBODY == send(machine, 0, shorthand=ALL_BUT_SELF, source=machine.apics[0])[0]
    assert {"no local APIC took it": 1} == machine.vm.ledger.statement().dropped


# -- lowest priority


@given(st.integers(16, 255), st.integers(1, 15))
@settings(deadline=None, max_examples=40)
def test_vector_hashing(vector: int, dest: int) -> None:
    """The (vector modulo n)-th of the n that are named."""
    machine = Apics([0, 1, 2, 3])
    machine.set_ldr(1, 2, 4, 8)
    named = [n for n in range(4) if dest >> n & 1]

    assert (1, [named[vector % len(named)]]) == send(machine, dest, logical=True, mode=MODE_LOWEST, vector=vector)


def test_without_hashing_in_turn() -> None:
    """Who was chosen least often."""
    machine = Apics([0, 1], vector_hashing=False)
    machine.set_ldr(1, 2)

    for vector in range(0x41, 0x45):
        send(machine, 3, logical=True, mode=MODE_LOWEST, vector=vector)
    assert [2, 2] == [apic.irr.bit_count() for apic in machine.apics]


def test_a_broadcast_of_lowest_priority() -> None:
    """Physical 0xff goes to all, as a fixed one."""
    machine = Apics([0, 1])

    assert (2, [0, 1]) == send(machine, 0xFF, mode=MODE_LOWEST)


def test_the_redirection_hint_is_lowest_priority() -> None:
    """11.11.1: with RH the message goes to one of those that it names."""
    machine = Apics([0, 1])
    machine.set_ldr(1, 2)

    assert 1 == deliver_msi(machine.bus, ADDRESS | 3 << 12 | 1 << 3 | 1 << 2, 0x42)
    assert [0] == machine.holders(0x42)


# -- MSIs


def test_msi_fields() -> None:
    """11.11: destination 19:12, logical bit 2; vector 7:0, delivery mode 10:8, trigger 15."""
    machine = Apics([0, 1])
    machine.set_ldr(0x10, 0x20)

    assert 1 == deliver_msi(machine.bus, ADDRESS | 0x20 << 12 | 4, 1 << 15 | 1 << 14 | 0x51)
    assert [1] == machine.holders(0x51)
    assert 1 << 0x51 == machine.apics[1].tmr
    assert 1 == deliver_msi(machine.bus, ADDRESS, 4 << 8)
    assert ["NMI"] == machine.vm.vcpus[0].received


@pytest.mark.parametrize(("wide", "reached"), [(True, [1]), (False, [0])])
def test_msi_destinations_of_32_bits(wide: bool, reached: list[int]) -> None:
    """KVM_X2APIC_API_USE_32BIT_IDS: bits 63:40 of the address are bits 31:8 of the destination."""
    machine = Apics([5, 0x105], x2apic=True, wide=wide)

    deliver_msi(machine.bus, 1 << 40 | ADDRESS | 5 << 12, VECTOR)
    assert reached == machine.holders(VECTOR)


@given(st.integers(0, (1 << 64) - 1))
def test_the_destination_of_an_address(address: int) -> None:
    """As struct kvm_msi says: low byte from address_lo, the rest from address_hi where ids have 32 bits."""
    low, high = address & 0xFFFF_FFFF, address >> 32

    assert low >> 12 & 0xFF == apic_bus.msi_destination(address, False)
    assert low >> 12 & 0xFF | high >> 8 << 8 == apic_bus.msi_destination(address, True)


def test_a_shortcut_ends_with_the_map() -> None:
    """A way to one local APIC is lent until ids change; then the next message is looked up."""
    machine = Apics([0, 1])
    lent: list[Any] = []
    sender = apic_bus.MsiSender(machine.bus, ADDRESS | 1 << 12, VECTOR)
    sender.shortcut = lambda accept, vector: lent.append((accept, vector))
    sender()
    accept, vector = lent[0]
    accept(vector + 1)
    assert [1] == machine.holders(VECTOR + 1)
    machine.apics[1].write(ID, 7 << 24)

    assert (None, None) == lent[1]
    machine.check()


# -- against a model ----------------------------------------------------------------------------------------


def named(spec: dict[str, Any], apics: list[dict[str, Any]], quirk: bool) -> list[int]:
    """Who takes a device's fixed message, by asking each what it would do with it (11.6.2)."""
    takers = []
    for index, apic in enumerate(apics):
        dest = spec["dest"]
        everyone = {dest == 0xFFFF_FFFF, dest == 0xFF and quirk} if apic["x2apic"] else {dest == 0xFF}
        if True in everyone:
            match = True
        elif not spec["logical"]:
            match = dest == apic["id"]
        elif apic["x2apic"]:
            match = dest // 65536 == apic["id"] // 16 and bool(dest % 65536 & 2 ** (apic["id"] % 16))
        elif apic["cluster"]:
            match = dest // 16 == apic["ldr"] // 16 and bool(dest % 16 & apic["ldr"] % 16)
        else:
            match = bool(dest & apic["ldr"])
        if match and apic["on"]:
            takers.append(index)
    return takers


APIC = st.fixed_dictionaries(
    {"ldr": st.sampled_from([0, 1, 2, 4, 0x11, 0x12, 0x21, 0x80]), "cluster": st.booleans(), "on": st.booleans()}
)


@given(
    st.lists(APIC, min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.one_of(st.integers(0, 5), st.integers(0, 0xFF), st.sampled_from([0xFF, 0x10001, 0x10003])),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_the_map_finds_who_would_answer(
    apics: list[dict[str, Any]], modes: list[bool], dest: int, logical: bool, quirk: bool, same_mode: bool
) -> None:
    """However destinations are looked up, those take a message that would match it one by one."""
    ids = [0, 1, 2, 0x10, 0x11][: len(apics)]
    modes = [modes[0] if same_mode else mode for mode in modes][: len(apics)]
    machine = Apics(ids, x2apic=modes, enabled=False, quirk=quirk)
    for number, mode, spec, apic in zip(ids, modes, apics, machine.apics, strict=True):
        spec.update(id=number, x2apic=mode)
        if spec["on"]:
            apic.write(SVR, 0x1FF)
        if not mode:
            if any(modes):
                spec["ldr"] = spec["ldr"] or 0x40  # without one: test_an_xapic_without_a_logical_id
            apic.write(LDR, spec["ldr"] << 24)
            apic.write(DFR, CLUSTER if spec["cluster"] else 0xFFFF_FFFF)
    if not all(modes):
        dest &= 0xFF  # more bits say nothing to those in xAPIC mode
    expected = named({"dest": dest, "logical": logical}, apics, quirk)
    status, holders = send(machine, dest, logical=logical)

    assert expected == holders
    assert max(status, 0) == len(expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda apic: apic.write(ID, 9 << 24),
        lambda apic: apic.write(LDR, 4 << 24),
        lambda apic: apic.write(DFR, CLUSTER),
        lambda apic: apic.write(SVR, 0xFF),
        lambda apic: apic.set_base(apic.base | BASE_X2APIC),
        lambda apic: apic.set_base(0),
        lambda apic: apic.reset(init=True),
        lambda apic: apic.set_state(apic.state()[:LDR] + b"\0\0\0\x40" + apic.state()[LDR + 4 :]),
    ],
)
def test_every_change_reaches_the_map(change: Any) -> None:
    """Id, LDR, DFR, SVR, mode, enable, INIT and restored state."""
    machine = Apics([0, 1])
    machine.set_ldr(1, 2)
    send(machine, 0)
    change(machine.apics[1])

    machine.check()
