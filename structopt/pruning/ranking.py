"""Who is compared with whom, and exactly so many of the lowest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structopt.losses.checks import real, wide

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PerLayer:
    """Each layer (or coupled group) loses the same share of its own lowest."""


@dataclass(frozen=True)
class PerRow:
    """Each output row of a layer loses the same share, as Wanda does (Sun et al., 2024)."""


@dataclass(frozen=True)
class Global:
    """All layers are compared with one another.

    With `normalise`, scores are divided by their mean in the layer first: without it a layer
    of small weights loses most, and may be emptied, which is an error. `floor` is the share of its
    own best that every layer keeps.
    """

    normalise: bool = False
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.normalise, bool):
            raise ValueError(
                f"normalise={self.normalise!r}: true or false; the share that a layer keeps is "
                "Global(floor=0.01)"
            )
        if not 0 <= real(self.floor) < 1:
            raise ValueError(f"floor={self.floor!r}: the share that a layer keeps, in [0, 1)")


Scope = PerLayer | PerRow | Global


def keys(scores: Tensor, alive: Tensor | None = None) -> Tensor:
    """Integers in the order of |scores|: the bits of a float that is not negative are.

    What is not `alive` gets 0, the lowest of all; the rest are above.
    """
    bits = scores.abs().contiguous().view(_BITS[scores.dtype.itemsize])
    wide = bits.to(torch.int32) if bits.dtype == torch.int16 else bits
    wide = wide + 1
    return wide if alive is None else wide * alive.view_as(wide)


def lowest(ranks: Sequence[Tensor], count: int) -> list[Tensor]:
    """Which `count` entries of all these tensors of :func:`keys` are lowest, as bool tensors.

    Equal keys go in their order. A histogram of the leading 16 bits finds where the border lies,
    then one of the next 16: linear in the number of entries, with no sorting.
    """
    border, below = 0, 0
    for shift in range(8 * ranks[0].dtype.itemsize - 16, -1, -16):
        histogram = torch.zeros(1 << 16, dtype=torch.int64, device=ranks[0].device)
        for key in ranks:
            if shift + 16 < 8 * key.dtype.itemsize:
                key = key[(key >> (shift + 16)) == border]
            histogram += torch.bincount((key >> shift).flatten() & 0xFFFF, minlength=1 << 16)
        up_to = histogram.cumsum(0) + below
        place = int(torch.searchsorted(up_to, count))
        below = int(up_to[place - 1]) if place else below
        border = border << 16 | place
    chosen, left = [], count - below
    for key in ranks:
        mine = key < border
        if left:
            ties = (key == border).flatten().nonzero()[:left, 0]
            mine.view(-1)[ties] = True
            left -= len(ties)
        chosen.append(mine)
    return chosen


def lowest_in_rows(key: Tensor, count: int) -> Tensor:
    """The `count` lowest of each row, equal ones in their order."""
    order = key.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(key, dtype=torch.bool).scatter_(1, order, True)


def normalised(name: str, scores: Tensor) -> Tensor:
    """Divided by the mean of their sizes."""
    scores = wide(scores)  # else a small mean has few digits, and ratios tie
    mean = scores.abs().mean()
    if not mean.isfinite():
        raise ValueError(f"the mean of the scores of {name} is {mean:g}: rank without normalise")
    return scores / mean.where(mean > 0, 1)


def number(sparsity: float, size: int) -> int:
    """How many of `size` a sparsity removes: rounded to the nearest, halves to even."""
    return round(sparsity * size)


def need_sparsity(sparsity: object, what: str = "sparsity") -> None:
    if not 0 <= real(sparsity) < 1:
        raise ValueError(f"{what} is the fraction removed, a number in [0, 1), not {sparsity!r}")


def need_scope(scope: object) -> None:
    if not isinstance(scope, Scope):
        raise ValueError(f"a scope is one of PerLayer(), PerRow() and Global(), not {scope!r}")
