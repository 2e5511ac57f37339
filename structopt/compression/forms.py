"""How one tensor lies in a file: a description that JSON holds, and a few parts of bytes.

Every form gives the tensor back bit for bit; the smallest that fits is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structopt.compression.codes import Coded
from structopt.compression.coding import decode, encode, entropy_bits, matrix_shape
from structopt.compression.granularity import Granularity, PerAxis, PerBlock, PerGroup, PerTensor
from structopt.compression.grids import Grid, Steps
from structopt.compression.planes import read_numbers, write_numbers
from structopt.compression.quantize import Quantized
from structopt.compression.sharing import Shared
from structopt.compression.vectors import SharedVectors

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64,
        torch.complex128, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
        torch.bool,
    )
}  # fmt: skip
UNITS = {kind.__name__: kind for kind in (PerTensor, PerAxis, PerGroup, PerBlock)}
NEWER = {"levels", "vectors"}  # what version 1 of the file has not
SAMPLE = 4096  # with that many different numbers in the first of them, no table is tried


@dataclass(frozen=True)
class Packed:
    """A tensor's form, its parts, and what its symbols would cost at their entropy, in bytes."""

    form: list[Any]
    parts: list[bytes]
    entropy: float | None = None

    @property
    def bytes(self) -> int:
        return sum(map(len, self.parts))


def pack(tensor: Tensor, coded: Coded | None = None) -> Packed:
    """The smallest form of a tensor, or of the codes that stand for it."""
    if isinstance(coded, Quantized):
        return _grid(coded)
    if isinstance(coded, Shared):
        return _tabled("table", coded)
    if isinstance(coded, SharedVectors):
        return _tabled("vectors", coded)
    tensor = tensor.detach().cpu()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    ways = [Packed(["planes"], [write_numbers(tensor)])]
    bits = _as_whole(tensor)
    zeros = bits == 0
    if int(zeros.sum()) * 8 > len(bits):  # else the mask costs more than it saves
        rest = tensor.flatten()[~zeros]
        ways.append(
            Packed(["sparse"], [encode((~zeros).view(tensor.shape).byte()), write_numbers(rest)])
        )
    few = len(torch.unique(bits[:SAMPLE])) <= 256
    if few and not tensor.is_complex():  # a table is read by numbers of its own type
        values, index = torch.unique(bits, return_inverse=True)
        if len(values) <= 256:
            table = values.view(tensor.dtype)[None]
            ways.append(_tabled("table", Shared(index.view(tensor.shape).byte(), table)))
    return min(ways, key=lambda way: way.bytes)


