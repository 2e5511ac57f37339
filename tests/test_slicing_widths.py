"""A slice equals the network that `channels.take` cuts, in double precision."""

import copy
import functools

import pytest
import torch
from channel_networks import CASES
from slicing_networks import ALL, OWN, made
from torch import nn

from structopt import checkpoint, networks
from structopt.channels import channel_groups, take
from structopt.slicing import Slice, Slimmable, sort_channels
from structopt.slicing.slices import widths_of
from structopt.training.layout import wants_channels_last


@functools.cache
def sliced(name, device):
    model, x = made(name, device)
    return Slimmable(model, x, [0.25, 0.5]), x


@functools.cache
def analysed(name, device):
    slimmable, x = sliced(name, device)
    return channel_groups(slimmable.model, x)


def prefixes(name, device, width):
    """`take` asked by hand for the first channels of every group."""
    sizes = widths_of(analysed(name, device), Slice(width))
    assert sizes
    model = sliced(name, device)[0].model
    return take(model, {group: range(size) for group, size in sizes.items()})


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "width"), [*((n, 0.5) for n in ALL), *((n, 0.25) for n in OWN), ("ViT", 0.25)]
)
def test_a_slice_equals_what_take_cuts_and_what_extract_gives(name, width, device):
    slimmable, x = sliced(name, device)
    x = torch.randn_like(x)
    expected = prefixes(name, device, width)
    assert_close(slimmable(x, width=width), expected(x))
    alone = slimmable.extract(width)
    assert_close(alone(x), expected(x))
    assert [tuple(p.shape) for p in alone.parameters()] == [
        tuple(p.shape) for p in expected.parameters()
    ]
    assert torch.equal(slimmable(x), slimmable.model(x))


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_shared_weights_and_no_others(name, device):
    slimmable, x = sliced(name, device)
    slimmable.zero_grad()
    alone = slimmable.extract(0.5)
    weight = torch.randn_like(slimmable(x))
    (slimmable(x, width=0.5) * weight).sum().backward()
    (alone(x) * weight).sum().backward()
    shared = dict(slimmable.model.named_parameters())
    for key, parameter in alone.named_parameters():
        mine = shared[key].grad  # outside the slice zero, inside in the same order
        assert mine.shape == shared[key].shape
        assert_close(mine[mine != 0], parameter.grad[parameter.grad != 0])


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("ViT", "TinyTransformer")])
def test_each_width_keeps_statistics_of_its_own(name, device):
    slimmable, x = copy.deepcopy(sliced(name, device)[0]), sliced(name, device)[1]
    model = slimmable.model
    alone, before = slimmable.extract(0.5), copy.deepcopy(model.state_dict())
    for module in (*alone.modules(), *slimmable.modules()):
        module.train(isinstance(module, nn.BatchNorm2d))  # dropout rests
    assert_close(slimmable(x, width=0.5), alone(x))
    slimmable.eval()
    alone.eval()
    assert_close(slimmable(x, width=0.5), alone(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_close(slimmable.extract(0.5)(x), alone(x))


@pytest.mark.parametrize("name", CASES)
def test_slices_of_networks_of_every_kind(name, device):
    """Recurrent and tied ones, attention that Python scales by its width."""
    case = CASES[name]
    model, x = case.model(device), case.example(device, seed=3)
    channels = channel_groups(model, x)
    half = Slice(0.5)
    refused = dict.fromkeys(["weight norm", "spectral norm"], "remove_parametrizations")
    refused["masks"] = "prune.remove"
    if name in refused:  # their weights are computed from all of the wide one's
        with pytest.raises(ValueError, match=refused[name]):
            Slimmable(model, x, [half])
        return
    both = Slice(shares={"*": 0.5})  # where two groups share an axis, both
    slimmable = Slimmable(model, x, [half, both]).eval()
    for part in (half, both):
        sizes = widths_of(channels, part)
        expected = take(model, {group: range(size) for group, size in sizes.items()})(x)
        assert_close(slimmable(x, width=part), expected)
        assert_close(slimmable.extract(part).eval()(x), expected)


def test_slices_nest(device):
    slimmable, x = sliced("ResNet-20", device)
    half = slimmable.extract(0.5)
    again = Slimmable(half, x, [0.5])
    assert_close(again(x, width=0.5), slimmable(x, width=0.25))


def test_any_width_can_be_extracted(device):
    slimmable, x = sliced("ResNet-20", device)
    assert_close(slimmable.extract(0.75)(x), prefixes("ResNet-20", device, 0.75)(x))
    whole = slimmable.extract()
    assert_close(whole(x), slimmable(x))
    assert not {id(p) for p in whole.parameters()} & {id(p) for p in slimmable.parameters()}


# ------------------------------------------------------------------ statistics


def test_calibration_averages_over_the_batches(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model = model.double().to(device)
    batches = [torch.randn(5, 3, dtype=torch.float64, device=device) for _ in range(3)]
    slimmable = Slimmable(model, batches[0], [0.5]).train()
    assert slimmable.calibrate_([(batch, None) for batch in batches]) is slimmable
    assert slimmable.training
    features = [model[0](batch).detach() for batch in batches]
    mean = torch.stack([f.mean(0) for f in features]).mean(0)
    variance = torch.stack([f.var(0) for f in features]).mean(0)
    assert_close(model[1].running_mean, mean)
    norm = slimmable.extract(0.5)[1]
    assert_close(norm.running_mean, mean[:2])
    assert_close(norm.running_var, variance[:2])
    assert norm.momentum == 0.1
    between = slimmable.extract(0.75, batches)[1]
    assert_close(between.running_var, variance[:3])
    with pytest.raises(ValueError, match="batches are empty"):
        slimmable.calibrate_([])


@pytest.mark.parametrize("uses", [1, 2])
def test_instance_norms_are_calibrated_too(uses, device):
    """The plain average over all that the norm has seen, of each width apart."""
    torch.manual_seed(0)
    norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv1d(2, 4, 1), *[norm] * uses, nn.ReLU(), nn.Conv1d(4, 2, 1))
    model = model.double().to(device)
    batches = [torch.randn(5, 2, 6, dtype=torch.float64, device=device) for _ in range(3)]
    slimmable = Slimmable(model, batches[0], [0.5]).calibrate_(batches)
    assert norm.momentum == 0.1
    assert not norm._forward_pre_hooks
    for width in slimmable.widths:
        narrow = slimmable.extract(width)
        means, variances = [], []
        for batch in batches:
            x = narrow[0](batch)
            for _ in range(uses):
                means.append(x.mean((0, 2)))
                variances.append(x.var(2).mean(0))
                x = nn.functional.instance_norm(x, weight=narrow[1].weight, bias=narrow[1].bias)
        assert_close(narrow[1].running_mean, torch.stack(means).mean(0).detach())
        assert_close(narrow[1].running_var, torch.stack(variances).mean(0).detach())


def test_batches_that_a_model_writes_to_serve_every_width_alike(device):
    class Doubling(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(2))

    model = Doubling(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).to(device)
    x = torch.randn(5, 3, device=device)
    slimmable = Slimmable(model, x, [0.5]).calibrate_([x])
    mean = model[0](2 * x).mean(0).detach()
    torch.testing.assert_close(slimmable.extract(0.5)[1].running_mean, mean[:2])
    torch.testing.assert_close(model[1].running_mean, mean)


def test_an_extract_is_frozen_where_the_model_is_now(device):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(device)
    model[0].requires_grad_(False)
    slimmable = Slimmable(model, torch.zeros(1, 3, device=device), [0.5])
    for width in (0.25, 0.5):
        for trained in (False, True):
            model[0].requires_grad_(trained)
            model[2].requires_grad_(not trained)
            made = slimmable.extract(width)
            assert made[0].weight.requires_grad == trained
            assert made[2].weight.requires_grad != trained


# ------------------------------------------------------------------ nested transformers


def test_a_nested_transformer_is_narrow_in_heads_and_perceptrons_and_shallow(device):
    model, x = made("TinyTransformer", device)
    part = Slice(shares={"layers.*.fc1": 0.25, "layers.*.qkv": 0.5}, skip=["layers.1"])
    slimmable = Slimmable(model, x, [part])
    alone = slimmable.extract(part)
    assert alone.layers[0].fc1.out_features == 8
    assert alone.layers[2].proj.in_features == 8
    assert isinstance(alone.layers[1], nn.Identity)
    assert alone.norm.weight.shape == (16,)
    by_hand = copy.deepcopy(model)
    for layer in by_hand.layers:
        layer.fc2.weight.data[:, 8:] = 0
        layer.proj.weight.data[:, 8:] = 0
    for dead in (by_hand.layers[1].proj, by_hand.layers[1].fc2):
        dead.weight.data.zero_()
        dead.bias.data.zero_()
    assert_close(slimmable(x, width=part), by_hand(x))
    assert_close(alone(x), by_hand(x))
    slimmable(x, width=part).sum().backward()
    assert model.layers[1].fc1.weight.grad is None


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + self.layer(x)


@pytest.mark.parametrize("whole", [True, False])
def test_a_block_is_skipped_where_another_shares_its_weights(whole, device):
    layer = nn.Linear(4, 4)
    first = Block(layer)
    model = nn.Sequential(nn.Linear(3, 4), first, first if whole else Block(layer), nn.Linear(4, 2))
    model = model.double().to(device)
    x = torch.randn(5, 3, dtype=torch.float64, device=device)
    part = Slice(0.5, skip=["1"])
    slimmable = Slimmable(model, x, [part])
    inner = x @ model[0].weight[:2].T + model[0].bias[:2]
    inner = inner + inner @ layer.weight[:2, :2].T + layer.bias[:2]
    expected = inner @ model[3].weight[:, :2].T + model[3].bias
    assert_close(slimmable(x, width=part), expected)
    assert_close(slimmable.extract(part)(x), expected)


def test_layers_of_torchs_own_transformer_are_skipped(device):
    """They are called with masks beside what they hand on."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double().to(device).eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64, device=device)
    part = Slice(skip=["layers.1"])
    slimmable = Slimmable(model, x, [part])
    expected = model.layers[2](model.layers[0](x))
    assert_close(slimmable(x, width=part), expected)
    assert_close(slimmable.extract(part)(x), expected)


def test_what_has_no_values_is_sliced_in_shape():
    with torch.device("meta"):
        model, x = networks.ResNet20(width=4), torch.zeros(2, 1, 28, 28)
    slimmable = Slimmable(model, x, [0.5])
    assert slimmable(x, width=0.5).shape == (2, 10)
    half = Slimmable(networks.ResNet20(width=4), torch.zeros(2, 1, 28, 28), [0.5]).extract(0.5)
    found = {name: tensor.shape for name, tensor in slimmable.extract(0.5).state_dict().items()}
    assert found == {name: tensor.shape for name, tensor in half.state_dict().items()}
    with pytest.raises(ValueError, match=r"importance needs values.* none on the meta device"):
        sort_channels(model, x)


def test_where_groups_share_an_axis_the_outer_one_is_narrowed(device):
    model, x = made("ViT", device)
    half = Slimmable(model, x, [0.5]).extract(0.5)
    attention = half.encoder.layers[0].self_attention
    assert attention.out_proj.in_features * 2 == 32
    assert half.encoder.layers[0].mlp[0].out_features == 32


# ------------------------------------------------------------------ the order of channels


@pytest.mark.parametrize("name", ALL)
def test_sorting_keeps_the_function(name, device):
    model, x = made(name, device)
    turned = sort_channels(model, x)
    x = torch.randn_like(x)
    assert_close(turned(x), model(x))
    assert any(
        not torch.equal(a, b) for a, b in zip(turned.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("seed", range(6))
def test_importance_is_the_share_of_each_weight_that_makes_or_reads_a_channel(device, seed):
    torch.manual_seed(seed)
    layers = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
    model = nn.Sequential(*layers).double().to(device).eval()
    with torch.no_grad():
        model[2].weight.mul_(100)  # as a share it counts no more for that
    first, second = model[0].weight.abs(), model[2].weight.abs()
    order = (first.sum(1) / first.sum() + second.sum(0) / second.sum()).argsort(descending=True)
    turned = sort_channels(model, torch.randn(4, 3, dtype=torch.float64, device=device))
    assert torch.equal(turned[0].weight, model[0].weight[order])
    assert torch.equal(turned[2].weight, model[2].weight[:, order])


def test_a_slice_of_a_sorted_network_keeps_what_matters_most(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double().to(device)
    x = torch.randn(4, 3, dtype=torch.float64, device=device)
    first, second = model[0].weight.abs(), model[2].weight.abs()
    scores = first.sum(1) / first.sum() + second.sum(0) / second.sum()
    best = scores.argsort(descending=True)[:3]
    kept = take(model, {channel_groups(model, x)["0"]: best.sort().values})
    slimmable = Slimmable(sort_channels(model, x), x, [0.5])
    assert_close(slimmable(x, width=0.5), kept(x))
    own = Slimmable(sort_channels(model, x, {"0": -scores.detach()}), x, [0.5])
    worst = take(model, {channel_groups(model, x)["0"]: scores.argsort()[:3].sort().values})
    assert_close(own(x, width=0.5), worst(x))


# ------------------------------------------------------------------ as a module


def test_a_copy_and_a_saved_state_are_whole(device, tmp_path):
    slimmable, x = sliced("ResNet-20", device)
    twin = copy.deepcopy(slimmable)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert twin(x, width=0.5).abs().max() == 0
    twin.load_state_dict(slimmable.state_dict())
    for width in slimmable.widths:
        assert torch.equal(twin(x, width=width), slimmable(x, width=width))
    assert sum(p.numel() for p in twin.parameters()) == sum(
        p.numel() for p in slimmable.model.parameters()
    )
    checkpoint.save(slimmable.extract(0.5), tmp_path / "half.safetensors")
    loaded = checkpoint.load(tmp_path / "half.safetensors", into=networks.ResNet20(width=4))
    assert_close(loaded.to(device).eval()(x), slimmable(x, width=0.5))


def test_it_moves_to_another_type_and_follows_the_model(device):
    model, x = made("ResNet-20", torch.device("cpu"))
    slimmable = Slimmable(model, x, [0.5]).to(device).float()
    x = x.float().to(device)
    assert slimmable(x, width=0.5).dtype == torch.float32
    assert slimmable.extract(0.75)(x).device.type == device.type
    torch.testing.assert_close(slimmable(x, width=0.5), slimmable.extract(0.5)(x))


def test_a_compiled_network_gives_its_slices_and_their_gradients(device):
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 3, device=device)
    slimmable = Slimmable(model.to(device), x, [0.5]).eval()
    compiled = torch.compile(slimmable, backend="eager")
    for width in (0.5, 1.0, Slice(0.5)):
        found, expected = (one(x, width=width) for one in (compiled, slimmable))
        assert torch.equal(found, expected)
        found.sum().backward()
        assert (model[0].weight.grad[4:] == 0).all() == (width != 1)
        slimmable.zero_grad()


# ------------------------------------------------------------------ bad input


def test_a_slice_too_narrow_for_onednn_is_trained_in_plain_order():
    model, image, cpu = networks.ResNet20(width=16), torch.rand(1, 1, 28, 28), torch.device("cpu")
    assert wants_channels_last(model, cpu)
    assert wants_channels_last(Slimmable(networks.ResNet20(width=32), image, [0.5]), cpu)
    slimmable = Slimmable(model.to(memory_format=torch.channels_last), image, [0.5])
    assert not wants_channels_last(slimmable, cpu)
    for width, plain in ((1.0, False), (0.5, True), (0.6, True)):
        assert slimmable.extract(width).stage1[0].conv1.weight.is_contiguous() == plain


@pytest.mark.parametrize("width", [0, -0.5, 1.5, float("nan"), "half", None])
def test_widths_are_shares(width):
    for bad in (lambda: Slice(width), lambda: Slice(shares={"fc1": width})):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            bad()


def test_what_is_wrong_is_named():
    model, x = networks.LeNet5(widths=(2, 4, 8)), torch.zeros(1, 1, 28, 28)
    with pytest.raises(ValueError, match=r"widths is a list of widths: \[0.5\]"):
        Slimmable(model, x, 0.5)
    with pytest.raises(ValueError, match=r"widths is a list of widths: \['0.5'\]"):
        Slimmable(model, x, "0.5")
    with pytest.raises(ValueError, match="empties group 'conv1', which has 2 channels"):
        Slimmable(model, x, [0.2])
    with pytest.raises(ValueError, match="no group is called 'conv9'; there are conv1"):
        Slimmable(model, x, [Slice(shares={"conv9": 0.5})])
    with pytest.raises(ValueError, match=r"Slice\(0.7\) was not declared; there are Slice\(0.5\)"):
        Slimmable(model, x, [0.5])(x, width=0.7)
    with pytest.raises(ValueError, match="no module 'layer9' to skip"):
        Slimmable(model, x, [Slice(skip=["layer9"])])
    model.alias = nn.ModuleDict({"conv2": model.conv2})
    with pytest.raises(ValueError, match=r"does not run 'alias\.conv2' by this name"):
        Slimmable(model, x, [Slice(skip=["alias.conv2"])])
    with pytest.raises(ValueError, match="skip residual blocks"):
        Slimmable(model, x, [Slice(skip=["conv2"])])
    with pytest.raises(ValueError, match="skip is a list"):
        Slice(skip="conv2")
    with pytest.raises(ValueError, match="without these modules the output has shape"):
        Slimmable(nn.Sequential(nn.Linear(3, 5)), torch.zeros(1, 3), [Slice(skip=["0"])])
    with pytest.raises(ValueError, match="no channels of this model can be sliced"):
        Slimmable(nn.Linear(3, 2), torch.zeros(1, 3), [0.5])
    with pytest.raises(ValueError, match="importance of 'conv1' has shape"):
        sort_channels(model, x, {"conv1": torch.ones(3)})
