"""Half of every free group, on every network of the zoo: how many are exact, how many refused.

    python tests/zoo/coverage.py torchvision [name …]

One JSON line for each network; nothing is downloaded, weights are random.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from structopt.channels import ChannelGroup, channel_groups, take

Entry = tuple[Callable[[], nn.Module], Any]


def randomise(model: nn.Module) -> nn.Module:
    """Norms and statistics that are not all one and zero, so that an error shows."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if "Norm" in type(module).__name__ and isinstance(weight, torch.Tensor):
            with torch.no_grad():
                weight.uniform_(0.5, 1.5, generator=generator)
                if isinstance(bias, torch.Tensor):
                    bias.normal_(0, 0.2, generator=generator)
    return model


def torchvision_entry(name: str) -> Entry:
    """The network as torchvision builds it, and a small input that it accepts."""
    from torchvision import models

    def image(size: int, batch: int = 1) -> torch.Tensor:
        return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))

    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if "rcnn" in name or name.startswith(("retinanet", "ssd", "fcos")):
        options["weights_backbone"] = None
        if not name.startswith("ssd"):
            options |= {"min_size": 96, "max_size": 128}
        return lambda: models.get_model(name, **options), ([image(96)[0]],)
    if name.startswith(("fcn", "deeplab", "lraspp")):
        options["weights_backbone"] = None
        return lambda: models.get_model(name, **options), image(64)
    if name.startswith("raft"):
        return lambda: models.get_model(name, **options), (image(128), image(128))
    if name in ("mvit_v1_b", "mvit_v2_s"):
        return lambda: models.get_model(name, **options), torch.randn(1, 3, 16, 224, 224)
    if name.startswith(("r3d", "mc3", "r2plus1d", "s3d", "swin3d")):
        return lambda: models.get_model(name, **options), torch.randn(1, 3, 16, 64, 64)
    if name.startswith("vit"):
        patch = int(name.split("_")[-1])
        options["image_size"] = 2 * patch
        return lambda: models.get_model(name, **options), image(2 * patch)
    size = {"inception_v3": 299, "maxvit_t": 224, "alexnet": 64}.get(name, 64)
    return lambda: models.get_model(name, **options), image(size)


def torchvision_names() -> list[str]:
    from torchvision import models

    return [n for n in models.list_models() if not n.startswith("quantized")]


def half(model: nn.Module, groups: list[ChannelGroup]) -> nn.Module:
    return take(model, {g: range(0, g.size, 2) for g in groups})


def measure(entry: Entry) -> dict[str, Any]:
    """Analyse, take half of all free groups at once; drop and count those that are refused."""
    build, example = entry
    torch.manual_seed(0)
    model = randomise(build()).eval()
    start = time.process_time()
    channels = channel_groups(model, example)
    found = time.process_time() - start
    total = sum(p.numel() for p in model.parameters())
    groups, refused = list(channels), 0
    try:
        made = half(model, groups)
    except ValueError as problem:
        print(str(problem)[:500], file=sys.stderr)
        kept = []
        for group in groups:
            try:
                half(model, [group])
                kept.append(group)
            except ValueError as problem:
                print(group, str(problem)[:300], file=sys.stderr)
        refused, groups = len(groups) - len(kept), kept
        made = half(model, groups) if groups else model
    left = sum(p.numel() for p in made.parameters())
    return {
        "groups": len(groups),
        "refused": refused,
        "averaged": sum(g.averaged for g in groups),
        "free": round(channels.freedom(groups), 3),
        "left": round(left / total, 3),
        "found_s": round(found, 2),
        "total_s": round(time.process_time() - start, 1),
    }


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    family, *names = sys.argv[1:]
    every = {"torchvision": torchvision_names}[family]()
    for name in names or every:
        try:
            row = measure(torchvision_entry(name))
        except Exception as problem:
            row = {"error": f"{type(problem).__name__}: {str(problem)[:300]}"}
        print(json.dumps({"name": name, **row}), flush=True)


if __name__ == "__main__":
    main()
