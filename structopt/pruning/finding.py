"""From scores to masks."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from structopt.losses.checks import need_values, real
from structopt.pruning.patterns import NOfM, Pattern, Unstructured, need_pattern
from structopt.pruning.ranking import (
    Global,
    PerLayer,
    PerRow,
    Scope,
    keys,
    lowest,
    lowest_in_rows,
    need_scope,
    need_sparsity,
    normalised,
    number,
)
from structopt.pruning.scoring import need_numbers, need_scores

Masks = dict[str, Tensor]
"""A bool tensor for each weight, by its name: true where the weight stays."""


def find_masks(
    scores: Mapping[str, Tensor],
    sparsity: float | None = None,
    *,
    pattern: Pattern = Unstructured(),  # noqa: B008 (a frozen value)
    scope: Scope = PerLayer(),  # noqa: B008
    within: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Masks that remove the lowest of ``|scores|``: {"conv1.weight": bool tensor, true = stays}.

    Exactly round(sparsity · n) of the n units of the pattern go: of all units for ``Global()``,
    of each layer for ``PerLayer()``, of each row for ``PerRow()``; halves round to even, and of
    equal scores the first go. ``NOfM(n, m)`` sets the sparsity itself. What is gone in `within`,
    earlier masks, goes first and never comes back, so that masks nest. A block's score is the sum
    of its weights'.

    Raises ValueError for a sparsity outside [0, 1), NaN scores, a pattern that does not divide a
    layer, a layer of which nothing would stay, and masks `within` that are no masks of these.

    >>> scores = {"a": torch.tensor([[4.0, 1.0]]), "b": torch.tensor([[3.0, 2.0]])}
    >>> find_masks(scores, 0.5)
    {'a': tensor([[ True, False]]), 'b': tensor([[ True, False]])}
    """
    need_pattern(pattern)
    need_scope(scope)
    sparsity, scope = settled(sparsity, pattern, scope)
    need_scores(scores)
    if not scores:
        raise ValueError("there are no scores: score(model) gives some")
    ranks, shapes = {}, {}
    for name, one in scores.items():
        need_numbers(name, one)
    common = functools.reduce(torch.promote_types, (one.dtype for one in scores.values()))
    for name, one in scores.items():
        units = pattern.pool(name, one.detach())
        if isinstance(scope, Global):
            units = units.to(common)  # bits of one type compare with no others
            if scope.normalise:
                units = normalised(name, units)
        ranks[name] = keys(units, _alive(name, one, pattern, within))
        shapes[name] = one.shape
    gone = _gone(ranks, sparsity, scope)
    masks = {name: pattern.spread(~gone[name], shapes[name]) for name in ranks}
    if within is not None:  # a unit that stays may hold weights that went one by one
        masks = {
            name: mask & within[name].to(mask.device, mask.dtype) for name, mask in masks.items()
        }
    _need_full(masks, sparsity, scope)
    return masks


def settled(sparsity: float | None, pattern: Pattern, scope: Scope) -> tuple[float, Scope]:
    """Sparsity and scope that go with a pattern: N:M sets both itself."""
    if not isinstance(pattern, NOfM):
        if sparsity is None:
            raise ValueError(f"say which sparsity: {pattern} does not set one")
        need_sparsity(sparsity)
        return sparsity, scope
    if sparsity is not None and not math.isclose(real(sparsity), pattern.sparsity):
        raise ValueError(
            f"{pattern} has sparsity {pattern.sparsity:g}, not {sparsity!r}: leave it out"
        )
    return pattern.sparsity, PerRow()


def _alive(
    name: str, scores: Tensor, pattern: Pattern, within: Mapping[str, Tensor] | None
) -> Tensor | None:
    if within is None:
        return None
    if name not in within or within[name].shape != scores.shape:
        shape = f"has shape {tuple(within[name].shape)}" if name in within else "is missing"
        raise ValueError(f"the masks `within` do not fit: {name} {shape} in them")
    return pattern.pool(name, within[name].to(scores.device, torch.float32)) > 0


def _gone(ranks: dict[str, Tensor], sparsity: float, scope: Scope) -> dict[str, Tensor]:
    if isinstance(scope, PerRow):
        return {n: lowest_in_rows(k, number(sparsity, k.shape[1])) for n, k in ranks.items()}
    if isinstance(scope, PerLayer):
        return {n: lowest([k], number(sparsity, k.numel()))[0] for n, k in ranks.items()}
    if scope.floor:
        ranks = {n: _guarded(k, math.ceil(scope.floor * k.numel())) for n, k in ranks.items()}
    every = list(ranks.values())
    removed = number(sparsity, sum(k.numel() for k in every))
    free = sum(int((k < torch.iinfo(k.dtype).max).sum()) for k in every) if scope.floor else removed
    if removed > free:
        raise ValueError(
            f"floor={scope.floor} leaves {free} to remove, sparsity {sparsity} wants {removed}"
        )
    return dict(zip(ranks, lowest(every, removed), strict=True))


def _guarded(key: Tensor, count: int) -> Tensor:
    """The same keys, the `count` highest above all others; of those that live."""
    rest = lowest([key], key.numel() - count)[0] | (key == 0)
    return torch.where(rest, key, torch.iinfo(key.dtype).max)


def _need_full(masks: Masks, sparsity: float, scope: Scope) -> None:
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        raise ValueError(
            f"sparsity {sparsity:g} would empty {', '.join(empty)}, so that nothing passes any "
            f"more: ask for less, leave it out, or rank with Global(floor=0.01) (now {scope})"
        )


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """The fraction that the masks remove, of all weights that have one.

    >>> sparsity_of({"a": torch.tensor([True, False]), "b": torch.tensor([False, False])})
    0.75
    """
    need_values("a sparsity", masks.values())
    size = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / size if size else 0.0
