"""Small trained layers that bring a student's features to the shape of its teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Regressor(nn.Module):
    """``(student, teacher) -> (mapped student, teacher)``, of one shape.

    Maps (B, C, H, W): a 1×1 convolution, the larger map averaged down to the smaller one.
    Vectors (B, D) and tokens (B, T, D): a linear map of the last dimension.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.map = layer

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if student.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
            size = smaller(student.shape[2:], teacher.shape[2:])
            # First, since averaging and a 1×1 convolution may change places, and less is mapped.
            student, teacher = (F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
        return self.map(student), teacher


class Embeddings(nn.Module):
    """``(student, teacher) -> (B, D) and (B, D)``: each pooled, then through a linear map."""

    def __init__(self, student: int, teacher: int, size: int) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(student, size), nn.Linear(teacher, size)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        # A teacher may speak in another type; under autocast the maps choose their own.
        teacher = pooled(teacher).to(self.teacher.weight.dtype)
        return self.student(pooled(student)), self.teacher(teacher)


def pooled(features: Tensor) -> Tensor:
    """(B, D): the mean over the positions of maps (B, D, H, W), or over tokens (B, T, D)."""
    if features.ndim not in (2, 3, 4):
        raise ValueError(
            f"features {tuple(features.shape)} cannot be pooled: name a layer that gives maps "
            "(B, D, H, W), tokens (B, T, D) or vectors (B, D)"
        )
    over = {2: (), 3: (1,), 4: (2, 3)}[features.ndim]
    return features.mean(over) if over else features


def smaller(ours: Sequence[int], theirs: Sequence[int]) -> tuple[int, int]:
    """The smaller height and the smaller width of two maps.

    >>> smaller((14, 14), (7, 28))
    (7, 14)
    """
    return min(ours[0], theirs[0]), min(ours[1], theirs[1])


def regressor(student: Sequence[int], teacher: Sequence[int], what: str) -> Regressor:
    """A :class:`Regressor` from features of one shape to another; both begin with the batch.

    Raises ``ValueError`` for shapes that it cannot map.

    >>> regressor((2, 16, 7, 7), (2, 64, 7, 7), "conv3 to conv3").map
    Conv2d(16, 64, kernel_size=(1, 1), stride=(1, 1))
    """
    alike = len(student) == len(teacher)
    if alike and len(student) == 4:
        return Regressor(nn.Conv2d(student[1], teacher[1], 1))
    if alike and len(student) in (2, 3) and tuple(student[1:-1]) == tuple(teacher[1:-1]):
        return Regressor(nn.Linear(student[-1], teacher[-1]))
    raise ValueError(
        f"no adapter maps {what}, {tuple(student)} to {tuple(teacher)}: pair maps (B, C, H, W) "
        "with maps, vectors (B, D) with vectors, tokens (B, T, D) with as many tokens"
    )
