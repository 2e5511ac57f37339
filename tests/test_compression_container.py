"""The file that one can weigh: exact, small, bounded, and refused when anything in it is wrong."""

import copy
import json
import math
import struct
import time
import tracemalloc
import zlib
from hashlib import blake2b

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from structopt import checkpoint, compression, measure, pruning
from structopt.compression import Grid, PerAxis, PerGroup
from structopt.networks import LeNet5, LeNet300, ResNet20, TinyTransformer


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name, x in left.items():
        y = right[name]
        assert (x.dtype, x.shape, x.device) == (y.dtype, y.shape, y.device), name
        bits = [t.reshape(-1).contiguous().view(torch.uint8) for t in (x, y)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("build", [LeNet300, LeNet5, ResNet20, TinyTransformer])
def test_without_codes_nothing_is_lost(tmp_path, build, device):
    model = build().to(device)
    report = compression.save(model, tmp_path / "x")
    assert report.bytes == (tmp_path / "x").stat().st_size
    assert report.structure + sum(row.bytes for row in report.rows) == report.bytes
    assert sum(report.by_form.values()) == report.bytes - report.structure
    assert report.dense == sum(t.numel() * t.dtype.itemsize for t in model.state_dict().values())
    with torch.no_grad():
        fresh = build().to(device)
        made = compression.load(tmp_path / "x", fresh)
    assert made is fresh
    same(model, made)
    x = torch.randn(2, 1, 28, 28, device=device)
    assert torch.equal(model.eval()(x), made.eval()(x))
    first = (tmp_path / "x").read_bytes()
    compression.save(model, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == first, "the same network makes the same file"


@given(
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    per=st.sampled_from([PerAxis(0), PerGroup(9)]),
    shared=st.booleans(),
)
@settings(max_examples=15)
def test_codes_come_back_bit_for_bit(tmp_path_factory, bits, symmetric, per, shared):
    path = tmp_path_factory.mktemp("file") / "x"
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    if shared:
        codes = compression.share_weights(model, 2**bits, per)
    else:
        codes = compression.quantize_weights(model, Grid(bits, symmetric, per))
    compression.put_(model, codes)
    compression.save(model, path, codes)
    made = compression.load(path, nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)))
    same(model, made)


def test_changed_structure_ties_types_and_odd_numbers(tmp_path, device):
    class Tied(nn.Module):
        def __init__(self, width=8, middle=None):
            super().__init__()
            self.table, self.out = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
            self.out.weight = self.table.weight
            self.middle = middle or nn.Linear(width, width)
            self.register_buffer("slopes", torch.arange(3) / 7, persistent=False)
            self.offset = torch.tensor(0.5)
            self.odd = nn.Parameter(torch.tensor([torch.nan, -0.0, torch.inf, 1e-45] * 4))
            self.register_buffer("mask", torch.rand(6, 5) > 0.5)
            self.register_buffer("count", torch.arange(9) * 2**40)
            self.register_buffer("turn", torch.randn(4, dtype=torch.complex64))
            self.narrow = nn.Parameter(torch.randn(5, 5).bfloat16(), requires_grad=False)
            self.none = nn.Parameter(torch.empty(0, 4))

    low = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6))
    model = Tied(6, low).to(device)
    compression.save(model, tmp_path / "x")
    made = compression.load(tmp_path / "x", Tied().to(device))
    same(model, made)
    assert made.out.weight is made.table.weight
    assert str(made) == str(model)
    assert torch.equal(made.offset, model.offset)
    assert torch.equal(made.slopes, model.slopes)
    assert not made.narrow.requires_grad
    small = pruning.prune_channels(LeNet5(), torch.zeros(1, 1, 28, 28), 0.5)
    compression.save(small, tmp_path / "y")
    same(small, compression.load(tmp_path / "y", LeNet5()))
    same(small, checkpoint_of(small, tmp_path))


