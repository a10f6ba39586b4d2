"""The Kvm: /dev/kvm of a simulated host, its fds, and the calls on them.

Everything a VMM does goes through five methods that take and give what the system calls do, so that a VMM written
for the true /dev/kvm needs no other code: :meth:`Kvm.open`, :meth:`Kvm.ioctl`, :meth:`Kvm.mmap`,
:meth:`Kvm.close`, and for a vCPU, which takes time, ``await`` :meth:`Kvm.run`.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from fabric.clock import StoppedClock, current_engine
from fabric.errors import KvmError
from fabric.kvm import device_fd, system_fd, vcpu_fd, vm_fd
from fabric.kvm.arch import Architecture, describe, fill_options
from fabric.kvm.arm64 import Arm64
from fabric.kvm.dispatch import handlers
from fabric.kvm.eventfd import EventFd, RealEvents, SimulatedEvent, open_event
from fabric.kvm.fds import File, not_open
from fabric.kvm.vm import VcpuFile, Vm
from fabric.kvm.x86 import X86
from fabric.trace.ledger import LedgerStatement
from fabric.uapi.ioctl import request_name
from fabric.uapi.usermem import ProcessMemory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fabric.clock import Engine
    from fabric.devices.base import Clock
    from fabric.kvm.eventfd import Event
    from fabric.kvm.real import RealKvm
    from fabric.uapi.usermem import UserMemory
    from fabric.vcpu import Guest

ARCHITECTURES: dict[str, type[Architecture] | None] = {
    "aarch64": Arm64,
    "x86_64": X86,
    "ppc64": None,
    "ppce500": None,
    "s390x": None,
    "mips64": None,
}
"""By the name of the machine; None for one whose devices are still to come."""

_FD_MASK = 0xFFFF_FFFF


class Kvm:
    """A simulated host with KVM.

    Made inside a simulation it belongs to it: clocks, timers and vCPUs run in its virtual time. Made outside it
    stands still, and all but running vCPUs works.

    Args:
        arch: ``"aarch64"`` or ``"x86_64"``; the other names of :data:`ARCHITECTURES` are yet to come.
        user_memory: where user addresses point, by default this process.
        name: put before the names of this host's VMs, to tell two hosts of one simulation apart.
        options: the host: ``host_gic=2`` and so on, see ``defaults`` of the architecture. Without any it is the
            host of the golden recordings.

    Raises:
        ValueError: an architecture that is not there; TypeError: an option that it does not have.
    """

    def __init__(
        self, arch: str = "aarch64", *, user_memory: UserMemory | None = None, name: str = "", **options: Any
    ) -> None:
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, not {arch!r}")
        cls = ARCHITECTURES[arch]
        if cls is None:
            built = " or ".join(repr(name) for name, cls in ARCHITECTURES.items() if cls is not None)
            raise ValueError(f"the devices of {arch} are not built yet; use {built}")
        self.arch = cls(fill_options(cls, options))
        self.user_memory: UserMemory = ProcessMemory() if user_memory is None else user_memory
        self.name = name
        self.engine: Engine | None = current_engine()
        self.clock: Clock = self.engine if self.engine is not None else StoppedClock()
        self.vms: list[Vm] = []
        """The VMs that live, in creation order."""
        self.tables = {
            "system": handlers(system_fd.TABLE, self.arch.system_table),
            "vm": handlers(vm_fd.TABLE, self.arch.vm_table),
            "vcpu": handlers(vcpu_fd.TABLE, self.arch.vcpu_table, guard=vcpu_fd.idle),
            "device": handlers(device_fd.TABLE),
        }
        self._files: dict[int, File] = {}
        self._eventfds: dict[int, SimulatedEvent] = {}
        self._real_events: RealEvents | None = None
        self._vm_count = 0
        self._closed = LedgerStatement()
        if self.engine is not None:
            self.engine.at_end.append(self.check)

    def __repr__(self) -> str:
        return f"Kvm({describe(self)})"

    # -- the system calls

    def open(self) -> int:
        """What ``open("/dev/kvm")`` gives: a system fd."""
        return self.install(system_fd.SystemFile(self, self.tables["system"]))

    def ioctl(self, fd: int, request: int, arg: Any = 0) -> int:
        """``fcntl.ioctl``: what the call returns, or KvmError with its errno.

        Args:
            fd: of this Kvm.
            request: a KVM_* number of :mod:`fabric.uapi.ioctl`.
            arg: an int, the value or a user address; or a writable buffer, which stands for user memory of
                exactly its length and is updated in place.
        """
        file = self._files.get(fd)
        if file is None:
            raise not_open(fd)
        if self._real_events:
            self._real_events.poll()
        handler = file.handlers.get(request)
        if handler is None:
            handler = file.handlers.get(request & 0xFFFF_FFFF)  # a negative int is the same request
            if handler is None:
                raise KvmError(file.unknown_request, f"a {file.kind} fd does not know {request_name(request)}")
        try:
            return handler(file, arg)
        except MemoryError as error:
            raise KvmError(errno.ENOMEM, f"{request_name(request)} needs memory that is not there") from error

    def mmap(self, fd: int, length: int, offset: int = 0) -> memoryview:
        """A writable view of the memory behind a vCPU fd, laid out as struct kvm_run.

        It stays valid when the fd is closed.

        Raises:
            KvmError: EBADF; ENODEV on other fds; EINVAL for a range that is not there.
        """
        return self._file(fd).mmap(length, offset)

    def close(self, fd: int) -> None:
        """Close a kvm fd or a simulated eventfd. With the last fd of a VM the VM is gone."""
        file = self._files.pop(fd, None)
        if file is not None:
            file.close()
            return
        event = open_event(fd)
        if event is None:
            raise not_open(fd)
        self._eventfds.pop(fd, None)
        event.close()

    def load(self, fd: int, program: Callable[[Any], Awaitable[object]] | Guest) -> None:
        """Give a vCPU its guest before its first run: ``async def program(cpu)``, or what :meth:`unload` returned."""
        file = self._vcpu_file(fd)
        file.vcpu.load(program)
        file.vm.ledger.take_back()

    def unload(self, fd: int) -> Guest | None:
        """Take a vCPU's guest out, where it stands, to be loaded into another vCPU; None when it has none.

        With the last guest the interrupts that are pending in the VM leave its ledger: they are of the machine that
        the guests go on in.

        Raises:
            KvmError: EBUSY inside KVM_RUN, in an exit that was not completed (KVM_RUN with ``immediate_exit`` does),
                and while the guest waits for something that is not its CPU's.
            RuntimeError: the guest failed.
        """
        file = self._vcpu_file(fd)
        guest: Guest | None = file.vcpu.unload()
        if guest is not None and not any(vcpu.has_guest for vcpu in file.vm.vcpus):
            file.vm.ledger.hand_over()
        return guest

    async def run(self, fd: int) -> int:
        """KVM_RUN: run the vCPU until it exits; returns 0, with the exit in the run area.

        Raises:
            KvmError: as the ioctl: EINTR, EIO of a dead VM, and what the first-run checks say.
        """
        file = self._vcpu_file(fd)
        if self._real_events:
            self._real_events.poll()
        if file.vm.dead:
            raise KvmError(errno.EIO, f"{file.vm.name} is dead: it failed before and cannot be used any more")
        if not file.vcpu.has_run:
            self.arch.first_run(file)
        return await file.run()

    def eventfd(self, initval: int = 0) -> EventFd:
        """A simulated eventfd: taken wherever one is, and no system call to signal it."""
        event = SimulatedEvent(self.engine, initval)
        self._eventfds[event.number] = event
        return EventFd(event)

    @staticmethod
    def real() -> RealKvm:
        """The true /dev/kvm behind the same methods. OSError where there is none."""
        from fabric.kvm.real import RealKvm

        return RealKvm()

    # -- the ledger

    def statement(self) -> LedgerStatement:
        """What became of the interrupts of all VMs so far, also of those closed."""
        return sum((vm.ledger.statement() for vm in self.vms), self._closed)

    def check(self) -> None:
        """LedgerError when an interrupt of a VM was lost or invented."""
        for vm in self.vms:
            vm.ledger.check()

    # -- for the handlers

    def install(self, file: File) -> int:
        """Give a new file its number."""
        self._files[file.number] = file
        return file.number

    def new_vm(self, machine_type: int) -> Vm:
        """A VM of that type. KvmError(EINVAL) for a type there is not."""
        prefix = f"{self.name}." if self.name else ""
        vm = Vm(self, machine_type, f"{prefix}vm{self._vm_count}")
        self._vm_count += 1
        self.vms.append(vm)
        return vm

    def vm_closed(self, vm: Vm) -> None:
        """The last fd of ``vm`` was closed."""
        self._closed += vm.ledger.statement()
        self.vms.remove(vm)

    def vm(self, fd: int) -> Vm:
        """The VM that an fd belongs to, to look inside. KvmError(EBADF), TypeError for the system fd."""
        file = self._file(fd)
        vm = getattr(file, "vm", None)
        if vm is None:
            raise TypeError(f"fd must be of a VM, a vCPU or a device, not {file!r}")
        return vm  # type: ignore[no-any-return]

    def vcpu(self, fd: int) -> Any:
        """The vCPU behind its fd, to look inside."""
        return self._vcpu_file(fd).vcpu

    def device(self, fd: int) -> Any:
        """The device behind its fd, to look inside."""
        return self._file(fd).device  # type: ignore[attr-defined]

    def is_open(self, fd: int) -> bool:
        """Whether a number names an open file: a kvm fd, an eventfd, or one of the process."""
        if fd in self._files or open_event(fd) is not None:
            return True
        try:
            os.fstat(fd)
        except (OSError, OverflowError):
            return False
        return True

    def event(self, fd: int) -> Event:
        """The eventfd that a struct names, simulated or real.

        Raises:
            KvmError: EBADF when it is not open, EINVAL when it is no eventfd.
        """
        fd &= _FD_MASK
        event = open_event(fd)
        if event is not None:
            return event
        if fd in self._files:
            raise KvmError(errno.EINVAL, f"{fd} is a {self._files[fd].kind} fd, not an eventfd")
        if fd >> 31:
            raise KvmError(errno.EBADF, f"{fd - (1 << 32)} is not an open fd")
        if self._real_events is None:
            self._real_events = RealEvents()
            if self.engine is not None:
                self.engine.pollers.append(self._real_events.poll)
        return self._real_events.find(fd)

    def _file(self, fd: int) -> File:
        file = self._files.get(fd)
        if file is None:
            raise not_open(fd)
        return file

    def _vcpu_file(self, fd: int) -> VcpuFile:
        file = self._file(fd)
        if not isinstance(file, VcpuFile):
            raise KvmError(file.unknown_request, f"a {file.kind} fd does not know KVM_RUN")
        return file
