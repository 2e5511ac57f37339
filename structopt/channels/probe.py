"""Try the groups on a copy without values, and learn what the model's own Python insists on."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from structopt.channels.edit import build
from structopt.channels.groups import Channels
from structopt.channels.labels import Vector
from structopt.channels.members import ChannelGroup
from structopt.channels.mirrors import Book
from structopt.channels.nests import call, tensors_of
from structopt.channels.reading import own
from structopt.channels.rows import Edit
from structopt.channels.shadow import Shadow, plain_kernels, to_shadow
from structopt.channels.tracing import follow_modules
from structopt.channels.walking import modules_of

Shapes = list[torch.Size]


class Probe:
    """Runs edited copies of a model whose weights, if `bare`, have shapes but no values."""

    def __init__(
        self, channels: Channels, model: nn.Module, example: Any, expected: Shapes, bare: bool
    ) -> None:
        self.channels, self.model, self.example, self.expected = channels, model, example, expected
        self.bare = bare
        self.problem = self.where = ""

    def works(self, groups: Iterable[ChannelGroup]) -> bool:
        """Does the model run, with outputs of the same shape, when these groups shrink?"""
        return self.runs(groups, True)

    def runs(self, groups: Iterable[ChannelGroup], guesses: bool) -> bool:
        """The same, with or without setting attributes that only happen to equal an old size."""
        choice = {self.channels.number[id(g)]: _some(g, n) for n, g in enumerate(groups)}
        watch, edit = Book(), Edit(choice, guessed=None if guesses else frozenset())
        try:
            found = self._shapes(self._built(edit))
        except Exception as problem:
            self.problem = str(problem)
            with contextlib.suppress(Exception):  # once more, to see where
                made = self._built(edit)
                follow_modules(watch, modules_of(made))
                self._shapes(made)
            self.where = watch.module
            return False
        self.problem, self.where = "the shape of the output changes", ""
        if not self.bare:  # how many objects are found may change with the values
            return [len(s) for s in found] == [len(s) for s in self.expected]
        return found == self.expected

    def _built(self, edit: Edit) -> nn.Module:
        return build(self.channels, self.model, edit, start=to_shadow if self.bare else None)

    def _shapes(self, made: nn.Module) -> Shapes:
        with plain_kernels(), Shadow():
            return [t.shape for t in tensors_of(call(made.eval(), self.example))]


def _some(group: ChannelGroup, number: int) -> Vector:
    """About half of the channels, and not the same share of each group."""
    spare = max(group.size // 2, 1)
    return np.arange(max(group.size - 1 - (number * 7) % spare, 1))


def settle(probe: Probe) -> None:
    """Tie what only changes together, freeze what never does, until all free groups work at once.

    Python that computes one width from another (`head_dim = width // heads`) leaves no trace in
    labels: it shows when a group that shrinks alone breaks the model.
    """
    channels = probe.channels
    while channels.groups and not probe.works(channels.groups):
        kind = type(probe.model.get_submodule(_owner(probe)))
        if not (_silence(probe, kind) or _tie_sides(probe, kind, 1) or _tie_sides(probe, kind, 3)):
            _freeze(probe, _culprit(probe))
        channels.regroup()


def _owner(probe: Probe) -> str:
    """The module that failed: the nearest that is not one of torch's plain layers."""
    path = probe.where
    while True:
        module = probe.model.get_submodule(path)
        if not path or own(module) or isinstance(module, nn.MultiheadAttention):
            return path
        path = path.rpartition(".")[0]


def _silence(probe: Probe, kind: type) -> bool:
    """Leave alone the attributes of a class that equal a size by chance, if that is the fault."""
    channels = probe.channels
    if kind in channels.book.silent:
        return False
    paths = {n for n, m in modules_of(probe.model).items() if type(m) is kind}
    sizes = [e for e in channels.extents if not e.name and e.module in paths]
    touched = {n for e in sizes if e.labels is not None for n in channels.along(e.labels)}
    for group in channels.groups:
        if channels.number[id(group)] in touched and not probe.runs([group], True):
            if probe.runs([group], False):
                channels.book.silent.add(kind)
                return True
            return False
    return False


def _tie_sides(probe: Probe, kind: type, times: int) -> bool:
    """Tie both axes of square weights in all modules of a kind, where neither shrinks alone.

    A square weight of an attention lies between the width of the model and that of its heads; one
    that makes queries, keys and values at once has three times as many rows.
    """
    channels, tied = probe.channels, False
    verdicts: dict[frozenset[int], bool] = {}  # of sets of groups: do they work alone?
    both = (*channels.groups, *channels.frozen)
    groups = {channels.number[id(g)]: g for g in both if not g.frozen}
    paths = tuple(
        n + "." if n else "" for n, m in modules_of(probe.model).items() if type(m) is kind
    )
    fails = ""
    for (name, dim), rows in channels.axes.items():
        columns = channels.axes.get((name, 1))
        if dim or columns is None or len(rows) != times * len(columns):
            continue
        if not name.startswith(paths):
            continue
        sides = [frozenset(channels.along(axis).keys() & groups.keys()) for axis in (rows, columns)]
        if not sides[0] or not sides[1] or sides[0] == sides[1]:
            continue
        layer = name.removeprefix(max((p for p in paths if name.startswith(p)), key=len))
        if not fails:  # one instance speaks for all of its class
            for side in sides:
                if side not in verdicts:
                    verdicts[side] = probe.works([groups[n] for n in side])
            fails = "" if any(verdicts[side] for side in sides) else layer
        if fails == layer:
            channels.book.labels.tie(rows, np.tile(columns, times))
            tied = True
    return tied


def _culprit(probe: Probe) -> ChannelGroup:
    """The last of the shortest row of groups that fails together, found by halving."""
    groups, works, fails = probe.channels.groups, 0, len(probe.channels.groups)
    while fails - works > 1:
        middle = (works + fails) // 2
        if probe.works(groups[:middle]):
            works = middle
        else:
            fails = middle
    probe.works(groups[:fails])  # so that the problem told is this one's
    return groups[fails - 1]


def _freeze(probe: Probe, culprit: ChannelGroup) -> None:
    """Freeze a group, and those that stand in its place in other modules of the same class."""
    channels = probe.channels
    kind = type(probe.model.get_submodule(_owner(probe)))
    paths = tuple(f"{p}." for p, m in modules_of(probe.model).items() if p and type(m) is kind)
    place = _place(culprit)
    why = f"the model fails without some: {probe.problem}".splitlines()[0]
    for group in channels.groups:
        inside = any(m.parameter.startswith(paths) for m in group.members)
        if group is culprit or (inside and _place(group) == place):
            roots = np.flatnonzero(channels.group_of == channels.number[id(group)])
            channels.book.labels.freeze(roots, why)


def _place(group: ChannelGroup) -> list[tuple[str, int]]:
    """The axes of a group, whatever the number of the block that they lie in."""
    return sorted((re.sub(r"\d+", "*", m.parameter), m.dim) for m in group.members)
