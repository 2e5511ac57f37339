"""Where a model decides by its numbers, a tie is none of an edit's errors, and an error no tie."""

import pytest
import torch
from torch import nn
from torchvision import models, ops

from structopt.channels import channel_groups, take, verify
from structopt.channels.deciding import Decisions
from structopt.channels.judging import ByValue


class Boxes(nn.Module):
    """Keeps four places whose scores are equal but for rounding, and their boxes."""

    def __init__(self, scale: float = 1e-16, root: bool = False) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 64, 3, padding=1)
        self.score, self.box = nn.Parameter(torch.randn(64)), nn.Conv2d(3, 4, 1)
        with torch.no_grad():  # one channel is constant, the others are lost beside it
            self.features.weight *= scale
            self.features.bias *= scale
            self.features.bias[0] = 1
        self.root = root

    def forward(self, x):
        box, x = self.box(x), self.features(x).relu()
        if self.root:  # as it depends on the width, no edit of it is exact
            x = nn.functional.normalize(x, dim=1) * len(self.features.weight) ** 0.5
        scores = (x.flatten(2)[0].T * self.score).sum(-1)
        best = scores.topk(4).indices
        return box.flatten(2)[0, :, best], scores[best]


def halves(model, example):
    return take(model, {g: range(0, g.size, 2) for g in channel_groups(model, example)})


def pairs(seed):
    torch.manual_seed(seed)
    example = torch.randn(1, 3, 8, 8)
    return Boxes(), example


def test_a_tie_is_decided_as_in_the_reference(monkeypatch):
    assert all(halves(*pairs(seed)).features.out_channels == 32 for seed in range(8))
    monkeypatch.setattr(ByValue, "decides", False)
    refused = 0
    for seed in range(8):
        try:
            halves(*pairs(seed))
        except ValueError as error:
            refused += "the outputs differ" in str(error)
    assert refused  # so the cases do hold ties


def test_a_detector_with_torchvisions_own_weights_can_be_narrowed():
    torch.manual_seed(0)
    model = models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=96, box_score_thresh=0.0
    ).eval()
    channels = channel_groups(model, ([torch.rand(3, 64, 64)],))
    group = channels["roi_heads.box_head.fc6"]
    made = take(model, {group: range(0, group.size, 2)})
    assert made.roi_heads.box_head.fc6.out_features == group.size // 2


@pytest.mark.parametrize("scale", [1e-16, 1.0])
def test_what_is_wrong_stays_refused_though_the_model_decides(scale):
    torch.manual_seed(0)
    model, example = Boxes(scale, root=True), torch.randn(1, 3, 3, 4)
    channels = channel_groups(model, example)
    with pytest.raises(ValueError, match="cannot be edited exactly"):
        take(model, {channels["features"]: range(32)})


class Verdict(Boxes):
    """Tells of its numbers whether they are large, and no more."""

    def forward(self, x):
        scores = super().forward(x)[1]
        return (scores > 0.5 * scores.new_tensor(len(self.features.weight))).double()


def test_an_error_that_shows_in_decisions_alone_is_no_tie():
    torch.manual_seed(0)
    model, example = Verdict(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        model.score[0] = 40  # more than half of 64 is, and so it is of 32
    channels = channel_groups(model, example)
    assert int(take(model, {channels["features"]: range(32)})(example).sum()) == 4
    with torch.no_grad():
        model.score[0] = 20  # more than half of 32 alone
    with pytest.raises(ValueError, match="cannot be edited exactly"):
        take(model, {channels["features"]: range(32)})


class Told(nn.Module):
    """Decides by a plain number that hangs on its width."""

    def __init__(self, decide):
        super().__init__()
        self.made, self.read, self.decide = nn.Linear(4, 16), nn.Linear(16, 8), decide

    def forward(self, x):
        hidden = self.made(x).relu()
        return self.decide(self.read(hidden), hidden.shape[-1])


TOLD = {
    "how many": lambda x, width: x.topk(width // 4).values.sum(-1),
    "how large": lambda x, width: (x > 0.01 * width).double(),
}


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("index", [range(8), [*range(16), *range(16)]])
def test_what_is_decided_by_another_number_is_no_tie(name, index):
    torch.manual_seed(0)
    model, example = Told(TOLD[name]), torch.randn(64, 4)
    (group,) = channel_groups(model, example)
    with pytest.raises(ValueError, match="cannot be edited exactly"):
        take(model, {group: index}, preserve=True)


class Chosen(nn.Module):
    """Gives nothing but its choice, between numbers of which some hang on the width."""

    def __init__(self, share=True):
        super().__init__()
        self.made, self.read, self.beside = nn.Linear(4, 16), nn.Linear(16, 8), nn.Linear(4, 8)
        self.share = share

    def forward(self, x):
        hidden = self.made(x).relu()
        width = hidden.shape[-1] if self.share else 16
        best = (self.read(hidden) / width + self.beside(x)).topk(2, dim=-1)
        return best.indices[:, 0]


@pytest.mark.parametrize("index", [range(15), [*range(16), *range(16)]])
def test_an_error_that_changes_no_choice_on_the_example_is_one(index):
    torch.manual_seed(1)
    example, right, wrong = torch.randn(2, 4), Chosen(share=False), Chosen()
    (group,) = channel_groups(right, example)
    assert take(right, {group: index}, preserve=True).made.out_features == len(index)
    (group,) = channel_groups(wrong, example)
    with pytest.raises(ValueError, match="cannot be edited exactly"):
        take(wrong, {group: index}, preserve=True)
    assert torch.equal(take(wrong, {group: torch.randperm(16)})(example), wrong(example))


def alike(a, b):
    return verify.difference(a, b) <= 1e-10


def nms(x):
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 4], [8, 8, 9, 9], [5, 5, 6, 6]]).to(x)
    return ops.nms(boxes[: len(x)], x, 0.5)


