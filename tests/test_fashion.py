"""Fashion-MNIST: the embedded sample, the full set's places, and every way a file can be wrong."""

import gzip
import hashlib
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from structopt import data
from structopt.data import fashion

needs_full_set = pytest.mark.skipif(
    not fashion.DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four small files in the place of the full set's; no cache, no Debian."""
    folder = tmp_path / "full"
    folder.mkdir()
    random = np.random.default_rng(0)
    files = []
    for name, (count, *side), _ in fashion.FILES:
        shape = (count // 500, *side)
        array = random.integers(0, 256 if side else 10, shape, dtype=np.uint8)
        content = idx(array)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
        files.append((name, shape, hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(fashion, "FILES", tuple(files))
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.setenv("STRUCTOPT_DATA", str(tmp_path / "cache"))
    return folder


# The sample


def test_the_sample() -> None:
    train, test = data.fashion_mnist()
    for examples in (train, test):
        assert examples.inputs.shape == (10_000, 1, 28, 28)
        assert examples.inputs.dtype == torch.float32
        assert examples.targets.dtype == torch.int64
        assert examples.targets.bincount().tolist() == [1000] * 10
        assert len(examples.classes) == 10
        assert abs(examples.inputs.mean().item()) < 0.02
        assert abs(examples.inputs.std().item() - 1) < 0.02
        assert examples.inputs.min().item() == pytest.approx(-data.MEAN / data.STD)
        assert examples.inputs.max().item() == pytest.approx((1 - data.MEAN) / data.STD)


def test_the_sample_is_read_anew_for_each_caller() -> None:
    train, _ = data.fashion_mnist()
    train.inputs.zero_()
    assert data.fashion_mnist()[0].inputs.any()


@needs_full_set
def test_the_sample_is_what_it_says(tmp_path: Path) -> None:
    """The first 1,000 of each class and the whole test set, against a reader of torchvision's."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    def unpacked(name: str) -> str:
        with gzip.open(fashion.DEBIAN / f"{name}.gz") as file:
            (tmp_path / name).write_bytes(file.read())
        return str(tmp_path / name)

    images = read_image_file(unpacked("train-images-idx3-ubyte"))
    labels = read_label_file(unpacked("train-labels-idx1-ubyte"))
    seen, kept = [0] * 10, []
    for place, label in enumerate(labels.tolist()):
        seen[label] += 1
        if seen[label] <= 1000:
            kept.append(place)
    packed = [torch.tensor(part) for part in fashion.sample()]
    assert torch.equal(packed[0], images[kept])
    assert torch.equal(packed[2], labels[kept].byte())
    assert torch.equal(packed[1], read_image_file(unpacked("t10k-images-idx3-ubyte")))
    assert torch.equal(packed[3], read_label_file(unpacked("t10k-labels-idx1-ubyte")).byte())


@needs_full_set
def test_the_full_set() -> None:
    train, test = data.fashion_mnist(full=True)
    assert (len(train), len(test)) == (60_000, 10_000)
    assert abs(train.inputs.mean().item()) < 1e-3  # MEAN and STD are these images'
    assert abs(train.inputs.std().item() - 1) < 1e-3
    assert torch.equal(test.inputs, data.fashion_mnist()[1].inputs)


@needs_full_set
def test_the_sample_can_be_made_again() -> None:
    """The content: other releases of liblzma may choose other bytes for it."""
    assert fashion.choose(fashion.DEBIAN) == lzma.decompress(fashion.ASSET.read_bytes())


def test_packing_repeats_itself(small: Path) -> None:
    content = fashion.choose(small)
    assert lzma.decompress(fashion.pack(content)) == content
    assert fashion.pack(content) == fashion.pack(content)


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "remove"])
def test_a_damaged_sample_is_named(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(fashion.ASSET.read_bytes())
    content[5_000_000] ^= 1 if harm == "flip" else 0
    keep = {"truncate": 7_000_000, "empty": 0}.get(harm, len(content))
    copy = tmp_path / "sample.xz"
    if harm != "remove":
        copy.write_bytes(content[:keep])
    monkeypatch.setattr(fashion, "ASSET", copy)
    kind = FileNotFoundError if harm == "remove" else ValueError
    fashion.sample.cache_clear()
    with pytest.raises(kind, match=r"sample\.xz is .*install the package again"):
        data.fashion_mnist()


# The full set's places


def check_small(train: data.Examples, test: data.Examples) -> None:
    assert train.inputs.shape == (120, 1, 28, 28)
    assert test.inputs.shape == (20, 1, 28, 28)


def test_a_named_folder_is_read(small: Path) -> None:
    train, test = data.fashion_mnist(full=True, folder=small)
    check_small(train, test)
    with gzip.open(small / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(120, 1, 28, 28)
    want = (torch.tensor(pixels) / 255 - data.MEAN) / data.STD
    torch.testing.assert_close(train.inputs, want)


def test_unpacked_files_and_torchvisions_folder_are_read(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = small / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in small.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    check_small(*data.fashion_mnist(full=True, folder=str(small)))
    check_small(*data.fashion_mnist(full=True, folder=raw))
    monkeypatch.setenv("HOME", str(small.parent))
    check_small(*data.fashion_mnist(full=True, folder=f"~/{small.name}"))


def test_debians_folder_comes_before_the_cache(
    small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small.rename(tmp_path / "debian")
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(fashion, "_download", lambda cache: pytest.fail("downloaded"))
    check_small(*data.fashion_mnist(full=True))
    assert not (tmp_path / "cache").exists()


def test_a_path_in_the_place_of_full_is_refused(small: Path) -> None:
    with pytest.raises(ValueError, match=r"full is True or False, .* folder="):
        data.fashion_mnist(full=small)


def test_a_folder_without_full_is_refused(small: Path) -> None:
    with pytest.raises(ValueError, match="add full=True"):
        data.fashion_mnist(folder=small)


@pytest.mark.parametrize("folder", ["missing", "full/train-labels-idx1-ubyte.gz", "."])
def test_a_folder_without_the_files_is_named(small: Path, folder: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither train-images.*four files"):
        data.fashion_mnist(full=True, folder=small.parent / folder)


def mnist_lookalike(content: bytes) -> bytes:
    return content[:-1] + bytes((content[-1] ^ 1,))


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda content: b"\x00\x00\x09" + content[3:], "is no IDX file"),
        (lambda content: content[:6], "is no IDX file"),
        (lambda content: b"", "is no IDX file"),
        (lambda content: b"<html>" + content, "is no IDX file"),
        (lambda content: content[:4] + b"\x00\x00\x00\x07" + content[8:], r"declares.*\(7,"),
        (lambda content: content[:-1], "does not hold"),
        (lambda content: content + b"\x00", "does not hold"),
        (lambda content: content + bytes(50_000_000), "does not hold"),
        (mnist_lookalike, "is not Fashion-MNIST's.*same names"),
    ],
    ids=["type", "short", "empty", "page", "count", "less", "more", "bomb", "lookalike"],
)
def test_a_wrong_file_is_named(small: Path, name: str, harm: object, said: str) -> None:
    path = small / f"{name}.gz"
    path.write_bytes(gzip.compress(harm(gzip.decompress(path.read_bytes())), 1))  # type: ignore
    with pytest.raises(ValueError, match=rf"{name}\.gz {said}.*fetch it again"):
        data.fashion_mnist(full=True, folder=small)


@pytest.mark.parametrize("harm", ["truncate", "flip", "garble", "no gzip"])
def test_a_damaged_archive_is_named(small: Path, harm: str) -> None:
    path = small / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    middle = len(content) // 2
    harmed = {
        "truncate": content[:middle],
        "flip": content[:middle] + bytes(50) + content[middle + 50 :],
        "garble": content[:10] + bytes(8 * [255]) + content[18:],
        "no gzip": b"not found",
    }[harm]
    path.write_bytes(harmed)
    with pytest.raises(ValueError, match=r"idx3-ubyte\.gz .*fetch it again"):
        data.fashion_mnist(full=True, folder=small)


# The download


def fetch(
    small: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None
) -> list[str]:
    """Let torchvision's class copy the small files, or write half of them and fail."""
    asked: list[str] = []

    def download(root: str, download: bool) -> None:
        asked.append(root)
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for packed in sorted(small.glob("*.gz")):
            (raw / packed.name).write_bytes(packed.read_bytes())
            if error:
                raise error

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", download)
    return asked


def test_a_download_fills_the_cache_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fetch(small, monkeypatch)
    check_small(*data.fashion_mnist(full=True))
    check_small(*data.fashion_mnist(full=True))
    assert len(asked) == 1
    cache = small.parent / "cache"
    assert Path(asked[0]).parent == cache  # a rename within one disk is all or nothing
    assert [path.name for path in cache.iterdir()] == ["fashion-mnist"]


@pytest.mark.parametrize("error", [RuntimeError("no route"), OSError(28, "No space left")])
def test_a_failed_download_leaves_nothing(
    small: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fetch(small, monkeypatch, error)
    with pytest.raises(FileNotFoundError, match=r"download failed \(.*folder=.*dataset-fashion"):
        data.fashion_mnist(full=True)
    assert list((small.parent / "cache").iterdir()) == []


def test_a_faster_process_is_no_error(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fetch(small, monkeypatch)
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        rename(small, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    check_small(*data.fashion_mnist(full=True))
    assert len(asked) == 1


def test_a_cache_that_cannot_be_written_is_named(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fetch(small, monkeypatch)
    (small.parent / "cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cache cannot be written.*STRUCTOPT_DATA"):
        data.fashion_mnist(full=True)
    assert not asked


def test_a_read_only_cache_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(small, monkeypatch)

    def refuse(*args: object, **names: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)  # as root, chmod would refuse nothing
    with pytest.raises(OSError, match=r"cannot be written.*Permission denied.*STRUCTOPT_DATA"):
        data.fashion_mnist(full=True)
