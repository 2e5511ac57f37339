"""Mirrors: what the tracer knows of a tensor.

The mirror of a tensor holds, for each dimension, one label for each index, or `None` where the
size of the dimension is not a number of channels (batch, height, width, time). Labels along all
other dimensions are equal, so that they are never spelled out.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structopt.channels.labels import Labels, Vector

Axis = Vector | None
Mirror = list[Axis]
Places = list[tuple[torch.Size, Vector]]  # of each output of a move: its shape, what lies where
Key = tuple[str, str, int]  # path of a module, name of an attribute, place in it if it is a list

MIRROR = "_structopt_mirror"  # the attribute of a tensor that holds its mirror


def mirror_of(tensor: Tensor) -> Mirror | None:
    mirror: Mirror | None = getattr(tensor, MIRROR, None)
    return mirror


@dataclass
class Extent:
    """A size that a module's own Python may hold: the number of labels along a dimension."""

    module: str
    size: int
    labels: Axis
    name: str = ""  # of the attribute, where it is known
    place: int = -1  # in the attribute, where that is a list


@dataclass(frozen=True, eq=False)
class Score:
    """A product of queries and keys, summed over these labels."""

    labels: Vector
    picked: tuple[int, ...]  # labels that the query was picked by, by number
    kind: str  # the class of module that scales it; "": torch does, by the width
    keys: Vector  # the labels on the side of the keys
    scales: tuple[Vector, ...] = ()  # of what scaled the query anew, as a norm of its own does
    key_scales: tuple[Vector, ...] = ()


