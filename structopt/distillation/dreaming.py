"""A transfer set without data: inputs that a teacher takes for the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from structopt import losses
from structopt.distillation.teachers import as_logits
from structopt.losses.checks import real, whole
from structopt.training import evaluating
from structopt.training.observing import first_of


def statistics_gap(teacher: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's logits, and Σ_l ‖mean_l - running_l‖₂ + ‖var_l - running_var_l‖₂.

    The sum is over its batch norms l, with mean and biased variance of what reaches l over batch
    and positions: how far ``inputs`` are, as the teacher sees them, from what it was trained on.
    Yin et al., 2020, "Dreaming to distill". The teacher runs in evaluation mode and is left as
    it was, and without ``torch.compile``.

    Raises ``ValueError`` for a teacher that calls no batch norm, or none that keeps statistics.

    >>> teacher = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
    >>> logits, gap = statistics_gap(teacher, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    >>> logits.shape, gap  # means 0 and 0 are right, variances 1 and 0 are not
    (torch.Size([2, 3]), tensor(1.))
    """
    gaps: list[Tensor] = []

    def compare(layer: nn.Module, given: Any, named: Any) -> None:
        x = first_of(given, named).movedim(1, 0).flatten(1)  # (C, B·positions)
        kept = dict(layer.named_buffers())
        gaps.append(torch.linalg.vector_norm(x.mean(1) - kept["running_mean"]))
        gaps.append(torch.linalg.vector_norm(x.var(1, correction=0) - kept["running_var"]))

    norms = [
        layer
        for layer in teacher.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    ]
    if not norms:
        raise ValueError("this teacher has no batch norm that keeps statistics to compare with")
    hooks = [layer.register_forward_pre_hook(compare, with_kwargs=True) for layer in norms]
    try:  # compiled code would call none of the hooks, or those of one part alone
        with evaluating(teacher), torch.compiler.set_stance("force_eager"):
            logits = as_logits(teacher(inputs), "teacher")
    finally:
        for hook in hooks:
            hook.remove()
    if not gaps:
        raise ValueError("the teacher calls none of its batch norms: there is nothing to compare")
    return logits, torch.stack(gaps).sum()


def total_variation(images: Tensor) -> Tensor:
    """Mean of the absolute differences between neighbouring pixels, along height plus along width.

    Of images (B, C, H, W); keeps dreamt ones smooth. Rudin, Osher and Fatemi, 1992. Raises
    ``ValueError`` for other shapes, or images of one row or column.

    >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]]))
    tensor(3.)
    """
    if images.ndim != 4 or min(images.shape[2:]) < 2:
        raise ValueError(f"images (B, C, H, W) have neighbouring pixels, {tuple(images.shape)} not")
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


@torch.inference_mode(False)  # and with gradients, also where torch.no_grad() is around it
def dream(
    teacher: nn.Module,
    start: Tensor,
    labels: Tensor,
    *,
    steps: int = 200,
    lr: float = 0.1,
    weights: tuple[float, float] = (1.0, 0.1),
) -> Tensor:
    """Images that ``teacher`` takes for ``labels``, made from noise without any data.

    Adam minimises cross-entropy(teacher(x), labels) + a·:func:`statistics_gap` +
    b·:func:`total_variation` over the images x alone. DeepInversion of Yin et al., 2020, "Dreaming
    to distill"; without their search for images on which a student disagrees. Put them in
    ``data.Examples`` with the labels, or with none: the teacher knows what it sees.

    Args:
        teacher: a network with batch norms; it is left as it was.
        start: noise, (B, C, H, W); a large batch has the statistics of the data more easily.
        labels: (B,) class indices.
        steps: of Adam.
        lr: its learning rate, in the units of the images.
        weights: a, of the statistics, and b, of the variation.

    Raises:
        ValueError: no batch norms, what are no images, labels of another number, weights below 0.

    Example:
        >>> teacher = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3))
        >>> images = dream(teacher, torch.zeros(6, 1, 4, 4), torch.arange(6) % 3, steps=3)
        >>> images.shape, images.requires_grad
        (torch.Size([6, 1, 4, 4]), False)
    """
    pair = tuple(weights) if isinstance(weights, Sequence) and len(weights) == 2 else (-1.0, -1.0)
    gap_weight, variation_weight = pair
    if not (whole(steps) >= 1 and real(lr) > 0 and all(real(weight) >= 0 for weight in pair)):
        raise ValueError(f"dream needs steps, lr above 0 and weights of at least 0, not {steps!r}, "
                         f"{lr!r}, {weights!r}")  # fmt: skip
    if not start.is_floating_point():
        raise ValueError(f"images are dreamt of numbers with a gradient, not {start.dtype}")
    images = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr)
    for _ in range(steps):
        logits, gap = statistics_gap(teacher, images.clone())  # autocast keeps its cast of a leaf
        loss = losses.cross_entropy(logits, labels) + gap_weight * gap
        loss = loss + variation_weight * total_variation(images)
        (images.grad,) = torch.autograd.grad(loss, images)
        optimizer.step()
    return images.detach()
