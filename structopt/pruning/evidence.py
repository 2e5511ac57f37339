"""What criteria need to know: gradients, curvature, and the inputs of each layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from structopt.losses.checks import wide
from structopt.training import Objective, evaluating
from structopt.training.objectives import need_scalar
from structopt.training.observing import first_of, observed
from structopt.training.statistics import placed

Named = dict[str, Tensor]
Fetch = Callable[[nn.Module, Named, Iterable[Any], Objective], Named]

READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def rows_of(batch: Any) -> int:
    """How many examples a batch holds: the length of its first tensor."""
    sizes = [len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if not sizes or not sizes[0]:
        raise ValueError("a batch holds no example: leave out empty batches")
    return sizes[0]


def _singles(batch: Any) -> Iterator[Any]:
    """Its examples, each a batch of one."""
    size = rows_of(batch)

    def one(leaf: Any, i: int) -> Any:
        whole = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size
        return leaf[i : i + 1] if whole else leaf

    for i in range(size):
        yield tree_map(lambda leaf, i=i: one(leaf, i), batch)


@contextlib.contextmanager
def _differentiable(parameters: Named) -> Iterator[None]:
    before = {name: p.requires_grad for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the one with second derivatives
            yield
    finally:
        for name, p in parameters.items():
            p.requires_grad_(before[name])


def _derivatives(
    model: nn.Module,
    parameters: Named,
    pieces: Iterable[Any],
    objective: Objective,
    of: Callable[[Tensor, list[Tensor]], list[Tensor]],
) -> Named:
    """The mean over examples of `of(loss, parameters)`, each piece counted by its examples."""
    wanted = list(parameters.values())
    total = [torch.zeros_like(wide(p.detach())) for p in wanted]  # in bfloat16 256 + 1 = 256
    count = 0
    with evaluating(model), _differentiable(parameters):
        for piece in pieces:
            batch = placed(piece, model)
            size, loss = rows_of(batch), objective(model, batch)
            need_scalar(loss)
            found = [one.to(t.dtype) for one, t in zip(of(loss, wanted), total, strict=True)]
            torch._foreach_add_(total, found, alpha=size)
            count += size
    if not count:
        raise ValueError("the batches are empty: there is nothing to score with")
    return {name: t / count for name, t in zip(parameters, total, strict=True)}


def _slopes(loss: Tensor, wanted: list[Tensor], *, graph: bool = False) -> list[Tensor]:
    return list(
        torch.autograd.grad(
            loss, wanted, create_graph=graph, allow_unused=True, materialize_grads=True
        )
    )


def _gradient(model: nn.Module, parameters: Named, batches: Any, objective: Objective) -> Named:
    return _derivatives(model, parameters, batches, objective, _slopes)


def _squared(model: nn.Module, parameters: Named, batches: Any, objective: Objective) -> Named:
    singles = (one for batch in batches for one in _singles(batch))

    def squares(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
        slopes = _slopes(loss, wanted)
        return [wide(g).square() for g in slopes]

    return _derivatives(model, parameters, singles, objective, squares)


def _curvature(model: nn.Module, parameters: Named, batches: Any, objective: Objective) -> Named:
    chance = torch.Generator(next(iter(parameters.values())).device).manual_seed(0)

    def draw(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
        slopes = _slopes(loss, wanted, graph=True)
        signs = [_signs(p, chance) for p in wanted]
        along = torch.stack([(g * z).sum() for g, z in zip(slopes, signs, strict=True)]).sum()
        products = _slopes(along, wanted) if along.requires_grad else [0 * p for p in wanted]
        return [(z * h).detach() for z, h in zip(signs, products, strict=True)]

    return _derivatives(model, parameters, batches, objective, draw)


def _signs(like: Tensor, chance: torch.Generator) -> Tensor:
    """1 and -1, the same at each call of `score`, whatever else draws random numbers."""
    zeros_and_ones = torch.randint(2, like.shape, generator=chance, device=like.device)
    return (2 * zeros_and_ones - 1).to(like.dtype)


def _inputs(reduce: Callable[[Tensor], Tensor], finish: Callable[[Tensor, int], Tensor]) -> Fetch:
    """A statistic of each feature that a layer reads, over examples and positions."""

    def fetch(model: nn.Module, parameters: Named, batches: Any, objective: Objective) -> Named:
        sums: Named = {}
        counts: dict[str, int] = {}

        def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = first_of(args, named).detach()
            name = names[module.weight]  # type: ignore[index]
            if not isinstance(module, nn.Linear):
                x = x.movedim(-parameters[name].ndim + 1, -1)
            x = wide(x.reshape(-1, x.shape[-1]))  # (tokens, features)
            sums[name] = sums.get(name, 0) + reduce(x)
            counts[name] = counts.get(name, 0) + len(x)

        names = {parameter: name for name, parameter in parameters.items()}
        readers = [m for m in model.modules() if isinstance(m, READERS + TRANSPOSED)]
        layers = {names[m.weight]: m for m in readers if m.weight in names}  # tied ones share
        handles = [
            m.register_forward_pre_hook(note, with_kwargs=True)
            for m in readers
            if m.weight in names
        ]
        with observed(model, handles):
            calls = [objective(model, placed(batch, model)) for batch in batches]
        if not calls:
            raise ValueError("the batches are empty: there is nothing to score with")
        return {
            name: _beside(finish(sums[name], counts[name]), module, parameters[name])
            for name, module in layers.items()
            if name in sums
        }

    return fetch


def _beside(features: Tensor, layer: nn.Module, weight: Tensor) -> Tensor:
    """A number for each input feature, in a shape that broadcasts against the weight."""
    groups = int(getattr(layer, "groups", 1))
    ones = [1] * (weight.ndim - 2)
    if isinstance(layer, TRANSPOSED):
        return features.view(-1, 1, *ones)
    if groups == 1:
        return features.view(1, -1, *ones)
    rows = features.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return rows.view(len(weight), -1, *ones)


def _zeros(x: Tensor) -> Tensor:
    return (x == 0).sum(0).to(x.dtype)


KINDS: Mapping[str, Fetch] = {
    "gradient": _gradient,
    "squared_gradient": _squared,
    "curvature": _curvature,
    "input_mean": _inputs(lambda x: x.abs().sum(0), lambda total, n: total / n),
    "input_zeros": _inputs(_zeros, lambda total, n: total / n),
    "input_norm": _inputs(lambda x: x.square().sum(0), lambda total, n: total.sqrt()),
}
