"""Stages: the same function as the whole, cut where one tensor passes, at the least cost."""

import copy
import itertools
import math
import random
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slicing_networks import ALL, made
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

from structopt import measure
from structopt.slicing import (
    Layer,
    Plan,
    choose_cuts,
    cut_points,
    measure_layers,
    pipeline,
    pipeline_cost,
    split_stages,
)
from structopt.slicing.pipelines import _equal_parts


def small():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


@pytest.mark.parametrize("name", ALL)
def test_stages_give_what_the_whole_gives(name, device):
    model, x = made(name, device)
    points = cut_points(model, x)
    stages = split_stages(model, x, points)
    other = torch.randn(3, *x.shape[1:], dtype=x.dtype, device=device)
    for inputs in (x, other):
        assert torch.equal(stages(inputs), model(inputs))
    value = x
    for stage, point in zip(stages, points, strict=False):
        value = stage(value)
        assert (tuple(value.shape), value.nbytes) == (point.shape, point.bytes)


@pytest.mark.parametrize("name", ["ResNet-18", "DenseNet", "TinyTransformer"])
def test_stages_have_the_weights_and_gradients_of_the_whole(name, device):
    model, x = made(name, device)
    model.train()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    points = cut_points(model, x)
    stages = split_stages(model, x, points[:: max(1, len(points) // 3)])
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    state = {key: value for stage in stages for key, value in stage.state_dict().items()}
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in before)
    stages(x).square().sum().backward()
    model(x).square().sum().backward()
    own = dict(model.named_parameters())
    for stage in stages:
        for key, weight in stage.named_parameters():
            assert weight is not own[key]
            assert torch.equal(weight.grad, own[key].grad), key
    after = {key: value for stage in stages for key, value in stage.state_dict().items()}
    for key, value in model.state_dict().items():  # running statistics too
        assert torch.equal(after[key], value), key


class Noting(nn.Dropout):
    """Random in training mode alone; notes the modes in which it was run."""

    def forward(self, x):
        self.__dict__.setdefault("modes", []).append(self.training)
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_stages_are_tried_in_the_mode_of_the_model(training, device):
    model = nn.Sequential(nn.Linear(4, 8), Noting(), nn.Linear(8, 2)).to(device).train(training)
    model[2].eval()
    x = torch.randn(5, 4, device=device)
    stages = split_stages(model, x, ["0", "1"], whole=["1"])
    modes = [m.modes for stage in stages for m in stage.modules() if isinstance(m, Noting)]
    assert modes
    assert {mode for noted in modes for mode in noted} == {training}
    for one in (model, stages):
        assert [m.training for m in one.modules() if isinstance(m, nn.Linear)] == [training, False]
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(stages(x), expected)
    assert not training or not torch.equal(stages(x), expected)


def test_every_module_that_ends_at_a_cut_names_it(device):
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = nn.Sequential(inner, nn.Linear(4, 2)).to(device)
    x = torch.randn(3, 4, device=device)
    assert [point.names for point in cut_points(model, x)] == [("0.0",), ("0", "0.1")]
    for name in ("0", "0.1", cut_points(model, x)[1]):
        first, last = split_stages(model, x, [name])
        assert [len(list(stage.parameters())) for stage in (first, last)] == [2, 2]
        assert torch.equal(last(inner(x)), model(x))
        assert torch.equal(first(x), inner(x))


class Twice(nn.Module):
    """One module in two places, whole numbers first, and a weight of the model's own between."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, words):
        x = self.layer(self.embed(words + 1)).tanh()
        return (self.layer(x) * self.scale).tanh()


def test_what_runs_twice_ends_twice_and_whole_numbers_are_no_cut(device):
    model, words = Twice().to(device), torch.randint(8, (3, 5), device=device)
    points = cut_points(model, words)
    assert [p.names for p in points] == [("embed",), ("layer",), ("tanh",), ("layer#2",), ("mul",)]
    for point in points:
        stages = split_stages(model, words, [point])
        assert torch.equal(stages(words), model(words))
        assert tuple(stages[0](words).shape) == point.shape
    first, last = split_stages(model, words, ["layer#2"])
    assert {name for name, _ in last.named_parameters()} == {"scale"}
    assert {name.partition(".")[0] for name, _ in first.named_parameters()} == {"embed", "layer"}


class Probed(nn.Module):
    """`probe` is run, and what it gives is not used."""

    def __init__(self):
        super().__init__()
        self.layer, self.probe, self.last = (nn.Linear(4, size) for size in (4, 5, 4))

    def forward(self, x):
        x = self.layer(x)
        self.probe(x)
        return self.last(x)


def test_the_last_of_the_places_that_a_value_passes_is_the_cut(device):
    model, x = Probed().to(device), torch.randn(3, 4, device=device)
    (point,) = cut_points(model, x)
    assert point.names == ("layer", "probe")
    assert (point.shape, point.bytes) == ((3, 4), 48)
    first, last = split_stages(model, x, [point])
    assert (len(list(first.parameters())), len(list(last.parameters()))) == (4, 2)
    assert torch.equal(last(first(x)), model(x))


class Exported(nn.Module):
    """torch.fx cannot trace a decision on a shape; torch.export can."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4))
        self.rest = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x, mask=None):
        if len(x) > 1:
            x = self.first(x) * self.scale
        if mask is not None:
            x = x * mask
        return {"y": self.rest(x)}


@pytest.mark.parametrize("how", ["tensor", "tuple", "dict"])
def test_what_fx_cannot_trace_export_does(how, device):
    model = Exported().to(device).eval()
    x, mask = torch.randn(3, 4, device=device), torch.rand(4, device=device)
    example = {"tensor": x, "tuple": (x, mask), "dict": {"x": x, "mask": mask}}[how]
    points = cut_points(model, example)
    names = {name for point in points for name in point.names}
    assert names >= {"rest.0", "rest.1"}
    assert ("first" in names) == (how == "tensor")  # else the mask is carried past it
    stages = split_stages(model, example, points)
    x = torch.randn(3, 4, device=device)
    found = {"tensor": lambda: stages(x), "tuple": lambda: stages(x, mask)}.get(
        how, lambda: stages(x=x, mask=mask)
    )()
    expected = model(x) if how == "tensor" else model(x, mask)
    assert torch.equal(found["y"], expected["y"])
    with pytest.raises(RuntimeError, match="traced in evaluation mode"):
        stages.train()


def test_what_the_example_leaves_out_keeps_its_default(device):
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, mask=None, factor=2.0):
            x = x * factor if mask is None else x * mask * factor
            return self.layer(x).tanh()

    model, x = Optional().to(device), torch.randn(3, 4, device=device)
    for example in (x, (x, torch.rand(4, device=device)), {"x": x, "factor": x + 3}):
        stages = split_stages(model, example, ["layer"])
        assert torch.equal(
            measure.running.call(stages, example), measure.running.call(model, example)
        )


