"""Runs a scenario: a pure function of the scenario and its seed.

``execute(scenario)`` is all that most callers need; a :class:`Run` can also be watched while it goes on, and asked
for its last events when it failed.
"""

from __future__ import annotations

import attrs
import trio

from fabric.clock import Engine
from fabric.errors import ConfigError
from fabric.scenario.ftrace import Trace, read_trace
from fabric.scenario.model import Scenario, did_you_mean
from fabric.scenario.replay import ReplayPlan, plan_replay
from fabric.scenario.result import RunResult, VcpuResult
from fabric.scenario.setup import Setup, arm_faults, check_faults, set_up
from fabric.trace import EventLog, EventRing, EventTee, LedgerStatement, Recorder
from fabric.vmm import BOARDS

POLL_NS = 1_000_000
"""How often a replay that has come to its end is looked at, whether all is handled; and how long it settles."""
PATIENCE_NS = 1_000_000_000
"""A replay that gets no further for so long is over: what is pending then is held back by a fault, say."""


def execute(
    scenario: Scenario, seed: int | None = None, *, trace: Trace | None = None, log: EventLog | None = None
) -> RunResult:
    """Run ``scenario`` and return its results; arguments and errors as of :class:`Run` and :meth:`Run.execute`."""
    return Run(scenario, seed, trace=trace).execute(log)


class Run:
    """One run of a scenario.

    Args:
      scenario: what to run.
      seed: instead of the scenario's own.
      trace: the trace to replay, already read; by default it is read from the scenario's file.

    Raises:
      ConfigError: the scenario cannot be run; all that is known to be wrong, at once.
    """

    def __init__(self, scenario: Scenario, seed: int | None = None, *, trace: Trace | None = None) -> None:
        self.scenario = scenario if seed is None else attrs.evolve(scenario, seed=seed)
        if trace is None and scenario.replay.trace:
            trace = read_trace(scenario.replay.trace)
        self.plan = None if trace is None else plan_replay(trace, scenario.replay, scenario.vcpus)
        _check(self.scenario, self.plan)
        self.engine = Engine(scenario.seed if seed is None else seed, explore=scenario.explore_ties)
        self._start_ns = 0
        self._until_ns = max(scenario.duration_ns, 1) if self.plan is None else self.plan.last_ns + POLL_NS
        if scenario.duration_ns:
            self._until_ns = scenario.duration_ns
        self._last = EventRing(scenario.trace.last)

    def execute(self, log: EventLog | None = None) -> RunResult:
        """Simulate it, once. Event records go to ``log``.

        Raises:
          SimulationError: the run could not go on, or its ledger does not balance.
          ConfigError: a fault names a channel that the machine does not have.
        """
        try:
            result: RunResult = self.engine.run(
                self._main, (EventTee(log, self._last) if log is not None else self._last,)
            )
        except BaseExceptionGroup as group:
            raise _only(group) from None
        return result

    @property
    def progress(self) -> float:
        """How much of the run's virtual time has passed, from 0 to 1. May be read from another thread."""
        return min(1.0, max(0.0, (self.engine.now - self._start_ns) / self._until_ns))

    def last_events(self) -> list[str]:
        """The last event records, oldest first, as lines of JSON."""
        return self._last.lines()

    async def _main(self, log: EventLog) -> RunResult:
        scenario, engine = self.scenario, self.engine
        setup = set_up(scenario, self.plan, engine)
        check_faults(scenario.fault, setup)
        recorder = Recorder(engine, banked=setup.machine.banked, log=log, name=setup.guest.driver.label)
        setup.machine.vm.listen(recorder)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(setup.machine.run, name="machine")
            self._start_ns = await setup.guest.ready()
            arm_faults(scenario.fault, setup, self._start_ns)
            for source in setup.recorded_sources:
                source.go(self._start_ns)
            if scenario.duration_ns:
                await engine.sleep(scenario.duration_ns)
            elif self.plan is not None:
                await self._play_out(setup, recorder, self.plan)
            ledger: LedgerStatement = setup.machine.vm.ledger.check()
            nursery.cancel_scope.cancel()
        return RunResult(
            scenario=scenario,
            start_ns=self._start_ns,
            end_ns=engine.now,
            ledger=ledger,
            statistics=recorder.statistics(),
            vcpus=tuple(VcpuResult(vcpu.index, vcpu.stolen_ns) for vcpu in setup.machine.vcpus),
            workload=setup.counters(),
            channels=tuple(channel.statistics() for channel in setup.channels().values()),
            replay=self.plan,
        )

    async def _play_out(self, setup: Setup, recorder: Recorder, plan: ReplayPlan) -> None:
        """Until everything recorded was raised and handled."""
        engine = self.engine
        faults = self.scenario.fault
        last_ns = max([plan.last_ns, *(fault.until_ns or fault.from_ns for fault in faults)])
        await engine.sleep(last_ns + max([0, *(fault.delay_ns for fault in faults)]))
        least = None
        since = engine.now
        while engine.now - since < PATIENCE_NS:
            left = plan.count - setup.played() + setup.machine.vm.ledger.statement().pending + recorder.active()
            if not left:
                break
            if least is None or left < least:
                least, since = left, engine.now
            await engine.sleep(POLL_NS)
        await engine.sleep(POLL_NS)


def _check(scenario: Scenario, plan: ReplayPlan | None) -> None:
    """What the schema cannot know."""
    board = BOARDS.get(scenario.board)
    if board is None:
        known = ", ".join(sorted(BOARDS))
        hint = did_you_mean(scenario.board, BOARDS)
        raise ConfigError("scenario", [f"board: must be one of {known}, not {scenario.board!r}{hint}"])
    problems = []
    if scenario.vcpus > board.max_vcpus:
        problems.append(f"vcpus: must be <= {board.max_vcpus} on the board {board.name}, not {scenario.vcpus}")
    least = board.least_memory(scenario.vcpus)
    if scenario.memory_bytes < least:
        problems.append(f"memory_bytes: must be >= {least} for {scenario.vcpus} vCPUs, not {scenario.memory_bytes}")
    vectors = sum(block.queues for block in scenario.block) + sum(network.queues for network in scenario.network)
    if plan is not None:
        vectors += sum(len(device.vcpus) for device in plan.devices)
        if plan.ticks and scenario.tick.hz:
            problems.append("tick.hz: must be 0, as the trace brings the ticks of its timers, and a vCPU has one timer")
    if vectors > board.max_vectors:
        hint = ', or replay.spread = "source"' if plan is not None else ""
        problems.append(
            f"the devices have {vectors} vectors together, and a machine has {board.max_vectors}: use fewer queues,"
            f" fewer vCPUs{hint}"
        )
    if problems:
        raise ConfigError("scenario", problems)


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a nursery wrapped, where it is one exception."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
