"""The inventory, the marks of tests, where rows are implemented, and `fabric conformance`."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fabric.cli import main
from fabric.conformance import Row, examine, find_places, read_inventory, read_marks
from fabric.conformance.places import class_name

ROOT = Path(__file__).parent.parent
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def inventory() -> dict[str, Row]:
    return read_inventory()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with one test file, which :func:`write` fills."""
    (tmp_path / "tests").mkdir()
    return tmp_path


def write(project: Path, text: str, name: str = "test_one.py") -> Path:
    (project / "tests" / name).write_text("import pytest\n" + textwrap.dedent(text))
    return project


def claims(project: Path, text: str) -> dict[str, list[str]]:
    """Id to the names of the tests that claim it."""
    marks = read_marks(write(project, text) / "tests")
    assert [] == marks.problems
    return {id: [test.name for test in tests] for id, tests in marks.tests.items()}


def problems(project: Path, text: str) -> list[str]:
    return read_marks(write(project, text) / "tests").problems


# The suite itself


def test_no_mark_of_this_suite_is_wrong() -> None:
    """Every id is in the inventory, literal, and on a test."""
    assert [] == examine(ROOT).problems


# The inventory


def test_every_id_is_a_row_with_a_parent(inventory: dict[str, Row]) -> None:
    """Down to errors, rules, notes and the steps of sequences."""
    error = inventory["its.msi.EINVAL.no-devid"]

    assert ["its.msi", "its", None] == [
        error.parent and error.parent.id,
        error.parent and error.parent.parent and error.parent.parent.id,
        inventory["its"].parent,
    ]
    assert "its" == error.interface
    assert "steps" == inventory["its.seq.restore.6-tables"].kind
    ids = set()
    for path in sorted((ROOT / "fabric" / "conformance" / "inventory").glob("*.toml")):
        ids |= set(re.findall(r'\bid = "([^"]+)"', path.read_text(encoding="utf-8")))
    assert ids == set(inventory)


@pytest.mark.parametrize(
    ("id", "architectures"),
    [
        pytest.param("api.create-vm", [], id="all"),
        pytest.param("vfio.create", [], id="any"),
        pytest.param("api.get-lapic.rule.format-32", ["x86"], id="of the parent"),
        pytest.param("api.create-vm.rule.s390-ucontrol", ["s390"], id="in its words"),
        pytest.param("api.irq-line.ENXIO.no-irqchip", ["arm64", "powerpc", "x86"], id="several in its words"),
        pytest.param("api.seq.x86-irqchip.3-pit", ["x86"], id="of what a sequence uses"),
        pytest.param("vcpu.seq.tsc-migration.note.units", ["x86"], id="of a sequence, its notes"),
        pytest.param("vfio.seq.use", [], id="of a sequence with a step for one of them"),
        pytest.param("vfio.seq.use.4-tce", ["powerpc"], id="of that step"),
        pytest.param("its.cmd.mapd", ["arm64"], id="of the interface"),
        pytest.param("api.cap.max-vcpu-id.EINVAL.range", ["x86"], id="where a capability can be enabled"),
        pytest.param("api.cap.s390-ri.EBUSY.vcpus", ["s390"], id="of a capability that can be enabled"),
    ],
)
def test_what_a_row_is_about(inventory: dict[str, Row], id: str, architectures: list[str]) -> None:
    """Its own list, or what its text begins with, or its parent's; a sequence is for those that have all it uses."""
    row = inventory[id]

    assert architectures == sorted(row.architectures)
    assert (not architectures or "arm64" in architectures) == row.concerns("aarch64") == row.concerns("arm64")


# Marks