def test_a_layer_that_stands_twice_is_stored_once(tmp_path):
    def network():
        layer = nn.Sequential(nn.Linear(50, 50), nn.Tanh())
        return nn.Sequential(layer, nn.Linear(50, 50), layer)

    model = network()
    model[1] = nn.Sequential(model[0][0], nn.Linear(50, 50), model[0][0])  # built anew
    report = compression.save(model, tmp_path / "x")
    assert len(report.rows) == 4
    fresh = compression.load(tmp_path / "x", network())
    same(model, fresh)
    assert fresh[0] is fresh[2]
    assert fresh[1][0] is fresh[1][2] is fresh[0][0]
    x = torch.randn(3, 50)
    assert torch.equal(model(x), fresh(x))


def test_complex_numbers_of_128_bits_which_checkpoint_has_not(tmp_path):
    def build():
        model = nn.Linear(2, 2)
        model.register_buffer("turn", torch.randn(3, dtype=torch.complex128))
        model.scale = nn.Parameter(torch.randn(2, 3, dtype=torch.complex128))
        return model

    model = build()
    compression.save(model, tmp_path / "x")
    same(model, compression.load(tmp_path / "x", build()))
    with pytest.raises(ValueError, match=r"torch\.complex128, which safetensors does not know"):
        checkpoint.save(model, tmp_path / "y")


def checkpoint_of(model, folder):
    checkpoint.save(model, folder / "c")
    return checkpoint.load(folder / "c", LeNet5())


def test_rounded_inputs_come_back_too(tmp_path, device):
    def build():
        return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).to(device)

    model, x, path = build(), torch.randn(30, 6, device=device), tmp_path / "x"
    codes = compression.quantize_weights(model, Grid(8))
    for grid in Grid(8, False), Grid(4):
        for steps in compression.calibrate(model, [x], grid), None:
            rounded = compression.round_inputs(compression.put_(model, codes), grid, steps)
            compression.save(rounded, path, codes)
            made = compression.load(path, build())
            assert torch.equal(made(x), rounded(x))
            assert not torch.equal(made(x), model(x))
    compression.save(model, path, codes)
    assert torch.equal(compression.load(path, made)(x), model(x)), "as the file has it: no rounding"


def test_onto_meta_and_into_a_recurrent_network(tmp_path):
    model = nn.LSTM(3, 5, 2)
    compression.save(model, tmp_path / "x")
    same(model, compression.load(tmp_path / "x", nn.LSTM(3, 9, 2)))
    with torch.device("meta"):
        empty = nn.LSTM(3, 5, 2)
    same(model, compression.load(tmp_path / "x", empty))


def deep(seed=0):
    """A network as Deep Compression leaves it: pruned in rows and columns, few values."""
    model = LeNet300()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.fc1, model.fc2:
            rows, columns = (torch.rand(n, generator=draw).pow(3) for n in layer.weight.shape)
            keep = torch.rand(layer.weight.shape, generator=draw) < rows[:, None] * columns
            layer.weight.mul_(keep)
        for name, p in model.named_parameters():
            if "bias" in name:
                p.zero_()
    return model


def test_within_two_percent_of_the_entropy(tmp_path):
    for bits in 2, 4, 8:
        model = LeNet300()
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_()
                if weight.ndim == 1:
                    weight.zero_()
        codes = compression.quantize_weights(model, Grid(bits, fit=compression.MSE()))
        report = compression.save(compression.put_(model, codes), tmp_path / "x", codes)
        symbols = sum(compression.entropy_bits(coded.codes) for coded in codes.values()) / 8
        assert sum(row.entropy or 0 for row in report.rows) == pytest.approx(symbols)
        assert report.bytes <= 1.02 * symbols
    model = deep()
    codes = compression.share_weights(model, 8)
    report = compression.save(compression.put_(model, codes), tmp_path / "x", codes)
    symbols = sum(compression.entropy_bits(coded.index) for coded in codes.values()) / 8
    assert report.bytes <= 0.95 * symbols, "zeros in rows and columns"


def test_a_quantised_network_needs_no_codes_to_be_small(tmp_path):
    model = LeNet300()
    codes = compression.quantize_weights(model, Grid(4))
    with_codes = compression.save(compression.put_(model, codes), tmp_path / "x", codes)
    alone = compression.save(model, tmp_path / "y")
    assert alone.by_form["table"] > 100_000
    assert alone.bytes < 1.01 * with_codes.bytes
    same(compression.load(tmp_path / "y", LeNet300()), model)


