"""Copies of a model that have other tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from structopt.channels.walking import modules_of

_ATOMS = frozenset((bool, int, float, str, type(None)))
_HELD = ("_parameters", "_buffers", "_modules")
_STORES = (dict, OrderedDict, set)
_USUAL = _ATOMS.union(_STORES)
_WAYS = ("__reduce_ex__", "__reduce__", "__new__")


def substitute(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the model in which each parameter and buffer is what `change` makes of it."""
    memo: dict[int, Any] = {}
    modules = list(modules_of(model).values())
    with torch.no_grad():
        for store in (s for m in modules for s in (m._parameters, m._buffers, vars(m))):
            for value in store.values():
                if type(value) in _USUAL or id(value) in memo or not isinstance(value, Tensor):
                    continue
                made = change(value).detach()
                if isinstance(value, nn.Parameter):
                    made = nn.Parameter.__new__(type(value), made, value.requires_grad)
                memo[id(value)] = made
    try:
        twin = _deepcopy(model, modules, dict(memo))
    except Exception:  # a class that looks into its parts before they are filled
        twin = copy.deepcopy(model, memo)
    _apart(modules, twin)
    return twin


def _apart(modules: list[nn.Module], made: nn.Module) -> None:
    """A part that gives itself when it is copied would be changed with the copy."""
    mine = set(map(id, modules))
    for name, module in modules_of(made).items():
        if id(module) in mine:
            raise ValueError(
                f"{name or type(module).__name__} gives itself when it is copied "
                f"({type(module).__name__}.__deepcopy__)"
            )


def _deepcopy(model: nn.Module, modules: list[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """As `copy.deepcopy`, which spends most of its time on the ten empty dicts of each module."""
    kinds = {kind: _is_plain(kind) for kind in set(map(type, modules))}
    plain = [module for module in modules if kinds[type(module)]]
    for module in plain:
        memo[id(module)] = object.__new__(type(module))
    for module in plain:
        twin, state = vars(memo[id(module)]), module.__getstate__()  # type: ignore[no-untyped-call]
        memo.setdefault(id(memo), []).append(state)  # what was made for it keeps its id
        twin.update(state)
        for name, value in state.items():  # an attribute that is copied may write to the twin
            kind = type(value)
            if kind in _ATOMS:
                continue
            if kind in _STORES and not value:
                twin[name] = memo.setdefault(id(value), kind())
            elif kind is dict and name in _HELD and id(value) not in memo:
                twin[name] = memo[id(value)] = {
                    key: memo[id(held)] if id(held) in memo else copy.deepcopy(held, memo)
                    for key, held in value.items()
                }
            elif kind is not tuple or not _ATOMS.issuperset(map(type, value)):
                twin[name] = copy.deepcopy(value, memo)
    return copy.deepcopy(model, memo)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether a class leaves it to Python to say what belongs to a copy."""
    mends = kind.__setstate__ is not nn.Module.__setstate__  # convolutions: for old pickles
    return not (
        hasattr(kind, "__deepcopy__")
        or (mends and not issubclass(kind, _ConvNd))
        or any(getattr(kind, way) is not getattr(object, way) for way in _WAYS)
    )


def flatten(modules: Iterable[nn.Module]) -> None:
    """Weights of an RNN that were replaced lie apart: cuDNN wants them in one piece again."""
    for module in modules:
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