def test_where_marks_may_stand(project: Path) -> None:
    """On functions, classes and modules, in the parameters of a test, and in lists and names of the module."""
    found = claims(
        project,
        """
        spec = pytest.mark.spec
        pytestmark = [pytest.mark.spec("module")]
        CASES = [pytest.param(1, marks=pytest.mark.spec("listed")), *[pytest.param(2, marks=spec("short"))]]

        @pytest.mark.spec("one", "two")
        async def test_function(): ...

        @pytest.mark.spec("class")
        class TestClass:
            pytestmark = pytest.mark.spec("inside")

            @pytest.mark.parametrize("x", [pytest.param(1, marks=[pytest.mark.soak, pytest.mark.spec("one")])])
            def test_method(self, x): ...

        @pytest.mark.parametrize("x", CASES)
        def test_list(x): ...

        def helper(): ...
        """,
    )

    assert {
        "module": ["test_function", "TestClass::test_method", "test_list"],
        "one": ["test_function", "TestClass::test_method"],
        "two": ["test_function"],
        "class": ["TestClass::test_method"],
        "inside": ["TestClass::test_method"],
        "listed": ["test_list"],
        "short": ["test_list"],
    } == found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param("@pytest.mark.spec(f'{ID}')\ndef test_one(): ...", "must be literal strings", id="composed"),
        pytest.param("@pytest.mark.spec(*IDS)\ndef test_one(): ...", "must be literal strings", id="unpacked"),
        pytest.param("@pytest.mark.spec('a')\ndef helper(): ...", "must be on a test", id="on a helper"),
        pytest.param("CASES = [pytest.param(1, marks=pytest.mark.spec('a'))]", "must be on a test", id="unused list"),
        pytest.param("def make(): return pytest.mark.spec('a')", "must be on a test", id="in a function"),
    ],
)
def test_marks_that_cannot_be_read(project: Path, text: str, problem: str) -> None:
    """A claim that reading the file does not show is none: file, line and what is wrong with it."""
    (found,) = problems(project, text)

    assert found.startswith(("test_one.py:2: ", "test_one.py:3: "))
    assert problem in found


# Places


def places_in(tmp_path: Path, inventory: dict[str, Row], **sources: str) -> dict[str, str]:
    """The places in a package of these modules, without those that are inherited."""
    for name, text in sources.items():
        path = tmp_path / "package" / f"{name.replace('_', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    found = find_places(inventory, tmp_path / "package")
    own = {}
    for id, place in found.items():
        parent = inventory[id].parent
        if parent is None or found.get(parent.id) != place:
            own[id] = str(place)
    return own


def test_a_row_of_a_table_is_a_place(tmp_path: Path, inventory: dict[str, Row]) -> None:
    """Its id is there as a string, before any docstring that names it."""
    found = places_in(
        tmp_path,
        inventory,
        a='"""Rules: vcpu.* and vcpu.timer.vtimer of the interface inventory."""\n',
        b='TABLE = (\n    Attr("vcpu.timer.vtimer", set=f),\n)\n',
    )

    assert {"vcpu": "package/a.py:1", "vcpu.timer.vtimer": "package/b.py:2"} == found


def test_registers_may_have_ids_that_are_put_together(tmp_path: Path, inventory: dict[str, Row]) -> None:
    """Then they are found by their names, in that file; or where the id is put together."""
    found = places_in(
        tmp_path,
        inventory,
        v3='def row(name):\n    return f"vgic-v3.reg.gicd.{name}"\nT = (\n    Register("GICD_CTLR", row("ctlr")),\n)\n',
        v2='def row(name):\n    return f"vgic-v2.reg.cpu.{name}"\n',
    )

    assert "package/v3.py:4" == found["vgic-v3.reg.gicd.ctlr"]
    assert "package/v3.py:2" == found["vgic-v3.reg.gicd.typer"]
    assert "package/v2.py:2" == found["vgic-v2.reg.cpu.pmr"]
    assert "vgic-v2.reg.ctlr" not in found


def test_an_interface_may_be_what_is_put_in(tmp_path: Path, inventory: dict[str, Row]) -> None:
    """For tables of several interfaces; a whole id goes before one that is put together; other f-strings are none."""
    found = places_in(
        tmp_path,
        inventory,
        a='def table(interface):\n    return Attr(f"{interface}.ctrl.init"), f"{a}.{b}", f"{name}.msi"\n',
        b='TABLE = Attr("its.ctrl.init")\n',
    )

    assert {"vgic-v2.ctrl.init", "vgic-v3.ctrl.init", "its.ctrl.init"} == set(found)
    assert ["package/a.py:2", "package/b.py:1"] == [found["vgic-v3.ctrl.init"], found["its.ctrl.init"]]


def test_names_of_the_headers(tmp_path: Path, inventory: dict[str, Row]) -> None:
    """A capability is where a table has it as a key; a layout is a class; an exit is where it is first used."""
    found = places_in(
        tmp_path,
        inventory,
        caps="x = KVM_CAP_IRQFD\n\nTABLE = {uapi.KVM_CAP_IRQFD: 1}\n",
        exits="from x import KVM_EXIT_MMIO\n\n\ndef f():\n    return KVM_EXIT_MMIO\n",
        uapi_kvm="KVM_CAP_IRQFD = 32\n\n\nclass KvmIrqLevel(CStruct): ...\n",
    )

    assert {
        "api.cap.irqfd": "package/caps.py:3",
        "api.exit.mmio": "package/exits.py:5",
        "layout.kvm-irq-level": "package/uapi/kvm.py:4",
    } == found