@dataclass
class Book:
    """What one analysis writes down as it goes."""

    labels: Labels = field(default_factory=Labels)
    extents: dict[tuple[str, int, bytes], Extent] = field(default_factory=dict)
    claims: dict[Key, Extent] = field(default_factory=dict)
    silent: set[type] = field(default_factory=set)  # whose other attributes are no sizes
    said: set[tuple[str, str]] = field(default_factory=set)  # module, attribute: known by name
    pieces: list[Vector] = field(default_factory=list)
    readers: list[Vector] = field(default_factory=list)
    averaged: list[Vector] = field(default_factory=list)
    scored: list[Score] = field(default_factory=list)
    beside: list[tuple[Vector, Vector]] = field(default_factory=list)  # rows and their bias
    summed: list[tuple[Vector, Vector]] = field(default_factory=list)  # weights, and one in them
    spent: list[tuple[Vector, Axis]] = field(default_factory=list)  # scaled anew; by these groups
    bent: list[tuple[Vector, str]] = field(default_factory=list)  # by what is not homogeneous
    apart: list[tuple[Vector, Vector]] = field(default_factory=list)  # readers; not across these
    grids: list[tuple[Vector, int, Vector]] = field(default_factory=list)  # split labels: from what
    starts: list[int] = field(default_factory=list)  # the first label of each grid, ascending
    weights: int = 0  # labels below this number are those of axes of parameters
    origins: dict[int, Vector] = field(default_factory=dict)  # what `rows` has found
    moved: dict[Any, tuple[bool, Places]] = field(default_factory=dict)  # by op, shape, dimension
    picked: list[list[int]] = field(default_factory=list)  # by the op at hand, of each output
    owed: list[tuple[Vector, str]] = field(default_factory=list)  # frozen if what it made is used
    decided: bool = False  # values of the example or of the weights decided where the model went
    met: set[int] = field(default_factory=set)  # ids of parameters that some op used
    unmet: list[tuple[str, int]] = field(default_factory=list)  # sizes of others, if `decided`
    module: str = ""
    kind: str = ""  # the class of the module at work
    convolves: bool = False  # the module at work is a convolution of torch's, and nothing else
    widthless: bool = False  # the function at work is given no width by Python
    insists: bool = False  # some function was, or may have been, or Python asked a layer for one
    given: frozenset[int] = frozenset()  # ids of what a layer at work was given to multiply
    op: str = ""

    def insist(self) -> None:
        self.insists = True

    def why(self, text: str) -> str:
        return f"{text}: {self.op} in {self.module or 'the model'}"

    def freeze(self, axis: Axis, text: str) -> None:
        if axis is not None:
            self.labels.freeze(axis, self.why(text))

    def averages(self, axis: Axis) -> None:
        """A norm's statistics run over these channels: without some, it is another norm."""
        if axis is not None:
            self.averaged.append(axis)

    def tie(self, first: Axis, second: Axis) -> Axis:
        """Tie two axes; one of a fixed size freezes the other. The result labels both."""
        if first is None or second is None or len(first) != len(second):
            self.freeze(first, "meets a dimension of fixed size")
            self.freeze(second, "meets a dimension of fixed size")
            return None
        self.labels.tie(first, second)
        return first

    def split(self, axis: Axis, sizes: Sequence[int]) -> Mirror:
        """The labels of the dimensions that one is unflattened into."""
        result: Mirror = [None] * len(sizes)
        if axis is None:
            return result
        grid, same = axis.reshape(tuple(sizes)), self.labels.find(axis).reshape(tuple(sizes))
        kept = []
        for d, size in enumerate(sizes):
            first = same.take([0], axis=d)
            if size > 1 and (same != first).any():
                kept.append(d)
            else:
                grid, same = grid.take([0], axis=d), first
        if not kept:  # one channel, or many tied into one
            self.freeze(axis, "is tied into a single channel")
        elif len(kept) == 1:
            result[kept[0]] = grid.ravel()
        else:
            for d in kept:
                result[d] = self.labels.new(sizes[d])
                made = np.asarray(result[d])
                self.grids.append((grid, d, made))
                self.starts.append(int(made[0]))
            self.labels.tie(grid.ravel(), self._product([np.asarray(result[d]) for d in kept]))
        return result

    def _product(self, axes: list[Vector]) -> Vector:
        """Labels of a grid: the pair of the first axis with the pair of the second and so on."""
        inner = axes[-1]
        for outer in reversed(axes[:-1]):
            inner = self.labels.pair(np.repeat(outer, len(inner)), np.tile(inner, len(outer)))
        return inner

    def grid(self, outer: Axis, inner: Axis, shape: tuple[int, int]) -> Axis:
        """The labels of a dimension that two were flattened into."""
        if outer is None:
            return None if inner is None else np.tile(inner, shape[0])
        if inner is None:
            return np.repeat(outer, shape[1])
        return self._product([outer, inner])

    def rows(self, label: int) -> Vector:
        """The labels of weights that this one was split from."""
        known = self.origins.get(label)
        if known is None:
            place = bisect.bisect_right(self.starts, label) - 1
            known = np.array([label])
            if place >= 0:
                grid, dim, made = self.grids[place]
                if label <= made[-1]:
                    above = set(grid.take(label - made[0], axis=dim).ravel().tolist())
                    if max(above) >= self.weights:
                        parents = [one for p in above for one in self._sides(p, label)]
                        above = {row for p in parents for row in self.rows(p).tolist()}
                    known = np.array(sorted(above))
            self.origins[label] = known
        return known

    def _sides(self, label: int, factor: int) -> list[int]:
        """Of a label that was paired of two axes, the side that is tied to a factor."""
        both = self.labels.factors[:, label].tolist()
        if label < self.weights or not 0 <= max(both) < label:  # got when it was tied to a pair
            return [label]
        sides = [one for side in both for one in self._sides(side, factor)]
        root = self.labels.find(np.array([factor, *sides]))
        return [s for s, r in zip(sides, root[1:], strict=True) if r == root[0]] or [label]

    def unpaired(self, axis: Vector) -> Vector:
        """The labels of an axis, and those that pairs among them were made of."""
        found, todo = [axis], axis
        while len(todo):
            todo = self.labels.factors[:, np.unique(todo[todo >= self.weights])].ravel()
            todo = todo[todo >= 0]
            found.append(todo)
        return np.concatenate(found)

    def extent(self, size: int, axis: Axis, name: str = "") -> None:
        """Remember that the module at hand uses `size`, which is the number of these labels."""
        if axis is not None and size > 1:
            self.said.add((self.module, name))
            key = (self.module, size, name.encode() + axis.tobytes())
            self.extents.setdefault(key, Extent(self.module, size, axis, name))
