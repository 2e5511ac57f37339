"""Schedules: by what factor the learning rate is multiplied at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from structopt.descent.written import need_positive, written


@dataclass(frozen=True)
class Schedule:
    """A schedule, a frozen value called as ``schedule(step, total) -> factor``.

    `step` counts optimiser steps from 0, `total` is how many the training takes. The factor
    multiplies each group's own learning rate. Raises ValueError for a step outside [0, total].

    >>> cosine()
    cosine(final=0.0)
    >>> [round(cosine()(step, 4), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """

    text: str
    factor: Callable[[int, int], float] = field(compare=False)

    def __call__(self, step: int, total: int) -> float:
        if not 0 <= step <= total or total < 1:
            raise ValueError(f"A step lies between 0 and total; step={step}, total={total}.")
        return self.factor(step, total)

    def __repr__(self) -> str:
        return self.text


def constant() -> Schedule:
    """Always 1.

    >>> constant()(3, 10)
    1.0
    """
    return Schedule(written("constant"), _constant)


def _constant(step: int, total: int) -> float:
    return 1.0


def step_decay(at: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1) -> Schedule:
    """Multiply by `factor` once each fraction `at` of the training is reached.

    Raises ValueError for a fraction outside (0, 1) or a factor not above zero.

    >>> [round(step_decay()(step, 4), 2) for step in range(4)]
    [1.0, 1.0, 0.1, 0.01]
    """
    need_positive(factor=factor)
    if not all(0 < fraction < 1 for fraction in at):
        raise ValueError(f"`at` holds fractions of the training, between 0 and 1; at={at}.")
    return Schedule(
        written("step_decay", at=at, factor=factor), partial(_step_decay, at=at, factor=factor)
    )


def _step_decay(step: int, total: int, *, at: tuple[float, ...], factor: float) -> float:
    # Up to rounding: 0.07 · 100 is a little above 7.
    return float(factor ** sum(step >= fraction * total - 1e-9 * total for fraction in at))


def cosine(final: float = 0.0) -> Schedule:
    """Half a cosine from 1 down to `final` (Loshchilov and Hutter, 2017, without restarts).

    final + (1 - final) (1 + cos(π step / total)) / 2. Raises ValueError for a `final` below zero.

    >>> round(cosine(final=0.1)(10, 10), 3)
    0.1
    """
    if not final >= 0:
        raise ValueError(f"final must be zero or more; final={final!r} was given.")
    return Schedule(written("cosine", final=final), partial(_cosine, final=final))


def _cosine(step: int, total: int, *, final: float) -> float:
    return _ease(1.0, final, step / total)


def _ease(start: float, end: float, done: float) -> float:
    """From start to end along half a cosine, as `done` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def one_cycle(peak: float = 0.3, start: float = 0.04, final: float = 4e-6) -> Schedule:
    """Up from `start` to 1 in the first `peak` of the training, then down to `final`.

    Both ways along half a cosine (Smith and Topin, 2019); the base learning rate is the highest.
    Raises ValueError for a `peak` outside (0, 1), or a `start` or `final` below zero.

    >>> [round(one_cycle()(step, 10), 3) for step in (0, 2, 9)]
    [0.04, 1.0, 0.0]
    """
    if not (0 < peak < 1 and start >= 0 and final >= 0):
        raise ValueError(
            "peak lies in (0, 1), start and final are zero or more; "
            f"peak={peak}, start={start}, final={final}."
        )
    text = written("one_cycle", peak=peak, start=start, final=final)
    return Schedule(text, partial(_one_cycle, peak=peak, start=start, final=final))


def _one_cycle(step: int, total: int, *, peak: float, start: float, final: float) -> float:
    top, last = peak * total - 1, total - 1
    if step < top:
        return _ease(start, 1.0, step / top)
    return _ease(1.0, final, min(1.0, (step - top) / (last - top)))


def warm_up(steps: int, then: Schedule | None = None) -> Schedule:
    """Grow linearly over the first `steps`, 1/steps, 2/steps, … 1, and go on with `then`.

    `then` (default: :func:`constant`) has the steps that remain as its total (Goyal et al., 2017).
    Raises ValueError for fewer than one step, and when called for a training that is no longer
    than the warm-up.

    >>> [warm_up(4)(step, 10) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    if steps < 1:
        raise ValueError(f"A warm-up takes at least one step; steps={steps}.")
    then = constant() if then is None else then
    return Schedule(
        written("warm_up", steps=steps, then=then), partial(_warm_up, steps=steps, then=then)
    )


def _warm_up(step: int, total: int, *, steps: int, then: Schedule) -> float:
    if total <= steps:
        raise ValueError(f"A warm-up of {steps} steps does not fit a training of {total} steps.")
    return (step + 1) / steps if step < steps else then(step - steps, total - steps)
