"""Files that are whole or not there: atomic writing, and tensors without pickle.

Tensors are stored in the safetensors format: a JSON header, then raw bytes. Reading such a file
runs no code, whoever wrote it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["load_tensors", "save_tensors", "write_atomically"]

Notes = dict[str, Any]
"""Anything that JSON can hold."""


def write_atomically(path: str | Path, writer: Callable[[BinaryIO], object]) -> None:
    """Call ``writer(file)`` on a temporary file beside ``path``, then rename it to ``path``.

    A reader finds the old file or the new one, never a half; when the writer fails, or the disk is
    full, the old file stays and no other is left. Missing folders are made. Raises ``OSError``
    (with ``path`` in it) where the folder cannot be written, and for a folder, device or pipe.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "note.txt"
    >>> write_atomically(path, lambda file: file.write(b"whole"))
    >>> path.read_bytes()
    b'whole'
    """
    path = Path(path).expanduser().resolve()  # a link stays a link, its target is replaced
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(errno.EINVAL, "a device or pipe")  # which a renaming would replace
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        what = "nothing was written, and an older file there is as it was"
        raise OSError(error.errno, f"cannot write ({reason}); {what}", str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or its folder could not be made
            temporary.unlink()
    with contextlib.suppress(OSError):  # a folder that may not be listed; the file is there
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], notes: Notes) -> None:
    """Write named tensors and JSON-able notes to one safetensors file, atomically.

    Dense tensors of any shape, stride and device; those that share memory are stored once each.
    Tensors go to the file one after the other: memory is needed for a copy of one at most, where
    it is not dense or not on the CPU. Raises ``ValueError`` for tensors without data (``meta``),
    layouts that are not dense and types that the format has not (complex128), ``TypeError`` for
    notes that JSON cannot hold, ``OSError`` for a disk that is full or read-only.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
    >>> save_tensors(path, {"w": torch.arange(3)}, {"epoch": 2})
    >>> load_tensors(path)
    ({'w': tensor([0, 1, 2])}, {'epoch': 2})
    """
    text, place = json.dumps(notes), 0
    kinds = {name: _checked(name, tensor) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # none at odd places
    entries: dict[str, Any] = {}
    for name in order:
        end, shape = place + tensors[name].nbytes, [*tensors[name].shape]
        entries[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": [place, end]}
        place = end
    entries["__metadata__"] = {"notes": text, "sha256": _digest(tensors, text)}
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            file.write(_bytes(tensors[name]))

    write_atomically(path, write)


def _checked(name: str, tensor: Tensor) -> str:
    """The tensor's type as the format calls it, after every complaint that can be made."""
    packed = is_traceable_wrapper_subclass(tensor)  # torchao's weights, say
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or packed:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        kind = type(tensor).__name__ if packed else kind
        raise ValueError(f"tensor {name!r} is {kind}: only dense tensors with data are stored")
    if name == "__metadata__":
        raise ValueError(f"{name!r} is what the format calls its notes: give it another name")
    try:
        return _word(tensor.dtype)
    except KeyError as error:  # the format's table of types
        unknown = f"tensor {name!r} is {tensor.dtype}, which safetensors does not know"
        raise ValueError(unknown) from error


@lru_cache
def _word(dtype: torch.dtype) -> str:
    """As the installed safetensors, which has to read it again, writes this type."""
    if dtype == getattr(torch, "float4_e2m1fn_x2", None):
        raise KeyError(dtype)  # stored with another shape than torch's
    data = serialise({"": torch.empty(0, dtype=dtype)})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return str(header[""]["dtype"])


def _bytes(tensor: Tensor) -> memoryview:
    """Its numbers in their order; a copy only where they do not lie so on the CPU."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _digest(tensors: Mapping[str, Tensor], notes: str) -> str:
    """Of names, types, shapes and bytes: the format itself would not notice a flipped bit."""
    digest = hashlib.sha256(notes.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def load_tensors(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], Notes]:
    """Read what :func:`save_tensors` wrote: (tensors, notes), bit for bit, on ``device``.

    Raises ``FileNotFoundError``, ``PermissionError``, and ``ValueError`` for a file that is
    truncated, corrupt or of another format. A safetensors file from elsewhere has empty notes and
    no checksum to compare.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        folder = ": it is a folder, name a file in it" if path.is_dir() else ""
        raise FileNotFoundError(f"there is no file {path}{folder}")
    path.open("rb").close()  # safetensors calls a file that may not be read missing
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # A copy: the file may be replaced later, and must not change tensors in use.
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
        text = metadata.get("notes", "{}")
        notes = json.loads(text)
        if metadata.get("sha256", digest := _digest(tensors, text)) != digest:
            raise ValueError("its checksum does not fit")
    except (SafetensorError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{path} is truncated, corrupt or not a safetensors file ({error}): "
            "delete it and write it again"
        ) from error
    if not isinstance(notes, dict):
        raise ValueError(f"{path}: its notes are {type(notes).__name__}, not a dictionary")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, notes
