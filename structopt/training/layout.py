"""The order of numbers in memory that a device likes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structopt import devices


def wants_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Convolutions of a CPU or of CUDA read channels-last images without rearranging them."""
    images = any(p.ndim == 4 for p in model.parameters())
    if device.type == "cpu":
        return images and not devices.needs_plain_order(model)
    return images and device.type == "cuda"


def lay_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give each state tensor its parameter's strides and device.

    Fused kernels walk raw memory side by side, and would mix up the entries of a channels-last
    parameter and a moment in plain order, without a word.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                like = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                state[name] = like.copy_(value)
