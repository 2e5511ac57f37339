"""Rules of operators that sum products: the dimension summed over ties a reader to a maker."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from structopt.channels.calls import Call, join, rule
from structopt.channels.mirrors import Mirror, Score


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
        if group is not None and xm[1] is not None:
            book.spent.append((xm[1], group))
        if call[6] and group is not None and wm[0] is not None:
            book.apart.append((wm[0], group))
        if call[6]:
            out = book.grid(group, wm[1], (groups, weight.shape[1]))
    if isinstance(bias, Tensor):
        out = call.add(out, call.mirror(bias)[0])
    return [xm[0], out] + [None] * (x.ndim - 2)


@rule("torchvision::deform_conv2d")
def deformed(call: Call) -> Mirror:
    """A convolution that reads where offsets say."""
    x, weight, *places, bias = (call.mirror(call[n]) for n in range(5))
    if call[10] * call[11] > 1:  # groups of channels, groups of offsets
        call.freeze_everything()
        return [None] * 4
    call.freeze_all([*x[2:], *weight[2:], *(a for m in places for a in m)], "a size of a kernel")
    call.reads(call[1], 1)
    call.book.tie(x[1], weight[1])
    return [x[0], call.add(weight[0], bias[0] if bias else None), None, None]


def _contract(call: Call, a: Tensor, a_dim: int, b: Tensor, b_dim: int, by_width: bool) -> None:
    """Two dimensions meet and are gone. Between activations, that is a score of attention.

    Between two matrices of weights, as those of LoRA, channels that double count twice as well.
    """
    query, keys = call.mirror(a)[a_dim], call.mirror(b)[b_dim]
    axis = call.book.tie(query, keys)
    learned = [t for t in (a, b) if id(t) in call.weights]
    if not learned or (len(learned) == 2 and a.ndim > 1 and b.ndim > 1):
        call.book.extent(a.shape[a_dim], axis, "head_dim")
        if axis is not None and keys is not None:
            kind = "" if by_width else call.book.kind
            scales = [call.scaled.get(id(tensor), ()) for tensor in (a, b)]
            call.book.scored.append(Score(axis, call.picked.get(id(a), ()), kind, keys, *scales))
    call.reads(b, b_dim)
    call.reads(a, a_dim)


@rule("mm", "bmm", "mv", "dot", "vdot", "matmul")
def product(call: Call) -> Mirror:
    return _product(call, call[0], call[1])


@rule("addmm", "baddbmm", "addmv", "addbmm", "_sparse_addmm")
def add_product(call: Call) -> Mirror:
    out = _product(call, call[1], call[2])
    extra = call[0]
    if call[3] == 0:  # as in torch.sparse.mm
        return out
    for d in range(-len(out), 0):
        if extra.ndim >= -d and extra.shape[d] == call.out.shape[d]:
            axis = call.mirror(extra)[d]
            if axis is not None or out[d] is not None:
                out[d] = call.add(out[d], axis)
    return out


def _product(call: Call, a: Tensor, b: Tensor) -> Mirror:
    """(…, n, k) times (…, k, m): k is tied and gone, the others stay."""
    am, bm = call.mirror(a), call.mirror(b)
    _contract(call, a, -1, b, -2 if b.ndim > 1 else 0, False)
    batch = [join(call, [x, y]) for x, y in zip(am[:-2], bm[:-2], strict=True)]
    return batch + (am[-2:-1] if a.ndim > 1 else []) + (bm[-1:] if b.ndim > 1 else [])


@rule("_grouped_mm")
def experts(call: Call) -> Any:
    """(tokens, k) times (experts, k, m): each expert multiplies the tokens sent to it."""
    a, b = call[0], call[1]
    if a.ndim != 2 or b.ndim != 3 or call[3] is not None:
        return call.freeze_everything()
    expert, _, out = call.mirror(b)
    call.book.freeze(expert, "experts that the tokens are sent to")
    _contract(call, a, -1, b, -2, False)
    return [call.mirror(a)[0], out]


@rule("linear")
def linear(call: Call) -> Mirror:
    _contract(call, call[0], -1, call[1], 1, False)
    out = call.mirror(call[1])[0]
    if isinstance(call[2], Tensor):
        out = call.add(out, call.mirror(call[2])[0])
    return [*call.mirror(call[0])[:-1], out]


@rule("_cdist_forward", "_euclidean_dist")
def distances(call: Call) -> Mirror:
    """Between each of (…, n, k) and each of (…, m, k): a channel that is gone adds nothing."""
    a, b = call.mirror(call[0]), call.mirror(call[1])
    call.book.tie(a[-1], b[-1])
    batch: Mirror = []
    for d in range(-call.out.ndim, -2):  # one may serve a whole batch of the other
        sizes = [(mirror, t.shape[d]) for mirror, t in ((a, call[0]), (b, call[1])) if t.ndim >= -d]
        batch.append(join(call, [m[d] for m, size in sizes if size == call.out.shape[d]]))
    return [*batch, a[-2], b[-2]]


@rule("embedding")
def embedding(call: Call) -> Mirror:
    weight = call.mirror(call[0])
    call.book.freeze(weight[0], "rows that the input names")
    return [*call.mirror(call[1]), weight[1]]


@rule("_embedding_bag", "_embedding_bag_forward_only")
def bag(call: Call) -> Any:
    weight = call.mirror(call[0])
    call.book.freeze(weight[0], "rows that the input names")
    return [[None, weight[1]], None, None, None]


@rule("_trilinear")
def trilinear(call: Call) -> Mirror:
    """Three tensors are expanded to one shape and multiplied; some dimensions are summed over."""
    mirrors = []
    for position in range(3):
        mirror = list(call.mirror(call[position]))
        for d in sorted(call[3 + position]):
            mirror.insert(d, None)
        mirrors.append(mirror)
    out: Mirror = []
    for d, axes in enumerate(zip(*mirrors, strict=True)):
        met = [a for n, a in enumerate(axes) if d not in call[3 + n]]
        axis = join(call, met) if met else None
        if d not in call[6]:
            out.append(axis)
        for n in range(3) if d in call[6] else ():
            if d not in call[3 + n]:
                call.reads(call[n], d - sum(e < d for e in call[3 + n]))
    return out


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
@rule("_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math")
@rule("scaled_dot_product_attention")
def attention(call: Call) -> Any:
    """(…, heads, time, width): heads meet, the widths of query and key meet, the value's stays."""
    q, k, v = (call.mirror(call[i]) for i in range(3))
    if call[0].shape[-3] == call[1].shape[-3]:
        heads = join(call, [q[-3], k[-3], v[-3]])
    else:
        heads = None
        call.freeze_all([q[-3], k[-3], v[-3]], "heads that share keys")
    names = [a.name for a in call.func._schema.arguments]
    by_width = "scale" in names and call[names.index("scale")] is None
    _contract(call, call[0], -1, call[1], -1, by_width)
    call.freeze_all([q[-2], k[-2], v[-2]], "time of an attention")
    out = [*q[:-3], heads, None, v[-1]]
    return out if isinstance(call.out, Tensor) else [out] + [None] * (len(call.out) - 1)
