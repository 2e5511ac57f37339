"""The objective that all methods with a teacher share: labels and teacher, in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structopt import losses
from structopt.distillation.teachers import Source, as_logits, as_pair, picked
from structopt.distillation.watching import Watcher
from structopt.losses.checks import real
from structopt.losses.positions import arguments, counted, positions
from structopt.training.objectives import describe

Loss = Callable[..., Tensor]
"""``loss(student, teacher) -> scalar``; one with a parameter ``targets`` gets the labels there.

One of logits (B, C, ...) with a parameter ``counts`` gets there a bool (B, ...), false where the
loss of the labels ignores a position, or None where it ignores none.
"""


@dataclass(frozen=True)
class Term:
    """One loss between student and teacher: of the logits, or of a pair of layers."""

    name: str
    loss: Loss
    weight: float
    layers: tuple[str, str] | None = None
    adapter: nn.Module | None = None

    def __post_init__(self) -> None:
        if not is_weight(self.weight):
            raise ValueError(f"weight counts the teacher's part, at least 0: {self.weight!r}")
        if not callable(self.loss):
            raise ValueError(f"a loss is a function of student and teacher, not {self.loss!r}")


class Distillation(nn.Module):
    """``objective(model, batch)``: label_weight · task(student, labels) + Σ weight · term.

    Made by :func:`from_logits`, :func:`from_features`, :func:`hints` and :func:`together`. The
    adapters are its parameters, to be trained with the student:
    ``descent.fused_adamw(nn.ModuleList([student, objective]), lr)``. The teacher is not part of
    it: neither moved, nor trained, nor saved with it. ``parts`` holds the last value of each term.
    """

    teacher: Source

    def __init__(
        self,
        teacher: Source,
        terms: Sequence[Term],
        *,
        label_weight: float = 1.0,
        task: Callable[[Tensor, Tensor], Tensor] = losses.cross_entropy,
    ) -> None:
        super().__init__()
        if not is_weight(label_weight):
            raise ValueError(f"label_weight counts the labels, at least 0: {label_weight!r}")
        self.terms = tuple(terms)
        vars(self)["teacher"] = teacher  # one that is a module would become a part of this one
        self.label_weight, self.task = label_weight, task
        self.adapters = nn.ModuleList([t.adapter for t in terms if t.adapter is not None])
        self.pairs = [term.layers for term in terms if term.layers is not None]
        self.taken = [set(arguments(term.loss)) for term in terms]
        self.parts: dict[str, Tensor] = {}
        self.watcher = Watcher(ours for ours, _ in self.pairs)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch, a scalar."""
        inputs, targets = as_pair(batch)
        theirs_wanted = list(dict.fromkeys(theirs for _, theirs in self.pairs))
        lesson = self.teacher.teach(inputs, targets, theirs_wanted)
        with self.watcher(model) as found:
            logits = as_logits(model(inputs), "student")
            ours = {name: picked(found, name) for name, _ in self.pairs}
        parts: dict[str, Tensor] = {}
        if self.label_weight:
            said = self.task(logits, lesson.labels)
            parts["labels"] = self.label_weight * _scalar("the loss of the labels", said)
        for term, taken in zip(self.terms, self.taken, strict=True):
            mine, theirs = logits, lesson.logits
            if term.layers is not None:
                mine, theirs = ours[term.layers[0]], lesson.features[term.layers[1]]
            pair = mine, theirs.detach()  # of a source of one's own it may have a graph
            if term.adapter is not None:
                pair = term.adapter(*pair)
            extra = {"targets": lesson.labels} if "targets" in taken else {}
            if term.layers is None and "counts" in taken:
                _need_classes_second(logits, lesson.labels)
                extra["counts"] = counted(logits, lesson.labels, self.task)
            name = term.name if term.name not in parts else f"{term.name} {len(parts)}"
            parts[name] = term.weight * _scalar(term.name, term.loss(*pair, **extra))
        self.parts = {name: value.detach() for name, value in parts.items()}
        return torch.stack(list(parts.values())).sum()

    def extra_repr(self) -> str:
        told = [f"{term.weight:g} · {term.name}" for term in self.terms]
        return " + ".join([f"{self.label_weight:g} · labels", *told])


def is_weight(given: object) -> bool:
    """Whether it is a finite number of at least 0; one that is learned is a tensor."""
    return isinstance(given, Tensor) or 0 <= real(given) < math.inf


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim:
        raise ValueError(
            f"{name} returned {describe(value)}, and a loss is a scalar tensor: take its mean"
        )
    return value


def _need_classes_second(logits: Tensor, labels: Any) -> None:
    """Raises where (B, T, C) might be read as (B, C, T): the labels have to show which it is."""
    given = labels.shape if isinstance(labels, Tensor) else None
    if logits.ndim < 3 or given in (positions(logits), logits.shape):  # indices, or soft labels
        return
    if given == logits.shape[:-1] or logits.ndim == 3:
        raise ValueError(
            f"logits {tuple(logits.shape)} are read as (batch, classes, positions), which labels "
            f"{describe(labels)} do not bear out: where the classes stand last, wrap student and "
            "teacher in modules that return logits.movedim(-1, 1); where they do not, give labels "
            f"{tuple(positions(logits))}, whose values are not looked at where they weigh nothing"
        )
