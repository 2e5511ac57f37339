"""A server with the last stages of a network; its port is the first line it prints."""

import socket

import torch
from torch import nn

from structopt.slicing import serve, split_stages


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    return nn.Sequential(*layers).double()


def stages():
    return split_stages(network(), torch.zeros(1, 1, 8, 8).double(), ["1"])


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        serve(stages()[1], listener, timeout=3)
