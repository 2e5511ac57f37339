"""The head of an exit, for what the module that it stands at gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structopt.channels.nests import first_line
from structopt.slicing.asking import own
from structopt.training.observing import observed


def outputs_of(
    model: nn.Module, example: Tensor, names: Sequence[str]
) -> tuple[dict[str, Any], Any]:
    """What the named modules give, in the order in which they run, and what the model gives."""
    found: dict[str, Any] = {}
    handles = []
    if len(set(names)) < len(names):
        raise ValueError(f"at={list(names)}: name each module once")
    for name, module in [(name, _module(model, name)) for name in names]:

        def note(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
            if name in found:
                raise ValueError(f"{name} is called more than once: which time would be the exit?")
            found[name] = output

        handles.append(module.register_forward_hook(note))
    with observed(model, handles):
        try:
            final = model(own(example))  # it may write to its inputs
        except (RuntimeError, TypeError) as problem:
            raise ValueError(
                f"the model does not accept the example: {first_line(problem)}"
            ) from problem
    for name in names:
        if name not in found:
            raise ValueError(f"{name} is not called by itself when the model runs: no exit there")
    return found, final


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as problem:
        near = ", ".join(n for n, _ in model.named_children())
        raise ValueError(f"the model has no module {name!r}; it has {near}, …") from problem


@torch.inference_mode(False)  # else the head could not be trained
def head_for(name: str, features: Any, final: Tensor, model: nn.Module) -> nn.Module:
    if not isinstance(features, Tensor) or not 2 <= features.ndim <= 5:
        given = described(features)
        raise ValueError(f"{name} gives {given}: an exit reads one tensor of features")
    if features.ndim == 3:
        if any(isinstance(m, nn.Conv1d | nn.ConvTranspose1d) for m in model.modules()):
            raise ValueError(
                f"{name} gives {described(features)}, which are tokens (B, T, D), or the channels "
                f"of a 1-d convolution (B, C, L): give a head of your own, {{{name!r}: head}}"
            )
        mean: list[nn.Module] = [_TokenMean()]
        width = features.shape[2]
    else:
        pools = {4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}
        mean = [pools[features.ndim](1), nn.Flatten()] if features.ndim > 2 else []
        width = features.shape[1]
    linear = nn.Linear(width, final.shape[1], device=final.device, dtype=final.dtype)
    return nn.Sequential(*mean, linear)


class _TokenMean(nn.Module):
    """(B, T, D) -> (B, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


def confidence(logits: Tensor) -> Tensor:
    """The largest probability of each row, (B, C) -> (B,), in float32 at least.

    >>> confidence(torch.zeros(1, 4))
    tensor([0.2500])
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.softmax(1).amax(1)


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
