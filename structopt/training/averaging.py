"""The running average of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from structopt.training.copying import copied


class Average:
    """An exponential moving average of a model: θ̄ ← d·θ̄ + (1 - d)·θ after each step.

    d = min(decay, (1 + t)/(10 + t)) at step t, so that a short run does not remember its start
    (Polyak and Juditsky, 1992; Tarvainen and Valpola, 2017). Buffers of floating point, such as
    the statistics of a batch norm, are averaged alike, since those of the trained model do not fit
    the averaged weights; others are copied. Of weights in 16 bits the mean is kept in float32
    beside the model, since their rounding would swallow its small steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"average is the decay of the running mean, 0 <= d < 1, not {decay}")
        self.decay, self.model = decay, copied(model).requires_grad_(False)
        self.steps = 0
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        self.ours = [a for a, b in pairs if b.is_floating_point()]
        self.theirs = [b.detach() for a, b in pairs if b.is_floating_point()]
        self.copies = [(a, b) for a, b in pairs if not b.is_floating_point()]
        self.exact = [a.float() if half(a) else a for a in self.ours]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        approach_(self.ours, self.exact, self.theirs, 1 - decay)
        for ours, theirs in self.copies:
            ours.copy_(theirs)
        self.steps += 1

    def state(self) -> list[Any]:
        """What a checkpoint keeps."""
        beside = [e for a, e in zip(self.ours, self.exact, strict=True) if e is not a]
        return [self.model.state_dict(), self.steps, beside]

    def restore(self, model: dict[str, Tensor], steps: int, beside: Iterable[Tensor] = ()) -> None:
        """Continue from a :meth:`state`."""
        self.model.load_state_dict(model)
        self.steps, kept = steps, iter(beside)
        for ours, exact in zip(self.ours, self.exact, strict=True):
            if exact is not ours:
                exact.copy_(next(kept, ours))


def half(x: Tensor) -> bool:
    """Whether x is of floating point in 16 bits or fewer."""
    return x.is_floating_point() and x.dtype.itemsize < 4


def approach_(ours: list[Tensor], exact: list[Tensor], theirs: list[Tensor], share: float) -> None:
    """ours ← ours + share · (theirs - ours), computed in ``exact``: ours itself, or a float32 copy.

    >>> mean, exact, target = torch.ones(1).bfloat16(), torch.ones(1), torch.full((1,), 2.0)
    >>> for _ in range(100):
    ...     approach_([mean], [exact], [target.bfloat16()], 0.001)
    >>> mean.item()  # each step alone would be lost
    1.09375
    """
    wide = [b.float() if half(b) else b for b in theirs]
    torch._foreach_lerp_(exact, wide, share)
    for a, b in zip(ours, exact, strict=True):
        if a is not b:
            a.copy_(b)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
