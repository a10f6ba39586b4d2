"""Where a row of the inventory is implemented: which line of fabric answers for it.

Tables carry the ids of what their rows implement, and what is no table says in its docstring what it is. So a row's
place is, the first of these that there is:

1. a table row with its id: a string of the source that is the id, or one that is put together and fits it
   (``f"vgic-v3.reg.gicd.{name}"``; then the register's name says which row);
2. a table key with its C name: capabilities, registers of KVM_GET_ONE_REG; of a layout the class with its name;
3. a function, a class or a module whose docstring names the id;
4. the first use of its C name: exit reasons.

What has none of these is where its parent is: an error where the attribute is whose error it is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from fabric.conformance.rows import Row

PACKAGE: Final = Path(__file__).parent.parent
_IN_TABLE, _COMPOSED, _NAMED_KEY, _FUNCTION, _CLASS, _MODULE, _USE = range(7)
_ROWS_OF_TABLES: Final = frozenset({"attr", "register", "command"})
"""What is in tables whose ids may be put together."""
_MENTION = re.compile(r"[a-z][a-z0-9-]*(?:\.[A-Za-z0-9-]+)*(?:\.\*)?")


@attrs.frozen(order=True)
class Place:
    """A line of a source file; the path is relative to what ``fabric`` lies in."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def find_places(rows: Mapping[str, Row], package: Path = PACKAGE) -> dict[str, Place]:
    """The place of each row that has one, its own or an ancestor's."""
    found: dict[str, tuple[int, Place]] = {}
    for path in sorted(package.rglob("*.py")):
        part = path.relative_to(package).parts[0]
        if part == "conformance":
            continue
        file = path.relative_to(package.parent).as_posix()
        for id, how, line in _Source(path, rows, part == "uapi").claims():
            claim = (how, Place(file, line))
            if id not in found or claim < found[id]:
                found[id] = claim
    places = {}
    for id, row in rows.items():
        ancestor: Row | None = row
        while ancestor is not None and ancestor.id not in found:
            ancestor = ancestor.parent
        if ancestor is not None:
            places[id] = found[ancestor.id][1]
    return places


class _Source:
    def __init__(self, path: Path, rows: Mapping[str, Row], uapi: bool) -> None:
        self.tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        self.rows = rows
        self.uapi = uapi

    def claims(self) -> Iterator[tuple[str, int, int]]:
        """Id, how it is claimed, and the line."""
        yield from self._layouts() if self.uapi else self._tables()
        yield from self._docstrings()

    def _layouts(self) -> Iterator[tuple[str, int, int]]:
        classes = {node.name: node.lineno for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)}
        for row in self.rows.values():
            line = classes.get(class_name(row.id)) if row.kind == "layout" else None
            if line is not None:
                yield row.id, _IN_TABLE, line

    def _tables(self) -> Iterator[tuple[str, int, int]]:
        documented = {id(text) for text, _, _ in self._documented()}
        literals: dict[str, int] = {}
        patterns: dict[str, int] = {}
        keys: dict[str, int] = {}
        uses: dict[str, int] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.JoinedStr) and (pattern := _pattern(node)):
                patterns.setdefault(pattern, node.lineno)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
                literals[node.value] = min(node.lineno, literals.get(node.value, node.lineno))
            elif isinstance(node, ast.Dict):
                keys.update((name, key.lineno) for key in node.keys if key is not None and (name := _c_name(key)))
            elif isinstance(node, ast.expr) and (name := _c_name(node)):
                uses[name] = min(node.lineno, uses.get(name, node.lineno))
        for row in self.rows.values():
            if row.id in literals and row.parent is not None:
                yield row.id, _IN_TABLE, literals[row.id]
            elif row.kind in _ROWS_OF_TABLES:
                for pattern, line in patterns.items():
                    if re.fullmatch(pattern, row.id):
                        yield row.id, _COMPOSED, literals.get(row.name, line)
            elif row.name in keys:
                yield row.id, _NAMED_KEY, keys[row.name]
            elif row.name in uses:
                yield row.id, _USE, uses[row.name]

    def _docstrings(self) -> Iterator[tuple[str, int, int]]:
        for text, how, line in self._documented():
            for mention in _MENTION.findall(str(text.value)):
                # "its.*" is the whole interface; its bare id would be an English word.
                name = mention.removesuffix(".*")
                if name in self.rows and (name != mention or "." in name):
                    yield name, how, line

    def _documented(self) -> Iterator[tuple[ast.Constant, int, int]]:
        """Docstrings, with what they document and its line."""
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                how = (
                    _MODULE if isinstance(node, ast.Module) else _CLASS if isinstance(node, ast.ClassDef) else _FUNCTION
                )
                yield first.value, how, getattr(node, "lineno", 1)


def class_name(layout: str) -> str:
    """The class of a layout: ``layout.kvm-irq-level`` is KvmIrqLevel."""
    return "".join(part.capitalize() for part in layout.removeprefix("layout.").split("-"))


def _pattern(string: ast.JoinedStr) -> str:
    """A regular expression for the ids that an f-string may be; empty for one that is none."""
    constant = "".join(str(part.value) for part in string.values if isinstance(part, ast.Constant))
    if not re.fullmatch(r"[a-z0-9.-]*[a-z][a-z0-9.-]*", constant) or "." not in constant:
        return ""
    return "".join(
        re.escape(str(part.value)) if isinstance(part, ast.Constant) else "[a-z0-9-]+" for part in string.values
    )


def _c_name(node: ast.expr) -> str:
    """KVM_CAP_IRQCHIP, also as a member of a module; else empty."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name if name.isupper() else ""
