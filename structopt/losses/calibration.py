"""How far a confidence can be trusted."""

from __future__ import annotations

from torch import Tensor

from structopt.losses.checks import classified, range_message, seen, whole


def expected_calibration_error(logits: Tensor, targets: Tensor, *, bins: int = 15) -> Tensor:
    """``Σ_b fraction_b·|accuracy_b - confidence_b|`` (Naeini et al., 2015; Guo et al., 2017).

    0 means that of all predictions made with 80% confidence, 80% are right, and so on. Bins of
    equal width over the confidence, the probability of the predicted class.

    Args:
        logits: (N, C).
        targets: class indices, (N,).
        bins: how many; few bins hide errors that cancel, many are noisy.

    Raises:
        ValueError: shapes that do not fit, labels out of range, bins < 1.
        FloatingPointError: NaN (on a CPU).

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 50.0], [0.0, 50.0]])  # twice sure, once right
        >>> expected_calibration_error(logits, torch.tensor([1, 0]))
        tensor(0.5000)
    """
    if not whole(bins) >= 1:
        raise ValueError(f"bins counts the bins: a whole number, at least 1, not {bins!r}")
    if logits.ndim != 2 or targets.is_floating_point():
        shapes = f"logits {tuple(logits.shape)} and {targets.dtype} targets"
        raise ValueError(f"calibration needs logits (N, C) and class indices (N,), not {shapes}")
    logits, targets, _ = classified(logits, targets, None, "mean")
    if ((targets < 0) | (targets >= logits.shape[1])).any():
        raise ValueError(range_message(logits, targets))
    confidence, predicted = logits.detach().softmax(1).max(1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are (lower, upper]
    excess = confidence - (predicted == targets).to(logits.dtype)
    gaps = logits.new_zeros(bins).index_add_(0, bin_of, excess).abs()
    return seen(gaps.sum() / len(targets), logits, targets)
