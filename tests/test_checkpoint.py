"""A network of changed structure comes back into its own class, to the bit, or not at all."""

import copy
import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structopt import checkpoint, files


class Attention(nn.Module):
    """Fused queries, keys and values; sizes kept by the module's own Python."""

    def __init__(self, width, heads, head):
        super().__init__()
        self.num_heads, self.scale, self.split = heads, head**-0.5, (heads, head)
        self.qkv = nn.Linear(width, 3 * heads * head, bias=False)
        self.out = nn.Linear(heads * head, width)
        self.register_buffer("slopes", torch.arange(heads) / 7, persistent=False)
        self.offset = torch.full((heads,), 0.1)  # a tensor that is no buffer

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, *self.split)).unbind(-3)  # (B, T, heads, head)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * self.scale
        bias = (self.slopes + self.offset.to(x.device))[:, None, None]
        mixed = torch.einsum("bhts,bshd->bthd", (scores + bias * scores).softmax(-1), v)
        return self.out(mixed.reshape(*x.shape[:2], -1))


class Tied(nn.Module):
    """Reads and writes words with one table."""

    def __init__(self, width):
        super().__init__()
        self.table, self.out = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.out.weight = self.table.weight
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(width)) for _ in range(2)])

    def forward(self, x):
        words = self.table((x.flatten() * 4).abs().long() % 11)
        return self.out(words * self.scales[0] + self.scales[1])


