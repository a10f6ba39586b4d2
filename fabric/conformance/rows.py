"""The inventory as rows: everything in it that has an id, and what it is part of.

The inventory is one TOML file an interface (``inventory/README.md`` has the schema). An ioctl, an attribute, a
register or a layout is a row; so are its errors, rules and notes, and the steps of a sequence.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, Final

import attrs

ARCHITECTURES: Final[dict[str, str]] = {
    "aarch64": "arm64",
    "x86_64": "x86",
    "ppc64": "powerpc",
    "ppce500": "powerpc",
    "s390x": "s390",
    "mips64": "mips",
}
"""Names of :class:`~fabric.kvm.Kvm` to those of the inventory."""

_NAMES = "|".join(dict.fromkeys(ARCHITECTURES.values()))
_BEGINS_WITH_ONE = re.compile(rf"(?:{_NAMES})\b")
_ONE = re.compile(rf"\b(?:{_NAMES})\b")
_ALL = frozenset({"all", "any"})


@attrs.frozen
class Row:
    """Something that the interface promises."""

    id: str
    parent: Row | None
    """What it is part of; None for an interface."""
    kind: str
    """The table it is in: ``ioctl``, ``attr``, ``errors``, ``rules``, ``steps``, ..."""
    name: str
    """Its name in the C headers, or empty; of an interface the type of its device."""
    kernel: str
    """Of an error: what Linux 6.1 does with it, ``never``, ``host``, ``nomem`` and so on, or empty."""
    architectures: frozenset[str]
    """Those that it is about, in the inventory's names; empty for all."""

    @property
    def interface(self) -> str:
        """Id of the interface that it belongs to."""
        return self.id if self.parent is None else self.parent.interface

    def concerns(self, architecture: str) -> bool:
        """Whether it is about an architecture, by either of its names."""
        return not self.architectures or ARCHITECTURES.get(architecture, architecture) in self.architectures


def read_inventory() -> dict[str, Row]:
    """Every row by id, in the order of the files."""
    rows: dict[str, Row] = {}
    uses: dict[str, list[str]] = {}
    for file in sorted(files(__package__).joinpath("inventory").iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".toml"):
            continue
        document = tomllib.loads(file.read_text(encoding="utf-8"))
        head = document.pop("interface")
        interface = _row(head, None, "interface")
        for row, table in [(interface, head), *_below(document, interface)]:
            if row.id in rows:
                raise ValueError(f"{file.name}: {row.id} must be in the inventory once")
            rows[row.id] = row
            common = (step for step in table.get("steps", ()) if not _BEGINS_WITH_ONE.match(step["do"]))
            uses[row.id] = [used for step in common for used in step.get("uses", ())]
    return {id: _narrowed(row, rows, uses) for id, row in rows.items()}


def _below(table: dict[str, Any], parent: Row) -> Iterator[tuple[Row, dict[str, Any]]]:
    for kind, value in table.items():
        for inner in value if isinstance(value, list) else ():
            if isinstance(inner, dict) and "id" in inner:
                row = _row(inner, parent, kind, table.get("enable", ""))
                yield row, inner
                yield from _below(inner, row)


def _row(table: dict[str, Any], parent: Row | None, kind: str, enable: str = "") -> Row:
    listed = frozenset(table.get("architectures", ()))
    if listed:
        architectures = frozenset() if listed & _ALL else listed
    else:
        architectures = parent.architectures if parent is not None else frozenset()
        # "x86: no in-kernel irqchip" speaks of x86 in a table for all.
        text = table.get("when") or table.get("text") or table.get("do") or ""
        if table.get("ops") == ["enable"] and _ONE.search(enable):
            architectures = frozenset(_ONE.findall(enable))  # "vm (x86)": nobody else can enable it
        elif _BEGINS_WITH_ONE.match(text):
            architectures = frozenset(_ONE.findall(text))
    name = table.get("name") or table.get("device") if kind == "interface" else table.get("name")
    return Row(table["id"], parent, kind, name or "", table.get("kernel", ""), architectures)


def _narrowed(row: Row, rows: dict[str, Row], uses: dict[str, list[str]]) -> Row:
    """A sequence is for those that have everything it uses, but in steps for others; so are its steps and notes."""
    sequence = row if row.kind == "sequence" or row.parent is None else row.parent
    if sequence.kind != "sequence":
        return row
    for used in uses[sequence.id]:
        other = rows[used].architectures
        if other and row.architectures:
            row = attrs.evolve(row, architectures=row.architectures & other)
        elif other:
            row = attrs.evolve(row, architectures=other)
    return row