def test_a_mode_outside_of_modules_is_fixed():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.dropout(self.layer(x), 0.5, self.training).tanh()

    x = torch.randn(3, 4)
    stages = split_stages(Dropping().eval(), x, ["layer"])
    with pytest.raises(RuntimeError, match="traced in evaluation mode"):
        stages.train()
    assert split_stages(small(), torch.zeros(2, 4), ["1"]).eval().training is False


def test_no_cut_where_the_value_is_written_to(device):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)).to(device)
    points = cut_points(model, torch.zeros(2, 4, device=device))
    assert [point.name for point in points] == ["1"]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = small()

    def forward(self, x):
        return x + self.inside(x)


def test_a_residual_past_every_cut_is_named():
    with pytest.raises(ValueError, match=r"the input 'x' is carried past 3 of its 3 places"):
        cut_points(Residual(), torch.zeros(2, 4))


class Deciding(Residual):
    def forward(self, x):
        return self.inside(x) if x.sum() > 0 else x


def test_control_flow_on_data_is_refused_or_kept_whole():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"Deciding cannot be traced.*torch\.where.*whole="):
        cut_points(Deciding(), x)
    model = nn.Sequential(nn.Linear(4, 4), Deciding(), nn.Linear(4, 4))
    stages = split_stages(model, x, ["0", "1"], whole=["1"])
    for inputs in (x, -x):
        assert torch.equal(stages(inputs), model(inputs))
    layers = measure_layers(model, x, rounds=1, whole=["1"])
    assert [layer.name for layer in layers] == ["0", "1", ""]


