"""Each criterion against an independent reference, and what scoring promises."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from structopt import networks, pruning
from structopt.channels import channel_groups, take
from structopt.training import supervised

close = torch.testing.assert_close


def network(device, norm=False, groups=1):
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity()]
    layers += [nn.ReLU(), nn.Conv2d(4, 6, 3, groups=groups), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(*layers).to(device, torch.float64).eval()


def examples(device, batches=3, size=4):
    def batch():
        inputs = torch.randn(size, 2, 4, 4, dtype=torch.float64, device=device)
        return inputs, torch.randint(0, 3, (size,), device=device)

    return [batch() for _ in range(batches)]


def mean_gradient(model, batches):
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    F.cross_entropy(model(inputs), targets).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_summed_over_filters_is_the_norm_of_torch(device, p):
    weight = torch.randn(6, 3, 2, 2, dtype=torch.float64, device=device)
    summed = pruning.magnitude(weight, p=p).flatten(1).sum(1) ** (1 / p)
    close(summed, torch.linalg.vector_norm(weight.flatten(1), ord=p, dim=1))


@pytest.mark.parametrize("amount", [0.25, 0.9])
def test_magnitude_gives_the_masks_of_torch(device, amount):
    layer = nn.Linear(20, 10, device=device)
    masks = pruning.find_masks(pruning.score(layer), amount)
    prune.l1_unstructured(layer, "weight", amount=amount)
    assert torch.equal(masks["weight"], layer.weight_mask.bool())


def test_global_magnitude_gives_the_masks_of_torch(device):
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 5)).to(device)
    masks = pruning.find_masks(pruning.score(model), 0.6, scope=pruning.Global())
    pairs = [(model[0], "weight"), (model[1], "weight")]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.6)
    for name, (layer, _) in zip(("0.weight", "1.weight"), pairs, strict=True):
        assert torch.equal(masks[name], layer.weight_mask.bool())


def test_filters_by_l2_are_those_of_torch(device):
    layer = nn.Conv2d(3, 8, 3, device=device)
    squares = pruning.score(layer, partial(pruning.magnitude, p=2))
    masks = pruning.find_masks(squares, 0.5, pattern=pruning.Filters())
    prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
    assert torch.equal(masks["weight"], layer.weight_mask.bool())


def test_gradient_criteria_use_the_gradient_of_the_mean_loss(device):
    model, batches = network(device), examples(device)
    batches.append((batches[0][0][:1], batches[0][1][:1]))  # of another size: weighted by examples
    slopes = mean_gradient(model, batches)
    saliency = pruning.score(model, pruning.saliency, batches)
    taylor = pruning.score(model, pruning.taylor, batches)
    for name, p in model.named_parameters():
        if name in taylor:
            close(taylor[name], p.detach() * slopes[name])
            close(saliency[name], (p.detach() * slopes[name]).abs())
    assert set(taylor) == {"0.weight", "3.weight", "6.weight"}


def test_taylor_is_the_first_order_change_of_the_loss(device):
    """Shrink one channel by a little, and see what the loss does."""
    model, batches = network(device), examples(device, batches=1)
    channels = channel_groups(model, batches[0][0])
    reads = {"6.weight": pruning.score(model, pruning.taylor, batches)["6.weight"]}
    group = channels["3"]
    scores = pruning.channel_scores(channels, reads)[group]

    def loss(shrunk, by):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[6].weight[:, 4 * shrunk : 4 * shrunk + 4] *= 1 - by  # 2 × 2 places a channel
            return F.cross_entropy(other(batches[0][0]), batches[0][1])

    for channel in range(6):
        slope = (loss(channel, 1e-5) - loss(channel, -1e-5)) / 2e-5
        close(scores[channel], slope.abs(), rtol=1e-6, atol=1e-10)


def test_filters_before_a_batch_norm_have_a_taylor_sum_of_zero(device):
    """Their scale is without effect while the norm takes statistics from the batch."""
    model, batches = network(device, norm=True), examples(device, batches=1)
    model[1].eps = 1e-14  # what it adds spoils the invariance a little

    def objective(model, batch):
        model.train()
        return supervised()(model, batch)

    found = pruning.score(model, pruning.taylor, batches, objective=objective)["0.weight"]
    assert found.abs().max() > 1e-4
    close(found.flatten(1).sum(1), torch.zeros(4, dtype=found.dtype, device=device))


def test_fisher_is_the_mean_of_squared_gradients_of_single_examples(device):
    model, batches = network(device), examples(device)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for inputs, targets in batches:
        for i in range(len(inputs)):
            one = mean_gradient(model, [(inputs[i : i + 1], targets[i : i + 1])])
            for name, slope in one.items():
                expected[name] += slope**2 / 12
    for name, found in pruning.score(model, pruning.fisher, batches).items():
        close(found, 0.5 * model.get_parameter(name).detach() ** 2 * expected[name])


def test_hessian_of_a_quadratic_loss_is_exact_where_it_is_diagonal(device):
    """z ⊙ Hz is the diagonal itself if H has nothing beside it."""
    layer = nn.Linear(4, 1, bias=False).to(device, torch.float64)
    rows = torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64)).to(device)

    def objective(model, batch):
        return model(batch).square().sum()  # H = 2 · diag(1, 4, 9, 16)

    found = pruning.score(layer, pruning.hessian, [rows], objective=objective)["weight"]
    squares = torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64, device=device)
    close(found, layer.weight.detach() ** 2 * squares)


def test_hessian_estimate_converges_to_the_diagonal(device):
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).to(device, torch.float64)
    batch = (
        torch.randn(8, 3, dtype=torch.float64, device=device),
        torch.ones(8, device=device).long(),
    )
    weight = model[0].weight.detach().clone()

    def loss(w):
        hidden = torch.tanh(F.linear(batch[0], w, model[0].bias))
        return F.cross_entropy(model[2](hidden), batch[1])

    exact = torch.autograd.functional.hessian(loss, weight).view(6, 6).diagonal().view(2, 3)
    found = pruning.score(model, pruning.hessian, [batch] * 2000)["0.weight"]
    expected = 0.5 * weight**2 * exact.clamp(min=0)
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_second_derivatives_pass_through_attention(device):
    """The fused kernels have none."""
    model = networks.TinyTransformer(dim=16, depth=1).to(device)
    batch = torch.randn(4, 1, 28, 28, device=device), torch.randint(0, 10, (4,), device=device)
    scores = pruning.score(model, pruning.hessian, [batch])
    assert any(one.any() for one in scores.values())


def test_batch_norm_scale_is_that_of_the_norms(device):
    model = network(device, norm=True)
    nn.init.normal_(model[1].weight)
    found = pruning.score(model, pruning.batch_norm_scale)
    assert set(found) == {"1.weight"}
    close(found["1.weight"], model[1].weight.detach().abs())


def test_lamp_equals_its_definition(device):
    weight = torch.randn(5, 7, dtype=torch.float64, device=device)
    squares = weight.flatten() ** 2
    expected = torch.stack([u / squares[squares >= u].sum() for u in squares]).view(5, 7)
    close(pruning.lamp(weight), expected)
    assert pruning.lamp(torch.zeros(2, 3, device=device)).abs().max() == 0


def test_geometric_median_equals_its_definition(device):
    weight = torch.randn(5, 3, 2, 2, dtype=torch.float64, device=device)
    pairs = [[(weight[i] - weight[j]).norm() for j in range(5)] for i in range(5)]
    expected = torch.stack([torch.stack(row).sum() for row in pairs])
    close(pruning.geometric_median(weight).flatten(), expected)
    whole = pruning.score(nn.Sequential(nn.Conv2d(2, 4, 3)).to(device), pruning.geometric_median)
    assert whole["0.weight"].shape == (4, 2, 3, 3)


def test_input_statistics_are_those_of_what_each_layer_reads(device):
    model, batches = network(device, groups=2), examples(device)
    inputs = torch.cat([x for x, _ in batches])
    hidden = model[:3](inputs).detach()  # what the grouped convolution reads
    flat = model[:6](inputs).detach()  # what the last layer reads
    mean = pruning.score(model, pruning.activation_mean, batches)
    zeros = pruning.score(model, pruning.apoz, batches)
    wanda = pruning.score(model, pruning.wanda, batches)
    close(mean["6.weight"], flat.abs().mean(0).expand(3, 24))
    close(zeros["6.weight"], (flat != 0).double().mean(0).expand(3, 24))
    close(wanda["6.weight"], model[6].weight.detach().abs() * flat.norm(dim=0))
    norms = hidden.square().sum((0, 2, 3)).sqrt()
    reads = torch.stack([norms[:2]] * 3 + [norms[2:]] * 3)  # each half of the outputs reads a half
    close(wanda["3.weight"], model[3].weight.detach().abs() * reads[:, :, None, None])


def test_linear_layers_read_the_last_dimension(device):
    layer = nn.Sequential(nn.Linear(3, 2)).to(device)
    tokens = torch.randn(2, 5, 3, device=device)
    found = pruning.score(layer, pruning.wanda, [tokens], objective=lambda m, b: m(b).sum())
    norms = tokens.flatten(0, 1).norm(dim=0)
    close(found["0.weight"], layer[0].weight.detach().abs() * norms)


def test_random_is_uniform_and_repeats_with_its_generator(device):
    def draw():
        chance = torch.Generator(device).manual_seed(3)
        return pruning.random(torch.zeros(100, 50, device=device), generator=chance)

    found = draw()
    assert torch.equal(found, draw())
    assert 0 <= found.min() < 0.01
    assert 0.99 < found.max() < 1
    assert abs(found.mean() - 0.5) < 0.02


CRITERIA = [
    pruning.magnitude, partial(pruning.magnitude, p=2), pruning.saliency, pruning.taylor,
    pruning.fisher, pruning.batch_norm_scale, pruning.lamp, pruning.geometric_median,
    pruning.activation_mean, pruning.apoz, pruning.wanda,
]  # fmt: skip


@pytest.mark.parametrize("criterion", CRITERIA)
def test_channel_scores_move_with_their_channels(device, criterion):
    """Reorder the channels of the network: the scores are the same, reordered."""
    model, batches = network(device, norm=True), examples(device)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    channels = channel_groups(model, batches[0][0])
    group = channels["0"]
    order = torch.arange(group.size).flip(0)
    moved = take(model, {group: order})
    before = pruning.channel_scores(channels, pruning.score(model, criterion, batches))
    again = channel_groups(moved, batches[0][0])
    after = pruning.channel_scores(again, pruning.score(moved, criterion, batches))
    close(after[again[group.name]], before[group][order.to(device)])


@pytest.mark.parametrize("criterion", [*CRITERIA, pruning.hessian])
def test_scoring_leaves_the_model_as_it_was(device, criterion):
    model, batches = network(device, norm=True).train(), examples(device)
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    pruning.score(model, criterion, batches)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model[0].weight.requires_grad
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_the_same_on_every_device(device, criterion):
    model, batches = network("cpu", norm=True), examples("cpu")
    there = copy.deepcopy(model).to(device)
    moved = [(x.to(device), y.to(device)) for x, y in batches]
    expected = pruning.score(model, criterion, batches)
    for name, found in pruning.score(there, criterion, moved).items():
        assert found.device.type == device.type
        close(found.cpu(), expected[name])


def test_channel_scores_are_sums_over_all_weights_of_the_channel(device):
    model = network(device)
    channels = channel_groups(model, examples(device)[0][0])
    scores = pruning.channel_scores(channels, pruning.score(model))
    makes = model[3].weight.detach().abs().sum((1, 2, 3))
    reads = model[6].weight.detach().abs().view(3, 6, 4).sum((0, 2))
    close(scores[channels["3"]], makes + reads)
    largest = pruning.channel_scores(channels, pruning.score(model), lambda parts: parts.amax(0))
    close(largest[channels["3"]], torch.maximum(makes, reads))


class Joined(nn.Module):
    """Two layers side by side, read by a third."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.reader = nn.Linear(2, 3), nn.Linear(2, 4), nn.Linear(7, 2)

    def forward(self, x):
        return self.reader(torch.cat([self.left(x), self.right(x)], 1))


