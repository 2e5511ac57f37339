"""What each operator does to labels.

A rule gets a `Call` and returns the mirror of each output. It *ties* labels that must stay the
same channels, and *freezes* what may not change. An operator without a rule freezes all that it
touches. Operators that move data, views first of all, have one rule: run them on the labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structopt.channels.mirrors import Axis, Book, Mirror, follow


@dataclass
class Call:
    """One operator at work: its arguments, its result, and the mirrors of its arguments."""

    book: Book
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mirrors: dict[int, Mirror]
    out: Any = None
    shapes: dict[int, torch.Size] = field(default_factory=dict)  # before an in-place view
    picked: dict[int, tuple[int, ...]] = field(default_factory=dict)  # labels chosen by number
    weights: set[int] = field(default_factory=set)  # arguments made of parameters only

    def __getitem__(self, position: int) -> Any:
        """The argument at this position, or its default."""
        if position < len(self.args):
            return self.args[position]
        argument = self.func._schema.arguments[position]
        return self.kwargs.get(argument.name, argument.default_value)

    def mirror(self, tensor: Any) -> Mirror:
        if not isinstance(tensor, Tensor):
            return []
        return self.mirrors.get(id(tensor)) or [None] * tensor.ndim

    def freeze_all(self, mirror: Sequence[Axis], text: str) -> None:
        for axis in mirror:
            self.book.freeze(axis, text)

    def add(self, axis: Axis, bias: Axis) -> Axis:
        """Tie a bias to the rows whose results it is added to."""
        if axis is not None and bias is not None:
            self.book.beside.append((axis, bias))
        return self.book.tie(axis, bias)

    def reads(self, tensor: Tensor, dim: int) -> None:
        """Note that this dimension of a weight is summed over: its entries are a reader's."""
        axis = self.mirror(tensor)[dim]
        if axis is not None and id(tensor) in self.weights:
            self.book.readers.append(axis)


Rule = Callable[[Call], Any]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def find(func: Any) -> Rule:
    """The rule of an operator, by its name, its tag or its being a view."""
    name = func._schema.name.removeprefix("aten::")
    known = _RULES.get(name) or _RULES.get(name.rstrip("_"))
    if known is not None:
        return known
    if func.is_view or torch.Tag.inplace_view in func.tags:
        return moves
    if torch.Tag.pointwise in func.tags:
        return pointwise
    return unknown


def unknown(call: Call) -> None:
    for mirror in call.mirrors.values():
        call.freeze_all(mirror, "no rule for this operator")


# ------------------------------------------------------------------ data that only moves


