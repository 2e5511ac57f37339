"""Layers that vanish: the same function, or left as they are."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structopt import compression
from structopt.channels.exchanging import exchange_
from structopt.networks import LeNet300, ResNet20


def used(model):
    """Statistics and weights of norms as after training."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.normal_()
                    module.bias.normal_()
    return model


def norms(model):
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def test_every_norm_of_a_resnet_is_folded(device):
    model = used(ResNet20()).to(device).eval()
    x = torch.randn(4, 1, 28, 28, device=device)
    before = copy.deepcopy(model)
    made = compression.fold_batch_norms(model, x)
    assert norms(made) == 0
    torch.testing.assert_close(
        made.double()(x.double()), before.double()(x.double()), rtol=1e-4, atol=1e-4
    )
    assert norms(model) > 0, "the model given is untouched"


@pytest.mark.parametrize("kind", ["1d", "2d", "3d", "linear", "plain", "sync"])
def test_norms_behind_each_kind_of_layer(kind, device):
    conv, norm, shape = {
        "1d": (nn.Conv1d(3, 6, 2, groups=3, bias=False), nn.BatchNorm1d(6), (2, 3, 7)),
        "2d": (nn.Conv2d(3, 6, 2, stride=2), nn.BatchNorm2d(6, affine=False), (2, 3, 7, 7)),
        "3d": (nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6), (2, 3, 4, 4, 4)),
        "linear": (nn.Linear(3, 6), nn.BatchNorm1d(6), (2, 3)),
        "plain": (nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6, affine=False), (2, 3)),
        "sync": (nn.Conv2d(3, 6, 2), nn.SyncBatchNorm(6), (2, 3, 7, 7)),
    }[kind]
    model = used(nn.Sequential(conv, norm, nn.ReLU())).to(device).double().eval()
    x = torch.randn(shape, device=device).double()
    made = compression.fold_batch_norms(model, x)
    assert norms(made) == 0
    torch.testing.assert_close(made(x), model(x))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_bias_that_a_norm_brings_is_trained_where_the_weight_is(frozen, device):
    model = nn.Sequential(nn.Conv2d(3, 6, 2, bias=False), nn.BatchNorm2d(6)).to(device)
    model.requires_grad_(not frozen)
    made = compression.fold_batch_norms(model, torch.zeros(1, 3, 4, 4, device=device))
    assert {p.requires_grad for p in made.parameters()} == {not frozen}


