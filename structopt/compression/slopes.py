"""Slopes of activations on their way to 1: the penalty, and what is done after each step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from structopt.compression.activations import Blend
from structopt.training import Objective


def linearising(objective: Objective, strength: float) -> Objective:
    """The objective + strength · Σ (1 - α) over the :class:`Blend` of the model.

    The pull to α = 1 is the same everywhere, so the slopes that arrive first are those whose
    activations the loss needs least. Keep slopes in 0 … 1 after each step.

    Raises ValueError, when called, for a model without a blend.

    >>> from structopt import losses
    >>> from structopt.training import supervised
    >>> model = nn.Sequential(Blend(nn.ReLU(), 0.75))
    >>> linearising(supervised(losses.mse), 2.0)(model, (torch.ones(1), torch.ones(1)))
    tensor(0.5000, grad_fn=<...>)
    """

    def penalised(model: nn.Module, batch: Any) -> Tensor:
        found = blends(model)
        if not found:
            raise ValueError("the model has no Blend: blend_activations makes them")
        left = torch.stack([1 - blend.slope for blend in found.values()])
        return objective(model, batch) + strength * left.sum()

    return penalised


class Watched:
    """Keeps slopes in 0 … 1 after each step, and their mean over all steps."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def __call__(self, model: nn.Module, steps: int) -> None:
        self.steps += 1
        for name, blend in blends(model).items():
            blend.slope.clamp_(0, 1)
            self.sums[name] = self.sums.get(name, 0.0) + blend.slope.detach()

    def means(self) -> dict[str, float]:
        return {name: float(total) / self.steps for name, total in self.sums.items()}


class Straighten:
    """Leads slopes to 1 or to 0 in even steps, none of which is trained."""

    def __init__(self, model: nn.Module, gone: Collection[str], steps: float) -> None:
        self.steps = steps
        self.ends = {
            name: (float(blend.slope.detach()), 1.0 if name in gone else 0.0)
            for name, blend in blends(model).items()
        }
        for blend in blends(model).values():
            blend.slope.requires_grad_(False)

    def __call__(self, model: nn.Module, steps: int) -> None:
        part = min(1.0, steps / self.steps)
        for name, blend in blends(model).items():
            start, end = self.ends[name]
            blend.slope.fill_(end if part == 1 else start + part * (end - start))


def blends(model: nn.Module) -> dict[str, Blend]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Blend)}
