"""A slice: which part of each layer a narrow network is. A frozen value that prints itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from structopt.channels import ChannelGroup, Channels
from structopt.losses.checks import real


@dataclass(frozen=True)
class Slice:
    """The first channels of each group, as a share of all; and the blocks that are left out.

    `width` is the share of every group, `shares` of those whose name fits a pattern (the last that
    fits counts). `skip` names modules that hand on their input: a nested transformer is narrow in
    its heads, narrow in its perceptrons, and shallow (Cai et al., 2020, "Once-for-all"; Devvrit et
    al., 2024, "MatFormer").

    Where two groups share an axis (the heads, and the numbers in a head), `width` narrows the outer
    one alone, so that the axis has that share; `shares` may name the inner one.

    Raises ValueError for a share outside (0, 1].

    >>> Slice(0.5)
    Slice(0.5)
    >>> Slice(shares={"layers.*.fc1": 0.25}, skip=["layers.2"])
    Slice(1, shares={'layers.*.fc1': 0.25}, skip=('layers.2',))
    """

    width: float = 1.0
    shares: Any = ()
    skip: Any = ()

    def __post_init__(self) -> None:
        shares = self.shares.items() if isinstance(self.shares, Mapping) else self.shares
        object.__setattr__(self, "shares", tuple((str(p), s) for p, s in shares))
        if isinstance(self.skip, str):
            raise ValueError(f"skip is a list of names of modules: [{self.skip!r}]")
        object.__setattr__(self, "skip", tuple(self.skip))
        for share in (self.width, *(share for _, share in self.shares)):
            if not 0 < real(share) <= 1:
                raise ValueError(f"a width is a share of the channels, in (0, 1], not {share!r}")
        object.__setattr__(self, "shares", tuple((p, float(s)) for p, s in self.shares))
        object.__setattr__(self, "width", float(self.width))

    def __repr__(self) -> str:
        more = [f"shares={dict(self.shares)}"] if self.shares else []
        more += [f"skip={self.skip}"] if self.skip else []
        return f"Slice({', '.join([f'{self.width:g}', *more])})"


def as_slice(width: float | Slice) -> Slice:
    return width if isinstance(width, Slice) else Slice(width)


def widths_of(channels: Channels, part: Slice) -> dict[ChannelGroup, int]:
    """How many channels of each group that changes are in the slice."""
    inner, found = _inner(channels), dict[ChannelGroup, int]()
    for pattern, _ in part.shares:
        if not any(fnmatchcase(group.name, pattern) for group in channels):
            names = ", ".join(group.name for group in channels) or "none"
            raise ValueError(f"no group is called {pattern!r}; there are {names}")
    for group in channels:
        share = 1.0 if group in inner else part.width
        for pattern, one in part.shares:
            share = one if fnmatchcase(group.name, pattern) else share
        size = int(share * group.size + 0.5)
        if size < 1:
            raise ValueError(
                f"{part} empties group {group.name!r}, which has {group.size} channels: take at "
                f"least {0.5 / group.size:.2g}, or give it a share of its own, "
                f"shares={{{group.name!r}: 1.0}}"
            )
        if size < group.size:
            found[group] = size
    return found


def _inner(channels: Channels) -> set[ChannelGroup]:
    """The groups that run faster along an axis that they share with another.

    Past a channel shuffle each of two groups is the faster one somewhere: then one of them stays.
    """
    on_axis: dict[tuple[str, int], list[tuple[ChannelGroup, Any]]] = {}
    for group in channels:
        for member in group.members:
            on_axis.setdefault((member.parameter, member.dim), []).append((group, member.channel))
    found: set[ChannelGroup] = set()
    for sharing in on_axis.values():
        for group, channel in sharing:
            for other, outer in sharing:
                both = (channel >= 0) & (outer >= 0)
                fast, slow = (np.diff(c[both]) != 0 for c in (channel, outer))
                if other not in {group, *found} and fast.sum() > slow.sum():
                    found.add(group)
    return found