def test_what_tracing_freezes_is_noticed():
    class Noisy(Residual):
        def forward(self, x):
            return self.inside(x + torch.randn(4))

    with pytest.raises(ValueError, match="something that tracing has frozen"):
        split_stages(Noisy(), torch.zeros(2, 4), ["inside.0"])


class Counting(nn.Module):
    """Writes into its buffers what nothing reads: a count, and an average that decays."""

    def __init__(self, how):
        super().__init__()
        self.first, self.last, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x):
        x = self.first(x)
        if self.how == "in place":
            self.count += 1
        elif self.how == "anew":
            self.count = self.count + 1
        elif self.how == "decays":
            self.mean.mul_(0.9).add_(x.detach().mean(0))
        else:
            self.mean.add_(x.detach().mean(0))
        return self.last(x)


@pytest.mark.parametrize("how", ["in place", "anew", "decays", "adds"])
def test_buffers_that_a_run_writes_to_are_those_of_the_network(how, device):
    model, x = Counting(how).to(device), torch.randn(3, 4, device=device)
    before = copy.deepcopy(model.state_dict())
    cut_points(model, x)
    if how in ("adds", "decays"):
        stages = split_stages(model, x, ["first"])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        for _ in range(2):
            assert torch.equal(stages(x), model(x))
        assert torch.equal(stages[0].mean, model.mean)
        return
    with pytest.raises(ValueError, match="a counter or an average in a buffer"):
        split_stages(model, x, ["first"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Masked(nn.Module):
    """Computes a mask and a scale of its buffers and weights alone, and reads them all the way."""

    def __init__(self, how):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mask", torch.tensor([True, False, False, True]))
        self.scale, self.how = nn.Parameter(torch.rand(4)), how

    def forward(self, x):
        gone, scale = ~self.mask, self.scale * 2
        x = self.middle(self.first(x).masked_fill(gone, 0.0) * scale)
        if self.how == "after":
            self.mask.logical_not_()
        elif self.how == "view":
            self.mask[:2].fill_(True)
        return self.last(x.masked_fill(gone, 1.0) * scale) + self.mask


@pytest.mark.parametrize("how", ["", "after", "view"])
def test_what_is_computed_of_weights_is_no_value_that_passes(how, device):
    """Each stage computes it anew, from the weights that it has then."""
    model, x = Masked(how).double().to(device), torch.randn(3, 4, device=device).double()
    names = [point.name for point in cut_points(model, x)]
    assert ("middle" in names) == (how == "")  # else it was computed before the mask is written to
    if how:
        stages = split_stages(model, x, names[-2:])
        for _ in range(2):
            assert torch.equal(stages(x), model(x))
        return
    stages = split_stages(model, x, ["middle"])
    held = {name for stage in stages for name in stage.state_dict()}
    assert held == model.state_dict().keys()
    with torch.no_grad():
        for tensors in (model.state_dict(), *(stage.state_dict() for stage in stages)):
            if "mask" in tensors:
                tensors["mask"].copy_(torch.tensor([False, False, True, True]))
            if "scale" in tensors:
                tensors["scale"].fill_(3.0)
    for training in (False, True):  # which fixes no mode
        assert torch.equal(stages.train(training)(x), model.train(training)(x))
    found, expected = stages(x), model(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    own = dict(pair for stage in stages for pair in stage.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(own[name].grad, weight.grad)


def test_a_constant_fixes_no_mode(device):
    class Placed(Residual):
        def forward(self, x):
            x = self.inside[0](x + torch.arange(4))
            return self.inside[2](x * torch.tensor(3.0))

    model, x = Placed().to(device).eval(), torch.randn(2, 4, device=device)
    stages = split_stages(model, x, ["inside.0"])
    for training in (True, False):
        assert torch.equal(stages.train(training)(x), model.train(training)(x))

    class Other(Placed):
        def forward(self, x):
            return super().forward(x) * torch.tensor(2.0 if self.training else 3.0)

    fixed = split_stages(Other().to(device).eval(), x, ["inside.0"])
    with pytest.raises(RuntimeError, match="traced in evaluation mode"):
        fixed.train()


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, other=None, *, scale=1.0, flag=False):
        x = self.first(x) if other is None else x
        return self.last(x * scale if not flag else x)


def test_no_cut_lies_before_an_input(device):
    """Between the inputs torch.fx checks the defaults of those that the example leaves out."""
    model, x = Keyword().to(device), torch.randn(2, 4, device=device)
    example = {"x": x, "scale": 2.0}
    points = cut_points(model, example)
    assert [point.name for point in points] == ["mul"]
    stages = split_stages(model, example, points)
    for scale in (2.0, 0.5):
        assert torch.equal(stages(x=x, scale=scale), model(x, scale=scale))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", ["fx", "export"])
def test_stages_are_in_the_modes_of_the_model(training, how, device):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), nn.Tanh(), nn.Linear(4, 4))
    model = (AnyNumber() if how == "export" else model).to(device).train(training)
    x = torch.randn(2, 4, device=device)
    example = (x, x) if how == "export" else x
    stages = split_stages(model, example, [cut_points(model, example)[0]])
    assert all(module.training == training for module in stages.modules())
    if how == "fx":
        model[0].train(not training)
        for stage in split_stages(model, x, ["1"]):
            for name, module in stage.named_modules():
                assert module.training == (training != name.startswith("0"))


def test_buffers_that_each_run_changes_and_reads_are_tried_from_the_same_start():
    norm = nn.utils.spectral_norm(nn.Linear(4, 4))  # a step of its power iteration each time
    model, x = nn.Sequential(norm, nn.Tanh(), nn.Linear(4, 4)).train(), torch.randn(3, 4)
    stages = split_stages(model, x, ["0"])
    for _ in range(3):
        assert torch.equal(stages(x), model(x))


def test_nan_equals_nan_and_shapes_are_all_that_meta_has():
    model, x = small(), torch.full((2, 4), torch.nan)
    assert split_stages(model, x, ["0"])(x).isnan().all()
    model, x = small().to("meta"), x.to("meta")
    assert split_stages(model, x, ["0"])(x).shape == (2, 4)


class AnyNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, *parts, **settings):
        return self.last(self.first(parts[0] + parts[1]).tanh()) * settings.get("scale", 1)


