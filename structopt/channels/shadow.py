"""Run a model whose weights have shapes but no values, so that any size is analysed at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
# What these get beside the tensor they work on are places, which have to be known.
_PLACED = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put")

# Torch composes these of up to twenty operators on `meta`; sizes it has checked before.
_POINTWISE = ("hardtanh", "relu", "hardswish", "hardsigmoid", "silu", "gelu", "sigmoid")
_BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")


def to_shadow(tensor: Tensor) -> Tensor:
    """Integers stay, as they may be indices; values are not needed and go to `meta`."""
    return tensor.to(META) if tensor.is_floating_point() else tensor.cpu().clone()


class Shadow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whole numbers and masks that a model makes on the way are real ones, on the CPU.

    They may be places to pick from, or decide where the model goes on.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = {t.device for t in _tensors([*args, *kwargs.values()])}
        if META in device:
            name = func._schema.name.removeprefix("aten::")
            if name in _BATCH_NORMS:
                return _normed(args[0])
            if name.rstrip("_") in _POINTWISE and args[0].is_floating_point():
                return args[0] if name.endswith("_") else torch.empty_like(args[0])
            if len(device) > 1 and name not in _PLACED:
                args, kwargs = _moved(args), _moved(kwargs)
        elif kwargs.get("device") == META:
            made = func(*args, **{**kwargs, "device": "cpu"})
            return made.to(META) if made.is_floating_point() else made
        return func(*args, **kwargs)


def _normed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


def _tensors(tree: Any) -> Iterator[Tensor]:
    for part in tree:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, list | tuple):
            yield from _tensors(part)


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
