"""Losses between the logits of a student and those of its teacher.

Each is ``f(student, teacher, ...)`` of logits (B, C, ...): a mean over the batch (and over
positions, where there are any), never over the classes unless it says so. Where a temperature
divides the logits the loss carries the factor T², so that its gradient keeps its size. The
teacher's logits get a gradient too if they want one; the objectives give them without. What
``counts``, bool (B, ...), leaves out (padding) is as if it were not there, whatever it holds; a
class that a mask gives -inf in both has probability 0 in both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structopt import losses
from structopt.distillation.unit import centred_unit
from structopt.losses.checks import READABLE, need_temperature, range_message, seen, wide
from structopt.losses.classification import excess
from structopt.losses.positions import blanked, need_counts, over


def soft_targets(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    counts: Tensor | None = None,
) -> Tensor:
    """T²·KL(softmax(t / T) || softmax(s / T)), a mean over the batch, in nats.

    The teacher's soft targets of Hinton, Vinyals and Dean, 2015, "Distilling the
    knowledge in a neural network". With T → ∞ it becomes half of :func:`logit_mse` of
    centred logits.

    Args:
        student: logits, (B, C, ...).
        teacher: logits of the same shape.
        temperature: T > 0; above 1 it shows what the teacher thinks of the unlikely
            classes.
        counts: bool (B, ...), false where nothing is to be learnt, such as padding.

    Raises:
        ValueError: shapes that differ (say, other class counts), a temperature not
            above 0; on a CPU also where nothing counts.
        FloatingPointError: NaN (on a CPU).

    Example:
        >>> soft_targets(torch.zeros(1, 2), torch.tensor([[9.0, 0.0]]), temperature=1.0)
        tensor(0.6919)
    """
    student, teacher = _pair(student, teacher, temperature)
    _need_classes(student)
    return losses.kl_divergence(
        student,
        teacher,
        temperature=temperature,
        counts=counts,
    )


def standardised_logits(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 2.0,
    counts: Tensor | None = None,
) -> Tensor:
    """:func:`soft_targets` of z-scores: (z - mean(z)) / std(z) over the classes, for both.

    The student need not match the size of the teacher's logits, only their relations: the loss is
    the same for any a·z + b with a > 0. Sun et al., 2024, "Logit standardization in knowledge
    distillation"; std divides by C, as in their formula (their code divides by C - 1, which is
    another temperature). They weigh it 9 to 0.1 for the labels, at T = 2. Equal logits (a last
    layer of zeros) have no z-score and get no gradient: only labels move such a student.

    Args, Raises: as :func:`soft_targets`.

    Example:
        >>> z = torch.tensor([[3.0, 1.0, 0.0]])
        >>> standardised_logits(7 * z + 5, z).item() < 1e-6
        True
    """
    student, teacher = _pair(student, teacher, temperature, counts)
    _need_classes(student)
    ours, theirs = _scores(student), _scores(teacher)
    return losses.kl_divergence(ours, theirs, temperature=temperature, counts=counts)


def _scores(logits: Tensor) -> Tensor:
    scores: Tensor = centred_unit(logits, 1) * logits.shape[1] ** 0.5
    return scores


def logit_mse(student: Tensor, teacher: Tensor, *, counts: Tensor | None = None) -> Tensor:
    """(s - t)², a mean over batch and classes.

    Ba and Caruana, 2014, "Do deep nets really need to be deep?" (there a sum over the classes and
    ½); Kim et al., 2021, "Comparing Kullback-Leibler divergence and mean squared error loss in
    knowledge distillation".

    Args, Raises: as :func:`soft_targets`.

    Example:
        >>> logit_mse(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
        tensor(2.)
    """
    student, teacher = _pair(student, teacher, counts=counts)
    each = losses.mse(student, teacher, reduction="none").mean(1)
    return seen(over(each, counts), student, teacher)


def decoupled(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    counts: Tensor | None = None,
) -> Tensor:
    """T²·(alpha·TCKD + beta·NCKD), a mean over the batch, in nats.

    TCKD = KL of (q_y, 1 - q_y) from (p_y, 1 - p_y), how sure the teacher is of the target class y;
    NCKD = KL of the distributions over the other classes alone. Since KL = TCKD + (1 - q_y)·NCKD,
    a teacher that is sure says next to nothing about the others in the plain loss. Zhao et al.,
    2022, "Decoupled knowledge distillation": alpha = 1, beta from 0.1 to 8 by network, T = 4.

    Args:
        student: logits, (B, C, ...).
        teacher: logits of the same shape.
        targets: class indices, (B, ...).
        temperature: T > 0.
        alpha: weight of the target class.
        beta: weight of the others.
        counts: as :func:`soft_targets`; where it is false, the target may be any number.

    Raises:
        ValueError: as :func:`soft_targets`, one class, or targets that are no class indices of
            that shape, or out of range (looked at on the CPU alone).

    Example:
        >>> z = torch.tensor([[3.0, 1.0, 0.0]])
        >>> decoupled(z, z, torch.tensor([0]))
        tensor(0.)
    """
    student, teacher = _pair(student, teacher, temperature, counts)
    if targets.is_floating_point() or targets.shape != student[:, 0].shape:
        raise ValueError(
            f"decoupled needs class indices {tuple(student[:, 0].shape)}, not {targets.dtype} "
            f"of shape {tuple(targets.shape)}"
        )
    if student.shape[1] < 2:
        raise ValueError("decoupled needs at least 2 classes: beside one there are no others")
    targets = targets if counts is None else targets.masked_fill(~counts, 0)
    readable = targets.device.type in READABLE and not torch.compiler.is_compiling()
    if readable and ((targets < 0) | (targets >= student.shape[1])).any():
        raise ValueError(range_message(student, targets))
    target = targets.long().unsqueeze(1)
    mask = torch.zeros_like(student, dtype=torch.bool).scatter_(1, target, True)
    log_p, log_q = (F.log_softmax(z / temperature, 1) for z in (student, teacher))
    rest_p, rest_q = (z.masked_fill(mask, -torch.inf).logsumexp(1) for z in (log_p, log_q))
    sure_p, sure_q = (z.gather(1, target).squeeze(1) for z in (log_p, log_q))
    tckd = excess(sure_q, sure_p) + excess(rest_q, rest_p)
    # Masked before exp: a teacher that is very sure would make inf of it, and NaN of the gradient.
    others_p, others_q = (
        (z - rest.masked_fill(rest == -torch.inf, 0.0).unsqueeze(1)).masked_fill(mask, 0.0)
        for z, rest in ((log_p, rest_p), (log_q, rest_q))
    )
    nckd = excess(others_q, others_p).sum(1)
    each = over(temperature**2 * (alpha * tckd + beta * nckd), counts)
    return seen(each, student, teacher)


def correlations(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    counts: Tensor | None = None,
) -> Tensor:
    """T²·(beta·inter + gamma·intra) with p = softmax(s / T), q = softmax(t / T).

    inter = 1 - Pearson's correlation of p and q over the classes, a mean over the examples; intra
    the same over the examples, a mean over the classes. Huang et al., 2022, "Knowledge
    distillation from a stronger teacher" (DIST); beta = gamma = 2 there with the labels at 1.

    Args:
        student: logits, (B, C, ...).
        teacher: logits of the same shape.
        temperature: T > 0.
        beta: weight of each example's order of the classes.
        gamma: weight of each class's order of the examples; what a batch of one lacks.
        counts: as :func:`soft_targets`.

    Raises:
        ValueError: as :func:`soft_targets`.

    Example:
        >>> z = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
        >>> correlations(z, z).abs().item() < 1e-5
        True
    """
    student, teacher = _pair(student, teacher, temperature, counts)
    _need_classes(student)
    p, q = (_rows(z / temperature).softmax(1) for z in (student, teacher))
    rows = None if counts is None else counts.flatten()
    inter = 1 - over((centred_unit(p, 1) * centred_unit(q, 1)).sum(1), rows)
    intra = 1 - (centred_unit(p, 0, rows) * centred_unit(q, 0, rows)).sum(0).mean()
    return seen(temperature**2 * (beta * inter + gamma * intra), student, teacher)


def _rows(logits: Tensor) -> Tensor:
    """(B, C, ...) as (N, C)."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def _need_classes(student: Tensor) -> None:
    if student.shape[1] < 2:
        raise ValueError(
            f"logits {tuple(student.shape)} have one class, of which all are certain: distil a "
            "single output by logit_mse, or make two classes of it, torch.cat([-z, z], 1) / 2"
        )


def _pair(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    need_temperature(temperature)
    if student.shape != teacher.shape or student.ndim < 2:
        raise ValueError(
            f"the student gives logits {tuple(student.shape)}, the teacher {tuple(teacher.shape)}: "
            "both need (batch, classes, ...) with the same classes; choose the teacher's columns "
            "that the student has, or distil features"
        )
    if not student.numel():
        shape = tuple(student.shape)
        raise ValueError(f"logits {shape} are empty: leave out batches of no example")
    need_counts(counts, student)
    student = wide(student)
    return blanked(student, counts), blanked(teacher.to(student.dtype), counts)
