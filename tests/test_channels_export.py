"""What comes out of `take` is an ordinary module: trains, copies, exports, is saved and loaded."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from channel_networks import CASES, Fn, conv, filled
from channel_networks_further import FURTHER
from torch import nn

from structopt import checkpoint, files
from structopt.channels import channel_groups, take
from structopt.training.layout import wants_channels_last


def halved(model, example):
    return take(model, {g: range(g.size // 2) for g in channel_groups(model, example)})


def vit():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48,
        num_classes=5,
    )  # fmt: skip


MODELS = {"resnet": lambda: torchvision.models.resnet18(num_classes=5), "vit": vit}

FRESH = """
import sys, warnings, numpy, torch
sys.path.insert(0, {tests!r})
from test_channels_export import MODELS
from structopt import checkpoint, files
import onnxruntime
for name, build in MODELS.items():
    known, _ = files.load_tensors(f"{folder}/{{name}}.known")
    model = checkpoint.load(f"{folder}/{{name}}", into=build()).eval()
    x = known["x"]
    assert torch.equal(model(x), known["y"]), "another function after loading"
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1]))
    loss.backward()
    optimizer.step()
    assert not torch.equal(model.eval()(x), known["y"]), "a step that changes nothing"
    path = f"{folder}/{{name}}.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {{session.get_inputs()[0].name: x.numpy()}})[0]
    expected = model(x).detach().numpy()
    print(name, sum(p.numel() for p in model.parameters()),
          abs(found - expected).max() / abs(expected).max())
