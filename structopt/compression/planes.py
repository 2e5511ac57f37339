"""Numbers as bytes: as they lie in memory, or in planes, whichever is smaller."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from structopt.compression.coding import decode, encode

PLAIN, PLANES = 0, 1


def write_numbers(tensor: Tensor) -> bytes:
    """Bytes as they are; or all lowest bytes, then all second ones and so on, each plane coded.

    The highest bytes of weights, sign and exponent, are much alike.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().reshape(-1, flat.dtype.itemsize)
    plain = bytes([PLAIN]) + data.tobytes()
    if len(data) < 8:
        return plain
    streams = [encode(torch.from_numpy(np.ascontiguousarray(plane))) for plane in data.T]
    planes = bytes([PLANES]) + b"".join(struct.pack("<I", len(s)) + s for s in streams)
    return min(plain, planes, key=len)


def read_numbers(data: bytes, dtype: torch.dtype, number: int) -> Tensor:
    size = dtype.itemsize
    if data[0] == PLAIN:
        if len(data) != 1 + number * size:
            raise ValueError(f"{number} numbers of {size} bytes do not lie in {len(data)} bytes")
        made = np.frombuffer(data, dtype=np.uint8, offset=1).copy()
    elif data[0] == PLANES:
        made, place = np.empty((number, size), dtype=np.uint8), 1
        for plane in range(size):
            (length,) = struct.unpack_from("<I", data, place)
            stream = data[place + 4 : place + 4 + length]
            made[:, plane] = decode(stream, (number,)).numpy()
            place += 4 + length
        if place != len(data):
            raise ValueError("bytes follow the last plane")
    else:
        raise ValueError(f"numbers lie in no way {data[0]}")
    whole = torch.from_numpy(made.reshape(-1))
    if dtype == torch.bool:
        if bool((whole > 1).any()):
            raise ValueError("a bool is 0 or 1")
        return whole.bool()
    return whole.view(dtype)
