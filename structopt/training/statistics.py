"""Running statistics taken anew, by whatever changed the layers before a norm."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from structopt.losses.checks import need_values
from structopt.measure.running import call, tensors_of
from structopt.measure.running import device_of as device_of  # for rooms that do not see `measure`
from structopt.training.objectives import evaluating

_Norm = nn.modules.batchnorm._NormBase
_InstanceNorm = nn.modules.instancenorm._InstanceNorm


def placed(batch: Any, model: nn.Module) -> Any:
    """The batch on the device of the model: of its weights, be they buffers."""
    device = device_of(model, batch)
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def inputs_of(batch: Any) -> Any:
    """The inputs of a batch that is a pair (inputs, targets), or is the inputs."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def _copied(leaf: Any) -> Any:
    """A model may write to what it is given, and the batches serve again."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _averaging(norm: nn.Module) -> RemovableHandle:
    """Instance norms take None for a momentum of 0: the share of each call in the plain average."""
    calls = itertools.count(1)

    def count(norm: nn.Module, _: Any) -> None:
        norm.momentum = 1 / next(calls)  # type: ignore[assignment]

    return norm.register_forward_pre_hook(count)


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Take the running statistics of norms anew from these batches, in place; no training.

    A changed layer hands on other means and variances than those that the norm behind it remembers.
    The new ones are the plain average over the batches (a hundred batches are plenty). Only norms
    run in training mode, so that dropout rests; the modes are restored. A model without such norms
    stays as it is.

    Raises ValueError for no batches, and for batches of one value a channel.

    >>> model = nn.BatchNorm1d(1)
    >>> recalibrate_(model, [torch.tensor([[1.0], [3.0]])]).running_mean
    tensor([2.])
    """
    norms = [m for m in model.modules() if isinstance(m, _Norm) and m.running_mean is not None]
    if not norms:
        return model
    need_values("a running statistic", (*model.parameters(), *model.buffers()))
    momenta, count, handles = [norm.momentum for norm in norms], 0, list[RemovableHandle]()
    before = [{k: b.clone() for k, b in norm._buffers.items() if b is not None} for norm in norms]
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's way to say: the plain average
                norm.train()
            handles = [_averaging(norm) for norm in norms if isinstance(norm, _InstanceNorm)]
            for batch in batches:
                given = tree_map(_copied, placed(inputs_of(batch), model))
                if any(tensor.numel() for tensor in tensors_of(given)):  # else it counts as zeros
                    call(model, given)
                    count += 1
        if not count:
            raise ValueError("the batches are empty: there is nothing to take statistics from")
    except BaseException:  # Ctrl-C too leaves no half of a mean
        for norm, buffers in zip(norms, before, strict=True):
            norm.load_state_dict({**norm.state_dict(), **buffers})
        raise
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model
