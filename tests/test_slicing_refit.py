"""Grouped layers fitted to what dense ones make: least squares, one layer after the other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from slicing_networks import made
from test_slicing_groups import assert_close, blocked
from torch import nn

from structopt.channels import channel_groups
from structopt.slicing import Averaged, Branches, Mixed, Shuffled, group_layers
from structopt.slicing.grouped import grouped_layer
from structopt.slicing.grouping import _between_shuffles, _passing
from structopt.slicing.refitting import refit_
from structopt.training.statistics import recalibrate_

EXCHANGES = [Branches(), Shuffled(), Averaged(), Mixed(2)]


def grouped(layer, exchange):
    """What takes the place of a layer, in the order of channels of the dense network."""
    if isinstance(exchange, Shuffled):
        return _between_shuffles(layer, 2, False, False)
    return _passing(layer, 2, exchange)


@pytest.mark.parametrize("exchange", EXCHANGES[:3], ids=str)
@pytest.mark.parametrize("name", ["ResNet-20", "TinyTransformer"])
def test_what_is_block_diagonal_stays_the_same_function(name, exchange, device):
    """Up to the running statistics of norms, which are those of the batches."""
    model, x = made(name, device)
    model, count = blocked(model, channel_groups(model, x), not isinstance(exchange, Shuffled))
    batches = [torch.randn_like(x) for _ in range(2)]
    found = group_layers(model, x, 2, exchange=exchange, batches=batches)
    assert count
    assert_close(found(x), recalibrate_(copy.deepcopy(model), batches)(x))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("exchange", EXCHANGES, ids=str)
def test_no_layers_squared_error_grows(exchange, normed, device):
    """Of what it makes in the network that is handed back, against the weights merely kept."""
    norm = nn.BatchNorm1d if normed else nn.Identity
    parts = [
        nn.Sequential(nn.Linear(i, o), norm(o), nn.Tanh())
        for i, o in ((6, 8), (8, 12), (12, 8), (8, 3))
    ]
    dense = nn.Sequential(*parts).double().to(device).eval()
    batches = [torch.randn(20, 6, dtype=torch.float64, device=device) for _ in range(3)]
    small, names = copy.deepcopy(dense), ["2.0", "1.0"]
    for name in names:
        small.set_submodule(name, grouped(dense.get_submodule(name), exchange))
    kept = copy.deepcopy(small)
    refit_(small, dense, names, batches[0], batches)
    x = y = torch.cat(batches)
    for place in (0, 1, 2):
        if place:
            wanted = dense[place][0](y)
            errors = [(one[place][0](x) - wanted).square().sum() for one in (small, kept)]
            assert errors[0] < 0.97 * errors[1]
        x, y = small[place](x), dense[place](y)
    again = recalibrate_(copy.deepcopy(small), batches).state_dict()
    assert all(torch.equal(again[key], value) for key, value in small.state_dict().items())


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_the_least_squares_solution(bias, device):
    linear = nn.Linear(6, 4, bias, dtype=torch.float64, device=device)
    dense = nn.Sequential(linear, nn.ReLU(inplace=True))  # which writes over what was made
    x = [torch.randn(*size, 6, dtype=torch.float64, device=device) for size in ((2, 5), (20,), ())]
    small, kept = (nn.Sequential(grouped_layer(linear, 2), dense[1]) for _ in range(2))
    refit_(small, dense, ["0"], x[0], x, ridge=1e-13)
    rows = torch.cat([part.reshape(-1, 6) for part in x])
    for k, (read, y) in enumerate(zip(rows.chunk(2, 1), linear(rows).chunk(2, 1), strict=True)):
        ones = rows.new_ones(len(rows), int(bias))
        best = torch.linalg.lstsq(torch.cat([read, ones], 1), y).solution
        assert_close(small[0].weight[k], best[:3].T)
        if bias:
            assert_close(small[0].bias.chunk(2)[k], best[3])
    refit_(small := copy.deepcopy(kept), dense, ["0"], x[0], x, ridge=1e12)
    assert_close(small[0].weight, kept[0].weight)  # a ridge draws to the weights that are kept


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_a_convolution_is_the_solution_of_the_unfolded_system(kind, device):
    flat = kind is nn.Conv1d
    settings = {"stride": 2, "padding": 1, "dilation": 2}
    dense = nn.Sequential(kind(4, 6, 3, **settings)).double().to(device)
    shape = (9,) if flat else (9, 8)
    x = [torch.randn(size, 4, *shape, dtype=torch.float64, device=device) for size in (5, 3)]
    small = nn.Sequential(grouped_layer(dense[0], 2))
    refit_(small, dense, ["0"], x[0], x, ridge=0.1)
    both = torch.cat(x)
    pictures = both[:, :, None] if flat else both
    how = [(1, 3), (1, 2), (0, 1), (1, 2)] if flat else [3, 2, 1, 2]
    unfolded = F.unfold(pictures, how[0], how[3] if not flat else (1, 2), how[2], how[1])
    for k, read in enumerate(unfolded.chunk(2, 1)):
        read = read.mT.flatten(0, 1)
        y = dense(both).chunk(2, 1)[k].flatten(2).mT.flatten(0, 1)
        price = (0.1 * read.square().sum(0).mean()).sqrt()
        old = dense[0].weight.chunk(2)[k].chunk(2, 1)[k].flatten(1)
        rows = torch.cat([read, torch.ones_like(read[:, :1])], 1)
        draw = torch.cat(
            [price * torch.eye(old.shape[1]).to(old), torch.zeros_like(old[0])[:, None]], 1
        )
        best = torch.linalg.lstsq(torch.cat([rows, draw]), torch.cat([y, price * old.T])).solution
        assert_close(small[0].weight.chunk(2)[k].flatten(1), best[:-1].T)
        assert_close(small[0].bias.chunk(2)[k], best[-1])


@pytest.mark.parametrize("exchange", EXCHANGES, ids=str)
def test_the_model_given_stays_as_it_is(exchange, device):
    norm = nn.BatchNorm1d(8)
    model = nn.Sequential(
        *(nn.Linear(4, 8), norm, nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Dropout(0.5)),
        nn.Linear(8, 2),
    ).to(device)
    model[3].weight.requires_grad_(False)
    norm.eval()
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(20, 4, device=device) for _ in range(2)]
    given = copy.deepcopy(batches)
    drawn = torch.get_rng_state()
    fitted = group_layers(model, batches[0], 2, exchange=exchange, batches=(b for b in batches))
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(batches, given, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert [m.training for m in fitted] == [m.training for m in model]
    for parameter in fitted.parameters():
        assert (parameter.dtype, parameter.device) == (torch.float32, model[0].weight.device)
    plain = group_layers(model, batches[0], 2, exchange=exchange)
    assert [p.requires_grad for p in fitted.parameters()] == [
        p.requires_grad for p in plain.parameters()
    ]
    again = group_layers(model, batches[0], 2, exchange=exchange, batches=[(b, 0) for b in batches])
    for one, other in zip(again.state_dict().values(), fitted.state_dict().values(), strict=True):
        assert torch.equal(one, other)  # targets are not read


class Twice(nn.Module):
    """Two layers with fixed first and last ones; the first of the two is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, only=False):
        x = self.first(x)
        made = self.a(x.relu()) + self.a((-x).relu())
        return self.last(made if only else self.b(made.relu()))


