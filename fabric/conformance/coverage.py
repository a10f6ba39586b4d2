"""The inventory and the tests side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from fabric.conformance.marks import Marks, Test, read_marks
from fabric.conformance.places import PACKAGE, Place, find_places
from fabric.conformance.rows import ARCHITECTURES, Row, read_inventory
from fabric.errors import ConfigError


@attrs.frozen
class Coverage:
    """Rows of the inventory with where they are implemented and what tests them."""

    rows: list[Row]
    places: dict[str, Place]
    tests: dict[str, list[Test]]
    problems: list[str]
    """Marks that are wrong, of all tests: an id that the inventory does not have, one that cannot be read."""

    @property
    def holes(self) -> list[str]:
        """Ids that no test claims."""
        return [row.id for row in self.rows if row.id not in self.tests]

    @property
    def complete(self) -> bool:
        """No hole, and no wrong mark."""
        return not self.holes and not self.problems

    def to_dict(self) -> dict[str, Any]:
        """``total``, ``covered`` and the ids of the ``holes``."""
        holes = self.holes
        return {"total": len(self.rows), "covered": len(self.rows) - len(holes), "holes": holes}


def find_project(given: str | None = None) -> Path:
    """The directory whose ``tests`` are examined: the given one, else the working directory, else the checkout that
    fabric runs from.

    Raises:
        ConfigError: there are no tests that are marked with ids.
    """
    candidates = [Path(given)] if given is not None else [Path(), PACKAGE.parent]
    for project in candidates:
        if any("mark.spec" in path.read_text(encoding="utf-8") for path in (project / "tests").glob("test_*.py")):
            return project
    where = given if given is not None else str(Path.cwd())
    problem = "there is no directory tests with tests that are marked with ids of the inventory"
    raise ConfigError(where, [f"{problem}: run it in a source checkout, or name one with --project DIR"])


def examine(project: Path, only: Sequence[str] = (), arch: str | None = None) -> Coverage:
    """Compare the inventory with the tests of ``project``.

    Args:
        only: take the rows whose id begins with one of these.
        arch: take the rows that are about this architecture.

    Raises:
        ConfigError: a prefix that no id has, an architecture that there is not, a test file that is no Python.
    """
    inventory = read_inventory()
    problems = [f"only: no id begins with {prefix!r}" for prefix in only if not _begin(inventory, [prefix])]
    if arch is not None and arch not in ARCHITECTURES and arch not in ARCHITECTURES.values():
        problems.append(f"arch: must be one of {', '.join(ARCHITECTURES)}, not {arch!r}")
    try:
        marks = read_marks(project / "tests")
    except SyntaxError as error:
        marks = Marks({}, [])
        problems.append(f"{error.filename}:{error.lineno}: {error.msg}")
    if problems:
        raise ConfigError("conformance", problems)
    ids = _begin(inventory, only) if only else list(inventory)
    rows = [inventory[id] for id in ids if arch is None or inventory[id].concerns(arch)]
    unknown = [
        f"{test.file}:{test.line}: {test.name} is marked with {id!r}, which is not in the inventory"
        for id, tests in marks.tests.items()
        if id not in inventory
        for test in tests
    ]
    return Coverage(rows, find_places(inventory), marks.tests, unknown + marks.problems)


def _begin(inventory: dict[str, Row], prefixes: Sequence[str]) -> list[str]:
    return [id for id in inventory if id.startswith(tuple(prefixes))]
