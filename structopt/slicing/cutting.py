"""A narrow network whose weights are views of the wide one's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from structopt.channels import ChannelGroup, Channels, take
from structopt.channels.layout import lay_plainly_
from structopt.measure.running import call
from structopt.slicing.asking import own
from structopt.slicing.slices import Slice, widths_of
from structopt.training import evaluating
from structopt.training.copying import copied
from structopt.training.hooked import in_place_of
from structopt.training.observing import observed

Named = dict[str, Tensor]


@dataclass
class Cut:
    """What a tensor of the narrow network takes of the wide one's: entries, times a constant."""

    keep: dict[int, Tensor] = field(default_factory=dict)  # along a dimension
    factor: Tensor | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        for dim, index in self.keep.items():
            if int(index[-1]) == len(index) - 1:
                tensor = tensor.narrow(dim, 0, len(index))  # a prefix needs no copy
            else:
                tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor if self.factor is None else tensor * self.factor.to(tensor)


class Narrow:
    """A slice of a model: the network's structure without weights, and where those come from."""

    def __init__(self, structure: nn.Module, cuts: Mapping[str, Cut]) -> None:
        self.structure, self.cuts = hollow(structure), cuts

    def tensors(self, model: nn.Module) -> Named:
        """The parameters and buffers of the narrow network, as views of the model's."""
        whole = named(model, every=True)
        return {name: self.cuts[name](whole[name]) for name in named(self.structure)}

    def run(self, model: nn.Module, private: Named, args: Any, kwargs: Any) -> Any:
        for mine, whole in zip(self.structure.modules(), self._matching(model), strict=True):
            mine.training = whole.training
        tensors = {**self.tensors(model), **private}
        return functional_call(self.structure, tensors, args, kwargs)

    def ordinary(self, model: nn.Module, private: Named) -> nn.Module:
        """A network of its own with the weights of the slice."""
        tensors = {**self.tensors(model), **private}
        made = filled(self.structure, lambda name, _: tensors[name].detach().clone())
        for mine, whole in zip(made.modules(), self._matching(model), strict=True):
            mine.training = whole.training
        weights = named(model, every=True)
        for name, parameter in made.named_parameters():  # it may have been frozen since
            parameter.requires_grad_(weights[name].requires_grad)
        return lay_plainly_(made)

    def _matching(self, model: nn.Module) -> Iterator[nn.Module]:
        """For each module of the structure that of the model."""
        return (model.get_submodule(name) for name, _ in self.structure.named_modules())


def named(model: nn.Module, *, every: bool = False) -> Named:
    """Parameters and buffers; under `every` name that a shared one has, or only the first."""
    parameters = model.named_parameters(remove_duplicate=not every)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=not every))}


def filled(model: nn.Module, value: Any) -> nn.Module:
    """A copy with each parameter and buffer the result of `value(name, tensor)`."""
    memo: dict[int, Any] = {}
    for name, tensor in named(model).items():
        made = value(name, tensor.detach())
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = made
    return copy.deepcopy(model, memo)


def hollow(model: nn.Module) -> nn.Module:
    return filled(model, lambda _, tensor: tensor.to("meta"))


