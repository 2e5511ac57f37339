"""What is read off a running network: outputs in any container; it is left as it was."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from structopt import compression
from structopt.compression import Grid, LearnedClip, Percentile
from structopt.compression.sameness import computes_the_same

Out = dataclasses.make_dataclass("Out", [("logits", torch.Tensor)])


class Last(nn.Module):
    """Hands on what it reads in some way."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        return self.way(x)


class Times(nn.Linear):
    """Reads a plain number."""

    def forward(self, factor):
        return self.weight * factor


def drawn(y):
    return y + torch.randn(y.shape).to(y)


def test_changes_are_measured_in_any_container_and_never_of_nothing():
    x, layers = torch.randn(9, 6), (nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    inside = nn.Sequential(*layers, Last(Out))
    grid = Grid(2, symmetric=False, fit=Percentile(50))
    change = compression.clip_activations(nn.Sequential(*layers), [x], grid).change
    assert compression.clip_activations(inside, [x], grid).change == change > 0
    assert compression.mix_bits(inside, [x], 10_000, Grid()).change > 0
    with pytest.raises(ValueError, match="makes no tensor of these batches, or they are empty"):
        compression.mix_bits(inside, [x[:0]], 10_000, Grid())
    numbers = nn.Sequential(*layers, Last(lambda y: float(y.sum())))
    with pytest.raises(ValueError, match="makes no tensor of these batches"):
        compression.mix_bits(numbers, [x], 10_000, Grid())
    assert compression.mix_bits(Times(2, 3), [2.0], 10_000, Grid()).change > 0


def test_a_network_that_draws_numbers_is_not_changed_by_them():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Last(drawn))
    made = compression.clip_activations(model, [torch.randn(9, 6)], Grid(8, symmetric=False))
    assert made.change < 0.01
    assert computes_the_same(model.double(), copy.deepcopy(model), torch.randn(9, 6))


