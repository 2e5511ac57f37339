"""Penalties that draw weights, or whole groups of them, to zero."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from structopt.losses.checks import wide


def l1(parameters: Tensor | Iterable[Tensor]) -> Tensor:
    """Σ|w| over all the weights given, the penalty of the lasso (Tibshirani, 1996).

    Args:
        parameters: one tensor, or any number of them, of any shapes.

    Raises:
        ValueError: no tensor at all, or one that is not floating point.

    Example:
        >>> l1([torch.tensor([1.0, -2.0]), torch.tensor([[0.5]])])
        tensor(3.5000)
    """
    return torch.stack([w.abs().sum() for w in _weights(parameters)]).sum()


def group_lasso(weights: Tensor | Iterable[Tensor], dim: int = 0) -> Tensor:
    """Σ_g √n_g·‖w_g‖₂ (Yuan and Lin, 2006): a group of n_g weights for each index along `dim`.

    A group that has reached zero gets the subgradient 0. Groups of one weight give :func:`l1`.

    Args:
        weights: one tensor, or any number of them.
        dim: 0 groups what makes an output channel, 1 what reads an input channel.

    Raises:
        ValueError: as :func:`l1`, or a `dim` that a weight does not have.

    Example:
        >>> group_lasso(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))  # √2 · (5 + 0)
        tensor(7.0711)
    """
    total = []
    for w in _weights(weights):
        if not -w.ndim <= dim < w.ndim:
            raise ValueError(f"dim={dim} does not exist in a weight of shape {tuple(w.shape)}")
        groups = w.movedim(dim, 0).flatten(1) if w.ndim > 1 else w[:, None]  # (groups, n_g)
        total.append(math.sqrt(groups.shape[1]) * torch.linalg.vector_norm(groups, dim=1).sum())
    return torch.stack(total).sum()


def _weights(weights: Tensor | Iterable[Tensor]) -> list[Tensor]:
    found = [weights] if isinstance(weights, Tensor) else list(weights)
    if not found:
        raise ValueError("no weights given: is it model.parameters() of a model that has some?")
    if not all(w.is_floating_point() and w.ndim for w in found):
        raise ValueError("a penalty needs floating-point weights of at least one dimension")
    return [wide(w) for w in found]
