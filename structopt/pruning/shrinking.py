"""Channels pressed to zero while training, so that their removal costs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from structopt.channels import ChannelGroup
from structopt.losses.checks import need_values, real, whole, wide
from structopt.pruning.masks import inner
from structopt.pruning.scoring import along


class ShrinkChannels:
    """An `after_step` that trains coupled channels to exactly zero: a growing group lasso.

    The penalty is λ Σ √n ‖w‖₂, w the n entries of all parameters that make or read a channel (Yuan
    and Lin, 2006; over coupled groups as DepGraph, Fang et al., 2023). It acts after the step of
    the optimiser, as a proximal step: each channel is multiplied by

    max(0, 1 - τ √n / ‖w‖₂),  τ(step) = strength · step / end, and 0 after `end`,

    so that a weak channel really arrives at zero, and a strong one loses little. τ is what a step
    takes from the norm per √n, the learning rate included: choose `end` before that has decayed,
    or nothing holds against it. It grows (Wang et al., 2021), so that training settles before
    anything is pressed. After `end` a channel at zero stays there by itself where the activation
    of zero is zero: neither what makes it nor what reads it has a gradient. What lies in two
    groups, a row here and a column there, is multiplied by both factors: exact for each group
    alone, approximate for both. Of weights in 16 bits, which would round a factor near 1 away, the
    rest that they cannot hold is kept in float32 for the next step, in a checkpoint too.

    Then remove what is zero: ``prune_channels``, whose scores are magnitudes by default. The
    function stays as long as no more is asked for than :meth:`zeros` counts.

    `groups` are ``channel_groups(model, example)``, or some of them. Raises ValueError for numbers
    out of range, no groups or those of another model, groups with a weight that a parametrisation
    computes, and (looked at every 100 steps, at the first, and at `end`) a group that is pressed to
    zero as a whole, or holds frozen parameters, whose gradient cannot hold against the pressure.

    >>> from structopt.channels import channel_groups
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> model[0].weight.data = torch.tensor([[3.0, 0.0], [0.1, 0.0]])
    >>> model[1].weight.data = torch.tensor([[4.0, 0.1]])
    >>> groups = channel_groups(model, torch.zeros(1, 2))
    >>> after_step = ShrinkChannels(groups, strength=0.1, end=1)
    >>> after_step(model, 1)
    >>> model[0].weight.data[:, 0]  # 3 · (1 - 0.1 · √3 / 5), and 0.1 · 0
    tensor([2.8961, 0.0000])
    >>> after_step.zeros(model)
    {'0': 1}
    """

    def __init__(self, groups: Iterable[ChannelGroup], *, strength: float, end: int) -> None:
        self.groups = _need_groups(groups)
        if not (whole(end) >= 1 and 0 < real(strength) < math.inf):
            raise ValueError(
                f"end={end!r} counts steps from 1, a whole number; strength={strength!r} is above 0"
            )
        self.strength, self.end = strength, end
        self.rests: dict[str, Tensor] = {}  # what 16 bits could not hold, by the weight's name

    def pressure(self, step: int) -> float:
        """τ after this step."""
        return self.strength * step / self.end if step <= self.end else 0.0

    @torch.no_grad()
    def __call__(self, model: nn.Module, step: int) -> None:
        if not self.pressure(step) > 0:
            return
        scales: list[tuple[str, Tensor]] = []
        weights, exact = dict[str, Tensor](), dict[str, Tensor]()
        for group in self.groups:
            axes = _axes(model, group)
            weights |= {axis.name: axis.weight for axis in axes}
            exact |= {n: self._exact(n, w) for n, w in weights.items() if n not in exact}
            axes = [axis._replace(weight=exact[axis.name]) for axis in axes]
            squares, count = _squares(axes, group.size)
            norm = squares.sqrt()
            rest = norm - self.pressure(step) * count.sqrt()
            factor = rest.clamp(min=0) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            if step in (1, self.end) or step % 100 == 0:
                _need_some(group, factor, [weights[axis.name] for axis in axes])
            whole = torch.cat([factor, factor.new_ones(1)])  # the last is for entries outside
            for name, weight, dim, channel in axes:
                shape = [-1 if d == dim else 1 for d in range(weight.ndim)]
                scales.append((name, whole[channel].view(shape)))
        for name, factor in scales:  # after all norms were taken, so that no order matters
            exact[name].mul_(factor)
        for name, weight in weights.items():
            if exact[name] is not weight:
                weight.copy_(exact[name])
                self.rests[name] = exact[name].sub_(weight)

    def _exact(self, name: str, weight: Tensor) -> Tensor:
        """The weight itself, or one in 16 bits with what it could not hold, in float32."""
        if wide(weight) is weight:
            return weight
        whole, rest = weight.detach().float(), self.rests.get(name)
        if rest is None or rest.shape != whole.shape:
            return whole
        return whole + rest.to(whole.device).masked_fill(
            whole == 0, 0
        )  # zero, by a mask say, stays

    def state_dict(self) -> dict[str, Any]:
        """What weights in 16 bits could not hold."""
        return {"rests": dict(self.rests)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`."""
        self.rests = {name: rest.clone() for name, rest in state["rests"].items()}

    def zeros(self, model: nn.Module) -> dict[str, int]:
        """How many channels of each group are exactly zero."""
        found = {}
        for group in self.groups:
            axes = [a._replace(weight=(a.weight != 0).float()) for a in _axes(model, group)]
            found[group.name] = int((_squares(axes, group.size)[0] == 0).sum())
        return found

    def __repr__(self) -> str:
        return f"ShrinkChannels({len(self.groups)} groups, τ to {self.strength:g} at {self.end})"


