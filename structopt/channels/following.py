"""How a mirror follows data that only moves: the op is run on indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from structopt.channels.labels import Vector
from structopt.channels.mirrors import Axis, Book, Mirror, Places


def follow(
    book: Book,
    move: Callable[[Tensor], Any],
    shape: Sequence[int],
    mirror: Mirror,
    known: object = None,
) -> Any:
    """The mirrors of `move(x)` for an x of this shape: run the same op on index tensors.

    For each labelled dimension an index, expanded over all the others, goes through the op. What
    comes out says where each element came from; a view of an expanded tensor copies nothing.
    A list comes back where the op returns several tensors, `None` where nothing is labelled.
    Moves that are `known` by the same name are the same: many layers are alike.
    """
    mirrors: list[list[list[Vector]]] = []  # of each output, of each dimension: what meets there
    places: Places = []
    single = True
    for dim, axis in enumerate(mirror):
        if axis is None:
            continue
        key = (known, tuple(shape), dim)
        if known is None or key not in book.moved:
            book.moved[key] = _places(move, shape, dim)
        single, places = book.moved[key]
        mirrors = mirrors or [[[] for _ in out] for out, _ in places]
        book.picked = book.picked or [[] for _ in places]
        alike = len({out for out, _ in places}) == 1
        for (_, index), dims, picked in zip(places, mirrors, book.picked, strict=True):
            for d, labels in _spread(book, index, axis, picked, alike, single):
                dims[d].append(labels)
    made = [[_combine(book, axes) for axes in dims] for dims in mirrors]
    for (sizes, _), result in zip(places, made, strict=True):
        for size, axis in zip(sizes, result, strict=True):
            book.extent(size, axis)
    return None if not made else made[0] if single else made


@_disable_current_modes()  # what else watches the model has no use for these
def _places(move: Callable[[Tensor], Any], shape: Sequence[int], dim: int) -> tuple[bool, Places]:
    """Whether one tensor comes out; of each, its shape and where its elements lay along `dim`.

    Along a dimension where that stays the same, it is said once.
    """
    index = torch.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])
    moved = move(index.expand(tuple(shape)))
    single, found = isinstance(moved, Tensor), []
    for out in [moved] if single else moved:
        place = out.numpy()
        for d in range(place.ndim):  # constant ones of a view have stride 0; others are compared
            first, second = (place[(slice(None),) * d + (slice(n, n + 1),)] for n in (0, 1))
            if place.shape[d] > 1 and (
                place.strides[d] == 0 or ((first == second).all() and (place == first).all())
            ):
                place = first
        found.append((out.shape, place))
    return single, found


def _combine(book: Book, axes: list[Vector]) -> Axis:
    """The labels of a dimension that several were flattened into: pairs, the slowest first."""
    if not axes:
        return None
    order = sorted(axes, key=lambda axis: int(np.argmax(axis != axis[0])))
    result = order[0]
    for outer in order[1:]:
        result = book.labels.pair(outer, result)
    return result


def _spread(
    book: Book, index: Vector, axis: Vector, picked: list[int], alike: bool, alone: bool
) -> list[tuple[int, Vector]]:
    """Along which dimensions of what came out the labels of `axis` vary, and how."""
    if index.size < 2:
        picked += [int(axis[i]) for i in index.ravel()]
        why = book.why("picks single indices by number")
        if alone:  # perhaps for its shape alone
            book.owed.append((axis, why))
        else:
            book.labels.freeze(axis, why)
        return []
    grid = axis[index]
    if max(index.shape) == index.size < len(axis):
        _piece(book, index.ravel(), axis, alike)
    parts = book.split(grid.ravel(), index.shape)
    return [(d, part) for d, part in enumerate(parts) if part is not None]


def _piece(book: Book, index: Vector, axis: Vector, alike: bool) -> None:
    """Equal pieces are tied, as in `chunk` or in `x[:, ::2]`; another piece stands apart."""
    start, count, size = int(index[0]), len(index), len(axis)
    step = int(index[1] - index[0])
    if alike and size % count == 0 and np.array_equal(index, np.arange(count) * step + start):
        if step == 1 and start % count == 0:
            blocks = axis.reshape(-1, count)
            book.labels.tie(blocks[1:].ravel(), np.tile(blocks[0], len(blocks) - 1))
            return
        if step * count == size and start < step:
            blocks = axis.reshape(count, step).T
            book.labels.tie(blocks[1:].ravel(), np.tile(blocks[0], step - 1))
            return
    if (np.diff(index) != 1).any():
        book.freeze(axis, "picked by numbers that stay")
    book.pieces.append(axis[index])
