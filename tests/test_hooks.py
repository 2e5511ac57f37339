"""A user's hooks on layers that an edit replaces: they go along, or are named."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from structopt import compression, pruning, slicing
from structopt.compression import Grid, IntMM
from structopt.networks import ResNet20, TinyTransformer
from structopt.slicing import Averaged, Branches, Mixed, Shuffled, Slice
from structopt.training.hooked import in_place_of


def perceptron():
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, batch_first=True)


def residual():
    return ResNet20(width=4)


def transformer():
    return TinyTransformer(dim=8)


def grouped(exchange):
    return lambda m, x: slicing.group_layers(m, x, 2, exchange=exchange, layers=["2"])


def skipped(model, x):
    return slicing.Slimmable(model, x, [Slice(1, skip=["stage1.1"])]).extract(
        Slice(1, skip=["stage1.1"])
    )


ROWS, WORDS, IMAGES = (20, 4), (3, 5, 8), (2, 1, 28, 28)
# edit -> (model, inputs, layer, what is done); the same of each layer, of other numbers, or both
SAME = {
    "factors": (perceptron, ROWS, "2", lambda m, x: compression.factorize(m, {"2": 8})),
    "blend": (perceptron, ROWS, "1", lambda m, x: compression.blend_activations(m, ["1"])),
    "skip zeros": (
        perceptron, ROWS, "2",
        lambda m, x: compression.skip_zeros(m, [x], rounds=1, at_least=0).model,
    ),
    "attention": (encoder, WORDS, "self_attn", lambda m, x: slicing.free_attention(m)),
}  # fmt: skip
CLOSE = {
    "branches": (perceptron, ROWS, "2", grouped(Branches())),
    "shuffled": (perceptron, ROWS, "2", grouped(Shuffled())),
    "mixed": (perceptron, ROWS, "2", grouped(Mixed(1))),
    "averaged": (perceptron, ROWS, "2", grouped(Averaged())),
    "int8": (perceptron, ROWS, "2", lambda m, x: IntMM().build(m, x).inner),
}
OTHER = {
    "clipped": (
        perceptron, ROWS, "1",
        lambda m, x: compression.clip_activations(m, [x], Grid(2, symmetric=False), ["1"]).model,
    ),
    "threshold": (
        perceptron, ROWS, "1",
        lambda m, x: compression.threshold_activations(m, [x], 0.5, ["1"]).model,
    ),
    "turned": (
        transformer, IMAGES, "layers.0.norm1", lambda m, x: slicing.rotate(m, x, [x]).model
    ),
    "removed": (
        residual, IMAGES, "stage1.1", lambda m, x: pruning.remove_blocks(m, x, ["stage1.1"])
    ),
    "skipped": (residual, IMAGES, "stage1.1", skipped),
}  # fmt: skip
ALL = SAME | CLOSE | OTHER


def given(case, device):
    make, shape, name, edit = ALL[case]
    return make().eval().to(device), torch.rand(shape, device=device), name, edit


@pytest.mark.parametrize("case", ALL)
def test_a_hook_sees_the_layer_that_takes_its_place(case, device):
    model, x, name, edit = given(case, device)
    layer, seen = model.get_submodule(name), []

    def before(module, args):
        seen.append(("before", type(module), args[0].detach()))

    def after(module, args, named, out):
        out = out[0] if isinstance(out, tuple) else out
        seen.append(("after", type(module), out.detach()))

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after, with_kwargs=True, always_call=True)
    made = edit(model, x)
    runs = []
    for one in model, made:
        seen.clear()
        with torch.no_grad():
            one(x)
        assert [kind for kind, *_ in seen] == ["before", "after"]
        assert {kind for _, kind, _ in seen} == {type(one.get_submodule(name))}
        runs.append([value for *_, value in seen])
    for mine, its in zip(*runs, strict=True):
        assert mine.shape == its.shape
        if case in SAME:
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    assert not [type(m) for m in made.modules() if m.training]


@pytest.mark.parametrize("case", SAME | CLOSE)
def test_a_hook_changes_what_it_would_change_if_set_later(case, device):
    model, x, name, edit = given(case, device)
    plain = edit(model, x)

    def halve(module, args):
        return (args[0] / 2, *args[1:])

    def double(module, args, out):
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    for one in model, plain:
        one.get_submodule(name).register_forward_pre_hook(halve)
        one.get_submodule(name).register_forward_hook(double)
    made = edit(model, x)
    with torch.no_grad():
        found, expected = made(x), plain(x)
    if case != "skip zeros":  # kernels add up in another order where zeros are left out
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["factors", "blend", "branches", "attention", "turned"])
def test_hooks_of_the_way_back_go_along(case, device):
    model, x, name, edit = given(case, device)
    layer, seen = model.get_submodule(name), []
    layer.register_full_backward_pre_hook(lambda module, out: seen.append(out[0].shape))
    layer.register_full_backward_hook(lambda module, into, out: seen.append(into[0].shape))
    made = edit(model, x)
    runs = []
    for one in model, made:
        seen.clear()
        one(x.clone().requires_grad_()).sum().backward()
        runs.append(list(seen))
    assert runs[0] == runs[1]
    assert len(runs[0]) == 2


@pytest.mark.parametrize("case", ["factors", "skip zeros", "attention", "branches", "turned"])
@pytest.mark.parametrize("frozen", ["all", "none", "weights", "biases"])
def test_what_was_frozen_stays_so(case, frozen, device):
    model, x, name, edit = given(case, device)
    for key, parameter in model.named_parameters():
        bias = key.endswith("bias")
        parameter.requires_grad_(frozen == "none" or frozen == ("weights" if bias else "biases"))
    made = edit(model, x)
    for key, parameter in made.get_submodule(name).named_parameters():
        bias = key.endswith("bias")
        expected = frozen == "none" or frozen == ("weights" if bias else "biases")
        assert parameter.requires_grad == expected, key


def conv_and_norm():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    model[1].running_mean.normal_()
    return model.eval()


def test_a_fold_keeps_the_hooks_on_its_ends(device):
    """On what the layer reads and on what the norm makes; those in between leave it undone."""
    model, x, seen = conv_and_norm().to(device), torch.randn(2, 2, 4, 4, device=device), []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model[1].register_forward_hook(lambda module, args, out: seen.append(out))
    made = compression.fold_batch_norms(model, x)
    assert isinstance(made[1], nn.Identity)
    runs = []
    for one in model, made:
        seen.clear()
        with torch.no_grad():
            one(x)
        runs.append(list(seen))
    assert torch.equal(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[0][1], runs[1][1])


def look(*_):
    return None


BETWEEN = {
    "after the layer": lambda m: m[0].register_forward_hook(look),
    "before the norm": lambda m: m[1].register_forward_pre_hook(look),
    "gradients of the layer": lambda m: m[0].register_full_backward_hook(look),
    "gradients of the norm": lambda m: m[1].register_full_backward_pre_hook(look),
}


@pytest.mark.parametrize("where", BETWEEN)
def test_hooks_between_two_layers_keep_them_apart(where):
    model, x = conv_and_norm(), torch.randn(2, 2, 4, 4)
    BETWEEN[where](model)
    name = "0" if "layer" in where else "1"
    with pytest.warns(UserWarning, match=f"^batch norms that stay: 1: hooks on {name} look at"):
        made = compression.fold_batch_norms(model, x)
    assert torch.equal(made(x), model(x))
    assert isinstance(made[1], nn.BatchNorm2d)
    pair = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2))
    BETWEEN[where](pair)
    assert str(compression.merge_layers(pair, torch.zeros(1, 4))) == str(pair)
    with pytest.raises(ValueError, match=r"^Linear\(.* has hooks, which one layer cannot call"):
        compression.merge_pair(*pair)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Sequential(nn.Conv2d(2, 3, 1)), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.inner(x))


def test_a_hook_on_a_holder_of_the_layer_is_seen_too():
    model, x = Block().eval(), torch.randn(2, 2, 4, 4)
    model.register_forward_hook(look)  # sees what the norm makes: nothing between
    assert isinstance(compression.fold_batch_norms(model, x).norm, nn.Identity)
    model.inner.register_forward_hook(look)
    with pytest.warns(UserWarning, match="norm: hooks on inner look at what it reads"):
        compression.fold_batch_norms(model, x)


def test_an_activation_with_hooks_is_not_merged_away():
    model, x = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)), torch.zeros(1, 4)
    links = compression.removable(model, x)
    assert [link.activations for link in links] == [("1",)]
    model[1].register_forward_hook(look)
    assert compression.removable(model, x) == []
    with pytest.raises(ValueError, match=r"^1 has hooks, which would see nothing"):
        compression.merge_links(model, x, links)


def test_branches_with_hooks_are_not_merged():
    inside = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    inside[1].register_forward_hook(look)
    with pytest.raises(ValueError, match=r"^Sequential\((.|\n)* has hooks"):
        compression.merge_branches([nn.Conv2d(2, 2, 1), inside])


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)])
def test_a_merged_layer_is_trained_where_one_of_them_is(frozen):
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    branches = [nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)]
    for place in frozen:
        layers[place].requires_grad_(False)
        branches[place].requires_grad_(False)
    for made in compression.merge_pair(*layers), compression.merge_branches(branches):
        assert {p.requires_grad for p in made.parameters()} == {len(frozen) < 2}


def test_hooks_that_compute_a_weight_stay_with_it():
    """They are of the layer that goes: another has another weight."""
    x = torch.rand(3, 4)
    model = perceptron()
    prune.random_unstructured(model[2], "weight", 0.5)
    with pytest.raises(ValueError, match=r"a hook computes the weight of 2: prune\.remove"):
        slicing.group_layers(model, x, 2, layers=["2"])
    attention = encoder()
    for layer, key in (attention.self_attn, "in_proj_weight"), (
        attention.self_attn.out_proj, "weight",
    ):  # fmt: skip
        pruned = copy.deepcopy(attention)
        prune.random_unstructured(
            pruned.self_attn if key == "in_proj_weight" else pruned.self_attn.out_proj, key, 0.5
        )
        with pytest.raises(ValueError, match="a hook computes the weight of self_attn: torch"):
            slicing.free_attention(pruned)
        assert layer._parameters[key] is not None
    made = in_place_of(model[2], nn.Linear(8, 8), "2")
    assert not made._forward_pre_hooks


class Whole(nn.Module):
    """A block that torch.fx opens, with a norm that does not follow the mode of the model."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval())
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.block(x).relu())


