"""Weights and batches at the edge, through every technique.

Each gives the exact result, or an error that names the layer and leaves the model as it was.
"""

import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from structopt import compression
from structopt.compression import MSE, Energy, Grid, LeastSquares, MinMax, Percentile, Weights

GRIDS = [Grid(8), Grid(4, False), Grid(1), Grid(2, fit=LeastSquares()), Grid(3, fit=MSE())]


def layer(value, outputs=4, inputs=6):
    """A network of one layer, whose weights are all the same."""
    model = nn.Sequential(nn.Linear(1, 1)).requires_grad_(False)
    model[0] = nn.Linear(1, 1)
    model[0].in_features, model[0].out_features = inputs, outputs
    model[0].weight = nn.Parameter(torch.full((outputs, inputs), value))
    model[0].bias = nn.Parameter(torch.randn(outputs))
    return model


def second_order(model, x, grid=GRIDS[1]):
    return compression.put_(copy.deepcopy(model), compression.gptq_weights(model, [x], grid))


def to_nearest(model, x, grid=GRIDS[1]):
    return compression.put_(copy.deepcopy(model), compression.quantize_weights(model, grid))


def mixed(model, x):
    codes = compression.mix_bits(model, [x], 10_000, Grid()).codes
    return compression.put_(copy.deepcopy(model), codes)


def equalized(model, x):
    return compression.equalize(
        nn.Sequential(*model, nn.ReLU(), nn.Linear(len(model[0].bias), 2)), x
    )


WAYS = {
    "quantize_weights": to_nearest,
    "share_weights": lambda model, x: compression.put_(
        copy.deepcopy(model), compression.share_weights(model, 256)
    ),
    "gptq_weights": second_order,
    "mix_bits": mixed,
    "prepare_qat": lambda model, x: compression.prepare_qat(model, Grid(4)).finish()[0],
    "prepare_rate": lambda model, x: compression.prepare_rate(model).finish()[0],
    "factorize to an energy": lambda model, x: compression.factorize(model, Energy(0.9)),
    "factorize to a size": lambda model, x: compression.factorize(model, Weights(0.9)),
    "factorize by the inputs": lambda model, x: compression.factorize(
        model, Energy(0.9), batches=[x]
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("value", "shape"),
    [(0.0, (4, 6)), (0.7, (4, 6)), (0.0, (0, 6)), (0.0, (4, 0))],
    ids=["zeros", "one value", "no outputs", "no inputs"],
)
def test_few_numbers_come_through_exactly(way, value, shape):
    model, x = layer(value, *shape), torch.randn(5, shape[1])
    made = WAYS[way](model, x)
    torch.testing.assert_close(made(x), model(x))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", [*WAYS, "factorize to a rank", "equalize", "spectra"])
def test_weights_that_are_no_numbers_are_named(way, value):
    more = {
        "factorize to a rank": lambda model, x: compression.factorize(model, {"0": 1}),
        "spectra": lambda model, x: compression.spectra(model),
        "equalize": equalized,
    }
    model, x = layer(0.5), torch.randn(5, 6)
    model[0].weight.data[2, 3] = value
    with pytest.raises(ValueError, match=r"^0(\.weight)?: 1 of 24 numbers are NaN or infinite"):
        (WAYS | more)[way](model, x)


def corrected(model, x):
    return compression.correct_biases_(model, layer(0.4), [x])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "way",
    [
        second_order, mixed, corrected, WAYS["factorize by the inputs"],
        lambda model, x: compression.calibrate(model, [x], Grid(8)),
        lambda model, x: compression.prepare_qat(model, Grid(4), inputs=Grid(8), batches=[x]),
    ],
)  # fmt: skip
def test_batches_that_are_no_numbers_change_nothing(way, value):
    model, x = layer(0.5), torch.randn(5, 6)
    x[3, 1] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="NaN or infinite"):
        way(model, x)
    assert all(torch.equal(model.state_dict()[key], old) for key, old in before.items())