def test_the_report_prints_bytes_by_layer(tmp_path):
    model = deep()
    text = str(compression.save(model, tmp_path / "x"))
    assert f"{(tmp_path / 'x').stat().st_size:,}" in text
    assert all(name in text for name, _ in model.named_parameters())
    assert "sparse" in text


# What is refused. `load` never touches the model that it cannot make whole.


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("files") / "small"
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 9))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(20, 12) < torch.rand(20, 1).pow(4))
        codes = compression.quantize_weights(model, Grid(4, False, PerAxis(0)), ["2.weight"])
        codes |= compression.share_weights(model, 5, names=["0.weight"])
    compression.save(compression.put_(model, codes), path, codes)
    return path


def refused(path, match):
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 9))
    before = copy.deepcopy(model)
    start = time.process_time()
    with pytest.raises(ValueError, match=match) as caught:
        compression.load(path, model)
    same(before, model)
    return caught, time.process_time() - start


def sealed(data):
    """With a checksum that fits: as a hostile writer would."""
    return data + blake2b(data, digest_size=8).digest()


def packed_of(data):
    return data[18 : 18 + struct.unpack_from("<I", data, 10)[0]]


def header_of(data):
    return zlib.decompress(packed_of(data))


def rewritten(data, change):
    """The file with another header, and a checksum that fits."""
    packed, header = len(packed_of(data)), json.loads(header_of(data))
    header = change(header) or header
    text = json.dumps(header).encode()
    packed_text = zlib.compress(text)
    prelude = data[:10] + struct.pack("<II", len(packed_text), len(text))
    return sealed(prelude + packed_text + data[18 + packed : -8])


def test_every_truncation_is_refused(file, tmp_path):
    data = file.read_bytes()
    for end in range(0, len(data), 3):
        (tmp_path / "cut").write_bytes(data[:end])
        refused(tmp_path / "cut", r"cut cannot be loaded: it")


@given(st.data())
def test_every_flipped_bit_is_refused(file, tmp_path_factory, data):
    bad = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(bad) - 1))
    bad[place] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flip") / "flipped"
    path.write_bytes(bad)
    refused(path, "flipped cannot be loaded: it")


@given(st.data())
@settings(max_examples=150)
def test_flips_under_a_fitting_checksum_load_or_are_refused(file, tmp_path_factory, data):
    bad = bytearray(file.read_bytes()[:-8])
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(18, len(bad) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("flip") / "flipped"
    path.write_bytes(sealed(bytes(bad)))
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 9))
    before = copy.deepcopy(model)
    try:
        compression.load(path, model)
    except ValueError as error:
        assert "flipped" in str(error)  # noqa: PT017 (either is right)
        same(before, model)
    else:
        assert model(torch.ones(1, 12)).shape == (1, 9)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=150)
def test_hostile_headers_load_or_are_refused(file, tmp_path_factory, data):
    def change(header):
        row = data.draw(st.integers(0, 3))
        item = data.draw(st.integers(0, 4))
        header["tensors"][row][item] = data.draw(JUNK)

    path = tmp_path_factory.mktemp("junk") / "junk"
    path.write_bytes(rewritten(file.read_bytes(), change))
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 9))
    before = copy.deepcopy(model)
    try:
        compression.load(path, model)
    except ValueError as error:
        assert "junk" in str(error)  # noqa: PT017
        same(before, model)


