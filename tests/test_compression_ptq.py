"""After training: calibrated inputs, means put right, equalised ranges, second-order rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from structopt import compression
from structopt.compression import (
    MSE,
    Grid,
    MinMax,
    PerAxis,
    PerBlock,
    Percentile,
    PerGroup,
    PerTensor,
    Steps,
)
from structopt.networks import LeNet5, LeNet300
from structopt.slicing import free_attention


def small(device="cpu", dtype=torch.float32):
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip
    return model.to(device, dtype)


def pictures(device="cpu", dtype=torch.float32, batches=3):
    return [torch.randn(5, 2, 8, 8, device=device, dtype=dtype) for _ in range(batches)]


# Inputs


@pytest.mark.parametrize("fit", [MinMax(), Percentile(99), MSE()])
def test_steps_are_those_of_all_that_a_layer_reads(device, fit):
    model, batches = small(device), pictures(device)
    grid = Grid(8, False, fit=fit)
    steps = compression.calibrate(model, [(x, None) for x in batches], grid)
    read, x = {}, torch.cat(batches)
    for name, layer in model.named_children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            read[name] = x
        x = layer(x)
    assert list(steps) == list(read)
    for name, x in read.items():
        scale = compression.fit(x, grid).scale
        tolerance = 1e-6 if fit == MinMax() else 0.1  # here the extremes count once a batch more
        torch.testing.assert_close(steps[name].scale, scale, rtol=tolerance, atol=0)


def test_rounded_inputs_by_hand(device):
    model, batches = small(device), pictures(device)
    grid = Grid(4, False)
    steps = compression.calibrate(model, batches, grid)
    x = batches[0] * 1.5
    for made, given_steps in (
        (compression.round_inputs(model, grid, steps), steps),
        (compression.round_inputs(model, grid), {}),
    ):
        expected = x
        for name, layer in model.named_children():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                expected = compression.fake_quantize(expected, grid, given_steps.get(name))
            expected = layer(expected)
        assert torch.equal(made(x), expected)
        assert torch.equal(copy.deepcopy(made)(x), expected)
    assert not any(layer._forward_pre_hooks for layer in model), "the model given is untouched"


class Scaled(nn.Linear):
    def forward(self, x, by):
        return super().forward(x) * by


class TwoArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.scaled = nn.Linear(3, 3), Scaled(3, 2)

    def forward(self, x):
        return self.scaled(self.first(x), 2.0)


def test_steps_name_the_layers_and_other_arguments_pass(device):
    model, x = TwoArguments().to(device), torch.randn(9, 3, device=device)
    steps = compression.calibrate(model, [x], Grid(3), ["scaled"])
    made = compression.round_inputs(model, Grid(3), steps)
    read = compression.fake_quantize(model.first(x), Grid(3), steps["scaled"])
    torch.testing.assert_close(made(x), model.scaled(read, 2.0))


def test_what_is_kept_of_a_large_input_is_spread_over_it(device):
    x = torch.linspace(0, 1, 300_000, device=device)[None]
    grid = Grid(8, symmetric=False, fit=Percentile(50))
    steps = compression.calibrate(nn.Linear(300_000, 1).to(device), [x], grid)[""]
    middle = float(((255 - steps.zero) * steps.scale)[0])
    assert middle == pytest.approx(0.75, abs=1e-3), "a quarter is cut off above"


def test_integers_times_two_scales(device):
    """What the simulation claims: an integer product, scaled once, is the rounded layer."""
    layer, x = nn.Linear(64, 10, bias=False).to(device), torch.rand(7, 64, device=device)
    codes = compression.quantize_weights(layer, Grid(8))
    compression.put_(layer, codes)
    grid = Grid(8, False)
    steps = compression.calibrate(layer, [x], grid)
    simulated = compression.round_inputs(layer, grid, steps)(x)
    whole = compression.quantize(x, grid, steps[""])
    product = (whole.codes.double() - whole.steps.zero) @ codes["weight"].codes.double().T
    exact = product * whole.steps.scale.double() * codes["weight"].steps.scale.double()
    torch.testing.assert_close(simulated.double(), exact, rtol=1e-5, atol=1e-6)


def test_inputs_that_never_vary_and_bad_ones():
    model = nn.Linear(3, 2)
    grid = Grid(8, False)
    steps = compression.calibrate(model, [torch.zeros(4, 3)], grid)
    made = compression.round_inputs(model, grid, steps)
    assert torch.equal(made(torch.zeros(1, 3))[0], model.bias)
    steps = compression.calibrate(model, [torch.full((4, 3), 2.0)], grid)
    x = torch.full((1, 3), 2.0)
    torch.testing.assert_close(compression.round_inputs(model, grid, steps)(x), model(x))
    with pytest.raises(ValueError, match="batches are empty"):
        compression.calibrate(model, [], grid)
    with pytest.raises(ValueError, match="what the model reads: 8 of 8 numbers are NaN"):
        compression.calibrate(model, [torch.full((1, 2, 3), torch.nan)], grid)
    with pytest.raises(ValueError, match=r"not PerAxis\(axis=0\)"):
        compression.calibrate(model, [x], Grid(8, per=PerAxis(0)))
    with pytest.raises(ValueError, match="'fc' is no linear layer"):
        compression.calibrate(model, [x], grid, ["fc"])
    two = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no steps for '1'; there are for 0"):
        compression.round_inputs(two, grid, {"0": steps[""]}, names=["1"])


# Means and ranges


def test_every_output_has_its_mean_again(device):
    model, batches = small(device, torch.double), pictures(device, torch.double)
    rounded = copy.deepcopy(model)
    compression.put_(rounded, compression.quantize_weights(model, Grid(2)))

    def means(net):
        made, x = [], torch.cat(batches)
        for layer in net:
            x = layer(x)
            if isinstance(layer, nn.Conv2d | nn.Linear):
                made.append(x.transpose(0, 1).flatten(1).mean(1))
        return torch.cat(made)

    wrong = (means(rounded) - means(model)).abs().max()
    assert wrong > 0.01
    assert compression.correct_biases_(rounded, model, [(x, 0) for x in batches]) is rounded
    torch.testing.assert_close(means(rounded), means(model), rtol=0, atol=1e-9)


def test_an_image_without_a_batch_is_a_batch_of_one():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    line = nn.Sequential(nn.Conv1d(3, 5, 3), nn.ReLU(), nn.Conv1d(5, 4, 3, groups=1))
    for network, x in (model, torch.randn(3, 9, 8)), (line, torch.randn(3, 9)), (
        nn.Sequential(nn.Linear(3, 2)), torch.randn(3),
    ):  # fmt: skip
        grid = Grid(2)
        nearest = compression.quantize_weights(network, grid)
        one, alone = (compression.gptq_weights(network, [b], grid) for b in (x[None], x))
        for name, codes in one.items():
            assert torch.equal(alone[name].codes, codes.codes)
        one, alone = (
            compression.correct_biases_(
                compression.put_(copy.deepcopy(network), nearest),
                network, [b],
            )
            for b in (x[None], x)
        )  # fmt: skip
        assert torch.equal(one[0].bias, alone[0].bias)
        assert str(compression.input_zeros(network, [x[None]])) == str(
            compression.input_zeros(network, [x])
        )
    norm = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))
    one, alone = (compression.smooth_inputs(norm, [b]) for b in (x[None], x))
    assert torch.equal(one[1].weight, alone[1].weight)


def test_biases_of_other_models_and_missing_ones():
    bare = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    compression.correct_biases_(bare, copy.deepcopy(bare), [torch.randn(4, 3)])
    assert bare[0].bias is None
    with pytest.raises(ValueError, match=r"layers \['0', '1'\], the reference \[''\]"):
        compression.correct_biases_(bare, nn.Linear(3, 3), [torch.randn(4, 3)])


def test_equalised_ranges_and_the_same_function(device):
    model, x = small(device, torch.double), pictures(device, torch.double)[0]
    with torch.no_grad():
        for layer in model[0], model[5]:  # channels of very unlike ranges
            layer.weight *= torch.logspace(-3, 1, len(layer.weight), device=device).view(
                -1, *[1] * (layer.weight.ndim - 1)
            )
    made = compression.equalize(model, x, rounds=6)
    torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        made[5].weight.abs().amax(1), made[7].weight.abs().amax(0), rtol=0.02, atol=0
    )
    # The two halves of a grouped convolution read channel 0 and 3 by the same index: one factor.
    written = made[0].weight.abs().amax((1, 2, 3)).view(2, 3).amax(0)
    read = made[2].weight.abs().amax((0, 2, 3))
    torch.testing.assert_close(written, read, rtol=0.02, atol=0)


def test_equalisation_gives_a_copy_and_passes_norms_by():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 2, 9, 9)
    expected = model.eval()(x)
    for one, rounds in (model, 4), (model, 0), (nn.Sequential(nn.Conv2d(2, 2, 1)), 4):
        made = compression.equalize(one, x, rounds=rounds)
        assert made is not one
        for p in made.parameters():
            assert all(p is not own for own in one.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.allclose(compression.equalize(model, x)(x), expected, atol=1e-5)


def test_one_step_a_tensor_serves_equalised_channels(device):
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 5)).double().to(device)
    with torch.no_grad():
        factors = torch.logspace(-2, 2, 30, device=device, dtype=torch.double)
        model[0].weight.mul_(factors[:, None])
        model[0].bias.mul_(factors)
        model[2].weight.div_(factors)
    x = torch.randn(99, 8, device=device).double()

    def error(net):
        rounded = copy.deepcopy(net)
        compression.put_(rounded, compression.quantize_weights(net, Grid(8)))
        return (rounded(x) - model(x)).square().mean()

    assert error(compression.equalize(model, x)) < 0.001 * error(model)


def test_a_depthwise_network_that_one_step_a_tensor_ruins(device):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1),
    ).double().to(device)  # fmt: skip
    with torch.no_grad():  # the same function, written with channels of very unlike ranges
        factors = torch.logspace(-2, 2, 8, device=device, dtype=torch.double)
        model[0].weight.div_(factors.view(-1, 1, 1, 1))
        model[0].bias.div_(factors)
        model[2].weight.mul_(factors.view(-1, 1, 1, 1))
    x = torch.randn(20, 3, 9, 9, device=device).double()
    made = compression.equalize(model, x[:1], rounds=8)
    torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-12)
    reach = [made[0].weight.abs().amax((1, 2, 3)), made[2].weight.abs().amax((1, 2, 3))]
    reach.append(made[4].weight.abs().amax((0, 2, 3)))
    torch.testing.assert_close(reach[0], reach[1], rtol=0.02, atol=0)
    torch.testing.assert_close(reach[1], reach[2], rtol=0.02, atol=0)

    def error(net):
        rounded = copy.deepcopy(net)
        compression.put_(rounded, compression.quantize_weights(net, Grid(8)))
        return (rounded(x) - model(x)).square().mean()

    assert error(made) < 0.01 * error(model)


@pytest.mark.parametrize("bend", [nn.GELU(), nn.ReLU6()])  # no value of the example reaches 6
def test_equalisation_leaves_alone_what_it_cannot_scale(bend):
    model = nn.Sequential(nn.Linear(5, 6), bend, nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    made = compression.equalize(model.double(), torch.zeros(1, 5).double())
    x = 100 * torch.randn(9, 5).double()
    torch.testing.assert_close(made(x), model(x))
    assert torch.equal(made[0].weight, model[0].weight)
    assert not torch.equal(made[4].weight, model[4].weight)


def test_equalisation_scales_no_depthwise_convolution_through_a_clip():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(8, 4, 1)).double()
    made = compression.equalize(model, torch.zeros(1, 3, 9, 9).double())
    x = 100 * torch.randn(9, 3, 9, 9).double()
    torch.testing.assert_close(made(x), model(x))
    assert torch.equal(made[0].weight, model[0].weight)
    assert not torch.equal(made[4].weight, model[4].weight)


def padded(mask):
    return [{"src": torch.randn(2, 5, 16), "src_key_padding_mask": mask} for _ in range(3)]


@pytest.mark.filterwarnings(
    "ignore"
)  # torch's, of nested tensors; ours, of attention's projections
@pytest.mark.parametrize(
    "change",
    [
        lambda model, batches: compression.factorize(model, compression.Energy(0.2)),
        lambda model, batches: compression.round_inputs(model, Grid(8)),
        lambda model, batches: compression.round_inputs(
            model, Grid(8), compression.calibrate(model, batches, Grid(8))
        ),
        lambda model, batches: (
            compression.prepare_qat(model, Grid(8), inputs=Grid(8), batches=batches).model
        ),
        lambda model, batches: compression.put_(
            model, compression.gptq_weights(model, batches, Grid(8))
        ),
    ],
)
def test_torchs_encoder_drops_its_padding_or_not(change):
    """In evaluation mode it hands nested tensors to its layers, and reads their weights itself."""
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    batches, found = padded(mask), []
    for nested in (True, False):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
        made = change(model, batches)
        assert getattr(model, "use_nested_tensor", nested) == nested
        with torch.no_grad():
            found.append(made(**batches[0])[~mask])
    torch.testing.assert_close(*found)


# Second-order rounding


def by_elimination(weight, hessian, grid, steps, damp):
    """GPTQ as its paper derives it, one inverse Hessian shrunk column by column."""
    rows = weight.flatten(1).clone()
    scale = compression.Quantized(
        torch.ones_like(weight), Steps(steps.scale, steps.zero * 0), grid, weight.dtype
    )
    scale = scale.dequantize().flatten(1)
    zero = compression.Quantized(
        torch.ones_like(weight), Steps(steps.zero, steps.zero * 0), grid, weight.dtype
    )
    zero = zero.dequantize().flatten(1)
    n = len(hessian)
    inverse = (
        hessian + damp * hessian.diagonal().mean() * torch.eye(n, dtype=hessian.dtype)
    ).inverse()
    made = torch.empty_like(rows)
    for j in range(n):
        code = (rows[:, j] / scale[:, j]).round().add(zero[:, j]).clamp(*grid.codes)
        made[:, j] = code
        error = (rows[:, j] - (code - zero[:, j]) * scale[:, j]) / inverse[j, j]
        rows -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[None, j] / inverse[j, j]
    return made.view(weight.shape)


@pytest.mark.parametrize("per", [PerTensor(), PerAxis(0), PerGroup(8), PerBlock(3, 7)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_elimination_column_by_column(per, symmetric):
    x = torch.randn(300, 150).double() @ torch.randn(150, 150).double()
    weight, hessian = torch.randn(6, 150).double(), x.T @ x
    grid = Grid(3, symmetric, per)
    made = compression.gptq(weight, hessian, grid)
    steps = compression.fit(weight, grid)
    assert torch.equal(made.steps.scale, steps.scale)
    assert torch.equal(made.codes.double(), by_elimination(weight, hessian, grid, steps, 0.01))


@given(bits=st.integers(1, 8), symmetric=st.booleans(), seed=st.integers(0, 20))
def test_where_inputs_are_unrelated_gptq_rounds_to_nearest(bits, symmetric, seed):
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed)).double()
    grid = Grid(bits, symmetric, PerAxis(0))
    hessian = torch.diag(torch.arange(1.0, 31)).double()
    made = compression.gptq(weight, hessian, grid)
    assert torch.equal(made.codes, compression.quantize(weight, grid).codes)


def test_gptq_loses_less_of_what_the_layer_makes(device):
    better = []
    for bits in 2, 3, 4:
        x = torch.randn(400, 40, device=device) @ torch.randn(40, 40, device=device)
        weight, grid = torch.randn(16, 40, device=device), Grid(bits, per=PerAxis(0), fit=MSE())
        second, nearest = (
            compression.gptq(weight, x.T @ x, grid),
            compression.quantize(weight, grid),
        )
        lost = [(x @ (q.dequantize() - weight).T).square().sum() for q in (second, nearest)]
        better.append(float(lost[0] / lost[1]))
    assert max(better) < 0.8, better


def test_the_weights_of_a_model_one_layer_after_the_other(device):
    model, batches = small(device), pictures(device)
    grid = Grid(3, per=PerAxis(0))
    codes = compression.gptq_weights(model, [(x, 0) for x in batches], grid)
    assert list(codes) == ["0.weight", "2.weight", "5.weight", "7.weight"]
    x = torch.cat(batches)
    # The first convolution by hand: patches by unfold, of the padded pictures.
    patches = F.unfold(x, 3, padding=1).transpose(0, 1).flatten(1)
    first = compression.gptq(model[0].weight, patches @ patches.T, grid)
    assert torch.equal(codes["0.weight"].codes, first.codes)
    # The grouped one reads what the rounded first one makes.
    rounded = compression.put_(copy.deepcopy(model), {"0.weight": first})
    seen = rounded[1](rounded[0](x))
    parts = [F.unfold(half, 3, stride=2).transpose(0, 1).flatten(1) for half in seen.chunk(2, 1)]
    hessian = torch.stack([part @ part.T for part in parts])
    second = compression.gptq(model[2].weight, hessian, grid)
    assert (codes["2.weight"].codes == second.codes).float().mean() > 0.99
    nearest = compression.quantize_weights(model, grid)
    lost = [
        float((compression.put_(copy.deepcopy(model), c)(x) - model(x)).square().mean().detach())
        for c in (codes, nearest)
    ]
    assert lost[0] < 0.7 * lost[1]


class Tied(nn.Module):
    """A language model whose last layer reads with the weights of its embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.other, self.head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight, self.other.weight = self.embed.weight, self.inner.weight

    def forward(self, tokens):
        return self.head(self.other(self.inner(self.embed(tokens)).relu()))


