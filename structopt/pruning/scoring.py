"""From a model and a criterion to a score for each weight, and for each coupled channel."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from structopt.channels import ChannelGroup, Channels
from structopt.losses.checks import need_values, wide
from structopt.pruning.computed import computed_weights, is_scored
from structopt.pruning.criteria import magnitude
from structopt.pruning.evidence import KINDS
from structopt.training import Objective, supervised

Scores = dict[str, Tensor]
"""A score for each entry of each weight, by the weight's name."""

Criterion = Callable[..., Tensor]
"""A function of evidence, such as ``magnitude(weight)``."""


def score(
    model: nn.Module,
    criterion: Criterion = magnitude,
    batches: Iterable[Any] | None = None,
    *,
    objective: Objective | None = None,
    leave: Sequence[str] = (),
) -> Scores:
    """The score of every weight of a model: {"conv1.weight": tensor of the weight's shape}.

    Weights are parameters of two or more dimensions with "weight" in their name, embeddings and
    norms left out; for a criterion of `scale`, those of norms. `leave` lists names to leave alone,
    where ``"layer1.*"`` stands for many. What the criterion asks for is fetched from `batches` in
    evaluation mode, without autocast, on the model's device: derivatives of `objective` (by
    default cross-entropy) and statistics of inputs.

    Raises ValueError for a criterion that needs batches where there are none, that asks for
    something unknown, for NaN scores, for a layer whose input was not seen, and for a weight that
    other parameters compute (weight norm), unless it is left alone.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> {name: tuple(s.shape) for name, s in score(model).items()}
    {'0.weight': (3, 2), '2.weight': (1, 3)}
    """
    needs = _needs(criterion)
    need_leave(model, leave)
    made_of = _need_no_computed(model, "scale" in needs, leave)
    every = weights(model, "scale" in needs)
    found = {n: p for n, p in every if n not in made_of and not matches(n, leave)}
    if not found:
        what = "scale of a norm" if "scale" in needs else "weight"
        raise ValueError(f"{type(model).__name__} has no {what} to score besides those left alone")
    need_values("a score", found.values())
    if isinstance(batches, Iterator):
        batches = list(batches)  # each kind of evidence reads them anew
    evidence: dict[str, Scores] = {}
    for kind in needs:
        if kind not in KINDS:
            evidence[kind] = {name: p.detach() for name, p in found.items()}
            continue
        if batches is None:
            raise ValueError(
                f"{_name(criterion)} needs {kind}: give batches, "
                f"score(model, {_name(criterion)}, batches)"
            )
        evidence[kind] = KINDS[kind](model, dict(found), batches, objective or supervised())
    made: Scores = {}
    for name, parameter in found.items():
        unseen = [kind for kind in needs if name not in evidence[kind]]
        if unseen:
            raise ValueError(
                f"no {unseen[0]} of {name} was seen: inputs are seen of linear layers and "
                f"convolutions that are called as layers. Leave it alone, leave=[{name!r}]"
            )
        with torch.no_grad():
            one = criterion(**{kind: evidence[kind][name] for kind in needs})
        made[name] = _broadcast(name, one, parameter)
    return made


def need_list(leave: object) -> None:
    if isinstance(leave, str):  # would be taken for one pattern a letter
        raise ValueError(f"leave is a list of names: leave=[{leave!r}]")


def need_leave(model: nn.Module, leave: Sequence[str]) -> None:
    need_list(leave)
    names = [name for name, _ in model.named_parameters()]
    names += [weight.name for weight in computed_weights(model)]
    for pattern in leave:
        if not any(matches(name, [pattern]) for name in names):
            near = ", ".join(name for name in names if name.endswith("weight"))
            raise ValueError(f"no parameter is called {pattern!r} (leave); weights are {near}")


def _need_no_computed(model: nn.Module, norms: bool, leave: Sequence[str]) -> set[str]:
    """The parameters of computed weights, all of which have to be left alone."""
    computed = computed_weights(model, norms)
    for weight in computed:
        if not matches(weight.name, leave) and not all(matches(n, leave) for n in weight.parts):
            raise ValueError(
                f"{weight.name} is computed from {', '.join(weight.parts)}, and is no parameter "
                "that could be masked: parametrize.remove_parametrizations first (remove_gates_, "
                f"remove_weight_norm, remove_spectral_norm), or leave=[{weight.name!r}]"
            )
    return {part for weight in computed for part in weight.parts}


def _broadcast(name: str, one: Tensor, parameter: Tensor) -> Tensor:
    try:
        whole = one.expand_as(parameter)  # a view: where it repeats, its stride is 0
    except RuntimeError:
        raise ValueError(
            f"the criterion gave {name}, of shape {tuple(parameter.shape)}, scores of shape "
            f"{tuple(one.shape)}"
        ) from None
    need_numbers(name, one)
    return whole