def test_bombs_are_refused_by_what_they_declare(file, tmp_path):
    data, path = file.read_bytes(), tmp_path / "bomb"

    def huge(header):
        header["tensors"][0][2] = [2**20, 2**20]

    path.write_bytes(rewritten(data, huge))
    _, took = refused(path, r"declares tensors of 4,398,046,\d+ bytes|pass limit=")
    assert took < 5

    for form in (
        ["table", 2**30, 256, ["PerGroup", 1]],
        ["vectors", 2**30, 256, 1, ["PerGroup", 1]],
    ):

        def tables(header, form=form):
            header["tensors"][0][3] = form

        path.write_bytes(rewritten(data, tables))
        refused(path, r"declares tensors of 1,09\d,\d+,\d+,\d+ bytes|pass limit=")

    for bad in (
        [["9", 8, True, None]],
        [["0", 80, True, None]],
        [["0", 8, True, [1]]],
        [["0", 8, 1, None]],
        [3],
        {"0": 1},
    ):

        def rounding(header, bad=bad):
            header["inputs"] = bad

        path.write_bytes(rewritten(data, rounding))
        refused(path, "bomb cannot be loaded")

    def wide(header):
        header["tensors"][0][2] = [10**30]

    path.write_bytes(rewritten(data, wide))
    refused(path, "has no shape")
    zeros = zlib.compress(bytes(200_000_000))
    path.write_bytes(sealed(data[:10] + struct.pack("<II", len(zeros), 200_000_000) + zeros))
    refused(path, "declares 200,000,000 bytes")
    path.write_bytes(sealed(data[:10] + struct.pack("<II", len(zeros), 1000) + zeros))
    refused(path, "not as long as declared")
    nested = zlib.compress(b"[" * 100_000)
    path.write_bytes(sealed(data[:10] + struct.pack("<II", len(nested), 100_000) + nested))
    refused(path, "cannot be loaded")


def test_the_limit_can_be_raised_and_lowered(tmp_path):
    wide = nn.Linear(1000, 1000)
    compression.save(wide, tmp_path / "x")
    with pytest.raises(ValueError, match=r"4,004,000 bytes.*Linear: pass limit=4004000"):
        compression.load(tmp_path / "x", nn.Linear(5, 5))
    same(wide, compression.load(tmp_path / "x", nn.Linear(5, 5), limit=4_004_000))
    with pytest.raises(ValueError, match="more than 100"):
        compression.load(tmp_path / "x", nn.Linear(1000, 1000), limit=100)


def test_wrong_kinds_versions_and_networks(file, tmp_path):
    data, path = file.read_bytes(), tmp_path / "x"
    path.write_bytes(data[:8] + struct.pack("<H", 7) + data[10:])
    refused(path, r"version 7, this is version 2: update this package")
    path.write_bytes(b"PK\3\4" + data[4:])
    refused(path, r"it is no file that compression\.save wrote")
    for build in LeNet300(), nn.Linear(12, 20), nn.Sequential(nn.Linear(12, 20), nn.ReLU()):
        before = copy.deepcopy(build)
        with pytest.raises(ValueError, match="small does not fit this"):
            compression.load(file, build, limit=10**9)
        same(before, build)
    with pytest.raises(FileNotFoundError):
        compression.load(tmp_path / "nothing", nn.Linear(1, 1))


def test_what_cannot_be_saved(tmp_path):
    model = nn.Linear(30, 4)
    codes = compression.quantize_weights(model, Grid(4))
    with pytest.raises(ValueError, match=r"weight is not what its codes.*put_\(model, codes\)"):
        compression.save(model, tmp_path / "x", codes)
    with pytest.raises(ValueError, match="codes of 'fc', which is no parameter"):
        compression.save(model, tmp_path / "x", {"fc": codes["weight"]})
    with pytest.raises(ValueError, match="meta"):
        compression.save(nn.Linear(2, 2, device="meta"), tmp_path / "x")
    with pytest.raises(ValueError, match="no shape yet"):
        compression.save(nn.LazyLinear(2), tmp_path / "x")
    scale, _ = codes["weight"].steps
    steps = compression.Steps(scale, torch.full_like(scale, 0.25))
    shifted = compression.Quantized(codes["weight"].codes, steps, Grid(4), torch.float32)
    compression.put_(model, {"weight": shifted})
    with pytest.raises(ValueError, match="weight: its grid is symmetric"):
        compression.save(model, tmp_path / "x", {"weight": shifted})
    assert not (tmp_path / "x").exists()


def live(function):
    """Bytes that torch and numpy hold at the worst moment, beyond those before."""
    tracemalloc.start()
    torch_bytes = measure.peak_memory(function)
    numpy_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return torch_bytes + numpy_bytes


