"""How one tensor lies in a file: each form gives it back bit for bit, each guard refuses."""

import struct
from dataclasses import dataclass, replace

import pytest
import torch

from structopt.compression import (
    Grid,
    PerAxis,
    PerBlock,
    PerGroup,
    PerTensor,
    Steps,
    encode,
    entropy_bits,
    fit,
    quantize,
    share,
)
from structopt.compression.forms import DTYPES, in_table, pack, unpack

PLAIN, PLANES = b"\0", b"\1"


THREE = torch.Size([3])


def there_and_back(tensor, coded=None):
    packed = pack(tensor, coded)
    return packed, unpack(packed.form, packed.parts, tensor.dtype, tensor.shape)


def bits(tensor):
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def with_numbers(dtype, *numbers, size=300):
    tensor = torch.zeros(size, dtype=dtype)
    tensor[7 : 7 + len(numbers)] = torch.tensor(numbers, dtype=dtype)
    return tensor


def many(values, before=0):
    """So many different numbers in no order, each 40 times, after so many zeros."""
    numbers = (torch.arange(1, values + 1) * 0.618034).sin().repeat(40)
    assert len(numbers.unique()) == values
    return torch.cat([torch.zeros(before), numbers])


TENSORS = {
    "of each second number": (lambda: torch.randn(40)[::2], "planes"),
    "transposed": (lambda: torch.randn(30, 20).T, "planes"),
    "expanded": (lambda: torch.randn(1).expand(5, 10), "table"),
    "conjugate": (lambda: torch.randn(9, dtype=torch.complex64).conj(), "planes"),
    "negative": (lambda: torch.randn(9, dtype=torch.complex64).conj().imag, "planes"),
    "negative as it lies": (lambda: torch._neg_view(torch.randn(9)), "planes"),
    "a number": (lambda: torch.randn(()), "planes"),
    "nothing": (lambda: torch.empty(0, 4), "planes"),
    "bools": (lambda: torch.rand(9, 9) > 0.5, "table"),
    "with a negative zero": (lambda: with_numbers(torch.float32, 1.5, -0.0, 2.5), "sparse"),
    "sparse, with a negative zero": (
        lambda: torch.cat([torch.randn(400), torch.tensor([-0.0]), torch.zeros(9000)]),
        "sparse",
    ),
    "sparse complex128": (
        lambda: with_numbers(torch.complex128, 1j, complex(0, -0.0), complex(-0.0, 0), 3),
        "sparse",
    ),
    "dense complex128": (
        lambda: torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128).repeat(90),
        "planes",
    ),
    "complex64 of two values": (
        lambda: torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).repeat(90),
        "planes",
    ),
    "of 256 values": (lambda: many(256), "table"),
    "of 257 values": (lambda: many(257), "planes"),
    "of 300 values, late": (lambda: many(300, before=4200), "sparse"),
    "of 257 values, late": (lambda: many(257, before=4200).mul(1 - 2**-9), "sparse"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back_bit_for_bit_from_its_smallest_form(name):
    build, form = TENSORS[name]
    tensor = build()
    before = tensor.clone()
    packed, made = there_and_back(tensor)
    assert (made.dtype, made.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(bits(made), bits(tensor))
    assert torch.equal(bits(before), bits(tensor))
    assert packed.form[0] == form
    assert packed.bytes == sum(len(part) for part in packed.parts)


def test_bytes_lie_as_they_are_or_coded_in_planes_whichever_is_less():
    noise = torch.randint(-(2**63), 2**63 - 1, (500,))
    assert pack(noise).bytes == 1 + 8 * 500
    assert pack(torch.randn(500)).bytes < 0.95 * 4 * 500


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_comes_back(dtype):
    for tensor in torch.randn(50, 3).mul(9).to(dtype), torch.eye(40).to(dtype):
        _, made = there_and_back(tensor)
        assert made.dtype == dtype
        assert torch.equal(bits(made), bits(tensor))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per", [PerTensor(), PerAxis(1), PerGroup(7), PerBlock(4, 5)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_come_back_in_the_type_of_their_scales(dtype, per, symmetric):
    weight = torch.randn(12, 20, dtype=torch.float64).to(dtype)
    for few, x in (1, weight), (2, weight), (8, weight), (4, weight[:0]):
        coded = quantize(x, Grid(few, symmetric, per))
        packed, made = there_and_back(coded.dequantize(), coded)
        assert made.shape == x.shape
        assert torch.equal(bits(made), bits(coded.dequantize()))
        assert packed.entropy == pytest.approx(entropy_bits(coded.codes) / 8)
    shared = share(weight, 6, per)
    packed, made = there_and_back(shared.dequantize(), shared)
    assert torch.equal(bits(made), bits(shared.dequantize()))
    assert packed.entropy == pytest.approx(entropy_bits(shared.index) / 8)
    assert packed.form == ["table", *shared.table.shape, packed.form[-1]]


@dataclass(frozen=True)
class Odd(PerTensor):
    """Units that this format does not know."""


@pytest.mark.parametrize(
    ("symmetric", "zero", "match"),
    [
        (True, 1.0, "symmetric, but a zero lies elsewhere"),
        (False, 0.5, "affine, but a zero is no whole number of 0 to 255"),
        (False, 256.0, "affine, but a zero is no whole number of 0 to 255"),
        (False, -1.0, "affine, but a zero is no whole number of 0 to 255"),
        (True, None, r"Odd\(\) has no place in a file: PerTensor, PerAxis"),
    ],
)
def test_codes_that_no_file_holds(symmetric, zero, match):
    grid = Grid(4, symmetric, PerTensor() if zero is not None else Odd())
    coded = quantize(torch.randn(3, 5), grid)
    if zero is not None:
        steps = Steps(coded.steps.scale, torch.full_like(coded.steps.zero, zero))
        coded = replace(coded, steps=steps)
    with pytest.raises(ValueError, match=match):
        pack(coded.dequantize(), coded)


@pytest.mark.parametrize(
    ("dtype", "scales"), [(torch.float64, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str
)
def test_scales_have_the_type_that_files_have(dtype, scales):
    weight, grid = torch.randn(3, 5).to(dtype), Grid(4, False)
    steps = Steps(*(part.to(scales) for part in fit(weight, grid)))
    coded = quantize(weight, grid, steps)
    _, made = there_and_back(coded.dequantize(), coded)
    assert torch.equal(bits(made), bits(coded.dequantize()))
    coded = replace(coded, steps=steps)
    with pytest.raises(ValueError, match=f"scales are {scales}, and of {dtype} files have"):
        pack(coded.dequantize(), coded)


def floats(*numbers):
    return PLAIN + struct.pack(f"<{len(numbers)}f", *numbers)


def stream(*symbols):
    return encode(torch.tensor(symbols, dtype=torch.uint8))


def plane(*symbols):
    return struct.pack("<I", len(stream(*symbols))) + stream(*symbols)


REFUSED = {
    "no form": (["cube"], [b""], "there is no form 'cube'"),
    "negative rows": (["table", -1, 2, ["PerTensor"]], [b"", b""], "table of -1 × 2 fits no"),
    "rows beyond": (["table", 5, 2, ["PerTensor"]], [b"", b""], "table of 5 × 2 fits no"),
    "no values": (["table", 1, 0, ["PerTensor"]], [b"", b""], "table of 1 × 0 fits no"),
    "257 values": (["table", 1, 257, ["PerTensor"]], [b"", b""], "table of 1 × 257 fits no"),
    "symmetric by 1": (["grid", 4, 1, ["PerTensor"]], [], "symmetric or not, not 1"),
    "a code beyond": (
        ["grid", 2, True, ["PerTensor"]],
        [floats(1.0), stream(0, 1, 3)],
        "code lies beyond its grid",
    ),
    "a part too many": (
        ["grid", 2, True, ["PerTensor"]],
        [floats(1.0), b"", stream(0, 1, 2)],
        "2 or 3 parts, not 3",
    ),
    "units by a float": (
        ["table", 1, 1, ["PerGroup", 2.0]],
        [floats(1.0), stream(0, 0, 0)],
        r"units \['PerGroup', 2.0\] are no units",
    ),
    "units by a bool": (
        ["grid", 2, True, ["PerGroup", True]],
        [floats(1.0), stream(0, 0, 0)],
        "are no units",
    ),
    "no levels": (["levels", 0, ["PerTensor"]], [floats(), floats(1.0), stream()], "lies beyond"),
    "257 levels": (
        ["levels", 257, ["PerTensor"]],
        [floats(*[1.0] * 257), floats(1.0), stream(0, 1, 2)],
        "a code lies beyond its 257 levels",
    ),
    "a level beyond": (
        ["levels", 2, ["PerTensor"]],
        [floats(0.0, 1.0), floats(1.0), stream(0, 1, 2)],
        "a code lies beyond its 2 levels",
    ),
    "vectors that do not divide": (
        ["vectors", 1, 1, 2, ["PerTensor"]],
        [floats(1.0, 2.0), stream(0)],
        r"1 vectors of 2 fit no tensor of shape \(3,\)",
    ),
    "no vectors": (["vectors", 1, 0, 3, ["PerTensor"]], [floats(), stream(0)], "0 vectors of 3"),
    "a vector beyond": (
        ["vectors", 1, 1, 3, ["PerTensor"]],
        [floats(1.0, 2.0, 3.0), stream(1)],
        "1 tables of 1 vectors do not fit its places",
    ),
    "a table too many": (
        ["vectors", 2, 1, 3, ["PerTensor"]],
        [floats(*[1.0] * 6), stream(0)],
        "2 tables of 1 vectors do not fit its places",
    ),
    "too few bytes": (["planes"], [floats(1.0)], "3 numbers of 4 bytes do not lie in 5 bytes"),
    "too many bytes": (["planes"], [floats(*[1.0] * 4)], "3 numbers of 4 bytes do not lie in 17"),
    "no such way": (["planes"], [b"\7"], "numbers lie in no way 7"),
    "bytes behind": (
        ["planes"],
        [PLANES + 4 * plane(1, 2, 3) + b"!"],
        "bytes follow the last plane",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_descriptions_of_no_tensor_are_refused(name):
    form, parts, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        unpack(form, parts, torch.float32, THREE)


def test_the_numbers_of_a_table_count_for_the_limit():
    assert in_table(["vectors", 3, 5, 7, ["PerTensor"]]) == 3 * 5 * 7
    assert in_table(["table", 3, 5, ["PerTensor"]]) == 15
    assert in_table(["grid", 3, True, ["PerTensor"]]) == 0
    for rows in -1, 2.0, 1 << 48, True:
        with pytest.raises(ValueError, match="there is no table of"):
            in_table(["table", rows, 5, ["PerTensor"]])


def test_a_bool_is_no_2():
    assert unpack(["planes"], [b"\0\1\0\1"], torch.bool, THREE).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="a bool is 0 or 1"):
        unpack(["planes"], [b"\0\1\0\2"], torch.bool, THREE)


def test_what_the_refused_descriptions_are_near_to():
    """The same parts, put right, are read: so each refusal above has the reason that it names."""
    parts = [floats(0.5), stream(0, 1, 2)]
    made = unpack(["grid", 2, True, ["PerTensor"]], parts, torch.float32, THREE)
    assert made.tolist() == [-0.5, 0, 0.5]
    parts = [floats(3.0, 4.0), stream(0, 0, 0)]
    made = unpack(["table", 2, 1, ["PerGroup", 2]], parts, torch.float32, THREE)
    assert made.tolist() == [3, 3, 4]
    made = unpack(["planes"], [PLANES + 4 * plane(1, 2, 3)], torch.int32, THREE)
    assert made.tolist() == [k * 0x01010101 for k in (1, 2, 3)]