def test_a_later_layer_without_numbers_leaves_earlier_biases_alone():
    reference = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model, x = copy.deepcopy(reference), torch.randn(5, 3)
    model[0].weight.data.mul_(0.5)
    model[1].weight.data[0, 0] = math.nan
    before = model[0].bias.clone()
    with pytest.raises(ValueError, match="what 1 makes of these batches"):
        compression.correct_biases_(model, reference, [x])
    assert torch.equal(model[0].bias, before)


@pytest.mark.parametrize("value", [0.0, 2.0, -3.0])
@pytest.mark.parametrize("fit", [MinMax(), Percentile(99), MSE()], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_batches_of_one_value_are_kept_exactly(value, fit, symmetric):
    model, x, grid = layer(0.5), torch.full((4, 6), value), Grid(8, symmetric, fit=fit)
    made = compression.round_inputs(model, grid, compression.calibrate(model, [x], grid))
    torch.testing.assert_close(made(x), model(x))
    torch.testing.assert_close(second_order(model, x)(x), model(x))
    assert mixed(model, x)(x).isfinite().all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_files_of_few_numbers(tmp_path, grid):
    for value, shape in (0.0, (4, 6)), (0.7, (4, 6)), (0.0, (0, 6)), (0.0, (4, 0)):
        model = layer(value, *shape)
        codes = compression.quantize_weights(model, grid)
        made = compression.put_(copy.deepcopy(model), codes)
        compression.save(made, tmp_path / "x", codes)
        found = compression.load(tmp_path / "x", layer(9.0, *shape))
        assert torch.equal(found[0].weight, made[0].weight)
        torch.testing.assert_close(found[0].weight, model[0].weight)


@pytest.mark.parametrize(
    ("hessian", "match"),
    [
        (torch.full((6, 6), math.nan), r"hessian, \(6, 6\), holds NaN or infinite"),
        (torch.full((6, 6), math.inf), r"hessian, \(6, 6\), holds NaN or infinite"),
        (-torch.eye(6), r"hessian of shape \(6, 6\) is no sum of x xᵀ"),
    ],
)
def test_hessians_that_are_none(hessian, match):
    for way in (
        lambda w: compression.gptq(w, hessian, Grid(4)),
        lambda w: compression.adaround(w, hessian, Grid(4), steps=2),
        lambda w: compression.share_vectors(w, 3, 2, hessian=hessian),
    ):
        with pytest.raises(ValueError, match=match):
            way(torch.randn(4, 6))
        with pytest.raises(ValueError, match="does not fit a weight of shape"):
            way(torch.randn(4))
    with pytest.raises(ValueError, match=r"shape \(3, 6, 6\) does not fit a weight of shape"):
        compression.gptq(torch.randn(4, 6), torch.eye(6).expand(3, 6, 6), Grid(4))
    turned = torch.eye(6) + 4 * (1 - torch.eye(6))  # a diagonal as of a sum, and yet none
    with pytest.raises(ValueError, match=r"is no sum of x xᵀ, or damp=0.01 is too small"):
        compression.gptq(torch.randn(4, 6), turned, Grid(4))
    with pytest.raises(ValueError, match="is no sum of x xᵀ"):
        compression.share_vectors(torch.randn(4, 6), 3, 2, hessian=turned)


def test_a_layer_in_two_places_is_exchanged_in_both():
    x = torch.randn(20, 6)
    relu, linear = nn.ReLU(), nn.Linear(6, 6)
    model = nn.Sequential(linear, relu, linear, relu)
    grid = Grid(3, symmetric=False, fit=MSE())
    for made in (
        compression.clip_activations(model, [x], grid).model,
        compression.threshold_activations(model, [x], 0.7).model,
    ):
        assert made[1] is made[3]
        assert not isinstance(made[1], nn.ReLU)
    made = compression.factorize(model, {"0": 6})
    assert made[0] is made[2]
    torch.testing.assert_close(made(x), model(x))
    for made in (
        compression.skip_zeros(model, [x[:1]], rounds=1, at_least=0).model,
        compression.IntMM().build(model, x).inner,
    ):
        assert made[0] is made[2]
        assert not isinstance(made[0], nn.Linear)


def test_of_more_numbers_than_single_precision_counts_all_are_covered():
    x = torch.ones(2**24 + 3)
    x[0] = 2
    scale = compression.fit(x, Grid(8, fit=Percentile(100))).scale
    assert float(scale) == pytest.approx(2 / 127)


def test_batches_without_examples_are_as_good_as_none():
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))
    empty = torch.zeros(0, 6)
    for way in (
        lambda b: compression.calibrate(model, b, Grid(8)),
        lambda b: compression.gptq_weights(model, b, Grid(4)),
        lambda b: compression.smooth_inputs(model, b),
        lambda b: compression.correct_biases_(copy.deepcopy(model), model, b),
    ):
        with pytest.raises(ValueError, match="the batches are empty"):
            way([empty])
        way([torch.randn(5, 6), empty])  # beside others one does no harm