class Shared(nn.Module):
    """What the norm reads is read elsewhere too, or the layer runs twice."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.norm = kind, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "read twice":
            return self.norm(y) + y
        if self.kind == "run twice":
            return self.norm(self.conv(y))
        if self.kind == "over other axes":
            return self.norm(y.transpose(1, 2)).transpose(1, 2)
        if self.kind == "with another input":
            return self.norm(y) + self.norm(x)
        return self.norm(y.relu())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("read twice", "what conv makes is read elsewhere too"),
        ("run twice", "not all that conv made goes to it"),
        ("over other axes", "it reads what no linear layer or plain convolution made"),
        ("activated", "it reads what no linear layer or plain convolution made"),
        ("with another input", "it reads what no linear layer or plain convolution made"),
    ],
)
def test_what_is_not_exact_is_left_and_named(kind, reason):
    model, x = used(Shared(kind)).eval(), torch.randn(2, 3, 3, 3)
    made = left(model, x, "norm", reason)
    assert torch.equal(made(x), model(x))


def left(model, x, name, reason):
    """What is made of a model whose one norm stays, and is named with this reason."""
    with pytest.warns(UserWarning, match=f"^batch norms that stay: {name}: {reason}") as said:
        made = compression.fold_batch_norms(model, x)
    assert [warning.filename for warning in said] == [__file__]
    assert norms(made) == 1
    return made


def test_a_norm_that_has_no_place_elsewhere_is_left():
    x = torch.randn(2, 3, 3, 3)
    frozen = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    left(frozen, torch.randn(4, 3), "1", "a batch norm without running statistics depends on its")
    computed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    kept = nn.Sequential(computed, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    left(kept, x, "1", "a weight that other parameters compute has no place")
    assert compression.removable(kept, x) == [], "without a warning"
    for outputs in 5, 6:  # a norm over 5 words, not over what the linear layer makes of each
        words = used(nn.Sequential(nn.Linear(3, outputs), nn.BatchNorm1d(5))).eval()
        reason = {
            5: "what 0 makes is read elsewhere too, or along",
            6: "the norm goes over another",
        }
        left(words, torch.randn(4, 5, 3), "1", reason[outputs])
    idle = nn.ModuleDict({"fc": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    idle.forward = idle["fc"].forward
    left(idle, x, "norm", "it does not run on this example")
    many = nn.Sequential(*[nn.BatchNorm2d(3) for _ in range(5)])
    with pytest.warns(UserWarning, match=r"stay: 0: .*; 1: .*; 2: [^;]*; and 2 more$"):
        compression.fold_batch_norms(many, x)


@given(
    kernels=st.tuples(*[st.integers(1, 3)] * 4),
    strides=st.tuples(*[st.integers(1, 3)] * 2),
    dilations=st.tuples(*[st.integers(1, 2)] * 2),
    padding=st.integers(0, 2),
    biases=st.tuples(st.booleans(), st.booleans()),
    size=st.tuples(st.integers(16, 20), st.integers(16, 20)),
)
def test_a_pair_of_convolutions_is_one(kernels, strides, dilations, padding, biases, size):
    first = nn.Conv2d(2, 5, kernels[:2], strides[0], padding, dilations[0], bias=biases[0]).double()
    second = nn.Conv2d(5, 3, kernels[2:], strides[1], 0, dilations[1], bias=biases[1]).double()
    x = torch.randn(2, 2, *size).double()
    merged = compression.merge_pair(first, second)
    torch.testing.assert_close(merged(x), second(first(x)))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(14, 18))
def test_a_padded_second_one_behind_one_place(stride, kernel, padding, size):
    first = nn.Conv2d(2, 5, 1, stride, bias=False).double()
    second = nn.Conv2d(5, 3, kernel, stride, padding).double()
    x = torch.randn(2, 2, size, size + 1).double()
    torch.testing.assert_close(compression.merge_pair(first, second)(x), second(first(x)))


def test_linear_layers_and_what_does_not_merge(device):
    first, second = nn.Linear(4, 9).to(device), nn.Linear(9, 3, bias=False).to(device)
    x = torch.randn(5, 4, device=device)
    torch.testing.assert_close(
        compression.merge_pair(first, second)(x), second(first(x)), rtol=1e-4, atol=1e-5
    )
    conv, padded = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
    with pytest.raises(ValueError, match="the first one has places beside it"):
        compression.merge_pair(conv, padded)
    with pytest.raises(ValueError, match="the first one adds a bias"):
        compression.merge_pair(nn.Conv2d(2, 4, 1), padded)
    with pytest.raises(ValueError, match="the first one pads too"):
        compression.merge_pair(nn.Conv2d(2, 4, 1, padding=1, bias=False), padded)
    with pytest.raises(ValueError, match="does not read what"):
        compression.merge_pair(conv, nn.Conv2d(6, 4, 1, groups=2))
    with pytest.raises(ValueError, match="does not pad with zeros"):
        compression.merge_pair(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), conv)
    with pytest.raises(ValueError, match="Linear and Conv2d do not merge"):
        compression.merge_pair(first, conv)


def test_layers_of_a_model_with_an_activation_removed():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Identity(), nn.Conv2d(8, 4, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 30), nn.Linear(30, 20), nn.Identity(), nn.Linear(20, 5),
    )  # fmt: skip
    x = torch.randn(2, 1, 8, 8)
    made = compression.merge_layers(model, x)
    layers = [m for m in made if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [str(layer) for layer in layers] == [
        "Conv2d(1, 4, kernel_size=(5, 5), stride=(1, 1), padding=(1, 1))",
        "Linear(in_features=144, out_features=5, bias=True)",
    ]
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)
    lenet = LeNet300()
    assert str(compression.merge_layers(lenet, torch.zeros(1, 1, 28, 28))) == str(lenet)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_parallel_branches_are_one_convolution(groups, device):
    branches = used(nn.ModuleList([
        nn.Conv2d(4, 4, 3, padding=1, groups=groups),
        nn.Sequential(nn.Conv2d(4, 4, 1, groups=groups, bias=False), nn.BatchNorm2d(4)),
        nn.Conv2d(4, 4, (5, 1), padding=(2, 0), groups=groups),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=groups),
        nn.BatchNorm2d(4), nn.Identity(),
    ])).double().to(device).eval()  # fmt: skip
    x = torch.randn(2, 4, 7, 6, device=device).double()
    merged = compression.merge_branches(list(branches))
    assert merged.kernel_size == (5, 5)
    torch.testing.assert_close(merged(x), sum(branch(x) for branch in branches))


def test_branches_that_do_not_fit_are_named():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    with pytest.raises(ValueError, match="another middle"):
        compression.merge_branches([conv, nn.Conv2d(4, 4, 1, padding=1)])
    with pytest.raises(ValueError, match="differ in stride"):
        compression.merge_branches([conv, nn.Conv2d(4, 4, 1, stride=2)])
    with pytest.raises(ValueError, match="Identity keeps 4 channels"):
        compression.merge_branches([nn.Conv2d(4, 6, 1), nn.Identity()])
    for branch in nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(3)):
        with pytest.raises(ValueError, match=r"BatchNorm2d\(3, .*does not read the 4 channels of"):
            compression.merge_branches([conv, branch])
    with pytest.raises(ValueError, match="not ReLU"):
        compression.merge_branches([conv, nn.ReLU()])
    with pytest.raises(ValueError, match="no branch has a convolution: Identity"):
        compression.merge_branches([nn.Identity()])
    with pytest.raises(ValueError, match="depends on its batch"):
        compression.merge_branches([conv, nn.BatchNorm2d(4, track_running_stats=False)])


class Alias(nn.Module):
    """Layers with names of their own, which run under those of a list."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.last = nn.Conv2d(4, 2, 1)
        self.body = nn.Sequential(self.conv, self.norm, self.relu, self.last)

    def forward(self, x):
        return self.body(x)


