"""Scenarios that give the same weights on one process and on several. Started by tests."""

import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as Parallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from structopt import data, descent, distributed, files, pruning
from structopt.training import evaluate, supervised, train


def examples(count, dtype=torch.float64):
    inputs = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(7))
    return data.Examples(inputs.to(dtype), (inputs.mean((1, 2, 3)) > 0).long())


def network(dropout=0.0):
    torch.manual_seed(distributed.rank())  # the weights of rank 0 are what all begin with
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(64, 2)
    )


def fit(model, batches, objective=None, optimizer=None, **settings):
    settings = {"epochs": 2, "autocast": None, **settings}
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    return train(model, batches, objective or supervised(F.cross_entropy), optimizer, **settings)


def plain(device, **settings):
    """44 examples in batches of 16: the last is smaller, and 11 more leave one that is odd."""
    model = network().double()
    batches = data.batches(examples(55), 16, augment=[data.Flip()])
    history = fit(model, batches, device=device, **settings)
    return model.state_dict(), history


def float32(device):
    model = network()
    history = fit(model, data.batches(examples(55, torch.float32), 16), device=device)
    return model.state_dict(), history


def everything(device):
    """Accumulated, clipped, scheduled, averaged."""
    model = network().double()
    batches = data.batches(examples(55), 8)
    with mock.patch.object(Parallel, "no_sync", autospec=True, side_effect=nullcontext) as local:
        history = fit(
            model, batches, device=device, accumulate=3, clip=0.1, average=0.9,
            schedule=descent.cosine(),
        )  # fmt: skip
    # 7 batches are steps of 3, 3 and 1: twice 2 + 2 + 0 of them have nothing to send.
    assert local.call_count == (8 if distributed.world_size() > 1 else 0)
    return history.averaged.state_dict(), history


def a_batch_of_one(device):
    """9 examples in batches of 4: in the last, one process has nothing of its own."""
    model = network().double()
    history = fit(model, data.batches(examples(9), 4), device=device)
    return model.state_dict(), history


def loader(device):
    """A plain shuffling DataLoader: the processes must draw the same order."""
    torch.manual_seed(5 + distributed.rank())
    given = examples(55)
    model = network().double()
    torch.manual_seed(5 + distributed.rank())
    loader = DataLoader(TensorDataset(given.inputs, given.targets), 16, shuffle=True)
    history = fit(model, loader, device=device)
    return model.state_dict(), history


def own_layers(device):
    """An objective that is a module with weights of its own, and reads the model's parts."""

    class Hinted(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3 + distributed.rank())
            self.hint = nn.Linear(64, 2).double()

        def forward(self, model, batch):
            inputs, targets = batch
            middle = model[:4](inputs)
            return F.cross_entropy(self.hint(middle) + model(inputs), targets)

    model, objective = network().double(), Hinted()
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.1)
    history = fit(model, data.batches(examples(55), 16), objective, optimizer, device=device)
    return {**model.state_dict(), **objective.state_dict()}, history


def own_layers_of_a_wrapped_model(device):
    """Its wrapper knows nothing of the objective's weights, which would go their own ways."""

    class Hinted(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3 + distributed.rank())
            self.hint = nn.Linear(2, 2).double()

        def forward(self, model, batch):
            return F.cross_entropy(self.hint(model(batch[0])), batch[1])

    model, objective = network().double().to(device), Hinted()
    wrapped = distributed.wrap(model)
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.1)
    history = fit(wrapped, data.batches(examples(55), 16), objective, optimizer, device=device)
    return {**model.state_dict(), **objective.state_dict()}, history


