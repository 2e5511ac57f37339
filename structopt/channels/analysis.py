"""Analyse a model: label it, run it, read the groups, try them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structopt.channels.copying import flatten, substitute
from structopt.channels.groups import Axes, Channels
from structopt.channels.mirrors import Book
from structopt.channels.nests import first_line, map_tensors, tensors_of
from structopt.channels.probe import Probe, settle
from structopt.channels.shadow import to_shadow
from structopt.channels.tracing import label_parameters, trace
from structopt.channels.walking import Modules, modules_of, tensors_in

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@torch.inference_mode(False)  # else ops are not taken apart
def channel_groups(model: nn.Module, example: Any) -> Channels:
    """Find which channels of a model belong together, in one run.

    `example` is what the model is called with: a tensor, a tuple of positional arguments, or a
    dict of keyword arguments. Each index of each dimension of each parameter gets a label; the
    labels travel beside the tensors of one forward pass, and what meets is tied. The pass needs
    no values, unless the model's own control flow asks for some. It is made in evaluation mode, and
    once more in training mode where some weights were not used, or the Python of a layer that holds
    weights does more with the mode than to hand it to `dropout`. The model is not touched.

    Raises ValueError where the model does not accept the example, returns no tensor, or lies on
    several devices.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> channels = channel_groups(model, torch.zeros(1, 3, 5, 5))
    >>> [(group.name, group.size) for group in channels]
    [('0', 8)]
    >>> print(*channels["0"].members[:3], sep=", ")
    0.weight[dim 0], 0.bias[dim 0], 1.weight[dim 0]
    """
    _check(model, example)
    with torch.random.fork_rng():  # the passes draw what the model draws
        return _analysed(model, example)


def _analysed(model: nn.Module, example: Any) -> Channels:
    bare, labelled = True, _copied(model, to_shadow)
    try:  # no values are needed, unless the model's own control flow asks for some
        inputs = map_tensors(example, to_shadow)
        book, axes, shapes = _traced(labelled, inputs)
    except Exception:
        bare, inputs = False, example
        try:
            book, axes, shapes = _traced(_copied(model, torch.clone), inputs)
        except Exception as problem:
            raise ValueError(
                f"the model does not accept the example: {type(problem).__name__}: "
                f"{first_line(problem)}. Give a tensor, a tuple of positional arguments or a dict "
                "of keyword arguments"
            ) from problem
    if not shapes:
        raise ValueError(
            "the model returns no tensor, so that nothing shows which channels are its outputs: "
            "return tensors, in tuples, lists, dicts or dataclasses"
        )
    channels = Channels(model, example, book, axes)
    _beware(channels)
    if book.insists:  # else nothing but the labels says which widths belong together
        settle(Probe(channels, model, inputs, shapes, bare))
    return channels


def _check(model: nn.Module, example: Any) -> None:
    """Refuse at once what is no model, has no weights yet, or lies on several devices."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"give the model as an nn.Module, not {type(model).__name__}")
    modules = modules_of(model)
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or 'the model'} is compiled by torch.jit, which cannot be edited: give the "
                "model that it was made from"
            )
    places: dict[torch.device, str] = {}
    for name, tensor in tensors_in(modules):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no size yet: run the model once first, on the example")
        places.setdefault(tensor.device, name)
    if len(places) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ValueError(f"the model lies on several devices ({where}): move it to one device")
    tensors = [t for t in tensors_of(example) if t.ndim]
    for device in places if tensors else ():  # a model without values takes any
        away = [t for t in tensors if t.device != device and device.type != "meta"]
        if away and (len(away) == len(tensors) or any(t.is_floating_point() for t in away)):
            raise ValueError(
                f"the example lies on {away[0].device}, the model on {device}: move the example "
                "to the device of the model"
            )


def _copied(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    try:
        return substitute(model, change)
    except Exception as problem:
        raise ValueError(
            f"the model cannot be copied: {type(problem).__name__}: {problem}. Make "
            "copy.deepcopy(model) work first: take away the attribute that stands in its way"
        ) from problem


def _beware(channels: Channels) -> None:
    """Freeze what a layer may read that another input would reach: nothing is known of it.

    As the experts of a mixture that no token of the example was sent to.
    """
    labels = channels.book.labels
    for group in channels.groups if channels.book.unmet else ():
        sizes = {len(member.channel) for member in group.members}
        for name, size in channels.book.unmet:
            if any(size % own == 0 for own in sizes):
                roots = np.flatnonzero(channels.group_of == channels.number[id(group)])
                labels.freeze(
                    roots,
                    f"{name}, which the example does not reach but another may, has a dimension of "
                    f"{size} too: give an example that reaches it",
                )
                break
    if channels.book.unmet:
        channels.regroup()


def _traced(labelled: nn.Module, example: Any) -> tuple[Book, Axes, list[torch.Size]]:
    book, modules = Book(), modules_of(labelled)
    flatten(modules.values())
    axes = label_parameters(book, modules)
    for made, read in _insisted(modules):
        rows, columns = axes.get((made, 0)), axes.get((read, 1))
        if rows is not None and columns is not None:
            book.labels.tie(rows, np.tile(columns, len(rows) // len(columns)))
    return book, axes, trace(book, labelled, modules, example)


def _insisted(modules: Modules) -> Iterator[tuple[str, str]]:
    """Weights whose results are others' inputs, whatever the example shows: torch's layers insist.

    An attention has one width, inside and outside; what a recurrent layer makes, for each of its
    gates, it reads in the next step, though the example may have one step alone.
    """
    for path, module in modules.items():
        before = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            yield (f"{before}out_proj.weight",) * 2
        for name in module._parameters if isinstance(module, _RECURRENT) else ():
            if name.startswith("weight_hh"):
                maker = name.replace("hh", "hr") if getattr(module, "proj_size", 0) else name
                yield before + maker, before + name
