"""The project around the code: pins in one place, and commands that do what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pybtex.database import parse_file

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {r.name: r for r in map(Requirement, PROJECT["optional-dependencies"]["dev"])}
ZOO = {r.name: r for r in map(Requirement, PROJECT["optional-dependencies"]["zoo"])}
ALLOWED = {"README.md", "_config.yml", "environment.yml", "book", "structopt", "tests"}
ALLOWED |= {"pyproject.toml", "Makefile", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"}
ALLOWED |= {".ci", ".github", ".gitignore"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_pin_is_exact_and_installed() -> None:
    both = [*PINS.values(), *ZOO.values()]
    assert [str(pin) for pin in both if not str(pin.specifier).startswith("==")] == []
    found = {name: Version(version(name)).public for name in PINS}  # 2.14.1+cpu is 2.14.1
    assert [
        str(PINS[name]) for name in PINS if not PINS[name].specifier.contains(found[name])
    ] == []
    loose = map(Requirement, PROJECT["dependencies"])
    assert [
        str(need) for need in loose if not need.specifier.contains(found.get(need.name, "0"))
    ] == ["numpy>=1.26"]


def test_environment_for_conda_installs_from_pyproject_and_pins_nothing() -> None:
    names = yaml.safe_load(read("environment.yml"))["dependencies"]
    (pip,) = [entry["pip"] for entry in names if isinstance(entry, dict)]
    assert pip == ["-e .[dev]"], "Binder and conda both understand this form"
    python, *others = [entry for entry in names if isinstance(entry, str)]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    assert others == ["pip", "make"]


def test_no_other_file_has_a_pin_of_its_own() -> None:
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "Makefile",
        ".ci/run",
        ".github/workflows/book.yml",
    ):
        for package, number in re.findall(r"([\w-]+)==([\w.]+)", read(name)):
            assert str(PINS[package].specifier) == f"=={number}", f"{name}: {package}"


def test_each_dependency_has_its_reason() -> None:
    table = read("CONTRIBUTING.md").split("## Why each dependency is there")[1]
    names = [name for name in PINS if not name.startswith(("sphinx-book", "pydata"))]  # the themes
    names += [Requirement(need).name for need in PROJECT["dependencies"]] + [*ZOO]
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", table)] == []


def test_nothing_else_lies_at_the_top() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone: the sources came without their history")
    assert {name.split("/")[0] for name in listed.stdout.splitlines()} <= ALLOWED


def test_the_workflow_tests_and_publishes() -> None:
    workflow = yaml.safe_load(read(".github/workflows/book.yml"))
    steps = workflow["jobs"]["test"]["steps"]
    assert any(step.get("run") == ".ci/run" for step in steps)
    (python,) = [
        s["with"]["python-version"] for s in steps if "python-version" in s.get("with", {})
    ]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    (pages,) = [s for s in steps if "upload-pages-artifact" in s.get("uses", "")]
    assert pages["with"]["path"] == "_build/html"
    assert workflow["jobs"]["publish"]["needs"] == "test"


def test_each_work_is_whole_and_stands_once() -> None:
    works = parse_file(ROOT / "book" / "references.bib").entries  # a key that stands twice raises
    assert [*works] == sorted(works), "sorted by key, so that two people rarely add at one place"
    for key, work in works.items():
        assert work.persons.get("author"), f"{key} has no author"
        assert {"title", "year"} <= {*work.fields}, f"{key} has no title or no year"
        assert work.fields["year"] in key, f"{key} is not of {work.fields['year']}"


def test_the_changelog_has_the_form_that_it_names() -> None:
    text = read("CHANGELOG.md")
    kinds = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert set(kinds) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }
    assert re.findall(r"^## (?!Unreleased$|\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d$).*$", text, re.M) == []
    entries = re.split(r"^(?:- |#+ .*$)", text, flags=re.MULTILINE)[2:]
    broken = [e for e in entries if e.strip() and not e.rstrip().endswith((".", ":"))]
    assert broken == [], "an entry is whole sentences"


def test_no_line_of_code_is_cut_at_the_edge_of_a_page() -> None:
    long = []
    for path in sorted((ROOT / "book" / "chapters").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"][2:]:
            tags = {*cell["metadata"].get("tags", [])}
            if cell["cell_type"] == "code" and not tags & {"hide-input", "remove-input"}:
                lines = "".join(cell["source"]).splitlines()
                long += [f"{path.stem}: {line}" for line in lines if len(line) > 88]
    assert long == []


STUB = """\
#!/bin/sh
[ "$OMP_NUM_THREADS" = 1 ] || exit 9
echo "python $*" >> log
case "$*" in
  *"build book"*) mkdir -p _build/html; : > _build/html/index.html;;
  *sys.version_info*) exit ${TOO_OLD:-0};;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone, in a folder with spaces, and a Python that only notes its orders."""
    folder = tmp_path / "a fresh clone"
    for name in ("book", "structopt", ".ci"):
        (folder / name).mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "_config.yml", "README.md", ".ci/run"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "book/page.md").touch()
    (folder / "python").write_text(STUB)
    (folder / "python").chmod(0o755)
    return folder


def make(
    clone: Path, *words: str, **more: str
) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """What Python was told to do by this run of make, and what make said."""
    (clone / "log").write_text("")
    done = subprocess.run(
        ["make", *words, "PYTHON=./python"],
        cwd=clone,
        env={k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "OMP"))} | more,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return (clone / "log").read_text().splitlines(), done


def touched(path: Path) -> None:
    """A change that a clock with whole seconds sees too."""
    later = path.stat().st_mtime + 5
    os.utime(path, (later, later))


def test_make_book_sets_up_builds_and_then_has_nothing_to_do(clone: Path) -> None:
    log, done = make(clone, "book")
    assert done.returncode == 0, done.stderr
    assert "-m venv .venv" in log[1]
    assert log[2].endswith("-m pip install --editable .[dev]")
    assert log[3].endswith("build book -W --keep-going -n -q")
    assert "index.html" in log[4], "it says where to open the book"
    assert len(make(clone, "book")[0]) == 1
    touched(clone / "book/page.md")
    log, _ = make(clone, "book")
    assert len(log) == 2, "a changed page: built, not installed"
    assert "build book" in log[0]
    touched(clone / "pyproject.toml")
    touched(clone / "pyproject.toml")
    log, _ = make(clone, "book")
    assert "pip install" in log[0]
    assert "venv" not in log[0]


def test_a_build_starts_without_old_pages_and_keeps_what_was_measured(clone: Path) -> None:
    old = [clone / "_build" / name for name in ("html/gone.html", ".doctrees/gone.doctree")]
    for path in [*old, clone / "_build/zoo.jsonl"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert make(clone, "book")[1].returncode == 0
    assert not any(path.exists() for path in old)
    assert make(clone, "clean")[1].returncode == 0
    assert [path.name for path in (clone / "_build").iterdir()] == ["zoo.jsonl"]


def test_an_environment_that_is_there_is_kept(clone: Path) -> None:
    (clone / ".venv/bin").mkdir(parents=True)
    shutil.copy(clone / "python", clone / ".venv/bin/python")
    log, done = make(clone, "check", TOO_OLD="1")  # that of PATH may be: it is not used
    assert done.returncode == 0
    assert not any("venv .venv" in line for line in log)


def test_a_python_that_does_not_fit_is_refused_with_the_remedy(clone: Path) -> None:
    log, done = make(clone, "book", TOO_OLD="1")
    assert done.returncode != 0
    assert "Python 3.11, 3.12 or 3.13; name one: make book PYTHON=" in done.stdout
    assert len(log) == 1
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("name", ["Makefile", ".ci/run"])
def test_the_pythons_that_are_let_in_are_those_that_the_package_supports(name: str) -> None:
    bounds = re.search(r"\(3, (\d+)\) <= sys.version_info\[:2\] <= \(3, (\d+)\)", read(name))
    assert bounds
    low, high = map(int, bounds.groups())
    supported = SpecifierSet(PROJECT["requires-python"])
    fits = [minor for minor in range(6, 30) if supported.contains(f"3.{minor}")]
    assert fits == list(range(low, high + 1))


def test_make_test_runs_everything_and_the_built_pages_last(clone: Path) -> None:
    log, done = make(clone, "test")
    assert done.returncode == 0, done.stderr
    parts = [
        "ruff check",
        "ruff format --check",
        "mypy",
        "notebooks.py --check",
        "pytest tests structopt",
        "--nbval ",
        "build book -W",
        "pytest tests -m pages or browser",
    ]
    at = [next((i for i, line in enumerate(log) if part in line), -1) for part in parts]
    assert -1 not in at, parts[at.index(-1)]
    assert at == sorted(at)
    assert at[-1] == len(log) - 1
    assert not any("nbval-lax" in line for line in log)


def test_each_target_says_what_it_does() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)
    assert phony
    said = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert {f"make {target}" for target in phony[1].split()} == {
        re.split(r"\s{2,}", line)[0] for line in said.splitlines()
    }


def test_continuous_integration_ends_with_make_test(clone: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {
        "chromium": "",
        "npm": "",
        "python3": "exit 1",  # too old
        "python3.13": "exit 127",  # a shim with no interpreter behind it
        "python3.12": "",
        "make": 'cat; echo "$PWD: make $*"',
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(clone / ".ci/run")],
        cwd=tmp_path,
        env={"PATH": f"{tools}:/usr/bin:/bin", "CI": "true", "HOME": str(tmp_path)},
        input="an answer to a question of make",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{clone.resolve()}: make test PYTHON=python3.12"]
