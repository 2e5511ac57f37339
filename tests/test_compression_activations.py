"""Activations bounded, emptied, skipped and removed: exact is equal, the rest is measured."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structopt import compression
from structopt.compression import MSE, Blend, Grid, Linearise, MinMax, PerAxis
from structopt.compression.straight import Link, move_padding_
from structopt.networks import LeNet300
from structopt.training import supervised


class Written(nn.Module):
    """Activations as functions, as methods, and one module in two places."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = F.gelu(self.a(x), approximate="tanh")
        x = F.leaky_relu(self.b(x), 0.3).relu()
        x = self.act(x) + self.act(x - 0.1)
        return torch.tanh(self.c(x))


def test_separated_activations_compute_the_same(device):
    model = Written().to(device)
    x = torch.randn(7, 4, device=device)
    expected = model(x)
    made = compression.separate_activations(model, x)
    assert torch.equal(made(x), expected)
    assert made.a_gelu.approximate == "tanh"
    assert made.b_leakyrelu.negative_slope == 0.3
    runs = []
    for module in made.modules():
        if isinstance(module, nn.ReLU | nn.GELU | nn.LeakyReLU | nn.Tanh):
            module.register_forward_hook(lambda m, *_: runs.append(id(m)))
    made(x)
    assert len(runs) == len(set(runs)) == 6, "each runs once"
    assert made.a.weight is not model.a.weight
    assert set(dict(made.named_parameters())) == set(dict(model.named_parameters()))
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert str(compression.separate_activations(plain, x)) == str(plain)


class Asks(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 4)

    def forward(self, x):
        if self.kind == "value" and x.sum() > 0:
            return x
        y = self.layer(x).relu()
        return F.dropout(y, 0.5, self.training) if self.kind == "mode" else y


def test_what_fx_would_break_is_refused():
    with pytest.raises(ValueError, match="cannot follow this Asks"):
        compression.separate_activations(Asks("value"), torch.randn(2, 4))
    with pytest.raises(ValueError, match="asks for the mode"):
        compression.separate_activations(Asks("mode"), torch.randn(2, 4))


@pytest.mark.parametrize(
    "kind", [nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.PReLU, nn.Tanh, nn.ELU]
)
def test_a_blend_is_the_activation_and_then_nothing(kind, device):
    x = torch.randn(50, device=device)
    kept = x.clone()
    activation = kind(inplace=True) if kind is nn.ReLU else kind()
    expected = copy.deepcopy(activation).to(device)(x.clone())
    assert torch.equal(Blend(activation).to(device)(x), expected)
    assert torch.equal(Blend(activation, 1.0).to(device)(x), kept)
    assert torch.equal(x, kept), "the input is left as it was"
    half = Blend(activation, 0.5).to(device)(x)
    torch.testing.assert_close(half, (expected + kept) / 2)


def test_the_gradient_of_a_slope():
    blend, x = Blend(nn.Tanh(), 0.3).double(), torch.randn(6).double()
    assert torch.autograd.gradcheck(
        lambda slope: torch.func.functional_call(blend, {"slope": slope}, x),
        blend.slope.detach().requires_grad_(),
    )
    model = compression.blend_activations(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), ["1"], 0.2)
    batch = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    grads = []
    for objective in supervised(), compression.linearising(supervised(), 0.7):
        model.zero_grad()
        objective(model, batch).backward()
        grads.append(model[1].slope.grad.clone())
    torch.testing.assert_close(grads[1], grads[0] - 0.7)
    with pytest.raises(ValueError, match="no Blend"):
        compression.linearising(supervised(), 1.0)(nn.Linear(3, 2), batch)


def small(device="cpu"):
    return (
        nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
        .to(device)
        .requires_grad_(False)
    )


def test_clipped_at_the_end_of_the_grid(device):
    model, batches = small(device), [torch.randn(40, 6, device=device) for _ in range(2)]
    whole = compression.clip_activations(model, batches, Grid(3, symmetric=False, fit=MinMax()))
    assert whole.change == 0
    assert whole.touched == {"1": 0.0}
    values = torch.cat([model[:2](x) for x in batches])
    torch.testing.assert_close(torch.tensor(whole.bounds["1"]), values.max().cpu().detach())
    grid = Grid(2, symmetric=False, fit=MSE())
    made = compression.clip_activations(model, batches, grid)
    bound = made.bounds["1"]
    assert bound < float(values.max())
    assert made.touched["1"] == pytest.approx(float((values > bound).double().mean()))
    expected = torch.cat([model[2](model[:2](x).clamp(max=bound)) for x in batches])
    found = torch.cat([made.model(x) for x in batches])
    torch.testing.assert_close(found, expected)
    whole = torch.cat([model(x) for x in batches])
    assert made.change == pytest.approx(float((found - whole).norm() / whole.norm()), rel=1e-4)
    steps = compression.calibrate(made.model, batches, Grid(2, symmetric=False), ["2"])
    assert float(steps["2"].scale) * 3 == pytest.approx(bound), "a plain grid ends at the bound"
    assert isinstance(model[1], nn.ReLU)
    coarse = small(device).bfloat16()
    given = [x.bfloat16() for x in batches]
    made = compression.clip_activations(coarse, given, Grid(3, symmetric=False, fit=MinMax()))
    assert made.change == 0


