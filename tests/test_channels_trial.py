"""Groups are tried on a copy where Python may insist on a width: labels do not see that."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from channel_networks import Fn, conv, filled
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

from structopt.channels import analysis, channel_groups, take

A = torch.ops.aten
PICTURE = torch.randn(2, 3, 5, 5)


class Seen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view(2, 8, 25).sum(2)


class Views(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = (args[0].view(2, 8, 5, 5),) if func is A.relu.default else args
        return func(*args, **(kwargs or {}))


class Picky(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ == "relu":
            assert args[0].as_subclass(Tensor).shape[1] == 8
        return super().__torch_function__(func, types, args, kwargs or {})


def linear(x: Tensor) -> Any:
    """A function of the model's own that has the name of one of torch's."""
    if has_torch_function((x,)):
        return handle_torch_function(linear, (x,), x)
    return x.view(2, 8, 5, 5)


def inside(mode: Any, x: Tensor, layer: Any) -> Any:
    with mode:
        return layer(x)


INSISTING = {
    "a view": lambda s, x: s.b(s.a(x).view(len(x), 8, -1).mean(2)),
    "a view of one width": lambda s, x: s.b(s.a(x).view(-1, 8, 25).mean(2)),
    "an operator of torch.ops": lambda s, x: s.b(A.view.default(s.a(x), [2, 8, 25]).mean(2)),
    "a function of its own": lambda s, x: s.b(Seen.apply(s.a(x))),
    "a reading of the shape": lambda s, x: s.b(s.a(x)[:, : s.a(x).shape[1]].mean((2, 3))),
    "a shape that is compared": lambda s, x: s.b(
        s.a(x).mean((2, 3)) if s.a(x).shape[1] == 8 else None
    ),
    "an operator without a function": lambda s, x: s.b(
        inside(torch._C.DisableTorchFunction(), s.a(x), lambda y: y.view(2, 8, 25)).mean(2)
    ),
    "a mask of its own": lambda s, x: s.b((s.a(x) * torch.ones(8, 1, 1)).mean((2, 3))),
    "a convolution with groups": lambda s, x: s.b(
        F.conv2d(s.a(x), s.c.weight, groups=s.count).mean((2, 3))
    ),
    "a mode of its own": lambda s, x: s.b(inside(Views(), s.a(x), torch.relu).mean((2, 3))),
    "a function of its own that is named as torch's": lambda s, x: s.b(linear(s.a(x)).mean((2, 3))),
    "a place to write to": lambda s, x: s.b(torch.mul(s.a(x), 2, out=s.place).mean((2, 3))),
    "a width of a layer that is compared": lambda s, x: s.b(
        s.a(x).mean((2, 3)) if s.a.out_channels == 8 else None
    ),
    "a width of a layer that is computed with": lambda s, x: s.b(
        s.a(x).mean((2, 3)) if not s.b.in_features % 8 else None
    ),
    "a width of a layer that is a name": lambda s, x: s.b(
        s.a(x).mean((2, 3)) * {8: 2.0}[s.a.out_channels]
    ),
}
OWN = {
    "before a layer": lambda m: m.register_forward_pre_hook(
        lambda m, x: F.conv2d(*x, m.weight, padding=1, groups=8)
    ),
    "after a layer": lambda m: m.register_forward_hook(
        lambda m, _, y: F.conv2d(y, m.weight, padding=1, groups=8)
    ),
    "in the place of its forward": lambda m: setattr(
        m, "forward", types.MethodType(lambda m, x: F.conv2d(x, m.weight, groups=8), m)
    ),
}


def network(forward):
    torch.manual_seed(0)
    made = Fn(forward, a=conv(3, 8, 3), b=nn.Linear(8, 4), c=nn.Conv2d(8, 8, 3, groups=8))
    made.register_buffer("place", torch.zeros(2, 8, 5, 5))
    made.count = 8
    return filled(made)


def plain(s, x):
    return s.b((s.c(s.a(x)).relu() + 1).mean((2, 3)))


def open_(s, x):
    """Shapes that suit any width, and operators that no width is given to."""
    y = s.c(s.a(x)) * s.c.bias.reshape([1, -1, 1, 1]) / 2
    return torch.matmul(y.mean((2, 3)), s.b.weight.transpose(0, 1).contiguous())


@pytest.fixture
def is_tried(monkeypatch):
    """A law: groups are tried, and then each that is left may change."""

    def law(model, x):
        tried, settle = [], analysis.settle
        monkeypatch.setattr(analysis, "settle", lambda probe: (tried.append(probe), settle(probe)))
        channels = channel_groups(model, x)
        assert tried
        for group in channels:
            take(model, {group: range(group.size // 2)})

    return law


@pytest.mark.parametrize("name", INSISTING)
def test_groups_are_tried_where_python_may_insist_on_a_width(name, is_tried):
    is_tried(network(INSISTING[name]), torch.randn(2, 3, 5, 5))


@pytest.mark.parametrize("where", OWN)
def test_groups_are_tried_where_python_works_beside_a_layer(where, is_tried):
    model = network(plain)
    OWN[where](model.c)
    is_tried(model, torch.randn(2, 3, 5, 5))


def test_groups_are_tried_where_python_works_in_a_row_of_layers(is_tried):
    model = network(plain)
    row = nn.Sequential(model.a, model.c, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.b)
    OWN["before a layer"](model.c)
    is_tried(row, torch.randn(2, 3, 5, 5))


def test_groups_are_tried_where_tensors_are_of_another_class(is_tried):
    is_tried(network(plain), torch.randn(2, 3, 5, 5).as_subclass(Picky))


@pytest.mark.parametrize("forward", [plain, open_])
def test_groups_of_plain_layers_are_not_tried(monkeypatch, forward):
    monkeypatch.setattr(analysis, "settle", lambda probe: pytest.fail("tried"))
    model = network(forward)
    channels = channel_groups(model, torch.randn(2, 3, 5, 5))
    assert [(g.name, g.size) for g in channels] == [("a", 8)]
    assert take(model, {channels["a"]: [1, 5]}).c.groups == 2


class Upwards(nn.Module):
    """A small network with a way down and up: it reads how large a picture is, and no width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, 2, padding=1)
        self.o = nn.Conv2d(14, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.a(x).relu()
        low = F.interpolate(self.b(high).relu(), size=high.shape[-2:])
        return F.interpolate(self.o(torch.cat([high, low], 1)), x.size()[2:])


class Across(nn.LayerNorm):
    """Norms channels of pictures, as ConvNeXt's."""

    def forward(self, x: Tensor) -> Tensor:
        last = x.permute(0, 2, 3, 1)
        last = F.layer_norm(last, self.normalized_shape, self.weight, self.bias, self.eps)
        return last.permute(0, 3, 1, 2)


def test_groups_are_not_tried_where_a_norm_is_given_its_own_shape(monkeypatch):
    monkeypatch.setattr(analysis, "settle", lambda probe: pytest.fail("tried"))
    kinds = Across(8), Across(8, elementwise_affine=False)
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 1), *kinds, nn.Conv2d(8, 2, 1)))
    channels = channel_groups(model, PICTURE)
    assert [(g.name, g.size) for g in channels] == [("0", 8)]
    made = take(model, {channels["0"]: [1, 5, 6]})
    assert [tuple(norm.normalized_shape) for norm in made[1:3]] == [(3,), (3,)]
    assert [type(n) for n in made[1].normalized_shape] == [int]


