"""How much each coupled group can lose: one curve a group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from structopt.channels import ChannelGroup, channel_groups, take
from structopt.pruning.choosing import Choice, choose_channels
from structopt.pruning.ranking import need_sparsity
from structopt.pruning.scoring import Scores, channel_scores, score
from structopt.training.copying import copied

Curves = dict[str, dict[float, float]]
"""{name of a group: {sparsity: value}}."""


def sensitivity(
    model: nn.Module,
    example: Any,
    evaluate: Callable[[nn.Module], float],
    *,
    scores: Scores | None = None,
    sparsities: Iterable[float] = (0.0, 0.25, 0.5, 0.75),
) -> Curves:
    """What `evaluate(model)` gives when one group alone is pruned: {group: {sparsity: value}}.

    Every other group is whole, nothing is trained in between (Li et al., 2017). A group whose curve
    falls early should lose less: ``Limits(ratios={...})``. Groups without a score are left out.

    Raises ValueError for a sparsity outside [0, 1).

    >>> from structopt.networks import LeNet300
    >>> curves = sensitivity(
    ...     LeNet300(), torch.zeros(1, 1, 28, 28), lambda m: float(m.fc2.weight.count_nonzero()),
    ...     sparsities=[0.0, 0.5],
    ... )
    >>> curves["fc1"]  # 100 × 300 weights read the 300 channels that fc1 makes
    {0.0: 30000.0, 0.5: 15000.0}
    """
    given: object = sparsities
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"sparsities are a list of fractions removed, not {given!r}")
    sparsities = list(sparsities)
    for sparsity in sparsities:
        need_sparsity(sparsity)
    ranked = channel_scores(
        channel_groups(model, example), score(model) if scores is None else scores
    )
    whole = functools.cache(lambda: float(evaluate(model)))  # the same for every group
    curves: Curves = {}
    for group, one in ranked.items():
        curves[group.name] = {}
        for sparsity in sparsities:
            choice = choose_channels({group: one}, sparsity)
            value = float(evaluate(mask_channels(model, choice))) if choice else whole()
            curves[group.name][sparsity] = value
    return curves


def mask_channels(model: nn.Module, choice: Choice) -> nn.Module:
    """A copy of the model, as large, in which the channels not chosen are zero.

    In evaluation mode it computes what ``take(model, choice)`` computes: every weight, bias, scale
    and statistic of those channels is set to zero, as is every weight that reads them. Where a norm
    averages over the channels, zeros would count, and the channels are removed instead.

    >>> from structopt.channels import channel_groups
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> groups = channel_groups(model, torch.zeros(1, 2))
    >>> mask_channels(model, {groups["0"]: torch.tensor([1])})[1].weight.count_nonzero()
    tensor(1)
    """
    odd = [group for group in choice if not isinstance(group, ChannelGroup)]
    if odd:
        raise ValueError(
            f"a choice holds groups, not {odd[0]!r}: channel_groups(model, example)[name] is one"
        )
    if any(group.averaged for group in choice):
        return take(model, choice) if choice else copied(model)
    made = copied(model)
    tensors = dict([*made.named_parameters(), *made.named_buffers()])
    with torch.no_grad():
        for group, kept in choice.items():
            stays = torch.zeros(group.size, dtype=torch.bool)
            stays[torch.as_tensor(kept).cpu()] = True
            for member in group.members:
                channel = torch.from_numpy(member.channel)
                lost = ((channel >= 0) & ~stays[channel.clamp(min=0)]).nonzero()[:, 0]
                tensor = tensors[member.parameter]
                tensor.index_fill_(member.dim, lost.to(tensor.device), 0)
    return made
