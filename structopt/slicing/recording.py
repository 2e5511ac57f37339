"""One run of a model, op by op, with the labels of channels that each tensor carried."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from structopt.channels import moving, rules
from structopt.channels.copying import flatten, substitute
from structopt.channels.labels import Labels, Vector
from structopt.channels.mirrors import Book, Mirror, mirror_of
from structopt.channels.nests import call, first_line, map_tensors, tensors_of
from structopt.channels.shadow import plain_kernels
from structopt.channels.tracing import Tracer, follow_modules, label_parameters
from structopt.channels.walking import tensors_in

_KEY = "_structopt_key"  # the attribute of a tensor that holds its number
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Seen:
    """A tensor as an op met it; `source` is the parameter that it is or shows."""

    key: int
    mirror: Mirror
    shape: torch.Size
    source: str


@dataclass
class Op:
    name: str
    module: str
    moves: bool
    inputs: list[Seen]
    outputs: list[Seen] = field(default_factory=list)
    plain: bool = False  # has a number among its arguments


class Recorder(Tracer):  # type: ignore[no-untyped-call]
    """Carries labels as its parent does, and notes every op."""

    def __init__(self, book: Book, ops: list[Op], sources: dict[int, str]) -> None:
        super().__init__(book)
        self.ops, self.sources = ops, sources

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        given = [self._seen(t) for t in tensors_of((args, kwargs or {}))]
        op = Op(name.rstrip("_"), self.book.module, rules.find(func) is moving.moves, given)
        op.plain = any(isinstance(a, int | float) for a in args)
        self.ops.append(op)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        sources = {one.source for one in given}
        shown = sources.pop() if op.moves and len(sources) == 1 else ""
        op.outputs = [self._seen(t, shown) for t in tensors_of(out)]
        return out

    def _seen(self, tensor: Tensor, source: str = "") -> Seen:
        key = _key(tensor)
        mirror = list(mirror_of(tensor) or [])
        return Seen(key, mirror, tensor.shape, self.sources.setdefault(key, source))


def _key(tensor: Tensor) -> int:
    """A number that no other tensor ever has, as `id` would give it to the next."""
    if not hasattr(tensor, _KEY):
        setattr(tensor, _KEY, next(_NUMBERS))
    key: int = getattr(tensor, _KEY)
    return key


def recorded(
    model: nn.Module, example: Any
) -> tuple[Labels, Mapping[tuple[str, int], Vector], list[Op], list[Mirror]]:
    """Labels, those of each dimension of each weight, the ops in order, and what came out.

    The model itself is not touched. Raises ValueError where it does not accept the example.
    """
    book, labelled = Book(), substitute(model, torch.clone).eval()
    modules = dict(labelled.named_modules())
    flatten(modules.values())
    axes = label_parameters(book, modules)
    ops, sources = list[Op](), {_key(tensor): name for name, tensor in tensors_in(modules)}
    follow_modules(book, modules)
    recorder, own = Recorder(book, ops, sources), map_tensors(example, torch.clone)
    try:
        with plain_kernels(), recorder:
            given = call(labelled, own)
    except Exception as problem:
        raise ValueError(
            f"the model does not accept the example: {first_line(problem)}"
        ) from problem
    return book.labels, axes, ops, [mirror_of(tensor) or [] for tensor in tensors_of(given)]
