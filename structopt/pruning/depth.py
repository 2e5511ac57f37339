"""Depth: leave out whole residual blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structopt.channels.exchanging import exchange_
from structopt.losses.checks import need_values
from structopt.measure.running import call
from structopt.training.copying import copied
from structopt.training.hooked import in_place_of
from structopt.training.observing import first_of, observed
from structopt.training.statistics import inputs_of, placed


def residual_blocks(model: nn.Module, example: Any) -> list[str]:
    """The names of the blocks that could be left out: x or relu(x) is what stays without weights.

    A block is a module with layers inside that turned one tensor into another of the same shape
    when the model ran on `example`, and that gives its input (or the positive part of it) when all
    its parameters are zero. Of nested ones the innermost counts.

    >>> from structopt.networks import ResNet20
    >>> residual_blocks(ResNet20(width=4), torch.zeros(1, 1, 28, 28))[:3]
    ['stage1.0', 'stage1.1', 'stage1.2']
    """
    need_values("the search for blocks", (*model.parameters(), *model.buffers()))
    names = {module: name for name, module in model.named_modules()}
    seen: dict[nn.Module, Tensor | None] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        alone = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        alike = alone and isinstance(output, Tensor) and output.shape == args[0].shape
        alike = alike and args[0].is_floating_point()
        again = module in seen and seen[module] is None
        seen[module] = args[0].detach() if alike and not again else None

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in names if any(m.children())]
    with observed(model, handles):
        call(model, example)
    found = [names[m] for m, x in seen.items() if x is not None and _passes(m, x)]
    inner = [n for n in found if n and not any(o.startswith(f"{n}.") for o in found)]
    order = list(names.values())
    return sorted(inner, key=order.index)


@torch.no_grad()
def _passes(block: nn.Module, x: Tensor) -> bool:
    """Whether the block without its weights hands on a random input, or the positive part of it."""
    bare = copied(block).eval()
    if not any(True for _ in bare.parameters()):
        return False
    for p in bare.parameters():
        p.zero_()
    draw = torch.Generator(x.device).manual_seed(0)
    x = torch.randn(x.shape, generator=draw, device=x.device, dtype=x.dtype)
    y = bare(x)
    return bool(torch.equal(y, x) or torch.equal(y, x.relu()))


def block_influence(
    model: nn.Module, batches: Iterable[Any], names: Sequence[str] | None = None
) -> dict[str, float]:
    """1 - the mean cosine of what goes into a block and what comes out: {name: influence}.

    The block influence of Men et al., 2024 ("ShortGPT"): the lower, the less the block does. The
    cosine is taken over the features of each position (the channels of images, the last dimension
    of sequences). Blocks are those of :func:`residual_blocks`, if not named.

    Raises ValueError for no batches, and for a name that is no module of the model, never ran, or
    makes no tensor like its first argument.

    >>> from structopt.networks import ResNet20
    >>> influence = block_influence(ResNet20(width=4), [torch.rand(2, 1, 28, 28)])
    >>> min(influence.values()) >= 0
    True
    """
    need_values("the influence of a block", (*model.parameters(), *model.buffers()))
    batches = list(batches)
    if not batches:
        raise ValueError("the batches are empty: there is nothing to run the blocks on")
    if names is None:
        names = residual_blocks(model, placed(inputs_of(batches[0]), model))
    else:
        _need_modules(model, names)
    sums: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:

        def note(_m: nn.Module, args: Any, named: Any, output: Any, name: str = name) -> None:
            x = first_of(args, named)
            if not isinstance(output, Tensor) or getattr(x, "shape", None) != output.shape:
                raise ValueError(f"{name} does not make one tensor like its first argument")
            dim = 1 if output.ndim == 4 else -1
            sums[name].append(torch.cosine_similarity(x, output, dim=dim).flatten())

        handles.append(model.get_submodule(name).register_forward_hook(note, with_kwargs=True))
    with observed(model, handles):
        for batch in batches:
            call(model, placed(inputs_of(batch), model))
    if idle := [name for name, found in sums.items() if not found]:
        raise ValueError(f"{idle[0]!r} never ran on these batches: leave it out of names")
    return {name: max(0.0, 1 - float(torch.cat(found).mean())) for name, found in sums.items()}


def _need_modules(model: nn.Module, names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"names is a list of blocks: [{names!r}]")
    known = {name for name, _ in model.named_modules()}
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no module of this {type(model).__name__}")


def remove_blocks(model: nn.Module, example: Any, names: Sequence[str]) -> nn.Module:
    """A shallower copy of the model: each block named becomes ``nn.Identity``, wherever it is held.

    Exact in this sense: the copy computes what the model computes when all parameters of those
    blocks are zero, provided that what enters a block that ends in a ReLU is not negative.

    Raises ValueError for a name that :func:`residual_blocks` does not list.

    >>> from structopt.networks import ResNet20
    >>> example = torch.zeros(1, 1, 28, 28)
    >>> remove_blocks(ResNet20(width=4), example, ["stage1.1"]).stage1[1]
    Identity()
    """
    _need_modules(model, names)
    possible = residual_blocks(model, example)
    wrong = [name for name in names if name not in possible]
    if wrong:
        raise ValueError(
            f"{wrong[0]!r} is no residual block that could become an identity; "
            f"there are {', '.join(possible) or 'none'}"
        )
    made = copied(model)
    for name in names:
        exchange_(made, name, in_place_of(made.get_submodule(name), nn.Identity(), name))
    return made
