"""Supervised training as an objective, and the score of a trained model."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structopt import losses
from structopt.losses.checks import range_message, wide
from structopt.measure.running import device_of

Objective = Callable[[nn.Module, Any], Tensor]
"""``objective(model, batch) -> loss``: a scalar tensor with a gradient."""

Metric = Callable[[Tensor, Tensor], Tensor]
"""``metric(output, target)`` -> one number an example, (B,), or their mean, a scalar."""


def supervised(loss: Callable[[Tensor, Tensor], Tensor] = losses.cross_entropy) -> Objective:
    """The objective ``loss(model(inputs), targets)`` of a batch ``(inputs, targets)``.

    Raises ``ValueError`` for a batch that is not such a pair, or holds integer images.

    >>> batch = torch.ones(2, 3), torch.zeros(2, 1)
    >>> supervised(losses.mse)(nn.Linear(3, 1), batch).ndim
    0
    """

    def objective(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = _pair(batch)
        return loss(model(inputs), targets)

    return objective


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(
            f"a supervised batch is a pair (inputs, targets), not {describe(batch)}: "
            "write an objective of your own, objective(model, batch) -> loss"
        )
    inputs, targets = batch
    whole = isinstance(inputs, Tensor) and not inputs.is_floating_point()
    if whole and (inputs.dtype == torch.uint8 or inputs.ndim == 4):
        raise ValueError(
            f"the inputs are integer images, {describe(inputs)}: "
            "standardise them, (inputs.float() / 255 - mean) / std"
        )
    return inputs, targets


def describe(batch: Any) -> str:
    """Types and shapes in one line, for errors.

    >>> describe((torch.zeros(2, 3), [1]))
    '(float32 (2, 3), [int])'
    """
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, (dict, UserDict)):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        left, right = "()" if isinstance(batch, tuple) else "[]"
        return left + ", ".join(describe(item) for item in batch) + right
    return type(batch).__name__


def need_scalar(loss: Any) -> None:
    """Raise for what an objective must not return."""
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        without = " without one" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise ValueError(
            f"an objective returns a scalar tensor with a gradient, not {describe(loss)}{without}"
        )


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """1.0 where the largest logit is the target's, else 0.0: (B,) of (B, C, ...) and (B, ...).

    Where an example has several targets, the fraction that is right. Raises ``ValueError`` for a
    target that is no class: counted as wrong, it would pass for a weak network.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor([1., 0.])
    """
    if output.ndim < 2 or output[:, 0].shape != target.shape:
        raise ValueError(
            f"accuracy compares logits (B, C, ...) with class indices (B, ...), not "
            f"{describe(output)} with {describe(target)}"
        )
    if ((target < 0) | (target >= output.shape[1])).any():
        raise ValueError(range_message(output, target))
    right = (output.argmax(1) == target).float()  # argmax takes NaN for the largest
    right = right * ~output.isnan().any(1)
    return right.flatten(1).mean(1) if right.ndim > 1 else right


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside: running statistics stay, dropout rests. Undone afterwards.

    >>> model = nn.Sequential(nn.Dropout(0.5))
    >>> with evaluating(model):
    ...     model(torch.ones(3))
    tensor([1., 1., 1.])
    >>> model.training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:  # also of those that were switched on inside
            module.training = mode


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Any,
    metric: Metric = accuracy,
    *,
    device: torch.device | str | None = None,
) -> float:
    """The mean of ``metric(model(inputs), targets)`` over all examples of ``data``.

    ``data``: ``Examples``, or batches of pairs (inputs, targets). The model runs in evaluation
    mode, which is undone afterwards, on its own device unless another is given, and in its own
    number format (no autocast): where all its parameters have one type, inputs of another come to
    it. Raises ``ValueError`` for no data, or what is not pairs.

    >>> evaluate(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
    0.75
    """
    device = torch.device(device) if device else device_of(model, ())
    model.to(device)
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtype = kinds.pop() if len(kinds) == 1 else None
    total, count = torch.zeros((), device=device), 0
    with evaluating(model):
        pairs: Iterator[tuple[Any, Any]] = map(_pair, _batches(data))
        for inputs, targets in pairs:
            if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
                found = describe((inputs, targets))
                raise ValueError(f"evaluate takes pairs of tensors, not {found}: wrap the model")
            if not len(inputs):
                continue  # the mean of none would be NaN
            moved = inputs.to(device, dtype if inputs.is_floating_point() else None)
            # A model may write to what it is given, and the data serve again.
            output = model(moved.clone() if moved is inputs else moved)
            value = _scores(metric(output, targets.to(device)), len(inputs))
            total = total + (value.sum() if value.ndim else value * len(inputs))
            count += len(inputs)
    if not count:
        raise ValueError("there is nothing to evaluate: the data hold no example")
    return float(total) / count


def _scores(value: Any, count: int) -> Tensor:
    """What a metric returned, wide enough to be added up."""
    value = torch.as_tensor(value)
    if value.ndim and value.numel() != count:
        raise ValueError(
            f"the metric returned {describe(value)} for {count} examples: one number an example, "
            "or their mean"
        )
    return wide(value) if value.is_floating_point() else value.float()


def _batches(data: Any, size: int = 512) -> Iterator[Any] | Iterable[Any]:
    if hasattr(data, "inputs") and hasattr(data, "targets"):
        starts = range(0, len(data.inputs), size)
        return ((data.inputs[i : i + size], data.targets[i : i + size]) for i in starts)
    return data  # type: ignore[no-any-return]