def pruned(device):
    """Masks that grow while gradients are accumulated and momentum pulls: equal everywhere."""
    model = network().double()
    after = pruning.PruneWhileTraining(pruning.Gradual(0.6, 1, 5, every=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    history = fit(
        model, data.batches(examples(55), 8), None, optimizer, device=device, accumulate=2,
        after_step=after,
    )  # fmt: skip
    assert all(not model.get_parameter(n)[~m].any() for n, m in after.masks.items())
    assert [int(m.sum()) for m in after.masks.values()] == [14, 51]
    return model.state_dict(), history


def regrown(device):
    """Where connections move to is what the averaged gradients say."""
    model = network().double()
    chance = torch.Generator().manual_seed(4)  # the same masks in each process
    scores = {n: torch.rand(p.shape, generator=chance) for n, p in model.named_parameters()}
    masks = pruning.find_masks({n: s for n, s in scores.items() if s.ndim > 1}, 0.7)
    after = pruning.RegrowWhileTraining(masks, end=9, every=2, fraction=0.5)
    history = fit(model, data.batches(examples(55), 16), device=device, after_step=after)
    assert any(not torch.equal(m, masks[n]) for n, m in after.masks.items())
    return model.state_dict(), history


SCENARIOS = [plain, float32, everything, a_batch_of_one, loader, own_layers]
SCENARIOS += [own_layers_of_a_wrapped_model, pruned, regrown]


def check_resumption(device, folder):
    """With dropout: each process's own generators are saved too."""
    found = []
    for path, epochs in [("a", [3]), ("b", [1, 3])]:
        for number in epochs:
            model = network(dropout=0.5)
            torch.manual_seed(distributed.rank() + number)
            if number == epochs[0]:
                torch.manual_seed(distributed.rank() + 11)
            batches = data.batches(examples(55, torch.float32), 16)
            checkpoint = folder / f"{path}.safetensors"
            fit(model, batches, device=device, epochs=number, checkpoint=checkpoint)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def check_refusals(device):
    model, outside = network(), nn.Linear(2, 2).to(device)
    batches = data.batches(examples(55, torch.float32), 16)
    optimizer = torch.optim.SGD([*model.parameters(), *outside.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="would not be averaged"):
        fit(model, batches, None, optimizer, device=device)

    def objective(model, batch):  # only one process meets it; all must stop
        wrong = distributed.rank() == 1
        return F.cross_entropy(model(batch[0]), batch[1]) * (float("nan") if wrong else 1)

    def early(model, batch):
        return model[:4](batch[0]).square().mean()

    if distributed.world_size() > 1:
        with pytest.raises(RuntimeError, match="finished reduction") as caught:
            fit(network(), batches, early, device=device)
        assert "unused_parameters=True" in caught.value.__notes__[0]
    with pytest.raises(FloatingPointError, match="epoch 1, step 1"):
        fit(network(), batches, objective, device=device)


def check_parts(device):
    """What a loop of one's own needs."""
    batches = data.batches(examples(10, torch.float32), 5)
    mine = [inputs for inputs, _ in distributed.shard(batches)]
    everyone = distributed.gather(mine)
    for number, (inputs, _) in enumerate(batches.epoch(0)):
        assert torch.equal(torch.cat([part[number] for part in everyone]), inputs)
    assert distributed.shard(distributed.shard(batches)).batches is batches
    mean = distributed.mean(torch.tensor([float(distributed.rank())], device=device))
    assert mean.item() == (distributed.world_size() - 1) / 2

    given = examples(16, torch.float32)
    dealt = TensorDataset(given.inputs, given.targets)
    dealt = DataLoader(dealt, 4, sampler=DistributedSampler(dealt, seed=1))
    assert distributed.shard(dealt) is dealt
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 2))
    wrapped = distributed.wrap(model.to(device))
    fit(wrapped, dealt, device=device)
    states = distributed.gather({k: v.cpu() for k, v in model.state_dict().items()})
    assert all(torch.equal(states[0]["0.weight"], state["0.weight"]) for state in states)
    scores = distributed.gather(evaluate(model, given))
    assert len(set(scores)) == 1


def main(folder):
    with distributed.join() as device:
        assert distributed.world_size() == 2
        for scenario in SCENARIOS:
            state, history = scenario(device)
            losses = {"losses": torch.tensor(history.losses, dtype=torch.float64)}
            name = f"{scenario.__name__}-{distributed.rank()}"
            files.save_tensors(folder / name, {**state, **losses}, {})
        check_resumption(device, folder)
        check_refusals(device)
        check_parts(device)
    assert distributed.world_size() == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