def test_a_weight_that_layers_share_is_coded_once_for_all_that_reads_it():
    model, tokens, grid = Tied(), torch.randint(9, (40, 5)), Grid(3)
    codes = compression.gptq_weights(model, [tokens], grid)
    assert list(codes) == ["inner.weight", "embed.weight"]
    read = [model.embed(tokens), model.inner(model.embed(tokens)).relu()]
    rows = torch.cat([x.flatten(0, 1) for x in read]).detach()
    expected = compression.gptq(model.inner.weight, rows.T @ rows, grid)
    assert torch.equal(codes["inner.weight"].codes, expected.codes)
    made = compression.put_(copy.deepcopy(model), codes)
    assert made.head.weight is made.embed.weight
    assert list(compression.gptq_weights(model, [tokens], grid, ["embed.weight"])) == [
        "embed.weight"
    ]
    with pytest.raises(ValueError, match=r"'head.weight' is tied to 'embed.weight'"):
        compression.gptq_weights(model, [tokens], grid, ["head.weight"])


def test_an_expert_that_reads_nothing_of_the_first_batch_is_coded_too():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.left(x) if x.sum() > 0 else self.right(x)

    x = torch.rand(9, 4)
    assert sorted(compression.gptq_weights(Either(), [x, -x], Grid(3))) == [
        "left.weight",
        "right.weight",
    ]


