"""Weights that a model keeps as a direction and a length (weight norm, Salimans & Kingma, 2016).

The length of a row is divided by the norm of its direction. When a row loses entries, its length
has to shrink by as much, or the entries that stay would grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

Pick = Callable[[str, Tensor], Tensor]


def pairs(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """The names of length and direction, and the dimension whose entries have a length each."""
    for path, module in model.named_modules():
        dim = getattr(module, "dim", None)
        if type(module).__name__ == "_WeightNorm" and isinstance(dim, int):
            before = path.rpartition(".")[0]
            yield f"{before}.original0", f"{before}.original1", dim
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):  # the older form
                before = f"{path}." if path else ""
                yield f"{before}{hook.name}_g", f"{before}{hook.name}_v", hook.dim


def adjust(old: nn.Module, new: nn.Module, pick: Pick) -> None:
    """Give the lengths of an edited model what its directions lost or gained.

    `pick` takes from a tensor of the old model, by its name, what the new one has of it.
    """
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    for length, direction, dim in pairs(old):
        norms = torch.norm_except_dim(before[direction].detach(), 2, dim)
        ratio = torch.norm_except_dim(after[direction].detach(), 2, dim) / pick(length, norms)
        kept = pick(length, before[length].detach())
        after[length].data.copy_(kept * ratio)
