"""Sources of lessons as people write them, and what they and their networks look like after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structopt import distillation as d
from structopt import losses
from structopt.data import Examples


class Mixture(nn.Module):
    """A source that is a module: its networks are weighed, and called by nobody but itself."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.shares = nn.Parameter(torch.tensor([0.25, 0.75]))

    def teach(self, inputs: Tensor, targets: Any, names: Sequence[str] = ()) -> d.Lesson:
        said = sum(w * net(inputs) for w, net in zip(self.shares, self.networks, strict=True))
        return d.Lesson(said, dict.fromkeys(names, said), targets)


class Named(nn.Linear):
    """A network that has a method of this name for a purpose of its own."""

    def teach(self, pupil: str) -> str:
        return f"{pupil} was taught"


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4), torch.arange(6) % 3


def test_a_source_that_is_a_module_is_asked_and_not_called() -> None:
    source, student, (x, y) = Mixture(), nn.Sequential(nn.Linear(4, 3)), batch()
    said = source.teach(x, y).logits
    goals = {
        d.soft_targets: d.from_logits(source, weight=0.5),
        d.hint: d.from_features(source, {"0": "any"}, d.hint, weight=0.5),
    }
    for loss, goal in goals.items():
        want = losses.cross_entropy(student(x), y) + 0.5 * loss(student(x), said.detach())
        got = goal(student, (x, y))
        torch.testing.assert_close(got, want)
        got.backward()
        assert all(p.grad is None for p in source.parameters()), "a lesson has no gradient"
        assert not list(goal.parameters()), "no part of the objective: neither trained nor saved"
        assert not goal.state_dict()
        assert goal.teacher is source
        other = copy.deepcopy(goal)
        assert other.teacher is not source
        torch.testing.assert_close(other(student, (x, y)), want)
    pair = d.together(*goals.values())
    torch.testing.assert_close(
        pair(student, (x, y)),
        losses.cross_entropy(student(x), y)
        + 0.5 * (d.soft_targets(student(x), said) + d.hint(student(x), said)),
    )


def test_a_source_may_have_features_alone() -> None:
    class Kept:
        def teach(self, inputs: Tensor, targets: Any, names: Sequence[str] = ()) -> d.Lesson:
            return d.Lesson(None, dict.fromkeys(names, torch.ones(6, 3)), targets)  # type: ignore

    student, (x, y) = nn.Sequential(nn.Linear(4, 3)), batch()
    got = d.from_features(Kept(), {"0": "any"}, d.hint, label_weight=0)(student, (x, y))
    torch.testing.assert_close(got, d.hint(student(x), torch.ones(6, 3)))


def test_a_network_with_a_method_of_that_name_is_a_network() -> None:
    teacher, student, (x, y) = Named(4, 3), nn.Linear(4, 3), batch()
    want = losses.cross_entropy(student(x), y) + d.soft_targets(student(x), teacher(x))
    torch.testing.assert_close(d.from_logits(teacher)(student, (x, y)), want)


def test_what_is_no_network_is_not_taken_for_one() -> None:
    with pytest.raises(ValueError, match="several teachers are networks, and Mixture is a source"):
        d.from_logits([nn.Linear(4, 3), Mixture()])
    with pytest.raises(ValueError, match=r"one nn.Module, not Mixture: name the network itself"):
        d.diagnose(Mixture(), [batch()], [batch()])
    with pytest.raises(ValueError, match="a teacher is a module, several, or cached outputs"):
        d.from_logits(d.Cached)  # the class


