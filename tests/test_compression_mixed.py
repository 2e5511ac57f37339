"""Few bits, each where it counts: as good as trying everything."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structopt import compression
from structopt.compression import MSE, Grid, LeastSquares, MinMax, PerAxis, PerGroup
from structopt.compression.mixed import _cheapest, size_of


def small(device="cpu"):
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    return model.to(device).requires_grad_(False)


@pytest.mark.parametrize("budget", [150, 190, 215])
def test_bits_are_those_of_the_measured_changes(budget, device):
    model, x = small(device), torch.randn(30, 5, device=device)
    before = copy.deepcopy(model.state_dict())
    grid, bits = Grid(per=PerAxis(0), fit=MSE()), (2, 4, 8)
    found = compression.mix_bits(model, iter([x[:10], x[10:]]), budget, grid, bits=bits)
    assert found.bytes <= budget
    assert found.bytes == sum(size_of(codes) for codes in found.codes.values())
    assert {name: codes.grid.bits for name, codes in found.codes.items()} == found.bits
    alone = copy.deepcopy(model)
    codes = compression.quantize_weights(model, Grid(4, per=PerAxis(0), fit=MSE()), ["2.weight"])
    y, z = model(x), compression.put_(alone, codes)(x)
    assert found.changes["2.weight"][4] == pytest.approx(float((z - y).norm() / y.norm()), rel=1e-4)
    every = itertools.product(bits, repeat=3)
    shapes = [60, 96, 24]
    rows = [12, 8, 3]
    names = list(found.bits)
    best = min(
        sum(found.changes[n][b] ** 2 for n, b in zip(names, pick, strict=True))
        for pick in every
        if sum(-(-n * b // 8) + 4 * r for n, b, r in zip(shapes, pick, rows, strict=True)) <= budget
    )
    assert found.expected == pytest.approx(best**0.5)
    together = compression.put_(copy.deepcopy(model), found.codes)(x)
    assert found.change == pytest.approx(float((together - y).norm() / y.norm()), rel=1e-4)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


@given(
    st.lists(
        st.dictionaries(st.integers(1, 8), st.integers(1, 30), min_size=1, max_size=3),
        min_size=1, max_size=4,
    ),
    st.integers(0, 60),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_no_other_choice_within_the_budget_is_cheaper(sizes, more, random):
    costs = [{b: random.random() for b in own} for own in sizes]
    budget = sum(min(own.values()) for own in sizes) + more
    picks = _cheapest(sizes, costs, budget)
    assert sum(own[b] for own, b in zip(sizes, picks, strict=True)) <= budget
    found = sum(cost[b] for cost, b in zip(costs, picks, strict=True))
    for other in itertools.product(*sizes):
        if sum(own[b] for own, b in zip(sizes, other, strict=True)) <= budget:
            assert found <= sum(cost[b] for cost, b in zip(costs, other, strict=True)) + 1e-12


def test_the_unrounded_model_runs_once_on_each_batch():
    model, ran = small(), []
    model[0].register_forward_pre_hook(lambda layer, given: ran.append(layer is model[0]))
    compression.mix_bits(model, [torch.randn(4, 5)] * 2, 300, Grid(), bits=(2, 4))
    assert sum(ran) == 2
    assert len(ran) == 2 * (1 + 3 * 2 + 1)


def test_sizes_and_what_just_fits():
    x = torch.randn(3, 5)
    for symmetric, zeros in (True, 0), (False, 3):
        codes = compression.quantize(x, Grid(3, symmetric, PerAxis(0)))
        assert size_of(codes) == 6 + 4 * 3 + zeros  # 45 bits are 6 bytes; 3 scales, 3 zeros
    sizes, costs = [{2: 10, 4: 21}], [{2: 1.0, 4: 0.1}]
    assert _cheapest(sizes, costs, 20) == (2,)
    assert _cheapest(sizes, costs, 21) == (4,)
    apart = [{2: 300_001, 3: 300_001, 8: 900_000}] * 5  # so many units that none of them is left
    assert _cheapest(apart, [{2: 1.0, 3: 0.5, 8: 0.1}] * 5, 1_500_005) == (3,) * 5


def test_large_budgets_stay_within_themselves():
    sizes = [{2: 250_001, 4: 500_001, 8: 1_000_001}] * 5
    costs = [{2: 1.0 * k, 4: 0.3 * k, 8: 0.01 * k} for k in range(1, 6)]
    for budget in 1_250_005, 1_300_000, 3_000_000, 9_999_999:
        picks = _cheapest(sizes, costs, budget)
        assert sum(own[b] for own, b in zip(sizes, picks, strict=True)) <= budget
    assert picks == (8,) * 5


def test_budgets_that_cannot_be():
    model, x = small(), torch.randn(4, 5)
    with pytest.raises(ValueError, match="budget=9 bytes, but the fewest bits take 57"):
        compression.mix_bits(model, [x], 9, Grid())
    with pytest.raises(ValueError, match="no batches"):
        compression.mix_bits(model, [], 900, Grid())
    with pytest.raises(ValueError, match="no number of bits"):
        compression.mix_bits(model, [x], 900, Grid(), bits=())
    with pytest.raises(ValueError, match="1 to 8 bits, not 9"):
        compression.mix_bits(model, [x], 900, Grid(), bits=(9,))
    with pytest.raises(ValueError, match="no weight to round"):
        compression.mix_bits(nn.ReLU(), [x], 900, Grid())
    assert set(compression.mix_bits(model, [x], float("inf"), Grid()).bits.values()) == {8}
    model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0.weight: 1 of 60 numbers"):
        compression.mix_bits(model, [x], 900, Grid())


@given(st.integers(1, 7), st.booleans(), st.integers(0, 3))
def test_no_scale_of_binary_or_ternary_weights_is_better(members, ternary, zeros):
    weight = torch.randn(2, members).double()
    weight[0, :zeros] = 0
    grid = Grid(2 if ternary else 1, per=PerAxis(0), fit=LeastSquares())
    made = compression.quantize(weight, grid)
    error = (made.dequantize() - weight).square().sum(1)
    values = [-1.0, 0.0, 1.0] if ternary else [-1.0, 1.0]
    every = torch.tensor(list(itertools.product(values, repeat=members))).double()  # (C, members)
    scale = (every @ weight.T).clamp(min=0) / every.square().sum(1).clamp(min=1)[:, None]  # (C, 2)
    tried = (scale[..., None] * every[:, None] - weight).square().sum(2)
    torch.testing.assert_close(error, tried.amin(0))
    if ternary:
        assert bool((made.dequantize()[weight == 0] == 0).all()), "a pruned weight stays pruned"
    else:
        torch.testing.assert_close(made.dequantize().abs()[:, 0], weight.abs().mean(1))


def test_the_rule_of_ternary_networks_comes_close(device):
    weight = torch.randn(1, 5000, device=device)
    mean = weight.abs().mean()
    kept = weight.abs() > 0.7 * mean
    rule = weight.sign() * kept * weight.abs()[kept].mean()
    least = (compression.quantize(weight, Grid(2, fit=LeastSquares())).dequantize() - weight).norm()
    for fit in MSE(), MinMax():
        other = compression.quantize(weight, Grid(2, fit=fit)).dequantize()
        assert least <= (other - weight).norm() * (1 + 1e-6)
    assert least <= (rule - weight).norm() * (1 + 1e-6) <= 1.01 * least


def test_closed_forms_at_the_edge():
    for grid in Grid(3, fit=LeastSquares()), Grid(1, symmetric=False, fit=LeastSquares()):
        with pytest.raises(ValueError, match="one or two symmetric bits"):
            compression.quantize(torch.ones(3), grid)
    ragged = Grid(2, per=PerGroup(2), fit=LeastSquares())
    x = torch.tensor([[1.0, 3.0, -5.0]])
    torch.testing.assert_close(
        compression.quantize(x, ragged).dequantize(), torch.tensor([[0.0, 3.0, -5.0]])
    )
    signs = compression.quantize(x, Grid(1, per=PerGroup(2), fit=LeastSquares()))
    torch.testing.assert_close(signs.dequantize(), torch.tensor([[2.0, 2.0, -5.0]]))
    for bits in 1, 2:
        zeros = compression.quantize(torch.zeros(2, 3), Grid(bits, fit=LeastSquares()))
        assert not zeros.dequantize().any()
        assert (
            compression.quantize(torch.zeros(0, 3), Grid(bits, fit=LeastSquares())).codes.numel()
            == 0
        )
