"""Temperature and weight, chosen on a validation split within a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from structopt.losses.checks import real, whole
from structopt.training import Metric, accuracy, evaluate


@dataclass(frozen=True)
class Trial:
    """One training of one candidate, and its score on the validation examples."""

    temperature: float
    weight: float
    epochs: int
    score: float


@dataclass(frozen=True)
class Tuning:
    """The best temperature and weight, and each trial that led there; prints itself.

    >>> print(Tuning(4.0, 2.0, (Trial(4.0, 2.0, 3, 0.875),)))
    temperature  weight  epochs   score
              4       2       3  0.8750  <- best
    """

    temperature: float
    weight: float
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        lines = ["temperature  weight  epochs   score"]
        won = [(t.temperature, t.weight) == (self.temperature, self.weight) for t in self.trials]
        last = max((number for number, same in enumerate(won) if same), default=-1)
        for number, t in enumerate(self.trials):
            best = number == last  # two rounds may be of one length
            row = f"{t.temperature:>11g}  {t.weight:>6g}  {t.epochs:>6}  {t.score:.4f}"
            lines.append(f"{row}  <- best" if best else row)
        return "\n".join(lines)


def tune(
    fit: Callable[[float, float, int], nn.Module],
    validation: Any,
    *,
    budget: int,
    temperatures: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
    weights: Sequence[float] = (1.0, 4.0, 16.0),
    metric: Metric = accuracy,
) -> Tuning:
    """The temperature and weight whose student scores best, within ``budget`` epochs in all.

    Successive halving (Jamieson and Talwalkar, 2016): every pair trains for a few epochs, the
    better half anew for twice as many, until one round of at most two decides. Each trial is a
    whole training of its length, so that a schedule ends in each. Candidates closer than the
    noise of the validation score (for an accuracy p of n examples about √(p(1 - p)/n)) are equal.

    Args:
        fit: ``fit(temperature, weight, epochs)`` trains a new student, and gives it back.
        validation: examples (or batches) that no training saw; never the test set.
        budget: epochs of all trials together.
        temperatures: candidates.
        weights: candidates for the teacher's weight.
        metric: larger is better; see :func:`structopt.training.evaluate`.

    Raises:
        ValueError: no candidates, a temperature not above 0, a budget too small for one epoch of
            each candidate and its rounds (the least one is named), an iterator as validation.
        FloatingPointError: every score is NaN.

    Example:
        >>> import torch
        >>> validation = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> def fit(temperature, weight, epochs):  # a student that likes it hot
        ...     return nn.Identity() if temperature > 2 else nn.Threshold(2, 0)
        >>> tune(fit, validation, budget=9, temperatures=(1.0, 4.0), weights=(1.0,)).temperature
        4.0
    """
    if isinstance(validation, Iterator):
        raise ValueError("validation can be walked only once: give examples or a list of batches")
    alive = list(itertools.product(temperatures, weights))
    sane = all(0 < real(t) < math.inf and 0 <= real(w) < math.inf for t, w in alive)
    if not alive or not sane:
        raise ValueError("tune needs temperatures above 0 and weights of at least 0, all finite")
    if math.isnan(whole(budget)):
        raise ValueError(f"budget counts the epochs of all trials, a whole number: {budget!r}")
    rounds = max(1, math.ceil(math.log2(len(alive))))
    if budget // rounds < len(alive):
        raise ValueError(
            f"{len(alive)} candidates in {rounds} rounds take at least {rounds * len(alive)} "
            f"epochs, and the budget is {budget}: give more, or fewer temperatures or weights"
        )
    trials: list[Trial] = []
    for _ in range(rounds):
        epochs = budget // rounds // len(alive)
        found = [
            Trial(t, w, epochs, evaluate(_student(fit(t, w, epochs)), validation, metric))
            for t, w in alive
        ]
        trials += found
        sound = [trial for trial in found if not math.isnan(trial.score)]
        if not sound:
            raise FloatingPointError(f"no student of {len(found)} has a score that is a number")
        ranked = sorted(sound, key=lambda trial: -trial.score)
        alive = [(trial.temperature, trial.weight) for trial in ranked[: (len(alive) + 1) // 2]]
    return Tuning(*alive[0], trials=tuple(trials))


def _student(fitted: Any) -> nn.Module:
    if not isinstance(fitted, nn.Module):
        raise ValueError(f"fit has to return the student it trained, not {type(fitted).__name__}")
    return fitted
