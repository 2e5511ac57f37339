"""Run a model as if some of its channels were not there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from structopt.channels.labels import Vector
from structopt.channels.mirrors import Axis, Book, Mirror, mirror_of
from structopt.channels.statistics import SPREADS
from structopt.channels.tracing import Tracer

_NORMS = ("native_layer_norm", "native_group_norm", "_fused_rms_norm")


class Masked(Tracer):  # type: ignore[no-untyped-call]
    """Runs the full model as if some channels were not there.

    Their weights are zero already. What is left to do: a norm over channels takes its statistics
    from those that stay.
    """

    def __init__(self, book: Book, gone: npt.NDArray[np.bool_]) -> None:
        super().__init__(book)
        self.gone = gone  # for each label of a parameter: was it removed?

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = self.book.op
        mirror = mirror_of(args[0]) if args and isinstance(args[0], Tensor) else None
        if mirror is not None and op in ("mean", *SPREADS):
            return self._statistic(func, args, kwargs, mirror)
        if mirror is None or op not in _NORMS:
            return func(*args, **kwargs)
        if op == "native_group_norm":
            keep = self._kept(mirror[1])
            return func(*args, **kwargs) if keep is None else _group_norm(func, args, keep)
        keep = self._kept(mirror[-1])
        return func(*args, **kwargs) if keep is None else _last_norm(func, args, keep)

    def _statistic(self, func: Any, args: Any, kwargs: Any, mirror: Mirror) -> Any:
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
        labels, count = self.book.labels, len(self.gone)
        leaves, out = labels.leaves(axis).values(), np.zeros(len(axis), bool)
        lost = self.gone  # of a channel of weights, which are labelled first
        if any((roots >= count).any() for roots in leaves):
            stays, seen = np.zeros(labels.size, bool), np.zeros(labels.size, bool)
            for roots in labels.leaves(np.arange(count)).values():
                real = roots >= 0
                seen[roots[real]] = True
                stays[roots[real & ~self.gone]] = True
            lost = seen & ~stays
        for roots in leaves:
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
