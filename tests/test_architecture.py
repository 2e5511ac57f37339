"""Imports only go down, and the public names are what PUBLIC says: growing it is a visible act."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import structopt

ROOT = Path(structopt.__file__).parent

# Room -> the rooms it may import. CONTRIBUTING.md prints this table; a test keeps the two equal.
MAY_IMPORT: dict[str, set[str]] = {
    "devices": set(),
    "files": set(),
    "plots": set(),
    "losses": set(),
    "networks": set(),
    "data": set(),
    "channels": {"devices", "plots"},
    "descent": {"distributed", "plots"},
    "measure": {"devices", "files"},
    "checkpoint": {"files", "training"},
    "distributed": {"devices"},
    "training": {"devices", "distributed", "files", "losses", "measure", "plots"},
    "distillation": {"files", "losses", "training"},
    "compression": {"channels", "checkpoint", "files", "losses", "measure", "training"},
    "pruning": {"channels", "descent", "losses", "measure", "training"},
    "slicing": {"channels", "devices", "distributed", "losses", "measure", "training"},
}


def rooms() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules([str(ROOT)]))


def imports_of(room: str) -> set[str]:
    """Rooms named in any import of the room's files, at the top or inside a function."""
    path = ROOT / f"{room}.py"
    files = [path] if path.exists() else sorted((ROOT / room).rglob("*.py"))
    found = set()
    for file in files:
        package = ["structopt", *file.relative_to(ROOT).parts[:-1]]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                stem = [*base, *(node.module.split(".") if node.module else [])]
                names = [".".join([*stem, alias.name]) for alias in node.names]
            else:
                continue
            found |= {n.split(".")[1] for n in names if n.startswith("structopt.")}
    return (found & set(rooms())) - {room}


@pytest.mark.parametrize("room", rooms())
def test_imports_only_go_down(room: str) -> None:
    assert room in MAY_IMPORT, f"add `{room}` to MAY_IMPORT and to the table in CONTRIBUTING.md"
    illegal = imports_of(room) - MAY_IMPORT[room]
    assert not illegal, f"structopt.{room} imports {sorted(illegal)}: imports only go down"


def test_the_table_has_no_cycle() -> None:
    left = dict(MAY_IMPORT)
    while left:
        free = [room for room, needs in left.items() if not needs & set(left)]
        assert free, f"a cycle among {sorted(left)}"
        for room in free:
            del left[room]


def test_contributing_prints_the_same_table() -> None:
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room, needs in MAY_IMPORT.items():
        row = f"| `{room}` | {', '.join(f'`{n}`' for n in sorted(needs)) or '–'} |"
        assert row in text, f"CONTRIBUTING.md lacks the row: {row}"


def public_names(room: str) -> list[str]:
    module = importlib.import_module(f"structopt.{room}")
    assert hasattr(module, "__all__"), f"structopt.{room} must say in __all__ what is public"
    return sorted(module.__all__)


@pytest.mark.parametrize("room", rooms())
def test_public_names_are_frozen(room: str) -> None:
    listed = (Path(__file__).parent / "public_names.txt").read_text().split()
    want = sorted(name.split(".", 1)[1] for name in listed if name.startswith(f"{room}."))
    assert public_names(room) == want, f"tests/public_names.txt and structopt.{room} differ"


@pytest.mark.parametrize("room", rooms())
def test_every_public_name_is_documented(room: str) -> None:
    module = importlib.import_module(f"structopt.{room}")
    assert module.__doc__, f"structopt.{room} says nothing about itself"
    for name in public_names(room):
        thing = getattr(module, name)
        if inspect.isroutine(thing) or inspect.isclass(thing):
            assert thing.__doc__, f"structopt.{room}.{name} has no docstring"
