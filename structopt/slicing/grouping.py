"""Dense layers of a trained network into groups."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from structopt.channels import ChannelGroup, Channels, channel_groups, take
from structopt.channels.exchanging import exchange_
from structopt.channels.nests import first_line
from structopt.losses.checks import need_values, whole
from structopt.measure.running import call
from structopt.slicing.asking import own
from structopt.slicing.assigning import Numbers, assign_groups, balanced, partition, squared
from structopt.slicing.grouped import (
    LAYERS,
    Averaged,
    Averaging,
    Exchange,
    Layer,
    Mixed,
    Reorder,
    Shuffled,
    channel_dim,
    grouped_layer,
    mixing,
)
from structopt.slicing.refitting import refit_
from structopt.training.copying import copied
from structopt.training.hooked import in_place_of
from structopt.training.observing import observed


@dataclass(frozen=True, eq=False)
class _Sides:
    """What a layer makes and reads: its channels' group, and the channel of each entry."""

    makes: tuple[ChannelGroup, Numbers] | None
    reads: tuple[ChannelGroup, Numbers] | None


@torch.inference_mode(False)  # else what is made could not be trained
def group_layers(
    model: nn.Module,
    example: Any,
    groups: int,
    *,
    exchange: Exchange = Shuffled(),  # noqa: B008 (a frozen value)
    layers: Sequence[str] | None = None,
    batches: Iterable[Any] | None = None,
) -> nn.Module:
    """A copy whose dense convolutions and linear layers are in groups, with 1 / groups of weights.

    Channels go to the groups that keep the most of the weights (:func:`assign_groups`). Their
    order is then folded into the layers around, by :func:`structopt.channels.take`, so that no
    channel has to move at run time; only where two layers want the same channels in two orders a
    :class:`Reorder` stands between. Where the weights are block-diagonal up to the order of
    channels, the copy computes the same function; else fine-tune it. With `batches`, the weights
    kept are first fitted by least squares to what each dense layer makes, one after the other,
    without labels (He et al., 2017, "Channel pruning for accelerating very deep neural networks").

    Args:
        model: a trained network. It is not touched.
        example: what the model is called with.
        groups: how many; it divides the channels.
        exchange: :class:`Shuffled`, :class:`Branches`, :class:`Mixed` or :class:`Averaged`.
        layers: patterns of names; without them all whose inputs and outputs may be put in any
            order, which leaves out the first and the last. Sizes that the groups do not divide
            stay dense.
        batches: inputs, or pairs of inputs and targets, which are not read. A layer that runs
            several times is fitted to all of its calls. Running statistics are taken anew from the
            batches (:func:`structopt.pruning.recalibrate_`), also where weights are block-diagonal.

    Raises:
        ValueError: fewer than 2 groups, another exchange, or a pattern of which no layer can be
            split, with the reasons; weights that are not finite; a model that reads the weight of a
            layer outside of its call; batches that are empty, pass a layer by, or make numbers that
            are not finite, and ``nn.Conv3d`` with batches.

    Example:
        >>> from structopt.networks import ResNet20
        >>> from structopt.slicing import Branches
        >>> image = torch.zeros(1, 1, 28, 28)
        >>> small = group_layers(ResNet20(width=4), image, 2, exchange=Branches())
        >>> small.stage3[1].conv2.groups
        2
    """
    if isinstance(layers, str) or (layers is not None and not layers):
        raise ValueError(f"layers={layers!r}: give a list of names, or leave it out for all")
    if not isinstance(exchange, Exchange):
        raise ValueError(f"exchange={exchange!r}: give Shuffled(), Branches(), Averaged(), Mixed()")
    if not whole(groups) >= 2:
        raise ValueError(f"groups counts the parts of a layer, at least 2: {groups!r}")
    need_values("the choice of groups", model.parameters())
    channels = channel_groups(model, example)
    shuffled = isinstance(exchange, Shuffled)
    sides = _candidates(model, channels, groups, layers, shuffled)
    orders, fits = (_own_orders if shuffled else _joint_orders)(model, sides, groups)
    order = {group: torch.from_numpy(index) for group, index in orders.items()}
    made = take(model, order) if order else copied(model)
    dense = copied(made) if batches is not None else made
    for name, (outputs, inputs) in fits.items():
        layer = made.get_submodule(name)
        assert isinstance(layer, LAYERS)
        new = _passing(layer, groups, exchange)
        if not (outputs and inputs):
            new = _between_shuffles(layer, groups, outputs, inputs)
        for key, parameter in new.named_parameters():
            like = layer.bias if key.endswith("bias") else layer.weight
            parameter.requires_grad_(like is None or like.requires_grad)
        exchange_(made, name, in_place_of(layer, new, name))
    _try(made, channels.example, fits)
    if batches is not None:
        refit_(made, dense, fits, channels.example, batches)
    return made


