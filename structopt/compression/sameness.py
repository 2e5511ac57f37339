"""Whether an edited network computes what it did: both are run on random numbers, in double."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structopt.channels.nests import first_line, map_tensors, tensors_of
from structopt.measure.running import call, undisturbed
from structopt.training.copying import copied, need_numbers


@torch.no_grad()
def in_double(model: nn.Module) -> nn.Module:
    """A copy in double precision to try edits on, in which no weight is zero throughout.

    A head or a gate that begins at zero hides what is computed before it, and any edit of that. A
    bias hides nothing, as long as it is zero.
    """
    need_numbers(model)
    made, draw = copied(model).double(), torch.Generator().manual_seed(1)
    for name, weight in made.named_parameters():
        if "bias" in name or weight.dtype != torch.double:
            continue
        if not bool(weight.any()):
            weight.copy_(torch.randn(weight.shape, generator=draw, dtype=torch.double))
    return made


def computes_the_same(model: nn.Module, other: nn.Module, example: Any) -> bool:
    """Whether both, in double precision, compute the same of random inputs like the example.

    Random numbers that they draw themselves are the same for both. Raises ValueError where the
    model does not run in double precision, or makes no tensor.
    """
    draw = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=draw, dtype=torch.double).to(tensor.device)

    tree = map_tensors(example, drawn)
    try:
        expected = made_by(model, tree)
    except RuntimeError as error:
        raise ValueError(
            f"this {type(model).__name__} does not run in double precision, in which edits are "
            f"checked: {first_line(error)}; let it work in the type of its inputs, as .to(x.dtype)"
        ) from error
    if not expected:
        raise ValueError(
            f"this {type(model).__name__} makes no tensor by which an edit could be checked"
        )
    try:
        found = made_by(other, tree)
    except RuntimeError:  # what was merged is read elsewhere too, with other channels
        return False
    return len(expected) == len(found) and all(map(_alike, expected, found))


def made_by(model: nn.Module, example: Any) -> list[Tensor]:
    """The tensors that come out in evaluation mode; buffers and random numbers stay."""
    with undisturbed(model, example):
        return tensors_of(call(model, example))


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    sizes = a[a.isfinite()].abs()
    largest = sizes.max() if len(sizes) else 0.0
    equal = a == b  # infinities, as masks make them, have no difference
    return bool((equal | ((a - b).abs() <= 1e-9 * largest)).all())
