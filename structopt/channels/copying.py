"""Copies of a model that have other tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

_ATOMS = frozenset((bool, int, float, str, type(None)))
_HELD = ("_parameters", "_buffers", "_modules")
_STORES = (dict, OrderedDict, set)
_WAYS = ("__reduce_ex__", "__reduce__", "__new__")


def substitute(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the model in which each parameter and buffer is what `change` makes of it."""
    memo: dict[int, Any] = {}
    stores = [s for m in model.modules() for s in (m._parameters, m._buffers, vars(m))]
    with torch.no_grad():
        for store in stores:
            for value in store.values():
                if isinstance(value, Tensor) and id(value) not in memo:
                    made = change(value).detach()
                    if isinstance(value, nn.Parameter):
                        made = nn.Parameter(made, requires_grad=value.requires_grad)
                    memo[id(value)] = made
    return _deepcopy(model, memo)


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """As `copy.deepcopy`, which spends most of its time on the ten empty dicts of each module."""
    plain = [module for module in model.modules() if _is_plain(module)]
    for module in plain:
        memo[id(module)] = object.__new__(type(module))
    for module in plain:
        twin = vars(memo[id(module)])
        for name, value in module.__getstate__().items():  # type: ignore[no-untyped-call]
            if _is_atom(value):
                twin[name] = value
            elif type(value) is dict and name in _HELD and id(value) not in memo:
                twin[name] = memo[id(value)] = {
                    key: memo[id(held)] if id(held) in memo else copy.deepcopy(held, memo)
                    for key, held in value.items()
                }
            elif type(value) in _STORES and not value:
                twin[name] = memo.setdefault(id(value), type(value)())
            else:
                twin[name] = copy.deepcopy(value, memo)
    return copy.deepcopy(model, memo)


def _is_atom(value: Any) -> bool:
    return type(value) in _ATOMS or (type(value) is tuple and _ATOMS.issuperset(map(type, value)))


def _is_plain(module: nn.Module) -> bool:
    """Whether its class leaves it to Python to say what belongs to a copy."""
    own = type(module)
    mends = own.__setstate__ is not nn.Module.__setstate__  # convolutions do, for old pickles alone
    return not (
        hasattr(own, "__deepcopy__")
        or (mends and not isinstance(module, _ConvNd))
        or any(getattr(own, way) is not getattr(object, way) for way in _WAYS)
    )


def flatten(model: nn.Module) -> None:
    """Weights of an RNN that were replaced lie apart: cuDNN wants them in one piece again."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
