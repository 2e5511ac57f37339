"""Does the edited model compute what it should? Compared in double precision, always."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from structopt.channels import lengths
from structopt.channels.copying import flatten, substitute
from structopt.channels.groups import Channels
from structopt.channels.labels import Vector
from structopt.channels.mirrors import Axis, Book, Mirror, mirror_of
from structopt.channels.rows import Choice
from structopt.channels.shadow import plain_kernels
from structopt.channels.tracing import Tracer, call, label_parameters, map_tensors, tensors_of

_NORMS = ("native_layer_norm", "native_group_norm", "_fused_rms_norm", "mean")
_SMALL = (torch.float32, torch.float16, torch.bfloat16)


class _Wide(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps float64 where a model casts to float32, as many norms do."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {k: torch.float64 if _small(v) else v for k, v in (kwargs or {}).items()}
        return func(*(torch.float64 if _small(a) else a for a in args), **kwargs)


def _small(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in _SMALL


class Masked(Tracer):  # type: ignore[no-untyped-call]
    """Runs the full model as if some channels were not there.

    Their weights are zero already. What is left to do: a norm over channels takes its statistics
    from those that stay.
    """

    def __init__(self, book: Book, gone: Vector) -> None:
        super().__init__(book)
        self.gone = gone  # for each label of a parameter: was it removed?

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = self.book.op
        mirror = mirror_of(args[0]) if args and isinstance(args[0], Tensor) else None
        if mirror is None or op not in _NORMS:
            return func(*args, **kwargs)
        if op == "mean":
            return self._mean(func, args, kwargs, mirror)
        if op == "native_group_norm":
            keep = self._kept(mirror[1])
            return func(*args, **kwargs) if keep is None else _group_norm(func, args, keep)
        keep = self._kept(mirror[-1])
        return func(*args, **kwargs) if keep is None else _last_norm(func, args, keep)

    def _mean(self, func: Any, args: Any, kwargs: Any, mirror: Mirror) -> Any:
        x, *rest = args
        for d in range(x.ndim) if not rest or rest[0] is None else rest[0]:
            keep = self._kept(mirror[d])
            if keep is not None:
                x = x.index_select(d, torch.from_numpy(keep).to(x.device))
        return func(x, *rest, **kwargs)

    def _kept(self, axis: Axis) -> Vector | None:
        """The indices along an axis that stay, or `None` where all do."""
        if axis is None:
            return None
        labels = self.book.labels
        stays, seen = np.zeros(labels.size, bool), np.zeros(labels.size, bool)
        for roots in labels.leaves(np.arange(len(self.gone))).values():
            real = roots >= 0
            seen[roots[real]] = True
            stays[roots[real & ~self.gone]] = True
        lost = seen & ~stays
        out = np.zeros(len(axis), bool)
        for roots in labels.leaves(axis).values():
            out |= (roots >= 0) & lost[roots]
        return np.flatnonzero(~out) if out.any() else None


def _last_norm(func: Any, args: tuple[Any, ...], keep: Vector) -> Any:
    x, shape, *rest = args
    index = torch.from_numpy(keep).to(x.device)
    inner = [*shape[:-1], len(keep)]
    pick = [t.index_select(-1, index) if isinstance(t, Tensor) else t for t in (x, *rest)]
    out = func(pick[0], inner, *pick[1:])
    y = torch.zeros_like(x).index_copy(-1, index, out[0] if isinstance(out, tuple) else out)
    return (y, *out[1:]) if isinstance(out, tuple) else y


def _group_norm(func: Any, args: tuple[Any, ...], keep: Vector) -> Any:
    x, weight, bias, n, channels, inner, groups, eps = args
    index = torch.from_numpy(keep).to(x.device)
    left = len(np.unique(keep // (channels // groups)))
    x_, w_, b_ = (
        t.index_select(d, index) if isinstance(t, Tensor) else t
        for t, d in ((x, 1), (weight, 0), (bias, 0))
    )
    out = func(x_, w_, b_, n, len(keep), inner, left, eps)
    return (torch.zeros_like(x).index_copy(1, index, out[0]), *out[1:])


@contextlib.contextmanager
def _repeatable(seed: int = 0) -> Iterator[None]:
    usual = torch.get_default_dtype()
    with torch.random.fork_rng(), plain_kernels():
        torch.manual_seed(seed)
        if not torch.backends.mps.is_available():  # which has no float64
            torch.set_default_dtype(torch.float64)  # the root of a whole number has this type
        try:
            yield
        finally:
            torch.set_default_dtype(usual)


def wide(tensor: Tensor) -> Tensor:
    """A copy in the widest type that the device has."""
    if not tensor.is_floating_point():
        return tensor.clone()
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64, copy=True)


def tolerance(outputs: Sequence[Tensor]) -> float:
    return 1e-4 if any(t.device.type == "mps" for t in outputs) else 1e-10


def reference(
    channels: Channels, model: nn.Module, choice: Choice, example: Any, watched: Sequence[str] = ()
) -> list[Tensor]:
    """What the model computes when the channels that were not chosen are masked."""
    gone = np.zeros(sum(len(v) for v in channels.axes.values()), bool)
    alike: dict[int, npt.NDArray[np.bool_]] = {}
    for labels in channels.axes.values():
        along = channels.along(labels)
        if id(along) not in alike:
            alike[id(along)] = np.zeros(len(labels), bool)
            for number in along.keys() & choice.keys():
                absent = ~np.isin(along[number], choice[number])
                alike[id(along)] |= (along[number] >= 0) & absent
        gone[labels] = alike[id(along)]
    names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}

    def zeroed(tensor: Tensor) -> Tensor:
        made = wide(tensor)
        for dim in range(made.ndim):
            labels = channels.axes.get((names.get(id(tensor), ""), dim))
            if labels is not None and gone[labels].any():
                lost = torch.from_numpy(np.flatnonzero(gone[labels])).to(made.device)
                made.index_fill_(dim, lost, 0)
        return made

    full = substitute(model, zeroed).eval()
    lengths.adjust(model, full, lambda _, tensor: wide(tensor))
    if not gone.any():
        return outputs_of_copy(full, example, watched=watched)
    flatten(full)
    book = Book()
    label_parameters(book, full)
    with _repeatable(), _Wide(), Masked(book, gone):  # type: ignore[no-untyped-call]
        return _run(full, example, watched)


def _run(model: nn.Module, example: Any, watched: Sequence[str]) -> list[Tensor]:
    seen: list[Any] = []
    for name in watched:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out: seen.append(map_tensors(out, torch.clone))
        )
    return [*tensors_of(call(model, map_tensors(example, wide))), *tensors_of(seen)]


def outputs(
    model: nn.Module, example: Any, seed: int = 0, watched: Sequence[str] = ()
) -> list[Tensor]:
    """What a model, and layers of it, compute in double precision, in evaluation mode."""
    return outputs_of_copy(substitute(model, wide), example, seed, watched)


def outputs_of_copy(
    copy: nn.Module, example: Any, seed: int = 0, watched: Sequence[str] = ()
) -> list[Tensor]:
    """The same, of a copy in double precision that may be changed."""
    flatten(copy.eval())
    with _repeatable(seed), _Wide():  # type: ignore[no-untyped-call]
        return _run(copy, example, watched)


def changes(model: nn.Module, example: Any) -> bool:
    """Whether the model gives other outputs when other random numbers are drawn."""
    first, second = (outputs(model, example, seed) for seed in (0, 1))
    return difference(first, second) > tolerance(first)


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest error relative to the largest value; infinite where shapes differ."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.numel() and a.is_floating_point():
            scale = float(a.abs().max()) or 1.0
            worst = max(worst, float((a - b).abs().max()) / scale)
        elif a.numel() and not torch.equal(a, b):
            return float("inf")
    return worst if worst == worst else float("inf")


def shapes(tree: Any) -> list[torch.Size]:
    return [t.shape for t in tensors_of(tree)]
