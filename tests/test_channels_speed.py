"""What is done by a shorter way gives what the longer way gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structopt.channels.shortcuts import shortcut
from structopt.channels.widening import _depthwise, _is_depthwise

A = torch.ops.aten
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# ------------------------------------------------------------------ shapes on `meta`


class Draw:
    """Tensors without values, of any order in memory, that mostly fit together."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw

    def one(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def shape(self, least: int = 0, most: int = 4) -> list[int]:
        return self.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4]), min_size=least, max_size=most))

    def rarely(self, other: Any, usual: Any) -> Any:
        return self.one(other, *[usual] * 5)

    def tensor(self, shape: Any, dtype: torch.dtype | None = None) -> Tensor:
        how = self.one("plain", "plain", "reversed", "channels last", "expanded")
        make = lambda sizes: torch.empty(sizes, dtype=dtype or self.one(*TYPES), device="meta")  # noqa: E731
        if how == "reversed":
            return make(shape[::-1]).permute([*range(len(shape))][::-1])
        if how == "channels last" and len(shape) == 4:
            return make(shape).contiguous(memory_format=torch.channels_last)
        if how == "expanded" and shape:
            return make([1, *shape[1:]]).expand(shape)
        return make(shape)


def unary(d: Draw) -> Any:
    return d.one(A.relu, A.relu_, A.silu, A.gelu, A.sigmoid).default, d.tensor(d.shape())


def binary(d: Draw) -> Any:
    op, x = d.one(A.add, A.add_, A.sub, A.mul, A.mul_, A.div, A.div_), d.tensor(d.shape())
    shape = [d.one(n, n, 1, d.rarely(2, n)) for n in x.shape][d.one(0, 0, 1) :]
    y = d.tensor([*d.one([], [], [2], [1]), *shape], d.rarely(torch.float64, x.dtype))
    number = d.rarely(True, 2.5) if d.one(True, False) else 2
    return d.one((op.Tensor, x, y), (op.Tensor, x, y), (op.Scalar, x, number))


def permuted(d: Draw) -> Any:
    """In any order and with gaps, and what is expanded to that."""
    sizes = d.draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=2, max_size=4))
    x = d.tensor([*sizes[:-1], d.one(sizes[-1], 2 * sizes[-1])], torch.float32)
    x = x[..., : sizes[-1]].permute(d.draw(st.permutations(range(len(sizes)))))
    x = d.rarely(x[:1].expand(x.shape), x)
    y = d.tensor([d.one(n, n, 1) for n in x.shape][d.one(0, 0, 1) :], torch.float32)
    op = d.one(A.add, A.mul)
    return d.one((op.Tensor, x, y), (op.Tensor, x, x), (op.Scalar, x, 2.5))


def softmax(d: Draw) -> Any:
    x, dim = d.tensor(d.shape()), d.one(-3, -2, -1, 0, 1, 2)
    last = d.rarely(torch.float32, None)
    return d.one(
        (A._softmax.default, x, dim, d.rarely(True, False)), (A._safe_softmax.default, x, dim, last)
    )


def mean(d: Draw) -> Any:
    dims = d.draw(st.lists(st.integers(-3, 3), max_size=3))
    return A.mean.dim, d.tensor(d.shape()), dims, d.one(True, False)


def roll(d: Draw) -> Any:
    places = d.draw(st.lists(st.integers(-2, 2), max_size=2))
    return A.roll.default, d.tensor(d.shape()), d.rarely([1], [1] * len(places)), places


def layer_norm(d: Draw) -> Any:
    x = d.tensor(d.shape())
    shape = [d.rarely(n + 1, n) for n in x.shape[d.one(0, 1, 2) :]]
    learned = [
        d.one(None, d.tensor(d.rarely([*shape, 1], shape), d.rarely(torch.float64, x.dtype)))
        for _ in range(2)
    ]
    return A.native_layer_norm.default, x, shape, *learned, 1e-5


def group_norm(d: Draw) -> Any:
    x = d.tensor(d.draw(st.lists(st.sampled_from([1, 2, 4]), min_size=3, max_size=4)))
    x = d.rarely(x[:0], x)
    n, c, area = x.shape[0], x.shape[1], x[0, 0].numel() if x.numel() else 0
    sizes = d.rarely(d.one([n + 1, c, area], [n, c + 1, area], [n, c, area + 1]), [n, c, area])
    learned = [
        d.one(None, d.tensor([d.rarely(c + 1, c)], d.rarely(torch.float64, x.dtype)))
        for _ in range(2)
    ]
    return A.native_group_norm.default, x, *learned, *sizes, d.one(1, 1, 2, c or 1), 1e-5