def unpack(form: list[Any], parts: list[bytes], dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """The tensor. Raises ValueError, or any error of unpacking, for a description of none."""
    kind, *settings = form
    if kind == "planes":
        (data,) = parts
        return read_numbers(data, dtype, math.prod(shape)).view(shape)
    if kind == "sparse":
        stream, data = parts
        mask, made = decode(stream, shape).bool(), torch.zeros(shape, dtype=dtype)
        made[mask] = read_numbers(data, dtype, int(mask.sum()))
        return made
    if kind == "table":
        rows, values, per = settings
        if not (0 <= rows <= math.prod(shape) + 1 and 1 <= values <= 256):
            raise ValueError(f"a table of {rows} × {values} fits no tensor of shape {tuple(shape)}")
        data, stream = parts
        table = read_numbers(data, dtype, rows * values).view(rows, values)
        return Shared(decode(stream, shape), table, _units(per)).dequantize()
    if kind == "grid":
        return _ungrid(settings, parts, dtype, shape)
    if kind == "levels":
        return _unlevel(settings, parts, dtype, shape)
    if kind == "vectors":
        return _unvector(settings, parts, dtype, shape)
    raise ValueError(f"there is no form {kind!r}")


def in_table(form: list[Any]) -> int:
    """How many numbers the table of a form has, which are in memory beside the tensor's own."""
    sizes = {"table": form[1:3], "vectors": form[1:4]}.get(form[0], [0])
    if not all(type(size) is int and 0 <= size < 1 << 48 for size in sizes):
        raise ValueError(f"there is no table of {sizes}")
    return math.prod(sizes)


def _grid(coded: Quantized) -> Packed:
    """Scales, zeros where the grid is affine, and codes counted from the lowest."""
    grid, (scale, zero) = coded.grid, coded.steps
    first, kind = grid.codes[0], _type_of_scales(coded.dtype)
    if scale.dtype != kind:
        raise ValueError(f"its scales are {scale.dtype}, and of {coded.dtype} files have {kind}")
    symbols = (coded.codes.to(torch.int16) - first).to(torch.uint8)
    parts = [write_numbers(scale)]
    if grid.table:
        form = ["levels", len(grid.table), _named(grid.per)]
        parts = [write_numbers(scale.new_tensor(grid.table)), *parts, encode(symbols)]
        return Packed(form, parts, entropy_bits(symbols) / 8)
    if grid.symmetric:
        if not bool((zero == (0.5 if grid.is_sign else 0)).all()):
            raise ValueError("its grid is symmetric, but a zero lies elsewhere")
    else:
        whole = zero.to(torch.uint8)
        if not torch.equal(whole.to(zero.dtype), zero):
            raise ValueError("its grid is affine, but a zero is no whole number of 0 to 255")
        parts.append(write_numbers(whole))
    form = ["grid", grid.bits, grid.symmetric, _named(grid.per)]
    return Packed(form, [*parts, encode(symbols)], entropy_bits(symbols) / 8)


def _ungrid(
    settings: list[Any], parts: list[bytes], dtype: torch.dtype, shape: torch.Size
) -> Tensor:
    bits, symmetric, per = settings
    if not isinstance(symmetric, bool):
        raise ValueError(f"a grid is symmetric or not, not {symmetric!r}")
    grid = Grid(bits, symmetric, _units(per))
    codes = decode(parts[-1], shape)
    if codes.numel() and int(codes.max()) > grid.codes[1] - grid.codes[0]:
        raise ValueError("a code lies beyond its grid")
    scale = _scales(parts[0], grid.per, dtype, shape)
    zero = torch.full_like(scale, 0.5 if grid.is_sign else 0.0)
    if not symmetric:
        zero = read_numbers(parts[1], torch.uint8, len(scale)).to(scale.dtype)
    if len(parts) != (2 if symmetric else 3):
        raise ValueError(f"a grid has 2 or 3 parts, not {len(parts)}")
    shifted = (codes.to(torch.int16) + grid.codes[0]).to(grid.dtype)
    return Quantized(shifted, Steps(scale, zero), grid, dtype).dequantize()


def _unlevel(
    settings: list[Any], parts: list[bytes], dtype: torch.dtype, shape: torch.Size
) -> Tensor:
    (number, named), (table, scales, stream) = settings, parts
    per, codes = _units(named), decode(stream, shape)
    if not 1 <= number <= 256 or (codes.numel() and int(codes.max()) >= number):
        raise ValueError(f"a code lies beyond its {number} levels")
    scale = _scales(scales, per, dtype, shape)
    units = per.split(codes.to(scale.dtype)).nan_to_num(0).long()
    levels = read_numbers(table, scale.dtype, number)
    return per.join(levels[units] * scale[:, None], shape).to(dtype)


def _scales(data: bytes, per: Granularity, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """One for each unit of a tensor of this type and shape."""
    wide = _type_of_scales(dtype)
    return read_numbers(data, wide, len(per.split(torch.zeros((), dtype=wide).expand(shape))))


def _type_of_scales(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tabled(kind: str, shared: Shared | SharedVectors) -> Packed:
    form = [kind, *shared.table.shape, _named(shared.per)]
    parts = [write_numbers(shared.table), encode(shared.index)]
    return Packed(form, parts, entropy_bits(shared.index) / 8)


def _unvector(
    settings: list[Any], parts: list[bytes], dtype: torch.dtype, shape: torch.Size
) -> Tensor:
    (units, values, size, named), (data, stream) = settings, parts
    rows, columns = matrix_shape(shape)
    if not (1 <= values <= 256 and size >= 1 and columns % size == 0):
        raise ValueError(f"{values} vectors of {size} fit no tensor of shape {tuple(shape)}")
    index, per = decode(stream, (rows, columns // size)), _units(named)
    if len(per.split(index.double())) != units or (index.numel() and int(index.max()) >= values):
        raise ValueError(f"its {units} tables of {values} vectors do not fit its places")
    table = read_numbers(data, dtype, units * values * size).view(units, values, size)
    return SharedVectors(index, table, shape, per).dequantize()


def _named(per: Granularity) -> list[Any]:
    name = type(per).__name__
    if name not in UNITS:
        raise ValueError(f"{per} has no place in a file: {', '.join(UNITS)} have")
    return [name, *vars(per).values()]


def _units(named: list[Any]) -> Granularity:
    kind, *numbers = named
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"units {named} are no units")
    made: Granularity = UNITS[kind](*numbers)
    return made


def _as_whole(tensor: Tensor) -> Tensor:
    """Flat, the bits of each number as a whole number; of complex ones, of both halves."""
    flat = tensor.reshape(-1)
    if flat.dtype == torch.complex128:
        return torch.view_as_real(flat).view(torch.int64).ne(0).any(1).long()
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.view(kinds[flat.dtype.itemsize])
