"""Networks without a branch: SimpleNet and the two LeNets."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from structopt.networks import images
from structopt.networks.images import SIDE


class SimpleNet(nn.Module):
    """Two 3×3 convolutions, one pooling, one linear layer: 29,066 parameters.

    The network with which the book begins. ``widths`` are the channels of the two convolutions.

    >>> import torch
    >>> from structopt.networks import SimpleNet
    >>> SimpleNet()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, widths: Sequence[int] = (32, 64), classes: int = 10) -> None:
        super().__init__()
        first, second = widths
        self.conv1 = nn.Conv2d(1, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.fc = nn.Linear(second * 4 * 4, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu(self.conv1(images.checked(inputs)))  # (B, 32, 28, 28)
        x = F.relu(self.conv2(x))  # (B, 64, 28, 28)
        x = F.avg_pool2d(x, 6)  # (B, 64, 4, 4): the last four rows and columns are not read
        logits: Tensor = self.fc(x.flatten(1))
        return logits


class LeNet300(nn.Module):
    """LeNet-300-100, a perceptron with two hidden layers: 266,610 parameters.

    LeCun et al., 1998, "Gradient-based learning applied to document recognition"; with ReLU, as
    the pruning papers have it since Han et al., 2015.

    >>> import torch
    >>> from structopt.networks import LeNet300
    >>> LeNet300()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, widths: Sequence[int] = (300, 100), classes: int = 10) -> None:
        super().__init__()
        first, second = widths
        self.fc1 = nn.Linear(SIDE * SIDE, first)
        self.fc2 = nn.Linear(first, second)
        self.fc3 = nn.Linear(second, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu(self.fc1(images.checked(inputs).flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


class LeNet5(nn.Module):
    """LeNet-5 in the form of the pruning papers, 20-50-500: 431,080 parameters.

    LeCun et al., 1998, "Gradient-based learning applied to document recognition"; widths as in
    Han et al., 2015, "Learning both weights and connections for efficient neural networks".

    >>> import torch
    >>> from structopt.networks import LeNet5
    >>> LeNet5()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, widths: Sequence[int] = (20, 50, 500), classes: int = 10) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(1, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * 4 * 4, third)
        self.fc2 = nn.Linear(third, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(images.checked(inputs)), 2)  # (B, 20, 12, 12)
        x = F.max_pool2d(self.conv2(x), 2)  # (B, 50, 4, 4)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits
