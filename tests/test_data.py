"""Examples, batches and augmentations: laws on every device."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ChainDataset, Dataset, IterableDataset, TensorDataset

from structopt import data
from structopt.data import Batches, Examples, Flip, Shift


def numbered(count: int, device: torch.device | str = "cpu") -> Examples:
    """Example i holds i, as its input and as its target."""
    number = torch.arange(count, device=device)
    return Examples(number.float()[:, None], number)


def numbers(batches: Iterator[tuple[Tensor, Tensor]]) -> list[list[int]]:
    return [targets.tolist() for _, targets in batches]


# Examples


THREE = torch.tensor(3)  # as `for index in torch.randperm(5)` gives it


def test_length_index_and_names(device: torch.device) -> None:
    examples = Examples(torch.rand(5, 3, device=device), torch.arange(5, device=device), ("a",) * 5)
    assert len(examples) == 5
    for index in (2, -1, slice(1, 4), slice(None, None, 2), torch.tensor([3, 0]), [4, 4], THREE):
        part = examples[index]
        rows = [int(index)] if isinstance(index, int) or index is THREE else index
        assert torch.equal(part.inputs, examples.inputs[rows])
        assert torch.equal(part.targets, examples.targets[rows])
        assert part.classes == examples.classes
        assert part.inputs.device == examples.inputs.device
    mask = examples.targets > 2
    assert examples[mask].targets.tolist() == [3, 4]
    assert repr(examples) == "Examples(5 of (3,), 5 classes)"
    with pytest.raises(IndexError):
        examples[5]


def test_examples_move(device: torch.device) -> None:
    moved = numbered(4).to(device)
    assert moved.inputs.device.type == moved.targets.device.type == device.type


def test_examples_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        numbered(3).inputs = torch.zeros(3)  # type: ignore[misc]


ZEROS = torch.zeros(4, 1, 2, 2)
LABELS = torch.arange(4)


@pytest.mark.parametrize(
    ("inputs", "targets", "said"),
    [
        (ZEROS[:3], LABELS, r"\(3, 1, 2, 2\).*\(4,\).*one target for each"),
        (ZEROS[:0], LABELS[:0], "at least one"),
        (torch.tensor(1.0), torch.tensor(1), r"shape \(\)"),
        (ZEROS.byte(), LABELS, r"torch\.uint8.*\.float\(\) / 255"),
        (ZEROS.long(), LABELS, r"torch\.int64.*\(4, 1, 2, 2\).*\.float\(\) / 255"),
        (ZEROS[:, 0, 0].int(), LABELS, r"torch\.int32.*int64"),
        (ZEROS, LABELS.int(), r"torch\.int32.*targets\.long\(\)"),
        (ZEROS, LABELS.bool(), r"torch\.bool"),
        (ZEROS, LABELS + 7, "label 10 where 10 classes.*0 to 9"),
        (ZEROS, LABELS - 1, "label -1"),
        (ZEROS, torch.tensor([0.0, 1.0, float("nan"), 0.0]), r"targets\[2\].*NaN or infinity"),
        (ZEROS, LABELS.to("meta"), "cpu.*meta"),
        (ZEROS.numpy(), LABELS, r"inputs are ndarray.*torch\.as_tensor\(inputs\)"),
        (ZEROS, LABELS.tolist(), r"targets are list.*torch\.as_tensor\(targets\)"),
    ],
)
def test_bad_examples_are_named(inputs: Any, targets: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Examples(inputs, targets, tuple("abcdefghij"))


@given(st.integers(0, 3), st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_the_first_bad_input_is_named(place: int, value: float) -> None:
    inputs = ZEROS.clone()
    inputs[place, 0, 1, 0] = inputs[3, 0, 1, 1] = value
    with pytest.raises(ValueError, match=rf"inputs\[{place}\] holds NaN or infinity"):
        Examples(inputs, LABELS)


def test_a_bad_input_is_named_on_the_device(device: torch.device) -> None:
    inputs = ZEROS.to(device).index_fill(0, torch.tensor([1], device=device), float("nan"))
    with pytest.raises(ValueError, match=r"inputs\[1\]"):
        Examples(inputs, LABELS.to(device))


def test_good_examples() -> None:
    Examples(torch.zeros(4, 9, dtype=torch.int64), LABELS)  # token ids
    Examples(torch.zeros(4, 9, dtype=torch.int64), torch.zeros(4, 9, dtype=torch.int64))
    Examples(torch.zeros(4, dtype=torch.int64), LABELS)
    Examples(ZEROS.half(), torch.rand(4, 2))  # regression
    Examples(ZEROS, torch.tensor([0, -100, 1, -100]), ("a", "b"))  # -100: no label


@given(st.integers(2, 60), st.data(), st.integers(0, 5))
def test_a_split_is_a_partition(count: int, draw: st.DataObject, seed: int) -> None:
    size = draw.draw(st.integers(1, count - 1))
    train, validation = numbered(count).split(size, seed=seed)
    assert len(validation) == size
    assert sorted([*train.targets.tolist(), *validation.targets.tolist()]) == list(range(count))
    assert torch.equal(train.inputs[:, 0].long(), train.targets)
    again = numbered(count).split(size / count, seed=seed)[1]
    assert torch.equal(again.targets, validation.targets)


def test_a_split_depends_on_the_seed_alone(device: torch.device) -> None:
    torch.manual_seed(99)
    first = numbered(50, device).split(20)[1].targets.tolist()
    assert first == numbered(50).split(20)[1].targets.tolist()
    assert first != numbered(50).split(20, seed=1)[1].targets.tolist()
    assert first != sorted(first)


@pytest.mark.parametrize("validation", [0, 10, -1, 0.0, 1.0, 0.01, 1.5])
def test_a_split_with_an_empty_part_is_refused(validation: float) -> None:
    with pytest.raises(ValueError, match=r"split\(.*of 10 examples"):
        numbered(10).split(validation)


# from_dataset


class Listed(Dataset[object]):
    def __init__(self, *items: object) -> None:
        self.items, self.classes = items, ["one", "two"]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]  # raises no IndexError at the end, like many data sets do not


class Streamed(IterableDataset[object]):
    def __iter__(self) -> Iterator[object]:
        yield from ((torch.full((2,), float(i)), float(i)) for i in range(3))


class Counted(Streamed):
    def __len__(self) -> int:  # for the progress bar of a loader
        return 3


def test_any_dataset_fits() -> None:
    inputs, targets = torch.rand(5, 2), torch.arange(5)
    examples = data.from_dataset(TensorDataset(inputs, targets))
    assert torch.equal(examples.inputs, inputs)
    assert torch.equal(examples.targets, targets)
    listed = data.from_dataset(Listed((torch.zeros(3), 0), (torch.ones(3), 1)))
    assert listed.targets.tolist() == [0, 1]
    assert listed.classes == ("one", "two")
    for kind in (np.int32, np.uint8, np.int64):
        counted = Listed((torch.zeros(3), kind(0)), (torch.ones(3), kind(1)))
        for classes in (None, 2):
            counted.classes = classes
            assert data.from_dataset(counted).targets.tolist() == [0, 1]
    for stream in (Streamed(), Counted(), ChainDataset([Streamed()])):
        streamed = data.from_dataset(stream)
        assert streamed.targets.tolist() == [0.0, 1.0, 2.0]
        assert streamed.inputs.shape == (3, 2)


def test_torchvisions_datasets_fit() -> None:
    from torchvision.datasets import FakeData
    from torchvision.transforms import ToTensor

    examples = data.from_dataset(FakeData(4, (3, 8, 8), transform=ToTensor()))
    assert examples.inputs.shape == (4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"item 0 is Image.*ToTensor\(\)"):
        data.from_dataset(FakeData(4, (3, 8, 8)))


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ((), "empty"),
        ((torch.zeros(3),), "item 0 is Tensor.*pairs"),
        (((torch.zeros(3), 0, 0),), "item 0 is tuple.*pairs"),
        (((torch.zeros(3), 0), (torch.zeros(4), 0)), r"item 1 has shape \(4,\), item 0 \(3,\)"),
        (((torch.zeros(3), 0), (torch.zeros(3), torch.zeros(2))), r"item 1 has shape \(2,\)"),
        (((torch.zeros(3), 5),), "label 5 where 2 classes"),
        (((torch.zeros(3), "coat"),), "the target of item 0 is str: give a number"),
    ],
)
def test_a_dataset_that_does_not_fit_is_named(items: tuple[object, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        data.from_dataset(Listed(*items))


# Batches


@given(st.integers(1, 50), st.integers(1, 60), st.booleans(), st.booleans(), st.integers(0, 9))
def test_an_epoch_shows_every_example_once(
    count: int, size: int, shuffle: bool, drop_last: bool, epoch: int
) -> None:
    if drop_last and size > count:
        return
    batches = Batches(numbered(count), size, shuffle=shuffle, drop_last=drop_last)
    shown = numbers(batches.epoch(epoch))
    assert len(shown) == len(batches)
    assert all(len(batch) == size for batch in shown[:-1])
    flat = [number for batch in shown for number in batch]
    kept = count - count % size if drop_last else count
    assert len(flat) == len(set(flat)) == kept
    if not shuffle:
        assert flat == list(range(kept))


def test_inputs_stay_with_their_targets(device: torch.device) -> None:
    for inputs, targets in data.batches(numbered(20), 6, device=device):
        assert inputs.device.type == targets.device.type == device.type
        assert torch.equal(inputs[:, 0].long(), targets)


def test_examples_are_moved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[object] = []

    def to(self: Examples, device: object) -> Examples:
        moves.append(device)
        return self

    monkeypatch.setattr(Examples, "to", to)
    batches = data.batches(numbered(6), 2, device="cuda:1")
    list(batches.epoch(0))
    list(data.batches(numbered(6), 2))
    assert moves == ["cuda:1"]


def test_the_order_depends_on_seed_and_epoch_alone(device: torch.device) -> None:
    batches = data.batches(numbered(40), 16, seed=3, device=device)
    torch.manual_seed(99)
    history = [numbers(iter(batches)) for _ in range(3)]
    torch.rand(5)
    fresh = data.batches(numbered(40), 16, seed=3)
    assert [numbers(fresh.epoch(i)) for i in (2, 0, 1)] == [history[i] for i in (2, 0, 1)]
    assert history[0] != history[1] != history[2] != history[0]
    other = data.batches(numbered(40), 16, seed=4)
    assert numbers(other.epoch(0)) not in history


def test_the_order_is_pinned() -> None:
    """A run that was written down can be repeated with a later version."""
    assert numbers(data.batches(numbered(6), 3).epoch(0)) == [[1, 3, 4], [0, 5, 2]]


def test_an_epoch_can_be_entered_in_its_middle(device: torch.device) -> None:
    images = Examples(torch.rand(30, 1, 6, 6), torch.arange(30)).to(device)
    batches = data.batches(images, 4, augment=[Flip(), Shift(2)])
    whole = list(batches.epoch(5))
    for start in range(len(batches) + 1):
        rest = list(batches.epoch(5, start=start))
        assert len(rest) == len(batches) - start
        for (x, y), (want_x, want_y) in zip(rest, whole[start:], strict=True):
            assert torch.equal(x, want_x)
            assert torch.equal(y, want_y)


def test_augmentation_is_new_in_each_batch_and_epoch(device: torch.device) -> None:
    images = Examples(torch.rand(1, 1, 8, 8).expand(64, 1, 8, 8), torch.arange(64)).to(device)
    batches = data.batches(images, 16, shuffle=False, augment=[Shift(3)])
    seen = [x for epoch in range(2) for x, _ in batches.epoch(epoch)]
    for i, x in enumerate(seen):
        assert not any(torch.equal(x, other) for other in seen[:i])
    assert torch.equal(images.inputs[0], images.inputs[-1])  # the examples are untouched


@pytest.mark.parametrize("size", [0, -3, 2.0, True])
def test_a_batch_size_that_cannot_be_is_named(size: object) -> None:
    with pytest.raises(ValueError, match=r"size=.*at least one"):
        data.batches(numbered(5), size)  # type: ignore[arg-type]


def test_what_is_no_examples_or_list_of_functions_is_named() -> None:
    given = numbered(5)
    with pytest.raises(ValueError, match="not from tuple"):
        data.batches((given.inputs, given.targets), 2)  # type: ignore[arg-type]
    for augment in (Flip(), "flip"):
        with pytest.raises(ValueError, match=r"such as \[Flip\(\)\], not"):
            data.batches(given, 2, augment=augment)  # type: ignore[arg-type]


@pytest.mark.parametrize("shuffle", [False, True])
def test_who_writes_to_a_batch_leaves_the_examples(shuffle: bool, device: torch.device) -> None:
    """As a network that begins with an activation in place does, or an augmentation."""
    examples = numbered(5, device)
    for _ in range(2):
        for inputs, targets in data.batches(examples, 2, shuffle=shuffle, augment=[_negated]):
            inputs.sub_(1)
            targets.zero_()
    assert examples.inputs[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert examples.targets.tolist() == [0, 1, 2, 3, 4]


def _negated(inputs: Tensor, _: torch.Generator) -> Tensor:
    return inputs.neg_()


def test_a_number_of_numpy_is_a_number() -> None:
    given = numbered(10)
    found = [y.tolist() for _, y in data.batches(given, np.int64(4), seed=np.int64(3))]
    assert found == [y.tolist() for _, y in data.batches(given, 4, seed=3)]
    seeded = [given.split(2, seed=seed)[1].targets.tolist() for seed in (3, np.int64(3))]
    assert seeded[0] == seeded[1]
    images = torch.arange(16.0).view(1, 1, 4, 4)
    moved = [Shift(most)(images, torch.Generator().manual_seed(1)) for most in (2, np.int64(2))]
    assert torch.equal(*moved)
    for share in (np.int64(2), np.float32(0.2), np.float64(0.2)):
        assert given.split(share)[1].targets.tolist() == given.split(2)[1].targets.tolist()


def test_batches_that_would_all_be_dropped_are_refused() -> None:
    with pytest.raises(ValueError, match="no batch of 5 examples"):
        data.batches(numbered(5), 6, drop_last=True)


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 4)])
def test_an_epoch_or_start_that_cannot_be_is_named(epoch: int, start: int) -> None:
    with pytest.raises(ValueError, match=f"epoch\\({epoch}, start={start}\\)"):
        data.batches(numbered(6), 2).epoch(epoch, start)


# Augmentations


@given(st.floats(0, 1), st.integers(0, 1000))
def test_a_flip_gives_the_image_or_its_mirror(p: float, seed: int) -> None:
    images = torch.rand(16, 2, 3, 5, dtype=torch.float64)
    flipped = Flip(p)(images, torch.Generator().manual_seed(seed))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    if p in {0.0, 1.0}:
        assert mirrored.all() == bool(p)


def test_a_flip_falls_as_often_as_it_is_said(device: torch.device) -> None:
    images = torch.tensor([0.0, 1.0], device=device).expand(20_000, 2)
    flipped = Flip(0.3)(images, torch.Generator(device).manual_seed(0))
    assert abs(flipped[:, 0].mean().item() - 0.3) < 0.02


def test_a_shift_moves_each_image_by_itself(device: torch.device) -> None:
    images = torch.rand(400, 2, 5, 6, device=device)
    shifted = Shift(2)(images, torch.Generator(device).manual_seed(0))
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    found = torch.zeros(400, dtype=torch.int64, device=device)
    places = []
    for down in range(5):
        for right in range(5):
            moved = padded[:, :, down : down + 5, right : right + 6]
            same = (shifted == moved).flatten(1).all(1)
            found += same
            places.append(int(same.sum()))
    assert (found == 1).all()  # each is one of the 25
    assert min(places) > 0
    assert max(places) < 60  # 16 expected of each


def test_no_shift_is_no_change(device: torch.device) -> None:
    images = torch.rand(3, 1, 4, 4, device=device)
    assert torch.equal(Shift(0)(images, torch.Generator(device)), images)


def test_augmentations_print_themselves_and_refuse_nonsense() -> None:
    assert repr([Flip(), Shift(pixels=3)]) == "[Flip(p=0.5), Shift(pixels=3)]"
    assert Flip(0.5) == Flip()
    with pytest.raises(ValueError, match=r"p=1\.5"):
        Flip(1.5)
    for pixels in (-1, 1.5, True):
        with pytest.raises(ValueError, match="pixels="):
            Shift(pixels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Shift.*\(B, C, H, W\).*\(3, 4\)"):
        Shift()(torch.zeros(3, 4), torch.Generator())
    with pytest.raises(ValueError, match=r"Flip.*not shape \(3,\)"):  # it would mix examples
        Flip()(torch.zeros(3), torch.Generator())
