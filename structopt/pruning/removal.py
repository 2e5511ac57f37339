"""Remove channels, as many as a budget asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from structopt.channels import ChannelGroup, Channels, channel_groups, take
from structopt.losses.checks import need_values
from structopt.pruning.budgets import Budget
from structopt.pruning.choosing import Choice, Limits, choose_channels, need_limits
from structopt.pruning.computed import Computed, computed_weights
from structopt.pruning.criteria import magnitude
from structopt.pruning.ranking import PerLayer, Scope
from structopt.pruning.scoring import Scores, channel_scores, need_numbers, weights
from structopt.training.copying import copied

_STEPS = 12  # halvings of the interval of sparsities: to 1 in 4096


def prune_channels(
    model: nn.Module,
    example: Any,
    target: float | Budget,
    *,
    scores: Scores | None = None,
    scope: Scope = PerLayer(),  # noqa: B008 (a frozen value)
    limits: Limits = Limits(),  # noqa: B008
) -> nn.Module:
    """A smaller copy of the model, without the channels of the lowest scores.

    `target` is the fraction of channels removed (which removes about 1 - (1 - s)² of weights and
    MACs), or a budget such as ``MACs(share=0.5)`` or ``Milliseconds(3.0)``: the largest network
    within it is sought by bisection of the sparsity, each candidate built and its true cost taken.
    `scores` come from :func:`score` (by default magnitudes, also of matrices that no layer of torch
    owns, and of weights that weight norm and its like compute), and are summed over all weights
    that make or read a channel (:func:`channel_scores`). The model given is not touched; the copy
    computes exactly what the model computes with those channels masked.

    Raises ValueError for a sparsity outside [0, 1), a budget that cannot be met (the nearest that
    can is named), a group without a score, a name in `limits` that no group has, and whatever
    :func:`structopt.channels.take` refuses.

    >>> from structopt.networks import LeNet5
    >>> from structopt.pruning import Parameters
    >>> small = prune_channels(LeNet5(), torch.zeros(1, 1, 28, 28), Parameters(share=0.25))
    >>> small.conv2
    Conv2d(10, 25, kernel_size=(5, 5), stride=(1, 1))
    """
    need_limits(limits)
    channels = channel_groups(model, example)
    ranked = channel_scores(channels, _magnitudes(model, channels) if scores is None else scores)
    _need_scores(channels, ranked, limits)

    def choose(sparsity: float) -> Choice:
        return choose_channels(ranked, sparsity, scope=scope, limits=limits)

    if not isinstance(target, Budget):
        choice = choose(target)
    else:
        choice = _largest_within(target, model, example, choose, channels)
    return take(model, choice) if choice else copied(model)


def _magnitudes(model: nn.Module, channels: Channels) -> Scores:
    """Those of weights, computed ones too; where a group has none, of its other matrices."""
    every, computed = dict(model.named_parameters()), computed_weights(model)
    parts = {part for weight in computed for part in weight.parts}
    found = {n: magnitude(p.detach()) for n, p in weights(model, False) if n not in parts}
    found |= {w.original: magnitude(w.value()) for w in computed if _alike(w, every)}
    need_values("a score", found.values())
    for name, one in found.items():
        need_numbers(name, one)
    for group in channels:
        names = {member.parameter for member in group.members}
        if not names & found.keys():
            found |= {n: magnitude(every[n]) for n in names & every.keys() if every[n].ndim > 1}
    return found


def _alike(weight: Computed, parameters: dict[str, nn.Parameter]) -> bool:
    """Whether the channels of a computed weight are those of the parameter it is made of."""
    made_of = parameters.get(weight.original)
    return made_of is not None and weight.value().shape == made_of.shape


def _need_scores(channels: Channels, ranked: dict[ChannelGroup, Tensor], limits: Limits) -> None:
    if not len(channels):
        reasons = "; ".join(f"{g.name}: {g.frozen}" for g in channels.frozen[:3])
        raise ValueError(f"no channel of this model can be removed ({reasons})")
    bare = [g.name for g in channels if g not in ranked and limits.ratio(g.name) != 0]
    if bare:
        raise ValueError(
            f"no weight of group {', '.join(bare)} has a score: leave it alone, "
            f"limits=Limits(leave=({bare[0]!r},)), or take a criterion that sees it"
        )
    for group in channels:  # so that `leave` may name a group without a score
        if group not in ranked:
            ranked[group] = torch.zeros(group.size)


def _largest_within(
    budget: Budget,
    model: nn.Module,
    example: Any,
    choose: Callable[[float], Choice],
    channels: Channels,
) -> Choice:
    """The choice of the lowest sparsity that meets the budget."""
    limit = budget.limit(model, example)
    cost_of = _coster(budget, model, example, channels)
    low, high = 0.0, 1 - 1e-9
    best = choose(high)
    least = cost_of(best)
    if least > limit:
        raise ValueError(
            f"{budget} cannot be met: with as few channels as `limits` allow the model still needs "
            f"{least:,.4g} {budget.unit}, more than {limit:,.4g}: allow that, or remove_blocks"
        )
    if cost_of(most := choose(low)) <= limit:
        return most
    for _ in range(_STEPS):
        middle = (low + high) / 2
        choice = choose(middle)
        if cost_of(choice) <= limit:
            best, high = choice, middle
        else:
            low = middle
    return best


def _coster(
    budget: Budget, model: nn.Module, example: Any, channels: Channels
) -> Callable[[Choice], float]:
    """What a choice costs; each set of widths is measured once.

    Where shapes decide, a model without values stands in: its copies cost nothing. One whose own
    control flow reads values cannot, and is built for real.
    """
    stand_in = (model, example, {group.name: group for group in channels})
    if budget.on_paper:
        try:
            bare = copied(model).to("meta")
            away = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, example)
            groups = {group.name: group for group in channel_groups(bare, away)}
            same = {n: g.size for n, g in groups.items()} == {g.name: g.size for g in channels}
            if same and budget.cost(bare, away) == budget.cost(model, example):
                stand_in = (bare, away, groups)
        except (RuntimeError, ValueError):
            pass
    known: dict[tuple[tuple[str, int], ...], float] = {}

    def cost_of(choice: Choice) -> float:
        widths = tuple((group.name, len(index)) for group, index in choice.items())
        if widths not in known:
            whole, inputs, groups = stand_in
            narrow = {groups[group.name]: index for group, index in choice.items()}
            known[widths] = budget.cost(take(whole, narrow) if narrow else whole, inputs)
        return known[widths]

    return cost_of
