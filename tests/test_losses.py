"""Laws of the losses: torch's own values and gradients, finite differences, half precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from structopt import distillation, losses
from structopt.losses import checks

REDUCTIONS = ["mean", "sum", "none"]
REGRESSION = [losses.mse, losses.mae, losses.huber]
CLASSES = 5


def logits(*shape: int, device: object = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Drawn on the CPU, so that they are the same everywhere."""
    return (3 * torch.randn(*shape)).to(device, dtype).requires_grad_()


def labels(*shape: int, device: object = "cpu") -> Tensor:
    return torch.randint(CLASSES, shape).to(device)


def assert_same(ours: Tensor, torchs: Tensor, x: Tensor) -> None:
    """The same value, and the same gradient of a weighted sum in x."""
    torch.testing.assert_close(ours, torchs)
    pull = torch.randn(ours.shape).to(x.device, ours.dtype)
    (got,) = torch.autograd.grad(ours, x, pull)
    (want,) = torch.autograd.grad(torchs, x, pull)
    torch.testing.assert_close(got, want)


# Equal to torch


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("ours", "torchs"),
    [(losses.mse, F.mse_loss), (losses.mae, F.l1_loss), (losses.huber, F.huber_loss)],
)
def test_regression_equals_torch(
    ours: Callable[..., Tensor], torchs: Callable[..., Tensor], reduction: str, device: torch.device
) -> None:
    x, y = logits(7, 3, device=device), logits(7, 3, device=device).detach()
    assert_same(ours(x, y, reduction=reduction), torchs(x, y, reduction=reduction), x)


def test_huber_is_half_the_square_then_a_line(device: torch.device) -> None:
    e = torch.tensor([0.5, -0.5, 2.0, 4.0, -4.0], device=device)
    got = losses.huber(e, torch.zeros_like(e), delta=2.0, reduction="none")
    torch.testing.assert_close(got.cpu(), torch.tensor([0.125, 0.125, 2.0, 6.0, 6.0]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(), (6,), (6, 2), (6, 2, 3)])
def test_cross_entropy_equals_torch(
    reduction: str, smoothing: float, weighted: bool, shape: tuple[int, ...], device: torch.device
) -> None:
    x = logits(*shape[:1], CLASSES, *shape[1:], device=device)
    weight = torch.rand(CLASSES).to(device) if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    indices = labels(*shape, device=device)
    if shape:
        indices[0] = 1
    for ignored in (-100, 1) if shape else (-100,):  # 1 does occur
        kept = {**options, "ignore_index": ignored}
        assert_same(
            losses.cross_entropy(x, indices, **kept), F.cross_entropy(x, indices, **kept), x
        )
    soft = logits(*x.shape, device=device).detach().softmax(1 if shape else 0)
    assert_same(losses.cross_entropy(x, soft, **options), F.cross_entropy(x, soft, **options), x)


def test_cross_entropy_by_hand() -> None:
    x, y = logits(8, CLASSES, dtype=torch.double), labels(8)
    p = x.exp() / x.exp().sum(1, keepdim=True)
    weight = torch.rand(CLASSES, dtype=torch.double)
    q = 0.9 * F.one_hot(y, CLASSES) + 0.1 / CLASSES
    each = -(q * weight * p.log()).sum(1)
    got = losses.cross_entropy(x, y, weight=weight, label_smoothing=0.1)
    torch.testing.assert_close(got, each.sum() / weight[y].sum())
    (gradient,) = torch.autograd.grad(losses.cross_entropy(x, y, reduction="sum"), x)
    torch.testing.assert_close(gradient, p - F.one_hot(y, CLASSES))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_type_serves_as_label(dtype: torch.dtype, device: torch.device) -> None:
    x, y = logits(4, CLASSES, device=device), labels(4, device=device)
    assert losses.cross_entropy(x, y.to(dtype)) == losses.cross_entropy(x, y)


