"""Zeros among the numbers that layers read: counted, and skipped where that is faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structopt.channels.exchanging import exchange_
from structopt.compression.evidence import See, by_channel, own_forward, readers, watch
from structopt.compression.finished import need_finished
from structopt.measure import latency
from structopt.training.copying import copied
from structopt.training.hooked import in_place_of


@dataclass(frozen=True)
class Zeros:
    """The share of exact zeros among what each layer reads.

    ``always``: the share of its inputs (of its channels, if a convolution) that were zero in every
    example: those can be removed for good.
    """

    share: dict[str, float]
    always: dict[str, float]

    def __str__(self) -> str:
        lines = [f"{'layer':<28}{'zeros':>10}{'always':>10}"]
        lines += [f"{n:<28}{z:>10.1%}{self.always[n]:>10.1%}" for n, z in self.share.items()]
        return "\n".join(lines)


def input_zeros(
    model: nn.Module, batches: Iterable[Any], names: Sequence[str] | None = None
) -> Zeros:
    """Count the zeros that linear layers and convolutions read in these batches.

    In evaluation mode; a batch is the inputs, or a pair (inputs, targets). Raises ValueError for
    no batches, and for unknown names.

    >>> model = nn.Sequential(nn.ReLU(), nn.Linear(4, 1))
    >>> print(input_zeros(model, [torch.tensor([[-1.0, -1, 2, 3], [-1, 1, 2, 3]])]))
    layer                            zeros    always
    1                                37.5%     25.0%
    """
    return _counted(model, batches, readers(model, names))


def _counted(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    also: See = lambda name, given, made: None,
) -> Zeros:
    total: dict[str, int] = {}
    zero: dict[str, int] = {}
    used: dict[str, Tensor] = {}

    def see(name: str, given: Tensor, made: Tensor) -> None:
        also(name, given, made)
        units = by_channel(layers[name], given != 0)
        total[name] = total.get(name, 0) + units.numel()
        zero[name] = zero.get(name, 0) + units.numel() - int(units.sum())
        used[name] = units.any(1) | used[name] if name in used else units.any(1)

    watch(model, batches, layers, see)
    share = {name: zero[name] / max(1, total[name]) for name in total}
    always = {name: int((~used[name]).sum()) / max(1, len(used[name])) for name in total}
    return Zeros(share, always)


class SkipZeros(nn.Module):
    """A linear layer that reads no weight of an input that is zero: y = Σ x_i · W[:, i] + b.

    The weight is kept by columns, (in, out), and only columns with x_i ≠ 0 are read, by the kernel
    of ``torch.nn.functional.embedding_bag``. The same function up to rounding. At batch 1 a large
    layer waits for its weights to come from memory: fewer of them, less time. At a large batch the
    plain product, which reads each weight once for all examples, is faster.

    >>> layer = nn.Linear(4, 2)
    >>> x = torch.tensor([[0.0, 1.0, 0.0, 2.0]])
    >>> torch.allclose(SkipZeros(layer)(x), layer(x))
    True
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with torch.inference_mode(False):  # to be trained, wherever it is made
            columns = layer.weight.detach().T.clone(memory_format=torch.contiguous_format)
            self.columns = nn.Parameter(columns, layer.weight.requires_grad)  # (in, out)
            self.bias = None
            if layer.bias is not None:
                self.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(input.shape[:-1].numel(), input.shape[-1])  # (B, in)
        if len(rows) == 1:
            places = rows[0].nonzero()[:, 0]
            values, starts = rows[0, places], places.new_zeros(1)
        else:
            row, places = rows.nonzero(as_tuple=True)
            numbers = torch.arange(len(rows), device=rows.device)
            values, starts = rows[row, places], torch.searchsorted(row, numbers)
        made = F.embedding_bag(places, self.columns, starts, mode="sum", per_sample_weights=values)
        made = made if self.bias is None else made + self.bias
        return made.reshape(*input.shape[:-1], made.shape[-1])


@dataclass(frozen=True)
class Skipped:
    """A model whose linear layers skip zeros where that is faster.

    ``zeros``: the share of zeros that each linear layer read; ``times``: how many times faster it
    is with zeros skipped (below 1: slower), medians of turns on real inputs, measured on
    ``device``; ``names``: the layers that skip.
    """

    model: nn.Module
    names: tuple[str, ...]
    zeros: dict[str, float]
    times: dict[str, float]
    device: str

    def __str__(self) -> str:
        lines = [f"{'linear layer':<28}{'zeros':>8}{'times faster':>14}  {self.device}"]
        for name, times in self.times.items():
            kept = "" if name in self.names else "  (left as it was)"
            lines.append(f"{name:<28}{self.zeros[name]:>8.1%}{times:>14.2f}{kept}")
        return "\n".join(lines)


def skip_zeros(
    model: nn.Module, batches: Iterable[Any], *, rounds: int = 15, at_least: float = 1.1
) -> Skipped:
    """A copy whose linear layers skip the zeros that they read, wherever that is faster here.

    Both forms of each layer take turns on an input that it really reads, ``rounds`` times; it
    becomes :class:`SkipZeros` where that is ``at_least`` so many times faster. Give batches of the
    size at which the model will be used, 1 above all. The function stays the same. Layers with a
    forward of their own, as adapters have, stay as they are, and those whose weight is computed, or
    shared with another layer.

    Raises ValueError for a model without linear layers, no batches, and as ``latency``.

    >>> made = skip_zeros(nn.Linear(8, 8), [torch.zeros(1, 8)], rounds=1, at_least=1e9)
    >>> made.names, made.zeros
    ((), {'': 1.0})
    """
    layers = {n: m for n, m in readers(model).items() if isinstance(m, nn.Linear)}
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no linear layer")
    need_finished(model)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    layers = {n: m for n, m in layers.items() if owners[id(m.weight)] == 1 and not own_forward(m)}
    seen: dict[str, Tensor] = {}
    zeros = _counted(
        model, batches, layers, lambda name, given, made: seen.setdefault(name, given)
    ).share
    made, names, times, device = copied(model), [], {}, ""
    for name, given in seen.items():
        layer = layers[name]
        assert isinstance(layer, nn.Linear)
        skipping = SkipZeros(layer)
        found = latency({"all": layer, "skip": skipping}, given, rounds=rounds)
        times[name] = float(found["all"]) / float(found["skip"])
        device = found["all"].device
        if times[name] >= at_least:
            names.append(name)
            skipping = in_place_of(made.get_submodule(name), skipping, name)
            if not name:
                made = skipping
            else:
                exchange_(made, name, skipping)
    return Skipped(made, tuple(names), zeros, times, device)
