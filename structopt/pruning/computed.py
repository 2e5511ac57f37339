"""Weights that are computed from other parameters: weight norm, spectral norm and their like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from structopt.training import evaluating

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Computed:
    """A weight of ``layer`` that is no parameter, and the parameters that it is made of.

    ``original`` is the one of its own shape, which `channels` prunes in its place.
    """

    name: str
    layer: nn.Module
    parts: tuple[str, ...]
    original: str
    hook: WeightNorm | SpectralNorm | None = None

    @torch.no_grad()
    def value(self) -> Tensor:
        """The weight in evaluation mode, which moves no statistics."""
        with evaluating(self.layer):
            if isinstance(self.hook, SpectralNorm):
                found: Tensor = self.hook.compute_weight(self.layer, do_power_iteration=False)
            elif self.hook is not None:
                found = self.hook.compute_weight(self.layer)
            else:
                found = getattr(self.layer, self.name.rpartition(".")[2])
        return found.detach().clone()


def computed_weights(model: nn.Module, norms: bool = False) -> list[Computed]:
    """Those that `score` would score, were they parameters; with `norms` the scales of norms.

    >>> model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    >>> [(weight.name, len(weight.parts)) for weight in computed_weights(model)]
    [('0.weight', 2)]
    """
    found = [one for path, layer in model.named_modules() for one in _of(path, layer)]
    every = dict(model.named_parameters(remove_duplicate=False))
    return [w for w in found if is_scored(w.name, w.layer, every[w.original], norms)]


def is_scored(name: str, owner: nn.Module, weight: Tensor, norms: bool) -> bool:
    """Whether a parameter of this name is a weight, or with `norms` the scale of a norm."""
    if norms:
        return isinstance(owner, NORMS) and name.endswith("weight")
    other = isinstance(owner, (nn.Embedding, nn.EmbeddingBag, *NORMS))
    return "weight" in name.rpartition(".")[2] and weight.ndim > 1 and not other


def _of(path: str, layer: nn.Module) -> Iterator[Computed]:
    start = f"{path}." if path else ""
    if parametrize.is_parametrized(layer):
        assert isinstance(layer.parametrizations, nn.ModuleDict)
        for key, chain in layer.parametrizations.items():
            inside = f"{start}parametrizations.{key}."
            own = {name: p for name, p in chain._parameters.items() if p is not None}
            if own:  # it may compute a buffer
                original = max(own, key=lambda name: (own[name].numel(), name))
                parts = tuple(inside + name for name, _ in chain.named_parameters())
                yield Computed(start + key, layer, parts, inside + original)
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            kinds = ("_g", "_v") if isinstance(hook, WeightNorm) else ("_orig",)
            parts = tuple(f"{start}{hook.name}{kind}" for kind in kinds)
            yield Computed(start + hook.name, layer, parts, parts[-1], hook)
