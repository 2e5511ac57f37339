"""Which channels stay: a pure function of scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from structopt.channels import ChannelGroup
from structopt.pruning.ranking import (
    PerLayer,
    PerRow,
    Scope,
    need_scope,
    need_sparsity,
    normalised,
    number,
)
from structopt.pruning.scoring import matches, need_numbers

Choice = dict[ChannelGroup, Tensor]
"""For each group the channels that stay, in their order: what `channels.take` takes."""


@dataclass(frozen=True)
class Limits:
    """How far removal may go.

    Args:
        multiple_of: widths are rounded up to a multiple, where the group is that wide: 8, 16 or
            32 are fast on most devices.
        floor: what every group keeps at least: channels, or below 1 a share of the group.
        leave: names of groups to leave alone; ``"layer1.*"`` stands for many.
        ratios: {name: sparsity}: groups whose sparsity is set, whatever the rest does. Names may
            stand for many here too; the first that fits counts.

    Raises ValueError for numbers out of range.

    >>> Limits(multiple_of=8, leave=("conv1",))
    Limits(multiple_of=8, floor=1, leave=('conv1',), ratios={})
    """

    multiple_of: int = 1
    floor: float = 1
    leave: tuple[str, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: object = self.leave
        if isinstance(given, str):  # would be taken for one pattern a letter
            raise ValueError(f"leave is a tuple of names: leave=({given!r},)")
        if not isinstance(given, Iterable):
            raise ValueError(f"leave is a tuple of names, not {given!r}")
        whole = isinstance(self.multiple_of, int) and self.multiple_of >= 1
        floor: object = self.floor
        real = isinstance(floor, Real) and 0 < float(floor) < math.inf
        if not whole or not real:
            raise ValueError(f"{self}: multiple_of is a whole number from 1 on, floor above 0")
        if not isinstance(self.ratios, Mapping):
            raise ValueError(f"ratios is a dict of sparsities by group, not {self.ratios!r}")
        for name, ratio in self.ratios.items():
            need_sparsity(ratio, f"the ratio of {name!r}")

    def least(self, size: int) -> int:
        """The fewest channels that a group of this size keeps."""
        wanted = math.ceil(self.floor * size) if self.floor < 1 else math.ceil(self.floor)
        return self.rounded(max(1, wanted), size)

    def rounded(self, kept: int, size: int) -> int:
        return min(size, -(-kept // self.multiple_of) * self.multiple_of)

    def ratio(self, name: str) -> float | None:
        """The sparsity that is set for this group, if any."""
        if matches(name, self.leave):
            return 0.0
        return next((s for pattern, s in self.ratios.items() if matches(name, [pattern])), None)


def choose_channels(
    scores: Mapping[ChannelGroup, Tensor],
    sparsity: float,
    *,
    scope: Scope = PerLayer(),  # noqa: B008 (a frozen value)
    limits: Limits = Limits(),
) -> Choice:
    """The channels that stay: {group: numbers, ascending}, for :func:`structopt.channels.take`.

    ``PerLayer()``: each group loses round(sparsity · size) of its lowest, halves to even.
    ``Global()``: round(sparsity · n) of the n channels of all groups go, those of the lowest scores
    (with ``normalise`` each divided by its group's mean). Then widths are rounded up as `limits`
    say, so that fewer may go. Groups that lose nothing are left out.

    Raises ValueError for a sparsity outside [0, 1), NaN scores, a name in `limits` that no group
    has, and a scope that channels do not have.

    >>> from structopt.channels import channel_groups
    >>> from structopt.pruning import channel_scores, score
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Linear(8, 1))
    >>> scores = channel_scores(channel_groups(model, torch.zeros(1, 2)), score(model))
    >>> {g.name: len(i) for g, i in choose_channels(scores, 0.6).items()}
    {'0': 3}
    """
    need_sparsity(sparsity)
    need_scope(scope)
    need_limits(limits)
    _need_names(scores, limits)
    for group, one in scores.items():
        need_numbers(f"group {group.name!r}", one)
    fixed = {group: limits.ratio(group.name) for group in scores}
    free = {group: one for group, one in scores.items() if fixed[group] is None}
    widths = _widths(free, sparsity, scope, limits)
    for group, ratio in fixed.items():
        if ratio is not None:
            widths[group] = group.size - number(ratio, group.size)
    choice: Choice = {}
    for group, one in scores.items():
        ratio, size = fixed[group], group.size
        kept = max(limits.least(size), limits.rounded(widths[group], size))
        if kept < size and ratio != 0:
            best = one.argsort(stable=True)[size - kept :]  # of equal scores the first go
            choice[group] = best.sort().values
    return choice


def _widths(
    scores: Mapping[ChannelGroup, Tensor], sparsity: float, scope: Scope, limits: Limits
) -> dict[ChannelGroup, int]:
    """How many channels of each group stay, before rounding."""
    if isinstance(scope, PerRow):
        raise ValueError("channels have no rows: rank them PerLayer() or Global()")
    if isinstance(scope, PerLayer) or not scores:
        return {group: group.size - number(sparsity, group.size) for group in scores}
    ranked = []
    for group, one in scores.items():
        one = normalised(f"group {group.name!r}", one) if scope.normalise else one
        least = max(limits.least(group.size), math.ceil(scope.floor * group.size))
        one = one.sort(stable=True).values
        one[group.size - least :] = torch.inf  # the best of each group are not for sale
        ranked.append(one.cpu())
    owner = torch.cat([torch.full((len(one),), i) for i, one in enumerate(ranked)])
    count = number(sparsity, len(owner))
    values, order = torch.cat(ranked).sort(stable=True)
    goes = order[:count][values[:count] < torch.inf]
    lost = torch.bincount(owner[goes], minlength=len(ranked)).tolist()
    return {group: group.size - n for group, n in zip(scores, lost, strict=True)}


def need_limits(limits: object) -> None:
    if not isinstance(limits, Limits):
        raise ValueError(f"limits is a value such as Limits(multiple_of=8), not {limits!r}")


def _need_names(scores: Mapping[ChannelGroup, Tensor], limits: Limits) -> None:
    names = [group.name for group in scores]
    for pattern in (*limits.leave, *limits.ratios):
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"no group is called {pattern!r}; there are {', '.join(names)}")
