"""Networks for the tests of `slicing`: of torchvision, small but whole, and transformers."""

import torch
import torchvision.models as tv
from channel_networks import filled
from torch import nn

from structopt import networks


def vgg():
    features = tv.vgg.make_layers([8, "M", 16, "M", 16, "M"], batch_norm=True)
    model = tv.VGG(nn.Sequential(features, nn.AdaptiveAvgPool2d(7)), 5, init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(16 * 49, 12), nn.ReLU(), nn.Linear(12, 5))
    return model


TORCHVISION = {
    "ResNet-18": lambda: tv.resnet18(num_classes=5),
    "ResNeXt": lambda: tv.ResNet(
        tv.resnet.Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4, num_classes=5
    ),
    "VGG": vgg,
    "MobileNet-V2": lambda: tv.mobilenet_v2(num_classes=5, width_mult=0.25),
    "SqueezeNet": lambda: tv.squeezenet1_1(num_classes=5),
    "DenseNet": lambda: tv.DenseNet(8, (2, 2, 2), 16, num_classes=5),
    "ShuffleNet-V2": lambda: tv.shufflenet_v2_x0_5(num_classes=5),
    "ViT": lambda: tv.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5),
}
OWN = {
    "TinyTransformer": lambda: networks.TinyTransformer(dim=16, depth=3),
    "ResNet-20": lambda: networks.ResNet20(width=4),
}
ALL = {**TORCHVISION, **OWN}


def made(name, device):
    """The network in double precision, with norms that are not fresh, and inputs for it."""
    torch.manual_seed(0)
    model = filled(ALL[name]().double()).to(device).eval()
    shape = (2, 1, 28, 28) if name in OWN else (2, 3, 32, 32)
    return model, torch.randn(*shape, dtype=torch.float64, device=device)
