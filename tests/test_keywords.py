"""A model that calls its layers by keyword is the same model, whatever watches them."""

import copy

import pytest
import torch
from torch import nn

from structopt import compression, distillation, measure, pruning
from structopt.compression import PACT, Grid


class Called(nn.Module):
    """Convolution, norm, ReLU, two linear layers and a block; each called by place or keyword."""

    def __init__(self, keyword):
        super().__init__()
        self.keyword = keyword
        self.conv, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.relu, self.first, self.act = nn.ReLU(), nn.Linear(6, 9), nn.ReLU()
        self.last, self.end, self.block = nn.Linear(9, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        for layer in self.conv, self.norm, self.relu:
            x = self._run(layer, x)
        x = x.mean((2, 3))
        for layer in self.first, self.act, self.last, self.end, self.block:
            x = self._run(layer, x)
        return x

    def _run(self, layer, x):
        return layer(input=x) if self.keyword else layer(x)


def rounded(model, batches):
    grid = Grid(4, symmetric=False)
    steps = compression.calibrate(model, batches, grid)
    return compression.round_inputs(model, grid, steps)(batches[0])


def learned(model, batches):
    made = [
        compression.prepare_qat(
            model, Grid(4), inputs=inputs, batches=batches, names=["conv.weight"]
        )
        for inputs in (PACT(4), Grid(4, symmetric=False))
    ]
    return [qat(batches[0]) for qat in made] + [qat.finish()[0](batches[0]) for qat in made]


def pair(device):
    by_place = Called(False).to(device).eval()
    by_keyword = copy.deepcopy(by_place)
    by_keyword.keyword = True
    return by_place, by_keyword


SAME = dict.fromkeys(("now", "wider"), measure.Timing(1.0, 1.0, 1.0, 1, "cpu"))
WATCHES = {
    "rounded": rounded,
    "learned": learned,
    "zeros": lambda m, b: vars(compression.input_zeros(m, b)),
    "clipped": lambda m, b: compression.clip_activations(m, b, Grid(3, symmetric=False)).bounds,
    "smoothed": lambda m, b: compression.smooth_inputs(m, b).state_dict(),
    "gptq": lambda m, b: {n: c.codes for n, c in compression.gptq_weights(m, b, Grid(3)).items()},
    "folded": lambda m, b: compression.fold_batch_norms(m, b[0]).conv.weight,
    "links": lambda m, b: [str(link) for link in compression.removable(m, b[0])],
    "corrected": lambda m, b: compression.correct_biases_(m, copy.deepcopy(m), b).state_dict(),
    "updated": lambda m, b: pruning.prune_and_update(m, b, 0.5)[0].state_dict(),
    "influence": lambda m, b: pruning.block_influence(m, b, ["block"]),
    "gap": lambda m, b: distillation.statistics_gap(m, b[0]),
}


@pytest.mark.parametrize("watch", WATCHES)
def test_keywords_change_nothing(watch, device):
    by_place, by_keyword = pair(device)
    batches = [torch.rand(5, 2, 6, 6, device=device) for _ in range(2)]
    found, expected = (WATCHES[watch](model, batches) for model in (by_keyword, by_place))
    if watch == "links":
        assert found == expected != []
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_file_rounds_what_is_given_by_keyword(tmp_path):
    _, model = pair("cpu")
    x = torch.rand(5, 2, 6, 6)
    made = compression.round_inputs(model, Grid(3))
    compression.save(made, tmp_path / "file")
    read = compression.load(tmp_path / "file", copy.deepcopy(model))
    assert torch.equal(read(x), made(x))
    assert not torch.equal(made(x), model(x))


def test_widths_are_timed_on_what_is_given_by_keyword(monkeypatch):
    _, model = pair("cpu")
    timed = []
    monkeypatch.setattr(
        "structopt.measure.widths.latency", lambda runs, x, **_: timed.append(x.shape) or SAME
    )
    measure.free_widths(model, torch.rand(5, 2, 6, 6))
    assert timed == [(5, 2, 6, 6), (5, 6), (5, 9)]
