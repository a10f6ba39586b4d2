"""What a run leaves behind: the ledger of all interrupts, latency histograms, event records."""

from __future__ import annotations

from fabric.trace.events import EventFile, EventLog, EventRing, EventTee, event_format, quoted
from fabric.trace.histogram import PERCENTILES, Histogram
from fabric.trace.ledger import Ledger, LedgerStatement
from fabric.trace.recorder import STAGES, Passage, Recorder, Statistics

__all__ = [
    "PERCENTILES",
    "STAGES",
    "EventFile",
    "EventLog",
    "EventRing",
    "EventTee",
    "Histogram",
    "Ledger",
    "LedgerStatement",
    "Passage",
    "Recorder",
    "Statistics",
    "event_format",
    "quoted",
]
