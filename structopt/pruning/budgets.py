"""Budgets: what the smaller network may cost. Frozen values that print themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from structopt import measure
from structopt.losses.checks import need_values, real


@dataclass(frozen=True)
class Budget:
    """At most this much, in the unit of the class; or a `share` of what the given model costs."""

    at_most: float | None = None
    share: float | None = None
    unit: ClassVar[str] = ""
    on_paper: ClassVar[bool] = True  # shapes decide: no weights are needed

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.share is None):
            raise ValueError(f"{type(self).__name__} takes one of at_most and share")
        name, most = ("share", 1.0) if self.at_most is None else ("at_most", math.inf)
        given = self.share if self.at_most is None else self.at_most
        if not 0 < real(given) <= most:
            limits = "in (0, 1]" if most == 1 else "above 0"
            raise ValueError(f"{type(self).__name__}: {name} is a number {limits}, not {given!r}")

    def cost(self, model: nn.Module, example: Any) -> float:
        raise ValueError(f"{self!r} has no unit: take MACs, Parameters, Bytes or Milliseconds")

    def limit(self, model: nn.Module, example: Any) -> float:
        """The most that the smaller model may cost."""
        if self.at_most is not None:
            return self.at_most
        assert self.share is not None
        return self.share * self.cost(model, example)

    def __repr__(self) -> str:
        given = [
            (k, v) for k, v in (("at_most", self.at_most), ("share", self.share)) if v is not None
        ]
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in given)})"


@dataclass(frozen=True, repr=False)
class MACs(Budget):
    """Multiply-accumulates for one example.

    >>> MACs(share=0.5)
    MACs(share=0.5)
    """

    unit: ClassVar[str] = "MACs"

    def cost(self, model: nn.Module, example: Any) -> float:
        return measure.cost(model, example).macs


@dataclass(frozen=True, repr=False)
class Parameters(Budget):
    """Numbers that training sets."""

    unit: ClassVar[str] = "parameters"

    def cost(self, model: nn.Module, example: Any) -> float:
        return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True, repr=False)
class Bytes(Budget):
    """Bytes of all parameters and buffers, in the type that they have."""

    unit: ClassVar[str] = "bytes"

    def cost(self, model: nn.Module, example: Any) -> float:
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True, repr=False)
class Milliseconds(Budget):
    """Measured time of one call with the example, on the device where the model lies.

    Give an example of the batch that you will serve. Timings scatter: the same budget may give
    slightly other widths the next time.
    """

    unit: ClassVar[str] = "ms"
    on_paper: ClassVar[bool] = False

    def cost(self, model: nn.Module, example: Any) -> float:
        need_values("a measured time", (*model.parameters(), *model.buffers()))
        return 1000 * measure.latency(model, example, rounds=15).median
