"""Widths in one network, groups with an exchange, and early exits, on embedded Fashion-MNIST.

One slimmable network for four widths, and a network trained for each width by itself, with the same
number of passes; each has the learning rate that is best in the mean on 2,000 images held out.

Three trained perceptrons, two of them twice as deep and one of these twice as wide, are grouped,
with each way to pass information, and trained on; beside them the dense network, for as long. The
learning rate of that is chosen for each row apart, by the mean of three seeds on 2,000 images held
out. One of the three once more, every row of it, the dense one too, taught by the dense network as
it was. Then networks with one exit: the cheapest threshold that loses nothing on the images held
out, timed against the whole network in turns. They differ in what the heads read, and in how much
lies behind the exit. Test images are seen by the final runs alone.
"""

import copy
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from common import arguments, clock, interleaved, keep, kept, machine, mean_and_spread, ratios
from torch import nn

from structopt import data, descent, slicing, training
from structopt.distillation import from_logits, soft_targets

GROUPS, RATES, EPOCHS = (8, 16), (0.001, 0.003, 0.01), 3
STACKS = {  # layers, hidden units
    "groups": (4, 128),
    "groups, twice as deep": (8, 128),
    "groups, twice as deep and wide": (8, 256),
}
WIDTHS, PASSES = (0.25, 0.5, 0.75, 1.0), 12
NETWORKS = {
    "3 blocks, pooled": ((8, 24, 48), True),
    "3 blocks, all positions": ((8, 24, 48), False),
    "4 blocks, all positions": ((8, 24, 48, 48), False),
}
EXCHANGES = {
    "branches": slicing.Branches(),
    "shuffled": slicing.Shuffled(),
    "averaged": slicing.Averaged(),
    "thin layer": slicing.Mixed(rank=2),
}


