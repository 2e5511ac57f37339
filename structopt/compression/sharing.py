"""Weights that share a few values: a codebook by k-means, and training that keeps it shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from structopt.compression.granularity import Granularity, PerTensor
from structopt.compression.quantize import as_finite
from structopt.compression.vectors import SharedVectors
from structopt.losses.checks import whole
from structopt.training.copying import need_changeable


@dataclass(frozen=True, eq=False)
class Shared:
    """A tensor as places in a table. ``index``, uint8, has its shape; ``table`` is (units, values).

    Where the tensor had exact zeros, the table has one, and training leaves it there.
    """

    index: Tensor
    table: Tensor
    per: Granularity = field(default_factory=PerTensor)

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        return self.index.shape

    def moved(self, weight: Tensor) -> Tensor:
        """The table whose values are the means of the numbers of ``weight`` that share them."""
        units = self.per.split(weight.to(_type_of_places(weight)))
        places = self.per.split(self.index.to(units.dtype)).nan_to_num(0).long()
        known, table = ~units.isnan(), self.table.to(units.dtype)
        total = torch.zeros_like(table).scatter_add_(1, places, units.nan_to_num(0))
        count = torch.zeros_like(table).scatter_add_(1, places, known.to(units.dtype))
        moved = torch.where((count > 0) & (table != 0), total / count.clamp(min=1), table)
        return moved.to(self.table.dtype)

    def dequantize(self) -> Tensor:
        """The value at each place."""
        places = self.per.split(self.index.to(_type_of_places(self.table))).nan_to_num(0).long()
        return self.per.join(self.table.gather(1, places), self.index.shape)


@torch.no_grad()
def share(x: Tensor, values: int, per: Granularity | None = None, *, rounds: int = 50) -> Shared:
    """The ``values`` numbers, in each unit, that k-means finds to stand for ``x``.

    Lloyd's k-means from two starts, evenly spaced numbers and evenly spaced ranks; the better one
    stays. A unit with no more distinct numbers than that keeps them exactly. Zeros stay exact:
    where there are any, 0 is one of the values.

    Han et al., 2016, "Deep compression". Raises ValueError for 0 or more than 256 values, NaN,
    infinities, and types that are not floats.

    >>> share(torch.tensor([0.0, 1.0, 1.2, 5.0]), 3).dequantize()
    tensor([0.0000, 1.1000, 1.1000, 5.0000])
    """
    if not 1 <= whole(values) <= 256:
        raise ValueError(f"a table has 1 to 256 values, not {values!r}: give a whole number")
    per = PerTensor() if per is None else per
    units = per.split(as_finite(x))
    if not units.numel():
        table, places = units.new_zeros(len(units), 1), units
    elif values == 1 and bool((units == 0).any()) and bool(units.nan_to_num(0).any()):
        raise ValueError("one value cannot stand for zeros and other numbers: ask for two or more")
    else:
        table = _table(units, values, rounds)
        places = _places(units, table).to(units.dtype)
    index = per.join(places, x.shape).to(torch.uint8)
    return Shared(index, table.to(x.dtype), per)


def _table(units: Tensor, values: int, rounds: int) -> Tensor:
    """The best of the starts, (units, values), in order; exact where the numbers are few."""
    ordered = units.sort(1).values  # NaN comes last
    new = (ordered[:, 1:] > ordered[:, :-1]).cumsum(1)
    rank = torch.nn.functional.pad(new, (1, 0)).clamp(max=values - 1)
    last = (~units.isnan()).sum(1, keepdim=True) - 1
    top = ordered.gather(1, last)
    few = (new[:, -1:] if new.shape[1] else last) < values
    exact = top.expand(-1, values).scatter(1, rank, torch.where(ordered.isnan(), top, ordered))
    part = torch.linspace(0, 1, values, device=units.device, dtype=units.dtype)
    evenly = ordered[:, :1] + (top - ordered[:, :1]) * part
    ranks = ordered.gather(1, (last * part).round().long())
    first, second = (_lloyd(units, start, rounds) for start in (evenly, ranks))
    better = _squares(units, first) <= _squares(units, second)
    return torch.where(few, exact, torch.where(better, first, second))


def _lloyd(units: Tensor, table: Tensor, rounds: int) -> Tensor:
    """Numbers to their nearest value, values to the mean of their numbers, in turn."""
    known, zeros = ~units.isnan(), (units == 0).any(1, keepdim=True)
    numbers = units.nan_to_num(0)
    for _ in range(rounds):
        table = _with_zero(table, zeros)
        places = _places(units, table)
        total = torch.zeros_like(table).scatter_add_(1, places, numbers)
        count = torch.zeros_like(table).scatter_add_(1, places, known.to(units.dtype))
        moved = torch.where(count > 0, total / count.clamp(min=1), table)
        moved = torch.where(zeros & (table == 0), 0, moved).sort(1).values
        if torch.equal(moved, table):
            break
        table = moved
    return _with_zero(table, zeros)


def _with_zero(table: Tensor, zeros: Tensor) -> Tensor:
    """The value nearest to 0 made 0, in units that have zeros."""
    least = table.abs().argmin(1, keepdim=True)
    return torch.where(zeros, table.scatter(1, least, 0), table)


def _places(units: Tensor, table: Tensor) -> Tensor:
    """The nearest of the ordered values, of two as near the lower one; NaN goes somewhere."""
    between = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
    return torch.searchsorted(between, units.contiguous()).clamp(max=table.shape[1] - 1)


def _squares(units: Tensor, table: Tensor) -> Tensor:
    return (table.gather(1, _places(units, table)) - units).square().nansum(1, keepdim=True)


def _type_of_places(table: Tensor) -> torch.dtype:
    """A float, as granularities mark with NaN what is not there; exact up to 255 in all of them."""
    return torch.float32 if table.dtype.itemsize < 4 else table.dtype


class Tie:
    """An `after_step` that keeps weights shared while their values are trained. See :func:`tie`."""

    def __init__(self, codes: Mapping[str, Shared | SharedVectors]) -> None:
        self.codes: dict[str, Shared | SharedVectors] = dict(codes)

    @torch.no_grad()
    def __call__(self, model: nn.Module, step: int = 0) -> None:
        parameters = dict(model.named_parameters())
        for name, shared in self.codes.items():
            weight = parameters.get(name)
            if weight is None:
                raise ValueError(f"there are codes of {name!r}, which is no parameter of the model")
            if weight.shape != shared.shape:
                raise ValueError(
                    f"the codes of {name} have shape {tuple(shared.shape)}, the weight "
                    f"{tuple(weight.shape)}: share the weights of this model"
                )
            need_changeable(name, weight)
        for name, shared in self.codes.items():
            self.codes[name] = replace(shared, table=shared.moved(parameters[name]))
            parameters[name].copy_(self.codes[name].dequantize())

    def __repr__(self) -> str:
        return f"Tie({len(self.codes)} weights)"


def tie(codes: Mapping[str, Shared | SharedVectors]) -> Tie:
    """Train the shared values: after each step, weights of one value become their mean.

    Or, of :func:`structopt.compression.share_vectors`, the vectors of one place.

    Hand it to :func:`structopt.training.train` as ``after_step``. With plain gradient descent this
    moves each value by the mean gradient of its weights, as Deep Compression does with the sum.
    A value of exactly 0 stays. ``codes`` of what is returned are those after the last step.

    Call it once yourself, ``tie(codes)(model)``, to write the values into the model.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> after_step = tie({"weight": share(torch.tensor([[1.0, 1.0, 4.0]]), 2)})
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> after_step(model)
    >>> model.weight.data
    tensor([[1.5000, 1.5000, 3.0000]])
    """
    return Tie(codes)
