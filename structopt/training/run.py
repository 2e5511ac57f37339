"""One training run: what a step needs, and what a checkpoint has to hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as Parallel

from structopt import devices, distributed
from structopt.training import randomness
from structopt.training.accepting import need_related
from structopt.training.averaging import Average
from structopt.training.feeding import Feed, Group, move, not_finite
from structopt.training.history import History, Validation
from structopt.training.layout import first_loss, lay_like_parameters, wants_channels_last
from structopt.training.objectives import Objective, describe, need_scalar

FETCH_STEPS, FETCH_SECONDS = 50, 0.5  # reading a loss waits for the device: do it seldom


class Objected(nn.Module):
    """Model and objective as one module, for ``DistributedDataParallel`` to wrap.

    The objective gets the model itself, may read its attributes and call it several times.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any) -> Tensor:
        return self.objective(self.model, batch)


class Run:
    """The state of a run between two steps."""

    schedule: Callable[[int, int], float] | None = None
    clip: float | None = None
    after_step: Callable[[nn.Module, int], Any] | None = None
    average: Average | None = None
    writer: Any = None
    bar: Any = None
    tried = False  # whether the model runs in channels-last order

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        feed: Feed,
        epochs: int,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self.model = model.module if isinstance(model, Parallel) else model
        self.objective, self.optimizer = objective, optimizer
        self.feed, self.epochs, self.device, self.dtype = feed, epochs, device, autocast
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        need_related(self.parameters, model, objective)
        self.channels_last = wants_channels_last(model, device)
        model.to(device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        elif device.type == "cpu" and devices.needs_plain_order(model):
            model.to(memory_format=torch.contiguous_format)
        if isinstance(objective, nn.Module):
            objective.to(device)
        lay_like_parameters(optimizer)
        self.whole = wrap(model, objective, self.parameters)
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
        self.autocast: AbstractContextManager[Any] = nullcontext()
        if autocast is not None:
            self.autocast = torch.autocast(device.type, dtype=autocast)
        self.total = epochs * feed.steps
        self.history, self.epoch, self.batch = History(), 0, 0
        self.randomness: dict[str, Any] | None = None  # at the start of an epoch under way
        self.resumed: dict[str, Any] | None = None  # the generators of a checkpoint in mid-epoch
        self.waiting: list[Tensor] = []
        self.fetched = time.monotonic()

    @property
    def steps(self) -> int:
        return len(self.history.lrs)

    def groups(self) -> Iterator[Group]:
        """The rest of this epoch, the batches of one step at a time."""
        own = self.feed.generators
        if self.feed.draws_globally:
            torch.set_rng_state(distributed.gather(torch.get_rng_state())[0])
        if self.resumed and self.randomness:
            randomness.restore(self.randomness, self.device, own)
        else:
            self.randomness = randomness.state(self.device, own)
        iterator = self.feed.epoch(self.epoch, self.batch)
        if self.resumed:
            randomness.restore(self.resumed, self.device, own)
            self.resumed = None
        while batches := list(islice(iterator, self.feed.accumulate)):
            try:
                group = self.feed.group(batches)
            except ValueError as error:
                error.add_note(self.where())
                raise
            yield group
        if not self.batch:
            raise ValueError("the batches are empty: there is nothing to train on")

    def where(self) -> str:
        return f"in epoch {self.epoch + 1}, step {self.steps + 1} (both count from 1)"

    def loss(self, batch: Any) -> Tensor:
        """The objective of one batch, under autocast; errors say where they happened."""
        try:
            moved = move(batch, self.device, self.channels_last)
            with self.autocast:
                if self.whole is not None:
                    loss: Tensor = self.whole(moved)
                elif self.channels_last and not self.tried:
                    loss = first_loss(self, batch, moved)
                else:
                    loss = self.objective(self.model, moved)
            need_scalar(loss)
        except Exception as error:
            spoiled = ", and holds NaN or infinite values" if not_finite(batch) else ""
            if "finished reduction" in str(error):  # torch speaks of what this loop has wrapped
                remedy = "distributed.wrap(model, unused_parameters=True)"
                error.add_note(f"some parameters get no gradient: hand over {remedy}")
            error.add_note(f"{self.where()}; the batch is {describe(batch)}{spoiled}")
            raise
        return loss

    def keep_local(self, active: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over the processes once a step, with the last batch."""
        if self.whole is None or not active:
            return nullcontext()
        parallel = next(m for m in self.whole.modules() if isinstance(m, Parallel))
        return parallel.no_sync()

    def set_rate(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):  # capturable optimisers read it on the device
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def record(self, loss: Tensor, factor: float) -> None:
        """Keep the step's loss, and look at the kept ones now and then."""
        self.waiting.append(loss)
        taken = self.optimizer.param_groups[0]["lr"]  # a scheduler of torch's may have set it
        waits = isinstance(taken, Tensor) and taken.device.type != "cpu"
        self.history.lrs.append(self.rates[0] * factor if waits else float(taken))
        late = time.monotonic() - self.fetched > FETCH_SECONDS and distributed.world_size() == 1
        if late or len(self.waiting) >= FETCH_STEPS:
            self.fetch()

    def fetch(self) -> None:
        """Read the waiting losses; raise for the first that is not finite."""
        if not self.waiting:
            return
        values = distributed.mean(torch.stack(self.waiting)).tolist()
        self.waiting, self.fetched = [], time.monotonic()
        for value in values:
            self.history.losses.append(value)
            step = len(self.history.losses)
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value} in epoch {self.epoch + 1}, step {step}: "
                    f"{self.remedy(step)}"
                )
            if self.writer and not distributed.rank():
                self.writer.add_scalar("loss", value, step)
                self.writer.add_scalar("lr", self.history.lrs[step - 1], step)
        if self.bar is not None:
            self.bar.update(len(values))
            self.bar.set_postfix(epoch=self.epoch + 1, loss=f"{values[-1]:.4f}", refresh=False)

    def remedy(self, step: int) -> str:
        taken = self.history.ends[-1] if self.history.ends else 0
        if self.feed.spoiled(self.epoch, (step - 1 - taken) * self.feed.accumulate):
            return "its batch holds NaN or infinite values, clean the data"
        return "lower the learning rate, or pass clip=1.0"

    def need_finite_weights(self) -> None:
        """A finite loss may still have had a gradient that is not."""
        parts = [p.detach() for p in self.parameters if p.numel()]
        weights = [p for p in parts if p.is_floating_point() or p.is_complex()]
        if not weights:
            return
        largest = torch._foreach_norm(weights, float("inf"))  # the inf-norm keeps a NaN
        if not torch.stack([norm.to(self.device) for norm in largest]).isfinite().all():
            raise FloatingPointError(
                f"weights are NaN or infinite after epoch {self.epoch + 1}, step {self.steps}, "
                "though the losses were finite: lower the learning rate, or pass clip=1.0"
            )

    def end_epoch(self, validate: Callable[[nn.Module], Validation] | None) -> None:
        self.fetch()
        self.need_finite_weights()
        self.history.ends.append(self.steps)
        if validate is not None:
            self.keep(validate(self.average.model if self.average else self.model))
        self.epoch, self.batch, self.randomness = self.epoch + 1, 0, None

    def keep(self, value: Validation) -> None:
        """Note what ``validate`` returned."""
        named = value if isinstance(value, dict) else {"validation": value}
        try:
            numbers = {name: float(number) for name, number in named.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"validate returned {describe(value)}, not a number or a dict of numbers"
            ) from error
        kept = self.history.validation
        while len(kept) < len(self.history.ends) - 1:  # a run that was validated from here on
            kept.append({} if isinstance(value, dict) else math.nan)
        kept.append(numbers if isinstance(value, dict) else numbers["validation"])
        for name, number in numbers.items():
            if self.writer and not distributed.rank():
                self.writer.add_scalar(f"validation/{name}", number, self.steps)


def wrap(model: nn.Module, objective: Objective, parameters: list[Tensor]) -> nn.Module | None:
    """One module that averages gradients over the processes; None where there is one process."""
    if distributed.world_size() == 1:
        return None
    whole: nn.Module = Objected(model, objective)
    if not isinstance(model, Parallel):
        whole = distributed.wrap(whole)
    elif isinstance(objective, nn.Module) and any(p.requires_grad for p in objective.parameters()):
        # The wrapper that was given would not average the gradients of these.
        whole = Objected(model.module, objective)
        whole = distributed.wrap(whole, unused_parameters=model.find_unused_parameters)
    covered = {id(p) for p in whole.parameters()}
    outside = [tuple(p.shape) for p in parameters if id(p) not in covered]
    if outside:
        raise ValueError(
            f"the optimiser holds parameters of neither the model nor the objective, {outside}: "
            "their gradients would not be averaged; make the objective an nn.Module that owns them"
        )
    return whole
