"""Contrastive distillation: which feature of the teacher belongs to which of the student."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structopt.distillation.adapters import Embeddings, pooled
from structopt.distillation.builders import AnyTeacher, seen_features
from structopt.distillation.features import same_batch
from structopt.distillation.objective import Distillation, Term
from structopt.distillation.teachers import as_source
from structopt.distillation.unit import unit
from structopt.losses.checks import need_temperature, seen, wide

SIZE = 128  # of the embeddings, as in the paper


def contrastive(
    student: Tensor, teacher: Tensor, targets: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """Noise-contrastive loss of embeddings, pairs of one example against pairs of other classes.

    With unit vectors s_i, t_j, e_ij = exp(s_i·t_j / τ), the N_i examples j of another class than i,
    and c_i = N_i·mean(e) without a gradient, h_ij = e_ij / (e_ij + c_i) is how likely a pair is a
    true one. The loss is the mean over i of -log h_ii - Σ_j log(1 - h_ij), plus the same with
    the parts of student and teacher exchanged.

    Tian, Krishnan and Isola, 2020, "Contrastive representation distillation". There the others
    come from a memory of the whole data set; here they are the rest of the batch. Their constant
    Z is estimated once, at the first batch; here at each, and the size of the data set drops out.

    Args:
        student: embeddings (B, D).
        teacher: embeddings (B, D).
        targets: class indices (B,).
        temperature: τ > 0.

    Raises:
        ValueError: shapes that differ, targets that are not (B,), a temperature not above 0.

    Example:
        >>> x, y = torch.eye(3), torch.arange(3)
        >>> contrastive(x, x, y) < contrastive(x, x.roll(1, 0), y)
        tensor(True)
    """
    need_temperature(temperature)
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f"contrast needs embeddings (B, D) of both, not {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: contrast() makes the maps between them"
        )
    if targets.shape != student.shape[:1]:
        raise ValueError(
            f"contrast needs class indices ({len(student)},), not {tuple(targets.shape)}"
        )
    same_batch(student, teacher)
    ours, theirs = (unit(wide(x), 1) for x in (student, teacher))
    with torch.autocast(ours.device.type, enabled=False):
        scores = ours @ theirs.to(ours.dtype).T / temperature  # (B, B), log e
    others = targets[:, None] != targets[None, :]
    level = scores.detach().flatten().logsumexp(0) - math.log(scores.numel())
    noise = others.sum(1).clamp(min=1).to(scores.dtype).log() + level  # (B,), log c
    loss = _pairs(scores, noise, others) + _pairs(scores.T, noise, others)
    return seen(loss, student, teacher)


def _pairs(scores: Tensor, noise: Tensor, others: Tensor) -> Tensor:
    """-log h = softplus(log c - log e), -log(1 - h) = softplus(log e - log c)."""
    true = F.softplus(noise - scores.diagonal())
    false = F.softplus(scores - noise[:, None]).masked_fill(~others, 0.0).sum(1)
    return (true + false).mean()


def contrast(
    teacher: AnyTeacher,
    student: nn.Module,
    layers: Mapping[str, str],
    example: Any,
    *,
    weight: float = 0.8,
    temperature: float = 0.1,
) -> Distillation:
    """:func:`contrastive` between layers, each pooled and mapped linearly to 128 numbers.

    The maps of both sides are parameters of the objective, and have to be in the optimiser:
    ``descent.fused_adamw(nn.ModuleList([student, objective]), lr)``. Tian, Krishnan and Isola,
    2020, whose weight is 0.8 for the layer before the last.

    Args:
        teacher: one module, or :class:`Cached` outputs that hold these layers.
        student: the network to be taught; it is run once, in evaluation mode.
        layers: names of the student's layers, each with that of the teacher's.
        example: inputs of a few examples, on the student's device.
        weight: of each pair of layers; the labels count 1, unless :func:`together` is told.
        temperature: τ > 0.

    Raises:
        ValueError: layers that do not exist (near names listed) or cannot be pooled, none, a
            weight below 0, a temperature not above 0.

    Example:
        >>> teacher, student = nn.Sequential(nn.Linear(2, 8)), nn.Sequential(nn.Linear(2, 4))
        >>> contrast(teacher, student, {"0": "0"}, torch.ones(1, 2)).adapters[0].teacher
        Linear(in_features=8, out_features=128, bias=True)
    """
    source = as_source(teacher)
    need_temperature(temperature)
    ours, theirs = seen_features(source, student, layers, example)
    loss, terms = partial(contrastive, temperature=temperature), []
    for name, other in layers.items():
        widths = [pooled(features).shape[1] for features in (ours[name], theirs[other])]
        adapter = Embeddings(widths[0], widths[1], SIZE).to(example.device, ours[name].dtype)
        terms.append(Term(f"contrast {name}", loss, weight, (name, other), adapter))
    return Distillation(source, terms)
