"""Mixtures of experts, which multiply tokens in groups; kernels without float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from channel_networks import Fn, filled
from torch import nn

from structopt.channels import channel_groups, take
from structopt.channels.shadow import multiply
from structopt.pruning import Limits, prune_channels

pytestmark = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")


class Experts(nn.Module):
    """Each token goes to its two best experts, as in Mixtral; gate and up share a weight."""

    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * inner, width))
        self.down = nn.Parameter(torch.randn(experts, width, inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares, chosen = self.router(x).softmax(-1).topk(2)
        flat, order = chosen.flatten().sort()
        ends = torch.histc(flat.float(), len(self.up), 0, len(self.up) - 1).cumsum(0)
        sent, ends = x[order // 2], ends.to(torch.int32)
        gate, up = F.grouped_mm(sent, self.up.transpose(1, 2), offs=ends).chunk(2, -1)
        made = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        back = (made * shares.flatten()[order, None])[order.argsort()]
        return back.reshape(len(x), 2, -1).sum(1)


def mixture(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    parts = {"a": nn.Linear(6, 16), "experts": Experts(16, 24, 4), "b": nn.Linear(16, 3)}
    model = Fn(lambda s, x: s.b(s.experts(s.a(x).relu())), **parts)
    return filled(model).to(dtype).eval(), torch.randn(9, 6).to(dtype)


def by_hand(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Every token through every expert, in double precision."""
    a, experts, b = (part.double() for part in (model.a, model.experts, model.b))
    hidden = a(x.double()).relu()
    shares = experts.router(hidden).softmax(-1)
    kept = shares * (shares >= shares.topk(2).values[:, 1:])
    gate, up = torch.einsum("tk,enk->etn", hidden, experts.up).chunk(2, -1)
    made = torch.einsum("etn,ekn->tek", F.silu(gate) * up, experts.down)
    return b((kept[:, :, None] * made).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_lose_width_as_any_layer_does(dtype: torch.dtype) -> None:
    model, x = mixture(dtype)
    channels = channel_groups(model, x)
    assert {g.name: g.size for g in channels} == {"a": 16, "experts": 24, "experts#2": 16}
    frozen = {m.parameter: g.frozen for g in channels.frozen for m in g.members if m.dim == 0}
    assert "experts that the tokens are sent to" in frozen["experts.up"]
    even = {channels[name]: range(0, 16, 2) for name in ("a", "experts#2")}
    narrow = take(model, {channels["experts"]: range(8), **even})
    assert narrow.experts.up.shape == (4, 16, 8)
    assert narrow.experts.down.shape == (4, 8, 8)
    with torch.no_grad():
        assert narrow(x).dtype == dtype  # torch's kernel takes these widths
        model.experts.down[:, :, 8:] = 0
        for weight in (model.a.weight, model.a.bias):
            weight[1::2] = 0
        model.experts.down[:, 1::2] = 0
        expected, found = by_hand(model, x), by_hand(narrow, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_widths_that_the_kernel_cannot_take_are_refused(dtype: torch.dtype, unit: int) -> None:
    model, x = mixture(dtype)
    channels = channel_groups(model, x)
    for name in ("a", "experts"):
        with pytest.raises(ValueError, match=f"'{name}'.*widths are multiples of {unit}"):
            take(model, {channels[name]: range(unit + 1)})
        narrow = take(model, {channels[name]: range(unit)})
        with torch.no_grad():
            narrow(x)


def test_experts_are_pruned_by_the_size_of_their_own_matrices() -> None:
    model, x = mixture()
    with torch.no_grad():
        gate, up = model.experts.up.chunk(2, 1)
        for part in (gate, up, model.experts.down.transpose(1, 2)):
            part[:, 1::3] *= 9
    leave = Limits(leave=("a", "experts#2"))
    small = prune_channels(model, x, 2 / 3, limits=leave)
    torch.testing.assert_close(small.experts.down, model.experts.down[:, :, 1::3])
    with pytest.raises(ValueError, match="multiples of 4"):
        prune_channels(model, x, 0.4, limits=leave)  # 14 of 24 stay
    small = prune_channels(model, x, 0.4, limits=Limits(multiple_of=4, leave=leave.leave))
    assert small.experts.down.shape == (4, 16, 16)


def test_grouped_products_agree_with_the_kernel_of_torch() -> None:
    torch.manual_seed(0)
    tokens, weights = torch.randn(10, 8), torch.randn(4, 8, 12)
    ends = torch.tensor([2, 2, 7, 9], dtype=torch.int32)  # one has none, one token has no expert
    expected = F.grouped_mm(tokens, weights, offs=ends)[:9]
    found = multiply(tokens, weights, ends)
    torch.testing.assert_close(found[:9], expected)
    assert not found[9:].any()


def test_numbers_from_outside_of_the_model_are_widened_with_it() -> None:
    places = torch.rand(2, 4, 4, 2) * 2 - 1

    def forward(s, x):
        return s.b(F.grid_sample(s.a(x), places, align_corners=False))

    model = filled(Fn(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)))
    x = torch.randn(2, 3, 6, 6)
    narrow = take(model, {channel_groups(model, x)["a"]: range(4)})
    model.b.weight.data[:, 4:] = 0
    torch.testing.assert_close(narrow(x), model(x))


def test_a_model_that_cannot_run_in_double_precision_is_named() -> None:
    class Single(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype == torch.float64:
                raise TypeError("this kernel takes float32 alone")
            return super().forward(x)

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(Single(8, 2)))
    channels = channel_groups(model, torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"in double precision.* in 2\.0: TypeError: this kernel"):
        take(model, {channels["0"]: range(4)})
