"""The codes of a model's weights, beside the model: it stays an ordinary one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from structopt.compression.granularity import Granularity
from structopt.compression.grids import Grid
from structopt.compression.quantize import Quantized, quantize
from structopt.compression.sharing import Shared, share
from structopt.compression.vectors import SharedVectors
from structopt.training.copying import need_changeable, need_numbers

Coded = Quantized | Shared | SharedVectors
"""A tensor as codes: on a grid, or in a table of numbers or vectors."""

Codes = dict[str, Coded]
"""Codes for each parameter that has them, by its name."""


def quantize_weights(
    model: nn.Module, grid: Grid, names: Sequence[str] | None = None
) -> dict[str, Quantized]:
    """Round weights to the nearest code, each tensor by itself; the model stays as it is.

    ``names`` are the parameters to round: by default all with two dimensions or more, which leaves
    out biases and norms. Write them into a model by :func:`put_`. Raises ValueError for a name
    that the model has not, and for weights that cannot be rounded, with their name: those that are
    computed from other parameters, as by weight norm, are among them.

    >>> quantize_weights(nn.Linear(3, 2), Grid(4))["weight"].codes.shape
    torch.Size([2, 3])
    """
    made = {}
    for name, weight in chosen(model, names).items():
        with naming(name):
            made[name] = quantize(weight, grid)
    return made


def share_weights(
    model: nn.Module,
    values: int,
    per: Granularity | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Shared]:
    """:func:`structopt.compression.share` for the weights of a model, as :func:`quantize_weights`.

    >>> codes = share_weights(nn.Linear(3, 2), 4)
    >>> codes["weight"].table.shape
    torch.Size([1, 4])
    """
    made = {}
    for name, weight in chosen(model, names).items():
        with naming(name):
            made[name] = share(weight, values, per)
    return made


@torch.no_grad()
def put_(model: nn.Module, codes: Mapping[str, Coded]) -> nn.Module:
    """Write the values of the codes into the model, in place, and return it.

    Raises ValueError for a name or a shape that is not the model's.

    >>> model = nn.Linear(3, 2)
    >>> put_(model, quantize_weights(model, Grid(1))).weight.abs().unique().numel()
    1
    """
    weights, values = chosen(model, list(codes)), dict[str, Tensor]()
    for name, weight in weights.items():
        value = codes[name].dequantize()
        if value.shape != weight.shape:
            raise ValueError(
                f"the codes of {name} have shape {tuple(value.shape)}, the model's weight "
                f"{tuple(weight.shape)}: they were made from another network"
            )
        need_changeable(name, weight)
        values[name] = value
    for name, value in values.items():
        weights[name].copy_(value)
    return model


def chosen(model: nn.Module, names: Sequence[str] | None) -> dict[str, Tensor]:
    """The parameters of these names; None: all with two dimensions or more."""
    need_numbers(model)
    parameters = dict(model.named_parameters())
    if isinstance(names, str):
        raise ValueError(f"names is a list of names: [{names!r}]")
    if names is None:
        _need_no_computed(model)
        return {name: weight for name, weight in parameters.items() if weight.ndim > 1}
    if missing := [name for name in names if name not in parameters]:
        near = ", ".join(name for name, weight in parameters.items() if weight.ndim > 1)
        tied = dict(model.named_parameters(remove_duplicate=False)).get(missing[0])
        for name, weight in parameters.items():
            if weight is tied:
                raise ValueError(f"{missing[0]!r} is tied to {name!r}: give that name")
        raise ValueError(f"this model has no {missing[0]!r}; its weights are {near}")
    return {name: parameters[name] for name in names}


def _need_no_computed(model: nn.Module) -> None:
    """Rounding what a weight is computed from leaves the weight itself between the codes."""
    for path, module in model.named_modules():
        chains = getattr(module, "parametrizations", {}).items()
        found = [key for key, chain in chains if any(p.ndim > 1 for p in chain.parameters())]
        hooks = module._forward_pre_hooks.values()
        found += [hook.name for hook in hooks if isinstance(hook, WeightNorm | SpectralNorm)]
        if found:
            raise ValueError(
                f"{f'{path}.' if path else ''}{found[0]} is computed from other parameters, and "
                "would not be rounded with them: parametrize.remove_parametrizations first "
                "(remove_gates_, remove_weight_norm, remove_spectral_norm), or name the parameters"
            )


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Say in an error which weight it speaks of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
