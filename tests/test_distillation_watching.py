"""Features are seen without leaving a trace, through compilers and wrappers."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structopt import distillation as d
from structopt import networks


def truth(net: nn.Module, inputs: Tensor) -> Tensor:
    return net.conv2(F.max_pool2d(net.conv1(inputs), 2))


def images(device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(2, 1, 28, 28).to(device)


def test_outputs_of_the_last_pass(device: torch.device) -> None:
    net = networks.StudentNet().to(device).eval()
    with d.watch(net, ["conv2", "fc"]) as found:
        for _ in range(2):
            x = images(device)
            output = net(x)
        assert set(found) == {"conv2", "fc"}
        assert torch.equal(found["fc"], output)
        torch.testing.assert_close(found["conv2"], truth(net, x))
        assert found["conv2"].requires_grad


def test_nothing_is_left(device: torch.device) -> None:
    net = networks.StudentNet().to(device)
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    watch = d.watch(net, ["conv2"])
    with watch as found:
        net(images(device))
        kept = weakref.ref(found["conv2"])
    gc.collect()
    assert kept() is None
    assert not found
    assert {name: dict(vars(module)) for name, module in net.named_modules()} == before
    with pytest.raises(RuntimeError, match="boom"), watch:
        raise RuntimeError("boom")
    assert {name: dict(vars(module)) for name, module in net.named_modules()} == before


def test_one_watch_inside_another() -> None:
    net = networks.StudentNet().eval()
    first, second = d.watch(net, ["conv2"]), d.watch(net, ["conv2"])
    for outer, inner in ((first, second), (second, first)):
        with outer as a, inner as b:
            x = images()
            net(x)
            torch.testing.assert_close(a["conv2"], truth(net, x))
            assert torch.equal(a["conv2"], b["conv2"])
        with inner as b:
            net(images())
            assert "conv2" in b
            assert not a
    with first, pytest.raises(RuntimeError, match="on already"), first:
        pass
    assert "forward" not in vars(net.conv2)


def test_a_forward_of_the_layers_own_comes_back() -> None:
    net = networks.StudentNet()
    own = net.conv2.forward
    net.conv2.forward = lambda x: own(x) * 2
    mine = net.conv2.forward
    with d.watch(net, ["conv2"]) as found:
        net(images())
        assert "conv2" in found
    assert net.conv2.forward is mine


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile's own look at a tensor
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_compiled_networks(before: bool, inside: bool, device: torch.device) -> None:
    """Compiled before it is watched or after, as a whole or one layer: nothing is missed."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = networks.StudentNet().to(device).eval()
    whole: nn.Module = net
    if inside:
        net.conv2 = torch.compile(net.conv2, backend="eager")
    else:
        whole = torch.compile(net, backend="eager")
    if before:
        whole(images(device))
    watch = d.watch(whole, ["conv2"])
    for _ in range(3):
        x = images(device)
        with watch as found:
            whole(x)
            torch.testing.assert_close(found["conv2"], truth(net, x))
        whole(x)
        assert not found
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # with and without
    torch._dynamo.reset()


def test_a_compiled_student_is_distilled(device: torch.device) -> None:
    torch._dynamo.reset()
    teacher, student = networks.TeacherNet().to(device), networks.StudentNet().to(device).eval()
    objective = d.from_features(teacher, {"conv2": "residual2"})
    batch = images(device), torch.tensor([1, 2], device=device)
    plain = objective(student, batch)
    compiled = torch.compile(student, backend="eager")
    compiled(batch[0])
    torch.testing.assert_close(objective(compiled, batch), plain)
    torch._dynamo.reset()


def test_names_are_those_inside_the_wrapper() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with d.watch(nn.DataParallel(torch.compile(net)), ["1"]) as found:
        net(torch.ones(1, 2))
        assert set(found) == {"1"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["conv22"], r"no layer 'conv22'; near names are conv2"),
        (["zzz"], r"no layer 'zzz'; near names are conv1"),
        ([""], r"no layer ''"),
    ],
)
def test_a_wrong_name_lists_near_ones(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        d.watch(networks.StudentNet(), names)


@pytest.mark.parametrize("stacked", [False, True])
def test_torchs_own_encoder_shows_its_layers_in_evaluation_mode(stacked: bool) -> None:
    """There it runs as one kernel, and a teacher always does; afterwards it may again."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    whole = nn.TransformerEncoder(layer, 1) if stacked else nn.Sequential(layer)
    name = "layers.0" if stacked else "0"
    x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    teacher = d.Teacher(whole)
    settings = {"src_key_padding_mask": mask} if stacked else {}
    with torch.no_grad(), d.watch(whole.eval(), [f"{name}.linear2", name]) as found:
        want = whole(x, **settings)
        assert found[f"{name}.linear2"].shape == (3, 5, 8)
        torch.testing.assert_close(found[name], want)
    lesson = teacher.teach(x, None, [f"{name}.linear1"])
    assert lesson.features[f"{name}.linear1"].shape == (3, 5, 16)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_layer_that_is_not_called_or_gives_no_tensor() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.lstm = nn.Linear(2, 2), nn.Linear(2, 2), nn.LSTM(2, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.lstm(self.used(inputs))[0]

    model = Odd()
    batch = torch.ones(3, 2), torch.zeros(3).long()
    for name, message in (("idle", "was not called"), ("lstm", "returns tuple, not a tensor")):
        with pytest.raises(ValueError, match=f"layer '{name}' {message}"):
            d.from_features(model, {"used": name}, d.relational_distance)(model, batch)


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    """Hints with trained adapters under DistributedDataParallel: same weights as alone."""
    sys.path.insert(0, str(Path(__file__).parent / "scripts"))
    import distil_together as script

    from structopt import files

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    subprocess.run(
        [*command, script.__file__, str(tmp_path)],
        env={**os.environ, **loopback, "CUDA_VISIBLE_DEVICES": ""},
        check=True, capture_output=True, timeout=180,
    )  # fmt: skip
    alone = script.hinted()
    for rank in (0, 1):
        found, _ = files.load_tensors(tmp_path / f"{rank}.safetensors")
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile's own look at a tensor
@pytest.mark.filterwarnings("ignore:.*reduce_op. is deprecated")  # gc looks at all modules
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_and_failed_steps_keep_nothing(compiled: bool) -> None:
    """Neither tensors, nor hooks, nor one more compilation for each step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    nets = [networks.TeacherNet(), networks.StudentNet()]
    teacher, student = (torch.compile(n, backend="eager") if compiled else n for n in nets)
    x, y = images(), torch.tensor([1, 2])
    objective = d.together(
        d.from_features(teacher, {"conv2": "residual2"}),
        d.hints(teacher, student, {"conv3": "residual3"}, x),
    )
    seen = []
    for step in range(7):
        objective(student, (x, y)).backward()
        objective.zero_grad()
        student.zero_grad()
        with pytest.raises(ValueError, match="28"):
            objective(student, (x[:, :, :9, :9], y))
        assert not any("forward" in vars(m) or m._forward_hooks for n in nets for m in n.modules())
        if step > 2:
            gc.collect()
            tensors = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
            seen.append((tensors, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    counts, graphs = zip(*seen, strict=True)
    # What other tests left may go, or come, at any time; a leak adds at each step.
    assert any(later <= earlier for earlier, later in itertools.pairwise(counts)), counts
    assert len(set(graphs)) == 1
    torch._dynamo.reset()