@rule("_unsafe_view", "repeat", "roll", "flip", "index_select", "pixel_shuffle", "unfold_copy")
@rule("pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "tril", "triu", "im2col")
@rule("unsafe_split", "unsafe_chunk", "split_with_sizes_copy", "take_along_dim", "_reshape_alias")
def moves(call: Call) -> Any:
    """Run the op on indices, and look up which label arrived where."""
    source = call[0]
    if call.book.op in ("view", "_unsafe_view", "_reshape_alias"):
        move = lambda index: index.reshape(call[1])  # noqa: E731 - an expanded index may not view
    else:
        move = lambda index: call.func(index, *call.args[1:], **call.kwargs)  # noqa: E731
    return follow(call.book, move, call.shapes[id(source)], call.mirror(source))


@rule("constant_pad_nd")
def pad(call: Call) -> Mirror:
    """Padding along labelled dimensions makes channels, which stay: its width is Python's."""
    out = list(call.mirror(call[0]))
    for place, (left, right) in enumerate(zip(call[1][::2], call[1][1::2], strict=True)):
        axis = out[-1 - place]
        if axis is not None and (left or right):
            axis = axis[max(-left, 0) : len(axis) - max(-right, 0)]
            made = call.book.labels.new(max(left, 0) + max(right, 0))
            call.book.freeze(made, "a channel made by padding")
            out[-1 - place] = np.concatenate([made[: max(left, 0)], axis, made[max(left, 0) :]])
    return out


@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
@rule("replication_pad1d", "replication_pad2d", "replication_pad3d")
def float_moves(call: Call) -> Any:
    """As `moves`, for operators that take no integers."""
    move = lambda index: call.func(index.double(), *call.args[1:], **call.kwargs).long()  # noqa: E731
    return follow(call.book, move, call[0].shape, call.mirror(call[0]))


@rule("index", "gather")
def gather(call: Call) -> Any:
    """As `moves`, where the indices are known; dimensions of the index itself stay unlabelled."""
    source, *rest = call.args
    known = [i for i in _flat(rest) if isinstance(i, Tensor)]
    if any(i.is_meta for i in known):
        return unknown(call)
    for index in known:
        call.freeze_all(call.mirror(index), "used as an index")
    move = lambda grid: call.func(grid, *_cpu(rest), **call.kwargs)  # noqa: E731
    return follow(call.book, move, source.shape, call.mirror(source))


def _flat(tree: Any) -> list[Any]:
    return [x for part in tree for x in _flat(part)] if isinstance(tree, list | tuple) else [tree]


def _cpu(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return type(tree)(_cpu(part) for part in tree)
    return tree.cpu() if isinstance(tree, Tensor) else tree


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Mirror:
    """Labels stand one after the other along `dim`; along the others they are tied."""
    parts = [t for t in call[0] if t.shape != (0,)]  # the old empty placeholder joins nothing
    dim = call[1] % parts[0].ndim
    mirrors = [call.mirror(t) for t in parts]
    out: Mirror = [
        None if d == dim else _join(call, [m[d] for m in mirrors]) for d in range(parts[0].ndim)
    ]
    axes = [m[dim] for m in mirrors]
    if all(axis is None for axis in axes):
        out[dim] = None
        return out
    for number, axis in enumerate(axes):
        if axis is None:
            axes[number] = made = call.book.labels.new(parts[number].shape[dim])
            call.book.freeze(made, "joined from a dimension of fixed size")
    out[dim] = np.concatenate([a for a in axes if a is not None])
    return out


@rule("stack")
def stack(call: Call) -> Mirror:
    """A new dimension of fixed size; all others are tied."""
    mirrors = [call.mirror(t) for t in call[0]]
    out = [_join(call, [m[d] for m in mirrors]) for d in range(len(mirrors[0]))]
    out.insert(call[1] % (len(out) + 1), None)
    return out


def _join(call: Call, axes: Sequence[Axis]) -> Axis:
    """Tie the same dimension of several tensors."""
    first = axes[0]
    for axis in axes[1:]:
        if first is not None or axis is not None:
            first = call.book.tie(first, axis)
    return first


# ------------------------------------------------------------------ element by element


@rule("copy", "clone", "contiguous", "_to_copy", "lerp", "native_dropout", "fill", "zero")
@rule("bernoulli", "cumsum", "zeros_like", "ones_like", "empty_like", "full_like", "rrelu_with_noise")
@rule("_fused_moving_avg_obs_fq_helper", "fake_quantize_per_tensor_affine", "normal", "uniform")
@rule("detach", "alias", "masked_fill", "glu_jvp", "lift_fresh", "prelu")
@rule("hardswish", "hardtanh", "hardsigmoid", "leaky_relu", "log_sigmoid_forward", "mish", "elu")
@rule("celu", "selu", "softplus", "softshrink", "hardshrink", "relu6", "silu", "gelu", "_prelu_kernel")
@rule( "rand_like", "randn_like", "dropout", "feature_dropout", "threshold")
def pointwise(call: Call) -> Any:
    """Tie what meets; a dimension of size 1 is spread over the others and keeps out."""
    tensors = [t for t in _flat([*call.args, *call.kwargs.values()]) if isinstance(t, Tensor)]
    outputs = [call.out] if isinstance(call.out, Tensor) else list(call.out)
    shape = outputs[0].shape
    result: Mirror = []
    for d in range(-len(shape), 0):
        meet = [t for t in tensors if t.ndim >= -d and t.shape[d] == shape[d]]
        axes = [call.mirror(t)[d] for t in meet]
        if call.book.op in ("add", "add_") and len(meet) == 2:
            a, b = sorted(meet, key=lambda t: id(t) in call.weights)
            result.append(call.add(call.mirror(a)[d], call.mirror(b)[d]))
            continue
        result.append(_join(call, axes) if axes else None)
    if isinstance(call.out, Tensor):
        return result
    return [result if o.shape == shape else None for o in outputs]


@rule("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full")
def fresh(call: Call) -> Any:
    """A tensor of equal values fits any channels: its labels wait to be tied."""
    if isinstance(call.out, Tensor) and call.out.is_floating_point():
        return [call.book.labels.new(n) if n > 1 else None for n in call.out.shape]
    return None


# ------------------------------------------------------------------ sums of products


@rule("convolution")
def convolution(call: Call) -> Mirror:
    """Input channels meet the weight's; with groups, both are grids of groups and members."""
    book, x, weight, bias, groups = call.book, call[0], call[1], call[2], call[8]
    xm, wm = call.mirror(x), call.mirror(weight)
    call.freeze_all([*xm[2:], *wm[2:]], "a size of a kernel")
    made, read = (1, 0) if call[6] else (0, 1)  # a transposed one swaps the weight's channels
    call.reads(weight, read)
    if groups == 1:
        book.tie(xm[1], wm[read])
        out = wm[made]
    else:
        x_group, x_member = book.split(xm[1], (groups, x.shape[1] // groups))
        w_group, other = book.split(wm[0], (groups, weight.shape[0] // groups))
        group = book.tie(x_group, w_group)
        book.tie(x_member, other if call[6] else wm[1])
        book.extent(groups, group, "groups")
        out = wm[0]
        if call[6]:
            out = _grid(book, group, wm[1], groups, weight.shape[1])
    if isinstance(bias, Tensor):
        out = call.add(out, call.mirror(bias)[0])
    return [xm[0], out] + [None] * (x.ndim - 2)


def _grid(book: Book, outer: Axis, inner: Axis, rows: int, columns: int) -> Axis:
    """The labels of a flattened grid."""
    if outer is None and inner is None:
        return None
    one = book.labels.new(1)
    book.freeze(one, "fixed")
    first = np.repeat(outer if outer is not None else np.repeat(one, rows), columns)
    second = np.tile(inner if inner is not None else np.repeat(one, columns), rows)
    if outer is None or inner is None:
        return second if outer is None else first
    return book.labels.pair(first, second)


def _contract(call: Call, a: Tensor, a_dim: int, b: Tensor, b_dim: int) -> None:
    axis = call.book.tie(call.mirror(a)[a_dim], call.mirror(b)[b_dim])
    if not call.weights & {id(a), id(b)}:
        call.book.extent(a.shape[a_dim], axis, "head_dim")
        if axis is not None:
            call.book.scored.append((axis, call.picked.get(id(a), ())))
    call.reads(b, b_dim)
    call.reads(a, a_dim)


@rule("mm", "bmm", "mv", "dot", "matmul")
def product(call: Call) -> Mirror:
    return _product(call, call[0], call[1])


@rule("addmm", "baddbmm", "addmv", "addbmm")
def add_product(call: Call) -> Mirror:
    out = _product(call, call[1], call[2])
    extra = call[0]
    for d in range(-len(out), 0):
        if extra.ndim >= -d and extra.shape[d] == call.out.shape[d]:
            axis = call.mirror(extra)[d]
            if axis is not None or out[d] is not None:
                out[d] = call.add(out[d], axis)
    return out


def _product(call: Call, a: Tensor, b: Tensor) -> Mirror:
    """(…, n, k) times (…, k, m): k is tied and gone, the others stay."""
    am, bm = call.mirror(a), call.mirror(b)
    _contract(call, a, -1, b, -2 if b.ndim > 1 else 0)
    batch = [_join(call, [x, y]) for x, y in zip(am[:-2], bm[:-2], strict=True)]
    return batch + (am[-2:-1] if a.ndim > 1 else []) + (bm[-1:] if b.ndim > 1 else [])


@rule("linear")
def linear(call: Call) -> Mirror:
    _contract(call, call[0], -1, call[1], 1)
    out = call.mirror(call[1])[0]
    if isinstance(call[2], Tensor):
        out = call.add(out, call.mirror(call[2])[0])
    return [*call.mirror(call[0])[:-1], out]


@rule("embedding")
def embedding(call: Call) -> Mirror:
    weight = call.mirror(call[0])
    call.book.freeze(weight[0], "rows that the input names")
    return [*call.mirror(call[1]), weight[1]]


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
@rule("_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math")
@rule("scaled_dot_product_attention")
def attention(call: Call) -> Any:
    """(…, heads, time, width): heads meet, the widths of query and key meet, the value's stays."""
    q, k, v = (call.mirror(call[i]) for i in range(3))
    if call[0].shape[-3] == call[1].shape[-3]:
        heads = _join(call, [q[-3], k[-3], v[-3]])
    else:
        heads = None
        call.freeze_all([q[-3], k[-3], v[-3]], "heads that share keys")
    _contract(call, call[0], -1, call[1], -1)
    call.freeze_all([q[-2], k[-2], v[-2]], "time of an attention")
    out = [*q[:-3], heads, None, v[-1]]
    return out if isinstance(call.out, Tensor) else [out] + [None] * (len(call.out) - 1)


# ------------------------------------------------------------------ norms


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
@rule("cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "native_batch_norm_legit")
@rule("_batch_norm_no_update")
def batch_norm(call: Call) -> Any:
    """Each channel by itself: weight, bias and statistics are tied to dimension 1."""
    mirror = list(call.mirror(call[0]))
    for position in range(1, 5):
        tensor = call[position]
        if isinstance(tensor, Tensor):
            mirror[1] = call.book.tie(mirror[1], call.mirror(tensor)[0])
    call.freeze_all(mirror[2:], "a size that a norm averages over")
    return [[mirror[0], mirror[1]] + [None] * (len(mirror) - 2)] + [None] * (len(call.out) - 1)


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(call: Call) -> Any:
    """The last dimensions are averaged over: exact up to the statistics of what is kept."""
    mirror = list(call.mirror(call[0]))
    for d in range(-len(call[1]), 0):
        for tensor in (call[2], call[3] if "layer" in call.book.op else None):
            if isinstance(tensor, Tensor) and mirror[d] is not None:
                mirror[d] = call.book.tie(mirror[d], call.mirror(tensor)[d])
            elif isinstance(tensor, Tensor):
                call.book.freeze(call.mirror(tensor)[d], "meets a dimension of fixed size")
        call.book.averages(mirror[d])
    return [mirror, None, None] if not isinstance(call.out, Tensor) else mirror


@rule("native_group_norm")
def group_norm(call: Call) -> Any:
    """Channels are a grid of groups and members; each group is averaged over."""
    mirror, groups = list(call.mirror(call[0])), call[6]
    for tensor in (call[1], call[2]):
        if isinstance(tensor, Tensor):
            mirror[1] = call.book.tie(mirror[1], call.mirror(tensor)[0])
    group, member = call.book.split(mirror[1], (groups, call[0].shape[1] // groups))
    call.book.extent(groups, group, "num_groups")
    call.book.averages(member)
    call.freeze_all(mirror[2:], "a size that a norm averages over")
    return [mirror[:2] + [None] * (len(mirror) - 2), None, None]


# ------------------------------------------------------------------ each channel by itself


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices")
@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d")
@rule("upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "adaptive_avg_pool1d")
@rule("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa")
@rule("_upsample_bicubic2d_aa", "fractional_max_pool2d", "max_unpool2d", "mkldnn_max_pool2d")
def local(call: Call) -> Any:
    """Pooling and resizing: the last 1, 2 or 3 dimensions change, each channel by itself."""
    found = re.search(r"([123])d", call.book.op)
    spatial = int(found.group(1)) if found else 2
    mirror = call.mirror(call[0])
    call.freeze_all(mirror[-spatial:], "a size of a window")
    out = [*mirror[:-spatial], *[None] * spatial]
    return out if isinstance(call.out, Tensor) else [list(out) for _ in call.out]


@rule("grid_sampler_2d", "grid_sampler_3d")
def sample(call: Call) -> Mirror:
    """Each channel by itself, at places that a grid names."""
    mirror = call.mirror(call[0])
    call.freeze_all([*mirror[2:], *call.mirror(call[1])], "a size of a sampled grid")
    return [mirror[0], mirror[1]] + [None] * (call.out.ndim - 2)


@rule("roi_align", "roi_pool", "torchvision::roi_align", "torchvision::roi_pool")
def regions(call: Call) -> Any:
    mirror = call.mirror(call[0])
    call.freeze_all([*mirror[2:], *call.mirror(call[1])], "a size of a region")
    out: Mirror = [None, mirror[1], None, None]
    return out if isinstance(call.out, Tensor) else [out, list(out)]


# ------------------------------------------------------------------ along one dimension


def _dims(call: Call, argument: Any, ndim: int) -> list[int]:
    given = [] if argument is None else argument if isinstance(argument, list | tuple) else [argument]
    return [int(d) % max(ndim, 1) for d in given] or list(range(ndim))


@rule("sum", "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod")
@rule("any", "all", "argmax", "argmin", "logsumexp", "linalg_vector_norm", "norm", "nansum", "median")
def reduction(call: Call) -> Any:
    """The dimensions reduced are gone. A sum or a norm of channels may lose some; nothing else."""
    x, op = call[0], call.book.op
    position = 2 if op in ("linalg_vector_norm", "norm") else 1
    names = [a.name for a in call.func._schema.arguments]
    if op in ("max", "min") and isinstance(call[1] if len(names) > 1 else None, Tensor):
        return pointwise(call)
    over = _dims(call, call[position] if "dim" in names else None, x.ndim)
    keep = bool(call[names.index("keepdim")]) if "keepdim" in names else False
    mirror = call.mirror(x)
    if op not in ("sum", "nansum", "linalg_vector_norm", "norm"):
        call.freeze_all([mirror[d] for d in over], "an average or a choice among channels")
    out = [None if d in over else axis for d, axis in enumerate(mirror) if keep or d not in over]
    return out if isinstance(call.out, Tensor) else [list(out) for _ in call.out]


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "cumsum", "cumprod")
@rule("glu", "sort", "topk", "logcumsumexp", "cummax")
def along(call: Call) -> Any:
    """Indices along one dimension depend on one another: that one is frozen."""
    names = [a.name for a in call.func._schema.arguments]
    dim = call[names.index("dim")] % max(call[0].ndim, 1)
    out = list(call.mirror(call[0]))
    call.book.freeze(out[dim], "channels that compete along one dimension")
    out[dim] = None
    return out if isinstance(call.out, Tensor) else [list(out) for _ in call.out]
