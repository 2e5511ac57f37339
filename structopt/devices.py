"""Which device to use, in which number format, and how to time work on it."""

from __future__ import annotations

import platform
import random
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

__all__ = [
    "autocast_dtype",
    "best_device",
    "clock",
    "device_name",
    "needs_plain_order",
    "seed_everything",
    "synchronize",
]

Device = torch.device | str


def best_device() -> torch.device:
    """The fastest device of this machine: CUDA (or ROCm), else Apple's MPS, else the CPU.

    >>> best_device().type in {"cuda", "mps", "cpu"}
    True
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def autocast_dtype(device: Device) -> torch.dtype | None:
    """The 16-bit type that makes training faster on ``device``, or None where none does.

    bf16 keeps the exponent range of fp32, so it needs no loss scaling. It is chosen wherever the
    device multiplies it faster than fp32: NVIDIA's GPUs from compute capability 8.0, AMD's GPUs,
    CPUs with amx, AMD's CPUs with avx512_bf16. fp16 is the choice of older GPUs with tensor cores
    and of MPS; its small range needs a scaled loss (Micikevicius et al., 2018, "Mixed precision
    training").

    >>> autocast_dtype("meta") is None
    True
    """
    device = torch.device(device)
    if device.type == "cuda":
        if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else None
    if device.type == "mps":
        return torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_multiplies_bf16() else None


def _cpu_multiplies_bf16() -> bool:
    # AMX, and avx512_bf16 as AMD builds it, are at least twice as fast as fp32. Intel's avx512_bf16
    # where AMX is missing (or hidden by a hypervisor) takes nearly twice the time of fp32, and
    # emulation, of which `torch.ops.mkldnn._is_mkldnn_bf16_supported` is also true, takes longer
    # still. Not every release of torch has both of these functions.
    def has(name: str) -> bool:
        return bool(getattr(torch.cpu, name, bool)())

    if has("_is_amx_tile_supported"):
        return True
    return has("_is_avx512_bf16_supported") and "AMD" in _processor_name()


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch (on every device).

    ``seed`` lies in 0 ... 2**32 - 1, NumPy's range; a ValueError says so.

    >>> seed_everything(0); first = torch.rand(3)
    >>> seed_everything(0); torch.equal(first, torch.rand(3))
    True
    """
    whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r}: give a whole number from 0 to 2**32 - 1")
    seed = int(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries that a reader brings along still draw from it)
    torch.manual_seed(seed)


def synchronize(device: Device) -> None:
    """Wait until ``device`` has done all work given to it. Work on a CPU is done when it returns.

    >>> synchronize("cpu")
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def clock(device: Device) -> float:
    """Seconds of a steady clock, read after ``device`` has finished its work.

    Without the wait, a GPU's timing is that of the launch, not of the work.

    >>> start = clock("cpu")
    >>> clock("cpu") >= start
    True
    """
    synchronize(device)
    return time.perf_counter()


def device_name(device: Device) -> str:
    """The maker's name of ``device``, to stand beside every timing.

    >>> device_name("meta")
    'meta'
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor_name() if device.type in {"cpu", "mps"} else str(device)


def needs_plain_order(model: nn.Module) -> bool:
    """Whether a CPU must not differentiate ``model`` in channels-last order.

    oneDNN (uxlfoundation/oneDNN#6035) writes past its memory where it finds the gradient of a
    1×1 convolution with a stride and fewer input channels than fit into a register: 8 with
    AVX2, 16 with AVX-512. The process dies, or gradients are wrong. Whoever narrows weights
    inside ``forward`` says so by an attribute ``plain_order``.

    >>> narrow, wide = nn.Conv2d(8, 32, 1, stride=2), nn.Conv2d(16, 32, 1, stride=2)
    >>> needs_plain_order(narrow), needs_plain_order(wide)
    (True, False)
    """
    return any(
        getattr(m, "plain_order", False)
        or (
            isinstance(m, nn.Conv2d)
            and m.kernel_size == (1, 1)
            and m.stride != (1, 1)
            and m.in_channels // m.groups < 16
        )
        for m in model.modules()
    )


@lru_cache
def _processor_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    elif sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.stdout.strip():
            return answer.stdout.strip()
    return platform.processor() or platform.machine() or "unknown processor"
