"""Half of every free group of a network, by this package, held against the reference."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from zoo.networks import Entry, randomise
from zoo.reference import Lost, mapped, verdict

from structopt.channels import ChannelGroup, Channels, channel_groups, take


def half(groups: list[ChannelGroup]) -> dict[ChannelGroup, range]:
    return {group: range(0, group.size, 2) for group in groups}


def lost(model: nn.Module, groups: list[ChannelGroup]) -> Lost:
    """What half of these groups takes out of the weights, by what the groups say of themselves."""
    every = dict([*model.named_parameters(), *model.named_buffers()])
    gone: dict[str, torch.Tensor] = {}
    for group, kept in half(groups).items():
        for member in group.members:
            shape = every[member.parameter].shape
            away = torch.from_numpy((member.channel >= 0) & ~np.isin(member.channel, list(kept)))
            beside = [-1 if d == member.dim else 1 for d in range(len(shape))]
            mask = gone.setdefault(member.parameter, torch.zeros(shape, dtype=torch.bool))
            mask |= away.reshape(beside)
    return gone


def halved(model: nn.Module, channels: Channels) -> tuple[nn.Module, list[ChannelGroup], list[str]]:
    """Half of all groups at once; groups that are refused are left whole, and named."""
    groups, refused = list(channels), list[str]()
    while groups:
        try:
            return take(model, half(groups)), groups, refused
        except ValueError as problem:
            named = re.match(r"group '([^']*)'", str(problem))
            refused.append(str(problem)[:300])
            groups = [g for g in groups if named and g.name != named.group(1)]
    return model, [], refused


def locked(model: nn.Module, channels: Channels, groups: list[ChannelGroup]) -> dict[str, str]:
    """The largest weights that lie on no axis of these groups, and what stands in the way."""
    free = {member.parameter for group in groups for member in group.members}
    names = [(p.numel(), name) for name, p in model.named_parameters() if name not in free]
    found: dict[str, str] = {}
    for _, name in sorted(names, reverse=True)[:3]:
        why = {g.frozen for g in channels.frozen for m in g.members if m.parameter == name}
        found[name] = "; ".join(sorted(w for w in why if "size of a kernel" not in w))[:300]
    return found


def measure(entry: Entry, device: str | torch.device = "cpu") -> dict[str, Any]:
    build, example = entry
    torch.manual_seed(0)
    model = randomise(build()).eval().to(device)
    start = time.process_time()
    channels = channel_groups(model, mapped(example, lambda tensor: tensor.to(device)))
    model.double()  # 32 bits would round the weights that `take` multiplies
    found = time.process_time() - start
    made, groups, refused = halved(model, channels)
    total = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {
        "groups": len(groups),
        "refused": refused,
        "locked": locked(model, channels, groups),
        "free": round(channels.freedom(groups), 3),
        "parameters": total,
        "left": round(sum(p.numel() for p in made.parameters()) / total, 3),
        "seconds": round(found, 2),
    }
    if not groups:
        return {"outcome": "nothing", **row}
    gone = lost(model, groups)
    outcome, error = verdict(model, made, gone, channels.example)
    row["all_seconds"] = round(time.process_time() - start, 1)
    return {"outcome": outcome, "error": float(f"{error:.1e}"), **row}
