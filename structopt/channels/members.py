"""A group of channels, and the weight axes that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from structopt.channels.labels import Vector

if TYPE_CHECKING:
    from structopt.channels.groups import Channels


@dataclass(frozen=True, eq=False)
class Member:
    """An axis of a parameter that holds channels of a group.

    `channel[i]` is the number of the channel that index i of the axis belongs to, or -1.
    """

    parameter: str
    dim: int
    channel: Vector
    reads: bool

    @property
    def repeats(self) -> int:
        """How many indices of the axis each channel owns."""
        return int((self.channel >= 0).sum() // (self.channel.max() + 1))

    def __str__(self) -> str:
        times = f" ×{self.repeats}" if self.repeats > 1 else ""
        return f"{self.parameter}[dim {self.dim}]{times}"


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are kept or removed alike, by every weight axis that makes or reads them."""

    name: str
    size: int
    members: tuple[Member, ...]
    frozen: str = ""
    averaged: bool = False
    channels: Channels = field(repr=False, default=None)  # type: ignore[assignment]

    def __repr__(self) -> str:
        state = f"frozen, {self.frozen}" if self.frozen else f"{len(self.members)} axes"
        return f"ChannelGroup({self.name}: {self.size} channels, {state})"
