"""Messages over a socket: a length, a version and a checksum before the bytes; no pickle.

A message is 18 bytes of header, all little-endian, then its payload::

    4 bytes "SPLT" · version 1 (1 byte) · kind (1 byte) · length (8 bytes) · CRC-32 (4 bytes)

where kind 0 is a tensor and kind 1 an error in words, UTF-8.
"""

from __future__ import annotations

import socket
import struct
import time
import zlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

HEADER = struct.Struct("<4sBBQI")
MAGIC, VERSION, TENSOR, ERROR = b"SPLT", 1, 0, 1
_TYPES = {  # that safetensors both writes and reads
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
}  # fmt: skip


def pack(value: Tensor) -> bytes:
    """One dense tensor as bytes, in the safetensors format. ValueError for what is none.

    >>> import torch
    >>> unpack(pack(torch.tensor([1.5, 2.5])))
    tensor([1.5000, 2.5000])
    """
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    if not dense or value.dtype not in _TYPES or value.is_meta:
        raise ValueError(f"a message is one dense tensor, not {_told(value)}")
    plain = value.detach().resolve_conj().resolve_neg()  # safetensors reads what lies in memory
    return save({"value": plain.cpu().contiguous()})


def _told(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    kind = "nested" if value.is_nested else value.layout
    return f"one of {value.dtype}, {kind}, on {value.device}"


def unpack(data: bytes) -> Tensor:
    """The tensor of :func:`pack`, on the CPU. ValueError where the bytes hold no such thing."""
    try:
        return load(data)["value"]
    except (SafetensorError, KeyError, ValueError) as problem:
        raise ValueError(f"{len(data)} bytes hold no tensor: {problem}") from problem


def send(connection: socket.socket, kind: int, payload: bytes) -> None:
    """Send one message whole, or raise an OSError."""
    header = HEADER.pack(MAGIC, VERSION, kind, len(payload), zlib.crc32(payload))
    connection.sendall(header + payload)


def receive(connection: socket.socket, limit: int, timeout: float) -> tuple[int, bytes] | None:
    """The next message's kind and payload, within `timeout` seconds; None where the peer has left.

    Raises ConnectionError for what is no message, or not all of one, TimeoutError for a slow peer.
    No more than `limit` bytes are ever set aside, whatever the header claims.
    """
    header = _exactly(connection, HEADER.size, time.monotonic() + timeout, may_end=True)
    if not header:
        return None
    end = time.monotonic() + timeout  # waiting for a message is not reading it
    magic, version, kind, length, checksum = HEADER.unpack(header)
    if magic != MAGIC:
        raise ConnectionError(f"the peer does not speak this language: it begins with {magic!r}")
    if version != VERSION or kind not in (TENSOR, ERROR):
        raise ConnectionError(
            f"a message of version {version}, kind {kind}: this side reads version {VERSION}; "
            "update the older side"
        )
    if length > limit:
        raise ConnectionError(f"a message of {length:,} bytes: at most limit={limit:,} are read")
    payload = _exactly(connection, length, end)
    if zlib.crc32(payload) != checksum:
        raise ConnectionError(
            f"a message of {length:,} bytes arrived damaged: its checksum differs"
        )
    return kind, payload


def _exactly(connection: socket.socket, size: int, end: float, *, may_end: bool = False) -> bytes:
    parts, missing = [], size
    while missing:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{missing:,} of {size:,} bytes have not come in time")
        connection.settimeout(left)
        try:
            part = connection.recv(min(missing, 1 << 20))
        except TimeoutError:
            continue
        if not part:
            if may_end and missing == size:
                return b""
            raise ConnectionError(f"the peer closed with {missing:,} of {size:,} bytes missing")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
