"""Batches as index slices of one tensor, and augmentation on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from structopt.data.examples import Examples

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


class Batches:
    """Examples cut into batches; each new iteration is the next epoch. Made by :func:`batches`."""

    def __init__(
        self,
        examples: Examples,
        size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        augment: Sequence[Augmentation] = (),
        drop_last: bool = False,
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"size={size!r}: a batch holds at least one example")
        if not hasattr(examples, "inputs"):
            kind = type(examples).__name__
            raise ValueError(f"batches are cut from Examples(inputs, targets), not from {kind}")
        if callable(augment) or not all(map(callable, augment)):
            raise ValueError(f"augment is a list of functions, such as [Flip()], not {augment!r}")
        if drop_last and size > len(examples):
            raise ValueError(
                f"size={size} with drop_last leaves no batch of {len(examples)} examples: "
                "take smaller batches or keep the last"
            )
        self.examples, self.size, self.shuffle, self.seed = examples, int(size), shuffle, int(seed)
        self.augment, self.drop_last = tuple(augment), drop_last
        self.next_epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.examples), self.size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.next_epoch += 1
        return self.epoch(self.next_epoch - 1)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch ``number``, from batch ``start`` on. Repeats itself exactly."""
        if number < 0 or not 0 <= start <= len(self):
            raise ValueError(
                f"epoch({number}, start={start}): epochs count from 0, and start is one of 0 ... "
                f"{len(self)}, the number of batches"
            )
        return self._walk(number, start)

    def _walk(self, number: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self.examples.inputs, self.examples.targets
        device = inputs.device
        noise = torch.Generator(device) if self.augment else None
        if self.shuffle:
            # Drawn on the CPU, so that the order is the same on every device.
            chance = torch.Generator().manual_seed(_mixed(self.seed, number))
            order = torch.randperm(len(inputs), generator=chance).to(device)
        for batch in range(start, len(self)):
            part = slice(batch * self.size, (batch + 1) * self.size)
            if self.shuffle:
                chosen = order[part]
                x, y = inputs.index_select(0, chosen), targets.index_select(0, chosen)
            else:
                x, y = inputs[part].clone(), targets[part].clone()  # who writes to them writes here
            if noise is not None:
                noise.manual_seed(_mixed(self.seed, number, batch))
                for change in self.augment:
                    x = change(x, noise)
            yield x, y


def _mixed(*numbers: int) -> int:
    """One seed from several numbers (torch's CPU generator reads its low 32 bits)."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return seed


def batches(
    examples: Examples,
    size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    augment: Sequence[Augmentation] = (),
    device: torch.device | str | None = None,
    drop_last: bool = False,
) -> Batches:
    """Batches (inputs, targets) of ``size`` examples, as index slices of one tensor.

    The examples are moved to ``device`` once; None leaves them where they are. The order depends
    on ``seed`` and the number of the epoch only, and is the same on every device. Each value of
    ``augment``, such as ``Flip()``, is called as f(inputs, generator) on the device.

    >>> examples = Examples(torch.zeros(10, 1, 28, 28), torch.arange(10))
    >>> for inputs, targets in batches(examples, 5, augment=[Flip(), Shift(2)]):
    ...     print(tuple(inputs.shape), tuple(targets.shape))
    (5, 1, 28, 28) (5,)
    (5, 1, 28, 28) (5,)
    """
    if device is not None:
        examples = examples.to(device)
    return Batches(examples, size, shuffle=shuffle, seed=seed, augment=augment, drop_last=drop_last)


@dataclass(frozen=True)
class Flip:
    """Mirror each image (last axis) with probability ``p``.

    >>> Flip(p=1.0)(torch.tensor([[1.0, 2.0]]), torch.Generator())
    tensor([[2., 1.]])
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p={self.p}: a probability lies between 0 and 1")

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        if inputs.ndim < 2:
            raise ValueError(f"Flip mirrors images (B, ..., W), not shape {tuple(inputs.shape)}")
        chosen = torch.rand(len(inputs), generator=generator, device=inputs.device) < self.p
        return torch.where(chosen.view(-1, *[1] * (inputs.ndim - 1)), inputs.flip(-1), inputs)


@dataclass(frozen=True)
class Shift:
    """Move each image (B, C, H, W) by up to ``pixels`` along both axes; edges are repeated.

    >>> Shift(pixels=0)(torch.ones(1, 1, 2, 2), torch.Generator()).shape
    torch.Size([1, 1, 2, 2])
    """

    pixels: int = 2

    def __post_init__(self) -> None:
        whole = isinstance(self.pixels, (int, np.integer)) and not isinstance(self.pixels, bool)
        if not whole or self.pixels < 0:
            raise ValueError(f"pixels={self.pixels!r}: give a whole number, 0 or more")

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        if inputs.ndim != 4:
            raise ValueError(f"Shift moves images (B, C, H, W), not shape {tuple(inputs.shape)}")
        count, channels, height, width = inputs.shape
        device = inputs.device
        shape, most = (2, count, 1), self.pixels
        down, right = torch.randint(-most, most + 1, shape, generator=generator, device=device)
        rows = (torch.arange(height, device=device) + down).clamp(0, height - 1)  # (B, H)
        columns = (torch.arange(width, device=device) + right).clamp(0, width - 1)  # (B, W)
        source = (rows[:, :, None] * width + columns[:, None]).view(count, 1, -1)
        source = source.expand(-1, channels, -1)
        return inputs.flatten(2).gather(2, source).view(inputs.shape)