def test_probabilities_and_weights_may_be_of_another_precision(device: torch.device) -> None:
    x, weight = logits(4, CLASSES, device=device), torch.arange(CLASSES).to(device)
    soft = logits(4, CLASSES, device=device).detach().softmax(1).bfloat16()
    for target, exact in ((soft, soft.float()), (labels(4, device=device),) * 2):
        want = F.cross_entropy(x, exact, weight.float(), label_smoothing=0.1)
        got = losses.cross_entropy(x, target, weight=weight, label_smoothing=0.1)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_focal_of_two_classes_is_torchvisions_sigmoid_focal(
    reduction: str, device: torch.device
) -> None:
    x, y = logits(9, device=device), (labels(9, device=device) > 1).long()
    two = torch.stack([torch.zeros_like(x), x], 1)
    want = torchvision.ops.sigmoid_focal_loss(x, y.float(), -1, 2.0, reduction)
    assert_same(losses.focal(two, y, reduction=reduction), want, x)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_focal_with_gamma_0_is_cross_entropy(reduction: str, device: torch.device) -> None:
    x, y = logits(6, CLASSES, 2, device=device), labels(6, 2, device=device)
    y[0] = -100
    options = {"weight": torch.rand(CLASSES).to(device), "reduction": reduction}
    assert_same(losses.focal(x, y, gamma=0, **options), F.cross_entropy(x, y, **options), x)


@pytest.mark.parametrize(("ours", "torchs"), [("mean", "batchmean"), ("sum", "sum")])
def test_kl_equals_torch_in_both_gradients(ours: str, torchs: str, device: torch.device) -> None:
    x, y = logits(6, CLASSES, device=device), logits(6, CLASSES, device=device)
    p, q = F.log_softmax(x / 3, 1), F.log_softmax(y / 3, 1)
    want = 9 * F.kl_div(p, q, reduction=torchs, log_target=True)
    got = losses.kl_divergence(x, y, temperature=3, reduction=ours)
    assert_same(got, want, x)
    assert_same(
        losses.kl_divergence(x, y, temperature=3, reduction=ours),
        9 * F.kl_div(F.log_softmax(x / 3, 1), F.log_softmax(y / 3, 1), None, None, torchs, True),
        y,
    )


def test_kl_of_images_sums_classes_only(device: torch.device) -> None:
    x, y = logits(2, CLASSES, 3, device=device), logits(2, CLASSES, 3, device=device)
    each = losses.kl_divergence(x, y, reduction="none")
    assert each.shape == (2, 3)
    flat = losses.kl_divergence(x.movedim(1, 2).flatten(0, 1), y.movedim(1, 2).flatten(0, 1))
    torch.testing.assert_close(losses.kl_divergence(x, y), flat)


@given(st.floats(0.5, 20), st.integers(0, 9))
def test_kl_is_cross_entropy_less_entropy(temperature: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = logits(4, CLASSES, dtype=torch.double), logits(4, CLASSES, dtype=torch.double)
    q = (y / temperature).softmax(1)
    cross, own = (losses.cross_entropy(z / temperature, q) for z in (x, y))
    got = losses.kl_divergence(x, y, temperature=temperature)
    torch.testing.assert_close(got, temperature**2 * (cross - own))
    assert got > 0
    torch.testing.assert_close(losses.kl_divergence(x, x).item(), 0.0, atol=1e-12, rtol=0)


def test_t_squared_keeps_the_gradient_at_high_temperature() -> None:
    # For T -> inf the gradient tends to (x - y)/C with both logits centred (Hinton et al., 2015).
    x, y = (logits(1, CLASSES, dtype=torch.double) for _ in range(2))
    (got,) = torch.autograd.grad(losses.kl_divergence(x, y, temperature=1e4), x)
    gap = x - y
    torch.testing.assert_close(got, (gap - gap.mean()) / CLASSES, atol=1e-3, rtol=1e-2)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6), st.floats(-1e3, 1e3))
def test_log_sum_exp_equals_torch_and_moves_with_a_shift(values: list[float], c: float) -> None:
    x = torch.tensor(values, dtype=torch.double, requires_grad=True)
    assert_same(losses.log_sum_exp(x), x.logsumexp(-1), x)
    torch.testing.assert_close(losses.log_sum_exp(x + c), losses.log_sum_exp(x) + c)
    (gradient,) = torch.autograd.grad(losses.log_sum_exp(x), x)
    torch.testing.assert_close(gradient, x.softmax(-1))


