"""Ioctl tables: a row for each request that a kind of fd knows, with what its argument is and who answers.

An argument is a number, or points to a struct; :func:`handlers` puts the decoding of the argument in front of
each row's handler, once, so that a call goes through one dict lookup and two function calls. What the handler
gets, after the file, depends on the row's ``arg``:

=================== ============================================================================================
``VALUE``           the argument as an unsigned 64-bit number
``Members(Struct)`` the members of the struct, one parameter each; the cheapest for frequent calls
a struct class      the struct
``POINTER``         the pointer, for calls that read and write, or whose argument has a variable length
=================== ============================================================================================

The struct is read before the handler runs: EFAULT comes first, as in the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import error as struct_error
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs

from fabric.uapi.usermem import BufferPointer, UserPointer

if TYPE_CHECKING:
    from fabric.uapi.codec import CStruct

Pointer: TypeAlias = "BufferPointer | UserPointer"
Handler: TypeAlias = "Callable[[Any, Any], int]"
"""``(file, argument)`` as the caller gave it: an int, or a writable buffer."""
Handlers: TypeAlias = dict[int, Handler]

MASK64: Final = (1 << 64) - 1

BUFFER_ADDRESS: Final = 0x7FFF_0000_0000
"""What a request sees that takes a number and is given a buffer: some address."""


class _Kind:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


VALUE: Final = _Kind("VALUE")
POINTER: Final = _Kind("POINTER")


@attrs.frozen
class Members:
    """The argument points to ``struct``, whose members become the handler's parameters."""

    struct: type[CStruct]


@attrs.frozen
class Ioctl:
    """A request: its number, what its argument is, and the handler ``(file, ...)``, whose None means 0.

    ``id`` is the row of the interface inventory that says what is promised, where there is one.
    """

    request: int
    arg: _Kind | Members | type[CStruct]
    handler: Callable[..., int | None]
    id: str = ""


def handlers(*tables: Sequence[Ioctl], guard: Callable[[Any], None] | None = None) -> Handlers:
    """The rows of all ``tables`` by request number; of two for one request the later table's counts.

    ``guard(file)``, if given, is called before anything else and may raise.
    """
    found: Handlers = {}
    for table in tables:
        numbers = [row.request for row in table]
        for row in table:
            if numbers.count(row.request) > 1:
                raise ValueError(f"request {row.request:#x} must be in a table once")
            handler = _decoding(row)
            found[row.request] = handler if guard is None else _guarded(guard, handler)
    return found


def pointer(file: Any, arg: Any) -> Pointer:
    """The argument as pointer: a buffer is user memory of exactly its length, an int a user address."""
    if type(arg) is int or isinstance(arg, int):
        return UserPointer(file.kvm.user_memory, arg & MASK64)
    return BufferPointer(arg)


def _guarded(guard: Callable[[Any], None], handler: Handler) -> Handler:
    def call(file: Any, arg: Any) -> int:
        guard(file)
        return handler(file, arg)

    return call


def _decoding(row: Ioctl) -> Handler:
    handler = row.handler
    if row.arg is VALUE:

        def by_value(file: Any, arg: Any) -> int:
            return handler(file, arg & MASK64 if isinstance(arg, int) else BUFFER_ADDRESS) or 0

        return by_value
    if row.arg is POINTER:

        def by_pointer(file: Any, arg: Any) -> int:
            return handler(file, pointer(file, arg)) or 0

        return by_pointer
    if isinstance(row.arg, Members):
        struct = row.arg.struct
        unpack_from, size = struct.STRUCT.unpack_from, struct.SIZE

        def by_members(file: Any, arg: Any) -> int:
            if type(arg) is bytearray:
                try:
                    members = unpack_from(arg)
                except struct_error:
                    members = unpack_from(pointer(file, arg).read(size))  # too short: EFAULT
            else:
                members = unpack_from(pointer(file, arg).read(size))
            return handler(file, *members) or 0

        return by_members
    assert isinstance(row.arg, type)
    whole = row.arg

    def by_struct(file: Any, arg: Any) -> int:
        return handler(file, whole.unpack(pointer(file, arg).read(whole.SIZE))) or 0

    return by_struct
