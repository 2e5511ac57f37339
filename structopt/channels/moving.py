"""Rules of operators that move data or work element by element.

Those that move data, views first of all, have one rule: run them on the labels. Those that an
index tells where to move it are in `picking`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor, nn

from structopt.channels.calls import Call, flat, join, rule
from structopt.channels.following import follow
from structopt.channels.mirrors import Mirror


@rule("_unsafe_view", "repeat", "roll", "flip", "rot90", "pixel_shuffle", "pixel_unshuffle")
@rule("unfold_copy", "narrow_copy")
@rule("unsafe_split", "unsafe_chunk", "split_with_sizes_copy", "take_along_dim", "_reshape_alias")
def moves(call: Call) -> Any:
    """Run the op on indices, and look up which label arrived where."""
    source, rest = call[0], (call.args[1:], call.kwargs)
    if call.book.op in ("view", "_unsafe_view", "_reshape_alias"):
        move = lambda index: index.reshape(call[1])  # noqa: E731 - an expanded index may not view
    else:
        move = lambda index: call.func(index, *call.args[1:], **call.kwargs)  # noqa: E731
    plain = not any(isinstance(part, Tensor) for part in flat([*rest[0], *rest[1].values()]))
    known = (call.func, repr(rest)) if plain else None
    return follow(call.book, move, call.shapes[id(source)], call.mirror(source), known)


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
@rule("replication_pad1d", "replication_pad2d", "replication_pad3d", "im2col")
def float_moves(call: Call) -> Any:
    """As `moves`, for operators that take no integers."""
    move = lambda index: call.func(index.double(), *call.args[1:], **call.kwargs).long()  # noqa: E731
    return follow(call.book, move, call[0].shape, call.mirror(call[0]))


@rule("channel_shuffle", "native_channel_shuffle")
def shuffle(call: Call) -> Mirror:
    """A grid of groups and members is read member by member."""
    groups, mirror = call[1], list(call.mirror(call[0]))
    axis = mirror[1]
    if axis is not None:
        group, _ = call.book.split(axis, (groups, len(axis) // groups))
        call.book.extent(groups, group, "groups")
        mirror[1] = axis.reshape(groups, -1).T.ravel()
    return mirror


@rule("view_as_complex", "view_as_real")
def as_complex(call: Call) -> Mirror:
    """Two numbers to one, and back: the last dimension, of size 2, is not one of channels."""
    mirror = call.mirror(call[0])
    if call.book.op == "view_as_real":
        return [*mirror, None]
    call.book.freeze(mirror[-1], "the two parts of a complex number")
    return mirror[:-1]


@rule("tril", "triu")
def triangle(call: Call) -> Mirror:
    mirror = call.mirror(call[0])
    call.freeze_all(mirror[-2:], "a size of a triangle")
    return [*mirror[:-2], None, None]


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Mirror:
    """Labels stand one after the other along `dim`; along the others they are tied."""
    parts = [t for t in call[0] if t.shape != (0,)]  # the old empty placeholder joins nothing
    dim = call[1] % parts[0].ndim
    mirrors = [call.mirror(t) for t in parts]
    out: Mirror = [
        None if d == dim else join(call, [m[d] for m in mirrors]) for d in range(parts[0].ndim)
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


@rule("col2im")
def fold(call: Call) -> Mirror:
    """Windows of (channels × places) are added where they overlap; channels stay apart."""
    *batch, axis, places = call.mirror(call[0])
    count = call[2][0] * call[2][1]
    channel, place = call.book.split(axis, (call[0].shape[-2] // count, count))
    call.freeze_all([place, places], "a size of a kernel")
    return [*batch, channel, None, None]


@rule("stack")
def stack(call: Call) -> Mirror:
    """A new dimension of fixed size; all others are tied."""
    mirrors = [call.mirror(t) for t in call[0]]
    out = [join(call, [m[d] for m in mirrors]) for d in range(len(mirrors[0]))]
    out.insert(call[1] % (len(out) + 1), None)
    return out


# ------------------------------------------------------------------ element by element

_PRODUCTS = ("mul", "div", "prelu", "_prelu_kernel")
_SUMS = ("add", "sub", "rsub")

# Twice as much comes out of these where twice as much goes in, or nothing of it comes out. Others
# may seem to do so: a clip that no value of the example reaches, ELU where all are positive.
# fmt: off
_HOMOGENEOUS = {
    "relu", "leaky_relu", "rrelu_with_noise", "abs", "neg", "add", "sub", "rsub", "where",
    "masked_fill", "lerp", "mul", "div", "prelu", "_prelu_kernel", "addcmul", "addcdiv", "copy",
    "clone", "contiguous", "_to_copy", "detach", "alias", "lift_fresh", "native_dropout",
    "dropout", "feature_dropout", "fill", "zero", "zeros_like", "empty_like", "rand_like",
    "randn_like", "bernoulli", "normal", "uniform", "real", "imag", "conj", "complex", "sgn",
    "sign", "isnan", "isinf", "logical_and", "logical_or", "logical_not", "bitwise_and",
    "bitwise_or", "bitwise_not",
}
# fmt: on
_AGAINST = ("gt", "ge", "lt", "le", "eq", "ne", "clamp", "clamp_min", "clamp_max", "threshold")


def _is_homogeneous(call: Call) -> bool:
    op = call.book.op.rstrip("_")
    if op in _AGAINST:  # zero is the same number when all are doubled
        bounds = (*call.args[1:], *call.kwargs.values())
        return all(isinstance(b, Tensor) or b in (None, 0, math.inf, -math.inf) for b in bounds)
    if op in ("maximum", "minimum"):  # of channels, but not of channels and a bound
        return all(any(a is not None for a in call.mirror(t)) for t in call.args)
    return op in _HOMOGENEOUS


@rule("copy", "clone", "contiguous", "_to_copy", "lerp", "native_dropout", "fill", "zero")
@rule("bernoulli", "zeros_like", "ones_like", "empty_like", "full_like", "rrelu_with_noise")
@rule("_fused_moving_avg_obs_fq_helper", "fake_quantize_per_tensor_affine", "normal", "uniform")
@rule("detach", "alias", "masked_fill", "glu_jvp", "lift_fresh", "prelu", "_conj", "_neg_view")
@rule("fake_quantize_per_tensor_affine_cachemask")
@rule("hardswish", "hardtanh", "hardsigmoid", "leaky_relu", "log_sigmoid_forward", "mish", "elu")
@rule(
    "celu", "selu", "softplus", "softshrink", "hardshrink", "relu6", "silu", "gelu", "_prelu_kernel"
)
@rule("rand_like", "randn_like", "dropout", "feature_dropout", "threshold", "polar", "complex")
def pointwise(call: Call) -> Any:
    """Tie what meets; a dimension of size 1, expanded or not, is spread over the others.

    In a product, the first factor that is not a weight is the one that carries a scale.
    """
    tensors = [t for t in flat([*call.args, *call.kwargs.values()]) if isinstance(t, Tensor)]
    outputs = [call.out] if isinstance(call.out, Tensor) else list(call.out)
    shape = outputs[0].shape
    result: Mirror = []
    for d in range(-len(shape), 0):
        meet = [t for t in tensors if t.ndim >= -d and t.shape[d] == shape[d]]
        meet = [t for t in meet if t.stride(d) or call.mirror(t)[d] is not None] or meet
        if call.book.op.rstrip("_") in _PRODUCTS:
            meet.sort(key=lambda t: (id(t) in call.weights, not isinstance(t, nn.Parameter)))
            others = [call.mirror(t)[d] for t in meet[1:]]
            call.book.spent += [(axis, None) for axis in others if axis is not None]
        axes = [call.mirror(t)[d] for t in meet]
        if call.book.op in ("add", "add_") and len(meet) == 2:
            a, b = sorted(meet, key=lambda t: id(t) in call.weights)
            result.append(call.add(call.mirror(a)[d], call.mirror(b)[d]))
            continue
        result.append(join(call, axes) if axes else None)
    if call.book.op.rstrip("_") in _SUMS and len(call.weights) == len(call.shapes):
        _sum_weights(call, tensors, result)
    if not _is_homogeneous(call):
        why = call.book.why("an operator that is not positively homogeneous")
        call.book.bent += [(axis, why) for axis in result if axis is not None]
    if isinstance(call.out, Tensor):
        return result
    return [result if o.shape == shape else None for o in outputs]


def _sum_weights(call: Call, parts: list[Tensor], result: Mirror) -> None:
    """What reads the sum of two weights, as that of LoRA, reads both."""
    for part in parts:
        for axis, total in zip(reversed(call.mirror(part)), reversed(result), strict=False):
            if axis is not None and total is not None and axis is not total:
                call.book.summed.append((total, axis))


@rule("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full")
def fresh(call: Call) -> Any:
    """A tensor of equal values fits any channels: its labels wait to be tied."""
    if isinstance(call.out, Tensor) and call.out.is_floating_point():
        return [call.book.labels.new(n) if n > 1 else None for n in call.out.shape]
    return None
