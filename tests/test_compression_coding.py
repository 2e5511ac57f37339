"""Symbols as bytes and back: Huffman's optimum, the entropy, and what a mask's model learns."""

import math
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structopt import compression
from structopt.compression import coding, huffman, ranges
from structopt.compression.coding import HUFFMAN, MASKED, RANGE

COUNTS = st.lists(st.integers(0, 1000), min_size=2, max_size=40).filter(
    lambda counts: sum(c > 0 for c in counts) > 1
)
SHAPES = st.sampled_from([(1,), (40,), (7, 30), (30, 7), (12, 5, 3, 3), (1, 1), (300, 2)])


def best_cost(counts):
    """The bits of the best code: what is joined is paid for, over and over."""
    left, cost = sorted(c for c in counts if c), 0
    while len(left) > 1:
        joined = left[0] + left[1]
        cost += joined
        left = sorted([joined, *left[2:]])
    return cost


@given(COUNTS)
def test_huffman_is_the_best_code_of_whole_bits(counts):
    lengths = compression.huffman_lengths(counts)
    words = compression.canonical_words(lengths)
    assert sum(c * n for c, n in zip(counts, lengths, strict=True)) == best_cost(counts)
    assert [n > 0 for n in lengths] == [c > 0 for c in counts]
    used = [f"{w:0{n}b}" for w, n in zip(words, lengths, strict=True) if n]
    assert sum(2.0 ** -len(word) for word in used) == 1
    assert not any(b.startswith(a) for a, b in pairwise(sorted(used))), "no word begins another"
    ordered = sorted((n, s) for s, n in enumerate(lengths) if n)
    assert [s for _, s in ordered] == sorted(
        (s for _, s in ordered), key=lambda s: words[s] << (16 - lengths[s])
    )


def test_words_after_a_gap_in_the_lengths():
    lengths = compression.huffman_lengths([99] + [1] * 32)
    assert lengths == [1] + [6] * 32
    assert compression.canonical_words(lengths) == [0, *range(0b100000, 0b1000000)]


def test_words_are_at_most_16_bits():
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(sum(fibonacci[-2:]))
    lengths = compression.huffman_lengths(fibonacci)
    assert max(lengths) == 16
    assert sum(2.0**-n for n in lengths) == 1


@given(COUNTS, st.integers(0, 400))
def test_huffman_words_by_a_dictionary(counts, number):
    lengths = compression.huffman_lengths(counts)
    chances = np.array(counts) / sum(counts)
    symbols = np.random.default_rng(number).choice(len(counts), number, p=chances).astype(np.uint8)
    data = huffman.write(symbols, lengths)
    assert np.array_equal(huffman.read(data, lengths, number), symbols)
    table = {
        f"{w:0{n}b}": s
        for s, (w, n) in enumerate(zip(compression.canonical_words(lengths), lengths, strict=True))
        if n
    }
    found, word = [], ""
    for bit in "".join(f"{byte:08b}" for byte in data):
        word += bit
        if word in table and len(found) < number:
            found.append(table[word])
            word = ""
    assert found == symbols.tolist()


def test_huffman_reads_over_the_border_of_its_chunks():
    symbols = (
        np.random.default_rng(0).choice(5, 800_000, p=[0.5, 0.3, 0.1, 0.07, 0.03]).astype(np.uint8)
    )
    lengths = compression.huffman_lengths(np.bincount(symbols).tolist())
    data = huffman.write(symbols, lengths)
    assert len(data) > huffman.CHUNK
    assert np.array_equal(huffman.read(data, lengths, len(symbols)), symbols)


