"""Which kernels are fastest, and does `compression.convert` find them?

Networks with random weights read random numbers: a perceptron 1024-4096-1024, a transformer layer
of width 384 over 128 tokens, ResNet-18 on pictures of 112×112; one thread. Every route is built
by itself, and so is the choice of `convert`, which sees all routes; then all take turns in one
run with eager fp32. Routes for linear layers alone are not tried on ResNet-18. Static steps come
from other numbers than those that are timed and that give the relative error. Each workload is
written as soon as it is there (``--workload NAME`` for one).
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, clock, interleaved, keep, kept, machine, ratios, summary
from torch import Tensor, nn
from torchvision import models

from structopt import networks
from structopt.compression import Float, ONNXRuntime, convert, routes_on
from structopt.compression.convert_onnx import exported_once
from structopt.compression.convert_trial import Tried, attempt, without_simulation

ROUNDS, LEAST = 20, 0.02  # a round repeats a call until it has run for so many seconds
WAIT = 300.0  # seconds that a route may take to be built


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))


def layer() -> nn.Module:
    return networks.EncoderLayer(384, 6, 1536)


# name: network, shape of one example, batch, largest relative error
WORKLOADS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float]] = {
    "MLP 1024-4096-1024, batch 1": (perceptron, (1024,), 1, 0.03),
    "MLP 1024-4096-1024, batch 32": (perceptron, (1024,), 32, 0.03),
    "MLP 1024-4096-1024, batch 256": (perceptron, (1024,), 256, 0.03),
    "transformer layer, width 384, 128 tokens": (layer, (128, 384), 1, 0.03),
    "ResNet-18, 112×112, batch 1": (models.resnet18, (3, 112, 112), 1, 0.05),
    "ResNet-18, 112×112, batch 16": (models.resnet18, (3, 112, 112), 16, 0.05),
}


def repeated(model: nn.Module, x: Tensor, seconds: float) -> Callable[[], object]:
    count = max(1, math.ceil(LEAST / seconds))

    def run() -> None:
        for _ in range(count):
            model(x)

    run.count = count  # type: ignore[attr-defined]
    return run


def measured(name: str, device: torch.device, quick: bool, compiled: bool) -> dict[str, Any]:
    make, shape, batch, limit = WORKLOADS[name]
    torch.manual_seed(0)
    all_linear = make is not models.resnet18  # other routes would convert its last layer alone
    network = make().eval().to(device)
    x = torch.randn(batch, *shape, device=device)
    calibration = [torch.randn(16, *shape, device=device) for _ in range(4)]
    with torch.no_grad():
        wanted = network(x)
    routes = [r for r in routes_on(device) if all_linear or isinstance(r, Float | ONNXRuntime)]
    routes = [r for r in routes if compiled or not getattr(r, "compiled", False)]
    chosen = convert(network, x, routes, calibration=calibration, error=limit, seconds=WAIT)
    plain = without_simulation(network)
    tried: dict[str, Tried] = {}
    rows: dict[str, dict[str, Any]] = {}
    with exported_once():
        for route in [Float(), *routes]:
            begun = time.perf_counter()
            missing = route.missing(device)
            found = missing or attempt(route, plain, x, calibration, wanted, WAIT)
            print(f"{name}: {route} {time.perf_counter() - begun:.0f} s", flush=True)
            if isinstance(found, str):
                rows[str(route)] = {"rejected": found}
            else:
                tried[str(route)] = found
    loops = {key: repeated(t.model, x, t.seconds) for key, t in tried.items()}
    loops["convert"] = repeated(chosen.model, x, tried[str(chosen.route)].seconds)
    rounds = 2 if quick else ROUNDS if tried["Float(dtype=torch.float32)"].seconds < 0.3 else 8
    seconds = interleaved(loops, rounds, device)
    each = {key: [s / loops[key].count for s in values] for key, values in seconds.items()}  # type: ignore[attr-defined]
    eager = each["Float(dtype=torch.float32)"]
    for key, t in tried.items():
        rows[key] = {
            "times as fast": ratios(eager, each[key]),
            "relative error": round(t.error, 5),
            "kernels": t.model.runs_on,
        }
    within = [key for key, t in tried.items() if t.error <= limit]
    best = max(within, key=lambda key: rows[key]["times as fast"]["median"])
    return {
        "eager milliseconds": summary([1000 * s for s in eager]),
        "error limit": limit,
        "routes": rows,
        "best": best,
        "chosen": str(chosen.route),
        "chosen, times as fast": ratios(eager, each["convert"]),
        "chosen, of the best": ratios(each[best], each["convert"]),
        "rounds": rounds,
        "torch.compile": compiled,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--workload", choices=list(WORKLOADS), help="only this one")
    parser.add_argument("--eager", action="store_true", help="without torch.compile: minutes less")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    result = {} if options.quick else kept("convert", device)
    result |= {"benchmark": "convert", "machine": machine(device), "clock": clock(device)[0]}
    for name in WORKLOADS:
        if options.workload in {None, name}:
            found = measured(name, device, options.quick, not (options.eager or options.quick))
            result.setdefault("workloads", {})[name] = found
            keep("convert", result, options.quick)
            torch.compiler.reset()
        if options.quick and options.workload is None:
            break


if __name__ == "__main__":
    main()
