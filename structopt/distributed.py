"""The same script on several processes: a thin door to ``torch.distributed``.

Start ``torchrun --nproc_per_node 2 script.py``, and put the work inside ``with join():``. Each
process holds the whole network and takes its slice of each batch; the gradients are averaged
(``DistributedDataParallel``), so the weights are those of one process with the whole batch.
:func:`structopt.training.train` does all of this by itself inside ``join()``.

Batch normalisation sees only its process's slice: it normalises by the slice's statistics, and
the running statistics kept are those of rank 0. Where slices are small, convert the network before
the optimiser is made, ``nn.SyncBatchNorm.convert_sync_batchnorm(model)`` (CUDA only).
"""

from __future__ import annotations

import copy
import os
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from structopt import devices

__all__ = ["Shard", "cut", "gather", "join", "mean", "rank", "rows", "shard", "world_size", "wrap"]


DICTS = (dict, UserDict)  # the second is what tokenisers hand over


def world_size() -> int:
    """How many processes train together: 1 outside :func:`join`.

    >>> world_size()
    1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0; rank 0 writes the files and shows the progress.

    >>> rank()
    0
    """
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def join() -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` announces, and leave them at the end.

    Gives the device of this process: each GPU of the machine serves one process (over nccl), CPUs
    talk over gloo. Started without ``torchrun`` it does nothing. Raises ``RuntimeError`` where a
    machine has more processes than GPUs.

    >>> with join() as device:
    ...     world_size()
    1
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield devices.best_device()
        return
    device = devices.best_device()
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise RuntimeError(f"process {local} has no GPU: start --nproc_per_node {count}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def own_device() -> torch.device:
    """The best device of this process; the CPU where its processes talk over gloo."""
    together = dist.is_available() and dist.is_initialized()
    gloo = together and dist.get_backend() == "gloo"
    return torch.device("cpu") if gloo else devices.best_device()


def wrap(model: nn.Module, *, unused_parameters: bool = False) -> nn.Module:
    """``model`` in ``DistributedDataParallel``, or itself where there is one process.

    Every parameter must get a gradient at each step; say ``unused_parameters=True`` where some may
    not (a skipped layer, a narrow slice), which costs a walk over the graph.

    >>> wrap(layer := nn.Linear(1, 1)) is layer
    True
    """
    if world_size() == 1 or isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused_parameters)


def rows(batch: Any) -> int:
    """How many examples a batch holds: the first dimension of its first tensor, 1 if it has none.

    >>> rows({"tokens": torch.zeros(4, 7), "name": "x"})
    4
    """
    for tensor in tensors(batch):
        return tensor.shape[0] if tensor.ndim else 1
    return 1


def tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (list, tuple, *DICTS)):
        for item in batch.values() if isinstance(batch, DICTS) else batch:
            yield from tensors(item)


def cut(batch: Any) -> tuple[Any, int]:
    """This process's slice of ``batch``, and how many examples of it are its own.

    Slices differ by at most one example. A process for which none is left gets the last example
    to keep it in step, and 0 as the number: its loss counts nothing.

    >>> cut(torch.arange(3))
    (tensor([0, 1, 2]), 3)
    """
    total, world = rows(batch), world_size()
    start, stop = (total * r // world for r in (rank(), rank() + 1))
    own = stop - start
    if not own:
        start, stop = total - 1, total
    return _slice(batch, start, stop, total), own


def _slice(batch: Any, start: int, stop: int, total: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.ndim and batch.shape[0] == total else batch
    return nested(batch, lambda item: _slice(item, start, stop, total))


def nested(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The same container with each item changed; what is no container stays.

    >>> nested({"x": [1]}, len)
    {'x': 1}
    """
    if isinstance(batch, DICTS):
        made = copy.copy(batch)  # a defaultdict cannot be made from its items
        for key, value in batch.items():
            made[key] = change(value)
        return made
    if isinstance(batch, (list, tuple)):
        items = [change(item) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


class Shard:
    """Batches of which each process sees its slice; made by :func:`shard`."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return (cut(batch)[0] for batch in self.batches)


def shard(batches: Iterable[Any]) -> Iterable[Any]:
    """Batches of which each process gets its slice; as they are where there is one process.

    All processes must draw the same batches in the same order: same seed. A ``DataLoader`` with a
    ``DistributedSampler`` is dealt out already and stays as it is.

    >>> batches = [torch.arange(4)]
    >>> shard(batches) is batches
    True
    """
    if world_size() == 1 or isinstance(batches, Shard) or is_dealt_out(batches):
        return batches
    return Shard(batches)


def is_dealt_out(batches: Any) -> bool:
    dealt = torch.utils.data.DistributedSampler
    return any(isinstance(sampler, dealt) for sampler in samplers(batches))


def samplers(batches: Any) -> list[Any]:
    """What a ``DataLoader`` draws its order from; a batch sampler of the user's own holds another.

    >>> samplers([torch.arange(3)])
    []
    """
    outer = getattr(batches, "batch_sampler", None)
    found = (getattr(batches, "sampler", None), outer, getattr(outer, "sampler", None))
    return list({id(s): s for s in found if s is not None}.values())


def mean(values: Tensor) -> Tensor:
    """The mean of each entry over all processes, the same on each.

    >>> mean(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size()


def gather(value: Any) -> list[Any]:
    """What each process holds, a list in the order of ranks, on each process.

    >>> gather("mine")
    ['mine']
    """
    found: list[Any] = [value]
    if world_size() > 1:
        found = [None] * world_size()
        dist.all_gather_object(found, value)
    return found
