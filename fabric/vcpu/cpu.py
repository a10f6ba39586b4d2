"""What a guest program sees of its CPU: time, interrupts, memory.

A program is ``async def program(cpu)``. Here is what every architecture's ``cpu`` has; the architecture's own
registers and calls are in its module (:mod:`fabric.vcpu.arm64`).

A program starts with interrupts masked. Interrupts are taken only inside :meth:`Cpu.compute` and
:meth:`Cpu.wait_for_interrupt`, by awaiting the handler that :meth:`Cpu.set_vector` names, with interrupts masked;
when it returns they are unmasked again. A program that polls never unmasks: it waits, then acknowledges.

A guest may be moved to another vCPU while it stands in ``_attend`` or ``_leave`` (:mod:`fabric.vcpu.guest`). So whoever
has come back from there, or from a handler, which may have been there, looks its vCPU and what belongs to it up anew;
a wait that nothing disturbed has nothing to look up.
"""

from __future__ import annotations

import types
from heapq import heappush, heapreplace
from typing import TYPE_CHECKING, Any

from fabric.clock.hosted import Leave
from fabric.memory import GuestMemory
from fabric.vcpu.exits import INTERRUPTED, MmioExit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from fabric.vcpu.vcpu import Vcpu

_READ = {1: GuestMemory.read_u8, 2: GuestMemory.read_u16, 4: GuestMemory.read_u32, 8: GuestMemory.read_u64}
_WRITE = {1: GuestMemory.write_u8, 2: GuestMemory.write_u16, 4: GuestMemory.write_u32, 8: GuestMemory.write_u64}


class _NoInterrupts:
    """In the place of an interrupt controller's CPU interface where there is none."""

    line = False


_NO_INTERRUPTS = _NoInterrupts()


