"""Deep compression end to end: pruned, shared, coded; the bytes of the file, and what it answers.

LeNet-300-100 (and LeNet-5 with ``--lenet5``) on the embedded sample of Fashion-MNIST: trained,
pruned gradually while it learns from the dense network, its weights shared among a few values that
are trained on, its biases on 8 bits; or trained with a price on each bit. Each network is written
to a file, loaded into a fresh process, and judged there. Beside it stand the dense network,
trained for as many epochs, and one with a random mask.

Networks train on 9,000 images; 1,000 others are for choosing among the sparsities, and the test
images are seen by no choice. A last table gives the speed at which files are decoded.
"""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import arguments, keep, kept, machine, mean_and_spread
from torch import nn

from structopt import compression, data, descent, distillation, networks, pruning, training
from structopt.compression import MSE, Grid

SEEDS = (0, 1, 2)
SPARSITIES = (0.9, 0.95, 0.97)
PRICES = (4.0,)
VALUES, BATCH, HELD_OUT = 8, 128, 1000
NETWORKS = {"LeNet300": networks.LeNet300, "LeNet5": networks.LeNet5}
JUDGE = """
import json, sys, torch
from structopt import compression, data, networks, training
train, test = data.fashion_mnist()
found = {}
for path in sys.argv[3:]:
    model = compression.load(path, getattr(networks, sys.argv[1])())
    sets = {"validation": train.split(int(sys.argv[2]))[1], "test": test}
    scores = {k: training.evaluate(model, v, device="cpu") for k, v in sets.items()}
    found[path] = {k: round(100 * score, 2) for k, score in scores.items()}
print(json.dumps(found))
"""


