"""What the networks take: images of one size."""

from __future__ import annotations

import torch.fx
from torch import Tensor

SIDE = 28  # pixels


def checked(inputs: Tensor) -> Tensor:
    """Return ``inputs`` if they are images (B, 1, 28, 28), else raise a ValueError saying so."""
    if inputs.ndim != 4 or inputs.shape[1:] != (1, SIDE, SIDE):
        raise ValueError(
            f"inputs have shape {tuple(inputs.shape)}; this network takes "
            f"(batch, 1, {SIDE}, {SIDE})"
            + (": add the batch with inputs[None]" if inputs.shape == (1, SIDE, SIDE) else "")
        )
    return inputs


torch.fx.wrap("checked")  # a leaf to symbolic tracing, which cannot follow the `if`