def test_bounds_that_cannot_be():
    model, x = small(), torch.randn(4, 6)
    for grid in Grid(4), Grid(4, symmetric=False, per=PerAxis(0)):
        with pytest.raises(ValueError, match="symmetric=False, per tensor"):
            compression.clip_activations(model, [x], grid)
    grid = Grid(4, symmetric=False)
    with pytest.raises(ValueError, match="batches are empty"):
        compression.clip_activations(model, [], grid)
    with pytest.raises(ValueError, match="not finite"):
        compression.clip_activations(model, [x * float("inf")], grid)
    with pytest.raises(ValueError, match="nothing but zeros"):
        compression.clip_activations(nn.Sequential(nn.ReLU()), [-x.abs()], grid)
    with pytest.raises(ValueError, match="no ReLU as a module"):
        compression.clip_activations(LeNet300(), [torch.zeros(1, 1, 28, 28)], grid)
    with pytest.raises(ValueError, match="'9' is no ReLU of this model; those are 1"):
        compression.clip_activations(model, [x], grid, ["9"])
    with pytest.raises(ValueError, match="a list of activations"):
        compression.clip_activations(model, [x], grid, "1")
    with pytest.raises(ValueError, match="from 0 to below 1"):
        compression.threshold_activations(model, [x], 1.0)
    model.add_module("idle", nn.ReLU())
    model.forward = lambda x: model[2](model[1](model[0](x)))
    with pytest.raises(ValueError, match="idle never ran"):
        compression.clip_activations(model, [x], grid)


@given(st.floats(0, 0.99), st.integers(1, 40))
def test_the_smallest_threshold_with_so_many_zeros(sparsity, rows):
    model, x = nn.Sequential(nn.ReLU()), torch.randn(rows, 3)
    made = compression.threshold_activations(model, [x], sparsity)
    zero = (made.model(x) == 0).double().mean()
    assert zero >= sparsity
    assert torch.equal(made.model(x), torch.where(x > made.bounds["0"], x, 0).relu())
    below = x.relu()[x.relu() < made.bounds["0"]]
    if len(below):  # the next smaller threshold leaves too few
        lower = torch.where(x > below.max(), x, 0).relu()
        assert (lower == 0).double().mean() < sparsity
    assert made.bounds["0"] > 0 or made.change == 0


def test_zeros_are_counted_for_what_layers_read(device):
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).to(device)
    model[0].weight.data[1] = 0
    model[0].bias.data[1] = -1
    batches = [torch.randn(5, 2, 4, 4, device=device).relu() for _ in range(3)]
    for batch in batches:
        batch[:, 1] = 0
    found = compression.input_zeros(model, batches)
    read = torch.cat([model[:3](x) for x in batches])
    assert found.share["0"] == pytest.approx(float((torch.cat(batches) == 0).double().mean()))
    assert found.share["3"] == pytest.approx(float((read == 0).double().mean()))
    assert found.always["0"] == 0.5
    assert found.always["3"] == pytest.approx(float((read == 0).all(0).double().mean()))
    assert found.always["3"] >= 1 / 3


