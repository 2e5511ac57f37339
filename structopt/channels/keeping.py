"""What keeps the function of a model while its channels double, grow or shrink."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from structopt.channels.groups import Channels
from structopt.channels.labels import Vector
from structopt.channels.mirrors import Book
from structopt.channels.rows import Choice, Edit, Reals, Refused, rows_of


def times(tensor: Tensor, dim: int, factors: Reals) -> Tensor:
    """Each index along a dimension times its own number."""
    if (factors == 1).all():
        return tensor
    shape = [-1 if d == dim else 1 for d in range(tensor.ndim)]
    return tensor * torch.from_numpy(factors).to(tensor).reshape(shape)


def factors(channels: Channels, model: nn.Module, edit: Edit) -> Reals:
    """For each label of a weight axis, what its entries are multiplied by."""
    return _folded(channels, edit) * _scaled(channels, model, edit)


def _folded(channels: Channels, edit: Edit) -> Reals:
    """What the rows of each query are multiplied by, so that scores of attention stay the same.

    Python that divides by the root of the width would divide by another number: √(new / old). A
    channel that is doubled in query and key is counted twice in their product: one half. Where the
    same rows make query and key, each takes the root of that.
    """
    book = channels.book
    found = np.ones(book.labels.size)
    done: set[int] = set()
    for score in channels.scored:
        taken = rows_of(channels, score.labels, edit.choice)
        if taken is None or not (score.kind in edit.fold or edit.preserve):
            continue
        root = np.sqrt(len(taken) / len(score.labels)) if score.kind in edit.fold else 1.0
        copies = np.bincount(taken, minlength=len(score.labels))
        sources = [set(book.rows(n).tolist()) for n in (() if score.scales else score.picked)]
        for label, key, count in zip(score.labels, score.keys, copies, strict=True):
            rows, whole = _scaling(book, int(label), score.scales)
            others, _ = _scaling(book, int(key), score.key_scales)
            same = not score.picked and np.array_equal(rows, others)
            mine = {*rows.tolist()}.intersection(*sources)
            added = () if whole else channels.biases(np.array(sorted(mine), np.int64))
            for row in {*mine, *added} - done:  # one query may meet several keys
                done.add(row)
                factor = root / (max(count, 1) if edit.preserve else 1)
                found[row] = np.sqrt(factor) if same else factor
    return found


def _scaling(book: Book, label: int, scales: tuple[Vector, ...]) -> tuple[Vector, bool]:
    """The entries of weights that scale a channel, and whether what they add is among them.

    Those of a norm of its own, with its bias; or the rows that make it, without.
    """
    root = book.labels.find(np.array([label])) if scales else label
    found = [axis[book.labels.find(axis) == root] for axis in scales]
    known = np.concatenate(found) if found else np.empty(0, np.int64)
    return (np.unique(known), True) if len(known) else (book.rows(label), False)


def shares(channels: Channels, labels: Vector, taken: Vector, choice: Choice) -> Reals:
    """How many copies of its channel each entry of an edited reader stands beside."""
    found = np.ones(len(taken))
    for number, channel in channels.along(labels).items():
        if number in choice:
            index = choice[number]
            copies = np.bincount(index, minlength=int(channel.max()) + 1)
            mine = (channel[taken] >= 0) & channels.reading(number)[labels[taken]]
            found[mine] *= copies[channel[taken][mine]]
    return found


def _scaled(channels: Channels, model: nn.Module, edit: Edit) -> Reals:
    """Multiply what makes a channel and divide what reads it (Nagel et al., 2019)."""
    found = np.ones(channels.book.labels.size)
    parameters = dict(model.named_parameters()) if edit.scale else {}
    for number, values in edit.scale.items():
        group, powers = channels.every[number], _powers(channels, number)
        by_channel = np.ones(group.size)
        by_channel[edit.choice[number]] = values
        for axis, why in channels.book.bent if (by_channel != 1).any() else ():
            channel = channels.along(axis).get(number)
            if channel is not None and ((channel >= 0) & (powers[axis] > 0)).any():
                raise Refused(f"what is scaled meets {why}")
        for member in group.members:
            if member.parameter in parameters:
                mine = member.channel >= 0
                labels = channels.axes[member.parameter, member.dim][mine]
                found[labels] *= by_channel[member.channel[mine]] ** powers[labels]
    return found


def _powers(channels: Channels, number: int) -> Reals:
    """Of each label, 1: makes the channel as it is read; -1: reads it; 0: is scaled anew behind.

    A norm, a grouped layer or a factor takes the scale over from what makes its input.
    """
    book = channels.book
    spent = np.zeros(book.labels.size, bool)
    for axis, groups in book.spent:
        if groups is None or number in channels.along(groups):
            spent[axis] = True
    count = -1
    while count != (count := int(spent.sum())):
        for rows, bias in reversed(book.beside):
            spent[bias] |= spent[rows]
    return np.where(channels.reading(number), -1.0, np.where(spent, 0.0, 1.0))
