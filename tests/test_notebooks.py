"""Notebooks are what their sources give, were executed, and say when they no longer hold."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

BOOK = Path(__file__).parents[1] / "book"
sys.path.insert(0, str(BOOK))

import notebooks  # noqa: E402
import rooms  # noqa: E402

SOURCE = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  name: python3
---

# A chapter

Some prose.

```{code-cell} python
:tags: [hide-input]
from structopt import losses
```

More prose.

```{code-cell} python
print(6 * 7)
```
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small book with one chapter, and a package of three rooms."""
    files = {
        "_config.yml": 'repository:\n  url: ""\n',
        "structopt/__init__.py": "",
        "structopt/losses.py": "from structopt import deep\n\n\ndef mse():\n    return deep.ONE\n",
        "structopt/deep.py": '"""Says one."""\n\nONE = 1  # exactly\n',
        "structopt/other.py": "TWO = 2\n",
        "book/src/01_first.md": SOURCE,
        "book/chapters/.keep": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "SOURCES", tmp_path / "book" / "src")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "book" / "chapters")
    return tmp_path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Execution without a kernel: each run is counted and leaves an output that names it."""
    seen: list[str] = []

    def pretend(notebook: nbformat.NotebookNode, lines: list[int], source: Path) -> None:
        seen.append(source.stem)
        for count, cell in enumerate(notebook.cells, 1):
            if cell.cell_type == "code":
                cell.execution_count = count
                cell.outputs = [nbformat.v4.new_output("stream", text=f"run {len(seen)}")]

    monkeypatch.setattr(notebooks, "execute", pretend)
    return seen


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def target(library: Path) -> Path:
    return library / "book" / "chapters" / "01_first.ipynb"


def stored(library: Path) -> nbformat.NotebookNode:
    return nbformat.read(target(library), as_version=4)


def test_an_unchanged_chapter_is_executed_once(library: Path, runs: list[str]) -> None:
    assert notebooks.main([]) == 0
    before = target(library).read_bytes()
    assert notebooks.main([]) == notebooks.main(["--check"]) == 0
    assert runs == ["01_first"]
    assert target(library).read_bytes() == before
    assert notebooks.main(["01_first", "--force"]) == 0
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("file", "old", "new", "executes"),
    [
        ("book/src/01_first.md", "Some prose", "Better prose", False),
        ("_config.yml", '""', "https://example.org/a/b", False),
        ("book/src/01_first.md", "6 * 7", "6 * 8", True),
        ("book/src/01_first.md", "[hide-input]", "[hide-output]", True),
        ("structopt/losses.py", "deep.ONE", "-deep.ONE", True),
        ("structopt/deep.py", "ONE = 1", "ONE = 3", True),
    ],
)
def test_a_change_is_seen_and_only_code_is_executed_again(
    library: Path, runs: list[str], file: str, old: str, new: str, executes: bool
) -> None:
    notebooks.main([])
    edit(library / file, old, new)
    assert notebooks.main(["--check"]) == 1
    assert notebooks.main([]) == notebooks.main(["--check"]) == 0
    assert len(runs) == 1 + executes
    outputs = [c.outputs[0].text for c in stored(library).cells if c.cell_type == "code"]
    assert set(outputs) == {f"run {1 + executes}"}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("structopt/other.py", "2", "3"),
        ("structopt/deep.py", "# exactly", "# more or less"),
        ("structopt/deep.py", "Says one.", "Says one,\nin two lines."),
        ("structopt/deep.py", "\n\nONE", "\n\n\n\nONE"),
    ],
)
def test_what_cannot_change_a_result_leaves_the_notebook_in_step(
    library: Path, runs: list[str], file: str, old: str, new: str
) -> None:
    notebooks.main([])
    edit(library / file, old, new)
    assert notebooks.main(["--check"]) == 0


def test_check_names_what_is_wrong(
    library: Path, runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint() -> str:
        assert notebooks.main(["--check"]) == 1
        return capsys.readouterr().err

    assert "01_first.ipynb is missing" in complaint()
    notebooks.write(notebooks.draft(library / "book/src/01_first.md")[0], target(library))
    assert "was never executed" in complaint()
    notebooks.main([])
    edit(target(library), "6 * 7", "42")
    assert "is not what its source gives" in complaint()
    notebooks.main(["--force"])
    edit(library / "structopt/deep.py", "1  #", "2  #")
    assert "older package" in complaint()
    notebooks.main([])
    target(library).rename(target(library).with_name("09_gone.ipynb"))
    assert "09_gone.ipynb has no source" in complaint()
    assert runs == ["01_first"] * 3, "a check executes nothing"


def test_files_that_a_chapter_reads_count_as_well(library: Path, runs: list[str]) -> None:
    source = library / "book/src/01_first.md"
    edit(source, "kernelspec:", "reads: [results/*.json]\nkernelspec:")
    with pytest.raises(ValueError, match=r"results/\*\.json.*matches no file"):
        notebooks.main([])
    (library / "results").mkdir()
    (library / "results/a.json").write_text("1")
    notebooks.main([])
    (library / "results/a.json").write_text("2")
    assert notebooks.main(["--check"]) == 1


def test_cells_keep_their_names_when_another_is_put_before_them(library: Path) -> None:
    source = library / "book/src/01_first.md"
    before = {cell.source: cell.id for cell in notebooks.draft(source)[0].cells}
    edit(source, "Some prose.", "Some prose.\n\n+++\n\nSome prose.\n\n+++\n\nSome prose.")
    after = notebooks.draft(source)[0].cells
    assert before.items() <= {cell.source: cell.id for cell in reversed(after)}.items()
    assert len({cell.id for cell in after}) == len(after)


def test_a_page_without_code_and_a_chapter_that_is_not_there(
    library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert notebooks.main(["07_nowhere"]) == 1
    assert "no such chapter: 07_nowhere. There are: 01_first" in capsys.readouterr().err
    (library / "book/src/01_first.md").write_text("# Only prose\n")
    assert notebooks.main([]) == 1
    assert "01_first.md has no {code-cell}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_kernel_gives_the_same_bytes_twice(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(library / "book/src/01_first.md", "from structopt import losses", "1 + 1")
    assert notebooks.main([]) == 0
    first = target(library).read_bytes()
    assert notebooks.main(["--force"]) == 0
    assert target(library).read_bytes() == first
    cells = [cell for cell in stored(library).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [1, 2, 3]
    assert cells[1].outputs[0].data["text/plain"] == "2"
    assert cells[2].outputs[0].text == "42\n"
    assert set(stored(library).metadata) == {"kernelspec", "language_info", "structopt"}
    assert list(target(library).parent.glob(".01*")) == [], "a temporary file is left"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("print(6 / 0)", "ZeroDivisionError"),
        ("import time; time.sleep(60)", "timed out"),
        ("import sys; print('oh', file=sys.stderr)", "writes to stderr: oh"),
        ("import sys; print(sys.prefix)", "shows a path of this machine"),
    ],
)
def test_a_bad_cell_is_named_and_nothing_is_written(
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: str,
    complaint: str,
) -> None:
    monkeypatch.setattr(notebooks, "CELL_SECONDS", 5)
    edit(library / "book/src/01_first.md", "from structopt import losses", "1 + 1")
    edit(library / "book/src/01_first.md", "print(6 * 7)", code)
    assert notebooks.main([]) == 1
    said = capsys.readouterr().err
    line = SOURCE[: SOURCE.index("print(6 * 7)")].count("\n") + 1
    assert f"book/src/01_first.md, the cell at line {line}" in said
    assert complaint in said
    assert not target(library).exists()


def test_a_meant_error_shows_its_message_without_the_frames(library: Path) -> None:
    notebook, lines = notebooks.draft(library / "book/src/01_first.md")
    frames = ["File /home/me/x.py:3", "boom"]
    notebook.cells[1].outputs = [
        nbformat.v4.new_output("error", ename="ValueError", evalue="too big", traceback=frames)
    ]
    notebooks.tidy(notebook, lines, Path("01_first.md"))
    assert notebook.cells[1].outputs[0].traceback == ["ValueError: too big"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A reader without the package; what would be installed is noted instead."""
    asked: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command[-1]))
    return asked