def narrow(channels: Channels, model: nn.Module, part: Slice) -> Narrow:
    """Cut a slice, and hold it against what `channels.take` makes.

    Raises ValueError where `take` refuses, or a weight is no slice of the wide one.
    """
    _need_leaves(model)
    choice = {group: range(size) for group, size in widths_of(channels, part).items()}
    made = take(model, choice) if choice else copied(model)
    cuts = _cuts(channels, model, choice)
    wrong = _differing(model, made, cuts)
    if wrong:
        _learn_factors(model, choice, cuts, wrong)
        wrong = _differing(model, made, cuts)
    if wrong:
        raise ValueError(
            f"{wrong[0]} of {part} is no slice of the full one, but computed from all of it "
            "(weight norm?): torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if part.skip:
        _skip(model, made, part, channels.example)
    return Narrow(made, cuts)


def _need_leaves(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise ValueError(
                    f"a hook computes {name} of {path or 'the model'}: make it permanent first, "
                    "with torch.nn.utils.prune.remove or remove_weight_norm"
                )


def _cuts(
    channels: Channels, model: nn.Module, choice: Mapping[ChannelGroup, range]
) -> dict[str, Cut]:
    """An entry stays where each group that it belongs to keeps its channel."""
    stays: dict[tuple[str, int], Any] = {}
    for group, index in choice.items():
        for member in group.members:
            key = member.parameter, member.dim
            stays[key] = stays.get(key, True) & (member.channel < len(index))
    cuts = {name: Cut() for name in named(model)}
    for (name, dim), kept in stays.items():
        cuts[name].keep[dim] = torch.from_numpy(np.flatnonzero(kept))
    of = {id(tensor): cuts[name] for name, tensor in named(model).items()}
    return {name: of[id(tensor)] for name, tensor in named(model, every=True).items()}


def _differing(model: nn.Module, made: nn.Module, cuts: Mapping[str, Cut]) -> list[str]:
    """The tensors of the network made that are not what their cuts give."""
    whole, found = named(model), []
    for name, tensor in named(made).items():
        mine = cuts[name](whole[name])
        same = mine.shape == tensor.shape
        if not same or not (mine.is_meta or torch.allclose(mine, tensor, rtol=1e-6, atol=0)):
            found.append(name)
    return found


def _learn_factors(
    model: nn.Module,
    choice: Mapping[ChannelGroup, range],
    cuts: Mapping[str, Cut],
    names: list[str],
) -> None:
    """Queries may be multiplied by a constant, where Python divides scores by the root of a width.

    It is read off a model of other weights, none of them zero: it must not depend on them.
    """
    generator = torch.Generator().manual_seed(0)

    def other(_: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        wide = tensor.double()
        return torch.where(wide == 0, 1.0, wide) * noise.to(wide)

    full = filled(model, other)
    made, whole = named(take(full, choice)), named(full)
    for name in names:
        mine = cuts[name](whole[name])
        if mine.shape == made[name].shape:
            cuts[name].factor = (made[name] / mine).detach()


_MASKED = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer


class _Skipped(nn.Identity):
    """Hands on its first argument, in the place of blocks that are called with masks beside it."""

    def forward(self, input: Tensor, *_args: Any, **_named: Any) -> Tensor:
        return input


def _skip(model: nn.Module, made: nn.Module, part: Slice, example: Any) -> None:
    """Replace the modules to skip, and see that the shapes still fit."""
    ran, handles = set[str](), []
    for name in part.skip:  # a place: a block that a model runs in several can be left out of one
        try:
            given = made.get_submodule(name)
            nothing = _Skipped() if isinstance(given, _MASKED) else nn.Identity()
            nothing = in_place_of(given, nothing, name)
            handles.append(nothing.register_forward_hook(lambda *_, name=name: ran.add(name)))
            made.set_submodule(name, nothing, strict=True)
        except (AttributeError, ValueError) as problem:
            raise ValueError(f"{part}: the model has no module {name!r} to skip") from problem
    with evaluating(model), observed(made, handles):
        expected = call(model, own(example))
        try:
            found = call(made, own(example))
        except Exception as problem:
            raise ValueError(
                f"{part}: the model does not run without these modules ({problem}); skip residual "
                "blocks, whose output has the shape of their input"
            ) from problem
    shapes = [getattr(out, "shape", None) for out in (expected, found)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{part}: without these modules the output has shape {shapes[1]}, not {shapes[0]}"
        )
    if unseen := [name for name in part.skip if name not in ran]:
        raise ValueError(
            f"{part}: the model does not run {unseen[0]!r} by this name, so nothing is skipped"
        )