class Noisy(nn.Module):
    """Draws numbers in either mode."""

    def forward(self, x):
        return x + 0.1 * torch.randn(len(x), 1, device=x.device, dtype=x.dtype)


def test_the_generator_of_a_model_that_draws_numbers_stays(device):
    parts = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2), Noisy())
    dense, x = nn.Sequential(*parts).to(device), torch.randn(20, 4, device=device)
    small = copy.deepcopy(dense)
    small[2] = grouped_layer(dense[2], 2)
    drawn = torch.get_rng_state()
    refit_(small, dense, ["2"], x, [x])
    assert torch.equal(drawn, torch.get_rng_state())


def test_a_layer_that_runs_twice_is_fitted_to_both_calls(device):
    dense = Twice().double().to(device)
    x = torch.randn(40, 4, dtype=torch.float64, device=device)
    small = copy.deepcopy(dense)
    small.a = grouped_layer(dense.a, 2)
    refit_(small, dense, ["a"], x, [x], ridge=1e-13)
    inner = dense.first(x)
    rows = torch.cat([inner.relu(), (-inner).relu()])
    ones = torch.ones_like(rows[:, :1])
    for k, (read, y) in enumerate(zip(rows.chunk(2, 1), dense.a(rows).chunk(2, 1), strict=True)):
        best = torch.linalg.lstsq(torch.cat([read, ones], 1), y).solution
        assert_close(small.a.weight[k], best[:-1].T)


def test_most_of_the_accuracy_is_left(device):
    """Four clusters in sixteen directions, and a network that tells them apart."""
    label = torch.arange(400) % 4
    x = (3 * torch.randn(4, 16)[label] + torch.randn(400, 16)).to(device)
    model = nn.Sequential(
        *(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32)),
        *(nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)),
    ).to(device)
    steps = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        steps.zero_grad()
        F.cross_entropy(model(x), label.to(device)).backward()
        steps.step()
    model.eval()

    def right(one):
        return float((one(x).argmax(1).cpu() == label).float().mean())

    cut = group_layers(model, x[:1], 8)
    fitted = group_layers(model, x[:1], 8, batches=x.split(100))
    assert right(model) > 0.95
    assert right(fitted) > 0.9
    assert right(fitted) > right(cut) + 0.2


def test_what_is_wrong_is_named():
    model, x = Twice(), torch.randn(6, 4)
    for batches in ([], [x[:0]], iter(())):
        with pytest.raises(ValueError, match="the batches are empty: there is nothing to fit"):
            group_layers(model, x, 2, batches=batches)
    for number in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="what a reads or makes of these batches is NaN"):
            group_layers(model, x, 2, batches=[x, x * number])
    with pytest.raises(ValueError, match=r"no batch reaches b: .*layers="):
        group_layers(model, x, 2, batches=[{"x": x, "only": True}])
    with pytest.raises(TypeError):
        group_layers(model, x, 2, batches=3)
    deep = nn.Sequential(*(nn.Conv3d(i, o, 1) for i, o in ((1, 4), (4, 4), (4, 1))))
    voxels = torch.randn(2, 1, 2, 2, 2)
    assert group_layers(deep, voxels, 2)(voxels).shape == voxels.shape
    with pytest.raises(ValueError, match=r"Conv3d are not unfolded: leave 1 out, .*layers="):
        group_layers(deep, voxels, 2, batches=[voxels])
