"""Register blocks as tables: one row a register, and every way in reads the same rows.

A :class:`RegisterBlock` is a frame of registers in offset order. Its rows say for each register where it is, what
an access does (:class:`Access`), and with which widths it may be made. A row has two views: the guest's, and that
of userspace through device attributes, which is the guest's where a row does not say otherwise (``GICD_ICPENDR``
is write-one-to-clear for the guest, and neither readable nor writable for save and restore).

Two kinds of row:

* :class:`Register`: one register of ``length`` bytes. Its functions see the whole value; a narrower access is cut
  out of it, and a narrower write merged into it.
* :class:`IrqArray`: a field of ``bits`` bits for each interrupt, from 0 up. Its functions see one interrupt and
  the value of its field.

What a device knows of and does not model is a row as well, with ``modelled=False``.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import attrs


class Access(enum.Enum):
    """What reading and writing a register does."""

    RW = "RW"
    """Reads the value, writes it."""
    RO = "RO"
    """Reads the value, ignores writes."""
    WO = "WO"
    """Reads zero; a write that includes the lowest byte is a command."""
    W1S = "W1S"
    """Reads the state; ones written set it, zeros do nothing."""
    W1C = "W1C"
    """Reads the state; ones written clear it, zeros do nothing."""
    RAZ_WI = "RAZ/WI"
    """Reads zero, ignores writes."""
    RAO_WI = "RAO/WI"
    """Reads all ones, ignores writes."""
    ABSENT = "-"
    """Not there for this side: as RAZ/WI, and it cannot be named."""


READABLE = frozenset({Access.RW, Access.RO, Access.W1S, Access.W1C})
WRITABLE = frozenset({Access.RW, Access.WO, Access.W1S, Access.W1C})

Read: TypeAlias = Callable[[Any], int]
"""``(owner)`` to the whole value."""
Write: TypeAlias = Callable[[Any, int], None]
"""``(owner, value)``: the whole value, or (W1S, W1C) the ones written."""
ReadIrq: TypeAlias = Callable[[Any, Any], int]
"""``(owner, irq)`` to the value of its field."""
WriteIrq: TypeAlias = Callable[[Any, Any, int], None]
"""``(owner, irq, value)``; with W1S and W1C called for ones only."""


@attrs.frozen(kw_only=True)
class View:
    """How one side sees a register: the access, and the functions where the row's own do not serve."""

    access: Access
    read: Callable[..., int] | None = None
    write: Callable[..., None] | None = None


@attrs.frozen
class Register:
    """One register.

    Attributes:
        offset, name: where it is and what the architecture calls it.
        length: in bytes.
        access: what the guest can do.
        read, write: how; a constant ``value`` serves instead of ``read``.
        stored: what a write of a part is merged with, where that is not what is read (fields that read as zero).
        widths: access sizes in bytes that the guest may use, each aligned to itself.
        user: what userspace sees, when that is something else.
        id: the row of the interface inventory.
        modelled: False for a register that is known and has no effect here.
    """

    offset: int
    name: str
    access: Access
    read: Read | None = attrs.field(default=None, kw_only=True)
    write: Write | None = attrs.field(default=None, kw_only=True)
    stored: Read | None = attrs.field(default=None, kw_only=True)
    value: int = attrs.field(default=0, kw_only=True)
    length: int = attrs.field(default=4, kw_only=True)
    widths: tuple[int, ...] = attrs.field(default=(4,), kw_only=True)
    user: View | None = attrs.field(default=None, kw_only=True)
    id: str = attrs.field(default="", kw_only=True)
    modelled: bool = attrs.field(default=True, kw_only=True)

    def load(self, owner: Any, view: View, start: int, size: int) -> int:
        """``size`` bytes from byte ``start`` of the register."""
        ones = (1 << 8 * size) - 1
        if view.access not in READABLE:
            return ones if view.access is Access.RAO_WI else 0
        whole = view.read(owner) if view.read is not None else self.value
        return whole >> 8 * start & ones

    def store(self, owner: Any, view: View, start: int, size: int, value: int) -> None:
        """Write ``size`` bytes from byte ``start`` on."""
        if view.access not in WRITABLE or view.write is None or (view.access is Access.WO and start):
            return
        ones = (1 << 8 * size) - 1
        shift = 8 * start
        value = (value & ones) << shift
        stored = self.stored or view.read
        if view.access is Access.RW and size < self.length and stored is not None:
            value |= stored(owner) & ~(ones << shift)
        view.write(owner, value)

    def reaches(self, _block: RegisterBlock, _owner: Any, _start: int) -> bool:
        """Whether that byte of the row exists for this owner."""
        return True