def test_arguments_of_any_number_are_left_to_export():
    model, x = AnyNumber().eval(), torch.randn(2, 4)
    stages = split_stages(model, (x, x + 1), ["first"])
    assert torch.equal(stages(x, x + 1), model(x, x + 1))


def test_an_example_that_does_not_fit_is_told_in_a_line():
    with pytest.raises(ValueError, match=r"does not accept the example: mat1 and mat2 [^\n]*$"):
        cut_points(small(), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"does not accept the example: .* not str$"):
        cut_points(small(), "words")


def test_bad_cuts_are_refused_by_name():
    model, x = small(), torch.zeros(2, 4)
    for name in ("nowhere", 3):
        with pytest.raises(ValueError, match=f"{name!r} is no cut point.*there are"):
            split_stages(model, x, [name])
    with pytest.raises(ValueError, match="in the order in which they run"):
        split_stages(model, x, ["1", "0"])
    with pytest.raises(ValueError, match="name each once"):
        split_stages(model, x, ["0", "0"])
    with pytest.raises(ValueError, match="no such modules"):
        cut_points(model, x, whole=["nowhere"])
    with pytest.raises(ValueError, match=r"whole is a list of names: \['1'\]"):
        cut_points(model, x, whole="1")
    with pytest.raises(ValueError, match=r"cuts is a list of names: \['1'\]"):
        split_stages(model, x, "1")
    for short, does in ((nn.Linear(4, 4), "Linear"), (nn.Identity(), "Identity")):
        with pytest.raises(ValueError, match=f"{does} has no cut point: it does one thing alone"):
            cut_points(short, x)
    with pytest.raises(ValueError, match="inplace=True"):
        cut_points(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), torch.zeros(2, 4))


