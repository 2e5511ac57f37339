"""Layers that follow each other, or stand side by side, as one layer that computes the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from structopt.compression.evidence import need_torchs
from structopt.training.copying import copied
from structopt.training.hooked import hooked

META = torch.device("meta")  # where layers come to be whose weights are still to be filled in:
# they draw no random numbers there
Layer = nn.Linear | nn.Conv2d
Made = TypeVar("Made", bound=Layer)


@torch.no_grad()
def merge_pair(first: nn.Module, second: nn.Module) -> nn.Module:
    """One layer that computes ``second(first(x))``: two linear layers, or two 2-d convolutions.

    The kernel of the product is that of the first, spread by its stride, under each place of the
    second: k₁ + (k₂ - 1) · stride₁ wide, with the product of the strides. Groups that both share
    stay; other groups are written out with their zeros, as DepthShrinker merges a depthwise layer.

    Raises ValueError for other layers, for hooks, for padding that is not zeros, and for a second
    layer that pads, unless the first is 1×1 without padding and bias: else the zeros of the border
    are not what the first layer would make there.

    >>> first, second, x = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3), torch.randn(1, 1, 9, 9)
    >>> merged = merge_pair(first, second)
    >>> merged
    Conv2d(1, 2, kernel_size=(5, 5), stride=(1, 1))
    >>> torch.allclose(merged(x), second(first(x)), atol=1e-5)
    True
    """
    return _trained_as((first, second), _pair(first, second))


def _pair(first: nn.Module, second: nn.Module) -> Layer:
    need_torchs(first, second)
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        if first.out_features != second.in_features:
            raise ValueError(f"{second} does not read what {first} makes")
        return _like(second, second.weight @ first.weight, _bias(first, second, second.weight))
    if not (isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)):
        raise ValueError(
            f"{_kind(first)} and {_kind(second)} do not merge: two Linear or Conv2d do"
        )
    pads, more = _plain(first), _plain(second)
    if first.out_channels != second.in_channels:
        raise ValueError(f"{second} does not read what {first} makes")
    if any(more):
        spread = max(first.kernel_size) > 1
        if spread or any(pads) or first.bias is not None:
            why = "has places beside it" if spread else "pads too" if any(pads) else "adds a bias"
            raise ValueError(f"the second convolution pads with zeros, and the first one {why}")
    size = [(k - 1) * d + 1 for k, d in zip(first.kernel_size, first.dilation, strict=True)]
    weight = _spread(_ungrouped(first), first.dilation)
    reader = _ungrouped(second)
    steps = [s * d for s, d in zip(first.stride, second.dilation, strict=True)]
    high, wide = (
        (k - 1) * step + n for k, step, n in zip(second.kernel_size, steps, size, strict=True)
    )
    merged = weight.new_zeros(second.out_channels, first.in_channels, high, wide)
    for y in range(second.kernel_size[0]):
        for x in range(second.kernel_size[1]):
            top, left = y * steps[0], x * steps[1]
            part = torch.einsum("om,mikl->oikl", reader[:, :, y, x], weight)
            merged[:, :, top : top + size[0], left : left + size[1]] += part
    bias = _bias(first, second, reader.sum((2, 3)))
    groups = first.groups if first.groups == second.groups else 1
    rows = [part.chunk(groups, 1) for part in merged.chunk(groups)]
    merged = torch.cat([row[place] for place, row in enumerate(rows)])
    # What the second one pads is a border of the first one's output: stride₁ places of its input.
    pads = tuple(p + m * s for p, m, s in zip(pads, more, first.stride, strict=True))
    stride = tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
    return _convolution(merged, bias, stride, pads, like=second, groups=groups)


@torch.no_grad()
def merge_branches(branches: Sequence[nn.Module]) -> nn.Module:
    """One convolution that computes the sum of the branches of the same input: RepVGG's step.

    A branch is a ``Conv2d``, a ``Sequential`` of one and a batch norm, a ``BatchNorm2d``, or an
    ``Identity``; norms count as in evaluation mode. Smaller kernels are laid into the middle of
    the largest, which has to agree with their padding.

    Ding et al., 2021, "RepVGG: making VGG-style ConvNets great again". Raises ValueError for other
    branches, for hooks, for none with a convolution, and where strides, groups or middles differ.

    >>> branches = [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Identity()]
    >>> x = torch.randn(2, 4, 5, 5)
    >>> torch.allclose(merge_branches(branches)(x), sum(b(x) for b in branches), atol=1e-5)
    True
    """
    known = [b[0] if isinstance(b, nn.Sequential) and len(b) == 2 else b for b in branches]
    first = next((b for b in known if isinstance(b, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"no branch has a convolution: {', '.join(map(_kind, branches))}")
    made = [_as_convolution(branch, first) for branch in branches]
    largest = max(made, key=lambda c: c.kernel_size)
    high, wide = (max(c.kernel_size[k] for c in made) for k in (0, 1))
    middles = [_plain(one) for one in made]
    pads = [max(middle[k] for middle in middles) for k in (0, 1)]
    weight = largest.weight.new_zeros(len(first.weight), first.weight.shape[1], high, wide)
    bias = weight.new_zeros(len(weight))
    for one, middle in zip(made, middles, strict=True):
        over = [(n - k) for n, k in zip((high, wide), one.kernel_size, strict=True)]
        shift = [p - q for p, q in zip(pads, middle, strict=True)]
        same = one.stride == first.stride and one.groups == first.groups
        if not same or weight.shape[:2] != one.weight.shape[:2]:
            raise ValueError(f"{one} and {first} differ in stride, groups or channels")
        if any(o != 2 * s for o, s in zip(over, shift, strict=True)):
            raise ValueError(
                f"{one} has another middle than a kernel of {high} × {wide} padded by {pads}"
            )
        weight += F.pad(one.weight, (shift[1], shift[1], shift[0], shift[0]))
        if one.bias is not None:
            bias += one.bias
    merged = _convolution(weight, bias, first.stride, tuple(pads), like=first)
    return _trained_as(branches, merged)


def _as_convolution(branch: nn.Module, first: nn.Conv2d) -> nn.Conv2d:
    """A branch as one convolution without dilation; an identity has the channels of ``first``."""
    need_torchs(branch)
    if isinstance(branch, nn.Conv2d):
        spread = _spread(branch.weight, branch.dilation)
        pads = _plain(branch)
        return _convolution(spread, branch.bias, branch.stride, pads, like=branch)
    if isinstance(branch, nn.Sequential) and len(branch) == 2:
        conv, norm = branch
        need_torchs(conv, norm)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            return _as_convolution(_folded(conv, norm), first)
    if isinstance(branch, nn.Identity | nn.BatchNorm2d):
        if first.in_channels != first.out_channels:
            raise ValueError(
                f"{_kind(branch)} keeps {first.in_channels} channels, {first} does not"
            )
        size = first.in_channels // first.groups
        weight = torch.eye(size).repeat(first.groups, 1)[..., None, None].to(first.weight)
        one = _convolution(weight, None, (1, 1), (0, 0), like=first)
        return _folded(one, branch) if isinstance(branch, nn.BatchNorm2d) else one
    raise ValueError(
        f"a branch is a Conv2d, with a BatchNorm2d or not, or an Identity, not {_kind(branch)}"
    )


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    if norm.running_mean is None:
        raise ValueError("a batch norm without running statistics depends on its batch")
    if norm.num_features != conv.out_channels:
        raise ValueError(f"{norm} does not read the {conv.out_channels} channels of {conv}")
    made: nn.Conv2d = fuse_conv_bn_eval(copied(conv).eval(), copied(norm).eval())
    return made


def _plain(conv: nn.Conv2d) -> tuple[int, ...]:
    """Its padding, after the complaint about what does not merge."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(f"{conv} does not pad with zeros by numbers")
    return tuple(int(p) for p in conv.padding)