class Recurrent(nn.Module):
    def __init__(self, width, kind):
        super().__init__()
        self.rnn = kind(3, width, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * width, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


class MultiHead(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.read = nn.Linear(3, width)
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        x = self.read(x)
        return self.attend(x, x, x, need_weights=False)[0]


def convolutions(a, b):
    return nn.Sequential(
        nn.Conv2d(3, 2 * a, 3, bias=b > 2), nn.BatchNorm2d(2 * a), nn.ReLU(),
        nn.Conv2d(2 * a, 2 * a, 3, groups=2 * a, padding=1, padding_mode="reflect"),
        nn.GroupNorm(2, 2 * a), nn.ConvTranspose2d(2 * a, b, 2, stride=2), nn.PReLU(b),
        nn.Flatten(2), nn.LayerNorm(36), nn.Conv1d(b, b, 1),
    )  # fmt: skip


FAMILIES = {
    "convolutions": (convolutions, (2, 3, 5, 5)),
    "attention": (lambda a, b: Attention(3, a, b), (2, 4, 3)),
    "multi-head": (lambda a, b: MultiHead(a * b, b), (2, 4, 3)),
    "encoder": (
        lambda a, b: nn.TransformerEncoderLayer(3, 3 if a > 2 else 1, 5 * b, batch_first=True),
        (2, 4, 3),
    ),
    "lstm": (lambda a, b: Recurrent(a, nn.LSTM), (2, 4, 3)),
    "gru": (lambda a, b: Recurrent(b, nn.GRU), (2, 4, 3)),
    "tied": (lambda a, b: Tied(a), (2, 4, 3)),
}


def filled(model):
    """Different numbers everywhere, statistics of norms included."""
    with torch.no_grad():
        for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    return model


def assert_same_network(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name
    flags = [[p.requires_grad for p in model.parameters()] for model in (a, b)]
    assert flags[0] == flags[1]
    assert str(a) == str(b)


@pytest.mark.parametrize("family", FAMILIES)
@given(sizes=st.tuples(*[st.integers(1, 4)] * 4), mode=st.booleans())
def test_a_fresh_model_takes_the_sizes_of_the_saved_one(tmp_path_factory, family, sizes, mode):
    build, shape = FAMILIES[family]
    path = tmp_path_factory.mktemp("network") / "x"
    saved, fresh = filled(build(*sizes[:2])), build(*sizes[2:]).train(mode)
    next(saved.parameters()).requires_grad_(False)
    checkpoint.save(saved, path)
    modes = [module.training for module in fresh.modules()]
    assert checkpoint.load(path, into=fresh) is fresh
    assert_same_network(saved, fresh)
    assert [module.training for module in fresh.modules()] == modes
    x = torch.randn(shape)
    assert torch.equal(saved.eval()(x), fresh.eval()(x))
    assert len(list(fresh.parameters())) == len(list(saved.parameters()))  # tied as before


def test_what_was_loaded_trains_copies_and_is_saved_again(tmp_path, device):
    saved = filled(convolutions(1, 2)).to(device)
    hooked, fresh = [], convolutions(3, 4).to(device)
    fresh[0].register_forward_hook(lambda *given: hooked.append(1))
    checkpoint.save(saved, tmp_path / "x")
    checkpoint.load(tmp_path / "x", into=fresh)
    assert {p.device.type for p in fresh.parameters()} == {device.type}
    assert all(p.is_leaf for p in fresh.parameters())
    x = torch.randn(2, 3, 5, 5, device=device)
    for model in (saved, fresh):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(x).square().mean().backward()
        optimizer.step()
    assert_same_network(saved, copy.deepcopy(fresh))
    assert hooked
    checkpoint.save(fresh, tmp_path / "y")
    assert_same_network(fresh, checkpoint.load(tmp_path / "y", into=convolutions(1, 1).to(device)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_and_tensors_without_memory(tmp_path, dtype):
    saved = filled(Tied(3)).to(dtype)
    checkpoint.save(saved, tmp_path / "x")
    with torch.device("meta"):
        fresh = Tied(5)
    checkpoint.load(tmp_path / "x", into=fresh)
    assert_same_network(saved, fresh)
    assert fresh.out.weight is fresh.table.weight
    with pytest.raises(ValueError, match="meta"):
        checkpoint.save(nn.Linear(2, 2, device="meta"), tmp_path / "y")


def test_the_file_holds_each_weight_once(tmp_path):
    model = Tied(1000)
    checkpoint.save(model, tmp_path / "x")
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size < (tmp_path / "x").stat().st_size < size + 5000


# Structure that became another


def block():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6)
    )


def folded(model):
    model.eval()
    model[0] = nn.utils.fuse_conv_bn_eval(model[0], model[1])
    model[1] = nn.Identity()


def factorised(model):
    model[4] = nn.Sequential(nn.Linear(36, 2, bias=False), nn.Linear(2, 6))


def other_units(model):
    model[2] = nn.Hardtanh(-0.5, 0.5)
    model[0] = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def threshold(model):
    model[2] = nn.Threshold(0.25, 0.0)


@pytest.mark.parametrize("change", [folded, factorised, other_units, threshold])
def test_layers_that_became_others_are_built_anew(tmp_path, change, device):
    saved = filled(block())
    change(saved)
    saved.to(device).eval()
    checkpoint.save(saved, tmp_path / "x")
    fresh = checkpoint.load(tmp_path / "x", into=block().to(device)).eval()
    assert_same_network(saved, fresh)
    x = torch.randn(2, 3, 5, 5, device=device)
    assert torch.equal(saved(x), fresh(x))
    fresh.train()(x).sum().backward()


@pytest.mark.parametrize("mode", [True, False])
def test_layers_that_are_built_run_in_the_mode_of_those_they_replace(tmp_path, mode):
    saved = filled(block())
    other_units(saved)
    checkpoint.save(saved.train(not mode), tmp_path / "x")
    fresh = block().train(mode)
    fresh[0].train(not mode)  # frozen, say
    checkpoint.load(tmp_path / "x", into=fresh)
    assert {m.training for m in fresh[0].modules()} == {not mode}
    assert {m.training for child in fresh[1:] for m in child.modules()} == {mode}


def test_sizes_that_numpy_computed_are_sizes(tmp_path):
    def network(width):
        width = np.int64(width)
        return nn.Sequential(
            nn.Conv2d(8, 8, 3), nn.Conv2d(width, width, 1, groups=width), nn.LayerNorm(width)
        )

    saved, fresh = network(4), network(8)
    saved[0] = fresh[0] = nn.LayerNorm(np.int64(4))
    checkpoint.save(saved, tmp_path / "x")
    fresh[0] = nn.Identity()  # becomes a LayerNorm again
    checkpoint.load(tmp_path / "x", into=fresh)
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(fresh(x), saved(x))


def test_a_class_that_bears_the_name_of_a_torch_layer_is_not_taken_for_it(tmp_path):
    class Linear(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    saved = nn.Sequential(Linear(2, 2))
    checkpoint.save(saved, tmp_path / "x")
    for other in (nn.Identity(), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"0 is another Linear there, (Identity|Linear) here"):
            checkpoint.load(tmp_path / "x", into=nn.Sequential(other))
    x = torch.randn(3, 2)
    own = checkpoint.load(tmp_path / "x", into=nn.Sequential(Linear(2, 2)))
    assert torch.equal(own(x), saved(x))
    checkpoint.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "x")
    assert type(checkpoint.load(tmp_path / "x", into=own)[0]) is nn.Linear


def test_a_layer_that_stands_twice_is_replaced_twice(tmp_path):
    def twice():
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, nn.ReLU(), layer)

    saved = twice()
    saved[0] = saved[2] = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))
    checkpoint.save(saved, tmp_path / "x")
    fresh = checkpoint.load(tmp_path / "x", into=twice())
    assert fresh[0] is fresh[2]
    x = torch.randn(3, 4)
    assert torch.equal(saved(x), fresh(x))


