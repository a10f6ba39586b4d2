"""What tests claim: the ids in their ``pytest.mark.spec(...)``, found by reading the files and not by running them.

A mark counts for the test function it decorates, for all tests of a class or (``pytestmark``) of a module, and
within ``parametrize`` for the function that has the parameters, also when they are in a list of the module. So that
the claim can be read, ids are literal strings: anything else is a problem, and so is a mark that belongs to no test.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import attrs

_Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@attrs.frozen(order=True)
class Test:
    """A test function, with the file's name and the class where it is in one."""

    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}::{self.name}"


@attrs.frozen
class Marks:
    """Which tests claim which ids."""

    tests: dict[str, list[Test]]
    """Id to the tests that are marked with it, in the order of the files."""
    problems: list[str]
    """Marks that cannot be read or belong to nothing, with file and line."""


def read_marks(directory: Path) -> Marks:
    """The marks of all test files in ``directory`` and below. SyntaxError for a file that is no Python."""
    marks = Marks({}, [])
    for path in sorted(directory.rglob("*.py")):
        _File(path, path.relative_to(directory).as_posix(), marks).read()
    return marks


class _File:
    def __init__(self, path: Path, name: str, marks: Marks) -> None:
        self.name = name
        self.marks = marks
        self.tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        self.values: dict[str, ast.expr] = {}
        """What the names of the module were assigned."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign):
                self.values.update((t.id, node.value) for t in node.targets if isinstance(t, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self.values[node.target.id] = node.value
        self.claimed: set[ast.Call] = set()

    def read(self) -> None:
        whole = self.values.get("pytestmark")
        self._scope(self.tree.body, "", list(self._marks(whole)) if whole is not None else [])
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and self._is_mark(node.func) and node not in self.claimed:
                self._problem(node, "a mark with ids must be on a test")

    def _scope(self, body: list[ast.stmt], prefix: str, outer: list[ast.Call]) -> None:
        for node in body:
            if not isinstance(node, _Node):
                continue
            marks = [*outer, *(mark for decorator in node.decorator_list for mark in self._marks(decorator))]
            if isinstance(node, ast.ClassDef):
                own = [n.value for n in node.body if isinstance(n, ast.Assign) and _names(n) == ["pytestmark"]]
                marks += [mark for value in own for mark in self._marks(value)]
                self._scope(node.body, f"{prefix}{node.name}::", marks)
            elif node.name.startswith("test"):
                self._claim(Test(self.name, node.lineno, prefix + node.name), marks)

    def _claim(self, test: Test, marks: list[ast.Call]) -> None:
        self.claimed.update(marks)
        for mark in marks:
            for argument in mark.args:
                if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
                    self._problem(mark, "the ids of a mark must be literal strings")
                elif test not in (tests := self.marks.tests.setdefault(argument.value, [])):
                    tests.append(test)

    def _marks(self, expression: ast.expr) -> Iterator[ast.Call]:
        """The marks within an expression, also where it names values of the module."""
        seen: set[str] = set()
        pending: list[ast.AST] = [expression]
        while pending:
            for node in ast.walk(pending.pop()):
                if isinstance(node, ast.Call) and self._is_mark(node.func):
                    yield node
                elif isinstance(node, ast.Name) and node.id in self.values and node.id not in seen:
                    seen.add(node.id)
                    pending.append(self.values[node.id])

    def _is_mark(self, function: ast.expr) -> bool:
        """Whether it is ``pytest.mark.spec``, or a name of the module for it."""
        if isinstance(function, ast.Name) and function.id in self.values:
            function = self.values[function.id]
        return ast.unparse(function) == "pytest.mark.spec" if isinstance(function, ast.Attribute) else False

    def _problem(self, node: ast.Call, what: str) -> None:
        problem = f"{self.name}:{node.lineno}: {what}"
        if problem not in self.marks.problems:
            self.marks.problems.append(problem)


def _names(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]