@pytest.mark.parametrize(
    "use",
    [
        lambda s, x: x[:, : s.norm.normalized_shape[0]],
        lambda s, x: F.layer_norm(x, (8,)),
        lambda s, x: F.layer_norm(x, [8]),
        lambda s, x: F.rms_norm(x, (x.shape[1] + 0,)),
    ],
)
def test_groups_are_tried_where_python_reads_the_shape_of_a_norm(use, is_tried):
    parts = {"a": nn.Linear(3, 8), "norm": nn.LayerNorm(8), "b": nn.Linear(8, 2)}
    model = filled(Fn(lambda s, x: s.b(use(s, s.norm(s.a(x)))), **parts))
    is_tried(model, torch.randn(4, 3))


class Looks(nn.Module):
    def __init__(self, look: Any) -> None:
        super().__init__()
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        self.look(x)
        return x


def test_groups_are_not_tried_where_only_the_size_of_a_picture_is_read(monkeypatch):
    monkeypatch.setattr(analysis, "settle", lambda probe: pytest.fail("tried"))
    model = filled(Upwards())
    channels = channel_groups(model, torch.randn(2, 3, 5, 5))
    assert [(g.name, g.size) for g in channels] == [("a", 8), ("b", 6)]
    assert take(model, {channels["a"]: [1, 5], channels["b"]: [0, 2]}).o.in_channels == 4


@pytest.mark.parametrize(
    "looks",
    [
        lambda x: x.shape[1] == 8,
        lambda x: x.size(1) // 2,
        lambda x: x.size(dim=-3) > 4,
        lambda x: x.shape == (2, 8, 5, 5),
        lambda x: str(tuple(x.shape)),
        lambda x: len(x[0]),
        lambda x: x.new_zeros(x.shape),
    ],
)
def test_groups_are_tried_where_python_looks_at_the_width_of_data(looks, is_tried):
    is_tried(nn.Sequential(nn.Conv2d(3, 8, 1), Looks(looks), nn.Conv2d(8, 2, 1)), PICTURE)


def test_a_width_of_data_that_python_insists_on_is_frozen():
    def demand(x: Tensor) -> None:
        assert x.shape[1] == 8

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Looks(demand), nn.Conv2d(8, 2, 1))
    assert not channel_groups(model, PICTURE).groups
