"""What a workload asks of a guest's interrupt-controller driver, on whatever board.

An operating system hides the interrupt controller behind such an interface; so do we. One driver object serves
the whole guest. Handlers are ``async def handler(cpu)`` and run with interrupts masked, like a hard interrupt
handler; the driver acknowledges before and ends after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import attrs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Handler = Callable[[Any], Awaitable[object]]

IPI_KINDS = 8
"""Kinds of IPI that can be told apart on every board (on arm64 SGIs 0 to 7: the others are the secure world's)."""


@attrs.frozen
class MsiMessage:
    """What a device has to write, and where, to raise one of its vectors."""

    address: int
    data: int
    devid: int


@attrs.frozen
class Vector:
    """One interrupt of a device as its guest driver wants it."""

    cpu: int
    """Number of the CPU that takes it."""
    handler: Handler
    label: str
    """What it is called in reports, such as ``virtio1-req.0``."""
    priority: int = 0xA0
    """0 (most urgent) to 0xf0, where the controller has priorities."""


class Pages:
    """A bump allocator over the guest memory that firmware left to the driver."""

    def __init__(self, base: int, size: int) -> None:
        self._next = base
        self._end = base + size

    def take(self, size: int, align: int = 4096) -> int:
        """The address of ``size`` bytes, aligned; MemoryError when there are no more."""
        base = -(-self._next // align) * align
        if base + size > self._end:
            raise MemoryError(f"the guest's interrupt driver has no {size} bytes left below {self._end:#x}")
        self._next = base + size
        return base


class InterruptDriver(Protocol):
    """The interrupt side of a guest operating system."""

    async def start(self, cpu: Any) -> None:
        """Once, on the boot CPU: bring up the controller for the whole machine."""
        ...

    async def start_cpu(self, cpu: Any) -> None:
        """On every CPU, the boot CPU too, after :meth:`start`: enable its interface; interrupts stay masked."""
        ...

    async def allocate_msi(self, cpu: Any, devid: int, vectors: Sequence[Vector]) -> list[MsiMessage]:
        """The messages by which device ``devid`` raises ``vectors``; called once a device."""
        ...

    def on_ipi(self, handler: Handler, kind: int = 0, label: str = "IPI") -> None:
        """Have ``handler`` run on a CPU that gets an IPI of that kind (0 to :data:`IPI_KINDS` - 1)."""
        ...

    async def send_ipi(self, cpu: Any, target: int, kind: int = 0) -> None:
        """Interrupt CPU number ``target``. IPIs of one kind merge while one is pending; those of two do not.

        Whether those of two senders do is the controller's: on a GICv2 they do not.
        """
        ...

    async def set_timer(self, cpu: Any, at_ns: int, handler: Handler) -> None:
        """Have ``handler`` run on this CPU at ``at_ns``, once, from the CPU's timer; a later call replaces it."""
        ...

    async def handle(self, cpu: Any) -> None:
        """The interrupt vector."""
        ...

    def label(self, number: int, cpu: int) -> str:
        """What the interrupt with the controller's ``number`` is on CPU number ``cpu``, for reports."""
        ...
