"""The figures that chapters and notebooks share. Each draws on the axes given and returns them.

>>> from structopt import plots
>>> with plots.style():
...     axes = plots.curves([1, 2], {"train": [2.0, 1.0], "validation": [2.1, 1.5]})
"""

from structopt.plots.comparisons import reliability, roofline, tradeoff
from structopt.plots.lines import bars, curves, histogram, history
from structopt.plots.palette import (
    CARD,
    COLOURS,
    INK,
    MARKERS,
    PALETTE,
    colour,
    marker,
    role,
    style,
    use_style,
)
from structopt.plots.pictures import images, pattern, surface

__all__ = [
    "CARD",
    "COLOURS",
    "INK",
    "MARKERS",
    "PALETTE",
    "bars",
    "colour",
    "curves",
    "histogram",
    "history",
    "images",
    "marker",
    "pattern",
    "reliability",
    "role",
    "roofline",
    "style",
    "surface",
    "tradeoff",
    "use_style",
]
