"""From labels to groups: which channels are alike, and which weight axes hold them."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from structopt.channels.attributes import keeper
from structopt.channels.labels import Labels, Vector
from structopt.channels.members import ChannelGroup, Member
from structopt.channels.mirrors import Book, Extent
from structopt.channels.walking import Modules, modules_of, parameters_of

Axes = Mapping[tuple[str, int], Vector]
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


class Channels:
    """The coupled channels of one model: iterates over the groups that may change.

    `frozen` holds the groups that may not, each with its reason.
    """

    def __init__(self, model: nn.Module, example: Any, book: Book, axes: Axes) -> None:
        self.example = example
        self.book = book
        self.axes = axes
        self.model = weakref.ref(model)
        self.extents = _extents(modules_of(model), book)
        self.scored = book.scored
        self.regroup()

    def regroup(self) -> None:
        """Read the groups from the labels, again after some were tied or frozen."""
        self.book.labels.settle()
        self._along: dict[int, tuple[Vector, dict[int, Vector]]] = {}
        self._alike: dict[bytes, dict[int, Vector]] = {}
        self._row = dict[int, bytes]()  # the roots of each axis of a weight
        self.asked: Mapping[int, Vector] = {}
        self.answers: dict[int, Vector | None] = {}  # of `rows_of`, to what was asked last
        self.group_of = np.full(self.book.labels.size, -1)  # of a root
        self.ordinal_of = np.zeros(self.book.labels.size, np.int64)
        self.reads = np.zeros(self.book.labels.size, bool)  # of a label: summed over by an op
        for axis in self.book.readers:
            self.reads[self.book.unpaired(axis)] = True
        for total, part in reversed(self.book.summed):
            self.reads[self.book.unpaired(part[self.reads[total]])] = True
        self.twice: set[int] = set()  # groups that lie on both sides of a grid
        self.apart: list[tuple[Vector, frozenset[int]]] = []
        self.every = made = _collect(self)
        twice = [n for n in self.twice if not made[n].frozen]
        if twice:
            where = np.isin(self.group_of, twice)
            self.book.labels.freeze(np.flatnonzero(where), "each channel meets all others")
            return self.regroup()
        self.groups = tuple(g for g in made if not g.frozen)
        self.frozen = tuple(g for g in made if g.frozen)
        self.number = {id(group): n for n, group in enumerate(made)}

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in (*self.groups, *self.frozen):
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; there are {', '.join(g.name for g in self.groups)}")

    @functools.cached_property
    def _beside(self) -> tuple[Vector, Vector]:
        """Rows of weights, ascending, and what is added to the results of each."""
        pairs = [np.empty((2, 0), np.int64), *map(np.stack, self.book.beside)]
        both = np.concatenate(pairs, axis=1)
        rows, bias = both[:, np.argsort(both[0], kind="stable")]
        return rows, bias

    def biases(self, rows: Vector) -> list[int]:
        """What is added to the results of these rows of a weight."""
        known, bias = self._beside
        ends = zip(*(np.searchsorted(known, rows, side).tolist() for side in _SIDES), strict=True)
        found: list[int] = bias[[n for start, end in ends for n in range(start, end)]].tolist()
        return found

    def reading(self, number: int) -> npt.NDArray[np.bool_]:
        """Of each label: is it summed over, across the channels of this group?"""
        reads = self.reads
        for axis, numbers in self.apart:
            if number in numbers:
                reads = reads.copy() if reads is self.reads else reads
                reads[axis] = False
        return reads

    def bends(self, made: Vector) -> str:
        """What stands in the way of scaling the channels that have these labels, or nothing."""
        return next((why for axis, why in self.book.bent if np.isin(axis, made).any()), "")

    def along(self, labels: Vector) -> dict[int, Vector]:
        """For each group that these labels belong to, the channel of each label, or -1."""
        known = self._along.get(id(labels))
        if known is not None and known[0] is labels:
            return known[1]
        # A norm has five axes of the same channels.
        same = self._row.get(id(labels)) or self.book.labels.find(labels).tobytes()
        if same not in self._alike:
            self._alike[same] = self._lookup(labels)
        self._along[id(labels)] = labels, self._alike[same]
        return self._alike[same]

    def _lookup(self, labels: Vector) -> dict[int, Vector]:
        found: dict[int, Vector] = {}
        leaves = self.book.labels.leaves(labels)
        for roots in leaves.values():
            group = np.where(roots >= 0, self.group_of[roots], -1)
            if len(leaves) == 1 and group[0] >= 0 and not np.count_nonzero(group != group[0]):
                return {int(group[0]): self.ordinal_of[roots]}  # as most are
            numbers = np.flatnonzero(np.bincount(group + 1)[1:]).tolist()
            for number in numbers:
                mine = group == number
                channel = np.where(mine, self.ordinal_of[roots], -1)
                before = found.get(number)
                if before is not None and ((before >= 0) & mine).any():
                    self.twice.add(number)
                found[number] = channel if before is None else np.maximum(channel, before)
        return found

    def freedom(self, groups: Iterable[ChannelGroup] | None = None) -> float:
        """The share of all weights of the model that lie on an axis of these groups."""
        model = self.model()
        assert model is not None, "the model that was analysed is gone"
        chosen = {self.number[id(g)] for g in (self.groups if groups is None else groups)}
        free = total = 0.0
        for name, parameter in model.named_parameters():
            locked = 1.0
            for dim in range(parameter.ndim):
                labels = self.axes.get((name, dim))  # complex weights have none
                along = {} if labels is None else self.along(labels)
                on = [c >= 0 for n, c in along.items() if n in chosen]
                locked *= 1 - float(np.logical_or.reduce(on).mean()) if on else 1.0
            free += parameter.numel() * (1 - locked)
            total += parameter.numel()
        return free / max(total, 1)

    def __repr__(self) -> str:
        return f"Channels({len(self.groups)} groups, {len(self.frozen)} frozen)"


def _extents(modules: Modules, book: Book) -> list[Extent]:
    """The sizes that modules remember as attributes: those known by name, then those by value."""
    found = [e for e in book.claims.values() if e.labels is not None]
    for extent in book.extents.values():
        module = modules[extent.module]
        if extent.name:
            held = getattr(module, extent.name, None) == extent.size
        else:
            held = bool(keeper(module, extent, book))
        if held:
            found.append(extent)
    return found


def _collect(channels: Channels) -> list[ChannelGroup]:
    """Channels with the same signature, the axes they lie on and how often, form a group."""
    labels = channels.book.labels
    axes = [*channels.axes.values(), *channels.book.pieces]
    rows = _rows(labels, axes)
    channels._row = {id(axis): row for axis, (row, _) in zip(axes, rows, strict=True)}
    every = list(dict(rows).values())  # each once: a norm has five axes of the same channels
    if not every:
        return []
    owner = np.repeat(np.arange(len(every)), [len(vector) for vector in every])
    where = np.concatenate([np.arange(len(vector)) for vector in every])
    parts: list[tuple[Vector, Vector, Vector]] = []
    for path, roots in labels.leaves(np.concatenate(every)).items():
        real = np.flatnonzero(roots >= 0)
        order = real[np.argsort(roots[real], kind="stable")]  # owners ascend already
        seen, own = roots[order], owner[order]
        first = np.flatnonzero(np.r_[True, (np.diff(seen) != 0) | (np.diff(own) != 0)])
        count = np.diff(np.r_[first, len(order)])
        mark = _mix(_mix(own[first] + hash(path) % 2**61) + count)
        parts.append((seen[first], mark, where[order[first]]))
    root, mark, place = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(root, kind="stable")
    root, mark, place = root[order], mark[order], place[order]
    starts = np.flatnonzero(np.r_[True, root[1:] != root[:-1]])
    signature = np.add.reduceat(mark, starts) + _mix(labels.reason[root[starts]])
    return _build(channels, root[starts], signature, place[starts])


def _rows(labels: Labels, axes: list[Vector]) -> list[tuple[bytes, Vector]]:
    """The roots of these axes, and the same as bytes."""
    if not axes:
        return []
    roots, ends = labels.find(np.concatenate(axes)), itertools.accumulate(map(len, axes))
    rows = [roots[start:end] for start, end in itertools.pairwise((0, *ends))]
    return [(row.tobytes(), row) for row in rows]


def _mix(values: Vector) -> Vector:
    """Scatter numbers over 64 bits, so that sums of them do not collide."""
    x = values.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift)) ^ np.uint64(0x9E3779B97F4A7C15)) * np.uint64(factor)
    return x.astype(np.int64)


def _build(
    channels: Channels, roots: Vector, signature: Vector, place: Vector
) -> list[ChannelGroup]:
    labels = channels.book.labels
    _, first, group = np.unique(signature, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))  # in the order of the first root
    group = rank[group]
    order = np.lexsort((place, group))
    bounds = np.flatnonzero(np.r_[True, np.diff(group[order]) > 0, True])
    for number, (a, b) in enumerate(itertools.pairwise(bounds)):
        channels.group_of[roots[order[a:b]]] = number
        channels.ordinal_of[roots[order[a:b]]] = np.arange(b - a)
    channels.apart = [(a, frozenset(channels.along(g))) for a, g in channels.book.apart]
    members: list[list[Member]] = [[] for _ in bounds[:-1]]
    for (name, dim), vector in channels.axes.items():
        for number, channel in channels.along(vector).items():
            reads = bool(np.count_nonzero(channels.reading(number)[vector]))
            members[number].append(Member(name, dim, channel, reads))
    averaged = np.zeros(len(members), bool)
    for axis in channels.book.averaged:
        for leaf in labels.leaves(axis).values():
            averaged[channels.group_of[leaf[leaf >= 0]]] = True
    whys = [labels.reasons[labels.reason[roots[order[a]]]] for a in bounds[:-1]]
    model = channels.model()
    learned = set(parameters_of(modules_of(model))) if model is not None else set[str]()
    for number, (a, b) in enumerate(itertools.pairwise(bounds)):
        if not whys[number] and b - a == 1:
            whys[number] = "a single channel"
        elif not whys[number] and learned.isdisjoint(m.parameter for m in members[number]):
            whys[number] = "no weights, only buffers, which a model may fill anew"
    names = _names(members, whys)
    return [
        ChannelGroup(names[n], int(b - a), tuple(members[n]), whys[n], bool(averaged[n]), channels)
        for n, (a, b) in enumerate(itertools.pairwise(bounds))
    ]


def _names(members: list[list[Member]], whys: list[str]) -> dict[int, str]:
    """Each after the layer that makes its channels; those that may change get the plain names."""
    names, taken = dict[int, str](), dict[str, int]()
    for number in sorted(range(len(members)), key=lambda n: bool(whys[n])):
        makers = [m for m in members[number] if not m.reads] or members[number]
        makers = [m for m in makers if m.parameter.endswith("weight")] or makers
        name = makers[0].parameter.rpartition(".")[0] or makers[0].parameter if makers else "inner"
        taken[name] = taken.get(name, 0) + 1
        names[number] = name if taken[name] == 1 else f"{name}#{taken[name]}"
    return names
