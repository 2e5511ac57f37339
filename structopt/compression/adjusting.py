"""Before and after rounding: ranges made alike, and means put right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from structopt.channels import ChannelGroup, Member, channel_groups, take
from structopt.compression.codes import naming
from structopt.compression.evidence import by_channel, readers, say_idle, watch
from structopt.compression.quantize import as_finite
from structopt.compression.sameness import computes_the_same, in_double
from structopt.training.copying import copied, need_changeable, need_numbers

Vector = npt.NDArray[np.float64]


def equalize(model: nn.Module, example: Any, *, rounds: int = 4) -> nn.Module:
    """A copy that computes the same, in which the weights of each channel reach equally far.

    Each channel of a group is multiplied by sqrt(r / w), where w is the largest weight that makes
    it and r the largest that reads it, and its readers are divided: afterwards both are sqrt(w r),
    so that one step a tensor serves all channels. Groups are taken in turn, some rounds long.
    Only groups whose function stays exactly the same are touched (between linear layers,
    convolutions and positively homogeneous activations such as ReLU); a depthwise convolution is
    made alike with what comes before it, too. Fold batch norms first: they undo what comes before.

    Nagel et al., 2019, "Data-free quantization through weight equalization and bias correction".
    Raises ValueError as :func:`structopt.channels.channel_groups`, and for NaN or infinite weights.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0, 0], [100.0, 0, 0]]))
    >>> made = equalize(model, torch.zeros(1, 3))
    >>> torch.allclose(made[0].weight.abs().amax(1), made[2].weight.abs().amax(0))
    True
    """
    need_numbers(model)
    model, refused = copied(model), set[str]()
    for _ in range(rounds):
        for name in [group.name for group in channel_groups(model, example)]:
            group = channel_groups(model, example)[name]
            factors = _factors(model, group, [m for m in group.members if not _depthwise(model, m)])
            if name not in refused and factors is not None:
                try:
                    model = take(model, {group: range(group.size)}, scale={group: factors.tolist()})
                except ValueError:
                    refused.add(name)
            for place, member in enumerate(group.members):
                if _depthwise(model, member):
                    model = _before(model, group, place, example)
    return model


def _depthwise(model: nn.Module, member: Member) -> bool:
    """Whether it is the weight of a convolution that keeps its channels apart."""
    path, _, key = member.parameter.rpartition(".")
    layer = model.get_submodule(path)
    return (
        isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and key == "weight"
        and layer.groups == layer.in_channels == layer.out_channels > 1
    )


def _factors(
    model: nn.Module, group: ChannelGroup, members: Sequence[Member], reader: Member | None = None
) -> Vector | None:
    """What to multiply each channel by; 1 where a side is zero; None where a side is missing."""
    reach = {True: np.zeros(group.size), False: np.zeros(group.size)}
    for member in members:
        path, _, key = member.parameter.rpartition(".")
        weight = getattr(model.get_submodule(path), key)  # of a norm, a buffer too
        if weight.ndim > 1:
            with naming(member.parameter):
                largest = as_finite(weight).abs().movedim(member.dim, 0).flatten(1).amax(1)
            known = member.channel >= 0
            values = largest.double().cpu().numpy()[known]
            np.maximum.at(reach[member.reads or member is reader], member.channel[known], values)
    made, read = reach[False], reach[True]
    if not (made.any() and read.any()):
        return None
    both = (made > 0) & (read > 0)
    factors: Vector = np.sqrt(np.where(both, read, 1) / np.where(both, made, 1))
    return factors


def _before(model: nn.Module, group: ChannelGroup, place: int, example: Any) -> nn.Module:
    """What makes the input of a depthwise convolution against its weights, where that is exact."""
    reader = group.members[place]
    makers = [member for member in group.members[:place] if not member.reads]
    factors = _factors(model, group, [*makers, reader], reader)
    made = [group.channels.axes[member.parameter, member.dim] for member in makers]
    if factors is None or (made and group.channels.bends(np.concatenate(made))):
        return model

    def scaled(model: nn.Module) -> nn.Module:
        made = copied(model)
        for member in [*makers, reader]:
            weight = made.get_parameter(member.parameter)
            own = np.where(member.channel >= 0, factors[member.channel], 1)
            shape = [-1 if dim == member.dim else 1 for dim in range(weight.ndim)]
            by = torch.from_numpy(own).to(weight).view(shape)
            weight.data = weight / by if member is reader else weight * by
        return made

    with torch.no_grad():
        wide = in_double(model)
        return scaled(model) if computes_the_same(wide, scaled(wide), example) else model


@torch.no_grad()
def correct_biases_(model: nn.Module, reference: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Shift the biases of a rounded model, in place, until each output has its mean again.

    Layer by layer, in the order in which they run, bias += mean of the reference's output - mean of
    this model's, for each channel over all batches. Layers without a bias stay as they are.

    Nagel et al., 2019. Raises ValueError for no batches, where the layers of the two differ, and
    where an output is NaN or infinite; the model stays as it was.

    >>> reference, rounded = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> x = torch.randn(9, 2)
    >>> made = correct_biases_(rounded, reference, [x])
    >>> torch.allclose(made(x).mean(), reference(x).mean(), atol=1e-6)
    True
    """
    batches, layers, others = list(batches), readers(model), readers(reference)
    if list(layers) != list(others):
        raise ValueError(f"the model has the layers {list(layers)}, the reference {list(others)}")
    expected = _means(reference, batches, others)
    before = _means(model, batches, layers)  # complains before it writes
    if alone := sorted(expected.keys() ^ before.keys()):
        raise ValueError(f"{alone[0]} runs in one of the two alone: give it batches in both")
    for name, found in before.items():
        if isinstance(bias := layers[name].bias, Tensor):
            need_changeable(f"the bias of {name or 'the model'}", bias)
        if found.shape != expected[name].shape:
            raise ValueError(
                f"{name or 'the model'} makes {len(found)} channels, {len(expected[name])} in the "
                "reference: both have to be the same network"
            )
    for name in expected:  # in the order in which they ran
        layer = layers[name]
        if isinstance(layer.bias, Tensor):
            now = _means(model, batches, {name: layer})
            if name not in now:  # routes may change with the layers before
                say_idle([name], "no longer runs on these batches: its bias stays")
                continue
            layer.bias += (expected[name] - now[name]).to(layer.bias)
    return model


def _means(
    model: nn.Module, batches: Iterable[Any], layers: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """The mean of each output channel of each layer, in the order in which they ran."""
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def see(name: str, given: Tensor, made: Tensor) -> None:
        rows = by_channel(layers[name], made.double())
        total[name] = total.get(name, torch.zeros(())).to(rows) + rows.sum(1)
        count[name] = count.get(name, 0) + rows.shape[1]

    watch(model, batches, layers, see)
    for name, sums in total.items():
        if not bool(sums.isfinite().all()):
            raise ValueError(
                f"what {name or 'the model'} makes of these batches is NaN or infinite"
            )
    return {name: total[name] / count[name] for name in total}
