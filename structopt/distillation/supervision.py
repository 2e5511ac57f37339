"""Supervision of the layers in between, each by a small classifier of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structopt import losses
from structopt.distillation.adapters import pooled
from structopt.distillation.logits import soft_targets
from structopt.distillation.objective import is_weight
from structopt.distillation.teachers import as_logits, as_pair, picked
from structopt.distillation.watching import Watch, Watcher, need_names
from structopt.losses.checks import need_temperature, real
from structopt.training import evaluating


class DeepSupervision(nn.Module):
    """``objective(model, batch)`` of :func:`deep_supervision`; its heads are its parameters.

    ``parts`` holds the last value of each term.
    """

    def __init__(
        self,
        heads: Mapping[str, nn.Module],
        *,
        weight: float,
        share: float,
        temperature: float,
    ) -> None:
        super().__init__()
        self.layers, self.heads = list(heads), nn.ModuleList(heads.values())
        self.weight, self.share, self.temperature = weight, share, temperature
        self.watcher = Watcher(self.layers)
        self.parts: dict[str, Tensor] = {}

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch, a scalar."""
        inputs, targets = as_pair(batch)
        with self.watcher(model) as found:
            logits = as_logits(model(inputs), "student")
            features = [picked(found, name) for name in self.layers]
        parts = {"labels": losses.cross_entropy(logits, targets)}
        for name, head, feature in zip(self.layers, self.heads, features, strict=True):
            said = head(pooled(feature))
            loss = (1 - self.share) * losses.cross_entropy(said, targets)
            if self.share:
                soft = soft_targets(said, logits.detach(), temperature=self.temperature)
                loss = loss + self.share * soft
            parts[f"head {name}"] = self.weight * loss
        self.parts = {name: value.detach() for name, value in parts.items()}
        return torch.stack(list(parts.values())).sum()

    def extra_repr(self) -> str:
        return f"layers={self.layers}, weight={self.weight:g}, share={self.share:g}"


def deep_supervision(
    student: nn.Module,
    layers: Iterable[str],
    example: Any,
    *,
    weight: float = 0.3,
    share: float = 0.0,
    temperature: float = 3.0,
) -> DeepSupervision:
    """H(z, y) + weight · Σ_l [(1 - share)·H(h_l, y) + share·T²·KL(softmax(z / T) || p_l)].

    H is the cross-entropy with the labels y; z are the student's logits, h_l those of a linear
    classifier on the pooled feature of layer l, p_l = softmax(h_l / T). With ``share=0`` the
    companion objectives of Lee et al., 2015, "Deeply-supervised nets" (theirs are squared hinge
    losses that fade out); above it the last layer also teaches the ones before it, without a
    gradient to itself: Zhang et al., 2019, "Be your own teacher". The heads are made from the
    shapes of ``example``, serve training alone, and have to be in the optimiser:
    ``descent.fused_adamw(nn.ModuleList([student, objective]), lr)``.

    Args:
        student: the network; it is run once, in evaluation mode.
        layers: names of layers that give maps (B, D, H, W), tokens (B, T, D) or vectors (B, D).
        example: inputs of a few examples, on the student's device.
        weight: of each head.
        share: of the last layer's word in it, from 0 to 1.
        temperature: T > 0, of that word.

    Raises:
        ValueError: no layers, ones that do not exist (near names listed) or cannot be pooled,
            a weight below 0, a share outside 0 to 1, a temperature not above 0.

    Example:
        >>> student = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> deep_supervision(student, ["0"], torch.ones(1, 2))
        DeepSupervision(
          layers=['0'], weight=0.3, share=0
          (heads): ModuleList(
            (0): Linear(in_features=8, out_features=3, bias=True)
          )
        )
    """
    need_names(layers)
    names = list(dict.fromkeys(layers))
    if not names:
        raise ValueError("name the layers that get a classifier of their own")
    need_temperature(temperature)
    if not is_weight(weight) or not 0 <= real(share) <= 1:
        raise ValueError(f"weight is at least 0, share from 0 to 1, not {weight!r} and {share!r}")
    with Watch(student, names) as found, evaluating(student), torch.no_grad():
        classes = as_logits(student(example), "student").shape[1]
        seen = {name: pooled(picked(found, name)) for name in names}
    heads = {name: nn.Linear(x.shape[1], classes).to(x.device, x.dtype) for name, x in seen.items()}
    return DeepSupervision(heads, weight=weight, share=share, temperature=temperature)
