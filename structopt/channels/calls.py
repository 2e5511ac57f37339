"""One operator at work, and the table of rules.

A rule gets a :class:`Call` and returns the mirror of each output. It *ties* labels that must stay
the same channels, and *freezes* what may not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from structopt.channels.labels import Vector
from structopt.channels.mirrors import Axis, Book, Mirror


@dataclass
class Call:
    """One operator at work: its arguments, its result, and the mirrors of its arguments."""

    book: Book
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mirrors: dict[int, Mirror]
    out: Any = None
    shapes: dict[int, torch.Size] = field(default_factory=dict)  # before an in-place view
    picked: dict[int, tuple[int, ...]] = field(default_factory=dict)  # labels chosen by number
    weights: set[int] = field(default_factory=set)  # arguments made of parameters only
    squares: set[int] = field(default_factory=set)  # arguments that are squares
    scaled: dict[int, tuple[Vector, ...]] = field(default_factory=dict)  # what scaled them last
    scales: list[Axis] | None = None  # axes of the weights that scale the result, and their bias
    values: set[int] = field(default_factory=set)  # arguments that another example would change

    def __getitem__(self, position: int) -> Any:
        """The argument at this position, or its default."""
        if position < len(self.args):
            return self.args[position]
        argument = self.func._schema.arguments[position]
        return self.kwargs.get(argument.name, argument.default_value)

    def mirror(self, tensor: Any) -> Mirror:
        if not isinstance(tensor, Tensor):
            return []
        return self.mirrors.get(id(tensor)) or [None] * tensor.ndim

    def freeze_all(self, mirror: Sequence[Axis], text: str) -> None:
        for axis in mirror:
            self.book.freeze(axis, text)

    def owe(self, mirror: Sequence[Axis], text: str) -> None:
        """Freeze these once something uses what comes out."""
        self.book.owed += [(axis, self.book.why(text)) for axis in mirror if axis is not None]

    def freeze_everything(self) -> Any:
        """What an operator without a rule does to all that it touches: nothing comes out of it."""
        for mirror in self.mirrors.values():
            self.freeze_all(mirror, "no rule for this operator")
        return None

    def add(self, axis: Axis, bias: Axis) -> Axis:
        """Tie a bias to the rows whose results it is added to."""
        if axis is not None and bias is not None:
            self.book.beside.append((axis, bias))
        return self.book.tie(axis, bias)

    def reads(self, tensor: Tensor, dim: int) -> None:
        """Note that this dimension of a weight is summed over: its entries are a reader's.

        What is made of weights alone, as the scale of a parametrised weight, is no reading.
        """
        axis = self.mirror(tensor)[dim]
        if axis is not None and id(tensor) in self.weights and len(self.weights) < len(self.shapes):
            self.book.readers.append(axis)


Rule = Callable[[Call], Any]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def named(name: str) -> Rule | None:
    """The rule of an operator, which serves its in-place form too."""
    return _RULES.get(name) or _RULES.get(name.rstrip("_"))


def join(call: Call, axes: Sequence[Axis]) -> Axis:
    """Tie the same dimension of several tensors."""
    first = axes[0]
    for axis in axes[1:]:
        if first is not None or axis is not None:
            first = call.book.tie(first, axis)
    return first


def flat(tree: Any) -> list[Any]:
    """The leaves of nested lists of arguments."""
    return [x for part in tree for x in flat(part)] if isinstance(tree, list | tuple) else [tree]
