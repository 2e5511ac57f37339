"""A data set as two tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
import torch.utils.data
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """Inputs (N, ...) and targets (N, ...) on one device, and the names of the classes.

    Inputs are floating numbers, or int64 token ids of shape (N,) or (N, T). Targets are int64
    labels or floating numbers. A ValueError says what is wrong: no examples, unequal lengths,
    integer images, other label types, labels outside ``classes``, values that are not finite.

    >>> examples = Examples(torch.zeros(6, 1, 28, 28), torch.arange(6))
    >>> len(examples), examples[:2].targets, examples[-1].targets
    (6, tensor([0, 1]), tensor([5]))
    """

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        inputs, targets = self.inputs, self.targets
        given: Any
        for name, given in (("inputs", inputs), ("targets", targets)):
            if not isinstance(given, Tensor):
                kind = type(given).__name__
                raise ValueError(f"{name} are {kind}, not a tensor: give torch.as_tensor({name})")
        if not inputs.ndim or not targets.ndim or len(inputs) != len(targets) or not len(inputs):
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)} and targets of shape "
                f"{tuple(targets.shape)}: give one target for each input, and at least one"
            )
        if inputs.device != targets.device:
            raise ValueError(f"inputs on {inputs.device}, targets on {targets.device}: move one")
        tokens = inputs.dtype == torch.int64 and inputs.ndim <= 2
        if not inputs.is_floating_point() and not tokens:
            raise ValueError(
                f"inputs of type {inputs.dtype} and shape {tuple(inputs.shape)}: images are "
                "floating numbers (images.float() / 255), token ids int64 of shape (N, T)"
            )
        if not targets.is_floating_point() and targets.dtype != torch.int64:
            raise ValueError(f"targets of type {targets.dtype}: labels are int64 (targets.long())")
        for name, values in (("inputs", inputs), ("targets", targets)):
            _check_finite(name, values)
        self._check_labels()

    def _check_labels(self) -> None:
        if self.classes and not self.targets.is_floating_point():
            named = (self.targets >= 0) & (self.targets < len(self.classes))
            wrong = self.targets[~named & (self.targets != -100)]  # -100: losses ignore it
            if len(wrong):
                raise ValueError(
                    f"label {int(wrong[0])} where {len(self.classes)} classes are named: "
                    f"labels run from 0 to {len(self.classes) - 1}"
                )

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Examples:
        """Some of the examples; a single whole number gives one example, still with its N."""
        if isinstance(index, Tensor) and not index.ndim:
            index = index.item()  # type: ignore[assignment]
        if isinstance(index, Integral):
            index = range(len(self))[int(index)]  # negative numbers, and IndexError beyond the end
            index = slice(index, index + 1)
        return replace(self, inputs=self.inputs[index], targets=self.targets[index])

    def __repr__(self) -> str:
        kind = f", {len(self.classes)} classes" if self.classes else ""
        return f"Examples({len(self)} of {tuple(self.inputs.shape[1:])}{kind})"

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on ``device``."""
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def split(self, validation: int | float, *, seed: int = 0) -> tuple[Examples, Examples]:
        """Train and validation examples, drawn at random without replacement.

        ``validation`` is a number of examples, or a fraction between 0 and 1.

        >>> Examples(torch.zeros(10, 3), torch.arange(10)).split(0.2)
        (Examples(8 of (3,)), Examples(2 of (3,)))
        """
        whole = isinstance(validation, Integral)
        count = int(validation) if whole else round(float(validation) * len(self))
        if not 0 < count < len(self):
            raise ValueError(
                f"split({validation!r}) of {len(self)} examples: each part needs at least one; "
                "give a number of examples or a fraction between 0 and 1"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(int(seed)))
        order = order.to(self.inputs.device)
        return self[order[count:]], self[order[:count]]


def _check_finite(name: str, values: Tensor) -> None:
    if not values.is_floating_point() or not values.numel():
        return
    # The extremes show a NaN or an infinity in one pass that writes nothing.
    if not torch.isfinite(torch.stack(values.aminmax())).all():
        finite = torch.isfinite(values.flatten(1) if values.ndim > 1 else values[:, None])
        first = int((~finite.all(1)).nonzero()[0])
        raise ValueError(f"{name}[{first}] holds NaN or infinity: remove or replace such values")


def from_dataset(dataset: torch.utils.data.Dataset[Any]) -> Examples:
    """All items of a torch Dataset, each an (input tensor, target), stacked.

    Raises a ValueError that names the first item of another kind or shape.

    >>> from torch.utils.data import TensorDataset
    >>> from_dataset(TensorDataset(torch.zeros(3, 5), torch.arange(3)))
    Examples(3 of (5,))
    """
    # Of an iterable one `__getitem__` is there, and only raises.
    listed = not isinstance(dataset, torch.utils.data.IterableDataset)
    sized = listed and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    items = (dataset[i] for i in range(len(dataset))) if sized else iter(dataset)  # type: ignore
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for number, item in enumerate(items):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ValueError(f"item {number} is {type(item).__name__}: give (input, target) pairs")
        if not isinstance(item[0], Tensor):
            raise ValueError(
                f"the input of item {number} is {type(item[0]).__name__}, not a tensor: give the "
                "data set a transform, such as torchvision.transforms.ToTensor()"
            )
        pair = item[0], _target(item[1], number)
        for part, kept in zip(pair, (inputs, targets), strict=True):
            if kept and part.shape != kept[0].shape:
                raise ValueError(
                    f"item {number} has shape {tuple(part.shape)}, item 0 {tuple(kept[0].shape)}: "
                    "bring all to one shape (crop, resize or pad)"
                )
            kept.append(part)
    if not inputs:
        raise ValueError("the data set is empty: give at least one item")
    named = getattr(dataset, "classes", ())  # their number, or None, in some data sets
    classes = tuple(str(name) for name in named) if isinstance(named, Iterable) else ()
    return Examples(torch.stack(inputs), torch.stack(targets), classes)


def _target(given: Any, number: int) -> Tensor:
    """As a tensor; whole numbers of any type as int64."""
    try:
        target = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(given).__name__
        raise ValueError(f"the target of item {number} is {kind}: give a number") from error
    whole = not target.is_floating_point() and not target.is_complex()
    return target.long() if whole and target.dtype != torch.bool else target
