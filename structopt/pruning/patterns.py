"""Patterns: which weights go together. Frozen values that print themselves.

A pattern pools the scores of a weight into those of its units, (rows, units a row), and spreads
what is kept of the units over the weight. Blocks and N:M read a weight as the matrix that a
channels-last product multiplies: a row for each output, and in it, for each place of the kernel,
all input channels in their order. The weight of a transposed convolution lies the other way round,
(in, out, ...): there rows are inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Pattern(Protocol):
    """What every pattern can do."""

    def pool(self, name: str, scores: Tensor) -> Tensor:
        """The scores of the units, (rows, units a row)."""

    def spread(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """The mask of the weight, from a bool for each unit."""


def need_pattern(pattern: object) -> None:
    if isinstance(pattern, type) or not hasattr(pattern, "pool"):
        raise ValueError(
            f"a pattern is a value such as Unstructured(), NOfM(2, 4), Block(4, 4) or Filters(), "
            f"not {pattern!r}"
        )


@dataclass(frozen=True)
class Unstructured:
    """Every weight by itself."""

    def pool(self, name: str, scores: Tensor) -> Tensor:
        return scores.flatten(1) if scores.ndim > 1 else scores.reshape(-1, 1)

    def spread(self, kept: Tensor, shape: torch.Size) -> Tensor:
        return kept.view(shape)


@dataclass(frozen=True)
class Filters:
    """All weights of an output: the rows of a matrix, the filters of a convolution.

    A mask of filters makes nothing faster: :func:`structopt.pruning.prune_channels` removes them.
    """

    def pool(self, name: str, scores: Tensor) -> Tensor:
        return scores.reshape(len(scores), -1).sum(1)[None]

    def spread(self, kept: Tensor, shape: torch.Size) -> Tensor:
        return kept.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()


@dataclass(frozen=True)
class Block:
    """Blocks of r outputs × c input channels, at one place of the kernel (Gray et al., 2017)."""

    r: int
    c: int

    def __post_init__(self) -> None:
        if not all(isinstance(n, int) and n >= 1 for n in (self.r, self.c)):
            raise ValueError(f"{self}: a block has at least one row and one column, whole numbers")

    def pool(self, name: str, scores: Tensor) -> Tensor:
        if scores.ndim < 2:
            raise ValueError(f"{self} takes matrices, {name} has shape {tuple(scores.shape)}")
        matrix, (r, c) = _matrix(scores), (self.r, self.c)
        if len(matrix) % r or scores.shape[1] % c:
            raise ValueError(
                f"{self} does not divide {name}: {len(matrix)} outputs × {scores.shape[1]} input "
                f"channels. Leave it out, score(..., leave=[{name!r}]), or take another block"
            )
        return matrix.view(len(matrix) // r, r, -1, c).sum((1, 3))

    def spread(self, kept: Tensor, shape: torch.Size) -> Tensor:
        matrix = kept.repeat_interleave(self.r, 0).repeat_interleave(self.c, 1)
        return _weight(matrix, shape)


@dataclass(frozen=True)
class NOfM:
    """n weights stay of every m neighbours along the input channels: ``NOfM(2, 4)``, "2:4".

    The sparsity is 1 - n/m in each group, so that none is asked for. GPUs multiply 2:4 matrices up
    to twice as fast (Mishra et al., 2021).
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        whole = isinstance(self.n, int) and isinstance(self.m, int)
        if not whole or not 1 <= self.n < self.m:
            raise ValueError(f"{self}: n of m stay, whole numbers with 1 <= n < m")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def pool(self, name: str, scores: Tensor) -> Tensor:
        if scores.ndim < 2 or scores.shape[1] % self.m:
            raise ValueError(
                f"{self} does not divide {name}: groups of {self.m} along its input channels, of "
                f"which there are {scores.shape[1] if scores.ndim > 1 else 1}. Leave it out, "
                f"score(..., leave=[{name!r}])"
            )
        return _matrix(scores).reshape(-1, self.m)

    def spread(self, kept: Tensor, shape: torch.Size) -> Tensor:
        return _weight(kept.view(shape[0], -1), shape)


def _matrix(weight: Tensor) -> Tensor:
    """(out, in, *kernel) as (out, kernel places · in)."""
    return weight.movedim(1, -1).reshape(len(weight), -1)


def _weight(matrix: Tensor, shape: torch.Size) -> Tensor:
    """`_matrix` undone."""
    return matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
