"""Which channels belong together: equal groups that keep the most weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from structopt.losses.checks import need_values, whole

Reals = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Edge = tuple[int, int, Reals]  # the set of outputs, the set of inputs, squared weights (O, I)


@dataclass(frozen=True, eq=False)
class Assignment:
    """The group of each input and of each output of a layer, and the share of Σw² that stays."""

    inputs: Numbers
    outputs: Numbers
    kept: float


def assign_groups(weight: Tensor, groups: int, *, seed: int = 0) -> Assignment:
    """Split inputs and outputs of a layer into equal groups that keep the most weight.

    Maximises Σ w² over the weights whose input and output fall into the same group. In turn, the
    outputs are assigned given the inputs and the inputs given the outputs, each time to the best
    balanced assignment there is; from several starts, among them the given order and the leading
    eigenvectors, which find blocks that are there, under noise too (Dhillon, 2001, "Co-clustering
    documents and words"). Never worse than the given order; a matrix that is block-diagonal up to
    the order of rows and columns loses nothing.

    `weight` is (out, in, …), as of ``nn.Linear`` and ``nn.Conv2d``. Raises ValueError where the
    groups do not divide its sizes, and for weights that are not finite.

    >>> import torch
    >>> weight = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    >>> found = assign_groups(weight, 2)
    >>> found.kept, bool(found.inputs[0] == found.inputs[2] == found.outputs[0])
    (1.0, True)
    """
    sizes = tuple(weight.shape[:2])
    if (
        not whole(groups) >= 2
        or weight.ndim < 2
        or any(size % groups or not size for size in sizes)
    ):
        raise ValueError(
            f"{groups} groups do not split a weight of shape {tuple(weight.shape)}: give a number "
            "from 2 on that divides outputs and inputs"
        )
    squares = squared(weight)
    (outputs, inputs), kept = partition(sizes, [(0, 1, squares)], groups, seed=seed)
    return Assignment(inputs, outputs, kept / max(float(squares.sum()), 1e-300))


def squared(weight: Tensor) -> Reals:
    """Σ w² over the kernel, (out, in)."""
    need_values("the choice of groups", [weight])
    squares = weight.detach().cpu().double().square()
    if not squares.isfinite().all():
        raise ValueError("the weight holds numbers that are not finite, or too large to square")
    found: Reals = squares.reshape(*squares.shape[:2], -1).sum(2).numpy()
    return found


def partition(
    sizes: Sequence[int], edges: Sequence[Edge], groups: int, *, seed: int = 0
) -> tuple[list[Numbers], float]:
    """For several sets of channels at once, joined by the layers between them."""
    best, most = list[Numbers](), -1.0
    whole = sum(float(squares.sum()) for _, _, squares in edges)
    for start in _starts(sizes, edges, groups, np.random.default_rng(seed)):
        found = _improved(start, edges, groups)
        kept = sum(_kept(found, edge) for edge in edges)
        if kept > most * (1 + 1e-12):
            best, most = found, kept
        if most >= whole * (1 - 1e-12):
            break  # nothing is lost
    return best, most


def _kept(found: Sequence[Numbers], edge: Edge) -> float:
    out, into, squares = edge
    return float(squares[found[out][:, None] == found[into][None, :]].sum())


def _improved(start: list[Numbers], edges: Sequence[Edge], groups: int) -> list[Numbers]:
    """Each set in turn is assigned anew, given all others, until nothing is gained."""
    found, gained = list(start), True
    while gained:
        gained = False
        for n in range(len(found)):
            mine = [edge for edge in edges if n in edge[:2]]
            score = np.zeros((len(found[n]), groups))
            for out, into, squares in mine:
                if out == n:
                    score += squares @ np.eye(groups)[found[into]]
                if into == n:
                    score += squares.T @ np.eye(groups)[found[out]]
            trial = [*found[:n], balanced(score, found[n]), *found[n + 1 :]]
            before, after = (sum(_kept(f, edge) for edge in mine) for f in (found, trial))
            if after > before * (1 + 1e-12):
                found, gained = trial, True
    return found


def balanced(scores: Reals, start: Numbers) -> Numbers:
    """The assignment of most score among those with as many members in each group as `start`.

    A transportation problem. Moves along a cycle of groups keep their sizes; where no cycle gains,
    the assignment is the best there is (Klein, 1967).
    """
    found, groups = start.copy(), scores.shape[1]
    small = 1e-12 * max(float(np.abs(scores).max()), 1e-300)
    gain = np.full((groups, groups), -np.inf)
    who = np.zeros((groups, groups), np.int64)
    changed = list(range(groups))
    while True:
        for a in changed:
            members = np.flatnonzero(found == a)
            moves = scores[members] - scores[members, a][:, None]
            who[a], gain[a] = members[moves.argmax(0)], moves.max(0)
            gain[a, a] = -np.inf
        cycle = _gaining_cycle(gain, small)
        if not cycle:
            return found
        for a, b in cycle:
            found[who[a, b]] = b
        changed = [a for a, _ in cycle]


def _gaining_cycle(gain: Reals, small: float) -> list[tuple[int, int]]:
    """A cycle of positive sum in a graph, by Bellman and Ford; empty where there is none."""
    total, before = np.zeros(len(gain)), np.full(len(gain), -1)
    for _ in range(len(gain) + 1):
        through = total[:, None] + gain
        most = through.max(0)
        better = most > total + small
        if not better.any():
            return []
        before = np.where(better, through.argmax(0), before)
        total = np.where(better, most, total)
    node = int(np.flatnonzero(better)[0])
    for _ in gain:
        node = int(before[node])
    cycle, end = [(int(before[node]), node)], node
    while cycle[-1][0] != end:
        node = cycle[-1][0]
        cycle.append((int(before[node]), node))
    return cycle


def _starts(
    sizes: Sequence[int], edges: Sequence[Edge], groups: int, draw: np.random.Generator
) -> Iterator[list[Numbers]]:
    yield [_blocks(np.arange(size), groups) for size in sizes]
    vectors = _leading(sizes, edges, groups, draw)
    for _ in range(4):
        mix = draw.standard_normal(groups)
        yield [_blocks((v @ mix).argsort(kind="stable"), groups) for v in vectors]
    for _ in range(4):
        yield _clustered(vectors, groups, draw)
    for _ in range(2):
        yield [_blocks(draw.permutation(size), groups) for size in sizes]


def _clustered(vectors: Sequence[Reals], groups: int, draw: np.random.Generator) -> list[Numbers]:
    """Balanced k-means: channels with like directions in the leading vectors lie together."""
    rows = [v / np.linalg.norm(v, axis=1, keepdims=True).clip(1e-300) for v in vectors]
    every = np.concatenate(rows)
    centres = [every[draw.integers(len(every))]]
    while len(centres) < groups:  # the row that is farthest from those chosen
        centres.append(every[(every @ np.array(centres).T).max(1).argmin()])
    found = [_blocks(np.arange(len(v)), groups) for v in rows]
    for _ in range(8):
        found = [balanced(v @ np.array(centres).T, a) for v, a in zip(rows, found, strict=True)]
        together = np.concatenate(found)
        centres = [every[together == k].mean(0) for k in range(groups)]
    return found


def _blocks(order: Numbers, groups: int) -> Numbers:
    """The first so many in this order are group 0, the next group 1, …"""
    found = np.empty(len(order), np.int64)
    found[order] = np.arange(len(order)) * groups // len(order)
    return found


def _leading(
    sizes: Sequence[int], edges: Sequence[Edge], count: int, draw: np.random.Generator
) -> list[Reals]:
    """Leading vectors of the normalised graph of channels: equal within a block that stands alone.

    By subspace iteration, since there may be thousands of channels.
    """
    degree = [np.full(size, 1e-300) for size in sizes]
    for out, into, squares in edges:
        degree[out] += squares.sum(1)
        degree[into] += squares.sum(0)
    root = [1 / np.sqrt(d) for d in degree]
    bounds = np.cumsum(sizes)[:-1]
    vectors = draw.standard_normal((sum(sizes), count))
    for _ in range(60):
        vectors = np.linalg.qr(vectors)[0]
        parts = [v * r[:, None] for v, r in zip(np.split(vectors, bounds), root, strict=True)]
        spread = [np.zeros_like(p) for p in parts]
        for out, into, squares in edges:
            spread[out] += squares @ parts[into]
            spread[into] += squares.T @ parts[out]
        joined = np.concatenate([s * r[:, None] for s, r in zip(spread, root, strict=True)])
        vectors = (vectors + joined) / 2
    split = np.split(np.linalg.qr(vectors)[0], bounds)
    return [v * r[:, None] for v, r in zip(split, root, strict=True)]