def test_a_layer_that_reads_two_groups_counts_in_each_with_its_own_columns(device):
    model = Joined().to(device)
    channels = channel_groups(model, torch.ones(1, 2, device=device))
    found = pruning.channel_scores(channels, pruning.score(model))
    reads = model.reader.weight.detach().abs().sum(0)
    for name, columns in (("left", reads[:3]), ("right", reads[3:])):
        makes = model.get_parameter(f"{name}.weight").detach().abs().sum(1)
        close(found[channels[name]], makes + columns)


def test_sums_in_half_precision_are_taken_in_single(device):
    """In bfloat16, 256 + 1 = 256."""
    model = nn.Sequential(nn.Linear(257, 2), nn.Linear(2, 1)).to(device, torch.bfloat16)
    for p in model.parameters():
        nn.init.ones_(p)
    channels = channel_groups(model, torch.ones(1, 257, device=device, dtype=torch.bfloat16))
    found = pruning.channel_scores(channels, pruning.score(model))
    assert found[channels["0"]].tolist() == [258, 258]
    tokens = torch.ones(9, 257, device=device, dtype=torch.bfloat16)
    last = nn.Sequential(model[0]).to(device)
    sums = pruning.score(
        last, pruning.activation_mean, [tokens] * 57, objective=lambda m, b: m(b).sum()
    )
    assert (sums["0.weight"] == 1).all()  # 513 ones over 513


