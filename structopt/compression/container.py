"""A network as one small file: ``save`` says what each tensor takes, ``load`` gives it back.

The format is laid out byte by byte on this room's page of the book.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structopt import checkpoint, files
from structopt.compression.codes import Coded
from structopt.compression.forms import DTYPES, NEWER, Packed, in_table, pack, unpack
from structopt.compression.inputs import attach_, noted, read_hooks
from structopt.compression.report import Report, Row
from structopt.compression.skeleton import bare, stand_in, stored_names

MAGIC = b"\x89SOPT\r\n\x1a"
VERSION = 2  # a file says the lowest that has all its forms: 2 for levels and vectors, else 1
PRELUDE = struct.Struct("<8sHII")  # magic, version, bytes of the header packed and unpacked
DIGEST = 8  # bytes of BLAKE2b at the end
BLOCK = 1 << 20
HEADER_AT_MOST = 1 << 24


def save(model: nn.Module, path: str | Path, codes: Mapping[str, Coded] | None = None) -> Report:
    """Write the model to one file, atomically, each tensor in its smallest form, and weigh it.

    Parameters that ``codes`` names are stored as their codes. Any other tensor is stored as it is,
    without loss: as a table and codes where it has at most 256 distinct numbers, as a mask and the
    rest where zeros make that smaller, else byte by byte. Changed structures are stored as by
    :func:`structopt.checkpoint.save`, and how ``round_inputs`` rounds too. Works on one tensor at
    a time.

    Raises ValueError where a parameter is not what its codes stand for, for names that the model
    has not, and as ``checkpoint.save``; OSError for a disk that is full or read-only.

    >>> from structopt.compression import Grid, put_, quantize_weights
    >>> model = nn.Linear(1000, 100)
    >>> codes = quantize_weights(model, Grid(bits=4))
    >>> path = Path(tempfile.mkdtemp()) / "small.sopt"
    >>> save(put_(model, codes), path, codes).bytes < 401_000 // 7
    True
    >>> torch.equal(load(path, into=nn.Linear(1000, 100)).weight, model.weight)
    True
    """
    codes, parameters = dict(codes or {}), dict(model.named_parameters())
    if missing := [name for name in codes if name not in parameters]:
        raise ValueError(f"there are codes of {missing[0]!r}, which is no parameter of the model")
    notes, names = bare(model)
    rows, listed, dense = [], [], 0
    with tempfile.TemporaryFile() as body:
        for name in names:
            tensor = _tensor(model, name)
            packed = _packed(name, tensor, codes.get(name))
            for part in packed.parts:
                body.write(part)
            kind = str(tensor.dtype).removeprefix("torch.")
            listed.append([name, kind, [*tensor.shape], packed.form, [*map(len, packed.parts)]])
            dense += tensor.numel() * tensor.dtype.itemsize
            row = Row(name, packed.form[0], tensor.numel(), packed.bytes, packed.entropy)
            rows.append(row)
        more = {"inputs": inputs} if (inputs := noted(model)) else {}
        text = json.dumps({**notes, "tensors": listed, **more}, separators=(",", ":")).encode()
        if len(text) > HEADER_AT_MOST:
            raise ValueError(
                f"its structure takes {len(text):,} bytes, of {HEADER_AT_MOST:,} at most"
            )
        header = zlib.compress(text, 9)
        version = VERSION if {row.form for row in rows} & NEWER else 1
        prelude = PRELUDE.pack(MAGIC, version, len(header), len(text))
        files.write_atomically(path, lambda file: _write(file, [prelude, header], body))
    structure = PRELUDE.size + len(header) + DIGEST
    total = structure + sum(row.bytes for row in rows)
    return Report(Path(path), total, dense, structure, tuple(rows))


def load(path: str | Path, into: nn.Module, *, limit: int | None = None) -> nn.Module:
    """Make ``into``, a fresh model of the original class, the network that was saved; return it.

    To the bit, and as :func:`structopt.checkpoint.load` does: structure, ties, ``requires_grad``,
    devices. Reads one tensor at a time, and runs no code of the file.

    ``limit`` bounds the bytes of all tensors in memory, as the file declares them; by default
    twice those of ``into`` and 1 MB, so that a small file cannot fill the memory.

    Raises ValueError for a file that is truncated, corrupt, hostile, of another kind or of a later
    version, and for a network of another class. ``into`` is then as it was.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if limit is None:
        limit = 2 * sum(map(_bytes, [*into.parameters(), *into.buffers()])) + 1_000_000
    with path.open("rb") as file, _complaining(path):
        header = _header(file)
        listed = [_Entry(*entry) for entry in header.pop("tensors")]
        declared = sum(entry.bytes for entry in listed)
        if declared > limit:
            raise ValueError(
                f"it declares tensors of {declared:,} bytes, more than {limit:,}, which is about "
                f"twice this {type(into).__name__}: pass limit={declared} if it is yours"
            )
        if path.stat().st_size != file.tell() + sum(sum(e.parts) for e in listed) + DIGEST:
            raise ValueError("its length is not what its header says")
        hooks = read_hooks(header.pop("inputs", []))
        if unknown := [name for name, _ in hooks if name not in header["structure"]]:
            raise ValueError(f"it rounds the input of {unknown[0]!r}, which it does not have")
        names = [entry.name for entry in listed]
        if sorted(names) != sorted(stored_names(header["structure"])):
            raise ValueError("the tensors that it lists are not those of its structure, each once")
        tensors = {entry.name: entry.read(file) for entry in listed}
    with tempfile.TemporaryDirectory() as folder:
        skeleton = {name: stand_in(tensor) for name, tensor in tensors.items()}
        files.save_tensors(Path(folder) / path.name, skeleton, header)
        try:
            checkpoint.load(Path(folder) / path.name, into)
        except ValueError as error:
            raise ValueError(str(error).replace(folder, str(path.parent))) from error
    for name, tensor in tensors.items():
        place = _tensor(into, name)
        place.data = tensor.to(place.device)
    attach_(into, hooks)
    for module in into.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    return into


