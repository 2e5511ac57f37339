"""Networks with batch normalisation: teacher, student, ResNet-20."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from structopt.networks import images


class ConvNorm(nn.Sequential):
    """A 3×3 convolution, batch normalisation, ReLU (Ioffe and Szegedy, 2015)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class TeacherNet(nn.Module):
    """A residual network to learn from: 116,602 parameters.

    The shape of ResNet-9 (after He et al., 2016, "Deep residual learning for image recognition"),
    with 16, 32 and 64 channels.

    >>> import torch
    >>> from structopt.networks import TeacherNet
    >>> TeacherNet()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = ConvNorm(1, 16)
        self.conv2 = ConvNorm(16, 32)
        self.residual2 = nn.Sequential(ConvNorm(32, 32), ConvNorm(32, 32))
        self.conv3 = ConvNorm(32, 64)
        self.residual3 = nn.Sequential(ConvNorm(64, 64), ConvNorm(64, 64))
        self.fc = nn.Linear(64, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.conv1(images.checked(inputs))  # (B, 16, 28, 28)
        x = F.max_pool2d(self.conv2(x), 2)  # (B, 32, 14, 14)
        x = x + self.residual2(x)
        x = F.max_pool2d(self.conv3(x), 2)  # (B, 64, 7, 7)
        x = x + self.residual3(x)
        logits: Tensor = self.fc(x.amax((2, 3)))
        return logits


class StudentNet(nn.Module):
    """A plain network to be taught: 3,778 parameters, 1/31 of :class:`TeacherNet`.

    >>> import torch
    >>> from structopt.networks import StudentNet
    >>> StudentNet()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = ConvNorm(1, 8)
        self.conv2 = ConvNorm(8, 16)
        self.conv3 = ConvNorm(16, 16)
        self.fc = nn.Linear(16, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(images.checked(inputs)), 2)  # (B, 8, 14, 14)
        x = F.max_pool2d(self.conv2(x), 2)  # (B, 16, 7, 7)
        logits: Tensor = self.fc(self.conv3(x).mean((2, 3)))
        return logits


class ResidualBlock(nn.Module):
    """relu(x + f(x)) with f two 3×3 convolutions (He et al., 2016).

    Where the shape changes, a 1×1 convolution takes the place of the bare x (their option B).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(inputs)))
        return F.relu(self.shortcut(inputs) + self.bn2(self.conv2(x)))


class ResNet20(nn.Module):
    """ResNet-20 of He et al., 2016, for 28×28 grey images: 272,186 parameters at width 16.

    Three stages of three blocks, of ``width``, 2·``width`` and 4·``width`` channels.

    >>> import torch
    >>> from structopt.networks import ResNet20
    >>> ResNet20(width=8)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stage1 = self._stage(width, width, stride=1)
        self.stage2 = self._stage(width, 2 * width, stride=2)
        self.stage3 = self._stage(2 * width, 4 * width, stride=2)
        self.fc = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        first = ResidualBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(ResidualBlock(outputs, outputs) for _ in range(2)))

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images.checked(inputs))))  # (B, 16, 28, 28)
        x = self.stage1(x)
        x = self.stage2(x)  # (B, 32, 14, 14)
        x = self.stage3(x)  # (B, 64, 7, 7)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
