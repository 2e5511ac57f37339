"""The parts of a network in groups: the grouped layers, and what passes between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structopt.losses.checks import whole


@dataclass(frozen=True)
class Branches:
    """Nothing passes: all layers that share channels have one assignment.

    The network falls into branches side by side (Kim et al., 2017, "SplitNet").
    """


@dataclass(frozen=True)
class Shuffled:
    """Each layer has an assignment of its own, so that the next one reads from other groups.

    The shuffle of Zhang et al., 2018, "ShuffleNet", but one that is found, not fixed.
    """


@dataclass(frozen=True)
class Averaged:
    """Branches; behind each layer every group is drawn to the mean of all.

    How far is learned, and begins at 0.
    """


@dataclass(frozen=True)
class Mixed:
    """Branches; beside each layer runs a thin dense one of `rank` channels.

    It begins as the best that this rank can give back of the weights that were lost.
    """

    rank: int

    def __post_init__(self) -> None:
        if not whole(self.rank) >= 1:
            raise ValueError(f"rank is the number of channels that pass, at least 1: {self.rank!r}")


Exchange = Branches | Shuffled | Averaged | Mixed
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = nn.Linear | Conv
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class GroupedLinear(nn.Module):
    """Linear layers side by side: group k of the outputs reads group k of the inputs.

    Weight (groups, out / groups, in / groups); x (…, in) gives (…, out).

    >>> GroupedLinear(torch.ones(2, 1, 3), None)(torch.arange(6.0)).tolist()
    [3.0, 12.0]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Each group on its own."""
        parts = torch.unflatten(x, -1, (len(self.weight), -1))  # (…, G, I)
        y = torch.einsum("...gi,goi->...go", parts, self.weight).flatten(-2)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        g, o, i = self.weight.shape
        return f"in_features={g * i}, out_features={g * o}, groups={g}"


class Reorder(nn.Module):
    """The channels in another order: a shuffle.

    >>> Reorder(torch.tensor([2, 0, 1]), -1)(torch.arange(3.0))
    tensor([2., 0., 1.])
    """

    index: Tensor

    def __init__(self, index: Tensor, dim: int) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Take the channels in this order."""
        return x.index_select(self.dim, self.index)


class Averaging(nn.Module):
    """y + share · (mean of y over the groups - y).

    >>> exchange = Averaging(2, -1)
    >>> exchange.share.data.fill_(0.5)
    tensor(0.5000)
    >>> exchange(torch.tensor([0.0, 4.0])).tolist()
    [1.0, 3.0]
    """

    def __init__(self, groups: int, dim: int) -> None:
        super().__init__()
        self.groups, self.dim = groups, dim
        self.share = nn.Parameter(torch.zeros(()))

    def forward(self, y: Tensor) -> Tensor:
        """Draw every group to the mean of all."""
        parts = torch.unflatten(y, self.dim, (self.groups, -1))
        axis = self.dim if self.dim >= 0 else self.dim - 1
        mixed: Tensor = parts + self.share * (parts.mean(axis, keepdim=True) - parts)
        return mixed.flatten(axis, axis + 1)


class Mixing(nn.Module):
    """A grouped layer and a thin dense one beside it: grouped(x) + up(down(x)).

    >>> thin = Mixing(nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(1, 4))
    >>> thin(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(self, grouped: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.grouped, self.down, self.up = grouped, down, up

    def forward(self, x: Tensor) -> Tensor:
        """What the groups give, and what passes between them."""
        y: Tensor = self.grouped(x) + self.up(self.down(x))
        return y


def channel_dim(layer: Layer) -> int:
    """Of a layer's inputs and outputs, from the end: examples may lack a batch dimension."""
    return -1 if isinstance(layer, nn.Linear) else -(layer.weight.ndim - 1)


def grouped_layer(layer: Layer, groups: int) -> nn.Module:
    """The diagonal blocks of a dense layer."""
    blocks = [
        part.chunk(groups, 1)[k] for k, part in enumerate(layer.weight.detach().chunk(groups, 0))
    ]
    bias = None if layer.bias is None else layer.bias.detach().clone()
    if isinstance(layer, nn.Linear):
        return GroupedLinear(torch.stack(blocks), bias)
    made = _like(layer, layer.in_channels, layer.out_channels, layer.kernel_size, groups=groups)
    made.weight = nn.Parameter(torch.cat(blocks))
    made.bias = None if bias is None else nn.Parameter(bias)
    return made


def lost(layer: Layer, groups: int) -> Tensor:
    """The weight without its diagonal blocks."""
    weight = layer.weight.detach().clone()
    for k, part in enumerate(weight.chunk(groups, 0)):
        part.chunk(groups, 1)[k].zero_()
    return weight


def mixing(layer: Layer, groups: int, rank: int) -> Mixing:
    """The blocks, and the truncated singular value decomposition of what lies outside them."""
    weight = lost(layer, groups)
    left, values, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    into, out = root[:, None] * right[:rank], left[:, :rank] * root
    into, out = into.to(weight), out.to(weight)
    if isinstance(layer, nn.Linear):
        with torch.device("meta"):
            down: Layer = nn.Linear(weight.shape[1], rank, bias=False)
            up: Layer = nn.Linear(rank, weight.shape[0], bias=False)
    else:
        down = _like(layer, weight.shape[1], rank, layer.kernel_size, bias=False)
        with torch.device("meta"):
            up = type(layer)(rank, weight.shape[0], 1, bias=False)
    down.weight = nn.Parameter(into.reshape(rank, *weight.shape[1:]))
    up.weight = nn.Parameter(out.reshape(weight.shape[0], rank, *[1] * (weight.ndim - 2)))
    return Mixing(grouped_layer(layer, groups), down, up)


def _like(layer: Conv, into: int, out: int, kernel: Any, **settings: Any) -> Conv:
    """A convolution that strides and pads as this one, for weights that are still to come."""
    kind: Any = type(layer)
    with torch.device("meta"):  # draws no random numbers
        made: Conv = kind(
            into,
            out,
            kernel,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            padding_mode=layer.padding_mode,
            **settings,
        )
    return made
