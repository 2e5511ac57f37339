"""What transformers teach each other: which layer to which, and the attention inside one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structopt import losses
from structopt.losses.checks import wide


def map_layers(
    student: Sequence[str], teacher: Sequence[str], *, last: bool = False
) -> dict[str, str]:
    """A layer of the teacher for each of the student's, to hand to an objective as ``layers``.

    Evenly spread, the last to the last: layer m of M learns from layer ⌈m·N/M⌉ of N, as g(m) of
    Jiao et al., 2020, "TinyBERT", and PKD-skip of Sun et al., 2019, "Patient knowledge
    distillation". With ``last`` from the last M, PKD-last.

    Hidden states then go through :func:`hints` (TinyBERT's learnt map and squared error),
    projections to query, key and value through :func:`token_relations`.

    Args:
        student: names of its layers, first to last.
        teacher: names of the teacher's, at least as many.
        last: take the last ones rather than every N/M-th.

    Raises:
        ValueError: no layers, or more of the student's than of the teacher's.

    Example:
        >>> map_layers(["a", "b"], ["1", "2", "3", "4", "5"])
        {'a': '3', 'b': '5'}
        >>> map_layers(["a", "b"], ["1", "2", "3", "4", "5"], last=True)
        {'a': '4', 'b': '5'}
    """
    ours, theirs = len(student), len(teacher)
    if not 1 <= ours <= theirs:
        raise ValueError(
            f"a student of {ours} layers and a teacher of {theirs}: each of the student's, at "
            "least one, needs one of the teacher's"
        )
    if last:
        return dict(zip(student, teacher[-ours:], strict=True))
    return {name: teacher[-(-(m + 1) * theirs // ours) - 1] for m, name in enumerate(student)}


def token_relations(student: Tensor, teacher: Tensor, *, heads: int = 1, parts: int = 1) -> Tensor:
    """Σ KL(softmax(A_t·A_tᵀ/√d_t) || softmax(A_s·A_sᵀ/√d_s)), a mean over batch, heads and rows.

    How the tokens of each example lie to one another, in each of ``heads`` equal slices of the
    vectors; summed over the ``parts``. Widths and numbers of heads may differ between the two.
    For a layer that gives query, key and value side by side (``qkv``), ``parts=3`` is the loss of
    Wang et al., 2021, "MiniLMv2"; where they are three layers, name all three.

    Args:
        student: tokens (B, T, D), or several such vectors side by side.
        teacher: tokens of the same examples, as many, of any width.
        heads: relation heads, which need not be the attention heads of either.
        parts: vectors that lie side by side in D.

    Raises:
        ValueError: features of another kind or number, widths that heads · parts do not divide.

    Example:
        >>> tokens = torch.rand(2, 5, 6)
        >>> token_relations(tokens.flip(2), tokens).item() < 1e-6
        True
    """
    ours, theirs = (_heads(x, heads, parts) for x in _tokens(student, teacher))
    rows = [(_products(x, x)).flatten(0, -2) for x in (ours, theirs)]
    return parts * losses.kl_divergence(rows[0], rows[1])


def attention_scores(student: Tensor, teacher: Tensor, *, heads: int) -> Tensor:
    """(Q_s·K_sᵀ/√d_s - Q_t·K_tᵀ/√d_t)², a mean over batch, heads, rows and columns.

    The attention loss of Jiao et al., 2020, "TinyBERT": the scores before the softmax, which
    converged faster there than those after it. The features are those of a layer that gives query,
    key and value side by side, such as ``qkv`` of :class:`structopt.networks.EncoderLayer`.

    Args:
        student: (B, T, 3·D).
        teacher: (B, T, 3·D'), as many tokens of the same examples.
        heads: of both.

    Raises:
        ValueError: as :func:`token_relations`.

    Example:
        >>> qkv = torch.rand(2, 5, 12)
        >>> attention_scores(qkv, qkv, heads=2)
        tensor(0.)
    """
    found = []
    for x in _tokens(student, teacher):
        query, key, _ = _heads(x, heads, 3).unbind(1)
        found.append(_products(query, key))
    return losses.mse(found[0], found[1])


def _tokens(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"relations of tokens need (B, T, D) of both with the same B and T, not "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    student = wide(student)
    return student, teacher.to(student.dtype)


def _heads(tokens: Tensor, heads: int, parts: int) -> Tensor:
    """(B, T, parts·heads·d) as (B, parts, heads, T, d)."""
    if heads < 1 or parts < 1 or tokens.shape[2] % (heads * parts):
        raise ValueError(
            f"{parts} parts of {heads} heads do not divide vectors of {tokens.shape[2]} numbers"
        )
    count, length, width = tokens.shape
    split = tokens.reshape(count, length, parts, heads, width // (parts * heads))
    return split.permute(0, 2, 3, 1, 4)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(..., T, T), a·bᵀ/√d."""
    with torch.autocast(a.device.type, enabled=False):
        products: Tensor = a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5
    return products
