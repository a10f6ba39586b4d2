"""The exceptions of fabric.

Three kinds, by what the caller can do about them: :class:`KvmError` is the answer of the simulated kernel and
carries the errno that a real one gives; :class:`SimulationError` and its children end a run that cannot go on;
:class:`ConfigError` says what is wrong with a scenario, a trace or a command line, all of it at once.
Misuse of the Python interface is ``TypeError`` or ``ValueError``, as everywhere.
"""

from __future__ import annotations


class KvmError(OSError):
    """What an ioctl of the simulated kernel answers: an errno and the rule that was broken (api.all.return-style).

    Raised as ``KvmError(errno.EINVAL, f"distributor base {addr:#x} is not 64 KiB aligned")``. It is an
    ``OSError``, so a VMM written against ``fcntl.ioctl`` handles it unchanged.
    """


class FabricError(Exception):
    """Base of everything fabric raises that is neither an errno nor a misuse of the Python interface."""


class SimulationError(FabricError):
    """The run cannot go on."""


class Deadlock(SimulationError):
    """Nothing is runnable, nothing is scheduled, and somebody waits.

    ``waiting`` lists, in task order, ``(task name, what it waits for)``.
    """

    def __init__(self, message: str, waiting: list[tuple[str, str]]) -> None:
        super().__init__(message)
        self.waiting = waiting


class LedgerError(SimulationError):
    """``raised == delivered + coalesced + pending + dropped`` does not hold: an interrupt was lost or invented."""


class ConfigError(FabricError):
    """A scenario, trace or request is wrong; ``problems`` holds every problem found, one sentence each."""

    def __init__(self, where: str, problems: list[str]) -> None:
        super().__init__(f"{where}: " + "; ".join(problems))
        self.where = where
        self.problems = problems
