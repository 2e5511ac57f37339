"""Losses for targets that are classes, or distributions over them; predictions are logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from structopt.losses.checks import (
    Reduction,
    class_dim,
    classified,
    need_temperature,
    pair,
    range_message,
    real,
    seen,
    tame,
    wide,
)
from structopt.losses.positions import blanked, need_counts, over


def cross_entropy(
    prediction: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of softmax(prediction) against the target q: -Σ_c q_c log p_c, in nats.

    Smoothing s mixes the target with the uniform distribution over C classes,
    q = (1 - s)·target + s/C (Szegedy et al., 2016).

    Args:
        prediction: logits, (B, C, ...).
        target: class indices (B, ...) of any integer type, or probabilities (B, C, ...).
        label_smoothing: s, from 0 to 1.
        weight: (C,), counts class c that often. The mean divides by the weights of the targets;
            where they are probabilities, by their number, as torch does.
        ignore_index: targets of this index do not count.
        reduction: "mean" or "sum" over everything, or "none".

    Raises:
        ValueError: shapes that do not fit, an integer prediction, an empty batch; on a CPU also a
            label out of range, and the mean of a batch in which no target counts (NaN on an
            accelerator; its sum is 0 everywhere). Whether probabilities add up is not checked.
        FloatingPointError: NaN (on a CPU).

    Example:
        >>> import torch
        >>> cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
        tensor(0.4100)
    """
    if not 0 <= real(label_smoothing) <= 1:
        raise ValueError(f"label_smoothing is a share from 0 to 1, not {label_smoothing!r}")
    if isinstance(target, Tensor) and target.is_floating_point() and ignore_index != -100:
        raise ValueError("ignore_index needs class indices; these targets are probabilities")
    prediction, target, weight = classified(prediction, target, weight, reduction)
    target, wrong = tame(prediction, target, ignore_index)
    try:
        loss = F.cross_entropy(
            prediction, target, weight, None, ignore_index, None, reduction, label_smoothing
        )
    except IndexError:  # the CPU kernel has met a label out of range
        raise ValueError(range_message(prediction, target, ignore_index)) from None
    if wrong is not None:
        loss = loss.masked_fill(wrong if reduction == "none" else wrong.any(), math.nan)
    return seen(loss, prediction, target)


def focal(
    prediction: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Focal loss, -(1 - p)^gamma log p with p the target class's probability (Lin et al., 2017).

    What is already classified well counts less; gamma = 0 is the cross-entropy.

    Args:
        prediction: logits, (B, C, ...).
        target: class indices, (B, ...).
        gamma: at least 0; 2 in the paper.
        weight: (C,), the paper's alpha. The mean divides by the weights, as in `cross_entropy`.
        ignore_index: targets of this index do not count.
        reduction: "mean" or "sum" over everything, or "none".

    Raises:
        ValueError: as :func:`cross_entropy`, or targets that are probabilities, or gamma < 0.

    Example:
        >>> import torch
        >>> focal(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))  # 0.5² · log 2
        tensor(0.1733)
    """
    if not 0 <= real(gamma) < math.inf:
        raise ValueError(f"gamma is a finite exponent of at least 0, not {gamma!r}")
    if isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError("focal needs class indices, not probabilities: use target.argmax(1)")
    prediction, target, weight = classified(prediction, target, weight, reduction)
    surprise = cross_entropy(prediction, target, ignore_index=ignore_index, reduction="none")
    # A miss of exactly 0 has an infinite slope for gamma < 1; clamp gives it the right one, 0.
    miss = (-torch.expm1(-surprise)).clamp(min=torch.finfo(surprise.dtype).tiny)
    counts = (target != ignore_index).to(surprise.dtype)
    if weight is not None:
        counts = counts * weight[target.clamp(0, len(weight) - 1)]
    each = counts * miss**gamma * surprise
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else seen(each.sum() / counts.sum(), each, target)


def kl_divergence(
    prediction: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    counts: Tensor | None = None,
) -> Tensor:
    """T²·KL(softmax(target / T) || softmax(prediction / T)), in nats: both are *logits*.

    The factor T² keeps the size of the gradient when T grows (Hinton et al., 2015). Classes are
    summed and the rest averaged: torch's "batchmean"; torch's "mean" divides by C as well.

    Args:
        prediction: logits, (B, C, ...).
        target: logits of the same shape. The gradient reaches them too: `detach()` a teacher.
            A class that it masks with -inf has probability 0, and counts 0.
        temperature: T > 0. Above 1 it shows what the target thinks of the unlikely classes.
        reduction: "mean" or "sum" over all but the classes, or "none".
        counts: bool (B, ...), false at positions that do not count, such as padding.

    Raises:
        ValueError: as :func:`structopt.losses.mse`, a temperature that is not above 0, counts of
            another shape; on a CPU also the mean where nothing counts.

    Example:
        >>> import torch
        >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[9.0, 0.0]]))  # nearly log 2
        tensor(0.6919)
    """
    need_temperature(temperature)
    prediction, target = pair(prediction, target, reduction)
    need_counts(counts, prediction)
    prediction, target = blanked(prediction, counts), blanked(target, counts)
    dim = class_dim(prediction)
    log_p = F.log_softmax(prediction / temperature, dim)
    log_q = F.log_softmax(target / temperature, dim)
    each = temperature**2 * excess(log_q, log_p).sum(dim)
    if reduction != "none":
        each = over(each, counts) if reduction == "mean" else each.sum()
    return seen(each, prediction, target)


def excess(log_q: Tensor, log_p: Tensor) -> Tensor:
    """q·log(q/p), the terms of a divergence; 0 where q is 0, whatever p is there."""
    return log_q.exp() * (log_q - log_p).masked_fill(log_q == -math.inf, 0.0)


def log_sum_exp(x: Tensor, dim: int = -1) -> Tensor:
    """log Σ exp(x) along `dim`, without overflow: the largest entry is taken out first.

    Its gradient is softmax(x). Half precision is computed and returned in float32.

    Args:
        x: any shape; -inf entries count as absent.
        dim: the dimension that is summed.

    Raises:
        IndexError: a `dim` that does not exist or is empty (from torch).

    Example:
        >>> import torch
        >>> log_sum_exp(torch.tensor([1e4, 1e4], dtype=torch.float16))
        tensor(10000.6934)
    """
    x = wide(x)
    peak = x.detach().amax(dim, keepdim=True)
    peak = peak.masked_fill(peak.isinf(), 0)  # inf - inf would be NaN
    return (x - peak).exp().sum(dim).log() + peak.squeeze(dim)
