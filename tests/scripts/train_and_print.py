"""Train with everything that has a state; print a digest of what came out. Started by tests."""

import argparse
import hashlib
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from structopt import data, descent, devices
from structopt.training import supervised, train


class Noisy(Dataset):
    """Examples that change at each look, by every generator a data set may draw from."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(1)  # noqa: NPY002
        return self.examples.inputs[index] + noise, self.examples.targets[index]


def examples(count=40):
    inputs = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(7))
    return data.Examples(inputs, (inputs.mean((1, 2, 3)) > 0).long())


def feed(kind):
    if kind == "batches":
        return data.batches(examples(), 8, augment=[data.Flip(), data.Shift(1)])
    if kind == "sampler":  # its generator lies two steps inside
        order = RandomSampler(range(40), generator=torch.Generator())
        return DataLoader(Noisy(examples()), batch_sampler=BatchSampler(order, 8, False))
    settings = {"workers": {"num_workers": 2}, "generator": {"generator": torch.Generator()}}
    return DataLoader(Noisy(examples()), 8, shuffle=True, **settings.get(kind, {}))


class Shrink:
    """An after_step with a state of its own."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, step):
        self.calls += 1
        with torch.no_grad():
            model[7].weight.mul_(1 - 0.01 * self.calls)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


class Hinted(nn.Module):
    """An objective with a layer of its own."""

    def __init__(self):
        super().__init__()
        self.hint = nn.Linear(2, 2)

    def forward(self, model, batch):
        inputs, targets = batch
        return F.cross_entropy(self.hint(model(inputs)).float(), targets)


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip


def optimizer_of(kind, parameters):
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)
    if kind == "nadam":  # whose product of momenta is a number in float32
        return torch.optim.NAdam(parameters, lr=0.01)
    if kind == "fused":
        return torch.optim.AdamW(parameters, lr=0.01, fused=True)
    if kind == "descent":
        return descent.Descent(parameters, descent.adamw(0.01))
    return torch.optim.Adam(parameters, lr=0.01, amsgrad=True, foreach=True)


def run(seed=0, *, batches="batches", optimizer="adam", parts="", stop=None, device="cpu", **rest):
    """Train from scratch as a script would; ``stop(step)`` is called after each step."""
    devices.seed_everything(seed)
    model, objective, hinted = network(), supervised(), Hinted()
    parameters = [*model.parameters()]
    if "hint" in parts:
        objective = hinted
    elif "outside" in parts:  # weights that only the optimiser knows
        hinted.to(device)
        objective = lambda model, batch: hinted(model, batch)  # noqa: E731
    elif "half" in parts:  # so large that the first steps overflow, and the scale is lowered
        objective = lambda model, batch: 64 * supervised()(model, batch)  # noqa: E731
    elif "double" in parts:
        model.double()
        objective = lambda model, batch: supervised()(model, (batch[0].double(), batch[1]))  # noqa: E731
    if "hint" in parts or "outside" in parts:
        parameters += [*hinted.parameters()]
    shrink = Shrink()

    def after_step(model, step):
        shrink(model, step)
        if stop:
            stop(step)

    after_step.state_dict, after_step.load_state_dict = shrink.state_dict, shrink.load_state_dict
    settings = {
        "epochs": 3, "schedule": descent.cosine(), "clip": 1.0, "average": 0.9,
        "accumulate": 2 if "accumulate" in parts else 1,
        "autocast": torch.float16 if "half" in parts else None,
    }  # fmt: skip
    history = train(
        model, feed(batches), objective, optimizer_of(optimizer, parameters),
        after_step=after_step, device=device,
        **{**settings, "validate": lambda model: torch.rand(()), **rest},
    )  # fmt: skip
    return history, [model.state_dict(), history.averaged.state_dict(), list(parameters)]


def digest(found):
    """Of every bit of the weights."""
    total = hashlib.sha256()
    for part in found:
        for tensor in part.values() if isinstance(part, dict) else part:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total.update(data.numpy().tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint")
    parser.add_argument("--batches", default="batches")
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()

    def report(step):
        print(f"step {step}", flush=True)

    history, found = run(
        batches=given.batches, checkpoint=given.checkpoint, epochs=given.epochs, stop=report
    )
    print(f"digest {digest(found)} {history.losses[-1]!r}")
