"""Rules of operators that an index tells what to pick, or where to put it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structopt.channels.calls import Call, flat, join, rule
from structopt.channels.following import follow
from structopt.channels.mirrors import Mirror


@rule("gather")
def picked(call: Call) -> Mirror:
    """Along one dimension an index picks; along the others it has the size of its source."""
    mirror, index, out = list(call.mirror(call[0])), call.mirror(call[2]), call.out.shape
    for d, axis in enumerate(index):
        if d == call[1] % len(mirror) or call[0].shape[d] != out[d]:
            call.freeze_all([mirror[d], axis], "picked by numbers that stay")
            mirror[d] = None
        elif axis is not None:
            mirror[d] = join(call, [mirror[d], axis])
    return mirror


@rule("index", "_unsafe_index", "index_select")
def gather(call: Call) -> Any:
    """As `moves` along the dimensions that no index picks from; it would pick the old numbers."""
    source, *rest = call.args
    known = [i for i in flat(rest) if isinstance(i, Tensor)]
    mirror = list(call.mirror(source))
    for index in known:
        call.freeze_all(call.mirror(index), "used as an index")
    dims = _indexed(call)
    for dim in dims:
        call.book.freeze(mirror[dim], "picked by numbers that stay")
        mirror[dim] = None
    if any(i.is_meta for i in known):
        return _unknown_places(call, mirror, dims)
    move = lambda grid: call.func(grid, *_cpu(rest), **call.kwargs)  # noqa: E731
    return follow(call.book, move, source.shape, mirror)


def _unknown_places(call: Call, mirror: Mirror, dims: list[int]) -> Mirror:
    """The dimensions that are not picked from keep their labels; where they are is torch's rule."""
    if call.book.op == "index_select":
        return mirror
    rest = [axis for d, axis in enumerate(mirror) if d not in dims]
    new: Mirror = [None] * (call.out.ndim - len(rest))
    together = dims == list(range(dims[0], dims[-1] + 1))
    return rest[: dims[0]] + new + rest[dims[0] :] if together else new + rest


def _indexed(call: Call) -> list[int]:
    """The dimensions that an index picks from."""
    if call.book.op == "index_select":
        return [call[1] % max(call[0].ndim, 1)]
    dims, place = list[int](), 0
    for index in call[1]:
        width = index.ndim if index is not None and index.dtype == torch.bool else 1
        dims += range(place, place + width) if index is not None else ()
        place += width
    return dims


@rule("index_put", "_unsafe_index_put")
def put(call: Call) -> Mirror:
    """Values go to places: along the dimensions that no index picks from, they meet the target."""
    mirror, value, dims = list(call.mirror(call[0])), call[2], _indexed(call)
    if dims != list(range(len(dims))):
        call.freeze_everything()
        return [None] * len(mirror)
    for d in dims:
        call.book.freeze(mirror[d], "written by index")
        mirror[d] = None
    below = call.mirror(value)
    for d in range(-(len(mirror) - len(dims)), 0):
        if value.ndim >= -d and value.shape[d] == call[0].shape[d]:
            mirror[d] = join(call, [mirror[d], below[d]])
    call.freeze_all(below[: max(value.ndim - len(mirror) + len(dims), 0)], "written by index")
    return mirror


@rule("index_add", "index_copy", "index_reduce", "index_fill")
@rule("scatter", "scatter_add", "scatter_reduce")
def placed(call: Call) -> Mirror:
    """Along one dimension values go to places that an index names; along the others they meet."""
    mirror, index, values = list(call.mirror(call[0])), call[2], call[3]
    dim = call[1] % max(len(mirror), 1)
    given = call.mirror(values) if isinstance(values, Tensor) and values.ndim else []
    places = call.mirror(index) if index.ndim == len(mirror) else []
    for one in (mirror, given, places):
        call.freeze_all(one[dim : dim + 1], "written by index")
    for d, axis in enumerate(given):
        mirror[d] = join(call, [mirror[d], axis])
    for d, axis in enumerate(places):
        mirror[d] = join(call, [mirror[d], axis]) if axis is not None else mirror[d]
    mirror[dim] = None
    return mirror


def _cpu(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return type(tree)(_cpu(part) for part in tree)
    return tree.cpu() if isinstance(tree, Tensor) else tree
