"""Criteria: how much each weight matters. Pure functions, whose arguments say what they need.

An argument without a default names a piece of evidence (`weight`, `gradient`, `input_norm`, …) that
:func:`structopt.pruning.score` fetches; one with a default is an option, set with
``functools.partial(magnitude, p=2)``. A criterion of your own is any such function.

Scores add up: a channel's score is the sum of those of its weights, and its absolute value ranks.
Powers of half-precision weights are taken in single precision, where they neither vanish nor tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structopt.losses.checks import real, wide


def magnitude(weight: Tensor, p: int = 1) -> Tensor:
    """``|w|ᵖ``: weights near zero matter least (Han et al., 2015).

    Summed over a filter, p = 1 is its L1 norm (Li et al., 2017) and p = 2 the square of its L2
    norm; both rank single weights alike. Raises ValueError for a p that is not above 0.

    >>> magnitude(torch.tensor([[-3.0, 2.0]]), p=2)
    tensor([[9., 4.]])
    """
    if not real(p) > 0:
        raise ValueError(f"p is the exponent of |w|, above 0, not {p!r}")
    return weight.abs() if p == 1 else wide(weight).abs() ** p


def saliency(weight: Tensor, gradient: Tensor) -> Tensor:
    """``|w · ∂L/∂w|``: what the loss would change, to first order, without the weight.

    Mozer and Smolensky, 1989; as a criterion for single weights, before training, it is SNIP (Lee
    et al., 2019). `gradient` is the mean over the batches given.

    >>> saliency(torch.tensor([2.0]), torch.tensor([-0.5]))
    tensor([1.])
    """
    return (weight * gradient).abs()


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """w · ∂L/∂w with its sign, so that a channel's sum is the first-order change of the loss.

    The score of a group, ``|Σ w·g|``, ranks like (Σ w·g)² of Molchanov et al., 2019. Where a batch
    norm took its statistics from the batch, the filters in front of it would have a sum of zero,
    since their scale is without effect; scores are taken in evaluation mode, where it is not. For
    single weights it ranks like :func:`saliency`.

    >>> taylor(torch.tensor([2.0]), torch.tensor([-0.5]))
    tensor([-1.])
    """
    return weight * gradient


def fisher(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    """½ w² · E[(∂L/∂w)²], the diagonal of the empirical Fisher information (Theis et al., 2018).

    `squared_gradient` is the mean over single examples.

    >>> fisher(torch.tensor([2.0]), torch.tensor([0.5]))
    tensor([1.])
    """
    return 0.5 * wide(weight) ** 2 * squared_gradient


def hessian(weight: Tensor, curvature: Tensor) -> Tensor:
    """½ w² · ∂²L/∂w²: optimal brain damage (LeCun et al., 1990).

    `curvature`, the diagonal of the Hessian, is estimated by z ⊙ Hz with random signs z
    (Hutchinson), one draw a batch. Where it is negative it counts as 0: a minimum has none.

    >>> hessian(torch.tensor([2.0, 2.0]), torch.tensor([0.5, -0.5]))
    tensor([1., 0.])
    """
    return 0.5 * wide(weight) ** 2 * curvature.clamp(min=0)


def batch_norm_scale(scale: Tensor) -> Tensor:
    """``|γ|``: how loud a norm lets its channel speak (network slimming, Liu et al., 2017).

    >>> batch_norm_scale(torch.tensor([-0.5, 1.0]))
    tensor([0.5000, 1.0000])
    """
    return scale.abs()


def lamp(weight: Tensor) -> Tensor:
    """w² / Σ v² over the v of the layer that are at least as large (Lee et al., 2021).

    The largest weight of each layer scores 1, so that ranking over the network empties none.

    >>> lamp(torch.tensor([[3.0, 4.0]]))  # 9 / 25, 16 / 16
    tensor([[0.3600, 1.0000]])
    """
    squared = wide(weight).flatten().square()
    ordered, order = squared.sort(stable=True)
    above = ordered.flip(0).cumsum(0).flip(0)  # of this weight and all larger ones
    scores = torch.empty_like(squared)
    scores[order] = ordered / above.clamp(min=torch.finfo(above.dtype).tiny)
    return scores.view_as(weight)


def geometric_median(weight: Tensor) -> Tensor:
    """Σⱼ ‖wᵢ - wⱼ‖₂ for each filter i: one near the middle of the others is replaceable.

    FPGM, He et al., 2019. Of shape (out, 1, …): a score of filters, not of weights. Filters are the
    rows of the weight: of a transposed convolution these are its inputs.

    >>> geometric_median(torch.tensor([[0.0], [1.0], [4.0]])).flatten()
    tensor([5., 4., 7.])
    """
    flat = wide(weight).flatten(1)
    exact = "donot_use_mm_for_euclid_dist"  # products of matrices would lose small distances
    total = torch.cdist(flat, flat, compute_mode=exact).sum(1)
    return total.view(-1, *[1] * (weight.ndim - 1))


def activation_mean(input_mean: Tensor) -> Tensor:
    """The mean of ``|a|``, a the activation that a weight reads (Molchanov et al., 2017).

    >>> activation_mean(torch.tensor([[0.1, 0.7]]))
    tensor([[0.1000, 0.7000]])
    """
    return input_mean


def apoz(input_zeros: Tensor) -> Tensor:
    """1 - the average percentage of zeros of the activation that is read (Hu et al., 2016).

    >>> apoz(torch.tensor([[0.25, 1.0]]))
    tensor([[0.7500, 0.0000]])
    """
    return 1 - input_zeros


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """``|w| · ‖x‖₂``, x all values of the input that the weight reads (Sun et al., 2024).

    The paper ranks within each output row: ``find_masks(..., scope=PerRow())``.

    >>> wanda(torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 1.0]]))
    tensor([[2., 3.]])
    """
    return weight.abs() * input_norm


def random(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform numbers: the baseline that a criterion has to beat.

    >>> random(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    return torch.rand(weight.shape, generator=generator, device=weight.device)
