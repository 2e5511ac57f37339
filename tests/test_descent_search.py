"""Paths for pictures, and the learning-rate finder that leaves no trace."""

import math
from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from structopt import descent


def bowl(point: Tensor) -> Tensor:
    return (point[..., 0] ** 2 + 10 * point[..., 1] ** 2) / 2


@given(lr=st.floats(0.001, 0.199), x=st.floats(-3, 3), y=st.floats(-3, 3))
def test_gradient_descent_on_a_bowl_has_a_closed_form(lr: float, x: float, y: float) -> None:
    start = torch.tensor([x, y], dtype=torch.float64)
    walked = descent.path(bowl, start, descent.gradient(lr), steps=20)
    shrink = 1 - lr * torch.tensor([1.0, 10.0], dtype=torch.float64)
    expected = start * shrink ** torch.arange(21, dtype=torch.float64)[:, None]
    torch.testing.assert_close(walked, expected, atol=1e-9, rtol=1e-9)


def test_a_path_is_what_the_optimiser_walks(device: torch.device) -> None:
    rule = descent.chain(descent.clip_norm(1.0), descent.adam(0.1))
    walked = descent.path(bowl, torch.tensor([2.0, 1.0], device=device), rule, steps=10)
    point = nn.Parameter(torch.tensor([2.0, 1.0], device=device))
    optimizer = descent.Descent([point], rule)
    for step in range(10):
        torch.testing.assert_close(walked[step], point.detach())
        optimizer.zero_grad()
        bowl(point).backward()
        optimizer.step()
    assert walked.device == point.device
    assert walked.shape == (11, 2)


def test_a_path_follows_its_schedule_and_shows_divergence() -> None:
    halves = descent.step_decay(at=(0.5,), factor=0.0001)
    walked = descent.path(bowl, [1.0, 0.0], descent.gradient(0.5), steps=2, schedule=halves)
    torch.testing.assert_close(walked[:, 0], torch.tensor([1.0, 0.5, 0.499975]))
    far = descent.path(bowl, [1.0, 1.0], descent.gradient(1.0), steps=200)
    assert not far[-1].isfinite().all()


def test_bad_paths_are_named() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        descent.path(lambda point: point * 2, [1.0, 2.0], descent.gradient(0.1), steps=1)
    with pytest.raises(ValueError, match="steps=0"):
        descent.path(bowl, [1.0, 2.0], descent.gradient(0.1), steps=0)
    with pytest.raises(ValueError, match="clip_norm"):
        descent.path(bowl, [1.0, 2.0], descent.clip_norm(0.1), steps=1)


