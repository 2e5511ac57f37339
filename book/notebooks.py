"""Make the notebooks of the chapters: book/src/NN_name.md -> book/chapters/NN_name.ipynb.

    python book/notebooks.py                 execute the chapters that changed
    python book/notebooks.py 02_loss --force execute this one, changed or not
    python book/notebooks.py --check         execute nothing; fail on a notebook out of step

A notebook is committed with its outputs, so what the reader sees is what ran. A change of the
prose alone keeps the outputs; a change of a code cell, or of a room that the chapter imports,
executes the chapter again.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
import yaml
from rooms import fingerprint  # beside this file

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "book" / "src"
NOTEBOOKS = ROOT / "book" / "chapters"
CELL_SECONDS = 300
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # many times faster for tiny networks, and results repeat
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not one in the home folder
    "TQDM_DISABLE": "1",  # a progress bar is for the eye, not for the page
    "PYTHONHASHSEED": "0",
}
FOREIGN = re.compile(
    r"(?<![\w.:/-])/(?:home|Users|root|tmp|var|usr|opt)/\w|\b[A-Z]:\\\\\w|site-packages/|"
    + "|".join(re.escape(str(path)) for path in (ROOT, Path.home(), Path(sys.prefix)))
)

SETUP = """\
# Opened alone (in Colab, say)? Then install the book's package first.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("structopt") is None:
    address = "{address}"
    checkout = Path.cwd().parents[1] if len(Path.cwd().parents) > 1 else Path.cwd()
    if (checkout / "pyproject.toml").is_file():
        source = str(checkout)
    elif address:
        source = f"git+{{address}}"
    else:
        raise ModuleNotFoundError(
            "This notebook needs the book's package. Get the whole book and open the notebook "
            "from its folder book/chapters; `make book` there installs everything."
        )
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)"""


class Broken(Exception):
    """A chapter that cannot become a notebook; the text says where and why."""


def address() -> str:
    """The repository's address, which is set in one place and may still be empty."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    return str((config.get("repository") or {}).get("url") or "")


def draft(source: Path) -> tuple[nbformat.NotebookNode, list[int]]:
    """The notebook that `source` gives, without outputs, and the line where each cell starts."""
    from myst_nb.core.read import read_myst_markdown_notebook

    text = source.read_text(encoding="utf-8")
    notebook = read_myst_markdown_notebook(text, add_source_map=True, path=source)
    lines = [line + 1 for line in notebook.metadata.pop("source_map")]
    first = next((i for i, c in enumerate(notebook.cells) if c.cell_type == "code"), None)
    if first is None:
        raise Broken(f"{source.name} has no {{code-cell}}: a page without code belongs in the book")
    setup = nbformat.v4.new_code_cell(SETUP.format(address=address()))
    setup.metadata["tags"] = ["hide-cell"]
    setup.metadata["mystnb"] = {"code_prompt_show": "Install the package, if it is missing"}
    notebook.cells.insert(first, setup)
    lines.insert(first, lines[first])
    taken: dict[str, int] = {}
    for cell in notebook.cells:
        name = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        taken[name] = taken.get(name, -1) + 1
        cell["id"] = f"{name}-{taken[name]}"
    front = {k: v for k, v in notebook.metadata.items() if k not in ("jupytext", "kernelspec")}
    notebook.metadata = nbformat.from_dict(
        front
        | {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
            "structopt": {
                "source": hashlib.sha256(text.encode()).hexdigest(),
                "rooms": fingerprint(ROOT, code(notebook), front.get("reads", [])),
            },
        }
    )
    return notebook, lines


