"""Dense layers into groups: exact where the weights allow it, and the best order is found."""

import copy
import functools
import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slicing_networks import ALL, made
from torch import nn

from structopt.channels import channel_groups
from structopt.networks import LeNet5
from structopt.slicing import (
    Averaged,
    Averaging,
    Branches,
    GroupedLinear,
    Mixed,
    Reorder,
    Shuffled,
    assign_groups,
    group_layers,
)
from structopt.slicing.assigning import balanced
from structopt.slicing.grouped import mixing


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def weights(model):
    return sum(p.numel() for p in model.parameters())


def parts_of(size, groups=2):
    return torch.randperm(size) % groups


# ------------------------------------------------------------------ which channels belong together


@given(
    size=st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)]), seed=st.integers(0, 9999),
    whole=st.booleans(),
)  # fmt: skip
def test_the_balanced_assignment_is_the_best_of_all(size, seed, whole):
    (n, groups), draw = size, np.random.default_rng(seed)
    scores = draw.integers(0, 4, (n, groups)).astype(float) if whole else draw.random((n, groups))
    start = draw.permutation(n) % groups
    found = balanced(scores, start)
    assert np.bincount(found).tolist() == [n // groups] * groups
    every = itertools.product(range(groups), repeat=n)
    fair = (a for a in every if np.bincount(a, minlength=groups).tolist() == [n // groups] * groups)
    best = max(scores[range(n), a].sum() for a in map(list, fair))
    np.testing.assert_allclose(scores[range(n), found].sum(), best, rtol=1e-9)


@given(
    groups=st.integers(2, 5),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_blocks_that_are_there_are_found(groups, rows, columns, seed):
    torch.manual_seed(seed)
    blocks = [torch.rand(rows, columns, dtype=torch.float64) + 0.1 for _ in range(groups)]
    weight = torch.block_diag(*blocks)
    out, into = torch.randperm(groups * rows), torch.randperm(groups * columns)
    found = assign_groups(weight[out][:, into], groups)
    assert found.kept == pytest.approx(1, abs=1e-12)
    inside = found.outputs[:, None] == found.inputs[None]
    assert (weight[out][:, into][torch.from_numpy(~inside)] == 0).all()


@pytest.mark.parametrize(
    ("kernel", "groups", "margin"),
    [
        ((), 2, 1.2),
        ((), 4, 1.55),
        ((), 8, 2.2),
        ((3, 3), 2, 1.05),
        ((3, 3), 4, 1.15),
        ((3, 3), 8, 1.35),
    ],
)
def test_even_in_noise_the_order_found_keeps_more_than_the_given_one(kernel, groups, margin):
    """Normal weights have no blocks; trained weights leave more to be found."""
    weight = torch.randn(64, 64, *kernel)
    blocks = torch.arange(64) * groups // 64
    squares = weight.square().flatten(2).sum(2) if kernel else weight.square()
    given = float(squares[blocks[:, None] == blocks[None]].sum() / squares.sum())
    found = assign_groups(weight, groups)
    assert found.kept > margin * given
    inside = torch.from_numpy(found.outputs[:, None] == found.inputs[None])
    assert found.kept == pytest.approx(float(squares[inside].sum() / squares.sum()))
    assert np.array_equal(found.inputs, assign_groups(weight, groups).inputs)


@pytest.mark.parametrize(
    ("shape", "groups", "noise"),
    [((64, 64), 8, 0.3), ((64, 64), 8, 0.6), ((128, 128), 16, 0.3), ((32, 96), 4, 0.8)],
)
def test_blocks_are_found_under_noise(shape, groups, noise):
    (rows, columns), draw = shape, np.random.default_rng(0)
    out, into = draw.permutation(rows) % groups, draw.permutation(columns) % groups
    inside = out[:, None] == into[None]
    weight = draw.standard_normal(shape) * (inside + noise)
    found = assign_groups(torch.from_numpy(weight), groups)
    assert found.kept >= float((weight**2 * inside).sum() / (weight**2).sum()) * (1 - 1e-9)


def greedily(squares, groups):
    """The largest weight first: both its channels into one group, where there is room."""
    out, into = (np.full(size, -1) for size in squares.shape)

    def free(found):
        return [k for k in range(groups) if (found == k).sum() < len(found) // groups]

    for place in (-squares).argsort(None):
        row, column = divmod(int(place), len(into))
        if out[row] < 0 and into[column] < 0:
            both = set(free(out)) & set(free(into))
            if both:
                out[row] = into[column] = min(both)
        elif out[row] < 0 and into[column] in free(out):
            out[row] = into[column]
        elif into[column] < 0 and out[row] in free(into):
            into[column] = out[row]
    for found in (out, into):
        for one in np.flatnonzero(found < 0):
            found[one] = free(found)[0]
    return float(squares[out[:, None] == into[None]].sum() / squares.sum())


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "sparse", "one product"])
def test_no_greedy_choice_keeps_more(kind, groups):
    draw = np.random.default_rng(1)
    weight = {
        "normal": draw.standard_normal((32, 48)),
        "heavy tails": draw.standard_t(1.5, (32, 48)),
        "sparse": draw.standard_normal((32, 48)) * (draw.random((32, 48)) < 0.05),
        "one product": np.outer(draw.exponential(size=32), draw.exponential(size=48)),
    }[kind]
    found = assign_groups(torch.from_numpy(weight), groups)
    assert found.kept >= greedily(weight**2, groups) * (1 - 1e-9)


# ------------------------------------------------------------------ networks


@functools.cache
def analysed(name, device):
    model, x = made(name, device)
    return channel_groups(model, x)


def blocked(model, channels, together):
    """The model with block-diagonal weights, up to a random order of channels; how many layers."""
    model, parts, count = copy.deepcopy(model), {}, 0

    def side(name, dim):
        """The part of each entry of an axis that one group covers, entry by channel."""
        for group in channels:
            for member in group.members:
                here = (member.parameter, member.dim) == (f"{name}.weight", dim)
                if here and sorted(member.channel) == list(range(group.size)):
                    part = parts.setdefault(group, parts_of(group.size))
                    return part[member.channel] if together else parts_of(group.size)
        return None

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and getattr(layer, "groups", 1) == 1:
            out, into = side(name, 0), side(name, 1)
            if out is not None and into is not None and not (len(out) % 2 or len(into) % 2):
                inside = (out[:, None] == into[None]).to(layer.weight.device)
                layer.weight.data *= inside.reshape(*inside.shape, *[1] * (layer.weight.ndim - 2))
                count += 1
    return model, count


@pytest.mark.parametrize("exchange", [Branches(), Shuffled()])
@pytest.mark.parametrize("name", [name for name in ALL if name != "ViT"])
def test_block_diagonal_weights_are_grouped_exactly(name, exchange, device):
    full, x = made(name, device)
    model, count = blocked(full, analysed(name, device), isinstance(exchange, Branches))
    before = copy.deepcopy(model.state_dict())
    small = group_layers(model, x, 2, exchange=exchange)
    x = torch.randn_like(x)
    assert_close(small(x), model(x))
    in_groups = [
        m
        for m in small.modules()
        if isinstance(m, GroupedLinear) or (isinstance(m, nn.Conv2d) and m.groups == 2)
    ]
    assert len(in_groups) == count > 0
    kinds = {type(m) for m in small.modules()}
    assert Reorder not in kinds or isinstance(exchange, Shuffled)
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert weights(model) - weights(small) == zeros - sum(
        int((p == 0).sum()) for p in small.parameters()
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["DenseNet", "TinyTransformer", "VGG", "ResNet-20"])
def test_with_full_rank_nothing_is_lost(name, device):
    model, x = made(name, device)
    assert_close(group_layers(model, x, 2, exchange=Mixed(9999))(x), model(x))


@pytest.mark.parametrize("rank", [1, 3, 8, 99])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_a_thin_layer_gives_back_what_its_rank_can(kind, rank, device):
    """What stays lost are the singular values beyond the rank (Eckart & Young, 1936)."""
    settings = {"device": device, "dtype": torch.float64}
    layer = kind(8, 12, **({"kernel_size": 1} if kind is nn.Conv2d else {}), **settings)
    thin = mixing(layer, 2, rank)
    units = torch.eye(8, **settings)
    units = units if kind is nn.Linear else units[:, :, None, None]
    error = (thin(units) - layer(units)).norm()
    weight = layer.weight.flatten(1).clone()
    weight[:6, :4] = weight[6:, 4:] = 0
    assert_close(error, torch.linalg.svdvals(weight)[rank:].norm())
    assert thin.down.weight.shape[0] == min(rank, 8)


def test_averaging_begins_as_branches_and_ends_with_equal_groups(device):
    model, x = made("ResNet-20", device)
    branches = group_layers(model, x, 2, exchange=Branches())
    averaged = group_layers(model, x, 2, exchange=Averaged())
    assert_close(averaged(x), branches(x))
    shares = [m.share for m in averaged.modules() if isinstance(m, Averaging)]
    averaged(x).sum().backward()
    assert all(share.grad is not None and share.grad != 0 for share in shares)
    exchange = Averaging(2, -3).to(device)
    exchange.share.data.fill_(1)
    y = torch.randn(3, 4, 5, 5, dtype=torch.float64, device=device)
    found = exchange.double()(y)
    assert_close(found[:, :2], (y[:, :2] + y[:, 2:]) / 2)
    assert_close(found[:, :2], found[:, 2:])


def test_layers_of_fixed_order_can_be_shuffled_when_they_are_named(device):
    """In torch's own attention the stream's order is tied to the heads."""
    model, x = made("ViT", device)
    names = ["encoder.layers.*.mlp.*"]
    with pytest.raises(ValueError, match="its inputs cannot be put in any order"):
        group_layers(model, x, 2, exchange=Branches(), layers=names)
    for block in model.encoder.layers:
        for layer in (block.mlp[0], block.mlp[3]):
            out, into = (parts_of(size) for size in layer.weight.shape)
            layer.weight.data *= (out[:, None] == into[None]).to(device)
    small = group_layers(model, x, 2, layers=names)
    assert sum(isinstance(m, GroupedLinear) for m in small.modules()) == 4
    assert_close(small(x), model(x))


def test_each_layer_keeps_at_least_what_the_given_order_keeps(device):
    model, x = made("VGG", device)
    small = group_layers(model, x, 2)
    squares = {
        k: float(p.detach().square().sum()) for k, p in small.named_parameters() if p.ndim > 1
    }
    grouped = [n for n, m in small.named_modules() if getattr(m, "groups", 1) == 2]
    assert grouped
    for name in grouped:
        origin = name if f"{name}.weight" in model.state_dict() else name.rpartition(".")[0]
        dense = model.get_submodule(origin).weight
        given = sum(
            float(part.chunk(2, 1)[k].detach().square().sum())
            for k, part in enumerate(dense.chunk(2))
        )
        assert squares[f"{name}.weight"] >= given * (1 - 1e-9)


def test_a_grouped_linear_is_block_diagonal(device):
    weight = torch.randn(3, 2, 4, dtype=torch.float64, device=device)
    bias = torch.randn(6, dtype=torch.float64, device=device)
    x = torch.randn(5, 7, 12, dtype=torch.float64, device=device)
    expected = nn.functional.linear(x, torch.block_diag(*weight), bias)
    assert_close(GroupedLinear(weight, bias)(x), expected)


def test_strides_paddings_and_missing_biases_stay(device):
    def conv(*sizes, **settings):
        return nn.Conv2d(*sizes, device=device, dtype=torch.float64, **settings)

    settings = {"stride": 2, "padding": 2, "dilation": 2, "padding_mode": "reflect", "bias": False}
    model = nn.Sequential(conv(3, 8, 1), conv(8, 12, 3, **settings), nn.ReLU(), conv(12, 4, 1))
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, device=device)
    model, count = blocked(model, channel_groups(model, x), True)
    assert count == 1
    for exchange in (Branches(), Shuffled(), Mixed(99)):
        assert_close(group_layers(model, x, 2, exchange=exchange)(x), model(x))


# ------------------------------------------------------------------ bad input


class Reading(nn.Module):
    """Its own Python looks at the weight of a layer, as transformers' T5 does at that of `wo`."""

    def __init__(self, how):
        super().__init__()
        self.first, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last, self.how = nn.Linear(8, 2), how

    def forward(self, x):
        x = self.b(self.a(self.first(x).relu()).relu())
        if self.how == "shares":
            return self.last(x + nn.functional.linear(x, self.b.weight))
        return self.last(x.to(self.b.weight.dtype))


@pytest.mark.parametrize("exchange", [Branches(), Shuffled(), Averaged(), Mixed(2)], ids=str)
@pytest.mark.parametrize("how", ["shares", "looks"])
def test_a_copy_that_would_not_run_is_refused(how, exchange, device):
    model, x = Reading(how).to(device), torch.randn(2, 4, device=device)
    if how == "looks" and isinstance(exchange, Branches):  # which leave a weight there
        assert group_layers(model, x, 2, exchange=exchange)(x).shape == (2, 2)
        return
    with pytest.raises(ValueError, match=r"does not run with a, b in groups .*layers="):
        group_layers(model, x, 2, exchange=exchange)
    assert group_layers(model, x, 2, exchange=exchange, layers=["a"])(x).shape == (2, 2)


def test_what_is_wrong_is_named():
    model, x = LeNet5(widths=(6, 16, 20)), torch.zeros(1, 1, 28, 28)
    for groups in (1, 2.0, "2"):
        with pytest.raises(ValueError, match=f"at least 2: {groups!r}"):
            group_layers(model, x, groups)
    with pytest.raises(ValueError, match=r"no layer can be split into 5 groups: .*conv2 has 6"):
        group_layers(model, x, 5)
    with pytest.raises(ValueError, match="conv1 has 1 inputs and 6 outputs"):
        group_layers(model, x, 2, layers=["conv1"])
    with pytest.raises(ValueError, match=r"no layer's name fits 'stage9'"):
        group_layers(model, x, 2, layers=["conv2", "stage9"])
    with pytest.raises(ValueError, match="conv1 has 1 inputs and 6 outputs"):
        group_layers(model, x, 2, layers=["conv2", "conv1"])
    up = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ConvTranspose2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    with pytest.raises(ValueError, match="1 is a ConvTranspose2d, no plain layer"):
        group_layers(up, x, 2, layers=["1"])
    for rank in (0, 1.5, 2.0, "2"):
        with pytest.raises(ValueError, match=f"at least 1: {rank!r}"):
            Mixed(rank)
    for shape, groups in (((4, 6), 3), ((4, 6), 2.0), ((0, 4), 2)):
        problem = f"{groups} groups do not split a weight of shape {shape}"
        with pytest.raises(ValueError, match=re.escape(problem)):
            assign_groups(torch.ones(shape), groups)
    with pytest.raises(ValueError, match="the choice of groups needs values"):
        group_layers(copy.deepcopy(model).to("meta"), x.to("meta"), 2)
    with pytest.raises(ValueError, match="the choice of groups needs values"):
        assign_groups(torch.ones(4, 4, device="meta"), 2)
    for layers in ([], "conv2"):
        with pytest.raises(ValueError, match="give a list of names"):
            group_layers(model, x, 2, layers=layers)
    for exchange in ("shuffled", Shuffled):
        with pytest.raises(ValueError, match=r"give Shuffled\(\), Branches\(\)"):
            group_layers(model, x, 2, exchange=exchange)
    with pytest.raises(ValueError, match="numbers that are not finite"):
        assign_groups(torch.full((4, 4), torch.inf), 2)
    broken = copy.deepcopy(model)
    broken.conv2.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="conv2 has weights that are not finite"):
        group_layers(broken, x, 2)
    tied = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    tied[2].weight = tied[1].weight
    with pytest.raises(ValueError, match="1 shares its weight with another layer"):
        group_layers(tied, torch.zeros(1, 8), 2, layers=["1"])
    twice = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with pytest.raises(ValueError, match="0 shares its weight"):
        group_layers(nn.Sequential(twice, twice), torch.zeros(1, 8), 2, layers=["0.0"])


@pytest.mark.parametrize("exchange", [Shuffled(), Mixed(2)], ids=str)
def test_frozen_and_evaluating_layers_stay_so(exchange):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].requires_grad_(False)
    grouped = group_layers(model.bfloat16().eval(), torch.zeros(1, 8).bfloat16(), 2,
                           exchange=exchange, layers=["2"])  # fmt: skip
    assert not any(module.training for module in grouped.modules())
    assert not any(p.requires_grad for p in grouped[2].parameters())
    assert all(p.requires_grad for p in grouped[0].parameters())