def finite_or_refused(x, grid):
    try:
        values = compression.quantize(x, grid).dequantize()
        scale = compression.fit(x, grid).scale
    except ValueError as error:
        return f"reaches beyond {x.dtype}" in str(error)
    return bool(values.isfinite().all() and scale.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_at_the_end_of_their_type_are_rounded_or_refused(dtype, device):
    end = torch.finfo(dtype).max
    for numbers in [-end, end, 0, end / 3], [0, end, end / 2], [-end, -1, end / 7]:
        x = torch.tensor(numbers, dtype=dtype, device=device)
        for bits in 1, 2, 3, 4, 8:
            for fit in MinMax(), MSE(), Percentile(99.0):
                assert finite_or_refused(x, Grid(bits, fit=fit))
                assert finite_or_refused(x, Grid(bits, symmetric=False, fit=fit))


def test_what_is_too_large_for_a_grid_is_named(device):
    wide = nn.Linear(2, 2).to(device)
    wide.weight.data.fill_(torch.finfo(torch.float32).max)
    with pytest.raises(ValueError, match=r"weight: Grid\(bits=1, .* scale them down"):
        compression.quantize_weights(wide, Grid(1))
    with pytest.raises(ValueError, match=r"the model reads: .* scale them down"):
        compression.calibrate(wide, [wide.weight.detach()], Grid(1))
    half = compression.quantize(wide.weight / 4, Grid(1)).dequantize()
    torch.testing.assert_close(half, wide.weight.detach() / 4)


def test_a_model_without_weights_is_told():
    with pytest.raises(ValueError, match="no weight to round"):
        compression.prepare_rate(nn.ReLU())


def test_zeros_are_counted_where_there_is_no_input():
    found = compression.input_zeros(layer(0.0, 4, 0), [torch.randn(5, 0)])
    assert (found.share, found.always) == ({"0": 0.0}, {"0": 0.0})


TWO = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: compression.PerGroup(2.5), "whole number"),
        (lambda: compression.PerGroup(0), "at least one weight"),
        (lambda: compression.PerBlock(1.5, 2), "whole row"),
        (lambda: compression.PerBlock(2, 0), "whole column"),
        (lambda: compression.PACT(9), "1 to 8 bits, not 9"),
        (lambda: Grid(4.0), "1 to 8 bits, not 4.0"),
        (lambda: Grid("4"), "1 to 8 bits, not '4'"),
        (lambda: compression.PerAxis(1.0), r"PerAxis\(axis=1.0\): an axis is a whole number"),
        (lambda: MSE("80"), "at least one range"),
        (lambda: Percentile("99"), "a share in percent"),
        (lambda: compression.share(torch.ones(4), 4.0), "not 4.0: give a whole number"),
        (lambda: compression.share_weights(TWO, 4.0), "0.weight: .* not 4.0: give a whole"),
        (lambda: compression.share_vectors(torch.ones(2, 4), 2, 2.0), "size=2.0"),
        (lambda: compression.share(torch.ones(4), 2.5), "1 to 256 values, not 2.5"),
        (lambda: compression.share_vectors(torch.ones(2, 4), 2.5, 2), "1 to 256 vectors, not 2.5"),
        (lambda: compression.quantize_weights(TWO, Grid(4), "0.weight"), r"\['0.weight'\]"),
        (lambda: compression.round_inputs(TWO, Grid(4), names="0"), r"\['0'\]"),
        (lambda: compression.factorize(TWO, 0.5), r"target=0.5: give Energy, Error, Weights, or"),
        (lambda: compression.merge_pair(TWO[2], TWO[2]), "does not read what"),
        (lambda: compression.mix_bits(TWO, [torch.ones(1, 4)], math.nan, Grid()), "budget=nan"),
    ],
)
def test_what_was_mistyped_is_told(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_whole_numbers_of_numpy_are_those_of_python(device):
    four, x = np.int64(4), torch.randn(6, 8, device=device)
    for ours, theirs in (
        (compression.PerAxis(np.int64(1)), compression.PerAxis(1)),
        (compression.PerGroup(four), compression.PerGroup(4)),
        (compression.PerBlock(four, np.int32(2)), compression.PerBlock(4, 2)),
    ):
        assert repr(Grid(four, per=ours)) == repr(Grid(4, per=theirs))
        made = compression.quantize(x, Grid(four, per=ours)).codes
        assert torch.equal(made, compression.quantize(x, Grid(4, per=theirs)).codes)
    assert torch.equal(compression.share(x, four).table, compression.share(x, 4).table)
    both = [compression.share_vectors(x, size, size) for size in (four, 4)]
    assert torch.equal(both[0].index, both[1].index)


def test_a_reference_of_other_widths_leaves_biases_alone():
    model = copy.deepcopy(TWO)
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="2 makes 2 channels, 3 in the reference"):
        compression.correct_biases_(model, other, [torch.randn(5, 4)])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), TWO.parameters(), strict=True))