def test_docstrings_name_what_is_no_table(tmp_path: Path, inventory: dict[str, Row]) -> None:
    """A function before a class before a module; an interface by its rows (``its.*``), as its name is a word."""
    found = places_in(
        tmp_path,
        inventory,
        m='"""The its of its.* and its.msi, its.commands."""\n\n\nclass C:\n    """its.commands."""\n\n\n'
        'def f():\n    """A message (its.msi)."""\n',
    )

    assert {"its": "package/m.py:1", "its.commands": "package/m.py:4", "its.msi": "package/m.py:8"} == found


def test_what_has_no_place_is_where_its_parent_is(inventory: dict[str, Row]) -> None:
    """An error at its ioctl, a rule at its attribute."""
    found = find_places(inventory)

    assert found["api.irqfd"] == found["api.irqfd.EBADF.fd"]
    assert "fabric/kvm/vm_fd.py" == found["api.irqfd"].file
    line = (ROOT / found["api.irqfd"].file).read_text().splitlines()[found["api.irqfd"].line - 1]
    assert "KVM_IRQFD" in line


def test_what_arm64_has_of_the_interface_has_a_place(inventory: dict[str, Row]) -> None:
    """Of its own: a table row, a key, a class, or a docstring that names it."""
    found = find_places(inventory)
    kinds = ("ioctl", "capability", "exit_reason", "reg", "attr", "register", "command", "layout")

    assert [] == [
        row.id
        for row in inventory.values()
        if row.kind in kinds
        and row.concerns("aarch64")
        and (row.id not in found or found[row.id] == found.get(row.interface))
    ]


def test_layouts_are_classes_by_name() -> None:
    """The words of the id, capitalised."""
    assert "KvmS390IoAdapterReq" == class_name("layout.kvm-s390-io-adapter-req")


# The command


def covered(project: Path, *, but: str = "", only: str = "its.msi") -> Path:
    """Tests for all rows under a prefix, except one."""
    ids = [id for id in read_inventory() if id.startswith(only) and id != but]
    return write(project, f"@pytest.mark.spec(*{ids})\ndef test_all(): ...\n".replace("*[", "").replace("])", ")"))


def test_no_hole_is_status_0(project: Path, capsys: Captured) -> None:
    """With the row, where it is, and its test."""
    assert 0 == main(["conformance", "--project", str(covered(project)), "--only", "its.msi"])

    out, err = capsys.readouterr()
    assert "" == err
    row = next(line for line in out.splitlines() if line.startswith("its.msi.EINVAL.no-devid "))
    assert re.search(r" fabric/\S+\.py:\d+ +test_one\.py::test_all$", row)


def test_a_hole_is_status_1(project: Path, capsys: Captured) -> None:
    """It is named, and counted with its interface; --holes lists nothing else."""
    covered(project, but="its.msi.EINVAL.no-devid")
    arguments = ["conformance", "--project", str(project), "--only", "its.msi", "--holes"]

    assert 1 == main(arguments)

    rows, summary = capsys.readouterr().out.split("\n\n")
    assert ["its.msi.EINVAL.no-devid"] == [line.split()[0] for line in rows.splitlines()[1:]]
    assert rows.endswith(" HOLE")
    total = sum(id.startswith("its.msi") for id in read_inventory())
    assert ["its", str(total), str(total - 1), "1"] == summary.splitlines()[1].split()


def test_json_is_total_covered_and_holes(project: Path, tmp_path: Path, capsys: Captured) -> None:
    """Exactly one document; -o leaves it in a file as well."""
    covered(project, but="its.msi.EINVAL.no-devid")
    out = tmp_path / "out"
    arguments = ["--project", str(project), "--only", "its.msi", "--format", "json", "-o", str(out), "--seed", "1"]

    assert 1 == main(["conformance", *arguments])

    text = capsys.readouterr().out
    total = sum(id.startswith("its.msi") for id in read_inventory())
    assert {"total": total, "covered": total - 1, "holes": ["its.msi.EINVAL.no-devid"]} == json.loads(text)
    assert text == (out / "conformance.json").read_text()


