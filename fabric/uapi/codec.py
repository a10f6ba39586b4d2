"""Declared layouts: C structs and packed words of the KVM interface, one class body a layout.

A struct is written as in the header; the class body is the layout::

    @cstruct
    class KvmIrqLevel(CStruct):
        irq: u32 = 0
        level: u32 = 0

Members have C's natural alignment in the host's byte order, so holes and tail padding need no member; padding
that the header names is a member (callers of a read-modify-write ioctl get theirs back). Structures in guest
memory follow the guest's byte order instead: ``@cstruct(byteorder="<")`` packs tightly in that order, as
those layouts are fully padded by their documents. A union is a byte string that its variant's class unpacks.

Packed words (attribute numbers, table entries) are written with their bit positions::

    @word(32)
    class ArmIrqLine(Word):
        irq_type: Annotated[int, Bits(27, 24)] = 0

Contents: :class:`CStruct`, :func:`cstruct`, :class:`Array`, the member types ``u8`` ... ``s64``,
:class:`Word`, :func:`word`, :class:`Bits`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from struct import Struct, calcsize
from struct import error as struct_error
from typing import (
    Annotated,
    Any,
    ClassVar,
    Self,
    TypeVar,
    cast,
    dataclass_transform,
    get_type_hints,
    overload,
)

import attrs

u8 = Annotated[int, "B"]
u16 = Annotated[int, "H"]
u32 = Annotated[int, "I"]
u64 = Annotated[int, "Q"]
s8 = Annotated[int, "b"]
s32 = Annotated[int, "i"]
s64 = Annotated[int, "q"]

Readable = bytes | bytearray | memoryview
"""What a struct can be unpacked from."""


@attrs.frozen
class Array:
    """A member that is an array: of a scalar (its ``struct`` code) or of a :class:`CStruct`."""

    element: str | type[CStruct]
    count: int


class CStruct:
    """Base of the struct classes; :func:`cstruct` fills in the class attributes."""

    __slots__ = ()

    STRUCT: ClassVar[Struct]
    """The compiled layout. Hot paths unpack with it directly and make no object."""
    SIZE: ClassVar[int]
    """``sizeof``."""
    OFFSETS: ClassVar[dict[str, int]]
    """``offsetof`` of each member."""
    _arrays: ClassVar[tuple[Array | None, ...]]
    _bytes: ClassVar[tuple[tuple[str, int], ...]]
    _flat: ClassVar[bool]
    _values: ClassVar[Callable[[CStruct], tuple[Any, ...]]]

    @classmethod
    def unpack(cls, data: Readable, offset: int = 0) -> Self:
        """Read the struct at ``offset``; what follows is ignored. ``ValueError`` when data is too short."""
        try:
            values = cls.STRUCT.unpack_from(data, offset)
        except struct_error:
            raise ValueError(f"{cls.__name__} must have {cls.SIZE} bytes, not {max(len(data) - offset, 0)}") from None
        return cls(*values) if cls._flat else cls._gather(iter(values))

    def pack(self) -> bytes:
        """The struct's bytes, short byte members zero-filled. ``ValueError`` when a value does not fit."""
        for name, size in self._bytes:
            if (length := len(getattr(self, name))) > size:
                raise ValueError(f"{type(self).__name__}.{name} must have at most {size} bytes, not {length}")
        values = type(self)._values(self)
        try:
            return self.STRUCT.pack(*(values if self._flat else self._scatter(values)))
        except struct_error as error:
            raise ValueError(f"{self!r} does not fit its layout: {error}") from None

    def with_(self, **changes: Any) -> Self:
        """A copy with some members changed."""
        return attrs.evolve(self, **changes)  # type: ignore[misc]  # an attrs class, by cstruct

    def members(self) -> dict[str, Any]:
        """The members by name."""
        return {name: getattr(self, name) for name in self.OFFSETS}

    @classmethod
    def _gather(cls, scalars: Iterator[Any]) -> Self:
        """Group the flat scalars into members."""
        members: list[Any] = []
        for array in cls._arrays:
            if array is None:
                members.append(next(scalars))
            elif isinstance(array.element, str):
                members.append(tuple(next(scalars) for _ in range(array.count)))
            else:
                members.append(tuple(array.element._gather(scalars) for _ in range(array.count)))
        return cls(*members)

    def _scatter(self, members: tuple[Any, ...]) -> Iterator[Any]:
        """Flatten members into scalars; an array must have exactly its length."""
        for array, member in zip(self._arrays, members, strict=True):
            if array is None:
                yield member
                continue
            if len(member) != array.count:
                raise ValueError(
                    f"an array of {type(self).__name__} must have {array.count} elements, not {len(member)}"
                )
            for element in member:
                if isinstance(element, CStruct):
                    yield from element._scatter(type(element)._values(element))
                else:
                    yield element


