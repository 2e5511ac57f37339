"""The two verbs: find the groups of a model, and take some of their channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structopt.channels import verify
from structopt.channels.edit import Refused, build
from structopt.channels.groups import Axes, ChannelGroup, Channels
from structopt.channels.labels import Vector
from structopt.channels.mirrors import Book
from structopt.channels.probe import Probe, settle
from structopt.channels.tracing import (
    label_parameters,
    map_tensors,
    substitute,
    to_shadow,
    trace,
)

TOLERANCE = 1e-10


def channel_groups(model: nn.Module, example: Any) -> Channels:
    """Find which channels of a model belong together, in one run."""
    try:  # no values are needed, unless the model's own control flow asks for some
        bare, inputs = substitute(model, to_shadow).eval(), map_tensors(example, to_shadow)
        book, axes, shapes = _traced(bare, inputs)
    except Exception:
        bare, inputs = model, example
        book, axes, shapes = _traced(bare, inputs)
    channels = Channels(model, example, book, axes)
    settle(Probe(channels, bare, inputs, shapes))
    return channels


def _traced(model: nn.Module, example: Any) -> tuple[Book, Axes, list[torch.Size]]:
    book, labelled = Book(), substitute(model, lambda t: t.clone())
    axes = label_parameters(book, labelled)
    return book, axes, trace(book, labelled, example)


def take(
    model: nn.Module,
    groups: Mapping[ChannelGroup, Sequence[int] | Tensor],
    *,
    preserve: bool = False,
) -> nn.Module:
    """A copy of the model with these channels of these groups, and no others, in this order."""
    channels = next(iter(groups)).channels
    choice = {
        channels.number[id(group)]: _checked(group, index, preserve)
        for group, index in groups.items()
    }
    wide = substitute(model, lambda t: t.double() if t.is_floating_point() else t.clone())
    expected = verify.reference(channels, wide, choice)
    problems: list[str] = []
    for fold, attributes in ((True, True), (False, True), (True, False), (False, False)):
        how = {"preserve": preserve, "attributes": attributes, "fold": fold}
        made = build(channels, wide, choice, **how)
        try:
            error = verify.difference(expected, verify.outputs(made, channels.example))
        except Exception as problem:
            problems.append(f"{type(problem).__name__}: {problem}")
            continue
        if error <= TOLERANCE:
            return build(channels, model, choice, **how)
        problems.append(f"error {error:.1e}")
    raise Refused(str(problems))


def _checked(group: ChannelGroup, index: Sequence[int] | Tensor, preserve: bool) -> Vector:
    """The index as an array of integers, after every complaint that can be made of it."""
    if group.frozen:
        raise Refused(f"group {group.name!r} is frozen: {group.frozen}")
    given = torch.as_tensor(index).detach().cpu()
    if given.dtype == torch.bool and given.shape == (group.size,):
        given = given.nonzero().flatten()
    if given.ndim != 1 or given.dtype.is_floating_point or given.dtype.is_complex:
        raise ValueError(
            f"group {group.name!r}: give whole numbers from 0 to {group.size - 1} in one row, "
            f"not {given.dtype} of shape {tuple(given.shape)}"
        )
    chosen: Vector = given.numpy().astype(np.int64)
    if not len(chosen):
        raise ValueError(f"group {group.name!r}: at least one channel has to stay")
    if chosen.min() < 0 or chosen.max() >= group.size:
        raise ValueError(
            f"group {group.name!r} has {group.size} channels: there is no channel "
            f"{int(chosen[(chosen < 0) | (chosen >= group.size)][0])}"
        )
    if not preserve and len(np.unique(chosen)) < len(chosen):
        raise ValueError(f"group {group.name!r}: a channel is repeated; widen with preserve=True")
    return chosen


__all__ = ["channel_groups", "take"]
