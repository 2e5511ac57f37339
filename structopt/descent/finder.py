"""A learning-rate finder: try them all once, on a model that comes back as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain as one_after_another
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from structopt.descent.optimizer import Descent
from structopt.descent.rules import Rule, momentum
from structopt.distributed import nested

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.9  # weight of the past in the running mean of the losses
STOP = 3.0  # the search ends when the mean is this many times its lowest value's size above it


@dataclass(frozen=True)
class LrCurve:
    """Losses met while the learning rate grew: prints its suggestion and draws itself.

    ``lrs`` and ``losses`` (running means) have one entry for each step taken. ``suggestion`` is the
    rate at which the mean was lowest, divided by ten: at the lowest point itself the loss has
    stopped falling, so it is already too large.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    diverged: bool

    @property
    def suggestion(self) -> float:
        """A learning rate to start from."""
        lowest = min(range(len(self.losses)), key=self.losses.__getitem__)
        return self.lrs[lowest] / 10

    def __str__(self) -> str:
        end = "diverged" if self.diverged else "still held"
        return (
            f"learning rate {self.suggestion:.1e} suggested; tried {self.lrs[0]:.1e} to "
            f"{self.lrs[-1]:.1e} in {len(self.lrs)} steps, where training {end}"
        )

    def draw(self, axes: Axes | None = None) -> Axes:
        """Loss against learning rate, the suggestion marked; draws on `axes` or new ones."""
        import matplotlib.pyplot as plt

        from structopt import plots

        axes = plt.subplots()[1] if axes is None else axes
        axes.plot(self.lrs, self.losses, color=plots.COLOURS["train"])
        axes.axvline(self.suggestion, color=plots.COLOURS["validation"], linestyle="--")
        axes.annotate(
            f"suggested: {self.suggestion:.1e}",
            (self.suggestion, 0.96),
            xycoords=("data", "axes fraction"),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            color=plots.COLOURS["validation"],
        )
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (running mean)")
        return axes


def find_lr(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Callable[[nn.Module, Any], Tensor],
    rule: Callable[[float], Rule] = momentum,
    *,
    between: tuple[float, float] = (1e-5, 10.0),
    steps: int = 100,
) -> LrCurve:
    """Train for a few steps while the learning rate grows, and note the loss (Smith, 2017).

    Step i uses lr = low · (high / low)^(i / (steps - 1)). It stops early when the running mean of
    the loss is four times its lowest value (of one below zero: lies three times its size above it),
    or is not finite. `rule` makes a rule from a rate.
    Afterwards the model is bit for bit what it was (parameters, gradients, buffers, training
    mode), and so are torch's random generators, even if the objective raises. Batches that have
    run out begin again; those with ``epoch(number)`` start at epoch 0 and keep their place.
    Raises ValueError for a range that is not 0 < low < high, fewer than two steps, or no batches,
    and FloatingPointError for a loss that is not finite at the lowest rate.

    >>> from torch.nn.functional import mse_loss
    >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]]))
    >>> model = nn.Linear(1, 1)
    >>> curve = find_lr(model, [batch], lambda net, b: mse_loss(net(b[0]), b[1]))
    >>> 0.001 < curve.suggestion < 1
    True
    """
    low, high = between
    if not (0 < low < high < math.inf and steps >= 2):
        raise ValueError(f"Needs 0 < low < high and two steps; between={between}, steps={steps}.")
    ratio = (high / low) ** (1 / (steps - 1))
    rates = [low * ratio**i for i in range(steps)]
    with _as_it_was(model):
        losses = _search(model, _endless(batches), objective, rule, rates)
    if not losses:
        raise FloatingPointError(
            f"The loss is not finite at the lowest rate, {low}: look at the model."
        )
    return LrCurve(tuple(rates[: len(losses)]), tuple(losses), len(losses) < steps)


def _search(
    model: nn.Module,
    batches: Iterator[Any],
    objective: Callable[[nn.Module, Any], Tensor],
    rule: Callable[[float], Rule],
    rates: list[float],
) -> list[float]:
    """The running means of the losses, up to where training diverges."""
    model.train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = Descent(wanted, rule(rates[0]), check_finite=False)
    device = wanted[0].device
    losses: list[float] = []
    mean = 0.0
    for number, rate in enumerate(rates, start=1):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        try:
            loss = objective(model, _to(next(batches), device))
        except FloatingPointError:  # so the losses of this package say it
            break
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss.item()
        corrected = mean / (1 - SMOOTHING**number)
        lowest = min(losses, default=corrected)  # below zero where it is a log-density's, say
        if not math.isfinite(corrected) or corrected - lowest > STOP * abs(lowest):
            break
        losses.append(corrected)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    number = 0
    epoch: Any = getattr(batches, "epoch", None)  # a loader may keep a number there
    while True:
        count = 0
        for batch in epoch(number) if callable(epoch) else batches:
            count += 1
            yield batch
        if count == 0:
            raise ValueError("No batches to train on, or an iterator that cannot begin again.")
        number += 1


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, copy=True)  # a model may write to it, and it serves again
    return nested(batch, lambda part: _to(part, device))


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo on leaving whatever training did to the model and to the random generators."""
    values = [
        (tensor, tensor.detach().clone())
        for tensor in one_after_another(model.parameters(), model.buffers())
    ]
    gradients = [(p, p.grad, p.grad is not None and p.grad.clone()) for p in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    modes = [(module, module.training) for module in model.modules()]
    for p in model.parameters():
        p.grad = None
    kinds = {tensor.device.type for tensor, _ in values} - {"cpu"}
    machines = [(getattr(torch, kind), getattr(torch, kind).get_rng_state()) for kind in kinds]
    draws = torch.get_rng_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for module, held in buffers:  # a buffer may have been replaced, not written to
                module._buffers.update(held)
            for tensor, value in values:
                tensor.copy_(value)
        for p, gradient, _ in gradients:
            p.grad = gradient
        for module, mode in modes:
            module.training = mode
        torch.set_rng_state(draws)
        for machine, drawn in machines:
            machine.set_rng_state(drawn)
