"""Figures that judge: trade-offs, rooflines, reliability."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from structopt.plots.lines import axes_or_new, beside
from structopt.plots.palette import CARD, COLOURS, FAINT, INK, colour, marker

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def tradeoff(
    rows: Iterable[Mapping[str, Any]],
    x: str,
    y: str,
    axes: Axes | None = None,
    *,
    label: str = "model",
    higher_is_better: bool = True,
) -> Axes:
    """Cost against quality: one point a row, and the front of those that none other beats.

    A point is on the front if no other costs less (or the same) and is better (or the same),
    one of the two strictly. One with a NaN, of a run that diverged, neither is nor beats another.

    Args:
        rows: `Table.rows`, or any dicts. A value with an attribute `spread` gets an error bar.
        x: name of the cost, lower is better. Drawn on a logarithmic scale if it spans tenfold.
        y: name of the quality.
        axes: where to draw; a new figure by default.
        label: name of the column with the points' names, written beside them.
        higher_is_better: whether more of `y` is better.

    Raises:
        ValueError: no rows, or a row that lacks a column.

    Example:
        >>> rows = [{"model": "dense", "KB": 9.0, "accuracy": 0.9},
        ...         {"model": "pruned", "KB": 3.0, "accuracy": 0.8}]
        >>> tradeoff(rows, "KB", "accuracy").get_xlabel()
        'KB'
    """
    rows = list(rows)
    for row in rows:
        missing = [name for name in (x, y, label) if row.get(name) is None]
        if missing:
            raise ValueError(f"row {dict(row)} has no value for {missing}")
    if not rows:
        raise ValueError("there are no rows to draw")
    axes = axes_or_new(axes)
    points = [(float(row[x]), float(row[y])) for row in rows]
    _front(points, axes, higher_is_better)
    for number, (row, point) in enumerate(zip(rows, points, strict=True)):
        name = str(row[label])
        shape, fill = marker(name, number), colour(name, number)
        across, up = (getattr(row[column], "spread", None) for column in (x, y))
        axes.errorbar(*point, up, across, fmt=shape, color=fill, markersize=8, capsize=3, zorder=3)
        beside(axes, name, point, (7, 9), fill)
    costs = [cost for cost, _ in points if not math.isnan(cost)]
    if costs and min(costs) > 0 and max(costs) >= 10 * min(costs):
        axes.set_xscale("log")
    axes.margins(x=0.18, y=0.15)
    axes.set(xlabel=x, ylabel=y)
    return axes


def _front(points: list[tuple[float, float]], axes: Axes, higher_is_better: bool) -> None:
    sign = 1 if higher_is_better else -1
    best: list[tuple[float, float]] = []
    known = [point for point in points if not any(map(math.isnan, point))]
    for cost, quality in sorted(known, key=lambda p: (p[0], -sign * p[1])):
        if not best or sign * quality > sign * best[-1][1]:
            best.append((cost, quality))
    costs, qualities = zip(*best, strict=True) if best else ((), ())
    axes.step(costs, qualities, where="post", color=FAINT, linewidth=1.2, zorder=1)


def roofline(
    peak: float,
    bandwidth: float,
    points: Mapping[str, tuple[float, float]],
    axes: Axes | None = None,
) -> Axes:
    """What limits an operation: arithmetic (the flat roof) or memory (the slope).

    The roof is min(peak, bandwidth × intensity). Williams, Waterman and Patterson, 2009.

    Args:
        peak: FLOP/s of the machine.
        bandwidth: bytes/s of its memory.
        points: label to (intensity in FLOP per byte moved, FLOP/s reached).
        axes: where to draw; a new figure by default.

    Raises:
        ValueError: a number that is not positive.

    Example:
        >>> roofline(1e11, 1e10, {"linear": (100.0, 8e10)}).get_xlabel()
        'FLOP per byte moved'
    """
    numbers = [peak, bandwidth, *(value for point in points.values() for value in point)]
    if not all(number > 0 for number in numbers):
        raise ValueError(f"a roofline needs numbers above zero, given {numbers}")
    axes = axes_or_new(axes)
    ridge = peak / bandwidth
    reach = [ridge, *(intensity for intensity, _ in points.values())]
    left, right = min(reach) / 4, max(reach) * 8
    roof = [left * bandwidth, peak, peak]
    axes.loglog([left, ridge, right], roof, color=INK)
    axes.fill_between([left, ridge, right], roof, roof[0] / 1e3, color=FAINT, alpha=0.12)
    axes.axvline(ridge, color=FAINT, linestyle=":", linewidth=1.2)
    for number, (label, point) in enumerate(points.items()):
        fill = colour(label, number)
        axes.plot(*point, marker=marker(label, number), color=fill, markersize=8)
        beside(axes, label, point, (8, -12), fill)
    low = min([roof[0], *(reached for _, reached in points.values())])
    axes.set(xlim=(left, right), ylim=(low / 3, peak * 2.5))
    axes.set(xlabel="FLOP per byte moved", ylabel="FLOP per second")
    return axes


def reliability(
    logits: Tensor, targets: Tensor, axes: Axes | None = None, *, bins: int = 15
) -> Axes:
    """Confidence against accuracy: a calibrated network's bars end on the diagonal.

    Guo et al., On Calibration of Modern Neural Networks, 2017. The stronger a bar's colour, the
    more examples it holds.

    Args:
        logits: (N, classes).
        targets: class numbers, (N,).
        axes: where to draw; a new figure by default.
        bins: number of equal bins of confidence.

    Raises:
        ValueError: shapes that do not fit, logits that are NaN, targets that are no class.

    Example:
        >>> axes = reliability(torch.eye(3) * 5, torch.tensor([0, 1, 1]))
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('confidence', 'accuracy')
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or len(logits) == 0:
        shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"logits and targets have shapes {shapes}, not (N, classes) and (N,)")
    if logits.isnan().any() or ((targets < 0) | (targets >= logits.shape[1])).any():
        raise ValueError("logits are NaN, or targets are no class: leave such examples out")
    axes = axes_or_new(axes)
    confidence, chosen = logits.detach().float().softmax(1).max(1)
    right = (chosen == targets).float().cpu()
    number = (confidence.cpu() * bins).ceil().long().clamp(1, bins) - 1  # bins are (low, high]
    count = torch.bincount(number, minlength=bins).float()
    hits = torch.bincount(number, weights=right, minlength=bins)
    strength = 0.25 + 0.75 * count / count.max()
    for k in range(bins):
        if count[k]:
            shade = (COLOURS["validation"], strength[k].item())
            height = (hits[k] / count[k]).item()
            axes.bar(k / bins, height, 1 / bins, align="edge", color=shade, edgecolor=CARD)
    axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1.2)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    return axes
