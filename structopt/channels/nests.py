"""Nested arguments and outputs of a model."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set, ValuesView
from typing import Any

import torch
from torch import Tensor, nn

_LEAVES = frozenset(
    (
        int,
        bool,
        float,
        str,
        type(None),
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
    )
)


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of arguments with each tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        made = [map_tensors(value, change) for value in tree]
        return type(tree)(*made) if hasattr(tree, "_fields") else type(tree)(made)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        twin = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(twin, field.name, map_tensors(getattr(tree, field.name), change))
        return twin
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor in nested arguments or outputs of a model."""
    found: list[Tensor] = []
    _gather((tree,), found)
    return found


def _gather(parts: Iterable[Any], found: list[Tensor]) -> None:
    for part in parts:
        if type(part) in _LEAVES:  # most arguments: asked first, since the rest takes its time
            continue
        if isinstance(part, Tensor):
            found.append(part)
        else:
            _gather(part if type(part) in (tuple, list) else _parts(part), found)


def _parts(tree: Any) -> Iterable[Any]:
    parts: Iterable[Any] = ()
    if isinstance(tree, Mapping):
        parts = tree.values()
    elif isinstance(tree, list | tuple | Set | ValuesView | deque):
        parts = tree
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        parts = (getattr(tree, field.name, None) for field in dataclasses.fields(tree))
    elif hasattr(tree, "__dict__") and not isinstance(tree, type | nn.Module):
        parts = vars(tree).values()
    return parts


def call(model: nn.Module, example: Any) -> Any:
    """Call a model with a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(example, tuple):
        return model(*example)
    if isinstance(example, Mapping):
        return model(**example)
    return model(example)


def first_line(problem: Exception) -> str:
    """What an error says, without the rest of its story."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]