def code(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def read(path: Path) -> nbformat.NotebookNode | None:
    return nbformat.read(path, as_version=4) if path.is_file() else None


def executed(notebook: nbformat.NotebookNode) -> bool:
    return all(c.execution_count for c in notebook.cells if c.cell_type == "code" and c.source)


def bare(notebook: nbformat.NotebookNode) -> list[tuple[str, str, str, str]]:
    """What of each cell comes from the source."""
    return [
        (c.cell_type, c.id, c.source, json.dumps(c.metadata, sort_keys=True))
        for c in notebook.cells
    ]


def fault(new: nbformat.NotebookNode, old: nbformat.NotebookNode | None) -> str | None:
    """Why the notebook on disk may not be shown, or None."""
    if old is None:
        return "is missing"
    if not executed(old):
        return "was never executed"
    if old.metadata.get("structopt", {}).get("rooms") != new.metadata.structopt.rooms:
        return "was executed with an older package or older data"
    if bare(old) != bare(new) or old.metadata != new.metadata:
        return "is not what its source gives"
    return None


def outputs_kept(new: nbformat.NotebookNode, old: nbformat.NotebookNode | None) -> bool:
    """Carry the outputs over where only prose, or the installing cell, has changed."""
    if old is None or not executed(old):
        return False
    if old.metadata.get("structopt", {}).get("rooms") != new.metadata.structopt.rooms:
        return False
    before = [c for c in old.cells if c.cell_type == "code"]
    after = [c for c in new.cells if c.cell_type == "code"]
    same = len(before) == len(after) and all(
        (a.source, a.metadata) == (b.source, b.metadata)
        for a, b in zip(after[1:], before[1:], strict=True)  # the first one only installs
    )
    if same:
        for a, b in zip(after, before, strict=True):
            a.outputs, a.execution_count = b.outputs, b.execution_count
    return same


def execute(notebook: nbformat.NotebookNode, lines: list[int], source: Path) -> None:
    """Run every cell in a fresh kernel, as a reader does; outputs are stored in `notebook`."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    at = 0

    def note(cell: nbformat.NotebookNode, cell_index: int, **_: Any) -> None:
        nonlocal at
        at = cell_index

    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=40"],  # errors only: it warns about local sockets
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        on_cell_start=note,
    )
    kept = nbformat.from_dict(notebook.metadata)
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        where = f"book/src/{source.name}, the cell at line {lines[at]}"
        raise Broken(f"{where}:\n{str(error).strip()}") from None
    notebook.metadata = kept


def tidy(notebook: nbformat.NotebookNode, lines: list[int], source: Path) -> None:
    """Leave nothing in the outputs that is true of one machine only."""
    for cell, line in zip(notebook.cells, lines, strict=True):
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "error":  # frames name files of this machine
                output.traceback = [f"{output.ename}: {output.evalue}"]
            where = f"book/src/{source.name}, the cell at line {line}"
            if output.get("name") == "stderr":
                raise Broken(f"{where} writes to stderr: {output.text.strip()[:500]}")
            shown = json.dumps({k: v for k, v in output.items() if k != "metadata"})
            texts = re.sub(r'"image/png": "[^"]*"', "", shown)
            if found := FOREIGN.search(texts):
                raise Broken(
                    f"{where} shows a path of this machine: …{found.string[found.start() :][:80]}…"
                )


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Whole or not at all, and byte for byte the same from the same run."""
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"  # keys sorted, sources line by line
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.stem}.", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def export(notebook: nbformat.NotebookNode) -> None:
    """Write the figure of each cell that names a `file` (below `book/`): the README shows one."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []) if "file" in cell.metadata else []:
            if png := output.get("data", {}).get("image/png"):
                (ROOT / "book" / cell.metadata["file"]).write_bytes(base64.b64decode(png))


def make(source: Path, force: bool) -> str:
    """Bring one notebook into step; say what was done."""
    target = NOTEBOOKS / f"{source.stem}.ipynb"
    new, lines = draft(source)
    old = read(target)
    if not force and fault(new, old) is None:
        return "unchanged"
    if not force and outputs_kept(new, old):
        write(new, target)
        return "prose changed, outputs kept"
    began = time.monotonic()
    execute(new, lines, source)
    tidy(new, lines, source)
    write(new, target)
    export(new)
    return f"executed in {time.monotonic() - began:.0f} s"


def check(sources: list[Path]) -> list[str]:
    """What is wrong with the notebooks on disk; executes nothing."""
    faults = []
    for source in sources:
        target = NOTEBOOKS / f"{source.stem}.ipynb"
        if reason := fault(draft(source)[0], read(target)):
            faults.append(f"book/chapters/{target.name} {reason}")
    stems = {source.stem for source in SOURCES.glob("*.md")}
    orphans = sorted(path for path in NOTEBOOKS.glob("*.ipynb") if path.stem not in stems)
    return faults + [f"book/chapters/{path.name} has no source in book/src" for path in orphans]


def chosen(names: list[str]) -> list[Path]:
    if not names:
        return sorted(SOURCES.glob("*.md"))
    paths = [SOURCES / f"{Path(name).stem}.md" for name in names]
    if missing := [path.stem for path in paths if not path.is_file()]:
        known = ", ".join(path.stem for path in sorted(SOURCES.glob("*.md")))
        raise Broken(f"no such chapter: {', '.join(missing)}. There are: {known}")
    return paths


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Execute the chapters that changed.")
    parser.add_argument("chapters", nargs="*", help="such as 02_loss_functions (default: all)")
    parser.add_argument("--force", action="store_true", help="execute unchanged chapters too")
    parser.add_argument("--check", action="store_true", help="execute nothing, only compare")
    options = parser.parse_args(arguments)
    os.environ.update(ENVIRONMENT)
    NOTEBOOKS.mkdir(exist_ok=True)
    try:
        sources = chosen(options.chapters)
        if options.check:
            if faults := check(sources):
                print("\n".join(faults), file=sys.stderr)
                print("Remedy: make notebooks", file=sys.stderr)
                return 1
            print(f"{len(sources)} notebooks are what their sources give.")
            return 0
        for number, source in enumerate(sources, 1):
            print(f"[{number}/{len(sources)}] {source.stem} … ", end="", flush=True)
            print(make(source, options.force), flush=True)
    except Broken as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