@given(
    shape=st.sampled_from([(6,), (1, 6), (5, 6), (2, 3, 6)]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    bias=st.booleans(),
)
def test_skipped_zeros_change_nothing(shape, share, bias):
    layer = nn.Linear(6, 4, bias=bias).double()
    x = torch.randn(shape).double() * (torch.rand(shape) >= share)
    skipping = compression.SkipZeros(layer)
    torch.testing.assert_close(skipping(x), layer(x))
    skipping(x).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(skipping.columns.grad.T, layer.weight.grad)


def test_zeros_are_skipped_where_the_clock_says_so():
    model, x = small(), torch.randn(1, 6)
    never = compression.skip_zeros(model, [x], rounds=1, at_least=float("inf"))
    assert never.names == ()
    assert str(never.model) == str(model)
    batches = [x, torch.eye(6)]
    always = compression.skip_zeros(model, iter(batches), rounds=1, at_least=0)
    assert always.zeros == compression.input_zeros(model, batches).share
    assert always.names == ("0", "2")
    assert isinstance(always.model[2], compression.SkipZeros)
    assert set(always.times) == {"0", "2"}
    torch.testing.assert_close(always.model(x), model(x))
    with pytest.raises(ValueError, match="has no linear layer"):
        compression.skip_zeros(nn.Conv2d(1, 1, 1), [torch.zeros(1, 1, 2, 2)])
    with pytest.raises(ValueError, match="batches are empty"):
        compression.skip_zeros(model, [])


@given(
    groups=st.sampled_from([(1, 4), (4, 1), (2, 4), (4, 4), (2, 2)]),
    stride=st.integers(1, 2),
    kernels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
)
def test_convolutions_in_groups_merge(groups, stride, kernels, bias):
    first = nn.Conv2d(4, 8, kernels[0], stride, 1, groups=groups[0], bias=bias).double()
    second = nn.Conv2d(8, 12, kernels[1], stride, groups=groups[1]).double()
    x = torch.randn(2, 4, 9, 10).double()
    merged = compression.merge_pair(first, second)
    assert merged.groups == (groups[0] if groups[0] == groups[1] else 1)
    torch.testing.assert_close(merged(x), second(first(x)))


def block(width=4, times=6, *, norms=True):
    """1×1, depthwise 3×3, 1×1: the inverted residual of MobileNetV2, as a sequence."""
    wide, bias = width * times, not norms
    parts = [
        nn.Conv2d(width, wide, 1, bias=bias), nn.BatchNorm2d(wide), nn.ReLU(inplace=True),
        nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=bias), nn.BatchNorm2d(wide), nn.ReLU(),
        nn.Conv2d(wide, width, 1, bias=bias), nn.BatchNorm2d(width),
    ]  # fmt: skip
    return nn.Sequential(*(p for p in parts if norms or not isinstance(p, nn.BatchNorm2d)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.relu, self.body = nn.Conv2d(1, 4, 3), nn.ReLU(), block()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.stem(x))
        return self.head((x + self.body(x)).mean((2, 3)))


def test_links_and_whether_they_pay():
    model, example = Residual(), torch.zeros(1, 1, 9, 9)
    links = {link.activations: link for link in compression.removable(model, example)}
    assert set(links) == {("body.2",), ("body.5",), ("body.2", "body.5")}
    both = links["body.2", "body.5"]
    assert [link.activations for link in links.values() if link.pays] == [both.activations]
    assert both.layers == ("body.0", "body.3", "body.6")
    assert both.macs == (49 * (4 * 24 + 24 * 9 + 24 * 4), 49 * 4 * 4 * 9)
    assert both.moved
    same = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)]
    twice = nn.Sequential(same[0], nn.ReLU(), same[1])
    (link,) = compression.removable(twice, torch.zeros(1, 4, 9, 9))
    assert not link.pays
    assert link.moved
    assert link.macs == (81 * 18 * 4 * 4, 81 * 25 * 4 * 4)
    with pytest.raises(ValueError, match="longest=0"):
        compression.removable(twice, torch.zeros(1, 4, 9, 9), longest=0)
    with pytest.raises(ValueError, match="separate_activations"):
        compression.removable(LeNet300(), torch.zeros(1, 1, 28, 28))


def shallower(model, shape, remove, epochs=(1, 1)):
    x, y = torch.randn(16, *shape), torch.randint(3, (16,))
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    return compression.shallower(
        model, x[:1], batches, supervised(), remove=remove, how=Linearise(epochs)
    )


def test_a_block_becomes_one_convolution(device):
    model = Residual().to(device)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.weight.uniform_(0.5, 2)
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(16, 1, 9, 9, device=device), torch.randint(3, (16,), device=device)
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    found = compression.shallower(
        model, x[:1], batches, supervised(), remove=1, how=Linearise((1, 2))
    )
    body = found.model.body
    layers = [m for m in body if not isinstance(m, nn.Identity)]
    assert str(layers[0]) == "Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    assert len(layers) == 1
    assert found.depth == (5, 3)
    assert found.difference < 1e-12
    assert found.rounding < 1e-4
    assert found.border > 0
    assert set(found.slopes) == {"body.2", "body.5"}
    assert found.model.training
    assert isinstance(found.model.relu, nn.ReLU), "what stays is as it was"
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert "layers        5 -> 3" in str(found)


