"""Layers as products of smaller layers: singular values, Tucker-2, spatial and depthwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from structopt.channels.exchanging import exchange_
from structopt.compression.codes import naming
from structopt.compression.evidence import readers, say_idle, watch
from structopt.compression.finished import need_finished
from structopt.compression.in_turn import hessian_of
from structopt.compression.merging import META
from structopt.compression.quantize import as_finite
from structopt.compression.ranks import SVD, Form, Ranks
from structopt.compression.targets import Target, chosen_ranks
from structopt.training.copying import copied, need_numbers, need_plain
from structopt.training.hooked import in_place_of

LAYERS = (nn.Linear, nn.Conv2d)


def spectra(
    model: nn.Module, form: Form | None = None, batches: Iterable[Any] | None = None
) -> dict[str, list[Tensor]]:
    """The singular values of each layer that can be factorised, for each rank that it has.

    Their squares add up to the squared weights; with ``batches``, to the squared outputs (without
    bias) over all that the layer reads there. What the values beyond a rank add up to is lost.

    >>> from structopt.compression import SVD
    >>> [len(values) for values in spectra(nn.Linear(5, 3), SVD())[""]]
    [3]
    """
    form = SVD() if form is None else form
    batches = None if batches is None else list(batches)
    made = {}
    need_plain(readers(model))
    for name, layer in _that_run(model, batches, form).items():
        with naming(name):
            weight = as_finite(layer.get_parameter("weight"))
            made[name] = form.spectra(weight, _root(model, batches, name, form))
    return made


def factorize(
    model: nn.Module,
    target: Target | Mapping[str, int | tuple[int, ...]],
    *,
    form: Form | None = None,
    batches: Iterable[Any] | None = None,
) -> nn.Module:
    """A copy of the model in which layers are products of smaller ones, in an ``nn.Sequential``.

    ``target`` says how much may be lost or spent, and layers that would not become smaller stay as
    they are; or it gives the ranks of the layers by name. ``form`` is the kind of product: by
    default :class:`structopt.compression.SVD`. At full rank it is exact. With ``batches``, what is
    kept is what matters for the inputs of the layer in them (for SVD).

    Linear layers and two-dimensional convolutions without groups take part, if they have their
    weight for themselves: factors would part it from a tied embedding, which keeps it. With
    ``batches`` and SVD, layers that are never called stay, and a warning names them: a model that
    multiplies by ``layer.weight`` itself finds no such thing in a product. Raises ValueError for
    other layers that are named, for ranks out of range, for weights that are not finite, and for a
    model that still learns its steps.

    >>> from structopt.compression import Energy
    >>> weight = torch.randn(30, 2) @ torch.randn(2, 40)
    >>> model = nn.Sequential(nn.Linear(40, 30))
    >>> _ = model[0].weight.data.copy_(weight)
    >>> factorize(model, Energy(0.999))[0]
    Sequential(
      (0): Linear(in_features=40, out_features=2, bias=False)
      (1): Linear(in_features=2, out_features=30, bias=True)
    )
    """
    form = SVD() if form is None else form
    batches = None if batches is None else list(batches)
    wanted = target if isinstance(target, Mapping) else readers(model)
    need_finished(model)
    need_plain({name: layer for name, layer in readers(model).items() if name in wanted})
    layers = _layers(model)
    if isinstance(target, Mapping):
        ranks = {name: _given(name, rank, layers, form) for name, rank in target.items()}
    elif not isinstance(target, Target):
        raise ValueError(f"target={target!r}: give Energy, Error, Weights, or ranks by name")
    else:
        found = spectra(model, form, batches)
        shapes = {name: layers[name].get_parameter("weight").shape for name in found}
        ranks = chosen_ranks(found, shapes, form, target)
    made = copied(model)
    for name, rank in ranks.items():
        with naming(name or "the model"):
            product = _product(layers[name], rank, form, _root(model, batches, name, form))
        product = in_place_of(made.get_submodule(name), product, name)
        if not name:
            return product
        exchange_(made, name, product)
    return made


def _that_run(model: nn.Module, batches: Iterable[Any] | None, form: Form) -> dict[str, nn.Module]:
    """The layers that can be factorised; where their inputs count, those that read any."""
    layers, ran = _layers(model), set[str]()
    if batches is None or not form.sees_inputs:
        return layers
    watch(model, batches, layers, lambda name, given, made: ran.add(name))
    say_idle([name for name in layers if name not in ran], "never ran on these batches: left out")
    return {name: layer for name, layer in layers.items() if name in ran}


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    need_numbers(model)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    return {
        name: layer
        for name, layer in readers(model).items()
        if type(layer) in LAYERS  # torch's attention reads the weight of its own kind of layer
        and "weight" in layer._parameters
        and layer.get_parameter("weight").numel()
        and owners[id(layer.weight)] < 2  # the other owner would keep the whole weight
        and getattr(layer, "groups", 1) == 1
        and getattr(layer, "padding_mode", "zeros") == "zeros"
    }


def _given(
    name: str, rank: int | tuple[int, ...], layers: Mapping[str, nn.Module], form: Form
) -> Ranks:
    if name not in layers:
        raise ValueError(
            f"{name!r} is no linear layer or two-dimensional convolution without groups that pads "
            "with zeros and shares its weight with no other; those are "
            f"{', '.join(layers) or 'none of this model'}"
        )
    full = form.full(layers[name].get_parameter("weight").shape)
    ranks = tuple(rank) if isinstance(rank, Sequence) else (rank,) * len(full)
    if len(ranks) != len(full) or not all(
        isinstance(r, SupportsIndex) and 1 <= r.__index__() <= f
        for r, f in zip(ranks, full, strict=True)
    ):
        raise ValueError(f"{form} of {name} has ranks from 1 to {full}, not {ranks}")
    return tuple(r.__index__() for r in ranks)


def _root(model: nn.Module, batches: Iterable[Any] | None, name: str, form: Form) -> Tensor | None:
    """L with L Lᵀ = the sum of x xᵀ over what the layer reads, and a little of its mean."""
    if batches is None or not form.sees_inputs:
        return None
    # In float32 the rounding of one large direction, as of what a ReLU makes, would outweigh the
    # rest, and the sum have no root.
    hessian = hessian_of(model, batches, name, torch.float64)[0]
    hessian.diagonal().add_(1e-6 * hessian.diagonal().mean() + 1e-30)
    made: Tensor = torch.linalg.cholesky(hessian)
    return made


@torch.no_grad()
def _product(layer: nn.Module, ranks: Ranks, form: Form, root: Tensor | None) -> nn.Sequential:
    """The layers of the product, on the device and in the type of the layer."""
    weight = layer.get_parameter("weight")
    wide = as_finite(weight).double()
    bias = layer.bias if isinstance(layer.bias, nn.Parameter) else None
    parts = form.parts(wide, ranks, root)
    made = nn.Sequential()
    for place, (tensor, settings) in enumerate(parts):
        last = place == len(parts) - 1
        own: nn.Module
        with META:
            if isinstance(layer, nn.Linear):
                own = nn.Linear(tensor.shape[1], len(tensor), last and bias is not None)
            else:
                assert isinstance(layer, nn.Conv2d)
                own = _convolution(layer, tensor, settings, last and bias is not None)
        own.to_empty(device=weight.device).to(weight.dtype)
        own.get_parameter("weight").copy_(tensor).requires_grad_(weight.requires_grad)
        if last and bias is not None:
            own.get_parameter("bias").copy_(bias).requires_grad_(bias.requires_grad)
        made.append(own)
    return made


def _convolution(layer: nn.Conv2d, weight: Tensor, settings: str, bias: bool) -> nn.Conv2d:
    """A convolution that takes from ``layer`` the stride, padding and dilation along "y", "x"."""
    size = tuple(weight.shape[2:])
    along = ["y" in settings, "x" in settings]
    pads = layer.padding
    if isinstance(pads, str):  # "same": what lies over goes to the right, as torch does it
        if pads == "same" and any(
            (k - 1) * d % 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
        ):
            raise ValueError("a kernel of even size with padding='same' is padded unevenly")
        same = [(k - 1) * d // 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        pads = tuple(same) if pads == "same" else (0, 0)
    groups = layer.in_channels if "groups" in settings else 1
    return nn.Conv2d(
        weight.shape[1] * groups,
        len(weight),
        (size[0], size[1]),
        stride=tuple(s if on else 1 for s, on in zip(layer.stride, along, strict=True)),  # type: ignore[arg-type]
        padding=tuple(p if on else 0 for p, on in zip(pads, along, strict=True)),  # type: ignore[arg-type]
        dilation=tuple(d if on else 1 for d, on in zip(layer.dilation, along, strict=True)),  # type: ignore[arg-type]
        groups=groups,
        bias=bias,
    )