def test_a_layer_that_stands_twice_in_one_that_is_built_stands_there_twice(tmp_path):
    def network():
        return nn.Sequential(nn.Tanh(), nn.Conv1d(1, 1, 1), nn.Linear(4, 4))

    saved, unit = network(), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    saved[1] = nn.Sequential(unit, saved[0], unit, nn.Linear(4, 4), saved[0], nn.Sequential(unit))
    saved[2] = nn.Sequential(saved[0], nn.Linear(4, 4), unit)
    checkpoint.save(saved, tmp_path / "x")
    fresh = checkpoint.load(tmp_path / "x", into=network())
    assert str(fresh) == str(saved)
    assert fresh[1][0] is fresh[1][2] is fresh[1][5][0] is fresh[2][2]
    assert fresh[1][1] is fresh[1][4] is fresh[0] is fresh[2][0]
    x = torch.randn(3, 4)
    assert torch.equal(saved(x), fresh(x))


def test_a_layer_that_is_built_has_all_its_layers_whatever_stood_below_its_name(tmp_path):
    class Block(nn.Sequential):  # children 0 and 1, as those of the file
        pass

    saved, fresh = nn.Sequential(filled(block())), nn.Sequential(Block(*block()))
    checkpoint.save(saved, tmp_path / "x")
    checkpoint.load(tmp_path / "x", into=fresh)
    assert_same_network(saved, fresh)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(saved.eval()(x), fresh.eval()(x))


def test_layers_that_are_one_in_the_file_alone_are_a_mismatch(tmp_path):
    one = nn.Linear(2, 2)
    checkpoint.save(nn.Sequential(one, one), tmp_path / "x")
    with pytest.raises(ValueError, match=r"the file has no 1 \(Linear\)"):
        checkpoint.load(tmp_path / "x", into=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    checkpoint.save(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), tmp_path / "x")
    with pytest.raises(ValueError, match=r"this model has no 1 \(Linear\)"):
        checkpoint.load(tmp_path / "x", into=nn.Sequential(one, one))


SCRIPT = """
import sys, torch, torchvision
from structopt import checkpoint
model = checkpoint.load(sys.argv[1], into=torchvision.models.resnet18(num_classes=3)).eval()
torch.manual_seed(0)
print(model(torch.rand(2, 3, 32, 32)).double().sum().item())
"""


def halve(block):
    """The inner channels of a basic block."""
    keep = torch.arange(block.conv1.out_channels // 2)
    for layer, key, dim in [("conv1", "weight", 0), ("bn1", "weight", 0), ("bn1", "bias", 0),
                            ("conv2", "weight", 1)]:  # fmt: skip
        module = getattr(block, layer)
        setattr(module, key, nn.Parameter(getattr(module, key).index_select(dim, keep).detach()))
    for key in ("running_mean", "running_var"):
        setattr(block.bn1, key, getattr(block.bn1, key)[keep])
    block.conv1.out_channels = block.bn1.num_features = block.conv2.in_channels = len(keep)


@pytest.mark.slow
def test_a_narrowed_network_is_loaded_in_a_fresh_process(tmp_path):
    import torchvision

    model = torchvision.models.resnet18(num_classes=3)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for inner in stage:
            halve(inner)
    checkpoint.save(filled(model).eval(), tmp_path / "x")
    torch.manual_seed(0)
    want = model(torch.rand(2, 3, 32, 32)).double().sum().item()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "x")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert float(found) == pytest.approx(want, rel=1e-6)


# What does not fit


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


def without(name):
    model = block()
    delattr(model, name)
    return model