class Axis(NamedTuple):
    """One dimension of a parameter, and the channel of each entry."""

    name: str
    weight: Tensor
    dim: int
    channel: Tensor


def _axes(model: nn.Module, group: ChannelGroup) -> list[Axis]:
    model = inner(model, [member.parameter for member in group.members])
    parameters, found = dict(model.named_parameters()), list[Axis]()
    for member in group.members:
        weight = parameters.get(member.parameter)
        if weight is None:  # a running statistic, or of another model
            if member.parameter not in dict(model.named_buffers()):
                raise ValueError(f"group {group.name!r} is of another model: no {member.parameter}")
            continue
        if member.dim >= weight.ndim or weight.shape[member.dim] != len(member.channel):
            raise ValueError(
                f"group {group.name!r} is of another model: dimension {member.dim} of "
                f"{member.parameter}, {tuple(weight.shape)}, held {len(member.channel)} there"
            )
        need_values("what is pressed to zero", [weight])
        channel = torch.from_numpy(member.channel).to(weight.device)
        found.append(Axis(member.parameter, weight, member.dim, channel))
    return found


def _squares(axes: list[Axis], size: int) -> tuple[Tensor, Tensor]:
    """Of each channel the sum of the squares of its entries, and how many there are."""
    squares = torch.stack([along(wide(w).square(), dim, c, size) for _, w, dim, c in axes]).sum(0)
    each = [(squares.new_full((len(c),), w.numel() // len(c)), c) for _, w, _, c in axes]
    return squares, torch.stack([along(count, 0, c, size) for count, c in each]).sum(0)


def _need_groups(groups: object) -> tuple[ChannelGroup, ...]:
    found = tuple(groups) if isinstance(groups, Iterable) else ()
    if not all(isinstance(group, ChannelGroup) for group in found):
        found = ()
    if not found or any(group.frozen for group in found):
        raise ValueError("give groups whose channels may go: channel_groups(model, example)")
    for group in found:
        names = [member.parameter for member in group.members]
        if made := [name for name in names if "parametrizations" in name.split(".")]:
            raise ValueError(
                f"group {group.name!r} holds {made[0]}, of which another weight is computed: "
                "parametrize.remove_parametrizations first, or leave the group out"
            )
    return found


def _need_some(group: ChannelGroup, factor: Tensor, weights: list[Tensor]) -> None:
    if not all(weight.requires_grad for weight in weights):
        raise ValueError(
            f"group {group.name!r} holds frozen parameters, with no gradient to hold against the "
            "pressure: leave the group out, or train them"
        )
    if not (factor > 0).any():
        raise ValueError(
            f"every channel of group {group.name!r} is pressed to zero, so that nothing passes any "
            "more: take less strength, or leave the group out"
        )
