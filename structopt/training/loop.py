"""The one loop."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from structopt import devices, distributed
from structopt.training.accepting import need_kinds
from structopt.training.averaging import Average
from structopt.training.feeding import Feed, Group
from structopt.training.history import History, Validation
from structopt.training.interrupts import Interrupts
from structopt.training.objectives import Objective
from structopt.training.resume import Checkpoint
from structopt.training.run import Run

Autocast = torch.dtype | Literal["auto"] | None


def train(
    model: nn.Module,
    batches: Any,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    device: torch.device | str | None = None,
    autocast: Autocast = "auto",
    schedule: Callable[[int, int], float] | None = None,
    clip: float | None = None,
    accumulate: int = 1,
    average: float | None = None,
    after_step: Callable[[nn.Module, int], Any] | None = None,
    validate: Callable[[nn.Module], Validation] | None = None,
    checkpoint: str | Path | None = None,
    writer: Any = None,
    progress: bool | None = None,
) -> History:
    """Train ``model`` in place: minimise ``objective(model, batch)`` over ``batches``.

    ``batches``: ``data.batches(...)``, a ``DataLoader``, or a list of batches. ``objective`` is any
    callable; see :func:`supervised`. One step: gradients of ``accumulate`` batches (each counts by
    its number of examples), clipped to the norm ``clip``, times ``schedule(step, total)`` on each
    group's learning rate; then ``after_step(model, steps taken)``. After each epoch the history
    keeps ``validate(model)``, a number or a dict of numbers.

    The model is moved to ``device`` (the best one), convolutions to channels-last order where that
    is safe and no ``view`` forbids it; forward passes run under autocast in the device's fast type
    (``autocast=None``: as they are), scaled where that is float16. ``average=0.999`` keeps a
    running mean of the weights, which is what ``validate`` sees and ``history.averaged`` holds
    (:class:`Average` says how).

    ``checkpoint`` names a file that is written before the first epoch, after each, and on Ctrl-C
    (which waits for the end of a step). Where it exists the run continues from it, to the same
    bits as if it had never stopped: weights, optimiser, average, random generators, place in the
    epoch, and the ``state_dict`` of objective, ``after_step`` and ``schedule`` where they have one.
    More epochs than before may be asked for.

    In several processes (:func:`structopt.distributed.join`) each takes its slice of each batch;
    rank 0 writes the files, and losses are those of the whole batch.

    Raises ``ValueError`` for batches that are empty, an optimiser that steps by a closure (LBFGS),
    a ``clip`` not above 0, or a checkpoint of another run, and ``FloatingPointError`` naming epoch
    and step where loss or weights are NaN or infinite (losses are read every 50 steps, so as not to
    wait for the device; the last checkpoint stays good).

    >>> from structopt import losses
    >>> from structopt.training import supervised
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> batches = [(torch.eye(2), torch.ones(2, 1))]
    >>> history = train(model, batches, supervised(losses.mse), optimizer, epochs=20)
    >>> history.losses[-1] < history.losses[0]
    True
    """
    device = torch.device(device) if device else distributed.own_device()
    if autocast == "auto":
        autocast = devices.autocast_dtype(device)
    if not isinstance(autocast, (torch.dtype, type(None))):
        raise ValueError(f'autocast is a torch.dtype, "auto" or None, not {autocast!r}')
    if epochs < 0 or epochs % 1:
        raise ValueError(f"epochs counts the passes over the batches, at least 0: {epochs}")
    if clip is not None and not clip > 0:  # torch would turn every step uphill, or into none
        raise ValueError(f"clip is the largest norm of a gradient, above 0, not {clip}")
    need_kinds(model, objective, optimizer)
    feed = Feed(batches, accumulate)
    if schedule and not feed.steps:
        raise ValueError("a schedule needs to know the number of steps: give batches with a len()")
    run = Run(model, objective, optimizer, feed, epochs, device, autocast)
    run.schedule, run.clip, run.after_step, run.writer = schedule, clip, after_step, writer
    run.average = None if average is None else Average(run.model, average)
    saved = Checkpoint(checkpoint, run) if checkpoint else None
    begun = time.perf_counter() - run.history.seconds
    with Interrupts(distributed.world_size() == 1) as stop, _bar(run, progress) as run.bar:
        try:
            while run.epoch < epochs:
                run.model.train()
                for group in run.groups():
                    step(run, group)
                    if stop.asked:
                        break
                else:
                    run.end_epoch(validate)
                run.history.seconds = time.perf_counter() - begun
                if saved:
                    saved.save()
                if stop.asked:
                    raise KeyboardInterrupt
        finally:
            if schedule:
                run.set_rate(1.0)  # the optimiser keeps its own learning rates
    run.history.averaged = run.average.model if run.average else None
    return run.history


def step(run: Run, group: Group) -> None:
    """One step of the optimiser, on one batch or on several that count as one."""
    factor = 1.0
    if run.schedule:
        factor = float(run.schedule(run.steps, run.total))
        run.set_rate(factor)
    run.optimizer.zero_grad(set_to_none=True)
    losses = []
    for number, (batch, weight) in enumerate(group, 1):
        with run.keep_local(number < len(group)):
            loss = run.loss(batch)
            if weight != 1:
                loss = loss * weight
            run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    if run.clip is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.parameters, run.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.batch += len(group)
    run.record(losses[0] if len(losses) == 1 else torch.stack(losses).sum(), factor)
    if run.after_step:
        run.after_step(run.model, run.steps)
    if run.average:
        run.average.update()


def _bar(run: Run, progress: bool | None) -> Any:
    """A progress bar for people: in a terminal or a live notebook, not in a log or a test."""
    if progress is None:
        live = sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")
        progress = live and "TQDM_DISABLE" not in os.environ
    hidden = not progress or distributed.rank() > 0
    total = run.total or None
    return tqdm(total=total, initial=run.steps, unit="step", disable=hidden)