def test_log_sum_exp_at_the_ends_of_the_line(device: torch.device) -> None:
    inf = math.inf
    x = torch.tensor([[-inf, 0.0], [-inf, -inf], [inf, 0.0]], device=device)
    torch.testing.assert_close(losses.log_sum_exp(x, 1), x.logsumexp(1))
    torch.testing.assert_close(losses.log_sum_exp(x[:1], 0), x[:1].logsumexp(0))


# Penalties and calibration


def test_penalties_are_sums_of_norms(device: torch.device) -> None:
    w = [logits(4, 3, 2, 2, device=device), logits(5, 4, device=device), logits(6, device=device)]
    torch.testing.assert_close(losses.l1(w), sum(x.abs().sum() for x in w))
    by_hand = sum(math.sqrt(x[0].numel()) * row.norm() for x in w for row in x)
    torch.testing.assert_close(losses.group_lasso(w), by_hand)
    readers = sum(math.sqrt(len(x) * x[0, 0].numel()) * x[:, i].norm()
                  for x in w[:2] for i in range(x.shape[1]))  # fmt: skip
    torch.testing.assert_close(losses.group_lasso(w[:2], dim=1), readers)
    torch.testing.assert_close(losses.group_lasso(w[2]), losses.l1(w[2]))  # groups of one
    torch.testing.assert_close(losses.l1(x for x in w), losses.l1(w))


