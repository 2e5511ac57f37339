"""Kinds of products of smaller layers. Frozen values that print themselves.

A linear weight is read as a convolution of one place, (O, I, 1, 1), and comes back as a matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Ranks = tuple[int, ...]
Parts = list[tuple[Tensor, str]]
"""Weights of the layers of a product, and along which axes each one strides and pads."""


class Form(Protocol):
    """What every kind of product can do; weights are (O, I) or (O, I, kh, kw), in float64."""

    sees_inputs: bool

    def full(self, shape: torch.Size) -> Ranks:
        """The ranks at which it is exact."""

    def numbers(self, shape: torch.Size, ranks: Ranks) -> int:
        """How many weights it has."""

    def spectra(self, weight: Tensor, root: Tensor | None) -> list[Tensor]:
        """The singular values behind each rank."""

    def parts(self, weight: Tensor, ranks: Ranks, root: Tensor | None) -> Parts:
        """The weights of its layers, first to last."""


def _kernel(shape: torch.Size) -> tuple[int, int, int, int]:
    return (shape[0], shape[1], *(shape[2:] or (1, 1)))


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors whose product is the nearest of that rank, each with its share of the size."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    half = s[:rank].sqrt()
    return u[:, :rank] * half, half[:, None] * v[:rank]


@dataclass(frozen=True)
class SVD:
    """r channels between: the layer with r outputs, then O outputs at one place (Eckart, Young).

    With the inputs known, the nearest for these: W L is decomposed, where L Lᵀ is the sum of x xᵀ.
    """

    sees_inputs = True

    def full(self, shape: torch.Size) -> Ranks:
        return (min(shape[0], math.prod(shape[1:])),)

    def numbers(self, shape: torch.Size, ranks: Ranks) -> int:
        return ranks[0] * (shape[0] + math.prod(shape[1:]))

    def spectra(self, weight: Tensor, root: Tensor | None) -> list[Tensor]:
        matrix = weight.detach().double().flatten(1)
        return [torch.linalg.svdvals(matrix if root is None else matrix @ root)]

    def parts(self, weight: Tensor, ranks: Ranks, root: Tensor | None) -> Parts:
        matrix = weight.flatten(1)
        out, into = _svd(matrix if root is None else matrix @ root, ranks[0])
        if root is not None:
            into = torch.linalg.solve_triangular(root, into, upper=False, left=False)
        first = into.view(ranks[0], *weight.shape[1:])
        return [(first, "yx"), (out.view(*out.shape, *[1] * (weight.ndim - 2)), "")]


@dataclass(frozen=True)
class Spatial:
    """A column kernel, kh × 1, to r channels, then a row of 1 × kw (Jaderberg et al., 2014)."""

    sees_inputs = False

    def full(self, shape: torch.Size) -> Ranks:
        o, i, high, wide = _kernel(shape)
        return (min(i * high, o * wide),)

    def numbers(self, shape: torch.Size, ranks: Ranks) -> int:
        o, i, high, wide = _kernel(shape)
        return ranks[0] * (i * high + o * wide)

    def spectra(self, weight: Tensor, root: Tensor | None) -> list[Tensor]:
        return [torch.linalg.svdvals(self._matrix(weight.detach().double()))]

    def parts(self, weight: Tensor, ranks: Ranks, root: Tensor | None) -> Parts:
        o, i, high, wide = _kernel(weight.shape)
        first, last = _svd(self._matrix(weight), ranks[0])
        down = first.T.reshape(ranks[0], i, high, 1)
        across = last.reshape(ranks[0], o, 1, wide).transpose(0, 1)
        if weight.ndim == 2:
            return [(down[..., 0, 0], ""), (across[..., 0, 0], "")]
        return [(down, "y"), (across, "x")]

    def _matrix(self, weight: Tensor) -> Tensor:
        o, i, high, wide = _kernel(weight.shape)
        return weight.reshape(o, i, high, wide).permute(1, 2, 0, 3).reshape(i * high, o * wide)


@dataclass(frozen=True)
class Depthwise:
    """r kernels for each input channel, then O outputs at one place (Guo et al., 2018)."""

    sees_inputs = False

    def full(self, shape: torch.Size) -> Ranks:
        o, _, high, wide = _kernel(shape)
        return (min(o, high * wide),)

    def numbers(self, shape: torch.Size, ranks: Ranks) -> int:
        o, i, high, wide = _kernel(shape)
        return ranks[0] * i * (high * wide + o)

    def spectra(self, weight: Tensor, root: Tensor | None) -> list[Tensor]:
        values = torch.linalg.svdvals(self._slices(weight.detach().double()))  # (I, r)
        return [values.square().sum(0).sqrt()]

    def parts(self, weight: Tensor, ranks: Ranks, root: Tensor | None) -> Parts:
        o, i, high, wide = _kernel(weight.shape)
        if weight.ndim == 2:
            raise ValueError("a linear layer has no kernels to take apart: Depthwise is for Conv2d")
        u, s, v = torch.linalg.svd(self._slices(weight), full_matrices=False)  # (I, O, r), …
        rank, half = ranks[0], s[:, : ranks[0]].sqrt()
        kernels = (half[..., None] * v[:, :rank]).reshape(i * rank, 1, high, wide)
        out = (u[..., :rank] * half[:, None]).permute(1, 0, 2).reshape(o, i * rank, 1, 1)
        return [(kernels, "yx groups"), (out, "")]

    def _slices(self, weight: Tensor) -> Tensor:
        o, i, high, wide = _kernel(weight.shape)
        return weight.reshape(o, i, high * wide).transpose(0, 1)


@dataclass(frozen=True)
class Tucker:
    """r inputs from I, the kernel from r to s channels, O outputs from s (Kim et al., 2016).

    Tucker-2, from the singular vectors of both unfoldings. ``rounds`` refine each for the other.
    """

    rounds: int = 5
    sees_inputs = False

    def full(self, shape: torch.Size) -> Ranks:
        o, i, high, wide = _kernel(shape)
        return (min(i, o * high * wide), min(o, i * high * wide))

    def numbers(self, shape: torch.Size, ranks: Ranks) -> int:
        o, i, high, wide = _kernel(shape)
        into, out = self._of_use(shape, ranks)
        return i * into + into * out * high * wide + out * o

    def spectra(self, weight: Tensor, root: Tensor | None) -> list[Tensor]:
        kernel = weight.detach().double().reshape(_kernel(weight.shape))
        return [torch.linalg.svdvals(kernel.movedim(dim, 0).flatten(1)) for dim in (1, 0)]

    def parts(self, weight: Tensor, ranks: Ranks, root: Tensor | None) -> Parts:
        kernel, ranks = weight.reshape(_kernel(weight.shape)), self._of_use(weight.shape, ranks)
        into, out = _left(kernel, 1, ranks[0]), _left(kernel, 0, ranks[1])
        for _ in range(self.rounds):
            into = _left(torch.einsum("oihw,os->sihw", kernel, out), 1, ranks[0])
            out = _left(torch.einsum("oihw,ir->orhw", kernel, into), 0, ranks[1])
        core = torch.einsum("oihw,os,ir->srhw", kernel, out, into)
        if weight.ndim == 2:
            return [(into.T, ""), (core[..., 0, 0], ""), (out, "")]
        return [(into.T[..., None, None], ""), (core, "yx"), (out[..., None, None], "")]

    def _of_use(self, shape: torch.Size, ranks: Ranks) -> Ranks:
        """A side has no more channels than the other one feeds, at all places of the kernel."""
        places = math.prod(_kernel(shape)[2:])
        return min(ranks[0], ranks[1] * places), min(ranks[1], ranks[0] * places)


def _left(kernel: Tensor, dim: int, rank: int) -> Tensor:
    """The first left singular vectors of an unfolding."""
    u: Tensor = torch.linalg.svd(kernel.movedim(dim, 0).flatten(1), full_matrices=False)[0]
    return u[:, :rank]
