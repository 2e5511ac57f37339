"""What is owed for a tensor: labels that are frozen as soon as something uses it.

An average over channels says something else without some of them, and so does a channel picked by
its number. But the one may only be what a norm measures the same channels from, and the other may
be read for its shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from structopt.channels.calls import Call
from structopt.channels.labels import Vector
from structopt.channels.mirrors import Book, Mirror

_OWED = "_structopt_owed"
_SAME = ("_to_copy", "clone", "detach", "alias")
Debts = Sequence[tuple[Vector, str]]


def debts_of(tensor: Tensor) -> Debts:
    known: Debts = getattr(tensor, _OWED, ())
    return known


def owe(tensors: Iterable[Tensor], debts: Debts) -> None:
    for tensor in tensors if debts else ():
        setattr(tensor, _OWED, [*debts_of(tensor), *debts])


def settle(book: Book, tensor: Tensor) -> None:
    """Freeze what waited for the tensor to be used."""
    for axis, why in debts_of(tensor):
        book.labels.freeze(axis, why)


def carried(call: Call, given: Iterable[Tensor]) -> Debts:
    """Settle the debts of what an operator is given; or those that its result takes over."""
    owing = [tensor for tensor in given if debts_of(tensor)]
    if owing and _looks_on(call):
        return debts_of(owing[0])
    for tensor in owing:
        held = call.mirror(call[0]) if call.book.op.rstrip("_") in ("sub", "div") else []
        if tensor is not call[0] and all(_is_among(axis, held) for axis, _ in debts_of(tensor)):
            for axis, _ in debts_of(tensor):  # the mean of channels, from which they are measured
                call.book.averages(axis)
        else:
            settle(call.book, tensor)
    return ()


def _looks_on(call: Call) -> bool:
    """Whether the same numbers come out in another shape or type, or with a small one added."""
    alone = call.book.op == "add" and not isinstance(call[1], Tensor)
    return call.func.is_view or call.book.op in _SAME or alone


def _is_among(axis: Vector, mirror: Mirror) -> bool:
    return any(other is not None and np.array_equal(axis, other) for other in mirror)
