"""Rules of norms, pooling, reductions, and what competes along a dimension."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from structopt.channels.calls import Call, rule
from structopt.channels.mirrors import Mirror
from structopt.channels.moving import pointwise

SPREADS = ("var", "std", "var_mean", "std_mean")


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
@rule("cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "native_batch_norm_legit")
@rule("_batch_norm_no_update")
def batch_norm(call: Call) -> Any:
    """Each channel by itself: weight, bias and statistics are tied to dimension 1."""
    mirror = list(call.mirror(call[0]))
    given = mirror[1]
    for position in (4, 3, 2, 1):  # the weight last: what comes out is its
        tensor = call[position]
        if isinstance(tensor, Tensor):
            mirror[1] = call.add(call.mirror(tensor)[0], mirror[1])
    if given is not None and isinstance(call[1], Tensor):
        call.book.spent.append((given, None))
        call.scales = [axis for tensor in (call[1], call[2]) for axis in call.mirror(tensor)]
    call.freeze_all(mirror[2:], "a size that a norm averages over")
    return [[mirror[0], mirror[1]] + [None] * (len(mirror) - 2)] + [None] * (len(call.out) - 1)


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(call: Call) -> Any:
    """The last dimensions are averaged over: exact up to the statistics of what is kept."""
    mirror = list(call.mirror(call[0]))
    call.scales = []
    for d in range(-len(call[1]), 0):
        for tensor in (call[2], call[3] if "layer" in call.book.op else None):
            call.scales += call.mirror(tensor)[d:][:1]
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


@rule(
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"
)
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


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> Any:
    """Rows of a weight, each divided by its norm: entries that are zero do not count."""
    direction, length = list(call.mirror(call[0])), call.mirror(call[1])
    direction[call[2]] = call.book.tie(direction[call[2]], length[call[2]])
    return [direction, None]


# ------------------------------------------------------------------ along one dimension


def _dims(call: Call, argument: Any, ndim: int) -> list[int]:
    given = (
        [] if argument is None else argument if isinstance(argument, list | tuple) else [argument]
    )
    return [int(d) % max(ndim, 1) for d in given] or list(range(ndim))


@rule("sum", "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod")
@rule(
    "any", "all", "argmax", "argmin", "logsumexp", "linalg_vector_norm", "norm", "nansum", "median"
)
@rule("nanmedian", "mode", "kthvalue", "aminmax")
def reduction(call: Call) -> Any:
    """The dimensions reduced are gone. A sum or a norm of channels may lose some; nothing else.

    Mean squares and spreads are statistics of a norm, which averages over those that stay. So is
    a mean, where it is taken from these channels themselves, which the next operator shows.
    """
    x, op = call[0], call.book.op
    names = [a.name for a in call.func._schema.arguments]
    if op in ("max", "min") and isinstance(call[1] if len(names) > 1 else None, Tensor):
        return pointwise(call)
    over = _dims(call, call[names.index("dim")] if "dim" in names else None, x.ndim)
    keep = bool(call[names.index("keepdim")]) if "keepdim" in names else False
    mirror = call.mirror(x)
    if (op == "mean" and id(x) in call.squares) or op in SPREADS:
        for d in over:
            call.book.averages(mirror[d])
    elif op not in ("sum", "nansum", "linalg_vector_norm", "norm"):
        call.owe([mirror[d] for d in over], "an average or a choice among channels")
    out = [None if d in over else axis for d, axis in enumerate(mirror) if keep or d not in over]
    return out if isinstance(call.out, Tensor) else [list(out) for _ in call.out]


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "cumprod")
@rule("sort", "topk", "logcumsumexp", "cummax", "cummin", "cumsum")
def along(call: Call) -> Any:
    """Indices along one dimension depend on one another: that one is frozen."""
    names = [a.name for a in call.func._schema.arguments]
    dim = call[names.index("dim")] % max(call[0].ndim, 1)
    out = list(call.mirror(call[0]))
    call.book.freeze(out[dim], "channels that compete along one dimension")
    out[dim] = None
    return out if isinstance(call.out, Tensor) else [list(out) for _ in call.out]


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fourier(call: Call) -> Mirror:
    """The dimensions that are transformed are mixed; the others stay."""
    mirror = list(call.mirror(call[0]))
    for d in call[1]:
        call.book.freeze(mirror[d], "mixed by a Fourier transform")
        mirror[d] = None
    return mirror


@rule("glu")
def gated(call: Call) -> Mirror:
    """The second half of the channels opens and shuts the first."""
    out, dim = list(call.mirror(call[0])), call[1] % call[0].ndim
    axis = out[dim]
    if axis is not None:
        half = len(axis) // 2
        out[dim] = call.book.tie(axis[:half], axis[half:])
        call.book.extent(half, out[dim])
    return out
