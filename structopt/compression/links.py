"""Activations that could go, with the two layers that would then be one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from structopt.compression.activations import activations
from structopt.compression.evidence import readers
from structopt.compression.folding import folded as fold
from structopt.compression.sameness import computes_the_same, in_double
from structopt.compression.straight import (
    Link,
    merged_in_order,
    move_padding_,
    pads_of,
    without,
)
from structopt.measure import cost
from structopt.measure.running import call
from structopt.training.observing import first_of, observed


def removable(model: nn.Module, example: Any, *, longest: int = 2) -> list[Link]:
    """The activations, up to ``longest`` in a row, without which layers would be one.

    Linear layers or 2-d convolutions, with batch norms (folded first) or nothing else between, and
    read by nobody else. Each merge is tried out in double precision. In the order in which they
    run; links may overlap. Whether one pays is another question: two 3×3 convolutions become one of
    5×5, with 25 products for each pair of channels in place of 18, where all widths are equal. The
    block 1×1, depthwise, 1×1 becomes one small convolution if both of its activations go, and
    a larger one if one does. What runs more than once is left out: for one ``nn.ReLU`` in several
    places, :func:`structopt.compression.separate_activations` first.

    Raises ValueError for a model without activation modules
    (:func:`structopt.compression.separate_activations` makes them).

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(8, 48, 1), nn.ReLU(), nn.Conv2d(48, 8, 3, padding=1))
    >>> for link in removable(model, torch.zeros(1, 8, 6, 6)):
    ...     print(link)
    without 1: 0 and 2 as one, 0.15 of their MACs, the border changes
    """
    if longest < 1:
        raise ValueError(f"longest={longest}: a link is one activation or more")
    folded = fold(model, example)
    places: list[_Place] = []
    for name in _in_order(folded, list(activations(folded)), example):
        try:
            places.append(_around(without(folded, [name]), name, example))
        except ValueError:  # links_of says why to whoever asks for this one
            continue
    found = []
    for start in range(len(places)):
        for stop in range(start + 1, min(start + longest, len(places)) + 1):
            run = places[start:stop]
            if len(_runs(run)) == 1:
                try:
                    found.append(_link(folded, run, example))
                except ValueError:
                    break
    return found


def links_of(model: nn.Module, example: Any, names: Sequence[str]) -> list[Link]:
    """Links that cover just these activations; ValueError with the reason where one is in none."""
    folded = fold(model, example)
    activations(folded, names)
    ordered = _in_order(folded, names, example)
    if missing := sorted(set(names) - set(ordered)):
        raise ValueError(f"{missing[0]} does not run on this example")
    places = [_around(without(folded, [name]), name, example) for name in ordered]
    return [_link(folded, run, example) for run in _runs(places)]


def disjoint(links: Sequence[Link], count: int) -> list[Link] | None:
    """So many links that share no layer, the first if they can be had; None: there are fewer."""
    if not count:
        return []
    for place, link in enumerate(links):
        others = [o for o in links[place + 1 :] if not set(o.layers) & set(link.layers)]
        found = disjoint(others, count - 1)
        if found is not None:
            return [link, *found]
    return None


def _link(folded: nn.Module, run: Sequence[_Place], example: Any) -> Link:
    """The link of activations in a row, once its merge was tried."""
    names = tuple(place.name for place in run)
    layers = (run[0].first, *(place.second for place in run))
    wide = in_double(without(folded, names))
    given = run[0].given.double()
    several = cost(nn.Sequential(*(wide.get_submodule(name) for name in layers)), given).macs
    try:
        moved, merged = False, merged_in_order(wide, layers)
    except ValueError:
        if not any(any(pads_of(wide.get_submodule(name))) for name in layers[1:]):
            raise
        moved = True
        move_padding_(wide, Link(names, layers, (0, 0), moved))
        merged = merged_in_order(wide, layers)
    try:
        same = computes_the_same(wide, merged, example)
    except RuntimeError:  # more of a border than another reader can take
        same = False
    if not same:
        raise ValueError(f"what a layer before {' or '.join(names)} makes is read elsewhere too")
    one = cost(merged.get_submodule(layers[0]), given).macs
    return Link(names, layers, (several, one), moved)


class _Place(NamedTuple):
    """An activation, the layers before and behind it, and what the first one reads."""

    name: str
    first: str
    second: str
    given: Tensor


def _runs(places: Sequence[_Place]) -> list[list[_Place]]:
    """Places in a row, where one begins at the layer that ends the one before, together."""
    runs: list[list[_Place]] = []
    for place in places:
        if runs and runs[-1][-1].second == place.first:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _around(bare: nn.Module, name: str, example: Any) -> _Place:
    """The layer whose very output this identity reads, the one that reads it, and what goes in."""
    made: dict[int, tuple[str, Tensor, Tensor]] = {}  # tensors are held: numbers stay their own
    passed: list[tuple[int, Tensor]] = []
    after: list[str] = []
    layers = readers(bare)
    runs = dict.fromkeys(layers, 0)

    def hook(layer: str) -> Any:
        def see(module: nn.Module, given: Any, named: Any, out: Any) -> None:
            x = first_of(given, named)
            if layer == name:
                passed.append((id(x), x))
                return
            runs[layer] += 1
            if passed and id(x) == passed[0][0]:
                after.append(layer)
            made[id(out)] = layer, out, x

        return see

    handles = [
        bare.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True)
        for n in [*layers, name]
    ]
    with observed(bare, handles):
        call(bare, example)
    if len(passed) != 1:
        raise ValueError(f"{name} runs {len(passed)} times: separate_activations makes it several")
    if passed[0][0] not in made:
        raise ValueError(f"{name} does not read the bare output of a linear layer or convolution")
    first, _, given = made[passed[0][0]]
    if len(after) != 1:
        raise ValueError(f"{len(after)} layers read the bare output of {name}, not one")
    if runs[first] != 1 or runs[after[0]] != 1:
        raise ValueError(f"{first} or {after[0]} runs more than once")
    return _Place(name, first, after[0], given)


def _in_order(model: nn.Module, names: Sequence[str], example: Any) -> list[str]:
    """The names in the order in which they first run; those that never do are left out."""
    ran: dict[str, None] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, given, out, name=name: ran.setdefault(name)
        )
        for name in names
    ]
    with observed(model, handles):
        call(model, example)
    return list(ran)