@attrs.frozen
class IrqArray:
    """A field for each interrupt, packed from interrupt 0 up; attributes as of :class:`Register`.

    Interrupts that the owner does not have, or not here, read zero and ignore writes.
    """

    offset: int
    name: str
    access: Access
    bits: int
    read: ReadIrq | None = attrs.field(default=None, kw_only=True)
    write: WriteIrq | None = attrs.field(default=None, kw_only=True)
    count: int = attrs.field(default=1024, kw_only=True)
    widths: tuple[int, ...] = attrs.field(default=(4,), kw_only=True)
    user: View | None = attrs.field(default=None, kw_only=True)
    id: str = attrs.field(default="", kw_only=True)
    modelled: bool = attrs.field(default=True, kw_only=True)

    @property
    def length(self) -> int:
        """In bytes."""
        return self.count * self.bits // 8

    def _fields(self, owner: Any, start: int, size: int) -> Iterator[tuple[Any, int]]:
        """The interrupts that an access covers, each with the position of its field in the value."""
        first = start * 8 // self.bits
        for n in range(max(1, size * 8 // self.bits)):
            irq = owner.register_irq(first + n)
            if irq is not None:
                yield irq, n * self.bits

    def load(self, owner: Any, view: View, start: int, size: int) -> int:
        """``size`` bytes from byte ``start`` of the array."""
        if view.access not in READABLE or view.read is None:
            return (1 << 8 * size) - 1 if view.access is Access.RAO_WI else 0
        value = 0
        for irq, position in self._fields(owner, start, size):
            value |= view.read(owner, irq) << position
        if self.bits > 8 * size:
            value >>= start * 8 % self.bits
        return value & (1 << 8 * size) - 1

    def store(self, owner: Any, view: View, start: int, size: int, value: int) -> None:
        """Write ``size`` bytes from byte ``start`` on."""
        if view.access not in WRITABLE or view.write is None:
            return
        field = (1 << self.bits) - 1
        if self.bits > 8 * size:
            shift = start * 8 % self.bits
            for irq, _ in self._fields(owner, start, size):
                kept = view.read(owner, irq) if view.read is not None else 0
                ones = (1 << 8 * size) - 1
                view.write(owner, irq, kept & ~(ones << shift) | (value & ones) << shift)
        elif view.access is Access.RW:
            for irq, position in self._fields(owner, start, size):
                view.write(owner, irq, value >> position & field)
        else:
            for irq, position in self._fields(owner, start, size):
                if value >> position & field:
                    view.write(owner, irq, value >> position & field)

    def reaches(self, block: RegisterBlock, owner: Any, start: int) -> bool:
        """Whether the interrupt of that byte exists for this owner."""
        return start * 8 // self.bits < block.irq_limit(owner)


Row: TypeAlias = Register | IrqArray


class RegisterBlock:
    """A frame of registers.

    Args:
        name: of the frame, for messages and documentation.
        size: in bytes.
        rows: in offset order; overlap, disorder and rows beyond the frame are ValueErrors.
        irq_limit: ``(owner)`` to how many interrupts its :class:`IrqArray` rows reach, for those that have any.
            The owner then has ``register_irq(n)``, the interrupt or None.

    What is not there, or not with that width and alignment, reads zero and ignores writes.
    """

    def __init__(
        self, name: str, size: int, rows: Sequence[Row], *, irq_limit: Callable[[Any], int] | None = None
    ) -> None:
        end = 0
        for row in rows:
            if row.offset < end:
                raise ValueError(f"{name}: {row.name} must begin at {end:#x} or later, not at {row.offset:#x}")
            end = row.offset + row.length
        if end > size:
            raise ValueError(f"{name}: rows must end by {size:#x}, not at {end:#x}")
        self.name = name
        self.size = size
        self.rows = tuple(rows)
        self.irq_limit: Callable[[Any], int] = irq_limit or (lambda _owner: 0)
        self._starts = [row.offset for row in rows]
        self._guest = [View(access=row.access, read=row.read, write=row.write) for row in rows]
        self._user = [
            guest
            if row.user is None
            else View(access=row.user.access, read=row.user.read or guest.read, write=row.user.write or guest.write)
            for row, guest in zip(rows, self._guest, strict=True)
        ]

    def _locate(self, offset: int) -> int:
        """Index of the row at ``offset``, or -1."""
        index = bisect_right(self._starts, offset) - 1
        if index >= 0:
            row = self.rows[index]
            if offset >= row.offset + row.length:
                return -1
        return index

    def find(self, offset: int) -> Row | None:
        """The row that ``offset`` lies in, or None."""
        index = self._locate(offset)
        return None if index < 0 else self.rows[index]

    def read(self, owner: Any, offset: int, size: int) -> int:
        """What the guest reads."""
        index = self._accessible(owner, offset, size)
        if index < 0:
            return 0
        row = self.rows[index]
        return row.load(owner, self._guest[index], offset - row.offset, size)

    def write(self, owner: Any, offset: int, size: int, value: int) -> None:
        """What a write of the guest does."""
        index = self._accessible(owner, offset, size)
        if index >= 0:
            row = self.rows[index]
            row.store(owner, self._guest[index], offset - row.offset, size, value)

    def user_read(self, owner: Any, offset: int, size: int = 4) -> int:
        """What userspace reads."""
        index = self._locate(offset)
        if index < 0 or offset % size or not self.rows[index].reaches(self, owner, offset - self._starts[index]):
            return 0
        row = self.rows[index]
        return row.load(owner, self._user[index], offset - row.offset, size)

    def user_write(self, owner: Any, offset: int, value: int, size: int = 4) -> None:
        """What a write of userspace does."""
        index = self._locate(offset)
        if index >= 0 and not offset % size:
            row = self.rows[index]
            if row.reaches(self, owner, offset - row.offset):
                row.store(owner, self._user[index], offset - row.offset, size, value)

    def has(self, owner: Any, offset: int, size: int = 4) -> bool:
        """Whether userspace can name that register."""
        index = self._locate(offset)
        if index < 0 or offset % size or self._user[index].access is Access.ABSENT:
            return False
        return self.rows[index].reaches(self, owner, offset - self._starts[index])

    def _accessible(self, owner: Any, offset: int, size: int) -> int:
        """Index of the row if the guest may make that access, else -1."""
        index = self._locate(offset)
        if index < 0:
            return -1
        row = self.rows[index]
        start = offset - row.offset
        if size not in row.widths or offset % size or start + size > row.length:
            return -1
        return index if row.reaches(self, owner, start) else -1
