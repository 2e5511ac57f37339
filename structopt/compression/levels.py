"""Tables of values that are not evenly spaced, for a grid with a scale for each unit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Protocol


class Levels(Protocol):
    """What every table can do."""

    def values(self, bits: int) -> tuple[float, ...]:
        """At most 2 to the power of ``bits`` values in order, 0 among them, the largest size 1."""


@dataclass(frozen=True)
class NormalFloat:
    """Values as dense as normally distributed weights are: NF4 at 4 bits.

    On either side of 0, quantiles of the normal distribution at evenly spaced probabilities from ½
    to 1 - δ, divided by the last of them; 2^(b-1) values above 0 and one less below, with
    δ = ½ (1 / 2^(b+1) + 1 / (2^(b+1) - 2)).

    Dettmers et al., 2023, "QLoRA: efficient finetuning of quantized LLMs", with blocks of 64
    weights: ``Grid(4, per=PerGroup(64), levels=NormalFloat())``. Scales stay in 32 bits here; the
    paper rounds them, too. Raises ValueError for one bit.

    >>> [round(value, 4) for value in NormalFloat().values(3)]
    [-1.0, -0.535, -0.2469, 0.0, 0.1833, 0.382, 0.623, 1.0]
    """

    def values(self, bits: int) -> tuple[float, ...]:
        if bits < 2:
            raise ValueError(f"{self} has values on both sides of 0: 2 bits or more, not {bits}")
        half = 2 ** (bits - 1)
        end = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
        return (*(-value for value in _quantiles(half - 1, end)[:0:-1]), *_quantiles(half, end))


def _quantiles(number: int, end: float) -> list[float]:
    """From 0 to 1, ``number`` of them and 0."""
    normal = NormalDist()
    found = [normal.inv_cdf(0.5 + (end - 0.5) * k / number) for k in range(number + 1)]
    return [0.0, *(value / found[-1] for value in found[1:])]


def as_table(levels: Levels, bits: int) -> tuple[float, ...]:
    """The values of levels, after every complaint that can be made."""
    table = levels.values(bits)
    rises = all(low < high for low, high in pairwise(table))
    if not (rises and 0 in table and 2 <= len(table) <= 2**bits):
        raise ValueError(f"{levels} lists {table}, not 2 to {2**bits} values in order, with a 0")
    if max(map(abs, table)) != 1:
        raise ValueError(f"{levels} lists {table}, whose largest size is not 1: divide by it")
    return table
