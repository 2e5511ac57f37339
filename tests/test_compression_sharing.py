"""Shared values: the laws of k-means, zeros that stay, and training that keeps the sharing."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structopt import compression, training
from structopt.compression import Grid, PerAxis, PerBlock, PerGroup, PerTensor
from structopt.networks import LeNet300

UNITS = st.sampled_from([PerTensor(), PerAxis(0), PerAxis(1), PerGroup(4), PerBlock(2, 3)])


def squares(x, shared):
    return (shared.dequantize() - x).square().sum()


@given(UNITS, st.integers(1, 20), st.integers(0, 50))
def test_a_fixed_point_of_lloyd(per, values, seed):
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed)).double()
    shared = compression.share(x, values, per, rounds=300)
    units, indices = per.split(x), per.split(shared.index.double())
    assert shared.index.dtype == torch.uint8
    assert shared.table.shape == (len(units), values)
    for unit, index, table in zip(units, indices, shared.table, strict=True):
        index, unit = index[~unit.isnan()].long(), unit[~unit.isnan()]
        distance = (unit[:, None] - table).abs()
        assert torch.allclose(distance.gather(1, index[:, None])[:, 0], distance.amin(1))
        for place in index.unique():
            assert torch.isclose(table[place], unit[index == place].mean())


@pytest.mark.parametrize("values", [2, 3])
def test_as_good_as_every_way_to_cut_the_sorted_numbers(values, device):
    worse = []
    for _ in range(40):
        x = torch.randn(12, dtype=torch.double, device=device).sort().values
        cuts = itertools.combinations(range(1, 12), values - 1)
        best = min(
            sum(float(part.var(correction=0)) * len(part) for part in x.tensor_split(cut))
            for cut in cuts
        )
        worse.append(float(squares(x, compression.share(x, values))) / best)
    assert min(worse) > 1 - 1e-9
    assert sum(worse) / 40 < 1.15, "near the optimum, as two starts of Lloyd are"


def test_no_worse_than_a_grid_of_as_many_values(device):
    x = torch.randn(50, 60, device=device)
    for bits in 2, 3, 4:
        grid = compression.quantize(x, Grid(bits, False, fit=compression.MSE()))
        shared = compression.share(x, 2**bits)
        assert squares(x, shared) < (grid.dequantize() - x).square().sum()


@given(UNITS, st.integers(2, 9), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_few_distinct_numbers_are_kept_exactly(per, values, dtype):
    x = (torch.randint(0, 9, (6, 10)) % values).to(dtype) / 7
    shared = compression.share(x, values, per)
    assert torch.equal(shared.dequantize(), x)
    assert shared.table.dtype == dtype


@given(UNITS, st.integers(2, 12))
def test_zeros_stay_zeros_and_nothing_else_needs_to(per, values):
    x = torch.randn(6, 10) * (torch.rand(6, 10) < 0.5)
    made = compression.share(x, values, per).dequantize()
    assert (made[x == 0] == 0).all()


def test_more_values_than_numbers_one_value_and_nothing():
    x = torch.tensor([[1.0, -2.0]])
    assert torch.equal(compression.share(x, 256).dequantize(), x)
    assert torch.equal(compression.share(torch.zeros(3, 3), 4).dequantize(), torch.zeros(3, 3))
    assert compression.share(torch.ones(2, 2) * 3, 1).dequantize().tolist() == [[3, 3], [3, 3]]
    assert compression.share(torch.empty(0, 4), 4).dequantize().shape == (0, 4)


def test_tied_training_is_descent_on_the_values(device):
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double().to(device)
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    names = ["0.weight", "2.weight"]
    codes = compression.share_weights(model, 4, PerAxis(0), names)
    after_step = compression.tie(codes)
    after_step(model)
    other, x = copy.deepcopy(model), torch.randn(16, 7, device=device, dtype=torch.double)
    y = torch.randn(16, 3, device=device, dtype=torch.double)
    tables = {name: codes[name].table.clone() for name in names}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        after_step(model, step)
        # The same by autograd on the tables alone, the sum of the gradients over the counts.
        leaves = {name: table.requires_grad_() for name, table in tables.items()}
        full = {n: leaf.gather(1, codes[n].index.long()) for n, leaf in leaves.items()}
        biases = {n: p for n, p in other.named_parameters() if "bias" in n}
        loss = (torch.func.functional_call(other, full | biases, (x,)) - y).square().mean()
        found = torch.autograd.grad(loss, [*leaves.values(), *biases.values()])
        with torch.no_grad():
            for (name, table), grad in zip(leaves.items(), found, strict=False):
                count = torch.zeros_like(table).scatter_add_(
                    1, codes[name].index.long(), torch.ones_like(full[name])
                )
                step_of = 0.1 * grad / count.clamp(min=1) * (table != 0)
                tables[name] = (table - step_of).detach()
            for bias, grad in zip(biases.values(), found[2:], strict=True):
                bias -= 0.1 * grad
    for name in names:
        torch.testing.assert_close(after_step.codes[name].table, tables[name].detach())
        assert torch.equal(model.get_parameter(name), after_step.codes[name].dequantize())
    assert (model[0].weight[:, ::2] == 0).all()


def test_tied_training_in_the_loop_makes_the_loss_small():
    model, x = LeNet300(), torch.rand(64, 1, 28, 28)
    codes = compression.share_weights(model, 4)
    compression.put_(model, codes)
    batches = [(x, torch.arange(64) % 10)] * 6
    after_step = compression.tie(codes)
    training.train(
        model,
        batches,
        training.supervised(nn.functional.cross_entropy),
        torch.optim.SGD(model.parameters(), 0.3),
        epochs=4,
        after_step=after_step,
    )
    assert model.fc1.weight.unique().numel() <= 4
    assert torch.equal(model.fc1.weight, after_step.codes["fc1.weight"].dequantize())


def test_the_codes_of_a_model_go_into_a_model():
    model = LeNet300()
    codes = compression.quantize_weights(model, Grid(3, per=PerAxis(0)))
    assert list(codes) == ["fc1.weight", "fc2.weight", "fc3.weight"]
    before = copy.deepcopy(model.state_dict())
    other = compression.put_(copy.deepcopy(model), codes)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    for name, coded in codes.items():
        assert torch.equal(other.get_parameter(name), coded.dequantize())
    assert list(compression.share_weights(model, 2, names=["fc1.bias"])) == ["fc1.bias"]


def test_bad_input_is_named():
    model = LeNet300()
    with pytest.raises(ValueError, match=r"no 'fc9.weight'; its weights are fc1.weight"):
        compression.quantize_weights(model, Grid(), ["fc9.weight"])
    with torch.no_grad():
        model.fc2.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"fc2.weight: 1 of 30000 numbers are NaN"):
        compression.share_weights(model, 4)
    with pytest.raises(ValueError, match="1 to 256 values, not 0"):
        compression.share(torch.ones(3), 0)
    with pytest.raises(ValueError, match="cannot stand for zeros"):
        compression.share(torch.tensor([0.0, 1.0]), 1)
    codes = compression.quantize_weights(nn.Linear(3, 2), Grid())
    with pytest.raises(ValueError, match=r"shape \(2, 3\), the model's weight \(2, 4\)"):
        compression.put_(nn.Linear(4, 2), codes)
    shared = compression.share_weights(nn.Linear(3, 2), 2)
    with pytest.raises(ValueError, match=r"shape \(2, 3\), the weight \(2, 4\)"):
        compression.tie(shared)(nn.Linear(4, 2))
    with pytest.raises(ValueError, match="codes of 'weight', which is no parameter"):
        compression.tie(shared)(nn.Sequential(nn.Linear(3, 2)))
