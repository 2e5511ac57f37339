"""Hooks that a user has set on a layer, where another layer takes its place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from structopt.training.copying import copied

Module = TypeVar("Module", bound=nn.Module)

BEFORE, AFTER = "_forward_pre_hooks", "_forward_hooks"
WAY_BACK = ("_backward_pre_hooks", "_backward_hooks")
RUNNING = (BEFORE, AFTER, *WAY_BACK)
_FLAGS = (f"{BEFORE}_with_kwargs", f"{AFTER}_with_kwargs", f"{AFTER}_always_called")
_STATE = (
    "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_WEIGHTS = (BasePruningMethod, WeightNorm, SpectralNorm)  # they make the weight of their own layer


def hooked(layer: nn.Module, kinds: Iterable[str] = RUNNING) -> bool:
    """Whether such hooks are set on the layer, but for those that compute its weight."""
    return any(_own(layer, kind) for kind in kinds)


def in_place_of(
    old: nn.Module, new: Module, name: str, kinds: Sequence[str] = RUNNING, level: int = 3
) -> Module:
    """The new layer in the mode of the old one and with its hooks, which come after its own.

    Give the old layer of the copy that is edited: hooks that are methods belong to it by now. A
    warning names the layer where hooks of its state dict are left behind: other names of weights
    are nothing that they could know.

    >>> old, seen = nn.ReLU().eval(), []
    >>> see = old.register_forward_hook(lambda module, given, made: seen.append(made))
    >>> new = in_place_of(old, nn.Identity(), "relu")
    >>> new(-1), new.training, seen
    (-1, False, [-1])
    """
    for kind in kinds:
        getattr(new, kind).update(_own(old, kind))
    for kind in _FLAGS:
        getattr(new, kind).update(getattr(old, kind))
    if new._backward_hooks:
        new._is_full_backward_hook = old._is_full_backward_hook
    if any(getattr(old, kind) for kind in _STATE):
        warnings.warn(
            f"hooks on the state dict of {name or 'the model'} do not fit the {type(new).__name__} "
            "that takes its place, and are left out: register them anew",
            stacklevel=level,
        )
    return new.train(old.training)


def bare(layer: Module) -> Module:
    """A copy of a layer without hooks."""
    made = copied(layer)
    for kind in RUNNING:
        store = getattr(made, kind)
        for key in _own(made, kind):
            del store[key]
    return made


def say_traced(model: nn.Module, leaf: Callable[[nn.Module, str], bool], what: str) -> None:
    """Warn of hooks on modules that a tracer opens, which are not called again."""
    names = [
        name or "the model"
        for name, module in model.named_modules()
        if hooked(module) and not leaf(module, name)
    ]
    if names:
        warnings.warn(
            f"hooks on {', '.join(names)} are not called again: what they make of tensors was "
            f"traced into {what}, and whatever else they do is left out",
            stacklevel=3,
        )


def _own(layer: nn.Module, kind: str) -> dict[int, object]:
    found = getattr(layer, kind)
    return {key: hook for key, hook in found.items() if not isinstance(hook, _WEIGHTS)}
