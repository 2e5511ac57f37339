"""The order of an edited model's numbers in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structopt.devices import needs_plain_order


def laid_out_as(tensor: Tensor, made: Tensor) -> Tensor:
    """In memory as the tensor that it was taken from, channels last perhaps."""
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == ndim and tensor.is_contiguous(memory_format=layout):
            return made if tensor.is_contiguous() else made.contiguous(memory_format=layout)
    return made


def lay_plainly_(model: nn.Module) -> nn.Module:
    """Put a model on the CPU into plain order where channels-last order spoils its gradients.

    All weights have to change: one in channels-last order is enough to give the convolution that
    :func:`structopt.devices.needs_plain_order` speaks of such an input.
    """
    if needs_plain_order(model) and {p.device.type for p in model.parameters()} == {"cpu"}:
        nn.Module.to(model, memory_format=torch.contiguous_format)
    return model
