"""What comes out of the most frequent operators on `meta`: a shape, and nothing else.

Torch works out many of these in Python, in milliseconds. Here are the plain cases: contiguous
tensors of one type, shapes that fit. `None` means that torch has to say, errors as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

META = torch.device("meta")
# Torch checks the sizes of these before it takes them apart, on `meta`, into up to twenty.
_BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
_UPSAMPLED = (
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"),
    *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
)
_UNARY = ("hardtanh", "relu", "hardswish", "hardsigmoid", "silu", "gelu", "sigmoid")
_NUMBERS = {"alpha", "beta", "approximate"}  # what these may be told by name changes no shape
_EXACT = (torch.float32, torch.float64)  # others are computed in a wider type in between


def shortcut(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operator of this name, or `None` where torch has to say."""
    known = _KNOWN.get(name) or _KNOWN.get(name.rstrip("_"))
    if known is None or not (args and isinstance(args[0], Tensor | list)):
        return None
    return None if kwargs.keys() - _NUMBERS else known(name.endswith("_"), *args)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=META)


def _is_plain(*tensors: Any) -> bool:
    """Whether all are contiguous tensors of one floating type on `meta`."""
    first = tensors[0]
    return isinstance(first, Tensor) and all(
        isinstance(t, Tensor)
        and t.is_meta
        and t.dtype == first.dtype
        and t.is_floating_point()
        and t.is_contiguous()
        for t in tensors
    )


def _unary(inplace: bool, x: Tensor, *_: Any) -> Tensor | None:
    if not x.is_floating_point():
        return None
    return x if inplace else _alike(x)


def _alike(x: Tensor) -> Tensor:
    """As `empty_like`, which takes twenty times as long on `meta`."""
    return _empty(x.shape, x) if x.is_contiguous() else torch.empty_like(x)


def _binary(inplace: bool, x: Any, y: Any = None, *_: Any) -> Tensor | None:
    if not _is_plain(x):
        return None if inplace else _permuted(x, y)
    if type(y) in (int, float):
        return x if inplace else _empty(x.shape, x)
    if not _is_plain(x, y) or not x.ndim or not y.ndim:
        return None
    if _spreads(y.shape, x.shape):
        return x if inplace else _empty(x.shape, x)
    # Of two that both grow, strides decide how the result lies.
    return _empty(y.shape, x) if not inplace and _spreads(x.shape, y.shape) else None


def _permuted(x: Any, y: Any) -> Tensor | None:
    """Of what lies in another order, and what is expanded to it: that order, without gaps."""
    y = x if type(y) in (int, float) else y
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_meta and y.is_meta):
        return None
    if x.dtype != y.dtype or not x.is_floating_point() or not _spreads(y.shape, x.shape):
        return None
    lies = [(s, n, d) for d, (s, n) in enumerate(zip(x.stride(), x.shape, strict=True)) if n != 1]
    if not y.ndim or len({0, *(stride for stride, _, _ in lies)}) <= len(lies) or not x.numel():
        return None
    strides, step = [1] * x.ndim, 1
    for _, size, dim in sorted(lies):
        strides[dim], step = step, step * size
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=META)


def _spreads(small: torch.Size, large: torch.Size) -> bool:
    """Whether a tensor of the one shape is expanded to the other when they meet."""
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(n in (1, size) for n, size in pairs)


def _batch_norm(_: bool, x: Tensor, *__: Any) -> Any:
    return _alike(x), torch.empty(0, device=META), torch.empty(0, device=META)


def _layer_norm(_: bool, x: Tensor, shape: Sequence[int], weight: Any, bias: Any, *__: Any) -> Any:
    last = x.ndim - len(shape)
    learned = [t for t in (weight, bias) if t is not None]
    fits = len(shape) and x.shape[max(last, 0) :] == torch.Size(shape) and 0 not in x.shape
    if x.dtype not in _EXACT or not fits or any(t.shape != torch.Size(shape) for t in learned):
        return None
    some = (*x.shape[:last], *(1 for _ in shape))
    return _empty(x.shape, x), _empty(some, x), _empty(some, x)


