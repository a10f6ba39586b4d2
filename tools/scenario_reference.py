"""Writes the tables of docs/scenarios.md from the schema in fabric/scenario/model.py.

``python tools/scenario_reference.py`` renews the file; a test fails when it is not up to date.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import attrs

from fabric.scenario import model
from fabric.scenario.model import Scenario

PAGE = Path(__file__).parent.parent / "docs" / "scenarios.md"
BEGIN, END = "<!-- made by tools/scenario_reference.py -->\n", "<!-- end of what is made -->\n"


def reference() -> str:
    """The tables: first the keys that stand alone, then table after table."""
    docs = _docstrings(Path(model.__file__).read_text(encoding="utf-8"))
    fields = attrs.fields(Scenario)
    parts = ["## Keys outside of tables\n", _table(docs, Scenario, [f for f in fields if "rule" in f.metadata])]
    for field in fields:
        table = field.metadata.get("table") or field.metadata.get("tables")
        if table is not None:
            head = f"[[{field.name}]]" if "tables" in field.metadata else f"[{field.name}]"
            parts += [f"## `{head}`\n", _introduction(table), _table(docs, table, attrs.fields(table))]
    return "\n".join(parts)


def page(text: str) -> str:
    """``text`` with its tables renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + reference() + "\n" + END + after


def _introduction(table: type) -> str:
    """What the class says of itself, without the name of the table that it begins with."""
    text = inspect.cleandoc(table.__doc__ or "").partition(": ")[2].replace("``", "`")
    return text[:1].upper() + text[1:] + "\n"


def _table(docs: dict[tuple[str, str], str], table: type, fields: Any) -> str:
    lines = ["| key | default | must be | meaning |", "|---|---|---|---|"]
    for field in fields:
        default = "absent" if field.default is None else f"`{_toml(field.default)}`"
        about = docs[table.__name__, field.name].replace("``", "`")
        lines.append(f"| `{field.name}` | {default} | {_rule(field.metadata['rule'])} | {about} |")
    return "\n".join(lines) + "\n"


def _rule(rule: Any) -> str:
    """What a rule wants, in the words of its error message."""
    try:
        rule(object())
    except ValueError as error:
        return str(error).removeprefix("must be ").rpartition(", not <object")[0]
    raise AssertionError("a rule that takes any object")


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def _docstrings(source: str) -> dict[tuple[str, str], str]:
    """The strings below the attributes of classes, by class and attribute."""
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = after.value if isinstance(after, ast.Expr) else None
                about = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
                found[node.name, field.target.id] = " ".join(about.split())
    return found


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
