"""Run a model whose weights have shapes but no values, so that any size is analysed at once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from structopt.channels.nests import tensors_of
from structopt.channels.shortcuts import META, shortcut

# What these get beside the tensor they work on are places, which have to be known.
_PLACED = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put")


def to_shadow(tensor: Tensor) -> Tensor:
    """Integers stay, as they may be indices; values are not needed and go to `meta`."""
    idle = tensor.is_floating_point() or tensor.is_meta
    return tensor.to(META) if idle else tensor.cpu().clone()


class Shadow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whole numbers and masks that a model makes on the way are real ones, on the CPU.

    They may be places to pick from, or decide where the model goes on.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: dict[Any, Any] = {}  # what came out of an operator, by what went in

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One operator, with its tensors on `meta` where one of them is."""
        if calls_experts(func, args):
            return multiply(*args[:3])
        device = {tensor.is_meta for tensor in tensors_of((args, kwargs))}
        if True in device:
            name = name_of(func)
            short = shortcut(name, args, kwargs)
            if short is not None:
                return short
            if len(device) > 1 and name not in _PLACED:
                args, kwargs = _moved(args), _moved(kwargs)
            elif len(device) == 1 and not (func.is_view or func._schema.is_mutable):
                return self._remembered(func, args, kwargs)
        elif kwargs.get("device") == META:
            made = func(*args, **{**kwargs, "device": "cpu"})
            return made.to(META) if made.is_floating_point() else made
        return func(*args, **kwargs)

    def _remembered(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Many layers are alike: torch works a shape out in Python, at ten times this cost."""
        key = func, _form(args), tuple(kwargs), _form(tuple(kwargs.values()))
        if key not in self.known:
            out = func(*args, **kwargs)
            self.known[key] = _form(out) if _is_bare(out) else None
            return out
        form = self.known[key]
        return func(*args, **kwargs) if form is None else _made(form)


class _Form(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _form(part: Any) -> Any:
    """All that torch asks of an argument on `meta`."""
    if isinstance(part, Tensor):
        return _Form(part.shape, part.stride(), part.dtype)
    if isinstance(part, list | tuple):
        return tuple(map(_form, part))
    return type(part), part


def _is_bare(out: Any) -> bool:
    parts = [out] if isinstance(out, Tensor) else out if isinstance(out, tuple) else [None]
    return all(isinstance(t, Tensor) and t.is_meta for t in parts)


def _made(form: Any) -> Any:
    if isinstance(form, _Form):
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=META)
    return tuple(map(_made, form))


def calls_experts(func: Any, args: Sequence[Any]) -> bool:
    """Whether tokens are multiplied by the expert that each is sent to (Mixtral and others)."""
    return name_of(func) == "_grouped_mm" and [a.ndim for a in args[:3]] == [2, 3, 1]


def multiply(tokens: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The same in any type, of any width and on `meta`, where torch's kernel wants multiples."""
    if tokens.is_meta or weights.is_meta:
        assert tokens.shape[1] == weights.shape[1], (tokens.shape, weights.shape)
        return torch.empty(len(tokens), weights.shape[2], dtype=tokens.dtype, device=META)
    made, start = tokens.new_zeros(len(tokens), weights.shape[2]), 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        made[start:end] = tokens[start:end] @ weight
        start = end
    return made


@functools.cache
def name_of(func: Any) -> str:
    name: str = func._schema.name
    return name.removeprefix("aten::")


def _moved(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(META)
    if isinstance(tree, list | tuple):
        return type(tree)(_moved(part) for part in tree)
    return {key: _moved(part) for key, part in tree.items()} if isinstance(tree, dict) else tree


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """No fused fast paths: each op is one that has a rule. No gradients."""
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # its LSTM is one op
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)
