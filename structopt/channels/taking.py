"""The one verb: a copy of the model with other channels, handed over only when it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from structopt.channels.asking import asked
from structopt.channels.groups import Channels
from structopt.channels.judging import ByShape, ByValue, Judge
from structopt.channels.members import ChannelGroup
from structopt.channels.rows import Edit, Refused
from structopt.channels.sizes import guesses
from structopt.channels.walking import modules_of, parameters_of

Numbers = Sequence[int] | Sequence[float] | Tensor | range


@torch.inference_mode(False)  # else the copy could not be trained
def take(
    model: nn.Module,
    groups: Mapping[ChannelGroup, Numbers],
    *,
    preserve: bool = False,
    scale: Mapping[ChannelGroup, Numbers] | None = None,
) -> nn.Module:
    """A copy of the model with these channels of these groups, and no others, in this order.

    A subset prunes, a permutation reorders, repeated channels widen: with ``preserve`` the weights
    that read a doubled channel are divided, so that the function stays (Net2Net, Chen et al.,
    2016). ``scale`` multiplies each channel taken by a positive number, the same for its copies,
    and divides its readers: the same function where the activation is positively homogeneous, as
    ReLU is. One that is not, as ReLU6, is refused even if no value of the example reaches its bend.

    The copy is run in double precision on the example of the analysis, in evaluation mode, and on
    random numbers of its shape where all of the example's are equal; weights that are zero, behind
    which nothing can be seen, have random numbers for that. A subset has to equal the full model
    with the other channels masked; norms that average over
    channels average over those that stay. Anything else has to equal the full model. Parameters,
    buffers and the sizes that modules remember are edited; hooks, devices, dtypes, tied weights
    and `requires_grad` stay; so does the order in memory, but where a CPU's gradients of so few
    channels go wrong in channels-last order. On the ``meta`` device only shapes are checked.

    Raises ValueError where that does not hold, or for an index out of range, empty, repeated
    without ``preserve``, or of a group that is frozen or of a model of other shapes (a copy of the
    model that was analysed will do). The model given is never touched.

    >>> import torch
    >>> from structopt.channels import channel_groups
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> channels = channel_groups(model, torch.zeros(1, 4))
    >>> take(model, {channels["0"]: [0, 2, 5]})
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    channels, first = asked(model, groups, preserve, scale)
    judge = ByShape(channels, model) if _is_bare(model) else ByValue(channels, model)
    edit, problem = _exact(channels, model, first, judge)
    if edit is None:
        raise Refused(_complaint(channels, model, first, judge, problem))
    return judge.made(edit)


def _is_bare(model: nn.Module) -> bool:
    return any(p.is_meta for p in parameters_of(modules_of(model)).values())


def _exact(
    channels: Channels, model: nn.Module, first: Edit, judge: Judge
) -> tuple[Edit | None, str]:
    """The way to make this edit that holds, or what goes wrong."""
    problem = ""
    for edit in first.variants(channels):
        found = judge(edit)
        if not found:
            return _least(channels, model, edit, judge), ""
        problem = problem or found
    return None, problem


def _least(channels: Channels, model: nn.Module, edit: Edit, judge: Judge) -> Edit:
    """The same without guesses that it does not need: nothing would show that they are wrong."""
    if edit.guessed is not None:
        return edit
    modules = modules_of(model)
    needed = frozenset(guess.what for guess in guesses(channels, modules))
    for what in sorted(needed):
        fewer = replace(edit, guessed=needed - {what})
        if not judge(fewer):
            needed -= {what}
    return replace(edit, guessed=needed)


def _complaint(channels: Channels, model: nn.Module, edit: Edit, judge: Judge, problem: str) -> str:
    """Name the group that stands in the way: the last of the shortest row that fails."""
    numbers = list(edit.choice)
    works, fails = 0, len(numbers)
    while fails - works > 1:
        middle = (works + fails) // 2
        made, why = _exact(channels, model, edit.only(*numbers[:middle]), judge)
        works, fails = (middle, fails) if made is not None else (works, middle)
        problem = why or problem
    last = numbers[fails - 1]
    alone, why = (None, problem) if fails == 1 else _exact(channels, model, edit.only(last), judge)
    guilty = channels.every[last]
    layers = ", ".join(str(member) for member in guilty.members[:3])
    what = f"group {guilty.name!r} ({layers})"
    if alone is not None:
        others = ", ".join(repr(channels.every[n].name) for n in numbers[: min(fails - 1, 3)])
        what = f"{what} together with {others}{' and others' if fails > 4 else ''}"
    remedy = "leave the group out, or look at explain(model, example)"
    if guilty.averaged and len(set(np.unique(edit.choice[last], return_counts=True)[1])) > 1:
        remedy = "a norm averages over these channels, so repeat each of them equally often"
    return f"{what} cannot be edited exactly: {why or problem}. The model is as it was; {remedy}"
