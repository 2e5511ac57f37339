"""Hints on one process and on several. Started by tests."""

import sys
from pathlib import Path

import torch
from torch import nn

from structopt import data, distillation, distributed, files
from structopt.training import train


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.Tanh(), nn.Flatten(), nn.Linear(width * 16, 2)
    ).double()


def hinted():
    """22 examples in batches of 8: the last is smaller."""
    inputs = torch.randn(22, 1, 6, 6, generator=torch.Generator().manual_seed(7)).double()
    examples = data.Examples(inputs, (inputs.mean((1, 2, 3)) > 0).long())
    teacher, student = network(6, 1), network(3, 2 + distributed.rank())
    layers = {"1": "1"}
    objective = distillation.together(
        distillation.hints(teacher, student, layers, inputs[:2]).double(),
        distillation.from_features(teacher, layers, weight=10.0),
        distillation.from_logits(teacher),
    )
    optimizer = torch.optim.SGD([*student.parameters(), *objective.parameters()], lr=0.05)
    train(
        student, data.batches(examples, 8), objective, optimizer, epochs=3, device="cpu",
        autocast=None,
    )  # fmt: skip
    return {**student.state_dict(), **objective.state_dict()}


if __name__ == "__main__":
    with distributed.join():
        state = hinted()
        files.save_tensors(Path(sys.argv[1]) / f"{distributed.rank()}.safetensors", state, {})
