"""Training with rounding in sight: the gradients of LSQ and PACT, zeros that stay, the result."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structopt import checkpoint, compression, training
from structopt.compression import PACT, Grid, LearnedClip, LearnedStep, PerAxis, PerGroup, PerTensor
from structopt.networks import LeNet300


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    per=st.sampled_from([PerTensor(), PerAxis(0), PerGroup(4)]),
)
def test_lsq_rounds_as_quantize_and_its_gradients_are_those_of_the_paper(bits, symmetric, per):
    x = torch.randn(5, 10, dtype=torch.double, requires_grad=True)
    grid = Grid(bits, symmetric, per)
    steps = compression.fit(x * 0.6, grid)
    step = LearnedStep(grid, steps)
    made, upstream = step(x), torch.randn(5, 10).double()
    assert torch.equal(made, compression.quantize(x, grid, steps).dequantize())
    made.backward(upstream)
    first, last = grid.codes
    expected = torch.zeros_like(steps.scale)
    units, ups = per.split(x.detach()), per.split(upstream)
    for u, (row, up) in enumerate(zip(units, ups, strict=True)):
        s, z = steps.scale[u], steps.zero[u]
        for value, g in zip(row.tolist(), up.tolist(), strict=True):
            if value != value:
                continue
            v = value / s
            low, high = first - z, last - z
            grad = low if v.round() < low else high if v.round() > high else v.round() - v
            expected[u] += g * grad
    expected /= (units.shape[1] * last) ** 0.5
    torch.testing.assert_close(step.scale.grad, expected)
    other = x.detach().clone().requires_grad_()
    compression.fake_quantize(other, grid, steps).backward(upstream)
    torch.testing.assert_close(x.grad, other.grad)


def test_the_scale_follows_what_finite_differences_of_the_error_say(device):
    """Away from rounding's jumps, LSQ's gradient of the squared error to the scale is exact where
    values are clipped: there the output is the scale times the last code."""
    x = torch.tensor([5.0, -7.0, 9.0], device=device, dtype=torch.double)
    grid = Grid(3)
    scale = torch.tensor([1.1], device=device, dtype=torch.double)
    step = LearnedStep(grid, compression.Steps(scale, torch.zeros_like(scale)))
    (step(x) - x).square().sum().backward()
    small = 1e-6
    errors = [
        (compression.fake_quantize(x, grid, compression.Steps(s, s * 0)) - x).square().sum()
        for s in (scale + small, scale - small)
    ]
    slope = (errors[0] - errors[1]) / (2 * small)
    torch.testing.assert_close(step.scale.grad[0] * (3 * 3) ** 0.5, slope)


def test_pact_clips_rounds_and_learns_its_clip(device):
    x = torch.tensor([-1.0, 0.3, 1.4, 2.6], device=device, requires_grad=True)
    clip = LearnedClip(PACT(2).grid, torch.tensor(1.5, device=device))
    made = clip(x)
    torch.testing.assert_close(made, torch.tensor([0, 0.5, 1.5, 1.5], device=device))
    made.backward(torch.tensor([1.0, 10, 100, 1000], device=device))
    assert x.grad.tolist() == [0, 10, 100, 0]
    assert float(clip.clip.grad) == 1000
    assert torch.equal(made, compression.fake_quantize(x, PACT(2).grid, clip.steps))


def blobs(device, seed=0):
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 6, generator=draw) * 2
    y = torch.randint(0, 4, (256,), generator=draw)
    x = centres[y] + torch.randn(256, 6, generator=draw)
    return x.to(device), y.to(device)


def fitted(model, x, y, steps=150, lr=0.01):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def net(device):
    return nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    ).to(device)


@pytest.mark.parametrize("inputs", [None, Grid(4, False), Grid(4)], ids=str)
def test_training_repairs_what_rounding_broke_and_finish_computes_the_same(device, inputs):
    x, y = blobs(device)
    model = net(device)
    fitted(model, x, y)
    before = copy.deepcopy(model.state_dict())
    qat = compression.prepare_qat(model, Grid(2, per=PerAxis(0)), inputs=inputs, batches=[x])
    first = float(nn.functional.cross_entropy(qat(x), y).detach())
    last = fitted(qat, x, y)
    assert last < 0.5 * first
    made, codes = qat.eval().finish()
    assert torch.equal(made(x), qat(x))
    assert list(codes) == ["0.weight", "2.weight", "4.weight"]
    for name, coded in codes.items():
        assert torch.equal(made.get_parameter(name), coded.dequantize())
        assert coded.codes.abs().max() <= 1
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_pact_where_layers_read_what_a_relu_made(device):
    x, y = blobs(device)
    model = nn.Sequential(nn.ReLU(), *net(device))
    fitted(model, x, y)
    qat = compression.prepare_qat(model, Grid(3), inputs=PACT(3), batches=[x])
    clips = [p for n, p in qat.named_parameters() if n.endswith("clip")]
    before = [p.detach().clone() for p in clips]
    fitted(qat, x, y)
    assert len(clips) == 3
    assert all(not torch.equal(p, b) for p, b in zip(clips, before, strict=True))
    made, _ = qat.finish()
    assert torch.equal(made(x), qat(x))


def test_a_pruned_network_keeps_its_zeros_under_momentum_and_decay(device):
    x, y = blobs(device)
    model = net(device)
    with torch.no_grad():
        model[2].weight.mul_(torch.rand(32, 32, device=device) < 0.1)
    zeros = model[2].weight == 0
    qat = compression.prepare_qat(model, Grid(4, False))
    optimizer = torch.optim.AdamW(qat.parameters(), 0.01, weight_decay=0.1)
    training.train(qat, [(x, y)] * 10, training.supervised(), optimizer, epochs=2)
    made, codes = qat.finish()
    assert (made[2].weight[zeros] == 0).all()
    assert (qat.weights()["2.weight"][zeros] == 0).all()
    assert (made[2].weight[~zeros] != 0).float().mean() > 0.5
    del codes


def test_it_is_an_ordinary_module(tmp_path, device):
    x, _ = blobs(device)
    qat = compression.prepare_qat(net(device), Grid(4), inputs=Grid(8), batches=[x])
    twin = copy.deepcopy(qat)
    assert torch.equal(twin(x), qat(x))
    with torch.no_grad():
        twin.rounding[0].scale *= 3
    assert not torch.equal(twin(x), qat(x)), "a copy has steps of its own"
    with torch.no_grad():
        for step in twin.inputs.values():
            step.scale *= 9
    changed = compression.prepare_qat(net(device), Grid(4), inputs=Grid(8), batches=[x])
    changed.load_state_dict(twin.state_dict())
    assert torch.equal(changed(x), twin(x))
    made, codes = qat.finish()
    compression.save(made, tmp_path / "x", codes)
    fresh = compression.load(tmp_path / "x", net(device))
    assert torch.equal(fresh[0].weight, made[0].weight)
    checkpoint.save(made, tmp_path / "y")
    small = compression.prepare_qat(LeNet300().half(), Grid(4, per=PerGroup(100)))
    assert small.weights()["fc1.weight"].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("inputs", [None, Grid(8, False), PACT(4)], ids=str)
def test_cast_to_another_type_it_still_is_its_file(tmp_path, dtype, inputs, device):
    x = blobs(device)[0].relu()
    weights = Grid(3, False, per=PerGroup(7))
    qat = compression.prepare_qat(
        nn.Sequential(nn.ReLU(), *net(device)), weights, inputs=inputs, batches=[x]
    )
    qat, x = qat.to(dtype), x.to(dtype)
    qat(x).square().sum().backward()
    assert all(step.scale.grad.dtype == dtype for step in qat.rounding)
    made, codes = qat.finish()
    assert torch.equal(made(x), qat(x))
    compression.save(made, tmp_path / "x", codes)
    fresh = nn.Sequential(nn.ReLU(), *net(device)).to(dtype)
    assert torch.equal(compression.load(tmp_path / "x", fresh)(x), made(x))


def test_bad_input_is_named(device):
    x, _ = blobs(device)
    model = net(device)
    with pytest.raises(ValueError, match="pass batches="):
        compression.prepare_qat(model, Grid(4), inputs=Grid(8))
    with pytest.raises(ValueError, match=r"0.weight: .*which LSQ does not train"):
        compression.prepare_qat(model, Grid(1))
    with pytest.raises(ValueError, match="0 reads negative numbers"):
        compression.prepare_qat(model, Grid(4), inputs=PACT(), batches=[x])
    with pytest.raises(ValueError, match=r"no 'fc\.weight'"):
        compression.prepare_qat(model, Grid(4), names=["fc.weight"])
