"""The running average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Average:
    """An exponential moving average of a model: θ̄ ← d·θ̄ + (1 - d)·θ after each step.

    d = min(decay, (1 + t)/(10 + t)) at step t, so that a short run does not remember its start
    (Polyak and Juditsky, 1992; Tarvainen and Valpola, 2017). Buffers of floating point, such as
    the statistics of a batch norm, are averaged alike, since those of the trained model do not fit
    the averaged weights; others are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"average is the decay of the running mean, 0 <= d < 1, not {decay}")
        self.decay, self.model = decay, copy.deepcopy(model).requires_grad_(False)
        self.steps = 0
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        self.ours = [a for a, b in pairs if b.is_floating_point()]
        self.theirs = [b.detach() for a, b in pairs if b.is_floating_point()]
        self.copies = [(a, b) for a, b in pairs if not b.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.ours, self.theirs, 1 - decay)
        for ours, theirs in self.copies:
            ours.copy_(theirs)
        self.steps += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
