"""Logits with positions: what padding, masks and the place of the classes do to a lesson."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structopt import distillation as d
from structopt import losses, pruning
from structopt.slicing import Sandwich, Slimmable

B, C, T = 3, 5, 4
LOSSES = [d.soft_targets, d.standardised_logits, d.logit_mse, d.decoupled, d.correlations]
ALL = [*LOSSES, losses.kl_divergence]


class Says(nn.Module):
    """Logits, whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits * 1


def lesson(*positions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of student and teacher, labels, and which positions count."""
    s, t = (torch.randn(B, C, *positions, dtype=torch.double) for _ in range(2))
    counts = torch.rand(B, *positions) < 0.6
    counts[..., 0] = True
    return s, t, torch.randint(C, (B, *positions)), counts


def rows(x: Tensor, counts: Tensor) -> Tensor:
    return x.movedim(1, -1)[counts] if x.ndim > counts.ndim else x[counts]


def with_labels(loss: Callable[..., Tensor], y: Tensor, **settings: Any) -> Callable[..., Tensor]:
    return (
        partial(loss, targets=y, **settings) if loss is d.decoupled else partial(loss, **settings)
    )


@pytest.mark.parametrize("junk", [7.0, math.nan, math.inf])
@pytest.mark.parametrize("loss", ALL)
def test_what_does_not_count_is_not_there(loss: Callable[..., Tensor], junk: float) -> None:
    """The loss and its gradient are those of the rows that count, whatever stands elsewhere."""
    for positions in ((T,), (T, 2)):
        s, t, y, counts = lesson(*positions)
        a, b = (rows(x, counts).requires_grad_() for x in (s, t))
        want = with_labels(loss, rows(y, counts))(a, b)
        rest = ~counts.unsqueeze(1)
        x, z = (v.masked_fill(rest, junk).requires_grad_() for v in (s, t))
        got = with_labels(loss, y.masked_fill(~counts, -100), counts=counts)(x, z)
        torch.testing.assert_close(got, want)
        slopes = torch.autograd.grad(got, (x, z))
        for slope, alone in zip(slopes, torch.autograd.grad(want, (a, b)), strict=True):
            torch.testing.assert_close(rows(slope, counts), alone)
            assert not slope[rest.expand_as(slope)].any()
        everything = with_labels(loss, y, counts=torch.ones_like(counts))(s, t)
        torch.testing.assert_close(everything, with_labels(loss, y)(s, t))


@pytest.mark.parametrize("loss", ALL)
def test_gradients_over_what_counts_are_finite_differences(loss: Callable[..., Tensor]) -> None:
    s, t, y, counts = lesson(T)
    s, t = s.requires_grad_(), t.requires_grad_()
    assert torch.autograd.gradcheck(with_labels(loss, y, counts=counts), (s, t))


TASKS = {
    "torch's": (losses.cross_entropy, -100),
    "a setting": (partial(losses.cross_entropy, ignore_index=255), 255),
    "a module's": (nn.CrossEntropyLoss(ignore_index=1), 1),
    "a default of one's own": (lambda z, y, ignore_index=-1: losses.cross_entropy(
        z, y, ignore_index=ignore_index), -1),
    "unsaid": (lambda z, y: F.cross_entropy(z, y), -100),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_padding_weighs_for_neither(loss: Callable[..., Tensor], name: str) -> None:
    """The objective of a padded batch is that of its tokens alone, as rows of a batch."""
    task, ignored = TASKS[name]
    s, t, y, counts = lesson(T)
    y = y.masked_fill(y == ignored, 0).masked_fill(~counts, ignored)
    for label_weight in (0.3, 0.0):
        build = partial(d.from_logits, loss=loss, label_weight=label_weight, task=task)
        student, alone = Says(s), Says(rows(s, counts))
        got = build(Says(t))(student, (s, y))
        want = build(Says(rows(t, counts)))(alone, (s, rows(y, counts)))
        torch.testing.assert_close(got, want)
        got.backward()
        want.backward()
        torch.testing.assert_close(rows(student.logits.grad, counts), alone.logits.grad)
        assert not student.logits.grad[~counts.unsqueeze(1).expand_as(s)].any()


def test_padding_weighs_in_no_other_lesson() -> None:
    s, t, y, counts = lesson(T)
    padded, kept = y.masked_fill(~counts, -100), rows(y, counts)
    few_s, few_t = rows(s, counts), rows(t, counts)
    for goal in (d.mutual(weight=0.7, temperature=2.0), d.mutual(task=nn.CrossEntropyLoss())):
        got = goal(nn.ModuleList([Says(s), Says(t)]), (s, padded))
        torch.testing.assert_close(
            got, goal(nn.ModuleList([Says(few_s), Says(few_t)]), (s, kept))
        )  # fmt: skip
    got = pruning.with_teacher(Says(t), temperature=3.0)(Says(s), (s, padded))
    want = pruning.with_teacher(Says(few_t), temperature=3.0)(Says(few_s), (s, kept))
    torch.testing.assert_close(got, want)


def test_narrow_widths_learn_nothing_of_padding() -> None:
    net = nn.Sequential(nn.Conv1d(2, 8, 1), nn.ReLU(), nn.Conv1d(8, C, 1)).double()
    x = torch.randn(B, 2, T, dtype=torch.double)
    _, _, y, counts = lesson(T)
    slimmable = Slimmable(net, x, [0.25, 0.5])
    kept = x.movedim(1, -1)[counts].unsqueeze(2)  # each token an example of its own
    got = Sandwich()(slimmable, (x, y.masked_fill(~counts, -100)))
    torch.testing.assert_close(got, Sandwich()(slimmable, (kept, y[counts].unsqueeze(1))))
    square = Sandwich(teach=losses.mse)(slimmable, (x, y))  # which knows nothing of positions
    assert square.isfinite()


def test_an_example_without_a_label_still_learns_from_its_teacher() -> None:
    """Ignored for the label loss alone: nobody knows its class, and the teacher has an opinion."""
    s, t, y, _ = lesson()
    y[0] = -100
    want = losses.cross_entropy(s, y) + d.soft_targets(s, t)
    torch.testing.assert_close(d.from_logits(Says(t))(Says(s), (s, y)), want)


def test_a_loss_of_ones_own_is_told_what_counts_if_it_asks() -> None:
    s, t, y, counts = lesson(T)
    padded, told = y.masked_fill(~counts, -100), []

    def asking(student: Tensor, teacher: Tensor, counts: Tensor | None) -> Tensor:
        told.append(counts)
        return (student - teacher).square().mean()

    def whole(student: Tensor, teacher: Tensor) -> Tensor:
        return d.logit_mse(student, teacher)

    d.from_logits(Says(t), asking)(Says(s), (s, padded))
    d.from_logits(Says(t[..., 0]), asking)(Says(s[..., 0]), (s, y[:, 0]))
    assert torch.equal(told[0], counts)
    assert told[1] is None
    got = d.from_logits(Says(t), whole, label_weight=0)(Says(s), (s, padded))
    torch.testing.assert_close(got, d.logit_mse(s, t))
    builtin = d.from_logits(Says(t), torch.dist, label_weight=0)  # has no signature to read
    torch.testing.assert_close(builtin(Says(s), (s, y)), torch.dist(s, t))


def test_where_the_classes_stand_is_not_guessed() -> None:
    """(B, T, C) along T would be a number that looks like a loss."""
    s, t, y, _ = lesson(T)
    last = [Says(x.movedim(1, -1)) for x in (s, t)]
    for loss in LOSSES:
        goal = d.from_logits(last[1], loss, label_weight=0)
        for labels in (y, None, y[:, 0], "no labels"):
            with pytest.raises(ValueError, match=r"\(3, 4, 5\) are read as .*movedim\(-1, 1\)"):
                goal(last[0], (s, labels))
    for labels in (y, s.softmax(1)):
        got = d.from_logits(Says(t), label_weight=0)(Says(s), (s, labels))
        torch.testing.assert_close(got, d.soft_targets(s, t))
    own = d.from_logits(last[1], lambda a, b: (a - b).square().mean(), label_weight=0)
    torch.testing.assert_close(own(last[0], (s, None)), F.mse_loss(s, t))  # its own affair
    s, t, y, _ = lesson(T, 2)  # of maps the classes stand second
    got = d.from_logits(Says(t), label_weight=0)(Says(s), (s, None))
    torch.testing.assert_close(got, d.soft_targets(s, t))
    with pytest.raises(ValueError, match=r"\(3, 4, 2, 5\) are read as"):
        d.from_logits(Says(t.movedim(1, -1)), label_weight=0)(Says(s.movedim(1, -1)), (s, y))


@pytest.mark.parametrize("loss", [d.soft_targets, d.decoupled, d.correlations])
def test_classes_that_a_mask_hides_count_as_if_they_were_not_there(
    loss: Callable[..., Tensor],
) -> None:
    s, t, y, _ = lesson()
    y = y.clamp(max=2)
    few = [x[:, :3].clone().requires_grad_() for x in (s, t)]
    hidden = torch.arange(C) >= 3
    all_of_them = [x.masked_fill(hidden, -math.inf).requires_grad_() for x in (s, t)]
    want, got = (with_labels(loss, y)(*pair) for pair in (few, all_of_them))
    if loss is not d.correlations:  # whose classes are columns, and zeros among them
        torch.testing.assert_close(got, want)
        for slope, alone in zip(
            torch.autograd.grad(got, all_of_them), torch.autograd.grad(want, few), strict=True
        ):
            torch.testing.assert_close(slope[:, :3], alone)
            assert not slope[:, 3:].any()
    likely = s.requires_grad_()  # a student that does not mask what its teacher excludes
    value = with_labels(loss, y)(likely, all_of_them[1])
    assert value.isfinite()
    assert torch.autograd.grad(value, likely)[0].isfinite().all()


def test_bad_counts_are_named() -> None:
    s, t, y, counts = lesson(T)
    for loss in ALL:
        call = with_labels(loss, y)
        for wrong in (counts.int(), counts[:, :2], counts.unsqueeze(1)):
            with pytest.raises(ValueError, match="counts says which positions of logits"):
                call(s, t, counts=wrong)
        with pytest.raises(ValueError, match="no target counts"):
            call(s, t, counts=torch.zeros_like(counts))
        broken = t.clone()
        broken[0, 0, 0] = math.nan
        with pytest.raises(FloatingPointError, match=r"the target holds [15] NaN of 60"):
            call(s, broken)
    with pytest.raises(ValueError, match="counts says which positions of logits"):
        losses.kl_divergence(s[0, :, 0], t[0, :, 0], counts=counts[0, 0])
    with pytest.raises(ValueError, match="has no setting 'counts'; it has temperature"):
        d.from_logits(Says(t), counts=counts)


def test_padding_of_the_logits_is_none_of_the_features() -> None:
    """A loss between layers sees them whole, whatever labels say of the positions of logits."""
    s, t, y, counts = lesson(T)
    shape = nn.Flatten(), nn.Unflatten(1, (C, T))
    student, teacher = (nn.Sequential(Says(x), *shape) for x in (s, t))
    pair = {"1": "1"}
    objective = d.from_features(teacher, pair, d.soft_targets, label_weight=0, temperature=2.0)
    found = objective(student, (torch.zeros(B, 1), y.masked_fill(~counts, -100)))
    want = d.soft_targets(s.flatten(1), t.flatten(1), temperature=2.0)
    torch.testing.assert_close(found, want)