@pytest.mark.parametrize(
    ("saved", "fresh", "words"),
    [
        (block(), without("4"), r"this model has no 4 \(Linear\)"),
        (without("4"), block(), r"the file has no 4 \(Linear\)"),
        (Tied(3), block(), "the model is Tied there, Sequential here"),
        (nn.Sequential(Tied(3)), nn.Sequential(nn.ReLU()), "0 is Tied there, ReLU here"),
        (nn.Sequential(nn.Conv1d(3, 3, 1)), nn.Sequential(nn.Conv2d(3, 3, 1)), None),
        (nn.LSTM(2, 3), nn.LSTM(2, 3, num_layers=2), "the file has no weight_ih_l1 among its para"),
        (nn.LSTM(2, 3, bidirectional=True), nn.LSTM(2, 3), "the model has no weight_ih_l0_reverse"),
    ],
)  # fmt: skip
def test_a_mismatch_is_named_and_the_model_untouched(tmp_path, saved, fresh, words):
    fresh = copy.deepcopy(fresh)
    before = copy.deepcopy(fresh)
    checkpoint.save(saved, tmp_path / "x")
    if words is None:  # another torch layer in this place is built anew
        assert_same_network(saved, checkpoint.load(tmp_path / "x", into=fresh))
        return
    with pytest.raises(ValueError, match=rf"x does not fit this .*{words}.*fresh model of the cla"):
        checkpoint.load(tmp_path / "x", into=fresh)
    assert_same_network(before, fresh)


