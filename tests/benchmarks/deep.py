"""Deep compression on the full Fashion-MNIST: how many bytes for how many right answers.

LeNet-300-100 and LeNet-5 (20-50-500), each by two routes: pruned gradually, its weights shared
among a few values and coded; or trained with a price on each bit. A convolutional network teaches
all of them, on each training image and its mirror image.

Each network begins from the dense one of its seed, which learned from the labels; the dense
network that it is compared with learns on from the teacher for as long. Each is written to a
file, loaded into a fresh process, and judged there. 5,000 training images are held out for
choosing; the test images are seen by no choice. Rows are kept in _build/deep as they come: a run
that was cut off goes on where it was.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import arguments, keep, machine, mean_and_spread
from torch import nn

from structopt import (
    checkpoint,
    compression,
    data,
    descent,
    distillation,
    networks,
    pruning,
    training,
)
from structopt.compression import MSE, Grid

FOLDER = Path("_build/deep")
SEEDS, HELD_OUT, BATCH = (0, 1, 2), 5000, 512
LABELS = training.supervised()
NETWORKS = {"LeNet300": networks.LeNet300, "LeNet5": networks.LeNet5}
FIRST = {"LeNet300": 4, "LeNet5": 2}  # passes over the images and their mirror images
THEN = {"LeNet300": 8, "LeNet5": 2}
PRICES = {"LeNet300": (8.0, 4.0, 16.0), "LeNet5": (8.0, 16.0, 4.0)}
SPARSITIES = {"LeNet300": (0.97, 0.98, 0.95), "LeNet5": (0.97, 0.98, 0.95)}
VALUES = 8
ROUTES = {
    "dense, as long": "dense_as_long",
    "price on bits": "priced",
    "pruned, shared": "pruned",
}
JUDGE = """
import json, sys, torch
from structopt import compression, data, networks, training
train, test = data.fashion_mnist(full=True)
sets = {"validation": train.split(int(sys.argv[3]))[1], "test": test}
model = compression.load(sys.argv[2], getattr(networks, sys.argv[1])())
scores = {k: 100 * training.evaluate(model, v, device="cpu") for k, v in sets.items()}
print(json.dumps({k: round(score, 2) for k, score in scores.items()}))
"""


def teacher() -> nn.Module:
    """Three convolutions and two linear layers."""

    def block(read: int, made: int) -> list[nn.Module]:
        conv = nn.Conv2d(read, made, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(made), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(128, 10),
    )  # fmt: skip


class Bench:
    """The images, what the teacher says of them, and the rows so far."""

    def __init__(self, quick: bool) -> None:
        self.quick, self.folder = quick, FOLDER / ("quick" if quick else "")
        self.folder.mkdir(parents=True, exist_ok=True)
        train, _ = data.fashion_mnist(full=True)
        fit, _ = train.split(HELD_OUT)
        fit = fit[:1000] if quick else fit
        both = torch.cat([fit.inputs, fit.inputs.flip(-1)])
        self.fitted = replace(fit, inputs=both, targets=fit.targets.repeat(2))

    @cached_property
    def lessons(self) -> distillation.Cached:
        return distillation.cache_outputs(self.taught(), self.fitted, self.folder / "teacher-says")

    @cached_property
    def numbered(self) -> data.Examples:
        return self.lessons.number(self.fitted)

    @cached_property
    def objective(self) -> training.Objective:
        return distillation.from_logits(self.lessons, temperature=2.0, weight=0.7, label_weight=0.3)

    def taught(self) -> nn.Module:
        """The teacher, trained once for all seeds."""
        torch.manual_seed(0)
        model, path = teacher(), self.folder / "teacher"
        if path.exists():
            return checkpoint.load(path, model)
        fit = self.fitted[: len(self.fitted) // 2]
        batches = data.batches(fit, 256, seed=0, augment=[data.Flip()])
        training.train(
            model, batches, LABELS,
            descent.fused_adamw(model, 0.003, weight_decay=0.02),
            epochs=1 if self.quick else 10, device="cpu", schedule=descent.one_cycle(),
        )  # fmt: skip
        checkpoint.save(model, path)
        return model

    def fit(self, model: nn.Module, seed: int, epochs: int, lr: float, **options: Any) -> None:
        decay, objective = options.pop("decay", 0.01), options.pop("objective", None)
        examples = self.fitted if objective is LABELS else self.numbered
        training.train(
            model, data.batches(examples, BATCH, seed=seed), objective or self.objective,
            descent.fused_adamw(model, lr, weight_decay=decay),
            epochs=1 if self.quick else epochs, device="cpu", progress=False,
            schedule=descent.one_cycle(0.15), **options,
        )  # fmt: skip

    def dense(self, name: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model, path = NETWORKS[name](), self.folder / f"{name}-{seed}"
        if path.exists():
            return checkpoint.load(path, model)
        self.fit(model, seed, FIRST[name], 0.003, objective=LABELS)
        checkpoint.save(model, path)
        return model

    def dense_as_long(self, name: str, seed: int, _: float) -> tuple[nn.Module, Any]:
        model = self.dense(name, seed)
        self.fit(model, seed + 100, THEN[name], 0.003)
        return model, {}

    def priced(self, name: str, seed: int, price: float) -> tuple[nn.Module, Any]:
        model = self.dense(name, seed)
        rated = compression.prepare_rate(model, [key for key, _ in model.named_parameters()])
        objective = compression.RatePenalty(self.objective, price)
        self.fit(rated, seed + 100, THEN[name], 0.003, objective=objective, decay=0.0)
        return rated.finish()

    def pruned(self, name: str, seed: int, sparsity: float) -> tuple[nn.Module, Any]:
        model, half = self.dense(name, seed), THEN[name] // 2
        steps = -(-len(self.fitted) // BATCH) * half
        schedule = pruning.Gradual(sparsity, 1, max(2, int(0.6 * steps)), every=20)
        prune = pruning.PruneWhileTraining(schedule, scope=pruning.Global(floor=0.02))
        self.fit(model, seed + 100, half, 0.003, after_step=prune)
        tied = compression.tie(compression.share_weights(model, VALUES))
        tied(model)
        self.fit(model, seed + 200, THEN[name] - half, 0.0005, after_step=tied)
        biases = [key for key, p in model.named_parameters() if p.ndim == 1]
        codes = compression.quantize_weights(model, Grid(6, fit=MSE()), biases) | tied.codes
        return compression.put_(model, codes), codes

    def row(self, name: str, seed: int, route: str, setting: float) -> None:
        """Train, write, judge in a fresh process, and note; nothing where it is noted already."""
        key = {"network": name, "route": route, "setting": setting, "seed": seed}
        if any(key.items() <= row.items() for row in noted(self.folder)):
            return
        model, codes = getattr(self, ROUTES[route])(name, seed, setting)
        path = self.folder / f"{name}-{ROUTES[route]}-{setting}-{seed}.sopt"
        size = compression.save(model, path, codes).bytes
        command = [sys.executable, "-c", JUDGE, name, str(path), str(HELD_OUT)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = key | {"bytes": size} | json.loads(done.stdout.splitlines()[-1])
        with (self.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def noted(folder: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    path = folder / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]], dense: int) -> list[dict[str, Any]]:
    """Means and spreads over the seeds, and what is lost against the dense network as long."""
    whole = {row["seed"]: row for row in rows if row["route"] == "dense, as long"}
    made = []
    for route, setting in dict.fromkeys((row["route"], row["setting"]) for row in rows):
        cells = [r for r in rows if (r["route"], r["setting"]) == (route, setting)]
        line = {"route": route, "setting": setting, "seeds": len(cells)}
        line["bytes"] = mean_and_spread([float(c["bytes"]) for c in cells])
        line["times smaller"] = round(dense / statistics.fmean(c["bytes"] for c in cells), 1)
        for kind in ("validation", "test"):
            line[f"{kind} in %"] = mean_and_spread([c[kind] for c in cells])
            lost = [whole[c["seed"]][kind] - c[kind] for c in cells if c["seed"] in whole]
            if lost:
                line[f"{kind}, points lost"] = mean_and_spread(lost)
        made.append(line)
    return made


def written(quick: bool) -> None:
    """The tables of all rows that there are."""
    folder, result = FOLDER / ("quick" if quick else ""), {}
    for name, build in NETWORKS.items():
        if rows := [row for row in noted(folder) if row["network"] == name]:
            dense = 4 * sum(p.numel() for p in build().parameters())
            epochs = {"dense": 2 * FIRST[name], "then": 2 * THEN[name]}
            result[name] = {"epochs": epochs, "table": table(rows, dense), "rows": rows}
    budget = {"training images": 60_000 - HELD_OUT, "batch": BATCH, "values": VALUES}
    device = torch.device("cpu")
    made = {"benchmark": "deep", "machine": machine(device), "budget": budget, "results": result}
    keep("deep", made, quick)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--network", choices=list(NETWORKS), action="append")
    parser.add_argument("--seed", type=int, action="append", help="only these; all by default")
    parser.add_argument("--table", action="store_true", help="train nothing: from the rows so far")
    options = parser.parse_args()
    if not options.table:
        bench = Bench(options.quick)
        for name in options.network or NETWORKS:
            plan = [("dense, as long", 0.0)]
            for price, share in zip(PRICES[name], SPARSITIES[name], strict=True):
                plan += [("price on bits", price), ("pruned, shared", share)]
            for route, setting in plan[:3] if options.quick else plan:
                for seed in options.seed or (SEEDS[:1] if options.quick else SEEDS):
                    bench.row(name, seed, route, setting)
    written(options.quick)


if __name__ == "__main__":
    main()
