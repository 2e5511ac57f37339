"""A reader of the file format, from the book's page alone: plain Python, nothing of the package."""

import json
import math
import struct
import zlib
from hashlib import blake2b

import pytest
import torch
from torch import nn

from structopt import compression
from structopt.compression import Grid, NormalFloat, PerAxis, PerBlock, PerGroup, PerTensor

NEWER = {"levels", "vectors"}
TYPES = {
    "float32": "f", "float64": "d", "float16": "e", "int64": "q", "uint8": "B", "bool": "?",
}  # fmt: skip


class RangeDecoder:
    def __init__(self, data):
        self.words = list(struct.unpack(f"<{len(data) // 4}I", data))
        self.lower, self.range, self.point = 0, 2**64 - 1, self.word() << 32 | self.word()

    def word(self):
        return self.words.pop(0) if self.words else 0

    def read(self, borders):
        scale = self.range // 2**24
        q = (self.point - self.lower) % 2**64 // scale
        symbol = max(i for i, a in enumerate(borders[:-1]) if a <= q)
        a, b = borders[symbol : symbol + 2]
        self.lower, self.range = (self.lower + a * scale) % 2**64, (b - a) * scale
        if self.range < 2**32:
            self.lower, self.range = self.lower * 2**32 % 2**64, self.range * 2**32
            self.point = (self.point * 2**32 + self.word()) % 2**64
        return symbol


def read_counts(data, number):
    counts, place = [], 0
    for _ in range(number):
        count = shift = 0
        while data[place] & 128:
            count, shift, place = count | (data[place] & 127) << shift, shift + 7, place + 1
        counts.append(count | data[place] << shift)
        place += 1
    return counts, data[place:]


def borders_of(counts):
    f = (2**24 - len(counts)) / sum(counts)
    return [int(sum(counts[:i]) * f) + i for i in range(len(counts))] + [2**24]


