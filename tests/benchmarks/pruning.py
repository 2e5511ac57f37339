"""Accuracy after pruning, on the full Fashion-MNIST: channels of ResNet-20, weights of LeNet-300.

ResNet-20 is trained, cut to a share of its MACs by whole channels, and trained on. Beside it stand
the dense network trained on for as long, random channels in place of the criterion, and the same
small network trained from scratch for the epochs of both trainings.
LeNet-300-100 loses 95 % of its weights while it trains; beside it a random mask and a dense
network of as many weights, all for the same epochs.

All train on 55,000 of the training images. The candidates are compared (seed 0) on the other
5,000; test images are seen by the final runs alone. Each result is written as soon as it is
there, and a run that was interrupted continues.
"""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import arguments, keep, kept, machine, mean_and_spread
from torch import nn

from structopt import data, descent, measure, networks, pruning, training
from structopt.data import Batches, Examples, Flip

SEEDS = (0, 1, 2)
SHARES = {"2.1 times fewer MACs": 1 / 2.1, "4 times fewer MACs": 1 / 4}
CRITERIA = {"magnitude": pruning.magnitude, "taylor": pruning.taylor}
LIMITS = {
    "all channels": pruning.Limits(),
    "inner channels": pruning.Limits(leave=("conv1", "stage?.0.conv2")),  # not the residual sums
}
SPARSITY = 0.95
LENET = "95 % of the weights"
SAME_WEIGHTS = (16, 16)  # widths of a dense LeNet with as many weights as the sparse one keeps
LENET_CRITERIA = {"magnitude": pruning.magnitude, "lamp": pruning.lamp}
LENET_CANDIDATES = {  # the learning rate of each row
    "dense": ("0.001", "0.003", "0.01"),
    "pruned while training": ("magnitude 0.003", "magnitude 0.01", "lamp 0.003", "lamp 0.01"),
    "random mask": ("0.003", "0.01"),
    "from scratch, as few weights": ("0.003", "0.01"),
}
HELD_OUT, LR = 5000, 0.01


