"""The order of numbers in memory that a device likes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structopt import devices
from structopt.training import randomness
from structopt.training.feeding import move


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


def first_loss(run: Any, batch: Any, moved: Any) -> Tensor:
    """The first loss in channels-last order; in plain order if the network has a view on that.

    ``x.view(-1, 256)`` behind a convolution is nothing that one can have in another order. What
    the attempt drew and counted is undone. `moved` is the batch in channels-last order.
    """
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in run.model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    drawn, run.tried = randomness.state(run.device), True
    try:
        return run.objective(run.model, moved)  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
    randomness.restore(drawn, run.device)
    with torch.no_grad():
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer.copy_(before)
    run.channels_last = False
    for model in (run.model, run.average.model) if run.average else (run.model,):
        model.to(memory_format=torch.contiguous_format)
    torch.clear_autocast_cache()  # of weights in the order that they had
    lay_like_parameters(run.optimizer)
    return run.objective(run.model, move(batch, run.device, False))  # type: ignore[no-any-return]
