"""Joules, where the machine counts them."""

from __future__ import annotations

import functools
import importlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_POWERCAP = Path("/sys/class/powercap")


def energy(function: Callable[[], Any], *, seconds: float = 1.0) -> float | None:
    """Joules of one `function()`: the machine's own counters, over as many calls as fit `seconds`.

    Read are the package counters of the processor (RAPL, under Linux) and the counters of all
    NVIDIA GPUs (NVML). Both count everything that ran meanwhile, idle power too. None where
    neither exists: `energy_source()` says why.

    Example:
        >>> joules = energy(lambda: torch.ones(10).sum(), seconds=0.05)
        >>> joules is None or joules >= 0
        True
    """
    counters = [*_rapl(), *_nvml()]
    if not counters:
        return None
    function()
    before = [read() for read, _ in counters]
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        function()
        calls += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    joules = 0.0
    for (read, span), first in zip(counters, before, strict=True):
        used = read() - first
        joules += used + span if used < 0 else used  # the counter wrapped round
    return joules / calls


def energy_source() -> str:
    """Which counters `energy` reads on this machine, or why there are none, in words.

    >>> "RAPL" in energy_source()
    True
    """
    if not _POWERCAP.is_dir():
        processor = f"no RAPL counter ({_POWERCAP} does not exist: a virtual machine or not Linux)"
    elif not _rapl():
        processor = "no readable RAPL counter (reading it usually needs root)"
    else:
        processor = f"{len(_rapl())} RAPL package counter(s)"
    gpus = _nvml()
    return f"{processor}; {len(gpus)} NVML counter(s)" if gpus else f"{processor}; no NVML counter"


Counter = tuple[Callable[[], float], float]
"""A function that reads joules, and the value at which it starts again from zero."""


def _rapl() -> list[Counter]:
    found: list[Counter] = []
    for zone in sorted(_POWERCAP.glob("*-rapl:*")):
        try:
            if not (zone / "name").read_text().startswith("package"):
                continue  # cores and memory controllers lie inside a package
            span = float((zone / "max_energy_range_uj").read_text()) / 1e6
            path = zone / "energy_uj"
            path.read_text()
        except OSError:
            continue
        found.append((functools.partial(_microjoules, path), span))
    return found


def _nvml() -> list[Counter]:
    if not torch.cuda.is_available():
        return []
    try:
        pynvml = importlib.import_module("pynvml")  # of nvidia-ml-py, if the user has it
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(k) for k in range(count)]
        read = pynvml.nvmlDeviceGetTotalEnergyConsumption
        counters: list[Counter] = [
            (functools.partial(_millijoules, read, gpu), math.inf) for gpu in gpus
        ]
        for count_joules, _ in counters:
            count_joules()
    except Exception:  # no library, no driver, or a GPU older than Volta
        return []
    return counters


def _microjoules(path: Path) -> float:
    return float(path.read_text()) / 1e6


def _millijoules(read: Callable[[Any], float], gpu: Any) -> float:
    return read(gpu) / 1e3
