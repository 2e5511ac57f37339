"""Examples as tensors, batches as slices of them, and real data inside the package."""

from structopt.data.batching import Augmentation, Batches, Flip, Shift, batches
from structopt.data.examples import Examples, from_dataset
from structopt.data.fashion import MEAN, STD, fashion_mnist

__all__ = [
    "MEAN",
    "STD",
    "Augmentation",
    "Batches",
    "Examples",
    "Flip",
    "Shift",
    "batches",
    "fashion_mnist",
    "from_dataset",
]
