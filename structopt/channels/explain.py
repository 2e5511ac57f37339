"""What of a model can change, what is tied to what, what stands in the way: said beforehand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from torch import nn

from structopt.channels.analysis import channel_groups
from structopt.channels.drawing import draw
from structopt.channels.groups import Channels
from structopt.channels.members import ChannelGroup
from structopt.channels.mirrors import Extent
from structopt.channels.sizes import guesses
from structopt.channels.tables import columns, few, percent, table
from structopt.channels.walking import modules_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Place:
    """A dimension of a layer's weights that holds channels of a group, several to one perhaps."""

    layer: str
    dim: int
    repeats: int
    role: str  # "makes", "passes" (norms and biases) or "reads"

    def __str__(self) -> str:
        return f"{self.layer}[{self.dim}]" + (f"×{self.repeats}" if self.repeats > 1 else "")


@dataclass(frozen=True)
class Tied:
    """Channels that change together: how many, where they lie, or why they may not change."""

    name: str
    size: int
    places: tuple[Place, ...]
    frozen: str
    averaged: bool
    attributes: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        made = " ".join(str(p) for p in self.places if p.role != "reads")
        read = " ".join(str(p) for p in self.places if p.role == "reads")
        return f"{made} → {read}" if read else made


@dataclass(frozen=True)
class Explanation:
    """What can change in a model. Printed it is text, in a notebook a table, drawn a figure.

    `layers` are those with weights, `free` and `frozen` the groups, and `freedom` is the share of
    the parameters that lie on an axis of a free group.
    """

    model: str
    parameters: int
    layers: tuple[str, ...]
    freedom: float
    free: tuple[Tied, ...]
    frozen: tuple[Tied, ...]

    def draw(self, layers: str = "") -> Figure:
        """A figure with a row for each layer and a line for each group through what it ties.

        `layers` picks those whose names start so ("layer1", "encoder.layers.0"); all by default.

        Raises ValueError where no layer does.

        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> figure = explain(model, torch.zeros(1, 3)).draw()
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['0', '2']
        """
        return draw(self, layers)

    def __str__(self) -> str:
        lines = [self._summary(), ""]
        if self.free:
            lines += columns(["group", "size", "layer[dimension], → reads them"], self._rows(), 2)
        if any(group.averaged for group in self.free):
            lines += ["", _AVERAGED]
        if self.frozen:
            lines += ["", *columns(["frozen because", "layer[dimension] (size)"], self._why(), 1)]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        free = table(
            "Groups of channels that can change",
            ["group", "size", "share of the parameters", "layers [dimension], → reads them"],
            [[g.name, f"{g.size:,}", percent(g.share), _said(g)] for g in self.free],
        )
        why = table("What is frozen", ["because", "layers [dimension] (size)"], self._why())
        notes = f"<p>{escape(_AVERAGED)}</p>" if any(g.averaged for g in self.free) else ""
        return (
            f"<p>{escape(self._summary())}</p>\n{free if self.free else ''}{notes}\n"
            f"<details><summary>What is frozen, and why</summary>\n{why}\n</details>"
        )

    def _summary(self) -> str:
        count = len(self.free)
        return (
            f"{self.model}: {count} group{'s' * (count != 1)} of channels can change; "
            f"{percent(self.freedom)} of {self.parameters:,} parameters lie in "
            f"{'it' if count == 1 else 'them'}."
        )

    def _rows(self) -> list[list[str]]:
        return [[g.name + " *" * g.averaged, f"{g.size:,}", _said(g)] for g in self.free]

    def _why(self) -> list[list[str]]:
        """One row for each reason; the many of a kind together."""
        found: dict[str, list[Tied]] = {}
        for group in self.frozen:
            found.setdefault(group.frozen.partition(": ")[0], []).append(group)
        rows = []
        for reason, groups in found.items():
            where = {g.frozen.partition(": ")[2]: None for g in groups} if len(groups) > 1 else {}
            reason = groups[0].frozen if len(where) < 2 else reason
            places = [f"{p} ({g.size})" for g in groups for p in g.places[:1]]
            rows.append([reason, few(places, 4 if len(where) > 1 else 12)])
        return rows


