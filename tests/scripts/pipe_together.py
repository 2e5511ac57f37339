"""Networks in a pipeline of several processes, and what the unsplit networks give."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from slicing_networks import made

from structopt import distributed, files
from structopt.slicing import pipeline, split_stages

SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
CUTS = {  # as many of them as there are processes but one
    "ResNet-18": ["layer2", "layer3"],
    "MobileNet-V2": ["features.7", "features.13"],
    "TinyTransformer": ["layers.0", "layers.1"],
}
BATCH, MICRO = 8, 4


def network(name, device):
    """Evaluation mode: the norms of a micro-batch are then those of the batch."""
    model, x = made(name, device)
    torch.manual_seed(1)
    inputs = torch.randn(BATCH, *x.shape[1:], dtype=x.dtype)
    targets = torch.randint(5, (BATCH,))
    return model, inputs.to(device), targets.to(device)


def alone(name, device):
    """Outputs, loss and gradients of the unsplit network, all of the batch at once."""
    model, inputs, targets = network(name, device)
    outputs = model(inputs)
    loss = nn.functional.cross_entropy(outputs, targets)
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return {**found, "outputs": outputs.detach(), "loss": loss.detach()}


def through(name, device, schedule):
    """What this process has of the same: its gradients, and the outputs and the loss if last."""
    model, inputs, targets = network(name, device)
    rank, last, loss = distributed.rank(), distributed.world_size() - 1, nn.functional.cross_entropy
    stages = split_stages(model, inputs[: BATCH // MICRO], CUTS[name][:last])
    run = pipeline(stages, device, microbatches=MICRO, loss=loss, schedule=schedule)
    losses = []
    given = (inputs,) if rank == 0 else ()
    outputs = run.eval(*given, **({"target": targets} if rank == last else {}))
    for _ in range(2):  # a second step of the same schedule must not add anything
        for weight in stages[rank].parameters():
            weight.grad = None
        losses.clear()
        run.step(*given, **({"target": targets, "losses": losses} if rank == last else {}))
    found = {name: weight.grad for name, weight in stages[rank].named_parameters()}
    if rank == last:
        found |= {"outputs": outputs.detach(), "loss": torch.stack(losses).mean().detach()}
    return found


def refuses(device):
    """What is wrong is said in every process, before anybody waits for another."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.zeros(2, 4)
    stages = split_stages(model, x, ["1"])
    for settings, problem in (
        ({"microbatches": 0}, "microbatches=0: give a whole number, at least 1"),
        ({"microbatches": 2.0}, "microbatches=2.0: give a whole number"),
        ({"microbatches": 2, "schedule": "GPipe"}, "schedule='GPipe': give torch's"),
        ({"microbatches": 2, "timeout": 0}, "timeout=0: give seconds"),
    ):
        with pytest.raises(ValueError, match=problem):
            pipeline(stages, device, **settings)
    norm = nn.BatchNorm1d(4, affine=False)
    shared = nn.Sequential(norm, nn.Linear(4, 4), norm, nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"share a tensor \(0.running_mean, 0.running_mean\)"):
        pipeline(split_stages(shared, x, ["1"]), device, microbatches=2)
    with pytest.raises(ValueError, match="3 stages and 2 processes"):
        pipeline(split_stages(model, x, ["0", "1"]), device, microbatches=2)
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"stages 0 and 1 share a weight \(0.weight, 2.weight\)"):
        pipeline(split_stages(model, x, ["1"]), device, microbatches=2)


def equal(folder, device):
    if distributed.world_size() == 2:
        refuses(device)
    for name in CUTS:
        for label, schedule in SCHEDULES.items():
            found = through(name, device, schedule)
            files.save_tensors(folder / f"{name}-{label}-{distributed.rank()}", found, {})


class Turning(nn.Module):
    """Two inputs, and a value that lies transposed in memory where it is cut."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(2, 6)
        self.norm, self.o = nn.BatchNorm1d(6), nn.Linear(5, 3)
        self.tanh = nn.Tanh()

    def forward(self, x, y):
        x = self.norm(self.a(x).transpose(1, 2)) + self.b(y)[..., None]  # (B, 6, 5)
        x = self.tanh(x.transpose(1, 2))
        return self.o(x.transpose(1, 2)).mean(1)


def adds(device):
    """Gradients of two steps are the sum; running statistics see one micro-batch after another."""
    rank = distributed.rank()
    torch.manual_seed(0)
    turning = Turning()
    frozen = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    frozen[0].requires_grad_(False)
    x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
    two = torch.randn(8, 5, 4).double(), torch.randn(8, 2).double()
    for model, cut, given in (
        (turning, "tanh", two),
        (frozen, "0", (x,)),
        (nn.Sequential(nn.Tanh(), nn.ReLU(), nn.Linear(4, 3)), "1", (x,)),
        (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Tanh()), "1", (x,)),
    ):
        stages = split_stages(model.double().train(), tuple(part[:2] for part in given), [cut])
        loss = nn.functional.cross_entropy
        run = pipeline(stages, device, microbatches=4, loss=loss)
        losses, expected = [], []
        for _ in range(2):
            if rank == 0:
                run.step(*given)
            else:
                run.step(target=y, losses=losses)
            for number in range(4):
                part = [tensor.chunk(4)[number] for tensor in given]
                expected.append(loss(model(*part), y.chunk(4)[number]))
                (expected[-1] / 4).backward()
        own = dict(stages[rank].named_parameters())
        for name, weight in model.named_parameters():
            if name in own and weight.requires_grad:
                torch.testing.assert_close(own[name].grad, weight.grad, rtol=1e-9, atol=1e-12)
        buffers = dict(model.named_buffers())
        for name, buffer in stages[rank].named_buffers():
            torch.testing.assert_close(buffer, buffers[name], rtol=1e-9, atol=1e-12)
        if rank == 1:  # of the last step
            torch.testing.assert_close(torch.stack(losses), torch.stack(expected[4:]))


def shrinks(device):
    """A batch of another size is not sent: the others would read what is left of the one before."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    run = pipeline(split_stages(model, torch.zeros(2, 4), ["1"]), device, microbatches=2, timeout=9)
    first = distributed.rank() == 0
    run.eval(*([torch.ones(4, 4)] if first else []))
    with pytest.raises(RuntimeError) as told:
        run.eval(*([torch.ones(2, 4)] if first else []))
    if first:
        assert "shape (1, 4) after (2, 4)" in str(told.value.__cause__)


def ends(folder, device, how):
    """The last process dies, or stands still, in the middle of a step."""

    rank, last = distributed.rank(), distributed.world_size() - 1

    class Ending(nn.Linear):
        def forward(self, x):
            if rank == last and (folder / "warm").exists():
                if how == "dies":
                    os._exit(1)
                time.sleep(100)
            return super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Ending(4, 4))
    stages = split_stages(model, torch.zeros(2, 4), ["0", "1"][:last], whole=["2"])
    run = pipeline(stages, device, microbatches=4, loss=nn.functional.mse_loss, timeout=10)
    given = [torch.zeros(8, 4)] if rank == 0 else []
    for _ in range(2):
        try:
            run.step(*given, **({"target": torch.zeros(8, 4)} if rank == last else {}))
        except RuntimeError:
            (folder / f"told-{rank}").touch()
            raise
        if rank == 0:
            (folder / "warm").touch()
        torch.distributed.barrier()  # so that all begin the second step


def main(folder, what):
    with distributed.join() as device:
        if what == "equal":
            equal(folder, device)
        elif what == "adds":
            adds(device)
        elif what == "shrinks":
            shrinks(device)
        else:
            ends(folder, device, what)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
