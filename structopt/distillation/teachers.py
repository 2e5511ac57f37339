"""What a student learns from: one network or several, wherever they lie, in any precision."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from structopt.distillation.watching import Watcher
from structopt.training import evaluating
from structopt.training.objectives import describe
from structopt.training.statistics import device_of


class Lesson(NamedTuple):
    """What a teacher says about one batch, and the labels that stand beside it."""

    logits: Tensor
    features: dict[str, Tensor]
    labels: Any


class Source(Protocol):
    """Anything that teaches: :class:`Teacher`, :class:`MovingTeacher`, :class:`Cached`.

    One of your own may be an ``nn.Module``: it is asked by ``teach``, never called as a network.
    """

    def teach(self, inputs: Any, targets: Any, names: Sequence[str] = ()) -> Lesson:
        """The lesson of a batch; ``names`` are the layers whose features are wanted."""


class Teacher:
    """One network, or several whose logits are averaged, to be asked without a trace.

    Each forward pass runs in evaluation mode without a gradient, and leaves the modes of all
    modules, and the inputs, as they were. A network stays on the device where it lies, in its own
    number type; the inputs go to it and what it says comes back. ``autocast`` names the type in
    which it computes (``torch.bfloat16``); by default that of the loop around it. The mean of
    logits is the normalised geometric mean of the predictions, one of the two in Hinton et al.,
    2015.

    Raises ``ValueError`` for no network, or networks of different class counts.

    >>> teacher = Teacher(nn.Linear(2, 3), nn.Linear(2, 3))
    >>> teacher.teach(torch.ones(4, 2), None).logits.shape
    torch.Size([4, 3])
    """

    def __init__(self, *models: nn.Module, autocast: torch.dtype | None = None) -> None:
        if not models or not all(isinstance(model, nn.Module) for model in models):
            raise ValueError("a teacher is one nn.Module or several")
        if autocast is not None and not isinstance(autocast, torch.dtype):
            raise ValueError(f"autocast is a type such as torch.bfloat16, not {autocast!r}")
        self.models, self.autocast = models, autocast
        self.gentle: set[nn.Module] = set()  # those seen to leave their inputs as they are
        self.watcher = Watcher(())

    def teach(self, inputs: Any, targets: Any, names: Sequence[str] = ()) -> Lesson:
        """The lesson of a batch of ``inputs``."""
        if names and len(self.models) > 1:
            raise ValueError("features of several teachers have no mean: name one teacher")
        if not isinstance(inputs, Tensor):
            raise ValueError(
                f"a teacher is asked one tensor, not {type(inputs).__name__}: wrap it and the "
                "student in modules that take one"
            )
        said: list[Tensor] = []
        features: dict[str, Tensor] = {}
        if self.watcher.names != list(names):
            self.watcher = Watcher(names)
        for model in self.models:
            with self.watcher(model) as found, evaluating(model), torch.no_grad():
                logits = self._ask(model, inputs)
                features = {name: picked(found, name).to(inputs.device) for name in names}
            if said and logits.shape != said[0].shape:
                raise ValueError(
                    f"one teacher gives {tuple(said[0].shape)}, another {tuple(logits.shape)}: "
                    "their logits have no mean"
                )
            said.append(logits.to(inputs.device))
        return Lesson(torch.stack(said).mean(0) if said[1:] else said[0], features, targets)

    def _ask(self, model: nn.Module, inputs: Any) -> Tensor:
        state = (*model.parameters(), *model.buffers())
        own = next((tensor.dtype for tensor in state if tensor.is_floating_point()), None)
        dtype = own if inputs.is_floating_point() else None
        given = inputs.to(device_of(model, inputs), dtype)
        if given is inputs and model not in self.gentle:  # the next one has to see them too
            given = inputs.clone()
        kind, before = given.device.type, changes(given)
        with torch.autocast(kind, self.autocast) if self.autocast else nullcontext():
            logits = as_logits(model(given), "teacher")
        if changes(given) == before is not None:
            self.gentle.add(model)
        return logits


def changes(inputs: Any) -> int | None:
    """How often a tensor was changed in place, which torch does not count under inference_mode."""
    counted = isinstance(inputs, Tensor) and not inputs.is_inference()
    return inputs._version if counted else None


def as_pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(
            f"a batch to distil with is a pair (inputs, targets), not {describe(batch)}"
        )
    return batch[0], batch[1]


def as_logits(output: Any, whose: str) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim < 2:
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the {whose} returned {kind}, not logits (batch, classes, ...): wrap it in a module "
            "that returns its logits"
        )
    return output


def picked(found: dict[str, Any], name: str) -> Tensor:
    """The features of layer ``name``, which has to have run and to give a tensor."""
    if name not in found:
        raise ValueError(f"the layer {name!r} was not called in this forward pass")
    if not isinstance(found[name], Tensor):
        raise ValueError(
            f"the layer {name!r} returns {type(found[name]).__name__}, not a tensor: "
            "name a layer inside it"
        )
    return found[name]  # type: ignore[no-any-return]


def as_source(teacher: nn.Module | Sequence[nn.Module] | Source) -> Source:
    if teaches(teacher):
        return teacher  # type: ignore[return-value]
    if isinstance(teacher, nn.Module) and not isinstance(teacher, nn.ModuleList):
        return Teacher(teacher)
    if isinstance(teacher, (list, tuple, nn.ModuleList)):
        if several := [type(one).__name__ for one in teacher if teaches(one)]:
            raise ValueError(
                f"several teachers are networks, and {several[0]} is a source of its own: name it "
                "alone, or ask the others inside its teach()"
            )
        return Teacher(*teacher)
    raise ValueError(
        f"a teacher is a module, several, or cached outputs, not {type(teacher).__name__}"
    )


def teaches(what: object) -> bool:
    """Whether it is a :class:`Source`; a network may have a method of that name for another use."""
    method = getattr(what, "teach", None)
    if not callable(method) or isinstance(what, type):
        return False
    if not isinstance(what, nn.Module):
        return True
    try:
        inspect.signature(method).bind("inputs", "targets", ["names"])
    except TypeError:
        return False
    return True
