"""What pruning costs: held masks in a training step; scores and global masks of 25 M weights."""

import torch
from common import arguments, interleaved, keep, machine, ratios, summary
from torch import nn
from torchvision.models import resnet50

from structopt import descent, networks, pruning, training

SPARSITY, STEPS = 0.9, 5
NETWORKS = {"LeNet-300-100": networks.LeNet300, "ResNet-20": networks.ResNet20}
BATCHES = {"LeNet-300-100": (32, 128), "ResNet-20": (32,)}


def batches(device: torch.device, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.randn(size, 1, 28, 28, device=device), torch.arange(size, device=device) % 10)
        for _ in range(STEPS)
    ]


def holding(model: nn.Module, size: int, rounds: int, device: torch.device) -> dict[str, object]:
    """Training steps with masks held, over the same steps without; and the call alone."""
    model = model.to(device)
    after = pruning.hold(pruning.find_masks(pruning.score(model), SPARSITY))
    optimizer, data = descent.fused_adamw(model, 1e-3), batches(device, size)

    def loop(**options: object) -> None:
        training.train(
            model, data, training.supervised(), optimizer, epochs=1, device=device,
            progress=False, **options,
        )  # fmt: skip

    def calls() -> None:
        for _ in range(STEPS):
            after(model)

    after(model)
    loops = {"plain": loop, "held": lambda: loop(after_step=after), "calls": calls}
    seconds = interleaved(loops, rounds, device)
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "held / plain": ratios(seconds["held"], seconds["plain"]),
        "calls / plain": ratios(seconds["calls"], seconds["plain"]),
    }


def scoring(rounds: int, device: torch.device) -> dict[str, object]:
    model = resnet50().to(device)  # ranked without a floor, its last layer would be emptied

    def masks() -> None:
        scores = pruning.score(model)
        pruning.find_masks(scores, SPARSITY, scope=pruning.Global(floor=0.01))

    seconds = interleaved({"masks": masks}, rounds, device)["masks"]
    weights = sum(p.numel() for p in model.parameters())
    return {"network": "ResNet-50", "weights": weights, "seconds": summary(seconds)}


def main() -> None:
    options = arguments(__doc__).parse_args()
    device, rounds = torch.device(options.device), 2 if options.quick else 15
    result = {
        "machine": machine(device),
        "hold": {
            f"{name}, batch {size}": holding(make(), size, rounds, device)
            for name, make in NETWORKS.items()
            for size in BATCHES[name]
        },
        "score and mask globally": scoring(max(1, rounds // 3), device),
        "settings": {"sparsity": SPARSITY, "steps a loop": STEPS, "rounds": rounds},
    }
    keep("pruning-cost", result, options.quick)


if __name__ == "__main__":
    main()
