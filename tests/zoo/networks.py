"""The networks of the zoo: how each is built, with random weights, and a small input for it.

torchvision: every network but the quantisable ones. timm: of each module one small
member (`timm.json`, made by `python -m zoo.networks`). transformers: the classes of `language`,
in tiny configurations. Small ones come first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo.language import transformers_entry, transformers_names

Entry = tuple[Callable[[], nn.Module], Any]  # what builds the network, what it is called with
TIMM = Path(__file__).with_name("timm.json")


def randomise(model: nn.Module) -> nn.Module:
    """Weights that are not all one and zero, so that an error shows; layer scales of some size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_mean"):
                tensor.normal_(0, 0.2, generator=generator)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point() and tensor.numel() > 1 and is_flat(tensor):
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor), alpha=0.2)
    return model


def is_flat(tensor: torch.Tensor) -> bool:
    """All entries alike, as a norm starts."""
    return bool((tensor == tensor.flatten()[0]).all())


def image(size: int | tuple[int, int], batch: int = 1) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def torchvision_names() -> list[str]:
    from torchvision import models

    names = [n for n in models.list_models() if not n.startswith("quantized")]
    sizes = {n: next(iter(models.get_model_weights(n))).meta["num_params"] for n in names}
    return sorted(names, key=lambda name: (sizes[name], name))


def torchvision_entry(name: str) -> Entry:
    from torchvision import models

    options: dict[str, Any] = {"weights": None}
    example: Any = image({"inception_v3": 299, "maxvit_t": 224}.get(name, 64))
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if "rcnn" in name or name.startswith(("retinanet", "ssd", "fcos")):
        options["weights_backbone"] = None
        # Boxes whatever their scores, or nothing comes out with random weights.
        options["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.0
        if not name.startswith("ssd"):
            options |= {"min_size": 96, "max_size": 128}
        example = ([image(96)[0]],)
    elif name.startswith(("fcn", "deeplab", "lraspp")):
        options["weights_backbone"] = None
    elif name.startswith("raft"):
        example = (image(128), image(128) + 0.1)
    elif name.startswith(("mvit", "r3d", "mc3", "r2plus1d", "s3d", "swin3d")):
        size = 224 if name.startswith(("mvit", "s3d")) else 64
        example = torch.stack([image(size) for _ in range(16)], 2)
    elif name.startswith("vit"):
        options["image_size"] = size = 2 * int(name.split("_")[-1])
        example = image(size)
    return lambda: models.get_model(name, **options), example


def timm_names() -> list[str]:
    return sorted((row["name"] for row in json.loads(TIMM.read_text())), key=promise)


def timm_entry(name: str) -> Entry:
    import timm

    size = timm.get_pretrained_cfg(name).input_size
    example: Any = image(size[1:]) if size[0] == 3 else torch.randn(1, *size)
    return lambda: timm.create_model(name, pretrained=False), example


FAMILIES: dict[str, tuple[Callable[[], list[str]], Callable[[str], Entry]]] = {
    "torchvision": (torchvision_names, torchvision_entry),
    "timm": (timm_names, timm_entry),
    "transformers": (transformers_names, transformers_entry),
}


SIZES = "test zepto atto femto pico nano xxtiny xxt xxs xt xs tiny ti t mini micro lite small s"


def promise(name: str) -> tuple[int, int, int, str]:
    """A key that puts first the names that promise a small network."""
    words = re.findall(r"[a-z]+|\d+", name)
    ranks = [SIZES.split().index(word) for word in words if word in SIZES.split()]
    numbers = [int(word) for word in words if word.isdigit() and int(word) not in (8, 16, 224)]
    return min(ranks, default=99), min(numbers, default=99), len(name), name


def pick_timm() -> list[dict[str, str]]:
    """Of each module of timm the network whose name promises the smallest."""
    import timm

    names = {module: timm.list_models(module=module) for module in timm.list_modules()}
    return [{"module": m, "name": min(n, key=promise)} for m, n in names.items() if n]


if __name__ == "__main__":
    TIMM.write_text(json.dumps(pick_timm(), indent=1) + "\n")
