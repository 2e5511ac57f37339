"""Build the edited copy of a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from structopt.channels import keeping, lengths
from structopt.channels.copying import substitute
from structopt.channels.groups import Channels
from structopt.channels.layout import laid_out_as, lay_plainly_
from structopt.channels.rows import Edit, rows_of
from structopt.channels.sizes import refresh
from structopt.channels.walking import modules_of, tensors_in


def build(
    channels: Channels,
    model: nn.Module,
    edit: Edit,
    widen: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    start: Callable[[Tensor], Tensor] | None = None,
) -> nn.Module:
    """A copy of the model that has only the chosen channels, verified by nobody yet.

    `widen` is what becomes of weights before they are multiplied by anything; `start` is what
    each tensor of the model is taken for.
    """
    choice = edit.choice
    factors = keeping.factors(channels, model, edit)
    even = bool((factors == 1).all())
    names = {id(tensor): name for name, tensor in tensors_in(modules_of(model))}

    def change(tensor: Tensor, name: str = "", scaled: bool = True) -> Tensor:
        name, made = name or names.get(id(tensor), ""), start(tensor) if start else tensor
        for dim in range(tensor.ndim):
            labels = channels.axes.get((name, dim))
            taken = None
            if labels is not None:
                taken = rows_of(channels, labels, choice, f"dimension {dim} of {name}")
            if taken is None or labels is None:
                continue
            if made.is_meta:  # where nothing is copied, in a twentieth of the time
                shape = (*made.shape[:dim], len(taken), *made.shape[dim + 1 :])
                made = torch.empty(shape, dtype=made.dtype, device=made.device)
            else:
                made = made.index_select(dim, torch.from_numpy(taken).to(made.device))
            if not scaled or (even and not edit.preserve):
                continue
            by = factors[labels][taken]
            if edit.preserve and channels.reads[labels].any():
                by = by / keeping.shares(channels, labels, taken, choice)
            made = made if (by == 1).all() else keeping.times(widen(made), dim, by)
        return made.clone() if made is tensor else laid_out_as(tensor, made)

    made = substitute(model, change)
    lengths.adjust(model, made, lambda name, tensor: change(tensor, name, scaled=False))
    refresh(channels, made, edit)
    return lay_plainly_(made)
