"""Batch norms and convolutions that vanish into the layer before them, wherever that is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from structopt.channels.exchanging import exchange_
from structopt.compression.evidence import READERS
from structopt.compression.merging import merge_pair
from structopt.measure.running import call, tensors_of
from structopt.training import evaluating
from structopt.training.copying import copied
from structopt.training.observing import first_of, observed

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Kinds = tuple[type[nn.Module], ...]


def fold_batch_norms(model: nn.Module, example: Any) -> nn.Module:
    """A copy in which batch norms are part of the layer before them, and an ``Identity`` is left.

    Wherever a norm reads exactly what one linear layer or convolution made: w' = w γ / s and
    b' = (b - μ) γ / s + β, with s = sqrt(σ² + ε). That is the network of evaluation mode; it is no
    longer to be trained with batch statistics. Each fold is run on random numbers like the example,
    in double precision, and left out where the output changes (a layer that is read elsewhere too,
    a norm over other axes), or where either of the two runs more than once.

    ``example`` is what the model is called with: a tensor, a tuple or a dict. Jacob et al., 2018.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> fold_batch_norms(model, torch.zeros(1, 3, 8, 8))
    Sequential(
      (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    """
    return _replaced(model, example, NORMS, _folded)


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
    while (merged := _replaced(model, example, READERS, merge_pair, once=True)) is not model:
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
    plain: Any = copy.deepcopy(norm).eval()
    for key, value in ("weight", 1.0), ("bias", 0.0):  # torch lets convolutions alone lack them
        if getattr(plain, key) is None:
            setattr(plain, key, nn.Parameter(torch.full_like(plain.running_mean, value)))
    made: nn.Module = fuse(copy.deepcopy(layer).eval(), plain)
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
) -> nn.Module:
    """Join each pair that can be; with ``once`` one alone, and the model itself if none can."""
    found = copied(model)
    for one, two in _pairs(found, example, seconds):
        wide = copied(found).double()
        try:
            narrow = joined(wide, one, two, join)
        except ValueError:
            continue
        if computes_the_same(wide, narrow, example):
            found = joined(found, one, two, join)
            if once:
                return found
    return model if once else found


def joined(
    model: nn.Module, one: str, two: str, join: Callable[[nn.Module, nn.Module], nn.Module]
) -> nn.Module:
    """A copy with both layers as one in the place of the first, and an identity in the second's."""
    made = copied(model)
    layer = join(made.get_submodule(one), made.get_submodule(two))
    for name, new in (one, layer), (two, nn.Identity()):
        exchange_(made, name, new)
    return made


def _pairs(model: nn.Module, example: Any, seconds: Kinds) -> list[tuple[str, str]]:
    """Layers, and what reads the very tensor that they made; each called once."""
    calls: dict[str, int] = {}
    made: dict[int, tuple[str, Tensor]] = {}  # the tensor is held, so that its number stays its own
    pairs: list[tuple[str, str]] = []

    def before(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, named: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            x = id(first_of(given, named))
            if isinstance(module, seconds) and x in made:
                pairs.append((made[x][0], name))

        return hook

    def after(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            if isinstance(module, READERS):
                made[id(out)] = name, out

        return hook

    kinds = READERS + seconds
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, kinds) and name:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
    with observed(model, handles):
        call(model, example)
    return [(one, two) for one, two in pairs if calls[one] == calls[two] == 1]


def computes_the_same(model: nn.Module, other: nn.Module, example: Any) -> bool:
    """Whether both, in double precision, compute the same of random inputs like the example."""
    draw = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=draw, dtype=torch.double).to(tensor.device)

    tree = torch.utils._pytree.tree_map_only(Tensor, drawn, example)
    with evaluating(model), evaluating(other), torch.no_grad():
        expected = tensors_of(call(model, tree))
        try:
            found = tensors_of(call(other, tree))
        except RuntimeError:  # what was merged is read elsewhere too, with other channels
            return False
    return all(
        a.shape == b.shape and bool(((a - b).abs() <= 1e-9 * a.abs().max()).all())
        for a, b in zip(expected, found, strict=True)
    )