@pytest.mark.parametrize("exchange", [Branches(), Shuffled(), Averaged(), Mixed(2)], ids=str)
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_weight_or_a_bias_alone_may_be_frozen(kind, exchange):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    getattr(model[2], kind).requires_grad_(False)
    grouped = group_layers(model, torch.zeros(1, 8), 2, exchange=exchange)
    for name, parameter in grouped[2].named_parameters():
        assert parameter.requires_grad == (name.endswith("bias") == (kind == "weight"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
def test_linears_of_torchs_own_transformer_run_in_groups(nested, device):
    """In evaluation mode torch looks for the weights of plain layers, to fuse them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).double().to(device).eval()
    for block in model.layers:
        for linear in (block.linear1, block.linear2):
            out, into = (parts_of(size) for size in linear.weight.shape)
            linear.weight.data *= (out[:, None] == into[None]).to(device)
    x = torch.randn(3, 5, 8, dtype=torch.float64, device=device)
    grouped = group_layers(model, x, 2, layers=["layers.*.linear*"])
    there = torch.ones(3, 5, device=device).bool()
    there[0, 3:] = False
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert_close(grouped(x), model(x))
            found, expected = (m(x, src_key_padding_mask=~there) for m in (grouped, model))
            assert_close(found[there], expected[there])
