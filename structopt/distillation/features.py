"""Losses between features of a student and of its teacher, each f(student, teacher, ...)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from structopt import losses
from structopt.distillation.adapters import smaller
from structopt.distillation.unit import unit
from structopt.losses.checks import real, seen, wide


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """(s - t)², a mean over batch and features, once an adapter has given both one shape.

    Romero et al., 2015, "FitNets: hints for thin deep nets": ½·‖s - t‖² for one example; the mean
    lets one weight serve layers of any size.

    Args:
        student: features of any shape.
        teacher: features of the same shape.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> hint(torch.zeros(2, 3), torch.ones(2, 3))
        tensor(1.)
    """
    return losses.mse(student, teacher)


def attention_transfer(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    """½·‖Q_s/‖Q_s‖ - Q_t/‖Q_t‖‖², a mean over the batch, with Q = Σ_c abs(A_c)^power by position.

    Zagoruyko and Komodakis, 2017, "Paying more attention to attention". As in their code the
    distance is squared; that also divides by the positions H·W, so their weight 1000 is
    2000/(H·W) here. Channels may differ; where sizes do, the larger map is averaged down.

    Args:
        student: feature maps (B, C, H, W), or tokens (B, T, D).
        teacher: maps of the same batch, of any channels and size; or tokens, as many.
        power: what the activations are raised to, at least 1: below, a unit that is silent has
            an infinite gradient.

    Raises:
        ValueError: features of another kind or batch, a power below 1.

    Example:
        >>> maps = torch.rand(2, 3, 4, 4)
        >>> attention_transfer(5 * maps, maps).item() < 1e-6
        True
    """
    if not 1 <= real(power) < math.inf:
        raise ValueError(f"power is what activations are raised to, at least 1, not {power!r}")
    if student.ndim != teacher.ndim or student.ndim not in (3, 4) or len(student) != len(teacher):
        raise ValueError(
            f"attention needs maps (B, C, H, W) or tokens (B, T, D) of both, not "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    same_batch(student, teacher)
    ours, theirs = (_attention(x, power) for x in (student, teacher))
    if student.ndim == 4:
        size = smaller(ours.shape[1:], theirs.shape[1:])
        ours, theirs = (F.adaptive_avg_pool2d(x, size) for x in (ours, theirs))
    ours, theirs = (unit(x.flatten(1), 1) for x in (ours, theirs))
    if ours.shape != theirs.shape:
        raise ValueError(f"{student.shape[1]} tokens and {teacher.shape[1]} cannot be compared")
    loss = 0.5 * (ours - theirs.to(ours.dtype)).square().sum(1).mean()
    return seen(loss, student, teacher)


def _attention(features: Tensor, power: float) -> Tensor:
    channels = 1 if features.ndim == 4 else 2
    return wide(features).abs().pow(power).sum(channels)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """‖G_s - G_t‖² / B², with G the rows of A·Aᵀ made unit length, A the features (B, D).

    Which examples of the batch are alike. Tung and Mori, 2019, "Similarity-preserving knowledge
    distillation".

    Args:
        student: features (B, ...).
        teacher: features (B, ...), of any size.

    Raises:
        ValueError: batches that differ.

    Example:
        >>> similarity_preserving(torch.eye(2), torch.ones(2, 5))
        tensor(0.2929)
    """
    same_batch(student, teacher)
    ours, theirs = (_similarity(x) for x in (student, teacher))
    return seen((ours - theirs.to(ours.dtype)).square().mean(), student, teacher)


def _similarity(features: Tensor) -> Tensor:
    rows = wide(features).flatten(1)
    with torch.autocast(rows.device.type, enabled=False):
        return unit(rows @ rows.T, 1)


def same_batch(student: Tensor, teacher: Tensor) -> None:
    if not student.numel() or not teacher.numel():
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"features {shapes} are empty: leave out batches of no example")
    if len(student) != len(teacher):
        raise ValueError(
            f"features of {len(student)} examples and of {len(teacher)} cannot be compared: "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
