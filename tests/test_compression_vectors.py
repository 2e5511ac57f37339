"""Shared vectors: the laws of k-means, what inputs weigh, training that keeps them, their file."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structopt import compression
from structopt.compression import PerAxis, PerBlock, PerGroup, PerTensor
from structopt.compression.forms import pack, unpack

UNITS = st.sampled_from([PerTensor(), PerAxis(0), PerAxis(1), PerGroup(2), PerBlock(4, 3)])


def members(shared):
    """For each unit: which vectors, row by row, are its own."""
    number = torch.arange(shared.index.numel()).view(shared.index.shape)
    return [unit[~unit.isnan()].long() for unit in shared.per.split(number.double())]


@given(UNITS, st.integers(1, 9), st.sampled_from([1, 2, 3]), st.integers(0, 50))
def test_a_fixed_point_of_lloyd(per, values, size, seed):
    x = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(seed)).double()
    shared = compression.share_vectors(x, values, size, per, rounds=300)
    assert shared.index.shape == (6, 12 // size)
    assert shared.table.shape == (len(members(shared)), values, size)
    vectors, index = x.reshape(-1, size), shared.index.flatten().long()
    made = shared.dequantize().reshape(-1, size)
    for table, own in zip(shared.table, members(shared), strict=True):
        assert torch.equal(made[own], table[index[own]])
        distance = torch.cdist(vectors[own], table)
        nearest = distance.gather(1, index[own][:, None])[:, 0]
        torch.testing.assert_close(nearest, distance.amin(1), rtol=0, atol=1e-7)
        for place in index[own].unique():
            mean = vectors[own][index[own] == place].mean(0)
            torch.testing.assert_close(table[place], mean)
    again = compression.share_vectors(x, values, size, per, rounds=300)
    assert torch.equal(again.dequantize(), shared.dequantize()), "the same in each run"


def test_vectors_of_one_number_are_shared_values(device):
    x = torch.cat([torch.randn(40) * 0.01 + centre for centre in (-3, -1, 0.5, 2)]).view(16, 10)
    made = compression.share_vectors(x.to(device), 4, 1).dequantize()
    torch.testing.assert_close(made, compression.share(x.to(device), 4).dequantize())


def test_vectors_that_belong_together_cost_fewer_bits(device):
    """Where neighbours are alike, a table of pairs beats a table of numbers of as many bits."""
    half = torch.randn(60, 30, device=device)
    x = torch.stack([half, half + 0.1 * torch.randn_like(half)], -1).flatten(1)
    pairs = compression.share_vectors(x, 16, 2)  # 4 bits for two weights
    alone = compression.share(x, 4)  # 2 bits for each
    lost = [float((made.dequantize() - x).norm()) for made in (pairs, alone)]
    assert lost[0] < 0.5 * lost[1]


def test_spread_starts_are_near_the_optimum():
    """Sixteen tight clouds: a start that misses one loses far more than the clouds are wide.

    One of them lies at zero exactly: its place is taken before any other is drawn. What lies far
    off is drawn, wherever it stands.
    """
    centres = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).flip(0)
    missed = 0
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        x = centres.repeat(12, 1) + 0.01 * torch.randn(192, 2, generator=draw)
        x[15::16], x[-1] = 0, 50
        made = compression.share_vectors(x.view(24, 16), 17, 2).dequantize()
        missed += int((made.view(-1, 2) - x).abs().max() > 0.1)
    assert missed <= 4


@pytest.mark.parametrize("power", [-30, 12])
def test_another_unit_of_weights_or_inputs_changes_no_choice(power, device):
    """Powers of two, which round nothing: the same places, and vectors as many times as large."""
    weight, times = torch.randn(30, 8, device=device), 2.0**power
    x = torch.randn(50, 4, device=device).repeat_interleave(2, 1)
    x *= torch.tensor([1, -1] * 4, device=device)  # what is always opposite weighs no sum
    for hessian in (None, x.T @ x):
        plain = compression.share_vectors(weight, 6, 2, hessian=hessian)
        scaled = compression.share_vectors(weight * times, 6, 2, hessian=hessian)
        assert torch.equal(scaled.index, plain.index)
        assert torch.equal(scaled.table, plain.table * times)
    other = compression.share_vectors(weight, 6, 2, hessian=times**2 * hessian.double())
    assert torch.equal(other.dequantize(), plain.dequantize())


@given(UNITS, st.integers(2, 9), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_few_distinct_vectors_are_kept_exactly_and_zeros_stay(per, values, dtype):
    table = torch.randn(values, 3).to(dtype)
    table[0] = 0
    x = table[torch.randint(0, values, (6, 4))].flatten(1)
    shared = compression.share_vectors(x, values, 3, per)
    assert shared.table.dtype == dtype
    assert torch.equal(shared.dequantize(), x)
    mixed = torch.randn(6, 4, 3).to(dtype) * (torch.rand(6, 4, 1) < 0.5)
    for rounds in (0, 50):
        made = compression.share_vectors(mixed.flatten(1), 2, 3, per, rounds=rounds).dequantize()
        assert (made.view(6, 4, 3)[(mixed == 0).all(2)] == 0).all()


def test_means_of_half_precision_are_of_float32(device):
    """Thousands of numbers whose sum float16 does not reach."""
    weight = 30 + torch.rand(9000, 2, device=device).half()
    shared = compression.share_vectors(weight, 2, 2)
    for made in (shared.table, shared.moved(weight)):
        assert made.dtype == torch.float16
        for place in range(2):
            mean = weight.double()[shared.index[:, 0] == place].mean(0)
            torch.testing.assert_close(made[0, place].double(), mean, rtol=1e-3, atol=0)


def test_errors_are_weighed_as_outputs_see_them(device):
    """With the hessian: the nearest of the table by what the layer makes of one vector's error."""
    x = torch.randn(500, 8, device=device).double()
    x *= 0.01 * torch.tensor([1, 9.0, 9, 1] * 2, device=device)
    weight, hessian = torch.randn(30, 8, device=device).double(), x.T @ x
    seeing = compression.share_vectors(weight, 6, 2, PerAxis(1), hessian=hessian, rounds=300)
    plain = compression.share_vectors(weight, 6, 2, PerAxis(1), rounds=300)
    lost = [float(((s.dequantize() - weight) @ x.T).square().sum()) for s in (seeing, plain)]
    assert lost[0] < 0.7 * lost[1]
    for place in range(4):
        own = slice(2 * place, 2 * place + 2)
        block = hessian[own, own] + 0.01 * hessian[own, own].diagonal().mean() * torch.eye(2).to(x)
        off = weight[:, None, own] - seeing.table[place]  # (rows, values, 2)
        cost = torch.einsum("rvi,ij,rvj->rv", off, block, off)
        picked = cost.gather(1, seeing.index[:, place, None].long())[:, 0]
        torch.testing.assert_close(picked, cost.amin(1), rtol=1e-6, atol=1e-9)
    blocks = [hessian[n : n + 2, n : n + 2] for n in range(0, 8, 2)]
    mean = torch.block_diag(*[sum(blocks) / 4] * 4)  # of the places that have a table in common
    one, same = (compression.share_vectors(weight, 6, 2, hessian=h) for h in (hessian, mean))
    torch.testing.assert_close(one.dequantize(), same.dequantize())
    grouped = torch.stack([hessian, 9 * hessian.flip(0, 1)])  # another one for the lower rows
    made = compression.share_vectors(weight, 6, 2, PerBlock(15, 4), hessian=grouped)
    for part, own in enumerate((slice(0, 15), slice(15, 30))):
        alone = compression.share_vectors(weight[own], 6, 2, hessian=grouped[part])
        assert torch.equal(made.dequantize()[own], alone.dequantize())
    dead = compression.share_vectors(weight, 6, 2, hessian=torch.zeros_like(hessian))
    unseen = compression.share_vectors(weight, 6, 2)
    assert torch.equal(dead.dequantize(), unseen.dequantize())


