"""What the drivers of every GIC have in common: handlers by interrupt number, IPIs as SGIs, the CPU's own timer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric.guest.driver import IPI_KINDS

if TYPE_CHECKING:
    from fabric.guest.driver import Handler

SPURIOUS_FIRST, SPURIOUS_LAST = 1020, 1023
DEFAULT_PRIORITY = 0xA0
PMR_ALL = 0xF0
ALL_SGIS = 0xFFFF
PPI_VTIMER = 27


class GicDriver:
    """The part of a GIC driver that does not depend on the GIC's version; ``cpus`` is how many CPUs the guest has."""

    def __init__(self, cpus: int) -> None:
        self.cpus = cpus
        self._actions: list[dict[int, Handler]] = [{} for _ in range(cpus)]
        """For each CPU: INTID to handler."""
        self._labels: dict[int, str] = {0: "IPI", PPI_VTIMER: "timer"}
        self._timer_handlers: list[Handler | None] = [None] * cpus
        self._frequency = 0

    async def enable_private(self, cpu: Any, intids: int) -> None:
        """Enable SGIs and PPIs of this CPU: bit n of ``intids`` is INTID n."""
        raise NotImplementedError

    def on_ipi(self, handler: Handler, kind: int = 0, label: str = "IPI") -> None:
        """SGI number ``kind`` runs ``handler``."""
        if not 0 <= kind < IPI_KINDS:
            raise ValueError(f"the kind of an IPI must be 0 to {IPI_KINDS - 1}, not {kind!r}")
        for actions in self._actions:
            actions[kind] = handler
        self._labels[kind] = label

    async def set_timer(self, cpu: Any, at_ns: int, handler: Handler) -> None:
        """The virtual timer fires at the first counter tick at or after ``at_ns``."""
        number = cpu.number
        actions = self._actions[number]
        if PPI_VTIMER not in actions:
            self._frequency = await cpu.mrs("CNTFRQ_EL0")
            await self.enable_private(cpu, 1 << PPI_VTIMER)
            actions[PPI_VTIMER] = self._timer_fired
        self._timer_handlers[number] = handler
        ahead = max(0, at_ns - cpu.now)
        ticks = -(-ahead * self._frequency // 1_000_000_000)
        await cpu.msr("CNTV_CVAL_EL0", await cpu.mrs("CNTVCT_EL0") + ticks)
        await cpu.msr("CNTV_CTL_EL0", 1)

    async def _timer_fired(self, cpu: Any) -> None:
        # The line is level-triggered: quiet it before the interrupt ends.
        await cpu.msr("CNTV_CTL_EL0", 0)
        handler = self._timer_handlers[cpu.number]
        if handler is not None:
            await handler(cpu)

    def label(self, number: int, cpu: int = 0) -> str:
        """What INTID ``number`` is."""
        return self._labels.get(number, f"INTID {number}")
