"""Training that pays for bits: what it counts is what the file takes, and its gradient is right."""

import copy

import pytest
import torch
from torch import nn

from structopt import compression, descent, training
from structopt.compression import LearnedCode, RatePenalty, prepare_rate
from structopt.compression.rate import LAST


def drawn(shape, spread, seed=0):
    """Whole numbers of a mixture of two discrete Laplace densities, a third of them wide."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.where(torch.rand(shape, generator=draw) < 1 / 3, spread, 0.05)
    first, second = (torch.rand(shape, generator=draw).log() for _ in range(2))
    return ((second - first) * size).round().double()


@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
def test_the_bits_counted_are_those_of_the_file(tmp_path, device, spread):
    model = nn.Linear(200, 300, bias=False, device=device)
    with torch.no_grad():
        model.weight.copy_(0.02 * drawn((300, 200), spread))
    rated = prepare_rate(model)
    (coding,) = rated.coding
    coding.log_step.data.fill_(0.02).log_()
    coding.fit(coding.codes(model.weight), rounds=200)
    counted = float(rated.eval().bits().detach()) / 8
    made, codes = rated.finish()
    report = compression.save(made, tmp_path / "x", codes)
    (row,) = report.rows
    assert row.form == "grid"
    assert row.bytes == pytest.approx(counted, rel=0.02)
    assert compression.entropy_bits(codes["weight"].codes) / 8 == pytest.approx(counted, rel=0.01)
    assert torch.allclose(made.weight, model.weight, atol=1e-6)


def test_the_table_is_a_density(device):
    coding = LearnedCode(torch.tensor(1.0, device=device, dtype=torch.float64))
    codes = drawn(20_000, 4.0).to(device)
    before = None
    for _ in range(5):
        coding.fit(codes, rounds=10)
        table = coding.table()
        assert float((-table).exp2().sum()) == pytest.approx(1, abs=1e-6)
        assert torch.equal(table, table.flip(0))
        assert table.argmin() == LAST
        bits = float(table[codes.long() + LAST].sum())
        assert before is None or bits <= before + 1e-6, "each round finds a likelier mixture"
        before = bits
    assert float(coding.eval().bits(codes).detach()) == pytest.approx(before)


def test_the_gradient_of_the_bits_is_their_slope_when_rounded_at_random(device):
    coding = LearnedCode(torch.tensor(0.1, device=device, dtype=torch.float64))
    coding.fit(drawn(2000, 5.0).to(device), rounds=50)
    coding.eval()
    draw = torch.Generator().manual_seed(1)
    x = (torch.randn(200, generator=draw, dtype=torch.float64)).to(device).requires_grad_()
    table = coding.table()

    def mean_bits(x, log_step):
        """Of codes that are the higher neighbour with the chance that keeps the mean."""
        y = x * (-log_step).exp()
        part, below = y - y.floor(), y.floor().long() + LAST
        return ((1 - part) * table[below] + part * table[below + 1]).sum()

    grads = torch.autograd.grad(coding.bits(x), [x, coding.log_step])
    h = 1e-7
    with torch.no_grad():
        for place in range(0, 200, 20):
            moved = [x.index_add(0, torch.tensor([place], device=device),
                                 x.new_tensor([s * h])) for s in (1, -1)]  # fmt: skip
            high, low = (mean_bits(m, coding.log_step) for m in moved)
            assert float(grads[0][place]) == pytest.approx(float(high - low) / (2 * h), rel=1e-4)
        high, low = (mean_bits(x, coding.log_step + s * h) for s in (1, -1))
    assert float(grads[1]) == pytest.approx(float(high - low) / (2 * h), rel=1e-4)
    whole = drawn(50, 5.0).to(device) * 0.1
    at_codes = float(mean_bits(whole, coding.log_step.detach()))
    assert float(coding.bits(whole).detach()) == pytest.approx(at_codes), (
        "the two agree at the codes"
    )


def test_the_gradient_of_the_task_passes_the_rounding(device):
    coding = LearnedCode(torch.tensor(0.5, device=device, dtype=torch.float64))
    x = torch.tensor([0.6, -0.2, 100.0], device=device, dtype=torch.float64, requires_grad=True)
    made = coding(x)
    assert made.tolist() == pytest.approx([0.5, 0.0, 0.5 * LAST])
    made.sum().backward()
    assert x.grad.tolist() == [1, 1, 0], "nothing where the codes end"
    slope = (1 - 1.2) + (0 + 0.4) + LAST  # LSQ: code - x/s inside, the code at the end
    assert float(coding.log_step.grad) == pytest.approx(0.5 * slope)


def trained(price, device):
    torch.manual_seed(0)
    x = torch.randn(256, 20, device=device)
    y = (x[:, :3] @ torch.tensor([[2.0], [-1.0], [1.0]], device=device)).relu()
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1)).to(device)
    rated = prepare_rate(model, [name for name, _ in model.named_parameters()])
    objective = RatePenalty(training.supervised(nn.functional.mse_loss), price)
    optimizer = descent.fused_adamw(rated, 0.02, weight_decay=0.0)
    training.train(rated, [(x, y)], objective, optimizer, epochs=50, device=device, autocast=None)
    made, codes = rated.finish()
    assert torch.equal(made(x), rated(x))
    with torch.no_grad():
        loss = nn.functional.mse_loss(made(x), y)
        return made, codes, float(loss), float(rated.bits())


def test_a_higher_price_buys_fewer_bits_for_a_higher_loss(tmp_path, device):
    bits, losses, sizes = [], [], []
    for price in 0.0, 0.02, 2.0:
        made, codes, loss, counted = trained(price, device)
        sizes.append(compression.save(made, tmp_path / "x", codes).bytes)
        assert set(codes) == {name for name, _ in made.named_parameters()}
        bits.append(counted)
        losses.append(loss)
    assert bits[0] > 1.5 * bits[1] > 2 * bits[2]
    assert losses[0] < losses[2]
    assert sizes[0] > sizes[1] > sizes[2]


def test_odd_tensors(device):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(0.3)
    model.empty = nn.Parameter(torch.empty(0, 4, device=device))
    before = copy.deepcopy(model.state_dict())
    rated = prepare_rate(model, ["0.weight", "0.bias", "empty"])
    made, codes = rated.finish()
    assert not codes["0.weight"].codes.any()
    assert codes["0.weight"].grid.bits == 2
    assert codes["empty"].codes.shape == (0, 4)
    assert torch.allclose(made[0].bias, torch.full_like(made[0].bias, 0.3), atol=0.04)
    assert torch.equal(made[1].weight, model[1].weight)
    assert float(rated.bits().detach()) < 20
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), "the caller's model is as it was"


def test_the_grid_is_as_small_as_the_codes_allow():
    for largest, bits in (0, 2), (1, 2), (2, 3), (3, 3), (4, 4), (7, 4), (8, 5), (64, 8), (300, 8):
        model = nn.Linear(2, 1, bias=False)
        rated = prepare_rate(model, step=1.0)
        rated.coding[0].log_step.data.zero_()
        rated.model.weight.data = torch.tensor([[float(largest), 0.0]])
        codes = rated.finish()[1]["weight"]
        assert codes.grid.bits == bits
        assert codes.codes.tolist() == [[min(largest, LAST), 0]]


def test_complaints():
    model = nn.Linear(3, 2)
    for step in 0.0, -1.0, float("inf"), float("nan"):
        with pytest.raises(ValueError, match="positive share"):
            prepare_rate(model, step=step)
    with pytest.raises(ValueError, match="no 'wieght'; its weights are weight"):
        prepare_rate(model, ["wieght"])
    with pytest.raises(ValueError, match=r"weight: .*model.float\(\) first"):
        prepare_rate(nn.Linear(3, 2).half())
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight: 1 of 6 numbers are NaN"):
        prepare_rate(model)
    for price in -1.0, float("nan"):
        with pytest.raises(ValueError, match="nothing or more"):
            RatePenalty(training.supervised(), price)
    batch = torch.ones(4, 3), torch.zeros(4).long()
    with pytest.raises(ValueError, match="Linear does not say what its bits cost"):
        RatePenalty(training.supervised(), 1.0)(nn.Linear(3, 2), batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_hold_what_paid_for_its_bits_and_was_cast(dtype, tmp_path):
    rated = compression.prepare_rate(nn.Linear(30, 20)).to(dtype)
    model, codes = rated.finish()
    x = torch.randn(5, 30).to(dtype)
    assert torch.equal(model(x), rated(x))
    compression.save(model, tmp_path / "rated.sopt", codes)
    made = compression.load(tmp_path / "rated.sopt", into=nn.Linear(30, 20))
    assert made.weight.dtype == dtype
    assert torch.equal(made.weight, model.weight)
