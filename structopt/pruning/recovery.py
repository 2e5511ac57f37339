"""Recovery: what brings the accuracy back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from structopt import descent, losses
from structopt.losses.checks import need_values, real
from structopt.losses.positions import counted
from structopt.pruning.masks import hold
from structopt.training import History, Objective, evaluating, supervised, train
from structopt.training.statistics import inputs_of, recalibrate_


def with_teacher(
    teacher: nn.Module,
    *,
    temperature: float = 2.0,
    weight: float = 0.5,
    loss: Callable[[Tensor, Tensor], Tensor] = losses.cross_entropy,
) -> Objective:
    """An objective with the dense network as the teacher of the pruned one.

    (1 - weight) · loss(logits, targets) + weight · T² KL(teacher ‖ student at temperature T), after
    Hinton et al., 2015. The teacher runs in evaluation mode, without gradients, on the
    device of the student. Positions (B, ...) whose label `loss` ignores count for neither.

    Raises ValueError for a weight outside [0, 1].

    >>> objective = with_teacher(nn.Linear(4, 3))
    >>> objective(nn.Linear(4, 3), (torch.ones(2, 4), torch.tensor([0, 2]))).ndim
    0
    """
    if not 0 <= real(weight) <= 1:
        raise ValueError(f"weight is the teacher's share of the loss, in [0, 1], not {weight!r}")
    need_values("a teacher", (*teacher.parameters(), *teacher.buffers()))

    def objective(model: nn.Module, batch: Any) -> Tensor:
        def both(logits: Tensor, targets: Tensor) -> Tensor:
            known, inputs = loss(logits, targets), inputs_of(batch)
            with torch.no_grad(), evaluating(teacher):
                soft = teacher.to(logits.device)(inputs)
            counts = counted(logits, targets, loss)
            told = losses.kl_divergence(logits, soft, temperature=temperature, counts=counts)
            return (1 - weight) * known + weight * told

        return supervised(both)(model, batch)

    return objective


def recover(
    model: nn.Module,
    batches: Any,
    *,
    epochs: int,
    objective: Objective | None = None,
    lr: float = 0.01,
    masks: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> History:
    """Fine-tune a pruned model in place: the recipe to begin with.

    Statistics of batch norms first (:func:`recalibrate_`), then AdamW on one cycle of the learning
    rate, up to `lr` and down to nearly nothing: a rate as high as in the first training, not the
    last one, is what brings accuracy back (Renda et al., 2020). `masks` are held all along. With
    ``objective=with_teacher(dense)`` the dense model teaches. `options` go to
    :func:`structopt.training.train`.

    >>> from structopt.networks import LeNet300
    >>> batches = [(torch.randn(8, 1, 28, 28), torch.randint(0, 10, (8,)))] * 4
    >>> len(recover(LeNet300(), batches, epochs=2).losses)
    8
    """
    passes: object = epochs
    if not isinstance(passes, Integral) or epochs < 1:
        raise ValueError(
            f"epochs are passes over the batches, a whole number, at least 1: {epochs}"
        )
    need_values("training", (*model.parameters(), *model.buffers()))
    optimizer = descent.fused_adamw(model, lr)  # complains of what it cannot step first
    after_step = options.pop("after_step", None)
    if masks is not None:
        if after_step is not None:
            raise ValueError("give masks or after_step, not both")
        after_step = hold(masks)
        after_step(model)
    recalibrate_(model, batches)
    return train(
        model,
        batches,
        supervised() if objective is None else objective,
        optimizer,
        epochs=epochs,
        schedule=options.pop("schedule", descent.one_cycle()),
        after_step=after_step,
        **options,
    )
