"""The CPU of an arm64 guest whose vCPU has a PMU: what the guest does is counted.

vCPUs without a PMU are spared all this: :class:`fabric.vcpu.arm64.Arm64Cpu` does not know of it.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from fabric.clock.hosted import Leave
from fabric.uapi.arm64 import KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED
from fabric.uapi.kvm import KvmRunFailEntry
from fabric.vcpu.arm64 import Arm64Cpu
from fabric.vcpu.exits import HostExit
from fabric.vcpu.pmu import (
    EXC_IRQ,
    EXC_RETURN,
    EXC_TAKEN,
    GUEST_REGISTERS,
    LD_RETIRED,
    MEM_ACCESS,
    ST_RETIRED,
    Pmu,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from fabric.vcpu.vcpu import Vcpu


class PmuCpu(Arm64Cpu):
    """An :class:`Arm64Cpu` with the PM*_EL0 and PM*_EL1 registers.

    Computing counts cycles and instructions; loads, stores, and interrupts that are taken count as events. The time
    that the host spends on the vCPU (exits, injection) does not count.
    """

    __slots__ = ("_pmu",)

    def bind(self, vcpu: Vcpu) -> None:
        """As the base class; and the PMU is that of ``vcpu``."""
        super().bind(vcpu)
        self._pmu: Pmu = self._vcpu.pmu  # type: ignore[assignment]  # a vCPU without one has another class of CPU

    async def mrs(self, name: str) -> int:
        """As the base class. ValueError also for a counter that there is not."""
        if name not in GUEST_REGISTERS:
            return await super().mrs(name)
        try:
            return self._pmu.read(name)
        except KeyError:
            raise ValueError(f"mrs of {name}: it cannot be read, or there is no such counter") from None

    async def msr(self, name: str, value: int) -> None:
        """As the base class. ValueError also for a counter that there is not."""
        if name not in GUEST_REGISTERS:
            await super().msr(name, value)
            return
        try:
            self._pmu.write(name, value)
        except KeyError:
            raise ValueError(f"msr of {name}: it cannot be written, or there is no such counter") from None

    def set_vector(self, handler: Callable[[Any], Awaitable[object]]) -> None:
        """As the base class; each interrupt is an exception taken and one returned from."""

        async def counted(cpu: PmuCpu) -> None:
            cpu._pmu.event(EXC_TAKEN)
            cpu._pmu.event(EXC_IRQ)
            await handler(cpu)
            cpu._pmu.event(EXC_RETURN)

        super().set_vector(counted)

    async def load(self, gpa: int, size: int) -> int:
        """As the base class."""
        self._pmu.event(LD_RETIRED)
        self._pmu.event(MEM_ACCESS)
        return await super().load(gpa, size)

    async def store(self, gpa: int, size: int, value: int) -> None:
        """As the base class."""
        self._pmu.event(ST_RETIRED)
        self._pmu.event(MEM_ACCESS)
        await super().store(gpa, size, value)

    @types.coroutine
    def compute(self, ns: int) -> Generator[Any, Any, None]:
        """As the base class, whose loop this is, with the PMU told of every stretch of it."""
        if ns < 0:
            raise ValueError(f"cannot compute for {ns} ns")
        left = ns
        while True:
            vcpu, engine = self._vcpu, self._engine
            host = vcpu.host
            if vcpu.disturbed or (host is not None and vcpu.pcpu is None):
                yield from self._schedule_in()
                continue
            if self._misplaced():
                yield self._refused()
                continue
            if not self.masked and self._controller.line:
                yield from self._take_interrupts()
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
            pmu = self._pmu
            pmu.resume(turn)
            yield
            pmu.pause()
            vcpu.wakeable = None
            left -= engine.now - started - vcpu.absent_ns

    @types.coroutine
    def _spend(self, ns: int) -> Generator[Any, Any, None]:
        """As the base class: the host computes, not the guest."""
        masked, self.masked = self.masked, True
        yield from super().compute(ns)
        self.masked = masked

    @types.coroutine
    def _leave(self, exit_: Any) -> Generator[Any, Any, Any]:
        """As the base class, but not from a physical CPU that the guest cannot be on."""
        while self._pmu.cpus is not None:
            yield from self._schedule_in()
            if not self._misplaced():
                break
            yield self._refused()
        return (yield from super()._leave(exit_))

    def _misplaced(self) -> bool:
        """Whether the physical CPU has another PMU than the one chosen for the VM."""
        cpus = self._pmu.cpus
        return cpus is not None and self._placement() not in cpus

    def _placement(self) -> int:
        """The physical CPU; without a scheduler every vCPU has that of its own number."""
        vcpu = self._vcpu
        return vcpu.index if vcpu.pcpu is None else vcpu.pcpu

    def _refused(self) -> Leave:
        """What ends KVM_RUN with KVM_EXIT_FAIL_ENTRY; the next one finds the vCPU elsewhere, or fails again."""
        return Leave(HostExit(KvmRunFailEntry(KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED, self._placement())))
