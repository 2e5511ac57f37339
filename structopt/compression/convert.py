"""Faster for real: a network handed to the kernels that measure best on this device."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from structopt.compression.convert_ao import TorchAO
from structopt.compression.convert_onnx import ONNXRuntime, exported_once
from structopt.compression.convert_parts import Route
from structopt.compression.convert_routes import Float, IntMM, Sparse24
from structopt.compression.convert_trial import (
    Tried,
    attempt,
    check_finite,
    clock,
    in_turns,
    relative_error,
    timed,
    without_simulation,
)
from structopt.measure.running import call, device_of, undisturbed
from structopt.measure.table import Table

EAGER = Float()
ROUNDS = 20
BUDGET = 20.0  # seconds of timing, beyond which there are fewer rounds, at least 5
SLOW = 3  # times as long as eager fp32 in single calls: not worth the rounds


@dataclass(frozen=True, eq=False)
class Conversion:
    """What :func:`convert` chose, and why.

    ``model`` is the winner, a module for inference; ``route`` made it. ``table`` has a row for each
    route that ran, with its median ratio to eager fp32 and its relative error. ``rejected`` says of
    each other route, and of those too far from the network, why it was not taken.
    """

    model: nn.Module
    route: Route
    table: Table
    rejected: Mapping[Route, str]

    def __str__(self) -> str:
        reasons = [f"not {route}: {reason}" for route, reason in self.rejected.items()]
        return "\n".join([str(self.table), *reasons])

    __repr__ = __str__


def routes_on(device: torch.device | str) -> tuple[Route, ...]:
    """The routes that :func:`convert` tries on a device when you name none, cheap ones first.

    >>> routes_on("cpu")[0]
    Float(dtype=torch.bfloat16)
    """
    shared: tuple[Route, ...] = (Float(torch.bfloat16), IntMM())
    compiled: tuple[Route, ...] = (
        # The fastest route on some processors, and far too slow on others: so it is measured.
        IntMM(compiled=True),
        Float(compiled=True),
        Float(torch.bfloat16, compiled=True),
        TorchAO(),
        TorchAO(dynamic=True),
        TorchAO(static=True),
    )
    if torch.device(device).type != "cuda":
        engine = (ONNXRuntime(bits=32), ONNXRuntime(), ONNXRuntime(static=True))
        return (*shared, *engine, TorchAO(dynamic=True, compiled=False), *compiled)
    gpu = (TorchAO(bits=4), TorchAO(dynamic=True, floating=True), Sparse24())
    return (*shared, Float(torch.float16), *compiled, *gpu)


def convert(
    model: nn.Module,
    example: Any,
    routes: Sequence[Route] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    error: float = 0.03,
    seconds: float = 120.0,
) -> Conversion:
    """The network on the kernels that are fastest on this device, chosen by measurement.

    Each route is built from a copy, run on the example, and compared with the given network by
    ‖y - y₀‖ / ‖y₀‖ of the outputs. Those within ``error`` are timed interleaved with eager fp32,
    which always takes part; the fastest wins. No simulated quantiser runs: what
    :func:`round_inputs` or a parametrisation adds is dropped from the copy, since kernels round
    for themselves, and the error is measured against the network as it was given. Weights on
    grids of fewer bits run on 8 where there is no narrower kernel.

    The results hold for this device, this shape and the threads that torch uses now. Kernels in
    int8: Jacob et al., 2018; fp8: Micikevicius et al., 2022, "FP8 formats for deep learning".

    Args:
        model: a float32 network; it stays as it is.
        example: real inputs, on its device: a tensor, a tuple of arguments or a dict of keywords.
            Speed and error are those of this example.
        routes: which to try; by default :func:`routes_on` the device. Compiling takes up to a
            minute for each compiled one.
        calibration: batches for static steps, not those of the example: inputs or pairs
            (inputs, targets).
        error: the largest relative error, 3 % by default.
        seconds: after these a route that is still being built or first run is given up. Inside a
            kernel, and off the main thread, nothing can be broken off: it is given up afterwards.

    Raises:
        ValueError: an example, calibration or weights with NaN, an error or time that is none, a
            network that is not float32, or named routes of which none could be built.

    Example:
        >>> network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> found = convert(network, torch.ones(4, 64), [IntMM()])
        >>> found.route in (Float(), IntMM()), found.model(torch.ones(4, 64)).shape
        (True, torch.Size([4, 8]))
    """
    if not 0 <= error < math.inf or not 0 < seconds < math.inf:
        raise ValueError(f"error={error}, seconds={seconds}: give a number >= 0, and one above 0")
    if isinstance(routes, Route) or not all(isinstance(route, Route) for route in routes or ()):
        raise ValueError(f"routes is a list of routes such as [IntMM()], not {routes!r}")
    check_finite(example, "the example")
    batches = None if calibration is None else list(calibration)
    for batch in batches or ():
        check_finite(batch, "a calibration batch")
    if batches is not None and not batches:
        raise ValueError("calibration= is empty: static steps need batches")
    plain = without_simulation(model)
    with undisturbed(model, example):
        wanted = call(model, example)
    named = routes if routes is not None else routes_on(device_of(model, example))
    tried: dict[Route, Tried] = {}
    rejected: dict[Route, str] = {}
    with exported_once():
        for route in dict.fromkeys(named):
            found: Tried | str | None = route.missing(device_of(model, example))
            if found is None and route != EAGER:
                found = attempt(route, plain, example, batches, wanted, seconds)
            if isinstance(found, str):
                rejected[route] = found
            elif found is not None:
                tried[route] = found
    if routes and not tried and rejected:
        reasons = "; ".join(f"{route}: {reason}" for route, reason in rejected.items())
        raise ValueError(f"none of the routes could be taken. {reasons}")
    tried[EAGER] = _eager(plain, example, wanted)
    return _chosen(tried, rejected, example, error)


def _eager(model: nn.Module, example: Any, wanted: Any) -> Tried:
    built = EAGER.build(model, example)
    with undisturbed(built, example):
        off = relative_error(call(built, example), wanted)
        return Tried(built, off, min(timed(built, example) for _ in range(3)))


def _chosen(
    tried: dict[Route, Tried], rejected: dict[Route, str], example: Any, error: float
) -> Conversion:
    """Time those that are not plainly slow, interleaved; the fastest within the error wins."""
    slow = {r: t.seconds / tried[EAGER].seconds for r, t in tried.items()}
    running = {r: t for r, t in tried.items() if slow[r] <= SLOW}
    rounds = max(5, min(ROUNDS, int(BUDGET / sum(t.seconds for t in running.values()))))
    with contextlib.ExitStack() as as_before:
        for one in running.values():
            as_before.enter_context(undisturbed(one.model, example))
        seconds = in_turns(running, example, rounds)
    ratios = {r: 1 / slow[r] for r in tried}
    for route, each in seconds.items():
        pairs = zip(seconds[EAGER], each, strict=True)
        ratios[route] = statistics.median(before / now for before, now in pairs)
    order = sorted(tried, key=lambda route: -ratios[route])
    within = [route for route in order if tried[route].error <= error or route == EAGER]
    for route in order:
        if route not in within:
            rejected[route] = f"error {tried[route].error:.2%}, over {error:.2%}"
    rows = [
        {
            "route": str(route),
            "times as fast": ratios[route],
            "error (%)": round(100 * tried[route].error, 2),
            "kernels": tried[route].model.runs_on,
        }
        for route in order
    ]
    notes = [
        f"times as fast as eager fp32: medians of {rounds} interleaved rounds, {clock(example)[0]}"
    ]
    left = [str(route) for route in order if slow[route] > SLOW]
    notes += [f"of a single call, being slow: {', '.join(left)}"] if left else []
    table = Table(rows, notes=notes, marked=[order.index(within[0])])
    return Conversion(tried[within[0]].model, within[0], table, rejected)
