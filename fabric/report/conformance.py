"""The inventory against the tests as text: a table an interface, and one of all interfaces.

On a terminal it is coloured and fits its width; otherwise plain text whose ids are whole, to be grepped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from fabric.conformance import Coverage, Row
from fabric.report.text import table

_HEAD = ("spec id", "implemented", "tests")
_SUMMARY = ("interface", "ids", "covered", "holes")
_HOLE = "HOLE"
_TESTS_WIDTH = 30
"""Columns that are worth a table: less would not show which test it is."""


def render(coverage: Coverage, *, holes_only: bool = False) -> str:
    """The whole report as plain text."""
    blocks = [table(_HEAD, rows, left=3) for _, rows in _tables(coverage, holes_only)]
    return "\n\n".join([*blocks, table(_SUMMARY, _summary(coverage))])


def show(coverage: Coverage, *, holes_only: bool = False) -> None:
    """The same on a terminal; on one that is too narrow for a table as plain lines."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    tables = list(_tables(coverage, holes_only))
    widest = max((len(row[0]) + len(row[1]) for _, rows in tables for row in rows), default=0)
    if widest + _TESTS_WIDTH > console.width:
        print(render(coverage, holes_only=holes_only))
        return
    for interface, rows in tables:
        grid = Table(title=interface, title_justify="left", title_style="bold", box=None, pad_edge=False)
        # Ids and places are searched for and copied: where there is no room the tests are cut short.
        for column, head in enumerate(_HEAD[:-1]):
            grid.add_column(head, no_wrap=True, min_width=max(len(row[column]) for row in rows))
        grid.add_column(_HEAD[-1], no_wrap=True, overflow="ellipsis")
        for *cells, tests in rows:
            grid.add_row(*cells, f"[bold red]{tests}" if tests == _HOLE else escape(tests))
        console.print(grid, "")
    grid = Table(box=None, pad_edge=False)
    grid.add_column(_SUMMARY[0])
    for head in _SUMMARY[1:]:
        grid.add_column(head, justify="right")
    for line in _summary(coverage):
        grid.add_row(*line, style="red" if line[-1] != "0" else "green")
    console.print(grid)


def _tables(coverage: Coverage, holes_only: bool) -> Iterator[tuple[str, list[list[str]]]]:
    for interface, rows in _interfaces(coverage):
        shown = [row for row in rows if not holes_only or row.id not in coverage.tests]
        if shown:
            yield interface, [_line(coverage, row) for row in shown]


def _interfaces(coverage: Coverage) -> Iterator[tuple[str, list[Row]]]:
    for interface, rows in groupby(coverage.rows, lambda row: row.interface):
        yield interface, list(rows)


def _line(coverage: Coverage, row: Row) -> list[str]:
    tests = coverage.tests.get(row.id, [])
    more = f" and {len(tests) - 1} more" if len(tests) > 1 else ""
    return [row.id, str(coverage.places.get(row.id, "-")), f"{tests[0]}{more}" if tests else _HOLE]


def _summary(coverage: Coverage) -> list[Sequence[str]]:
    lines: list[Sequence[str]] = []
    for interface, rows in [*_interfaces(coverage), ("all", coverage.rows)]:
        covered = sum(row.id in coverage.tests for row in rows)
        lines.append((interface, str(len(rows)), str(covered), str(len(rows) - covered)))
    return lines
