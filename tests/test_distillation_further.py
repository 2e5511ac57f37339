"""Heads in between, contrast, attention, dreams: each its paper's formula, each a law or two."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distillation_formulas import TOKENS, S, T, Y, contrastive
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from structopt import data, descent, networks, training
from structopt import distillation as d
from structopt.data import Examples


def test_contrast_gradient_takes_the_level_as_given() -> None:
    s = S.clone().requires_grad_()
    (got,) = torch.autograd.grad(d.contrastive(s, T, Y, temperature=0.5), s)
    level = (F.normalize(S) @ F.normalize(T).T / 0.5).exp().mean().item()
    step, want = 1e-6, torch.zeros_like(S)
    for k in range(S.numel()):
        up, down = S.clone(), S.clone()
        up.view(-1)[k] += step
        down.view(-1)[k] -= step
        ends = [contrastive(x.tolist(), T.tolist(), 0.5, level) for x in (up, down)]
        want.view(-1)[k] = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


# Contrast


@given(st.floats(0.1, 9.0), st.floats(0.1, 9.0), st.permutations(range(4)))
def test_contrast_knows_neither_size_nor_order_nor_side(
    a: float, b: float, order: list[int]
) -> None:
    want = d.contrastive(S, T, Y)
    torch.testing.assert_close(d.contrastive(a * S, b * T, Y), want)
    torch.testing.assert_close(d.contrastive(S[order], T[order], Y[order]), want)
    torch.testing.assert_close(d.contrastive(T, S, Y), want)


def test_examples_of_one_class_are_no_contrast(device: torch.device) -> None:
    s = S.float().to(device).requires_grad_()
    loss = d.contrastive(s, T.float().to(device), torch.zeros(4, device=device).long())
    (gradient,) = torch.autograd.grad(loss, s)
    assert gradient.isfinite().all()
    # Only the true pairs count, against a noise of one.
    e = (F.normalize(S) @ F.normalize(T).T / 0.1).exp()
    want = 2 * -(e.diagonal() / (e.diagonal() + e.mean())).log().mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)


def test_one_other_example_is_one_noise(device: torch.device) -> None:
    s, t = (x[:2].float().to(device) for x in (S, T))
    want = contrastive(S[:2].tolist(), T[:2].tolist(), 0.5)
    got = d.contrastive(s, t, Y[:2].to(device), temperature=0.5)
    assert got.item() == pytest.approx(want, rel=1e-4)


def test_contrast_is_computed_in_single_precision(device: torch.device) -> None:
    y = Y.to(device)
    s, t = (x.to(device, torch.bfloat16) for x in (S, T))
    want = d.contrastive(s.float(), t.float(), y)
    with torch.autocast(device.type, torch.bfloat16):
        got = d.contrastive(s, t, y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(d.contrastive(s.float(), t, y), want)
    if device.type != "mps":
        torch.testing.assert_close(d.contrastive(s.float(), t.double(), y), want)


def nets(device: torch.device | str = "cpu") -> tuple[nn.Module, nn.Module]:
    return networks.TeacherNet().to(device), networks.StudentNet().to(device)


def batch(device: torch.device | str, count: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 1, 28, 28, device=device), torch.arange(count, device=device) % 10


def test_contrast_maps_the_pooled_features_of_both(device: torch.device) -> None:
    teacher, student = nets(device)
    x, y = batch(device)
    pair = {"conv3": "residual3"}
    objective = d.contrast(teacher, student, pair, x[:2], weight=0.5, temperature=0.3)
    got = objective(student.eval(), (x, y))
    maps = objective.adapters[0]
    with d.watch(student, ["conv3"]) as ours, d.watch(teacher.eval(), ["residual3"]) as theirs:
        logits, _ = student(x), teacher(x)
        s = maps.student(ours["conv3"].mean((2, 3)))
        t = maps.teacher(theirs["residual3"].mean((2, 3)))
        want = F.cross_entropy(logits, y) + 0.5 * d.contrastive(s, t, y, temperature=0.3)
    assert s.shape == t.shape == (8, 128)
    torch.testing.assert_close(got, want)
    got.backward()
    assert all(p.grad is not None for p in objective.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_contrast_learns_from_cached_features(device: torch.device) -> None:
    teacher, student = nets(device)
    x, y = batch(device, 20)
    examples = Examples(x, y)
    cached = d.cache_outputs(teacher, examples, names=["residual3"])
    objective = d.contrast(cached, student, {"conv3": "residual3"}, x[:2])
    history = training.train(
        student, data.batches(cached.number(examples), 20), objective,
        descent.fused_adamw(nn.ModuleList([student, objective]), 0.01), epochs=20, device=device,
        progress=False,
    )  # fmt: skip
    assert history.losses[-1] < 0.9 * history.losses[0]


# Heads in between


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_each_head_is_weighed_and_the_last_layer_teaches(
    share: float, device: torch.device
) -> None:
    student = networks.StudentNet().to(device).eval()
    x, y = batch(device)
    objective = d.deep_supervision(student, ["conv1", "conv2"], x[:2], weight=0.5, share=share,
                                   temperature=2.0)  # fmt: skip
    got = objective(student, (x, y))
    with d.watch(student, ["conv1", "conv2"]) as found:
        z = student(x)
        want = F.cross_entropy(z, y)
        for name, head in zip(("conv1", "conv2"), objective.heads, strict=True):
            h = head(found[name].mean((2, 3)))
            kl = F.kl_div((h / 2).log_softmax(1), (z.detach() / 2).softmax(1),
                          reduction="batchmean")  # fmt: skip
            want = want + 0.5 * ((1 - share) * F.cross_entropy(h, y) + share * 4 * kl)
    torch.testing.assert_close(got, want)
    parameters = [*student.parameters(), *objective.parameters()]
    for ours, theirs in zip(
        *(torch.autograd.grad(x, parameters) for x in (got, want)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert list(objective.parts) == ["labels", "head conv1", "head conv2"]
    assert sum(objective.parts.values()).item() == pytest.approx(got.item(), rel=1e-5)


def test_heads_fit_maps_tokens_and_vectors(device: torch.device) -> None:
    x, y = batch(device)
    transformer = networks.TinyTransformer(dim=16, depth=2).to(device)
    objective = d.deep_supervision(transformer, ["embed", "layers.0"], x)
    assert [head.in_features for head in objective.heads] == [16, 16]
    with d.watch(transformer.eval(), ["layers.0"]) as found:
        logits = transformer(x)
        said = objective.heads[1](found["layers.0"].mean(1))
        want = 0.3 * F.cross_entropy(said, y)
    objective(transformer, (x, y))
    torch.testing.assert_close(objective.parts["head layers.0"], want.detach())
    torch.testing.assert_close(objective.parts["labels"], F.cross_entropy(logits, y).detach())
    flat = networks.LeNet300((8, 6)).to(device)
    assert d.deep_supervision(flat, ["fc2"], x).heads[0].in_features == 6


def test_heads_are_trained_and_reach_the_early_layer(device: torch.device) -> None:
    student = networks.StudentNet().to(device)
    x, y = batch(device)
    objective = d.deep_supervision(student, ["conv1"], x[:2], weight=1.0)
    before = copy.deepcopy(objective.heads.state_dict())
    optimizer = descent.fused_adamw(nn.ModuleList([student, objective]), 0.01)
    training.train(student, [(x, y)], objective, optimizer, epochs=20, device=device,
                   progress=False)  # fmt: skip
    assert not torch.equal(before["0.weight"], objective.heads[0].weight)
    with d.watch(student.eval(), ["conv1"]) as found, torch.no_grad():
        student(x)
        loss = F.cross_entropy(objective.heads[0](found["conv1"].mean((2, 3))), y)
    assert loss < math.log(10)
    assert "forward" not in vars(student.conv1)


# Transformers


@given(st.integers(1, 12), st.integers(0, 12))
def test_layers_are_mapped_in_order_and_end_at_the_last(ours: int, more: int) -> None:
    names = [str(n) for n in range(1, ours + more + 1)]
    for last in (False, True):
        found = [
            int(n) for n in d.map_layers(list("abcdefghijkl"[:ours]), names, last=last).values()
        ]
        assert len(found) == ours
        assert found[-1] == ours + more
        steps = [b - a for a, b in zip([0, *found], found, strict=False)]
        assert min(steps) >= 1
        assert max(steps[1:], default=1) == 1 if last else max(steps) - min(steps) <= 1


def test_four_of_twelve_as_in_the_paper() -> None:
    names = [f"layer.{n}" for n in range(1, 13)]
    found = d.map_layers(list("abcd"), names)
    assert list(found.values()) == ["layer.3", "layer.6", "layer.9", "layer.12"]  # g(m) = 3·m
    assert d.map_layers(["a", "b"], list("12345")) == {"a": "3", "b": "5"}  # rounded up


def test_relations_know_no_rotation_of_a_head(device: torch.device) -> None:
    s, t = (x.float().to(device) for x in TOKENS)
    turn, _ = torch.linalg.qr(torch.randn(4, 4).double())
    turn = turn.float().to(device)
    turned = s.unflatten(2, (3, -1)) @ turn
    for heads, same in ((1, True), (2, False)):
        ours = partial(d.token_relations, heads=heads, parts=3)
        assert torch.allclose(ours(turned.flatten(2), t), ours(s, t), rtol=1e-4) == same


def test_scores_are_those_that_attention_takes(device: torch.device) -> None:
    """softmax of them, times the values, is what torch's attention gives."""
    layer = networks.EncoderLayer(16, 2, 32).to(device)
    qkv = layer.qkv(torch.randn(2, 5, 16, device=device))
    # Against a teacher of scores 0, the loss is the mean square of the student's scores.
    got = d.attention_scores(qkv, torch.zeros_like(qkv), heads=2)
    query, key, value = qkv.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    scores = query @ key.transpose(2, 3) / math.sqrt(8)
    torch.testing.assert_close(
        scores.softmax(3) @ value, F.scaled_dot_product_attention(query, key, value),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    torch.testing.assert_close(got, scores.square().mean(), rtol=1e-3, atol=1e-5)


def test_a_smaller_transformer_learns_its_teachers_attention(device: torch.device) -> None:
    teacher = networks.TinyTransformer(dim=32, depth=4).to(device)
    student = networks.TinyTransformer(dim=16, depth=2).to(device)
    x, y = batch(device)
    layers = d.map_layers([f"layers.{n}" for n in range(2)], [f"layers.{n}" for n in range(4)])
    assert layers == {"layers.0": "layers.1", "layers.1": "layers.3"}
    qkv = {f"{ours}.qkv": f"{theirs}.qkv" for ours, theirs in layers.items()}
    objective = d.together(
        d.hints(teacher, student, layers, x),
        d.from_features(teacher, qkv, d.token_relations, heads=4, parts=3),
        d.from_features(teacher, qkv, d.attention_scores, heads=2),
        label_weight=0.0,
    )
    optimizer = descent.fused_adamw(nn.ModuleList([student, objective]), 0.01)
    objective(student, (x, y))
    first = dict(objective.parts)
    assert len(first) == 6
    training.train(student, [(x, y)], objective, optimizer, epochs=40, device=device,
                   progress=False)  # fmt: skip
    assert all(objective.parts[name] < first[name] for name in first)


# Dreams


class Normed(nn.Module):
    """Two batch norms, of maps and of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(2), nn.BatchNorm1d(3)
        self.map, self.fc = nn.Linear(2, 3), nn.Linear(3, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.second(self.map(self.first(inputs).mean((2, 3)))))


def test_the_gap_is_that_of_the_statistics(device: torch.device) -> None:
    model = Normed().to(device)
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    x = torch.randn(6, 2, 3, 3, device=device, requires_grad=True)
    logits, gap = d.statistics_gap(model, x)
    want = 0.0
    evaluated = copy.deepcopy(model).eval()
    maps = x.detach()
    vectors = evaluated.map(evaluated.first(maps).mean((2, 3))).detach()
    for layer, seen in ((evaluated.first, maps.permute(0, 2, 3, 1).flatten(0, 2)),
                        (evaluated.second, vectors)):  # fmt: skip
        center = seen.sum(0) / len(seen)
        spread = ((seen - center) ** 2).sum(0) / len(seen)
        want += float((center - layer.running_mean).square().sum().sqrt())
        want += float((spread - layer.running_var).square().sum().sqrt())
    assert gap.item() == pytest.approx(want, rel=1e-4)
    torch.testing.assert_close(logits, evaluated(x))
    (gradient,) = torch.autograd.grad(gap, x)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_what_a_batch_norm_saw_last_has_no_gap(device: torch.device) -> None:
    """Momentum 1 keeps the statistics of one batch, but for the factor n / (n - 1)."""
    layer = nn.BatchNorm1d(3, momentum=1.0).to(device)
    x = torch.randn(50, 3, device=device)
    layer.train()(x)
    layer.running_var *= 49 / 50
    assert d.statistics_gap(layer, x)[1] < 1e-5
    assert d.statistics_gap(layer, x + 1)[1].item() == pytest.approx(math.sqrt(3), rel=1e-4)


def test_dreams_are_taken_for_their_labels_and_fit_the_statistics(device: torch.device) -> None:
    teacher = networks.StudentNet().to(device)
    x, y = batch(device, 20)
    training.train(teacher, [(x, y)], training.supervised(), descent.fused_adamw(teacher, 0.02),
                   epochs=30, device=device, progress=False)  # fmt: skip
    teacher.train()
    teacher.conv1.eval()
    teacher.zero_grad()
    before, modes = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    start = torch.randn(20, 1, 28, 28, device=device)
    kept = start.clone()
    images, smooth = (d.dream(teacher, start, y, steps=40, weights=(1.0, b)) for b in (0.0, 9.0))
    assert torch.equal(start, kept)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [m.training for m in teacher.modules()] == modes
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m._forward_pre_hooks for m in teacher.modules())
    asked = d.Teacher(teacher)
    assert (asked.teach(images, None).logits.argmax(1) == y).float().mean() > 0.9
    assert d.statistics_gap(teacher, images)[1] < 0.5 * d.statistics_gap(teacher, start)[1]
    assert d.total_variation(smooth) < 0.8 * d.total_variation(images)


def test_statistics_of_compiled_parts_count_too(device: torch.device) -> None:
    """Compiled before it is asked, a part calls no hook: half of the gap would be the whole."""
    teacher = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)), nn.BatchNorm2d(3), nn.Flatten()
    ).to(device).eval()  # fmt: skip
    x = torch.randn(5, 1, 6, 6, device=device)
    expected = d.statistics_gap(teacher, x)
    assert isinstance(teacher[0], nn.Module)
    teacher[0].compile(backend="eager")
    teacher(x)
    torch.testing.assert_close(d.statistics_gap(teacher, x), expected)
    teacher.forward = nn.Flatten().forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="calls none of its batch norms"):
        d.statistics_gap(teacher, x)


def test_dreams_need_no_gradients_around_them(device: torch.device) -> None:
    teacher = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3)).to(device)
    start, y = torch.randn(6, 1, 4, 4, device=device), torch.arange(6, device=device) % 3
    expected = d.dream(teacher, start, y, steps=2)
    for around in (torch.no_grad(), torch.inference_mode()):
        with around:
            assert torch.equal(d.dream(teacher, start.clone(), y, steps=2), expected)


def test_one_step_of_a_dream_is_one_of_adam(device: torch.device) -> None:
    """Whose first step is the learning rate in each pixel, against the gradient."""
    teacher = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3)).to(device)
    start, labels = torch.randn(6, 1, 4, 4, device=device), torch.arange(6, device=device) % 3
    x = start.clone().requires_grad_()
    logits, gap = d.statistics_gap(teacher, x)
    loss = F.cross_entropy(logits, labels) + 2 * gap + 0.3 * d.total_variation(x)
    (slope,) = torch.autograd.grad(loss, x)
    images = d.dream(teacher, start, labels, steps=1, lr=0.25, weights=(2.0, 0.3))
    torch.testing.assert_close(images, start - 0.25 * slope.sign(), rtol=1e-3, atol=1e-3)


def test_dreams_move_on_under_autocast(device: torch.device) -> None:
    """It keeps what it has cast of a leaf: the teacher would see the first images for ever."""
    teacher = networks.StudentNet().to(device)
    x, y = batch(device, 20)
    gaps = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            images = d.dream(teacher, 3 * x, y, steps=40)
        gaps.append(d.statistics_gap(teacher, images)[1].item())
    assert gaps[1] == pytest.approx(gaps[0], rel=0.2)


def test_hooks_go_when_the_teacher_fails() -> None:
    teacher = networks.TeacherNet()
    with pytest.raises(ValueError, match="28"):
        d.statistics_gap(teacher, torch.zeros(1, 1, 9, 9))
    assert not any(m._forward_pre_hooks for m in teacher.modules())


# Bad input


def bad() -> list[tuple[str, Callable[[], object]]]:
    teacher, student = nets()
    x, y = batch("cpu")
    flat, three = torch.zeros(4, 5), torch.zeros(2, 3, 12)
    deep: Callable[..., Any] = partial(d.deep_supervision, student)
    pair = {"conv3": "residual3"}
    return [
        (r"embeddings \(B, D\) of both, not \(4, 5\) and \(4, 6\)",
         lambda: d.contrastive(flat, torch.zeros(4, 6), Y)),
        (r"of both, not \(2, 3, 12\) and \(2, 3, 12\)",
         lambda: d.contrastive(three, three, Y[:2])),
        (r"class indices \(4,\), not \(3,\)", lambda: d.contrastive(flat, flat, Y[:3])),
        *((rf"finite number above 0, not {t}", partial(ask, temperature=t)) for t in (0, math.inf)
          for ask in (partial(d.contrastive, flat, flat, Y),
                      partial(d.contrast, teacher, student, pair, x))),
        (r"name a pair of layers", lambda: d.contrast(teacher, student, {}, x)),
        (r"no layer 'conv9'", lambda: d.contrast(teacher, student, {"conv9": "fc"}, x)),
        (r"weight counts.*-1", lambda: d.contrast(teacher, student, pair, x, weight=-1)),
        (r"get a classifier", lambda: deep([], x)),
        (r"no layer 'conv9'; near", lambda: deep(["conv9"], x)),
        (r"not -1 and 0.0", lambda: deep(["conv1"], x, weight=-1)),
        (r"not 0.3 and 1.5", lambda: deep(["conv1"], x, share=1.5)),
        (r"above 0, not 0", lambda: deep(["conv1"], x, temperature=0)),
        (r"above 0, not inf", lambda: deep(["conv1"], x, temperature=math.inf)),
        (r"\(1, 2, 2, 2, 2\) cannot be pooled",
         lambda: d.deep_supervision(
             nn.Sequential(nn.Unflatten(1, (2, 2, 2, 2)), nn.Flatten()), ["0"], torch.ones(1, 16))),
        (r"student of 2 layers and a teacher of 1", lambda: d.map_layers(["a", "b"], ["c"])),
        (r"student of 0 layers", lambda: d.map_layers([], ["c"])),
        (r"not \(4, 5\) and \(4, 5\)", lambda: d.token_relations(flat, flat)),
        (r"not \(2, 3, 12\) and \(2, 2, 12\)",
         lambda: d.attention_scores(three, three[:, :2], heads=1)),
        (r"1 parts of 5 heads do not divide vectors of 12",
         lambda: d.token_relations(three, three, heads=5)),
        (r"3 parts of 3 heads", lambda: d.attention_scores(three, three, heads=3)),
        (r"1 parts of 0 heads", lambda: d.token_relations(three, three, heads=0)),
        (r"no batch norm", lambda: d.statistics_gap(networks.LeNet5(), x)),
        (r"no batch norm",
         lambda: d.statistics_gap(nn.BatchNorm2d(1, track_running_stats=False), x)),
        (r"neighbouring pixels, \(4, 5\) not", lambda: d.total_variation(flat)),
        (r"neighbouring pixels, \(1, 1, 1, 28\)", lambda: d.total_variation(x[:1, :, :1])),
        (r"not 0, 0.1", lambda: d.dream(teacher, x, y, steps=0)),
        (r"not 1, 0,", lambda: d.dream(teacher, x, y, steps=1, lr=0)),
        (r"\(-1.0, 0.0\)", lambda: d.dream(teacher, x, y, steps=1, weights=(-1.0, 0.0))),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(bad())))
def test_bad_input_is_named(number: int) -> None:
    message, call = bad()[number]
    with pytest.raises(ValueError, match=message):
        call()
