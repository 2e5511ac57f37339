"""Range coding by `constriction`: fractions of a bit, with a model that is fixed or learns.

Probabilities come from whole numbers by single operations in double precision, which every machine
rounds alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import constriction  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

from structopt.compression.huffman import Symbols

ONE = 1 << 16  # probability 1, in the whole numbers of the mask's model
CHUNK = 1 << 20  # symbols that constriction is given at once: it takes 4 bytes for each

Whole = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Real = npt.NDArray[np.float64]
Coder = Any  # constriction carries no types
model, queue = constriction.stream.model, constriction.stream.queue


def encoder() -> Coder:
    return queue.RangeEncoder()


def words(coder: Coder) -> bytes:
    """What an encoder has made, in words of 32 bits."""
    return bytes(coder.get_compressed().astype("<u4"))


def decoder(data: bytes) -> Coder:
    if len(data) % 4:
        raise ValueError("a range coder's stream is whole words of 4 bytes")
    return queue.RangeDecoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))


def write(symbols: Symbols, counts: Whole, coder: Coder) -> None:
    """Append symbols (N,) with a fixed model: the probability of s is counts[s] / their sum."""
    fixed = model.Categorical(counts.astype(np.float64), perfect=False)
    for first in range(0, len(symbols), CHUNK):
        coder.encode(symbols[first : first + CHUNK].astype(np.int32), fixed)


def read(number: int, counts: Whole, coder: Coder) -> Symbols:
    """The next symbols, (number,)."""
    fixed = model.Categorical(counts.astype(np.float64), perfect=False)
    made = np.empty(number, dtype=np.uint8)
    for first in range(0, number, CHUNK):
        part = made[first : first + CHUNK]
        part[:] = coder.decode(fixed, len(part))
    return made


@dataclass(frozen=True)
class MaskModel:
    """How likely the next bit of a mask (R, C) is a one, learned from the bits before it.

    The mask is walked in tiles of ``high`` rows × ``wide`` columns, from left to right, then down.
    A column expects what it held in the rows above the tile; a row that was denser than its columns
    expected raises them. Chances are counted in 1/65536; all sums are of whole numbers, which are
    exact in double precision in any order.

    ``prior`` is the share of ones in the whole mask, 1 to 65535.
    """

    high: int
    wide: int
    prior: int

    COLUMN = 4  # rows that the prior counts for
    ROW = 4  # ones that a row has to show before it is believed

    def column(self, ones: Real, rows: int | Real) -> Real:
        """What a column expects after that many ones in so many rows, rounded down."""
        return np.floor((ONE * ones + self.COLUMN * self.prior) / (rows + self.COLUMN))

    def chance(self, column: Real, seen: Real, expected: Real) -> Real:
        """Of a one, where the row has seen so many ones, and its columns expected so many."""
        factor = (seen + self.ROW) * ONE / (expected + self.ROW * ONE)
        made = column * factor
        np.minimum(np.maximum(made, 1, out=made), ONE - 1, out=made)
        return made / ONE

    def chances(self, mask: Mask) -> Real:
        """Of every bit of a known mask at once, (R, C)."""
        (rows, columns), bits = mask.shape, mask.astype(np.float64)
        top = np.arange(rows) // self.high * self.high  # the first row of each row's tile
        left = np.arange(columns) // self.wide * self.wide
        above = np.pad(bits.cumsum(0), ((1, 0), (0, 0)))[top]
        column = self.column(above, top[:, None].astype(np.float64))
        seen, expected = (
            np.pad(values.cumsum(1), ((0, 0), (1, 0)))[:, left] for values in (bits, column)
        )
        return self.chance(column, seen, expected)

    def cost(self, mask: Mask) -> float:
        """Bits that the mask takes."""
        chance = self.chances(mask)
        return float(-np.log2(np.where(mask, chance, 1 - chance)).sum())

    def tiles(self, shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
        for top in range(0, shape[0], self.high):
            for left in range(0, shape[1], self.wide):
                yield slice(top, top + self.high), slice(left, left + self.wide)

    def write(self, mask: Mask, coder: Coder) -> None:
        chances, bits, bit = (
            self.chances(mask),
            mask.astype(np.int32),
            model.Bernoulli(perfect=False),
        )
        for place in self.tiles(mask.shape):
            coder.encode(bits[place].ravel(), bit, chances[place].ravel())

    def read(self, shape: tuple[int, int], coder: Coder) -> Mask:
        mask, bit = np.empty(shape, dtype=np.bool_), model.Bernoulli(perfect=False)
        ones = np.zeros(shape[1])
        column = seen = expected = ones
        for down, across in self.tiles(shape):
            if not across.start:
                column = self.column(ones, down.start)
                seen = expected = np.zeros((len(mask[down]), 1))
            chances = self.chance(column[across], seen, expected)
            found = coder.decode(bit, chances.ravel()).reshape(chances.shape)
            mask[down, across] = found
            ones[across] += found.sum(0)
            seen = seen + found.sum(1, keepdims=True)
            expected = expected + column[across].sum()
        return mask