def test_a_group_at_zero_has_a_finite_gradient(device: torch.device) -> None:
    w = torch.tensor([[0.0, 0.0], [3.0, 4.0]], device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.group_lasso(w), w)
    want = math.sqrt(2) * torch.tensor([[0.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(gradient.cpu(), want)


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 5))
def test_calibration_equals_a_slow_count(n: int, bins: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = logits(n, CLASSES, dtype=torch.double).detach(), labels(n)
    total = 0.0
    p = x.softmax(1)
    for b in range(bins):
        inside = [i for i in range(n) if b / bins < p[i].max() <= (b + 1) / bins]
        right = sum(float(p[i].argmax() == y[i]) for i in inside)
        total += abs(right - sum(p[i].max().item() for i in inside)) / n
    got = losses.expected_calibration_error(x, y, bins=bins).item()
    assert got == pytest.approx(total, abs=1e-9)


def test_calibration_names_a_nan() -> None:
    with pytest.raises(FloatingPointError, match="the prediction holds 1 NaN of 4 numbers"):
        losses.expected_calibration_error(torch.tensor([[0.0, 1], [math.nan, 0]]), labels(2) * 0)


def test_the_weighted_mean_divides_by_the_weights_or_the_number_of_targets() -> None:
    x, y, weight = logits(6, 3).detach(), torch.arange(6) % 3, torch.tensor([1.0, 2, 5])
    total = (weight[y] * -x.log_softmax(1)[torch.arange(6), y]).sum()
    torch.testing.assert_close(losses.cross_entropy(x, y, weight=weight), total / weight[y].sum())
    soft = F.one_hot(y).float()
    torch.testing.assert_close(losses.cross_entropy(x, soft, weight=weight), total / 6)


def test_calibration_runs_where_the_logits_are(device: torch.device) -> None:
    x, y = logits(50, CLASSES, device=device), labels(50, device=device)
    got = losses.expected_calibration_error(x, y)
    assert got.device == x.device
    torch.testing.assert_close(got.cpu(), losses.expected_calibration_error(x.cpu(), y.cpu()))


# Gradients equal finite differences


@pytest.mark.parametrize(
    "function",
    [
        *(lambda x, y, f=f: f(x, y) for f in (*REGRESSION, losses.kl_divergence)),
        lambda x, y: losses.kl_divergence(x, y, temperature=4.0, reduction="none"),
        lambda x, y: losses.cross_entropy(x, y.softmax(1), label_smoothing=0.1),
        lambda x, y: losses.cross_entropy(x, torch.tensor([0, 4, 2]), label_smoothing=0.1),
        lambda x, y: losses.focal(
            x, torch.tensor([0, 4, 2]), weight=torch.arange(1.0, 6.0).double()
        ),
        lambda x, y: losses.focal(x, torch.tensor([0, 4, 2]), gamma=0.5),
        lambda x, y: losses.log_sum_exp(x) + losses.log_sum_exp(y, 1),
        lambda x, y: losses.l1([x, y]) + losses.group_lasso([x, y]),
    ],
)
def test_gradients_to_second_order(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, y = (logits(3, CLASSES, dtype=torch.double) for _ in range(2))
    assert torch.autograd.gradcheck(function, (x, y))
    assert torch.autograd.gradgradcheck(function, (x, y))


# Half precision and extreme logits


EXTREME = [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, -1e4, -1e4], [1e4, 1e4, 1e4]]
NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda x, y: losses.cross_entropy(x, torch.tensor([1, 0, 0, 2]).to(x.device)),
    "smoothed": lambda x, y: losses.cross_entropy(
        x, torch.tensor([1, 0, 0, 2]).to(x.device), label_smoothing=0.1, reduction="sum"
    ),
    "soft": lambda x, y: losses.cross_entropy(
        x, y.to(torch.promote_types(y.dtype, torch.float32)).softmax(1)
    ),
    "focal": lambda x, y: losses.focal(x, torch.tensor([1, 0, 0, 2]).to(x.device)),
    "focal, gamma 1/2": lambda x, y: losses.focal(
        x, torch.tensor([0, 2, 0, 2]).to(x.device), gamma=0.5
    ),
    "kl": losses.kl_divergence,
    "kl, T 4": lambda x, y: losses.kl_divergence(x, y, temperature=4.0),
    "mse": losses.mse,
    "mae": losses.mae,
    "huber": losses.huber,
    "log_sum_exp": lambda x, y: losses.log_sum_exp(x).mean(),
    "l1": lambda x, y: losses.l1(x),
    "group_lasso": lambda x, y: losses.group_lasso(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMED)
def test_extreme_logits_in_low_precision(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    function = NAMED[name]
    x = torch.tensor(EXTREME).to(device, dtype).requires_grad_()
    y = x.detach().roll(1, 0)  # other logits, as extreme
    loss = function(x, y)
    (gradient,) = torch.autograd.grad(loss, x)
    exact = x.detach().cpu().double().requires_grad_()  # the rounded numbers are the inputs
    want = function(exact, y.cpu().double())
    (slope,) = torch.autograd.grad(want, exact)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert loss.isfinite()
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss.cpu().double(), want, rtol=1e-6, atol=1e-6)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.cpu().double(), slope, rtol=2 * step, atol=1e-6)


# What bad input gets


X = torch.zeros(4, CLASSES)
Y = torch.tensor([0, 1, 2, 3])
BAD: list[tuple[str, Callable[[], Tensor]]] = [
    (r"label 5: with 5 logits labels run from 0 to 4", lambda: losses.cross_entropy(X, Y + 2)),
    (r"label -1, 7: with 5", lambda: losses.cross_entropy(X, torch.tensor([0, 7, -1, -100]))),
    (r"label -100, -99, -98: ", lambda: losses.cross_entropy(X, Y - 100, ignore_index=-1)),
    (r"label 5: ", lambda: losses.cross_entropy(X[..., None], Y[:, None] + 2)),
    (r"label 5: ", lambda: losses.cross_entropy(X[..., None, None], Y[:, None, None] + 2)),
    (r"label 5: ", lambda: losses.cross_entropy(X, Y + 2, label_smoothing=0.1)),
    (r"label 5: ", lambda: losses.focal(X, Y + 2)),
    (r"label 5: ", lambda: losses.expected_calibration_error(X, Y + 2)),
    (r"label 9, 33: ", lambda: losses.cross_entropy(X, torch.tensor([33, 9, 9, 33]))),
    (
        r"target \(4, 1\) does not fit logits \(4, 5\).*squeeze",
        lambda: losses.cross_entropy(X, Y[:, None]),
    ),
    (r"target \(3,\) does not fit logits \(4, 5\)", lambda: losses.cross_entropy(X, Y[:3])),
    (r"target \(4, 5\).*argmax", lambda: losses.cross_entropy(X, F.one_hot(Y, 5))),
    (r"target \(4,\).*probabilities are", lambda: losses.cross_entropy(X, Y.float())),
    (r"fit logits \(\)", lambda: losses.cross_entropy(torch.tensor(1.0), torch.tensor(0))),
    (r"torch.bool", lambda: losses.cross_entropy(X, Y > 1)),
    (r"torch.complex64", lambda: losses.cross_entropy(X, Y.to(torch.complex64))),
    (r"ignore_index needs class", lambda: losses.cross_entropy(X, X.softmax(1), ignore_index=0)),
    (r"no target counts", lambda: losses.cross_entropy(X, torch.full((4,), -100))),
    (r"no target counts", lambda: losses.focal(X, torch.full((4,), -100))),
    (r"no target counts", lambda: losses.cross_entropy(X, Y, weight=torch.zeros(5))),
    (r"label_smoothing .* not 1.5", lambda: losses.cross_entropy(X, Y, label_smoothing=1.5)),
    (r"weight \(4,\) needs", lambda: losses.cross_entropy(X, Y, weight=torch.ones(4))),
    (r"weight \(1, 5\) needs", lambda: losses.cross_entropy(X, Y, weight=torch.ones(1, 5))),
    (r"gamma", lambda: losses.focal(X, Y, gamma=-1)),
    (r"focal needs class indices", lambda: losses.focal(X, X)),
    (r"temperature", lambda: losses.kl_divergence(X, X, temperature=0)),
    (r"delta", lambda: losses.huber(X, X, delta=0)),
    (r"bins", lambda: losses.expected_calibration_error(X, Y, bins=0)),
    (r"\(N, C\)", lambda: losses.expected_calibration_error(X[..., None], Y[:, None])),
    (r"no weights", lambda: losses.l1([])),
    (r"floating-point", lambda: losses.l1([Y])),
    (r"floating-point", lambda: losses.group_lasso(torch.ones(3, dtype=torch.int8))),
    (r"dim=1 does not exist in a weight of shape \(5,\)", lambda: losses.group_lasso(X[0], dim=1)),
]
PAIRS = [*REGRESSION, losses.kl_divergence]


@pytest.mark.parametrize(("message", "call"), BAD)
def test_bad_input_is_named(message: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("function", [*PAIRS, losses.cross_entropy, losses.focal])
def test_every_loss_checks_its_prediction(function: Callable[..., Tensor]) -> None:
    target = X if function in PAIRS else Y
    with pytest.raises(ValueError, match=r"torch.int64, which has no gradient.*float\(\)"):
        function(X.long(), target)
    with pytest.raises(ValueError, match=r"empty, shape \(0, 5\)"):
        function(X[:0], target[:0])
    with pytest.raises(ValueError, match=r"empty, shape \(4, 0\)"):
        function(X[:, :0], target[:, :0] if function in PAIRS else target)
    with pytest.raises(ValueError, match=r"reduction .* not 'avg'"):
        function(X, target, reduction="avg")
    with pytest.raises(FloatingPointError, match="the prediction holds 5 NaN of 20 numbers"):
        function(torch.where(torch.arange(4)[:, None] == 2, math.nan, X), target)
    with pytest.raises(ValueError, match="move one with"):
        function(X.to("meta"), target)


@pytest.mark.parametrize("function", PAIRS)
def test_what_would_broadcast_is_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"prediction \(4, 1\) and target \(4,\) differ"):
        function(X[:, :1], X[:, 0])
    with pytest.raises(FloatingPointError, match="the target holds 20 NaN"):
        function(X, X * math.nan)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_nan_is_named_in_every_reduction(reduction: str) -> None:
    with pytest.raises(FloatingPointError, match="the prediction holds inf"):
        losses.mse(X + math.inf, X + math.inf, reduction=reduction)
    masked = X.index_fill(0, torch.tensor([0]), -math.inf)  # of one example all classes
    with pytest.raises(FloatingPointError, match="the target holds inf"):
        losses.kl_divergence(X, masked, reduction=reduction)
    with pytest.raises(ValueError, match="temperature divides the logits: a finite number"):
        losses.kl_divergence(X, X, temperature=math.inf, reduction=reduction)


def test_all_ignored_sums_to_zero(device: torch.device) -> None:
    x, y = X.to(device), torch.full((4,), -100, device=device)
    assert losses.cross_entropy(x, y, reduction="sum") == 0
    assert losses.focal(x, y, reduction="sum") == 0


# Accelerators, compilers and transforms


@pytest.mark.parametrize("function", [losses.cross_entropy, losses.focal])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_accelerators_give_nan_without_looking(
    function: Callable[..., Tensor],
    reduction: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The path of accelerators, run on every device: NaN, no gradient, no dead process."""
    monkeypatch.setattr(checks, "READABLE", set())
    x = logits(4, CLASSES, device=device)
    y = torch.tensor([0, -100, 5, -1], device=device)
    loss = function(x, y, reduction=reduction)
    wrong = [False, False, True, True] if reduction == "none" else True
    assert loss.isnan().tolist() == wrong
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[2:].any()
    fine = [labels(4, device=device)]
    fine[0][0] = -100
    if function is losses.cross_entropy:
        fine.append(x.detach().roll(1, 0).softmax(1))
    got = [function(x, targets, reduction=reduction) for targets in fine]
    monkeypatch.undo()
    want = [function(x, targets, reduction=reduction) for targets in fine]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("function", [*PAIRS, losses.cross_entropy, losses.focal])
def test_no_value_is_read_where_there_is_none(function: Callable[..., Tensor]) -> None:
    target = X if function in PAIRS else Y
    assert function(X.to("meta"), target.to("meta")).shape == ()
    with FakeTensorMode() as mode:
        assert function(mode.from_tensor(X), mode.from_tensor(target)).shape == ()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X + 1, target), function(X + 1, target))


def test_a_gradient_for_each_example(device: torch.device) -> None:
    x, y = logits(4, CLASSES, device=device), labels(4, device=device)
    for function in (losses.cross_entropy, losses.focal):
        each = torch.func.vmap(torch.func.grad(function))(x, y)
        (whole,) = torch.autograd.grad(function(x, y, reduction="sum"), x)
        torch.testing.assert_close(each, whole)


def test_autocast_changes_nothing(device: torch.device) -> None:
    x, y = logits(4, CLASSES, device=device, dtype=torch.bfloat16), labels(4, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        inside = losses.cross_entropy(x, y), losses.kl_divergence(x, x.detach().roll(1, 0))
    outside = losses.cross_entropy(x, y), losses.kl_divergence(x, x.detach().roll(1, 0))
    torch.testing.assert_close(inside, outside)


@pytest.mark.parametrize("wrong", ["4", None, 0, math.nan])
def test_a_temperature_is_a_number_wherever_it_is_asked_for(wrong: object) -> None:
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    model = nn.Sequential(nn.Linear(4, 4))
    for function in (
        lambda: losses.kl_divergence(x, x, temperature=wrong),
        lambda: distillation.soft_targets(x, x, temperature=wrong),
        lambda: distillation.decoupled(x, x, y, temperature=wrong),
        lambda: distillation.contrastive(x, x, y, temperature=wrong),
        lambda: distillation.contrast(model, model, {"0": "0"}, x, temperature=wrong),
        lambda: distillation.from_logits(model, temperature=wrong),
        lambda: distillation.mutual(temperature=wrong),
        lambda: distillation.deep_supervision(model, ["0"], x, temperature=wrong),
    ):
        with pytest.raises(ValueError, match=f"finite number above 0, not {wrong!r}"):
            function()


def test_numbers_of_other_libraries_are_numbers() -> None:
    for number in (2, np.float32(2), np.int64(2), Fraction(2), torch.tensor(2.0)):
        checks.need_temperature(number)
    assert [checks.whole(n) for n in (3, np.int64(3), np.uint8(3), torch.tensor(3))] == [3] * 4
    for other in (2.5, 3.0, np.float64(3), "3", None, torch.tensor(3.0)):
        assert math.isnan(checks.whole(other))


def test_a_temperature_may_be_learned() -> None:
    x, temperature = torch.randn(3, 4), torch.ones((), requires_grad=True)
    losses.kl_divergence(x, x.flip(1), temperature=temperature).backward()
    assert temperature.grad is not None
    assert torch.isfinite(temperature.grad)
    compiled = torch.compile(losses.kl_divergence, backend="eager", fullgraph=True)
    expected = losses.kl_divergence(x, x.flip(1), temperature=3.0)
    torch.testing.assert_close(compiled(x, x.flip(1), temperature=3.0), expected)
