"""Learned rounding: on the grid, up or down alone, never worse than the nearest, near the best."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from structopt import compression
from structopt.compression import MSE, Grid, NormalFloat, PerAxis, PerGroup, PerTensor

GRIDS = st.builds(
    Grid,
    st.integers(2, 4),
    st.booleans(),
    st.sampled_from([PerTensor(), PerAxis(0), PerGroup(4)]),
) | st.sampled_from([Grid(1), Grid(3, per=PerAxis(0), levels=NormalFloat())])


def lost(weight, coded, hessian):
    """What each row loses of what it makes."""
    off = coded.dequantize() - weight
    return ((off @ hessian) * off).sum(-1)


def related(inputs, device="cpu"):
    x = torch.randn(200, inputs, device=device).double()
    return x @ torch.randn(inputs, inputs, device=device).double()


@given(GRIDS, st.integers(0, 50))
@settings(max_examples=20)
def test_every_weight_goes_up_or_down_and_no_row_loses_more_than_by_the_nearest(grid, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 10, generator=draw).double()
    weight[:, ::4] = 0
    x = torch.randn(60, 10, generator=draw).double() @ torch.randn(10, 10, generator=draw).double()
    made = compression.adaround(weight, x.T @ x, grid, steps=60)
    nearest = compression.quantize(weight, grid)
    assert torch.equal(made.steps.scale, nearest.steps.scale)
    assert made.codes.dtype == nearest.codes.dtype
    assert ((made.codes >= grid.codes[0]) & (made.codes <= grid.codes[1])).all()
    assert (made.codes.int() - nearest.codes.int()).abs().max() <= 1
    turned = made.codes != nearest.codes
    one, two = (coded.dequantize() - weight for coded in (made, nearest))
    assert (one * two <= 0)[turned].all(), "the value on the other side, and no other one"
    if grid.bits > 1:
        assert (made.dequantize()[weight == 0] == 0).all(), "a pruned weight stays pruned"
    before, after = (lost(weight, coded, x.T @ x) for coded in (nearest, made))
    assert (after <= before * (1 + 1e-9)).all()


def test_close_to_the_best_of_all_roundings(device):
    """Each row against every way to round its weights up or down."""
    share = []
    for _ in range(4):
        x, weight = related(8, device), torch.randn(4, 8, device=device).double()
        hessian, grid = x.T @ x, Grid(4, per=PerAxis(0))
        made = compression.adaround(weight, hessian, grid)
        scale = made.steps.scale[:, None]
        ups = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)), device=device).double()
        every = (((weight / scale).floor() + ups[:, None]).clamp(-7, 7)) * scale - weight
        best = ((every @ hessian) * every).sum(-1).amin(0)
        nearest = lost(weight, compression.quantize(weight, grid), hessian)
        found = lost(weight, made, hessian)
        assert (found >= best * (1 - 1e-6)).all()
        share.append((nearest - found).sum() / (nearest - best).sum())
    assert torch.stack(share).mean() > 0.7, share


def test_where_inputs_are_unrelated_nothing_beats_the_nearest(device):
    weight, grid = torch.randn(4, 30, device=device).double(), Grid(3, per=PerAxis(0))
    hessian = torch.diag(torch.arange(1.0, 31, device=device)).double()
    made = compression.adaround(weight, hessian, grid, steps=100)
    assert torch.equal(made.codes, compression.quantize(weight, grid).codes)
    silent = compression.adaround(weight, torch.zeros_like(hessian), grid, steps=10)
    assert torch.equal(silent.codes, compression.quantize(weight, grid).codes)


def test_groups_have_inputs_of_their_own(device):
    weight, grid = torch.randn(6, 10, device=device).double(), Grid(3, per=PerAxis(0), fit=MSE())
    inputs = [related(10, device) for _ in range(2)]
    hessians = torch.stack([x.T @ x for x in inputs])
    made = compression.adaround(weight, hessians, grid, steps=50)
    for part, own in enumerate((slice(0, 3), slice(3, 6))):
        alone = compression.adaround(weight[own], hessians[part], grid, steps=50)
        assert torch.equal(made.codes[own], alone.codes)


def test_the_weights_of_a_model_one_layer_after_the_other(device):
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 4)
    ).to(device)
    x, grid = torch.randn(20, 2, 8, 8, device=device), Grid(3, per=PerAxis(0))
    x = 0.3 * x + x.mean((2, 3), keepdim=True) + 1  # neighbours are alike
    before = copy.deepcopy(model.state_dict())
    codes = compression.adaround_weights(model, [(x, 0)], grid, steps=60)
    assert list(codes) == ["0.weight", "2.weight", "4.weight"]
    patches = F.unfold(x, 3).transpose(0, 1).flatten(1)
    first = compression.adaround(model[0].weight, patches @ patches.T, grid, steps=60)
    assert torch.equal(codes["0.weight"].codes, first.codes)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    nearest = compression.quantize_weights(model, grid)
    far = []
    for found in codes, nearest:
        made = compression.put_(copy.deepcopy(model), found)
        far.append(float((made(x) - model(x)).detach().norm()))
    assert far[0] < 0.8 * far[1]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"hessian of shape \(3, 3\) does not fit a weight"):
        compression.adaround(torch.ones(2, 4), torch.eye(3), Grid())
    for steps, price in (0, 1.0), (5, -1.0), (5, float("nan")):
        with pytest.raises(ValueError, match=f"steps={steps}, price={price}"):
            compression.adaround(torch.ones(2, 4), torch.eye(4), Grid(), steps=steps, price=price)
    model = nn.Linear(3, 2)
    model.weight.data[:, 0] = torch.nan
    with pytest.raises(ValueError, match="weight: 2 of 6 numbers are NaN"):
        compression.adaround_weights(model, [torch.ones(1, 3)], Grid())
