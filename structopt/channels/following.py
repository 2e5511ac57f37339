"""How a mirror follows data that only moves: the op is run on indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from structopt.channels.labels import Vector
from structopt.channels.mirrors import Axis, Book, Mirror


@_disable_current_modes()  # what else watches the model has no use for these
def follow(book: Book, move: Callable[[Tensor], Any], shape: Sequence[int], mirror: Mirror) -> Any:
    """The mirrors of `move(x)` for an x of this shape: run the same op on index tensors.

    For each labelled dimension an index, expanded over all the others, goes through the op. What
    comes out says where each element came from; a view of an expanded tensor copies nothing.
    A list comes back where the op returns several tensors, `None` where nothing is labelled.
    """
    mirrors: list[list[list[Vector]]] = []  # of each output, of each dimension: what meets there
    sizes: list[torch.Size] = []
    single = True
    for dim, axis in enumerate(mirror):
        if axis is None:
            continue
        index = torch.arange(len(axis)).reshape([-1 if d == dim else 1 for d in range(len(shape))])
        moved = move(index.expand(tuple(shape)))
        single = isinstance(moved, Tensor)
        outputs = [moved] if single else list(moved)
        mirrors = mirrors or [[[] for _ in range(out.ndim)] for out in outputs]
        sizes = [out.shape for out in outputs]
        book.picked = book.picked or [[] for _ in outputs]
        alike = len({out.shape for out in outputs}) == 1
        for out, dims, picked in zip(outputs, mirrors, book.picked, strict=True):
            for d, labels in _spread(book, out, axis, picked, alike, single):
                dims[d].append(labels)
    made = [[_combine(book, axes) for axes in dims] for dims in mirrors]
    for shape_, result in zip(sizes, made, strict=True):
        for size, axis in zip(shape_, result, strict=True):
            book.extent(size, axis)
    return None if not made else made[0] if single else made


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
    book: Book, out: Tensor, axis: Vector, picked: list[int], alike: bool, alone: bool
) -> list[tuple[int, Vector]]:
    """Along which dimensions of `out` the labels of `axis` vary, and how."""
    index = out.numpy()
    for d in range(index.ndim):  # constant dimensions of a view have stride 0; others are compared
        first = index[(slice(None),) * d + (slice(1),)]
        if index.shape[d] > 1 and (index.strides[d] == 0 or (index == first).all()):
            index = first
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
