"""Choices between equals: an edited model makes them as the reference did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from structopt.channels.calls import flat
from structopt.channels.nests import map_tensors, tensors_of
from structopt.channels.shadow import name_of

_STEPS = ("floor", "ceil", "round", "trunc", "sign", "frac")
Alike = Callable[[Sequence[Tensor], Sequence[Tensor]], bool]


class Decision(NamedTuple):
    name: str
    given: list[Tensor]
    told: list[Any]  # beside numbers: how many to keep, along which dimension
    out: Any
    held: list[Tensor]  # by the model, which may write to them


class Decisions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what a run decides by its numbers, and follows an earlier run where that was a tie.

    A detector keeps the best of its boxes. Where two are equal but for rounding, which of them
    comes first hangs on the order of the sums, and another width has another order. So what is
    decided on `alike` numbers is taken over from `before`: the decisions of the other run.
    """

    def __init__(self, before: Sequence[Decision] = (), alike: Alike | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before, self.alike = before, alike
        self.made: list[Decision] = []

    def __enter__(self) -> Decisions:
        self.made = []
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def behind(self, out: Sequence[Tensor]) -> list[Tensor]:
        """The numbers by which the outputs of a model were decided that are decisions."""
        places = {_place(tensor) for tensor in out if tensor.numel()}  # else all are one place
        found = [made.given for made in self.made if not places.isdisjoint(map(_place, made.held))]
        return [tensor for given in found for tensor in given]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given, name = tensors_of((args, kwargs)), name_of(func)
        out = func(*args, **kwargs)
        if not _decides(name, given, tensors_of(out)):
            return out
        rest = flat([*args, *kwargs.values()])
        told = [part for part in rest if not isinstance(part, Tensor | float)]
        kept = [tensor.clone() for tensor in given]  # the model may write to them
        kept += [torch.tensor(part) for part in rest if isinstance(part, float)]
        if self.alike and len(self.made) < len(self.before):
            before = self.before[len(self.made)]
            same = (before.name, before.told) == (name, told)
            if same and self.alike(before.given, kept):
                out = map_tensors(before.out, torch.clone)
        kept_out = map_tensors(out, torch.clone)
        self.made.append(Decision(name, kept, told, kept_out, tensors_of(out)))
        return out


def _decides(name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
    """Whether numbers went in, and whole ones, or true and false, came out."""
    whole = name in _STEPS or any(not t.is_floating_point() and not t.is_complex() for t in made)
    return whole and any(tensor.is_floating_point() for tensor in given)


def _place(tensor: Tensor) -> int:
    """The same for a view of it."""
    return tensor.untyped_storage().data_ptr()