def need_scores(scores: object) -> None:
    if not isinstance(scores, Mapping):
        raise ValueError(
            f"scores are a dict of a tensor for each weight, as score(model) gives: not {scores!r}"
        )


def need_numbers(name: str, scores: Tensor) -> None:
    """Raise ValueError for scores that cannot be ranked."""
    if not isinstance(scores, Tensor):
        raise ValueError(f"the scores of {name} are of {type(scores).__name__}: give a tensor")
    if not scores.is_floating_point() or scores.dtype.itemsize < 2:
        what = "floating-point numbers of 16 bits or more"
        raise ValueError(f"the scores of {name} are {scores.dtype}: give {what}")
    need_values(f"the ranking of {name}", [scores])
    if scores.isnan().any():
        raise ValueError(
            f"{int(scores.isnan().sum())} of {scores.numel()} scores of {name} are NaN: "
            "are its weights, or the loss on these batches, NaN or infinite?"
        )


def _needs(criterion: Criterion) -> list[str]:
    """The criterion's arguments without a default."""
    if not callable(criterion):
        raise ValueError(f"a criterion is a function, such as pruning.magnitude: not {criterion!r}")
    arguments = inspect.signature(criterion).parameters.values()
    needs = [a.name for a in arguments if a.default is a.empty]
    unknown = [name for name in needs if name not in {"weight", "scale", *KINDS}]
    if unknown or not needs:
        known = ", ".join(["weight", "scale", *KINDS])
        raise ValueError(
            f"{_name(criterion)} asks for {unknown or 'nothing'}: the arguments of a criterion are "
            f"some of {known}, and options with a default"
        )
    return needs


def _name(criterion: Criterion) -> str:
    inner = getattr(criterion, "func", criterion)
    return str(getattr(inner, "__name__", type(criterion).__name__))


def weights(model: nn.Module, norms: bool) -> list[tuple[str, nn.Parameter]]:
    owners = {
        f"{n}.{key}".lstrip("."): m for n, m in model.named_modules() for key in m._parameters
    }
    every = model.named_parameters()
    return [(name, p) for name, p in every if is_scored(name, owners[name], p, norms)]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is the name, or stands for it."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def total(parts: Tensor) -> Tensor:
    """The sum over the weights that hold a channel: (weights, channels) -> (channels,)."""
    return parts.sum(0)


def channel_scores(
    channels: Channels, scores: Scores, combine: Callable[[Tensor], Tensor] = total
) -> dict[ChannelGroup, Tensor]:
    """A score for each channel of each coupled group: {group: tensor (channels,)}.

    Each weight with an axis in the group gives a row: for every channel the sum of the scores that
    lie on it, whether the weight makes or reads the channel. `combine` makes one number a channel
    of the rows (by default their sum), and its absolute value is the score. A weight whose scores
    do not change along the axis says nothing, and is left out; so is a group of which no weight
    has scores.

    Raises ValueError where a score's shape is not that of the weight that was analysed.

    >>> from structopt.channels import channel_groups
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> model[0].weight.data = torch.tensor([[1.0, 2.0], [0.0, 5.0]])
    >>> model[1].weight.data = torch.tensor([[4.0, 0.0]])
    >>> channels = channel_groups(model, torch.zeros(1, 2))
    >>> channel_scores(channels, score(model))[channels["0"]]  # 1 + 2 + 4, 0 + 5 + 0
    tensor([7., 5.])
    """
    need_scores(scores)
    found = {}
    for group in channels:
        parts = []
        for member in group.members:
            mine = scores.get(member.parameter)
            if mine is None:
                continue
            if member.dim >= mine.ndim or mine.shape[member.dim] != len(member.channel):
                raise ValueError(
                    f"scores of {member.parameter} have shape {tuple(mine.shape)}, but its "
                    f"dimension {member.dim} holds {len(member.channel)}: score the model analysed"
                )
            if mine.stride(member.dim) == 0 and mine.shape[member.dim] > 1:
                continue
            parts.append(along(mine, member.dim, torch.from_numpy(member.channel), group.size))
        if parts:
            found[group] = combine(torch.stack(parts)).abs()
            if found[group].shape != (group.size,):
                raise ValueError(
                    f"combine makes (weights, channels) into (channels,): for group {group.name!r} "
                    f"of {group.size} it gave {tuple(found[group].shape)}"
                )
            need_numbers(f"group {group.name!r}", found[group])
    return found


def along(scores: Tensor, dim: int, channel: Tensor, size: int) -> Tensor:
    """The sum of the scores that lie on each channel of one axis."""
    scores = wide(scores)
    sums = scores.movedim(dim, 0).flatten(1).sum(1) if scores.ndim > 1 else scores
    place = torch.where(channel < 0, size, channel).to(sums.device)  # the last place is thrown away
    return sums.new_zeros(size + 1).index_add_(0, place, sums)[:size]
