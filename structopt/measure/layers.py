"""Which layer has the parameters, and which one does the work."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, nn

from structopt.measure.flops import counter as new_counter
from structopt.measure.running import Example, batch_of, call, tensors_of, undisturbed, unfused
from structopt.measure.table import Table


def per_layer(model: nn.Module, example: Example, *, batch: int | None = None) -> Table:
    """One row for each module that ran: its own parameters, MACs and output shape.

    "Own" leaves out what the modules inside it have, so each column sums to `cost`. Parameters of
    a module that was never called belong to the nearest one around it that was.

    Raises:
        ValueError: as `cost`.

    Example:
        >>> import torch
        >>> print(per_layer(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(1, 4)))
        layer  type    output  parameters  MACs  share of MACs (%)
        -----  ------  ------  ----------  ----  -----------------
        0      Linear  1×3             15    12              100.0
    """
    size = batch_of(example, batch)
    names = {module: name for name, module in model.named_modules()}
    own: dict[nn.Module, int] = defaultdict(int)
    shapes: dict[nn.Module, str] = {}
    started: list[tuple[int, int]] = []  # FLOPs when a module began; FLOPs of those inside it
    counter = new_counter()

    def before(_module: nn.Module, _args: Any) -> None:
        started.append((counter.get_total_flops(), 0))

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        start, inside = started.pop()
        total = counter.get_total_flops() - start
        own[module] += total - inside
        tensors = tensors_of(output)
        shapes[module] = "×".join(map(str, tensors[0].shape)) if tensors else "–"
        if started:
            started[-1] = (started[-1][0], started[-1][1] + total)

    handles = [m.register_forward_pre_hook(before) for m in names]
    handles += [m.register_forward_hook(after) for m in names]
    try:
        with undisturbed(model, example), unfused(), counter:
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return _layer_table(names, own, shapes, size)


def _layer_table(
    names: dict[nn.Module, str], own: dict[nn.Module, int], shapes: dict[nn.Module, str], size: int
) -> Table:
    by_name = {name: module for module, name in names.items()}
    held: dict[nn.Module, int] = defaultdict(int)
    seen: set[Tensor] = set()
    for module, name in names.items():
        place = name
        while place and by_name[place] not in shapes:  # up to the nearest module that ran
            place = place.rpartition(".")[0]
            while place not in by_name:
                place = place.rpartition(".")[0]
        for parameter in module._parameters.values():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                held[by_name[place]] += parameter.numel()
    total = sum(own.values()) or 1
    rows = [
        {
            "layer": name or "(whole)",
            "type": type(module).__name__,
            "output": shapes[module],
            "parameters": held[module],
            "MACs": round(own[module] / 2 / size),
            "share of MACs (%)": round(100 * own[module] / total, 1),
        }
        for module, name in names.items()
        if module in shapes and (held[module] or own[module])
    ]
    return Table(rows)
