"""What layers see: their inputs and outputs while a model runs over batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from structopt.channels.nests import tensors_of
from structopt.measure.running import call
from structopt.training.copying import need_numbers
from structopt.training.observing import first_of, observed
from structopt.training.statistics import inputs_of, placed

READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
OTHERS = (nn.RNNBase, nn.RNNCellBase, nn.modules.conv._ConvTransposeNd, nn.Bilinear)
"""Layers with weights that multiply what they read, too, which nothing here looks at."""
See = Callable[[str, Tensor, Tensor], object]
"""Called with the name of a layer, its input and its output."""


def readers(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The linear layers and convolutions of these names; None: all of them."""
    found: dict[str, nn.Module] = {
        name: m for name, m in model.named_modules() if isinstance(m, READERS)
    }
    if names is None:
        return found
    if isinstance(names, str):
        raise ValueError(f"names is a list of names: [{names!r}]")
    need_known(model, names, found, "linear layer or convolution")
    return {name: found[name] for name in names}


def need_known(
    model: nn.Module, names: Sequence[str], found: Mapping[str, nn.Module], kind: str
) -> None:
    """Raises ValueError for a name that is not among those found, or is a second one of a layer."""
    for name in names:
        if name not in found:
            layer = dict(model.named_modules(remove_duplicate=False)).get(name)
            first = next((known for known, m in found.items() if m is layer), None)
            if first is not None:
                raise ValueError(f"{name!r} is {first!r} under another name: give that one")
            raise ValueError(f"{name!r} is no {kind} of this model; those are {', '.join(found)}")


def watch(
    model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module], see: See
) -> None:
    """Run the model over the batches in evaluation mode, and show what the layers read and make.

    A batch is the inputs, or a pair (inputs, targets). Raises ValueError where there are none.
    """

    need_numbers(model)

    def hook(name: str, layer: nn.Module, given: Any, named: Any, out: Any) -> None:
        x, made = first_of(given, named), [*tensors_of(out), None][0]  # a bias may go beside it
        if not isinstance(x, Tensor) or made is None:
            raise ValueError(f"{name or 'the model'} reads or makes no tensor: leave it out")
        held.append(bool(x.numel() or made.numel()))
        see(name, x.detach(), made.detach())

    held = list[bool]()
    handles = [
        layer.register_forward_hook(partial(hook, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    count = 0
    with observed(model, handles):
        for batch in batches:
            call(model, placed(inputs_of(batch), model))
            count += 1
    if not count or (held and not any(held)):
        raise ValueError("the batches are empty: there is nothing to calibrate with")


def own_forward(layer: nn.Module) -> bool:
    """Whether it computes otherwise than the layer of torch that it descends from, as adapters do.

    >>> own_forward(nn.Linear(1, 1)), own_forward(nn.Module())
    (False, False)
    """
    kind = next(k for k in type(layer).__mro__ if k.__module__.startswith("torch.nn.modules"))
    ways = [way for way in ("forward", "_conv_forward") if hasattr(kind, way)]
    return any(getattr(getattr(layer, w), "__func__", None) is not getattr(kind, w) for w in ways)


def need_torchs(*layers: nn.Module) -> None:
    """Raises ValueError for a layer that is more than its weights say, or whose weight is stale."""
    for layer in layers:
        kind = type(layer).__name__
        if own_forward(layer):
            raise ValueError(f"{kind} has a forward of its own, which does not merge")
        if "weight" in vars(layer):
            remedy = "torch.nn.utils.prune.remove or remove_weight_norm first"
            raise ValueError(f"the weight of {kind} is what a hook made last: {remedy}")


def by_channel(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer reads or makes as (channels, everything else), with or without a batch."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):  # channels stand before the places
        return x.movedim(-1 - len(layer.kernel_size), 0).unsqueeze(-1).flatten(1)
    return x.movedim(-1, 0).unsqueeze(-1).flatten(1)


def all_ran(wanted: Iterable[str], ran: Container[str]) -> None:
    """Raises ValueError for the first layer that was asked for by name, but never ran."""
    for name in wanted:
        if name not in ran:
            raise ValueError(f"{name!r} never ran on these batches: leave it out of names")


def say_idle(names: Sequence[str], what: str) -> None:
    """Warn of layers that a function leaves as they are, because they do not run."""
    if names:
        warnings.warn(
            f"{', '.join(names)} {what}; structopt.slicing.free_attention makes layers that run of "
            "the projections of nn.MultiheadAttention",
            stacklevel=3,
        )


def say_others(model: nn.Module, what: str) -> None:
    """Warn of layers that multiply by weights, but are no linear layer or plain convolution."""
    names = [
        f"{name or 'the model'} ({type(m).__name__})"
        for name, m in model.named_modules()
        if isinstance(m, OTHERS)
    ]
    if names:
        warnings.warn(
            f"{', '.join(names)}: no linear layer or plain convolution; {what}", stacklevel=3
        )


def fitting(hessian: Tensor, weight: Tensor) -> Tensor:
    """The hessian as (groups, n, n), after every complaint that can be made."""
    parts = hessian if hessian.ndim == 3 else hessian[None]
    numbers = weight.shape[1:].numel() if weight.ndim > 1 else -1
    if parts.shape[1:] != (numbers, numbers) or len(weight) % len(parts):
        raise ValueError(
            f"a hessian of shape {tuple(hessian.shape)} does not fit a weight of shape "
            f"{tuple(weight.shape)}: it is the sum of x xᵀ over what its rows multiply"
        )
    if not bool(parts.isfinite().all()):
        raise ValueError(f"the hessian, {tuple(hessian.shape)}, holds NaN or infinite numbers")
    if bool((parts.diagonal(dim1=1, dim2=2) < 0).any()):
        raise ValueError(f"a hessian of shape {tuple(hessian.shape)} is no sum of x xᵀ")
    return parts