def product(d: Draw, op: Any = None) -> Any:
    (n, k, m), dtype = d.shape(3, 3), d.one(*TYPES)
    op = op or d.one(A.mm, A.bmm)
    first = [] if op is A.addmm else d.one([], [2])
    a = d.tensor([*first, n, k], dtype)
    inner, other = d.rarely(5, k), d.rarely(torch.float64, dtype)
    return op.default, a, d.tensor([*d.rarely([3], first), inner, m], other)


def sum_of_products(d: Draw) -> Any:
    op, a, b = product(d, A.addmm)
    n, m = a.shape[0], b.shape[-1]
    bias = d.one([m], [m], [n, m], [1, m], [m + 1], [])
    return op, d.tensor(bias, d.rarely(torch.float64, a.dtype)), a, b


def cat(d: Draw) -> Any:
    shape, dtype, dim = d.shape(), d.one(*TYPES), d.one(-2, -1, 0, 1, 2)
    parts = []
    for _ in range(d.one(1, 2, 3)):
        sizes = [
            d.one(0, 1, 3) if n == dim % max(len(shape), 1) else s for n, s in enumerate(shape)
        ]
        parts.append(d.tensor(d.rarely(d.one([0], [2]), sizes), d.rarely(torch.float64, dtype)))
    return A.cat.default, parts, dim


