"""Colours with a meaning: the same thing has the same colour in the whole book."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

CARD = "#fafaf7"  # every figure is a soft card, so that it reads on white and on dark pages alike
INK = "#2b2b33"
FAINT = "#8b8b86"

# Found by search: at least 3:1 against the card, and far apart for all kinds of colour vision.
COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "dense": "#1d1a4b",  # the network before anything was done to it
        "pruned": "#2f5fe0",
        "distilled": "#f2561a",
        "sliced": "#259c72",
        "quantised": "#8a1c9c",
        "grown": "#a83c00",
        "scratch": "#75687a",  # the small network trained from scratch: first baseline
        "random": "#5a2e24",  # a random choice in place of the criterion: second baseline
        "train": "#1f87a8",
        "validation": "#c4266e",
    }
)
"""Role to colour. A label that contains a role as a word is drawn in the role's colour."""

MARKERS: Mapping[str, str] = MappingProxyType(
    {
        "dense": "s",
        "pruned": "o",
        "distilled": "^",
        "sliced": "D",
        "quantised": "P",
        "grown": "v",
        "scratch": "X",
        "random": "d",
        "train": "o",
        "validation": "s",
    }
)
"""Role to marker: colour is never the only thing that tells two roles apart."""

PALETTE: tuple[str, ...] = tuple(
    COLOURS[role] for role in ("pruned", "distilled", "sliced", "quantised", "dense", "scratch")
)
"""Colours for things that have no role, in the order in which they are used."""

_STYLE: dict[Any, Any] = {
    # 6.4 inches fill a column of 720 pixels; 11 points stay readable when a phone shows 350.
    "figure.figsize": (6.4, 3.7),
    "figure.dpi": 160,
    "figure.facecolor": CARD,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": CARD,
    "axes.facecolor": CARD,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "grid.color": "#e3e3dc",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 7,
    "image.cmap": "cividis",
}


def role(label: str) -> str | None:
    """The first word of `label` that is a role in `COLOURS`, or None.

    >>> role("pruned 50%, then distilled"), role("a random choice"), role("mine")
    ('pruned', 'random', None)
    """
    words = "".join(c if c.isalpha() else " " for c in label.lower()).split()
    return next((word for word in words if word in COLOURS), None)


def colour(label: str, number: int = 0) -> str:
    """The colour of the role that `label` names, else colour `number` of `PALETTE`.

    >>> colour("pruned 50%") == COLOURS["pruned"], colour("mine", 1) == PALETTE[1]
    (True, True)
    """
    found = role(label)
    return COLOURS[found] if found else PALETTE[number % len(PALETTE)]


def marker(label: str, number: int = 0) -> str:
    """The marker of the role that `label` names, else marker `number` of a fixed cycle.

    >>> marker("distilled"), marker("mine")
    ('^', 'o')
    """
    found = role(label)
    return MARKERS[found] if found else "o^DPsX"[number % 6]


def use_style() -> None:
    """Draw all later figures of this process in the book's style.

    Example:
        >>> import matplotlib
        >>> with style():
        ...     use_style()
        ...     matplotlib.rcParams["figure.facecolor"] == CARD
        True
    """
    import matplotlib
    from cycler import cycler

    matplotlib.rcParams.update({**_STYLE, "axes.prop_cycle": cycler(color=list(PALETTE))})


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in the book's style inside a `with` block; the caller's settings come back after it.

    Example:
        >>> import matplotlib
        >>> before = matplotlib.rcParams["font.size"]
        >>> with style():
        ...     matplotlib.rcParams["font.size"]
        11.0
        >>> matplotlib.rcParams["font.size"] == before
        True
    """
    import matplotlib

    with matplotlib.rc_context():
        use_style()
        yield
