"""Outliers moved from what layers read into their weights, where one step serves them better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structopt.compression.evidence import READERS, all_ran, by_channel, readers, watch
from structopt.compression.sameness import computes_the_same, in_double
from structopt.measure.running import call
from structopt.training.copying import copied
from structopt.training.observing import first_of, observed
from structopt.training.statistics import inputs_of, placed

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TRIED = 4  # of the layers that ran before: beyond these lie other parts of the network


@torch.no_grad()
def smooth_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    alpha: float = 0.5,
    names: Sequence[str] | None = None,
) -> nn.Module:
    """A copy that computes the same, in which what layers read has fewer outliers: SmoothQuant.

    Channel j of an input is divided by s = max(abs x_j)^α / max(abs w_j)^(1-α), and the weights
    that read it are multiplied: α = 0 makes all w reach equally far, α = 1 all x, ½ shares the
    trouble. The norm, linear layer or convolution before takes 1/s into its weight and bias; all
    layers that read the same tensor take s together. Maxima are over the batches, and over those
    layers. Each move is run in double precision on random numbers like the first batch, and only
    kept where outputs stay: an activation between has to be positively homogeneous, such as ReLU,
    and nothing else may read the tensor. Round inputs afterwards,
    :func:`structopt.compression.round_inputs`.

    Layers before which nothing can take a scale stay as they are, unless ``names`` asks for them.

    Xiao et al., 2023, "SmoothQuant: accurate and efficient post-training quantization for large
    language models". Raises ValueError for an α outside [0, 1], no batches, and for a layer in
    ``names`` that is none, never ran, or has nothing before it that can take its scale.

    >>> model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 3, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([1.0, 100.0]))
    >>> x = torch.randn(50, 2)
    >>> made = smooth_inputs(model, [x])
    >>> torch.allclose(made[0](x).abs().amax(0), made[1].weight.abs().amax(0))
    True
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: from 0, weights made even, to 1, inputs made even")
    batches, made, wide = list(batches), copied(model), in_double(model)
    wanted, reach = readers(model, names), _reach(model, batches)
    if names is not None:
        all_ran(wanted, reach)
    example = placed(inputs_of(batches[0]), model)
    for members, before in _readings(model, example):
        asked = [name for name in members if name in wanted]
        if not (asked and all(_weight(made.get_submodule(name)).numel() for name in members)):
            continue
        weights = [_by_input(made.get_submodule(name)).abs().amax((1, 3)) for name in members]
        w = torch.stack([weight.flatten() for weight in weights]).amax(0).double()
        x = torch.stack([reach[name] for name in members]).amax(0)
        factors = torch.where((x > 0) & (w > 0), x**alpha / w ** (1 - alpha), 1.0)
        maker = _maker(wide, before, members, factors, example)
        if maker is None and names is not None:
            raise ValueError(
                f"{asked[0]!r} reads what no layer before it can scale by channels: there has to "
                "be a norm with weights, a linear layer or a convolution of as many channels, read "
                f"by {', '.join(members)} alone, with at most a ReLU between"
            )
        if maker is not None:
            made, wide = (_scaled(each, maker, members, factors) for each in (made, wide))
    return made


def _reach(model: nn.Module, batches: Sequence[Any]) -> dict[str, Tensor]:
    """The largest size of each channel that each layer reads, in double precision."""
    layers, found = readers(model), dict[str, Tensor]()

    def see(name: str, given: Tensor, made: Tensor) -> None:
        every = by_channel(layers[name], given).abs().double()
        rows = every.amax(1) if every.shape[1] else every.sum(1)
        if not bool(rows.isfinite().all()):
            raise ValueError(f"what {name or 'the model'} reads is not finite")
        found[name] = torch.maximum(found[name], rows) if name in found else rows

    watch(model, batches, layers, see)
    return found


def _readings(model: nn.Module, example: Any) -> list[tuple[list[str], list[str]]]:
    """For each tensor: the layers that read it, and what ran before them, the last one first."""
    found: dict[int, tuple[Tensor, list[str], list[str]]] = {}  # the tensor is held: its number
    made: list[str] = []

    def reads(name: str, layer: nn.Module, given: Any, named: Any) -> None:
        x = first_of(given, named)
        _, members, _ = found.setdefault(id(x), (x, [], made[::-1]))
        members.append(name)

    def makes(name: str, *_: Any) -> None:
        made.append(name)

    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, READERS):
            hook = partial(reads, name)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if isinstance(layer, READERS + NORMS) and layer.weight is not None:
            handles.append(layer.register_forward_hook(partial(makes, name)))
    with observed(model, handles):
        call(model, example)
    return [(list(dict.fromkeys(members)), before) for _, members, before in found.values()]


def _maker(
    wide: nn.Module, before: list[str], members: list[str], factors: Tensor, example: Any
) -> str | None:
    """The nearest layer before that can take the inverse of the factors, if any can."""
    as_many = [n for n in before if len(_weight(wide.get_submodule(n))) == len(factors)]
    for name in as_many[:TRIED]:
        if computes_the_same(wide, _scaled(wide, name, members, factors), example):
            return name
    return None


def _scaled(model: nn.Module, maker: str, members: list[str], factors: Tensor) -> nn.Module:
    made = copied(model)
    layer = made.get_submodule(maker)
    for part in layer.weight, layer.bias if hasattr(layer, "bias") else None:
        if isinstance(part, Tensor):
            part.copy_(part.double() / factors.view(-1, *[1] * (part.ndim - 1)))
    for name in members:
        weight = _by_input(made.get_submodule(name))
        weight.copy_(weight.double() * factors.view(len(weight), 1, -1, 1))
    return made


def _by_input(layer: nn.Module) -> Tensor:
    """A view of its weight, (groups, outputs, inputs, everything else) of each group."""
    groups, weight = getattr(layer, "groups", 1), _weight(layer)
    return weight.view(groups, len(weight) // groups, weight.shape[1], -1)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight
