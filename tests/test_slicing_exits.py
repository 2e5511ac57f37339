"""Early exits: who leaves gets its exit's answer, who stays that of the whole network."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from slicing_networks import made
from torch import nn

from structopt import data, measure
from structopt.networks import SimpleNet
from structopt.slicing import (
    EarlyExits,
    all_exits,
    choose_threshold,
    confidence,
)
from structopt.training import evaluate, train

AT = {
    "ResNet-18": ["layer1", "layer3"],
    "ResNeXt": ["layer2", "layer4"],
    "VGG": ["features.0", "classifier.1"],
    "MobileNet-V2": ["features.3", "features.10"],
    "SqueezeNet": ["features.5", "features.10"],
    "DenseNet": ["features.transition1", "features.denseblock3"],
    "ShuffleNet-V2": ["stage2", "stage4"],
    "ViT": ["encoder.layers.encoder_layer_0"],
    "TinyTransformer": ["layers.0", "layers.1"],
    "ResNet-20": ["stage1", "stage2.0"],
}


def with_exits(name, device):
    model, x = made(name, device)
    network = EarlyExits(model, x, AT[name][::-1]).eval()
    x = torch.randn(6, *x.shape[1:], dtype=x.dtype, device=device)
    return network, x


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", AT)
def test_an_exit_reads_the_module_it_stands_at(name, device):
    network, x = with_exits(name, device)
    seen = {}
    for place in AT[name]:
        module = network.model.get_submodule(place)
        module.register_forward_hook(lambda _m, _a, y, place=place: seen.update({place: y}))
    whole = network.model(x)
    *early, last = network(x)
    assert torch.equal(last, whole)
    assert network.at == tuple(AT[name])
    for place, logits, head in zip(AT[name], early, network.heads, strict=True):
        features = seen[place]
        if features.ndim == 4:
            features = features.mean((2, 3))
        features = features.mean(1) if features.ndim == 3 else features
        assert_close(logits, F.linear(features, head[-1].weight, head[-1].bias))


@pytest.mark.parametrize("name", AT)
def test_each_example_leaves_at_the_first_exit_that_is_sure(name, device):
    network, x = with_exits(name, device)
    for head in network.heads:
        head[-1].weight.data *= 5
    outputs = torch.stack(network(x)).detach()
    sure = outputs.softmax(2).amax(2)
    values = sure[:-1].flatten().sort().values.tolist()
    middle = [(values[k] + values[k + 1]) / 2 for k in (len(values) // 2, len(values) - 2)]
    for threshold in (0.0, *middle, 1.01):
        first = [
            next((k for k in range(len(network.at)) if sure[k, i] >= threshold), len(network.at))
            for i in range(len(x))
        ]
        found = network.answer(x, threshold)
        assert found.exits.tolist() == first
        assert_close(found.logits, outputs[first, range(len(x))])
        assert torch.equal(network.deciding(threshold)(x), found.logits)


def test_an_exit_reads_volumes_and_no_vectors_or_scalars(device):
    body = nn.Sequential(nn.Conv3d(1, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(2, 1, 5, 5, 5, device=device)
    network = EarlyExits(body.to(device), x, ["0"])
    torch.testing.assert_close(network(x)[0], network.heads[0][-1](body[0](x).mean((2, 3, 4))))
    for shape, given in (((), "(2,)"), ((4, 1, 1, 1, 1), "(2, 4, 1, 1, 1, 1)")):
        odd = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, shape) if shape else Sum(), Back())
        with pytest.raises(ValueError, match=re.escape(f"1 gives a tensor of shape {given}")):
            EarlyExits(odd, torch.randn(2, 4), ["1"])


class Sum(nn.Module):
    def forward(self, x):
        return x.sum(1)


class Back(nn.Module):
    def forward(self, x):
        return x.reshape(len(x), -1)


def test_probabilities_of_half_precision_are_of_float32(device):
    logits = torch.randn(3, 5, device=device)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        found = confidence(logits.to(dtype))
        assert found.dtype == wide
        assert torch.equal(found, logits.to(dtype).to(wide).softmax(1).amax(1))


def test_what_has_left_costs_nothing_more(device):
    """The modules behind an exit see the others alone, and are not run where none is left."""
    network, x = with_exits("ResNet-20", device)
    seen = []
    network.model.stage3.register_forward_hook(lambda _m, args, _y: seen.append(len(args[0])))
    staying = torch.tensor([True, False, True, True, False, False], device=device)
    network.leave(x, lambda n, y: ~staying if n == 0 else torch.zeros_like(y[:, 0]).bool())
    assert seen == [3]
    network.answer(x, 0.0)
    assert seen == [3]
    network.answer(x, 1.01)
    assert seen == [3, 6]


def test_macs_until_an_exit_are_those_of_the_modules_before_it(device):
    body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    network = EarlyExits(body.to(device), torch.zeros(1, 4, device=device), ["1", "3"])
    assert network.macs(torch.zeros(1, 4, device=device)) == [24 + 18, 42 + 48 + 24, 114 + 24]
    assert network.training
    network, x = with_exits("ResNet-20", device)
    last = network.macs(x[:1])[-1]
    heads = sum(head[-1].weight.numel() for head in network.heads)
    assert last == measure.cost(network.model, x[:1]).macs + heads


# ------------------------------------------------------------------ training


def small(device):
    body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    network = EarlyExits(
        body.double().to(device), torch.zeros(1, 4).double().to(device), ["1", "3"]
    )
    x = torch.randn(7, 4, dtype=torch.float64, device=device)
    return network, x, torch.randint(3, (7,), device=device)


def test_the_objective_is_the_sum_written_out(device):
    network, x, y = small(device)
    one, two, last = network(x)

    def part(logits):
        told = F.kl_div(logits.log_softmax(1), last.detach().softmax(1), reduction="batchmean")
        return F.cross_entropy(logits, y) + 0.25 * told

    expected = 0.5 * part(one) + 2 * part(two) + 3 * F.cross_entropy(last, y)
    found = all_exits(weights=[0.5, 2, 3], teaching=0.25)(network, (x, y))
    parameters = list(network.parameters())
    for a, b in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert_close(a, b)
    assert_close(found, 0.5 * part(one) + 2 * part(two) + 3 * F.cross_entropy(last, y))
    plain = sum(F.cross_entropy(logits, y) for logits in network(x))
    assert_close(all_exits()(network, (x, y)), plain)


def test_every_exit_learns(device):
    inputs = torch.randn(96, 4, dtype=torch.float64)
    examples = data.Examples(inputs, (inputs.sum(1) > 0).long())
    network, _, _ = small(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.02)
    batches = data.batches(examples, 32)
    train(
        network, batches, all_exits(teaching=0.5), optimizer, epochs=40, device=device,
        autocast=None,
    )  # fmt: skip
    for threshold in (0.0, 0.8, 1.01):
        assert evaluate(network.deciding(threshold), examples) > 0.9


# ------------------------------------------------------------------ when to leave


def test_the_threshold_is_the_best_of_all(device):
    network, _, _ = small(device)
    x = torch.randn(25, 4, dtype=torch.float64, device=device)
    y = torch.where(torch.rand(25, device=device) < 0.6, network(x)[2].argmax(1), 0)
    batches = [(x[:15], y[:15]), (x[15:], y[15:])]
    costs = network.macs(x[:1])
    every = []
    sure = torch.cat([confidence(z) for z in network(x)[:-1]]).detach().sort().values
    prices = torch.tensor(costs, dtype=torch.float64, device=device)
    for value in [0.0, *((sure[1:] + sure[:-1]) / 2).tolist(), 1.01]:
        found = network.answer(x, value)
        right = float((found.logits.argmax(1) == y).double().mean())
        every.append((right, float(prices[found.exits].mean())))
    best = max(right for right, _ in every)
    for target in sorted({right - 1e-6 for right, _ in every}):  # rounding must not decide
        chosen = choose_threshold(network, batches, accuracy=target)
        assert chosen.accuracy >= target
        assert chosen.macs == pytest.approx(min(m for r, m in every if r >= target))
        found = network.answer(x, chosen.value)
        assert float((found.logits.argmax(1) == y).double().mean()) == pytest.approx(
            chosen.accuracy
        )
        counts = torch.bincount(found.exits, minlength=3).double() / 25
        assert chosen.left == pytest.approx(tuple(counts.tolist()))
    for budget in sorted({cost + 1e-6 for _, cost in every}):
        chosen = choose_threshold(network, batches, macs=budget)
        assert chosen.macs <= budget
        most = max(r for r, m in every if m <= budget)
        assert chosen.accuracy == pytest.approx(most)
        assert chosen.macs == pytest.approx(min(m for r, m in every if r > most - 1e-9))
    with pytest.raises(ValueError, match=f"the best is {best:.4f}"):
        choose_threshold(network, batches, accuracy=best + 0.01)
    with pytest.raises(ValueError, match=f"the least is {costs[0]}"):
        choose_threshold(network, batches, macs=1)
    with pytest.raises(ValueError, match="give one of accuracy and macs"):
        choose_threshold(network, batches)
    for nothing in ([], [(x[:0], y[:0])]):
        with pytest.raises(ValueError, match="batches are empty"):
            choose_threshold(network, nothing, macs=1)
    with pytest.raises(ValueError, match=r"targets of shape \(25, 3\) for 25 inputs"):
        choose_threshold(network, [(x, F.one_hot(y, 3))], macs=1)
    with_none = [batches[0], (x[:0], y[:0]), batches[1]]
    some = choose_threshold(network, with_none, accuracy=best - 1e-6)
    assert some == choose_threshold(network, batches, accuracy=best - 1e-6)


def test_of_very_many_thresholds_evenly_chosen_ones_are_tried(device):
    """The exit is always wrong, the end always right: as many stay as the budget allows."""
    body = nn.Sequential(nn.Identity(), nn.Linear(1, 2)).to(device)
    network = EarlyExits(body, torch.zeros(1, 1, device=device), ["0"])
    for layer, slope, offset in (
        (network.heads[0][-1], [0.0, 1], [0.0, 0]),
        (body[1], [0.0, 0], [1.0, 0]),
    ):
        layer.weight.data = torch.tensor(slope, device=device)[:, None]
        layer.bias.data = torch.tensor(offset, device=device)
    x = 1 + torch.rand(1500, 1, device=device)
    batches, (first, whole) = [(x, torch.zeros(1500).long())], network.macs(x[:1])
    for share in (0.0, 0.9, 1.0):
        found = choose_threshold(network, batches, macs=first + share * (whole - first))
        assert share - 0.002 <= found.accuracy <= share
        assert found.left == pytest.approx((1 - found.accuracy, found.accuracy))
    assert found == choose_threshold(network, batches, accuracy=1.0)


def test_no_examples_get_no_answers(device):
    network, x, _ = small(device)
    for threshold in (0.0, 0.5, 1.01):
        found = network.eval().answer(x[:0], threshold)
        assert found.logits.shape == (0, 3)
        assert found.exits.tolist() == []


# ------------------------------------------------------------------ as a module, and bad input


def test_a_copy_is_a_network_of_its_own(device):
    network, x = with_exits("ResNet-20", device)
    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert all(logits.abs().max() == 0 for logits in twin(x))
    twin.load_state_dict(network.state_dict())
    assert_close(twin.answer(x, 0.5).logits, network.answer(x, 0.5).logits)


class Skipping(nn.Module):
    """A residual around `inner`: examples cannot leave there."""

    def __init__(self):
        super().__init__()
        self.inner, self.twice, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.pair, self.unused = nn.LSTM(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.inner(x)
        return self.head(self.pair(self.twice(self.twice(x)))[0])


class Dropping(nn.Sequential):
    """Leaves its first layer out in training, as layer drop does."""

    def forward(self, x):
        return super().forward(x) if not self.training else self[2](self[1](x))


def test_where_an_exit_does_not_run_no_other_is_taken_for_it(device):
    """Logits are told apart by their place alone."""
    model = Dropping(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).to(device)
    x = torch.randn(5, 4, device=device)
    network = EarlyExits(model, x, ["0", "1"])
    assert len(network.eval()(x)) == 3
    with pytest.raises(
        ValueError, match=r"ran as \['1'\], not once each in the order \['0', '1'\]"
    ):
        network.train()(x)
    with pytest.raises(ValueError, match=r"ran as \['1'\], not once each"):
        network.leave(x, lambda _, logits: torch.zeros_like(logits[:, 0]).bool())


def test_exits_that_a_compiled_model_passes_over_are_no_answers(device):
    """Compiled code calls no modules: every example would be answered at the end, in silence."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).to(device)
    x = torch.randn(5, 4, device=device)
    network = EarlyExits(model, x, ["1"]).eval()
    model.compile(backend="eager")
    model(x)
    with pytest.raises(ValueError, match=r"ran as \[\], not once each in the order \['1'\]"):
        network.answer(x, 0.0)


