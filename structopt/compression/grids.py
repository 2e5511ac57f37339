"""Grids of values, and four ways to lay one over given numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from structopt.compression.granularity import Granularity, PerTensor
from structopt.compression.levels import Levels, as_table
from structopt.losses.checks import real, whole


class Steps(NamedTuple):
    """Where the grid of each unit lies: value = (code - zero) · scale. Both of shape (units,).

    On a grid of ``levels``, value = level[code] · scale, and ``zero`` is the code of 0.
    """

    scale: Tensor
    zero: Tensor


class Fit(Protocol):
    """What every way of fitting can do."""

    def steps(self, units: Tensor, grid: Grid) -> Steps:
        """The steps for units of finite numbers, (units, members), NaN where there is none."""


@dataclass(frozen=True)
class MinMax:
    """The grid reaches from the smallest to the largest number: nothing is clipped."""

    def steps(self, units: Tensor, grid: Grid) -> Steps:
        return grid.between(*_ends(units))


@dataclass(frozen=True)
class Percentile:
    """The grid covers this share of the magnitudes in percent; what is beyond is clipped.

    An affine grid leaves out half of the rest at each end.
    """

    percent: float = 99.9

    def __post_init__(self) -> None:
        if not 0 < real(self.percent) <= 100:
            raise ValueError(f"{self}: a share in percent lies above 0, and at most at 100")

    def steps(self, units: Tensor, grid: Grid) -> Steps:
        if not units.shape[1]:
            return grid.between(*_ends(units))
        if grid.symmetric:
            top = _at(units.abs(), self.percent / 100)
            return grid.between(-top, top)
        tail = (1 - self.percent / 100) / 2
        return grid.between(-_at(-units, 1 - tail), _at(units, 1 - tail))


@dataclass(frozen=True)
class MSE:
    """The range, among ``tries`` parts of the whole one, that leaves the least squared error."""

    tries: int = 80

    def __post_init__(self) -> None:
        if not whole(self.tries) >= 1:
            raise ValueError(f"{self}: at least one range has to be tried")

    def steps(self, units: Tensor, grid: Grid) -> Steps:
        low, high = _ends(units)
        best = grid.between(low, high)
        least = _squares(units, best, grid)
        for part in range(1, self.tries):
            found = grid.between(low * (part / self.tries), high * (part / self.tries))
            squares = _squares(units, found, grid)
            better = squares < least
            least = torch.where(better, squares, least)
            best = Steps(*map(torch.where, (better, better), found, best))
        return best


@dataclass(frozen=True)
class LeastSquares:
    """The scale of binary or ternary weights that leaves the least squared error, in closed form.

    Of one symmetric bit, ±a: a is the mean magnitude (Rastegari et al., 2016, "XNOR-Net"). Of two,
    -a, 0 and a: of all k, the k largest magnitudes with the largest ``(Σ|w|)² / k``, and a is their
    mean: exactly what Li et al., 2016, "Ternary weight networks" approach by the threshold
    ``0.7 · mean |w|``. Raises ValueError for other grids: :class:`MSE` searches there.

    >>> grid = Grid(2, fit=LeastSquares())
    >>> grid.fit.steps(torch.tensor([[0.1, -0.2, 2.0, -3.0]]), grid).scale
    tensor([2.5000])
    """

    def steps(self, units: Tensor, grid: Grid) -> Steps:
        if not grid.symmetric or grid.bits > 2 or grid.levels is not None:
            raise ValueError(f"{self} fits grids of one or two symmetric bits, not {grid}")
        if not units.shape[1]:
            return grid.between(*_ends(units))
        sizes = units.abs().double()
        if grid.is_sign:
            best = sizes.nanmean(1)
        else:
            sums = sizes.nan_to_num(0).sort(1, descending=True).values.cumsum(1)
            count = torch.arange(1, sums.shape[1] + 1, device=sums.device)
            place = (sums.square() / count).argmax(1, keepdim=True)
            best = (sums.gather(1, place) / (place + 1))[:, 0]
        best = best.to(units.dtype)
        return grid.between(-best, best)


@dataclass(frozen=True)
class Grid:
    """Evenly spaced values, 2 to the power of ``bits`` of them at most.

    Symmetric: the codes -(2^(b-1) - 1) … 2^(b-1) - 1, zero in the middle, so that a grid of 2 bits
    is ternary; one bit is a sign, the values -scale/2 and scale/2. Affine: the codes 0 … 2^b - 1,
    with a whole ``zero``, so that the value 0 stays exact: a pruned weight stays pruned.

    With ``levels``, a table such as :class:`NormalFloat`, values are not evenly spaced: the codes
    are places in the table, from 0 on, and each unit has its scale, as on a symmetric grid.

    Raises ValueError for bits out of 1 to 8, and for levels that are no table of so many bits.

    >>> Grid(4, per=PerTensor()).codes
    (-7, 7)
    """

    bits: int = 8
    symmetric: bool = True
    per: Granularity = field(default_factory=PerTensor)
    fit: Fit = field(default_factory=MinMax)
    levels: Levels | None = None

    def __post_init__(self) -> None:
        if not 1 <= whole(self.bits) <= 8:
            raise ValueError(f"a grid has 1 to 8 bits, not {self.bits!r}")
        object.__setattr__(self, "bits", whole(self.bits))
        if self.levels is not None and not self.symmetric:
            raise ValueError(f"{self.levels} has its own zero: take symmetric=True, the default")
        _ = self.table  # complains

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        if self.table:
            return 0, len(self.table) - 1
        if self.symmetric and self.bits > 1:
            return 1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        """The type that codes are kept in, int8 where some are below 0, else uint8."""
        return torch.int8 if self.codes[0] < 0 else torch.uint8

    @property
    def table(self) -> tuple[float, ...]:
        """The values of the levels, in order; of an evenly spaced grid, none."""
        return () if self.levels is None else as_table(self.levels, self.bits)

    @property
    def is_sign(self) -> bool:
        """One symmetric bit, which has no code for the value 0."""
        return self.symmetric and self.bits == 1 and self.levels is None

    def between(self, low: Tensor, high: Tensor) -> Steps:
        """The steps with which the grid reaches from low <= 0 to high >= 0."""
        last = self.codes[1]
        tiny = torch.finfo(low.dtype).tiny  # one over it is still finite
        if self.is_sign:
            scale = 2 * torch.maximum(-low, high)
            return Steps(scale, torch.full_like(scale, 0.5))
        if self.table:
            scale = torch.maximum(-low, high).clamp(min=tiny)
            return Steps(scale, torch.full_like(scale, self.table.index(0.0)))
        if self.symmetric:
            scale = (torch.maximum(-low, high) / last).clamp(min=tiny)
            return Steps(scale, torch.zeros_like(scale))
        scale = (high / last - low / last).clamp(min=tiny)
        return Steps(scale, (-low / scale).round())

    def nearest(self, units: Tensor, steps: Steps) -> Tensor:
        """The code of each number before it is clipped, as a float."""
        scale, zero = steps.scale[:, None], steps.zero[:, None]
        if self.is_sign:
            beyond = (units.abs() > scale).to(units.dtype)  # further than half a step
            return torch.where(units >= 0, 1 + beyond, -beyond)
        ratio = units * (1 / scale)  # as torch: times the inverse, ties to even
        if not self.table:
            return ratio.round() + zero
        ends = 2 * self.table[0] - self.table[1], 2 * self.table[-1] - self.table[-2]
        table = ratio.new_tensor([ends[0], *self.table, ends[1]])
        between = (table[1:] + table[:-1]) / 2  # beyond the outer two: as far as a code beyond
        return (torch.searchsorted(between, ratio.contiguous()) - 1).to(ratio.dtype)

    def values(self, codes: Tensor, steps: Steps) -> Tensor:
        """What codes stand for, (units, members), as floats of the scale's type."""
        scale = steps.scale[:, None]
        if not self.table:
            return (codes - steps.zero[:, None]) * scale
        return (
            scale.new_tensor(self.table)[codes.nan_to_num(0).long()] * scale
        )  # NaN where a unit has no member


def _ends(units: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest number of each unit, 0 included."""
    if not units.shape[1]:
        return units.new_zeros(len(units)), units.new_zeros(len(units))
    known = units.nan_to_num(0.0)
    return known.amin(1).clamp(max=0), known.amax(1).clamp(min=0)


def _at(units: Tensor, share: float) -> Tensor:
    """The smallest number of each row with at least that share of the row at or below it; >= 0."""
    ordered = units.sort(1).values  # NaN comes last
    known = (~units.isnan()).sum(1)
    index = (known.double() * share).ceil().long().clamp(min=1) - 1  # float32 counts to 2^24
    return ordered.gather(1, index[:, None])[:, 0].clamp(min=0)


def _squares(units: Tensor, steps: Steps, grid: Grid) -> Tensor:
    codes = grid.nearest(units, steps).clamp(*grid.codes)
    return (grid.values(codes, steps) - units).square().nansum(1)
