"""What a model's own Python mentions, as far as its forward pass reaches: read, never run."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

_known: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def own(module: nn.Module) -> bool:
    """Whether the module is of the model's own making, not one of torch's layers."""
    return not type(module).__module__.startswith("torch.nn.modules.")


def mentions(modules: Iterable[nn.Module], names: frozenset[str]) -> bool:
    """Whether the code of the models' own classes speaks of one of these attributes or functions.

    That of a function that is held in a table, or called by another name, is not found.
    """
    return any(not names.isdisjoint(_names(kind)) for kind in {type(m) for m in modules if own(m)})


def _names(kind: type) -> frozenset[str]:
    if kind not in _known:
        _known[kind] = frozenset(_reached(kind))
    return _known[kind]


def _reached(kind: type) -> Iterator[str]:
    """The names in the functions that `forward` calls, directly or not.

    Those of the class, and those that stand beside it: behind others lie whole libraries.
    """
    seen: set[FunctionType] = set()
    todo = [*_functions(kind, "forward"), *_functions(kind, "__call__")]
    while todo:
        function = todo.pop()
        if function in seen:
            continue
        seen.add(function)
        names = {name for code in _nested(function.__code__) for name in code.co_names}
        yield from names
        for name in names:
            todo += [*_functions(kind, name), *_beside(function, function.__globals__.get(name))]
        for cell in function.__closure__ or ():
            todo += _beside(function, cell.cell_contents) if cell != CellType() else ()


def _functions(kind: type, name: str) -> list[FunctionType]:
    """The methods of this name that a class has, or one of its bases, but for torch's."""
    held = [vars(base).get(name) for base in kind.__mro__]
    return [function for one in held for function in _plain(getattr(one, "fget", one))]


def _beside(function: FunctionType, held: Any) -> list[FunctionType]:
    return [found for found in _plain(held) if found.__module__ == function.__module__]


def _plain(held: Any) -> list[FunctionType]:
    """The function itself, what it decorates too, where it is not torch's."""
    found = []
    while isinstance(held, FunctionType | MethodType | classmethod | staticmethod):
        if isinstance(held, FunctionType) and not (held.__module__ or "").startswith("torch."):
            found.append(held)
        held = getattr(held, "__wrapped__", None) or getattr(held, "__func__", None)
    return found


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
