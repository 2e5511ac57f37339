"""Several students that teach each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from structopt import losses
from structopt.distillation.logits import soft_targets
from structopt.distillation.objective import is_weight
from structopt.distillation.teachers import as_logits, as_pair, changes
from structopt.losses.checks import need_temperature
from structopt.losses.positions import counted
from structopt.training import Objective


def mutual_loss(
    logits: list[Tensor], *, temperature: float = 1.0, counts: Tensor | None = None
) -> Tensor:
    """Σ_k 1/(K - 1)·Σ_{l≠k} T²·KL(p_l || p_k), p_l without a gradient; a mean over the batch.

    Zhang et al., 2018, "Deep mutual learning" (T = 1).

    Args:
        logits: those of K ≥ 2 students, each (B, C, ...).
        temperature: T > 0.
        counts: bool (B, ...), false where nothing is to be learnt, such as padding.

    Raises:
        ValueError: fewer than 2 students, shapes that differ.

    Example:
        >>> mutual_loss([torch.zeros(1, 2), torch.tensor([[9.0, 0.0]])])
        tensor(4.4989)
    """
    if len(logits) < 2:
        raise ValueError(f"mutual learning needs at least 2 students, not {len(logits)}")
    told = [
        soft_targets(ours, theirs.detach(), temperature=temperature, counts=counts)
        for k, ours in enumerate(logits)
        for other, theirs in enumerate(logits)
        if other != k
    ]
    return torch.stack(told).sum() / (len(logits) - 1)


def mutual(
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    task: Callable[[Tensor, Tensor], Tensor] = losses.cross_entropy,
) -> Objective:
    """Σ_k task(student k, labels) + weight · :func:`mutual_loss`, for an ``nn.ModuleList``.

    ``train(nn.ModuleList(students), batches, mutual(), optimizer, ...)``: all learn in one run,
    each from the labels and from what the others say. They may differ in shape. Positions (B, ...)
    that ``task`` ignores (its ``ignore_index``) count for neither.

    Raises ``ValueError`` for a model that is not such a list, a weight below 0, a temperature not
    above 0 or infinite.

    >>> students = nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 3)])
    >>> mutual()(students, (torch.ones(4, 2), torch.zeros(4).long())).ndim
    0
    """
    need_temperature(temperature)
    if not is_weight(weight):
        raise ValueError(f"weight counts what the others say, at least 0: {weight!r}")

    def objective(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(model, nn.ModuleList):
            raise ValueError(
                f"mutual learning trains nn.ModuleList([student, ...]), not {type(model).__name__}"
            )
        inputs, targets = as_pair(batch)
        before = changes(inputs)
        logits = [as_logits(student(inputs), "student") for student in model]
        if changes(inputs) != before:
            raise ValueError(
                "a student changes its inputs in place, which are those of the others as well: "
                "let it work on a copy, inputs.clone()"
            )
        labels = torch.stack([task(each, targets) for each in logits]).sum()
        counts = counted(logits[0], targets, task)
        return labels + weight * mutual_loss(logits, temperature=temperature, counts=counts)

    return objective
