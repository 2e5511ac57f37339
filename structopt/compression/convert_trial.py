"""One route tried: bounded in time, judged against the network that was given."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from structopt.channels.nests import first_line
from structopt.compression.convert_parts import Route
from structopt.compression.finished import need_finished
from structopt.compression.inputs import RoundInput
from structopt.measure.running import call, device_of, tensors_of, undisturbed
from structopt.training.copying import copied, need_numbers

ROUND = 0.005  # seconds


@dataclass(frozen=True)
class Tried:
    """A route that was built and run: the module, its error, and seconds of one call."""

    model: nn.Module
    error: float
    seconds: float


class OutOfTimeError(BaseException):
    """Not an Exception, which a compiler on the way might take for its own and go on."""


def attempt(
    route: Route,
    model: nn.Module,
    example: Any,
    calibration: Sequence[Any] | None,
    wanted: Any,
    seconds: float,
) -> Tried | str:
    """Build and run the route within these seconds, or say why not; ``wanted`` is the output."""
    started = time.perf_counter()
    try:
        with _deadline(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other libraries speak of their own insides
            built = route.build(model, example, calibration)
            with undisturbed(built, example):
                made = call(built, example)
                once = min(timed(built, example) for _ in range(2))
    except OutOfTimeError:
        return f"not ready after {seconds:g} s"
    except Exception as error:  # each library has errors of its own; the row says which
        said = first_line(error)
        said = said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"
        return said.removeprefix(f"{route}: ")
    if time.perf_counter() - started > seconds:  # inside a kernel nothing can be broken off
        return f"not ready after {seconds:g} s"
    return Tried(built, relative_error(made, wanted), once)


def timed(model: nn.Module, example: Any, calls: int = 1) -> float:
    """Seconds of one call, on the :func:`clock` of its device."""
    now = clock(example)[1]
    start = now()
    for _ in range(calls):
        call(model, example)
    return (now() - start) / calls


def clock(example: Any) -> tuple[str, Callable[[], float]]:
    """Seconds, and what they are.

    One thread on a CPU is timed by the time that it had the processor, so that other work on the
    machine counts less; else the wall clock counts, read after a GPU has finished.
    """
    device = device_of(call, example)
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "processor time of one thread", time.process_time

    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return f"wall clock, {torch.get_num_threads()} threads", finished


def in_turns(tried: Mapping[Route, Tried], example: Any, rounds: int) -> dict[Route, list[float]]:
    """Seconds of one call in each round. A round repeats a call until it has run for 5 ms."""
    order = list(tried)
    calls = {route: max(1, math.ceil(ROUND / max(t.seconds, 1e-7))) for route, t in tried.items()}
    seconds: dict[Route, list[float]] = {route: [] for route in order}
    for turn in range(rounds):
        for place in range(len(order)):  # the first of a round is another each time
            route = order[(turn + place) % len(order)]
            model = tried[route].model
            seconds[route].append(timed(model, example, calls[route]))
    return seconds


def relative_error(found: Any, expected: Any) -> float:
    """|found - expected| / |expected| over all floating outputs together, in double precision.

    >>> relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0]))
    0.08...
    """
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    pairs = [(a.double(), b.double()) for a, b in pairs if b.is_floating_point()]
    if not pairs:
        raise ValueError("the network makes no floating-point output, by which an error is judged")
    off = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    whole = torch.stack([b.square().sum() for _, b in pairs]).sum()
    error = float((off / whole).sqrt()) if whole else float(off.sqrt())
    return error if error == error else float("inf")


def without_simulation(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose weights are plain and whose inputs are not rounded.

    Simulated quantisers are slower than the network; kernels round by themselves. Raises
    ValueError for a network that still learns its steps, and for weights that are not float32.
    """
    need_finished(model)
    need_numbers(model)
    for name, tensor in model.named_parameters():
        if tensor.dtype is not torch.float32:
            raise ValueError(f"{name!r} is {tensor.dtype}: give the float32 network")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or infinite weights: no kernel mends them")
    made = copied(model).eval()
    for module in made.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, RoundInput):
                del module._forward_pre_hooks[key]
        if parametrize.is_parametrized(module):
            _bake_(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
    return made.requires_grad_(False)


def _bake_(module: nn.Module) -> None:
    """Plain parameters for parametrised ones.

    torch's own removal takes the property from the class, which a copy shares with its original.
    """
    assert isinstance(module.parametrizations, nn.ModuleDict)
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def check_finite(example: Any, what: str) -> None:
    """Raise ValueError for an example without tensors, or with numbers that are none."""
    tensors = tensors_of(example)
    if not tensors:
        raise ValueError(f"{what} holds no tensor")
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(Tensor.isfinite(tensor).all()):
            raise ValueError(f"{what} of shape {tuple(tensor.shape)} holds NaN or infinities")


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the block after that time; again each 5 s, should it be swallowed.

    By a signal of Unix in the main thread; elsewhere there is none, and the block runs to its end.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
