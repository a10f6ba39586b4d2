"""File descriptors of the simulated kernel.

Numbers come from one counter for the whole process, which starts where the operating system never gets to
(its limit, ``fs.nr_open``, is at most 2**30). So a number is a kvm fd of one :class:`~fabric.kvm.Kvm`, a simulated
eventfd, or an open file of the operating system, and never two of these. Numbers are not reused.
"""

from __future__ import annotations

import errno
from itertools import count
from typing import TYPE_CHECKING, ClassVar

from fabric.errors import KvmError

if TYPE_CHECKING:
    from fabric.kvm.dispatch import Handlers
    from fabric.kvm.system import Kvm
    from fabric.kvm.vm import Vm

FIRST_NUMBER = 1 << 30

_numbers = count(FIRST_NUMBER)


def next_number() -> int:
    """A number that no file of this process has or had."""
    return next(_numbers)


class File:
    """What a kvm fd stands for: /dev/kvm, a VM, a vCPU or a device.

    ``handlers`` maps request numbers to what answers them, see :mod:`fabric.kvm.dispatch`.
    """

    __slots__ = ("handlers", "kvm", "number")

    kind: ClassVar[str]
    """The word for it in messages."""
    unknown_request: int = errno.ENOTTY
    """The errno for a request that this kind of fd does not know."""

    def __init__(self, kvm: Kvm, handlers: Handlers) -> None:
        self.kvm = kvm
        self.handlers = handlers
        self.number = next_number()

    def __repr__(self) -> str:
        return f"<{self.kind} fd {self.number}>"

    def mmap(self, length: int, offset: int) -> memoryview:
        """The memory behind the fd. KvmError(ENODEV) where there is none."""
        raise KvmError(errno.ENODEV, f"a {self.kind} fd cannot be mapped")

    def close(self) -> None:
        """The number is gone."""


class VmPart(File):
    """A file that belongs to a VM and keeps it alive."""

    __slots__ = ("vm",)

    def __init__(self, kvm: Kvm, handlers: Handlers, vm: Vm) -> None:
        super().__init__(kvm, handlers)
        self.vm = vm
        vm.attach(self)

    def close(self) -> None:
        self.vm.detach(self)


def not_open(fd: object) -> KvmError:
    """EBADF for ``fd``."""
    return KvmError(errno.EBADF, f"{fd!r} is not an open kvm fd")
