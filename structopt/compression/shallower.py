"""From a trained model to a shallower one: activations straightened, layers merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import nn

from structopt.channels.exchanging import exchange_
from structopt.compression.activations import blend_activations
from structopt.compression.bounding import changed_by
from structopt.compression.evidence import readers
from structopt.compression.folding import folded as fold
from structopt.compression.links import disjoint, links_of, removable
from structopt.compression.slopes import Straighten, Watched, blends, linearising
from structopt.compression.straight import Link, in_type, merge_links, move_padding_, without
from structopt.measure import Cost, Timing, cost, latency
from structopt.measure.running import call, device_of, tensors_of
from structopt.training import Objective, evaluating, train
from structopt.training.copying import copied
from structopt.training.hooked import in_place_of
from structopt.training.observing import observed
from structopt.training.statistics import inputs_of, placed


@dataclass(frozen=True)
class Linearise:
    """How :func:`shallower` trains: epochs to choose and to straighten, strength, learning rates.

    ``strength`` is the loss that the penalty takes for an activation as it was: where a network
    needs one more than that, its slope stays.
    """

    epochs: tuple[int, int] = (2, 6)
    strength: float = 0.1
    rate: float = 1e-3
    slope_rate: float = 0.02

    def __post_init__(self) -> None:
        if min(self.epochs) < 1:
            raise ValueError(f"{self}: both parts take at least one epoch")
        if not min(self.strength, self.rate, self.slope_rate) > 0:
            raise ValueError(f"{self}: strength and learning rates are above 0")


@dataclass(frozen=True)
class Shallower:
    """A shallower model, and what was lost and won. Pairs are (before, after).

    ``slopes``: the mean slope of each candidate while the penalty was on, by which was chosen.
    ``depth``: how many linear layers and convolutions run. ``border``: how far outputs moved,
    ‖y' - y‖ / ‖y‖, when paddings were moved, before training repaired it. ``difference``: between
    the two-layer and the merged form, largest over largest output, in float64; ``rounding`` the
    same in the model's own type. ``seconds``: for the example, taking turns; before is the model
    given, with its batch norms folded.
    """

    model: nn.Module
    links: tuple[Link, ...]
    slopes: dict[str, float]
    depth: tuple[int, int]
    costs: tuple[Cost, Cost]
    border: float
    difference: float
    rounding: float
    seconds: tuple[Timing, Timing]

    @property
    def times_faster(self) -> float:
        """The ratio of the two medians."""
        return float(self.seconds[0]) / float(self.seconds[1])

    def __str__(self) -> str:
        before, after = self.costs
        lines = [
            f"removed       {', '.join(_names(self.links))}",
            f"layers        {self.depth[0]} -> {self.depth[1]}",
            f"MACs          {before.macs:,} -> {after.macs:,}",
            f"parameters    {before.parameters:,} -> {after.parameters:,}",
            f"speed         {self.times_faster:.2f} times as fast, on {self.seconds[0].device}",
            f"border        moving paddings changed outputs by {self.border:.2%}, then trained on",
            f"merging       changed outputs by {self.difference:.1e} in float64, "
            f"{self.rounding:.1e} as they are",
        ]
        return "\n".join(lines)


def shallower(
    model: nn.Module,
    example: Any,
    batches: Any,
    objective: Objective,
    *,
    remove: int | Sequence[str],
    how: Linearise | None = None,
) -> Shallower:
    """A copy of a trained model with fewer layers: activations are trained away, then merged.

    1. Each activation of the links that pay (:func:`removable`) becomes a :class:`Blend`
       (1 - α) f(x) + α x, and is trained with :func:`linearising`.
    2. The ``remove`` links with the largest mean slopes that share no layer are chosen. Where
       needed, the paddings of a link go to its first layer, which changes the border
       (:class:`Shallower` says by how much).
    3. Training goes on, with the objective alone, while their slopes are led to 1 and all others
       back to 0, in even steps over the first half.
    4. Norms are folded and the links merged, exactly.

    ``remove`` may name activations instead, paying or not; then step 1 is left out, and its epochs
    are added to step 3. AdamW, with a cosine down to 0 in step 3. For ``batches`` and ``objective``
    see :func:`structopt.training.train`; batches need a length. The model given stays as it is.

    Dror et al., 2021, "Layer Folding"; Fu et al., 2022, "DepthShrinker"; Kim et al., 2023,
    "Efficient latency-aware CNN depth compression via two-stage dynamic programming".

    Raises ValueError for more links than there are that pay and share no layer, for a named one
    that could not go, with the reason, and for batches without a length.

    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x, y = torch.randn(8, 4), torch.randint(2, (8,))
    >>> from structopt.training import supervised
    >>> found = shallower(model, x[:1], [(x, y)], supervised(), remove=1)
    >>> found.depth, found.difference < 1e-12
    ((2, 1), True)
    """
    how = Linearise() if how is None else how
    if not hasattr(batches, "__len__"):
        raise ValueError("slopes are led to their ends step by step: give batches with a len()")
    links, later = _candidates(model, example, remove), how.epochs[1]
    made = blend_activations(model, _names(links))
    slopes: dict[str, float] = {}
    if isinstance(remove, int):
        watch = Watched()
        _train(made, batches, linearising(objective, how.strength), how, how.epochs[0], watch)
        slopes = watch.means()
        links.sort(key=lambda link: -mean(slopes[name] for name in link.activations))
        gone = disjoint(links, remove) or []
    else:
        gone, later = links, sum(how.epochs)
    before, batch = copied(made), [next(iter(batches))]
    for link in gone:
        if link.moved:
            move_padding_(made, link)
    border = changed_by(before, made, batch)
    straight = Straighten(made, _names(gone), later * len(batches) / 2)
    _train(made, batches, objective, how, later, straight)
    for name, blend in blends(made).items():
        exchange_(made, name, in_place_of(blend, blend.activation, name))
    plain = without(made, _names(gone)).eval()
    wide = copied(plain).double()
    merged = merge_links(wide, example, gone)
    difference = _apart(wide, merged, batch[0])
    merged = copied(merged).to(next(p.dtype for p in plain.parameters()))
    rounding = _apart(plain, merged, batch[0])
    folded = fold(model, example)
    timed = latency({"before": folded, "after": merged}, example)
    return Shallower(
        model=merged.train(model.training),
        links=tuple(gone),
        slopes=slopes,
        depth=(_depth(model, example), _depth(merged, example)),
        costs=(cost(folded, example), cost(merged, example)),
        border=border,
        difference=difference,
        rounding=rounding,
        seconds=(timed["before"], timed["after"]),
    )


def _candidates(model: nn.Module, example: Any, remove: int | Sequence[str]) -> list[Link]:
    if not isinstance(remove, int):
        if not remove:
            raise ValueError("remove names no activation")
        return links_of(model, example, remove)
    found = [link for link in removable(model, example) if link.pays]
    if remove < 1 or disjoint(found, remove) is None:
        known = "".join(f"\n  {link}" for link in found) or " none"
        raise ValueError(
            f"remove={remove}: give 1 or more; an activation that runs in several places has to be "
            f"separated first (separate_activations); links that pay, and share no layer:{known}"
        )
    return found


def _names(links: Sequence[Link]) -> list[str]:
    return list(dict.fromkeys(name for link in links for name in link.activations))


def _train(
    model: nn.Module,
    batches: Any,
    objective: Objective,
    how: Linearise,
    epochs: int,
    after_step: Watched | Straighten,
) -> None:
    """The one loop, with a learning rate of their own for the slopes."""
    slopes = [blend.slope for blend in blends(model).values() if blend.slope.requires_grad]
    own = {id(slope) for slope in slopes}
    weights = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": weights},
        {"params": slopes, "lr": how.slope_rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=how.rate)
    schedule: Callable[[int, int], float] | None = None
    if isinstance(after_step, Straighten):
        schedule = _cosine
    device = device_of(model, ())
    train(
        model, batches, objective, optimizer,
        epochs=epochs, device=device, schedule=schedule, after_step=after_step,
    )  # fmt: skip


def _cosine(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / total))


def _depth(model: nn.Module, example: Any) -> int:
    """How many linear layers and convolutions run."""
    count = 0

    def ran(module: nn.Module, given: Any, out: Any) -> None:
        nonlocal count
        count += 1

    handles = [layer.register_forward_hook(ran) for layer in readers(model).values()]
    with observed(model, handles):
        call(model, example)
    return count


@torch.no_grad()
def _apart(model: nn.Module, other: nn.Module, batch: Any) -> float:
    """The largest difference of outputs over the largest output, in the model's own type."""
    kind = next(p.dtype for p in model.parameters())
    given = in_type(placed(inputs_of(batch), model), kind)
    with evaluating(model), evaluating(other):
        pairs = zip(tensors_of(call(model, given)), tensors_of(call(other, given)), strict=True)
        return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