@pytest.mark.parametrize("hooks", ["block.0", "block", ""])
def test_hooks_on_what_a_tracer_opens_are_named(hooks):
    """What they make of tensors is traced; those that only look look no more."""
    model, x, seen = Whole(), torch.randn(5, 4), []
    layer = model.get_submodule(hooks)
    layer.register_forward_hook(lambda module, args, out: (seen.append(0), out * 2)[1])
    makers = {
        "the copy": lambda: compression.separate_activations(model, x),
        "the stages": lambda: slicing.split_stages(model, x, ["block"]),
    }
    for what, make in makers.items():
        expected = model(x)
        if hooks == "":  # no tracer sees them
            with pytest.raises(ValueError, match=r"Whole do not give what|computes something"):
                make()
            continue
        if hooks == "block":
            with pytest.warns(UserWarning, match=f"^hooks on block are not called.* into {what}"):
                made = make()
        else:
            made = make()
        seen.clear()
        assert torch.equal(made(x), expected)
        assert len(seen) == (0 if hooks == "block" else 1)
    layer._forward_hooks.clear()
    layer.register_forward_hook(look)
    if hooks == "":
        for what, make in makers.items():
            with pytest.warns(UserWarning, match=f"^hooks on the model are not .* into {what}"):
                make()


@pytest.mark.parametrize("training", [False, True])
def test_separated_activations_leave_every_mode(training):
    model = Whole()
    model.training = training
    made = compression.separate_activations(model, torch.randn(5, 4))
    expected = {name: module.training for name, module in model.named_modules()}
    found = {name: module.training for name, module in made.named_modules()}
    assert found.items() >= expected.items()
    assert {found[name] for name in found.keys() - expected.keys()} == {training}


def test_hooks_of_the_state_dict_are_named():
    model = perceptron()
    model[2].register_state_dict_post_hook(look)
    with pytest.warns(UserWarning, match="^hooks on the state dict of 2 do not fit the Sequential"):
        compression.factorize(model, {"2": 8})