def test_layers_that_only_ever_read_zeros_factorise():
    model, x = layer(0.5), torch.randn(5, 6)
    made = compression.factorize(model, Energy(0.9), batches=[torch.zeros(4, 6)])
    assert isinstance(made[0], nn.Sequential)
    torch.testing.assert_close(made(x), model(x))


@pytest.mark.parametrize("wrong", ["x", -0.1, float("nan"), None])
def test_shares_that_are_none_are_named(wrong):
    weight, pair = torch.randn(3, 4), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match=re.escape(f"damp={wrong!r}")):
        compression.gptq(weight, torch.eye(4), Grid(4), damp=wrong)
    with pytest.raises(ValueError, match=re.escape(f"sparsity={wrong!r}")):
        compression.threshold_activations(pair, [torch.randn(3, 2)], sparsity=wrong)


NOTHING_BETWEEN = {
    "adaround": lambda m, x: compression.put_(
        copy.deepcopy(m), compression.adaround_weights(m, [x], Grid(8), steps=2)
    ),
    "smooth": lambda m, x: compression.smooth_inputs(m, [x]),
    "skip": lambda m, x: compression.skip_zeros(m, [x], rounds=1, at_least=0).model,
    "merge": lambda m, x: compression.merge_layers(m, x),
    "equalize": lambda m, x: compression.equalize(m, x),
    "train": lambda m, x: compression.prepare_qat(m, Grid(8), inputs=Grid(8), batches=[x]),
    "factorise": lambda m, x: compression.factorize(m, Energy(0.5)),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("way", NOTHING_BETWEEN)
def test_layers_with_nothing_between_them_hand_on_their_bias(way):
    model, x = nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 3)), torch.randn(5, 6)
    nn.init.normal_(model[1].bias)
    assert torch.equal(NOTHING_BETWEEN[way](model, x)(x), model[1].bias.expand(5, 3))
