"""What a caller asked of `take`, after every complaint that can be made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structopt.channels.groups import Channels
from structopt.channels.labels import Vector
from structopt.channels.members import ChannelGroup
from structopt.channels.rows import Edit, Reals, Refused
from structopt.channels.walking import modules_of, tensors_in


def asked(model: nn.Module, groups: Any, preserve: bool, scale: Any) -> tuple[Channels, Edit]:
    """The analysis that the groups come from, and the edit."""
    scale = {} if scale is None else scale
    for given in (groups, scale):
        _are_groups(given)
    channels = _one_analysis(model, [*groups, *scale])
    choice = {
        channels.number[id(group)]: _index(group, index, preserve)
        for group, index in groups.items()
    }
    for group in scale:
        if group not in groups:
            raise ValueError(f"scale names group {group.name!r}, whose channels are not taken")
    factors = {
        channels.number[id(group)]: _positive(group, values, choice[channels.number[id(group)]])
        for group, values in scale.items()
    }
    return channels, Edit(choice, preserve=preserve, scale=factors)


def _are_groups(given: Any) -> None:
    how = "give {group: index}, with groups of channels = channel_groups(model, example)"
    if not isinstance(given, Mapping):
        raise ValueError(f"{how}, not {type(given).__name__}")
    for group in given:
        if not isinstance(group, ChannelGroup):
            raise ValueError(f"{group!r} is no group: {how}, such as channels[{str(group)!r}]")


def _one_analysis(model: nn.Module, groups: list[ChannelGroup]) -> Channels:
    """The analysis that all groups come from, which has to be one of this model."""
    if not groups:
        raise ValueError("no group given: take(model, {group: index}) takes channels of groups")
    channels = groups[0].channels
    for group in groups:
        if group.channels is not channels:
            raise ValueError(f"group {group.name!r} comes from another analysis than the first")
    shapes = {name: tensor.shape for name, tensor in tensors_in(modules_of(model))}
    for (name, dim), labels in channels.axes.items():
        if name not in shapes or dim >= len(shapes[name]) or shapes[name][dim] != len(labels):
            raise ValueError(
                f"group {groups[0].name!r} is of another model: here {name} "
                f"{'has shape ' + str(tuple(shapes[name])) if name in shapes else 'is missing'}; "
                "analyse this model with channel_groups first"
            )
    return channels


def _index(group: ChannelGroup, index: Any, preserve: bool) -> Vector:
    """The index as an array of integers."""
    if group.frozen:
        raise Refused(f"group {group.name!r} is frozen: {group.frozen}")
    wanted = f"group {group.name!r}: give whole numbers from 0 to {group.size - 1} in one row"
    given = _tensor(index, wanted)
    if given.dtype == torch.bool and given.shape == (group.size,):
        given = given.nonzero().flatten()
    if given.numel() == 0:
        raise ValueError(f"group {group.name!r}: at least one channel has to stay")
    if given.ndim != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"{wanted}, not {given.dtype} of shape {tuple(given.shape)}")
    chosen: Vector = given.numpy().astype(np.int64)
    wrong = chosen[(chosen < 0) | (chosen >= group.size)]
    if len(wrong):
        raise ValueError(
            f"group {group.name!r} has {group.size} channels, numbered from 0: "
            f"there is no channel {int(wrong[0])}"
        )
    if not preserve and np.bincount(chosen).max() > 1:
        raise ValueError(f"group {group.name!r}: a channel is repeated; widen with preserve=True")
    return chosen


def _tensor(given: Any, wanted: str) -> Tensor:
    try:
        if isinstance(given, range):
            return torch.from_numpy(np.arange(given.start, given.stop, given.step))
        made = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as problem:
        raise ValueError(f"{wanted}, not {repr(given)[:60]}") from problem
    if made.is_meta:
        raise ValueError(f"{wanted}, not a tensor on the meta device, which has no values")
    return made.cpu()


def _positive(group: ChannelGroup, values: Any, index: Vector) -> Reals:
    wanted = (
        f"group {group.name!r}: scale takes {len(index)} positive numbers, one for each "
        "channel taken"
    )
    factors = _tensor(values, wanted).double().numpy()
    if factors.shape != index.shape:
        raise ValueError(f"{wanted}, not shape {factors.shape}")
    wrong = factors[~(np.isfinite(factors) & (factors > 0))]
    if len(wrong):
        raise ValueError(f"{wanted}, not {wrong[0]:g}")
    _, first, back = np.unique(index, return_index=True, return_inverse=True)
    apart = index[factors != factors[first][back]]
    if len(apart):
        raise ValueError(
            f"group {group.name!r}: scale gives copies of channel {apart[0]} different numbers: "
            "give them the same"
        )
    return factors
