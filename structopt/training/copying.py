"""Copies of models, also of those whose weights hooks compute."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module) -> Module:
    """As ``copy.deepcopy``, which stops at a weight that ``torch.nn.utils.prune`` has computed.

    A hook computes it anew in each forward pass, of the copy too.
    """
    held = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in held if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