def read_mask(shape, high, wide, prior, coder):
    (rows, columns), mask = shape, {}
    for top in range(0, rows, high):
        held = [sum(mask[i, j] for i in range(top)) for j in range(columns)]
        e = [(65536 * k + 4 * prior) // (top + 4) for k in held]
        for left in range(0, columns, wide):
            for i in range(top, min(top + high, rows)):
                s, big_e = sum(mask[i, j] for j in range(left)), sum(e[:left])
                for j in range(left, min(left + wide, columns)):
                    p = e[j] * ((s + 4) * 65536 / (big_e + 4 * 65536))
                    p = min(max(p, 1), 65535) / 65536
                    mask[i, j] = coder.read([0, int((1 - p) * (2**24 - 2)) + 1, 2**24])
    return [[mask[i, j] for j in range(columns)] for i in range(rows)]


def read_symbols(data, shape):
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    n, way, m, body = rows * columns, data[0], data[1], data[2:]
    if way == 0:
        return [m] * n
    if way == 1:
        bits, b = "".join(f"{byte:08b}" for byte in body), max(1, m.bit_length())
        return [int(bits[i * b : i * b + b], 2) for i in range(n)]
    if way == 2:
        lengths, bits = body[: m + 1], "".join(f"{byte:08b}" for byte in body[m + 1 :])
        words, word, before = {}, 0, 0
        for length, symbol in sorted((length, s) for s, length in enumerate(lengths) if length):
            word <<= length - before
            words[f"{word:0{length}b}"], before, word = symbol, length, word + 1
        made, at = [], 0
        while len(made) < n:
            length = next(k for k in range(1, 17) if bits[at : at + k] in words)
            made.append(words[bits[at : at + length]])
            at += length
        return made
    if way == 3:
        counts, rest = read_counts(body, m + 1)
        coder, borders = RangeDecoder(rest), borders_of(counts)
        return [coder.read(borders) for _ in range(n)]
    common, t, high, wide, prior = struct.unpack("<BBHHH", body[:8])
    counts, rest = read_counts(body[8:], m + 1)
    coder, borders = RangeDecoder(rest), borders_of(counts)
    mask = read_mask((columns, rows) if t else (rows, columns), high, wide, prior, coder)
    used = [s for s, count in enumerate(counts) if count]

    def symbol(bit):
        return common if not bit else used[0] if len(used) == 1 else coder.read(borders)

    matrix = [[symbol(bit) for bit in row] for row in mask]
    if t:
        matrix = [list(column) for column in zip(*matrix, strict=True)]
    return [s for row in matrix for s in row]


def read_numbers(data, kind, n):
    size = struct.calcsize(f"<{kind}")
    if data[0] == 0:
        return list(struct.unpack(f"<{n}{kind}", data[1:]))
    planes, place = [], 1
    for _ in range(size):
        (length,) = struct.unpack_from("<I", data, place)
        planes.append(read_symbols(data[place + 4 : place + 4 + length], (n,)))
        place += 4 + length
    return list(
        struct.unpack(
            f"<{n}{kind}", bytes(b for number in zip(*planes, strict=True) for b in number)
        )
    )


def unit_of(i, shape, units):
    """Which unit number i of the tensor belongs to."""
    columns = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    row, column = divmod(i, columns)
    kind, *sizes = units
    if kind == "PerTensor":
        return 0
    if kind == "PerAxis":
        axis = sizes[0] % len(shape)
        return i // math.prod(shape[axis + 1 :]) % shape[axis]
    r, c = (1, *sizes) if kind == "PerGroup" else sizes
    return row // r * -(-columns // c) + column // c


def read_tensor(kind, shape, form, parts):
    n, letter = math.prod(shape), TYPES[kind]
    if form[0] == "planes":
        return read_numbers(parts[0], letter, n)
    if form[0] == "vectors":
        _, u, k, d, units = form
        columns = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
        places = [n // columns, columns // d]
        symbols, table = read_symbols(parts[1], places), read_numbers(parts[0], letter, u * k * d)
        starts = [(unit_of(i, places, units) * k + s) * d for i, s in enumerate(symbols)]
        return [number for start in starts for number in table[start : start + d]]
    symbols = read_symbols(parts[-1] if form[0] != "sparse" else parts[0], shape)
    if form[0] == "sparse":
        rest = iter(read_numbers(parts[1], letter, sum(symbols)))
        return [next(rest) if s else 0 for s in symbols]
    unit = [unit_of(i, shape, form[-1]) for i in range(n)]
    if form[0] == "table":
        table = read_numbers(parts[0], letter, form[1] * form[2])
        return [table[u * form[2] + s] for u, s in zip(unit, symbols, strict=True)]
    wide = "d" if kind == "float64" else "f"
    scale = read_numbers(parts[form[0] == "levels"], wide, max(unit) + 1)
    if form[0] == "levels":
        level = read_numbers(parts[0], wide, form[1])
        return [level[s] * scale[u] for u, s in zip(unit, symbols, strict=True)]
    _, bits, symmetric, _ = form
    first, zero = 1 - 2 ** (bits - 1), [0] * len(scale)
    if not symmetric:
        first, zero = 0, read_numbers(parts[1], "B", len(scale))
    elif bits == 1:
        first, zero = 0, [0.5] * len(scale)
    return [(s + first - zero[u]) * scale[u] for u, s in zip(unit, symbols, strict=True)]


def read_file(path):
    """Name -> (shape, numbers)."""
    data = path.read_bytes()
    mark, version, packed, whole = struct.unpack("<8sHII", data[:18])
    assert mark.hex() == "89534f50540d0a1a"
    assert blake2b(data[:-8], digest_size=8).digest() == data[-8:]
    text = zlib.decompress(data[18 : 18 + packed])
    assert len(text) == whole
    place, made, tensors = 18 + packed, {}, json.loads(text)["tensors"]
    assert version == (2 if {form[0] for _, _, _, form, _ in tensors} & NEWER else 1)
    for name, kind, shape, form, lengths in tensors:
        parts = []
        for length in lengths:
            parts.append(data[place : place + length])
            place += length
        made[name] = shape, read_tensor(kind, shape, form, parts)
    assert place == len(data) - 8
    return made


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.fc1, self.fc2 = nn.Linear(40, 30), nn.Linear(30, 7)
        self.fc3 = nn.Linear(30, 40)
        self.small = nn.Linear(9, 5).half()
        self.wide = nn.Linear(6, 5).double()


def pruned(model):
    with torch.no_grad():
        for weight in model.fc1.weight, model.fc3.weight:
            keep = torch.rand_like(weight) < 0.5 * torch.rand(len(weight), 1).pow(2)
            weight *= keep
        model.fc3.weight.copy_(model.fc3.weight.sign() * 0.25)
        model.fc2.bias.zero_()
    return model


UNITS = [PerTensor(), PerAxis(0), PerAxis(-1), PerGroup(7), PerBlock(4, 5)]


@pytest.mark.parametrize("per", UNITS, ids=str)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_the_page_is_enough_to_read_a_file(tmp_path, per, bits):
    model = pruned(Network())
    codes = compression.quantize_weights(
        model, Grid(bits, True, per), ["conv.weight", "fc2.weight"]
    )
    codes |= compression.quantize_weights(
        model, Grid(bits, False, per), ["small.weight", "wide.weight"]
    )
    codes |= compression.share_weights(model, 6, per, ["fc1.weight"])
    if bits > 1:
        uneven = Grid(bits, True, per, levels=NormalFloat())
        codes |= compression.quantize_weights(model, uneven, ["fc3.weight", "wide.weight"])
        codes |= compression.share_weight_vectors(model, 2**bits, 6, per, ["conv.weight"])
        codes |= compression.share_weight_vectors(model, 2, 3, per, ["small.weight"])
    report = compression.save(compression.put_(model, codes), tmp_path / "x", codes)
    assert report.bytes == (tmp_path / "x").stat().st_size
    found = read_file(tmp_path / "x")
    assert list(found) == [row.name for row in report.rows]
    state = model.state_dict()
    assert sorted(found) == sorted(state)
    for name, (shape, numbers) in found.items():
        assert torch.Size(shape) == state[name].shape
        wide = torch.float64 if state[name].dtype == torch.float64 else torch.float32
        if state[name].is_floating_point():  # Python multiplies in double precision: round as told
            ours = torch.tensor(numbers, dtype=torch.float64).to(wide).to(state[name].dtype)
        else:
            ours = torch.tensor(numbers, dtype=state[name].dtype)
        assert torch.equal(ours.view(shape), state[name]), name
    newer = NEWER if bits > 1 else set()
    assert set(report.by_form) - {"sparse"} == {"planes", "grid", "table"} | newer


@pytest.mark.parametrize("kind", ["bell", "rows", "columns", "two", "few", "even", "one"])
def test_the_page_is_enough_to_read_every_way(kind):
    n = torch.randn(60, 20)
    symbols = {
        "bell": (n * 2 + 8).round().clamp(0, 15),
        "rows": ((n * 2 + 4).round().clamp(1, 8)) * (torch.rand(60, 20) < torch.rand(60, 1).pow(4)),
        "columns": torch.where(torch.rand(60, 20) < torch.rand(20).pow(5), 3, 7),
        "two": (n > 0).float(),
        "few": torch.tensor([0] * 96 + [1] * 48 + [2] * 24 + [3] * 24).float(),
        "even": torch.randint(0, 256, (60, 20)).float(),
        "one": torch.full((4, 5), 9.0),
    }[kind].to(torch.uint8)
    data = compression.encode(symbols)
    assert read_symbols(data, symbols.shape) == symbols.flatten().tolist()
    expected = {"bell": 3, "rows": 4, "columns": 4, "two": 1, "few": 2, "even": 1, "one": 0}
    assert data[0] == expected[kind]
