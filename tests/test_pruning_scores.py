"""Scores where it is easy to be wrong: half precision, weights used twice, layers turned round."""

from functools import partial

import pytest
import torch
from pruning_networks import Tied
from torch import nn
from torch.nn import functional as F

from structopt import pruning
from structopt.pruning import Global

close = torch.testing.assert_close


def half_and_double(device, dtype):
    """The same numbers twice: a layer and its batches, as they are and in double precision."""
    layer = nn.Sequential(nn.Linear(6, 3)).to(device, dtype)
    data = [
        (torch.randn(50, 6, device=device).to(dtype), torch.randint(0, 3, (50,), device=device))
        for _ in range(12)
    ]
    twin = nn.Sequential(nn.Linear(6, 3)).to(device, torch.float64)
    twin.load_state_dict(layer.state_dict())
    return layer, data, twin, [(x.double(), y) for x, y in data]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "criterion",
    [
        partial(pruning.magnitude, p=2), pruning.saliency, pruning.taylor, pruning.fisher,
        pruning.lamp, pruning.geometric_median, pruning.wanda, pruning.activation_mean,
    ],
)  # fmt: skip
def test_half_precision_is_scored_as_double_precision_is(device, criterion, dtype):
    """Sums over many examples included: in bfloat16, 256 + 1 = 256."""
    layer, data, twin, wide = half_and_double(device, dtype)
    found = pruning.score(layer, criterion, data)["0.weight"]
    expected = pruning.score(twin, criterion, wide)["0.weight"]
    assert found.dtype == torch.float32
    assert (found.double() - expected).norm() < 0.015 * expected.norm()


def test_squares_of_small_weights_do_not_vanish_in_half_precision(device):
    weight = torch.tensor([[1e-4, 2e-4, 3e-4]], device=device).half()
    one = torch.ones(1, 3, device=device)
    for found in (
        pruning.magnitude(weight, p=2), pruning.fisher(weight, one), pruning.hessian(weight, one),
        pruning.lamp(weight),
    ):  # fmt: skip
        assert 0 < found[0, 0] < found[0, 1] < found[0, 2]


def test_layers_of_several_types_are_compared_by_their_values(device):
    scores = {
        "half": torch.rand(10, 10, device=device).bfloat16() + 1,
        "single": torch.rand(10, 10, device=device),
        "double": torch.rand(10, 10, device=device).double() / 2,
    }
    masks = pruning.find_masks(scores, 1 / 3, scope=Global())
    assert masks["half"].all()
    every = torch.cat([s.double().flatten() for s in scores.values()])
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert int((~kept).sum()) == 100
    assert every[~kept].max() <= every[kept].min()


def test_a_weight_in_two_layers_reads_what_both_read(device):
    model, x = Tied(4).to(device), torch.randn(9, 4, device=device)
    found = pruning.score(model, pruning.wanda, [x], objective=lambda m, b: m(b).sum())
    both = torch.cat([x, model.first(x).detach().relu() * 3])
    close(found["first.weight"], model.first.weight.detach().abs() * both.norm(dim=0))


