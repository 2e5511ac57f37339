"""The order of channels: what a narrow slice keeps should be what matters most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structopt.channels import ChannelGroup, channel_groups, take
from structopt.losses.checks import need_values
from structopt.training.copying import copied


def sort_channels(
    model: nn.Module, example: Any, importance: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A copy with the same function, whose most important channels come first in every group.

    A channel's importance is Σ ‖its weights‖₁ / ‖all weights‖₁ over the weight matrices and filters
    that make or read it, as once-for-all sorts them (Cai et al., 2020). `importance` gives other
    numbers, ``{name of a group: one number a channel}``; a group that it does not name keeps its
    order. The permutation is made and verified by :func:`structopt.channels.take`.

    Raises ValueError for a name that no group has, or numbers that do not fit it.

    >>> model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    >>> model[0].weight.data[:, 0] = torch.tensor([1.0, 3.0, 2.0])
    >>> model[2].weight.data[:] = 1.0
    >>> sort_channels(model, torch.zeros(1, 1))[0].weight.flatten().tolist()
    [3.0, 2.0, 1.0]
    """
    channels = channel_groups(model, example)
    names = {group.name: group for group in channels}
    for name, values in (importance or {}).items():
        if name not in names or values.shape != (names[name].size,):
            sizes = {group.name: group.size for group in channels}
            raise ValueError(
                f"importance of {name!r} has shape {tuple(values.shape)}; one number a channel is "
                f"wanted, for any of {sizes}"
            )
    if importance is None:
        need_values("importance", model.parameters())
        weights = {n: p.detach() for n, p in model.named_parameters() if p.ndim > 1}
        importance = {group.name: _norms(group, weights) for group in channels}
    orders = {
        names[name]: values.argsort(descending=True, stable=True)
        for name, values in importance.items()
    }
    return take(model, orders) if orders else copied(model)


def _norms(group: ChannelGroup, weights: Mapping[str, Tensor]) -> Tensor:
    """For each channel its share of the L1 norm of each weight, summed."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        weight = weights.get(member.parameter)
        if weight is None:
            continue
        rest = [d for d in range(weight.ndim) if d != member.dim]
        each = weight.abs().sum(rest).double().cpu()
        channel = torch.from_numpy(member.channel)
        mine = channel >= 0
        total.index_add_(0, channel[mine], each[mine] / each.sum().clamp(min=1e-30))
    return total