DECIDERS = {
    "topk": lambda x: x.topk(2).indices,
    "sort": lambda x: x.sort(descending=True).indices,
    "argmax": lambda x: x.argmax(),
    "max": lambda x: x.max(0).indices,
    "compare": lambda x: x > 0.5,
    "a number of its own": lambda x: x > x.mean().item(),
    "nonzero": lambda x: (x > 0.5).nonzero(),
    "floor": lambda x: (x * 2).floor(),
    "integers": lambda x: (x * 2).long(),
    "nms": nms,
}


@pytest.mark.parametrize("name", DECIDERS)
def test_what_is_decided_on_equal_numbers_is_taken_over_and_nothing_else(name, device):
    if device.type == "mps":
        pytest.skip("has no double precision")
    decide = DECIDERS[name]
    tied = torch.full((4,), 0.5, dtype=torch.float64, device=device)
    up, down = tied.clone(), tied.clone()
    up[1], down[0], down[2] = 0.5 + 1e-15, 0.5 + 1e-15, 0.5 - 1e-15
    first = Decisions()
    with first:
        expected = decide(up)
    assert not torch.equal(decide(down), expected)  # the two decide otherwise
    with Decisions(first.made, alike) as again:
        assert torch.equal(decide(down), expected)
    assert len(again.made) == len(first.made)
    for other in (down - torch.eye(4, dtype=down.dtype, device=device)[0] * 1e-6, down[:3]):
        with Decisions(first.made, alike):
            assert torch.equal(decide(other), decide_alone(decide, other))
    with first:  # a second run keeps its own
        decide(down)
    assert len(first.made) == len(again.made)


def decide_alone(decide, x):
    with torch.utils._python_dispatch._disable_current_modes():
        return decide(x)


def test_another_decision_is_not_followed():
    first, x = Decisions(), torch.tensor([1.0, 2.0])
    with first:
        assert (x > 1.5).tolist() == [False, True]
    with Decisions(first.made, alike):
        assert (x < 1.5).tolist() == [True, False]


def test_a_very_large_number_does_not_make_others_alike():
    """As attention's masks have it."""
    first = Decisions()
    x = torch.tensor([1.0, 2.0, -1e9], dtype=torch.float64)
    with first:
        x.argmax()
    with Decisions(first.made, alike):
        assert torch.tensor([2.001, 2.0, -1e9], dtype=torch.float64).argmax() == 0


def test_a_decision_outlives_what_the_model_writes_later():
    first = Decisions()
    x = torch.tensor([1.0, 2.0])
    with first:
        best = x.topk(1)
        x.zero_()
        best.indices.zero_()
    assert first.made[0].given[0].tolist() == [1, 2]
    assert first.made[0].out[1].tolist() == [1]


def test_decisions_without_entries_are_not_behind_each_other():
    """All tensors without entries lie at one place in memory."""
    with Decisions() as decisions:
        torch.zeros(0).argsort()
        chosen = torch.tensor([2.0, 1.0]).argsort()
    assert decisions.behind([torch.zeros(0)]) == []
    assert [t.tolist() for t in decisions.behind([chosen])] == [[2.0, 1.0]]
