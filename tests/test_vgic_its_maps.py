"""The maps of an ITS device: events by id in lists or dicts."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fabric.devices.arm.vgic_irq import VgicIrq
from fabric.devices.arm.vgic_its_maps import Collection, ItsDevice

HERE = Collection(1, 0)


def test_repr_shows_what_it_is() -> None:
    """A collection says where it goes, a device how much it holds."""
    assert "<Collection 1 -> 0>" == repr(HERE)
    assert "<Collection 2 -> ->" == repr(Collection(2))
    assert "<ItsDevice 0x10, 5 bits, 0 events>" == repr(ItsDevice(0x10, 5, 0))


def test_dense_ids_are_lists() -> None:
    """Ids given out from 0 up cost two list slots each."""
    device = ItsDevice(1, 16, 0)
    for eventid in range(1000):
        device.map(eventid, VgicIrq(8192 + eventid, None), HERE)

    assert list is type(device.irqs)
    assert 1000 == len(device.irqs)


def test_a_single_high_id_costs_no_table() -> None:
    """One event at the end of the range does not allocate the range."""
    device = ItsDevice(1, 16, 0)
    device.map(65535, VgicIrq(8192, None), HERE)

    assert dict is type(device.irqs)


def test_descending_ids_end_as_lists() -> None:
    """Ids that turn out to be dense are gathered into lists."""
    device = ItsDevice(1, 16, 0)
    for eventid in reversed(range(4096)):
        device.map(eventid, VgicIrq(8192 + eventid, None), HERE)

    assert list is type(device.irqs)
    assert list(range(4096)) == [eventid for eventid, _, _ in device.events()]


def test_detaching_takes_one_collection_away() -> None:
    """Events of another collection keep theirs."""
    device = ItsDevice(1, 5, 0)
    other = Collection(2, 0)
    device.map(0, VgicIrq(8192, None), HERE)
    device.map(1, VgicIrq(8193, None), other)
    device.detach(HERE)

    assert [None, other] == [collection for _, _, collection in device.events()]


ids = st.one_of(st.integers(0, 40), st.integers(0, 4000))


@given(st.lists(st.tuples(st.booleans(), ids), max_size=120))
def test_a_device_is_a_sorted_map(steps: list[tuple[bool, int]]) -> None:
    """Whatever the representation, a device behaves as a dict that is iterated in order."""
    device = ItsDevice(1, 12, 0)
    model: dict[int, Any] = {}
    for add, eventid in steps:
        if not add and eventid in model:
            assert model.pop(eventid) is device.unmap(eventid)
        elif add and eventid not in model:
            model[eventid] = VgicIrq(8192 + eventid, None)
            device.map(eventid, model[eventid], HERE)
        assert model.get(eventid) is device.event(eventid)
    device._check()

    assert sorted(model.items()) == [(eventid, irq) for eventid, irq, _ in device.events()]
