"""The true /dev/kvm behind the methods of a simulated one, so that one test can run against both.

Only what takes no guest: nothing here runs a vCPU, and ``load`` and ``run`` say so.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import Any, NoReturn


class RealKvm:
    """System calls on /dev/kvm. Fds are the operating system's."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        self._path = path
        self._ioctl = ctypes.CDLL(None, use_errno=True).ioctl
        self._ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
        os.close(self.open())  # so that a missing /dev/kvm shows here

    def open(self) -> int:
        """A system fd. OSError where there is no KVM, or no permission."""
        return os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, arg: Any = 0) -> int:
        """ioctl(2), with a buffer updated in place, or an int of 64 bits (``fcntl.ioctl`` takes 32)."""
        if not isinstance(arg, int):
            result: int = fcntl.ioctl(fd, request, arg, True)
            return result
        ret: int = self._ioctl(fd, request, arg & (1 << 64) - 1)
        if ret < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return ret

    def mmap(self, fd: int, length: int, offset: int = 0) -> memoryview:
        """A view of a vCPU's run area. It keeps the mapping alive, also after the fd is closed."""
        return memoryview(mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset))

    def close(self, fd: int) -> None:
        """Close an fd."""
        os.close(fd)

    def eventfd(self, initval: int = 0) -> int:
        """A real eventfd, non-blocking."""
        return os.eventfd(initval, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def load(self, fd: int, program: object) -> NoReturn:
        """Guest programs are simulated only."""
        raise NotImplementedError("a guest program runs on a simulated vCPU only")

    async def run(self, fd: int) -> NoReturn:
        """Guest code is not run on the true KVM."""
        raise NotImplementedError("the true KVM is used without guests")
