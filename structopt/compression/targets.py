"""How much may be lost or spent, and the ranks that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from structopt.compression.ranks import Form, Ranks


@dataclass(frozen=True)
class Energy:
    """The smallest ranks that keep this share of the squared singular values, for each rank.

    A Tucker product has two, and may keep less: a share of 0.8 on either side leaves 0.6 at least.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"{self}: a share lies above 0, and at most at 1")


@dataclass(frozen=True)
class Error:
    """The smallest ranks with at most this relative error in the Frobenius norm, for each rank."""

    relative: float

    def __post_init__(self) -> None:
        if not 0 <= self.relative < 1:
            raise ValueError(f"{self}: a relative error lies from 0 to below 1")


@dataclass(frozen=True)
class Weights:
    """At most this share of the weights of all layers taken together, where they lose least."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"{self}: a share of the weights lies between 0 and 1")


Target = Energy | Error | Weights


def chosen_ranks(
    spectra: Mapping[str, list[Tensor]],
    shapes: Mapping[str, torch.Size],
    form: Form,
    target: Target,
) -> dict[str, Ranks]:
    """The ranks of each layer that becomes smaller by them."""
    if isinstance(target, Weights):
        return _within(spectra, shapes, form, target)
    lost = 1 - target.share if isinstance(target, Energy) else target.relative**2
    made = {}
    for name, values in spectra.items():
        ranks = tuple(_enough(of_one, lost) for of_one in values)
        if form.numbers(shapes[name], ranks) < math.prod(shapes[name]):
            made[name] = ranks
    return made


def _enough(values: Tensor, lost: float) -> int:
    squares = values.square()
    tail = squares.flip(0).cumsum(0).flip(0)  # what is lost with that many values kept
    rounding = 1e-12 * float(tail[0])
    return max(1, int((tail > lost * float(tail[0]) + rounding).sum()))


def _within(
    spectra: Mapping[str, list[Tensor]],
    shapes: Mapping[str, torch.Size],
    form: Form,
    target: Weights,
) -> dict[str, Ranks]:
    """From rank 1 up, always the value that is worth most for the weights that it costs.

    Values are taken as shares of their layer's sum: layers of large weights matter no more.
    """
    gains = {
        name: [(v.square() / v.square().sum().clamp(min=1e-300)).tolist() for v in values]
        for name, values in spectra.items()
    }
    ranks = {name: tuple(1 for _ in values) for name, values in spectra.items()}
    dense = {name: math.prod(shapes[name]) for name in spectra}
    budget = target.share * sum(dense.values())
    spent = {name: min(form.numbers(shapes[name], ranks[name]), dense[name]) for name in spectra}
    if sum(spent.values()) > budget:
        raise ValueError(
            f"{target} is out of reach: with every rank 1, {sum(spent.values()):,} of "
            f"{sum(dense.values()):,} weights are left"
        )
    whole: set[str] = set()  # layers that stay as they are: a product would be no smaller
    while True:
        best: tuple[float, str, Ranks, int] | None = None
        for name in gains.keys() - whole:
            for place, values in enumerate(gains[name]):
                if ranks[name][place] == len(values):
                    continue
                more = tuple(r + (k == place) for k, r in enumerate(ranks[name]))
                cost = min(form.numbers(shapes[name], more), dense[name])
                worth = values[ranks[name][place]] / max(cost - spent[name], 1)
                fits = sum(spent.values()) - spent[name] + cost <= budget
                if fits and (best is None or (worth, name) > best[:2]):
                    best = worth, name, more, cost
        if best is None:
            return {name: rank for name, rank in ranks.items() if spent[name] < dense[name]}
        _, name, ranks[name], spent[name] = best
        if spent[name] == dense[name]:
            whole.add(name)