def _group_norm(_: bool, x: Tensor, *more: Any) -> Any:
    *learned, many, channels, area, groups, _ = more
    fits = _is_plain(x) and x.dtype in _EXACT and x.numel() and x.shape[:2] == (many, channels)
    fits = fits and groups > 0 and channels % groups == 0 and many * channels * area == x.numel()
    learned = [t for t in learned if t is not None]
    if not fits or any(not _is_plain(x, t) or t.shape != (channels,) for t in learned):
        return None
    return _empty(x.shape, x), _empty((many, groups), x), _empty((many, groups), x)


def _product(a: Tensor, b: Tensor, ndim: int) -> Tensor | None:
    """(n, k) times (k, m), or batches of them; however these lie in memory, what comes out is."""
    fits = a.ndim == b.ndim == ndim and a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2]
    if not (fits and a.is_meta and b.is_meta and a.dtype == b.dtype and a.is_floating_point()):
        return None
    return _empty((*a.shape[:-1], b.shape[-1]), a)


def _mm(_: bool, a: Tensor, b: Tensor, *rest: Any) -> Tensor | None:
    return None if rest else _product(a, b, 2)


def _bmm(_: bool, a: Tensor, b: Tensor, *rest: Any) -> Tensor | None:
    return None if rest else _product(a, b, 3)


def _addmm(inplace: bool, bias: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Tensor | None:
    out = None if inplace or rest else _product(a, b, 2)
    alike = out is not None and bias.is_meta and bias.dtype == out.dtype
    return out if out is not None and alike and bias.shape in (out.shape, out.shape[1:]) else None


def _cat(_: bool, parts: Sequence[Any], dim: int = 0) -> Tensor | None:
    if not parts or not _is_plain(*parts) or not parts[0].ndim:
        return None
    first = parts[0]
    if not -first.ndim <= dim < first.ndim:
        return None
    dim %= first.ndim
    rest = {(t.ndim, t.shape[:dim], t.shape[dim + 1 :]) for t in parts}
    if len(rest) > 1:
        return None
    return _empty(
        (*first.shape[:dim], sum(t.shape[dim] for t in parts), *first.shape[dim + 1 :]), first
    )


def _mean(_: bool, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor | None:
    if not _is_plain(x) or not isinstance(dim, list | tuple) or not dim:
        return None
    over = {d % x.ndim for d in dim if -x.ndim <= d < x.ndim}
    if len(over) < len(dim):
        return None
    shape = [1 if d in over else n for d, n in enumerate(x.shape) if keepdim or d not in over]
    return _empty(shape, x)


def _roll(_: bool, x: Tensor, shifts: Any, dims: Any = ()) -> Tensor | None:
    fits = 0 < len(shifts) == len(dims) and all(-x.ndim <= d < x.ndim for d in dims)
    return _empty(x.shape, x) if fits and x.numel() else None


def _softmax(_: bool, x: Tensor, dim: int, *rest: Any) -> Tensor | None:
    plain = _is_plain(x) and not any(rest)
    return _empty(x.shape, x) if plain and -x.ndim <= dim < x.ndim else None


def _upsample(_: bool, x: Tensor, sizes: Any, *__: Any) -> Tensor | None:
    fits = _is_plain(x) and sizes is not None and len(sizes) == x.ndim - 2
    return _empty((*x.shape[:2], *sizes), x) if fits and x.numel() and min(sizes) > 0 else None


def _convolution(
    _: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    *more: Any,
) -> Tensor | None:
    transposed, _, groups = more
    rows, columns = weight.shape[:2]
    fits = x.shape[1] == columns * groups and rows % groups == 0 and x.dtype == weight.dtype
    fits = fits and (bias is None or bias.shape == (rows,))
    fits = fits and len(stride) == len(padding) == len(dilation) == x.ndim - 2 == weight.ndim - 2
    if transposed or not (fits and x.is_contiguous() and weight.is_contiguous()):
        return None
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(
            x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    ]
    return _empty((x.shape[0], rows, *sizes), x) if min(sizes) > 0 else None


_KNOWN: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(("add", "sub", "mul", "div"), _binary),
    **dict.fromkeys(_BATCH_NORMS, _batch_norm),
    **dict.fromkeys(_UPSAMPLED, _upsample),
    **dict.fromkeys(("_softmax", "_safe_softmax"), _softmax),
    "addmm": _addmm,
    "bmm": _bmm,
    "cat": _cat,
    "convolution": _convolution,
    "mean": _mean,
    "mm": _mm,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
    "roll": _roll,
}
