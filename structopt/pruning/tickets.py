"""Lottery tickets: back to the early weights, with what was learned about which of them to keep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from structopt.losses.checks import need_values
from structopt.pruning.masks import apply_masks_, need_masks
from structopt.training.copying import need_changeable


@torch.no_grad()
def rewind_(
    model: nn.Module, start: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> nn.Module:
    """Set a model back to where its training stood at `start`, with the masks of now, in place.

    ``w = m · w₀``: `start` is ``copy.deepcopy(model.state_dict())``, taken before training (the
    lottery ticket of Frankle and Carbin, 2019) or, for larger networks, some hundred steps into it
    (Frankle et al., 2020). Buffers go back too. Then train anew with ``after_step=hold(masks)`` and
    a fresh optimiser.

    Raises ValueError, and leaves the model as it is, for a `start` that is no such dict, has other
    names or shapes, or the model's own tensors in place of copies, and for masks that do not fit.

    >>> import copy
    >>> model = nn.Linear(2, 1)
    >>> start = copy.deepcopy(model.state_dict())
    >>> _ = nn.init.ones_(model.weight)  # trained
    >>> masks = {"weight": torch.tensor([[True, False]])}
    >>> found = rewind_(model, start, masks).weight.detach()
    >>> bool(found[0, 0] == start["weight"][0, 0]), float(found[0, 1])
    (True, 0.0)
    """
    if not isinstance(start, Mapping):
        raise ValueError(
            f"`start` is of {type(start).__name__}: keep copy.deepcopy(model.state_dict()), a dict"
        )
    now = model.state_dict()
    odd = sorted(now.keys() ^ start.keys())
    if odd:
        where = "only in the model" if odd[0] in now else "only in `start`"
        raise ValueError(f"`start` is no state of this {type(model).__name__}: {odd[0]} is {where}")
    for name, tensor in now.items():
        if not isinstance(tensor, Tensor):
            continue  # what a module of its own makes for its state, and reads
        if not isinstance(start[name], Tensor):
            raise ValueError(f"{name} of `start` is of {type(start[name]).__name__}, no tensor")
        need_changeable(name, tensor)
        if start[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(start[name].shape)} in `start`, and {tuple(tensor.shape)}"
                " in the model: rewind before channels are removed"
            )
        if tensor.numel() and start[name].data_ptr() == tensor.data_ptr():
            raise ValueError(
                f"{name} of `start` is the model's own tensor, which training changed: keep a "
                "copy, copy.deepcopy(model.state_dict())"
            )
        if not tensor.is_meta:
            need_values(f"{name} of `start`", [start[name]])
    need_masks(model, masks)
    model.load_state_dict(start)
    return apply_masks_(model, masks)
