"""Figures made of fields: surfaces with paths, image grids, masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from structopt.plots.lines import axes_or_new
from structopt.plots.palette import COLOURS, colour, marker

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def surface(
    function: Callable[[Tensor], Tensor],
    paths: Mapping[str, Tensor] | None = None,
    axes: Axes | None = None,
    *,
    x: tuple[float, float] = (-2.0, 2.0),
    y: tuple[float, float] = (-2.0, 2.0),
) -> Axes:
    """Level lines of a function of two variables, and paths that walk on it.

    Dark is high. The levels are even in rank, not in height: a narrow valley shows as well as a
    steep wall.

    Args:
        function: takes a tensor of shape (2,), gives a scalar.
        paths: label to points of shape (steps + 1, 2), the first of them the start.
        axes: where to draw; a new figure by default.
        x, y: the part of the plane that is shown.

    Raises:
        ValueError: a path that is not made of points in the plane.

    Example:
        >>> bowl = surface(lambda p: (p**2).sum(), {"gradient": torch.tensor([[1.0, 1], [0, 0]])})
        >>> bowl.get_legend_handles_labels()[1]
        ['gradient']
    """
    for label, path in (paths or {}).items():
        if path.ndim != 2 or path.shape[1] != 2:
            raise ValueError(f"path {label!r} has shape {tuple(path.shape)}, not (steps + 1, 2)")
    from matplotlib.colors import LinearSegmentedColormap

    axes = axes_or_new(axes)
    across, up = torch.linspace(*x, 81), torch.linspace(*y, 81)
    with torch.no_grad():
        heights = torch.stack([function(torch.stack([a, b])) for b in up for a in across])
    grid = heights.reshape(81, 81).double().cpu()
    ranks = torch.linspace(0, 1, 16, dtype=torch.float64)
    finite = grid[grid.isfinite()]
    levels = sorted(set(finite.quantile(ranks).tolist())) if len(finite) else []
    if len(levels) > 1:
        shades = LinearSegmentedColormap.from_list("height", ["#fdfdfb", "#aebccb"], len(levels))
        colours = shades(range(len(levels) - 1))
        axes.contourf(across, up, grid, levels=levels, colors=colours)
        axes.contour(across, up, grid, levels=levels, colors="#8797a8", linewidths=0.6)
    for number, (label, path) in enumerate((paths or {}).items()):
        walk = path.detach().cpu().numpy()
        line, shape = colour(label, number), marker(label, number)
        axes.plot(*walk.T, color=line, marker=shape, markersize=3.5, linewidth=1.4, label=label)
        axes.plot(*walk[0], marker="o", color="white", markeredgecolor=line, markersize=8)
    axes.set(xlim=x, ylim=y)
    axes.grid(visible=False)
    if paths:
        axes.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none")
    return axes


def images(
    tensor: Tensor,
    labels: Sequence[str] | None = None,
    axes: Axes | None = None,
    *,
    columns: int = 8,
) -> Axes:
    """A grid of images in one picture, each with its label beneath.

    Args:
        tensor: (N, H, W), (N, 1, H, W) or (N, 3, H, W). All images share one scale of
            brightness, from the smallest to the largest value.
        labels: one for each image.
        axes: where to draw; a new figure by default.
        columns: images in a row.

    Raises:
        ValueError: a tensor of another shape, or labels that do not fit.

    Example:
        >>> images(torch.rand(3, 1, 4, 4), ["a", "b", "c"]).texts[2].get_text()
        'c'
    """
    shape = tuple(tensor.shape)
    stack = tensor[:, None] if tensor.ndim == 3 else tensor
    if stack.ndim != 4 or stack.shape[1] not in (1, 3) or len(stack) == 0:
        raise ValueError(f"images have shape {shape}, not (N, H, W), (N, 1, H, W) or (N, 3, H, W)")
    if labels is not None and len(labels) != len(stack):
        raise ValueError(f"{len(labels)} labels for {len(stack)} images")
    stack = stack.detach().float().cpu()
    finite = stack[stack.isfinite()]  # one NaN would leave no scale for all the others
    low, high = finite.aminmax() if len(finite) else (stack.new_zeros(()), stack.new_ones(()))
    stack = (stack - low) / (high - low).clamp(min=1e-12)
    count, channels, height, width = stack.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    gap = 0.12 * height
    if axes is None:
        import matplotlib.pyplot as plt

        text = 0.28 if labels is not None else 0.0
        size = 6.4 / columns * height / width
        axes = plt.subplots(figsize=(6.4, max(0.8, rows * (size + text) + 0.1)))[1]
        gap = text / size * height + gap * 0.5
    for number, image in enumerate(stack.permute(0, 2, 3, 1)):
        left = number % columns * width * 1.08
        bottom = -(number // columns) * (height + gap)
        box = (left, left + width, bottom - height, bottom)
        axes.imshow(
            image.numpy().squeeze(-1) if channels == 1 else image.numpy(),
            cmap="gray",
            vmin=0,
            vmax=1,
            extent=box,
            interpolation="nearest",
        )
        if labels is not None:
            spot = (left + width / 2, bottom - height - 0.03 * height)
            axes.text(*spot, labels[number], ha="center", va="top", fontsize=8.5)
    axes.set(xlim=(0, columns * width * 1.08 - 0.08 * width), ylim=(-rows * (height + gap), 0))
    axes.set_axis_off()
    return axes


def pattern(mask: Tensor, axes: Axes | None = None) -> Axes:
    """A mask as a picture: dark where the weight stays, empty where it was removed.

    Args:
        mask: boolean, any number of dimensions; the first is drawn downwards, the rest across.
        axes: where to draw; a new figure by default.

    Example:
        >>> pattern(torch.eye(3, dtype=torch.bool)).get_title(loc="left")
        '67 % removed'
    """
    from matplotlib.colors import ListedColormap

    axes = axes_or_new(axes)
    flat = mask.detach().bool().cpu().reshape(mask.shape[0] if mask.ndim else 1, -1)
    colours = ListedColormap(["#e6e6df", COLOURS["pruned"]])
    axes.imshow(flat.numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_title(f"{100 * (1 - flat.float().mean().item()):.0f} % removed", loc="left")
    axes.grid(visible=False)
    return axes