def test_what_needs_pickle_or_has_no_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 has an extra state"):
        checkpoint.save(nn.Sequential(Extra(1, 1)), tmp_path / "x")
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        checkpoint.save(nn.Sequential(nn.LazyLinear(2)), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_class_in_the_place_of_a_model_is_not_the_fault_of_the_file(tmp_path):
    checkpoint.save(nn.ReLU(), tmp_path / "x")
    with pytest.raises(ValueError, match=r"into=<class .*ReLU'> is no model: give a fresh one"):
        checkpoint.load(tmp_path / "x", into=nn.ReLU)


def test_another_file_is_refused(tmp_path):
    files.save_tensors(tmp_path / "x", {"weight": torch.zeros(2, 2)}, {})
    with pytest.raises(ValueError, match=r"not a network that checkpoint\.save wrote"):
        checkpoint.load(tmp_path / "x", into=nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none", into=nn.Linear(2, 2))


@given(cut=st.floats(0, 1, exclude_max=True), bit=st.integers(-1, 7))
def test_a_truncated_or_flipped_file_loads_whole_or_not_at_all(tmp_path_factory, cut, bit):
    path = tmp_path_factory.mktemp("network") / "x"
    saved, fresh = filled(block()), block()
    before = copy.deepcopy(fresh)
    checkpoint.save(saved, path)
    data = bytearray(path.read_bytes())
    place = int(cut * len(data))
    if bit < 0:
        del data[place:]
    else:
        data[place] ^= 1 << bit
    path.write_bytes(data)
    try:
        checkpoint.load(path, into=fresh)
    except ValueError:
        assert_same_network(before, fresh)
    else:
        assert_same_network(saved, fresh)


EDITS = {
    "a method hidden by a number": (
        lambda structure, tensors: structure["1"]["attributes"].update(forward=3),
        r"1\.forward is no attribute of Identity",
    ),
    "a tensor of other dimensions": (
        lambda structure, tensors: tensors.update({"4.bias": torch.zeros(6, 1)}),
        r"4\.bias has shape \(6, 1\) there, \(6,\) here",
    ),
    "integers with a gradient": (
        lambda structure, tensors: tensors.update({"4.bias": torch.zeros(6).long()}),
        r"4\.bias is torch\.int64, which has no gradient",
    ),
    "a tensor that is not there": (
        lambda structure, tensors: tensors.pop("4.bias"),
        r"describes no network: KeyError\('4\.bias'\)",
    ),
    "a layer below one that is none": (
        lambda structure, tensors: structure.update({"9.forward": structure["1"]}),
        r"this model has no 9\.forward",
    ),
    "a child of a layer that is built, named as a method": (
        lambda structure, tensors: structure.update({"1.forward": structure["1"]}),
        r"1\.forward is Identity there, nothing here",
    ),
    "a size that no tensor can have": (
        lambda structure, tensors: structure["4"]["attributes"].update(
            in_features={"Size": [2**70]}
        ),
        r"is no size of a tensor",
    ),
    "a twin named as a method": (
        lambda structure, tensors: structure.update({"1.forward": {"same": "1"}}),
        r"1\.forward is a twin there, nothing here",
    ),
    "a layer that holds itself": (
        lambda structure, tensors: structure.update({"1.a": {"same": "1"}}),
        r"1\.a is a twin there, nothing here",
    ),
    "a layer that holds the model": (
        lambda structure, tensors: structure.update({"1.a": {"same": ""}}),
        r"1\.a is a twin there, nothing here",
    ),
    "layers that hold each other": (
        lambda structure, tensors: structure.update(
            {"2": structure["1"], "1.a": {"same": "2"}, "2.a": {"same": "1"}}
        ),
        r"2\.a is a twin there, nothing here",
    ),
    "a twin of nothing": (
        lambda structure, tensors: structure.update({"1.a": {"same": "7"}}),
        r"describes no network: KeyError",
    ),
    "a child that is no name": (
        lambda structure, tensors: structure.update({"1.for ward": structure["1"]}),
        r"1\.for ward is Identity there, nothing here",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_forged_description_is_refused(tmp_path, edit):
    saved, fresh = block(), block()
    folded(saved)
    before = copy.deepcopy(fresh)
    checkpoint.save(saved, tmp_path / "x")
    tensors, notes = files.load_tensors(tmp_path / "x")
    change, words = EDITS[edit]
    change(notes["structure"], tensors)
    files.save_tensors(tmp_path / "x", tensors, notes)
    with pytest.raises(ValueError, match=words):
        checkpoint.load(tmp_path / "x", into=fresh)
    assert_same_network(before, fresh)


hostile = st.sampled_from(
    [None, True, -1, 2**70, 0.5, "", "forward", "__class__", "0.weight", [], {}, [None, None],
     {"tuple": 3}, {"list": [1], "tuple": []}, {"Size": ["x"]}, {"dict": {"a": {"evil": []}}}]
)  # fmt: skip


@given(choices=st.lists(st.integers(0, 10**6), min_size=2, max_size=8), value=hostile)
def test_a_hostile_description_changes_nothing_or_runs_no_code(tmp_path_factory, choices, value):
    """Any one place of the description is replaced, or a key renamed; the checksum is right."""
    path = tmp_path_factory.mktemp("network") / "x"
    saved, fresh = block(), block()
    folded(saved)
    before = copy.deepcopy(fresh)
    checkpoint.save(saved, path)
    tensors, notes = files.load_tensors(path)
    place = notes["structure"]
    *steps, last = choices
    for step in steps:
        items = list(place) if isinstance(place, dict) else range(len(place))
        inner = place[items[step % len(items)]] if items else None
        if not isinstance(inner, (dict, list)) or not inner:
            break
        place = inner
    key = (list(place) if isinstance(place, dict) else range(len(place)))[last % len(place)]
    if isinstance(value, str) and isinstance(place, dict) and last % 2:
        place[value] = place.pop(key)
    else:
        place[key] = value
    files.save_tensors(path, tensors, json.loads(json.dumps(notes)))
    try:
        checkpoint.load(path, into=fresh)
    except ValueError:
        assert_same_network(before, fresh)
    assert type(fresh) is nn.Sequential
    allowed = {*checkpoint.BUILDABLE.values(), nn.Sequential}
    assert {type(module) for module in fresh.modules()} <= allowed


class Holder(nn.Module):
    """Tensors where torch does not look for them, beside those that it finds."""

    def __init__(self, how):
        super().__init__()
        self.fc, one = nn.Linear(2, 2), torch.ones(2)
        self.own = torch.ones(2)  # an attribute, which is stored
        self.listed = nn.ParameterList([torch.ones(2)])
        self.named = nn.ParameterDict({"a": torch.ones(2)})
        self.rnn = nn.LSTM(2, 2)
        self.known, self.sizes = [self.fc, self.rnn], {"a": [1, 2]}
        self.held = {
            "nothing": None,
            "list": [0, one],
            "dict": {"k": ({"l": one}, one)},
            "parameter": [self.fc.weight],
            "layer": [nn.ReLU(), nn.Linear(2, 2)],
        }[how]


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("nothing", None), ("list", "[1]"), ("dict", "['k'][0]['l']"), ("parameter", "[0]"),
        ("layer", "[0]"),
    ],
)  # fmt: skip
def test_what_is_not_stored_is_named(how, named, tmp_path):
    """A tensor in a plain list or dict, at any depth; nothing that torch itself keeps in one."""
    model = nn.Sequential(nn.ReLU(), Holder(how))
    if named is None:
        checkpoint.save(model, tmp_path / "x")
        return
    with pytest.warns(UserWarning, match="and not stored") as found:
        checkpoint.save(model, tmp_path / "x")
    (warning,) = found
    assert str(warning.message).startswith(f"1.held{named}: in a plain list")
    assert warning.filename == __file__


def test_many_that_are_not_stored_are_counted(tmp_path):
    with pytest.warns(UserWarning, match=r"^0.held\[1\], 1.held\[1\], 2.held\[1\] and 2 more: in"):
        checkpoint.save(nn.Sequential(*[Holder("list") for _ in range(5)]), tmp_path / "x")


# What holds itself, or is nested deep


def nested(levels, inmost):
    for _ in range(levels):
        inmost = [inmost]
    return inmost


def in_itself():
    found = {"a": [1, 2]}
    found["again"] = {"b": (found,)}
    return found


@pytest.mark.parametrize(
    "odd", [in_itself(), nested(10**5, 0), functools.reduce(lambda x, _: [x, x], range(80), 1)],
    ids=["in itself", "deep", "endless"],
)  # fmt: skip
def test_containers_that_cannot_be_written_out_are_left_as_the_constructor_makes_them(
    tmp_path, odd
):
    """Beside them what is plain is stored, shared parts and all."""
    saved, fresh, part = nn.Linear(2, 3), nn.Linear(4, 5), [1, (2.5, None)]
    saved.odd, saved.even, fresh.odd, fresh.even = odd, [part, {"k": part}], "own", None
    checkpoint.save(saved, tmp_path / "x")
    checkpoint.load(tmp_path / "x", into=fresh)
    assert (fresh.odd, fresh.even) == ("own", [part, {"k": part}])
    assert torch.equal(fresh.weight, saved.weight)


def test_a_tensor_is_found_in_what_holds_itself(tmp_path):
    for odd, way in ((in_itself(), "odd['again']['b'][1]"), (nested(10**5, torch.ones(1)), "odd")):
        model = nn.Linear(2, 3)
        model.odd = odd
        if isinstance(odd, dict):
            odd["again"]["b"] += (torch.ones(2),)
        with pytest.warns(UserWarning, match="and not stored") as found:
            checkpoint.save(model, tmp_path / "x")
        assert str(found[0].message).startswith(way)
        assert len(str(found[0].message)) < 500


# Hooks of the model that is loaded into


def test_hooks_go_to_the_layer_that_takes_the_place_of_theirs(tmp_path):
    saved, fresh, seen = filled(block()), block(), []
    factorised(saved)
    checkpoint.save(saved.eval(), tmp_path / "x")
    layer = fresh.eval()[4]
    layer.register_forward_pre_hook(lambda module, given: seen.append("before"))
    layer.register_forward_hook(lambda module, given, named, out: 2 * out, with_kwargs=True)
    layer.register_full_backward_hook(lambda *_: seen.append("back"))
    checkpoint.load(tmp_path / "x", into=fresh)
    x = torch.randn(2, 3, 5, 5)
    out = fresh(x)
    assert torch.equal(out, 2 * saved(x))
    out.sum().backward()
    assert seen == ["before", "back"]
    assert {m.training for m in fresh.modules()} == {False}


class Own(nn.Sequential):
    """A container of the user's own class."""


def test_hooks_that_no_layer_takes_over_are_named(tmp_path):
    layer, seen = nn.Linear(2, 2), []
    for saved, lost in (
        (nn.Sequential(nn.Linear(2, 2)), "0.0, 0.1"),  # one layer for all of them
        (nn.Sequential(nn.Sequential(layer, layer)), "0.1"),  # which is 0.0 once more
    ):
        checkpoint.save(saved, tmp_path / "x")
        fresh = nn.Sequential(Own(nn.ReLU(), nn.Tanh()))
        for name in ("0.0", "0.1", "0"):
            hook = lambda module, given, out: seen.append(out.shape)  # noqa: E731
            fresh.get_submodule(name).register_forward_hook(hook)
        with pytest.warns(UserWarning, match=f"^hooks on {lost} are left out, as the") as found:
            checkpoint.load(tmp_path / "x", into=fresh)
        assert found[0].filename == __file__
        seen.clear()
        x = torch.randn(3, 2)
        assert torch.equal(fresh(x), saved(x))
        assert len(seen) == (1 if lost == "0.0, 0.1" else 3)  # 0.0 is called twice
    fresh = nn.Sequential(Own(nn.ReLU()))
    fresh[0].register_load_state_dict_post_hook(print)
    checkpoint.save(nn.Sequential(layer), tmp_path / "x")
    with pytest.warns(UserWarning, match="hooks on the state dict of 0 do not fit the Linear") as f:
        checkpoint.load(tmp_path / "x", into=fresh)
    assert f[0].filename == __file__
