"""Each loss is its paper's formula: written again in plain Python, kept as a table, and by laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from distillation_formulas import CASES, EMBEDDINGS, MAPS, B, C, S, T, waves
from hypothesis import given
from hypothesis import strategies as st

from structopt import distillation as d

# Losses that are 0 where student and teacher say the same, and that compute in single precision.
ALIKE = [name for name in CASES if name not in {"contrastive", "total variation"}]


@pytest.mark.parametrize("name", CASES)
def test_the_formula_of_the_paper(name: str, device: torch.device) -> None:
    ours, inputs, theirs, kept = CASES[name]
    want = theirs()
    assert want == pytest.approx(kept, rel=1e-6)
    if device.type != "mps":
        got = ours(*(x.to(device) for x in inputs))
        assert got.dtype == torch.double
        assert got.item() == pytest.approx(want, rel=1e-10)
    single = ours(*(x.float().to(device) for x in inputs))
    assert single.dtype == torch.float32
    assert single.ndim == 0
    assert single.item() == pytest.approx(want, rel=1e-4)


# Mutual learning and contrast stop some gradients on purpose, and have tests of their own.
@pytest.mark.parametrize("name", sorted({*CASES} - {"mutual", "contrastive"}))
def test_gradients_are_finite_differences(name: str) -> None:
    ours, inputs, _, _ = CASES[name]
    assert torch.autograd.gradcheck(ours, tuple(x.clone().requires_grad_() for x in inputs))


def test_mutual_gradient_is_that_of_each_alone() -> None:
    s, t = S.clone().requires_grad_(), T.clone().requires_grad_()
    got = torch.autograd.grad(d.mutual_loss([s, t]), (s, t))
    alone = d.soft_targets(s, T, temperature=1.0), d.soft_targets(t, S, temperature=1.0)
    want = [torch.autograd.grad(loss, x)[0] for loss, x in zip(alone, (s, t), strict=True)]
    torch.testing.assert_close(list(got), want)


@pytest.mark.parametrize("name", ALIKE)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    name: str, device: torch.device
) -> None:
    ours, (_, x), _, _ = CASES[name]
    if name == "mutual":
        ours = lambda s, t: d.mutual_loss([s, t, t])  # noqa: E731
    same = x.float().to(device)
    student = same.clone().requires_grad_()
    loss = ours(student, same)
    assert abs(loss.item()) < 1e-5
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALIKE)
def test_half_precision_is_computed_in_single(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    ours, pair, _, _ = CASES[name]
    s, t = (x.to(device, dtype) for x in pair)
    with torch.autocast(device.type, torch.bfloat16):
        got = ours(s.requires_grad_(), t)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, ours(s.detach().float(), t.float()))
    (gradient,) = torch.autograd.grad(got, s)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


# Laws


@given(st.floats(0.5, 20), st.integers(0, 9))
def test_kl_is_target_class_plus_the_rest(temperature: float, seed: int) -> None:
    """Zhao et al.: KL = TCKD + (1 - q_y)·NCKD, example by example."""
    torch.manual_seed(seed)
    s, t = (torch.randn(1, C, dtype=torch.double) for _ in range(2))
    sure = (t / temperature).softmax(1)[0, 1].item()
    y = torch.tensor([1])
    whole = d.soft_targets(s, t, temperature=temperature)
    parts = d.decoupled(s, t, y, temperature=temperature, alpha=1.0, beta=1 - sure)
    torch.testing.assert_close(whole, parts)


def test_gradient_keeps_its_size_over_temperature(device: torch.device) -> None:
    """Without T² it falls as 1/T²; with it, it settles at (s - t)/C of centred logits."""
    s, t = S.float().to(device), T.float().to(device)
    s, t = (x - x.mean(1, keepdim=True) for x in (s, t))
    for temperature in (200.0, 400.0):
        x = s.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(d.soft_targets(x, t, temperature=temperature), x)
        torch.testing.assert_close(gradient * B, (s - t) / C, rtol=0.1, atol=0.02)


def test_hot_soft_targets_are_half_the_squared_error() -> None:
    s, t = (x - x.mean(1, keepdim=True) for x in (S, T))
    hot = d.soft_targets(s, t, temperature=1e4)
    torch.testing.assert_close(hot, 0.5 * d.logit_mse(s, t), rtol=1e-3, atol=0)


@given(st.floats(0.1, 50), st.floats(-20, 20), st.booleans())
def test_standardised_logits_know_no_size_and_no_shift(a: float, b: float, mine: bool) -> None:
    moved = d.standardised_logits(a * S + b, T) if mine else d.standardised_logits(S, a * T + b)
    torch.testing.assert_close(moved, d.standardised_logits(S, T))


@given(st.floats(0.1, 50), st.floats(0.1, 50))
def test_attention_and_similarity_know_no_size(a: float, b: float) -> None:
    for loss in (d.attention_transfer, d.similarity_preserving):
        torch.testing.assert_close(loss(a * MAPS[0], b * MAPS[1]), loss(*MAPS))


@given(st.integers(0, 20), st.floats(0.1, 10))
def test_relations_know_neither_isometry_nor_size(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.double))
    moved = scale * EMBEDDINGS[0] @ turn + torch.randn(3, dtype=torch.double)
    for loss in (d.relational_distance, d.relational_angle):
        torch.testing.assert_close(loss(moved, EMBEDDINGS[1]), loss(*EMBEDDINGS))


@given(st.permutations(range(B)))
def test_the_order_of_the_batch_does_not_matter(order: list[int]) -> None:
    for name in ALIKE:
        ours, (s, t), _, _ = CASES[name]
        rows = [n for n in order if n < len(s)]
        if name != "decoupled":  # its labels would have to move too
            torch.testing.assert_close(ours(s[rows], t[rows]), ours(s, t))


def test_correlation_follows_linear_maps_of_the_predictions() -> None:
    p, q = (x.softmax(1) for x in (S, T))
    for a, b in ((0.5, 0.1), (1.0, 0.0)):  # a·p + b, again positive rows; logits are their logs
        mapped = a * p + b
        torch.testing.assert_close(
            d.correlations((mapped / mapped.sum(1, keepdim=True)).log(), q.log(), temperature=1.0),
            d.correlations(S, T, temperature=1.0),
        )


@pytest.mark.parametrize("name", ["soft targets", "standardised logits", "correlations"])
def test_pixels_are_examples(name: str, device: torch.device) -> None:
    """Logits (B, C, H, W) are B·H·W rows, as in segmentation."""
    ours = CASES[name][0]
    s, t = (waves(2, C, 3, 2, phase=p).float().to(device) for p in (0.1, 1.3))
    rows = [x.movedim(1, -1).reshape(-1, C) for x in (s, t)]
    torch.testing.assert_close(ours(s, t), ours(*rows))


def test_maps_of_other_sizes_are_averaged_down(device: torch.device) -> None:
    small = waves(B, 3, 2, 2, phase=0.4).float().to(device)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert d.attention_transfer(small, large).abs() < 1e-6
    assert d.attention_transfer(large, small).abs() < 1e-6
    other = torch.rand(B, 5, 4, 4, device=device)
    squares = [x.square().sum(1, keepdim=True) for x in (small, other)]
    pooled = torch.nn.functional.avg_pool2d(squares[1], 2)  # never the small one stretched
    want = d.attention_transfer(squares[0], pooled, power=1.0)
    torch.testing.assert_close(d.attention_transfer(small, other), want)
    torch.testing.assert_close(d.attention_transfer(other, small), want)


def test_relations_of_maps_are_those_of_their_means(device: torch.device) -> None:
    s, t = torch.randn(B, 3, 4, 4, device=device), torch.randn(B, 6, 2, 2, device=device)
    for loss in (d.relational_distance, d.relational_angle):
        torch.testing.assert_close(loss(s, t), loss(s.mean((2, 3)), t.mean((2, 3))))


def test_equal_examples_have_a_finite_gradient(device: torch.device) -> None:
    same = torch.ones(4, 3, device=device).requires_grad_()
    other = EMBEDDINGS[1].float().to(device)
    for loss in (d.relational_distance, d.relational_angle, d.similarity_preserving):
        (gradient,) = torch.autograd.grad(loss(same, other), same)
        assert gradient.isfinite().all(), loss.__name__
    flat = torch.ones(4, 5, device=device).requires_grad_()
    for loss in (d.standardised_logits, d.correlations):
        (gradient,) = torch.autograd.grad(loss(flat, T.float().to(device)), flat)
        assert gradient.isfinite().all(), loss.__name__


LOGITS = ["soft targets", "standardised logits", "MSE of logits", "correlations", "mutual"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*LOGITS, "decoupled"])
def test_huge_constant_and_single_logits_have_a_sound_gradient(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """The gradient is that in double precision, and no NaN hides in what is multiplied by 0."""
    ours = CASES[name][0]
    sure = 1e4 * (2 * torch.nn.functional.one_hot(torch.tensor([0, 4, 2, 2]), C) - 1.0)
    wrong, same = sure.roll(1, 1), torch.full((B, C), 1e4)
    one = slice(0, 1 if name in LOGITS else B)
    for s, t in ((S, sure), (sure, T), (sure, wrong), (sure, sure), (same, sure), (S, same),
                 (S[one], T[one]), (S[one], sure[one])):  # fmt: skip
        found = []
        for kind in (dtype, torch.double):
            if kind == torch.double and device.type == "mps":
                continue
            x = s.to(dtype).to(device, kind, copy=True).requires_grad_()
            loss = ours(x, t.to(dtype).to(device, kind))
            (gradient,) = torch.autograd.grad(loss, x)
            assert loss.isfinite()
            assert gradient.isfinite().all()
            found.append(gradient.double())
        torch.testing.assert_close(found[0], found[-1], rtol=2e-2, atol=1e-2)


def test_constant_and_equal_vectors_get_no_gradient(device: torch.device) -> None:
    """Where a vector has no direction; one over a small number would be a step to nowhere."""
    other = waves(B, 7, phase=0.3).float().to(device)
    for value in (0.0, 0.1, -10000.1):  # seven times these, divided by 7, is another number
        flat = torch.full((B, 7), value, device=device).requires_grad_()
        for loss in (d.standardised_logits, d.correlations):
            (gradient,) = torch.autograd.grad(loss(flat, other), flat)
            assert not gradient.any(), loss.__name__
    twice = EMBEDDINGS[0].float().to(device)[[0, 0, 1, 2]].requires_grad_()
    apart = EMBEDDINGS[1].float().to(device)
    for loss in (d.relational_angle, d.relational_distance):
        (gradient,) = torch.autograd.grad(loss(twice, apart), twice)
        assert 0 < gradient.abs().max() < 10, loss.__name__
    dead = torch.zeros(B, 6, device=device).requires_grad_()
    labels = torch.arange(B, device=device)
    found = torch.autograd.grad(d.contrastive(dead, T.float().to(device).repeat(1, 2)[:, :6],
                                              labels), dead)[0]  # fmt: skip
    assert not found.any()


# Bad input


X = torch.zeros(4, 5)
BAD: list[tuple[str, Callable[[], object]]] = [
    (r"logits \(4, 5\), the teacher \(4, 6\).*same classes",
     lambda: d.soft_targets(X, torch.zeros(4, 6))),
    (r"logits \(4, 5\), the teacher \(4, 6\)", lambda: d.logit_mse(X, torch.zeros(4, 6))),
    (r"logits \(4, 5\), the teacher \(4, 6\)", lambda: d.correlations(X, torch.zeros(4, 6))),
    (r"logits \(5,\)", lambda: d.standardised_logits(X[0], X[0])),
    *((r"temperature .* above 0, not 0", partial(loss, X, X, temperature=0))
      for loss in (d.soft_targets, d.standardised_logits, d.correlations)),
    (r"above 0, not -1", lambda: d.decoupled(X, X, torch.zeros(4).long(), temperature=-1)),
    (r"above 0, not nan", lambda: d.soft_targets(X, X, temperature=math.nan)),
    (r"class indices \(4,\), not torch.float32", lambda: d.decoupled(X, X, torch.zeros(4))),
    (r"of shape \(4, 2\)", lambda: d.decoupled(X, X, torch.zeros(4, 2).long())),
    (r"differ", lambda: d.hint(X, X[:, :3])),
    (r"maps .* not \(4, 5\) and \(4, 5\)", lambda: d.attention_transfer(X, X)),
    (r"not \(4, 5, 1, 1\) and \(2, 5, 1, 1\)",
     lambda: d.attention_transfer(X[..., None, None], X[:2, :, None, None])),
    *((rf"least 1, not {p}", partial(d.attention_transfer, X[..., None], X[..., None], power=p))
      for p in (0.5, -1.0, math.inf, math.nan)),  # below 1 a silent unit makes the gradient NaN
    (r"at least 2 classes", lambda: d.decoupled(X[:, :1], X[:, :1], torch.zeros(4).long())),
    *((rf"label {y}: with 5 logits labels run from 0 to 4",
       partial(d.decoupled, X, X, torch.tensor([0, 1, y, 2]))) for y in (-100, 5)),
    (r"5 tokens and 3", lambda: d.attention_transfer(X[..., None], X[:, :3, None])),
    (r"4 examples and of 2", lambda: d.similarity_preserving(X, X[:2])),
    (r"4 examples and of 2", lambda: d.relational_angle(X, X[:2])),
    (r"at least 2 examples", lambda: d.relational_distance(X[:1], X[:1])),
    (r"at least 3 examples", lambda: d.relational_angle(X[:2], X[:2])),
    (r"at least 2 students, not 1", lambda: d.mutual_loss([X])),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), BAD)
def test_bad_input_is_named(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
