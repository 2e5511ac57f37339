"""From teachers and losses to objectives: what they compute, what they leave alone, who teaches."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structopt import channels, data, descent, losses, networks, slicing, training
from structopt import distillation as d
from structopt.data import Examples

CLASSES = 10


def examples(count: int = 24, device: torch.device | str = "cpu") -> Examples:
    return Examples(torch.randn(count, 1, 28, 28), torch.arange(count) % CLASSES).to(device)


def batch(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    given = examples(8, device)
    return given.inputs, given.targets


def nets(device: torch.device | str = "cpu") -> tuple[nn.Module, nn.Module]:
    return networks.TeacherNet().to(device), networks.StudentNet().to(device)


class Dropping(nn.Module):
    """A teacher whose answer shows its mode: dropout, and statistics that a forward pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(1), nn.Dropout(0.5)
        self.fc = nn.Linear(28 * 28, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(inputs)).flatten(1))


# What is computed


@pytest.mark.parametrize("weight", [0.0, 0.9])
@pytest.mark.parametrize("label_weight", [0.0, 0.1])
def test_labels_and_teacher_are_weighed(
    weight: float, label_weight: float, device: torch.device
) -> None:
    teacher, student = nets(device)
    x, y = batch(device)
    objective = d.from_logits(teacher, temperature=3.0, weight=weight, label_weight=label_weight)
    got = objective(student.eval(), (x, y))
    with torch.no_grad():
        theirs = teacher.eval()(x)
    ours = student(x)
    soft = F.kl_div((ours / 3).log_softmax(1), (theirs / 3).softmax(1), reduction="batchmean")
    torch.testing.assert_close(got, label_weight * F.cross_entropy(ours, y) + weight * 9 * soft)
    assert set(objective.parts) == {
        "soft_targets(temperature=3.0)",
        *["labels"][: label_weight > 0],
    }


def test_labels_without_weight_are_not_looked_at(device: torch.device) -> None:
    teacher, student = nets(device)
    objective = d.from_logits(teacher, label_weight=0)
    assert objective(student, (batch(device)[0], "no labels at all")).isfinite()


