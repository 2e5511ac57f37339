"""Which attribute of a module is the size of which dimension.

A model's own Python keeps widths as whole numbers (`self.head_dim`) and hands them to `view` and
`split`. While the labelled model runs, these numbers know where they came from: an attribute that
arrives as the size of a labelled dimension is set when that dimension changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from structopt.channels.mirrors import Book, Extent, Key, mirror_of
from structopt.channels.reading import mentions, own
from structopt.channels.walking import Modules


class Known(int):
    """A whole number that remembers which attribute it was read from."""

    key: Key | None = None

    @classmethod
    def of(cls, value: int, *key: Any) -> Self:
        made = cls(value)
        made.key = key
        return made


class Width(Known):
    """A width of a layer or of data: says so when Python compares it or computes with it."""

    tell: Callable[[], None]

    def telling(self, tell: Callable[[], None]) -> Width:
        self.tell = tell
        return self


def _telling(plain: Any) -> Any:
    def method(self: Width, *args: Any) -> Any:
        self.tell()
        return plain(self, *args)

    return method


_SILENT = ("__new__", "__getattribute__", "__getnewargs__", "__sizeof__", "__doc__")
for _name, _method in vars(int).items():
    if _name.startswith("__") and _name not in _SILENT:
        setattr(Width, _name, _telling(_method))

_WIDE = (_ConvNd, nn.Linear, _NormBase)  # layers without functions that would tell
_WIDTHS = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features")
_NORMALIZING, _SHAPE = (nn.LayerNorm, nn.RMSNorm), "normalized_shape"
_SPOKEN = frozenset(_WIDTHS) - {"groups"}  # `range` and slices take these without a word

_NORMS = ("layer_norm", "rms_norm")
_SHAPED = ("view", "reshape", "expand", "unflatten", "_unsafe_view")
_FRESH = ("zeros", "ones", "full")  # as the state that a recurrent layer starts from
_FILLED = (*_FRESH, *(f"new_{name}" for name in _FRESH))
# Operators that are given sizes.
_SIZED = frozenset((*_SHAPED, *_FILLED, "split", "split_with_sizes", "narrow", *_NORMS))

# What torch's layers call, and much of what others do: no width is handed to these as a number.
# fmt: off
_WIDTHLESS = {
    "batch_norm", "linear", "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu",
    "sigmoid", "tanh", "leaky_relu", "elu", "mish", "dropout", "dim", "flatten", "mean", "cat",
    "add", "add_", "sub", "mul", "mul_", "div", "matmul", "permute", "transpose", "unsqueeze",
    "contiguous", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "interpolate", "__get__",
    "size", "_assert",
}
# fmt: on
_CONVOLUTIONS = tuple(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))
_SHAPES = (Tensor.shape.__get__, Tensor.size)  # type: ignore[attr-defined]
_TORCH = (None, "torch", "torch._C._nn", "torch.nn.functional", "torch._tensor")  # None: methods


def is_convolution(module: nn.Module) -> bool:
    """Whether it is one of torch's, and no Python but torch's runs in it."""
    if type(module).__module__ != "torch.nn.modules.conv":
        return False
    return not module._forward_hooks and {"forward", "_conv_forward"}.isdisjoint(vars(module))


def mark(modules: Modules, book: Book) -> None:
    """Replace the whole numbers that a model's own modules keep by ones that can be followed.

    And the widths of layers by ones that tell when Python looks at them.
    """
    book.insists |= mentions(modules.values(), _SPOKEN)
    others = (m for m in modules.values() if not isinstance(m, _NORMALIZING))
    book.insists |= mentions(others, frozenset({_SHAPE}))
    for path, module in modules.items():
        kept = vars(module)
        for name in _WIDTHS if isinstance(module, _WIDE) else ():
            if type(kept.get(name)) is int:
                kept[name] = Width.of(kept[name], path, name, -1).telling(book.insist)
        if isinstance(module, _NORMALIZING) and type(kept.get(_SHAPE)) is tuple:
            widths = (Width.of(v, path, _SHAPE, n) for n, v in enumerate(kept[_SHAPE]))
            kept[_SHAPE] = tuple(width.telling(book.insist) for width in widths)
        for name, value in list(kept.items()) if own(module) else ():
            if type(value) is int:
                kept[name] = Known.of(value, path, name, -1)
            elif type(value) in (list, tuple) and value and all(type(v) is int for v in value):
                known = (Known.of(v, path, name, n) for n, v in enumerate(value))
                kept[name] = type(value)(known)


class Attributes(TorchFunctionMode):
    """Notes which marked numbers arrive as sizes of dimensions, and whether any number could.

    A convolution is given its number of groups, which torch's layers keep where it can be set.
    """

    def __init__(self, book: Book) -> None:
        super().__init__()
        self.book = book
        self.tracer = _get_current_dispatch_mode()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name, book = getattr(func, "__name__", ""), self.book
        book.widthless = name in _WIDTHLESS or (book.convolves and name in _CONVOLUTIONS)
        book.widthless = book.widthless or (name in _NORMS and _is_known(args))
        book.widthless = book.widthless or (name in _SHAPED and _fits_any(args[1:]))
        book.widthless = book.widthless and self._is_torch(func, types, kwargs)
        book.insists |= not book.widthless
        out = func(*args, **(kwargs or {}))
        book.widthless = False
        if func in _SHAPES:
            return self._seen(out, *args, **(kwargs or {}))
        if name not in _SIZED:
            return out
        for number, tensor, dim in _sizes(name, args, kwargs or {}, out):
            key = number.key if isinstance(number, Known) else None
            if name in _FILLED and mirror_of(tensor) is None:  # of whole numbers
                continue
            # A width that is compared in the plain way would tell.
            if key is not None and int.__gt__(number, 1) and int.__eq__(number, tensor.shape[dim]):
                self._claim(key, tensor, dim)
        return out

    def _seen(self, out: Any, tensor: Tensor, dim: Any = None) -> Any:
        """A shape in which numbers of channels tell when Python looks at them."""
        labelled = [axis is not None for axis in mirror_of(tensor) or [None] * tensor.ndim]
        sizes = [
            Width(n).telling(self.book.insist) if told else n
            for n, told in zip(tensor.shape, labelled, strict=True)
        ]
        if isinstance(out, torch.Size):
            return torch.Size(sizes)
        return sizes[dim] if isinstance(dim, int) else out

    def _is_torch(self, func: Any, types: Any, kwargs: Any) -> bool:
        """Whether no Python but torch's runs between the call and its operators."""
        plain = all(kind is Tensor for kind in types) and "out" not in (kwargs or {})
        mode = _get_current_dispatch_mode()
        return plain and getattr(func, "__module__", None) in _TORCH and mode is self.tracer

    def _claim(self, key: Key, tensor: Tensor, dim: int) -> None:
        """One number serves all dimensions that it is the size of: they change alike."""
        book, axis = self.book, (mirror_of(tensor) or [None] * tensor.ndim)[dim]
        before = book.claims.get(key)
        if before is not None or axis is not None:
            book.op = f"{key[1]} = {tensor.shape[dim]}"
            axis = book.tie(before.labels, axis) if before is not None else axis
        book.claims[key] = Extent(key[0], tensor.shape[dim], axis, key[1], key[2])
        book.said.add(key[:2])


