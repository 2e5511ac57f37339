"""Movement pruning: keep the weights that move away from zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structopt.losses.checks import wide
from structopt.pruning.masks import PruneWhileTraining, inner
from structopt.pruning.patterns import Pattern, Unstructured
from structopt.pruning.ranking import PerLayer, Scope
from structopt.pruning.schedules import Schedule
from structopt.pruning.scoring import Scores, score


class MovementWhileTraining(PruneWhileTraining):
    """Masks on a schedule, by where weights went and not by how large they are.

    The score of a weight is its movement since training began, S = -Σ w · ∂L/∂w over the steps,
    with w as it was before the step: positive where the loss pushes it away from zero, negative
    where it pushes it back (Sanh et al., 2020). The lowest go. Made for fine-tuning, where weights
    come from another task and their magnitude tells of that one.

    In the paper masked weights stay hidden below their mask and may return; here masks nest, and
    what is gone stays gone. Call it once yourself before the first step, ``after_step(model)``, so
    that the first step counts too. `leave` and other choices of weights: those of `score`.

    Raises ValueError where a scored weight has no gradient, and as :func:`find_masks`.

    >>> from structopt.pruning import OneShot
    >>> model = nn.Linear(2, 1, bias=False)
    >>> model.weight.data = torch.tensor([[3.0, 0.1]])
    >>> after_step = MovementWhileTraining(OneShot(0.5, at=1))
    >>> after_step(model)
    >>> model.weight.grad = torch.tensor([[1.0, -1.0]])  # the large one is pushed back to zero
    >>> after_step(model, 1)
    >>> model.weight.data
    tensor([[0.0000, 0.1000]])
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        pattern: Pattern = Unstructured(),  # noqa: B008 (a frozen value)
        scope: Scope = PerLayer(),  # noqa: B008
        leave: tuple[str, ...] = (),
    ) -> None:
        super().__init__(schedule, score=self._ranked, pattern=pattern, scope=scope)
        self.leave = leave
        self.movement: Scores = {}
        self._before: Scores = {}

    @torch.no_grad()
    def __call__(self, model: nn.Module, step: int = 0) -> None:
        model = inner(model, self.movement)
        if not self.movement:
            found = score(model, leave=self.leave)
            # In 16 bits a sum would soon be too large for what a step adds to it.
            self.movement = {name: torch.zeros_like(wide(one)) for name, one in found.items()}
        weights = {name: model.get_parameter(name) for name in self.movement}
        if self._before:
            slopes = [_slope(name, weight, step) for name, weight in weights.items()]
            sums = list(self.movement.values())
            torch._foreach_addcmul_(sums, list(self._before.values()), slopes, value=-1.0)
        super().__call__(model, step)
        self._before = {n: wide(weight.detach()).clone() for n, weight in weights.items()}

    def _ranked(self, model: nn.Module) -> Scores:
        """The movements in their order, above zero: `find_masks` ranks by absolute value."""
        least = torch.stack([one.min() for one in self.movement.values()]).min()
        return {name: one - least for name, one in self.movement.items()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "movement": self.movement, "before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.movement, self._before = dict(state["movement"]), dict(state["before"])

    def __deepcopy__(self, memo: dict[int, Any]) -> MovementWhileTraining:
        made = type(self)(self.schedule, pattern=self.pattern, scope=self.scope, leave=self.leave)
        made.masks = dict(self.masks)
        made.movement = {name: one.clone() for name, one in self.movement.items()}
        made._before = dict(self._before)
        return made


def _slope(name: str, weight: Tensor, step: int) -> Tensor:
    if weight.grad is None:
        raise ValueError(
            f"{name} has no gradient after step {step}: call this before gradients are set to "
            "None, as training.train does; or leave it alone, leave=(...)"
        )
    return weight.grad.to(torch.promote_types(weight.dtype, torch.float32))
