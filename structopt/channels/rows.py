"""Which entries of a weight axis to take, so that its channels become those that were asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from structopt.channels.groups import Channels
from structopt.channels.labels import Vector

Reals = npt.NDArray[np.float64]
Choice = Mapping[int, Vector]  # number of a group -> channels to take


@dataclass(frozen=True, eq=False)
class Edit:
    """What to take, and how to keep the function: all that `build` needs to know."""

    choice: Choice
    preserve: bool = False
    scale: Mapping[int, Reals] = field(default_factory=dict)
    guessed: frozenset[str] | None = None  # of the attributes that may be sizes, those set; or all
    fold: frozenset[str] = frozenset()  # classes whose Python scales attention by the width

    def only(self, *numbers: int) -> Edit:
        """The same for some of the groups."""
        scale = {n: values for n, values in self.scale.items() if n in numbers}
        return replace(self, choice={n: self.choice[n] for n in numbers}, scale=scale)

    def variants(self, channels: Channels) -> Iterator[Edit]:
        """What Python does with a width cannot be read, only tried."""
        touched = {
            s.kind for s in channels.scored if rows_of(channels, s.labels, self.choice) is not None
        }
        kinds = sorted(touched - {""})[:4]
        guesses: list[frozenset[str] | None] = [frozenset()]
        if any(not e.name for e in channels.extents):
            guesses.append(None)  # all
        for count in range(len(kinds), -1, -1):
            for fold in itertools.combinations(kinds, count):
                for guessed in guesses:
                    yield replace(self, fold=frozenset({"", *fold}), guessed=guessed)


def rows(channel: Vector, index: Vector) -> Vector | None:
    """Which entries of an axis to take so that its channels become those of `index`.

    `channel[i]` is the channel of entry i, or -1. `None` where no layout is sure to be right.

    >>> rows(np.array([0, 0, 1, 1, 2, 2]), np.array([2, 0]))  # two entries a channel
    array([4, 5, 0, 1])
    """
    size = int(channel.max()) + 1
    mine = np.flatnonzero(channel >= 0)
    start, end = int(mine[0]), int(mine[-1]) + 1
    if len(mine) == end - start == size and np.array_equal(channel[mine], np.arange(size)):
        return np.concatenate([np.arange(start), start + index, np.arange(end, len(channel))])
    breaks = np.flatnonzero((np.diff(channel) < 0) | ((channel[:-1] < 0) & (channel[1:] >= 0))) + 1
    width = len(channel) // (len(breaks) + 1)
    usual = np.repeat(np.arange(size), width // size)
    if np.array_equal(channel, np.tile(usual, len(breaks) + 1)):  # tiles that are all alike
        inner = np.arange(width).reshape(size, -1)[index].ravel()
        return (np.arange(0, len(channel), width)[:, None] + inner).ravel()
    pieces = []
    for start, tile in zip(np.r_[0, breaks], np.split(channel, breaks), strict=True):
        if tile[0] < 0:
            pieces.append(start + np.arange(len(tile)))
            continue
        tail = start + np.flatnonzero(tile < 0)
        tile = tile[tile >= 0]
        repeats = len(tile) // size
        if not np.array_equal(tile, np.repeat(np.arange(size), repeats)):
            return _scattered(channel, index)
        pieces += [(start + index[:, None] * repeats + np.arange(repeats)).ravel(), tail]
    return np.concatenate(pieces)


def _scattered(channel: Vector, index: Vector) -> Vector | None:
    """As `rows`, for channels that were shuffled: some may go or swap places, none may double."""
    kept = np.flatnonzero((channel < 0) | np.isin(channel, index))
    ordered = np.sort(index)
    if np.array_equal(ordered, index):
        return kept if len(np.unique(index)) == len(index) else None
    if len(np.unique(index)) < len(index):
        return None
    old = channel[kept]
    order = np.argsort(old, kind="stable")
    places: dict[int, list[int]] = {}
    for place in order:
        places.setdefault(int(old[place]), []).append(int(kept[place]))
    target = {int(o): int(i) for o, i in zip(ordered, index, strict=True)}
    used: dict[int, int] = {}
    result = kept.copy()
    for n, c in enumerate(old):
        if c >= 0:
            rank = used.get(int(c), 0)
            used[int(c)] = rank + 1
            result[n] = places[target[int(c)]][rank]
    return result


class Refused(ValueError):
    """What was asked for cannot be done exactly; the model is as it was."""


def rows_of(channels: Channels, labels: Vector, choice: Choice, what: str = "") -> Vector | None:
    """Which entries of a labelled axis to take; `None` where no chosen group lies on it."""
    along = channels.along(labels)
    if channels.asked is not choice:
        channels.asked, channels.answers = choice, {}
    if id(along) in channels.answers:
        return channels.answers[id(along)]
    touched = {n: c for n, c in along.items() if n in choice}
    taken: Vector | None = None
    for number, channel in touched.items():
        taken = np.arange(len(labels)) if taken is None else taken
        made = rows(channel[taken], choice[number])
        if made is None:
            raise Refused(
                f"{what} holds the channels of this group shuffled among others: they can be "
                "removed or permuted there, not doubled"
            )
        taken = taken[made]
    channels.answers[id(along)] = taken
    return taken