def _is_known(args: Sequence[Any]) -> bool:
    """Whether a norm is given a layer's own widths, which are set when those change."""
    shape = args[1] if len(args) > 1 else None
    return type(shape) is tuple and all(type(n) is Width and n.key for n in shape)


def _fits_any(sizes: Sequence[Any]) -> bool:
    """Whether a shape is given as (1, -1), which suits any width: only what is 1 cannot change."""
    given = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    return len(given) > 0 and all(type(n) is int and n in (1, -1) for n in given)


def _sizes(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any
) -> Iterator[tuple[Any, Tensor, int]]:
    """The numbers given to an op that are sizes of dimensions of what comes out."""
    rest = list(args if name in _FRESH else args[1:])
    if name in _SHAPED or name in _FILLED:
        first = 0
        if name == "unflatten":
            first = rest.pop(0) % args[0].ndim if rest else 0
        rest = rest or [kwargs.get("size", ())]
        given = rest[0] if isinstance(rest[0], list | tuple) else rest
        if isinstance(out, Tensor) and first + len(given) <= out.ndim:
            yield from ((number, out, first + d) for d, number in enumerate(given))
    elif name in ("split", "split_with_sizes"):
        named = ("split_size_or_sections", "split_size", "split_sizes")
        given = rest[0] if rest else next((kwargs[n] for n in named if n in kwargs), ())
        dim = rest[1] if len(rest) > 1 else kwargs.get("dim", 0)
        numbers = given if isinstance(given, list | tuple) else [given] * len(out)
        yield from ((n, piece, dim) for n, piece in zip(numbers, out, strict=False))
    elif name in _NORMS and rest and isinstance(rest[0], list | tuple):
        yield from ((number, args[0], d - len(rest[0])) for d, number in enumerate(rest[0]))
    elif name == "narrow" and len(rest) == 3:
        yield rest[2], out, rest[0]


def keeper(module: nn.Module, extent: Extent, book: Book) -> list[str]:
    """The whole numbers of a size that a module of the model's own keeps, by name.

    Those of which it is known what they are the size of are left out: the others are guesses.
    """
    if not own(module) or type(module) in book.silent:
        return []
    return [
        key
        for key, value in vars(module).items()
        if type(value) is int and value == extent.size and (extent.module, key) not in book.said
    ]


def assign(module: nn.Module, name: str, place: int, size: int) -> None:
    """Set an attribute, or one entry of a list."""
    if place >= 0:
        values = list(getattr(module, name))
        values[place] = size
        setattr(module, name, type(getattr(module, name))(values))
    else:
        setattr(module, name, size)
