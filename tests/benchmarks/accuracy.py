"""Test accuracy of the book's networks: three seeds, from the embedded sample and the full set.

``--choose`` trains the candidates on five sixths of the training images (seed 0) and compares them
on the rest. The final runs take the best of these, or DEFAULT where none were compared on this
device. Test images are seen by the final runs alone.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from common import arguments, keep, kept, machine, mean_and_spread
from torch import nn

from structopt import data, descent, losses, networks, training
from structopt.data import Examples, Flip, Shift

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Recipe:
    """AdamW, one cycle of the learning rate, smoothed labels, flips and shifts."""

    lr: float
    epochs: int
    size: int = 64
    smoothing: float = 0.1
    shift: int = 0


CANDIDATES = {
    "sample": (Recipe(0.01, 20), Recipe(0.02, 20), Recipe(0.01, 20, smoothing=0.0)),
    "full": (
        Recipe(0.02, 10),
        Recipe(0.01, 40, size=128),
        Recipe(0.02, 40, size=128),
        Recipe(0.02, 40, size=128, smoothing=0.0),
        Recipe(0.02, 40, size=128, shift=1),
    ),
}
DEFAULT = {
    ("SimpleNet", "sample"): Recipe(0.02, 20),
    ("TeacherNet", "sample"): Recipe(0.01, 20),
    ("SimpleNet", "full"): Recipe(0.01, 40, size=128),
    ("TeacherNet", "full"): Recipe(0.01, 40, size=128),
}


def load(source: str, quick: bool) -> tuple[Examples, Examples]:
    train, test = data.fashion_mnist(full=source == "full")
    return (train[:1000], test[:1000]) if quick else (train, test)


def fit(name: str, recipe: Recipe, train: Examples, seed: int, device: torch.device) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = getattr(networks, name)()
    augment = [Flip(), *([Shift(recipe.shift)] if recipe.shift else [])]
    training.train(
        model,
        data.batches(train, recipe.size, seed=seed, augment=augment, device=device),
        training.supervised(partial(losses.cross_entropy, label_smoothing=recipe.smoothing)),
        descent.fused_adamw(model, recipe.lr),
        epochs=recipe.epochs,
        device=device,
        schedule=descent.one_cycle(),
    )
    return model


def choose(name: str, source: str, device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """The candidates and their accuracy on held-out training images, best first."""
    train, held_out = load(source, quick)[0].split(1 / 6)
    found = []
    for recipe in CANDIDATES[source]:
        model = fit(name, recipe, train, 0, device)
        score = training.evaluate(model, held_out, device=device)
        found.append({"validation accuracy": round(100 * score, 2), **asdict(recipe)})
        print(name, source, found[-1], flush=True)
    return sorted(found, key=lambda row: -row["validation accuracy"])


def final(
    name: str, source: str, recipe: Recipe, device: torch.device, quick: bool
) -> dict[str, Any]:
    train, test = load(source, quick)
    scores = []
    for seed in SEEDS[:1] if quick else SEEDS:
        model = fit(name, recipe, train, seed, device)
        scores.append(round(100 * training.evaluate(model, test, device=device), 2))
        print(name, source, f"seed {seed}: {scores[-1]} %", flush=True)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training images": len(train),
        "recipe": asdict(recipe),
        "test accuracy in %": scores,
        **mean_and_spread(scores),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--choose", action="store_true", help="compare the candidates instead")
    parser.add_argument("--network", choices=sorted({name for name, _ in DEFAULT}))
    parser.add_argument("--source", choices=["sample", "full"])
    options = parser.parse_args()
    device = torch.device(options.device)
    result = kept("accuracy", device)
    result |= {"benchmark": "accuracy", "machine": machine(device)}
    result["settings"] = (
        "the best candidate on held-out training images, one seed; test images used once"
    )
    for (name, source), recipe in DEFAULT.items():
        if options.network not in {None, name} or options.source not in {None, source}:
            continue
        case = f"{name}, {source}"
        if options.choose:
            found = choose(name, source, device, options.quick)
            result.setdefault("candidates", {})[case] = found
        else:
            best = {**result.get("candidates", {}).get(case, [asdict(recipe)])[0]}
            best.pop("validation accuracy", None)
            found = final(name, source, Recipe(**best), device, options.quick)
            result.setdefault("results", {})[case] = found
        keep("accuracy", result, options.quick)  # hours of work: keep each part


if __name__ == "__main__":
    main()
