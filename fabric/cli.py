"""The command ``fabric``.

Results go to standard output, everything else to standard error. Exit status: 0 done, 1 the simulation failed, 2 the
request was wrong. What a command needs is imported when it runs, so that ``fabric --help`` answers at once.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fabric import __version__
from fabric.errors import ConfigError, FabricError

if TYPE_CHECKING:
    from fabric.scenario.ftrace import Trace
    from fabric.scenario.model import Scenario
    from fabric.scenario.run import Run

DONE, FAILED, WRONG = 0, 1, 2
_INTERRUPTED = 130
_LAST_EVENTS = 20
"""Event records shown of a failed run."""

app = typer.Typer(
    help="Simulates the interrupt traffic of whole guests, and the KVM interface that a VMM drives it through.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Format(StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"


# Numbers are taken as text and checked with the rest of the scenario, so that all mistakes are told at once.
SeedOption = Annotated[str | None, typer.Option("--seed", metavar="N", help="Of everything random in the run.")]
OutOption = Annotated[str | None, typer.Option("-o", "--output", metavar="DIR", help="Write a run directory.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Write into DIR even if it holds other files.")]
FormatOption = Annotated[Format, typer.Option("--format", help="Of the results on standard output.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the scenario, such as costs.exit_ns=500."),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments`` (by default the process's); returns the exit status."""
    if arguments is None:
        # A trace makes hundreds of thousands of objects, all of which stay: looking for garbage among them every
        # 700 allocations takes as long as reading it.
        gc.set_threshold(200_000)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(given, prog_name="fabric", obj=given)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else WRONG
    finally:
        if arguments is None:
            gc.freeze()  # nor is there any need to look for it once more before the process ends
    return DONE


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fabric {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def run(
    context: typer.Context,
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO.toml", help="The scenario.")],
    settings: SetOption = None,
    seed: SeedOption = None,
    output: OutOption = None,
    force: ForceOption = False,
    form: FormatOption = Format.TEXT,
) -> None:
    """Run a scenario.

    Example: fabric run examples/block-and-network-16.toml --set vcpus=32 -o out
    """
    from fabric.scenario.load import load_scenario
    from fabric.vmm import BOARDS

    request = _Request(context, form)
    overrides = request.overrides({"seed": seed}, settings)
    found = request.collect(lambda: load_scenario(scenario, overrides, BOARDS))
    trace = None
    if found is not None and found.replay.trace:
        trace = request.collect(lambda: _read(found.replay.trace))
    request.execute(found, trace, output, force)


@app.command()
def replay(
    context: typer.Context,
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="Text of trace-cmd, perf script or ftrace; gz, xz.")],
    board: Annotated[str | None, typer.Option("--board", metavar="BOARD", help="See fabric boards.")] = None,
    vcpus: Annotated[
        str | None, typer.Option("--vcpus", metavar="N", help="Default: as many as the trace has CPUs.")
    ] = None,
    pcpus: Annotated[str | None, typer.Option("--pcpus", metavar="N", help="Physical CPUs that they share.")] = None,
    scale: Annotated[
        str | None, typer.Option("--scale", metavar="X", help="Multiply all times; 1/2 is twice as fast.")
    ] = None,
    spread: Annotated[
        str | None,
        typer.Option("--spread", metavar="HOW", help="turn: a source's interrupts take turns; source: one vCPU each."),
    ] = None,
    settings: SetOption = None,
    seed: SeedOption = None,
    output: OutOption = None,
    force: ForceOption = False,
    form: FormatOption = Format.TEXT,
) -> None:
    """Replay the interrupts of a recorded trace through a simulated guest.

    Example: fabric replay trace.txt.gz --board arm64-gicv3 --vcpus 16
    """
    from fabric.scenario.load import make_scenario
    from fabric.vmm import BOARDS

    request = _Request(context, form)
    read = request.collect(lambda: _read(trace))
    if vcpus is None and read is not None:
        vcpus = str(max(1, read.cpus))
    options = {"board": board, "vcpus": vcpus, "pcpus": pcpus, "replay.scale": scale, "replay.spread": spread}
    overrides = request.overrides({**options, "seed": seed}, settings)
    document = {"name": _name_of(trace), "duration_ns": 0, "replay": {"trace": os.path.abspath(trace)}}
    found = request.collect(lambda: make_scenario(document, overrides, BOARDS, "fabric replay"))
    request.execute(found, read, output, force)