def drawn(shape, kind, seed=0):
    """Symbols of many kinds, on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=draw)
    if kind == "even":
        made = torch.randint(0, 256, shape, generator=draw)
    elif kind == "one":
        made = torch.full(shape, seed % 256)
    elif kind == "bell":
        made = (normal * 2 + 8).clamp(0, 15).round()
    else:  # zeros lie in rows and columns
        rows = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=draw)
        keep = torch.rand(shape, generator=draw) < (0.6 if len(shape) > 1 else 0.1) * rows.pow(3)
        made = (normal * 2 + 4).clamp(1, 8).round() * keep
    return made.to(torch.uint8)


KINDS = st.sampled_from(["even", "one", "bell", "pruned"])


@given(SHAPES, KINDS, st.integers(0, 300))
def test_what_is_encoded_is_decoded(shape, kind, seed):
    symbols = drawn(shape, kind, seed)
    data = compression.encode(symbols)
    assert torch.equal(compression.decode(data, symbols.shape), symbols)
    bits = max(1, int(symbols.max()).bit_length())
    assert len(data) <= 2 + math.ceil(symbols.numel() * bits / 8), "never more than bits in a row"


def test_symbols_on_the_device_and_none_at_all(device):
    symbols = drawn((20, 30), "pruned").to(device)
    assert compression.encode(symbols) == compression.encode(symbols.cpu())
    for shape in (0,), (0, 3), (3, 0):
        empty = torch.empty(shape, dtype=torch.uint8)
        assert compression.decode(compression.encode(empty), shape).shape == shape


def test_each_way_is_the_smallest_somewhere():
    even = drawn((8, 128), "even")
    ways = {
        coding.CONSTANT: drawn((5, 5), "one"),
        coding.PACKED: even,
        coding.HUFFMAN: torch.tensor([0] * 96 + [1] * 48 + [2] * 24 + [3] * 24, dtype=torch.uint8),
        coding.RANGE: drawn((100, 100), "bell"),
        coding.MASKED: drawn((300, 100), "pruned"),
    }
    for way, symbols in ways.items():
        data = compression.encode(symbols)
        assert data[0] == way, (way, data[0])
        assert torch.equal(compression.decode(data, symbols.shape), symbols)


@pytest.mark.parametrize("shape", [(300, 784), (64, 32, 3, 3)])
def test_within_two_percent_of_the_entropy_and_below_it_where_zeros_lie_in_rows(shape):
    bell, pruned = drawn(shape, "bell"), drawn(shape, "pruned")
    assert len(compression.encode(bell)) <= 1.02 * compression.entropy_bits(bell) / 8
    assert len(compression.encode(pruned)) <= 0.95 * compression.entropy_bits(pruned) / 8


@given(COUNTS)
def test_entropy_is_that_of_shannon(counts):
    symbols = torch.tensor([s for s, c in enumerate(counts) for _ in range(c)])
    chances = [c / sum(counts) for c in counts if c]
    expected = -sum(counts) * sum(p * math.log2(p) for p in chances)
    assert compression.entropy_bits(symbols) == pytest.approx(expected, abs=1e-6)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    seed=st.integers(0, 30),
)
def test_the_chances_of_a_mask_bit_by_bit(shape, tile, seed):
    mask = np.random.default_rng(seed).random(shape) < 0.3
    model = ranges.MaskModel(*tile, prior=9000)
    chances = model.chances(mask)
    for i in range(shape[0]):
        for j in range(shape[1]):
            top, left = i - i % tile[0], j - j % tile[1]

            def column(k, top=top):
                return math.floor((65536 * mask[:top, k].sum() + 4 * 9000) / (top + 4))

            seen, expected = mask[i, :left].sum(), sum(column(k) for k in range(left))
            chance = column(j) * ((seen + 4) * 65536 / (expected + 4 * 65536))
            assert chances[i, j] == min(max(chance, 1), 65535) / 65536
    coder = ranges.encoder()
    model.write(mask, coder)
    assert np.array_equal(model.read(shape, ranges.decoder(ranges.words(coder))), mask)


@given(st.binary(max_size=60), SHAPES)
def test_any_bytes_give_symbols_or_a_clear_error(data, shape):
    try:
        made = compression.decode(data, shape)
    except ValueError as error:
        assert "bytes hold no symbols of shape" in str(error)  # noqa: PT017 (either is right)
    else:
        assert made.shape == shape


@pytest.mark.parametrize("tile", [(1, 1), (1, 63), (65535, 1), (0, 64), (64, 0)])
def test_tiles_so_small_that_reading_would_never_end_are_refused(tile):
    head, counts = struct.pack("<BBBBHHH", MASKED, 1, 0, 0, *tile, 9), bytes([0, 1])
    with pytest.raises(ValueError, match="walked in no way"):
        compression.decode(head + counts + bytes(8), (1, 10**9))
    small = struct.pack("<BBBBHHH", MASKED, 1, 0, 0, 3, 5, 9) + counts + bytes(8)
    assert not compression.decode(small, (3, 5)).any()


def test_what_follows_a_stream_is_noticed():
    for counts in ([9, 0], [2, 2, 2, 2], [96, 48, 24, 24]):
        symbols = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).byte()
        data = compression.encode(symbols)
        assert torch.equal(compression.decode(data, symbols.shape), symbols)
        with pytest.raises(ValueError, match="bytes hold no symbols of shape"):
            compression.decode(data + b"\0", symbols.shape)
    nothing = struct.pack("<BBBBHHH", MASKED, 1, 0, 0, 4, 64, 9) + bytes(2 + 8)
    with pytest.raises(ValueError, match="no symbol ever occurs"):
        compression.decode(nothing, (4, 64))
    with pytest.raises(ValueError, match="no symbol ever occurs"):
        compression.decode(bytes([RANGE, 1, 0, 0]), (4, 64))


def test_one_symbol_among_very_many_has_a_chance():
    symbols = np.zeros((300, 300), dtype=np.uint8)
    symbols[200, 7] = 3
    data = bytes([MASKED, 3]) + coding._masked(symbols, np.bincount(symbols.ravel()))
    assert np.array_equal(compression.decode(data, symbols.shape), symbols)


def test_counts_are_as_coarse_as_pays_and_end():
    assert coding._rounded(np.array([100_001] * 16)).max() < 128, "a byte each, in place of three"
    assert coding._rounded(np.array([9, 4])).tolist() == [9, 4], "a byte each anyway"
    counts, rest = coding._counts(bytes([255] * 6 + [1]), 1)
    assert (counts.tolist(), rest) == ([2**35 - 1 | 255 << 35], b"\1")


def test_many_symbols_are_left_to_the_range_coder_part_by_part(monkeypatch):
    symbols = torch.tensor([0] * 960 + [1] * 480 + [2] * 240 + [3] * 240).byte()
    assert compression.encode(symbols)[0] == HUFFMAN
    monkeypatch.setattr(ranges, "CHUNK", 50)
    data = compression.encode(symbols)
    assert data[0] == RANGE
    assert torch.equal(compression.decode(data, symbols.shape), symbols)


def test_large_masks_have_few_tiles_whose_sides_fit_the_file(monkeypatch):
    keep = torch.rand(1200, 1) < torch.linspace(0, 0.4, 1200)[:, None]
    symbols = (keep & (torch.rand(1200, 1000) < 0.3)).byte()
    for most in coding.TILES_AT_MOST, 100:
        monkeypatch.setattr(coding, "TILES_AT_MOST", most)
        data = compression.encode(symbols)
        high, wide = struct.unpack_from("<HH", data, 4)
        assert data[0] == MASKED
        assert high * wide >= symbols.numel() // most
    monkeypatch.setattr(coding, "TILES_AT_MOST", 1)
    column = (torch.rand(70_000, 1) < 0.1).byte().numpy()
    data = bytes([MASKED, 1]) + coding._masked(column, np.bincount(column[:, 0]))
    assert np.array_equal(compression.decode(data, column.shape), column)


@given(SHAPES, KINDS, st.data())
def test_cut_and_flipped_streams(shape, kind, data):
    stream = bytearray(compression.encode(drawn(shape, kind, 3)))
    place = data.draw(st.integers(0, len(stream) - 1))
    for bad in (
        bytes(stream[:place]),
        bytes([*stream[:place], stream[place] ^ 1, *stream[place + 1 :]]),
    ):
        try:
            assert compression.decode(bad, shape).shape == shape
        except ValueError as error:
            assert "bytes hold no symbols of shape" in str(error)  # noqa: PT017


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"as uint8, not torch\.float32"):
        compression.encode(torch.ones(3))
    with pytest.raises(ValueError, match="1 symbols occur"):
        compression.huffman_lengths([0, 5])
    with pytest.raises(ValueError, match="no complete Huffman code"):
        huffman.read(b"\0", [2, 2, 2], 1)
    with pytest.raises(ValueError, match="do not hold 9"):
        huffman.read(b"\0", [1, 1], 9)
