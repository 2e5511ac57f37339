"""What half a network has to compute, worked out without the package that made the half.

A network from which channels were removed must equal the whole one in which every entry that was
removed, of weights, biases and statistics alike, is zero. Where a norm or a mean is taken over
channels of which some were removed, the reference is that norm over those that were kept. Both
are computed in double precision, on another input than the one that the networks were analysed on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = 1e-10  # of the largest value
GONE = "_zoo_gone"  # marks a statistic of channels of which some were removed
Lost = Mapping[str, Tensor]  # of parameters and buffers: true where an entry was removed


def call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, tuple):
        return model(*example)
    return model(**example) if isinstance(example, dict) else model(example)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested outputs, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from tensors(part)


def mapped(tree: Any, change: Any) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, change) for key, value in tree.items()}
    return type(tree)(mapped(value, change) for value in tree)


def fresh(example: Any) -> Any:
    """Other values of the same shapes, in double precision; whole numbers in reverse order."""
    generator = torch.Generator().manual_seed(7)

    def other(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            made = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return made.to(tensor.device)
        return tensor.flip(-1)

    return mapped(example, other)


class Reference(TorchDispatchMode):
    """Runs in double precision throughout; with `removed`, norms skip channels that are not there.

    A channel counts as removed where it is zero throughout, now that entries were zeroed, and was
    not before; both with two draws of weights, since with one a gate may have closed. `before` and
    `other` are what such runs have seen: of the whole network, and of the zeroed one with the
    other draw. What a mean is taken from stays zero where channels were removed.
    """

    def __init__(self, before: list[Any] | None = None, other: list[Any] | None = None) -> None:
        super().__init__()
        self.before, self.other, self.seen = before, other, list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(_wide(a) for a in args)
        kwargs = {key: _wide(value) for key, value in (kwargs or {}).items()}
        name = func._schema.name.removeprefix("aten::")
        if name == "_grouped_mm":
            return _by_expert(*args[:3])
        dims = _statistics(name, args)
        if not dims:
            return _centred(func, name, args, func(*args, **kwargs))
        zero = [_zero(args[0], dim) for dim in dims]
        self.seen.append(zero)
        if self.before is None:
            return func(*args, **kwargs)
        place = len(self.seen) - 1
        if place >= len(self.before) or [len(z) for z in self.before[place]] != [*map(len, zero)]:
            return func(*args, **kwargs)  # the network took another way
        gone = [now & ~then for now, then in zip(zero, self.before[place], strict=True)]
        if self.other is not None and place < len(self.other):
            gone = [mine & any_ for mine, any_ in zip(gone, self.other[place], strict=True)]
        if not any(bool(g.any()) for g in gone):
            return func(*args, **kwargs)
        if name == "native_group_norm":
            return _group_norm(args, ~gone[0])
        if "norm" in name:
            return _last_norm(func, args, ~gone[0])
        x = args[0]
        for dim, lost in zip(dims, gone, strict=True):
            x = x.index_select(dim, (~lost).nonzero().flatten())
        made = func(x, *args[1:], **kwargs)
        for tensor in tensors(made):
            setattr(tensor, GONE, list(zip(dims, gone, strict=True)))
        return made


def _by_expert(tokens: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
    """Sorted tokens, each run of them by its own matrix: torch's kernel takes no float64."""
    *runs, rest = tokens.tensor_split(ends.tolist())  # those after the last end have no expert
    made = [run @ expert for run, expert in zip(runs, experts, strict=True)]
    return torch.cat([*made, rest.new_zeros(len(rest), experts.shape[2])])


def _centred(func: Any, name: str, args: tuple[Any, ...], made: Any) -> Any:
    """A mean taken from channels leaves those that were removed at zero: they are not there."""
    holder = args[1 if name == "sub" else 0] if name == "sub" or func.is_view else None
    gone = getattr(holder, GONE, [])
    if name == "sub":
        for dim, lost in gone:
            made = made.index_fill(dim, lost.nonzero().flatten(), 0)
    elif gone and isinstance(made, Tensor):
        setattr(made, GONE, gone)
    return made