def test_linked_layers_merge_exactly_once_their_padding_is_moved():
    """Against the layers themselves; and away from the border against the paddings as they were."""
    chain = nn.Sequential(
        nn.Conv2d(2, 6, 1, bias=False), nn.ReLU(), nn.Conv2d(6, 5, 3, 1, 1),
        nn.ReLU(), nn.Conv2d(5, 3, 3, 2, 2),
    ).double()  # fmt: skip
    x = torch.randn(2, 2, 15, 15).double()
    link = next(k for k in compression.removable(chain, x) if len(k.activations) == 2)
    assert link.moved
    bare = nn.Sequential(chain[0], chain[2], chain[4])
    expected = copy.deepcopy(bare)(x)
    move_padding_(chain, link)
    assert [chain[k].padding for k in (0, 2, 4)] == [(3, 3), (0, 0), (0, 0)]
    merged = compression.merge_links(chain, x, [link])
    assert merged[0].kernel_size == (5, 5)
    assert isinstance(merged[4], nn.Identity)
    torch.testing.assert_close(merged(x), bare(x))
    torch.testing.assert_close(merged(x)[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])
    assert not torch.allclose(merged(x), expected), "the border did change"
    with pytest.raises(ValueError, match="share a layer"):
        compression.merge_links(chain, x, [link, link])


@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2), (3, 1)])
def test_padding_is_moved_by_as_many_strides(stride):
    """Without its border, the first layer makes what it made before; the second one reads all."""
    pair = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride, padding=(1, 0)), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=(1, 2))
    ).double()
    x = torch.randn(2, 2, 14, 15).double()
    made, shape = pair[0](x), pair(x).shape
    move_padding_(pair, Link(("1",), ("0", "2"), (0, 0), moved=True))
    torch.testing.assert_close(pair[0](x)[..., 1:-1, 2:-2], made)
    assert pair(x).shape == shape
    assert pair[2].padding == (0, 0)


def test_the_activation_that_the_loss_needs_least_goes():
    """One activation is needed (|x| of two features), the other sees positive numbers alone."""
    torch.manual_seed(0)
    needed = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 4))
    idle = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        needed[0].weight.copy_(torch.tensor([1.0, -1] * 4)[:, None])
        needed[0].bias.zero_()
        needed[2].weight.fill_(0.1)
        needed[2].bias.zero_()
        idle[0].bias.fill_(9)
    model = nn.Sequential(*needed, nn.Dropout(0.0), nn.Flatten(), *idle)
    x = torch.randn(64, 1) * 3
    y = (x[:, 0].abs() > 2).long()
    how = Linearise((12, 1), strength=0.02, slope_rate=0.05)
    found = compression.shallower(model, x[:1], [(x, y)] * 4, supervised(), remove=1, how=how)
    assert found.slopes["6"] > found.slopes["1"]
    assert [link.activations for link in found.links] == [("6",)]


def test_what_cannot_be_removed_is_said():
    model = Residual()
    with pytest.raises(ValueError, match=r"remove=2: .*\n.*without body.2, body.5"):
        shallower(model, (1, 9, 9), 2)
    with pytest.raises(ValueError, match="remove=0"):
        shallower(model, (1, 9, 9), 0)
    with pytest.raises(ValueError, match="names no activation"):
        shallower(model, (1, 9, 9), [])
    with pytest.raises(ValueError, match=r"read the bare output of relu|is read elsewhere too"):
        shallower(model, (1, 9, 9), ["relu"])
    with pytest.raises(ValueError, match="'nothing' is no activation"):
        shallower(model, (1, 9, 9), ["nothing"])
    batches = iter([(torch.zeros(1, 1, 9, 9), torch.zeros(1).long())])
    with pytest.raises(ValueError, match=r"with a len\(\)"):
        compression.shallower(model, torch.zeros(1, 1, 9, 9), batches, supervised(), remove=1)
    convs = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 3, 3, padding=1)
    twice = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for settings in (0, 1), (1, 0):
        with pytest.raises(ValueError, match="at least one epoch"):
            Linearise(settings)
    with pytest.raises(ValueError, match="above 0"):
        Linearise(strength=0)
    with pytest.raises(ValueError, match=r"remove=1: .* none"):
        shallower(twice, (1, 9, 9), 1)
    named = shallower(twice, (1, 5, 5), ["1"])
    assert named.depth == (2, 1), "a named one may cost more"
    assert named.costs[1].macs > named.costs[0].macs
