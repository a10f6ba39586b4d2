"""The layers of the house: imports go down only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "fabric"

LAYERS = (
    ("cli", "__main__", "pytest_plugin"),
    ("report",),
    ("conformance",),
    ("scenario",),
    ("migration",),
    ("vmm",),
    ("guest",),
    ("kvm",),
    ("vcpu",),
    ("devices",),
    ("memory",),
    ("channel",),
    ("trace",),
    ("clock",),
    ("uapi",),
    ("errors",),
)
"""From the top; a module may import what is in its own part or further down."""

NARROWER = {"vmm": {"vmm", "kvm", "uapi", "errors", "clock", "guest"}}
"""A stranger's VMM would not see what is behind the KVM interface either."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def part_of(module: str) -> str:
    """``devices`` for ``fabric.devices.arm.vgic``; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module of fabric that a file imports, for types or inside functions as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "fabric")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "a relative import"
        elif isinstance(node, ast.ImportFrom) and node.module == "fabric":
            yield from ((node.lineno, f"fabric.{alias.name}") for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fabric."):
            yield node.lineno, str(node.module)


def violations(path: Path, part: str) -> list[tuple[int, str]]:
    """The imports of a file of ``part`` that go upwards, or where the part may not look."""
    visible = NARROWER.get(part, {name for name, level in LEVEL.items() if level >= LEVEL[part]})
    return [(line, module) for line, module in imports(path) if part_of(module) not in visible]


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    """Type-only imports count; a new part of the house must be given its place in LAYERS."""
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")

    assert part in LEVEL, f"{part} has no place in LAYERS"
    assert [] == violations(path, part)


def test_an_import_that_goes_up_is_found(tmp_path: Path) -> None:
    """Also for types only, also inside a function, also by ``from fabric import``."""
    path = tmp_path / "x.py"
    path.write_text(
        "import fabric.kvm.vm\nfrom fabric import scenario\nfrom fabric.errors import KvmError\n"
        "def f():\n    from fabric.trace.ledger import Ledger\n"
    )

    assert [(1, "fabric.kvm.vm"), (2, "fabric.scenario"), (5, "fabric.trace.ledger")] == violations(path, "clock")
    assert [(1, "fabric.kvm.vm"), (2, "fabric.scenario")] == violations(path, "trace")
    assert [(2, "fabric.scenario"), (5, "fabric.trace.ledger")] == violations(path, "vmm")


def test_the_core_needs_no_command_line() -> None:
    """What a simulation imports knows neither typer nor rich: those are for the ways in."""
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in ("cli.py", "report"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {"typer", "rich"} & {name.split(".")[0] for name in names}, f"{path}: {names}"
