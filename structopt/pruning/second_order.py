"""One-shot pruning of second order: what one weight did, the weights after it take over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structopt.losses.checks import need_values, real, wide
from structopt.measure.running import call
from structopt.pruning.evidence import READERS, TRANSPOSED
from structopt.pruning.finding import Masks, settled
from structopt.pruning.patterns import NOfM, Pattern, Unstructured
from structopt.pruning.ranking import PerLayer, keys, lowest, lowest_in_rows, number
from structopt.pruning.scoring import matches, need_leave, need_list
from structopt.training.copying import copied, need_plain
from structopt.training.observing import columns, first_of, observed
from structopt.training.statistics import inputs_of, placed

COLUMNS = 128  # of an unstructured weight are ranked at once


@torch.no_grad()
def sparse_gpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | None = None,
    *,
    pattern: Pattern = Unstructured(),  # noqa: B008 (a frozen value)
    damp: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """A sparse weight that does to its inputs nearly what the dense one did, and its mask.

    ``hessian`` is the sum of x xᵀ over what the rows multiply: (n, n) for a weight (outputs, …) of
    n weights a row, in the order of ``weight.flatten(1)``. Columns go from left to right. Of the
    next columns (128; m for ``NOfM(n, m)``) the weights of the lowest (w / U[j, j])² go, where
    Uᵀ U is the inverse of the Hessian, damped by a share of its mean diagonal; for each that goes,
    the columns after it move by -w / U[j, j] · U[j, j+1:]. That is the update of the optimal brain
    surgeon (Hassibi and Stork, 1993) with the columns before it held: SparseGPT, Frantar and
    Alistarh, 2023. A row whose outputs would come out further off than with the same mask alone
    keeps its old weights under that mask, so that no update does harm on these inputs.

    Raises ValueError for shapes that do not fit, NaN or infinite values, a Hessian that stays
    singular, and patterns other than ``Unstructured()`` and ``NOfM(n, m)``.

    >>> x, weight = torch.randn(99, 6), torch.randn(4, 6)
    >>> made, mask = sparse_gpt(weight, x.T @ x, 0.5)
    >>> int(mask.sum()), int(made.count_nonzero())
    (12, 12)
    """
    _need_tensors(weight, hessian)
    sparsity = _share("the weight", weight, sparsity, pattern)
    rows = weight.flatten(1)
    if hessian.shape != (rows.shape[1],) * 2:
        raise ValueError(
            f"a hessian of shape {tuple(hessian.shape)} does not fit a weight of shape "
            f"{tuple(weight.shape)}: it is the sum of x xᵀ over what its rows multiply"
        )
    order = torch.arange(rows.shape[1], device=weight.device).view(weight.shape[1:])
    order = order.movedim(0, -1).flatten()  # neighbours are input channels, as patterns read them
    dense = wide(rows[:, order])
    if not dense.isfinite().all():
        raise ValueError(
            "the weight holds NaN or infinite values: there is nothing to rank them by"
        )
    curved = hessian.to(dense)[order][:, order]
    width = pattern.m if isinstance(pattern, NOfM) else COLUMNS
    made, stays = _sweep(dense.clone(), _upper(curved, damp), sparsity, width, pattern)
    masked = dense * stays
    made = torch.where(_error(made - dense, curved) <= _error(masked - dense, curved), made, masked)
    back = order.argsort()
    return (
        made[:, back].view(weight.shape).to(weight.dtype),
        stays[:, back].view(weight.shape),
    )


def _need_tensors(weight: object, hessian: object) -> None:
    for what, given in (("weight", weight), ("hessian", hessian)):
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
            raise ValueError(f"the {what} is of {kind}: give a tensor of floating-point numbers")
        assert isinstance(given, Tensor)
        need_values(f"the {what}", [given])


def _sweep(
    left: Tensor, upper: Tensor, sparsity: float, width: int, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """The rows, changed in place from left to right, and which of their weights stay."""
    stays = torch.ones_like(left, dtype=torch.bool)
    for start in range(0, left.shape[1], width):
        end = min(start + width, left.shape[1])
        hurts = keys(left[:, start:end] / upper.diagonal()[start:end])  # of the size, as squares
        if isinstance(pattern, NOfM):
            gone = lowest_in_rows(hurts, pattern.m - pattern.n)
        else:  # so that exactly round(sparsity · n) are gone at the end
            count = number(sparsity, len(left) * end) - number(sparsity, len(left) * start)
            gone = lowest([hurts], count)[0]
        stays[:, start:end] = ~gone
        errors = torch.zeros_like(left[:, start:end])
        for j in range(start, end):
            errors[:, j - start] = left[:, j] / upper[j, j] * gone[:, j - start]
            left[:, j].masked_fill_(gone[:, j - start], 0)
            left[:, j + 1 : end] -= errors[:, j - start, None] * upper[j, j + 1 : end]
        left[:, end:] -= errors @ upper[start:end, end:]
    return left, stays


def _upper(hessian: Tensor, damp: float) -> Tensor:
    """U, upper triangular, with Uᵀ U = the inverse of the damped Hessian."""
    if not hessian.isfinite().all():
        raise ValueError("the hessian holds NaN or infinite values: so do the inputs of the layer")
    mean, eye = hessian.diagonal().mean(), torch.eye(len(hessian)).to(hessian)
    damped = hessian + real(damp) * mean.where(mean > 0, 1) * eye
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))  # from the last column to the first
    if not real(damp) >= 0 or failed:
        raise ValueError(
            f"the hessian is singular with damp={damp!r}: raise it, or give more inputs"
        )
    made: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
    return made


def _error(change: Tensor, hessian: Tensor) -> Tensor:
    """Of each row the squared change of its outputs, summed over the inputs: (rows, 1)."""
    return ((change @ hessian) * change).sum(1, keepdim=True)


def prune_and_update(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float | None = None,
    *,
    pattern: Pattern = Unstructured(),  # noqa: B008 (a frozen value)
    leave: Sequence[str] = (),
    damp: float = 0.01,
) -> tuple[nn.Module, Masks]:
    """A copy with sparse linear and convolution layers, by :func:`sparse_gpt`; and its masks.

    Layers are pruned in the order in which they run, each on the inputs that it gets behind those
    already pruned: one pass over the batches a layer and one before, without labels and without
    training. Some hundred examples are enough. `leave` lists weights to leave alone, as in
    :func:`score`; a weight that is an embedding's too is left alone. Train on with ``hold(masks)``.

    Raises ValueError for a layer that the batches do not reach, a pattern that does not divide one,
    transposed and three-dimensional convolutions, no batches, and as :func:`sparse_gpt`.

    >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> sparse, masks = prune_and_update(model, [torch.randn(50, 8)], 0.5)
    >>> {name: int(mask.sum()) for name, mask in masks.items()}
    {'0.weight': 24, '2.weight': 6}
    """
    need_values("the inputs of a layer", (*model.parameters(), *model.buffers()))
    made, batches, masks = copied(model), list(batches), Masks()
    layers = _in_order(made, batches, leave)
    for name, layer in layers.items():
        _share(name, layer.weight, sparsity, pattern)
    for name, layer in layers.items():
        try:
            parts = _hessian(made, layer, batches)  # one for each group of a convolution
            found = [
                sparse_gpt(part, own, sparsity, pattern=pattern, damp=damp)
                for part, own in zip(layer.weight.chunk(len(parts)), parts, strict=True)
            ]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        with torch.no_grad():
            layer.weight.copy_(torch.cat([weight for weight, _ in found]))
        masks[name] = torch.cat([mask for _, mask in found])
        if not masks[name].any():
            raise ValueError(f"sparsity {sparsity} would empty {name}: ask for less, or leave it")
    return made, masks


def _share(name: str, weight: Tensor, sparsity: float | None, pattern: Pattern) -> float:
    """The sparsity, after every complaint that can be made."""
    if not isinstance(pattern, Unstructured | NOfM):
        raise ValueError(f"the update knows Unstructured() and NOfM(n, m), not {pattern!r}")
    if weight.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}: a weight has rows and columns")
    pattern.pool(name, weight)
    return settled(sparsity, pattern, PerLayer())[0]


def _in_order(model: nn.Module, batches: list[Any], leave: Sequence[str]) -> dict[str, Any]:
    """The layers to prune by the names of their weights, in the order in which they run."""
    every = {f"{n}.weight".lstrip("."): m for n, m in model.named_modules()}
    every = {n: m for n, m in every.items() if isinstance(m, READERS + TRANSPOSED)}
    need_list(leave)
    need_leave(model, [p for p in leave if not any(matches(n, [p]) for n in every)])
    layers = {n: m for n, m in every.items() if not matches(n, leave)}
    need_plain({n[:-7]: m for n, m in layers.items()}, "leave it alone, leave=[...]")
    own = _own(model)
    layers = {name: m for name, m in layers.items() if name in own}  # the first of tied ones
    for name, m in layers.items():
        if isinstance(m, (nn.Conv3d, *TRANSPOSED)):
            raise ValueError(
                f"inputs of {type(m).__name__} are not unfolded here: leave {name} alone, "
                f"leave=[{name!r}]"
            )
    names, order = {layer: name for name, layer in layers.items()}, dict[str, None]()
    _run(model, batches, {m: lambda m, args: order.update({names[m]: None}) for m in names})
    unseen = layers.keys() - order
    if unseen or not layers:
        what = f"{min(unseen)} is not called as a layer" if unseen else "there is no layer to prune"
        raise ValueError(f"{what} on these batches. Leave it alone, leave=[...]")
    return {name: layers[name] for name in order}


def _own(model: nn.Module) -> set[str]:
    """The first name of each parameter that no embedding holds."""
    tables = [m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    held = {id(table) for table in tables}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in held}


def _run(model: nn.Module, batches: list[Any], see: dict[nn.Module, Any]) -> None:
    if not batches:
        raise ValueError("the batches are empty: there are no inputs to prune on")
    handles = [
        layer.register_forward_pre_hook(
            lambda m, args, named, hook=hook: hook(m, (first_of(args, named),)), with_kwargs=True
        )
        for layer, hook in see.items()
    ]
    with observed(model, handles):
        for batch in batches:
            call(model, placed(inputs_of(batch), model))


def _hessian(model: nn.Module, layer: nn.Module, batches: list[Any]) -> Tensor:
    """The sum of x xᵀ over what the rows of a layer's weight multiply, (groups, n, n)."""
    found: list[Tensor] = []

    def see(layer: Any, args: tuple[Any, ...]) -> None:
        if args[0].numel():
            x = columns(layer, wide(args[0]))
            found[:] = [found[0] + x @ x.mT if found else x @ x.mT]

    alike = [m for m in model.modules() if isinstance(m, READERS) and m.weight is layer.weight]
    _run(model, batches, dict.fromkeys(alike, see))  # tied ones share the weight
    if not found:
        raise ValueError("all that the layer reads on these batches is empty: leave it alone")
    return found[0]