def test_only_adds_prefixes_and_arch_takes_away(project: Path, capsys: Captured) -> None:
    """Rows whose id begins with one of the prefixes, and that concern the architecture."""
    covered(project)

    def ids(*arguments: str) -> set[str]:
        main(["conformance", "--project", str(project), "--format", "json", *arguments])
        document = json.loads(capsys.readouterr().out)
        assert document["total"] == document["covered"] + len(document["holes"])
        return set(document["holes"])

    inventory = read_inventory()
    several = ids("--only", "vcpu.pmu", "--only", "api.create-vm")
    assert {id for id in inventory if id.startswith(("vcpu.pmu", "api.create-vm"))} == several
    assert several - {"api.create-vm.rule.s390-ucontrol", "api.create-vm.rule.ppc-type"} == ids(
        "--only", "vcpu.pmu", "--only", "api.create-vm", "--arch", "aarch64"
    )
    assert len(inventory) == len(ids()) + sum(id.startswith("its.msi") for id in inventory)


def test_a_mark_with_an_unknown_id_is_an_error(project: Path, capsys: Captured) -> None:
    """Status 1, and the id is named, also when all else is covered; standard output is still the document."""
    covered(project)
    write(project, '@pytest.mark.spec("its.msi.EINVAL.typo")\ndef test_x(): ...\n', "test_two.py")

    assert 1 == main(["conformance", "--project", str(project), "--only", "its.msi", "--format", "json"])

    out, err = capsys.readouterr()
    assert [] == json.loads(out)["holes"]
    assert "fabric: test_two.py:3: test_x is marked with 'its.msi.EINVAL.typo', which is not in the inventory\n" == err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--only", "itss"], "only: no id begins with 'itss'"),
        (["--arch", "arm"], "arch: must be one of aarch64, x86_64, ppc64, ppce500, s390x, mips64, not 'arm'"),
    ],
)
def test_wrong_requests_are_status_2(arguments: list[str], problem: str, project: Path, capsys: Captured) -> None:
    """With what is wrong; in JSON as well."""
    covered(project)

    assert 2 == main(["conformance", "--project", str(project), *arguments])
    assert f"fabric: conformance: {problem}\n" == capsys.readouterr().err

    assert 2 == main(["conformance", "--project", str(project), "--format", "json", *arguments])
    assert [f"conformance: {problem}"] == json.loads(capsys.readouterr().out)["error"]["problems"]


def test_a_file_that_is_no_python_is_status_2(project: Path, capsys: Captured) -> None:
    """File and line are told."""
    covered(project)
    write(project, "def (\n", "test_two.py")

    assert 2 == main(["conformance", "--project", str(project)])
    assert "test_two.py:2: " in capsys.readouterr().err


def test_without_tests_it_says_what_it_needs(tmp_path: Path, capsys: Captured) -> None:
    """An installed package has none: status 2."""
    assert 2 == main(["conformance", "--project", str(tmp_path)])

    assert "run it in a source checkout, or name one with --project DIR" in capsys.readouterr().err


def test_the_working_directory_comes_first(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Without tests there, the checkout that fabric runs from."""
    monkeypatch.chdir(covered(project))
    assert 0 == main(["conformance", "--only", "its.msi"])

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    main(["conformance", "--only", "its.msi"])
    assert "test_vgic_its.py" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 160])
def test_ids_are_whole_when_piped_and_on_a_terminal(columns: int) -> None:
    """One line a row, with all of the id; a terminal that is wide enough gets a table in colour."""
    command = [sys.executable, "-m", "fabric", "conformance", "--only", "vgic-v3.addr.redist-region"]
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    piped = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    reading, writing = pty.openpty()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.DEVNULL) as process:
        os.close(writing)
        shown = b""
        while True:
            try:
                shown += os.read(reading, 4096)
            except OSError:
                break
        assert process.wait() in (0, 1)
    os.close(reading)

    ids = {id for id in read_inventory() if id.startswith("vgic-v3.addr.redist-region")}
    plain = re.sub(rb"\x1b\[[0-9;]*m", b"", shown).decode()
    assert "\x1b" not in piped
    assert (columns == 160) == (b"\x1b[" in shown)
    for text in (piped, plain):
        assert ids <= {line.split()[0] for line in text.splitlines() if line.strip()}
