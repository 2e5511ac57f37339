"""Relational losses: what matters is where the examples of a batch lie to one another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structopt.distillation.features import same_batch
from structopt.distillation.unit import unit
from structopt.losses.checks import seen, wide


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's loss (delta 1) of the distances of all pairs, each divided by their mean.

    Unchanged by isometries and by scale. Park et al., 2019, "Relational knowledge distillation";
    their code counts the pairs of an example with itself too, a factor (B - 1)/B. They weigh it
    25, with angles at 50.

    Args:
        student: embeddings (B, D); feature maps (B, C, H, W) are averaged over their positions.
        teacher: embeddings of the same examples, of any size.

    Raises:
        ValueError: batches that differ, or of fewer than 2 examples.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> relational_distance(-2 * x + 7, x).item() < 1e-9
        True
    """
    ours, theirs = _embeddings(student, teacher, least=2)
    i, j = torch.triu_indices(len(ours), len(ours), 1, device=ours.device)
    found = []
    for x in (ours, theirs):
        pairs = torch.linalg.vector_norm(x[i] - x[j], dim=1)
        found.append(pairs / pairs.mean().clamp(min=1e-12))
    return seen(F.huber_loss(found[0], found[1].to(found[0].dtype)), student, teacher)


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's loss (delta 1) of the cosine at j of all triples (i, j, k) of distinct examples.

    Unchanged by isometries and by scale. Park et al., 2019, "Relational knowledge distillation";
    their code counts triples that repeat an example too. Time and memory grow as B³ and B²·D.

    Args:
        student: embeddings (B, D); feature maps (B, C, H, W) are averaged over their positions.
        teacher: embeddings of the same examples, of any size.

    Raises:
        ValueError: batches that differ, or of fewer than 3 examples.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> relational_angle(-2 * x + 7, x).item() < 1e-9
        True
    """
    ours, theirs = _embeddings(student, teacher, least=3)
    count = len(ours)
    same = torch.eye(count, dtype=torch.bool, device=ours.device)
    distinct = ~(same[:, :, None] | same[:, None, :] | same[None, :, :])
    cosines = []
    for x in (ours, theirs):
        with torch.autocast(x.device.type, enabled=False):
            e = unit(x[None] - x[:, None], 2)  # (j, i, D): from j to i
            cosines.append((e @ e.transpose(1, 2))[distinct])  # (j, i, k) of distinct ones
    return seen(F.huber_loss(cosines[0], cosines[1].to(cosines[0].dtype)), student, teacher)


def _embeddings(student: Tensor, teacher: Tensor, least: int) -> tuple[Tensor, Tensor]:
    same_batch(student, teacher)
    if len(student) < least:
        raise ValueError(f"relations need at least {least} examples in a batch: {len(student)}")
    ours, theirs = (x.flatten(2).mean(2) if x.ndim == 4 else x.flatten(1)
                    for x in (wide(student), wide(teacher)))  # fmt: skip
    return ours, theirs