def test_the_weights_of_a_model_one_layer_after_the_other(device):
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    model, x = model.to(device), torch.randn(40, 2, 8, 8, device=device)
    plain = compression.share_weight_vectors(model, 4, 9)
    assert {name: codes.table.shape[1:] for name, codes in plain.items()} == {
        "0.weight": (4, 9), "3.weight": (4, 9)
    }  # fmt: skip
    seeing = compression.share_weight_vectors(model, 4, 9, batches=[(x, 0)])
    patches = nn.functional.unfold(x, 3).transpose(0, 1).flatten(1)
    first = compression.share_vectors(model[0].weight, 4, 9, hessian=patches @ patches.T)
    assert torch.equal(seeing["0.weight"].dequantize(), first.dequantize())
    small = compression.put_(copy.deepcopy(model), {"0.weight": first})
    read = small[:3](x)
    second = compression.share_vectors(model[3].weight, 4, 9, hessian=read.T @ read)
    assert torch.equal(seeing["3.weight"].dequantize(), second.dequantize())
    with pytest.raises(ValueError, match=r"0.weight: size=4 does not divide the 18 numbers"):
        compression.share_weight_vectors(model, 4, 4)
    assert list(compression.share_weight_vectors(model, 4, 4, names=["3.weight"])) == ["3.weight"]


