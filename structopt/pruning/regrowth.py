"""Sparse from start to end: connections that are dropped in one place and grown in another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structopt.losses.checks import real
from structopt.pruning.masks import Hold, inner, need_masks
from structopt.pruning.ranking import keys, lowest


class RegrowWhileTraining(Hold):
    """An `after_step` that moves connections to where the loss wants them (RigL).

    Every `every` steps until `end`, each layer drops the k active weights of the lowest magnitude,
    and grows as many where the gradient of the loss is largest, at zero (Evci et al., 2020):

    k = ½ · fraction · (1 + cos(π · step / end)) · (active weights of the layer), rounded down.

    So a network is trained at its final sparsity all along. Start from masks by chance,
    ``find_masks(score(model, random), 0.9)``. The gradient is the one that the optimiser has just
    used (of masked weights too: they take part as zeros). The optimiser's memory of a weight that
    grows is not reset.

    Raises ValueError for numbers out of range, and where a masked weight has no gradient.

    >>> model, masks = nn.Linear(4, 1), {"weight": torch.tensor([[True, True, False, False]])}
    >>> model.weight.data = torch.tensor([[0.1, 5.0, 0.0, 0.0]])
    >>> model.weight.grad = torch.tensor([[1.0, 1.0, 2.0, 3.0]])
    >>> after_step = RegrowWhileTraining(masks, end=1000, every=1, fraction=0.6)
    >>> after_step(model, 1)
    >>> after_step.masks["weight"]
    tensor([[False,  True, False,  True]])
    """

    def __init__(
        self, masks: Mapping[str, Tensor], *, end: int, every: int = 100, fraction: float = 0.3
    ) -> None:
        whole = all(isinstance(n, int) and n >= 1 for n in (every, end))
        if not whole or not 0 < real(fraction) <= 1:
            raise ValueError(
                f"every={every!r} and end={end!r} count steps from 1, whole numbers; "
                f"fraction={fraction!r} is the share of active weights that move at first, in "
                "(0, 1]"
            )
        super().__init__(masks)
        self.every, self.end, self.fraction = every, end, fraction
        self._active = {name: int(mask.sum()) for name, mask in self.masks.items()}

    def moves(self, step: int) -> float:
        """The share of the active weights that move after this step."""
        if step % self.every or not 0 < step < self.end:
            return 0.0
        return self.fraction / 2 * (1 + math.cos(math.pi * step / self.end))

    def __call__(self, model: nn.Module, step: int = 0) -> None:
        if self.moves(step):
            model = inner(model, self.masks)
            need_masks(model, self.masks)
            self.masks = {name: self._moved(model, name, step) for name in self.masks}
            self._seen = lambda: None
        super().__call__(model, step)

    @torch.no_grad()
    def _moved(self, model: nn.Module, name: str, step: int) -> Tensor:
        weight = model.get_parameter(name)
        if weight.grad is None:
            raise ValueError(
                f"{name} has no gradient after step {step}: call this before gradients are set to "
                "None, as training.train does"
            )
        mask, count = self.masks[name].to(weight.device), int(self.moves(step) * self._active[name])
        size = keys(weight)
        most = torch.iinfo(size.dtype).max
        stays = mask & ~lowest([torch.where(mask, size, most)], count)[0]
        pull = keys(weight.grad, ~stays)  # what stays gets the lowest key
        return stays | ~lowest([pull], pull.numel() - count)[0]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._active = {name: int(mask.sum()) for name, mask in self.masks.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> RegrowWhileTraining:
        return type(self)(self.masks, end=self.end, every=self.every, fraction=self.fraction)
