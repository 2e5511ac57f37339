"""The door to torch.optim."""

from __future__ import annotations

import torch
from torch import nn

from structopt.descent.written import need_rate


def fused_adamw(model: nn.Module, lr: float, *, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """torch's own AdamW, as one fused kernel where the device has it.

    Weights of two or more dimensions decay; biases and the scales of norms do not.
    Raises ValueError for a learning rate below zero or a model with nothing to train.

    >>> optimizer = fused_adamw(nn.Linear(3, 2), lr=0.001)
    >>> [group["weight_decay"] for group in optimizer.param_groups]
    [0.01, 0.0]
    """
    need_rate(lr)
    wanted = [p for p in model.parameters() if p.requires_grad]
    if not wanted:
        raise ValueError(f"No parameter of this {type(model).__name__} wants a gradient.")
    matrices = {"params": [p for p in wanted if p.ndim >= 2], "weight_decay": weight_decay}
    rest = {"params": [p for p in wanted if p.ndim < 2], "weight_decay": 0.0}
    groups = [group for group in (matrices, rest) if group["params"]]
    try:
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    except RuntimeError:  # torch's way to say that this device or type has no fused kernel
        return torch.optim.AdamW(groups, lr=lr)
