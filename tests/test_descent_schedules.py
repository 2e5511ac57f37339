"""Schedules equal torch's schedulers, and stay within what they promise."""

import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from structopt import descent

TOTAL = 40
PAIRS = {
    "constant": (descent.constant(), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "step": (
        descent.step_decay((0.25, 0.6), 0.3),
        lambda o: lr_scheduler.MultiStepLR(o, [10, 24], gamma=0.3),
    ),
    "cosine": (
        descent.cosine(final=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.1),
    ),
    "one cycle": (
        descent.one_cycle(),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=TOTAL, cycle_momentum=False),
    ),
    "warm-up": (
        descent.warm_up(5),
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=4),
    ),
}


def optimiser() -> descent.Descent:
    return descent.Descent([torch.zeros(1, requires_grad=True)], descent.gradient(1.0))


@pytest.mark.parametrize("name", PAIRS)
def test_a_schedule_equals_torchs(name: str) -> None:
    schedule, theirs = PAIRS[name]
    optimizer = optimiser()
    scheduler = theirs(optimizer)
    ours, reference = [], []
    for step in range(TOTAL):
        ours.append(schedule(step, TOTAL))
        reference.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < TOTAL - 1:
            scheduler.step()
    assert ours == pytest.approx(reference, abs=1e-9)


@given(total=st.integers(12, 500), steps=st.integers(1, 10))
def test_every_schedule_stays_between_zero_and_one(total: int, steps: int) -> None:
    plain = [schedule for schedule, _ in PAIRS.values() if schedule != descent.warm_up(5)]
    for schedule in [*plain, *(descent.warm_up(steps, then=s) for s in plain)]:
        factors = [schedule(step, total) for step in range(total + 1)]
        assert all(0 <= factor <= 1 + 1e-12 for factor in factors), schedule
        assert max(factors) > 0.9


@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_a_short_training_has_a_one_cycle_too(total: int) -> None:
    factors = [descent.one_cycle(peak=0.5)(step, total) for step in range(total + 1)]
    assert all(0 <= factor <= 1 for factor in factors)


def test_warm_up_hands_over_what_is_left() -> None:
    schedule = descent.warm_up(10, then=descent.cosine())
    rest = [schedule(step, 50) for step in range(10, 51)]
    assert rest == [descent.cosine()(step, 40) for step in range(41)]


@pytest.mark.parametrize("total", [1, 3, 5, 100])
def test_steps_decay_where_the_fraction_is_reached_not_before(total: int) -> None:
    for percent in (7, 29, 50, 57):
        schedule = descent.step_decay(at=(percent / 100,), factor=0.1)
        reached = [100 * step >= percent * total for step in range(total)]
        assert [schedule(step, total) == 0.1 for step in range(total)] == reached


def test_a_schedule_prints_itself_pickles_and_compares() -> None:
    made = descent.warm_up(3, then=descent.step_decay(at=(0.5,)))
    assert eval(repr(made), vars(descent)) == made
    assert pickle.loads(pickle.dumps(made))(1, 10) == made(1, 10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: descent.cosine()(11, 10), "step=11, total=10"),
        (lambda: descent.cosine()(0, 0), "total=0"),
        (lambda: descent.cosine(final=-1.0), "final"),
        (lambda: descent.step_decay(at=(30.0,)), "fractions"),
        (lambda: descent.step_decay(factor=0.0), "factor=0.0"),
        (lambda: descent.one_cycle(peak=1.0), "peak=1.0"),
        (lambda: descent.warm_up(0), "steps=0"),
        (lambda: descent.warm_up(20)(0, 10), "20 steps does not fit a training of 10"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
