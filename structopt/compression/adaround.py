"""Rounding up or down that is learned, a layer at a time, by what the layer makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structopt.compression.evidence import fitting
from structopt.compression.grids import Grid
from structopt.compression.in_turn import in_turn
from structopt.compression.quantize import Quantized, as_finite

LOW, HIGH = -0.1, 1.1  # what the sigmoid is stretched to before it is clipped
BETA = 20.0, 2.0  # the exponent at first and at last: flat at first, then towards 0 and 1
FREE = 0.2  # of the steps without a regulariser
RATE = 0.3  # Adam's


@torch.no_grad()
def adaround(
    weight: Tensor, hessian: Tensor, grid: Grid, *, steps: int = 300, price: float = 30.0
) -> Quantized:
    """Round each weight up or down so that what the layer makes changes least: AdaRound.

    ŵ = low + h(v) (high - low), between the two values of the grid around w, with the rectified
    sigmoid h(v) = clip(1.2 σ(v) - 0.1, 0, 1). Adam lowers, for each row,
    (ŵ - w) H (ŵ - w)ᵀ, as a share of what rounding to nearest loses, plus
    ``price`` · mean(1 - abs(2 h - 1)^β); β falls from 20 to 2, and draws each h to 0 or 1. What is
    not there in the end is rounded. A row that then loses more than it does to the nearest keeps
    the nearest. ``hessian`` as in :func:`structopt.compression.gptq`. Exact zeros stay.

    Nagel et al., 2020, "Up or down? Adaptive rounding for post-training quantization", with the
    layer's whole output in place of batches of it, and without its activation. Raises ValueError
    for no steps, a negative price, and as ``gptq``.

    >>> x, weight = torch.randn(99, 6), torch.randn(4, 6)
    >>> made = adaround(weight, x.T @ x, Grid(3))
    >>> step = made.steps.scale
    >>> bool(((made.dequantize() - weight).abs() <= step * 1.001).all())  # up or down
    True
    """
    if steps < 1 or not price >= 0:
        raise ValueError(f"steps={steps}, price={price}: a step at least, and no price below 0")
    rows = as_finite(weight)
    parts = fitting(hessian, weight)
    units = grid.per.split(rows)
    fitted = grid.fit.steps(units, grid)
    near = grid.nearest(units, fitted).clamp(*grid.codes)
    value = grid.values(near, fitted)
    low = torch.where(units >= value, near, near - 1).clamp(*grid.codes)
    high = (low + 1).clamp(*grid.codes)
    if not grid.is_sign:
        low, high = (torch.where(units == 0, near, code) for code in (low, high))

    def matrix(part: Tensor) -> Tensor:  # (groups, outputs of each, n)
        joined, size = grid.per.join(part, weight.shape), len(weight) // len(parts)
        return joined.reshape(len(parts), size, parts.shape[-1])

    ends = [matrix(grid.values(code, fitted) - units) for code in (low, high)]
    up = matrix((near == high).to(rows.dtype)) > 0
    learned = _learned(ends[0], ends[1], parts.to(rows), up, steps, price)
    codes = torch.where(learned, matrix(high), matrix(low)).view(weight.shape)
    return Quantized(codes.to(grid.dtype), fitted, grid, weight.dtype)


def _learned(
    low: Tensor, high: Tensor, hessian: Tensor, up: Tensor, steps: int, price: float
) -> Tensor:
    """Which weights go up; ``low`` and ``high`` are the errors of going down and up."""

    def lost(share: Tensor) -> Tensor:
        error = torch.lerp(low, high, share)
        return ((error @ hessian) * error).sum(-1)

    most = lost(up.to(low))
    scale = torch.where(most > 0, 1 / most, 0)
    gap = high - low
    share = torch.where(gap > 0, -low / gap, 0.5).clamp(0.01, 0.99)
    with torch.enable_grad():
        v = ((share - LOW) / (HIGH - share)).log().requires_grad_()
        descent = torch.optim.Adam([v], lr=RATE)
        for step in range(steps):
            h = (v.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
            loss = (lost(h) * scale).sum()
            done = (step / steps - FREE) / (1 - FREE)
            if done > 0:
                beta = BETA[0] + (BETA[1] - BETA[0]) * done
                loss = loss + price * (1 - (2 * h - 1).abs() ** beta).mean(-1).sum()
            (v.grad,) = torch.autograd.grad(loss, v)
            descent.step()
    found = v.detach() > 0
    return torch.where((lost(found.to(low)) < most)[..., None], found, up)


def adaround_weights(
    model: nn.Module,
    batches: Iterable[Any],
    grid: Grid,
    names: Sequence[str] | None = None,
    *,
    steps: int = 300,
    price: float = 30.0,
) -> dict[str, Quantized]:
    """:func:`adaround` for linear layers and convolutions, as :func:`gptq_weights` has it.

    >>> model, x = nn.Linear(6, 4), torch.randn(50, 6)
    >>> sorted(adaround_weights(model, [x], Grid(3)))
    ['weight']
    """
    return in_turn(
        model, batches, names, lambda w, h: adaround(w, h, grid, steps=steps, price=price)
    )
