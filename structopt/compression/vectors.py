"""Weights that share a few vectors: product quantisation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from structopt.compression.coding import matrix_shape
from structopt.compression.evidence import fitting
from structopt.compression.granularity import Granularity, PerTensor
from structopt.compression.quantize import as_finite
from structopt.losses.checks import whole, wide

CHUNK = 1 << 16  # vectors whose distances are in memory at once
DAMP = 0.01  # of the mean diagonal of what inputs weigh, as in `gptq`


@dataclass(frozen=True, eq=False)
class SharedVectors:
    """A tensor as places in a table of vectors.

    ``index``, uint8, (rows, vectors of a row), the tensor read as a matrix (first dimension,
    everything else); ``table`` is (units, values, size); ``per`` splits the index.
    """

    index: Tensor
    table: Tensor
    shape: torch.Size
    per: Granularity = field(default_factory=PerTensor)

    def dequantize(self) -> Tensor:
        """The vector at each place."""
        return self.table.flatten(0, 1)[self.places()].reshape(self.shape)

    def places(self) -> Tensor:
        """Where in all tables, one behind the other, each vector lies, (rows, vectors of a row)."""
        units = self.per.split(self.index.double()).nan_to_num(0).long()
        first = torch.arange(len(units), device=units.device)[:, None] * self.table.shape[1]
        return self.per.join(units + first, self.index.shape)

    def moved(self, weight: Tensor) -> Tensor:
        """The table whose vectors are the means of those of ``weight`` that share them."""
        size = self.table.shape[-1]
        vectors = wide(weight.reshape(-1, size))
        table = self.table.flatten(0, 1).to(vectors.dtype)
        made = _means(vectors, self.places().flatten(), table)
        return torch.where(table.any(1, keepdim=True), made, 0).view_as(self.table).to(self.table)


@torch.no_grad()
def share_vectors(
    x: Tensor,
    values: int,
    size: int,
    per: Granularity | None = None,
    *,
    hessian: Tensor | None = None,
    rounds: int = 50,
) -> SharedVectors:
    """The ``values`` vectors of ``size`` numbers that k-means finds to stand for those of ``x``.

    Each row of the matrix (outputs, everything else) is cut into vectors of ``size`` neighbours,
    for a convolution best the ``size`` of its kernel or a multiple, and each vector becomes the
    nearest of a table: log2(values) / size bits a weight. ``per`` says which vectors have a table
    of their own, as it would of the matrix of vectors, (outputs, vectors of a row): all have one
    by default (Stock et al., 2020), with ``PerAxis(1)`` each place in the row has its own (Jégou
    et al., 2011). Lloyd's k-means from distant vectors (Arthur and Vassilvitskii, 2007), drawn with
    a fixed seed. A unit with no more distinct vectors than ``values`` keeps them exactly, and a
    vector of zeros stays zero; zeros among other numbers do not.

    ``hessian``, the sum of x xᵀ over what the rows multiply as in :func:`gptq`, weighs errors by
    what they do to outputs: (v - c) G (v - c)ᵀ, with G the mean of the blocks on the diagonal of
    the hessian that meet the unit's vectors.

    Jégou et al., 2011, "Product quantization for nearest neighbor search"; Stock et al., 2020,
    "And the bit goes down: revisiting the quantization of neural networks". Raises ValueError for a
    size that does not divide the rows, 0 or more than 256 values, a hessian of another shape, and
    as ``quantize``.

    >>> x = torch.tensor([[1.0, 2.0, 5.0, 5.0], [1.0, 2.2, 5.0, 5.0]])
    >>> share_vectors(x, 2, 2).dequantize()
    tensor([[1.0000, 2.1000, 5.0000, 5.0000],
            [1.0000, 2.1000, 5.0000, 5.0000]])
    """
    if not 1 <= whole(values) <= 256:
        raise ValueError(f"a table has 1 to 256 vectors, not {values!r}: give a whole number")
    rows = as_finite(x).reshape(matrix_shape(x.shape))
    if not whole(size) >= 1 or rows.shape[1] % size:
        raise ValueError(
            f"size={size!r} does not divide the {rows.shape[1]} numbers in a row of a weight of "
            f"shape {tuple(x.shape)}"
        )
    per = PerTensor() if per is None else per
    count = rows.shape[1] // size
    number = torch.arange(len(rows) * count, device=x.device).view(len(rows), count)
    vectors, tables = rows.reshape(-1, size), []
    index = torch.zeros_like(number)
    blocks = None if hessian is None else _blocks(hessian.to(rows), rows, size)
    for unit in per.split(number.double()):
        own = unit[~unit.isnan()].long()
        turn = None if blocks is None else _turn(blocks, own, len(rows), count)
        table = _table(vectors[own], values, rounds, turn)
        index.view(-1)[own] = _nearest(vectors[own], table, turn)
        tables.append(table)
    made = torch.stack(tables) if tables else rows.new_zeros(0, values, size)
    return SharedVectors(index.to(torch.uint8), made.to(x.dtype), x.shape, per)


def _table(vectors: Tensor, values: int, rounds: int, turn: Tensor | None) -> Tensor:
    """The vectors of one unit, (values, size); exact where there are few."""
    if not len(vectors):
        return vectors.new_zeros(values, vectors.shape[1])
    distinct: Tensor = torch.unique(vectors, dim=0)
    if len(distinct) <= values:
        return torch.cat([distinct, distinct[-1:].expand(values - len(distinct), -1)])
    zeros = not bool(vectors.any(1).all())
    if values == 1 and zeros:
        raise ValueError("one vector cannot stand for zeros and others: ask for two or more")
    table = _distant(vectors, values, zeros, turn)
    for _ in range(rounds):
        moved = _means(vectors, _nearest(vectors, table, turn), table)
        if zeros:
            moved[0] = 0
        if torch.equal(moved, table):
            break
        table = moved
    return table


def _distant(vectors: Tensor, values: int, zeros: bool, turn: Tensor | None) -> Tensor:
    """The first by lot, or zero; each further one by lot, as likely as its distance squared."""
    draw = torch.Generator(vectors.device).manual_seed(0)
    seen = _turned(vectors, turn).double()
    lots = torch.rand(values, generator=draw, device=vectors.device, dtype=torch.double)
    first = 0 if zeros else int(lots[0] * len(seen))
    centre = torch.zeros_like(seen[0]) if zeros else seen[first]
    picked = [first]
    least = (seen - centre).square().sum(1)
    for lot in lots[1:]:
        ends = least.cumsum(0)
        place = torch.searchsorted(ends, (lot * ends[-1])[None], right=True)
        picked.append(int(place.clamp(max=len(seen) - 1)))
        least = torch.minimum(least, (seen - seen[picked[-1]]).square().sum(1))
    table = vectors[picked]
    return torch.cat([torch.zeros_like(table[:1]), table[1:]]) if zeros else table


def _nearest(vectors: Tensor, table: Tensor, turn: Tensor | None) -> Tensor:
    centres = _turned(table, turn)
    parts = torch.split(vectors, CHUNK)
    return torch.cat([torch.cdist(_turned(part, turn), centres).argmin(1) for part in parts])


def _means(vectors: Tensor, places: Tensor, table: Tensor) -> Tensor:
    """Of the vectors at each place; where there are none, what the table has."""
    total = torch.zeros_like(table).index_add_(0, places, vectors)
    count = torch.zeros_like(table[:, :1]).index_add_(0, places, torch.ones_like(vectors[:, :1]))
    return torch.where(count > 0, total / count.clamp(min=1), table)


def _blocks(hessian: Tensor, rows: Tensor, size: int) -> Tensor:
    """The blocks on the diagonals of the hessians, (groups, vectors of a row, size, size)."""
    parts = fitting(hessian, rows)
    count = rows.shape[1] // size
    tiles = parts.reshape(len(parts), count, size, count, size)
    return tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _turn(blocks: Tensor, own: Tensor, rows: int, count: int) -> Tensor:
    """L with L Lᵀ = the mean of the blocks that meet these vectors, damped, (size, size)."""
    group = own // count * len(blocks) // rows
    often = torch.bincount(group * count + own % count, minlength=len(blocks) * count)
    mean = torch.tensordot(often.to(blocks), blocks.flatten(0, 1), 1)
    level = DAMP * mean.diagonal().mean() or torch.ones_like(mean[0, 0])
    lower, wrong = torch.linalg.cholesky_ex(mean + level * torch.eye(len(mean)).to(mean))
    if int(wrong):
        raise ValueError("the hessian is no sum of x xᵀ")
    made: Tensor = lower
    return made


def _turned(vectors: Tensor, turn: Tensor | None) -> Tensor:
    return vectors if turn is None else vectors @ turn
