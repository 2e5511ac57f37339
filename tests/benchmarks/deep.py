"""Deep compression on the full Fashion-MNIST: how many bytes for how many right answers.

LeNet-300-100 and LeNet-5 (20-50-500), each by two routes: pruned gradually, its weights shared
among a few values and coded; or trained with a price on each bit. A convolutional network teaches
all of them, on each training image and its mirror image.

A training begins from the dense network of its seed, taught already; its price or sparsity rises in
stages, and the end of a stage is a point of the curve. Points are compared with two dense networks
trained for as long as the longest training on a price: one taught as they are, one from the labels
alone, as networks usually come to be compressed. Each point is written to a file, loaded into a
fresh process, and judged there. 5,000 training images are held out for choosing; the test images
are seen by no choice. (Beyond 97 % the ranking of all weights together empties the last layer of
LeNet-300-100.) Rows are kept in _build/deep as they come: a run that was cut off goes on where it
was.
"""

import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
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
SEEDS, HELD_OUT, BATCH = (0, 1, 2), 5000, 256
Point = tuple[float, nn.Module, dict[str, Any]]
NETWORKS = {"LeNet300": networks.LeNet300, "LeNet5": networks.LeNet5}
# Passes over the images and their mirror images: of the dense network; at each price or sparsity;
# and of a copy that learns its shared values
FIRST = {"LeNet300": 8, "LeNet5": 4}
EACH = {"LeNet300": 12, "LeNet5": 5}
SHARE = {"LeNet300": 3, "LeNet5": 2}
PRICES = {"LeNet300": [(0.4, 0.6, 0.9)], "LeNet5": [(0.7,), (1.2, 2.0)]}  # of each training
SPARSITIES = {"LeNet300": (0.95, 0.97), "LeNet5": (0.96,)}
VALUES = 8
ROUTES = {
    "dense, as long": "dense_as_long",
    "dense, labels alone": "dense_from_labels",
    "price on bits": "priced",
    "pruned, shared": "pruned",
}
BASELINES = {"dense, as long": "", "dense, labels alone": " to labels"}
JUDGE = """
import json, sys, torch
from structopt import compression, data, networks, training
train, test = data.fashion_mnist(full=True)
name, held_out, *paths = sys.argv[1:]
sets, made = {"validation": train.split(int(held_out))[1], "test": test}, []
for path in paths:
    model = compression.load(path, getattr(networks, name)())
    scores = {k: 100 * training.evaluate(model, v, device="cpu") for k, v in sets.items()}
    made.append({k: round(score, 2) for k, score in scores.items()})
print(json.dumps(made))
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
            model, batches, training.supervised(),
            descent.fused_adamw(model, 0.003, weight_decay=0.02),
            epochs=1 if self.quick else 10, device="cpu", schedule=descent.one_cycle(),
        )  # fmt: skip
        checkpoint.save(model, path)
        return model

    def fit(self, model: nn.Module, seed: int, epochs: int, **options: Any) -> None:
        """Train by what the teacher says, or by the labels alone."""
        labels = options.pop("labels", False)
        objective = training.supervised() if labels else options.pop("objective", self.objective)
        lr, decay = options.pop("lr", 0.003), options.pop("decay", 0.01)
        examples = self.fitted if labels else self.numbered
        training.train(
            model, data.batches(examples, BATCH, seed=seed), objective,
            descent.fused_adamw(model, lr, weight_decay=decay),
            epochs=1 if self.quick else epochs, device="cpu", progress=False,
            schedule=descent.one_cycle(0.15), **options,
        )  # fmt: skip

    def dense(self, name: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model, path = NETWORKS[name](), self.folder / f"{name}-{seed}"
        if path.exists():
            return checkpoint.load(path, model)
        self.fit(model, seed, FIRST[name])
        checkpoint.save(model, path)
        return model

    def dense_as_long(self, name: str, seed: int) -> Iterator[Point]:
        model = self.dense(name, seed)
        self.fit(model, seed + 100, EACH[name] * stages(name))
        yield 0.0, model, {}

    def dense_from_labels(self, name: str, seed: int) -> Iterator[Point]:
        torch.manual_seed(seed)
        model = NETWORKS[name]()
        epochs = FIRST[name] + EACH[name] * stages(name)
        self.fit(model, seed, epochs, labels=True)
        yield 0.0, model, {}

    def priced(self, name: str, seed: int) -> Iterator[Point]:
        """Trainings whose price rises, a file at the end of each price."""
        for prices in PRICES[name]:
            model = self.dense(name, seed)
            rated = compression.prepare_rate(model, [key for key, _ in model.named_parameters()])
            for k, price in enumerate(prices, 1):
                objective = compression.RatePenalty(self.objective, price)
                options = {"objective": objective, "decay": 0.0}
                self.fit(rated, seed + 100 * k, EACH[name], **options)
                yield price, *rated.finish()

    def pruned(self, name: str, seed: int) -> Iterator[Point]:
        """One training that goes on losing weights; at each sparsity a copy shares its values."""
        model, masks, before = self.dense(name, seed), {}, 0.0
        steps = -(-len(self.fitted) // BATCH) * EACH[name]
        for k, sparsity in enumerate(SPARSITIES[name], 1):
            schedule = pruning.Gradual(sparsity, 1, max(2, int(0.6 * steps)), 20, before)
            prune = pruning.PruneWhileTraining(schedule, scope=pruning.Global(floor=0.02))
            prune.masks = masks
            self.fit(model, seed + 100 * k, EACH[name], after_step=prune)
            masks, before, made = prune.masks, sparsity, copy.deepcopy(model)
            tied = compression.tie(compression.share_weights(made, VALUES))
            tied(made)
            self.fit(made, seed + 100 * k + 50, SHARE[name], lr=0.0005, after_step=tied)
            biases = [key for key, p in made.named_parameters() if p.ndim == 1]
            codes = compression.quantize_weights(made, Grid(6, fit=MSE()), biases) | tied.codes
            yield sparsity, compression.put_(made, codes), codes

    def rows(self, name: str, seed: int, route: str) -> None:
        """Train, write, and note; nothing where it is noted already."""
        key = {"network": name, "route": route, "seed": seed}
        if any(key.items() <= row.items() for row in noted(self.folder)):
            return
        rows = []
        for setting, model, codes in getattr(self, ROUTES[route])(name, seed):
            path = self.folder / f"{name}-{ROUTES[route]}-{setting}-{seed}.sopt"
            size = compression.save(model, path, codes).bytes
            rows.append(key | {"setting": setting, "bytes": size, "file": path.name})
        with (self.folder / "rows.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def stages(name: str) -> int:
    """Prices of the longest training."""
    return max(map(len, PRICES[name]))


def noted(folder: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    path = folder / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def judged(rows: list[dict[str, Any]], name: str, folder: Path) -> list[dict[str, Any]]:
    """The rows with the right answers in %, which a fresh process finds from the files alone."""
    paths = [str(folder / row.pop("file")) for row in rows]
    command = [sys.executable, "-c", JUDGE, name, str(HELD_OUT), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    scores = json.loads(done.stdout.splitlines()[-1])
    return [row | score for row, score in zip(rows, scores, strict=True)]


def table(rows: list[dict[str, Any]], whole: int) -> list[dict[str, Any]]:
    """Means and spreads over the seeds, and what is lost against the two dense networks."""
    dense = {
        suffix: {row["seed"]: row for row in rows if row["route"] == route}
        for route, suffix in BASELINES.items()
    }
    made = []
    for route, setting in dict.fromkeys((row["route"], row["setting"]) for row in rows):
        cells = [r for r in rows if (r["route"], r["setting"]) == (route, setting)]
        line = {"route": route, "setting": setting, "seeds": len(cells)}
        line["bytes"] = mean_and_spread([float(c["bytes"]) for c in cells])
        line["times smaller"] = round(whole / statistics.fmean(c["bytes"] for c in cells), 1)
        for kind in ("validation", "test"):
            line[f"{kind} in %"] = mean_and_spread([c[kind] for c in cells])
            for suffix, own in dense.items():
                lost = [own[c["seed"]][kind] - c[kind] for c in cells if c["seed"] in own]
                if lost:
                    line[f"{kind}, points lost{suffix}"] = mean_and_spread(lost)
        made.append(line)
    return made


def written(quick: bool) -> None:
    """The tables of all rows that there are."""
    folder, result = FOLDER / ("quick" if quick else ""), {}
    for name, build in NETWORKS.items():
        if rows := [row for row in noted(folder) if row["network"] == name]:
            rows = judged(rows, name, folder)
            whole = 4 * sum(p.numel() for p in build().parameters())
            passes = {"dense": 2 * FIRST[name], "each": 2 * EACH[name], "shared": 2 * SHARE[name]}
            result[name] = {
                "passes over the images": passes,
                "table": table(rows, whole),
                "rows": rows,
            }
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
            for seed in options.seed or (SEEDS[:1] if options.quick else SEEDS):
                for route in ROUTES:
                    bench.rows(name, seed, route)
    written(options.quick)


if __name__ == "__main__":
    main()
