"""Learned masks: gates that open and close while training, priced by how many are open (L0)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from structopt.losses.checks import real, wide
from structopt.pruning.finding import Masks
from structopt.pruning.patterns import Filters, Pattern, Unstructured
from structopt.pruning.scoring import score
from structopt.training import Objective, evaluating, supervised
from structopt.training.copying import need_changeable

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # of the paper: temperature, and the ends before the cut


def hard_concrete(log_alpha: Tensor, noise: Tensor | None = None) -> Tensor:
    """Gates in [0, 1], many of them exactly 0 or 1 (Louizos et al., 2018).

    z = clamp(s · (1.1 + 0.1) - 0.1, 0, 1), with s = σ((log u - log(1 - u) + log α) / β) for `noise`
    u in (0, 1) and β = 2/3; without noise, as after training, s = σ(log α).

    >>> hard_concrete(torch.tensor([-9.0, 0.0, 9.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    where = log_alpha if noise is None else (noise.logit() + log_alpha) / BETA
    return (where.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def open_chance(log_alpha: Tensor) -> Tensor:
    """How probable it is that a gate is not exactly 0: σ(log α - β log(0.1 / 1.1)).

    >>> open_chance(torch.tensor([-2.0, 0.0, 2.0]))
    tensor([0.4010, 0.8318, 0.9734])
    """
    return (log_alpha - BETA * math.log(-LOW / HIGH)).sigmoid()


class _Gated(nn.Module):
    """A parametrisation of a weight: the weight times its gates."""

    def __init__(self, log_alpha: Tensor) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(log_alpha)

    def forward(self, weight: Tensor) -> Tensor:
        noise = None
        if self.training:
            noise = torch.rand_like(self.log_alpha)  # 0 and 1 do no harm: z is 0 and 1
        return weight * hard_concrete(self.log_alpha, noise)


@torch.inference_mode(False)  # else the gates could not be trained
def add_gates_(
    model: nn.Module,
    *,
    pattern: Pattern = Unstructured(),  # noqa: B008 (a frozen value)
    leave: Sequence[str] = (),
    share: float = 0.9,
) -> nn.Module:
    """Put a learned gate before every weight, in place: one each, or with ``Filters()`` one a row.

    Each weight that ``score`` would score, but those of `leave`, is multiplied by
    :func:`hard_concrete` gates: noisy ones in training mode, settled ones in evaluation mode. At
    first s is `share` in evaluation mode. Make the optimiser after this, so that it
    holds the gates; train with :func:`with_price`; then :func:`remove_gates_`.

    Raises ValueError for another pattern, a share outside (0, 1), a model that has gates, and a
    weight that several layers share, or that was made under ``torch.inference_mode``.

    >>> model = add_gates_(nn.Linear(3, 2))
    >>> [tuple(p.shape) for p in model.parameters()]
    [(2,), (2, 3), (2, 3)]
    """
    if not isinstance(pattern, Unstructured | Filters):
        raise ValueError(f"gates are for Unstructured() or Filters(), not {pattern!r}")
    if not 0 < real(share) < 1:
        raise ValueError(f"share={share!r} is where the gates begin, a number in (0, 1)")
    if _gates(model):
        raise ValueError("the model has gates: remove_gates_ before others are added")
    start, found = math.log(share / (1 - share)), score(model, leave=leave)
    for name in found:
        _need_own(model, name)
        need_changeable(name, model.get_parameter(name))
    for name, scores in found.items():
        path, _, key = name.rpartition(".")
        rows = (len(scores), *[1] * (scores.ndim - 1))
        shape = scores.shape if isinstance(pattern, Unstructured) else rows
        gated = _Gated(scores.new_full(shape, start))  # takes the mode of its layer
        parametrize.register_parametrization(model.get_submodule(path), key, gated)
    return model


def with_price(strength: float, objective: Objective | None = None) -> Objective:
    """An objective plus the price of open gates: strength · E[share of gated weights that stay].

    The expectation is exact, Σ n P(z > 0) / Σ n for gates of n weights each. `objective` is
    cross-entropy by default. Raises ValueError for a strength that is not above 0, and for a model
    without gates.

    >>> batch = torch.ones(2, 4), torch.tensor([0, 2])
    >>> with_price(0.1)(add_gates_(nn.Linear(4, 3)), batch).ndim
    0
    """
    if not 0 < real(strength) < math.inf:
        raise ValueError(f"strength is the price of a network with every gate open: {strength!r}")
    known = supervised() if objective is None else objective

    def priced(model: nn.Module, batch: Any) -> Tensor:
        gates = _need_gates(model)
        paid = [w.numel() * open_chance(wide(gated.log_alpha)).mean() for _, _, w, gated in gates]
        every = sum(weight.numel() for _, _, weight, _ in gates)
        return known(model, batch) + strength * torch.stack(paid).sum() / every

    return priced


def remove_gates_(model: nn.Module) -> Masks:
    """Write the settled gates into the weights, in place, and return the masks of what is open.

    The model becomes an ordinary one, which computes exactly what the gated one computes in
    evaluation mode. Train on with ``hold(masks)``, or hand the masks to whatever takes some.

    Raises ValueError for a model without gates, and a weight whose gates are all shut, or NaN.

    >>> model = add_gates_(nn.Linear(3, 2))
    >>> int(remove_gates_(model)["weight"].sum()), sorted(dict(model.named_parameters()))
    (6, ['bias', 'weight'])
    """
    gates, masks = _need_gates(model), Masks()
    for path, key, weight, gated in gates:
        name = f"{path}.{key}".lstrip(".")
        if gated.log_alpha.isnan().any():
            raise ValueError(
                f"gates of {name} are NaN: train them anew, with a lower learning rate"
            )
        masks[name] = (hard_concrete(gated.log_alpha) > 0).expand_as(weight).clone()
        if not masks[name].any():
            raise ValueError(f"every gate of {name} is shut: take less strength, or leave it out")
    with evaluating(model):
        for path, key, _, _ in gates:
            parametrize.remove_parametrizations(model.get_submodule(path), key)
    return masks


def _need_own(model: nn.Module, name: str) -> None:
    """A weight in one layer, which may be held in several places: another would go round them."""
    weight = model.get_parameter(name)
    layers = [(f"{n}.{k}", p) for n, m in model.named_modules() for k, p in m._parameters.items()]
    others = [other.lstrip(".") for other, p in layers if p is weight][1:]
    if others:
        raise ValueError(f"{name} is {others[0]} as well: leave it alone, leave=[{name!r}]")


def _gates(model: nn.Module) -> list[tuple[str, str, Tensor, _Gated]]:
    """Path of the layer, name there, weight and gates of every gated weight."""
    found = []
    for path, layer in model.named_modules():
        for key, chain in getattr(layer, "parametrizations", {}).items():
            if isinstance(chain[0], _Gated):
                found.append((path, key, chain.original, chain[0]))
    return found


def _need_gates(model: nn.Module) -> list[tuple[str, str, Tensor, _Gated]]:
    found = _gates(model)
    if not found:
        raise ValueError(f"this {type(model).__name__} has no gates: add_gates_(model) first")
    return found
