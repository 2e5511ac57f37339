"""What finding and editing coupled channels costs: against Torch-Pruning, in length, in memory.

    python -m zoo.speed [--quick]
    python -m zoo.speed resnet50 …       the comparison for these alone, measured anew
    python -m zoo.speed --every          every network that both libraries get right, fewer rounds

Processor time of one thread, both libraries taking turns in one run, each beginning without what
the other left to collect. Torch-Pruning works in place and compares nothing; its time holds no copy
of the network. This package's holds the copy and the comparison of the result with the masked
network in double precision, which is timed apart too. The result goes to
`tests/benchmarks/results/zoo-speed.json`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmarks.common import machine, ratios, summary
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer
from zoo.networks import FAMILIES, image

from structopt import files
from structopt.channels import channel_groups, judging, take, verify

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "zoo-speed.json"
VERSUS = (
    *("resnet50", "densenet121", "densenet201", "vgg16_bn", "vit_b_16", "convnext_tiny"),
    *("efficientnet_b0", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "mnasnet0_5"),
    "lraspp_mobilenet_v3_large",
)
LIMIT = 9.25  # seconds that both took in the zoo's record: dearer networks are left out of `every`
LIBRARIES = ("structopt", "torch-pruning")
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
DEPTHS = (6, 12, 24, 48)


class Count(TorchDispatchMode):
    """How many operators a forward pass calls."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


def operators(model: nn.Module, example: torch.Tensor) -> int:
    with torch.no_grad(), Count() as count:
        model(example)
    return count.operators


def ours(model: nn.Module, example: Any) -> tuple[float, float, float]:
    checked = 0.0

    def timed(check: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal checked
            start = time.process_time()
            try:
                return check(*args, **options)
            finally:
                checked += time.process_time() - start

        return run

    with (
        mock.patch.object(verify, "reference", timed(verify.reference)),
        mock.patch.object(verify, "outputs", timed(verify.outputs)),
        mock.patch.object(judging.ByValue, "__init__", timed(judging.ByValue.__init__)),
        mock.patch.object(judging, "lively", timed(judging.lively)),
    ):
        start = time.process_time()
        channels = channel_groups(model, example)
        found = time.process_time() - start
        take(model, {group: range(0, group.size, 2) for group in channels})
        taken = time.process_time() - start
    return found, taken, taken - checked


def theirs(model: nn.Module, example: Any) -> tuple[float, float, float]:
    import torch_pruning as tp

    model = copy.deepcopy(model)
    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    start = time.process_time()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=last,
        num_heads=heads,
        in_channel_groups={},
        out_channel_groups={},  # its defaults are shared between pruners
    )
    found = time.process_time() - start
    pruner.step()
    taken = time.process_time() - start
    return found, taken, taken


def named(name: str, rounds: int) -> dict[str, Any]:
    options: dict[str, Any] = {"image_size": 64} if name.startswith("vit") else {}
    options |= {"weights_backbone": None} if name.startswith("lraspp") else {}
    model, example = models.get_model(name, **options).eval(), image(64)
    if rounds > 1 and not name.startswith("densenet"):  # where Torch-Pruning takes a minute
        rounds *= 4
    return versus(model, example, rounds)


def every(rounds: int) -> dict[str, Any]:
    """Networks of torchvision and timm of which the zoo's record says that both get them right."""
    networks = json.loads(RESULT.with_name("zoo.json").read_text())["networks"]
    found: dict[str, Any] = {}
    for row in networks:
        both = [row.get(library, {}) for library in LIBRARIES]
        right = all(one.get("outcome") in ("exact", "norms") for one in both)
        if row["family"] == "transformers" or not right or both[1]["configured"]:
            continue
        if both[0]["all_seconds"] + both[1]["seconds"] > LIMIT:
            continue
        build, example = FAMILIES[row["family"]][1](row["name"])
        try:
            taken = versus(build().eval(), example, rounds)
        except Exception as problem:  # weights are others than in the record
            taken = {"fails": f"{type(problem).__name__}: {problem}"[:200]}
        name = f"{row['family']}: {row['name']}"  # some names are in both families
        found[name] = {
            "family": row["family"],
            "parameters": both[0]["parameters"],
            "left": [one["left"] for one in both],
            **{k: v for k, v in taken.items() if k not in LIBRARIES},
        }
        sys.stdout.write(f"{name}: {json.dumps(found[name])}\n")
        sys.stdout.flush()
    return found


