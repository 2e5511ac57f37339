"""Nested arguments and outputs of a model."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set, ValuesView
from typing import Any

import torch
from torch import Tensor, nn

_LEAVES = (int, bool, float, str, type(None), torch.dtype, torch.device, torch.layout)


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


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments or outputs of a model."""
    if isinstance(tree, Tensor):
        yield tree
    elif type(tree) in _LEAVES:  # most arguments: asked first, since the rest takes its time
        return
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, list | tuple | Set | ValuesView | deque):
        for value in tree:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from tensors_of(getattr(tree, field.name, None))
    elif hasattr(tree, "__dict__") and not isinstance(tree, type | nn.Module):
        yield from tensors_of(vars(tree))


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
