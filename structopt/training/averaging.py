"""The running average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structopt.losses.checks import real, wide
from structopt.training.copying import copied


class Average:
    """An exponential moving average of a model: θ̄ ← d·θ̄ + (1 - d)·θ after each step.

    d = min(decay, (1 + t)/(10 + t)) at step t, so that a short run does not remember its start
    (Polyak and Juditsky, 1992; Tarvainen and Valpola, 2017). Buffers of real or complex numbers,
    such as the statistics of a batch norm, are averaged alike, since those of the trained model do
    not fit the averaged weights; others are copied. Of weights in 16 bits the mean is kept in
    float32 beside the model, since their rounding would swallow its small steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= real(decay) < 1:
            raise ValueError(f"average is the decay of the running mean, 0 <= d < 1, not {decay!r}")
        self.decay, self.trained, self.steps = decay, model, 0
        self.model = copied(model).requires_grad_(False)
        self.halves: dict[int, Tensor] = {}

    def update(self) -> None:
        follow_(self.model, self.trained, self.halves, self.decay, self.steps)
        self.steps += 1

    def state(self) -> list[Any]:
        """What a checkpoint keeps."""
        return [self.model.state_dict(), self.steps, self.halves]

    def restore(self, model: dict[str, Tensor], steps: int, halves: dict[int, Tensor]) -> None:
        """Continue from a :meth:`state`."""
        self.model.load_state_dict(model)
        self.steps, self.halves = steps, {place: a.clone() for place, a in halves.items()}


@torch.no_grad()
def follow_(
    mean: nn.Module, model: nn.Module, halves: dict[int, Tensor], decay: float, steps: int
) -> None:
    """θ̄ ← d·θ̄ + (1 - d)·θ; ``halves`` keeps float32 copies of 16 bits, by their place.

    The tensors are looked up each time: who moves a model may give it others.

    >>> mean, model, halves = nn.Linear(1, 1).bfloat16(), nn.Linear(1, 1).bfloat16(), {}
    >>> _ = nn.init.ones_(mean.weight), nn.init.constant_(model.weight, 2.0)
    >>> for _ in range(100):
    ...     follow_(mean, model, halves, 0.999, 10**6)
    >>> mean.weight.item()  # each step alone would be lost
    1.09375
    """
    pairs = list(zip(_tensors(mean), _tensors(model), strict=True))
    moving = [(a, b) for a, b in pairs if a.is_floating_point() or a.is_complex()]
    for place, (a, _) in enumerate(moving):
        if wide(a) is not a:
            halves[place] = halves.get(place, a).to(a.device, torch.float32)
    exact = [halves.get(place, a) for place, (a, _) in enumerate(moving)]
    if moving:
        share = 1 - min(decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(exact, [wide(b) for _, b in moving], share)
    for (a, _), e in zip(moving, exact, strict=True):
        if e is not a:
            a.copy_(e)
    for a, b in pairs:
        if not (a.is_floating_point() or a.is_complex()):
            a.copy_(b)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
