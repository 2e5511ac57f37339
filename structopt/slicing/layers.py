"""What each piece of a network between two cut points costs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structopt import measure
from structopt.measure.running import Example, call, tensors_of
from structopt.slicing.asking import own
from structopt.slicing.cutpoints import as_it_is, cut_points
from structopt.slicing.stages import Stages, split_stages
from structopt.training.copying import copied


@dataclass(frozen=True)
class Layer:
    """The piece of a network between two neighbouring cut points, for one micro-batch.

    Attributes:
        name: of the cut point behind it; "" for the last, which has none.
        seconds: to run it; in training, forward and backward.
        state: bytes of its parameters and buffers; in training, of the gradients too.
        saved: bytes that autograd keeps from the forward to the backward pass; 0 without training.
        sent: bytes that cross the cut behind it; in training, there and back.
    """

    name: str
    seconds: float
    state: int
    saved: int
    sent: int


@torch.inference_mode(False)
def measure_layers(
    model: nn.Module,
    example: Example,
    *,
    training: bool = False,
    rounds: int = 9,
    whole: Collection[str] = (),
) -> tuple[Layer, ...]:
    """Time and weigh what lies between all cut points, on the device where the model is.

    Timed as by :func:`structopt.measure.latency`, all pieces in turn. What autograd keeps is
    counted as it is saved, each storage once, without the weights.

    Args:
        model: as for `cut_points`, with ``whole``; it is copied.
        example: one micro-batch.
        training: time forward and backward together, in training mode.
        rounds: how many rounds are timed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> layers = measure_layers(model, torch.zeros(10, 4), rounds=3)
        >>> [(layer.name, layer.state, layer.sent) for layer in layers]
        [('0', 160, 320), ('1', 0, 320), ('', 72, 0)]
    """
    model, example = copied(model).train(training), own(example)
    points = cut_points(model, example, whole=whole)
    stages = split_stages(model, example, points, whole=whole)
    with as_it_is(stages):  # dropout draws numbers
        entered = _entered(stages, example, training)
        runs = {
            str(i): _timed(stage, entry, training)
            for i, (stage, entry) in enumerate(zip(stages, entered, strict=True))
        }
        times = measure.latency(runs, example, rounds=rounds)
        saved = [_saved(*one) if training else 0 for one in zip(stages, entered, strict=True)]
    ways = 2 if training else 1
    layers = []
    for i, stage in enumerate(stages):
        weights, buffers = (
            sum(t.nbytes for t in ts) for ts in (stage.parameters(), stage.buffers())
        )
        point = points[i] if i < len(points) else None
        layers.append(
            Layer(
                name=point.name if point else "",
                seconds=float(times[str(i)]),
                state=ways * weights + buffers,
                saved=saved[i],
                sent=ways * point.bytes if point else 0,
            )
        )
    return tuple(layers)


def _entered(stages: Stages, example: Example, training: bool) -> list[Example]:
    """What each stage is called with; in training, tensors that ask for a gradient."""
    found: list[Example] = [example]
    with torch.no_grad():
        for stage in list(stages)[:-1]:
            value = call(stage, found[-1])
            found.append(value.detach().clone().requires_grad_(training))
    return found


def _timed(stage: nn.Module, entry: Example, training: bool) -> Callable[..., Any]:
    if not training:
        return lambda *_args, **_named: call(stage, entry)
    wanted = [t for t in (*tensors_of(entry), *stage.parameters()) if t.requires_grad]

    def there_and_back(*_args: Any, **_named: Any) -> Any:
        with torch.enable_grad():
            outputs = [t for t in tensors_of(call(stage, entry)) if t.requires_grad]
            ones = [torch.ones_like(t) for t in outputs]
            return torch.autograd.grad(outputs, wanted, ones, allow_unused=True) if outputs else ()

    return there_and_back


def _saved(stage: nn.Module, entry: Example) -> int:
    """Bytes that autograd keeps, each storage once, without the stage's own weights."""
    own = {t.untyped_storage().data_ptr() for t in (*stage.parameters(), *stage.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = call(stage, entry)  # held while counting, so that no address is given out twice
    del output
    return sum(kept.values())
