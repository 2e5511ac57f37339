"""A small network with all that pruning couples, data for it, and a short training."""

import torch
from torch import nn

from structopt import training


def network(device):
    layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)
    return nn.Sequential(*layers).to(device)


class Tied(nn.Module):
    """One weight in two layers, each with inputs of its own; the second is called by keyword."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(input=self.first(x).relu() * 3)


def batches(device, count=4):
    def one():
        return torch.randn(16, 1, 6, 6, device=device), torch.randint(0, 4, (16,), device=device)

    return [one() for _ in range(count)]


def fit(model, data, epochs=1, objective=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    where = next(model.parameters()).device
    training.train(
        model, data, objective or training.supervised(), optimizer, epochs=epochs, device=where,
        autocast=None, **options,
    )  # fmt: skip
    return model
