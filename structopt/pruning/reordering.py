"""Channels in the order in which N:M keeps most, and such weights on the kernels for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structopt.channels import ChannelGroup, channel_groups, take
from structopt.channels.members import Member
from structopt.channels.rows import rows
from structopt.losses.checks import whole
from structopt.pruning.finding import find_masks
from structopt.pruning.masks import apply_masks_, need_masks
from structopt.pruning.patterns import NOfM
from structopt.pruning.scoring import Scores, matches, need_list, need_numbers, need_scores, score
from structopt.training.copying import copied

_PIECE = 1 << 25  # numbers compared at once


def permute_channels(
    model: nn.Module,
    example: Any,
    pattern: NOfM = NOfM(2, 4),  # noqa: B008 (a frozen value)
    *,
    scores: Scores | None = None,
    leave: Sequence[str] = (),
    sweeps: int = 20,
) -> nn.Module:
    """A copy that computes the same, its channels in an order in which the pattern keeps more.

    N:M chooses among neighbours along the input channels. Where two large weights share their four
    with two others as large, one half is lost; another order of the channels avoids that (Pool and
    Yu, 2021). For each coupled group, pairs of channels swap places as long as the sum of the
    scores' sizes that stay over all weights that read the group grows, `sweeps` times at
    most; `scores` are magnitudes by default.
    So no less is kept than without. :func:`structopt.channels.take` makes
    the copy, exactly; find masks for it anew. `leave` names groups to leave alone.

    Raises ValueError for a weight that reads a group and is not divided by the pattern, scores of
    other names or shapes than the weights have, a group that has to keep its order, and whatever
    `take` refuses.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> moved, x = permute_channels(model, torch.zeros(1, 4)), torch.randn(5, 4)
    >>> torch.allclose(moved(x), model(x), atol=1e-6)
    True
    """
    if not isinstance(pattern, NOfM):
        raise ValueError(f"only N:M depends on the order of channels, not {pattern!r}")
    need_list(leave)
    channels = channel_groups(model, example)
    for name in leave:
        if not any(matches(group.name, [name]) for group in channels):
            near = ", ".join(group.name for group in channels)
            raise ValueError(f"no group is called {name!r} (leave); there are {near}")
    if not whole(sweeps) >= 0:
        raise ValueError(f"sweeps={sweeps!r}: how often pairs swap at most, a whole number")
    scores = score(model) if scores is None else _fitting(model, scores)
    now = {n: s.detach().abs() for n, s in scores.items()}
    choice: dict[ChannelGroup, Tensor] = {}
    for group in channels:
        readers = [m for m in group.members if m.reads and m.dim == 1 and m.parameter in now]
        plain = [m for m in readers if np.array_equal(m.channel, np.arange(group.size))]
        if not plain or matches(group.name, leave):
            continue
        before = _kept(now, readers, pattern)
        columns = [now[m.parameter].movedim(1, -1).reshape(-1, group.size) for m in plain]
        order = _improved(torch.cat(columns), pattern, sweeps)
        moved = {m.parameter: _moved(now[m.parameter], m, order) for m in readers}
        if _kept(moved, readers, pattern) > before:
            choice[group], now = order, {**now, **moved}
    return take(model, choice) if choice else copied(model)


def _fitting(model: nn.Module, scores: Scores) -> Scores:
    need_scores(scores)
    parameters = dict(model.named_parameters())
    for name, one in scores.items():
        need_numbers(name, one)
        if name not in parameters or one.shape != parameters[name].shape:
            here = tuple(parameters[name].shape) if name in parameters else "missing"
            raise ValueError(
                f"scores of {name} have shape {tuple(one.shape)}, in the model it is {here}: "
                "score(model) gives some that fit"
            )
    return scores


def _kept(scores: Scores, readers: Sequence[Member], pattern: NOfM) -> float:
    """How much of the scores the pattern leaves."""
    mine = {m.parameter: scores[m.parameter] for m in readers}
    masks = find_masks(mine, pattern=pattern)
    return sum(float((mine[n].double() * mask).sum()) for n, mask in masks.items())


def _moved(scores: Tensor, reader: Member, order: Tensor) -> Tensor:
    taken = rows(reader.channel, order.cpu().numpy())
    assert taken is not None, "a permutation has a place for each entry"
    return scores[:, torch.from_numpy(taken).to(scores.device)]


def _improved(columns: Tensor, pattern: NOfM, sweeps: int) -> Tensor:
    """An order of the columns (rows, channels) of which the pattern keeps no less."""
    order = torch.arange(columns.shape[1], device=columns.device)
    for _ in range(sweeps):
        swaps = _swaps(columns[:, order], pattern)
        if not swaps:
            break
        for i, j in swaps:
            order[[i, j]] = order[[j, i]]
    return order


def _swaps(columns: Tensor, pattern: NOfM) -> list[tuple[int, int]]:
    """The columns whose exchange gains most, each set of m taking part once."""
    n, m = pattern.n, pattern.m
    sets = columns.view(len(columns), -1, m)  # (rows, sets, m)
    kept = sets.topk(n, dim=2).values.sum((0, 2)).repeat_interleave(m)
    others = [[k for k in range(m) if k != i] for i in range(m)]
    best = (
        sets[:, :, others].topk(n, dim=3).values.flatten(1, 2)
    )  # without the column, (rows, C, n)
    sure, least = best[..., :-1].sum((0, 2)), best[..., -1]
    size = max(1, _PIECE // columns.numel())
    swapped = [  # what the set of column i keeps with column j in its place
        torch.maximum(piece[:, :, None], columns[:, None, :]).sum(0)
        for piece in torch.split(least, size, dim=1)
    ]
    with_other = sure[:, None] + torch.cat(swapped)
    gain = with_other + with_other.T - kept[:, None] - kept
    count = len(kept) // m
    pairs = gain.view(count, m, count, m).transpose(1, 2).flatten(2)  # (sets, sets, m · m)
    most, where = pairs.max(2)
    most = torch.where(most > 1e-6 * kept.sum(), most, 0).triu(1)  # more than rounding
    ranked = most.flatten().argsort(descending=True)[: int(most.count_nonzero())].tolist()
    places, used, found = where.flatten().tolist(), set[int](), list[tuple[int, int]]()
    for place in ranked:
        a, b = divmod(place, count)
        if not {a, b} & used:
            used |= {a, b}
            found.append((a * m + places[place] // m, b * m + places[place] % m))
    return found


def to_semi_structured(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy for inference whose masked weights run on the 2:4 kernels of the GPU.

    Each weight named in the masks, of a linear layer and 2:4 in each row, becomes the tensor that
    ``torch.sparse.to_sparse_semi_structured`` makes: values and places, a little more than half of
    the bytes. Which types and sizes there are kernels for, torch says.

    Raises ValueError for masks that do not fit or are not 2:4, weights of other layers, a device
    without such kernels (they need an NVIDIA GPU of compute capability 8.0 or more), and a weight
    of a type or size that torch refuses.

    >>> to_semi_structured(nn.Linear(64, 32), {"weight": torch.ones(32, 64, dtype=torch.bool)})
    Traceback (most recent call last):
    ValueError: the mask of weight is not 2:4: more than two of four neighbours stay
    """
    made = copied(model)
    pairs = dict(zip(masks, need_masks(made, masks), strict=True))
    for name, (weight, mask) in pairs.items():
        path, _, key = name.rpartition(".")
        layer = made.get_submodule(path)
        if not isinstance(layer, nn.Linear) or key != "weight":
            raise ValueError(
                f"{name} is of {type(layer).__name__}: torch has 2:4 for nn.Linear, its weight"
            )
        if weight.shape[1] % 4 or (mask.view(-1, 4).sum(1) > 2).any():
            raise ValueError(
                f"the mask of {name} is not 2:4: more than two of four neighbours stay"
            )
        _need_kernels(name, weight.device)
    apply_masks_(made, masks)
    for name, (weight, _) in pairs.items():
        try:
            sparse = torch.sparse.to_sparse_semi_structured(weight.detach())
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name}, {weight.dtype} {tuple(weight.shape)}: {error}") from error
        layer = made.get_submodule(name.rpartition(".")[0])
        layer.weight = nn.Parameter(sparse, requires_grad=False)
    return made


def _need_kernels(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"{name} is on {device}, which has no 2:4 kernels: move the model to an NVIDIA GPU of "
            "compute capability 8.0 or more, or keep the masks"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no 2:4 kernels: they need compute "
            "capability 8.0 or more"
        )
