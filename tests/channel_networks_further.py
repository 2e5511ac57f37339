"""More networks with their channels worked out by hand: the ways that people write attention anew,
and operators beside the usual ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from channel_networks import (
    IMAGE,
    WIDTH,
    Case,
    Fn,
    columns,
    conv,
    decoded,
    each,
    group,
    images,
    one,
    rows,
    table,
)  # fmt: skip
from torch import Tensor, nn
from torchvision.ops import DeformConv2d


def normed_queries() -> nn.Module:
    """Queries and keys pass norms of their own, which undo any scale of the rows before them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.read(x)
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, 2, T, 4)
        mixed = F.scaled_dot_product_attention(self.qn(q), self.kn(k), v)
        return self.write(mixed.transpose(1, 2).flatten(2))

    made = Fn(
        forward, read=nn.Linear(3, 8), qkv=nn.Linear(8, 24), qn=nn.LayerNorm(4), kn=nn.RMSNorm(4),
        write=nn.Linear(8, 5),
    )  # fmt: skip
    made.heads = 2
    return made


def batch_normed_queries() -> nn.Module:
    """Pixels that attend to each other; queries and keys pass a batch norm each."""

    def forward(self: Any, x: Tensor) -> Tensor:
        made = self.qn(self.q(x)), self.kn(self.k(x)), self.v(x)
        q, k, v = (t.flatten(2).transpose(1, 2).unsqueeze(1) for t in made)  # (B, 1, HW, C)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.write(mixed.transpose(2, 3).reshape(len(x), -1, *x.shape[2:]))

    return Fn(forward, q=conv(3, 4), k=conv(3, 4), v=conv(3, 8), qn=nn.BatchNorm2d(4),
              kn=nn.BatchNorm2d(4), write=conv(8, 5))  # fmt: skip


def sparse_graph(self: Any, x: Tensor) -> Tensor:
    """Each node hears of the one before it."""
    graph = torch.eye(4, dtype=x.dtype, device=x.device).roll(1, 0).to_sparse()
    heard = torch.sparse.mm(graph, self.a(x))
    return self.b(torch.sparse.addmm(self.skip(x), graph, heard).relu())


def complex_rotary() -> nn.Module:
    """Pairs of numbers turned as complex ones."""

    def turn(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1], device=x.device)[:, None, None].to(x.dtype)  # (T, 1, 1)
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(3)

    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.read(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        )  # (B, T, 2, 4)
        q, k, v = (y.transpose(1, 2) for y in (turn(q), turn(k), v))
        return self.write(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    made = Fn(forward, read=nn.Linear(3, 8), qkv=nn.Linear(8, 24), write=nn.Linear(8, 5))
    made.heads = 2
    return made


def learned_queries() -> nn.Module:
    """A decoder that starts from parameters, as in DETR."""

    def forward(self: Any, x: Tensor) -> Tensor:
        queries = self.queries[None].repeat(len(x), 1, 1)
        return self.write(self.layer(queries, self.memory(x)))

    layer = nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True)
    return Fn(
        forward, queries=table(4, 8), memory=nn.Linear(3, 8), layer=layer, write=nn.Linear(8, 5)
    )


def bare_attention() -> nn.Module:
    """Parameters of three dimensions, multiplied by einsum."""

    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bhtd", x, w) for w in (self.wq, self.wk, self.wv))
        scores = torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1)
        return torch.einsum("bhts,bhsd,hdc->btc", scores, v, self.wo)

    return Fn(forward, wq=table(3, 2, 4), wk=table(3, 2, 4), wv=table(3, 2, 5), wo=table(2, 5, 6))


def projected() -> nn.Module:
    rnn = nn.LSTM(3, 12, proj_size=4, batch_first=True)
    return Fn(lambda self, x: self.head(self.rnn(x)[0]), rnn=rnn, head=nn.Linear(4, 5))


def messages() -> nn.Module:
    """Each node adds what the nodes before it send."""

    def forward(self: Any, x: Tensor) -> Tensor:
        source, target = torch.tensor([[0, 0, 1, 2], [1, 2, 2, 0]], device=x.device)
        sent = self.send(x).relu()
        heard = torch.zeros_like(sent).index_add(0, target, sent[source])
        first = heard.gather(0, torch.zeros_like(heard, dtype=torch.long))
        return self.head(heard.cumsum(0) + first)

    return Fn(forward, send=nn.Linear(3, 8), head=nn.Linear(8, 5))


