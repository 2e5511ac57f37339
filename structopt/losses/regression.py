"""Losses for targets that are quantities."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from structopt.losses.checks import Reduction, pair, real, seen


def mse(prediction: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean squared error, (prediction - target)².

    The negative log-likelihood of Gaussian noise of fixed width, up to scale and a constant
    (Gauss, 1809). Its best constant prediction is the mean.

    Args:
        prediction: any shape, floating point.
        target: the same shape. What would broadcast is refused.
        reduction: "mean" or "sum" over everything, or "none".

    Raises:
        ValueError: shapes that differ, an integer prediction, an empty batch.
        FloatingPointError: NaN (on a CPU).

    Example:
        >>> import torch
        >>> mse(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
        tensor(2.)
    """
    prediction, target = pair(prediction, target, reduction)
    return seen(F.mse_loss(prediction, target, reduction=reduction), prediction, target)


def mae(prediction: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean absolute error, ``|prediction - target|``.

    The negative log-likelihood of Laplace noise of fixed width, up to scale and a constant
    (Laplace, 1774). Its best constant prediction is the median; its gradient at 0 is taken as 0.

    Args:
        prediction: any shape, floating point.
        target: the same shape. What would broadcast is refused.
        reduction: "mean" or "sum" over everything, or "none".

    Raises:
        ValueError: as :func:`mse`.

    Example:
        >>> import torch
        >>> mae(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
        tensor(1.)
    """
    prediction, target = pair(prediction, target, reduction)
    return seen(F.l1_loss(prediction, target, reduction=reduction), prediction, target)


def huber(
    prediction: Tensor, target: Tensor, *, delta: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """Huber's loss (1964) of an error e: ``e²/2`` up to delta, beyond ``delta·(|e| - delta/2)``.

    Quadratic for small errors, linear for outliers, whose pull is at most `delta`.

    Args:
        prediction: any shape, floating point.
        target: the same shape. What would broadcast is refused.
        delta: where the loss turns linear, in the unit of the target.
        reduction: "mean" or "sum" over everything, or "none".

    Raises:
        ValueError: as :func:`mse`, or a delta that is not above 0.

    Example:
        >>> import torch
        >>> huber(torch.tensor([0.5, 3.0]), torch.zeros(2), reduction="none")
        tensor([0.1250, 2.5000])
    """
    if not real(delta) > 0:
        raise ValueError(f"delta is where the loss turns linear: a number above 0, not {delta!r}")
    prediction, target = pair(prediction, target, reduction)
    loss = F.huber_loss(prediction, target, delta=delta, reduction=reduction)
    return seen(loss, prediction, target)
