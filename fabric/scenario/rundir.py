"""The run directory: what was run, and what came of it.

=================  ==================================================================================
``scenario.toml``  the resolved scenario, every key with its value; ``fabric run`` repeats the run
``run.json``       seed and versions
``stats.json``     the results, with whole histograms
``trace.jsonl``    the event records (unless ``trace.events`` is off)
=================  ==================================================================================

It is written beside its place and moved there when the run is over, so it is whole or not there. ``stats.json`` and
``trace.jsonl`` depend on nothing but scenario and seed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TextIO

import attrs
import trio

from fabric import __version__
from fabric.errors import ConfigError
from fabric.scenario.load import to_toml
from fabric.scenario.model import Scenario
from fabric.scenario.result import RunResult
from fabric.trace import EventFile

SCHEMA = "fabric-run/1"
SCENARIO, RUN, STATS, TRACE = FILES = ("scenario.toml", "run.json", "stats.json", "trace.jsonl")


class RunDirectory:
    """A run directory in the making; to be used in a ``with`` block.

    Args:
      path: where it is to be. A directory that is there already must be empty or of an earlier run, which it then
        replaces; files of others in it stay.
      force: write into any directory.

    Raises:
      ConfigError: it may not be there, or cannot.
    """

    def __init__(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        self.path = Path(os.path.realpath(path))
        self._where = os.fspath(path)
        self._new = self.path
        self._stream: TextIO | None = None
        self._events: EventFile | None = None
        try:
            if self.path.exists() and not self.path.is_dir():
                raise self._refused("a file has its name")
            if not force and self.path.is_dir() and any(self.path.iterdir()) and not _is_of_a_run(self.path):
                raise self._refused(
                    "it is not empty, and not of an earlier run; with --force it is written all the same"
                )
        except OSError as error:
            raise self._refused(str(error.strerror)) from error

    def __enter__(self) -> RunDirectory:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._new = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
            self._new.chmod(0o777 & ~_umask())
        except OSError as error:
            raise self._refused(str(error.strerror)) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._new != self.path:
            shutil.rmtree(self._new, ignore_errors=True)

    def events(self, scenario: Scenario) -> EventFile | None:
        """The log for the run's event records; None if the scenario wants none."""
        if not scenario.trace.events:
            return None
        self._stream = (self._new / TRACE).open("w", encoding="utf-8", newline="\n")
        versions = {"fabric": __version__}
        self._events = EventFile(self._stream, scenario=scenario.name, seed=scenario.seed, versions=versions)
        return self._events

    def finish(self, result: RunResult) -> None:
        """Write the results and put the directory in its place."""
        about = {
            "schema": SCHEMA,
            "scenario": result.scenario.name,
            "seed": result.scenario.seed,
            "versions": {
                "fabric": __version__,
                "python": platform.python_version(),
                "trio": trio.__version__,
                "attrs": str(attrs.__version__),
            },
        }
        try:
            if self._events is not None and self._stream is not None:
                self._events.flush()
                self._stream.close()
            self._write(SCENARIO, to_toml(result.scenario))
            self._write(STATS, _json(result.to_dict(buckets=True)))
            self._write(RUN, _json(about))
            self._move()
        except OSError as error:
            raise self._refused(str(error.strerror)) from error

    def _write(self, name: str, text: str) -> None:
        (self._new / name).write_text(text, encoding="utf-8", newline="\n")

    def _move(self) -> None:
        there = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        if not there:
            self._new.rename(self.path)  # also over an empty directory
        elif there <= set(FILES):
            old = self._new.with_name(self._new.name + ".old")
            self.path.rename(old)
            self._new.rename(self.path)
            shutil.rmtree(old)
        else:
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
            for entry in sorted(self._new.iterdir(), key=lambda entry: entry.name == RUN):
                entry.rename(self.path / entry.name)

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(self._where, [f"the run directory cannot be written: {why}"])


def _is_of_a_run(path: Path) -> bool:
    try:
        about = json.loads((path / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and about.get("schema") == SCHEMA


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _json(document: object) -> str:
    return json.dumps(document, indent=1) + "\n"
