"""One layer in the place of another."""

from __future__ import annotations

from torch import nn


def exchange_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put another layer in the place of this one, and wherever else the model holds the same."""
    old = model.get_submodule(name)
    for module in list(model.modules()):
        for key in [key for key, child in module._modules.items() if child is old]:
            module._modules[key] = new
