"""Outliers moved into weights: the same function, the formula, what is refused."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structopt import compression
from structopt.compression import Grid


class Block(nn.Module):
    """Pre-norm attention and a perceptron, with a norm of outliers."""

    def __init__(self, width=6, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)
        with torch.no_grad():
            for layer in self.norm1, self.norm2:
                layer.weight.copy_(torch.logspace(-1, 2, width))

    def forward(self, x):
        y = self.norm1(x)
        mix = (self.q(y) @ self.k(y).mT / 3).softmax(-1)
        x = x + self.out(mix @ self.v(y))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def seen(model, x, name):
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: found.append(a[0]))
    model(x)
    handle.remove()
    return found[0].detach()


@given(st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([nn.LayerNorm, nn.RMSNorm]))
def test_the_factors_and_the_same_function(alpha, norm):
    model, x = Block(norm=norm).double(), [torch.randn(3, 5, 6).double() for _ in range(2)]
    before = copy.deepcopy(model)
    made = compression.smooth_inputs(model, [(part, 0) for part in x], alpha)
    for part in x:
        torch.testing.assert_close(made(part), model(part), rtol=1e-9, atol=1e-9)
    for members in ("q", "k", "v"), ("up",):
        reach = torch.stack([seen(model, part, members[0]).abs().amax((0, 1)) for part in x])
        weight = torch.stack([getattr(model, name).weight.abs().amax(0) for name in members])
        s = reach.amax(0) ** alpha / weight.amax(0) ** (1 - alpha)
        for name in members:
            if name != "v":  # as a maker of what `out` reads, it is scaled by rows as well
                expected = getattr(model, name).weight * s
                torch.testing.assert_close(getattr(made, name).weight, expected)
        part = "norm1" if "q" in members else "norm2"
        torch.testing.assert_close(getattr(made, part).weight, getattr(model, part).weight / s)
        torch.testing.assert_close(seen(made, x[0], members[0]), seen(model, x[0], members[0]) / s)
    # Attention mixes tokens and leaves channels alone: what `out` reads is scaled in `v`.
    reach = torch.stack([seen(model, part, "out").abs().amax((0, 1)) for part in x]).amax(0)
    s = reach**alpha / model.out.weight.abs().amax(0) ** (1 - alpha)
    torch.testing.assert_close(made.out.weight, model.out.weight * s)
    torch.testing.assert_close(made.v.bias, model.v.bias / s)
    assert torch.equal(made.down.weight, model.down.weight), "a GELU lets no scale through"
    for name, weight in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_convolutions_in_groups_behind_a_batch_norm(device):
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(),
        nn.Conv2d(4, 4, 1, groups=4), nn.Flatten(), nn.Linear(64, 3),
    ).double().to(device)  # fmt: skip
    x = torch.randn(9, 2, 8, 8, device=device).double()
    model(x)
    model.eval()
    with torch.no_grad():
        model[1].weight.mul_(torch.logspace(-2, 2, 6, device=device))
    made = compression.smooth_inputs(model, [x])
    torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-9)
    read = model[:3](x).abs().amax((0, 2, 3))
    weight = model[3].weight.abs().amax((2, 3)).view(2, 2, 3).amax(1).flatten()
    torch.testing.assert_close(made[:3](x).abs().amax((0, 2, 3)), (read * weight).sqrt())
    torch.testing.assert_close(made[1].bias, model[1].bias / (read / weight).sqrt())
    assert torch.equal(made[0].weight, model[0].weight), "the norm is nearer"
    read, weight = model[:5](x).abs().amax((0, 2, 3)), model[5].weight.abs().flatten()
    torch.testing.assert_close(made[:5](x).abs().amax((0, 2, 3)), (read * weight).sqrt())
    assert torch.equal(made[7].weight, model[7].weight), "a channel became sixteen features"


def test_one_step_serves_all_channels_of_an_input(device):
    model, x = Block(16).to(device), torch.randn(8, 20, 16, device=device)
    with torch.no_grad():  # outliers that the weights make up for, as in trained networks
        for layer in model.q, model.k, model.v, model.up:
            layer.weight.div_(model.norm1.weight)

    @torch.no_grad()
    def error(net):
        codes = compression.quantize_weights(net, Grid(8))
        small = compression.put_(copy.deepcopy(net), codes)
        steps = compression.calibrate(small, [x], Grid(8, False))
        made = compression.round_inputs(small, Grid(8, False), steps)(x)
        return float((made - model(x)).norm() / model(x).norm())

    assert error(compression.smooth_inputs(model, [x])) < 0.5 * error(model)


def test_the_nearest_of_two_layers_takes_the_scale() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    made = compression.smooth_inputs(model, [torch.randn(20, 4)], names=["2"])
    assert torch.equal(made[0].weight, model[0].weight)  # it could: the norm keeps its scale
    assert not torch.equal(made[1].weight, model[1].weight)


def test_dead_channels_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0, 0
        model[2].weight[:, 1] = 0
    x = torch.randn(9, 3).double()
    made = compression.smooth_inputs(model, [x])
    torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-12)
    for row in 0, 1:
        assert torch.equal(made[0].weight[row], model[0].weight[row])
    assert not torch.equal(made[0].weight[2], model[0].weight[2])


class Kept(nn.Module):
    """Its norm is read by a layer and added, too."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.norm(x)
        return y + self.layer(y)


def test_a_layer_that_cannot_be_smoothed_is_named():
    x = torch.randn(5, 4)
    model = Kept()
    assert torch.equal(compression.smooth_inputs(model, [x]).layer.weight, model.layer.weight)
    with pytest.raises(ValueError, match="'layer' reads what no layer before it can scale"):
        compression.smooth_inputs(model, [x], names=["layer"])
    bare = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="'1' reads what no layer"):
        compression.smooth_inputs(bare, [x], names=["1"])
    block = Block()
    with pytest.raises(ValueError, match="'down' reads what no layer"):
        compression.smooth_inputs(block, [torch.randn(2, 5, 6)], names=["up", "down"])
    one = compression.smooth_inputs(block, [torch.randn(2, 5, 6)], names=["k"])
    assert torch.equal(one.up.weight, block.up.weight)
    assert not torch.equal(one.q.weight, block.q.weight), "it reads what k reads"
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha="):
            compression.smooth_inputs(block, [x], alpha)
    with pytest.raises(ValueError, match="batches are empty"):
        compression.smooth_inputs(block, [])
    with pytest.raises(ValueError, match="'fc' is no linear layer"):
        compression.smooth_inputs(block, [x], names=["fc"])
    with pytest.raises(ValueError, match="what layer reads is not finite"):
        compression.smooth_inputs(model, [x * torch.inf])
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'unused' never ran"):
        compression.smooth_inputs(model, [x], names=["unused"])


def test_the_nearest_layer_that_can_takes_the_scale():
    """A depthwise convolution without bias passes a scale on: what is before it could take it."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1, bias=False),
        nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.Conv2d(6, 4, 1),
    )
    x = torch.randn(2, 3, 5, 5)
    made = compression.smooth_inputs(model, [x], names=["2"])
    assert torch.equal(made[0].weight, model[0].weight)
    assert not torch.allclose(made[1].weight, model[1].weight)
    torch.testing.assert_close(made(x), model(x))
