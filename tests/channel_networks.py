"""Small networks for the tests of `channels`, each with its coupled channels worked out by hand.

A `Group` says where its channels are read: a law zeroes these entries in the full network by hand
and compares. Norms that run over the channels are replaced by norms over those that stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

Place = Callable[[int], Sequence[int]]


def one(c: int) -> Sequence[int]:
    return [c]


def each(n: int) -> Place:
    """n entries in a row belong to each channel."""
    return lambda c: range(c * n, (c + 1) * n)


def every(step: int, size: int) -> Place:
    """Channel c owns the entries c, c + step, …"""
    return lambda c: range(c, size, step)


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that are coupled: how many, and what to zero in the full network to mask some.

    The first cut is a weight axis and the entries of channel c along it. `norms` are the modules
    that average over the channels.
    """

    size: int
    cuts: Sequence[tuple[str, int, Place]]
    norms: Sequence[tuple[str, Place]] = ()
    widens: bool = True  # with preserve; else it has to be refused
    scales: bool = False  # by positive factors; else nothing is asked


@dataclass(frozen=True, eq=False)
class Case:
    build: Callable[[], nn.Module]
    shape: Sequence[int]
    groups: Sequence[Group]
    kind: str = "real"  # or "words"

    def example(self, device: torch.device, seed: int = 0, dtype: Any = torch.float64) -> Tensor:
        torch.manual_seed(seed)
        if self.kind == "words":
            return torch.randint(11, tuple(self.shape), device=device)
        return torch.randn(*self.shape, dtype=dtype, device=device)

    def model(self, device: torch.device) -> nn.Module:
        torch.manual_seed(1)
        return filled(self.build().double()).to(device).eval()


def filled(model: nn.Module) -> nn.Module:
    """Other numbers wherever a layer starts with equal ones: norms, their statistics, biases."""
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point() and t.numel() > 1 and bool((t == t.flatten()[0]).all()):
                t.copy_(torch.rand_like(t) + 0.5)
    return model


class Fn(nn.Module):
    """A function of the children given, as a module."""

    def __init__(self, forward: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.run = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def conv(a: int, b: int, k: int = 1, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=more.pop("padding", k // 2), **more)


# ------------------------------------------------------------------ convolutions and norms


def chain(n: int) -> nn.Module:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n - 1]
    return nn.Sequential(layer(3, 8, 3), norm(8), nn.ReLU(), layer(8, 4, 1, bias=False))


def transposed(n: int) -> nn.Module:
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    return nn.Sequential(
        layer(3, 8, 2), nn.ReLU(), layer(8, 12, 2, stride=2, groups=4), nn.ReLU(), layer(12, 5, 1)
    )


def grouped(n: int) -> nn.Module:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    return nn.Sequential(
        layer(3, 8, 1), nn.ReLU(), layer(8, 12, 3, groups=4), nn.ReLU(), layer(12, 5, 1)
    )


def multiplied() -> nn.Module:
    return nn.Sequential(conv(3, 4), conv(4, 12, 3, groups=4), nn.ReLU(), conv(12, 5))


def shuffled() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, 12, 3, groups=2), nn.BatchNorm2d(12), nn.ChannelShuffle(2),
        conv(12, 8, 3, groups=2), nn.ReLU(), conv(8, 4),
    )  # fmt: skip


