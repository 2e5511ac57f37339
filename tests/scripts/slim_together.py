"""Slimmable training that gives the same weights on one process and on several."""

import sys
from pathlib import Path

import torch
from torch import nn
from train_together import examples, fit

from structopt import data, distributed, files
from structopt.slicing import Sandwich, Slimmable

IMAGE = torch.zeros(1, 1, 6, 6, dtype=torch.float64)


def slimmable(norm=nn.Identity):
    torch.manual_seed(distributed.rank())  # the weights of rank 0 are what all begin with
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), norm(8), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(32, 2),
    ).double()  # fmt: skip
    return Slimmable(model, IMAGE, [0.25, 0.5, 0.75])


def sandwich(device, **settings):
    """44 examples in batches of 16, a width drawn for each batch."""
    model = slimmable()
    history = fit(model, data.batches(examples(55), 16), Sandwich(between=1), device=device)
    return model.state_dict(), history


def check_statistics(device):
    """Norms of every width are kept alike by all processes."""
    model = slimmable(nn.BatchNorm2d)
    fit(model, data.batches(examples(55), 16), Sandwich(between=3), device=device)
    states = distributed.gather({k: v.cpu() for k, v in model.state_dict().items()})
    moved = [name for name in states[0] if "running_mean" in name]
    assert len(moved) == 4
    for name, value in model.named_parameters():
        assert torch.equal(states[0][name], states[-1][name]), name
        assert value.grad is not None
    for name in moved:
        assert states[0][name].abs().min() > 0


def main(folder):
    with distributed.join() as device:
        assert distributed.world_size() == 2
        state, history = sandwich(device)
        losses = {"losses": torch.tensor(history.losses, dtype=torch.float64)}
        files.save_tensors(folder / f"sandwich-{distributed.rank()}", {**state, **losses}, {})
        check_statistics(device)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
