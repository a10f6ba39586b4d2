"""Attributes as tables: what KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR and KVM_HAS_DEVICE_ATTR do.

One engine for every object that has attributes, whether a device, a VM or a vCPU. Such an object has a class
attribute ``attributes: ClassVar[AttrTable]``; the table has a :class:`Group` for each group number and an
:class:`Attr` for each attribute, or one for a whole family whose number is an encoding (a register offset, an
interrupt number). The KVM layer calls :meth:`AttrTable.dispatch` and knows no attribute by name.

A handler gets the pointer, not the value, because *when* the kernel touches user memory shows: EFAULT comes
before some errors and after others. It raises :class:`~fabric.errors.KvmError`, and only with an errno that
its row lists.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs

from fabric.errors import KvmError

if TYPE_CHECKING:
    from fabric.uapi.usermem import BufferPointer, UserPointer

    Pointer: TypeAlias = UserPointer | BufferPointer
else:
    Pointer = Any

Op: TypeAlias = Literal["set", "get", "has"]
Access: TypeAlias = "Callable[[Any, int, Pointer], int | None]"
"""``(owner, attribute number, pointer)``; the ioctl returns the result, None being 0."""
Test: TypeAlias = "Callable[[Any, int], None]"
"""``(owner, attribute number)``; returns if the attribute exists, else raises."""


@attrs.frozen
class Attr:
    """One attribute, or a family of them.

    Attributes:
        id: the row of the interface inventory that says what is promised, such as ``vgic-v3.addr.dist``.
        name: as in the header; of a family, what it encodes.
        number: the attribute number; None for a family, which takes every number not otherwise in its group.
        type: what the pointer points to: ``none``, ``u8``, ``u32``, ``s32``, ``u64``, ``struct``, ``buffer``.
        set, get: what the two ioctls do; None where there is no such access.
        has: what decides existence where it is not enough to be in the table.
        errors: every errno that the handlers may raise, except for access that the row does not have.
    """

    id: str
    name: str
    number: int | None = attrs.field(default=None, kw_only=True)
    type: str = attrs.field(default="none", kw_only=True)
    set: Access | None = attrs.field(default=None, kw_only=True)
    get: Access | None = attrs.field(default=None, kw_only=True)
    has: Test | None = attrs.field(default=None, kw_only=True)
    errors: tuple[int, ...] = attrs.field(default=(), kw_only=True)


@attrs.frozen
class Group:
    """The attributes that share a group number. ``name`` is the macro of the header."""

    number: int
    name: str
    attrs: tuple[Attr, ...]

    def __attrs_post_init__(self) -> None:
        numbers = [row.number for row in self.attrs]
        for number in numbers:
            if numbers.count(number) > 1:
                raise ValueError(f"{self.name}: attribute {number} must be in the table once, not twice")


class AttrTable:
    """All attributes of one kind of object.

    Args:
        groups: in any order, each number once.
        unknown_set, unknown_get, unknown_has: the errno for a group or attribute that is not in the table,
            and for access that a row does not have.
    """

    def __init__(
        self,
        groups: Sequence[Group] = (),
        *,
        unknown_set: int = errno.ENXIO,
        unknown_get: int = errno.ENXIO,
        unknown_has: int = errno.ENXIO,
    ) -> None:
        self.groups = tuple(groups)
        self.unknown: dict[Op, int] = {"set": unknown_set, "get": unknown_get, "has": unknown_has}
        self._rows: dict[tuple[int, int | None], Attr] = {}
        for group in groups:
            for row in group.attrs:
                if (group.number, row.number) in self._rows:
                    raise ValueError(f"group {group.number} must be in the table once, not again as {group.name}")
                self._rows[group.number, row.number] = row

    def rows(self) -> Iterator[tuple[Group, Attr]]:
        """Every attribute with its group, in table order."""
        for group in self.groups:
            for row in group.attrs:
                yield group, row

    def find(self, group: int, attr: int) -> Attr | None:
        """The row for an attribute, or None."""
        return self._rows.get((group, attr)) or self._rows.get((group, None))

    def dispatch(self, owner: Any, op: Op, group: int, attr: int, ptr: Pointer) -> int:
        """Carry out one ioctl on ``owner``, and return what it returns.

        Args:
            op: ``set``, ``get`` or ``has``; the last does not touch ``ptr``.
            group, attr: the fields of struct kvm_device_attr.
            ptr: where its ``addr`` points to.

        Raises:
            KvmError: with the errno of the table for what is not in it, else one that the row lists.
        """
        row = self.find(group, attr)
        if row is None:
            raise KvmError(self.unknown[op], f"there is no attribute {attr:#x} in group {group}")
        if op == "has":
            if row.has is not None:
                row.has(owner, attr)
            return 0
        access = row.set if op == "set" else row.get
        if access is None:
            raise KvmError(self.unknown[op], f"{row.name} cannot be {'written' if op == 'set' else 'read'}")
        return access(owner, attr, ptr) or 0
