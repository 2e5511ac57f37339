"""Half the channels: how much faster, against how many times fewer MACs.

Four networks of torchvision, with random weights (speed does not ask for others), lose half the
channels of every group; widths are rounded up to multiples of 8. Dense and half network take turns
in one run, as they are, with channels last, and compiled by torch.compile with frozen weights, for
1 and for 16 pictures. "Of the ideal" is the ratio of times divided by the ratio of MACs.

For MobileNetV2 also where the time goes (by hooks around its layers), and what other widths do.
Each part is written as soon as it is there.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import arguments, clock, interleaved, keep, kept, machine, ratios, summary
from torch import nn
from torchvision import models

from structopt import measure
from structopt.pruning import Limits, prune_channels

EIGHTS = Limits(multiple_of=8)
# Half the heads of 64 channels each: a rounding of 6 heads to 8 would not be half.
HALF_THE_HEADS = Limits(multiple_of=2, ratios={"conv_proj#2": 0.0})
NETWORKS = {
    "ResNet-50": (models.resnet50, EIGHTS),
    "VGG-16-BN": (models.vgg16_bn, EIGHTS),
    "ViT-B/16": (models.vit_b_16, HALF_THE_HEADS),
    "MobileNetV2": (models.mobilenet_v2, EIGHTS),
}
WIDTHS = (1, 8, 16, 32)  # multiples that MobileNetV2's widths are rounded up to
ROUNDS = {1: 20, 16: 4}  # by the batch


def forward(model: nn.Module, mode: str, images: torch.Tensor) -> Callable[[], object]:
    model, images = copy.deepcopy(model), images.clone()
    if mode != "eager":
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    run: Any = model
    if mode == "compiled":  # frozen weights: norms are folded, and far fewer kernels to build
        run = torch.compile(model, dynamic=False, options={"freezing": True})

    def once() -> None:
        with torch.no_grad():
            run(images)

    return once


def compare(
    dense: nn.Module, half: nn.Module, modes: list[str], images: torch.Tensor, rounds: int
) -> dict[str, Any]:
    device = images.device
    sizes = {"dense": dense, "half": half}
    fewer = measure.cost(dense, images[:1]).macs / measure.cost(half, images[:1]).macs
    loops = {
        f"{mode} {name}": forward(model, mode, images)
        for mode in modes
        for name, model in sizes.items()
    }
    seconds = interleaved(loops, rounds, device)
    found: dict[str, Any] = {}
    for mode in modes:
        before, after = (seconds[f"{mode} {name}"] for name in sizes)
        faster = ratios(before, after)
        found[mode] = {
            "milliseconds": {
                name: summary([1000 * s for s in seconds[f"{mode} {name}"]]) for name in sizes
            },
            "times as fast": faster,
            "of the ideal": round(faster["median"] / fewer, 3),
        }
    torch.compiler.reset()
    return found


def halve(name: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    make, limits = NETWORKS[name]
    dense = make(weights=None).eval().to(device)
    return dense, prune_channels(dense, pictures(1, device), 0.5, limits=limits).eval()


def pictures(count: int, device: torch.device) -> torch.Tensor:
    return torch.randn(count, 3, 224, 224, device=device)


def network(name: str, modes: list[str], quick: bool, device: torch.device) -> Iterator[Any]:
    """What is known of a network, again after each batch size."""
    dense, half = halve(name, device)
    macs = [measure.cost(model, pictures(1, device)).macs for model in (dense, half)]
    found: dict[str, Any] = {"MACs": macs, "times fewer MACs": round(macs[0] / macs[1], 3)}
    for batch, rounds in ROUNDS.items():
        if not (quick and batch > 1):
            images = pictures(batch, device)
            found[f"batch {batch}"] = compare(dense, half, modes, images, 2 if quick else rounds)
            yield found


def kind(layer: nn.Module) -> str:
    if not isinstance(layer, nn.Conv2d):
        return "norms and activations"
    return "depthwise convolutions" if layer.groups > 1 else "other convolutions"


def where_time_goes(model: nn.Module, images: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Milliseconds and MACs by kind of layer, channels last; medians over the rounds."""
    now = clock(images.device)[1]
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    macs: dict[str, int] = {}
    spent: dict[str, float] = {}
    begun = [0.0]

    def enter(layer: nn.Module, inputs: object) -> None:
        begun[0] = now()

    def leave(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        spent[kind(layer)] = spent.get(kind(layer), 0) + now() - begun[0]
        if isinstance(layer, nn.Conv2d):
            each = layer.weight[0].numel() * output[0].numel()
            macs[kind(layer)] = macs.get(kind(layer), 0) + each

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.ReLU6):
            layer.register_forward_pre_hook(enter)
            layer.register_forward_hook(leave)
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        spent.clear(), macs.clear()
        with torch.no_grad():
            model(images)
        for name, seconds in spent.items() if turn else ():
            times.setdefault(name, []).append(1000 * seconds)
    return {
        name: {"milliseconds": summary(each), "MACs": macs.get(name, 0)}
        for name, each in times.items()
    }


def depthwise(quick: bool, device: torch.device) -> dict[str, Any]:
    dense, half = halve("MobileNetV2", device)
    images, rounds = pictures(1 if quick else 16, device), 2 if quick else 7
    found: dict[str, Any] = {
        "where the time goes": {
            name: where_time_goes(model, images, rounds)
            for name, model in (("dense", dense), ("half", half))
        }
    }
    for multiple in WIDTHS[:1] if quick else WIDTHS:
        limits = Limits(multiple_of=multiple)
        half = prune_channels(dense, pictures(1, device), 0.5, limits=limits).eval()
        macs = [measure.cost(model, pictures(1, device)).macs for model in (dense, half)]
        found.setdefault("widths", {})[str(multiple)] = {
            "times fewer MACs": round(macs[0] / macs[1], 3),
            **compare(dense, half, ["channels last"], images, rounds),
        }
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--network", choices=[*NETWORKS, "depthwise"], help="only this part")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    modes = ["eager", "channels last"] + ([] if options.quick else ["compiled"])
    result = {} if options.quick else kept("channel-speed", device)
    result |= {
        "benchmark": "channel speed",
        "machine": machine(device),
        "clock": clock(device)[0],
        "rounds by batch": {str(batch): rounds for batch, rounds in ROUNDS.items()},
    }
    for name in NETWORKS:
        if options.network in {None, name} and not (options.quick and name != "MobileNetV2"):
            for found in network(name, modes, options.quick, device):
                result.setdefault("networks", {})[name] = found
                keep("channel-speed", result, options.quick)
    if options.network in {None, "depthwise"}:
        result["MobileNetV2"] = depthwise(options.quick, device)
        keep("channel-speed", result, options.quick)


if __name__ == "__main__":
    main()
