"""What a model's own Python mentions, as far as its forward pass reaches: read, never run."""

from __future__ import annotations

import ast
import inspect
import textwrap
import weakref
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_known: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()
_choosing: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()
_MODE = "training"


def own(module: nn.Module) -> bool:
    """Whether the module is of the model's own making, not one of torch's layers."""
    return _is_own(type(module))


def _is_own(kind: type) -> bool:
    return not kind.__module__.startswith("torch.nn.modules.")


def mentions(modules: Iterable[nn.Module], names: frozenset[str]) -> bool:
    """Whether the code of the models' own classes speaks of one of these attributes or functions.

    That of a function that is held in a table, or called by another name, is not found.
    """
    kinds = filter(_is_own, {type(module) for module in modules})
    return any(not names.isdisjoint(_names(kind)) for kind in kinds)


def ask_for_mode(modules: Iterable[nn.Module]) -> bool:
    """Whether the code of the models' own classes may take another branch in training.

    It may not where the mode is only handed to functions of torch's, as dropout is. A norm that is
    made of torch's chooses its statistics by it.
    """
    return any(map(_chooses, filter(_is_own, {type(module) for module in modules})))


def _chooses(kind: type) -> bool:
    if kind not in _choosing:
        silent = _MODE not in _names(kind) or issubclass(kind, _NormBase)
        _choosing[kind] = not silent and any(map(_looks, _reached(kind)))
    return _choosing[kind]


def _looks(function: FunctionType) -> bool:
    """Whether a function does more with the mode than to hand it to one of torch's."""
    if _MODE not in _spoken(function):
        return False
    try:
        source = inspect.getsource(function.__code__)  # not of what it wraps
        nodes = list(ast.walk(ast.parse(textwrap.dedent(source))))
    except (OSError, TypeError, SyntaxError):  # no source to read
        return True
    calls = [n for n in nodes if isinstance(n, ast.Call) and _is_torchs(n.func, function)]
    handed = [part for n in calls for part in (*n.args, *(k.value for k in n.keywords))]
    asked = [n for n in nodes if isinstance(n, ast.Attribute) and n.attr == _MODE]
    return not asked or any(node not in handed for node in asked)


def _is_torchs(node: ast.expr, function: FunctionType) -> bool:
    """Whether this is a function of `torch.nn.functional`, by a name that the module gives it."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path, node = [node.attr, *path], node.value
    if not isinstance(node, ast.Name) or node.id not in function.__code__.co_names:
        return False
    held = function.__globals__.get(node.id)
    for name in path:
        held = getattr(held, name, None)
    return getattr(held, "__module__", None) == "torch.nn.functional"


def _names(kind: type) -> frozenset[str]:
    if kind not in _known:
        _known[kind] = frozenset(name for f in _reached(kind) for name in _spoken(f))
    return _known[kind]


def _spoken(function: FunctionType) -> set[str]:
    return {name for code in _nested(function.__code__) for name in code.co_names}


def _reached(kind: type) -> set[FunctionType]:
    """The functions that `forward` calls, directly or not, itself among them.

    Those of the class, and those that stand beside it: behind others lie whole libraries.
    """
    seen: set[FunctionType] = set()
    todo = [*_functions(kind, "forward"), *_functions(kind, "__call__")]
    while todo:
        function = todo.pop()
        if function in seen:
            continue
        seen.add(function)
        for name in _spoken(function):
            todo += [*_functions(kind, name), *_beside(function, function.__globals__.get(name))]
        for cell in function.__closure__ or ():
            todo += _beside(function, cell.cell_contents) if cell != CellType() else ()
    return seen


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
