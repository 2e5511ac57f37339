"""A network on other kernels computes what it did, within the error that is stated."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import pickle
import time

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from structopt import compression, measure
from structopt.compression import (
    Float,
    Grid,
    IntMM,
    ONNXRuntime,
    Route,
    Sparse24,
    TorchAO,
    convert,
    convert_onnx,
    routes_on,
)
from structopt.compression import convert_trial as trial
from structopt.compression.convert_parts import naming_layers

EAGER_ROUTES = [
    Float(torch.bfloat16),
    IntMM(),
    ONNXRuntime(bits=32),
    ONNXRuntime(),
    ONNXRuntime(static=True),
    TorchAO(compiled=False),
    TorchAO(dynamic=True, compiled=False),
    TorchAO(static=True, compiled=False),
]


def mlp():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before, text):
    same = all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    return same and str(model) == text and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("route", EAGER_ROUTES, ids=str)
def test_each_route_computes_the_network_and_leaves_it_as_it_was(route, device):
    if reason := route.missing(device):
        pytest.skip(reason)
    model, x = mlp().to(device).train(), torch.randn(32, 64, device=device)
    before, text = state(model), str(model)
    made = route.build(model, x, [torch.randn(64, 64, device=device)])
    assert unchanged(model, before, text)
    assert model.training
    expected = model(x).detach()
    exact = route == ONNXRuntime(bits=32)
    assert relative(made(x), expected) < (1e-5 if exact else 0.03)
    assert exact or relative(made(x), expected) > 1e-4, "nothing was rounded: no other kernel ran"
    assert made(x).dtype is torch.float32
    assert not made(x).requires_grad
    assert measure.file_bytes(made) == pytest.approx(made.on_paper.bytes, abs=2000)
    smaller = 0.25 if "8" in made.runs_on.partition(",")[0] + str(route) else 1.2
    assert made.on_paper.bytes < (smaller + 0.4) * measure.cost(model, x).bytes
    assert eval(str(route), {**vars(compression), "torch": torch}) == route
    assert isinstance(route, Route)


def test_int8_is_the_product_of_whole_numbers(device):
    """Against the same sum in double precision, written out."""
    layer, x = nn.Linear(64, 32).to(device), torch.randn(3, 20, 64, device=device)
    weight = layer.weight.detach()
    scale, steps = weight.abs().amax(1) / 127, x.abs().amax(-1, keepdim=True) / 127
    codes, whole = (weight / scale[:, None]).round(), (x / steps).round()
    by_hand = (whole.double() @ codes.double().t()) * steps * scale + layer.bias.detach()
    found = IntMM().build(layer, x)(x)
    torch.testing.assert_close(found.double(), by_hand, rtol=1e-5, atol=1e-5)


def test_convert_takes_the_fastest_within_the_error_and_says_why(device):
    model, x = mlp().to(device), torch.randn(32, 64, device=device)
    before, text = state(model), str(model)
    found = convert(model, x, [IntMM(), Float(torch.bfloat16), Sparse24(), IntMM()], error=0.006)
    assert unchanged(model, before, text)
    rows = {row["route"]: row for row in found.table.rows}
    assert set(rows) >= {"IntMM()", "Float(dtype=torch.bfloat16)", "Float(dtype=torch.float32)"}
    assert rows["Float(dtype=torch.float32)"]["times as fast"] == 1
    for route in (IntMM(), Float(torch.bfloat16)):
        off = relative(route.build(model, x)(x), model(x).detach())
        assert rows[str(route)]["error (%)"] == pytest.approx(100 * off, abs=0.01)
    assert "over 0.60%" in found.rejected[IntMM()]
    within = {name: r["times as fast"] for name, r in rows.items() if r["error (%)"] <= 0.6}
    assert str(found.route) == max(within, key=within.get)
    assert relative(found.model(x), model(x).detach()) <= 0.006
    assert found.table.marked == [list(rows).index(str(found.route))]
    assert "IntMM(): error" in str(found)
    if device.type == "cpu":
        assert found.rejected[Sparse24()] == "2:4 sparse products need an NVIDIA GPU"


def test_nothing_within_the_error_leaves_eager(device):
    model, x = mlp().to(device), torch.randn(32, 64, device=device)
    found = convert(model, x, [IntMM()], error=0)
    assert found.route == Float()
    assert torch.equal(found.model(x), model(x))


def test_compare_says_which_kernel_ran(device):
    model, x = mlp().to(device), torch.randn(4, 64, device=device)
    fast = IntMM().build(model, x)
    table = measure.compare({"fp32": model, "int8": fast}, x, rounds=0)
    words = "2 linear layers in int8 with dynamic int8 inputs on torch._int_mm"
    assert f"int8: runs on {words}" in table.notes
    plain, whole = table.rows
    assert (whole["MACs"], whole["parameters"]) == (plain["MACs"], plain["parameters"])
    assert whole["file (KB)"] < 0.4 * plain["file (KB)"]
    assert whole["memory (KB)"] is None
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(device)
    made = IntMM().build(conv, torch.randn(32, 3, 4, 4, device=device))
    assert made.runs_on.endswith("; 0 in float")


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


def test_what_cannot_be_converted_names_the_layer_and_leaves_the_model():
    model = nn.Sequential(nn.Linear(8, 8), Branching())
    before, text = state(model), str(model)
    with pytest.raises(ValueError, match=r"layer '1' \(Branching\) cannot be exported: .*data-dep"):
        ONNXRuntime().build(model, torch.randn(4, 8))
    found = convert(model, torch.randn(4, 8), [ONNXRuntime(), IntMM()])
    assert "layer '1' (Branching)" in found.rejected[ONNXRuntime()]
    assert IntMM() not in found.rejected
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"nn.Linear alone.*layer '0' \(Conv2d\) stays"):
        convert(conv, torch.randn(1, 3, 8, 8), [IntMM(), TorchAO(dynamic=True)])
    assert unchanged(model, before, text)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Silent(nn.Module):
    def forward(self, x):
        raise AssertionError


def test_a_layer_that_fails_without_a_word_is_named():
    model = nn.Sequential(Silent())
    why = r"layer '0' \(Silent\) cannot be exported: AssertionError"
    with pytest.raises(ValueError, match=why), naming_layers(model):
        model(torch.randn(4, 8))


def test_an_export_takes_any_batch_or_says_which():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1))
    model.eval()
    x = torch.randn(1, 3, 6, 6)
    made = ONNXRuntime(bits=32).build(model, x)
    many = torch.randn(7, 3, 6, 6)
    torch.testing.assert_close(made(many), model(many), rtol=1e-4, atol=1e-5)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(copied(x), made(x))

    class Fixed(nn.Module):
        def forward(self, a, b):
            return {"sum": a.reshape(2, 3) + b, "a": a}

    pair = (torch.randn(2, 3), torch.randn(2, 3))
    fixed = ONNXRuntime(bits=32).build(Fixed(), {"b": pair[1], "a": pair[0]})
    torch.testing.assert_close(fixed(b=pair[1], a=pair[0])["sum"], pair[0] + pair[1])
    with pytest.raises(ValueError, match="for a batch of 2, not of 4"):
        fixed(a=torch.randn(4, 3), b=torch.randn(4, 3))


def test_attention_of_torch_keeps_its_function():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        expected = layer(x)
    for route in (IntMM(), ONNXRuntime()):
        made = route.build(layer, x)
        assert 1e-4 < relative(made(x), expected) < 0.03
    assert "self_attn" in IntMM().build(layer, x).runs_on


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 4)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


def test_operators_that_the_engine_runs_in_float_are_named():
    if reason := ONNXRuntime().missing("cpu"):
        pytest.skip(reason)
    x = torch.randn(4, 8, 16)
    static = ONNXRuntime(static=True).build(Recurrent(), x, [x])
    assert static.runs_on.endswith("static int8 inputs, from an export; LSTM in float")
    dynamic = ONNXRuntime().build(Recurrent(), x)
    assert dynamic.runs_on.endswith("from an export"), "here it has a kernel"
    model, image = nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Conv2d(3, 4, 2)), x[:, None, :, :9]
    image = image.expand(-1, 2, -1, -1)
    assert ONNXRuntime().build(model, image).runs_on.endswith("; ConvTranspose in float")
    with pytest.raises(ValueError, match=r"could be taken.* has an int8 kernel: ConvTranspose"):
        convert(nn.Sequential(model[0], nn.ReLU()), image, [ONNXRuntime()])
    with pytest.raises(ValueError, match="int8 kernel: none has weights"):
        ONNXRuntime().build(nn.ReLU(), x)


def test_a_pair_is_no_batch_of_two_inputs():
    if reason := ONNXRuntime().missing("cpu"):
        pytest.skip(reason)
    layer, pair = nn.Bilinear(8, 8, 4), (torch.randn(4, 8), torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"reads 2 tensors, .*; got 1.*\(\(x, y\), None\)"):
        ONNXRuntime(static=True).build(layer, pair, [pair])


@pytest.mark.parametrize("static", [False, True])
def test_large_bytes_do_not_saturate(static):
    """Each pair of products is 2 · 255 · 127, too large for 16 bits."""
    model, x = nn.Linear(64, 16), torch.rand(8, 64) * 0.01 + 0.99
    with torch.no_grad():
        model.weight.copy_(torch.rand(16, 64) * 0.01 + 0.99)
    made = ONNXRuntime(static=static).build(model, x, [x])
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("has", "asked"),
    [
        ({}, True),
        ({"avx512_f": True, "avx512_vnni": False}, True),
        ({"avx512_vnni": True}, False),
        ({"avx_vnni": True}, False),
    ],
)
def test_the_slower_product_is_asked_for_only_where_bytes_saturate(has, asked, monkeypatch):
    import onnxruntime

    class Options(onnxruntime.SessionOptions):
        entries: dict[str, str] = {}  # noqa: RUF012

        def add_session_config_entry(self, key, value):
            self.entries[key] = value

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    Options.entries.clear()
    ONNXRuntime().build(nn.Linear(8, 4), torch.randn(2, 8), None)
    assert (Options.entries.get("session.x64quantprecision") == "1") == asked


def test_a_simulation_is_dropped_and_judged_by():
    model = mlp()
    x = torch.randn(32, 64)
    model = compression.put_(
        model, compression.quantize_weights(model, Grid(8, per=compression.PerAxis(0)))
    )
    rounded = compression.round_inputs(model, Grid(3))
    parametrize.register_parametrization(rounded[0], "bias", nn.Identity())
    found = convert(rounded, x, [IntMM()], error=0.5)
    eager = next(r for r in found.table.rows if r["route"] == str(Float()))
    off = relative(model(x).detach(), rounded(x).detach())
    assert off > 0.05
    assert eager["error (%)"] == pytest.approx(100 * off, abs=0.01)
    assert rounded[0]._forward_pre_hooks
    assert parametrize.is_parametrized(rounded[0])
    plain = trial.without_simulation(rounded)
    assert torch.equal(plain(x), model(x))


def test_a_trial_is_bounded_in_time():
    class Slow:
        def __repr__(self):
            return "Slow()"

        def missing(self, device):
            return None

        def build(self, model, example, calibration=None):
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                with contextlib.suppress(Exception):  # as a compiler would
                    time.sleep(0.01)
            raise AssertionError("nobody stopped it")

    started = time.monotonic()
    found = convert(mlp(), torch.randn(4, 64), [Slow(), IntMM()], seconds=0.5)
    assert time.monotonic() - started < 10
    assert next(iter(found.rejected.values())) == "not ready after 0.5 s"
    assert "IntMM()" in str(found.table)


@pytest.mark.parametrize(
    "route", [r for r in EAGER_ROUTES if type(r) in (ONNXRuntime, TorchAO)], ids=str
)
def test_a_missing_library_is_told(route, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in route.missing("cpu")
    with pytest.raises(ValueError, match=r"not installed: pip install"):
        route.build(mlp(), torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"none of the routes could be taken.*pip install"):
        convert(mlp(), torch.randn(4, 64), [route])


def test_bad_input_is_told():
    model, x = mlp(), torch.randn(4, 64)
    for bad in (torch.full((4, 64), float("nan")), torch.full((4, 64), float("inf"))):
        with pytest.raises(ValueError, match=r"the example of shape \(4, 64\) holds NaN"):
            convert(model, bad)
        with pytest.raises(ValueError, match="a calibration batch of shape"):
            convert(model, x, calibration=[bad])
    with pytest.raises(ValueError, match="the example holds no tensor"):
        convert(model, ())

    class Largest(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x).argmax(1)

    with pytest.raises(ValueError, match="no floating-point output"):
        convert(Largest(), x)
    for wrong in IntMM(), "IntMM", ["IntMM"]:
        with pytest.raises(ValueError, match="routes is a list of routes"):
            convert(nn.Linear(4, 2), torch.ones(3, 4), wrong)
    assert IntMM().build(nn.Linear(4, 2), torch.ones(3, 4))(torch.ones(0, 4)).shape == (0, 2)
    with pytest.raises(ValueError, match="calibration= is empty"):
        convert(model, x, calibration=[])
    for route in (ONNXRuntime(static=True), TorchAO(static=True)):
        with pytest.raises(ValueError, match="static steps need batches, pass calibration="):
            route.build(model, x)
        found = convert(model, x, [route, IntMM()])
        assert found.rejected[route] == "static steps need batches, pass calibration="
    for bad in ({"error": -0.1}, {"error": float("nan")}, {"seconds": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            convert(model, x, [IntMM()], **bad)
    with pytest.raises(ValueError, match=r"'0.weight' is torch.float64: give the float32"):
        convert(mlp().double(), x.double())
    broken = mlp()
    broken[0].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"'0.bias' holds NaN"):
        convert(broken, x)
    with pytest.raises(ValueError, match=r"its finish\(\)"):
        convert(compression.prepare_qat(model, Grid(8)), x)


def test_kernels_that_do_not_exist_are_refused():
    for build, words in [
        (lambda: ONNXRuntime(bits=4), "bits=8 and, floating, bits=32"),
        (lambda: ONNXRuntime(bits=32, static=True), "static steps are for bits=8"),
        (lambda: TorchAO(bits=2), "bits=8 and bits=4"),
        (lambda: TorchAO(bits=4, dynamic=True), "weights alone"),
        (lambda: TorchAO(dynamic=True, static=True), "not both"),
        (lambda: TorchAO(floating=True), "dynamic=True"),
        (lambda: Float(torch.float64), "dtype is one of"),
        (lambda: Sparse24(torch.float32), "dtype is torch.bfloat16"),
    ]:
        with pytest.raises(ValueError, match=words):
            build()
    assert "GPU" in TorchAO(bits=4).missing("cpu")
    assert "GPU" in TorchAO(dynamic=True, floating=True).missing("cpu")
    assert "meta" in IntMM().missing("meta")
    assert "the model is on cuda" in ONNXRuntime().missing("cuda")
    for device in ("cpu", "cuda"):
        assert len(set(routes_on(device))) == len(routes_on(device)) > 5


@pytest.mark.slow
def test_a_compiled_route_computes_the_network():
    model, x = mlp(), torch.randn(32, 64)
    found = convert(model, x, [TorchAO(dynamic=True)], seconds=300)
    (row,) = [r for r in found.table.rows if r["route"] != str(Float())]
    assert row["route"] == "TorchAO(dynamic=True, bits=8, compiled=True)"
    assert 0.01 < row["error (%)"] < 3
    assert row["kernels"].endswith("compiled")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_2_to_4_sparse_weights_keep_their_function():
    model, x = nn.Sequential(nn.Linear(128, 128)).cuda(), torch.randn(64, 128).cuda()
    if reason := Sparse24().missing("cuda"):
        pytest.skip(reason)
    with pytest.raises(ValueError, match="layer '0': its weight is not 2:4 sparse"):
        Sparse24().build(model, x)
    model[0].weight.data.view(-1, 4)[:, :2] = 0
    assert relative(Sparse24().build(model, x)(x), model(x).detach()) < 0.01


def test_convert_exports_a_network_once(monkeypatch):
    exports, write = [], convert_onnx._write

    def counted(*given):
        exports.append(given)
        write(*given)

    monkeypatch.setattr(convert_onnx, "_write", counted)
    routes = [ONNXRuntime(bits=32), ONNXRuntime()]
    found = convert(mlp(), torch.randn(4, 64), routes)
    assert len(exports) == 1
    assert {str(route) for route in routes} <= {row["route"] for row in found.table.rows}