def test_a_weight_that_other_parameters_compute_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="the weight of 1 is computed from other parameters"):
        compression.gptq_weights(model, [torch.randn(9, 4)], Grid(3))
    assert compression.gptq_weights(model, [torch.randn(9, 4)], Grid(3), ["0.weight"])


def test_a_pruned_weight_stays_pruned_and_a_dead_input_harms_nothing(device):
    x = torch.randn(200, 20, device=device) @ torch.randn(20, 20, device=device)
    x[:, 3] = 0  # the errors of related inputs reach far into the zeros
    weight = torch.randn(8, 20, device=device) * (torch.rand(8, 20, device=device) < 0.5)
    for symmetric in True, False:
        made = compression.gptq(weight, x.T @ x, Grid(4, symmetric, PerAxis(0))).dequantize()
        assert (made[weight == 0] == 0).all()
        assert made.isfinite().all()
    silent = compression.gptq(weight, torch.zeros(20, 20, device=device), Grid(4))
    assert torch.equal(silent.codes, compression.quantize(weight, Grid(4)).codes)
    model = LeNet5()
    codes = compression.gptq_weights(model, [torch.rand(4, 1, 28, 28)], Grid(4), ["fc2.weight"])
    assert list(codes) == ["fc2.weight"]


def test_bad_input_is_named():
    with pytest.raises(
        ValueError, match=r"hessian of shape \(3, 3\) does not fit a weight of shape \(2, 4\)"
    ):
        compression.gptq(torch.ones(2, 4), torch.eye(3), Grid())
    with pytest.raises(ValueError, match="batches are empty"):
        compression.gptq_weights(LeNet300(), [], Grid())
    with pytest.raises(ValueError, match=r"weight: the inputs of Conv3d"):
        compression.gptq_weights(nn.Conv3d(1, 1, 1), [torch.ones(1, 1, 2, 2, 2)], Grid())
    with pytest.raises(ValueError, match=r"'fc1.weight' is no weight of a linear layer"):
        compression.gptq_weights(
            nn.ModuleDict({"fc1": nn.Bilinear(2, 2, 2)}), [1], Grid(), ["fc1.weight"]
        )