"""


@pytest.mark.slow
def test_narrowed_saved_loaded_in_a_fresh_process_trained_and_exported(tmp_path):
    wanted = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model, x = build().eval(), torch.randn(2, 3, 32, 32)
        narrow = halved(model, x)
        wanted[name] = sum(p.numel() for p in narrow.parameters())
        assert wanted[name] < 0.5 * sum(p.numel() for p in model.parameters())
        checkpoint.save(narrow, tmp_path / name)
        files.save_tensors(tmp_path / f"{name}.known", {"x": x, "y": narrow(x).detach()}, {})
    script = FRESH.format(tests=str(Path(__file__).parent), folder=tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[0] in MODELS]
    assert {name: int(size) for name, size, _ in rows} == wanted
    for _, _, error in rows:
        assert float(error) < 1e-5


EXPORTED = ("residual", "grouped 2d", "ViT", "Llama", "LSTM", "channel shuffle", "convolution 2d")


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")  # torch's own
@pytest.mark.parametrize("name", EXPORTED)
def test_what_comes_out_copies_trains_and_is_exported(name, device):
    model, x = CASES[name].model(device), CASES[name].example(device)
    narrow = halved(model, x)
    copied = copy.deepcopy(narrow)
    assert torch.equal(copied(x), narrow(x))
    assert str(copied) == str(narrow)
    exported = torch.export.export(narrow, (x,)).module()
    torch.testing.assert_close(exported(x), narrow(x), rtol=1e-10, atol=1e-12)
    optimizer = torch.optim.AdamW(narrow.train().parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = narrow(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.is_leaf for p in narrow.parameters())
    assert losses[-1] < losses[0]
    assert torch.equal(copied(x), copy.deepcopy(copied)(x))  # the copy did not move


@pytest.mark.parametrize("name", ["residual", "ViT", "LSTM", "grouped 2d", "transposed 2d", "tied"])
def test_saved_and_loaded_into_a_fresh_model(name, tmp_path, device):
    case = CASES[name]
    model, x = case.model(device), case.example(device)
    narrow = halved(model, x)
    checkpoint.save(narrow, tmp_path / "x")
    fresh = checkpoint.load(tmp_path / "x", into=case.build().double().to(device)).eval()
    assert torch.equal(fresh(x), narrow(x))
    again = channel_groups(fresh, x)  # and is analysed and narrowed once more
    assert {g.name: g.size for g in again} == {g.name: g.size for g in channel_groups(narrow, x)}


def observed(log):
    return lambda module, args, out: log.append(type(module).__name__)


def test_what_a_model_carries_survives(device):
    """Types, flags, hooks, ties, training modes of parts, notes of its own."""
    model = nn.Sequential(
        conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.Flatten(2), nn.Linear(25, 4)
    )
    model = filled(model).to(device).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model.note = {"trained": "by hand"}
    log = []
    model[0].register_forward_hook(observed(log))
    x = torch.randn(2, 3, 5, 5, device=device)
    channels = channel_groups(model, x)
    narrow = take(model, {channels["0"]: [5, 1, 2]})
    assert type(narrow) is nn.Sequential
    assert [type(m) for m in narrow.modules()] == [type(m) for m in model.modules()]
    assert [m.training for m in narrow.modules()] == [m.training for m in model.modules()]
    names, left = dict(model.named_parameters()), dict(narrow.named_parameters())
    assert list(names) == list(left)
    for name, p in left.items():
        assert (p.dtype, p.device) == (names[name].dtype, names[name].device)
        assert p.requires_grad == names[name].requires_grad
        assert type(p) is nn.Parameter
        assert p.is_leaf
    assert narrow.note == {"trained": "by hand"}
    assert narrow[1].num_batches_tracked == model[1].num_batches_tracked
    log.clear()
    narrow(x)
    assert log == ["Conv2d"]
    assert (narrow[0].out_channels, narrow[1].num_features, narrow[3].in_channels) == (3, 3, 3)


def test_a_layer_of_torchvision_says_its_new_sizes():
    model = FURTHER["deformed"].build()
    channels = channel_groups(model, torch.randn(2, 3, 6, 6))
    made = take(model, {channels["one"]: range(4), channels["deform"]: range(3)})
    assert (made.deform.in_channels, made.deform.out_channels) == (4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_floating_type_is_verified_in_double_precision(dtype, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    model = model.to(device, dtype)
    x = torch.randn(4, 3, device=device, dtype=dtype)
    narrow = halved(model, x)
    assert {p.dtype for p in narrow.parameters()} == {dtype}
    assert torch.equal(narrow[0].weight, model[0].weight[:4])  # to the bit: nothing is recomputed


def test_the_layout_in_memory_stays(device):
    model = nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 6, 3)).to(device)
    x = torch.randn(2, 3, 5, 5, device=device)
    keep = {"0": [1, 2, 5]}
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        narrow = take(model, {channel_groups(model, x)[name]: i for name, i in keep.items()})
        for layer in (narrow[0], narrow[2]):
            assert layer.weight.is_contiguous(memory_format=layout)
    deep = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 4, 3)).to(device)
    deep.to(memory_format=torch.channels_last_3d)
    (group,) = channel_groups(deep, torch.randn(1, 3, 5, 5, 5, device=device))
    narrow = take(deep, {group: range(4)})
    assert narrow[1].weight.is_contiguous(memory_format=torch.channels_last_3d)


def is_plain(model):
    plain = torch.contiguous_format
    return all(p.stride() == p.clone(memory_format=plain).stride() for p in model.parameters())


def test_what_onednn_would_write_past_its_memory_comes_out_in_plain_order(device):
    """Also for a gradient that is taken outside of `train`, which looks at this itself."""
    for before, after, spoiled in ((32, 16, False), (32, 15, True), (8, 8, True), (32, 32, False)):
        branches = {
            "a": conv(3, before, 3),
            "b": conv(before, 24, 1, stride=2),
            "c": conv(24, 4, 3),
        }
        model = Fn(lambda s, x: s.c(s.b(s.a(x)).relu()), **branches).to(device)
        model.to(memory_format=torch.channels_last)
        channels = channel_groups(model, torch.randn(2, 3, 9, 9, device=device))
        choice = {channels["a"]: range(after), channels["b"]: range(20)}
        narrow = take(model, choice)
        assert is_plain(narrow) == (spoiled and device.type == "cpu"), (before, after)
        assert not is_plain(model)
        assert wants_channels_last(narrow, device) != (spoiled and device.type == "cpu")


def test_tied_weights_stay_tied(device):
    model, x = CASES["tied"].model(device), CASES["tied"].example(device)
    narrow = halved(model, x)
    assert narrow.head.weight is narrow.embed.weight
    assert narrow.embed.embedding_dim == narrow.head.in_features == 3
    shared = nn.Linear(6, 6)
    twice = nn.Sequential(nn.Linear(3, 6), shared, nn.ReLU(), shared, nn.Linear(6, 2)).to(device)
    x = torch.randn(2, 3, device=device)
    made = halved(twice, x)
    assert made[1] is made[3]
    assert made[1].weight.shape == (3, 3)


def test_pruning_masks_stay_masks(device):
    """torch's own pruning: the mask is cut with its weight, stays binary, and still masks."""
    model, x = CASES["masks"].model(device), CASES["masks"].example(device)
    group = channel_groups(model, x)["1"]
    narrow = take(model, {group: [0, 3, 4]})
    assert torch.equal(narrow[0].weight_mask, model[0].weight_mask[[0, 3, 4]])
    assert torch.equal(narrow[3].weight_orig, model[3].weight_orig[:, [0, 3, 4]])
    wide = take(model, {group: [*range(8), 2, 2]}, preserve=True)
    assert set(wide[3].weight_mask.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(wide(x), model(x), rtol=1e-10, atol=1e-12)
    narrow(x).sum().backward()
    grad = narrow[0].weight_orig.grad
    assert not grad[narrow[0].weight_mask == 0].any()
    nn.utils.prune.remove(narrow[0], "weight")
    assert narrow[0].weight.shape == (3, 3, 3, 3)
