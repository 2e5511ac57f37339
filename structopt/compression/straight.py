"""Layers in a row as one, once nothing is left between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from structopt.channels.exchanging import exchange_
from structopt.compression.folding import folded, joined
from structopt.compression.merging import merge_pair
from structopt.compression.sameness import computes_the_same
from structopt.training.copying import copied
from structopt.training.hooked import hooked


@dataclass(frozen=True)
class Link:
    """Activations in a row, and the layers around them, which merge to one without them.

    ``macs``: of the layers, and of the one that they become. ``moved``: the first layer has to do
    the padding of the others, which changes what is computed at the border of images.
    """

    activations: tuple[str, ...]
    layers: tuple[str, ...]
    macs: tuple[int, int]
    moved: bool

    @property
    def pays(self) -> bool:
        """Whether the one layer takes no more multiplications than the several."""
        return self.macs[1] <= self.macs[0]

    def __str__(self) -> str:
        border = ", the border changes" if self.moved else ""
        part = self.macs[1] / max(1, self.macs[0])
        layers = f"{', '.join(self.layers[:-1])} and {self.layers[-1]}"
        gone = ", ".join(self.activations)
        return f"without {gone}: {layers} as one, {part:.2f} of their MACs{border}"


def merge_links(model: nn.Module, example: Any, links: Iterable[Link]) -> nn.Module:
    """A copy in which each link is one layer: batch norms folded, the activation an identity.

    Exact: computed in double precision, checked there against the model without the activations
    (random inputs like the example), then brought to the type of the model. Paddings have to be
    moved already (:func:`structopt.compression.shallower` does). An ``Identity`` is left of each
    layer but the first.

    Raises ValueError naming the layers where two do not merge, and for links that share a layer.

    >>> from structopt.compression import removable
    >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> merge_links(model, torch.zeros(1, 8), removable(model, torch.zeros(1, 8)))
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
      (1): Identity()
      (2): Identity()
    )
    """
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(types) != 1:
        raise ValueError(f"weights of one floating type can be merged, not {types or 'none'}")
    links = list(links)
    layers = [layer for link in links for layer in link.layers]
    if len(set(layers)) < len(layers):
        raise ValueError(f"links share a layer: {layers}; removable(longest=) finds longer ones")
    wide = without(copied(model).double(), [name for link in links for name in link.activations])
    example = in_type(example, torch.double)
    made = folded(wide, example)
    for link in links:
        made = merged_in_order(made, link.layers)
    if not computes_the_same(wide, made, example):
        raise ValueError("what a first layer makes is read elsewhere too: leave that link out")
    return made.to(types.pop())


def without(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy with nothing in the place of these activations."""
    made = copied(model)
    for name in names:
        if hooked(made.get_submodule(name)):
            raise ValueError(f"{name} has hooks, which would see nothing of it: remove them first")
        exchange_(made, name, nn.Identity())
    return made


def move_padding_(model: nn.Module, link: Link) -> None:
    """Let the first layer of a link do all the padding, in place: p₁ += s₁ · p₂, from the end."""
    layers = [model.get_submodule(name) for name in link.layers]
    for first, second in reversed(list(pairwise(layers))):
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d):
            own, other = pads_of(first), pads_of(second)
            p, q = (a + b * s for a, b, s in zip(own, other, first.stride, strict=True))
            first.padding, second.padding = (p, q), (0, 0)


def merged_in_order(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """The last two first: what is merged again keeps its name."""
    for one, two in reversed(list(pairwise(layers))):
        try:
            model = joined(model, [one], two, merge_pair)
        except ValueError as error:
            raise ValueError(f"{one} and {two} do not merge: {error}") from error
    return model


def pads_of(layer: nn.Module) -> tuple[int, ...]:
    """The zeros that a convolution adds at each side; nothing for layers that add none."""
    if not isinstance(layer, nn.Conv2d):
        return ()
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError(f"{layer} does not pad with zeros by numbers")
    return tuple(layer.padding)


def in_type(tree: Any, dtype: torch.dtype) -> Any:
    """The tree with its floating-point tensors in this type."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, tree)
