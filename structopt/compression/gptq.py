"""Second-order rounding: what one weight loses, the weights after it make up for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structopt.compression.evidence import fitting
from structopt.compression.grids import Grid, Steps
from structopt.compression.in_turn import in_turn
from structopt.compression.quantize import Quantized, as_finite
from structopt.losses.checks import real

BLOCK = 128  # columns whose errors are handed on at once


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, grid: Grid, *, damp: float = 0.01) -> Quantized:
    """Round a weight so that what it does to its inputs changes least: GPTQ.

    ``hessian`` is the sum of x xᵀ over what the rows multiply, (n, n) for a weight (outputs, …) of
    n weights a row, or (groups, n, n) for that many equal parts of the rows. The grid is laid over
    the weight first. Then column by column: round to the nearest code, and move the columns that
    follow by -(w - q) / U[j, j] · U[j, j+1:], where Uᵀ U is the inverse of the Hessian, damped by
    a share of its mean diagonal. Exact zeros stay: a pruned weight stays pruned.

    Frantar et al., 2023, "GPTQ: accurate post-training quantization for generative pre-trained
    transformers". Raises ValueError where the shapes do not fit, for a Hessian that is no such sum,
    and as ``quantize``.

    >>> x, weight = torch.randn(99, 6), torch.randn(4, 6)
    >>> gptq(weight, x.T @ x, Grid(3)).codes.shape
    torch.Size([4, 6])
    """
    if not 0 <= real(damp) < math.inf:
        raise ValueError(f"damp={damp!r}: a share of the mean diagonal, 0 or more")
    parts = fitting(hessian, weight)
    rows = as_finite(weight).flatten(1)  # (O, n)
    steps = grid.fit.steps(grid.per.split(rows.view(weight.shape)), grid)
    units = grid.per.split(torch.zeros_like(rows).view(weight.shape))
    scale, zero = (
        grid.per.join(part[:, None].expand_as(units), weight.shape).flatten(1) for part in steps
    )
    size, made = len(rows) // len(parts), []
    for part, own in enumerate(parts):
        mine = slice(part * size, (part + 1) * size)
        made.append(_rounded(rows[mine], Steps(scale[mine], zero[mine]), own, grid, damp))
    codes = torch.cat(made).view(weight.shape).to(grid.dtype)
    return Quantized(codes, steps, grid, weight.dtype)


def _rounded(rows: Tensor, steps: Steps, hessian: Tensor, grid: Grid, damp: float) -> Tensor:
    """The codes of some rows, (O, n), as floats."""
    left, kept, codes = rows.clone(), rows != 0, torch.empty_like(rows)
    upper = _upper(hessian.to(rows), damp)
    for start in range(0, rows.shape[1], BLOCK):
        end = min(start + BLOCK, rows.shape[1])
        errors = torch.zeros_like(rows[:, start:end])
        for j in range(start, end):
            own = Steps(steps.scale[:, j], steps.zero[:, j])
            code = grid.nearest(left[:, j : j + 1], own)[:, 0].clamp(*grid.codes)
            if not grid.is_sign:
                code = torch.where(kept[:, j], code, own.zero)
            codes[:, j] = code
            error = (left[:, j] - grid.values(code[:, None], own)[:, 0]) / upper[j, j]
            left[:, j + 1 : end] -= error[:, None] * upper[j, j + 1 : end]
            errors[:, j - start] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    return codes


def _upper(hessian: Tensor, damp: float) -> Tensor:
    """U with Uᵀ U = the inverse of the damped Hessian; inputs that are always 0 are apart."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    lower, wrong = torch.linalg.cholesky_ex(hessian)
    upper, worse = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(wrong) or int(worse):
        raise ValueError(
            f"a hessian of shape {tuple(hessian.shape)} is no sum of x xᵀ, or damp={damp} is too "
            "small to invert it"
        )
    made: Tensor = upper
    return made


def gptq_weights(
    model: nn.Module,
    batches: Iterable[Any],
    grid: Grid,
    names: Sequence[str] | None = None,
    *,
    damp: float = 0.01,
) -> dict[str, Quantized]:
    """:func:`gptq` for the weights of linear layers and convolutions; the model stays as it is.

    Layers are rounded in the order in which they run, each from the inputs that it gets behind
    those already rounded: one pass over the batches a layer. ``names`` are parameters, as in
    :func:`structopt.compression.quantize_weights`; by default the weights of all such layers that
    run. A weight that several layers share is rounded once, for all that they read.

    Raises ValueError for other parameters, weights that other parameters compute, three-dimensional
    convolutions, no batches, and as ``quantize``.

    >>> model, x = nn.Linear(6, 4), torch.randn(50, 6)
    >>> sorted(gptq_weights(model, [x], Grid(3)))
    ['weight']
    """
    return in_turn(model, batches, names, lambda w, h: gptq(w, h, grid, damp=damp))
