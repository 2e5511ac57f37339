"""What the benchmarks share: where they ran, on which clock, and one JSON file per device."""

import argparse
import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from structopt import devices, files

RESULTS = Path(__file__).parent / "results"


def arguments(text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--quick", action="store_true", help="see that it runs; keeps no figures")
    parser.add_argument("--device", default=str(devices.best_device()))
    return parser


def machine(device: torch.device) -> dict[str, Any]:
    """Where figures come from, to stand beside them."""
    dtype = devices.autocast_dtype(device)
    return {
        "device": devices.device_name(device),
        "kind": device.type,
        "autocast": "fp32, no autocast" if dtype is None else str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def clock(device: torch.device) -> tuple[str, Callable[[], float]]:
    """Seconds, and what they are.

    One thread on a CPU is timed by the time that it had the processor, so that other work on the
    machine counts less; a GPU by the wall clock, after it has finished.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "processor time of one thread", time.process_time
    return "wall clock, synchronised", lambda: devices.clock(device)


def interleaved(
    loops: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each loop in each round. Rounds take turns at who is first; one warms up."""
    now = clock(device)[1]
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for turn in range(rounds + 1):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            start = now()
            loops[name]()
            if turn:
                seconds[name].append(now() - start)
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return {
        "median": round(middle.item(), 4),
        "quartiles": [round(q.item(), 4) for q in (low, high)],
    }


def mean_and_spread(scores: Sequence[float]) -> dict[str, float]:
    """Over seeds; a single one has no spread."""
    spread = torch.tensor(scores).std().item() if len(scores) > 1 else 0.0
    return {
        "mean": round(sum(scores) / len(scores), 2),
        "standard deviation": round(spread, 2),
    }


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Of the same rounds, so that a slow moment of the machine is in both."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def keep(name: str, result: dict[str, Any], quick: bool) -> None:
    """Write results/NAME-DEVICE.json, whole or not at all; only print it after a quick run."""
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    if quick:
        sys.stdout.write(text)
    else:
        path = _path(name, torch.device(result["machine"]["kind"]))
        files.write_atomically(path, lambda file: file.write(text.encode()))
        sys.stdout.write(f"written to {path}\n")


def kept(name: str, device: torch.device) -> dict[str, Any]:
    """What :func:`keep` wrote on this device before, to add to; empty where there is none."""
    path = _path(name, device)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _path(name: str, device: torch.device) -> Path:
    """Named after the device; processors of one name may differ in what they compute in."""
    dtype = devices.autocast_dtype(device) if device.type == "cpu" else None
    full = devices.device_name(device) + str(dtype or "").removeprefix("torch")
    return RESULTS / f"{name}-{re.sub(r'[^a-z0-9]+', '-', full.lower()).strip('-')}.json"
