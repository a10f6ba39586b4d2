"""A guest on its way from one vCPU to another.

A guest program is a suspended coroutine: that is what stands here for the registers of a CPU and for the code and
data they point to. So it moves as an object, and all that the KVM interface hands out as numbers (interrupt
controller, timers, guest memory) moves as numbers, see :mod:`fabric.migration`.

Between two KVM_RUNs a guest stands in one of four places: before its first instruction; in an access that exited and
was completed; where EINTR took it off the CPU; or, when the task of its KVM_RUN was cancelled, in the middle of a
wait. Out of the last :meth:`fabric.vcpu.vcpu.Vcpu.unload` steps it to where EINTR would have, so that no frame of it
that stands still has seen half of one CPU and half of another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fabric.vcpu.cpu import Cpu

    Program = Callable[[Any], Awaitable[object]]


@attrs.define(eq=False)
class Guest:
    """What ``kvm.unload(fd)`` takes out of a vCPU and ``kvm.load(fd, guest)`` puts into another.

    It can be loaded once: there is one suspended program, not a copy of it.
    """

    program: Program
    """What a vCPU runs when it is powered on."""
    cpu_class: type[Cpu]
    """The architecture."""
    coroutine: Any = None
    """The program, suspended; None when it has not begun."""
    cpu: Any = None
    """The :class:`~fabric.vcpu.cpu.Cpu` it knows: PSTATE and the exception vector are in it."""
    result: Any = None
    """What the access that exited gets."""
    abort: Exception | None = None
    """What that access raises instead."""
    owed_ns: int = 0
    """CPU time it has still to pay for what it did."""

    @property
    def begun(self) -> bool:
        """It is somewhere in its program."""
        return self.coroutine is not None