def test_a_confidence_of_the_threshold_is_enough(device):
    network = EarlyExits(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 4)), torch.ones(1, 2), ["0"])
    for value in network.heads.parameters():
        nn.init.zeros_(value)  # a quarter for each class
    network, x = network.to(device), torch.randn(3, 2, device=device)
    assert network.answer(x, 0.25).exits.tolist() == [0, 0, 0]
    assert network.answer(x, 0.2500001).exits.tolist() == [1, 1, 1]


class Mixing(nn.Module):
    """Looks at the batch as a whole, by so much."""

    def __init__(self, share, scale):
        super().__init__()
        self.share, self.scale = share, scale

    def forward(self, x):
        return self.scale * (x - self.share * x.mean(0))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_no_example_leaves_a_batch_that_is_looked_at_as_a_whole(scale, device):
    x = torch.randn(4, 3, device=device)
    for share in (0.0, 0.05):
        model = nn.Sequential(nn.Linear(3, 3), Mixing(share, scale)).to(device)
        if not share:
            assert EarlyExits(model, x, ["0"]).at == ("0",)
            continue
        with pytest.raises(ValueError, match=r"no example can leave at 0: .* get other answers"):
            EarlyExits(model, x, ["0"])


def test_of_three_axes_behind_a_1d_convolution_the_channels_are_not_guessed(device):
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)
    ).to(device)
    x = torch.randn(2, 2, 9, device=device)
    with pytest.raises(ValueError, match=r"1 gives .* \(2, 4, 7\).* give a head of your own, {'1'"):
        EarlyExits(model, x, ["1"])
    head = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)).to(device)
    longer = torch.randn(2, 2, 20, device=device)
    assert EarlyExits(model, x, {"1": head})(longer)[0].shape == (2, 3)