def test_scores_along_which_nothing_changes_say_nothing(device):
    """The mean of what a layer reads says nothing of the channels that it makes."""
    model, batches = network(device), examples(device)
    channels = channel_groups(model, batches[0][0])
    scores = pruning.score(model, pruning.activation_mean, batches)
    found = pruning.channel_scores(channels, scores)[channels["3"]]
    close(found, scores["6.weight"].reshape(3, 6, 4).sum((0, 2)))


@given(leave=st.sampled_from(["0.weight", "[03].*", "3*"]))
def test_what_is_left_alone_has_no_score(leave):
    everything = pruning.score(network("cpu"))
    found = pruning.score(network("cpu"), leave=(leave,))
    assert set(found) < set(everything)
    with pytest.raises(ValueError, match="no weight to score"):
        pruning.score(network("cpu"), leave=("*",))


def test_embeddings_norms_and_biases_are_no_weights_to_score(device):
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(5, 4),
            "norm": nn.LayerNorm(4),
            "map": nn.LayerNorm((2, 4)),
            "groups": nn.GroupNorm(2, 4),
            "root": nn.RMSNorm(4),
            "slope": nn.PReLU(4),
            "bag": nn.EmbeddingBag(5, 4),
            "weights": nn.ParameterDict({"table": torch.ones(2, 2)}),
            "out": nn.Linear(4, 2),
        }
    )
    assert set(pruning.score(model.to(device))) == {"out.weight"}
    assert set(pruning.score(model, pruning.batch_norm_scale)) == {
        f"{norm}.weight" for norm in ("norm", "map", "groups", "root")
    }


