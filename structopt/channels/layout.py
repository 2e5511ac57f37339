"""The order of an edited model's numbers in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def laid_out_as(tensor: Tensor, made: Tensor) -> Tensor:
    """In memory as the tensor that it was taken from, channels last perhaps."""
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == ndim and tensor.is_contiguous(memory_format=layout):
            return made if tensor.is_contiguous() else made.contiguous(memory_format=layout)
    return made


def lay_plainly_(model: nn.Module) -> nn.Module:
    """Put a model on the CPU into plain order where channels-last order spoils its gradients.

    There oneDNN (uxlfoundation/oneDNN#6035) writes past its memory for the gradient of a 1×1
    convolution with a stride and fewer than 16 input channels. All weights have to change, since
    one in channels-last order is enough to give that convolution such an input. `training.layout`
    asks the same before it trains; a test holds the two together.
    """
    devices = {tensor.device.type for tensor in model.parameters()}
    if devices == {"cpu"} and any(map(_overruns, model.modules())):
        nn.Module.to(model, memory_format=torch.contiguous_format)
    return model


def _overruns(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels // module.groups < 16
    )
