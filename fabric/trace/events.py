"""Event records: one JSON object a line, the same bytes for the same scenario and seed.

The first line is a header (schema, scenario name, seed, versions); every other line has ``at`` (nanoseconds
of virtual time) and ``event`` first and then the fields of its kind, always in the same order, integers and
strings only. Nothing about the machine or the moment is written: no wall time, no path, no process id.

A kind that occurs once an interrupt has a format made beforehand by :func:`event_format`; anything rarer goes
through ``note``. Two logs share that interface: :class:`EventFile` streams to a file, :class:`EventRing`
keeps the last few for the report of a failure.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol, TextIO

SCHEMA = "fabric-events/1"

Values = tuple[int | str, ...]

# Lines formatted before they are handed to the stream; larger only costs memory.
_CHUNK = 512


def event_format(event: str, **fields: type) -> str:
    """The ``%`` format of one kind of record: ``at`` and then ``fields``, each ``int`` or ``str``.

    The value of a ``str`` field is handed over as :func:`quoted` gives it.
    """
    conversions = {int: "%d", str: "%s"}
    tail = "".join(f',"{name}":{conversions[kind]}' for name, kind in fields.items())
    return f'{{"at":%d,"event":"{event}"{tail}}}\n'


@lru_cache(maxsize=4096)
def quoted(text: str) -> str:
    """``text`` as a JSON string; remembered, as names and reasons are few."""
    return json.dumps(text)


class EventLog(Protocol):
    """Where event records go."""

    def add(self, line_format: str, values: Values) -> None:
        """One record of a kind made by :func:`event_format`; the first value is the time."""

    def note(self, at: int, event: str, **fields: int | str) -> None:
        """One record of any kind, its fields in the order given."""


def _free_form(at: int, event: str, fields: Mapping[str, int | str]) -> str:
    for name, value in fields.items():
        if not isinstance(value, int | str):
            raise TypeError(f"field {name} of an event record must be an int or a str, not {value!r}")
    return json.dumps({"at": at, "event": event, **fields}, separators=(",", ":")) + "\n"


class EventFile:
    """Streams records to a text stream. ``flush`` (or leaving the ``with`` block) writes what is buffered.

    The stream stays the caller's: opened with ``newline="\\n"``, so that the bytes do not depend on the
    platform, and closed by the caller.
    """

    __slots__ = ("_lines", "_stream")

    def __init__(self, stream: TextIO, *, scenario: str, seed: int, versions: Mapping[str, str]) -> None:
        self._stream = stream
        header = {
            "schema": SCHEMA,
            "scenario": scenario,
            "seed": seed,
            "versions": dict(sorted(versions.items())),
        }
        self._lines = [json.dumps(header, separators=(",", ":")) + "\n"]

    def add(self, line_format: str, values: Values) -> None:
        lines = self._lines
        lines.append(line_format % values)
        if len(lines) >= _CHUNK:
            self.flush()

    def note(self, at: int, event: str, **fields: int | str) -> None:
        self._lines.append(_free_form(at, event, fields))

    def flush(self) -> None:
        """Hand everything recorded so far to the stream."""
        self._stream.write("".join(self._lines))
        self._lines.clear()
        self._stream.flush()

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


class EventRing:
    """Remembers the last ``limit`` records; they are put into words only when somebody asks."""

    __slots__ = ("_last", "recorded")

    def __init__(self, limit: int = 200) -> None:
        if limit < 1:
            raise ValueError(f"limit must be >= 1, not {limit!r}")
        self._last: deque[tuple[str, Values]] = deque(maxlen=limit)
        self.recorded = 0
        """How many records came in, the forgotten ones included."""

    def add(self, line_format: str, values: Values) -> None:
        self.recorded += 1
        self._last.append((line_format, values))

    def note(self, at: int, event: str, **fields: int | str) -> None:
        self.add("%s", (_free_form(at, event, fields),))

    def lines(self) -> list[str]:
        """The records kept, oldest first, without newline."""
        return [(line_format % values).rstrip("\n") for line_format, values in self._last]


class EventTee:
    """Gives every record to two logs."""

    __slots__ = ("_first", "_second")

    def __init__(self, first: EventLog, second: EventLog) -> None:
        self._first = first
        self._second = second

    def add(self, line_format: str, values: Values) -> None:
        self._first.add(line_format, values)
        self._second.add(line_format, values)

    def note(self, at: int, event: str, **fields: int | str) -> None:
        self._first.note(at, event, **fields)
        self._second.note(at, event, **fields)