def _code(member: str | Array) -> str:
    """The ``struct`` code of a member, aligned at both ends when it is made of structs."""
    if isinstance(member, str):
        return member
    if isinstance(member.element, str):
        return f"{member.count}{member.element}"
    inner = member.element.STRUCT.format.lstrip("@<>=")
    return member.count * f"0{_widest(inner)}{inner}"


def _widest(codes: str) -> str:
    """The scalar code with the strictest alignment; zero of it aligns what comes next."""
    return max(("B", *(c for c in codes if c in "BHIQbiq")), key=calcsize)


_S = TypeVar("_S", bound=CStruct)


@overload
def cstruct(cls: type[_S], /) -> type[_S]: ...
@overload
def cstruct(*, byteorder: str) -> Callable[[type[_S]], type[_S]]: ...


@dataclass_transform(frozen_default=True)
def cstruct(cls: type[_S] | None = None, /, *, byteorder: str = "@") -> Any:
    """Make a frozen, slotted attrs class of a struct declaration.

    Args:
        byteorder: ``"@"``, the host's byte order with C alignment, or ``"<"`` or ``">"`` for a tightly packed
            structure in guest memory.
    """
    if cls is None:
        return lambda cls: _make_struct(cls, byteorder)
    return _make_struct(cls, byteorder)


def _make_struct(cls: type[_S], order: str) -> type[_S]:
    cls = attrs.frozen(cls)
    hints = get_type_hints(cls, include_extras=True)
    names = [a.name for a in attrs.fields(cast("Any", cls))]
    members: list[str | Array] = [hints[name].__metadata__[0] for name in names]
    codes, offsets = "", {}
    for name, member in zip(names, members, strict=True):
        code = _code(member)
        # A zero-length scalar of the member's own kind pads up to where the member starts.
        offsets[name] = calcsize(f"{order}{codes}0{_widest(code)}")
        codes += code
    tail = f"0{_widest(codes)}" if order == "@" else ""
    cls.STRUCT = Struct(f"{order}{codes}{tail}")
    cls.SIZE = cls.STRUCT.size
    cls.OFFSETS = offsets
    cls._arrays = tuple(m if isinstance(m, Array) else None for m in members)
    cls._bytes = tuple(
        (n, calcsize(m)) for n, m in zip(names, members, strict=True) if isinstance(m, str) and m[-1] == "s"
    )
    cls._flat = not any(cls._arrays)
    getter = attrgetter(*names)
    cls._values = staticmethod(getter if len(names) > 1 else lambda self: (getter(self),))
    return cls


@attrs.frozen
class Bits:
    """The bits ``hi`` down to ``lo``, both inclusive, of a packed word."""

    hi: int
    lo: int

    @property
    def mask(self) -> int:
        """All ones in the field's place."""
        return (2 << self.hi) - (1 << self.lo)


class Word:
    """Base of the packed words; :func:`word` fills in the class attributes."""

    __slots__ = ()

    WIDTH: ClassVar[int]
    """Bits in the word."""
    FIELDS: ClassVar[dict[str, Bits]]
    """Where each field is. Bits in no field are zero when packed and ignored when unpacked."""

    @classmethod
    def unpack(cls, value: int) -> Self:
        """Take a word apart. ``ValueError`` when it is wider than the layout."""
        if value >> cls.WIDTH:
            raise ValueError(f"{cls.__name__} must be an unsigned {cls.WIDTH}-bit value, not {value:#x}")
        return cls(*((value & bits.mask) >> bits.lo for bits in cls.FIELDS.values()))

    def pack(self) -> int:
        """Put the word together. ``ValueError`` when a field does not hold its value."""
        packed = 0
        for name, bits in self.FIELDS.items():
            value = getattr(self, name)
            if not 0 <= value << bits.lo <= bits.mask:
                raise ValueError(f"{type(self).__name__}.{name} must fit {bits.hi - bits.lo + 1} bits, not {value:#x}")
            packed |= value << bits.lo
        return packed


_W = TypeVar("_W", bound=Word)


@dataclass_transform(frozen_default=True)
def word(width: int) -> Callable[[type[_W]], type[_W]]:
    """Make a frozen, slotted attrs class of a packed word's declaration; fields may not overlap."""

    def make(cls: type[_W]) -> type[_W]:
        cls = attrs.frozen(cls)
        hints = get_type_hints(cls, include_extras=True)
        cls.WIDTH = width
        cls.FIELDS = {a.name: hints[a.name].__metadata__[0] for a in attrs.fields(cast("Any", cls))}
        taken = 0
        for name, bits in cls.FIELDS.items():
            if taken & bits.mask or bits.hi >= width or bits.lo > bits.hi:
                raise ValueError(f"{cls.__name__}.{name} must have free bits of {width}, not {bits.hi}:{bits.lo}")
            taken |= bits.mask
        return cls

    return make
