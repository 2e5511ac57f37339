"""Training networks with exits, and choosing when an example may leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structopt import losses
from structopt.losses.checks import range_message, real
from structopt.measure.running import device_of
from structopt.slicing.exits import EarlyExits
from structopt.slicing.heads import confidence
from structopt.training import Objective, evaluating
from structopt.training.objectives import _pair

Loss = Callable[[Tensor, Tensor], Tensor]


def all_exits(
    loss: Loss = losses.cross_entropy,
    *,
    weights: Sequence[float] | None = None,
    teach: Loss = losses.kl_divergence,
    teaching: float = 0.0,
) -> Objective:
    """Σ weight · [loss(exit, targets) + teaching · teach(exit, last)] over the exits.

    Joint training (Teerapittayanon et al., 2016, "BranchyNet"). With `teaching` above 0 the last
    exit, held fixed, teaches the others: self-distillation (Phuong & Lampert, 2019,
    "Distillation-based training for multi-exit architectures").

    Args:
        loss: of an exit's logits and the targets.
        weights: one number an exit, the last included; 1 each by default.
        teach: of an exit's logits and the last one's.
        teaching: how much that counts, at least 0.

    Raises:
        ValueError: another number of weights than of exits, a negative `teaching`, a model without
            exits, a batch that is no pair (inputs, targets).

    Example:
        >>> body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> network = EarlyExits(body, torch.zeros(1, 4), ["1"])
        >>> all_exits(teaching=0.5)(network, (torch.ones(3, 4), torch.zeros(3).long())).ndim
        0
    """
    if not real(teaching) >= 0:
        raise ValueError(f"teaching counts the last exit's part, at least 0: {teaching!r}")

    def objective(model: nn.Module, batch: Any) -> Tensor:
        network = _with_exits(model)
        inputs, targets = _pair(batch)
        outputs = network(inputs)
        shares = [1.0] * len(outputs) if weights is None else weights
        if len(shares) != len(outputs):
            raise ValueError(f"{len(shares)} weights for {len(outputs)} exits, the last included")
        total = shares[-1] * loss(outputs[-1], targets)
        for share, logits in zip(shares, outputs[:-1], strict=False):
            part = loss(logits, targets)
            if teaching:
                part = part + teaching * teach(logits, outputs[-1].detach())
            total = total + share * part
        return total

    return objective


@dataclass(frozen=True)
class Threshold:
    """The confidence from which an example leaves; what that gave on the data it was chosen on.

    `macs` is the mean for one example, `left` the share of examples that left at each exit.
    """

    value: float
    accuracy: float
    macs: float
    left: tuple[float, ...]


@torch.no_grad()
def choose_threshold(
    network: EarlyExits,
    batches: Iterable[Any],
    *,
    accuracy: float | None = None,
    macs: float | None = None,
) -> Threshold:
    """The cheapest threshold of at least this accuracy, or the most accurate within these MACs.

    Tried are the values between any two confidences that occur (1000, evenly, of more). Give
    validation data: on the data that it was chosen on, a threshold looks better than it is.

    Raises ValueError for no data, labels that no output stands for, logits that are NaN, unless
    exactly one of `accuracy` and `macs` is given, and where no threshold reaches it, naming the
    best that can be had.

    >>> body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> network = EarlyExits(body, torch.zeros(1, 4), ["1"])
    >>> data = [(torch.randn(50, 4), torch.randint(2, (50,)))]
    >>> choose_threshold(network, data, macs=network.macs(torch.zeros(1, 4))[0]).left
    (1.0, 0.0)
    """
    if (accuracy is None) == (macs is None):
        raise ValueError("give one of accuracy and macs: the other is what is optimised")
    sure, right, costs = _observed(_with_exits(network), batches)
    seen = torch.unique(sure[:-1])  # ascending
    if len(seen) > 1000:
        seen = seen[torch.linspace(0, len(seen) - 1, 1000).long()]
    values = [0.0, *((seen[1:] + seen[:-1]) / 2).tolist(), 1.01]  # rounding must not decide
    tried = [_outcome(value, sure, right, costs) for value in values]
    if accuracy is not None:
        good = [one for one in tried if one.accuracy >= accuracy]
        best = max(tried, key=lambda one: one.accuracy)
        if not good:
            raise ValueError(
                f"no threshold reaches an accuracy of {accuracy:g}: the best is {best.accuracy:.4f}"
            )
        return min(good, key=lambda one: (one.macs, -one.accuracy))
    assert macs is not None
    good = [one for one in tried if one.macs <= macs]
    if not good:
        least = min(one.macs for one in tried)
        raise ValueError(f"no threshold needs at most {macs:,.0f} MACs: the least is {least:,.0f}")
    return max(good, key=lambda one: (one.accuracy, -one.macs))


def _observed(network: EarlyExits, batches: Iterable[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence and correctness at each exit, (exits, examples), and the MACs until each."""
    sure, right, example = list[Tensor](), list[Tensor](), None
    device = device_of(network, ())
    with evaluating(network):
        for batch in batches:
            inputs, targets = (t.to(device) for t in _pair(batch))
            if not len(inputs):
                continue
            if targets.shape != inputs.shape[:1]:
                raise ValueError(
                    f"targets of shape {tuple(targets.shape)} for {len(inputs)} inputs: give the "
                    "number of each one's class"
                )
            outputs = network(inputs)
            if ((targets < 0) | (targets >= outputs[-1].shape[1])).any():
                raise ValueError(range_message(outputs[-1], targets))
            sure.append(torch.stack([confidence(logits) for logits in outputs]))
            right.append(torch.stack([logits.argmax(1) == targets for logits in outputs]))
            example = inputs[:1]
    if example is None:
        raise ValueError("the batches are empty: there is nothing to choose a threshold on")
    broken = [str(n) for n, every in enumerate(torch.cat(sure, 1)) if not every.isfinite().all()]
    if broken:
        raise ValueError(
            f"logits of exit {', '.join(broken)} are NaN or infinite: not trained yet?"
        )
    costs = torch.tensor(network.macs(example), dtype=torch.float64)
    return torch.cat(sure, 1).cpu(), torch.cat(right, 1).cpu(), costs


def _outcome(value: float, sure: Tensor, right: Tensor, costs: Tensor) -> Threshold:
    leaves = sure >= value
    leaves[-1] = True
    exits = leaves.int().argmax(0)  # the first that is sure enough
    left = torch.bincount(exits, minlength=len(sure)).double() / sure.shape[1]
    hits = right.gather(0, exits[None])[0].double().mean()
    return Threshold(value, float(hits), float(left @ costs), tuple(left.tolist()))


def _with_exits(model: nn.Module) -> EarlyExits:
    if not isinstance(model, EarlyExits):
        raise ValueError(
            f"this is for EarlyExits, not for a {type(model).__name__}: give the model exits "
            "first, EarlyExits(model, example, at)"
        )
    return model
