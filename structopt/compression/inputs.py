"""The numbers that layers read, on grids too: dynamic, or static with steps from calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as _Projection

from structopt.channels.exchanging import unfuse_
from structopt.compression.evidence import all_ran, readers, say_idle, say_others, watch
from structopt.compression.granularity import PerTensor
from structopt.compression.grids import Grid, MinMax, Steps
from structopt.compression.quantize import fake_quantize, fit
from structopt.training.copying import copied

SAMPLE = 1 << 16  # numbers kept of each input in each batch at least, and its extremes


def calibrate(
    model: nn.Module, batches: Iterable[Any], grid: Grid, names: Sequence[str] | None = None
) -> dict[str, Steps]:
    """Lay a grid over what each linear layer and convolution reads in these batches.

    Of each input in each batch, its extremes and 65,536 evenly spread numbers or up to twice as
    many are kept, so that min-max is exact. The model runs in evaluation mode; a batch is the
    inputs, or a pair (inputs, targets). An input that never varies gets a step too. Layers that
    the model does not call, recurrent ones and transposed convolutions get none, which a warning
    says; nor do the projections of ``nn.MultiheadAttention``, which multiplies by their weights
    itself (:func:`structopt.slicing.free_attention` makes linear layers of them).

    Raises ValueError for no batches, for grids that are not per tensor, for inputs not finite, and
    for a layer in ``names`` that never ran.

    >>> model = nn.Linear(2, 1)
    >>> steps = calibrate(model, [torch.tensor([[0.0, 2.55]])], Grid(8, symmetric=False))
    >>> steps[""].scale
    tensor([0.0100])
    """
    _whole(grid)
    seen: dict[str, list[Tensor]] = {}

    def see(name: str, given: Tensor, made: Tensor) -> None:
        flat = given.flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLE)]
        ends = torch.stack(flat.aminmax()) if flat.numel() else flat
        seen.setdefault(name, []).append(torch.cat([sample, ends]))

    layers = readers(model, names)
    watch(model, batches, layers, see)
    all_ran(names or (), seen)
    if names is None:
        say_others(model, "what such a layer reads gets no steps")
    say_idle([name for name in layers if name not in seen], "never ran on these batches: no steps")
    made = {}
    for name, parts in seen.items():
        try:
            made[name] = fit(torch.cat(parts), grid)
        except ValueError as error:
            raise ValueError(f"what {name or 'the model'} reads: {error}") from error
    return made


@dataclass(eq=False)
class RoundInput:
    """A forward pre-hook, with keywords, that rounds the first argument of a layer to a grid."""

    grid: Grid
    steps: Steps | None = None  # None: found anew in each pass

    def __call__(self, layer: nn.Module, given: Any, named: Any) -> tuple[Any, Any]:
        def rounded(x: Tensor) -> Tensor:
            steps = self.steps and Steps(*(part.to(x.device) for part in self.steps))
            return fake_quantize(x, self.grid, steps)

        return with_first(rounded, given, named)


def with_first(
    change: Callable[[Tensor], Tensor], given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a layer is called with, its first argument changed, by place or by keyword."""
    if given:
        return (change(given[0]), *given[1:]), named
    key = next(iter(named))
    return given, {**named, key: change(named[key])}


def round_inputs(
    model: nn.Module,
    grid: Grid,
    steps: Mapping[str, Steps] | None = None,
    names: Sequence[str] | None = None,
) -> nn.Module:
    """A copy of the model whose linear layers and convolutions read rounded numbers.

    With the ``steps`` of :func:`calibrate`: static, for the layers that they name. Without:
    dynamic, a step for each call, over the whole batch. It simulates integer kernels, and is
    slower than the model. With rounded weights, :func:`structopt.compression.put_`, each product
    is one of integers times the two scales. What ``nn.MultiheadAttention`` reads stays as it is,
    which a warning says: it does not call its projections
    (:func:`structopt.slicing.free_attention` first).

    Raises ValueError as ``calibrate``, and for steps of layers that the model has not.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.fill_(1)
    >>> round_inputs(model, Grid(2))(torch.tensor([1.0, 0.4]))
    tensor([1.], grad_fn=<...>)
    """
    _whole(grid)
    made = copied(model)
    layers = readers(made, names if names is not None or steps is None else list(steps))
    inside = [name for name, layer in layers.items() if isinstance(layer, _Projection)]
    say_idle(inside, "belong to attention, which does not call them: what they read is not rounded")
    if names is None and steps is None:
        say_others(model, "what such a layer reads is not rounded")
    for name, layer in layers.items():
        if steps is not None and name not in steps:
            raise ValueError(f"there are no steps for {name!r}; there are for {', '.join(steps)}")
        hook = RoundInput(grid, None if steps is None else steps[name])
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    unfuse_(made)
    return made


def noted(model: nn.Module) -> list[list[Any]]:
    """How inputs are rounded, as JSON holds it: [layer, bits, symmetric, null or [scale, zero]]."""
    made: list[list[Any]] = []
    for name, layer in model.named_modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, RoundInput):
                if hook.steps is None and hook.grid.fit != MinMax():
                    raise ValueError(
                        f"{name or 'the model'} finds steps by {hook.grid.fit} in each call, which "
                        "has no place in a file: use MinMax(), or the steps of calibrate"
                    )
                steps = hook.steps and [float(part) for part in hook.steps]
                made.append([name, hook.grid.bits, hook.grid.symmetric, steps])
    return made


def read_hooks(listed: list[list[Any]]) -> list[tuple[str, RoundInput]]:
    """:func:`noted` undone. Raises ValueError, or any error of unpacking, for anything else."""
    made = []
    for name, bits, symmetric, numbers in listed:
        if not (isinstance(name, str) and isinstance(symmetric, bool)):
            raise ValueError(f"an input is rounded in no way {name!r}, {symmetric!r}")
        steps = None
        if numbers is not None:
            scale, zero = numbers
            if not (0 < scale < math.inf and -math.inf < zero < math.inf):
                raise ValueError(f"an input has no steps {scale!r}, {zero!r}")
            numbers = torch.tensor([[float(scale)], [float(zero)]], dtype=torch.float64)
            steps = Steps(*numbers)
        made.append((name, RoundInput(Grid(bits, symmetric), steps)))
    return made


def attach_(model: nn.Module, hooks: list[tuple[str, RoundInput]]) -> None:
    """Round these inputs, and no others, in place."""
    for layer in model.modules():
        for key, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, RoundInput):
                del layer._forward_pre_hooks[key]
    for name, hook in hooks:
        layer = model.get_submodule(name)
        double = any(p.dtype == torch.float64 for p in layer.parameters(recurse=False))
        wide = torch.float64 if double else torch.float32
        hook.steps = hook.steps and Steps(*(part.to(wide) for part in hook.steps))
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    unfuse_(model)


def _whole(grid: Grid) -> None:
    if grid.per != PerTensor():
        raise ValueError(f"inputs share one step: take a grid with per=PerTensor(), not {grid.per}")
    if grid.levels is not None:
        raise ValueError(f"inputs lie on even steps, which kernels multiply, not {grid.levels}")
