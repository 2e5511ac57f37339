"""Copies of models, also of those whose weights hooks compute."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Module = TypeVar("Module", bound=nn.Module)


@torch.inference_mode(False)  # else the copy could not be trained
def copied(model: Module) -> Module:
    """As ``copy.deepcopy``, which stops at a weight that ``torch.nn.utils.prune`` has computed.

    A hook computes it anew in each forward pass, of the copy too.
    """
    held = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in held if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


def need_plain(layers: Mapping[str, nn.Module], instead: str = "name other weights") -> None:
    """Raises ValueError for the first layer whose weight other parameters compute.

    >>> need_plain({"head": nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))})
    Traceback (most recent call last):
    ValueError: the weight of head is computed from other parameters: torch.nn.utils.prune.remove or
    parametrize.remove_parametrizations first, or name other weights
    """
    for name, layer in layers.items():
        if "weight" not in layer._parameters:
            raise ValueError(
                f"the weight of {name or 'the model'} is computed from other parameters: "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations first, or "
                f"{instead}"
            )


def need_numbers(model: nn.Module) -> None:
    """Raises ValueError for the first parameter or buffer that holds no numbers yet.

    >>> need_numbers(nn.Linear(2, 1, device="meta"))
    Traceback (most recent call last):
    ValueError: weight is on the meta device, without numbers: load those of the model first
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no size yet: run the model once first, on an example")
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device, without numbers: load those of the model first"
            )


def need_changeable(name: str, weight: Tensor) -> None:
    """Raises ValueError for a tensor that torch lets nobody change in place."""
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} was made under torch.inference_mode, and cannot be changed: copy.deepcopy of "
            "the model can"
        )