class Cpu:
    """The CPU a guest program runs on."""

    __slots__ = ("_controller", "_engine", "_injection_ns", "_vcpu", "_vector", "masked")

    def __init__(self, vcpu: Vcpu) -> None:
        self.bind(vcpu)
        self._vector: Callable[[Any], Awaitable[object]] | None = None
        self.masked = True
        """Interrupts are masked (ARM: PSTATE.I)."""

    def bind(self, vcpu: Vcpu) -> None:
        """Be the CPU of ``vcpu``, as that begins to run or takes over a guest (:mod:`fabric.vcpu.guest`)."""
        self._vcpu = vcpu
        self._engine: Any = vcpu.engine
        # The interrupt controller's part for this CPU, which is there by the first run or never.
        self._controller: Any = vcpu.cpu_interface or _NO_INTERRUPTS
        self._injection_ns = vcpu.costs.injection_ns

    @property
    def number(self) -> int:
        """Which vCPU this is, in creation order."""
        return self._vcpu.index

    @property
    def controller(self) -> Any:
        """The interrupt controller's part for this CPU."""
        return self._controller

    @property
    def now(self) -> int:
        """Virtual time in ns. A convenience: a guest would read a counter."""
        now: int = self._engine.now
        return now

    def set_vector(self, handler: Callable[[Any], Awaitable[object]]) -> None:
        """Have interrupts taken by ``await handler(cpu)``."""
        self._vector = handler

    def unmask(self) -> None:
        """Let interrupts be taken. One that is pending is taken at the next ``compute`` or wait."""
        if self._vector is None:
            raise RuntimeError("the program unmasks interrupts without a handler: call cpu.set_vector first")
        self.masked = False

    def mask(self) -> None:
        """Let no interrupt be taken."""
        self.masked = True

    @types.coroutine
    def compute(self, ns: int) -> Generator[Any, Any, None]:
        """Use ``ns`` of CPU time. Interrupts that come meanwhile are taken inside it and take their own time."""
        vcpu = self._vcpu
        engine = self._engine
        left = ns
        if self.masked and vcpu.host is None and ns > 0 and not vcpu.disturbed:
            # The common case, in a handler: nothing but time ends it, and then it is over.
            started = engine.now
            task = engine.current
            task.waits = vcpu
            task.wake = turn = next(engine.turns)
            entry = (started + ns, task.priority, turn, task, None)  # wake_at, without the call
            if engine.hole:
                engine.hole = False
                heapreplace(engine.later, entry)
            else:
                heappush(engine.later, entry)
            yield
            if not vcpu.disturbed:
                return
            left -= engine.now - started - vcpu.absent_ns
        elif ns < 0:
            raise ValueError(f"cannot compute for {ns} ns")
        host = vcpu.host
        interface = self._controller
        while True:
            if vcpu.disturbed or (host is not None and vcpu.pcpu is None):
                yield from self._schedule_in()
                vcpu, engine, interface = self._vcpu, self._engine, self._controller
                host = vcpu.host
            if not self.masked and interface.line:
                yield from self._take_interrupts()
                vcpu, engine, interface = self._vcpu, self._engine, self._controller
                host = vcpu.host
                continue
            if left <= 0:
                return
            turn = left
            if host is not None:
                turn = min(left, host.slice_left(vcpu))
                if not turn:
                    host.release(vcpu)
                    continue
            started = engine.now
            task = engine.current
            engine.wake_at(task, started + turn)
            task.waits = vcpu
            if not self.masked:
                vcpu.wakeable = task
            yield
            vcpu.wakeable = None
            left -= engine.now - started - vcpu.absent_ns

    @types.coroutine
    def wait_for_interrupt(self, until_ns: int | None = None) -> Generator[Any, Any, None]:
        """Halt until an interrupt can be taken, and take it unless masked (ARM: WFI).

        With ``until_ns`` the halt ends at that time at the latest (ARM: WFIT).
        """
        vcpu = self._vcpu
        interface = self._controller
        if vcpu.disturbed:
            yield from self._attend()
            vcpu, interface = self._vcpu, self._controller
        if not interface.line:
            if vcpu.host is not None:
                vcpu.host.release(vcpu)
            while not interface.line:
                if vcpu.disturbed:
                    yield from self._attend()
                    vcpu, interface = self._vcpu, self._controller
                    continue
                task = self._engine.current
                if until_ns is not None:
                    if self._engine.now >= until_ns:
                        break
                    self._engine.wake_at(task, until_ns)
                task.waits = vcpu
                vcpu.wakeable = task
                yield
                vcpu.wakeable = None
            if vcpu.wakeup_ns:
                yield from self._spend(vcpu.wakeup_ns)
            elif vcpu.host is not None:
                yield from self._schedule_in()
        if not self.masked:
            yield from self._take_interrupts()

    async def load(self, gpa: int, size: int) -> int:
        """Read ``size`` (1, 2, 4, 8) bytes at guest physical ``gpa``: RAM, an in-kernel device, or the VMM."""
        vcpu = self._vcpu
        memory = vcpu.vm.memory
        if memory.is_backed(gpa, size):
            return _READ[size](memory, gpa)
        found = vcpu.vm.mmio.find(gpa, size)
        if vcpu.costs.exit_ns and (found is None or found[0].exits):
            await self._spend(vcpu.costs.exit_ns)
            vcpu = self._vcpu
            found = vcpu.vm.mmio.find(gpa, size)
        if found is not None:
            handler, offset = found
            value: int = handler.mmio_read(offset, size, vcpu)
            return value
        return int(await self._leave(MmioExit(gpa, size, None)))

    async def store(self, gpa: int, size: int, value: int) -> None:
        """Write the low ``size`` (1, 2, 4, 8) bytes of ``value`` at guest physical ``gpa``."""
        vcpu = self._vcpu
        memory = vcpu.vm.memory
        value &= (1 << 8 * size) - 1
        if memory.is_writable(gpa, size):
            _WRITE[size](memory, gpa, value)
            return
        if vcpu.vm.doorbells.write(gpa, size, value):
            if vcpu.costs.exit_ns:
                await self._spend(vcpu.costs.exit_ns)
            return
        found = vcpu.vm.mmio.find(gpa, size)
        if vcpu.costs.exit_ns and (found is None or found[0].exits):
            await self._spend(vcpu.costs.exit_ns)
            vcpu = self._vcpu
            found = vcpu.vm.mmio.find(gpa, size)
        if found is not None:
            handler, offset = found
            handler.mmio_write(offset, size, value, vcpu)
            if offset == handler.eoi_offset and vcpu.costs.eoi_ns:
                vcpu.owe(vcpu.costs.eoi_ns)
            return
        await self._leave(MmioExit(gpa, size, value))

    # Inside.

    @types.coroutine
    def _take_interrupts(self) -> Generator[Any, Any, None]:
        """Take interrupts, one after the other, until none can be taken."""
        vcpu = self._vcpu
        interface = self._controller
        vector: Any = self._vector
        while interface.line:
            if vcpu.disturbed or (vcpu.host is not None and vcpu.pcpu is None):
                yield from self._schedule_in()
                vcpu, interface = self._vcpu, self._controller
                continue
            self.masked = True
            if self._injection_ns:
                yield from self._spend(self._injection_ns)
            yield from vector(self)
            self.masked = False
            vcpu, interface = self._vcpu, self._controller

    @types.coroutine
    def _spend(self, ns: int) -> Generator[Any, Any, None]:
        """Time of the host's on this vCPU: no interrupt is taken in it."""
        masked, self.masked = self.masked, True
        yield from self.compute(ns)
        self.masked = masked

    @types.coroutine
    def _leave(self, exit_: Any) -> Generator[Any, Any, Any]:
        """Exit to the VMM; returns what the next KVM_RUN completes the exit with."""
        vcpu = self._vcpu
        if vcpu.costs.userspace_exit_ns:
            yield from self._spend(vcpu.costs.userspace_exit_ns)
        completed = yield Leave(exit_)
        vcpu = self._vcpu
        if vcpu.abort is not None:
            abort, vcpu.abort = vcpu.abort, None
            raise abort
        return completed

    @types.coroutine
    def _attend(self) -> Generator[Any, Any, None]:
        """After KVM_RUN was left and entered again in the middle of a wait, or when it is to be left now; or to pay
        for what took no time when it was done."""
        vcpu = self._vcpu
        vcpu.disturbed = False
        vcpu.absent_ns = 0
        if vcpu.interrupted:
            vcpu.interrupted = False
            yield Leave(INTERRUPTED)
            vcpu = self._vcpu
        if vcpu.owed_ns:
            owed, vcpu.owed_ns = vcpu.owed_ns, 0
            yield from self._spend(owed)

    @types.coroutine
    def _schedule_in(self) -> Generator[Any, Any, None]:
        """Be inside KVM_RUN, undisturbed, and hold a physical CPU where they are scarce."""
        while True:
            vcpu = self._vcpu
            if vcpu.disturbed:
                yield from self._attend()
            elif vcpu.host is not None and vcpu.pcpu is None:
                yield from vcpu.host.acquire(vcpu)
            else:
                return
