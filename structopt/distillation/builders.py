"""From a teacher and a loss to an objective for the one loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structopt import losses
from structopt.distillation.adapters import regressor
from structopt.distillation.features import attention_transfer, hint
from structopt.distillation.logits import soft_targets
from structopt.distillation.objective import Distillation, Loss, Term
from structopt.distillation.teachers import Source, as_source, picked
from structopt.distillation.watching import Watch
from structopt.losses.checks import need_temperature
from structopt.losses.positions import arguments
from structopt.training import evaluating
from structopt.training.objectives import describe

AnyTeacher = nn.Module | Sequence[nn.Module] | Source
Task = Callable[[Tensor, Tensor], Tensor]


def from_logits(
    teacher: AnyTeacher,
    loss: Loss = soft_targets,
    *,
    weight: float = 1.0,
    label_weight: float = 1.0,
    task: Task = losses.cross_entropy,
    **settings: float,
) -> Distillation:
    """label_weight · task(student, labels) + weight · loss(student, teacher), on the logits.

    The convex form of Hinton et al., 2015, is ``weight=0.9, label_weight=0.1``.
    ``label_weight=0`` needs no labels. Where each position has one, (B, ...), those that ``task``
    ignores (its ``ignore_index``, else -100) count for no loss named below either.

    Args:
        teacher: a module, several (their logits are averaged), :class:`Teacher`,
            :class:`MovingTeacher`, or :class:`Cached` outputs.
        loss: :func:`soft_targets`, :func:`standardised_logits`, :func:`logit_mse`,
            :func:`decoupled`, :func:`correlations`, or any f(student, teacher); one with a
            parameter ``targets`` gets the labels, one with ``counts`` a bool (B, ...) of the
            positions that count, or None; one without counts all.
        weight: of the teacher.
        label_weight: of the labels.
        task: the loss of the labels.
        settings: keywords of the loss, such as ``temperature``.

    Raises:
        ValueError: a weight below 0, what is no teacher, a setting that the loss does not have;
            at a batch, logits of three dimensions whose labels do not say which one the classes
            are, though a loss above would take the second.

    Example:
        >>> teacher, student = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> objective = from_logits(teacher, temperature=2.0, weight=0.9, label_weight=0.1)
        >>> objective(student, (torch.ones(4, 2), torch.zeros(4).long())).ndim
        0
        >>> objective
        Distillation(
          0.1 · labels + 0.9 · soft_targets(temperature=2.0)
          (adapters): ModuleList()
        )
    """
    term = Term(_name(loss, settings), _bound(loss, settings), weight)
    return Distillation(as_source(teacher), [term], label_weight=label_weight, task=task)


def from_features(
    teacher: AnyTeacher,
    layers: Mapping[str, str],
    loss: Loss = attention_transfer,
    *,
    weight: float = 1.0,
    label_weight: float = 1.0,
    **settings: float,
) -> Distillation:
    """label_weight · cross-entropy + weight · Σ loss(student's layer, teacher's layer).

    Args:
        teacher: one module, or :class:`Cached` outputs that hold these layers.
        layers: names of the student's layers, each with that of the teacher's.
        loss: :func:`attention_transfer`, :func:`similarity_preserving`,
            :func:`relational_distance`, :func:`relational_angle`, or any f(student, teacher) that
            takes features of different sizes. For :func:`hint` call :func:`hints`.
        weight: of each pair of layers.
        label_weight: of the labels.
        settings: keywords of the loss.

    Raises:
        ValueError: as :func:`from_logits`, or no layers. A layer that does not exist is named,
            with near names, at the first batch.

    Example:
        >>> teacher, student = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3))
        >>> from structopt.distillation import relational_distance
        >>> objective = from_features(teacher, {"0": "0"}, relational_distance, weight=25.0)
        >>> objective(student, (torch.rand(4, 2), torch.zeros(4).long())).ndim
        0
    """
    need_pairs(layers)
    name, bound = _name(loss, settings), _bound(loss, settings)
    terms = [Term(f"{name} {ours}", bound, weight, (ours, t)) for ours, t in layers.items()]
    return Distillation(as_source(teacher), terms, label_weight=label_weight)


def hints(
    teacher: AnyTeacher,
    student: nn.Module,
    layers: Mapping[str, str],
    example: Any,
    *,
    weight: float = 1.0,
    label_weight: float = 1.0,
) -> Distillation:
    """:func:`hint` between layers, through adapters that are made from ``example``.

    An adapter maps the student's feature to the shape of the teacher's: a 1×1 convolution for
    maps (the larger map is averaged down to the smaller), a linear map for vectors and tokens.
    Romero et al., 2015, "FitNets". The adapters are parameters of the objective, and have to be in
    the optimiser: ``descent.fused_adamw(nn.ModuleList([student, objective]), lr)``.

    Args:
        teacher: one module, or :class:`Cached` outputs that hold these layers.
        student: the network to be taught; it is run once, in evaluation mode.
        layers: names of the student's layers, each with that of the teacher's.
        example: inputs of a few examples, on the student's device.
        weight: of each pair of layers.
        label_weight: of the labels; 0 is FitNets' first stage.

    Raises:
        ValueError: layers that do not exist (near names listed), or that no adapter can map.

    Example:
        >>> teacher, student = nn.Sequential(nn.Linear(2, 8)), nn.Sequential(nn.Linear(2, 8))
        >>> hints(teacher, student, {"0": "0"}, torch.ones(1, 2)).adapters[0].map
        Linear(in_features=8, out_features=8, bias=True)
    """
    source = as_source(teacher)
    ours, theirs = seen_features(source, student, layers, example)
    terms = []
    for name, other in layers.items():
        adapter = regressor(ours[name].shape, theirs[other].shape, f"{name!r} to {other!r}")
        adapter = adapter.to(example.device, ours[name].dtype)
        terms.append(Term(f"hint {name}", hint, weight, (name, other), adapter))
    return Distillation(source, terms, label_weight=label_weight)


def together(*objectives: Distillation, label_weight: float = 1.0) -> Distillation:
    """The terms of several objectives in one: one forward pass, the labels counted once.

    Raises ``ValueError`` for objectives of different teachers or losses of the labels.

    >>> teacher = nn.Sequential(nn.Linear(2, 3))
    >>> pair = from_logits(teacher), from_features(teacher, {"0": "0"}, soft_targets, weight=5.0)
    >>> together(*pair)
    Distillation(
      1 · labels + 1 · soft_targets + 5 · soft_targets 0
      (adapters): ModuleList()
    )
    """
    if not objectives:
        raise ValueError("together needs at least one objective")
    first = objectives[0]
    models = {id(m) for o in objectives for m in getattr(o.teacher, "models", [o.teacher])}
    alone = {id(m) for m in getattr(first.teacher, "models", [first.teacher])}
    if models != alone or any(o.task is not first.task for o in objectives):
        raise ValueError("together needs objectives of one teacher and one loss of the labels")
    terms = [term for objective in objectives for term in objective.terms]
    return Distillation(first.teacher, terms, label_weight=label_weight, task=first.task)


def need_pairs(layers: Any) -> None:
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError("name a pair of layers: {student's layer: teacher's layer}")


def seen_features(
    source: Source, student: nn.Module, layers: Mapping[str, str], example: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the named layers of student and teacher make of ``example``."""
    need_pairs(layers)
    if not isinstance(example, Tensor):
        raise ValueError(
            f"the example is one tensor of inputs, as a teacher is asked, not {describe(example)}: "
            "wrap teacher and student in modules that take one"
        )
    with Watch(student, layers) as found, evaluating(student), torch.no_grad():
        student(example)
        ours = {name: picked(found, name) for name in layers}
    # Cached outputs are asked by number: the first ones show the shapes as well.
    numbers = torch.arange(len(example), device=example.device)
    pairs = torch.stack([torch.zeros_like(numbers), numbers], 1)
    return ours, source.teach(example, pairs, list(dict.fromkeys(layers.values()))).features


def _bound(loss: Loss, settings: Mapping[str, Any]) -> Loss:
    if not settings:
        return loss
    known = [name for name in arguments(loss) if name not in ("targets", "counts")][2:]
    for name in settings:
        if name not in known:
            raise ValueError(
                f"{_name(loss, {})} has no setting {name!r}; it has {', '.join(known) or 'none'}"
            )
    need_temperature(settings.get("temperature", 1.0))
    return partial(loss, **settings)


def _name(loss: Loss, settings: Mapping[str, Any]) -> str:
    name = getattr(loss, "__name__", type(loss).__name__)
    inside = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f"{name}({inside})" if inside else name
