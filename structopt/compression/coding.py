"""Symbols as few bytes: five ways, and whichever is the smallest."""

from __future__ import annotations

import math
import struct

import numpy as np
import torch
from torch import Tensor

from structopt.compression import huffman, ranges
from structopt.compression.huffman import Symbols
from structopt.compression.ranges import MaskModel, Whole

CONSTANT, PACKED, HUFFMAN, RANGE, MASKED = range(5)
TILES = [(1, 64), (1, 256), (4, 128), (16, 64)]
TRIED = 1 << 18  # symbols, with which the tiles are chosen
TILES_AT_MOST = 2048  # each costs a call,
BITS_AT_LEAST = 64  # and has that many bits, where there are so many


def entropy_bits(symbols: Tensor) -> float:
    """What no code beats that knows how frequent each symbol is, and nothing else: N · H.

    N symbols, H = -Σ p log2 p over their frequencies (Shannon, 1948).

    >>> entropy_bits(torch.tensor([0, 0, 1, 1]))
    4.0
    """
    counts = torch.unique(symbols, return_counts=True)[1].double()
    return abs(float(-(counts * (counts / counts.sum()).log2()).sum()))


def encode(symbols: Tensor) -> bytes:
    """A stream of symbols 0 to 255, of any shape, in the smallest of up to five ways.

    One symbol alone, bits side by side, Huffman's words, a range coder with a fixed model, or with
    a model that learns where the most frequent symbol lies: the zeros of a pruned network lie in
    rows and columns. A matrix is what the first dimension makes of the tensor.

    Raises ValueError for other types than uint8.

    >>> len(encode(torch.zeros(1000, dtype=torch.uint8)))
    2
    """
    if symbols.dtype != torch.uint8:
        raise ValueError(f"symbols are numbers 0 to 255 as uint8, not {symbols.dtype}")
    matrix = symbols.detach().cpu().numpy().reshape(matrix_shape(symbols.shape))
    flat: Symbols = matrix.ravel()
    counts = np.bincount(flat, minlength=1)
    if np.count_nonzero(counts) < 2:
        return bytes([CONSTANT, len(counts) - 1])
    bits = _bits(len(counts))
    ways = [
        bytes([PACKED, len(counts) - 1]) + _packed(flat, bits),
        bytes([RANGE, len(counts) - 1]) + _ranged(flat, counts),
    ]
    if flat.size < ranges.CHUNK:  # never far ahead of the range coder, and slower than it
        lengths = huffman.huffman_lengths(counts.tolist())
        ways.append(bytes([HUFFMAN, len(counts) - 1, *lengths]) + huffman.write(flat, lengths))
    if counts.max() > flat.size // 2:
        ways.append(bytes([MASKED, len(counts) - 1]) + _masked(matrix, counts))
    return min(ways, key=len)


