"""The residual stream of a transformer, turned to its principal axes and narrowed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from structopt.channels import ChannelGroup, channel_groups, take
from structopt.channels.copying import substitute
from structopt.channels.judging import lively
from structopt.channels.verify import difference, outputs, tolerance
from structopt.channels.widening import wide
from structopt.losses.checks import need_values, real
from structopt.slicing.attention import FreeAttention, free_attention
from structopt.slicing.cutting import named
from structopt.slicing.streams import Stream, find_stream
from structopt.slicing.turning import divide_as_before_, fold_norms_, gram, turn_
from structopt.training.copying import copied
from structopt.training.statistics import placed


@dataclass(frozen=True)
class Rotated:
    """A model whose residual stream lies on its principal axes, the largest variance first.

    `model` computes what the model given does. `shares` is the part of the variance of the
    normalised stream on each axis, (d,), descending; its sum is 1.
    """

    model: nn.Module
    shares: Tensor
    _stream: Stream = field(repr=False)
    _example: Any = field(repr=False)

    def lost(self, width: float) -> float:
        """The part of the variance that :meth:`narrow` of this width leaves out."""
        return float(self.shares[self._kept(width) :].sum())

    @torch.inference_mode(False)
    def narrow(self, width: float) -> nn.Module:
        """A copy with the first axes of the stream alone: the share `width` of them, rounded.

        What it computes equals the rotated model in which nobody writes the other axes; norms go
        on dividing by the root of the full width, by their weight and ε. Heads and perceptrons
        keep their width.

        Raises ValueError for a width outside (0, 1], one that leaves no axis, and where the width
        of the stream is fixed by the model's own Python.
        """
        kept, size = self._kept(width), self._stream.size
        if kept == size:
            return copied(self.model)
        made = take(self.model, {self._group: range(kept)})

        def scaled(model: nn.Module) -> nn.Module:
            return divide_as_before_(model, self._stream, kept)

        def silenced(model: nn.Module) -> nn.Module:
            tensors = named(model)
            for writer, axis in self._stream.writers:
                tensors[writer].data.narrow(axis, kept, size - kept).zero_()
            return model

        full = silenced(substitute(self.model, wide))
        narrow = scaled(substitute(made, wide))
        _demand_equal(full, narrow, self._example, "narrowed", self._tied)
        return scaled(made)

    @functools.cached_property
    def _tied(self) -> str:
        """The layers off the stream that `take` narrows with it, in words."""
        stream = self._stream
        known = {f"{name}.weight": 1 for name in stream.readers} | dict(stream.writers)
        known |= {f"{name}.weight": 0 for name in stream.norms}
        others = [m for m in self._group.members if known.get(m.parameter) != m.dim]
        names = dict.fromkeys(member.parameter.rpartition(".")[0] for member in others)
        return f"; {', '.join(names)} would get the width of the stream too" if names else ""

    @functools.cached_property
    def _group(self) -> ChannelGroup:
        """The axes of the stream, as channels that `take` can cut."""
        first = self._stream.writers[0]
        channels = channel_groups(self.model, placed(self._example, self.model))
        for group in channels.every:
            if any((member.parameter, member.dim) == first for member in group.members):
                if not group.frozen:
                    return group
                raise ValueError(f"the width of the stream is fixed: {group.frozen}")
        raise AssertionError(f"{first} lies in no group")

    def _kept(self, width: float) -> int:
        if not 0 < real(width) <= 1:
            raise ValueError(f"a width is a share of the axes, in (0, 1], not {width!r}")
        kept = int(width * self._stream.size + 0.5)
        if not kept:
            raise ValueError(
                f"width {width:g} leaves none of the {self._stream.size} axes of the stream: take "
                f"at least {0.5 / self._stream.size:.2g}"
            )
        return kept


@torch.inference_mode(False)  # else ops are not taken apart, and the copy could not be trained
def to_rms_norm(model: nn.Module, example: Any) -> nn.Module:
    """A copy with the same function whose residual stream is normalised by ``nn.RMSNorm`` alone.

    LayerNorm(x) = γ ⊙ RMSNorm(x - mean x) + β. The mean is taken away where the stream is
    written, W ← (I - 11ᵀ/d) W, and γ and β go into the layers that read it, W ← W diag(γ),
    b ← b + W β (Ashkboos et al., 2024, "SliceGPT"). The weights that are left in the norms are 1.

    The copy is compared with the model in double precision, in evaluation mode. Raises ValueError,
    naming the layer and the reason, where the stream cannot be rotated.

    >>> from structopt.networks import TinyTransformer
    >>> to_rms_norm(TinyTransformer(dim=8), torch.zeros(1, 1, 28, 28)).layers[0].norm1
    RMSNorm((8,), eps=1e-05, elementwise_affine=True)
    """
    return _converted(model, example)[0]


@torch.inference_mode(False)
def rotate(model: nn.Module, example: Any, batches: Iterable[Any]) -> Rotated:
    """Turn the residual stream of a transformer to its principal axes. The function stays.

    RMSNorm(x Q) = RMSNorm(x) Q for an orthogonal Q: what writes the stream is multiplied by Qᵀ,
    what reads it by Q (Ashkboos et al., 2024, "SliceGPT"). The columns of Q are the eigenvectors of
    Σ nᵀn over all normalised rows n, (d,), that the norms of the model hand on for these batches.
    One Q serves the whole depth, so that shortcuts need no matrix and the model keeps its class;
    the paper takes another Q for each block, and pays with a d × d matrix on each shortcut.

    Convolutions, activations and batch norms do not turn along: of torchvision's networks the five
    ViTs can be rotated. Swin, whose stream changes its width, and ConvNeXt are refused.

    Args:
        model: norms first (pre-norm), ``nn.LayerNorm`` or ``nn.RMSNorm``; layer norms are converted
            by :func:`to_rms_norm`, ``nn.MultiheadAttention`` by :func:`free_attention`.
        example: what the model is called with, as for `channel_groups`.
        batches: inputs, or pairs of inputs and targets. Nothing is trained.

    Raises:
        ValueError: no batches; a stream that meets anything but sums, norms and linear layers
            (post-norm, a layer scale, a convolution), naming the layer and the op. The model is as
            it was.

    Example:
        >>> from structopt.networks import TinyTransformer
        >>> x = torch.rand(16, 1, 28, 28)
        >>> rotated = rotate(TinyTransformer(dim=8), x[:1], [x])
        >>> rotated.narrow(0.5).layers[0].qkv
        Linear(in_features=4, out_features=24, bias=True)
    """
    converted, stream = _converted(model, example)
    products = gram(converted, stream, batches)
    variances, axes = torch.linalg.eigh(products)
    variances, axes = variances.flip(0).clamp(min=0), axes.flip(1)
    top = axes.gather(0, axes.abs().argmax(0)[None])
    axes = axes * top.sign()  # the sign of an axis is free: the largest entry is positive

    def turned(model: nn.Module) -> nn.Module:
        return turn_(model, stream, axes)

    made = _edited(converted, example, turned, "rotated")
    return Rotated(made, variances / variances.sum(), stream, example)


def _converted(model: nn.Module, example: Any) -> tuple[nn.Module, Stream]:
    """With free attention and RMS norms, and the stream of that."""
    need_values("a stream that is turned", model.parameters())
    free = free_attention(model)
    stream = find_stream(free, example)
    attentions = [n for n, m in free.named_modules() if isinstance(m, FreeAttention)]
    if attentions:
        _demand_equal(model, free, example, "given free attention")
    made = _edited(free, example, lambda copy: fold_norms_(copy, stream), "given RMS norms")
    return made, stream


def _edited(
    model: nn.Module, example: Any, edit: Callable[[nn.Module], nn.Module], what: str
) -> nn.Module:
    """The model edited in place, after the same edit of a copy has held in double precision."""
    _demand_equal(model, edit(substitute(model, wide)), example, what)
    return edit(model)


def _demand_equal(
    model: nn.Module, made: nn.Module, example: Any, what: str, why: str = ""
) -> None:
    other = lively(model, example)
    for one in [example] if other is None else [example, other]:
        expected = outputs(model, one)
        error = difference(expected, outputs(made, one))
        if error > tolerance(expected):
            raise ValueError(
                f"the residual stream cannot be {what} exactly: the outputs differ by {error:.1e} "
                f"of their size{why}. The model is as it was"
            )