def test_what_second_order_rounding_is_not_asked_is_told():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    for rounded in compression.gptq_weights, compression.adaround_weights:
        with pytest.raises(ValueError, match=r"'used.bias' is no weight of a linear layer"):
            rounded(Aside(), [torch.randn(9, 4)], Grid(3), ["used.bias"])
        with pytest.raises(ValueError, match=r"'unused.weight' never ran"):
            rounded(Aside(), [torch.randn(9, 4)], Grid(3), ["unused.weight"])


def test_rounded_inputs_are_saved_whole_or_refused(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(16, 8) ** 3
    rounded = compression.round_inputs(model, Grid(3, symmetric=False, fit=compression.MSE()))
    with pytest.raises(ValueError, match=r"0 finds steps by MSE.* use MinMax"):
        compression.save(rounded, tmp_path / "a")
    wide, y = copy.deepcopy(model).double(), x.double()
    steps = compression.calibrate(wide, [y], Grid(4, symmetric=False))
    static = compression.round_inputs(wide, Grid(4, symmetric=False), steps)
    compression.save(static, tmp_path / "b")
    again = compression.load(tmp_path / "b", nn.Sequential(nn.Linear(8, 8)).double())
    assert torch.equal(again(y), static(y))


def test_what_attention_reads_is_named_until_its_projections_are_layers(device):
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).to(device).eval()
    x, grid = torch.randn(3, 5, 8, device=device), Grid(4)
    for act in (
        lambda: compression.calibrate(model, [x], grid),
        lambda: compression.round_inputs(model, grid),
        lambda: compression.gptq_weights(model, [x], grid),
        lambda: compression.prepare_qat(model, grid, inputs=grid, batches=[x]),
    ):
        with pytest.warns(UserWarning, match=r"^self_attn.out_proj .*free_attention"):
            act()
    with pytest.raises(ValueError, match=r"'self_attn.out_proj' never ran"):
        compression.calibrate(model, [x], grid, names=["self_attn.out_proj"])
    free = free_attention(model)
    steps = compression.calibrate(free, [x], grid)
    assert list(steps) == ["self_attn.into", "self_attn.out", "linear1", "linear2"]
    torch.testing.assert_close(steps["self_attn.into"], compression.fit(x, grid))
    made = compression.round_inputs(free, grid, steps)
    given = compression.fake_quantize(x, grid, steps["self_attn.into"])
    one, other = made.self_attn.into(x), free.self_attn.into(given)
    assert torch.equal(one, other)