FUNCTIONS = {
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 1.5),
    "threshold": lambda x: F.threshold(x, 0.1, -2.0),
    "leaky in place": lambda x: F.leaky_relu_(x, 0.3),
    "elu in place": F.elu_,
    "hardtanh in place": lambda x: F.hardtanh_(x, -0.5, 0.25),
    "torch.selu_": torch.selu_,
    "torch.celu": lambda x: torch.celu(x, 1.2),
    "torch.threshold": lambda x: torch.threshold(x, 0.2, 0.5),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_activation_written_as_a_function_becomes_a_module(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(FUNCTIONS[function](self.first(x)))

    model, x = Net(), torch.randn(50, 6)
    made = compression.separate_activations(model, x)
    assert len(list(made.children())) == 3
    assert torch.equal(made(x), model(x))


def test_clips_made_under_inference_mode_are_trained(device):
    x = torch.randn(5, 6).to(device)
    with torch.inference_mode():
        relu = nn.Sequential(nn.ReLU(), nn.Linear(6, 4)).to(device)
        steps = compression.PACT(), Grid(8)
        prepared = [
            compression.prepare_qat(relu, Grid(4), inputs=step, batches=[x]) for step in steps
        ]
        skipping = compression.skip_zeros(relu, [x], rounds=1, at_least=0).model
        blended = compression.blend_activations(relu, ["0"])
    for model in (*prepared, skipping, blended):
        model(x.clone()).sum().backward()
        assert all(p.grad is not None and not p.is_inference() for p in model.parameters())
    assert any(isinstance(m, LearnedClip) for m in prepared[0].modules())


class Counting(nn.Module):
    """Counts its calls in a buffer, and draws a random number in each."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        noise = torch.rand(1).to(x)
        return self.last(self.relu(self.first(x))) + 0 * noise


GRID = Grid(4)
LOOKS = {
    "calibrate": lambda m, b: compression.calibrate(m, b, GRID),
    "gptq": lambda m, b: compression.gptq_weights(m, b, GRID),
    "vectors": lambda m, b: compression.share_weight_vectors(m, 4, 1, batches=b),
    "smooth": lambda m, b: compression.smooth_inputs(m, b),
    "mix": lambda m, b: compression.mix_bits(m, b, 1000, Grid()),
    "clip": lambda m, b: compression.clip_activations(m, b, Grid(4, False)),
    "zeros": lambda m, b: compression.input_zeros(m, b),
    "skip": lambda m, b: compression.skip_zeros(m, b, rounds=1),
    "correct": lambda m, b: compression.correct_biases_(m, copy.deepcopy(m), b),
    "prepare": lambda m, b: compression.prepare_qat(m, GRID, inputs=Grid(8), batches=b),
    "spectra": lambda m, b: compression.spectra(m, batches=b),
    "fold": lambda m, b: compression.fold_batch_norms(m, b[0]),
    "merge": lambda m, b: compression.merge_layers(m, b[0]),
    "removable": lambda m, b: compression.removable(m, b[0]),
    "equalize": lambda m, b: compression.equalize(m, b[0]),
    "separate": lambda m, b: compression.separate_activations(m, b[0]),
    "convert": lambda m, b: compression.convert(m, b[0], [compression.IntMM()]),
}
STORED = {
    "quantize": lambda m, b: compression.quantize_weights(m, GRID),
    "share": lambda m, b: compression.share_weights(m, 4),
    "train": lambda m, b: compression.prepare_qat(m, GRID),
    "rate": lambda m, b: compression.prepare_rate(m),
    "factorize": lambda m, b: compression.factorize(m, compression.Energy(0.5)),
}


@pytest.mark.parametrize("look", LOOKS)
def test_looking_at_a_network_leaves_its_buffers_and_the_generator_as_they_were(look):
    model, x = Counting(), torch.randn(5, 6)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    LOOKS[look](model, [x])
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])  # biases corrected by nothing


def test_what_was_converted_has_counted_no_calls():
    found = compression.convert(Counting(), torch.randn(5, 6), [compression.IntMM()])
    assert float(dict(found.model.named_buffers())["inner.calls"]) == 0


@pytest.mark.parametrize("way", [*LOOKS, *STORED])
def test_a_network_without_numbers_is_told(way):
    x = torch.randn(5, 6)
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device, without numbers"):
        {**LOOKS, **STORED}[way](meta, [x])
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"0\.weight has no size yet: run the model once first"):
        {**LOOKS, **STORED}[way](lazy, [x])
    assert isinstance(lazy[0], nn.LazyLinear)


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(3, 4, 2), nn.GRU(9, 4), nn.LSTMCell(9, 4)])
@pytest.mark.filterwarnings("error")
def test_layers_that_nothing_looks_at_are_named(layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.other, self.conv = layer, nn.Conv2d(3, 2, 3)

        def forward(self, x):
            self.other(x if isinstance(layer, nn.ConvTranspose2d) else x[0, 0])
            return self.conv(x)

    model, x = Net(), torch.randn(1, 3, 9, 9)
    words = rf"other \({type(layer).__name__}\): no linear layer or plain convolution"
    with pytest.warns(UserWarning, match=words):
        assert list(compression.calibrate(model, [x], Grid(8))) == ["conv"]
    with pytest.warns(UserWarning, match=words):
        compression.round_inputs(model, Grid(8))
    with pytest.warns(UserWarning, match=words):
        assert list(compression.gptq_weights(model, [x], GRID)) == ["conv.weight"]
    compression.calibrate(model, [x], Grid(8), ["conv"])  # asked for: no warning, or it is raised


CHANGES = {
    "put": lambda m: compression.put_(m, compression.quantize_weights(m, GRID)),
    "tie": lambda m: compression.tie(compression.share_weights(m, 4))(m),
    "correct": lambda m: compression.correct_biases_(
        m, nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), [torch.randn(5, 6)]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_made_under_inference_mode_are_named_before_any_changes(change):
    with torch.inference_mode():
        last = nn.Linear(6, 4)
    model = nn.Sequential(nn.Linear(6, 6), last)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"1(\.weight)? was made under torch\.inference_mode"):
        CHANGES[change](model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class Routed(nn.Module):
    """One of two experts reads each batch."""

    def __init__(self, second):
        super().__init__()
        self.second, self.experts = second, nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])

    def forward(self, x):
        return self.experts[self.second](x)


def test_a_layer_that_reads_nothing_is_left_out_of_products_weighed_by_inputs():
    model, x = Routed(1), torch.randn(9, 6)
    with pytest.warns(UserWarning, match=r"experts\.0 never ran on these batches"):
        assert list(compression.spectra(model, batches=[x])) == ["experts.1"]
    with pytest.warns(UserWarning, match=r"experts\.0 never ran on these batches"):
        made = compression.factorize(model, compression.Energy(0.1), batches=[x])
    assert [type(e) for e in made.experts] == [nn.Linear, nn.Sequential]
    with pytest.raises(ValueError, match=r"experts\.0.*never ran on these batches"):
        compression.factorize(model, {"experts.0": 1}, batches=[x])
    for form in compression.SVD(), compression.Spatial():  # the second asks for no inputs
        batches = None if form.sees_inputs else [x]
        assert list(compression.spectra(model, form, batches)) == ["experts.0", "experts.1"]


def test_biases_are_not_corrected_where_the_routes_differ():
    model, reference = Routed(0), Routed(1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"experts\.0 runs in one of the two alone"):
        compression.correct_biases_(model, reference, [torch.randn(9, 6)])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d])
def test_a_batch_of_none_among_others_counts_for_nothing(conv):
    size = (9,) * (2 if conv is nn.Conv2d else 1)
    model, x = nn.Sequential(conv(4, 6, 3, groups=2, padding=1)), torch.randn(3, 4, *size)
    codes = [compression.gptq_weights(model, b, GRID)["0.weight"] for b in ([x], [x, x[:0]])]
    assert torch.equal(codes[0].codes, codes[1].codes)


@pytest.mark.parametrize(
    "prepare", [compression.prepare_rate, lambda m: compression.prepare_qat(m, GRID)]
)
def test_a_network_that_still_learns_its_steps_is_named_where_a_plain_one_is_needed(prepare):
    x = torch.randn(5, 6)
    model = prepare(nn.Sequential(nn.ReLU(), nn.Linear(6, 4)))
    for edit in (
        lambda: compression.convert(model, x, [compression.IntMM()]),
        lambda: compression.skip_zeros(model, [x], rounds=1, at_least=0),
        lambda: compression.factorize(model, {"model.1": 1}),
    ):
        with pytest.raises(ValueError, match="still learns its steps: take the network of its"):
            edit()
    assert list(compression.gptq_weights(model, [x], GRID)) == ["model.1.weight"]
    with torch.no_grad():
        model.model[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"1\.weight: \d+ of 24 numbers are NaN"):
        model.finish()
