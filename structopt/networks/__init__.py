"""The book's small networks. All take images (B, 1, 28, 28) and return logits (B, classes)."""

from structopt.networks.normalised import ResNet20, StudentNet, TeacherNet
from structopt.networks.plain import LeNet5, LeNet300, SimpleNet
from structopt.networks.transformer import EncoderLayer, TinyTransformer

__all__ = [
    "EncoderLayer",
    "LeNet5",
    "LeNet300",
    "ResNet20",
    "SimpleNet",
    "StudentNet",
    "TeacherNet",
    "TinyTransformer",
]