@app.command()
def boards(seed: SeedOption = None, output: OutOption = None, form: FormatOption = Format.TEXT) -> None:
    """List the boards.

    Takes the options of every command: there is nothing random in a list, and -o writes it as DIR/boards.json.
    """
    from fabric.report.text import table
    from fabric.vmm import BOARDS

    document = json.dumps({"boards": [board.describe() for board in BOARDS.values()]}, indent=1)
    _write(output, "boards.json", document)
    if form is Format.JSON:
        _print(document)
        return
    rows = [[str(value) for value in board.describe().values()] for board in BOARDS.values()]
    _print(table(["board", "architecture", "vCPUs", "what it is"], rows, left=4))


@app.command()
def conformance(
    context: typer.Context,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="PREFIX", help="Ids that begin so, such as its or vcpu.pmu.")
    ] = None,
    arch: Annotated[str | None, typer.Option("--arch", metavar="ARCH", help="What concerns it, as aarch64.")] = None,
    project: Annotated[
        str | None, typer.Option("--project", metavar="DIR", help="Whose tests; default: the working directory.")
    ] = None,
    holes: Annotated[bool, typer.Option("--holes", help="List only what no test covers.")] = False,
    seed: SeedOption = None,
    output: OutOption = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Compare the inventory of the KVM interface with the tests: what is where, and what no test covers.

    Exit status 1 when an id has no test. Takes the options of every command: nothing is random, and -o writes the
    JSON document as DIR/conformance.json.

    Example: fabric conformance --arch aarch64 --only its --only vgic-v3
    """
    from fabric.conformance import examine, find_project
    from fabric.report.conformance import render, show

    request = _Request(context, form)
    found = request.collect(lambda: examine(find_project(project), only or (), arch))
    if found is None:
        request.refuse()
    document = json.dumps(found.to_dict(), indent=1)
    _write(output, "conformance.json", document)
    if form is Format.JSON:
        _print(document)
    elif sys.stdout.isatty():
        show(found, holes_only=holes)
    else:
        _print(render(found, holes_only=holes))
    for problem in found.problems:
        print(f"fabric: {problem}", file=sys.stderr)
    if not found.complete:
        raise typer.Exit(FAILED)


class _Request:
    """What one command was asked for: collects everything wrong with it, then runs it."""

    def __init__(self, context: typer.Context, form: Format) -> None:
        self.arguments: list[str] = context.obj
        self.form = form
        self.problems: list[tuple[str, str]] = []

    def collect(self, get: Callable[[], Any]) -> Any:
        """What ``get()`` returns, or None with its problems noted."""
        try:
            return get()
        except ConfigError as error:
            self.note(error)
            return None

    def note(self, error: ConfigError) -> None:
        """One more thing is wrong with the request."""
        self.problems += [(error.where, problem) for problem in error.problems]

    def overrides(self, options: dict[str, str | None], settings: list[str] | None) -> dict[str, Any]:
        """The keys of the scenario that options and ``--set`` set."""
        from fabric.scenario.load import parse_override

        given = [f"{key}={value}" for key, value in options.items() if value is not None]
        parsed = [self.collect(lambda text=text: parse_override(text)) for text in [*(settings or []), *given]]  # type: ignore[misc]
        return dict(one for one in parsed if one is not None)

    def execute(self, scenario: Scenario | None, trace: Trace | None, output: str | None, force: bool) -> None:
        """Run the scenario and print the results; ends the command."""
        from fabric.scenario.run import Run
        from fabric.scenario.rundir import RunDirectory

        directory = output and self.collect(lambda: RunDirectory(output, force=force))
        simulation = scenario and not self.problems and self.collect(lambda: Run(scenario, trace=trace))
        if not simulation or self.problems:
            self.refuse()
        try:
            with directory or nullcontext(), self._progress(simulation):
                began = time.monotonic()
                result = simulation.execute(directory.events(simulation.scenario) if directory else None)
                took = time.monotonic() - began
                if directory:
                    directory.finish(result)
        except ConfigError as error:
            self.note(error)
            self.refuse()
        except KeyboardInterrupt:
            print("fabric: interrupted", file=sys.stderr)
            raise typer.Exit(_INTERRUPTED) from None
        except Exception as error:
            self.fail(error, simulation)
        if self.form is Format.JSON:
            _print(json.dumps(result.to_dict(), indent=1))
            return
        from fabric.report.text import duration, render

        _print(render(result).rstrip("\n"))
        where = f"; run directory {output}" if output else ""
        print(f"\n{duration(result.end_ns)} simulated in {took:.2f} s{where}", file=sys.stderr)

    def refuse(self) -> NoReturn:
        """The request was wrong: say all of it."""
        for where in dict.fromkeys(where for where, _ in self.problems):
            problems = [problem for other, problem in self.problems if other == where]
            if len(problems) == 1:
                print(f"fabric: {where}: {problems[0]}", file=sys.stderr)
            else:
                print(f"fabric: {where}:", *problems, sep="\n  ", file=sys.stderr)
        if self.form is Format.JSON:
            problems = [f"{where}: {problem}" for where, problem in self.problems]
            _print(json.dumps({"error": {"kind": "request", "problems": problems}}, indent=1))
        raise typer.Exit(WRONG)

    def fail(self, error: Exception, simulation: Run) -> NoReturn:
        """The simulation failed: say why, what happened last, and how to see it again."""
        events = simulation.last_events()[-_LAST_EVENTS:]
        if not isinstance(error, FabricError):
            traceback.print_exception(error)
        if events:
            print("last events:", *events, sep="\n  ", file=sys.stderr)
        text = f"{type(error).__name__}: {error}"
        command = self._again(simulation.scenario.seed)
        print(f"fabric: the simulation failed: {text}", f"to repeat it: {command}", sep="\n", file=sys.stderr)
        if self.form is Format.JSON:
            document = {"kind": "simulation", "problems": [text], "repeat": command, "events": events}
            _print(json.dumps({"error": document}, indent=1))
        raise typer.Exit(FAILED)

    def _again(self, seed: int) -> str:
        """The command that repeats this run."""
        arguments = list(self.arguments)
        if not any(re.match(r"--seed\b", argument) for argument in arguments):
            arguments += ["--seed", str(seed)]
        return shlex.join(["fabric", *arguments])

    @contextmanager
    def _progress(self, simulation: Run) -> Iterator[None]:
        if not sys.stderr.isatty():
            yield
            return
        from fabric.report.progress import shown

        with shown(lambda: simulation.progress, simulation.scenario.name):
            yield


def _read(path: str) -> Any:
    from fabric.scenario.ftrace import read_trace

    return read_trace(path)


def _name_of(path: str) -> str:
    """A scenario's name after the file of its trace."""
    stem = PurePath(path).name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]", "-", stem).lstrip("_-")[:64] or "replay"


def _write(output: str | None, name: str, document: str) -> None:
    """Leave a document in the directory that was asked for."""
    if output is None:
        return
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        Path(output, name).write_text(document + "\n", encoding="utf-8")
    except OSError as error:
        print(f"fabric: {output}: {name} cannot be written: {error.strerror}", file=sys.stderr)
        raise typer.Exit(WRONG) from None


def _print(text: str) -> None:
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read it has seen enough. Python would complain again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
