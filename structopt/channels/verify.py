"""Does the edited model compute what it should? Compared in double precision, always."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from structopt.channels import lengths
from structopt.channels.copying import flatten, substitute
from structopt.channels.deciding import Decisions
from structopt.channels.groups import Channels
from structopt.channels.labels import Vector
from structopt.channels.masking import Masked
from structopt.channels.mirrors import Book
from structopt.channels.nests import call, map_tensors, tensors_of
from structopt.channels.reading import mentions
from structopt.channels.rows import Choice
from structopt.channels.tracing import follow_modules, label_parameters
from structopt.channels.walking import modules_of, parameters_of, tensors_in
from structopt.channels.widening import Mask, Wide, lendable, masked, repeatable, wide

_BESIDE = frozenset({"numpy", "tolist", "data", "data_ptr"})  # lead to numbers past the dispatcher


class Watch(NamedTuple):
    """Compared beside the outputs: the numbers behind decisions, and what these layers give."""

    layers: tuple[str, ...] = ()


def tolerance(outputs: Sequence[Tensor]) -> float:
    return 1e-4 if any(t.device.type == "mps" for t in outputs) else 1e-10


def reference(
    channels: Channels,
    model: nn.Module,
    choice: Choice,
    example: Any,
    watch: Watch | None = None,
    decisions: Decisions | None = None,
) -> list[Tensor]:
    """What the model computes when the channels that were not chosen are masked."""
    gone = _gone(channels, choice)
    masks: dict[str, list[tuple[int, Vector]]] = {}
    # A direction without length is no number: a row of it goes with its length, which is masked.
    rows = {direction: dim for _, direction, dim in lengths.pairs(model)}
    for (name, dim), labels in channels.axes.items():
        if gone[labels].any() and rows.get(name) != dim:
            masks.setdefault(name, []).append((dim, np.flatnonzero(gone[labels])))
    averaged = any(channels.every[number].averaged for number in choice)
    lost = gone if averaged and masks else None
    return _computed(model, example, watch, masks=masks, gone=lost, decisions=decisions)


def _gone(channels: Channels, choice: Choice) -> npt.NDArray[np.bool_]:
    """Of each label of a weight: is it of a channel that was not chosen?"""
    gone = np.zeros(sum(len(v) for v in channels.axes.values()), bool)
    alike: dict[int, npt.NDArray[np.bool_]] = {}
    for labels in channels.axes.values():
        along = channels.along(labels)
        if id(along) not in alike:
            alike[id(along)] = np.zeros(len(labels), bool)
            for number in along.keys() & choice.keys():
                absent = np.ones(channels.every[number].size + 1, bool)
                absent[choice[number]] = absent[-1] = False  # the last is of -1, no channel of it
                alike[id(along)] |= absent[along[number]]
        gone[labels] = alike[id(along)]
    return gone


def outputs(
    model: nn.Module,
    example: Any,
    seed: int = 0,
    watch: Watch | None = None,
    decisions: Decisions | None = None,
) -> list[Tensor]:
    """What a model, and layers of it, compute in double precision, in evaluation mode."""
    return _computed(model, example, watch, seed=seed, decisions=decisions)


def _computed(model: nn.Module, *args: Any, **options: Any) -> list[Tensor]:
    """On weights that are lent and widened when met, or on a wide copy, which any model takes."""
    if not (lengths.kept(model) or mentions(modules_of(model).values(), _BESIDE)):
        with contextlib.suppress(Exception):
            return _run(model, *args, **options, lend=True)
    return _run(model, *args, **options, lend=False)


def _run(
    model: nn.Module,
    example: Any,
    watch: Watch | None,
    *,
    lend: bool,
    seed: int = 0,
    masks: Mapping[str, Mask] | None = None,
    gone: npt.NDArray[np.bool_] | None = None,
    decisions: Decisions | None = None,
) -> list[Tensor]:
    """The outputs of a copy with these parts of its weights zero, for norms that others average."""
    masks = masks or {}
    known = modules_of(model)
    names = {id(tensor): name for name, tensor in tensors_in(known)}

    def change(tensor: Tensor) -> Tensor:
        if lend and lendable(tensor):
            return tensor
        return masked(tensor, masks.get(names.get(id(tensor), ""), ()))

    copy = substitute(model, change).eval()
    if masks and not lend:
        lengths.adjust(model, copy, lambda _, tensor: wide(tensor))
    modules = modules_of(copy)
    flatten(modules.values())
    seen: list[Any] = []
    for name in watch.layers if watch else ():
        copy.get_submodule(name).register_forward_hook(
            lambda _, __, out: seen.append(map_tensors(out, torch.clone))
        )
    parameters = parameters_of(modules)
    lent = [(p, masks.get(name, ())) for name, p in parameters.items() if lendable(p)]
    inner: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if gone is not None:
        book = Book()
        label_parameters(book, modules)
        inner = Masked(book, gone)
    given = parameters_of(known).values()
    sizes = [p.element_size() for p in given if p.is_floating_point()]
    decisions = Decisions() if watch is not None and decisions is None else decisions
    followed = decisions or contextlib.nullcontext()
    with repeatable(seed), Wide(lent, min(sizes, default=4)), inner, followed:
        out = tensors_of(call(copy, map_tensors(example, wide)))
    behind = decisions.behind(out) if decisions is not None and watch is not None else []
    return [*out, *tensors_of(seen), *behind]


def stumbles(model: nn.Module, example: Any) -> str:
    """The name of the module in which the model fails in double precision."""
    copy, book = substitute(model, wide).eval(), Book()
    follow_modules(book, modules_of(copy))
    with contextlib.suppress(Exception), repeatable(), Wide():
        call(copy, map_tensors(example, wide))
    return book.module


def changes(model: nn.Module, example: Any) -> bool:
    """Whether the model gives other outputs when other random numbers are drawn."""
    first, second = (outputs(model, example, seed) for seed in (0, 1))
    return difference(first, second) > tolerance(first)


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest error relative to the largest value; infinite where shapes differ."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    worst, compared = 0.0, not any(t.numel() for t in expected)
    for a, b in zip(map(_dense, expected), map(_dense, found), strict=True):
        if not a.is_floating_point() and not a.is_complex():
            if not torch.equal(a, b):
                return float("inf")
            compared = compared or a.numel() > 0
            continue
        # What masks leave in both, minus infinity or a very large number, says nothing.
        says = a.isfinite() & ((a != b) | (a.abs() < 1e4))
        if not bool((says | (a == b) | (a.isnan() & b.isnan())).all()):
            return float("inf")
        if says.any():
            a, b, compared = a[says], b[says], True
            error = float((a - b).abs().max()) / (float(a.abs().max()) or 1.0)
            worst = max(worst, error if error == error else float("inf"))
    return worst if compared else float("inf")


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def shapes(tree: Any) -> list[torch.Size]:
    return [t.shape for t in tensors_of(tree)]
