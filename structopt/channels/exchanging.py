"""One layer in the place of another."""

from __future__ import annotations

from torch import nn


def exchange_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put another layer in the place of this one, and wherever else the model holds the same."""
    old = model.get_submodule(name)
    for module in list(model.modules()):
        for key in [key for key, child in module._modules.items() if child is old]:
            module._modules[key] = new
    unfuse_(model)


def unfuse_(model: nn.Module) -> None:
    """Keep torch's encoders from reading weights past layers of another kind, or with hooks.

    In evaluation mode they look for the weights of plain layers, to compute a block in one kernel,
    and hand on nested tensors, to drop what is padding.
    """
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            parts = layer.self_attn, layer.linear1, layer.linear2
            if not all(map(isinstance, parts, (nn.MultiheadAttention, nn.Linear, nn.Linear))):
                layer.activation_relu_or_gelu = 0  # as for an activation that torch cannot fuse
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            plain = all(getattr(layer, "activation_relu_or_gelu", 0) for layer in encoder.layers)
            if not plain or any(m._forward_pre_hooks for m in encoder.modules()):
                encoder.use_nested_tensor = False
