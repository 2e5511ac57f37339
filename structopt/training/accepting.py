"""What a run is made of, looked at before anything is moved or trained."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from structopt.training.objectives import Objective, describe


def need_kinds(model: object, objective: object, optimizer: Any) -> None:
    """Raises ValueError for what stands in another's place, or cannot step after one backward."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is the nn.Module to train, not {describe(model)}")
    if not callable(objective):
        raise ValueError(
            f"objective is a function of (model, batch), such as supervised(), not "
            f"{describe(objective)}"
        )
    if not hasattr(optimizer, "param_groups"):
        raise ValueError(
            "optimizer is made from the model's parameters, such as "
            f"torch.optim.SGD(model.parameters(), lr=0.1), not {describe(optimizer)}"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss several times a step, by a closure, "
            "and this loop once: take an optimiser whose step() needs none, such as AdamW"
        )


def need_related(parameters: list[Tensor], model: nn.Module, objective: Objective) -> None:
    """An optimiser of another model would step that one, and this one would never learn."""
    parts = [model, objective] if isinstance(objective, nn.Module) else [model]
    own = {id(p) for part in parts for p in part.parameters()}
    if not any(id(p) in own for p in parameters):
        raise ValueError(
            "the optimiser holds no parameter of this model: was it made for another one, or for a "
            "copy? Make it from model.parameters() of the model you train"
        )
