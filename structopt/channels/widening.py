"""Run a model in double precision without a copy of it in double precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from structopt.channels.labels import Vector
from structopt.channels.nests import map_tensors, tensors_of
from structopt.channels.shadow import calls_experts, multiply, plain_kernels

Mask = Sequence[tuple[int, Vector]]  # dimensions, and the indices that are zero there
_Key = tuple[int, torch.Size]
_SMALL = (torch.float32, torch.float16, torch.bfloat16)
_OWN = "_structopt_own"  # marks a view of a weight that is lent


def wide(tensor: Tensor) -> Tensor:
    """A copy in the widest type that the device has."""
    if not tensor.is_floating_point():
        return tensor.clone()
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        made = torch.from_numpy(np.empty(tensor.shape))  # numpy asks the kernel for large pages
        return made.copy_(tensor.detach())
    return tensor.to(_widest(tensor), copy=True)


def _widest(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def masked(tensor: Tensor, lost: Mask) -> Tensor:
    """A wide copy that is zero at these indices of these dimensions."""
    made = wide(tensor)
    for dim, index in lost:
        where = torch.from_numpy(index).to(made.device)
        if dim == 0:
            made.index_fill_(0, where, 0)
            continue
        # No bit stays: across rows three times as fast as `index_fill_`, and NaN is zero too.
        whole = {4: torch.int32, 8: torch.int64}[made.element_size()]
        kept = torch.full((made.shape[dim],), -1, dtype=whole, device=made.device)
        kept[where] = 0
        made.view(whole).bitwise_and_(kept.reshape([-1] + [1] * (made.ndim - 1 - dim)))
    return made


def lendable(tensor: Tensor) -> bool:
    """Whether a copy of a model may share this weight, to be widened by `Wide` when it is met.

    Rows of numbers are not worth it; torch compares the type of a bias with the input's.
    """
    small = tensor.dtype in _SMALL and tensor.dtype != _widest(tensor)
    return small and tensor.ndim > 1 and isinstance(tensor, nn.Parameter)


class Wide(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps float64 where a model casts to float32, as many norms do.

    `lent` are small weights that belong to the caller, and what is masked of each: an operator
    that meets one is handed a wide copy for as long as it works. A model that writes to one of
    them is stopped before it does. A number has `size` bytes outside of here.
    """

    def __init__(self, lent: Sequence[tuple[Tensor, Mask]] = (), size: int = 4) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lent: Mapping[_Key, Mask] = {_key(tensor): mask for tensor, mask in lent}
        self.unit = 16 // size
        if len(self.lent) < len(lent):
            raise RuntimeError("two weights lie in the same memory: each has a mask of its own")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        met = self.lent and any(map(self._is_own, tensors_of((args, kwargs))))
        if met and any(map(self._is_own, tensors_of(list(_written(func, args, kwargs))))):
            raise RuntimeError("the model writes to its weights")
        if calls_experts(func, args):
            return self._experts(*map(self._wide, args[:3]))
        given, named = [*map(self._wide, args)], {k: self._wide(v) for k, v in kwargs.items()}
        if func is torch.ops.aten.convolution.default and _is_depthwise(*given):
            return _depthwise(*given[:6])
        try:
            out = func(*given, **named)
        except RuntimeError:  # numbers from outside of the model, of which no copy was made?
            small = [t for t in tensors_of((given, named)) if t.dtype in _SMALL]
            if not small or func._schema.is_mutable:
                raise
            given, named = map_tensors(
                (given, named), lambda t: t.to(_widest(t) if t.dtype in _SMALL else t.dtype)
            )
            out = func(*given, **named)
        for tensor in tensors_of(out) if met and func.is_view else ():
            setattr(tensor, _OWN, True)
        return out

    def _experts(self, tokens: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Torch's kernel takes no doubles, and no rows that are cut off within 16 bytes."""
        if any(n % self.unit for n in (tokens.stride(0), *weights.stride()) if n != 1):
            raise RuntimeError(
                f"grouped_mm multiplies tokens by experts whose widths are multiples of {self.unit}"
            )
        return multiply(tokens, weights, ends)

    def _is_own(self, tensor: Tensor) -> bool:
        return hasattr(tensor, _OWN) or (tensor.dtype in _SMALL and _key(tensor) in self.lent)

    def _wide(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            mask = self.lent.get(_key(value)) if value.dtype in _SMALL and self.lent else None
            return value if mask is None else masked(value, mask)
        if isinstance(value, list | tuple):
            return type(value)(map(self._wide, value))
        return torch.float64 if isinstance(value, torch.dtype) and value in _SMALL else value


def _key(tensor: Tensor) -> _Key:
    """The same for a weight and its `data`."""
    return tensor.data_ptr(), tensor.shape


def _is_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> bool:
    """Whether each channel has a small plane and a small kernel of its own, in double precision.

    Where no size is wrong, which torch has to say, and nothing lies in channels-last order.
    """
    transposed, _, groups = how[3:]
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float64 and not transposed
    if not (plain and x.ndim == 4 and {len(n) for n in how[:3]} == {2}):
        return False
    area = weight.shape[2] * weight.shape[3]
    fits = x.shape[1] == groups and weight.shape[:2] == (groups, 1)
    fits = fits and (bias is None or bias.shape == (groups,))
    lies = x.is_contiguous() and weight.is_contiguous() and weight.stride(1) == area
    return fits and lies and x.shape[2] * x.shape[3] <= 1024 and area <= 49


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """The sum over places of the kernel; torch takes the channels one by one, at ten times that."""
    x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    kernel = weight.shape[2:]
    spans = [
        range(0, size - step * (count - 1), by)
        for size, count, by, step in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    out = x.new_zeros(*x.shape[:2], *map(len, spans))
    for place in np.ndindex(*kernel):
        rows, columns = (
            slice(n * step, n * step + span[-1] + 1, by)
            for n, span, by, step in zip(place, spans, stride, dilation, strict=True)
        )
        out.addcmul_(x[:, :, rows, columns], weight[None, :, 0, place[0], place[1], None, None])
    return out if bias is None else out + bias[:, None, None]


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an operator writes to."""
    for place, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
        if argument.is_write:
            yield args[place] if place < len(args) else kwargs.get(argument.name)


@contextlib.contextmanager
def repeatable(seed: int = 0) -> Iterator[None]:
    """The same random numbers each time, plain kernels, and fractions in double precision."""
    usual = torch.get_default_dtype()
    with torch.random.fork_rng(), plain_kernels():
        torch.manual_seed(seed)
        if not torch.backends.mps.is_available():  # which has no float64
            torch.set_default_dtype(torch.float64)  # the root of a whole number has this type
        try:
            yield
        finally:
            torch.set_default_dtype(usual)
