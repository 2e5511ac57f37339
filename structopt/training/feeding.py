"""From any re-iterable of batches to what one step needs, on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from structopt import distributed
from structopt.losses.checks import wide

PLAIN = (Number, str, bytes, type(None))  # one example each, such as the seed of a dreamt batch

Group = list[tuple[Any, float]]
"""The batches of one optimiser step, each with the weight of its loss."""


class Feed:
    """Batches in groups of ``accumulate``, each process its slice, an epoch at a time.

    A loss is weighted by its batch's share of the step's examples, so that a step over several
    batches (or slices on several processes) is the step over all their examples at once.
    """

    def __init__(self, batches: Any, accumulate: int) -> None:
        if not isinstance(accumulate, (int, np.integer)) or accumulate < 1:
            raise ValueError(f"accumulate counts the batches of a step, at least 1: {accumulate}")
        if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
            kind = type(batches).__name__
            raise ValueError(f"batches is a list, Batches or DataLoader to walk over, not {kind}")
        if isinstance(batches, Iterator):
            raise ValueError("batches can be walked only once: give a list, Batches or DataLoader")
        self.sliced = distributed.world_size() > 1 and not distributed.is_dealt_out(batches)
        if isinstance(batches, distributed.Shard):
            batches = batches.batches
        self.batches, self.accumulate = batches, int(accumulate)
        # A loader of the user's own may keep a number under that name.
        self.by_number = callable(getattr(batches, "epoch", None))

    @property
    def length(self) -> int | None:
        """Batches in an epoch, if they know their number."""
        try:
            return len(self.batches)
        except TypeError:  # a DataLoader has a length, though that of its stream it cannot ask
            return None

    @property
    def steps(self) -> int:
        """Steps in an epoch; 0 where the batches do not know their number."""
        return math.ceil((self.length or 0) / self.accumulate)

    @property
    def generators(self) -> list[torch.Generator]:
        """Generators that a ``DataLoader`` or its sampler draws from, besides the global ones."""
        holders = (self.batches, *distributed.samplers(self.batches))
        found = [getattr(holder, "generator", None) for holder in holders]
        return [generator for generator in found if isinstance(generator, torch.Generator)]

    @property
    def draws_globally(self) -> bool:
        """Whether processes that share these batches must share torch's generator too."""
        return self.sliced and not self.by_number

    def spoiled(self, epoch: int, batch: int) -> bool:
        """Whether that batch can be looked at again, and holds NaN or infinite values."""
        again = self.batches.epoch(epoch, batch) if self.by_number else ()
        return any(not_finite(found) for found in islice(again, 1))

    def epoch(self, number: int, start: int) -> Iterator[Any]:
        """The batches of epoch ``number`` from batch ``start`` on."""
        if self.by_number:
            return iter(self.batches.epoch(number, start))
        for sampler in distributed.samplers(self.batches):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(number)
        iterator: Iterator[Any] = iter(self.batches)
        next(islice(iterator, start, start), None)  # skip: the order was drawn at the start
        return iterator

    def group(self, batches: list[Any]) -> Group:
        sizes = [distributed.rows(batch) for batch in batches]
        if not all(sizes):
            raise ValueError("this batch holds no example: leave out empty batches")
        if len(batches) == 1 and not self.sliced:
            return [(batches[0], 1.0)]
        need_counted(batches)
        total, world = sum(sizes), 1
        pieces = list(zip(batches, sizes, strict=True))
        if self.sliced:
            pieces, world = [distributed.cut(batch) for batch in batches], distributed.world_size()
        # DistributedDataParallel divides by the number of processes: undo it.
        return [(piece, own * world / total) for piece, own in pieces]


def need_counted(batches: list[Any]) -> None:
    """Raises ValueError for what may hold examples that nobody can count, as arrays of numpy."""
    for batch in batches:
        plain = all(isinstance(leaf, PLAIN) for leaf in tree_leaves(batch))
        if not plain and not any(True for _ in distributed.tensors(batch)):
            raise ValueError(
                "to weigh its loss among others a batch is counted by its first tensor, and this "
                f"{type(batch).__name__} shows none: give tensors, in tuples, lists or dicts"
            )


def not_finite(batch: Any) -> bool:
    """Whether a tensor holds NaN or infinite values; of sparse and nested ones torch cannot say."""
    found = [t for t in distributed.tensors(batch) if t.is_floating_point()]
    plain = [t for t in found if t.layout == torch.strided and not t.is_nested]
    return not all(bool(wide(t).isfinite().all()) for t in plain)


def move(batch: Any, device: torch.device, channels_last: bool) -> Any:
    """Every tensor of ``batch`` on ``device``; images in channels-last order if wanted."""
    if isinstance(batch, Tensor):
        wait = device.type != "cuda"
        if channels_last and batch.ndim == 4:
            order = torch.channels_last
            return batch.to(device, non_blocking=not wait, memory_format=order)
        return batch.to(device, non_blocking=not wait)
    return distributed.nested(batch, lambda item: move(item, device, channels_last))