def _try(made: nn.Module, example: Any, names: Collection[str]) -> None:
    """The model's own Python may read what a grouped layer has no more, such as its weight."""
    try:
        with observed(made, ()):
            call(made, own(example))
    except Exception as problem:
        raise ValueError(
            f"the model does not run with {', '.join(names)} in groups ({first_line(problem)}): "
            "does its own code use such a layer's weight? Leave it out by naming the others in "
            "layers="
        ) from problem


def _passing(layer: Layer, groups: int, exchange: Exchange) -> nn.Module:
    """The grouped layer, and what passes between the groups."""
    if isinstance(exchange, Mixed):
        return mixing(layer, groups, exchange.rank)
    made = grouped_layer(layer, groups)
    if isinstance(exchange, Averaged):
        averaging = Averaging(groups, channel_dim(layer)).to(layer.weight)
        return nn.Sequential(made, averaging)
    return made


def _between_shuffles(layer: Layer, groups: int, outputs: bool, inputs: bool) -> nn.Module:
    """The grouped layer, where its outputs or inputs do not lie in the order of its groups."""
    squares, one = squared(layer.weight), np.eye(groups)
    out, into = (np.arange(size) * groups // size for size in squares.shape)
    if outputs:
        into = balanced(squares.T @ one[out], into)
    elif inputs:
        out = balanced(squares @ one[into], out)
    else:
        found = assign_groups(layer.weight, groups)
        out, into = found.outputs, found.inputs
    order, reading = (torch.from_numpy(_order(a)).to(layer.weight.device) for a in (out, into))
    turned = copy.deepcopy(layer)
    turned.weight.data = layer.weight.detach()[order][:, reading]
    if turned.bias is not None:
        turned.bias.data = turned.bias.detach()[order]
    dim = channel_dim(layer)
    parts = [Reorder(reading, dim), grouped_layer(turned, groups), Reorder(order.argsort(), dim)]
    return nn.Sequential(*parts[inputs : 3 - outputs])


def _candidates(
    model: nn.Module,
    channels: Channels,
    groups: int,
    patterns: Sequence[str] | None,
    shuffled: bool,
) -> dict[str, _Sides]:
    """The layers that can be grouped, in the order of the model."""
    ran, found, reasons = _ran(model, channels.example), dict[str, _Sides](), dict[str, str]()
    weights = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    any_order = shuffled and patterns is not None  # what has a fixed order, a shuffle can turn
    for name, module in model.named_modules():
        if not any(fnmatchcase(name, p) for p in patterns or ["*"]):
            continue
        if type(module) not in LAYERS:
            if isinstance(module, nn.Linear | _ConvNd):
                reasons[name] = f"{name} is a {type(module).__name__}, no plain layer"
            continue
        sides = _Sides(*(_side(channels, f"{name}.weight", dim) for dim in (0, 1)))
        outputs, inputs = module.weight.shape[:2]
        if module not in ran or getattr(module, "groups", 1) > 1:
            reasons[name] = f"{name} is not called by itself, or has groups already"
        elif "weight" not in module._parameters:
            reasons[name] = f"a hook computes the weight of {name}: prune.remove first"
        elif weights[id(module.weight)] > 1:
            reasons[name] = f"{name} shares its weight with another layer"
        elif outputs % groups or inputs % groups:
            reasons[name] = f"{name} has {inputs} inputs and {outputs} outputs"
        elif not any_order and not (sides.makes and sides.reads):
            which = "inputs" if sides.makes else "outputs"
            reasons[name] = f"{name}: its {which} cannot be put in any order"
        elif not module.weight.isfinite().all():
            raise ValueError(f"{name} has weights that are not finite: which are the largest?")
        else:
            found[name] = sides
    for pattern in patterns or ["*"]:
        if not any(fnmatchcase(name, pattern) for name in found):
            why = [reason for name, reason in reasons.items() if fnmatchcase(name, pattern)]
            why = why[:4] or [f"no layer's name fits {pattern!r}"]
            raise ValueError(f"no layer can be split into {groups} groups: {'; '.join(why)}")
    return found


def _ran(model: nn.Module, example: Any) -> set[nn.Module]:
    """The modules whose forward runs: some are mere holders of weights."""
    ran = set[nn.Module]()
    handles = [m.register_forward_pre_hook(lambda m, _: ran.add(m)) for m in model.modules()]
    with observed(model, handles):
        call(model, own(example))
    return ran


def _side(channels: Channels, parameter: str, dim: int) -> tuple[ChannelGroup, Numbers] | None:
    """The group whose channels are the entries of this axis, one each."""
    for group in channels:
        for member in group.members:
            if (member.parameter, member.dim) == (parameter, dim):
                once = np.array_equal(np.sort(member.channel), np.arange(group.size))
                return (group, member.channel) if once else None
    return None


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _order(found: Numbers) -> Numbers:
    """The entries of group 0 first, then those of group 1, …"""
    return found.argsort(kind="stable")


def _joint_orders(
    model: nn.Module, sides: dict[str, _Sides], groups: int
) -> tuple[dict[ChannelGroup, Numbers], dict[str, tuple[bool, bool]]]:
    """One assignment for each group of channels, over all layers that share it."""
    pairs = {name: (side.makes, side.reads) for name, side in sides.items()}
    sets = list(dict.fromkeys(one[0] for pair in pairs.values() for one in pair if one))
    edges = []
    for name, (makes, reads) in pairs.items():
        assert makes is not None
        assert reads is not None
        by_entry = squared(_weight(model, name))
        by_channel = np.empty_like(by_entry)
        by_channel[np.ix_(makes[1], reads[1])] = by_entry
        edges.append((sets.index(makes[0]), sets.index(reads[0]), by_channel))
    found, _ = partition([group.size for group in sets], edges, groups)
    orders = {group: _order(a) for group, a in zip(sets, found, strict=True)}
    return orders, dict.fromkeys(sides, (True, True))


def _own_orders(
    model: nn.Module, sides: dict[str, _Sides], groups: int
) -> tuple[dict[ChannelGroup, Numbers], dict[str, tuple[bool, bool]]]:
    """Each layer is solved alone. The first to ask orders a group of channels; the others shuffle.

    For each layer: do its outputs, do its inputs lie in its own order?
    """
    orders: dict[ChannelGroup, Numbers] = {}
    fits: dict[str, tuple[bool, bool]] = {}
    for name, side in sides.items():
        best = assign_groups(_weight(model, name), groups)
        fitting = []
        for one, found in ((side.reads, best.inputs), (side.makes, best.outputs)):
            fitting.append(one is not None and one[0] not in orders)
            if one is not None and one[0] not in orders:
                orders[one[0]] = one[1][_order(found)]
        fits[name] = fitting[1], fitting[0]
    return orders, fits
