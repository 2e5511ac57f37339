"""Coupled channels as a picture: a row for each layer, a line for each group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from structopt import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from structopt.channels.explain import Explanation, Tied

_FROZEN = "#75756f"  # grey of 4.5:1 against the card
_COLOURS = plots.PALETTE[:-1]  # its last is a grey too
_MOST = 400  # rows of a figure that still fits a screen or two

# How the mark of a role differs from the others with no need of colour.
_MARKS: dict[str, tuple[str, dict[str, Any]]] = {
    "makes": ("makes the channels", {"marker": "o", "markersize": 8}),
    "passes": ("passes them on (norm, bias)", {"marker": "o", "markersize": 3.5}),
    "reads": ("reads them", {"marker": "o", "markersize": 8, "markerfacecolor": plots.CARD}),
}


def draw(explanation: Explanation, layers: str = "") -> Figure:
    """See `Explanation.draw`."""
    import matplotlib.pyplot as plt

    rows = {n: k for k, n in enumerate(n for n in explanation.layers if n.startswith(layers))}
    if not rows or len(rows) > _MOST:
        raise ValueError(
            f"{len(rows)} layers have names that start with {layers!r}: choose 1 to {_MOST} by "
            f"`layers`, the start of a name such as {explanation.layers[-1]!r}"
            if explanation.layers
            else "the model has no layers with weights"
        )
    drawn = [g for g in (*explanation.free, *explanation.frozen) if _is_shown(g, rows)]
    drawn.sort(key=lambda g: _span(g, rows))
    columns, colours = _columns(drawn, rows), _colours(drawn, rows)
    with plots.style():
        figure, axes = plt.subplots(figsize=(6.4, 0.26 * len(rows) + 0.9))
        _rows(axes, list(rows), max(columns, default=0))
        for group, column, colour in zip(drawn, columns, colours, strict=True):
            _line(axes, group, column, colour, rows)
        _legend(axes, any(g.frozen for g in drawn))
    return figure


def _is_shown(group: Tied, rows: dict[str, int]) -> bool:
    """Whether it meets the rows; of what is frozen, sizes of kernels are left out."""
    width = not group.frozen or (group.size > 1 and any(p.dim < 2 for p in group.places))
    return width and any(p.layer in rows for p in group.places)


def _span(group: Tied, rows: dict[str, int]) -> tuple[int, int]:
    at = [rows[p.layer] for p in group.places if p.layer in rows]
    return min(at), max(at)


def _columns(groups: Sequence[Tied], rows: dict[str, int]) -> list[int]:
    """The leftmost column in which no earlier group is in the way of each."""
    ends: list[int] = []
    chosen = []
    for first, last in (_span(group, rows) for group in groups):
        free = [k for k, end in enumerate(ends) if end < first]
        column = free[0] if free else len(ends)
        ends[column : column + 1] = [last]
        chosen.append(column)
    return chosen


def _colours(groups: Sequence[Tied], rows: dict[str, int]) -> list[str]:
    """Grey for what is frozen; else the colour least used by the groups beside."""
    chosen: list[str] = []
    for n, group in enumerate(groups):
        first, last = _span(group, rows)
        beside = [
            colour
            for other, colour in zip(groups, chosen, strict=False)
            if _span(other, rows)[1] >= first - 1 and _span(other, rows)[0] <= last + 1
        ]
        order = [_COLOURS[(n + k) % len(_COLOURS)] for k in range(len(_COLOURS))]
        chosen.append(_FROZEN if group.frozen else min(order, key=beside.count))
    return chosen


def _rows(axes: Axes, names: list[str], last: int) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.4, -0.7), xlim=(-0.4, max(last + 1.0, 3.5)), xticks=[])
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False, axis="x")


def _line(axes: Axes, group: Tied, column: int, colour: str, rows: dict[str, int]) -> None:
    """A line from the first to the last layer that it ties; it runs on where rows are left out."""
    first, last = _span(group, rows)
    style = ":" if group.frozen else "-"
    axes.plot([column] * 2, [first, last], color=colour, linestyle=style, linewidth=2.2)
    for role in ("reads", "makes", "passes"):
        at = sorted({rows[p.layer] for p in group.places if p.layer in rows and p.role == role})
        look: dict[str, Any] = {
            "linestyle": "",
            "color": colour,
            "markeredgewidth": 1.8,
            **_MARKS[role][1],
        }
        axes.plot([column] * len(at), at, **look)
    axes.annotate(
        f"{group.size:,}", (column, first), (7, 0), textcoords="offset points", color=colour,
        fontsize=9, va="center", fontweight="normal" if group.frozen else "bold",
    )  # fmt: skip


def _legend(axes: Axes, frozen: bool) -> None:
    for words, look in _MARKS.values():
        axes.plot([], [], color=plots.INK, linestyle="", label=words, **look)
    if frozen:
        look = {"linestyle": ":", "marker": "o", "markersize": 8, "label": "frozen"}
        axes.plot([], [], color=_FROZEN, linewidth=2.2, **look)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=9)