def test_a_layer_of_two_names_is_exchanged_under_both(device):
    model = used(Alias()).to(device).double().eval()
    x = torch.randn(2, 3, 8, 8, device=device).double()
    made = compression.fold_batch_norms(model, x)
    assert norms(made) == 0
    assert made.conv is made.body[0]
    torch.testing.assert_close(made(x), model(x))
    straight = compression.blend_activations(model, ["relu"], slope=1.0)
    torch.testing.assert_close(straight(x), model.body[3](model.body[1](model.body[0](x))))
    links = compression.removable(model, x)
    merged = compression.merge_links(model, x, links)
    assert [link.layers for link in links] == [("conv", "last")]
    torch.testing.assert_close(merged(x), straight(x))
    for name, first, function in (
        ("body.2", "relu", compression.blend_activations),
        ("body.0", "conv", lambda m, n: compression.round_inputs(m, compression.Grid(4), names=n)),
    ):
        with pytest.raises(ValueError, match=rf"'{name}' is '{first}' under another name"):
            function(model, [name])


def test_what_holds_the_old_layer_may_take_its_place():
    """Under every name of every holder; another layer of that kind, or of that name, stays."""
    old, other = nn.ReLU(), nn.ReLU()
    model = nn.Sequential(old, other, nn.Sequential(other, old, old))
    new = nn.Sequential(old, nn.Tanh())
    exchange_(model, "2.1", new)
    assert [*model] == [new, other, model[2]]
    assert [*model[2]] == [other, new, new]
    assert new[0] is old


class Reused(nn.Module):
    """One ReLU behind three layers, and one norm behind two, as blocks are often written."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norm, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        one, two, three = self.convs
        x = self.relu(self.norm(two(self.relu(self.norm(one(x))))))
        return x + self.relu(three(x))


def test_a_layer_that_runs_several_times_is_left_or_named(device):
    model, x = used(Reused()).to(device).eval(), torch.randn(2, 3, 5, 5, device=device)
    made = compression.fold_batch_norms(model, x)
    assert norms(made) == 0, "the norm goes into both layers that it follows"
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)
    assert compression.removable(model, x) == []
    straight = compression.blend_activations(model, ["relu"], slope=1.0)
    assert all(m.slope == 1 for m in straight.modules() if isinstance(m, compression.Blend))
    one, two, three = model.convs
    linear = model.norm(two(model.norm(one(x))))
    torch.testing.assert_close(straight(x), linear + three(linear), msg="all calls of it together")
    for remove in (1, ["relu"]):
        with pytest.raises(ValueError, match="separate_activations"):
            compression.shallower(model, x, [(x, x)], lambda m, b: m(b[0]).sum(), remove=remove)


class Twice(nn.Module):
    """Layers that run for two inputs, with one norm for all, or one for each."""

    def __init__(self, layers, norms):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1, bias=i > 0) for i in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(norms))

    def forward(self, x, y):
        made = [
            norm(conv(z))
            for z in (x, y)
            for conv in self.convs
            for norm in ([*self.norms] if len(self.convs) == 1 else self.norms[:1])
        ]
        return torch.stack(made)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_norm_that_is_shared_goes_into_every_layer(layers, device):
    model = used(Twice(layers, 1)).double().to(device).eval()
    pair = tuple(torch.randn(2, 2, 3, 4, 4, device=device).double())
    made = compression.fold_batch_norms(model, pair)
    assert norms(made) == 0
    torch.testing.assert_close(made(*pair), model(*pair))
    for conv in made.convs:
        assert conv.bias is not None


def test_two_norms_of_one_layer_stay():
    model = used(Twice(1, 2)).eval()
    pair = tuple(torch.randn(2, 2, 3, 4, 4))
    with pytest.warns(
        UserWarning, match=r"norms.0: not all that convs.0 made goes to it; norms.1: not all"
    ):
        made = compression.fold_batch_norms(model, pair)
    assert torch.equal(made(*pair), model(*pair))


def test_a_block_that_reuses_its_relu():
    resnet = pytest.importorskip("torchvision").models.resnet
    model = used(resnet.BasicBlock(4, 4)).double().eval()
    x = torch.randn(2, 4, 5, 5).double()
    made = compression.fold_batch_norms(model, x)
    assert norms(made) == 0
    torch.testing.assert_close(made(x), model(x))
    apart = compression.separate_activations(made, x)
    (link,) = compression.removable(apart, x)
    assert link.layers == ("conv1", "conv2"), "the other one runs behind the sum"
