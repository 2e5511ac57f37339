"""What a loss asks of its inputs, and the errors that say what to do.

Types and shapes cost nothing to check. Values are looked at only on devices where that is free.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]

READABLE = {"cpu"}  # devices whose values can be looked at without waiting


def real(value: object) -> float:
    """A number as it is; for what is none NaN, which lies in no range."""
    return float(value) if isinstance(value, Real) else math.nan


def whole(value: object) -> float:
    """A whole number, numpy's too, as Python's; for what is none NaN, which lies in no range."""
    try:
        return math.nan if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return math.nan


def need_temperature(temperature: object) -> None:
    """Raises ValueError for what cannot divide logits; one that is learned is a tensor."""
    if not 0 < (temperature if isinstance(temperature, Tensor) else real(temperature)) < math.inf:
        raise ValueError(
            f"temperature divides the logits: a finite number above 0, not {temperature!r}"
        )


def need_values(what: str, tensors: Iterable[Tensor]) -> None:
    """Refuse what lies on the ``meta`` device, for a purpose that shapes are not enough for."""
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"{what} needs values, and there are none on the meta device: give the model its "
            "weights first, model.to_empty(device=...) and load_state_dict"
        )


def wide(x: Tensor) -> Tensor:
    """Half precision made float32, in which the loss is computed."""
    return x.float() if x.dtype.itemsize < 4 else x


def class_dim(logits: Tensor) -> int:
    return min(1, logits.ndim - 1)  # (B, C, ...), or (C,) for one example


def check(prediction: Tensor, target: Tensor, reduction: str) -> None:
    given: dict[str, object] = {"prediction": prediction, "target": target}
    for what, one in given.items():
        if not isinstance(one, Tensor):
            remedy = "hand over the tensor inside it, or make one with torch.as_tensor"
            raise ValueError(f"the {what} is of {type(one).__name__}, no tensor: {remedy}")
    if not prediction.is_floating_point():
        remedy = "call .float() on it, or hand over the logits in place of their argmax"
        raise ValueError(f"the prediction is {prediction.dtype}, which has no gradient: {remedy}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is "mean", "sum" or "none", not {reduction!r}')
    if prediction.numel() == 0:
        shape = tuple(prediction.shape)
        raise ValueError(f"the prediction is empty, shape {shape}: leave out batches of no example")
    if prediction.device != target.device:
        where = f"on {prediction.device}, the target on {target.device}"
        raise ValueError(f"the prediction is {where}: move one with .to(device)")


def pair(prediction: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape, in the prediction's type, at least float32."""
    check(prediction, target, reduction)
    if prediction.shape != target.shape:
        shapes = f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}"
        remedy = "reshape one, for instance prediction.squeeze(1) or target[:, None]"
        raise ValueError(f"{shapes} differ, and would broadcast or fail: {remedy}")
    prediction = wide(prediction)
    return prediction, target.to(prediction.dtype)


def classified(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, class indices (int64) or probabilities, and weights, of shapes that fit."""
    check(logits, target, reduction)
    logits, soft = wide(logits), target.is_floating_point()
    shape, given = tuple(logits.shape), tuple(target.shape)
    dim = class_dim(logits)
    classes = shape[dim] if shape else 0
    if given != (shape if soft else shape[:dim] + shape[dim + 1 :]) or not classes:
        kind = f"probabilities are {shape}" if soft else "class indices lack the classes' dimension"
        remedy = "one-hot rows become indices by target.argmax(1), a spare dimension by squeeze(1)"
        raise ValueError(f"target {given} does not fit logits {shape}: {kind}; {remedy}")
    if target.dtype == torch.bool or target.is_complex():
        raise ValueError(f"the target is {target.dtype}: class indices are integers, call .long()")
    if weight is not None and getattr(weight, "shape", None) != (classes,):
        shown = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight {shown} needs a number per class: a tensor ({classes},)")
    target = target.to(logits.dtype if soft else torch.int64)
    return logits, target, weight if weight is None else weight.to(logits.dtype)


def tame(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """On an accelerator: labels that its kernel bears, and which of them were out of range."""
    if target.is_floating_point() or logits.device.type in READABLE:
        return target, None
    safe = target.clamp(0, logits.shape[class_dim(logits)] - 1)
    wrong = (safe != target) & (target != ignore_index)
    return torch.where(wrong, safe, target), wrong


def range_message(logits: Tensor, target: Tensor, ignore_index: int = 0) -> str:
    """Names the labels out of range; 0 is in range, so by default none is left out."""
    classes = logits.shape[class_dim(logits)]
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    shown = ", ".join(map(str, sorted(set(wrong.tolist()))[:3]))
    remedy = "count classes from 0, or give the network an output for each class"
    return f"label {shown}: with {classes} logits labels run from 0 to {classes - 1}; {remedy}"


def seen(loss: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """The loss; on a CPU, an error that says where a NaN comes from."""
    if torch.compiler.is_compiling() or loss.device.type not in READABLE:
        return loss
    if type(loss) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(loss):
        return loss  # a fake tensor or one inside vmap has no value to look at
    if not (bool(loss.isnan().any()) if loss.ndim else math.isnan(loss.item())):
        return loss
    for name, x in (("prediction", prediction), ("target", target)):
        if count := int(x.isnan().sum()):
            remedy = "look for a step too large, a log of 0, or a gap in the data"
            raise FloatingPointError(
                f"the {name} holds {count} NaN of {x.numel()} numbers: {remedy}"
            )
    for name, x in (("prediction", prediction), ("target", target)):
        if x.isinf().any():
            remedy = "it overflowed, or a mask hides some or all of it"
            raise FloatingPointError(f"the loss is NaN, since the {name} holds inf: {remedy}")
    raise ValueError(
        "no target counts (ignore_index, counts, weight 0): drop this batch or sum instead; "
        "or a setting, such as a temperature, is out of all proportion"
    )
