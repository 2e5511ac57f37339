"""Batch norms and convolutions that vanish into the layer before them, wherever that is exact."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from structopt.channels.exchanging import exchange_
from structopt.compression.evidence import READERS
from structopt.compression.merging import merge_pair
from structopt.compression.sameness import computes_the_same, in_double
from structopt.measure.running import call, tensors_of
from structopt.training.copying import copied, need_numbers
from structopt.training.hooked import AFTER, BEFORE, WAY_BACK, bare, hooked, in_place_of
from structopt.training.observing import first_of, observed

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
Kinds = tuple[type[nn.Module], ...]


def fold_batch_norms(model: nn.Module, example: Any) -> nn.Module:
    """A copy in which batch norms are part of the layer before them, and an ``Identity`` is left.

    Wherever a norm reads exactly what one linear layer or convolution (not a transposed one) made:
    w' = w γ / s and b' = (b - μ) γ / s + β, with s = sqrt(σ² + ε). That is the network of
    evaluation mode, no longer to be trained with batch statistics. A norm that several layers share
    goes into each of them. Each fold is run on random numbers like the example, in double
    precision, and left out where the output changes (a layer that is read elsewhere too, a norm
    over other axes), or where hooks look at what lies between; a warning names every norm that
    stays, and why.

    ``example`` is what the model is called with: a tensor, a tuple or a dict. Jacob et al., 2018.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> fold_batch_norms(model, torch.zeros(1, 3, 8, 8))
    Sequential(
      (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    """
    made, left = _replaced(model, example, NORMS, _folded)
    if left:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
        more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
        warnings.warn(f"batch norms that stay: {reasons}{more}", stacklevel=2)
    return made


def folded(model: nn.Module, example: Any) -> nn.Module:
    """As :func:`fold_batch_norms`, without a word of what stays."""
    return _replaced(model, example, NORMS, _folded)[0]


def merge_layers(model: nn.Module, example: Any) -> nn.Module:
    """A copy in which layers that follow each other with nothing between are one.

    Linear layers and convolutions, as :func:`structopt.compression.merge_pair` merges them, where
    that is exact; of the second an ``Identity`` is left. Fold batch norms first. A removed
    activation (an ``Identity`` in its place) is nothing. Each merge is checked as in
    :func:`fold_batch_norms`: in evaluation mode, where a dropout between is nothing; take it out
    before you train on. It pays where the middle is wide: parameters and work may grow.

    >>> model = nn.Sequential(nn.Linear(8, 64), nn.Identity(), nn.Linear(64, 4))
    >>> merge_layers(model, torch.zeros(1, 8))
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
      (1): Identity()
      (2): Identity()
    )
    """
    while (merged := _replaced(model, example, READERS, merge_pair, once=True)[0]) is not model:
        model = merged
    return copied(model)


def _folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    if not isinstance(norm, NORMS) or norm.running_mean is None:
        raise ValueError("a batch norm without running statistics depends on its batch")
    if "weight" not in layer._parameters:
        raise ValueError("a weight that other parameters compute has no place for the norm's scale")
    if isinstance(layer, nn.Linear) and layer.out_features != norm.num_features:
        raise ValueError("the norm goes over another axis than the outputs of the linear layer")
    fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    plain: Any = copy.deepcopy(norm).double().eval()  # rounded once, to the type of the layer
    for key, value in ("weight", 1.0), ("bias", 0.0):  # torch lets convolutions alone lack them
        if getattr(plain, key) is None:
            setattr(plain, key, nn.Parameter(torch.full_like(plain.running_mean, value)))
    made: nn.Module = fuse(copy.deepcopy(layer).double().eval(), plain)
    made.to(layer.get_parameter("weight").dtype)
    if layer._parameters.get("bias") is None:  # torch leaves a new one frozen
        made.get_parameter("bias").requires_grad_(made.get_parameter("weight").requires_grad)
    return made.train(layer.training)


def _replaced(
    model: nn.Module,
    example: Any,
    seconds: Kinds,
    join: Callable[[nn.Module, nn.Module], nn.Module],
    *,
    once: bool = False,
) -> tuple[nn.Module, dict[str, str]]:
    """Join all that can be, and say why the others cannot; with ``once`` the first pair alone.

    With ``once`` it is the model itself that comes back where none can.
    """
    need_numbers(model)
    found = copied(model)
    pairs, left = _pairs(found, example, seconds)
    for two, ones in pairs.items():
        if once and len(ones) > 1:
            continue
        wide = in_double(found)
        try:
            narrow = joined(wide, ones, two, join)
        except ValueError as error:
            left[two] = str(error)
            continue
        if computes_the_same(wide, narrow, example):
            found = joined(found, ones, two, join)
            if once:
                return found, left
        else:
            left[two] = f"what {ones[0]} makes is read elsewhere too, or along other axes"
    return (model if once else found), left


def joined(
    model: nn.Module,
    ones: Sequence[str],
    two: str,
    join: Callable[[nn.Module, nn.Module], nn.Module],
) -> nn.Module:
    """A copy with both as one in the place of each first layer, an identity in the second's.

    What looks at the inputs of the first, or at what the second makes, goes on looking there.
    """
    made = copied(model)
    second = made.get_submodule(two)
    for one in ones:
        first = made.get_submodule(one)
        if hooked(first, (AFTER, *WAY_BACK)) or hooked(second, (BEFORE, *WAY_BACK)):
            raise ValueError(f"hooks on {one} or {two} look at what lies between them")
        layer = in_place_of(first, join(bare(first), bare(second)), one, (BEFORE,))
        exchange_(made, one, layer)
    exchange_(made, two, in_place_of(second, nn.Identity(), two, (AFTER,)))
    return made


def _pairs(
    model: nn.Module, example: Any, seconds: Kinds
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Second layers that read the very tensors that others made, with the names of those.

    All of these run as often as the second does. And why it is not so with other seconds.
    """
    runs, reads, seen = _watched(model, example, seconds)
    pairs: dict[str, list[str]] = {}
    left: dict[str, str] = {}
    for two, module in model.named_modules():
        if not (isinstance(module, seconds) and two):
            continue
        ones = list(dict.fromkeys(one for one, _ in reads.get(two, ())))
        looking = [seen[number] for _, number in reads.get(two, ()) if number in seen]
        if not ones:
            left[two] = "it does not run on this example"
        elif "" in ones:
            left[two] = "it reads what no linear layer or plain convolution made"
        elif sum(runs[one] for one in ones) != runs[two]:
            left[two] = f"not all that {' and '.join(ones)} made goes to it"
        elif looking:
            left[two] = f"hooks on {looking[0]} look at what it reads"
        else:
            pairs[two] = ones
    order = list(runs)
    return dict(sorted(pairs.items(), key=lambda pair: order.index(pair[0]))), left


def _watched(
    model: nn.Module, example: Any, seconds: Kinds
) -> tuple[dict[str, int], dict[str, list[tuple[str, int]]], dict[int, str]]:
    """How often layers run; what made each input of the seconds; what hooks of the user's see.

    Tensors are known by their numbers.
    """
    runs: dict[str, int] = {}
    reads: dict[str, list[tuple[str, int]]] = {}
    seen: dict[int, str] = {}
    made: dict[int, str] = {}
    held: list[Any] = []  # so that a tensor's number stays its own

    def before(name: str, module: nn.Module, given: Any, named: Any) -> None:
        runs[name] = runs.get(name, 0) + 1
        x = id(first_of(given, named))
        reads.setdefault(name, []).append((made.get(x, ""), x))

    def after(
        name: str, sides: tuple[bool, bool], module: nn.Module, given: Any, named: Any, out: Any
    ) -> None:
        held.append((given, named, out))
        if isinstance(module, READERS):
            made[id(out)] = name
        for looked, side in zip(sides, ((given, named), out), strict=True):
            seen.update((id(tensor), name) for tensor in tensors_of(side) if looked)

    handles = []
    for name, module in model.named_modules():
        looks = hooked(module, (BEFORE, *WAY_BACK)), hooked(module, (AFTER, *WAY_BACK))
        layer = isinstance(module, READERS + seconds) and name
        if layer:
            hook = partial(before, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if layer or any(looks):
            see = partial(after, name, looks)
            handles.append(module.register_forward_hook(see, with_kwargs=True))
    with observed(model, handles):
        call(model, example)
    return runs, reads, seen