def test_what_is_wrong_is_named():
    x = torch.randn(2, 4)
    for place, reason in {
        "inner": "no example can leave at inner: past it the model carries other tensors",
        "twice": "twice is called more than once",
        "pair": "pair gives a tuple: an exit reads one tensor",
        "unused": "unused is not called by itself",
        "nowhere": "no module 'nowhere'; it has inner, twice, head",
    }.items():
        model = Skipping()
        with pytest.raises(ValueError, match=reason):
            EarlyExits(model, x, ["inner", place] if place == "nowhere" else [place])
        assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="the model does not accept the example: mat1 and mat2"):
        EarlyExits(Skipping(), x[:, :3], ["twice"])
    with pytest.raises(ValueError, match=r"not accept the example: .* must be Tensor, not dict"):
        EarlyExits(nn.Sequential(nn.Linear(4, 3)), {"x": x}, ["0"])
    with pytest.raises(ValueError, match=r"at=\['pair', 'pair'\]: name each module once"):
        EarlyExits(Skipping(), x, ["pair", "pair"])
    with pytest.raises(ValueError, match=r"needs values.* none on the meta device"):
        EarlyExits(Skipping().to("meta"), x.to("meta"), ["pair"])
    for number in (torch.nan, torch.inf):
        broken = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        nn.init.constant_(broken[1].bias, number)
        with pytest.raises(ValueError, match="gives no finite number on the example"):
            EarlyExits(broken, x, ["0"])
    residual = Skipping()  # numbers that are not finite hide no difference of the others
    residual.head.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match="no example can leave at inner"):
        EarlyExits(residual, x, ["inner"])
    image = torch.zeros(1, 1, 28, 28)
    with pytest.raises(ValueError, match="at least one: 'conv1'"):
        EarlyExits(SimpleNet(), image, "conv1")
    with pytest.raises(ValueError, match="exits answer as it does, with logits"):
        EarlyExits(nn.Sequential(nn.Conv2d(1, 2, 3)), image, ["0"])
    wide = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(7))
    with pytest.raises(ValueError, match=r"the head of conv1 gives a tensor of shape \(3, 7\)"):
        EarlyExits(SimpleNet(), image, {"conv1": wide})
    with pytest.raises(ValueError, match="does each head take what its module gives"):
        EarlyExits(SimpleNet(), image, {"conv1": nn.Linear(3, 10)})
    network, x, y = small(torch.device("cpu"))
    with pytest.raises(ValueError, match="2 weights for 3 exits"):
        all_exits(weights=[1, 1])(network, (x, y))
    for teaching in (-1, "much"):
        with pytest.raises(ValueError, match=f"at least 0: {teaching!r}"):
            all_exits(teaching=teaching)
    for threshold in (float("nan"), None, "0.5"):
        with pytest.raises(ValueError, match=f"threshold={threshold!r}: give the confidence"):
            network.deciding(threshold)(x)
    for rule in (lambda _, z: z > 0, lambda _, z: z[:, 0], lambda *_: True):
        with pytest.raises(ValueError, match="give a truth value an example"):
            network.leave(x, rule)
    with pytest.raises(ValueError, match="for EarlyExits, not for a Sequential"):
        choose_threshold(network.model, [(x, y)], macs=1)
    for wrong in (y - 1, y + 3, torch.full_like(y, 3)):
        with pytest.raises(ValueError, match="with 3 logits labels run from 0 to 2"):
            choose_threshold(network, [(x, y), (x, wrong)], macs=1)
    with pytest.raises(ValueError, match="is a pair"):
        choose_threshold(network, [x], macs=1)
    some = x.clone()
    some[0] = torch.nan
    with pytest.raises(ValueError, match="logits of exit 0, 1, 2 are NaN or infinite"):
        choose_threshold(network, [(x, y), (some, y)], macs=1)
    with pytest.raises(ValueError, match="for EarlyExits, not for a Linear"):
        all_exits()(nn.Linear(4, 3), (x, y))
    with pytest.raises(ValueError, match="is a pair"):
        all_exits()(network, x)