def _wide(value: Any) -> Any:
    small = (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if isinstance(value, torch.dtype) and value in small else value


def _statistics(name: str, args: tuple[Any, ...]) -> list[int]:
    """The dimensions over which an op takes a mean or a variance."""
    if name == "native_group_norm":
        return [1]
    if name in ("native_layer_norm", "_fused_rms_norm", "rms_norm"):
        return [args[0].ndim - 1]
    if name in ("mean", "var", "var_mean", "std", "std_mean") and args[0].is_floating_point():
        dims = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else None
        return [d % args[0].ndim for d in (dims or range(args[0].ndim))]
    return []


def _zero(x: Tensor, dim: int) -> Tensor:
    others = [d for d in range(x.ndim) if d != dim]
    return (x.abs().amax(others) if others else x.abs()) == 0


def _last_norm(func: Any, args: tuple[Any, ...], kept: Tensor) -> Any:
    index = kept.nonzero().flatten()
    x, shape, *rest = args
    fewer = [t[..., index] if isinstance(t, Tensor) else t for t in rest]
    made = func(x[..., index], [*shape[:-1], len(index)], *fewer)
    first, *others = made if isinstance(made, tuple) else (made,)
    out = torch.zeros_like(x)
    out[..., index] = first
    return (out, *others) if isinstance(made, tuple) else out


def _group_norm(args: tuple[Any, ...], kept: Tensor) -> Any:
    """By hand: each group's mean and variance over its channels that were kept."""
    x, weight, bias, batch, channels, _, groups, eps = args
    flat = x.reshape(batch, groups, channels // groups, -1)
    mask = kept.to(x).reshape(1, groups, channels // groups, 1)
    count = (mask.sum(2, keepdim=True) * flat.shape[-1]).clamp(min=1)
    mean = (flat * mask).sum((2, 3), keepdim=True) / count
    var = ((flat - mean).square() * mask).sum((2, 3), keepdim=True) / count
    out = ((flat - mean) * mask / (var + eps).sqrt()).reshape(x.shape)
    shape = [1, channels] + [1] * (x.ndim - 2)
    out = out if weight is None else out * weight.reshape(shape)
    out = out if bias is None else out + (bias * kept).reshape(shape)
    return out, mean.flatten(1), var.flatten(1)


def run(model: nn.Module, example: Any, mode: Reference) -> list[Tensor]:
    fast, usual = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    torch.backends.mha.set_fastpath_enabled(False)  # one op for a whole layer, norms inside
    torch.set_default_dtype(torch.float64)  # of numbers that a network makes tensors of
    try:
        torch.manual_seed(0)
        with torch.no_grad(), mode:
            return list(tensors(call(model.eval(), example)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.set_default_dtype(usual)


def zero_(model: nn.Module, lost: Lost) -> None:
    """Make removed entries zero, in place. Of a parametrised weight, those of the weight itself."""
    for name, gone in lost.items():
        owner, middle, last = name.partition(".parametrizations.")
        plain, _, part = last.rpartition(".")
        if middle and part not in ("original", "original1"):  # lengths go with the rows
            continue
        module, weight = model.get_submodule(owner if middle else name.rpartition(".")[0]), plain
        if middle and parametrize.is_parametrized(module, plain):
            parametrize.remove_parametrizations(module, plain)
        elif not middle:
            weight = name.rpartition(".")[2]
        tensor = getattr(module, weight).data
        tensor.masked_fill_(gone.to(tensor.device), 0)


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest error, relative to the largest value of the same output."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return math.inf
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.is_floating_point() and a.numel():
            scale = float(a.abs().max()) or 1.0
            worst = max(worst, float((a - b).abs().max()) / scale)
        elif not torch.equal(a, b):
            return math.inf
    return math.inf if math.isnan(worst) else worst


def _with_other_weights(model: nn.Module) -> nn.Module:
    """A copy with weights of other sizes and signs, and with the same zeros."""
    generator, changed = torch.Generator().manual_seed(8), copy.deepcopy(model)
    with torch.no_grad():
        for weight in changed.parameters():
            factor = 0.5 + torch.rand(weight.shape, generator=generator).to(weight)
            weight.mul_(torch.where(torch.rand_like(factor) < 0.5, factor, -factor))
    return changed


def verdict(full: nn.Module, made: nn.Module, lost: Lost, example: Any) -> tuple[str, float]:
    """Is `made` the network `full` without these entries? Changes `full`, which is in double.

    "exact": equal to the zeroed network. "norms": equal to it with norms over the kept channels.
    "wrong": neither. And the error of the nearer of the two.
    """
    other = fresh(example)
    note, again = Reference(), Reference()
    found = run(made, other, Reference())  # first: `zero_` may end a parametrisation of its class
    whole = run(full, other, note)
    run(_with_other_weights(full), other, again)
    before = [
        [a & b if len(a) == len(b) else a for a, b in zip(one, two, strict=False)]
        for one, two in zip(note.seen, again.seen, strict=False)
    ]
    zero_(full, lost)
    zeroed, others = run(full, other, Reference()), Reference(before)
    run(_with_other_weights(full), other, others)
    expected = run(full, other, Reference(before, others.seen))
    plain, normed = difference(zeroed, found), difference(expected, found)
    if not all(bool(t.isfinite().all()) for t in zeroed) or difference(whole, zeroed) < 1e-6:
        raise ValueError("the output does not show what was removed: nothing can be compared")
    if plain <= TOLERANCE:
        return "exact", plain
    return ("norms" if normed <= TOLERANCE else "wrong"), min(plain, normed)
