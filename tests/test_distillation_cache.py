"""A teacher's outputs on disk: the same lessons, found by number, and only for the same data."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from structopt import data, descent, networks, training
from structopt import distillation as d
from structopt.data import Examples
from structopt.distillation.cache import fingerprint


@pytest.fixture
def teacher() -> nn.Module:
    return networks.TeacherNet()


def examples(device: torch.device | str = "cpu") -> Examples:
    return Examples(torch.randn(22, 1, 28, 28), torch.arange(22) % 10, tuple("abcdefghij")).to(
        device
    )


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_cache_says_what_the_teacher_says(
    on_disk: bool, teacher: nn.Module, tmp_path: Path, device: torch.device
) -> None:
    given, layers = examples(device), {"conv3": "residual3"}
    teacher.to(device)
    path = tmp_path / "cache.safetensors" if on_disk else None
    cached = d.cache_outputs(teacher, given, path, names=["residual3"], size=8)
    if on_disk:
        cached = d.cache_outputs(teacher, given, path, names=["residual3"])
    numbered = cached.number(given)
    assert numbered.targets.shape == (22, 2)
    student = networks.StudentNet().to(device).eval()
    pairs = zip(data.batches(given, 8, seed=3), data.batches(numbered, 8, seed=3), strict=True)
    for live, kept in pairs:
        for build in (d.from_logits, lambda t: d.from_features(t, layers)):
            torch.testing.assert_close(build(cached)(student, kept), build(teacher)(student, live))


def test_the_file_is_read_and_the_teacher_not_asked(
    teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, path = examples(), tmp_path / "cache.safetensors"
    want = d.cache_outputs(teacher, given, path).logits

    def refuse(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(networks.TeacherNet, "forward", refuse)
    assert torch.equal(d.cache_outputs(teacher, given, path).logits, want)
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]
    for wrapped in (nn.DataParallel(teacher), torch.compile(teacher, backend="eager")):
        assert torch.equal(d.cache_outputs(wrapped, given, path).logits, want)


def test_training_from_a_cache_is_training_from_the_teacher(
    teacher: nn.Module, device: torch.device
) -> None:
    given = examples(device)
    teacher.to(device)
    cached = d.cache_outputs(teacher, given)
    found = []
    for source, batches in ((teacher, given), (cached, cached.number(given))):
        torch.manual_seed(0)
        student = networks.StudentNet()
        training.train(
            student, data.batches(batches, 8), d.from_logits(source, d.decoupled),
            torch.optim.SGD(student.parameters(), lr=0.05), epochs=2, device=device, autocast=None,
        )  # fmt: skip
        found.append(student.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4)


def test_outputs_follow_the_batch_to_its_device(teacher: nn.Module, device: torch.device) -> None:
    given = examples()
    cached = d.cache_outputs(teacher, given)
    for x, y in data.batches(cached.number(given), 8, device=device):
        assert cached.teach(x, y).logits.device.type == device.type


def test_a_cache_of_another_order_is_refused(teacher: nn.Module, tmp_path: Path) -> None:
    given, path = examples(), tmp_path / "cache.safetensors"
    cached = d.cache_outputs(teacher, given, path)
    order = torch.randperm(22)
    for other in (given[order], given[:20], Examples(given.inputs * 2, given.targets)):
        with pytest.raises(ValueError, match="other data, or from another order"):
            cached.number(other)
        with pytest.raises(ValueError, match=r"cache.safetensors was made from other data"):
            d.cache_outputs(teacher, other, path)


def test_a_cache_of_another_teacher_is_refused(teacher: nn.Module, tmp_path: Path) -> None:
    given, path = examples(), tmp_path / "cache.safetensors"
    d.cache_outputs(teacher, given, path)
    later = copy.deepcopy(teacher)
    with torch.no_grad():
        later.fc.bias[3] += 1e-3
    with pytest.raises(ValueError, match="another teacher, or before it was trained"):
        d.cache_outputs(later, given, path)
    with pytest.raises(ValueError, match="lacks the features of conv3"):
        d.cache_outputs(teacher, given, path, names=["conv3"])
    others = (d.Teacher(teacher, autocast=torch.bfloat16), [teacher, later], nn.Sequential(teacher))
    for other in others:
        with pytest.raises(ValueError, match="another teacher"):
            d.cache_outputs(other, given, path)
    smooth = copy.deepcopy(teacher)  # the same weights, and another network
    smooth.conv1[-1] = nn.Tanh()
    with pytest.raises(ValueError, match="another teacher"):
        d.cache_outputs(smooth, given, path)
    assert fingerprint(given.inputs) != fingerprint(given.inputs.flatten(1))  # the same bytes


SETTINGS = {
    "a slope": (nn.LeakyReLU(0.1), nn.LeakyReLU(0.9)),
    "a stride": (nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, stride=2)),
    "the ε of a norm": (nn.GroupNorm(1, 1), nn.GroupNorm(1, 1, eps=0.5)),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_a_cache_of_other_settings_of_a_layer_is_refused(what: str, tmp_path: Path) -> None:
    """They change what a teacher says, and are nothing that its weights show."""
    given, path = examples(), tmp_path / "cache.safetensors"
    one, other = (nn.Sequential(layer, nn.Flatten()) for layer in SETTINGS[what])
    other.load_state_dict(one.state_dict())
    d.cache_outputs(one, given, path)
    with pytest.raises(ValueError, match="another teacher"):
        d.cache_outputs(other, given, path)


class Told(nn.Module):
    """Its text names a function by the place where that lies, other in each process."""

    def __init__(self) -> None:
        super().__init__()
        self.function = lambda x: x.flatten(1)

    def extra_repr(self) -> str:
        return f"function={self.function}"

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.function(x)
        return made


def test_the_place_of_a_function_makes_no_other_teacher(tmp_path: Path) -> None:
    given, path, pair = examples(), tmp_path / "cache.safetensors", (Told(), Told())
    assert str(pair[0]) != str(pair[1])
    d.cache_outputs(pair[0], given, path)
    d.cache_outputs(pair[1], given, path)


def test_what_is_no_cache_is_refused(teacher: nn.Module, tmp_path: Path) -> None:
    from structopt import files

    given, path = examples(), tmp_path / "other.safetensors"
    for name, notes in (("logits", {}), ("others", {"kind": "structopt.distillation 1"})):
        files.save_tensors(path, {name: torch.ones(22, 10)}, notes)
        with pytest.raises(ValueError, match="holds no outputs of a teacher"):
            d.cache_outputs(teacher, given, path)
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match="truncated, corrupt"):
        d.cache_outputs(teacher, given, path)
    cached = d.cache_outputs(teacher, given)
    student = networks.StudentNet()
    with pytest.raises(ValueError, match=r"batches of cached.number\(examples\)"):
        d.from_logits(cached)(student, (given.inputs, given.targets))
    numbered = cached.number(given)
    for targets in (given.targets[:, None], torch.rand(22, 2)):  # soft targets of two classes
        with pytest.raises(ValueError, match=r"batches of cached.number\(examples\)"):
            cached.teach(given.inputs, targets)
    with pytest.raises(ValueError, match=r"number 21 is beyond the 5 examples of this cache"):
        d.cache_outputs(teacher, given[:5]).teach(given.inputs, numbered.targets)
    with pytest.raises(ValueError, match=r"no features of 'fc' \(it has: none\)"):
        d.from_features(cached, {"fc": "fc"})(student, (numbered.inputs, numbered.targets))
    for other in (numbered, Examples(given.inputs, torch.rand(22))):
        with pytest.raises(ValueError, match="not one whole number for each example"):
            cached.number(other)


def test_a_file_of_another_size_is_refused(teacher: nn.Module, tmp_path: Path) -> None:
    from structopt import files

    given, path = examples(), tmp_path / "cache.safetensors"
    d.cache_outputs(teacher, given, path, names=["fc"])
    tensors, notes = files.load_tensors(path)
    z = tensors["logits"]
    for name in tensors:
        for wrong in (z[:5], z[:, 0], z.long()):
            files.save_tensors(path, {**tensors, name: wrong}, notes)
            with pytest.raises(ValueError, match="does not hold outputs of 22 examples"):
                d.cache_outputs(teacher, given, path, names=["fc"])


def test_any_flipped_or_missing_byte_is_noticed(teacher: nn.Module, tmp_path: Path) -> None:
    given, path = examples(), tmp_path / "cache.safetensors"
    d.cache_outputs(teacher, given, path)
    whole = path.read_bytes()
    for at in (8, 60, len(whole) // 2, len(whole) - 1):
        for changed in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            path.write_bytes(changed)
            with pytest.raises(ValueError, match="truncated, corrupt"):
                d.cache_outputs(teacher, given, path)


def test_a_layer_named_twice_is_kept_once(teacher: nn.Module) -> None:
    given = examples()
    cached = d.cache_outputs(teacher, given, names=["fc", "fc"], size=8)
    torch.testing.assert_close(cached.features["fc"], cached.logits)


def test_a_moving_teacher_that_moved_is_another(teacher: nn.Module, tmp_path: Path) -> None:
    given, path, moving = examples(), tmp_path / "cache.safetensors", d.MovingTeacher(teacher)
    d.cache_outputs(moving, given, path)
    with torch.no_grad():
        moving.model.fc.bias += 1
    with pytest.raises(ValueError, match="another teacher, or before it was trained"):
        d.cache_outputs(moving, given, path)


def test_what_cannot_be_cached_is_named(teacher: nn.Module, tmp_path: Path) -> None:
    given = examples()
    with pytest.raises(ValueError, match=r"data.Examples, not tuple"):
        d.cache_outputs(teacher, (given.inputs, given.targets))
    for size in (0, -1):
        with pytest.raises(ValueError, match=rf"at least 1: {size}"):
            d.cache_outputs(teacher, given, size=size)
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        d.cache_outputs(teacher, given, tmp_path)

    class Own:
        def teach(self, inputs: Tensor, targets: object, names: object = ()) -> d.Lesson:
            return d.Lesson(torch.ones(len(inputs), 2), {}, targets)

    assert d.cache_outputs(Own(), given).logits.shape == (22, 2)
    with pytest.raises(ValueError, match="nothing tells the outputs of this Own"):
        d.cache_outputs(Own(), given, tmp_path / "own.safetensors")


def test_hints_from_cached_features(teacher: nn.Module, device: torch.device) -> None:
    given = examples(device)
    cached = d.cache_outputs(teacher.to(device), given, names=["residual3"])
    student = networks.StudentNet().to(device)
    objective = d.hints(cached, student, {"conv3": "residual3"}, given.inputs[:4])
    optimizer = descent.fused_adamw(nn.ModuleList([student, objective]), 0.01)
    history = training.train(
        student, data.batches(cached.number(given), 8), objective, optimizer, epochs=3,
        device=device,
    )  # fmt: skip
    assert history.losses[-1] < history.losses[0]