class Counting(nn.Module):
    """A network with everything that training touches: norms, dropout, replaced buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1)
        )
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1  # replaces the buffer, does not write into it
        return self.layers(x)


def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def some_batches(device: torch.device | str = "cpu") -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    targets = inputs @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]])
    return [
        (inputs[i : i + 16].to(device), targets[i : i + 16].to(device)) for i in range(0, 64, 16)
    ]


def everything(model: nn.Module) -> list[Tensor]:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [t.detach().clone() for t in [*model.parameters(), *model.buffers(), *gradients]]


@pytest.mark.parametrize("explode", [False, True])
def test_the_finder_leaves_no_trace(explode: bool, device: torch.device) -> None:
    model = Counting().to(device)
    objective(model, some_batches(device)[0]).backward()
    model.layers[1].eval()
    before, draws = everything(model), torch.get_rng_state()
    calls = iter(range(1000))

    def sometimes(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if explode and next(calls) == 20:
            raise RuntimeError("no more")
        return objective(net, batch)

    if explode:
        with pytest.raises(RuntimeError, match="no more"):
            descent.find_lr(model, some_batches(), sometimes)
    else:
        curve = descent.find_lr(model, some_batches(), sometimes)
        assert curve.diverged
        assert len(curve.lrs) == len(curve.losses) > 20
        assert max(curve.losses[20:]) < 4 * min(curve.losses)  # where the search gives up
    after = everything(model)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(draws, torch.get_rng_state())
    assert model.training
    assert not model.layers[1].training


def test_the_suggested_rate_trains(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1).to(device)
    curve = descent.find_lr(model, some_batches(), objective, descent.gradient)
    start = objective(model, some_batches(device)[0]).item()
    optimizer = descent.Descent(model.parameters(), descent.gradient(curve.suggestion))
    for _ in range(10):
        for batch in some_batches(device):
            optimizer.zero_grad()
            objective(model, batch).backward()
            optimizer.step()
    assert objective(model, some_batches(device)[0]).item() < 0.1 * start
    assert f"{curve.suggestion:.1e}" in str(curve)


def test_a_loss_below_zero_is_searched_as_far_as_one_above() -> None:
    """The logarithm of a density may have either sign; its gradient knows no constant."""
    model, batches = nn.Linear(4, 1), some_batches()
    found = [
        descent.find_lr(model, batches, lambda m, b, c=c: objective(m, b) + c, between=(1e-4, 1.0))
        for c in (10.0, -10.0)
    ]
    both = min(len(curve.losses) for curve in found)
    assert both > 50
    torch.testing.assert_close(
        [loss - 10 for loss in found[0].losses[:both]],
        [loss + 10 for loss in found[1].losses[:both]],
        atol=1e-4,
        rtol=1e-4,
    )


def test_the_finder_leaves_its_batches() -> None:
    inputs = torch.linspace(-1, 1, 8)[:, None]
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(1, 1))
    descent.find_lr(model, [inputs], lambda m, b: m(b).square().mean(), steps=2)
    torch.testing.assert_close(inputs, torch.linspace(-1, 1, 8)[:, None])


def test_the_finder_asks_for_epochs_by_number() -> None:
    class Numbered:
        asked: list[int]

        def epoch(self, number: int) -> list[tuple[Tensor, Tensor]]:
            self.asked.append(number)
            return some_batches()

    batches = Numbered()
    batches.asked = []
    descent.find_lr(nn.Linear(4, 1), batches, objective, between=(1e-6, 1e-5), steps=10)
    assert batches.asked == [0, 1, 2]


def test_the_finder_takes_any_container_and_loaders_that_count_epochs() -> None:
    class Loader(list):
        epoch = 3

    pair = namedtuple("Pair", ["inputs", "targets"])
    for kind in (lambda x, y: pair(x, y), lambda x, y: UserDict(inputs=x, targets=y)):
        batches = Loader(kind(x, y) for x, y in some_batches())

        def loss(net: nn.Module, batch: Any) -> Tensor:
            given = batch["inputs"] if isinstance(batch, UserDict) else batch.inputs
            return net(given).square().mean()

        assert len(descent.find_lr(nn.Linear(4, 1), batches, loss, steps=5).losses) > 1


def test_bad_searches_are_named() -> None:
    model = nn.Linear(4, 1)
    for keywords, batches, words in [
        ({"between": (0.0, 1.0)}, some_batches(), "0 < low < high"),
        ({"steps": 1}, some_batches(), "steps=1"),
        ({}, [], "No batches"),
        ({}, iter(some_batches()), "cannot begin again"),
    ]:
        with pytest.raises(ValueError, match=words):
            descent.find_lr(model, batches, objective, **keywords)
    with pytest.raises(FloatingPointError, match="not finite at the lowest rate"):
        descent.find_lr(model, some_batches(), lambda net, b: objective(net, b) * math.nan)


def test_the_curve_draws_itself() -> None:
    import matplotlib.pyplot as plt

    curve = descent.LrCurve((1e-3, 1e-2, 1e-1), (3.0, 1.0, 2.0), True)
    assert curve.suggestion == pytest.approx(1e-3)
    axes = curve.draw()
    assert axes.get_xscale() == "log"
    assert "learning rate" in axes.get_xlabel()
    plt.close("all")


def test_a_loss_that_refuses_nan_ends_the_search() -> None:
    """The losses of this package raise on a CPU where others return NaN."""
    model = nn.Linear(1, 1)

    def objective(net: nn.Module, batch: Tensor) -> Tensor:
        if abs(net.weight.item()) > 1e3:
            raise FloatingPointError("the prediction holds inf")
        return (net(batch) ** 2).sum() * 1e4

    before = model.weight.item()
    assert descent.find_lr(model, [torch.ones(1, 1)], objective, descent.gradient).diverged
    assert model.weight.item() == before
