"""The host under the vCPUs: what its work costs, and how many vCPUs can run at once.

A host with at least as many physical CPUs as vCPUs needs no scheduler, and none is made. With fewer, a vCPU
computes only while it holds a physical CPU; waiting for one is *stolen* time, as the guest's steal clock shows it.
"""

from __future__ import annotations

import types
from collections import deque
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Generator

    from fabric.clock.engine import Engine
    from fabric.clock.hosted import Hosted
    from fabric.vcpu.vcpu import Vcpu


@attrs.frozen
class Costs:
    """What the host's part of virtualization takes, in ns of virtual time on the vCPU that it happens to.

    All zero by default: the traffic alone. ``fabric.scenario`` has defaults measured on real hosts.
    """

    exit_ns: int = 0
    """An exit handled in the kernel and the entry after it: emulated MMIO, a trapped register, a hypercall."""
    userspace_exit_ns: int = 0
    """More for an exit that goes on to the VMM."""
    injection_ns: int = 0
    """From the interrupt being deliverable to the first instruction of the handler."""
    eoi_ns: int = 0
    """Ending an interrupt (0 where the hardware does it without an exit)."""
    wakeup_ns: int = 0
    """Waking a vCPU that is halted: the host schedules its thread in."""
    context_switch_ns: int = 0
    """Changing the vCPU that a physical CPU runs."""

    def __attrs_post_init__(self) -> None:
        for field in attrs.fields(Costs):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"cost {field.name} must be an int >= 0 ns, not {value!r}")


class Host:
    """Physical CPUs shared by vCPUs: round robin with a time slice.

    Args:
      engine: the simulation.
      pcpus: how many physical CPUs there are (>= 1).
      slice_ns: how long a vCPU computes before another that waits gets its turn.
      switch_ns: what changing the vCPU of a physical CPU costs.
    """

    __slots__ = ("_free", "_last", "_slice_end", "engine", "pcpus", "slice_ns", "switch_ns", "waiting")

    def __init__(self, engine: Engine, pcpus: int, *, slice_ns: int = 4_000_000, switch_ns: int = 0) -> None:
        if pcpus < 1:
            raise ValueError(f"a host has at least one physical CPU, not {pcpus!r}")
        if slice_ns < 1:
            raise ValueError(f"the time slice must be at least 1 ns, not {slice_ns!r}")
        self.engine = engine
        self.pcpus = pcpus
        self.slice_ns = slice_ns
        self.switch_ns = switch_ns
        self._free = list(range(pcpus - 1, -1, -1))
        self._last: list[Vcpu | None] = [None] * pcpus
        self._slice_end = [0] * pcpus
        self.waiting: deque[tuple[Vcpu, Hosted]] = deque()

    @types.coroutine
    def acquire(self, vcpu: Vcpu) -> Generator[None, None, None]:
        """Wait until ``vcpu`` holds a physical CPU; its ``stolen_ns`` grows by the wait.

        It comes back without one when KVM_RUN was left meanwhile, or is to be left.
        """
        engine = self.engine
        if self._free and not self.waiting:
            self._take_free(vcpu)
        else:
            task = engine.blocking_task()
            since = engine.now
            task.waits = vcpu.steal_wait
            self.waiting.append((vcpu, task))
            yield
            vcpu.stole(engine.now - since - vcpu.absent_ns)
        pcpu = vcpu.pcpu
        if pcpu is None:
            return
        if self.switch_ns and self._last[pcpu] is not vcpu:
            self._last[pcpu] = vcpu
            yield from engine.sleep(self.switch_ns)
            if vcpu.pcpu is None:
                return
        self._last[pcpu] = vcpu
        self._slice_end[pcpu] = engine.now + self.slice_ns

    def release(self, vcpu: Vcpu) -> None:
        """``vcpu`` halts, leaves KVM_RUN or is preempted: whoever waits longest gets its physical CPU."""
        pcpu = vcpu.pcpu
        if pcpu is None:
            return
        vcpu.pcpu = None
        if self.waiting:
            heir, task = self.waiting.popleft()
            heir.pcpu = pcpu
            self.engine.wake(task)
        else:
            self._free.append(pcpu)

    def slice_left(self, vcpu: Vcpu) -> int:
        """How long ``vcpu`` may go on computing; a slice that has run out is renewed while nobody waits."""
        pcpu = vcpu.pcpu
        assert pcpu is not None
        now = self.engine.now
        if now >= self._slice_end[pcpu]:
            if self.waiting:
                return 0
            self._slice_end[pcpu] = now + self.slice_ns
        return self._slice_end[pcpu] - now

    def forget(self, vcpu: Vcpu) -> None:
        """``vcpu`` stops waiting (its KVM_RUN was cancelled)."""
        self.waiting = deque(entry for entry in self.waiting if entry[0] is not vcpu)

    def _take_free(self, vcpu: Vcpu) -> None:
        # The physical CPU it ran on last, if that is free: as a scheduler would, for its caches.
        for position, pcpu in enumerate(self._free):
            if self._last[pcpu] is vcpu:
                del self._free[position]
                break
        else:
            pcpu = self._free.pop()
        vcpu.pcpu = pcpu


class StealWait:
    """What a vCPU waits for that is ready to run and has no physical CPU."""

    __slots__ = ("host", "vcpu")

    def __init__(self, host: Host, vcpu: Vcpu) -> None:
        self.host = host
        self.vcpu = vcpu

    def forget(self, task: Hosted) -> None:
        """The wait was cancelled."""
        self.host.forget(self.vcpu)

    def describe(self) -> str:
        """What is waited for."""
        return "a physical CPU"
