"""How long it takes: synchronised, warmed up, interleaved."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import overload

import torch

from structopt import devices
from structopt.measure.running import Example, Model, batch_of, call, device_of, undisturbed

_ROUND = 0.002  # seconds: long enough that reading the clock does not show


@dataclass(frozen=True)
class Timing:
    """Seconds for one call: median and quartiles over rounds, and where it was measured."""

    median: float
    lower: float
    upper: float
    rounds: int
    device: str

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, in seconds."""
        return (self.upper - self.lower) / 2

    def __float__(self) -> float:
        return self.median

    def __str__(self) -> str:
        factor, unit = (1e3, "ms") if self.median < 1 else (1.0, "s")
        shown = (factor * t for t in (self.lower, self.median, self.upper))
        low, mid, high = (f"{t:.3g}" if t < 999.5 else f"{t:.0f}" for t in shown)  # never 1e+03
        return f"{mid} {unit} ({low} to {high}, {self.rounds} rounds) on {self.device}"


@overload
def latency(
    models: Mapping[str, Model], example: Example, *, rounds: int = ..., warm_up: int = ...
) -> dict[str, Timing]: ...
@overload
def latency(
    models: Model, example: Example, *, rounds: int = ..., warm_up: int = ...
) -> Timing: ...
def latency(
    models: Model | Mapping[str, Model],
    example: Example,
    *,
    rounds: int = 30,
    warm_up: int = 3,
) -> Timing | dict[str, Timing]:
    """Seconds for one call in eval mode, without gradients.

    Several models take turns within each round, in an order that rotates, so that a machine that
    slows down slows all of them: compare ratios from one call, never numbers from two. A round
    repeats a model until it has run for 2 ms; the device has finished before each clock reading.

    Args:
        models: a model, or {name: model}; each is left as it was.
        example: a tensor, a tuple of arguments or a dict of keywords; the time is for all of it.
        rounds: how many rounds are timed.
        warm_up: calls before the first round, for caches, memory pools and compilation.

    Raises:
        ValueError: no models, fewer than one round, or an empty example.

    Example:
        >>> timing = latency(torch.nn.Linear(8, 8), torch.zeros(1, 8), rounds=3)
        >>> 0 < timing.lower <= timing.median <= timing.upper
        True
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: give at least 1")
    if isinstance(models, Mapping):
        if not models:
            raise ValueError("there are no models to time")
        return _interleaved(models, example, rounds, warm_up)
    return _interleaved({"model": models}, example, rounds, warm_up)["model"]


def _interleaved(
    models: Mapping[str, Model], example: Example, rounds: int, warm_up: int
) -> dict[str, Timing]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    repeats, names = {}, list(models)
    batch_of(example)  # raises for an empty one, which would be timed as if it were work
    with contextlib.ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(undisturbed(model, example))
            for _ in range(warm_up):
                call(model, example)
            once = min(_seconds(model, example, 1) for _ in range(2))
            repeats[name] = max(1, math.ceil(_ROUND / max(once, 1e-7)))
        stack.enter_context(_no_collection())
        for turn in range(rounds):
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                seconds[name].append(_seconds(models[name], example, repeats[name]))
    found = {}
    for name, values in seconds.items():
        at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        low, mid, high = torch.tensor(values, dtype=torch.float64).quantile(at).tolist()
        device = devices.device_name(device_of(models[name], example))
        found[name] = Timing(mid, low, high, rounds, device)
    return found


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A collection in mid-round would be charged to whoever runs."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _seconds(model: Model, example: Example, repeats: int) -> float:
    device = device_of(model, example)
    start = devices.clock(device)
    for _ in range(repeats):
        call(model, example)
    return (devices.clock(device) - start) / repeats