def residual() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.two(F.relu(self.one(x)))
        x = F.relu(self.down(x) + self.four(F.relu(self.three(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    return Fn(
        forward, stem=conv(3, 8, 3), bn=nn.BatchNorm2d(8), one=conv(8, 6, 3), two=conv(6, 8, 3),
        down=conv(8, 10), three=conv(8, 4, 3, bias=False), four=conv(4, 10, 3),
        head=nn.Linear(10, 5),
    )  # fmt: skip


def gate() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        s = self.expand(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.head(x * s.sigmoid())

    return Fn(forward, stem=conv(3, 8, 3), squeeze=conv(8, 4), expand=conv(4, 8), head=conv(8, 5))


def dense() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(torch.cat([x, a], 1)))
        return self.head(torch.cat([a, b, a], 1))

    return Fn(forward, a=conv(3, 4, 3), b=conv(7, 6, 3), head=conv(14, 5))


def chunked() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.glu(x).chunk(2, 1)
        c, d = self.parted(a * b.sigmoid()).split([4, 6], 1)
        return self.left(c) + self.right(d.relu())

    return Fn(forward, glu=conv(3, 16), parted=conv(8, 10), left=conv(4, 5), right=conv(6, 5))


def gated_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 16), nn.GLU(-1), nn.Linear(8, 5))


def maxout() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(self.a(x).unflatten(1, (8, 2)).amax(2))

    return Fn(forward, a=nn.Linear(3, 16), b=nn.Linear(8, 5))


def convnext() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.scale * self.two(F.gelu(self.one(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))

    return Fn(
        forward, stem=conv(3, 8, 2), mix=conv(8, 8, 3, groups=8), norm=nn.LayerNorm(8),
        one=nn.Linear(8, 16), two=nn.Linear(16, 8), scale=table(8), head=nn.Linear(8, 5),
    )  # fmt: skip


def instance() -> nn.Module:
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    return nn.Sequential(conv(3, 8, 3), norm, nn.PReLU(8), conv(8, 5))


def moved() -> nn.Module:
    """Roll, flip and pad."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.pad(self.a(x).roll(1, 2).flip(3), (1, 1))
        return self.b(x.flip(1).relu()) + self.c(x)

    return Fn(forward, a=conv(3, 6), b=conv(6, 5), c=conv(6, 5))


def option_a() -> nn.Module:
    """A shortcut that is padded with empty channels, as in the first ResNets on CIFAR."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.pad(x, (0, 0, 0, 0, 2, 2)) + self.two(self.one(x).relu()))

    return Fn(forward, stem=conv(3, 4), one=conv(4, 6), two=conv(6, 8), head=conv(8, 5))


# ------------------------------------------------------------------ attention and sequences


class Attention(nn.Module):
    """Fused queries, keys and values, as in timm."""

    def __init__(self, width: int = 8, heads: int = 2, head: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head
        self.qkv = nn.Linear(width, 3 * heads * head)
        self.proj = nn.Linear(heads * head, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Vit(nn.Module):
    """Patches, class token, position table, layer scale, fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.cls, self.pos = table(1, 1, 8), table(1, 10, 8)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn, self.ls = Attention(), table(8)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        x = x + self.ls * self.attn(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm(x)[:, 0])


class Llama(nn.Module):
    """Grouped-query attention with rotary positions, RMS norms, gated MLP, tied embedding."""

    def __init__(self, heads: int = 4, keys: int = 2, head: int = 6, width: int = 8) -> None:
        super().__init__()
        self.heads, self.keys, self.head_dim = heads, keys, head
        self.register_buffer("rate", 10.0 ** -torch.arange(head // 2))
        self.embed = nn.Embedding(11, width)
        self.norm1, self.norm2, self.norm = (nn.RMSNorm(width) for _ in range(3))
        self.q = nn.Linear(width, heads * head, bias=False)
        self.k = nn.Linear(width, keys * head, bias=False)
        self.v = nn.Linear(width, keys * head, bias=False)
        self.o = nn.Linear(heads * head, width, bias=False)
        self.gate, self.up = nn.Linear(width, 12, bias=False), nn.Linear(width, 12, bias=False)
        self.down = nn.Linear(12, width, bias=False)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def turn(self, x: Tensor) -> Tensor:
        """Rotate the pairs (i, i + half) of each head by an angle that grows with time."""
        time = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)
        angle = torch.cat([time[:, None] * self.rate] * 2, -1)
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, t, _ = x.shape
        y = self.norm1(x)
        q = self.turn(self.q(y).view(b, t, self.heads, self.head_dim).transpose(1, 2))
        k = self.turn(self.k(y).view(b, t, self.keys, self.head_dim).transpose(1, 2))
        v = self.v(y).view(b, t, self.keys, self.head_dim).transpose(1, 2)
        k, v = (z.repeat_interleave(self.heads // self.keys, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm(x))


def multi_head() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.read(x)
        return self.write(self.attend(x, x, x, need_weights=False)[0])

    attend = nn.MultiheadAttention(8, 2, batch_first=True)
    return Fn(forward, read=nn.Linear(3, 8), attend=attend, write=nn.Linear(8, 5))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    return nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 5))


def recurrent(kind: type[nn.RNNBase]) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0])

    return Fn(
        forward, embed=nn.Embedding(11, 6), rnn=kind(6, 4, 2, batch_first=True),
        head=nn.Linear(4, 5),
    )  # fmt: skip


def tied() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.embed(x) + self.position)

    model = Fn(forward, embed=nn.Embedding(11, 6), position=table(4, 6), head=nn.Linear(6, 11))
    model.head.weight = model.embed.weight
    return model


def repeated() -> nn.Module:
    """One convolution at work three times."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.mix(x).relu()
        return self.head(x)

    return Fn(forward, stem=conv(3, 6), mix=conv(6, 6, 3), head=conv(6, 5))


def parametrised() -> nn.Module:
    wrap = nn.utils.parametrizations.weight_norm
    return nn.Sequential(wrap(conv(3, 8)), nn.ReLU(), wrap(conv(8, 5)))


def masked() -> nn.Module:
    model = nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 5))
    torch.manual_seed(3)
    for layer in (model[0], model[3]):
        prune.random_unstructured(layer, "weight", 0.4)
    return model


def spectral() -> nn.Module:
    wrap = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(wrap(conv(3, 8)), nn.ReLU(), wrap(conv(8, 5)))


def woven() -> nn.Module:
    """Two layers are joined, shuffled and parted: a channel of one goes with one of the other."""

    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.shuffle(torch.cat([self.left(x), self.right(x)], 1)).chunk(2, 1)
        return self.a(a) + self.b(b)

    return Fn(
        forward, left=conv(3, 8), right=conv(3, 8), shuffle=nn.ChannelShuffle(2), a=conv(8, 4),
        b=conv(8, 4),
    )  # fmt: skip


def stepped() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x[:, ::2]) + self.c(x[:, 1::2].relu())

    return Fn(forward, a=conv(3, 10), b=conv(5, 4), c=conv(5, 4))


def windows() -> nn.Module:
    """Windows are cut out, changed, and laid over one another again."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.unfold(self.a(x), 2).transpose(1, 2)
        return self.c(F.fold(self.b(x).transpose(1, 2), (6, 6), 2))

    return Fn(forward, a=conv(3, 6), b=nn.Linear(24, 32), c=conv(8, 5))


def cell() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0])

    return Fn(forward, cell=nn.LSTMCell(3, 8), head=nn.Linear(8, 5))


def bilinear() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(self.both(self.a(x), self.c(x)))

    return Fn(
        forward, a=nn.Linear(3, 4), c=nn.Linear(3, 5), both=nn.Bilinear(4, 5, 6), b=nn.Linear(6, 2)
    )


def weighed() -> nn.Module:
    """Attention that gives its weights too, an average over heads, which nobody uses."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.read(x)
        return self.write(self.attend(x, x, x)[0])

    attend = nn.MultiheadAttention(8, 2, batch_first=True)
    return Fn(forward, read=nn.Linear(3, 8), attend=attend, write=nn.Linear(8, 5))


def decoder() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.write(self.layer(self.read(x), self.memory(x)))

    layer = nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True)
    return Fn(
        forward, read=nn.Linear(3, 8), memory=nn.Linear(3, 8), layer=layer, write=nn.Linear(8, 5)
    )


def correlated() -> nn.Module:
    """The features of two images, from the same layer, correlated and scaled by their number."""

    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.encode(torch.cat([x, x.flip(3)])).flatten(2).chunk(2)
        return self.head((a.transpose(1, 2) @ b) / torch.tensor(a.shape[1]).to(x.dtype).sqrt())

    return Fn(forward, encode=conv(3, 8), head=nn.Linear(36, 5))


def joined(*layers: nn.Module) -> Callable[[], nn.Module]:
    """Builds a Sequential of copies of the layers."""
    return lambda: copy.deepcopy(nn.Sequential(*layers))


def rows(name: str, place: Place = one) -> tuple[str, int, Place]:
    return name, 0, place


def columns(name: str, place: Place = one) -> tuple[str, int, Place]:
    return name, 1, place


def group(size: int, *cuts: tuple[str, int, Place], **more: Any) -> Group:
    return Group(size, cuts, **more)


IMAGE, VOLUME = (2, 3, 6, 6), {n: (2, 3, *[5] * n) for n in (1, 2, 3)}
WIDTH = every(4, 8)  # of two heads of width 4, one after the other
ATTENDED = [
    group(
        2,
        columns("write.weight", each(4)),
        columns("attend.in_proj_weight", each(4)),
        columns("attend.out_proj.weight", each(4)),
    ),
    group(
        4,
        columns("write.weight", WIDTH),
        columns("attend.in_proj_weight", WIDTH),
        rows("attend.in_proj_weight", WIDTH),
        rows("attend.in_proj_bias", WIDTH),
        columns("attend.out_proj.weight", WIDTH),
    ),
]


def decoded(size: int, place: Place, *more: tuple[str, int, Place]) -> Group:
    reads = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight",
             "multihead_attn.in_proj_weight", "multihead_attn.out_proj.weight")  # fmt: skip
    return group(
        size,
        columns("write.weight", place),
        *(columns(f"layer.{name}", place) for name in reads),
        *more,
        norms=[(f"layer.norm{n}", place) for n in (1, 2, 3)],
        widens=False,
    )


