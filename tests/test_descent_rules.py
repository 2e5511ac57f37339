"""The rules walk torch.optim's paths, and the parts of a chain mean what their place says."""

import pickle
from collections.abc import Callable
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from structopt import descent

RULES = {
    "gradient": (descent.gradient(0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
    "momentum": (descent.momentum(0.02), lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)),
    "nesterov": (
        descent.nesterov(0.02, beta=0.8),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, nesterov=True),
    ),
    "rmsprop": (descent.rmsprop(0.01, 0.95), lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.95)),
    "adam": (
        descent.adam(0.01, (0.8, 0.99)),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99)),
    ),
    "adamw": (
        descent.adamw(0.01, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ),
    "L2 penalty": (
        descent.chain(descent.decay(0.1), descent.adam(0.01)),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    ),
}


def double(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def problem(device: torch.device) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """A rugged function of a matrix, a vector and a filter, and the parameters it hangs on."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, 3), (7,), (4, 2, 3, 3)]
    params = [
        nn.Parameter(torch.randn(shape, generator=generator).to(device, double(device)))
        for shape in shapes
    ]
    return params, lambda: sum(
        ((p**2).sum() + (3 * p).sin().sum() for p in params), torch.zeros(())
    )


def walk(params: list[nn.Parameter], loss: Callable[[], Tensor], optimizer: object) -> list[Tensor]:
    points = []
    for _ in range(100):
        optimizer.zero_grad()
        loss().to(params[0]).backward()
        optimizer.step()
        points.append(torch.cat([p.detach().flatten() for p in params]))
    return points


@pytest.mark.parametrize("name", RULES)
def test_a_rule_walks_the_path_of_torch_optim(name: str, device: torch.device) -> None:
    rule, theirs = RULES[name]
    params, loss = problem(device)
    ours = walk(params, loss, descent.Descent(params, rule))
    params, loss = problem(device)
    reference = walk(params, loss, theirs(params))
    assert len(ours) == 100
    atol = 1e-6 if double(device) is torch.float64 else 1e-3
    torch.testing.assert_close(torch.stack(ours), torch.stack(reference), rtol=0, atol=atol)
    assert (reference[-1] - reference[0]).abs().max() > 0.1  # it did go somewhere


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_walks_the_path_of_torch_optim(device: torch.device) -> None:
    def linear_problem() -> tuple[nn.Parameter, Callable[[], Tensor]]:
        params, _ = problem(device)
        return params[0], lambda: (params[0] ** 2).sum() + (3 * params[0]).sin().sum()

    weight, loss = linear_problem()
    rule = descent.chain(descent.muon(0.02), descent.decay(0.1))
    ours = walk([weight], loss, descent.Descent([weight], rule))
    weight, loss = linear_problem()
    theirs = walk([weight], loss, torch.optim.Muon([weight], lr=0.02, weight_decay=0.1))
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-6)


def test_lion_by_hand(device: torch.device) -> None:
    rule = descent.lion(0.1, (0.9, 0.99))
    params = [torch.zeros(3, device=device)]
    state = rule.init(params)
    mean = torch.zeros(3)
    for gradient in torch.randn(20, 3):
        (direction,), state = rule.update([gradient.to(device)], state, params)
        assert torch.equal(direction.cpu(), torch.sign(0.9 * mean + 0.1 * gradient))
        mean = 0.99 * mean + 0.01 * gradient
        torch.testing.assert_close(state["mean"][0].cpu(), mean)


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), seed=st.integers(0, 1000))
def test_newton_schulz_keeps_the_axes_and_levels_the_singular_values(
    rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator).double())
    rank = min(rows, columns)
    values = torch.rand(rank, generator=generator, dtype=torch.float64) + 0.1
    matrix = left[:, :rank] * values @ right[:, :rank].T
    level = descent.orthogonalise(matrix, dtype=torch.float64)
    inner = left[:, :rank].T @ level @ right[:, :rank]
    torch.testing.assert_close(inner, inner.diagonal().diag(), atol=1e-8, rtol=0)
    assert inner.diagonal().min() > 0.65
    assert inner.diagonal().max() < 1.25


def test_muon_takes_a_convolution_as_a_matrix() -> None:
    gradient = torch.randn(6, 2, 3, 3)
    rule = descent.muon(0.1)
    (four,), _ = rule.update([gradient], rule.init([gradient]), [gradient])
    flat = gradient.flatten(1)
    (two,), _ = rule.update([flat], rule.init([flat]), [flat])
    assert four.shape == gradient.shape
    assert torch.equal(four.flatten(1), two)


def test_muon_names_the_shape_it_cannot_step_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\).*by_shape"):
        descent.Descent(nn.Linear(3, 4).parameters(), descent.muon(0.1))
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\)"):
        descent.orthogonalise(torch.zeros(2, 2, 2))


def test_clipping_before_a_rule_equals_torchs(device: torch.device) -> None:
    def gradients() -> list[nn.Parameter]:
        params = [nn.Parameter(torch.zeros(n, device=device)) for n in (3, 1, 5)]
        for number, p in enumerate(params):
            p.grad = torch.full_like(p, 2.0 + number)
        return params

    ours, theirs = gradients(), gradients()
    rule = descent.chain(descent.clip_norm(1.5), descent.gradient(1.0))
    descent.Descent(ours, rule).step()
    nn.utils.clip_grad_norm_(theirs, 1.5)
    torch.optim.SGD(theirs, lr=1.0).step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    length = torch.cat([p.detach() for p in ours]).norm()
    assert length.item() == pytest.approx(1.5, rel=1e-4)


@given(scale=st.floats(0.0, 1e4), limit=st.floats(0.01, 100.0))
def test_clipping_never_lengthens_and_never_turns(scale: float, limit: float) -> None:
    gradient = scale * torch.tensor([3.0, -4.0], dtype=torch.float64)
    (clipped,), _ = descent.clip_norm(limit).update([gradient], {}, [])
    assert clipped.norm() <= min(limit, gradient.norm().item() + 1e-12)
    assert torch.equal(clipped.sign(), gradient.sign())


def test_a_rule_changes_none_of_its_arguments(device: torch.device) -> None:
    for rule, _ in RULES.values():
        gradients, params = [torch.randn(4, device=device)], [torch.randn(4, device=device)]
        state = rule.init(params)
        for _ in range(2):  # the second step meets a state that is not zero
            given = [*gradients, *params, *chain.from_iterable(state.values())]
            before = [tensor.clone() for tensor in given]
            _, news = rule.update(gradients, state, params)
            assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
            state = news


def test_a_rule_prints_itself_pickles_and_compares() -> None:
    made = descent.chain(descent.clip_norm(1.0), descent.adam(0.001), descent.decay(0.1))
    assert eval(repr(made), vars(descent)) == made
    assert pickle.loads(pickle.dumps(made)) == made
    assert made != descent.adam(0.001)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: descent.gradient(-0.1), "lr=-0.1"),
        (lambda: descent.adam(float("nan")), "lr=nan"),
        (lambda: descent.momentum(0.1, beta=1.0), "beta=1.0"),
        (lambda: descent.adam(0.1, (0.9, 1.5)), "betas.*1.5"),
        (lambda: descent.rmsprop(0.1, eps=0.0), "eps=0.0"),
        (lambda: descent.clip_norm(0.0), "limit=0.0"),
        (lambda: descent.decay(-1.0), "weight_decay.*-1.0"),
        (lambda: descent.muon(0.1, rounds=0), "rounds=0"),
        (lambda: descent.chain(descent.decay(0.1)), "exactly one rule"),
        (lambda: descent.chain(descent.adam(0.1), descent.lion(0.1)), "2 of the 2 parts"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_two_parts_may_not_remember_the_same_name() -> None:
    listener = descent.Rule("listener()", None, descent.momentum(1.0).init, None)
    with pytest.raises(ValueError, match="velocity"):
        descent.chain(listener, descent.momentum(0.1)).init([torch.zeros(1)])
