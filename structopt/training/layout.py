"""The order of numbers in memory that a device likes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def wants_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Convolutions of a CPU or of CUDA read channels-last images without rearranging them."""
    images = any(p.ndim == 4 for p in model.parameters())
    return images and (device.type == "cuda" or (device.type == "cpu" and not overruns(model)))


def overruns(model: nn.Module) -> bool:
    """Whether a CPU must not differentiate this model in channels-last order.

    oneDNN (uxlfoundation/oneDNN#6035) writes past its memory where it finds the gradient of a
    1×1 convolution with a stride and fewer input channels than fit into a register: 8 with
    AVX2, 16 with AVX-512. The process dies, or gradients are wrong. Whoever narrows weights
    inside ``forward`` says so by an attribute ``plain_order``.
    """
    return any(
        getattr(m, "plain_order", False)
        or (
            isinstance(m, nn.Conv2d)
            and m.kernel_size == (1, 1)
            and m.stride != (1, 1)
            and m.in_channels // m.groups < 16
        )
        for m in model.modules()
    )


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
