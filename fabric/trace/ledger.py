"""The ledger: what became of every interrupt that was raised.

Each ends as exactly one of delivered (a vCPU took it), coalesced (merged into one that was pending already),
pending (still waiting when the run ended) or dropped with a named reason. The first two and the drops are
counted as they happen, on the hot path, by whoever decides the interrupt's fate. What is pending is *not*
counted along: it is found by walking the state of the devices when a statement is asked for. The two sides of
the equation thus come from different places, and a lost or invented interrupt shows as a difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from fabric.errors import LedgerError

Probe = Callable[[], int]


@attrs.frozen(slots=True)
class LedgerStatement:
    """A ledger at one moment. Statements add up: ``sum(statements, LedgerStatement())`` is a whole host's."""

    raised: int = 0
    """Interrupts that arrived at a controller, or are on their way to one."""
    delivered: int = 0
    """Interrupts a vCPU took."""
    coalesced: int = 0
    """Interrupts that met one pending already and were merged into it."""
    pending: int = 0
    """Interrupts that still wait in a controller, or travel in a channel or are held there."""
    dropped: dict[str, int] = attrs.field(factory=dict)
    """Interrupts thrown away, by reason; reasons in alphabetical order."""

    @property
    def missing(self) -> int:
        """Raised interrupts of which no trace is left; negative when more came out than went in."""
        return self.raised - self.delivered - self.coalesced - self.pending - sum(self.dropped.values())

    @property
    def balanced(self) -> bool:
        """Nothing was lost, nothing invented, and no count is negative."""
        counts = (self.raised, self.delivered, self.coalesced, self.pending, *self.dropped.values())
        return self.missing == 0 and min(counts) >= 0

    def __add__(self, other: LedgerStatement) -> LedgerStatement:
        if not isinstance(other, LedgerStatement):
            return NotImplemented
        reasons = sorted({*self.dropped, *other.dropped})
        return LedgerStatement(
            self.raised + other.raised,
            self.delivered + other.delivered,
            self.coalesced + other.coalesced,
            self.pending + other.pending,
            {reason: self.dropped.get(reason, 0) + other.dropped.get(reason, 0) for reason in reasons},
        )

    def to_dict(self) -> dict[str, Any]:
        """The statement as it stands in JSON output: four ints and ``dropped``, reason to int."""
        return {
            "raised": self.raised,
            "delivered": self.delivered,
            "coalesced": self.coalesced,
            "pending": self.pending,
            "dropped": dict(self.dropped),
        }

    def __str__(self) -> str:
        text = (
            f"raised {self.raised} = delivered {self.delivered} + coalesced {self.coalesced}"
            f" + pending {self.pending} + dropped {sum(self.dropped.values())}"
        )
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
        return f"{text} ({reasons})" if reasons else text


class Ledger:
    """The running account of one VM (or of several that share it).

    Controllers do ``ledger.raised += 1`` inline: an attribute of a slotted object is the cheapest counter
    Python has. Whoever throws an interrupt away calls :meth:`drop` with the reason in words.
    """

    __slots__ = ("_final", "_in_flight", "_pending", "coalesced", "delivered", "dropped", "handed_over", "raised")

    def __init__(self) -> None:
        self.raised = 0
        self.delivered = 0
        self.coalesced = 0
        self.dropped: dict[str, int] = {}
        self.handed_over = 0
        """Interrupts that went on in another VM (:meth:`hand_over`)."""
        self._final: LedgerStatement | None = None
        self._pending: list[Probe] = []
        self._in_flight: list[Probe] = []

    def drop(self, reason: str, n: int = 1) -> None:
        """Account for ``n`` raised interrupts that were thrown away."""
        if n:
            self.dropped[reason] = self.dropped.get(reason, 0) + n

    def add_pending_probe(self, probe: Probe) -> None:
        """``probe()`` walks a device's state and says how many raised interrupts still wait in it."""
        self._pending.append(probe)

    def remove_pending_probe(self, probe: Probe) -> None:
        """The device goes away; what it still held must have been dropped by its owner."""
        self._pending.remove(probe)

    def add_in_flight_probe(self, probe: Probe) -> None:
        """``probe()`` says how many interrupts a channel holds that no controller counted as raised yet."""
        self._in_flight.append(probe)

    def remove_in_flight_probe(self, probe: Probe) -> None:
        """The channel goes away."""
        self._in_flight.remove(probe)

    def statement(self) -> LedgerStatement:
        """The account as of now; asks every probe, so its cost is that of a walk over the pending state."""
        if self._final is not None:
            return self._final
        in_flight = sum(probe() for probe in self._in_flight)
        return LedgerStatement(
            self.raised + in_flight,
            self.delivered,
            self.coalesced,
            sum(probe() for probe in self._pending) + in_flight,
            dict(sorted(self.dropped.items())),
        )

    def hand_over(self) -> None:
        """The guests leave this VM, and with them what its controllers hold: that is no longer in this account.

        What the VM does from here on is nobody's, so its statement stands still until :meth:`take_back`. What travels
        in a channel, or is held there, does not come along and stays in it as pending. Checks.
        """
        statement = self.check()
        left_behind = sum(probe() for probe in self._in_flight)
        self.handed_over = gone = statement.pending - left_behind
        self._final = attrs.evolve(statement, raised=statement.raised - gone, pending=left_behind)

    def take_over(self, pending: int, reason: str) -> None:
        """The account of a restored VM begins: ``pending`` interrupts were handed over to it.

        Those of them that are not pending in it were lost on the way, for ``reason``; LedgerError when there are more.
        """
        found = sum(probe() for probe in self._pending)
        if found > pending:
            raise LedgerError(f"{pending} interrupts were handed over, and {found} are pending where they came to")
        self.raised = pending
        self.delivered = self.coalesced = 0
        self.dropped = {reason: pending - found} if found < pending else {}

    def take_back(self) -> None:
        """The guests are in this VM again. Without a :meth:`hand_over` before: nothing."""
        self.handed_over = 0
        self._final = None

    def close(self, reason: str) -> LedgerStatement:
        """The end of a VM: what is still pending or under way is dropped, probes are forgotten. Checks."""
        statement = self.check()
        dropped = dict(statement.dropped)
        if statement.pending:
            dropped[reason] = dropped.get(reason, 0) + statement.pending
        self._pending.clear()
        self._in_flight.clear()
        self._final = attrs.evolve(statement, pending=0, dropped=dict(sorted(dropped.items())))
        return self._final

    def check(self) -> LedgerStatement:
        """The statement, if it balances; LedgerError with the whole account otherwise."""
        statement = self.statement()
        if not statement.balanced:
            lost = statement.missing
            verdict = f"{lost} lost" if lost > 0 else f"{-lost} invented" if lost < 0 else "a count is negative"
            raise LedgerError(f"the ledger does not balance, {verdict}: {statement}")
        return statement