class Standardising(nn.Module):
    """A network that begins in place, as hand-written ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(inputs.sub_(1.0).mul_(3.0))


@pytest.mark.parametrize("inference", [False, True])
def test_a_teacher_leaves_the_inputs_to_its_student(inference: bool) -> None:
    """Also a second one of several, and a cache those of its owner."""
    teachers, student, (x, y) = [nn.Linear(4, 3), Standardising()], nn.Linear(4, 3), batch()
    before = x.clone()
    with torch.no_grad():
        said = [teachers[0](x), teachers[1](x.clone())]
    for given in (teachers[1], teachers, teachers[::-1]):
        asked, many = d.Teacher(*(given if isinstance(given, list) else [given])), None
        many = torch.stack(said).mean(0) if isinstance(given, list) else said[1]
        for _ in range(3):  # they are looked at when they are first asked
            with torch.inference_mode(inference):
                torch.testing.assert_close(asked.teach(x, y).logits, many)
            assert torch.equal(x, before)
        want = losses.cross_entropy(student(x), y) + d.soft_targets(student(x), many)
        torch.testing.assert_close(d.from_logits(given)(student, (x, y)), want)
    d.cache_outputs(teachers, Examples(x, y))
    assert torch.equal(x, before)
    copied = copy.deepcopy(asked)
    assert copied.gentle <= set(copied.models)
    with pytest.raises(ValueError, match="a student changes its inputs in place"):
        d.mutual()(nn.ModuleList(teachers), (x, y))


def test_several_teachers_may_come_as_torch_lists_them() -> None:
    models, student, (x, y) = [nn.Linear(4, 3) for _ in range(2)], nn.Linear(4, 3), batch()
    want = d.from_logits(models)(student, (x, y))
    torch.testing.assert_close(d.from_logits(nn.ModuleList(models))(student, (x, y)), want)


def test_what_a_layer_gave_is_not_what_was_made_of_it_in_place() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), batch()[0]
    plain = copy.deepcopy(model)
    plain[1].inplace = False
    with d.watch(model, ["0", "1"]) as found, d.watch(plain, ["1"]) as want:
        model(x), plain(x)
        assert torch.equal(found["1"], want["1"])
        with pytest.raises(ValueError, match=r"what the layer '0' gave was changed in place"):
            found["0"]
    student = nn.Sequential(nn.Linear(4, 8))
    for teacher, refused in ((model, True), (plain, False)):
        goal = d.from_features(teacher, {"0": "0"}, d.hint)
        if refused:
            with pytest.raises(ValueError, match=r"name the layer that does it, or set inplace"):
                goal(student, batch())
        else:
            assert goal(student, batch()).isfinite()


FEATURES = [
    d.attention_transfer, d.similarity_preserving, d.relational_distance, d.relational_angle,
    lambda s, t: d.contrastive(s.flatten(1), t.flatten(1), torch.arange(len(s))),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FEATURES)))
def test_empty_and_broken_features_are_named(number: int) -> None:
    """Else their loss is NaN, and nobody knows of what."""
    loss, maps = FEATURES[number], torch.rand(4, 3, 2, 2)
    assert loss(maps, maps.flip(0)).isfinite()
    with pytest.raises(ValueError, match=r"are empty: leave out batches of no example"):
        loss(maps[:0], maps[:0])
    broken = maps.clone()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="the prediction holds 1 NaN of 48 numbers"):
        loss(broken, maps)
    with pytest.raises(FloatingPointError, match="the target holds 1 NaN of 48 numbers"):
        loss(maps, broken)


LOGITS = [d.soft_targets, d.standardised_logits, d.correlations]


def test_logits_that_say_nothing_are_named() -> None:
    one, none, x = torch.randn(4, 1), torch.zeros(0, 3), torch.randn(4, 3)
    for loss in LOGITS:
        with pytest.raises(ValueError, match=r"logits \(4, 1\) have one class, of which all are"):
            loss(one, one)
    for loss in (*LOGITS, d.logit_mse, lambda s, t: d.decoupled(s, t, torch.zeros(0).long())):
        with pytest.raises(ValueError, match="are empty: leave out batches of no example"):
            loss(none, none)
    assert d.logit_mse(one, one + 2) == 4
    with pytest.raises(ValueError, match="a setting, such as a temperature, is out of all"):
        d.soft_targets(x, x.flip(0), temperature=1e30)


def test_what_is_no_weight_and_no_loss_is_named() -> None:
    teacher, student, given = nn.Linear(4, 3), nn.Linear(4, 3), batch()
    for wrong in ("1", None, float("inf"), float("nan"), -1):
        for make in (
            lambda w: d.from_logits(teacher, weight=w),
            lambda w: d.from_logits(teacher, label_weight=w),
            lambda w: d.mutual(weight=w),
            lambda w: d.deep_supervision(nn.Sequential(student), ["0"], given[0], weight=w),
            lambda w: d.deep_supervision(nn.Sequential(student), ["0"], given[0], share=w),
        ):
            with pytest.raises(ValueError, match=rf"at least 0.*{wrong!r}"):
                make(wrong)
    for wrong in ("soft_targets", None):
        with pytest.raises(ValueError, match=rf"a loss is a function .*, not {wrong!r}"):
            d.from_logits(teacher, wrong)
    for wrong, words in (
        (lambda s, t: s - t, r"<lambda> returned float32 \(6, 3\), and a loss is a scalar"),
        (lambda s, t: 1.0, "<lambda> returned float, and a loss is a scalar"),
    ):
        with pytest.raises(ValueError, match=words):
            d.from_logits(teacher, wrong)(student, given)
        with pytest.raises(ValueError, match="the loss of the labels returned"):
            d.from_logits(teacher, task=wrong)(student, (given[0], student(given[0])))
    for wrong in ([0, 1, 2, 0, 1, 2], None):
        with pytest.raises(ValueError, match=f"the target is of {type(wrong).__name__}, no tensor"):
            d.from_logits(teacher)(student, (given[0], wrong))
    with pytest.raises(ValueError, match="the prediction is of dict, no tensor"):
        losses.cross_entropy({"logits": given[0]}, given[1])


def sentences() -> list[tuple[str, Callable[[], object]]]:
    net, (x, y) = nn.Sequential(nn.Linear(4, 3)), batch()
    dreamer = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3))
    dream = partial(d.dream, dreamer, torch.zeros(3, 1, 4, 4), y[:3])
    maps = torch.rand(2, 3, 4, 4)
    return [
        (r"names is a list of layers: \['conv1'\]", lambda: d.watch(net, "conv1")),
        (r"names is a list of layers: \['0'\]", lambda: d.deep_supervision(net, "0", x)),
        (r"names is a list of layers: \['0'\]",
         lambda: d.cache_outputs(net, Examples(x, y), names="0")),
        *((rf"size counts .* at least 1: {size!r}",
           partial(d.cache_outputs, net, Examples(x, y), size=size)) for size in ("8", 2.5, 0)),
        ("follows a student, not str", lambda: d.MovingTeacher("student")),
        (r"at least 1: 2\.5", lambda: d.born_again(lambda: net, print, generations=2.5)),
        ("at least 1, not '2'", lambda: d.attention_transfer(maps, maps, power="2")),
        *((rf"dream needs steps.* not .*{wrong!r}", partial(dream, **{name: wrong}))
          for name, wrong in (("steps", "3"), ("steps", 1.5), ("lr", "1"), ("weights", 1.0),
                              ("weights", (1.0,)), ("weights", (1.0, "2")))),
        ("numbers with a gradient, not torch.int64",
         lambda: d.dream(dreamer, torch.zeros(3, 1, 4, 4).long(), y[:3])),
        ("a whole number: '9'", lambda: d.tune(lambda *_: net, [(x, y)], budget="9")),
        ("temperatures above 0",
         lambda: d.tune(lambda *_: net, [(x, y)], budget=9, temperatures=("1",))),
        ("diagnose needs class indices", lambda: d.diagnose(net, [(x, [0] * 6)], [(x, y)])),
        ("such as torch.bfloat16, not 'bf16'", lambda: d.Teacher(net, autocast="bf16")),
        ("above 0, not '1'", lambda: losses.huber(x, x, delta="1")),
        ("from 0 to 1, not 'a'", lambda: losses.cross_entropy(x, y, label_smoothing="a")),
        *((rf"at least 0, not {gamma!r}", partial(losses.focal, x, y, gamma=gamma))
          for gamma in ("a", float("inf"))),
        (r"weight list needs a number per class: a tensor \(4,\)",
         lambda: losses.cross_entropy(x, y, weight=[1.0] * 4)),
        (r"at least 1, not 2\.5", lambda: losses.expected_calibration_error(x, y, bins=2.5)),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(sentences())))
def test_what_is_no_setting_is_named(number: int) -> None:
    message, call = sentences()[number]
    with pytest.raises(ValueError, match=message):
        call()
