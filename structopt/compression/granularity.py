"""Which weights share one step: frozen values that print themselves.

Each splits a tensor into units, (units, members), and joins them again. What a ragged last unit
lacks is NaN, which no fit counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from structopt.losses.checks import whole


class Granularity(Protocol):
    """What every granularity can do."""

    def split(self, x: Tensor) -> Tensor:
        """The units of a tensor as rows, (units, members)."""

    def join(self, units: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of that shape, from its units."""


@dataclass(frozen=True)
class PerTensor:
    """One step for the whole tensor."""

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)

    def join(self, units: Tensor, shape: torch.Size) -> Tensor:
        return units.reshape(shape)


@dataclass(frozen=True)
class PerAxis:
    """One step for each index of an axis: with axis 0, for each output of a layer.

    Of a transposed convolution without groups, whose inputs come first, with axis 1.
    """

    axis: int = 0

    def __post_init__(self) -> None:
        if math.isnan(whole(self.axis)):
            raise ValueError(f"{self}: an axis is a whole number")
        object.__setattr__(self, "axis", whole(self.axis))

    def split(self, x: Tensor) -> Tensor:
        if not -x.ndim <= self.axis < x.ndim:
            raise ValueError(f"{self} asks for an axis that the shape {tuple(x.shape)} has not")
        moved = x.movedim(self.axis, 0)
        return moved.reshape(len(moved), math.prod(moved.shape[1:]))

    def join(self, units: Tensor, shape: torch.Size) -> Tensor:
        others = list(shape)
        first = others.pop(self.axis)
        return units.reshape(first, *others).movedim(0, self.axis).contiguous()


@dataclass(frozen=True)
class PerGroup:
    """One step for each ``size`` neighbours along a row of the weight, (outputs, everything else).

    The last group of a row is shorter where ``size`` does not divide it.
    """

    size: int

    def __post_init__(self) -> None:
        if not whole(self.size) >= 1:
            raise ValueError(f"{self}: a group has at least one weight, a whole number of them")
        object.__setattr__(self, "size", whole(self.size))

    def split(self, x: Tensor) -> Tensor:
        return PerBlock(1, self.size).split(x)

    def join(self, units: Tensor, shape: torch.Size) -> Tensor:
        return PerBlock(1, self.size).join(units, shape)


@dataclass(frozen=True)
class PerBlock:
    """One step for each block of rows × columns of the weight, (outputs, everything else)."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if not all(whole(n) >= 1 for n in (self.rows, self.columns)):
            raise ValueError(f"{self}: a block has at least one whole row and one whole column")
        object.__setattr__(self, "rows", whole(self.rows))
        object.__setattr__(self, "columns", whole(self.columns))

    def split(self, x: Tensor) -> Tensor:
        down, across = _matrix(x.shape)
        rows, columns = self._within(down, across)
        over = -down % rows, -across % columns
        matrix = x.reshape(down, across)
        if any(over):
            matrix = torch.nn.functional.pad(matrix, (0, over[1], 0, over[0]), value=math.nan)
        high, wide = len(matrix) // rows, matrix.shape[1] // columns
        tiles = matrix.reshape(high, rows, wide, columns).transpose(1, 2)
        return tiles.reshape(high * wide, rows * columns)

    def join(self, units: Tensor, shape: torch.Size) -> Tensor:
        down, across = _matrix(shape)
        rows, columns = self._within(down, across)
        high, wide = -(-down // rows), -(-across // columns)
        tiles = units.reshape(high, wide, rows, columns).transpose(1, 2)
        matrix = tiles.reshape(high * rows, wide * columns)
        return matrix[:down, :across].reshape(shape).contiguous()

    def _within(self, down: int, across: int) -> tuple[int, int]:
        """Rows and columns of a block, no more than there are."""
        return min(self.rows, max(1, down)), min(self.columns, max(1, across))


def _matrix(shape: torch.Size) -> tuple[int, int]:
    """(outputs, everything else); a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
