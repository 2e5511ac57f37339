"""Try the groups on a copy without values, and learn what the model's own Python insists on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from structopt.channels.edit import Choice, Refused, build
from structopt.channels.groups import ChannelGroup, Channels
from structopt.channels.labels import Vector
from structopt.channels.tracing import call, plain_kernels, tensors_of

Shapes = list[torch.Size]


class Probe:
    """Runs edited copies of a model whose weights have shapes but no values."""

    def __init__(self, channels: Channels, bare: nn.Module, example: Any, expected: Shapes) -> None:
        self.channels, self.bare, self.example, self.expected = channels, bare, example, expected
        self.problem = ""

    def works(self, groups: Iterable[ChannelGroup]) -> bool:
        """Does the model run, with outputs of the same shape, when these groups shrink?"""
        choice = {self.channels.number[id(g)]: _some(g, n) for n, g in enumerate(groups)}
        return any(self._runs(choice, attributes) for attributes in (True, False))

    def _runs(self, choice: Choice, attributes: bool) -> bool:
        try:
            made = build(self.channels, self.bare, choice, attributes=attributes)
            with plain_kernels():
                found = [t.shape for t in tensors_of(call(made.eval(), self.example))]
        except Exception as problem:
            self.problem = problem.args[0] if isinstance(problem, Refused) else str(problem)
            return False
        self.problem = "the shape of the output changes"
        return found == self.expected


def _some(group: ChannelGroup, number: int) -> Vector:
    """About half of the channels, and not the same share of each group."""
    spare = max(group.size // 2, 1)
    return np.arange(max(group.size - 1 - (number * 7) % spare, 1))


def settle(probe: Probe) -> None:
    """Tie what only changes together, freeze what never does, until all free groups work at once.

    Python that computes one width from another (`head_dim = width // heads`) leaves no trace in
    labels: it shows when a group that shrinks alone breaks the model. Square weights between two
    such groups say which channels go together.
    """
    channels = probe.channels
    if not channels.groups or probe.works(channels.groups):
        return
    stuck = [g for g in channels.groups if not probe.works([g])]
    if _tie_squares(channels, stuck):
        channels.regroup()
        if probe.works(channels.groups):
            return
    while True:
        stuck = [g for g in channels.groups if not _alone(probe, g)]
        if not stuck:
            break
        channels.regroup()
    working: list[ChannelGroup] = []
    for group in channels.groups:
        if probe.works([*working, group]):
            working.append(group)
        else:
            _freeze(channels, group, f"does not go with others: {probe.problem}")
    channels.regroup()


def _alone(probe: Probe, group: ChannelGroup) -> bool:
    if probe.works([group]):
        return True
    _freeze(probe.channels, group, f"the model fails without some: {probe.problem}")
    return False


def _freeze(channels: Channels, group: ChannelGroup, why: str) -> None:
    roots = np.flatnonzero(channels.group_of == channels.number[id(group)])
    channels.book.labels.freeze(roots, why.splitlines()[0] if why else "")


def _tie_squares(channels: Channels, stuck: list[ChannelGroup]) -> bool:
    """Tie both axes of each square weight that lies between groups that are stuck alone."""
    numbers = {channels.number[id(g)] for g in stuck}
    tied = False
    for (name, dim), labels in channels.axes.items():
        other = channels.axes.get((name, 1))
        if dim == 0 and other is not None and len(other) == len(labels):
            rows, columns = set(channels.along(labels)), set(channels.along(other))
            if rows & numbers and columns & numbers and rows != columns:
                channels.book.labels.tie(labels, other)
                tied = True
    return tied