def decode(data: bytes, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The symbols of a stream that :func:`encode` made of a tensor of that shape, uint8.

    Raises ValueError where the bytes are no such stream.

    >>> decode(encode(torch.tensor([[3, 1], [2, 0]], dtype=torch.uint8)), (2, 2))
    tensor([[3, 1],
            [2, 0]], dtype=torch.uint8)
    """
    try:
        symbols = _decoded(data, matrix_shape(shape))
    except (AssertionError, IndexError, struct.error, ValueError, OverflowError) as error:
        where = f"{len(data)} bytes hold no symbols of shape {tuple(shape)}"
        raise ValueError(f"{where}: {error}") from error
    return torch.from_numpy(symbols.reshape(tuple(shape)))


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """(first dimension, everything else); a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _decoded(data: bytes, shape: tuple[int, int]) -> Symbols:
    way, last, body = data[0], data[1], data[2:]
    number = math.prod(shape)
    if way == CONSTANT:
        if body:
            raise ValueError("bytes follow where none should")
        return np.full(number, last, dtype=np.uint8)
    if way == PACKED:
        bits = _bits(last + 1)
        if len(body) != -(-number * bits // 8):
            raise ValueError(f"{number} symbols of {bits} bits need another length")
        planes = np.unpackbits(np.frombuffer(body, dtype=np.uint8), count=number * bits)
        made = np.zeros(number, dtype=np.uint8)
        for plane in planes.reshape(number, bits).T:
            np.bitwise_or(made << 1, plane, out=made)
        return made
    if way == HUFFMAN:
        return huffman.read(body[last + 1 :], list(body[: last + 1]), number)
    if way == RANGE:
        counts, body = _counts(body, last + 1)
        return ranges.read(number, counts, ranges.decoder(body))
    if way == MASKED:
        return _unmasked(body, last + 1, shape)
    raise ValueError(f"there is no way {way}")


def _bits(alphabet: int) -> int:
    return max(1, (alphabet - 1).bit_length())


def _packed(symbols: Symbols, bits: int) -> bytes:
    planes = symbols[:, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint8) & 1
    return np.packbits(planes).tobytes()


def _ranged(symbols: Symbols, counts: Whole) -> bytes:
    coder, rounded = ranges.encoder(), _rounded(counts)
    ranges.write(symbols, rounded, coder)
    return _varints(rounded) + ranges.words(coder)


def _masked(matrix: Symbols, counts: Whole) -> bytes:
    """Which symbol is the common one, how the mask is walked, and one stream of mask and rest."""
    common = int(counts.argmax())
    masks = [matrix != common, np.ascontiguousarray(matrix.T) != common]
    prior = max(int(masks[0].mean() * ranges.ONE), 1)
    tries = []
    for turned, mask in enumerate(masks):
        first = mask[: max(1, TRIED // mask.shape[1])]
        fewest = max(BITS_AT_LEAST, mask.size // TILES_AT_MOST)
        for high, wide in TILES:
            high, wide = min(high, mask.shape[0]), min(wide, mask.shape[1])
            high = min(max(high, -(-fewest // wide)), mask.shape[0], 65535)
            cost = MaskModel(high, wide, prior).cost(first) / first.size
            tries.append((cost, turned, high, wide))
    _, turned, high, wide = min(tries)
    mask = masks[turned]
    rest = counts.copy()
    rest[common] = 0
    rounded, coder = _rounded(rest), ranges.encoder()
    MaskModel(high, wide, prior).write(mask, coder)
    if np.count_nonzero(rest) > 1:
        ranges.write((matrix.T if turned else matrix)[mask], rounded, coder)
    head = struct.pack("<BBHHH", common, turned, high, wide, prior)
    return head + _varints(rounded) + ranges.words(coder)


def _unmasked(body: bytes, alphabet: int, shape: tuple[int, int]) -> Symbols:
    common, turned, high, wide, prior = struct.unpack_from("<BBHHH", body)
    rest, body = _counts(body[8:], alphabet)
    rows, columns = shape[::-1] if turned else shape
    fewest = min(BITS_AT_LEAST, rows * columns)
    if not (turned < 2 and min(high, rows) * min(wide, columns) >= fewest > 0 and prior):
        raise ValueError("its mask is walked in no way there is")
    coder = ranges.decoder(body)
    mask = MaskModel(high, wide, prior).read((rows, columns), coder)
    made = np.full(mask.shape, common, dtype=np.uint8)
    if np.count_nonzero(rest) > 1:
        made[mask] = ranges.read(int(mask.sum()), rest, coder)
    else:
        made[mask] = rest.argmax()
    return np.ascontiguousarray(made.T if turned else made)


def _rounded(counts: Whole) -> Whole:
    """The counts as coarse as pays: a smaller table against a model that fits less well."""

    def halved(times: int) -> Whole:
        made: Whole = np.maximum((counts + (1 << times >> 1)) >> times, counts > 0).astype(np.int64)
        return made

    def cost(times: int) -> float:
        table = halved(times)
        used = counts > 0
        bits = -(counts[used] * np.log2(table[used] / table.sum())).sum()
        return float(8 * len(_varints(table)) + bits)

    return halved(min(range(int(counts.max()).bit_length()), key=cost))


def _varints(numbers: Whole) -> bytes:
    """Seven bits a byte, the low ones first; the highest bit says that more follow."""
    made = bytearray()
    for number in numbers.tolist():
        while number > 127:
            made.append(number & 127 | 128)
            number >>= 7
        made.append(number)
    return bytes(made)


def _counts(data: bytes, alphabet: int) -> tuple[Whole, bytes]:
    """The numbers of :func:`_varints`, and what comes after them."""
    made, place = np.zeros(alphabet, dtype=np.int64), 0
    for symbol in range(alphabet):
        number = shift = 0
        while (byte := data[place]) > 127 and shift < 35:
            number, shift, place = number | (byte & 127) << shift, shift + 7, place + 1
        made[symbol], place = number | byte << shift, place + 1
    if not made.any():
        raise ValueError("no symbol ever occurs")
    return made, data[place:]
