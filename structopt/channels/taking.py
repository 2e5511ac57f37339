"""The one verb: a copy of the model with other channels, handed over only when it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structopt.channels import verify
from structopt.channels.edit import build
from structopt.channels.groups import ChannelGroup, Channels
from structopt.channels.labels import Vector
from structopt.channels.rows import Edit, Refused
from structopt.channels.shadow import Shadow, plain_kernels
from structopt.channels.tracing import call, substitute, tensors_of

Numbers = Sequence[int] | Sequence[float] | Tensor | range


def take(
    model: nn.Module,
    groups: Mapping[ChannelGroup, Numbers],
    *,
    preserve: bool = False,
    scale: Mapping[ChannelGroup, Numbers] | None = None,
) -> nn.Module:
    """A copy of the model with these channels of these groups, and no others, in this order.

    A subset prunes, a permutation reorders, repeated channels widen: with ``preserve`` the weights
    that read a doubled channel are divided, so that the function stays (Net2Net, Chen et al.,
    2016). ``scale`` multiplies each channel taken by a positive number and divides its readers:
    the same function where the activation is positively homogeneous.

    The copy is run in double precision on the example of the analysis, in evaluation mode. A
    subset has to equal the full model with the other channels masked; norms that average over
    channels average over those that stay. Anything else has to equal the full model. Parameters,
    buffers and the sizes that modules remember are edited; hooks, devices, dtypes, tied weights
    and `requires_grad` stay. On the ``meta`` device only shapes are checked.

    Raises ValueError where that does not hold, or for an index out of range, empty, repeated
    without ``preserve``, or of a group that is frozen or of another model. The model given is
    never touched.

    >>> from structopt.channels import channel_groups
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> channels = channel_groups(model, torch.zeros(1, 4))
    >>> take(model, {channels["0"]: [0, 2, 5]})
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    channels = _one_analysis(model, [*groups, *(scale or {})])
    choice = {
        channels.number[id(group)]: _checked(group, index, preserve)
        for group, index in groups.items()
    }
    for group in scale or {}:
        if group not in groups:
            raise ValueError(f"scale names group {group.name!r}, whose channels are not taken")
    factors = {
        channels.number[id(group)]: _positive(group, values, choice[channels.number[id(group)]])
        for group, values in (scale or {}).items()
    }
    first = Edit(choice, preserve=preserve, scale=factors)
    edit, problem = _exact(channels, model, first)
    if edit is None:
        raise Refused(_complaint(channels, model, first, problem))
    return build(channels, model, edit)


def _exact(channels: Channels, model: nn.Module, first: Edit) -> tuple[Edit | None, str]:
    """The way to make this edit that holds, or what goes wrong."""
    if any(p.is_meta for p in model.parameters()):
        return _fitting(channels, model, first)
    wide = substitute(model, verify.wide)
    expected = verify.reference(channels, wide, first.choice)
    problem = ""
    for edit in first.variants(channels):
        try:
            found = verify.outputs(build(channels, wide, edit), channels.example)
        except Exception as failure:
            problem = problem or f"the forward pass fails with {type(failure).__name__}: {failure}"
            continue
        error = verify.difference(expected, found)
        if error <= verify.tolerance(expected):
            return edit, ""
        problem = problem or f"the outputs differ by {error:.1e} of their size"
    if verify.changes(channels, wide):
        problem = (
            "the output of the model changes from run to run, so that nothing can be compared "
            "(dropout that is on in evaluation mode?)"
        )
    return None, problem


def _fitting(channels: Channels, model: nn.Module, first: Edit) -> tuple[Edit | None, str]:
    """As `_exact` for a model without values: the shapes have to fit."""
    with plain_kernels(), Shadow():  # type: ignore[no-untyped-call]
        expected = verify.shapes(call(substitute(model, torch.clone).eval(), channels.example))
    problem = ""
    for edit in first.variants(channels):
        try:
            with plain_kernels(), Shadow():  # type: ignore[no-untyped-call]
                made = call(build(channels, model, edit).eval(), channels.example)
        except Exception as failure:
            problem = problem or f"the forward pass fails with {type(failure).__name__}: {failure}"
            continue
        if [t.shape for t in tensors_of(made)] == expected:
            return edit, ""
        problem = problem or "the shape of the output changes"
    return None, problem


def _complaint(channels: Channels, model: nn.Module, edit: Edit, problem: str) -> str:
    """Name the group that stands in the way, by trying each alone."""
    for number in edit.choice if len(edit.choice) > 1 else ():
        alone, why = _exact(channels, model, edit.only(number))
        if alone is None:
            edit, problem = edit.only(number), why
            break
    guilty = [channels.every[number] for number in edit.choice]
    layers = ", ".join(str(member) for member in guilty[0].members[:3])
    what = f"group {guilty[0].name!r} ({layers})" if len(guilty) == 1 else "these groups together"
    return (
        f"{what} cannot be edited exactly: {problem}. The model is as it was; "
        "leave the group out, or look at explain(model, example)"
    )


def _one_analysis(model: nn.Module, groups: Sequence[ChannelGroup]) -> Channels:
    """The analysis that all groups come from, which has to be one of this model."""
    if not groups:
        raise ValueError("no group given: take(model, {group: index}) takes channels of groups")
    channels = groups[0].channels
    for group in groups:
        if group.channels is not channels:
            raise ValueError(f"group {group.name!r} comes from another analysis than the first")
    shapes = {n: t.shape for n, t in [*model.named_parameters(), *model.named_buffers()]}
    for (name, dim), labels in channels.axes.items():
        if name not in shapes or dim >= len(shapes[name]) or shapes[name][dim] != len(labels):
            raise ValueError(
                f"group {groups[0].name!r} is of another model: here {name} "
                f"{'has shape ' + str(tuple(shapes[name])) if name in shapes else 'is missing'}; "
                "analyse this model with channel_groups first"
            )
    return channels


def _checked(group: ChannelGroup, index: Any, preserve: bool) -> Vector:
    """The index as an array of integers, after every complaint that can be made of it."""
    if group.frozen:
        raise Refused(f"group {group.name!r} is frozen: {group.frozen}")
    given = torch.as_tensor(list(index) if isinstance(index, range) else index).detach().cpu()
    if given.dtype == torch.bool and given.shape == (group.size,):
        given = given.nonzero().flatten()
    if given.numel() == 0:
        raise ValueError(f"group {group.name!r}: at least one channel has to stay")
    if given.ndim != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            f"group {group.name!r}: give whole numbers from 0 to {group.size - 1} in one row, "
            f"not {given.dtype} of shape {tuple(given.shape)}"
        )
    chosen: Vector = given.numpy().astype(np.int64)
    wrong = chosen[(chosen < 0) | (chosen >= group.size)]
    if len(wrong):
        raise ValueError(
            f"group {group.name!r} has {group.size} channels, numbered from 0: "
            f"there is no channel {int(wrong[0])}"
        )
    if not preserve and len(np.unique(chosen)) < len(chosen):
        raise ValueError(f"group {group.name!r}: a channel is repeated; widen with preserve=True")
    return chosen


def _positive(group: ChannelGroup, values: Any, index: Vector) -> Any:
    factors = np.asarray(torch.as_tensor(values).detach().cpu(), dtype=np.float64)
    if factors.shape != index.shape or not (np.isfinite(factors) & (factors > 0)).all():
        raise ValueError(
            f"group {group.name!r}: scale takes {len(index)} positive numbers, one for each "
            f"channel taken, not shape {factors.shape}"
        )
    return factors
