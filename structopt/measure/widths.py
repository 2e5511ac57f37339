"""Widths that waste time: would a rounder layer be as fast?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from structopt.measure.running import Example, call, first_of, undisturbed
from structopt.measure.timing import latency

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def free_widths(model: nn.Module, example: Example, *, rounds: int = 20) -> list[str]:
    """Layers of an odd width for which the next multiple of 8 was measured to be as fast.

    Each is timed against a layer of the rounder width on the input that it really gets,
    interleaved. The last layer, whose width is the number of classes, is left out; so are grouped
    convolutions, whose width is tied to their groups.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> free_widths(model, torch.ones(2, 4))  # 8 is round, and the 3 are classes
        []
    """
    inputs: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, args: Any, named: Any) -> None:
        inputs.setdefault(module, first_of(args, named).detach())

    layers: dict[nn.Module, str] = {  # what another class does with its weights is its own
        m: name for name, m in model.named_modules() if type(m) in _LAYERS
    }
    handles = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in layers]
    try:
        with undisturbed(model, example):
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    words = []
    for module in list(inputs)[:-1]:
        width = _width(module)  # none if a mask or the like owns it
        if width % 8 and getattr(module, "groups", 1) == 1:
            wide = -(-width // 8) * 8
            runs = {"now": _at_width(module, width), "wider": _at_width(module, wide)}
            times = latency(runs, inputs[module], rounds=rounds)
            if times["wider"].median <= times["now"].median:
                words.append(f"layer {layers[module]} is {width} wide: {wide} would be as fast")
    return words


def _width(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    return 0 if weight is None else len(weight)


def _at_width(module: nn.Module, width: int) -> Callable[[Tensor], Tensor]:
    """The layer with so many outputs, its own repeated as needed."""
    state = {
        name: torch.cat([value.detach()] * (width // len(value) + 1))[:width]
        for name, value in module._parameters.items()
        if value is not None
    }
    return lambda inputs: functional_call(module, state, inputs)
