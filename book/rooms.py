"""Which files of the package a piece of code depends on, and one hash of what they do."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable
from pathlib import Path

PACKAGE = "structopt"


def imported(text: str) -> set[str]:
    """Dotted names of the package's modules that may be imported by `text`, lazily or not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            raise ValueError("a relative import hides which room is meant: write it in full")
    return {name for name in names if name == PACKAGE or name.startswith(PACKAGE + ".")}


def files(root: Path, names: Iterable[str]) -> set[Path]:
    """The files of these modules and of the packages around them."""
    found = set()
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            stem = root.joinpath(*parts[:depth])
            found |= {p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()}
    return found


def rooms(root: Path, cells: Iterable[str]) -> set[Path]:
    """All files of the package that these cells can reach, through any number of imports."""
    code = "\n".join(
        line
        for cell in cells
        for line in cell.splitlines()
        if not line.lstrip().startswith(("%", "!"))
    )
    reached: set[Path] = set()
    new = files(root, imported(code))
    while new:
        reached |= new
        found = set().union(*(imported(path.read_text(encoding="utf-8")) for path in new))
        new = files(root, found) - reached
    return reached


def substance(text: str) -> str:
    """The text without comments, docstrings and blank lines: what can change a result."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        holder = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        first = node.body[0] if holder and node.body else None
        if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
            for row in range(first.lineno, (first.end_lineno or first.lineno) + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def fingerprint(root: Path, cells: Iterable[str], reads: Iterable[str] = ()) -> str:
    """A hash of all rooms that the cells use, and of the files that they are said to read."""
    digest = hashlib.sha256()
    for path in sorted(rooms(root, cells)):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(substance(path.read_text(encoding="utf-8")).encode())
    for pattern in sorted(reads):
        found = sorted(path for path in root.glob(pattern) if path.is_file())
        if not found:
            raise ValueError(f"'reads: {pattern}' in the front matter matches no file")
        for path in found:
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
