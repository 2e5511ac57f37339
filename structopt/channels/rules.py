"""Which rule an operator has: by its name, by being a view, by its tag; or none.

An operator without a rule freezes all labels that it touches: sound, visible, never wrong.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from structopt.channels import picking, products, statistics  # noqa: F401 - they fill the table
from structopt.channels.calls import Call, Rule, named
from structopt.channels.moving import as_complex, cat, fresh, moves, pointwise, stack

__all__ = ["CARRYING", "find", "fresh", "is_square", "scale", "unknown"]

# What made the arguments of these, made their result.
CARRYING = (moves, pointwise, cat, stack, as_complex)


def unknown(call: Call) -> None:
    call.freeze_everything()


@functools.cache
def find(func: Any) -> Rule:
    """The rule of an operator."""
    known = named(func._schema.name.removeprefix("aten::"))
    if known is not None:
        return known
    if func.is_view or torch.Tag.inplace_view in func.tags:
        return moves
    return pointwise if torch.Tag.pointwise in func.tags else unknown


def is_square(call: Call) -> bool:
    """Whether an op squares a tensor; a copy in another type is still a square."""
    if call.book.op in ("_to_copy", "clone", "detach", "alias"):
        return id(call[0]) in call.squares
    if call.book.op == "pow":
        return isinstance(call[0], Tensor) and call[1] == 2
    return call.book.op == "mul" and call[0] is call[1]


def scale(call: Call) -> None:
    """Note the weights that multiply what an op gives, and those added since."""
    before = [axis for axes in call.scaled.values() for axis in axes]
    learned = [
        axis
        for argument in call.args
        if isinstance(argument, nn.Parameter) and call.book.op in ("mul", "add")
        for axis in call.mirror(argument)
    ]
    fresh_start = call.book.op == "mul" and learned and len(call.weights) < len(call.shapes)
    call.scales = learned if fresh_start else [*before, *learned] if before else None
