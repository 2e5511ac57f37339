"""Tables of uneven values: the levels of NF4, nearest ones, zeros that stay, and their file."""

import struct
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structopt import compression
from structopt.compression import MSE, Grid, NormalFloat, PerAxis, PerBlock, PerGroup, PerTensor
from structopt.compression.forms import pack, unpack
from structopt.compression.planes import write_numbers

NF4 = [  # Dettmers et al., 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
UNITS = st.sampled_from([PerTensor(), PerAxis(0), PerGroup(4), PerGroup(7), PerBlock(2, 3)])


@dataclass(frozen=True)
class Listed:
    """A table of one's own."""

    listed: tuple[float, ...]

    def values(self, bits):
        return self.listed


FP4 = Listed(tuple(sorted({s * v / 6 for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for s in (-1, 1)})))


def test_the_levels_are_those_of_the_paper_and_of_torchao():
    found = NormalFloat().values(4)
    assert found == pytest.approx(NF4, abs=1e-6)
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    weight = torch.randn(64, 64)
    theirs = nf4.to_nf4(weight, 64, 8).quantized_data
    ours = compression.quantize(weight, Grid(4, per=PerGroup(64), levels=NormalFloat())).codes
    pairs = ours.flatten()[::2] << 4 | ours.flatten()[1::2]
    assert (pairs == theirs).float().mean() > 0.995, "theirs have four digits"
    for bits in range(2, 9):
        values = NormalFloat().values(bits)
        assert len(values) == 2**bits
        assert values[2 ** (bits - 1) - 1] == 0
        assert sum(value > 0 for value in values) == 2 ** (bits - 1)


@given(
    per=UNITS,
    levels=st.sampled_from([NormalFloat(), FP4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_each_weight_gets_the_nearest_level_of_its_unit(per, levels, dtype):
    x = torch.randn(5, 10).to(dtype)
    x[0, :3] = 0
    made = compression.quantize(x, Grid(4, per=per, levels=levels))
    assert made.codes.dtype == torch.uint8
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    units, value = per.split(x.to(wide)), per.split(made.dequantize().to(wide))
    scale = units.abs().nan_to_num(0).amax(1)
    assert torch.equal(made.steps.scale[scale > 0], scale[scale > 0])
    table = torch.tensor(levels.values(4), dtype=wide)
    least = (units[..., None] - scale[:, None, None] * table).abs().amin(-1)
    off = torch.finfo(dtype).eps * scale[:, None]
    assert ((value - units).abs() <= least + off).logical_or(units.isnan()).all()
    assert (made.dequantize()[x == 0] == 0).all(), "a pruned weight stays pruned"
    again = compression.quantize(made.dequantize(), made.grid, made.steps)
    assert torch.equal(again.codes, made.codes)


def test_normal_weights_lose_less_than_on_even_steps(device):
    weight = torch.randn(200, 64, device=device)
    lost = {}
    for grid in Grid(4, per=PerGroup(64)), Grid(4, per=PerGroup(64), levels=NormalFloat()):
        lost[grid.levels] = float((compression.quantize(weight, grid).dequantize() - weight).norm())
    assert lost[NormalFloat()] < 0.92 * lost[None]
    fitted = Grid(3, per=PerAxis(0), fit=MSE(), levels=NormalFloat())
    least = (compression.quantize(weight, fitted).dequantize() - weight).square().sum(1)
    whole = Grid(3, per=PerAxis(0), levels=NormalFloat())
    plain = (compression.quantize(weight, whole).dequantize() - weight).square().sum(1)
    assert (least <= plain * (1 + 1e-6)).all()
    assert least.sum() < 0.95 * plain.sum()
    assert not compression.quantize(torch.zeros(3, 9, device=device), whole).dequantize().any()
    assert compression.quantize(torch.zeros(0, 9), whole).dequantize().shape == (0, 9)


def test_gradients_pass_straight_through(device):
    grid = Grid(4, per=PerGroup(4), levels=NormalFloat())
    x = torch.randn(3, 8, device=device, requires_grad=True)
    steps = compression.fit(x, grid)
    half = compression.Steps(steps.scale / 2, steps.zero)
    for given_steps in None, half:
        made = compression.fake_quantize(x, grid, given_steps)
        expected = compression.quantize(x, grid, given_steps).dequantize()
        assert torch.equal(made, expected)
        (slope,) = torch.autograd.grad(made.sum(), x)
        reach = (steps if given_steps is None else half).scale.repeat_interleave(4).view(3, 8)
        gap = 1 - NF4[-2], NF4[1] + 1  # the last steps above and below; half of one is inside
        end = torch.where(x > 0, 1 + gap[0] / 2, 1 + gap[1] / 2)
        assert torch.equal(slope, (x.abs() <= reach * end).float())
    assert not slope.all()


def test_a_learned_scale_has_the_gradient_of_its_levels(device):
    x = torch.linspace(-2, 2, 41, dtype=torch.double, device=device)
    grid = Grid(3, levels=NormalFloat())
    scale = torch.tensor([0.9], dtype=torch.double, device=device)
    steps = compression.Steps(scale, torch.full_like(scale, 3))
    step = compression.LearnedStep(grid, steps).to(device)
    made = step(x)
    assert torch.equal(made, compression.quantize(x, grid, steps).dequantize())
    made.sum().backward()
    table = torch.tensor(NormalFloat().values(3), dtype=torch.double, device=device)
    level = table[(x[:, None] / scale - table).abs().argmin(1)]
    beyond = (x / scale > 1.5 - table[-2] / 2) | (x / scale < -1.5 - table[1] / 2)
    each = torch.where(beyond, level, level - x / scale)
    torch.testing.assert_close(step.scale.grad, each.sum()[None] / (41 * 7) ** 0.5)


def test_second_order_rounding_on_levels(device):
    x = torch.randn(300, 24, device=device).double() @ torch.randn(24, 24, device=device).double()
    weight = torch.randn(6, 24, device=device).double()
    weight[:, ::5] = 0
    grid = Grid(3, per=PerGroup(8), levels=NormalFloat())
    nearest = compression.quantize(weight, grid)
    apart = compression.gptq(weight, torch.eye(24, device=device).double(), grid)
    assert torch.equal(apart.codes, nearest.codes)
    second = compression.gptq(weight, x.T @ x, grid)
    assert (second.dequantize()[:, ::5] == 0).all()
    lost = [((made.dequantize() - weight) @ x.T).norm() for made in (second, nearest)]
    assert lost[0] < 0.9 * lost[1]


@given(per=UNITS, bits=st.integers(2, 8), double=st.booleans())
def test_a_file_gives_levels_back_bit_for_bit(tmp_path_factory, per, bits, double):
    path = tmp_path_factory.mktemp("file") / "x"
    dtype = torch.float64 if double else torch.float32
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(9, 5)).to(dtype)
    codes = compression.quantize_weights(model, Grid(bits, per=per, levels=NormalFloat()))
    report = compression.save(compression.put_(model, codes), path, codes)
    assert {row.name for row in report.rows if row.form == "levels"} == set(codes)
    assert "levels" in str(report)
    fresh = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(9, 5)).to(dtype)
    made = compression.load(path, fresh)
    for name, weight in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight), name


def test_only_files_with_levels_need_the_second_version(tmp_path):
    model = nn.Linear(64, 32)
    for version, grid in (1, Grid(4)), (2, Grid(4, levels=FP4)):
        codes = compression.quantize_weights(model, grid)
        small = compression.put_(nn.Linear(64, 32), codes)
        report = compression.save(small, tmp_path / "x", codes)
        assert struct.unpack_from("<H", (tmp_path / "x").read_bytes(), 8) == (version,)
        assert torch.equal(compression.load(tmp_path / "x", model).weight, small.weight)
        (weight,) = (row for row in report.rows if row.name == "weight")
        assert weight.entropy < weight.bytes < 1150


def test_levels_that_no_file_can_have():
    grid, weight = Grid(2, per=PerAxis(0), levels=NormalFloat()), torch.randn(3, 40)
    packed = pack(weight, compression.quantize(weight, grid))
    assert packed.form == ["levels", 4, ["PerAxis", 0]]
    back = unpack(packed.form, packed.parts, torch.float32, weight.shape)
    assert torch.equal(back, compression.quantize(weight, grid).dequantize())
    few = [write_numbers(torch.zeros(3)), *packed.parts[1:]]
    for form, parts, why in (
        (["levels", 3, ["PerAxis", 0]], few, "beyond its 3 levels"),
        (["levels", 0, ["PerAxis", 0]], packed.parts, "beyond its 0 levels"),
        (["levels", 5, ["PerAxis", 0]], packed.parts, "5 numbers of 4 bytes do not lie"),
        (["levels", 4, ["PerAxis", 1]], packed.parts, "40 numbers of 4 bytes do not lie"),
        (["levels", 4, ["PerAxis", 0]], packed.parts[1:], "unpack"),
    ):
        with pytest.raises(ValueError, match=why):
            unpack(form, parts, torch.float32, weight.shape)


def test_tables_that_are_none():
    for wrong, why in (
        ((0.0, 1.0, 0.5), "in order"),
        ((-1.0, 1.0), "with a 0"),
        ((0.0,), "2 to 16 values"),
        (tuple(k / 16 for k in range(17)), "2 to 16 values"),
        ((-3.0, 0.0, 2.0), "size is not 1: divide"),
    ):
        with pytest.raises(ValueError, match=why):
            Grid(4, levels=Listed(wrong))
    with pytest.raises(ValueError, match="2 bits or more, not 1"):
        Grid(1, levels=NormalFloat())
    with pytest.raises(ValueError, match="take symmetric=True"):
        Grid(4, symmetric=False, levels=NormalFloat())
    with pytest.raises(ValueError, match="inputs lie on even steps"):
        compression.round_inputs(nn.Linear(2, 2), Grid(4, levels=NormalFloat()))
    with pytest.raises(ValueError, match="one or two symmetric bits, not"):
        compression.quantize(
            torch.ones(3), Grid(2, fit=compression.LeastSquares(), levels=NormalFloat())
        )
