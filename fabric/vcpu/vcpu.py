"""A vCPU: who it is, its run area, and KVM_RUN.

A vCPU is an architecture's CPU interface plus an *executor* of guest code. The executor here is a coroutine,
``program(cpu)``: KVM_RUN runs it in the place of the calling task until it exits. It stays suspended in the
access that exited, and the next KVM_RUN completes that access and goes on. Cancelling a KVM_RUN takes the vCPU
off the CPU where it is: what it was computing goes on when it is run again.
"""

from __future__ import annotations

import errno
import types
from heapq import heappush
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from fabric.clock import Priority
from fabric.clock.hosted import Nested
from fabric.clock.waiting import WaitQueue
from fabric.errors import KvmError
from fabric.uapi.kvm import KVM_EXIT_UNKNOWN, KVM_RUN_IMMEDIATE_EXIT, KVM_SYSTEM_EVENT_WAKEUP
from fabric.vcpu.cpu import Cpu
from fabric.vcpu.exits import INTERRUPTED, SystemEventExit, set_exit_reason
from fabric.vcpu.guest import Guest
from fabric.vcpu.host import Costs, Host, StealWait

if TYPE_CHECKING:
    from collections.abc import Generator

    from fabric.clock.engine import Engine
    from fabric.clock.hosted import Hosted
    from fabric.devices.base import VmServices
    from fabric.vcpu.exits import Exit
    from fabric.vcpu.guest import Program

RUN_AREA_SIZE = 8192
"""KVM_GET_VCPU_MMAP_SIZE: struct kvm_run and the ring of coalesced MMIO, a page each."""


class _HotFields:
    """What every halt and every stretch of computation uses: together in memory, as hundreds of vCPUs do not fit a
    processor's cache (slots of a base class come first)."""

    __slots__ = ("absent_ns", "cpu_interface", "disturbed", "host", "wakeable", "wakeup_ns")