class Bench:
    """The data, the epochs and the files of one network."""

    def __init__(self, name: str, epochs: int, quick: bool, folder: Path) -> None:
        train, _ = data.fashion_mnist()
        self.train, _ = train.split(HELD_OUT)
        if quick:
            self.train = self.train[:1000]
        self.name, self.epochs, self.folder = name, epochs, folder

    def fit(self, model: nn.Module, seed: int, epochs: int, lr: float, **options: Any) -> nn.Module:
        objective = options.pop("objective", training.supervised())
        rule = descent.fused_adamw(model, lr, weight_decay=options.pop("decay", 0.01))
        batches = data.batches(self.train, BATCH, seed=seed, device="cpu")
        training.train(
            model, batches, objective, rule, epochs=epochs, device="cpu",
            schedule=descent.one_cycle(), progress=False, **options,
        )  # fmt: skip
        return model

    def files_of(self, seed: int, known: dict[str, Any]) -> dict[str, Path]:
        """The files of one seed, by the name of their row; without the rows that are known."""
        torch.manual_seed(seed)
        dense = self.fit(NETWORKS[self.name](), seed, self.epochs, 0.003)
        most = SPARSITIES[-1]
        plan: dict[str, Callable[[], Path]] = {"dense, as long": partial(self.longer, dense, seed)}
        for sparsity in SPARSITIES:
            plan[f"{sparsity:.0%} pruned, shared"] = partial(self.pruned, dense, sparsity, seed)
        random = partial(self.pruned, dense, most, seed, pruning.random)
        plan[f"{most:.0%} at random, shared"] = random
        for price in PRICES:
            plan[f"price {price:g} on bits"] = partial(self.priced, dense, price, seed)
        return {row: make() for row, make in plan.items() if row not in known}

    def longer(self, dense: nn.Module, seed: int) -> Path:
        model = self.fit(copy.deepcopy(dense), seed + 100, 2 * self.epochs, 0.002)
        return self.written(model, {}, f"dense-{seed}")

    def teacher(self, dense: nn.Module) -> training.Objective:
        return distillation.from_logits(copy.deepcopy(dense), temperature=2.0, weight=0.5)

    def priced(self, dense: nn.Module, price: float, seed: int) -> Path:
        rated = compression.prepare_rate(dense, [name for name, _ in dense.named_parameters()])
        objective = compression.RatePenalty(self.teacher(dense), price)
        self.fit(rated, seed + 200, 2 * self.epochs, 0.003, decay=0.0, objective=objective)
        return self.written(*rated.finish(), f"price-{price}-{seed}")

    def pruned(
        self, dense: nn.Module, sparsity: float, seed: int, criterion: Any = pruning.magnitude
    ) -> Path:
        model = copy.deepcopy(dense)
        steps = -(-len(self.train) // BATCH) * self.epochs
        prune = pruning.PruneWhileTraining(
            pruning.Gradual(sparsity, 1, int(0.6 * steps), every=20),
            score=partial(pruning.score, criterion=criterion),
            scope=pruning.Global(floor=0.02),
        )
        teacher = self.teacher(dense)
        self.fit(model, seed + 200, self.epochs, 0.003, objective=teacher, after_step=prune)
        tied = compression.tie(compression.share_weights(model, VALUES))
        tied(model)
        self.fit(model, seed + 300, self.epochs, 0.0005, objective=teacher, after_step=tied)
        biases = [name for name, p in model.named_parameters() if p.ndim == 1]
        codes = compression.quantize_weights(model, Grid(8, fit=MSE()), biases) | tied.codes
        name = f"{sparsity}-{seed}-{criterion.__name__}"
        return self.written(compression.put_(model, codes), codes, name)

    def written(self, model: nn.Module, codes: dict[str, Any], name: str) -> Path:
        path = self.folder / f"{self.name}-{name}.sopt"
        compression.save(model, path, codes)
        return path

    def judged(self, paths: dict[str, Path]) -> dict[str, Any]:
        """Bytes, and percent right in a fresh process that has the file alone."""
        command = [sys.executable, "-c", JUDGE, self.name, str(HELD_OUT), *map(str, paths.values())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        return {
            row: {"bytes": path.stat().st_size, **found[str(path)]} for row, path in paths.items()
        }


def table(by_seed: dict[str, dict[str, Any]], dense: int) -> dict[str, Any]:
    """Means and spreads of each row over the seeds."""
    made = {}
    for row in next(iter(by_seed.values())):
        cells = [rows[row] for rows in by_seed.values()]
        made[row] = {
            "bytes": mean_and_spread([float(c["bytes"]) for c in cells]),
            "times smaller": round(dense / statistics.fmean(c["bytes"] for c in cells), 1),
            **{
                f"{kind} in %": mean_and_spread([c[kind] for c in cells])
                for kind in ("validation", "test")
            },
        }
    return made


def decoding(quick: bool) -> dict[str, Any]:
    """Megabytes of float32 weights that one core decodes in a second of processor time."""
    made = {}
    for name, bits, kept_share in (
        ("4 bits", 4, 1.0),
        ("8 bits", 8, 1.0),
        ("4 bits, 90 % zeros", 4, 0.1),
    ):
        torch.manual_seed(0)
        model = nn.Linear(1024 if quick else 4096, 1024, bias=False)
        with torch.no_grad():
            model.weight.normal_()
            rows, columns = (torch.rand(n).pow(2) for n in model.weight.shape)
            if kept_share < 1:  # zeros lie in rows and columns
                chance = 9 * kept_share * rows[:, None] * columns
                model.weight.mul_(torch.rand(model.weight.shape) < chance)
        codes = compression.quantize_weights(model, Grid(bits))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x"
            report = compression.save(compression.put_(model, codes), path, codes)
            seconds = []
            for _ in range(2 if quick else 6):
                start = time.process_time()
                compression.load(path, model)
                seconds.append(time.process_time() - start)
        median = statistics.median(seconds[1:])
        made[name] = {
            "MB of weights a second": round(report.dense / 1e6 / median),
            "bytes": report.bytes,
        }
    return made


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=5, help="of each training")
    parser.add_argument(
        "--lenet5", action="store_true", help="LeNet-5 too: about ten times as long"
    )
    options = parser.parse_args()
    quick, device = options.quick, torch.device("cpu")
    epochs = 1 if quick else options.epochs
    budget = {
        "training images": 9000,
        "batch": BATCH,
        "epochs of each training": epochs,
        "values": VALUES,
    }
    result = {} if quick else kept("compression", device)
    if result.get("budget") != budget:
        result = {}
    result |= {"benchmark": "compression", "machine": machine(device), "budget": budget}
    for name in ["LeNet300", "LeNet5"][: 1 + options.lenet5]:
        by_seed = result.setdefault("seeds", {}).setdefault(name, {})
        dense = 4 * sum(p.numel() for p in NETWORKS[name]().parameters())
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(name, epochs, quick, Path(folder))
            for seed in SEEDS[:1] if quick else SEEDS:
                known = by_seed.setdefault(str(seed), {})
                if files := bench.files_of(seed, known):
                    known |= bench.judged(files)
                    print(f"{name}, seed {seed}: {known}", flush=True)
                result.setdefault("results", {})[name] = table(by_seed, dense)
                if not quick:
                    keep("compression", result, quick)
    result["decoding"] = decoding(quick)
    keep("compression", result, quick)


if __name__ == "__main__":
    main()