def test_the_first_cell_installs_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: list[str]
) -> None:
    alone, chapters = tmp_path / "alone", tmp_path / "book" / "chapters"
    alone.mkdir()
    chapters.mkdir(parents=True)
    monkeypatch.chdir(alone)
    with pytest.raises(ModuleNotFoundError, match="make book"):
        exec(notebooks.SETUP.format(address=""), {})
    exec(notebooks.SETUP.format(address="https://example.org/a/b"), {})
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(chapters)
    exec(notebooks.SETUP.format(address="https://example.org/a/b"), {})
    assert installed == ["git+https://example.org/a/b", str(tmp_path)]


def test_the_first_cell_does_nothing_where_the_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("nothing is missing"))
    exec(notebooks.SETUP.format(address=""), {})


def test_rooms_are_found_through_every_kind_of_import(library: Path) -> None:
    package = library / "structopt" / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("from structopt.pack.inner import f\n")
    (package / "inner.py").write_text("def f():\n    import structopt.other\n")
    cells = ["%matplotlib inline\n!ls\nfrom structopt.pack import f", "import torch"]
    found = {
        path.relative_to(library / "structopt").as_posix() for path in rooms.rooms(library, cells)
    }
    assert found == {"__init__.py", "pack/__init__.py", "pack/inner.py", "other.py"}
    with pytest.raises(ValueError, match="relative import"):
        rooms.imported("from .inner import f")


@pytest.mark.slow
def test_nbval_refuses_a_stored_output_that_does_not_come_again(library: Path) -> None:
    edit(library / "book/src/01_first.md", "from structopt import losses", "1 + 1")
    assert notebooks.main([]) == 0
    edit(target(library), '"42\\n"', '"43\\n"')
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env"]
    command += ["--nbval-sanitize-with", str(BOOK / "nbval.cfg"), "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(target(library))], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "2 passed" in done.stdout
    assert "1 failed" in done.stdout