def test_tied_training_is_descent_on_the_vectors(device):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double().to(device)
    with torch.no_grad():
        model[0].weight[:3] = 0
    names = ["0.weight", "2.weight"]
    codes = {
        name: compression.share_vectors(model.get_parameter(name), 4, 2, PerAxis(1))
        for name in names
    }
    after_step = compression.tie(codes)
    after_step(model)
    x, y = torch.randn(16, 6, device=device).double(), torch.randn(16, 3, device=device).double()
    leaves = {n: codes[n].table.clone().requires_grad_() for n in names}
    full = {n: leaf.flatten(0, 1)[codes[n].places()].flatten(1) for n, leaf in leaves.items()}
    loss = (torch.func.functional_call(model, full, (x,)) - y).square().mean()
    expected = {}
    for (name, leaf), grad in zip(
        leaves.items(), torch.autograd.grad(loss, [*leaves.values()]), strict=True
    ):
        count = torch.bincount(codes[name].places().flatten(), minlength=leaf[..., 0].numel())
        step = 0.1 * grad / count.clamp(min=1).view(*leaf.shape[:2], 1)
        expected[name] = leaf.detach() - step * leaf.detach().any(2, keepdim=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    after_step(model)
    for name in names:
        torch.testing.assert_close(after_step.codes[name].table, expected[name])
        assert torch.equal(model.get_parameter(name), after_step.codes[name].dequantize())
    assert (model[0].weight[:3] == 0).all()
    with pytest.raises(ValueError, match=r"shape \(8, 6\), the weight \(9, 6\)"):
        compression.tie({"weight": codes["0.weight"]})(nn.Linear(6, 9))


@given(UNITS, st.sampled_from([torch.float16, torch.float32, torch.float64]), st.integers(1, 9))
def test_a_file_gives_vectors_back_bit_for_bit(tmp_path_factory, per, dtype, values):
    path = tmp_path_factory.mktemp("file") / "x"
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Linear(18, 5)).to(dtype)
    codes = compression.share_weight_vectors(model, values, 3, per)
    report = compression.save(compression.put_(model, codes), path, codes)
    assert {row.name for row in report.rows if row.form == "vectors"} == set(codes)
    fresh = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Linear(18, 5)).to(dtype)
    made = compression.load(path, fresh)
    for name, weight in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight), name


def test_vectors_that_no_file_can_have():
    weight = torch.randn(6, 8)
    packed = pack(weight, compression.share_vectors(weight, 4, 2, PerAxis(1)))
    assert packed.form == ["vectors", 4, 4, 2, ["PerAxis", 1]]
    for form, why in (
        (["vectors", 4, 3, 2, ["PerAxis", 1]], "tables of 3 vectors do not fit"),
        (["vectors", 5, 4, 2, ["PerAxis", 1]], "its 5 tables"),
        (["vectors", 4, 4, 3, ["PerAxis", 1]], "4 vectors of 3 fit no tensor"),
        (["vectors", 4, 4, 0, ["PerAxis", 1]], "4 vectors of 0 fit no tensor"),
        (["vectors", 4, 300, 2, ["PerAxis", 1]], "300 vectors of 2 fit no tensor"),
        (["vectors", 6, 4, 2, ["PerAxis", 0]], "48 numbers of 4 bytes do not lie"),
        (["vectors", 4, 4, 4, ["PerAxis", 1]], "hold no symbols"),
    ):
        with pytest.raises(ValueError, match=why):
            unpack(form, packed.parts, torch.float32, weight.shape)


def test_bad_input_and_the_edge():
    with pytest.raises(ValueError, match=r"size=3 does not divide the 8 numbers.*\(2, 4, 2\)"):
        compression.share_vectors(torch.ones(2, 4, 2), 4, 3)
    with pytest.raises(ValueError, match="size=0"):
        compression.share_vectors(torch.ones(2, 4), 4, 0)
    for values in (257, 0, 2.5, True, "3"):
        with pytest.raises(ValueError, match=f"1 to 256 vectors, not {values!r}"):
            compression.share_vectors(torch.ones(2, 4), values, 2)
    assert len(compression.share_vectors(torch.randn(300, 1), 256, 1).index.unique()) == 256
    with pytest.raises(ValueError, match="size='2' does not divide"):
        compression.share_vectors(torch.ones(2, 4), 4, "2")
    with pytest.raises(ValueError, match="1 of 8 numbers are NaN"):
        compression.share_vectors(torch.tensor([[torch.nan] + [1.0] * 7]), 4, 2)
    with pytest.raises(ValueError, match="cannot stand for zeros"):
        compression.share_vectors(torch.tensor([[0.0, 0, 1, 1]]), 1, 2)
    with pytest.raises(ValueError, match=r"shape \(3, 3\) does not fit a weight of shape \(2, 4\)"):
        compression.share_vectors(torch.ones(2, 4), 4, 2, hessian=torch.eye(3))
    zero = compression.share_vectors(torch.tensor([[0.0, 1, 0, 3]]), 1, 2)  # no vector of zeros
    assert zero.dequantize().tolist() == [[0, 2, 0, 2]]
    hessian = torch.tensor([[1.0, 2], [2, 1]])
    with pytest.raises(ValueError, match="the hessian is no sum of x xᵀ"):
        compression.share_vectors(torch.randn(9, 2), 4, 2, hessian=hessian)
    for per in (PerTensor(), PerAxis(0), PerAxis(1)):
        none = compression.share_vectors(torch.ones(0, 4), 4, 2, per)
        assert none.dequantize().shape == (0, 4)
        assert none.table.shape == (len(members(none)), 4, 2)
    tiny = 1e-200 * torch.randn(6, 4).double()  # its squares are zero
    assert compression.share_vectors(tiny, 3, 2).dequantize().isfinite().all()
    assert compression.share_vectors(torch.ones(6), 4, 2).dequantize().tolist() == [1] * 6
    same = compression.share_vectors(torch.full((300, 4), 0.1), 1, 2)  # a mean would be rounded
    assert torch.equal(same.dequantize(), torch.full((300, 4), 0.1))
