"""Stages over processes: a thin door to ``torch.distributed.pipelining``."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from structopt import distributed
from structopt.measure.running import tensors_of
from structopt.slicing.asking import check_seconds
from structopt.slicing.planning import check_run
from structopt.slicing.stages import Stages
from structopt.slicing.widths import running


def pipeline(
    stages: Stages,
    device: torch.device,
    *,
    microbatches: int,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    schedule: type[PipelineScheduleSingle] = ScheduleGPipe,
    timeout: float = 30,
) -> PipelineScheduleSingle:
    """This process's stage, ready to run; inside :func:`structopt.distributed.join`.

    The engine is torch's, and so is what comes back. Process r holds stage r, moved to ``device``,
    and drops the others. All call it once for each batch, of a size that never changes:

    - the first process gives the inputs, ``step(inputs)``, or several; the last, the targets,
      ``step(target=targets)``; those between, ``step()``;
    - ``eval`` in the place of ``step`` runs forward alone. The last process gets the outputs, and
      gives targets there too where there is a loss.

    ``step`` adds the gradients of the loss's mean over micro-batches to what ``.grad`` holds: those
    of the unsplit network for the whole batch, where the loss is a mean over examples and no layer
    (a batch norm in training) looks at the batch as a whole. Then each process's own optimiser
    steps.

    Where a process dies, or waits longer than ``timeout`` for another, each of its neighbours gets
    torch's error, a ``RuntimeError``, and the others at the latest after ``timeout``; none waits
    for ever. To end a process may take longer, since torch waits for messages under way.

    Args:
        stages: from `split_stages`; as many as there are processes.
        device: of this process, as ``join`` gives it.
        microbatches: into how many parts, of equal size, each batch is cut.
        loss: (outputs, targets) -> a mean over examples. None for ``eval`` alone.
        schedule: torch's ``ScheduleGPipe`` or ``Schedule1F1B``.
        timeout: seconds that a process waits for a message at most.

    Raises:
        ValueError: another number of stages than of processes; a weight that two stages share,
            whose gradient would be split between two processes, or running statistics; fewer
            micro-batches than 1F1B needs.
        RuntimeError: by torch, in a step: a batch of another size, or of unequal parts, too.
    """
    world, rank = distributed.world_size(), distributed.rank()
    if len(stages) != world or world < 2:
        raise ValueError(
            f"there are {len(stages)} stages and {world} processes: start one process for each, "
            f"torchrun --nproc_per_node {len(stages)}, inside structopt.distributed.join()"
        )
    check_run(microbatches, schedule)
    check_seconds(timeout)
    _check_shared(stages)
    group = dist.new_group(timeout=timedelta(seconds=timeout))
    assert isinstance(group, dist.ProcessGroup)  # this process is in it
    own = _Sending(stages[rank].to(device), entered=rank == 0)
    stage = PipelineStage(own, rank, world, device, group=group)
    scaled = None if loss is None else _equal_parts(loss, microbatches)
    # torch would divide all that is in ``.grad``, the gradients of earlier steps with it
    return schedule(stage, microbatches, scaled, scale_grads=False)


_EQUAL = "the size of each batch must be the same, and divide into micro-batches of equal size"


class _Sending(nn.Module):
    """A stage whose outputs and gradients can be sent: they lie in one piece.

    The first is held to one size; the others would read what is left of a larger message.
    """

    def __init__(self, stage: nn.Module, entered: bool) -> None:
        super().__init__()
        self.stage, self.entered = stage, entered
        self.shapes: list[tuple[int, ...]] | None = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        shapes = [tuple(tensor.shape) for tensor in tensors_of((inputs, named))]
        if self.entered and self.shapes not in (None, shapes):
            raise ValueError(
                f"a micro-batch of shape {_told(shapes)} after {_told(self.shapes)}: {_EQUAL}"
            )
        self.shapes = shapes
        made = self.stage(*map(_in_one_piece, inputs), **named)
        return made.contiguous() if isinstance(made, Tensor) else made


def _in_one_piece(value: Any) -> Any:
    """The same, with a gradient in one piece."""
    if isinstance(value, Tensor) and value.requires_grad:
        value = value.view_as(value)
        value.register_hook(torch.Tensor.contiguous)
    return value


def _told(shapes: list[tuple[int, ...]] | None) -> str:
    return ", ".join(map(str, shapes or ()))


def _equal_parts(
    loss: Callable[[Tensor, Tensor], Tensor], microbatches: int
) -> Callable[[Tensor, Tensor], Tensor]:
    def checked(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) != len(targets):
            raise ValueError(
                f"a micro-batch has {len(targets)} targets and {len(outputs)} outputs: {_EQUAL}"
            )
        found = loss(outputs, targets)
        if found.requires_grad:  # the number itself stays: the caller sees it in ``losses``
            found.register_hook(lambda gradient: gradient / microbatches)  # type: ignore[no-untyped-call]
        return found

    return checked


def _check_shared(stages: Stages) -> None:
    holder: dict[Tensor, tuple[int, str]] = {}
    for number, stage in enumerate(stages):
        for name, held in [*stage.named_parameters(), *running(stage).items()]:
            other, its = holder.setdefault(held, (number, name))
            if other != number:
                kind, what = (
                    ("a weight", "its gradient") if held.requires_grad else ("a tensor", "it")
                )
                raise ValueError(
                    f"stages {other} and {number} share {kind} ({its}, {name}): {what} would be in "
                    "two processes; cut so that both uses lie in one stage"
                )
