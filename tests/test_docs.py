"""The documents are true: their commands run, their programs print what they say, their tables are the schema's."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest

from fabric.cli import main
from fabric.scenario.load import make_scenario
from fabric.scenario.model import Scenario
from fabric.vmm import BOARDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(language == one for one, _ in blocks(page))]


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scenario_reference", ROOT / "tools" / "scenario_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_scenario_page_are_the_schema() -> None:
    """Run ``python tools/scenario_reference.py`` when they are not."""
    tool = _tool()
    text = tool.PAGE.read_text(encoding="utf-8")

    assert tool.page(text) == text


def test_every_key_is_documented() -> None:
    """With what it means; the defaults and limits come by themselves."""
    docs = _tool()._docstrings((ROOT / "fabric" / "scenario" / "model.py").read_text(encoding="utf-8"))
    tables = [field.metadata.get("table") or field.metadata.get("tables") for field in attrs.fields(Scenario)]

    for table in [Scenario, *filter(None, tables)]:
        for field in attrs.fields(table):
            if "rule" in field.metadata:
                assert docs[table.__name__, field.name], f"{table.__name__}.{field.name}"


@pytest.mark.parametrize("page", pages_with("toml"), ids=lambda page: page.name)
def test_scenarios_in_the_text_are_valid(page: Path) -> None:
    """They are shown to be copied."""
    for language, text in blocks(page):
        if language == "toml":
            make_scenario(tomllib.loads(text), boards=BOARDS)


@pytest.mark.parametrize("page", pages_with("sh"), ids=lambda page: page.name)
def test_commands_in_the_text_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every ``fabric`` command, one after the other; scenarios of the page are files by their name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for language, text in blocks(page):
        if language == "toml" and (name := re.search(r'^name = "(.*)"$', text, re.MULTILINE)):
            (tmp_path / f"{name[1]}.toml").write_text(text)

    for language, text in blocks(page):
        for line in text.splitlines() if language == "sh" else []:
            if line.startswith("fabric "):
                command: list[Any] = shlex.split(line, comments=True)[1:]
                assert 0 == main(command), f"{line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_programs_in_the_text_print_what_it_says(page: Path) -> None:
    """The block of text after a program is its output; a program without one prints nothing."""
    found = [*blocks(page), ("", "")]
    for (language, program), (after, expected) in pairwise(found):
        if language == "python":
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
            assert (expected if after == "text" else "", "") == (done.stdout, done.stderr)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    """Links to files of the project, and the modules that are named."""
    text = page.read_text(encoding="utf-8")
    for target in _LINK.findall(text):
        assert (page.parent / target).exists(), target
    for named in re.findall(r"`((?:fabric|tests|tools|examples|docs|bench)/[\w./-]+)`", text):
        assert (ROOT / named).exists(), named
