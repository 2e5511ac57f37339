"""Which positions of logits (B, C, ...) a teacher's loss counts: those that the labels' counts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structopt.losses.checks import whole


def arguments(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a loss takes, by name; a module's stand in its ``forward``, a builtin tells none."""
    inner = function.func if isinstance(function, partial) else function
    try:
        asked = inner.forward if isinstance(inner, nn.Module) else function
        return inspect.signature(asked).parameters
    except (TypeError, ValueError):
        return {}


def ignored(loss: Callable[..., Any]) -> int:
    """The label that a loss leaves out: its ``ignore_index``, and torch's where it names none.

    >>> ignored(nn.CrossEntropyLoss(ignore_index=255)), ignored(nn.MSELoss())
    (255, -100)
    """
    if isinstance(loss, partial):
        named = whole(loss.keywords.get("ignore_index", ignored(loss.func)))
    elif isinstance(loss, nn.Module):
        named = whole(getattr(loss, "ignore_index", None))
    else:
        taken = arguments(loss)
        named = whole(taken["ignore_index"].default if "ignore_index" in taken else None)
    return -100 if math.isnan(named) else int(named)


def counted(logits: Tensor, labels: Any, loss: Callable[..., Any]) -> Tensor | None:
    """(B, ...), true where the label is none that ``loss`` ignores; None where all count.

    An example that has but one label, and that one ignored, is an example still: nobody knows its
    class, and a teacher has something to say. A position (B, ...) without a label is padding.

    >>> counted(torch.zeros(1, 5, 3), torch.tensor([[4, -100, 0]]), nn.CrossEntropyLoss())
    tensor([[ True, False,  True]])
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim < 2:
        return None
    return labels != ignored(loss) if labels.shape == positions(logits) else None


def positions(logits: Tensor) -> torch.Size:
    """(B, ...) of logits (B, C, ...)."""
    return logits.shape[:1] + logits.shape[2:]


def taught(
    teach: Callable[..., Tensor],
    pair: tuple[Tensor, Tensor],
    labels: Any,
    loss: Callable[..., Any],
) -> Tensor:
    """``teach(student, teacher)``; where it can be told (``counts``), of what ``loss`` counts."""
    counts = counted(pair[0], labels, loss) if "counts" in arguments(teach) else None
    return teach(*pair) if counts is None else teach(*pair, counts=counts)


def need_counts(counts: Tensor | None, logits: Tensor) -> None:
    if counts is None:
        return
    if logits.ndim < 2 or counts.dtype != torch.bool or counts.shape != positions(logits):
        raise ValueError(
            f"counts says which positions of logits (B, C, ...) count, bool (B, ...): "
            f"{counts.dtype} {tuple(counts.shape)} does not fit {tuple(logits.shape)}"
        )


def blanked(logits: Tensor, counts: Tensor | None) -> Tensor:
    """Zeros where nothing counts: what stands there, be it NaN, reaches no sum and no gradient."""
    return logits if counts is None else logits.masked_fill(~counts.unsqueeze(1), 0.0)


def over(each: Tensor, counts: Tensor | None) -> Tensor:
    """The mean of numbers (B, ...) over the positions that count."""
    if counts is None:
        return each.mean()
    return each.masked_fill(~counts, 0.0).sum() / counts.sum()