def test_a_criterion_of_your_own_is_a_function(device):
    model = network(device)
    found = pruning.score(model, lambda weight: weight.square())
    close(found["6.weight"], model[6].weight.detach() ** 2)
    assert not pruning.score(model, lambda weight: weight)["6.weight"].requires_grad


@pytest.mark.parametrize("kind", ["saliency", "fisher", "hessian", "wanda", "apoz"])
def test_a_criterion_that_needs_batches_says_so(kind):
    with pytest.raises(ValueError, match=rf"{kind} needs .*: give batches"):
        pruning.score(network("cpu"), getattr(pruning, kind))


def test_a_criterion_without_a_name_is_called_by_its_type():
    class Slopes:
        def __call__(self, gradient):
            return gradient

    with pytest.raises(ValueError, match="Slopes needs gradient: give batches"):
        pruning.score(network("cpu"), Slopes())


@pytest.mark.parametrize("kind", ["saliency", "fisher", "wanda"])
def test_empty_batches_are_an_error(kind):
    with pytest.raises(ValueError, match="empty"):
        pruning.score(network("cpu"), getattr(pruning, kind), [])


def test_bad_scores_and_criteria_are_named():
    model = network("cpu")
    with pytest.raises(ValueError, match=r"asks for \['wight'\]"):
        pruning.score(model, lambda wight: wight)
    with pytest.raises(ValueError, match="asks for nothing"):
        pruning.score(model, lambda: 0)
    with pytest.raises(ValueError, match=r"gave 0\.weight.*scores of shape \(7,\)"):
        pruning.score(model, lambda weight: torch.zeros(7))
    with pytest.raises(ValueError, match=r"a function, .* not 'magnitude'"):
        pruning.score(model, "magnitude")
    with pytest.raises(ValueError, match="no scale of a norm"):
        pruning.score(model, pruning.batch_norm_scale)
    with pytest.raises(ValueError, match=r"leave=\['0\.weight'\]"):
        pruning.score(model, leave="0.weight")
    with pytest.raises(ValueError, match=r"no parameter is called '0'"):
        pruning.score(model, leave=["0"])
    with pytest.raises(ValueError, match="exponent"):
        pruning.score(model, partial(pruning.magnitude, p=0))
    with pytest.raises(ValueError, match=r"p is the exponent .* not '2'"):
        pruning.magnitude(model[0].weight, p="2")
    model[3].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"9 of 216 scores of 3\.weight are NaN"):
        pruning.score(model)


def test_a_layer_whose_input_is_not_seen_is_named():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    objective = lambda m, batch: m["used"](batch).sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"input_norm of idle\.weight .*leave=\['idle\.weight'\]"):
        pruning.score(model, pruning.wanda, [torch.ones(1, 2)], objective=objective)
    gradients = pruning.score(model, pruning.saliency, [torch.ones(1, 2)], objective=objective)
    assert not gradients["idle.weight"].any()  # it has no effect, which is a fact


def test_scores_of_another_model_are_refused():
    model = network("cpu")
    channels = channel_groups(model, torch.ones(1, 2, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"scores of 3\.weight have shape"):
        pruning.channel_scores(channels, {"3.weight": torch.zeros(2, 2, 3, 3)})
    with pytest.raises(ValueError, match=r"scores of 3\.weight have shape \(4,\), .* dimension 1"):
        pruning.channel_scores(channels, {"3.weight": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"group '0' of 4 it gave \(\)"):
        pruning.channel_scores(channels, pruning.score(model), torch.mean)