# What it costs


def test_layers_add_up_to_the_network(device):
    model, x = made("ResNet-18", device)
    layers = measure_layers(model, x, rounds=1)
    points = cut_points(model, x)
    assert [layer.name for layer in layers] == [*(point.name for point in points), ""]
    assert sum(layer.state for layer in layers) == measure.cost(model, x).bytes
    assert [layer.sent for layer in layers] == [*(point.bytes for point in points), 0]
    assert all(layer.seconds > 0 and not layer.saved for layer in layers)


def test_what_autograd_keeps_is_counted(device):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
    model.eval()
    layers = measure_layers(model, torch.zeros(10, 4, device=device), training=True, rounds=1)
    assert not model.training
    assert [layer.state for layer in layers] == [2 * 4 * n for n in (40, 0, 18)]
    assert [layer.saved for layer in layers] == [4 * 10 * n for n in (4, 8, 8)]
    assert [layer.sent for layer in layers] == [2 * 4 * 80, 2 * 4 * 80, 0]
    assert model[0].weight.grad is None


class Square(nn.Module):
    """Its input is kept once, though it is read twice; its weight is not read at all."""

    def __init__(self):
        super().__init__()
        self.unread = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x * x


def test_layers_are_measured_in_training_mode_with_buffers_counted_once(device):
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Dropout(), nn.BatchNorm1d(8), Square(), nn.Linear(8, 2)
    ).to(device)  # fmt: skip
    x = torch.zeros(10, 4, device=device)
    layers = measure_layers(model.eval(), x, training=True, rounds=1, whole=["3"])
    buffers = 2 * 4 * 8 + 8  # mean, variance, and a count
    assert [layer.state for layer in layers] == [320, 0, 2 * 4 * 16 + buffers, 2 * 4 * 3, 144]
    assert layers[1].saved > 0  # what was dropped: nothing is in evaluation mode
    assert layers[3].saved == 4 * 10 * 8


class Counted(torch.autograd.Function):
    runs: ClassVar[list[int]] = [0, 0]

    @staticmethod
    def forward(_, x):
        Counted.runs[0] += 1
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        Counted.runs[1] += 1
        return gradient


