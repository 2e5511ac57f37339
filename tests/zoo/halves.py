"""Half of every free group, on every network of the zoo: how many are exact, how many refused.

    python tests/zoo/halves.py torchvision|timm|transformers [name …]

One JSON line for each network; nothing is downloaded, weights are random.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import torch
from networks import FAMILIES, Entry, randomise
from torch import nn

from structopt.channels import ChannelGroup, channel_groups, take


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
    every, entry = FAMILIES[family]
    for name in names or every():
        try:
            row = measure(entry(name))
        except Exception as problem:
            row = {"error": f"{type(problem).__name__}: {str(problem)[:300]}"}
        print(json.dumps({"name": name, **row}), flush=True)


if __name__ == "__main__":
    main()
