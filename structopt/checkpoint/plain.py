"""Attributes that a file without pickle can hold: numbers and words, in any plain containers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

MOST, DEEPEST = 10**7, 100  # entries and levels of what is plain: JSON has its limits too


def is_plain(value: Any) -> bool:
    """Whether :func:`pack` takes it: numbers and words, also in tuples, lists and dicts.

    Not in containers that hold themselves, nest very deep, or share parts so often that written
    out they would be endless.
    """
    size, height = _extent(value, {}, 0)
    return size <= MOST and height <= DEEPEST


def _extent(value: Any, known: dict[int, tuple[float, int]], depth: int) -> tuple[float, int]:
    """Entries when written out, infinitely many of what is not plain; and levels of nesting."""
    if not isinstance(value, dict) and type(value) not in (tuple, list, torch.Size):
        plain = value is None or type(_python(value)) in (bool, int, float, str)
        return (1 if plain else math.inf), 0
    if id(value) in known or depth > DEEPEST:
        return known.get(id(value), (math.inf, 0))
    known[id(value)] = math.inf, 0  # met again before it is through, it holds itself
    size, height = 1.0, 0
    if isinstance(value, dict) and not all(type(key) is str for key in value):
        return math.inf, 0
    for item in value.values() if isinstance(value, dict) else value:
        more, levels = _extent(item, known, depth + 1)
        size, height = size + more, max(height, levels)
        if size > MOST:
            return math.inf, 0
    known[id(value)] = size, height + 1
    return size, height + 1


def inside(value: Any, kinds: type | tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """What of these kinds lies in lists, tuples and dicts, with the way to it.

    Of a container that stands in several places, or in itself, the first way.

    >>> dict(inside({"a": [1, torch.ones(1)]}, torch.Tensor))
    {"['a'][1]": tensor([1.])}
    """
    way, seen, walks = list[Any](), {id(value)}, [_entries(value)]
    while walks:  # no recursion, however deep it goes
        for key, item in walks[-1]:
            if isinstance(item, kinds):
                yield "".join(f"[{step!r}]" for step in (*way, key)), item
            elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
                seen.add(id(item))
                way.append(key)
                walks.append(_entries(item))
                break
        else:
            walks.pop()
            del way[-1:]


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        return iter(value.items())
    return iter(enumerate(value if isinstance(value, (list, tuple)) else ()))


def _python(value: Any) -> Any:
    """A size that numpy computed as Python's number."""
    return value.item() if isinstance(value, np.generic) else value


def pack(value: Any) -> Any:
    """JSON has no tuples, so containers say what they are."""
    if isinstance(value, dict):
        return {"dict": {key: pack(item) for key, item in value.items()}}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [pack(item) for item in value]}
    return _python(value)


def unpack(packed: Any) -> Any:
    """What :func:`pack` was given."""
    if not isinstance(packed, dict):
        return packed
    ((kind, items),) = packed.items()
    if kind == "dict":
        return {str(key): unpack(item) for key, item in items.items()}
    made = [unpack(item) for item in items]
    if kind == "Size" and not all(type(n) is int and 0 <= n < 2**63 for n in made):
        raise ValueError(f"{made} is no size of a tensor")
    return {"tuple": tuple, "list": list, "Size": torch.Size}[kind](made)
