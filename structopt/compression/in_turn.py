"""Layers coded one after the other, each from what it reads behind those already coded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from structopt.compression.codes import Coded, chosen, naming, put_
from structopt.compression.evidence import all_ran, readers, say_idle, say_others, watch
from structopt.compression.granularity import Granularity
from structopt.compression.quantize import as_finite
from structopt.compression.vectors import SharedVectors, share_vectors
from structopt.training.copying import copied, need_plain
from structopt.training.observing import columns

Made = TypeVar("Made", bound=Coded)


def in_turn(
    model: nn.Module,
    batches: Iterable[Any],
    names: Sequence[str] | None,
    code: Callable[[Tensor, Tensor], Made],
) -> dict[str, Made]:
    """``code(weight, hessian)`` of linear layers and convolutions, in the order in which they run.

    ``names`` are parameters; None: the weights of all such layers that run, with a warning that
    names others, recurrent layers and transposed convolutions too. A weight that several layers
    share is coded once, for what all of them read. One pass over the batches for each
    layer, and one before; the model stays as it is.
    """
    batches, made = list(batches), dict[str, Made]()
    coded = copied(model)
    known = {id(weight): name for name, weight in coded.named_parameters()}
    layers = {layer: m for layer, m in readers(coded).items() if id(m.weight) in known}
    owner = {layer: known[id(m.weight)] for layer, m in layers.items()}  # a QAT model swaps weights
    wanted = None if names is None else chosen(coded, names)
    if wanted is None:
        need_plain(readers(coded))
        say_others(coded, "it is not coded here (quantize_weights rounds such weights)")
    else:
        if others := [name for name in wanted if name not in owner.values()]:
            raise ValueError(f"{others[0]!r} is no weight of a linear layer or convolution")
        layers = {layer: m for layer, m in layers.items() if owner[layer] in wanted}
    reading: dict[str, dict[str, None]] = {}  # of each weight the layers, in order; ties share one

    def see(layer: str, given: Tensor, out: Tensor) -> None:
        reading.setdefault(owner[layer], {})[layer] = None

    watch(coded, batches, layers, see)  # all of them: an expert may read nothing of the first
    all_ran(wanted or (), reading)
    idle = [layer for layer in layers if owner[layer] not in reading]
    say_idle(idle, "never ran on these batches: not coded")
    for name, those in reading.items():
        with naming(name):
            first, *more = (hessian_of(coded, batches, layer) for layer in those)
            made[name] = code(coded.get_parameter(name), sum(more, start=first))
        put_(coded, {name: made[name]})
    return made


def share_weight_vectors(
    model: nn.Module,
    values: int,
    size: int,
    per: Granularity | None = None,
    names: Sequence[str] | None = None,
    *,
    batches: Iterable[Any] | None = None,
) -> dict[str, SharedVectors]:
    """:func:`structopt.compression.share_vectors` for the weights of a model, which stays as it is.

    ``names`` as in :func:`structopt.compression.quantize_weights`. With ``batches``, of linear
    layers and convolutions, errors are weighed by what they do to outputs; layers then follow
    each other in the order in which they run, each with the inputs that it gets behind those
    already shared: one pass over the batches a layer.

    >>> codes = share_weight_vectors(nn.Linear(6, 4), 8, 2)
    >>> codes["weight"].table.shape
    torch.Size([1, 8, 2])
    """
    if batches is not None:
        return in_turn(
            model, batches, names, lambda w, h: share_vectors(w, values, size, per, hessian=h)
        )
    made = {}
    for name, weight in chosen(model, names).items():
        with naming(name):
            made[name] = share_vectors(weight, values, size, per)
    return made


def hessian_of(
    model: nn.Module, batches: Iterable[Any], name: str, dtype: torch.dtype | None = None
) -> Tensor:
    """The sum of x xᵀ over what the rows of a layer's weight multiply, (groups, n, n).

    Computed in this type; None: in that of x, at least float32.
    """
    layer, found = model.get_submodule(name), list[Tensor]()

    def see(name: str, given: Tensor, made: Tensor) -> None:
        x = _columns(layer, given).to(dtype)  # (groups, n, inputs)
        product = x @ x.mT
        found[:] = [found[0] + product if found else product]

    watch(model, batches, {name: layer}, see)
    all_ran([name], [name] * len(found))
    return found[0]


def _columns(layer: nn.Module, x: Tensor) -> Tensor:
    """What the rows of a layer's weight multiply, (groups, n, inputs)."""
    x = as_finite(x)
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        raise ValueError(
            f"the inputs of {type(layer).__name__} are not unfolded here: leave it out"
        )
    if isinstance(layer, nn.Linear) and not layer.in_features:
        return x.new_zeros(1, 0, 1)
    return columns(layer, x)