class Vcpu(_HotFields):
    """One vCPU of a VM; what devices see of it is :class:`fabric.devices.base.VcpuServices`.

    Args:
      vm: its VM.
      vcpu_id: the id given to KVM_CREATE_VCPU.
      index: its place in creation order.
      engine: the simulation it runs in; None outside of one, where everything but running works.
    """

    cpu_class: ClassVar[type[Cpu]] = Cpu

    __slots__ = (
        "__weakref__",
        "_arrived",
        "_completed",
        "_costs",
        "_cpu",
        "_exit",
        "_failed",
        "_guest",
        "_left_at",
        "_next_exit",
        "_power",
        "_program",
        "_steal_wait",
        "_task",
        "_turn",
        "abort",
        "engine",
        "has_run",
        "index",
        "initialized",
        "interrupted",
        "mpidr",
        "owed_ns",
        "pcpu",
        "powered_off",
        "run_area",
        "run_view",
        "running",
        "stolen_ns",
        "suspended",
        "vcpu_id",
        "vm",
    )

    def __init__(self, vm: VmServices, vcpu_id: int, index: int, engine: Engine | None) -> None:
        self.vm = vm
        self.vcpu_id = vcpu_id
        self.index = index
        self.engine = engine
        self.mpidr = 0
        self.initialized = True
        self.has_run = False
        self.running = False
        self.powered_off = False
        """Stopped (MP_STATE_STOPPED): KVM_RUN waits until another vCPU powers it on."""
        self.suspended = False
        """MP_STATE_SUSPENDED: KVM_RUN waits for an interrupt, and exits with KVM_SYSTEM_EVENT_WAKEUP."""
        self.abort: Exception | None = None
        """What the access that exited raises in the guest, instead of being completed."""
        self.cpu_interface: Any = None
        self._costs = Costs()
        self.wakeup_ns = 0
        self.stolen_ns = 0
        """Time it was ready to run and had no physical CPU."""
        self.pcpu: int | None = None
        """The physical CPU it holds, where they are scarce."""
        self.wakeable: Hosted | None = None
        """Its task, while an interrupt may wake it."""
        self.disturbed = False
        """KVM_RUN was re-entered in the middle of a wait, or is to be left, or time is owed."""
        self.interrupted = False
        self.owed_ns = 0
        """CPU time for what the guest did without waiting; it passes before anything else that takes time."""
        self.absent_ns = 0
        """How long it was out of KVM_RUN within the wait it is in."""
        self.run_area = bytearray(RUN_AREA_SIZE)
        self.run_view = memoryview(self.run_area)
        self.host: Host | None = None
        """The physical CPUs it shares with others (:meth:`share`); None while there is one for every vCPU."""
        self._steal_wait: StealWait | None = None
        self._program: Program | None = None
        self._guest: Any = None
        self._cpu: Any = None
        """What the guest that has begun knows it as."""
        self._arrived: Guest | None = None
        """A guest from elsewhere, until it runs here."""
        self._failed: BaseException | None = None
        """What the guest ended with, if that was an exception."""
        self._exit: Exit | None = None
        self._next_exit: Exit | None = None
        self._completed: Any = None
        """The result of the last exit, for the access that waits for it."""
        self._task: Hosted | None = None
        self._left_at: int | None = None
        self._turn = WaitQueue(engine, f"KVM_RUN of vCPU {vcpu_id} to be free") if engine is not None else None
        self._power = WaitQueue(engine, f"vCPU {vcpu_id} to be powered on") if engine is not None else None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.vcpu_id}>"

    @property
    def costs(self) -> Costs:
        """What the host's work costs it; to be set before it runs."""
        return self._costs

    @costs.setter
    def costs(self, costs: Costs) -> None:
        self._costs = costs
        self.wakeup_ns = costs.wakeup_ns

    def share(self, host: Host) -> None:
        """Have it compute only while it holds one of the physical CPUs of ``host``."""
        self.host = host
        self._steal_wait = StealWait(host, self)

    @property
    def steal_wait(self) -> StealWait:
        """What it waits for while others have the physical CPUs."""
        assert self._steal_wait is not None
        return self._steal_wait

    def load(self, program: Program | Guest) -> None:
        """Give it its guest, a program or one that was unloaded from another vCPU.

        Raises:
            TypeError: neither; ValueError: a guest of another architecture.
            KvmError: EBUSY while it has a guest that has begun.
        """
        if not (callable(program) or isinstance(program, Guest)):
            raise TypeError(f"a guest program must be an async function of one argument, not {program!r}")
        if self._guest is not None or (self._arrived is not None and self._arrived.begun):
            raise KvmError(errno.EBUSY, f"vCPU {self.vcpu_id} has begun to run its program: load comes before that")
        if isinstance(program, Guest):
            if program.cpu_class is not self.cpu_class:
                raise ValueError(f"a guest of {program.cpu_class.__name__} cannot run on {self.cpu_class.__name__}")
            self._arrived, self._program = program, program.program
        else:
            self._arrived, self._program = None, program
        self._failed = None

    @property
    def has_guest(self) -> bool:
        """A program or a guest was loaded."""
        return self._program is not None

    def unload(self) -> Guest | None:
        """Take its guest out, to be loaded into another vCPU; None when there is none. See :mod:`fabric.vcpu.guest`.

        Raises:
            KvmError: EBUSY inside KVM_RUN, in an exit that is not completed (KVM_RUN with ``immediate_exit`` does
                that), and while the guest waits for something that is not its CPU's.
            RuntimeError: the guest failed, so there is nothing to go on with.
        """
        if self.running:
            raise KvmError(errno.EBUSY, f"vCPU {self.vcpu_id} is inside KVM_RUN: it has to be stopped first")
        if self._exit is not None:
            raise KvmError(
                errno.EBUSY,
                f"vCPU {self.vcpu_id} is in an exit: KVM_RUN with immediate_exit has to complete it first",
            )
        if self._failed is not None:
            raise RuntimeError(f"the guest of vCPU {self.vcpu_id} has failed: {self._failed!r}")
        guest, program = self._arrived, self._program
        if guest is None and program is not None:
            self._come_to_rest()
            cpu = None if self._guest is None else self._cpu
            guest = Guest(program, self.cpu_class, self._guest, cpu, self._completed, self.abort, self.owed_ns)
        self._arrived = self._program = self._guest = self._cpu = self._completed = self.abort = None
        self.owed_ns = 0
        self.disturbed = False
        return guest

    def _come_to_rest(self) -> None:
        """Step a guest whose KVM_RUN was cancelled in the middle of a wait to where it can be moved."""
        if self._left_at is None:
            return
        assert self.engine is not None
        if not _waits_for_its_cpu(self._guest, self.cpu_class):
            raise KvmError(errno.EBUSY, f"the guest of vCPU {self.vcpu_id} waits for something that is not its CPU's")
        self.absent_ns = self.engine.now - self._left_at
        self._left_at = None
        self.disturbed = self.interrupted = True
        # A halted guest that nobody disturbed would look at its line first, and go on when an interrupt is there.
        controller = self._cpu.controller
        line, controller.line = controller.line, False
        trap = self._guest.send(None)
        controller.line = line
        assert trap.value is INTERRUPTED

    # What interrupt controllers and waits call.

    def kick(self) -> None:
        """An interrupt can be taken: wake the vCPU if it halts or computes with interrupts unmasked."""
        task = self.wakeable
        if task is not None:
            self.wakeable = None
            engine = task.engine
            task.wake = turn = next(engine.turns)
            task.waits = None
            heappush(engine.ready, (engine.now, task.priority, turn, task, None))  # wake, without the call

    def owe(self, ns: int) -> None:
        """Have ``ns`` pass on the vCPU with the next thing that takes time."""
        self.owed_ns += ns
        self.disturbed = True

    def stole(self, ns: int) -> None:
        """It was ready to run for ``ns`` and had no physical CPU."""
        self.stolen_ns += ns

    def forget(self, task: Hosted) -> None:
        """The task of a KVM_RUN that blocks in the guest was cancelled."""
        self.wakeable = None

    def describe(self) -> str:
        """What it waits for, for deadlock reports."""
        return f"an interrupt to vCPU {self.vcpu_id}"

    # KVM_RUN.

    async def run(self) -> int:
        """KVM_RUN after its first-run checks: run the guest until it exits; 0, with the exit in the run area.

        Raises:
          KvmError: EINTR when ``immediate_exit`` is set or :meth:`interrupt` was called.
          RuntimeError: outside a simulation, or without a program.
        """
        engine = self.engine
        if engine is None or self._turn is None or self._power is None:
            raise RuntimeError("KVM_RUN needs a simulation: make the Kvm inside fabric.run(...)")
        while self.running:
            await self._turn.wait()
        if self._exit is not None:
            # Also with immediate_exit: that is how a VMM completes an exit before it saves the vCPU.
            self._completed = self._exit.complete(self.run_view)
            self._exit = None
        if self.run_area[KVM_RUN_IMMEDIATE_EXIT]:
            self._turn.wake_one()
            self.leave_at_once()
        set_exit_reason(self.run_view, KVM_EXIT_UNKNOWN)
        if self._next_exit is not None:
            exit_, self._next_exit = self._next_exit, None
            self._turn.wake_one()
            exit_.fill(self.run_view)
            return 0
        task = engine.blocking_task()
        priority = task.priority
        self.running = True
        self._task = task
        try:
            self.has_run = True
            self.entering()
            task.priority = Priority.VCPU
            while True:
                if self.powered_off:
                    left = await self._stay_off()
                    if left is not None:
                        break
                if self.interrupted:
                    self._eintr()
                if self.suspended:
                    await self._wakeup(engine)
                    SystemEventExit(KVM_SYSTEM_EVENT_WAKEUP).fill(self.run_view)
                    return 0
                left = await self._enter(engine)
                if left is INTERRUPTED:
                    self._eintr()
                if left is not None:
                    break
                # The program returned: the CPU is off until somebody turns it on, and then starts afresh.
                guest, self._guest = self._guest, None
                guest.close()
                self.powered_off = True
                if self.host is not None:
                    self.host.release(self)
        finally:
            task.priority = priority
            self.running = False
            self._task = None
            self.disturbed = bool(self.owed_ns)
            self.interrupted = False
            if self.host is not None:
                self.host.release(self)
            self.leaving()
            self._turn.wake_one()
        self._exit = left
        left.fill(self.run_view)
        return 0

    @property
    def on_cpu(self) -> bool:
        """Whether what happens now is done by its guest, or for it."""
        return self._task is not None and self.engine is not None and self._task is self.engine.current

    @property
    def exited(self) -> Exit | None:
        """The exit whose access the next KVM_RUN completes."""
        return self._exit

    def exit_next(self, exit_: Exit) -> None:
        """Have the next KVM_RUN return with that exit and not enter the guest."""
        self._next_exit = exit_

    def interrupt(self) -> None:
        """Have the KVM_RUN under way fail with EINTR, as a signal to its thread would. Without one: nothing."""
        if self._task is not None:
            self.interrupted = True
            self.disturb()

    def disturb(self) -> None:
        """Have what the KVM_RUN under way waits for end now: there is something to do that is no interrupt to take."""
        self.disturbed = True
        task = self._task
        if task is None or self.engine is None:
            return
        waits: Any = task.waits
        if waits is not None and task is not self.engine.current and waits in (self, self._power, self._steal_wait):
            waits.forget(task)
            self.engine.wake(task)

    def power_on(self) -> None:
        """Start a vCPU that is off; its program begins anew."""
        self.powered_off = False
        if self._power is not None:
            self._power.wake_all()

    def power_off(self) -> None:
        """Stop for good (until powered on): the next KVM_RUN waits."""
        self.powered_off = True

    def restart(self) -> None:
        """The registers are reset: at the next KVM_RUN the program begins anew, whatever it was in."""
        guest = self._guest if self._arrived is None else self._arrived.coroutine
        self._guest = self._arrived = self._cpu = self._failed = None
        self._exit = self._completed = self._left_at = self.abort = None
        if guest is not None:
            guest.close()

    def leave_at_once(self) -> NoReturn:
        """KVM_RUN with immediate_exit: no guest runs, but the vCPU's state goes onto the CPU and back."""
        self.touch_hardware()
        raise KvmError(errno.EINTR, "immediate_exit is set in the run area")

    def touch_hardware(self) -> None:
        """What it does to the vCPU's registers to be on a physical CPU for a moment."""

    def entering(self) -> None:
        """KVM_RUN begins to run the guest."""

    def leaving(self) -> None:
        """KVM_RUN ends."""

    async def _stay_off(self) -> Exit | None:
        """Wait until it is powered on; an exit to leave KVM_RUN with instead."""
        assert self._power is not None
        while self.powered_off:
            if self.interrupted:
                self._eintr()
            await self._power.wait()
        return None

    def _eintr(self) -> None:
        self.interrupted = False
        INTERRUPTED.fill(self.run_view)
        raise KvmError(errno.EINTR, f"KVM_RUN of vCPU {self.vcpu_id} was interrupted")

    @types.coroutine
    def _wakeup(self, engine: Engine) -> Generator[Any, Any, None]:
        """Suspended: wait for an interrupt as a halted guest does. It stays suspended until the VMM says otherwise."""
        interface = self.cpu_interface
        while interface is None or not interface.line:
            if self.interrupted:
                self._eintr()
            task: Any = engine.current
            task.waits = self
            self.wakeable = task
            yield
            self.wakeable = None

    @types.coroutine
    def _enter(self, engine: Engine) -> Generator[Any, Any, Any]:
        """Run the guest program in the place of this coroutine until it leaves or returns."""
        if self._guest is None:
            self._begin()
        elif self._left_at is not None:
            self.absent_ns = engine.now - self._left_at
            self._left_at = None
            self.disturbed = True
        value, self._completed = self._completed, None
        try:
            return (yield Nested(self._guest, value, self._aborted))
        except BaseException as error:
            if self._left_at is None:
                self._guest, self._failed = None, error  # it raised, so there is nothing to go on with
            raise

    def _begin(self) -> None:
        """Start the program, or take over the guest that was loaded."""
        arrived, self._arrived = self._arrived, None
        if arrived is not None:
            self.owed_ns = arrived.owed_ns
            self.disturbed = bool(self.owed_ns)
            if arrived.begun:
                self._guest, self._cpu = arrived.coroutine, arrived.cpu
                self._completed, self.abort = arrived.result, arrived.abort
                self._cpu.bind(self)
                return
        if self._program is None:
            raise RuntimeError(f"vCPU {self.vcpu_id} has no program: call kvm.load(vcpu_fd, program) first")
        self._failed = None
        self._cpu = self.cpu_class(self)
        self._guest = self._program(self._cpu)
        if not hasattr(self._guest, "send"):
            raise TypeError(f"a guest program must be an async function, {self._program!r} is not")

    def _aborted(self) -> None:
        """KVM_RUN is cancelled while the guest waits: it keeps its place."""
        assert self.engine is not None
        self._left_at = self.engine.now


def _waits_for_its_cpu(guest: Any, cpu: type[Cpu]) -> bool:
    """Whether a guest that is blocked in the engine is so in a wait of its CPU (or of the CPU's wait for a host's)."""
    kinds = (Cpu, cpu)  # one that has a computation of its own may go on to that of its base
    waits = {code for kind in kinds for code in (kind.compute.__code__, kind.wait_for_interrupt.__code__)}
    waits.add(Host.acquire.__code__)
    place, inner = None, guest
    while inner is not None:
        place, outer = inner, place
        inner = getattr(place, "cr_await", None) or getattr(place, "gi_yieldfrom", None)
    return bool({getattr(frame, "gi_code", None) for frame in (place, outer)} & waits)
