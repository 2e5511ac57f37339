"""A network without its numbers: what a file says of it beside the tensors."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structopt import checkpoint, files


def bare(model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """What `checkpoint` notes of the model, and the names of its tensors, ties once."""
    memo: dict[int, Any] = {}  # a copy of the model in which every tensor is empty
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            _note(tensor, memo)
        for value in vars(module).values():
            _note(value, memo)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "structure"
        checkpoint.save(copy.deepcopy(model, memo), path)
        tensors, notes = files.load_tensors(path)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return notes, sorted(tensors, key=lambda name: order[name.rpartition(".")[0]])


def stored_names(structure: dict[str, Any]) -> list[str]:
    """The tensors of a structure, ties once. Raises ValueError for one without its own place."""
    places = {
        f"{name}.{key}".lstrip("."): slot[0]
        for name, record in structure.items()
        if "same" not in record  # a layer that stands a second time
        for kind in checkpoint.KINDS
        for key, slot in record[kind].items()
        if slot is not None
    }
    names = list(dict.fromkeys(places.values()))
    if wrong := [name for name in names if places.get(name) != name]:
        raise ValueError(f"its structure has no place {wrong[0]!r} for that tensor")
    return names


def _note(value: Any, memo: dict[int, Any]) -> None:
    if isinstance(value, Tensor) and not (is_lazy(value) or value.is_meta):
        memo[id(value)] = stand_in(value)


def stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same type and as many dimensions, but hardly any numbers."""
    kind = torch.complex64 if tensor.dtype == torch.complex128 else tensor.dtype  # no safetensors
    empty = torch.zeros((0,) * tensor.ndim, dtype=kind)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty
