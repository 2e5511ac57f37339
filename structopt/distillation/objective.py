"""The objective that all methods with a teacher share: labels and teacher, in one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structopt import losses
from structopt.distillation.teachers import Source, as_logits, as_pair, picked
from structopt.distillation.watching import Watcher

Loss = Callable[..., Tensor]
"""``loss(student, teacher) -> scalar``; one with a parameter ``targets`` gets the labels there."""


@dataclass(frozen=True)
class Term:
    """One loss between student and teacher: of the logits, or of a pair of layers."""

    name: str
    loss: Loss
    weight: float
    layers: tuple[str, str] | None = None
    adapter: nn.Module | None = None

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight counts the teacher's part, at least 0: {self.weight}")


class Distillation(nn.Module):
    """``objective(model, batch)``: label_weight · task(student, labels) + Σ weight · term.

    Made by :func:`from_logits`, :func:`from_features`, :func:`hints` and :func:`together`. The
    adapters are its parameters, to be trained with the student:
    ``descent.fused_adamw(nn.ModuleList([student, objective]), lr)``. The teacher is not part of
    it: neither moved, nor trained, nor saved with it. ``parts`` holds the last value of each term.
    """

    def __init__(
        self,
        teacher: Source,
        terms: Sequence[Term],
        *,
        label_weight: float = 1.0,
        task: Callable[[Tensor, Tensor], Tensor] = losses.cross_entropy,
    ) -> None:
        super().__init__()
        if not label_weight >= 0:
            raise ValueError(f"label_weight counts the labels, at least 0: {label_weight}")
        self.teacher, self.terms = teacher, tuple(terms)
        self.label_weight, self.task = label_weight, task
        self.adapters = nn.ModuleList([t.adapter for t in terms if t.adapter is not None])
        self.pairs = [term.layers for term in terms if term.layers is not None]
        self.wants_labels = [_has_targets(term.loss) for term in terms]
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
            parts["labels"] = self.label_weight * self.task(logits, lesson.labels)
        for term, labelled in zip(self.terms, self.wants_labels, strict=True):
            pair = (logits, lesson.logits)
            if term.layers is not None:
                pair = ours[term.layers[0]], lesson.features[term.layers[1]]
            if term.adapter is not None:
                pair = term.adapter(*pair)
            extra = {"targets": lesson.labels} if labelled else {}
            name = term.name if term.name not in parts else f"{term.name} {len(parts)}"
            parts[name] = term.weight * term.loss(*pair, **extra)
        self.parts = {name: value.detach() for name, value in parts.items()}
        return torch.stack(list(parts.values())).sum()

    def extra_repr(self) -> str:
        told = [f"{term.weight:g} · {term.name}" for term in self.terms]
        return " + ".join([f"{self.label_weight:g} · labels", *told])


def _has_targets(loss: Loss) -> bool:
    return "targets" in arguments(loss)


def arguments(loss: Loss) -> list[str]:
    """Names of what a loss takes; a module's stand in its ``forward``."""
    inner = loss.func if isinstance(loss, partial) else loss
    return list(
        inspect.signature(inner.forward if isinstance(inner, nn.Module) else loss).parameters
    )
