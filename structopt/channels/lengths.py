"""Weights that a model keeps as a direction and a length, or divides by their largest stretch.

Weight norm (Salimans & Kingma, 2016): the length of a row is divided by the norm of its direction.
When a row loses entries, its length has to shrink by as much, or those that stay would grow.
Spectral norm (Miyato et al., 2018): the weight W is divided by u'Wv, its largest singular value as
buffers u and v remember it. They are set so that this number stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from structopt.channels.walking import modules_of

Pick = Callable[[str, Tensor], Tensor]


def pairs(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """The names of length and direction, and the dimension whose entries have a length each."""
    for path, module in modules_of(model).items():
        dim = getattr(module, "dim", None)
        if type(module).__name__ == "_WeightNorm" and isinstance(dim, int):
            before = path.rpartition(".")[0]
            yield f"{before}.original0", f"{before}.original1", dim
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):  # the older form
                before = f"{path}." if path else ""
                yield f"{before}{hook.name}_g", f"{before}{hook.name}_v", hook.dim


def kept(model: nn.Module) -> bool:
    """Whether any weight is kept so."""
    modules = list(modules_of(model).values())
    if not any(m._forward_pre_hooks or "parametrizations" in m._modules for m in modules):
        return False
    return any(True for _ in pairs(model)) or any(True for m in modules for _ in _stretched(m))


def adjust(old: nn.Module, new: nn.Module, pick: Pick) -> None:
    """Give the lengths of an edited model what its directions lost or gained.

    `pick` takes from a tensor of the old model, by its name, what the new one has of it.
    """
    if not kept(old):
        return
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    for length, direction, dim in pairs(old):
        norms = torch.norm_except_dim(before[direction].detach(), 2, dim)
        ratio = torch.norm_except_dim(after[direction].detach(), 2, dim) / pick(length, norms)
        after[length].data.copy_(pick(length, before[length].detach()) * ratio)
    for was, now in zip(*(modules_of(m).values() for m in (old, new)), strict=True):
        for (weight, u, v), (made, u_, v_) in zip(_stretched(was), _stretched(now), strict=True):
            _keep_stretch(float(u @ weight @ v) if not u.is_meta else 0.0, made, u_, v_)


def _stretched(module: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The weight as a matrix and its two vectors, of each weight with a spectral norm."""
    if parametrize.is_parametrized(module):
        for held in module.parametrizations.values():  # type: ignore[operator]
            for norm in held:
                if type(norm).__name__ == "_SpectralNorm" and held.original.ndim > 1:
                    matrix = norm._reshape_weight_to_matrix(held.original.detach())
                    yield matrix, norm._u, norm._v
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):  # the older form
            u, v = (getattr(module, f"{hook.name}_{side}") for side in "uv")
            original = getattr(module, f"{hook.name}_orig").detach()
            yield hook.reshape_weight_to_matrix(original), u, v


def _keep_stretch(wanted: float, matrix: Tensor, u: Tensor, v: Tensor) -> None:
    if matrix.is_meta or abs(float(u @ matrix @ v) - wanted) <= 1e-6 * abs(wanted):
        return
    left, stretch, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    u.copy_(left[:, 0] * (wanted / stretch[0]))
    v.copy_(right[0])
