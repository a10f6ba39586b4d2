"""What a run leaves behind: the ledger of all interrupts, latency histograms, event records."""

from __future__ import annotations

from fabric.trace.ledger import Ledger, LedgerStatement

__all__ = ["Ledger", "LedgerStatement"]
