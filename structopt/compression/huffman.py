"""Canonical Huffman codes, written out: short words for frequent symbols, and a table to read them.

The words follow from their lengths alone, so that a file has to hold only those.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count

import numpy as np
import numpy.typing as npt

LONGEST = 16  # bits of a word: any 16 bits, at any place in a byte, lie within 3 bytes
CHUNK = 1 << 17  # bytes that are looked up at once

Symbols = npt.NDArray[np.uint8]


def huffman_lengths(counts: Sequence[int]) -> list[int]:
    """How many bits the word of each symbol has; 0 for a symbol that does not occur.

    The two rarest trees are joined until one is left; the depth of a symbol is its length. Where
    a word would be longer than 16 bits, the counts are halved first, which flattens the tree.

    Huffman, 1952, "A method for the construction of minimum-redundancy codes". Raises ValueError
    for fewer than two symbols that occur: one symbol alone needs no bits.

    >>> huffman_lengths([5, 2, 1, 0, 1])
    [1, 2, 3, 0, 3]
    """
    used = [symbol for symbol, number in enumerate(counts) if number > 0]
    if len(used) < 2:
        raise ValueError(f"{len(used)} symbols occur: a code tells at least two apart")
    tie = count()  # equal counts: the older tree first, so that the result is always the same
    heap = [(int(counts[symbol]), next(tie), [symbol]) for symbol in used]
    lengths = [0] * len(counts)
    heapq.heapify(heap)
    while len(heap) > 1:
        (few, _, left), (more, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            lengths[symbol] += 1
        heapq.heappush(heap, (few + more, next(tie), left + right))
    if max(lengths) > LONGEST:
        return huffman_lengths([(number + 1) // 2 for number in counts])
    return lengths


def canonical_words(lengths: Sequence[int]) -> list[int]:
    """The word of each symbol: counted up from 0, the short ones first, ties by symbol.

    >>> [f"{word:0{n}b}" for word, n in zip(canonical_words([1, 2, 3, 3]), [1, 2, 3, 3])]
    ['0', '10', '110', '111']
    """
    words, word, before = [0] * len(lengths), 0, 0
    for length, symbol in sorted((n, s) for s, n in enumerate(lengths) if n):
        word <<= length - before
        words[symbol], before = word, length
        word += 1
    return words


def write(symbols: Symbols, lengths: Sequence[int]) -> bytes:
    """The words of the symbols one after the other, the first bit highest in its byte."""
    size = np.array(lengths, dtype=np.int64)[symbols]
    word = np.array(canonical_words(lengths), dtype=np.int64)[symbols]
    start = np.cumsum(size) - size
    bits = np.zeros(int(size.sum()), dtype=np.uint8)
    for place in range(int(size.max(initial=0))):
        has = size > place
        bits[start[has] + place] = word[has] >> (size[has] - 1 - place) & 1
    return np.packbits(bits).tobytes()


def read(data: bytes, lengths: Sequence[int], number: int) -> Symbols:
    """So many symbols from the words in ``data``. Raises ValueError for anything else in it.

    Looks up which word starts at every bit, then walks from word to word.
    """
    known = [n for n in lengths if n]
    if max(known, default=0) > LONGEST or sum(1 << (LONGEST - n) for n in known) != 1 << LONGEST:
        raise ValueError("the lengths make no complete Huffman code")
    width = max(lengths)
    symbol, step = _table(lengths, width)
    shifts = np.arange(24 - width, 16 - width, -1)
    made = np.empty(number, dtype=np.uint8)
    done = position = 0
    padded = data + bytes(3)
    for first in range(0, len(data), CHUNK):
        part = np.frombuffer(padded[first : first + CHUNK + 2], dtype=np.uint8).astype(np.int32)
        three = part[:-2] << 16 | part[1:-1] << 8 | part[2:]  # three bytes from each byte on
        windows = (three[:, None] >> shifts & ((1 << width) - 1)).ravel()
        steps, starts = step[windows].tobytes(), list[int]()
        end, left = min(CHUNK, len(data) - first) * 8, number - done
        while position < end and len(starts) < left:
            starts.append(position)
            position += steps[position]
        made[done : done + len(starts)] = symbol[windows[starts]]
        done += len(starts)
        position -= end
    if done < number or not -8 < position <= 0:
        raise ValueError(f"{len(data)} bytes do not hold {number} Huffman words")
    return made


def _table(lengths: Sequence[int], width: int) -> tuple[Symbols, Symbols]:
    """Which symbol begins with these ``width`` bits, and how many of them are its own."""
    symbol = np.empty(1 << width, dtype=np.uint8)
    step = np.empty(1 << width, dtype=np.uint8)
    for s, (word, length) in enumerate(zip(canonical_words(lengths), lengths, strict=True)):
        if length:
            span = slice(word << (width - length), (word + 1) << (width - length))
            symbol[span], step[span] = s, length
    return symbol, step
