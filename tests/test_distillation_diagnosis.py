"""Each usual reason is made on purpose, and named; a sound case gets no finding. And the tuner."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from structopt import data, descent, losses, networks, training
from structopt import distillation as d
from structopt.data import Examples


def fit(net: nn.Module, examples: Examples, epochs: int, smoothing: float = 0.0) -> nn.Module:
    training.train(
        net, data.batches(examples, 64),
        training.supervised(partial(losses.cross_entropy, label_smoothing=smoothing)),
        descent.fused_adamw(net, 0.002), epochs=epochs, device="cpu", autocast=None,
        schedule=descent.one_cycle(),
    )  # fmt: skip
    return net.eval()


@pytest.fixture(scope="module")
def split() -> tuple[Examples, Examples]:
    train, validation = data.fashion_mnist()[0][:3000].split(1000)
    return train, validation


@pytest.fixture(scope="module")
def teacher(split: tuple[Examples, Examples]) -> nn.Module:
    torch.manual_seed(0)
    return fit(networks.LeNet300(), split[0], 8)


def reasons(found: d.Diagnosis) -> list[str]:
    return [finding.reason for finding in found.findings]


def test_a_sound_case_has_no_finding(
    split: tuple[Examples, Examples], teacher: nn.Module, device: torch.device
) -> None:
    train, validation = split
    torch.manual_seed(1)
    student = fit(networks.LeNet300((16, 16)), train[:300], 20)  # overfits: a teacher can help
    own = data.batches(train[:300], 64, device=device)
    teacher.to(device)
    found = d.diagnose(teacher, own, validation.to(device), student=student.to(device))
    teacher.cpu()
    assert not found
    assert str(found) == "None of the usual reasons was found."


def test_a_teacher_in_training_mode(split: tuple[Examples, Examples], teacher: nn.Module) -> None:
    train, validation = split
    blurred = nn.Sequential(nn.Dropout(0.8), teacher)
    batches = data.batches(train, 64)
    blurred.train()
    before = [t.clone() for t in blurred.state_dict().values()]
    found = d.diagnose(blurred, batches, validation)
    assert reasons(found) == ["The teacher is in training mode"]
    assert "right" in str(found)
    assert blurred.training
    assert all(
        torch.equal(a, b) for a, b in zip(before, blurred.state_dict().values(), strict=True)
    )
    blurred.eval()
    assert not d.diagnose(blurred, batches, validation)
    teacher.train()  # has neither dropout nor norms: the mode changes nothing
    assert not d.diagnose(teacher, batches, validation)
    teacher.eval()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_teacher_trained_with_label_smoothing(
    smoothing: float, split: tuple[Examples, Examples]
) -> None:
    torch.manual_seed(0)
    smooth = fit(networks.LeNet300(), split[0], 8, smoothing)
    for factor in (1.0, 3.0):  # the size of the logits does not hide it
        with torch.no_grad():
            smooth.fc3.weight *= factor
            smooth.fc3.bias *= factor
        found = d.diagnose(smooth, data.batches(split[0], 64), split[1], temperature=4 * factor)
        assert reasons(found) == ["The teacher was trained with label smoothing"][: smoothing > 0]
        if smoothing and factor == 1:
            assert "smoothing of about 0.1" in str(found)


@pytest.mark.parametrize(("steady", "ordered"), [(True, False), (False, True), (False, False)])
def test_smoothing_levels_the_wrong_logits_and_keeps_the_gap(steady: bool, ordered: bool) -> None:
    """Both are its marks: a teacher that shows one of them alone was not trained with it."""
    labels = torch.arange(64) % 5
    right = torch.nn.functional.one_hot(labels, 5).bool()
    gap = torch.full((64, 1), 4.0) if steady else torch.linspace(2, 8, 64).view(-1, 1)
    wrong = torch.zeros(64, 5) if ordered else torch.tensor([-1.2, -0.6, 0.0, 0.6, 1.2]) * gap / 2
    wrong = wrong - (wrong * ~right).sum(1, keepdim=True) / 4
    logits = torch.where(right, gap, wrong)
    found = d.diagnose(nn.Identity(), [(logits, labels)], [(logits, labels)], temperature=4.0)
    assert found.findings == ()
    level = torch.where(right, torch.tensor(4.0), torch.tensor(0.0))
    both = d.diagnose(nn.Identity(), [(level, labels)], [(level, labels)], temperature=4.0)
    assert reasons(both) == ["The teacher was trained with label smoothing"]
    share = 5 / (math.exp(4.0) + 5 - 1)  # the smoothing whose perfect fit has this gap
    assert f"smoothing of about {share:.2f}" in str(both)


def test_a_few_right_answers_or_two_classes_say_nothing_of_smoothing() -> None:
    def smoothed(count: int, classes: int, right: int) -> d.Diagnosis:
        labels = torch.arange(count) % classes
        said = torch.where(torch.arange(count) < right, labels, (labels + 1) % classes)
        logits = 4.0 * torch.nn.functional.one_hot(said, classes)
        pairs = [(logits, labels)]
        return d.diagnose(nn.Identity(), pairs, pairs, temperature=4.0)

    assert "label smoothing" in str(smoothed(64, 5, 16))
    assert "label smoothing" not in str(smoothed(64, 5, 15))
    assert "label smoothing" in str(smoothed(64, 3, 64))
    assert "label smoothing" not in str(smoothed(64, 2, 64))


def test_augmentation_that_the_cached_teacher_did_not_see(
    split: tuple[Examples, Examples], teacher: nn.Module
) -> None:
    train, validation = split
    cached = d.cache_outputs(teacher, train)
    numbered = cached.number(train)
    moved = data.batches(numbered, 64, augment=[data.Shift(3)])
    found = d.diagnose(teacher, moved, validation, cached=cached)
    assert reasons(found) == ["The cached teacher did not see this augmentation"]
    other = float(str(found).partition("another class for ")[2].partition("%")[0])
    assert 0 < other < 60  # in per cent; the shifted pictures are mostly still recognised
    still = data.batches(numbered, 64)
    assert not d.diagnose(teacher, still, validation, cached=cached)
    assert not d.diagnose(teacher, data.batches(train, 64, augment=[data.Shift(3)]), validation)


def test_a_student_that_has_data_enough(
    split: tuple[Examples, Examples], teacher: nn.Module
) -> None:
    train, validation = split
    batches = data.batches(train, 64)
    torch.manual_seed(1)
    twin = fit(networks.LeNet300(), train, 8)
    found = d.diagnose(teacher, batches, validation, student=twin)
    assert reasons(found) == ["The student has data enough to be as good as its teacher"]
    tiny = fit(nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 10)), train, 8)
    found = d.diagnose(teacher, batches, validation, student=tiny)
    assert reasons(found) == ["The student has data enough"]
    assert "its size is the limit" in str(found)


@pytest.mark.parametrize(
    ("temperature", "reason"),
    [(1.0, None), (4.0, None), (100.0, "flattens everything"), (0.05, "flattens nothing")],
)
def test_a_temperature_that_flattens(
    temperature: float, reason: str | None, split: tuple[Examples, Examples], teacher: nn.Module
) -> None:
    batches = data.batches(split[0], 64)
    found = d.diagnose(teacher, batches, split[1], temperature=temperature)
    assert reasons(found) == ([f"The temperature {reason}"] if reason else [])


def test_bad_input_is_named(split: tuple[Examples, Examples], teacher: nn.Module) -> None:
    for wrong in (0, math.inf, "4"):
        with pytest.raises(ValueError, match=f"finite number above 0, not {wrong!r}"):
            d.diagnose(teacher, [], split[1], temperature=wrong)
    with pytest.raises(ValueError, match="hold no example"):
        d.diagnose(teacher, [], split[1])
    with pytest.raises(ValueError, match="are pairs"):
        d.diagnose(teacher, [torch.ones(2)], split[1])
    few = split[0][:32]
    cached = d.cache_outputs(teacher, few)
    with pytest.raises(ValueError, match=r"batches of cached.number\(examples\)"):
        d.diagnose(teacher, data.batches(few, 8), split[1], cached=cached)
    with pytest.raises(ValueError, match="name the cache as well"):
        d.diagnose(teacher, data.batches(cached.number(few), 8), split[1])
    with pytest.raises(ValueError, match=r"one nn.Module, not list"):
        d.diagnose([teacher], data.batches(few, 8), split[1])
    for classes in (2, 10):
        soft = [(few.inputs, torch.rand(32, classes))]
        with pytest.raises(ValueError, match=r"class indices: soft targets .* argmax"):
            d.diagnose(teacher, soft, split[1])
    with pytest.raises(ValueError, match="walked only once"):
        d.diagnose(teacher, data.batches(few, 8), iter(data.batches(few, 8)))
    with pytest.raises(FloatingPointError, match="logits hold NaN"):
        d.diagnose(teacher, [(few.inputs * math.nan, few.targets)], split[1])


def test_a_teacher_in_another_type_is_diagnosed_alike(
    split: tuple[Examples, Examples], teacher: nn.Module
) -> None:
    """And nothing is drawn from the generator on which the training that follows depends."""
    train, validation = split
    blurred = nn.Sequential(nn.Dropout(0.8), copy.deepcopy(teacher)).bfloat16().train()
    before, batches = torch.get_rng_state(), data.batches(train, 64)
    found = d.diagnose(blurred, batches, validation, student=teacher)
    assert torch.equal(torch.get_rng_state(), before)
    assert reasons(found)[0] == "The teacher is in training mode"
    assert any(reason.startswith("The student has data enough") for reason in reasons(found))


def test_one_class_has_no_temperature() -> None:
    alone = [(torch.rand(16, 2), torch.zeros(16).long())]
    assert not d.diagnose(nn.Linear(2, 1), alone, alone)


# The tuner


class Scored(nn.Module):
    """A student whose accuracy on 1000 examples is what it was told."""

    def __init__(self, right: float) -> None:
        super().__init__()
        self.right = right

    def forward(self, inputs: Tensor) -> Tensor:
        good = (inputs[:, 0] < self.right * 1000).long()
        return nn.functional.one_hot(good, 2).float()


VALIDATION = [(torch.arange(1000.0)[:, None], torch.ones(1000).long())]


@pytest.mark.parametrize("budget", [48, 60, 500])
@pytest.mark.parametrize("best", [(1.0, 16.0), (8.0, 1.0), (4.0, 4.0)])
def test_the_best_is_found_within_the_budget(budget: int, best: tuple[float, float]) -> None:
    spent: list[int] = []

    def fit(temperature: float, weight: float, epochs: int) -> nn.Module:
        spent.append(epochs)
        near = abs(temperature - best[0]) / 20 + abs(weight - best[1]) / 50
        return Scored(0.9 - near)

    found = d.tune(fit, VALIDATION, budget=budget)
    assert (found.temperature, found.weight) == best
    assert budget / 2 < sum(spent) <= budget
    assert [trial.epochs for trial in found.trials] == spent
    assert [spent.count(e) for e in sorted(set(spent))][:1] == [12]
    assert str(found).count("<- best") == 1


def test_later_rounds_are_longer_and_decide() -> None:
    """A candidate that only wins when it trains longer is found."""

    def fit(temperature: float, weight: float, epochs: int) -> nn.Module:
        return Scored(0.5 + 0.01 * epochs * (temperature == 2) + 0.05 * (temperature == 1))

    found = d.tune(fit, VALIDATION, budget=40, temperatures=(1.0, 2.0, 4.0, 8.0), weights=(1.0,))
    assert found.temperature == 2
    assert [trial.epochs for trial in found.trials] == [5] * 4 + [10] * 2


def test_one_trial_is_the_best() -> None:
    """Of three candidates the second round may be as short as the first."""
    candidates = (1.0, 2.0, 4.0)
    found = d.tune(
        lambda t, w, e: Scored(t / 8), VALIDATION, budget=6, temperatures=candidates, weights=(1.0,)
    )
    assert {trial.epochs for trial in found.trials} == {1}
    lines = str(found).splitlines()
    assert [line for line in lines if "best" in line] == [lines[-2]]
    with pytest.raises(ValueError, match="walked only once"):
        d.tune(lambda *_: Scored(0.5), iter([VALIDATION]), budget=99)


class Knows(nn.Module):
    """Right for the inputs below a number, each of class 1."""

    def __init__(self, below: float) -> None:
        super().__init__()
        self.below = below

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.one_hot((inputs[:, 0] < self.below).long(), 2).float()


def test_as_good_as_its_teacher_is_to_twice_the_standard_error() -> None:
    """2·√(p(1 - p)·(1/100 + 1/400)) = 0.112 for p = 0.5: 0.11 more is noise, 0.12 is not."""
    held, own = (
        [((torch.arange(count) / count)[:, None], torch.ones(count).long())] for count in (100, 400)
    )
    for theirs, same in ((0.61, True), (0.62, False)):
        found = d.diagnose(Knows(theirs), own, held, student=Knows(0.5), temperature=1.0)
        words = [finding.reason for finding in found.findings if "data enough" in finding.reason]
        assert words == ["The student has data enough" + " to be as good as its teacher" * same]


@pytest.mark.parametrize(("candidates", "epochs"), [((4.0,), [9]), ((1.0, 4.0), [4, 4])])
def test_one_round_has_the_whole_budget(candidates: tuple[float, ...], epochs: list[int]) -> None:
    """Of two candidates nothing is left to decide after the first."""
    found = d.tune(
        lambda t, w, e: Scored(t / 8), VALIDATION, budget=9, temperatures=candidates, weights=(1.0,)
    )
    assert (found.temperature, [trial.epochs for trial in found.trials]) == (4.0, epochs)


def test_a_student_that_diverged_never_wins() -> None:
    def metric(output: Tensor, target: Tensor) -> Tensor:
        return torch.where(output[:, 0] > 1, torch.nan, output[:, 0])

    def fit(temperature: float, weight: float, epochs: int) -> nn.Module:
        return nn.Linear(1, 1).requires_grad_(False).apply(
            lambda layer: (layer.weight.zero_(), layer.bias.fill_(temperature)))  # fmt: skip

    found = d.tune(
        fit, VALIDATION, budget=8, temperatures=(2.0, 0.5), weights=(1.0,), metric=metric
    )
    assert found.temperature == 0.5
    with pytest.raises(FloatingPointError, match="no student of 2"):
        d.tune(fit, VALIDATION, budget=8, temperatures=(2.0, 3.0), weights=(1.0,), metric=metric)


def test_a_fit_that_returns_nothing_is_named() -> None:
    with pytest.raises(ValueError, match="has to return the student it trained, not NoneType"):
        d.tune(lambda *_: None, VALIDATION, budget=48)


def test_a_real_student_is_tuned(
    split: tuple[Examples, Examples], teacher: nn.Module, device: torch.device
) -> None:
    """Labels are not looked at: a student of weight 0 learns nothing, whatever the temperature."""
    train, validation = split[0][:300].to(device), split[1].to(device)
    taught: list[nn.Module] = []

    def fit(temperature: float, weight: float, epochs: int) -> nn.Module:
        student = networks.LeNet300((16, 16))
        goal = d.from_logits(teacher, temperature=temperature, weight=weight, label_weight=0.0)
        training.train(student, data.batches(train, 64), goal,
                       descent.fused_adamw(student.to(device), 0.005), epochs=epochs,
                       device=device, progress=False)  # fmt: skip
        taught.append(student)
        return student

    found = d.tune(fit, validation, budget=80, temperatures=(1.0, 4.0), weights=(0.0, 1.0))
    assert found.weight == 1.0
    assert [trial.score for trial in found.trials] == [
        training.evaluate(student, validation) for student in taught
    ]
    last = [trial for trial in found.trials if trial.epochs == found.trials[-1].epochs]
    best = max(last, key=lambda trial: trial.score)
    assert (found.temperature, found.weight) == (best.temperature, best.weight)
    assert sum(trial.epochs for trial in found.trials) <= 80


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 47}, "12 candidates in 4 rounds take at least 48 epochs, and the budget is 47"),
        ({"budget": 99, "weights": (math.inf,)}, "weights of at least 0, all finite"),
        ({"budget": 99, "temperatures": ()}, "temperatures above 0"),
        ({"budget": 99, "temperatures": (0.0,)}, "temperatures above 0"),
        ({"budget": 99, "weights": (-1.0,)}, "weights of at least 0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        d.tune(lambda *_: nn.Identity(), VALIDATION, **settings)
