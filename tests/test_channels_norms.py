"""Layer norms that a model writes out: means taken from their own channels, squares, spreads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from channel_networks import Fn, conv, filled
from torch import nn

from structopt import checkpoint
from structopt.channels import channel_groups, take


def by_squares(x):
    mean = x.mean(1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)


def by_products(x):
    apart = x - x.mean(1).unsqueeze(1)
    return apart * torch.rsqrt((apart * apart).mean(1).unsqueeze(1) + 1e-6)


def by_variance(x):
    mean, spread = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    return (x - mean) / (spread + 1e-6).sqrt()


def by_deviation(x):
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)


def by_both(x):
    spread, mean = torch.var_mean(x, 1, keepdim=True)
    return (x - mean) / (spread + 1e-6).sqrt()


def in_place(x):
    apart = x.clone()
    apart -= apart.float().mean(1, keepdim=True).to(apart.dtype)
    return apart / apart.square().mean(1, keepdim=True).add(1e-6).sqrt()


def by_response(x):
    """As ConvNeXt V2 does, over the lengths of whole channels."""
    length = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    return x * (length / (length.mean(1, keepdim=True) + 1e-6))


NORMS = [by_response, by_squares, by_products, by_variance, by_deviation, by_both, in_place]


def network(norm, device):
    torch.manual_seed(0)
    parts = {"a": conv(3, 8, 3), "scale": nn.Parameter(torch.rand(8, 1, 1)), "b": conv(8, 4)}
    model = Fn(lambda s, x: s.b((norm(s.a(x)) * s.scale).relu()), **parts)
    return filled(model).to(device), torch.randn(2, 3, 6, 6, device=device)


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_written_out_averages_over_the_channels_that_stay(norm, device):
    model, x = network(norm, device)
    channels = channel_groups(model, x)
    assert {group.name: group.size for group in channels} == {"a": 8}
    kept = [0, 3, 4, 6, 7]
    narrow = take(model, {channels["a"]: kept})
    expected, x = network(norm, device)
    exact = torch.float32 if device.type == "mps" else torch.float64
    model, narrow, expected, x = (each.to(exact) for each in (model, narrow, expected, x))
    a, b = expected.a, expected.b
    a.weight.data, a.bias.data = model.a.weight.data[kept], model.a.bias.data[kept]
    b.weight.data, b.bias.data = model.b.weight.data[:, kept], model.b.bias.data
    expected.scale.data = model.scale.data[kept]
    error = 1e-10 if exact is torch.float64 else 1e-4
    with torch.no_grad():
        torch.testing.assert_close(narrow(x), expected(x), rtol=error, atol=error)


class Own(nn.Module):
    """A norm whose class keeps the shape itself, and no weights."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.shape, self.kind = (width,), kind

    def forward(self, x):
        return getattr(F, self.kind)(x, self.shape)


BARE = {
    "layer norm": lambda n: nn.LayerNorm(n, elementwise_affine=False),
    "norm of squares": lambda n: nn.RMSNorm(n, eps=1e-5, elementwise_affine=False),
    "its own layer norm": lambda n: Own(n, "layer_norm"),
    "its own norm of squares": lambda n: Own(n, "rms_norm"),
}


@pytest.mark.parametrize("kind", BARE)
def test_a_norm_without_weights_takes_the_new_width(kind, device, tmp_path):
    """As in diffusion transformers."""

    def built(width):
        torch.manual_seed(0)
        rows = nn.Linear(3, width), BARE[kind](width), nn.ReLU(), nn.Linear(width, 4)
        return filled(nn.Sequential(*rows)).to(device)

    model, x = built(8), torch.randn(5, 3, device=device)
    channels = channel_groups(model, x)
    assert {group.name: group.size for group in channels} == {"0": 8}
    kept = [6, 1, 2]
    narrow, expected = take(model, {channels["0"]: kept}), built(3)
    with torch.no_grad():
        expected[0].weight.copy_(model[0].weight[kept])
        expected[0].bias.copy_(model[0].bias[kept])
        expected[3].weight.copy_(model[3].weight[:, kept])
        expected[3].bias.copy_(model[3].bias)
        torch.testing.assert_close(narrow(x), expected(x))
    checkpoint.save(narrow, tmp_path / "narrow")
    again = checkpoint.load(tmp_path / "narrow", into=built(8))
    with torch.no_grad():
        assert torch.equal(again(x), narrow(x))


def doubled_use(x):
    mean = x.mean(1, keepdim=True)
    return (x - mean) + mean


def of_another(x):
    return x - x.roll(1, 1).sigmoid().flip(1).mean(1, keepdim=True)


def divided_by_another(x):
    return x.sigmoid().flip(1) / (x.mean(1, keepdim=True) + 2)


def as_a_map(x):
    return x * x.mean(1, keepdim=True).sigmoid()


def as_a_map_of_another_shape(x):
    return x * x.mean(1).unsqueeze(1).to(torch.float64).to(x.dtype).sigmoid()


def from_the_mean(x):
    return x.mean(1, keepdim=True) - x


def of_places(x):
    return x - x.mean(1, keepdim=True).mean(2, keepdim=True)


@pytest.mark.parametrize(
    "use",
    [
        doubled_use,
        of_another,
        as_a_map,
        as_a_map_of_another_shape,
        divided_by_another,
        from_the_mean,
        of_places,
    ],
)
def test_a_mean_of_channels_used_otherwise_freezes_them(use, device):
    """It would be another number without some of them."""
    model, x = network(use, device)
    channels = channel_groups(model, x)
    assert not len(channels)
    assert "an average or a choice among channels: mean" in channels["a"].frozen