def convolution(d: Draw) -> Any:
    n, groups = d.one(1, 2, 3), d.one(1, 1, 2)
    channels, rows = groups * d.one(1, 2), d.rarely(3, groups * d.one(1, 2))
    x = d.tensor([d.one(0, 1, 2), d.rarely(channels + 1, channels), *d.shape(n, n)])
    weight = d.tensor([rows, channels // groups, *d.shape(n, n)], d.rarely(torch.float64, x.dtype))
    bias = d.one(None, d.tensor([d.rarely(rows + 1, rows)], x.dtype))
    how = [[d.one(*steps) for _ in range(n)] for steps in ((1, 2), (0, 1), (1, 2))]
    return A.convolution.default, x, weight, bias, *how, d.rarely(True, False), [0] * n, groups


def upsample(d: Draw) -> Any:
    op = d.one(
        *(A.upsample_nearest1d, A.upsample_linear1d, A.upsample_nearest2d, A.upsample_bilinear2d),
        *(A.upsample_bicubic2d, A.upsample_nearest3d, A.upsample_trilinear3d),
    )
    ndim = int(op.__name__[-2])
    x, sizes = d.tensor(d.shape(ndim + 2, ndim + 2)), d.shape(ndim, ndim)
    corners = [] if "nearest" in op.__name__ else [d.one(True, False)]
    if d.one(True, False):
        return op.default, x, d.rarely([*sizes, 2], sizes), *corners
    return d.one((op.vec, x, sizes, *corners, None), (op.vec, x, None, *corners, [2.0] * ndim))


def told(tensors: Any) -> list[Any]:
    """All that matters of a tensor without values; the stride of a dimension of size 1 does not."""
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in tensors]
    return [
        (t.shape, t.dtype, t.device.type, stride if t.numel() else None)
        for t, stride in zip(tensors, strides, strict=True)
    ]


OPERATORS = [
    unary,
    binary,
    permuted,
    softmax,
    mean,
    roll,
    layer_norm,
    group_norm,
    product,
    sum_of_products,
    cat,
    convolution,
    upsample,
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_shortcut_says_what_torch_says_or_nothing(operator):
    taken = 0

    @settings(max_examples=200)
    @given(st.data())
    def law(data):
        nonlocal taken
        op, *args = operator(Draw(data))
        short = shortcut(op._schema.name.removeprefix("aten::"), args, {})
        taken += short is not None
        if short is not None:
            assert told(short) == told(op(*args))  # which raises where nothing fits
            assert short is args[0] or not op._schema.name.endswith("_")

    law()
    assert taken > 20


def test_sizes_that_do_not_fit_a_norm_of_groups_are_left_to_torch():
    x, right = torch.empty(2, 4, 3, device="meta"), torch.empty(4, device="meta")
    other = torch.empty(5, device="meta")
    for weight, bias, *sizes in (
        *((other, None, 2, 4, 3, 2), (None, other, 2, 4, 3, 2), (right.double(), None, 2, 4, 3, 2)),
        *((right, right, 2, 4, 3, 3), (right, right, 2, 4, 3, 0), (right, right, 2, 4, 4, 2)),
        (None, None, 4, 2, 3, 1),
    ):
        assert shortcut("native_group_norm", (x, weight, bias, *sizes, 1e-5), {}) is None
    made = shortcut("native_group_norm", (x, right, right, 2, 4, 3, 2, 1e-5), {})
    assert told(made) == told(A.native_group_norm.default(x, right, right, 2, 4, 3, 2, 1e-5))


def test_a_batch_norm_and_arguments_by_name():
    x, out = torch.empty(2, 3, 4, 4, device="meta"), torch.empty(2, 3, 4, 4, device="meta")
    y, *_ = shortcut("native_batch_norm", (x, None, None, None, None, True, 0.1, 1e-5), {})
    assert told(y) == told(x)
    assert shortcut("add", (x, x), {"alpha": 2}) is not None
    assert shortcut("mean", (x, [1]), {"dtype": torch.float64}) is None
    assert shortcut("mul", (x, x), {"out": out}) is None
    assert shortcut("div", (x, x), {"rounding_mode": "floor"}) is None
    assert shortcut("cat", ([x, x],), {"out": out}) is None
    assert shortcut("gelu", (x,), {"approximate": "tanh"}) is not None
    assert shortcut("cumsum", (x, 1), {}) is None
    square = x[0, 0]
    assert shortcut("addmm", (square, square, square), {}) is not None
    assert shortcut("addmm_", (square, square, square), {}) is None  # it gives what it writes to


def test_how_a_product_of_two_rows_lies_is_left_to_torch():
    row = torch.empty(2, device="meta").as_strided((1, 1, 2), (1, 1, 1))
    column = torch.empty(4, device="meta").as_strided((4, 1, 1), (1, 4, 4))
    assert column.is_contiguous()
    assert row.is_contiguous()
    assert not (column * row).is_contiguous()
    assert shortcut("mul", (column, row), {}) is None
    assert shortcut("mul", (torch.empty(4, 1, 2, device="meta"), row), {}) is not None


# ------------------------------------------------------------------ depthwise, in double precision


@settings(max_examples=150)
@given(st.data())
def test_a_depthwise_layer_is_the_sum_over_its_kernel(data):
    n = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    channels = n(1, 5)
    how = [[n(1, 3), n(1, 3)], [n(0, 2), n(0, 2)], [n(1, 2), n(1, 2)]]
    x = torch.randn(n(1, 2), channels, n(5, 9), n(5, 9), dtype=torch.float64)
    weight = torch.randn(channels, 1, n(1, 3), n(1, 3), dtype=torch.float64)
    bias = torch.randn(channels, dtype=torch.float64) if n(0, 1) else None
    assert _is_depthwise(x, weight, bias, *how, False, [0, 0], channels)
    want = torch.convolution(x, weight, bias, *how, False, [0, 0], channels)
    torch.testing.assert_close(_depthwise(x, weight, bias, *how), want, rtol=1e-13, atol=1e-13)


def test_other_convolutions_are_left_to_torch():
    x, weight = torch.randn(1, 4, 5, 5).double(), torch.randn(4, 1, 3, 3).double()
    how = [1, 1], [1, 1], [1, 1]
    assert _is_depthwise(x, weight, None, *how, False, [0, 0], 4)
    assert not _is_depthwise(x, weight, None, *how, True, [0, 0], 4)
    assert not _is_depthwise(x.float(), weight.float(), None, *how, False, [0, 0], 4)
    assert not _is_depthwise(x, weight.repeat(2, 1, 1, 1), None, *how, False, [0, 0], 4)
    assert not _is_depthwise(x, weight.repeat(1, 2, 1, 1), None, *how, False, [0, 0], 2)
    assert not _is_depthwise(x, weight, None, [1], [1], [1], False, [0], 4)
    assert not _is_depthwise(x[..., 0], weight[..., 0], None, [1], [1], [1], False, [0], 4)
    assert not _is_depthwise(x.repeat(1, 1, 9, 9), weight, None, *how, False, [0, 0], 4)
    assert not _is_depthwise(x, weight.repeat(1, 1, 3, 3), None, *how, False, [0, 0], 4)


def test_wrong_sizes_of_a_depthwise_layer_are_left_to_torch_which_refuses_them():
    """A sum would spread one kernel, or one bias, over all channels."""
    x, weight = torch.randn(1, 4, 5, 5).double(), torch.randn(4, 1, 3, 3).double()
    how = [1, 1], [1, 1], [1, 1], False, [0, 0]
    for some, bias, groups in ((weight[:1], None, 1), (weight, torch.randn(1).double(), 4)):
        assert not _is_depthwise(x, some, bias, *how, groups)
        with pytest.raises(RuntimeError):
            torch.convolution(x, some, bias, *how, groups)


@pytest.mark.parametrize("which", [0, 1])
def test_a_depthwise_layer_in_channels_last_order_is_left_to_torch(which):
    """What comes out lies in that order too, as the model's own `view` may need it."""
    given = [torch.randn(2, 4, 5, 5).double(), torch.randn(4, 1, 3, 3).double()]
    given[which] = given[which].to(memory_format=torch.channels_last)
    how = [1, 1], [1, 1], [1, 1], False, [0, 0], 4
    assert not _is_depthwise(*given, None, *how)
    assert not torch.convolution(*given, None, *how).is_contiguous()