_AVERAGED = (
    "* A norm averages over these channels: without some of them it averages over the others."
)


def explain(model: nn.Module, example: Any) -> Explanation:
    """Say what of a model can change, before anything is touched.

    Names each group of coupled channels with its size, every layer that makes, passes or reads
    them, and the sizes that the model's own attributes keep; names what is frozen, with the
    operator that freezes it and the layer where it stands. `example` is as in `channel_groups`,
    and so is what is raised.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> print(explain(model, torch.zeros(1, 3, 5, 5)))
    Sequential: 1 group of channels can change; 98.5% of 276 parameters lie in it.
    <BLANKLINE>
    group  size  layer[dimension], → reads them
    -----  ----  ------------------------------
    0         8  0[0] 1[0] → 3[1]
    <BLANKLINE>
    frozen because                                     layer[dimension] (size)
    -------------------------------------------------  -----------------------
    meets a dimension of fixed size: convolution in 0  0[1] (3)
    a size of a kernel: convolution in 0               0[2] (3), 0[3] (3)
    output of the model                                3[0] (4)
    a single index                                     3[2] (1), 3[3] (1)
    """
    channels = channel_groups(model, example)
    kept = _attributes(channels, model)
    return Explanation(
        model=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=tuple(dict.fromkeys(_layer(name) for name, _ in model.named_parameters())),
        freedom=channels.freedom(),
        free=tuple(_tied(channels, g, kept, channels.freedom([g])) for g in channels.groups),
        frozen=tuple(_tied(channels, g, kept, 0.0) for g in channels.frozen),
    )


def _tied(
    channels: Channels, group: ChannelGroup, kept: dict[int, list[str]], share: float
) -> Tied:
    places: dict[tuple[str, int, bool], Place] = {}
    for member in group.members:
        layer = _layer(member.parameter)
        flat = (member.parameter, member.dim + 1) not in channels.axes and member.dim == 0
        key = (layer, member.dim, member.reads)
        role = "reads" if member.reads else "passes" if flat else "makes"
        if key not in places or places[key].role == "passes":
            places[key] = Place(layer, member.dim, member.repeats, role)
    return Tied(
        name=group.name,
        size=group.size,
        places=tuple(places.values()),
        frozen=group.frozen,
        averaged=group.averaged,
        attributes=tuple(kept.get(channels.number[id(group)], ())),
        share=share,
    )


def _layer(parameter: str) -> str:
    """The layer that a parameter belongs to, or itself where it is the model's own."""
    layer, parametrised, _ = parameter.partition(".parametrizations.")
    return layer if parametrised else parameter.rpartition(".")[0] or parameter


def _attributes(channels: Channels, model: nn.Module) -> dict[int, list[str]]:
    """The sizes that the model's own Python keeps, by the number of their group."""
    found: dict[int, dict[str, None]] = {}
    known = [(e, e.name) for e in channels.extents if e.name]
    for guess in guesses(channels, modules_of(model)):
        first, *rest = (set(_numbers(channels, e)) for e in guess.extents)
        if all(numbers == first for numbers in rest):
            known.append((guess.extents[0], guess.name))
    for extent, name in known:
        where = f"{extent.module}.{name}".lstrip(".")
        for number in _numbers(channels, extent):
            found.setdefault(number, {})[f"{where} = {extent.size}"] = None
    return {number: list(names) for number, names in found.items()}


def _numbers(channels: Channels, extent: Extent) -> Iterable[int]:
    return () if extent.labels is None else channels.along(extent.labels)


def _said(group: Tied) -> str:
    kept = f"; kept as {', '.join(group.attributes)}" if group.attributes else ""
    return f"{group}{kept}"
