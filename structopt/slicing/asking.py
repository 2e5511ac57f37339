"""What is asked of an argument before it is used."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from structopt.channels.nests import map_tensors
from structopt.losses.checks import real


def check_seconds(timeout: Any) -> None:
    if not 0 < real(timeout) < math.inf:
        raise ValueError(f"timeout={timeout!r}: give seconds, above 0")


def need_values(what: str, tensors: Iterable[Tensor]) -> None:
    """Refuse what lies on the ``meta`` device, for a purpose that shapes are not enough for."""
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(f"{what} needs values, and there are none on the meta device")


@torch.inference_mode(False)
def own(example: Any) -> Any:
    """A copy for one run: a model may write to what it is given, as nn.ReLU(inplace=True) does."""
    return map_tensors(example, torch.clone)
