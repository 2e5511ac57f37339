"""Does an edit hold? By its outputs, or by their shapes where there are no values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from structopt.channels import verify
from structopt.channels.copying import substitute
from structopt.channels.edit import build
from structopt.channels.groups import Channels
from structopt.channels.rows import Choice, Edit, Refused
from structopt.channels.shadow import Shadow, plain_kernels
from structopt.channels.tracing import call, map_tensors

Judge = Callable[[Edit], str]  # what goes wrong, or nothing


class Expected(NamedTuple):
    """An example, what has to come out, and the layers whose output is compared as well."""

    example: Any
    outputs: list[Tensor]
    watched: tuple[str, ...]


def by_value(channels: Channels, model: nn.Module) -> Judge:
    """The outputs of an edited copy have to equal those of the model with channels masked."""
    wide = substitute(model, verify.wide)
    known: dict[tuple[int, ...], list[Expected]] = {}

    changes = functools.cache(lambda: verify.changes(wide, channels.example))

    def judge(edit: Edit) -> str:
        key = tuple(edit.choice)
        if key not in known:
            known.clear()
            known[key] = _expected(channels, wide, edit.choice)
        for example, expected, watched in known[key]:
            try:
                copy = build(channels, wide, edit)
                found = verify.outputs_of_copy(copy, example, watched=watched)
            except Exception as failure:
                return _failure(failure)
            error = verify.difference(expected, found)
            if error > verify.tolerance(expected):
                if changes():
                    return (
                        "the output of the model changes from run to run, so that nothing can be "
                        "compared (dropout that is on in evaluation mode?)"
                    )
                return f"the outputs differ by {error:.1e} of their size"
        return ""

    return judge


def _expected(channels: Channels, model: nn.Module, choice: Choice) -> list[Expected]:
    """Examples, and what the model gives for each when the channels not chosen are masked."""
    watched: tuple[str, ...] = ()
    expected = verify.reference(channels, model, choice, channels.example)
    if not any(t.numel() for t in expected):  # as where no object is found
        watched = _untouched(channels, model, choice)
        expected = verify.reference(channels, model, choice, channels.example, watched)
    found = [Expected(channels.example, expected, watched)]
    other = lively(model, channels.example)
    if other is not None:
        try:
            expected = verify.reference(channels, model, choice, other, watched)
        except Exception:  # not every model takes random numbers; the example itself it took
            return found
        if all(bool(t.isfinite().all()) for t in expected):
            found.append(Expected(other, expected, watched))
    return found


def _untouched(channels: Channels, model: nn.Module, choice: Choice) -> tuple[str, ...]:
    """Layers whose output stays, though what they read may change."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [n for n, m in model.named_modules() if isinstance(m, layers)]
    made = {n: channels.axes.get((f"{n}.weight" if n else "weight", 0)) for n in names}
    return tuple(
        name
        for name, labels in made.items()
        if labels is not None and not channels.along(labels).keys() & choice.keys()
    )


def lively(model: nn.Module, example: Any) -> Any:
    """An example with seeded random numbers where all are equal, or `None` where they differ.

    Of whole numbers, only zeros are replaced: they may name rows of an embedding.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    rows = min((layer.num_embeddings for layer in layers), default=0)
    generator = torch.Generator().manual_seed(0)
    changed = []

    def change(tensor: Tensor) -> Tensor:
        made = tensor
        if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            if tensor.is_floating_point():
                made = torch.randn(tensor.shape, generator=generator).to(tensor)
            elif rows and tensor.dtype in (torch.int32, torch.int64) and not tensor.any():
                made = torch.randint(rows, tensor.shape, generator=generator).to(tensor)
        if made is not tensor:
            changed.append(made)
        return made

    made = map_tensors(example, change)
    return made if changed else None


def by_shape(channels: Channels, model: nn.Module) -> Judge:
    """The same for a model without values: the shapes have to fit."""

    def shapes(made: nn.Module) -> list[torch.Size]:
        with plain_kernels(), Shadow():
            return verify.shapes(call(made.eval(), channels.example))

    expected = shapes(substitute(model, torch.clone))

    def judge(edit: Edit) -> str:
        try:
            found = shapes(build(channels, model, edit))
        except Exception as failure:
            return _failure(failure)
        return "" if found == expected else "the shape of the output changes"

    return judge


def _failure(failure: Exception) -> str:
    first = (str(failure).splitlines() or [""])[0]
    if isinstance(failure, Refused):
        return first
    return f"the forward pass fails with {type(failure).__name__}: {first}"