class Bench:
    """The data, and one recipe for all."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        train, test = data.fashion_mnist()
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        sizes = (600, 200) if quick else (8000, 2000)
        parts = order.split([*sizes, len(train) - sum(sizes)])
        self.learn, self.held = (
            data.Examples(train.inputs[part], train.targets[part]) for part in parts[:2]
        )
        self.test = test[:500] if quick else test
        self.device, self.example = device, torch.zeros(1, 1, 28, 28, device=device)

    def fit(self, model: nn.Module, objective: Any, epochs: int, seed: int, lr: float) -> nn.Module:
        batches = data.batches(self.learn, 128, seed=seed, device=self.device)
        model.to(self.device)
        optimizer = descent.fused_adamw(model, lr)
        settings = {"schedule": descent.one_cycle(), "autocast": None, "device": self.device}
        training.train(model, batches, objective, optimizer, epochs=epochs, **settings)
        return model.eval()

    def score(self, model: nn.Module, examples: data.Examples) -> float:
        return round(100 * training.evaluate(model, examples, device=self.device), 2)


def blocks(widths: Sequence[int]) -> list[nn.Module]:
    """3×3 convolutions with batch norm and ReLU, the first two with stride 2."""
    made: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise((1, *widths))):
        layer = nn.Conv2d(inputs, outputs, 3, 2 if number < 2 else 1, padding=1, bias=False)
        made.append(nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU()))
    return made


def slim(width: float = 1.0) -> nn.Module:
    """Four convolutions and a linear layer, as in the chapter on slicing."""
    sizes = [int(width * channels) for channels in (8, 24, 32, 32)]
    return nn.Sequential(*blocks(sizes), nn.Flatten(), nn.Linear(49 * sizes[-1], 10))


def in_widths(bench: Bench, seeds: int, passes: int) -> dict[str, Any]:
    """Test accuracy at each width: one network for all, and one for each."""

    def shared(seed: int, lr: float) -> list[nn.Module]:
        torch.manual_seed(seed)
        model = slicing.Slimmable(slim(), bench.example, WIDTHS)
        bench.fit(model, slicing.all_widths(), passes, seed, lr)
        return [model.extract(width).eval() for width in WIDTHS]

    def alone(width: float, seed: int, lr: float) -> nn.Module:
        torch.manual_seed(seed)
        return bench.fit(slim(width), training.supervised(), passes, seed, lr)

    def best(made: dict[float, list[list[nn.Module]]]) -> tuple[float, list[list[nn.Module]]]:
        """The rate whose networks, one list for each seed, are best on the images held out."""

        def held(lr: float) -> float:
            return sum(bench.score(model, bench.held) for row in made[lr] for model in row)

        rate = max(made, key=held)
        return rate, made[rate]

    rate, rows = best({lr: [shared(seed, lr) for seed in range(seeds)] for lr in RATES})
    found: dict[str, Any] = {"passes": passes, "learning rate, one for all": rate}
    for number, width in enumerate(WIDTHS):
        own, single = best({lr: [[alone(width, s, lr)] for s in range(seeds)] for lr in RATES})
        scores = [bench.score(row[number], bench.test) for row in rows]
        found[str(width)] = {
            "one for all": mean_and_spread(scores),
            "one for each": mean_and_spread([bench.score(row[0], bench.test) for row in single]),
            "learning rate, one for each": own,
        }
        print(width, found[str(width)], flush=True)
    return found


def perceptron(layers: int, hidden: int) -> nn.Module:
    """So many linear layers from hidden units to hidden units: those that can be grouped."""
    parts: list[nn.Module] = [nn.Flatten()]
    for inputs in (784, *[hidden] * layers):
        parts += [nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(hidden, 10))


def trained_on(
    bench: Bench, begun: Sequence[nn.Module], objectives: Sequence[Any]
) -> dict[str, Any]:
    """Test accuracy of one row before and after, with the rate that is best for three seeds."""

    def trained(seed: int, lr: float) -> nn.Module:
        model = copy.deepcopy(begun[seed])
        return bench.fit(model, objectives[seed], EPOCHS, seed + 100, lr)

    first = {lr: [trained(seed, lr) for seed in range(len(begun[:3]))] for lr in RATES}
    rate = max(RATES, key=lambda lr: sum(bench.score(model, bench.held) for model in first[lr]))
    done = first[rate] + [trained(seed, rate) for seed in range(3, len(begun))]
    return {
        "learning rate": rate,
        "when cut": mean_and_spread([bench.score(model, bench.test) for model in begun]),
        "trained on": mean_and_spread([bench.score(model, bench.test) for model in done]),
    }


def grouped(
    bench: Bench, seeds: int, layers: int, hidden: int, taught: bool = False
) -> dict[str, Any]:
    """For each number of groups: the rows, and what each exchange gave back."""
    dense: list[nn.Module] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = perceptron(layers, hidden)
        dense.append(bench.fit(model, training.supervised(), 2 * EPOCHS, seed, 0.003))
    objectives = [training.supervised()] * seeds
    if taught:
        objectives = [from_logits(model, soft_targets, temperature=4.0) for model in dense]
    whole, found = trained_on(bench, dense, objectives), {}
    for groups in GROUPS:
        rows = {"dense": whole}
        for name, exchange in EXCHANGES.items():
            cut = [slicing.group_layers(m, bench.example, groups, exchange=exchange) for m in dense]
            rows[name] = trained_on(bench, cut, objectives)
            print(layers, hidden, groups, name, rows[name], flush=True)
        means = {name: row["trained on"]["mean"] for name, row in rows.items()}
        lost = means["dense"] - means["branches"]
        found[str(groups)] = {
            "rows": rows,
            "points lost by grouping": round(lost, 2),
            "share that comes back": {
                name: round((means[name] - means["branches"]) / lost, 2)
                for name in ("shuffled", "averaged", "thin layer")
            },
        }
    return found


def convolutional(widths: Sequence[int], pooled: bool) -> slicing.EarlyExits:
    """3×3 convolutions, the first two with stride 2, and an exit behind the second.

    Both heads read all 7 × 7 positions, or their means over 3 × 3 cells.
    """

    def head(width: int) -> nn.Module:
        if pooled:
            layers = nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * width, 10)
            return nn.Sequential(*layers)
        return nn.Sequential(nn.Flatten(), nn.Linear(49 * width, 10))

    model = nn.Sequential(*blocks(widths), *head(widths[-1]))
    return slicing.EarlyExits(model, torch.zeros(1, 1, 28, 28), {"1": head(widths[1])})


def exits(
    bench: Bench, seeds: int, widths: Sequence[int], pooled: bool, rounds: int
) -> dict[str, Any]:
    """The whole network and the one that stops early, over all test images in batches of 256."""
    found: dict[str, list[float]] = {}
    clocks: dict[str, list[float]] = {"whole": [], "early": []}
    images = bench.test.inputs.to(bench.device).split(256)
    for seed in range(seeds):
        torch.manual_seed(seed)
        network = convolutional(widths, pooled)
        bench.fit(network, slicing.all_exits(), EPOCHS, seed, 0.01)
        whole = training.evaluate(network.deciding(1.01), bench.held)
        chosen = slicing.choose_threshold(network, data.batches(bench.held, 500), accuracy=whole)
        early = network.deciding(chosen.value)
        left = network.answer(torch.cat(images), chosen.value).exits.cpu()
        costs = torch.tensor(network.macs(bench.example)).double()
        row = {
            "whole": bench.score(network.deciding(1.01), bench.test),
            "early": bench.score(early, bench.test),
            "first exit alone": bench.score(network.deciding(0.0), bench.test),
            "times fewer MACs": float(costs[-1] / costs[left].mean()),
            "left early, %": 100 * float((left == 0).double().mean()),
        }
        for name, value in row.items():
            found.setdefault(name, []).append(value)

        @torch.no_grad()
        def run(model: nn.Module) -> None:
            for batch in images:
                model(batch)

        loops = {"whole": partial(run, network.model), "early": partial(run, early)}
        for name, seconds in interleaved(loops, rounds, bench.device).items():
            clocks[name] += seconds
    return {
        **{name: mean_and_spread(values) for name, values in found.items()},
        "times faster": ratios(clocks["whole"], clocks["early"]),
    }


def main() -> None:
    parser = arguments(__doc__)
    parts = ["exits", "groups", "taught", "widths"]
    parser.add_argument("--part", choices=parts, help="only this one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, quick = torch.device(options.device), options.quick
    bench = Bench(device, quick)
    seeds, many = (1, 1) if quick else (3, 9)  # the differences between groups are small
    result = {} if quick else kept("slicing", device)
    result |= {"benchmark": "slicing", "machine": machine(device), "seeds": seeds}
    result |= {"seeds of groups": many}
    result |= {"clock": clock(device)[0], "epochs trained on": EPOCHS}
    if options.part in (None, "widths"):
        result["widths"] = in_widths(bench, seeds, 1 if quick else PASSES)
    if options.part in (None, "exits"):
        result["exits"] = {}
        for name, (widths, pooled) in NETWORKS.items():
            result["exits"][name] = exits(bench, seeds, widths, pooled, 3 if quick else 7)
            print(name, result["exits"][name], flush=True)
    if options.part in (None, "groups"):
        for name, sizes in STACKS.items():
            result[name] = grouped(bench, many, *sizes)
    if options.part in (None, "taught"):
        deep = STACKS["groups, twice as deep"]
        result["groups, twice as deep, taught"] = grouped(bench, many, *deep, taught=True)
    keep("slicing", result, quick)


if __name__ == "__main__":
    main()