class _Entry:
    """What the header says of one tensor, after every complaint that can be made."""

    def __init__(self, name: str, kind: str, shape: list[int], form: list[Any], parts: list[int]):
        self.name, self.dtype, self.form, self.parts = name, DTYPES[kind], form, parts
        if not (isinstance(name, str) and isinstance(form, list) and form):
            raise ValueError(f"its header describes no tensor by {name!r}, {form!r}")
        if not all(type(n) is int and 0 <= n < 1 << 48 for n in [*shape, *parts]) or not parts:
            raise ValueError(f"{name} has no shape {shape} or no parts {parts}")
        self.shape = torch.Size(shape)
        size = math.prod(max(n, 1) for n in shape)  # rows without columns may have scales
        self.bytes = (size + in_table(form)) * self.dtype.itemsize

    def read(self, file: BinaryIO) -> Tensor:
        parts = [file.read(length) for length in self.parts]
        try:
            return unpack(self.form, parts, self.dtype, self.shape)
        except (LookupError, TypeError, ValueError, RuntimeError, struct.error) as error:
            raise ValueError(f"{self.name} does not decode ({error})") from error


def _packed(name: str, tensor: Tensor, coded: Coded | None) -> Packed:
    if coded is not None:
        value = coded.dequantize()
        if value.dtype != tensor.dtype or not torch.equal(value.to(tensor.device), tensor):
            remedy = "write them into the model first: put_(model, codes)"
            raise ValueError(f"{name} is not what its codes stand for: {remedy}")
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}, which has no place in such a file")
    try:
        return pack(tensor, coded)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), key)
    return found


def _bytes(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.numel() * tensor.dtype.itemsize


def _write(file: BinaryIO, start: list[bytes], body: BinaryIO) -> None:
    digest = blake2b(digest_size=DIGEST)
    body.seek(0)
    for block in [*start, *iter(lambda: body.read(BLOCK), b"")]:
        digest.update(block)
        file.write(block)
    file.write(digest.digest())


def _header(file: BinaryIO) -> dict[str, Any]:
    """The header, and the file stands behind it; after the checksum of all was compared."""
    prelude = file.read(PRELUDE.size)
    if not prelude.startswith(MAGIC):
        raise ValueError("it is no file that compression.save wrote")
    if len(prelude) < PRELUDE.size:
        raise ValueError("it ends in its first bytes")
    _, version, packed, whole = PRELUDE.unpack(prelude)
    if not 1 <= version <= VERSION:
        later = "update this package" if version > VERSION else "write it again"
        raise ValueError(f"its format is version {version}, this is version {VERSION}: {later}")
    _compare_digest(file)
    if whole > HEADER_AT_MOST:
        raise ValueError(f"its header declares {whole:,} bytes, of {HEADER_AT_MOST:,} at most")
    inflate = zlib.decompressobj()
    text = inflate.decompress(file.read(packed), whole + 1)
    if len(text) != whole or not inflate.eof or inflate.unused_data:
        raise ValueError("its header is not as long as declared")
    header = json.loads(text)
    if not (isinstance(header, dict) and isinstance(header.get("tensors"), list)):
        raise ValueError("its header lists no tensors")
    return header


def _compare_digest(file: BinaryIO) -> None:
    start = file.tell()
    left = file.seek(0, 2) - DIGEST
    file.seek(0)
    digest = blake2b(digest_size=DIGEST)
    while left > 0 and (block := file.read(min(BLOCK, left))):
        digest.update(block)
        left -= len(block)
    if file.read() != digest.digest():
        raise ValueError("its checksum does not fit: it is truncated or was changed")
    file.seek(start)


@contextmanager
def _complaining(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        AttributeError, LookupError, TypeError, ValueError, RecursionError, zlib.error,
    ) as error:  # fmt: skip
        raise ValueError(f"{path} cannot be loaded: {error}") from error
