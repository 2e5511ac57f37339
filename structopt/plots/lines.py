"""Figures made of lines and bars: curves with spread, histories, comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from structopt.plots.palette import CARD, COLOURS, INK, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Numbers = Tensor | Sequence[float] | Sequence[Sequence[float]] | float


def axes_or_new(axes: Axes | None) -> Axes:
    """The given axes, or those of a new figure."""
    if axes is not None:
        return axes
    import matplotlib.pyplot as plt

    return plt.subplots()[1]


def beside(
    axes: Axes, text: str, point: tuple[float, float], shift: tuple[float, float], ink: str
) -> None:
    """Write `text` beside a point, shifted by so many typographic points."""
    axes.annotate(
        text,
        point,
        shift,
        textcoords="offset points",
        fontsize=9.5,
        color=ink,
        va="center",
        zorder=4,
    )


def numbers(values: Numbers) -> Tensor:
    """Values of any kind as doubles on the CPU, where matplotlib draws."""
    if isinstance(values, Tensor):
        return values.detach().cpu().double()
    return torch.as_tensor(values, dtype=torch.float64)


def mean_and_spread(values: Numbers, label: str, dims: int) -> tuple[Tensor, Tensor]:
    """Mean and sample standard deviation over the first dimension, if there is one to average.

    `dims` is the number of dimensions of one run; one more means several runs (seeds).
    """
    runs = numbers(values)
    if runs.ndim == dims:
        return runs, torch.zeros_like(runs)
    if runs.ndim != dims + 1 or len(runs) == 0:
        shape = tuple(runs.shape)
        raise ValueError(
            f"{label!r} has shape {shape}: give {dims} dimension(s) for one run, or one more, "
            "the first over the runs"
        )
    return runs.mean(0), runs.std(0) if len(runs) > 1 else torch.zeros_like(runs[0])


def curves(x: Numbers, runs: Mapping[str, Numbers], axes: Axes | None = None) -> Axes:
    """Lines over `x`; several runs of a line are drawn as their mean in a band of ± one deviation.

    Args:
        x: positions, shape (n,).
        runs: label to values of shape (n,), or (seeds, n). A label that names a role of
            `COLOURS` is drawn in its colour.
        axes: where to draw; a new figure by default.

    Raises:
        ValueError: values that do not fit `x`.

    Example:
        >>> axes = curves([0, 1, 2], {"pruned": [[3, 2, 1], [3, 1, 2]], "scratch": [3, 3, 2]})
        >>> [line.get_label() for line in axes.lines]
        ['pruned', 'scratch']
    """
    axes = axes_or_new(axes)
    at = numbers(x)
    for number, (label, values) in enumerate(runs.items()):
        mean, spread = mean_and_spread(values, label, 1)
        if mean.shape != at.shape:
            raise ValueError(f"{label!r} has {len(mean)} values for {len(at)} positions x")
        line = colour(label, number)
        if bool((spread > 0).any()):
            axes.fill_between(at, mean - spread, mean + spread, color=line, alpha=0.18, linewidth=0)
        axes.plot(at, mean, color=line, label=label)
    if len(runs) > 1:
        axes.legend()
    return axes


def bars(
    values: Mapping[str, Numbers], axes: Axes | None = None, *, digits: int = 1, unit: str = ""
) -> Axes:
    """Horizontal bars, each with its number; several runs become mean and an error bar.

    Args:
        values: label to a number, or to one number for each run.
        axes: where to draw; a new figure by default.
        digits: decimals of the number beside each bar.
        unit: printed after the number.

    Example:
        >>> axes = bars({"dense": 90.0, "pruned": [88.0, 89.0]}, unit=" %")
        >>> [text.get_text() for text in axes.texts]
        ['90.0 %', '88.5 ± 0.7 %']
    """
    axes = axes_or_new(axes)
    reach = 0.0
    for number, (label, given) in enumerate(values.items()):
        mean, spread = (float(part) for part in mean_and_spread(given, label, 0))
        axes.barh([label], [mean], height=0.62, color=colour(label, number))
        text = f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else "") + unit
        if spread:
            for ink, width in ((CARD, 4.5), (INK, 1.8)):  # seen on dark and on light bars
                axes.errorbar([mean], [number], xerr=spread, color=ink, linewidth=width)
        beside(axes, text, (mean + spread, number), (6, 0), INK)
        reach = max(reach, mean + spread)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(right=reach * 1.28)  # room for the numbers
    return axes


def history(history: Any, axes: Axes | None = None) -> Axes:
    """Training loss by step (left) and, where there is one, validation by epoch (right).

    Args:
        history: anything with `losses` (one a step) and `validation` (one number or one dict of
            numbers an epoch; may be empty). Its `ends`, if any, are the steps where epochs ended.
        axes: where to draw; a new figure by default.

    Raises:
        ValueError: an empty history.

    Example:
        >>> from types import SimpleNamespace
        >>> run = SimpleNamespace(losses=[2.0, 1.0, 0.7, 0.5], validation=[0.6, 0.8])
        >>> history(run).get_ylabel()
        'training loss'
    """
    losses = torch.as_tensor(history.losses, dtype=torch.float64)
    if losses.numel() == 0:
        raise ValueError("the history is empty: no step was taken")
    axes = axes_or_new(axes)
    steps = torch.arange(1, len(losses) + 1)
    axes.plot(steps.numpy(), losses.numpy(), color=COLOURS["train"], alpha=0.3, linewidth=1)
    width = max(1, len(losses) // 50)
    smooth = losses.unfold(0, width, 1).mean(1)  # a running mean over the last `width` steps
    axes.plot(steps[width - 1 :].numpy(), smooth.numpy(), color=COLOURS["train"])
    axes.set(xlabel="step", ylabel="training loss")
    axes.yaxis.label.set_color(COLOURS["train"])
    if len(history.validation):
        ends = list(getattr(history, "ends", ()))[: len(history.validation)]
        if len(ends) < len(history.validation):  # not told: epochs of one length
            ends = torch.linspace(0, len(losses), len(history.validation) + 1)[1:].tolist()
        _validation(history.validation, ends, axes)
    return axes


def _validation(values: Sequence[Any], at: Sequence[float], axes: Axes) -> None:
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    rows = [v if isinstance(v, Mapping) else {"validation": v} for v in values]
    names = list(dict.fromkeys(name for row in rows for name in row))
    for number, name in enumerate(names):
        line = ["-", "--", ":", "-."][number % 4]
        ys = [float(row.get(name, math.nan)) for row in rows]
        right.plot(at, ys, line, marker="o", color=COLOURS["validation"], label=name)
    right.set_ylabel(", ".join(names), color=COLOURS["validation"])
    if len(names) > 1:
        right.legend(loc="center right")


def histogram(values: Tensor, axes: Axes | None = None, *, bins: int = 60) -> Axes:
    """How values are spread; zeros, and what is not finite, are counted apart and said in words.

    Args:
        values: any tensor, a layer's weights for example.
        axes: where to draw; a new figure by default.
        bins: number of bins.

    Raises:
        ValueError: no values, or complex ones.

    Example:
        >>> histogram(torch.tensor([0.0, 0.0, 1.0, -1.0])).texts[0].get_text()
        '50.0 % are exactly zero'
    """
    if values.is_complex():
        raise ValueError("complex values have no order: give values.abs(), or one part of them")
    flat = numbers(values).flatten()
    if flat.numel() == 0:
        raise ValueError("there are no values to draw")
    axes = axes_or_new(axes)
    finite = flat[flat.isfinite()]
    rest = finite[finite != 0]
    axes.hist(rest.numpy(), bins=bins, color=COLOURS["pruned"])
    axes.set_ylabel("how many")
    zeros, lost = len(finite) - len(rest), len(flat) - len(finite)
    words = [f"{100 * zeros / len(flat):.1f} % are exactly zero"] if zeros else []
    words += [f"{100 * lost / len(flat):.1f} % are NaN or infinite"] if lost else []
    if zeros:
        axes.axvline(0, color=INK, linewidth=1.5, linestyle="--")
    if words:
        box = {"facecolor": CARD, "edgecolor": "none", "pad": 2}
        axes.text(0.02, 0.95, "\n".join(words), transform=axes.transAxes, va="top", bbox=box)
    return axes
