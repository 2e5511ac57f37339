"""The edits of rotation, in place: norms without scale, a stream turned, a norm over fewer axes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from structopt.channels.exchanging import exchange_
from structopt.channels.widening import wide
from structopt.measure.running import call
from structopt.slicing.asking import own
from structopt.slicing.cutting import named
from structopt.slicing.streams import Stream
from structopt.training.hooked import in_place_of
from structopt.training.observing import observed
from structopt.training.statistics import inputs_of, placed


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _set(tensor: Tensor, values: Tensor) -> None:
    """In place, so that what is tied stays tied."""
    tensor.data.copy_(values)


@torch.no_grad()
def fold_norms_(model: nn.Module, stream: Stream) -> nn.Module:
    """Scale and shift of the norms into the readers, the mean into the writers."""
    norms = {name: model.get_submodule(name) for name in stream.norms}
    for name, through in stream.readers.items():
        norm: Any = norms.get(through)
        layer = _linear(model, name)
        shift = getattr(norm, "bias", None)
        if shift is not None and shift.any():
            added = wide(layer.weight) @ wide(shift)
            if getattr(layer, "bias", None) is None:
                new = torch.zeros_like(layer.weight[:, 0])
                layer.bias = nn.Parameter(new, layer.weight.requires_grad)
            _set(layer.bias, wide(layer.bias) + added)
        if norm is not None and norm.weight is not None:
            _set(layer.weight, wide(layer.weight) * wide(norm.weight))
    if any(isinstance(norm, nn.LayerNorm) for norm in norms.values()):
        tensors = named(model)
        for writer, dim in stream.writers:
            values = wide(tensors[writer])
            _set(tensors[writer], values - values.mean(dim, keepdim=True))
    for name, norm in norms.items():
        like = named(model)[stream.writers[0][0]]
        made = nn.RMSNorm(stream.size, norm.eps).to(like)
        made.requires_grad_(norm.weight is None or norm.weight.requires_grad)
        exchange_(model, name, in_place_of(norm, made, name))
    return model


@torch.no_grad()
def turn_(model: nn.Module, stream: Stream, axes: Tensor) -> nn.Module:
    tensors = named(model)
    for writer, dim in stream.writers:
        old = wide(tensors[writer])
        turned = torch.tensordot(old, axes.to(old), dims=([dim], [0]))
        _set(tensors[writer], turned.movedim(-1, dim))
    for name in stream.readers:
        weight = _linear(model, name).weight
        old = wide(weight)
        _set(weight, old @ axes.to(old))
    return model


@torch.no_grad()
def divide_as_before_(model: nn.Module, stream: Stream, kept: int) -> nn.Module:
    """Norms over the axes kept that divide as those over all axes did."""
    ratio = stream.size / kept
    for name in stream.norms:
        norm: Any = model.get_submodule(name)
        computed = torch.promote_types(norm.weight.dtype, torch.float32)  # of half precision too
        eps = torch.finfo(computed).eps if norm.eps is None else norm.eps
        norm.eps = eps * ratio
        norm.weight.mul_(math.sqrt(ratio))
    return model


def gram(model: nn.Module, stream: Stream, batches: Iterable[Any]) -> Tensor:
    """Σ nᵀn over all that the norms hand on, (d, d)."""
    found = torch.zeros(stream.size, stream.size, dtype=torch.float64)

    def add(_: nn.Module, __: Any, out: Tensor) -> None:
        rows = out.detach().flatten(0, -2).cpu().double()
        found.add_(rows.T @ rows)

    handles = [model.get_submodule(name).register_forward_hook(add) for name in stream.norms]
    with observed(model, handles):
        for batch in batches:
            call(model, own(placed(inputs_of(batch), model)))
    if not found.any():
        raise ValueError("the batches are empty: there is nothing to find the axes from")
    if not found.isfinite().all():
        raise ValueError("what the norms hand on is NaN or infinite: it has no principal axes")
    return found