def versus(model: nn.Module, example: Any, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[tuple[float, float, float]]] = {library: [] for library in LIBRARIES}
    both: list[tuple[str, Callable[..., tuple[float, float, float]]]]
    both = [("structopt", ours), ("torch-pruning", theirs)]
    for turn in range(rounds + 1):
        for library, measure in both if turn % 2 else reversed(both):
            gc.collect()
            taken = measure(model, example)
            if turn:  # the first warms up
                seconds[library].append(taken)
    found: dict[str, Any] = {
        library: {
            "discovery": summary([row[0] for row in taken]),
            "discovery and removal": summary([row[1] for row in taken]),
            "discovery and removal, unchecked": summary([row[2] for row in taken]),
        }
        for library, taken in seconds.items()
    }
    removal = "discovery and removal"
    for place, what in enumerate(("discovery", removal, f"{removal}, unchecked")):
        pair = [[row[place] for row in taken] for taken in seconds.values()]
        found[f"times as fast, {what}"] = ratios(pair[1], pair[0])
    return found


def lengths(rounds: int) -> dict[str, Any]:
    """Discovery in networks of two families that grow in depth, all of them in turn."""
    found = {name: (models.get_model(name), image(64)) for name in RESNETS}
    found |= {f"ViT, {depth} blocks": (vit(depth), image(32)) for depth in DEPTHS}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 1):
        for name, (model, example) in found.items():
            start = time.process_time()
            channel_groups(model.eval(), example)
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - start)
    counts = {name: operators(*both) for name, both in found.items()}
    return {
        name: {
            "operators": counts[name],
            "seconds": summary(taken),
            "milliseconds an operator": summary([1e3 * s / counts[name] for s in taken]),
        }
        for name, taken in seconds.items()
    }


def vit(depth: int) -> nn.Module:
    return VisionTransformer(32, 8, depth, 6, 192, 384)


def apart(task: Callable[[], Any]) -> dict[str, Any]:
    """What a task gives, its seconds, and how much the memory of its process grew at the most."""
    ours_, its = multiprocessing.Pipe()

    def child() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        said = task()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        its.send(
            {
                "seconds": round(time.process_time() - start, 2),
                "grew by MB": round((after - before) * 1024 / 1e6, 1),
                "process MB": round(after * 1024 / 1e6),
                "said": said,
            }
        )

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    its.close()
    found: dict[str, Any] = ours_.recv()
    process.join()
    return found


def memory(name: str) -> dict[str, Any]:
    model, example = models.get_model(name).eval(), image(224, batch=2)

    def forward() -> None:
        with torch.no_grad():
            model(example)

    def discovery() -> None:
        channel_groups(model, example)

    one, found = apart(forward), apart(discovery)
    return {
        "weights MB": round(sum(p.nbytes for p in model.parameters()) / 1e6, 1),
        "forward pass MB": one["grew by MB"],
        "discovery MB": found["grew by MB"],
    }


def llama() -> dict[str, Any]:
    """A transformer of seven billion parameters that has shapes and no values."""
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(use_cache=False))
        words = torch.zeros(1, 8, dtype=torch.long)
    channels = channel_groups(model, {"input_ids": words})
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": len(channels),
        "free": round(channels.freedom(), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What coupled channels cost to find and to edit.")
    parser.add_argument("--quick", action="store_true", help="one round; keeps no figures")
    parser.add_argument("--every", action="store_true", help="compare all that both get right")
    parser.add_argument("names", nargs="*", help="compare these alone, anew")
    options = parser.parse_args()
    rounds = 1 if options.quick else 3
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parts: dict[str, Callable[[], Any]] = {
        "seven billion parameters on meta": lambda: apart(llama),
        "versus": lambda: {name: named(name, rounds) for name in VERSUS},
        "length": lambda: lengths(5 * rounds),
        "every": lambda: every(rounds),
        "memory": lambda: {name: memory(name) for name in ("resnet50", "densenet121", "vit_b_16")},
    }
    result: dict[str, Any] = {
        "benchmark": "zoo-speed",
        "machine": machine(torch.device("cpu")),
        "clock": "processor time of one thread",
    }
    if options.names or options.every:
        before = json.loads(RESULT.read_text())
        if before["machine"]["device"] != result["machine"]["device"]:
            parser.error(f"the other figures are of {before['machine']['device']}")
        anew = {"versus": lambda: before["versus"] | {n: named(n, rounds) for n in options.names}}
        parts, result = {"every": parts["every"]} if options.every else anew, before
    for name, part in parts.items():  # written as they come
        result[name] = part()
        text = json.dumps(result, indent=1) + "\n"
        sys.stdout.write(f"{name}: {json.dumps(result[name])}\n")
        sys.stdout.flush()
        if rounds > 1:
            _keep(text)


def _keep(text: str) -> None:
    files.write_atomically(RESULT, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