@pytest.mark.parametrize("places", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_reads_the_channels_of_its_rows(device, groups, places):
    kind = getattr(nn, f"ConvTranspose{places}d")
    layer = kind(4, 6, 2, groups=groups).to(device)
    x = torch.randn(3, 4, *[5] * places, device=device)
    found = pruning.score(layer, pruning.wanda, [x], objective=lambda m, b: m(b).sum())["weight"]
    norms = x.movedim(1, 0).flatten(1).norm(dim=1)
    close(found, layer.weight.detach().abs() * norms.view(-1, 1, *[1] * places))


def test_batches_that_can_be_read_once_serve_two_kinds_of_evidence(device):
    layer = nn.Sequential(nn.Linear(4, 2)).to(device)
    data = [(torch.randn(5, 4, device=device), torch.ones(5, device=device).long())] * 2

    def both(gradient, input_norm):
        return gradient * input_norm

    close(
        pruning.score(layer, both, iter(data))["0.weight"],
        pruning.score(layer, both, data)["0.weight"],
    )


def test_what_is_no_example_of_a_batch_goes_with_each_of_them(device):
    """A number, and a tensor of another length: here a scale and the weights of the classes."""
    layer = nn.Sequential(nn.Linear(4, 2)).to(device)
    scale, classes = torch.tensor(3.0, device=device), torch.tensor([1.0, 2.0], device=device)
    x, y = torch.randn(5, 4, device=device), torch.tensor([0, 1, 1, 0, 1], device=device)

    def objective(model, batch):
        factor, inputs, targets, weights = batch
        return factor * F.cross_entropy(model(inputs), targets, weights)

    batch = (scale, x, y, classes)
    found = pruning.score(layer, pruning.fisher, [batch], objective=objective)["0.weight"]
    ones = [(scale, x[i : i + 1], y[i : i + 1], classes) for i in range(5)]
    apart = pruning.score(layer, pruning.fisher, ones, objective=objective)["0.weight"]
    close(found, apart)
    with pytest.raises(ValueError, match="a batch holds no example"):
        pruning.score(layer, pruning.saliency, [(x[:0], y[:0])])


def test_derivatives_are_taken_where_gradients_are_off_and_where_the_loss_is_linear(device):
    layer, x = nn.Sequential(nn.Linear(4, 2)).to(device), torch.ones(3, 4, device=device)
    with torch.no_grad():
        slopes = pruning.score(layer, pruning.taylor, [x], objective=lambda m, b: m(b).sum())
        curved = pruning.score(layer, pruning.hessian, [x], objective=lambda m, b: m(b).sum())
    close(slopes["0.weight"], 3 * layer[0].weight.detach())
    assert not curved["0.weight"].any()


def test_an_input_without_a_batch_is_read_by_its_channels(device):
    layer = nn.Sequential(nn.Conv2d(3, 2, 2)).to(device)
    x = torch.randn(3, 5, 5, device=device)
    found = pruning.score(layer, pruning.wanda, [x], objective=lambda m, b: m(b).sum())["0.weight"]
    norms = x.flatten(1).norm(dim=1)
    close(found, layer[0].weight.detach().abs() * norms[:, None, None])


def test_squares_of_small_gradients_do_not_vanish_in_half_precision(device):
    layer = nn.Sequential(nn.Linear(2, 1, bias=False)).to(device).half()
    x = torch.full((1, 2), 1e-4, device=device).half()
    found = pruning.score(layer, pruning.fisher, [x], objective=lambda m, b: m(b).sum())
    expected = 0.5 * (layer[0].weight.detach().float() * x.float()).square()
    close(found["0.weight"], expected, rtol=1e-3, atol=0)


def test_what_no_layer_reads_and_what_is_no_loss_is_named(device):
    model, x = nn.RNN(3, 2).to(device), torch.randn(4, 2, 3, device=device)
    with pytest.raises(ValueError, match=r"input_norm of weight_ih_l0.*linear layers and conv"):
        pruning.score(model, pruning.wanda, [x], objective=lambda m, b: m(b)[0].sum())
    layer, x = nn.Linear(3, 2).to(device), x[0]
    for objective, words in (
        (lambda m, b: m(b), r"a scalar tensor with a gradient, not float32 \(2, 2\)"),
        (
            lambda m, b: m(b).detach().sum(),
            r"a scalar tensor with a gradient, not float32 \(\) without one",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            pruning.score(layer, pruning.saliency, [x], objective=objective)


def test_the_group_of_a_transposed_convolution_adds_makers_and_readers(device):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2)).to(device)
    x = torch.randn(1, 2, 4, 4, device=device)
    small = pruning.prune_channels(model, x, 0.5)
    makes, reads = (model[i].weight.detach().abs().flatten(1).sum(1) for i in (0, 2))
    best = (makes + reads).topk(2).indices.sort().values
    close(small[2].weight, model[2].weight[best])
    hidden = F.relu(model[0](x))
    kept = torch.zeros_like(hidden).index_copy(1, best, hidden[:, best])
    close(small(x), model[2](kept))
