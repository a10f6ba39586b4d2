"""The attribute engine: groups and attributes as tables."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from gic_machine import refusal

from fabric.devices.attributes import Attr, AttrTable, Group, Pointer
from fabric.errors import KvmError
from fabric.uapi.usermem import BufferPointer


class Thing:
    """An object with attributes."""

    value = 7


def _set(thing: Any, attr: int, ptr: Pointer) -> None:
    thing.value = ptr.u32() + attr


def _get(thing: Any, attr: int, ptr: Pointer) -> None:
    ptr.put_u32(thing.value + attr)


def _count(_thing: Any, _attr: int, _ptr: Pointer) -> int:
    return 3


def _even(_thing: Any, attr: int) -> None:
    if attr % 2:
        raise KvmError(errno.ENXIO, f"attribute {attr} is odd")


TABLE = AttrTable(
    (
        Group(1, "ONE", (Attr("t.value", "VALUE", number=5, type="u32", set=_set, get=_get),)),
        Group(
            2,
            "TWO",
            (Attr("t.all", "ALL", number=0, get=_count), Attr("t.family", "a number", get=_get, has=_even)),
        ),
    ),
    unknown_get=errno.EPERM,
    unknown_set=errno.EINVAL,
)


def test_set_and_get_reach_the_handler_with_owner_number_and_pointer() -> None:
    """The handler does the work, on the object whose fd it is."""
    thing = Thing()
    data = bytearray((37).to_bytes(4, "little"))

    assert 0 == TABLE.dispatch(thing, "set", 1, 5, BufferPointer(data))
    assert 42 == thing.value
    assert 0 == TABLE.dispatch(thing, "get", 1, 5, BufferPointer(data))
    assert 47 == int.from_bytes(data, "little")


def test_what_a_handler_returns_is_what_the_ioctl_returns() -> None:
    """Some attributes answer with a count."""
    assert 3 == TABLE.dispatch(Thing(), "get", 2, 0, BufferPointer(bytearray()))


def test_a_family_takes_every_number_that_has_no_row_of_its_own() -> None:
    """The attribute number is then an argument."""
    data = bytearray(4)

    TABLE.dispatch(Thing(), "get", 2, 100, BufferPointer(data))

    assert 107 == int.from_bytes(data, "little")


@pytest.mark.parametrize(
    ("op", "group", "attr", "code"),
    [
        pytest.param("set", 1, 6, errno.EINVAL, id="set-unknown-attribute"),
        pytest.param("get", 1, 6, errno.EPERM, id="get-unknown-attribute"),
        pytest.param("has", 1, 6, errno.ENXIO, id="has-unknown-attribute"),
        pytest.param("set", 9, 0, errno.EINVAL, id="set-unknown-group"),
        pytest.param("has", 9, 0, errno.ENXIO, id="has-unknown-group"),
        pytest.param("set", 2, 0, errno.EINVAL, id="set-of-read-only"),
        pytest.param("has", 2, 3, errno.ENXIO, id="has-test-refuses"),
        pytest.param("has", 2, 4, 0, id="has-test-passes"),
        pytest.param("has", 1, 5, 0, id="has-row"),
    ],
)
def test_what_is_not_there_is_answered_by_the_table(op: Any, group: int, attr: int, code: int) -> None:
    """The errno for the unknown belongs to the table, and may differ by ioctl."""
    assert code == refusal(TABLE.dispatch, Thing(), op, group, attr, BufferPointer(bytearray()))


def test_has_does_not_touch_the_pointer() -> None:
    """KVM_HAS_DEVICE_ATTR ignores the address."""
    assert 0 == TABLE.dispatch(Thing(), "has", 1, 5, None)  # type: ignore[arg-type]


def test_a_number_twice_in_a_group_is_a_mistake() -> None:
    """Found when the table is made."""
    with pytest.raises(ValueError, match="attribute 5 must be in the table once"):
        Group(1, "ONE", (Attr("a", "A", number=5), Attr("b", "B", number=5)))


def test_a_group_twice_in_a_table_is_a_mistake() -> None:
    """Found when the table is made."""
    row = Attr("a", "A", number=5)

    with pytest.raises(ValueError, match="group 1 must be in the table once"):
        AttrTable((Group(1, "ONE", (row,)), Group(1, "ONE_AGAIN", (row,))))
