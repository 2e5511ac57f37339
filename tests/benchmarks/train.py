"""Time of a training step: the naive loop, a hand-tuned loop, and structopt.training.train.

All three train the same network on the same images, in batches of the same size:

naive      a Dataset that makes a PIL image of each example, ToTensor, Normalize; DataLoader; fp32
tuned      plain torch: one tensor, index batches, channels-last, autocast, fused AdamW
structopt  data.batches, descent.fused_adamw, training.train

The overhead is what a step takes longer than in the tuned loop, on a model of 50 weights: of the
loop alone, and with structopt's loss (which checks its labels) and optimiser (which does not
decay biases, so it has two groups) in place of torch's.
"""

import torch
from common import arguments, clock, interleaved, keep, machine, ratios, summary
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from structopt import data, descent, devices, networks, training
from structopt.data import Examples, fashion

BATCH = 128
NETWORKS = (networks.SimpleNet, networks.StudentNet, networks.LeNet5)


class Pictures(Dataset):
    """Item by item, as torchvision.datasets.FashionMNIST gives them."""

    def __init__(self, count: int) -> None:
        images, _, labels, _ = fashion.sample()
        self.images, self.labels = images[:count], [int(label) for label in labels[:count]]
        scale = transforms.Normalize((data.MEAN,), (data.STD,))
        self.transform = transforms.Compose([transforms.ToTensor(), scale])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def naive(model: nn.Module, count: int, device: torch.device):
    model = model.to(device)
    loader = DataLoader(Pictures(count), batch_size=BATCH, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()

    def epoch() -> float:
        running = 0.0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            running += loss.item()
        return running / len(loader)

    return epoch


def tuned(model: nn.Module, examples: Examples, size: int, device: torch.device):
    dtype = devices.autocast_dtype(device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    model = model.to(device, memory_format=torch.channels_last)
    inputs, targets = examples.inputs.to(device), examples.targets.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def epoch() -> None:
        order = torch.randperm(len(inputs)).to(device)
        for start in range(0, len(inputs), size):
            chosen = order[start : start + size]
            x, y = inputs.index_select(0, chosen), targets.index_select(0, chosen)
            optimizer.zero_grad()
            if dtype is None:
                loss = F.cross_entropy(model(x), y)
            else:
                with torch.autocast(device.type, dtype=dtype):
                    loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return epoch


def ours(model: nn.Module, examples: Examples, size: int, device: torch.device, bare: bool = False):
    model = model.to(device)
    batches = data.batches(examples, size, device=device)
    objective, optimizer = training.supervised(), descent.fused_adamw(model, 1e-3)
    if bare:
        objective = training.supervised(F.cross_entropy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def epoch() -> None:
        training.train(
            model, batches, objective, optimizer, epochs=1, device=device, progress=False
        )

    return epoch


def compare(network: type[nn.Module], steps: int, rounds: int, device: torch.device) -> dict:
    count = steps * BATCH
    examples = data.fashion_mnist()[0][:count]
    seconds = interleaved(
        {
            "naive": naive(network(), count, device),
            "tuned": tuned(network(), examples, BATCH, device),
            "structopt": ours(network(), examples, BATCH, device),
        },
        rounds,
        device,
    )
    step = {name: summary([s / steps * 1000 for s in each]) for name, each in seconds.items()}
    return {
        "milliseconds per step": step,
        "times as fast as naive": ratios(seconds["naive"], seconds["structopt"]),
        "time relative to tuned": ratios(seconds["structopt"], seconds["tuned"]),
    }


def overhead(steps: int, rounds: int, device: torch.device) -> dict:
    """Microseconds a step that structopt's loop adds, on a model that takes next to none."""
    examples = Examples(torch.randn(steps * 8, 4), torch.randint(0, 10, (steps * 8,)))
    seconds = interleaved(
        {
            "tuned": tuned(nn.Linear(4, 10), examples, 8, device),
            "loop alone": ours(nn.Linear(4, 10), examples, 8, device, bare=True),
            "with loss and optimiser": ours(nn.Linear(4, 10), examples, 8, device),
        },
        rounds,
        device,
    )
    other = seconds.pop("tuned")
    step = {"tuned": summary([s / steps * 1e6 for s in other])}
    for name, mine in seconds.items():
        pairs = zip(mine, other, strict=True)
        step[name] = summary([(a - b) / steps * 1e6 for a, b in pairs])
    return step


def main() -> None:
    options = arguments(__doc__).parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)  # small networks are fastest so, and the processor's time is theirs
    steps, rounds = (2, 2) if options.quick else (20, 15)
    result = {
        "benchmark": "train",
        "machine": machine(device),
        "clock": clock(device)[0],
        "batch": BATCH,
        "rounds": rounds,
        "steps a round": steps,
        "networks": {n.__name__: compare(n, steps, rounds, device) for n in NETWORKS},
        "overhead in microseconds a step": overhead(100 if options.quick else 1000, rounds, device),
    }
    keep("train", result, options.quick)


if __name__ == "__main__":
    main()