def _ungrouped(conv: nn.Conv2d) -> Tensor:
    """The kernel that reads every channel: (out, in, kh, kw), zeros between the groups."""
    parts = conv.weight.chunk(conv.groups)  # each (out / G, in / G, kh, kw)
    size = conv.in_channels // conv.groups
    sides = [(g * size, conv.in_channels - (g + 1) * size) for g in range(conv.groups)]
    return torch.cat(
        [F.pad(part, (0, 0, 0, 0, *side)) for part, side in zip(parts, sides, strict=True)]
    )


def _spread(weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """The kernel with its gaps of zeros written out."""
    high, wide = ((k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))
    made = weight.new_zeros(*weight.shape[:2], high, wide)
    made[:, :, :: dilation[0], :: dilation[1]] = weight
    return made


def _bias(first: Layer, second: Layer, sums: Tensor) -> Tensor | None:
    if first.bias is None:
        return second.bias
    passed = sums @ first.bias
    return passed if second.bias is None else passed + second.bias


def _like(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with META:
        made = nn.Linear(weight.shape[1], len(weight), bias is not None)
    return _filled(made, weight, bias, layer)


def _convolution(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    like: nn.Conv2d,
    groups: int | None = None,
) -> nn.Conv2d:
    size = tuple(weight.shape[2:])
    groups = like.groups if groups is None else groups
    with META:
        made = nn.Conv2d(
            weight.shape[1] * groups,
            len(weight),
            (size[0], size[1]),
            stride=(stride[0], stride[1]),
            padding=(padding[0], padding[1]),
            groups=groups,
            bias=bias is not None,
        )
    return _filled(made, weight, bias, like)


def _filled(made: Made, weight: Tensor, bias: Tensor | None, like: nn.Module) -> Made:
    made.to_empty(device=weight.device).to(weight).train(like.training)
    made.weight.copy_(weight)
    if made.bias is not None and bias is not None:
        made.bias.copy_(bias)
    return made


def _trained_as(layers: Iterable[nn.Module], made: Made) -> Made:
    """What is made of several layers is trained where one of them is, and bears no hook of them."""
    for layer in layers:
        if any(map(hooked, layer.modules())):
            raise ValueError(f"{layer} has hooks, which one layer cannot call: remove them first")
    made.requires_grad_(any(p.requires_grad for m in layers for p in m.parameters()))
    return made


def _kind(module: nn.Module) -> str:
    return type(module).__name__