class Ticking(nn.Module):
    """Keeps a buffer of its own from the forward to the backward pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x):
        return Counted.apply(x) * self.scale


def test_rounds_are_timed_and_in_training_the_way_back_too(device, monkeypatch):
    asked, latency = [], measure.latency

    def noting(*given, rounds):
        asked.append(rounds)
        return latency(*given, rounds=rounds)

    monkeypatch.setattr(measure, "latency", noting)
    model = nn.Sequential(nn.Linear(4, 8), Ticking(), nn.Linear(8, 2)).to(device)
    x, runs = torch.zeros(10, 4, device=device), {}
    for rounds, training in ((1, False), (2, True)):
        Counted.runs[:] = 0, 0
        layers = measure_layers(model, x, rounds=rounds, training=training, whole=["1"])
        runs[rounds, training] = tuple(Counted.runs)
    assert runs[1, False][1] == 0
    assert runs[2, True][1] > 0
    assert asked == [1, 2]
    assert layers[1].saved == 0  # what it keeps is its own


def drawn(draw):
    """Layers and settings by chance: ties, free links and tight memory are all common."""
    layers = [
        Layer(str(i), float(draw.randint(0, 9)), *(draw.randint(0, 9) for _ in range(3)))
        for i in range(draw.randint(1, 6))
    ]
    layers[-1] = replace(layers[-1], sent=50)  # which crosses no cut
    k = draw.randint(1, 4)
    room = draw.choice([math.inf, math.inf, 25.0, 12.0, [draw.randint(5, 30) for _ in range(k)]])
    settings = {
        "microbatches": draw.randint(1, 5),
        "bandwidth": draw.choice([0.5, 1.0, 3.0, math.inf]),
        "schedule": draw.choice([ScheduleGPipe, Schedule1F1B]),
    }
    return layers, k, room, settings


def test_no_cuts_are_better_than_those_chosen():
    draw, found_some, refused = random.Random(0), 0, 0
    for _ in range(600):
        layers, k, room, settings = drawn(draw)
        each = room if isinstance(room, list) else [room] * k
        names = [layer.name for layer in layers[:-1]]
        plans = [pipeline_cost(layers, c, **settings) for c in itertools.combinations(names, k - 1)]
        fitting = [p for p in plans if all(m <= r for m, r in zip(p.memory, each, strict=True))]
        if not fitting:
            with pytest.raises(ValueError, match=r"cut points|fit into memory"):
                choose_cuts(layers, k, memory=room, **settings)
            refused += 1
            continue
        found = choose_cuts(layers, k, memory=room, **settings)
        assert found in fitting
        assert found.seconds == pytest.approx(min(plan.seconds for plan in fitting))
        found_some += 1
    assert min(found_some, refused) > 100


@given(
    times=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    links=st.lists(st.integers(0, 9), min_size=5, max_size=5),
    microbatches=st.integers(1, 6),
)
def test_the_formula_is_that_of_a_line_of_machines(times, links, microbatches):
    layers = [
        Layer(str(i), float(t), 0, 0, s)
        for i, (t, s) in enumerate(zip(times, [*links, 0], strict=False))
    ]
    cuts = [layer.name for layer in layers[:-1]]
    plan = pipeline_cost(layers, cuts, microbatches=microbatches, bandwidth=1.0)
    line = [t for pair in itertools.zip_longest(plan.stages, plan.links, fillvalue=0) for t in pair]
    done = [0.0] * len(line)  # when each place finished its last micro-batch
    for _ in range(microbatches):
        at = 0.0
        for place, seconds in enumerate(line):
            at = done[place] = max(at, done[place]) + seconds
    assert plan.seconds == pytest.approx(done[-1])
    if plan.seconds:
        busy = microbatches * sum(times)
        assert plan.bubble == pytest.approx(1 - busy / (len(times) * done[-1]))
        assert plan.throughput == pytest.approx(microbatches / done[-1])


@pytest.mark.parametrize("stages", [1, 3])
def test_where_nothing_takes_time_nobody_waits(stages):
    """Multiplying all times by one number changes no bubble, be it as small as can be."""
    plan = Plan(("",) * (stages - 1), (0.0,) * stages, (0.0,) * (stages - 1), (0,), 4)
    assert (plan.seconds, plan.bubble, plan.throughput) == (0, 0, math.inf)
    quick, slow = (replace(plan, stages=(a, 2 * a, a)[:stages]) for a in (1e-300, 1.0))
    assert quick.bubble == pytest.approx(slow.bubble)


def test_equal_stages_have_the_bubble_of_the_books():
    layers = [Layer(str(i), 1.0, 10, 3, 0) for i in range(4)]
    for microbatches in (1, 4, 12):
        plan = choose_cuts(layers, 4, microbatches=microbatches)
        assert plan.bubble == pytest.approx(3 / (microbatches + 3))
        assert plan.memory == (10 + 3 * microbatches,) * 4
    plan = choose_cuts(layers, 4, microbatches=12, schedule=Schedule1F1B)
    assert plan.memory == tuple(10 + 3 * held for held in (4, 3, 2, 1))
    plan = choose_cuts(layers, 4, microbatches=2, schedule=Schedule1F1B)
    assert plan.memory == tuple(10 + 3 * held for held in (2, 2, 2, 1))


def test_impossible_plans_are_refused():
    layers = [Layer("a", 1.0, 10, 0, 1), Layer("", 1.0, 10, 0, 0)]
    with pytest.raises(ValueError, match=r"k=3.*1 cut points: a"):
        choose_cuts(layers, 3)
    for k in (0, 2.0, "2"):
        with pytest.raises(ValueError, match=f"k={k!r}: give a whole number of stages"):
            choose_cuts(layers, k)
    assert choose_cuts(layers, np.int64(2)).cuts == ("a",)
    with pytest.raises(ValueError, match="no 2 stages fit into memory of 9, 9 bytes"):
        choose_cuts(layers, 2, memory=9)
    with pytest.raises(
        ValueError, match=r"memory=\[1, 2, 3\]: give one number of bytes for each of 2 stages"
    ):
        choose_cuts(layers, 2, memory=[1, 2, 3])
    with pytest.raises(ValueError, match=r"memory=\[nan, 9\]: give one"):
        choose_cuts(layers, 2, memory=[math.nan, 9])
    with pytest.raises(ValueError, match="bandwidth=0"):
        choose_cuts(layers, 2, bandwidth=0)
    with pytest.raises(ValueError, match=r"memory=.*: give one"):
        choose_cuts(layers, 2, memory=["9", "9"])
    for count in (1.5, math.nan, math.inf, "2"):
        with pytest.raises(ValueError, match="give a whole number, at least 1"):
            choose_cuts(layers, 2, microbatches=count)
    with pytest.raises(ValueError, match="schedule='1F1B': give torch's ScheduleGPipe or"):
        choose_cuts(layers, 2, schedule="1F1B")
    with pytest.raises(ValueError, match=r"cuts is a list of names: \['a'\]"):
        pipeline_cost(layers, "a")
    with pytest.raises(ValueError, match="microbatches=0"):
        pipeline_cost(layers, ["a"], microbatches=0)
    with pytest.raises(ValueError, match="no such layers; there are a"):
        pipeline_cost(layers, ["b"])
    with pytest.raises(ValueError, match="in the order"):
        pipeline_cost(layers, ["a", "a"])


def test_a_pipeline_needs_a_process_for_each_stage():
    stages = split_stages(small(), torch.zeros(2, 4), ["1"])
    with pytest.raises(ValueError, match=r"2 stages and 1 processes.*nproc_per_node 2"):
        pipeline(stages, torch.device("cpu"), microbatches=2)


def test_a_micro_batch_of_another_size_is_refused():
    parts = _equal_parts(nn.functional.mse_loss, 2)
    assert parts(torch.ones(2, 3), torch.zeros(2, 3)) == 1
    with pytest.raises(ValueError, match="1 targets and 2 outputs"):
        parts(torch.ones(2, 3), torch.zeros(1, 3))


class Averaged(nn.Module):
    """Makes a float of a size, which only export traces."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.first(x).relu()
        return self.rest(y.sum(1) / float(y.shape[1]))


def test_stages_of_export_refuse_other_sizes():
    model, x = Averaged().eval(), torch.randn(2, 5, 4)
    stages = split_stages(model, x, ["first"])
    assert torch.equal(stages(x), model(x))
    with pytest.raises(ValueError, match=r"for \[\(2, 5, 4\)\], not \[\(3, 9, 4\)\]: cut again"):
        stages(torch.randn(3, 9, 4))