def expanded() -> nn.Module:
    """Spatial attention and a norm of each position, both expanded before they multiply."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.one(x)
        x = x * self.where(x).sigmoid().expand_as(x)
        return self.two(F.normalize(x, dim=1))

    return Fn(forward, one=conv(3, 8), where=conv(8, 1), two=conv(8, 5))


def unequal() -> nn.Module:
    """Pieces of which the first would divide the whole."""

    def forward(self: Any, x: Tensor) -> Tensor:
        step, b, c = self.read(x).split(self.sizes, -1)
        return self.one(step) + self.two(b * c)

    made = Fn(forward, read=nn.Linear(3, 10), one=nn.Linear(2, 5), two=nn.Linear(4, 5))
    made.sizes = [2, 4, 4]
    return made


def spectrum() -> nn.Module:
    """A filter in the frequencies of each channel."""

    def forward(self: Any, x: Tensor) -> Tensor:
        z = torch.fft.rfft2(self.one(x), norm="ortho")
        z = z * torch.view_as_complex(self.filter)
        return self.two(torch.fft.irfft2(z, s=x.shape[2:], norm="ortho"))

    return Fn(forward, one=conv(3, 8), filter=table(8, 6, 4, 2), two=conv(8, 5))


def deformed() -> nn.Module:
    """A convolution that reads where a second one says, as much as a third one says."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        return self.two(self.deform(x, self.where(x), self.much(x).sigmoid()).relu())

    return Fn(forward, one=conv(3, 8), where=conv(8, 18), much=conv(8, 9),
              deform=DeformConv2d(8, 6, 3, padding=1), two=conv(6, 5))  # fmt: skip


def pairs(c: int) -> list[int]:
    """Rows of pair c of 2, in queries, keys and values of two heads."""
    return [i for i in range(24) if i % 4 // 2 == c]


WORDS = (2, 4, 3)
HEADS, ALL = each(4), columns("qkv.weight")

FURTHER: dict[str, Case] = {
    "normed queries": Case(
        normed_queries,
        WORDS,
        [
            group(8, ALL),
            group(2, columns("write.weight", HEADS)),
            group(
                4, columns("write.weight", WIDTH), norms=[("qn", one), ("kn", one)], widens=False
            ),
        ],
    ),
    "batch-normed queries": images(
        batch_normed_queries,
        group(4, rows("qn.weight"), rows("qn.bias")),
        group(8, columns("write.weight")),
    ),
    "complex rotary": Case(
        complex_rotary,
        WORDS,
        [
            group(8, ALL),
            group(2, columns("write.weight", HEADS)),
            group(
                2,
                columns("write.weight", lambda c: [i for i in range(8) if i % 4 // 2 == c]),
                rows("qkv.weight", pairs),
                rows("qkv.bias", pairs),
            ),
        ],
    ),
    "learned queries": Case(
        learned_queries,
        WORDS,
        [
            group(12, columns("layer.linear2.weight")),
            decoded(2, HEADS),
            decoded(
                4,
                WIDTH,
                *(
                    rows(f"layer.{name}.in_proj_{kind}", WIDTH)
                    for name in ("self_attn", "multihead_attn")
                    for kind in ("weight", "bias")
                ),
            ),
        ],
    ),
    "bare attention": Case(
        bare_attention,
        WORDS,
        [
            group(2, rows("wo")),
            group(4, ("wq", 2, one), ("wk", 2, one)),
            group(5, columns("wo")),
        ],
    ),
    "distances": Case(
        lambda: Fn(
            lambda s, x: s.write(torch.cdist(s.read(x), s.codes)),
            read=nn.Linear(3, 8), codes=nn.Parameter(torch.randn(6, 8)), write=nn.Linear(6, 5),
        ),
        WORDS,
        [
            group(8, rows("read.weight"), rows("read.bias"), columns("codes"), widens=False),
            group(6, columns("write.weight")),
        ],
    ),
    "distances of heads": Case(
        lambda: Fn(
            lambda s, x: s.write(torch.cdist(*(
                part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in (s.q(x), s.k(x))
            )).transpose(1, 2).exp().sum(-1)),
            q=nn.Linear(3, 8), k=nn.Linear(3, 8), write=nn.Linear(2, 5),
        ),
        WORDS,
        [group(2, columns("write.weight"))],
    ),
    "sparse graph": Case(
        lambda: Fn(
            sparse_graph, a=nn.Linear(3, 8), skip=nn.Linear(3, 8), b=nn.Linear(8, 5)
        ),
        (4, 3),
        [group(8, columns("b.weight"), scales=True)],
    ),
    "projected LSTM": Case(
        projected,
        WORDS,
        [
            group(4, columns("head.weight"), columns("rnn.weight_hh_l0")),
            group(12, columns("rnn.weight_hr_l0")),
        ],
    ),
    "messages": Case(messages, (3, 3), [group(8, columns("head.weight"), scales=True)]),
    "expanded": images(expanded, group(8, columns("two.weight"), columns("where.weight"),
                                       rows("one.weight"), rows("one.bias"), widens=False)),
    "unequal pieces": Case(
        unequal,
        WORDS,
        [group(2, columns("one.weight")), group(4, columns("two.weight"))],
    ),
    "spectrum": images(spectrum, group(8, columns("two.weight"))),
    "deformed": images(deformed, group(6, columns("two.weight")), group(
        8, columns("deform.weight"), columns("where.weight"), columns("much.weight"))),
}  # fmt: skip
assert IMAGE == (2, 3, 6, 6)  # which the filter fits
