"""Networks as their users write them: layers of their own, gates at zero, outputs in any container.

Each technique is right on them, leaves them out and says so, or refuses them by name.
"""

import collections
import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from structopt import compression
from structopt.compression import Grid, SkipZeros

Out = dataclasses.make_dataclass("Out", [("logits", torch.Tensor)])


class Adapted(nn.Linear):
    """Its own weight, and a product of two small ones beside it: LoRA."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs))
        self.up = nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def statistics_(model):
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


def wrapped(kind, *size):
    """A layer whose forward was replaced on the object, as libraries do that move weights."""
    layer = kind(*size)
    layer.forward = lambda x, old=layer.forward: 2 * old(x)
    return layer


CONV, IMAGE = nn.Conv2d(3, 3, 3, padding=1), torch.randn(2, 3, 8, 8)
OWN = {
    "adapter first": lambda: compression.merge_pair(Adapted(6, 4), nn.Linear(4, 3)),
    "adapter last": lambda: compression.merge_pair(nn.Linear(3, 6), Adapted(6, 4)),
    "wrapped": lambda: compression.merge_pair(wrapped(nn.Linear, 6, 4), nn.Linear(4, 3)),
    "standardised": lambda: compression.merge_pair(Standardised(3, 3, 1, bias=False), CONV),
    "branch": lambda: compression.merge_branches([CONV, Standardised(3, 3, 3, padding=1)]),
    "norm": lambda: compression.merge_branches([CONV, Activated(3)]),
    "in a sequence": lambda: compression.merge_branches([CONV, nn.Sequential(CONV, Activated(3))]),
    "sequence": lambda: compression.merge_branches([CONV, Residual(CONV, nn.BatchNorm2d(3))]),
}


@pytest.mark.parametrize("merge", OWN)
def test_a_layer_with_a_forward_of_its_own_is_not_merged_as_if_it_had_none(merge):
    with pytest.raises(ValueError, match="has a forward of its own"):
        OWN[merge]()


def test_a_subclass_that_computes_as_torch_merges():
    class Named(nn.Linear):
        pass

    first, second, x = Named(6, 4).double(), nn.Linear(4, 3).double(), torch.randn(5, 6).double()
    torch.testing.assert_close(compression.merge_pair(first, second)(x), second(first(x)))


def test_a_weight_that_a_hook_made_last_is_not_merged():
    layer = nn.Linear(6, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    with torch.no_grad():
        layer.weight_orig.mul_(2)  # as a step of training does: layer.weight is the old one
    with pytest.raises(ValueError, match=r"is what a hook made last.*prune\.remove"):
        compression.merge_pair(layer, nn.Linear(4, 3))


def test_skipping_zeros_leaves_layers_that_are_more_than_their_weight():
    tied = nn.Linear(6, 6, bias=False)
    twin = nn.Linear(6, 6, bias=False)
    twin.weight = tied.weight
    normed = parametrizations.weight_norm(nn.Linear(6, 6))
    layers = nn.ReLU(), Adapted(6, 6), wrapped(nn.Linear, 6, 6), tied, twin, normed, nn.Linear(6, 1)
    model, x = nn.Sequential(*layers), torch.randn(5, 6)
    made = compression.skip_zeros(model, [x], rounds=1, at_least=0)
    assert made.names == ("6",)
    torch.testing.assert_close(made.model(x), model(x))


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 4), (4, 1), (3, 2)])
def test_a_layer_that_skips_zeros_has_weights_of_its_own(inputs, outputs):
    layer = nn.Linear(inputs, outputs)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        SkipZeros(layer).columns.add_(1)
    assert torch.equal(layer.weight, before)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(input=self.relu(input=self.first(input=x)))


KEYWORD = {
    "skipped": lambda m, x: compression.skip_zeros(m, [x], rounds=1, at_least=0).model,
    "blended": lambda m, x: compression.blend_activations(m, ["relu"]),
    "factorised": lambda m, x: compression.factorize(m, {"first": 6, "last": 2}),
    "clipped": lambda m, x: compression.clip_activations(m, [x], Grid(8, symmetric=False)).model,
    "converted": lambda m, x: compression.IntMM().build(m, x),
}


@pytest.mark.parametrize("edit", KEYWORD)
def test_layers_called_by_keyword_still_are(edit):
    model, x = ByKeyword(), torch.randn(5, 6)
    torch.testing.assert_close(KEYWORD[edit](model, x)(x), model(x), atol=0.05, rtol=0.05)


class Skipping(nn.Module):
    """What the convolution makes is read by the norm, and once more beside it."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), way
        self.gate, self.head = nn.Parameter(torch.zeros(1)), nn.Linear(4, 2)
        if way == "head at zero":
            nn.init.zeros_(self.head.weight)

    def forward(self, x):
        y = self.conv(x)
        y = self.norm(y).relu() + y
        if self.way == "gate at zero":
            y = self.gate * y
        logits = self.head(y.mean((2, 3)))
        return Out(logits) if self.way == "dataclass" else logits