class Bench:
    """The data, the budget and the trained dense networks that the rows share."""

    def __init__(
        self, epochs: tuple[int, int], device: torch.device, folder: Path, quick: bool
    ) -> None:
        train, self.test = data.fashion_mnist(full=not quick)
        if quick:
            train, self.test = train[:600], self.test[:200]
        self.train, self.held_out = train.split(200 if quick else HELD_OUT)
        (self.epochs, self.more), self.device, self.folder = epochs, device, folder
        self.example = torch.zeros(1, 1, 28, 28, device=device)

    def batches(self, seed: int) -> Batches:
        return data.batches(self.train, 256, seed=seed, augment=[Flip()], device=self.device)

    def fit(
        self, model: nn.Module, seed: int, epochs: int, *, lr: float = LR, **options: Any
    ) -> nn.Module:
        training.train(
            model,
            self.batches(seed),
            training.supervised(),
            descent.fused_adamw(model, lr),
            epochs=epochs,
            device=self.device,
            schedule=descent.one_cycle(),
            **options,
        )
        return model

    def recovered(self, model: nn.Module, seed: int, epochs: int) -> nn.Module:
        """The recipe of :func:`structopt.pruning.recover`, in other orders than the first training.

        Without its pass over the data before the first step, for the statistics of the norms:
        they follow within the first of these steps.
        """
        return self.fit(model, seed + 1000, epochs)

    def accuracy(self, model: nn.Module, examples: Examples) -> float:
        return round(100 * training.evaluate(model, examples, device=self.device), 2)

    def dense(self, seed: int) -> nn.Module:
        """Trained once: from then on its checkpoint is read."""
        torch.manual_seed(seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"dense-{self.epochs}-{len(self.train)}-{seed}.checkpoint"
        return self.fit(
            networks.ResNet20(), seed, self.epochs, checkpoint=self.folder / name
        ).eval()

    def cut(self, seed: int, share: float, how: str) -> nn.Module:
        criterion, limits = how.split(", ")
        model = self.dense(seed)
        some = data.batches(self.train[:5000], 250, device=self.device)
        torch.manual_seed(seed)  # of the random criterion
        scores = pruning.score(model, {**CRITERIA, "random": pruning.random}[criterion], some)
        target = pruning.MACs(share=share)
        return pruning.prune_channels(
            model, self.example, target, scores=scores, limits=LIMITS[limits]
        )

    def fresh(self, model: nn.Module, seed: int) -> nn.Module:
        """The same network with new weights."""
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return model


Row = Callable[[int], tuple[nn.Module, int]]
"""A seed in, a trained network and its epochs in all out."""


def channel_rows(bench: Bench, share: float, how: str) -> dict[str, Row]:
    more, whole = bench.more, bench.epochs + bench.more

    def pruned(seed: int, how: str) -> tuple[nn.Module, int]:
        return bench.recovered(bench.cut(seed, share, how), seed, more), whole

    def scratch(seed: int) -> tuple[nn.Module, int]:
        small = bench.fresh(bench.cut(seed, share, how), seed)
        return bench.fit(small, seed, whole), whole

    return {
        "pruned, trained on": partial(pruned, how=how),
        "random channels, trained on": partial(pruned, how=f"random, {how.split(', ')[1]}"),
        "from scratch": scratch,
    }


def dense_rows(bench: Bench) -> dict[str, Row]:
    def longer(seed: int) -> tuple[nn.Module, int]:
        model = copy.deepcopy(bench.dense(seed))
        return bench.recovered(model, seed, bench.more), bench.epochs + bench.more

    return {"dense": lambda seed: (bench.dense(seed), bench.epochs), "dense, trained on": longer}


def lenet(bench: Bench, name: str, settings: str, epochs: int, seed: int) -> tuple[nn.Module, int]:
    """A row of LeNet-300-100; `settings` are of LENET_CANDIDATES."""
    *criterion, lr = settings.split()
    torch.manual_seed(seed)
    model = networks.LeNet300(SAME_WEIGHTS) if "few" in name else networks.LeNet300()
    after_step: Any = None
    if name == "pruned while training":
        end = epochs * len(bench.batches(seed)) // 2
        after_step = pruning.PruneWhileTraining(
            pruning.Gradual(SPARSITY, 1, end, max(1, end // 50)),
            score=partial(pruning.score, criterion=LENET_CRITERIA[criterion[0]]),
            scope=pruning.Global(floor=0.01),
        )
    elif name == "random mask":
        masks = pruning.find_masks(pruning.score(model, pruning.random), SPARSITY)
        after_step = pruning.hold(masks)
        after_step(model)
    return bench.fit(model, seed, epochs, lr=float(lr), after_step=after_step), epochs


Candidates = dict[str, dict[str, float]]


def choose(bench: Bench, lenet_epochs: int, found: Candidates, save: Callable[[], None]) -> None:
    """Accuracy of each candidate on the images held out, seed 0; one epoch of recovery."""

    def note(kind: str, name: str, fit: Callable[[], tuple[nn.Module, int]]) -> None:
        known = found.setdefault(kind, {})
        if name not in known:
            known[name] = bench.accuracy(fit()[0], bench.held_out)
            print(kind, name, known[name], flush=True)
            save()

    def channels(how: str) -> tuple[nn.Module, int]:
        return bench.recovered(bench.cut(0, SHARES["2.1 times fewer MACs"], how), 0, 1), 1

    for how in (f"{criterion}, {limits}" for criterion in CRITERIA for limits in LIMITS):
        note("ResNet-20", how, partial(channels, how))
    for row, candidates in LENET_CANDIDATES.items():
        for settings in candidates:
            fit = partial(lenet, bench, row, settings, lenet_epochs, 0)
            note(f"LeNet-300-100, {row}", settings, fit)


def best_of(scores: dict[str, float]) -> str:
    return max(scores, key=lambda name: scores[name])


def final(bench: Bench, row: Row, seed: int, known: dict[str, Any]) -> dict[str, Any]:
    """A row with one more seed."""
    model, epochs = row(seed)
    weights = [p for p in model.parameters() if p.ndim > 1]
    scores = {**known.get("test accuracy in %", {}), str(seed): bench.accuracy(model, bench.test)}
    return {
        "epochs": epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights that are not zero": sum(int(w.count_nonzero()) for w in weights),
        "MACs": measure.cost(model, bench.example).macs,
        "test accuracy in %": scores,
        **mean_and_spread(list(scores.values())),
    }


def whole(result: dict[str, Any]) -> bool:
    """Whether the row that comes last has all its seeds."""
    rows = list(result.get("results", {}).get(list(SHARES)[-1], {}).values())
    return len(rows) == 3 and len(rows[-1]["test accuracy in %"]) == len(SEEDS)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=2, help="of ResNet-20 before it is pruned")
    parser.add_argument("--recovery", type=int, default=1, help="epochs after that")
    parser.add_argument("--lenet-epochs", type=int, default=15)
    folder = Path(tempfile.gettempdir()) / "structopt-benchmarks"
    parser.add_argument("--folder", type=Path, default=folder, help="for the dense networks")
    options = parser.parse_args()
    quick, device = options.quick, torch.device(options.device)
    epochs = (1, 1) if quick else (options.epochs, options.recovery)
    lenet_epochs = 1 if quick else options.lenet_epochs
    bench = Bench(epochs, device, options.folder, quick)
    budget = {
        "training images": len(bench.train),
        "batch": 256,
        "epochs before pruning": epochs[0],
        "epochs after": epochs[1],
        "epochs of LeNet-300-100": lenet_epochs,
    }
    result = {} if quick else kept("pruning-accuracy", device)
    if result.get("budget") != budget or whole(result):
        result = {}  # not an interrupted run of these settings: measure anew
        for old in options.folder.glob("dense-*.checkpoint"):
            old.unlink()
    result |= {"benchmark": "pruning accuracy", "machine": machine(device), "budget": budget}

    def save(last: bool = False) -> None:
        if last or not quick:
            keep("pruning-accuracy", result, quick)

    choose(bench, lenet_epochs, result.setdefault("candidates", {}), save)
    best = {kind: best_of(found) for kind, found in result["candidates"].items()}
    cases = {"dense": dense_rows(bench)}
    cases |= {name: channel_rows(bench, share, best["ResNet-20"]) for name, share in SHARES.items()}
    cases[LENET] = {
        row: partial(lenet, bench, row, best[f"LeNet-300-100, {row}"], lenet_epochs)
        for row in LENET_CANDIDATES
    }
    for parts in (["dense", "2.1 times fewer MACs"], [LENET], ["4 times fewer MACs"]):
        for seed in SEEDS[:1] if quick else SEEDS:
            for case in parts:
                measured = result.setdefault("results", {}).setdefault(case, {})
                for name, row in cases[case].items():
                    known = measured.get(name, {})
                    if str(seed) not in known.get("test accuracy in %", {}):
                        measured[name] = final(bench, row, seed, known)
                        print(f"{case}, {name}, seed {seed}: {measured[name]}", flush=True)
                        save()
    save(last=True)


if __name__ == "__main__":
    main()