@pytest.mark.parametrize(
    "loss",
    [d.attention_transfer, d.similarity_preserving, d.relational_distance, d.relational_angle],
)
def test_features_of_named_layers(loss: Callable[..., Tensor], device: torch.device) -> None:
    teacher, student = nets(device)
    x, y = batch(device)
    layers = {"conv3": "residual3", "conv2": "residual2"}
    objective = d.from_features(teacher, layers, loss, weight=7.0)
    got = objective(student.eval(), (x, y))
    with d.watch(student, layers) as ours, d.watch(teacher.eval(), layers.values()) as theirs:
        logits = student(x)
        teacher(x)
        terms = [loss(ours[a], theirs[b].detach()) for a, b in layers.items()]
        torch.testing.assert_close(got, F.cross_entropy(logits, y) + 7 * sum(terms))
    got.backward()
    assert student.conv3[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_a_loss_of_ones_own_gets_the_labels_it_asks_for(device: torch.device) -> None:
    teacher, student = nets(device)
    x, y = batch(device)
    told: list[Tensor] = []

    def own(student: Tensor, teacher: Tensor, targets: Tensor, *, power: float) -> Tensor:
        told.append(targets)
        return (student - teacher).abs().pow(power).mean()

    objective = d.from_logits(teacher, own, power=1.5)
    assert objective(student, (x, y)).isfinite()
    assert torch.equal(told[0], y)


def test_a_loss_that_is_a_module_gets_labels_and_settings_too(device: torch.device) -> None:
    teacher, student = nets(device)
    x, y = batch(device)

    class Own(nn.Module):
        def forward(self, s: Tensor, t: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
            return scale * F.cross_entropy(s + t, targets)

    one, two = (d.from_logits(teacher, Own(), label_weight=0.0, scale=k)(student, (x, y))
                for k in (1.0, 2.0))  # fmt: skip
    torch.testing.assert_close(two, 2 * one)


def test_together_runs_the_student_once(device: torch.device) -> None:
    teacher, student = nets(device)
    student.eval()
    x, y = batch(device)
    calls: list[int] = []
    student.register_forward_hook(lambda *_: calls.append(1))
    parts = [
        d.from_logits(teacher, weight=2.0),
        d.from_features(teacher, {"conv3": "residual3"}, weight=5.0),
        d.hints(teacher, student, {"conv2": "residual2"}, x, weight=0.5),
    ]
    calls.clear()
    both = d.together(*parts, label_weight=0.3)
    got = both(student, (x, y))
    assert len(calls) == 1
    labels = F.cross_entropy(student(x), y)
    torch.testing.assert_close(got, sum(p(student, (x, y)) - labels for p in parts) + 0.3 * labels)
    assert len(list(both.parameters())) == len(list(parts[2].parameters())) == 2
    assert len(both.parts) == 4


def test_hints_are_weighed_and_settings_reach_the_loss(device: torch.device) -> None:
    teacher, student = nets(device)
    student.eval()
    x, y = batch(device)
    layers = {"conv2": "residual2"}
    hinted = d.hints(teacher, student, layers, x, weight=3.0)
    powered = d.from_features(teacher, layers, weight=3.0, power=4.0)
    with d.watch(student, layers) as ours, d.watch(teacher.eval(), layers.values()) as theirs:
        labels, _ = F.cross_entropy(student(x), y), teacher(x)
        s, t = ours["conv2"], theirs["residual2"].detach()
        hint = F.mse_loss(hinted.adapters[0](s, t)[0], t)
        transfer = d.attention_transfer(s, t, power=4.0)
    torch.testing.assert_close(hinted(student, (x, y)), labels + 3 * hint)
    torch.testing.assert_close(powered(student, (x, y)), labels + 3 * transfer)


def test_hints_learn_with_the_student(device: torch.device) -> None:
    """FitNets' first stage: the adapter is in the optimiser, both move, the loss falls."""
    teacher, student = nets(device)
    given = examples(device=device)
    layers = {"conv2": "residual2", "fc": "fc"}
    objective = d.hints(teacher, student, layers, given.inputs[:2], weight=10.0, label_weight=0)
    assert [tuple(p.shape) for p in objective.parameters()] == [
        (32, 16, 1, 1),
        (32,),
        (10, 10),
        (10,),
    ]
    before = copy.deepcopy(objective.state_dict())
    optimizer = descent.fused_adamw(nn.ModuleList([student, objective]), 0.01)
    history = training.train(
        student, data.batches(given, 8), objective, optimizer, epochs=5, device=device
    )
    assert history.losses[-1] < 0.8 * history.losses[0]
    after = objective.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("ours", "theirs"), [((2, 4, 8, 8), (2, 6, 4, 4)), ((2, 4, 4, 4), (2, 6, 8, 8)),
                         ((2, 5), (2, 7)), ((2, 9, 5), (2, 9, 7))],
)  # fmt: skip
def test_adapters_map_what_can_be_mapped(
    ours: tuple[int, ...], theirs: tuple[int, ...], device: torch.device
) -> None:
    from structopt.distillation.adapters import regressor

    adapter = regressor(ours, theirs, "a to b").to(device)
    s, t = torch.rand(ours, device=device), torch.rand(theirs, device=device)
    mapped, teacher = adapter(s, t)
    if len(ours) == 4:  # the mean of each 2×2 square of the larger map
        s, t = (
            x.unflatten(3, (4, -1)).unflatten(2, (4, -1)).mean((3, 5)) for x in (s, t)
        )  # fmt: skip
        want = torch.einsum("oi,bihw->bohw", adapter.map.weight[:, :, 0, 0], s)
        want = want + adapter.map.bias[:, None, None]
    else:
        want = s @ adapter.map.weight.T + adapter.map.bias
    torch.testing.assert_close(mapped, want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(teacher, t)


@pytest.mark.parametrize(
    ("ours", "theirs"), [((2, 9, 5), (2, 8, 7)), ((2, 5), (2, 9, 7)), ((2, 4, 8, 8), (2, 5)),
                         ((2, 3, 4, 5, 5), (2, 3, 4, 5, 5))],
)  # fmt: skip
def test_what_no_adapter_maps_is_named(ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    from structopt.distillation.adapters import regressor

    with pytest.raises(ValueError, match="no adapter maps a to b") as refused:
        regressor(ours, theirs, "a to b")
    assert f"{ours} to {theirs}" in str(refused.value)


def test_pooling_is_the_mean_over_positions_or_tokens() -> None:
    from structopt.distillation.adapters import pooled

    maps, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 3)
    torch.testing.assert_close(pooled(maps), maps.flatten(2).mean(2))
    torch.testing.assert_close(pooled(tokens), torch.stack(tokens.unbind(1)).mean(0))
    for shape in ((3,), (2, 3, 4, 5, 6)):
        with pytest.raises(ValueError, match="cannot be pooled"):
            pooled(torch.zeros(shape))


# Who teaches, and how it is left


def test_the_teacher_is_asked_in_evaluation_mode_and_left_as_it_was(device: torch.device) -> None:
    teacher = Dropping().to(device).train()
    teacher.norm.eval()  # a mixture of modes, as a frozen norm has it
    state, modes = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    x, _ = batch(device)
    asked = d.Teacher(teacher)
    first, second = (asked.teach(x, None, ["fc"]) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.features["fc"], first.logits)
    assert not first.logits.requires_grad
    assert [m.training for m in teacher.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in teacher.state_dict().items())
    with pytest.raises(RuntimeError):
        asked.teach(x[:, :, :5], None)
    assert [m.training for m in teacher.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.equal(first.logits, teacher.eval()(x))


def test_several_teachers_give_their_mean(device: torch.device) -> None:
    models = [networks.StudentNet().to(device).eval() for _ in range(3)]
    x, y = batch(device)
    with torch.no_grad():
        want = torch.stack([model(x) for model in models]).mean(0)
    torch.testing.assert_close(d.Teacher(*models).teach(x, y).logits, want)
    student = networks.StudentNet().to(device)
    assert d.from_logits(models)(student, (x, y)).isfinite()


def test_whole_numbers_reach_a_teacher_as_they_are(device: torch.device) -> None:
    teacher = nn.Sequential(nn.Embedding(300, 4), nn.Flatten(), nn.Linear(8, 3))
    teacher = teacher.to(device, torch.bfloat16)  # 257 is no number of this type
    tokens = torch.tensor([[257, 1], [259, 2]], device=device)
    assert torch.equal(d.Teacher(teacher).teach(tokens, None).logits, teacher(tokens))


def test_one_teacher_is_asked_for_other_layers_each_time(device: torch.device) -> None:
    asked, (x, _) = d.Teacher(nets(device)[0]), batch(device)
    for names in (["fc"], ["residual2", "fc"], [], ["residual3"]):
        assert list(asked.teach(x, None, names).features) == names


def test_one_objective_teaches_two_students(device: torch.device) -> None:
    teacher, first = nets(device)
    second, given = networks.StudentNet().to(device).eval(), batch(device)
    objective = d.from_features(teacher, {"conv3": "residual3"})
    for student in (first.eval(), second, first):
        fresh = d.from_features(teacher, {"conv3": "residual3"})
        torch.testing.assert_close(objective(student, given), fresh(student, given))


@pytest.mark.parametrize("how", ["converted", "autocast"])
def test_a_teacher_in_lower_precision(how: str, device: torch.device) -> None:
    model, student = nets(device)
    x, y = batch(device)
    full = d.Teacher(model).teach(x, y).logits
    low = d.Teacher(model.bfloat16()) if how == "converted" else d.Teacher(
        model, autocast=torch.bfloat16)  # fmt: skip
    logits = low.teach(x, y).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), full, rtol=0.1, atol=0.1)
    assert d.from_logits(low)(student, (x, y)).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_teacher_on_another_device() -> None:
    teacher, student = networks.TeacherNet(), networks.StudentNet().cuda()
    x, y = batch("cuda")
    objective = d.from_features(teacher, {"conv3": "residual3"})
    assert objective(student, (x, y)).device.type == "cuda"
    assert next(teacher.parameters()).device.type == "cpu"


def test_training_moves_no_teacher_and_saves_none(tmp_path: Path, device: torch.device) -> None:
    teacher, student = nets(device)
    state = copy.deepcopy(teacher.state_dict())
    objective = d.hints(teacher, student, {"conv2": "residual2"}, batch(device)[0])
    assert all(name.startswith("adapters.") for name in objective.state_dict())
    optimizer = descent.fused_adamw(nn.ModuleList([student, objective]), 0.01)
    training.train(
        student, data.batches(examples(device=device), 8), objective, optimizer, epochs=1,
        device=device, checkpoint=tmp_path / "run.safetensors",
    )  # fmt: skip
    assert all(torch.equal(state[name], value) for name, value in teacher.state_dict().items())
    assert (tmp_path / "run.safetensors").stat().st_size < 100_000  # the teacher takes 470,000


def test_a_pruned_student_learns(device: torch.device) -> None:
    """What `channels.take` hands over has the same layer names and other widths."""
    teacher, student = nets()
    groups = channels.channel_groups(student, torch.zeros(1, 1, 28, 28))
    student = channels.take(student, {groups["conv2.0"]: range(0, 16, 2)}).to(device)
    teacher.to(device)
    given = examples(device=device)
    layers = {"conv2": "residual2"}
    objective = d.together(
        d.from_logits(teacher, d.standardised_logits, weight=9.0),
        d.hints(teacher, student, layers, given.inputs[:2]),
        d.from_features(teacher, layers, weight=100.0),
    )
    assert objective.adapters[0].map.in_channels == 8
    optimizer = descent.fused_adamw(nn.ModuleList([student, objective]), 0.01)
    history = training.train(
        student, data.batches(given, 8), objective, optimizer, epochs=4, device=device
    )
    assert history.losses[-1] < history.losses[0]


def test_every_slice_of_a_slimmable_learns_from_the_teacher(device: torch.device) -> None:
    """At each width the gradient of the network cut out, in the weights that all share."""
    teacher, _ = nets(device)
    given = examples(device=device)
    x, y = given.inputs[:8], given.targets[:8]
    net = slicing.Slimmable(networks.StudentNet(), given.inputs[:2].cpu(), [0.5]).to(device)
    build: list[Callable[..., Tensor]] = [
        d.soft_targets, d.standardised_logits, d.logit_mse, d.decoupled, d.correlations,
    ]  # fmt: skip
    for goal in (d.from_logits(teacher, loss, weight=0.5) for loss in build):
        net.eval().zero_grad()
        alone = net.extract(0.5)
        want, got = goal(alone, (x, y)), goal(partial(net, width=0.5), (x, y))
        torch.testing.assert_close(got, want)
        got.backward()
        want.backward()
        shared = net.model.conv2[0].weight.grad
        torch.testing.assert_close(shared[:8, :4], alone.conv2[0].weight.grad)
        assert not shared[8:].any()

    def every_width(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return sum(goal(partial(model, width=width), batch) for width in model.widths)

    history = training.train(
        net, data.batches(given, 8), every_width, descent.fused_adamw(net, 0.01), epochs=4,
        device=device,
    )  # fmt: skip
    assert history.losses[-1] < history.losses[0]
    # Features are named at the full width; a slice's own layers are those of the network cut out.
    for student, layer in ((net, "model.conv2"), (net.extract(0.5), "conv2")):
        goal = d.hints(teacher, student, {layer: "residual2"}, x)
        goal(student, (x, y)).backward()
        assert goal.adapters[0].map.in_channels == (16 if student is net else 8)


# Students that teach each other and themselves


def test_mutual_students_all_learn(device: torch.device) -> None:
    students = nn.ModuleList([networks.StudentNet(), networks.LeNet300()]).to(device)
    given = examples(device=device)
    x, y = given.inputs[:8], given.targets[:8]
    students.eval()
    logits = [student(x) for student in students]
    want = sum(F.cross_entropy(z, y) for z in logits) + 0.5 * d.mutual_loss(logits, temperature=2.0)
    objective = d.mutual(weight=0.5, temperature=2.0)
    torch.testing.assert_close(objective(students, (x, y)), want)
    history = training.train(
        students, data.batches(given, 8), d.mutual(), descent.fused_adamw(students, 0.01),
        epochs=4, device=device,
    )  # fmt: skip
    assert history.losses[-1] < history.losses[0]


def test_born_again_each_is_taught_by_the_one_before(device: torch.device) -> None:
    given = examples(device=device)
    taught = []

    def fit(network: nn.Module, objective: training.Objective) -> None:
        taught.append(objective)
        optimizer = descent.fused_adamw(network, 0.01)
        training.train(
            network, data.batches(given, 8), objective, optimizer, epochs=1, device=device
        )

    build = partial(d.from_logits, loss=d.logit_mse, label_weight=0.0)
    found = d.born_again(networks.StudentNet, fit, generations=3, objective=build)
    assert len({id(network) for network in found}) == 3
    assert [o.teacher.models[0] for o in taught[1:]] == found[:2]
    untaught = d.born_again(networks.StudentNet, lambda *_: None)
    assert len(untaught) == 3
    with pytest.raises(ValueError, match="the same network again"):
        d.born_again(iter([*untaught[:2], untaught[0]]).__next__, lambda *_: None)
    x, y = batch(device)
    want = F.mse_loss(found[1].eval()(x), found[0].eval()(x))
    torch.testing.assert_close(taught[1](found[1], (x, y)), want)


def test_a_moving_teacher_is_the_running_mean(device: torch.device) -> None:
    student = networks.StudentNet().to(device)
    teacher = d.MovingTeacher(student, decay=0.5)
    mean = [t.clone() for t in (*student.parameters(), *student.buffers())]
    for step in range(12):
        with torch.no_grad():
            for p in (*student.parameters(), *student.buffers()):
                p.add_(torch.ones_like(p) * (step + 1))
        teacher(student, step + 1)
        decay = min(0.5, (1 + step) / (10 + step))
        now = [t.detach() for t in (*student.parameters(), *student.buffers())]
        mean = [
            decay * m + (1 - decay) * t if t.is_floating_point() else t.clone()
            for m, t in zip(mean, now, strict=True)
        ]
    ours = [t.detach() for t in (*teacher.model.parameters(), *teacher.model.buffers())]
    torch.testing.assert_close(ours, mean)
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_a_moving_teacher_in_16_bits_moves() -> None:
    """Also after a break: what is smaller than the rounding is kept."""
    student = nn.Linear(1, 1, bias=False).bfloat16()
    student.weight.data.fill_(1.0)
    teacher = d.MovingTeacher(student, decay=0.999)
    teacher.steps = 10**5
    student.weight.data.fill_(1.5)
    for step in range(3000):
        if step % 2:
            state, teacher = teacher.state_dict(), d.MovingTeacher(student, decay=0.999)
            teacher.load_state_dict(state)
        teacher(student, step)
    assert teacher.model.weight.item() == pytest.approx(1.5 - 0.5 * 0.999**3000, rel=0.005)
    state, kept = teacher.state_dict(), teacher.halves[0].clone()
    other = d.MovingTeacher(student, decay=0.5)
    other.load_state_dict(state)
    other(student, 1)
    assert torch.equal(teacher.halves[0], kept), "its state is its own"


def test_a_moving_teacher_of_no_memory_is_its_student(device: torch.device) -> None:
    """Also one of complex numbers, and one that has no weights at all."""
    numbers = torch.ones(2, dtype=torch.complex64, device=device)
    for student in (nn.ParameterList([numbers]), nn.Flatten()):
        teacher = d.MovingTeacher(student, decay=0)
        with torch.no_grad():
            for p in student.parameters():
                p += 1
        teacher(student, 1)
        torch.testing.assert_close(teacher.model.state_dict(), student.state_dict())
    assert d.MovingTeacher(student).decay == 0.99
    teacher = d.MovingTeacher(nn.Linear(2, 1))
    teacher(nn.Linear(2, 1, device="meta"), 1)
    assert teacher.model.weight.device.type == "meta", "it lies where its student does"
    with pytest.raises(ValueError, match="asked one tensor, not dict"):
        teacher.teach({"x": torch.ones(1)}, None)


def test_a_moving_teacher_goes_on_after_a_break(tmp_path: Path, device: torch.device) -> None:
    """To the same bits: the checkpoint keeps the average and its steps."""
    found = []
    for path, runs in (("a", [2]), ("b", [1, 2])):
        for epochs in runs:
            torch.manual_seed(1)
            student = networks.StudentNet()
            teacher = d.MovingTeacher(student, decay=0.9)
            torch.manual_seed(2)
            training.train(
                student, data.batches(examples(), 8), d.from_logits(teacher),
                descent.fused_adamw(student, 0.01), epochs=epochs, device=device,
                after_step=teacher, checkpoint=tmp_path / f"{path}.safetensors", autocast=None,
            )  # fmt: skip
        assert teacher.steps == 6
        found.append([*student.state_dict().values(), *teacher.model.state_dict().values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0 if device.type == "cpu" else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.double])
def test_adapters_and_heads_speak_the_types_of_both(
    dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "mps":
        pytest.skip("mps has no double precision")
    teacher, student = nets(device)
    layers = {"conv3": "residual3"}
    for theirs, ours in ((dtype, torch.float), (torch.float, dtype)):
        teacher, student = teacher.to(theirs), student.to(ours)
        x, y = batch(device)
        x = x.to(ours)
        for objective in (
            d.hints(teacher, student, layers, x), d.contrast(teacher, student, layers, x),
            d.deep_supervision(student, ["conv3"], x),
        ):  # fmt: skip
            loss = objective(student, (x, y))
            loss.backward()
            assert loss.isfinite()
            assert {p.dtype for p in objective.parameters()} == {ours}
            assert all(p.grad.isfinite().all() for p in objective.parameters())


def test_a_copy_of_an_objective_is_its_own(device: torch.device) -> None:
    """Copied or pickled together with its student, it teaches the copy."""
    teacher, student = nets(device)
    given = batch(device)
    both = nn.ModuleList([student, d.from_features(teacher, {"conv3": "residual3"})])
    both[1](student.eval(), given)
    for other, goal in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        with torch.no_grad():
            other.conv3[0].weight.mul_(-2)
        fresh = d.from_features(teacher, {"conv3": "residual3"})
        torch.testing.assert_close(goal(other, given), fresh(other, given))
        assert not torch.equal(goal(other, given), both[1](student, given))


# Nothing is kept


def test_an_objective_keeps_no_graph(device: torch.device) -> None:
    teacher, student = nets(device)
    objective = d.from_features(teacher, {"conv3": "residual3"})
    loss = objective(student, batch(device))
    graph = weakref.ref(loss)
    assert not student.conv3._forward_hooks
    assert "forward" not in vars(student.conv3) | vars(teacher.residual3)
    del loss
    gc.collect()
    assert graph() is None
    deep = d.deep_supervision(student, ["conv1"], batch(device)[0])
    deep(student, batch(device))
    parts = [*objective.parts.values(), *deep.parts.values()]
    assert not any(value.requires_grad for value in parts)


# Bad input


def bad() -> list[tuple[str, Callable[[], object]]]:
    teacher, student = nets()
    x, y = batch()
    run = partial(nn.Module.__call__)
    eleven = networks.TeacherNet(classes=11)

    class Pair(nn.Module):
        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            return inputs, inputs

    def asks(objective: nn.Module, model: nn.Module = student) -> Callable[[], object]:
        return lambda: run(objective, model, (x, y))

    return [
        (r"the student gives logits \(8, 10\), the teacher \(8, 11\)", asks(d.from_logits(eleven))),
        (r"no layer 'conv33'; near names are .*conv3",
         asks(d.from_features(teacher, {"conv33": "conv3"}))),
        (r"no layer 'residual4'; near names are .*residual3",
         asks(d.from_features(teacher, {"conv3": "residual4"}))),
        (r"no adapter maps 'conv3' to 'fc', \(8, 16, 7, 7\) to \(8, 10\)",
         lambda: d.hints(teacher, student, {"conv3": "fc"}, x)),
        (r"no layer 'conv9'", lambda: d.hints(teacher, student, {"conv9": "fc"}, x)),
        (r"name a pair of layers", lambda: d.hints(teacher, student, {}, x)),
        (r"name a pair of layers", lambda: d.from_features(teacher, {})),
        (r"finite number above 0, not 0", lambda: d.from_logits(teacher, temperature=0)),
        (r"finite number above 0, not inf", lambda: d.from_logits(teacher, temperature=math.inf)),
        (r"finite number above 0, not inf", lambda: d.soft_targets(x, x, temperature=math.inf)),
        (r"finite number above 0, not 0", lambda: d.mutual(temperature=0)),
        (r"finite number above 0, not inf", lambda: d.mutual(temperature=math.inf)),
        (r"logit_mse has no setting 'student'; it has none",
         lambda: d.from_logits(teacher, d.logit_mse, student=1)),
        (r"has no setting 'targets'; it has temperature, alpha, beta",
         lambda: d.from_logits(teacher, d.decoupled, targets=1)),
        (r"soft_targets has no setting 'heat'; it has temperature",
         lambda: d.from_logits(teacher, heat=1)),
        (r"weight counts the teacher's part.*-1", lambda: d.from_logits(teacher, weight=-1)),
        (r"label_weight counts the labels.*-1", lambda: d.from_logits(teacher, label_weight=-1)),
        (r"not int", lambda: d.from_logits(3)),
        (r"one nn.Module or several", lambda: d.from_logits([])),
        (r"one teacher gives \(8, 10\), another \(8, 11\)", asks(d.from_logits([teacher, eleven]))),
        (r"features of several teachers have no mean",
         asks(d.from_features([teacher, teacher], {"conv3": "conv3"}))),
        (r"the teacher returned tuple, not logits", asks(d.from_logits(Pair()))),
        (r"the student returned tuple, not logits", asks(d.from_logits(teacher), Pair())),
        *((r"pair \(inputs, targets\), not float32 \(8, 1, 28, 28\)", partial(goal, student, x))
          for goal in (d.from_logits(teacher), d.deep_supervision(student, ["conv1"], x))),
        (r"pair \(inputs, targets\), not", lambda: d.mutual()(nn.ModuleList([student] * 2), x)),
        (r"asked one tensor, not dict", lambda: d.from_logits(teacher)(student, ({"x": x}, y))),
        *((r"name a pair of layers", partial(d.from_features, teacher, layers))
          for layers in ("conv3", {"conv3"}, ["conv3"])),
        (r"layers are watched in an nn.Module, not in partial: .* logits",
         lambda: d.from_features(teacher, {"conv3": "residual3"})(partial(student), (x, y))),
        (r"of one teacher", lambda: d.together(d.from_logits(teacher), d.from_logits(eleven))),
        (r"at least one objective", lambda: d.together()),
        (r"ModuleList\(\[student, ...\]\), not StudentNet", lambda: d.mutual()(student, (x, y))),
        (r"weight counts what the others say.*-1", lambda: d.mutual(weight=-1)),
        (r"at least 1: 0", lambda: d.born_again(networks.StudentNet, print, generations=0)),
        (r"same network again",
         lambda: d.born_again(lambda: student, lambda *_: None, generations=2)),
        (r"0 <= d < 1, not 1", lambda: d.MovingTeacher(student, decay=1.0)),
        (r"0 <= d < 1, not '0.9'", lambda: d.MovingTeacher(student, decay="0.9")),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(bad())))
def test_bad_input_is_named(number: int) -> None:
    message, call = bad()[number]
    with pytest.raises(ValueError, match=message):
        call()


def test_builders_pass_on_the_weight_and_the_loss_of_the_labels(device: torch.device) -> None:
    teacher, student = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    teacher, student = teacher.to(device), student.to(device)
    batch = torch.randn(5, 4, device=device), torch.tensor([0, 1, 2, 0, 1], device=device)

    def said(objective: d.Distillation, label_weight: float, task: Any) -> None:
        total, parts = objective(student, batch), objective.parts
        labels = task(student(batch[0]), batch[1])
        rest = torch.stack([part for name, part in parts.items() if name != "labels"]).sum()
        torch.testing.assert_close(total, label_weight * labels + rest)

    def squared(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits - F.one_hot(targets, 3)).square().mean()

    plain, layers = losses.cross_entropy, {"0": "0"}
    said(d.from_logits(teacher, label_weight=0.3), 0.3, plain)
    said(d.from_logits(teacher, task=squared), 1.0, squared)
    said(d.from_features(teacher, layers, d.soft_targets, label_weight=0.3), 0.3, plain)
    said(d.hints(teacher, student, layers, batch[0], label_weight=0.3), 0.3, plain)
    both = [d.from_logits(teacher, loss, task=squared) for loss in (d.soft_targets, d.logit_mse)]
    said(d.together(*both, label_weight=0.3), 0.3, squared)
    with pytest.raises(ValueError, match="one loss of the labels"):
        d.together(both[0], d.from_logits(teacher))


def test_weights_and_temperatures_where_none_is_given(device: torch.device) -> None:
    """The numbers that the docstrings name, those of the papers where there are any."""
    teacher, student = nets(device)
    x, y = batch(device)
    layers = {"conv3": "residual3", "conv2": "residual2"}
    told = {
        "1 · labels + 1 · soft_targets": d.from_logits(teacher),
        "1 · labels + 1 · attention_transfer conv3 + 1 · attention_transfer conv2":
            d.from_features(teacher, layers),
        "1 · labels + 1 · hint conv3 + 1 · hint conv2": d.hints(teacher, student, layers, x),
        "1 · labels + 0.8 · contrast conv3 + 0.8 · contrast conv2":
            d.contrast(teacher, student, layers, x),
    }  # fmt: skip
    for want, objective in told.items():
        assert objective.extra_repr() == want
    assert d.together(d.from_logits(teacher)).extra_repr() == "1 · labels + 1 · soft_targets"
    student.eval()
    contrast = told["1 · labels + 0.8 · contrast conv3 + 0.8 · contrast conv2"]
    contrast(student, (x, y))
    warm = d.contrast(teacher, student, layers, x, temperature=0.1)
    warm.load_state_dict(contrast.state_dict())
    warm(student, (x, y))
    assert contrast.parts == warm.parts
    heads = [d.deep_supervision(student, ["conv1"], x, share=0.5, **given)
             for given in ({}, {"temperature": 3.0, "weight": 0.3})]  # fmt: skip
    heads[1].load_state_dict(heads[0].state_dict())
    assert torch.equal(heads[0](student, (x, y)), heads[1](student, (x, y)))


def test_making_an_objective_leaves_the_student_as_it_was() -> None:
    student, teacher, x = networks.StudentNet(), networks.TeacherNet(), torch.rand(4, 1, 28, 28)
    for module in (student, teacher):
        module.train()
    before = copy.deepcopy(student.state_dict())
    pair = {"conv3": "residual3"}
    d.hints(teacher, student, pair, x)
    d.contrast(teacher, student, pair, x)
    d.deep_supervision(student, ["conv1", "conv2"], x)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert student.training


@pytest.mark.parametrize("make", [d.hints, d.contrast])
def test_an_example_that_is_no_tensor_is_named(make: Callable[..., nn.Module]) -> None:
    teacher, student = nets()
    for example in ({"x": torch.zeros(1, 1, 28, 28)}, (torch.zeros(1, 1, 28, 28),)):
        with pytest.raises(ValueError, match="the example is one tensor of inputs, as a teacher"):
            make(teacher, student, {"conv1": "conv1"}, example)