def images(build: Callable[[], nn.Module], *groups: Group) -> Case:
    return Case(build, IMAGE, groups)


CASES: dict[str, Case] = {
    "depthwise": images(
        joined(conv(3, 8), conv(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 5)),
        group(8, columns("4.weight"), scales=True),
    ),
    "depthwise multiplier": images(
        multiplied,
        group(4, columns("3.weight", each(3)), scales=True),
        group(3, columns("3.weight", every(3, 12)), scales=True),
    ),
    "pixel shuffle": images(
        joined(conv(3, 32), nn.PixelShuffle(2), nn.ReLU(), conv(8, 5)),
        group(8, columns("3.weight"), scales=True),
    ),
    "pixel unshuffle": images(
        joined(conv(3, 8), nn.ReLU(), nn.PixelUnshuffle(2), conv(32, 5)),
        group(8, columns("3.weight", each(4)), scales=True),
    ),
    "channel shuffle": images(
        shuffled,
        group(4, columns("2.weight"), scales=True),
        group(3, columns("5.weight", each(2))),
        group(4, columns("7.weight", every(4, 8)), scales=True),
    ),
    "flatten": images(
        joined(conv(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)),
        group(8, columns("3.weight", each(36)), scales=True),
    ),
    "residual": images(
        residual,
        group(
            8,
            columns("one.weight"),
            columns("down.weight"),
            columns("three.weight"),
            scales=True,
        ),
        group(6, columns("two.weight"), scales=True),
        group(10, columns("head.weight"), scales=True),
        group(4, columns("four.weight"), scales=True),
    ),
    "gate": images(
        gate,
        group(8, columns("squeeze.weight"), columns("head.weight"), scales=True),
        group(4, columns("expand.weight"), scales=True),
    ),
    "dense": images(
        dense,
        group(
            4,
            columns("b.weight", lambda c: [3 + c]),
            columns("head.weight", lambda c: [c, 10 + c]),
            scales=True,
        ),
        group(6, columns("head.weight", lambda c: [4 + c]), scales=True),
    ),
    "chunk": images(chunked, group(8, columns("parted.weight"), scales=True)),
    "gated linear": Case(gated_linear, (2, 3), [group(8, columns("2.weight"))]),
    "instance norm": images(instance, group(8, columns("3.weight"), scales=True)),
    "batch norm": Case(
        joined(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.LeakyReLU(), nn.Linear(8, 5)),
        (2, 3),
        [group(8, columns("3.weight"), scales=True)],
    ),
    "layer norm": Case(
        joined(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5)),
        (2, 3),
        [group(8, columns("3.weight"), norms=[("1", one)], widens=False)],
    ),
    "RMS norm": Case(
        joined(nn.Linear(3, 8), nn.RMSNorm(8), nn.ReLU(), nn.Linear(8, 5)),
        (2, 3),
        [group(8, columns("3.weight"), norms=[("1", one)], widens=False)],
    ),
    "group norm": images(
        joined(conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 5)),
        group(4, columns("3.weight", each(2))),
        group(2, columns("3.weight", every(2, 8)), norms=[("1", every(2, 8))], widens=False),
    ),
    "norm in one group": images(
        joined(conv(3, 8), nn.GroupNorm(1, 8), nn.ReLU(), conv(8, 5)),
        group(8, columns("3.weight"), norms=[("1", one)], widens=False),
    ),
    "ConvNeXt": images(
        convnext,
        group(
            8, columns("one.weight"), columns("head.weight"), norms=[("norm", one)], widens=False
        ),
        group(16, columns("two.weight")),
    ),
    "moved": images(
        moved,
        group(
            6,
            columns("b.weight", lambda c: [5 - c]),
            columns("c.weight"),
            scales=True,
            widens=False,
        ),
    ),
    "padded shortcut": images(
        option_a,
        group(4, columns("one.weight"), columns("head.weight", lambda c: [c + 2])),
        group(6, columns("two.weight"), scales=True),
    ),
    "shared": images(repeated, group(6, columns("mix.weight"), columns("head.weight"))),
    "weight norm": images(parametrised, group(8, columns("2.parametrizations.weight.original1"))),
    "correlation": images(correlated, group(8, rows("encode.weight"), rows("encode.bias"))),
    "spectral norm": images(spectral, group(8, columns("2.parametrizations.weight.original"))),
    "plain shuffle": images(
        joined(conv(3, 4), nn.ChannelShuffle(2), nn.ReLU(), conv(4, 5)),
        group(2, columns("3.weight", every(2, 4))),
        group(2, columns("3.weight", each(2))),
    ),
    "shuffled cat": images(
        woven, group(4, columns("a.weight", each(2)), columns("b.weight", each(2)))
    ),
    "steps": images(stepped, group(5, columns("b.weight"), columns("c.weight"))),
    "windows": images(
        windows, group(6, columns("b.weight", each(4))), group(8, columns("c.weight"))
    ),
    "LSTM cell": Case(
        cell, (2, 4, 3), [group(8, columns("head.weight"), columns("cell.weight_hh"))]
    ),
    "bilinear": Case(
        bilinear,
        (2, 3),
        [
            group(4, ("both.weight", 1, one)),
            group(5, ("both.weight", 2, one)),
            group(6, columns("b.weight")),
        ],
    ),
    "bag of words": Case(
        joined(nn.EmbeddingBag(11, 8), nn.ReLU(), nn.Linear(8, 5)),
        (2, 4),
        [group(8, columns("2.weight"))],
        "words",
    ),
    "weights of attention": Case(weighed, (2, 4, 3), ATTENDED),
    "decoder": Case(
        decoder,
        (2, 4, 3),
        [
            group(12, columns("layer.linear2.weight")),
            decoded(2, each(4)),
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
    "masks": images(masked, group(8, columns("3.weight_orig"), scales=True)),
    "ViT": images(
        Vit,
        group(
            8,
            columns("attn.qkv.weight"),
            columns("fc1.weight"),
            columns("head.weight"),
            norms=[("norm1", one), ("norm2", one), ("norm", one)],
            widens=False,
        ),
        group(12, columns("fc2.weight")),
        group(2, columns("attn.proj.weight", each(4))),
        group(
            4,
            columns("attn.proj.weight", WIDTH),
            rows("attn.qkv.weight", WIDTH),
            rows("attn.qkv.bias", WIDTH),
        ),
    ),
    "encoder": Case(
        encoder,
        (2, 4, 3),
        [
            group(12, columns("1.linear2.weight"), scales=True),
            group(
                2,
                columns("2.weight", each(4)),
                columns("1.self_attn.in_proj_weight", each(4)),
                columns("1.linear1.weight", each(4)),
                columns("1.self_attn.out_proj.weight", each(4)),
                norms=[("1.norm1", each(4)), ("1.norm2", each(4))],
                widens=False,
            ),
            group(
                4,
                columns("2.weight", WIDTH),
                columns("1.self_attn.in_proj_weight", WIDTH),
                rows("1.self_attn.in_proj_weight", WIDTH),
                rows("1.self_attn.in_proj_bias", WIDTH),
                columns("1.linear1.weight", WIDTH),
                columns("1.self_attn.out_proj.weight", WIDTH),
                norms=[("1.norm1", WIDTH), ("1.norm2", WIDTH)],
                widens=False,
            ),
        ],
    ),
    "multi-head": Case(
        multi_head,
        (2, 4, 3),
        ATTENDED,
    ),
    "Llama": Case(
        Llama,
        (2, 4),
        [
            group(
                8,
                columns("q.weight"),
                columns("k.weight"),
                columns("v.weight"),
                columns("gate.weight"),
                columns("up.weight"),
                columns("head.weight"),
                norms=[("norm1", one), ("norm2", one), ("norm", one)],
                widens=False,
            ),
            group(12, columns("down.weight")),
            group(2, columns("o.weight", each(12))),
            group(3, columns("o.weight", every(3, 24)), rows("q.weight", every(3, 24))),
        ],
        "words",
    ),
    "tied": Case(tied, (2, 4), [group(6, columns("embed.weight"), widens=False)], "words"),
}
for n in (1, 2, 3):
    CASES[f"convolution {n}d"] = Case(
        partial(chain, n), VOLUME[n], [group(8, columns("3.weight"), scales=True)]
    )
    CASES[f"grouped {n}d"] = Case(
        partial(grouped, n),
        VOLUME[n],
        [
            group(2, columns("2.weight"), scales=True),
            group(3, columns("4.weight", every(3, 12)), scales=True),
            group(4, columns("4.weight", each(3)), scales=True),
        ],
    )
    CASES[f"transposed {n}d"] = Case(
        partial(transposed, n),
        VOLUME[n],
        [
            group(2, rows("2.weight", every(2, 8)), scales=True),
            group(3, rows("4.weight", every(3, 12)), scales=True),
            group(4, rows("4.weight", each(3)), scales=True),
        ],
    )
for kind in (nn.LSTM, nn.GRU, nn.RNN):
    CASES[kind.__name__] = Case(
        partial(recurrent, kind),
        (2, 4),
        [
            group(6, columns("rnn.weight_ih_l0"), scales=True),
            group(
                4,
                columns("head.weight"),
                columns("rnn.weight_hh_l0"),
                columns("rnn.weight_hh_l1"),
                columns("rnn.weight_ih_l1"),
            ),
        ],
        "words",
    )


# ------------------------------------------------------------------ composed at random


class Composed(nn.Module):
    """Blocks one after the other; `steps` are pairs of a kind and a number that shapes it."""

    KINDS = ("conv", "grouped", "depthwise", "norm", "batch norm", "relu", "residual", "cat",
             "gate", "shuffle", "glu", "attention", "transposed", "slice")  # fmt: skip

    def __init__(self, steps: Sequence[tuple[str, int]]) -> None:
        super().__init__()
        self.stem, width = conv(2, 4, 3), 4
        self.blocks, self.kinds = nn.ModuleList(), []
        for kind, number in steps:
            made = self._made(kind, width, number)
            if made is not None:
                self.kinds.append(kind)
                self.blocks.append(made[0])
                width = made[1]
        self.head = nn.Linear(width, 3)

    def _made(self, kind: str, width: int, n: int) -> tuple[nn.Module, int] | None:
        """The block and the width of what it gives, where it fits the width."""
        groups = [g for g in (2, 3) if width % g == 0]
        plain: dict[str, Callable[[], tuple[nn.Module, int]]] = {
            "conv": lambda: (conv(width, 2 * n, 3), 2 * n),
            "transposed": lambda: (nn.ConvTranspose2d(width, n + 1, 1), n + 1),
            "depthwise": lambda: (conv(width, width, 3, groups=width), width),
            "norm": lambda: (nn.GroupNorm(groups[0] if groups and n % 2 else 1, width), width),
            "batch norm": lambda: (nn.BatchNorm2d(width), width),
            "relu": lambda: (nn.ReLU() if n % 2 else nn.GELU(), width),
            "residual": lambda: (
                nn.Sequential(conv(width, n + 1), nn.ReLU(), conv(n + 1, width)),
                width,
            ),
            "cat": lambda: (conv(width, n + 1), width + n + 1),
            "gate": lambda: (nn.Sequential(conv(width, 2), nn.ReLU(), conv(2, width)), width),
            "attention": lambda: (Attention(width, 2, n + 1), width),
        }
        if kind in plain:
            return plain[kind]()
        if kind == "glu" and width % 2 == 0 and width > 2:
            return nn.Identity(), width // 2
        if kind == "slice" and width > 3:
            return conv(2, width - 2), width - 2
        if kind == "grouped" and groups:
            return conv(width, groups[-1] * n, groups=groups[-1]), groups[-1] * n
        if kind == "shuffle" and groups:
            return nn.ChannelShuffle(groups[0]), width
        return None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            if kind == "residual":
                x = x + block(x)
            elif kind == "cat":
                x = torch.cat([x, block(x)], 1)
            elif kind == "gate":
                x = x * block(x.mean((2, 3), keepdim=True)).sigmoid()
            elif kind == "glu":
                a, b = x.chunk(2, 1)
                x = a * b.sigmoid()
            elif kind == "slice":
                x = x[:, 2:] + block(x[:, :2])
            elif kind == "attention":
                x = x + block(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
            else:
                x = block(x)
        return self.head(x.mean((2, 3)))
