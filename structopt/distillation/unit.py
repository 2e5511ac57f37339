"""Vectors of length one, also where there is nothing to divide by."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor, dim: int) -> Tensor:
    """x / ‖x‖ along ``dim``; a vector of zeros stays zero and gets no gradient.

    A small number in the denominator would make that gradient as large as the number is small: two
    equal examples in a batch, and the student is lost.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1)
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    return _divided(x, torch.zeros((), dtype=x.dtype, device=x.device), dim)


def centred_unit(x: Tensor, dim: int, counts: Tensor | None = None) -> Tensor:
    """The same of x - mean(x); of a constant vector, whose differences are rounding alone, 0.

    ``counts``, bool, says which entries along ``dim`` belong to the vectors; the others give 0.

    >>> centred_unit(torch.tensor([[0.1, 0.1, 0.1]]), 1)
    tensor([[0., 0., 0.]])
    """
    if counts is None:
        centred = x - x.mean(dim, keepdim=True)
    else:
        rest = ~counts.view([-1 if d == dim else 1 for d in range(x.ndim)])
        x = x.masked_fill(rest, 0.0)
        centred = (x - x.sum(dim, keepdim=True) / counts.sum()).masked_fill(rest, 0.0)
    rounding = 4 * torch.finfo(x.dtype).eps
    least = rounding * torch.linalg.vector_norm(x.detach(), dim=dim, keepdim=True)
    return _divided(centred, least, dim)


def _divided(x: Tensor, least: Tensor, dim: int) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    divided: Tensor = x / length.masked_fill(length <= least, torch.inf)
    return divided
