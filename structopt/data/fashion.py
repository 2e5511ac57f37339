"""The bytes of Fashion-MNIST (Xiao et al., 2017): the embedded sample, and where the full set lies.

``python -m structopt.data.fashion FOLDER`` makes the embedded file from the full set in FOLDER.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import sys
import tempfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from structopt.data.examples import Examples

Pixels = npt.NDArray[np.uint8]  # (N, 28, 28) images or (N,) labels

CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)

MEAN, STD = 0.2860, 0.3530  # of the pixels of the 60,000 training images, scaled to 0 ... 1

ASSET = Path(__file__).parents[1] / "assets" / "fashion_mnist.xz"
ASSET_SHA256 = "868010450dc921da7951f61239ae441b61fc2f2a4b0b869273d4b4bace90dfd5"
PER_CLASS = 1000  # of the training images
SAMPLE = ((10_000, 28, 28), (10_000, 28, 28), (10_000,), (10_000,))  # in the asset's order

DEBIAN = Path("/usr/share/datasets/fashion-mnist")

# Name, shape and SHA-256 of each unpacked file. MNIST's own files have the same names and sizes.
FILES = (
    (
        "train-images-idx3-ubyte",
        (60_000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    (
        "t10k-images-idx3-ubyte",
        (10_000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    (
        "train-labels-idx1-ubyte",
        (60_000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    (
        "t10k-labels-idx1-ubyte",
        (10_000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)


def fashion_mnist(
    *, full: bool = False, folder: str | os.PathLike[str] | None = None
) -> tuple[Examples, Examples]:
    """Train and test examples of Fashion-MNIST: inputs (N, 1, 28, 28) float32, targets int64.

    Xiao et al., 2017, "Fashion-MNIST: a novel image dataset for benchmarking machine learning
    algorithms". Pixels p in 0 ... 1 become (p - MEAN) / STD. The sample inside the package has
    the first 1,000 training images of each class and all 10,000 test images. ``full=True`` reads
    60,000 + 10,000 from ``folder``; else from Debian's package ``dataset-fashion-mnist``; else
    from torchvision's download into $STRUCTOPT_DATA or ~/.cache/structopt. A missing file raises
    FileNotFoundError, a damaged one ValueError.

    >>> train, test = fashion_mnist()
    >>> train, train.classes[int(train.targets[0])]
    (Examples(10000 of (1, 28, 28), 10 classes), 'ankle boot')
    """
    if not isinstance(full, bool):
        raise ValueError(f"full is True or False, not {full!r}: a path is given by folder=...")
    if folder is not None and not full:
        raise ValueError("folder is read only for the full set: add full=True or leave folder out")
    images, test_images, labels, test_labels = full_set(folder) if full else sample()

    def examples(images: Pixels, labels: Pixels) -> Examples:
        inputs = torch.tensor(images).unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)
        return Examples(inputs, torch.tensor(labels).long(), CLASSES)

    return examples(images, labels), examples(test_images, test_labels)


def full_set(folder: str | os.PathLike[str] | None = None) -> tuple[Pixels, ...]:
    """Train images, test images, train labels and test labels of the full set.

    Read from ``folder`` if one is named; else from Debian's package ``dataset-fashion-mnist``;
    else from the cache folder ($STRUCTOPT_DATA, or ~/.cache/structopt), which torchvision's
    download fills first.
    """
    if folder is not None:
        given = Path(folder).expanduser()
        nested = given / "FashionMNIST" / "raw"  # where torchvision puts them
        place = nested if nested.is_dir() else given
        return tuple(_read_idx(place, *file) for file in FILES)
    cache = Path(os.environ.get("STRUCTOPT_DATA") or "~/.cache/structopt").expanduser()
    for place in (DEBIAN, cache / "fashion-mnist"):
        if place.is_dir():
            return full_set(place)
    return full_set(_download(cache))


def _read_idx(folder: Path, name: str, shape: tuple[int, ...], sha256: str) -> Pixels:
    packed, plain = folder / f"{name}.gz", folder / name
    path = plain if plain.exists() and not packed.exists() else packed
    header, size = 4 * (1 + len(shape)), int(np.prod(shape))
    try:
        with gzip.open(path) if path is packed else path.open("rb") as file:
            content = file.read(header + size + 1)  # no more, whatever a hostile file unpacks to
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{folder} holds neither {name}.gz nor {name}: name a folder with the four files of "
            "Fashion-MNIST, or leave out full=True for the sample inside the package"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        wrong: str | None = f"is truncated or corrupt ({error})"
    else:
        same = hashlib.sha256(content).hexdigest() == sha256
        wrong = None if same else _difference(content, shape)
    if wrong:
        raise ValueError(f"{path} {wrong}: remove it and fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _difference(content: bytes, shape: tuple[int, ...]) -> str:
    magic = bytes((0, 0, 8, len(shape)))  # IDX: two zeros, type (8: uint8), number of dimensions
    header = 4 + 4 * len(shape)
    if content[:4] != magic or len(content) < header:
        return f"is no IDX file of bytes in {len(shape)} dimensions"
    counted = tuple(int(n) for n in np.frombuffer(content[4:header], ">u4"))
    if counted != shape:
        return f"declares the shape {counted} where Fashion-MNIST has {shape}"
    if len(content) != header + int(np.prod(shape)):
        return f"does not hold the {shape} bytes that it declares"
    return "is not Fashion-MNIST's, though it has its shape (MNIST's files bear the same names)"


def _download(cache: Path) -> Path:
    """Let torchvision fetch the set; the finished folder gets its name only at the end."""
    from torchvision.datasets import FashionMNIST  # type: ignore[import-untyped]

    target = cache / "fashion-mnist"
    remedy = (
        "name a folder that holds the set (folder=...), install Debian's package "
        "dataset-fashion-mnist, or leave out full=True for the sample inside the package"
    )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        workplace = tempfile.TemporaryDirectory(dir=cache)
    except OSError as error:
        raise OSError(
            f"{cache} cannot be written ({error}): set STRUCTOPT_DATA to a folder that can, "
            f"{remedy}"
        ) from error
    with workplace:
        try:
            FashionMNIST(workplace.name, download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"the full Fashion-MNIST is not on this machine and the download failed ({error}): "
                f"{remedy}"
            ) from error
        try:
            (Path(workplace.name) / "FashionMNIST" / "raw").rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


@lru_cache(maxsize=1)
def sample() -> tuple[Pixels, ...]:
    """The embedded images and labels, in the order and shapes of :data:`SAMPLE`.

    The training half is the first 1,000 images of each class, in the full set's order; the test
    half is the full set's.
    """
    try:
        packed = ASSET.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{ASSET} is missing: install the package again") from None
    if hashlib.sha256(packed).hexdigest() != ASSET_SHA256:
        raise ValueError(f"{ASSET} is truncated or corrupt: install the package again")
    content, start, parts = lzma.decompress(packed), 0, []
    for shape in SAMPLE:
        size = int(np.prod(shape))
        parts.append(np.frombuffer(content, np.uint8, size, start).reshape(shape))
        start += size
    return tuple(parts)


def choose(folder: str | os.PathLike[str]) -> bytes:
    """The embedded sample's content, from the full set in ``folder``."""
    images, test_images, labels, test_labels = full_set(folder)
    kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:PER_CLASS] for c in range(10)]))
    parts = (images[kept], test_images, labels[kept], test_labels)
    return b"".join(part.tobytes() for part in parts)


def pack(content: bytes) -> bytes:
    """The embedded file's bytes. The same content gives the same bytes."""
    # A window as long as the content, so that each image can refer to any other.
    window = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24}
    return lzma.compress(content, filters=[window])


if __name__ == "__main__":
    ASSET.write_bytes(pack(choose(sys.argv[1])))
    sys.stdout.write(f"{hashlib.sha256(ASSET.read_bytes()).hexdigest()}  {ASSET}\n")
