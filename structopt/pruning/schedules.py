"""Schedules: how sparse the network is after so many steps. Frozen values.

Every schedule says its ``sparsity(step)``, which never falls, and whether masks are found anew
after this step, ``changes(step)``. Steps count from 1, as `after_step` hands them over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from structopt.pruning.ranking import need_sparsity


class Schedule(Protocol):
    """What every schedule can do."""

    def sparsity(self, step: int) -> float:
        """The fraction removed after this step."""

    def changes(self, step: int) -> bool:
        """Whether masks are found anew after this step."""


@dataclass(frozen=True)
class Constant:
    """The same sparsity from the first step on.

    >>> Constant(0.5).sparsity(1)
    0.5
    """

    final: float

    def __post_init__(self) -> None:
        need_sparsity(self.final, f"{self}: final")

    def sparsity(self, step: int) -> float:
        return self.final

    def changes(self, step: int) -> bool:
        return step == 1


@dataclass(frozen=True)
class OneShot:
    """Dense until step `at`, then pruned at once.

    >>> OneShot(0.5, at=10).sparsity(9), OneShot(0.5, at=10).sparsity(10)
    (0.0, 0.5)
    """

    final: float
    at: int

    def __post_init__(self) -> None:
        need_sparsity(self.final, f"{self}: final")
        _need_steps(self, self.at)

    def sparsity(self, step: int) -> float:
        return self.final if step >= self.at else 0.0

    def changes(self, step: int) -> bool:
        return step == self.at


@dataclass(frozen=True)
class Gradual:
    """Quickly at first, while many weights are superfluous, then ever more slowly.

    s(t) = s_f + (s_i - s_f) · (1 - (t - begin) / (end - begin))³, every `every` steps from `begin`
    to `end`, where it is exactly s_f (Zhu and Gupta, 2017).

    >>> schedule = Gradual(0.8, begin=100, end=300, every=50)
    >>> [round(schedule.sparsity(step), 3) for step in (99, 100, 149, 150, 200, 300, 999)]
    [0.0, 0.0, 0.0, 0.463, 0.7, 0.8, 0.8]
    """

    final: float
    begin: int
    end: int
    every: int = 100
    initial: float = 0.0

    def __post_init__(self) -> None:
        need_sparsity(self.final, f"{self}: final")
        need_sparsity(self.initial, f"{self}: initial")
        _need_steps(self, self.every)
        whole = isinstance(self.begin, int) and isinstance(self.end, int)
        if not (whole and 0 <= self.begin < self.end) or self.initial > self.final:
            raise ValueError(f"{self}: takes 0 <= begin < end, whole numbers, and initial <= final")

    def sparsity(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        last = step if step >= self.end else step - (step - self.begin) % self.every
        left = 1 - min(1.0, (last - self.begin) / (self.end - self.begin))
        return self.final + (self.initial - self.final) * left**3

    def changes(self, step: int) -> bool:
        inside = self.begin <= step <= self.end
        return inside and ((step - self.begin) % self.every == 0 or step == self.end)


@dataclass(frozen=True)
class Iterative:
    """Rounds of pruning and training: each removes the same share of what is left.

    After round k the share that stays is (1 - final)^(k / rounds) (Han et al., 2015; Frankle and
    Carbin, 2019). The first round is after step `begin`, then one every `every` steps.

    >>> schedule = Iterative(0.75, rounds=2, every=100, begin=1)
    >>> [round(schedule.sparsity(step), 3) for step in (0, 1, 100, 101, 999)]
    [0.0, 0.5, 0.5, 0.75, 0.75]
    """

    final: float
    rounds: int
    every: int
    begin: int = 1

    def __post_init__(self) -> None:
        need_sparsity(self.final, f"{self}: final")
        _need_steps(self, self.rounds, self.every, self.begin)

    def sparsity(self, step: int) -> float:
        done = 0 if step < self.begin else min(self.rounds, (step - self.begin) // self.every + 1)
        return float(1 - (1 - self.final) ** (done / self.rounds))

    def changes(self, step: int) -> bool:
        place, off = divmod(step - self.begin, self.every)
        return off == 0 and 0 <= place < self.rounds


def _need_steps(schedule: object, *counts: int) -> None:
    if not all(isinstance(count, int) and count >= 1 for count in counts):
        raise ValueError(f"{schedule}: steps and rounds are whole numbers, counted from 1")
