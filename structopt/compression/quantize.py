"""Numbers as codes on a grid: once for storing, or in each forward pass for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structopt.compression.grids import Grid, Steps
from structopt.losses.checks import wide


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor as codes on a grid. ``codes`` has its shape, and ``steps`` a pair for each unit."""

    codes: Tensor
    steps: Steps
    grid: Grid
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """(code - zero) · scale, or level[code] · scale, computed in the type of the scale."""
        units = self.grid.per.split(self.codes.to(self.steps.scale.dtype))
        values = self.grid.values(units, self.steps)
        return self.grid.per.join(values, self.codes.shape).to(self.dtype)


class _StraightThrough(torch.autograd.Function):
    """A value forwards; backwards the identity, or a share of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(share)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        return gradients[0] * share, None, None


def straight_through(x: Tensor, value: Tensor, share: Tensor) -> Tensor:
    """``value``, whose gradient goes to ``x``, times ``share``."""
    made: Tensor = _StraightThrough.apply(x, value, share)
    return made


def as_finite(x: Tensor) -> Tensor:
    """``x`` without gradient, at least in float32, after every complaint that can be made."""
    if not x.is_floating_point():
        raise ValueError(f"a tensor of {x.dtype}, shape {tuple(x.shape)}, is not a float to round")
    found = wide(x.detach())
    if not bool(found.isfinite().all()):
        count = int((~found.isfinite()).sum())
        remedy = "no grid reaches them; find where they come from first"
        raise ValueError(f"{count} of {x.numel()} numbers are NaN or infinite: {remedy}")
    return found


@torch.no_grad()
def fit(x: Tensor, grid: Grid) -> Steps:
    """Lay the grid over the numbers of ``x``, each unit by itself: (scale, zero), (units,) each.

    float32, and float64 for such an ``x``. A unit of zeros gets the smallest scale there is, so
    that its codes stand for exact zeros.

    Raises ValueError for NaN, infinities, types that are not floats, an axis ``x`` has not, and
    numbers so near the largest of their type that a step has no place in it.

    >>> fit(torch.tensor([-1.0, 0.5]), Grid(bits=4)).scale
    tensor([0.1429])
    """
    steps = grid.fit.steps(grid.per.split(as_finite(x)), grid)
    _within(steps.scale, x, grid)
    return steps


@torch.no_grad()
def quantize(x: Tensor, grid: Grid, steps: Steps | None = None) -> Quantized:
    """Round ``x`` to the grid, with the given steps or those that :func:`fit` finds.

    code = clip(round(x / scale) + zero), ties to even; int8 on symmetric grids, uint8 on others,
    and the same codes as torch's ``quantize_per_tensor`` and ``quantize_per_channel``. With
    min-max steps nothing is further from its value than half a step.

    Jacob et al., 2018, "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference". Raises ValueError as :func:`fit`, and where a value of the
    grid is beyond the type of ``x``.

    >>> quantize(torch.tensor([-1.0, 0.2, 0.6]), Grid(bits=4)).codes
    tensor([-7,  1,  4], dtype=torch.int8)
    """
    units = grid.per.split(as_finite(x))
    steps = grid.fit.steps(units, grid) if steps is None else _fitting(steps, units, grid)
    codes = grid.nearest(units, steps).clamp(*grid.codes)
    made = Quantized(grid.per.join(codes, x.shape).to(grid.dtype), steps, grid, x.dtype)
    _within(made.dequantize(), x, grid)
    return made


def fake_quantize(x: Tensor, grid: Grid, steps: Steps | None = None) -> Tensor:
    """``quantize(x, grid, steps).dequantize()`` with a gradient: the straight-through estimator.

    The gradient of the result passes to ``x`` where ``x`` was not clipped, and is zero elsewhere
    (Bengio et al., 2013). Equal to torch's ``fake_quantize_per_tensor_affine`` and
    ``fake_quantize_per_channel_affine``. Values are not looked at, so that nothing waits for the
    device.

    >>> x = torch.tensor([-1.0, 0.2, 0.6], requires_grad=True)
    >>> fake_quantize(x, Grid(bits=4))
    tensor([-1.0000,  0.1429,  0.5714], grad_fn=<_StraightThroughBackward>)
    """
    with torch.no_grad():
        units = grid.per.split(wide(x.detach()))
        steps = grid.fit.steps(units, grid) if steps is None else _fitting(steps, units, grid)
        codes = grid.nearest(units, steps)
        first, last = grid.codes
        inside = (codes >= first) & (codes <= last)
        values = grid.values(codes.clamp(first, last), steps)
        value = grid.per.join(values, x.shape).to(x.dtype)
        kept = grid.per.join(inside, x.shape)
    return straight_through(x, value, kept)


def _within(found: Tensor, x: Tensor, grid: Grid) -> None:
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"{grid} reaches beyond {x.dtype} for numbers as large as {float(x.abs().max()):.4g}: "
            "scale them down first"
        )


def _fitting(steps: Steps, units: Tensor, grid: Grid) -> Steps:
    shapes = {tuple(part.shape) for part in steps}
    if shapes != {(len(units),)}:
        raise ValueError(
            f"steps of shapes {sorted(shapes)} do not fit {grid.per}, which makes {len(units)} "
            "units of this tensor: fit them to a tensor of its shape"
        )
    return Steps(*(part.to(units.dtype) for part in steps))  # the only type that files have
