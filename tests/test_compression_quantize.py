"""Grids: torch's codes bit for bit, half a step, a gradient that goes straight through."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structopt import compression
from structopt.compression import (
    MSE,
    Grid,
    MinMax,
    PerAxis,
    PerBlock,
    Percentile,
    PerGroup,
    PerTensor,
    Steps,
)

UNITS = [PerTensor(), PerAxis(0), PerAxis(-1), PerGroup(5), PerGroup(100), PerBlock(2, 4)]
FITS = [MinMax(), Percentile(90), MSE(20)]
GRIDS = st.builds(
    Grid,
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from(UNITS),
    st.sampled_from(FITS),
)
SHAPES = st.sampled_from([(7, 11), (4, 3, 2, 2), (13,), (1, 1)])


def spread(x, grid, per_unit):
    """One number a unit, at each place of the unit: an independent way, by the units of indices."""
    index = grid.per.split(torch.arange(x.numel(), device=x.device).view(x.shape).double())
    full = torch.full((x.numel(),), math.nan, device=x.device, dtype=per_unit.dtype)
    for unit, value in zip(index, per_unit, strict=True):
        full[unit[~unit.isnan()].long()] = value
    assert not full.isnan().any(), "each number lies in one unit"
    return full.view(x.shape)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_equal_to_torch_bit_for_bit(device, symmetric, bits, axis):
    x = torch.randn(30, 700, device=device) * 3 + 0.4
    per = PerTensor() if axis is None else PerAxis(axis)
    grid = Grid(bits, symmetric, per, Percentile(90))
    scale, zero = steps = compression.fit(x, grid)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = compression.fake_quantize(leaf, grid)
    if axis is None:
        theirs = torch.fake_quantize_per_tensor_affine(other, scale, zero.int(), *grid.codes)
    else:
        theirs = torch.fake_quantize_per_channel_affine(other, scale, zero.int(), axis, *grid.codes)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, compression.quantize(x, grid, steps).dequantize())
    upstream = torch.randn_like(x)
    ours.backward(upstream)
    theirs.backward(upstream)
    assert torch.equal(leaf.grad, other.grad)
    assert 0 < (leaf.grad == 0).sum() < x.numel(), "something was clipped"


@pytest.mark.parametrize("axis", [None, 0])
def test_the_integers_are_those_of_torch(axis):
    x = torch.randn(20, 900)
    for symmetric, kind in (True, torch.qint8), (False, torch.quint8):
        grid = Grid(8, symmetric, PerTensor() if axis is None else PerAxis(axis))
        ours = compression.quantize(x, grid)
        scale, zero = ours.steps
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch means to remove them
            if axis is None:
                theirs = torch.quantize_per_tensor(x, float(scale), int(zero), kind)
            else:
                theirs = torch.quantize_per_channel(x, scale, zero.long(), axis, kind)
        assert torch.equal(ours.codes, theirs.int_repr())
        assert torch.equal(ours.dequantize(), theirs.dequantize())


@given(grid=GRIDS, shape=SHAPES, offset=st.floats(-3, 3), seed=st.integers(0, 99))
def test_round_trip_within_half_a_step(grid, shape, offset, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset
    made = compression.quantize(x, grid)
    error = (made.dequantize() - x).abs()
    half = spread(x, grid, made.steps.scale) / 2
    if grid.fit == MinMax():
        assert (error <= half * (1 + 1e-5) + 1e-6).all()
    first, last = grid.codes
    assert made.codes.min() >= first
    assert made.codes.max() <= last
    # Whatever the fit, what lies on the grid's range is rounded to the nearest of its values.
    low = (first - spread(x, grid, made.steps.zero)) * half * 2
    high = (last - spread(x, grid, made.steps.zero)) * half * 2
    inside = (x >= low) & (x <= high)
    assert (error[inside] <= half[inside] * (1 + 1e-5) + 1e-6).all()


@given(grid=GRIDS, shape=SHAPES, dtype=st.sampled_from([16, 32, 64]))
def test_rounding_twice_changes_nothing(grid, shape, dtype):
    x = torch.randn(shape).to(getattr(torch, f"float{dtype}"))
    once = compression.quantize(x, grid)
    again = compression.quantize(once.dequantize(), grid, once.steps)
    assert torch.equal(once.codes, again.codes)
    assert once.dequantize().dtype == x.dtype
    assert torch.equal(compression.fake_quantize(x, grid), once.dequantize())


@given(grid=GRIDS, shape=SHAPES)
def test_zeros_stay_zeros(grid, shape):
    x = torch.randn(shape)
    x.view(-1)[::2] = 0
    values = compression.quantize(x, grid).dequantize()
    if not grid.is_sign:
        assert (values.view(-1)[::2] == 0).all()
    assert (compression.quantize(torch.zeros(shape), grid).dequantize() == 0).all()


def test_what_is_in_a_group_and_in_a_block(device):
    x = torch.arange(24.0, device=device).view(4, 3, 2) + 1
    scale = compression.fit(x, Grid(8, per=PerGroup(4))).scale * 127
    assert scale.round().tolist() == [4, 6, 10, 12, 16, 18, 22, 24]  # two groups a row of six
    scale = compression.fit(x, Grid(8, per=PerBlock(3, 2))).scale * 127
    assert scale.round().tolist() == [14, 16, 18, 20, 22, 24]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_mse_is_as_good_as_a_dense_search(bits, symmetric, device):
    x = torch.randn(3, 400, device=device, dtype=torch.double).pow(3)

    def error(fit):
        grid = Grid(bits, symmetric, PerAxis(0), fit)
        return (compression.quantize(x, grid).dequantize() - x).square().sum(1)

    dense = error(MSE(3000))
    assert (error(MSE()) <= 1.02 * dense).all()
    assert (error(MSE()) <= error(MinMax())).all()
    if bits == 1 and symmetric:  # known in closed form: the level is the mean magnitude
        best = (x.square().mean(1) - x.abs().mean(1).square()) * 400
        torch.testing.assert_close(dense, best, rtol=1e-4, atol=0)


@given(percent=st.sampled_from([50.0, 90.0, 99.0, 100.0]), seed=st.integers(0, 20))
def test_a_percentile_clips_that_share_and_no_more(percent, seed):
    x = torch.randn(1, 1000, generator=torch.Generator().manual_seed(seed)).double()
    scale = compression.fit(x, Grid(8, fit=Percentile(percent))).scale
    assert int((x.abs() > scale * 127 * (1 + 1e-12)).sum()) == 1000 - round(10 * percent)
    low, high = x.min(), x.max()
    scale, zero = compression.fit(x, Grid(8, False, fit=Percentile(percent)))
    reach = (x < -(zero + 0.51) * scale) | (x > (255.51 - zero) * scale)
    assert int(reach.sum()) <= 1000 - 10 * percent
    assert -(zero + 0.5) * scale <= max(low, -zero * scale)
    assert (255 - zero) * scale <= high + scale


def test_the_step_of_a_ragged_group_ignores_what_is_not_there(device):
    x = torch.randn(2, 7, device=device)
    for fit in FITS:
        ragged = compression.fit(x, Grid(3, True, PerGroup(5), fit)).scale
        alone = compression.fit(x[:, 5:].contiguous(), Grid(3, True, PerGroup(2), fit)).scale
        assert torch.equal(ragged[1::2], alone)


@pytest.mark.parametrize("value", [1e-45, 1e-38, 3e38, -2.5])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_distinct_value_however_small_or_large(value, symmetric):
    x = torch.full((3, 5), value)
    for per in UNITS:
        values = compression.quantize(x, Grid(8, symmetric, per)).dequantize()
        torch.testing.assert_close(values, x, rtol=1e-6, atol=1.2e-38)


def test_min_max_reaches_the_largest_number(device):
    x = torch.randn(5, 40, device=device, dtype=torch.double)
    for bits in range(1, 9):
        scale, zero = compression.fit(x, Grid(bits, per=PerAxis(0)))
        last = Grid(bits).codes[1]
        torch.testing.assert_close((last - zero) * scale, x.abs().amax(1))


def test_nothing_to_round():
    for shape in (0,), (0, 5), (5, 0):
        for per in UNITS:
            for fit in FITS:
                made = compression.quantize(torch.empty(shape), Grid(per=per, fit=fit))
                assert made.dequantize().shape == shape


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="1 of 3 numbers are NaN or infinite"):
        compression.quantize(torch.tensor([1.0, math.inf, 0]), Grid())
    with pytest.raises(ValueError, match=r"int64, shape \(3,\)"):
        compression.fit(torch.arange(3), Grid())
    for bits in 0, 9, 2.5:
        with pytest.raises(ValueError, match="1 to 8 bits"):
            Grid(bits)
    with pytest.raises(ValueError, match=r"PerAxis\(axis=2\).*\(3, 4\)"):
        compression.quantize(torch.ones(3, 4), Grid(per=PerAxis(2)))
    one = torch.ones(1)
    with pytest.raises(ValueError, match="makes 3 units"):
        compression.quantize(torch.ones(3, 4), Grid(per=PerAxis(0)), Steps(one, one))
    for wrong in (
        lambda: PerGroup(0),
        lambda: PerBlock(2, 0),
        lambda: MSE(0),
        lambda: Percentile(0),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_blocks_larger_than_the_tensor_take_no_more_memory_than_it():
    x = torch.randn(3, 5)
    for per in PerGroup(10**12), PerBlock(10**12, 10**12):
        units = per.split(x)
        assert units.numel() == x.numel()
        assert torch.equal(per.join(units, x.shape), x)


def test_the_largest_numbers_are_fitted():
    x = torch.tensor([3e38, -1e38, 0.0])
    made = compression.quantize(x, Grid(8, fit=MSE()))
    assert made.dequantize().isfinite().all()
    torch.testing.assert_close(made.dequantize(), x, rtol=0.02, atol=2e36)