@pytest.mark.parametrize("way", ["dataclass", "head at zero", "gate at zero"])
def test_a_norm_is_not_folded_where_the_output_hides_that_it_would_be_wrong(way):
    model = statistics_(Skipping(way))
    with pytest.warns(UserWarning, match="norm: what conv makes is read elsewhere too"):
        made = compression.fold_batch_norms(model, IMAGE)
    assert isinstance(made.norm, nn.BatchNorm2d)
    assert all(map(torch.equal, made.parameters(), model.parameters()))


class Plain(nn.Module):
    """A convolution and its norm, whose output is handed on in some way."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), way

    def forward(self, x):
        return self.way(self.norm(self.conv(x)))


WAYS = {
    "masked": lambda y: y.masked_fill(torch.arange(6) > 3, -math.inf),
    "beside flags": lambda y: (y, y > 0, y.flatten(1).argmax(1)),
    "beside nothing": lambda y: {"y": y, "none": y[:0]},
    "in a dataclass": Out,
    "drawn": lambda y: y + torch.randn(y.shape).to(y),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_norm_is_folded_whatever_becomes_of_the_output(way):
    model = statistics_(Plain(WAYS[way]))
    before = torch.get_rng_state()
    made = compression.fold_batch_norms(model, collections.UserDict(x=IMAGE))
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(made.norm, nn.Identity)
    torch.testing.assert_close(made.conv(IMAGE), model.norm(model.conv(IMAGE)))


def test_a_network_that_cannot_be_checked_is_told():
    class Float(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = CONV, nn.BatchNorm2d(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.norm(self.conv(x)).mean((2, 3)).float())

    with pytest.raises(ValueError, match="Float does not run in double precision"):
        compression.fold_batch_norms(Float().eval(), IMAGE)
    with pytest.raises(ValueError, match="makes no tensor by which an edit could be checked"):
        compression.fold_batch_norms(Plain(lambda y: float(y.mean())).eval(), IMAGE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_folded_weight_is_rounded_once(dtype):
    model = statistics_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).to(dtype)
    made = compression.fold_batch_norms(model, IMAGE.to(dtype))[0]
    conv, norm = copy.deepcopy(model).double()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert torch.equal(made.weight, (conv.weight * scale[:, None, None, None]).to(dtype))
    assert torch.equal(made.bias, ((conv.bias - norm.running_mean) * scale + norm.bias).to(dtype))


def test_small_outputs_beside_biases_at_zero_show_a_wrong_edit():
    model = nn.Sequential(nn.Linear(6, 8), nn.Hardswish(), nn.Linear(8, 2)).double()
    for layer in model[0], model[2]:
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        model[2].weight.mul_(1e-12)
    made = compression.smooth_inputs(model, [torch.randn(50, 6).double()])
    assert all(map(torch.equal, made.parameters(), model.parameters()))


class WithBias(nn.Linear):
    """Hands its bias on beside its output, as layers that run on several devices do."""

    def forward(self, x):
        return x @ self.weight.T, self.bias


def test_layers_that_hand_on_more_than_a_tensor_are_seen():
    model, x = nn.Sequential(WithBias(6, 4)), torch.randn(50, 6)
    plain = nn.Sequential(nn.Linear(6, 4))
    plain.load_state_dict(model.state_dict())
    for look in (
        lambda m: compression.calibrate(m, [x], Grid(8))["0"].scale,
        lambda m: compression.gptq_weights(m, [x], Grid(4))["0.weight"].codes,
        lambda m: torch.tensor(compression.input_zeros(m, [x.relu()]).share["0"]),
    ):
        assert torch.equal(look(model), look(plain))
    model[0].forward = lambda x: "no tensor"
    with pytest.raises(ValueError, match="0 reads or makes no tensor: leave it out"):
        compression.calibrate(model, [x], Grid(8))
    model[0].forward = lambda x: x[0]
    with pytest.raises(ValueError, match="0 reads or makes no tensor: leave it out"):
        compression.calibrate(model, [([x], None)], Grid(8))


NORMED = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "its older form": nn.utils.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "any": lambda layer: nn.utils.parametrize.register_parametrization(
        layer, "weight", nn.Identity()
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the older form
@pytest.mark.parametrize("normed", NORMED)
def test_what_a_weight_is_computed_from_is_not_rounded_in_its_place(normed):
    model = nn.Sequential(nn.Linear(4, 4), NORMED[normed](nn.Linear(4, 3)))
    name = "1.weight"
    for make in (
        lambda: compression.quantize_weights(model, compression.Grid(4)),
        lambda: compression.share_weights(model, 4),
    ):
        with pytest.raises(ValueError, match=f"{name} is computed from other parameters"):
            make()
    part = next(n for n, p in model.named_parameters() if n.startswith("1.") and p.ndim > 1)
    assert set(compression.quantize_weights(model, compression.Grid(4), [part])) == {part}