def test_memory_is_bounded_by_a_tensor_and_not_by_the_network(tmp_path):
    def build(layers):
        return nn.Sequential(*[nn.Linear(300, 300, bias=False) for _ in range(layers)])

    measure.peak_memory(lambda: torch.ones(1) + 1)  # imports what need not be traced
    saving, loading = [], []
    for layers in 2, 2, 20:  # the first time warms up: Python keeps what it imports
        model = build(layers)
        with torch.no_grad():
            for layer in model:
                layer.weight.mul_(torch.rand(300, 300) < 0.1)
        codes = compression.quantize_weights(model, Grid(4))
        compression.put_(model, codes)
        path = tmp_path / "x"
        saving.append(live(lambda m=model, c=codes, p=path: compression.save(m, p, c)))
        with torch.device("meta"):
            empty = build(layers)
        network = layers * 360_000
        loading.append(live(lambda m=empty, p=path: compression.load(p, m)) - network)
    assert saving[2] < saving[1] + 360_000, "ten times as many tensors take no more at once"
    assert loading[2] < loading[1] + 360_000
    assert saving[2] < 40 * 360_000
    assert loading[2] < 10 * 360_000


def test_a_rounded_input_of_a_layer_without_weights_loads(tmp_path):
    def net():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    path = tmp_path / "net"
    compression.save(net(), path)

    def rounding(header):
        header["inputs"] = [["1", 8, True, [0.1, 0.0]]]

    path.write_bytes(rewritten(path.read_bytes(), rounding))
    (hook,) = compression.load(path, net())[1]._forward_pre_hooks.values()
    assert hook.steps.scale == torch.tensor([0.1])


def test_tensors_are_those_of_the_structure_each_once(file, tmp_path):
    data, path = file.read_bytes(), tmp_path / "named"
    size = sum(json.loads(header_of(data))["tensors"][0][4])

    def more(header, name):
        header["tensors"].insert(0, [name, *header["tensors"][0][1:]])

    first = data[18 + len(packed_of(data)) :][:size]
    for name in "0.bias", "0.weight.data", "training", "0._parameters", "__class__", "":
        changed = rewritten(data, lambda header, name=name: more(header, name))
        start = len(changed) - (len(data) - 18 - len(packed_of(data)))
        path.write_bytes(sealed(changed[:start] + first + changed[start:-8]))
        refused(path, "named cannot be loaded: the tensors that it lists are not those of its")

    def swapped(header):
        for kind, name in ("weight", "0.bias"), ("bias", "0.weight"):
            header["structure"]["0"]["parameters"][kind][0] = name

    def elsewhere(header):
        header["structure"]["0"]["parameters"]["bias"][0] = "training"
        header["tensors"][0][0] = "training"

    for change in swapped, elsewhere:
        path.write_bytes(rewritten(data, change))
        refused(path, "its structure has no place '(0.bias|training)' for that tensor")


def test_bombs_that_declare_little(file, tmp_path):
    """No columns, but a scale for each of many rows."""
    data, path = file.read_bytes(), tmp_path / "bomb"

    def rows(header):
        header["tensors"][0][2:4] = [2**33, 0], ["grid", 4, True, ["PerAxis", 0]]

    path.write_bytes(rewritten(data, rows))
    refused(path, r"declares tensors of 34,359,7\d+,\d+ bytes")
    huffman_words = bytes([2, 2, 1, 1, 33]) + bytes(40)
    with pytest.raises(ValueError, match="no complete Huffman code"):
        compression.decode(huffman_words, (240,))


@pytest.mark.parametrize("steps", [[0.0, 0.0], [-1.0, 0.0], [math.nan, 0.0], [1.0, math.inf]])
def test_steps_of_inputs_that_are_none(file, tmp_path, steps):
    def rounding(header):
        header["inputs"] = [["0", 8, True, steps]]

    (tmp_path / "x").write_bytes(rewritten(file.read_bytes(), rounding))
    refused(tmp_path / "x", "an input has no steps")


def test_a_structure_too_long_to_be_read_again_is_not_written(tmp_path):
    model = nn.Linear(2, 2)
    model.words = ["x" * 1000] * 17_000
    with pytest.raises(ValueError, match=r"its structure takes 17,\d+,\d+ bytes, of 16,777,216"):
        compression.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
